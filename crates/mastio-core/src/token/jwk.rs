//! Public keys as JWK (RFC 7517), and their thumbprints (RFC 7638).
//!
//! Two kinds exist here, P-256 and RSA, and each key has one spelling: coordinates are read strictly, so
//! that one key cannot appear under two thumbprints.

use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA256, RsaParameters, RsaPssSaltLength, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde_json::{Value, json};
use x509_parser::{prelude::FromDer as _, public_key::PublicKey as SpkiKey, x509::SubjectPublicKeyInfo};

use super::{from_base64url, jws::JwsAlgorithm, sha256_base64url, to_base64url};

/// Bits of an RSA modulus, at least.
pub const RSA_MODULUS_BITS_MIN: usize = 2048;
/// Bits of an RSA modulus, at most: what the crypto library verifies.
pub const RSA_MODULUS_BITS_MAX: usize = 8192;

/// Members that only a private or symmetric key has (RFC 7518 §6.2.2, §6.3.2, §6.4).
const PRIVATE_MEMBERS: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// SPKI of a P-256 key up to and including the mark of an uncompressed point (RFC 5480 §2).
const P256_SPKI_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];

/// AlgorithmIdentifier `rsaEncryption` with its NULL (RFC 3279 §2.3.1).
const RSA_ALGORITHM: [u8; 15] =
    [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

/// What the SDK's RSA proofs of possession use: the longest salt the modulus leaves room for.
static RSA_PSS_LONGEST_SALT: RsaParameters =
    RSA_PSS_2048_8192_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);

/// Why a public key was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwkError {
    /// The JWK is no JSON object.
    #[error("jwk is no json object")]
    NotAnObject,
    /// The JWK carries a private or symmetric member.
    #[error("jwk carries the private member {0}")]
    PrivateMember(&'static str),
    /// `kty` or `crv` is missing, or names a kind of key that is not accepted.
    #[error("jwk is neither an EC P-256 nor an RSA key")]
    KeyType,
    /// A member is missing or no string.
    #[error("jwk member {0} is missing or no string")]
    MissingMember(&'static str),
    /// A member is not base64url in its one canonical form and length.
    #[error("jwk member {0} is not canonical base64url of the right length")]
    MalformedMember(&'static str),
    /// The coordinates are no point of the curve.
    #[error("public key is no point on P-256")]
    NotOnCurve,
    /// The RSA modulus or exponent is outside what is accepted.
    #[error("rsa modulus or exponent is outside the accepted range")]
    RsaRange,
    /// The SPKI is not the DER of an accepted key.
    #[error("spki is not the der of an EC P-256 or RSA key")]
    Spki,
}

impl JwkError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAnObject => "jwk_not_an_object",
            Self::PrivateMember(_) => "jwk_private_member",
            Self::KeyType => "jwk_key_type",
            Self::MissingMember(_) => "jwk_missing_member",
            Self::MalformedMember(_) => "jwk_malformed_member",
            Self::NotOnCurve => "jwk_not_on_curve",
            Self::RsaRange => "jwk_rsa_range",
            Self::Spki => "jwk_spki",
        }
    }
}

/// A public key that verifies signatures: EC P-256 or RSA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicJwk(Key);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    /// `04 ‖ x ‖ y`.
    P256([u8; 65]),
    /// Big-endian without leading zeros.
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
}

impl PublicJwk {
    /// Reads a public JWK.
    ///
    /// Shape: `kty` `EC` with `crv` `P-256`, `x`, `y`; or `kty` `RSA` with `n`, `e`. Members that say
    /// nothing about the key (`kid`, `use`, `alg`) are ignored.
    /// Errors: [`JwkError::PrivateMember`] for any private member, whatever its value;
    /// [`JwkError::MalformedMember`] for padding, stray bits, a wrong length or a leading zero octet;
    /// [`JwkError::NotOnCurve`] and [`JwkError::RsaRange`] for keys that no one can hold or should.
    /// Source: RFC 7518 §6.2.1 and §6.3.1; RFC 9449 §4.2 for the ban on private members.
    pub fn from_value(value: &Value) -> Result<Self, JwkError> {
        let members = value.as_object().ok_or(JwkError::NotAnObject)?;
        if let Some(name) = PRIVATE_MEMBERS.into_iter().find(|name| members.contains_key(*name)) {
            return Err(JwkError::PrivateMember(name));
        }
        let text = |name: &'static str| {
            members.get(name).and_then(Value::as_str).ok_or(JwkError::MissingMember(name))
        };
        match text("kty")? {
            "EC" if text("crv")? == "P-256" => {
                let coordinate = |name: &'static str| {
                    from_base64url(text(name)?)
                        .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok())
                        .ok_or(JwkError::MalformedMember(name))
                };
                Self::from_coordinates(&coordinate("x")?, &coordinate("y")?)
            }
            "RSA" => {
                let integer = |name: &'static str| {
                    from_base64url(text(name)?)
                        .filter(|bytes| bytes.first().is_some_and(|first| *first != 0))
                        .ok_or(JwkError::MalformedMember(name))
                };
                Self::from_rsa(integer("n")?, integer("e")?)
            }
            _ => Err(JwkError::KeyType),
        }
    }

    /// Reads the DER of a SubjectPublicKeyInfo, as in a certificate.
    ///
    /// Errors: [`JwkError::Spki`] unless the bytes are exactly what [`PublicJwk::spki_der`] writes, so BER,
    /// compressed points and RSASSA-PSS keys are out; [`JwkError::NotOnCurve`]; [`JwkError::RsaRange`].
    /// Source: RFC 5280 §4.1.2.7, RFC 5480 §2, RFC 3279 §2.3.1.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, JwkError> {
        if let Some((x, y)) = der.strip_prefix(&P256_SPKI_PREFIX).and_then(|point| point.split_at_checked(32))
        {
            return Self::from_coordinates(x, y);
        }
        let (_, spki) = SubjectPublicKeyInfo::from_der(der).map_err(|_| JwkError::Spki)?;
        let Ok(SpkiKey::RSA(rsa)) = spki.parsed() else { return Err(JwkError::Spki) };
        let key = Self::from_rsa(without_leading_zeros(rsa.modulus), without_leading_zeros(rsa.exponent))?;
        // The parser reads more than DER and more than one key algorithm; the round trip does not.
        if key.spki_der() == der { Ok(key) } else { Err(JwkError::Spki) }
    }

    fn from_coordinates(x: &[u8], y: &[u8]) -> Result<Self, JwkError> {
        let mut point = [4; 65];
        if x.len() != 32 || y.len() != 32 {
            return Err(JwkError::Spki);
        }
        point[1..33].copy_from_slice(x);
        point[33..].copy_from_slice(y);
        // Here and not at first use, because an enrollment stores a thumbprint long before a signature.
        ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).map_err(|_| JwkError::NotOnCurve)?;
        Ok(Self(Key::P256(point)))
    }

    fn from_rsa(modulus: Vec<u8>, exponent: Vec<u8>) -> Result<Self, JwkError> {
        let bits = modulus.len() * 8 - modulus.first().map_or(0, |first| first.leading_zeros() as usize);
        let odd = |bytes: &[u8]| bytes.last().is_some_and(|last| last & 1 == 1);
        // An exponent of 1 makes every message its own signature.
        let exponent_fits = odd(&exponent) && exponent != [1] && exponent.len() <= 4;
        if !(RSA_MODULUS_BITS_MIN..=RSA_MODULUS_BITS_MAX).contains(&bits) || !odd(&modulus) || !exponent_fits
        {
            return Err(JwkError::RsaRange);
        }
        Ok(Self(Key::Rsa { modulus, exponent }))
    }

    /// The SHA-256 thumbprint, base64url: 43 characters. DPoP calls it `jkt`.
    ///
    /// Source: RFC 7638 §3.
    #[must_use]
    pub fn thumbprint(&self) -> String {
        // Written out, because the required members and their order are the definition.
        let members = match &self.0 {
            Key::P256(point) => format!(
                r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#,
                to_base64url(&point[1..33]),
                to_base64url(&point[33..])
            ),
            Key::Rsa { modulus, exponent } => {
                format!(r#"{{"e":"{}","kty":"RSA","n":"{}"}}"#, to_base64url(exponent), to_base64url(modulus))
            }
        };
        sha256_base64url(members.as_bytes())
    }

    /// The JWK with its required members and no other.
    #[must_use]
    pub fn to_value(&self) -> Value {
        match &self.0 {
            Key::P256(point) => json!({
                "kty": "EC", "crv": "P-256",
                "x": to_base64url(&point[1..33]), "y": to_base64url(&point[33..]),
            }),
            Key::Rsa { modulus, exponent } => {
                json!({"kty": "RSA", "n": to_base64url(modulus), "e": to_base64url(exponent)})
            }
        }
    }

    /// The DER of the SubjectPublicKeyInfo.
    #[must_use]
    pub fn spki_der(&self) -> Vec<u8> {
        match &self.0 {
            Key::P256(point) => [&P256_SPKI_PREFIX[..26], point].concat(),
            Key::Rsa { modulus, exponent } => {
                let key = tlv(0x30, &[der_integer(modulus), der_integer(exponent)].concat());
                let bits = tlv(0x03, &[&[0], key.as_slice()].concat());
                tlv(0x30, &[RSA_ALGORITHM.as_slice(), &bits].concat())
            }
        }
    }

    /// Whether this is an EC P-256 key; otherwise it is an RSA key.
    #[must_use]
    pub fn is_p256(&self) -> bool {
        matches!(self.0, Key::P256(_))
    }

    /// Verifies a JWS signature. `None` when the algorithm does not fit the key.
    pub(crate) fn verify_jws(
        &self,
        algorithm: JwsAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Option<bool> {
        let verdict = match (&self.0, algorithm) {
            (Key::P256(point), JwsAlgorithm::Es256) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            (Key::Rsa { modulus, exponent }, JwsAlgorithm::Rs256) => {
                components(modulus, exponent).verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            (Key::Rsa { modulus, exponent }, JwsAlgorithm::Ps256) => {
                components(modulus, exponent).verify(&RSA_PSS_2048_8192_SHA256, message, signature)
            }
            _ => return None,
        };
        Some(verdict.is_ok())
    }

    /// Verifies a signature as the SDK makes it outside JWS: ECDSA in DER, or PSS with the longest salt.
    pub(crate) fn verify_possession(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.0 {
            Key::P256(point) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point).verify(message, signature).is_ok()
            }
            Key::Rsa { modulus, exponent } => {
                components(modulus, exponent).verify(&RSA_PSS_LONGEST_SALT, message, signature).is_ok()
            }
        }
    }
}

fn components<'a>(modulus: &'a [u8], exponent: &'a [u8]) -> RsaPublicKeyComponents<&'a [u8]> {
    signature::RsaPublicKeyComponents { n: modulus, e: exponent }
}

fn without_leading_zeros(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().skip_while(|byte| *byte == 0).collect()
}

/// INTEGER of a positive number given big-endian without leading zeros (X.690 §8.3).
fn der_integer(magnitude: &[u8]) -> Vec<u8> {
    let sign: &[u8] = if magnitude.first().is_some_and(|first| first & 0x80 != 0) { &[0] } else { &[] };
    tlv(0x02, &[sign, magnitude].concat())
}

/// One DER element (X.690 §10.1: the shortest length).
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = without_leading_zeros(&content.len().to_be_bytes());
    let mut element = vec![tag];
    match length.as_slice() {
        [] => element.push(0),
        [short] if *short < 0x80 => element.push(*short),
        long => {
            element.push(0x80 | u8::try_from(long.len()).unwrap_or(0));
            element.extend_from_slice(long);
        }
    }
    element.extend_from_slice(content);
    element
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use proptest::prelude::*;

    use super::*;
    use crate::token::test_keys::{EC, RSA, with};

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../vectors/rfc-tokens.json")).unwrap()
    }

    #[test]
    fn the_thumbprint_of_rfc_7638_section_3_1_is_reproduced() {
        let vector = &vectors()["rfc7638_3_1"];
        let key = PublicJwk::from_value(&vector["jwk"]).unwrap();
        assert_eq!(key.thumbprint(), vector["thumbprint"]);
    }

    #[test]
    fn a_key_survives_the_way_through_jwk_and_through_spki() {
        for key in [EC.public(), RSA.public()] {
            assert_eq!(PublicJwk::from_value(&key.to_value()).unwrap(), key);
            assert_eq!(PublicJwk::from_spki_der(&key.spki_der()).unwrap(), key);
            assert_eq!(key.thumbprint().len(), 43);
        }
        assert_eq!(EC.public().spki_der(), EC.spki_der());
        assert_eq!(RSA.public().spki_der(), RSA.spki_der());
    }

    #[test]
    fn members_that_say_nothing_about_the_key_are_ignored() {
        let key = EC.public();
        let more = with(&key.to_value(), &json!({"kid": "a", "use": "sig", "alg": "ES256"}));
        assert_eq!(PublicJwk::from_value(&more).unwrap(), key);
    }

    #[test]
    fn a_jwk_that_is_not_one_spelling_of_one_public_key_is_refused() {
        let ec = EC.public().to_value();
        let rsa = RSA.public().to_value();
        let x = ec["x"].as_str().unwrap();
        let n = rsa["n"].as_str().unwrap();
        // The last of 43 characters holds four bits; the next letter differs in a stray one.
        let last = x.as_bytes()[42];
        let stray = format!("{}{}", &x[..42], char::from(if last == b'8' { b'9' } else { last + 1 }));
        let leading_zero = to_base64url(&[&[0], from_base64url(n).unwrap().as_slice()].concat());
        let even = {
            let mut modulus = from_base64url(n).unwrap();
            *modulus.last_mut().unwrap() ^= 1;
            to_base64url(&modulus)
        };
        let short =
            to_base64url(&from_base64url(n).unwrap()[..255].iter().map(|byte| byte | 1).collect::<Vec<_>>());
        for (name, jwk, expected) in [
            ("no object", json!("EC"), JwkError::NotAnObject),
            ("no members", json!({}), JwkError::MissingMember("kty")),
            ("symmetric", json!({"kty": "oct", "k": "AAAA"}), JwkError::PrivateMember("k")),
            ("okp", json!({"kty": "OKP", "crv": "Ed25519", "x": x}), JwkError::KeyType),
            ("lowercase kty", with(&ec, &json!({"kty": "ec"})), JwkError::KeyType),
            ("other curve", with(&ec, &json!({"crv": "P-384"})), JwkError::KeyType),
            ("no curve", with(&ec, &json!({"crv": "<absent>"})), JwkError::MissingMember("crv")),
            ("ec private", with(&ec, &json!({"d": x})), JwkError::PrivateMember("d")),
            ("private null", with(&ec, &json!({"d": null})), JwkError::PrivateMember("d")),
            ("rsa private", with(&rsa, &json!({"qi": n})), JwkError::PrivateMember("qi")),
            ("no y", with(&ec, &json!({"y": "<absent>"})), JwkError::MissingMember("y")),
            ("y a number", with(&ec, &json!({"y": 1})), JwkError::MissingMember("y")),
            ("padded", with(&ec, &json!({"x": format!("{x}=")})), JwkError::MalformedMember("x")),
            ("stray bits", with(&ec, &json!({"x": stray})), JwkError::MalformedMember("x")),
            ("short", with(&ec, &json!({"x": x[..42].to_owned()})), JwkError::MalformedMember("x")),
            ("long", with(&ec, &json!({"x": format!("AAAA{x}")})), JwkError::MalformedMember("x")),
            ("line feed", with(&ec, &json!({"x": format!("{x}\n")})), JwkError::MalformedMember("x")),
            ("plus", with(&ec, &json!({"x": format!("+{}", &x[1..])})), JwkError::MalformedMember("x")),
            ("off the curve", with(&ec, &json!({"x": x, "y": x})), JwkError::NotOnCurve),
            (
                "zero point",
                with(&ec, &json!({"x": "A".repeat(43), "y": "A".repeat(43)})),
                JwkError::NotOnCurve,
            ),
            ("leading zero", with(&rsa, &json!({"n": leading_zero})), JwkError::MalformedMember("n")),
            ("empty modulus", with(&rsa, &json!({"n": ""})), JwkError::MalformedMember("n")),
            ("even modulus", with(&rsa, &json!({"n": even})), JwkError::RsaRange),
            ("2040 bits", with(&rsa, &json!({"n": short})), JwkError::RsaRange),
            ("exponent 1", with(&rsa, &json!({"e": "AQ"})), JwkError::RsaRange),
            ("even exponent", with(&rsa, &json!({"e": "AQAA"})), JwkError::RsaRange),
            ("long exponent", with(&rsa, &json!({"e": "AQAAAAE"})), JwkError::RsaRange),
        ] {
            assert_eq!(PublicJwk::from_value(&jwk), Err(expected), "{name}");
        }
    }

    #[test]
    fn an_spki_that_is_not_the_der_of_an_accepted_key_is_refused() {
        let ec = EC.spki_der();
        let rsa = RSA.spki_der();
        let mut off_curve = ec.clone();
        off_curve[90] ^= 1;
        for (name, der) in [
            ("empty", vec![]),
            ("short point", ec[..90].to_vec()),
            ("byte after the point", [ec.as_slice(), &[0]].concat()),
            ("byte after the key", [rsa.as_slice(), &[0]].concat()),
            ("cut", rsa[..rsa.len() - 1].to_vec()),
            ("bare rsa key", rsa[24..].to_vec()),
        ] {
            assert_eq!(PublicJwk::from_spki_der(&der), Err(JwkError::Spki), "{name}");
        }
        assert_eq!(PublicJwk::from_spki_der(&off_curve), Err(JwkError::NotOnCurve));
    }

    proptest! {
        #[test]
        fn random_spki_bytes_never_panic(bytes: Vec<u8>) {
            let _ = PublicJwk::from_spki_der(&bytes);
        }
    }
}
