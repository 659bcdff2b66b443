//! Where state lives: SQLite by default, PostgreSQL when asked, the same statements on both.
//!
//! Everything is read in a [`ReadTx`], a consistent view, and written in a [`WriteTx`]. A write transaction
//! takes its lock first: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by locking the one row of `audit_head`.
//! That row is the head of the audit chain (sequence, hash) and carries the *epoch*, the number that changes
//! whenever a fact changes that signing depends on. So a change, its audit event and its place in the order
//! commit together, and [`WriteTx::commit`] is the way to commit (invariants I4 and I5).
//!
//! What may change without an event is named in [`ephemeral`] and in the journal of update runs.
//! Hot appends share one durable commit: [`group::Journal`].

pub mod adopt;
pub mod claims;
pub mod copy;
pub mod ephemeral;
pub mod group;
pub mod obstacle;
mod postgres;
pub mod refusals;
pub mod schema;
mod sqlite;
mod tx;
mod value;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mastio_core::error::Kind;

use crate::clock::Clock;
use crate::entropy::Entropy;
use obstacle::{Obstacle, Writes};
pub use tx::{Committed, Query, ReadTx, WriteTx};
pub use value::{Row, Value};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refused, is away, or is broken.
    #[error("the database did not do what was asked{}", obstacle::explained(.0))]
    Database(#[from] sqlx::Error),
    /// An answer has another shape than its statement promises.
    #[error("column {index} of an answer is not {expected}")]
    Shape {
        /// Position in the SELECT list, from 0.
        index: usize,
        /// What was expected there.
        expected: &'static str,
    },
    /// An event could not be written as canonical JSON.
    #[error("an audit event cannot be written as canonical JSON")]
    Event(#[from] mastio_core::json::JsonError),
    /// The one row of `audit_head` is missing.
    #[error("the audit head is missing: restore the database from a backup")]
    HeadMissing,
    /// The database URL is neither of the two that are understood.
    #[error("database URL {0} is neither sqlite: nor postgres:")]
    Url(String),
    /// The schema in the database is not one that this program made.
    #[error("schema step {step} in the database has checksum {found}, this program expects {expected}")]
    SchemaChanged {
        /// Number of the step.
        step: i64,
        /// Checksum in the database.
        found: String,
        /// Checksum in this program.
        expected: String,
    },
    /// The database was written by a newer program.
    #[error("the database is at schema step {found}, this program knows {known}: start the newer version")]
    SchemaNewer {
        /// Last step in the database.
        found: i64,
        /// Last step in this program.
        known: i64,
    },
}

impl StoreError {
    /// A store that cannot answer is unavailable; everything else is our own fault.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Database(
                sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::Io(_)
                | sqlx::Error::Database(_),
            ) => Kind::Unavailable,
            _ => Kind::Internal,
        }
    }

    /// What whoever asked reads: that the database is not available, and what to do where that is known.
    #[must_use]
    pub fn explained(&self) -> String {
        let obstacle = match self {
            Self::Database(error) => obstacle::explained(error),
            _ => String::new(),
        };
        format!("the database is not available{obstacle}")
    }
}

/// The address of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// A SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL URL, credentials included.
    Postgres(String),
}

impl DatabaseUrl {
    /// Reads `sqlite:` and `postgres:` URLs, the predecessor's `sqlite+aiosqlite:///…` and `postgresql+asyncpg://…` too.
    ///
    /// Errors: [`StoreError::Url`] for anything else.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let (scheme, rest) = text.split_once(':').ok_or_else(|| StoreError::Url(text.to_owned()))?;
        match scheme {
            "sqlite" | "sqlite+aiosqlite" | "sqlite+pysqlite" => {
                // SQLAlchemy's `sqlite:///relative` and `sqlite:////absolute`; plain `sqlite:path` too.
                let path = rest.strip_prefix("///").or_else(|| rest.strip_prefix("//")).unwrap_or(rest);
                let path = path.split('?').next().unwrap_or(path);
                if path.is_empty() {
                    return Err(StoreError::Url(text.to_owned()));
                }
                Ok(Self::Sqlite(PathBuf::from(path)))
            }
            "postgres"
            | "postgresql"
            | "postgresql+asyncpg"
            | "postgresql+psycopg"
            | "postgresql+psycopg2" => Ok(Self::Postgres(format!("postgres:{rest}"))),
            _ => Err(StoreError::Url(scheme.to_owned())),
        }
    }

    /// The URL as an operator may see it: a password is replaced by `***`.
    #[must_use]
    pub fn redacted(&self) -> String {
        match self {
            Self::Sqlite(path) => format!("sqlite:{}", path.display()),
            Self::Postgres(url) => match (url.find("//"), url.rfind('@')) {
                (Some(start), Some(at)) if start + 2 < at => {
                    let user = url[start + 2..at].split(':').next().unwrap_or("");
                    format!("{}{user}:***{}", &url[..start + 2], &url[at..])
                }
                _ => url.clone(),
            },
        }
    }
}

/// An open database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    backend: Arc<Backend>,
    clock: Arc<dyn Clock>,
    entropy: Arc<Entropy>,
    writes: Writes,
}

enum Backend {
    Sqlite { pools: sqlite::Pools, path: PathBuf },
    Postgres(sqlx::PgPool),
}

impl Store {
    /// Opens the database at `url`. The schema is [`schema::migrate`]'s business.
    ///
    /// `create`: whether a SQLite file may be made where there is none.
    /// Errors: [`StoreError::Database`] when it cannot be opened.
    pub async fn open(
        url: &DatabaseUrl,
        create: bool,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
    ) -> Result<Self, StoreError> {
        let backend = match url {
            DatabaseUrl::Sqlite(path) => {
                Backend::Sqlite { pools: sqlite::open(path, create).await?, path: path.clone() }
            }
            DatabaseUrl::Postgres(url) => Backend::Postgres(postgres::open(url).await?),
        };
        Ok(Self { backend: Arc::new(backend), clock, entropy, writes: Writes::default() })
    }

    /// A consistent view of everything committed so far.
    pub async fn read(&self) -> Result<ReadTx, StoreError> {
        ReadTx::begin(&self.backend).await
    }

    /// A write transaction that holds the lock of the audit head from its first statement.
    ///
    /// Errors: [`StoreError::Database`] when the lock cannot be had within ten seconds.
    pub async fn write(&self) -> Result<WriteTx, StoreError> {
        WriteTx::begin(&self.backend, Arc::clone(&self.clock), Arc::clone(&self.entropy), &self.writes).await
    }

    /// What keeps the database from writing, as the last write found.
    #[must_use]
    pub fn obstacle(&self) -> Option<Obstacle> {
        self.writes.obstacle()
    }

    /// Tries whether the database writes again, where it last refused to.
    ///
    /// Errors: [`StoreError::Database`] while it does not.
    pub async fn try_to_write(&self) -> Result<(), StoreError> {
        if self.obstacle().is_none() {
            return Ok(());
        }
        self.write().await?.write_head_as_it_is().await
    }

    /// The clock that stamps events.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Where random names and identifiers come from.
    #[must_use]
    pub fn entropy(&self) -> &Arc<Entropy> {
        &self.entropy
    }

    /// The file, where the database is SQLite.
    #[must_use]
    pub fn sqlite_path(&self) -> Option<&Path> {
        match &*self.backend {
            Backend::Sqlite { path, .. } => Some(path),
            Backend::Postgres(_) => None,
        }
    }

    /// Rewrites the SQLite file without its free pages and empties its log, so that what was deleted is gone.
    ///
    /// On a connection of its own: VACUUM and a checkpoint are refused on one that has anything else open.
    /// Does nothing on PostgreSQL.
    pub async fn sqlite_scrub(&self) -> Result<(), StoreError> {
        if let Backend::Sqlite { path, .. } = &*self.backend {
            sqlite::scrub(path).await?;
        }
        Ok(())
    }

    /// Brings what SQLite has committed from its log into the file, so that no commit has to. Nothing on PostgreSQL.
    pub async fn sqlite_checkpoint(&self) -> Result<(), StoreError> {
        match &*self.backend {
            Backend::Sqlite { pools, .. } => sqlite::checkpoint(&pools.readers).await,
            Backend::Postgres(_) => Ok(()),
        }
    }

    /// Copies the SQLite database, consistent and complete, into a new file (`VACUUM INTO`).
    pub async fn sqlite_copy_into(&self, target: &Path) -> Result<(), StoreError> {
        if let Backend::Sqlite { pools, .. } = &*self.backend {
            sqlx::query("VACUUM INTO $1")
                .bind(target.to_string_lossy().into_owned())
                .execute(&pools.readers)
                .await?;
        }
        Ok(())
    }

    /// Closes every connection, so that the file may be replaced or the process may end.
    pub async fn close(&self) {
        match &*self.backend {
            Backend::Sqlite { pools, .. } => {
                pools.readers.close().await;
                pools.writer.close().await;
            }
            Backend::Postgres(pool) => pool.close().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_predecessor_s_database_urls_are_understood() {
        for (text, path) in [
            ("sqlite+aiosqlite:////data/mcp_proxy.db", "/data/mcp_proxy.db"),
            ("sqlite:///data/mcp_proxy.db", "data/mcp_proxy.db"),
            ("sqlite:data/x.db", "data/x.db"),
        ] {
            assert_eq!(DatabaseUrl::parse(text).ok(), Some(DatabaseUrl::Sqlite(path.into())), "{text}");
        }
        assert_eq!(
            DatabaseUrl::parse("postgresql+asyncpg://cullis:pw@db/cullis").ok(),
            Some(DatabaseUrl::Postgres("postgres://cullis:pw@db/cullis".into()))
        );
        assert!(DatabaseUrl::parse("mysql://x").is_err());
    }

    #[test]
    fn a_password_never_leaves_the_url() {
        let url = DatabaseUrl::Postgres("postgres://cullis:hunter2@db/cullis".into());
        assert_eq!(url.redacted(), "postgres://cullis:***@db/cullis");
    }
}
