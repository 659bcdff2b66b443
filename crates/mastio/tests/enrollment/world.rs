//! A deploy without a past, keys of clients, and the requests that they make.

use std::fs;
use std::path::PathBuf;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use crate::harness::{Answer, Database, Deploy, PASSPHRASE};

/// A server on `database` with an organisation of its own, started.
pub fn fresh(database: Database) -> Deploy {
    fresh_with(database, &[])
}

/// The same with settings.
pub fn fresh_with(database: Database, settings: &[(&str, &str)]) -> Deploy {
    let mut deploy = Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE);
    for (name, value) in settings {
        deploy = deploy.set(name, value);
    }
    if database != Database::Sqlite {
        // An operator's way to PostgreSQL: begin here, copy there.
        deploy.start();
        deploy.stop();
    }
    let mut deploy = deploy.on(database);
    deploy.start();
    deploy
}

/// A second process on the same PostgreSQL.
pub fn replica_of(deploy: &Deploy) -> Deploy {
    let mut replica = Deploy::empty()
        .set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE)
        .set("MCP_PROXY_DATABASE_URL", deploy.database_url().expect("a replica shares a PostgreSQL"))
        .set("MCP_PROXY_PROXY_PUBLIC_URL", &deploy.url())
        .set("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0");
    replica.start();
    replica
}

/// The CA bundle of a deploy in a file.
pub fn ca_file(deploy: &Deploy) -> PathBuf {
    let path = deploy.folder().join("ca.crt");
    fs::write(&path, deploy.get("/pki/ca.crt").body).unwrap();
    path
}

/// A client's own P-256 key.
pub struct ClientKey {
    pair: EcdsaKeyPair,
    pkcs8: Vec<u8>,
}

fn pem(label: &str, der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let lines: Vec<&str> =
        encoded.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

impl ClientKey {
    /// A new one.
    pub fn new() -> Self {
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref()).unwrap();
        Self { pair, pkcs8: pkcs8.as_ref().to_vec() }
    }

    /// PKCS#8 PEM.
    pub fn private_pem(&self) -> String {
        pem("PRIVATE KEY", &self.pkcs8)
    }

    /// SPKI DER.
    pub fn spki(&self) -> Vec<u8> {
        let der: PublicKeyX509Der<'_> = self.pair.public_key().as_der().unwrap();
        der.as_ref().to_vec()
    }

    /// SPKI PEM.
    pub fn public_pem(&self) -> String {
        pem("PUBLIC KEY", &self.spki())
    }

    /// A DER signature, base64url.
    pub fn sign(&self, message: &str) -> String {
        URL_SAFE_NO_PAD.encode(self.pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap())
    }

    /// The public JWK.
    pub fn jwk(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        let coordinate = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
        json!({ "kty": "EC", "crv": "P-256", "x": coordinate(1), "y": coordinate(33) })
    }

    /// The body of a request for an identity with this key.
    pub fn ask(&self) -> Value {
        let fingerprint = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.spki());
        let fingerprint: String = fingerprint.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        json!({
            "pubkey_pem": self.public_pem(),
            "requester_name": "Ada",
            "requester_email": "ada@example.com",
            "reason": "to read invoices",
            "device_info": "{\"os\":\"linux\"}",
            "pop_signature": self.sign(&format!("enrollment-pop:v1|{fingerprint}")),
            "something_else": 1,
        })
    }

    /// The proof by which the outcome of `session` is read.
    pub fn status_proof(&self, session: &str) -> String {
        self.sign(&format!("enrollment-status:v1|{session}"))
    }
}

/// POST of a JSON body without a credential, from the loopback address `source`.
pub fn post_from(deploy: &Deploy, source: &str, path: &str, body: &Value) -> Answer {
    let body = body.to_string();
    // The name leads to ::1 first, where an IPv4 source has no way to.
    let resolve = format!("localhost:{}:127.0.0.1", deploy.port());
    let arguments =
        ["--interface", source, "--resolve", &resolve, "-H", "Content-Type: application/json", "-d", &body];
    deploy.curl(path, &arguments)
}

/// Asks for an identity, from an address that has not asked before. Returns the session id.
pub fn start(deploy: &Deploy, body: &Value) -> String {
    static NEXT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(10);
    let source = format!("127.0.9.{}", NEXT.fetch_add(1, std::sync::atomic::Ordering::SeqCst));
    let started = post_from(deploy, &source, "/v1/enrollment/start", body).expect(201);
    started["session_id"].as_str().unwrap().to_owned()
}

/// What `session` has become, read with a proof or without.
pub fn outcome(deploy: &Deploy, session: &str, proof: Option<&str>) -> Value {
    let header = format!("X-Enrollment-Proof: {}", proof.unwrap_or("nothing"));
    deploy.curl(&format!("/v1/enrollment/{session}/status"), &["-H", &header]).expect(200)
}

/// Approves `session` as `agent`.
pub fn approve(deploy: &Deploy, session: &str, agent: &str) -> Answer {
    let body = json!({ "agent_id": agent, "capabilities": ["invoices.read"], "groups": [] });
    deploy.admin_post(&format!("/v1/admin/enrollments/{session}/approve"), &body)
}

/// The events of one type, newest first.
pub fn events(deploy: &Deploy, event_type: &str) -> Vec<Value> {
    let list = deploy.admin_get(&format!("/v1/admin/audit?event_type={event_type}")).expect(200);
    list.as_array().unwrap().clone()
}

/// A client certificate with its key, as curl takes them.
pub struct Identity {
    certificate: PathBuf,
    key: PathBuf,
}

impl Identity {
    /// Writes them into the deploy's folder under `name`.
    pub fn new(deploy: &Deploy, name: &str, cert_pem: &str, key_pem: &str) -> Self {
        let certificate = deploy.folder().join(format!("{name}.crt"));
        let key = deploy.folder().join(format!("{name}.key"));
        fs::write(&certificate, cert_pem).unwrap();
        fs::write(&key, key_pem).unwrap();
        Self { certificate, key }
    }

    /// One request over mTLS; `more` before the URL.
    pub fn request(&self, deploy: &Deploy, path: &str, more: &[&str]) -> Answer {
        let mut arguments =
            vec!["--cert", self.certificate.to_str().unwrap(), "--key", self.key.to_str().unwrap()];
        arguments.extend(more);
        deploy.curl(path, &arguments)
    }

    /// A request that every agent may make.
    pub fn challenge(&self, deploy: &Deploy) -> Answer {
        self.request(deploy, "/v1/auth/login-challenge", &["-X", "POST"])
    }

    /// The stable reason for which the challenge is refused.
    pub fn refusal(&self, deploy: &Deploy) -> String {
        let detail = self.challenge(deploy).expect(401)["detail"].clone();
        detail["reason"].as_str().unwrap_or_else(|| panic!("{detail}")).to_owned()
    }
}

/// Creates a managed agent. Returns its id, chain and key.
pub fn managed(deploy: &Deploy, name: &str) -> (String, String, String) {
    let body = json!({ "agent_name": name, "capabilities": [] });
    let created = deploy.admin_post("/v1/admin/agents", &body).expect(201);
    let text = |field: &str| created[field].as_str().unwrap().to_owned();
    (text("agent_id"), text("cert_pem"), text("private_key_pem"))
}
