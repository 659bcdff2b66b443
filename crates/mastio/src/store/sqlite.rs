//! What is SQLite's alone: how a file is opened, how a write transaction takes its lock, how cells are read.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _, TypeInfo as _, ValueRef as _};

use super::StoreError;
use super::value::{Cell, Row, Value};

/// How long a statement waits for another process's lock (an operator's `sqlite3`) before it fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request waits for a connection before it is refused with 503.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that only read. Two cores are busy with fewer.
const READERS_MAX: u32 = 4;
/// What a reader keeps of the file, in KiB, negative as SQLite wants it; the kernel keeps the rest.
const READER_CACHE: &str = "-1024";
/// Statements that a connection keeps prepared.
const STATEMENTS_MAX: usize = 192;

/// One connection that writes, and a few that read.
pub(super) struct Pools {
    pub writer: SqlitePool,
    pub readers: SqlitePool,
}

fn options(path: &Path, create: bool) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(create)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        // A deleted key must not stay readable in the file: within a page at once, in free pages by the VACUUM of `scrub`.
        .pragma("secure_delete", "FAST")
        // `checkpoint` empties the log beside the commits. This, half a gigabyte, is for a process that has no such job or
        // cannot follow: the commit that comes to it copies all of that while everybody waits, and an update's is long.
        .pragma("wal_autocheckpoint", "131072")
        .statement_cache_capacity(STATEMENTS_MAX)
}

/// Puts the file into WAL mode, rewrites it, and empties its log.
pub(super) async fn scrub(path: &Path) -> Result<(), StoreError> {
    let mut connection = options(path, false).connect().await?;
    for statement in [
        "PRAGMA journal_mode = WAL",
        "PRAGMA wal_checkpoint(TRUNCATE)",
        "VACUUM",
        "PRAGMA wal_checkpoint(TRUNCATE)",
    ] {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    Ok(connection.close().await?)
}

/// Copies what is committed from the log into the file, as far as no reader stands in the way. Nobody waits for it.
pub(super) async fn checkpoint(readers: &SqlitePool) -> Result<(), StoreError> {
    sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_all(readers).await?;
    Ok(())
}

/// Opens `path` with every commit synced to disk, in WAL mode where the file is ours.
///
/// A file of somebody else's keeps its journal mode: adoption may refuse it, and must not have changed a byte then.
pub(super) async fn open(path: &Path, create: bool) -> Result<Pools, StoreError> {
    let options = options(path, create);
    let writer = pool(1).connect_with(options.clone()).await?;
    let foreign = sqlx::query(
        "SELECT 1 FROM sqlite_master WHERE type = 'table' AND NOT EXISTS \
         (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'mastio_schema') LIMIT 1",
    )
    .fetch_optional(&writer)
    .await?
    .is_some();
    if !foreign {
        sqlx::query("PRAGMA journal_mode = WAL").fetch_all(&writer).await?;
    }
    let readers = pool(READERS_MAX).connect_with(options.pragma("cache_size", READER_CACHE)).await?;
    Ok(Pools { writer, readers })
}

fn pool(connections_max: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A full or failing disk makes SQLite end the transaction by itself, so the ROLLBACK that follows finds none and
        // fails; sqlx then takes the connection to be inside that transaction for ever. Such a one is closed.
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
}

pub(super) fn read(row: &SqliteRow) -> Result<Row, StoreError> {
    let mut cells = Vec::with_capacity(row.len());
    for index in 0..row.len() {
        let raw = row.try_get_raw(index)?;
        // SQLite types values, not columns: the predecessor's BOOLEAN and DATETIME hold numbers and text.
        cells.push(if raw.is_null() {
            Cell::Null
        } else {
            match raw.type_info().name() {
                "TEXT" => Cell::Text(row.try_get_unchecked(index)?),
                "INTEGER" | "BOOLEAN" => Cell::Integer(row.try_get_unchecked(index)?),
                "REAL" => Cell::Text(row.try_get_unchecked::<f64, _>(index)?.to_string()),
                _ => Cell::Text(
                    String::from_utf8_lossy(&row.try_get_unchecked::<Vec<u8>, _>(index)?).into_owned(),
                ),
            }
        });
    }
    Ok(Row(cells))
}

pub(super) fn bind<'q, 'v>(
    mut query: sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
    values: impl IntoIterator<Item = &'v Value>,
) -> sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments> {
    for value in values {
        query = match value {
            Value::Text(text) => query.bind(text.clone()),
            Value::Integer(number) => query.bind(*number),
        };
    }
    query
}
