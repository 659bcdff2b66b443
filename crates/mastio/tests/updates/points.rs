//! Where the engine can be killed or held, and whether the state is the new one when the process dies there.

use std::collections::BTreeSet;

pub const APPLY_POINTS: [(&str, bool); 14] = [
    ("apply.admitted", false),
    ("apply.detect", false),
    ("apply.snapshot.part", false),
    ("apply.snapshot", false),
    ("apply.prepare.part", false),
    ("apply.prepare.page", false),
    ("apply.prepare", false),
    ("apply.verify.part", false),
    ("apply.verify", false),
    ("apply.commit.part", false),
    ("apply.commit.before", false),
    ("apply.commit", true),
    ("apply.activate", true),
    ("apply.activated", true),
];
pub const ROLLBACK_POINTS: [(&str, bool); 9] = [
    ("rollback.admitted", false),
    ("rollback.detect", false),
    ("rollback.prepare.part", false),
    ("rollback.prepare", false),
    ("rollback.commit.part", false),
    ("rollback.commit.before", false),
    ("rollback.commit", true),
    ("rollback.activate", true),
    ("rollback.activated", true),
];

#[test]
fn every_crash_point_of_the_engine_is_walked() {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/updates/engine.rs");
    let source = std::fs::read_to_string(source).unwrap();
    let named: BTreeSet<&str> = source
        .split('"')
        .filter(|word| word.starts_with("apply.") || word.starts_with("rollback."))
        .collect();
    let walked = APPLY_POINTS.iter().chain(&ROLLBACK_POINTS).map(|(point, _)| *point).collect();
    assert_eq!(named, walked);
}
