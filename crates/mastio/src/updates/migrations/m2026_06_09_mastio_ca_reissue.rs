//! `2026-06-09-mastio-ca-reissue`: an intermediate that a replaced Org CA signed is issued again by the current one.
//!
//! Why: the predecessor's apply of the pathLen update, and its Org CA rotation, replaced the Org CA and left the Mastio
//! intermediate under the former one. Every leaf that the intermediate has signed since, our TLS certificate and the
//! certificates of the token keys lead nowhere for whoever trusts the current Org CA.
//!
//! What changes: the intermediate is issued again for its own name and key, so everything below it is valid as it
//! stands; where it follows an agent's leaf in the database, the new one takes its place. No leaf is signed, no agent
//! has to do anything. While the pathLen update is open there is nothing to do here: it issues the intermediate anew.
//! What a rollback gives back: the former intermediate. A leaf that arose since keeps the one that is valid.

use mastio_core::x509::resign;

use super::{ChainText, OrgCa, ROTATE, m2026_04_23_org_ca_pathlen_1 as path_len};
use crate::pki::store::config_key;
use crate::updates::error::UpdateError;
use crate::updates::halt::EnrollmentType;
use crate::updates::migration::{
    After, Cell, ChangeSet, Criticality, Declaration, Expected, FleetColumn, LeafRule, Migration,
    MigrationType, Need, Refusal, Scope, Tools,
};
use crate::updates::view::View;

/// The id.
pub const ID: &str = "2026-06-09-mastio-ca-reissue";

const MASTIO_CA_CERT: Cell = Cell::config(config_key::MASTIO_CA_CERT);

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CertSchema,
    criticality: Criticality::Critical,
    affects_enrollments: &[EnrollmentType::Connector],
    description: "Re-issue the Mastio intermediate under the current Org CA for the key it has — repairs proxies whose \
                  Org CA was replaced while the intermediate stayed under the former one, so that agents', TLS and token \
                  certificates below it verify again.",
    requires: &[path_len::ID],
    warning: None,
};

/// The migration.
pub struct MastioCaReissue;

impl Migration for MastioCaReissue {
    fn declaration(&self) -> &'static Declaration {
        &DECLARATION
    }

    fn scope(&self) -> Scope {
        Scope { cells: &[MASTIO_CA_CERT], fleet: Some(FleetColumn::CertPem) }
    }

    fn check(&self, view: &View) -> Need {
        let authority = &view.authority;
        let Some(mastio_ca) = &authority.mastio_ca else { return Need::NotNeeded };
        // Below an Org CA with pathLen=0 nothing can be repaired; the update that replaces it does this as well.
        if mastio_ca.verify_signature(&authority.org_ca).is_ok()
            || authority.org_ca_has_legacy_path_len()
            || view.is_open(path_len::ID)
        {
            return Need::NotNeeded;
        }
        if mastio_ca.not_after() <= view.now {
            return Need::Impossible(Refusal {
                reason: "mastio_ca_expired",
                message: format!(
                    "the intermediate is not under the current Org CA, and expired at {}",
                    mastio_ca.not_after().to_rfc3339()
                ),
                page: ROTATE,
            });
        }
        match OrgCa::of(view) {
            OrgCa::HeldElsewhere(refusal) => Need::Impossible(refusal),
            OrgCa::Expired(refusal) => Need::Refused(refusal),
            OrgCa::Usable => Need::Needed { note: None },
        }
    }

    fn prepare(&self, view: &View, tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        let org_ca = view.authority.org_ca.clone();
        let org_ca_key = view.org_ca_key()?;
        let before = view.authority.mastio_ca.clone().ok_or(UpdateError::KeyMissing("intermediate"))?;
        let tbs = resign::reissue_ca(
            &before,
            &org_ca,
            &tools.entropy.serial(),
            org_ca.not_after(),
            org_ca_key.signature_algorithm(),
        )?;
        let mastio_ca = org_ca_key.sign_certificate(tools.permit, tbs)?;
        Ok(ChangeSet {
            cells: vec![(MASTIO_CA_CERT, After::Text(mastio_ca.to_pem()))],
            fleet: Some(Box::new(ChainText { mastio_ca: mastio_ca.clone() })),
            result: Some(Expected {
                org_ca,
                mastio_ca: mastio_ca.clone(),
                replaced_org_ca: None,
                reissued: vec![[before, mastio_ca]],
                leaves: LeafRule::Kept,
            }),
        })
    }
}
