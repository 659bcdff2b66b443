//! Re-signing: the same certificate under another issuer.
//!
//! A leaf belongs to its agent, so everything in it that the agent may rely on is copied byte for byte.
//! An intermediate belongs to us, so it is brought up to today's profile. A root belongs to the organisation, which
//! may have written more into it than we do: it keeps everything but its key identifiers.

use super::extension::{
    self, AUTHORITY_KEY_IDENTIFIER, BASIC_CONSTRAINTS, BasicConstraints, CLIENT_AUTH, EXTENDED_KEY_USAGE,
    KEY_USAGE, KeyUsage, SUBJECT_KEY_IDENTIFIER,
};
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

/// Completes a leaf: what the agent profile asks for and the leaf lacks is added, the rest is copied.
///
/// Shape: as [`resign_leaf`]; basicConstraints without cA, keyUsage digitalSignature (both critical) and
/// extKeyUsage clientAuth come first, SKI and AKI last, each only where the leaf has none of that type.
/// Errors: [`X509Error::Lint`] where the result breaks the `complete` rules.
pub fn complete_leaf(
    leaf: &Certificate,
    issuer: &Certificate,
    serial: &Serial,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let authority_key_identifier = extension::authority_key_identifier(&issuer.key_id());
    let lacks = |oid| !leaf.extensions().iter().any(|extension| extension.oid() == oid);
    let mut extensions: Vec<Vec<u8>> = Vec::with_capacity(leaf.extensions().len() + 5);
    if lacks(BASIC_CONSTRAINTS) {
        extensions.push(extension::basic_constraints(BasicConstraints { ca: false, path_len: None }));
    }
    if lacks(KEY_USAGE) {
        extensions.push(extension::key_usage(KeyUsage::DIGITAL_SIGNATURE));
    }
    if lacks(EXTENDED_KEY_USAGE) {
        extensions.push(extension::extended_key_usage(&CLIENT_AUTH));
    }
    for extension in leaf.extensions() {
        extensions.push(if extension.oid() == AUTHORITY_KEY_IDENTIFIER {
            authority_key_identifier.clone()
        } else {
            extension.raw().to_vec()
        });
    }
    if lacks(SUBJECT_KEY_IDENTIFIER) {
        extensions.push(extension::subject_key_identifier(&leaf.key_id()));
    }
    if lacks(AUTHORITY_KEY_IDENTIFIER) {
        extensions.push(authority_key_identifier);
    }
    let fields = Fields {
        serial,
        algorithm,
        issuer_name: issuer.subject_der(),
        validity: leaf.validity_der(),
        subject: leaf.subject_der(),
        spki: leaf.spki_der(),
        extensions: &extensions.iter().map(Vec::as_slice).collect::<Vec<_>>(),
    };
    lints::admit_completed(fields.encode(), algorithm, issuer)
}

/// Issues a root again for the same name and key, with both key identifiers.
///
/// Shape: subject, SPKI, validity and every other extension are copied byte for byte; SKI and AKI come last, with the
/// value that certificates below name already. By name and key it is the same anchor (RFC 5280 §6.1).
/// Errors: [`X509Error::Lint`] where the result breaks the full profile.
pub fn reissue_root(
    root: &Certificate,
    serial: &Serial,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let key_id = root.key_id();
    let identifiers = [SUBJECT_KEY_IDENTIFIER, AUTHORITY_KEY_IDENTIFIER];
    let (subject_key, authority_key) =
        (extension::subject_key_identifier(&key_id), extension::authority_key_identifier(&key_id));
    let mut extensions: Vec<&[u8]> = root
        .extensions()
        .iter()
        .filter(|extension| !identifiers.contains(&extension.oid()))
        .map(extension::Extension::raw)
        .collect();
    extensions.extend([subject_key.as_slice(), authority_key.as_slice()]);
    let fields = Fields {
        serial,
        algorithm,
        issuer_name: root.subject_der(),
        validity: root.validity_der(),
        subject: root.subject_der(),
        spki: root.spki_der(),
        extensions: &extensions,
    };
    lints::admit_self_signed(fields.encode(), algorithm)
}
