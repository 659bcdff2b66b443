//! Judges what a migration made, with code that did not make it.

use mastio_core::time::UnixTime;
use mastio_core::x509::extension::{
    AUTHORITY_KEY_IDENTIFIER, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, KEY_USAGE, SUBJECT_KEY_IDENTIFIER,
};
use mastio_core::x509::path::{self, PathError};
use mastio_core::x509::{Certificate, ObjectIdentifier, Role, lints};

use super::error::UpdateError;
use super::halt::EnrollmentType;
use super::migration::{After, Cell, Expected, FleetAfter, FleetRow, LeafRule};

/// What completing a leaf may add, besides the AKI.
const ADDED: [ObjectIdentifier; 4] =
    [BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED_KEY_USAGE, SUBJECT_KEY_IDENTIFIER];

fn failed(what: impl Into<String>, cause: Option<PathError>) -> UpdateError {
    UpdateError::Verification { what: what.into(), cause }
}

/// The intermediate under the Org CA, by the full rules, the root's own `pathLen` included.
pub(super) fn authority(result: &Expected, now: UnixTime) -> Result<(), UpdateError> {
    path::verify_ca_chain(&result.mastio_ca, &result.org_ca, now)
        .map_err(|cause| failed("the intermediate under the Org CA", Some(cause)))?;
    if let Some(replaced) = &result.replaced_org_ca {
        if replaced.subject_der() != result.org_ca.subject_der() {
            return Err(failed("the Org CA's name, which must stay", None));
        }
        if replaced.not_after() != result.org_ca.not_after() {
            return Err(failed("the Org CA's notAfter, which must stay", None));
        }
        if replaced.spki_der() == result.org_ca.spki_der() {
            return Err(failed("the Org CA's key, which must be new", None));
        }
    }
    for [before, after] in &result.reissued {
        reissued(before, after, result)?;
    }
    Ok(())
}

/// A CA certificate that was issued again: the same name, key and beginning, not a second longer, and nothing that
/// the full profile finds fault with.
fn reissued(before: &Certificate, after: &Certificate, result: &Expected) -> Result<(), UpdateError> {
    let at = |what: &str| failed(format!("{}: {what}", after.subject_display()), None);
    for (what, holds) in [
        ("subject", before.subject_der() == after.subject_der()),
        ("public key", before.spki_der() == after.spki_der()),
        ("key identifier", Some(before.key_id().as_slice()) == after.subject_key_id()),
        ("notBefore", before.not_before_der() == after.not_before_der()),
        ("notAfter", after.not_after() <= before.not_after()),
        ("serial, which must be fresh", before.serial() != after.serial()),
    ] {
        if !holds {
            return Err(at(what));
        }
    }
    let is_root = after.is_self_issued();
    if is_root && before.basic_constraints() != after.basic_constraints() {
        return Err(at("basicConstraints, which must stay"));
    }
    // Who pins the former root finds the same way.
    if is_root && result.mastio_ca.verify_signature(before).is_err() {
        return Err(at("the intermediate under the former certificate"));
    }
    let issuer = if is_root { after } else { &result.org_ca };
    if let Some(finding) = lints::full_findings(after, issuer, Role::CertificateAuthority).first() {
        return Err(at(&finding.detail));
    }
    after.verify_signature(issuer).map_err(|_| at("signature"))
}

/// What the engine writes as text is public: a key goes by [`After::Key`], which seals it.
pub(super) fn cells(cells: &[(Cell, After)]) -> Result<(), UpdateError> {
    for (cell, after) in cells {
        if matches!(after, After::Text(text) if holds_a_private_key(text)) {
            return Err(failed(format!("{}: a private key in clear", cell.place()), None));
        }
    }
    Ok(())
}

fn holds_a_private_key(text: &str) -> bool {
    text.contains("PRIVATE KEY-----")
}

/// One row of the fleet by the rule for its column.
pub(super) fn row(
    row: &FleetRow,
    after: &FleetAfter,
    result: Option<&Expected>,
    now: UnixTime,
) -> Result<(), UpdateError> {
    if holds_a_private_key(&after.text) {
        return Err(failed(format!("{}: a private key in clear", row.agent_id), None));
    }
    match (&row.leaf, &after.leaf, result) {
        (Some(before), Some(new), Some(result)) => leaf(row, before, new, &after.text, result, now),
        (None, None, None) => tag(row, &after.text),
        _ => Err(failed(format!("{}: a certificate where none belongs", row.agent_id), None)),
    }
}

/// An enrollment tag: one of the field's own, and of the meaning that the former one had.
fn tag(row: &FleetRow, after: &str) -> Result<(), UpdateError> {
    let own = EnrollmentType::ALL.into_iter().find(|enrollment_type| enrollment_type.as_str() == after);
    if own != Some(EnrollmentType::from_tag(Some(&row.text))) {
        return Err(failed(format!("{}: enrollment {}, which became {after}", row.agent_id, row.text), None));
    }
    Ok(())
}

/// One leaf: its path, and every field that had to stay, byte for byte.
///
/// A live leaf is validated in full; one that has expired by its signature and fields, because no path is valid then.
fn leaf(
    row: &FleetRow,
    before: &Certificate,
    new: &Certificate,
    text: &str,
    result: &Expected,
    now: UnixTime,
) -> Result<(), UpdateError> {
    let at = |what: &str| failed(format!("{}: {what}", row.agent_id), None);
    for (what, same) in [
        ("subject", before.subject_der() == new.subject_der()),
        ("public key", before.spki_der() == new.spki_der()),
        ("validity", before.validity_der() == new.validity_der()),
    ] {
        if !same {
            return Err(at(what));
        }
    }
    if result.leaves == LeafRule::Kept {
        let chain = Certificate::chain_from_pem(text).map_err(|_| at("text"))?;
        if chain.first() != Some(before) || new != before {
            return Err(at("certificate, which must stay"));
        }
        if !chain.contains(&result.mastio_ca) {
            return Err(at("the intermediate that follows it"));
        }
    } else {
        signed_anew(before, new, result).map_err(at)?;
    }
    if new.not_before() <= now && now < new.not_after() {
        // The intermediate's own path under the root is judged once, in `authority`.
        path::validate_strict(new, &[], &result.mastio_ca, now)
            .map(drop)
            .map_err(|cause| failed(format!("{}: certification path", row.agent_id), Some(cause)))
    } else {
        new.verify_signature(&result.mastio_ca).map_err(|_| at("signature"))
    }
}

/// What a leaf that was signed anew must have besides: the owner's extensions, a fresh serial, the issuer's AKI.
fn signed_anew(before: &Certificate, new: &Certificate, result: &Expected) -> Result<(), &'static str> {
    let others = |certificate: &Certificate| -> Vec<(ObjectIdentifier, Vec<u8>)> {
        certificate
            .extensions()
            .iter()
            .filter(|extension| extension.oid() != AUTHORITY_KEY_IDENTIFIER)
            .map(|extension| (extension.oid(), extension.raw().to_vec()))
            .collect()
    };
    let (mut had, mut has) = (others(before), others(new));
    if result.leaves == LeafRule::Completed {
        if !lints::complete_findings(new, &result.mastio_ca).is_empty() {
            return Err("the agent profile");
        }
        // What was added is there only because it was missing.
        let missing = |oid: ObjectIdentifier| !had.iter().any(|(present, _)| *present == oid);
        has.retain(|(oid, _)| !(ADDED.contains(oid) && missing(*oid)));
        had.sort_unstable();
        has.sort_unstable();
    }
    if had != has {
        return Err("extensions");
    }
    if before.serial() == new.serial() {
        return Err("serial, which must be fresh");
    }
    if new.authority_key_id() != Some(result.mastio_ca.key_id().as_slice()) {
        return Err("authority key identifier");
    }
    Ok(())
}
