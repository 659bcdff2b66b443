//! The process dies at every phase of an apply and of a rollback over a thousand agents, on both databases.
//!
//! Whatever the moment: the next boot finds the state wholly old or wholly new and says so, signing is halted
//! whenever it was to be, and the operation can be completed to the end that an undisturbed run comes to.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::server::{ADMIN_SECRET, Answer, Deploy, MIGRATION, On, Server, legacy, output, request, variable};
use crate::state::{PkiState, certificate, open_runs, status, text};

const AGENTS: usize = 1000;
/// The points that `updates/engine.rs` names, and whether the state is the new one when the process dies there.
const APPLY_POINTS: [(&str, bool); 7] = [
    ("apply.detect", false),
    ("apply.snapshot", false),
    ("apply.prepare", false),
    ("apply.verify", false),
    ("apply.commit.before", false),
    ("apply.commit", true),
    ("apply.activate", true),
];
const ROLLBACK_POINTS: [(&str, bool); 5] = [
    ("rollback.detect", false),
    ("rollback.prepare", false),
    ("rollback.commit.before", false),
    ("rollback.commit", true),
    ("rollback.activate", true),
];

/// How often a process is killed in each direction where `MASTIO_TEST_KILLS` does not say.
const KILLS: u32 = 6;
/// A row of a newer version: it halts before, during and after every rollback here, and no crash may lose it.
const OTHER_HALT: &str = "INSERT INTO pending_updates (migration_id, detected_at, status) \
     VALUES ('2027-01-01-of-a-newer-version', '2027-01-01T00:00:00Z', 'pending')";

/// A legacy deploy of [`AGENTS`] agents, booted once and stopped.
fn thousand_agents(on: On) -> Deploy {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("made.db");
    output(
        Command::new(variable("MASTIO_TEST_JUDGES_PYTHON"))
            .arg(legacy("../make_legacy_db.py"))
            .arg(&file)
            .args(["--agents", &AGENTS.to_string(), "--root-key", "ec", "--jobs", "2"]),
    );
    let deploy = Deploy::of_file(&file).with_passphrase();
    deploy.start().stop();
    if on == On::Postgres { deploy.on_postgres() } else { deploy }
}

/// Everything that has to be the same after two ways to the same end: what a run makes fresh is left out.
#[derive(Debug, PartialEq, Eq)]
struct End {
    status: Option<String>,
    health: serde_json::Value,
    halted: bool,
    open_runs: i64,
    halting_runs: i64,
    snapshots: i64,
    images: Vec<serde_json::Value>,
    staged: i64,
    /// Leaves that were replaced and are still accepted, of those that existed before the test.
    superseded: BTreeSet<String>,
    superseded_all: i64,
    anchors: Vec<serde_json::Value>,
    facts: i64,
    events: Vec<serde_json::Value>,
}

impl End {
    fn read(deploy: &Deploy, server: &Server, before: &PkiState) -> Self {
        let known: BTreeSet<String> =
            before.leaves.values().map(|leaf| certificate(leaf).fingerprint()).collect();
        let superseded: Vec<String> = deploy
            .rows("SELECT fingerprint FROM superseded_certificates")
            .iter()
            .map(|row| text(row, "fingerprint"))
            .collect();
        Self {
            status: status(deploy),
            health: server.health(),
            halted: server.halted(),
            open_runs: open_runs(deploy),
            halting_runs: deploy.count(
                "SELECT COUNT(*) FROM update_runs WHERE halts = 1 AND committed_at IS NOT NULL AND verified_at IS NULL",
            ),
            snapshots: deploy.count("SELECT COUNT(*) FROM migration_state_backups"),
            images: deploy.rows(
                "SELECT i.table_name, i.column_name, i.changes, COUNT(*) AS n FROM update_images i \
                 JOIN update_runs r ON r.run_id = i.run_id WHERE r.committed_at IS NOT NULL \
                 AND r.phase NOT IN ('discarded', 'swept') \
                 GROUP BY i.table_name, i.column_name, i.changes ORDER BY 1, 2, 3",
            ),
            staged: deploy.count(
                "SELECT COUNT(*) FROM update_run_certificates c JOIN update_runs r ON r.run_id = c.run_id \
                 WHERE r.committed_at IS NOT NULL AND r.phase NOT IN ('discarded', 'swept')",
            ),
            superseded_all: i64::try_from(superseded.len()).unwrap(),
            superseded: superseded.into_iter().filter(|fingerprint| known.contains(fingerprint)).collect(),
            anchors: deploy.rows(
                "SELECT state, COUNT(*) AS n, COUNT(key_sealed) AS keys FROM pki_anchors GROUP BY state ORDER BY state",
            ),
            facts: deploy.count(
                "SELECT COUNT(*) FROM agent_certificates c JOIN internal_agents a ON a.agent_id = c.agent_id \
                 WHERE c.issuer_key_id <> ''",
            ),
            events: deploy.rows(
                "SELECT event_type, COUNT(*) AS n FROM audit_events WHERE event_type IN \
                 ('admin.update_applied', 'admin.update_rolled_back') GROUP BY event_type ORDER BY event_type",
            ),
        }
    }
}

/// What a crash must leave, once the server is up again.
fn assert_nothing_between(deploy: &Deploy, server: &Server, old: &PkiState, direction: &str) -> bool {
    let found = PkiState::read(deploy);
    let new = if direction == "apply" {
        found.org_ca != old.org_ca
    } else {
        status(deploy).as_deref() == Some("rolled_back")
    };
    if direction == "apply" && new {
        found.assert_repaired_from(old);
        assert_eq!(status(deploy).as_deref(), Some("applied"));
        assert!(!server.halted(), "the repaired state has verified at this boot");
    } else if direction == "apply" {
        assert_eq!(found, *old);
        assert!(matches!(status(deploy).as_deref(), Some("pending" | "failed")), "{:?}", status(deploy));
        assert!(server.halted(), "a halt was lost");
    } else {
        assert!(server.halted(), "a halt was lost");
    }
    assert_eq!(open_runs(deploy), 0, "a run was left open");
    assert_eq!(deploy.count("SELECT COUNT(*) FROM internal_agents"), i64::try_from(AGENTS).unwrap());
    new
}

/// Asserts that the boot told what it found.
fn assert_told(server: &Server, direction: &str, new: bool) {
    let told = server.logged("update_run_recovered").expect("the boot did not say what it found");
    assert_eq!(told["direction"], direction);
    let message = text(&told, "message");
    assert!(message.contains(if new { "wholly new" } else { "wholly old" }), "{message}");
}

/// What comes of runs that nothing disturbs.
struct Undisturbed {
    /// The update applied and the server stopped, another halt standing.
    applied: Deploy,
    end_of_apply: End,
    end_of_rollback: End,
    apply: Duration,
    rollback: Duration,
}

fn undisturbed(deploy: &Deploy, old: &PkiState) -> Undisturbed {
    let applied = deploy.copy();
    let server = applied.start();
    assert!(server.halted());
    let began = Instant::now();
    assert_eq!(server.apply().status, 200);
    let apply = began.elapsed();
    let end_of_apply = End::read(&applied, &server, old);
    assert_eq!(end_of_apply.superseded.len(), AGENTS);
    server.stop();
    applied.execute(OTHER_HALT);
    let rolled_back = applied.copy();
    let server = rolled_back.start();
    assert!(server.halted());
    let began = Instant::now();
    assert_eq!(server.rollback().status, 200);
    let rollback = began.elapsed();
    assert_eq!(PkiState::read(&rolled_back), *old);
    let end_of_rollback = End::read(&rolled_back, &server, old);
    server.stop();
    Undisturbed { applied, end_of_apply, end_of_rollback, apply, rollback }
}

fn dies_at_every_point(on: On) {
    let deploy = thousand_agents(on);
    let old = PkiState::read(&deploy);
    assert_eq!(old.leaves.len(), AGENTS);
    let Undisturbed { applied, end_of_apply, end_of_rollback, .. } = undisturbed(&deploy, &old);
    let repaired = PkiState::read(&applied);

    println!("{:<10} {:<24} {:<12} completed", "direction", "crash point", "found");
    let mut wrong = Vec::new();
    for (point, new) in APPLY_POINTS {
        let deploy = deploy.copy();
        let server = deploy.start_to_crash_at(point);
        assert_eq!(server.apply().status, 0, "{point}: an answer came");
        server.dies();
        let halting = deploy.count(
            "SELECT COUNT(*) FROM update_runs WHERE halts = 1 AND committed_at IS NOT NULL AND verified_at IS NULL",
        );
        assert_eq!(halting, i64::from(new), "{point}: a committed run that has not verified halts");
        let server = deploy.start();
        assert_told(&server, "apply", new);
        let found = assert_nothing_between(&deploy, &server, &old, "apply");
        let again = server.apply();
        assert_eq!(again.status, if new { 409 } else { 200 }, "{point}: {again:?}");
        PkiState::read(&deploy).assert_repaired_from(&old);
        let end = End::read(&deploy, &server, &old);
        if end != end_of_apply {
            wrong.push(format!("{point}: {end:#?} instead of {end_of_apply:#?}"));
        }
        // The way back stands open after any of it.
        assert_eq!(server.rollback().status, 200, "{point}");
        assert_eq!(PkiState::read(&deploy), old, "{point}: the rollback did not restore");
        server.stop();
        deploy.audit_verifies();
        report("apply", point, found, new, &again);
    }
    for (point, new) in ROLLBACK_POINTS {
        let deploy = applied.copy();
        let server = deploy.start_to_crash_at(point);
        assert_eq!(server.rollback().status, 0, "{point}: an answer came");
        server.dies();
        let server = deploy.start();
        assert_told(&server, "rollback", new);
        let found = assert_nothing_between(&deploy, &server, &repaired, "rollback");
        assert_eq!(PkiState::read(&deploy), if new { old.clone() } else { repaired.clone() }, "{point}");
        let again = server.rollback();
        assert_eq!(again.status, if new { 404 } else { 200 }, "{point}: {again:?}");
        assert_eq!(PkiState::read(&deploy), old, "{point}");
        let end = End::read(&deploy, &server, &old);
        if end != end_of_rollback {
            wrong.push(format!("{point}: {end:#?} instead of {end_of_rollback:#?}"));
        }
        server.stop();
        deploy.audit_verifies();
        report("rollback", point, found, new, &again);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn report(direction: &str, point: &str, found: bool, expected: bool, again: &Answer) {
    assert_eq!(found, expected, "{point}");
    let how = if expected { "by the boot" } else { "on request" };
    println!(
        "{direction:<10} {point:<24} {:<12} {how}, asked again: {}",
        if found { "wholly new" } else { "wholly old" },
        again.status
    );
}

#[test]
fn a_crash_at_any_point_leaves_the_old_or_the_new_state_on_sqlite() {
    dies_at_every_point(On::Sqlite);
}

#[test]
fn a_crash_at_any_point_leaves_the_old_or_the_new_state_on_postgresql() {
    dies_at_every_point(On::Postgres);
}

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

fn kills() -> u32 {
    match std::env::var("MASTIO_TEST_KILLS") {
        Ok(number) => number.parse().unwrap_or_else(|_| panic!("MASTIO_TEST_KILLS is no number: {number}")),
        Err(_) => KILLS,
    }
}

/// Asks for a run, kills the server at a share of its length, and starts it again at once: on PostgreSQL the dead
/// process's last statement may still be at work. Gives the answer, if one came, and the server that now runs.
fn killed(deploy: &Deploy, verb: &str, length: Duration, share: f64) -> (Answer, Server) {
    let server = deploy.start();
    let (url, path) = (server.url.clone(), format!("/proxy/updates/{MIGRATION}/{verb}"));
    let asked = std::thread::spawn(move || {
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    });
    // Not a wait for anything: the moment is the point.
    std::thread::sleep(length.mul_f64(share) + Duration::from_millis(5));
    server.kill();
    let server = deploy.start();
    (asked.join().unwrap(), server)
}

/// `kill -9` from outside, at moments that no one has chosen.
fn killed_at_any_moment(on: On) {
    let deploy = thousand_agents(on);
    let old = PkiState::read(&deploy);
    let Undisturbed { applied, end_of_apply, end_of_rollback, apply, rollback } = undisturbed(&deploy, &old);
    let repaired = PkiState::read(&applied);
    for seed in 1..=kills() {
        // Spread over the length of a run by the golden ratio: no two seeds fall together.
        let share = (f64::from(seed) * 0.618_033_988_75).fract();
        for verb in ["apply", "rollback"] {
            let (from, length) = if verb == "apply" { (&deploy, apply) } else { (&applied, rollback) };
            let deploy = from.copy();
            let (answer, server) = killed(&deploy, verb, length, share);
            let before = if verb == "apply" { &old } else { &repaired };
            let new = assert_nothing_between(&deploy, &server, before, verb);
            let what = format!("{verb}, seed {seed}");
            assert!(answer.status == 0 || new, "{what}: {answer:?}, and the state is old");
            if verb == "apply" {
                let again = server.apply();
                assert_eq!(again.status, if new { 409 } else { 200 }, "{what}: {again:?}");
                PkiState::read(&deploy).assert_repaired_from(&old);
                assert_eq!(End::read(&deploy, &server, &old), end_of_apply, "{what}");
            } else {
                assert_eq!(
                    PkiState::read(&deploy),
                    if new { old.clone() } else { repaired.clone() },
                    "{what}"
                );
                let again = server.rollback();
                assert_eq!(again.status, if new { 404 } else { 200 }, "{what}: {again:?}");
                assert_eq!(PkiState::read(&deploy), old, "{what}");
                assert_eq!(End::read(&deploy, &server, &old), end_of_rollback, "{what}");
            }
            server.stop();
            deploy.audit_verifies();
            println!(
                "{:<10} {verb:<8} seed {seed:>3} at {:>2.0} % of {length:.1?}: {}",
                on.name(),
                share * 100.0,
                if new { "wholly new" } else { "wholly old" }
            );
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_or_the_new_state_on_sqlite() {
    killed_at_any_moment(On::Sqlite);
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_or_the_new_state_on_postgresql() {
    killed_at_any_moment(On::Postgres);
}

/// The database can be at a commit whose process is dead already: the next boot waits for it before it judges.
#[test]
fn a_commit_that_outlives_its_process_is_taken_up_by_the_next_boot() {
    let deploy = Deploy::of("chain5").on(On::Postgres);
    let old = PkiState::read(&deploy);
    deploy.execute(
        "CREATE FUNCTION slow_commit() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN PERFORM pg_sleep(6); RETURN NULL; END $$; \
         CREATE CONSTRAINT TRIGGER slow_commit AFTER UPDATE ON pending_updates DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW EXECUTE FUNCTION slow_commit()",
    );
    let server = deploy.start();
    let url = server.url.clone();
    let asked = std::thread::spawn(move || {
        let path = format!("/proxy/updates/{MIGRATION}/apply");
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    });
    let began = Instant::now();
    let commits =
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
    while deploy.count(commits) == 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "the commit was never reached");
    }
    server.kill();
    let server = deploy.start();
    assert_eq!(asked.join().unwrap().status, 0);
    assert_told(&server, "apply", true);
    assert_eq!(status(&deploy).as_deref(), Some("applied"));
    assert_eq!(open_runs(&deploy), 0);
    assert!(!server.halted(), "the repaired state has verified at this boot");
    PkiState::read(&deploy).assert_repaired_from(&old);
    assert_eq!(server.rollback().status, 200);
    assert_eq!(PkiState::read(&deploy), old);
    server.stop();
    deploy.audit_verifies();
}
