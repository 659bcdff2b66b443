//! The fence of the halt under load, and runs that come together, on both databases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mastio::demo::agent::{AgentClient, AgentError};
use serde_json::{Value, json};

use crate::server::{ADMIN_SECRET, Deploy, MIGRATION, On, Server, legacy, request};
use crate::state::{PkiState, open_runs, status};

const CALLERS: usize = 16;
/// A halt is seen within a second (design §2), and lifted within one.
const WITHIN: Duration = Duration::from_secs(1);

fn agents(fixture: &str, server: &Server) -> Vec<Arc<AgentClient>> {
    let (ca, read) = (server.ca(), |path: &str| std::fs::read_to_string(legacy(path)).unwrap());
    (2..=5)
        .map(|number| {
            let stem = format!("keys/{fixture}/agent-000{number}");
            let (certificate, key) = (read(&format!("{stem}.crt")), read(&format!("{stem}.key")));
            let agent_id = format!("legacy-org::agent-000{number}");
            Arc::new(AgentClient::new(&server.url, &ca, &certificate, &key, &agent_id).unwrap())
        })
        .collect()
}

/// What the callers count while they hammer the mint.
#[derive(Default)]
struct Tally {
    minted: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

async fn hammer(agent: Arc<AgentClient>, tally: Arc<Tally>) {
    while !tally.stop.load(Ordering::SeqCst) {
        match agent.mint().await {
            Ok(_) => tally.minted.fetch_add(1, Ordering::SeqCst),
            Err(AgentError::Refused { status: 503, detail, .. }) => {
                assert!(detail.starts_with("signing halted — "), "{detail}");
                tally.refused.fetch_add(1, Ordering::SeqCst)
            }
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        };
    }
}

/// Waits until `counter` has risen by `by`; how long it took.
async fn rises(counter: &AtomicU64, by: u64) -> Duration {
    let (began, from) = (Instant::now(), counter.load(Ordering::SeqCst));
    while counter.load(Ordering::SeqCst) < from + by {
        assert!(began.elapsed() < Duration::from_secs(30), "it never came");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    began.elapsed()
}

/// Engages the halt as an operator's SQL does. Gives the head's sequence at the bump, read in the same transaction.
fn engage(deploy: &Deploy, other: &str) -> i64 {
    let told = deploy.execute(&format!(
        "INSERT INTO pending_updates (migration_id, detected_at, status) \
         VALUES ('{other}', '2026-01-01T00:00:00Z', 'pending'); SELECT epoch_sequence FROM audit_head"
    ));
    told.trim().parse().unwrap()
}

fn release(deploy: &Deploy, other: &str) -> i64 {
    let told = deploy.execute(&format!(
        "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '{other}'; \
         SELECT epoch_sequence FROM audit_head"
    ));
    told.trim().parse().unwrap()
}

fn tokens_between(deploy: &Deploy, after: i64, up_to: i64) -> i64 {
    deploy.count(&format!(
        "SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.token_issued' AND seq > {after} AND seq <= {up_to}"
    ))
}

fn no_token_is_issued_after_the_halt_that_sql_engages(on: On) {
    let deploy = Deploy::of("py_rolled_back").on(on);
    let server = deploy.start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (agents, tally) = (agents("py_rolled_back", &server), Arc::new(Tally::default()));
        let callers: Vec<_> = (0..CALLERS)
            .map(|number| {
                tokio::spawn(hammer(Arc::clone(&agents[number % agents.len()]), Arc::clone(&tally)))
            })
            .collect();
        let mut fences = Vec::new();
        for round in 1..=5 {
            let other = format!("2026-01-0{round}-other");
            rises(&tally.minted, 50).await;
            let halted_at = tokio::task::block_in_place(|| engage(&deploy, &other));
            let refused = rises(&tally.refused, 1).await;
            assert!(refused < WITHIN, "round {round}: the first refusal after {refused:?}");
            // Every caller is refused now: each has been at least once more.
            rises(&tally.refused, CALLERS as u64 * 2).await;
            assert!(server.halted());
            let lifted_at = tokio::task::block_in_place(|| release(&deploy, &other));
            let minted = rises(&tally.minted, 1).await;
            assert!(minted < WITHIN, "round {round}: the first token after {minted:?}");
            fences.push((halted_at, lifted_at));
        }
        tally.stop.store(true, Ordering::SeqCst);
        for caller in callers {
            caller.await.unwrap();
        }
        let minted = tally.minted.load(Ordering::SeqCst);
        println!("{minted} tokens, {} refusals, fences {fences:?}", tally.refused.load(Ordering::SeqCst));
        for (halted_at, lifted_at) in fences {
            assert_eq!(
                tokens_between(&deploy, halted_at, lifted_at),
                0,
                "tokens behind the fence at {halted_at}"
            );
            assert!(tokens_between(&deploy, 0, halted_at) > 0);
        }
        // A token is handed out only when its event is durable.
        let recorded = tokens_between(&deploy, 0, i64::MAX);
        assert_eq!(u64::try_from(recorded).unwrap(), minted);
    });
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn no_token_is_issued_after_the_halt_that_sqlite3_engages() {
    no_token_is_issued_after_the_halt_that_sql_engages(On::Sqlite);
}

#[test]
fn no_token_is_issued_after_the_halt_that_psql_engages() {
    no_token_is_issued_after_the_halt_that_sql_engages(On::Postgres);
}

fn agents_mint_around_an_apply_and_never_inside_the_halt(on: On) {
    let deploy = Deploy::of("py_rolled_back").on(on);
    let server = deploy.start();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (agents, tally) = (agents("py_rolled_back", &server), Arc::new(Tally::default()));
        let callers: Vec<_> = (0..CALLERS)
            .map(|number| {
                tokio::spawn(hammer(Arc::clone(&agents[number % agents.len()]), Arc::clone(&tally)))
            })
            .collect();
        rises(&tally.minted, 20).await;
        let applied = tokio::task::block_in_place(|| server.apply());
        assert_eq!(applied.status, 200, "{applied:?}");
        rises(&tally.minted, 50).await;
        let rolled_back = tokio::task::block_in_place(|| server.rollback());
        assert_eq!(rolled_back.status, 200, "{rolled_back:?}");
        rises(&tally.minted, 50).await;
        tally.stop.store(true, Ordering::SeqCst);
        for caller in callers {
            caller.await.unwrap();
        }
    });
    // From the commit of the apply until its verification signing is halted.
    let seq = |event: &str| {
        let rows = deploy.rows(&format!(
            "SELECT MIN(seq) AS seq FROM audit_events WHERE event_type = '{event}' AND details LIKE '%{MIGRATION}%'"
        ));
        rows[0]["seq"].as_i64().unwrap_or_else(|| panic!("no event {event}"))
    };
    let (committed, verified) = (seq("admin.update_applied"), seq("admin.update_verified"));
    assert!(committed < verified);
    assert_eq!(tokens_between(&deploy, committed, verified), 0);
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn agents_mint_before_during_and_after_an_apply_but_never_inside_the_halt_on_sqlite() {
    agents_mint_around_an_apply_and_never_inside_the_halt(On::Sqlite);
}

#[test]
fn agents_mint_before_during_and_after_an_apply_but_never_inside_the_halt_on_postgresql() {
    agents_mint_around_an_apply_and_never_inside_the_halt(On::Postgres);
}

/// The answers of `callers` who ask for the same at once.
fn together(server: &Server, verb: &str, callers: usize) -> Vec<(u16, Value)> {
    let path = format!("/proxy/updates/{MIGRATION}/{verb}");
    let body = json!({ "confirm": true }).to_string();
    let mut answers: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..callers)
            .map(|_| scope.spawn(|| request(&server.url, "POST", &path, Some(ADMIN_SECRET), Some(&body))))
            .collect();
        asked
            .into_iter()
            .map(|asked| asked.join().unwrap())
            .map(|answer| (answer.status, answer.json()))
            .collect()
    });
    answers.sort_by_key(|(status, _)| *status);
    answers
}

fn of_those_that_come_together_one_is_let_in(on: On) {
    for callers in [2, 8] {
        let deploy = Deploy::of("chain5").on(on);
        let server = deploy.start();
        let before = PkiState::read(&deploy);
        let answers = together(&server, "apply", callers);
        let statuses: Vec<u16> = answers.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses[0], 200, "{answers:?}");
        assert!(statuses[1..].iter().all(|status| *status == 409), "{answers:?}");
        PkiState::read(&deploy).assert_repaired_from(&before);
        assert_eq!((status(&deploy).as_deref(), open_runs(&deploy)), (Some("applied"), 0));

        let answers = together(&server, "rollback", callers);
        let statuses: Vec<u16> = answers.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses[0], 200, "{answers:?}");
        assert!(statuses[1..].iter().all(|status| matches!(status, 404 | 409)), "{answers:?}");
        assert_eq!(PkiState::read(&deploy), before);
        assert_eq!((status(&deploy).as_deref(), open_runs(&deploy)), (Some("rolled_back"), 0));
        let events = "SELECT COUNT(*) FROM audit_events WHERE event_type = ";
        assert_eq!(deploy.count(&format!("{events}'admin.update_applied'")), 1);
        assert_eq!(deploy.count(&format!("{events}'admin.update_rolled_back'")), 1);
        server.stop();
        deploy.audit_verifies();
    }
}

#[test]
fn of_two_that_come_together_one_is_let_in_on_sqlite() {
    of_those_that_come_together_one_is_let_in(On::Sqlite);
}

#[test]
fn of_two_that_come_together_one_is_let_in_on_postgresql() {
    of_those_that_come_together_one_is_let_in(On::Postgres);
}
