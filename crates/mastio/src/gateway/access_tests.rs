//! Who may call what, by bindings, capabilities and rules: through the routes, on a real SQLite file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use axum::http::{Method, StatusCode};
use serde_json::{Value, json};

use super::tests::World;
use crate::values;

fn call(tool: &str, arguments: &Value) -> String {
    json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": { "name": tool, "arguments": arguments } })
    .to_string()
}

impl World {
    /// The answer to a call: its result, or its error's message.
    pub(super) async fn call_tool(
        &self,
        agent_id: &str,
        tool: &str,
        arguments: Value,
    ) -> Result<Value, String> {
        let (status, text) = self.rpc(agent_id, &call(tool, &arguments)).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let mut answer: Value = serde_json::from_str(&text).unwrap();
        match answer["error"]["message"].as_str() {
            Some(message) => Err(message.to_owned()),
            None => Ok(answer["result"].take()),
        }
    }

    async fn save(&self, name: &str, rule: Value) -> (StatusCode, Value) {
        self.admin_at(Method::PUT, &format!("/v1/admin/mcp-policies/{name}"), rule).await
    }

    pub(super) async fn saved(&self, name: &str, rule: Value) -> i64 {
        let (status, body) = self.save(name, rule).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["version"].as_i64().unwrap()
    }

    async fn test(&self, body: Value) -> Value {
        let (status, body) = self.admin_at(Method::POST, "/v1/admin/mcp-policies/test", body).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    async fn access(&self, query: &str) -> Vec<(String, String, String)> {
        let path = format!("/v1/admin/mcp-access{query}");
        let (status, body) = self.admin_at(Method::GET, &path, Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let text = |row: &Value, field: &str| row[field].as_str().unwrap().to_owned();
        let rows = body.as_array().unwrap().iter();
        rows.map(|row| (text(row, "agent_id"), text(row, "tool"), text(row, "reason"))).collect()
    }
}

fn long() -> Value {
    // The approved schema of `echo` has `text`, a string of at most eight.
    json!({ "tool": "echo",
        "text": r#"forbid(principal, action, resource == Tool::"echo") when { context.arguments.text like "x*" };"# })
}

#[tokio::test]
async fn a_rule_denies_by_agent_tool_and_arguments_from_the_next_call_on() {
    let (world, fake) = World::ready(false).await;
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "xyz" })).await.is_ok());
    assert_eq!(world.last("mcp.tool_called").await["policies"], json!(["binding"]));

    assert_eq!(world.saved("no_x", long()).await, 1);
    let denied = world.call_tool("acme::a", "echo", json!({ "text": "xyz" })).await.unwrap_err();
    assert_eq!(denied, "Forbidden: denied by policy no_x@1");
    let event = world.last("mcp.tool_called").await;
    assert_eq!(
        (&event["decision"], &event["reason"], &event["policies"]),
        (&json!("denied"), &json!("policy_denied"), &json!(["no_x@1"]))
    );
    assert_eq!(event["arguments_digest"].as_str().unwrap().len(), 64);
    assert_eq!(event["definition_digest"].as_str().unwrap().len(), 64);
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.is_ok());
    assert!(world.call_tool("acme::a", "told", json!({ "text": "xyz" })).await.is_ok());
    assert_eq!(fake.calls().len(), 3, "a denied call reached the server");

    // It is still listed: there are arguments with which it may be called. Where there are none, it is not.
    assert!(world.names("acme::a").await.contains(&"echo".to_owned()));
    let never = r#"forbid(principal == Agent::"acme::a", action, resource == Tool::"echo");"#;
    world.saved("never", json!({ "text": never })).await;
    assert!(!world.names("acme::a").await.contains(&"echo".to_owned()));
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.is_err());

    // Off and deleted rules decide nothing; every version stays.
    world.saved("never", json!({ "text": never, "mode": "off" })).await;
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.is_ok());
    let path = "/v1/admin/mcp-policies/no_x";
    let (status, _) = world.admin_at(Method::DELETE, path, Value::Null).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "xyz" })).await.is_ok());
    let (_, versions) = world.admin_at(Method::GET, path, Value::Null).await;
    let modes: Vec<&str> =
        versions.as_array().unwrap().iter().map(|version| version["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["deleted", "enforce"]);
    let (status, _) = world.admin_at(Method::DELETE, path, Value::Null).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(world.last("mcp.policy_deleted").await["version"], 2);
}

#[tokio::test]
async fn the_rules_speak_of_resources_too() {
    let world = World::new().await;
    world.weather("json").await;
    let denied = r#"forbid(principal, action, resource == Tool::"weather") when { context.arguments has city && context.arguments.city == "Rome" };"#;
    // Its schema says nothing of a city's type, so a rule cannot speak of it: it would never match.
    let (status, body) = world.save("no_rome", json!({ "text": denied, "tool": "weather" })).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    let nobody = r#"forbid(principal, action, resource == Tool::"weather");"#;
    world.saved("nobody", json!({ "text": nobody })).await;
    let denied = world.call_tool("acme::a", "weather", json!({ "city": "Rome" })).await.unwrap_err();
    assert_eq!(denied, "Forbidden: denied by policy nobody@1");
    assert_eq!((world.seen("json"), world.names("acme::a").await.len()), (0, 0));
}

#[tokio::test]
async fn a_rule_that_does_not_fit_its_tool_is_not_saved() {
    let (world, _fake) = World::ready(false).await;
    let forbid = |condition: &str| format!("forbid(principal, action, resource) when {{ {condition} }};");
    for (name, rule, said) in [
        ("r", json!({ "text": "forbid(principal, action" }), "is not one Cedar policy"),
        ("r", json!({ "text": format!("{0} {0}", forbid("true")) }), "is not one Cedar policy"),
        (
            "r",
            json!({ "text": "forbid(principal == ?principal, action, resource);" }),
            "is not one Cedar policy",
        ),
        ("r", json!({ "text": forbid("context.arguments.text == 1"), "tool": "echo" }), "text"),
        ("r", json!({ "text": forbid("context.arguments.txet == \"x\""), "tool": "echo" }), "txet"),
        ("r", json!({ "text": forbid("context.arguments.text == \"x\"") }), "arguments"),
        ("r", json!({ "text": forbid("context.arguments has txet"), "tool": "echo" }), "impossible"),
        ("r", json!({ "text": forbid("true"), "tool": "nothing" }), "must be the name of a resource"),
        ("r", json!({ "text": format!("// {}\n{}", "x".repeat(16 * 1024), forbid("true")) }), "16384"),
        ("binding", json!({ "text": forbid("true") }), "binding"),
        ("a@b", json!({ "text": forbid("true") }), "must match"),
        ("r", json!({ "text": forbid("true"), "mode": "deleted" }), "must be one of"),
    ] {
        let (status, body) = world.save(name, rule.clone()).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{rule} {body}");
        assert!(body["detail"].to_string().contains(said), "{rule} {body}");
    }
    let (_, rules) = world.admin_at(Method::GET, "/v1/admin/mcp-policies", Value::Null).await;
    assert_eq!(rules, json!([]));
}

#[tokio::test]
async fn a_dry_run_says_what_would_become_of_a_call_and_makes_none() {
    let (world, fake) = World::ready(false).await;
    world.saved("no_x", long()).await;
    let asked =
        |agent: &str, arguments: Value| json!({ "agent_id": agent, "tool": "echo", "arguments": arguments });
    let denied = world.test(asked("a", json!({ "text": "xyz" }))).await;
    assert_eq!(
        (&denied["agent_id"], &denied["allowed"], &denied["reason"], &denied["policies"]),
        (&json!("acme::a"), &json!(false), &json!("policy_denied"), &json!(["no_x@1"]))
    );
    let allowed = world.test(asked("a", json!({ "text": "abc" }))).await;
    assert_eq!((&allowed["allowed"], &allowed["policies"]), (&json!(true), &json!(["binding"])));
    assert_eq!(world.test(asked("b", json!({ "text": "abc" }))).await["reason"], "no_binding");
    assert_eq!(world.test(asked("a", json!({ "text": 7 }))).await["reason"], "arguments_invalid");
    assert_eq!(
        world.test(asked("a", json!({ "text": "much too long" }))).await["reason"],
        "arguments_invalid"
    );
    let unknown = world.test(json!({ "agent_id": "a", "tool": "nothing" })).await;
    assert_eq!(unknown["reason"], "unknown_tool");

    // A draft in place of the saved one, and beside it; the saved one stands afterwards.
    let mut draft = asked("a", json!({ "text": "xyz" }));
    draft["draft"] = json!({ "text": "forbid(principal, action, resource) when { principal.principal_type == \"nobody\" };" });
    draft["draft_name"] = json!("no_x");
    assert_eq!(world.test(draft.clone()).await["allowed"], true);
    draft["draft_name"] = json!("another");
    assert_eq!(world.test(draft.clone()).await["policies"], json!(["no_x@1"]));
    draft["draft"]["text"] = json!("nonsense");
    let (status, _) = world.admin_at(Method::POST, "/v1/admin/mcp-policies/test", draft).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(world.test(asked("a", json!({ "text": "xyz" }))).await["allowed"], false);
    assert_eq!(fake.calls().len(), 0);
    assert!(world.events().await.iter().all(|(kind, ..)| kind != "mcp.tool_called"));
}

#[tokio::test]
async fn who_may_call_what_and_why() {
    let (world, _fake) = World::ready(false).await;
    let (_, tool) = world.admin_at(Method::GET, "/v1/admin/mcp-tools/told", Value::Null).await;
    world.bind("acme::b", tool["tool_id"].as_str().unwrap()).await;
    let (status, _) = world.admin_at(Method::POST, "/v1/admin/mcp-tools/slow/block", json!({})).await;
    assert_eq!(status, StatusCode::OK);
    world.saved("no_x", long()).await;
    world.saved("not_ask", json!({ "text": r#"forbid(principal, action, resource == Tool::"ask");"# })).await;
    let row = |agent: &str, tool: &str, reason: &str| (agent.to_owned(), tool.to_owned(), reason.to_owned());
    assert_eq!(
        world.access("").await,
        [
            row("acme::a", "ask", "policy_denied"),
            row("acme::a", "echo", "allowed"),
            row("acme::a", "slow", "tool_blocked"),
            row("acme::a", "told", "allowed"),
            row("acme::b", "ask", "no_binding"),
            row("acme::b", "echo", "no_binding"),
            row("acme::b", "slow", "no_binding"),
            row("acme::b", "told", "allowed"),
        ]
    );
    assert_eq!(world.access("?agent_id=b&tool=told").await, [row("acme::b", "told", "allowed")]);
    let on_arguments = world.test(json!({ "agent_id": "a", "tool": "echo" })).await;
    assert_eq!(on_arguments["depends_on_arguments"], json!(["no_x@1"]));
}

#[tokio::test]
async fn a_rule_in_shadow_is_told_in_the_audit_log_and_the_metrics_and_denies_nothing() {
    let (world, fake) = World::ready(false).await;
    let mut rule = long();
    rule["mode"] = json!("shadow");
    world.saved("no_x", rule).await;
    for text in ["xyz", "abc"] {
        assert!(world.call_tool("acme::a", "echo", json!({ "text": text })).await.is_ok());
    }
    assert_eq!(fake.calls().len(), 2);
    let told: Vec<Value> = world
        .events()
        .await
        .into_iter()
        .filter(|(kind, _, details)| kind == "mcp.tool_called" && details.get("outcome").is_none())
        .map(|(.., details)| details["shadow_denied_by"].clone())
        .collect();
    assert_eq!(told, [json!(["no_x@1"]), Value::Null]);
    let page = world.gateway.metrics.render(&crate::metrics::Snapshot::default());
    assert!(page.contains("cullis_mcp_shadow_denials_total{policy=\"no_x\"} 1"), "{page}");
}

#[tokio::test]
async fn a_stored_rule_that_is_none_any_more_denies_and_versions_cannot_be_changed() {
    let (world, _fake) = World::ready(false).await;
    world.saved("no_x", long()).await;
    // What an older release took and this one cannot read.
    let mut tx = world.gateway.store.write().await.unwrap();
    tx.execute(
        "INSERT INTO mcp_policy_versions (change, name, version, tool, mode, text, saved_at, saved_by) \
         VALUES (2, 'broken', 1, 'echo', 'enforce', 'forbid(', 'now', 'sql')",
        values![],
    )
    .await
    .unwrap();
    tx.bump_epoch().await.unwrap();
    tx.commit_unaudited().await.unwrap();
    let denied = world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.unwrap_err();
    assert_eq!(denied, "Forbidden: policy broken@1 cannot be evaluated for this call");
    assert_eq!(world.last("mcp.tool_called").await["reason"], "policy_failed");
    assert!(!world.names("acme::a").await.contains(&"echo".to_owned()));
    assert!(world.call_tool("acme::a", "told", json!({ "text": "abc" })).await.is_ok());

    for sql in ["UPDATE mcp_policy_versions SET mode = 'off'", "DELETE FROM mcp_policy_versions"] {
        let mut tx = world.gateway.store.write().await.unwrap();
        let refused = tx.execute(sql, values![]).await.unwrap_err();
        assert!(crate::http::error::chain(&refused).contains("append-only"), "{refused:?}");
    }
}

#[tokio::test]
async fn arguments_that_name_a_member_twice_are_refused_before_the_server_sees_them() {
    let (world, fake) = World::ready(false).await;
    world.saved("no_x", long()).await;
    let twice = call("echo", &json!({})).replace("{}", r#"{"text":"abc","text":"xyz"}"#);
    let (_, text) = world.rpc("acme::a", &twice).await;
    assert!(text.contains("named twice"), "{text}");
    assert_eq!(fake.calls().len(), 0);
}
