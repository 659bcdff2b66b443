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
    serde_json::from_slice(&output.stdout).unwrap()
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
    let sound = server.get("/proxy/updates/snapshots").json();
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
