//! Rows of revoked certificates and of the lists that were signed.

use mastio_core::time::UnixTime;
use mastio_core::x509::crl::RevocationReason;

use super::{Crl, Revocation};
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::values;

fn read(row: &Row) -> Result<Revocation, StoreError> {
    Ok(Revocation {
        fingerprint: row.text(0)?,
        agent_id: row.text(1)?,
        serial: row.text(2)?,
        issuer_key_id: row.text(3)?,
        not_after: UnixTime(row.integer(4)?),
        revoked_at: UnixTime(row.integer(5)?),
        reason: RevocationReason::parse(&row.text(6)?).unwrap_or(RevocationReason::Unspecified),
        revoked_by: row.text(7)?,
    })
}

/// Whether a certificate is revoked.
pub async fn is_revoked(tx: &mut impl Query, fingerprint: &str) -> Result<bool, StoreError> {
    let row =
        tx.row("SELECT 1 FROM revoked_certificates WHERE fingerprint = $1", values![fingerprint]).await?;
    Ok(row.is_some())
}

/// A page of revoked certificates after a fingerprint.
pub async fn page(tx: &mut impl Query, after: &str, limit: i64) -> Result<Vec<Revocation>, StoreError> {
    tx.rows(
        "SELECT fingerprint, agent_id, serial, issuer_key_id, not_after, revoked_at, reason, revoked_by \
         FROM revoked_certificates WHERE fingerprint > $1 ORDER BY fingerprint LIMIT $2",
        values![after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// Revokes certificates. One that is revoked already keeps its row.
pub async fn insert(tx: &mut WriteTx, revocations: &[Revocation]) -> Result<u64, StoreError> {
    let rows: Vec<_> = revocations
        .iter()
        .map(|revocation| {
            values![
                &revocation.fingerprint,
                &revocation.agent_id,
                &revocation.serial,
                &revocation.issuer_key_id,
                revocation.not_after.0,
                revocation.revoked_at.0,
                revocation.reason.as_str(),
                &revocation.revoked_by,
            ]
            .to_vec()
        })
        .collect();
    tx.insert_many(
        "revoked_certificates (fingerprint, agent_id, serial, issuer_key_id, not_after, revoked_at, reason, revoked_by)",
        &rows,
        "ON CONFLICT (fingerprint) DO NOTHING",
    )
    .await
}

/// What a list of one issuer has to say: serial, since when and why, of certificates that end after `ends_after`.
pub async fn entries(
    tx: &mut impl Query,
    issuer_key_id: &str,
    ends_after: UnixTime,
) -> Result<Vec<(String, UnixTime, RevocationReason)>, StoreError> {
    let mut entries = Vec::new();
    for row in tx
        .rows(
            "SELECT serial, revoked_at, reason FROM revoked_certificates \
             WHERE issuer_key_id = $1 AND not_after > $2 AND serial <> ''",
            values![issuer_key_id, ends_after.0],
        )
        .await?
    {
        let reason = RevocationReason::parse(&row.text(2)?).unwrap_or(RevocationReason::Unspecified);
        entries.push((row.text(0)?, UnixTime(row.integer(1)?), reason));
    }
    // Agents that are set aside may be taken back: their certificates are on hold.
    for row in tx
        .rows(
            "SELECT c.serial, a.revoked_at FROM internal_agents a JOIN agent_certificates c ON c.agent_id = a.agent_id \
             WHERE a.is_active = 0 AND c.issuer_key_id = $1 AND c.not_after > $2",
            values![issuer_key_id, ends_after.0],
        )
        .await?
    {
        let since = row.optional_text(1)?.and_then(|text| UnixTime::parse(&text)).unwrap_or(UnixTime(0));
        entries.push((row.text(0)?, since, RevocationReason::CertificateHold));
    }
    Ok(entries)
}

/// The newest list of one issuer.
pub async fn crl(tx: &mut impl Query, issuer_key_id: &str) -> Result<Option<Crl>, StoreError> {
    let row = tx
        .row(
            "SELECT number, this_update, next_update, content_digest, der_base64 FROM pki_crls WHERE issuer_key_id = $1",
            values![issuer_key_id],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Crl {
        number: row.integer(0)?,
        this_update: UnixTime(row.integer(1)?),
        next_update: UnixTime(row.integer(2)?),
        content_digest: row.text(3)?,
        der_base64: row.text(4)?,
    }))
}

/// Keeps the newest list of one issuer.
pub async fn set_crl(tx: &mut WriteTx, issuer_key_id: &str, crl: &Crl) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO pki_crls (issuer_key_id, number, this_update, next_update, content_digest, der_base64) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (issuer_key_id) DO UPDATE SET number = excluded.number, \
         this_update = excluded.this_update, next_update = excluded.next_update, \
         content_digest = excluded.content_digest, der_base64 = excluded.der_base64",
        values![
            issuer_key_id,
            crl.number,
            crl.this_update.0,
            crl.next_update.0,
            &crl.content_digest,
            &crl.der_base64
        ],
    )
    .await
    .map(drop)
}

/// Has an update's new leaves inherit the revocation of those that they replace. Called in the commit of an apply.
pub async fn carry_over(tx: &mut WriteTx, run_id: &str) -> Result<(), StoreError> {
    if tx.row("SELECT 1 FROM revoked_certificates LIMIT 1", &[]).await?.is_none() {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO revoked_certificates (fingerprint, agent_id, serial, issuer_key_id, not_after, revoked_at, reason, \
         revoked_by) SELECT c.fingerprint, c.agent_id, c.serial, c.issuer_key_id, c.not_after, r.revoked_at, r.reason, \
         r.revoked_by FROM revoked_certificates r JOIN update_run_certificates c ON c.run_id = $1 \
         AND c.agent_id = r.agent_id AND c.old_fingerprint = r.fingerprint WHERE true ON CONFLICT (fingerprint) DO NOTHING",
        values![run_id],
    )
    .await
    .map(drop)
}

/// Has leaves that a rollback gives back inherit the revocation of those that had replaced them.
pub async fn carry_back(tx: &mut WriteTx, run_id: &str) -> Result<(), StoreError> {
    if tx.row("SELECT 1 FROM revoked_certificates LIMIT 1", &[]).await?.is_none() {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO revoked_certificates (fingerprint, agent_id, serial, issuer_key_id, not_after, revoked_at, reason, \
         revoked_by) SELECT c.old_fingerprint, c.agent_id, c.old_serial, c.old_issuer_key_id, c.not_after, r.revoked_at, \
         r.reason, r.revoked_by FROM revoked_certificates r JOIN update_run_certificates c ON c.run_id = $1 \
         AND c.agent_id = r.agent_id AND c.fingerprint = r.fingerprint WHERE true ON CONFLICT (fingerprint) DO NOTHING",
        values![run_id],
    )
    .await
    .map(drop)
}
