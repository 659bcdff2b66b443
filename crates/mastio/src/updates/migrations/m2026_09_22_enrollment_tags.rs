//! `2026-09-22-enrollment-tags`: the predecessor's enrollment tags become the field's own.
//!
//! Why: the predecessor wrote `admin` where an operator created the agent and `spiffe` where SPIRE issued its
//! certificate. They mean `connector` and `spire`, and every reader had to know so: a reader that did not would miss a
//! fleet for a name, as the predecessor's own halt did.
//!
//! What changes: the tag of those agents, nothing else of them. No certificate is touched and nobody notices. What a
//! rollback gives back: the tags, where nobody has written another one since.

use crate::entropy::Entropy;
use crate::updates::error::UpdateError;
use crate::updates::halt::{EnrollmentType, ExemptPermit};
use crate::updates::migration::{
    ChangeSet, Criticality, Declaration, FleetAfter, FleetChange, FleetColumn, FleetRow, Migration,
    MigrationType, Need, Scope, Tools,
};
use crate::updates::view::View;

/// The id.
pub const ID: &str = "2026-09-22-enrollment-tags";

static DECLARATION: Declaration = Declaration {
    migration_id: ID,
    migration_type: MigrationType::CodeRefactor,
    criticality: Criticality::Info,
    affects_enrollments: &[],
    description: "Store the enrollment tags admin and spiffe of earlier versions as connector and spire — the meaning \
                  of no agent changes, and no certificate is touched.",
    requires: &[],
    warning: None,
};

/// The migration.
pub struct EnrollmentTags;

impl Migration for EnrollmentTags {
    fn declaration(&self) -> &'static Declaration {
        &DECLARATION
    }

    fn scope(&self) -> Scope {
        Scope { cells: &[], fleet: Some(FleetColumn::EnrollmentMethod) }
    }

    fn check(&self, view: &View) -> Need {
        if view.has_old_tags { Need::Needed { note: None } } else { Need::NotNeeded }
    }

    fn prepare(&self, _view: &View, _tools: &Tools<'_>) -> Result<ChangeSet, UpdateError> {
        Ok(ChangeSet { cells: vec![], fleet: Some(Box::new(OwnTags)), result: None })
    }
}

struct OwnTags;

impl FleetChange for OwnTags {
    fn change(
        &self,
        row: &FleetRow,
        _permit: &ExemptPermit,
        _entropy: &Entropy,
    ) -> Result<Option<FleetAfter>, UpdateError> {
        let own = match row.text.as_str() {
            "admin" => EnrollmentType::Connector,
            "spiffe" => EnrollmentType::Spire,
            _ => return Ok(None),
        };
        Ok(Some(FleetAfter { text: own.as_str().to_owned(), leaf: None }))
    }
}
