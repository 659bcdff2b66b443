//! What a migration is: a declaration, a check, and a pure function from state to what changes.
//!
//! A migration sees a [`View`] and touches nothing. It answers whether it is needed, and, when asked to prepare,
//! which cells change and how each leaf of the fleet does. The engine does everything else, once for all
//! migrations: plan, snapshot, batches, verification, the one commit, activation, rollback.

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;

use super::error::UpdateError;
use super::halt::{EnrollmentType, ExemptPermit};
use super::view::View;
use crate::entropy::Entropy;
use crate::pki::keys::{NewKey, PrivateKey};

/// What kind of state a migration repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationType {
    /// The fields of certificates.
    CertSchema,
    /// The algorithms of keys or signatures.
    CertAlgorithm,
    /// What is allowed.
    PolicyChange,
    /// What a feature needs.
    NewFeature,
    /// How state is written down, without a change of meaning.
    CodeRefactor,
}

impl MigrationType {
    /// As operators read it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CertSchema => "cert-schema",
            Self::CertAlgorithm => "cert-algorithm",
            Self::PolicyChange => "policy-change",
            Self::NewFeature => "new-feature",
            Self::CodeRefactor => "code-refactor",
        }
    }
}

/// How bad the wrong state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Criticality {
    /// Signing halts until it is applied.
    Critical,
    /// It should be applied soon.
    Warning,
    /// It may be applied.
    Info,
}

impl Criticality {
    /// As operators read it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Warning => "warning",
            Self::Info => "info",
        }
    }
}

/// What a migration says of itself.
#[derive(Debug)]
pub struct Declaration {
    /// `YYYY-MM-DD-slug`: ids sort by time.
    pub migration_id: &'static str,
    /// What kind of state it repairs.
    pub migration_type: MigrationType,
    /// How bad the wrong state is.
    pub criticality: Criticality,
    /// Whose certificates it changes. Empty: it is not about enrollment.
    pub affects_enrollments: &'static [EnrollmentType],
    /// Shown verbatim.
    pub description: &'static str,
    /// Ids that have to be applied first.
    pub requires: &'static [&'static str],
    /// The name that `/healthz` shows in `warnings` while the state is wrong.
    pub warning: Option<&'static str>,
}

impl Declaration {
    /// The tags of the affected enrollment types, as the list shows them.
    #[must_use]
    pub fn affected_tags(&self) -> Vec<&'static str> {
        self.affects_enrollments.iter().map(|enrollment_type| enrollment_type.as_str()).collect()
    }
}

/// Why a needed repair cannot run here now, and where to read on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Stable, snake case.
    pub reason: &'static str,
    /// For people, with the next step.
    pub message: String,
    /// The page that helps.
    pub page: &'static str,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// The state is wrong and the repair can run. The note tells operators what was found.
    Needed {
        /// Shown in the list, where there is something to tell beyond the description.
        note: Option<String>,
    },
    /// The state is right.
    NotNeeded,
    /// The state is wrong and this repair can never run here: a warning, no row, no halt.
    Impossible(Refusal),
    /// The state is wrong, the row halts, and the apply is refused until something else is done.
    Refused(Refusal),
}

/// A cell of a table that a migration may change, other than the fleet's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell {
    /// The table: `proxy_config` alone for now.
    pub table: &'static str,
    /// The row's primary key.
    pub row_key: &'static str,
    /// The column.
    pub column: &'static str,
    /// Whether it holds a sealed private key.
    pub sealed: bool,
}

impl Cell {
    /// A public value of `proxy_config`.
    #[must_use]
    pub const fn config(row_key: &'static str) -> Self {
        Self { table: "proxy_config", row_key, column: "value", sealed: false }
    }

    /// A sealed key in `proxy_config`.
    #[must_use]
    pub const fn config_key(row_key: &'static str) -> Self {
        Self { table: "proxy_config", row_key, column: "value", sealed: true }
    }

    /// Where the cell lies, for sealing.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}/{}/{}", self.table, self.row_key, self.column)
    }
}

/// What a cell becomes.
pub enum After {
    /// This text.
    Text(String),
    /// This new private key, sealed by the engine for the place.
    Key(Box<NewKey>),
}

/// A column of `internal_agents` that a migration may change, with the rows of it that are in scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FleetColumn {
    /// `cert_pem`, of every agent whose certificate the Mastio issued.
    CertPem,
    /// `enrollment_method`, where it has a tag that the predecessor alone wrote.
    EnrollmentMethod,
}

impl FleetColumn {
    /// The column's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CertPem => "cert_pem",
            Self::EnrollmentMethod => "enrollment_method",
        }
    }
}

/// Which rows a migration may change. The engine snapshots exactly these before it asks for changes.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Single cells.
    pub cells: &'static [Cell],
    /// The column of the fleet that is in it, where one is.
    pub fleet: Option<FleetColumn>,
}

impl Scope {
    /// Whether certificates are in it, so that the stored chain has to be judged after the commit.
    #[must_use]
    pub fn has_certificates(&self) -> bool {
        !self.cells.is_empty() || self.fleet == Some(FleetColumn::CertPem)
    }
}

/// What a migration needs in order to prepare, besides the state.
pub struct Tools<'a> {
    /// Signs what the lints have passed: an update is exempt from the halt that it lifts.
    pub permit: &'a ExemptPermit,
    /// Serials.
    pub entropy: &'a Entropy,
    /// The time at which the run prepares.
    pub now: UnixTime,
}

/// What changes.
pub struct ChangeSet {
    /// New values of single cells.
    pub cells: Vec<(Cell, After)>,
    /// How a row of the fleet changes. Absent: none does.
    pub fleet: Option<Box<dyn FleetChange>>,
    /// What the certificates have to be, for the code that judges them. Absent: none changes.
    pub result: Option<Expected>,
}

/// What a leaf that changes has to be afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeafRule {
    /// Signed anew, every extension but the AKI as it was.
    Resigned,
    /// Signed anew, with what the agent profile asks for and it lacked.
    Completed,
    /// The same certificate; what follows it in the row changes.
    Kept,
}

/// The CA certificates that every live Mastio-issued leaf must chain to after the commit.
#[derive(Clone)]
pub struct Expected {
    /// The Org CA after the commit.
    pub org_ca: Certificate,
    /// The intermediate after the commit.
    pub mastio_ca: Certificate,
    /// The Org CA that it replaces, which becomes a retiring anchor.
    pub replaced_org_ca: Option<Certificate>,
    /// CA certificates that are issued again for the same name and key: as they stand, and as they become.
    pub reissued: Vec<[Certificate; 2]>,
    /// What becomes of leaves.
    pub leaves: LeafRule,
}

/// A row of the fleet as it stands.
#[derive(Debug, Clone)]
pub struct FleetRow {
    /// The agent.
    pub agent_id: String,
    /// The column's text.
    pub text: String,
    /// The leaf, parsed from the first block, where the column is `cert_pem`.
    pub leaf: Option<Certificate>,
    /// Key id of the leaf's issuer as the facts know it, lowercase hex; empty when unknown.
    pub issuer_key_id: String,
}

impl FleetRow {
    /// The leaf. Errors: [`UpdateError::NotALeaf`] where the column has none.
    pub fn leaf(&self) -> Result<&Certificate, UpdateError> {
        self.leaf.as_ref().ok_or_else(|| UpdateError::NotALeaf(self.agent_id.clone()))
    }
}

/// What a row of the fleet becomes.
pub struct FleetAfter {
    /// The new text. For `cert_pem`: the leaf and what follows it.
    pub text: String,
    /// The leaf in it, where the column is `cert_pem`.
    pub leaf: Option<Certificate>,
}

/// Changes rows of the fleet, on all cores.
pub trait FleetChange: Send + Sync {
    /// What `row` becomes; `None` leaves it alone.
    fn change(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError>;
}

/// How a leaf that arose or changed after an apply is carried back by its rollback.
pub trait CarryBack: Send + Sync {
    /// The `cert_pem` of `row` under the restored CA; `None` leaves it as it is.
    fn carry_back(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError>;
}

/// The CA as a rollback restores it, for [`Migration::carry_back`].
pub struct RestoredAuthority {
    /// The restored Org CA.
    pub org_ca: Certificate,
    /// Its key, where it is here.
    pub org_ca_key: Option<std::sync::Arc<PrivateKey>>,
    /// The restored intermediate, where there was one.
    pub mastio_ca: Option<Certificate>,
    /// The intermediate's key, where there is one.
    pub mastio_ca_key: Option<std::sync::Arc<PrivateKey>>,
}

/// A framework update.
pub trait Migration: Send + Sync {
    /// What it says of itself.
    fn declaration(&self) -> &'static Declaration;

    /// Which rows it may change.
    fn scope(&self) -> Scope;

    /// Whether it is needed. Reads only what the view has read already.
    fn check(&self, view: &View) -> Need;

    /// What changes. Slow (keys are generated): never on the executor's threads.
    fn prepare(&self, view: &View, tools: &Tools<'_>) -> Result<ChangeSet, UpdateError>;

    /// What a rollback does with leaves that arose or changed since the apply. Without it they keep what they have
    /// become, which is right wherever it stays valid under what is restored.
    fn carry_back(&self, _restored: RestoredAuthority) -> Option<Box<dyn CarryBack>> {
        None
    }
}
