//! `GET /v1/admin/audit`: where the page sends operators to look for `admin.update_applied`.

use axum::Router;
use axum::extract::{Query, State};
use axum::routing::get;
use mastio_core::audit::event::EventType;
use mastio_core::error::Kind;
use serde::Deserialize;
use serde_json::Value;

use super::{Filter, LIST_ROWS_MAX};
use crate::http::authn::AdminCaller;
use crate::http::error::{ApiError, Problem};
use crate::store::{Store, StoreError};

const LIST_ROWS_DEFAULT: i64 = 100;

/// The routes of this capability.
pub fn routes(store: Store) -> Router {
    Router::new()
        .route("/v1/admin/audit", get(list_events))
        .route("/v1/admin/audit/verify", get(verify_chain))
        .with_state(store)
}

#[derive(Deserialize)]
struct ListQuery {
    event_type: Option<String>,
    subject: Option<String>,
    before: Option<i64>,
    after: Option<i64>,
    limit: Option<i64>,
}

async fn list_events(
    _admin: AdminCaller,
    State(store): State<Store>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    if let Some(event_type) = &query.event_type
        && EventType::parse(event_type).is_none()
    {
        return Err(ApiError::new(Kind::Invalid, format!("unknown event_type {event_type}")));
    }
    let filter = Filter {
        event_type: query.event_type,
        subject: query.subject,
        before: query.before,
        after: query.after,
        limit: query.limit.unwrap_or(LIST_ROWS_DEFAULT).clamp(1, LIST_ROWS_MAX),
    };
    Ok(axum::Json(super::list(&store, &filter).await?))
}

async fn verify_chain(
    _admin: AdminCaller,
    State(store): State<Store>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(super::verify(&store).await?.to_json()))
}

impl Problem for StoreError {
    fn kind(&self) -> Kind {
        Self::kind(self)
    }

    fn detail(&self) -> Value {
        Value::String("the database is not available".to_owned())
    }
}
