//! The halt: whether anything may be signed, and the permit without which nothing can be (invariant I1).
//!
//! The halt is a set of reasons read from the database: updates to be applied that are critical and overlap the live
//! enrollment types, runs whose stored state has not been verified yet, staged key rotations, critical checks that
//! failed. Clearing one clears no other. The [`Gate`] holds what was read last, with its *epoch*: the number in the
//! audit head that every change of a halting fact moves, by trigger where an operator's SQL makes the change. A
//! [`SignPermit`] carries the epoch, and the commit that records a signature refuses a permit whose epoch has passed.
//! So it does not matter how late a replica learns of a halt: what it signed in between is never recorded and never
//! leaves the process.

use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::http::{HeaderName, HeaderValue};
use mastio_core::error::Kind;

use crate::http::error::Problem;
use crate::store::{Query, StoreError, WriteTx};
use crate::values;

/// How an agent came to its identity, as migrations name it. Old databases use other tags, mapped when read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EnrollmentType {
    /// The Mastio minted the certificate (`connector`; the predecessor's `admin` and rows without a tag too).
    Connector,
    /// The owner holds the key and brought the certificate.
    Byoca,
    /// SPIRE issued the certificate (`spire`; the predecessor's `spiffe` too).
    Spire,
}

impl EnrollmentType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::Connector, Self::Byoca, Self::Spire];

    /// The field's own tag.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connector => "connector",
            Self::Byoca => "byoca",
            Self::Spire => "spire",
        }
    }

    /// Reads a tag of `internal_agents.enrollment_method`. An unknown tag counts as ours: a halt must not miss a
    /// fleet for a name.
    #[must_use]
    pub fn from_tag(tag: Option<&str>) -> Self {
        match tag {
            Some("byoca") => Self::Byoca,
            Some("spire" | "spiffe") => Self::Spire,
            _ => Self::Connector,
        }
    }
}

/// Why nothing is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HaltReason {
    /// A critical update has to be applied.
    PendingMigration {
        /// Its id.
        migration_id: String,
    },
    /// An update or its rollback is committed, and its stored state has not passed verification.
    UnverifiedRun {
        /// The id of its migration.
        migration_id: String,
    },
    /// The check of a critical migration failed, so nobody knows whether it is needed.
    FailedCheck {
        /// The id of its migration.
        migration_id: String,
    },
    /// A rotation of the token key is staged and undecided.
    StagedRotation {
        /// The staged key.
        kid: String,
    },
}

impl HaltReason {
    /// The text that every refused signing call carries; for a migration the page's own.
    #[must_use]
    pub fn detail(&self) -> String {
        match self {
            Self::PendingMigration { migration_id } => {
                format!("signing halted — pending migration {migration_id}")
            }
            Self::UnverifiedRun { migration_id } => {
                format!("signing halted — pending migration {migration_id}: committed and not yet verified")
            }
            Self::FailedCheck { migration_id } => format!(
                "signing halted — the check of migration {migration_id} failed; see the log and /proxy/updates/api"
            ),
            Self::StagedRotation { kid } => {
                format!("signing halted — rotation to key {kid} is staged; activate or drop it")
            }
        }
    }

    /// The migration behind the halt, where there is one.
    #[must_use]
    pub fn migration_id(&self) -> Option<&str> {
        match self {
            Self::PendingMigration { migration_id }
            | Self::UnverifiedRun { migration_id }
            | Self::FailedCheck { migration_id } => Some(migration_id),
            Self::StagedRotation { .. } => None,
        }
    }
}

/// Signing is halted: 503 with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.0.detail())]
pub struct Halted(pub HaltReason);

impl Problem for Halted {
    fn kind(&self) -> Kind {
        Kind::Halted
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        Some((
            HeaderName::from_static("link"),
            HeaderValue::from_static("</proxy/updates/api?status=pending>; rel=\"help\""),
        ))
    }
}

/// What the database says about the halt, at one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Halt {
    /// The epoch at which it was read.
    pub epoch: i64,
    /// Why nothing is signed, the one to act on first in front. Empty: signing goes on.
    pub reasons: Vec<HaltReason>,
}

/// A right to sign. Private to this file's two kinds.
pub trait Permit: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

/// The right to sign one thing while no halt stands. Valid for its epoch alone: the commit that records the
/// signature compares. Not stored, not cloned.
#[derive(Debug)]
pub struct SignPermit {
    epoch: i64,
}

impl SignPermit {
    /// The epoch at which no halt stood.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        self.epoch
    }
}

impl sealed::Sealed for SignPermit {}
impl Permit for SignPermit {}

/// The right of what is exempt from the halt (design I1): an apply or rollback run that the edge rules admit, revocation
/// lists, and our own TLS leaf, without which nobody could be told of the halt.
#[derive(Debug)]
pub struct ExemptPermit(());

impl sealed::Sealed for ExemptPermit {}
impl Permit for ExemptPermit {}

impl ExemptPermit {
    /// For a run that the engine has admitted. Called by `updates/engine.rs` alone (`tests/tidy.rs`).
    #[must_use]
    pub(in crate::updates) fn for_run() -> Self {
        Self(())
    }

    /// For revocation lists, which take trust away and give none. Called by `pki/revocation/` alone.
    #[must_use]
    pub(crate) fn for_crl() -> Self {
        Self(())
    }

    /// For our own TLS leaf and the old-with-new certificate it is sent with. Called by `pki/tls.rs` alone.
    #[must_use]
    pub(crate) fn for_own_tls() -> Self {
        Self(())
    }
}

/// The one who hands out permits. Cheap to share; holds no truth of its own.
pub struct Gate(ArcSwap<Halt>);

impl Gate {
    /// A gate that knows `halt`.
    #[must_use]
    pub fn new(halt: Halt) -> Self {
        Self(ArcSwap::from_pointee(halt))
    }

    /// What was read last.
    #[must_use]
    pub fn halt(&self) -> Arc<Halt> {
        self.0.load_full()
    }

    /// Takes what was read anew.
    pub fn set(&self, halt: Halt) {
        self.0.store(Arc::new(halt));
    }

    /// The right to sign one thing. Errors: [`Halted`] while a halt stands.
    pub fn permit(&self) -> Result<SignPermit, Halted> {
        let halt = self.0.load();
        match halt.reasons.first() {
            Some(reason) => Err(Halted(reason.clone())),
            None => Ok(SignPermit { epoch: halt.epoch }),
        }
    }
}

/// The right to sign one thing inside `tx`, judged in `tx` itself, which holds the epoch.
pub async fn permit_in(tx: &mut WriteTx) -> Result<Result<SignPermit, Halted>, StoreError> {
    let halt = read(tx).await?;
    Ok(match halt.reasons.into_iter().next() {
        Some(reason) => Err(Halted(reason)),
        None => Ok(SignPermit { epoch: halt.epoch }),
    })
}

/// Writes the page's ERROR event for a halt that stands.
pub fn log(reason: &HaltReason) {
    match reason {
        HaltReason::StagedRotation { kid } => tracing::error!(
            kid,
            "cullis_proxy_mastio_rotation_halted: a staged key rotation is undecided; activate or drop it"
        ),
        reason => tracing::error!(
            migration_id = reason.migration_id().unwrap_or_default(),
            reason = reason.detail(),
            "cullis_proxy_sign_halt_pending_migration"
        ),
    }
}

/// Reads the halt from the database, in the caller's view of it.
pub async fn read(tx: &mut impl Query) -> Result<Halt, StoreError> {
    let epoch = tx
        .row("SELECT epoch FROM audit_head WHERE id = 1", &[])
        .await?
        .ok_or(StoreError::HeadMissing)?
        .integer(0)?;
    let live = live_enrollment_types(tx).await?;
    let mut reasons = Vec::new();

    let runs = tx
        .rows(
            "SELECT DISTINCT migration_id FROM update_runs WHERE halts = 1 AND committed_at IS NOT NULL \
             AND verified_at IS NULL ORDER BY migration_id",
            &[],
        )
        .await?;
    for row in runs {
        reasons.push(HaltReason::UnverifiedRun { migration_id: row.text(0)? });
    }
    let mut pending = Vec::new();
    for row in tx
        .rows(
            // A check that knows its repair cannot run here must not raise a halt that nothing could lift.
            "SELECT migration_id, criticality, affects_enrollments, requires FROM pending_updates \
             WHERE status IN ('pending', 'failed') AND NOT EXISTS (SELECT 1 FROM deploy_state \
             WHERE key = 'impossible_check:' || migration_id) ORDER BY migration_id",
            &[],
        )
        .await?
    {
        let migration_id = row.text(0)?;
        if halts(row.optional_text(1)?.as_deref(), row.optional_text(2)?.as_deref(), &live) {
            pending.push((migration_id, list(row.optional_text(3)?.as_deref())));
        }
    }
    for migration_id in in_order(pending) {
        reasons.push(HaltReason::PendingMigration { migration_id });
    }
    for row in
        tx.rows("SELECT key FROM deploy_state WHERE key LIKE 'failed_check:%' ORDER BY key", &[]).await?
    {
        let key = row.text(0)?;
        let migration_id = key.trim_start_matches("failed_check:").to_owned();
        reasons.push(HaltReason::FailedCheck { migration_id });
    }
    for row in tx
        .rows(
            "SELECT kid FROM mastio_keys WHERE activated_at IS NULL AND deprecated_at IS NULL ORDER BY kid",
            &[],
        )
        .await?
    {
        reasons.push(HaltReason::StagedRotation { kid: row.text(0)? });
    }
    Ok(Halt { epoch, reasons })
}

/// Whether a row that is to be applied halts: critical and touching a live enrollment type. The row's own copy
/// decides, so that a binary that does not know the id halts too; a row without a copy halts.
fn halts(criticality: Option<&str>, affects: Option<&str>, live: &BTreeSet<EnrollmentType>) -> bool {
    let Some(criticality) = criticality else { return true };
    if criticality != "critical" {
        return false;
    }
    let affected = list(affects);
    // An empty list is a migration that is not about enrollment: it touches everybody.
    affected.is_empty() || affected.iter().any(|tag| live.contains(&EnrollmentType::from_tag(Some(tag))))
}

/// A JSON list of strings as `pending_updates` keeps it; anything else counts as empty.
#[must_use]
pub fn list(text: Option<&str>) -> Vec<String> {
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// Orders ids so that what another requires comes first, otherwise by id.
fn in_order(mut pending: Vec<(String, Vec<String>)>) -> Vec<String> {
    let mut ordered = Vec::with_capacity(pending.len());
    while !pending.is_empty() {
        let free = pending.iter().position(|(_, requires)| {
            !requires.iter().any(|id| pending.iter().any(|(other, _)| other == id))
        });
        // A circle of requirements cannot be registered; if SQL made one, the smallest id goes first.
        let (id, _) = pending.remove(free.unwrap_or(0));
        ordered.push(id);
    }
    ordered
}

/// The enrollment types of active agents; an empty fleet counts as `connector`, the default of a fresh deploy.
pub async fn live_enrollment_types(tx: &mut impl Query) -> Result<BTreeSet<EnrollmentType>, StoreError> {
    // One index look-up a type: the fleet is never listed. "Other" is what from_tag calls ours.
    let mut live = BTreeSet::new();
    let exists = |tx_row: Option<crate::store::Row>| tx_row.is_some();
    for (enrollment_type, tag) in [
        (EnrollmentType::Byoca, "byoca"),
        (EnrollmentType::Spire, "spire"),
        (EnrollmentType::Spire, "spiffe"),
    ] {
        let row = tx
            .row(
                "SELECT 1 FROM internal_agents WHERE is_active = 1 AND enrollment_method = $1 LIMIT 1",
                values![tag],
            )
            .await?;
        if exists(row) {
            live.insert(enrollment_type);
        }
    }
    // Four ranges around the three tags, and no tag at all.
    let ours = tx
        .row(
            "SELECT 1 FROM (\
             SELECT * FROM (SELECT 1 AS one FROM internal_agents WHERE is_active = 1 AND enrollment_method IS NULL LIMIT 1) a \
             UNION ALL SELECT * FROM (SELECT 1 AS one FROM internal_agents WHERE is_active = 1 AND enrollment_method < 'byoca' LIMIT 1) b \
             UNION ALL SELECT * FROM (SELECT 1 AS one FROM internal_agents WHERE is_active = 1 AND enrollment_method > 'byoca' AND enrollment_method < 'spiffe' LIMIT 1) c \
             UNION ALL SELECT * FROM (SELECT 1 AS one FROM internal_agents WHERE is_active = 1 AND enrollment_method > 'spiffe' AND enrollment_method < 'spire' LIMIT 1) d \
             UNION ALL SELECT * FROM (SELECT 1 AS one FROM internal_agents WHERE is_active = 1 AND enrollment_method > 'spire' LIMIT 1) e\
             ) live LIMIT 1",
            &[],
        )
        .await?;
    if exists(ours) || live.is_empty() {
        live.insert(EnrollmentType::Connector);
    }
    Ok(live)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_halted_gate_gives_no_permit_and_says_why() {
        let migration_id = "2026-04-23-org-ca-pathlen-1".to_owned();
        let gate = Gate::new(Halt { epoch: 3, reasons: vec![HaltReason::PendingMigration { migration_id }] });
        let refused = gate.permit().map(|permit| permit.epoch()).map_err(|halted| halted.to_string());
        assert_eq!(refused, Err("signing halted — pending migration 2026-04-23-org-ca-pathlen-1".to_owned()));
        gate.set(Halt { epoch: 4, reasons: vec![] });
        assert_eq!(gate.permit().map(|permit| permit.epoch()), Ok(4));
    }

    #[test]
    fn a_row_without_a_copy_of_its_criticality_halts() {
        let live = BTreeSet::from([EnrollmentType::Connector]);
        assert!(halts(None, None, &live));
        assert!(halts(Some("critical"), Some(r#"["connector"]"#), &live));
        assert!(!halts(Some("critical"), Some(r#"["byoca"]"#), &live));
        assert!(!halts(Some("warning"), Some(r#"["connector"]"#), &live));
    }

    #[test]
    fn the_predecessor_s_tags_are_mapped() {
        for (tag, expected) in [
            (Some("admin"), EnrollmentType::Connector),
            (Some("connector"), EnrollmentType::Connector),
            (None, EnrollmentType::Connector),
            (Some("spiffe"), EnrollmentType::Spire),
            (Some("spire"), EnrollmentType::Spire),
            (Some("byoca"), EnrollmentType::Byoca),
        ] {
            assert_eq!(EnrollmentType::from_tag(tag), expected, "{tag:?}");
        }
    }

    #[test]
    fn what_another_requires_is_applied_first() {
        let pending = vec![
            ("a".to_owned(), vec!["c".to_owned()]),
            ("b".to_owned(), vec![]),
            ("c".to_owned(), vec!["b".to_owned()]),
        ];
        assert_eq!(in_order(pending), ["b", "c", "a"]);
    }
}
