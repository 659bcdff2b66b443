//! What a tool's calls said, kept for as long as an operator has set: sealed, read by few and with an event, gone in time.

use serde_json::{Value, json};

use crate::harness::{Database, Deploy, PASSPHRASE, wait_for};
use crate::hostile::{Hostile, tool};
use crate::world::World;

const KEPT: &str = "/v1/admin/mcp-evidence";

fn read_as(world: &World, credential: &str, id: &str) -> crate::harness::Answer {
    world.deploy.curl(&format!("{KEPT}/{id}"), &["-H", &format!("X-Admin-Secret: {credential}")])
}

fn what_calls_said_is_kept(database: Database) {
    // PostgreSQL needs a passphrase; the file has a key that can be rotated.
    let deploy = match database {
        Database::Sqlite => Deploy::empty(),
        _ => Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE),
    };
    let mut world = World::of(deploy);
    let server = Hostile::start(vec![tool("transfer"), tool("plain")]);
    world.server("bank", &server.url, &[&world.alice]);
    let days = json!({ "retention_days": 2 });
    assert_eq!(world.admin("PATCH", "/v1/admin/mcp-tools/transfer", &days).status, 200);
    let arguments = json!({ "to": "an-account-of-somebody" });
    for name in ["transfer", "plain"] {
        assert_eq!(world.alice.call(name, &arguments)["error"], Value::Null);
    }
    // Refused before it was made: nothing to keep.
    assert_ne!(world.bob.call("transfer", &arguments)["error"], Value::Null);
    let list = world.deploy.admin_get(KEPT).expect(200);
    assert_eq!((list.as_array().unwrap().len(), &list[0]["tool"]), (1, &json!("transfer")), "{list}");
    let id = list[0]["evidence_id"].as_str().unwrap().to_owned();
    let of_the_call: Vec<Value> =
        world.events("mcp.tool_called").into_iter().filter(|event| event["evidence_id"] == id).collect();
    assert_eq!(of_the_call.len(), 2);

    // Nothing of it lies in the clear.
    let in_the_clear = "SELECT count(*) FROM mcp_evidence WHERE sealed LIKE '%account%'";
    assert_eq!(world.deploy.sql(in_the_clear), "0");
    assert_eq!(world.deploy.sql("SELECT count(*) FROM audit_events WHERE details LIKE '%account-of%'"), "0");

    // A viewer sees that there is something, an operator what, an agent neither.
    let operator = |name: &str, role: &str| {
        let added = world.deploy.mastio_ok(&["admin", "add", name, "--role", role, "--json"]);
        let added: Value = serde_json::from_str(&added).unwrap();
        format!("{name}:{}", added["secret"].as_str().unwrap())
    };
    let (viewer, operator) = (operator("vera", "viewer"), operator("otto", "operator"));
    let credential = format!("X-Admin-Secret: {viewer}");
    assert_eq!(world.deploy.curl(KEPT, &["-H", &credential]).expect(200), list);
    assert_eq!(read_as(&world, &viewer, &id).status, 403);
    assert_eq!(read_as(&world, "nobody:x", &id).status, 403);
    let token = format!("Authorization: DPoP {}", world.alice.token());
    assert_eq!(world.deploy.curl(&format!("{KEPT}/{id}"), &["-H", &token]).status, 401);
    assert_eq!(read_as(&world, &operator, "no-such-call").status, 404);
    assert_eq!(world.events("mcp.evidence_read"), Vec::<Value>::new());
    let shown = read_as(&world, &operator, &id).expect(200);
    assert_eq!(shown["arguments"], arguments);
    assert_eq!(shown["result"]["content"][0]["text"], arguments.to_string());
    // What is shown is what the events speak of.
    for event in &of_the_call {
        assert_eq!(event["arguments_digest"], shown["arguments_digest"]);
    }
    assert!(of_the_call.iter().any(|event| event["result_digest"] == shown["result_digest"]), "{shown}");
    let read = world.deploy.admin_get("/v1/admin/audit?event_type=mcp.evidence_read").expect(200);
    assert_eq!(
        (read.as_array().unwrap().len(), &read[0]["actor"], &read[0]["details"]["evidence_id"]),
        (1, &json!("otto"), &json!(id))
    );

    // It goes along where the deploy goes, and under another key when everything else does.
    world.deploy.stop();
    if database == Database::Sqlite {
        world.deploy.mastio_ok(&["seal", "rotate", "--yes"]);
    } else {
        world.deploy = world.deploy.on(database);
    }
    world.deploy.start();
    assert_eq!(read_as(&world, &operator, &id).expect(200), shown);

    // Over its time it is shown no more, and then it is gone, with an event; the log is whole.
    world.deploy.sql("UPDATE mcp_evidence SET expires_at = 1");
    assert_eq!(read_as(&world, &operator, &id).status, 404);
    world.deploy.restart();
    wait_for("it to be deleted", || {
        (world.deploy.sql("SELECT count(*) FROM mcp_evidence") == "0").then_some(())
    });
    assert_eq!(world.last("mcp.evidence_deleted")["parts"], 2);
    assert_eq!(world.deploy.admin_get(KEPT).expect(200), json!([]));
    assert_eq!(world.deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn what_calls_said_is_kept_sealed_read_with_an_event_and_deleted_in_time_on_sqlite() {
    what_calls_said_is_kept(Database::Sqlite);
}

#[test]
fn what_calls_said_is_kept_sealed_read_with_an_event_and_deleted_in_time_on_postgresql() {
    what_calls_said_is_kept(Database::Postgres);
}
