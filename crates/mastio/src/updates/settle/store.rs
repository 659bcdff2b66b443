//! Rows of the trust overlap.

use mastio_core::time::UnixTime;

use crate::store::{Query, StoreError, WriteTx};
use crate::values;

/// A retiring Org CA as its row says.
pub(super) struct RetiringRow {
    /// SHA-256 of its DER, lowercase hex.
    pub fingerprint: String,
    /// When it began to retire, as stored.
    pub added_at: String,
    /// The run that replaced it, or what adopted it.
    pub added_by: String,
}

/// Every retiring Org CA, the newest first.
pub(super) async fn retiring(tx: &mut impl Query) -> Result<Vec<RetiringRow>, StoreError> {
    tx.rows(
        "SELECT fingerprint, added_at, added_by FROM pki_anchors WHERE state = 'retiring' ORDER BY added_at DESC",
        &[],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(RetiringRow { fingerprint: row.text(0)?, added_at: row.text(1)?, added_by: row.text(2)? })
    })
    .collect()
}

/// An active agent whose present certificate is not known to stand under a CA of today.
pub(super) struct Candidate {
    /// The agent.
    pub agent_id: String,
    /// Leaf and what follows it, PEM.
    pub cert_pem: String,
    /// The stored tag.
    pub enrollment_method: Option<String>,
}

/// A page of active agents whose certificate none of the two keys is known to have signed.
pub(super) async fn not_issued_by(
    tx: &mut impl Query,
    key_ids: [&str; 2],
    after: &str,
    limit: i64,
) -> Result<Vec<Candidate>, StoreError> {
    tx.rows(
        "SELECT a.agent_id, a.cert_pem, a.enrollment_method FROM internal_agents a \
         LEFT JOIN agent_certificates c ON c.agent_id = a.agent_id \
         WHERE a.is_active = 1 AND a.cert_pem IS NOT NULL AND a.agent_id > $3 \
         AND (c.agent_id IS NULL OR (c.issuer_key_id <> $1 AND c.issuer_key_id <> $2)) \
         ORDER BY a.agent_id LIMIT $4",
        values![key_ids[0], key_ids[1], after, limit],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(Candidate {
            agent_id: row.text(0)?,
            cert_pem: row.text(1)?,
            enrollment_method: row.optional_text(2)?,
        })
    })
    .collect()
}

/// How many active agents have a certificate.
pub(super) async fn active(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx
        .row("SELECT COUNT(*) FROM internal_agents WHERE is_active = 1 AND cert_pem IS NOT NULL", &[])
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// How many active agents have presented anything since the overlap began.
pub(super) async fn seen(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*) FROM internal_agents a WHERE a.is_active = 1 AND a.cert_pem IS NOT NULL \
             AND EXISTS (SELECT 1 FROM presented_certificates p WHERE p.agent_id = a.agent_id)",
            &[],
        )
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// How many active agents have presented a former certificate, and not the present one since.
pub(super) async fn on_old_leaf(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*) FROM internal_agents a WHERE a.is_active = 1 AND EXISTS (\
             SELECT 1 FROM presented_certificates p LEFT JOIN agent_certificates c ON c.agent_id = p.agent_id \
             WHERE p.agent_id = a.agent_id AND p.fingerprint IS DISTINCT FROM c.fingerprint AND NOT EXISTS (\
             SELECT 1 FROM presented_certificates q WHERE q.agent_id = p.agent_id AND q.fingerprint = c.fingerprint \
             AND q.seen_at > p.seen_at))",
            &[],
        )
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// An agent that presents a former certificate.
pub(super) struct OldLeaf {
    /// The agent.
    pub agent_id: String,
    /// Which certificate.
    pub fingerprint: String,
    /// When it was presented last, in Unix seconds.
    pub seen_at: i64,
    /// When the present one was, if ever.
    pub present_seen_at: Option<i64>,
}

/// The first of those that [`on_old_leaf`] counts, a row for each certificate.
pub(super) async fn old_leaves(tx: &mut impl Query, limit: i64) -> Result<Vec<OldLeaf>, StoreError> {
    tx.rows(
        "SELECT p.agent_id, p.fingerprint, p.seen_at, q.seen_at FROM presented_certificates p \
         JOIN internal_agents a ON a.agent_id = p.agent_id AND a.is_active = 1 \
         LEFT JOIN agent_certificates c ON c.agent_id = p.agent_id \
         LEFT JOIN presented_certificates q ON q.agent_id = p.agent_id AND q.fingerprint = c.fingerprint \
         WHERE p.fingerprint IS DISTINCT FROM c.fingerprint AND (q.seen_at IS NULL OR q.seen_at <= p.seen_at) \
         ORDER BY p.agent_id, p.seen_at DESC LIMIT $1",
        values![limit],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(OldLeaf {
            agent_id: row.text(0)?,
            fingerprint: row.text(1)?,
            seen_at: row.integer(2)?,
            present_seen_at: row.optional_integer(3)?,
        })
    })
    .collect()
}

/// Retires an Org CA and destroys its key, if that is still here.
pub(super) async fn retire(tx: &mut WriteTx, fingerprint: &str) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE pki_anchors SET state = 'retired', key_sealed = NULL WHERE fingerprint = $1",
        values![fingerprint],
    )
    .await
    .map(drop)
}

/// Ends what an overlap keeps: former certificates are not accepted any more, and nobody asks who presents them.
/// Gives how many former certificates there were.
pub(super) async fn forget_former(tx: &mut WriteTx) -> Result<u64, StoreError> {
    let former = tx.execute("DELETE FROM superseded_certificates", &[]).await?;
    tx.execute("DELETE FROM presented_certificates", &[]).await?;
    Ok(former)
}

/// Destroys the private keys in the images of every run. No run is under way.
pub(super) async fn destroy_sealed_images(tx: &mut WriteTx) -> Result<(), StoreError> {
    tx.execute("UPDATE update_images SET before = NULL, restore = NULL, after = NULL WHERE sealed = 1", &[])
        .await
        .map(drop)
}

/// A time in Unix seconds as the API shows it.
pub(super) fn shown(seconds: i64) -> String {
    UnixTime(seconds).to_rfc3339()
}
