//! Snapshots: the one that a rollback of an update goes back to, former ones that are kept for a while, and whether they
//! read as they were written.
//!
//! A snapshot is the images of an apply's run ([`super::store`]). It is *current* while its descriptor stands in
//! `migration_state_backups`; a rollback makes it *rolled back*, another apply *superseded*. Of those the newest few of
//! each update are kept, without private keys: they tell what stood where, and no rollback goes there. Each is held to
//! the digest that the verification of its run has left, so that a row which was changed, added or taken away shows.

pub(super) mod store;

use mastio_core::time::UnixTime;
use serde_json::{Value, json};

use super::store::{self as rows, SnapshotDescriptor};
use super::{UpdateError, Updates, shown};
use crate::store::Query;

/// What has become of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// A rollback goes back to it.
    Current,
    /// The trust overlap has ended since, and with it the way back.
    Settled,
    /// A rollback has gone back to it.
    RolledBack,
    /// Another apply has taken its place.
    Superseded,
}

impl State {
    /// As the API and the command line show it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Settled => "settled",
            Self::RolledBack => "rolled_back",
            Self::Superseded => "superseded",
        }
    }
}

/// A snapshot as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Whose.
    pub migration_id: String,
    /// What has become of it.
    pub state: State,
    /// When it was taken, as stored.
    pub taken_at: String,
    /// Which run's images it is; absent where the descriptor cannot be read.
    pub run_id: Option<String>,
    /// Images that are there: after a commit those that the run overwrote.
    pub images: i64,
    /// Bytes of text in them.
    pub bytes: i64,
    /// SHA-256 over them as they read now, lowercase hex.
    pub digest: Option<String>,
    /// When the trust overlap ended.
    pub settled_at: Option<String>,
    /// Where it does not read as it was written.
    pub damaged_at: Option<String>,
}

impl Snapshot {
    fn unread(migration_id: String, state: State, taken_at: String) -> Self {
        Self {
            migration_id,
            state,
            taken_at,
            run_id: None,
            images: 0,
            bytes: 0,
            digest: None,
            settled_at: None,
            damaged_at: None,
        }
    }

    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self, now: UnixTime) -> Value {
        let age_s = UnixTime::parse(&self.taken_at).map(|taken_at| now.0 - taken_at.0);
        json!({
            "migration_id": self.migration_id,
            "state": self.state.as_str(),
            "taken_at": shown(&self.taken_at),
            "age_s": age_s,
            "run_id": self.run_id,
            "rows": self.images,
            "bytes": self.bytes,
            "digest": self.digest.as_ref().map(|digest| format!("sha256:{digest}")),
            "settled_at": self.settled_at,
            "sound": self.damaged_at.is_none(),
            "damaged_at": self.damaged_at,
        })
    }

    async fn read(&mut self, tx: &mut impl Query, run_id: String) -> Result<(), UpdateError> {
        let read = store::read_images(tx, &run_id).await?;
        self.damaged_at = store::damage(tx, &run_id, &read).await?;
        (self.images, self.bytes, self.digest) = (read.rows, read.bytes, Some(read.digest));
        self.run_id = Some(run_id);
        Ok(())
    }
}

/// Reads the snapshots that rollbacks go back to, and checks them, a page at a time.
///
/// Sealed images are left to the rollback, which opens them: one that was changed does not open.
pub async fn current(tx: &mut impl Query) -> Result<Vec<Snapshot>, UpdateError> {
    let mut snapshots = Vec::new();
    for (migration_id, taken_at) in rows::snapshots_taken(tx).await? {
        let mut found = Snapshot::unread(migration_id, State::Current, taken_at);
        match rows::snapshot(tx, &found.migration_id).await {
            Ok(Some(SnapshotDescriptor { run_id, rows, settled_at, .. })) => {
                found.read(tx, run_id).await?;
                if found.images == 0 && rows > 0 {
                    found.damaged_at = Some("its images, which are gone".to_owned());
                }
                if settled_at.is_some() {
                    found.state = State::Settled;
                }
                found.settled_at = settled_at;
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

/// Reads the former snapshots that are still kept, the newest of each update first.
pub async fn former(tx: &mut impl Query) -> Result<Vec<Snapshot>, UpdateError> {
    let mut snapshots = Vec::new();
    for kept in store::kept(tx).await? {
        let mut found = Snapshot::unread(kept.migration_id, kept.state, kept.began_at);
        found.read(tx, kept.run_id).await?;
        snapshots.push(found);
    }
    Ok(snapshots)
}

/// Where the images that a rollback goes back to do not read as they were written.
pub(super) async fn damage(tx: &mut impl Query, run_id: &str) -> Result<Option<String>, UpdateError> {
    let read = store::read_images(tx, run_id).await?;
    Ok(store::damage(tx, run_id, &read).await?)
}

impl Updates {
    /// The update whose snapshot is the latest, and when it was taken; absent before the first apply.
    pub async fn latest_snapshot(&self) -> Result<Option<(String, UnixTime)>, UpdateError> {
        let taken = rows::snapshots_taken(&mut self.pki.store.read().await?).await?;
        let taken = taken.into_iter().filter_map(|(id, at)| Some((id, UnixTime::parse(&at)?)));
        Ok(taken.max_by_key(|(_, at)| *at))
    }

    /// Every snapshot, by update, the one that a rollback goes back to first, with whether it verifies.
    pub async fn snapshots(&self) -> Result<Vec<Value>, UpdateError> {
        let mut tx = self.pki.store.read().await?;
        let mut snapshots = current(&mut tx).await?;
        snapshots.extend(former(&mut tx).await?);
        // Stable: within an update the order stays.
        snapshots.sort_by(|a, b| a.migration_id.cmp(&b.migration_id));
        let now = self.pki.clock.now().seconds();
        Ok(snapshots.iter().map(|snapshot| snapshot.to_json(now)).collect())
    }
}
