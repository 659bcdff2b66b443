//! `2026-08-18-leaf-profile`: leaves that the Mastio issued get what the agent profile asks for and they lack.
//!
//! Why: the predecessor's leaves have a SAN and nothing else. Without BasicConstraints, KeyUsage, ExtendedKeyUsage, SKI
//! and AKI, verifiers have to guess what the certificate is for, and strict ones refuse it.
//!
//! What changes: each such leaf is signed anew under the intermediate with its subject, key, SAN and validity and what
//! else it says byte for byte, a fresh serial, and the extensions that it lacks. The replaced leaf stays accepted, so
//! agents go on with the file they hold. BYOCA and SPIRE leaves stay. What a rollback gives back: the former leaves; one
//! that arose or changed since is complete and valid, and stays.

use std::sync::Arc;

use mastio_core::x509::lints::leaf_gaps;
use mastio_core::x509::{Certificate, resign};

use super::{ROTATE, m2026_04_23_org_ca_pathlen_1 as path_len, m2026_06_09_mastio_ca_reissue as reissue};
use crate::entropy::Entropy;
use crate::pki::keys::PrivateKey;
use crate::updates::error::UpdateError;
use crate::updates::halt::{EnrollmentType, ExemptPermit};
use crate::updates::migration::{
    ChangeSet, Criticality, Declaration, Expected, FleetAfter, FleetChange, FleetColumn, FleetRow, LeafRule,
    Migration, MigrationType, Need, Refusal, Scope, Tools,
};
use crate::updates::view::View;

/// The id.
pub const ID: &str = "2026-08-18-leaf-profile";

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CertSchema,
    criticality: Criticality::Warning,
    affects_enrollments: &[EnrollmentType::Connector],
    description: "Re-sign agents' leaf certificates that lack BasicConstraints, KeyUsage, ExtendedKeyUsage or key \
                  identifiers with the full leaf profile, preserving key, subject, SAN and validity — agents go on with \
                  the certificate they hold.",
    requires: &[path_len::ID, reissue::ID],
    warning: None,
};

/// The migration.
pub struct LeafProfile;

impl Migration for LeafProfile {
    fn declaration(&self) -> &'static Declaration {
        &DECLARATION
    }

    fn scope(&self) -> Scope {
        Scope { cells: &[], fleet: Some(FleetColumn::CertPem) }
    }

    fn check(&self, view: &View) -> Need {
        let authority = &view.authority;
        if !view.has_incomplete_leaves {
            return Need::NotNeeded;
        }
        let refused = |reason, message| Need::Refused(Refusal { reason, message, page: "Apply updates" });
        if authority.org_ca_has_legacy_path_len() && authority.org_ca_key.is_none() {
            return Need::Impossible(Refusal {
                reason: "org_ca_key_unavailable",
                message: "no leaf is valid below an Org CA with pathLen=0, whose key is held elsewhere: rotate it with \
                          the tool that holds it"
                    .to_owned(),
                page: ROTATE,
            });
        }
        if authority.org_ca_has_legacy_path_len() || view.is_open(path_len::ID) {
            return refused(
                "org_ca_legacy_pathlen_zero",
                format!("no leaf is valid below the Org CA as it stands: apply {} first", path_len::ID),
            );
        }
        let (Some(mastio_ca), Some(_)) = (&authority.mastio_ca, &authority.mastio_ca_key) else {
            return refused(
                "mastio_ca_unavailable",
                "there is no intermediate that could sign: start the server once, so that it makes one"
                    .to_owned(),
            );
        };
        if mastio_ca.verify_signature(&authority.org_ca).is_err() {
            return refused(
                "mastio_ca_orphaned",
                format!("the intermediate is not under the current Org CA: apply {} first", reissue::ID),
            );
        }
        let first_to_end = mastio_ca.not_after().min(authority.org_ca.not_after());
        if first_to_end <= view.now {
            return Need::Refused(Refusal {
                reason: "org_ca_expired",
                message: format!(
                    "the Org CA or the intermediate expired at {}: rotate the Org CA",
                    first_to_end.to_rfc3339()
                ),
                page: ROTATE,
            });
        }
        Need::Needed { note: None }
    }

    fn prepare(&self, view: &View, _tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        let authority = &view.authority;
        let missing = || UpdateError::KeyMissing("intermediate");
        let mastio_ca = authority.mastio_ca.clone().ok_or_else(missing)?;
        let mastio_ca_key = authority.mastio_ca_key.clone().ok_or_else(missing)?;
        Ok(ChangeSet {
            cells: vec![],
            fleet: Some(Box::new(Completed { mastio_ca: mastio_ca.clone(), mastio_ca_key })),
            result: Some(Expected {
                org_ca: authority.org_ca.clone(),
                mastio_ca,
                replaced_org_ca: None,
                reissued: vec![],
                leaves: LeafRule::Completed,
            }),
        })
    }
}

/// Signs anew what lacks something.
struct Completed {
    mastio_ca: Certificate,
    mastio_ca_key: Arc<PrivateKey>,
}

impl FleetChange for Completed {
    fn change(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        let before = row.leaf()?;
        if leaf_gaps(before).is_empty() {
            return Ok(None);
        }
        let algorithm = self.mastio_ca_key.signature_algorithm();
        let tbs = resign::complete_leaf(before, &self.mastio_ca, &entropy.serial(), algorithm)?;
        let leaf = self.mastio_ca_key.sign_certificate(permit, tbs)?;
        let text = leaf.to_pem() + &self.mastio_ca.to_pem();
        Ok(Some(FleetAfter { text, leaf: Some(leaf) }))
    }
}
