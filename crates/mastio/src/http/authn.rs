//! The operator's credential: the `X-Admin-Secret` header.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
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

    fn matches(&self, candidate: &[u8]) -> bool {
        // Equal-length digests, so that not even the secret's length shows in the time taken.
        let digest = |bytes: &[u8]| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        digest(self.0.as_bytes()).as_ref().ct_eq(digest(candidate).as_ref()).into()
    }
}

/// An operator who presented the admin secret.
#[derive(Debug, Clone)]
pub struct AdminCaller {
    /// How the audit log names the operator.
    pub actor: String,
}

impl<S: Send + Sync> FromRequestParts<S> for AdminCaller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        // `app.rs` hands the secret in as a request extension; without one every caller is refused.
        let Some(secret) = parts.extensions.get::<AdminSecret>().cloned() else {
            return Err(ApiError::new(Kind::Internal, "Internal server error"));
        };
        let mut values = parts.headers.get_all("x-admin-secret").iter();
        let (Some(candidate), None) = (values.next(), values.next()) else {
            return Err(ApiError::new(Kind::Unauthenticated, "missing X-Admin-Secret header"));
        };
        if !secret.matches(candidate.as_bytes()) {
            return Err(ApiError::new(Kind::Denied, "invalid admin secret"));
        }
        Ok(Self { actor: "admin".to_owned() })
    }
}
