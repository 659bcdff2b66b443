//! Rows of sessions.

use crate::http::authn::Role;
use crate::store::{Query, StoreError, WriteTx};
use crate::values;

/// A session as its row says.
pub(super) struct SessionRow {
    /// How the audit log names the operator.
    pub actor: String,
    /// Unix seconds of the sign-in.
    pub created_at: i64,
    /// Unix seconds of the last request.
    pub seen_at: i64,
    /// What single sign-on gave them; nothing for those whose role is an operator's own.
    pub role: Option<String>,
}

/// The session of this id.
pub(super) async fn session(tx: &mut impl Query, id: &str) -> Result<Option<SessionRow>, StoreError> {
    let row = tx
        .row("SELECT actor, created_at, seen_at, role FROM dashboard_sessions WHERE id = $1", values![id])
        .await?;
    row.map(|row| {
        Ok(SessionRow {
            actor: row.text(0)?,
            created_at: row.integer(1)?,
            seen_at: row.integer(2)?,
            role: row.optional_text(3)?,
        })
    })
    .transpose()
}

/// Begins a session.
pub(super) async fn insert(
    tx: &mut WriteTx,
    id: &str,
    actor: &str,
    role: Option<Role>,
    address: &str,
    now: i64,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO dashboard_sessions (id, actor, address, created_at, seen_at, role) \
         VALUES ($1, $2, $3, $4, $4, $5)",
        values![id, actor, address, now, role.map(Role::as_str)],
    )
    .await
    .map(drop)
}

/// Notes a sign of life.
pub(super) async fn touch(tx: &mut WriteTx, id: &str, now: i64) -> Result<(), StoreError> {
    tx.execute("UPDATE dashboard_sessions SET seen_at = $2 WHERE id = $1", values![id, now]).await.map(drop)
}

/// Ends a session. False: there was none.
pub(super) async fn delete(tx: &mut WriteTx, id: &str) -> Result<bool, StoreError> {
    Ok(tx.execute("DELETE FROM dashboard_sessions WHERE id = $1", values![id]).await? > 0)
}

/// Forgets sessions that began or were seen last before these times.
pub(super) async fn delete_ended(
    tx: &mut WriteTx,
    created_before: i64,
    seen_before: i64,
) -> Result<(), StoreError> {
    tx.execute(
        "DELETE FROM dashboard_sessions WHERE created_at <= $1 OR seen_at <= $2",
        values![created_before, seen_before],
    )
    .await
    .map(drop)
}

/// Somebody who is signed in by single sign-on.
pub(super) struct SignedOnRow {
    /// How the audit log names them.
    pub actor: String,
    /// What the provider gave them.
    pub role: String,
    /// Unix seconds of their last request.
    pub seen_at: i64,
}

/// Who is signed in by single sign-on, by name; at most `limit`.
pub(super) async fn signed_on(
    tx: &mut impl Query,
    created_after: i64,
    seen_after: i64,
    limit: i64,
) -> Result<Vec<SignedOnRow>, StoreError> {
    tx.rows(
        "SELECT actor, MAX(role), MAX(seen_at) FROM dashboard_sessions \
         WHERE role IS NOT NULL AND created_at > $1 AND seen_at > $2 GROUP BY actor ORDER BY actor LIMIT $3",
        values![created_after, seen_after, limit],
    )
    .await?
    .iter()
    .map(|row| Ok(SignedOnRow { actor: row.text(0)?, role: row.text(1)?, seen_at: row.integer(2)? }))
    .collect()
}

/// Ends every session of somebody who is signed in by single sign-on. False: there was none.
pub(super) async fn delete_signed_on(tx: &mut WriteTx, actor: &str) -> Result<bool, StoreError> {
    Ok(tx
        .execute("DELETE FROM dashboard_sessions WHERE actor = $1 AND role IS NOT NULL", values![actor])
        .await?
        > 0)
}
