//! Migrations that are wrong on purpose: the contract test has to fail for each (`tests/updates/contract.rs`).
//!
//! Compiled for tests only, and registered only where `MASTIO_BROKEN_MIGRATION` names one. What is not here cannot be
//! written: a check that changes something, because a [`View`] has nothing to change it with.

use mastio_core::x509::{Validity, profile};

use crate::entropy::Entropy;
use crate::pki::keys::PrivateKey;
use crate::pki::store::config_key;
use crate::updates::crash::broken_migration;
use crate::updates::error::UpdateError;
use crate::updates::halt::{EnrollmentType, ExemptPermit};
use crate::updates::migration::{
    After, Cell, ChangeSet, Criticality, Declaration, Expected, FleetAfter, FleetChange, FleetColumn,
    FleetRow, LeafRule, Migration, MigrationType, Need, Scope, Tools,
};
use crate::updates::view::View;

/// The id, later than every real one.
pub const ID: &str = "2026-12-31-broken";

const ORG_CA_CERT: Cell = Cell::config(config_key::ORG_CA_CERT);

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CodeRefactor,
    criticality: Criticality::Info,
    affects_enrollments: &[],
    description: "Broken on purpose.",
    requires: &[],
    warning: None,
};

/// What is right, and newer than another replica.
static OF_A_NEWER_VERSION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CodeRefactor,
    criticality: Criticality::Critical,
    affects_enrollments: &[EnrollmentType::Connector],
    description: "Known to one replica alone.",
    requires: &[],
    warning: None,
};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    ForgetsARow,
    NotIdempotent,
    ChangesAPreservedField,
    ChangesTheMeaning,
    PanicsInCheck,
    PanicsInPrepare,
    ClaimsDone,
    LeaksAKey,
    OfANewerVersion,
}

/// The one that the environment names.
pub fn chosen() -> Option<&'static dyn Migration> {
    Some(match broken_migration()?.as_str() {
        "forgets-a-row" => &Broken::ForgetsARow,
        "not-idempotent" => &Broken::NotIdempotent,
        "changes-a-preserved-field" => &Broken::ChangesAPreservedField,
        "changes-the-meaning" => &Broken::ChangesTheMeaning,
        "panics-in-check" => &Broken::PanicsInCheck,
        "panics-in-prepare" => &Broken::PanicsInPrepare,
        "claims-done" => &Broken::ClaimsDone,
        "leaks-a-key" => &Broken::LeaksAKey,
        "of-a-newer-version" => &Broken::OfANewerVersion,
        _ => return None,
    })
}

impl Migration for Broken {
    fn declaration(&self) -> &'static Declaration {
        match self {
            Self::OfANewerVersion => &OF_A_NEWER_VERSION,
            _ => &DECLARATION,
        }
    }

    fn scope(&self) -> Scope {
        match self {
            Self::ChangesAPreservedField => Scope { cells: &[], fleet: Some(FleetColumn::CertPem) },
            Self::LeaksAKey => Scope { cells: &[ORG_CA_CERT], fleet: Some(FleetColumn::EnrollmentMethod) },
            _ => Scope { cells: &[], fleet: Some(FleetColumn::EnrollmentMethod) },
        }
    }

    #[expect(clippy::panic, reason = "this is what is wrong with it")]
    fn check(&self, view: &View) -> Need {
        let needed = match self {
            Self::PanicsInCheck => panic!("a check that panics"),
            Self::NotIdempotent => true,
            Self::OfANewerVersion => view.row_status.as_deref() != Some("applied"),
            Self::ChangesAPreservedField => view.has_incomplete_leaves,
            _ => view.has_old_tags,
        };
        if needed { Need::Needed { note: None } } else { Need::NotNeeded }
    }

    #[expect(clippy::panic, reason = "this is what is wrong with it")]
    fn prepare(&self, view: &View, _tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        let authority = &view.authority;
        let mut cells = Vec::new();
        let mut fleet: Box<dyn FleetChange> = Box::new(Tags(*self));
        let mut result = None;
        match self {
            Self::PanicsInPrepare => panic!("a prepare that panics"),
            Self::LeaksAKey => {
                let leaked = PrivateKey::generate_p256()?.hand_over();
                cells.push((ORG_CA_CERT, After::Text(authority.org_ca.to_pem() + &leaked)));
            }
            Self::ChangesAPreservedField => {
                let missing = || UpdateError::KeyMissing("intermediate");
                let mastio_ca = authority.mastio_ca.clone().ok_or_else(missing)?;
                fleet = Box::new(LongerLife(std::sync::Arc::clone(authority)));
                result = Some(Expected {
                    org_ca: authority.org_ca.clone(),
                    mastio_ca,
                    replaced_org_ca: None,
                    reissued: vec![],
                    leaves: LeafRule::Completed,
                });
            }
            _ => {}
        }
        Ok(ChangeSet { cells, fleet: Some(fleet), result })
    }
}

/// The tags, as its kind of wrong has it.
struct Tags(Broken);

impl FleetChange for Tags {
    fn change(
        &self,
        row: &FleetRow,
        _permit: &ExemptPermit,
        _entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        let text = match (self.0, row.text.as_str()) {
            (Broken::ClaimsDone, _) | (Broken::ForgetsARow, "spiffe") => return Ok(None),
            (Broken::ChangesTheMeaning, _) => "byoca",
            (_, "spiffe") => "spire",
            _ => "connector",
        };
        Ok(Some(FleetAfter { text: text.to_owned(), leaf: None }))
    }
}

/// Leaves of the full profile that live a second longer.
struct LongerLife(std::sync::Arc<crate::pki::Authority>);

impl FleetChange for LongerLife {
    fn change(
        &self,
        row: &FleetRow,
        permit: &ExemptPermit,
        entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        let (Some(issuer), Some(key), before) = (&self.0.mastio_ca, &self.0.mastio_ca_key, row.leaf()?)
        else {
            return Ok(None);
        };
        let tbs = profile::agent_leaf(
            issuer,
            &row.agent_id,
            &self.0.org_id,
            before.uri_sans().first().map_or("", String::as_str),
            before.spki_der(),
            &entropy.serial(),
            Validity { not_before: before.not_before(), not_after: before.not_after().plus(1) },
            key.signature_algorithm(),
        )?;
        let leaf = key.sign_certificate(permit, tbs)?;
        Ok(Some(FleetAfter { text: leaf.to_pem() + &issuer.to_pem(), leaf: Some(leaf) }))
    }
}
