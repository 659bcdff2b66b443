//! Servers that are told who calls: our word for it, and tokens that were exchanged for it. Neither is ever the caller's
//! own credential, and neither is one here.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::forge::claims;
use crate::harness::{Database, required_environment, run, wait_for};
use crate::hostile::{Hostile, tool};
use crate::world::{Caller, World, modern};

const HALT: &str = "INSERT INTO pending_updates (migration_id, detected_at, status) \
                    VALUES ('2099-01-01-unknown', '2026-01-01T00:00:00Z', 'pending')";
const HALT_NO_MORE: &str = "DELETE FROM pending_updates WHERE migration_id = '2099-01-01-unknown'";

/// The header that a server was sent.
fn sent<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// The word for `caller` that the server is given with a call.
fn word(caller: &Caller) -> String {
    let answer = caller.call("headers", &json!({}));
    let head =
        answer["result"]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned();
    sent(&head, "mastio-caller").unwrap_or_else(|| panic!("{head}")).to_owned()
}

/// What joserfc says of a JWS under our published keys: its header and claims. It must hold.
fn judged(world: &World, jws: &str) -> Value {
    let jwks = world.deploy.get("/.well-known/jwks-local.json").body;
    let judge = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges/oauth/caller_word.py");
    let mut command = Command::new(required_environment("MASTIO_TEST_JUDGES_PYTHON"));
    serde_json::from_str(&run(command.arg(judge).arg(jwks).arg(jws))).unwrap()
}

fn servers_are_told_who_calls(database: Database) {
    let world = World::new(database);
    let (told, exchanging) = (Hostile::start(vec![tool("headers")]), Hostile::start(vec![tool("other")]));
    let fine = Hostile::start(vec![tool("plain")]);
    let (alice, bob) = (&world.alice, &world.bob);
    world.server_with("told", &told.url, &json!({ "asserts_caller": true }), &[alice, bob]);
    let token_url = exchanging.token_url();
    let auth = json!({ "type": "oauth_token_exchange", "token_url": token_url, "client_id": "mastio",
        "client_secret": "s3cr3t", "audience": "tools" });
    world.server_with("exchanging", &exchanging.url, &json!({ "auth": auth }), &[alice, bob]);
    world.server("fine", &fine.url, &[alice]);

    // A word for the server alone, that others verify by our published keys.
    let (of_alice, of_bob) = (word(alice), word(bob));
    let judged_alice = judged(&world, &of_alice);
    assert_eq!(
        (&judged_alice["header"]["typ"], &judged_alice["header"]["alg"]),
        (&json!("mastio-caller+jwt"), &json!("ES256"))
    );
    let said = &judged_alice["claims"];
    assert_eq!((&said["sub"], &said["aud"]), (&json!(alice.id), &json!(told.url)));
    assert_eq!(said["exp"].as_i64().unwrap() - said["iat"].as_i64().unwrap(), 60);
    assert_eq!(judged(&world, &of_bob)["claims"]["sub"], bob.id);
    assert_ne!(claims(&word(alice))["jti"], said["jti"]);
    // Nobody calls when we look at a server ourselves.
    assert!(
        told.seen().iter().all(|(head, body)| {
            sent(head, "mastio-caller").is_some() == (body["method"] == "tools/call")
        })
    );

    // It is no token of the agent's, though the same key signed it, nor proves it who the agent is.
    let answer = alice.list_with(&of_alice);
    assert_eq!(answer.status, 401, "{answer:?}");
    assert_eq!(world.last("auth.refused")["reason"], "token_type");
    let answer = alice.log_in_with(&of_alice);
    assert_eq!(answer.status, 401, "{answer:?}");
    assert_eq!(world.last("auth.refused")["route"], "/v1/auth/token");

    // A token for each caller, in exchange for such a word, which is for the token endpoint alone.
    for (caller, calls) in [(alice, 2), (bob, 1)] {
        for _ in 0..calls {
            let answer = caller.call("other", &json!({}));
            assert_eq!(answer["error"], Value::Null, "{answer}");
        }
    }
    let used: Vec<String> = exchanging
        .calls("other")
        .iter()
        .map(|(head, _)| sent(head, "authorization").unwrap().to_owned())
        .collect();
    assert_eq!(used, [&alice.id, &alice.id, &bob.id].map(|id| format!("Bearer for-{id}")));
    let forms = exchanging.forms();
    let grants: Vec<&str> = forms.iter().map(|form| form["grant_type"].as_str()).collect();
    let exchange = "urn:ietf:params:oauth:grant-type:token-exchange";
    assert_eq!(grants, ["client_credentials", exchange, exchange]);
    for (form, caller) in forms[1..].iter().zip([alice, bob]) {
        assert_eq!(form["subject_token_type"], "urn:ietf:params:oauth:token-type:jwt");
        let said = judged(&world, &form["subject_token"])["claims"].clone();
        assert_eq!((&said["sub"], &said["aud"]), (&json!(caller.id), &json!(token_url)));
    }
    assert!(exchanging.seen().iter().all(|(head, _)| sent(head, "mastio-caller").is_none()));

    // On a stream that a caller has with a server it is the caller who speaks, as in its calls.
    let (body, headers) =
        modern("subscriptions/listen", None, &json!({ "notifications": { "toolsListChanged": true } }));
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut stream = alice.open("POST", &headers, &body);
    stream.wait("notifications/subscriptions/acknowledged");
    let listened = |server: &Hostile| {
        wait_for("the server to be listened to", || {
            let mut seen = server.seen().into_iter();
            seen.find(|(_, body)| body["method"] == "subscriptions/listen").map(|(head, _)| head)
        })
    };
    assert_eq!(claims(sent(&listened(&told), "mastio-caller").unwrap())["sub"], alice.id);
    assert_eq!(
        sent(&listened(&exchanging), "authorization"),
        Some(format!("Bearer for-{}", alice.id).as_str())
    );
    assert_eq!(exchanging.forms().len(), 3);
    drop(stream);

    // Never the caller's own credential, wherever one looks.
    for server in [&told, &exchanging, &fine] {
        for (head, body) in server.seen() {
            for caller in [alice, bob] {
                assert!(
                    !head.contains(caller.token()) && !body.to_string().contains(caller.token()),
                    "{head}"
                );
            }
        }
    }
    // And our own is shown to nobody.
    let shown = world.deploy.admin_get("/v1/admin/mcp-upstreams").body
        + &world.deploy.admin_get("/v1/admin/mcp-config").body;
    assert!(!shown.contains("s3cr3t") && shown.contains("oauth_token_exchange"), "{shown}");

    // While nothing is signed nobody is vouched for, and everything else goes on.
    world.deploy.sql(HALT);
    wait_for("the halt", || world.deploy.is_halted().then_some(()));
    for name in ["headers", "other"] {
        let refused = alice.call(name, &json!({}));
        assert_eq!(refused["error"]["code"], -32002, "{refused}");
        assert_eq!(world.last("mcp.tool_called")["reason"], "signing_halted");
    }
    assert_eq!(alice.call("plain", &json!({}))["error"], Value::Null);
    world.deploy.sql(HALT_NO_MORE);
    wait_for("the halt to end", || (!world.deploy.is_halted()).then_some(()));
    assert_eq!(claims(&word(alice))["sub"], alice.id);
    assert_eq!(world.deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn servers_are_told_who_calls_by_a_word_that_is_no_credential_here_on_sqlite() {
    servers_are_told_who_calls(Database::Sqlite);
}

#[test]
fn servers_are_told_who_calls_by_a_word_that_is_no_credential_here_on_postgresql() {
    servers_are_told_who_calls(Database::Postgres);
}
