//! Two and three processes on one PostgreSQL: one run at a time, one halt, and no run that a death leaves stuck.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mastio::demo::agent::{AgentClient, AgentError};
use serde_json::json;

use crate::rows::listed;
use crate::server::{ADMIN_SECRET, Answer, Deploy, MIGRATION, On, Server, legacy, request, run};
use crate::state::{PkiState, open_runs, status, text};

/// Longer than replicas wait for a sign of life, on a machine that is busy.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(90);
const WITHIN: Duration = Duration::from_secs(1);

fn until(what: &str, within: Duration, is_so: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < within, "{what}: not within {within:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    began.elapsed()
}

fn asked(server: &Server, verb: &str) -> std::thread::JoinHandle<Answer> {
    let (url, path) = (server.url.clone(), format!("/proxy/updates/{MIGRATION}/{verb}"));
    std::thread::spawn(move || {
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    })
}

/// A server that stops at `point` for as long as the file lies there.
fn held_at(deploy: &Deploy, point: &str) -> (Server, std::path::PathBuf) {
    let hold = deploy.folder().join("hold");
    std::fs::write(&hold, "").unwrap();
    let server = deploy
        .start_with(&[("MASTIO_HOLD_AT", point), ("MASTIO_HOLD_FILE", hold.to_str().unwrap())])
        .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
    (server, hold)
}

fn in_phase(deploy: &Deploy, phase: &str) -> bool {
    deploy.count(&format!("SELECT COUNT(*) FROM update_runs WHERE finished_at IS NULL AND phase = '{phase}'"))
        == 1
}

#[test]
fn of_three_replicas_one_applies_and_the_others_show_where_it_is() {
    let first = Deploy::of("chain5").on(On::Postgres);
    let before = PkiState::read(&first);
    let (second, third) = (first.replica(), first.replica());
    let (runs, hold) = held_at(&first, "apply.prepare");
    let others = [second.start(), third.start()];
    let applied = asked(&runs, "apply");
    until("prepare", Duration::from_secs(60), || in_phase(&first, "prepare"));
    // Longer than a silent run would be left alone: this one is alive, and says so.
    let until_when = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until_when {
        for other in &others {
            let progress = other.get(&format!("/proxy/updates/{MIGRATION}/progress"));
            assert_eq!(progress.status, 200, "{progress:?}");
            assert_eq!(progress.json()["phase"], "prepare");
            for verb in ["apply", "rollback"] {
                let refused = asked(other, verb).join().unwrap();
                assert_eq!((refused.status, &refused.detail()["reason"]), (409, &json!("run_under_way")));
            }
        }
    }
    std::fs::remove_file(hold).unwrap();
    assert_eq!(applied.join().unwrap().status, 200);
    for other in &others {
        until("the halt lifts everywhere", Duration::from_secs(10), || !other.halted());
        assert_eq!(listed(other).first().map(|(_, status)| status.clone()).as_deref(), Some("applied"));
    }
    PkiState::read(&first).assert_repaired_from(&before);
    assert_eq!(first.count("SELECT COUNT(*) FROM audit_events WHERE event_type = 'admin.update_applied'"), 1);
    first.audit_verifies();
}

#[test]
fn a_run_whose_process_died_before_its_commit_is_closed_by_another_replica() {
    for point in ["apply.prepare", "apply.commit.part"] {
        let first = Deploy::of("chain5").on(On::Postgres);
        let before = PkiState::read(&first);
        let second = first.replica();
        let survivor = second.start();
        let dies = first.start_to_crash_at(point);
        assert_eq!(asked(&dies, "apply").join().unwrap().status, 0, "{point}");
        dies.dies();
        // Nobody restarts anything.
        let took = until("taken over", TAKEN_OVER_WITHIN, || open_runs(&first) == 0);
        println!("{point}: closed by the other replica after {took:.1?}");
        assert_eq!(status(&first).as_deref(), Some("failed"), "{point}");
        assert!(survivor.halted(), "{point}");
        assert_eq!(PkiState::read(&first), before, "{point}");
        let told = survivor.logged("update_run_recovered").unwrap();
        assert!(text(&told, "message").contains("wholly old"), "{told}");
        let error = text(&survivor.item().unwrap(), "error");
        assert!(error.contains("went away in the middle of the run"), "{error}");
        assert_eq!(asked(&survivor, "apply").join().unwrap().status, 200, "{point}");
        PkiState::read(&first).assert_repaired_from(&before);
        assert_eq!(asked(&survivor, "rollback").join().unwrap().status, 200, "{point}");
        assert_eq!(PkiState::read(&first), before, "{point}");
    }
}

#[test]
fn a_run_whose_process_died_after_its_commit_is_finished_by_another_replica() {
    for (verb, point) in [("apply", "apply.commit"), ("rollback", "rollback.commit")] {
        let first = Deploy::of("chain5").on(On::Postgres);
        let before = PkiState::read(&first);
        let (second, third) = (first.replica(), first.replica());
        let survivors = [second.start(), third.start()];
        if verb == "rollback" {
            assert_eq!(asked(&survivors[0], "apply").join().unwrap().status, 200);
        }
        let dies = first.start_to_crash_at(point);
        assert_eq!(asked(&dies, verb).join().unwrap().status, 0, "{point}");
        dies.dies();
        let took = until("taken over", TAKEN_OVER_WITHIN, || open_runs(&first) == 0);
        println!("{point}: finished by another replica after {took:.1?}");
        for survivor in &survivors {
            until("the halt lifts everywhere", Duration::from_secs(10), || !survivor.halted());
        }
        // One of the two survivors has done it, once.
        let verified = format!(
            "SELECT COUNT(*) FROM audit_events WHERE event_type = 'admin.update_verified' AND details LIKE '%{verb}%'"
        );
        assert_eq!(first.count(&verified), 1, "{point}");
        if verb == "apply" {
            PkiState::read(&first).assert_repaired_from(&before);
            assert_eq!(asked(&survivors[1], "rollback").join().unwrap().status, 200, "{point}");
        }
        assert_eq!(PkiState::read(&first), before, "{point}");
        first.audit_verifies();
    }
}

/// A process that was only stopped for a while must not commit what another one has closed.
#[test]
fn a_run_that_was_closed_while_its_process_slept_does_not_commit() {
    let first = Deploy::of("chain5").on(On::Postgres);
    let before = PkiState::read(&first);
    let second = first.replica();
    let awake = second.start();
    let (sleeps, hold) = held_at(&first, "apply.verify");
    let applied = asked(&sleeps, "apply");
    until("verify", Duration::from_secs(60), || in_phase(&first, "verify"));
    let signal = |name: &str| {
        assert!(run(Command::new("kill").args([name, &sleeps.pid().to_string()])).status.success())
    };
    signal("-STOP");
    until("taken over", TAKEN_OVER_WITHIN, || open_runs(&first) == 0);
    assert_eq!(asked(&awake, "apply").join().unwrap().status, 200);
    let repaired = PkiState::read(&first);
    repaired.assert_repaired_from(&before);
    std::fs::remove_file(hold).unwrap();
    signal("-CONT");
    assert_eq!(applied.join().unwrap().status, 500);
    assert_eq!(PkiState::read(&first), repaired);
    assert_eq!(first.count("SELECT COUNT(*) FROM audit_events WHERE event_type = 'admin.update_applied'"), 1);
    assert_eq!((status(&first).as_deref(), open_runs(&first)), (Some("applied"), 0));
    until("the sleeper knows", Duration::from_secs(10), || !sleeps.halted());
    first.audit_verifies();
}

async fn hammer(
    agent: AgentClient,
    (minted, refused): (Arc<AtomicU64>, Arc<AtomicU64>),
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::SeqCst) {
        match agent.mint().await {
            Ok(_) => minted.fetch_add(1, Ordering::SeqCst),
            Err(AgentError::Refused { status: 503, .. }) => refused.fetch_add(1, Ordering::SeqCst),
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        };
    }
}

#[test]
fn a_halt_reaches_every_replica_within_a_second_and_no_token_slips_between() {
    let first = Deploy::of("py_rolled_back").on(On::Postgres);
    let (second, third) = (first.replica(), first.replica());
    let servers = [first.start(), second.start(), third.start()];
    let ca = servers[0].ca();
    let stop = Arc::new(AtomicBool::new(false));
    let tallies: Vec<(Arc<AtomicU64>, Arc<AtomicU64>)> = servers.iter().map(|_| Default::default()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut callers = Vec::new();
    for (server, tally) in servers.iter().zip(&tallies) {
        for number in 2..=4 {
            let read = |extension: &str| {
                std::fs::read_to_string(legacy(&format!("keys/py_rolled_back/agent-000{number}.{extension}")))
                    .unwrap()
            };
            let agent_id = format!("legacy-org::agent-000{number}");
            let agent = AgentClient::new(&server.url, &ca, &read("crt"), &read("key"), &agent_id).unwrap();
            callers.push(runtime.spawn(hammer(agent, tally.clone(), Arc::clone(&stop))));
        }
    }
    type Which = fn(&(Arc<AtomicU64>, Arc<AtomicU64>)) -> &Arc<AtomicU64>;
    let sum = |which: Which| -> Vec<u64> {
        tallies.iter().map(|tally| which(tally).load(Ordering::SeqCst)).collect()
    };
    let every = |which: Which, by: u64| -> Duration {
        let from = sum(which);
        until("every replica", Duration::from_secs(60), || {
            sum(which).iter().zip(&from).all(|(now, from)| *now >= from + by)
        })
    };
    let mut fences = Vec::new();
    for round in 1..=3 {
        every(|tally| &tally.0, 5);
        let halted_at: i64 = first
            .execute(&format!(
                "INSERT INTO pending_updates (migration_id, detected_at, status) \
                 VALUES ('2027-01-0{round}-newer', '2027-01-01T00:00:00Z', 'pending'); SELECT epoch_sequence FROM audit_head"
            ))
            .trim()
            .parse()
            .unwrap();
        let reached = every(|tally| &tally.1, 1);
        assert!(reached < WITHIN, "round {round}: the halt reached the last replica after {reached:?}");
        every(|tally| &tally.1, 6);
        let lifted_at: i64 = first
            .execute(&format!(
                "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '2027-01-0{round}-newer'; \
                 SELECT epoch_sequence FROM audit_head"
            ))
            .trim()
            .parse()
            .unwrap();
        fences.push((halted_at, lifted_at, reached));
    }
    every(|tally| &tally.0, 5);
    stop.store(true, Ordering::SeqCst);
    runtime.block_on(async {
        for caller in callers {
            caller.await.unwrap();
        }
    });
    let issued = |from: i64, to: i64| {
        first.count(&format!(
            "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.token_issued' AND seq > {from} AND seq <= {to}"
        ))
    };
    for (halted_at, lifted_at, reached) in fences {
        println!("halted at {halted_at}, on three replicas after {reached:.0?}, lifted at {lifted_at}");
        assert_eq!(issued(halted_at, lifted_at), 0, "tokens behind the fence at {halted_at}");
    }
    let minted: u64 = sum(|tally| &tally.0).iter().sum();
    assert_eq!(u64::try_from(issued(0, i64::MAX)).unwrap(), minted, "handed out and recorded");
    println!("{minted} tokens by three replicas, none under a halt");
    first.audit_verifies();
}

#[test]
fn the_detector_of_a_new_version_halts_the_replicas_that_still_run_the_old_one() {
    let first = Deploy::of("py_rolled_back").on(On::Postgres);
    let old = first.start();
    assert!(!old.halted());
    let second = first.replica();
    // The new version knows a critical update that the old one has never heard of.
    let new = second
        .start_with(&[("MASTIO_BROKEN_MIGRATION", "of-a-newer-version")])
        .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
    let reached = until("the old one halts", Duration::from_secs(10), || old.halted());
    println!("the old version halts {reached:.0?} after the new one listens");
    assert!(reached < WITHIN, "{reached:?}");
    let row = first.rows(
        "SELECT criticality, affects_enrollments FROM pending_updates WHERE migration_id = '2026-12-31-broken'",
    );
    assert_eq!(row, [json!({ "criticality": "critical", "affects_enrollments": "[\"connector\"]" })]);
    let halt = old.logged("cullis_proxy_sign_halt_pending_migration").unwrap();
    assert_eq!(halt["migration_id"], "2026-12-31-broken");
    let refused = old.post("/proxy/updates/2026-12-31-broken/apply", &json!({ "confirm": true }));
    assert_eq!(refused.status, 404, "the old one cannot apply it: {refused:?}");
    // The new one can, and the old one goes on signing before it is replaced.
    assert_eq!(new.post("/proxy/updates/2026-12-31-broken/apply", &json!({ "confirm": true })).status, 200);
    until("the old one signs again", Duration::from_secs(10), || !old.halted());
}
