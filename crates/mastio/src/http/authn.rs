//! Who an operator is to a handler: their name and role, a dashboard session, the shared secret.
//!
//! A handler that takes an [`AdminCaller`] gets whom `operators/http.rs` has let in for its route; without that nobody
//! is let in. The browser sends its cookie whoever made the page, so a session may change something only with the token
//! that our own pages carry (`X-CSRF-Token`).

use std::sync::Arc;

use aws_lc_rs::hmac;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::error::Kind;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::error::ApiError;

/// What an operator may do. Each may what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Reads.
    Viewer,
    /// Approves, applies, rolls back, enrolls, revokes.
    Operator,
    /// Manages operators, and ends what cannot be begun again.
    Admin,
}

impl Role {
    /// Every role, the weakest first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// As it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// The role of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// The shared secret that operators present. Compared in constant time, never shown.
#[derive(Clone)]
pub struct AdminSecret(Arc<Zeroizing<String>>);

impl AdminSecret {
    /// Takes the secret from the configuration.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self(Arc::new(Zeroizing::new(secret)))
    }

    /// Whether `candidate` is the secret. Where none is configured, nothing is.
    #[must_use]
    pub fn matches(&self, candidate: &[u8]) -> bool {
        if self.0.is_empty() {
            return false;
        }
        // Equal-length digests, so that not even the secret's length shows in the time taken.
        let digest = |bytes: &[u8]| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        digest(self.0.as_bytes()).as_ref().ct_eq(digest(candidate).as_ref()).into()
    }

    /// HMAC-SHA-256 of `text` for one `purpose` under the secret, base64url: another secret gives another digest.
    #[must_use]
    pub fn keyed_digest(&self, purpose: &str, text: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes());
        URL_SAFE_NO_PAD.encode(hmac::sign(&key, format!("mastio {purpose}\0{text}").as_bytes()))
    }
}

/// A dashboard session that a request's cookie proved. The dashboard's own layer puts it into the extensions.
#[derive(Clone)]
pub struct Session {
    /// How the audit log names the operator.
    pub actor: String,
    /// What they may do, as of this request.
    pub role: Role,
    /// What every change under this session has to carry.
    pub csrf_token: String,
}

impl Session {
    /// Whether `candidate` is this session's CSRF token.
    #[must_use]
    pub fn accepts(&self, candidate: &[u8]) -> bool {
        self.csrf_token.as_bytes().ct_eq(candidate).into()
    }
}

/// An operator who has proved who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminCaller {
    /// How the audit log names the operator.
    pub actor: String,
    /// What they may do.
    pub role: Role,
}

impl AdminCaller {
    /// How the audit log names whoever has the shared secret.
    pub const SHARED: &str = "admin";

    /// Whoever has the shared secret.
    #[must_use]
    pub fn shared() -> Self {
        Self { actor: Self::SHARED.to_owned(), role: Role::Admin }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for AdminCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(|| ApiError::new(Kind::Unauthenticated, "missing X-Admin-Secret header"))
    }
}
