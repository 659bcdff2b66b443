//! Why no token is issued, or why one is not accepted.

use axum::http::{HeaderName, HeaderValue, header};
use mastio_core::dpop::ProofError;
use mastio_core::error::Kind;
use mastio_core::token::assertion::AssertionError;
use mastio_core::token::claims::TokenError;
use serde_json::{Value, json};

use crate::enrollment::IdentityError;
use crate::http::error::Problem;
use crate::pki::PkiError;
use crate::store::StoreError;
use crate::updates::halt::Halted;

/// Why a token endpoint refuses.
#[derive(Debug, thiserror::Error)]
pub enum TokenEndpointError {
    /// Signing is halted.
    #[error(transparent)]
    Halted(#[from] Halted),
    /// No proof, or more than one.
    #[error("exactly one DPoP proof is required: no token is issued or accepted without")]
    ProofMissing,
    /// The proof is refused.
    #[error("Invalid DPoP proof: {0}")]
    Proof(ProofError),
    /// A `jti` was used before.
    #[error("DPoP proof replay detected")]
    Replayed,
    /// The proof is of another key than the token's.
    #[error("Invalid DPoP proof: its key is not the one that the token is bound to")]
    ProofKey,
    /// The token came under another scheme than DPoP.
    #[error("a DPoP-bound token needs the DPoP scheme and a proof")]
    Scheme,
    /// There is no token.
    #[error("missing access token")]
    TokenMissing,
    /// The access token is refused.
    #[error("invalid access token: {0}")]
    AccessToken(TokenError),
    /// The key that is said to have signed is not one of ours, or past its grace.
    #[error("invalid access token: unknown key")]
    UnknownKey,
    /// The assertion is refused.
    #[error("invalid client assertion: {0}")]
    Assertion(AssertionError),
    /// The assertion's chain cannot be read.
    #[error("invalid client assertion: x5c cannot be read")]
    Chain,
    /// The challenge is unknown, used, expired, or another's.
    #[error("invalid or expired challenge")]
    Challenge,
    /// The agent is not established.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The state kept changing.
    #[error("the PKI state kept changing: try again")]
    Stale,
    /// More wait than there is room for.
    #[error("overloaded: try again")]
    Busy,
    /// Redis is away, and with it the protection against replays.
    #[error("replay protection is not available: nothing was issued, try again")]
    Unguarded,
    /// The audit log does not take the event, so nothing was done.
    #[error("the audit log cannot be written: nothing was issued")]
    AuditUnavailable,
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl TokenEndpointError {
    /// Stable, snake case; a label of the refusal counter.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Halted(_) => "sign_halted",
            Self::ProofMissing => "proof_missing",
            Self::Proof(error) => error.reason(),
            Self::Replayed => "replayed",
            Self::ProofKey => "proof_key_mismatch",
            Self::Scheme => "bearer_downgrade",
            Self::TokenMissing => "token_missing",
            Self::AccessToken(error) => error.reason(),
            Self::UnknownKey => "token_key_unknown",
            Self::Assertion(error) => error.reason(),
            Self::Chain => "assertion_chain_malformed",
            Self::Challenge => "challenge_invalid",
            Self::Identity(error) => error.reason(),
            Self::Stale => "state_moved",
            Self::Busy => "overloaded",
            Self::Unguarded => "replay_protection_unavailable",
            Self::AuditUnavailable => "audit_unavailable",
            Self::Pki(_) | Self::Store(_) => "unavailable",
        }
    }
}

impl Problem for TokenEndpointError {
    fn kind(&self) -> Kind {
        match self {
            Self::Halted(halted) => halted.kind(),
            Self::Assertion(AssertionError::Lifetime { .. }) => Kind::Invalid,
            Self::ProofMissing
            | Self::Proof(_)
            | Self::Replayed
            | Self::ProofKey
            | Self::Scheme
            | Self::TokenMissing
            | Self::AccessToken(_)
            | Self::UnknownKey
            | Self::Assertion(_)
            | Self::Chain
            | Self::Challenge => Kind::Unauthenticated,
            Self::Identity(error) => error.kind(),
            Self::Stale | Self::Busy | Self::Unguarded | Self::AuditUnavailable => Kind::Unavailable,
            Self::Pki(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Identity(error) => error.detail(),
            Self::Pki(error) => error.detail(),
            Self::Store(_) => json!("the database is not available"),
            other => json!(other.to_string()),
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Halted(halted) => halted.header(),
            Self::Pki(error) => error.header(),
            Self::Proof(ProofError::HtuMismatch { .. }) => Some((
                HeaderName::from_static("x-cullis-hint"),
                HeaderValue::from_static("htu_mismatch_check_proxy_public_url"),
            )),
            other if other.kind() == Kind::Unauthenticated => {
                Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"mcp-proxy\"")))
            }
            _ => None,
        }
    }
}
