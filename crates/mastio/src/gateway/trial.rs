//! Trying a tool out: an operator calls an approved tool once, to see what it answers.
//!
//! It goes the way of an agent's call, but for what is about agents: bindings and rules say nothing of operators, whose
//! role the route has asked for. The server sees our credential and no agent. Intention and outcome are an event each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use mastio_core::audit::event::EventType;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use super::definition::{self, sha256_hex};
use super::jsonrpc::{self, DEPTH_MAX};
use super::peer::{Ask, Listener, SessionKey};
use super::protocol::Revision;
use super::trace::Trace;
use super::{Gateway, GatewayError, event};

/// Nobody waits longer for a page.
const TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// Bytes of an answer that are shown.
const SHOWN_BYTES_MAX: usize = 64 * 1024;

/// What a tool answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// Whether the server was not reached, or called it an error.
    pub failed: bool,
    /// The answer as indented JSON, or why there is none.
    pub answer: String,
    /// How long it took.
    pub milliseconds: u64,
}

impl Gateway {
    /// Calls an approved tool with `arguments`, a JSON object, as the operator `actor`.
    ///
    /// Errors: [`GatewayError::NotOffered`] for a tool that is not as approved; [`GatewayError::Arguments`] where they do
    /// not fit the approved schema. A server that fails is an answer.
    pub async fn try_tool(&self, actor: &str, id: &str, arguments: &str) -> Result<Trial, GatewayError> {
        let tool = self.server_tool(id).await?;
        let server = Arc::new(self.server(&tool.upstream_id).await?);
        if !tool.is_offered() {
            return Err(GatewayError::NotOffered { name: tool.name.clone(), standing: tool.standing() });
        }
        let wrong = |text: &str| GatewayError::Arguments(jsonrpc::shorten(text, 512).to_owned());
        if jsonrpc::is_deeper_than(arguments.as_bytes(), DEPTH_MAX) {
            return Err(wrong("they are nested too deeply"));
        }
        let given: Box<RawValue> =
            serde_json::from_str(arguments).map_err(|error| wrong(&error.to_string()))?;
        let value: Value = serde_json::from_str(given.get())?;
        let definition: Value = serde_json::from_str(tool.definition.as_deref().unwrap_or("null"))?;
        let validator = definition::validator(&definition["inputSchema"])?;
        if let Some(error) = validator.iter_errors(&value).next() {
            return Err(wrong(&format!("{}: {error}", error.instance_path())));
        }
        let link = self.link(&server)?;
        self.peers.admit(&server.upstream_id)?;
        let calls_max = usize::try_from(server.calls_max).unwrap_or(1);
        let slot = self.upstream.slot_of(&format!("{}:{calls_max}", server.upstream_id), calls_max)?;
        let mut details = json!({
            "tool": tool.name,
            "resource_id": tool.tool_id,
            "upstream_id": tool.upstream_id,
            "definition_digest": tool.definition_digest,
            "arguments_digest": sha256_hex(given.get().as_bytes()),
        });
        self.record_trial(actor, details.clone()).await?;

        let params = json!({ "name": tool.upstream_name, "arguments": given });
        let timeout = Duration::from_millis(u64::try_from(server.timeout_ms).unwrap_or(0));
        let trace = Trace::of(&HeaderMap::new(), (None, None), &self.entropy);
        let listener = Listener::default();
        let ask = Ask {
            method: "tools/call",
            params: Some(to_raw_value(&params)?),
            name: Some(&tool.upstream_name),
            mirrored: Vec::new(),
            key: SessionKey {
                upstream: (server.upstream_id.clone(), server.updated_at.clone()),
                caller: ("operator".to_owned(), actor.to_owned()),
                session: None,
            },
            capabilities: Map::new(),
            trace: &trace,
            idle_timeout: timeout.min(TIMEOUT_MAX),
            revision: Revision::NEWEST_WITH_SESSIONS,
            listener: &listener,
        };
        let begun = Instant::now();
        let asked = self.peers.ask(&self.upstream, &link, &ask);
        // A server that keeps talking is cut too.
        let answered = tokio::time::timeout(TIMEOUT_MAX, asked).await;
        drop(slot);
        let indented = |raw: &RawValue| {
            let value: Value = serde_json::from_str(raw.get()).unwrap_or_default();
            let text = serde_json::to_string_pretty(&value).unwrap_or_default();
            (value["isError"] == true, jsonrpc::shorten(&text, SHOWN_BYTES_MAX).to_owned())
        };
        let (failed, answer) = match answered {
            Ok(Ok(Ok(result))) => indented(&result),
            Ok(Ok(Err(error))) => (true, indented(&error).1),
            Ok(Err(error)) => (true, error.to_string()),
            Err(_) => (true, format!("no answer within {} s", TIMEOUT_MAX.as_secs())),
        };
        let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        details["outcome"] = json!(if failed { "error" } else { "ok" });
        details["latency_ms"] = json!(milliseconds);
        self.record_trial(actor, details).await?;
        Ok(Trial { failed, answer, milliseconds })
    }

    async fn record_trial(&self, actor: &str, details: Value) -> Result<(), GatewayError> {
        let tx = self.store.write().await?;
        tx.commit(&[event(EventType::McpToolTried, actor, details)]).await?;
        Ok(())
    }
}
