//! One file a migration.

pub mod m2026_04_23_org_ca_pathlen_1;
