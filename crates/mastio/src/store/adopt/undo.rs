//! The way back from an adoption: the predecessor's database, as it was put aside, takes the place of ours.
//!
//! For the operator who adopted and wants the Python server again. What has come since is lost to it, so it is counted
//! first: agents that the copy does not have, and events of our log. Our database stays beside it, whole. Nothing is
//! changed before the copy has been opened, is the one that the log names, and reads as a database of the predecessor.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use serde_json::Value;

use super::copy::{self, copies, open_copy, remove_stale};
use super::store::{self, Owner};
use super::{ADOPTED_REVISION, AdoptError, REVISION};
use crate::pki::keys::SealingKey;
use crate::pki::store::hex;
use crate::store::{DatabaseUrl, Query as _, Store};
use crate::values;

/// Agents that are compared together.
const PAGE: i64 = 1000;
/// The database as it will be, in clear, while it waits for its place.
const RESTORING_SUFFIX: &str = ".restoring";

/// Why an adoption is not undone. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// There is no adoption.
    #[error("this database was not adopted from a Python Mastio's: there is nothing to undo")]
    NotAdopted,
    /// The copy is gone.
    #[error(
        "the copy that the adoption put aside is not beside {database}: bring it back, or name it by --copy FILE"
    )]
    NoCopy {
        /// The database.
        database: String,
    },
    /// There are several.
    #[error("{count} copies lie beside {database}: name the one to restore by --copy FILE")]
    Several {
        /// How many.
        count: usize,
        /// The database.
        database: String,
    },
    /// It is another one.
    #[error("{path} is not the copy that this adoption put aside: the audit log names another SHA-256")]
    Another {
        /// The file.
        path: String,
    },
    /// What it holds is no database of the predecessor.
    #[error("{path} does not hold a whole database of the Python Mastio: take another copy")]
    NotWhole {
        /// The file.
        path: String,
    },
    /// Somebody has our database open.
    #[error("another program has {log} open: close every sqlite3 shell, then try again")]
    InUse {
        /// The write-ahead log.
        log: String,
    },
    /// A file.
    #[error("{path} cannot be put into its place")]
    File {
        /// Which.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The copy cannot be opened.
    #[error(transparent)]
    Copy(#[from] AdoptError),
    /// A database.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

/// What an undoing would do, ready to be done.
pub struct Undoing {
    database: PathBuf,
    /// The predecessor's database in clear. Deleted again when this is dropped undone.
    restoring: PathBuf,
    /// The copy that was opened.
    pub copy: PathBuf,
    /// Where our database will be kept.
    pub aside: PathBuf,
    /// Agents that the copy does not have.
    pub agents_lost: i64,
    /// Events of our log, of which the predecessor's database knows nothing.
    pub events_lost: i64,
}

impl Drop for Undoing {
    fn drop(&mut self) {
        // It holds keys in clear. Gone already where it has taken its place.
        let _gone = std::fs::remove_file(&self.restoring);
    }
}

/// Opens the copy and counts what would be lost. Changes nothing.
///
/// `named`: the copy that the operator names; without it the only one beside the database.
pub async fn look(ours: &Store, key: &SealingKey, named: Option<&Path>) -> Result<Undoing, UndoError> {
    let database = ours.sqlite_path().ok_or(UndoError::NotAdopted)?.to_owned();
    let mut tx = ours.read().await?;
    // A database that began as ours has no such table.
    if !store::has_table(&mut tx, "alembic_version").await?
        || store::revisions(&mut tx).await? != [ADOPTED_REVISION]
    {
        return Err(UndoError::NotAdopted);
    }
    let shown = database.display().to_string();
    let copy = match named {
        Some(copy) => copy.to_owned(),
        None => match <[PathBuf; 1]>::try_from(copies(&database)?) {
            Ok([copy]) => copy,
            Err(found) if found.is_empty() => return Err(UndoError::NoCopy { database: shown }),
            Err(found) => return Err(UndoError::Several { count: found.len(), database: shown }),
        },
    };
    let read = |source| UndoError::File { path: copy.display().to_string(), source };
    if !recorded(&mut tx).await?.contains(&sha256(&copy).map_err(read)?) {
        return Err(UndoError::Another { path: copy.display().to_string() });
    }
    drop(tx);
    let beside = |suffix: &str| {
        let mut name = database.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let restoring = beside(RESTORING_SUFFIX);
    remove_stale(&restoring)?;
    open_copy(&copy, key, &restoring).await?;
    let stamp = ours.clock().now().seconds().to_rfc3339().replace(['-', ':'], "");
    let mut undoing = Undoing {
        aside: beside(&format!(".undone-{stamp}")),
        database,
        restoring,
        copy,
        agents_lost: 0,
        events_lost: 0,
    };
    let url = DatabaseUrl::Sqlite(undoing.restoring.clone());
    let theirs = Store::open(&url, false, Arc::clone(ours.clock()), Arc::clone(ours.entropy())).await?;
    let counted = count(ours, &theirs, &undoing.copy).await;
    theirs.close().await;
    (undoing.agents_lost, undoing.events_lost) = counted?;
    Ok(undoing)
}

async fn count(ours: &Store, theirs: &Store, copy: &Path) -> Result<(i64, i64), UndoError> {
    let not_whole = || UndoError::NotWhole { path: copy.display().to_string() };
    let mut copied = theirs.read().await?;
    if !matches!(store::owner(&mut copied).await?, Owner::Predecessor) {
        return Err(not_whole());
    }
    if store::damage(&mut copied).await?.is_some() || store::revisions(&mut copied).await? != [REVISION] {
        return Err(not_whole());
    }
    let mut tx = ours.read().await?;
    let (mut after, mut lost) = (String::new(), 0);
    loop {
        let page = tx
            .rows(
                "SELECT agent_id FROM internal_agents WHERE agent_id > $1 ORDER BY agent_id LIMIT $2",
                values![&after, PAGE],
            )
            .await?;
        let Some(last) = page.last() else { break };
        let first = std::mem::replace(&mut after, last.text(0)?);
        let known = copied
            .rows(
                "SELECT agent_id FROM internal_agents WHERE agent_id > $1 AND agent_id <= $2",
                values![first, &after],
            )
            .await?;
        let known: Vec<String> = known.iter().map(|row| row.text(0)).collect::<Result<_, _>>()?;
        for row in &page {
            lost += i64::from(!known.contains(&row.text(0)?));
        }
    }
    let events = tx.row("SELECT COUNT(*) FROM audit_events", &[]).await?;
    let events = events.map(|row| row.integer(0)).transpose()?.unwrap_or(0);
    Ok((lost, events))
}

/// The SHA-256 that the audit log names of this deploy's copies.
async fn recorded(tx: &mut crate::store::ReadTx) -> Result<Vec<String>, UndoError> {
    let rows = tx
        .rows(
            "SELECT details FROM audit_events WHERE event_type IN ('deploy.adopted', 'deploy.seal_rotated')",
            &[],
        )
        .await?;
    let mut found = Vec::new();
    for row in &rows {
        let details: Value = serde_json::from_str(&row.text(0)?).unwrap_or_default();
        found.extend(details["copy_sha256"].as_str().map(str::to_owned));
        let copies = details["copies"].as_array().into_iter().flatten();
        found.extend(copies.filter_map(|copy| copy["sha256"].as_str().map(str::to_owned)));
    }
    Ok(found)
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut context = Context::new(&SHA256);
    let mut chunk = vec![0; 1024 * 1024];
    loop {
        match std::io::Read::read(&mut file, &mut chunk)? {
            0 => return Ok(hex(context.finish().as_ref())),
            read => context.update(chunk.get(..read).unwrap_or_default()),
        }
    }
}

impl Undoing {
    /// Puts the predecessor's database into the place of ours, which has to be closed, and keeps ours beside it.
    pub fn finish(self) -> Result<(), UndoError> {
        let named = |suffix: &str| {
            let mut name = self.database.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        // The last connection that closes brings the log into the file and deletes it.
        let log = named("-wal");
        if std::fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0) {
            return Err(UndoError::InUse { log: log.display().to_string() });
        }
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| UndoError::File { path, source }
        };
        // Two names of ours before the other takes one of them: no moment is without a database.
        std::fs::hard_link(&self.database, &self.aside).map_err(failed(&self.aside))?;
        std::fs::rename(&self.restoring, &self.database).map_err(failed(&self.database))?;
        copy::sync_folder(&self.database).map_err(failed(&self.database))?;
        for leftover in [log, named("-shm")] {
            remove_stale(&leftover)?;
        }
        Ok(())
    }
}
