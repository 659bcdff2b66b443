//! Rows of updates: `pending_updates`, runs, images, snapshots.
//!
//! `update_images` holds, for every cell in a run's scope, its text as the run saw it (`before`) and the text it
//! becomes (`after`). It is snapshot and change set in one: a rollback sets back what still reads `after`. What follows
//! every leaf that a run writes, its intermediate, is kept once, in `update_runs.follows`; `follows` says where it belongs
//! behind `after`. `restore`,
//! where `restores` says so, is what a rollback sets instead of `before`: a torn run of the predecessor left
//! its own snapshot. Public columns lie in clear, so that SQL compares and copies them; sealed ones are sealed for
//! their place in this table.

use mastio_core::time::UnixTime;
use serde_json::json;

use super::error::UpdateError;
use super::migration::{Cell, Declaration, FleetColumn};
use crate::pki::revocation::store as revocation;
use crate::pki::store::{CertificateFacts, hex};
use crate::store::{Query, StoreError, Value, WriteTx};
use crate::values;

/// A row of `pending_updates`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateRow {
    /// The id.
    pub migration_id: String,
    /// `pending`, `applied`, `failed` or `rolled_back`.
    pub status: String,
    /// When the detector first saw it, as stored.
    pub detected_at: String,
    /// When it was applied.
    pub applied_at: Option<String>,
    /// When it was rolled back.
    pub rolled_back_at: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// The row's own copy of its criticality.
    pub criticality: Option<String>,
    /// The row's own copy of the enrollment types, a JSON list.
    pub affects_enrollments: Option<String>,
    /// The row's own copy of what it requires, a JSON list.
    pub requires: Option<String>,
}

/// Every row, by id.
pub async fn rows(tx: &mut impl Query) -> Result<Vec<UpdateRow>, StoreError> {
    tx.rows(
        "SELECT migration_id, status, detected_at, applied_at, rolled_back_at, error, criticality, affects_enrollments, \
         requires FROM pending_updates ORDER BY migration_id",
        &[],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(UpdateRow {
            migration_id: row.text(0)?,
            status: row.text(1)?,
            detected_at: row.text(2)?,
            applied_at: row.optional_text(3)?,
            rolled_back_at: row.optional_text(4)?,
            error: row.optional_text(5)?,
            criticality: row.optional_text(6)?,
            affects_enrollments: row.optional_text(7)?,
            requires: row.optional_text(8)?,
        })
    })
    .collect()
}

/// Inserts a pending row, or completes the copies of one that has none. An existing row keeps its status and date.
pub async fn detect(tx: &mut WriteTx, declaration: &Declaration, now: UnixTime) -> Result<u64, StoreError> {
    tx.execute(
        "INSERT INTO pending_updates (migration_id, detected_at, status, criticality, affects_enrollments, requires) \
         VALUES ($1, $2, 'pending', $3, $4, $5) ON CONFLICT (migration_id) DO UPDATE SET \
         criticality = excluded.criticality, affects_enrollments = excluded.affects_enrollments, requires = excluded.requires \
         WHERE pending_updates.criticality IS DISTINCT FROM excluded.criticality \
         OR pending_updates.affects_enrollments IS DISTINCT FROM excluded.affects_enrollments \
         OR pending_updates.requires IS DISTINCT FROM excluded.requires",
        values![
            declaration.migration_id,
            now.to_rfc3339(),
            declaration.criticality.as_str(),
            json!(declaration.affected_tags()).to_string(),
            json!(declaration.requires).to_string()
        ],
    )
    .await
}

/// Sets a row to `applied`.
pub async fn set_applied(
    tx: &mut WriteTx,
    declaration: &Declaration,
    now: UnixTime,
) -> Result<(), StoreError> {
    detect(tx, declaration, now).await?;
    tx.execute(
        "UPDATE pending_updates SET status = 'applied', applied_at = $2, error = NULL, rolled_back_at = NULL \
         WHERE migration_id = $1",
        values![declaration.migration_id, now.to_rfc3339()],
    )
    .await
    .map(drop)
}

/// Closes a row whose check finds nothing to do: `applied` without a change. So it stands on no other update, and its
/// copy of what it requires says so: it must not block the rollback of one.
pub async fn set_closed(
    tx: &mut WriteTx,
    declaration: &Declaration,
    now: UnixTime,
) -> Result<(), StoreError> {
    set_applied(tx, declaration, now).await?;
    tx.execute(
        "UPDATE pending_updates SET requires = '[]' WHERE migration_id = $1",
        values![declaration.migration_id],
    )
    .await
    .map(drop)
}

/// Sets a row to `rolled_back`.
pub async fn set_rolled_back(tx: &mut WriteTx, migration_id: &str, now: UnixTime) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE pending_updates SET status = 'rolled_back', rolled_back_at = $2, error = NULL WHERE migration_id = $1",
        values![migration_id, now.to_rfc3339()],
    )
    .await
    .map(drop)
}

/// Sets a row to `failed` with its error.
pub async fn set_failed(tx: &mut WriteTx, migration_id: &str, error: &str) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE pending_updates SET status = 'failed', error = $2 WHERE migration_id = $1",
        values![migration_id, error],
    )
    .await
    .map(drop)
}

/// A run that has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRow {
    /// ULID.
    pub run_id: String,
    /// Of which migration.
    pub migration_id: String,
    /// `apply` or `rollback`.
    pub direction: String,
    /// Where it is.
    pub phase: String,
    /// Who asked for it.
    pub actor: String,
    /// Whether it has changed state.
    pub committed: bool,
    /// Whether the stored state has passed verification.
    pub verified: bool,
    /// Which replica runs it.
    pub replica: String,
    /// Unix seconds of its last sign of life.
    pub updated_at: i64,
    /// What is done of the present phase.
    pub done: i64,
    /// How much there is.
    pub total: i64,
    /// How many signs of life it has given.
    pub beats: i64,
}

fn run(row: &crate::store::Row) -> Result<RunRow, StoreError> {
    Ok(RunRow {
        run_id: row.text(0)?,
        migration_id: row.text(1)?,
        direction: row.text(2)?,
        phase: row.text(3)?,
        actor: row.text(4)?,
        committed: row.optional_text(5)?.is_some(),
        verified: row.optional_text(6)?.is_some(),
        replica: row.text(7)?,
        updated_at: row.integer(8)?,
        done: row.integer(9)?,
        total: row.integer(10)?,
        beats: row.integer(11)?,
    })
}

/// The run that is under way; there is never more than one.
pub async fn open_run(tx: &mut impl Query) -> Result<Option<RunRow>, StoreError> {
    let row = tx
        .row(
            "SELECT run_id, migration_id, direction, phase, actor, committed_at, verified_at, replica, updated_at, done, \
             total, beats FROM update_runs WHERE finished_at IS NULL",
            &[],
        )
        .await?;
    row.as_ref().map(run).transpose()
}

/// One run.
pub async fn run_by_id(tx: &mut impl Query, run_id: &str) -> Result<Option<RunRow>, StoreError> {
    let row = tx
        .row(
            "SELECT run_id, migration_id, direction, phase, actor, committed_at, verified_at, replica, updated_at, done, \
             total, beats FROM update_runs WHERE run_id = $1",
            values![run_id],
        )
        .await?;
    row.as_ref().map(run).transpose()
}

/// The run of a predecessor's apply that stopped half-way; its images are the predecessor's snapshot.
pub async fn predecessor_run(tx: &mut impl Query, migration_id: &str) -> Result<Option<String>, StoreError> {
    let row = tx
        .row(
            "SELECT run_id FROM update_runs WHERE migration_id = $1 AND actor = 'predecessor' AND committed_at IS NULL \
             LIMIT 1",
            values![migration_id],
        )
        .await?;
    row.map(|row| row.text(0)).transpose()
}

/// Begins a run. The unique index on open runs lets one in (invariant I8).
pub async fn begin_run(
    tx: &mut WriteTx,
    run_id: &str,
    migration_id: &str,
    direction: &str,
    actor: &str,
    replica: &str,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO update_runs (run_id, migration_id, direction, phase, actor, started_at, updated_at, replica) \
         VALUES ($1, $2, $3, 'detect', $4, $5, $6, $7)",
        values![run_id, migration_id, direction, actor, now.to_rfc3339(), now.0, replica],
    )
    .await
    .map(drop)
}

/// Notes where a run is. False where it is not `replica`'s any more: it was silent, and another one closed it.
pub async fn progress(
    tx: &mut WriteTx,
    run_id: &str,
    replica: &str,
    (phase, done, total): (&str, i64, i64),
    now: UnixTime,
) -> Result<bool, StoreError> {
    let noted = tx
        .execute(
            "UPDATE update_runs SET phase = $3, done = $4, total = $5, updated_at = $6 \
             WHERE run_id = $1 AND replica = $2 AND finished_at IS NULL",
            values![run_id, replica, phase, done, total, now.0],
        )
        .await?;
    Ok(noted == 1)
}

/// Gives a sign of life of a run.
pub async fn beat(tx: &mut WriteTx, run_id: &str, replica: &str, now: UnixTime) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_runs SET beats = beats + 1, updated_at = $3 \
         WHERE run_id = $1 AND replica = $2 AND finished_at IS NULL",
        values![run_id, replica, now.0],
    )
    .await
    .map(drop)
}

/// Whether an open run is `replica`'s. Under the lock this decides who may commit it (invariant I8).
pub async fn is_run_of(tx: &mut impl Query, run_id: &str, replica: &str) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT 1 FROM update_runs WHERE run_id = $1 AND replica = $2 AND finished_at IS NULL",
            values![run_id, replica],
        )
        .await?;
    Ok(row.is_some())
}

/// Takes over the run of a dead process.
pub async fn claim_run(
    tx: &mut WriteTx,
    run_id: &str,
    replica: &str,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_runs SET replica = $2, beats = beats + 1, updated_at = $3 WHERE run_id = $1",
        values![run_id, replica, now.0],
    )
    .await
    .map(drop)
}

/// Marks a run's change as committed, in the transaction that commits it. `halts`: until it is verified. `cells`: how
/// many cells of the fleet it wrote.
pub async fn set_committed(
    tx: &mut WriteTx,
    run_id: &str,
    halts: bool,
    cells: i64,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_runs SET phase = 'activate', committed_at = $2, halts = $3, written = $4, updated_at = $5 \
         WHERE run_id = $1",
        values![run_id, now.to_rfc3339(), halts, cells, now.0],
    )
    .await
    .map(drop)
}

/// Ends a run: verified, or with an error.
pub async fn finish_run(
    tx: &mut WriteTx,
    run_id: &str,
    verified: bool,
    error: Option<&str>,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_runs SET finished_at = $2, verified_at = $3, error = $4, updated_at = $5 WHERE run_id = $1",
        values![run_id, now.to_rfc3339(), verified.then(|| now.to_rfc3339()), error, now.0],
    )
    .await
    .map(drop)
}

/// Lifts the halt of earlier runs of `migration_id` that never verified: what `run_id` has verified is the state now.
pub async fn overrule_earlier(tx: &mut WriteTx, migration_id: &str, run_id: &str) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_runs SET halts = 0 WHERE migration_id = $1 AND run_id <> $2 AND halts = 1 \
         AND verified_at IS NULL",
        values![migration_id, run_id],
    )
    .await
    .map(drop)
}

/// Gives up what a finished run has staged or kept. [`drop_some_images`] removes it later, a few rows at a time:
/// whoever holds the lock of the audit head must not delete a fleet.
pub async fn discard_images(tx: &mut WriteTx, run_id: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE update_runs SET phase = 'discarded' WHERE run_id = $1", values![run_id])
        .await
        .map(drop)
}

/// Runs whose images are given up and not yet removed.
pub async fn discarded_runs(tx: &mut impl Query) -> Result<Vec<String>, StoreError> {
    tx.rows("SELECT run_id FROM update_runs WHERE phase = 'discarded' AND finished_at IS NOT NULL", &[])
        .await?
        .iter()
        .map(|row| row.text(0))
        .collect()
}

/// Removes up to `limit` images of a discarded run with their certificates; 0 when none is left, and the run says so.
pub async fn drop_some_images(tx: &mut WriteTx, run_id: &str, limit: i64) -> Result<u64, StoreError> {
    let images = tx
        .execute(
            "DELETE FROM update_images WHERE run_id = $1 AND (table_name, row_key, column_name) IN (\
             SELECT table_name, row_key, column_name FROM update_images WHERE run_id = $1 LIMIT $2)",
            values![run_id, limit],
        )
        .await?;
    let certificates = tx
        .execute(
            "DELETE FROM update_run_certificates WHERE run_id = $1 AND agent_id IN (\
             SELECT agent_id FROM update_run_certificates WHERE run_id = $1 LIMIT $2)",
            values![run_id, limit],
        )
        .await?;
    if images + certificates == 0 {
        tx.execute("UPDATE update_runs SET phase = 'swept' WHERE run_id = $1", values![run_id]).await?;
    }
    Ok(images + certificates)
}

/// What `migration_state_backups.snapshot_json` says of a snapshot of ours: which run's images it is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SnapshotDescriptor {
    /// `mastio/1`.
    pub format: String,
    /// The run whose images they are.
    pub run_id: String,
    /// How many images there are.
    pub rows: i64,
    /// When the end of the trust overlap made it one that no rollback goes back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_at: Option<String>,
}

/// The snapshot of a migration, where there is one.
pub async fn snapshot(
    tx: &mut impl Query,
    migration_id: &str,
) -> Result<Option<SnapshotDescriptor>, UpdateError> {
    let row = tx
        .row(
            "SELECT snapshot_json FROM migration_state_backups WHERE migration_id = $1",
            values![migration_id],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let descriptor = serde_json::from_str(&row.text(0)?).map_err(|_| UpdateError::SnapshotDamaged {
        migration_id: migration_id.to_owned(),
        row: "its descriptor".to_owned(),
    })?;
    Ok(Some(descriptor))
}

/// The snapshot that a rollback goes back to.
///
/// Errors: [`UpdateError::NoSnapshot`]; [`UpdateError::Settled`], where the trust overlap has ended since.
pub async fn rollback_snapshot(
    tx: &mut impl Query,
    migration_id: &str,
) -> Result<SnapshotDescriptor, UpdateError> {
    let snapshot = snapshot(tx, migration_id).await?.ok_or(UpdateError::NoSnapshot)?;
    match snapshot.settled_at {
        Some(at) => Err(UpdateError::Settled { at }),
        None => Ok(snapshot),
    }
}

/// Writes the descriptor of a snapshot. An earlier one is overwritten, as the page says.
pub async fn set_snapshot(
    tx: &mut WriteTx,
    migration_id: &str,
    run_id: &str,
    rows: i64,
    now: UnixTime,
) -> Result<(), StoreError> {
    let descriptor = json!({ "format": "mastio/1", "run_id": run_id, "rows": rows }).to_string();
    tx.execute(
        "INSERT INTO migration_state_backups (migration_id, created_at, snapshot_json) VALUES ($1, $2, $3) \
         ON CONFLICT (migration_id) DO UPDATE SET created_at = excluded.created_at, snapshot_json = excluded.snapshot_json",
        values![migration_id, now.to_rfc3339(), descriptor],
    )
    .await
    .map(drop)
}

/// Removes the descriptor: there is nothing to roll back to any more.
pub async fn drop_snapshot(tx: &mut WriteTx, migration_id: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM migration_state_backups WHERE migration_id = $1", values![migration_id])
        .await
        .map(drop)
}

/// An image of one cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The row.
    pub row_key: String,
    /// As the run saw it; sealed for this table where the cell is.
    pub before: Option<String>,
    /// SHA-256 of the clear text before, lowercase hex; empty for NULL.
    pub before_digest: String,
    /// What a rollback sets instead, where it says so.
    pub restore: Option<Option<String>>,
    /// What it becomes.
    pub after: Option<String>,
    /// Whether it changes.
    pub changes: bool,
}

impl Image {
    /// What a rollback sets.
    #[must_use]
    pub fn restored(&self) -> Option<&String> {
        self.restore.as_ref().unwrap_or(&self.before).as_ref()
    }
}

/// SHA-256 of a cell's clear text, lowercase hex; empty for NULL.
#[must_use]
pub fn digest(text: Option<&str>) -> String {
    text.map(|text| hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes()).as_ref()))
        .unwrap_or_default()
}

/// Where a sealed image lies, for sealing. `side` is `before`, `restore` or `after`.
#[must_use]
pub fn image_place(run_id: &str, cell: &Cell, side: &str) -> String {
    format!("update_images/{run_id}/{}/{}", cell.place(), side)
}

const IMAGE_TARGET: &str = "update_images (run_id, table_name, row_key, column_name, sealed, before, before_digest, restore, restores)";

/// The image of one cell as its row for [`insert_images`].
#[must_use]
pub fn cell_image(run_id: &str, cell: &Cell, before: Option<String>, before_digest: String) -> Vec<Value> {
    values![
        run_id,
        cell.table,
        cell.row_key,
        cell.column,
        cell.sealed,
        before,
        before_digest,
        None::<String>,
        0i64
    ]
    .to_vec()
}

/// The image of one agent's cell as its row for [`insert_images`].
#[must_use]
pub fn fleet_image(run_id: &str, column: FleetColumn, cell: &FleetCell) -> Vec<Value> {
    values![
        run_id,
        "internal_agents",
        &cell.agent_id,
        column.as_str(),
        0i64,
        &cell.text,
        digest(Some(&cell.text)),
        None::<String>,
        0i64
    ]
    .to_vec()
}

/// Writes images.
pub async fn insert_images(tx: &mut WriteTx, images: &[Vec<Value>]) -> Result<(), StoreError> {
    tx.insert_many(
        IMAGE_TARGET,
        images,
        "ON CONFLICT (run_id, table_name, row_key, column_name) DO UPDATE SET before = excluded.before, \
         before_digest = excluded.before_digest, restore = excluded.restore, restores = excluded.restores, \
         after = NULL, follows = 0, changes = 0",
    )
    .await
    .map(drop)
}

/// One cell's image.
pub async fn image(tx: &mut impl Query, run_id: &str, cell: &Cell) -> Result<Option<Image>, StoreError> {
    let row = tx
        .row(
            "SELECT row_key, before, before_digest, restore, restores, after, changes FROM update_images \
             WHERE run_id = $1 AND table_name = $2 AND row_key = $3 AND column_name = $4",
            values![run_id, cell.table, cell.row_key, cell.column],
        )
        .await?;
    row.as_ref().map(read_image).transpose()
}

fn read_image(row: &crate::store::Row) -> Result<Image, StoreError> {
    Ok(Image {
        row_key: row.text(0)?,
        before: row.optional_text(1)?,
        before_digest: row.text(2)?,
        restore: if row.truth(4)? { Some(row.optional_text(3)?) } else { None },
        after: row.optional_text(5)?,
        changes: row.truth(6)?,
    })
}

/// Digest of a cell of the fleet as it was accepted, with the facts beside it; it belongs to one run and one agent.
#[must_use]
pub fn accepted(
    run_id: &str,
    column: FleetColumn,
    agent_id: &str,
    text: &str,
    facts: Option<&CertificateFacts>,
) -> String {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut part = |text: &str| {
        // Lengths in front: no two lists of parts read alike.
        context.update(&(text.len() as u64).to_be_bytes());
        context.update(text.as_bytes());
    };
    for text in [run_id, column.as_str(), agent_id, text] {
        part(text);
    }
    if let Some(facts) = facts {
        let not_after = facts.not_after.to_string();
        for text in [
            &facts.fingerprint,
            &facts.spki_sha256,
            &facts.serial,
            &facts.issuer_key_id,
            &not_after,
            &facts.profile_gaps,
        ] {
            part(text);
        }
    }
    hex(context.finish().as_ref())
}

/// Writes what a cell becomes.
pub async fn set_cell_after(
    tx: &mut WriteTx,
    run_id: &str,
    cell: &Cell,
    after: Option<String>,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE update_images SET after = $5, changes = 1 WHERE run_id = $1 AND table_name = $2 AND row_key = $3 \
         AND column_name = $4",
        values![run_id, cell.table, cell.row_key, cell.column, after],
    )
    .await
    .map(drop)
}

/// One statement for each column of the fleet, the same but for `COLUMN` and `IN_SCOPE`, a condition on the row `a`.
/// `AFTER` is what the image `i` says the cell becomes, `RESTORED` what a rollback sets; `$1` is the run whose image it is.
/// `SAME_LEAF_OTHERWISE` are the agents whose present leaf is the one that run wrote, in a cell that reads otherwise.
macro_rules! fleet_sql {
    ($column:expr, $($part:tt)+) => {
        match $column {
            FleetColumn::CertPem => concat!($(fleet_part!(CertPem $part)),+),
            FleetColumn::EnrollmentMethod => concat!($(fleet_part!(EnrollmentMethod $part)),+),
        }
    };
}

macro_rules! fleet_part {
    (CertPem COLUMN) => {
        "cert_pem"
    };
    (CertPem IN_SCOPE) => {
        "a.cert_pem IS NOT NULL AND COALESCE(a.enrollment_method, '') NOT IN ('byoca', 'spire', 'spiffe')"
    };
    (EnrollmentMethod COLUMN) => {
        "enrollment_method"
    };
    (EnrollmentMethod IN_SCOPE) => {
        "a.enrollment_method IN ('admin', 'spiffe')"
    };
    ($column:ident AFTER) => {
        "CASE WHEN i.follows = 1 THEN i.after || (SELECT r.follows FROM update_runs r WHERE r.run_id = $1) ELSE i.after END"
    };
    ($column:ident RESTORED) => {
        "CASE WHEN i.restores = 1 THEN i.restore ELSE i.before END"
    };
    (CertPem SAME_LEAF_OTHERWISE) => {
        concat!(
            "SELECT c.agent_id FROM update_run_certificates w JOIN agent_certificates c ON c.agent_id = w.agent_id \
             AND c.fingerprint = w.fingerprint JOIN internal_agents a ON a.agent_id = w.agent_id \
             JOIN update_images i ON i.run_id = $1 AND i.table_name = 'internal_agents' AND i.row_key = w.agent_id \
             AND i.column_name = 'cert_pem' WHERE w.run_id = $1 AND a.cert_pem IS DISTINCT FROM ",
            fleet_part!(CertPem AFTER)
        )
    };
    ($column:ident $text:literal) => {
        $text
    };
}

/// A cell of the fleet, with what is known of the agent's leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetCell {
    /// The agent.
    pub agent_id: String,
    /// The cell's text; for `cert_pem` the leaf and what follows it.
    pub text: String,
    /// Key id of the leaf's issuer as far as known.
    pub issuer_key_id: String,
}

fn fleet(rows: &[crate::store::Row]) -> Result<Vec<FleetCell>, StoreError> {
    rows.iter()
        .map(|row| {
            Ok(FleetCell {
                agent_id: row.text(0)?,
                text: row.text(1)?,
                issuer_key_id: row.optional_text(2)?.unwrap_or_default(),
            })
        })
        .collect()
}

/// A page of the cells in scope after `agent_id`, as they stand.
pub async fn fleet_page(
    tx: &mut impl Query,
    column: FleetColumn,
    after: &str,
    limit: i64,
) -> Result<Vec<FleetCell>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT a.agent_id, a." COLUMN ", c.issuer_key_id FROM internal_agents a \
         LEFT JOIN agent_certificates c ON c.agent_id = a.agent_id WHERE a.agent_id > $1 AND " IN_SCOPE
        " ORDER BY a.agent_id LIMIT $2");
    fleet(&tx.rows(sql, values![after, limit]).await?)
}

/// A page of the fleet's images after `agent_id`.
pub async fn image_page(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<FleetCell>, StoreError> {
    fleet(
        &tx.rows(
            "SELECT i.row_key, i.before, c.issuer_key_id FROM update_images i \
             LEFT JOIN agent_certificates c ON c.agent_id = i.row_key \
             WHERE i.run_id = $1 AND i.table_name = 'internal_agents' AND i.column_name = $4 AND i.row_key > $2 \
             ORDER BY i.row_key LIMIT $3",
            values![run_id, after, limit, column.as_str()],
        )
        .await?,
    )
}

/// What a cell of the fleet becomes, ready to be staged.
pub struct StagedCell {
    /// The agent.
    pub agent_id: String,
    /// The new text.
    pub text: String,
    /// Facts of the leaf in it and of the one before, where the column is `cert_pem`.
    pub facts: Option<StagedFacts>,
}

/// Facts of a leaf and of the one that it replaces.
pub struct StagedFacts {
    /// The new one.
    pub new: CertificateFacts,
    /// The old one.
    pub old: CertificateFacts,
}

/// Keeps what follows every leaf that a run writes, for [`stage`].
pub async fn set_follows(tx: &mut WriteTx, run_id: &str, follows: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE update_runs SET follows = $2 WHERE run_id = $1", values![run_id, follows])
        .await
        .map(drop)
}

/// Stages what cells of the fleet become.
///
/// `follows`: the text of [`set_follows`], which is not written again with every leaf.
pub async fn stage(
    tx: &mut WriteTx,
    column: FleetColumn,
    run_id: &str,
    leaves: &[StagedCell],
    follows: Option<&str>,
) -> Result<(), StoreError> {
    let images: Vec<Vec<Value>> = leaves
        .iter()
        .map(|leaf| {
            let facts = leaf.facts.as_ref().map(|facts| &facts.new);
            let own = follows.and_then(|follows| leaf.text.strip_suffix(follows));
            let (after, follows) = (own.unwrap_or(&leaf.text), own.is_some());
            let accepted = accepted(run_id, column, &leaf.agent_id, &leaf.text, facts);
            values![
                run_id,
                "internal_agents",
                &leaf.agent_id,
                column.as_str(),
                "",
                after,
                follows,
                1i64,
                accepted
            ]
            .to_vec()
        })
        .collect();
    // The rows are there since the snapshot; the conflict is the rule.
    tx.insert_many(
        "update_images (run_id, table_name, row_key, column_name, before_digest, after, follows, changes, accepted)",
        &images,
        "ON CONFLICT (run_id, table_name, row_key, column_name) DO UPDATE SET after = excluded.after, \
         follows = excluded.follows, changes = 1, accepted = excluded.accepted",
    )
    .await?;
    drop(images);
    let facts: Vec<Vec<Value>> = leaves
        .iter()
        .filter_map(|leaf| {
            let StagedFacts { new, old } = leaf.facts.as_ref()?;
            let mut row = vec![Value::from(run_id)];
            row.extend(new.row(&leaf.agent_id));
            row.extend(
                values![&old.fingerprint, &old.serial, &old.issuer_key_id, &old.profile_gaps].iter().cloned(),
            );
            Some(row)
        })
        .collect();
    tx.insert_many(
        "update_run_certificates (run_id, agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, \
         profile_gaps, old_fingerprint, old_serial, old_issuer_key_id, old_profile_gaps)",
        &facts,
        "ON CONFLICT (run_id, agent_id) DO UPDATE SET fingerprint = excluded.fingerprint, serial = excluded.serial, \
         spki_sha256 = excluded.spki_sha256, issuer_key_id = excluded.issuer_key_id, not_after = excluded.not_after, \
         old_fingerprint = excluded.old_fingerprint, old_serial = excluded.old_serial, \
         old_issuer_key_id = excluded.old_issuer_key_id, profile_gaps = excluded.profile_gaps, \
         old_profile_gaps = excluded.old_profile_gaps",
    )
    .await
    .map(drop)
}

/// Writes the leaves of a run that its commit replaces, those whose fingerprint is in `range`, in the order of the index
/// by which they are found, so that each of its pages is written once. They count from the commit.
pub async fn supersede_staged(
    tx: &mut WriteTx,
    run_id: &str,
    range: &FingerprintRange,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO superseded_certificates (fingerprint, agent_id, spki_sha256, superseded_at, superseded_by, serial, \
         issuer_key_id, not_after) SELECT old_fingerprint, agent_id, spki_sha256, $2, $1, old_serial, \
         old_issuer_key_id, not_after FROM update_run_certificates WHERE run_id = $1 \
         AND old_fingerprint <> fingerprint AND old_fingerprint >= $3 AND old_fingerprint < $4 \
         ORDER BY old_fingerprint ON CONFLICT (fingerprint) DO NOTHING",
        values![run_id, now.to_rfc3339(), &range.from, &range.until],
    )
    .await
    .map(drop)
}

/// Removes what counts for nothing from a range of superseded leaves: rows of other runs that never committed, and rows
/// of this one, which has not yet, about a leaf that is not its agent's present one any more.
pub async fn clear_superseded(
    tx: &mut WriteTx,
    run_id: &str,
    range: &FingerprintRange,
) -> Result<(), StoreError> {
    tx.execute(
        "DELETE FROM superseded_certificates WHERE fingerprint >= $2 AND fingerprint < $3 \
         AND superseded_by IN (SELECT r.run_id FROM update_runs r WHERE r.committed_at IS NULL) \
         AND (superseded_by <> $1 OR NOT EXISTS (SELECT 1 FROM agent_certificates c \
         WHERE c.agent_id = superseded_certificates.agent_id AND c.fingerprint = superseded_certificates.fingerprint))",
        values![run_id, &range.from, &range.until],
    )
    .await
    .map(drop)
}

/// Fingerprints from one, inclusive, until another, exclusive; lowercase hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FingerprintRange {
    from: String,
    until: String,
}

impl FingerprintRange {
    /// Every fingerprint.
    #[must_use]
    pub fn all() -> Self {
        Self { from: String::new(), until: "g".to_owned() }
    }

    /// Every fingerprint in ranges of about `size` of `total`: they are hashes, and so spread evenly.
    #[must_use]
    pub fn split(total: i64, size: i64) -> Vec<Self> {
        let parts = (total / size.max(1)).clamp(0, 255) + 1;
        let edge =
            |part: i64| if part == parts { "g".to_owned() } else { format!("{:02x}", 256 * part / parts) };
        (0..parts).map(|part| Self { from: edge(part), until: edge(part + 1) }).collect()
    }
}

/// A serial that two leaves of a run share, or that a leaf shares with another one of the same issuer.
pub async fn duplicate_serial(tx: &mut impl Query, run_id: &str) -> Result<Option<String>, StoreError> {
    let row = tx
        .row(
            "SELECT serial FROM update_run_certificates WHERE run_id = $1 GROUP BY serial HAVING COUNT(*) > 1 LIMIT 1",
            values![run_id],
        )
        .await?;
    if let Some(row) = row {
        return Ok(Some(row.text(0)?));
    }
    let row = tx
        .row(
            "SELECT r.serial FROM update_run_certificates r JOIN agent_certificates c ON c.serial = r.serial \
             AND c.issuer_key_id = r.issuer_key_id AND c.fingerprint <> r.fingerprint WHERE r.run_id = $1 LIMIT 1",
            values![run_id],
        )
        .await?;
    row.map(|row| row.text(0)).transpose()
}

/// How many cells of the fleet a run has staged.
pub async fn staged(tx: &mut impl Query, column: FleetColumn, run_id: &str) -> Result<i64, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*) FROM update_images WHERE run_id = $1 AND table_name = 'internal_agents' \
             AND column_name = $2 AND changes = 1",
            values![run_id, column.as_str()],
        )
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// The epoch that this view of the database stands at.
pub async fn epoch(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx.row("SELECT epoch FROM audit_head WHERE id = 1", &[]).await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// The agents whose cells entered the scope, left it, or changed since the run saw them.
pub async fn moved(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    limit: i64,
) -> Result<Vec<String>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT agent_id FROM (\
         SELECT a.agent_id FROM internal_agents a LEFT JOIN update_images i ON i.run_id = $1 \
         AND i.table_name = 'internal_agents' AND i.row_key = a.agent_id AND i.column_name = '" COLUMN "' \
         WHERE " IN_SCOPE " AND (i.row_key IS NULL OR i.before IS DISTINCT FROM a." COLUMN ") \
         UNION ALL \
         SELECT i.row_key FROM update_images i LEFT JOIN internal_agents a ON a.agent_id = i.row_key AND " IN_SCOPE
        " WHERE i.run_id = $1 AND i.table_name = 'internal_agents' AND a.agent_id IS NULL) moved \
         ORDER BY agent_id LIMIT $2");
    tx.rows(sql, values![run_id, limit]).await?.iter().map(|row| row.text(0)).collect()
}

/// Forgets the images of agents, so that they are seen anew. Gives how many of them had been staged.
pub async fn forget_images(tx: &mut WriteTx, run_id: &str, agent_ids: &[String]) -> Result<u64, StoreError> {
    let mut staged = 0;
    for agent_id in agent_ids {
        staged += tx
            .execute(
                "DELETE FROM update_images WHERE run_id = $1 AND table_name = 'internal_agents' AND row_key = $2 \
                 AND changes = 1",
                values![run_id, agent_id],
            )
            .await?;
        tx.execute(
            "DELETE FROM update_images WHERE run_id = $1 AND table_name = 'internal_agents' AND row_key = $2",
            values![run_id, agent_id],
        )
        .await?;
        tx.execute(
            "DELETE FROM update_run_certificates WHERE run_id = $1 AND agent_id = $2",
            values![run_id, agent_id],
        )
        .await?;
        tx.execute(
            "DELETE FROM superseded_certificates WHERE superseded_by = $1 AND agent_id = $2",
            values![run_id, agent_id],
        )
        .await?;
    }
    Ok(staged)
}

/// One agent's cell as it stands, where it is in scope.
pub async fn fleet_cell(
    tx: &mut impl Query,
    column: FleetColumn,
    agent_id: &str,
) -> Result<Option<FleetCell>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT a.agent_id, a." COLUMN ", c.issuer_key_id FROM internal_agents a \
         LEFT JOIN agent_certificates c ON c.agent_id = a.agent_id WHERE a.agent_id = $1 AND " IN_SCOPE);
    let rows = tx.rows(sql, values![agent_id]).await?;
    Ok(fleet(&rows)?.into_iter().next())
}

/// Tells the triggers that the engine writes the fleet: it moves the epoch and keeps the facts itself.
async fn begin_fleet_write(tx: &mut WriteTx) -> Result<(), StoreError> {
    tx.execute("INSERT INTO deploy_state (key, value) VALUES ('fleet_write', '1')", &[]).await.map(drop)
}

/// Takes the mark back, in the same transaction.
async fn end_fleet_write(tx: &mut WriteTx) -> Result<(), StoreError> {
    tx.execute("DELETE FROM deploy_state WHERE key = 'fleet_write'", &[]).await.map(drop)
}

/// The commit of an apply, fleet part: cells and the facts of leaves, one statement each. The leaves that they replace
/// are there since [`supersede_staged`] and count with the commit.
///
/// Everybody who writes waits for this. A subquery hands SQLite each text where it goes; a join would first copy the
/// fleet into a temporary table.
pub async fn write_fleet(tx: &mut WriteTx, column: FleetColumn, run_id: &str) -> Result<u64, StoreError> {
    revocation::carry_over(tx, run_id).await?;
    begin_fleet_write(tx).await?;
    let written = tx
        .execute(
            fleet_sql!(column,
                "UPDATE internal_agents SET " COLUMN " = (SELECT " AFTER " FROM update_images i WHERE i.run_id = $1 \
                 AND i.table_name = 'internal_agents' AND i.row_key = internal_agents.agent_id \
                 AND i.column_name = '" COLUMN "') WHERE agent_id IN (SELECT i.row_key FROM update_images i \
                 WHERE i.run_id = $1 AND i.table_name = 'internal_agents' AND i.column_name = '" COLUMN "' \
                 AND i.changes = 1)"),
            values![run_id],
        )
        .await?;
    end_fleet_write(tx).await?;
    if column != FleetColumn::CertPem {
        return Ok(written);
    }
    let known = tx
        .execute(
            "UPDATE agent_certificates SET fingerprint = r.fingerprint, spki_sha256 = r.spki_sha256, serial = r.serial, \
             issuer_key_id = r.issuer_key_id, not_after = r.not_after, profile_gaps = r.profile_gaps \
             FROM update_run_certificates r WHERE r.run_id = $1 AND r.agent_id = agent_certificates.agent_id",
            values![run_id],
        )
        .await?;
    if known != written {
        // Leaves beside which somebody had taken the facts away.
        tx.execute(
            "INSERT INTO agent_certificates (agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, \
             profile_gaps) SELECT agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, profile_gaps \
             FROM update_run_certificates WHERE run_id = $1 ON CONFLICT (agent_id) DO NOTHING",
            values![run_id],
        )
        .await?;
    }
    Ok(written)
}

/// Brings a run's images to what its commit overwrote, the single cells' too.
pub async fn settle_images(tx: &mut WriteTx, run_id: &str) -> Result<(), StoreError> {
    // What a torn run of the predecessor had written already is restored from its snapshot, rewritten here or not.
    tx.execute(
        "UPDATE update_images SET changes = 1, after = CASE WHEN sealed = 1 THEN NULL ELSE before END \
         WHERE run_id = $1 AND changes = 0 AND restores = 1",
        values![run_id],
    )
    .await?;
    // The snapshot keeps exactly what was overwritten.
    tx.execute("DELETE FROM update_images WHERE run_id = $1 AND changes = 0", values![run_id]).await.map(drop)
}

/// A cell of the fleet as it stands after a run's commit, and as the run accepted it.
pub struct WrittenCell {
    /// The agent.
    pub agent_id: String,
    /// Digest of what was accepted; absent in a run of an older version.
    pub accepted: Option<String>,
    /// The text as the run staged it, where there is no digest.
    pub after: Option<String>,
    /// The text as it stands.
    pub text: Option<String>,
    /// The facts as they stand, where the column is `cert_pem`. A leaf without them is one that somebody put there.
    pub facts: Option<CertificateFacts>,
}

/// A page of the cells that a run wrote, after `agent_id`.
pub async fn written_page(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<WrittenCell>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT i.row_key, i.accepted, CASE WHEN i.accepted IS NULL THEN " AFTER " END, a." COLUMN ", c.fingerprint, \
         c.spki_sha256, c.serial, c.issuer_key_id, c.not_after, c.profile_gaps FROM update_images i \
         LEFT JOIN internal_agents a ON a.agent_id = i.row_key \
         LEFT JOIN agent_certificates c ON c.agent_id = i.row_key \
         WHERE i.run_id = $1 AND i.table_name = 'internal_agents' AND i.column_name = '" COLUMN "' \
         AND i.changes = 1 AND i.row_key > $2 ORDER BY i.row_key LIMIT $3");
    tx.rows(sql, values![run_id, after, limit])
        .await?
        .iter()
        .map(|row| {
            let facts = match (column, row.optional_text(4)?) {
                (FleetColumn::CertPem, Some(fingerprint)) => Some(CertificateFacts {
                    fingerprint,
                    spki_sha256: row.text(5)?,
                    serial: row.text(6)?,
                    issuer_key_id: row.text(7)?,
                    not_after: row.integer(8)?,
                    profile_gaps: row.optional_text(9)?.unwrap_or_default(),
                }),
                _ => None,
            };
            Ok(WrittenCell {
                agent_id: row.text(0)?,
                accepted: row.optional_text(1)?,
                after: row.optional_text(2)?,
                text: row.optional_text(3)?,
                facts,
            })
        })
        .collect()
}

/// How many cells of the fleet a run's commit wrote, where its version noted that.
pub async fn written(tx: &mut impl Query, run_id: &str) -> Result<Option<i64>, StoreError> {
    let row = tx.row("SELECT written FROM update_runs WHERE run_id = $1", values![run_id]).await?;
    row.map(|row| row.optional_integer(0)).transpose().map(Option::flatten)
}

/// How many leaves that a run replaced are not kept as superseded: their agents would be refused. Where an operator's SQL
/// has given two agents one leaf, it is kept for one of them, for it names only one. Of an agent that was deleted since
/// nothing is kept.
pub async fn not_superseded(tx: &mut impl Query, run_id: &str) -> Result<i64, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*) FROM update_run_certificates r JOIN internal_agents a ON a.agent_id = r.agent_id \
             WHERE r.run_id = $1 AND r.old_fingerprint <> r.fingerprint \
             AND NOT EXISTS (SELECT 1 FROM superseded_certificates s WHERE s.fingerprint = r.old_fingerprint \
             AND (s.agent_id = r.agent_id OR EXISTS (SELECT 1 FROM update_run_certificates o WHERE o.run_id = r.run_id \
             AND o.old_fingerprint = r.old_fingerprint AND o.agent_id = s.agent_id)))",
            values![run_id],
        )
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// How many leaves that the Mastio issued bear the signature of a CA of ours that is none of `key_ids`.
pub async fn leaves_under_another_ca(tx: &mut impl Query, key_ids: [&str; 2]) -> Result<i64, StoreError> {
    let sql = fleet_sql!(FleetColumn::CertPem,
        "SELECT COUNT(*) FROM agent_certificates c JOIN internal_agents a ON a.agent_id = c.agent_id \
         WHERE c.issuer_key_id NOT IN ('', $1, $2) AND " IN_SCOPE);
    tx.row(sql, values![key_ids[0], key_ids[1]]).await?.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// How many leaves that others issued have no facts: somebody has put them there by SQL.
pub async fn foreign_without_facts(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*) FROM internal_agents a WHERE a.enrollment_method IN ('byoca', 'spire', 'spiffe') \
             AND a.cert_pem IS NOT NULL \
             AND NOT EXISTS (SELECT 1 FROM agent_certificates c WHERE c.agent_id = a.agent_id)",
            &[],
        )
        .await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// Takes what somebody did to a run's cells by SQL before the run was verified as what the run wrote, so that its
/// rollback sets them back: it was never known to be right.
pub async fn take_damage_as_written(
    tx: &mut WriteTx,
    column: FleetColumn,
    run_id: &str,
) -> Result<u64, StoreError> {
    let sql = fleet_sql!(column,
        "UPDATE update_images SET after = a." COLUMN ", follows = 0 FROM internal_agents a, update_images i \
         WHERE update_images.run_id = $1 AND update_images.table_name = 'internal_agents' \
         AND update_images.column_name = '" COLUMN "' AND update_images.changes = 1 \
         AND a.agent_id = update_images.row_key AND i.run_id = $1 AND i.table_name = 'internal_agents' \
         AND i.row_key = update_images.row_key AND i.column_name = '" COLUMN "' \
         AND a." COLUMN " IS DISTINCT FROM " AFTER " AND (update_images.column_name <> 'cert_pem' \
         OR NOT EXISTS (SELECT 1 FROM agent_certificates c WHERE c.agent_id = a.agent_id))");
    tx.execute(sql, values![run_id]).await
}

/// Forgets the facts of the leaves that a run wrote, so that they are read anew.
pub async fn forget_facts(tx: &mut WriteTx, run_id: &str) -> Result<(), StoreError> {
    tx.execute(
        "DELETE FROM agent_certificates WHERE agent_id IN (SELECT row_key FROM update_images WHERE run_id = $1 \
         AND table_name = 'internal_agents' AND column_name = 'cert_pem' AND changes = 1)",
        values![run_id],
    )
    .await
    .map(drop)
}

/// A page of cells in scope that a rollback of `run_id` does not simply set back: they arose or changed since.
pub async fn changed_since_page(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<FleetCell>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT a.agent_id, a." COLUMN ", c.issuer_key_id FROM internal_agents a \
         LEFT JOIN agent_certificates c ON c.agent_id = a.agent_id \
         LEFT JOIN update_images i ON i.run_id = $1 AND i.table_name = 'internal_agents' \
         AND i.column_name = '" COLUMN "' AND i.row_key = a.agent_id AND i.changes = 1 \
         WHERE a.agent_id > $2 AND " IN_SCOPE " AND (i.row_key IS NULL OR " AFTER " IS DISTINCT FROM a." COLUMN ") \
         ORDER BY a.agent_id LIMIT $3");
    fleet(&tx.rows(sql, values![run_id, after, limit]).await?)
}

/// The agents whose carried-back cell is missing or out of date in the rollback run's images.
pub async fn carry_back_moved(
    tx: &mut impl Query,
    column: FleetColumn,
    apply_run: &str,
    rollback_run: &str,
    limit: i64,
) -> Result<Vec<String>, StoreError> {
    let sql = fleet_sql!(column,
        "SELECT a.agent_id FROM internal_agents a LEFT JOIN update_images i ON i.run_id = $1 \
         AND i.table_name = 'internal_agents' AND i.column_name = '" COLUMN "' AND i.row_key = a.agent_id \
         AND i.changes = 1 \
         LEFT JOIN update_images b ON b.run_id = $2 AND b.table_name = 'internal_agents' AND b.row_key = a.agent_id \
         WHERE " IN_SCOPE " AND (i.row_key IS NULL OR " AFTER " IS DISTINCT FROM a." COLUMN ") \
         AND b.before IS DISTINCT FROM a." COLUMN " ORDER BY a.agent_id LIMIT $3");
    tx.rows(sql, values![apply_run, rollback_run, limit]).await?.iter().map(|row| row.text(0)).collect()
}

/// What a rollback set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoredFleet {
    /// Cells of the fleet.
    pub cells: u64,
    /// Whether leaves among them have no facts now, which are read from them.
    pub without_facts: bool,
}

/// Whether images of a run say what a rollback restores instead of what they saw: it followed a predecessor's torn run.
pub async fn has_restores(tx: &mut impl Query, run_id: &str) -> Result<bool, StoreError> {
    let row = tx
        .row("SELECT 1 FROM update_images WHERE run_id = $1 AND restores = 1 LIMIT 1", values![run_id])
        .await?;
    Ok(row.is_some())
}

/// Writes the leaves that a rollback takes from agents, as [`supersede_staged`] does: they stay accepted from its commit.
pub async fn supersede_restored(
    tx: &mut WriteTx,
    apply_run: &str,
    rollback_run: &str,
    range: &FingerprintRange,
    now: UnixTime,
) -> Result<(), StoreError> {
    tx.execute(
        fleet_sql!(FleetColumn::CertPem,
            "INSERT INTO superseded_certificates (fingerprint, agent_id, spki_sha256, superseded_at, superseded_by, \
             serial, issuer_key_id, not_after) SELECT c.fingerprint, c.agent_id, c.spki_sha256, $3, $2, c.serial, \
             c.issuer_key_id, c.not_after FROM agent_certificates c JOIN update_images i \
             ON i.run_id = $1 AND i.table_name = 'internal_agents' AND i.row_key = c.agent_id AND i.changes = 1 \
             AND i.column_name = 'cert_pem' WHERE c.fingerprint >= $4 AND c.fingerprint < $5 \
             AND NOT EXISTS (SELECT 1 FROM update_run_certificates r WHERE r.run_id = $1 AND r.agent_id = c.agent_id \
             AND r.old_fingerprint = c.fingerprint) AND " AFTER " IS DISTINCT FROM " RESTORED " \
             ORDER BY c.fingerprint ON CONFLICT (fingerprint) DO NOTHING"),
        values![apply_run, rollback_run, now.to_rfc3339(), &range.from, &range.until],
    )
    .await
    .map(drop)
}

/// Whether somebody's SQL has changed what stands around a leaf that an apply wrote, and left the leaf. A rollback leaves
/// such a cell alone, and so it must not set back the facts.
pub async fn has_same_leaf_otherwise(tx: &mut impl Query, apply_run: &str) -> Result<bool, StoreError> {
    let sql = concat!(fleet_part!(CertPem SAME_LEAF_OTHERWISE), " LIMIT 1");
    Ok(tx.row(sql, values![apply_run]).await?.is_some())
}

/// The commit of a rollback, fleet part: what still reads as the apply wrote it is set back, byte for byte, and its
/// facts with it. The leaves that it gives up are there since [`supersede_restored`].
///
/// `otherwise` as [`has_same_leaf_otherwise`] and `has_restores` as [`has_restores`] say.
pub async fn restore_fleet(
    tx: &mut WriteTx,
    column: FleetColumn,
    apply_run: &str,
    otherwise: bool,
    has_restores: bool,
) -> Result<RestoredFleet, StoreError> {
    revocation::carry_back(tx, apply_run).await?;
    if otherwise && column == FleetColumn::CertPem {
        // The detector reads them anew.
        tx.execute(
            concat!(
                "DELETE FROM agent_certificates WHERE agent_id IN (",
                fleet_part!(CertPem SAME_LEAF_OTHERWISE),
                ")"
            ),
            values![apply_run],
        )
        .await?;
    }
    begin_fleet_write(tx).await?;
    let cells = tx
        .execute(
            fleet_sql!(column,
                "UPDATE internal_agents SET " COLUMN " = (SELECT " RESTORED " FROM update_images i \
                 WHERE i.run_id = $1 AND i.table_name = 'internal_agents' \
                 AND i.row_key = internal_agents.agent_id AND i.column_name = '" COLUMN "') \
                 WHERE agent_id IN (SELECT i.row_key FROM update_images i JOIN internal_agents a \
                 ON a.agent_id = i.row_key WHERE i.run_id = $1 AND i.table_name = 'internal_agents' \
                 AND i.column_name = '" COLUMN "' AND i.changes = 1 AND a." COLUMN " IS NOT DISTINCT FROM " AFTER ")"),
            values![apply_run],
        )
        .await?;
    end_fleet_write(tx).await?;
    if column != FleetColumn::CertPem {
        return Ok(RestoredFleet { cells, without_facts: false });
    }
    let known = tx
        .execute(
            "UPDATE agent_certificates SET fingerprint = r.old_fingerprint, spki_sha256 = r.spki_sha256, \
             serial = r.old_serial, issuer_key_id = r.old_issuer_key_id, not_after = r.not_after, \
             profile_gaps = r.old_profile_gaps FROM update_run_certificates r WHERE r.run_id = $1 \
             AND r.agent_id = agent_certificates.agent_id AND r.fingerprint = agent_certificates.fingerprint",
            values![apply_run],
        )
        .await?;
    if known != cells {
        // Facts that somebody has taken away or changed beside a leaf that is set back.
        tx.execute(
            "INSERT INTO agent_certificates (agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, \
             profile_gaps) SELECT r.agent_id, r.old_fingerprint, r.spki_sha256, r.old_serial, r.old_issuer_key_id, \
             r.not_after, r.old_profile_gaps FROM update_run_certificates r JOIN update_images i ON i.run_id = $1 \
             AND i.table_name = 'internal_agents' AND i.row_key = r.agent_id AND i.column_name = 'cert_pem' \
             JOIN internal_agents a ON a.agent_id = r.agent_id AND a.cert_pem = i.before WHERE r.run_id = $1 \
             ON CONFLICT (agent_id) DO UPDATE SET fingerprint = excluded.fingerprint, \
             spki_sha256 = excluded.spki_sha256, serial = excluded.serial, issuer_key_id = excluded.issuer_key_id, \
             not_after = excluded.not_after, profile_gaps = excluded.profile_gaps",
            values![apply_run],
        )
        .await?;
    }
    if has_restores {
        // Of what a predecessor's snapshot gives back nobody knows the facts: they are read from it.
        tx.execute(
            "DELETE FROM agent_certificates WHERE agent_id IN (SELECT row_key FROM update_images WHERE run_id = $1 \
             AND table_name = 'internal_agents' AND column_name = 'cert_pem' AND changes = 1 AND restores = 1)",
            values![apply_run],
        )
        .await?;
    }
    Ok(RestoredFleet { cells, without_facts: has_restores || known != cells })
}

/// Agents whose certificate has no facts beside it, a page at a time.
pub async fn without_facts(
    tx: &mut impl Query,
    after: &str,
    limit: i64,
) -> Result<Vec<FleetCell>, StoreError> {
    fleet(
        &tx.rows(
            "SELECT a.agent_id, a.cert_pem, NULL FROM internal_agents a WHERE a.agent_id > $1 AND a.cert_pem IS NOT NULL \
             AND NOT EXISTS (SELECT 1 FROM agent_certificates c WHERE c.agent_id = a.agent_id) \
             ORDER BY a.agent_id LIMIT $2",
            values![after, limit],
        )
        .await?,
    )
}

/// Agents whose facts were forgotten, and the certificate of those who still have none.
pub async fn facts_forgotten(
    tx: &mut impl Query,
    limit: i64,
) -> Result<Vec<(String, Option<String>)>, StoreError> {
    tx.rows(
        "SELECT m.agent_id, a.cert_pem FROM leaves_without_facts m LEFT JOIN internal_agents a \
         ON a.agent_id = m.agent_id \
         AND NOT EXISTS (SELECT 1 FROM agent_certificates c WHERE c.agent_id = m.agent_id) \
         ORDER BY m.agent_id LIMIT $1",
        values![limit],
    )
    .await?
    .iter()
    .map(|row| Ok((row.text(0)?, row.optional_text(1)?)))
    .collect()
}

/// Takes note that the facts of everybody up to `agent_id` have been looked at.
pub async fn facts_looked_at(tx: &mut WriteTx, agent_id: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM leaves_without_facts WHERE agent_id <= $1", values![agent_id]).await.map(drop)
}

/// A page of agents whose certificate has facts that do not say what it lacks, because they are older than that column.
pub async fn without_profile_gaps(
    tx: &mut impl Query,
    after: &str,
    limit: i64,
) -> Result<Vec<FleetCell>, StoreError> {
    fleet(
        &tx.rows(
            "SELECT a.agent_id, a.cert_pem, c.issuer_key_id FROM agent_certificates c \
             JOIN internal_agents a ON a.agent_id = c.agent_id WHERE c.profile_gaps IS NULL AND c.agent_id > $1 \
             AND a.cert_pem IS NOT NULL ORDER BY c.agent_id LIMIT $2",
            values![after, limit],
        )
        .await?,
    )
}

/// An applied migration that stands on this one: it requires it, or has later written a cell that this one wrote.
pub async fn blocker(
    tx: &mut impl Query,
    migration_id: &str,
    run_id: &str,
) -> Result<Option<String>, UpdateError> {
    for row in rows(tx).await?.into_iter().filter(|row| row.status == "applied") {
        if super::halt::list(row.requires.as_deref()).iter().any(|required| required == migration_id) {
            return Ok(Some(row.migration_id));
        }
    }
    let row = tx
        .row(
            "SELECT r.migration_id FROM update_runs r JOIN pending_updates p ON p.migration_id = r.migration_id \
             AND p.status = 'applied' JOIN update_images later ON later.run_id = r.run_id AND later.changes = 1 \
             JOIN update_images mine ON mine.run_id = $1 AND mine.changes = 1 AND mine.table_name = later.table_name \
             AND mine.row_key = later.row_key AND mine.column_name = later.column_name \
             WHERE r.direction = 'apply' AND r.run_id > $1 AND r.committed_at IS NOT NULL \
             AND r.phase NOT IN ('discarded', 'swept', 'rolled_back', 'superseded') AND r.migration_id <> $2 LIMIT 1",
            values![run_id, migration_id],
        )
        .await?;
    Ok(row.map(|row| row.text(0)).transpose()?)
}

/// A leaf as it stands, beside what the apply that is to be rolled back has of it.
pub struct RollbackCell {
    /// The leaf as it stands.
    pub cell: FleetCell,
    /// What the rollback sets back; `None` where it arose or changed since, and is carried back.
    pub restore: Option<Option<String>>,
}

/// A page of the fleet's cells beside the images of the apply `run_id`.
///
/// `whole`: every image is set back whatever stands there, as of a torn run of the predecessor.
pub async fn rollback_page(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    whole: bool,
    after: &str,
    limit: i64,
) -> Result<Vec<RollbackCell>, StoreError> {
    // What the apply wrote may have left the scope by that: an enrollment tag does.
    let sql = fleet_sql!(column,
        "SELECT a.agent_id, COALESCE(a." COLUMN ", ''), c.issuer_key_id, i.changes, " AFTER ", " RESTORED " FROM internal_agents a \
         LEFT JOIN agent_certificates c ON c.agent_id = a.agent_id \
         LEFT JOIN update_images i ON i.run_id = $1 AND i.table_name = 'internal_agents' \
         AND i.column_name = '" COLUMN "' AND i.row_key = a.agent_id \
         WHERE a.agent_id > $2 AND (i.changes = 1 OR (" IN_SCOPE ")) ORDER BY a.agent_id LIMIT $3");
    let rows = tx.rows(sql, values![run_id, after, limit]).await?;
    let cells = fleet(&rows)?;
    cells
        .into_iter()
        .zip(&rows)
        .map(|(cell, row)| {
            let restores = match row.optional_integer(3)? {
                None => false,
                Some(changes) => {
                    whole || (changes == 1 && row.optional_text(4)?.as_ref() == Some(&cell.text))
                }
            };
            let restore = if restores { Some(row.optional_text(5)?) } else { None };
            Ok(RollbackCell { cell, restore })
        })
        .collect()
}

/// When each migration's snapshot was taken, as stored.
pub async fn snapshots_taken(tx: &mut impl Query) -> Result<Vec<(String, String)>, StoreError> {
    tx.rows("SELECT migration_id, created_at FROM migration_state_backups ORDER BY migration_id", &[])
        .await?
        .iter()
        .map(|row| Ok((row.text(0)?, row.text(1)?)))
        .collect()
}

/// How many images a run has.
pub async fn count_images(tx: &mut impl Query, run_id: &str) -> Result<i64, StoreError> {
    let row = tx.row("SELECT COUNT(*) FROM update_images WHERE run_id = $1", values![run_id]).await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// A run whose change is committed and whose stored state has not passed verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnverifiedRun {
    /// Of which migration.
    pub migration_id: String,
    /// `apply` or `rollback`.
    pub direction: String,
    /// Why it did not verify.
    pub error: Option<String>,
}

/// Ended runs that halt because their stored state has not passed verification.
pub async fn unverified_runs(tx: &mut impl Query) -> Result<Vec<UnverifiedRun>, StoreError> {
    tx.rows(
        "SELECT migration_id, direction, error FROM update_runs WHERE halts = 1 \
         AND committed_at IS NOT NULL AND verified_at IS NULL AND finished_at IS NOT NULL ORDER BY run_id",
        &[],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(UnverifiedRun {
            migration_id: row.text(0)?,
            direction: row.text(1)?,
            error: row.optional_text(2)?,
        })
    })
    .collect()
}

/// Migrations whose check said that their repair cannot run here, with the reason.
pub async fn impossible_checks(tx: &mut impl Query) -> Result<Vec<(String, String)>, StoreError> {
    tx.rows("SELECT key, value FROM deploy_state WHERE key LIKE 'impossible_check:%' ORDER BY key", &[])
        .await?
        .iter()
        .map(|row| Ok((row.text(0)?.trim_start_matches("impossible_check:").to_owned(), row.text(1)?)))
        .collect()
}

/// Migrations that were rolled back and whose state the last check found right all the same.
pub async fn put_right(tx: &mut impl Query) -> Result<Vec<String>, StoreError> {
    tx.rows("SELECT key FROM deploy_state WHERE key LIKE 'put_right:%' ORDER BY key", &[])
        .await?
        .iter()
        .map(|row| Ok(row.text(0)?.trim_start_matches("put_right:").to_owned()))
        .collect()
}

/// A run as its history shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRecord {
    /// ULID.
    pub run_id: String,
    /// `apply` or `rollback`.
    pub direction: String,
    /// The last phase that it entered.
    pub phase: String,
    /// What is done of that phase.
    pub done: i64,
    /// How much there is; 0 where the phase does not count.
    pub total: i64,
    /// Who asked for it.
    pub actor: String,
    /// When it began, as stored.
    pub started_at: String,
    /// When it ended.
    pub finished_at: Option<String>,
    /// When it changed state, where it did.
    pub committed_at: Option<String>,
    /// When the stored state passed verification.
    pub verified_at: Option<String>,
    /// Why it was refused or failed.
    pub error: Option<String>,
}

/// The runs of a migration, newest first.
pub async fn runs(tx: &mut impl Query, migration_id: &str, limit: i64) -> Result<Vec<RunRecord>, StoreError> {
    tx.rows(
        "SELECT run_id, direction, phase, done, total, actor, started_at, finished_at, committed_at, verified_at, error \
         FROM update_runs WHERE migration_id = $1 ORDER BY started_at DESC, run_id DESC LIMIT $2",
        values![migration_id, limit],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(RunRecord {
            run_id: row.text(0)?,
            direction: row.text(1)?,
            phase: row.text(2)?,
            done: row.integer(3)?,
            total: row.integer(4)?,
            actor: row.text(5)?,
            started_at: row.text(6)?,
            finished_at: row.optional_text(7)?,
            committed_at: row.optional_text(8)?,
            verified_at: row.optional_text(9)?,
            error: row.optional_text(10)?,
        })
    })
    .collect()
}

/// When the snapshot of a migration was taken.
pub async fn snapshot_taken_at(
    tx: &mut impl Query,
    migration_id: &str,
) -> Result<Option<String>, StoreError> {
    tx.row("SELECT created_at FROM migration_state_backups WHERE migration_id = $1", values![migration_id])
        .await?
        .map(|row| row.text(0))
        .transpose()
}

/// What a rollback to a run's images does to the fleet: how many cells it sets back, and how many it carries.
///
/// A cell is set back that still reads as the run wrote it; of a `torn` run of the predecessor, every one that it saw.
pub async fn rollback_counts(
    tx: &mut impl Query,
    column: FleetColumn,
    run_id: &str,
    torn: bool,
) -> Result<(i64, i64), StoreError> {
    // The same cells as those of `rollback_page`.
    let sql = fleet_sql!(column,
        "SELECT CAST(COALESCE(SUM(set_back), 0) AS BIGINT), CAST(COUNT(*) - COALESCE(SUM(set_back), 0) AS BIGINT) \
         FROM (SELECT CASE WHEN i.row_key IS NOT NULL AND ($2 = 1 OR (i.changes = 1 \
         AND " AFTER " IS NOT DISTINCT FROM a." COLUMN ")) THEN 1 ELSE 0 END AS set_back FROM internal_agents a \
         LEFT JOIN update_images i ON i.run_id = $1 AND i.table_name = 'internal_agents' \
         AND i.column_name = '" COLUMN "' AND i.row_key = a.agent_id \
         WHERE i.changes = 1 OR (" IN_SCOPE ")) cells");
    let row = tx.row(sql, values![run_id, torn]).await?.ok_or(StoreError::HeadMissing)?;
    Ok((row.integer(0)?, row.integer(1)?))
}
