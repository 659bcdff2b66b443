//! The audit log as its readers see it: the head, a filtered list, and a verification of the whole chain.
//!
//! Appending is the business of `store/tx.rs`: an event and what it records commit together.

pub mod http;
mod store;

use mastio_core::audit::chain::{ChainBreak, ChainedEvent, Head, Verifier};
use mastio_core::audit::event::EventType;
use serde_json::{Value, json};

use crate::store::{Store, StoreError};

/// Rows that one page of the list has at most.
pub const LIST_ROWS_MAX: i64 = 10_000;
/// Rows that a verification holds in memory at once.
const VERIFY_ROWS: i64 = 2048;

/// What a list is filtered by.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only events of this type.
    pub event_type: Option<String>,
    /// Only events about this agent, or else by this actor.
    pub subject: Option<String>,
    /// Only events before this sequence number: the key of the next page.
    pub before: Option<i64>,
    /// Only events after this sequence number: what a reader who follows has not seen.
    pub after: Option<i64>,
    /// Rows at most.
    pub limit: i64,
}

/// One event between its neighbours.
#[derive(Debug)]
pub struct Placed {
    /// The event, as [`list`] shows it.
    pub event: Value,
    /// Whether its hash is the hash of its content, and its neighbours follow from one another.
    pub link: Result<(), ChainBreak>,
    /// Sequence number of the event before it.
    pub before: Option<i64>,
    /// Sequence number of the event after it.
    pub after: Option<i64>,
}

/// The event of this sequence number. `None`: there is none.
pub async fn event(store: &Store, seq: i64) -> Result<Option<Placed>, StoreError> {
    let rows = store::page_forward(&mut store.read().await?, seq.saturating_sub(2), 3).await?;
    let at = |wanted: Option<i64>| rows.iter().find(|row| Some(row.seq) == wanted);
    let Some(row) = at(Some(seq)) else { return Ok(None) };
    let (before, after) = (at(seq.checked_sub(1)), at(seq.checked_add(1)));
    // Without the row before, the gap that it leaves is what is found.
    let mut verifier = before.map_or_else(Verifier::new, |row| Verifier::from(Head::from(row)));
    let link = verifier.push(row).and_then(|()| after.map_or(Ok(()), |after| verifier.push(after)));
    Ok(Some(Placed {
        event: shown(row),
        link,
        before: before.map(|row| row.seq),
        after: after.map(|row| row.seq),
    }))
}

/// Events, newest first.
pub async fn list(store: &Store, filter: &Filter) -> Result<Vec<Value>, StoreError> {
    let mut tx = store.read().await?;
    let rows = store::page(&mut tx, filter).await?;
    Ok(rows.iter().map(shown).collect())
}

fn shown(row: &ChainedEvent) -> Value {
    let details: Value = serde_json::from_str(&row.details).unwrap_or(Value::Null);
    json!({
        "seq": row.seq, "id": row.id, "timestamp": row.timestamp, "event_type": row.event_type,
        "actor": row.actor, "details": details, "prev_hash": row.prev_hash, "hash": row.hash,
    })
}

/// The sequence number of the newest event.
pub async fn newest(store: &Store) -> Result<i64, StoreError> {
    Ok(store::head(&mut store.read().await?).await?.sequence)
}

/// What a verification found.
#[derive(Debug)]
pub enum Verdict {
    /// Every row follows from the one before, and the last one is the head.
    Sound(Head),
    /// The first row that does not.
    Broken(ChainBreak),
}

impl Verdict {
    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Sound(head) => json!({ "sound": true, "sequence": head.sequence, "hash": head.hash }),
            Self::Broken(found) => json!({ "sound": false, "reason": found.to_string() }),
        }
    }
}

/// Verifies the chain from its beginning to the head, with bounded memory.
pub async fn verify(store: &Store) -> Result<Verdict, StoreError> {
    verify_from(store, Head::genesis()).await
}

/// Verifies what was appended from the event `seq` on, which is trusted, to the head.
pub async fn verify_since(store: &Store, seq: i64) -> Result<Verdict, StoreError> {
    let base = store::page_forward(&mut store.read().await?, seq - 1, 1).await?;
    verify_from(store, base.first().map_or_else(Head::genesis, Head::from)).await
}

/// Sequence number of the event of this type about a run, among the latest of the type.
pub async fn event_of_run(
    store: &Store,
    event_type: EventType,
    run_id: &str,
) -> Result<Option<i64>, StoreError> {
    /// Runs come one at a time: the one that is asked about is the last or near it.
    const LATEST: i64 = 16;
    let filter =
        Filter { event_type: Some(event_type.as_str().to_owned()), limit: LATEST, ..Filter::default() };
    let rows = store::page(&mut store.read().await?, &filter).await?;
    let of_run = |details: &str| {
        serde_json::from_str::<Value>(details).is_ok_and(|details| details["run_id"] == run_id)
    };
    Ok(rows.iter().find(|row| of_run(&row.details)).map(|row| row.seq))
}

async fn verify_from(store: &Store, trusted: Head) -> Result<Verdict, StoreError> {
    let mut tx = store.read().await?;
    let expected = store::head(&mut tx).await?;
    let mut after = trusted.sequence;
    let mut verifier = Verifier::from(trusted);
    loop {
        let rows = store::page_forward(&mut tx, after, VERIFY_ROWS).await?;
        let Some(last) = rows.last() else { break };
        after = last.seq;
        for row in &rows {
            if let Err(broken) = verifier.push(row) {
                return Ok(Verdict::Broken(broken));
            }
        }
    }
    let head = verifier.head().clone();
    match verifier.finish(&expected) {
        Ok(()) => Ok(Verdict::Sound(head)),
        Err(broken) => Ok(Verdict::Broken(broken)),
    }
}
