//! Clients and servers that others wrote: what a client sees through the gateway is what it sees without.

use std::net::TcpStream;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::sdk::{Agent, Program, Python, TOOL, Upstream, judges};
use crate::harness::{Database, free_port, required_environment, run, wait_for};
use crate::world::{World, python};

/// What a client on the Python SDK sees at `url`.
fn by_python(url: &str, mode: &str, story: &Value) -> Value {
    let mut told = story.clone();
    told["url"] = json!(url);
    told["mode"] = json!(mode);
    let mut command = Command::new(python());
    command.arg(judges().join("mcp/client.py")).arg(told.to_string());
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// What a client on the TypeScript SDK sees at `url`.
fn by_typescript(url: &str, story: &Value) -> Value {
    required_environment("MASTIO_TEST_MCP");
    let mut told = story.clone();
    told["url"] = json!(url);
    let mut command = Command::new("node");
    command.arg(judges().join("mcp/client.mjs")).arg(told.to_string());
    serde_json::from_str(&run(&mut command)).unwrap()
}

fn served(arguments: &[&str], script: &str) -> (Program, String) {
    let mut program = Program::start(&python(), script, arguments);
    let url = program.read()["url"].as_str().unwrap().to_owned();
    (program, url)
}

/// Compares what was seen through us with what was seen without, member by member, so that a difference is named.
fn same(what: &str, through: &Value, direct: &Value) {
    for (name, seen) in direct.as_object().unwrap() {
        assert_eq!(&through[name], seen, "{what}: {name}");
    }
    assert_eq!(through.as_object().unwrap().len(), direct.as_object().unwrap().len(), "{what}");
}

/// One server of the official Python SDK in each of its manners, and each official client before it.
#[test]
fn the_official_sdks_see_through_the_gateway_what_they_see_without() {
    let world = World::new(Database::Sqlite);
    let story = json!({ "judge": true,
        "calls": [["test_simple_text", {}], ["test_multiple_content_types", {}], ["test_error_handling", {}]],
        "resources": ["test://static-text", "test://static-binary", "test://template/7/data", "test://none"],
        "prompts": [["test_simple_prompt", {}], ["test_prompt_with_arguments", { "arg1": "a", "arg2": "b" }]] });
    let quick =
        json!({ "calls": story["calls"], "resources": story["resources"], "prompts": story["prompts"] });
    // Deliberately left out there: a resource that there is not has the code of the server's own revision, as it came.
    let crossed =
        json!({ "calls": story["calls"], "resources": ["test://static-text"], "prompts": story["prompts"] });
    let cases: [(&str, &[&str], &str, &Value); 6] = [
        ("a stateless server of 2026-07-28", &[], "auto", &story),
        ("a server of 2025-11-25 with sessions and streams", &["--until", "2025-11-25"], "legacy", &story),
        ("the same, for TypeScript", &["--until", "2025-11-25"], "typescript", &story),
        ("one without sessions", &["--until", "2025-11-25", "--stateless"], "legacy", &quick),
        ("one that answers in plain JSON", &["--until", "2025-11-25", "--json"], "typescript", &quick),
        // Each side of us speaks its own revision.
        ("an old client before a new server", &[], "legacy", &crossed),
    ];
    let (_front, front) = world.front(&world.alice);
    for (index, (what, arguments, client, story)) in cases.into_iter().enumerate() {
        let (_server, url) = served(arguments, "mcp/upstream.py");
        let id = world.server(&format!("s{index}"), &url, &[&world.alice]);
        let see = |url: &str| match client {
            "typescript" => by_typescript(url, story),
            mode => by_python(url, mode, story),
        };
        let (direct, through) = (see(&url), see(&front));
        same(what, &through, &direct);
        // Gone, so that the next server's tools keep their names.
        assert_eq!(world.admin("DELETE", &format!("/v1/admin/mcp-upstreams/{id}"), &json!({})).status, 204);
    }
}

/// npm's everything-server, on the official TypeScript SDK, and FastMCP.
#[test]
fn everything_server_and_fastmcp_give_through_the_gateway_what_they_give_without() {
    let world = World::new(Database::Sqlite);
    let (_front, front) = world.front(&world.alice);

    let port = free_port();
    let mut everything = Command::new("setpriv");
    everything
        .args(["--pdeathsig", "KILL", "node"])
        .arg(format!(
            "{}/node_modules/@modelcontextprotocol/server-everything/dist/index.js",
            required_environment("MASTIO_TEST_MCP")
        ))
        .arg("streamableHttp")
        .env("PORT", port.to_string())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    let mut everything = everything.spawn().unwrap();
    wait_for("everything-server", || TcpStream::connect(("127.0.0.1", port)).ok());
    let url = format!("http://127.0.0.1:{port}/mcp");
    world.server("everything", &url, &[&world.alice]);
    let story = json!({
        "calls": [["echo", { "message": "grüße" }], ["get-sum", { "a": 1, "b": 2.5 }], ["get-tiny-image", {}],
            ["get-annotated-message", { "messageType": "error", "includeImage": true }],
            ["get-structured-content", { "location": "Chicago" }], ["get-resource-links", { "count": 2 }],
            ["trigger-elicitation-request", {}]],
        "resources": ["demo://resource/static/document/architecture.md"],
        "prompts": [["simple-prompt", {}], ["args-prompt", { "city": "Roma" }]],
        "long": ["trigger-long-running-operation", { "duration": 0.4, "steps": 4 }],
    });
    let (direct, through) = (by_typescript(&url, &story), by_typescript(&front, &story));
    assert_eq!(direct["progress"].as_array().unwrap().len(), 4);
    same("everything-server", &through, &direct);
    // Deliberately otherwise: arguments that do not fit the approved schema never reach the server, so it is our
    // sentence that the model reads, in the same form.
    let wrong = json!({ "calls": [["echo", {}]] });
    let (direct, through) = (by_typescript(&url, &wrong), by_typescript(&front, &wrong));
    for seen in [&direct, &through] {
        assert_eq!(seen["calls"][0]["isError"], true, "{seen}");
    }
    assert!(through["calls"][0]["content"][0]["text"].as_str().unwrap().contains("message"), "{through}");
    everything.kill().unwrap();
    everything.wait().unwrap();

    let id = world.deploy.admin_get("/v1/admin/mcp-upstreams/everything").expect(200)["upstream_id"].clone();
    world.admin("DELETE", &format!("/v1/admin/mcp-upstreams/{}", id.as_str().unwrap()), &json!({}));
    let (_server, url) = served(&[], "mcp/fastmcp_server.py");
    world.server("fastmcp", &url, &[&world.alice]);
    let story = json!({
        "calls": [["add", { "a": 1, "b": 2 }], ["order", { "id": 7 }], ["fail", {}], ["work", { "steps": 3 }]],
        "resources": ["orders://recent", "orders://5/note"],
        "prompts": [["remind", { "customer": "Ada" }]],
    });
    for mode in ["auto", "legacy"] {
        same("FastMCP", &by_python(&front, mode, &story), &by_python(&url, mode, &story));
    }
}

fn the_unmodified_sdk_lists_calls_and_asks_for_a_decision(database: Database) {
    let world = World::new(database);
    let upstream = Upstream::start();
    world.server("tools", upstream.url(), &[&world.alice]);
    world.deploy.register_tool("old", upstream.url(), &[&world.alice.id]);
    let (alice, url) = (&world.alice, world.deploy.url());
    let mut agent = Agent::open(Python::Plain, &url, &alice.id, &alice.folder, &alice.folder.join("ca.crt"));
    assert_eq!(agent.tools(), [TOOL, "old"]);
    agent.call().unwrap();
    // The predecessor's kind of tool is sent under its own name, which this server does not have.
    let raised = agent.ask(&json!({ "cmd": "call", "tool": "old", "arguments": {} })).unwrap_err();
    assert!(raised.text.contains("Unknown tool: old"), "{raised:?}");
    let decided =
        agent.ask(&json!({ "cmd": "policy", "tool_name": TOOL, "principal_id": alice.id })).unwrap();
    assert_eq!(decided["allowed"], true, "{decided}");
    let outcome = world.last("mcp.tool_called");
    assert_eq!((&outcome["tool"], &outcome["reason"]), (&json!("old"), &json!("upstream_error")));
}

#[test]
fn the_unmodified_sdk_lists_calls_and_asks_for_a_decision_on_sqlite() {
    the_unmodified_sdk_lists_calls_and_asks_for_a_decision(Database::Sqlite);
}

#[test]
fn the_unmodified_sdk_lists_calls_and_asks_for_a_decision_on_postgresql() {
    the_unmodified_sdk_lists_calls_and_asks_for_a_decision(Database::Postgres);
}
