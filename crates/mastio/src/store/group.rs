//! Grouped commits: requests that arrive together share one durable commit.
//!
//! A disk syncs a few hundred times a second, a mint takes a fifth of a millisecond. So the token path and the
//! gateway hand what they want recorded to one task, which takes everything that waits, writes it in a few
//! multi-row statements, commits once and only then answers each. Under the lock it refuses, one by one, what
//! carries an identifier that was used before (replay) or a permit of an epoch that has passed (I1). Where Redis is
//! configured, a request claims its identifiers there before it waits ([`super::claims`]).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mastio_core::audit::event::Event;
use mastio_core::time::UnixTime;
use tokio::sync::{mpsc, oneshot};

use super::claims::{ClaimError, Claims};
use super::ephemeral;
use super::{Store, StoreError, Value};
use crate::clock::Clock;

/// Requests that may wait for the next commit. One more is refused with 503.
const QUEUE_REQUESTS_MAX: usize = 4096;
/// Requests that share one commit.
const GROUP_REQUESTS_MAX: usize = 256;
/// Pause between two commits on SQLite, so that an operator's `sqlite3`, which does not wait, gets in.
const SQLITE_PAUSE: Duration = Duration::from_micros(500);
/// The longest pause. Where many wait, more of them share the next commit the longer it is.
const SQLITE_PAUSE_MAX: Duration = Duration::from_millis(3);
/// Requests in one commit from which on many wait.
const MANY_REQUESTS: usize = 4;

/// An identifier that may be used once.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OneUse {
    /// What the identifier is unique within, with the identifier itself: `dpop:<jkt>:<jti>`.
    pub id: String,
    /// When it may be forgotten.
    pub expires_at: UnixTime,
}

/// A part of a call that is kept, sealed. Written beside the event that speaks of it.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Names the call.
    pub evidence_id: String,
    /// `arguments` or `result`.
    pub part: &'static str,
    /// The tool.
    pub tool: String,
    /// Who called.
    pub agent_id: String,
    /// The request that made the call.
    pub request_id: String,
    /// When it was called.
    pub called_at: UnixTime,
    /// When it is deleted.
    pub expires_at: UnixTime,
    /// SHA-256 of the content, hex.
    pub digest: String,
    /// Bytes of the content.
    pub bytes: i64,
    /// The content.
    pub sealed: String,
}

/// What one request wants recorded.
#[derive(Debug, Clone, Default)]
pub struct Append {
    /// Events for the audit chain, in order.
    pub events: Vec<Event>,
    /// What the events speak of and is kept.
    pub kept: Vec<Kept>,
    /// Identifiers that this request uses up.
    pub one_use: Vec<OneUse>,
    /// `jti` of the access token that let this request in; one that is revoked by now refuses the request.
    pub access_token: Option<String>,
    /// The epoch under which something was signed or an identity was judged; a later one refuses the request.
    pub epoch: Option<i64>,
}

/// Why a request was not recorded. Nothing of it is in the database then.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// An identifier was used before.
    #[error("an identifier that may be used once was used before")]
    Replayed,
    /// The access token is revoked.
    #[error("the access token is revoked")]
    Revoked,
    /// The epoch has moved since the permit was given.
    #[error("the epoch has moved since the permit was given")]
    Stale,
    /// More requests wait than there is room for.
    #[error("more requests wait to be recorded than there is room for")]
    Busy,
    /// Redis is configured and away, so that a replay on another replica could not be ruled out.
    #[error("replay protection is not available")]
    Unguarded,
    /// The database did not commit.
    #[error("the audit log cannot be written")]
    Unavailable,
}

impl From<ClaimError> for AppendError {
    fn from(error: ClaimError) -> Self {
        match error {
            ClaimError::Taken => Self::Replayed,
            ClaimError::Away => Self::Unguarded,
        }
    }
}

/// Told of every group that did not commit.
pub type OnFailure = Box<dyn Fn() + Send + Sync>;

type Reply = oneshot::Sender<Result<i64, AppendError>>;

/// The task that commits, seen from the requests. Cheap to clone.
#[derive(Clone)]
pub struct Journal {
    sender: mpsc::Sender<(Append, Reply)>,
    clock: Arc<dyn Clock>,
    claims: Option<Claims>,
}

impl Journal {
    /// Starts the task. It ends when every [`Journal`] is gone and everything waiting is durable.
    #[must_use]
    pub fn start(store: Store, on_failure: OnFailure) -> (Self, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE_REQUESTS_MAX);
        let journal = Self { sender, clock: Arc::clone(store.clock()), claims: None };
        (journal, tokio::spawn(run(store, on_failure, receiver)))
    }

    /// The same journal, which claims identifiers in Redis before it burns them.
    #[must_use]
    pub fn with_claims(self, claims: Option<Claims>) -> Self {
        Self { claims, ..self }
    }

    /// Records `append` durably and gives the chain's sequence number after it.
    ///
    /// Errors: [`AppendError`]; nothing of `append` was recorded then.
    pub async fn append(&self, append: Append) -> Result<i64, AppendError> {
        let Some(claims) = self.claims.as_ref().filter(|_| !append.one_use.is_empty()) else {
            return self.record(append).await;
        };
        let one_use = append.one_use.clone();
        claims.claim(&one_use, self.clock.now().seconds()).await?;
        let recorded = self.record(append).await;
        if recorded.is_err() {
            // Before the answer: a stale request comes again with the same identifiers.
            claims.release(one_use.iter()).await;
        }
        recorded
    }

    async fn record(&self, append: Append) -> Result<i64, AppendError> {
        let (reply, answer) = oneshot::channel();
        self.sender.try_send((append, reply)).map_err(|_| AppendError::Busy)?;
        answer.await.unwrap_or(Err(AppendError::Unavailable))
    }
}

async fn run(store: Store, on_failure: OnFailure, mut receiver: mpsc::Receiver<(Append, Reply)>) {
    let mut group = Vec::with_capacity(GROUP_REQUESTS_MAX);
    while receiver.recv_many(&mut group, GROUP_REQUESTS_MAX).await > 0 {
        let (requests, replies): (Vec<_>, Vec<_>) = group.drain(..).unzip();
        let (began, many) = (Instant::now(), requests.len() >= MANY_REQUESTS);
        match commit(&store, requests).await {
            Ok(outcomes) => {
                for (reply, outcome) in replies.into_iter().zip(outcomes) {
                    // A caller that went away does not need its answer.
                    let _gone = reply.send(outcome);
                }
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "audit_append_failed");
                on_failure();
                for reply in replies {
                    let _gone = reply.send(Err(AppendError::Unavailable));
                }
            }
        }
        // Where nobody waits, the lock is free until somebody comes.
        if store.sqlite_path().is_some() && (many || !receiver.is_empty()) {
            // As long as the commit took: half of the time belongs to others, and what arrives meanwhile shares the next.
            let pause =
                if many { began.elapsed().clamp(SQLITE_PAUSE, SQLITE_PAUSE_MAX) } else { SQLITE_PAUSE };
            tokio::time::sleep(pause).await;
        }
    }
}

async fn commit(store: &Store, requests: Vec<Append>) -> Result<Vec<Result<i64, AppendError>>, StoreError> {
    let (mut tx, mut outcomes) = judge(store, &requests).await?;
    if !burn(&mut tx, &requests, &outcomes).await? {
        // Somebody comes again: once more from the beginning, asking of each identifier whether it is new.
        drop(tx);
        (tx, outcomes) = judge(store, &requests).await?;
        burn_one_by_one(&mut tx, &requests, &mut outcomes).await?;
    }
    let kept = requests.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_ok());
    let kept: Vec<Vec<Value>> = kept.flat_map(|(append, _)| &append.kept).map(kept_row).collect();
    tx.insert_many(
        "mcp_evidence (part_id, evidence_id, part, tool, agent_id, request_id, called_at, expires_at, digest, bytes, \
         sealed)",
        &kept,
        "",
    )
    .await?;
    let events: Vec<Event> = requests
        .into_iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| outcome.is_ok())
        .flat_map(|(append, _)| append.events)
        .collect();
    let committed = tx.commit(&events).await?;
    for outcome in outcomes.iter_mut().flatten() {
        *outcome = committed.sequence;
    }
    Ok(outcomes)
}

fn kept_row(kept: &Kept) -> Vec<Value> {
    vec![
        Value::from(format!("{}/{}", kept.evidence_id, kept.part)),
        Value::from(&kept.evidence_id),
        Value::from(kept.part),
        Value::from(&kept.tool),
        Value::from(&kept.agent_id),
        Value::from(&kept.request_id),
        Value::from(kept.called_at.0),
        Value::from(kept.expires_at.0),
        Value::from(&kept.digest),
        Value::from(kept.bytes),
        Value::from(&kept.sealed),
    ]
}

/// Takes the lock and refuses what is stale, revoked, or comes twice in this group.
async fn judge(
    store: &Store,
    requests: &[Append],
) -> Result<(super::WriteTx, Vec<Result<i64, AppendError>>), StoreError> {
    let mut tx = store.write().await?;
    let stale = |append: &Append| append.epoch.is_some_and(|epoch| epoch != tx.epoch());
    let mut outcomes: Vec<Result<i64, AppendError>> =
        requests.iter().map(|append| if stale(append) { Err(AppendError::Stale) } else { Ok(0) }).collect();
    refuse_revoked(&mut tx, requests, &mut outcomes).await?;
    // Two requests of one group may carry the same identifier: the first in line has it.
    let mut seen = HashSet::new();
    for (append, outcome) in requests.iter().zip(&mut outcomes) {
        if outcome.is_ok() && append.one_use.iter().any(|one_use| seen.contains(one_use.id.as_str())) {
            *outcome = Err(AppendError::Replayed);
        } else if outcome.is_ok() {
            seen.extend(append.one_use.iter().map(|one_use| one_use.id.as_str()));
        }
    }
    Ok((tx, outcomes))
}

/// Refuses the requests whose access token is revoked. Asked in the transaction that records them, so that a revocation
/// bites on the next request of every replica.
async fn refuse_revoked(
    tx: &mut super::WriteTx,
    requests: &[Append],
    outcomes: &mut [Result<i64, AppendError>],
) -> Result<(), StoreError> {
    let carried: Vec<&str> = requests
        .iter()
        .zip(outcomes.iter())
        .filter(|(_, outcome)| outcome.is_ok())
        .filter_map(|(append, _)| append.access_token.as_deref())
        .collect();
    let revoked = ephemeral::revoked_among(tx, &carried).await?;
    if !revoked.is_empty() {
        for (append, outcome) in requests.iter().zip(outcomes) {
            if append.access_token.as_ref().is_some_and(|token| revoked.contains(token)) && outcome.is_ok() {
                *outcome = Err(AppendError::Revoked);
            }
        }
    }
    Ok(())
}

fn identifiers<'a>(
    requests: &'a [Append],
    outcomes: &'a [Result<i64, AppendError>],
) -> impl Iterator<Item = Vec<Value>> + 'a {
    requests
        .iter()
        .zip(outcomes)
        .filter(|(_, outcome)| outcome.is_ok())
        .flat_map(|(append, _)| &append.one_use)
        .map(|one_use| vec![Value::from(&one_use.id), Value::from(one_use.expires_at.0)])
}

const IDENTIFIERS: &str = "used_jwt_ids (jwt_id, expires_at)";

/// Writes the identifiers. False: one of them is there already, and which of the others were new nobody knows.
async fn burn(
    tx: &mut super::WriteTx,
    requests: &[Append],
    outcomes: &[Result<i64, AppendError>],
) -> Result<bool, StoreError> {
    let rows: Vec<_> = identifiers(requests, outcomes).collect();
    let written = tx.insert_many(IDENTIFIERS, &rows, "ON CONFLICT (jwt_id) DO NOTHING").await?;
    Ok(usize::try_from(written).is_ok_and(|written| written == rows.len()))
}

/// Writes the identifiers that are new, and refuses the requests of the others.
async fn burn_one_by_one(
    tx: &mut super::WriteTx,
    requests: &[Append],
    outcomes: &mut [Result<i64, AppendError>],
) -> Result<(), StoreError> {
    let rows: Vec<_> = identifiers(requests, outcomes).collect();
    let conflict = "ON CONFLICT (jwt_id) DO NOTHING RETURNING jwt_id";
    let written = tx.insert_many_returning(IDENTIFIERS, &rows, conflict).await?;
    let burnt: HashSet<String> = written.iter().map(|row| row.text(0)).collect::<Result<_, _>>()?;
    for (append, outcome) in requests.iter().zip(outcomes) {
        if outcome.is_ok() && append.one_use.iter().any(|one_use| !burnt.contains(&one_use.id)) {
            *outcome = Err(AppendError::Replayed);
            // The refused request leaves no trace: what it did burn is whole again.
            for one_use in append.one_use.iter().filter(|one_use| burnt.contains(&one_use.id)) {
                tx.execute("DELETE FROM used_jwt_ids WHERE jwt_id = $1", crate::values![&one_use.id]).await?;
            }
        }
    }
    Ok(())
}
