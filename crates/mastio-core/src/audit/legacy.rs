//! The predecessor's two audit chains, `audit_log` and `local_audit`, verified by their own rules.
//!
//! Both hash fields joined by `|`, with nothing for NULL. That is weaker than our chain: a `|` inside a field
//! may be moved to its neighbor without changing the hash. So a good verdict says that the rows are as the
//! predecessor would accept them; from adoption on, our chain holds the head that was found here.
//!
//! Rows whose `chain_seq` is NULL lie outside the chain. They are counted and not verified, because there
//! is nothing to verify them by: the predecessor wrote the approval of enrollments that way.

use std::collections::BTreeMap;

use crate::x509::sha256_hex;

/// What stands for the hash before the first row.
const LEGACY_GENESIS: &str = "genesis";

/// One row of `audit_log`. `None` is NULL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditLogRow {
    /// The primary key.
    pub id: i64,
    /// As stored.
    pub timestamp: Option<String>,
    /// The actor.
    pub agent_id: Option<String>,
    /// What was done.
    pub action: Option<String>,
    /// The tool, for tool calls.
    pub tool_name: Option<String>,
    /// `success`, `failure` and others.
    pub status: Option<String>,
    /// Free text.
    pub detail: Option<String>,
    /// The HTTP request.
    pub request_id: Option<String>,
    /// The place in the chain, from 1. `None`: outside the chain.
    pub chain_seq: Option<i64>,
    /// The hash of the row before, or `genesis`.
    pub prev_hash: Option<String>,
    /// This row's hash.
    pub row_hash: Option<String>,
    /// In the hash for format `v2` only.
    pub dpop_jkt: Option<String>,
    /// In the hash for format `v2` only.
    pub on_behalf_of_user_id: Option<String>,
    /// `v1`, `v2`, or `None` for `v1`.
    pub hash_format: Option<String>,
}

/// One row of `local_audit`. `None` is NULL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalAuditRow {
    /// The primary key.
    pub id: i64,
    /// As stored.
    pub timestamp: Option<String>,
    /// The actor.
    pub agent_id: Option<String>,
    /// What was done.
    pub event_type: Option<String>,
    /// JSON text.
    pub details: Option<String>,
    /// The hash of this org's row before; `None` for the first.
    pub previous_hash: Option<String>,
    /// This row's hash.
    pub entry_hash: Option<String>,
    /// The session.
    pub session_id: Option<String>,
    /// Whose chain the row is in.
    pub org_id: Option<String>,
    /// `ok`, `denied` or `error`.
    pub result: Option<String>,
    /// The place in the org's chain, from 1. `None`: outside the chain.
    pub chain_seq: Option<i64>,
    /// The other org of a cross-org event.
    pub peer_org_id: Option<String>,
    /// `v1`, `v2`, or `None` for `v1`.
    pub hash_format: Option<String>,
}

/// The last row of a legacy chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyHead {
    /// Its `chain_seq`.
    pub sequence: i64,
    /// Its hash.
    pub hash: String,
}

/// What is wrong with a legacy row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LegacyFault {
    /// Rows are missing before this one.
    #[error("rows are missing before it: expected chain_seq {expected}")]
    Gap {
        /// The `chain_seq` that should have come.
        expected: i64,
    },
    /// The row's `chain_seq` was passed already.
    #[error("it is repeated or out of order: expected chain_seq {expected}")]
    Order {
        /// The `chain_seq` that should have come.
        expected: i64,
    },
    /// The row is not linked to the row before.
    #[error("its link is not the hash of the row before")]
    PreviousHash,
    /// The row's content is not what was hashed.
    #[error("its hash is not the hash of its content")]
    Hash,
    /// The row names a hash format that never existed.
    #[error("its hash_format is neither v1 nor v2")]
    Format,
}

/// Where a legacy chain breaks, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table} row id {id}, chain_seq {chain_seq}, breaks the chain: {fault}")]
pub struct LegacyBreak {
    /// `audit_log` or `local_audit`.
    pub table: &'static str,
    /// The row's primary key.
    pub id: i64,
    /// The row's place in the chain.
    pub chain_seq: i64,
    /// What is wrong with it.
    pub fault: LegacyFault,
}

impl LegacyBreak {
    /// The stable name of the fault, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.fault {
            LegacyFault::Gap { .. } => "legacy_chain_gap",
            LegacyFault::Order { .. } => "legacy_chain_order",
            LegacyFault::PreviousHash => "legacy_chain_prev_hash",
            LegacyFault::Hash => "legacy_chain_hash",
            LegacyFault::Format => "legacy_chain_format",
        }
    }
}

/// Whether a row was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// The row is in the chain, and good.
    Chained,
    /// The row has no `chain_seq`; nothing is known about it.
    Outside,
}

/// Verifies `audit_log` row by row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditLogVerifier {
    head: Option<LegacyHead>,
    outside: u64,
}

impl AuditLogVerifier {
    /// Starts before the first row.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next row, in the order of `chain_seq`; rows without one may come at any place.
    ///
    /// Errors: [`LegacyBreak`]; the head then stays where it was.
    pub fn push(&mut self, row: &AuditLogRow) -> Result<Membership, LegacyBreak> {
        let Some(chain_seq) = row.chain_seq else {
            self.outside += 1;
            return Ok(Membership::Outside);
        };
        let broken = |fault| LegacyBreak { table: "audit_log", id: row.id, chain_seq, fault };
        follows(self.head.as_ref(), chain_seq).map_err(broken)?;
        let expected = self.head.as_ref().map_or(LEGACY_GENESIS, |head| head.hash.as_str());
        if row.prev_hash.as_deref() != Some(expected) {
            return Err(broken(LegacyFault::PreviousHash));
        }
        let chain_seq_text = chain_seq.to_string();
        let mut fields = vec![
            chain_seq_text.as_str(),
            text(&row.timestamp),
            text(&row.agent_id),
            text(&row.action),
            text(&row.tool_name),
            text(&row.status),
            text(&row.detail),
            text(&row.request_id),
        ];
        match format(&row.hash_format).map_err(broken)? {
            Format::V1 => {}
            Format::V2 => {
                fields.insert(0, "v2");
                fields.extend([text(&row.dpop_jkt), text(&row.on_behalf_of_user_id)]);
            }
        }
        fields.push(expected);
        self.head = Some(close(chain_seq, &fields, &row.row_hash).map_err(broken)?);
        Ok(Membership::Chained)
    }

    /// The last good row; `None` before the first.
    #[must_use]
    pub fn head(&self) -> Option<&LegacyHead> {
        self.head.as_ref()
    }

    /// How many rows were outside the chain.
    #[must_use]
    pub fn outside(&self) -> u64 {
        self.outside
    }
}

/// Verifies `local_audit` row by row: one chain for each org.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalAuditVerifier {
    heads: BTreeMap<String, LegacyHead>,
    outside: u64,
}

impl LocalAuditVerifier {
    /// Starts before the first row.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next row, in the order of `chain_seq` within each org; orgs may alternate.
    ///
    /// Errors: [`LegacyBreak`]; the org's head then stays where it was.
    pub fn push(&mut self, row: &LocalAuditRow) -> Result<Membership, LegacyBreak> {
        let Some(chain_seq) = row.chain_seq else {
            self.outside += 1;
            return Ok(Membership::Outside);
        };
        let broken = |fault| LegacyBreak { table: "local_audit", id: row.id, chain_seq, fault };
        let org = text(&row.org_id);
        let head = self.heads.get(org);
        follows(head, chain_seq).map_err(broken)?;
        if row.previous_hash.as_deref() != head.map(|head| head.hash.as_str()) {
            return Err(broken(LegacyFault::PreviousHash));
        }
        let leading = match format(&row.hash_format).map_err(broken)? {
            Format::V1 => row.id.to_string(),
            Format::V2 => "v2".to_owned(),
        };
        let fields = [
            leading.as_str(),
            &isoformat(text(&row.timestamp)),
            text(&row.event_type),
            text(&row.agent_id),
            text(&row.session_id),
            org,
            text(&row.result),
            text(&row.details),
            row.previous_hash.as_deref().unwrap_or(LEGACY_GENESIS),
            &format!("seq={chain_seq}"),
            &format!("peer={}", text(&row.peer_org_id)),
        ];
        let head = close(chain_seq, &fields, &row.entry_hash).map_err(broken)?;
        self.heads.insert(org.to_owned(), head);
        Ok(Membership::Chained)
    }

    /// The last good row of each org, by org.
    #[must_use]
    pub fn heads(&self) -> &BTreeMap<String, LegacyHead> {
        &self.heads
    }

    /// How many rows were outside any chain.
    #[must_use]
    pub fn outside(&self) -> u64 {
        self.outside
    }
}

enum Format {
    V1,
    V2,
}

fn format(name: &Option<String>) -> Result<Format, LegacyFault> {
    match name.as_deref() {
        None | Some("v1" | "") => Ok(Format::V1),
        Some("v2") => Ok(Format::V2),
        Some(_) => Err(LegacyFault::Format),
    }
}

fn text(field: &Option<String>) -> &str {
    field.as_deref().unwrap_or("")
}

fn follows(head: Option<&LegacyHead>, chain_seq: i64) -> Result<(), LegacyFault> {
    let expected = head.map_or(0, |head| head.sequence).saturating_add(1);
    match chain_seq.cmp(&expected) {
        std::cmp::Ordering::Less => Err(LegacyFault::Order { expected }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(LegacyFault::Gap { expected }),
    }
}

fn close(chain_seq: i64, fields: &[&str], stored: &Option<String>) -> Result<LegacyHead, LegacyFault> {
    let hash = sha256_hex(fields.join("|").as_bytes());
    if stored.as_deref() != Some(hash.as_str()) {
        return Err(LegacyFault::Hash);
    }
    Ok(LegacyHead { sequence: chain_seq, hash })
}

/// The stored timestamp as the predecessor's verifier writes it again: Python's `isoformat`, in UTC if the
/// text has no offset, with six digits of fraction or none.
fn isoformat(stored: &str) -> String {
    let Some((date, time)) = stored.split_once(['T', ' ']) else { return stored.to_owned() };
    let offset_at = time.find(['+', '-', 'Z', 'z']).unwrap_or(time.len());
    let (clock, offset) = time.split_at(offset_at);
    let offset = match offset {
        "" | "Z" | "z" => "+00:00",
        other => other,
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let fraction = format!("{fraction:0<6.6}");
    if fraction == "000000" {
        format!("{date}T{clock}{offset}")
    } else {
        format!("{date}T{clock}.{fraction}{offset}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use serde_json::Value;

    use super::*;

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../vectors/legacy-audit.json")).unwrap()
    }

    fn column(row: &Value, name: &str) -> Option<String> {
        row.get(name).map(|value| value.as_str().unwrap().to_owned())
    }

    fn audit_log(name: &str) -> Vec<AuditLogRow> {
        let row = |row: &Value| AuditLogRow {
            id: row["id"].as_i64().unwrap(),
            timestamp: column(row, "timestamp"),
            agent_id: column(row, "agent_id"),
            action: column(row, "action"),
            tool_name: column(row, "tool_name"),
            status: column(row, "status"),
            detail: column(row, "detail"),
            request_id: column(row, "request_id"),
            chain_seq: row.get("chain_seq").and_then(Value::as_i64),
            prev_hash: column(row, "prev_hash"),
            row_hash: column(row, "row_hash"),
            dpop_jkt: column(row, "dpop_jkt"),
            on_behalf_of_user_id: column(row, "on_behalf_of_user_id"),
            hash_format: column(row, "hash_format"),
        };
        vectors()[name].as_array().unwrap().iter().map(row).collect()
    }

    fn local_audit() -> Vec<LocalAuditRow> {
        let row = |row: &Value| LocalAuditRow {
            id: row["id"].as_i64().unwrap(),
            timestamp: column(row, "timestamp"),
            agent_id: column(row, "agent_id"),
            event_type: column(row, "event_type"),
            details: column(row, "details"),
            previous_hash: column(row, "previous_hash"),
            entry_hash: column(row, "entry_hash"),
            session_id: column(row, "session_id"),
            org_id: column(row, "org_id"),
            result: column(row, "result"),
            chain_seq: row.get("chain_seq").and_then(Value::as_i64),
            peer_org_id: column(row, "peer_org_id"),
            hash_format: column(row, "hash_format"),
        };
        vectors()["local"].as_array().unwrap().iter().map(row).collect()
    }

    fn verify(rows: &[AuditLogRow]) -> Result<AuditLogVerifier, LegacyBreak> {
        let mut verifier = AuditLogVerifier::new();
        for row in rows {
            verifier.push(row)?;
        }
        Ok(verifier)
    }

    fn verify_local(rows: &[LocalAuditRow]) -> Result<LocalAuditVerifier, LegacyBreak> {
        let mut verifier = LocalAuditVerifier::new();
        for row in rows {
            verifier.push(row)?;
        }
        Ok(verifier)
    }

    #[test]
    fn rows_that_the_predecessor_stored_verify() {
        for (name, sequence, outside) in [("generated", 5, 0), ("enrolled", 2, 2), ("rolled_back", 10, 0)] {
            let rows = audit_log(name);
            let verifier = verify(&rows).unwrap();
            let last = rows.iter().rfind(|row| row.chain_seq.is_some()).unwrap();
            let head = verifier.head().unwrap();
            assert_eq!((head.sequence, Some(&head.hash)), (sequence, last.row_hash.as_ref()), "{name}");
            assert_eq!(verifier.outside(), outside, "{name}");
        }
        assert_eq!(AuditLogVerifier::new().head(), None);
    }

    #[test]
    fn every_hashed_field_of_every_row_is_covered() {
        type Change = fn(&mut AuditLogRow);
        let changes: [(&str, Change); 8] = [
            ("timestamp", |row| row.timestamp = Some("2026-05-07T15:24:56Z".to_owned())),
            ("agent_id", |row| row.agent_id = Some("mallory".to_owned())),
            ("action", |row| row.action = None),
            ("tool_name", |row| row.tool_name = Some("rm".to_owned())),
            ("status", |row| row.status = Some("failure".to_owned())),
            ("detail", |row| row.detail = Some(String::new())),
            ("request_id", |row| row.request_id = Some("r".to_owned())),
            ("row_hash", |row| row.row_hash = None),
        ];
        for (name, change) in changes {
            for position in 0..5 {
                let mut rows = audit_log("generated");
                change(&mut rows[position]);
                let broken = verify(&rows).unwrap_err();
                assert_eq!((broken.id, broken.fault), (rows[position].id, LegacyFault::Hash), "{name}");
            }
        }
        for (name, format_v2, change) in [
            ("dpop_jkt", true, (|row| row.dpop_jkt = Some("k".to_owned())) as Change),
            ("on_behalf_of_user_id", true, |row| row.on_behalf_of_user_id = Some("u".to_owned())),
            ("dpop_jkt in v1", false, |row| row.dpop_jkt = Some("k".to_owned())),
        ] {
            let mut rows = audit_log("generated");
            change(&mut rows[if format_v2 { 4 } else { 0 }]);
            assert_eq!(verify(&rows).is_err(), format_v2, "{name}");
        }
    }

    #[test]
    fn deleted_repeated_reordered_and_relabeled_rows_are_found() {
        let rows = audit_log("generated");
        let fault = |rows: &[AuditLogRow]| verify(rows).unwrap_err().fault;
        assert_eq!(fault(&[&rows[..2], &rows[3..]].concat()), LegacyFault::Gap { expected: 3 });
        assert_eq!(fault(&rows[1..]), LegacyFault::Gap { expected: 1 });
        assert_eq!(fault(&[&rows[..2], &rows[1..]].concat()), LegacyFault::Order { expected: 3 });
        let mut changed = rows.clone();
        changed[2].prev_hash = Some("genesis".to_owned());
        assert_eq!(fault(&changed), LegacyFault::PreviousHash);
        let mut changed = rows.clone();
        changed[4].hash_format = None;
        assert_eq!(fault(&changed), LegacyFault::Hash);
        changed[4].hash_format = Some("v3".to_owned());
        let broken = verify(&changed).unwrap_err();
        assert_eq!(broken.fault, LegacyFault::Format);
        assert_eq!(broken.reason(), "legacy_chain_format");
        assert_eq!(
            broken.to_string(),
            "audit_log row id 5, chain_seq 5, breaks the chain: its hash_format is neither v1 nor v2"
        );
        // Taken out of the chain, a row leaves a gap behind.
        let mut changed = rows;
        changed[1].chain_seq = None;
        assert_eq!(fault(&changed), LegacyFault::Gap { expected: 2 });
    }

    #[test]
    fn each_org_has_its_own_local_chain() {
        let rows = local_audit();
        let verifier = verify_local(&rows).unwrap();
        assert_eq!(verifier.heads()["acme"].sequence, 4);
        assert_eq!(verifier.heads()["__system__"].sequence, 2);
        for position in 0..rows.len() {
            let mut changed = rows.clone();
            changed[position].result = Some("OK".to_owned());
            let broken = verify_local(&changed).unwrap_err();
            assert_eq!((broken.id, broken.fault), (rows[position].id, LegacyFault::Hash));
        }
        let mut moved = rows.clone();
        moved[2].org_id = Some("acme".to_owned());
        assert_eq!(verify_local(&moved).unwrap_err().fault, LegacyFault::Order { expected: 3 });
        let mut unlinked = rows;
        unlinked[1].previous_hash = None;
        assert_eq!(verify_local(&unlinked).unwrap_err().fault, LegacyFault::PreviousHash);
        let outside = LocalAuditRow { id: 9, ..LocalAuditRow::default() };
        assert_eq!(LocalAuditVerifier::new().push(&outside), Ok(Membership::Outside));
    }

    #[test]
    fn a_v1_local_row_is_bound_to_its_primary_key_and_a_v2_row_is_not() {
        let mut rows = local_audit();
        rows[3].id = 40;
        assert!(verify_local(&rows).is_ok());
        rows[0].id = 10;
        assert_eq!(verify_local(&rows).unwrap_err().fault, LegacyFault::Hash);
    }

    #[test]
    fn timestamps_are_written_as_python_writes_them() {
        for (stored, written) in [
            ("2026-04-02T08:00:00+00:00", "2026-04-02T08:00:00+00:00"),
            ("2026-04-02T08:00:00", "2026-04-02T08:00:00+00:00"),
            ("2026-04-02 08:00:00Z", "2026-04-02T08:00:00+00:00"),
            ("2026-04-02T08:00:00.5+02:00", "2026-04-02T08:00:00.500000+02:00"),
            ("2026-04-02T08:00:00.000000-01:30", "2026-04-02T08:00:00-01:30"),
            ("2026-04-02T08:00:00.1234567", "2026-04-02T08:00:00.123456+00:00"),
            ("yesterday", "yesterday"),
            ("", ""),
        ] {
            assert_eq!(isoformat(stored), written, "{stored}");
        }
    }
}
