//! The client assertion: what an agent signs with its certificate's key to ask for a token (wire §4.3).
//!
//! Order of events: parse, look at the chain and the claimed subject, validate the path to the leaf (in
//! [`crate::x509`]), and only then verify with the leaf's key. The chain in the header is a bag of
//! certificates the client happened to have; what counts is the first one.
//!
//! Two profiles: the SDK's ([`UnverifiedAssertion::parse`], chain required, a fixed audience), and that of ordinary OAuth
//! clients ([`UnverifiedAssertion::parse_standard`], RFC 7523), which send no chain and name our URL.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use super::{
    ClaimFault, JTI_CHARACTERS_MAX, LEEWAY_S,
    jwk::{JwkError, PublicJwk},
    jws::{JwsAlgorithm, JwsError, UnverifiedJws, signing_input},
    text_claim, time_claim,
};
use crate::time::UnixTime;

/// The audience an assertion must name.
pub const ASSERTION_AUDIENCE: &str = "agent-trust-broker";
/// Seconds from `iat` to `exp`, at most.
pub const ASSERTION_LIFETIME_S_MAX: i64 = 300;
/// Seconds that a standard assertion may still live, at most: what common clients ask for.
pub const STANDARD_ASSERTION_LIFETIME_S_MAX: i64 = 3600;
/// Certificates in `x5c`, at most.
pub const ASSERTION_CERTIFICATES_MAX: usize = 6;
/// Bytes of an assertion, at most. Six certificates, encoded twice, do not fit in a common JWS.
pub const ASSERTION_BYTES_MAX: usize = 64 * 1024;
/// Characters of a subject, at most.
pub const SUBJECT_CHARACTERS_MAX: usize = 512;
/// Characters of a login nonce, at most.
pub const ASSERTION_NONCE_CHARACTERS_MAX: usize = 128;

/// Why a client assertion was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssertionError {
    /// The JWS is malformed, or its signature is not by the leaf.
    #[error("client assertion is no jws signed by the leaf")]
    Jws(#[from] JwsError),
    /// The leaf's key is not of an accepted kind.
    #[error("client assertion is under a key that is not accepted")]
    LeafKey(#[source] JwkError),
    /// `typ` is not `JWT`.
    #[error("client assertion typ is not JWT")]
    Type,
    /// `x5c` is missing, empty, too long, or not the base64 of certificates.
    #[error("client assertion x5c is not one to six certificates in base64")]
    Chain,
    /// A required claim is missing.
    #[error("client assertion claim {0} is missing")]
    MissingClaim(&'static str),
    /// A claim has the wrong type or length.
    #[error("client assertion claim {0} is malformed")]
    MalformedClaim(&'static str),
    /// `aud` does not name us.
    #[error("client assertion is for another audience")]
    Audience,
    /// `iss` is not `sub`.
    #[error("client assertion issuer is not its subject")]
    Issuer,
    /// `exp` has passed.
    #[error("client assertion expired at {expires_at}, now is {now}")]
    Expired {
        /// The claim `exp`, in Unix seconds.
        expires_at: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `iat` or `nbf` lies in the future.
    #[error("client assertion is valid from {from}, now is {now}")]
    NotYetValid {
        /// The later of `iat` and `nbf`, in Unix seconds.
        from: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `exp` is too long after `iat`, or not after it at all. HTTP 400 at `sign-challenged-assertion`.
    #[error("client assertion lifetime of {lifetime_s} s is outside 1 to {lifetime_s_max} s")]
    Lifetime {
        /// `exp − iat`.
        lifetime_s: i64,
        /// What is accepted.
        lifetime_s_max: i64,
    },
}

impl AssertionError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Jws(error) => error.reason(),
            Self::LeafKey(error) => error.reason(),
            Self::Type => "assertion_type",
            Self::Chain => "assertion_chain",
            Self::MissingClaim(_) => "assertion_missing_claim",
            Self::MalformedClaim(_) => "assertion_malformed_claim",
            Self::Audience => "assertion_audience",
            Self::Issuer => "assertion_issuer",
            Self::Expired { .. } => "assertion_expired",
            Self::NotYetValid { .. } => "assertion_not_yet_valid",
            Self::Lifetime { .. } => "assertion_lifetime",
        }
    }
}

/// A client assertion whose signature and times have been verified.
///
/// What it does not say: whether the leaf is trusted, registered for `subject`, or has used `jwt_id` before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assertion {
    /// The claim `sub`: the agent, `<org>::<name>`.
    pub subject: String,
    /// The claim `jti`, 1 to 128 characters.
    pub jwt_id: String,
    /// The claim `nonce` of a login challenge. Absent in an assertion that we made for the agent.
    pub nonce: Option<String>,
    /// The claim `iat`.
    pub issued_at: UnixTime,
    /// The claim `exp`.
    pub expires_at: UnixTime,
}

/// The signing input of an assertion that we make for an agent whose key we hold (wire §4.4): without a nonce.
///
/// Shape: `chain_der` is the leaf first; sign the ASCII bytes with the leaf's key and pass both to
/// [`super::jws::assemble`]. `rsa` says that this key is RSA.
#[must_use]
pub fn to_unsigned(chain_der: &[&[u8]], rsa: bool, subject: &str, jwt_id: &str, now: UnixTime) -> String {
    let algorithm = if rsa { JwsAlgorithm::Rs256 } else { JwsAlgorithm::Es256 };
    let chain: Vec<String> = chain_der.iter().map(|der| STANDARD.encode(der)).collect();
    signing_input(
        &json!({"alg": algorithm.as_str(), "typ": "JWT", "x5c": chain}),
        &json!({
            "sub": subject,
            "iss": subject,
            "aud": ASSERTION_AUDIENCE,
            "iat": now.0,
            "exp": now.plus(ASSERTION_LIFETIME_S_MAX).0,
            "jti": jwt_id,
        }),
    )
}

/// A client assertion, parsed and not yet verified.
#[derive(Debug, Clone)]
pub struct UnverifiedAssertion {
    jws: UnverifiedJws,
    claims: Map<String, Value>,
    chain_der: Vec<Vec<u8>>,
    subject: String,
}

impl UnverifiedAssertion {
    /// Parses an assertion of at most [`ASSERTION_BYTES_MAX`] bytes.
    ///
    /// Errors: [`AssertionError::Jws`], [`AssertionError::Type`], [`AssertionError::Chain`], and
    /// [`AssertionError::MissingClaim`] or [`AssertionError::MalformedClaim`] for `sub`.
    /// Source: RFC 7523 §3, RFC 7515 §4.1.6.
    pub fn parse(text: &str) -> Result<Self, AssertionError> {
        let jws = UnverifiedJws::parse_bounded(text, ASSERTION_BYTES_MAX)?;
        if !jws.unverified_header().contains_key("x5c") {
            return Err(if typ(&jws, &["JWT"]) { AssertionError::Chain } else { AssertionError::Type });
        }
        Self::read(jws, &["JWT"])
    }

    /// Parses an assertion of an ordinary OAuth client.
    ///
    /// Shape: `typ` may be absent, `JWT` or `client-authentication+jwt`; `x5c` may be absent, and
    /// [`UnverifiedAssertion::chain_der`] is empty then: the key is the registered one.
    /// Errors: as for [`UnverifiedAssertion::parse`].
    /// Source: RFC 7523 §3; `private_key_jwt` of OpenID Connect Core §9.
    pub fn parse_standard(text: &str) -> Result<Self, AssertionError> {
        let jws = UnverifiedJws::parse_bounded(text, ASSERTION_BYTES_MAX)?;
        Self::read(jws, &["", "JWT", "client-authentication+jwt"])
    }

    fn read(jws: UnverifiedJws, types: &[&str]) -> Result<Self, AssertionError> {
        if !typ(&jws, types) {
            return Err(AssertionError::Type);
        }
        let chain_der: &[Value] = match jws.unverified_header().get("x5c") {
            None => &[],
            Some(chain) => chain.as_array().filter(|chain| !chain.is_empty()).ok_or(AssertionError::Chain)?,
        };
        if chain_der.len() > ASSERTION_CERTIFICATES_MAX {
            return Err(AssertionError::Chain);
        }
        let chain_der = chain_der
            .iter()
            .map(|certificate| certificate.as_str().and_then(|text| STANDARD.decode(text).ok()))
            .map(|der| der.filter(|der| !der.is_empty()).ok_or(AssertionError::Chain))
            .collect::<Result<Vec<_>, _>>()?;
        let claims = jws.unverified_claims()?;
        let subject = required(&claims, "sub", SUBJECT_CHARACTERS_MAX)?;
        Ok(Self { jws, claims, chain_der, subject })
    }

    /// The certificates of `x5c` in the order given: the leaf first, then 0 to 5 others, perhaps repeated.
    #[must_use]
    pub fn chain_der(&self) -> &[Vec<u8>] {
        &self.chain_der
    }

    /// The claim `sub`, unverified.
    #[must_use]
    pub fn unverified_subject(&self) -> &str {
        &self.subject
    }

    /// Verifies the assertion under the leaf's key.
    ///
    /// Shape: `leaf_spki_der` is the SPKI of the certificate that the caller has validated; its type fixes
    /// the algorithm, ES256 or RS256.
    /// Units: whole seconds; [`LEEWAY_S`] applies to both sides of every time.
    /// Errors: any of [`AssertionError`]; [`AssertionError::Lifetime`] only when all the rest holds.
    /// Not here: trust in the leaf, the nonce's value, replay.
    /// Source: RFC 7523 §3, RFC 7519 §4.1.
    pub fn verify(&self, leaf_spki_der: &[u8], now: UnixTime) -> Result<Assertion, AssertionError> {
        let key = PublicJwk::from_spki_der(leaf_spki_der).map_err(AssertionError::LeafKey)?;
        let algorithm = if key.is_p256() { JwsAlgorithm::Es256 } else { JwsAlgorithm::Rs256 };
        self.jws.verify(&key, &[algorithm])?;
        let issued_at = instant(&self.claims, "iat");
        self.judge(issued_at, &[ASSERTION_AUDIENCE], ASSERTION_LIFETIME_S_MAX, now)
    }

    /// Verifies an assertion of an ordinary OAuth client under the leaf's key.
    ///
    /// Shape: as for [`UnverifiedAssertion::verify`], with these differences: an RSA key may sign PS256 as well; `aud`
    /// names one of `audiences`; `iss` is required; `iat` may be absent and is `now` then.
    /// Errors: any of [`AssertionError`].
    /// Source: RFC 7523 §3.
    pub fn verify_standard(
        &self,
        leaf_spki_der: &[u8],
        audiences: &[&str],
        now: UnixTime,
    ) -> Result<Assertion, AssertionError> {
        let key = PublicJwk::from_spki_der(leaf_spki_der).map_err(AssertionError::LeafKey)?;
        let algorithms: &[JwsAlgorithm] =
            if key.is_p256() { &[JwsAlgorithm::Es256] } else { &[JwsAlgorithm::Rs256, JwsAlgorithm::Ps256] };
        self.jws.verify(&key, algorithms)?;
        if !self.claims.contains_key("iss") {
            return Err(AssertionError::MissingClaim("iss"));
        }
        let issued_at = match instant(&self.claims, "iat") {
            Err(AssertionError::MissingClaim(_)) => Ok(now),
            other => other,
        };
        self.judge(issued_at, audiences, STANDARD_ASSERTION_LIFETIME_S_MAX, now)
    }

    /// What both profiles ask of the claims, once the signature has verified.
    fn judge(
        &self,
        issued_at: Result<UnixTime, AssertionError>,
        audiences: &[&str],
        lifetime_s_max: i64,
        now: UnixTime,
    ) -> Result<Assertion, AssertionError> {
        let claims = &self.claims;
        let expires_at = instant(claims, "exp")?;
        let issued_at = issued_at?;
        let not_before = if claims.contains_key("nbf") { instant(claims, "nbf")? } else { issued_at };
        if now >= expires_at.plus(LEEWAY_S) {
            return Err(AssertionError::Expired { expires_at: expires_at.0, now: now.0 });
        }
        let from = issued_at.max(not_before);
        if from > now.plus(LEEWAY_S) {
            return Err(AssertionError::NotYetValid { from: from.0, now: now.0 });
        }
        match claims.get("aud").ok_or(AssertionError::MissingClaim("aud"))? {
            Value::String(audience) if audiences.contains(&audience.as_str()) => {}
            Value::Array(named)
                if named.iter().filter_map(Value::as_str).any(|audience| audiences.contains(&audience)) => {}
            _ => return Err(AssertionError::Audience),
        }
        if claims.get("iss").is_some_and(|oauth_issuer| oauth_issuer.as_str() != Some(&self.subject)) {
            return Err(AssertionError::Issuer);
        }
        let jwt_id = required(claims, "jti", JTI_CHARACTERS_MAX)?;
        let nonce = match claims.get("nonce") {
            None => None,
            Some(_) => Some(required(claims, "nonce", ASSERTION_NONCE_CHARACTERS_MAX)?),
        };
        // Last, because it answers 400 where the others answer 401.
        let lifetime_s = expires_at.since(issued_at);
        if !(1..=lifetime_s_max).contains(&lifetime_s) {
            return Err(AssertionError::Lifetime { lifetime_s, lifetime_s_max });
        }
        Ok(Assertion { subject: self.subject.clone(), jwt_id, nonce, issued_at, expires_at })
    }
}

/// Whether `typ` is one of these, in any case; the empty text stands for none.
fn typ(jws: &UnverifiedJws, types: &[&str]) -> bool {
    match jws.unverified_header().get("typ") {
        None => types.contains(&""),
        Some(Value::String(typ)) => {
            !typ.is_empty() && types.iter().any(|wanted| typ.eq_ignore_ascii_case(wanted))
        }
        Some(_) => false,
    }
}

fn named(name: &'static str) -> impl Fn(ClaimFault) -> AssertionError {
    move |fault| match fault {
        ClaimFault::Missing => AssertionError::MissingClaim(name),
        ClaimFault::Malformed => AssertionError::MalformedClaim(name),
    }
}

fn required(
    claims: &Map<String, Value>,
    name: &'static str,
    characters_max: usize,
) -> Result<String, AssertionError> {
    text_claim(claims, name, characters_max).map_err(named(name))
}

fn instant(claims: &Map<String, Value>, name: &'static str) -> Result<UnixTime, AssertionError> {
    time_claim(claims, name).map_err(named(name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::token::test_keys::{EC, RSA, TestKey, with};

    const NOW: UnixTime = UnixTime(1_776_971_061);

    fn header() -> Value {
        json!({"alg": "ES256", "typ": "JWT", "x5c": ["AQID", "BAUG"]})
    }

    fn claims() -> Value {
        json!({
            "sub": "acme::a", "iss": "acme::a", "aud": ASSERTION_AUDIENCE,
            "iat": NOW.0, "exp": NOW.0 + 300, "jti": "7c2e", "nonce": "n-1",
        })
    }

    fn verify_at(text: &str, key: &TestKey, now: UnixTime) -> Result<Assertion, AssertionError> {
        UnverifiedAssertion::parse(text)?.verify(&key.spki_der(), now)
    }

    #[test]
    fn an_assertion_as_the_sdk_signs_it_is_accepted_under_either_kind_of_leaf() {
        for (key, alg) in [(&*EC, "ES256"), (&*RSA, "RS256")] {
            let text = key.sign(&with(&header(), &json!({"alg": alg})), &claims());
            let unverified = UnverifiedAssertion::parse(&text).unwrap();
            assert_eq!(unverified.chain_der(), [vec![1, 2, 3], vec![4, 5, 6]]);
            assert_eq!(unverified.unverified_subject(), "acme::a");
            let assertion = unverified.verify(&key.spki_der(), NOW).unwrap();
            assert_eq!(
                assertion,
                Assertion {
                    subject: "acme::a".to_owned(),
                    jwt_id: "7c2e".to_owned(),
                    nonce: Some("n-1".to_owned()),
                    issued_at: NOW,
                    expires_at: NOW.plus(300),
                }
            );
        }
    }

    #[test]
    fn what_may_be_absent_or_written_otherwise_is_accepted() {
        for (name, changes) in [
            ("no nonce", json!({"nonce": "<absent>"})),
            ("no issuer", json!({"iss": "<absent>"})),
            ("audience among others", json!({"aud": ["other", ASSERTION_AUDIENCE]})),
            ("longest jti", json!({"jti": "é".repeat(128)})),
            ("another claim", json!({"extra": {"deep": [1.5]}})),
        ] {
            let text = EC.sign(&header(), &with(&claims(), &changes));
            assert!(verify_at(&text, &EC, NOW).is_ok(), "{name}");
        }
    }

    #[test]
    fn an_assertion_with_a_wrong_header_is_refused() {
        for (name, changes, error) in [
            ("alg none", json!({"alg": "none"}), AssertionError::Jws(JwsError::Algorithm)),
            ("alg of a shared key", json!({"alg": "HS256"}), AssertionError::Jws(JwsError::Algorithm)),
            ("alg of another kind of key", json!({"alg": "RS256"}), AssertionError::Jws(JwsError::Algorithm)),
            ("typ of a proof", json!({"typ": "dpop+jwt"}), AssertionError::Type),
            ("no typ", json!({"typ": "<absent>"}), AssertionError::Type),
            ("no chain", json!({"x5c": "<absent>"}), AssertionError::Chain),
            ("empty chain", json!({"x5c": []}), AssertionError::Chain),
            ("seven certificates", json!({"x5c": vec!["AQID"; 7]}), AssertionError::Chain),
            ("chain no list", json!({"x5c": "AQID"}), AssertionError::Chain),
            ("certificate no text", json!({"x5c": [1]}), AssertionError::Chain),
            ("certificate empty", json!({"x5c": [""]}), AssertionError::Chain),
            ("certificate in base64url", json!({"x5c": ["-_-_"]}), AssertionError::Chain),
            ("certificate with a line feed", json!({"x5c": ["AQ\nID"]}), AssertionError::Chain),
        ] {
            let text = EC.sign(&with(&header(), &changes), &claims());
            assert_eq!(verify_at(&text, &EC, NOW), Err(error), "{name}");
        }
        assert!(
            verify_at(&EC.sign(&with(&header(), &json!({"x5c": vec!["AQID"; 6]})), &claims()), &EC, NOW)
                .is_ok()
        );
    }

    #[test]
    fn an_assertion_with_a_wrong_claim_is_refused() {
        use AssertionError::{MalformedClaim, MissingClaim};
        for (name, changes, error) in [
            ("no sub", json!({"sub": "<absent>"}), MissingClaim("sub")),
            ("sub empty", json!({"sub": ""}), MalformedClaim("sub")),
            ("sub with a nul", json!({"sub": "a\u{0}"}), MalformedClaim("sub")),
            ("other issuer", json!({"iss": "acme::b"}), AssertionError::Issuer),
            ("issuer no text", json!({"iss": ["acme::a"]}), AssertionError::Issuer),
            ("no audience", json!({"aud": "<absent>"}), MissingClaim("aud")),
            ("other audience", json!({"aud": "cullis-local"}), AssertionError::Audience),
            ("audience by prefix", json!({"aud": "agent-trust-broker2"}), AssertionError::Audience),
            ("no audience in the list", json!({"aud": []}), AssertionError::Audience),
            ("no exp", json!({"exp": "<absent>"}), MissingClaim("exp")),
            ("exp a fraction", json!({"exp": 1_776_971_361.5}), MalformedClaim("exp")),
            ("exp text", json!({"exp": "1776971361"}), MalformedClaim("exp")),
            ("exp negative", json!({"exp": -1}), MalformedClaim("exp")),
            ("exp huge", json!({"exp": u64::MAX}), MalformedClaim("exp")),
            ("no iat", json!({"iat": "<absent>"}), MissingClaim("iat")),
            ("no jti", json!({"jti": "<absent>"}), MissingClaim("jti")),
            ("jti empty", json!({"jti": ""}), MalformedClaim("jti")),
            ("jti too long", json!({"jti": "j".repeat(129)}), MalformedClaim("jti")),
            ("jti a number", json!({"jti": 7}), MalformedClaim("jti")),
            ("nonce null", json!({"nonce": null}), MalformedClaim("nonce")),
            ("nbf text", json!({"nbf": "soon"}), MalformedClaim("nbf")),
        ] {
            let text = EC.sign(&header(), &with(&claims(), &changes));
            assert_eq!(verify_at(&text, &EC, NOW), Err(error), "{name}");
        }
    }

    #[test]
    fn times_are_accepted_up_to_their_limits() {
        let text = EC.sign(&header(), &claims());
        let expired = |now: i64| AssertionError::Expired { expires_at: NOW.0 + 300, now: NOW.0 + now };
        let early = |now: i64| AssertionError::NotYetValid { from: NOW.0, now: NOW.0 + now };
        for (offset, error) in [
            (-31, Some(early(-31))),
            (-30, None),
            (-29, None),
            (329, None),
            (330, Some(expired(330))),
            (331, Some(expired(331))),
        ] {
            assert_eq!(verify_at(&text, &EC, NOW.plus(offset)).err(), error, "now {offset:+}");
        }
        for (lifetime_s, accepted) in
            [(-1, false), (0, false), (1, true), (299, true), (300, true), (301, false)]
        {
            let text = EC.sign(&header(), &with(&claims(), &json!({"exp": NOW.0 + lifetime_s})));
            let error = (!accepted).then_some(AssertionError::Lifetime { lifetime_s, lifetime_s_max: 300 });
            assert_eq!(verify_at(&text, &EC, NOW).err(), error, "lifetime {lifetime_s}");
        }
        for (not_before, accepted) in [(30, true), (31, false)] {
            let text = EC.sign(&header(), &with(&claims(), &json!({"nbf": NOW.0 + not_before})));
            assert_eq!(verify_at(&text, &EC, NOW).is_ok(), accepted, "nbf {not_before:+}");
        }
    }

    #[test]
    fn an_assertion_that_we_make_is_one_that_we_accept() {
        let unsigned = to_unsigned(&[&[1, 2, 3], &[4, 5, 6]], false, "acme::a", "7c2e", NOW);
        let text = EC.sign_input(&unsigned, false);
        assert_eq!(UnverifiedAssertion::parse(&text).unwrap().chain_der(), [vec![1, 2, 3], vec![4, 5, 6]]);
        let assertion = verify_at(&text, &EC, NOW).unwrap();
        assert_eq!((assertion.subject.as_str(), assertion.nonce), ("acme::a", None));
    }

    #[test]
    fn an_ordinary_client_s_assertion_needs_no_chain_and_names_our_url() {
        let ours = ["https://mastio.example.com", "https://mastio.example.com/v1/auth/token"];
        let verify = |key: &TestKey, text: &str| {
            UnverifiedAssertion::parse_standard(text)?.verify_standard(&key.spki_der(), &ours, NOW)
        };
        let claims = with(&claims(), &json!({"aud": ours[0], "nonce": "<absent>", "exp": NOW.0 + 3600}));
        for (key, header) in [
            (&*EC, json!({"alg": "ES256"})),
            (&*EC, json!({"alg": "ES256", "typ": "client-authentication+jwt", "kid": "k"})),
            (&*RSA, json!({"alg": "RS256", "typ": "jwt"})),
            (&*RSA, json!({"alg": "PS256"})),
        ] {
            let assertion = verify(key, &key.sign(&header, &claims)).unwrap();
            assert_eq!((assertion.subject.as_str(), assertion.issued_at), ("acme::a", NOW));
        }
        for changes in [json!({"aud": ["other", ours[1]]}), json!({"iat": "<absent>"})] {
            let text = EC.sign(&json!({"alg": "ES256"}), &with(&claims, &changes));
            assert!(verify(&EC, &text).is_ok(), "{changes}");
        }
        for (changes, error) in [
            (json!({"aud": "https://other.example.com"}), AssertionError::Audience),
            (json!({"aud": "https://mastio.example.com/"}), AssertionError::Audience),
            (json!({"iss": "<absent>"}), AssertionError::MissingClaim("iss")),
            (json!({"iss": "acme::b"}), AssertionError::Issuer),
            (
                json!({"iat": "<absent>", "exp": NOW.0 + 3601}),
                AssertionError::Lifetime { lifetime_s: 3601, lifetime_s_max: 3600 },
            ),
            (json!({"jti": "<absent>"}), AssertionError::MissingClaim("jti")),
        ] {
            let text = EC.sign(&json!({"alg": "ES256"}), &with(&claims, &changes));
            assert_eq!(verify(&EC, &text), Err(error), "{changes}");
        }
        for (header, error) in [
            (json!({"alg": "ES256", "typ": "dpop+jwt"}), AssertionError::Type),
            (json!({"alg": "ES256", "typ": "at+jwt"}), AssertionError::Type),
            (json!({"alg": "ES256", "typ": ""}), AssertionError::Type),
            (json!({"alg": "ES256", "x5c": []}), AssertionError::Chain),
            (json!({"alg": "none"}), AssertionError::Jws(JwsError::Algorithm)),
        ] {
            let text = EC.sign(&header, &claims);
            assert_eq!(verify(&EC, &text), Err(error), "{header}");
        }
    }

    #[test]
    fn an_assertion_under_another_key_is_refused() {
        let text = TestKey::ec().sign(&header(), &claims());
        assert_eq!(verify_at(&text, &EC, NOW), Err(AssertionError::Jws(JwsError::Signature)));
        assert_eq!(verify_at(&text, &RSA, NOW), Err(AssertionError::Jws(JwsError::Algorithm)));
        let text = RSA.sign(&with(&header(), &json!({"alg": "PS256"})), &claims());
        assert_eq!(verify_at(&text, &RSA, NOW), Err(AssertionError::Jws(JwsError::Algorithm)));
    }

    proptest! {
        #[test]
        fn random_text_never_panics(text in ".*") {
            let _ = UnverifiedAssertion::parse(&text);
        }
    }
}
