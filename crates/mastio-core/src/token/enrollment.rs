//! Proof of possession at enrollment (wire §3.1).
//!
//! The client signs one fixed text to start, and another to read the outcome. Both are bare signatures and
//! no JWS: for EC, ECDSA with SHA-256 in DER; for RSA, PSS with SHA-256 and the longest salt that fits
//! (modulus bytes − 34), which the SDK asks for and which is therefore the only length that verifies.

use super::{
    from_base64url,
    jwk::{JwkError, PublicJwk},
};
use crate::x509::sha256_hex;

/// Characters of an encoded proof, at most.
pub const POSSESSION_CHARACTERS_MAX: usize = 2048;

/// Why a proof of possession was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PossessionError {
    /// The submitted key is not of an accepted kind.
    #[error("enrollment key is not accepted")]
    Key(#[from] JwkError),
    /// The signature is too long or not base64url.
    #[error("proof of possession is not base64url of at most 2048 characters")]
    Encoding,
    /// The signature is not by this key over this text.
    #[error("proof of possession does not verify")]
    Signature,
}

impl PossessionError {
    /// The stable name of this refusal, for logs and metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Key(error) => error.reason(),
            Self::Encoding => "possession_encoding",
            Self::Signature => "possession_signature",
        }
    }
}

/// The fingerprint of a submitted key: lowercase hex of the SHA-256 of its SPKI, 64 characters.
#[must_use]
pub fn public_key_fingerprint(spki_der: &[u8]) -> String {
    sha256_hex(spki_der)
}

/// Verifies the proof that starts an enrollment.
///
/// Shape: the signed text is `enrollment-pop:v1|` and [`public_key_fingerprint`], without a line feed;
/// `signature_b64u` may carry padding.
/// Errors: any of [`PossessionError`].
pub fn verify_enrollment_pop(spki_der: &[u8], signature_b64u: &str) -> Result<(), PossessionError> {
    verify(spki_der, &format!("enrollment-pop:v1|{}", public_key_fingerprint(spki_der)), signature_b64u)
}

/// Verifies the proof that reads an enrollment's outcome.
///
/// Shape: the signed text is `enrollment-status:v1|` and `session_id`. The client signs once and repeats it
/// on every poll, so this is no protection against replay by someone who sees the request.
/// Errors: any of [`PossessionError`].
pub fn verify_status_proof(
    spki_der: &[u8],
    session_id: &str,
    signature_b64u: &str,
) -> Result<(), PossessionError> {
    verify(spki_der, &format!("enrollment-status:v1|{session_id}"), signature_b64u)
}

fn verify(spki_der: &[u8], message: &str, signature_b64u: &str) -> Result<(), PossessionError> {
    let key = PublicJwk::from_spki_der(spki_der)?;
    if signature_b64u.len() > POSSESSION_CHARACTERS_MAX {
        return Err(PossessionError::Encoding);
    }
    let signature = decode(signature_b64u).ok_or(PossessionError::Encoding)?;
    if key.verify_possession(message.as_bytes(), &signature) {
        Ok(())
    } else {
        Err(PossessionError::Signature)
    }
}

/// Base64url with correct padding or none.
fn decode(text: &str) -> Option<Vec<u8>> {
    let bare = text.trim_end_matches('=');
    let padding = text.len() - bare.len();
    if padding != 0 && (padding > 2 || !text.len().is_multiple_of(4)) {
        return None;
    }
    from_base64url(bare)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use base64::{Engine as _, engine::general_purpose::URL_SAFE};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::token::{
        test_keys::{EC, RSA, TestKey},
        to_base64url,
    };

    fn vectors() -> Value {
        serde_json::from_str(include_str!("../../vectors/enrollment-possession.json")).unwrap()
    }

    fn text<'a>(vector: &'a Value, name: &str) -> &'a str {
        vector[name].as_str().unwrap()
    }

    #[test]
    fn proofs_made_by_openssl_are_accepted() {
        let vectors = vectors();
        let session_id = text(&vectors, "session_id");
        for kind in ["ec", "rsa"] {
            let vector = &vectors[kind];
            let spki_der = from_base64url(text(vector, "spki_der")).unwrap();
            assert_eq!(verify_enrollment_pop(&spki_der, text(vector, "start")), Ok(()), "{kind}");
            assert_eq!(verify_status_proof(&spki_der, session_id, text(vector, "status")), Ok(()), "{kind}");
            // One proof is not the other, and each is for one session.
            for signature in [text(vector, "start"), text(vector, "status")] {
                assert_eq!(
                    verify_status_proof(&spki_der, "another", signature),
                    Err(PossessionError::Signature),
                    "{kind}"
                );
            }
            assert_eq!(
                verify_enrollment_pop(&spki_der, text(vector, "status")),
                Err(PossessionError::Signature),
                "{kind}"
            );
        }
    }

    #[test]
    fn an_rsa_proof_with_another_salt_length_is_refused() {
        let vectors = vectors();
        let spki_der = from_base64url(text(&vectors["rsa"], "spki_der")).unwrap();
        let signature = text(&vectors["rsa"], "start_with_digest_length_salt");
        assert_eq!(verify_enrollment_pop(&spki_der, signature), Err(PossessionError::Signature));
    }

    #[test]
    fn padding_is_accepted_only_where_it_belongs() {
        for key in [&*EC, &*RSA] {
            let spki_der = key.spki_der();
            let message = format!("enrollment-pop:v1|{}", public_key_fingerprint(&spki_der));
            let signature = key.prove_possession(message.as_bytes());
            assert_eq!(verify_enrollment_pop(&spki_der, &to_base64url(&signature)), Ok(()));
            assert_eq!(verify_enrollment_pop(&spki_der, &URL_SAFE.encode(&signature)), Ok(()));
            for bad in [
                format!("{}=", URL_SAFE.encode(&signature)),
                format!("{}====", to_base64url(&signature)),
                format!("={}", to_base64url(&signature)),
                format!("{}\n", to_base64url(&signature)),
                "A".repeat(POSSESSION_CHARACTERS_MAX + 1),
            ] {
                assert_eq!(verify_enrollment_pop(&spki_der, &bad), Err(PossessionError::Encoding));
            }
            assert_eq!(verify_enrollment_pop(&spki_der, ""), Err(PossessionError::Signature));
        }
    }

    #[test]
    fn a_proof_for_another_key_is_refused() {
        let (key, other) = (TestKey::ec(), TestKey::ec());
        let message = format!("enrollment-pop:v1|{}", public_key_fingerprint(&other.spki_der()));
        for (signer, submitted) in [(&key, &other), (&key, &key)] {
            let signature = to_base64url(&signer.prove_possession(message.as_bytes()));
            assert_eq!(
                verify_enrollment_pop(&submitted.spki_der(), &signature),
                Err(PossessionError::Signature)
            );
        }
        assert!(matches!(verify_enrollment_pop(b"", ""), Err(PossessionError::Key(_))));
    }

    proptest! {
        #[test]
        fn random_proofs_never_panic(signature in ".*") {
            prop_assert!(verify_enrollment_pop(&EC.spki_der(), &signature).is_err());
        }
    }
}
