//! Transactions: the one way to read and the one way to write.

use std::sync::Arc;

use mastio_core::audit::chain::{self, Head};
use mastio_core::audit::event::Event;
use mastio_core::time::UnixMicros;
use sqlx::AssertSqlSafe;

use super::obstacle::Writes;
use super::value::{Row, Value};
use super::{Backend, StoreError, postgres, sqlite};
use crate::clock::Clock;
use crate::entropy::Entropy;

/// Rows that one multi-row statement writes at most; the cost of a statement is shared by so many.
const ROWS_PER_STATEMENT: usize = 64;

enum Connection {
    Sqlite(sqlx::Transaction<'static, sqlx::Sqlite>),
    Postgres(sqlx::Transaction<'static, sqlx::Postgres>),
}

impl Connection {
    async fn rows<'v>(
        &mut self,
        sql: impl sqlx::SqlSafeStr,
        values: impl IntoIterator<Item = &'v Value>,
    ) -> Result<Vec<Row>, StoreError> {
        match self {
            Self::Sqlite(tx) => {
                let rows = sqlite::bind(sqlx::query(sql), values).fetch_all(&mut **tx).await?;
                rows.iter().map(sqlite::read).collect()
            }
            Self::Postgres(tx) => {
                let rows = postgres::bind(sqlx::query(sql), values).fetch_all(&mut **tx).await?;
                rows.iter().map(postgres::read).collect()
            }
        }
    }

    async fn execute<'v>(
        &mut self,
        sql: impl sqlx::SqlSafeStr,
        values: impl IntoIterator<Item = &'v Value>,
    ) -> Result<u64, StoreError> {
        Ok(match self {
            Self::Sqlite(tx) => {
                sqlite::bind(sqlx::query(sql), values).execute(&mut **tx).await?.rows_affected()
            }
            Self::Postgres(tx) => {
                postgres::bind(sqlx::query(sql), values).execute(&mut **tx).await?.rows_affected()
            }
        })
    }
}

/// Reading, the same in both kinds of transaction.
pub trait Query: Send {
    /// Every row of the answer. Bound the answer in the statement itself.
    fn rows(
        &mut self,
        sql: &'static str,
        values: &[Value],
    ) -> impl Future<Output = Result<Vec<Row>, StoreError>> + Send;

    /// The first row of the answer, where there is one.
    fn row(
        &mut self,
        sql: &'static str,
        values: &[Value],
    ) -> impl Future<Output = Result<Option<Row>, StoreError>> + Send {
        async move { Ok(self.rows(sql, values).await?.into_iter().next()) }
    }
}

/// A consistent view of what is committed. Dropping it ends it.
pub struct ReadTx(Connection);

impl ReadTx {
    pub(super) async fn begin(backend: &Backend) -> Result<Self, StoreError> {
        Ok(Self(match backend {
            Backend::Sqlite { pools, .. } => Connection::Sqlite(pools.readers.begin().await?),
            Backend::Postgres(pool) => Connection::Postgres(
                pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?,
            ),
        }))
    }
}

impl ReadTx {
    /// Runs a query whose text the store itself has put together from constants.
    pub(super) async fn rows_built(&mut self, sql: String, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        self.0.rows(AssertSqlSafe(sql), values).await
    }
}

impl Query for ReadTx {
    async fn rows(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        self.0.rows(sql, values).await
    }
}

/// What a commit did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Sequence number of the last event in the chain now.
    pub sequence: i64,
    /// The epoch that now stands.
    pub epoch: i64,
}

/// A write transaction. Dropping it without a commit undoes everything.
pub struct WriteTx {
    connection: Connection,
    head: Head,
    epoch: i64,
    clock: Arc<dyn Clock>,
    entropy: Arc<Entropy>,
    writes: Writes,
}

impl WriteTx {
    pub(super) async fn begin(
        backend: &Backend,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
        writes: &Writes,
    ) -> Result<Self, StoreError> {
        let mut connection = writes.told(Self::lock(backend).await)?;
        let head = match &connection {
            // BEGIN IMMEDIATE holds the database; PostgreSQL has to lock the row.
            Connection::Sqlite(_) => "SELECT sequence, hash, epoch FROM audit_head WHERE id = 1",
            Connection::Postgres(_) => "SELECT sequence, hash, epoch FROM audit_head WHERE id = 1 FOR UPDATE",
        };
        let row = writes.told(connection.rows(head, &[]).await)?;
        let row = row.into_iter().next().ok_or(StoreError::HeadMissing)?;
        let head = Head { sequence: row.integer(0)?, hash: row.text(1)? };
        Ok(Self { connection, head, epoch: row.integer(2)?, clock, entropy, writes: writes.clone() })
    }

    /// A write transaction on a database that has no audit head yet: for schema steps alone.
    pub(super) async fn begin_schema(
        backend: &Backend,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
    ) -> Result<Self, StoreError> {
        let mut connection = Self::lock(backend).await?;
        if matches!(connection, Connection::Postgres(_)) {
            // Two replicas that boot at once: the second waits here and then finds the steps done.
            connection.rows("SELECT pg_advisory_xact_lock(20260423)::text", &[]).await?;
        }
        let writes = Writes::default();
        Ok(Self { connection, head: Head::genesis(), epoch: 0, clock, entropy, writes })
    }

    async fn lock(backend: &Backend) -> Result<Connection, StoreError> {
        Ok(match backend {
            // A plain BEGIN would upgrade its lock at the first write and die of SQLITE_BUSY without waiting.
            Backend::Sqlite { pools, .. } => {
                Connection::Sqlite(pools.writer.begin_with("BEGIN IMMEDIATE").await?)
            }
            Backend::Postgres(pool) => Connection::Postgres(pool.begin().await?),
        })
    }

    /// The epoch as it stood when this transaction took its lock; nobody else can have moved it since.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Sequence number of the last event when this transaction took its lock.
    #[must_use]
    pub fn sequence(&self) -> i64 {
        self.head.sequence
    }

    /// Whether the database is PostgreSQL. For schema steps alone.
    pub(super) fn is_postgres(&self) -> bool {
        matches!(self.connection, Connection::Postgres(_))
    }

    /// Runs one statement and tells how many rows it touched.
    pub async fn execute(&mut self, sql: &'static str, values: &[Value]) -> Result<u64, StoreError> {
        self.writes.told(self.connection.execute(sql, values).await)
    }

    /// Runs one statement whose text the store itself has put together from constants.
    pub(super) async fn execute_built(&mut self, sql: String, values: &[Value]) -> Result<u64, StoreError> {
        self.writes.told(self.connection.execute(AssertSqlSafe(sql), values).await)
    }

    /// Runs a query whose text the store itself has put together from constants.
    pub(super) async fn rows_built(&mut self, sql: String, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        self.writes.told(self.connection.rows(AssertSqlSafe(sql), values).await)
    }

    /// Inserts many rows with few statements: `INSERT INTO {target} VALUES (…), (…) {conflict}`.
    ///
    /// `target` is a table with its column list, `conflict` the statement's end (`ON CONFLICT …`), or empty.
    /// Every row has as many values as the list has columns.
    pub async fn insert_many(
        &mut self,
        target: &'static str,
        rows: &[Vec<Value>],
        conflict: &'static str,
    ) -> Result<u64, StoreError> {
        self.insert_chunks(target, rows, conflict).await
    }

    /// [`Self::insert_many`] into a table whose name the store itself has put together from constants.
    pub(super) async fn insert_many_built(
        &mut self,
        target: &str,
        rows: &[Vec<Value>],
    ) -> Result<u64, StoreError> {
        self.insert_chunks(target, rows, "").await
    }

    async fn insert_chunks(
        &mut self,
        target: &str,
        rows: &[Vec<Value>],
        conflict: &str,
    ) -> Result<u64, StoreError> {
        let mut touched = 0;
        for chunk in rows.chunks(ROWS_PER_STATEMENT) {
            let sql = self.multi_row(target, chunk, conflict);
            let written = self.connection.execute(AssertSqlSafe(sql), chunk.iter().flatten()).await;
            touched += self.writes.told(written)?;
        }
        Ok(touched)
    }

    /// [`Self::insert_many`] with a `RETURNING` clause in `conflict`, giving the rows that it names.
    pub async fn insert_many_returning(
        &mut self,
        target: &'static str,
        rows: &[Vec<Value>],
        conflict: &'static str,
    ) -> Result<Vec<Row>, StoreError> {
        let mut returned = Vec::new();
        for chunk in rows.chunks(ROWS_PER_STATEMENT) {
            let sql = self.multi_row(target, chunk, conflict);
            let rows = self.connection.rows(AssertSqlSafe(sql), chunk.iter().flatten()).await;
            returned.extend(self.writes.told(rows)?);
        }
        Ok(returned)
    }

    fn multi_row(&self, target: &str, rows: &[Vec<Value>], conflict: &str) -> String {
        // SQLite finds a parameter with a number by going through all that came before it.
        let numbered = self.is_postgres();
        let mut sql = format!("INSERT INTO {target} VALUES ");
        let mut parameter = 0;
        for (index, row) in rows.iter().enumerate() {
            sql.push_str(if index == 0 { "(" } else { ",(" });
            for column in 0..row.len() {
                parameter += 1;
                if column > 0 {
                    sql.push(',');
                }
                if numbered {
                    sql.push('$');
                    sql.push_str(&parameter.to_string());
                } else {
                    sql.push('?');
                }
            }
            sql.push(')');
        }
        sql.push(' ');
        sql.push_str(conflict);
        sql
    }

    /// Marks a fact as changed that signing depends on, where no trigger does it.
    pub async fn bump_epoch(&mut self) -> Result<(), StoreError> {
        self.execute("UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence WHERE id = 1", &[])
            .await
            .map(drop)
    }

    /// Appends `events` to the chain and makes everything durable, in one step.
    ///
    /// Errors: [`StoreError::Database`]; then nothing has changed.
    pub async fn commit(mut self, events: &[Event]) -> Result<Committed, StoreError> {
        let now = self.clock.now();
        let head = if events.is_empty() {
            self.connection.rows("SELECT epoch FROM audit_head WHERE id = 1", &[]).await?
        } else {
            self.append(now, events).await?
        };
        let epoch = head.first().ok_or(StoreError::HeadMissing)?.integer(0)?;
        let sequence = self.head.sequence;
        self.finish().await?;
        Ok(Committed { sequence, epoch })
    }

    /// Commits what is allowed to change without an event: `store/ephemeral.rs`, the journal of update runs, and
    /// the schema. `tests/tidy.rs` keeps the list of callers.
    pub async fn commit_unaudited(self) -> Result<(), StoreError> {
        self.finish().await
    }

    /// Writes the head as it is, durably: changes nothing, and tells whether the database writes.
    pub(super) async fn write_head_as_it_is(mut self) -> Result<(), StoreError> {
        self.execute("UPDATE audit_head SET epoch = epoch WHERE id = 1", &[]).await?;
        self.finish().await
    }

    /// Links `events` to the chain; the answer is the epoch that stands behind them.
    async fn append(&mut self, now: UnixMicros, events: &[Event]) -> Result<Vec<Row>, StoreError> {
        let mut rows = Vec::with_capacity(events.len());
        for event in events {
            let row = chain::link(&self.head, &self.entropy.ulid(now), now, event)?;
            self.head = Head { sequence: row.seq, hash: row.hash.clone() };
            rows.push(vec![
                Value::from(row.seq),
                Value::from(row.id),
                Value::from(row.timestamp),
                Value::from(row.event_type),
                Value::from(row.actor),
                Value::from(row.details),
                Value::from(row.prev_hash),
                Value::from(row.hash),
            ]);
        }
        self.insert_many(
            "audit_events (seq, id, timestamp, event_type, actor, details, prev_hash, hash)",
            &rows,
            "",
        )
        .await?;
        let (sequence, hash) = (self.head.sequence, self.head.hash.clone());
        self.connection
            .rows(
                "UPDATE audit_head SET sequence = $1, hash = $2 WHERE id = 1 RETURNING epoch",
                crate::values![sequence, hash],
            )
            .await
    }

    async fn finish(self) -> Result<(), StoreError> {
        let committed = match self.connection {
            Connection::Sqlite(tx) => tx.commit().await,
            Connection::Postgres(tx) => tx.commit().await,
        };
        self.writes.told(committed.map_err(StoreError::from))?;
        self.writes.succeeded();
        Ok(())
    }
}

impl Query for WriteTx {
    async fn rows(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        self.writes.told(self.connection.rows(sql, values).await)
    }
}
