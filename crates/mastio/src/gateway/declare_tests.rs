//! What an operator declares, evidence, and credentials for callers: through the routes, on a real SQLite file.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::Ordering;

use axum::http::{Method, StatusCode};
use mastio_core::time::UnixTime;
use serde_json::{Value, json};

use super::server_tests::Fake;
use super::tests::World;
use crate::store::Query as _;
use crate::values;

impl World {
    async fn import(&self, document: &Value, more: Value) -> (StatusCode, Value) {
        let mut body = json!({ "document": document });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.admin_at(Method::POST, "/v1/admin/mcp-config/import", body).await
    }

    async fn imported(&self, document: &Value, more: Value) -> Value {
        let (status, body) = self.import(document, more).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    async fn exported(&self) -> Value {
        let (status, body) = self.admin_at(Method::GET, "/v1/admin/mcp-config", Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    async fn planned(&self, document: &Value, prune: bool) -> Value {
        let body = json!({ "document": document, "prune": prune });
        let (status, body) = self.admin_at(Method::POST, "/v1/admin/mcp-config/plan", body).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }
}

/// `action kind name` of each change, and `kind name` of what waits.
fn told(plan: &Value) -> (Vec<String>, Vec<String>) {
    let text = |of: &Value, fields: &[&str]| {
        fields.iter().map(|field| of[*field].as_str().unwrap()).collect::<Vec<_>>().join(" ")
    };
    let changes = plan["changes"].as_array().unwrap().iter();
    let waits = plan["waits"].as_array().unwrap().iter();
    (
        changes.map(|change| text(change, &["action", "kind", "name"])).collect(),
        waits.map(|wait| text(wait, &["kind", "name"])).collect(),
    )
}

const NO_X: &str =
    r#"forbid(principal, action, resource == Tool::"echo") when { context.arguments.text like "x*" };"#;

#[tokio::test]
async fn a_document_is_taken_up_as_planned_once_and_names_what_waits() {
    let (world, fake) = (World::new().await, Fake::start(false).await);
    world.fake.capabilities.lock().unwrap().clear();
    let mut document = json!({
        "upstreams": [{ "name": "up", "endpoint_url": fake.url(), "auth": { "type": "bearer", "secret": "s3cr3t" } }],
        "tools": [{ "name": "echo", "approved_digest": "00", "calls_per_minute": 60, "retention_days": 7 }],
        "bindings": [{ "agent": "a", "tool": "echo" }, { "agent": "acme::b", "upstream": "up" }],
        "policies": [{ "name": "no_x", "tool": "echo", "text": NO_X },
                     { "name": "users", "mode": "shadow", "text": "permit(principal, action, resource) when { principal.principal_type == \"user\" };" }],
    });
    let plan = world.planned(&document, false).await;
    let created = ["create upstream up", "create policy users", "create binding acme::b to upstream up"];
    let waits = ["tool echo", "policy no_x", "binding acme::a to tool echo"];
    assert_eq!(told(&plan), (created.map(str::to_owned).to_vec(), waits.map(str::to_owned).to_vec()));
    assert!(!plan.to_string().contains("s3cr3t"), "{plan}");
    assert_eq!(
        world.exported().await,
        json!({ "upstreams": [], "tools": [], "bindings": [], "policies": [] })
    );

    // Held to another plan nothing changes.
    let (status, _) = world.import(&document, json!({ "plan_digest": "00" })).await;
    assert_eq!((status, world.events().await.len()), (StatusCode::CONFLICT, 0));
    let done = world.imported(&document, json!({ "plan_digest": plan["plan_digest"] })).await;
    assert_eq!(done["changes"], plan["changes"]);
    let events: Vec<String> = world.events().await.into_iter().map(|(kind, ..)| kind).collect();
    assert_eq!(
        events,
        [
            "mcp.upstream_created",
            "mcp.policy_saved",
            "mcp.binding_created",
            "mcp.config_imported",
            "mcp.tools_discovered"
        ]
    );

    // The server was looked at: what waited can be done, as soon as the digest is the one that was found.
    let (_, tool) = world.admin_at(Method::GET, "/v1/admin/mcp-tools/echo", Value::Null).await;
    assert_eq!(told(&world.planned(&document, false).await).1, ["tool echo", "policy no_x"]);
    document["tools"][0]["approved_digest"] = tool["found_digest"].clone();
    let done = world.imported(&document, json!({})).await;
    assert_eq!(
        told(&done),
        (
            [
                "change tool echo",
                "approve tool echo",
                "create policy no_x",
                "create binding acme::a to tool echo"
            ]
            .map(str::to_owned)
            .to_vec(),
            Vec::new()
        )
    );
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.is_ok());
    let (headers, _) = fake.calls().pop().unwrap();
    assert_eq!(headers["authorization"], "Bearer s3cr3t");
    assert!(world.call_tool("acme::a", "echo", json!({ "text": "xyz" })).await.is_err());

    // Again it changes nothing and writes nothing, and so does what was exported.
    let before = world.events().await.len();
    let exported = world.exported().await;
    assert!(!exported.to_string().contains("s3cr3t"), "{exported}");
    assert_eq!(exported["upstreams"][0]["auth_type"], "bearer");
    for again in [&document, &exported] {
        assert_eq!(told(&world.imported(again, json!({ "prune": true })).await), (vec![], vec![]));
    }
    assert_eq!(world.events().await.len(), before);
    document["upstreams"][0]["auth"]["secret"] = json!("another");
    let plan = world.planned(&document, false).await;
    assert_eq!(plan["changes"][0]["differences"][0]["path"], "/credential");
    assert!(!plan.to_string().contains("another\""), "{plan}");

    // What is not named is removed when it is pruned, of the kinds that are named.
    let kept = json!({ "policies": [{ "name": "no_x", "tool": "echo", "mode": "off", "text": NO_X }], "bindings": [] });
    assert_eq!(told(&world.planned(&kept, false).await).0, ["change policy no_x"]);
    let done = world.imported(&kept, json!({ "prune": true })).await;
    assert_eq!(
        told(&done).0,
        [
            "change policy no_x",
            "remove policy users",
            "remove binding acme::a to tool echo",
            "remove binding acme::b to upstream up"
        ]
    );
    assert!(world.names("acme::a").await.is_empty());
    assert_eq!(
        told(&world.imported(&json!({ "upstreams": [] }), json!({ "prune": true })).await).0,
        ["remove upstream up"]
    );
}

#[tokio::test]
async fn a_document_with_a_fault_changes_nothing_and_every_fault_is_told() {
    let (world, fake) = (World::new().await, Fake::start(false).await);
    let document = json!({
        "upstreams": [{ "name": "up", "endpoint_url": fake.url() }, { "name": "up", "endpoint_url": "nowhere" },
                      { "name": "in", "endpoint_url": fake.url(), "auth_type": "bearer" }],
        "bindings": [{ "agent": "a" }, { "agent": "a b", "upstream": "up" }],
        "policies": [{ "name": "p", "text": "forbid(" }],
    });
    let (status, body) = world.import(&document, json!({})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    let told = body["detail"].to_string();
    for part in [
        "named twice",
        "endpoint_url",
        "auth_type bearer",
        "one of tool, upstream, resource",
        "agent_id",
        "not one Cedar policy",
    ] {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert_eq!(world.events().await.len(), 0);
    for (document, loc) in [
        (json!({ "upstream": [] }), json!(["body", "document", "upstream"])),
        (
            json!({ "upstreams": [{ "name": "up", "endpoint_url": fake.url(), "timeout_ms": "soon" }] }),
            json!(["body", "document", "upstreams", 0, "timeout_ms"]),
        ),
    ] {
        let (status, body) = world.import(&document, json!({})).await;
        assert_eq!((status, &body["detail"][0]["loc"]), (StatusCode::UNPROCESSABLE_ENTITY, &loc), "{body}");
    }

    // A document does not take a credential to another host either.
    let auth = json!({ "type": "bearer", "secret": "s3cr3t" });
    world.server_with(json!({ "name": "up", "endpoint_url": fake.url(), "auth": auth })).await;
    let elsewhere = Fake::start(false).await;
    let moved = json!({ "upstreams": [{ "name": "up", "endpoint_url": elsewhere.url() }] });
    let (status, body) = world.import(&moved, json!({})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    assert!(body["detail"].to_string().contains("given again"), "{body}");
    assert!(elsewhere.headers("authorization").is_empty());
}

#[tokio::test]
async fn what_a_tool_keeps_is_sealed_read_with_an_event_and_deleted_in_time() {
    let (world, _fake) = World::ready(false).await;
    let kept = async || {
        let (status, list) = world.admin_at(Method::GET, "/v1/admin/mcp-evidence", Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{list}");
        list.as_array().unwrap().clone()
    };
    world.call_tool("acme::a", "echo", json!({ "text": "nothing" })).await.unwrap();
    assert!(world.last("mcp.tool_called").await.get("evidence_id").is_none());
    let (status, _) =
        world.admin_at(Method::PATCH, "/v1/admin/mcp-tools/echo", json!({ "retention_days": 30 })).await;
    assert_eq!(status, StatusCode::OK);
    for days in [0, 3651] {
        let body = json!({ "retention_days": days });
        let (status, _) = world.admin_at(Method::PATCH, "/v1/admin/mcp-tools/echo", body).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    }
    world.call_tool("acme::a", "echo", json!({ "text": "secret" })).await.unwrap();
    // What is denied is not kept.
    world.call_tool("acme::b", "echo", json!({ "text": "denied" })).await.unwrap_err();
    let list = kept().await;
    assert_eq!((list.len(), &list[0]["tool"], &list[0]["agent_id"]), (1, &json!("echo"), &json!("acme::a")));
    assert_eq!(list[0]["arguments_bytes"], 17);
    let events: Vec<Value> = world
        .events()
        .await
        .into_iter()
        .filter(|(.., details)| details["evidence_id"] == list[0]["evidence_id"])
        .map(|(.., details)| details)
        .collect();
    assert_eq!(events.len(), 2);
    let mut tx = world.gateway.store.read().await.unwrap();
    let rows = tx.rows("SELECT sealed FROM mcp_evidence ORDER BY part", &[]).await.unwrap();
    assert!(rows.iter().all(|row| !row.text(0).unwrap().contains("secret")));
    drop(tx);

    let path = format!("/v1/admin/mcp-evidence/{}", list[0]["evidence_id"].as_str().unwrap());
    let (status, shown) = world.admin_at(Method::GET, &path, Value::Null).await;
    assert_eq!((status, &shown["arguments"]), (StatusCode::OK, &json!({ "text": "secret" })));
    assert_eq!(shown["arguments_digest"], events[0]["arguments_digest"]);
    assert_eq!(shown["result_digest"], events[1]["result_digest"]);
    assert_eq!(shown["result"]["content"][0]["text"], "café");
    assert_eq!(world.last("mcp.evidence_read").await["evidence_id"], list[0]["evidence_id"]);

    // A part that was moved to another call does not open.
    let mut tx = world.gateway.store.write().await.unwrap();
    let sql = "UPDATE mcp_evidence SET sealed = (SELECT m.sealed FROM mcp_evidence m WHERE m.part = 'result') \
               WHERE part = 'arguments'";
    tx.execute(sql, values![]).await.unwrap();
    tx.commit_unaudited().await.unwrap();
    let (status, _) = world.admin_at(Method::GET, &path, Value::Null).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);

    let now = super::tests::NOW.seconds();
    let end = UnixTime(now.0 + 30 * 86_400);
    for (at, parts) in [(UnixTime(end.0 - 1), 0), (end, 2), (end, 0)] {
        assert_eq!(world.gateway.delete_expired_evidence(at).await.unwrap(), parts);
    }
    assert_eq!(world.last("mcp.evidence_deleted").await["parts"], 2);
    assert!(kept().await.is_empty());
    let (status, _) = world.admin_at(Method::GET, &path, Value::Null).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_server_is_told_who_calls_and_a_token_is_exchanged_for_each_caller() {
    let (world, fake) = (World::new().await, Fake::start(false).await);
    let token_url = format!("http://{}/token", fake.address());
    let upstream_id = world
        .server_with(json!({ "name": "up", "endpoint_url": fake.url(), "asserts_caller": true,
            "auth": { "type": "oauth_token_exchange", "token_url": token_url, "client_id": "mastio",
                "client_secret": "s3cr3t", "audience": "tools" } }))
        .await;
    world.approve_all().await;
    for agent in ["acme::a", "acme::b"] {
        world.bind(agent, &upstream_id).await;
        for _ in 0..2 {
            world.call_tool(agent, "echo", json!({ "text": "abc" })).await.unwrap();
        }
    }
    let forms: Vec<String> = fake.tokens();
    // One for our own look, then one for each caller, kept for its further calls.
    assert_eq!(forms.len(), 3, "{forms:?}");
    assert!(forms[0].starts_with("grant_type=client_credentials&audience=tools"), "{forms:?}");
    let exchanged = |form: &str, agent: &str| {
        let read: std::collections::HashMap<String, String> =
            form_urlencoded::parse(form.as_bytes()).into_owned().collect();
        assert_eq!(read["grant_type"], "urn:ietf:params:oauth:grant-type:token-exchange");
        assert_eq!(read["subject_token"], format!("{agent} at {token_url}"));
        assert_eq!(read["subject_token_type"], "urn:ietf:params:oauth:token-type:jwt");
        assert_eq!(read["requested_token_type"], "urn:ietf:params:oauth:token-type:access_token");
        assert_eq!(read["audience"], "tools");
    };
    exchanged(&forms[1], "acme::a");
    exchanged(&forms[2], "acme::b");
    let calls = fake.calls();
    let said: Vec<(&str, &str)> = calls
        .iter()
        .map(|(headers, _)| {
            (headers["authorization"].to_str().unwrap(), headers["mastio-caller"].to_str().unwrap())
        })
        .collect();
    let word = |agent: &str| format!("{agent} at {}", fake.url());
    assert_eq!(said[0].1, word("acme::a"));
    assert_eq!(said[2].1, word("acme::b"));
    assert!(said[0].0 == said[1].0 && said[2].0 == said[3].0 && said[0].0 != said[2].0, "{said:?}");

    // While nothing is signed nobody is vouched for.
    world.fake.halted.store(true, Ordering::SeqCst);
    let refused = world.call_tool("acme::a", "echo", json!({ "text": "abc" })).await.unwrap_err();
    assert!(refused.contains("signing is halted"), "{refused}");
    assert_eq!(world.last("mcp.tool_called").await["reason"], "signing_halted");
    assert_eq!(fake.calls().len(), 4);
}
