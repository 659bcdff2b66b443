//! Certificates that no longer count: at our own doors, and in the lists that others read.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mastio::demo::agent::{AgentClient, AgentError};
use serde_json::{Value, json};

use crate::harness::{Answer, Database, Deploy, certificates, openssl, run, wait_for};
use crate::world::{
    ClientKey, Identity, approve, events, fresh, fresh_with, managed, outcome, replica_of, start,
};

fn revoke(deploy: &Deploy, body: &Value) -> Answer {
    deploy.admin_post("/v1/admin/certs/revoke", body)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

/// The stable reason and status of a refusal.
fn refused<T>(result: Result<T, AgentError>) -> (u16, String) {
    match result {
        Err(AgentError::Refused { status, detail, .. }) => (status, detail),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

fn serial(pem: &str) -> String {
    let shown = openssl(&["x509", "-noout", "-serial"], pem);
    shown.strip_prefix("serial=").unwrap().to_ascii_lowercase()
}

/// What OpenSSL says of a chain when it looks into our lists: `ok`, or its error.
fn judged(deploy: &Deploy, chain: &str) -> String {
    let file = |name: &str, text: &str| -> PathBuf {
        let path = deploy.folder().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let chain = certificates(chain);
    let mut command = Command::new("openssl");
    command
        .args(["verify", "-x509_strict", "-crl_check", "-CAfile"])
        .arg(file("judge-ca.pem", &deploy.get("/pki/ca.crt").body));
    command.arg("-untrusted").arg(file("judge-untrusted.pem", &chain[1..].concat()));
    command.arg("-CRLfile").arg(file("judge-crl.pem", &deploy.get("/pki/crl.pem").body));
    let output = command.arg(file("judge-leaf.pem", &chain[0])).output().unwrap();
    if output.status.success() {
        return "ok".to_owned();
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let error =
        said.lines().find_map(|line| line.split_once(": ").filter(|_| line.contains("error "))).unwrap();
    error.1.trim().to_owned()
}

/// crlNumber of `/pki/crl`, as OpenSSL reads it.
fn number(deploy: &Deploy) -> u64 {
    let path = deploy.folder().join("now.crl");
    deploy.curl("/pki/crl", &["-o", path.to_str().unwrap()]);
    let text = run(Command::new("openssl")
        .args(["crl", "-inform", "DER", "-noout", "-crlnumber", "-in"])
        .arg(&path));
    u64::from_str_radix(text.trim().trim_start_matches("crlNumber=").trim_start_matches("0x"), 16).unwrap()
}

fn story(database: Database) {
    let deploy = fresh(database);
    let agent = managed(&deploy, "billing");
    let other = managed(&deploy, "other");
    let identity = Identity::new(&deploy, "billing", &agent.1, &agent.2);
    let runtime = runtime();
    let mut with_token = client_of(&deploy, &agent);
    runtime.block_on(with_token.login()).unwrap();
    runtime.block_on(with_token.list_tools()).unwrap();
    assert_eq!(judged(&deploy, &agent.1), "ok");
    let before = number(&deploy);
    assert_eq!(number(&deploy), before, "nothing to say, no other list");

    // Asked wrongly.
    for (body, status) in [
        (json!({}), 422),
        (json!({ "serial_hex": "01", "agent_id": "billing" }), 422),
        (json!({ "agent_id": "billing", "reason": "certificateHold" }), 422),
        (json!({ "agent_id": "billing", "reason": "because" }), 422),
        (json!({ "agent_id": "nobody" }), 404),
        (json!({ "serial_hex": "deadbeef" }), 404),
    ] {
        assert_eq!(revoke(&deploy, &body).status, status, "{body}");
    }
    assert_eq!(deploy.curl("/v1/admin/certs/revoke", &["-X", "POST"]).status, 401);
    assert!(events(&deploy, "pki.certificate_revoked").is_empty());

    // By the serial, as OpenSSL prints it.
    let done =
        revoke(&deploy, &json!({ "serial_hex": serial(&agent.1), "reason": "keyCompromise" })).expect(200);
    assert_eq!(done["revoked"][0]["agent_id"], json!(agent.0));
    assert_eq!(identity.refusal(&deploy), "client_cert_revoked");
    let (status, detail) = refused(runtime.block_on(with_token.mint()));
    assert!(status == 401 && detail.contains("client_cert_revoked"), "{status} {detail}");
    let (status, detail) = refused(runtime.block_on(with_token.list_tools()));
    assert!(status == 401 && detail.contains("token_revoked"), "{status} {detail}");
    assert_eq!(judged(&deploy, &agent.1), "certificate revoked");
    assert_eq!(judged(&deploy, &other.1), "ok");
    assert!(number(&deploy) > before);
    let event = &events(&deploy, "pki.certificate_revoked")[0]["details"];
    assert_eq!((&event["reason"], &event["agent_id"]), (&json!("keyCompromise"), &json!(agent.0)));
    let again = revoke(&deploy, &json!({ "agent_id": "billing" }));
    assert_eq!(again.status, 409, "{again:?}");
    let listed = deploy.admin_get("/v1/admin/certs/revoked").expect(200);
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["reason"]), (1, &json!("keyCompromise")));

    // Enrolled again with another key, the agent goes on; the former certificate has no grace.
    let key = ClientKey::new();
    let session = start(&deploy, &key.ask());
    approve(&deploy, &session, "billing").expect(200);
    let chain = outcome(&deploy, &session, Some(&key.status_proof(&session)))["cert_pem"]
        .as_str()
        .unwrap()
        .to_owned();
    let anew = (agent.0.clone(), chain, key.private_pem());
    Identity::new(&deploy, "anew", &anew.1, &anew.2).challenge(&deploy).expect(200);
    assert_eq!(identity.refusal(&deploy), "client_cert_revoked");
    assert_eq!(judged(&deploy, &anew.1), "ok");

    // Set aside: on hold. Taken back: not listed any more. Deleted: listed for good.
    let post =
        |verb: &str| deploy.admin_post(&format!("/v1/admin/agents/other/{verb}"), &json!({})).expect(200);
    post("deactivate");
    assert_eq!(judged(&deploy, &other.1), "certificate revoked");
    assert!(
        run(Command::new("openssl")
            .args(["crl", "-noout", "-text", "-in"])
            .arg(deploy.folder().join("judge-crl.pem")))
        .contains("Certificate Hold")
    );
    post("reactivate");
    assert_eq!(judged(&deploy, &other.1), "ok");
    let last = number(&deploy);
    let secret = format!("X-Admin-Secret: {}", crate::harness::ADMIN_SECRET);
    let path = "/v1/admin/agents/other?permanently=true";
    assert_eq!(deploy.curl(path, &["-X", "DELETE", "-H", &secret]).status, 204);
    assert_eq!(judged(&deploy, &other.1), "certificate revoked");
    assert!(number(&deploy) > last, "the number only grows");
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn a_revoked_certificate_and_its_tokens_are_refused_at_every_door_and_listed_on_sqlite() {
    story(Database::Sqlite);
}

#[test]
fn a_revoked_certificate_and_its_tokens_are_refused_at_every_door_and_listed_on_postgresql() {
    story(Database::Postgres);
}

#[test]
fn a_list_is_exempt_from_the_halt_renewed_in_time_and_served_by_key() {
    let deploy = fresh(Database::Sqlite);
    let agent = managed(&deploy, "billing");
    deploy.sql(
        "INSERT INTO pending_updates (migration_id, detected_at, status) VALUES ('2099-01-01-unknown', '2026-01-01T00:00:00Z', 'pending')",
    );
    wait_for("the halt", || deploy.is_halted().then_some(()));
    let first = number(&deploy);
    revoke(&deploy, &json!({ "agent_id": "billing" })).expect(200);
    assert_eq!(number(&deploy), first + 1);
    assert_eq!(judged(&deploy, &agent.1), "certificate revoked");
    // Half of its time is over, by the clock of the row.
    deploy.sql("UPDATE pki_crls SET this_update = this_update - 43201");
    deploy.sql("UPDATE pending_updates SET status = 'rolled_back'");
    wait_for("the halt to be lifted", || (!deploy.is_halted()).then_some(()));
    deploy.wait_for_log("the end of the halt", |line| line["message"] == "cullis_proxy_sign_halt_lifted");
    assert_eq!(number(&deploy), first + 2);
    let keys = deploy.sql("SELECT DISTINCT issuer_key_id FROM pki_crls ORDER BY issuer_key_id");
    assert_eq!(keys.lines().count(), 2, "the intermediate's and the Org CA's");
    for key in keys.lines() {
        assert_eq!(deploy.curl(&format!("/pki/crl/{key}"), &["-o", "/dev/null"]).status, 200);
    }
    assert_eq!(deploy.get("/pki/crl/00ff").status, 404);
    // Who has it is told so.
    let head = run(Command::new("curl")
        .args(["-sk", "-D", "-", "-o", "/dev/null"])
        .arg(format!("{}/pki/crl", deploy.url())));
    let etag = head.lines().find_map(|line| {
        line.to_ascii_lowercase().starts_with("etag: ").then(|| line[6..].trim().to_owned())
    });
    assert!(head.contains("application/pkix-crl"), "{head}");
    let condition = format!("If-None-Match: {}", etag.unwrap());
    assert_eq!(deploy.curl("/pki/crl", &["-H", &condition]).status, 304);
}

#[test]
fn what_an_update_re_signs_stays_revoked_and_so_does_what_a_rollback_gives_back() {
    let Some(mut deploy) = Deploy::legacy("v01_root5") else { return };
    let keys = crate::harness::shared().unwrap().join("fixtures/legacy/keys/v01_root5");
    let files = |name: &str| {
        let read = |kind: &str| fs::read_to_string(keys.join(format!("{name}.{kind}"))).unwrap();
        (read("crt"), read("key"))
    };
    deploy.start();
    let id = |name: &str| format!("legacy-org::{name}");
    let identity = |name: &str| {
        let (certificate, key) = files(name);
        Identity::new(&deploy, name, &certificate, &key)
    };
    let (one, two, three) = (identity("agent-0001"), identity("agent-0002"), identity("agent-0003"));
    // Under the halt, before the apply.
    revoke(&deploy, &json!({ "agent_id": id("agent-0001") })).expect(200);
    let lists_before = number(&deploy);
    assert_eq!(one.refusal(&deploy), "client_cert_revoked");
    deploy.apply().expect(200);
    let leaf = |name: &str| {
        let shown = deploy.admin_get(&format!("/v1/admin/agents/{}", id(name))).expect(200);
        shown["cert_pem"].as_str().unwrap().to_owned()
    };
    let resigned = leaf("agent-0001");
    assert_ne!(serial(&resigned), serial(&files("agent-0001").0));
    assert_eq!(one.refusal(&deploy), "client_cert_revoked");
    let key = files("agent-0001").1;
    assert_eq!(Identity::new(&deploy, "resigned", &resigned, &key).refusal(&deploy), "client_cert_revoked");
    assert_eq!(judged(&deploy, &resigned), "certificate revoked");
    assert_eq!(judged(&deploy, &leaf("agent-0002")), "ok");
    two.challenge(&deploy).expect(200);
    // Between apply and rollback, the new certificate alone is named.
    revoke(&deploy, &json!({ "serial_hex": serial(&leaf("agent-0002")) })).expect(200);
    two.challenge(&deploy).expect(200);
    let second = Identity::new(&deploy, "second", &leaf("agent-0002"), &files("agent-0002").1);
    assert_eq!(second.refusal(&deploy), "client_cert_revoked");
    deploy.roll_back().expect(200);
    for (identity, name) in [(&one, "agent-0001"), (&two, "agent-0002")] {
        assert_eq!(identity.refusal(&deploy), "client_cert_revoked", "{name}");
        assert_eq!(serial(&leaf(name)), serial(&files(name).0), "{name}");
    }
    three.challenge(&deploy).expect(200);
    // The former Org CA signs lists again, and goes on counting.
    assert!(number(&deploy) > lists_before);
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn the_command_line_revokes_with_a_server_and_without() {
    let mut deploy = fresh(Database::Sqlite);
    let agents = [managed(&deploy, "one"), managed(&deploy, "two")];
    assert!(deploy.mastio_ok(&["pki", "revoked"]).contains("no certificate"));
    deploy.mastio_ok(&["pki", "revoke", "--serial", &serial(&agents[0].1), "--reason", "superseded"]);
    deploy.stop();
    assert!(deploy.mastio_ok(&["pki", "revoke", "--agent", "two"]).contains("two"));
    assert_eq!(deploy.mastio(&["pki", "revoke", "--agent", "two"]).status.code(), Some(3));
    let list: Value = serde_json::from_str(&deploy.mastio_ok(&["pki", "revoked", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    deploy.start();
    for (name, agent) in ["one", "two"].iter().zip(&agents) {
        assert_eq!(Identity::new(&deploy, name, &agent.1, &agent.2).refusal(&deploy), "client_cert_revoked");
    }
}

/// One request of a client under load: at which door, when it began and ended, and whether it succeeded.
struct Request {
    door: usize,
    began: Instant,
    ended: Instant,
    succeeded: bool,
}

const DOORS: [&str; 3] = ["mTLS", "token", "gateway"];

/// 64 clients of one agent at all doors of all replicas, while it is revoked: what the last success was.
fn under_load(replicas: &[&Deploy], how: &str) {
    const CLIENTS: usize = 64;
    /// Requests that every client makes at least after the answer.
    const AFTER: usize = 6;
    let agent = managed(replicas[0], "hammer");
    let bystander = managed(replicas[0], "bystander");
    let runtime = runtime();
    let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
    let (stopping, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None::<Instant>)));
    let mut clients = Vec::new();
    for index in 0..CLIENTS {
        let replica = replicas[index % replicas.len()];
        let mut client = client_of(replica, &agent);
        runtime.block_on(client.login()).unwrap();
        clients.push(client);
    }
    let tasks: Vec<_> = clients
        .into_iter()
        .enumerate()
        .map(|(index, client)| {
            let (requests, stopping, answered) =
                (Arc::clone(&requests), Arc::clone(&stopping), Arc::clone(&answered));
            runtime.spawn(async move {
                let mut after = 0;
                let mut turn = index;
                while !(stopping.load(Ordering::SeqCst) && after >= AFTER) {
                    let door = turn % DOORS.len();
                    turn += 1;
                    let began = Instant::now();
                    let result = match door {
                        0 => client.current_chain().await.map(drop),
                        1 => client.mint().await.map(drop),
                        _ => client.list_tools().await.map(drop),
                    };
                    let succeeded = match result {
                        Ok(()) => true,
                        // On a machine that is loaded besides, one may wait longer than it is patient.
                        Err(
                            AgentError::Refused { status: 401 | 503, .. } | AgentError::Unanswered { .. },
                        ) => false,
                        Err(other) => panic!("{}: {other}", DOORS[door]),
                    };
                    if answered.lock().unwrap().is_some_and(|answered| began > answered) {
                        after += 1;
                    }
                    requests.lock().unwrap().push(Request { door, began, ended: Instant::now(), succeeded });
                }
            })
        })
        .collect();
    let succeeded = |requests: &[Request]| -> [usize; 3] {
        let count =
            |door| requests.iter().filter(|request| request.door == door && request.succeeded).count();
        [count(0), count(1), count(2)]
    };
    wait_for("success at every door", || {
        succeeded(&requests.lock().unwrap()).iter().all(|count| *count >= CLIENTS).then_some(())
    });
    let asked = Instant::now();
    let answer = match how {
        "revoke" => revoke(replicas[0], &json!({ "agent_id": "hammer", "reason": "keyCompromise" })),
        _ => replicas[0].admin_post("/v1/admin/agents/hammer/deactivate", &json!({})),
    };
    let now = Instant::now();
    *answered.lock().unwrap() = Some(now);
    answer.expect(200);
    stopping.store(true, Ordering::SeqCst);
    for task in tasks {
        runtime.block_on(task).unwrap();
    }
    let requests = requests.lock().unwrap();
    let late: Vec<&Request> =
        requests.iter().filter(|request| request.succeeded && request.began > now).collect();
    let in_flight = requests
        .iter()
        .filter(|request| request.succeeded && request.began <= now && request.ended > now)
        .count();
    let after = requests.iter().filter(|request| request.began > now).count();
    let last =
        requests.iter().filter(|request| request.succeeded).map(|request| request.began).max().unwrap();
    println!(
        "{how} on {} replica(s): {:?} succeeded before at {DOORS:?}; the call took {} ms; the last success began {} ms before \
         its answer; {in_flight} that began before ended after; of {after} that began after, {} succeeded",
        replicas.len(),
        succeeded(&requests),
        (now - asked).as_millis(),
        now.saturating_duration_since(last).as_millis(),
        late.len()
    );
    assert!(after >= CLIENTS * AFTER, "{after}");
    assert!(late.is_empty(), "{} requests succeeded after the answer", late.len());
    for replica in replicas {
        let unhurt = client_of(replica, &bystander);
        runtime.block_on(unhurt.mint()).unwrap();
        runtime.block_on(unhurt.current_chain()).unwrap();
    }
    runtime.shutdown_timeout(Duration::from_secs(5));
}

fn client_of(deploy: &Deploy, agent: &(String, String, String)) -> AgentClient {
    // Once for all: the bundle is limited per source.
    let path = deploy.folder().join("load-ca.crt");
    if !path.exists() {
        fs::write(&path, deploy.get("/pki/ca.crt").body).unwrap();
    }
    let ca = fs::read_to_string(path).unwrap();
    AgentClient::new(&deploy.url(), &ca, &agent.1, &agent.2, &agent.0).unwrap()
}

#[test]
fn under_load_nothing_succeeds_after_the_revoking_call_s_answer_on_sqlite() {
    let deploy = fresh_with(Database::Sqlite, &[("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0")]);
    under_load(&[&deploy], "revoke");
}

#[test]
fn under_load_nothing_succeeds_after_the_revoking_call_s_answer_on_two_replicas() {
    let deploy = fresh_with(Database::Postgres, &[("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0")]);
    let replica = replica_of(&deploy);
    under_load(&[&deploy, &replica], "revoke");
}

#[test]
fn under_load_nothing_succeeds_after_the_deactivating_call_s_answer_on_two_replicas() {
    let deploy = fresh_with(Database::Postgres, &[("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0")]);
    let replica = replica_of(&deploy);
    under_load(&[&deploy, &replica], "deactivate");
}
