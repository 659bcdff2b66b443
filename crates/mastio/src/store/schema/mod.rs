//! The tables, as an ordered list of steps with checksums.
//!
//! A step is released once and never edited: its checksum in the database is compared at every boot. To add one,
//! write `s0002_<what>.rs`, and put its line at the marked place in [`STEPS`]. A step is plain SQL, the same
//! on both databases; what only one of them can say (triggers) stands beside it.

mod s0001_foundation;
mod s0002_profile_gaps;
mod s0003_dashboard;
mod s0004_fleet_write;
mod s0005_audit_subject;
mod s0006_enrollment_requests;
mod s0007_resource_servers;
mod s0008_operators;
mod s0009_proposals;
mod s0010_mcp_upstreams;
mod s0011_revocation;
mod s0012_spire;
mod s0013_overlap;
mod s0014_leaves_without_facts;
mod s0015_run_proof;
mod s0016_snapshot_digest;
mod s0017_dashboard_lists;
mod s0018_mcp_policies;
mod s0019_mcp_callers;
mod s0020_mcp_evidence;
mod s0021_lean_images;
mod s0022_lists;

use std::fmt::Write as _;
use std::sync::Arc;

use super::{Query, Store, StoreError, WriteTx};
use crate::values;

/// One change of the tables.
pub struct Step {
    /// Position in the order, from 1.
    pub number: i64,
    /// What it is for.
    pub name: &'static str,
    /// Statements for both databases, separated by lines of `--;`.
    pub both: &'static str,
    /// Statements for SQLite alone.
    pub sqlite: &'static str,
    /// Statements for PostgreSQL alone.
    pub postgres: &'static str,
}

/// Every step, oldest first.
pub const STEPS: &[Step] = &[
    s0001_foundation::STEP,
    s0002_profile_gaps::STEP,
    s0003_dashboard::STEP,
    s0004_fleet_write::STEP,
    s0005_audit_subject::STEP,
    s0006_enrollment_requests::STEP,
    s0007_resource_servers::STEP,
    s0008_operators::STEP,
    s0009_proposals::STEP,
    s0010_mcp_upstreams::STEP,
    s0011_revocation::STEP,
    s0012_spire::STEP,
    s0013_overlap::STEP,
    s0014_leaves_without_facts::STEP,
    s0015_run_proof::STEP,
    s0016_snapshot_digest::STEP,
    s0017_dashboard_lists::STEP,
    s0018_mcp_policies::STEP,
    s0019_mcp_callers::STEP,
    s0020_mcp_evidence::STEP,
    s0021_lean_images::STEP,
    s0022_lists::STEP,
    // The next step goes here.
];

impl Step {
    fn checksum(&self) -> String {
        let text = [self.both, self.sqlite, self.postgres].join("\u{1f}");
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
        digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _infallible = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// Brings the database to the newest step, under a lock, in one transaction.
///
/// Errors: [`StoreError::SchemaChanged`] and [`StoreError::SchemaNewer`] when another program made it.
pub async fn migrate(store: &Store) -> Result<(), StoreError> {
    let mut tx =
        WriteTx::begin_schema(&store.backend, Arc::clone(&store.clock), Arc::clone(&store.entropy)).await?;
    apply(&mut tx, &store.clock.now().seconds().to_rfc3339()).await?;
    tx.commit_unaudited().await
}

/// The steps inside a transaction that does more: adoption extends and converts in one.
pub async fn apply(tx: &mut WriteTx, now: &str) -> Result<(), StoreError> {
    tx.execute(
        "CREATE TABLE IF NOT EXISTS mastio_schema (step BIGINT PRIMARY KEY, name TEXT NOT NULL, \
         checksum TEXT NOT NULL, applied_at TEXT NOT NULL)",
        &[],
    )
    .await?;
    let done = tx.rows("SELECT step, checksum FROM mastio_schema ORDER BY step", &[]).await?;
    let known = STEPS.last().map_or(0, |step| step.number);
    let mut applied = Vec::with_capacity(done.len());
    for row in &done {
        let (found_step, found) = (row.integer(0)?, row.text(1)?);
        applied.push(found_step);
        let Some(step) = STEPS.iter().find(|step| step.number == found_step) else {
            return Err(StoreError::SchemaNewer { found: found_step, known });
        };
        if step.checksum() != found {
            return Err(StoreError::SchemaChanged { step: found_step, found, expected: step.checksum() });
        }
    }
    // By number, not by count: numbers may have gaps.
    for step in STEPS.iter().filter(|step| !applied.contains(&step.number)) {
        let own = if tx.is_postgres() { step.postgres } else { step.sqlite };
        for statement in step.both.split("--;").chain(own.split("--;")).map(str::trim) {
            if !statement.is_empty() {
                tx.execute(statement, &[]).await?;
            }
        }
        tx.execute(
            "INSERT INTO mastio_schema (step, name, checksum, applied_at) VALUES ($1, $2, $3, $4)",
            values![step.number, step.name, step.checksum(), now],
        )
        .await?;
    }
    Ok(())
}

/// Whether the database holds anything of ours. False for an empty one and for a predecessor's.
pub async fn is_ours(store: &Store) -> Result<bool, StoreError> {
    has_table(store, "mastio_schema").await
}

/// Whether a table of this name exists.
pub async fn has_table(store: &Store, table: &'static str) -> Result<bool, StoreError> {
    exists(&mut store.read().await?, store.sqlite_path().is_none(), table).await
}

/// The same in a transaction that is under way.
pub async fn has_table_in(tx: &mut WriteTx, table: &'static str) -> Result<bool, StoreError> {
    let postgres = tx.is_postgres();
    exists(tx, postgres, table).await
}

async fn exists(tx: &mut impl Query, postgres: bool, table: &'static str) -> Result<bool, StoreError> {
    let sql = if postgres {
        "SELECT 1::bigint FROM information_schema.tables WHERE table_schema = current_schema() AND table_name = $1"
    } else {
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = $1"
    };
    Ok(tx.row(sql, values![table]).await?.is_some())
}
