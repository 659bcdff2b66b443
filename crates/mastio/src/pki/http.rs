//! `/pki/ca.crt` (wire contract §7) and the certificate for a BYOCA owner's CSR (design §4).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};
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
