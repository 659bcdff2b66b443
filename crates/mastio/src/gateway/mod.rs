//! The MCP gateway: agents call the tools of upstream servers through us, and only the tools they were granted.
//!
//! An administrator registers an MCP server with all its tools ([`servers`]) or, as the predecessor did, a single tool
//! (*resource*), and binds agents to a server, a tool or a resource. A tool call then goes through these steps, told by
//! [`serve`]:
//!
//! 1. [`Authenticate`] turns the request's access token and DPoP proof into a [`Caller`].
//! 2. The request says which revision of MCP it is written in ([`protocol`]), and which session it belongs to, where
//!    that revision has sessions ([`session`]).
//! 3. It is decided ([`access`]) in one indexed read: is there such a tool, was it approved and does its server still
//!    say the same, is the caller bound to it, does the caller have the capability it requires, do the arguments fit its
//!    schema. Of these nothing is remembered between requests, so a change of a binding takes effect with the next one.
//!    Then the rules of [`policy`] are asked, which are compiled once for each epoch of the database.
//! 4. The decision and the proof's identifier are made durable in one commit. A proof that was used before is
//!    refused here, and so is a caller whose standing has changed meanwhile (judged once more, then refused).
//! 5. Only then is the upstream server called ([`peer`], [`upstream`]), with headers of our own making. What it says
//!    before its answer goes to the caller as it comes.
//! 6. The outcome is made durable, and the answer goes out.
//!
//! A call that was allowed and has no outcome in the log was cut off by a crash of ours between 4 and 6.
//!
//! **Invariant:** a caller's credential never reaches an upstream server. **Invariant:** no upstream server is
//! connected to at an address that [`address`] does not admit. **Invariant:** what is not granted is denied, and
//! not listed either. **Invariant:** agents are told no definition that an operator has not approved.

mod access;
#[cfg(test)]
mod access_tests;
mod address;
mod arguments;
mod authn;
pub mod credential;
pub mod declare;
#[cfg(test)]
mod declare_tests;
pub mod definition;
mod error;
pub mod evidence;
mod http;
pub(crate) mod jsonrpc;
pub mod listen;
pub(crate) mod peer;
mod policy;
pub(crate) mod protocol;
pub mod resume;
mod serve;
#[cfg(test)]
mod server_tests;
pub mod servers;
mod session;
pub(crate) mod sse;
mod store;
#[cfg(test)]
mod tests;
pub(crate) mod trace;
pub mod trial;
pub(crate) mod upstream;

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::http::request::Parts;
use futures_util::future::BoxFuture;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use moka::future::Cache;
use serde_json::value::RawValue;
use serde_json::{Value, json};

pub use access::{Access, Schema};
pub use authn::TokenCallers;
pub use error::{FieldProblem, GatewayError};
pub use http::routes;
use jsonrpc::{RpcError, code};
pub use listen::Streams;
pub use peer::Peers;
pub use policy::{Known, Mode, NewRule, Rule, Rules, Subject};
pub use resume::Resumable;
pub use serve::Underway;
use upstream::{Credential, Endpoint};
pub use upstream::{Secrets, Upstream, UpstreamError};

use crate::entropy::Entropy;
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::limits::RateLimit;
use crate::http::urls::ExternalUrls;
use crate::metrics::Metrics;
use crate::pki::keys::SealingKey;
use crate::store::group::{Journal, OneUse};
use crate::store::{Store, WriteTx};

/// Bytes of a call's arguments at most, as compact JSON (wire contract §5).
const ARGUMENTS_BYTES_MAX: usize = 128 * 1024;
/// Resources that may be registered; each may be a line of every agent's tool list.
const RESOURCES_MAX: i64 = 1000;
/// Bindings in one page of the list.
const BINDINGS_PER_PAGE_MAX: i64 = 1000;
/// Compiled schemas that are kept.
pub const SCHEMAS_MAX: u64 = 5000;

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
    /// When the access token was issued.
    pub issued_at: UnixTime,
    /// Until when it is good (exclusive).
    pub expires_at: UnixTime,
}

/// What decides about an agent's calls besides its bindings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// `agent`, `user` or `workload`.
    pub principal_type: String,
    /// What it has.
    pub capabilities: Vec<String>,
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

    /// An active agent, for whoever asks what it may. Absent for nobody.
    ///
    /// Errors: [`ApiError`] where that cannot be said.
    fn agent<'a>(&'a self, agent_id: &'a str) -> BoxFuture<'a, Result<Option<Holder>, ApiError>>;

    /// The caller as it stands now, while a stream of its stays open. Absent for one who would not be let in any more.
    ///
    /// Errors: [`ApiError`] where that cannot be said.
    fn standing<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Option<Caller>, ApiError>>;

    /// Our signed word for who calls, for the one server or token endpoint of this URL.
    ///
    /// Errors: [`ApiError`], 503 while signing is halted.
    fn assert<'a>(
        &'a self,
        caller: &'a Caller,
        audience: &'a str,
        now: UnixTime,
    ) -> BoxFuture<'a, Result<String, ApiError>>;

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
    /// Seals credentials for upstream servers, and session ids.
    pub sealing: Arc<SealingKey>,
    /// Sessions with upstream servers and their health.
    pub peers: Peers,
    /// Requests under way, for those who take theirs back.
    pub underway: Underway,
    /// Streams on which callers are told what changes.
    pub streams: Streams,
    /// Answers that outlive their connection.
    pub resumable: Arc<Resumable>,
    /// Schemas of tools' arguments, by the digest of the definition.
    pub schemas: Cache<String, Arc<Schema>>,
    /// Rules for calls, compiled, as they were last seen.
    pub rules: ArcSwap<Known>,
    /// How often an agent calls a tool.
    pub tool_limits: RateLimit,
    /// By which URLs a browser's request may come.
    pub urls: ExternalUrls,
    /// Counts calls.
    pub metrics: Arc<Metrics>,
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
        store::bindable_name(&mut tx, &self.org_id, resource_id)
            .await?
            .ok_or(GatewayError::UnknownResource)?;
        let (binding, created) =
            self.grant(&mut tx, actor, now, (agent_id, principal_type), resource_id).await?;
        tx.commit(&[created]).await?;
        Ok(binding)
    }

    /// Writes a grant; gives the event.
    async fn grant(
        &self,
        tx: &mut WriteTx,
        actor: &str,
        now: UnixTime,
        (agent_id, principal_type): (&str, &str),
        resource_id: &str,
    ) -> Result<(Binding, Event), GatewayError> {
        let holder = store::Holder {
            principal_type: principal_type.to_owned(),
            canonical: canonical(&self.org_id, agent_id),
            bare: bare(&self.org_id, agent_id),
        };
        if store::is_bound(tx, &holder, resource_id).await? {
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
        store::grant(tx, &binding, actor).await?;
        let details = json!({
            "binding_id": binding.binding_id,
            "agent_id": binding.agent_id,
            "principal_type": binding.principal_type,
            "resource_id": resource_id,
        });
        Ok((binding, event(EventType::McpBindingCreated, actor, details)))
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

    /// Bindings to a resource that are not revoked, by id; at most `limit`.
    pub async fn active_bindings(&self, resource_id: &str, limit: i64) -> Result<Vec<Binding>, GatewayError> {
        Ok(store::active_bindings_to(&mut self.store.read().await?, resource_id, limit).await?)
    }

    /// What a binding is to: the name of a tool, of a server, or of a single tool; nothing where it is gone.
    pub async fn resource_of(&self, resource_id: &str) -> Result<Option<String>, GatewayError> {
        Ok(store::bindable_name(&mut self.store.read().await?, &self.org_id, resource_id).await?)
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
        let revoked = revoke(&mut tx, actor, now, binding_id).await?;
        tx.commit(&[revoked]).await?;
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

/// Ends a grant; gives the event.
async fn revoke(
    tx: &mut WriteTx,
    actor: &str,
    now: UnixTime,
    binding_id: &str,
) -> Result<Event, GatewayError> {
    let revoked =
        store::revoke(tx, binding_id, &now.to_rfc3339()).await?.ok_or(GatewayError::UnknownBinding)?;
    let details = json!({
        "binding_id": binding_id,
        "agent_id": revoked.agent_id,
        "principal_type": revoked.principal_type,
        "resource_id": revoked.resource_id,
    });
    Ok(event(EventType::McpBindingRevoked, actor, details))
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
