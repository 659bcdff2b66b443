//! `/pki/ca.crt` (wire contract §7), revocation lists, and the certificate for a BYOCA owner's CSR (design §4).

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};
use mastio_core::x509::crl::crl_pem;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Pki;
use crate::http::authn::AdminCaller;
use crate::http::cache::cached;
use crate::http::error::ApiError;
use crate::http::json::Json;
use crate::http::limits::{per_minute, per_source};

/// Requests a minute from one address for what anybody may read (wire contract §10).
const PUBLIC_PER_MINUTE: u32 = 30;

/// The routes of this capability.
pub fn routes(pki: Arc<Pki>) -> Router {
    let limited = || from_fn_with_state(per_minute(PUBLIC_PER_MINUTE), per_source);
    Router::new()
        .route("/pki/ca.crt", get(show_ca).layer(limited()))
        .route("/.well-known/cullis/connector-bootstrap", get(show_bootstrap).layer(limited()))
        .route("/pki/crl", get(show_crl).layer(limited()))
        .route("/pki/crl/{key_id}", get(show_crl_of).layer(limited()))
        .route("/pki/crl.pem", get(show_crls).layer(limited()))
        .route("/v1/admin/pki/byoca-certificates", post(issue_byoca_certificate))
        .with_state(pki)
}

/// The current Org CA first, then the retiring ones.
async fn show_ca(headers: HeaderMap, State(pki): State<Arc<Pki>>) -> Response {
    let bundle = pki.authority().bundle_pem();
    let mut response = cached(&headers, &bundle, "application/x-pem-file", "public, max-age=300");
    response
        .headers_mut()
        .insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("inline; filename=\"org-ca.pem\""));
    response
}

/// Where a client that knows nothing but our address begins (wire contract §7).
async fn show_bootstrap(headers: HeaderMap, State(pki): State<Arc<Pki>>) -> Response {
    let authority = pki.authority();
    let body = json!({
        "version": 1,
        "mode": "configured",
        "org_id": authority.org_id,
        "trust_domain": pki.trust_domain,
        "ca_fingerprint_sha256": authority.org_ca.fingerprint(),
        "urls": {
            "ca": "/pki/ca.crt",
            "enrollment_start": "/v1/enrollment/start",
            "enrollment_status_template": "/v1/enrollment/{session_id}/status",
            "jwks": "/.well-known/jwks-local.json",
        },
    });
    cached(&headers, body.to_string(), "application/json", "public, max-age=60")
}

/// RFC 2585 §4.
const CRL_TYPE: &str = "application/pkix-crl";
/// What was revoked a moment ago must not wait for a cache; the ETag saves the bytes.
const CRL_CACHE: &str = "public, no-cache";

/// The list of the key that issues agents' certificates, DER.
async fn show_crl(headers: HeaderMap, State(pki): State<Arc<Pki>>) -> Result<Response, ApiError> {
    Ok(cached(&headers, pki.crl(None).await?.der()?, CRL_TYPE, CRL_CACHE))
}

/// The list of one key of ours, by its identifier in hex, DER.
async fn show_crl_of(
    headers: HeaderMap,
    State(pki): State<Arc<Pki>>,
    Path(key_id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(cached(&headers, pki.crl(Some(&key_id)).await?.der()?, CRL_TYPE, CRL_CACHE))
}

/// Every list of ours, PEM.
async fn show_crls(headers: HeaderMap, State(pki): State<Arc<Pki>>) -> Result<Response, ApiError> {
    let mut text = String::new();
    for crl in pki.crls().await? {
        text.push_str(&crl_pem(&crl.der()?));
    }
    Ok(cached(&headers, &text, "application/x-pem-file", CRL_CACHE))
}

#[derive(Deserialize)]
struct IssueByoca {
    agent_name: String,
    csr_pem: String,
}

async fn issue_byoca_certificate(
    admin: AdminCaller,
    State(pki): State<Arc<Pki>>,
    Json(body): Json<IssueByoca>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let issued = pki.issue_byoca(&body.agent_name, &body.csr_pem, &admin.actor).await?;
    Ok((
        StatusCode::CREATED,
        axum::Json(json!({
            "agent_id": issued.agent_id,
            "cert_pem": issued.certificate.to_pem(),
            "ca_pem": issued.org_ca.to_pem(),
            "serial": issued.certificate.serial_hex(),
            "not_after": issued.certificate.not_after().to_rfc3339(),
        })),
    ))
}
