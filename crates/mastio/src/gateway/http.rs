//! Routes of the gateway: one for agents, six for administrators.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, post};
use axum::{Router, body};
use mastio_core::error::Kind;
use serde::{Deserialize, Serialize};

use super::{
    Answer, Binding, BindingFilter, Gateway, GatewayError, NewResource, Resource, internal_error, jsonrpc,
    serve,
};
use crate::http::authn::AdminCaller;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::{BODY_BYTES_MAX, Json};

/// The gateway's routes.
pub fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/mcp", post(post_message))
        .route("/v1/admin/mcp-resources", post(create_resource).get(list_resources))
        .route("/v1/admin/mcp-resources/{resource_id}", delete(delete_resource))
        .route("/v1/admin/mcp-resources/bindings", post(create_binding).get(list_bindings))
        .route("/v1/admin/mcp-resources/bindings/{binding_id}", delete(revoke_binding))
        .with_state(gateway)
}

async fn post_message(
    State(gateway): State<Arc<Gateway>>,
    context: Context,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let caller = gateway.authenticate.caller(&context, &parts).await?;
    let body = body::to_bytes(body, BODY_BYTES_MAX)
        .await
        .map_err(|_| ApiError::new(Kind::TooLarge, format!("request body exceeds {BODY_BYTES_MAX} bytes")))?;
    let message = jsonrpc::read(&body);
    drop(body);
    // In a task of its own: a caller that hangs up must not keep the outcome of its call out of the log.
    let served = tokio::spawn(serve(gateway, context, parts, caller, message)).await;
    let answer = served.map_err(|_| GatewayError::Stopped)??;
    Ok(render(answer))
}

fn render(answer: Answer) -> Response {
    let (status, written) = match answer {
        Answer::Nothing => return StatusCode::NO_CONTENT.into_response(),
        Answer::Malformed(error) => (StatusCode::BAD_REQUEST, jsonrpc::write(None, Err(&error))),
        Answer::Under(id, outcome) => (StatusCode::OK, jsonrpc::write(Some(&id), outcome.as_deref())),
    };
    let body = written.or_else(|_| jsonrpc::write(None, Err(&internal_error()))).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

#[derive(Deserialize)]
struct CreateResource {
    name: String,
    endpoint_url: String,
    description: Option<String>,
    #[serde(default = "no_authentication")]
    auth_type: String,
    auth_secret_ref: Option<String>,
    required_capability: Option<String>,
    #[serde(default)]
    allowed_domains: Vec<String>,
    org_id: Option<String>,
    #[serde(default = "enabled")]
    enabled: bool,
}

fn no_authentication() -> String {
    "none".to_owned()
}

fn enabled() -> bool {
    true
}

#[derive(Serialize)]
struct ResourceBody {
    resource_id: String,
    name: String,
    endpoint_url: String,
    description: Option<String>,
    auth_type: String,
    required_capability: Option<String>,
    enabled: bool,
    org_id: Option<String>,
    created_at: String,
}

impl From<Resource> for ResourceBody {
    fn from(resource: Resource) -> Self {
        Self {
            resource_id: resource.resource_id,
            name: resource.name,
            endpoint_url: resource.endpoint_url,
            description: resource.description,
            auth_type: resource.auth_type,
            required_capability: resource.required_capability,
            enabled: resource.enabled,
            org_id: resource.org_id,
            created_at: resource.created_at,
        }
    }
}

async fn create_resource(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Json(body): Json<CreateResource>,
) -> Result<Response, ApiError> {
    let new = NewResource {
        name: body.name,
        endpoint_url: body.endpoint_url,
        description: body.description,
        auth_type: body.auth_type,
        auth_secret_ref: body.auth_secret_ref,
        required_capability: body.required_capability,
        allowed_domains: body.allowed_domains,
        org_id: body.org_id,
        enabled: body.enabled,
    };
    let resource = gateway.register_resource(&admin.actor, context.now.seconds(), new).await?;
    Ok((StatusCode::CREATED, axum::Json(ResourceBody::from(resource))).into_response())
}

async fn list_resources(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
) -> Result<axum::Json<Vec<ResourceBody>>, ApiError> {
    let resources = gateway.list_resources().await?;
    Ok(axum::Json(resources.into_iter().map(ResourceBody::from).collect()))
}

async fn delete_resource(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    Path(resource_id): Path<String>,
) -> Result<StatusCode, ApiError> {
    gateway.delete_resource(&admin.actor, &resource_id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct CreateBinding {
    agent_id: String,
    resource_id: String,
    #[serde(default = "agent")]
    principal_type: String,
}

fn agent() -> String {
    "agent".to_owned()
}

#[derive(Serialize)]
struct BindingBody {
    binding_id: String,
    agent_id: String,
    principal_type: String,
    resource_id: String,
    org_id: Option<String>,
    granted_at: String,
    revoked_at: Option<String>,
}

impl From<Binding> for BindingBody {
    fn from(binding: Binding) -> Self {
        Self {
            binding_id: binding.binding_id,
            agent_id: binding.agent_id,
            principal_type: binding.principal_type,
            resource_id: binding.resource_id,
            org_id: binding.org_id,
            granted_at: binding.granted_at,
            revoked_at: binding.revoked_at,
        }
    }
}

async fn create_binding(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Json(body): Json<CreateBinding>,
) -> Result<Response, ApiError> {
    let now = context.now.seconds();
    let binding =
        gateway.bind(&admin.actor, now, &body.agent_id, &body.principal_type, &body.resource_id).await?;
    Ok((StatusCode::CREATED, axum::Json(BindingBody::from(binding))).into_response())
}

#[derive(Deserialize)]
struct ListBindings {
    agent_id: Option<String>,
    resource_id: Option<String>,
    after: Option<String>,
    limit: Option<i64>,
}

async fn list_bindings(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    query: Result<Query<ListBindings>, QueryRejection>,
) -> Result<axum::Json<Vec<BindingBody>>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::new(Kind::Unprocessable, error.body_text()))?;
    let filter = BindingFilter {
        agent_id: query.agent_id,
        resource_id: query.resource_id,
        after: query.after,
        limit: query.limit,
    };
    let bindings = gateway.list_bindings(filter).await?;
    Ok(axum::Json(bindings.into_iter().map(BindingBody::from).collect()))
}

async fn revoke_binding(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(binding_id): Path<String>,
) -> Result<StatusCode, ApiError> {
    gateway.revoke_binding(&admin.actor, context.now.seconds(), &binding_id).await?;
    Ok(StatusCode::NO_CONTENT)
}
