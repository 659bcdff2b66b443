//! What is done with bytes from outside, one function for each kind of them. libFuzzer calls them from `fuzz_targets/`,
//! the ordinary tests from `tests/corpus.rs`. None may panic, and what was read must mean the same when read again.

use std::sync::LazyLock;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::dpop::{ProofRequest, UnverifiedProof, normalize_url};
use mastio_core::json;
use mastio_core::time::UnixTime;
use mastio_core::token::assertion::UnverifiedAssertion;
use mastio_core::token::claims::UnverifiedAccessToken;
use mastio_core::token::enrollment::{verify_enrollment_pop, verify_status_proof};
use mastio_core::token::jwk::PublicJwk;
use mastio_core::token::jws::UnverifiedJws;
use mastio_core::x509::csr::CertificateRequest;
use mastio_core::x509::path::{self, Anchor};
use mastio_core::x509::{Certificate, identity, lints, spki_der_from_pem};
use serde_json::{Value, json};

/// What is done with arbitrary bytes. It may refuse them in any way but by a panic.
pub type Target = fn(&[u8]);

/// Every target by its name, which is that of its corpus too.
pub const TARGETS: [(&str, Target); 13] = [
    ("json", json_text),
    ("jws", jws),
    ("jwk", jwk),
    ("spki", spki),
    ("dpop_proof", dpop_proof),
    ("dpop_claims", dpop_claims),
    ("client_assertion", client_assertion),
    ("assertion_claims", assertion_claims),
    ("access_token_claims", access_token_claims),
    ("certificate", certificate),
    ("certificate_request", certificate_request),
    ("chain", chain),
    ("possession", possession),
];

const NOW: UnixTime = UnixTime(1_776_971_061);
const URL: &str = "https://mastio.example.com/v1/mcp";

static KEY: LazyLock<(EcdsaKeyPair, PublicJwk)> = LazyLock::new(|| {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let point = pair.public_key().as_ref();
    let coordinate = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
    let jwk = json!({ "kty": "EC", "crv": "P-256", "x": coordinate(1), "y": coordinate(33) });
    let public = PublicJwk::from_value(&jwk).expect("its public half");
    (pair, public)
});

/// A good signature over whatever claims, so that the code behind the signature is reached.
fn signed(header: &Value, claims: &[u8]) -> String {
    let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims));
    let signature = KEY.0.sign(&SystemRandom::new(), input.as_bytes()).expect("a signature");
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn json_text(data: &[u8]) {
    if let Ok(value) = json::parse(data) {
        let again = json::parse(value.to_string().as_bytes()).expect("what we write we can read");
        // A fraction may move by its last bit on the way; nothing of ours holds one.
        assert!(has_fraction(&value) || again == value);
    }
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(items) => items.iter().any(has_fraction),
        Value::Object(members) => members.values().any(has_fraction),
        _ => false,
    }
}

fn jws(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(jws) = UnverifiedJws::parse(text) {
        let _claims = jws.unverified_claims();
        assert!(jws.verify(&KEY.1, &[]).is_err(), "nothing verifies under no algorithm");
    }
}

fn jwk(data: &[u8]) {
    let Ok(value) = json::parse(data) else { return };
    if let Ok(key) = PublicJwk::from_value(&value) {
        let again = PublicJwk::from_value(&key.to_value()).expect("what we write we can read");
        assert_eq!(again.thumbprint(), key.thumbprint());
        assert_eq!(PublicJwk::from_spki_der(&key.spki_der()).as_ref(), Ok(&key));
    }
}

fn spki(data: &[u8]) {
    if let Ok(key) = PublicJwk::from_spki_der(data) {
        assert_eq!(key.spki_der(), data, "one spelling for each key");
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _der = spki_der_from_pem(text);
    }
}

fn dpop_proof(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(url) = normalize_url(text) {
        assert_eq!(normalize_url(&url).as_ref(), Some(&url), "normal is normal");
    }
    if let Ok(proof) = UnverifiedProof::parse(text) {
        let urls = [URL.to_owned()];
        let request = ProofRequest { method: "POST", urls: &urls, access_token: None, nonce: None, now: NOW };
        let _verified = proof.verify(&request);
    }
}

fn dpop_claims(data: &[u8]) {
    let header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": KEY.1.to_value() });
    let text = signed(&header, data);
    let Ok(proof) = UnverifiedProof::parse(&text) else { return };
    let (urls, nonces) = ([URL.to_owned()], ["n".to_owned()]);
    let request =
        ProofRequest { method: "POST", urls: &urls, access_token: Some("t"), nonce: Some(&nonces), now: NOW };
    if let Ok(proof) = proof.verify(&request) {
        assert_eq!(proof.jkt, KEY.1.thumbprint());
        assert!(NOW.since(proof.issued_at) <= 60 && NOW.since(proof.issued_at) >= -5);
    }
}

fn client_assertion(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let parsed = [UnverifiedAssertion::parse(text), UnverifiedAssertion::parse_standard(text)];
    for assertion in parsed.into_iter().flatten() {
        assert!(assertion.chain_der().len() <= 6);
        let _verified = assertion.verify(&KEY.1.spki_der(), NOW);
    }
}

fn assertion_claims(data: &[u8]) {
    let text = signed(&json!({ "alg": "ES256" }), data);
    let Ok(assertion) = UnverifiedAssertion::parse_standard(&text) else { return };
    if let Ok(verified) = assertion.verify_standard(&KEY.1.spki_der(), &[URL], NOW) {
        assert!(verified.expires_at.since(verified.issued_at) <= 3600);
        assert!(NOW < verified.expires_at.plus(30));
    }
}

fn access_token_claims(data: &[u8]) {
    let text = signed(&json!({ "alg": "ES256", "typ": "JWT", "kid": "mastio-1" }), data);
    let Ok(token) = UnverifiedAccessToken::parse(&text) else { return };
    if let Ok(claims) = token.verify(&KEY.1, "cullis-mastio:acme", NOW) {
        assert!(claims.confirmation.to_value().as_object().is_some_and(|cnf| cnf.len() == 1), "bound once");
        assert!(NOW < claims.expires_at.plus(30));
    }
}

fn certificate(data: &[u8]) {
    let parsed = match std::str::from_utf8(data) {
        Ok(text) if text.contains("-----BEGIN") => Certificate::from_pem(text),
        _ => Certificate::from_der(data),
    };
    let Ok(certificate) = parsed else { return };
    assert_eq!(Certificate::from_pem(&certificate.to_pem()).as_ref(), Ok(&certificate));
    let _identity = identity::identity(&certificate);
    let _constraints = certificate.basic_constraints();
    let _serial = certificate.serial_hex();
    let _key = certificate.key_algorithm();
}

fn certificate_request(data: &[u8]) {
    let _der = CertificateRequest::from_der(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _pem = CertificateRequest::from_pem(text);
    }
}

/// Certificates as a client shows them, first the leaf, against the last of them as what is trusted.
fn chain(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(certificates) = Certificate::chain_from_pem(text) else { return };
    let [leaf, others @ ..] = &certificates[..] else { return };
    let root = others.last().unwrap_or(leaf);
    let now = leaf.not_before().plus(1);
    for role in [lints::Role::CertificateAuthority, lints::Role::Agent, lints::Role::Server] {
        let _findings = lints::full_findings(leaf, root, role);
    }
    let _findings = (lints::resign_findings(leaf, root), lints::complete_findings(leaf, root));
    let _verdict = path::verify_ca_chain(leaf, root, now);
    let anchors: Vec<Anchor> = Anchor::from_certificate(root).into_iter().collect();
    let lenient = path::validate(leaf, others, &[], &anchors, now);
    if let Ok(valid) = &lenient {
        assert_eq!(valid.leaf(), leaf);
        assert!(anchors.iter().any(|anchor| anchor.certificate() == valid.anchor()));
    }
    let strict = path::validate_strict(leaf, others, root, now);
    // More than a caller may show is refused for that alone.
    assert!(strict.is_err() || lenient.is_ok() || others.len() > path::PRESENTED_MAX);
}

/// A key, a line feed, and what is said to be its signature.
fn possession(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (key, proof) = text.split_once('\n').unwrap_or(("", text));
    let key = URL_SAFE_NO_PAD.decode(key).unwrap_or_else(|_| KEY.1.spki_der());
    let start = verify_enrollment_pop(&key, proof);
    let status = verify_status_proof(&key, "JKA0oHuQ4RROTAIMabNFJGkxSGY-oFo5", proof);
    assert!(start.is_err() || status.is_err(), "one proof for two texts");
}

/// Runs the target of this name.
pub fn run(name: &str, data: &[u8]) {
    if let Some((_, target)) = TARGETS.iter().find(|(other, _)| *other == name) {
        target(data);
    }
}
