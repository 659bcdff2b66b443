//! A small real MCP server: the tool that the demo's agent calls through the gateway.
//!
//! Stateless, JSON-RPC over one POST route, on a free port of the loopback interface. It offers one tool, `add`.

use std::net::SocketAddr;

use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The name of the tool, which is also the name it is registered under.
pub const TOOL: &str = "add";

/// A running upstream server. Stops when dropped.
pub struct Upstream {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Upstream {
    /// Starts listening.
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let router =
            Router::new().route("/mcp", post(async |Json(message): Json<Value>| Json(answer(&message))));
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::warn!(error = %error, "demo_upstream_ended");
            }
        });
        Ok(Self { address, task })
    }

    /// Where the gateway finds it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/mcp", self.address)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn answer(message: &Value) -> Value {
    let id = &message["id"];
    let result = |result: Value| json!({ "jsonrpc": "2.0", "id": id, "result": result });
    let error = |code: i32, text: &str| json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": text } });
    match message["method"].as_str() {
        Some("initialize") => result(json!({
            "protocolVersion": "2024-11-05",
            "capabilities": { "tools": {} },
            "serverInfo": { "name": "mastio-demo-upstream", "version": env!("CARGO_PKG_VERSION") },
        })),
        Some("tools/list") => result(json!({ "tools": [{
            "name": TOOL,
            "description": "Adds two numbers",
            "inputSchema": {
                "type": "object",
                "properties": { "a": { "type": "number" }, "b": { "type": "number" } },
                "required": ["a", "b"],
            },
        }] })),
        Some("tools/call") if message["params"]["name"] == TOOL => {
            let argument = |name: &str| message["params"]["arguments"][name].as_f64();
            match (argument("a"), argument("b")) {
                (Some(a), Some(b)) => {
                    let text = format!("{a} + {b} = {}", a + b);
                    result(json!({ "content": [{ "type": "text", "text": text }], "isError": false }))
                }
                _ => error(-32602, "a and b must be numbers"),
            }
        }
        Some("tools/call") => error(-32602, "no such tool"),
        _ => error(-32601, "no such method"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tool_adds_and_refuses_what_it_cannot_add() {
        let call = |arguments: Value| {
            answer(
                &json!({ "id": "7", "method": "tools/call", "params": { "name": "add", "arguments": arguments } }),
            )
        };
        let added = call(json!({ "a": 19, "b": 23 }));
        assert_eq!(added["result"]["content"][0]["text"], "19 + 23 = 42");
        assert_eq!(added["id"], "7");
        assert_eq!(call(json!({ "a": "x", "b": 1 }))["error"]["code"], -32602);
        assert_eq!(answer(&json!({ "id": 1, "method": "x" }))["error"]["code"], -32601);
    }
}
