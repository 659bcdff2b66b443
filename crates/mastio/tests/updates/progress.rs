//! Watching a run: several watchers, reconnects, another replica, failures, a server that stops.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use crate::server::{ADMIN_SECRET, Deploy, MIGRATION, Server, run};
use crate::state::{status, text};

/// A curl that follows the events of an update.
struct Watcher(Child);

/// An event: its name and body.
type Told = (String, Value);

impl Watcher {
    fn start(server: &Server, headers: &[&str]) -> Self {
        let mut command = Command::new("curl");
        command.args(["-skN", "--max-time", "120", "-H", &format!("X-Admin-Secret: {ADMIN_SECRET}")]);
        for header in headers {
            command.args(["-H", header]);
        }
        command.arg(format!("{}/proxy/updates/{MIGRATION}/events", server.url));
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Waits for the first event, which comes at once; gives the lines read so far.
    fn first(&mut self) -> String {
        use std::io::Read as _;
        let mut read = Vec::new();
        let out = self.0.stdout.as_mut().unwrap();
        while !read.ends_with(b"\n\n") {
            let mut byte = [0];
            out.read_exact(&mut byte).unwrap();
            read.extend(byte);
        }
        String::from_utf8(read).unwrap()
    }

    /// Waits until the server has ended the stream, as it has to: curl would tell of a broken one.
    fn end(self, read: &str) -> Vec<Told> {
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = read.to_owned() + &String::from_utf8(output.stdout).unwrap();
        text.split("\n\n").filter(|block| block.contains("event:")).map(told).collect()
    }
}

fn told(block: &str) -> Told {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    (field("event:").to_owned(), serde_json::from_str(field("data:")).unwrap())
}

fn both(fixture: &str) -> [Deploy; 2] {
    let sealed = Deploy::of(fixture).with_passphrase();
    sealed.start().stop();
    [Deploy::of(fixture), sealed.on_postgres()]
}

/// Asserts that `events` tell one run to its end `last`; gives the run's id.
fn assert_one_run(events: &[Told], last: &str) -> String {
    let (name, body) = events.last().unwrap();
    assert_eq!(name, last, "{events:?}");
    let run_id = text(body, "run_id");
    let phases = ["detect", "snapshot", "prepare", "verify", "commit", "activate"];
    let mut reached = 0;
    for (_, body) in events.iter().filter(|(name, _)| name == "progress") {
        assert_eq!(text(body, "run_id"), run_id);
        let place = phases.iter().position(|phase| *phase == text(body, "phase")).unwrap();
        assert!(place >= reached, "a phase came twice: {events:?}");
        reached = place;
        assert!(body["done"].as_i64().unwrap() <= body["total"].as_i64().unwrap(), "{body}");
    }
    run_id
}

#[test]
fn every_watcher_sees_the_run_and_how_it_ended() {
    for deploy in both("chain5") {
        let server = deploy.start();
        let mut watchers: Vec<_> = (0..3).map(|_| Watcher::start(&server, &[])).collect();
        let greeted: Vec<_> = watchers.iter_mut().map(Watcher::first).collect();
        for greeting in &greeted {
            assert_eq!(
                told(greeting),
                ("idle".to_owned(), json!({ "migration_id": MIGRATION, "last_run": null }))
            );
        }
        let applied = server.apply().json();
        let seen: Vec<Vec<Told>> =
            watchers.into_iter().zip(&greeted).map(|(watcher, read)| watcher.end(read)).collect();
        let runs: Vec<String> = seen.iter().map(|events| assert_one_run(events, "applied")).collect();
        assert!(runs.iter().all(|run| *run == runs[0]), "{runs:?}");
        for events in &seen {
            assert!(events.iter().any(|(name, _)| name == "progress"), "{events:?}");
            assert_eq!(events.last().unwrap().1["applied_at"], applied["applied_at"]);
        }

        // Who comes back is told the end at once; who comes anew is told what was, and waits for the next run.
        let back = Watcher::start(&server, &[&format!("Last-Event-ID: {}", runs[0])]).end("");
        assert_eq!((back.len(), assert_one_run(&back, "applied")), (1, runs[0].clone()));
        let mut anew = Watcher::start(&server, &[]);
        let greeting = anew.first();
        assert_eq!(told(&greeting).1["last_run"]["run_id"], json!(runs[0]));
        let rolled_back = server.rollback().json();
        let events = anew.end(&greeting);
        assert_ne!(assert_one_run(&events, "rolled_back"), runs[0]);
        assert_eq!(events.last().unwrap().1["rolled_back_at"], rolled_back["rolled_back_at"]);
        assert_eq!(server.get(&format!("/proxy/updates/{MIGRATION}/progress")).status, 404);
        assert_eq!(server.get("/proxy/updates/2026-01-01-nothing/events").status, 404);
        let metrics = server.get("/metrics").body;
        for phase in ["snapshot", "prepare", "commit", "activate"] {
            let series = format!("cullis_update_phase_seconds_count{{phase=\"{phase}\"}}");
            assert!(metrics.lines().any(|line| line.starts_with(&series)), "{series}");
        }
    }
}

#[test]
fn a_failed_run_ends_with_its_error_and_the_next_step() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    let mut watcher = Watcher::start(&server, &[]);
    let greeting = watcher.first();
    deploy.execute(
        "CREATE TRIGGER full BEFORE INSERT ON superseded_certificates BEGIN SELECT RAISE(ABORT, 'disk full'); END",
    );
    assert_eq!(server.apply().status, 503);
    let events = watcher.end(&greeting);
    assert_one_run(&events, "failed");
    let (_, end) = events.last().unwrap();
    assert!(text(end, "error").contains("disk full"), "{end}");
    assert!(text(end, "remedy").contains("nothing was changed"), "{end}");
    assert_eq!(status(&deploy).as_deref(), Some("failed"));
    deploy.execute("DROP TRIGGER full");
    assert_eq!(server.apply().status, 200);
}

#[test]
fn a_run_of_another_replica_is_watched_like_one_s_own() {
    let [_, deploy] = both("chain5");
    let runs = deploy.start();
    let replica = deploy.replica();
    let watches = replica.start();
    let mut watcher = Watcher::start(&watches, &[]);
    let greeting = watcher.first();
    assert_eq!(runs.apply().status, 200);
    assert_one_run(&watcher.end(&greeting), "applied");
    // The halt has lifted there too.
    let began = Instant::now();
    while watches.halted() {
        assert!(began.elapsed().as_secs() < 30, "the other replica stays halted");
    }
    assert_eq!(watches.rollback().status, 200);
}

#[test]
fn a_server_that_stops_does_not_wait_for_watchers() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    let mut watcher = Watcher::start(&server, &[]);
    let greeting = watcher.first();
    server.stop();
    // Ended, not broken: the stream came to its end before the server did.
    assert_eq!(watcher.end(&greeting).len(), 1);
}

#[test]
fn the_command_line_tells_where_a_run_is_and_the_log_at_most_once_a_second() {
    for stopped in [true, false] {
        let deploy = Deploy::of("chain5");
        deploy.start().stop();
        let server = (!stopped).then(|| deploy.start());
        let began = Instant::now();
        let output = run(&mut deploy.mastio(&["updates", "apply", MIGRATION, "--yes"]));
        let took = began.elapsed();
        assert!(output.status.success(), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.lines().any(|line| line.starts_with("apply prepare")), "{told}");
        assert!(String::from_utf8(output.stdout).unwrap().starts_with(&format!("{MIGRATION} applied at ")));
        if let Some(server) = server {
            let lines = server.log().iter().filter(|event| event["message"] == "update_progress").count();
            assert!(lines >= 1 && lines as u64 <= took.as_secs() + 1, "{lines} lines in {took:?}");
            assert!(server.logged("update_run_ended").is_some());
        }
        // A script reads one JSON value and nothing else.
        let output = run(&mut deploy.mastio(&["updates", "rollback", MIGRATION, "--yes", "--json"]));
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let done: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(done["status"], "rolled_back");
    }
}
