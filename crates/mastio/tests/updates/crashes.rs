//! The process dies at every phase of an apply and of a rollback over a thousand agents, on both databases.
//!
//! Whatever the moment: the next boot finds the state wholly old or wholly new and says so, signing is halted
//! whenever it was to be, and the operation can be completed to the end that an undisturbed run comes to.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mastio::demo::agent::{AgentClient, AgentError};
use tempfile::TempDir;

use serde_json::json;

use crate::server::{ADMIN_SECRET, Answer, Deploy, MIGRATION, On, Server, legacy, output, request, variable};
use crate::state::{PkiState, certificate, open_runs, status, text};

const AGENTS: usize = 1000;
/// Of `points`, those inside of what takes long over a large fleet, and those around the commit.
const APPLY_POINTS: [(&str, bool); 7] = [
    ("apply.snapshot.part", false),
    ("apply.prepare.page", false),
    ("apply.verify", false),
    ("apply.commit.part", false),
    ("apply.commit.before", false),
    ("apply.commit", true),
    ("apply.activate", true),
];
const ROLLBACK_POINTS: [(&str, bool); 5] = [
    ("rollback.prepare", false),
    ("rollback.commit.part", false),
    ("rollback.commit.before", false),
    ("rollback.commit", true),
    ("rollback.activate", true),
];

/// Agents of the fleet whose server is killed at any moment.
const KILL_AGENTS: usize = 2000;
/// How many of them ask for tokens meanwhile.
const CALLERS: usize = 4;
/// How often a process is killed, on both databases and in both directions together, where `MASTIO_TEST_KILLS` does not
/// say.
const KILLS: u32 = 8;
/// A row of a newer version: it halts before, during and after every rollback here, and no crash may lose it.
const OTHER_HALT: &str = "INSERT INTO pending_updates (migration_id, detected_at, status) \
     VALUES ('2027-01-01-of-a-newer-version', '2027-01-01T00:00:00Z', 'pending')";

/// A legacy deploy of so many agents, booted once and stopped, and a folder with the files of the first few.
fn fleet(on: On, agents: usize) -> (Deploy, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("made.db");
    output(
        Command::new(variable("MASTIO_TEST_JUDGES_PYTHON"))
            .arg(legacy("../make_legacy_db.py"))
            .arg(&file)
            .args(["--agents", &agents.to_string(), "--root-key", "ec", "--jobs", "2"])
            .args(["--keep", &CALLERS.to_string(), "--keys-dir"])
            .arg(folder.path().join("keys")),
    );
    let deploy = Deploy::of_file(&file).with_passphrase();
    deploy.start().stop();
    (if on == On::Postgres { deploy.on_postgres() } else { deploy }, folder)
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
fn assert_nothing_between(
    deploy: &Deploy,
    server: &Server,
    old: &PkiState,
    direction: &str,
    halted: bool,
) -> bool {
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
        assert_eq!(server.halted(), halted, "a halt was lost, or came");
    }
    assert_eq!(open_runs(deploy), 0, "a run was left open");
    assert_eq!(found.agents.len(), old.agents.len(), "an agent was lost");
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
    assert_eq!(end_of_apply.superseded.len(), old.leaves.len());
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
    let (deploy, _files) = fleet(on, AGENTS);
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
        let found = assert_nothing_between(&deploy, &server, &old, "apply", true);
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
        let found = assert_nothing_between(&deploy, &server, &repaired, "rollback", true);
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

/// How often each database's server is killed in each direction.
fn kills_each() -> u32 {
    let all = match std::env::var("MASTIO_TEST_KILLS") {
        Ok(number) => number.parse().unwrap_or_else(|_| panic!("MASTIO_TEST_KILLS is no number: {number}")),
        Err(_) => KILLS,
    };
    all.div_ceil(4)
}

/// Real agents that ask for tokens with the files they have held all along.
struct Load {
    stop: Arc<AtomicBool>,
    agents: std::thread::JoinHandle<u64>,
}

impl Load {
    fn start(server: &Server, files: &Path, ca: &str) -> Self {
        let clients: Vec<AgentClient> = (1..=CALLERS)
            .map(|number| {
                let stem = files.join(format!("keys/agent-{number:04}"));
                let read = |extension: &str| std::fs::read_to_string(stem.with_extension(extension)).unwrap();
                let agent_id = format!("legacy-org::agent-{number:04}");
                AgentClient::new(&server.url, ca, &read("crt"), &read("key"), &agent_id).unwrap()
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let agents = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let calls = clients.iter().map(|agent| call(agent, &stopped));
                futures_util::future::join_all(calls).await.iter().sum()
            })
        });
        Self { stop, agents }
    }

    /// How many tokens they got.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.agents.join().unwrap()
    }
}

/// Asks again and again, until told to stop or the server is dead. Nobody is ever refused for what the server did.
async fn call(agent: &AgentClient, stopped: &AtomicBool) -> u64 {
    let mut minted = 0;
    while !stopped.load(Ordering::SeqCst) {
        match agent.mint().await {
            Ok(_) => minted += 1,
            Err(AgentError::Refused { status: 503, .. }) => {}
            Err(AgentError::Unanswered { .. }) => return minted,
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    minted
}

/// Asks for a run, kills the server at a share of its length, and starts it again at once: on PostgreSQL the dead
/// process's last statement may still be at work. Gives the answer, if one came, the tokens that agents got meanwhile,
/// and the server that now runs.
fn killed(
    deploy: &Deploy,
    verb: &str,
    moment: Duration,
    (files, ca): (&Path, &str),
) -> (Answer, u64, Server) {
    let server = deploy.start();
    let load = Load::start(&server, files, ca);
    let (url, path) = (server.url.clone(), format!("/proxy/updates/{MIGRATION}/{verb}"));
    let asked = std::thread::spawn(move || {
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    });
    // Not a wait for anything: the moment is the point.
    std::thread::sleep(moment);
    server.kill();
    let minted = load.stop();
    let server = deploy.start();
    (asked.join().unwrap(), minted, server)
}

/// Tokens that were issued behind a halt: before an apply was verified, or ever where another halt stands.
fn tokens_under_a_halt(deploy: &Deploy, verb: &str, other_halt: bool) -> i64 {
    let issued = "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.token_issued'";
    let verified = "(SELECT MIN(seq) FROM audit_events WHERE event_type = 'admin.update_verified')";
    match (verb, other_halt) {
        ("apply", _) => deploy.count(&format!("{issued} AND seq < {verified}")),
        (_, true) => deploy.count(issued),
        (_, false) => 0,
    }
}

/// `kill -9` from outside, at moments that no one has chosen, over a large fleet under load.
fn killed_at_any_moment(on: On) {
    let (deploy, files) = fleet(on, KILL_AGENTS);
    let server = deploy.start();
    let ca = server.ca();
    server.stop();
    let old = PkiState::read(&deploy);
    let Undisturbed { applied, end_of_apply, end_of_rollback, apply, rollback } = undisturbed(&deploy, &old);
    let repaired = PkiState::read(&applied);
    let (mut kills, mut tokens) = (0, 0);
    for seed in 1..=kills_each() {
        // Spread over the length of a run by the golden ratio: no two seeds fall together.
        let share = (f64::from(seed) * 0.618_033_988_75).fract();
        for verb in ["apply", "rollback"] {
            let (from, length) = if verb == "apply" { (&deploy, apply) } else { (&applied, rollback) };
            let deploy = from.copy();
            // Every second rollback goes on while agents get tokens.
            let other_halt = verb == "rollback" && seed % 2 == 1;
            if verb == "rollback" && !other_halt {
                deploy.execute(
                    "DELETE FROM pending_updates WHERE migration_id = '2027-01-01-of-a-newer-version'",
                );
            }
            let moment = length.mul_f64(share) + Duration::from_millis(5);
            let (answer, minted, server) = killed(&deploy, verb, moment, (files.path(), &ca));
            let before = if verb == "apply" { &old } else { &repaired };
            let new = assert_nothing_between(&deploy, &server, before, verb, other_halt);
            let what = format!("{verb}, seed {seed}");
            assert!(answer.status == 0 || new, "{what}: {answer:?}, and the state is old");
            let load = Load::start(&server, files.path(), &ca);
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
                let mut end = End::read(&deploy, &server, &old);
                if !other_halt {
                    assert!(!end.halted, "{what}");
                    (end.halted, end.health) = (end_of_rollback.halted, end_of_rollback.health.clone());
                }
                assert_eq!(end, end_of_rollback, "{what}");
            }
            let minted = minted + load.stop();
            // What agents hold goes on working, or is told of the halt.
            let last = Load::start(&server, files.path(), &ca);
            std::thread::sleep(Duration::from_millis(400));
            let lives = last.stop();
            assert_eq!(lives > 0, !other_halt, "{what}: {lives} tokens at the end");
            assert_eq!(tokens_under_a_halt(&deploy, verb, other_halt), 0, "{what}: tokens under a halt");
            let issued = "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.token_issued'";
            assert!(
                u64::try_from(deploy.count(issued)).unwrap() >= minted + lives,
                "{what}: a token without its event"
            );
            (kills, tokens) = (kills + 1, tokens + minted + lives);
            server.stop();
            deploy.audit_verifies();
            println!(
                "{:<10} {verb:<8} seed {seed:>3} at {:>3.0} % of {length:.1?}: {}, {} tokens",
                on.name(),
                share * 100.0,
                if new { "wholly new" } else { "wholly old" },
                minted + lives,
            );
        }
    }
    println!(
        "{}: {kills} kills over {KILL_AGENTS} agents, 0 wrong states, 0 agents lost, 0 of {tokens} tokens under a halt",
        on.name()
    );
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
