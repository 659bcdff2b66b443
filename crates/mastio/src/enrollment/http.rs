//! `/v1/admin/agents` (wire contract §3.2) and what an agent may read of agents (§6).

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{delete, get, post};
use mastio_core::error::Kind;
use mastio_core::token::jwk::PublicJwk;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Agents, EnrollmentError};
use crate::http::authn::AdminCaller;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::Json;

const AGENT_NAME_CHARACTERS_MAX: usize = 64;
const DISPLAY_NAME_CHARACTERS_MAX: usize = 256;
const CAPABILITIES_MAX: usize = 256;
const LIST_ROWS_DEFAULT: i64 = 1000;
const LIST_ROWS_MAX: i64 = 10_000;

/// The routes of this capability.
pub fn routes(agents: Arc<Agents>) -> Router {
    Router::new()
        .route("/v1/admin/agents", post(create_agent).get(list_agents))
        .route("/v1/admin/agents/{agent_id}", delete(deactivate_agent))
        .route("/v1/admin/agents/{agent_id}/dpop-jwk", post(set_dpop_key))
        .route("/v1/egress/agents/{agent_id}/public-key", get(show_public_key))
        .with_state(agents)
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

/// Whether `name` is what an agent may be called.
pub(crate) fn check_agent_name(name: &str) -> Result<(), EnrollmentError> {
    let good = (1..=AGENT_NAME_CHARACTERS_MAX).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if good {
        Ok(())
    } else {
        let problem = format!("must be 1..={AGENT_NAME_CHARACTERS_MAX} of A-Z a-z 0-9 . _ -");
        Err(EnrollmentError::Field { field: "agent_name", problem })
    }
}

async fn create_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Json(body): Json<CreateAgent>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    check_agent_name(&body.agent_name)?;
    if body.cert_pem.is_some() || body.private_key_pem.is_some() {
        return Err(ApiError::new(
            Kind::Invalid,
            "bringing a certificate is BYOCA: POST /v1/admin/agents/enroll/byoca",
        ));
    }
    let display_name = body.display_name.unwrap_or_else(|| body.agent_name.clone());
    if display_name.chars().count() > DISPLAY_NAME_CHARACTERS_MAX {
        let problem = format!("must be at most {DISPLAY_NAME_CHARACTERS_MAX} characters");
        return Err(EnrollmentError::Field { field: "display_name", problem }.into());
    }
    if body.capabilities.len() > CAPABILITIES_MAX {
        let problem = format!("must be at most {CAPABILITIES_MAX}");
        return Err(EnrollmentError::Field { field: "capabilities", problem }.into());
    }
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
}

async fn list_agents(
    _admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let limit = query.limit.unwrap_or(LIST_ROWS_DEFAULT).clamp(1, LIST_ROWS_MAX);
    let list = agents.list(&query.after, limit).await?;
    Ok(axum::Json(
        list.into_iter()
            .map(|agent| {
                json!({
                    "agent_id": agent.agent_id,
                    "display_name": agent.display_name,
                    "capabilities": agent.capabilities,
                    "federated": agent.federated,
                    "federated_at": null,
                    "federation_revision": 0,
                    "is_active": agent.is_active,
                    "enrollment": agent.enrollment.as_str(),
                    "created_at": agent.created_at,
                })
            })
            .collect(),
    ))
}

async fn deactivate_agent(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(agent_id): Path<String>,
) -> Result<StatusCode, ApiError> {
    agents.deactivate(&agents.canonical(&agent_id), &admin.actor).await?;
    Ok(StatusCode::NO_CONTENT)
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
