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
    let output = deploy.mastio(&[arguments, &["--json"]].concat());
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
        let text = deploy.mastio_ok(arguments);
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

/// What `gateway export` wrote, with the credential that a file only refers to.
fn with_secret(yaml: &str) -> String {
    // HOME is in every environment, which is all that a secret needs to be here.
    yaml.replace("auth_type: bearer", "auth_type: bearer\n  auth: { type: bearer, secret_env: HOME }")
}

fn one_file_carries_the_gateway(database: Database) {
    let upstream = Upstream::start();
    let mut first = Deploy::empty();
    first.start();
    done(&first, &["upstreams", "add", "echoes", "--endpoint", upstream.url(), "--bearer-env", "HOME"]);
    let digest = done(&first, &["tools", "show", TOOL])["found_digest"].as_str().unwrap().to_owned();
    done(&first, &["tools", "approve", TOOL, "--digest", &digest]);
    done(&first, &["tools", "limit", TOOL, "--per-minute", "600", "--retention-days", "1"]);
    done(&first, &["tools", "bind", "--upstream", "echoes", "--agent", "billing"]);
    let cedar = file(&first, "limit.cedar", LIMIT);
    done(&first, &["policy", "set", "limit", "--tool", TOOL, "--file", cedar.to_str().unwrap()]);
    let yaml = first.mastio_ok(&["gateway", "export"]);
    assert!(!yaml.contains(&std::env::var("HOME").unwrap()), "{yaml}");
    first.stop();
    // A stopped deploy answers in the command's own process.
    assert_eq!(first.mastio_ok(&["gateway", "export"]), yaml);
    assert_eq!(mastio(&first, &["tools", "bind", TOOL, "--agent", "other"]).0, 0);
    assert_eq!(mastio(&first, &["tools", "bind", TOOL, "--agent", "other"]).0, 3);

    let mut deploy = Deploy::empty().on(database);
    deploy.start();
    let import = |name: &str, text: &str, more: &[&str]| {
        let path = file(&deploy, name, text);
        mastio(&deploy, &[&["gateway", "import", path.to_str().unwrap()], more].concat())
    };
    let (code, _, said) = import("none.yaml", &yaml, &["--yes"]);
    assert_eq!((code, said.contains("give it as auth")), (1, true), "{said}");
    let yaml = with_secret(&yaml);
    let (code, _, said) = import("unset.yaml", &yaml.replace("HOME", "NOT_SET_ANYWHERE"), &["--yes"]);
    assert_eq!((code, said.contains("NOT_SET_ANYWHERE")), (2, true), "{said}");
    let (code, _, said) = import("ask.yaml", &yaml, &[]);
    assert_eq!((code, said.contains("add --yes")), (2, true), "{said}");
    // A bad file changes nothing, and says where it is bad.
    for (bad, place) in [
        (yaml.replace("timeout_ms: 60000", "timeout_ms: soon"), "document.upstreams[0].timeout_ms"),
        (yaml.replace("calls_per_minute:", "calls_a_minute:"), "calls_a_minute"),
        (yaml.replace("endpoint_url: http", "endpoint_url: [http"), "line "),
        (yaml.replace("agent: billing", "agent: bill ing"), "bill ing"),
        (yaml.replace("forbid(", "forbit("), "limit"),
        (
            yaml.replace("secret_env: HOME", "secret_env: MCP_PROXY_DB_ENCRYPTION_KEY"),
            "a setting of the Mastio",
        ),
    ] {
        assert_ne!(bad, yaml);
        let (code, _, said) = import("bad.yaml", &bad, &["--yes"]);
        assert!(code != 0 && said.contains(place), "{code}: {said}, not {place}");
    }
    let path = file(&deploy, "gateway.yaml", &yaml);
    let plan = done(&deploy, &["gateway", "plan", path.to_str().unwrap()]);
    assert_eq!(plan["waits"].as_array().unwrap().len(), 2, "{plan}");
    assert_eq!(import("moved.yaml", &yaml, &["--plan-digest", "00"]).0, 3);
    assert_eq!(done(&deploy, &["upstreams", "list"]), json!([]));
    assert_eq!(deploy.admin_get("/v1/admin/audit?event_type=mcp.config_imported").expect(200), json!([]));

    // The server is looked at by the first import, and the second one does what waited.
    for left in [2, 0] {
        let (code, done, said) = import("gateway.yaml", &yaml, &["--yes"]);
        assert_eq!((code, done["waits"].as_array().unwrap().len()), (0, left), "{said} {done}");
    }
    let events = || deploy.admin_get("/v1/admin/audit?limit=10000").expect(200).as_array().unwrap().len();
    let before = events();
    let (_, again, _) = import("gateway.yaml", &yaml, &["--yes", "--prune"]);
    assert_eq!((&again["changes"], &again["waits"]), (&json!([]), &json!([])));
    assert_eq!(events(), before);
    // A plan shows what would change, and changes nothing.
    let other = file(&deploy, "other.yaml", &yaml.replace("calls_per_minute: 600", "calls_per_minute: 30"));
    let plan = deploy.mastio_ok(&["gateway", "plan", other.to_str().unwrap()]);
    assert!(plan.contains("/calls_per_minute: 600 becomes 30"), "{plan}");
    assert_eq!(events(), before);
    let exported = deploy.mastio_ok(&["gateway", "export"]);
    assert_eq!(with_secret(&exported), yaml);

    let (agent_id, identity, ca) = agent(&deploy, "billing");
    let mut client = Agent::open(Python::Plain, &deploy.url(), &agent_id, &identity, &ca);
    client.call().unwrap();
    client.call().unwrap();
    assert!(client.call().unwrap_err().text.contains("denied by policy limit@1"));
    // What the file asked to be kept is kept, and shown to an operator, one call at a time.
    let kept = done(&deploy, &["tools", "evidence", "--tool", TOOL]);
    assert_eq!(kept.as_array().unwrap().len(), 2, "{kept}");
    let shown = done(&deploy, &["tools", "evidence", kept[1]["evidence_id"].as_str().unwrap()]);
    assert_eq!(shown["arguments"], json!({ "text": "call 1" }));
    let viewer = done(&deploy, &["admin", "add", "vera", "--role", "viewer"]);
    let credential = format!("vera:{}", viewer["secret"].as_str().unwrap());
    let path = format!("/v1/admin/mcp-evidence/{}", kept[1]["evidence_id"].as_str().unwrap());
    assert_eq!(deploy.curl(&path, &["-H", &format!("X-Admin-Secret: {credential}")]).status, 403);
    let read = deploy.admin_get("/v1/admin/audit?event_type=mcp.evidence_read").expect(200);
    assert_eq!(read.as_array().unwrap().len(), 1, "{read}");
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn one_file_carries_the_gateway_to_another_deploy_on_sqlite() {
    one_file_carries_the_gateway(Database::Sqlite);
}

#[test]
fn one_file_carries_the_gateway_to_another_deploy_on_postgres() {
    one_file_carries_the_gateway(Database::Postgres);
}

fn a_client_certificate_is_shown_to_its_server(database: Database) {
    let mut deploy = Deploy::empty().on(database);
    deploy.start();
    let make = "set -e; new='openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2'; \
        $new -keyout ca.key -out ca.pem -subj /CN=ca; \
        for name in server client; do $new -keyout $name.key -out $name.pem -subj /CN=$name -CA ca.pem -CAkey ca.key \
        -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=IP:127.0.0.1; done";
    deploy.bash(make, &[]);
    let path = |name: &str| deploy.folder().join(name).to_str().unwrap().to_owned();
    let upstream = Upstream::locked([&path("server.pem"), &path("server.key"), &path("ca.pem")]);
    let ca = path("ca.pem");
    let add = ["upstreams", "add", "locked", "--endpoint", upstream.url(), "--ca-file", &ca];
    let added = done(&deploy, &add);
    assert_eq!((&added["found"], added["discovery_error"].is_string()), (&Value::Null, true), "{added}");
    done(&deploy, &["upstreams", "remove", "locked", "--yes"]);
    let text = |name: &str| fs::read_to_string(path(name)).unwrap();
    let auth = json!({ "type": "mtls", "cert_pem": text("client.pem"), "key_pem": text("client.key") });
    let auth = file(&deploy, "auth.json", &auth.to_string());
    let added = done(&deploy, &[&add[..], &["--auth-file", auth.to_str().unwrap()]].concat());
    assert_eq!(added["found"]["new"], json!([TOOL]), "{added}");
}

#[test]
fn a_server_that_asks_for_a_client_certificate_gets_the_one_it_was_registered_with_on_sqlite() {
    a_client_certificate_is_shown_to_its_server(Database::Sqlite);
}

#[test]
fn a_server_that_asks_for_a_client_certificate_gets_the_one_it_was_registered_with_on_postgresql() {
    a_client_certificate_is_shown_to_its_server(Database::Postgres);
}
