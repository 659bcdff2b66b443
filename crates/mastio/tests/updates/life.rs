//! A fleet that goes on living while an update prepares that does not halt it: agents come, go, are set aside and issued
//! anew, and operators write SQL. What moved is prepared again, nothing is overwritten, nobody is missed.

use std::time::{Duration, Instant};

use mastio_core::x509::lints::leaf_gaps;
use serde_json::json;

use crate::contract::status_of;
use crate::rows::{LEAF_PROFILE, apply, roll_back};
use crate::server::{ADMIN_SECRET, Answer, Deploy, On, Server, request};
use crate::state::{PkiState, certificate, open_runs, text};

/// Five agents whose leaves say nothing but their name, under a sound Org CA.
const FIXTURE: &str = "v01_healthy_pathlen1";

fn asked(server: &Server, verb: &str) -> std::thread::JoinHandle<Answer> {
    let (url, path) = (server.url.clone(), format!("/proxy/updates/{LEAF_PROFILE}/{verb}"));
    std::thread::spawn(move || {
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    })
}

fn until_phase(deploy: &Deploy, phase: &str) {
    let began = Instant::now();
    let sql = format!("SELECT COUNT(*) FROM update_runs WHERE finished_at IS NULL AND phase = '{phase}'");
    while deploy.count(&sql) == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "the run never came to {phase}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The deploy, ready for its update, and a server that stops at `point` while the file lies there.
fn held(on: On, point: &str) -> (Deploy, Server, std::path::PathBuf) {
    let deploy = Deploy::of(FIXTURE).on(on);
    // The identifiers of the CA come first, as the list says.
    let server = deploy.start();
    assert_eq!(apply(&server, crate::rows::KEY_IDENTIFIERS).status, 200);
    server.stop();
    let hold = deploy.folder().join("hold");
    std::fs::write(&hold, "").unwrap();
    let server = deploy
        .start_with(&[("MASTIO_HOLD_AT", point), ("MASTIO_HOLD_FILE", hold.to_str().unwrap())])
        .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
    (deploy, server, hold)
}

fn lives_while_an_update_prepares(on: On) {
    for point in ["apply.prepare", "apply.verify"] {
        let (deploy, server, hold) = held(on, point);
        let before = PkiState::read(&deploy);
        let ids: Vec<String> = before.leaves.keys().cloned().collect();
        let applied = asked(&server, "apply");
        until_phase(&deploy, point.strip_prefix("apply.").unwrap());
        assert!(!server.halted());

        // The first is left alone; everybody else moves.
        let created =
            server.post("/v1/admin/agents", &json!({ "agent_name": "newcomer", "capabilities": [] }));
        assert_eq!(created.status, 201, "{created:?}");
        let newcomer = text(&created.json(), "agent_id");
        let set_aside = server.post(&format!("/v1/admin/agents/{}/deactivate", ids[1]), &json!({}));
        assert!(set_aside.status < 300, "{set_aside:?}");
        let renewed = server.post(&format!("/v1/admin/agents/{}/renew", ids[2]), &json!({}));
        assert!(renewed.status < 300, "{renewed:?}");
        let gone = server.request(
            "DELETE",
            &format!("/v1/admin/agents/{}?permanently=true", ids[3]),
            Some(ADMIN_SECRET),
            None,
        );
        assert!(gone.status < 300, "{gone:?}");
        // An operator puts a leaf back that differs in its text alone.
        deploy.execute(&format!(
            "UPDATE internal_agents SET cert_pem = '\n' || cert_pem, display_name = 'by hand' WHERE agent_id = '{}'",
            ids[4]
        ));
        let moved = PkiState::read(&deploy);
        std::fs::remove_file(hold).unwrap();
        let answer = applied.join().unwrap();
        assert_eq!(answer.status, 200, "{point}: {answer:?} {:?}", server.log().last());

        let after = PkiState::read(&deploy);
        assert_eq!(after.agents, moved.agents, "{point}: nothing but leaves is the update's");
        assert!(!after.leaves.contains_key(&ids[3]), "{point}: the deleted one came back");
        for (agent_id, leaf) in &after.leaves {
            assert!(leaf_gaps(&certificate(leaf)).is_empty(), "{point}: {agent_id} was missed");
            let was = certificate(&moved.leaves[agent_id]);
            assert_eq!(certificate(leaf).spki_der(), was.spki_der(), "{point}: {agent_id}");
            assert_eq!(certificate(leaf).not_after(), was.not_after(), "{point}: {agent_id}");
        }
        // What was complete already is not overwritten.
        for agent_id in [&newcomer, &ids[2]] {
            if leaf_gaps(&certificate(&moved.leaves[agent_id])).is_empty() {
                assert_eq!(
                    after.leaves[agent_id], moved.leaves[agent_id],
                    "{point}: {agent_id} was overwritten"
                );
            }
        }
        after.assert_under_one_chain();
        assert_eq!(roll_back(&server, LEAF_PROFILE).status, 200);
        let restored = PkiState::read(&deploy);
        assert_eq!(restored, moved, "{point}: the way back");
        server.stop();
        deploy.audit_verifies();
    }
}

#[test]
fn agents_come_go_and_change_while_an_update_prepares_on_sqlite() {
    lives_while_an_update_prepares(On::Sqlite);
}

#[test]
fn agents_come_go_and_change_while_an_update_prepares_on_postgresql() {
    lives_while_an_update_prepares(On::Postgres);
}

/// Between the commit and the look at what it has stored, agents go on through our own doors: that is no wrong state.
fn goes_on_before_the_activation(on: On) {
    let (deploy, server, hold) = held(on, "apply.commit");
    let before = PkiState::read(&deploy);
    let ids: Vec<String> = before.leaves.keys().cloned().collect();
    let applied = asked(&server, "apply");
    let began = Instant::now();
    let committed = "SELECT COUNT(*) FROM update_runs WHERE committed_at IS NOT NULL AND finished_at IS NULL";
    while deploy.count(committed) == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "the run was never committed");
        std::thread::sleep(Duration::from_millis(20));
    }
    let renewed = server.post(&format!("/v1/admin/agents/{}/renew", ids[0]), &json!({}));
    assert_eq!(renewed.status, 200, "{renewed:?}");
    let gone = format!("/v1/admin/agents/{}?permanently=true", ids[1]);
    assert_eq!(request(&server.url, "DELETE", &gone, Some(ADMIN_SECRET), None).status, 204);
    std::fs::remove_file(hold).unwrap();
    let answer = applied.join().unwrap();
    let failures =
        deploy.rows("SELECT details FROM audit_events WHERE event_type = 'admin.update_apply_failed'");
    assert_eq!(answer.status, 200, "{answer:?} {failures:?}");
    assert!(!server.halted(), "agents that go on are no reason to halt");
    assert_eq!(status_of(&server, LEAF_PROFILE).as_deref(), Some("applied"));
    let after = PkiState::read(&deploy);
    assert!(!after.leaves.contains_key(&ids[1]));
    let cert_pem = renewed.json()["cert_pem"].as_str().unwrap().to_owned();
    assert_eq!(certificate(&after.leaves[&ids[0]]), certificate(&cert_pem));
    assert_eq!(open_runs(&deploy), 0);
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn agents_go_on_between_the_commit_and_the_activation_on_sqlite() {
    goes_on_before_the_activation(On::Sqlite);
}

#[test]
fn agents_go_on_between_the_commit_and_the_activation_on_postgresql() {
    goes_on_before_the_activation(On::Postgres);
}
