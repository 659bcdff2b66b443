//! One file a migration, and what several of them share.

#[cfg(feature = "crash-points")]
pub(super) mod broken;
pub mod m2026_04_23_org_ca_pathlen_1;
pub mod m2026_06_09_mastio_ca_reissue;
pub mod m2026_07_14_ca_key_identifiers;
pub mod m2026_08_18_leaf_profile;
pub mod m2026_09_22_enrollment_tags;

use mastio_core::x509::Certificate;

use super::error::UpdateError;
use super::halt::ExemptPermit;
use super::migration::{FleetAfter, FleetChange, FleetRow, Refusal};
use super::view::View;
use crate::entropy::Entropy;

/// Puts the re-issued intermediate in the place of the former one behind leaves, which stay as they are.
struct ChainText {
    mastio_ca: Certificate,
}

impl FleetChange for ChainText {
    fn change(
        &self,
        row: &FleetRow,
        _permit: &ExemptPermit,
        _entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        // What cannot be read after the leaf is none of ours, and no reason to leave the others unrepaired.
        let Ok(chain) = Certificate::chain_from_pem(&row.text) else { return Ok(None) };
        let is_former = |certificate: &Certificate| {
            certificate.spki_der() == self.mastio_ca.spki_der() && *certificate != self.mastio_ca
        };
        let signed = row.leaf()?.verify_signature(&self.mastio_ca).is_ok();
        if !signed || !chain.iter().skip(1).any(is_former) {
            return Ok(None);
        }
        let text = chain
            .iter()
            .map(|certificate| if is_former(certificate) { &self.mastio_ca } else { certificate }.to_pem())
            .collect();
        Ok(Some(FleetAfter { text, leaf: row.leaf.clone() }))
    }
}

/// Whether the Org CA can sign a CA certificate here and now, and why not.
enum OrgCa {
    Usable,
    HeldElsewhere(Refusal),
    Expired(Refusal),
}

impl OrgCa {
    fn of(view: &View) -> Self {
        let org_ca = &view.authority.org_ca;
        if view.authority.org_ca_key.is_none() {
            return Self::HeldElsewhere(Refusal {
                reason: "org_ca_key_unavailable",
                message: "this repair needs the Org CA's private key, which is held elsewhere: have the tool that holds \
                          it issue the certificate, or rotate the Org CA"
                    .to_owned(),
                page: ROTATE,
            });
        }
        if org_ca.not_after() <= view.now {
            return Self::Expired(Refusal {
                reason: "org_ca_expired",
                message: format!(
                    "the Org CA expired at {}, and nothing that it signs is valid: rotate the Org CA",
                    org_ca.not_after().to_rfc3339()
                ),
                page: ROTATE,
            });
        }
        Self::Usable
    }
}

/// The page on rotations.
const ROTATE: &str = "Rotate keys § 2";
