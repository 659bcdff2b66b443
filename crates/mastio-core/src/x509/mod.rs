//! Certificates: read, built, linted, validated (RFC 5280).
//!
//! The cast, in the order in which a certificate meets it:
//!
//! 1. [`profile`] and [`resign`] write the bytes to be signed, from values or from another
//!    certificate's fields copied byte for byte.
//! 2. [`lints`] read those bytes back and judge them. Only they make a [`LintedTbs`], and only a
//!    `LintedTbs` becomes a certificate, so nothing is signed unseen.
//! 3. The caller signs. No private key is ever seen here.
//! 4. [`Certificate`] is what was read: the DER, and facts parsed once.
//! 5. [`crl`] writes which certificates no longer count, for others to read.
//! 6. [`path`] decides whether a leaf leads to an anchor; [`identity()`] tells which agent it names.
//!
//! *Invariant:* no I/O, no clock and no randomness. Callers hand in `now` and the serial's octets.
//! *Invariant:* everything that parses is total: hostile bytes give an error, never a panic.

pub mod certificate;
pub mod crl;
pub mod csr;
pub mod error;
pub mod extension;
pub mod identity;
pub mod lints;
pub mod name;
pub mod path;
pub mod profile;
pub mod resign;
mod signature;
mod tbs;
#[cfg(test)]
mod tests;
mod tlv;
#[cfg(test)]
mod wycheproof;

use std::fmt::Write as _;

use aws_lc_rs::{digest, signature as crypto};
use rustls_pki_types::{SubjectPublicKeyInfoDer, pem::PemObject as _};

pub use self::certificate::{Certificate, KeyAlgorithm};
pub use self::csr::CertificateRequest;
pub use self::error::{Finding, X509Error};
pub use self::extension::{BasicConstraints, Extension, KeyUsage};
pub use self::identity::{AgentIdentity, identity};
pub use self::lints::{LintedTbs, Role};
pub use self::name::{Names, SubjectName};
pub use self::path::{Anchor, PathError, ValidPath};
pub use self::profile::ValiditySpec;
pub use der::oid::ObjectIdentifier;

use crate::time::UnixTime;

/// A serial number of ours: 128 random bits as a positive INTEGER.
///
/// Shape: 1 to 16 octets without leading zeros, plus one zero octet where the top bit is set, so never
/// more than 17 of the 20 that RFC 5280 §4.1.2.2 allows.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Serial {
    content: Vec<u8>,
}

impl Serial {
    /// Makes a serial of 16 octets that the caller drew at random; `None` for zero.
    #[must_use]
    pub fn new(random: [u8; 16]) -> Option<Self> {
        let skip = random.iter().take_while(|octet| **octet == 0).count();
        let significant = random.get(skip..).unwrap_or_default();
        let first = significant.first()?;
        let mut content = Vec::with_capacity(17);
        if *first >= 0x80 {
            content.push(0);
        }
        content.extend_from_slice(significant);
        Some(Self { content })
    }

    /// The number in lowercase hex, two digits an octet, without the sign octet.
    #[must_use]
    pub fn hex(&self) -> String {
        serial_hex(&self.content)
    }

    /// The content octets of the DER INTEGER.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.content
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Serial({})", self.hex())
    }
}

/// How a certificate of ours is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SignatureAlgorithm {
    /// ecdsa-with-SHA256 under a P-256 key (RFC 5758 §3.2).
    EcdsaP256Sha256,
    /// sha256WithRSAEncryption (RFC 4055 §5).
    RsaPkcs1Sha256,
}

impl SignatureAlgorithm {
    /// The algorithm that goes with an issuer's key; `None` for keys that sign nothing here.
    #[must_use]
    pub fn for_key(key: KeyAlgorithm) -> Option<Self> {
        match key {
            KeyAlgorithm::P256 => Some(Self::EcdsaP256Sha256),
            KeyAlgorithm::Rsa { .. } => Some(Self::RsaPkcs1Sha256),
            KeyAlgorithm::Other => None,
        }
    }
}

/// From when until when a certificate is valid; both ends inclusive (RFC 5280 §4.1.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first valid second.
    pub not_before: UnixTime,
    /// The last valid second.
    pub not_after: UnixTime,
}

/// Wraps a P-256 public key as SubjectPublicKeyInfo DER.
///
/// Shape: 65 octets, `04 ‖ x ‖ y`.
/// Errors: [`X509Error::PublicKey`] for another shape or a point off the curve.
/// Source: RFC 5480 §2.
pub fn p256_spki_der(uncompressed_point: &[u8]) -> Result<Vec<u8>, X509Error> {
    if uncompressed_point.len() != 65 || uncompressed_point.first() != Some(&0x04) {
        return Err(X509Error::PublicKey { reason: "not an uncompressed p-256 point" });
    }
    crypto::ParsedPublicKey::new(&crypto::ECDSA_P256_SHA256_ASN1, uncompressed_point)
        .map_err(|_| X509Error::PublicKey { reason: "the point is not on p-256" })?;
    let algorithm = tlv::tlv(tlv::SEQUENCE, &[signature::P256_ALGORITHM]);
    let key = tlv::tlv(tlv::BIT_STRING, &[&[0], uncompressed_point]);
    Ok(tlv::tlv(tlv::SEQUENCE, &[&algorithm, &key]))
}

/// Writes SubjectPublicKeyInfo DER as PEM: `BEGIN PUBLIC KEY`, 64 columns, LF, final newline.
#[must_use]
pub fn spki_pem(spki_der: &[u8]) -> String {
    pem("PUBLIC KEY", spki_der)
}

/// Reads the first `PUBLIC KEY` block of a PEM text and gives its SubjectPublicKeyInfo DER.
///
/// Errors: [`X509Error::Pem`] where there is none, [`X509Error::Malformed`] where its bytes are no SPKI.
/// Not here: whether the key is of a kind that may be used.
pub fn spki_der_from_pem(text: &str) -> Result<Vec<u8>, X509Error> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes())
        .map_err(|_| X509Error::Pem { label: "PUBLIC KEY" })?;
    signature::PublicKey::read(&der)?;
    Ok(der.to_vec())
}

/// PEM as OpenSSL and Python's `cryptography` write it (RFC 7468 §2).
fn pem(label: &'static str, der: &[u8]) -> String {
    // The label is one of ours and the length fits memory: the encoder has nothing to refuse.
    der::pem::encode_string(label, der::pem::LineEnding::LF, der).unwrap_or_default()
}

/// Lowercase hex.
fn hex(octets: &[u8]) -> String {
    let mut text = String::with_capacity(octets.len() * 2);
    for octet in octets {
        _ = write!(text, "{octet:02x}");
    }
    text
}

fn serial_hex(content: &[u8]) -> String {
    match content {
        [0, rest @ ..] if !rest.is_empty() => hex(rest),
        content => hex(content),
    }
}

/// Lowercase hex of the SHA-256 of these octets.
pub(crate) fn sha256_hex(octets: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, octets).as_ref())
}
