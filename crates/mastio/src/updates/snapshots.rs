//! The snapshots that rollbacks go back to: which there are, and whether they read as they were written.

use serde_json::{Value, json};

use super::store::{self, SnapshotDescriptor};
use super::{UpdateError, Updates, shown};
use crate::store::Query;

/// A snapshot as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Whose.
    pub migration_id: String,
    /// When it was taken, as stored.
    pub taken_at: String,
    /// Which run's images it is, and how many; absent where the descriptor cannot be read.
    pub descriptor: Option<SnapshotDescriptor>,
    /// Images that are there: after a commit those that the run overwrote.
    pub images: i64,
    /// Where it does not read as it was written.
    pub damaged_at: Option<String>,
}

impl Snapshot {
    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "migration_id": self.migration_id,
            "taken_at": shown(&self.taken_at),
            "run_id": self.descriptor.as_ref().map(|descriptor| &descriptor.run_id),
            "rows": self.images,
            "settled_at": self.descriptor.as_ref().and_then(|descriptor| descriptor.settled_at.as_ref()),
            "sound": self.damaged_at.is_none(),
            "damaged_at": self.damaged_at,
        })
    }
}

/// Reads every snapshot and checks its digests, a page at a time.
///
/// Sealed images are left to the rollback, which opens them: one that was changed does not open.
pub async fn examine(tx: &mut impl Query) -> Result<Vec<Snapshot>, UpdateError> {
    let mut snapshots = Vec::new();
    for (migration_id, taken_at) in store::snapshots_taken(tx).await? {
        let mut found = Snapshot { migration_id, taken_at, descriptor: None, images: 0, damaged_at: None };
        match store::snapshot(tx, &found.migration_id).await {
            Ok(Some(descriptor)) => {
                found.images = store::count_images(tx, &descriptor.run_id).await?;
                found.damaged_at = store::damaged_image(tx, &descriptor.run_id).await?;
                if found.images == 0 && descriptor.rows > 0 {
                    found.damaged_at = Some("its images, which are gone".to_owned());
                }
                found.descriptor = Some(descriptor);
            }
            // Removed between two statements: there is none any more.
            Ok(None) => continue,
            Err(UpdateError::SnapshotDamaged { row, .. }) => found.damaged_at = Some(row),
            Err(error) => return Err(error),
        }
        snapshots.push(found);
    }
    Ok(snapshots)
}

impl Updates {
    /// Every snapshot, with whether it verifies.
    pub async fn snapshots(&self) -> Result<Vec<Value>, UpdateError> {
        let snapshots = examine(&mut self.pki.store.read().await?).await?;
        Ok(snapshots.iter().map(Snapshot::to_json).collect())
    }
}
