//! What fails under a run: the disk, the database, the clock, the migration. Each leaves a clear state, a message with
//! the next step, and nothing lost; `mastio updates doctor` explains it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::contract::status_of;
use crate::rows::apply;
use crate::server::{ADMIN_SECRET, Answer, Deploy, MIGRATION, On, Server, request, run};
use crate::state::{PkiState, open_runs, status, text};

fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(90), "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn asked(server: &Server, verb: &str) -> std::thread::JoinHandle<Answer> {
    let (url, path) = (server.url.clone(), format!("/proxy/updates/{MIGRATION}/{verb}"));
    std::thread::spawn(move || {
        request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&json!({ "confirm": true }).to_string()))
    })
}

fn held_with(deploy: &Deploy, point: &str, more: &[(&str, &str)]) -> (Server, PathBuf) {
    let hold = deploy.folder().join("hold");
    std::fs::write(&hold, "").unwrap();
    let mut variables = vec![("MASTIO_HOLD_AT", point), ("MASTIO_HOLD_FILE", hold.to_str().unwrap())];
    variables.extend_from_slice(more);
    let server =
        deploy.start_with(&variables).unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
    (server, hold)
}

/// What the doctor finds about the update: its kind, and what it says to do next.
fn diagnosed(deploy: &Deploy) -> Vec<(String, String)> {
    let output = run(&mut deploy.mastio(&["updates", "doctor", "--json"]));
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let findings = report["findings"].as_array().unwrap();
    findings
        .iter()
        .filter(|finding| finding["subject"] != "2026-08-18-leaf-profile")
        .map(|finding| (text(finding, "finding"), text(finding, "next")))
        .collect()
}

/// Asserts that the update has failed, nothing was changed, and the doctor says how to go on; then goes on.
fn assert_failed_and_goes_on(deploy: &Deploy, server: &Server, before: &PkiState, what: &str) {
    assert_eq!((status(deploy).as_deref(), open_runs(deploy)), (Some("failed"), 0), "{what}");
    assert_eq!(PkiState::read(deploy), *before, "{what}: something changed");
    assert!(server.halted(), "{what}: the halt was lost");
    let found = diagnosed(deploy);
    assert!(
        found.iter().any(|(kind, next)| kind == "failed" && next.contains("then apply again")),
        "{what}: {found:?}"
    );
    println!("{what}: {:?}", server.item().map(|item| text(&item, "error")));
    let again = server.apply();
    assert_eq!(again.status, 200, "{what}: {again:?}");
    PkiState::read(deploy).assert_repaired_from(before);
    assert_eq!(server.rollback().status, 200, "{what}");
    assert_eq!(PkiState::read(deploy), *before, "{what}");
}

#[test]
fn a_database_that_only_reads_fails_the_run_and_service_resumes_with_it() {
    let deploy = Deploy::of("chain5").on(On::Postgres);
    let before = PkiState::read(&deploy);
    let (server, hold) = held_with(&deploy, "apply.prepare", &[]);
    let applied = asked(&server, "apply");
    until("prepare", || deploy.count("SELECT COUNT(*) FROM update_runs WHERE phase = 'prepare'") == 1);
    let read_only = |on: &str| {
        deploy.execute(&format!(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = {on}', \
             current_database()); END $$"
        ));
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                      AND pid <> pg_backend_pid()";
        deploy.rows(others);
    };
    read_only("on");
    std::fs::remove_file(hold).unwrap();
    let refused = applied.join().unwrap();
    assert!(matches!(refused.status, 500 | 503), "{refused:?}");
    assert!(server.halted());
    let found = diagnosed(&deploy);
    assert!(found.iter().any(|(kind, _)| kind.starts_with("run_")), "{found:?}");
    // An operator's own session is not bound to the default.
    let off = "SET TRANSACTION READ WRITE; DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET \
               default_transaction_read_only = off', current_database()); END $$";
    deploy.execute(off);
    deploy.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
         AND pid <> pg_backend_pid()",
    );
    until("the run is closed", || open_runs(&deploy) == 0);
    assert_failed_and_goes_on(&deploy, &server, &before, "read-only database");
    deploy.audit_verifies();
}

/// A wire between the server and its database that a test cuts and mends.
struct Wire {
    port: u16,
    whole: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Wire {
    fn to(address: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (whole, streams) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let (is_whole, open) = (Arc::clone(&whole), Arc::clone(&streams));
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if !is_whole.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(&address) else { continue };
                let pairs = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
                for (mut from, mut to) in pairs {
                    open.lock().unwrap().push(from.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let mut bytes = [0; 16 * 1024];
                        while let Ok(read @ 1..) = from.read(&mut bytes) {
                            if to.write_all(&bytes[..read]).is_err() {
                                break;
                            }
                        }
                        let _closed = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { port, whole, streams }
    }

    fn cut(&self) {
        self.whole.store(false, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _closed = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.whole.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_database_that_is_away_for_a_while_costs_a_run_and_nothing_else() {
    // Thirty seconds where all is asked for: what is waited for is the same.
    let away = Duration::from_secs(if std::env::var_os("MASTIO_TEST_ALL").is_some() { 30 } else { 5 });
    for (point, committed) in [("apply.prepare", false), ("apply.commit", true)] {
        let deploy = Deploy::of("chain5").on(On::Postgres);
        let before = PkiState::read(&deploy);
        let url = deploy.url().to_owned();
        let (head, tail) = url.split_once('@').unwrap();
        let (address, name) = tail.split_once('/').unwrap();
        let wire = Wire::to(address.to_owned());
        let through = format!("{head}@127.0.0.1:{}/{name}", wire.port);
        let (server, hold) = held_with(&deploy, point, &[("MCP_PROXY_DATABASE_URL", &through)]);
        let applied = asked(&server, "apply");
        let reached = if committed {
            "SELECT COUNT(*) FROM update_runs WHERE committed_at IS NOT NULL"
        } else {
            "SELECT COUNT(*) FROM update_runs WHERE phase = 'prepare'"
        };
        until(point, || deploy.count(reached) == 1);
        wire.cut();
        std::fs::remove_file(hold).unwrap();
        let cut = Instant::now();
        let refused = applied.join().unwrap();
        assert!(matches!(refused.status, 500 | 503), "{point}: {refused:?}");
        // The server says so, and goes on by itself.
        assert_ne!(server.get("/readyz").status, 200, "{point}");
        std::thread::sleep(away.saturating_sub(cut.elapsed()));
        let found = diagnosed(&deploy);
        assert!(found.iter().any(|(kind, _)| kind.starts_with("run_")), "{point}: {found:?}");
        wire.mend();
        until("the run is closed", || open_runs(&deploy) == 0);
        if committed {
            until("the halt lifts", || !server.halted());
            assert_eq!(status(&deploy).as_deref(), Some("applied"));
            PkiState::read(&deploy).assert_repaired_from(&before);
            assert_eq!(server.rollback().status, 200);
            assert_eq!(PkiState::read(&deploy), before);
        } else {
            assert_failed_and_goes_on(&deploy, &server, &before, "database away for thirty seconds");
        }
        server.stop();
        deploy.audit_verifies();
    }
}

#[test]
fn a_check_or_prepare_that_panics_is_said_and_the_others_go_on() {
    let broken = "2026-12-31-broken";
    let deploy =
        Deploy::of("py_healthy_pathlen1").with_variable("MASTIO_BROKEN_MIGRATION", "panics-in-check");
    let server = deploy.start();
    assert!(!server.halted(), "it is not critical");
    assert!(server.logged("cullis_proxy_update_check_failed").is_some());
    let found = diagnosed(&deploy);
    assert!(found.iter().any(|(kind, next)| kind == "check_failed" && next.contains("restart")), "{found:?}");
    assert_eq!(apply(&server, crate::rows::KEY_IDENTIFIERS).status, 200);
    server.stop();

    let deploy = deploy.with_variable("MASTIO_BROKEN_MIGRATION", "panics-in-prepare");
    let server = deploy.start();
    if status_of(&server, broken).is_none() {
        println!("no tag to repair in this fixture");
        return;
    }
    let before = PkiState::read(&deploy);
    assert_eq!(apply(&server, broken).status, 500);
    assert_eq!(status_of(&server, broken).as_deref(), Some("failed"));
    assert_eq!(PkiState::read(&deploy), before);
    let found = diagnosed(&deploy);
    assert!(found.iter().any(|(kind, next)| kind == "failed" && next.contains("apply again")), "{found:?}");
    assert_eq!(apply(&server, crate::rows::LEAF_PROFILE).status, 200, "the others go on");
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn a_clock_that_jumps_in_the_middle_of_a_run_spoils_nothing() {
    const DAY_S: i64 = 86_400;
    // A day ahead, an hour back, and so far ahead that the Org CA has ended.
    for (jump_s, goes_through) in [(DAY_S, true), (-3600, true), (30 * 365 * DAY_S, false)] {
        let deploy = Deploy::of("chain5");
        deploy.start().stop();
        let before = PkiState::read(&deploy);
        let clock = deploy.folder().join("clock");
        std::fs::write(&clock, "0").unwrap();
        let (server, hold) =
            held_with(&deploy, "apply.detect", &[("MASTIO_CLOCK_OFFSET_FILE", clock.to_str().unwrap())]);
        let applied = asked(&server, "apply");
        until("detect", || deploy.count("SELECT COUNT(*) FROM update_runs WHERE phase = 'detect'") == 1);
        // Whole or not at all: a reader must not find half a number.
        let next = deploy.folder().join("clock.next");
        std::fs::write(&next, jump_s.to_string()).unwrap();
        std::fs::rename(&next, &clock).unwrap();
        std::fs::remove_file(hold).unwrap();
        let answer = applied.join().unwrap();
        assert_eq!(open_runs(&deploy), 0, "{jump_s}");
        if goes_through {
            assert_eq!(answer.status, 200, "{jump_s}: {answer:?}");
            PkiState::read(&deploy).assert_repaired_from(&before);
            std::fs::write(&next, "0").unwrap();
            std::fs::rename(&next, &clock).unwrap();
            assert_eq!(server.rollback().status, 200, "{jump_s}");
            assert_eq!(PkiState::read(&deploy), before, "{jump_s}");
        } else {
            assert_ne!(answer.status, 200, "{answer:?}");
            std::fs::write(&next, "0").unwrap();
            std::fs::rename(&next, &clock).unwrap();
            assert_failed_and_goes_on(&deploy, &server, &before, "a clock thirty years ahead");
        }
        server.stop();
        deploy.audit_verifies();
    }
}

/// Two replicas whose clocks are an hour apart do not take each other for dead.
#[test]
fn a_replica_whose_clock_is_ahead_leaves_a_live_run_alone() {
    let first = Deploy::of("chain5").on(On::Postgres);
    let (runs, hold) = held_with(&first, "apply.prepare", &[]);
    let second = first.replica();
    let clock = second.folder().join("clock");
    std::fs::write(&clock, "3600").unwrap();
    let ahead = second
        .start_with(&[("MASTIO_CLOCK_OFFSET_FILE", clock.to_str().unwrap())])
        .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
    let applied = asked(&runs, "apply");
    until("prepare", || first.count("SELECT COUNT(*) FROM update_runs WHERE phase = 'prepare'") == 1);
    // Longer than a silent run is left alone.
    std::thread::sleep(Duration::from_secs(22));
    assert_eq!(open_runs(&first), 1, "the live run was taken over");
    std::fs::remove_file(hold).unwrap();
    assert_eq!(applied.join().unwrap().status, 200);
    until("the halt lifts there too", || !ahead.halted());
    first.audit_verifies();
}
