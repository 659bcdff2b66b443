//! What can go wrong with an update, mapped once to what a caller is told.

use mastio_core::error::Kind;
use mastio_core::x509::X509Error;
use mastio_core::x509::path::PathError;
use serde_json::{Value, json};

use super::migration::Refusal;
use crate::http::error::Problem;
use crate::pki::PkiError;
use crate::pki::keys::KeyError;
use crate::store::StoreError;

/// Why an update could not be applied, rolled back, planned or listed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// No such migration and no such row.
    #[error("no update {0}: GET /proxy/updates/api lists them")]
    Unknown(String),
    /// The confirmation is missing.
    #[error("send {{\"confirm\": true}} to confirm")]
    Unconfirmed,
    /// The filter names no status.
    #[error("unknown status {0}: one of pending, applied, failed, rolled_back")]
    UnknownStatus(String),
    /// The row says applied.
    #[error("already applied")]
    AlreadyApplied,
    /// The state is right and no row waits.
    #[error("not needed: the state that this update repairs is right")]
    NotNeeded,
    /// The state of the world forbids it.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// Another migration has to be applied first.
    #[error("sign halt mismatch: apply {first} first")]
    OutOfOrder {
        /// What to do first.
        first: String,
    },
    /// A later update stands on this one.
    #[error("{blocker} stands on this update: undo it first")]
    Blocked {
        /// The later update.
        blocker: String,
    },
    /// Another run is under way.
    #[error("{migration_id} is being changed by another run: wait for it, then look at the list again")]
    Running {
        /// What runs.
        migration_id: String,
    },
    /// The state is not the one that the operator's plan was made of.
    #[error("the state has moved since that plan was made: nothing was changed; look at the plan again")]
    PlanChanged {
        /// Digest of the plan as it is now.
        present: String,
        /// What differs.
        differences: Box<Value>,
    },
    /// Nothing retires.
    #[error("no trust overlap: no Org CA is retiring")]
    NoOverlap,
    /// Agents stand under a retiring Org CA alone.
    #[error(
        "agents whose certificate only the retiring Org CA vouches for: {count}; they must enroll again first"
    )]
    AgentsBlock {
        /// How many.
        count: usize,
        /// The first of them.
        agents: Vec<Value>,
    },
    /// Agents still present a former leaf.
    #[error(
        "{count} agents still present a former leaf and would be refused: have them take up the present one, or say that          they may break (--break-agents)"
    )]
    AgentsBreak {
        /// How many.
        count: i64,
        /// The first of them.
        agents: Vec<Value>,
    },
    /// Nobody could sign our TLS certificate.
    #[error(
        "without the retiring Org CA nobody here could sign the TLS certificate: bring the current Org CA's key back, or          set MCP_PROXY_TLS_CERT and MCP_PROXY_TLS_KEY"
    )]
    NoTlsIssuer,
    /// The trust overlap has ended since.
    #[error(
        "the trust overlap was ended at {at}: the replaced Org CA and its key are gone, so there is no way back"
    )]
    Settled {
        /// When.
        at: String,
    },
    /// Enough plans are being computed.
    #[error("too many plans are being computed: try again in a moment")]
    TooManyRehearsals,
    /// Two operators have to stand behind a run, and they do not yet.
    #[error("{}", approval_required(migration_id, direction, proposed_by.as_deref()))]
    ApprovalRequired {
        /// The update.
        migration_id: String,
        /// `apply` or `rollback`.
        direction: &'static str,
        /// Who has proposed its plan, where somebody has.
        proposed_by: Option<String>,
    },
    /// Somebody else has proposed the same plan.
    #[error("{by} has proposed this plan already: mastio updates approve {migration_id}")]
    AlreadyProposed {
        /// The update.
        migration_id: String,
        /// Who.
        by: String,
    },
    /// Nobody approves what they have proposed.
    #[error("{by} has proposed this plan: another operator must approve it")]
    SamePerson {
        /// Who.
        by: String,
    },
    /// The proposal cannot be approved any more.
    #[error("this proposal is {status}: look at the proposals again")]
    ProposalClosed {
        /// What it is.
        status: String,
    },
    /// There is no such proposal.
    #[error("no such proposal of {migration_id}: mastio updates proposals {migration_id} lists them")]
    NoProposal {
        /// The update.
        migration_id: String,
    },
    /// The state moved after the plan was compared and before the commit.
    #[error(
        "the state moved away from the plan while the update was prepared: nothing was changed; plan again"
    )]
    MovedSincePlan,
    /// There is nothing to roll back to.
    #[error("no snapshot — state has already moved")]
    NoSnapshot,
    /// The snapshot does not have the checksum it was written with.
    #[error("the snapshot of {migration_id} is damaged at {row}: nothing was changed; restore a backup")]
    SnapshotDamaged {
        /// Whose snapshot.
        migration_id: String,
        /// The row.
        row: String,
    },
    /// The fleet changes faster than the run can follow.
    #[error(
        "what is to be changed kept changing while it was prepared: nothing was changed; try again when it is calmer"
    )]
    CannotCatchUp,
    /// The result did not pass the verification.
    #[error("the result did not pass verification at {what}: nothing was changed")]
    Verification {
        /// The certificate or rule.
        what: String,
        /// What the judge said.
        #[source]
        cause: Option<PathError>,
    },
    /// The stored state did not pass the verification after the commit.
    #[error("the stored state does not pass verification at {0}: signing stays halted; roll back")]
    StoredState(String),
    /// Another replica took this process for dead and closed the run.
    #[error(
        "another replica has closed this run, because this process gave no sign of life: nothing was changed here"
    )]
    TakenOver,
    /// The run's process ended, or its database was away, before the commit.
    #[error(
        "the process or its database went away in the middle of the run: nothing was changed; apply again"
    )]
    Interrupted,
    /// A key that the repair needs is not here.
    #[error("the {0} key is not here")]
    KeyMissing(&'static str),
    /// A row that has to hold a leaf does not.
    #[error("{0} has no certificate here: nothing was changed")]
    NotALeaf(String),
    /// The run's task panicked or was stopped.
    #[error("the run stopped unexpectedly: nothing was changed; look at the log")]
    Stopped,
    /// A certificate cannot be read or built.
    #[error("a certificate cannot be read or built")]
    Certificate(#[from] X509Error),
    /// A key cannot be opened or used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn approval_required(migration_id: &str, direction: &str, proposed_by: Option<&str>) -> String {
    let flag = if direction == "rollback" { " --rollback" } else { "" };
    match proposed_by {
        Some(by) => format!(
            "{by} has proposed this {direction}; another operator must approve it: mastio updates approve {migration_id}{flag}"
        ),
        None => format!(
            "this {direction} needs two operators; one proposes its plan, another approves it: mastio updates propose {migration_id}{flag}"
        ),
    }
}

impl UpdateError {
    /// Why a run failed, for those who script: stable, snake case.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Verification { .. } => "verification_failed",
            Self::StoredState(_) => "stored_state_wrong",
            Self::CannotCatchUp => "cannot_catch_up",
            Self::MovedSincePlan | Self::PlanChanged { .. } => "plan_changed",
            Self::TakenOver => "taken_over",
            Self::Interrupted => "interrupted",
            Self::Stopped => "stopped",
            Self::KeyMissing(_) => "key_missing",
            Self::Store(_) | Self::Pki(PkiError::Store(_)) => "database_unavailable",
            _ => "failed",
        }
    }

    /// Whether the database did not answer: the same may succeed once it is back.
    #[must_use]
    pub fn is_of_the_database(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Pki(PkiError::Store(_)))
    }
}

impl Problem for UpdateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Unknown(_) | Self::NoSnapshot | Self::NoProposal { .. } => Kind::NotFound,
            Self::Unconfirmed | Self::UnknownStatus(_) => Kind::Invalid,
            Self::AlreadyApplied
            | Self::NotNeeded
            | Self::Refused(_)
            | Self::Blocked { .. }
            | Self::Running { .. }
            | Self::PlanChanged { .. }
            | Self::NoOverlap
            | Self::AgentsBlock { .. }
            | Self::AgentsBreak { .. }
            | Self::NoTlsIssuer
            | Self::Settled { .. }
            | Self::ApprovalRequired { .. }
            | Self::AlreadyProposed { .. }
            | Self::SamePerson { .. }
            | Self::ProposalClosed { .. }
            | Self::MovedSincePlan
            | Self::CannotCatchUp
            | Self::SnapshotDamaged { .. } => Kind::Conflict,
            Self::TooManyRehearsals => Kind::Unavailable,
            Self::OutOfOrder { .. } => Kind::OutOfOrder,
            Self::Store(error) | Self::Pki(PkiError::Store(error)) => error.kind(),
            Self::Verification { .. }
            | Self::StoredState(_)
            | Self::TakenOver
            | Self::Interrupted
            | Self::KeyMissing(_)
            | Self::NotALeaf(_)
            | Self::Stopped
            | Self::Certificate(_)
            | Self::Key(_)
            | Self::Pki(_) => Kind::Internal,
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Refused(refusal) => {
                json!({ "reason": refusal.reason, "message": refusal.message, "page": refusal.page })
            }
            Self::NotNeeded => json!({ "reason": "not_needed", "message": self.to_string() }),
            Self::Running { .. } => json!({ "reason": "run_under_way", "message": self.to_string() }),
            Self::Blocked { blocker } => {
                json!({ "reason": "blocked_by_later_update", "blocker": blocker, "message": self.to_string() })
            }
            Self::PlanChanged { present, differences } => json!({
                "reason": "plan_changed",
                "message": self.to_string(),
                "plan_digest": present,
                "differences": differences,
            }),
            Self::NoOverlap => json!({ "reason": "no_overlap", "message": self.to_string() }),
            Self::AgentsBlock { count, agents } => json!({
                "reason": "agents_block",
                "message": self.to_string(),
                "count": count,
                "agents": agents,
            }),
            Self::AgentsBreak { count, agents } => json!({
                "reason": "agents_on_old_leaf",
                "message": self.to_string(),
                "count": count,
                "agents": agents,
            }),
            Self::NoTlsIssuer => json!({ "reason": "no_tls_issuer", "message": self.to_string() }),
            Self::Settled { .. } => json!({ "reason": "settled", "message": self.to_string() }),
            Self::ApprovalRequired { proposed_by, .. } => json!({
                "reason": "approval_required",
                "message": self.to_string(),
                "proposed_by": proposed_by,
            }),
            Self::AlreadyProposed { .. } => {
                json!({ "reason": "already_proposed", "message": self.to_string() })
            }
            Self::SamePerson { .. } => json!({ "reason": "same_person", "message": self.to_string() }),
            Self::ProposalClosed { .. } => {
                json!({ "reason": "proposal_closed", "message": self.to_string() })
            }
            Self::MovedSincePlan => json!({ "reason": "plan_changed", "message": self.to_string() }),
            Self::CannotCatchUp => json!({ "reason": "cannot_catch_up", "message": self.to_string() }),
            Self::SnapshotDamaged { .. } => {
                json!({ "reason": "snapshot_damaged", "message": self.to_string() })
            }
            Self::Store(error) | Self::Pki(PkiError::Store(error)) => json!(error.explained()),
            other => Value::String(other.to_string()),
        }
    }
}
