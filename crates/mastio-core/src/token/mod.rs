//! Tokens as bytes: what a client signs to ask for one, and what we sign to give one.
//!
//! An agent proves its key once at enrollment ([`enrollment`]), later signs a client assertion
//! ([`assertion`]) and gets an access token ([`claims`]) bound to a DPoP key ([`crate::dpop`]). All three
//! are compact JWS ([`jws`]) over a few fixed algorithms, under keys written as JWK ([`jwk`]).
//!
//! Unproven input has an `Unverified*` type; only its `verify` gives the proven one. Signing is not here:
//! this half makes the signing input, and whoever holds the private key and a permit signs it.

pub mod assertion;
pub mod claims;
pub mod enrollment;
pub mod jwk;
pub mod jws;

#[cfg(test)]
pub(crate) mod test_keys;
#[cfg(test)]
mod wycheproof;

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

/// Seconds of clock difference accepted on `exp`, `iat` and `nbf` of assertions and access tokens.
pub const LEEWAY_S: i64 = 30;

/// Characters accepted in a `jti`, at most. It is a key in the replay store, so it needs a bound.
pub const JTI_CHARACTERS_MAX: usize = 128;

/// Base64url without padding (RFC 7515 §2).
pub(crate) fn to_base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Reads base64url without padding and without stray bits in the last character, so that no two texts
/// stand for the same bytes.
pub(crate) fn from_base64url(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// Base64url of the SHA-256 of these bytes.
pub(crate) fn sha256_base64url(bytes: &[u8]) -> String {
    to_base64url(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// What is wrong with one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimFault {
    Missing,
    Malformed,
}

/// A claim that is text of 1 to `characters_max` characters without control characters.
///
/// Control characters are out because claims end up in logs, and because PostgreSQL cannot store U+0000.
pub(crate) fn text_claim(
    claims: &Map<String, Value>,
    name: &str,
    characters_max: usize,
) -> Result<String, ClaimFault> {
    let text = match claims.get(name) {
        None => return Err(ClaimFault::Missing),
        Some(Value::String(text)) => text,
        Some(_) => return Err(ClaimFault::Malformed),
    };
    let bounded = !text.is_empty() && text.chars().nth(characters_max).is_none();
    if !bounded || text.chars().any(char::is_control) {
        return Err(ClaimFault::Malformed);
    }
    Ok(text.clone())
}

/// A claim that is an instant in whole Unix seconds.
pub(crate) fn time_claim(
    claims: &Map<String, Value>,
    name: &str,
) -> Result<crate::time::UnixTime, ClaimFault> {
    match claims.get(name) {
        None => Err(ClaimFault::Missing),
        Some(value) => value
            .as_i64()
            .filter(|seconds| (0..=crate::json::INTEGER_MAX).contains(seconds))
            .map(crate::time::UnixTime)
            .ok_or(ClaimFault::Malformed),
    }
}
