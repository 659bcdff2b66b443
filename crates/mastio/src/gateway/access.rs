//! Who may call what, and why: everything that decides about a call, whether it is made or only asked about.
//!
//! A call is granted by a binding to a tool that is as approved, by capabilities, and by arguments that fit the approved
//! schema; then the rules of [`super::policy`] are asked. Nothing here uses up a limit or reaches for a server.

use std::sync::Arc;

use mastio_core::time::UnixTime;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};

use super::jsonrpc;
use super::policy::{NewRule, Rules, Subject, Verdict};
use super::servers::{Server, Tool};
use super::{Caller, Gateway, GatewayError, Holder, arguments, canonical, definition, store};
use crate::http::error::ApiError;

/// Rows of an answer to who may call what.
const ACCESS_ROWS_MAX: i64 = 5000;

/// The schema of a tool's arguments, compiled, and as it is written.
pub struct Schema {
    validator: jsonschema::Validator,
    pub(super) value: Value,
}

/// What would become of a call, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Access {
    /// `org::name`.
    pub agent_id: String,
    /// The tool's name.
    pub tool: String,
    /// Whether it would be made; without arguments, whether there can be any with which it would.
    pub allowed: bool,
    /// `allowed`, or what the audit log would say: `no_binding`, `policy_denied` and so on.
    pub reason: String,
    /// What the caller would be told; absent for what is allowed.
    pub message: Option<String>,
    /// The rules that decided, `name@version`; `binding` where none had to, none where it did not come to that.
    pub policies: Vec<String>,
    /// Rules in shadow that would have denied it.
    pub shadow_denied_by: Vec<String>,
    /// Rules whose word depends on arguments, where none were given.
    pub depends_on_arguments: Vec<String>,
}

impl Gateway {
    /// Decides about a call of a server's tool. What is not granted is denied. Without arguments the question is whether
    /// there can be any that would do.
    ///
    /// Errors: why it is denied, each with its reason; what the rules say is for [`Gateway::settle`].
    pub(super) async fn judge_tool(
        &self,
        caller: &Caller,
        name: &str,
        arguments: Option<&RawValue>,
        (tool, server, bound): (&Tool, &Server, bool),
        rules: &Rules,
    ) -> Result<(Verdict, Arc<Schema>, Option<Value>), GatewayError> {
        if !bound {
            // What was never approved does not exist for anybody.
            return Err(match tool.standing() {
                "proposed" => GatewayError::UnknownTool(name.to_owned()),
                _ => GatewayError::NoBinding(name.to_owned()),
            });
        }
        if !tool.is_offered() {
            return Err(GatewayError::NotOffered { name: tool.name.clone(), standing: tool.standing() });
        }
        has_capability(caller, server.required_capability.as_deref())?;
        has_capability(caller, tool.required_capability.as_deref())?;
        let arguments = arguments.map(arguments::read).transpose()?;
        let schema = self.schema(tool).await?;
        if let Some(error) = arguments.as_ref().and_then(|given| schema.validator.iter_errors(given).next()) {
            let place = error.instance_path().to_string();
            let text =
                format!("{}{error}", if place.is_empty() { String::new() } else { format!("{place}: ") });
            return Err(GatewayError::Arguments(jsonrpc::shorten(&text, 512).to_owned()));
        }
        let of = (name, server.name.as_str(), &schema.value);
        let verdict = self.ask_rules(caller, of, arguments.as_ref(), rules).await?;
        Ok((verdict, schema, arguments))
    }

    /// The same for the tool of a resource.
    pub(super) async fn judge_resource(
        &self,
        caller: &Caller,
        name: &str,
        arguments: Option<&RawValue>,
        found: Option<store::Tool>,
        rules: &Rules,
    ) -> Result<(Verdict, store::Tool), GatewayError> {
        let tool = found.ok_or_else(|| GatewayError::UnknownTool(name.to_owned()))?;
        if !tool.bound {
            return Err(GatewayError::NoBinding(name.to_owned()));
        }
        has_capability(caller, tool.required_capability.as_deref())?;
        let arguments = arguments.map(arguments::read).transpose()?;
        // Nobody has approved this schema, so arguments need not fit it; it says what their types mean to a rule.
        let schema: Value =
            tool.input_schema.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let verdict = self.ask_rules(caller, (name, "", &schema), arguments.as_ref(), rules).await?;
        Ok((verdict, tool))
    }

    /// Whether the rules leave the caller any call of the tool. What they do not is not listed either.
    pub(super) async fn may_ever(
        &self,
        caller: &Caller,
        tool: &str,
        upstream: &str,
        rules: &Rules,
    ) -> Result<bool, GatewayError> {
        Ok(self.ask_rules(caller, (tool, upstream, &Value::Null), None, rules).await?.allowed)
    }

    async fn ask_rules(
        &self,
        caller: &Caller,
        (tool, upstream, input_schema): (&str, &str, &Value),
        arguments: Option<&Value>,
        rules: &Rules,
    ) -> Result<Verdict, GatewayError> {
        let agent_id = canonical(&self.org_id, &caller.agent_id);
        let subject = Subject {
            agent_id: &agent_id,
            principal_type: &caller.principal_type,
            capabilities: &caller.capabilities,
            tool,
            upstream,
            input_schema,
            arguments,
        };
        rules.judge(&subject).await
    }

    /// Notes in a call's event which rules decided, tells what those in shadow would have denied, and gives the verdict.
    ///
    /// Errors: as [`Verdict::into_result`].
    pub(super) fn settle(
        &self,
        caller: &Caller,
        tool: &str,
        verdict: Verdict,
        details: &mut Value,
    ) -> Result<(), GatewayError> {
        if let Some(details) = details.as_object_mut() {
            details.insert("policies".to_owned(), json!(verdict.policies));
            if !verdict.shadow_denied_by.is_empty() {
                details.insert("shadow_denied_by".to_owned(), json!(verdict.shadow_denied_by));
                tracing::info!(
                    request_id = details.get("request_id").and_then(|id| id.as_str()),
                    agent_id = caller.agent_id,
                    tool,
                    policies = verdict.shadow_denied_by.join(","),
                    "mcp_policy_shadow_denied"
                );
                // Counted by name: every version would be a series of its own.
                for id in &verdict.shadow_denied_by {
                    self.metrics.mcp_shadow_denied(id.split('@').next().unwrap_or_default());
                }
            }
        }
        verdict.into_result()
    }

    /// What would become of a call, and why, without making it; limits of rate aside. `draft` is a rule that is not
    /// saved, with its name, in place of a saved one of that name. Without arguments the question is whether there can
    /// be any that would do.
    ///
    /// Errors: as [`Gateway::check_rule`].
    pub async fn explain(
        &self,
        agent_id: &str,
        tool: &str,
        arguments: Option<&Value>,
        draft: Option<(&str, &NewRule)>,
    ) -> Result<Access, ApiError> {
        let rules = self.rules_with(draft).await?;
        let caller = self.asked_about(agent_id).await?;
        self.explain_by(&rules, (agent_id, caller.as_ref()), tool, arguments).await
    }

    /// The caller that an active agent would be.
    async fn asked_about(&self, agent_id: &str) -> Result<Option<Caller>, ApiError> {
        let agent_id = canonical(&self.org_id, agent_id);
        let holder = self.authenticate.agent(&agent_id).await?;
        Ok(holder.map(|Holder { principal_type, capabilities }| Caller {
            agent_id,
            principal_type,
            capabilities,
            one_use: Vec::new(),
            access_token: None,
            // Nobody calls: there is no token with times of its own.
            issued_at: UnixTime(0),
            expires_at: UnixTime(0),
            epoch: 0,
        }))
    }

    async fn explain_by(
        &self,
        rules: &Rules,
        (agent_id, caller): (&str, Option<&Caller>),
        tool: &str,
        arguments: Option<&Value>,
    ) -> Result<Access, ApiError> {
        let agent_id = canonical(&self.org_id, agent_id);
        let mut access = Access { agent_id, tool: tool.to_owned(), ..Access::default() };
        let Some(caller) = caller else {
            access.reason = "unknown_or_inactive_agent".to_owned();
            access.message = Some("there is no active agent of this id".to_owned());
            return Ok(access);
        };
        match self.decide(caller, tool, arguments, rules, &mut access).await {
            Ok(()) => {
                access.allowed = true;
                access.reason = "allowed".to_owned();
            }
            Err(error) => match error.as_rpc() {
                Some(rpc) => {
                    access.reason = error.reason().to_owned();
                    access.message = Some(rpc.message);
                }
                None => return Err(error.into()),
            },
        }
        Ok(access)
    }

    async fn decide(
        &self,
        caller: &Caller,
        tool: &str,
        arguments: Option<&Value>,
        rules: &Rules,
        access: &mut Access,
    ) -> Result<(), GatewayError> {
        let arguments = arguments.map(to_raw_value).transpose()?;
        let holder = self.holder(caller);
        let mut tx = self.store.read().await?;
        let resource = store::tool(&mut tx, &self.org_id, &holder, tool).await?;
        let offered = match &resource {
            Some(_) => None,
            None => store::offered_tool(&mut tx, tool).await?,
        };
        let verdict = match offered {
            Some((found, server)) => {
                let bound = store::is_bound_to_either(&mut tx, &holder, &found).await?;
                drop(tx);
                let of = (&found, &server, bound);
                self.judge_tool(caller, tool, arguments.as_deref(), of, rules).await?.0
            }
            None => {
                drop(tx);
                self.judge_resource(caller, tool, arguments.as_deref(), resource, rules).await?.0
            }
        };
        access.policies.clone_from(&verdict.policies);
        access.shadow_denied_by.clone_from(&verdict.shadow_denied_by);
        access.depends_on_arguments.clone_from(&verdict.depends_on_arguments);
        verdict.into_result()
    }

    /// Who may call what, and why: of one agent every tool, of one tool every agent that is bound to anything, or all of
    /// both; at most 5000 rows, by agent and then by tool.
    ///
    /// Errors: [`GatewayError::Store`].
    pub async fn access(&self, agent: Option<&str>, tool: Option<&str>) -> Result<Vec<Access>, ApiError> {
        let rows_max = usize::try_from(ACCESS_ROWS_MAX).unwrap_or(0);
        Ok(self.access_page(agent, tool, None, rows_max).await?.0)
    }

    /// The same, a page at a time: at most `rows_max` rows after the agent and tool of `after`, and where the next page
    /// begins, if there is more.
    ///
    /// Errors: as [`Gateway::access`].
    pub async fn access_page(
        &self,
        agent: Option<&str>,
        tool: Option<&str>,
        after: Option<(&str, &str)>,
        rows_max: usize,
    ) -> Result<(Vec<Access>, Option<(String, String)>), ApiError> {
        let rules = self.rules(None).await?;
        let (from_agent, from_tool) = after.unwrap_or_default();
        let agents = match agent {
            Some(agent) => vec![agent.to_owned()],
            None => self.bound_agents(from_agent, rows_max).await?,
        };
        let (mut rows, mut last) = (Vec::new(), None);
        let mut tools = Vec::new();
        for (index, agent) in agents.iter().enumerate() {
            let begun = agent == from_agent;
            match tool {
                Some(_) if begun => continue,
                Some(tool) => tools = vec![tool.to_owned()],
                // The first agent's are those that are left of them, every other's are all.
                None if begun => tools = self.callable(from_tool).await?,
                None if index <= 1 => tools = self.callable("").await?,
                None => {}
            }
            let caller = self.asked_about(agent).await?;
            for tool in &tools {
                if rows.len() >= rows_max {
                    return Ok((rows, last));
                }
                rows.push(self.explain_by(&rules, (agent, caller.as_ref()), tool, None).await?);
                last = Some((agent.clone(), tool.clone()));
            }
        }
        Ok((rows, None))
    }

    /// What becomes of calls of one tool by each of `agents`, in their order.
    ///
    /// Errors: as [`Gateway::access`].
    pub async fn access_of(&self, agents: &[&str], tool: &str) -> Result<Vec<Access>, ApiError> {
        let rules = self.rules(None).await?;
        let mut rows = Vec::with_capacity(agents.len());
        for agent in agents {
            let caller = self.asked_about(agent).await?;
            rows.push(self.explain_by(&rules, (agent, caller.as_ref()), tool, None).await?);
        }
        Ok(rows)
    }

    /// The agents that are bound to anything, from `from` (inclusive) on: more than `rows_max` after it, if there are.
    async fn bound_agents(&self, from: &str, rows_max: usize) -> Result<Vec<String>, GatewayError> {
        let limit = i64::try_from(rows_max).unwrap_or(ACCESS_ROWS_MAX).saturating_add(2);
        Ok(store::bound_agents(&mut self.store.read().await?, &self.org_id, from, limit).await?)
    }

    /// The names that a call may have after `after`, in order.
    async fn callable(&self, after: &str) -> Result<Vec<String>, GatewayError> {
        Ok(store::every_callable(&mut self.store.read().await?, after, ACCESS_ROWS_MAX).await?)
    }

    async fn schema(&self, tool: &Tool) -> Result<Arc<Schema>, GatewayError> {
        let digest = tool.definition_digest.clone().unwrap_or_default();
        if let Some(schema) = self.schemas.get(&digest).await {
            return Ok(schema);
        }
        let definition: Value = serde_json::from_str(tool.definition.as_deref().unwrap_or("null"))?;
        let value = definition["inputSchema"].clone();
        let schema = Arc::new(Schema { validator: definition::validator(&value)?, value });
        self.schemas.insert(digest, Arc::clone(&schema)).await;
        Ok(schema)
    }
}

/// Errors: [`GatewayError::MissingCapability`].
pub(super) fn has_capability(caller: &Caller, required: Option<&str>) -> Result<(), GatewayError> {
    match required {
        Some(required) if !caller.capabilities.iter().any(|held| held == required) => {
            Err(GatewayError::MissingCapability(required.to_owned()))
        }
        _ => Ok(()),
    }
}
