//! Agents on the unmodified `cullis-sdk` live through an update of the Org CA: before, under the halt, after the apply
//! and after the rollback, with the certificate, key and CA file that they have always had.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};

use harness::sdk::{Agent, Python, Raised, TOOL, Upstream};
use harness::{Database, Deploy, MIGRATION, certificates, openssl, shared, sqlite3, wait_for};
use serde_json::json;

/// What an agent under the halt is told.
const HALTED: &str = "signing halted — pending migration 2026-04-23-org-ca-pathlen-1";

/// A fleet of the predecessor's: its database, and the files that its agents have on disk.
struct Fleet {
    deploy: Deploy,
    org: &'static str,
    files: PathBuf,
    ca: PathBuf,
}

impl Fleet {
    /// The layout of v0.1: leaves signed by the Org CA itself, files of one directory.
    fn v01(database: Database) -> Option<Self> {
        let deploy = Deploy::legacy("v01_root5")?;
        let keys = shared()?.join("fixtures/legacy/keys/v01_root5");
        // The SDK wants a directory an agent.
        let files = deploy.folder().join("agents");
        for name in ["agent-0001", "agent-0002", "agent-0003", "agent-0004", "agent-0005"] {
            fs::create_dir_all(files.join(name)).unwrap();
            for kind in ["crt", "key"] {
                let from = keys.join(format!("{name}.{kind}"));
                fs::copy(from, files.join(name).join(format!("agent.{kind}"))).unwrap();
            }
        }
        let ca = keys.join("org-ca.crt");
        Some(Self { deploy: deploy.on(database), org: "legacy-org", files, ca })
    }

    /// Enrolled with the running Python server by the SDK: leaves signed by the intermediate, DPoP keys pinned.
    fn enrolled_by_python(database: Database) -> Option<Self> {
        let deploy = Deploy::legacy("py_connector5_pending")?;
        let files = shared()?.join("fixtures/legacy/keys/py_connector5_pending");
        let ca = deploy.folder().join("org-ca.crt");
        let pem = sqlite3(&deploy.sqlite_file(), "SELECT value FROM proxy_config WHERE key = 'org_ca_cert'");
        fs::write(&ca, pem).unwrap();
        Some(Self { deploy: deploy.on(database), org: "acme", files, ca })
    }

    fn agent_id(&self, name: &str) -> String {
        format!("{}::{name}", self.org)
    }

    fn open(&self, python: Python, name: &str, ca: &Path) -> Agent {
        Agent::open(python, &self.deploy.url(), &self.agent_id(name), &self.files.join(name), ca)
    }

    /// Sets the row aside by the operator's SQL, so that the deploy serves as it did before it knew of the update.
    fn as_before(&mut self) {
        self.deploy.start();
        assert!(self.deploy.is_halted());
        self.deploy.sql(&format!(
            "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '{MIGRATION}'"
        ));
        wait_for("the halt to be lifted", || (!self.deploy.is_halted()).then_some(()));
    }

    /// Deletes the row and starts the server again, which halts.
    fn halt(&mut self) {
        self.deploy.sql(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
        self.deploy.restart();
        assert!(self.deploy.is_halted());
    }
}

/// The SDK's error is a 503 that a person understands.
fn is_halted_readably(raised: Result<(), Raised>) {
    let raised = raised.expect_err("a token was minted under the halt");
    assert!(raised.text.contains("503") && raised.text.contains(HALTED), "{raised:?}");
}

/// Writes a CA file for agents.
fn ca_file(deploy: &Deploy, name: &str, pem: &str) -> PathBuf {
    let path = deploy.folder().join(name);
    fs::write(&path, pem).unwrap();
    path
}

/// The chain `pem` (leaf first) is valid from `root` alone, by OpenSSL's strict rules.
fn assert_strictly_valid(folder: &Path, pem: &str, root: &str) {
    let chain = certificates(pem);
    assert!(chain.len() >= 2, "leaf and intermediate: {pem}");
    let (root_file, intermediates) = (folder.join("judge-root.pem"), folder.join("judge-intermediates.pem"));
    fs::write(&root_file, root).unwrap();
    fs::write(&intermediates, chain[1..].concat()).unwrap();
    let (root_file, intermediates) = (root_file.to_str().unwrap(), intermediates.to_str().unwrap());
    let arguments = [
        "verify",
        "-x509_strict",
        "-purpose",
        "sslclient",
        "-CAfile",
        root_file,
        "-untrusted",
        intermediates,
    ];
    openssl(&arguments, &chain[0]);
}

/// The story, told by three agents at once: one client that is opened once and never again; one built anew at each
/// stage from its old files; and one built anew with the new bundle from the apply on.
fn story(mut fleet: Fleet, python: Python) {
    let upstream = Upstream::start();
    fleet.as_before();
    let ids: Vec<String> =
        ["agent-0001", "agent-0002", "agent-0003", "agent-0004"].map(|name| fleet.agent_id(name)).into();
    fleet.deploy.register_tool(TOOL, upstream.url(), &ids.iter().map(String::as_str).collect::<Vec<_>>());

    // Before.
    let mut lasting = fleet.open(python, "agent-0002", &fleet.ca);
    // In the v0.1 fleet this one's key is RSA.
    let mut lasting_rsa = fleet.open(python, "agent-0001", &fleet.ca);
    let mut anew = fleet.open(python, "agent-0003", &fleet.ca);
    let mut anew_with_bundle = fleet.open(python, "agent-0004", &fleet.ca);
    let process = lasting.state()["pid"].clone();
    for agent in [&mut lasting, &mut lasting_rsa, &mut anew, &mut anew_with_bundle] {
        assert_eq!(agent.tools(), [TOOL]);
        agent.call().unwrap();
    }

    // The halt: an agent that logs in is told why not; so is one that has just been built and calls its tool.
    fleet.halt();
    is_halted_readably(lasting.login().map(|_| ()));
    is_halted_readably(lasting_rsa.login().map(|_| ()));
    for agent in [&mut anew, &mut anew_with_bundle] {
        agent.build_anew(None);
        is_halted_readably(agent.call());
    }

    // After the apply, without a restart of anything.
    fleet.deploy.apply().expect(200);
    let bundle = fleet.deploy.get("/pki/ca.crt");
    assert_eq!(bundle.status, 200);
    let new_root = certificates(&bundle.body)[0].clone();
    assert_ne!(new_root.trim(), fs::read_to_string(&fleet.ca).unwrap().trim());
    let bundle_file = ca_file(&fleet.deploy, "new-bundle.crt", &bundle.body);
    let new_root_file = ca_file(&fleet.deploy, "new-root.crt", &new_root);
    let every_agent_calls = |stage: &str, agents: [&mut Agent; 4]| {
        let [lasting, lasting_rsa, anew, anew_with_bundle] = agents;
        // A login that has failed ends the SDK's logging in by itself: the author's code logs in again.
        for agent in [lasting, lasting_rsa] {
            agent.login().unwrap_or_else(|raised| panic!("{stage}: {raised:?}"));
            agent.call().unwrap_or_else(|raised| panic!("{stage}: {raised:?}"));
        }
        anew.build_anew(None);
        anew.call().unwrap_or_else(|raised| panic!("{stage}, old CA file: {raised:?}"));
        for ca in [&bundle_file, &new_root_file] {
            anew_with_bundle.build_anew(Some(ca));
            anew_with_bundle.call().unwrap_or_else(|raised| panic!("{stage}, {}: {raised:?}", ca.display()));
        }
    };
    every_agent_calls("after the apply", [&mut lasting, &mut lasting_rsa, &mut anew, &mut anew_with_bundle]);
    for (agent, id) in [(&mut lasting, &ids[1]), (&mut lasting_rsa, &ids[0]), (&mut anew, &ids[2])] {
        let answer = agent.public_key(id).unwrap();
        let pem = answer
            .as_str()
            .map(str::to_owned)
            .unwrap_or_else(|| answer["cert_pem"].as_str().unwrap().to_owned());
        assert_strictly_valid(fleet.deploy.folder(), &pem, &new_root);
    }

    // The same state, read by a new process of the server.
    fleet.deploy.restart();
    every_agent_calls("after a restart", [&mut lasting, &mut lasting_rsa, &mut anew, &mut anew_with_bundle]);

    // After the rollback.
    fleet.deploy.roll_back().expect(200);
    every_agent_calls(
        "after the rollback",
        [&mut lasting, &mut lasting_rsa, &mut anew, &mut anew_with_bundle],
    );
    fleet.deploy.restart();
    every_agent_calls(
        "after the rollback and a restart",
        [&mut lasting, &mut lasting_rsa, &mut anew, &mut anew_with_bundle],
    );
    assert_eq!(lasting.state()["pid"], process);
}

#[test]
fn the_v01_fleet_calls_its_tools_before_the_halt_after_the_apply_and_after_the_rollback_on_sqlite() {
    let Some(fleet) = Fleet::v01(Database::Sqlite) else { return };
    story(fleet, Python::Plain);
}

#[test]
fn a_fleet_enrolled_by_python_calls_its_tools_before_the_halt_after_the_apply_and_after_the_rollback_on_sqlite()
 {
    let Some(fleet) = Fleet::enrolled_by_python(Database::Sqlite) else { return };
    story(fleet, Python::Plain);
}

#[test]
fn a_fleet_whose_python_verifies_strictly_calls_its_tools_through_apply_and_rollback_on_sqlite() {
    let Some(fleet) = Fleet::enrolled_by_python(Database::Sqlite) else { return };
    story(fleet, Python::Strict);
}

#[test]
fn a_fleet_whose_python_verifies_strictly_calls_its_tools_through_apply_and_rollback_on_postgresql() {
    let Some(fleet) = Fleet::enrolled_by_python(Database::Postgres) else { return };
    story(fleet, Python::Strict);
}

#[test]
fn an_agent_created_after_the_apply_calls_a_tool_on_either_python_and_still_after_the_rollback_on_sqlite() {
    let Some(fleet) = Fleet::v01(Database::Sqlite) else { return };
    created_after_the_apply(fleet);
}

#[test]
fn an_agent_created_after_the_apply_calls_a_tool_on_either_python_and_still_after_the_rollback_on_postgresql()
{
    let Some(fleet) = Fleet::v01(Database::Postgres) else { return };
    created_after_the_apply(fleet);
}

fn created_after_the_apply(mut fleet: Fleet) {
    let upstream = Upstream::start();
    fleet.deploy.start();
    fleet.deploy.apply().expect(200);
    let bundle = fleet.deploy.get("/pki/ca.crt").body;
    let new_root = certificates(&bundle)[0].clone();
    let pins = [
        ca_file(&fleet.deploy, "new-bundle.crt", &bundle),
        ca_file(&fleet.deploy, "new-root.crt", &new_root),
    ];
    let mut agents = Vec::new();
    for (python, name) in [(Python::Plain, "plain"), (Python::Strict, "strict")] {
        let body = json!({ "agent_name": name, "capabilities": [] });
        let created = fleet.deploy.admin_post("/v1/admin/agents", &body).expect(201);
        let directory = fleet.deploy.folder().join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("agent.crt"), created["cert_pem"].as_str().unwrap()).unwrap();
        fs::write(directory.join("agent.key"), created["private_key_pem"].as_str().unwrap()).unwrap();
        assert_strictly_valid(fleet.deploy.folder(), created["cert_pem"].as_str().unwrap(), &new_root);
        let agent_id = created["agent_id"].as_str().unwrap().to_owned();
        let agent = Agent::open(python, &fleet.deploy.url(), &agent_id, &directory, &pins[0]);
        agents.push((agent_id, agent));
    }
    let ids: Vec<&str> = agents.iter().map(|(id, _)| id.as_str()).collect();
    fleet.deploy.register_tool(TOOL, upstream.url(), &ids);

    for stage in ["after the apply", "after the rollback"] {
        if stage == "after the rollback" {
            fleet.deploy.roll_back().expect(200);
        }
        for (id, agent) in &mut agents {
            for pin in [None, Some(&pins[0]), Some(&pins[1])] {
                // The client that is open first, then new ones: each logs in for itself.
                if let Some(pin) = pin {
                    agent.build_anew(Some(pin));
                }
                agent.call().unwrap_or_else(|raised| panic!("{id} {stage}: {raised:?}"));
            }
        }
    }
}

#[test]
fn the_v01_fleet_calls_its_tools_before_the_halt_after_the_apply_and_after_the_rollback_on_postgresql() {
    let Some(fleet) = Fleet::v01(Database::Postgres) else { return };
    story(fleet, Python::Plain);
}

#[test]
fn a_fleet_enrolled_by_python_calls_its_tools_before_the_halt_after_the_apply_and_after_the_rollback_on_postgresql()
 {
    let Some(fleet) = Fleet::enrolled_by_python(Database::Postgres) else { return };
    story(fleet, Python::Plain);
}

/// The overlap ends: who pins the old root alone cannot connect any more, who has a former leaf is refused, and who has
/// taken up both goes on.
fn end_of_the_overlap(mut fleet: Fleet) {
    let upstream = Upstream::start();
    fleet.deploy.start();
    let ids: Vec<String> = ["agent-0002", "agent-0003"].map(|name| fleet.agent_id(name)).into();
    fleet.deploy.register_tool(TOOL, upstream.url(), &ids.iter().map(String::as_str).collect::<Vec<_>>());
    fleet.deploy.apply().expect(200);
    let new_root = certificates(&fleet.deploy.get("/pki/ca.crt").body)[0].clone();
    let new_root_file = ca_file(&fleet.deploy, "new-root.crt", &new_root);

    // One goes on with its old files; the other has taken up the new root and its present leaf.
    let mut old = fleet.open(Python::Plain, "agent-0002", &fleet.ca);
    old.call().unwrap();
    let taken_up = fleet.deploy.folder().join("taken-up");
    fs::create_dir_all(&taken_up).unwrap();
    let leaf =
        format!("SELECT cert_pem FROM internal_agents WHERE agent_id = '{}'", fleet.agent_id("agent-0003"));
    fs::write(taken_up.join("agent.crt"), fleet.deploy.sql(&leaf) + "\n").unwrap();
    fs::copy(fleet.files.join("agent-0003/agent.key"), taken_up.join("agent.key")).unwrap();
    let agent_id = fleet.agent_id("agent-0003");
    let mut new = Agent::open(Python::Plain, &fleet.deploy.url(), &agent_id, &taken_up, &new_root_file);
    new.call().unwrap();
    let seen = wait_for("both to be seen", || {
        let told = fleet.deploy.admin_get("/v1/admin/pki/overlap").expect(200);
        (told["agents"]["on_old_leaf"] == 1 && told["agents"]["on_present_leaf"] == 1).then_some(told)
    });
    assert_eq!(seen["on_old_leaf"][0]["agent_id"], fleet.agent_id("agent-0002"));
    assert!(seen["on_old_leaf"][0]["seen_at"].is_string(), "{seen}");

    let settle = |body| fleet.deploy.admin_post("/v1/admin/pki/settle", &body);
    assert_eq!(settle(json!({ "confirm": true })).expect(409)["detail"]["reason"], "agents_on_old_leaf");
    old.call().unwrap();
    settle(json!({ "confirm": true, "break_agents": true })).expect(200);

    new.build_anew(None);
    new.call().unwrap();
    old.build_anew(None);
    old.call().expect_err("the old CA file still verifies the server");
    // With the new root it reaches the server, which does not know its former leaf any more.
    old.build_anew(Some(&new_root_file));
    let refused = old.login().expect_err("a former leaf is still accepted");
    assert!(refused.text.contains("401"), "{refused:?}");
    fleet.deploy.restart();
    new.build_anew(None);
    new.call().unwrap();
}

#[test]
fn the_sdk_needs_the_new_files_once_the_overlap_has_ended_on_sqlite() {
    let Some(fleet) = Fleet::v01(Database::Sqlite) else { return };
    end_of_the_overlap(fleet);
}

#[test]
fn the_sdk_needs_the_new_files_once_the_overlap_has_ended_on_postgres() {
    let Some(fleet) = Fleet::v01(Database::Postgres) else { return };
    end_of_the_overlap(fleet);
}
