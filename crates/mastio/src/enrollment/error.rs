//! Why a certificate does not prove an agent, and why an agent could not be created.

use mastio_core::error::Kind;
use mastio_core::token::enrollment::PossessionError;
use mastio_core::token::jwk::JwkError;
use mastio_core::x509::path::PathError;
use serde_json::{Value, json};

use crate::http::error::Problem;
use crate::pki::PkiError;
use crate::store::StoreError;

/// Why a client certificate is refused: 401, but for the last two.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The connection has none.
    #[error("this route needs a client certificate")]
    Missing,
    /// It cannot be read.
    #[error("the client certificate cannot be read")]
    Malformed,
    /// It names no agent.
    #[error("the client certificate names no agent: neither a SPIFFE URI nor a common name org::name")]
    NoIdentity,
    /// It names another organisation.
    #[error("the client certificate names another organisation")]
    OrgMismatch,
    /// The assertion's subject is not the certificate's agent.
    #[error("the assertion's subject is not the agent that its certificate names")]
    SubjectMismatch,
    /// No such agent, or it is deactivated.
    #[error("the agent is unknown or inactive: enroll it, or ask the operator")]
    UnknownOrInactive,
    /// The certificate is not registered for the agent.
    #[error("the client certificate is not the one registered for this agent")]
    PinMismatch,
    /// It was revoked.
    #[error("the client certificate was revoked: enroll again with another key")]
    Revoked,
    /// The token is older than a revocation, or than its agent.
    #[error("the token was issued before a certificate of its agent was revoked: log in again")]
    TokenRevoked,
    /// It does not chain to an anchor.
    #[error("the client certificate does not chain to this organisation's CA")]
    Path(#[source] PathError),
    /// The agent has used its allowance up.
    #[error("this agent asks too often: wait, or raise MCP_PROXY_RATE_LIMIT_PER_MINUTE")]
    Limited,
    /// The state of the certificate authority cannot be read.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl IdentityError {
    /// Stable, snake case.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "client_cert_required",
            Self::Malformed => "client_cert_malformed",
            Self::NoIdentity => "client_cert_no_identity",
            Self::OrgMismatch => "client_cert_org_mismatch",
            Self::SubjectMismatch => "assertion_subject_mismatch",
            Self::UnknownOrInactive => "agent_unknown_or_inactive",
            Self::PinMismatch => "client_cert_pin_mismatch",
            Self::Revoked => "client_cert_revoked",
            Self::TokenRevoked => "token_revoked",
            Self::Path(_) => "client_cert_path_invalid",
            Self::Limited => "rate_limited",
            Self::Pki(_) | Self::Store(_) => "unavailable",
        }
    }
}

impl Problem for IdentityError {
    fn kind(&self) -> Kind {
        match self {
            Self::Limited => Kind::Limited,
            Self::Pki(error) => error.kind(),
            Self::Store(error) => error.kind(),
            _ => Kind::Unauthenticated,
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Pki(_) | Self::Store(_) => json!("the database is not available"),
            Self::Path(cause) => {
                json!({ "reason": self.reason(), "path": cause.reason(), "hint": self.to_string() })
            }
            _ => json!({ "reason": self.reason(), "hint": self.to_string() }),
        }
    }
}

/// Why an agent could not be created or changed.
#[derive(Debug, thiserror::Error)]
pub enum EnrollmentError {
    /// The id is taken.
    #[error("agent {0} exists already")]
    Exists(String),
    /// No such agent.
    #[error("no agent {0}")]
    Unknown(String),
    /// A field is not what it should be.
    #[error("{field} {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// No such request.
    #[error("no enrollment {0}")]
    UnknownRequest(String),
    /// The request is decided, or has expired.
    #[error("enrollment {session_id} is {status}, not pending")]
    Decided {
        /// The request.
        session_id: String,
        /// What became of it.
        status: &'static str,
    },
    /// The agent keeps the certificate that it has.
    #[error("agent {agent_id} gets no other certificate: {why}")]
    NotReplaceable {
        /// The agent.
        agent_id: String,
        /// Why, and what to do.
        why: String,
    },
    /// No certificate of ours or of an agent has this serial.
    #[error("no certificate with the serial {0} is registered for an agent")]
    UnknownSerial(String),
    /// Everything that was named is revoked already.
    #[error("{0} is revoked already")]
    AlreadyRevoked(String),
    /// An owner's certificate, key or bundle is not what is needed.
    #[error("{0}")]
    Brought(String),
    /// An SVID was brought, and nothing says who may vouch for it.
    #[error("no SPIRE trust bundle: send trust_bundle_pem, or set spire_trust_bundle in proxy_config")]
    NoBundle,
    /// Too many requests wait for a decision.
    #[error("{}", if *from_this_source { "too many enrollments of this address wait for a decision" } else { "too many enrollments wait for a decision" })]
    TooManyWaiting {
        /// Of this source alone; otherwise of all.
        from_this_source: bool,
    },
    /// The public key cannot be read, or is of no accepted kind.
    #[error("the public key is refused: {0}")]
    Key(String),
    /// The client has not proved that it holds the key.
    #[error("proof of possession refused")]
    Possession(#[source] PossessionError),
    /// The DPoP key is not a public key of an accepted kind.
    #[error("dpop_jwk refused")]
    DpopKey(#[source] JwkError),
    /// A filter has an unknown value.
    #[error("{0}")]
    Filter(&'static str),
    /// The state kept changing while we signed.
    #[error("the PKI state kept changing: try again")]
    Busy,
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Problem for EnrollmentError {
    fn kind(&self) -> Kind {
        match self {
            Self::Exists(_)
            | Self::Decided { .. }
            | Self::NotReplaceable { .. }
            | Self::AlreadyRevoked(_) => Kind::Conflict,
            Self::Unknown(_) | Self::UnknownRequest(_) | Self::UnknownSerial(_) => Kind::NotFound,
            Self::Field { .. } => Kind::Unprocessable,
            Self::Key(_) | Self::Possession(_) | Self::DpopKey(_) | Self::Filter(_) | Self::Brought(_) => {
                Kind::Invalid
            }
            Self::TooManyWaiting { from_this_source: true } => Kind::Limited,
            Self::TooManyWaiting { from_this_source: false } | Self::NoBundle | Self::Busy => {
                Kind::Unavailable
            }
            Self::Pki(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Field { field, .. } => {
                json!([{ "type": "value_error", "loc": ["body", field], "msg": self.to_string(), "input": null }])
            }
            Self::Pki(error) => error.detail(),
            Self::Store(_) => json!("the database is not available"),
            Self::Possession(cause) => json!(format!("{self}: {cause}")),
            Self::DpopKey(cause) => json!(format!("{self}: {cause}")),
            other => json!(other.to_string()),
        }
    }

    fn header(&self) -> Option<(axum::http::HeaderName, axum::http::HeaderValue)> {
        match self {
            Self::Pki(error) => error.header(),
            _ => None,
        }
    }
}
