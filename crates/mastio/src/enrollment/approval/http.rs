//! `/v1/enrollment/*` for clients and `/v1/admin/enrollments` for operators (wire contract §3.1).

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::Agents;
use super::Ask;
use crate::http::authn::AdminCaller;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::Json;
use crate::http::limits::{per_minute, per_source};

/// Requests for an identity a minute from one source (wire contract §10).
const START_PER_MINUTE: u32 = 5;
/// Looks at an outcome a minute from one source (wire contract §10).
const STATUS_PER_MINUTE: u32 = 60;
/// Seconds between two looks that a client is told to wait.
const POLL_INTERVAL_S: u32 = 5;
const LIST_ROWS_DEFAULT: i64 = 1000;
const LIST_ROWS_MAX: i64 = 10_000;

/// The routes of enrollment by approval.
pub fn routes(agents: Arc<Agents>) -> Router {
    let limited = |requests| from_fn_with_state(per_minute(requests), per_source);
    Router::new()
        .route("/v1/enrollment/start", post(start).layer(limited(START_PER_MINUTE)))
        .route("/v1/enrollment/{session_id}/status", get(show_outcome).layer(limited(STATUS_PER_MINUTE)))
        .route("/v1/admin/enrollments", get(list_requests))
        .route("/v1/admin/enrollments/{session_id}", get(show_request))
        .route("/v1/admin/enrollments/{session_id}/approve", post(approve))
        .route("/v1/admin/enrollments/{session_id}/reject", post(reject))
        .with_state(agents)
}

async fn start(
    context: Context,
    State(agents): State<Arc<Agents>>,
    Json(ask): Json<Ask>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let request = agents.ask(&context, &ask).await?;
    Ok((
        StatusCode::CREATED,
        axum::Json(json!({
            "session_id": request.session_id,
            "status": "pending",
            "poll_url": format!("/v1/enrollment/{}/status", request.session_id),
            "enroll_url": "/proxy/enrollments",
            "poll_interval_s": POLL_INTERVAL_S,
            "expires_at": request.expires_at.to_rfc3339(),
        })),
    ))
}

async fn show_outcome(
    context: Context,
    headers: HeaderMap,
    State(agents): State<Arc<Agents>>,
    Path(session_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let proof = headers.get("x-enrollment-proof").and_then(|value| value.to_str().ok());
    let outcome = agents.outcome(&context, &session_id, proof).await?;
    let granted = outcome.granted.as_ref();
    Ok(axum::Json(json!({
        "session_id": session_id,
        "status": outcome.status,
        "agent_id": granted.map(|granted| &granted.agent_id),
        "cert_pem": granted.and_then(|granted| granted.cert_pem.as_ref()),
        "capabilities": granted.map(|granted| &granted.capabilities),
        "rejection_reason": outcome.rejection_reason,
    })))
}

#[derive(Deserialize)]
struct ListQuery {
    status: Option<String>,
    #[serde(default)]
    after: String,
    limit: Option<i64>,
}

async fn list_requests(
    _admin: AdminCaller,
    context: Context,
    State(agents): State<Arc<Agents>>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let limit = query.limit.unwrap_or(LIST_ROWS_DEFAULT).clamp(1, LIST_ROWS_MAX);
    let status = query.status.as_deref().unwrap_or("pending");
    let list = agents.requests(status, &query.after, limit).await?;
    Ok(axum::Json(list.iter().map(|request| request.to_json(context.now.seconds())).collect()))
}

async fn show_request(
    _admin: AdminCaller,
    context: Context,
    State(agents): State<Arc<Agents>>,
    Path(session_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(agents.request(&session_id).await?.to_json(context.now.seconds())))
}

#[derive(Deserialize)]
struct Approve {
    agent_id: String,
    #[serde(default)]
    capabilities: Vec<String>,
}

async fn approve(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(session_id): Path<String>,
    Json(body): Json<Approve>,
) -> Result<axum::Json<Value>, ApiError> {
    let agent_id = agents.approve(&session_id, &body.agent_id, &body.capabilities, &admin.actor).await?;
    Ok(axum::Json(json!({ "status": "approved", "agent_id": agent_id })))
}

#[derive(Deserialize)]
struct Reject {
    reason: String,
}

async fn reject(
    admin: AdminCaller,
    State(agents): State<Arc<Agents>>,
    Path(session_id): Path<String>,
    Json(body): Json<Reject>,
) -> Result<axum::Json<Value>, ApiError> {
    agents.reject(&session_id, &body.reason, &admin.actor).await?;
    Ok(axum::Json(json!({ "status": "rejected" })))
}
