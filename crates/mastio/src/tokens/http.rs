//! `/v1/auth/*` and the JWKS (wire contract §4).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{CHALLENGE_LIFETIME_S, TokenEndpointError, Tokens};
use crate::http::cache::cached;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::Json;
use crate::http::limits::{per_minute, per_source};
use crate::http::urls::ExternalUrls;
use crate::metrics::Metrics;

const TOKEN_PATH: &str = "/v1/auth/token";
/// Requests a minute for the JWKS from one address (wire contract §10).
const JWKS_PER_MINUTE: u32 = 30;

/// What the handlers need.
#[derive(Clone)]
struct Endpoint {
    tokens: Arc<Tokens>,
    urls: ExternalUrls,
    metrics: Arc<Metrics>,
}

/// The routes of this capability.
pub fn routes(tokens: Arc<Tokens>, urls: ExternalUrls, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/v1/auth/login-challenge", post(create_challenge))
        .route("/v1/auth/sign-challenged-assertion", post(countersign_assertion))
        .route(TOKEN_PATH, post(issue_token))
        .route(
            "/.well-known/jwks-local.json",
            get(show_jwks).layer(from_fn_with_state(per_minute(JWKS_PER_MINUTE), per_source)),
        )
        .with_state(Endpoint { tokens, urls, metrics })
}

async fn create_challenge(
    context: Context,
    State(endpoint): State<Endpoint>,
) -> Result<axum::Json<Value>, ApiError> {
    let challenge = endpoint.tokens.challenge(&context).await?;
    Ok(axum::Json(json!({
        "nonce": challenge.nonce, "expires_in": CHALLENGE_LIFETIME_S, "agent_id": challenge.agent_id,
    })))
}

#[derive(Deserialize)]
struct Countersign {
    client_assertion: String,
    nonce: String,
}

async fn countersign_assertion(
    context: Context,
    State(endpoint): State<Endpoint>,
    Json(body): Json<Countersign>,
) -> Result<axum::Json<Value>, ApiError> {
    let signed = endpoint.tokens.countersign(&context, &body.client_assertion, &body.nonce).await;
    let (agent_id, signature) = signed.inspect_err(|error| endpoint.metrics.token_refused(error.reason()))?;
    Ok(axum::Json(json!({
        "client_assertion": body.client_assertion, "agent_id": agent_id, "mastio_signature": signature,
    })))
}

#[derive(Deserialize)]
struct IssueToken {
    client_assertion: String,
}

async fn issue_token(
    context: Context,
    headers: HeaderMap,
    State(endpoint): State<Endpoint>,
    Json(body): Json<IssueToken>,
) -> Result<axum::Json<Value>, ApiError> {
    let started = std::time::Instant::now();
    let urls = endpoint.urls.of(&headers, TOKEN_PATH);
    let issued = match endpoint.tokens.pki().halted() {
        // The halt is what every caller must read, whatever else is wrong with the request.
        Err(halted) => Err(halted.into()),
        Ok(()) => match proof(&headers) {
            Ok(proof) => endpoint.tokens.issue(&context, &body.client_assertion, proof, &urls).await,
            Err(error) => Err(error),
        },
    };
    let token = issued.inspect_err(|error| endpoint.metrics.token_refused(error.reason()))?;
    endpoint.metrics.token_issued(started.elapsed());
    Ok(axum::Json(json!({
        "access_token": token.access_token,
        "token_type": "Bearer",
        "expires_in": token.expires_in,
        "scope": "local",
        "issued_by": token.issuer,
    })))
}

/// The one DPoP header (RFC 9449 §4.3 step 1).
pub fn proof(headers: &HeaderMap) -> Result<&str, TokenEndpointError> {
    let mut values = headers.get_all("dpop").iter();
    match (values.next().and_then(|value| value.to_str().ok()), values.next()) {
        (Some(proof), None) => Ok(proof),
        _ => Err(TokenEndpointError::ProofMissing),
    }
}

/// The access token of an `Authorization: DPoP …` header. A bound token under `Bearer` is a downgrade and refused.
pub fn access_token(headers: &HeaderMap) -> Result<&str, TokenEndpointError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(TokenEndpointError::TokenMissing);
    };
    let (scheme, token) =
        value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(TokenEndpointError::TokenMissing)?;
    if scheme.eq_ignore_ascii_case("dpop") { Ok(token.trim()) } else { Err(TokenEndpointError::Scheme) }
}

/// `GET /.well-known/jwks-local.json` (wire contract §4.8).
async fn show_jwks(context: Context, headers: HeaderMap, State(endpoint): State<Endpoint>) -> Response {
    let authority = endpoint.tokens.pki().authority();
    let now = context.now.seconds();
    let keys: Vec<Value> = authority
        .token_keys
        .iter()
        .filter(|key| key.verifies_at(now))
        .map(|key| {
            let mut jwk = key.public.to_value();
            if let Some(object) = jwk.as_object_mut() {
                object.insert("use".to_owned(), json!("sig"));
                object.insert("alg".to_owned(), json!("ES256"));
                object.insert("kid".to_owned(), json!(key.kid));
            }
            jwk
        })
        .collect();
    if keys.is_empty() {
        return ApiError::new(mastio_core::error::Kind::Unavailable, "no token key yet").into_response();
    }
    let body = json!({ "keys": keys }).to_string();
    cached(&headers, &body, "application/json", "public, max-age=60, stale-while-revalidate=60")
}
