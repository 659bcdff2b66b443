//! Certification paths that must not be believed, presented at both doors, and judged by others beside us.
//!
//! `judges/path_attacks.py` makes them with the keys of a legacy deploy's CAs, presents them and asks OpenSSL and pyca;
//! here each is registered for its agent, so that the path alone decides, and what came of it is compared.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Deploy, required_environment, run, wait_for};
use crate::world::Identity;

fn attacks(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges/path_attacks.py");
    run(Command::new(required_environment("MASTIO_TEST_PYTHON")).arg(script).args(arguments))
}

fn cases(folder: &Path) -> Vec<Value> {
    let stored: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
    stored["cases"].as_array().unwrap().clone()
}

/// Puts a case's agent into the table, as an operator's SQL could.
fn register(case: &Value) -> String {
    let text = |field: &str| case[field].as_str().unwrap();
    let (agent, state) = (text("agent"), text("state"));
    if state == "absent" {
        return String::new();
    }
    let active = i32::from(state != "inactive");
    let previous = if state == "superseded" {
        format!("'{}', '2020-01-01T00:00:00Z'", case["chain"][0].as_str().unwrap())
    } else {
        "NULL, NULL".to_owned()
    };
    let mut sql = format!(
        "INSERT OR REPLACE INTO internal_agents (agent_id, display_name, capabilities, cert_pem, created_at, is_active, \
         federated, enrollment_method, previous_cert_pem, previous_grace_period_expires_at) VALUES ('{agent}', 'path', \
         '[]', '{}', '2026-01-01T00:00:00Z', {active}, 0, 'connector', {previous});\n",
        text("registered")
    );
    if state == "superseded_by_update" {
        sql.push_str(&format!(
            "INSERT INTO superseded_certificates (fingerprint, agent_id, spki_sha256, superseded_at, superseded_by) \
             VALUES ('{}', '{agent}', '', '2026-01-01T00:00:00Z', 'a run');\n",
            text("fingerprint")
        ));
    }
    sql
}

#[test]
fn no_path_that_must_not_be_believed_is_believed_at_either_door() {
    let Some(mut deploy) = Deploy::legacy("v01_healthy_pathlen1") else { return };
    let folder = deploy.folder().to_owned();
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    for key in ["org_ca_cert", "org_ca_key", "mastio_ca_cert", "mastio_ca_key"] {
        let value = deploy.sql(&format!("SELECT value FROM proxy_config WHERE key = '{key}'"));
        fs::write(file(key), format!("{value}\n")).unwrap();
    }
    let made = attacks(&[
        "make",
        folder.to_str().unwrap(),
        &file("org_ca_cert"),
        &file("org_ca_key"),
        &file("mastio_ca_cert"),
        &file("mastio_ca_key"),
        "legacy-org",
        "cullis.local",
    ]);
    println!("{} cases", made.trim());
    let mut deploy_settings = deploy;
    deploy_settings = deploy_settings.set("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0");
    deploy = deploy_settings;
    deploy.start();
    assert!(!deploy.is_halted(), "a halt would refuse every token");
    let cases_made = cases(&folder);
    let sql: String = cases_made.iter().map(register).collect();
    // Longer than a command line may be.
    fs::write(file("register.sql"), format!("BEGIN IMMEDIATE;\n{sql}COMMIT;\n")).unwrap();
    deploy.sql(&format!(".read {}", file("register.sql")));
    for case in cases_made.iter().filter(|case| case["state"] == "revoked") {
        deploy.admin_post("/v1/admin/certs/revoke", &json!({ "agent_id": case["agent"] })).expect(200);
    }
    let sound = &cases_made[0];
    let identity =
        Identity::new(&deploy, "sound", sound["chain"][0].as_str().unwrap(), sound["key"].as_str().unwrap());
    wait_for("the registrations to be seen", || (identity.challenge(&deploy).status == 200).then_some(()));

    attacks(&["present", folder.to_str().unwrap(), &deploy.url()]);
    println!("{}", attacks(&["table", folder.to_str().unwrap()]));
    let (mut wrong, mut refused) = (Vec::new(), 0);
    for case in cases(&folder) {
        let what = case["what"].as_str().unwrap();
        for door in ["mtls", "token"] {
            let Some(expected) = case["expected"][door].as_str() else { continue };
            let (status, found) = (&case["found"][door][0], case["found"][door][1].as_str().unwrap());
            let good = if expected.is_empty() {
                status == 200
            } else {
                // OpenSSL will not send what it cannot read; the handshake refuses keys that sign no handshake.
                *status == Value::Null || (*status == 401 && found == expected)
            };
            if !good {
                wrong.push(format!("{what}, {door}: expected {expected:?}, found {status} {found:?}"));
            }
            refused += i32::from(!expected.is_empty());
        }
        let refused_by_us = case["expected"]["token"] != "";
        let accepted_elsewhere = case["openssl"] == "accepts" || case["cryptography"] == "accepts";
        if refused_by_us && accepted_elsewhere && case["why"] == "" {
            wrong.push(format!("{what}: others believe it, and nobody says why we do not"));
        }
        if !refused_by_us && case["openssl"] != "accepts" {
            wrong.push(format!("{what}: OpenSSL does not believe what is sound: {}", case["openssl"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Each reason is in the audit log, at both doors; a flood of one is summed up, so not each refusal is.
    for route in ["/v1/auth/login-challenge", "/v1/auth/token"] {
        for reason in [
            "client_cert_path_invalid",
            "client_cert_org_mismatch",
            "client_cert_no_identity",
            "client_cert_pin_mismatch",
            "agent_unknown_or_inactive",
            "client_cert_revoked",
        ] {
            let filter = format!(
                "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.refused' AND \
                 json_extract(details, '$.route') = '{route}' AND json_extract(details, '$.reason') = '{reason}'"
            );
            assert_ne!(deploy.sql(&filter), "0", "{route} {reason}");
        }
    }
    assert!(refused >= 120, "{refused} refusals");
    if std::env::var_os("MASTIO_TEST_ALL").is_none() {
        return;
    }
    // And each refusal is counted, in an event of its own or in the sum of its minute.
    let made: u64 = cases(&folder)
        .iter()
        .flat_map(|case| ["mtls", "token"].map(|door| u64::from(case["found"][door][0] == 401)))
        .sum();
    let began = Instant::now();
    let told = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_secs(2));
        let sum = "SELECT COALESCE(SUM(json_extract(details, '$.count')), 0) FROM audit_events \
                   WHERE event_type = 'auth.refusals_summarised'";
        let each = "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.refused'";
        let told: u64 = [sum, each].map(|sql| deploy.sql(sql).trim().parse::<u64>().unwrap()).iter().sum();
        (began.elapsed() < Duration::from_secs(90)).then_some(told)
    })
    .find(|told| *told >= made);
    println!("{made} refusals, {told:?} in the log");
    assert!(told.is_some(), "{made} refusals are not all in the log");
}
