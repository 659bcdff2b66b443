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

pub(super) async fn page(tx: &mut impl Query, filter: &Filter) -> Result<Vec<ChainedEvent>, StoreError> {
    let before = filter.before.unwrap_or(i64::MAX);
    let rows = match &filter.event_type {
        Some(event_type) => {
            tx.rows(
                "SELECT seq, id, timestamp, event_type, actor, details, prev_hash, hash FROM audit_events \
                 WHERE event_type = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3",
                values![event_type, before, filter.limit],
            )
            .await?
        }
        None => {
            tx.rows(
                "SELECT seq, id, timestamp, event_type, actor, details, prev_hash, hash FROM audit_events \
                 WHERE seq < $1 ORDER BY seq DESC LIMIT $2",
                values![before, filter.limit],
            )
            .await?
        }
    };
    rows.iter().map(read).collect()
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
