//! Routes of the gateway: one for agents, the others for administrators.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};

use mastio_core::error::Kind;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::access::Access;
use super::declare::{Document, Plan};
use super::evidence::Evidence;
use super::peer::Listener;
use super::policy::{NewRule, Rule};
use super::protocol::{self, Revision, SESSION_HEADER};
use super::resume::{self, Keeper, Read, Reader};
use super::serve::{self, Answer, Answers, Asked};
use super::servers::{Look, NewServer, Server, Tool, ToolLimits};
use super::session::Session;
use super::{
    Binding, BindingFilter, Caller, Gateway, GatewayError, NewResource, Resource, definition, internal_error,
    jsonrpc,
};
use crate::http::authn::AdminCaller;
use crate::http::body::read;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::json::{BODY_BYTES_MAX, Json};

/// Messages of an upstream server that wait for a caller who reads slowly.
const MESSAGES_WAITING_MAX: usize = 64;
/// A caller who reads streams gets one, with signs of life this far apart, when there is nothing to say for so long.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);

/// The sign of life: a comment.
const SILENCE: &[u8] = b":\n\n";
const LAST_EVENT_ID: &str = "last-event-id";

/// The gateway's routes.
pub fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/mcp", post(post_message).delete(delete_session).get(get_stream))
        .route("/v1/admin/mcp-resources", post(create_resource).get(list_resources))
        .route("/v1/admin/mcp-resources/{resource_id}", delete(delete_resource))
        .route("/v1/admin/mcp-resources/bindings", post(create_binding).get(list_bindings))
        .route("/v1/admin/mcp-resources/bindings/{binding_id}", delete(revoke_binding))
        .route("/v1/admin/mcp-upstreams", post(create_upstream).get(list_upstreams))
        .route(
            "/v1/admin/mcp-upstreams/{upstream}",
            get(get_upstream).put(update_upstream).delete(delete_upstream),
        )
        .route("/v1/admin/mcp-upstreams/{upstream}/refresh", post(refresh_upstream))
        .route("/v1/admin/mcp-tools", get(list_tools))
        .route("/v1/admin/mcp-tools/{tool}", get(get_tool).patch(update_tool))
        .route("/v1/admin/mcp-tools/{tool}/approve", post(approve_tool))
        .route("/v1/admin/mcp-tools/{tool}/block", post(block_tool))
        .route("/v1/admin/mcp-policies", get(list_policies))
        .route("/v1/admin/mcp-policies/test", post(test_policy))
        .route("/v1/admin/mcp-policies/{policy}", get(get_policy).put(save_policy).delete(delete_policy))
        .route("/v1/admin/mcp-access", get(list_access))
        .route("/v1/admin/mcp-evidence", get(list_evidence))
        .route("/v1/admin/mcp-evidence/{evidence}", get(read_evidence))
        .route("/v1/admin/mcp-config", get(export_config))
        .route("/v1/admin/mcp-config/plan", post(plan_config))
        .route("/v1/admin/mcp-config/import", post(import_config))
        .with_state(gateway)
}

async fn post_message(
    State(gateway): State<Arc<Gateway>>,
    context: Context,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    check_origin(&gateway, &parts)?;
    if parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| !is_json(kind)) {
        return Ok((
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            axum::Json(json!({ "detail": "the body must be application/json" })),
        )
            .into_response());
    }
    let caller = gateway.authenticate.caller(&context, &parts).await?;
    let body = read(body, BODY_BYTES_MAX).await?;
    let session = resumable_session(&gateway, &context, &parts, &caller);
    let (sender, mut messages) = mpsc::channel(MESSAGES_WAITING_MAX);
    let listener = Listener { sender: Some(sender), ..Listener::default() };
    let asked = Asked { context, parts, body };
    // In a task of its own: a caller that hangs up must not keep the outcome of its call out of the log.
    let serving = tokio::spawn(serve::serve(Arc::clone(&gateway), asked, caller, listener));
    // What is said before the answer makes it a stream, and so does a long silence.
    let first = match tokio::time::timeout(SIGN_OF_LIFE, messages.recv()).await {
        Ok(None) => {
            let answers = serving.await.map_err(|_| GatewayError::Stopped)??;
            return Ok(render(answers));
        }
        Ok(Some(first)) => Some(first),
        Err(_) => None,
    };
    let kept = session.and_then(|session| {
        let primes = session.revision() >= Revision::V2025_11_25;
        gateway.resumable.keep(&session, &gateway.entropy).map(|kept| (kept, primes))
    });
    Ok(match kept {
        Some(((keeper, reader), primes)) => {
            tokio::spawn(keep(keeper, primes, first, messages, serving));
            resumed(reader)
        }
        None => {
            let first = first.map_or(Bytes::from_static(SILENCE), |first| event(&first));
            stream(first, messages, serving)
        }
    })
}

/// The caller's session, where its streams may be resumed. Whether it was ended is for whoever serves the request.
fn resumable_session(
    gateway: &Gateway,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
) -> Option<Session> {
    let id = parts.headers.get(SESSION_HEADER)?.to_str().ok()?;
    let session = Session::open(id, caller, context.now.seconds(), &gateway.sealing)?;
    resume::is_resumable(&session).then_some(session)
}

/// Keeps what is said for whoever reads it, and reads it again. What was asked for goes on without a reader.
async fn keep(
    keeper: Keeper,
    primes: bool,
    first: Option<Bytes>,
    mut messages: mpsc::Receiver<Bytes>,
    serving: JoinHandle<Result<Answers, ApiError>>,
) {
    // Who has no event yet has nothing to resume from. Clients of before 2025-11-25 cannot read one without data.
    let mut wanted = !primes || keeper.push(b"").await;
    if let Some(first) = first {
        wanted = wanted && keeper.push(&first).await;
    }
    while wanted {
        match messages.recv().await {
            Some(message) => wanted = keeper.push(&message).await,
            None => break,
        }
    }
    drop(messages);
    if wanted && let Some(text) = last_words(serving).await {
        keeper.push(&text).await;
    }
    keeper.end().await;
}

/// A stream that goes on where another has stopped.
fn resumed(reader: Reader) -> Response {
    let events = futures_util::stream::unfold(reader, |mut reader| async {
        let said = match reader.next(SIGN_OF_LIFE).await? {
            Read::Event(event) => event,
            Read::Silence => Bytes::from_static(SILENCE),
        };
        Some((Ok::<_, Infallible>(said), reader))
    });
    event_stream(Body::from_stream(events))
}

/// A browser's page may not speak for its user here, unless it is ours (DNS rebinding).
fn check_origin(gateway: &Gateway, parts: &Parts) -> Result<(), ApiError> {
    let Some(origin) = parts.headers.get(header::ORIGIN) else { return Ok(()) };
    let ours = gateway.urls.of(&parts.headers, "");
    if origin.to_str().is_ok_and(|origin| ours.iter().any(|url| url == origin)) {
        return Ok(());
    }
    Err(ApiError::new(Kind::Denied, "the request comes from a page of another origin"))
}

fn is_json(kind: &HeaderValue) -> bool {
    let kind = kind.to_str().unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

/// The stream on which a session hears what happens outside its requests. 2026-07-28 has `subscriptions/listen` for it.
async fn get_stream(
    State(gateway): State<Arc<Gateway>>,
    context: Context,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, _body) = request.into_parts();
    check_origin(&gateway, &parts)?;
    let without_sessions =
        protocol::named_revision(&parts.headers).is_ok_and(|named| named.is_some_and(Revision::is_stateless));
    if without_sessions || !parts.headers.contains_key(SESSION_HEADER) {
        return Ok((StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST, DELETE")]).into_response());
    }
    if !protocol::reads_streams(&parts.headers) {
        return Ok(StatusCode::NOT_ACCEPTABLE.into_response());
    }
    let caller = gateway.authenticate.caller(&context, &parts).await?;
    if let Some(last_event_id) = parts.headers.get(LAST_EVENT_ID) {
        let reader = serve::resume_stream(&gateway, &context, &parts, &caller, last_event_id).await?;
        return Ok(reader.map_or_else(|| StatusCode::NOT_FOUND.into_response(), resumed));
    }
    let Some(opened) = serve::open_stream(&gateway, &context, &parts, &caller).await? else {
        return Ok(StatusCode::NOT_FOUND.into_response());
    };
    let (sender, messages) = mpsc::channel(MESSAGES_WAITING_MAX);
    let listener = Listener { sender: Some(sender), ..Listener::default() };
    let asked = Asked { context, parts, body: Bytes::new() };
    let serving = tokio::spawn(serve::follow(gateway, asked, caller, opened, listener));
    Ok(stream(Bytes::from_static(SILENCE), messages, serving))
}

async fn delete_session(
    State(gateway): State<Arc<Gateway>>,
    context: Context,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let (parts, _body) = request.into_parts();
    check_origin(&gateway, &parts)?;
    let caller = gateway.authenticate.caller(&context, &parts).await?;
    let ended = serve::end_session(&gateway, &context, &parts, &caller).await?;
    Ok(if ended { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND })
}

/// The status and text of one answer; no text where there is nothing to say.
fn written(answer: Answer, cold: bool, stateless: bool) -> (StatusCode, Vec<u8>) {
    let (status, text) = match answer {
        Answer::Nothing => {
            let status = if cold { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED };
            return (status, Vec::new());
        }
        Answer::Malformed(id, error) => (StatusCode::BAD_REQUEST, jsonrpc::write_error(id.as_ref(), &error)),
        Answer::Missing(id, error) => (StatusCode::NOT_FOUND, jsonrpc::write_error(id.as_ref(), &error)),
        Answer::Under(id, outcome) => {
            let status = match &outcome {
                Err(error) if stateless => status_of(error),
                _ => StatusCode::OK,
            };
            (status, jsonrpc::write(Some(&id), outcome.as_deref().map_err(AsRef::as_ref)))
        }
    };
    let text = text.or_else(|_| jsonrpc::write_error(None, &internal_error())).unwrap_or_default();
    (status, text)
}

/// The HTTP status of a 2026-07-28 answer with this error.
fn status_of(error: &RawValue) -> StatusCode {
    #[derive(Deserialize)]
    struct Coded {
        code: i64,
    }
    match serde_json::from_str::<Coded>(error.get()).map(|error| error.code) {
        Ok(jsonrpc::code::METHOD_NOT_FOUND) => StatusCode::NOT_FOUND,
        Ok(
            jsonrpc::code::HEADER_MISMATCH
            | jsonrpc::code::MISSING_CAPABILITY
            | jsonrpc::code::UNSUPPORTED_VERSION,
        ) => StatusCode::BAD_REQUEST,
        _ => StatusCode::OK,
    }
}

fn render(answers: Answers) -> Response {
    let Answers { answers, batch, cold, stateless, session_id } = answers;
    let mut texts: Vec<(StatusCode, Vec<u8>)> =
        answers.into_iter().map(|answer| written(answer, cold, stateless)).collect();
    let (status, text) = if batch {
        texts.retain(|(_, text)| !text.is_empty());
        if texts.is_empty() {
            (StatusCode::ACCEPTED, Vec::new())
        } else {
            let items: Vec<Vec<u8>> = texts.into_iter().map(|(_, text)| text).collect();
            (StatusCode::OK, [&b"["[..], &items.join(&b","[..]), b"]"].concat())
        }
    } else {
        texts.pop().unwrap_or((StatusCode::ACCEPTED, Vec::new()))
    };
    let mut headers = HeaderMap::new();
    if !text.is_empty() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    let session_id = session_id.and_then(|id| HeaderValue::from_str(&id).ok());
    headers.extend(session_id.map(|id| (HeaderName::from_static(SESSION_HEADER), id)));
    (status, headers, text).into_response()
}

/// A message as an event. It is one line: whoever made it took the line ends out.
fn event(message: &[u8]) -> Bytes {
    [&b"event: message\ndata: "[..], message, b"\n\n"].concat().into()
}

/// What a stream still has to say.
struct Saying {
    first: Option<Bytes>,
    messages: mpsc::Receiver<Bytes>,
    serving: Option<JoinHandle<Result<Answers, ApiError>>>,
}

fn stream(
    first: Bytes,
    messages: mpsc::Receiver<Bytes>,
    serving: JoinHandle<Result<Answers, ApiError>>,
) -> Response {
    let saying = Saying { first: Some(first), messages, serving: Some(serving) };
    let events = futures_util::stream::unfold(saying, |mut saying| async {
        let said = saying.next().await?;
        Some((Ok::<_, Infallible>(said), saying))
    });
    event_stream(Body::from_stream(events))
}

fn event_stream(events: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // Tells a front like nginx to pass events on as they come.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (StatusCode::OK, headers, events).into_response()
}

impl Saying {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        match tokio::time::timeout(SIGN_OF_LIFE, self.messages.recv()).await {
            Err(_) => Some(Bytes::from_static(SILENCE)),
            Ok(Some(message)) => Some(event(&message)),
            // Nobody says anything any more: the answer is next, and last.
            Ok(None) => Some(event(&last_words(self.serving.take()?).await?)),
        }
    }
}

/// The answer at the end of a stream, on one line. Absent where there is nothing to say.
async fn last_words(serving: JoinHandle<Result<Answers, ApiError>>) -> Option<Vec<u8>> {
    let text = match serving.await {
        Ok(Ok(answers)) => {
            let texts: Vec<Vec<u8>> = answers
                .answers
                .into_iter()
                .map(|answer| written(answer, false, false).1)
                .filter(|text| !text.is_empty())
                .collect();
            if texts.is_empty() {
                return None;
            }
            if answers.batch { [&b"["[..], &texts.join(&b","[..]), b"]"].concat() } else { texts.concat() }
        }
        // The caller's stream has begun, so it is too late for a status.
        Ok(Err(_)) | Err(_) => jsonrpc::write_error(None, &internal_error()).ok()?,
    };
    Some(super::peer::one_line(&text))
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

fn server_body(server: &Server) -> Value {
    json!({
        "upstream_id": server.upstream_id,
        "name": server.name,
        "endpoint_url": server.endpoint_url,
        "description": server.description,
        "auth_type": server.auth_type,
        "allowed_domains": server.allowed_domains,
        "required_capability": server.required_capability,
        "ca_pem": server.ca_pem,
        "timeout_ms": server.timeout_ms,
        "calls_max": server.calls_max,
        "asserts_caller": server.asserts_caller,
        "enabled": server.enabled,
        "revision": server.revision.map(super::protocol::Revision::as_str),
        "capabilities": server.capabilities,
        "discovered_at": server.discovered_at,
        "discovery_error": server.discovery_error,
        "created_at": server.created_at,
        "updated_at": server.updated_at,
    })
}

fn look_body(look: &Look) -> Value {
    json!({
        "tools": look.tools,
        "new": look.new,
        "changed": look.changed,
        "restored": look.restored,
        "gone": look.gone,
        "unusable": look.unusable.iter().map(|(name, why)| json!({ "name": name, "why": why })).collect::<Vec<_>>(),
    })
}

async fn create_upstream(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Json(new): Json<NewServer>,
) -> Result<Response, ApiError> {
    let (server, look) = gateway.register_server(&admin.actor, context.now.seconds(), new).await?;
    let mut body = server_body(&server);
    if let Some(body) = body.as_object_mut() {
        body.insert("found".to_owned(), look.as_ref().map_or(Value::Null, look_body));
    }
    Ok((StatusCode::CREATED, axum::Json(body)).into_response())
}

async fn list_upstreams(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    Ok(axum::Json(gateway.list_servers().await?.iter().map(server_body).collect()))
}

async fn get_upstream(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    Path(upstream): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(server_body(&gateway.server(&upstream).await?)))
}

async fn update_upstream(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(upstream): Path<String>,
    Json(new): Json<NewServer>,
) -> Result<axum::Json<Value>, ApiError> {
    let server = gateway.change_server(&admin.actor, context.now.seconds(), &upstream, new).await?;
    Ok(axum::Json(server_body(&server)))
}

async fn delete_upstream(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    Path(upstream): Path<String>,
) -> Result<StatusCode, ApiError> {
    gateway.delete_server(&admin.actor, &upstream).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn refresh_upstream(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(upstream): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(look_body(&gateway.look(&admin.actor, context.now.seconds(), &upstream).await?)))
}

fn tool_body(tool: &Tool, upstream: Option<&str>) -> Value {
    let mut body = json!({
        "tool_id": tool.tool_id,
        "name": tool.name,
        "upstream_id": tool.upstream_id,
        "upstream_name": tool.upstream_name,
        "standing": tool.standing(),
        "definition_digest": tool.definition_digest,
        "found_digest": tool.found_digest,
        "imitates": tool.imitates,
        "required_capability": tool.required_capability,
        "calls_per_minute": tool.calls_per_minute,
        "retention_days": tool.retention_days,
        "first_seen_at": tool.first_seen_at,
        "approved_at": tool.approved_at,
        "approved_by": tool.approved_by,
    });
    if let (Some(body), Some(upstream)) = (body.as_object_mut(), upstream) {
        body.insert("upstream".to_owned(), json!(upstream));
    }
    body
}

#[derive(Deserialize)]
struct ListTools {
    upstream: Option<String>,
    standing: Option<String>,
}

async fn list_tools(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    query: Result<Query<ListTools>, QueryRejection>,
) -> Result<axum::Json<Vec<Value>>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::new(Kind::Unprocessable, error.body_text()))?;
    let tools = gateway.list_tools_of_servers(query.upstream.as_deref(), query.standing.as_deref()).await?;
    Ok(axum::Json(tools.iter().map(|(tool, upstream)| tool_body(tool, Some(upstream))).collect()))
}

async fn get_tool(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    Path(tool): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    let tool = gateway.server_tool(&tool).await?;
    let read = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let found = read(&tool.found);
    let definition = tool.definition.as_deref().map(read);
    let differences = definition.as_ref().map(|definition| definition::differences(definition, &found));
    let mut body = tool_body(&tool, None);
    if let Some(body) = body.as_object_mut() {
        body.insert("definition".to_owned(), json!(definition));
        body.insert("found".to_owned(), found);
        body.insert("differences".to_owned(), json!(differences.unwrap_or_default()));
    }
    Ok(axum::Json(body))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Approve {
    digest: String,
    #[serde(default)]
    accept_imitation: bool,
}

async fn approve_tool(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(tool): Path<String>,
    Json(body): Json<Approve>,
) -> Result<axum::Json<Value>, ApiError> {
    let now = context.now.seconds();
    let tool = gateway.approve_tool(&admin.actor, now, &tool, &body.digest, body.accept_imitation).await?;
    Ok(axum::Json(tool_body(&tool, None)))
}

async fn block_tool(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    Path(tool): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(tool_body(&gateway.block_tool(&admin.actor, &tool).await?, None)))
}

async fn update_tool(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    Path(tool): Path<String>,
    Json(limits): Json<ToolLimits>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(tool_body(&gateway.limit_tool(&admin.actor, &tool, limits).await?, None)))
}

async fn list_policies(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
) -> Result<axum::Json<Vec<Rule>>, ApiError> {
    Ok(axum::Json(gateway.list_rules().await?))
}

async fn get_policy(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    Path(policy): Path<String>,
) -> Result<axum::Json<Vec<Rule>>, ApiError> {
    Ok(axum::Json(gateway.rule_versions(&policy).await?))
}

async fn save_policy(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(policy): Path<String>,
    Json(new): Json<NewRule>,
) -> Result<axum::Json<Rule>, ApiError> {
    Ok(axum::Json(gateway.save_rule(&admin.actor, context.now.seconds(), &policy, new, None).await?))
}

async fn delete_policy(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(policy): Path<String>,
) -> Result<StatusCode, ApiError> {
    gateway.delete_rule(&admin.actor, context.now.seconds(), &policy).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestPolicy {
    agent_id: String,
    tool: String,
    arguments: Option<Value>,
    /// A rule that is not saved, judged as if it were in force.
    draft: Option<NewRule>,
    #[serde(default = "draft_name")]
    draft_name: String,
}

fn draft_name() -> String {
    "draft".to_owned()
}

async fn test_policy(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    Json(test): Json<TestPolicy>,
) -> Result<axum::Json<Access>, ApiError> {
    let draft = test.draft.as_ref().map(|draft| (test.draft_name.as_str(), draft));
    Ok(axum::Json(gateway.explain(&test.agent_id, &test.tool, test.arguments.as_ref(), draft).await?))
}

#[derive(Deserialize)]
struct ListAccess {
    agent_id: Option<String>,
    tool: Option<String>,
}

async fn list_access(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    query: Result<Query<ListAccess>, QueryRejection>,
) -> Result<axum::Json<Vec<Access>>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::new(Kind::Unprocessable, error.body_text()))?;
    Ok(axum::Json(gateway.access(query.agent_id.as_deref(), query.tool.as_deref()).await?))
}

async fn export_config(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
) -> Result<axum::Json<Document>, ApiError> {
    Ok(axum::Json(gateway.export().await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    document: Document,
    #[serde(default)]
    prune: bool,
    plan_digest: Option<String>,
}

async fn plan_config(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    Json(import): Json<Import>,
) -> Result<axum::Json<Plan>, ApiError> {
    Ok(axum::Json(gateway.plan_import(&import.document, import.prune).await?))
}

async fn import_config(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Json(import): Json<Import>,
) -> Result<axum::Json<Plan>, ApiError> {
    let Import { document, prune, plan_digest } = import;
    let now = context.now.seconds();
    Ok(axum::Json(gateway.import(&admin.actor, now, &document, prune, plan_digest.as_deref()).await?))
}

#[derive(Deserialize)]
struct ListEvidence {
    tool: Option<String>,
    agent_id: Option<String>,
    after: Option<String>,
}

async fn list_evidence(
    State(gateway): State<Arc<Gateway>>,
    _admin: AdminCaller,
    query: Result<Query<ListEvidence>, QueryRejection>,
) -> Result<axum::Json<Vec<Evidence>>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::new(Kind::Unprocessable, error.body_text()))?;
    let ListEvidence { tool, agent_id, after } = query;
    let found = gateway.list_evidence(tool.as_deref(), agent_id.as_deref(), after.as_deref()).await?;
    Ok(axum::Json(found))
}

async fn read_evidence(
    State(gateway): State<Arc<Gateway>>,
    admin: AdminCaller,
    context: Context,
    Path(evidence): Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(gateway.read_evidence(&admin.actor, context.now.seconds(), &evidence).await?))
}
