//! `/proxy/tools`: the MCP servers behind the gateway, what their tools say now beside what was approved, and who may
//! call them.
//!
//! Definitions come from servers that we do not trust: they are shown as text, and approved by the digest of exactly
//! what the page has shown.

use askama::Template;
use serde::Deserialize;
use serde_json::Value;

use super::error::DashboardError;
use super::{Dashboard, Frame, urlencoded};
use crate::gateway::credential::Auth;
use crate::gateway::definition::{Difference, differences};
use crate::gateway::servers::{NewServer, Server, Tool};
use crate::gateway::trial::Trial;
use crate::gateway::{Access, Binding, Resource};
use crate::http::authn::Session;

/// Tools in a list on a page.
const PAGE_ROWS: i64 = 50;
/// Bindings on a tool's page, to it and to its server; each is asked about.
const BINDINGS: i64 = 25;

/// One place where what a server says differs from what was approved, as text.
pub(super) struct Changed {
    path: String,
    before: String,
    after: String,
}

impl Changed {
    fn of(difference: &Difference) -> Self {
        let text = |value: &Option<Value>| match value {
            None => "nothing".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => serde_json::to_string_pretty(other).unwrap_or_default(),
        };
        Self {
            path: difference.path.clone(),
            before: text(&difference.before),
            after: text(&difference.after),
        }
    }
}

/// A tool in a list.
pub(super) struct Listed {
    tool: Tool,
    server: String,
}

impl Listed {
    fn path(&self) -> String {
        path(&self.tool)
    }

    fn class(&self) -> &'static str {
        class(&self.tool)
    }
}

/// Where the forms about a server go.
pub(super) fn server_path(server: &Server) -> String {
    format!("/proxy/tools/servers/{}", urlencoded(&server.upstream_id))
}

fn path(tool: &Tool) -> String {
    format!("/proxy/tools/{}", urlencoded(&tool.tool_id))
}

fn class(tool: &Tool) -> &'static str {
    match tool.standing() {
        "approved" => "good",
        "proposed" => "waiting",
        "changed" => "bad",
        _ => "over",
    }
}

/// Where lists of tools go on: the names that the page before has ended with.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ToolsQuery {
    #[serde(default)]
    after: String,
    #[serde(default)]
    after_waiting: String,
}

/// `/proxy/tools`.
#[derive(Template)]
#[template(path = "tools.html")]
pub(super) struct ToolsPage {
    frame: Frame,
    /// Whether it is the first page of its lists.
    first: bool,
    servers: Vec<Server>,
    waiting: Vec<Listed>,
    next_waiting: Option<String>,
    decided: Vec<Listed>,
    next: Option<String>,
    resources: Vec<Resource>,
}

/// `/proxy/tools/{tool_id}`.
#[derive(Template)]
#[template(path = "tool.html")]
pub(super) struct ToolPage {
    frame: Frame,
    tool: Tool,
    class: &'static str,
    server: Server,
    title: String,
    description: String,
    schema: String,
    changed: Vec<Changed>,
    bound: Vec<Bound>,
    /// Whether there are more bindings than are shown.
    further_bound: bool,
    /// What the form begins with: the arguments that were tried, or those that the schema demands.
    arguments: String,
    trial: Option<Trial>,
    path: String,
    command: String,
}

/// A binding to a tool, and what comes of it.
pub(super) struct Bound {
    binding: Binding,
    /// Whether it is to the whole server.
    by_server: bool,
    access: Access,
}

/// What a form says of a server to be registered; the other ways to prove ourselves are the command line's.
pub(super) fn new_server(
    name: &str,
    endpoint_url: &str,
    secret: &str,
    required_capability: &str,
) -> NewServer {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let auth = given(secret).map(|secret| Auth::Bearer { secret });
    NewServer {
        auth,
        required_capability: given(required_capability),
        ..NewServer::named(name, endpoint_url)
    }
}

/// An object with the members that a schema demands, empty.
fn outline(schema: &Value) -> String {
    let empty = |name: &str| match schema["properties"][name]["type"].as_str() {
        Some("string") => Value::String(String::new()),
        Some("number" | "integer") => Value::from(0),
        Some("boolean") => Value::Bool(false),
        Some("array") => Value::Array(Vec::new()),
        Some("object") => Value::Object(serde_json::Map::new()),
        _ => Value::Null,
    };
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let members: serde_json::Map<String, Value> =
        required.map(|name| (name.to_owned(), empty(name))).collect();
    serde_json::to_string_pretty(&Value::Object(members)).unwrap_or_default()
}

impl Dashboard {
    /// Tools in one list: those that wait for a decision, or the others.
    async fn listed(
        &self,
        waiting: bool,
        after: &str,
    ) -> Result<(Vec<Listed>, Option<String>), DashboardError> {
        let found = self.gateway.list_tools_by_decision(waiting, after, PAGE_ROWS + 1).await?;
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = found.len() > rows;
        let listed: Vec<Listed> =
            found.into_iter().take(rows).map(|(tool, server)| Listed { tool, server }).collect();
        let next = if more { listed.last().map(|listed| listed.tool.name.clone()) } else { None };
        Ok((listed, next))
    }

    pub(super) async fn tools_page(
        &self,
        session: &Session,
        query: &ToolsQuery,
    ) -> Result<ToolsPage, DashboardError> {
        let (waiting, next_waiting) = self.listed(true, &query.after_waiting).await?;
        let (decided, next) = self.listed(false, &query.after).await?;
        Ok(ToolsPage {
            frame: self.frame(Some(session), "tools", "Tools").await?,
            first: query.after.is_empty() && query.after_waiting.is_empty(),
            servers: self.gateway.list_servers().await?,
            waiting,
            next_waiting,
            decided,
            next,
            resources: self.gateway.list_resources().await?,
        })
    }

    /// Who is bound to a tool, by itself and with its server, and what the gateway says to their calls; and whether
    /// there are more.
    async fn bound(&self, tool: &Tool) -> Result<(Vec<Bound>, bool), DashboardError> {
        let (mut bindings, mut further) = (Vec::new(), false);
        for (resource_id, by_server) in [(&tool.tool_id, false), (&tool.upstream_id, true)] {
            let found = self.gateway.active_bindings(resource_id, BINDINGS + 1).await?;
            let rows = usize::try_from(BINDINGS).unwrap_or(usize::MAX);
            further |= found.len() > rows;
            bindings.extend(found.into_iter().take(rows).map(|binding| (binding, by_server)));
        }
        let agents: Vec<&str> = bindings.iter().map(|(binding, _)| binding.agent_id.as_str()).collect();
        let access = self.gateway.access_of(&agents, &tool.name).await.map_err(DashboardError::Told)?;
        let bound = bindings.into_iter().zip(access);
        let bound = bound.map(|((binding, by_server), access)| Bound { binding, by_server, access });
        Ok((bound.collect(), further))
    }

    pub(super) async fn tool_page(
        &self,
        session: &Session,
        tool_id: &str,
        tried: Option<(String, Trial)>,
    ) -> Result<ToolPage, DashboardError> {
        let tool = self.gateway.server_tool(tool_id).await?;
        let server = self.gateway.server(&tool.upstream_id).await?;
        let found: Value = serde_json::from_str(&tool.found).unwrap_or_default();
        let approved: Option<Value> =
            tool.definition.as_deref().and_then(|definition| serde_json::from_str(definition).ok());
        let (arguments, trial) = match tried {
            Some((arguments, trial)) => (arguments, Some(trial)),
            None => (outline(&found["inputSchema"]), None),
        };
        let text = |name: &str| found[name].as_str().unwrap_or_default().to_owned();
        let (bound, further_bound) = self.bound(&tool).await?;
        Ok(ToolPage {
            frame: self.frame(Some(session), "tools", tool.name.clone()).await?,
            class: class(&tool),
            title: text("title"),
            description: text("description"),
            schema: serde_json::to_string_pretty(&found["inputSchema"]).unwrap_or_default(),
            changed: approved
                .map(|approved| differences(&approved, &found).iter().map(Changed::of).collect())
                .unwrap_or_default(),
            bound,
            further_bound,
            arguments,
            trial,
            path: path(&tool),
            command: format!(
                "curl -sk https://localhost:9443/v1/admin/mcp-tools/{} -H \"X-Admin-Secret: $ADMIN_SECRET\" | jq",
                tool.tool_id
            ),
            tool,
            server,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_form_begins_with_the_members_that_a_schema_demands() {
        let schema = json!({
            "type": "object", "required": ["n", "text", "odd"],
            "properties": { "text": { "type": "string" }, "n": { "type": "integer" }, "more": { "type": "string" } },
        });
        let outlined: Value = serde_json::from_str(&outline(&schema)).unwrap_or_default();
        assert_eq!(outlined, json!({ "n": 0, "text": "", "odd": null }));
        assert_eq!(outline(&Value::Null), "{}");
    }
}
