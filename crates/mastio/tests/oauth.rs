//! OAuth clients written by others: they discover, get, use, introspect and revoke tokens. On both databases, and with
//! and without DPoP nonces.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::sdk::{TOOL, Upstream};
use harness::{Database, Deploy, required_environment, run};
use serde_json::{Value, json};

/// An agent's files, as its owner has them.
struct Files {
    agent_id: String,
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

fn enroll(deploy: &Deploy, name: &str) -> Files {
    let created =
        deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": name, "capabilities": [] })).expect(201);
    let folder = deploy.folder().join(name);
    fs::create_dir(&folder).unwrap();
    let write = |file: &str, text: &str| {
        fs::write(folder.join(file), text).unwrap();
        folder.join(file)
    };
    Files {
        agent_id: created["agent_id"].as_str().unwrap().to_owned(),
        cert: write("agent.crt", created["cert_pem"].as_str().unwrap()),
        key: write("agent.key", created["private_key_pem"].as_str().unwrap()),
        ca: write("ca.crt", &deploy.get("/pki/ca.crt").body),
    }
}

/// A deploy with an agent that may call a tool, and a resource server; and what the clients are told of them.
fn story(database: Database, settings: &[(&str, &str)]) -> (Deploy, Upstream, Value) {
    let mut deploy = Deploy::empty().on(database);
    deploy.start_with(settings);
    let upstream = Upstream::start();
    let agent = enroll(&deploy, "client");
    deploy.register_tool(TOOL, upstream.url(), &[&agent.agent_id]);
    let asker = json!({ "name": "asker", "resource": "cullis-local" });
    let asker = deploy.admin_post("/v1/admin/resource-servers", &asker).expect(201);
    let told = json!({
        "url": deploy.url(), "agent_id": agent.agent_id, "cert": agent.cert, "key": agent.key, "ca": agent.ca,
        "tool": TOOL, "resource_server_id": asker["resource_server_id"], "client_secret": asker["client_secret"],
    });
    (deploy, upstream, told)
}

fn judge(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges/oauth").join(file)
}

fn node(told: &Value) -> Value {
    required_environment("MASTIO_TEST_OAUTH");
    let mut command = Command::new("node");
    command.arg(judge("clients.mjs")).arg(told.to_string());
    let said = run(command.env("NODE_EXTRA_CA_CERTS", told["ca"].as_str().unwrap()));
    println!("{said}");
    serde_json::from_str(&said).unwrap()
}

fn events(deploy: &Deploy, event_type: &str) -> usize {
    deploy
        .admin_get(&format!("/v1/admin/audit?event_type={event_type}"))
        .expect(200)
        .as_array()
        .unwrap()
        .len()
}

fn clients_of_others(database: Database) {
    let (deploy, _upstream, told) = story(database, &[]);
    let seen = node(&told);
    let said = json!(r#"{"said":"hello"}"#);
    assert_eq!(seen["oauth4webapi"]["said"], said);
    assert_eq!(seen["oauth4webapi"]["active"], json!([true, false]));
    assert_eq!(seen["oauth4webapi"]["subject"], told["agent_id"]);
    assert_eq!(seen["oauth4webapi"]["bound"], json!(["jkt"]));
    assert_eq!(seen["oauth4webapi"]["challenge"]["error"], "invalid_token");
    let metadata = format!("{}/.well-known/oauth-protected-resource/v1/mcp", deploy.url());
    assert_eq!(seen["oauth4webapi"]["challenge"]["resource_metadata"], metadata.as_str());
    assert_eq!(seen["openid-client"], json!({ "said": said, "active": [true, false] }));
    assert_eq!(seen["certificate"], json!({ "said": said, "stolen": 401, "after": 401 }));
    assert_eq!(seen["dpop"], json!({ "said": said, "subject": told["agent_id"] }));
    assert_eq!(seen["nonces_seen"], 0);

    let mut command = Command::new(required_environment("MASTIO_TEST_JUDGES_PYTHON"));
    command.env("REQUESTS_CA_BUNDLE", told["ca"].as_str().unwrap());
    let said_by_authlib = run(command.arg(judge("authlib_story.py")).arg(told.to_string()));
    println!("{said_by_authlib}");
    let expected = json!({
        "said": said, "token_type": "Bearer", "stolen": 401, "active": [true, false], "bound": ["x5t#S256"],
        "after": 401,
    });
    assert_eq!(serde_json::from_str::<Value>(&said_by_authlib).unwrap(), expected);

    assert_eq!(events(&deploy, "auth.token_revoked"), 4);
    assert_eq!(events(&deploy, "auth.token_issued"), 5);
}

#[test]
fn clients_of_others_discover_get_use_introspect_and_revoke_tokens_on_sqlite() {
    clients_of_others(Database::Sqlite);
}

#[test]
fn clients_of_others_discover_get_use_introspect_and_revoke_tokens_on_postgresql() {
    clients_of_others(Database::Postgres);
}

#[test]
fn clients_of_others_come_again_with_a_nonce_where_one_is_required() {
    let (_deploy, _upstream, told) = story(Database::Sqlite, &[("MCP_PROXY_DPOP_NONCE", "true")]);
    let seen = node(&told);
    assert_eq!(seen["oauth4webapi"]["active"], json!([true, false]));
    assert_eq!(seen["openid-client"]["active"], json!([true, false]));
    assert_eq!(seen["dpop"]["subject"], told["agent_id"]);
    assert!(seen["nonces_seen"].as_u64().unwrap() >= 2, "{seen}");
}

#[test]
fn a_resource_server_s_credential_is_given_shown_once_used_and_withdrawn() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let add = |name: &str, resource: &str| {
        deploy.admin_post("/v1/admin/resource-servers", &json!({ "name": name, "resource": resource }))
    };
    let files = add("files", "https://files.example.com/api").expect(201);
    assert_eq!(add("files", "https://other.example.com").status, 409);
    for resource in ["http://files.example.com", "https://", "files", "https://files.example.com/#f", ""] {
        assert_eq!(add("wrong", resource).status, 422, "{resource}");
    }
    for name in ["", "a b", "a/b", &"n".repeat(65)] {
        assert_eq!(add(name, "https://files.example.com").status, 422, "{name}");
    }
    let listed = deploy.mastio_ok(&["resource-servers", "list", "--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["name"], "files");
    assert_eq!(listed[0].get("client_secret"), None);

    let id = files["resource_server_id"].as_str().unwrap();
    let secret = files["client_secret"].as_str().unwrap();
    let ask =
        |credential: &str| deploy.curl("/v1/auth/introspect", &["-u", credential, "-d", "token=nonsense"]);
    assert_eq!(ask(&format!("{id}:{secret}")).expect(200), json!({ "active": false }));
    for wrong in [format!("{id}:wrong"), format!("rs_0:{secret}"), ":".to_owned()] {
        assert_eq!(ask(&wrong).expect(401)["error"], "invalid_client", "{wrong}");
    }
    assert_eq!(deploy.curl("/v1/auth/introspect", &["-d", "token=x"]).expect(401)["error"], "invalid_client");

    // By the command line, with the server and without.
    deploy.mastio_ok(&["resource-servers", "remove", id]);
    assert_eq!(ask(&format!("{id}:{secret}")).status, 401);
    assert!(!deploy.mastio(&["resource-servers", "remove", id]).status.success());
    deploy.stop();
    let added =
        deploy.mastio_ok(&["resource-servers", "add", "again", "--resource", "cullis-local", "--json"]);
    let added: Value = serde_json::from_str(&added).unwrap();
    assert_eq!(added["client_secret"].as_str().unwrap().len(), 43);
    deploy.start();
    for (event, count) in [("auth.resource_server_created", 2), ("auth.resource_server_deleted", 1)] {
        assert_eq!(events(&deploy, event), count, "{event}");
    }
}

#[test]
fn metadata_names_the_url_by_which_a_client_reaches_us_and_no_other() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let (server, resource) =
        ("/.well-known/oauth-authorization-server", "/.well-known/oauth-protected-resource");
    assert_eq!(deploy.get(server).expect(200)["issuer"], deploy.url().as_str());
    assert_eq!(deploy.get(resource).expect(200)["resource"], deploy.url().as_str());
    let gateway = deploy.get(&format!("{resource}/v1/mcp")).expect(200);
    assert_eq!(gateway["resource"], format!("{}/v1/mcp", deploy.url()).as_str());
    assert_eq!(deploy.curl(server, &["-H", "Host: evil.example.com"]).status, 400);

    let mut named = Deploy::empty().set("MCP_PROXY_PROXY_PUBLIC_URL", "https://mastio.example.com/");
    named.start();
    let told = named.curl(server, &["-H", "Host: evil.example.com"]).expect(200);
    assert_eq!(told["issuer"], "https://mastio.example.com");
    for (name, value) in told.as_object().unwrap() {
        if let Some(url) = value.as_str() {
            assert!(url.starts_with("https://mastio.example.com"), "{name}");
        }
    }
}
