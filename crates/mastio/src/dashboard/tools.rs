//! `/proxy/tools`: the MCP servers behind the gateway, what their tools say now beside what was approved, and who may
//! call them.
//!
//! Definitions come from servers that we do not trust: they are shown as text, and approved by the digest of exactly
//! what the page has shown.

use askama::Template;
use serde_json::Value;

use super::error::DashboardError;
use super::{Dashboard, Frame, urlencoded};
use crate::gateway::credential::Auth;
use crate::gateway::definition::{Difference, differences};
use crate::gateway::servers::{NewServer, Server, Tool};
use crate::gateway::trial::Trial;
use crate::gateway::{Binding, BindingFilter, Resource};
use crate::http::authn::Session;

/// Tools, and bindings, on a page.
const PAGE_ROWS: usize = 200;

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

/// `/proxy/tools`.
#[derive(Template)]
#[template(path = "tools.html")]
pub(super) struct ToolsPage {
    frame: Frame,
    servers: Vec<Server>,
    tools: Vec<Listed>,
    /// How many more tools there are than are shown.
    further: i64,
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
    bindings: Vec<Binding>,
    server_bindings: Vec<Binding>,
    /// What the form begins with: the arguments that were tried, or those that the schema demands.
    arguments: String,
    trial: Option<Trial>,
    path: String,
    command: String,
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
    pub(super) async fn tools_page(&self, session: &Session) -> Result<ToolsPage, DashboardError> {
        let mut tools: Vec<Listed> = self
            .gateway
            .list_tools_of_servers(None, None)
            .await?
            .into_iter()
            .map(|(tool, server)| Listed { tool, server })
            .collect();
        // What waits for a decision comes first, and what has changed before what is new.
        tools.sort_by_key(|listed| match listed.tool.standing() {
            "changed" => 0,
            "proposed" => 1,
            "approved" => 2,
            _ => 3,
        });
        let further = i64::try_from(tools.len().saturating_sub(PAGE_ROWS)).unwrap_or(i64::MAX);
        tools.truncate(PAGE_ROWS);
        Ok(ToolsPage {
            frame: self.frame(Some(session), "tools", "Tools").await?,
            servers: self.gateway.list_servers().await?,
            tools,
            further,
            resources: self.gateway.list_resources().await?,
        })
    }

    async fn active_bindings(&self, resource_id: &str) -> Result<Vec<Binding>, DashboardError> {
        let filter = BindingFilter {
            agent_id: None,
            resource_id: Some(resource_id.to_owned()),
            after: None,
            limit: i64::try_from(PAGE_ROWS).ok(),
        };
        let mut bindings = self.gateway.list_bindings(filter).await?;
        bindings.retain(|binding| binding.revoked_at.is_none());
        Ok(bindings)
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
        Ok(ToolPage {
            frame: self.frame(Some(session), "tools", tool.name.clone()).await?,
            class: class(&tool),
            title: text("title"),
            description: text("description"),
            schema: serde_json::to_string_pretty(&found["inputSchema"]).unwrap_or_default(),
            changed: approved
                .map(|approved| differences(&approved, &found).iter().map(Changed::of).collect())
                .unwrap_or_default(),
            bindings: self.active_bindings(&tool.tool_id).await?,
            server_bindings: self.active_bindings(&tool.upstream_id).await?,
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
