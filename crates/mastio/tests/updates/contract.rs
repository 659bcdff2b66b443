//! The contract that every migration meets, on both databases: one line for each at the end.
//!
//! Its check changes nothing and says the same again; its plan says what its apply does; a second apply is refused; its
//! rollback gives back every byte; a damaged snapshot is refused; and wherever the process dies, the next boot finds the
//! state wholly old or wholly new, and the way on leads to the same end. `docs/migrations.md` tells how to add a line.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::points::{APPLY_POINTS, ROLLBACK_POINTS};
use crate::rows::{KEY_IDENTIFIERS, LEAF_PROFILE, REISSUE, TAGS, apply, listed, reshaped, roll_back};
use crate::server::{Deploy, MIGRATION, On, Server};
use crate::state::{PkiState, open_runs, text};

/// Rows by table.
pub type State = BTreeMap<&'static str, Vec<Value>>;

/// Every row that an update may touch or must not, as stored. Private keys are left out: a rollback seals them anew.
pub fn state(deploy: &Deploy) -> State {
    [
        ("config", "SELECT * FROM proxy_config WHERE key NOT LIKE '%\\_key' ESCAPE '\\' ORDER BY key"),
        ("agents", "SELECT * FROM internal_agents ORDER BY agent_id"),
        ("token keys", "SELECT * FROM mastio_keys ORDER BY kid"),
        ("facts", "SELECT * FROM agent_certificates ORDER BY agent_id"),
    ]
    .into_iter()
    .map(|(name, sql)| (name, deploy.rows(sql)))
    .collect()
}

/// What a check, a plan or a boot must leave alone besides.
fn everything(deploy: &Deploy) -> (State, Vec<Vec<Value>>) {
    let more = [
        "SELECT * FROM pending_updates ORDER BY migration_id",
        "SELECT * FROM migration_state_backups",
        "SELECT * FROM update_images",
        "SELECT * FROM superseded_certificates",
        "SELECT * FROM pki_anchors",
    ];
    (state(deploy), more.iter().map(|sql| deploy.rows(sql)).collect())
}

/// Cells that differ, as `row/column`.
fn changed(before: &[Value], after: &[Value], key: &str) -> Vec<(String, String)> {
    assert_eq!(before.len(), after.len(), "rows came or went");
    let mut changed = Vec::new();
    for (was, is) in before.iter().zip(after) {
        assert_eq!(was[key], is[key]);
        for (column, value) in was.as_object().unwrap() {
            if is[column] != *value {
                changed.push((text(was, key), column.clone()));
            }
        }
    }
    changed
}

pub fn status_of(server: &Server, id: &str) -> Option<String> {
    listed(server).into_iter().find(|(listed, _)| listed == id).map(|(_, status)| status)
}

/// Why the server failed: its answer keeps that for the log.
fn last_error(server: &Server) -> Option<String> {
    let began = Instant::now();
    // The line comes through a pipe, on its own time.
    while began.elapsed() < Duration::from_secs(10) {
        let log = server.log();
        if let Some(event) = log.iter().rev().find(|event| event["level"] == "ERROR") {
            return Some(text(event, "error"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// What the plan promised is what the apply did, and nothing else.
fn assert_as_planned(plan: &Value, before: &State, after: &State) {
    let agents = changed(&before["agents"], &after["agents"], "agent_id");
    assert_eq!(json!(agents.len()), plan["leaves"], "{agents:?}");
    let columns: Vec<&str> = agents.iter().map(|(_, column)| column.as_str()).collect();
    assert!(columns.windows(2).all(|pair| pair[0] == pair[1]), "one column of the fleet: {columns:?}");
    let planned: Vec<&str> =
        plan["cells"].as_array().unwrap().iter().map(|cell| cell.as_str().unwrap()).collect();
    let is_planned = |key: &str| planned.contains(&format!("proxy_config/{key}/value").as_str());
    for row in &after["config"] {
        let was = before["config"].iter().find(|was| was["key"] == row["key"]);
        assert_eq!(was != Some(row), is_planned(&text(row, "key")), "{row}");
    }
    // What makes a deploy whole after the first intermediate is not the update's: it comes with the boot.
    if !before["token keys"].is_empty() {
        assert_eq!(before["token keys"], after["token keys"]);
    }
}

/// No private key lies in clear, neither where an update writes nor in its snapshot nor in the audit log.
fn assert_no_key_in_clear(deploy: &Deploy) {
    for (table, columns) in [
        ("proxy_config", "value"),
        ("internal_agents", "cert_pem"),
        ("update_images", "COALESCE(before, '') || COALESCE(after, '') || COALESCE(restore, '')"),
        ("migration_state_backups", "snapshot_json"),
        ("audit_events", "details"),
    ] {
        let leaked =
            deploy.count(&format!("SELECT COUNT(*) FROM {table} WHERE {columns} LIKE '%PRIVATE KEY-----%'"));
        assert_eq!(leaked, 0, "a private key in clear in {table}");
    }
}

fn contract(id: &str, deploy: Deploy, on: On) {
    let deploy = deploy.with_passphrase();
    deploy.start().stop();
    let deploy = if on == On::Postgres { deploy.on_postgres() } else { deploy };

    // Pure, and the same again.
    let server = deploy.start();
    assert_eq!(status_of(&server, id).as_deref(), Some("pending"), "not proposed");
    let before = everything(&deploy);
    let plan = server.get(&format!("/proxy/updates/{id}/plan"));
    assert_eq!(plan.status, 200, "{:?}", last_error(&server));
    let plan = plan.json();
    assert!(plan["leaves"] != 0 || plan["cells"] != json!([]), "the plan changes nothing");
    assert_eq!(everything(&deploy), before, "the plan changed something");
    server.stop();
    let server = deploy.start();
    assert_eq!(everything(&deploy), before, "the check changed something");
    let before = before.0;

    // There and back.
    let applied = apply(&server, id);
    assert_eq!(applied.status, 200, "{:?}", last_error(&server));
    let after = state(&deploy);
    assert_as_planned(&plan, &before, &after);
    assert_no_key_in_clear(&deploy);
    PkiState::read(&deploy).assert_under_one_chain();
    assert_eq!(status_of(&server, id).as_deref(), Some("applied"));
    let again = apply(&server, id);
    assert_eq!((again.status, again.detail()), (409, json!("already applied")));
    assert_eq!(state(&deploy), after);
    let rolled_back = roll_back(&server, id);
    assert_eq!(rolled_back.status, 200, "{rolled_back:?}");
    assert_eq!(state(&deploy), before, "the rollback did not give back every byte");
    assert_eq!(roll_back(&server, id).status, 404);
    assert_eq!(status_of(&server, id).as_deref(), Some("rolled_back"));

    // A damaged snapshot is refused, and nothing changes.
    assert_eq!(apply(&server, id).status, 200);
    let after = state(&deploy);
    deploy.execute(
        "UPDATE update_images SET before = before || ' ' WHERE sealed = 0 AND changes = 1 AND row_key = \
         (SELECT MAX(row_key) FROM update_images WHERE sealed = 0 AND changes = 1)",
    );
    let refused = roll_back(&server, id);
    assert_eq!((refused.status, &refused.detail()["reason"]), (409, &json!("snapshot_damaged")));
    assert_eq!(state(&deploy), after);

    // Repaired is repaired: dropped, the row does not come again.
    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{id}'"));
    server.stop();
    let server = deploy.start();
    assert_eq!(status_of(&server, id), None, "found needed again");
    assert_eq!(apply(&server, id).detail()["reason"], json!("not_needed"));
    assert_eq!(state(&deploy), after);
    server.stop();
    deploy.audit_verifies();
}

/// The cells of the crash matrix that are run: on SQLite all, on PostgreSQL every third unless all are asked for. The
/// statements are the same, and each process that dies there costs twice the time.
fn asked_for<'a>(points: &'a [(&'a str, bool)], on: On) -> impl Iterator<Item = (&'a str, bool)> {
    let step = if on == On::Sqlite || std::env::var_os("MASTIO_TEST_ALL").is_some() { 1 } else { 3 };
    points.iter().copied().step_by(step)
}

fn crashes(id: &str, deploy: Deploy, on: On) {
    let deploy = deploy.with_passphrase();
    deploy.start().stop();
    let deploy = if on == On::Postgres { deploy.on_postgres() } else { deploy };
    let before = state(&deploy);
    let applied = deploy.copy();
    let server = applied.start();
    assert_eq!(apply(&server, id).status, 200);
    server.stop();
    let after = state(&applied);

    for (point, new) in asked_for(&APPLY_POINTS, on) {
        let deploy = deploy.copy();
        let server = deploy.start_to_crash_at(point);
        assert_eq!(apply(&server, id).status, 0, "{id} {point}: an answer came");
        server.dies();
        let server = deploy.start();
        assert_eq!(open_runs(&deploy), 0, "{id} {point}");
        let found = state(&deploy);
        assert_eq!(found == before, !new, "{id} {point}: neither old nor new");
        assert_eq!(status_of(&server, id).as_deref(), Some(if new { "applied" } else { "failed" }));
        assert_eq!(apply(&server, id).status, if new { 409 } else { 200 }, "{id} {point}");
        let end = state(&deploy);
        for (table, key) in [("config", "key"), ("agents", "agent_id"), ("token keys", "kid")] {
            let of = |state: &State| changed(&before[table], &state[table], key);
            if before[table].len() == after[table].len() {
                assert_eq!(of(&end), of(&after), "{id} {point}: another end");
            }
        }
        PkiState::read(&deploy).assert_under_one_chain();
        assert_eq!(roll_back(&server, id).status, 200, "{id} {point}");
        assert_eq!(state(&deploy), before, "{id} {point}: the way back");
        cell(id, "apply", point, new, on);
    }
    for (point, new) in asked_for(&ROLLBACK_POINTS, on) {
        let deploy = applied.copy();
        let server = deploy.start_to_crash_at(point);
        assert_eq!(roll_back(&server, id).status, 0, "{id} {point}: an answer came");
        server.dies();
        let server = deploy.start();
        assert_eq!(open_runs(&deploy), 0, "{id} {point}");
        assert_eq!(state(&deploy), if new { before.clone() } else { after.clone() }, "{id} {point}");
        assert_eq!(roll_back(&server, id).status, if new { 404 } else { 200 }, "{id} {point}");
        assert_eq!(state(&deploy), before, "{id} {point}");
        assert_eq!(status_of(&server, id).as_deref(), Some("rolled_back"));
        cell(id, "rollback", point, new, on);
    }
    let cells = asked_for(&APPLY_POINTS, on).count() + asked_for(&ROLLBACK_POINTS, on).count();
    println!("{cells} cells");
}

/// A line of the crash matrix. `./test --no-capture -E 'test(survives_every_crash)'` prints all of it.
fn cell(id: &str, direction: &str, point: &str, new: bool, on: On) {
    let found = if new { "wholly new" } else { "wholly old" };
    println!("{id:<30} {direction:<9} {point:<22} {:<10} {found}", on.name());
}

macro_rules! contract {
    ($($name:ident: $id:expr, $deploy:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn meets_the_contract_on_sqlite() {
                contract($id, $deploy, On::Sqlite);
            }

            #[test]
            fn meets_the_contract_on_postgresql() {
                contract($id, $deploy, On::Postgres);
            }

            #[test]
            fn survives_every_crash_on_sqlite() {
                crashes($id, $deploy, On::Sqlite);
            }

            #[test]
            fn survives_every_crash_on_postgresql() {
                crashes($id, $deploy, On::Postgres);
            }
        }
    )+

    #[test]
    fn every_registered_migration_has_its_line() {
        let lines: Vec<&str> = vec![$($id),+];
        let registered: Vec<&str> = mastio::updates::registry::REGISTRY
            .iter()
            .map(|migration| migration.declaration().migration_id)
            .collect();
        assert_eq!(lines, registered);
        let points = APPLY_POINTS.len() + ROLLBACK_POINTS.len();
        println!("the crash matrix has {} cells", lines.len() * points * On::BOTH.len());
    }
    };
}

contract! {
    org_ca_pathlen: MIGRATION, Deploy::of("chain5");
    mastio_ca_reissue: REISSUE, reshaped("chain5", &["--new-root"]);
    ca_key_identifiers: KEY_IDENTIFIERS, reshaped("py_healthy_pathlen1", &["--bare-root"]);
    leaf_profile: LEAF_PROFILE, Deploy::of("v01_healthy_pathlen1");
    enrollment_tags: TAGS, reshaped("py_healthy_pathlen1", &["--tag", "agent-0005=spiffe"]);
}

/// Which step of the contract each broken migration fails at, and what is said there.
const BROKEN: [(&str, &str); 8] = [
    ("forgets-a-row", "found needed again"),
    ("not-idempotent", "found needed again"),
    ("changes-a-preserved-field", "validity"),
    ("changes-the-meaning", "which became byoca"),
    ("panics-in-check", "not proposed"),
    ("panics-in-prepare", "the run stopped unexpectedly"),
    ("claims-done", "the plan changes nothing"),
    ("leaks-a-key", "a private key in clear"),
];

#[test]
fn a_broken_migration_fails_the_contract() {
    println!("{:<28} stopped by", "broken migration");
    for (broken, expected) in BROKEN {
        let deploy = reshaped("py_healthy_pathlen1", &["--tag", "agent-0005=spiffe"])
            .with_variable("MASTIO_BROKEN_MIGRATION", broken);
        let failed = catch_unwind(AssertUnwindSafe(|| contract("2026-12-31-broken", deploy, On::Sqlite)));
        let told = failed
            .expect_err(broken)
            .downcast::<String>()
            .map_or_else(|other| (*other.downcast::<&'static str>().unwrap()).to_owned(), |told| *told);
        let first: String = told.lines().next().unwrap().chars().take(160).collect();
        println!("{broken:<28} {first}");
        assert!(told.contains(expected), "{broken}: {told}");
    }
}
