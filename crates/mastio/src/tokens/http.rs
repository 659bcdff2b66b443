//! `/v1/auth/*` and the JWKS (wire contract §4), and what ordinary OAuth clients and resource servers need besides:
//! metadata, the grant as a form, introspection and revocation.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{OriginalUri, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mastio_core::error::Kind;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::GrantError;
use super::form::Form;
use super::grant::Names;
use super::metadata::{
    self, GATEWAY_PATH, INTROSPECT_PATH, PROTECTED_RESOURCE_PATH, REVOKE_PATH, TOKEN_PATH,
};
use super::resource_servers::{self, ResourceServer, created_json};
use super::{AccessToken, CHALLENGE_LIFETIME_S, Shown, TokenEndpointError, Tokens};
use crate::config::EgressDpop;
use crate::http::authn::AdminCaller;
use crate::http::body::read;
use crate::http::cache::cached;
use crate::http::context::Context;
use crate::http::error::{ApiError, Problem as _};
use crate::http::json::{self, BODY_BYTES_MAX, Json};
use crate::http::limits::{per_minute, per_source};
use crate::http::urls::ExternalUrls;
use crate::metrics::Metrics;
use crate::store::refusals::{Refusal, Refusals};

/// Requests a minute from one address for each document that anybody may read (wire contract §10).
const PUBLIC_PER_MINUTE: u32 = 30;
const CHALLENGE_PATH: &str = "/v1/auth/login-challenge";
const SIGN_PATH: &str = "/v1/auth/sign-assertion";
const COUNTERSIGN_PATH: &str = "/v1/auth/sign-challenged-assertion";
/// Where agents are asked for by agents.
const EGRESS: &str = "/v1/egress/";
/// Bytes of a form at most: an assertion and a handful of short parameters.
const FORM_BYTES_MAX: usize = 128 * 1024;

/// What the handlers need.
#[derive(Clone)]
struct Endpoint {
    tokens: Arc<Tokens>,
    urls: ExternalUrls,
    metrics: Arc<Metrics>,
    refusals: Refusals,
}

impl Endpoint {
    /// Counts a refusal, and records it where it says something about the caller.
    async fn refused(&self, context: &Context, route: &'static str, error: &TokenEndpointError) {
        self.metrics.token_refused(error.reason());
        record(&self.refusals, context, route, error).await;
    }

    /// Records a body that could not even be read as a request, and gives the answer.
    async fn unreadable(&self, context: &Context, route: &'static str, error: ApiError) -> Response {
        let reason = match error.kind() {
            Kind::TooLarge => "body_too_large",
            Kind::TimedOut => "body_too_slow",
            _ => "body_malformed",
        };
        self.metrics.token_refused(reason);
        record_reason(&self.refusals, context, route, reason).await;
        error.into_response()
    }

    fn names(&self, headers: &HeaderMap, path: &str) -> Names {
        Names { bases: self.urls.of(headers, ""), endpoints: self.urls.of(headers, path) }
    }

    /// Our URL as the caller knows it.
    fn base(&self, headers: &HeaderMap) -> Result<String, ApiError> {
        self.urls.base(headers).ok_or_else(|| {
            ApiError::new(
                Kind::Invalid,
                "the request's Host is none of this server's: set MCP_PROXY_PROXY_PUBLIC_URL to the URL that clients use",
            )
        })
    }
}

/// Records a refusal, unless it is ours: a halt, overload, a database that is away.
pub async fn record(refusals: &Refusals, context: &Context, route: &'static str, error: &TokenEndpointError) {
    if matches!(error.kind(), Kind::Unauthenticated | Kind::Denied | Kind::Invalid) {
        record_reason(refusals, context, route, error.reason()).await;
    }
}

async fn record_reason(refusals: &Refusals, context: &Context, route: &'static str, reason: &'static str) {
    refusals
        .record(Refusal {
            route,
            reason,
            request_id: &context.request_id,
            address: context.source,
            now: context.now.seconds(),
        })
        .await;
}

/// The routes of this capability.
pub fn routes(tokens: Arc<Tokens>, urls: ExternalUrls, metrics: Arc<Metrics>, refusals: Refusals) -> Router {
    let limited = || from_fn_with_state(per_minute(PUBLIC_PER_MINUTE), per_source);
    Router::new()
        .route(CHALLENGE_PATH, post(create_challenge))
        .route(COUNTERSIGN_PATH, post(countersign_assertion))
        .route(SIGN_PATH, post(sign_assertion))
        .route(TOKEN_PATH, post(issue_token))
        .route("/v1/egress/models", get(list_models))
        .route("/v1/models", get(list_models))
        .route(REVOKE_PATH, post(revoke_token))
        .route(INTROSPECT_PATH, post(introspect_token))
        .route("/v1/admin/resource-servers", post(create_resource_server).get(list_resource_servers))
        .route("/v1/admin/resource-servers/{resource_server_id}", delete(delete_resource_server))
        .route("/.well-known/jwks-local.json", get(show_jwks).layer(limited()))
        .route("/.well-known/oauth-authorization-server", get(show_authorization_server).layer(limited()))
        .route(PROTECTED_RESOURCE_PATH, get(show_server_as_resource).layer(limited()))
        .route("/.well-known/oauth-protected-resource/v1/mcp", get(show_gateway_as_resource).layer(limited()))
        .with_state(Endpoint { tokens, urls, metrics, refusals })
}

async fn create_challenge(
    context: Context,
    State(endpoint): State<Endpoint>,
) -> Result<axum::Json<Value>, ApiError> {
    let challenge = endpoint.tokens.challenge(&context).await;
    if let Err(error) = &challenge {
        endpoint.refused(&context, CHALLENGE_PATH, error).await;
    }
    let challenge = challenge?;
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
    if let Err(error) = &signed {
        endpoint.refused(&context, COUNTERSIGN_PATH, error).await;
    }
    let (agent_id, signature) = signed?;
    Ok(axum::Json(json!({
        "client_assertion": body.client_assertion, "agent_id": agent_id, "mastio_signature": signature,
    })))
}

/// `POST /v1/auth/sign-assertion` (wire contract §4.4).
async fn sign_assertion(
    context: Context,
    State(endpoint): State<Endpoint>,
) -> Result<axum::Json<Value>, ApiError> {
    let signed = endpoint.tokens.sign_assertion(&context).await;
    if let Err(error) = &signed {
        endpoint.refused(&context, SIGN_PATH, error).await;
    }
    let signed = signed?;
    Ok(axum::Json(json!({
        "client_assertion": signed.client_assertion,
        "agent_id": signed.agent_id,
        "mastio_signature": signed.mastio_signature,
    })))
}

#[derive(Deserialize)]
struct IssueToken {
    client_assertion: String,
}

/// The SDK's JSON, or the form of an ordinary client: the same tokens.
async fn issue_token(context: Context, State(endpoint): State<Endpoint>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let started = std::time::Instant::now();
    let is_form = is_form(&parts.headers);
    let body = match read(body, if is_form { FORM_BYTES_MAX } else { BODY_BYTES_MAX }).await {
        Ok(body) => body,
        Err(error) => return endpoint.unreadable(&context, TOKEN_PATH, error).await,
    };
    let issued = match endpoint.tokens.pki().halted() {
        // The halt is what every caller must read, whatever else is wrong with the request.
        Err(halted) => Err(halted.into()),
        Ok(()) if is_form => endpoint.grant(&context, &parts.headers, &body).await,
        Ok(()) => match json::parse::<IssueToken>(&body) {
            Err(error) => return endpoint.unreadable(&context, TOKEN_PATH, error).await,
            Ok(body) => match proof(&parts.headers) {
                Ok(proof) => {
                    let urls = endpoint.urls.of(&parts.headers, TOKEN_PATH);
                    endpoint.tokens.issue(&context, &body.client_assertion, proof, &urls).await
                }
                Err(error) => Err(error),
            },
        },
    };
    match issued {
        Ok(token) => {
            endpoint.metrics.token_issued(started.elapsed());
            axum::Json(granted(&token, is_form)).into_response()
        }
        Err(error) => {
            endpoint.refused(&context, TOKEN_PATH, &error).await;
            if is_form { oauth_refusal(error) } else { ApiError::from(error).into_response() }
        }
    }
}

impl Endpoint {
    async fn grant(
        &self,
        context: &Context,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<AccessToken, TokenEndpointError> {
        let form = Form::parse(body)?;
        let proof = at_most_one_proof(headers)?;
        self.tokens.grant(context, &form, proof, &self.names(headers, TOKEN_PATH)).await
    }
}

fn granted(token: &AccessToken, is_form: bool) -> Value {
    json!({
        "access_token": token.access_token,
        // The SDK's contract says Bearer and the SDK does not look; an ordinary client needs the scheme to use.
        "token_type": if is_form { token.confirmation.token_type() } else { "Bearer" },
        "expires_in": token.expires_in,
        "scope": "local",
        "issued_by": token.issuer,
    })
}

const MODELS_PATH: &str = "/v1/egress/models";

/// `GET /v1/egress/models` (wire contract §6): no model is served here, and the SDK asks with its access token.
async fn list_models(
    context: Context,
    State(endpoint): State<Endpoint>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<axum::Json<Value>, ApiError> {
    let urls = endpoint.urls.of(&headers, uri.path());
    let judged = match shown(&headers) {
        Ok(shown) => endpoint.tokens.admit_once(&context, shown, "GET", &urls).await,
        Err(error) => Err(error),
    };
    if let Err(error) = judged {
        record(&endpoint.refusals, &context, MODELS_PATH, &error).await;
        return Err(error.into());
    }
    Ok(axum::Json(json!({ "object": "list", "data": [] })))
}

/// What the two verbs below need.
pub struct Proofs {
    /// Judges proofs.
    pub tokens: Arc<Tokens>,
    /// By which a proof's `htu` may name us.
    pub urls: ExternalUrls,
    /// Whether persistent keys are asked for.
    pub egress: EgressDpop,
    /// Where refusals are recorded.
    pub refusals: Refusals,
}

impl Proofs {
    /// Judges the persistent DPoP key on `/v1/egress`, where the certificate is the route's to judge. A request that
    /// brings an access token instead is the route's alone.
    pub async fn prove_persistent_key(
        &self,
        context: &Context,
        headers: &HeaderMap,
        method: &Method,
        path: &str,
    ) -> Result<(), ApiError> {
        if !path.starts_with(EGRESS) || headers.contains_key(header::AUTHORIZATION) {
            return Ok(());
        }
        let urls = self.urls.of(headers, path);
        let proven = match at_most_one_proof(headers) {
            Ok(proof) => {
                let method = method.as_str();
                self.tokens.prove_persistent_key(context, proof, self.egress, method, &urls).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = proven {
            record(&self.refusals, context, EGRESS, &error).await;
            return Err(error.into());
        }
        Ok(())
    }

    /// The present nonce, for every answer that a DPoP client may see (wire contract §2, RFC 9449 §8.2).
    #[must_use]
    pub fn nonce(&self, context: &Context, path: &str) -> Option<HeaderValue> {
        let offered = path.starts_with("/v1/")
            && !path.starts_with("/v1/admin/")
            && (self.tokens.requires_nonce() || !path.starts_with("/v1/auth/"));
        let nonce = offered.then(|| self.tokens.nonce(context.now.seconds()))?;
        HeaderValue::from_str(&nonce).ok()
    }
}

/// `POST /v1/auth/revoke` (RFC 7009).
async fn revoke_token(context: Context, State(endpoint): State<Endpoint>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match form_body(&parts.headers, body).await {
        Ok(body) => body,
        Err(error) => return endpoint.unreadable(&context, REVOKE_PATH, error).await,
    };
    let revoked = match Form::parse(&body) {
        Ok(form) => {
            endpoint.tokens.revoke(&context, &form, &endpoint.names(&parts.headers, REVOKE_PATH)).await
        }
        Err(error) => Err(error.into()),
    };
    match revoked {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => {
            endpoint.refused(&context, REVOKE_PATH, &error).await;
            oauth_refusal(error)
        }
    }
}

/// `POST /v1/auth/introspect` (RFC 7662).
async fn introspect_token(context: Context, State(endpoint): State<Endpoint>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match form_body(&parts.headers, body).await {
        Ok(body) => body,
        Err(error) => return endpoint.unreadable(&context, INTROSPECT_PATH, error).await,
    };
    match endpoint.introspect(&context, &parts.headers, &body).await {
        Ok(answer) => axum::Json(answer).into_response(),
        Err(error) => {
            endpoint.refused(&context, INTROSPECT_PATH, &error).await;
            let mut response = oauth_refusal(error);
            if response.status() == StatusCode::UNAUTHORIZED {
                let challenge = HeaderValue::from_static("Basic realm=\"mcp-proxy\", charset=\"UTF-8\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        }
    }
}

impl Endpoint {
    async fn introspect(
        &self,
        context: &Context,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<Value, TokenEndpointError> {
        let (id, secret) = basic(headers).ok_or(GrantError::ResourceServerMissing)?;
        let form = Form::parse(body)?;
        let token = form.require("token")?;
        let found = self.tokens.introspect(context, (&id, &secret), token).await?;
        let Some(claims) = found else { return Ok(json!({ "active": false })) };
        Ok(json!({
            "active": true,
            "iss": claims.issuer,
            "sub": claims.subject,
            "client_id": claims.subject,
            "aud": claims.audience,
            "scope": claims.scope,
            "token_type": claims.confirmation.token_type(),
            "iat": claims.issued_at.0,
            "exp": claims.expires_at.0,
            "jti": claims.jwt_id,
            "cnf": claims.confirmation.to_value(),
            "principal_type": claims.principal_type,
            "org": claims.org,
        }))
    }
}

/// Id and secret of `Authorization: Basic`, each escaped as in a form (RFC 6749 §2.3.1).
pub(crate) fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let unescape =
        |text: &str| form_urlencoded::parse(text.as_bytes()).next().map(|(text, _)| text.into_owned());
    let (id, secret) = decoded.split_once(':')?;
    Some((unescape(id)?, unescape(secret)?))
}

fn is_form(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = content_type.split(';').next().unwrap_or("").trim();
    essence.eq_ignore_ascii_case("application/x-www-form-urlencoded")
}

async fn form_body(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    if !is_form(headers) {
        return Err(ApiError::new(Kind::Invalid, "the body must be application/x-www-form-urlencoded"));
    }
    read(body, FORM_BYTES_MAX).await
}

/// A refusal as OAuth clients read it (RFC 6749 §5.2), with our own `detail` beside it.
fn oauth_refusal(error: TokenEndpointError) -> Response {
    let (code, reason, hint) = (error.oauth_code(), error.reason(), error.to_string());
    let mut response = ApiError::from(error).into_response();
    if response.status() == StatusCode::UNAUTHORIZED && code != "invalid_client" {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response.headers_mut().remove(header::WWW_AUTHENTICATE);
    }
    // The characters that RFC 6749 §5.2 allows there.
    let allowed = |c: char| matches!(c, ' '..='!' | '#'..='[' | ']'..='~');
    let description: String = hint.chars().map(|c| if allowed(c) { c } else { '-' }).collect();
    let body = json!({
        "error": code,
        "error_description": description,
        "detail": { "reason": reason, "hint": hint },
    });
    *response.body_mut() = Body::from(body.to_string());
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response
}

/// The one DPoP header (RFC 9449 §4.3 step 1).
pub fn proof(headers: &HeaderMap) -> Result<&str, TokenEndpointError> {
    at_most_one_proof(headers)?.ok_or(TokenEndpointError::ProofMissing)
}

fn at_most_one_proof(headers: &HeaderMap) -> Result<Option<&str>, TokenEndpointError> {
    let mut values = headers.get_all("dpop").iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (None, None) => Ok(None),
        (Some(Ok(proof)), None) => Ok(Some(proof)),
        _ => Err(TokenEndpointError::ProofMissing),
    }
}

/// The access token of an `Authorization` header, with its scheme and the proof beside it.
pub fn shown(headers: &HeaderMap) -> Result<Shown<'_>, TokenEndpointError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(TokenEndpointError::TokenMissing);
    };
    let (scheme, token) =
        value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(TokenEndpointError::TokenMissing)?;
    let dpop_scheme = scheme.eq_ignore_ascii_case("dpop");
    if !dpop_scheme && !scheme.eq_ignore_ascii_case("bearer") {
        return Err(TokenEndpointError::TokenMissing);
    }
    Ok(Shown { access_token: token.trim(), dpop_scheme, proof: at_most_one_proof(headers)? })
}

/// `GET /.well-known/oauth-authorization-server` (RFC 8414).
async fn show_authorization_server(headers: HeaderMap, State(endpoint): State<Endpoint>) -> Response {
    describe(&endpoint, &headers, metadata::authorization_server)
}

/// `GET /.well-known/oauth-protected-resource` (RFC 9728): this server as a whole.
async fn show_server_as_resource(headers: HeaderMap, State(endpoint): State<Endpoint>) -> Response {
    let org_id = &endpoint.tokens.pki().authority().org_id;
    describe(&endpoint, &headers, |base| metadata::protected_resource(base, "", org_id))
}

/// `GET /.well-known/oauth-protected-resource/v1/mcp` (RFC 9728): the gateway.
async fn show_gateway_as_resource(headers: HeaderMap, State(endpoint): State<Endpoint>) -> Response {
    let org_id = &endpoint.tokens.pki().authority().org_id;
    describe(&endpoint, &headers, |base| metadata::protected_resource(base, GATEWAY_PATH, org_id))
}

fn describe(endpoint: &Endpoint, headers: &HeaderMap, of: impl FnOnce(&str) -> Value) -> Response {
    match endpoint.base(headers) {
        Ok(base) => {
            let mut response =
                cached(headers, of(&base).to_string(), "application/json", "public, max-age=60");
            response.headers_mut().insert(header::VARY, HeaderValue::from_static("host"));
            response
        }
        Err(error) => error.into_response(),
    }
}

#[derive(Deserialize)]
struct CreateResourceServer {
    name: String,
    resource: String,
}

async fn create_resource_server(
    admin: AdminCaller,
    State(endpoint): State<Endpoint>,
    Json(body): Json<CreateResourceServer>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let (server, secret) =
        resource_servers::add(endpoint.tokens.pki(), &body.name, &body.resource, &admin.actor).await?;
    let answer = created_json(&server, &secret);
    Ok((StatusCode::CREATED, axum::Json(answer)))
}

async fn list_resource_servers(
    _admin: AdminCaller,
    State(endpoint): State<Endpoint>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let servers = resource_servers::list(endpoint.tokens.pki()).await?;
    Ok(axum::Json(servers.iter().map(ResourceServer::to_json).collect()))
}

async fn delete_resource_server(
    admin: AdminCaller,
    State(endpoint): State<Endpoint>,
    Path(resource_server_id): Path<String>,
) -> Result<StatusCode, ApiError> {
    resource_servers::remove(endpoint.tokens.pki(), &resource_server_id, &admin.actor).await?;
    Ok(StatusCode::NO_CONTENT)
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
        return ApiError::new(Kind::Unavailable, "no token key yet").into_response();
    }
    let body = json!({ "keys": keys }).to_string();
    cached(&headers, &body, "application/json", "public, max-age=60, stale-while-revalidate=60")
}
