//! Re-signing: the same certificate under another issuer.
//!
//! A leaf belongs to its agent, so everything in it that the agent may rely on is copied byte for byte.
//! An intermediate belongs to us, so it is brought up to today's profile.

use super::extension::{self, AUTHORITY_KEY_IDENTIFIER};
use super::lints::{self, LintedTbs};
use super::tbs::Fields;
use super::tlv::{SEQUENCE, time, tlv};
use super::{Certificate, Serial, SignatureAlgorithm, X509Error, profile};
use crate::time::UnixTime;

/// Puts a leaf under another issuer.
///
/// Shape: subject, SPKI, validity and every extension are copied byte for byte and in order. Serial, issuer
/// name and signature algorithm are new; the AKI is replaced in its place, or appended where there was none.
/// A v1 or v2 certificate becomes v3; unique identifiers, which RFC 5280 §4.1.2.8 forbids, are left out.
/// Errors: [`X509Error::Lint`] where the result breaks the `resign` rules.
pub fn resign_leaf(
    leaf: &Certificate,
    issuer: &Certificate,
    serial: &Serial,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let authority_key_identifier = extension::authority_key_identifier(&issuer.key_id());
    let mut extensions: Vec<&[u8]> = Vec::with_capacity(leaf.extensions().len() + 1);
    let mut replaced = false;
    for extension in leaf.extensions() {
        if extension.oid() == AUTHORITY_KEY_IDENTIFIER {
            // A second one is written too, so that the duplicates lint sees what the leaf holds.
            extensions.push(&authority_key_identifier);
            replaced = true;
        } else {
            extensions.push(extension.raw());
        }
    }
    if !replaced {
        extensions.push(&authority_key_identifier);
    }
    let fields = Fields {
        serial,
        algorithm,
        issuer_name: issuer.subject_der(),
        validity: leaf.validity_der(),
        subject: leaf.subject_der(),
        spki: leaf.spki_der(),
        extensions: &extensions,
    };
    lints::admit_resigned(fields.encode(), algorithm, issuer)
}

/// Puts an intermediate under another root, for the same name and key.
///
/// Shape: the full profile of [`profile::mastio_ca`]; subject, SPKI and the SKI's value are copied, so
/// leaves below stay valid. notBefore is copied. notAfter is copied as encoded, unless the issuer's
/// notAfter or `not_after_at_most` comes earlier.
/// Errors: [`X509Error::Lint`] where the result breaks the full profile.
pub fn reissue_ca(
    ca: &Certificate,
    issuer: &Certificate,
    serial: &Serial,
    not_after_at_most: UnixTime,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let earlier = if ca.not_after() <= issuer.not_after() { ca } else { issuer };
    let not_after = if earlier.not_after() <= not_after_at_most {
        earlier.not_after_der().to_vec()
    } else {
        time(not_after_at_most)?
    };
    let validity = tlv(SEQUENCE, &[ca.not_before_der(), &not_after]);
    profile::intermediate(issuer, ca.subject_der(), ca.spki_der(), &ca.key_id(), serial, &validity, algorithm)
}
