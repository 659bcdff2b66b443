//! Each way in by the unmodified SDK, and then every method of it that the wire contract asks for outside the gateway.
//!
//! Four enrollments (dashboard approval, managed, BYOCA, SPIFFE), two Pythons, of which one verifies TLS strictly, two
//! databases. `docs/wire.md` lists the methods.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::approval;
use crate::external::{SPIFFE_ID, by_sdk, foreign_ca, under_org_ca};
use crate::harness::sdk::{Agent, Python, TOOL, Upstream};
use crate::harness::{Database, Deploy};
use crate::world::{ClientKey, approve, ca_file, fresh, managed};

/// An agent that has come in.
struct Entered {
    how: &'static str,
    agent: Agent,
    agent_id: String,
    /// What it has on disk.
    files: PathBuf,
    /// Whether the server holds its key.
    held_here: bool,
}

fn enter(deploy: &Deploy, python: Python) -> Vec<Entered> {
    let id = |name: &str| {
        let shown = deploy.admin_get(&format!("/v1/admin/agents/{name}")).expect(200);
        shown["agent_id"].as_str().unwrap().to_owned()
    };
    let (mut approved, session) = approval::enroll(deploy, python, "approved");
    approve(deploy, &session, "approved").expect(200);
    approved.ask(&json!({ "cmd": "enroll-wait" })).unwrap();

    let (agent_id, chain, key_pem) = managed(deploy, "managed");
    let directory = deploy.folder().join("managed");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("agent.crt"), chain).unwrap();
    fs::write(directory.join("agent.key"), key_pem).unwrap();
    let opened = Agent::open(python, &deploy.url(), &agent_id, &directory, &ca_file(deploy));

    let key = ClientKey::new();
    let certificate = under_org_ca(deploy, "byoca", &key.private_pem());
    let body =
        json!({ "cmd": "enroll-byoca", "cert_pem": certificate, "private_key_pem": key.private_pem() });
    let byoca = by_sdk(deploy, python, "byoca", body);

    let (spire, key) = (foreign_ca(deploy, "spire"), ClientKey::new());
    let svid = spire.issue(&key, &format!("URI:{SPIFFE_ID}"), "clientAuth,serverAuth");
    let body = json!({
        "cmd": "enroll-spiffe", "svid_pem": svid, "svid_key_pem": key.private_pem(), "trust_bundle_pem": spire.pem(),
    });
    let spiffe = by_sdk(deploy, python, "spiffe", body);

    let entered = |how, agent, name: &str, files: &str, held_here| Entered {
        how,
        agent,
        agent_id: id(name),
        files: deploy.folder().join(files),
        held_here,
    };
    vec![
        entered("connector", approved, "approved", "approved", false),
        entered("managed", opened, "managed", "managed", true),
        entered("byoca", byoca, "byoca", "sdk-byoca", false),
        entered("spire", spiffe, "spiffe", "sdk-spiffe", false),
    ]
}

/// The first of these files that there is.
fn first(files: &Path, names: [&str; 2]) -> Vec<u8> {
    names.iter().find_map(|name| fs::read(files.join(name)).ok()).unwrap()
}

/// The agent's files where and as another constructor of the SDK looks for them.
fn laid_out(deploy: &Deploy, entered: &Entered) -> (PathBuf, PathBuf) {
    let (certificate, key) =
        (first(&entered.files, ["agent.crt", "cert.pem"]), first(&entered.files, ["agent.key", "key.pem"]));
    let proof_key = fs::read(entered.files.join("dpop.jwk")).ok();
    let connector = deploy.folder().join(format!("connector-{}", entered.how));
    let credentials = deploy.folder().join(format!("credentials-{}", entered.how));
    let identity = connector.join("identity");
    for (folder, names) in [(&identity, ["agent.crt", "agent.key"]), (&credentials, ["cert.pem", "key.pem"])]
    {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join(names[0]), &certificate).unwrap();
        fs::write(folder.join(names[1]), &key).unwrap();
        if let Some(proof_key) = &proof_key {
            fs::write(folder.join("dpop.jwk"), proof_key).unwrap();
        }
    }
    fs::copy(ca_file(deploy), identity.join("ca-chain.pem")).unwrap();
    let metadata = json!({ "agent_id": entered.agent_id, "site_url": deploy.url() });
    fs::write(identity.join("metadata.json"), metadata.to_string()).unwrap();
    let org_id = entered.agent_id.split("::").next();
    let metadata = json!({ "agent_id": entered.agent_id, "org_id": org_id, "mastio_url": deploy.url() });
    fs::write(credentials.join("agent.json"), metadata.to_string()).unwrap();
    (connector, credentials)
}

fn every_way_in(database: Database, python: Python) {
    let deploy = fresh(database);
    let upstream = Upstream::start();
    let mut all = enter(&deploy, python);
    let ids: Vec<String> = all.iter().map(|entered| entered.agent_id.clone()).collect();
    deploy.register_tool(TOOL, upstream.url(), &ids.iter().map(String::as_str).collect::<Vec<_>>());
    for entered in &mut all {
        let (connector, credentials) = laid_out(&deploy, entered);
        let Entered { how, agent, agent_id, held_here, .. } = entered;
        let shown = deploy.admin_get(&format!("/v1/admin/agents/{agent_id}")).expect(200);
        assert!(shown["enrollment"] == *how || *how == "managed", "{how}: {shown}");
        let state = agent.state();
        println!("{how} on {database:?}, SDK {}, Python {}", state["sdk"], state["python"]);

        // login_via_proxy_with_local_key, login_via_proxy.
        assert_eq!(agent.login().unwrap()["token"], true, "{how}");
        match agent.ask(&json!({ "cmd": "login-proxy" })) {
            Ok(_) => assert!(*held_here, "{how}: the server holds no key of it"),
            Err(raised) => assert!(!*held_here && raised.text.contains("404"), "{how}: {raised:?}"),
        }
        assert_eq!(agent.login().unwrap()["token"], true, "{how}");

        // list_peers, get_agent_public_key_via_egress, list_models, evaluate_tool_call_policy.
        let peers: Value = agent.ask(&json!({ "cmd": "peers" })).unwrap();
        let peers = peers.to_string();
        for id in &ids {
            assert_eq!(peers.contains(id.as_str()), id != agent_id, "{how}: {peers}");
            assert!(agent.public_key(id).unwrap().to_string().contains("BEGIN CERTIFICATE"), "{how}");
        }
        assert_eq!(agent.ask(&json!({ "cmd": "models" })).unwrap(), json!([]), "{how}");
        let policy = json!({ "cmd": "policy", "principal_id": agent_id, "tool_name": TOOL });
        assert_eq!(agent.ask(&policy).unwrap()["allowed"], true, "{how}");

        // from_identity_dir (which logs in by itself), from_api_key_file, from_systemd_credentials, from_connector.
        if *how != "connector" {
            agent.build_anew(None);
        }
        agent.call().unwrap_or_else(|raised| panic!("{how}: {raised:?}"));
        if *how != "connector" {
            agent.ask(&json!({ "cmd": "api-key-file" })).unwrap();
            assert_eq!(agent.tools(), [TOOL], "{how}");
        }
        agent
            .ask(&json!({ "cmd": "systemd", "credentials_dir": credentials, "ca": ca_file(&deploy) }))
            .unwrap();
        assert_eq!(agent.tools(), [TOOL], "{how}");
        agent.ask(&json!({ "cmd": "connector", "config_dir": connector })).unwrap();
        agent.login().unwrap();
        assert_eq!(agent.tools(), [TOOL], "{how}");
        agent.call().unwrap_or_else(|raised| panic!("{how}: {raised:?}"));
    }
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn the_sdk_does_all_it_can_however_it_came_in_on_sqlite() {
    every_way_in(Database::Sqlite, Python::Plain);
}

#[test]
fn the_sdk_does_all_it_can_however_it_came_in_on_postgresql() {
    every_way_in(Database::Postgres, Python::Plain);
}

#[test]
fn the_sdk_on_a_strict_python_does_all_it_can_however_it_came_in_on_sqlite() {
    every_way_in(Database::Sqlite, Python::Strict);
}

#[test]
fn the_sdk_on_a_strict_python_does_all_it_can_however_it_came_in_on_postgresql() {
    every_way_in(Database::Postgres, Python::Strict);
}
