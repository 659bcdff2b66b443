//! The MCP gateway: agents call the tools of upstream servers through us, and only the tools they were granted.
//!
//! An administrator registers an upstream server (*resource*: one name, one tool) and binds agents to it. A tool
//! call then goes through these steps, told by [`serve`]:
//!
//! 1. [`Authenticate`] turns the request's access token and DPoP proof into a [`Caller`].
//! 2. [`plan`](Gateway::plan) decides in one indexed read: is there such a tool, is the caller bound to it, does
//!    the caller have the capability it requires. Nothing is remembered between requests, so a change of a binding
//!    takes effect with the next one.
//! 3. The decision and the proof's identifier are made durable in one commit. A proof that was used before is
//!    refused here, and so is a caller whose standing has changed meanwhile (judged once more, then refused).
//! 4. Only then is the upstream server called, with headers of our own making.
//! 5. The outcome is made durable, and the answer goes out.
//!
//! A call that was allowed and has no outcome in the log was cut off by a crash of ours between 3 and 5.
//!
//! **Invariant:** a caller's credential never reaches an upstream server. **Invariant:** no upstream server is
//! connected to at an address that [`address`] does not admit. **Invariant:** what is not granted is denied, and
//! not listed either.
//!
//! The MCP revision spoken is 2024-11-05 without a handshake, as the SDK does. Another revision is another file
//! beside [`jsonrpc`].

mod address;
mod authn;
mod error;
mod http;
mod jsonrpc;
mod sse;
mod store;
#[cfg(test)]
mod tests;
mod upstream;

use std::sync::Arc;
use std::time::Instant;

use axum::http::request::Parts;
use futures_util::future::BoxFuture;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::error::Kind;
use mastio_core::time::UnixTime;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};

pub use authn::TokenCallers;
pub use error::{FieldProblem, GatewayError};
pub use http::routes;
use jsonrpc::{Id, Message, Method, RpcError, ToolCall, code};
use upstream::{Credential, Endpoint, Slot};
pub use upstream::{Secrets, Upstream, UpstreamError};

use crate::entropy::Entropy;
use crate::http::context::Context;
use crate::http::error::{ApiError, Problem as _, chain};
use crate::store::Store;
use crate::store::group::{Append, AppendError, Journal, OneUse};

/// The MCP revision that we answer `initialize` with.
const PROTOCOL_VERSION: &str = "2024-11-05";
/// Bytes of a call's arguments at most, as compact JSON (wire contract §5).
const ARGUMENTS_BYTES_MAX: usize = 128 * 1024;
/// Resources that may be registered; each may be a line of every agent's tool list.
const RESOURCES_MAX: i64 = 1000;
/// Bindings in one page of the list.
const BINDINGS_PER_PAGE_MAX: i64 = 1000;
/// How often a caller is judged for one request: once more when its standing changed in between.
const JUDGED_MAX: usize = 2;

/// Who calls, as judged from the access token and the DPoP proof of one request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The agent's id, `org::name` or the bare name.
    pub agent_id: String,
    /// `agent`, `user` or `workload`.
    pub principal_type: String,
    /// The capabilities in the agent's row now.
    pub capabilities: Vec<String>,
    /// What this request uses up: the proof's identifier, where one was needed.
    pub one_use: Vec<OneUse>,
    /// `jti` of the access token.
    pub access_token: Option<String>,
    /// The epoch at which all this was judged.
    pub epoch: i64,
}

/// Judges who calls. Implemented by the capability that owns access tokens.
pub trait Authenticate: Send + Sync {
    /// Turns the credentials of a request into a [`Caller`]. Does not use up the proof: the gateway does, in the
    /// commit that records what the proof was used for.
    ///
    /// Errors: [`ApiError`], 401 for every fault of the credentials.
    fn caller<'a>(
        &'a self,
        context: &'a Context,
        parts: &'a Parts,
    ) -> BoxFuture<'a, Result<Caller, ApiError>>;

    /// Told of a caller who was let in and refused by the commit: a proof that was used before, a revoked token, a
    /// standing that changed. Gives the 401 to answer with.
    fn refused<'a>(
        &'a self,
        _context: &'a Context,
        _parts: &'a Parts,
        _reason: &'static str,
        error: ApiError,
    ) -> BoxFuture<'a, ApiError> {
        Box::pin(std::future::ready(error))
    }

    /// Takes up the state that has moved since the last judgement. Called before the same request is judged again.
    fn refresh(&self) -> BoxFuture<'_, Result<(), ApiError>>;
}

/// The gateway and what it needs.
pub struct Gateway {
    /// Resources and bindings.
    pub store: Store,
    /// Where decisions and outcomes become durable.
    pub journal: Journal,
    /// The client towards upstream servers.
    pub upstream: Upstream,
    /// Our organisation, the `org` of `org::name`.
    pub org_id: String,
    /// Names what is new.
    pub entropy: Arc<Entropy>,
    /// Judges callers.
    pub authenticate: Arc<dyn Authenticate>,
}

/// What goes back to a JSON-RPC caller.
#[derive(Debug)]
enum Answer {
    /// Nothing: the request was a notification.
    Nothing,
    /// The body was no request. HTTP 400.
    Malformed(RpcError),
    /// A result or an error under the request's id. HTTP 200.
    Under(Id, Result<Box<RawValue>, RpcError>),
}

/// What a request will lead to, decided before anything is recorded.
struct Plan {
    events: Vec<Event>,
    step: Step,
}

enum Step {
    Answer(Answer),
    Forward(Box<Forward>),
}

/// A call that may go upstream.
struct Forward {
    id: Id,
    tool: String,
    arguments: Box<RawValue>,
    resource_id: String,
    endpoint: Endpoint,
    credential: Credential,
    slot: Slot,
}

/// Serves one JSON-RPC message of an authenticated caller.
///
/// Errors: 401 for a replayed proof or a standing that changed twice, 503 when the audit log or the database is away.
async fn serve(
    gateway: Arc<Gateway>,
    context: Context,
    parts: Parts,
    mut caller: Caller,
    message: Message,
) -> Result<Answer, ApiError> {
    let mut judged = 1;
    loop {
        let plan = gateway.plan(&context, &caller, &message).await?;
        let append = Append {
            events: plan.events,
            one_use: caller.one_use.clone(),
            access_token: caller.access_token.clone(),
            epoch: Some(caller.epoch),
        };
        match gateway.journal.append(append).await {
            Ok(_sequence) => {
                return match plan.step {
                    Step::Answer(answer) => Ok(answer),
                    Step::Forward(forward) => Ok(gateway.forward(&context, &caller, *forward).await?),
                };
            }
            Err(AppendError::Stale) if judged < JUDGED_MAX => {
                judged += 1;
                gateway.authenticate.refresh().await?;
                caller = gateway.authenticate.caller(&context, &parts).await?;
            }
            Err(error) => {
                let error = GatewayError::from(error);
                let (kind, reason) = (error.kind(), error.reason());
                let error = ApiError::from(error);
                return Err(if kind == Kind::Unauthenticated {
                    gateway.authenticate.refused(&context, &parts, reason, error).await
                } else {
                    error
                });
            }
        }
    }
}

impl Gateway {
    async fn plan(
        &self,
        context: &Context,
        caller: &Caller,
        message: &Message,
    ) -> Result<Plan, GatewayError> {
        let (id, method) = match message {
            Message::Malformed(error) => return Ok(Plan::answer(Answer::Malformed(error.clone()))),
            Message::Notification => return Ok(Plan::answer(Answer::Nothing)),
            Message::Request { id, method } => (id, method),
        };
        let outcome = match method {
            Method::Initialize => Ok(to_raw_value(&json!({
                "protocolVersion": PROTOCOL_VERSION,
                "capabilities": { "tools": {} },
                "serverInfo": { "name": "cullis-proxy", "version": "0.1.0" },
            }))?),
            Method::Ping => Ok(jsonrpc::empty_object()),
            Method::ListTools => Ok(to_raw_value(&self.list_tools(caller).await?)?),
            Method::Unanswerable(error) => Err(error.clone()),
            Method::CallTool(call) => return self.plan_call(context, caller, id, call).await,
        };
        Ok(Plan::answer(Answer::Under(id.clone(), outcome)))
    }

    /// The tools that the caller may call, each as registered.
    async fn list_tools(&self, caller: &Caller) -> Result<ToolList, GatewayError> {
        let mut tx = self.store.read().await?;
        let holder = self.holder(caller);
        let bound = store::bound_tools(&mut tx, &self.org_id, &holder, RESOURCES_MAX).await?;
        let tools = bound
            .into_iter()
            .filter(|tool| has_capability(caller, tool.required_capability.as_deref()).is_ok())
            .map(|tool| ListedTool {
                input_schema: tool
                    .input_schema
                    .and_then(|schema| RawValue::from_string(schema).ok())
                    .unwrap_or_else(any_object_schema),
                name: tool.name,
                description: tool.description.unwrap_or_default(),
            })
            .collect();
        Ok(ToolList { tools })
    }

    async fn plan_call(
        &self,
        context: &Context,
        caller: &Caller,
        id: &Id,
        call: &ToolCall,
    ) -> Result<Plan, GatewayError> {
        let mut tx = self.store.read().await?;
        let found = store::tool(&mut tx, &self.org_id, &self.holder(caller), &call.name).await?;
        drop(tx);
        let resource_id = found.as_ref().map(|tool| tool.resource_id.clone());
        let decision = authorize(caller, call, found);
        let mut details = json!({
            "tool": call.name,
            "resource_id": resource_id,
            "request_id": context.request_id,
            "decision": if decision.is_ok() { "allowed" } else { "denied" },
        });
        let reached = match decision {
            Ok(tool) => self.reach(&tool).map(|reached| (tool, reached)).map_err(|error| {
                // Allowed, but there is nothing to wait for: decision and outcome are one event.
                set(&mut details, "outcome", "error");
                GatewayError::Upstream(error)
            }),
            Err(denied) => Err(denied),
        };
        let step = match reached {
            Ok((tool, (endpoint, credential, slot))) => Step::Forward(Box::new(Forward {
                id: id.clone(),
                tool: call.name.clone(),
                arguments: call.arguments.clone(),
                resource_id: tool.resource_id,
                endpoint,
                credential,
                slot,
            })),
            Err(error) => {
                set(&mut details, "reason", error.reason());
                let Some(rpc) = error.as_rpc() else { return Err(error) };
                Step::Answer(Answer::Under(id.clone(), Err(rpc)))
            }
        };
        let event = event(EventType::McpToolCalled, &caller.agent_id, details);
        Ok(Plan { events: vec![event], step })
    }

    /// Everything about an upstream call that can fail without waiting.
    fn reach(&self, tool: &store::Tool) -> Result<(Endpoint, Credential, Slot), UpstreamError> {
        let endpoint = self.upstream.endpoint(&tool.endpoint_url, &tool.allowed_domains)?;
        let credential = Credential::parse(&tool.auth_type, tool.auth_secret_ref.as_deref())
            .map_err(|_| UpstreamError::Credential)?;
        let slot = self.upstream.slot(&endpoint)?;
        Ok((endpoint, credential, slot))
    }

    /// Calls the upstream server and records the outcome before it is told.
    async fn forward(
        &self,
        context: &Context,
        caller: &Caller,
        forward: Forward,
    ) -> Result<Answer, GatewayError> {
        let started = Instant::now();
        let Forward { id, tool, arguments, resource_id, endpoint, credential, slot } = forward;
        let result = self.upstream.call(&endpoint, &credential, &id.text(), &tool, &arguments).await;
        drop(slot);
        let latency_ms = i64::try_from(started.elapsed().as_millis()).unwrap_or(i64::MAX);

        let mut details = json!({
            "tool": tool,
            "resource_id": resource_id,
            "request_id": context.request_id,
            "latency_ms": latency_ms,
        });
        let outcome = match result {
            Ok(result) => {
                let (result, is_error) = as_tool_result(result)?;
                set(&mut details, "outcome", if is_error { "error" } else { "ok" });
                if is_error {
                    set(&mut details, "reason", "tool_error");
                }
                Ok(result)
            }
            Err(error) => {
                tracing::warn!(
                    request_id = context.request_id,
                    resource_id,
                    latency_ms,
                    error = chain(&error),
                    "mcp_upstream_call_failed"
                );
                set(&mut details, "outcome", "error");
                set(&mut details, "reason", error.reason());
                Err(RpcError::new(error.code(), error.to_string()))
            }
        };
        // No epoch: the call was made, so its outcome belongs into the log whatever has changed since.
        let events = vec![event(EventType::McpToolCalled, &caller.agent_id, details)];
        self.journal.append(Append { events, ..Append::default() }).await?;
        Ok(Answer::Under(id, outcome))
    }

    fn holder(&self, caller: &Caller) -> store::Holder {
        store::Holder {
            principal_type: caller.principal_type.clone(),
            canonical: canonical(&self.org_id, &caller.agent_id),
            bare: bare(&self.org_id, &caller.agent_id),
        }
    }
}

impl Plan {
    fn answer(answer: Answer) -> Self {
        Self { events: Vec::new(), step: Step::Answer(answer) }
    }
}

/// Decides whether the caller may make the call. What is not granted is denied.
fn authorize(
    caller: &Caller,
    call: &ToolCall,
    found: Option<store::Tool>,
) -> Result<store::Tool, GatewayError> {
    let tool = found.ok_or_else(|| GatewayError::UnknownTool(call.name.clone()))?;
    if !tool.bound {
        return Err(GatewayError::NoBinding(call.name.clone()));
    }
    has_capability(caller, tool.required_capability.as_deref())?;
    let sent = call.arguments.get();
    // Without its whitespace a text is no longer than with it.
    if sent.len() > ARGUMENTS_BYTES_MAX {
        let found = jsonrpc::compact_bytes(sent);
        if found > ARGUMENTS_BYTES_MAX {
            return Err(GatewayError::ArgumentsTooLarge { found, bytes_max: ARGUMENTS_BYTES_MAX });
        }
    }
    Ok(tool)
}

fn has_capability(caller: &Caller, required: Option<&str>) -> Result<(), GatewayError> {
    match required {
        Some(required) if !caller.capabilities.iter().any(|held| held == required) => {
            Err(GatewayError::MissingCapability(required.to_owned()))
        }
        _ => Ok(()),
    }
}

/// The result of `tools/call` and whether it says that the tool failed. A result with a `content` list passes
/// untouched; anything else, which an MCP client could not read, becomes one block of text.
fn as_tool_result(result: Box<RawValue>) -> Result<(Box<RawValue>, bool), GatewayError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape<'a> {
        #[serde(borrow)]
        content: &'a RawValue,
        #[serde(borrow)]
        is_error: Option<&'a RawValue>,
    }
    if let Ok(shape) = serde_json::from_str::<Shape<'_>>(result.get())
        && shape.content.get().starts_with('[')
    {
        let is_error = shape.is_error.is_some_and(|flag| flag.get() == "true");
        return Ok((result, is_error));
    }
    let text = serde_json::from_str::<String>(result.get()).unwrap_or_else(|_| result.get().to_owned());
    let wrapped = json!({ "content": [{ "type": "text", "text": text }], "isError": false });
    Ok((to_raw_value(&wrapped)?, false))
}

#[derive(Serialize)]
struct ToolList {
    tools: Vec<ListedTool>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ListedTool {
    name: String,
    description: String,
    input_schema: Box<RawValue>,
}

fn any_object_schema() -> Box<RawValue> {
    to_raw_value(&json!({ "type": "object", "properties": {} })).unwrap_or_else(|_| jsonrpc::empty_object())
}

/// An upstream server to be registered.
#[derive(Debug, Clone)]
pub struct NewResource {
    /// Its name, which is the name of its tool.
    pub name: String,
    /// Where it answers.
    pub endpoint_url: String,
    /// What agents read about the tool.
    pub description: Option<String>,
    /// `none`, `bearer` or `api_key`.
    pub auth_type: String,
    /// `env://NAME`, where there is a secret.
    pub auth_secret_ref: Option<String>,
    /// The capability that a caller needs besides a binding.
    pub required_capability: Option<String>,
    /// Hosts that the endpoint may have; by default its own.
    pub allowed_domains: Vec<String>,
    /// The organisation, where the request names one; it must be ours.
    pub org_id: Option<String>,
    /// Whether it may be called.
    pub enabled: bool,
}

/// A registered upstream server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// UUID.
    pub resource_id: String,
    /// Its name, which is the name of its tool.
    pub name: String,
    /// Where it answers.
    pub endpoint_url: String,
    /// What agents read about the tool.
    pub description: Option<String>,
    /// `none`, `bearer` or `api_key`; a predecessor's row may say otherwise and is then not called.
    pub auth_type: String,
    /// The capability that a caller needs besides a binding.
    pub required_capability: Option<String>,
    /// Whether it may be called.
    pub enabled: bool,
    /// The organisation; absent in some of a predecessor's rows, which count as ours.
    pub org_id: Option<String>,
    /// RFC 3339.
    pub created_at: String,
}

/// A grant: this agent may call this resource's tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// UUID.
    pub binding_id: String,
    /// `org::name`; a predecessor's row may have the bare name.
    pub agent_id: String,
    /// `agent`, `user` or `workload`.
    pub principal_type: String,
    /// The resource.
    pub resource_id: String,
    /// The organisation.
    pub org_id: Option<String>,
    /// RFC 3339.
    pub granted_at: String,
    /// RFC 3339; absent while the grant is active.
    pub revoked_at: Option<String>,
}

impl Gateway {
    /// Registers an upstream server and asks it for its tool's schema.
    ///
    /// Errors: [`GatewayError::Fields`], [`GatewayError::NameTaken`], [`GatewayError::TooManyResources`]. An upstream
    /// server that does not answer is no error.
    pub async fn register_resource(
        &self,
        actor: &str,
        now: UnixTime,
        new: NewResource,
    ) -> Result<Resource, GatewayError> {
        let (endpoint, credential) = self.check_resource(&new)?;
        // Before the lock is taken: an upstream server may be slow.
        let input_schema = self.upstream.input_schema(&endpoint, &credential, &new.name).await;

        let mut tx = self.store.write().await?;
        if store::name_is_taken(&mut tx, &self.org_id, &new.name).await? {
            return Err(GatewayError::NameTaken(new.name));
        }
        if store::count_resources(&mut tx).await? >= RESOURCES_MAX {
            return Err(GatewayError::TooManyResources(RESOURCES_MAX));
        }
        let resource = Resource {
            resource_id: self.entropy.uuid(),
            name: new.name,
            endpoint_url: new.endpoint_url,
            description: new.description,
            auth_type: new.auth_type,
            required_capability: new.required_capability,
            enabled: new.enabled,
            org_id: Some(self.org_id.clone()),
            created_at: now.to_rfc3339(),
        };
        let domains = serde_json::to_string(&new.allowed_domains)?;
        store::insert_resource(
            &mut tx,
            &resource,
            new.auth_secret_ref.as_deref(),
            &domains,
            input_schema.as_deref().map(RawValue::get),
        )
        .await?;
        let details = json!({
            "resource_id": resource.resource_id,
            "name": resource.name,
            "endpoint_url": resource.endpoint_url,
            "auth_type": resource.auth_type,
            "auth_secret_ref": new.auth_secret_ref,
            "required_capability": resource.required_capability,
            "allowed_domains": new.allowed_domains,
            "enabled": resource.enabled,
        });
        tx.commit(&[event(EventType::McpResourceCreated, actor, details)]).await?;
        Ok(resource)
    }

    /// Every registered upstream server, by name.
    pub async fn list_resources(&self) -> Result<Vec<Resource>, GatewayError> {
        Ok(store::resources(&mut self.store.read().await?, &self.org_id, RESOURCES_MAX).await?)
    }

    /// Removes an upstream server with every binding to it.
    ///
    /// Errors: [`GatewayError::UnknownResource`].
    pub async fn delete_resource(&self, actor: &str, resource_id: &str) -> Result<(), GatewayError> {
        let mut tx = self.store.write().await?;
        let name = store::resource_name(&mut tx, &self.org_id, resource_id)
            .await?
            .ok_or(GatewayError::UnknownResource)?;
        let bindings = store::delete_resource(&mut tx, resource_id).await?;
        let details = json!({ "resource_id": resource_id, "name": name, "bindings_deleted": bindings });
        tx.commit(&[event(EventType::McpResourceDeleted, actor, details)]).await?;
        Ok(())
    }

    /// Lets an agent call a resource's tool. A grant that was revoked before is given anew, under a new id.
    ///
    /// Errors: [`GatewayError::Fields`], [`GatewayError::UnknownResource`], [`GatewayError::AlreadyBound`].
    pub async fn bind(
        &self,
        actor: &str,
        now: UnixTime,
        agent_id: &str,
        principal_type: &str,
        resource_id: &str,
    ) -> Result<Binding, GatewayError> {
        check_binding(agent_id, principal_type)?;
        let mut tx = self.store.write().await?;
        store::resource_name(&mut tx, &self.org_id, resource_id)
            .await?
            .ok_or(GatewayError::UnknownResource)?;
        let holder = store::Holder {
            principal_type: principal_type.to_owned(),
            canonical: canonical(&self.org_id, agent_id),
            bare: bare(&self.org_id, agent_id),
        };
        if store::is_bound(&mut tx, &holder, resource_id).await? {
            return Err(GatewayError::AlreadyBound);
        }
        let binding = Binding {
            binding_id: self.entropy.uuid(),
            agent_id: holder.canonical,
            principal_type: holder.principal_type,
            resource_id: resource_id.to_owned(),
            org_id: Some(self.org_id.clone()),
            granted_at: now.to_rfc3339(),
            revoked_at: None,
        };
        store::grant(&mut tx, &binding, actor).await?;
        let details = json!({
            "binding_id": binding.binding_id,
            "agent_id": binding.agent_id,
            "principal_type": binding.principal_type,
            "resource_id": resource_id,
        });
        tx.commit(&[event(EventType::McpBindingCreated, actor, details)]).await?;
        Ok(binding)
    }

    /// Bindings by id, revoked ones too: a page of at most a thousand, after `after` (exclusive).
    pub async fn list_bindings(&self, filter: BindingFilter) -> Result<Vec<Binding>, GatewayError> {
        let holder = filter
            .agent_id
            .as_deref()
            .map(|agent_id| (canonical(&self.org_id, agent_id), bare(&self.org_id, agent_id)));
        let limit = filter.limit.unwrap_or(BINDINGS_PER_PAGE_MAX).clamp(1, BINDINGS_PER_PAGE_MAX);
        let mut tx = self.store.read().await?;
        Ok(store::bindings(&mut tx, holder, filter.resource_id, filter.after.unwrap_or_default(), limit)
            .await?)
    }

    /// Ends a grant. The row stays, for whoever asks later.
    ///
    /// Errors: [`GatewayError::UnknownBinding`], also for one that is revoked already.
    pub async fn revoke_binding(
        &self,
        actor: &str,
        now: UnixTime,
        binding_id: &str,
    ) -> Result<(), GatewayError> {
        let mut tx = self.store.write().await?;
        let revoked = store::revoke(&mut tx, binding_id, &now.to_rfc3339())
            .await?
            .ok_or(GatewayError::UnknownBinding)?;
        let details = json!({
            "binding_id": binding_id,
            "agent_id": revoked.agent_id,
            "principal_type": revoked.principal_type,
            "resource_id": revoked.resource_id,
        });
        tx.commit(&[event(EventType::McpBindingRevoked, actor, details)]).await?;
        Ok(())
    }

    fn check_resource(&self, new: &NewResource) -> Result<(Endpoint, Credential), GatewayError> {
        let mut problems = Vec::new();
        let mut expect = |holds: bool, field: &'static str, message: &str| {
            if !holds {
                problems.push(FieldProblem { field, message: message.to_owned() });
            }
        };
        expect(is_tool_name(&new.name), "name", "must match ^[A-Za-z0-9_.-]{1,64}$");
        let description = new.description.as_deref().unwrap_or_default();
        expect(description.len() <= DESCRIPTION_BYTES_MAX, "description", "must have at most 4096 bytes");
        expect(
            new.required_capability.as_deref().is_none_or(|capability| is_word(capability, 128)),
            "required_capability",
            "must be 1 to 128 printable characters without spaces",
        );
        expect(
            new.allowed_domains.len() <= DOMAINS_MAX
                && new.allowed_domains.iter().all(|name| is_domain(name)),
            "allowed_domains",
            "must be at most 32 host names, each plain or with a leading *.",
        );
        expect(
            new.org_id.as_deref().is_none_or(|org_id| org_id == self.org_id),
            "org_id",
            "must be this organisation's id or absent",
        );
        expect(new.endpoint_url.len() <= URL_BYTES_MAX, "endpoint_url", "must have at most 2048 bytes");
        let known_type = matches!(new.auth_type.as_str(), "none" | "bearer" | "api_key");
        expect(known_type, "auth_type", "must be one of none, bearer, api_key");
        let credential = Credential::parse(&new.auth_type, new.auth_secret_ref.as_deref());
        if let (Err(message), true) = (&credential, known_type) {
            expect(false, "auth_secret_ref", message);
        }
        let endpoint = self.upstream.endpoint(&new.endpoint_url, &new.allowed_domains);
        if let Err(error) = &endpoint {
            let hint = match error {
                UpstreamError::Address => "; list the host in MCP_PROXY_INTERNAL_HOST_ALLOWLIST to allow it",
                _ => "",
            };
            expect(false, "endpoint_url", &format!("{error}{hint}"));
        }
        match (endpoint, credential) {
            (Ok(endpoint), Ok(credential)) if problems.is_empty() => Ok((endpoint, credential)),
            _ => Err(GatewayError::Fields(problems)),
        }
    }
}

/// Which bindings to list.
#[derive(Debug, Clone, Default)]
pub struct BindingFilter {
    /// Those of this agent, bare name or `org::name`.
    pub agent_id: Option<String>,
    /// Those to this resource.
    pub resource_id: Option<String>,
    /// Those whose id sorts after this one.
    pub after: Option<String>,
    /// How many at most.
    pub limit: Option<i64>,
}

/// Bytes of a description at most.
const DESCRIPTION_BYTES_MAX: usize = 4096;
/// Bytes of an endpoint's URL at most.
const URL_BYTES_MAX: usize = 2048;
/// Entries of `allowed_domains` at most.
const DOMAINS_MAX: usize = 32;

fn check_binding(agent_id: &str, principal_type: &str) -> Result<(), GatewayError> {
    let mut problems = Vec::new();
    if !is_word(agent_id, 255) {
        let message = "must be 1 to 255 printable characters without spaces".to_owned();
        problems.push(FieldProblem { field: "agent_id", message });
    }
    if !matches!(principal_type, "agent" | "user" | "workload") {
        let message = "must be one of agent, user, workload".to_owned();
        problems.push(FieldProblem { field: "principal_type", message });
    }
    if problems.is_empty() { Ok(()) } else { Err(GatewayError::Fields(problems)) }
}

fn is_tool_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_word(text: &str, bytes_max: usize) -> bool {
    (1..=bytes_max).contains(&text.len())
        && !text.chars().any(|character| character.is_whitespace() || character.is_control())
}

fn is_domain(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    (1..=253).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':'))
}

/// `org::name` of an agent that may be named by its bare name.
fn canonical(org_id: &str, agent_id: &str) -> String {
    if agent_id.contains("::") { agent_id.to_owned() } else { format!("{org_id}::{agent_id}") }
}

/// The bare name of one of our agents. An id that is not exactly `org::name` stays whole: another organisation's
/// agent is nobody of ours, and a name with `::` in it must not turn into someone else's id (`acme::acme::a`).
fn bare(org_id: &str, agent_id: &str) -> String {
    let name = agent_id.strip_prefix(org_id).and_then(|rest| rest.strip_prefix("::"));
    name.filter(|name| !name.contains("::")).unwrap_or(agent_id).to_owned()
}

fn event(event_type: EventType, actor: &str, details: Value) -> Event {
    Event { event_type, actor: actor.to_owned(), details }
}

fn set(details: &mut Value, key: &str, value: &str) {
    if let Some(details) = details.as_object_mut() {
        details.insert(key.to_owned(), Value::from(value));
    }
}

/// An internal error that reached a caller who waits for JSON-RPC.
fn internal_error() -> RpcError {
    RpcError::new(code::INTERNAL, "Internal error")
}
