//! What can go wrong with operators, mapped once to what a caller is told.

use axum::http::{HeaderName, HeaderValue, header};
use mastio_core::error::Kind;
use serde_json::{Value, json};

use crate::http::authn::Role;
use crate::http::error::Problem;
use crate::store::StoreError;

/// Why an operator was not let in, added or changed.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Nothing was presented.
    #[error("missing X-Admin-Secret header")]
    Missing,
    /// The header stands there twice.
    #[error("more than one X-Admin-Secret header")]
    Repeated,
    /// The name is unknown, the secret is wrong, or the operator is deactivated: the caller is not told which.
    #[error("invalid admin secret")]
    Wrong {
        /// Wrong tries of the address so far, this one included.
        failures: u32,
    },
    /// Too many wrong tries.
    #[error("too many wrong tries from your address: try again in {seconds} s")]
    TooManyTries {
        /// How long to wait.
        seconds: i64,
    },
    /// The token is not the one in the log, or there is nothing to set up.
    #[error("this is not the token of the set-up: it is in the log line setup_open of the newest start")]
    SetupToken,
    /// The organisation cannot be called so.
    #[error("an organisation's name has 1 to 100 characters")]
    Organisation,
    /// The session's token does not stand beside the cookie.
    #[error("missing or wrong X-CSRF-Token header")]
    ForeignRequest,
    /// The operator's role is too weak.
    #[error("this needs the role {}, and {name} has {}: ask an operator who has it", required.as_str(), role.as_str())]
    Role {
        /// Who asks.
        name: String,
        /// What they have.
        role: Role,
        /// What the route asks for.
        required: Role,
    },
    /// The route does not say who may call it.
    #[error("nobody may call this route: it has no line in operators/access.rs")]
    Unlisted,
    /// The name cannot be an operator's.
    #[error("an operator's name {0}")]
    Name(String),
    /// There is no such role.
    #[error("unknown role {0}: one of viewer, operator, admin")]
    UnknownRole(String),
    /// The name is taken.
    #[error(
        "there is or was an operator {0}: choose another name; a deactivated name is not given away again"
    )]
    Exists(String),
    /// There is no such operator.
    #[error("no operator {0}: mastio admin list shows them")]
    Unknown(String),
    /// The operator is deactivated.
    #[error("operator {0} is deactivated, which is for good: add another one")]
    Deactivated(String),
    /// The shared secret is not changed here.
    #[error("operator admin is the shared secret: change MCP_PROXY_ADMIN_SECRET and restart")]
    Shared,
    /// Too many secrets wait to be hashed.
    #[error("too many sign-ins at once: try again")]
    Busy,
    /// The crypto library refused.
    #[error("a secret cannot be hashed")]
    Hash,
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Problem for OperatorError {
    fn kind(&self) -> Kind {
        match self {
            Self::Missing | Self::Repeated => Kind::Unauthenticated,
            Self::Wrong { .. }
            | Self::SetupToken
            | Self::ForeignRequest
            | Self::Role { .. }
            | Self::Unlisted => Kind::Denied,
            Self::TooManyTries { .. } => Kind::Limited,
            Self::Name(_) | Self::Organisation | Self::UnknownRole(_) => Kind::Invalid,
            Self::Exists(_) | Self::Deactivated(_) | Self::Shared => Kind::Conflict,
            Self::Unknown(_) => Kind::NotFound,
            Self::Busy => Kind::Unavailable,
            Self::Hash => Kind::Internal,
            Self::Store(error) => error.kind(),
        }
    }

    fn detail(&self) -> Value {
        let with = |reason: &str| json!({ "reason": reason, "message": self.to_string() });
        match self {
            Self::Role { .. } => with("role_insufficient"),
            Self::Exists(_) => with("operator_exists"),
            Self::Deactivated(_) => with("operator_deactivated"),
            Self::Shared => with("shared_secret"),
            Self::Store(error) => error.detail(),
            other => Value::String(other.to_string()),
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::TooManyTries { seconds } => Some((header::RETRY_AFTER, HeaderValue::from(*seconds))),
            _ => None,
        }
    }
}
