//! Why a predecessor's database is not adopted, and what to do about it.

use std::path::{Path, PathBuf};

use mastio_core::error::Kind;

use crate::pki::PkiError;
use crate::pki::keys::KeyError;
use crate::pki::sealing::SealingError;
use crate::store::StoreError;

/// Why a database is not adopted. Unless a variant says otherwise, nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The file belongs to some other program.
    #[error(
        "the database holds tables of another program, neither ours nor the Python Mastio's, and was left untouched: point MCP_PROXY_DATABASE_URL at the right one"
    )]
    NotRecognised,
    /// The predecessor's schema is at a revision that we have not seen.
    #[error(
        "the database is at schema revision {found} and was left untouched: only {expected} is adopted; start a Python Mastio of that revision once so that it upgrades an older file, stop it, then start again"
    )]
    Revision {
        /// What `alembic_version` holds.
        found: String,
        /// The one that is adopted.
        expected: &'static str,
    },
    /// The predecessor on PostgreSQL.
    #[error(
        "this is a Python Mastio's PostgreSQL database, which cannot be adopted, and was left untouched: export it to the SQLite file of a Python Mastio, or choose an empty database"
    )]
    Postgres,
    /// The Python server lives.
    #[error(
        "the Python Mastio is still running, it holds {lock}: stop it, then start again; nothing was changed"
    )]
    PythonRunning {
        /// The lock file.
        lock: PathBuf,
    },
    /// A lock file cannot be looked at.
    #[error(
        "whether the Python Mastio still runs cannot be told from {lock}: make the file readable for this user, then start again; nothing was changed"
    )]
    Lock {
        /// The lock file, or the folder it would lie in.
        lock: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Somebody else writes.
    #[error(
        "another program holds the database's write lock: stop the Python Mastio and every sqlite3 shell, then start again; nothing was changed"
    )]
    Locked(#[source] StoreError),
    /// SQLite finds the file damaged.
    #[error("the database file is damaged ({finding}): restore it from a backup; nothing was changed")]
    Damaged {
        /// The first thing that the integrity check says.
        finding: String,
    },
    /// Something that every Python Mastio has is not there.
    #[error(
        "the database has no {what}, so it cannot be adopted: restore it from a backup; nothing was changed"
    )]
    Missing {
        /// A table or a row.
        what: String,
    },
    /// A value is not what the Python Mastio writes there.
    #[error(
        "{place} is not understood ({why}): restore that value from a backup, or ask for help with this message; nothing was changed"
    )]
    NotUnderstood {
        /// `table/row/column`.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// The Org CA is not this organisation's.
    #[error(
        "the Org CA's subject is \"{found}\" but org_id asks for \"{org_id} CA\": correct proxy_config org_id, or restore the Org CA from a backup; nothing was changed"
    )]
    Name {
        /// What `proxy_config` says.
        org_id: String,
        /// The common name in the certificate.
        found: String,
    },
    /// A private key does not belong to its certificate.
    #[error(
        "the private key at {place} does not belong to its certificate: restore both from the same backup; nothing was changed"
    )]
    KeyMismatch {
        /// `table/row/column`.
        place: String,
    },
    /// The predecessor encrypted its keys, and no passphrase was given.
    #[error(
        "the Python Mastio encrypted the keys in this database: set MCP_PROXY_DB_ENCRYPTION_KEY to the value it used, then start again; nothing was changed"
    )]
    PassphraseMissing,
    /// The passphrase does not open the predecessor's keys.
    #[error(
        "MCP_PROXY_DB_ENCRYPTION_KEY does not open the keys that the Python Mastio encrypted: set it to the value it used, then start again; nothing was changed"
    )]
    PassphraseWrong,
    /// The copy cannot be written or read.
    #[error(
        "the copy {path} cannot be written or read: check the disk's free space and permissions, then start again"
    )]
    Copy {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The copy is not what was written.
    #[error(
        "{path} is not a whole copy made by this program ({why}): take another one; nothing was restored"
    )]
    CopyDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The write-ahead log could not be emptied after the adoption.
    #[error(
        "clear-text keys may still lie in {log}, because another program reads the database: close every sqlite3 shell and restart"
    )]
    Scrub {
        /// The write-ahead log.
        log: PathBuf,
    },
    /// The sealing key cannot be had.
    #[error(transparent)]
    Sealing(#[from] SealingError),
    /// A key cannot be sealed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The PKI rows cannot be written.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task that verifies certificates was stopped.
    #[error("the adoption was stopped before it was complete: start again; nothing was changed")]
    Stopped,
}

impl AdoptError {
    /// A lock passes by itself; everything else wants an operator.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::PythonRunning { .. } | Self::Locked(_) => Kind::Unavailable,
            Self::Store(error) => error.kind(),
            _ => Kind::Internal,
        }
    }

    pub(super) fn copy(path: &Path, source: std::io::Error) -> Self {
        Self::Copy { path: path.to_owned(), source }
    }

    pub(super) fn not_understood(place: &str, why: impl Into<String>) -> Self {
        Self::NotUnderstood { place: place.to_owned(), why: why.into() }
    }
}
