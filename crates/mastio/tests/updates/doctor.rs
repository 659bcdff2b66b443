//! `mastio updates doctor` and `mastio updates snapshots`: each state explained, on stopped and running deploys.

use serde_json::{Value, json};

use crate::rows::reshaped;
use crate::server::{Deploy, MIGRATION, run};
use crate::state::{dump, text};

/// What the doctor says: the exit code and the findings by their kind.
fn ask(deploy: &Deploy) -> (i32, Vec<Value>) {
    let output = run(&mut deploy.mastio(&["updates", "doctor", "--json"]));
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let code = output.status.code().unwrap();
    assert_eq!(report["healthy"] == true, code == 0, "{report}");
    (code, report["findings"].as_array().unwrap().clone())
}

fn kinds(findings: &[Value]) -> Vec<String> {
    findings.iter().map(|finding| text(finding, "finding")).collect()
}

fn the<'a>(findings: &'a [Value], kind: &str) -> &'a Value {
    findings
        .iter()
        .find(|finding| finding["finding"] == kind)
        .unwrap_or_else(|| panic!("no {kind}: {findings:?}"))
}

fn snapshots(deploy: &Deploy) -> Value {
    let output = run(&mut deploy.mastio(&["updates", "snapshots", "--json"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut list: Value = serde_json::from_slice(&output.stdout).unwrap();
    forget_age(&mut list);
    list
}

/// Takes out what is another thing a second later.
fn forget_age(list: &mut Value) {
    for row in list.as_array_mut().unwrap() {
        assert!(row.as_object_mut().unwrap().remove("age_s").is_some_and(|age| age.is_u64()), "{row}");
    }
}

#[test]
fn the_doctor_explains_what_a_crash_left_and_changes_nothing() {
    for (point, committed, state) in
        [("apply.prepare", false, "wholly old"), ("apply.commit", true, "wholly new")]
    {
        let deploy = reshaped("chain5", &["--complete-leaves"]);
        let server = deploy.start_to_crash_at(point);
        assert_eq!(server.apply().status, 0);
        server.dies();
        let before = dump(&deploy);
        let (code, findings) = ask(&deploy);
        assert_eq!(code, 1, "{findings:?}");
        let found = the(&findings, "run_of_a_dead_process");
        assert!(text(found, "what").contains(state), "{found}");
        assert!(text(found, "next").contains("start the server"), "{found}");
        assert_eq!(dump(&deploy), before, "the doctor changed something");

        let server = deploy.start();
        let (code, findings) = ask(&deploy);
        if committed {
            assert_eq!((code, kinds(&findings)), (0, vec![]), "{findings:?}");
        } else {
            assert_eq!((code, kinds(&findings)), (1, vec!["failed".to_owned()]), "{findings:?}");
            assert!(text(&findings[0], "what").contains("signing is halted"));
            assert!(text(&findings[0], "next").contains(&format!("mastio updates apply {MIGRATION}")));
            assert_eq!(server.apply().status, 200);
            assert_eq!(ask(&deploy), (0, vec![]));
        }
    }
}

#[test]
fn the_doctor_names_what_waits_what_halts_and_what_nobody_knows() {
    let deploy = reshaped("chain5", &["--complete-leaves"]);
    let server = deploy.start();
    deploy.execute(
        "INSERT INTO pending_updates (migration_id, detected_at, status) VALUES \
         ('2027-01-01-newer', '2027-01-01T00:00:00Z', 'pending'), ('2027-01-02-odd', '2027-01-01T00:00:00Z', 'aplied')",
    );
    let (code, findings) = ask(&deploy);
    assert_eq!(code, 1);
    let pending = the(&findings, "pending");
    assert!(
        text(pending, "what").contains("halted") && text(pending, "next").contains("updates plan"),
        "{pending}"
    );
    assert!(text(the(&findings, "unknown_to_this_version"), "next").contains("rolled_back"));
    assert_eq!(the(&findings, "unknown_status")["subject"], "2027-01-02-odd");
    // A stopped deploy tells the same.
    server.stop();
    assert_eq!(kinds(&ask(&deploy).1), kinds(&findings));
    let told = run(&mut deploy.mastio(&["updates", "doctor"]));
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains(&format!("needs you: {MIGRATION} (pending)")), "{told}");
}

#[test]
fn snapshots_are_listed_and_a_damaged_one_is_named_and_refused() {
    let deploy = reshaped("chain5", &["--complete-leaves"]);
    let server = deploy.start();
    assert_eq!(server.get("/proxy/updates/snapshots").json(), json!([]));
    assert_eq!(server.apply().status, 200);
    let mut sound = server.get("/proxy/updates/snapshots").json();
    forget_age(&mut sound);
    assert_eq!((&sound[0]["migration_id"], &sound[0]["sound"]), (&json!(MIGRATION), &json!(true)));
    assert!(sound[0]["rows"].as_i64().unwrap() >= 5 && sound[0]["taken_at"].as_str().unwrap().ends_with('Z'));
    assert_eq!(snapshots(&deploy), sound);
    let agent = "legacy-org::agent-0003";
    deploy.execute(&format!("UPDATE update_images SET before = before || ' ' WHERE row_key = '{agent}'"));
    let damaged = snapshots(&deploy);
    assert_eq!(damaged[0]["sound"], false);
    assert!(text(&damaged[0], "damaged_at").contains(agent), "{damaged}");
    let (code, findings) = ask(&deploy);
    assert_eq!((code, kinds(&findings)), (1, vec!["snapshot_damaged".to_owned()]));
    let refused = server.rollback();
    assert_eq!((refused.status, &refused.detail()["reason"]), (409, &json!("snapshot_damaged")));
    server.stop();
    assert_eq!(snapshots(&deploy), damaged);
    deploy.execute("UPDATE migration_state_backups SET snapshot_json = 'nonsense'");
    assert_eq!(kinds(&ask(&deploy).1), ["snapshot_damaged"]);
}

/// Former snapshots stay for a while, without keys; the one that a rollback needs is never among them.
#[test]
fn former_snapshots_are_kept_up_to_the_retention_and_pruned_beyond_it() {
    let deploy =
        reshaped("chain5", &["--complete-leaves"]).with_variable("MCP_PROXY_UPDATE_SNAPSHOTS_KEPT", "1");
    let server = deploy.start();
    let states = |server: &crate::server::Server| -> Vec<(String, bool)> {
        let list = server.get("/proxy/updates/snapshots").json();
        list.as_array().unwrap().iter().map(|row| (text(row, "state"), row["sound"] == true)).collect()
    };
    let sound = |state: &str| (state.to_owned(), true);
    let mut runs = Vec::new();
    for round in 0..3 {
        assert_eq!(server.apply().status, 200);
        let listed = server.get("/proxy/updates/snapshots").json();
        let newest = &listed[0];
        assert!(
            newest["bytes"].as_i64().unwrap() > 5000 && newest["age_s"].as_i64().unwrap() < 600,
            "{newest}"
        );
        assert!(text(newest, "digest").starts_with("sha256:"), "{newest}");
        runs.push(text(newest, "run_id"));
        let expected =
            if round == 0 { vec![sound("current")] } else { vec![sound("current"), sound("rolled_back")] };
        assert_eq!(states(&server), expected, "round {round}");
        assert_eq!(server.rollback().status, 200);
        assert_eq!(states(&server), [sound("rolled_back")], "round {round}");
    }
    // What is beyond the retention is swept, and what is kept has no key in it.
    let (first, last) = (&runs[0], &runs[2]);
    let images = |run: &str, and: &str| {
        deploy.count(&format!("SELECT COUNT(*) FROM update_images WHERE run_id = '{run}' {and}"))
    };
    crate::harness::wait_for("the sweep", || (images(first, "") == 0).then_some(()));
    assert!(images(last, "AND before IS NOT NULL") >= 5);
    assert_eq!(images(last, "AND sealed = 1 AND COALESCE(before, restore, after) IS NOT NULL"), 0);
    assert_eq!(server.rollback().status, 404, "a former snapshot is no way back");
    server.stop();
    let told = run(&mut deploy.mastio(&["updates", "snapshots"]));
    assert!(String::from_utf8_lossy(&told.stdout).contains("rolled_back"), "{told:?}");
}

/// What no row's own digest shows: a row taken away, one that came, and another text in place of what was written.
#[test]
fn a_snapshot_that_lost_or_gained_a_row_is_refused_and_changes_nothing() {
    let deploy = reshaped("chain5", &["--complete-leaves"]);
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    server.stop();
    let agent = "legacy-org::agent-0003";
    for damage in [
        format!("DELETE FROM update_images WHERE row_key = '{agent}'"),
        format!("UPDATE update_images SET after = before WHERE row_key = '{agent}'"),
        format!("UPDATE update_images SET changes = 0 WHERE row_key = '{agent}'"),
        format!(
            "INSERT INTO update_images (run_id, table_name, row_key, column_name, before, before_digest, after, changes) \
             SELECT run_id, table_name, 'legacy-org::nobody', column_name, before, before_digest, after, 1 \
             FROM update_images WHERE row_key = '{agent}'"
        ),
    ] {
        let deploy = deploy.copy();
        deploy.execute(&damage);
        let server = deploy.start();
        let before = crate::state::PkiState::read(&deploy);
        let refused = server.rollback();
        assert_eq!(
            (refused.status, &refused.detail()["reason"]),
            (409, &json!("snapshot_damaged")),
            "{damage}"
        );
        assert_eq!(crate::state::PkiState::read(&deploy), before, "{damage}");
        assert_eq!(snapshots(&deploy)[0]["sound"], false, "{damage}");
        assert_eq!(kinds(&ask(&deploy).1), ["snapshot_damaged"], "{damage}");
    }
}

#[test]
fn rows_and_snapshots_that_operators_removed_are_notes() {
    let deploy = reshaped("chain5", &["--complete-leaves"]);
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
    let (code, findings) = ask(&deploy);
    assert_eq!((code, kinds(&findings)), (0, vec!["snapshot_without_row".to_owned()]), "{findings:?}");
}

#[test]
fn a_row_that_says_applied_where_the_state_is_wrong_is_found() {
    let deploy = reshaped("v01_applied_row_only", &["--complete-leaves"]);
    let server = deploy.start();
    let (code, findings) = ask(&deploy);
    assert_eq!(
        (code, kinds(&findings)),
        (1, vec!["no_way_back".to_owned(), "applied_and_still_needed".to_owned()])
    );
    server.stop();
    // A predecessor's database that nobody has adopted is not looked into.
    let deploy = reshaped("chain5", &["--complete-leaves"]);
    let output = run(&mut deploy.mastio(&["updates", "doctor"]));
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("mastio adopt --check"), "{output:?}");
}

#[test]
fn the_doctor_is_asked_on_postgresql_too() {
    let sealed = reshaped("chain5", &["--complete-leaves"]).with_passphrase();
    sealed.start().stop();
    let deploy = sealed.on_postgres();
    let (code, findings) = ask(&deploy);
    assert_eq!((code, kinds(&findings)), (1, vec!["pending".to_owned()]), "{findings:?}");
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    assert_eq!(ask(&deploy), (0, vec![]));
    assert_eq!(snapshots(&deploy)[0]["sound"], true);
}
