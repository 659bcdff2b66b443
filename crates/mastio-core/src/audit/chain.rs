//! Links events into a chain, and verifies one.
//!
//! **The exact bytes.** The hash of a row is the lowercase hex of SHA-256 over two things without a
//! separator: the 64 ASCII characters of `prev_hash`, then the UTF-8 of the RFC 8785 canonical JSON of the
//! row without `hash`:
//!
//! ```json
//! {"actor":"admin","details":{"agent":"acme::a"},"event_type":"agent.created","id":"01JZ…","prev_hash":"00…","seq":1,"timestamp":"2026-04-23T19:08:12.000417Z"}
//! ```
//!
//! `details` stands in it as the JSON object, not as text. The first row has `seq` 1 and a `prev_hash` of 64
//! zeros. Anyone can verify that with a SHA-256 and a JSON library.
//!
//! A chain shows changes inside it. That its end was cut off, only something outside can show: a head that
//! was signed or noted earlier ([`Verifier::finish`]).

use super::event::Event;
use crate::{
    json::{self, JsonError},
    time::UnixMicros,
    x509::sha256_hex,
};

/// The `prev_hash` of the first row.
pub const GENESIS_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The end of a chain: what the next row is linked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The last row's `seq`; 0 before the first row.
    pub sequence: i64,
    /// The last row's `hash`; [`GENESIS_HASH`] before the first row.
    pub hash: String,
}

impl Head {
    /// The head of the empty chain.
    #[must_use]
    pub fn genesis() -> Self {
        Self { sequence: 0, hash: GENESIS_HASH.to_owned() }
    }
}

impl From<&ChainedEvent> for Head {
    fn from(row: &ChainedEvent) -> Self {
        Self { sequence: row.seq, hash: row.hash.clone() }
    }
}

/// One row of the chain, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainedEvent {
    /// The place in the chain, from 1, without gaps.
    pub seq: i64,
    /// A ULID, 26 characters.
    pub id: String,
    /// RFC 3339 with six digits of fraction.
    pub timestamp: String,
    /// The name of the type of event.
    pub event_type: String,
    /// Who did it.
    pub actor: String,
    /// The details: canonical JSON text of an object.
    pub details: String,
    /// The `hash` of the row before.
    pub prev_hash: String,
    /// This row's hash, 64 lowercase hex digits.
    pub hash: String,
}

/// Links an event to the head and gives the row to store.
///
/// Shape: `id` is a ULID of the caller's.
/// Errors: [`JsonError::NotAnObject`] if the details are no object; [`JsonError::Float`] and
/// [`JsonError::IntegerRange`] if they hold what has no canonical form.
pub fn link(head: &Head, id: &str, timestamp: UnixMicros, event: &Event) -> Result<ChainedEvent, JsonError> {
    if !event.details.is_object() {
        return Err(JsonError::NotAnObject);
    }
    let seq = head.sequence.saturating_add(1);
    if !(1..=json::INTEGER_MAX).contains(&seq) {
        return Err(JsonError::IntegerRange);
    }
    let mut row = ChainedEvent {
        seq,
        id: id.to_owned(),
        timestamp: timestamp.to_rfc3339(),
        event_type: event.event_type.as_str().to_owned(),
        actor: event.actor.clone(),
        details: json::canonical(&event.details)?,
        prev_hash: head.hash.clone(),
        hash: String::new(),
    };
    row.hash = hash(&row);
    Ok(row)
}

/// The hash of a row whose details are canonical.
fn hash(row: &ChainedEvent) -> String {
    // Written member by member in canonical order: the details are canonical already, and reading them
    // back to write them again would double the cost of every append.
    let mut text = String::with_capacity(row.details.len() + 512);
    text.push_str(&row.prev_hash);
    text.push_str("{\"actor\":");
    json::write_string(&mut text, &row.actor);
    text.push_str(",\"details\":");
    text.push_str(&row.details);
    text.push_str(",\"event_type\":");
    json::write_string(&mut text, &row.event_type);
    text.push_str(",\"id\":");
    json::write_string(&mut text, &row.id);
    text.push_str(",\"prev_hash\":");
    json::write_string(&mut text, &row.prev_hash);
    text.push_str(",\"seq\":");
    text.push_str(&row.seq.to_string());
    text.push_str(",\"timestamp\":");
    json::write_string(&mut text, &row.timestamp);
    text.push('}');
    sha256_hex(text.as_bytes())
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// Rows are missing before this one.
    #[error("rows are missing before it: expected seq {expected}")]
    Gap {
        /// The `seq` that should have come.
        expected: i64,
    },
    /// The row's `seq` was passed already: it is repeated or out of order.
    #[error("it is repeated or out of order: expected seq {expected}")]
    Order {
        /// The `seq` that should have come.
        expected: i64,
    },
    /// The row is not linked to the row before.
    #[error("its prev_hash is not the hash of the row before")]
    PreviousHash,
    /// The row's content is not what was hashed.
    #[error("its hash is not the hash of its content")]
    Hash,
    /// The details are not the canonical JSON of an object.
    #[error("its details are not canonical json")]
    Malformed,
    /// The chain ends elsewhere than expected: rows were cut off, or replaced.
    #[error("the chain ends there, and not at seq {expected}")]
    Head {
        /// The `seq` of the expected head.
        expected: i64,
    },
}

/// Where a chain breaks, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("audit row {seq} breaks the chain: {fault}")]
pub struct ChainBreak {
    /// The row's `seq`.
    pub seq: i64,
    /// The row's id. Empty where no row is at fault, but the end of the chain.
    pub id: String,
    /// What is wrong with it.
    pub fault: ChainFault,
}

impl ChainBreak {
    /// The stable name of the fault, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.fault {
            ChainFault::Gap { .. } => "chain_gap",
            ChainFault::Order { .. } => "chain_order",
            ChainFault::PreviousHash => "chain_prev_hash",
            ChainFault::Hash => "chain_hash",
            ChainFault::Malformed => "chain_malformed",
            ChainFault::Head { .. } => "chain_head",
        }
    }
}

/// Verifies a chain row by row, in constant memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verifier {
    head: Head,
}

impl Default for Verifier {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Head> for Verifier {
    /// Goes on from a head that is trusted already.
    fn from(head: Head) -> Self {
        Self { head }
    }
}

impl Verifier {
    /// Starts before the first row.
    #[must_use]
    pub fn new() -> Self {
        Self { head: Head::genesis() }
    }

    /// Takes the next row.
    ///
    /// Errors: [`ChainBreak`]; the head then stays where it was.
    pub fn push(&mut self, row: &ChainedEvent) -> Result<(), ChainBreak> {
        let broken = |fault| Err(ChainBreak { seq: row.seq, id: row.id.clone(), fault });
        let expected = self.head.sequence.saturating_add(1);
        if row.seq > expected {
            return broken(ChainFault::Gap { expected });
        }
        if row.seq < expected {
            return broken(ChainFault::Order { expected });
        }
        if row.prev_hash != self.head.hash {
            return broken(ChainFault::PreviousHash);
        }
        // Without this, text that is not JSON could be spliced so that two rows hash the same bytes.
        let canonical = json::parse(row.details.as_bytes())
            .ok()
            .filter(serde_json::Value::is_object)
            .and_then(|details| json::canonical(&details).ok());
        if canonical.as_deref() != Some(row.details.as_str()) {
            return broken(ChainFault::Malformed);
        }
        if row.hash != hash(row) {
            return broken(ChainFault::Hash);
        }
        self.head = Head::from(row);
        Ok(())
    }

    /// The head after the last good row.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Ends the verification at a head known from elsewhere.
    ///
    /// Errors: [`ChainFault::Head`] if the chain ended at another row, or at the same `seq` with another hash.
    pub fn finish(self, expected: &Head) -> Result<(), ChainBreak> {
        if self.head == *expected {
            return Ok(());
        }
        Err(ChainBreak {
            seq: self.head.sequence,
            id: String::new(),
            fault: ChainFault::Head { expected: expected.sequence },
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use serde_json::{Value, json};

    use super::*;
    use crate::audit::event::EventType;

    const ID: &str = "01JZ0000000000000000000000";

    fn event(details: Value) -> Event {
        Event { event_type: EventType::AgentCreated, actor: "admin".to_owned(), details }
    }

    fn chain(length: i64) -> Vec<ChainedEvent> {
        let mut head = Head::genesis();
        (1..=length)
            .map(|number| {
                let event = event(json!({"agent": format!("acme::agent-{number}"), "count": number}));
                let row = link(&head, ID, UnixMicros(1_776_971_061_000_417 + number), &event).unwrap();
                head = Head::from(&row);
                row
            })
            .collect()
    }

    fn verify(rows: &[ChainedEvent]) -> Result<Head, ChainBreak> {
        let mut verifier = Verifier::new();
        for row in rows {
            verifier.push(row)?;
        }
        Ok(verifier.head().clone())
    }

    #[test]
    fn the_hash_is_over_the_documented_bytes() {
        let row =
            link(&Head::genesis(), ID, UnixMicros(1_776_971_061_000_417), &event(json!({"b": "ö", "a": 1})))
                .unwrap();
        let whole = json!({
            "seq": 1, "id": ID, "timestamp": "2026-04-23T19:04:21.000417Z", "event_type": "agent.created",
            "actor": "admin", "details": {"a": 1, "b": "ö"}, "prev_hash": GENESIS_HASH,
        });
        let bytes = format!("{GENESIS_HASH}{}", json::canonical(&whole).unwrap());
        assert_eq!(row.hash, sha256_hex(bytes.as_bytes()));
        assert_eq!(row.details, r#"{"a":1,"b":"ö"}"#);
        assert_eq!(row.prev_hash, GENESIS_HASH);
        // Computed once with Python's hashlib and json: pinned, because stored chains depend on it.
        assert_eq!(row.hash, "7e630b200ad0948a5257d6d279355783d4bcc6a4d6a3681c822d97108be78cd0");
    }

    #[test]
    fn a_chain_verifies_from_its_beginning_and_from_any_known_head() {
        let rows = chain(5);
        let head = verify(&rows).unwrap();
        assert_eq!(head, Head::from(&rows[4]));
        let mut verifier = Verifier::from(Head::from(&rows[1]));
        for row in &rows[2..] {
            verifier.push(row).unwrap();
        }
        assert_eq!(verifier.finish(&head), Ok(()));
        assert_eq!(verify(&[]), Ok(Head::genesis()));
    }

    #[test]
    fn every_changed_field_of_every_row_is_found() {
        type Change = fn(&mut ChainedEvent);
        let changes: [(&str, Change, &str); 9] = [
            ("id", |row| row.id = "01JZ0000000000000000000001".to_owned(), "chain_hash"),
            ("timestamp", |row| row.timestamp.replace_range(3..4, "7"), "chain_hash"),
            ("event_type", |row| row.event_type = "agent.deleted".to_owned(), "chain_hash"),
            ("actor", |row| row.actor.push('x'), "chain_hash"),
            ("details", |row| row.details = row.details.replace("acme", "acne"), "chain_hash"),
            ("details' spelling", |row| row.details.push(' '), "chain_malformed"),
            ("details no object", |row| row.details = "[]".to_owned(), "chain_malformed"),
            ("prev_hash", |row| row.prev_hash.replace_range(0..1, "g"), "chain_prev_hash"),
            ("hash", |row| row.hash.make_ascii_uppercase(), "chain_hash"),
        ];
        for (name, change, reason) in changes {
            for position in 0..5 {
                let mut rows = chain(5);
                change(&mut rows[position]);
                let broken = verify(&rows).unwrap_err();
                assert_eq!((broken.seq, broken.reason()), (rows[position].seq, reason), "{name}");
            }
        }
    }

    #[test]
    fn a_row_that_was_changed_and_hashed_anew_breaks_the_next() {
        let mut rows = chain(3);
        rows[1].actor = "mallory".to_owned();
        rows[1].hash = hash(&rows[1]);
        let broken = verify(&rows).unwrap_err();
        assert_eq!((broken.seq, broken.fault), (3, ChainFault::PreviousHash));
    }

    #[test]
    fn members_cannot_be_smuggled_from_one_field_into_another() {
        let mut rows = chain(1);
        // The same hashed bytes, were details taken as text without reading it.
        rows[0].details = format!(r#"{},"event_type":"agent.deleted""#, rows[0].details);
        assert_eq!(verify(&rows).unwrap_err().fault, ChainFault::Malformed);
    }

    #[test]
    fn deleted_repeated_reordered_and_inserted_rows_are_found() {
        let rows = chain(5);
        let deleted = [&rows[..2], &rows[3..]].concat();
        assert_eq!(verify(&deleted).unwrap_err().fault, ChainFault::Gap { expected: 3 });
        assert_eq!(verify(&rows[1..]).unwrap_err().fault, ChainFault::Gap { expected: 1 });
        let cut_in_the_middle = [&rows[..1], &rows[4..]].concat();
        assert_eq!(verify(&cut_in_the_middle).unwrap_err().fault, ChainFault::Gap { expected: 2 });
        let repeated = [&rows[..2], &rows[1..]].concat();
        assert_eq!(verify(&repeated).unwrap_err().fault, ChainFault::Order { expected: 3 });
        let mut reordered = rows.clone();
        reordered.swap(1, 2);
        assert_eq!(verify(&reordered).unwrap_err().fault, ChainFault::Gap { expected: 2 });
        let mut renumbered = reordered;
        renumbered[1].seq = 2;
        renumbered[2].seq = 3;
        assert_eq!(verify(&renumbered).unwrap_err().fault, ChainFault::PreviousHash);
        let stranger = link(&Head::from(&rows[1]), ID, UnixMicros(0), &event(json!({}))).unwrap();
        let inserted = [&rows[..2], &[stranger], &rows[2..]].concat();
        assert_eq!(verify(&inserted).unwrap_err().fault, ChainFault::Order { expected: 4 });
    }

    #[test]
    fn a_chain_cut_off_at_its_end_is_found_by_a_head_known_from_elsewhere() {
        let rows = chain(5);
        let head = Head::from(&rows[4]);
        let mut verifier = Verifier::new();
        for row in &rows[..4] {
            verifier.push(row).unwrap();
        }
        let broken = verifier.finish(&head).unwrap_err();
        assert_eq!((broken.seq, broken.fault), (4, ChainFault::Head { expected: 5 }));
    }

    #[test]
    fn a_broken_row_does_not_move_the_head() {
        let rows = chain(3);
        let mut verifier = Verifier::new();
        verifier.push(&rows[0]).unwrap();
        let before = verifier.clone();
        assert!(verifier.push(&rows[2]).is_err());
        assert_eq!(verifier, before);
        assert!(verifier.push(&rows[1]).is_ok());
    }

    #[test]
    fn what_has_no_canonical_form_is_not_linked() {
        for (details, error) in [
            (json!([]), JsonError::NotAnObject),
            (json!("text"), JsonError::NotAnObject),
            (json!({"ratio": 0.5}), JsonError::Float),
            (json!({"count": u64::MAX}), JsonError::IntegerRange),
        ] {
            assert_eq!(link(&Head::genesis(), ID, UnixMicros(0), &event(details)), Err(error));
        }
        let full = Head { sequence: i64::MAX, hash: GENESIS_HASH.to_owned() };
        assert_eq!(link(&full, ID, UnixMicros(0), &event(json!({}))), Err(JsonError::IntegerRange));
    }
}
