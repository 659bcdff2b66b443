//! The guard before every route of `/proxy` and `/v1/admin`, and `/v1/admin/operators`.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use mastio_core::time::UnixTime;
use serde::Deserialize;
use serde_json::{Value, json};

use super::access::{self, Access};
use super::{OperatorError, Operators};
use crate::http::authn::{AdminCaller, Role, Session};
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::Json;

/// The routes of this capability.
pub fn routes(operators: Arc<Operators>) -> Router {
    Router::new()
        .route("/v1/admin/operators", get(list_operators).post(add_operator))
        .route("/v1/admin/operators/{name}", patch(change_operator).delete(deactivate_operator))
        .route("/v1/admin/operators/{name}/reset-password", post(reset_password))
        .with_state(operators)
}

/// The role that a page asks for and that the session's operator does not have. The page says so in its own way.
#[derive(Debug, Clone)]
pub struct Insufficient {
    /// Who asks.
    pub name: String,
    /// What they have.
    pub role: Role,
    /// What the page asks for.
    pub required: Role,
}

/// Holds a request to [`access::TABLE`], and puts the [`AdminCaller`] into its extensions. Where the table lets nobody
/// in, no handler is reached.
pub async fn guard(operators: &Operators, request: &mut Request) -> Result<(), Response> {
    let Some(path) = request.extensions().get::<MatchedPath>().cloned() else {
        // No such route: there is nothing to guard.
        return Ok(());
    };
    if !access::governs(path.as_str()) {
        return Ok(());
    }
    let Some(access) = access::of(request.method(), path.as_str()) else {
        return Err(match access::knows(path.as_str()) {
            true => StatusCode::METHOD_NOT_ALLOWED.into_response(),
            false => ApiError::from(OperatorError::Unlisted).into_response(),
        });
    };
    match access {
        Access::Anyone => {}
        Access::Page(required) => {
            // Without a session the page leads to the sign-in by itself.
            if let Some(session) = request.extensions().get::<Session>().cloned() {
                if session.role >= required {
                    let caller = AdminCaller { actor: session.actor, role: session.role };
                    request.extensions_mut().insert(caller);
                } else {
                    let name = session.actor;
                    request.extensions_mut().insert(Insufficient { name, role: session.role, required });
                }
            }
        }
        Access::Api(required) => match admit(operators, presented(request), required).await {
            Ok(caller) => drop(request.extensions_mut().insert(caller)),
            Err(error) => return Err(ApiError::from(error).into_response()),
        },
    }
    Ok(())
}

/// What a request presents.
enum Presented {
    Session(AdminCaller),
    Credential { text: HeaderValue, address: IpAddr, now: UnixTime },
}

fn presented(request: &Request) -> Result<Presented, OperatorError> {
    let mut headers = request.headers().get_all("x-admin-secret").iter();
    match (headers.next(), headers.next()) {
        (None, _) => by_session(request).map(Presented::Session),
        (Some(text), None) => {
            let context = request.extensions().get::<Context>().ok_or(OperatorError::Missing)?;
            let (address, now) = (context.peer.ip(), context.now.seconds());
            Ok(Presented::Credential { text: text.clone(), address, now })
        }
        (Some(_), Some(_)) => Err(OperatorError::Repeated),
    }
}

async fn admit(
    operators: &Operators,
    presented: Result<Presented, OperatorError>,
    required: Role,
) -> Result<AdminCaller, OperatorError> {
    let caller = match presented? {
        Presented::Session(caller) => caller,
        Presented::Credential { text, address, now } => {
            operators.authenticate(text.as_bytes(), address, now).await?
        }
    };
    if caller.role < required {
        return Err(OperatorError::Role { name: caller.actor, role: caller.role, required });
    }
    Ok(caller)
}

fn by_session(request: &Request) -> Result<AdminCaller, OperatorError> {
    let session = request.extensions().get::<Session>().ok_or(OperatorError::Missing)?;
    let token = request.headers().get("x-csrf-token").map_or(&[][..], HeaderValue::as_bytes);
    if !request.method().is_safe() && !session.accepts(token) {
        return Err(OperatorError::ForeignRequest);
    }
    Ok(AdminCaller { actor: session.actor.clone(), role: session.role })
}

/// `GET /v1/admin/operators`: the shared secret first, then the others by name.
async fn list_operators(
    _admin: AdminCaller,
    State(operators): State<Arc<Operators>>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(operators.to_json().await?))
}

#[derive(Deserialize)]
struct AddOperator {
    name: String,
    role: Option<String>,
}

/// `POST /v1/admin/operators`: 201 with the secret, which is shown this once.
async fn add_operator(
    admin: AdminCaller,
    State(operators): State<Arc<Operators>>,
    Json(body): Json<AddOperator>,
) -> Result<(StatusCode, axum::Json<Value>), ApiError> {
    let role = super::role(body.role.as_deref())?;
    let issued = operators.add(&body.name, role, &admin.actor).await?;
    Ok((StatusCode::CREATED, axum::Json(issued.to_json())))
}

#[derive(Deserialize)]
struct ChangeOperator {
    role: String,
}

/// `PATCH /v1/admin/operators/{name}`: another role, from the next request on.
async fn change_operator(
    admin: AdminCaller,
    State(operators): State<Arc<Operators>>,
    Path(name): Path<String>,
    Json(body): Json<ChangeOperator>,
) -> Result<axum::Json<Value>, ApiError> {
    let role = super::role(Some(&body.role))?;
    operators.set_role(&name, role, &admin.actor).await?;
    Ok(axum::Json(json!({ "name": name, "role": role.as_str() })))
}

async fn deactivate_operator(
    admin: AdminCaller,
    State(operators): State<Arc<Operators>>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    operators.deactivate(&name, &admin.actor).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST …/reset-password`: another secret, shown this once.
async fn reset_password(
    admin: AdminCaller,
    State(operators): State<Arc<Operators>>,
    Path(name): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(operators.reset_secret(&name, &admin.actor).await?.to_json()))
}
