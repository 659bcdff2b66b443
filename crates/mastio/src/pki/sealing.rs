//! Where the sealing key comes from, and the refusal to boot under a wrong one.
//!
//! From `MCP_PROXY_DB_ENCRYPTION_KEY` (argon2id, salt in the database), or from `seal.key` in the data directory
//! (made at first boot; not with PostgreSQL, where several replicas share the database). `deploy_state` remembers
//! which of the two it was, and a check value.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::keys::{KeyError, SealingKey};
use super::seal_rotation;
use crate::entropy::Entropy;
use crate::store::{Query, StoreError, WriteTx};
use crate::values;

/// Name of the file in the data directory.
pub const SEAL_KEY_FILE: &str = "seal.key";
const CHECK_PLACE: &str = "deploy_state/sealing_check/value";
const CHECK_TEXT: &[u8] = b"mastio";

/// Why the sealing key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SealingError {
    /// The database is sealed under a passphrase and none was given.
    #[error(
        "the keys in this database are sealed under a passphrase: set MCP_PROXY_DB_ENCRYPTION_KEY to the value they were sealed with (mastio seal rotate --to-file moves them under a seal.key)"
    )]
    PassphraseMissing,
    /// The passphrase is not the one.
    #[error(
        "MCP_PROXY_DB_ENCRYPTION_KEY is not the passphrase that sealed this database: the Org CA, the intermediate, the token keys and every snapshot depend on it; set the former value; mastio seal rotate --new-passphrase-file FILE moves them under another"
    )]
    PassphraseWrong,
    /// The database is sealed under the file and a passphrase was given.
    #[error(
        "the keys in this database are sealed under seal.key, not under MCP_PROXY_DB_ENCRYPTION_KEY: unset it, or run mastio seal rotate, which moves them under it"
    )]
    PassphraseUnexpected,
    /// The file is not the one, or is gone.
    #[error(
        "seal.key in the data directory is not the key that sealed this database: restore the file from the backup; without it the Org CA key is lost"
    )]
    FileWrong(#[source] Option<KeyError>),
    /// PostgreSQL needs a passphrase.
    #[error(
        "with PostgreSQL set MCP_PROXY_DB_ENCRYPTION_KEY: a seal.key file would not be shared by replicas"
    )]
    PassphraseRequired,
    /// A key cannot be made or used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Opens the sealing key of a database that has one. Absent for a database that is not sealed yet.
pub async fn open(
    tx: &mut impl Query,
    data_dir: &Path,
    passphrase: Option<&str>,
) -> Result<Option<SealingKey>, SealingError> {
    let Some(source) = state(tx, "sealing_source").await? else { return Ok(None) };
    let check = state(tx, "sealing_check").await?.unwrap_or_default();
    let key = match (source.as_str(), passphrase) {
        ("passphrase", None) => return Err(SealingError::PassphraseMissing),
        ("passphrase", Some(passphrase)) => {
            let salt = state(tx, "sealing_salt").await?.unwrap_or_default();
            let salt = STANDARD.decode(salt).map_err(|_| SealingError::PassphraseWrong)?;
            SealingKey::from_passphrase(passphrase, &salt)?
        }
        (_, Some(_)) => return Err(SealingError::PassphraseUnexpected),
        (_, None) => {
            let opens = |key: &SealingKey| key.open(CHECK_PLACE, &check).is_ok();
            let present = SealingKey::from_file(&data_dir.join(SEAL_KEY_FILE));
            match present {
                Ok(key) if opens(&key) => key,
                // A rotation was committed, and ended before its file was in its place.
                present => match seal_rotation::next_key(data_dir).filter(opens) {
                    Some(next) => next,
                    None => present.map_err(|error| SealingError::FileWrong(Some(error)))?,
                },
            }
        }
    };
    match key.open(CHECK_PLACE, &check) {
        Ok(_) => Ok(Some(key)),
        Err(_) if source == "passphrase" => Err(SealingError::PassphraseWrong),
        Err(error) => Err(SealingError::FileWrong(Some(error))),
    }
}

/// Makes the sealing key of a database that has none, and records its check value in the caller's transaction.
pub async fn create(
    tx: &mut WriteTx,
    data_dir: &Path,
    passphrase: Option<&str>,
    postgres: bool,
    entropy: &Entropy,
) -> Result<SealingKey, SealingError> {
    let (source, key) = match passphrase {
        Some(passphrase) => {
            let salt = entropy.bytes::<16>();
            set_state(tx, "sealing_salt", &STANDARD.encode(salt)).await?;
            ("passphrase", SealingKey::from_passphrase(passphrase, &salt)?)
        }
        None if postgres => return Err(SealingError::PassphraseRequired),
        None => {
            let path = data_dir.join(SEAL_KEY_FILE);
            // A boot that stopped between the file and the commit left a file that nothing is sealed under yet.
            let key = if path.exists() {
                SealingKey::from_file(&path)?
            } else {
                SealingKey::create_file(&path, entropy)?
            };
            ("file", key)
        }
    };
    set_state(tx, "sealing_source", source).await?;
    set_state(tx, "sealing_check", &key.seal(CHECK_PLACE, CHECK_TEXT)?).await?;
    Ok(key)
}

/// A value of `deploy_state`.
pub async fn state(tx: &mut impl Query, key: &str) -> Result<Option<String>, StoreError> {
    let row = tx.row("SELECT value FROM deploy_state WHERE key = $1", values![key]).await?;
    row.map(|row| row.text(0)).transpose()
}

/// Writes a value of `deploy_state`.
pub async fn set_state(tx: &mut WriteTx, key: &str, value: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO deploy_state (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        values![key, value],
    )
    .await
    .map(drop)
}

/// Removes a value of `deploy_state`.
pub async fn clear_state(tx: &mut WriteTx, key: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM deploy_state WHERE key = $1", values![key]).await.map(drop)
}
