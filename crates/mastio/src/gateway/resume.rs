//! Answers that outlive their connection: who loses it in the middle of a call reads on where it stopped, by
//! `Last-Event-ID` (MCP 2025-03-26 to 2025-11-25, resumability and redelivery).
//!
//! A stream that answers a session's request has a name, and each of its events a number. A task of its own takes what
//! is said and keeps it; whoever reads does so from a number on, and one reader takes over from another. What the reader
//! has behind it is kept as long as there is room. It is this process's alone, as sessions with servers are.
//!
//! Streams on which a session hears what happens outside its requests have no numbers: what was missed there is asked
//! for again.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use tokio::sync::watch;

use super::protocol::Revision;
use super::session::Session;
use crate::entropy::Entropy;

/// Streams that are kept in this process; one more is not.
const STREAMS_MAX: usize = 1024;
/// Of one session.
const STREAMS_PER_SESSION_MAX: usize = 32;
/// Events of one stream that are kept.
const EVENTS_MAX: usize = 256;
/// Bytes of one stream that are kept.
const STREAM_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of all streams that are kept.
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long a stream is kept that nobody reads and whose room is used up, and one that has come to its end.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// The streams that are kept.
pub struct Resumable {
    streams: Mutex<HashMap<String, Arc<Kept>>>,
    bytes: Arc<AtomicUsize>,
    kept_for: Duration,
}

impl Default for Resumable {
    fn default() -> Self {
        Self { streams: Mutex::default(), bytes: Arc::default(), kept_for: KEPT_FOR }
    }
}

/// One of them.
pub(super) struct Kept {
    id: String,
    session: String,
    state: Mutex<State>,
    /// Told whenever the state has changed.
    moved: watch::Sender<()>,
    /// Bytes of all streams.
    total: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    events: VecDeque<(u64, Bytes)>,
    next: u64,
    bytes: usize,
    ended: bool,
    /// Which reader reads; an earlier one has been taken over from.
    reader: u64,
    /// What the reader takes next.
    read_to: u64,
}

/// What a reader finds.
pub(super) enum Read {
    /// An event, as it goes over the wire.
    Event(Bytes),
    /// Nothing for so long.
    Silence,
}

/// Reads a stream from some number on.
pub(super) struct Reader {
    kept: Arc<Kept>,
    number: u64,
    position: u64,
}

/// Whether a stream of the session may be resumed.
#[must_use]
pub(super) fn is_resumable(session: &Session) -> bool {
    (Revision::V2025_03_26..=Revision::V2025_11_25).contains(&session.revision())
}

impl Resumable {
    /// Keeps a stream of `session`, and gives its first reader. Absent where there is no room for it.
    pub(super) fn keep(self: &Arc<Self>, session: &Session, entropy: &Entropy) -> Option<(Keeper, Reader)> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let of_session = streams.values().filter(|kept| kept.session == session.nonce).count();
        if streams.len() >= STREAMS_MAX || of_session >= STREAMS_PER_SESSION_MAX {
            return None;
        }
        let kept = Arc::new(Kept {
            id: entropy.text::<16>(),
            session: session.nonce.clone(),
            state: Mutex::default(),
            moved: watch::Sender::new(()),
            total: Arc::clone(&self.bytes),
        });
        streams.insert(kept.id.clone(), Arc::clone(&kept));
        let reader = Reader { kept: Arc::clone(&kept), number: 0, position: 0 };
        Some((Keeper { kept, of: Arc::clone(self) }, reader))
    }

    /// Takes over a stream of `session` after the event that `last_event_id` names. Absent where it is none, or not kept
    /// any more.
    pub(super) fn resume(&self, session: &Session, last_event_id: &str) -> Option<Reader> {
        let (id, number) = last_event_id.rsplit_once('.')?;
        let position = number.parse::<u64>().ok()?.checked_add(1)?;
        let kept = self.streams.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        let kept = kept.filter(|kept| kept.session == session.nonce)?;
        let number = {
            let mut state = kept.state();
            let first = state.events.front().map_or(state.next, |(number, _)| *number);
            if !(first..=state.next).contains(&position) {
                return None;
            }
            state.reader += 1;
            state.read_to = position;
            state.reader
        };
        kept.moved.send_replace(());
        Some(Reader { kept, number, position })
    }

    /// Forgets the streams of a session that has ended.
    pub(super) fn forget(&self, session: &str) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|_, kept| kept.session != session);
    }
}

impl Kept {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.total.fetch_sub(self.state().bytes, Ordering::Relaxed);
    }
}

/// Writes a stream, and lets go of it in the end.
pub(super) struct Keeper {
    kept: Arc<Kept>,
    of: Arc<Resumable>,
}

impl Keeper {
    /// Adds an event: `data` on one line. False: nobody reads, and there is no room.
    pub async fn push(&self, data: &[u8]) -> bool {
        let kept = &self.kept;
        let mut moved = kept.moved.subscribe();
        loop {
            moved.mark_unchanged();
            {
                let mut state = kept.state();
                let is_full = |state: &State| {
                    state.events.len() >= EVENTS_MAX
                        || state.bytes >= STREAM_BYTES_MAX
                        || kept.total.load(Ordering::Relaxed) >= BYTES_MAX
                };
                while is_full(&state)
                    && let Some((_, oldest)) =
                        state.events.front().filter(|(number, _)| *number < state.read_to)
                {
                    let bytes = oldest.len();
                    state.events.pop_front();
                    state.bytes -= bytes;
                    kept.total.fetch_sub(bytes, Ordering::Relaxed);
                }
                if state.events.is_empty() || !is_full(&state) {
                    let event = written(&kept.id, state.next, data);
                    state.bytes += event.len();
                    kept.total.fetch_add(event.len(), Ordering::Relaxed);
                    let number = state.next;
                    state.events.push_back((number, event));
                    state.next += 1;
                    break;
                }
            }
            if tokio::time::timeout(self.of.kept_for, moved.changed()).await.is_err() {
                return false;
            }
        }
        kept.moved.send_replace(());
        true
    }

    /// Ends the stream. It can be read for a while yet.
    pub async fn end(self) {
        self.kept.state().ended = true;
        self.kept.moved.send_replace(());
        tokio::time::sleep(self.of.kept_for).await;
        self.of.streams.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.kept.id);
    }
}

impl Reader {
    /// What comes next. Nothing at the end, or where another reader has taken over.
    pub async fn next(&mut self, patience: Duration) -> Option<Read> {
        let kept = Arc::clone(&self.kept);
        let mut moved = kept.moved.subscribe();
        loop {
            moved.mark_unchanged();
            {
                let mut state = kept.state();
                if state.reader != self.number {
                    return None;
                }
                let found = state.events.iter().find(|(number, _)| *number >= self.position).cloned();
                if let Some((number, event)) = found {
                    self.position = number + 1;
                    state.read_to = self.position;
                    drop(state);
                    kept.moved.send_replace(());
                    return Some(Read::Event(event));
                }
                if state.ended {
                    return None;
                }
            }
            if tokio::time::timeout(patience, moved.changed()).await.is_err() {
                return Some(Read::Silence);
            }
        }
    }
}

/// An event with its id. Without data it only tells the id, so that there is one to resume from.
fn written(id: &str, number: u64, data: &[u8]) -> Bytes {
    let mut event = format!("id: {id}.{number}\n").into_bytes();
    if data.is_empty() {
        event.extend_from_slice(b"data:\n\n");
    } else {
        event.extend_from_slice(b"event: message\ndata: ");
        event.extend_from_slice(data);
        event.extend_from_slice(b"\n\n");
    }
    event.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn kept() -> (Arc<Resumable>, Session, Keeper, Reader) {
        let resumable = Arc::new(Resumable { kept_for: Duration::from_millis(50), ..Resumable::default() });
        let session = super::super::session::any();
        let (keeper, reader) = resumable.keep(&session, &Entropy::default()).unwrap();
        (resumable, session, keeper, reader)
    }

    async fn read(reader: &mut Reader) -> Option<String> {
        match reader.next(Duration::from_millis(10)).await? {
            Read::Event(event) => Some(String::from_utf8(event.to_vec()).unwrap()),
            Read::Silence => Some(String::new()),
        }
    }

    fn id_of(event: &str) -> &str {
        event.lines().next().unwrap().strip_prefix("id: ").unwrap()
    }

    #[tokio::test]
    async fn whoever_takes_over_reads_on_and_the_former_reader_is_done() {
        let (resumable, session, keeper, mut first) = kept();
        for data in [&b""[..], b"one", b"two", b"three"] {
            assert!(keeper.push(data).await);
        }
        let primed = read(&mut first).await.unwrap();
        assert!(primed.ends_with("\ndata:\n\n"), "{primed}");
        let one = read(&mut first).await.unwrap();
        assert!(one.ends_with("\nevent: message\ndata: one\n\n"), "{one}");
        for _ in 0..2 {
            let mut again = resumable.resume(&session, id_of(&one)).unwrap();
            assert!(read(&mut again).await.unwrap().contains("data: two"));
            assert!(read(&mut again).await.unwrap().contains("data: three"));
            assert_eq!(read(&mut again).await.unwrap(), "");
        }
        assert_eq!(read(&mut first).await, None);
        let stream = id_of(&one).rsplit_once('.').unwrap().0;
        for unknown in ["", "1", "x.1", ".", &format!("{stream}.4"), &format!("{stream}.-1"), stream] {
            assert!(resumable.resume(&session, unknown).is_none(), "{unknown}");
        }
        assert!(resumable.resume(&super::super::session::any(), id_of(&one)).is_none());
        let mut last = resumable.resume(&session, &format!("{stream}.3")).unwrap();
        let ending = tokio::spawn(keeper.end());
        while let Some(said) = read(&mut last).await {
            assert_eq!(said, "");
        }
        ending.await.unwrap();
        assert!(resumable.resume(&session, id_of(&one)).is_none());
        drop(last);
        drop(first);
        assert_eq!(resumable.bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_is_kept_has_bounds_and_what_was_read_makes_room() {
        let (resumable, session, keeper, mut reader) = kept();
        for _ in 0..EVENTS_MAX {
            assert!(keeper.push(b"x").await);
        }
        // Nobody reads: it waits for a while, and then it is over.
        assert!(!keeper.push(b"x").await);
        let first = read(&mut reader).await.unwrap();
        assert!(keeper.push(b"y").await);
        assert_eq!(keeper.kept.state().events.len(), EVENTS_MAX);
        // What had to make room is gone; after the next one on it can be resumed.
        let second = read(&mut reader).await.unwrap();
        assert!(keeper.push(b"z").await);
        assert!(resumable.resume(&session, id_of(&first)).is_none());
        assert!(resumable.resume(&session, id_of(&second)).is_some());

        let more: Vec<_> = (1..STREAMS_PER_SESSION_MAX)
            .map(|_| resumable.keep(&session, &Entropy::default()).unwrap())
            .collect();
        assert!(resumable.keep(&session, &Entropy::default()).is_none());
        resumable.forget(&session.nonce);
        assert!(resumable.keep(&session, &Entropy::default()).is_some());
        drop(more);

        // One message may be as large as it likes; then the reader has to take it first.
        let (_, _, keeper, mut reader) = kept();
        assert!(keeper.push(&vec![b'x'; STREAM_BYTES_MAX]).await);
        assert!(!keeper.push(b"x").await);
        read(&mut reader).await.unwrap();
        assert!(keeper.push(b"x").await);
    }
}
