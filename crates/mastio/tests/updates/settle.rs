//! The end of the trust overlap: who blocks it, what it destroys, that it is one step, and that nothing goes back.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Deploy, MIGRATION, On, Server, output, run, variable};

const FIXTURE: &str = "py_mixed_byoca_pending";

fn settle(server: &Server, body: &Value) -> (u16, Value) {
    let answer = server.post("/v1/admin/pki/settle", body);
    (answer.status, answer.json())
}

fn overlap(server: &Server) -> Value {
    server.get("/v1/admin/pki/overlap").json()
}

fn reason(answer: &(u16, Value)) -> &str {
    assert_eq!(answer.0, 409, "{answer:?}");
    answer.1["detail"]["reason"].as_str().unwrap_or_default()
}

fn yes() -> Value {
    json!({ "confirm": true })
}

/// The certificates that the server sends in its handshake.
fn presented(server: &Server) -> usize {
    let address = server.url.trim_start_matches("https://").replace("localhost", "127.0.0.1");
    let sent = run(Command::new("openssl").args(["s_client", "-connect", &address, "-showcerts"]));
    String::from_utf8_lossy(&sent.stdout).matches("-----BEGIN CERTIFICATE-----").count()
}

/// Whether a client that trusts `root` alone reaches the server.
fn reaches(deploy: &Deploy, server: &Server, root: &str) -> bool {
    let file = deploy.folder().join("pinned.pem");
    std::fs::write(&file, root).unwrap();
    let url = format!("{}/healthz", server.url);
    run(Command::new("curl").args(["-s", "--max-time", "20", "--cacert"]).arg(&file).arg(url))
        .status
        .success()
}

fn eventually(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !look() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Nothing of the retired key is left, former leaves are forgotten, and there is no way back.
fn is_settled(deploy: &Deploy, server: &Server, old_root: &str) {
    assert_eq!(overlap(server)["overlap"], false);
    assert_eq!(deploy.count("SELECT COUNT(*) FROM pki_anchors WHERE key_sealed IS NOT NULL"), 0);
    assert_eq!(deploy.count("SELECT COUNT(*) FROM pki_anchors WHERE state = 'retiring'"), 0);
    assert_eq!(deploy.count("SELECT COUNT(*) FROM superseded_certificates"), 0);
    let kept = "SELECT COUNT(*) FROM update_images WHERE sealed = 1 \
                AND COALESCE(before, restore, after) IS NOT NULL";
    assert_eq!(deploy.count(kept), 0, "a private key in a snapshot");
    for answer in [server.rollback(), server.get(&format!("/proxy/updates/{MIGRATION}/rollback-plan"))] {
        assert_eq!(reason(&(answer.status, answer.json())), "settled");
    }
    let listed = server.get("/proxy/updates/snapshots").json();
    let snapshot = listed.as_array().unwrap().iter().find(|one| one["migration_id"] == MIGRATION).unwrap();
    assert!(snapshot["settled_at"].is_string() && snapshot["sound"] == true, "{snapshot}");
    assert_eq!(server.ca().matches("BEGIN CERTIFICATE").count(), 1);
    assert!(!reaches(deploy, server, old_root), "a client that pins the retired root still connects");
    assert!(reaches(deploy, server, &server.ca()), "a client that pins the new root does not connect");
    assert_eq!(reason(&settle(server, &yes())), "no_overlap");
    let ended = "SELECT COUNT(*) FROM audit_events WHERE event_type = 'pki.overlap_ended'";
    assert_eq!(deploy.count(ended), 1);
    deploy.audit_verifies();
}

fn an_overlap_ends(on: On) {
    let deploy = Deploy::of(FIXTURE).on(on);
    let server = deploy.start();
    let old_root = server.ca();
    assert_eq!(overlap(&server)["overlap"], false);
    assert_eq!(reason(&settle(&server, &yes())), "no_overlap");
    assert_eq!(server.apply().status, 200);

    // An owner's certificate stands under the retiring root alone, and is named.
    let told = overlap(&server);
    assert_eq!(told["retiring"][0]["key"], "here", "{told}");
    let byoca = deploy
        .count("SELECT COUNT(*) FROM internal_agents WHERE enrollment_method = 'byoca' AND is_active = 1");
    assert!(byoca > 0);
    assert_eq!(told["blocking"]["count"], byoca, "{told}");
    assert_eq!(told["blocking"]["agents"][0]["enrollment"], "byoca");
    assert_eq!(told["settling"]["refused"]["reason"], "agents_block");
    assert_eq!(told["settling"]["ends_rollback_of"], json!([MIGRATION]));
    assert!(told["cannot_be_seen"].as_array().unwrap().len() >= 3);
    let blocked = settle(&server, &json!({ "confirm": true, "break_agents": true }));
    assert_eq!(reason(&blocked), "agents_block");
    assert_eq!(blocked.1["detail"]["count"], byoca);
    for body in [json!({}), json!({ "confirm": "yes" }), json!({ "confirm": true, "break_agents": 1 })] {
        assert_eq!(settle(&server, &body).0, 400, "{body}");
    }
    assert!(reaches(&deploy, &server, &old_root));
    assert_eq!(presented(&server), 2);
    for agent in told["blocking"]["agents"].as_array().unwrap() {
        let path = format!("/v1/admin/agents/{}", agent["agent_id"].as_str().unwrap());
        assert_eq!(server.request("DELETE", &path, Some(crate::server::ADMIN_SECRET), None).status, 204);
    }

    // An agent that presents a former leaf is named, and breaks only where the operator says so.
    let former =
        deploy.rows("SELECT agent_id, fingerprint FROM superseded_certificates ORDER BY agent_id")[0].clone();
    let (agent_id, fingerprint) =
        (former["agent_id"].as_str().unwrap(), former["fingerprint"].as_str().unwrap());
    deploy.execute(&format!(
        "INSERT INTO presented_certificates (agent_id, fingerprint, seen_at) VALUES ('{agent_id}', '{fingerprint}', 1800000000)"
    ));
    let told = overlap(&server);
    assert_eq!(told["agents"]["on_old_leaf"], 1, "{told}");
    assert_eq!(told["on_old_leaf"][0]["seen_at"], "2027-01-15T08:00:00Z");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("cullis_agents_on_old_leaf 1") && metrics.contains("cullis_retiring_anchors 1"));
    let refused = settle(&server, &yes());
    assert_eq!(reason(&refused), "agents_on_old_leaf");
    assert_eq!(refused.1["detail"]["agents"][0]["agent_id"], agent_id);
    let dry = server.post("/v1/admin/pki/settle?dry_run=true", &json!({})).json();
    assert_eq!(dry["settling"]["refused"]["reason"], "agents_on_old_leaf");

    // Other replicas follow.
    let other = (on == On::Postgres).then(|| deploy.replica());
    let follower = other.as_ref().map(Deploy::start);
    let shown = run(deploy.mastio(&["pki", "overlap"]).env("COLUMNS", "200"));
    if on == On::Sqlite {
        assert!(String::from_utf8_lossy(&shown.stdout).contains(agent_id), "{shown:?}");
    }
    let settled = settle(&server, &json!({ "confirm": true, "break_agents": true }));
    assert_eq!(settled.0, 200, "{settled:?}");
    assert_eq!(settled.1["ended_rollback_of"], json!([MIGRATION]));
    is_settled(&deploy, &server, &old_root);
    if let (Some(other), Some(follower)) = (&other, &follower) {
        eventually("the other replica to follow", || {
            follower.ca().matches("BEGIN CERTIFICATE").count() == 1 && !reaches(other, follower, &old_root)
        });
        assert!(reaches(other, follower, &server.ca()));
    }
    drop(follower);
    server.stop();
    let server = deploy.start();
    is_settled(&deploy, &server, &old_root);
}

#[test]
fn an_overlap_ends_by_confirmation_on_sqlite() {
    an_overlap_ends(On::Sqlite);
}

#[test]
fn an_overlap_ends_by_confirmation_on_postgres() {
    an_overlap_ends(On::Postgres);
}

#[test]
fn a_crash_around_the_end_of_an_overlap_leaves_it_whole_or_ended() {
    for on in On::BOTH {
        let applied = Deploy::of("py_connector5_pending").on(on);
        let server = applied.start();
        let old_root = server.ca();
        assert_eq!(server.apply().status, 200);
        server.stop();
        for (point, ended) in [("settle.commit.before", false), ("settle.commit", true)] {
            let deploy = applied.copy();
            let server = deploy.start_to_crash_at(point);
            server.post("/v1/admin/pki/settle", &yes());
            server.dies();
            let server = deploy.start();
            if !ended {
                assert_eq!(overlap(&server)["overlap"], true, "{point} on {}", on.name());
                assert_eq!(overlap(&server)["retiring"][0]["key"], "here");
                assert!(reaches(&deploy, &server, &old_root), "{point} on {}", on.name());
                assert_eq!(settle(&server, &yes()).0, 200);
            }
            is_settled(&deploy, &server, &old_root);
        }
    }
}

#[test]
fn a_stopped_deploy_ends_its_overlap_by_the_command_line() {
    let deploy = Deploy::of("py_connector5_pending");
    let server = deploy.start();
    let old_root = server.ca();
    assert_eq!(server.apply().status, 200);
    server.stop();
    let unconfirmed = run(&mut deploy.mastio(&["pki", "settle"]));
    assert_eq!(unconfirmed.status.code(), Some(2), "{unconfirmed:?}");
    let settled = run(&mut deploy.mastio(&["pki", "settle", "--yes", "--json"]));
    assert!(settled.status.success(), "{settled:?}");
    let again = run(&mut deploy.mastio(&["pki", "settle", "--yes"]));
    assert_eq!(again.status.code(), Some(3), "{again:?}");
    is_settled(&deploy, &deploy.start(), &old_root);
}

/// A self-signed CA whose validity is over.
const EXPIRED_CA: &str = r#"
import datetime, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an old CA")])
now = datetime.datetime.now(datetime.timezone.utc)
day = datetime.timedelta(days=1)
certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    .serial_number(x509.random_serial_number()).not_valid_before(now - 9 * day).not_valid_after(now - day)
    .add_extension(x509.BasicConstraints(True, 1), True).sign(key, hashes.SHA256()))
print(certificate.fingerprint(hashes.SHA256()).hex())
print(certificate.public_bytes(serialization.Encoding.PEM).decode(), end="")
"#;

#[test]
fn an_overlap_ends_when_the_replaced_root_expires() {
    let deploy = Deploy::fresh();
    let server = deploy.start();
    let made = output(Command::new(variable("MASTIO_TEST_JUDGES_PYTHON")).args(["-c", EXPIRED_CA]));
    let (fingerprint, pem) = made.split_once('\n').unwrap();
    deploy.execute(&format!(
        "INSERT INTO pki_anchors (fingerprint, cert_pem, state, added_at, added_by) \
         VALUES ('{fingerprint}', '{pem}', 'retiring', '2026-01-01T00:00:00Z', 'test'); \
         UPDATE audit_head SET epoch = epoch + 1"
    ));
    eventually("the expired root to retire", || {
        deploy.count("SELECT COUNT(*) FROM pki_anchors WHERE state = 'retired'") == 1
    });
    let events = server.get("/v1/admin/audit?event_type=pki.overlap_ended").json();
    assert_eq!(
        (events[0]["actor"].as_str(), events[0]["details"]["why"].as_str()),
        (Some("system"), Some("expired"))
    );
    assert_eq!(overlap(&server)["overlap"], false);
}
