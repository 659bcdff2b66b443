//! DPoP beyond the token: nonces that replicas share, persistent keys with rotation and grace, and the login with a key
//! that the server holds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use harness::forge::{Key, Response, Wire, now, unique, with};
use harness::{Database, Deploy, PASSPHRASE, required_environment};
use serde_json::{Value, json};

const TOKEN: &str = "/v1/auth/token";
const MCP: &str = "/v1/mcp";
const JSON: (&str, &str) = ("Content-Type", "application/json");
const LIST: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;

struct World {
    deploy: Deploy,
    agent_id: String,
    /// With the agent's certificate.
    wire: Wire,
    /// Without one.
    plain: Wire,
}

impl World {
    fn new(database: Database, settings: &[(&str, &str)]) -> Self {
        let mut deploy = Deploy::empty().on(database);
        for (name, value) in settings {
            deploy = deploy.set(name, value);
        }
        deploy.start();
        let body = json!({ "agent_name": "agent", "capabilities": [] });
        let created = deploy.admin_post("/v1/admin/agents", &body).expect(201);
        let text = |name: &str| created[name].as_str().unwrap().to_owned();
        let ca = deploy.get("/pki/ca.crt").body;
        let wire = Wire::new(deploy.port(), &ca, Some((&text("cert_pem"), &text("private_key_pem"))));
        let plain = Wire::new(deploy.port(), &ca, None);
        Self { agent_id: text("agent_id"), wire, plain, deploy }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.deploy.url())
    }

    /// An assertion that the server signs with the agent's key.
    fn assertion(&self) -> String {
        let answer = self.wire.send("POST", "/v1/auth/sign-assertion", &[], "");
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.json()["agent_id"], self.agent_id.as_str());
        assert!(answer.json()["mastio_signature"].as_str().unwrap().len() > 80);
        answer.json()["client_assertion"].as_str().unwrap().to_owned()
    }

    fn mint(&self, assertion: &str, proof: &str) -> Response {
        let body = json!({ "client_assertion": assertion }).to_string();
        self.plain.send("POST", TOKEN, &[JSON, ("DPoP", proof)], &body)
    }

    fn own_path(&self) -> String {
        format!("/v1/egress/agents/{}/public-key", self.agent_id)
    }

    /// The agent fetches its own chain, with a proof or without.
    fn fetch(&self, proof: Option<&str>) -> Response {
        let headers: Vec<(&str, &str)> = proof.iter().map(|proof| ("DPoP", *proof)).collect();
        self.wire.send("GET", &self.own_path(), &headers, "")
    }

    fn register(&self, key: &Key) {
        let path = format!("/v1/admin/agents/{}/dpop-jwk", self.agent_id);
        self.deploy.admin_post(&path, &json!({ "jwk": key.jwk() })).expect(200);
    }
}

fn proof(key: &Key, method: &str, url: &str, token: Option<&str>, nonce: &str) -> String {
    let (header, claims) = key.proof_parts(method, url, token);
    key.sign(&header, &with(&claims, &json!({ "nonce": nonce })))
}

/// The nonce of an answer that asks for one.
fn asked(answer: &Response, status: u16) -> String {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.body.contains("use_dpop_nonce"), "{answer:?}");
    answer.header("DPoP-Nonce").unwrap().to_owned()
}

#[test]
fn an_agent_whose_key_the_server_holds_logs_in_by_its_certificate_alone() {
    let world = World::new(Database::Sqlite, &[]);
    let key = Key::new();
    let assertion = world.assertion();
    let answer = world.mint(&assertion, &key.proof("POST", &world.url(TOKEN), None));
    assert_eq!(answer.status, 200, "{answer:?}");
    let again = world.mint(&assertion, &key.proof("POST", &world.url(TOKEN), None));
    assert_eq!(again.status, 401, "it is used once");
    assert_eq!(world.plain.send("POST", "/v1/auth/sign-assertion", &[], "").status, 401);
    // A key that is not here cannot be signed with, and the agent is told so.
    world.deploy.sql(&format!("DELETE FROM proxy_config WHERE key = 'agent_key:{}'", world.agent_id));
    let gone = world.wire.send("POST", "/v1/auth/sign-assertion", &[], "");
    assert_eq!(gone.status, 404);
    assert_eq!(gone.json()["detail"], "agent credentials not available on proxy");
}

/// Seconds for which the server gives out one nonce.
const NONCE_PERIOD_S: i64 = 300;

fn with_nonces(database: Database) {
    let mut world = World::new(database, &[("MCP_PROXY_DPOP_NONCE", "true")]);
    let key = Key::new();
    let (url, assertion) = (world.url(TOKEN), world.assertion());
    let began = now();
    let nonce = asked(&world.mint(&assertion, &key.proof("POST", &url, None)), 401);
    // One nonce is given out until its time is over, which it may be in the middle of this test.
    let is_given = |given: &str| {
        let turned = now().div_euclid(NONCE_PERIOD_S) != began.div_euclid(NONCE_PERIOD_S);
        assert!(given == nonce || turned, "{given} instead of {nonce}");
    };
    for stale in ["", "x", "AAAAAAAAAAAAAAAAAAAAAA"] {
        is_given(&asked(&world.mint(&assertion, &proof(&key, "POST", &url, None, stale)), 401));
    }
    // The same assertion again: nothing was used up by asking.
    let answer = world.mint(&assertion, &proof(&key, "POST", &url, None, &nonce));
    assert_eq!(answer.status, 200, "{answer:?}");
    let token = answer.json()["access_token"].as_str().unwrap().to_owned();
    let use_with = |world: &World, proof: &str| {
        let scheme = format!("DPoP {token}");
        world.plain.send("POST", MCP, &[JSON, ("Authorization", &scheme), ("DPoP", proof)], LIST)
    };
    let mcp = world.url(MCP);
    let asked_again = use_with(&world, &key.proof("POST", &mcp, Some(&token)));
    is_given(&asked(&asked_again, 401));
    assert!(asked_again.header("WWW-Authenticate").unwrap().contains("error=\"use_dpop_nonce\""));
    // The secret is in the database: what one process gave out, the next one takes.
    world.deploy.restart();
    let answer = use_with(&world, &proof(&key, "POST", &mcp, Some(&token), &nonce));
    assert_eq!(answer.status, 200, "{answer:?}");
    is_given(answer.header("DPoP-Nonce").unwrap());
    // An ordinary client is asked as RFC 9449 §8 has it.
    let claims = json!({ "iss": world.agent_id, "sub": world.agent_id, "jti": unique(), "exp": now() + 60 });
    let form = format!(
        "grant_type=client_credentials&client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer\
         &client_assertion={}",
        key.sign(&json!({ "alg": "ES256" }), &claims)
    );
    let headers =
        [("Content-Type", "application/x-www-form-urlencoded"), ("DPoP", &key.proof("POST", &url, None))];
    let answer = world.plain.send("POST", TOKEN, &headers, &form);
    is_given(&asked(&answer, 400));
    assert_eq!(answer.json()["error"], "use_dpop_nonce");
    let refused = world.deploy.admin_get("/v1/admin/audit?event_type=auth.refused").expect(200);
    let reasons: Vec<&Value> =
        refused.as_array().unwrap().iter().map(|event| &event["details"]["reason"]).collect();
    assert!(reasons.contains(&&json!("proof_nonce_missing")), "{reasons:?}");
    assert!(reasons.contains(&&json!("proof_nonce_mismatch")), "{reasons:?}");
}

#[test]
fn a_required_nonce_is_asked_for_given_and_survives_a_restart_on_sqlite() {
    with_nonces(Database::Sqlite);
}

#[test]
fn a_required_nonce_is_asked_for_given_and_survives_a_restart_on_postgresql() {
    with_nonces(Database::Postgres);
}

#[test]
fn an_agent_sees_its_peers_and_that_there_are_no_models() {
    let world = World::new(Database::Sqlite, &[]);
    for name in ["seller", "s_ller"] {
        world
            .deploy
            .admin_post("/v1/admin/agents", &json!({ "agent_name": name, "capabilities": [name] }))
            .expect(201);
    }
    let peers = |query: &str| {
        let answer = world.wire.send("GET", &format!("/v1/egress/peers{query}"), &[], "");
        assert_eq!(answer.status, 200, "{answer:?}");
        let peers = answer.json()["peers"].as_array().unwrap().clone();
        peers.iter().map(|peer| peer["display_name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(peers(""), ["s_ller", "seller"], "all but oneself");
    assert_eq!(peers("?q=S_L"), ["s_ller"]);
    assert_eq!(peers("?limit=1"), ["s_ller"]);
    assert_eq!(world.plain.send("GET", "/v1/egress/peers", &[], "").status, 401);

    let key = Key::new();
    let granted = world.mint(&world.assertion(), &key.proof("POST", &world.url(TOKEN), None));
    let token = granted.json()["access_token"].as_str().unwrap().to_owned();
    for path in ["/v1/egress/models", "/v1/models"] {
        let proof = key.proof("GET", &world.url(path), Some(&token));
        let headers = [("Authorization", &*format!("DPoP {token}")), ("DPoP", &proof)];
        let answer = world.plain.send("GET", path, &headers, "");
        assert_eq!(
            (answer.status, answer.json()),
            (200, json!({ "object": "list", "data": [] })),
            "{answer:?}"
        );
        assert_eq!(world.plain.send("GET", path, &headers, "").status, 401, "the proof is used once");
    }
}

#[test]
fn a_persistent_key_is_proved_rotated_and_in_grace() {
    let world = World::new(Database::Sqlite, &[]);
    let url = world.url(&world.own_path());
    let (first, second, third) = (Key::new(), Key::new(), Key::new());
    // Optional: the certificate alone suffices, and a proof needs a nonce.
    assert_eq!(world.fetch(None).status, 200);
    let nonce = asked(&world.fetch(Some(&first.proof("GET", &url, None))), 401);
    let by = |key: &Key| world.fetch(Some(&proof(key, "GET", &url, None, &nonce)));
    assert_eq!(by(&first).status, 200, "no key is registered yet");
    world.register(&first);
    assert_eq!(by(&first).status, 200);
    let refused = by(&second);
    assert_eq!(refused.status, 401, "{refused:?}");
    assert!(!refused.body.contains("use_dpop_nonce"));
    let once = proof(&first, "GET", &url, None, &nonce);
    assert_eq!(world.fetch(Some(&once)).status, 200);
    assert_eq!(world.fetch(Some(&once)).json()["detail"], "DPoP proof replay detected");
    // Rotated: the former key is good for 48 hours, and no other.
    world.register(&second);
    assert_eq!((by(&second).status, by(&first).status, by(&third).status), (200, 200, 401));
    let until = "previous_grace_period_expires_at";
    world.deploy.sql(&format!("UPDATE internal_agents SET {until} = '2026-01-01T00:00:00Z'"));
    harness::wait_for("the end of the grace", || (by(&first).status == 401).then_some(()));
    assert_eq!(by(&second).status, 200);

    let strict = World::new(Database::Sqlite, &[("CULLIS_EGRESS_DPOP_MODE", "required")]);
    let url = strict.url(&strict.own_path());
    assert_eq!(strict.fetch(None).status, 401);
    let nonce = asked(&strict.fetch(Some(&first.proof("GET", &url, None))), 401);
    assert_eq!(strict.fetch(Some(&proof(&first, "GET", &url, None, &nonce))).status, 401, "not registered");
    strict.register(&first);
    assert_eq!(strict.fetch(Some(&proof(&first, "GET", &url, None, &nonce))).status, 200);
}

/// Two processes on one PostgreSQL, with Redis or without: what one has given out or taken in, the other knows at the
/// next request.
fn on_two_replicas(redis: Option<&str>) {
    let mut settings = vec![("MCP_PROXY_DPOP_NONCE", "true"), ("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE)];
    settings.extend(redis.map(|url| ("MCP_PROXY_REDIS_URL", url)));
    let one = World::new(Database::Postgres, &settings);
    let mut deploy = Deploy::empty()
        .set("MCP_PROXY_DATABASE_URL", one.deploy.database_url().unwrap())
        .set("MCP_PROXY_PROXY_PUBLIC_URL", &one.url(""));
    for (name, value) in &settings {
        deploy = deploy.set(name, value);
    }
    deploy.start();
    let two = Wire::new(deploy.port(), &deploy.get("/pki/ca.crt").body, None);
    let (key, url, mcp) = (Key::new(), one.url(TOKEN), one.url(MCP));
    let mint = |wire: &Wire, assertion: &str, proof: &str| {
        let body = json!({ "client_assertion": assertion }).to_string();
        wire.send("POST", TOKEN, &[JSON, ("DPoP", proof)], &body)
    };
    let use_token = |wire: &Wire, token: &str, proof: &str| {
        wire.send("POST", MCP, &[JSON, ("Authorization", &format!("DPoP {token}")), ("DPoP", proof)], LIST)
    };
    let replayed = |answer: &Response| {
        assert_eq!((answer.status, &answer.json()["detail"]), (401, &json!("DPoP proof replay detected")));
    };

    // A nonce of one is taken by the other, which gives the same one out.
    let assertion = one.assertion();
    let nonce = asked(&mint(&one.plain, &assertion, &key.proof("POST", &url, None)), 401);
    assert_eq!(asked(&mint(&two, &assertion, &key.proof("POST", &url, None)), 401), nonce);
    let minted = proof(&key, "POST", &url, None, &nonce);
    let granted = mint(&two, &assertion, &minted);
    assert_eq!(granted.status, 200, "{granted:?}");
    let token = granted.json()["access_token"].as_str().unwrap().to_owned();

    // Proof and assertion are used up on both, at the token endpoint and at the gateway.
    replayed(&mint(&one.plain, &one.assertion(), &minted));
    replayed(&mint(&one.plain, &assertion, &proof(&key, "POST", &url, None, &nonce)));
    let used = proof(&key, "POST", &mcp, Some(&token), &nonce);
    assert_eq!(use_token(&one.plain, &token, &used).status, 200);
    replayed(&use_token(&two, &token, &used));
    // Of many at once, one.
    for _ in 0..3 {
        let once = proof(&key, "POST", &mcp, Some(&token), &nonce);
        let accepted = std::thread::scope(|scope| {
            let sent: Vec<_> = (0..8)
                .map(|number| {
                    let (wire, token, once) =
                        (if number % 2 == 0 { &one.plain } else { &two }, &token, &once);
                    scope.spawn(move || use_token(wire, token, once).status)
                })
                .collect();
            sent.into_iter().map(|sent| sent.join().unwrap()).filter(|status| *status == 200).count()
        });
        assert_eq!(accepted, 1);
    }

    // Revoked on one (RFC 7009), refused by both at their next request; another token of the agent goes on.
    let other = mint(&two, &one.assertion(), &proof(&key, "POST", &url, None, &nonce));
    let other = other.json()["access_token"].as_str().unwrap().to_owned();
    let form = format!("client_id={}&token={token}", one.agent_id);
    let headers = [("Content-Type", "application/x-www-form-urlencoded")];
    let revoked = one.wire.send("POST", "/v1/auth/revoke", &headers, &form);
    assert_eq!(revoked.status, 200, "{revoked:?}");
    for wire in [&two, &one.plain] {
        let refused = use_token(wire, &token, &proof(&key, "POST", &mcp, Some(&token), &nonce));
        assert_eq!(refused.status, 401, "{refused:?}");
        let accepted = use_token(wire, &other, &proof(&key, "POST", &mcp, Some(&other), &nonce));
        assert_eq!(accepted.status, 200, "{accepted:?}");
    }
    let refusals = one.deploy.admin_get("/v1/admin/audit?event_type=auth.refused").expect(200);
    let revoked =
        refusals.as_array().unwrap().iter().filter(|event| event["details"]["reason"] == "token_revoked");
    assert_eq!(revoked.count(), 2, "{refusals}");
    assert_eq!(one.deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn nonces_proofs_and_revoked_tokens_are_known_to_both_of_two_replicas_on_postgresql() {
    on_two_replicas(None);
}

#[test]
fn nonces_proofs_and_revoked_tokens_are_known_to_both_of_two_replicas_with_redis() {
    on_two_replicas(Some(&required_environment("MASTIO_TEST_REDIS_URL")));
}
