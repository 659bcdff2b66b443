//! Every migration that this version ships, in one list.

use super::migration::Migration;
use super::migrations;

/// Every migration, oldest first. To add one: a file in `migrations/`, and its line at the marked place.
pub const REGISTRY: &[&dyn Migration] = &[
    &migrations::m2026_04_23_org_ca_pathlen_1::OrgCaPathLen,
    &migrations::m2026_06_09_mastio_ca_reissue::MastioCaReissue,
    &migrations::m2026_07_14_ca_key_identifiers::CaKeyIdentifiers,
    &migrations::m2026_08_18_leaf_profile::LeafProfile,
    &migrations::m2026_09_22_enrollment_tags::EnrollmentTags,
    // The next migration goes here.
];

/// Every migration, and in a build for tests the broken one that the environment names.
pub fn all() -> impl Iterator<Item = &'static dyn Migration> {
    #[cfg(feature = "crash-points")]
    let broken = migrations::broken::chosen();
    #[cfg(not(feature = "crash-points"))]
    let broken = None;
    REGISTRY.iter().copied().chain(broken)
}

/// The migration with this id.
#[must_use]
pub fn find(migration_id: &str) -> Option<&'static dyn Migration> {
    all().find(|migration| migration.declaration().migration_id == migration_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_sorted_and_well_formed() {
        let ids: Vec<_> = REGISTRY.iter().map(|migration| migration.declaration().migration_id).collect();
        assert!(ids.is_sorted_by(|one, next| one < next), "{ids:?}");
        for id in ids {
            let (date, slug) = id.split_at(10);
            assert!(date.chars().all(|c| c.is_ascii_digit() || c == '-'), "{id}");
            assert!(slug.len() > 1 && slug.starts_with('-'), "{id}");
        }
    }

    #[test]
    fn every_requirement_is_registered_and_earlier() {
        for migration in REGISTRY {
            let declaration = migration.declaration();
            assert!(!declaration.description.is_empty());
            for required in declaration.requires {
                assert!(*required < declaration.migration_id && find(required).is_some(), "{required}");
            }
        }
    }
}
