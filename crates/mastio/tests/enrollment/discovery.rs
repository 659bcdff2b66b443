//! What anybody may read of us, and agents of each other: discovery, peers, and the bounds on both.

use serde_json::{Value, json};

use crate::harness::sdk::{Agent, Python};
use crate::harness::{Database, Deploy, openssl};
use crate::world::{ClientKey, Identity, ca_file, fresh, managed};

#[test]
fn the_bootstrap_document_names_the_organisation_and_its_ca_and_is_kept_by_its_etag() {
    let deploy = fresh(Database::Sqlite);
    let path = "/.well-known/cullis/connector-bootstrap";
    let document = deploy.get(path).expect(200);
    let (agent_id, ..) = managed(&deploy, "billing");
    assert_eq!(document["version"], 1);
    assert_eq!(document["mode"], "configured");
    assert_eq!(document["trust_domain"], "cullis.local");
    assert!(agent_id.starts_with(&format!("{}::", document["org_id"].as_str().unwrap())));
    let ca = deploy.get("/pki/ca.crt").body;
    let shown = openssl(&["x509", "-noout", "-fingerprint", "-sha256"], &ca);
    let fingerprint = shown.rsplit_once('=').unwrap().1.replace(':', "").to_lowercase();
    assert_eq!(document["ca_fingerprint_sha256"], json!(fingerprint));
    for (_, url) in document["urls"].as_object().unwrap() {
        let url = url.as_str().unwrap().replace("{session_id}", "unknown");
        assert!(url.starts_with('/'), "{url}");
        let status = deploy.get(&url).status;
        assert!(status == 200 || url.contains("enrollment"), "{url}: {status}");
    }
    let head = deploy.curl(path, &["-D", "-", "-o", "/dev/null"]).body.to_lowercase();
    assert!(head.contains("cache-control: public, max-age=60"), "{head}");
    let etag =
        head.lines().find_map(|line| line.strip_prefix("etag: ")).map(|tag| tag.trim().to_owned()).unwrap();
    // Tags are compared as they are written.
    let head = deploy.curl(path, &["-D", "-", "-o", "/dev/null"]).body;
    let exact =
        head.lines().find(|line| line.to_lowercase().starts_with("etag: ")).unwrap()[6..].trim().to_owned();
    assert_eq!(exact.to_lowercase(), etag);
    assert_eq!(deploy.curl(path, &["-H", &format!("If-None-Match: {exact}")]).status, 304);
    assert_eq!(deploy.curl(path, &["-H", "If-None-Match: \"another\""]).status, 200);
}

#[test]
fn what_anybody_may_read_is_read_thirty_times_a_minute_from_one_source() {
    let deploy = fresh(Database::Sqlite);
    let paths = [
        "/pki/ca.crt",
        "/pki/crl",
        "/.well-known/jwks-local.json",
        "/.well-known/cullis/connector-bootstrap",
    ];
    for (number, path) in paths.into_iter().enumerate() {
        let source = format!("127.0.3.{}", number + 1);
        let resolve = format!("localhost:{}:127.0.0.1", deploy.port());
        let arguments = ["--interface", &source, "--resolve", &resolve, "-o", "/dev/null"];
        // A slow run gets one back every two seconds.
        let statuses: Vec<u16> = (0..45).map(|_| deploy.curl(path, &arguments).status).collect();
        assert!(statuses[..30].iter().all(|status| *status == 200), "{path}: {statuses:?}");
        assert!(statuses[30..].contains(&429), "{path}: {statuses:?}");
        let elsewhere = deploy.curl(path, &["-o", "/dev/null"]);
        assert_eq!(elsewhere.status, 200, "{path}: another source has its own");
    }
}

fn peers(identity: &Identity, deploy: &Deploy, query: &str) -> Vec<String> {
    let answer = identity.request(deploy, &format!("/v1/egress/peers{query}"), &[]).expect(200);
    let peers = answer["peers"].as_array().unwrap();
    assert_eq!(answer["count"], json!(peers.len()));
    peers
        .iter()
        .map(|peer| peer["agent_id"].as_str().unwrap().rsplit_once("::").unwrap().1.to_owned())
        .collect()
}

#[test]
fn an_agent_sees_the_other_active_agents_and_not_itself() {
    let deploy = fresh(Database::Sqlite);
    let (_, chain, key) = managed(&deploy, "billing");
    for name in ["ledger", "mailer", "retired"] {
        managed(&deploy, name);
    }
    deploy.admin_post("/v1/admin/agents/retired/deactivate", &json!({})).expect(200);
    let identity = Identity::new(&deploy, "billing", &chain, &key);
    assert_eq!(peers(&identity, &deploy, ""), ["ledger", "mailer"]);
    assert_eq!(peers(&identity, &deploy, "?q=LEDG"), ["ledger"]);
    assert_eq!(peers(&identity, &deploy, "?limit=1"), ["ledger"]);
    assert!(peers(&identity, &deploy, "?q=nobody").is_empty());
    assert_eq!(deploy.get("/v1/egress/peers").expect(401)["detail"]["reason"], "client_cert_required");
    let public = identity.request(&deploy, "/v1/egress/agents/ledger/public-key", &[]);
    assert_eq!(public.status, 400, "a bare name: {public:?}");
}

fn by_sdk(python: Python) {
    let deploy = fresh(Database::Sqlite);
    let (agent_id, chain, key) = managed(&deploy, "billing");
    managed(&deploy, "ledger");
    let directory = deploy.folder().join("sdk");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("agent.crt"), chain).unwrap();
    std::fs::write(directory.join("agent.key"), key).unwrap();
    let mut agent = Agent::open(python, &deploy.url(), &agent_id, &directory, &ca_file(&deploy));
    let found: Value = agent.ask(&json!({ "cmd": "peers" })).unwrap();
    assert_eq!(agent.ask(&json!({ "cmd": "models" })).unwrap(), json!([]), "no model is served here");
    assert!(found.to_string().contains("::ledger") && !found.to_string().contains("::billing"), "{found}");
}

#[test]
fn the_sdk_lists_its_peers_and_no_models() {
    by_sdk(Python::Plain);
}

#[test]
fn the_sdk_on_a_strict_python_lists_its_peers_and_no_models() {
    by_sdk(Python::Strict);
}

#[test]
fn a_persistent_key_is_pinned_by_its_public_half_alone() {
    let deploy = fresh(Database::Sqlite);
    let (agent_id, ..) = managed(&deploy, "billing");
    let key = ClientKey::new();
    let path = format!("/v1/admin/agents/{agent_id}/dpop-jwk");
    let pinned = deploy.admin_post(&path, &json!({ "jwk": key.jwk() })).expect(200);
    assert_eq!(pinned["agent_id"], json!(agent_id));
    // Percent-encoded, as some clients write the id.
    let encoded = path.replace("::", "%3A%3A");
    let again = deploy.admin_post(&encoded, &json!({ "jwk": ClientKey::new().jwk() })).expect(200);
    assert_ne!(again["dpop_jkt"], pinned["dpop_jkt"]);
    let shown = deploy.admin_get("/v1/admin/agents/billing").expect(200);
    assert_eq!((&shown["dpop_jkt"], &shown["previous_dpop_jkt"]), (&again["dpop_jkt"], &pinned["dpop_jkt"]));
    let mut private = key.jwk();
    private["d"] = json!("AAAA");
    assert_eq!(deploy.admin_post(&path, &json!({ "jwk": private })).status, 400);
    assert_eq!(
        deploy.admin_post("/v1/admin/agents/nobody/dpop-jwk", &json!({ "jwk": key.jwk() })).status,
        404
    );
}

#[test]
fn what_is_deprecated_or_left_out_answers_404() {
    let deploy = fresh(Database::Sqlite);
    for path in [
        "/v1/enroll/some-token",
        "/v1/federation/agents/search",
        "/v1/egress/message/inbox",
        "/v1/broker/sessions",
    ] {
        assert_eq!(deploy.get(path).status, 404, "{path}");
    }
    assert_eq!(
        deploy.curl("/v1/policy/tool-call", &["-X", "POST", "-d", "{}"]).status,
        404,
        "the SDK takes 404 for allowed"
    );
}

#[test]
fn every_answer_has_the_security_headers() {
    let deploy = fresh(Database::Sqlite);
    for path in ["/healthz", "/pki/ca.crt", "/v1/admin/agents", "/nowhere"] {
        let head = deploy.curl(path, &["-D", "-", "-o", "/dev/null"]).body.to_lowercase();
        for wanted in [
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "referrer-policy: strict-origin-when-cross-origin",
            "permissions-policy: camera=(), microphone=(), geolocation=()",
            "strict-transport-security: max-age=31536000; includesubdomains",
            "cache-control: ",
        ] {
            assert!(head.contains(wanted), "{path} has no {wanted}: {head}");
        }
        assert!(!head.contains("x-cullis-role: broker"));
    }
}
