//! What an operator declares of the gateway in one document: MCP servers, what is decided about their tools, bindings
//! and policies; exported, compared with what there is, and taken up in one commit.
//!
//! A document names things by their names, so it can be carried to another deploy. It has no secrets: a credential is
//! only given, never told. What a document does not name stays as it is, unless it is to be pruned; a kind of thing that
//! it leaves out altogether is never pruned. What cannot be done yet, because a server has to be looked at first, waits:
//! the same document is imported again then.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::credential::{Auth, ServerAuth};
use super::definition::{self, Difference, sha256_hex};
use super::error::FieldProblem;
use super::policy::{self, Mode, NewRule};
use super::servers::{
    CALLS_MAX_DEFAULT, NewServer, SERVERS_MAX, Server, TIMEOUT_MS_DEFAULT, Tool, ToolLimits,
};
use super::{Gateway, GatewayError, bare, canonical, event, store};
use crate::store::{Query, WriteTx};

/// Things of one kind in a document.
const ENTRIES_MAX: usize = 20_000;

/// What an operator declares. A kind that is absent is left alone.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Document {
    /// MCP servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstreams: Option<Vec<UpstreamEntry>>,
    /// What is decided about their tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<ToolEntry>>,
    /// Who may call what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bindings: Option<Vec<BindingEntry>>,
    /// Rules for calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policies: Option<Vec<PolicyEntry>>,
}

/// An MCP server. Its fields are those of [`NewServer`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamEntry {
    name: String,
    endpoint_url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    /// What an export says of the credential: where it is given, it must be what there is, or `auth`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    auth_type: Option<String>,
    /// The credential. Absent: the one there is stays.
    #[serde(default, skip_serializing)]
    auth: Option<Auth>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    allowed_domains: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required_capability: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_pem: Option<String>,
    #[serde(default = "timeout_ms")]
    timeout_ms: i64,
    #[serde(default = "calls_max")]
    calls_max: i64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    asserts_caller: bool,
    #[serde(default = "yes")]
    enabled: bool,
}

fn timeout_ms() -> i64 {
    TIMEOUT_MS_DEFAULT
}
fn calls_max() -> i64 {
    CALLS_MAX_DEFAULT
}
fn yes() -> bool {
    true
}

/// What is decided about a tool of a server.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolEntry {
    /// Its name here.
    name: String,
    /// The definition that is approved; absent: whatever was decided stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    approved_digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required_capability: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    calls_per_minute: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retention_days: Option<i64>,
    /// That it may be approved although its name imitates an older tool's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    accept_imitation: bool,
}

/// That an agent may call a tool, a server's tools, or a resource.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindingEntry {
    /// The agent, by its bare name or `org::name`.
    agent: String,
    #[serde(default = "agent_type")]
    principal_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tool: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upstream: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resource: Option<String>,
}

fn agent_type() -> String {
    "agent".to_owned()
}

/// A policy.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyEntry {
    name: String,
    #[serde(default = "enforce")]
    mode: Mode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tool: Option<String>,
    text: String,
}

fn enforce() -> Mode {
    Mode::Enforce
}

/// What an import would change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In the order in which it would be done.
    pub changes: Vec<Change>,
    /// What cannot be done yet.
    pub waits: Vec<Wait>,
    /// SHA-256 of the changes: an import can be held to it.
    pub plan_digest: String,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `upstream`, `tool`, `binding` or `policy`.
    pub kind: &'static str,
    /// Its name; of a binding, who is bound to what.
    pub name: String,
    /// `create`, `change`, `approve` or `remove`.
    pub action: &'static str,
    /// What becomes different.
    pub differences: Vec<Difference>,
}

/// What waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// As [`Change::kind`].
    pub kind: &'static str,
    /// As [`Change::name`].
    pub name: String,
    /// For what.
    pub why: String,
}

/// A change, as it is done.
enum Step {
    CreateUpstream(Box<NewServer>),
    ChangeUpstream(Box<(Server, NewServer)>),
    RemoveUpstream(Box<Server>),
    Approve(Box<Tool>),
    Limit(Box<(Tool, ToolLimits)>),
    Bind(BindingEntry),
    Revoke(String),
    Save(String, NewRule),
    DeleteRule(String),
}

/// What there is.
struct Standing {
    servers: Vec<Server>,
    tools: Vec<Tool>,
    resources: Vec<super::Resource>,
    bindings: Vec<super::Binding>,
    rules: Vec<policy::Rule>,
    /// Schemas of resources' arguments, by name.
    schemas: BTreeMap<String, Value>,
}

impl Standing {
    async fn read(tx: &mut impl Query, org_id: &str) -> Result<Self, GatewayError> {
        Ok(Self {
            servers: store::servers(tx, i64::MAX).await?,
            tools: store::every_tool(tx).await?,
            resources: store::resources(tx, org_id, i64::MAX).await?,
            bindings: store::active_bindings(tx).await?,
            rules: store::rules(tx).await?,
            schemas: store::resource_schemas(tx, org_id)
                .await?
                .into_iter()
                .map(|(name, schema)| (name, policy::read_schema(schema)))
                .collect(),
        })
    }

    fn server(&self, name: &str) -> Option<&Server> {
        self.servers.iter().find(|server| server.name == name)
    }

    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    /// The schema of a tool's arguments as it will be; absent for what is not approved then.
    fn input_schema(&self, tool: &str, approved: &BTreeMap<String, Value>) -> Option<Value> {
        if let Some(schema) = approved.get(tool) {
            return Some(schema.clone());
        }
        match self.tool(tool) {
            Some(tool) => tool.input_schema(),
            None => self.schemas.get(tool).cloned(),
        }
    }

    fn document(&self, org_id: &str) -> Document {
        let names = self.names();
        let mut bindings: Vec<BindingEntry> = self
            .bindings
            .iter()
            .filter_map(|binding| {
                let (kind, name) = names.get(binding.resource_id.as_str())?;
                let named = |wanted: &str| (*kind == wanted).then(|| (*name).to_owned());
                Some(BindingEntry {
                    agent: bare(org_id, &binding.agent_id),
                    principal_type: binding.principal_type.clone(),
                    tool: named("tool"),
                    upstream: named("upstream"),
                    resource: named("resource"),
                })
            })
            .collect();
        bindings.sort_by_key(|binding| binding.key(org_id));
        Document {
            upstreams: Some(self.servers.iter().map(UpstreamEntry::of).collect()),
            tools: Some(self.tools.iter().filter_map(ToolEntry::of).collect()),
            bindings: Some(bindings),
            policies: Some(self.rules.iter().map(PolicyEntry::of).collect()),
        }
    }

    /// Kind and name by the id that bindings have.
    fn names(&self) -> BTreeMap<&str, (&'static str, &str)> {
        let tools = self.tools.iter().map(|tool| (tool.tool_id.as_str(), ("tool", tool.name.as_str())));
        let servers = self
            .servers
            .iter()
            .map(|server| (server.upstream_id.as_str(), ("upstream", server.name.as_str())));
        let resources = self
            .resources
            .iter()
            .map(|resource| (resource.resource_id.as_str(), ("resource", resource.name.as_str())));
        tools.chain(servers).chain(resources).collect()
    }
}

impl UpstreamEntry {
    fn of(server: &Server) -> Self {
        Self {
            name: server.name.clone(),
            endpoint_url: server.endpoint_url.clone(),
            description: server.description.clone(),
            auth_type: Some(server.auth_type.clone()),
            auth: None,
            allowed_domains: server.allowed_domains.clone(),
            required_capability: server.required_capability.clone(),
            ca_pem: server.ca_pem.clone(),
            timeout_ms: server.timeout_ms,
            calls_max: server.calls_max,
            asserts_caller: server.asserts_caller,
            enabled: server.enabled,
        }
    }

    fn to_server(&self) -> NewServer {
        let entry = self.clone();
        NewServer {
            name: entry.name,
            endpoint_url: entry.endpoint_url,
            description: entry.description,
            auth: entry.auth,
            allowed_domains: entry.allowed_domains,
            required_capability: entry.required_capability,
            ca_pem: entry.ca_pem,
            timeout_ms: entry.timeout_ms,
            calls_max: entry.calls_max,
            asserts_caller: entry.asserts_caller,
            enabled: entry.enabled,
        }
    }
}

impl ToolEntry {
    /// Absent for a tool about which nothing is decided.
    fn of(tool: &Tool) -> Option<Self> {
        let approved_digest = tool.approved_digest().map(str::to_owned);
        let entry = Self {
            name: tool.name.clone(),
            accept_imitation: approved_digest.is_some() && tool.imitates.is_some(),
            approved_digest,
            required_capability: tool.required_capability.clone(),
            calls_per_minute: tool.calls_per_minute,
            retention_days: tool.retention_days,
        };
        let decided = entry.approved_digest.is_some() || entry.limits() != ToolLimits::default();
        decided.then_some(entry)
    }

    fn limits(&self) -> ToolLimits {
        ToolLimits {
            required_capability: self.required_capability.clone(),
            calls_per_minute: self.calls_per_minute,
            retention_days: self.retention_days,
        }
    }
}

impl BindingEntry {
    fn target(&self) -> Option<(&'static str, &str)> {
        match (&self.tool, &self.upstream, &self.resource) {
            (Some(name), None, None) => Some(("tool", name)),
            (None, Some(name), None) => Some(("upstream", name)),
            (None, None, Some(name)) => Some(("resource", name)),
            _ => None,
        }
    }

    fn key(&self, org_id: &str) -> String {
        let (kind, name) = self.target().unwrap_or_default();
        binding_key(org_id, &self.agent, &self.principal_type, kind, name)
    }
}

impl PolicyEntry {
    fn of(rule: &policy::Rule) -> Self {
        Self { name: rule.name.clone(), mode: rule.mode, tool: rule.tool.clone(), text: rule.text.clone() }
    }
}

/// What a comparison finds.
#[derive(Default)]
struct Found {
    changes: Vec<Change>,
    steps: Vec<Step>,
    waits: Vec<Wait>,
    problems: Vec<FieldProblem>,
}

impl Found {
    fn change(
        &mut self,
        kind: &'static str,
        name: &str,
        action: &'static str,
        sides: [&Value; 2],
        step: Step,
    ) {
        let differences = definition::differences(sides[0], sides[1]);
        self.changes.push(Change { kind, name: name.to_owned(), action, differences });
        self.steps.push(step);
    }

    fn wait(&mut self, kind: &'static str, name: &str, why: impl Into<String>) {
        self.waits.push(Wait { kind, name: name.to_owned(), why: why.into() });
    }

    fn problem(&mut self, field: &'static str, name: &str, what: impl std::fmt::Display) {
        self.problems.push(FieldProblem { field, message: format!("{name}: {what}") });
    }

    /// What a verb's own check says of an entry.
    fn refused(&mut self, field: &'static str, name: &str, error: GatewayError) -> Result<(), GatewayError> {
        match error {
            GatewayError::Fields(problems) => {
                for problem in problems {
                    self.problem(field, name, format_args!("{} {}", problem.field, problem.message));
                }
                Ok(())
            }
            error @ GatewayError::Definition(_) => {
                self.problem(field, name, error);
                Ok(())
            }
            error => Err(error),
        }
    }

    /// Each name once.
    fn once<'a>(&mut self, field: &'static str, names: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let mut seen = BTreeSet::new();
        for name in names {
            if !seen.insert(name) {
                self.problem(field, name, "is named twice");
            }
        }
        if seen.len() > ENTRIES_MAX {
            self.problem(field, "", format_args!("has more than {ENTRIES_MAX} entries"));
        }
        seen
    }
}

impl Gateway {
    /// What there is, as a document.
    ///
    /// Errors: [`GatewayError::Store`].
    pub async fn export(&self) -> Result<Document, GatewayError> {
        let mut tx = self.store.read().await?;
        Ok(Standing::read(&mut tx, &self.org_id).await?.document(&self.org_id))
    }

    /// What an import would change. Changes nothing.
    ///
    /// Errors: [`GatewayError::Fields`] with everything that is wrong in the document.
    pub async fn plan_import(&self, document: &Document, prune: bool) -> Result<Plan, GatewayError> {
        let mut tx = self.store.read().await?;
        let standing = Standing::read(&mut tx, &self.org_id).await?;
        self.compare(&standing, document, prune).map(|(plan, _)| plan)
    }

    /// Takes up a document in one commit, with an event for each change; then looks at servers that are new or moved.
    /// Where it changes nothing, nothing is written.
    ///
    /// Errors: as [`Gateway::plan_import`], and [`GatewayError::PlanMoved`] where the plan is not the one of `plan_digest`.
    pub async fn import(
        &self,
        actor: &str,
        now: UnixTime,
        document: &Document,
        prune: bool,
        plan_digest: Option<&str>,
    ) -> Result<Plan, GatewayError> {
        let mut tx = self.store.write().await?;
        let standing = Standing::read(&mut tx, &self.org_id).await?;
        let (plan, steps) = self.compare(&standing, document, prune)?;
        if plan_digest.is_some_and(|wanted| wanted != plan.plan_digest) {
            return Err(GatewayError::PlanMoved(plan.plan_digest));
        }
        if steps.is_empty() {
            return Ok(plan);
        }
        let mut events = Vec::new();
        let mut to_look_at = Vec::new();
        for step in steps {
            self.do_step(&mut tx, actor, now, step, &mut events, &mut to_look_at).await?;
        }
        let details =
            json!({ "plan_digest": plan.plan_digest, "changes": plan.changes.len(), "prune": prune });
        events.push(event(EventType::McpConfigImported, actor, details));
        tx.commit(&events).await?;
        // How each look ends stands in the server's row.
        join_all(to_look_at.iter().map(|id| self.look(actor, now, id))).await;
        Ok(plan)
    }

    fn compare(
        &self,
        standing: &Standing,
        document: &Document,
        prune: bool,
    ) -> Result<(Plan, Vec<Step>), GatewayError> {
        let mut found = Found::default();
        self.compare_upstreams(standing, document, &mut found)?;
        let approved = self.compare_tools(standing, document, &mut found)?;
        self.compare_policies(standing, document, prune, &approved, &mut found)?;
        self.compare_bindings(standing, document, prune, &mut found)?;
        if let (Some(upstreams), true) = (&document.upstreams, prune) {
            for server in &standing.servers {
                if !upstreams.iter().any(|entry| entry.name == server.name) {
                    let before = json!(UpstreamEntry::of(server));
                    let step = Step::RemoveUpstream(Box::new(server.clone()));
                    found.change("upstream", &server.name, "remove", [&before, &Value::Null], step);
                }
            }
        }
        if !found.problems.is_empty() {
            return Err(GatewayError::Fields(found.problems));
        }
        let plan_digest = sha256_hex(&serde_json::to_vec(&found.changes)?);
        Ok((Plan { changes: found.changes, waits: found.waits, plan_digest }, found.steps))
    }

    fn compare_upstreams(
        &self,
        standing: &Standing,
        document: &Document,
        found: &mut Found,
    ) -> Result<(), GatewayError> {
        let entries = document.upstreams.as_deref().unwrap_or_default();
        found.once("upstreams", entries.iter().map(|entry| entry.name.as_str()));
        for entry in entries {
            let known = standing.server(&entry.name);
            let new = entry.to_server();
            if let Err(error) = self.check_server(&new, known) {
                found.refused("upstreams", &entry.name, error)?;
                continue;
            }
            let there = known.map_or("none", |server| server.auth_type.as_str());
            let wanted = match &entry.auth {
                Some(auth) => auth.kind(),
                None => entry.auth_type.as_deref().unwrap_or(there),
            };
            if entry.auth.is_none() && wanted != there {
                let what =
                    format_args!("has auth_type {wanted} and no such credential here: give it as auth");
                found.problem("upstreams", &entry.name, what);
                continue;
            }
            let mut after = json!(entry);
            after["auth_type"] = json!(wanted);
            let Some(server) = known else {
                let step = Step::CreateUpstream(Box::new(new));
                found.change("upstream", &entry.name, "create", [&Value::Null, &after], step);
                continue;
            };
            let mut before = json!(UpstreamEntry::of(server));
            if let Some(auth) = &entry.auth
                && !ServerAuth::open(server, &self.sealing).is_ok_and(|known| known.is(auth))
            {
                // Neither side is told.
                before["credential"] = json!("the present one");
                after["credential"] = json!("another one");
            }
            if before != after {
                let step = Step::ChangeUpstream(Box::new((server.clone(), new)));
                found.change("upstream", &entry.name, "change", [&before, &after], step);
            }
        }
        let created = found.steps.iter().filter(|step| matches!(step, Step::CreateUpstream(_))).count();
        if standing.servers.len() + created > usize::try_from(SERVERS_MAX).unwrap_or(0) {
            found.problem("upstreams", "", format_args!("there may be {SERVERS_MAX} at most"));
        }
        Ok(())
    }

    /// Gives the schemas of the tools that will be approved.
    fn compare_tools(
        &self,
        standing: &Standing,
        document: &Document,
        found: &mut Found,
    ) -> Result<BTreeMap<String, Value>, GatewayError> {
        let entries = document.tools.as_deref().unwrap_or_default();
        found.once("tools", entries.iter().map(|entry| entry.name.as_str()));
        let mut approved = BTreeMap::new();
        for entry in entries {
            let name = entry.name.as_str();
            if let Err(error) = entry.limits().check() {
                found.refused("tools", name, error)?;
                continue;
            }
            let Some(tool) = standing.tool(name) else {
                found.wait(
                    "tool",
                    name,
                    "no server is known to have it: import again when its server was looked at",
                );
                continue;
            };
            let (before, after) = (ToolLimits::of(tool), entry.limits());
            if before != after {
                let step = Step::Limit(Box::new((tool.clone(), after.clone())));
                found.change("tool", name, "change", [&json!(before), &json!(after)], step);
            }
            let Some(digest) = &entry.approved_digest else { continue };
            if tool.approved_digest() == Some(digest) {
                continue;
            }
            if tool.found_digest != *digest {
                let why = format!("its server says something else now: {}", tool.found_digest);
                found.wait("tool", name, why);
            } else if let (Some(other), false) = (&tool.imitates, entry.accept_imitation) {
                let why = format!("its name imitates {other}: add accept_imitation: true if that is meant");
                found.wait("tool", name, why);
            } else {
                let definition: Value = serde_json::from_str(&tool.found)?;
                let schema = definition["inputSchema"].clone();
                if let Err(error) = definition::validator(&schema) {
                    found.problem("tools", name, error);
                    continue;
                }
                approved.insert(name.to_owned(), schema);
                let (before, after) = (
                    json!({ "approved_digest": tool.approved_digest() }),
                    json!({ "approved_digest": digest }),
                );
                let step = Step::Approve(Box::new(tool.clone()));
                found.change("tool", name, "approve", [&before, &after], step);
            }
        }
        Ok(approved)
    }

    fn compare_policies(
        &self,
        standing: &Standing,
        document: &Document,
        prune: bool,
        approved: &BTreeMap<String, Value>,
        found: &mut Found,
    ) -> Result<(), GatewayError> {
        let Some(entries) = &document.policies else { return Ok(()) };
        let named = found.once("policies", entries.iter().map(|entry| entry.name.as_str()));
        for entry in entries {
            let name = entry.name.as_str();
            let new = NewRule { text: entry.text.clone(), tool: entry.tool.clone(), mode: entry.mode };
            let known = standing.rules.iter().find(|rule| rule.name == entry.name).map(PolicyEntry::of);
            let (before, after) = (known.map_or(Value::Null, |known| json!(known)), json!(entry));
            if before == after {
                continue;
            }
            let schema = match entry.tool.as_deref() {
                None => None,
                Some(tool) => match standing.input_schema(tool, approved) {
                    Some(schema) => Some(schema),
                    None => {
                        // What can be said of it already is said now.
                        if let Err(error) = policy::parse(name, &new) {
                            found.refused("policies", name, error)?;
                            continue;
                        }
                        let why = format!("tool {tool} is not approved: approve it in the same document");
                        found.wait("policy", name, why);
                        continue;
                    }
                },
            };
            if let Err(error) = policy::check(name, &new, schema.as_ref()) {
                found.refused("policies", name, error)?;
                continue;
            }
            let action = if before.is_null() { "create" } else { "change" };
            let step = Step::Save(entry.name.clone(), new);
            found.change("policy", name, action, [&before, &after], step);
        }
        for rule in standing.rules.iter().filter(|rule| prune && !named.contains(rule.name.as_str())) {
            let step = Step::DeleteRule(rule.name.clone());
            found.change("policy", &rule.name, "remove", [&json!(PolicyEntry::of(rule)), &Value::Null], step);
        }
        let count = |wanted: &str| {
            let of_this = |change: &&Change| change.kind == "policy" && change.action == wanted;
            found.changes.iter().filter(of_this).count()
        };
        let (created, removed) = (count("create"), count("remove"));
        if standing.rules.len() + created > policy::POLICIES_MAX + removed {
            found.problem("policies", "", format_args!("there may be {} at most", policy::POLICIES_MAX));
        }
        Ok(())
    }

    fn compare_bindings(
        &self,
        standing: &Standing,
        document: &Document,
        prune: bool,
        found: &mut Found,
    ) -> Result<(), GatewayError> {
        let Some(entries) = &document.bindings else { return Ok(()) };
        let names = standing.names();
        let there: BTreeMap<String, &super::Binding> = standing
            .bindings
            .iter()
            .filter_map(|binding| {
                let (kind, name) = names.get(binding.resource_id.as_str())?;
                Some((
                    binding_key(&self.org_id, &binding.agent_id, &binding.principal_type, kind, name),
                    binding,
                ))
            })
            .collect();
        let keys: Vec<String> = entries.iter().map(|entry| entry.key(&self.org_id)).collect();
        let named = found.once("bindings", keys.iter().map(String::as_str));
        for (entry, key) in entries.iter().zip(&keys) {
            let Some((kind, name)) = entry.target() else {
                found.problem("bindings", &entry.agent, "must name one of tool, upstream, resource");
                continue;
            };
            if let Err(error) = super::check_binding(&entry.agent, &entry.principal_type) {
                found.refused("bindings", &entry.agent, error)?;
                continue;
            }
            if there.contains_key(key) {
                continue;
            }
            let known = match kind {
                "tool" => standing.tool(name).is_some(),
                "upstream" => {
                    standing.server(name).is_some()
                        || document.upstreams.iter().flatten().any(|upstream| upstream.name == name)
                }
                _ => standing.resources.iter().any(|resource| resource.name == name),
            };
            if known {
                found.change(
                    "binding",
                    key,
                    "create",
                    [&Value::Null, &json!(entry)],
                    Step::Bind(entry.clone()),
                );
            } else {
                found.wait("binding", key, format!("there is no {kind} {name} yet"));
            }
        }
        for (key, binding) in there.iter().filter(|(key, _)| prune && !named.contains(key.as_str())) {
            let step = Step::Revoke(binding.binding_id.clone());
            found.change(
                "binding",
                key,
                "remove",
                [&json!({ "since": binding.granted_at }), &Value::Null],
                step,
            );
        }
        Ok(())
    }

    async fn do_step(
        &self,
        tx: &mut WriteTx,
        actor: &str,
        now: UnixTime,
        step: Step,
        events: &mut Vec<Event>,
        to_look_at: &mut Vec<String>,
    ) -> Result<(), GatewayError> {
        let done = match step {
            Step::CreateUpstream(new) => {
                let (server, done) = self.insert_server(tx, actor, now, &new).await?;
                to_look_at.push(server.upstream_id);
                done
            }
            Step::ChangeUpstream(change) => {
                let (known, new) = *change;
                if new.endpoint_url != known.endpoint_url || new.auth.is_some() {
                    to_look_at.push(known.upstream_id.clone());
                }
                self.update_server(tx, actor, now, &known, &new).await?
            }
            Step::RemoveUpstream(server) => super::servers::remove(tx, actor, &server).await?,
            Step::Approve(tool) => {
                // Its limits may have been changed just before.
                let tool = store::server_tool(tx, &tool.tool_id).await?.unwrap_or(*tool);
                super::servers::approve(tx, actor, now, tool).await?.1
            }
            Step::Limit(change) => {
                let (tool, limits) = *change;
                super::servers::limit(tx, actor, tool, limits).await?.1
            }
            Step::Bind(entry) => {
                let (kind, name) = entry.target().unwrap_or_default();
                let id = store::id_by_name(tx, &self.org_id, kind, name).await?;
                let id = id.ok_or(GatewayError::UnknownResource)?;
                self.grant(tx, actor, now, (&entry.agent, &entry.principal_type), &id).await?.1
            }
            Step::Revoke(binding_id) => super::revoke(tx, actor, now, &binding_id).await?,
            Step::Save(name, new) => policy::write(tx, actor, now, &name, new).await?.1,
            Step::DeleteRule(name) => policy::delete(tx, actor, now, &name).await?.1,
        };
        events.push(done);
        Ok(())
    }
}

fn binding_key(org_id: &str, agent: &str, principal_type: &str, kind: &str, name: &str) -> String {
    let agent = canonical(org_id, agent);
    let typed = if principal_type == "agent" { agent } else { format!("{principal_type} {agent}") };
    format!("{typed} to {kind} {name}")
}
