//! MCP servers with many tools: registered, looked at, and their tools approved one by one.
//!
//! What a look finds is only proposed: a tool is offered to agents when an operator has approved its definition, by
//! its digest. When the server says something else later, the tool is blocked until that is approved too, or until the
//! server says the old again. Agents are always told the definition that was approved. A tool keeps the name that it
//! got when it was first seen: its own, or with the server's before it where another tool had that name already.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::credential::{Asserted, Auth, EXCHANGED, ServerAuth};
use super::definition::{self, DefinitionError};
use super::error::FieldProblem;
use super::evidence::DAYS_MAX as RETENTION_DAYS_MAX;
use super::peer::{Discovered, Link, TOOLS_MAX};
use super::protocol::Revision;
use super::serve::JUDGED_MAX;
use super::upstream::UpstreamError;
use super::{
    Caller, DESCRIPTION_BYTES_MAX, DOMAINS_MAX, Gateway, GatewayError, URL_BYTES_MAX, canonical, event,
    is_domain, is_tool_name, is_word, store,
};
use crate::store::WriteTx;
use crate::store::group::{Append, AppendError};

/// Servers that may be registered.
pub const SERVERS_MAX: i64 = 200;
/// Between two messages of a server, unless told otherwise.
pub(super) const TIMEOUT_MS_DEFAULT: i64 = 60_000;
/// At once, unless told otherwise.
pub(super) const CALLS_MAX_DEFAULT: i64 = 64;
/// Names in one event.
const NAMES_IN_EVENT_MAX: usize = 50;

/// A registered MCP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// UUID.
    pub upstream_id: String,
    /// Its name among servers, and before its tools' names where they collide.
    pub name: String,
    /// Where it answers.
    pub endpoint_url: String,
    /// For operators.
    pub description: Option<String>,
    /// How we prove ourselves there: the credential's type.
    pub auth_type: String,
    /// The credential, sealed; absent for none.
    pub credential_sealed: Option<String>,
    /// Hosts that the endpoint may have; by default its own.
    pub allowed_domains: Vec<String>,
    /// The capability that callers need besides a binding.
    pub required_capability: Option<String>,
    /// CAs that its certificate must come from; by default the machine's.
    pub ca_pem: Option<String>,
    /// How long we wait for each of its messages.
    pub timeout_ms: i64,
    /// Requests to it under way at once.
    pub calls_max: i64,
    /// Whether it is told who calls, by our signed word.
    pub asserts_caller: bool,
    /// Whether it may be called.
    pub enabled: bool,
    /// The revision that it is spoken to in; absent until it was looked at.
    pub revision: Option<Revision>,
    /// What it says it offers.
    pub capabilities: Map<String, Value>,
    /// When it was last looked at successfully.
    pub discovered_at: Option<String>,
    /// Why the last look failed.
    pub discovery_error: Option<String>,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
}

/// A server as an operator describes it.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewServer {
    /// Its name.
    pub name: String,
    /// Where it answers.
    pub endpoint_url: String,
    /// For operators.
    pub description: Option<String>,
    /// The credential. Absent: none for a new server, the present one for a known.
    pub auth: Option<Auth>,
    /// Hosts that the endpoint may have.
    #[serde(default)]
    pub allowed_domains: Vec<String>,
    /// The capability that callers need.
    pub required_capability: Option<String>,
    /// CAs that its certificate must come from.
    pub ca_pem: Option<String>,
    /// How long we wait for each of its messages.
    #[serde(default = "timeout_ms_default")]
    pub timeout_ms: i64,
    /// Requests under way at once.
    #[serde(default = "calls_max_default")]
    pub calls_max: i64,
    /// Whether it is told who calls.
    #[serde(default)]
    pub asserts_caller: bool,
    /// Whether it may be called.
    #[serde(default = "enabled_default")]
    pub enabled: bool,
}

impl NewServer {
    /// A server with a name and an endpoint, and otherwise as an operator who says nothing else gets it.
    #[must_use]
    pub fn named(name: &str, endpoint_url: &str) -> Self {
        Self {
            name: name.to_owned(),
            endpoint_url: endpoint_url.to_owned(),
            description: None,
            auth: None,
            allowed_domains: Vec::new(),
            required_capability: None,
            ca_pem: None,
            timeout_ms: TIMEOUT_MS_DEFAULT,
            calls_max: CALLS_MAX_DEFAULT,
            asserts_caller: false,
            enabled: true,
        }
    }
}

fn timeout_ms_default() -> i64 {
    TIMEOUT_MS_DEFAULT
}
fn calls_max_default() -> i64 {
    CALLS_MAX_DEFAULT
}
fn enabled_default() -> bool {
    true
}

/// What an operator has decided about a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolState {
    /// Found, and not decided on.
    Proposed,
    /// May be offered, as it was approved.
    Approved,
    /// May not be offered.
    Blocked,
}

impl ToolState {
    /// The state as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proposed => "proposed",
            Self::Approved => "approved",
            Self::Blocked => "blocked",
        }
    }

    /// Reads a stored state; anything unknown blocks.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "proposed" => Self::Proposed,
            "approved" => Self::Approved,
            _ => Self::Blocked,
        }
    }
}

/// A tool of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// UUID.
    pub tool_id: String,
    /// Its server.
    pub upstream_id: String,
    /// Its name there.
    pub upstream_name: String,
    /// Its name here.
    pub name: String,
    /// What was decided.
    pub state: ToolState,
    /// The definition that was approved, canonical.
    pub definition: Option<String>,
    /// Its SHA-256.
    pub definition_digest: Option<String>,
    /// The definition that the server gives now, canonical.
    pub found: String,
    /// Its SHA-256.
    pub found_digest: String,
    /// Whether the server still has it.
    pub present: bool,
    /// The older tool whose name this one's imitates.
    pub imitates: Option<String>,
    /// The capability that callers need besides a binding.
    pub required_capability: Option<String>,
    /// How often an agent may call it.
    pub calls_per_minute: Option<i64>,
    /// For how many days its arguments and results are kept; absent for not at all.
    pub retention_days: Option<i64>,
    /// RFC 3339.
    pub first_seen_at: String,
    /// RFC 3339.
    pub approved_at: Option<String>,
    /// Who approved.
    pub approved_by: Option<String>,
}

impl Tool {
    /// Whether agents may be offered it: what the server says is what was approved.
    #[must_use]
    pub fn is_offered(&self) -> bool {
        self.standing() == "approved"
    }

    /// The digest of the definition that is approved; absent for a tool that is not.
    #[must_use]
    pub fn approved_digest(&self) -> Option<&str> {
        self.definition_digest.as_deref().filter(|_| self.state == ToolState::Approved)
    }

    /// The approved schema of its arguments; absent for a tool that was never approved.
    #[must_use]
    pub fn input_schema(&self) -> Option<Value> {
        let definition: Value = serde_json::from_str(self.definition.as_deref()?).ok()?;
        Some(definition["inputSchema"].clone())
    }

    /// One word for what keeps it from agents: `approved`, `proposed`, `changed`, `blocked`, `gone`.
    #[must_use]
    pub fn standing(&self) -> &'static str {
        match self.state {
            ToolState::Blocked => "blocked",
            _ if !self.present => "gone",
            ToolState::Proposed => "proposed",
            ToolState::Approved if self.definition_digest.as_deref() == Some(self.found_digest.as_str()) => {
                "approved"
            }
            ToolState::Approved => "changed",
        }
    }
}

/// What a look at a server changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Look {
    /// Tools that it has.
    pub tools: usize,
    /// Names of new ones.
    pub new: Vec<String>,
    /// Names of approved ones that say something else than was approved.
    pub changed: Vec<String>,
    /// Names of approved ones that say again what was approved.
    pub restored: Vec<String>,
    /// Names of ones that it has no more.
    pub gone: Vec<String>,
    /// Names there that cannot be offered, and why.
    pub unusable: Vec<(String, String)>,
}

/// A definition that a look has found.
struct Found {
    name: String,
    canonical: String,
    digest: String,
}

impl Gateway {
    /// What is needed to speak to a server.
    ///
    /// Errors: [`UpstreamError`].
    pub(super) fn link(&self, server: &Arc<Server>) -> Result<Link, UpstreamError> {
        let endpoint = self.upstream.endpoint(&server.endpoint_url, &server.allowed_domains)?;
        let auth = ServerAuth::open(server, &self.sealing)?;
        let client = self.peers.client(server, &endpoint, &auth)?;
        Ok(Link { server: Arc::clone(server), endpoint, client, auth, asserted: None })
    }

    /// The same, for a caller: a server that wants to know who calls is told.
    ///
    /// Whoever asks the server records it at the caller's epoch first, because that is what a signature stands at.
    ///
    /// Errors: [`UpstreamError`]; [`UpstreamError::Halted`] while nothing is signed.
    pub(super) async fn link_for(
        &self,
        caller: &Caller,
        server: &Arc<Server>,
    ) -> Result<Link, UpstreamError> {
        let mut link = self.link(server)?;
        let token_url = link.auth.exchanges_at().map(str::to_owned);
        if !server.asserts_caller && token_url.is_none() {
            return Ok(link);
        }
        let caller = Caller { agent_id: canonical(&self.org_id, &caller.agent_id), ..caller.clone() };
        let for_server = match server.asserts_caller {
            true => Some(self.word_for(&caller, server, &server.endpoint_url).await?),
            false => None,
        };
        let for_token_endpoint = match &token_url {
            Some(token_url) => Some(self.word_for(&caller, server, token_url).await?),
            None => None,
        };
        let named = format!("{} {}", caller.principal_type, caller.agent_id);
        link.asserted = Some(Asserted { caller: named, for_server, for_token_endpoint });
        Ok(link)
    }

    /// The same, where nothing is recorded of what is asked: that the caller and the permit of our word still stood is.
    ///
    /// Errors: as [`Gateway::link_for`]; [`UpstreamError::Halted`] also for a caller who would not be let in any more.
    pub(super) async fn link_unrecorded(
        &self,
        caller: &Caller,
        server: &Arc<Server>,
    ) -> Result<Link, UpstreamError> {
        if !server.asserts_caller && server.auth_type != EXCHANGED {
            return self.link(server);
        }
        for _round in 0..JUDGED_MAX {
            let standing = self.authenticate.standing(caller).await.ok().flatten();
            let standing = standing.ok_or(UpstreamError::Halted)?;
            let link = self.link_for(&standing, server).await?;
            let permit = Append {
                access_token: caller.access_token.clone(),
                epoch: Some(standing.epoch),
                ..Append::default()
            };
            match self.journal.append(permit).await {
                Ok(_) => return Ok(link),
                Err(AppendError::Stale) => {
                    self.authenticate.refresh().await.map_err(|_| UpstreamError::Halted)?;
                }
                Err(_) => return Err(UpstreamError::Halted),
            }
        }
        Err(UpstreamError::Halted)
    }

    async fn word_for(
        &self,
        caller: &Caller,
        server: &Server,
        audience: &str,
    ) -> Result<String, UpstreamError> {
        let now = self.store.clock().now().seconds();
        self.authenticate.assert(caller, audience, now).await.map_err(|error| {
            tracing::warn!(upstream = server.name, error = ?error, "mcp_caller_not_asserted");
            UpstreamError::Halted
        })
    }

    /// Registers a server and looks at it. A server that does not answer is registered all the same.
    ///
    /// Errors: [`GatewayError::Fields`], [`GatewayError::NameTaken`], [`GatewayError::TooManyResources`].
    pub async fn register_server(
        &self,
        actor: &str,
        now: UnixTime,
        new: NewServer,
    ) -> Result<(Server, Option<Look>), GatewayError> {
        self.check_server(&new, None)?;
        let mut tx = self.store.write().await?;
        if store::server(&mut tx, &new.name).await?.is_some() {
            return Err(GatewayError::NameTaken(new.name));
        }
        if store::count_servers(&mut tx).await? >= SERVERS_MAX {
            return Err(GatewayError::TooManyResources(SERVERS_MAX));
        }
        let (server, created) = self.insert_server(&mut tx, actor, now, &new).await?;
        tx.commit(&[created]).await?;
        let look = self.look(actor, now, &server.upstream_id).await.ok();
        Ok((self.server(&server.upstream_id).await?, look))
    }

    /// Changes a server's settings. Its tools and their approvals stay; where it answers elsewhere it is looked at anew.
    ///
    /// Errors: as [`Gateway::register_server`], and [`GatewayError::UnknownUpstream`].
    pub async fn change_server(
        &self,
        actor: &str,
        now: UnixTime,
        id: &str,
        new: NewServer,
    ) -> Result<Server, GatewayError> {
        let known = self.server(id).await?;
        self.check_server(&new, Some(&known))?;
        let mut tx = self.store.write().await?;
        if new.name != known.name && store::server(&mut tx, &new.name).await?.is_some() {
            return Err(GatewayError::NameTaken(new.name));
        }
        let changed = self.update_server(&mut tx, actor, now, &known, &new).await?;
        tx.commit(&[changed]).await?;
        if new.endpoint_url != known.endpoint_url || new.auth.is_some() {
            let _told_in_the_row = self.look(actor, now, &known.upstream_id).await;
        }
        self.server(&known.upstream_id).await
    }

    /// Writes a server that was checked; gives the event.
    pub(super) async fn insert_server(
        &self,
        tx: &mut WriteTx,
        actor: &str,
        now: UnixTime,
        new: &NewServer,
    ) -> Result<(Server, Event), GatewayError> {
        let auth = new.auth.clone().unwrap_or(Auth::None);
        let server = self.server_row(self.entropy.uuid(), new, Some(&auth), now, None)?;
        store::insert_server(tx, &server).await?;
        let created = event(EventType::McpUpstreamCreated, actor, described(&server));
        Ok((server, created))
    }

    /// Writes settings that were checked; gives the event.
    pub(super) async fn update_server(
        &self,
        tx: &mut WriteTx,
        actor: &str,
        now: UnixTime,
        known: &Server,
        new: &NewServer,
    ) -> Result<Event, GatewayError> {
        let row = self.server_row(known.upstream_id.clone(), new, new.auth.as_ref(), now, Some(known))?;
        store::update_server(tx, &row).await?;
        Ok(event(EventType::McpUpstreamChanged, actor, described(&row)))
    }

    fn server_row(
        &self,
        upstream_id: String,
        new: &NewServer,
        auth: Option<&Auth>,
        now: UnixTime,
        known: Option<&Server>,
    ) -> Result<Server, GatewayError> {
        let (auth_type, credential_sealed) = match (auth, known) {
            (Some(Auth::None), _) | (None, None) => ("none".to_owned(), None),
            (Some(auth), _) => (auth.kind().to_owned(), Some(auth.seal(&self.sealing, &upstream_id)?)),
            (None, Some(known)) => (known.auth_type.clone(), known.credential_sealed.clone()),
        };
        Ok(Server {
            upstream_id,
            name: new.name.clone(),
            endpoint_url: new.endpoint_url.clone(),
            description: new.description.clone(),
            auth_type,
            credential_sealed,
            allowed_domains: new.allowed_domains.clone(),
            required_capability: new.required_capability.clone(),
            ca_pem: new.ca_pem.clone(),
            timeout_ms: new.timeout_ms,
            calls_max: new.calls_max,
            asserts_caller: new.asserts_caller,
            enabled: new.enabled,
            revision: known.and_then(|known| known.revision),
            capabilities: known.map(|known| known.capabilities.clone()).unwrap_or_default(),
            discovered_at: known.and_then(|known| known.discovered_at.clone()),
            discovery_error: known.and_then(|known| known.discovery_error.clone()),
            created_at: known.map_or_else(|| now.to_rfc3339(), |known| known.created_at.clone()),
            updated_at: now.to_rfc3339(),
        })
    }

    /// Errors: [`GatewayError::Fields`] with everything that is wrong. `known`: the server that is changed.
    pub(super) fn check_server(&self, new: &NewServer, known: Option<&Server>) -> Result<(), GatewayError> {
        let mut problems = Vec::new();
        let mut expect = |holds: bool, field: &'static str, message: &str| {
            if !holds {
                problems.push(FieldProblem { field, message: message.to_owned() });
            }
        };
        expect(is_tool_name(&new.name) && new.name.len() <= 32, "name", "must match ^[A-Za-z0-9_.-]{1,32}$");
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
        expect((100..=600_000).contains(&new.timeout_ms), "timeout_ms", "must be 100 to 600000");
        expect((1..=1024).contains(&new.calls_max), "calls_max", "must be 1 to 1024");
        expect(new.endpoint_url.len() <= URL_BYTES_MAX, "endpoint_url", "must have at most 2048 bytes");
        match self.upstream.endpoint(&new.endpoint_url, &new.allowed_domains) {
            Err(error @ UpstreamError::Address) => expect(
                false,
                "endpoint_url",
                &format!("{error}; list the host in MCP_PROXY_INTERNAL_HOST_ALLOWLIST to allow it"),
            ),
            Err(error) => expect(false, "endpoint_url", &error.to_string()),
            Ok(endpoint) => {
                if let Some(ca_pem) = &new.ca_pem {
                    let usable = ca_pem.len() <= 64 * 1024
                        && super::upstream::Upstream::own_client(&endpoint, Some(ca_pem), None).is_ok();
                    expect(usable, "ca_pem", "must be CA certificates in PEM, at most 64 KiB");
                }
                if let Some(Err(message)) =
                    new.auth.as_ref().map(|auth| auth.check(&self.upstream, &endpoint))
                {
                    expect(false, "auth", message);
                }
                // Whoever may change an address may not read the credential, nor have it sent to a host of theirs.
                let stays = |known: &Server| {
                    let before = self.upstream.endpoint(&known.endpoint_url, &known.allowed_domains);
                    before.is_ok_and(|before| before.has_same_origin(&endpoint))
                };
                expect(
                    new.auth.is_some()
                        || known.is_none_or(|known| known.credential_sealed.is_none() || stays(known)),
                    "auth",
                    "must be given again where the address moves to another host, port or scheme",
                );
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(GatewayError::Fields(problems)) }
    }

    /// Every server, by name.
    pub async fn list_servers(&self) -> Result<Vec<Server>, GatewayError> {
        Ok(store::servers(&mut self.store.read().await?, SERVERS_MAX).await?)
    }

    /// The server of this id or name.
    ///
    /// Errors: [`GatewayError::UnknownUpstream`].
    pub async fn server(&self, id: &str) -> Result<Server, GatewayError> {
        let mut tx = self.store.read().await?;
        store::server(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownUpstream(id.to_owned()))
    }

    /// Removes a server, its tools and every binding to either.
    ///
    /// Errors: [`GatewayError::UnknownUpstream`].
    pub async fn delete_server(&self, actor: &str, id: &str) -> Result<(), GatewayError> {
        let mut tx = self.store.write().await?;
        let server =
            store::server(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownUpstream(id.to_owned()))?;
        let removed = remove(&mut tx, actor, &server).await?;
        tx.commit(&[removed]).await?;
        Ok(())
    }

    /// Looks at a server: revision, offers, tools. What differs from what is known is written, with an event.
    ///
    /// Errors: [`GatewayError::UnknownUpstream`], [`GatewayError::Upstream`]; the latter is noted in the server's row.
    pub async fn look(&self, actor: &str, now: UnixTime, id: &str) -> Result<Look, GatewayError> {
        let server = Arc::new(self.server(id).await?);
        let found = match self.link(&server) {
            Ok(link) => self.peers.discover(&self.upstream, &link).await,
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => self.take_up(actor, now, &server, found).await,
            Err(error) => {
                let text = error.to_string();
                if server.discovery_error.as_deref() != Some(text.as_str()) {
                    let mut tx = self.store.write().await?;
                    store::note_discovery(&mut tx, &server.upstream_id, None, Some(&text), now).await?;
                    let details = json!({
                        "upstream_id": server.upstream_id,
                        "name": server.name,
                        "error": text,
                        "reason": error.reason(),
                    });
                    tx.commit(&[event(EventType::McpToolsDiscovered, actor, details)]).await?;
                }
                Err(error.into())
            }
        }
    }

    async fn take_up(
        &self,
        actor: &str,
        now: UnixTime,
        server: &Server,
        discovered: Discovered,
    ) -> Result<Look, GatewayError> {
        let mut look = Look { tools: discovered.tools.len(), ..Look::default() };
        let mut found: Vec<Found> = Vec::with_capacity(discovered.tools.len());
        let mut names = HashSet::new();
        for raw in &discovered.tools {
            match read_definition(raw) {
                // The first of a name counts: a second one could not be called.
                Ok(definition) if !names.insert(definition.name.clone()) => {
                    look.unusable.push((definition.name, "the server has two tools of this name".to_owned()));
                }
                Ok(definition) => found.push(definition),
                Err((name, error)) => look.unusable.push((name, error.to_string())),
            }
        }
        let mut tx = self.store.write().await?;
        let known: HashMap<String, Tool> =
            store::tools_of(&mut tx, &server.upstream_id, TOOLS_MAX as i64 * 4)
                .await?
                .into_iter()
                .map(|tool| (tool.upstream_name.clone(), tool))
                .collect();
        let mut taken = store::every_tool_name(&mut tx).await?;
        for definition in &found {
            match known.get(&definition.name) {
                Some(tool) if tool.found_digest == definition.digest && tool.present => {}
                Some(tool) => {
                    let now_found = Tool {
                        found: definition.canonical.clone(),
                        found_digest: definition.digest.clone(),
                        present: true,
                        ..tool.clone()
                    };
                    store::update_found(&mut tx, &now_found).await?;
                    match now_found.standing() {
                        "changed" => look.changed.push(tool.name.clone()),
                        "approved" => look.restored.push(tool.name.clone()),
                        _ => look.new.push(tool.name.clone()),
                    }
                }
                None => {
                    let name = free_name(&server.name, &definition.name, &taken);
                    let skeleton = definition::skeleton(&definition.name);
                    let imitates = taken
                        .iter()
                        .find(|other| **other != definition.name && definition::skeleton(other) == skeleton)
                        .cloned();
                    taken.insert(name.clone());
                    let tool = Tool {
                        tool_id: self.entropy.uuid(),
                        upstream_id: server.upstream_id.clone(),
                        upstream_name: definition.name.clone(),
                        name: name.clone(),
                        state: ToolState::Proposed,
                        definition: None,
                        definition_digest: None,
                        found: definition.canonical.clone(),
                        found_digest: definition.digest.clone(),
                        present: true,
                        imitates,
                        required_capability: None,
                        calls_per_minute: None,
                        retention_days: None,
                        first_seen_at: now.to_rfc3339(),
                        approved_at: None,
                        approved_by: None,
                    };
                    store::insert_tool(&mut tx, &tool).await?;
                    look.new.push(name);
                }
            }
        }
        for tool in known.values().filter(|tool| tool.present && !names.contains(&tool.upstream_name)) {
            store::update_found(&mut tx, &Tool { present: false, ..tool.clone() }).await?;
            look.gone.push(tool.name.clone());
        }
        look.gone.sort_unstable();
        let mut events = Vec::new();
        let moved =
            [&look.new, &look.changed, &look.restored, &look.gone].iter().any(|names| !names.is_empty());
        if moved || server.revision != Some(discovered.revision) || server.discovery_error.is_some() {
            let names = |names: &[String]| names.iter().take(NAMES_IN_EVENT_MAX).cloned().collect::<Vec<_>>();
            let details = json!({
                "upstream_id": server.upstream_id,
                "name": server.name,
                "revision": discovered.revision.as_str(),
                "tools": look.tools,
                "new": names(&look.new),
                "changed": names(&look.changed),
                "restored": names(&look.restored),
                "gone": names(&look.gone),
                "unusable": look.unusable.len(),
            });
            events.push(event(EventType::McpToolsDiscovered, actor, details));
        } else if server.capabilities == discovered.capabilities {
            // Nothing to say and nothing to write: the sight of a server that has not moved changes nothing.
            return Ok(look);
        } else {
            let details = json!({ "upstream_id": server.upstream_id, "name": server.name, "capabilities": discovered.capabilities.keys().collect::<Vec<_>>() });
            events.push(event(EventType::McpToolsDiscovered, actor, details));
        }
        store::note_discovery(&mut tx, &server.upstream_id, Some(&discovered), None, now).await?;
        tx.commit(&events).await?;
        for name in &look.changed {
            tracing::warn!(
                upstream = server.name,
                tool = name,
                "mcp_tool_changed: blocked until it is approved"
            );
        }
        Ok(look)
    }

    /// Looks at every enabled server once, one after the other.
    pub async fn look_at_all(&self, now: UnixTime) {
        let servers = match self.list_servers().await {
            Ok(servers) => servers,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "mcp_upstreams_not_looked_at");
                return;
            }
        };
        for server in servers.into_iter().filter(|server| server.enabled) {
            if let Err(error) = self.look("system", now, &server.upstream_id).await {
                tracing::warn!(
                    upstream = server.name,
                    error = crate::http::error::chain(&error),
                    "mcp_upstream_not_discovered"
                );
            }
        }
    }

    /// Tools with their servers' names, by name; of one server, or in one standing, where these are given.
    pub async fn list_tools_of_servers(
        &self,
        upstream: Option<&str>,
        standing: Option<&str>,
    ) -> Result<Vec<(Tool, String)>, GatewayError> {
        let mut tx = self.store.read().await?;
        let servers = store::servers(&mut tx, SERVERS_MAX).await?;
        let mut tools = Vec::new();
        for server in servers {
            if upstream.is_some_and(|wanted| wanted != server.name && wanted != server.upstream_id) {
                continue;
            }
            for tool in store::tools_of(&mut tx, &server.upstream_id, TOOLS_MAX as i64 * 4).await? {
                if standing.is_none_or(|wanted| wanted == tool.standing()) {
                    tools.push((tool, server.name.clone()));
                }
            }
        }
        tools.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        Ok(tools)
    }

    /// Tools that wait for a decision (`proposed`, `changed`), or those that do not, with their servers' names; a page at
    /// a time, by name after `after`.
    pub async fn list_tools_by_decision(
        &self,
        waiting: bool,
        after: &str,
        limit: i64,
    ) -> Result<Vec<(Tool, String)>, GatewayError> {
        Ok(store::tools_by_decision(&mut self.store.read().await?, waiting, after, limit).await?)
    }

    /// The tool of this id or name.
    ///
    /// Errors: [`GatewayError::UnknownTool`].
    pub async fn server_tool(&self, id: &str) -> Result<Tool, GatewayError> {
        let mut tx = self.store.read().await?;
        store::server_tool(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownTool(id.to_owned()))
    }

    /// Approves the definition that an operator has seen, named by its digest.
    ///
    /// Errors: [`GatewayError::UnknownTool`], [`GatewayError::DefinitionMoved`] when the server says something else now,
    /// [`GatewayError::Imitates`] unless that is accepted, [`GatewayError::Definition`] for a schema that is none.
    pub async fn approve_tool(
        &self,
        actor: &str,
        now: UnixTime,
        id: &str,
        digest: &str,
        accept_imitation: bool,
    ) -> Result<Tool, GatewayError> {
        let mut tx = self.store.write().await?;
        let tool =
            store::server_tool(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownTool(id.to_owned()))?;
        if tool.found_digest != digest {
            return Err(GatewayError::DefinitionMoved { name: tool.name, found: tool.found_digest });
        }
        if let (Some(other), false) = (&tool.imitates, accept_imitation) {
            return Err(GatewayError::Imitates { name: tool.name, other: other.clone() });
        }
        let (approved, event) = approve(&mut tx, actor, now, tool).await?;
        tx.commit(&[event]).await?;
        Ok(approved)
    }

    /// Blocks a tool until it is approved again.
    ///
    /// Errors: [`GatewayError::UnknownTool`].
    pub async fn block_tool(&self, actor: &str, id: &str) -> Result<Tool, GatewayError> {
        let mut tx = self.store.write().await?;
        let tool =
            store::server_tool(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownTool(id.to_owned()))?;
        let blocked = Tool { state: ToolState::Blocked, ..tool };
        store::update_tool(&mut tx, &blocked).await?;
        let details =
            json!({ "tool_id": blocked.tool_id, "tool": blocked.name, "upstream_id": blocked.upstream_id });
        tx.commit(&[event(EventType::McpToolBlocked, actor, details)]).await?;
        Ok(blocked)
    }

    /// Sets what a tool asks of its callers, and what is kept of their calls.
    ///
    /// Errors: [`GatewayError::UnknownTool`], [`GatewayError::Fields`].
    pub async fn limit_tool(&self, actor: &str, id: &str, limits: ToolLimits) -> Result<Tool, GatewayError> {
        limits.check()?;
        let mut tx = self.store.write().await?;
        let tool =
            store::server_tool(&mut tx, id).await?.ok_or_else(|| GatewayError::UnknownTool(id.to_owned()))?;
        let (limited, event) = limit(&mut tx, actor, tool, limits).await?;
        tx.commit(&[event]).await?;
        Ok(limited)
    }
}

/// What a tool asks of its callers, and what is kept of their calls. What is absent is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolLimits {
    /// The capability that callers need besides a binding.
    pub required_capability: Option<String>,
    /// How often an agent may call it.
    pub calls_per_minute: Option<i64>,
    /// For how many days arguments and results are kept.
    pub retention_days: Option<i64>,
}

impl ToolLimits {
    /// Those of a tool.
    #[must_use]
    pub fn of(tool: &Tool) -> Self {
        Self {
            required_capability: tool.required_capability.clone(),
            calls_per_minute: tool.calls_per_minute,
            retention_days: tool.retention_days,
        }
    }

    /// Errors: [`GatewayError::Fields`].
    pub(super) fn check(&self) -> Result<(), GatewayError> {
        let mut problems = Vec::new();
        let mut expect = |holds: bool, field: &'static str, message: String| {
            if !holds {
                problems.push(FieldProblem { field, message });
            }
        };
        expect(
            self.required_capability.as_deref().is_none_or(|capability| is_word(capability, 128)),
            "required_capability",
            "must be 1 to 128 printable characters without spaces".to_owned(),
        );
        let within = |value: Option<i64>, most: i64| value.is_none_or(|value| (1..=most).contains(&value));
        expect(
            within(self.calls_per_minute, 1_000_000),
            "calls_per_minute",
            "must be 1 to 1000000".to_owned(),
        );
        let days = format!("must be 1 to {RETENTION_DAYS_MAX}");
        expect(within(self.retention_days, RETENTION_DAYS_MAX), "retention_days", days);
        if problems.is_empty() { Ok(()) } else { Err(GatewayError::Fields(problems)) }
    }
}

/// Removes a server, its tools and every binding to either; gives the event.
pub(super) async fn remove(tx: &mut WriteTx, actor: &str, server: &Server) -> Result<Event, GatewayError> {
    let (tools, bindings) = store::delete_server(tx, &server.upstream_id).await?;
    let details = json!({
        "upstream_id": server.upstream_id,
        "name": server.name,
        "tools_deleted": tools,
        "bindings_deleted": bindings,
    });
    Ok(event(EventType::McpUpstreamDeleted, actor, details))
}

/// Writes a tool as approved with the definition that its server gives now; gives the event.
///
/// Errors: [`GatewayError::Definition`] for a schema that is none.
pub(super) async fn approve(
    tx: &mut WriteTx,
    actor: &str,
    now: UnixTime,
    tool: Tool,
) -> Result<(Tool, Event), GatewayError> {
    let found: Value = serde_json::from_str(&tool.found)?;
    definition::validator(&found["inputSchema"])?;
    let before = tool.definition_digest.clone();
    let approved = Tool {
        state: ToolState::Approved,
        definition: Some(tool.found.clone()),
        definition_digest: Some(tool.found_digest.clone()),
        approved_at: Some(now.to_rfc3339()),
        approved_by: Some(actor.to_owned()),
        ..tool
    };
    store::update_tool(tx, &approved).await?;
    let details = json!({
        "tool_id": approved.tool_id,
        "tool": approved.name,
        "upstream_id": approved.upstream_id,
        "definition_digest": approved.definition_digest,
        "definition_digest_before": before,
        "imitates": approved.imitates,
    });
    Ok((approved, event(EventType::McpToolApproved, actor, details)))
}

/// Writes what a tool asks of its callers; gives the event.
pub(super) async fn limit(
    tx: &mut WriteTx,
    actor: &str,
    tool: Tool,
    limits: ToolLimits,
) -> Result<(Tool, Event), GatewayError> {
    let ToolLimits { required_capability, calls_per_minute, retention_days } = limits;
    let limited = Tool { required_capability, calls_per_minute, retention_days, ..tool };
    store::update_tool(tx, &limited).await?;
    let details = json!({
        "tool_id": limited.tool_id,
        "tool": limited.name,
        "required_capability": limited.required_capability,
        "calls_per_minute": limited.calls_per_minute,
        "retention_days": limited.retention_days,
    });
    Ok((limited, event(EventType::McpToolChanged, actor, details)))
}

/// Reads a definition. Errors: its name as far as it can be shown, and what is wrong.
fn read_definition(raw: &RawValue) -> Result<Found, (String, DefinitionError)> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let named: Result<Named, _> = serde_json::from_str(raw.get());
    let name = named.map(|named| named.name).map_err(|_| (String::new(), DefinitionError::Shape))?;
    let shown: String = name.chars().filter(|character| !character.is_control()).take(128).collect();
    if !definition::is_tool_name(&name) {
        return Err((shown, DefinitionError::Shape));
    }
    let canonical = definition::canonical(raw).map_err(|error| (shown, error))?;
    let digest = definition::sha256_hex(canonical.as_bytes());
    Ok(Found { name, canonical, digest })
}

/// The name under which a tool is offered: its own, unless it is taken.
fn free_name(server: &str, tool: &str, taken: &HashSet<String>) -> String {
    if !taken.contains(tool) {
        return tool.to_owned();
    }
    let prefixed = format!("{server}__{tool}");
    let mut name = prefixed.clone();
    let mut number = 2;
    while taken.contains(&name) {
        name = format!("{prefixed}_{number}");
        number += 1;
    }
    name
}

fn described(server: &Server) -> Value {
    json!({
        "upstream_id": server.upstream_id,
        "name": server.name,
        "endpoint_url": server.endpoint_url,
        "auth_type": server.auth_type,
        "allowed_domains": server.allowed_domains,
        "required_capability": server.required_capability,
        "timeout_ms": server.timeout_ms,
        "calls_max": server.calls_max,
        "asserts_caller": server.asserts_caller,
        "enabled": server.enabled,
    })
}
