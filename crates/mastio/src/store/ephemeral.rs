//! What lives for minutes and may change without an audit event: identifiers that may be used once, and
//! login challenges. Requests for an identity that were not granted end here too; what was decided is in the audit log.
//! Revoked access tokens live here until they would have expired; each has its event.
//! So does what only tells of a moment: which certificate an agent has presented last.
//!
//! A used identifier (`jti` of a DPoP proof or of a client assertion) is burnt by the commit of what it was used
//! for, see [`super::group`]; here are the rest of its life and its end.

use std::collections::HashSet;

use mastio_core::time::UnixTime;

use super::{Query as _, Store, StoreError, Value, WriteTx};
use crate::values;

/// Keeps a login challenge for `agent_id` until `expires_at`.
pub async fn store_challenge(
    store: &Store,
    nonce: &str,
    agent_id: &str,
    expires_at: UnixTime,
) -> Result<(), StoreError> {
    let mut tx = store.write().await?;
    tx.execute(
        "INSERT INTO login_challenges (nonce, agent_id, expires_at) VALUES ($1, $2, $3)",
        values![nonce, agent_id, expires_at.0],
    )
    .await?;
    tx.commit_unaudited().await
}

/// Takes a login challenge, once: true when it was there, for this agent, and had not expired.
///
/// A challenge that is asked for by another agent or too late is gone all the same.
pub async fn take_challenge(
    store: &Store,
    nonce: &str,
    agent_id: &str,
    now: UnixTime,
) -> Result<bool, StoreError> {
    let mut tx = store.write().await?;
    let taken = tx
        .row("DELETE FROM login_challenges WHERE nonce = $1 RETURNING agent_id, expires_at", values![nonce])
        .await?;
    tx.commit_unaudited().await?;
    let Some(row) = taken else { return Ok(false) };
    Ok(row.text(0)? == agent_id && row.integer(1)? > now.0)
}

/// A request for an identity that nobody granted is kept for a day after its end, so that its sender reads what became
/// of it.
const REQUEST_KEPT_S: i64 = 86_400;

/// Burns an identifier in a transaction that does more. False: it was used before.
pub async fn burn(tx: &mut WriteTx, id: &str, expires_at: UnixTime) -> Result<bool, StoreError> {
    let written = tx
        .execute(
            "INSERT INTO used_jwt_ids (jwt_id, expires_at) VALUES ($1, $2) ON CONFLICT (jwt_id) DO NOTHING",
            values![id, expires_at.0],
        )
        .await?;
    Ok(written > 0)
}

/// Puts an access token on the deny list until `expires_at`. False: it was there.
pub async fn revoke_token(
    tx: &mut WriteTx,
    jwt_id: &str,
    agent_id: &str,
    expires_at: UnixTime,
) -> Result<bool, StoreError> {
    let written = tx
        .execute(
            "INSERT INTO revoked_tokens (jwt_id, agent_id, expires_at) VALUES ($1, $2, $3) ON CONFLICT (jwt_id) DO NOTHING",
            values![jwt_id, agent_id, expires_at.0],
        )
        .await?;
    Ok(written > 0)
}

/// Which of these access tokens are revoked. One statement, and none for none.
pub(super) async fn revoked_among(tx: &mut WriteTx, jwt_ids: &[&str]) -> Result<HashSet<String>, StoreError> {
    if jwt_ids.is_empty() {
        return Ok(HashSet::new());
    }
    let places: Vec<String> = (1..=jwt_ids.len()).map(|place| format!("${place}")).collect();
    let sql = format!("SELECT jwt_id FROM revoked_tokens WHERE jwt_id IN ({})", places.join(", "));
    let values: Vec<Value> = jwt_ids.iter().map(|jwt_id| Value::from(*jwt_id)).collect();
    tx.rows_built(sql, &values).await?.iter().map(|row| row.text(0)).collect()
}

/// Whether an access token is revoked.
pub async fn is_revoked(store: &Store, jwt_id: &str) -> Result<bool, StoreError> {
    let row = store
        .read()
        .await?
        .row("SELECT jwt_id FROM revoked_tokens WHERE jwt_id = $1", values![jwt_id])
        .await?;
    Ok(row.is_some())
}

/// Notes which certificates agents have presented; each row is an agent, a fingerprint and Unix seconds.
pub async fn note_presented(store: &Store, rows: &[Vec<super::Value>]) -> Result<(), StoreError> {
    let mut tx = store.write().await?;
    tx.insert_many(
        "presented_certificates (agent_id, fingerprint, seen_at)",
        rows,
        "ON CONFLICT (agent_id, fingerprint) DO UPDATE SET seen_at = excluded.seen_at",
    )
    .await?;
    tx.commit_unaudited().await
}

/// Rows of a table that are forgotten in one transaction. A busy minute leaves hundreds of thousands, and whoever wants to
/// write meanwhile waits for the lock.
const FORGOTTEN_AT_ONCE_MAX: u64 = 500;

/// Forgets what has expired, in turn with whoever else writes. Identifiers are kept past their window by the clock leeway,
/// or a proof that is still acceptable could be replayed.
pub async fn forget_expired(store: &Store, now: UnixTime) -> Result<u64, StoreError> {
    let mut forgotten = 0;
    loop {
        let mut tx = store.write().await?;
        let mut more = false;
        for (table, key, expired, before) in [
            ("used_jwt_ids", "jwt_id", "expires_at < $1", now.0),
            ("login_challenges", "nonce", "expires_at < $1", now.0),
            ("revoked_tokens", "jwt_id", "expires_at < $1", now.0),
            (
                "enrollment_requests",
                "session_id",
                "status IN ('pending', 'rejected') AND expires_at < $1",
                now.0 - REQUEST_KEPT_S,
            ),
        ] {
            let statement = format!(
                "DELETE FROM {table} WHERE {key} IN \
                 (SELECT {key} FROM {table} WHERE {expired} LIMIT {FORGOTTEN_AT_ONCE_MAX})"
            );
            let rows = tx.execute_built(statement, values![before]).await?;
            forgotten += rows;
            more |= rows == FORGOTTEN_AT_ONCE_MAX;
        }
        tx.commit_unaudited().await?;
        if !more {
            return Ok(forgotten);
        }
    }
}
