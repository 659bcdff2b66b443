#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    time::UnixTime,
    token::{
        claims::access_token_hash,
        jwk::JwkError,
        jws::JwsError,
        test_keys::{EC, RSA, TestKey, with},
    },
};

const NOW: UnixTime = UnixTime(1_776_971_061);
const URL: &str = "https://mastio.acme.test/v1/mcp";
const TOKEN: &str = "aaa.bbb.ccc";

fn header() -> Value {
    json!({"typ": "dpop+jwt", "alg": "ES256", "jwk": EC.public().to_value()})
}

fn claims() -> Value {
    json!({"jti": "2f1e", "htm": "POST", "htu": URL, "iat": NOW.0})
}

fn verify_with(
    text: &str,
    access_token: Option<&str>,
    nonce: Option<&[String]>,
) -> Result<Proof, ProofError> {
    let urls = [URL.to_owned(), "https://localhost:9443/v1/mcp".to_owned()];
    let request = ProofRequest { method: "POST", urls: &urls, access_token, nonce, now: NOW };
    UnverifiedProof::parse(text)?.verify(&request)
}

fn verify(text: &str) -> Result<Proof, ProofError> {
    verify_with(text, None, None)
}

fn signed(header_changes: &Value, claim_changes: &Value) -> String {
    EC.sign(&with(&header(), header_changes), &with(&claims(), claim_changes))
}

fn vectors() -> Value {
    let vectors: Value = serde_json::from_str(include_str!("../../vectors/rfc-tokens.json")).unwrap();
    vectors["rfc9449"].clone()
}

#[test]
fn the_proofs_printed_in_rfc_9449_are_accepted() {
    let vectors = vectors();
    let text = |name: &str| vectors[name].as_str().unwrap();
    // Section 4.1, figure 1, and section 5.
    let urls = ["https://server.example.com/token".to_owned()];
    let request = ProofRequest {
        method: "POST",
        urls: &urls,
        access_token: None,
        nonce: None,
        now: UnixTime(1_562_262_616),
    };
    let proof = UnverifiedProof::parse(text("token_request_proof")).unwrap().verify(&request).unwrap();
    assert_eq!(proof.jwt_id, "-BwC3ESc6acc2lTc");
    assert_eq!(proof.issued_at, UnixTime(1_562_262_616));
    // Section 6.1.
    assert_eq!(proof.jkt, text("jkt"));
    // Section 7.1.
    let urls = ["https://resource.example.org/protectedresource".to_owned()];
    let request = ProofRequest {
        method: "GET",
        urls: &urls,
        access_token: Some(text("access_token")),
        nonce: None,
        now: UnixTime(1_562_262_618),
    };
    let proof = UnverifiedProof::parse(text("resource_request_proof")).unwrap().verify(&request).unwrap();
    assert_eq!(proof.jkt, text("jkt"));
}

#[test]
fn a_proof_as_the_sdk_signs_it_is_accepted() {
    let proof = verify(&signed(&json!({}), &json!({}))).unwrap();
    assert_eq!(proof, Proof { jkt: EC.public().thumbprint(), jwt_id: "2f1e".to_owned(), issued_at: NOW });
    let rsa = json!({"alg": "PS256", "jwk": RSA.public().to_value()});
    let proof = verify(&RSA.sign(&with(&header(), &rsa), &claims())).unwrap();
    assert_eq!(proof.jkt, RSA.public().thumbprint());
}

#[test]
fn a_proof_with_a_wrong_header_is_refused() {
    let ec = EC.public().to_value();
    let x = ec["x"].as_str().unwrap();
    let jws = ProofError::Jws;
    let key = ProofError::Key;
    for (name, changes, error) in [
        ("typ JWT", json!({"typ": "JWT"}), ProofError::Type),
        ("typ in capitals", json!({"typ": "DPOP+JWT"}), ProofError::Type),
        ("typ with its prefix", json!({"typ": "application/dpop+jwt"}), ProofError::Type),
        ("no typ", json!({"typ": "<absent>"}), ProofError::Type),
        ("alg none", json!({"alg": "none"}), jws(JwsError::Algorithm)),
        ("alg HS256", json!({"alg": "HS256"}), jws(JwsError::Algorithm)),
        ("alg RS256", json!({"alg": "RS256"}), jws(JwsError::Algorithm)),
        ("alg ES512", json!({"alg": "ES512"}), jws(JwsError::Algorithm)),
        ("no alg", json!({"alg": "<absent>"}), jws(JwsError::Algorithm)),
        ("alg for another key", json!({"alg": "PS256"}), jws(JwsError::KeyType)),
        ("no jwk", json!({"jwk": "<absent>"}), ProofError::MissingKey),
        ("jwk null", json!({"jwk": null}), key(JwkError::NotAnObject)),
        ("jwk text", json!({"jwk": ec.to_string()}), key(JwkError::NotAnObject)),
        ("private", json!({"jwk": with(&ec, &json!({"d": x}))}), key(JwkError::PrivateMember("d"))),
        ("private, empty", json!({"jwk": with(&ec, &json!({"d": ""}))}), key(JwkError::PrivateMember("d"))),
        ("symmetric", json!({"jwk": {"kty": "oct", "k": "AAAA"}}), key(JwkError::PrivateMember("k"))),
        (
            "padded x",
            json!({"jwk": with(&ec, &json!({"x": format!("{x}=")}))}),
            key(JwkError::MalformedMember("x")),
        ),
        ("off the curve", json!({"jwk": with(&ec, &json!({"y": x}))}), key(JwkError::NotOnCurve)),
        ("another key", json!({"jwk": TestKey::ec().public().to_value()}), jws(JwsError::Signature)),
        ("crit", json!({"crit": ["jwk"]}), jws(JwsError::Extension("crit"))),
        ("b64", json!({"b64": true}), jws(JwsError::Extension("b64"))),
    ] {
        assert_eq!(verify(&signed(&changes, &json!({}))), Err(error), "{name}");
    }
}

#[test]
fn a_proof_with_a_wrong_claim_is_refused() {
    use ProofError::{MalformedClaim, MissingClaim};
    for (name, changes, error) in [
        ("no jti", json!({"jti": "<absent>"}), MissingClaim("jti")),
        ("jti empty", json!({"jti": ""}), MalformedClaim("jti")),
        ("jti of 129", json!({"jti": "j".repeat(129)}), MalformedClaim("jti")),
        ("jti a number", json!({"jti": 1}), MalformedClaim("jti")),
        ("jti with a nul", json!({"jti": "a\u{0}b"}), MalformedClaim("jti")),
        ("no iat", json!({"iat": "<absent>"}), MissingClaim("iat")),
        ("iat text", json!({"iat": NOW.0.to_string()}), MalformedClaim("iat")),
        ("iat a fraction", json!({"iat": 1_776_971_061.5}), MalformedClaim("iat")),
        ("iat out of range", json!({"iat": i64::MIN}), MalformedClaim("iat")),
        ("no htm", json!({"htm": "<absent>"}), MissingClaim("htm")),
        ("htm a list", json!({"htm": ["POST"]}), MalformedClaim("htm")),
        ("other htm", json!({"htm": "GET"}), ProofError::HtmMismatch { expected: "POST".to_owned() }),
        ("longer htm", json!({"htm": "POSTS"}), ProofError::HtmMismatch { expected: "POST".to_owned() }),
        ("no htu", json!({"htu": "<absent>"}), MissingClaim("htu")),
        ("htu a number", json!({"htu": 1}), MalformedClaim("htu")),
    ] {
        assert_eq!(verify(&signed(&json!({}), &changes)), Err(error), "{name}");
    }
    for (name, changes) in [
        ("jti of 128", json!({"jti": "j".repeat(128)})),
        ("jti of one", json!({"jti": "j"})),
        ("htm in small letters", json!({"htm": "post"})),
        ("a nonce nobody asked for", json!({"nonce": "old"})),
        ("an ath nobody asked for", json!({"ath": "x"})),
    ] {
        assert!(verify(&signed(&json!({}), &changes)).is_ok(), "{name}");
    }
}

#[test]
fn a_proof_for_another_url_is_refused() {
    for (name, htu) in [
        ("other host", "https://mastio.acme.test.evil.test/v1/mcp"),
        ("other scheme", "http://mastio.acme.test/v1/mcp"),
        ("other port", "https://mastio.acme.test:444/v1/mcp"),
        ("default port of the other scheme", "https://mastio.acme.test:80/v1/mcp"),
        ("longer path", "https://mastio.acme.test/v1/mcp/"),
        ("shorter path", "https://mastio.acme.test/v1"),
        ("path in capitals", "https://mastio.acme.test/V1/mcp"),
        ("dot segment", "https://mastio.acme.test/v1/x/../mcp"),
        ("escaped letter", "https://mastio.acme.test/v1/%6dcp"),
        ("double slash", "https://mastio.acme.test//v1/mcp"),
        ("path in the query", "https://mastio.acme.test?/v1/mcp"),
        ("path in the fragment", "https://mastio.acme.test#/v1/mcp"),
        ("trailing dot", "https://mastio.acme.test./v1/mcp"),
        ("path parameter", "https://mastio.acme.test/v1/mcp;a=b"),
    ] {
        let refused = verify(&signed(&json!({}), &json!({"htu": htu})));
        assert!(matches!(refused, Err(ProofError::HtuMismatch { .. })), "{name}: {refused:?}");
    }
    for (name, htu) in [
        ("empty", ""),
        ("path alone", "/v1/mcp"),
        ("no scheme", "mastio.acme.test/v1/mcp"),
        ("scheme alone", "https://"),
        ("no host", "https:///v1/mcp"),
        ("port alone", "https://:443/v1/mcp"),
        ("one slash", "https:/mastio.acme.test/v1/mcp"),
        ("other protocol", "ftp://mastio.acme.test/v1/mcp"),
        ("user", "https://user@mastio.acme.test/v1/mcp"),
        ("user that looks like the host", "https://mastio.acme.test:443@evil.test/v1/mcp"),
        ("backslash", "https://mastio.acme.test\\v1/mcp"),
        ("space", "https://mastio.acme.test/v1/mcp "),
        ("tab", "https://mastio.acme.test/v1/\tmcp"),
        ("not ascii", "https://mastio.acme.test/v1/mcр"),
        ("port no number", "https://mastio.acme.test:https/v1/mcp"),
        ("port with a zero", "https://mastio.acme.test:0443/v1/mcp"),
        ("port signed", "https://mastio.acme.test:+443/v1/mcp"),
        ("too long", &format!("{URL}?{}", "a".repeat(HTU_BYTES_MAX))),
    ] {
        assert_eq!(
            verify(&signed(&json!({}), &json!({"htu": htu}))),
            Err(ProofError::MalformedClaim("htu")),
            "{name}"
        );
    }
}

#[test]
fn other_spellings_of_the_same_url_are_accepted() {
    for (name, htu) in [
        ("query", "https://mastio.acme.test/v1/mcp?a=b"),
        ("fragment", "https://mastio.acme.test/v1/mcp#x"),
        ("both", "https://mastio.acme.test/v1/mcp?a=b#x?c"),
        ("capitals", "HTTPS://Mastio.Acme.Test/v1/mcp"),
        ("default port", "https://mastio.acme.test:443/v1/mcp"),
        ("empty port", "https://mastio.acme.test:/v1/mcp"),
        ("web socket", "wss://mastio.acme.test/v1/mcp"),
        ("the other accepted url", "https://localhost:9443/v1/mcp"),
    ] {
        assert!(verify(&signed(&json!({}), &json!({"htu": htu}))).is_ok(), "{name}");
    }
}

#[test]
fn a_url_mismatch_says_what_was_compared() {
    let error =
        verify(&signed(&json!({}), &json!({"htu": "https://10.0.0.1:9443/v1/mcp?secret=1"}))).unwrap_err();
    assert_eq!(
        error,
        ProofError::HtuMismatch {
            got: "https://10.0.0.1:9443/v1/mcp".to_owned(),
            expected: format!("{URL}, https://localhost:9443/v1/mcp"),
        }
    );
    assert!(!error.to_string().contains("secret"));
    assert_eq!(error.reason(), "proof_htu_mismatch");
}

#[test]
fn urls_have_one_form() {
    for (url, expected) in [
        ("http://h:80", Some("http://h/")),
        ("ws://h:8080", Some("http://h:8080/")),
        ("https://[::1]:443/a", Some("https://[::1]/a")),
        ("https://[::1]:9443/a", Some("https://[::1]:9443/a")),
        ("https://[::1]/a:b", Some("https://[::1]/a:b")),
        ("https://h:99999999/a", None),
        ("https://h:1:2/a", None),
        ("https://@h/a", None),
        ("javascript://h/a", None),
    ] {
        assert_eq!(normalize_url(url).as_deref(), expected, "{url}");
    }
}

#[test]
fn iat_is_accepted_up_to_its_limits() {
    for (offset, accepted) in
        [(-61, false), (-60, true), (-59, true), (0, true), (4, true), (5, true), (6, false)]
    {
        let issued_at = NOW.0 + offset;
        let verdict = verify(&signed(&json!({}), &json!({"iat": issued_at})));
        let expected = match offset {
            _ if accepted => None,
            ..0 => Some(ProofError::Stale { issued_at, now: NOW.0 }),
            _ => Some(ProofError::FutureIssued { issued_at, now: NOW.0 }),
        };
        assert_eq!(verdict.err(), expected, "iat {offset:+}");
    }
}

#[test]
fn a_proof_that_accompanies_a_token_must_carry_its_hash() {
    let ath = access_token_hash(TOKEN);
    for (name, changes, accepted) in [
        ("right", json!({"ath": ath}), true),
        ("absent", json!({}), false),
        ("of another token", json!({"ath": access_token_hash("aaa.bbb.ccd")}), false),
        ("padded", json!({"ath": format!("{ath}=")}), false),
        ("the token itself", json!({"ath": TOKEN}), false),
        ("null", json!({"ath": null}), false),
    ] {
        let verdict = verify_with(&signed(&json!({}), &changes), Some(TOKEN), None);
        assert_eq!(verdict.err(), (!accepted).then_some(ProofError::AthMismatch), "{name}");
    }
}

#[test]
fn a_required_nonce_must_be_one_of_those_accepted_now() {
    let accepted = ["current".to_owned(), "previous".to_owned()];
    for (name, changes, error) in [
        ("current", json!({"nonce": "current"}), None),
        ("previous", json!({"nonce": "previous"}), None),
        ("absent", json!({}), Some(ProofError::NonceMissing)),
        ("older", json!({"nonce": "older"}), Some(ProofError::NonceMismatch)),
        ("empty", json!({"nonce": ""}), Some(ProofError::NonceMismatch)),
        ("a list", json!({"nonce": ["current"]}), Some(ProofError::NonceMismatch)),
    ] {
        let verdict = verify_with(&signed(&json!({}), &changes), None, Some(&accepted));
        assert_eq!(verdict.err(), error, "{name}");
    }
    // With no nonce to accept, nothing passes.
    let verdict = verify_with(&signed(&json!({}), &json!({"nonce": ""})), None, Some(&[]));
    assert_eq!(verdict, Err(ProofError::NonceMismatch));
    assert!(ProofError::NonceMismatch.asks_for_nonce() && ProofError::NonceMissing.asks_for_nonce());
    assert!(!ProofError::AthMismatch.asks_for_nonce());
}

#[test]
fn faults_are_found_in_the_order_of_the_contract() {
    // Every claim is wrong; mending one at a time shows the next.
    let accepted = ["current".to_owned()];
    let mut changes = json!({"jti": "", "iat": 0, "htm": "GET", "htu": "https://h/", "ath": "", "nonce": ""});
    let mut reasons = Vec::new();
    for (name, right) in [
        ("jti", json!("2f1e")),
        ("iat", json!(NOW.0)),
        ("htm", json!("POST")),
        ("htu", json!(URL)),
        ("ath", json!(access_token_hash(TOKEN))),
        ("nonce", json!("current")),
    ] {
        let verdict = verify_with(&signed(&json!({}), &changes), Some(TOKEN), Some(&accepted));
        reasons.push(verdict.unwrap_err().reason());
        changes[name] = right;
    }
    assert_eq!(
        reasons,
        [
            "proof_malformed_claim",
            "proof_stale",
            "proof_htm_mismatch",
            "proof_htu_mismatch",
            "proof_ath_mismatch",
            "proof_nonce_mismatch"
        ]
    );
}

#[test]
fn nothing_of_the_proof_shows_in_errors_or_debug_output() {
    let text = signed(&json!({}), &json!({"jti": "secret-jti", "htm": "SECRET-METHOD"}));
    let unverified = UnverifiedProof::parse(&text).unwrap();
    let signature = text.rsplit_once('.').unwrap().1;
    let shown = format!("{unverified:?} {:?} {}", verify(&text), verify(&text).unwrap_err());
    for part in [signature, "secret-jti", "SECRET-METHOD", &text[..40]] {
        assert!(!shown.contains(part), "{part} is shown");
    }
}

proptest! {
    #[test]
    fn random_text_never_panics(text in ".*") {
        let _ = verify(&text);
    }

    #[test]
    fn random_urls_never_panic_and_normalizing_twice_changes_nothing(url in "(https?|wss?|[a-z]*)://[ -~]*") {
        if let Some(once) = normalize_url(&url) {
            prop_assert_eq!(normalize_url(&once), Some(once.clone()));
        }
    }

    #[test]
    fn random_claims_never_panic(jti in ".*", htu in ".*", iat: i64) {
        let _ = verify(&signed(&json!({}), &json!({"jti": jti, "htu": htu, "iat": iat})));
    }
}
