//! Who asked, from where, and when: fixed once for each request.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use mastio_core::time::UnixMicros;

use super::limits::Quotas;

/// What the connection and the clock say about a request. Handlers read the clock here and nowhere else.
#[derive(Debug, Clone)]
pub struct Context {
    /// Unique for each request; in every log line about it.
    pub request_id: String,
    /// When the request arrived.
    pub now: UnixMicros,
    /// The other end of the connection: the client, or a front before it.
    pub peer: SocketAddr,
    /// The address that limits per source count: the client's own, also where a trusted front stands between
    /// ([`super::headers`]).
    pub source: IpAddr,
    /// DER of the certificate whose key the TLS handshake proved, or a configured front in its place
    /// ([`super::front`]). Nothing else about it is known yet: path, standing and revocation are judged where an identity is needed.
    pub client_certificate: Option<Arc<[u8]>>,
    /// The allowances that this request was counted against, for the answer's headers.
    pub quotas: Quotas,
}

impl<S: Send + Sync> FromRequestParts<S> for Context {
    type Rejection = super::error::ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| {
            super::error::ApiError::new(mastio_core::error::Kind::Internal, "Internal server error")
        })
    }
}
