//! Judges what a migration made, with code that did not make it.

use mastio_core::time::UnixTime;
use mastio_core::x509::extension::AUTHORITY_KEY_IDENTIFIER;
use mastio_core::x509::path::{self, PathError};

use super::error::UpdateError;
use super::migration::{Expected, FleetAfter, FleetRow};

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
    Ok(())
}

/// One leaf: its path, and every field that had to stay, byte for byte.
///
/// A live leaf is validated in full; one that has expired by its signature and fields, because no path is valid then.
pub(super) fn leaf(
    row: &FleetRow,
    after: &FleetAfter,
    result: &Expected,
    now: UnixTime,
) -> Result<(), UpdateError> {
    let (before, new) = (&row.leaf, &after.leaf);
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
    let kept = |certificate: &mastio_core::x509::Certificate| -> Vec<Vec<u8>> {
        certificate
            .extensions()
            .iter()
            .filter(|extension| extension.oid() != AUTHORITY_KEY_IDENTIFIER)
            .map(|extension| extension.raw().to_vec())
            .collect()
    };
    if kept(before) != kept(new) {
        return Err(at("extensions"));
    }
    if before.serial() == new.serial() {
        return Err(at("serial, which must be fresh"));
    }
    if new.authority_key_id() != Some(result.mastio_ca.key_id().as_slice()) {
        return Err(at("authority key identifier"));
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
