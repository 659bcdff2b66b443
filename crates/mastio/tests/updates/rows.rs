//! Every legacy database with all of its rows at the first boot, and what each of them says when it is applied.
//!
//! [`ROWS`] is the list that the README of the fixtures asks for: there the table is about the pathLen update alone.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::server::{Deploy, MIGRATION, Server, legacy, output, variable};
use crate::state::text;

pub const REISSUE: &str = "2026-06-09-mastio-ca-reissue";
pub const KEY_IDENTIFIERS: &str = "2026-07-14-ca-key-identifiers";
pub const LEAF_PROFILE: &str = "2026-08-18-leaf-profile";
pub const TAGS: &str = "2026-09-22-enrollment-tags";

type Rows = &'static [(&'static str, &'static str)];

/// What an Org CA with `pathLen=0` brings: its leaves lack the profile as well. Its intermediate lacks an AKI too, which
/// the pathLen update repairs, and which is therefore no row of its own.
const PATH_LEN: Rows = &[(MIGRATION, "pending"), (LEAF_PROFILE, "pending")];

/// All rows of every fixture, by id.
pub const ROWS: &[(&str, Rows)] = &[
    ("chain5", PATH_LEN),
    ("py_applied", &[(MIGRATION, "applied"), (REISSUE, "pending"), (LEAF_PROFILE, "pending")]),
    ("py_connector5_pending", PATH_LEN),
    ("py_encrypted", PATH_LEN),
    ("py_expired_failed", &[(MIGRATION, "failed"), (LEAF_PROFILE, "pending")]),
    ("py_healthy_pathlen1", &[(KEY_IDENTIFIERS, "pending"), (LEAF_PROFILE, "pending"), (TAGS, "pending")]),
    (
        "py_mixed_byoca_applied",
        &[(MIGRATION, "applied"), (REISSUE, "pending"), (LEAF_PROFILE, "pending"), (TAGS, "pending")],
    ),
    ("py_mixed_byoca_pending", &[(MIGRATION, "pending"), (LEAF_PROFILE, "pending"), (TAGS, "pending")]),
    ("py_rolled_back", &[(MIGRATION, "rolled_back"), (LEAF_PROFILE, "pending")]),
    ("py_torn5", PATH_LEN),
    ("v01_applied_row_only", &[(MIGRATION, "applied"), (LEAF_PROFILE, "pending")]),
    ("v01_byoca", PATH_LEN),
    ("v01_expired", PATH_LEN),
    ("v01_healthy_pathlen1", &[(KEY_IDENTIFIERS, "pending"), (LEAF_PROFILE, "pending")]),
    ("v01_inactive", PATH_LEN),
    ("v01_no_intermediate", PATH_LEN),
    // The Org CA's key is held elsewhere: no repair can run here, and none is proposed.
    ("v01_nokey", &[]),
    ("v01_root5", PATH_LEN),
];

/// Rows of a fixture that are to be applied, besides the pathLen update's.
pub fn further(fixture: &str) -> i64 {
    let (_, rows) = ROWS.iter().find(|(name, _)| *name == fixture).unwrap();
    let further = rows.iter().filter(|(id, status)| *id != MIGRATION && *status == "pending");
    i64::try_from(further.count()).unwrap()
}

/// `/healthz` with so many rows to be applied.
pub fn health(warnings: &[&str], pending: i64) -> Value {
    let mut health = json!({ "status": "ok" });
    if !warnings.is_empty() {
        health["warnings"] = json!(warnings);
    }
    if pending > 0 {
        health["pending_updates"] = json!(pending);
    }
    health
}

/// The list as pairs of id and status.
pub fn listed(server: &Server) -> Vec<(String, String)> {
    let list = server.get("/proxy/updates/api").json();
    list.as_array().unwrap().iter().map(|row| (text(row, "migration_id"), text(row, "status"))).collect()
}

pub fn apply(server: &Server, id: &str) -> crate::server::Answer {
    server.post(&format!("/proxy/updates/{id}/apply"), &json!({ "confirm": true }))
}

pub fn roll_back(server: &Server, id: &str) -> crate::server::Answer {
    server.post(&format!("/proxy/updates/{id}/rollback"), &json!({ "confirm": true }))
}

/// A fixture with other defects, made by `reshape_legacy_db.py`.
pub fn reshaped(fixture: &str, changes: &[&str]) -> Deploy {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("reshaped.db");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/updates/reshape_legacy_db.py");
    output(
        Command::new(variable("MASTIO_TEST_JUDGES_PYTHON"))
            .arg(script)
            .arg(legacy(&format!("{fixture}.db")))
            .arg(&file)
            .args(changes),
    );
    Deploy::of_file(&file)
}

#[test]
fn every_fixture_has_exactly_the_rows_that_are_written_down() {
    let mut wrong = Vec::new();
    println!("{:<24} rows", "file");
    for (fixture, expected) in ROWS {
        let deploy = Deploy::of(fixture);
        let deploy = if *fixture == "py_encrypted" { deploy.with_passphrase() } else { deploy };
        let server = deploy.start();
        let found = listed(&server);
        println!("{fixture:<24} {found:?}");
        let expected: Vec<_> =
            expected.iter().map(|(id, status)| ((*id).to_owned(), (*status).to_owned())).collect();
        if found != expected {
            wrong.push((fixture, found, expected));
            continue;
        }
        // A later boot finds the same, and the gauges count them.
        server.stop();
        let server = deploy.start();
        assert_eq!(listed(&server), expected, "{fixture} at the second boot");
        let metrics = server.get("/metrics").body;
        for status in ["pending", "applied", "rolled_back", "failed"] {
            let rows = expected.iter().filter(|(_, found)| found == status).count();
            let line = format!("cullis_pending_updates_total{{status=\"{status}\"}} {rows}");
            assert!(metrics.contains(&line), "{fixture}: {line}");
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_deploy_to_which_only_the_path_length_update_applies_has_one_row() {
    for fixture in ["v01_root5", "chain5"] {
        let deploy = reshaped(fixture, &["--complete-leaves"]);
        let server = deploy.start();
        assert_eq!(listed(&server), [(MIGRATION.to_owned(), "pending".to_owned())], "{fixture}");
        assert_eq!(server.health(), health(&["org_ca_legacy_pathlen_zero"], 1), "{fixture}");
        assert_eq!(server.apply().status, 200);
        assert_eq!(server.health(), json!({ "status": "ok" }), "{fixture}");
        server.stop();
        let server = deploy.start();
        assert_eq!(listed(&server), [(MIGRATION.to_owned(), "applied".to_owned())], "{fixture}");
    }
}
