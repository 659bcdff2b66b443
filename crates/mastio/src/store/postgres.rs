//! What is PostgreSQL's alone: session settings, and how cells are read.

use std::str::FromStr as _;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use sqlx::{Row as _, TypeInfo as _, ValueRef as _};

use super::StoreError;
use super::sqlite::ACQUIRE_TIMEOUT;
use super::value::{Cell, Row, Value};

/// Connections of one replica.
const CONNECTIONS_MAX: u32 = 12;

/// Connects to `url`. A session that dies in mid-transaction frees its locks by itself.
pub(super) async fn open(url: &str) -> Result<PgPool, StoreError> {
    let options = PgConnectOptions::from_str(url)?.options([
        ("lock_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "30s"),
        ("application_name", "mastio"),
    ]);
    Ok(PgPoolOptions::new()
        .max_connections(CONNECTIONS_MAX)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .connect_with(options)
        .await?)
}

pub(super) fn read(row: &PgRow) -> Result<Row, StoreError> {
    let mut cells = Vec::with_capacity(row.len());
    for index in 0..row.len() {
        let raw = row.try_get_raw(index)?;
        cells.push(if raw.is_null() {
            Cell::Null
        } else {
            match raw.type_info().name() {
                "INT8" => Cell::Integer(row.try_get_unchecked(index)?),
                "INT4" => Cell::Integer(row.try_get_unchecked::<i32, _>(index)?.into()),
                "BOOL" => Cell::Integer(row.try_get_unchecked::<bool, _>(index)?.into()),
                _ => Cell::Text(row.try_get_unchecked(index)?),
            }
        });
    }
    Ok(Row(cells))
}

pub(super) fn bind<'q, 'v>(
    mut query: sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>,
    values: impl IntoIterator<Item = &'v Value>,
) -> sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments> {
    for value in values {
        query = match value {
            Value::Text(text) => query.bind(text.clone()),
            Value::Integer(number) => query.bind(*number),
        };
    }
    query
}
