//! Rows of operators.

use super::Operator;
use crate::http::authn::Role;
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::values;

/// Operators that a list shows at most.
const LIST_ROWS_MAX: i64 = 10_000;

fn read(row: &Row) -> Result<Operator, StoreError> {
    Ok(Operator {
        name: row.text(0)?,
        // A role that this version does not know lets nobody do more than look.
        role: Role::parse(&row.text(1)?).unwrap_or(Role::Viewer),
        credential: row.text(2)?,
        created_at: row.text(3)?,
        created_by: row.text(4)?,
        last_seen_at: row.optional_text(5)?,
        deactivated_at: row.optional_text(6)?,
    })
}

/// One operator.
pub(super) async fn operator(tx: &mut impl Query, name: &str) -> Result<Option<Operator>, StoreError> {
    let row = tx
        .row(
            "SELECT name, role, credential, created_at, created_by, last_seen_at, deactivated_at FROM operators \
             WHERE name = $1",
            values![name],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

/// Every operator, by name.
pub(super) async fn operators(tx: &mut impl Query) -> Result<Vec<Operator>, StoreError> {
    tx.rows(
        "SELECT name, role, credential, created_at, created_by, last_seen_at, deactivated_at FROM operators \
         ORDER BY name LIMIT $1",
        values![LIST_ROWS_MAX],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// Adds an operator. False: the name is taken.
pub(super) async fn insert(
    tx: &mut WriteTx,
    name: &str,
    role: Role,
    credential: &str,
    now: &str,
    created_by: &str,
) -> Result<bool, StoreError> {
    let inserted = tx
        .execute(
            "INSERT INTO operators (name, role, credential, created_at, created_by) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (name) DO NOTHING",
            values![name, role.as_str(), credential, now, created_by],
        )
        .await?;
    Ok(inserted > 0)
}

/// Deactivates an operator.
pub(super) async fn deactivate(tx: &mut WriteTx, name: &str, now: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE operators SET deactivated_at = $2 WHERE name = $1", values![name, now]).await.map(drop)
}

/// Writes another role.
pub(super) async fn set_role(tx: &mut WriteTx, name: &str, role: Role) -> Result<(), StoreError> {
    tx.execute("UPDATE operators SET role = $2 WHERE name = $1", values![name, role.as_str()]).await.map(drop)
}

/// Writes the hash of another secret.
pub(super) async fn set_credential(tx: &mut WriteTx, name: &str, credential: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE operators SET credential = $2 WHERE name = $1", values![name, credential])
        .await
        .map(drop)
}

/// Notes a sign of life.
pub(super) async fn touch(tx: &mut WriteTx, name: &str, now: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE operators SET last_seen_at = $2 WHERE name = $1", values![name, now]).await.map(drop)
}

/// Ends an operator's dashboard sessions, with whatever ends what they were opened with.
pub(super) async fn end_sessions(tx: &mut WriteTx, name: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM dashboard_sessions WHERE actor = $1", values![name]).await.map(drop)
}

/// Makes void whatever an operator stands behind and no run has used: proposals of theirs, and those that they have
/// approved. Gives each with its update.
pub(super) async fn void_proposals(
    tx: &mut WriteTx,
    name: &str,
) -> Result<Vec<(String, String)>, StoreError> {
    let rows = tx
        .rows(
            "UPDATE update_proposals SET void = 'operator_gone' WHERE (proposed_by = $1 OR approved_by = $1) \
             AND run_id IS NULL AND void IS NULL RETURNING proposal_id, migration_id",
            values![name],
        )
        .await?;
    rows.iter().map(|row| Ok((row.text(0)?, row.text(1)?))).collect()
}

/// The digest of the token that a set-up asks for. `None`: there is nothing to set up.
pub(super) async fn setup(tx: &mut impl Query) -> Result<Option<String>, StoreError> {
    state(tx, "setup").await
}

/// What the organisation is called.
pub(super) async fn organisation_name(tx: &mut impl Query) -> Result<Option<String>, StoreError> {
    state(tx, "organisation_name").await
}

async fn state(tx: &mut impl Query, key: &str) -> Result<Option<String>, StoreError> {
    let row = tx.row("SELECT value FROM deploy_state WHERE key = $1", values![key]).await?;
    row.map(|row| row.text(0)).transpose()
}

/// Takes another token for the set-up.
pub(super) async fn offer_setup(tx: &mut WriteTx, digest: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE deploy_state SET value = $1 WHERE key = 'setup'", values![digest]).await.map(drop)
}

/// Ends the set-up.
pub(super) async fn end_setup(tx: &mut WriteTx, organisation: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM deploy_state WHERE key = 'setup'", &[]).await?;
    tx.execute(
        "INSERT INTO deploy_state (key, value) VALUES ('organisation_name', $1)",
        values![organisation],
    )
    .await
    .map(drop)
}

/// The hash of the predecessor's dashboard password; nothing where there is none or it was switched off there.
pub(super) async fn password(tx: &mut impl Query) -> Result<Option<String>, StoreError> {
    let row = tx.row("SELECT value FROM proxy_config WHERE key = 'admin_password_hash'", &[]).await?;
    let switch = tx.row("SELECT value FROM proxy_config WHERE key = 'local_password_enabled'", &[]).await?;
    if let Some(switch) = switch
        && ["0", "false", "no", "off"].contains(&switch.text(0)?.trim().to_ascii_lowercase().as_str())
    {
        return Ok(None);
    }
    row.map(|row| row.text(0)).transpose()
}

/// Writes another hash of the same password. False: the hash was not `former` any more.
pub(super) async fn replace_password(tx: &mut WriteTx, former: &str, hash: &str) -> Result<bool, StoreError> {
    let replaced = tx
        .execute(
            "UPDATE proxy_config SET value = $2 WHERE key = 'admin_password_hash' AND value = $1",
            values![former, hash],
        )
        .await?;
    Ok(replaced > 0)
}
