//! `/proxy/updates/*`: the page's admin API.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use mastio_core::error::Kind;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{UpdateError, Updates};
use crate::http::authn::AdminCaller;
use crate::http::error::ApiError;

/// The routes of this capability.
pub fn routes(updates: Arc<Updates>) -> Router {
    Router::new()
        .route("/proxy/updates/api", get(list_updates))
        .route("/proxy/updates/{migration_id}/plan", get(plan_update))
        .route("/proxy/updates/{migration_id}/progress", get(show_progress))
        .route("/proxy/updates/{migration_id}/apply", post(apply_update))
        .route("/proxy/updates/{migration_id}/rollback", post(rollback_update))
        .with_state(updates)
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

async fn plan_update(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
) -> Result<impl IntoResponse, ApiError> {
    Ok(axum::Json(updates.plan(&migration_id).await?))
}

/// Where the run of this update is; 404 while none is under way.
async fn show_progress(
    _admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let progress = updates.watch().borrow().clone();
    match progress.filter(|progress| progress.migration_id == migration_id) {
        Some(progress) => Ok(axum::Json(progress.to_json())),
        None => Err(ApiError::new(Kind::NotFound, format!("no run of {migration_id} is under way"))),
    }
}

async fn apply_update(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    body: Bytes,
) -> Result<axum::Json<Value>, ApiError> {
    confirmed(&body)?;
    let done = updates.apply(&migration_id, &admin.actor).await?;
    Ok(axum::Json(json!({
        "migration_id": done.migration_id, "status": "applied", "applied_at": done.at.to_rfc3339(),
    })))
}

async fn rollback_update(
    admin: AdminCaller,
    State(updates): State<Arc<Updates>>,
    Path(migration_id): Path<String>,
    body: Bytes,
) -> Result<axum::Json<Value>, ApiError> {
    confirmed(&body)?;
    let done = updates.rollback(&migration_id, &admin.actor).await?;
    Ok(axum::Json(json!({
        "migration_id": done.migration_id, "status": "rolled_back", "rolled_back_at": done.at.to_rfc3339(),
    })))
}

/// The confirmation is the literal `{"confirm": true}`; anything else changes nothing.
fn confirmed(body: &[u8]) -> Result<(), UpdateError> {
    let value: Value = serde_json::from_slice(body).map_err(|_| UpdateError::Unconfirmed)?;
    if value.get("confirm") == Some(&Value::Bool(true)) { Ok(()) } else { Err(UpdateError::Unconfirmed) }
}
