//! Rows of proposals.

use super::Proposal;
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::values;

fn read(row: &Row) -> Result<Proposal, StoreError> {
    Ok(Proposal {
        proposal_id: row.text(0)?,
        migration_id: row.text(1)?,
        direction: row.text(2)?,
        plan_digest: row.text(3)?,
        proposed_by: row.text(4)?,
        proposed_at: row.text(5)?,
        expires_at: row.integer(6)?,
        approved_by: row.optional_text(7)?,
        approved_at: row.optional_text(8)?,
        run_id: row.optional_text(9)?,
        void: row.optional_text(10)?,
    })
}

/// The newest proposal of an update and a direction. Earlier ones are void or used.
pub(super) async fn newest(
    tx: &mut impl Query,
    migration_id: &str,
    direction: &str,
) -> Result<Option<Proposal>, StoreError> {
    let row = tx
        .row(
            "SELECT proposal_id, migration_id, direction, plan_digest, proposed_by, proposed_at, expires_at, approved_by, \
             approved_at, run_id, void FROM update_proposals WHERE migration_id = $1 AND direction = $2 \
             ORDER BY proposal_id DESC LIMIT 1",
            values![migration_id, direction],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

/// One proposal of an update.
pub(super) async fn by_id(
    tx: &mut impl Query,
    migration_id: &str,
    proposal_id: &str,
) -> Result<Option<Proposal>, StoreError> {
    let row = tx
        .row(
            "SELECT proposal_id, migration_id, direction, plan_digest, proposed_by, proposed_at, expires_at, approved_by, \
             approved_at, run_id, void FROM update_proposals WHERE migration_id = $1 AND proposal_id = $2",
            values![migration_id, proposal_id],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

/// The proposals of an update, newest first.
pub(super) async fn list(
    tx: &mut impl Query,
    migration_id: &str,
    limit: i64,
) -> Result<Vec<Proposal>, StoreError> {
    tx.rows(
        "SELECT proposal_id, migration_id, direction, plan_digest, proposed_by, proposed_at, expires_at, approved_by, \
         approved_at, run_id, void FROM update_proposals WHERE migration_id = $1 ORDER BY proposal_id DESC LIMIT $2",
        values![migration_id, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// Adds a proposal.
pub(super) async fn insert(tx: &mut WriteTx, proposal: &Proposal) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO update_proposals (proposal_id, migration_id, direction, plan_digest, proposed_by, proposed_at, \
         expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7)",
        values![
            &proposal.proposal_id,
            &proposal.migration_id,
            &proposal.direction,
            &proposal.plan_digest,
            &proposal.proposed_by,
            &proposal.proposed_at,
            proposal.expires_at
        ],
    )
    .await
    .map(drop)
}

/// Makes whatever is open void, for a reason.
pub(super) async fn void_open(
    tx: &mut WriteTx,
    migration_id: &str,
    direction: &str,
    why: &str,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_proposals SET void = $3 WHERE migration_id = $1 AND direction = $2 AND run_id IS NULL \
         AND void IS NULL",
        values![migration_id, direction, why],
    )
    .await
    .map(drop)
}

/// Notes who has approved a proposal.
pub(super) async fn set_approved(
    tx: &mut WriteTx,
    proposal_id: &str,
    actor: &str,
    now: &str,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_proposals SET approved_by = $2, approved_at = $3 WHERE proposal_id = $1",
        values![proposal_id, actor, now],
    )
    .await
    .map(drop)
}

/// Notes which run has used a proposal up.
pub(super) async fn set_used(tx: &mut WriteTx, proposal_id: &str, run_id: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE update_proposals SET run_id = $2 WHERE proposal_id = $1", values![proposal_id, run_id])
        .await
        .map(drop)
}
