//! `/v1/admin/agents` (wire contract §3.2), what an agent may read of agents (§6), and its own certificate anew.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use mastio_core::error::Kind;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::csr::CertificateRequest;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Agent, Agents, EnrollmentError};
use crate::http::authn::AdminCaller;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::{Json, parse};
use crate::pki::PkiError;

const LIST_ROWS_DEFAULT: i64 = 1000;
const LIST_ROWS_MAX: i64 = 10_000;

/// The routes of this capability.
pub fn routes(agents: Arc<Agents>) -> Router {
    Router::new()
        .route("/v1/admin/agents", post(create_agent).get(list_agents))
        .route("/v1/admin/agents/{agent_id}", get(show_agent).delete(remove_agent))
        .route("/v1/admin/agents/{agent_id}/deactivate", post(deactivate_agent))
        .route("/v1/admin/agents/{agent_id}/reactivate", post(reactivate_agent))
        .route("/v1/admin/agents/{agent_id}/renew", post(renew_agent))
        .route("/v1/agents/renew", post(renew_own))
        .route("/v1/admin/agents/{agent_id}/dpop-jwk", post(set_dpop_key))
        .route("/v1/egress/agents/{agent_id}/public-key", get(show_public_key))
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

#[derive(Deserialize, Default)]
struct RenewOwn {
    #[serde(default)]
    csr_pem: Option<String>,
}

/// An agent's own certificate anew: for its key with an empty body, for another one with `csr_pem`.
async fn renew_own(
    context: Context,
    State(agents): State<Arc<Agents>>,
    body: Bytes,
) -> Result<axum::Json<Value>, ApiError> {
    let caller = agents.authenticate(&context).await?;
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
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let _caller = agents.authenticate(&context).await?;
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
