//! What an operator does with the gateway by the command line, and what an agent on the SDK then may: on both databases.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::path::PathBuf;

use harness::sdk::{Agent, Python, TOOL, Upstream};
use harness::{Database, Deploy, PASSPHRASE};
use serde_json::{Value, json};

/// Runs `mastio … --json`. Gives its exit code and what it printed, or said.
fn mastio(deploy: &Deploy, arguments: &[&str]) -> (i32, Value, String) {
    let output = deploy.mastio(&[arguments, &["--json", "--url", &deploy.url()]].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = serde_json::from_str(&text(&output.stdout)).unwrap_or_default();
    (output.status.code().unwrap(), printed, text(&output.stderr))
}

fn done(deploy: &Deploy, arguments: &[&str]) -> Value {
    let (code, printed, said) = mastio(deploy, arguments);
    assert_eq!(code, 0, "{arguments:?}: {said}");
    printed
}

/// A file in the deploy's folder.
fn file(deploy: &Deploy, name: &str, text: &str) -> PathBuf {
    let path = deploy.folder().join(name);
    fs::write(&path, text).unwrap();
    path
}

/// An agent with its files, and a client of it on the SDK.
fn agent(deploy: &Deploy, name: &str) -> (String, PathBuf, PathBuf) {
    let created = done(deploy, &["agents", "add", name]);
    let folder = deploy.folder().join(name);
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("agent.crt"), created["cert_pem"].as_str().unwrap()).unwrap();
    fs::write(folder.join("agent.key"), created["private_key_pem"].as_str().unwrap()).unwrap();
    let ca = file(deploy, "ca.crt", &deploy.get("/pki/ca.crt").body);
    (created["agent_id"].as_str().unwrap().to_owned(), folder, ca)
}

const LIMIT: &str = "forbid(principal, action, resource == Tool::\"echo\")\n\
                     when { context.arguments has text && context.arguments.text like \"call 3*\" };\n";

fn an_operator_s_way(database: Database) {
    let mut deploy = Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE);
    deploy.start();
    let upstream = Upstream::start();

    // From an upstream to a call.
    let (code, _, said) = mastio(&deploy, &["upstreams", "add", "no name", "--endpoint", "nowhere"]);
    assert_eq!((code, said.contains("name must match")), (1, true), "{said}");
    let added = done(&deploy, &["upstreams", "add", "echoes", "--endpoint", upstream.url()]);
    assert_eq!(added["found"]["new"], json!([TOOL]));
    assert_eq!(done(&deploy, &["upstreams", "list"])[0]["name"], "echoes");
    let shown = done(&deploy, &["upstreams", "show", "echoes"]);
    assert_eq!(shown["tools"][0]["standing"], "proposed");
    let (code, _, said) = mastio(&deploy, &["tools", "approve", TOOL]);
    assert_eq!((code, said.contains("add --digest")), (2, true), "{said}");
    assert_eq!(mastio(&deploy, &["tools", "approve", TOOL, "--digest", "00"]).0, 3);
    let digest = shown["tools"][0]["found_digest"].as_str().unwrap();
    assert_eq!(done(&deploy, &["tools", "approve", TOOL, "--digest", digest])["standing"], "approved");

    // A deploy that moves takes all of it along.
    deploy.stop();
    let mut deploy = deploy.on(database);
    deploy.start();
    let (agent_id, identity, ca) = agent(&deploy, "billing");
    let mut client = Agent::open(Python::Plain, &deploy.url(), &agent_id, &identity, &ca);
    let replica = (database == Database::Postgres).then(|| {
        let url = deploy.database_url().unwrap();
        let mut other =
            Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE).set("MCP_PROXY_DATABASE_URL", url);
        other.start();
        let client = Agent::open(Python::Plain, &other.url(), &agent_id, &identity, &ca);
        (other, client)
    });
    let (_other, mut elsewhere) = replica.unzip();

    assert!(client.tools().is_empty());
    let denied = client.call().unwrap_err();
    assert!(denied.text.contains("no active binding"), "{denied:?}");
    done(&deploy, &["tools", "bind", TOOL, "--agent", "billing"]);
    assert_eq!(mastio(&deploy, &["tools", "bind", TOOL, "--agent", "billing"]).0, 3);
    client.call().unwrap();
    assert_eq!(client.tools(), [TOOL]);
    if let Some(client) = &mut elsewhere {
        client.call().unwrap();
        client.call().unwrap();
    }

    // A policy in shadow, then in force: on every replica from the next call on.
    let cedar = file(&deploy, "limit.cedar", LIMIT);
    let cedar = cedar.to_str().unwrap();
    let set = ["policy", "set", "limit", "--tool", TOOL, "--mode", "shadow", "--file", cedar];
    assert_eq!(done(&deploy, &set)["version"], 1);
    let bad = file(&deploy, "bad.cedar", &LIMIT.replace("text like", "txet like"));
    let (code, _, said) =
        mastio(&deploy, &["policy", "set", "bad", "--tool", TOOL, "--file", bad.to_str().unwrap()]);
    assert_eq!((code, said.contains("txet")), (1, true), "{said}");
    let test = |arguments: &str| {
        let said = mastio(
            &deploy,
            &["policy", "test", "--agent", "billing", "--tool", TOOL, "--arguments", arguments],
        );
        (said.0, said.1["reason"].clone(), said.1["shadow_denied_by"].clone())
    };
    assert_eq!(test(r#"{"text":"call 3"}"#), (0, json!("allowed"), json!(["limit@1"])));
    assert_eq!(done(&deploy, &["policy", "enforce", "limit"])["version"], 2);
    assert_eq!(test(r#"{"text":"call 3"}"#), (3, json!("policy_denied"), json!([])));
    assert_eq!(test(r#"{"text":"call 4"}"#), (0, json!("allowed"), json!([])));
    if let Some(client) = &mut elsewhere {
        let denied = client.call().unwrap_err();
        assert!(denied.text.contains("denied by policy limit@2"), "{denied:?}");
    }
    let denied = client.call().unwrap_err();
    assert!(denied.text.contains("denied by policy limit@2"), "{denied:?}");
    client.call().unwrap();
    assert_eq!(done(&deploy, &["policy", "list"])[0]["mode"], "enforce");
    assert_eq!(done(&deploy, &["policy", "show", "limit"]).as_array().unwrap().len(), 2);
    let access = done(&deploy, &["tools", "access", "--agent", "billing"]);
    assert_eq!(
        (&access[0]["reason"], &access[0]["depends_on_arguments"]),
        (&json!("allowed"), &json!(["limit@2"]))
    );
    done(&deploy, &["policy", "remove", "limit"]);
    assert_eq!(mastio(&deploy, &["policy", "enforce", "limit"]).0, 3);

    done(&deploy, &["tools", "limit", TOOL, "--required-capability", "pay"]);
    assert_eq!(done(&deploy, &["tools", "access", "--tool", TOOL])[0]["reason"], "missing_capability");
    done(&deploy, &["tools", "limit", TOOL]);
    done(&deploy, &["tools", "unbind", TOOL, "--agent", "billing"]);
    assert_eq!(mastio(&deploy, &["tools", "unbind", TOOL, "--agent", "billing"]).0, 3);
    assert!(client.call().is_err());
    assert_eq!(done(&deploy, &["tools", "block", TOOL])["standing"], "blocked");
    assert_eq!(done(&deploy, &["upstreams", "refresh", "echoes"])["tools"], 1);
    // Tables for people.
    for (arguments, part) in [
        (&["upstreams", "list"][..], "echoes"),
        (&["upstreams", "show", "echoes"], "blocked"),
        (&["tools", "list"], "blocked"),
        (&["tools", "show", TOOL], "Returns its arguments."),
        (&["policy", "show", "limit"], "forbid"),
        (&["policy", "list"], "no policies"),
    ] {
        let text = deploy.mastio_ok(&[arguments, &["--url", &deploy.url()]].concat());
        assert!(text.contains(part), "{arguments:?}: {text}");
    }
    done(&deploy, &["upstreams", "remove", "echoes", "--yes"]);
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn an_operator_s_way_from_an_upstream_to_a_policy_on_sqlite() {
    an_operator_s_way(Database::Sqlite);
}

#[test]
fn an_operator_s_way_from_an_upstream_to_a_policy_on_two_replicas() {
    an_operator_s_way(Database::Postgres);
}
