//! What keeps a database from writing while it still answers: a full disk, a database that only reads, a disk that fails.
//!
//! Whatever was under way is undone; nothing is lost. The store remembers what it met last, so that readiness and the
//! doctor can say it, and tries a small write now and then until it is gone.

use std::sync::{Arc, Mutex, PoisonError};

use sqlx::sqlite::SqliteError;

use super::StoreError;

/// Why a database refuses to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// No room is left.
    DiskFull,
    /// It takes no writes.
    ReadOnly,
    /// The disk does not do what it is told.
    DiskFails,
}

impl Obstacle {
    /// What an error of the database says about it; nothing for every other error.
    ///
    /// Source: SQLite's primary result codes (<https://www.sqlite.org/rescode.html>), PostgreSQL's SQLSTATE (Appendix A).
    pub(super) fn of(error: &sqlx::Error) -> Option<Self> {
        let database = error.as_database_error()?;
        let code = database.code()?;
        if database.try_downcast_ref::<SqliteError>().is_none() {
            return match code.as_ref() {
                "53100" => Some(Self::DiskFull),
                "25006" => Some(Self::ReadOnly),
                "58030" => Some(Self::DiskFails),
                _ => None,
            };
        }
        // The extended codes keep the primary one in their lowest byte.
        match code.parse::<u32>().ok()? & 0xff {
            13 => Some(Self::DiskFull),
            8 => Some(Self::ReadOnly),
            10 => Some(Self::DiskFails),
            _ => None,
        }
    }

    /// Its name for those who script: stable, snake case.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DiskFull => "disk_full",
            Self::ReadOnly => "read_only",
            Self::DiskFails => "disk_fails",
        }
    }

    /// What it is, and what to do about it.
    #[must_use]
    pub fn explained(self) -> &'static str {
        match self {
            Self::DiskFull => "the disk is full: make room where the database lies",
            Self::ReadOnly => "the database only reads: let it write again",
            Self::DiskFails => {
                "the disk refuses what the database writes: look at the system's log, limits and mounts"
            }
        }
    }
}

/// What a message adds to an error of the database: nothing where it is no obstacle.
pub(super) fn explained(error: &sqlx::Error) -> String {
    Obstacle::of(error).map(|obstacle| format!(" ({})", obstacle.explained())).unwrap_or_default()
}

/// What the writes of one store have met last.
#[derive(Clone, Default)]
pub(super) struct Writes(Arc<Mutex<Option<Obstacle>>>);

impl Writes {
    /// Notes what `result` tells, and gives it back.
    pub fn told<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Database(error)) = &result
            && let Some(obstacle) = Obstacle::of(error)
        {
            self.set(Some(obstacle));
        }
        result
    }

    /// Notes that something was committed.
    pub fn succeeded(&self) {
        self.set(None);
    }

    fn set(&self, obstacle: Option<Obstacle>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = obstacle;
    }

    /// What stands in the way, as far as known.
    pub fn obstacle(&self) -> Option<Obstacle> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
