//! `/v1/admin/agents` (wire contract §3.2), what an agent may read of agents (§6), and its own certificate anew.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Extension, Router};
use mastio_core::error::Kind;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::csr::CertificateRequest;
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::external::{Brought, Enrolled};
use super::revocation::{Which, revocation_reason};
use super::{Agent, Agents, EnrollmentError, ProvenAgent};
use crate::http::authn::AdminCaller;
use crate::http::context::Context;
use crate::http::error::{ApiError, Problem as _};
use crate::http::json::{Json, parse};
use crate::pki::PkiError;
use crate::pki::revocation::Revocation;
use crate::store::refusals::{Refusal, Refusals};

const PUBLIC_KEY_PATH: &str = "/v1/egress/agents/{agent_id}/public-key";
const PEERS_PATH: &str = "/v1/egress/peers";
const RENEW_PATH: &str = "/v1/agents/renew";
/// Peers that one answer has, unless asked for fewer, and at most.
const PEERS_DEFAULT: usize = 50;
const PEERS_MAX: usize = 200;
const LIST_ROWS_DEFAULT: i64 = 1000;
const LIST_ROWS_MAX: i64 = 10_000;

/// The routes of this capability.
///
/// Who is refused is recorded in `refusals`.
pub fn routes(agents: Arc<Agents>, refusals: Refusals) -> Router {
    Router::new()
        .route("/v1/admin/agents", post(create_agent).get(list_agents))
        .route("/v1/admin/agents/enroll/byoca", post(enroll_byoca))
        .route("/v1/admin/agents/enroll/spiffe", post(enroll_spiffe))
        .route("/v1/admin/agents/{agent_id}", get(show_agent).delete(remove_agent))
        .route("/v1/admin/agents/{agent_id}/deactivate", post(deactivate_agent))
        .route("/v1/admin/agents/{agent_id}/reactivate", post(reactivate_agent))
        .route("/v1/admin/agents/{agent_id}/renew", post(renew_agent))
        .route("/v1/admin/certs/revoke", post(revoke))
        .route("/v1/admin/certs/revoked", get(list_revoked))
        .route(RENEW_PATH, post(renew_own))
        .route("/v1/admin/agents/{agent_id}/dpop-jwk", post(set_dpop_key))
        .route(PUBLIC_KEY_PATH, get(show_public_key))
        .route(PEERS_PATH, get(list_peers))
        .layer(Extension(refusals))
        .with_state(Arc::clone(&agents))
        .merge(super::approval::http::routes(agents))
}

#[derive(Deserialize)]
struct CreateAgent {
    agent_name: String,
    #[serde(default)]
    display_name: Option<String>,
    #[serde(default)]
    capabilities: Vec<String>,
    #[serde(default)]
    federated: bool,
    #[serde(default)]
    cert_pem: Option<String>,
    #[serde(default)]
    private_key_pem: Option<String>,
}

/// The agent on a connection to a route of ours. Who is refused leaves an event.
async fn caller(
    agents: &Agents,
    refusals: &Refusals,
    context: &Context,
    route: &'static str,
) -> Result<Arc<ProvenAgent>, ApiError> {
    let error = match agents.authenticate(context).await {
        Ok(caller) => return Ok(caller),
        Err(error) => error,
    };
    if error.kind() == Kind::Unauthenticated {
        let refusal = Refusal {
            route,
            reason: error.reason(),
            request_id: &context.request_id,
            address: context.source,
            now: context.now.seconds(),
        };
        refusals.record(refusal).await;
    }
    Err(error.into())
}

async fn create_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Json(body): Json<CreateAgent>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    if body.cert_pem.is_some() || body.private_key_pem.is_some() {
        return Err(ApiError::new(
            Kind::Invalid,
            "bringing a certificate is BYOCA: POST /v1/admin/agents/enroll/byoca",
        ));
    }
    let display_name = body.display_name.unwrap_or_else(|| body.agent_name.clone());
    let created = agents
        .create_managed(&body.agent_name, &display_name, &body.capabilities, body.federated, &admin.actor)
        .await?;
    let agent = created.agent;
    Ok((
        StatusCode::CREATED,
        axum::Json(json!({
            "agent_id": agent.agent_id,
            "display_name": agent.display_name,
            "capabilities": agent.capabilities,
            "federated": agent.federated,
            "cert_pem": agent.cert_pem,
            "private_key_pem": created.private_key_pem.as_str(),
        })),
    ))
}

/// A private key on its way to be compared: wiped when it is dropped.
fn secret<'de, D: serde::Deserializer<'de>>(source: D) -> Result<Zeroizing<String>, D::Error> {
    String::deserialize(source).map(Zeroizing::new)
}

/// What both kinds of enrollment have besides certificate and key.
#[derive(Deserialize)]
struct EnrollCommon {
    agent_name: String,
    #[serde(default)]
    display_name: String,
    #[serde(default)]
    capabilities: Vec<String>,
    #[serde(default)]
    federated: bool,
    #[serde(default)]
    dpop_jwk: Option<Value>,
    #[serde(default)]
    update_existing: bool,
}

impl EnrollCommon {
    fn with(self, cert_pem: String, private_key_pem: Zeroizing<String>) -> Brought {
        Brought {
            agent_name: self.agent_name,
            display_name: self.display_name,
            capabilities: self.capabilities,
            federated: self.federated,
            cert_pem,
            private_key_pem,
            dpop_jwk: self.dpop_jwk,
            update_existing: self.update_existing,
        }
    }
}

#[derive(Deserialize)]
struct EnrollByoca {
    #[serde(flatten)]
    common: EnrollCommon,
    cert_pem: String,
    #[serde(deserialize_with = "secret")]
    private_key_pem: Zeroizing<String>,
}

#[derive(Deserialize)]
struct EnrollSpiffe {
    #[serde(flatten)]
    common: EnrollCommon,
    svid_pem: String,
    #[serde(deserialize_with = "secret")]
    svid_key_pem: Zeroizing<String>,
    #[serde(default)]
    trust_bundle_pem: Option<String>,
}

fn enrolled(enrolled: &Enrolled) -> (StatusCode, axum::Json<Value>) {
    let status = if enrolled.anew { StatusCode::OK } else { StatusCode::CREATED };
    let body = json!({
        "agent_id": enrolled.agent_id,
        "display_name": enrolled.display_name,
        "capabilities": enrolled.capabilities,
        "cert_thumbprint": enrolled.cert_thumbprint,
        "spiffe_id": enrolled.spiffe_id,
        "dpop_jkt": enrolled.dpop_jkt,
    });
    (status, axum::Json(body))
}

async fn enroll_byoca(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Json(body): Json<EnrollByoca>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let request = body.common.with(body.cert_pem, body.private_key_pem);
    Ok(enrolled(&agents.enroll_byoca(&request, &admin.actor).await?))
}

async fn enroll_spiffe(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Json(body): Json<EnrollSpiffe>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let request = body.common.with(body.svid_pem, body.svid_key_pem);
    let bundle = body.trust_bundle_pem.as_deref();
    Ok(enrolled(&agents.enroll_spire(&request, bundle, &admin.actor).await?))
}

#[derive(Deserialize)]
struct ListQuery {
    #[serde(default)]
    after: String,
    limit: Option<i64>,
    expiring_within_days: Option<i64>,
}

async fn list_agents(
    _admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let limit = query.limit.unwrap_or(LIST_ROWS_DEFAULT).clamp(1, LIST_ROWS_MAX);
    let list = match query.expiring_within_days {
        Some(days) => agents.list_expiring(days, &query.after, limit).await?,
        None => agents.list(&query.after, limit).await?,
    };
    Ok(axum::Json(list.iter().map(Agent::to_json).collect()))
}

async fn show_agent(
    _admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(agents.show(&agents.canonical(&agent_id)).await?.to_full_json()))
}

#[derive(Deserialize)]
struct RemoveQuery {
    #[serde(default)]
    permanently: bool,
}

/// The wire contract's DELETE deactivates; `?permanently=true` deletes.
async fn remove_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let agent_id = agents.canonical(&agent_id);
    if query.permanently {
        agents.delete(&agent_id, &admin.actor).await?;
    } else {
        agents.deactivate(&agent_id, &admin.actor).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn deactivate_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let agent_id = agents.canonical(&agent_id);
    agents.deactivate(&agent_id, &admin.actor).await?;
    Ok(axum::Json(json!({ "agent_id": agent_id, "is_active": false })))
}

async fn reactivate_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let agent_id = agents.canonical(&agent_id);
    agents.reactivate(&agent_id, &admin.actor).await?;
    Ok(axum::Json(json!({ "agent_id": agent_id, "is_active": true })))
}

async fn renew_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let agent_id = agents.canonical(&agent_id);
    Ok(axum::Json(agents.renew(&agent_id, None, None, &admin.actor).await?.to_json()))
}

#[derive(Deserialize)]
struct Revoke {
    #[serde(default)]
    serial_hex: Option<String>,
    #[serde(default)]
    agent_id: Option<String>,
    #[serde(default)]
    reason: Option<String>,
}

async fn revoke(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Json(body): Json<Revoke>,
) -> Result<axum::Json<Value>, ApiError> {
    let which = match (body.serial_hex, body.agent_id) {
        (Some(serial), None) => Which::Serial(serial),
        (None, Some(agent_id)) => Which::Agent(agents.canonical(&agent_id)),
        _ => return Err(ApiError::new(Kind::Unprocessable, "name either serial_hex or agent_id")),
    };
    let reason = revocation_reason(body.reason.as_deref())?;
    let revoked = agents.revoke(&which, reason, &admin.actor).await?;
    Ok(axum::Json(json!({ "revoked": revoked.iter().map(Revocation::to_json).collect::<Vec<_>>() })))
}

async fn list_revoked(
    _admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let limit = query.limit.unwrap_or(LIST_ROWS_DEFAULT).clamp(1, LIST_ROWS_MAX);
    let list = agents.pki().revocations(&query.after, limit).await?;
    Ok(axum::Json(list.iter().map(Revocation::to_json).collect()))
}

#[derive(Deserialize, Default)]
struct RenewOwn {
    #[serde(default)]
    csr_pem: Option<String>,
}

/// An agent's own certificate anew: for its key with an empty body, for another one with `csr_pem`.
async fn renew_own(
    context: Context,
    Extension(refusals): Extension<Refusals>,
    State(agents): State<Arc<Agents>>,
    body: Bytes,
) -> Result<axum::Json<Value>, ApiError> {
    let caller = caller(&agents, &refusals, &context, RENEW_PATH).await?;
    let body: RenewOwn = if body.is_empty() { RenewOwn::default() } else { parse(&body)? };
    let request = body
        .csr_pem
        .as_deref()
        .map(CertificateRequest::from_pem)
        .transpose()
        .map_err(|error| EnrollmentError::from(PkiError::Request(error)))?;
    let agent_id = &caller.agent.agent_id;
    Ok(axum::Json(agents.renew(agent_id, request.as_ref(), Some(&caller), agent_id).await?.to_json()))
}

#[derive(Deserialize)]
struct SetDpopKey {
    jwk: Value,
}

async fn set_dpop_key(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
    Json(body): Json<SetDpopKey>,
) -> Result<axum::Json<Value>, ApiError> {
    let jwk = PublicJwk::from_value(&body.jwk)
        .map_err(|error| ApiError::new(Kind::Invalid, format!("jwk refused: {error}")))?;
    let (agent_id, jkt) = (agents.canonical(&agent_id), jwk.thumbprint());
    agents.set_dpop_key(&agent_id, &jkt, &admin.actor).await?;
    Ok(axum::Json(json!({ "agent_id": agent_id, "dpop_jkt": jkt })))
}

/// The certificate of an agent, one's own too: the way in which an agent fetches its re-signed leaf.
async fn show_public_key(
    context: Context,
    Extension(refusals): Extension<Refusals>,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    caller(&agents, &refusals, &context, PUBLIC_KEY_PATH).await?;
    let agent_id = match agent_id.strip_prefix("spiffe://") {
        Some(rest) => {
            let segments: Vec<&str> = rest.split('/').collect();
            match segments.as_slice() {
                [_, org, name] | [_, org, "agent", name] => format!("{org}::{name}"),
                _ => return Err(ApiError::new(Kind::Invalid, "not a SPIFFE id of an agent")),
            }
        }
        None => agent_id,
    };
    if !agent_id.contains("::") {
        return Err(ApiError::new(Kind::Invalid, "agent id must have the form org::name"));
    }
    let agent = agents.agent(&agent_id).await.map_err(EnrollmentError::from)?;
    let agent = agent.filter(|agent| agent.is_active).ok_or(EnrollmentError::Unknown(agent_id))?;
    Ok(axum::Json(json!({ "agent_id": agent.agent_id, "cert_pem": agent.cert_pem })))
}

#[derive(Deserialize)]
struct PeersQuery {
    #[serde(default)]
    q: String,
    limit: Option<usize>,
}

/// The other active agents of the organisation, by id or name (wire contract §6).
async fn list_peers(
    context: Context,
    Extension(refusals): Extension<Refusals>,
    State(agents): State<Arc<Agents>>,
    Query(query): Query<PeersQuery>,
) -> Result<axum::Json<Value>, ApiError> {
    let caller = caller(&agents, &refusals, &context, PEERS_PATH).await?;
    let limit = query.limit.unwrap_or(PEERS_DEFAULT).clamp(1, PEERS_MAX);
    let peers: Vec<Value> = agents
        .peers(&caller.agent.agent_id, &query.q, limit)
        .await?
        .into_iter()
        .map(|peer| {
            let org_id = peer.agent_id.split_once("::").map_or("", |(org_id, _)| org_id).to_owned();
            json!({
                "agent_id": peer.agent_id,
                "org_id": org_id,
                "display_name": peer.display_name,
                "capabilities": peer.capabilities,
                "description": null,
                "status": "active",
                "scope": "intra-org",
            })
        })
        .collect();
    Ok(axum::Json(json!({ "count": peers.len(), "peers": peers })))
}
