//! `2026-04-23-org-ca-pathlen-1`: an Org CA with `pathLen=0` becomes one with `pathLen=1`.
//!
//! Why: early versions made the Org CA with BasicConstraints `pathLen=0`, which forbids the Mastio intermediate below
//! it; strict verifiers refuse every chain. Affected are all agents whose certificates the Mastio minted.
//!
//! What changes: a new RSA-4096 Org CA of the same name and end; the intermediate re-issued for its own key under
//! it (made, where there is none); every Mastio-issued leaf re-signed under the intermediate with its subject, key,
//! SAN, validity and further extensions byte for byte, a fresh serial and the intermediate's AKI. BYOCA and SPIRE leaves
//! stay: their owners hold the keys.
//!
//! A predecessor's torn run (new Org CA, some leaves still under the old one, row still open) is finished: the Org CA
//! stays, the rest is brought under it. What a rollback gives back: the former Org CA and its key, intermediate and
//! leaves; a leaf that arose since is carried back under them.

use mastio_core::x509::{Certificate, Names, SubjectName, Validity, ValiditySpec, profile, resign};

use crate::entropy::Entropy;
use crate::pki::BACKDATE_S;
use crate::pki::keys::PrivateKey;
use crate::pki::store::{config_key, hex};
use crate::updates::error::UpdateError;
use crate::updates::halt::{EnrollmentType, ExemptPermit};
use crate::updates::migration::{
    After, CarryBack, Cell, ChangeSet, Criticality, Declaration, Expected, FleetAfter, FleetChange,
    FleetColumn, FleetRow, LeafRule, Migration, MigrationType, Need, Refusal, RestoredAuthority, Scope,
    Tools,
};
use crate::updates::view::View;
use std::sync::Arc;

/// The id.
pub const ID: &str = "2026-04-23-org-ca-pathlen-1";

const ORG_CA_CERT: Cell = Cell::config(config_key::ORG_CA_CERT);
const ORG_CA_KEY: Cell = Cell::config_key(config_key::ORG_CA_KEY);
const MASTIO_CA_CERT: Cell = Cell::config(config_key::MASTIO_CA_CERT);
const MASTIO_CA_KEY: Cell = Cell::config_key(config_key::MASTIO_CA_KEY);

/// A new intermediate lives five years, or as long as the Org CA.
const MASTIO_CA_VALIDITY_S: i64 = 5 * 365 * 86_400;

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CertSchema,
    criticality: Criticality::Critical,
    affects_enrollments: &[EnrollmentType::Connector],
    description: "Rotate the Org CA to BasicConstraints(pathLen=1) preserving every agent's public key — repairs \
                  proxies whose Org CA was generated before PR #284 fixed the pathLen=0 bug.",
    requires: &[],
    warning: Some("org_ca_legacy_pathlen_zero"),
};

/// The migration.
pub struct OrgCaPathLen;

impl Migration for OrgCaPathLen {
    fn declaration(&self) -> &'static Declaration {
        &DECLARATION
    }

    fn scope(&self) -> Scope {
        Scope {
            cells: &[ORG_CA_CERT, ORG_CA_KEY, MASTIO_CA_CERT, MASTIO_CA_KEY],
            fleet: Some(FleetColumn::CertPem),
        }
    }

    fn check(&self, view: &View) -> Need {
        let authority = &view.authority;
        let torn = view.torn.as_ref().filter(|torn| torn.is_open());
        if !authority.org_ca_has_legacy_path_len() && torn.is_none() {
            return Need::NotNeeded;
        }
        if authority.org_ca_key.is_none() {
            return Need::Impossible(Refusal {
                reason: "org_ca_key_unavailable",
                message: "the Org CA has pathLen=0 and its private key is held elsewhere: rotate it with the tool that \
                          holds it"
                    .to_owned(),
                page: "Rotate keys § 2",
            });
        }
        if authority.org_ca.not_after() <= view.now {
            return Need::Refused(Refusal {
                reason: "org_ca_expired",
                message: format!(
                    "the Org CA expired at {}: this repair would extend it silently; rotate the Org CA instead",
                    authority.org_ca.not_after().to_rfc3339()
                ),
                page: "Rotate keys § 2",
            });
        }
        Need::Needed {
            note: torn.map(|torn| {
                format!(
                    "an earlier apply stopped half-way: {} of {} leaves are on the new chain",
                    torn.on_current_chain, torn.leaves
                )
            }),
        }
    }

    fn prepare(&self, view: &View, tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        let authority = &view.authority;
        let mut cells = Vec::new();
        let old_root = &authority.org_ca;
        let new_root_key;
        let (root, root_key): (Certificate, &PrivateKey) = if authority.org_ca_has_legacy_path_len() {
            let new = PrivateKey::generate_rsa4096()?;
            let tbs = profile::org_ca(
                SubjectName::Der(old_root.subject_der().to_vec()),
                new.key.spki_der(),
                &tools.entropy.serial(),
                ValiditySpec::InheritNotAfter {
                    not_before: tools.now.plus(-BACKDATE_S),
                    from: old_root.clone(),
                },
                1,
                new.key.signature_algorithm(),
            )?;
            let root = new.key.sign_certificate(tools.permit, tbs)?;
            cells.push((ORG_CA_CERT, After::Text(root.to_pem())));
            new_root_key = Box::new(new);
            (root, &new_root_key.key)
        } else {
            return self.finish_torn(view, tools);
        };
        let intermediate_key;
        let (mastio_ca, mastio_ca_key) = match (&authority.mastio_ca, &authority.mastio_ca_key) {
            (Some(present), Some(key)) => {
                let tbs = resign::reissue_ca(
                    present,
                    &root,
                    &tools.entropy.serial(),
                    root.not_after(),
                    root_key.signature_algorithm(),
                )?;
                (root_key.sign_certificate(tools.permit, tbs)?, Arc::clone(key))
            }
            _ => {
                let new = PrivateKey::generate_p256()?;
                let tbs = profile::mastio_ca(
                    &root,
                    Names {
                        common_name: format!("{} Mastio CA", authority.org_id),
                        organization: Some(authority.org_id.clone()),
                    },
                    new.key.spki_der(),
                    &tools.entropy.serial(),
                    Validity {
                        not_before: tools.now.plus(-BACKDATE_S),
                        not_after: tools.now.plus(MASTIO_CA_VALIDITY_S).min(root.not_after()),
                    },
                    root_key.signature_algorithm(),
                )?;
                let certificate = root_key.sign_certificate(tools.permit, tbs)?;
                intermediate_key = Arc::new(new.key_again()?);
                cells.push((MASTIO_CA_KEY, After::Key(Box::new(new))));
                (certificate, intermediate_key)
            }
        };
        cells.push((MASTIO_CA_CERT, After::Text(mastio_ca.to_pem())));
        cells.push((ORG_CA_KEY, After::Key(new_root_key)));
        Ok(ChangeSet {
            cells,
            fleet: Some(Box::new(UnderIntermediate {
                mastio_ca: mastio_ca.clone(),
                mastio_ca_key,
                only_foreign: false,
            })),
            result: Some(Expected {
                org_ca: root,
                mastio_ca,
                replaced_org_ca: Some(old_root.clone()),
                reissued: vec![],
                leaves: LeafRule::Resigned,
            }),
        })
    }

    fn carry_back(&self, restored: RestoredAuthority) -> Option<Box<dyn CarryBack>> {
        Some(Box::new(UnderRestored(restored)))
    }
}

impl OrgCaPathLen {
    /// Finishes what a predecessor began: the Org CA is new already, the rest is brought under it.
    fn finish_torn(&self, view: &View, tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        let authority = &view.authority;
        let root = authority.org_ca.clone();
        let root_key = view.org_ca_key()?;
        let present = authority.mastio_ca.as_ref().ok_or(UpdateError::KeyMissing("intermediate"))?;
        let mastio_ca_key = authority.mastio_ca_key.clone().ok_or(UpdateError::KeyMissing("intermediate"))?;
        let mut cells = Vec::new();
        let stays = present.verify_signature(&root).is_ok();
        let mastio_ca = if stays {
            present.clone()
        } else {
            let tbs = resign::reissue_ca(
                present,
                &root,
                &tools.entropy.serial(),
                root.not_after(),
                root_key.signature_algorithm(),
            )?;
            let certificate = root_key.sign_certificate(tools.permit, tbs)?;
            cells.push((MASTIO_CA_CERT, After::Text(certificate.to_pem())));
            certificate
        };
        Ok(ChangeSet {
            cells,
            fleet: Some(Box::new(UnderIntermediate {
                mastio_ca: mastio_ca.clone(),
                mastio_ca_key,
                only_foreign: stays,
            })),
            result: Some(Expected {
                org_ca: root,
                mastio_ca,
                replaced_org_ca: None,
                reissued: vec![],
                leaves: LeafRule::Resigned,
            }),
        })
    }
}

/// Brings leaves under the intermediate.
struct UnderIntermediate {
    mastio_ca: Certificate,
    mastio_ca_key: Arc<PrivateKey>,
    /// Whether a leaf that the intermediate has signed already stays as it is: only where the intermediate stays
    /// too, because its certificate follows the leaf in the row.
    only_foreign: bool,
}

impl FleetChange for UnderIntermediate {
    fn change(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        if self.only_foreign && row.issuer_key_id == hex(&self.mastio_ca.key_id()) {
            return Ok(None);
        }
        let algorithm = self.mastio_ca_key.signature_algorithm();
        let tbs = resign::resign_leaf(row.leaf()?, &self.mastio_ca, &entropy.serial(), algorithm)?;
        let leaf = self.mastio_ca_key.sign_certificate(permit, tbs)?;
        let text = leaf.to_pem() + &self.mastio_ca.to_pem();
        Ok(Some(FleetAfter { text, leaf: Some(leaf) }))
    }
}

/// Brings a leaf that arose since the apply back under what a rollback restored.
struct UnderRestored(RestoredAuthority);

impl CarryBack for UnderRestored {
    fn carry_back(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        let restored = &self.0;
        let (issuer, key, follows) = match (&restored.mastio_ca, &restored.mastio_ca_key) {
            (Some(mastio_ca), Some(key)) => (mastio_ca, key, mastio_ca.to_pem()),
            // There was no intermediate before: the Org CA signed leaves itself.
            _ => {
                let key = restored.org_ca_key.as_ref().ok_or(UpdateError::KeyMissing("Org CA"))?;
                (&restored.org_ca, key, String::new())
            }
        };
        let tbs = resign::resign_leaf(row.leaf()?, issuer, &entropy.serial(), key.signature_algorithm())?;
        let leaf = key.sign_certificate(permit, tbs)?;
        let text = leaf.to_pem() + &follows;
        Ok(Some(FleetAfter { text, leaf: Some(leaf) }))
    }
}
