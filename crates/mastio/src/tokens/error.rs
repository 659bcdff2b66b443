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

/// The OAuth error code of an access token whose scope is not enough. It comes with 403 (RFC 6750 §3.1).
pub const INSUFFICIENT_SCOPE: &str = "insufficient_scope";

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
    /// The proof is of another key than the agent's registered one.
    #[error(
        "the DPoP proof is not by the key that is registered for this agent: register it by POST /v1/admin/agents/{{id}}/dpop-jwk"
    )]
    PersistentKey,
    /// A registered key is needed, and the agent has none.
    #[error("no DPoP key is registered for this agent: register it by POST /v1/admin/agents/{{id}}/dpop-jwk")]
    NoPersistentKey,
    /// The agent's key is not here to be signed with.
    #[error("agent credentials not available on proxy")]
    NoStoredKey,
    /// The token came under another scheme than its own.
    #[error(
        "a DPoP-bound token needs the DPoP scheme and a proof, a certificate-bound one the Bearer scheme"
    )]
    Scheme,
    /// The token is bound to a certificate and the connection has none.
    #[error("the access token is bound to a client certificate, and this connection has shown none")]
    CertificateMissing,
    /// The token is bound to another certificate than the connection's.
    #[error("the access token is bound to another client certificate than this connection's")]
    CertificateMismatch,
    /// The token is revoked.
    #[error("invalid access token: it is revoked")]
    Revoked,
    /// A form is not what the grant needs.
    #[error(transparent)]
    Grant(#[from] GrantError),
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
            Self::PersistentKey => "persistent_key_mismatch",
            Self::NoPersistentKey => "persistent_key_unregistered",
            Self::NoStoredKey => "key_not_stored",
            Self::Scheme => "bearer_downgrade",
            Self::CertificateMissing => "certificate_missing",
            Self::CertificateMismatch => "certificate_mismatch",
            Self::Revoked => "token_revoked",
            Self::Grant(error) => error.reason(),
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

/// Why a form of an ordinary OAuth client is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The body is no form, or too long.
    #[error("the body is no application/x-www-form-urlencoded form of at most {0} parameters")]
    Form(usize),
    /// A parameter is missing.
    #[error("parameter {0} is missing")]
    Missing(&'static str),
    /// A parameter stands there twice.
    #[error("parameter {0} must not be repeated")]
    Repeated(String),
    /// Another grant is asked for.
    #[error("grant_type must be client_credentials")]
    GrantType,
    /// Another kind of assertion is given.
    #[error("client_assertion_type must be urn:ietf:params:oauth:client-assertion-type:jwt-bearer")]
    AssertionType,
    /// Another scope is asked for.
    #[error("scope must be absent or local: what an agent may do is read from its row at each request")]
    Scope,
    /// No resource server of this deploy has this name, or several resources were asked for.
    #[error("resource must name one resource of this deploy: see /.well-known/oauth-protected-resource")]
    Target,
    /// The client authenticates in no way, or in two.
    #[error(
        "the client must authenticate by client_assertion (private_key_jwt), or by client_id and its certificate (tls_client_auth)"
    )]
    ClientMissing,
    /// `client_id` is another than the one that is proved.
    #[error("client_id is another client than the one that authenticates")]
    ClientMismatch,
    /// There is neither a proof nor a certificate to bind the token to.
    #[error(
        "a token is issued bound or not at all: send a DPoP proof, or connect with the client certificate"
    )]
    Unbound,
    /// The token was issued to another client.
    #[error("the token was issued to another client")]
    NotYours,
    /// A resource server's credential is missing.
    #[error("a resource server's credential is needed: HTTP Basic with its id and secret")]
    ResourceServerMissing,
    /// A resource server's credential is wrong.
    #[error("the resource server's credential is wrong")]
    ResourceServerWrong,
}

impl GrantError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Form(_) => "form_malformed",
            Self::Missing(_) => "parameter_missing",
            Self::Repeated(_) => "parameter_repeated",
            Self::GrantType => "grant_type",
            Self::AssertionType => "assertion_type",
            Self::Scope => "scope",
            Self::Target => "target",
            Self::ClientMissing => "client_unauthenticated",
            Self::ClientMismatch => "client_mismatch",
            Self::Unbound => "unbound",
            Self::NotYours => "token_of_another",
            Self::ResourceServerMissing => "resource_server_unauthenticated",
            Self::ResourceServerWrong => "resource_server_credential",
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::ClientMissing
            | Self::ClientMismatch
            | Self::ResourceServerMissing
            | Self::ResourceServerWrong => Kind::Unauthenticated,
            _ => Kind::Invalid,
        }
    }
}

impl TokenEndpointError {
    /// The OAuth error code of this refusal at the token, revocation and introspection endpoints.
    ///
    /// Source: RFC 6749 §5.2, RFC 8707 §2, RFC 9449 §5.
    #[must_use]
    pub fn oauth_code(&self) -> &'static str {
        match self {
            Self::Proof(error) if error.asks_for_nonce() => "use_dpop_nonce",
            Self::Proof(_) | Self::ProofMissing | Self::ProofKey => "invalid_dpop_proof",
            Self::Replayed | Self::Grant(GrantError::NotYours) => "invalid_grant",
            Self::Grant(GrantError::GrantType) => "unsupported_grant_type",
            Self::Grant(GrantError::Scope) => "invalid_scope",
            Self::Grant(GrantError::Target) => "invalid_target",
            Self::Grant(error) if error.kind() == Kind::Invalid => "invalid_request",
            other => match other.kind() {
                Kind::Unauthenticated | Kind::Invalid => "invalid_client",
                Kind::Limited | Kind::Halted | Kind::Unavailable => "temporarily_unavailable",
                _ => "server_error",
            },
        }
    }

    /// The OAuth error code of this refusal where an access token is used.
    ///
    /// Source: RFC 6750 §3.1, RFC 9449 §7.1.
    #[must_use]
    pub fn resource_code(&self) -> Option<&'static str> {
        match self {
            Self::TokenMissing => None,
            Self::Proof(error) if error.asks_for_nonce() => Some("use_dpop_nonce"),
            Self::Proof(_) | Self::ProofMissing | Self::ProofKey | Self::Replayed => {
                Some("invalid_dpop_proof")
            }
            Self::AccessToken(TokenError::Scope) => Some(INSUFFICIENT_SCOPE),
            _ => Some("invalid_token"),
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
            | Self::PersistentKey
            | Self::NoPersistentKey
            | Self::Scheme
            | Self::CertificateMissing
            | Self::CertificateMismatch
            | Self::Revoked
            | Self::TokenMissing
            | Self::UnknownKey
            | Self::Assertion(_)
            | Self::Chain
            | Self::Challenge => Kind::Unauthenticated,
            // Another token would not be refused, so it is no 401, after which clients log in again.
            Self::AccessToken(TokenError::Scope) => Kind::Denied,
            Self::AccessToken(_) => Kind::Unauthenticated,
            Self::NoStoredKey => Kind::NotFound,
            Self::Grant(error) => error.kind(),
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
            // The one text that clients match on; it stands in no other answer (wire contract §2).
            Self::Proof(error) if error.asks_for_nonce() => json!("use_dpop_nonce"),
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
            Self::AccessToken(TokenError::Scope) => Some((
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static(
                    "Bearer realm=\"mcp-proxy\", error=\"insufficient_scope\", scope=\"local\"",
                ),
            )),
            other if other.kind() == Kind::Unauthenticated => {
                Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"mcp-proxy\"")))
            }
            _ => None,
        }
    }
}
