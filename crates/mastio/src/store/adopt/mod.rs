//! Adoption: a Python Mastio's `mcp_proxy.db` becomes ours, in place.
//!
//! For the operator who replaces the predecessor's image and keeps its volume. [`adopt_if_legacy`] runs at boot before
//! the schema steps, in this order: recognise the file; make sure that the Python server is gone; examine everything
//! that is needed later; put a sealed copy aside; extend and convert in one transaction, bound to our audit chain
//! by the event `deploy.adopted`. Then [`finish_scrub`] wipes the clear text that the old rows left in the file, at
//! this boot or, after a crash, at the next.
//!
//! Nothing is changed that is not understood: a refusal comes before the first write, and says what to do. A crash
//! before the commit leaves the database as it was; the copy and a stale temporary file are all that can remain.
//! Afterwards ids, `kid`s and the org id are what they were, and every column that holds no private key is the same
//! byte for byte. `alembic_version` names a revision that the predecessor does not know, so that an old image,
//! started by mistake, stops instead of replacing the Org CA.

mod convert;
mod copy;
mod error;
mod examine;
mod fernet;
mod history;
mod locks;
mod store;
#[cfg(test)]
mod tests;
pub mod undo;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixMicros;
use serde_json::json;

pub use copy::{CopyHeader, copies, copy_header, copy_opens, open_copy, reseal_copy};
pub use error::AdoptError;

use self::copy::ClearCopy;
use self::store::Owner;
pub use self::store::set_snapshot;
use super::{Store, StoreError, WriteTx, schema};
use crate::entropy::Entropy;
use crate::pki::sealing;

/// The one schema revision that is adopted.
pub const REVISION: &str = "0042_audit_log_v2";
/// What `alembic_version` says afterwards.
pub const ADOPTED_REVISION: &str = "mastio-0001-adopted";
/// The mark in `deploy_state`: old pages of the file may still hold clear text.
pub const SCRUB_PENDING: &str = "scrub_pending";
/// Who did what was done before the adoption.
const PREDECESSOR: &str = "predecessor";
/// The copy in clear, in the data directory, while it is being sealed.
const CLEAR_COPY_FILE: &str = "adopting.tmp";

/// What an adoption did, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// The organisation's id, unchanged.
    pub org_id: String,
    /// Agents carried over.
    pub agents: i64,
    /// Private keys that lay in clear, or under the predecessor's encryption, and are sealed now.
    pub keys_sealed: i64,
    /// Agents whose certificate cannot be read; they are carried over and have to enroll anew.
    pub leaves_unreadable: i64,
    /// Leaves that the predecessor replaced and that their agents may still present.
    pub leaves_superseded: i64,
    /// Snapshots that can be rolled back to.
    pub snapshots: i64,
    /// Former Org CAs that stay accepted.
    pub retiring_anchors: i64,
    /// The sealed copy of the database as it was.
    pub copy: PathBuf,
    /// SHA-256 of that file, lowercase hex.
    pub copy_sha256: String,
    /// Where the predecessor's audit chains break; absent when they verify.
    pub audit_break: Option<String>,
}

/// Adopts a predecessor's database; for an empty one or ours it does nothing and tells `None`.
///
/// `passphrase` is `MCP_PROXY_DB_ENCRYPTION_KEY`: it opens the predecessor's encrypted keys, and seals ours.
/// Errors: [`AdoptError`]; then the database is as it was.
/// Not here: the scrub. Call [`finish_scrub`] at every boot, this one included.
pub async fn adopt_if_legacy(
    store: &Store,
    data_dir: &Path,
    passphrase: Option<&str>,
    entropy: &Entropy,
) -> Result<Option<Adopted>, AdoptError> {
    let Some(database) = store.sqlite_path().map(Path::to_owned) else {
        let predecessors =
            schema::has_table(store, "alembic_version").await? && !schema::is_ours(store).await?;
        return if predecessors { Err(AdoptError::Postgres) } else { Ok(None) };
    };
    match store::owner(&mut store.read().await?).await? {
        Owner::Nobody | Owner::Us => return Ok(None),
        Owner::Stranger => return Err(AdoptError::NotRecognised),
        Owner::Predecessor => {}
    }
    let files = Files::of(&database, data_dir, store.clock().now());
    copy::remove_stale(&files.clear)?;
    copy::remove_stale(&files.part)?;
    let held = locks::take(&database)?;
    // The lock is taken before anything is decided, so that what was examined is what is copied and converted.
    let tx = WriteTx::begin_schema(&store.backend, Arc::clone(&store.clock), Arc::clone(&store.entropy))
        .await
        .map_err(locked)?;
    let adopted = adopt(store, tx, &files, data_dir, passphrase, entropy).await?;
    drop(held);
    Ok(Some(adopted))
}

/// What an adoption would find, without changing anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examined {
    /// The organisation.
    pub org_id: String,
    /// How many agents it has.
    pub agents: i64,
    /// Where the predecessor's audit chains break; absent when they verify.
    pub audit_break: Option<String>,
}

/// Examines a predecessor's database as an adoption would; `None` for an empty one or ours.
///
/// Errors: [`AdoptError`], the one that the adoption would be refused with.
pub async fn examine(store: &Store, passphrase: Option<&str>) -> Result<Option<Examined>, AdoptError> {
    let Some(database) = store.sqlite_path().map(Path::to_owned) else { return Err(AdoptError::Postgres) };
    match store::owner(&mut store.read().await?).await? {
        Owner::Nobody | Owner::Us => return Ok(None),
        Owner::Stranger => return Err(AdoptError::NotRecognised),
        Owner::Predecessor => {}
    }
    let held = locks::take(&database)?;
    // Dropped without a commit: the lock is what is wanted of it.
    let mut tx = WriteTx::begin_schema(&store.backend, Arc::clone(&store.clock), Arc::clone(&store.entropy))
        .await
        .map_err(locked)?;
    let findings = examine::examine(&mut tx, passphrase).await?;
    let faults: Vec<String> =
        [history::audit_log(&mut tx).await?.fault, history::local_audit(&mut tx).await?.fault]
            .into_iter()
            .flatten()
            .collect();
    drop(held);
    Ok(Some(Examined {
        org_id: findings.org_id,
        agents: findings.agents,
        audit_break: (!faults.is_empty()).then(|| faults.join("; ")),
    }))
}

async fn adopt(
    store: &Store,
    mut tx: WriteTx,
    files: &Files,
    data_dir: &Path,
    passphrase: Option<&str>,
    entropy: &Entropy,
) -> Result<Adopted, AdoptError> {
    let findings = examine::examine(&mut tx, passphrase).await?;
    let audit_log = history::audit_log(&mut tx).await?;
    let local_audit = history::local_audit(&mut tx).await?;
    let (org_id, agents) = (findings.org_id.clone(), findings.agents);

    // Taken by another connection, which sees what is committed: the database as it was.
    let clear = ClearCopy::create(files.clear.clone())?;
    store.sqlite_copy_into(clear.path()).await?;

    let now = store.clock().now();
    schema::apply(&mut tx, &now.seconds().to_rfc3339()).await?;
    let key = sealing::create(&mut tx, data_dir, passphrase, false, entropy).await?;
    let source = (
        sealing::state(&mut tx, "sealing_source").await?.unwrap_or_default(),
        sealing::state(&mut tx, "sealing_salt").await?,
    );
    let copy_sha256 = copy::seal(clear.path(), &files.part, &files.sealed, &key, source, entropy)?;
    clear.delete()?;

    let converted = convert::convert(&mut tx, findings, &key, entropy, now).await?;
    store::set_revision(&mut tx, ADOPTED_REVISION).await?;
    sealing::set_state(&mut tx, SCRUB_PENDING, "adoption").await?;
    let event = Event {
        event_type: EventType::DeployAdopted,
        actor: "system".to_owned(),
        details: json!({
            "source": REVISION,
            "agents": agents,
            "audit_log": audit_log.details,
            "local_audit": local_audit.details,
            "copy_sha256": copy_sha256,
        }),
    };
    tx.commit(&[event]).await?;
    let faults: Vec<String> = [audit_log.fault, local_audit.fault].into_iter().flatten().collect();
    Ok(Adopted {
        org_id,
        agents,
        keys_sealed: converted.keys_sealed,
        leaves_unreadable: converted.leaves_unreadable,
        leaves_superseded: converted.leaves_superseded,
        snapshots: converted.snapshots,
        retiring_anchors: converted.retiring_anchors,
        copy: files.sealed.clone(),
        copy_sha256,
        audit_break: (!faults.is_empty()).then(|| faults.join("; ")),
    })
}

/// Wipes the clear text that old pages of the file and its write-ahead log still hold, if an adoption left that to do.
///
/// Safe to repeat; the mark is cleared last. Errors: [`AdoptError::Store`], [`AdoptError::Scrub`]; the mark then stays.
pub async fn finish_scrub(store: &Store) -> Result<(), AdoptError> {
    let Some(database) = store.sqlite_path().map(Path::to_owned) else { return Ok(()) };
    if sealing::state(&mut store.read().await?, SCRUB_PENDING).await?.is_none() {
        return Ok(());
    }
    store.sqlite_scrub().await?;
    // A checkpoint that somebody's open read transaction holds up is no error to SQLite; to us the log is not wiped.
    let log = PathBuf::from(format!("{}-wal", database.display()));
    if std::fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0) {
        return Err(AdoptError::Scrub { log });
    }
    let mut tx = store.write().await?;
    sealing::clear_state(&mut tx, SCRUB_PENDING).await?;
    tx.commit_unaudited().await?;
    Ok(())
}

/// The files that an adoption makes.
struct Files {
    /// `adopting.tmp` in the data directory.
    clear: PathBuf,
    /// The sealed copy while it grows.
    part: PathBuf,
    /// The sealed copy.
    sealed: PathBuf,
}

impl Files {
    fn of(database: &Path, data_dir: &Path, now: UnixMicros) -> Self {
        // 2026-04-23T19:08:12Z without what a file name should not have.
        let stamp = now.seconds().to_rfc3339().replace(['-', ':'], "");
        let beside = |suffix: &str| {
            let mut name = database.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        Self {
            clear: data_dir.join(CLEAR_COPY_FILE),
            part: beside(".before-mastio.part"),
            sealed: beside(&format!("{}{stamp}{}", copy::COPY_INFIX, copy::COPY_SUFFIX)),
        }
    }
}

/// SQLite's "busy" (code 5, and its kin in the upper bytes) as what it means to an operator.
fn locked(error: StoreError) -> AdoptError {
    let busy = match &error {
        StoreError::Database(sqlx::Error::Database(cause)) => {
            cause.code().and_then(|code| code.parse::<i32>().ok()).is_some_and(|code| code & 0xff == 5)
        }
        _ => false,
    };
    if busy { AdoptError::Locked(error) } else { AdoptError::Store(error) }
}
