//! The life of an agent after its enrollment.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Database, Deploy, certificates, run, wait_for};
use crate::world::{ClientKey, Identity, events, fresh, managed};

/// A certificate request for `key`, made by OpenSSL.
fn request(deploy: &Deploy, key: &ClientKey) -> String {
    let file = deploy.folder().join("request.key");
    fs::write(&file, key.private_pem()).unwrap();
    run(Command::new("openssl").args(["req", "-new", "-subj", "/CN=whoever", "-key"]).arg(&file))
}

fn lifecycle(database: Database) {
    let deploy = fresh(database);
    let (id, cert_pem, key_pem) = managed(&deploy, "billing");
    let identity = Identity::new(&deploy, "billing", &cert_pem, &key_pem);
    identity.challenge(&deploy).expect(200);
    let post = |verb: &str| deploy.admin_post(&format!("/v1/admin/agents/{id}/{verb}"), &json!({}));

    // Set aside, also a second time, without a second event; taken back.
    assert_eq!(post("deactivate").expect(200)["is_active"], false);
    assert_eq!(identity.refusal(&deploy), "agent_unknown_or_inactive");
    post("deactivate").expect(200);
    assert_eq!(events(&deploy, "agent.deactivated").len(), 1);
    assert_eq!(post("renew").status, 409);
    assert_eq!(post("reactivate").expect(200)["is_active"], true);
    identity.challenge(&deploy).expect(200);
    assert_eq!(events(&deploy, "agent.reactivated").len(), 1);

    // Renewed by itself: same key, another certificate, the former one in its grace.
    let renewed = identity.request(&deploy, "/v1/agents/renew", &["-X", "POST"]).expect(200);
    assert_eq!(renewed["agent_id"], json!(id));
    let second_pem = renewed["cert_pem"].as_str().unwrap();
    assert_eq!(certificates(second_pem).len(), 2);
    let second = Identity::new(&deploy, "billing-2", second_pem, &key_pem);
    second.challenge(&deploy).expect(200);
    identity.challenge(&deploy).expect(200);
    // Who lost the answer asks again with what it has.
    let third_pem = identity.request(&deploy, "/v1/agents/renew", &["-X", "POST"]).expect(200);
    let third = Identity::new(&deploy, "billing-3", third_pem["cert_pem"].as_str().unwrap(), &key_pem);
    third.challenge(&deploy).expect(200);
    identity.challenge(&deploy).expect(200);
    assert_eq!(second.refusal(&deploy), "client_cert_pin_mismatch");

    // Another key: the request is signed by it, the connection by the former one.
    let key = ClientKey::new();
    let body = json!({ "csr_pem": request(&deploy, &key) }).to_string();
    let json_body = ["-H", "Content-Type: application/json", "-d", &body];
    let rekeyed = third.request(&deploy, "/v1/agents/renew", &json_body).expect(200);
    let fourth =
        Identity::new(&deploy, "billing-4", rekeyed["cert_pem"].as_str().unwrap(), &key.private_pem());
    fourth.challenge(&deploy).expect(200);
    third.challenge(&deploy).expect(200);
    let renewals = events(&deploy, "agent.certificate_renewed");
    assert_eq!((&renewals[0]["actor"], &renewals[0]["details"]["rekeyed"]), (&json!(id), &json!(true)));
    // The key that we held is not the agent's any more.
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM proxy_config WHERE key LIKE 'agent_key:%'"), "0");

    // Who proves nothing renews nothing.
    assert_eq!(deploy.curl("/v1/agents/renew", &["-X", "POST"]).status, 401);
    let spoiled = json!({ "csr_pem": request(&deploy, &key).replacen('M', "N", 4) }).to_string();
    let refused = fourth.request(
        &deploy,
        "/v1/agents/renew",
        &["-H", "Content-Type: application/json", "-d", &spoiled],
    );
    assert_eq!(refused.status, 400, "{refused:?}");

    // Deleted with everything that is its own; its name begins anew.
    let resource = json!({ "name": "echo", "endpoint_url": "http://127.0.0.1:9/", "auth_type": "none" });
    let resource = deploy.admin_post("/v1/admin/mcp-resources", &resource).expect(201);
    deploy.let_call(&id, resource["resource_id"].as_str().unwrap());
    let secret = format!("X-Admin-Secret: {}", crate::harness::ADMIN_SECRET);
    let delete = |path: &str| deploy.curl(path, &["-X", "DELETE", "-H", &secret]).status;
    assert_eq!(delete("/v1/admin/agents/billing?permanently=true"), 204);
    assert_eq!(delete("/v1/admin/agents/billing?permanently=true"), 404);
    assert_eq!(fourth.refusal(&deploy), "agent_unknown_or_inactive");
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM local_agent_resource_bindings"), "0");
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM agent_certificates"), "0");
    let (_, cert_pem, key_pem) = managed(&deploy, "billing");
    assert_eq!(fourth.refusal(&deploy), "client_cert_revoked");
    Identity::new(&deploy, "billing-5", &cert_pem, &key_pem).challenge(&deploy).expect(200);
    // The wire contract's DELETE sets aside.
    assert_eq!(delete("/v1/admin/agents/billing"), 204);
    assert_eq!(deploy.admin_get("/v1/admin/agents/billing").expect(200)["is_active"], false);
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn an_agent_is_set_aside_taken_back_renewed_rekeyed_and_deleted_on_sqlite() {
    lifecycle(Database::Sqlite);
}

#[test]
fn an_agent_is_set_aside_taken_back_renewed_rekeyed_and_deleted_on_postgresql() {
    lifecycle(Database::Postgres);
}

#[test]
fn a_new_grace_does_not_bring_back_what_is_past_an_earlier_one() {
    let deploy = fresh(Database::Sqlite);
    let (id, cert_pem, key_pem) = managed(&deploy, "billing");
    let first = Identity::new(&deploy, "first", &cert_pem, &key_pem);
    let second_pem = first.request(&deploy, "/v1/agents/renew", &["-X", "POST"]).expect(200);
    let second = Identity::new(&deploy, "second", second_pem["cert_pem"].as_str().unwrap(), &key_pem);
    deploy.sql("UPDATE internal_agents SET previous_grace_period_expires_at = '2020-01-01T00:00:00Z'");
    wait_for("the grace to end", || (first.challenge(&deploy).status == 401).then_some(()));
    let pin = |key: &ClientKey| {
        let path = format!("/v1/admin/agents/{id}/dpop-jwk");
        deploy.admin_post(&path, &json!({ "jwk": key.jwk() })).expect(200);
    };
    pin(&ClientKey::new());
    pin(&ClientKey::new());
    assert_eq!(first.refusal(&deploy), "client_cert_pin_mismatch");
    second.challenge(&deploy).expect(200);
}

#[test]
fn a_grace_ends_also_where_nothing_else_changes() {
    let deploy = fresh(Database::Sqlite);
    let (_, cert_pem, key_pem) = managed(&deploy, "billing");
    let former = Identity::new(&deploy, "former", &cert_pem, &key_pem);
    let present_pem = former.request(&deploy, "/v1/agents/renew", &["-X", "POST"]).expect(200);
    let present = Identity::new(&deploy, "present", present_pem["cert_pem"].as_str().unwrap(), &key_pem);
    deploy.sql(
        "UPDATE internal_agents SET previous_grace_period_expires_at = strftime('%Y-%m-%dT%H:%M:%SZ', 'now', '+5 seconds')",
    );
    former.challenge(&deploy).expect(200);
    wait_for("the grace to end", || (former.challenge(&deploy).status == 401).then_some(()));
    present.challenge(&deploy).expect(200);
}

#[test]
fn agents_are_listed_a_page_at_a_time_and_by_the_end_of_their_certificate() {
    let mut deploy = fresh(Database::Sqlite);
    for name in ["a", "b", "c", "d"] {
        managed(&deploy, name);
    }
    let list = |query: &str| -> Vec<String> {
        let list = deploy.admin_get(&format!("/v1/admin/agents{query}")).expect(200);
        let ids = list.as_array().unwrap().iter().map(|row| row["agent_id"].as_str().unwrap().to_owned());
        ids.map(|id| id.rsplit_once("::").unwrap().1.to_owned()).collect()
    };
    assert_eq!(list(""), ["a", "b", "c", "d"]);
    let first = deploy.admin_get("/v1/admin/agents?limit=1").expect(200)[0]["agent_id"].clone();
    assert_eq!(list(&format!("?limit=2&after={}", first.as_str().unwrap())), ["b", "c"]);
    assert!(list("?expiring_within_days=30").is_empty());
    assert_eq!(list("?expiring_within_days=366"), ["a", "b", "c", "d"]);

    // Three ends, by the clock of the row: ended, in three days, in twenty.
    deploy.sql(
        "UPDATE agent_certificates SET not_after = CASE substr(agent_id, -1) WHEN 'a' THEN 1 \
         WHEN 'b' THEN CAST(strftime('%s', 'now') AS INTEGER) + 3 * 86400 \
         WHEN 'c' THEN CAST(strftime('%s', 'now') AS INTEGER) + 20 * 86400 ELSE not_after END",
    );
    assert_eq!(list("?expiring_within_days=7"), ["a", "b"]);
    assert_eq!(list("?expiring_within_days=30"), ["a", "b", "c"]);
    let gauge =
        |within: &str| deploy.metric(&format!("cullis_agent_certificates_expiring{{within=\"{within}\"}}"));
    assert_eq!((gauge("expired"), gauge("7d"), gauge("30d")), (Some(1.0), Some(1.0), Some(2.0)));
    deploy.restart();
    let line = deploy.wait_for_log("what expires", |line| line["message"] == "agent_certificates_expiring");
    assert_eq!((&line["expired"], &line["within_7_days"]), (&json!(1), &json!(1)));
    // Who is set aside is not counted.
    deploy.admin_post("/v1/admin/agents/a/deactivate", &json!({})).expect(200);
    assert_eq!(deploy.metric("cullis_agent_certificates_expiring{within=\"expired\"}"), Some(0.0));
}

#[test]
fn the_command_line_does_it_with_a_server_and_without() {
    let mut deploy = fresh(Database::Sqlite);
    for running in [true, false] {
        if !running {
            deploy.stop();
        }
        let name = if running { "one" } else { "two" };
        let pem = deploy.mastio_ok(&["agents", "add", name, "--capability", "x.read"]);
        assert!(certificates(&pem).len() == 2 && pem.contains("BEGIN PRIVATE KEY"), "{pem}");
        let list: Value = serde_json::from_str(&deploy.mastio_ok(&["agents", "list", "--json"])).unwrap();
        let row = list.as_array().unwrap().iter().find(|row| row["display_name"] == name).unwrap();
        assert_eq!(row["capabilities"], json!(["x.read"]));
        assert!(deploy.mastio_ok(&["agents", "list"]).contains(name));
        assert!(deploy.mastio_ok(&["agents", "show", name]).contains("BEGIN CERTIFICATE"));
        assert!(deploy.mastio_ok(&["agents", "deactivate", name]).contains("false"));
        assert_eq!(deploy.mastio(&["agents", "renew", name]).status.code(), Some(3), "it is inactive");
        assert!(deploy.mastio_ok(&["agents", "reactivate", name]).contains("true"));
        assert_eq!(certificates(&deploy.mastio_ok(&["agents", "renew", name])).len(), 2);
        assert_eq!(deploy.mastio(&["agents", "delete", name]).status.code(), Some(2), "without --yes");
        deploy.mastio_ok(&["agents", "delete", name, "--yes"]);
        assert_eq!(deploy.mastio(&["agents", "show", name]).status.code(), Some(1));
    }
}
