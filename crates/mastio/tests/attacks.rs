//! The attack table of tokens: everything that is presented wrongly, forged, replayed or meant for somebody else is
//! refused with a stable reason, and leaves an audit event. The table is printed: `--nocapture`.
//!
//! The attacker here has what no attacker should have: the server's own signing key, so that also tokens are tried that
//! only a faulty server would have issued.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use harness::forge::{Key, Response, Wire, b64u, now, unique, with};
use harness::{Database, Deploy, PASSPHRASE, certificates, wait_for};
use mastio::pki::keys::SealingKey;
use serde_json::{Value, json};

const TOKEN: &str = "/v1/auth/token";
const REVOKE: &str = "/v1/auth/revoke";
const INTROSPECT: &str = "/v1/auth/introspect";
const CHALLENGE: &str = "/v1/auth/login-challenge";
const MCP: &str = "/v1/mcp";
const JSON: (&str, &str) = ("Content-Type", "application/json");
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");
const LIST: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// An agent with what it holds.
struct Agent {
    id: String,
    chain: String,
    key_pem: String,
    key: Key,
}

impl Agent {
    fn new(deploy: &Deploy, name: &str) -> Self {
        let body = json!({ "agent_name": name, "capabilities": [] });
        let created = deploy.admin_post("/v1/admin/agents", &body).expect(201);
        let text = |name: &str| created[name].as_str().unwrap().to_owned();
        let key_pem = text("private_key_pem");
        Self { id: text("agent_id"), chain: text("cert_pem"), key: Key::from_pem(&key_pem), key_pem }
    }

    fn x5c(&self) -> Vec<String> {
        certificates(&self.chain).iter().map(|pem| der_base64(pem)).collect()
    }

    /// Header and claims of a good assertion.
    fn assertion_parts(&self) -> (Value, Value) {
        let header = json!({ "alg": "ES256", "typ": "JWT", "x5c": self.x5c() });
        let claims = json!({
            "sub": self.id, "iss": self.id, "aud": "agent-trust-broker", "iat": now(), "exp": now() + 300,
            "jti": unique(),
        });
        (header, claims)
    }

    fn assertion(&self) -> String {
        let (header, claims) = self.assertion_parts();
        self.key.sign(&header, &claims)
    }
}

fn der_base64(pem: &str) -> String {
    pem.lines().filter(|line| !line.starts_with("-----")).collect()
}

/// A deploy under attack.
struct World {
    deploy: Deploy,
    alice: Agent,
    bob: Agent,
    /// A connection without a certificate.
    wire: Wire,
    /// With Alice's.
    alice_wire: Wire,
    /// With Bob's.
    bob_wire: Wire,
    /// The server's signing key and its name.
    server: (Key, String),
    org: String,
    rows: Vec<[String; 4]>,
}

impl World {
    fn new(database: Database, settings: &[(&str, &str)]) -> Self {
        let mut deploy = Deploy::empty().on(database);
        for (name, value) in settings {
            deploy = deploy.set(name, value);
        }
        deploy.start();
        let (alice, bob) = (Agent::new(&deploy, "alice"), Agent::new(&deploy, "bob"));
        let ca = deploy.get("/pki/ca.crt").body;
        let wire = |agent: Option<&Agent>| {
            Wire::new(deploy.port(), &ca, agent.map(|agent| (agent.chain.as_str(), agent.key_pem.as_str())))
        };
        let (plain, alice_wire, bob_wire) = (wire(None), wire(Some(&alice)), wire(Some(&bob)));
        let org = alice.id.split("::").next().unwrap().to_owned();
        let server = stolen_key(&deploy, database);
        Self { deploy, alice, bob, wire: plain, alice_wire, bob_wire, server, org, rows: Vec::new() }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.deploy.url())
    }

    /// A token request of the SDK.
    fn mint(&self, assertion: &str, proofs: &[&str]) -> Response {
        let body = json!({ "client_assertion": assertion }).to_string();
        let mut headers = vec![JSON];
        headers.extend(proofs.iter().map(|proof| ("DPoP", *proof)));
        self.wire.send("POST", TOKEN, &headers, &body)
    }

    /// A good token of an agent, bound to `key`.
    fn token(&self, agent: &Agent, key: &Key) -> String {
        let answer = self.mint(&agent.assertion(), &[&key.proof("POST", &self.url(TOKEN), None)]);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["access_token"].as_str().unwrap().to_owned()
    }

    /// Claims as the server makes them, for Alice and `key`.
    fn claims(&self, key: &Key) -> Value {
        let thumbprint = thumbprint(&key.jwk());
        json!({
            "iss": format!("cullis-mastio:{}", self.org), "aud": "cullis-local", "sub": self.alice.id, "scope": "local",
            "iat": now(), "exp": now() + 900, "jti": unique(), "cnf": { "jkt": thumbprint },
            "principal_type": "agent", "org": self.org,
        })
    }

    /// A token signed by the server's own key, with changes.
    fn forged(&self, key: &Key, header: &Value, claims: &Value) -> String {
        let good = json!({ "alg": "ES256", "typ": "JWT", "kid": self.server.1 });
        self.server.0.sign(&with(&good, header), &with(&self.claims(key), claims))
    }

    /// A use of a token at the gateway.
    fn use_with(&self, wire: &Wire, headers: &[(&str, &str)]) -> Response {
        let mut all = vec![JSON];
        all.extend_from_slice(headers);
        wire.send("POST", MCP, &all, LIST)
    }

    fn use_token(&self, token: &str, proof: &str) -> Response {
        self.use_with(&self.wire, &[("Authorization", &format!("DPoP {token}")), ("DPoP", proof)])
    }

    /// A form at the token endpoint, with Alice's assertion and what else is given.
    fn form(&self, changes: &[(&str, &str)]) -> String {
        let (_, claims) = self.alice.assertion_parts();
        let claims = with(&claims, &json!({ "aud": self.deploy.url() }));
        let assertion = self.alice.key.sign(&json!({ "alg": "ES256" }), &claims);
        let mut form = vec![
            ("grant_type", "client_credentials"),
            ("client_assertion_type", JWT_BEARER),
            ("client_assertion", assertion.as_str()),
        ];
        form.retain(|(name, _)| !changes.iter().any(|(changed, _)| changed == name));
        form.extend(changes.iter().filter(|(_, value)| *value != "<absent>"));
        encode(&form)
    }

    /// Writes a line of the table: refused with this status and this reason, and an event that says so.
    fn refused(&mut self, attack: &str, route: &str, answer: &Response, status: u16, reason: &str) {
        assert!(!answer.body.contains("use_dpop_nonce"), "{attack}");
        self.refused_or_asked(attack, route, answer, status, reason);
    }

    /// The same, where what is asked for may be a nonce.
    fn refused_or_asked(&mut self, attack: &str, route: &str, answer: &Response, status: u16, reason: &str) {
        assert_eq!(answer.status, status, "{attack}: {answer:?}");
        let told = self.deploy.admin_get("/v1/admin/audit?event_type=auth.refused&limit=1").expect(200);
        let details = &told[0]["details"];
        assert_eq!(
            (&details["reason"], &details["route"]),
            (&json!(reason), &json!(route)),
            "{attack}: {told}"
        );
        self.rows.push([attack.to_owned(), route.to_owned(), status.to_string(), reason.to_owned()]);
    }

    fn print(&self, title: &str) {
        println!(
            "\n{title}\n\n| # | attack | at | status | reason, in the answer's event |\n| --- | --- | --- | --- | --- |"
        );
        for (number, [attack, route, status, reason]) in self.rows.iter().enumerate() {
            println!("| {} | {attack} | {route} | {status} | {reason} |", number + 1);
        }
    }
}

fn encode(form: &[(&str, &str)]) -> String {
    let escape = |text: &str| -> String {
        text.bytes()
            .map(|byte| match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
                byte => format!("%{byte:02X}"),
            })
            .collect()
    };
    let pairs: Vec<String> =
        form.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
    pairs.join("&")
}

fn thumbprint(jwk: &Value) -> String {
    let text = |name: &str| jwk[name].as_str().unwrap().to_owned();
    let members = format!(r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#, text("x"), text("y"));
    b64u(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, members.as_bytes()))
}

fn certificate_thumbprint(agent: &Agent) -> String {
    let der = STANDARD.decode(&agent.x5c()[0]).unwrap();
    b64u(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &der))
}

/// The sealing key, as whoever has the machine has it.
fn stolen_seal(deploy: &Deploy, database: Database) -> SealingKey {
    match database {
        Database::Sqlite => SealingKey::from_file(&deploy.data_dir().join("seal.key")).unwrap(),
        _ => {
            let salt = deploy.sql("SELECT value FROM deploy_state WHERE key = 'sealing_salt'");
            SealingKey::from_passphrase(PASSPHRASE, &STANDARD.decode(salt).unwrap()).unwrap()
        }
    }
}

/// The key that signs access tokens, opened as only the holder of the sealing key can.
fn stolen_key(deploy: &Deploy, database: Database) -> (Key, String) {
    let sealing = stolen_seal(deploy, database);
    let active = "activated_at IS NOT NULL AND deprecated_at IS NULL";
    let kid = deploy.sql(&format!("SELECT kid FROM mastio_keys WHERE {active}"));
    let sealed = deploy.sql(&format!("SELECT privkey_pem FROM mastio_keys WHERE {active}"));
    let pem = sealing.open(&format!("mastio_keys/{kid}/privkey_pem"), &sealed).unwrap();
    (Key::from_pem(&pem), kid)
}

/// HMAC-SHA-256 in place of a signature, with something public as its key.
fn hmac_jws(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let input = format!("{}.{}", b64u(header.to_string()), b64u(claims.to_string()));
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
    format!("{input}.{}", b64u(aws_lc_rs::hmac::sign(&key, input.as_bytes())))
}

fn proofs(world: &mut World) {
    let url = world.url(TOKEN);
    let key = Key::new();
    let (header, claims) = key.proof_parts("POST", &url, None);
    let at = |path: &str| world.url(path);
    let port = world.deploy.port();
    let text = |changes: &Value, of: &Value| with(of, changes).to_string();
    let fresh = || json!({ "jti": unique() });
    let signed = |header_changes: Value, claim_changes: Value| {
        key.sign(&with(&header, &header_changes), &with(&with(&claims, &fresh()), &claim_changes))
    };
    let jwk = key.jwk();
    let padded = format!("{}=", jwk["x"].as_str().unwrap());
    let doubled = |text: String, member: &str| text.replacen('{', &format!("{{{member},"), 1);
    let good = signed(json!({}), json!({}));
    let (input, signature) = good.rsplit_once('.').unwrap();
    let cases: Vec<(&str, String, &str)> = vec![
        ("proof: not a JWS", "proof".to_owned(), "jws_not_compact"),
        (
            "proof: alg none",
            format!("{}.", signed(json!({ "alg": "none" }), json!({})).rsplit_once('.').unwrap().0),
            "jws_algorithm",
        ),
        (
            "proof: alg HS256 keyed with the public key",
            hmac_jws(&with(&header, &json!({ "alg": "HS256" })), &claims, jwk.to_string().as_bytes()),
            "jws_algorithm",
        ),
        ("proof: alg ES384", signed(json!({ "alg": "ES384" }), json!({})), "jws_algorithm"),
        ("proof: alg RS256", signed(json!({ "alg": "RS256" }), json!({})), "jws_algorithm"),
        ("proof: alg PS256 with an EC key", signed(json!({ "alg": "PS256" }), json!({})), "jws_key_type"),
        ("proof: alg es256 in lower case", signed(json!({ "alg": "es256" }), json!({})), "jws_algorithm"),
        ("proof: typ JWT", signed(json!({ "typ": "JWT" }), json!({})), "proof_type"),
        ("proof: no typ", signed(json!({ "typ": "<absent>" }), json!({})), "proof_type"),
        ("proof: no key", signed(json!({ "jwk": "<absent>" }), json!({})), "proof_missing_key"),
        (
            "proof: private key embedded",
            signed(json!({ "jwk": with(&jwk, &json!({ "d": jwk["x"] })) }), json!({})),
            "jwk_private_member",
        ),
        (
            "proof: symmetric key",
            signed(json!({ "jwk": { "kty": "oct", "k": "AAAA" } }), json!({})),
            "jwk_private_member",
        ),
        (
            "proof: key of another curve",
            signed(json!({ "jwk": with(&jwk, &json!({ "crv": "P-384" })) }), json!({})),
            "jwk_key_type",
        ),
        ("proof: swapped key", signed(json!({ "jwk": Key::new().jwk() }), json!({})), "jws_signature"),
        (
            "proof: key off the curve",
            signed(json!({ "jwk": with(&jwk, &json!({ "y": jwk["x"] })) }), json!({})),
            "jwk_not_on_curve",
        ),
        (
            "proof: the same key in another spelling",
            signed(json!({ "jwk": with(&jwk, &json!({ "x": padded })) }), json!({})),
            "jwk_malformed_member",
        ),
        ("proof: crit", signed(json!({ "crit": ["exp"] }), json!({})), "jws_extension"),
        ("proof: unencoded payload", signed(json!({ "b64": false }), json!({})), "jws_extension"),
        (
            "proof: claims changed after signing",
            format!(
                "{}.{}.{signature}",
                b64u(header.to_string()),
                b64u(text(&json!({ "jti": "other" }), &claims))
            ),
            "jws_signature",
        ),
        ("proof: signature cut off", format!("{input}.{}", &signature[..44]), "jws_signature"),
        ("proof: signature of zeros", format!("{input}.{}", b64u([0; 64])), "jws_signature"),
        ("proof: no signature", format!("{input}."), "jws_signature"),
        ("proof: padded base64", format!("{good}="), "jws_base64"),
        ("proof: a fourth part", format!("{good}.AAAA"), "jws_not_compact"),
        ("proof: too long", signed(json!({}), json!({ "x": "x".repeat(17_000) })), "jws_too_long"),
        (
            "proof: a header member twice",
            key.sign_text(&doubled(header.to_string(), r#""alg":"none""#), &claims.to_string()),
            "jws_header",
        ),
        (
            "proof: a claim twice",
            key.sign_text(&header.to_string(), &doubled(claims.to_string(), r#""htm":"GET""#)),
            "jws_payload",
        ),
        ("proof: no jti", signed(json!({}), json!({ "jti": "<absent>" })), "proof_missing_claim"),
        ("proof: empty jti", signed(json!({}), json!({ "jti": "" })), "proof_malformed_claim"),
        (
            "proof: jti of 129 characters",
            signed(json!({}), json!({ "jti": "j".repeat(129) })),
            "proof_malformed_claim",
        ),
        ("proof: an hour old", signed(json!({}), json!({ "iat": now() - 3600 })), "proof_stale"),
        ("proof: ten minutes ahead", signed(json!({}), json!({ "iat": now() + 600 })), "proof_future_issued"),
        (
            "proof: iat in milliseconds",
            signed(json!({}), json!({ "iat": now() * 1000 })),
            "proof_future_issued",
        ),
        (
            "proof: iat as text",
            signed(json!({}), json!({ "iat": now().to_string() })),
            "proof_malformed_claim",
        ),
        ("proof: no iat", signed(json!({}), json!({ "iat": "<absent>" })), "proof_missing_claim"),
        ("proof: htm GET", signed(json!({}), json!({ "htm": "GET" })), "proof_htm_mismatch"),
        ("proof: no htm", signed(json!({}), json!({ "htm": "<absent>" })), "proof_missing_claim"),
        ("proof: htu of another route", signed(json!({}), json!({ "htu": at(MCP) })), "proof_htu_mismatch"),
        (
            "proof: htu of another server",
            signed(json!({}), json!({ "htu": format!("https://evil.example.com{TOKEN}") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu of another port",
            signed(json!({}), json!({ "htu": format!("https://localhost:1{TOKEN}") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu with our host as user",
            signed(json!({}), json!({ "htu": format!("https://localhost:{port}@evil.example.com{TOKEN}") })),
            "proof_malformed_claim",
        ),
        (
            "proof: htu with our host as a label",
            signed(json!({}), json!({ "htu": format!("https://localhost.evil.example.com:{port}{TOKEN}") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu over http",
            signed(json!({}), json!({ "htu": url.replace("https", "http") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu with a dot segment",
            signed(json!({}), json!({ "htu": at("/v1/auth/x/../token") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu with an escaped letter",
            signed(json!({}), json!({ "htu": at("/v1/auth/%74oken") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu with a slash too many",
            signed(json!({}), json!({ "htu": format!("{url}/") })),
            "proof_htu_mismatch",
        ),
        (
            "proof: htu with a backslash",
            signed(json!({}), json!({ "htu": url.replace("/v1", "\\v1") })),
            "proof_malformed_claim",
        ),
        ("proof: htu without scheme", signed(json!({}), json!({ "htu": TOKEN })), "proof_malformed_claim"),
    ];
    let none = world.mint(&world.alice.assertion(), &[]);
    world.refused("proof: none", TOKEN, &none, 401, "proof_missing");
    let two = world.mint(&world.alice.assertion(), &[&good, &good]);
    world.refused("proof: two DPoP headers", TOKEN, &two, 401, "proof_missing");
    let other = key.proof("POST", &url, None);
    let two = world.mint(&world.alice.assertion(), &[&good, &other]);
    world.refused("proof: two DPoP headers that differ", TOKEN, &two, 401, "proof_missing");
    for (attack, proof, reason) in cases {
        let answer = world.mint(&world.alice.assertion(), &[&proof]);
        world.refused(attack, TOKEN, &answer, 401, reason);
    }
    // Just outside the window on both sides, and just inside.
    for (attack, offset, reason) in
        [("proof: 63 s old", -63, "proof_stale"), ("proof: 8 s ahead", 8, "proof_future_issued")]
    {
        let proof = signed(json!({}), json!({ "iat": now() + offset }));
        let answer = world.mint(&world.alice.assertion(), &[&proof]);
        world.refused(attack, TOKEN, &answer, 401, reason);
    }
    for offset in [-50, 3] {
        let proof = signed(json!({}), json!({ "iat": now() + offset }));
        assert_eq!(world.mint(&world.alice.assertion(), &[&proof]).status, 200, "{offset}");
    }
    // What none of them did was use the identifiers up.
    assert_eq!(world.mint(&world.alice.assertion(), &[&good]).status, 200);
}

fn replays(world: &mut World) {
    let url = world.url(TOKEN);
    let key = Key::new();
    let (proof, assertion) = (key.proof("POST", &url, None), world.alice.assertion());
    let late = key.proof("POST", &url, None);
    assert_eq!(world.mint(&assertion, &[&proof]).status, 200);
    let answer = world.mint(&world.alice.assertion(), &[&proof]);
    world.refused("proof: replayed at once", TOKEN, &answer, 401, "replayed");
    let answer = world.mint(&assertion, &[&key.proof("POST", &url, None)]);
    world.refused("assertion: replayed with a fresh proof", TOKEN, &answer, 401, "replayed");
    assert_eq!(world.mint(&world.alice.assertion(), &[&late]).status, 200);
    world.deploy.restart();
    let answer = world.mint(&world.alice.assertion(), &[&late]);
    world.refused("proof: replayed after a restart", TOKEN, &answer, 401, "replayed");
    let answer = world.mint(&assertion, &[&key.proof("POST", &url, None)]);
    world.refused("assertion: replayed after a restart", TOKEN, &answer, 401, "replayed");
    // Many at once: one of them is the first.
    let (proof, wire) = (key.proof("POST", &url, None), world.wire.clone());
    let assertions: Vec<String> = (0..8).map(|_| world.alice.assertion()).collect();
    let accepted = std::thread::scope(|scope| {
        let sent: Vec<_> = assertions
            .iter()
            .map(|assertion| {
                let (wire, proof) = (&wire, &proof);
                scope.spawn(move || {
                    let body = json!({ "client_assertion": assertion }).to_string();
                    wire.send("POST", TOKEN, &[JSON, ("DPoP", proof)], &body).status
                })
            })
            .collect();
        sent.into_iter().map(|sent| sent.join().unwrap()).filter(|status| *status == 200).count()
    });
    assert_eq!(accepted, 1);
}

fn assertions(world: &mut World) {
    let (header, claims) = world.alice.assertion_parts();
    let alice = &world.alice.key;
    let signed = |header_changes: Value, claim_changes: Value| {
        let claims = with(&with(&claims, &json!({ "jti": unique() })), &claim_changes);
        alice.sign(&with(&header, &header_changes), &claims)
    };
    let mallory = Key::new();
    let doubled = claims.to_string().replacen('{', &format!(r#"{{"sub":"{}","#, world.bob.id), 1);
    let unsigned = |header_changes: Value| {
        format!("{}.{}.", b64u(with(&header, &header_changes).to_string()), b64u(claims.to_string()))
    };
    let leaf = STANDARD.decode(&world.alice.x5c()[0]).unwrap();
    let cases: Vec<(&str, String, u16, &str)> = vec![
        ("assertion: not a JWS", "assertion".to_owned(), 401, "jws_not_compact"),
        ("assertion: alg none", unsigned(json!({ "alg": "none" })), 401, "jws_algorithm"),
        (
            "assertion: alg HS256 keyed with the certificate",
            hmac_jws(&with(&header, &json!({ "alg": "HS256" })), &claims, &leaf),
            401,
            "jws_algorithm",
        ),
        (
            "assertion: alg RS256 with an EC certificate",
            signed(json!({ "alg": "RS256" }), json!({})),
            401,
            "jws_algorithm",
        ),
        ("assertion: typ of a proof", signed(json!({ "typ": "dpop+jwt" }), json!({})), 401, "assertion_type"),
        ("assertion: no typ", signed(json!({ "typ": "<absent>" }), json!({})), 401, "assertion_type"),
        (
            "assertion: no certificate",
            signed(json!({ "x5c": "<absent>" }), json!({})),
            401,
            "assertion_chain",
        ),
        (
            "assertion: seven certificates",
            signed(json!({ "x5c": vec![world.alice.x5c()[0].clone(); 7] }), json!({})),
            401,
            "assertion_chain",
        ),
        (
            "assertion: a certificate that is none",
            signed(json!({ "x5c": ["AQID"] }), json!({})),
            401,
            "assertion_chain_malformed",
        ),
        (
            "assertion: another agent's certificate",
            signed(json!({ "x5c": world.bob.x5c() }), json!({})),
            401,
            "jws_signature",
        ),
        (
            "assertion: key in the header instead of the certificate's",
            mallory.sign(&with(&header, &json!({ "jwk": mallory.jwk() })), &claims),
            401,
            "jws_signature",
        ),
        (
            "assertion: another agent as subject",
            signed(json!({}), json!({ "sub": world.bob.id, "iss": world.bob.id })),
            401,
            "assertion_subject_mismatch",
        ),
        (
            "assertion: another issuer",
            signed(json!({}), json!({ "iss": world.bob.id })),
            401,
            "assertion_issuer",
        ),
        ("assertion: a subject twice", alice.sign_text(&header.to_string(), &doubled), 401, "jws_payload"),
        (
            "assertion: another audience",
            signed(json!({}), json!({ "aud": "cullis-local" })),
            401,
            "assertion_audience",
        ),
        (
            "assertion: expired",
            signed(json!({}), json!({ "iat": now() - 300, "exp": now() - 32 })),
            401,
            "assertion_expired",
        ),
        (
            "assertion: not yet valid",
            signed(json!({}), json!({ "iat": now() + 200, "exp": now() + 300 })),
            401,
            "assertion_not_yet_valid",
        ),
        (
            "assertion: nbf ahead",
            signed(json!({}), json!({ "nbf": now() + 200 })),
            401,
            "assertion_not_yet_valid",
        ),
        (
            "assertion: lives an hour",
            signed(json!({}), json!({ "exp": now() + 3600 })),
            400,
            "assertion_lifetime",
        ),
        (
            "assertion: no exp",
            signed(json!({}), json!({ "exp": "<absent>" })),
            401,
            "assertion_missing_claim",
        ),
        (
            "assertion: no jti",
            signed(json!({}), json!({ "jti": "<absent>" })),
            401,
            "assertion_missing_claim",
        ),
    ];
    for (attack, assertion, status, reason) in cases {
        let proof = Key::new().proof("POST", &world.url(TOKEN), None);
        let answer = world.mint(&assertion, &[&proof]);
        world.refused(attack, TOKEN, &answer, status, reason);
    }
    let proof = Key::new().proof("POST", &world.url(TOKEN), None);
    let assertion = world.alice.assertion();
    let twice = format!(r#"{{"client_assertion":"{assertion}","client_assertion":"{assertion}"}}"#);
    let answer = world.wire.send("POST", TOKEN, &[JSON, ("DPoP", &proof)], &twice);
    world.refused("body: a member twice", TOKEN, &answer, 422, "body_malformed");
    let long = format!(r#"{{"client_assertion":"{}"}}"#, "a".repeat(2 * 1024 * 1024));
    let answer = world.wire.send("POST", TOKEN, &[JSON, ("DPoP", &proof)], &long);
    world.refused("body: over 2 MiB", TOKEN, &answer, 413, "body_too_large");
}

fn tokens(world: &mut World) {
    let key = Key::new();
    let url = world.url(MCP);
    let mine = world.token(&world.alice, &key);
    let proof = |token: &str| key.proof("POST", &url, Some(token));
    // A token from before its agent was made is nobody's: the forger's are older than this test.
    world.deploy.sql("UPDATE internal_agents SET created_at = '2026-01-01T00:00:00Z'");
    // The forger forges well: what is not changed is accepted.
    let forged = world.forged(&key, &json!({}), &json!({}));
    assert_eq!(world.use_token(&forged, &proof(&forged)).status, 200);
    let at_the_edge = world.forged(&key, &json!({}), &json!({ "iat": now() - 900, "exp": now() - 25 }));
    assert_eq!(world.use_token(&at_the_edge, &proof(&at_the_edge)).status, 200, "within the leeway");

    let none = world.use_with(&world.wire, &[]);
    world.refused("token: none", MCP, &none, 401, "token_missing");
    let answer = world.wire.send(
        "POST",
        &format!("{MCP}?access_token={mine}"),
        &[JSON, ("DPoP", &proof(&mine))],
        LIST,
    );
    world.refused("token: in the query", MCP, &answer, 401, "token_missing");
    let dpop = format!("DPoP {mine}");
    let bearer = format!("Bearer {mine}");
    let answer = world.use_with(
        &world.wire,
        &[("Authorization", &dpop), ("Authorization", &dpop), ("DPoP", &proof(&mine))],
    );
    world.refused("token: two Authorization headers", MCP, &answer, 401, "token_missing");
    let answer = world.use_with(&world.wire, &[("Authorization", &bearer)]);
    world.refused("token: Bearer downgrade", MCP, &answer, 401, "bearer_downgrade");
    let answer = world.use_with(&world.wire, &[("Authorization", &bearer), ("DPoP", &proof(&mine))]);
    world.refused("token: Bearer downgrade with a good proof", MCP, &answer, 401, "bearer_downgrade");
    let answer = world.use_with(&world.alice_wire, &[("Authorization", &bearer)]);
    world.refused(
        "token: Bearer downgrade with the agent's certificate",
        MCP,
        &answer,
        401,
        "bearer_downgrade",
    );
    let answer = world.use_with(&world.wire, &[("Authorization", &dpop)]);
    world.refused("token: no proof", MCP, &answer, 401, "proof_missing");
    let answer = world
        .use_with(&world.wire, &[("Authorization", &dpop), ("DPoP", &proof(&mine)), ("DPoP", &proof(&mine))]);
    world.refused("token: two proofs", MCP, &answer, 401, "proof_missing");
    let answer = world.use_token(&mine, &key.proof("POST", &url, None));
    world.refused("token: proof without ath", MCP, &answer, 401, "proof_ath_mismatch");
    let answer = world.use_token(&mine, &key.proof("POST", &url, Some(&forged)));
    world.refused("token: ath of another token", MCP, &answer, 401, "proof_ath_mismatch");
    let answer = world.use_token(&mine, &key.proof("GET", &url, Some(&mine)));
    world.refused("token: proof for GET", MCP, &answer, 401, "proof_htm_mismatch");
    let answer = world.use_token(&mine, &key.proof("POST", &world.url(TOKEN), Some(&mine)));
    world.refused("token: proof for the token endpoint", MCP, &answer, 401, "proof_htu_mismatch");
    let thief = Key::new();
    let answer = world.use_token(&mine, &thief.proof("POST", &url, Some(&mine)));
    world.refused("token: stolen, with the thief's own proof", MCP, &answer, 401, "proof_key_mismatch");
    let bobs = world.token(&world.bob, &thief);
    let answer = world.use_token(&bobs, &proof(&bobs));
    world.refused("token: another agent's", MCP, &answer, 401, "proof_key_mismatch");
    let used = proof(&mine);
    assert_eq!(world.use_token(&mine, &used).status, 200);
    let answer = world.use_token(&mine, &used);
    world.refused("token: proof replayed", MCP, &answer, 401, "replayed");
    let answer = world.use_token(&used, &proof(&used));
    world.refused("token: a proof in its place", MCP, &answer, 401, "token_type");
    let assertion = world.alice.assertion();
    let answer = world.use_token(&assertion, &proof(&assertion));
    world.refused("token: an assertion in its place", MCP, &answer, 401, "token_kid");

    let server_jwk = world.server.0.jwk().to_string();
    let (header, claims) =
        (json!({ "alg": "ES256", "typ": "JWT", "kid": world.server.1 }), world.claims(&key));
    let elsewhere = thumbprint(&thief.jwk());
    let forgeries: Vec<(&str, String, &str)> = vec![
        (
            "token: expired",
            world.forged(&key, &json!({}), &json!({ "iat": now() - 900, "exp": now() - 32 })),
            "token_expired",
        ),
        (
            "token: not yet valid",
            world.forged(&key, &json!({}), &json!({ "iat": now() + 200, "exp": now() + 300 })),
            "token_not_yet_valid",
        ),
        (
            "token: lives two hours",
            world.forged(&key, &json!({}), &json!({ "exp": now() + 7200 })),
            "token_lifetime",
        ),
        (
            "token: another audience",
            world.forged(&key, &json!({}), &json!({ "aud": "https://files.example.com" })),
            "token_audience",
        ),
        (
            "token: two audiences",
            world.forged(&key, &json!({}), &json!({ "aud": ["cullis-local", "x"] })),
            "token_malformed_claim",
        ),
        (
            "token: another issuer",
            world.forged(&key, &json!({}), &json!({ "iss": "cullis-mastio:other" })),
            "token_issuer",
        ),
        ("token: typ at+jwt", world.forged(&key, &json!({ "typ": "at+jwt" }), &json!({})), "token_type"),
        (
            "token: bound to nothing",
            world.forged(&key, &json!({}), &json!({ "cnf": "<absent>" })),
            "token_missing_claim",
        ),
        (
            "token: bound to an empty object",
            world.forged(&key, &json!({}), &json!({ "cnf": {} })),
            "token_malformed_claim",
        ),
        (
            "token: bound twice",
            world.forged(&key, &json!({}), &json!({ "cnf": { "jkt": elsewhere, "x5t#S256": elsewhere } })),
            "token_malformed_claim",
        ),
        (
            "token: bound to another key",
            world.forged(&key, &json!({}), &json!({ "cnf": { "jkt": elsewhere } })),
            "proof_key_mismatch",
        ),
        (
            "token: of an agent that is not there",
            world.forged(&key, &json!({}), &json!({ "sub": format!("{}::nobody", world.org) })),
            "agent_unknown_or_inactive",
        ),
        (
            "token: alg none",
            format!(
                "{}.{}.",
                b64u(with(&header, &json!({ "alg": "none" })).to_string()),
                b64u(claims.to_string())
            ),
            "jws_algorithm",
        ),
        (
            "token: alg HS256 keyed with our public key",
            hmac_jws(&with(&header, &json!({ "alg": "HS256" })), &claims, server_jwk.as_bytes()),
            "jws_algorithm",
        ),
        ("token: signed by the attacker", thief.sign(&header, &claims), "jws_signature"),
        (
            "token: signed by the attacker, key in the header",
            thief.sign(&with(&header, &json!({ "jwk": thief.jwk() })), &claims),
            "jws_signature",
        ),
        (
            "token: unknown kid",
            thief.sign(&with(&header, &json!({ "kid": "mastio-0000000000000000" })), &claims),
            "token_key_unknown",
        ),
        (
            "token: kid with SQL in it",
            thief.sign(&with(&header, &json!({ "kid": "' OR '1'='1" })), &claims),
            "token_key_unknown",
        ),
        (
            "token: too long",
            world.forged(&key, &json!({}), &json!({ "x": "x".repeat(17_000) })),
            "jws_too_long",
        ),
    ];
    for (attack, token, reason) in forgeries {
        let answer = world.use_token(&token, &proof(&token));
        world.refused(attack, MCP, &answer, 401, reason);
    }
    // No other token would do better, so it is no 401, after which a client logs in again.
    let token = world.forged(&key, &json!({}), &json!({ "scope": "local admin" }));
    let answer = world.use_token(&token, &proof(&token));
    world.refused("token: another scope", MCP, &answer, 403, "token_scope");
    let challenge = answer.header("WWW-Authenticate").unwrap();
    let expected = format!(
        "error=\"insufficient_scope\", scope=\"local\", resource_metadata=\"{}\"",
        world.url("/.well-known/oauth-protected-resource/v1/mcp")
    );
    assert!(challenge.contains(&expected), "{challenge}");
    let expired = json!({ "scope": "admin", "iat": now() - 900, "exp": now() - 32 });
    let token = world.forged(&key, &json!({}), &expired);
    let answer = world.use_token(&token, &proof(&token));
    world.refused("token: another scope, and expired", MCP, &answer, 401, "token_expired");
    assert!(answer.header("WWW-Authenticate").unwrap().contains("error=\"invalid_token\", scope=\"local\""));
}

fn forms(world: &mut World) {
    let url = world.url(TOKEN);
    let proof = || Key::new().proof("POST", &url, None);
    let other = world.alice.key.sign(
        &json!({ "alg": "ES256" }),
        &with(&world.alice.assertion_parts().1, &json!({ "aud": "https://other.example.com" })),
    );
    let bob = world.bob.id.clone();
    let cases: Vec<(&str, String, u16, &str)> = vec![
        (
            "form: a parameter twice",
            format!("{}&client_assertion=x", world.form(&[])),
            400,
            "parameter_repeated",
        ),
        ("form: no grant_type", world.form(&[("grant_type", "<absent>")]), 400, "parameter_missing"),
        ("form: grant_type password", world.form(&[("grant_type", "password")]), 400, "grant_type"),
        ("form: another scope", world.form(&[("scope", "admin")]), 400, "scope"),
        (
            "form: an unknown resource",
            world.form(&[("resource", "https://files.example.com")]),
            400,
            "target",
        ),
        (
            "form: two resources",
            format!("{}&resource=cullis-local&resource=x", world.form(&[])),
            400,
            "target",
        ),
        ("form: another client_id", world.form(&[("client_id", &bob)]), 401, "client_mismatch"),
        (
            "form: no authentication",
            world.form(&[("client_assertion", "<absent>"), ("client_id", &bob)]),
            401,
            "client_unauthenticated",
        ),
        (
            "form: a secret instead of an assertion",
            world.form(&[("client_assertion", "<absent>"), ("client_id", &bob), ("client_secret", "x")]),
            401,
            "client_unauthenticated",
        ),
        (
            "form: another kind of assertion",
            world.form(&[(
                "client_assertion_type",
                "urn:ietf:params:oauth:client-assertion-type:saml2-bearer",
            )]),
            400,
            "assertion_type",
        ),
        (
            "form: assertion for another server",
            world.form(&[("client_assertion", &other)]),
            401,
            "assertion_audience",
        ),
        ("form: bytes that are no UTF-8", "grant_type=%ff".to_owned(), 400, "form_malformed"),
    ];
    for (attack, form, status, reason) in cases {
        let answer = world.wire.send("POST", TOKEN, &[FORM, ("DPoP", &proof())], &form);
        world.refused(attack, TOKEN, &answer, status, reason);
    }
    let answer = world.wire.send("POST", TOKEN, &[FORM], &world.form(&[]));
    world.refused("form: neither proof nor certificate", TOKEN, &answer, 400, "unbound");
    let answer = world.bob_wire.send("POST", TOKEN, &[FORM], &world.form(&[]));
    world.refused("form: bound to another agent's certificate", TOKEN, &answer, 401, "client_mismatch");
    let by_certificate = encode(&[("grant_type", "client_credentials"), ("client_id", &world.alice.id)]);
    let answer = world.bob_wire.send("POST", TOKEN, &[FORM], &by_certificate);
    world.refused("form: another client_id than the certificate's", TOKEN, &answer, 401, "client_mismatch");
    let claimed = certificates(&world.alice.chain)[0].replace('\n', "%0A").replace(' ', "%20");
    let spoofed = [FORM, ("X-SSL-Client-Cert", claimed.as_str()), ("X-SSL-Client-Verify", "SUCCESS")];
    let answer = world.wire.send("POST", TOKEN, &spoofed, &by_certificate);
    world.refused(
        "form: certificate claimed by X-SSL-Client-Cert",
        TOKEN,
        &answer,
        401,
        "client_unauthenticated",
    );
    let answer = world.wire.send("POST", CHALLENGE, &spoofed[1..], "");
    world.refused(
        "login: certificate claimed by X-SSL-Client-Cert",
        CHALLENGE,
        &answer,
        401,
        "client_cert_required",
    );
}

fn bound_to_certificates(world: &mut World) {
    let by_certificate = encode(&[("grant_type", "client_credentials"), ("client_id", &world.alice.id)]);
    let granted = world.alice_wire.send("POST", TOKEN, &[FORM], &by_certificate);
    assert_eq!(granted.status, 200, "{granted:?}");
    let token = granted.json()["access_token"].as_str().unwrap().to_owned();
    let bearer = format!("Bearer {token}");
    assert_eq!(world.use_with(&world.alice_wire, &[("Authorization", &bearer)]).status, 200);
    let answer = world.use_with(&world.wire, &[("Authorization", &bearer)]);
    world.refused("certificate-bound: without a certificate", MCP, &answer, 401, "certificate_missing");
    let answer = world.use_with(&world.bob_wire, &[("Authorization", &bearer)]);
    world.refused("certificate-bound: with another agent's", MCP, &answer, 401, "certificate_mismatch");
    let key = Key::new();
    let answer = world.use_token(&token, &key.proof("POST", &world.url(MCP), Some(&token)));
    world.refused("certificate-bound: with a proof instead", MCP, &answer, 401, "bearer_downgrade");
    let claimed = certificates(&world.alice.chain)[0].replace('\n', "%0A").replace(' ', "%20");
    let spoofed = [
        ("Authorization", bearer.as_str()),
        ("X-SSL-Client-Cert", &claimed),
        ("X-SSL-Client-Verify", "SUCCESS"),
    ];
    let answer = world.use_with(&world.wire, &spoofed);
    world.refused(
        "certificate-bound: certificate claimed by a header",
        MCP,
        &answer,
        401,
        "certificate_missing",
    );
    // Bound to Bob's certificate, and issued to Alice: nothing of ours would issue it.
    let crossed =
        world.forged(&key, &json!({}), &json!({ "cnf": { "x5t#S256": certificate_thumbprint(&world.bob) } }));
    let answer = world.use_with(&world.bob_wire, &[("Authorization", &format!("Bearer {crossed}"))]);
    world.refused("certificate-bound: issued to somebody else", MCP, &answer, 401, "certificate_mismatch");
}

fn given_back(world: &mut World) {
    let key = Key::new();
    let (mine, bobs) = (world.token(&world.alice, &key), world.token(&world.bob, &key));
    let revoke = |world: &World, token: &str| {
        world.wire.send("POST", REVOKE, &[FORM], &world.form(&[("grant_type", "<absent>"), ("token", token)]))
    };
    let answer = world.wire.send("POST", REVOKE, &[FORM], &encode(&[("token", &mine)]));
    world.refused("revoke: by nobody", REVOKE, &answer, 401, "client_unauthenticated");
    let answer = revoke(world, &bobs);
    world.refused("revoke: another agent's token", REVOKE, &answer, 400, "token_of_another");
    let used =
        |world: &World, token: &str| world.use_token(token, &key.proof("POST", &world.url(MCP), Some(token)));
    assert_eq!(used(world, &bobs).status, 200);
    assert_eq!(used(world, &mine).status, 200);
    assert_eq!(revoke(world, &mine).status, 200);
    let answer = used(world, &mine);
    world.refused("token: revoked", MCP, &answer, 401, "token_revoked");
    assert_eq!(revoke(world, &mine).status, 200, "again is no error");
    assert_eq!(revoke(world, "nonsense").status, 200, "nothing to revoke is no error");

    let server = json!({ "name": "files", "resource": "https://files.example.com" });
    let server = world.deploy.admin_post("/v1/admin/resource-servers", &server).expect(201);
    let (id, secret) =
        (server["resource_server_id"].as_str().unwrap(), server["client_secret"].as_str().unwrap());
    let ask = |world: &World, credential: Option<&str>, token: &str| {
        let basic = credential.map(|credential| format!("Basic {}", STANDARD.encode(credential)));
        let mut headers = vec![FORM];
        headers.extend(basic.as_deref().map(|basic| ("Authorization", basic)));
        world.wire.send("POST", INTROSPECT, &headers, &encode(&[("token", token)]))
    };
    let answer = ask(world, None, &bobs);
    world.refused("introspect: no credential", INTROSPECT, &answer, 401, "resource_server_unauthenticated");
    let answer = ask(world, Some(&format!("{id}:wrong")), &bobs);
    world.refused("introspect: wrong secret", INTROSPECT, &answer, 401, "resource_server_credential");
    let answer = ask(world, Some(&format!("rs_0:{secret}")), &bobs);
    world.refused("introspect: wrong id", INTROSPECT, &answer, 401, "resource_server_credential");
    // Not refused, but told nothing: a token for us is none of its business, one for its own resource is.
    let credential = format!("{id}:{secret}");
    assert_eq!(ask(world, Some(&credential), &bobs).json(), json!({ "active": false }));
    let form = world.form(&[("resource", "https://files.example.com")]);
    let granted =
        world.wire.send("POST", TOKEN, &[FORM, ("DPoP", &key.proof("POST", &world.url(TOKEN), None))], &form);
    let theirs = granted.json()["access_token"].as_str().unwrap().to_owned();
    let told = ask(world, Some(&credential), &theirs).json();
    assert_eq!((&told["active"], &told["sub"]), (&json!(true), &json!(world.alice.id)));
    let answer = used(world, &theirs);
    world.refused("token: for a resource server, shown to us", MCP, &answer, 401, "token_audience");

    world.deploy.bash(
        &format!(
            "curl -sk -X DELETE -H 'X-Admin-Secret: {}' {}/v1/admin/agents/{}",
            harness::ADMIN_SECRET,
            world.deploy.url(),
            world.bob.id
        ),
        &[],
    );
    let answer = used(world, &bobs);
    world.refused("token: of a deactivated agent", MCP, &answer, 401, "agent_unknown_or_inactive");
    let proof = key.proof("POST", &world.url(TOKEN), None);
    let answer = world.mint(&world.bob.assertion(), &[&proof]);
    world.refused("assertion: of a deactivated agent", TOKEN, &answer, 401, "agent_unknown_or_inactive");
    assert_eq!(ask(world, Some(&credential), &bobs).json(), json!({ "active": false }));
}

/// Where nonces are required. The attacker knows the secret that they are made with, and so what the server said ten
/// minutes ago and what it will say in five.
fn nonces(database: Database) -> Vec<[String; 4]> {
    let mut world = World::new(database, &[("MCP_PROXY_DPOP_NONCE", "true")]);
    let sealed = world.deploy.sql("SELECT value FROM deploy_state WHERE key = 'dpop_nonce_key'");
    let secret =
        stolen_seal(&world.deploy, database).open("deploy_state/dpop_nonce_key/value", &sealed).unwrap();
    let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret.as_bytes());
    // In which five minutes the server is may change on the way.
    let period = now() / 300;
    let at = |period: i64| {
        let tag = aws_lc_rs::hmac::sign(&secret, format!("mastio dpop nonce\0{period}").as_bytes());
        b64u(&tag.as_ref()[..16])
    };
    let (url, key) = (world.url(TOKEN), Key::new());
    let proof = |nonce: &str| {
        let (header, claims) = key.proof_parts("POST", &url, None);
        key.sign(&header, &with(&claims, &json!({ "nonce": nonce })))
    };
    for (attack, nonce, reason) in [
        ("nonce: none", "<absent>".to_owned(), "proof_nonce_missing"),
        ("nonce: made up", b64u([7; 16]), "proof_nonce_mismatch"),
        ("nonce: stale, of ten minutes ago", at(period - 2), "proof_nonce_mismatch"),
        ("nonce: of the time to come", at(period + 2), "proof_nonce_mismatch"),
        ("nonce: cut short", at(period)[..21].to_owned(), "proof_nonce_mismatch"),
    ] {
        let answer = world.mint(&world.alice.assertion(), &[&proof(&nonce)]);
        assert_eq!(answer.json()["detail"], "use_dpop_nonce", "{attack}: {answer:?}");
        world.refused_or_asked(attack, TOKEN, &answer, 401, reason);
    }
    // The forger forges well, and nothing was used up by asking.
    let given = world.mint(&world.alice.assertion(), &[&proof(&at(now() / 300))]);
    assert_eq!(given.status, 200, "{given:?}");
    world.rows
}

fn attack(database: Database) {
    let mut world = World::new(database, &[]);
    world.rows = nonces(database);
    proofs(&mut world);
    assertions(&mut world);
    tokens(&mut world);
    forms(&mut world);
    bound_to_certificates(&mut world);
    replays(&mut world);
    given_back(&mut world);
    world.print(&format!("Token attacks on {database:?}, each refused and in the audit log"));
    assert!(world.rows.len() >= 100, "{} cases", world.rows.len());
    assert_eq!(world.deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn every_token_attack_is_refused_with_its_reason_and_an_event_on_sqlite() {
    attack(Database::Sqlite);
}

#[test]
fn every_token_attack_is_refused_with_its_reason_and_an_event_on_postgresql() {
    attack(Database::Postgres);
}

#[test]
fn a_flood_of_refusals_leaves_a_bounded_number_of_events_and_their_count() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let ca = deploy.get("/pki/ca.crt").body;
    let wire = Wire::new(deploy.port(), &ca, None);
    for _ in 0..100 {
        assert_eq!(wire.send("POST", MCP, &[JSON], LIST).status, 401);
    }
    let written = |event_type: &str| {
        let path = format!("/v1/admin/audit?event_type={event_type}&limit=1000");
        deploy.admin_get(&path).expect(200).as_array().unwrap().clone()
    };
    // The hundred may fall into two minutes.
    let each = written("auth.refused").len();
    assert!((30..=60).contains(&each), "{each}");
    let began = Instant::now();
    let summed = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_secs(1));
        (began.elapsed() < Duration::from_secs(90)).then(|| written("auth.refusals_summarised"))
    })
    .map(|events| events.iter().map(|event| event["details"]["count"].as_u64().unwrap()).sum::<u64>())
    .find(|sum| *sum + each as u64 == 100);
    assert_eq!(summed, Some(100 - each as u64));
}

/// What HTTP itself must not let through: two readings of one request.
#[test]
fn a_request_that_two_servers_would_read_differently_is_refused() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let ca = deploy.get("/pki/ca.crt").body;
    let wire = Wire::new(deploy.port(), &ca, None);
    let smuggled = "GET /v1/admin/agents HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let cases: Vec<(&str, String)> = vec![
        (
            "two lengths",
            format!(
                "POST {MCP} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n"
            ),
        ),
        (
            "a length that is no number",
            format!("POST {MCP} HTTP/1.1\r\nHost: localhost\r\nContent-Length: +0\r\n\r\n"),
        ),
        (
            "a space before the colon",
            format!("POST {MCP} HTTP/1.1\r\nHost: localhost\r\nContent-Length : 0\r\n\r\n"),
        ),
        ("a folded header", format!("POST {MCP} HTTP/1.1\r\nHost: localhost\r\nX-A: a\r\n b: c\r\n\r\n")),
        (
            "a bare carriage return in a header",
            format!("POST {MCP} HTTP/1.1\r\nHost: localhost\r\nX-A: a\rDPoP: b\r\n\r\n"),
        ),
        ("a nul in a header", format!("POST {MCP} HTTP/1.1\r\nHost: localhost\r\nX-A: a\0b\r\n\r\n")),
        (
            "chunked, not last",
            format!(
                "POST {MCP} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"
            ),
        ),
    ];
    println!("\n| request | status, http_malformed in the log |\n| --- | --- |");
    let cases_made = cases.len();
    for (name, request) in cases {
        let answer = wire.raw(request.as_bytes());
        println!("| {name} | {} |", answer.status);
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
    }
    // Nobody was asked for anything: that somebody sends such requests is in the log all the same.
    let malformed = wait_for("an event for each", || {
        let events = deploy.admin_get("/v1/admin/audit?event_type=auth.refused").expect(200);
        let events = events.as_array().unwrap().clone();
        let of_http = events.iter().filter(|event| event["details"]["reason"] == "http_malformed").count();
        (of_http >= cases_made).then_some(of_http)
    });
    println!("{malformed} events");
    // A length and chunks: the chunks count (RFC 9112 §6.3), the connection ends, and nothing is left to be read as a
    // second request.
    let both = format!(
        "POST {MCP} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        5 + smuggled.len()
    );
    let mut stream = wire.connect();
    stream.write_all(both.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let _until_closed = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    println!("| a length and chunks | {} |", answer.split(' ').nth(1).unwrap_or("closed"));
    assert!(answer.matches("HTTP/1.1 ").count() <= 1, "the smuggled request was answered: {answer}");
    wait_for("the server to go on", || (deploy.get("/healthz").status == 200).then_some(()));
}
