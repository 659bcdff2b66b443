//! Signature algorithms on certificates and requests, and the one place that verifies them here.

use rustls_pki_types::SignatureVerificationAlgorithm;
use webpki::aws_lc_rs as algorithms;

use super::tlv::{self, BIT_STRING, INTEGER, Reader, SEQUENCE, single, whole_octets};
use super::{KeyAlgorithm, SignatureAlgorithm, X509Error};

/// What path validation and signature checks accept. SHA-1 and MD5 are not here; neither is PSS, which
/// none of the predecessor's certificates use.
pub(super) static ACCEPTED: &[&dyn SignatureVerificationAlgorithm] = &[
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P256_SHA384,
    algorithms::ECDSA_P256_SHA512,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ECDSA_P384_SHA512,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA384,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
    algorithms::RSA_PKCS1_2048_8192_SHA256_ABSENT_PARAMS,
    algorithms::RSA_PKCS1_2048_8192_SHA384_ABSENT_PARAMS,
    algorithms::RSA_PKCS1_2048_8192_SHA512_ABSENT_PARAMS,
];

/// id-ecPublicKey with the named curve secp256r1: the content of the AlgorithmIdentifier (RFC 5480 §2.1.1).
pub(super) const P256_ALGORITHM: &[u8] = &[
    0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07,
];

/// rsaEncryption with NULL: the content of the AlgorithmIdentifier (RFC 3279 §2.3.1).
const RSA_ALGORITHM: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

/// ecdsa-with-SHA256, without parameters (RFC 5758 §3.2).
const ECDSA_SHA256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

/// sha256WithRSAEncryption with NULL (RFC 4055 §5).
const RSA_SHA256: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00];

impl SignatureAlgorithm {
    /// The content of the AlgorithmIdentifier.
    pub(super) fn identifier(self) -> &'static [u8] {
        match self {
            Self::EcdsaP256Sha256 => ECDSA_SHA256,
            Self::RsaPkcs1Sha256 => RSA_SHA256,
        }
    }

    /// The whole AlgorithmIdentifier.
    pub(super) fn identifier_der(self) -> Vec<u8> {
        tlv::tlv(SEQUENCE, &[self.identifier()])
    }
}

/// A SubjectPublicKeyInfo taken apart.
#[derive(Clone, Copy)]
pub(super) struct PublicKey<'a> {
    /// The content of the AlgorithmIdentifier.
    pub(super) algorithm: &'a [u8],
    /// The octets of subjectPublicKey.
    pub(super) key: &'a [u8],
}

impl<'a> PublicKey<'a> {
    pub(super) fn read(spki: &'a [u8]) -> Result<Self, X509Error> {
        const WHAT: &str = "subject public key info";
        let mut fields = Reader::new(single(spki, SEQUENCE, WHAT)?.value, WHAT)?;
        let algorithm = fields.expect(SEQUENCE)?.value;
        let key = whole_octets(fields.expect(BIT_STRING)?, WHAT)?;
        fields.finish()?;
        Ok(Self { algorithm, key })
    }

    pub(super) fn key_algorithm(self) -> KeyAlgorithm {
        if self.algorithm == P256_ALGORITHM && self.key.len() == 65 && self.key.first() == Some(&0x04) {
            KeyAlgorithm::P256
        } else if self.algorithm == RSA_ALGORITHM {
            rsa_bits(self.key).map_or(KeyAlgorithm::Other, |bits| KeyAlgorithm::Rsa { bits })
        } else {
            KeyAlgorithm::Other
        }
    }

    /// Verifies `signature` over `message`; `algorithm` is the content of the AlgorithmIdentifier.
    pub(super) fn verify(self, algorithm: &[u8], message: &[u8], signature: &[u8]) -> Result<(), X509Error> {
        ACCEPTED
            .iter()
            .find(|candidate| {
                candidate.signature_alg_id().as_ref() == algorithm
                    && candidate.public_key_alg_id().as_ref() == self.algorithm
            })
            .ok_or(X509Error::UnsupportedSignatureAlgorithm)?
            .verify_signature(self.key, message, signature)
            .map_err(|_| X509Error::SignatureInvalid)
    }
}

/// The length of the modulus of an RSAPublicKey (RFC 8017 appendix A.1.1).
fn rsa_bits(key: &[u8]) -> Option<u32> {
    let mut fields = Reader::new(single(key, SEQUENCE, "rsa key").ok()?.value, "rsa key").ok()?;
    let modulus = fields.expect(INTEGER).ok()?.value;
    fields.expect(INTEGER).ok()?;
    fields.finish().ok()?;
    if !tlv::is_integer(modulus) || modulus.first().is_some_and(|first| *first >= 0x80) {
        return None;
    }
    let skip = modulus.iter().take_while(|octet| **octet == 0).count();
    let significant = modulus.get(skip..)?;
    let first = significant.first()?;
    u32::try_from(significant.len() * 8).ok().map(|bits| bits - first.leading_zeros())
}
