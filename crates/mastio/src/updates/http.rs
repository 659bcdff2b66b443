//! `/proxy/updates/*`: the page's admin API.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt as _;
use mastio_core::error::Kind;
use serde::Deserialize;
use serde_json::Value;

use super::progress::Report;
use super::{Direction, UpdateError, Updates};
use crate::http::authn::AdminCaller;
use crate::http::error::ApiError;
use crate::http::json::Json;

/// The routes of this capability.
pub fn routes(updates: Arc<Updates>) -> Router {
    Router::new()
        .route("/proxy/updates/api", get(list_updates))
        .route("/proxy/updates/doctor", get(ask_doctor))
        .route("/proxy/updates/snapshots", get(list_snapshots))
        .route("/proxy/updates/{migration_id}/plan", get(plan_apply))
        .route("/proxy/updates/{migration_id}/rollback-plan", get(plan_rollback))
        .route("/proxy/updates/{migration_id}/progress", get(show_progress))
        .route("/proxy/updates/{migration_id}/events", get(watch_events))
        .route("/proxy/updates/{migration_id}/proposals", get(list_proposals).post(propose_plan))
        .route("/proxy/updates/{migration_id}/proposals/{proposal_id}/approve", post(approve_proposal))
        .route("/proxy/updates/{migration_id}/apply", post(apply_update))
        .route("/proxy/updates/{migration_id}/rollback", post(rollback_update))
        .route("/v1/admin/pki/overlap", get(show_overlap))
        .route("/v1/admin/pki/settle", post(settle_overlap))
        .with_state(updates)
}

/// `GET /v1/admin/pki/overlap`: who still needs it, what cannot be seen, and what settling would do.
async fn show_overlap(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(updates.overlap().await?))
}

/// `POST /v1/admin/pki/settle` ends the overlap when it is confirmed; with `?dry_run=true` only tells what it would do.
async fn settle_overlap(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Result<axum::Json<Value>, ApiError> {
    if flag("dry_run", query.dry_run.as_deref())? {
        return Ok(axum::Json(updates.overlap().await?));
    }
    let body = parsed(&body)?;
    if body.get("confirm") != Some(&Value::Bool(true)) {
        return Err(UpdateError::Unconfirmed.into());
    }
    let break_agents = match body.get("break_agents") {
        None => false,
        Some(Value::Bool(break_agents)) => *break_agents,
        Some(_) => return Err(ApiError::new(Kind::Invalid, "break_agents is true or false")),
    };
    Ok(axum::Json(updates.settle(break_agents, &admin.actor).await?))
}

#[derive(Deserialize)]
struct ListQuery {
    status: Option<String>,
}

/// `GET /proxy/updates/api[?status=…]`: a bare array, in order.
async fn list_updates(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    Ok(axum::Json(updates.list(query.status.as_deref()).await?))
}

/// `GET /proxy/updates/doctor`: what is found, and the next step of each.
async fn ask_doctor(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(updates.doctor().await?))
}

/// `GET /proxy/updates/snapshots`: what rollbacks go back to.
async fn list_snapshots(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    Ok(axum::Json(updates.snapshots().await?))
}

#[derive(Deserialize)]
struct PlanQuery {
    full: Option<String>,
}

async fn plan_apply(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    Query(query): Query<PlanQuery>,
) -> Result<Response, ApiError> {
    plan(&updates, &migration_id, Direction::Apply, &query).await
}

async fn plan_rollback(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    Query(query): Query<PlanQuery>,
) -> Result<Response, ApiError> {
    plan(&updates, &migration_id, Direction::Rollback, &query).await
}

/// The plan as one object, or with `?full=true` every single change, a JSON value a line, the plan last.
async fn plan(
    updates: &Arc<Updates>,
    migration_id: &str,
    direction: Direction,
    query: &PlanQuery,
) -> Result<Response, ApiError> {
    if !flag("full", query.full.as_deref())? {
        let plan = match direction {
            Direction::Apply => updates.plan(migration_id).await?,
            Direction::Rollback => updates.rollback_plan(migration_id).await?,
        };
        return Ok(axum::Json(plan).into_response());
    }
    let lines = updates.full_plan(migration_id, direction).await?;
    let lines = futures_util::stream::unfold(lines, |mut lines| async move {
        let line = lines.recv().await?;
        Some((Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))), lines))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Reads `?name=true` or `false`; absent is false.
fn flag(name: &str, value: Option<&str>) -> Result<bool, ApiError> {
    match value {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(ApiError::new(Kind::Invalid, format!("{name}={other}: one of true, false"))),
    }
}

/// Where the run of this update is; 404 while none is under way.
async fn show_progress(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    match updates.progress_of(&migration_id).await? {
        Some(progress) => Ok(axum::Json(progress)),
        None => Err(ApiError::new(Kind::NotFound, format!("no run of {migration_id} is under way"))),
    }
}

/// `GET /proxy/updates/{id}/events`: server-sent events of the run under way, or of the next one.
async fn watch_events(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, ApiError> {
    let back = headers.contains_key("last-event-id");
    let reports = updates.follow(&migration_id, back).await?;
    Ok(Sse::new(reports.map(|report| Ok::<_, Infallible>(event(report)))).keep_alive(KeepAlive::default()))
}

fn event(report: Report) -> Event {
    let event = Event::default().event(report.name).data(report.body.to_string());
    match report.run_id {
        Some(run_id) => event.id(run_id),
        None => event,
    }
}

async fn list_proposals(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    Ok(axum::Json(updates.proposals(&migration_id).await?))
}

#[derive(Deserialize)]
struct ProposePlan {
    plan_digest: String,
    direction: Option<String>,
}

/// Proposes a plan to the other operators: 201 with the proposal.
async fn propose_plan(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    Json(body): Json<ProposePlan>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let direction = match body.direction.as_deref() {
        None | Some("apply") => Direction::Apply,
        Some("rollback") => Direction::Rollback,
        Some(other) => {
            let detail = format!("unknown direction {other}: one of apply, rollback");
            return Err(ApiError::new(Kind::Invalid, detail));
        }
    };
    let proposal = updates.propose_plan(&migration_id, direction, &body.plan_digest, &admin.actor).await?;
    Ok((StatusCode::CREATED, axum::Json(proposal.to_json(updates.pki.clock.now().seconds()))))
}

/// Approves what somebody else has proposed.
async fn approve_proposal(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path((migration_id, proposal_id)): Path<(String, String)>,
) -> Result<axum::Json<Value>, ApiError> {
    let proposal = updates.approve_plan(&migration_id, &proposal_id, &admin.actor).await?;
    Ok(axum::Json(proposal.to_json(updates.pki.clock.now().seconds())))
}

#[derive(Deserialize)]
struct ChangeQuery {
    dry_run: Option<String>,
}

async fn apply_update(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Result<Response, ApiError> {
    change(&updates, &admin, &migration_id, Direction::Apply, &query, &body).await
}

async fn rollback_update(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Result<Response, ApiError> {
    change(&updates, &admin, &migration_id, Direction::Rollback, &query, &body).await
}

/// Applies or rolls back when it is confirmed; with `?dry_run=true` only rehearses it, which needs no confirmation.
async fn change(
    updates: &Arc<Updates>,
    admin: &AdminCaller,
    migration_id: &str,
    direction: Direction,
    query: &ChangeQuery,
    body: &[u8],
) -> Result<Response, ApiError> {
    if flag("dry_run", query.dry_run.as_deref())? {
        let body = if body.is_empty() { Value::Null } else { parsed(body)? };
        let plan = updates.dry_run(migration_id, direction, plan_digest(&body)?).await?;
        return Ok(axum::Json(plan).into_response());
    }
    let body = parsed(body)?;
    // The confirmation is the literal `{"confirm": true}`; anything else changes nothing.
    if body.get("confirm") != Some(&Value::Bool(true)) {
        return Err(UpdateError::Unconfirmed.into());
    }
    let done = updates.change(migration_id, direction, &admin.actor, plan_digest(&body)?).await?;
    Ok(axum::Json(done.to_json(direction)).into_response())
}

fn parsed(body: &[u8]) -> Result<Value, UpdateError> {
    serde_json::from_slice(body).map_err(|_| UpdateError::Unconfirmed)
}

/// The digest of the plan that the operator has seen, where the body names one.
fn plan_digest(body: &Value) -> Result<Option<&str>, ApiError> {
    match body.get("plan_digest") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(digest)) => Ok(Some(digest)),
        Some(_) => Err(ApiError::new(Kind::Invalid, "plan_digest is the text that a plan shows")),
    }
}
