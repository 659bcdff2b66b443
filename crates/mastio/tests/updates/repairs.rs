//! What each repair of a predecessor's deploy does, told on a deploy that has the defect.

use std::path::PathBuf;
use std::process::Command;

use mastio::demo::agent::{AgentClient, AgentError};
use mastio_core::x509::lints::leaf_gaps;
use mastio_core::x509::{Certificate, path};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rows::{KEY_IDENTIFIERS, LEAF_PROFILE, REISSUE, TAGS, apply, listed, reshaped, roll_back};
use crate::server::{Deploy, MIGRATION, On, Server, legacy, run};
use crate::state::{PkiState, certificate, text};

/// What an agent gets that asks for a token with the files it has held all along, pinning `ca`.
fn mints(server: &Server, ca: &str, fixture: &str, agent_id: &str) -> Result<(), String> {
    let stem = legacy(&format!("keys/{fixture}/{}", agent_id.rsplit("::").next().unwrap()));
    let read = |extension: &str| std::fs::read_to_string(stem.with_extension(extension)).unwrap();
    let agent = AgentClient::new(&server.url, ca, &read("crt"), &read("key"), agent_id).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match runtime.block_on(agent.mint()) {
        Ok(_) => Ok(()),
        Err(AgentError::Refused { status, detail, .. }) => Err(format!("{status} {detail}")),
        Err(error) => panic!("{agent_id}: {error}: {:?}", std::error::Error::source(&error)),
    }
}

fn created(server: &Server, name: &str) -> String {
    let answer = server.post("/v1/admin/agents", &json!({ "agent_name": name, "capabilities": [] }));
    assert_eq!(answer.status, 201, "{answer:?}");
    text(&answer.json(), "agent_id")
}

fn now() -> mastio_core::time::UnixTime {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    mastio_core::time::UnixTime(i64::try_from(now.as_secs()).unwrap())
}

/// Files that verifiers of the system read.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, pem: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, pem).unwrap();
        path
    }
}

/// Whether OpenSSL, strict, accepts `leaf` below `root` with what follows the leaf.
fn is_strictly_accepted(root: &str, between: &str, leaf: &str) -> bool {
    let files = Files::new();
    let verified = run(Command::new("openssl")
        .args(["verify", "-x509_strict", "-CAfile"])
        .arg(files.write("root.pem", root))
        .arg("-untrusted")
        .arg(files.write("between.pem", between))
        .arg(files.write("leaf.pem", leaf)));
    verified.status.success()
}

/// Whether a client that pins `root` alone gets an answer.
fn serves(server: &Server, root: &str) -> bool {
    let files = Files::new();
    let pinned = files.write("root.pem", root);
    let url = format!("{}/healthz", server.url);
    run(Command::new("curl").args(["-sS", "--fail", "--cacert"]).arg(pinned).arg(&url)).status.success()
}

fn statuses(server: &Server, id: &str) -> Option<String> {
    listed(server).into_iter().find(|(listed, _)| listed == id).map(|(_, status)| status)
}

#[test]
fn an_orphaned_intermediate_is_issued_again_and_everything_below_it_is_valid_as_it_stands() {
    let deploy = reshaped("chain5", &["--new-root", "--complete-leaves"]);
    let server = deploy.start();
    assert_eq!(statuses(&server, REISSUE).as_deref(), Some("pending"));
    assert!(server.halted());
    let before = PkiState::read(&deploy);
    let orphan = before.mastio_ca.clone().unwrap();
    assert!(certificate(&orphan).verify_signature(&certificate(&before.org_ca)).is_err());
    assert!(!serves(&server, &before.org_ca), "our TLS certificate hangs below the orphan");

    assert_eq!(apply(&server, REISSUE).status, 200);
    assert!(!server.halted());
    let after = PkiState::read(&deploy);
    let mastio_ca = after.mastio_ca.clone().unwrap();
    assert_eq!(certificate(&mastio_ca).spki_der(), certificate(&orphan).spki_der());
    assert_eq!(path::verify_ca_chain(&certificate(&mastio_ca), &certificate(&after.org_ca), now()), Ok(()));
    assert_eq!(after.org_ca, before.org_ca);
    after.assert_rest_is(&before);
    after.assert_under_one_chain();
    for (agent_id, row) in &after.leaves {
        let (was, is) = (
            Certificate::chain_from_pem(&before.leaves[agent_id]).unwrap(),
            Certificate::chain_from_pem(row).unwrap(),
        );
        assert_eq!(is[0], was[0], "{agent_id} keeps its leaf");
        assert_eq!(is[1..], [certificate(&mastio_ca)], "{agent_id} presents the new intermediate");
        assert!(is_strictly_accepted(&after.org_ca, &mastio_ca, row), "{agent_id}");
    }
    // The token key's certificate, which nobody has touched, and our own TLS certificate.
    let token_key = text(&after.token_keys[0], "cert_pem");
    assert!(certificate(&token_key).verify_signature(&certificate(&mastio_ca)).is_ok());
    assert!(serves(&server, &after.org_ca));
    let ids = deploy.count("SELECT COUNT(*) FROM superseded_certificates");
    assert_eq!(ids, 0, "no leaf was replaced");

    // An agent that arises in between keeps what is valid.
    let newcomer = created(&server, "newcomer");
    let arisen = PkiState::read(&deploy).leaves[&newcomer].clone();
    assert_eq!(roll_back(&server, REISSUE).status, 200);
    let mut restored = PkiState::read(&deploy);
    assert_eq!(restored.leaves.remove(&newcomer), Some(arisen));
    restored.agents.remove(&newcomer);
    assert_eq!(restored, before);
}

#[test]
fn agents_of_a_deploy_that_the_predecessor_has_updated_go_on_after_the_repair() {
    let deploy = Deploy::of("py_applied");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    let ca = server.ca();
    let agent = before.agents.keys().nth(1).unwrap().clone();
    let held = |folder: &str| format!("py_applied/{folder}");
    let refused = mints(&server, &ca, &held("new_leaves"), &agent).unwrap_err();
    assert_eq!(refused, format!("503 signing halted — pending migration {REISSUE}"));
    // What the halt is for comes first, and says so.
    let early = apply(&server, LEAF_PROFILE);
    assert_eq!(
        (early.status, early.detail()),
        (412, json!(format!("sign halt mismatch: apply {REISSUE} first")))
    );

    assert_eq!(apply(&server, REISSUE).status, 200);
    let after = PkiState::read(&deploy);
    assert_eq!(after.leaves, before.leaves, "they stand under the Org CA itself");
    for folder in ["old_leaves", "new_leaves"] {
        for agent in before.agents.keys().filter(|id| !id.ends_with("0001")) {
            assert_eq!(mints(&server, &ca, &held(folder), agent), Ok(()), "{agent} with {folder}");
        }
    }
    // Then the leaves, and then the way back, last first.
    assert_eq!(apply(&server, LEAF_PROFILE).status, 200);
    let blocked = server.rollback();
    assert_eq!((blocked.status, &blocked.detail()["blocker"]), (409, &json!(REISSUE)));
    let blocked = roll_back(&server, REISSUE);
    assert_eq!((blocked.status, &blocked.detail()["blocker"]), (409, &json!(LEAF_PROFILE)));
    assert_eq!(roll_back(&server, LEAF_PROFILE).status, 200);
    assert_eq!(roll_back(&server, REISSUE).status, 200);
    assert_eq!(PkiState::read(&deploy), before);
}

#[test]
fn a_root_and_an_intermediate_without_key_identifiers_get_them_and_old_pins_hold() {
    let deploy = reshaped("py_healthy_pathlen1", &["--bare-root"]);
    let server = deploy.start();
    assert_eq!(statuses(&server, KEY_IDENTIFIERS).as_deref(), Some("pending"));
    assert!(!server.halted());
    let before = PkiState::read(&deploy);
    let old_pin = before.org_ca.clone();
    let agent = before.agents.keys().nth(1).unwrap().clone();
    let strict = |state: &PkiState| {
        is_strictly_accepted(&state.org_ca, state.mastio_ca.as_ref().unwrap(), &state.leaves[&agent])
    };
    assert!(!strict(&before));

    assert_eq!(apply(&server, LEAF_PROFILE).status, 200);
    let complete = PkiState::read(&deploy);
    assert!(!strict(&complete), "complete leaves are not enough");
    assert_eq!(apply(&server, KEY_IDENTIFIERS).status, 200);
    let after = PkiState::read(&deploy);
    assert!(strict(&after));
    let (root, former) = (certificate(&after.org_ca), certificate(&old_pin));
    assert_eq!(former.subject_key_id(), None);
    assert_eq!((root.subject_der(), root.spki_der()), (former.subject_der(), former.spki_der()));
    assert_eq!(root.validity_der(), former.validity_der());
    let mastio_ca = certificate(after.mastio_ca.as_ref().unwrap());
    assert_eq!(mastio_ca.authority_key_id(), root.subject_key_id());
    after.assert_rest_is(&before);
    after.assert_under_one_chain();
    for pin in [&old_pin, &after.org_ca] {
        assert!(serves(&server, pin));
        assert_eq!(mints(&server, pin, "py_healthy_pathlen1", &agent), Ok(()));
    }
    assert_eq!(deploy.count("SELECT COUNT(*) FROM pki_anchors"), 0, "it is the same anchor");

    // The later one wrote what follows the leaves that the earlier one wrote.
    let blocked = roll_back(&server, LEAF_PROFILE);
    assert_eq!((blocked.status, &blocked.detail()["blocker"]), (409, &json!(KEY_IDENTIFIERS)));
    assert_eq!(roll_back(&server, KEY_IDENTIFIERS).status, 200);
    assert_eq!(PkiState::read(&deploy), complete);
    assert_eq!(roll_back(&server, LEAF_PROFILE).status, 200);
    assert_eq!(PkiState::read(&deploy), before);
    assert!(serves(&server, &old_pin) && serves(&server, &after.org_ca));
}

#[test]
fn key_identifiers_are_no_row_where_the_path_length_update_brings_them() {
    let deploy = reshaped("chain5", &["--bare-root", "--complete-leaves"]);
    let server = deploy.start();
    assert_eq!(listed(&server), [(MIGRATION.to_owned(), "pending".to_owned())]);
    assert_eq!(server.apply().status, 200);
    let after = PkiState::read(&deploy);
    let root = certificate(&after.org_ca);
    assert!(root.subject_key_id().is_some());
    assert_eq!(certificate(after.mastio_ca.as_ref().unwrap()).authority_key_id(), root.subject_key_id());
    server.stop();
    assert_eq!(listed(&deploy.start()), [(MIGRATION.to_owned(), "applied".to_owned())]);
}

#[test]
fn leaves_get_the_full_profile_and_agents_go_on_with_the_ones_they_hold() {
    let deploy = Deploy::of("v01_healthy_pathlen1");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    let ca = server.ca();
    assert_eq!(apply(&server, LEAF_PROFILE).status, 200);
    let after = PkiState::read(&deploy);
    after.assert_rest_is(&before);
    after.assert_under_one_chain();
    assert_eq!((&after.org_ca, &after.mastio_ca), (&before.org_ca, &before.mastio_ca));
    for (agent_id, row) in &after.leaves {
        let (was, is) = (certificate(&before.leaves[agent_id]), certificate(row));
        assert_eq!(leaf_gaps(&was).len(), 5, "{agent_id}");
        assert_eq!(leaf_gaps(&is), [""; 0], "{agent_id}");
        assert_eq!((is.subject_der(), is.spki_der()), (was.subject_der(), was.spki_der()), "{agent_id}");
        assert_eq!((is.validity_der(), is.uri_sans()), (was.validity_der(), was.uri_sans()), "{agent_id}");
        assert!(!is.basic_constraints().unwrap().ca);
    }
    for agent in before.agents.keys() {
        assert_eq!(mints(&server, &ca, "v01_healthy_pathlen1", agent), Ok(()), "{agent}");
    }
    let newcomer = created(&server, "newcomer");
    let arisen = PkiState::read(&deploy).leaves[&newcomer].clone();
    assert_eq!(roll_back(&server, LEAF_PROFILE).status, 200);
    let mut restored = PkiState::read(&deploy);
    assert_eq!(restored.leaves.remove(&newcomer), Some(arisen));
    restored.agents.remove(&newcomer);
    assert_eq!(restored, before);
    for agent in before.agents.keys() {
        assert_eq!(mints(&server, &ca, "v01_healthy_pathlen1", agent), Ok(()), "{agent}");
    }
}

#[test]
fn a_replaced_leaf_counts_from_the_commit_of_the_run_that_replaced_it() {
    let deploy = Deploy::of("v01_healthy_pathlen1");
    let server = deploy.start();
    let ca = server.ca();
    let agent = PkiState::read(&deploy).agents.keys().nth(1).unwrap().clone();
    assert_eq!(apply(&server, LEAF_PROFILE).status, 200);
    assert_eq!(mints(&server, &ca, "v01_healthy_pathlen1", &agent), Ok(()));
    // As if the run had died between writing the replaced leaves and its commit. The second statement moves the epoch.
    deploy.execute("UPDATE update_runs SET committed_at = NULL");
    deploy.execute("UPDATE internal_agents SET display_name = display_name");
    let refused = mints(&server, &ca, "v01_healthy_pathlen1", &agent).unwrap_err();
    assert!(refused.starts_with("401 "), "{refused}");
}

#[test]
fn facts_of_leaves_that_sql_has_touched_fit_the_rows_after_a_rollback() {
    for on in [On::Sqlite, On::Postgres] {
        let deploy = Deploy::of("v01_healthy_pathlen1").on(on);
        let server = deploy.start();
        let before = PkiState::read(&deploy);
        assert_eq!(apply(&server, LEAF_PROFILE).status, 200);
        server.stop();
        let mut agents = before.agents.keys();
        let (around, forgotten) = (agents.next().unwrap(), agents.next().unwrap());
        // The same leaf in a row that reads otherwise: its facts are read anew at the boot.
        let sql =
            format!("UPDATE internal_agents SET cert_pem = cert_pem || ' ' WHERE agent_id = '{around}'");
        deploy.execute(&sql);
        let server = deploy.start();
        let touched = PkiState::read(&deploy).leaves[around].clone();
        deploy.execute(&format!("DELETE FROM agent_certificates WHERE agent_id = '{forgotten}'"));
        assert_eq!(roll_back(&server, LEAF_PROFILE).status, 200);
        server.stop();
        let server = deploy.start();
        let after = PkiState::read(&deploy);
        assert_eq!(after.leaves[around], touched, "what changed since is left alone");
        assert_eq!(after.leaves[forgotten], before.leaves[forgotten]);
        let facts = deploy.rows("SELECT agent_id, fingerprint FROM agent_certificates ORDER BY agent_id");
        assert_eq!(facts.len(), before.leaves.len());
        for row in facts {
            let leaf = &after.leaves[&text(&row, "agent_id")];
            assert_eq!(text(&row, "fingerprint"), certificate(leaf).fingerprint(), "{row}");
        }
        server.stop();
    }
}

#[test]
fn leaves_wait_for_the_chain_above_them() {
    let first = |id: &str| json!(format!("sign halt mismatch: apply {id} first"));
    // Set aside by the operator: no halt, and still no valid leaf below such a root.
    let deploy = Deploy::of("py_rolled_back");
    let server = deploy.start();
    let early = apply(&server, LEAF_PROFILE);
    assert_eq!((early.status, early.detail()), (412, first(MIGRATION)));
    let deploy = Deploy::of("v01_applied_row_only");
    let server = deploy.start();
    let early = apply(&server, LEAF_PROFILE);
    assert_eq!((early.status, &early.detail()["reason"]), (409, &json!("org_ca_legacy_pathlen_zero")));
    assert_eq!(statuses(&server, LEAF_PROFILE).as_deref(), Some("pending"));

    // In order on a deploy of another kind, and back to every byte.
    let deploy = Deploy::of("py_mixed_byoca_pending");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    let early = apply(&server, TAGS);
    assert_eq!((early.status, early.detail()), (412, first(MIGRATION)));
    for id in [MIGRATION, LEAF_PROFILE, TAGS] {
        assert_eq!(apply(&server, id).status, 200, "{id}");
    }
    assert_eq!(server.health(), json!({ "status": "ok" }));
    let after = PkiState::read(&deploy);
    after.assert_under_one_chain();
    let byoca = before.agents.keys().find(|id| before.agents[*id]["enrollment_method"] == "byoca").unwrap();
    assert_eq!(after.leaves[byoca], before.leaves[byoca]);
    server.stop();
    let server = deploy.start();
    assert_eq!(server.health(), json!({ "status": "ok" }), "nothing is proposed again");
    for id in [TAGS, LEAF_PROFILE, MIGRATION] {
        assert_eq!(roll_back(&server, id).status, 200, "{id}");
    }
    assert_eq!(PkiState::read(&deploy), before);
}

#[test]
fn a_row_that_was_closed_with_nothing_to_do_blocks_no_rollback() {
    let deploy = Deploy::of("py_applied");
    let server = deploy.start();
    // Back to the predecessor's state before its apply: there the intermediate is no orphan.
    assert_eq!(server.rollback().status, 200);
    assert_eq!(statuses(&server, REISSUE).as_deref(), Some("applied"));
    assert_eq!(roll_back(&server, REISSUE).status, 404);
    let before = PkiState::read(&deploy);
    assert_eq!(server.apply().status, 200);
    assert_eq!(server.rollback().status, 200);
    assert_eq!(PkiState::read(&deploy), before);
}

fn tags(deploy: &Deploy) -> Vec<Value> {
    deploy.rows("SELECT agent_id, enrollment_method FROM internal_agents ORDER BY agent_id")
}

#[test]
fn old_tags_become_the_field_s_own_and_a_later_tag_survives_the_rollback() {
    let deploy = reshaped("py_healthy_pathlen1", &["--tag", "agent-0005=spiffe"]);
    let server = deploy.start();
    assert_eq!(statuses(&server, TAGS).as_deref(), Some("pending"));
    let before = (PkiState::read(&deploy), tags(&deploy));
    let plan = server.get(&format!("/proxy/updates/{TAGS}/plan")).json();
    assert_eq!((&plan["leaves"], &plan["cells"]), (&json!(2), &json!([])));
    assert_eq!(apply(&server, TAGS).status, 200);
    let method = |tags: &[Value], name: &str| {
        let row = tags.iter().find(|row| text(row, "agent_id").ends_with(name)).unwrap();
        text(row, "enrollment_method")
    };
    let after = tags(&deploy);
    assert_eq!(method(&after, "agent-0004"), "connector");
    assert_eq!(method(&after, "agent-0005"), "spire");
    assert_eq!(PkiState::read(&deploy).leaves, before.0.leaves);
    let agents = server.get("/v1/admin/agents").json();
    assert_eq!(agents.as_array().unwrap().iter().filter(|a| a["enrollment"] == "spire").count(), 1);

    deploy.execute(
        "UPDATE internal_agents SET enrollment_method = 'byoca' WHERE agent_id LIKE '%::agent-0005'",
    );
    assert_eq!(roll_back(&server, TAGS).status, 200);
    let restored = tags(&deploy);
    assert_eq!(method(&restored, "agent-0004"), "admin");
    assert_eq!(method(&restored, "agent-0005"), "byoca", "somebody else's work");
    deploy.execute(
        "UPDATE internal_agents SET enrollment_method = 'spiffe' WHERE agent_id LIKE '%::agent-0005'",
    );
    assert_eq!((PkiState::read(&deploy), tags(&deploy)), before);
}

#[test]
fn facts_that_are_older_than_a_check_are_filled_at_boot() {
    let deploy = Deploy::of("v01_healthy_pathlen1");
    deploy.start().stop();
    let facts = "SELECT * FROM agent_certificates ORDER BY agent_id";
    let before = deploy.rows(facts);
    assert!(before.iter().all(|row| text(row, "profile_gaps").starts_with("basicConstraints,keyUsage,")));
    deploy.execute("UPDATE agent_certificates SET profile_gaps = NULL");
    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{LEAF_PROFILE}'"));
    let server = deploy.start();
    assert_eq!(statuses(&server, LEAF_PROFILE).as_deref(), Some("pending"));
    assert_eq!(deploy.rows(facts), before);
}

#[test]
fn a_leaf_that_an_operator_s_sql_has_put_there_is_seen_by_the_next_detection() {
    for on in crate::server::On::BOTH {
        let deploy = Deploy::of("py_connector5_pending").on(on);
        let server = deploy.start();
        let before = PkiState::read(&deploy);
        for id in [MIGRATION, LEAF_PROFILE] {
            let answer = apply(&server, id);
            assert_eq!(answer.status, 200, "{id}: {answer:?}");
        }
        assert_eq!(statuses(&server, LEAF_PROFILE).as_deref(), Some("applied"));
        let (agent_id, leaf) = before.leaves.iter().next().unwrap();
        let former = leaf.replace('\'', "''");
        deploy.execute(&format!(
            "UPDATE internal_agents SET cert_pem = '{former}' WHERE agent_id = '{agent_id}'; \
             DELETE FROM pending_updates WHERE migration_id = '{LEAF_PROFILE}'"
        ));
        server.stop();
        let server = deploy.start();
        assert_eq!(statuses(&server, LEAF_PROFILE).as_deref(), Some("pending"), "on {}", on.name());
        assert_eq!(deploy.count("SELECT COUNT(*) FROM leaves_without_facts"), 0);
        let facts = format!("SELECT COUNT(*) FROM agent_certificates WHERE agent_id = '{agent_id}'");
        assert_eq!(deploy.count(&facts), 1);
    }
}

#[test]
fn a_rolled_back_update_whose_state_is_right_all_the_same_blocks_nothing() {
    let deploy = Deploy::of("py_healthy_pathlen1");
    deploy.start().stop();
    deploy.execute(&format!(
        "INSERT INTO pending_updates (migration_id, detected_at, status) \
         VALUES ('{MIGRATION}', '2026-04-23T19:04:21Z', 'rolled_back')"
    ));
    // Whoever has not looked yet waits; the detection at the boot finds the Org CA right.
    let server = deploy.start();
    assert_eq!(statuses(&server, MIGRATION).as_deref(), Some("rolled_back"));
    let answer = apply(&server, LEAF_PROFILE);
    assert_eq!(answer.status, 200, "{answer:?}");
    // Where the defect is there, it goes on waiting.
    let deploy = Deploy::of("py_rolled_back");
    let answer = apply(&deploy.start(), LEAF_PROFILE);
    assert_eq!(answer.status, 412, "{answer:?}");
}
