//! The operator's credential: the `X-Admin-Secret` header, or a dashboard session.
//!
//! The browser sends its cookie whoever made the page, so a session may change something only with the token that
//! our own pages carry (`X-CSRF-Token`).

use std::sync::Arc;

use aws_lc_rs::hmac;
use axum::extract::FromRequestParts;
use axum::http::HeaderValue;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::error::Kind;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::error::ApiError;

/// The shared secret that operators present. Compared in constant time, never shown.
#[derive(Clone)]
pub struct AdminSecret(Arc<Zeroizing<String>>);

impl AdminSecret {
    /// Takes the secret from the configuration.
    #[must_use]
    pub fn new(secret: String) -> Self {
        Self(Arc::new(Zeroizing::new(secret)))
    }

    /// Whether `candidate` is the secret.
    #[must_use]
    pub fn matches(&self, candidate: &[u8]) -> bool {
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

/// An operator who presented the admin secret, or has a session.
#[derive(Debug, Clone)]
pub struct AdminCaller {
    /// How the audit log names the operator.
    pub actor: String,
}

impl AdminCaller {
    fn from_session(parts: &Parts) -> Result<Self, ApiError> {
        let Some(session) = parts.extensions.get::<Session>() else {
            return Err(ApiError::new(Kind::Unauthenticated, "missing X-Admin-Secret header"));
        };
        let token = parts.headers.get("x-csrf-token").map_or(&[][..], HeaderValue::as_bytes);
        if !parts.method.is_safe() && !session.accepts(token) {
            return Err(ApiError::new(Kind::Denied, "missing or wrong X-CSRF-Token header"));
        }
        Ok(Self { actor: session.actor.clone() })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for AdminCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        // `app.rs` hands the secret in as a request extension; without one every caller is refused.
        let Some(secret) = parts.extensions.get::<AdminSecret>().cloned() else {
            return Err(ApiError::new(Kind::Internal, "Internal server error"));
        };
        let mut values = parts.headers.get_all("x-admin-secret").iter();
        let candidate = match (values.next(), values.next()) {
            (None, _) => return Self::from_session(parts),
            (Some(candidate), None) => candidate,
            (Some(_), Some(_)) => {
                return Err(ApiError::new(Kind::Unauthenticated, "more than one X-Admin-Secret header"));
            }
        };
        if !secret.matches(candidate.as_bytes()) {
            return Err(ApiError::new(Kind::Denied, "invalid admin secret"));
        }
        Ok(Self { actor: "admin".to_owned() })
    }
}
