//! What happened to an update, and what a rollback would do: for those who look before they act.

use mastio_core::x509::Certificate;

use super::error::UpdateError;
use super::migration::Cell;
use super::rehearsal::CertificateSummary;
use super::store::{self, RunRecord};
use super::{PREDECESSOR, Updates};
use crate::pki::store::config_key;

/// Runs that a history shows at most.
const HISTORY_RUNS_MAX: i64 = 50;

/// What a rollback would do. Read, not computed: a rollback sets back what the snapshot holds.
#[derive(Debug, Clone)]
pub struct RollbackOutline {
    /// When the snapshot was taken, as stored.
    pub taken_at: String,
    /// Cells and leaves in the snapshot.
    pub rows: i64,
    /// Whether the apply changed anything; otherwise a rollback only closes the row.
    pub changed: bool,
    /// Leaves that are set back, byte for byte.
    pub restored_leaves: i64,
    /// Leaves that arose or changed since the apply: they are issued again under the restored CA, with their keys.
    pub carried_leaves: i64,
    /// The Org CA as it stands.
    pub present: CertificateSummary,
    /// The Org CA that comes back, where it is another one.
    pub restored: Option<CertificateSummary>,
    /// A later update that stands on this one and forbids the rollback.
    pub blocker: Option<String>,
}

impl Updates {
    /// The runs of an update, newest first, the one under way included.
    pub async fn runs(&self, migration_id: &str) -> Result<Vec<RunRecord>, UpdateError> {
        Ok(store::runs(&mut self.pki.store.read().await?, migration_id, HISTORY_RUNS_MAX).await?)
    }

    /// Whether there is something to roll back to.
    pub async fn has_snapshot(&self, migration_id: &str) -> Result<bool, UpdateError> {
        let mut tx = self.pki.store.read().await?;
        Ok(store::snapshot_taken_at(&mut tx, migration_id).await?.is_some())
    }

    /// What a rollback would do. Errors: [`UpdateError::Unknown`]; [`UpdateError::NoSnapshot`].
    pub async fn rollback_outline(&self, migration_id: &str) -> Result<RollbackOutline, UpdateError> {
        let migration = self.known(migration_id).await?;
        let mut tx = self.pki.store.read().await?;
        let snapshot = store::rollback_snapshot(&mut tx, migration_id).await?;
        let taken_at = store::snapshot_taken_at(&mut tx, migration_id).await?.unwrap_or_default();
        let run = store::run_by_id(&mut tx, &snapshot.run_id).await?;
        // A predecessor's run wrote what stands, whatever its row says.
        let committed = run.as_ref().is_some_and(|run| run.committed);
        let torn = !committed && run.is_some_and(|run| run.actor == PREDECESSOR);
        let changed = committed || torn;
        let (restored_leaves, carried_leaves) = match migration.scope().fleet.filter(|_| changed) {
            Some(column) => store::rollback_counts(&mut tx, column, &snapshot.run_id, torn).await?,
            None => (0, 0),
        };
        let root = store::image(&mut tx, &snapshot.run_id, &Cell::config(config_key::ORG_CA_CERT)).await?;
        let restored = match root.filter(|_| changed).as_ref().and_then(|image| image.restored()) {
            Some(pem) => Some(CertificateSummary::of(&Certificate::from_pem(pem)?)),
            None => None,
        };
        let present = CertificateSummary::of(&self.pki.authority().org_ca);
        // A torn run may not have come as far as the Org CA.
        let restored = restored.filter(|restored| {
            (&restored.spki_sha256, restored.path_len) != (&present.spki_sha256, present.path_len)
        });
        let blocker = store::blocker(&mut tx, migration_id, &snapshot.run_id).await?;
        Ok(RollbackOutline {
            taken_at: super::shown(&taken_at),
            rows: snapshot.rows,
            changed,
            restored_leaves,
            carried_leaves,
            present,
            restored,
            blocker,
        })
    }
}
