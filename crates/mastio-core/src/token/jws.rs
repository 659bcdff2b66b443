//! Compact JWS (RFC 7515 §7.1) over three fixed algorithms.
//!
//! There is no algorithm agility: whoever verifies names the algorithms it takes, and the key's type must
//! fit, so neither `none` nor an HMAC keyed with a public key has a way in (RFC 8725 §3.1).

use serde_json::{Map, Value};

use super::{from_base64url, jwk::PublicJwk, to_base64url};
use crate::json;

/// Bytes of a compact JWS accepted by [`UnverifiedJws::parse`], at most.
pub const JWS_BYTES_MAX: usize = 16 * 1024;

/// A signature algorithm (RFC 7518 §3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JwsAlgorithm {
    /// ECDSA on P-256 with SHA-256; the signature is `r ‖ s`, 64 bytes.
    Es256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PSS with SHA-256 and a salt of 32 bytes.
    Ps256,
}

impl JwsAlgorithm {
    /// The value of the header parameter `alg`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::Rs256 => "RS256",
            Self::Ps256 => "PS256",
        }
    }

    /// The algorithm of this name. `None` for every other, `none` among them.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Es256, Self::Rs256, Self::Ps256].into_iter().find(|algorithm| algorithm.as_str() == name)
    }
}

/// Why a JWS was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwsError {
    /// The text is longer than the bound.
    #[error("jws has {bytes} bytes, more than {bytes_max}")]
    TooLong {
        /// What was given.
        bytes: usize,
        /// What is accepted.
        bytes_max: usize,
    },
    /// The text does not have exactly three parts.
    #[error("jws does not have three parts")]
    NotCompact,
    /// A part is not base64url without padding.
    #[error("jws {0} is not canonical base64url")]
    Base64(&'static str),
    /// The header is no JSON object, or names a member twice.
    #[error("jws header is no json object with unique members")]
    Header,
    /// The header demands an extension. None is supported (RFC 7515 §4.1.11, RFC 7797 §3).
    #[error("jws header demands the extension {0}")]
    Extension(&'static str),
    /// The payload is no JSON object, or names a member twice.
    #[error("jws payload is no json object with unique members")]
    Payload,
    /// `alg` is missing, unknown, or not accepted here.
    #[error("jws algorithm is not accepted here")]
    Algorithm,
    /// `alg` does not fit the type of the key.
    #[error("jws algorithm does not fit the key")]
    KeyType,
    /// The signature is not by this key over this text.
    #[error("jws signature does not verify")]
    Signature,
}

impl JwsError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong { .. } => "jws_too_long",
            Self::NotCompact => "jws_not_compact",
            Self::Base64(_) => "jws_base64",
            Self::Header => "jws_header",
            Self::Extension(_) => "jws_extension",
            Self::Payload => "jws_payload",
            Self::Algorithm => "jws_algorithm",
            Self::KeyType => "jws_key_type",
            Self::Signature => "jws_signature",
        }
    }
}

/// A compact JWS, parsed and not yet verified.
#[derive(Clone)]
pub struct UnverifiedJws {
    header: Map<String, Value>,
    payload: Vec<u8>,
    signing_input: String,
    signature: Vec<u8>,
}

impl std::fmt::Debug for UnverifiedJws {
    /// Shows the algorithm alone: the rest is a credential, or will be one after verification.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("UnverifiedJws").field("algorithm", &self.algorithm()).finish_non_exhaustive()
    }
}

impl UnverifiedJws {
    /// Parses the compact form, of at most [`JWS_BYTES_MAX`] bytes.
    ///
    /// Errors: [`JwsError::TooLong`], [`JwsError::NotCompact`], [`JwsError::Base64`],
    /// [`JwsError::Header`], [`JwsError::Extension`]; white space anywhere is an error.
    /// Source: RFC 7515 §5.2, steps 1 to 5.
    pub fn parse(text: &str) -> Result<Self, JwsError> {
        Self::parse_bounded(text, JWS_BYTES_MAX)
    }

    /// Parses as [`UnverifiedJws::parse`] does, with another bound in bytes.
    pub fn parse_bounded(text: &str, bytes_max: usize) -> Result<Self, JwsError> {
        if text.len() > bytes_max {
            return Err(JwsError::TooLong { bytes: text.len(), bytes_max });
        }
        let (signing_input, signature) = text.rsplit_once('.').ok_or(JwsError::NotCompact)?;
        let (header, payload) = signing_input.split_once('.').ok_or(JwsError::NotCompact)?;
        if payload.contains('.') {
            return Err(JwsError::NotCompact);
        }
        let header = from_base64url(header).ok_or(JwsError::Base64("header"))?;
        let payload = from_base64url(payload).ok_or(JwsError::Base64("payload"))?;
        let signature = from_base64url(signature).ok_or(JwsError::Base64("signature"))?;
        let Ok(Value::Object(header)) = json::parse(&header) else { return Err(JwsError::Header) };
        for extension in ["crit", "b64"] {
            if header.contains_key(extension) {
                return Err(JwsError::Extension(extension));
            }
        }
        Ok(Self { header, payload, signing_input: signing_input.to_owned(), signature })
    }

    /// The header, unverified.
    #[must_use]
    pub fn unverified_header(&self) -> &Map<String, Value> {
        &self.header
    }

    /// The payload bytes, unverified.
    #[must_use]
    pub fn unverified_payload(&self) -> &[u8] {
        &self.payload
    }

    /// The payload as a JSON object, unverified.
    ///
    /// Errors: [`JwsError::Payload`].
    pub fn unverified_claims(&self) -> Result<Map<String, Value>, JwsError> {
        match json::parse(&self.payload) {
            Ok(Value::Object(claims)) => Ok(claims),
            _ => Err(JwsError::Payload),
        }
    }

    /// The header's algorithm, if it is one of ours.
    #[must_use]
    pub fn algorithm(&self) -> Option<JwsAlgorithm> {
        self.header.get("alg").and_then(Value::as_str).and_then(JwsAlgorithm::parse)
    }

    /// Verifies the signature.
    ///
    /// Errors: [`JwsError::Algorithm`] unless the header's `alg` is in `allowed`; [`JwsError::KeyType`] if it
    /// does not fit `key`; [`JwsError::Signature`].
    /// Source: RFC 7515 §5.2, step 8; RFC 8725 §3.1.
    pub fn verify(&self, key: &PublicJwk, allowed: &[JwsAlgorithm]) -> Result<(), JwsError> {
        let algorithm =
            self.algorithm().filter(|algorithm| allowed.contains(algorithm)).ok_or(JwsError::Algorithm)?;
        match key.verify_jws(algorithm, self.signing_input.as_bytes(), &self.signature) {
            None => Err(JwsError::KeyType),
            Some(false) => Err(JwsError::Signature),
            Some(true) => Ok(()),
        }
    }
}

/// The text that is signed: header and claims in base64url, joined by a dot.
///
/// Source: RFC 7515 §5.1, steps 1 to 5.
#[must_use]
pub fn signing_input(header: &Value, claims: &Value) -> String {
    format!("{}.{}", to_base64url(header.to_string().as_bytes()), to_base64url(claims.to_string().as_bytes()))
}

/// The compact form of a signed text.
///
/// Shape: for ES256 `signature_raw` is `r ‖ s`, 64 bytes, never DER (RFC 7518 §3.4).
#[must_use]
pub fn assemble(signing_input: &str, signature_raw: &[u8]) -> String {
    format!("{signing_input}.{}", to_base64url(signature_raw))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::token::test_keys::{EC, RSA, TestKey};

    const ALL: [JwsAlgorithm; 3] = [JwsAlgorithm::Es256, JwsAlgorithm::Rs256, JwsAlgorithm::Ps256];

    #[test]
    fn each_algorithm_verifies_under_its_kind_of_key_and_under_no_other_key() {
        let other = TestKey::ec();
        for (key, algorithm) in
            [(&*EC, JwsAlgorithm::Es256), (&*RSA, JwsAlgorithm::Rs256), (&*RSA, JwsAlgorithm::Ps256)]
        {
            let text = key.sign(&json!({"alg": algorithm.as_str()}), &json!({"a": 1}));
            let jws = UnverifiedJws::parse(&text).unwrap();
            assert_eq!(jws.verify(&key.public(), &[algorithm]), Ok(()), "{algorithm:?}");
            assert_eq!(jws.verify(&key.public(), &ALL), Ok(()), "{algorithm:?}");
            assert_eq!(jws.verify(&key.public(), &[]), Err(JwsError::Algorithm));
            assert!(jws.verify(&other.public(), &ALL).is_err());
        }
    }

    #[test]
    fn an_algorithm_that_does_not_fit_is_refused() {
        for (name, key, alg, allowed, error) in [
            ("none", &*EC, json!("none"), &ALL[..], JwsError::Algorithm),
            ("none in capitals", &*EC, json!("NONE"), &ALL[..], JwsError::Algorithm),
            ("hmac", &*EC, json!("HS256"), &ALL[..], JwsError::Algorithm),
            ("hmac under rsa", &*RSA, json!("HS256"), &ALL[..], JwsError::Algorithm),
            ("sha-384", &*EC, json!("ES384"), &ALL[..], JwsError::Algorithm),
            ("lowercase", &*EC, json!("es256"), &ALL[..], JwsError::Algorithm),
            ("no text", &*EC, json!(["ES256"]), &ALL[..], JwsError::Algorithm),
            ("absent", &*EC, json!(null), &ALL[..], JwsError::Algorithm),
            ("not allowed here", &*RSA, json!("RS256"), &ALL[..1], JwsError::Algorithm),
            ("rsa name on an ec key", &*EC, json!("RS256"), &ALL[..], JwsError::KeyType),
            ("pss name on an ec key", &*EC, json!("PS256"), &ALL[..], JwsError::KeyType),
            ("ec name on an rsa key", &*RSA, json!("ES256"), &ALL[..], JwsError::KeyType),
        ] {
            let header = if alg.is_null() { json!({}) } else { json!({"alg": alg}) };
            let jws = UnverifiedJws::parse(&key.sign(&header, &json!({}))).unwrap();
            assert_eq!(jws.verify(&key.public(), allowed), Err(error), "{name}");
        }
    }

    #[test]
    fn the_two_rsa_paddings_do_not_stand_in_for_each_other() {
        for (signed_pss, name) in [(true, "RS256"), (false, "PS256")] {
            let input = signing_input(&json!({"alg": name}), &json!({}));
            let jws = UnverifiedJws::parse(&RSA.sign_input(&input, signed_pss)).unwrap();
            assert_eq!(jws.verify(&RSA.public(), &ALL), Err(JwsError::Signature), "{name}");
        }
    }

    #[test]
    fn a_signature_that_is_not_exactly_r_and_s_is_refused() {
        let input = signing_input(&json!({"alg": "ES256"}), &json!({}));
        let good = EC.sign_input(&input, false);
        let (_, signature) = good.rsplit_once('.').unwrap();
        let raw = from_base64url(signature).unwrap();
        for (name, signature) in [
            ("der", EC.prove_possession(input.as_bytes())),
            ("empty", vec![]),
            ("zeros", vec![0; 64]),
            ("one byte short", raw[..63].to_vec()),
            ("one byte more", [raw.as_slice(), &[0]].concat()),
        ] {
            let jws = UnverifiedJws::parse(&assemble(&input, &signature)).unwrap();
            assert_eq!(jws.verify(&EC.public(), &ALL), Err(JwsError::Signature), "{name}");
        }
        assert_eq!(UnverifiedJws::parse(&good).unwrap().verify(&EC.public(), &ALL), Ok(()));
    }

    #[test]
    fn text_that_is_no_compact_jws_is_refused() {
        let good = EC.sign(&json!({"alg": "ES256"}), &json!({"a": 1}));
        let parts: Vec<&str> = good.split('.').collect();
        let (header, payload, signature) = (parts[0], parts[1], parts[2]);
        let with_header = |text: &str| format!("{}.{payload}.{signature}", to_base64url(text.as_bytes()));
        for (name, text, error) in [
            ("empty", String::new(), JwsError::NotCompact),
            ("one part", header.to_owned(), JwsError::NotCompact),
            ("two parts", format!("{header}.{payload}"), JwsError::NotCompact),
            ("four parts", format!("{good}.{signature}"), JwsError::NotCompact),
            ("trailing dot", format!("{good}."), JwsError::NotCompact),
            ("trailing line feed", format!("{good}\n"), JwsError::Base64("signature")),
            ("leading space", format!(" {good}"), JwsError::Base64("header")),
            ("padded header", format!("{header}=.{payload}.{signature}"), JwsError::Base64("header")),
            ("padded signature", format!("{good}=="), JwsError::Base64("signature")),
            ("trailing data", format!("{good}AAA"), JwsError::Base64("signature")),
            (
                "standard alphabet",
                format!("{header}.{payload}.+/{}", &signature[2..]),
                JwsError::Base64("signature"),
            ),
            ("empty header", format!(".{payload}.{signature}"), JwsError::Header),
            ("header an array", with_header("[]"), JwsError::Header),
            ("header not json", with_header("{alg}"), JwsError::Header),
            ("alg twice", with_header(r#"{"alg":"none","alg":"ES256"}"#), JwsError::Header),
            ("after the header", with_header(r#"{"alg":"ES256"} {}"#), JwsError::Header),
            ("crit", with_header(r#"{"alg":"ES256","crit":["exp"]}"#), JwsError::Extension("crit")),
            ("crit empty", with_header(r#"{"alg":"ES256","crit":[]}"#), JwsError::Extension("crit")),
            ("b64", with_header(r#"{"alg":"ES256","b64":false}"#), JwsError::Extension("b64")),
        ] {
            assert_eq!(UnverifiedJws::parse(&text).err(), Some(error), "{name}");
        }
        let payload_twice =
            EC.sign_input(&format!("{header}.{}", to_base64url(br#"{"sub":"a","sub":"b"}"#)), false);
        assert_eq!(
            UnverifiedJws::parse(&payload_twice).unwrap().unverified_claims().err(),
            Some(JwsError::Payload)
        );
    }

    #[test]
    fn the_length_bound_lies_where_it_says() {
        let text = EC.sign(&json!({"alg": "ES256"}), &json!({}));
        assert!(UnverifiedJws::parse_bounded(&text, text.len()).is_ok());
        assert_eq!(
            UnverifiedJws::parse_bounded(&text, text.len() - 1).err(),
            Some(JwsError::TooLong { bytes: text.len(), bytes_max: text.len() - 1 })
        );
    }

    proptest! {
        #[test]
        fn random_text_never_panics(text in ".*") {
            let _ = UnverifiedJws::parse(&text);
        }

        #[test]
        fn random_parts_never_panic(header in ".*", payload: Vec<u8>, signature: Vec<u8>) {
            let input = format!("{}.{}", to_base64url(header.as_bytes()), to_base64url(&payload));
            if let Ok(jws) = UnverifiedJws::parse(&assemble(&input, &signature)) {
                let _ = jws.unverified_claims();
                let _ = jws.verify(&EC.public(), &ALL);
            }
        }

        #[test]
        fn no_changed_letter_verifies(position in 0usize..150, letter in "[A-Za-z0-9_-]") {
            let text = EC.sign(&json!({"alg": "ES256"}), &json!({"sub": "acme::a"}));
            let position = position % text.len();
            let mut changed = text.clone();
            changed.replace_range(position..=position, &letter);
            if changed != text && let Ok(jws) = UnverifiedJws::parse(&changed) {
                prop_assert!(jws.verify(&EC.public(), &ALL).is_err());
            }
        }
    }
}
