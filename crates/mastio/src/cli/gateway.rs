//! `mastio upstreams`, `mastio tools`, `mastio policy`: each command is a request or two to the
//! server, or to its routes in this process.
//!
//! Secrets come from the environment or from a file, never from the command line, which others can read.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use reqwest::{Method, Url};
use serde_json::{Map, Value, json};

use super::remote::{Remote, below};
use super::{Failure, Target, Way, ask, local, read_text, show, table, way};
use crate::config::Config;
use crate::gateway::upstream;

const UPSTREAMS: [&str; 3] = ["v1", "admin", "mcp-upstreams"];
const TOOLS: [&str; 3] = ["v1", "admin", "mcp-tools"];
const POLICIES: [&str; 3] = ["v1", "admin", "mcp-policies"];
const EVIDENCE: [&str; 3] = ["v1", "admin", "mcp-evidence"];
const RESOURCES: [&str; 3] = ["v1", "admin", "mcp-resources"];
const BINDINGS: [&str; 4] = ["v1", "admin", "mcp-resources", "bindings"];

#[derive(Debug, Subcommand)]
pub(super) enum UpstreamsCommand {
    /// List MCP servers by name.
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Show one, with its tools.
    Show {
        /// Its name or id.
        upstream: String,
        #[command(flatten)]
        target: Target,
    },
    /// Register an MCP server and look at what it offers. Nothing of it is offered to agents yet.
    Add {
        /// Its name: up to 32 of A-Z a-z 0-9 . _ -
        name: String,
        /// Where it answers.
        #[arg(long, value_name = "URL")]
        endpoint: String,
        /// For operators.
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        #[command(flatten)]
        credential: Credential,
        /// What callers need besides a binding.
        #[arg(long, value_name = "CAPABILITY")]
        required_capability: Option<String>,
        /// Hosts that the endpoint may have; may be given more than once.
        #[arg(long = "allowed-domain", value_name = "HOST")]
        allowed_domains: Vec<String>,
        /// CAs that its certificate must come from, PEM, in place of the machine's.
        #[arg(long, value_name = "FILE")]
        ca_file: Option<PathBuf>,
        #[command(flatten)]
        target: Target,
    },
    /// Remove an MCP server with its tools and every binding to them.
    Remove {
        /// Its name or id.
        upstream: String,
        /// Say that it is meant: there is no way back.
        #[arg(long, short, required = true)]
        yes: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Look at what an MCP server offers now.
    Refresh {
        /// Its name or id.
        upstream: String,
        #[command(flatten)]
        target: Target,
    },
}

/// How we prove ourselves to an upstream.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub(super) struct Credential {
    /// `Authorization: Bearer` with what this variable of the environment has.
    #[arg(long, value_name = "VARIABLE")]
    bearer_env: Option<String>,
    /// `X-API-Key` with what this variable of the environment has.
    #[arg(long, value_name = "VARIABLE")]
    api_key_env: Option<String>,
    /// Any credential as docs/gateway.md has it, JSON; `-` for standard input.
    #[arg(long, value_name = "FILE")]
    auth_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum ToolsCommand {
    /// List tools of MCP servers.
    List {
        /// Only of this server.
        #[arg(long, value_name = "UPSTREAM")]
        upstream: Option<String>,
        /// Only those that are proposed, approved, changed, blocked or gone.
        #[arg(long, value_name = "STANDING")]
        standing: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Show a tool: what was approved, what its server says now, and the difference.
    Show {
        /// Its name or id.
        tool: String,
        #[command(flatten)]
        target: Target,
    },
    /// Offer a tool to agents as its server describes it now.
    Approve {
        /// Its name or id.
        tool: String,
        /// The digest of the definition that you have read (`found_digest` of `show`). Without it you are shown and asked.
        #[arg(long, value_name = "SHA-256")]
        digest: Option<String>,
        /// Although its name imitates an older tool's.
        #[arg(long)]
        accept_imitation: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Offer a tool to nobody until it is approved again.
    Block {
        /// Its name or id.
        tool: String,
        #[command(flatten)]
        target: Target,
    },
    /// Set what a tool asks of its callers, and what is kept of their calls; what is not named becomes none.
    Limit {
        /// Its name or id.
        tool: String,
        /// What callers need besides a binding.
        #[arg(long, value_name = "CAPABILITY")]
        required_capability: Option<String>,
        /// How often one agent may call it.
        #[arg(long, value_name = "CALLS")]
        per_minute: Option<i64>,
        /// For how many days its arguments and results are kept, sealed.
        #[arg(long, value_name = "DAYS")]
        retention_days: Option<i64>,
        #[command(flatten)]
        target: Target,
    },
    /// Let an agent call a tool, or every approved tool of a server.
    Bind {
        #[command(flatten)]
        what: What,
        /// The agent, as NAME or ORG::NAME.
        #[arg(long, value_name = "AGENT")]
        agent: String,
        /// agent, user or workload.
        #[arg(long, value_name = "TYPE", default_value = "agent")]
        principal_type: String,
        #[command(flatten)]
        target: Target,
    },
    /// End what `bind` granted.
    Unbind {
        #[command(flatten)]
        what: What,
        /// The agent, as NAME or ORG::NAME.
        #[arg(long, value_name = "AGENT")]
        agent: String,
        #[command(flatten)]
        target: Target,
    },
    /// List calls of which arguments and results are kept, or show one of them. Each showing leaves an audit event.
    Evidence {
        /// The call to show, by its evidence_id.
        id: Option<String>,
        /// Only of this tool.
        #[arg(long, value_name = "TOOL", conflicts_with = "id")]
        tool: Option<String>,
        /// Only of this agent.
        #[arg(long, value_name = "AGENT", conflicts_with = "id")]
        agent: Option<String>,
        /// Those after this one in the list.
        #[arg(long, value_name = "ID", conflicts_with = "id")]
        after: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Say who may call what, and why.
    Access {
        /// Only of this agent: every tool.
        #[arg(long, value_name = "AGENT")]
        agent: Option<String>,
        /// Only of this tool: every agent that is bound to anything.
        #[arg(long, value_name = "TOOL")]
        tool: Option<String>,
        #[command(flatten)]
        target: Target,
    },
}

/// What an agent is bound to.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct What {
    /// The tool's name or id, of a server or of a resource.
    tool: Option<String>,
    /// The whole server of this name or id.
    #[arg(long, value_name = "UPSTREAM")]
    upstream: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// List policies by name.
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Show a policy with every version of it.
    Show {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Say what would become of a call, and why, without making it. Exit code 3 when it would be denied.
    Test {
        /// The agent, as NAME or ORG::NAME.
        #[arg(long, value_name = "AGENT")]
        agent: String,
        /// The tool.
        #[arg(long, value_name = "TOOL")]
        tool: String,
        /// The arguments, JSON. Without them: whether there can be any that would do.
        #[arg(long, value_name = "JSON")]
        arguments: Option<String>,
        /// A policy that is not saved, judged as if it were in force; `-` for standard input.
        #[arg(long, value_name = "FILE")]
        draft: Option<PathBuf>,
        /// The tool whose arguments the draft speaks of.
        #[arg(long, value_name = "TOOL", requires = "draft")]
        draft_tool: Option<String>,
        /// The saved policy that the draft takes the place of.
        #[arg(long, value_name = "NAME", requires = "draft")]
        in_place_of: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Save a policy, as its next version.
    Set {
        /// Its name: up to 64 of A-Z a-z 0-9 . _ -
        name: String,
        /// One Cedar policy; `-` for standard input.
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// The tool whose arguments it speaks of.
        #[arg(long, value_name = "TOOL")]
        tool: Option<String>,
        /// enforce, shadow or off.
        #[arg(long, value_name = "MODE", default_value = "enforce")]
        mode: String,
        #[command(flatten)]
        target: Target,
    },
    /// Let a policy decide nothing, and tell what it would have denied.
    Shadow {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Let a policy decide.
    Enforce {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Keep a policy, and let it do nothing.
    Off {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// End a policy; its versions stay.
    Remove {
        /// Its name.
        name: String,
        #[command(flatten)]
        target: Target,
    },
}

/// The gateway's routes: those of a server, or the same in this process.
pub(super) enum Api {
    Server(Remote),
    InProcess(Box<Config>),
}

pub(super) fn server(target: &Target) -> Result<Api, Failure> {
    Ok(match way(target)? {
        Way::Server(remote) => Api::Server(remote),
        Way::InProcess(config) => Api::InProcess(config),
    })
}

impl Api {
    async fn ask(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        match self {
            Self::Server(remote) => remote.ask(method, path, query, body).await,
            Self::InProcess(config) => {
                let base = Url::parse("https://localhost/")
                    .map_err(|error| Failure::because("the request cannot be made", error))?;
                let url = below(&base, path, query);
                let path = match url.query() {
                    Some(query) => format!("{}?{query}", url.path()),
                    None => url.path().to_owned(),
                };
                local::ask_gateway(config, method, &path, body).await
            }
        }
    }

    pub(super) async fn get(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, Failure> {
        self.ask(Method::GET, path, query, None).await
    }

    pub(super) async fn post(&self, path: &[&str], body: &Value) -> Result<Value, Failure> {
        self.ask(Method::POST, path, &[], Some(body)).await
    }

    async fn put(&self, path: &[&str], body: &Value) -> Result<Value, Failure> {
        self.ask(Method::PUT, path, &[], Some(body)).await
    }

    async fn patch(&self, path: &[&str], body: &Value) -> Result<Value, Failure> {
        self.ask(Method::PATCH, path, &[], Some(body)).await
    }

    async fn delete(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, Failure> {
        self.ask(Method::DELETE, path, query, None).await
    }
}

/// The variable's value. It is a secret, so it is never shown, and never one of our own.
pub(super) fn secret(variable: &str) -> Result<String, Failure> {
    if upstream::is_own_setting(variable) {
        return Err(Failure::Usage(format!(
            "{variable} is a setting of the Mastio itself: no server gets it"
        )));
    }
    crate::config::environment_secret(variable).filter(|value| !value.is_empty()).ok_or_else(|| {
        Failure::Usage(format!("the variable {variable} is not set: it is to have the secret"))
    })
}

impl Credential {
    fn read(&self) -> Result<Option<Value>, Failure> {
        Ok(match (&self.bearer_env, &self.api_key_env, &self.auth_file) {
            (Some(variable), ..) => Some(json!({ "type": "bearer", "secret": secret(variable)? })),
            (_, Some(variable), _) => Some(json!({ "type": "api_key", "secret": secret(variable)? })),
            (.., Some(file)) => Some(parse(&read_text(file, "the credential")?, "the credential")?),
            _ => None,
        })
    }
}

fn parse(text: &str, what: &str) -> Result<Value, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::Usage(format!("{what} is not JSON: {error}")))
}

fn at<'a>(path: &[&'a str], rest: &[&'a str]) -> Vec<&'a str> {
    [path, rest].concat()
}

pub(super) async fn upstreams(command: UpstreamsCommand) -> Result<(), Failure> {
    match command {
        UpstreamsCommand::List { target } => {
            show(&target, &server(&target)?.get(&UPSTREAMS, &[]).await?, table::upstreams)
        }
        UpstreamsCommand::Show { upstream, target } => {
            let remote = server(&target)?;
            let mut shown = remote.get(&at(&UPSTREAMS, &[&upstream]), &[]).await?;
            let id = shown["upstream_id"].as_str().unwrap_or_default().to_owned();
            let tools = remote.get(&TOOLS, &[("upstream", &id)]).await?;
            if let Some(shown) = shown.as_object_mut() {
                shown.insert("tools".to_owned(), tools);
            }
            show(&target, &shown, table::upstream)
        }
        UpstreamsCommand::Add {
            name,
            endpoint,
            description,
            credential,
            required_capability,
            allowed_domains,
            ca_file,
            target,
        } => {
            let mut body = Map::from_iter([
                ("name".to_owned(), json!(name)),
                ("endpoint_url".to_owned(), json!(endpoint)),
                ("description".to_owned(), json!(description)),
                ("required_capability".to_owned(), json!(required_capability)),
                ("allowed_domains".to_owned(), json!(allowed_domains)),
            ]);
            if let Some(auth) = credential.read()? {
                body.insert("auth".to_owned(), auth);
            }
            if let Some(file) = ca_file {
                body.insert("ca_pem".to_owned(), json!(read_text(&file, "the CA file")?));
            }
            let added = server(&target)?.post(&UPSTREAMS, &Value::Object(body)).await?;
            show(&target, &added, table::added_upstream)
        }
        UpstreamsCommand::Remove { upstream, yes: _, target } => {
            server(&target)?.delete(&at(&UPSTREAMS, &[&upstream]), &[]).await?;
            show(&target, &json!({ "upstream": upstream, "removed": true }), table::fields)
        }
        UpstreamsCommand::Refresh { upstream, target } => {
            let look = server(&target)?.post(&at(&UPSTREAMS, &[&upstream, "refresh"]), &json!({})).await?;
            show(&target, &look, table::fields)
        }
    }
}

pub(super) async fn tools(command: ToolsCommand) -> Result<(), Failure> {
    match command {
        ToolsCommand::List { upstream, standing, target } => {
            let mut query: Vec<(&str, &str)> = Vec::new();
            query.extend(upstream.as_deref().map(|upstream| ("upstream", upstream)));
            query.extend(standing.as_deref().map(|standing| ("standing", standing)));
            show(&target, &server(&target)?.get(&TOOLS, &query).await?, table::tools)
        }
        ToolsCommand::Show { tool, target } => {
            show(&target, &server(&target)?.get(&at(&TOOLS, &[&tool]), &[]).await?, table::tool)
        }
        ToolsCommand::Approve { tool, digest, accept_imitation, target } => {
            let remote = server(&target)?;
            let digest = match digest {
                Some(digest) => digest,
                None => {
                    let shown = remote.get(&at(&TOOLS, &[&tool]), &[]).await?;
                    super::on_terminal("approving says that you have read the definition", "--digest")?;
                    super::tell(&table::tool(&shown))?;
                    ask("offer it to agents as it is now")?;
                    shown["found_digest"].as_str().unwrap_or_default().to_owned()
                }
            };
            let body = json!({ "digest": digest, "accept_imitation": accept_imitation });
            let approved = remote.post(&at(&TOOLS, &[&tool, "approve"]), &body).await?;
            show(&target, &approved, table::fields)
        }
        ToolsCommand::Block { tool, target } => {
            let blocked = server(&target)?.post(&at(&TOOLS, &[&tool, "block"]), &json!({})).await?;
            show(&target, &blocked, table::fields)
        }
        ToolsCommand::Limit { tool, required_capability, per_minute, retention_days, target } => {
            let body = json!({
                "required_capability": required_capability,
                "calls_per_minute": per_minute,
                "retention_days": retention_days,
            });
            let limited = server(&target)?.patch(&at(&TOOLS, &[&tool]), &body).await?;
            show(&target, &limited, table::fields)
        }
        ToolsCommand::Bind { what, agent, principal_type, target } => {
            let remote = server(&target)?;
            let id = what.id(&remote).await?;
            let body = json!({ "agent_id": agent, "principal_type": principal_type, "resource_id": id });
            show(&target, &remote.post(&BINDINGS, &body).await?, table::fields)
        }
        ToolsCommand::Unbind { what, agent, target } => {
            let remote = server(&target)?;
            let id = what.id(&remote).await?;
            let query = [("agent_id", agent.as_str()), ("resource_id", &id)];
            let bindings = remote.get(&BINDINGS, &query).await?;
            let active: Vec<&str> = bindings
                .as_array()
                .into_iter()
                .flatten()
                .filter(|binding| binding["revoked_at"].is_null())
                .filter_map(|binding| binding["binding_id"].as_str())
                .collect();
            if active.is_empty() {
                return Err(Failure::Refused(format!("{agent} is not bound to that")));
            }
            for binding in &active {
                remote.delete(&at(&BINDINGS, &[binding]), &[]).await?;
            }
            show(&target, &json!({ "agent_id": agent, "revoked": active }), table::fields)
        }
        ToolsCommand::Evidence { id: Some(id), target, .. } => {
            show(&target, &server(&target)?.get(&at(&EVIDENCE, &[&id]), &[]).await?, table::fields)
        }
        ToolsCommand::Evidence { id: None, tool, agent, after, target } => {
            let mut query: Vec<(&str, &str)> = Vec::new();
            query.extend(tool.as_deref().map(|tool| ("tool", tool)));
            query.extend(agent.as_deref().map(|agent| ("agent_id", agent)));
            query.extend(after.as_deref().map(|after| ("after", after)));
            show(&target, &server(&target)?.get(&EVIDENCE, &query).await?, table::evidence)
        }
        ToolsCommand::Access { agent, tool, target } => {
            let mut query: Vec<(&str, &str)> = Vec::new();
            query.extend(agent.as_deref().map(|agent| ("agent_id", agent)));
            query.extend(tool.as_deref().map(|tool| ("tool", tool)));
            let rows = server(&target)?.get(&["v1", "admin", "mcp-access"], &query).await?;
            show(&target, &rows, table::access)
        }
    }
}

impl What {
    /// The id that a binding names.
    async fn id(&self, remote: &Api) -> Result<String, Failure> {
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        if let Some(upstream) = &self.upstream {
            return Ok(text(&remote.get(&at(&UPSTREAMS, &[upstream]), &[]).await?, "upstream_id"));
        }
        let wanted = self.tool.as_deref().unwrap_or_default();
        let resources = remote.get(&RESOURCES, &[]).await?;
        let resource = resources
            .as_array()
            .into_iter()
            .flatten()
            .find(|resource| resource["name"] == wanted || resource["resource_id"] == wanted);
        match resource {
            Some(resource) => Ok(text(resource, "resource_id")),
            None => Ok(text(&remote.get(&at(&TOOLS, &[wanted]), &[]).await?, "tool_id")),
        }
    }
}

pub(super) async fn policy(command: PolicyCommand) -> Result<(), Failure> {
    match command {
        PolicyCommand::List { target } => {
            show(&target, &server(&target)?.get(&POLICIES, &[]).await?, table::policies)
        }
        PolicyCommand::Show { name, target } => {
            let versions = server(&target)?.get(&at(&POLICIES, &[&name]), &[]).await?;
            show(&target, &versions, table::policy_versions)
        }
        PolicyCommand::Test { agent, tool, arguments, draft, draft_tool, in_place_of, target } => {
            let arguments = arguments.map(|text| parse(&text, "--arguments")).transpose()?;
            let mut body = json!({ "agent_id": agent, "tool": tool, "arguments": arguments });
            if let (Some(file), Some(body)) = (draft, body.as_object_mut()) {
                let text = read_text(&file, "the policy")?;
                body.insert("draft".to_owned(), json!({ "text": text, "tool": draft_tool }));
                body.extend(in_place_of.map(|name| ("draft_name".to_owned(), json!(name))));
            }
            let said = server(&target)?.post(&at(&POLICIES, &["test"]), &body).await?;
            show(&target, &said, table::fields)?;
            if said["allowed"] == true {
                return Ok(());
            }
            Err(Failure::Refused(said["message"].as_str().unwrap_or("the call would be denied").to_owned()))
        }
        PolicyCommand::Set { name, file, tool, mode, target } => {
            let body = json!({ "text": read_text(&file, "the policy")?, "tool": tool, "mode": mode });
            let saved = server(&target)?.put(&at(&POLICIES, &[&name]), &body).await?;
            show(&target, &saved, table::fields)
        }
        PolicyCommand::Shadow { name, target } => set_mode(&name, "shadow", &target).await,
        PolicyCommand::Enforce { name, target } => set_mode(&name, "enforce", &target).await,
        PolicyCommand::Off { name, target } => set_mode(&name, "off", &target).await,
        PolicyCommand::Remove { name, target } => {
            server(&target)?.delete(&at(&POLICIES, &[&name]), &[]).await?;
            show(&target, &json!({ "name": name, "removed": true }), table::fields)
        }
    }
}

/// Saves what the policy says, in another mode.
async fn set_mode(name: &str, mode: &str, target: &Target) -> Result<(), Failure> {
    let remote = server(target)?;
    let versions = remote.get(&at(&POLICIES, &[name]), &[]).await?;
    let newest = &versions[0];
    if newest["mode"] == "deleted" {
        return Err(Failure::Refused(format!(
            "policy '{name}' was removed: save it again with `policy set`"
        )));
    }
    let body = json!({ "text": newest["text"], "tool": newest["tool"], "mode": mode });
    let saved = remote.put(&at(&POLICIES, &[name]), &body).await?;
    show(target, &saved, table::fields)
}
