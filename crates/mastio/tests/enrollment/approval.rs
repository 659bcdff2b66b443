//! Enrollment by an operator's approval.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::sdk::{Agent, Python, TOOL, Upstream};
use crate::harness::{Answer, Database, Deploy, certificates, run};
use crate::world::{
    ClientKey, Identity, approve, ca_file, events, fresh, managed, outcome, post_from, start,
};

/// The SDK asks for an identity and waits; the session that the operator decides on.
pub fn enroll(deploy: &Deploy, python: Python, name: &str) -> (Agent, String) {
    let mut agent = Agent::bare(python);
    let directory = deploy.folder().join(name);
    let started = agent
        .ask(&json!({
            "cmd": "enroll", "mastio_url": deploy.url(), "ca": ca_file(deploy), "save_to": directory,
            "requester_name": "Ada", "requester_email": "ada@example.com", "reason": "to read invoices",
            "poll_interval_s": 0.5,
        }))
        .unwrap();
    (agent, started["session_id"].as_str().unwrap().to_owned())
}

/// The SDK asks and waits, the operator approves over the API, the agent calls a tool; then once more, in place.
fn story(database: Database, python: Python) {
    let deploy = fresh(database);
    let upstream = Upstream::start();
    let (mut agent, session) = enroll(&deploy, python, "billing");

    let waiting = deploy.admin_get("/v1/admin/enrollments").expect(200);
    let row = &waiting[0];
    assert_eq!(
        (row["session_id"].as_str(), row["status"].as_str()),
        (Some(session.as_str()), Some("pending"))
    );
    assert_eq!(
        (row["requester_name"].as_str(), row["reason"].as_str()),
        (Some("Ada"), Some("to read invoices"))
    );
    assert_eq!(row["pubkey_fingerprint"].as_str().unwrap().len(), 64);

    let done = approve(&deploy, &session, "billing").expect(200);
    let agent_id = done["agent_id"].as_str().unwrap().to_owned();
    assert!(agent_id.ends_with("::billing"), "{agent_id}");
    agent.ask(&json!({ "cmd": "enroll-wait" })).unwrap();
    deploy.register_tool(TOOL, upstream.url(), &[&agent_id]);
    agent.call().unwrap();
    assert_eq!(agent.tools(), [TOOL]);
    let chain = fs::read_to_string(deploy.folder().join("billing/agent.crt")).unwrap();
    assert_eq!(certificates(&chain).len(), 2, "leaf and intermediate");
    let answer = agent.public_key(&agent_id).unwrap();
    assert_eq!(answer.as_str().or(answer["cert_pem"].as_str()), Some(chain.as_str()));
    let shown = deploy.admin_get(&format!("/v1/admin/agents/{agent_id}")).expect(200);
    assert_eq!(shown["capabilities"], json!(["invoices.read"]));
    assert_eq!(shown["enrollment"], "connector");
    assert!(shown["dpop_jkt"].is_string(), "the SDK's persistent key is pinned: {shown}");

    // Enrolled anew from another device: what the operator has set stays, and the former device goes on for a while.
    let (mut second, session) = enroll(&deploy, python, "billing-again");
    approve(&deploy, &session, &agent_id).expect(200);
    second.ask(&json!({ "cmd": "enroll-wait" })).unwrap();
    second.call().unwrap();
    agent.call().unwrap();
    let anew = deploy.admin_get(&format!("/v1/admin/agents/{agent_id}")).expect(200);
    assert_ne!(anew["certificate"]["spki_sha256"], shown["certificate"]["spki_sha256"]);
    assert_eq!(anew["previous_dpop_jkt"], shown["dpop_jkt"]);
    assert_eq!(events(&deploy, "enrollment.approved")[0]["details"]["enrolled_anew"], true);

    // An operator who says no is quoted.
    let (mut third, session) = enroll(&deploy, python, "stranger");
    let path = format!("/v1/admin/enrollments/{session}/reject");
    deploy.admin_post(&path, &json!({ "reason": "nobody knows you" })).expect(200);
    let raised = third.ask(&json!({ "cmd": "enroll-wait" })).unwrap_err();
    assert!(raised.class == "PermissionError" && raised.text.contains("nobody knows you"), "{raised:?}");
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn the_sdk_enrolls_by_approval_and_again_in_place_on_sqlite() {
    story(Database::Sqlite, Python::Plain);
}

#[test]
fn the_sdk_enrolls_by_approval_and_again_in_place_on_postgresql() {
    story(Database::Postgres, Python::Plain);
}

#[test]
fn the_sdk_on_a_strict_python_enrolls_by_approval_and_again_in_place_on_sqlite() {
    story(Database::Sqlite, Python::Strict);
}

#[test]
fn the_sdk_on_a_strict_python_enrolls_by_approval_and_again_in_place_on_postgresql() {
    story(Database::Postgres, Python::Strict);
}

#[test]
fn the_outcome_is_read_with_a_proof_of_the_same_key_alone() {
    let deploy = fresh(Database::Sqlite);
    let (key, other) = (ClientKey::new(), ClientKey::new());
    let mut body = key.ask();
    body["dpop_jwk"] = other.jwk();
    let session = start(&deploy, &body);
    assert_eq!(session.len(), 32);
    let proof = key.status_proof(&session);
    assert_eq!(outcome(&deploy, &session, Some(&proof))["status"], "pending");
    // Given whole, the id is not put before itself.
    let org = deploy.admin_get("/v1/admin/agents").expect(200);
    assert_eq!(org, json!([]));
    let agent_id = approve(&deploy, &session, "reader").expect(200)["agent_id"].clone();
    let whole = outcome(&deploy, &session, Some(&proof));
    assert_eq!((&whole["status"], &whole["agent_id"]), (&json!("approved"), &agent_id));
    assert_eq!(whole["capabilities"], json!(["invoices.read"]));
    assert!(whole["cert_pem"].is_string() && whole["rejection_reason"].is_null());
    for wrong in [None, Some(other.status_proof(&session)), Some(key.status_proof("another"))] {
        let bare = outcome(&deploy, &session, wrong.as_deref());
        assert_eq!(bare["status"], "approved");
        for field in ["agent_id", "cert_pem", "capabilities", "rejection_reason"] {
            assert!(bare[field].is_null(), "{field} without a proof: {bare}");
        }
    }
    // Padding is accepted, as the wire contract says.
    let padded = format!("{proof}{}", "=".repeat((4 - proof.len() % 4) % 4));
    assert!(outcome(&deploy, &session, Some(&padded))["cert_pem"].is_string());
    assert_eq!(deploy.get("/v1/enrollment/unknown/status").status, 404);

    // Another key enrolls in its place: the former gets no certificate that is not its own.
    let again = start(&deploy, &other.ask());
    approve(&deploy, &again, agent_id.as_str().unwrap()).expect(200);
    let former = outcome(&deploy, &session, Some(&proof));
    assert_eq!(former["status"], "approved");
    assert!(former["cert_pem"].is_null(), "{former}");
}

#[test]
fn a_request_that_is_not_sound_is_refused_and_changes_nothing() {
    let deploy = fresh(Database::Sqlite);
    let (key, other) = (ClientKey::new(), ClientKey::new());
    let with = |field: &str, value: Value| {
        let mut body = key.ask();
        body[field] = value;
        body
    };
    let mut private = key.jwk();
    private["d"] = json!("AAAA");
    let mut without_proof = key.ask();
    without_proof.as_object_mut().unwrap().remove("pop_signature");
    let cases: [(&str, Value, u16); 19] = [
        ("another key's proof", with("pop_signature", other.ask()["pop_signature"].clone()), 400),
        ("no base64url", with("pop_signature", json!("%%%")), 400),
        ("a proof that is too long", with("pop_signature", json!("A".repeat(2049))), 400),
        ("no proof", without_proof, 422),
        ("another key", with("pubkey_pem", json!(other.public_pem())), 400),
        ("no key", with("pubkey_pem", json!("x".repeat(200))), 400),
        ("a short key", with("pubkey_pem", json!("x")), 422),
        ("a long key", with("pubkey_pem", json!("x".repeat(8193))), 422),
        ("a private key", with("pubkey_pem", json!(key.private_pem())), 400),
        ("no name", with("requester_name", json!("")), 422),
        ("a long name", with("requester_name", json!("x".repeat(201))), 422),
        ("no address", with("requester_email", json!("ada")), 422),
        ("a long address", with("requester_email", json!(format!("{}@b.c", "x".repeat(320)))), 422),
        ("a long reason", with("reason", json!("x".repeat(1001))), 422),
        ("a long device", with("device_info", json!("x".repeat(501))), 422),
        ("a private DPoP key", with("dpop_jwk", private), 400),
        ("no DPoP key", with("dpop_jwk", json!({ "kty": "oct", "k": "AAAA" })), 400),
        ("another type", with("principal_type", json!("user")), 422),
        ("no object", json!([1]), 422),
    ];
    for (number, (what, body, status)) in cases.into_iter().enumerate() {
        let answer = post_from(&deploy, &format!("127.0.1.{}", number + 1), "/v1/enrollment/start", &body);
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.json()["detail"] != Value::Null, "{what}: {answer:?}");
    }
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM enrollment_requests"), "0");
    assert!(events(&deploy, "enrollment.requested").is_empty());
    // What is at its limits is taken.
    let body = json!({ "reason": "r".repeat(1000), "requester_name": "n".repeat(200), "device_info": "d".repeat(500) });
    let mut at_limit = key.ask();
    for (field, value) in body.as_object().unwrap() {
        at_limit[field] = value.clone();
    }
    at_limit["principal_type"] = json!("agent");
    start(&deploy, &at_limit);
}

#[test]
fn an_operator_decides_once_and_only_while_the_request_waits() {
    let deploy = fresh(Database::Sqlite);
    let key = ClientKey::new();
    let session = start(&deploy, &key.ask());
    let path = |session: &str, verb: &str| format!("/v1/admin/enrollments/{session}/{verb}");
    for (body, status) in [
        (json!({ "agent_id": "" }), 422),
        (json!({ "agent_id": "a b" }), 422),
        (json!({ "agent_id": "other-org::billing" }), 422),
        (json!({ "agent_id": "x".repeat(65) }), 422),
        (json!({ "capabilities": [] }), 422),
        (json!({ "agent_id": "billing", "capabilities": vec!["c"; 257] }), 422),
    ] {
        assert_eq!(deploy.admin_post(&path(&session, "approve"), &body).status, status, "{body}");
    }
    for (reason, status) in [(String::new(), 422), ("x".repeat(501), 422)] {
        let body = json!({ "reason": reason });
        assert_eq!(deploy.admin_post(&path(&session, "reject"), &body).status, status);
    }
    assert_eq!(approve(&deploy, "unknown", "billing").status, 404);
    assert_eq!(deploy.get("/v1/admin/enrollments").status, 401);
    let without_secret =
        ["-X", "POST", "-H", "Content-Type: application/json", "-d", "{\"agent_id\":\"billing\"}"];
    assert_eq!(deploy.curl(&path(&session, "approve"), &without_secret).status, 401);
    approve(&deploy, &session, "billing").expect(200);
    let again = approve(&deploy, &session, "billing");
    assert_eq!(again.expect(409)["detail"], format!("enrollment {session} is approved, not pending"));
    assert_eq!(deploy.admin_post(&path(&session, "reject"), &json!({ "reason": "late" })).status, 409);

    // Expired: by its own clock, with nobody doing anything.
    let late = start(&deploy, &ClientKey::new().ask());
    deploy.sql(&format!("UPDATE enrollment_requests SET expires_at = 1 WHERE session_id = '{late}'"));
    assert_eq!(outcome(&deploy, &late, None)["status"], "expired");
    assert_eq!(approve(&deploy, &late, "late").status, 409);
    assert_eq!(deploy.admin_get("/v1/admin/enrollments").expect(200), json!([]));
    let expired = deploy.admin_get("/v1/admin/enrollments?status=expired").expect(200);
    assert_eq!(expired[0]["session_id"], json!(late));
    assert_eq!(deploy.admin_get("/v1/admin/enrollments?status=lost").status, 400);
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM internal_agents"), "1");
}

#[test]
fn an_agent_that_is_inactive_or_its_owner_s_is_not_enrolled_over() {
    let deploy = fresh(Database::Sqlite);
    let (id, cert_pem, key_pem) = managed(&deploy, "billing");
    deploy.admin_post(&format!("/v1/admin/agents/{id}/deactivate"), &json!({})).expect(200);
    let session = start(&deploy, &ClientKey::new().ask());
    let refused = approve(&deploy, &session, "billing").expect(409);
    assert!(refused["detail"].as_str().unwrap().contains("inactive"), "{refused}");
    deploy.admin_post(&format!("/v1/admin/agents/{id}/reactivate"), &json!({})).expect(200);
    deploy.sql("UPDATE internal_agents SET enrollment_method = 'byoca'");
    let refused = approve(&deploy, &session, "billing").expect(409);
    assert!(refused["detail"].as_str().unwrap().contains("enrolled as byoca"), "{refused}");
    deploy.sql("UPDATE internal_agents SET enrollment_method = 'connector'");
    // The key that we held for the managed agent is not the new one's.
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM proxy_config WHERE key LIKE 'agent_key:%'"), "1");
    approve(&deploy, &session, "billing").expect(200);
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM proxy_config WHERE key LIKE 'agent_key:%'"), "0");
    // The former certificate is in its grace, and no longer.
    let former = Identity::new(&deploy, "former", &cert_pem, &key_pem);
    former.challenge(&deploy).expect(200);
    deploy.sql("UPDATE internal_agents SET previous_grace_period_expires_at = '2020-01-01T00:00:00Z'");
    crate::harness::wait_for("the grace to end", || (former.challenge(&deploy).status == 401).then_some(()));
    assert_eq!(former.refusal(&deploy), "client_cert_pin_mismatch");
}

#[test]
fn a_workload_is_enrolled_under_its_own_name_and_pinned_by_its_key() {
    let deploy = fresh(Database::Sqlite);
    let key = ClientKey::new();
    let mut body = key.ask();
    body["principal_type"] = json!("workload");
    let session = start(&deploy, &body);
    let agent_id = approve(&deploy, &session, "batch").expect(200)["agent_id"].as_str().unwrap().to_owned();
    assert!(agent_id.ends_with("::workload::batch"), "{agent_id}");
    let proof = key.status_proof(&session);
    let cert_pem = outcome(&deploy, &session, Some(&proof))["cert_pem"].as_str().unwrap().to_owned();
    let identity = Identity::new(&deploy, "batch", &cert_pem, &key.private_pem());
    assert_eq!(identity.challenge(&deploy).expect(200)["agent_id"], json!(agent_id));
    // Renewed for the same key, the former certificate goes on: it is the key that is pinned.
    deploy.admin_post(&format!("/v1/admin/agents/{agent_id}/renew"), &json!({})).expect(200);
    deploy.sql("UPDATE internal_agents SET previous_cert_pem = NULL");
    identity.challenge(&deploy).expect(200);
}

#[test]
fn under_a_halt_a_request_may_be_made_and_rejected_but_not_approved() {
    let Some(mut deploy) = Deploy::legacy("v01_healthy_pathlen1").or_else(|| Deploy::legacy("v01_root5"))
    else {
        return;
    };
    deploy.start();
    let key = ClientKey::new();
    let session = start(&deploy, &key.ask());
    // A critical update that this binary does not know halts too.
    deploy.sql(
        "INSERT INTO pending_updates (migration_id, detected_at, status) VALUES ('2099-01-01-unknown', '2026-01-01T00:00:00Z', 'pending')",
    );
    crate::harness::wait_for("the halt", || deploy.is_halted().then_some(()));
    let refused: Answer = approve(&deploy, &session, "billing");
    assert!(refused.expect(503)["detail"].as_str().unwrap().starts_with("signing halted"));
    assert_eq!(outcome(&deploy, &session, None)["status"], "pending");
    let second = start(&deploy, &ClientKey::new().ask());
    let path = format!("/v1/admin/enrollments/{second}/reject");
    deploy.admin_post(&path, &json!({ "reason": "not now" })).expect(200);
    deploy.sql("UPDATE pending_updates SET status = 'rolled_back'");
    crate::harness::wait_for("the halt to be lifted", || (!deploy.is_halted()).then_some(()));
}

#[test]
fn a_source_asks_five_times_a_minute_and_looks_sixty_times() {
    let deploy = fresh(Database::Sqlite);
    let key = ClientKey::new();
    let from = |source: &str| post_from(&deploy, source, "/v1/enrollment/start", &key.ask()).status;
    let statuses: Vec<u16> = (0..6).map(|_| from("127.0.0.2")).collect();
    assert_eq!(statuses, [201, 201, 201, 201, 201, 429]);
    assert_eq!(from("127.0.0.3"), 201, "another source has its own");
    // Sixty at once; a minute gives them back one by one, so a slow run may see a few more.
    let resolve = format!("localhost:{}:127.0.0.1", deploy.port());
    let mut curl = Command::new("curl");
    curl.args([
        "-sk",
        "--interface",
        "127.0.0.4",
        "--resolve",
        &resolve,
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} ",
    ]);
    let output = run(curl.arg(format!("{}/v1/enrollment/x/status?[1-90]", deploy.url())));
    let codes: Vec<&str> = output.split_whitespace().collect();
    let refused = codes.iter().filter(|code| **code == "429").count();
    assert!((1..=30).contains(&refused), "{refused} of {} were refused", codes.len());
}

#[test]
fn requests_that_wait_are_bounded_for_a_source_and_for_all() {
    let deploy = fresh(Database::Sqlite);
    let fill = |source: &str, rows: u32| {
        deploy.sql(&format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) INSERT INTO \
             enrollment_requests (session_id, status, spki_pem, spki_sha256, principal_type, requester_name, \
             requester_email, source, created_at, expires_at) SELECT '{source}-' || i, 'pending', '', '', 'agent', 'n', \
             'a@b.c', '{source}', 1, 4102444800 FROM n"
        ));
    };
    let key = ClientKey::new();
    fill("127.0.0.9", 50);
    let refused = post_from(&deploy, "127.0.0.9", "/v1/enrollment/start", &key.ask());
    assert_eq!(refused.status, 429, "{refused:?}");
    post_from(&deploy, "127.0.0.8", "/v1/enrollment/start", &key.ask()).expect(201);
    fill("192.0.2.1", 949);
    let refused = post_from(&deploy, "127.0.0.7", "/v1/enrollment/start", &key.ask());
    assert_eq!(refused.status, 503, "{refused:?}");
}

#[test]
fn the_command_line_decides_with_a_server_and_without() {
    let mut deploy = fresh(Database::Sqlite);
    let keys: Vec<ClientKey> = (0..3).map(|_| ClientKey::new()).collect();
    let sessions: Vec<String> = keys.iter().map(|key| start(&deploy, &key.ask())).collect();
    for (session, running) in [(&sessions[0], true), (&sessions[1], false)] {
        if !running {
            deploy.stop();
        }
        let list: Value =
            serde_json::from_str(&deploy.mastio_ok(&["enrollments", "list", "--json"])).unwrap();
        assert!(list.as_array().unwrap().iter().any(|row| row["session_id"] == json!(session)), "{list}");
        assert!(deploy.mastio_ok(&["enrollments", "list"]).contains("ada@example.com"));
        assert!(deploy.mastio_ok(&["enrollments", "show", session]).contains("to read invoices"));
        let name = if running { "with-server" } else { "without-server" };
        let approved = deploy.mastio_ok(&["enrollments", "approve", session, "--agent-id", name]);
        assert!(approved.contains(name), "{approved}");
        let again = deploy.mastio(&["enrollments", "approve", session, "--agent-id", name]);
        assert_eq!(again.status.code(), Some(3), "decided already");
    }
    assert!(
        deploy.mastio_ok(&["enrollments", "reject", &sessions[2], "--reason", "no"]).contains("rejected")
    );
    deploy.start();
    let proof = keys[2].status_proof(&sessions[2]);
    let rejected = outcome(&deploy, &sessions[2], Some(&proof));
    assert_eq!(
        (rejected["status"].as_str(), rejected["rejection_reason"].as_str()),
        (Some("rejected"), Some("no"))
    );
    let actors: Vec<Value> =
        events(&deploy, "enrollment.approved").into_iter().map(|event| event["actor"].clone()).collect();
    assert_eq!(actors, ["command-line", "admin"]);
}
