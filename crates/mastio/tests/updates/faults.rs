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
use crate::harness::psql;
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
    findings(&report)
}

fn findings(report: &Value) -> Vec<(String, String)> {
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

/// Where a run is held for a fault, and what the database says once it is there.
const HELD: [(&str, &str, bool, &str); 6] = [
    ("apply", "apply.snapshot", false, "phase = 'snapshot'"),
    ("apply", "apply.verify", false, "phase = 'verify'"),
    ("apply", "apply.commit", true, "committed_at IS NOT NULL"),
    ("rollback", "rollback.detect", false, "phase = 'detect'"),
    ("rollback", "rollback.prepare", false, "phase = 'prepare'"),
    ("rollback", "rollback.commit", true, "committed_at IS NOT NULL"),
];

/// Takes a run to each of [`HELD`], has `hinder` keep the database from writing there and `mend` undo that, and asserts
/// what every such fault has to leave: a server that answers and says what it lacks, a clear state, nothing lost, and a
/// run that can be completed without a restart.
fn hindered(
    what: &str,
    obstacle: &str,
    deploy: impl Fn() -> Deploy,
    start: impl Fn(&Deploy, &str) -> (Server, PathBuf),
    hinder: impl Fn(&Deploy, &Server),
    mend: impl Fn(&Deploy, &Server),
) {
    // Few of them by default: one before a commit, one after it, and one on the way back.
    const FEW: [&str; 3] = ["apply.snapshot", "apply.commit", "rollback.prepare"];
    let all = std::env::var_os("MASTIO_TEST_ALL").is_some();
    for (verb, point, committed, reached) in HELD.into_iter().filter(|held| all || FEW.contains(&held.1)) {
        let what = format!("{what} at {point}");
        let deploy = deploy();
        let before = PkiState::read(&deploy);
        let (server, hold) = start(&deploy, point);
        if verb == "rollback" {
            assert_eq!(server.apply().status, 200, "{what}");
        }
        let there = PkiState::read(&deploy);
        let asked = asked(&server, verb);
        let reached = format!("SELECT COUNT(*) FROM update_runs WHERE direction = '{verb}' AND {reached}");
        until(&what, || deploy.count(&reached) == 1);
        hinder(&deploy, &server);
        std::fs::remove_file(hold).unwrap();
        let refused = asked.join().unwrap();
        assert_eq!(refused.status, 503, "{what}: {refused:?}");
        assert!(refused.body.contains("the database is not available ("), "{what}: {refused:?}");

        // Whatever needs a write is refused, and said to be; what only reads goes on.
        let operator = json!({ "name": "late", "role": "viewer" });
        assert_eq!(server.post("/v1/admin/operators", &operator).status, 503, "{what}");
        let ready = server.get("/readyz");
        assert_eq!((ready.status, &ready.json()["checks"]["database"]), (503, &json!(obstacle)), "{what}");
        assert_eq!(server.get("/healthz").status, 200, "{what}");
        let found = findings(&server.get("/proxy/updates/doctor").json());
        let told =
            |kind: &str, next: &str| found.iter().any(|(found, then)| found == kind && then.contains(next));
        assert!(told("database_refuses_writes", "service resumes by itself"), "{what}: {found:?}");
        assert!(told("run_not_closed", "closes the run by itself"), "{what}: {found:?}");
        assert!(verb == "rollback" || server.halted(), "{what}: the halt was lost");

        mend(&deploy, &server);
        until("the run is closed", || open_runs(&deploy) == 0);
        until("the server is ready", || server.get("/readyz").status == 200);
        match (verb, committed) {
            ("apply", false) => assert_failed_and_goes_on(&deploy, &server, &before, &what),
            ("apply", true) => {
                until("the halt lifts", || !server.halted());
                PkiState::read(&deploy).assert_repaired_from(&before);
                assert_eq!(server.rollback().status, 200, "{what}");
            }
            (_, false) => {
                assert_eq!(PkiState::read(&deploy), there, "{what}: something changed");
                assert_eq!(status(&deploy).as_deref(), Some("applied"), "{what}");
                assert_eq!(server.rollback().status, 200, "{what}");
            }
            (_, true) => assert_eq!(server.rollback().status, 404, "{what}"),
        }
        assert_eq!(PkiState::read(&deploy), before, "{what}");
        assert_eq!(server.post("/v1/admin/operators", &operator).status, 201, "{what}");
        server.stop();
        deploy.audit_verifies();
    }
}

/// A deploy on a file, adopted and stopped.
fn adopted() -> Deploy {
    let deploy = Deploy::of("chain5");
    deploy.start().stop();
    deploy
}

/// A filesystem of a few megabytes, which a test fills.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Nothing where this machine lets nobody mount one.
    fn mount(size: &str) -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(place.path());
        if run(&mut mount).status.success() {
            return Some(Self(place));
        }
        println!("LEFT OUT: a full disk, because no filesystem can be mounted here");
        None
    }

    fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    /// Leaves not a byte.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("filling")).unwrap();
        for size in [65_536, 4096, 512, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.path().join("filling")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Whoever still has a file open there is dying, too.
        run(std::process::Command::new("umount").arg("--lazy").arg(self.path()));
    }
}

#[test]
fn a_full_disk_fails_the_run_and_service_resumes_with_the_room() {
    let Some(disk) = SmallDisk::mount("24m") else { return };
    let adopted = adopted();
    hindered(
        "full disk",
        "disk_full",
        || adopted.copy_to(tempfile::tempdir_in(disk.path()).unwrap()),
        |deploy, point| held_with(deploy, point, &[]),
        |deploy, _| {
            // The log has room of its own, which the next transaction would use up first.
            let emptied = deploy.rows("PRAGMA wal_checkpoint(TRUNCATE)");
            assert_eq!(emptied[0]["busy"], 0, "{emptied:?}");
            disk.fill();
        },
        |_, _| disk.make_room(),
    );
}

#[test]
fn a_disk_that_refuses_every_write_fails_the_run_and_service_resumes_after_it() {
    let limit = |server: &Server, bytes: &str| {
        let pid = server.pid().to_string();
        run(std::process::Command::new("prlimit").args(["--pid", &pid, &format!("--fsize={bytes}:")]));
    };
    let adopted = adopted();
    hindered(
        "disk that refuses writes",
        "disk_fails",
        || adopted.copy(),
        |deploy, point| {
            let hold = deploy.folder().join("hold");
            std::fs::write(&hold, "").unwrap();
            let variables = [("MASTIO_HOLD_AT", point), ("MASTIO_HOLD_FILE", hold.to_str().unwrap())];
            (deploy.start_ignoring_the_size_signal(&variables), hold)
        },
        |_, server| limit(server, "0"),
        |_, server| limit(server, "unlimited"),
    );
}

/// A tablespace on a filesystem of its own, for databases of PostgreSQL.
struct Tablespace {
    name: String,
    disk: SmallDisk,
}

impl Tablespace {
    fn create(size: &str) -> Option<Self> {
        let disk = SmallDisk::mount(size)?;
        let folder = disk.path().join("tablespace");
        std::fs::create_dir(&folder).unwrap();
        // Whoever the server runs as has to get there.
        assert!(run(std::process::Command::new("chmod").arg("755").arg(disk.path())).status.success());
        assert!(run(std::process::Command::new("chown").arg("postgres").arg(&folder)).status.success());
        let name = format!("small_{}", std::process::id());
        let create = format!("CREATE TABLESPACE {name} LOCATION '{}'", folder.display());
        psql(&superuser(), &create);
        psql(&superuser(), &format!("GRANT CREATE ON TABLESPACE {name} TO cullis"));
        Some(Self { name, disk })
    }
}

impl Drop for Tablespace {
    fn drop(&mut self) {
        let drop = format!("DROP TABLESPACE {}", self.name);
        run(std::process::Command::new("psql").args(["-X", "-q", &superuser(), "-c", &drop]));
    }
}

/// The test PostgreSQL's superuser: operators of the database, not of Mastio, make tablespaces.
fn superuser() -> String {
    crate::server::variable("MASTIO_TEST_POSTGRES_URL").replacen("cullis@", "postgres@", 1)
}

#[test]
fn a_full_tablespace_of_postgresql_fails_the_run_and_service_resumes_with_the_room() {
    let Some(space) = Tablespace::create("64m") else { return };
    let deploy = Deploy::of("chain5").with_passphrase();
    deploy.start().stop();
    let deploy = deploy.on_postgres_with(&format!("TABLESPACE {}", space.name));
    let before = PkiState::read(&deploy);
    let (server, hold) = held_with(&deploy, "apply.detect", &[]);
    let applied = asked(&server, "apply");
    until("detect", || deploy.count("SELECT COUNT(*) FROM update_runs WHERE phase = 'detect'") == 1);
    // Pages with room in them would take what comes without a file growing.
    for table in ["update_images", "audit_events", "update_runs"] {
        deploy.execute(&format!("VACUUM FULL {table}"));
    }
    space.disk.fill();
    std::fs::remove_file(hold).unwrap();
    let refused = applied.join().unwrap();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.body.contains("the disk is full: make room"), "{refused:?}");
    let found = diagnosed(&deploy);
    assert!(!found.is_empty(), "the doctor found nothing");
    assert_eq!(PkiState::read(&deploy), before);
    assert!(server.halted());
    space.disk.make_room();
    until("the run is closed", || open_runs(&deploy) == 0);
    until("the server is ready", || server.get("/readyz").status == 200);
    assert_failed_and_goes_on(&deploy, &server, &before, "full tablespace");
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn a_database_that_only_reads_fails_the_run_and_service_resumes_with_it() {
    let read_only = |deploy: &Deploy, on: &str| {
        // An operator's own session is not bound to the default.
        deploy.execute(&format!(
            "SET TRANSACTION READ WRITE; DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET \
             default_transaction_read_only = {on}', current_database()); END $$"
        ));
        deploy.rows(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
             AND pid <> pg_backend_pid()",
        );
    };
    let adopted = Deploy::of("chain5").on(On::Postgres);
    hindered(
        "read-only database",
        "read_only",
        || adopted.copy(),
        |deploy, point| held_with(deploy, point, &[]),
        |deploy, _| read_only(deploy, "on"),
        |deploy, _| read_only(deploy, "off"),
    );
}

/// A volume that was mounted read-only is refused at boot, in one sentence.
#[test]
fn a_data_directory_that_cannot_be_written_is_refused_at_boot() {
    let Some(disk) = SmallDisk::mount("24m") else { return };
    let deploy = adopted().copy_to(tempfile::tempdir_in(disk.path()).unwrap());
    let remount = |how: &str| {
        let mut mount = std::process::Command::new("mount");
        assert!(run(mount.args(["-o", &format!("remount,{how}")]).arg(disk.path())).status.success());
    };
    remount("ro");
    let (status, log) = deploy.start_with(&[]).err().expect("it booted on a read-only volume");
    assert!(!status.success());
    assert!(log.contains("Read-only file system"), "{log}");
    let asked = run(&mut deploy.mastio(&["updates", "doctor"]));
    assert!(!asked.status.success());
    assert!(!asked.stderr.is_empty(), "{asked:?}");
    println!("{log}\n{}", String::from_utf8_lossy(&asked.stderr));
    remount("rw");
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
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
            held_with(&deploy, "apply.snapshot", &[("MASTIO_CLOCK_OFFSET_FILE", clock.to_str().unwrap())]);
        let applied = asked(&server, "apply");
        // A run is in its first phase before it has looked at anything; in this one its check has passed.
        until("snapshot", || deploy.count("SELECT COUNT(*) FROM update_runs WHERE phase = 'snapshot'") == 1);
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

/// Has an agent's row change again each time a run has looked at it, `moves` times.
fn move_whenever_looked_at(deploy: &Deploy, on: On, agent_id: &str, moves: i64) {
    let when = format!("NEW.row_key = '{agent_id}' AND NEW.table_name = 'internal_agents'");
    let moves_left = "UPDATE moves SET n = n - 1 WHERE n > 0";
    let rewrite = "UPDATE internal_agents SET cert_pem = cert_pem || CHR WHERE agent_id = NEW.row_key";
    deploy.execute(&format!("CREATE TABLE moves (n BIGINT); INSERT INTO moves VALUES ({moves})"));
    let events = [("seen_first", "AFTER INSERT"), ("seen_again", "AFTER UPDATE OF before")];
    if on == On::Postgres {
        deploy.execute(&format!(
            "CREATE FUNCTION move_agent() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             {moves_left}; IF FOUND THEN {}; END IF; RETURN NULL; END $$",
            rewrite.replace("CHR", "chr(10)")
        ));
    }
    for (name, event) in events {
        deploy.execute(&match on {
            On::Sqlite => format!(
                "CREATE TRIGGER {name} {event} ON update_images WHEN {when} AND (SELECT n FROM moves) > 0 \
                 BEGIN {moves_left}; {}; END",
                rewrite.replace("CHR", "char(10)")
            ),
            On::Postgres => format!(
                "CREATE TRIGGER {name} {event} ON update_images FOR EACH ROW WHEN ({when}) \
                 EXECUTE FUNCTION move_agent()"
            ),
        });
    }
}

fn stop_moving(deploy: &Deploy, on: On) {
    deploy.execute(match on {
        On::Sqlite => "DROP TRIGGER seen_first; DROP TRIGGER seen_again; DROP TABLE moves",
        On::Postgres => "DROP FUNCTION move_agent() CASCADE; DROP TABLE moves",
    });
}

/// A fleet that moves exactly as fast as it is followed: the run says so and ends, and nothing was changed.
fn cannot_catch_up(on: On) {
    let deploy = Deploy::of("chain5").on(on);
    let server = deploy.start();
    let agent = "legacy-org::agent-0003";
    let of_run = |verb: &str| {
        deploy.count(&format!(
            "SELECT COUNT(*) FROM update_runs WHERE direction = '{verb}' AND committed_at IS NOT NULL"
        ))
    };
    // As often as not too often: the run follows, and its result is of what stands.
    move_whenever_looked_at(&deploy, on, agent, 4);
    assert_eq!(server.apply().status, 200);
    assert_eq!(deploy.count("SELECT n FROM moves"), 0, "the fleet did not move");
    stop_moving(&deploy, on);
    assert_eq!(server.rollback().status, 200);

    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
    server.stop();
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    move_whenever_looked_at(&deploy, on, agent, 1_000_000);
    let refused = server.apply();
    let reason = |refused: &Answer| (refused.status, refused.detail()["reason"].clone());
    assert_eq!(reason(&refused), (409, json!("cannot_catch_up")), "{refused:?}");
    let moves = 1_000_000 - deploy.count("SELECT n FROM moves");
    assert!((2..20).contains(&moves), "followed {moves} times");
    assert_eq!((of_run("apply"), status(&deploy).as_deref()), (1, Some("failed")));
    stop_moving(&deploy, on);
    let after = PkiState::read(&deploy);
    assert_eq!(
        (&after.org_ca, &after.mastio_ca, &after.agents),
        (&before.org_ca, &before.mastio_ca, &before.agents)
    );
    assert_failed_and_goes_on(&deploy, &server, &after, "a fleet that is never caught up with");

    // The same of a rollback, which carries back an agent that has changed since the apply.
    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
    server.stop();
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    deploy.execute(&format!(
        "UPDATE internal_agents SET cert_pem = '\n' || cert_pem WHERE agent_id = '{agent}'"
    ));
    let before = PkiState::read(&deploy);
    move_whenever_looked_at(&deploy, on, agent, 1_000_000);
    let refused = server.rollback();
    assert_eq!(reason(&refused), (409, json!("cannot_catch_up")), "{refused:?}");
    assert_eq!((open_runs(&deploy), status(&deploy).as_deref()), (0, Some("applied")));
    stop_moving(&deploy, on);
    let after = PkiState::read(&deploy);
    assert_eq!(
        (&after.org_ca, &after.mastio_ca, &after.agents),
        (&before.org_ca, &before.mastio_ca, &before.agents)
    );
    assert!(!server.halted());
    assert_eq!(server.rollback().status, 200);
    PkiState::read(&deploy).assert_under_one_chain();
    server.stop();
    deploy.audit_verifies();
}

#[test]
fn a_fleet_that_is_never_caught_up_with_ends_the_run_on_sqlite() {
    cannot_catch_up(On::Sqlite);
}

#[test]
fn a_fleet_that_is_never_caught_up_with_ends_the_run_on_postgresql() {
    cannot_catch_up(On::Postgres);
}
