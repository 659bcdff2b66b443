//! The access token: what we sign for an agent, bound to a key of its own (wire §4.6, §4.7).
//!
//! It names who, for whom, until when, and which DPoP key or which client certificate must accompany it. What the
//! agent may do is not in it: that is read from the agent's row at each request.

use serde_json::{Map, Value, json};

use super::{
    ClaimFault, JTI_CHARACTERS_MAX, LEEWAY_S,
    assertion::SUBJECT_CHARACTERS_MAX,
    from_base64url,
    jwk::PublicJwk,
    jws::{JwsAlgorithm, JwsError, UnverifiedJws, signing_input},
    sha256_base64url, text_claim, time_claim,
};
use crate::time::UnixTime;
use crate::x509::sha256_hex;

/// The audience of a token for this Mastio's own resources.
pub const ACCESS_TOKEN_AUDIENCE: &str = "cullis-local";
/// The scope of every access token.
pub const ACCESS_TOKEN_SCOPE: &str = "local";
/// Seconds from `iat` to `exp`, at most, whatever is configured.
pub const ACCESS_TOKEN_LIFETIME_S_MAX: i64 = 3600;
/// Characters of an audience, at most: a resource is a URL.
pub const AUDIENCE_CHARACTERS_MAX: usize = 2048;
/// Characters of a `kid`, at most.
pub const KID_CHARACTERS_MAX: usize = 128;

/// Why an access token was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The JWS is malformed, or its signature is not by our key.
    #[error("access token is no jws signed by the key it names")]
    Jws(#[from] JwsError),
    /// `typ` is not `JWT`.
    #[error("access token typ is not JWT")]
    Type,
    /// `kid` is missing or malformed.
    #[error("access token names no key")]
    Kid,
    /// A required claim is missing.
    #[error("access token claim {0} is missing")]
    MissingClaim(&'static str),
    /// A claim has the wrong type or length.
    #[error("access token claim {0} is malformed")]
    MalformedClaim(&'static str),
    /// `iss` is not this Mastio.
    #[error("access token is by another issuer")]
    Issuer,
    /// `aud` is another resource than the one it was shown to.
    #[error("access token is for another audience")]
    Audience,
    /// `scope` is not `local`.
    #[error("access token scope is not local")]
    Scope,
    /// `exp` has passed.
    #[error("access token expired at {expires_at}, now is {now}")]
    Expired {
        /// The claim `exp`, in Unix seconds.
        expires_at: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `iat` lies in the future.
    #[error("access token was issued at {issued_at}, now is {now}")]
    NotYetValid {
        /// The claim `iat`, in Unix seconds.
        issued_at: i64,
        /// The time of the request, in Unix seconds.
        now: i64,
    },
    /// `exp − iat` is outside 1 to [`ACCESS_TOKEN_LIFETIME_S_MAX`].
    #[error("access token lifetime of {lifetime_s} s is outside 1 to 3600 s")]
    Lifetime {
        /// `exp − iat`.
        lifetime_s: i64,
    },
}

impl TokenError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Jws(error) => error.reason(),
            Self::Type => "token_type",
            Self::Kid => "token_kid",
            Self::MissingClaim(_) => "token_missing_claim",
            Self::MalformedClaim(_) => "token_malformed_claim",
            Self::Issuer => "token_issuer",
            Self::Audience => "token_audience",
            Self::Scope => "token_scope",
            Self::Expired { .. } => "token_expired",
            Self::NotYetValid { .. } => "token_not_yet_valid",
            Self::Lifetime { .. } => "token_lifetime",
        }
    }
}

/// What a token is bound to. There is no other kind, and no token without one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Confirmation {
    /// `cnf.jkt`: the thumbprint of the DPoP key, 43 characters (RFC 9449 §6.1).
    DpopKey(String),
    /// `cnf.x5t#S256`: the SHA-256 of the client certificate's DER, 43 characters (RFC 8705 §3.1).
    Certificate(String),
}

impl Confirmation {
    /// The claim `cnf`.
    #[must_use]
    pub fn to_value(&self) -> Value {
        match self {
            Self::DpopKey(thumbprint) => json!({ "jkt": thumbprint }),
            Self::Certificate(thumbprint) => json!({ "x5t#S256": thumbprint }),
        }
    }

    /// The authentication scheme under which such a token is shown.
    #[must_use]
    pub fn token_type(&self) -> &'static str {
        match self {
            Self::DpopKey(_) => "DPoP",
            Self::Certificate(_) => "Bearer",
        }
    }

    /// Reads `cnf`. Exactly one member of the two, so that no two readers see two bindings.
    fn from_claims(claims: &Map<String, Value>) -> Result<Self, TokenError> {
        let malformed = TokenError::MalformedClaim("cnf");
        let cnf = claims.get("cnf").ok_or(TokenError::MissingClaim("cnf"))?;
        let (thumbprint, kind): (_, fn(String) -> Self) = match (cnf.get("jkt"), cnf.get("x5t#S256")) {
            (Some(thumbprint), None) => (thumbprint, Self::DpopKey),
            (None, Some(thumbprint)) => (thumbprint, Self::Certificate),
            _ => return Err(malformed),
        };
        let thumbprint = thumbprint
            .as_str()
            .filter(|text| from_base64url(text).is_some_and(|digest| digest.len() == 32))
            .ok_or(malformed)?;
        Ok(kind(thumbprint.to_owned()))
    }
}

/// The thumbprint of a certificate, as `x5t#S256` writes it.
///
/// Source: RFC 8705 §3.1.
#[must_use]
pub fn certificate_thumbprint(der: &[u8]) -> String {
    sha256_base64url(der)
}

/// What an access token says. All of it is required.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessTokenClaims {
    /// The claim `iss`: `cullis-mastio:<org>`.
    pub issuer: String,
    /// The claim `aud`: [`ACCESS_TOKEN_AUDIENCE`], or the one resource that was asked for (RFC 8707).
    pub audience: String,
    /// The claim `sub`: the agent, `<org>::<name>`.
    pub subject: String,
    /// The claim `scope`: [`ACCESS_TOKEN_SCOPE`].
    pub scope: String,
    /// The claim `iat`.
    pub issued_at: UnixTime,
    /// The claim `exp`.
    pub expires_at: UnixTime,
    /// The claim `jti`, 1 to 128 characters.
    pub jwt_id: String,
    /// The claim `cnf`: what must accompany the token.
    pub confirmation: Confirmation,
    /// The claim `principal_type`: `agent` or `workload`.
    pub principal_type: String,
    /// The claim `org`.
    pub org: String,
}

impl AccessTokenClaims {
    /// The signing input of the token: ES256 under the key named `kid`.
    ///
    /// Shape: sign the ASCII bytes and pass both to [`super::jws::assemble`].
    /// Source: RFC 7519 §7.1; RFC 9449 §6.1 for `cnf`.
    #[must_use]
    pub fn to_unsigned(&self, kid: &str) -> String {
        signing_input(
            &json!({"alg": JwsAlgorithm::Es256.as_str(), "typ": "JWT", "kid": kid}),
            &json!({
                "iss": self.issuer,
                "aud": self.audience,
                "sub": self.subject,
                "scope": self.scope,
                "iat": self.issued_at.0,
                "exp": self.expires_at.0,
                "jti": self.jwt_id,
                "cnf": self.confirmation.to_value(),
                "principal_type": self.principal_type,
                "org": self.org,
            }),
        )
    }
}

/// Seconds for which an upstream server may take our word for who calls.
pub const CALLER_LIFETIME_S: i64 = 60;

/// What an upstream server is told of who calls through the gateway: our word, for that server alone.
///
/// Not a credential of the agent's: it is of a type of its own, so nobody takes it for an access token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerClaims {
    /// The claim `iss`: `cullis-mastio:<org>`.
    pub issuer: String,
    /// The claim `aud`: the server's URL, or its token endpoint's.
    pub audience: String,
    /// The claim `sub`: the agent, `<org>::<name>`.
    pub subject: String,
    /// The claim `iat`. It expires [`CALLER_LIFETIME_S`] later.
    pub issued_at: UnixTime,
    /// The claim `jti`.
    pub jwt_id: String,
    /// The claim `principal_type`: `agent`, `user` or `workload`.
    pub principal_type: String,
    /// The claim `org`.
    pub org: String,
}

impl CallerClaims {
    /// The signing input: ES256 under the key named `kid`, which `/.well-known/jwks-local.json` has.
    ///
    /// Shape: as [`AccessTokenClaims::to_unsigned`].
    /// Source: RFC 7519 §7.1; RFC 8725 §3.11 for the explicit type.
    #[must_use]
    pub fn to_unsigned(&self, kid: &str) -> String {
        signing_input(
            &json!({"alg": JwsAlgorithm::Es256.as_str(), "typ": "mastio-caller+jwt", "kid": kid}),
            &json!({
                "iss": self.issuer,
                "aud": self.audience,
                "sub": self.subject,
                "iat": self.issued_at.0,
                "exp": self.issued_at.plus(CALLER_LIFETIME_S).0,
                "jti": self.jwt_id,
                "principal_type": self.principal_type,
                "org": self.org,
            }),
        )
    }
}

/// An access token, parsed and not yet verified.
#[derive(Debug, Clone)]
pub struct UnverifiedAccessToken {
    jws: UnverifiedJws,
    kid: String,
}

impl UnverifiedAccessToken {
    /// Parses an access token.
    ///
    /// Errors: [`TokenError::Jws`]; [`TokenError::Type`] unless `typ` is exactly `JWT`; [`TokenError::Kid`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let jws = UnverifiedJws::parse(text)?;
        let header = jws.unverified_header();
        // Exact, because we wrote it. A DPoP proof or a client assertion never passes for a token.
        if header.get("typ").and_then(Value::as_str) != Some("JWT") {
            return Err(TokenError::Type);
        }
        let kid = text_claim(header, "kid", KID_CHARACTERS_MAX).map_err(|_| TokenError::Kid)?;
        Ok(Self { jws, kid })
    }

    /// The name of the key that is said to have signed.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// Verifies the token under our key.
    ///
    /// Shape: ES256 only; every claim of [`AccessTokenClaims`] is required; `iss` and `scope` are compared exactly, and
    /// `aud` is one text, no array.
    /// Units: whole seconds; [`LEEWAY_S`] applies to both sides of every time.
    /// Errors: any of [`TokenError`].
    /// Not here: whether the key may still be used, whether `aud` is who asks, whether the agent is active and the token
    /// not revoked, and whether what it is bound to accompanies it.
    /// Source: RFC 7519 §7.2, RFC 9449 §7.
    pub fn verify(
        &self,
        key: &PublicJwk,
        expected_issuer: &str,
        now: UnixTime,
    ) -> Result<AccessTokenClaims, TokenError> {
        self.jws.verify(key, &[JwsAlgorithm::Es256])?;
        let claims = self.jws.unverified_claims()?;
        let text = |name| text_claim(&claims, name, SUBJECT_CHARACTERS_MAX).map_err(named(name));
        let issuer = text("iss")?;
        if issuer != expected_issuer {
            return Err(TokenError::Issuer);
        }
        let audience = text_claim(&claims, "aud", AUDIENCE_CHARACTERS_MAX).map_err(named("aud"))?;
        let expires_at = time_claim(&claims, "exp").map_err(named("exp"))?;
        let issued_at = time_claim(&claims, "iat").map_err(named("iat"))?;
        if now >= expires_at.plus(LEEWAY_S) {
            return Err(TokenError::Expired { expires_at: expires_at.0, now: now.0 });
        }
        if issued_at > now.plus(LEEWAY_S) {
            return Err(TokenError::NotYetValid { issued_at: issued_at.0, now: now.0 });
        }
        let lifetime_s = expires_at.since(issued_at);
        if !(1..=ACCESS_TOKEN_LIFETIME_S_MAX).contains(&lifetime_s) {
            return Err(TokenError::Lifetime { lifetime_s });
        }
        let token = AccessTokenClaims {
            issuer,
            audience,
            subject: text("sub")?,
            scope: text("scope")?,
            issued_at,
            expires_at,
            jwt_id: text_claim(&claims, "jti", JTI_CHARACTERS_MAX).map_err(named("jti"))?,
            confirmation: Confirmation::from_claims(&claims)?,
            principal_type: text("principal_type")?,
            org: text("org")?,
        };
        // Last: only of a token that is valid otherwise is it said that its scope is not enough.
        if token.scope == ACCESS_TOKEN_SCOPE { Ok(token) } else { Err(TokenError::Scope) }
    }
}

/// The name of one of our token keys: `mastio-` and the first 16 hex digits of the SHA-256 of its PEM text.
///
/// Shape: `pem` exactly as serialized, with its last line feed. Clients treat the name as opaque.
#[must_use]
pub fn kid_for_public_key_pem(pem: &str) -> String {
    format!("mastio-{:.16}", sha256_hex(pem.as_bytes()))
}

/// The hash that a DPoP proof carries as `ath`: base64url of the SHA-256 of the token's ASCII bytes.
///
/// Source: RFC 9449 §4.2.
#[must_use]
pub fn access_token_hash(token: &str) -> String {
    sha256_base64url(token.as_bytes())
}

fn named(name: &'static str) -> impl Fn(ClaimFault) -> TokenError {
    move |fault| match fault {
        ClaimFault::Missing => TokenError::MissingClaim(name),
        ClaimFault::Malformed => TokenError::MalformedClaim(name),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::token::test_keys::{EC, RSA, TestKey, with};

    const NOW: UnixTime = UnixTime(1_776_971_061);
    const ISSUER: &str = "cullis-mastio:acme";

    fn typed() -> AccessTokenClaims {
        AccessTokenClaims {
            issuer: ISSUER.to_owned(),
            audience: ACCESS_TOKEN_AUDIENCE.to_owned(),
            subject: "acme::a".to_owned(),
            scope: ACCESS_TOKEN_SCOPE.to_owned(),
            issued_at: NOW,
            expires_at: NOW.plus(900),
            jwt_id: "0f0f".to_owned(),
            confirmation: Confirmation::DpopKey(EC.public().thumbprint()),
            principal_type: "agent".to_owned(),
            org: "acme".to_owned(),
        }
    }

    fn parts() -> (Value, Value) {
        let token = EC.sign_input(&typed().to_unsigned("mastio-1"), false);
        let jws = UnverifiedJws::parse(&token).unwrap();
        (Value::Object(jws.unverified_header().clone()), Value::Object(jws.unverified_claims().unwrap()))
    }

    fn verify_at(text: &str, now: UnixTime) -> Result<AccessTokenClaims, TokenError> {
        UnverifiedAccessToken::parse(text)?.verify(&EC.public(), ISSUER, now)
    }

    #[test]
    fn our_word_for_a_caller_is_no_access_token() {
        let claims = CallerClaims {
            issuer: ISSUER.to_owned(),
            audience: "https://tools.example/mcp".to_owned(),
            subject: "acme::a".to_owned(),
            issued_at: NOW,
            jwt_id: "0f0f".to_owned(),
            principal_type: "agent".to_owned(),
            org: "acme".to_owned(),
        };
        let word = EC.sign_input(&claims.to_unsigned("mastio-1"), false);
        assert_eq!(UnverifiedAccessToken::parse(&word).unwrap_err(), TokenError::Type);
        let jws = UnverifiedJws::parse(&word).unwrap();
        assert_eq!(jws.unverified_header()["typ"], "mastio-caller+jwt");
        assert_eq!(
            Value::Object(jws.unverified_claims().unwrap()),
            json!({
                "iss": ISSUER, "aud": "https://tools.example/mcp", "sub": "acme::a", "iat": NOW.0,
                "exp": NOW.0 + 60, "jti": "0f0f", "principal_type": "agent", "org": "acme",
            })
        );
    }

    #[test]
    fn a_token_says_what_was_put_in() {
        let token = EC.sign_input(&typed().to_unsigned("mastio-1"), false);
        assert_eq!(UnverifiedAccessToken::parse(&token).unwrap().kid(), "mastio-1");
        assert_eq!(verify_at(&token, NOW), Ok(typed()));
        let (header, claims) = parts();
        assert_eq!(header, json!({"alg": "ES256", "typ": "JWT", "kid": "mastio-1"}));
        assert_eq!(
            claims,
            json!({
                "iss": "cullis-mastio:acme", "aud": "cullis-local", "sub": "acme::a", "scope": "local",
                "iat": NOW.0, "exp": NOW.0 + 900, "jti": "0f0f", "cnf": {"jkt": EC.public().thumbprint()},
                "principal_type": "agent", "org": "acme",
            })
        );
    }

    #[test]
    fn a_token_may_be_bound_to_a_certificate_and_meant_for_another_resource() {
        let claims = AccessTokenClaims {
            audience: "https://files.example.com/".to_owned(),
            confirmation: Confirmation::Certificate(certificate_thumbprint(b"der")),
            ..typed()
        };
        let token = EC.sign_input(&claims.to_unsigned("mastio-1"), false);
        assert_eq!(verify_at(&token, NOW), Ok(claims.clone()));
        assert_eq!(claims.confirmation.to_value()["x5t#S256"].as_str().unwrap().len(), 43);
        assert_eq!((claims.confirmation.token_type(), typed().confirmation.token_type()), ("Bearer", "DPoP"));
    }

    #[test]
    fn a_token_without_any_one_claim_is_refused() {
        let (header, claims) = parts();
        for name in ["iss", "aud", "sub", "scope", "iat", "exp", "jti", "cnf", "principal_type", "org"] {
            let token = EC.sign(&header, &with(&claims, &json!({name: "<absent>"})));
            assert_eq!(verify_at(&token, NOW), Err(TokenError::MissingClaim(name)), "{name}");
        }
    }

    #[test]
    fn a_token_with_a_wrong_claim_is_refused() {
        use TokenError::MalformedClaim;
        let (header, claims) = parts();
        for (name, changes, error) in [
            ("other issuer", json!({"iss": "cullis-mastio:acm"}), TokenError::Issuer),
            ("audience empty", json!({"aud": ""}), MalformedClaim("aud")),
            ("audience in a list", json!({"aud": ["cullis-local"]}), MalformedClaim("aud")),
            ("other scope", json!({"scope": "local admin"}), TokenError::Scope),
            ("jti too long", json!({"jti": "j".repeat(129)}), MalformedClaim("jti")),
            ("iat a fraction", json!({"iat": 1.5}), MalformedClaim("iat")),
            ("not bound", json!({"cnf": {}}), MalformedClaim("cnf")),
            ("bound to nothing", json!({"cnf": {"jkt": ""}}), MalformedClaim("cnf")),
            (
                "bound to padding",
                json!({"cnf": {"jkt": format!("{}=", EC.public().thumbprint())}}),
                MalformedClaim("cnf"),
            ),
            (
                "bound twice",
                json!({"cnf": {"jkt": EC.public().thumbprint(), "x5t#S256": EC.public().thumbprint()}}),
                MalformedClaim("cnf"),
            ),
            ("bound to a short digest", json!({"cnf": {"x5t#S256": "AAAA"}}), MalformedClaim("cnf")),
            ("lifetime", json!({"exp": NOW.0 + 3601}), TokenError::Lifetime { lifetime_s: 3601 }),
        ] {
            let token = EC.sign(&header, &with(&claims, &changes));
            assert_eq!(verify_at(&token, NOW), Err(error), "{name}");
        }
    }

    #[test]
    fn a_token_with_a_wrong_header_is_refused() {
        let (header, claims) = parts();
        for (name, changes, error) in [
            ("alg none", json!({"alg": "none"}), TokenError::Jws(JwsError::Algorithm)),
            ("alg HS256", json!({"alg": "HS256"}), TokenError::Jws(JwsError::Algorithm)),
            ("alg RS256", json!({"alg": "RS256"}), TokenError::Jws(JwsError::Algorithm)),
            ("typ of a proof", json!({"typ": "dpop+jwt"}), TokenError::Type),
            ("typ of another profile", json!({"typ": "at+jwt"}), TokenError::Type),
            ("no typ", json!({"typ": "<absent>"}), TokenError::Type),
            ("no kid", json!({"kid": "<absent>"}), TokenError::Kid),
            ("kid empty", json!({"kid": ""}), TokenError::Kid),
            ("crit", json!({"crit": ["x"]}), TokenError::Jws(JwsError::Extension("crit"))),
        ] {
            let token = EC.sign(&with(&header, &changes), &claims);
            assert_eq!(verify_at(&token, NOW), Err(error), "{name}");
        }
        // The key in the header is an attacker's wish, never a key to verify with.
        let other = TestKey::ec();
        let token = other.sign(&with(&header, &json!({"jwk": other.public().to_value()})), &claims);
        assert_eq!(verify_at(&token, NOW), Err(TokenError::Jws(JwsError::Signature)));
        let token = RSA.sign(&with(&header, &json!({"alg": "RS256"})), &claims);
        let unverified = UnverifiedAccessToken::parse(&token).unwrap();
        assert_eq!(unverified.verify(&RSA.public(), ISSUER, NOW), Err(TokenError::Jws(JwsError::Algorithm)));
    }

    #[test]
    fn times_are_accepted_up_to_their_limits() {
        let token = EC.sign_input(&typed().to_unsigned("mastio-1"), false);
        for (offset, accepted) in
            [(-31, false), (-30, true), (-29, true), (929, true), (930, false), (931, false)]
        {
            assert_eq!(verify_at(&token, NOW.plus(offset)).is_ok(), accepted, "now {offset:+}");
        }
    }

    #[test]
    fn a_key_is_named_by_the_text_of_its_pem() {
        // printf 'x\n' | sha256sum
        assert_eq!(kid_for_public_key_pem("x\n"), "mastio-73cb3858a687a849");
    }

    #[test]
    fn the_token_hash_of_rfc_9449_section_7_1_is_reproduced() {
        let vectors: Value = serde_json::from_str(include_str!("../../vectors/rfc-tokens.json")).unwrap();
        let vector = &vectors["rfc9449"];
        assert_eq!(access_token_hash(vector["access_token"].as_str().unwrap()), vector["ath"]);
    }

    proptest! {
        #[test]
        fn random_text_never_panics(text in ".*") {
            let _ = UnverifiedAccessToken::parse(&text);
        }
    }
}
