//! Moving every sealed value under another sealing key: another `seal.key`, a passphrase, or back.
//!
//! For the operator whose key was seen by somebody, or who moves to PostgreSQL. No server may run meanwhile. One
//! transaction re-seals what lies in the database, and with it the check value that decides at boot which key is the
//! right one; that commit is the moment of the change. Files come before and after it: a new `seal.key` and the copies
//! that adoptions put aside are written beside the old ones, durable, before the commit, and take their places after it.
//! Whichever boot finds them beside each other brings that to its end ([`finish`]), because the database says which it is.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mastio_core::audit::event::{Event, EventType};
use serde_json::{Map, Value, json};

use super::keys::{KeyError, SealingKey};
use super::sealing::{self, SEAL_KEY_FILE, SealingError, set_state, state};
use crate::entropy::Entropy;
use crate::store::adopt::{self, AdoptError};
use crate::store::{Query as _, Store, StoreError, WriteTx, schema};
use crate::updates::crash::crash_point;
use crate::values;

/// The new key file, until the database is sealed under it.
const NEXT_KEY_FILE: &str = "seal.key.next";
/// What a former key file is called: it opens the backups made until then.
const FORMER_KEY_FILE: &str = "seal.key.former";
/// What is appended to the name of a copy that waits to take the place of the one before.
const NEXT_SUFFIX: &str = ".next";
/// Values that are read, opened and sealed together.
const PAGE: i64 = 256;

/// Why the seal was not rotated. Nothing has changed then, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// Another process has the database open.
    #[error("{0} other sessions of mastio use this database: stop every replica first")]
    InUse(i64),
    /// PostgreSQL needs a passphrase.
    #[error(
        "with PostgreSQL the keys are sealed under a passphrase: name a file with the new one (--new-passphrase-file)"
    )]
    PassphraseRequired,
    /// Where to is not said.
    #[error("say what the keys are to be sealed under: --new-passphrase-file FILE, or --to-file")]
    Unsaid,
    /// A passphrase is nothing.
    #[error("the new passphrase is empty")]
    PassphraseEmpty,
    /// The sealing key.
    #[error(transparent)]
    Sealing(#[from] SealingError),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A copy that an adoption put aside.
    #[error(transparent)]
    Copy(#[from] AdoptError),
    /// A file.
    #[error(
        "{path} cannot be moved into its place: the database is sealed under the new key; the next start tries again"
    )]
    File {
        /// Which.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the keys are to be sealed under.
pub enum NewSeal {
    /// A new `seal.key`.
    File,
    /// A passphrase.
    Passphrase(String),
}

/// A table that only the predecessor makes.
const PREDECESSORS: &str = "legacy_pki_archive";

/// A place in the database where sealed values lie: `table/row/column`.
struct Sealed {
    table: &'static str,
    column: &'static str,
    select: &'static str,
    update: &'static str,
}

macro_rules! sealed {
    ($table:literal, $key:literal, $column:literal) => {
        Sealed {
            table: $table,
            column: $column,
            select: concat!(
                "SELECT ",
                $key,
                ", ",
                $column,
                " FROM ",
                $table,
                " WHERE ",
                $column,
                " LIKE 'enc:v1:%' AND ",
                $key,
                " > $1 ORDER BY ",
                $key,
                " LIMIT $2"
            ),
            update: concat!("UPDATE ", $table, " SET ", $column, " = $2 WHERE ", $key, " = $1"),
        }
    };
}

/// Every one of them, but for the images of update runs. The sealing key's own check value is among `deploy_state`.
const SEALED: [Sealed; 7] = [
    sealed!("proxy_config", "key", "value"),
    sealed!("deploy_state", "key", "value"),
    sealed!("mastio_keys", "kid", "privkey_pem"),
    sealed!("pki_anchors", "fingerprint", "key_sealed"),
    sealed!("legacy_pki_archive", "key_id", "legacy_pem"),
    sealed!("mcp_upstreams", "upstream_id", "credential_sealed"),
    sealed!("mcp_evidence", "part_id", "sealed"),
];

/// Seals everything under another key, and tells how many values of each table went.
///
/// `former` opens what is there. The caller holds the deploy, and has no other session in the database.
/// Errors: [`RotationError`]; but for [`RotationError::File`] nothing has changed.
pub async fn rotate(
    store: &Store,
    data_dir: &Path,
    former: &SealingKey,
    new: NewSeal,
    actor: &str,
    entropy: &Entropy,
) -> Result<Value, RotationError> {
    let mut tx = store.write().await?;
    refuse_other_sessions(&mut tx, store).await?;
    let from = state(&mut tx, "sealing_source").await?.unwrap_or_default();
    let (source, salt, key) = match &new {
        NewSeal::Passphrase(passphrase) if passphrase.is_empty() => {
            return Err(RotationError::PassphraseEmpty);
        }
        NewSeal::Passphrase(passphrase) => {
            let salt = entropy.bytes::<16>();
            ("passphrase", Some(STANDARD.encode(salt)), SealingKey::from_passphrase(passphrase, &salt)?)
        }
        NewSeal::File if store.sqlite_path().is_none() => return Err(RotationError::PassphraseRequired),
        NewSeal::File => {
            let path = data_dir.join(NEXT_KEY_FILE);
            // One that was never committed to: nothing is sealed under it.
            remove(&path)?;
            ("file", None, SealingKey::create_file(&path, entropy)?)
        }
    };
    let mut copies = Vec::new();
    for copy in copies_beside(store)? {
        let next = beside(&copy, NEXT_SUFFIX);
        let header = (source.to_owned(), salt.clone());
        let sha256 = adopt::reseal_copy(&copy, &next, former, &key, header, entropy)?;
        copies.push(json!({ "copy": file_name(&copy), "sha256": sha256 }));
    }
    let values = reseal(&mut tx, former, &key).await?;
    set_state(&mut tx, "sealing_source", source).await?;
    match &salt {
        Some(salt) => set_state(&mut tx, "sealing_salt", salt).await?,
        None => sealing::clear_state(&mut tx, "sealing_salt").await?,
    }
    // Old pages of the file still hold what was sealed under the former key.
    set_state(&mut tx, adopt::SCRUB_PENDING, "seal rotation").await?;
    tx.bump_epoch().await?;
    let details = json!({ "from": from, "to": source, "values": values, "copies": copies });
    crash_point("seal.commit.before");
    let event =
        Event { event_type: EventType::DeploySealRotated, actor: actor.to_owned(), details: details.clone() };
    tx.commit(&[event]).await?;
    crash_point("seal.commit");
    if from == "file" && source == "passphrase" {
        move_file(&data_dir.join(SEAL_KEY_FILE), &former_name(data_dir))?;
    }
    finish(store, data_dir, &key)?;
    crash_point("seal.finished");
    Ok(details)
}

/// Replicas would go on sealing under the former key.
async fn refuse_other_sessions(tx: &mut WriteTx, store: &Store) -> Result<(), RotationError> {
    /// The caller's own former session ends a moment after it was closed.
    const LOOKS: usize = 20;
    if store.sqlite_path().is_some() {
        return Ok(());
    }
    let mut others = 0;
    for _look in 0..LOOKS {
        let row = tx
            .row(
                "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() \
                 AND application_name = 'mastio' AND pid <> pg_backend_pid()",
                &[],
            )
            .await?;
        others = row.map(|row| row.integer(0)).transpose()?.unwrap_or(0);
        if others == 0 {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        // What is looked at is kept for the length of a transaction otherwise.
        tx.row("SELECT pg_stat_clear_snapshot()::text", &[]).await?;
    }
    Err(RotationError::InUse(others))
}

/// Opens every sealed value and seals it anew, a page at a time.
async fn reseal(tx: &mut WriteTx, former: &SealingKey, new: &SealingKey) -> Result<Value, RotationError> {
    let mut counts = Map::new();
    for sealed in &SEALED {
        if sealed.table == PREDECESSORS && !schema::has_table_in(tx, PREDECESSORS).await? {
            continue;
        }
        let (mut after, mut count) = (String::new(), 0);
        loop {
            let page = tx.rows(sealed.select, values![&after, PAGE]).await?;
            let Some(last) = page.last() else { break };
            after = last.text(0)?;
            for row in &page {
                let place = format!("{}/{}/{}", sealed.table, row.text(0)?, sealed.column);
                let value = former.reseal(new, &place, &row.text(1)?)?;
                tx.execute(sealed.update, values![row.text(0)?, value]).await?;
                count += 1;
            }
        }
        counts.insert(sealed.table.to_owned(), json!(count));
    }
    counts.insert("update_images".to_owned(), json!(reseal_images(tx, former, new).await?));
    Ok(Value::Object(counts))
}

/// The private keys in the images of update runs: a handful of each run, and three texts of each image.
async fn reseal_images(
    tx: &mut WriteTx,
    former: &SealingKey,
    new: &SealingKey,
) -> Result<u64, RotationError> {
    let images = tx
        .rows(
            "SELECT run_id, table_name, row_key, column_name, before, restore, after FROM update_images \
             WHERE sealed = 1 AND COALESCE(before, restore, after) IS NOT NULL",
            &[],
        )
        .await?;
    let mut count = 0;
    for image in &images {
        let [run_id, table, row_key, column] =
            [image.text(0)?, image.text(1)?, image.text(2)?, image.text(3)?];
        let mut side = |index: usize, side: &str| -> Result<Option<String>, RotationError> {
            let Some(sealed) = image.optional_text(index)? else { return Ok(None) };
            count += 1;
            let place = format!("update_images/{run_id}/{table}/{row_key}/{column}/{side}");
            Ok(Some(former.reseal(new, &place, &sealed)?))
        };
        let (before, restore, after) = (side(4, "before")?, side(5, "restore")?, side(6, "after")?);
        tx.execute(
            "UPDATE update_images SET before = $5, restore = $6, after = $7 WHERE run_id = $1 AND table_name = $2 \
             AND row_key = $3 AND column_name = $4",
            values![run_id, table, row_key, column, before, restore, after],
        )
        .await?;
    }
    Ok(count)
}

/// Puts files into their places that a rotation left beside the old ones, where `key` says that its commit was made.
///
/// Does nothing where there are none. Safe to repeat. Errors: [`RotationError::File`].
pub fn finish(store: &Store, data_dir: &Path, key: &SealingKey) -> Result<(), RotationError> {
    let next = data_dir.join(NEXT_KEY_FILE);
    let present = data_dir.join(SEAL_KEY_FILE);
    if SealingKey::from_file(&next).is_ok_and(|other| other.is_same_as(key)) {
        if present.exists() {
            move_file(&present, &former_name(data_dir))?;
        }
        move_file(&next, &present)?;
    }
    for copy in copies_beside(store)? {
        let waiting = beside(&copy, NEXT_SUFFIX);
        if !waiting.exists() {
            continue;
        }
        // One that this key does not open was never committed to.
        if adopt::copy_opens(&waiting, key) {
            move_file(&waiting, &copy)?;
        } else {
            remove(&waiting)?;
        }
    }
    Ok(())
}

/// The key file of a rotation that was committed and not finished, where there is one.
pub(super) fn next_key(data_dir: &Path) -> Option<SealingKey> {
    SealingKey::from_file(&data_dir.join(NEXT_KEY_FILE)).ok()
}

/// A name that no former key has yet: each opens backups of its own time.
fn former_name(data_dir: &Path) -> PathBuf {
    let first = data_dir.join(FORMER_KEY_FILE);
    if !first.exists() {
        return first;
    }
    (2u32..)
        .map(|number| data_dir.join(format!("{FORMER_KEY_FILE}.{number}")))
        .find(|path| !path.exists())
        .unwrap_or(first)
}

/// The sealed copies that adoptions put aside, beside the database.
fn copies_beside(store: &Store) -> Result<Vec<PathBuf>, RotationError> {
    let Some(database) = store.sqlite_path() else { return Ok(Vec::new()) };
    Ok(adopt::copies(database)?)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn move_file(from: &Path, to: &Path) -> Result<(), RotationError> {
    let moved = std::fs::rename(from, to)
        .and_then(|()| to.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all()));
    moved.map_err(|source| RotationError::File { path: to.display().to_string(), source })
}

fn remove(path: &Path) -> Result<(), RotationError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(RotationError::File { path: path.display().to_string(), source })
        }
        _ => Ok(()),
    }
}
