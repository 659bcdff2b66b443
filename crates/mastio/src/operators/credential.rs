//! What is stored of an operator's secret: its argon2id hash as a PHC string.
//!
//! The form is `$argon2id$v=19$m=…,t=…,p=…$salt$hash` (Password Hashing Competition, string format). Only our own
//! parameters are accepted, so that a row that somebody has written cannot make the server compute for minutes.
//!
//! The predecessor's dashboard password is a bcrypt hash. It is accepted up to a cost that bounds the work, for as long
//! as it takes to be replaced: at the first sign-in.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::error::OperatorError;

/// Bytes of a salt.
pub(super) const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = 32;
/// 19 MiB, two passes, one lane (OWASP's floor), as for the sealing passphrase.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;
const LANES: u32 = 1;
/// Its library's default is 12; each further one doubles the work.
const BCRYPT_COST_MAX: u32 = 14;
const PREFIX: &str = "$argon2id$v=19$m=19456,t=2,p=1$";
/// What nobody's secret hashes to: compared where there is no operator, at the same cost.
pub(super) const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// The hash of `secret` to be stored. Errors: [`OperatorError::Hash`].
pub(super) fn hash(secret: &str, salt: &[u8; SALT_BYTES]) -> Result<String, OperatorError> {
    let hash = argon2id(secret, salt).ok_or(OperatorError::Hash)?;
    Ok(format!("{PREFIX}{}${}", STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(*hash)))
}

/// Whether `secret` is the one that `stored` was made of. Compared in constant time; a text of another form is nobody's.
pub(super) fn matches(stored: &str, secret: &str) -> bool {
    let parts = stored.strip_prefix(PREFIX).and_then(|rest| rest.split_once('$'));
    let decoded = parts.and_then(|(salt, hash)| {
        Some((STANDARD_NO_PAD.decode(salt).ok()?, STANDARD_NO_PAD.decode(hash).ok()?))
    });
    let Some((salt, expected)) = decoded else { return false };
    argon2id(secret, &salt).is_some_and(|hash| hash.ct_eq(expected.as_slice()).into())
}

/// Whether `stored` is a hash of the predecessor's form.
pub(super) fn is_bcrypt(stored: &str) -> bool {
    ["$2a$", "$2b$", "$2y$"].iter().any(|prefix| stored.starts_with(prefix))
}

/// Whether `secret` is the one that the predecessor's hash `stored` was made of. False for a cost beyond
/// [`BCRYPT_COST_MAX`].
pub(super) fn matches_bcrypt(stored: &str, secret: &str) -> bool {
    let cost = stored.get(4..6).and_then(|cost| cost.parse::<u32>().ok());
    if !is_bcrypt(stored) || cost.is_none_or(|cost| cost > BCRYPT_COST_MAX) {
        return false;
    }
    // It reads 72 bytes of the secret, as the predecessor's library did; compared in constant time.
    bcrypt::verify(secret, stored).unwrap_or(false)
}

fn argon2id(secret: &str, salt: &[u8]) -> Option<Zeroizing<[u8; HASH_BYTES]>> {
    let parameters = argon2::Params::new(MEMORY_KIB, PASSES, LANES, Some(HASH_BYTES)).ok()?;
    let mut hash = Zeroizing::new([0u8; HASH_BYTES]);
    argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, parameters)
        .hash_password_into(secret.as_bytes(), salt, hash.as_mut())
        .ok()?;
    Some(hash)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_secret_matches_its_own_hash_and_no_other() {
        let stored = hash("s3cret", &[7; SALT_BYTES]).unwrap();
        assert!(stored.starts_with(PREFIX) && !stored.contains("s3cret"));
        assert!(matches(&stored, "s3cret"));
        assert!(!matches(&stored, "s3cret "));
        assert!(!matches(&stored, ""));
        assert!(!matches(NOBODY, ""));
    }

    #[test]
    fn the_predecessor_s_hash_matches_up_to_a_cost_that_bounds_the_work() {
        let stored = "$2a$06$.rCVZVOThsIa97pEDOxvGuRRgzG64bvtJ0938xuqzv18d3ZpQhstC";
        assert!(matches_bcrypt(stored, "abcdefghijklmnopqrstuvwxyz"));
        assert!(matches_bcrypt(&stored.replace("$2a$", "$2b$"), "abcdefghijklmnopqrstuvwxyz"));
        assert!(!matches_bcrypt(stored, "abcdefghijklmnopqrstuvwxy"));
        assert!(!matches_bcrypt(stored, ""));
        for bad in
            [stored.replace("$06$", "$15$"), stored.replace("$2a$", "$2x$"), "$2b$".to_owned(), String::new()]
        {
            assert!(!matches_bcrypt(&bad, "abcdefghijklmnopqrstuvwxyz"), "{bad}");
        }
    }

    #[test]
    fn a_hash_of_another_form_is_nobody_s() {
        let stored = hash("s3cret", &[7; SALT_BYTES]).unwrap();
        for bad in [
            String::new(),
            "s3cret".to_owned(),
            stored.replace("m=19456", "m=4194304"),
            stored.replace("argon2id", "argon2i"),
            stored[..stored.len() - 1].to_owned(),
        ] {
            assert!(!matches(&bad, "s3cret"), "{bad}");
        }
    }
}
