//! Rows of the audit chain.

use mastio_core::audit::chain::{ChainedEvent, Head};

use super::Filter;
use crate::store::{Query, Row, StoreError};
use crate::values;

fn read(row: &Row) -> Result<ChainedEvent, StoreError> {
    Ok(ChainedEvent {
        seq: row.integer(0)?,
        id: row.text(1)?,
        timestamp: row.text(2)?,
        event_type: row.text(3)?,
        actor: row.text(4)?,
        details: row.text(5)?,
        prev_hash: row.text(6)?,
        hash: row.text(7)?,
    })
}

/// A page of the list, with what else the rows have to satisfy.
macro_rules! page_where {
    ($condition:literal) => {
        concat!(
            "SELECT seq, id, timestamp, event_type, actor, details, prev_hash, hash FROM audit_events ",
            "WHERE seq < $1 AND seq > $2 ",
            $condition,
            " ORDER BY seq DESC LIMIT $3"
        )
    };
}

pub(super) async fn page(tx: &mut impl Query, filter: &Filter) -> Result<Vec<ChainedEvent>, StoreError> {
    let (before, after, limit) = (filter.before.unwrap_or(i64::MAX), filter.after.unwrap_or(0), filter.limit);
    let (sql, values) = match (&filter.event_type, &filter.subject) {
        (None, None) => (page_where!(""), values![before, after, limit].to_vec()),
        (Some(event_type), None) => {
            (page_where!("AND event_type = $4"), values![before, after, limit, event_type].to_vec())
        }
        (None, Some(subject)) => {
            (page_where!("AND subject = $4"), values![before, after, limit, subject].to_vec())
        }
        (Some(event_type), Some(subject)) => (
            page_where!("AND event_type = $4 AND subject = $5"),
            values![before, after, limit, event_type, subject].to_vec(),
        ),
    };
    tx.rows(sql, &values).await?.iter().map(read).collect()
}

pub(super) async fn page_forward(
    tx: &mut impl Query,
    after: i64,
    limit: i64,
) -> Result<Vec<ChainedEvent>, StoreError> {
    tx.rows(
        "SELECT seq, id, timestamp, event_type, actor, details, prev_hash, hash FROM audit_events \
         WHERE seq > $1 ORDER BY seq LIMIT $2",
        values![after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

pub(super) async fn head(tx: &mut impl Query) -> Result<Head, StoreError> {
    let row = tx.row("SELECT sequence, hash FROM audit_head WHERE id = 1", &[]).await?;
    let row = row.ok_or(StoreError::HeadMissing)?;
    Ok(Head { sequence: row.integer(0)?, hash: row.text(1)? })
}
