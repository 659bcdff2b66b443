//! `2026-07-14-ca-key-identifiers`: an intermediate without AKI, or a root without SKI, gets what it lacks.
//!
//! Why: Python 3.13 verifies strictly by default (`VERIFY_X509_STRICT`), and refuses every chain through an
//! intermediate without AuthorityKeyIdentifier or a root without SubjectKeyIdentifier (RFC 5280 §4.2.1.1, §4.2.1.2).
//! The predecessor wrote the one never and the other not always.
//!
//! What changes: the certificate that lacks it is issued again for its own name and key; where the intermediate follows
//! an agent's leaf in the database, the new one takes its place. By name and key the root is the same anchor, so a pin
//! on its former certificate goes on verifying, and no leaf is signed. An Org CA with `pathLen=0` is refused by every
//! strict verifier whatever else it says, and the update that replaces it issues both in full: nothing is done here
//! before it. What a rollback gives back: both certificates and what followed the leaves.

use mastio_core::x509::{Certificate, resign};

use super::{
    ChainText, OrgCa, ROTATE, m2026_04_23_org_ca_pathlen_1 as path_len, m2026_06_09_mastio_ca_reissue,
};
use crate::pki::Authority;
use crate::pki::store::config_key;
use crate::updates::error::UpdateError;
use crate::updates::migration::{
    After, Cell, ChangeSet, Criticality, Declaration, Expected, FleetColumn, LeafRule, Migration,
    MigrationType, Need, Refusal, Scope, Tools,
};
use crate::updates::view::View;

/// The id.
pub const ID: &str = "2026-07-14-ca-key-identifiers";

const ORG_CA_CERT: Cell = Cell::config(config_key::ORG_CA_CERT);
const MASTIO_CA_CERT: Cell = Cell::config(config_key::MASTIO_CA_CERT);

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CertSchema,
    criticality: Criticality::Warning,
    affects_enrollments: &[],
    description: "Re-issue the Mastio intermediate with its AuthorityKeyIdentifier, and the Org CA with its \
                  SubjectKeyIdentifier, for the keys they have — Python 3.13 and other strict verifiers refuse chains \
                  without them.",
    requires: &[path_len::ID, m2026_06_09_mastio_ca_reissue::ID],
    warning: None,
};

/// The migration.
pub struct CaKeyIdentifiers;

fn root_lacks_its_own(authority: &Authority) -> bool {
    authority.org_ca.subject_key_id().is_none()
}

fn is_under(mastio_ca: &Certificate, authority: &Authority) -> bool {
    mastio_ca.verify_signature(&authority.org_ca).is_ok()
}

/// Not of one that another Org CA signed: that is issued anew by an update of its own.
fn intermediate_lacks_its_issuer_s(mastio_ca: &Certificate, authority: &Authority) -> bool {
    is_under(mastio_ca, authority)
        && mastio_ca.authority_key_id() != Some(authority.org_ca.key_id().as_slice())
}

impl Migration for CaKeyIdentifiers {
    fn declaration(&self) -> &'static Declaration {
        &DECLARATION
    }

    fn scope(&self) -> Scope {
        Scope { cells: &[ORG_CA_CERT, MASTIO_CA_CERT], fleet: Some(FleetColumn::CertPem) }
    }

    fn check(&self, view: &View) -> Need {
        let authority = &view.authority;
        // Where there is no intermediate yet, the boot makes one; the next asks again.
        let Some(mastio_ca) = &authority.mastio_ca else { return Need::NotNeeded };
        if authority.org_ca_has_legacy_path_len()
            || !(root_lacks_its_own(authority) || intermediate_lacks_its_issuer_s(mastio_ca, authority))
        {
            return Need::NotNeeded;
        }
        if !is_under(mastio_ca, authority) {
            return Need::Refused(Refusal {
                reason: "mastio_ca_orphaned",
                message: format!(
                    "the intermediate is not under the current Org CA: apply {} first",
                    m2026_06_09_mastio_ca_reissue::ID
                ),
                page: "Apply updates",
            });
        }
        let says_what_it_is = authority.org_ca.basic_constraints().is_some_and(|constraints| constraints.ca)
            && authority.org_ca.key_usage().is_some_and(|usage| usage.key_cert_sign());
        if root_lacks_its_own(authority) && !says_what_it_is {
            return Need::Impossible(Refusal {
                reason: "org_ca_profile",
                message: "the Org CA lacks more than its SubjectKeyIdentifier: rotate the Org CA".to_owned(),
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
        let authority = &view.authority;
        let org_ca_key = view.org_ca_key()?;
        let algorithm = org_ca_key.signature_algorithm();
        let (mut cells, mut reissued) = (Vec::new(), Vec::new());
        let mut org_ca = authority.org_ca.clone();
        if root_lacks_its_own(authority) {
            let tbs = resign::reissue_root(&authority.org_ca, &tools.entropy.serial(), algorithm)?;
            org_ca = org_ca_key.sign_certificate(tools.permit, tbs)?;
            cells.push((ORG_CA_CERT, After::Text(org_ca.to_pem())));
            reissued.push([authority.org_ca.clone(), org_ca.clone()]);
        }
        let before = authority.mastio_ca.clone().ok_or(UpdateError::KeyMissing("intermediate"))?;
        let mut mastio_ca = before.clone();
        if intermediate_lacks_its_issuer_s(&before, authority) {
            let serial = tools.entropy.serial();
            let tbs = resign::reissue_ca(&before, &org_ca, &serial, org_ca.not_after(), algorithm)?;
            mastio_ca = org_ca_key.sign_certificate(tools.permit, tbs)?;
            cells.push((MASTIO_CA_CERT, After::Text(mastio_ca.to_pem())));
            reissued.push([before, mastio_ca.clone()]);
        }
        Ok(ChangeSet {
            cells,
            fleet: Some(Box::new(ChainText { mastio_ca: mastio_ca.clone() })),
            result: Some(Expected {
                org_ca,
                mastio_ca,
                replaced_org_ca: None,
                reissued,
                leaves: LeafRule::Kept,
            }),
        })
    }
}
