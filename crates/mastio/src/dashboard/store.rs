//! Rows of sessions.

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
}

/// The session of this id.
pub(super) async fn session(tx: &mut impl Query, id: &str) -> Result<Option<SessionRow>, StoreError> {
    let row = tx
        .row("SELECT actor, created_at, seen_at FROM dashboard_sessions WHERE id = $1", values![id])
        .await?;
    row.map(|row| {
        Ok(SessionRow { actor: row.text(0)?, created_at: row.integer(1)?, seen_at: row.integer(2)? })
    })
    .transpose()
}

/// Begins a session.
pub(super) async fn insert(
    tx: &mut WriteTx,
    id: &str,
    actor: &str,
    address: &str,
    now: i64,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO dashboard_sessions (id, actor, address, created_at, seen_at) VALUES ($1, $2, $3, $4, $4)",
        values![id, actor, address, now],
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
