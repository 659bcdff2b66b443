//! Results that are wrong in one way: the gate of an update finds each, nothing lives on it, and the way back is open.
//!
//! Wrong when it is computed (a leaf that is signed by the right key and wrong in one field takes the place of what
//! the migration made), when it is staged (SQL between *prepare* and *verify*), and when it is stored (SQL between
//! *commit* and *activate*). The first two fail the run before anything changes; the third leaves the halt in place
//! until the rollback, which gives back every byte.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::contract::{State, state, status_of};
use crate::harness::run_with_input;
use crate::server::{ADMIN_SECRET, Answer, Deploy, MIGRATION, On, Server, legacy, request, variable};
use crate::state::text;

/// Four agents of ours, one of an owner's CA; a critical update is pending.
const FIXTURE: &str = "py_mixed_byoca_pending";
const AGENT: &str = "acme::agent-0002";
const OTHER: &str = "acme::agent-0003";

/// What the migration is made to compute for [`AGENT`], as `forge_leaf.py` names it, and what the gate says.
const COMPUTED: [(&str, &str); 17] = [
    ("key", "public key"),
    ("not-after", "validity"),
    ("not-before", "validity"),
    ("subject", "subject"),
    ("aki", "authority key identifier"),
    ("no-aki", "authority key identifier"),
    ("serial", "serial, which must be fresh"),
    ("san", "extensions"),
    ("no-san", "extensions"),
    ("ca", "extensions"),
    ("further-extension", "extensions"),
    ("issuer-name", "certification path"),
    ("signature", "certification path"),
    ("former-root", "authority key identifier"),
    ("former-leaf", "serial, which must be fresh"),
    ("no-intermediate", "the leaf and the intermediate"),
    ("private-key", "a private key in clear"),
];

/// The run under way and one agent's image in it.
macro_rules! image {
    ($agent:expr) => {
        concat!(
            "run_id = (SELECT run_id FROM update_runs WHERE finished_at IS NULL) AND row_key = '",
            $agent,
            "'"
        )
    };
}
macro_rules! of_run {
    ($column:expr, $row:expr) => {
        concat!(
            "(SELECT i.",
            $column,
            " FROM update_images i JOIN update_runs r ON r.run_id = i.run_id WHERE r.finished_at IS NULL \
             AND i.row_key = '",
            $row,
            "')"
        )
    };
}

/// What SQL does to the staged result, and what the gate says.
const STAGED: [(&str, &str, &str); 15] = [
    (
        "two leaves share a serial",
        "UPDATE update_run_certificates SET serial = (SELECT MAX(serial) FROM update_run_certificates \
             WHERE agent_id = 'acme::agent-0003')",
        "which two leaves share",
    ),
    (
        "an agent is skipped",
        concat!("UPDATE update_images SET changes = 0, after = NULL WHERE ", image!("acme::agent-0002")),
        "where 4 were prepared",
    ),
    (
        "an agent of another CA is smuggled in",
        "INSERT INTO update_images (run_id, table_name, row_key, column_name, before, before_digest, after, changes) \
         SELECT r.run_id, 'internal_agents', a.agent_id, 'cert_pem', a.cert_pem, '', 'x', 1 FROM internal_agents a, \
         update_runs r WHERE a.enrollment_method = 'byoca' AND r.finished_at IS NULL",
        "where 4 were prepared",
    ),
    (
        "the leaf is the former one",
        concat!("UPDATE update_images SET after = before WHERE ", image!("acme::agent-0002")),
        "agents' cert_pem",
    ),
    (
        "the leaves of two agents are swapped",
        concat!(
            "UPDATE update_images SET after = CASE row_key WHEN 'acme::agent-0002' THEN ",
            of_run!("after", "acme::agent-0003"),
            " ELSE ",
            of_run!("after", "acme::agent-0002"),
            " END WHERE row_key IN ('acme::agent-0002', 'acme::agent-0003')"
        ),
        "agents' cert_pem",
    ),
    (
        "the leaf is cut off",
        concat!("UPDATE update_images SET after = substr(after, 1, 300) WHERE ", image!("acme::agent-0002")),
        "agents' cert_pem",
    ),
    (
        "the intermediate behind a leaf is missing",
        concat!("UPDATE update_images SET follows = 0 WHERE ", image!("acme::agent-0002")),
        "1 agents' cert_pem, acme::agent-0002 the first",
    ),
    (
        "the intermediate behind every leaf is missing",
        "UPDATE update_runs SET follows = '' WHERE finished_at IS NULL",
        "4 agents' cert_pem",
    ),
    (
        "the facts have another end",
        "UPDATE update_run_certificates SET not_after = not_after + 1 WHERE agent_id = 'acme::agent-0002'",
        "agents' cert_pem",
    ),
    (
        "the facts have another issuer",
        "UPDATE update_run_certificates SET issuer_key_id = '00' WHERE agent_id = 'acme::agent-0002'",
        "agents' cert_pem",
    ),
    (
        "the facts are gone",
        "DELETE FROM update_run_certificates WHERE agent_id = 'acme::agent-0002'",
        "agents' cert_pem",
    ),
    (
        "the intermediate is missing",
        concat!("DELETE FROM update_images WHERE ", image!("mastio_ca_cert")),
        "mastio_ca_cert/value, which is not staged as it was prepared",
    ),
    (
        "the Org CA is the former one",
        concat!("UPDATE update_images SET after = before WHERE ", image!("org_ca_cert")),
        "org_ca_cert/value, which is not staged as it was prepared",
    ),
    (
        "the Org CA's key lies unsealed",
        concat!("UPDATE update_images SET after = 'a key in clear' WHERE ", image!("org_ca_key")),
        "org_ca_key/value, which is not staged as it was prepared",
    ),
    (
        "the Org CA's key is the former one",
        concat!("UPDATE update_images SET after = before WHERE ", image!("org_ca_key")),
        "org_ca_key/value, which is not staged as it was prepared",
    ),
];

/// What SQL does to the stored result, and what the gate says.
const STORED: [(&str, &str, &str); 15] = [
    (
        "a leaf is the former one",
        concat!(
            "UPDATE internal_agents SET cert_pem = ",
            of_run!("before", "acme::agent-0002"),
            " WHERE agent_id = 'acme::agent-0002'"
        ),
        "1 agents' cert_pem, acme::agent-0002 the first",
    ),
    (
        "the leaves of two agents are swapped",
        concat!(
            "UPDATE internal_agents SET cert_pem = CASE agent_id WHEN 'acme::agent-0002' THEN ",
            of_run!("after", "acme::agent-0003"),
            " ELSE ",
            of_run!("after", "acme::agent-0002"),
            " END WHERE agent_id IN ('acme::agent-0002', 'acme::agent-0003')"
        ),
        "2 agents' cert_pem",
    ),
    (
        "a leaf is gone",
        "UPDATE internal_agents SET cert_pem = NULL WHERE agent_id = 'acme::agent-0002'",
        "1 agents' cert_pem",
    ),
    (
        "a leaf has a byte more",
        "UPDATE internal_agents SET cert_pem = cert_pem || ' ' WHERE agent_id = 'acme::agent-0002'",
        "1 agents' cert_pem",
    ),
    (
        "the facts have another end",
        "UPDATE agent_certificates SET not_after = not_after + 1 WHERE agent_id = 'acme::agent-0002'",
        "1 agents' cert_pem",
    ),
    (
        "the facts have another serial",
        "UPDATE agent_certificates SET serial = '00' WHERE agent_id = 'acme::agent-0002'",
        "1 agents' cert_pem",
    ),
    (
        "the facts are gone",
        "DELETE FROM agent_certificates WHERE agent_id = 'acme::agent-0002'",
        "1 agents' cert_pem",
    ),
    (
        "a replaced leaf is not kept as superseded",
        "DELETE FROM superseded_certificates WHERE agent_id = 'acme::agent-0002'",
        "1 replaced leaves",
    ),
    ("the trust bundle is stale", "DELETE FROM pki_anchors WHERE state = 'retiring'", "the trust bundle"),
    (
        "the replaced Org CA has lost its key",
        "UPDATE pki_anchors SET key_sealed = NULL WHERE state = 'retiring'",
        "the replaced Org CA, whose key is missing",
    ),
    (
        "the Org CA is the former one",
        concat!(
            "UPDATE proxy_config SET value = ",
            of_run!("before", "org_ca_cert"),
            " WHERE key = 'org_ca_cert'"
        ),
        "the Org CA, whose key is another one | proxy_config/org_ca_cert/value",
    ),
    (
        "the intermediate is the former one",
        concat!(
            "UPDATE proxy_config SET value = ",
            of_run!("before", "mastio_ca_cert"),
            " WHERE key = 'mastio_ca_cert'"
        ),
        "the intermediate under the Org CA | proxy_config/mastio_ca_cert/value",
    ),
    (
        "the intermediate is missing",
        "DELETE FROM proxy_config WHERE key = 'mastio_ca_cert'",
        "proxy_config/mastio_ca_cert/value",
    ),
    (
        "the Org CA's key lies unsealed",
        "UPDATE proxy_config SET value = 'a key in clear' WHERE key = 'org_ca_key'",
        "the CA, which cannot be read",
    ),
    (
        "the Org CA cannot be read",
        "UPDATE proxy_config SET value = 'nothing' WHERE key = 'org_ca_cert'",
        "the CA, which cannot be read",
    ),
];

/// What SQL does to what no rollback gives back, each on a deploy of its own, and what the gate says.
const BESIDE: [(&str, &str, &str); 5] = [
    (
        "the audit log has a gap",
        "DELETE FROM audit_events WHERE event_type = 'admin.update_snapshot_taken'",
        "the audit log, in which this run is missing",
    ),
    (
        "an audit event was edited",
        "UPDATE audit_events SET actor = 'nobody' WHERE event_type = 'admin.update_applied'",
        "the audit log: ",
    ),
    (
        "the audit log has another head",
        "UPDATE audit_head SET hash = prev_hash FROM (SELECT prev_hash FROM audit_events ORDER BY seq DESC LIMIT 1) e",
        "the audit log: ",
    ),
    (
        "a written row is forgotten",
        concat!("DELETE FROM update_images WHERE ", image!("acme::agent-0005")),
        "cert_pem that 4 agents got and 3 have",
    ),
    (
        "a leaf of another CA was touched",
        "UPDATE internal_agents SET cert_pem = cert_pem || ' ' WHERE enrollment_method = 'byoca'",
        "1 leaves of other issuers",
    ),
];

/// A server whose runs stop at a point for as long as a file lies there.
struct Bench {
    deploy: Deploy,
    server: Server,
    before: State,
}

impl Bench {
    fn new(deploy: Deploy, point: &str) -> Self {
        let (hold, substitutes) = (deploy.folder().join("hold"), deploy.folder().join("substitutes"));
        std::fs::create_dir_all(&substitutes).unwrap();
        let before = state(&deploy);
        let server = deploy
            .start_with(&[
                ("MASTIO_HOLD_AT", point),
                ("MASTIO_HOLD_FILE", hold.to_str().unwrap()),
                ("MASTIO_SUBSTITUTES", substitutes.to_str().unwrap()),
            ])
            .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"));
        Self { deploy, server, before }
    }

    /// Applies, and does `harm` as soon as `is_held` finds a row.
    fn apply_with(&self, is_held: &str, harm: impl FnOnce(&Deploy)) -> Answer {
        let hold = self.deploy.folder().join("hold");
        std::fs::write(&hold, "").unwrap();
        let url = self.server.url.clone();
        let asked = std::thread::spawn(move || {
            let (path, body) = (format!("/proxy/updates/{MIGRATION}/apply"), json!({ "confirm": true }));
            request(&url, "POST", &path, Some(ADMIN_SECRET), Some(&body.to_string()))
        });
        let began = Instant::now();
        while self.deploy.rows(is_held).is_empty() {
            assert!(began.elapsed() < Duration::from_secs(120), "the run was never held");
            assert!(!asked.is_finished(), "the run was not held: {:?}", asked.join());
            std::thread::sleep(Duration::from_millis(20));
        }
        harm(&self.deploy);
        std::fs::remove_file(hold).unwrap();
        asked.join().unwrap()
    }

    /// The last failure as the audit log has it.
    fn failure(&self) -> Value {
        let rows = self.deploy.rows(
            "SELECT details FROM audit_events WHERE event_type = 'admin.update_apply_failed' ORDER BY seq DESC LIMIT 1",
        );
        rows.first().map_or(Value::Null, |row| serde_json::from_str(&text(row, "details")).unwrap())
    }

    /// Asserts that the gate has found it, with what reason, and that nothing is signed on it. Gives what it said.
    fn assert_found(&self, what: &str, answer: &Answer, reason: &str, said: &str) -> String {
        assert_eq!(answer.status, 500, "{what}: {answer:?}");
        let failure = self.failure();
        let error = text(&failure, "error");
        assert_eq!(failure["reason"], reason, "{what}: {error}");
        // What is read anew and what memory has are two ways to find one fault; either may be first.
        assert!(said.split(" | ").any(|place| error.contains(place)), "{what}: {error}");
        assert!(self.server.halted(), "{what}: the halt was lost");
        error
    }

    /// Asserts that nothing has changed.
    fn assert_untouched(&self, what: &str) {
        assert_eq!(status_of(&self.server, MIGRATION).as_deref(), Some("failed"), "{what}");
        assert_same(&state(&self.deploy), &self.before, what);
    }

    /// Asserts that the way back gives back every byte and lifts the halt.
    fn assert_way_back(&self, what: &str) {
        let rolled_back = self.server.rollback();
        assert_eq!(rolled_back.status, 200, "{what}: {rolled_back:?} {:?}", self.failure());
        assert_same(&state(&self.deploy), &self.before, what);
        assert!(!self.server.halted(), "{what}: halted after the rollback");
    }
}

/// Asserts that every row reads as before; names the first that does not.
fn assert_same(found: &State, before: &State, what: &str) {
    for (table, rows) in before {
        assert_eq!(found[table].len(), rows.len(), "{what}: rows of {table} came or went");
        for (is, was) in found[table].iter().zip(rows) {
            assert_eq!(is, was, "{what}: {table}");
        }
    }
}

fn line(when: &str, what: &str, said: &str) {
    println!("{when:<9} {what:<44} {}", said.chars().take(110).collect::<String>());
}

fn deploy(on: On) -> Deploy {
    let deploy = Deploy::of(FIXTURE).on(on);
    deploy.start().stop();
    deploy
}

#[test]
fn a_wrong_leaf_that_a_migration_computes_is_found_before_anything_changes() {
    let bench = Bench::new(deploy(On::Sqlite), "apply.prepare.part");
    let substitute = bench.deploy.folder().join("substitutes").join(AGENT);
    let held = "SELECT 1 AS n FROM update_images i JOIN update_runs r ON r.run_id = i.run_id \
        WHERE r.finished_at IS NULL AND i.row_key = 'mastio_ca_cert' AND i.changes = 1";
    for (wrong, said) in COMPUTED {
        let answer = bench.apply_with(held, |deploy| {
            let sql = format!(
                "SELECT i.row_key, COALESCE(i.after, i.before) AS pem FROM update_images i JOIN update_runs r \
                 ON r.run_id = i.run_id WHERE r.finished_at IS NULL AND i.row_key IN ('{AGENT}', 'mastio_ca_cert') \
                 ORDER BY i.row_key"
            );
            let pems: String = deploy.rows(&sql).iter().map(|row| text(row, "pem")).collect();
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/updates/forge_leaf.py");
            let mut forge = Command::new(variable("MASTIO_TEST_JUDGES_PYTHON"));
            forge.arg(script).arg(legacy(&format!("{FIXTURE}.db"))).arg(wrong);
            let forged = run_with_input(&mut forge, &pems);
            assert!(forged.status.success(), "{wrong}: {}", String::from_utf8_lossy(&forged.stderr));
            std::fs::write(&substitute, forged.stdout).unwrap();
        });
        let found = bench.assert_found(wrong, &answer, "verification_failed", said);
        assert!(found.contains(AGENT), "{found}");
        bench.assert_untouched(wrong);
        line("computed", wrong, &found);
    }
    println!("{} cells", COMPUTED.len());
    // What was wrong was the forgery alone.
    std::fs::remove_file(&substitute).unwrap();
    assert_eq!(bench.server.apply().status, 200);
    bench.assert_way_back("after all of it");
    bench.server.stop();
    bench.deploy.audit_verifies();
}

fn a_staged_result_that_was_changed_is_found(on: On) {
    let bench = Bench::new(deploy(on), "apply.verify.part");
    let held = "SELECT 1 AS n FROM update_runs WHERE finished_at IS NULL AND phase = 'verify'";
    for (what, sql, said) in STAGED {
        let answer = bench.apply_with(held, |deploy| drop(deploy.execute(sql)));
        // What SQL can see is found before the commit; what only the digests tell, after it.
        let committed = bench.failure()["committed"] == true;
        let reason = if committed { "stored_state_wrong" } else { "verification_failed" };
        let found = bench.assert_found(what, &answer, reason, said);
        if !committed {
            bench.assert_untouched(what);
        }
        bench.assert_way_back(what);
        line("staged", what, &found);
    }
    println!("{} cells", STAGED.len());
    assert_eq!(bench.server.apply().status, 200);
    bench.server.stop();
    bench.deploy.audit_verifies();
}

const COMMITTED: &str =
    "SELECT 1 AS n FROM update_runs WHERE finished_at IS NULL AND committed_at IS NOT NULL";

fn a_stored_result_that_was_changed_is_found(on: On) {
    let bench = Bench::new(deploy(on), "apply.commit");
    for (what, sql, said) in STORED {
        let answer = bench.apply_with(COMMITTED, |deploy| drop(deploy.execute(sql)));
        let found = bench.assert_found(what, &answer, "stored_state_wrong", said);
        bench.assert_way_back(what);
        line("stored", what, &found);
    }
    println!("{} cells", STORED.len());
    assert_eq!(bench.server.apply().status, 200);
    bench.server.stop();
    bench.deploy.audit_verifies();
}

#[test]
fn a_staged_result_that_was_changed_is_found_on_sqlite() {
    a_staged_result_that_was_changed_is_found(On::Sqlite);
}

#[test]
fn a_stored_result_that_was_changed_is_found_on_sqlite() {
    a_stored_result_that_was_changed_is_found(On::Sqlite);
}

#[test]
fn a_result_that_was_changed_is_found_on_postgresql() {
    // Twice the time for the same statements: asked for where all is asked for.
    if std::env::var_os("MASTIO_TEST_ALL").is_none() {
        println!("LEFT OUT: MASTIO_TEST_ALL is not set");
        return;
    }
    a_staged_result_that_was_changed_is_found(On::Postgres);
    a_stored_result_that_was_changed_is_found(On::Postgres);
}

#[test]
fn what_no_rollback_gives_back_is_found_too() {
    let pristine = deploy(On::Sqlite);
    for (what, sql, said) in BESIDE {
        let bench = Bench::new(pristine.copy(), "apply.commit");
        let answer = bench.apply_with(COMMITTED, |deploy| {
            let triggers = "DROP TRIGGER audit_events_no_update; DROP TRIGGER audit_events_no_delete";
            deploy.execute(&format!("{triggers}; {sql}"));
        });
        let found = if what == "the audit log has another head" {
            // Nothing can be appended truthfully any more; the halt stands, and the operator restores a backup.
            assert_eq!(answer.status, 500);
            assert!(bench.server.halted());
            text(&bench.failure(), "error")
        } else {
            bench.assert_found(what, &answer, "stored_state_wrong", said)
        };
        assert!(found.contains(said), "{what}: {found}");
        let rolled_back = bench.server.rollback();
        assert_eq!(rolled_back.status, 200, "{what}: {rolled_back:?}");
        let (mut found_after, mut before) = (state(&bench.deploy), bench.before.clone());
        let lost = match what {
            // It is somebody else's, and stays as that one left it.
            "a leaf of another CA was touched" => Some("acme::agent-0004"),
            // Nobody knows what it was; it is issued again under the restored CA.
            "a written row is forgotten" => Some("acme::agent-0005"),
            _ => None,
        };
        if let Some(lost) = lost {
            for table in ["agents", "facts"] {
                let ours = |row: &Value| text(row, "agent_id") != lost;
                found_after.get_mut(table).unwrap().retain(ours);
                before.get_mut(table).unwrap().retain(ours);
            }
        }
        assert_same(&found_after, &before, what);
        line("stored", what, &found);
    }
    println!("{} cells", BESIDE.len());
}

/// What lies behind the certificate of the server is made anew where it is missing, and never served where it is wrong.
#[test]
fn an_old_with_new_certificate_that_is_missing_or_wrong_is_made_anew() {
    let deploy = deploy(On::Sqlite);
    let server = deploy.start();
    let old_root = server.ca();
    assert_eq!(server.apply().status, 200);
    server.stop();
    for (what, sql) in [
        ("missing", "DELETE FROM pki_cross_certificates"),
        (
            "wrong",
            "UPDATE pki_cross_certificates SET cert_pem = (SELECT value FROM proxy_config WHERE key = 'mastio_ca_cert')",
        ),
    ] {
        deploy.execute(sql);
        let server = deploy.start();
        let new_root =
            text(&deploy.rows("SELECT value FROM proxy_config WHERE key = 'org_ca_cert'")[0], "value");
        for (pinned, root) in [("old", &old_root), ("new", &new_root)] {
            let file = deploy.folder().join("pinned.pem");
            std::fs::write(&file, root).unwrap();
            let asked = crate::server::run(
                Command::new("curl")
                    .args(["-sS", "--fail", "--cacert"])
                    .arg(&file)
                    .arg(format!("{}/healthz", server.url)),
            );
            assert!(
                asked.status.success(),
                "{what}, {pinned} root: {}",
                String::from_utf8_lossy(&asked.stderr)
            );
        }
        server.stop();
        line("stored", &format!("an old-with-new certificate is {what}"), "made anew, both pins work");
    }
}

/// A snapshot that does not read as it was written is found by the one who would use it.
#[test]
fn a_snapshot_whose_digest_is_off_is_refused_and_said() {
    let deploy = deploy(On::Sqlite);
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    let after = state(&deploy);
    deploy.execute(&format!("UPDATE update_images SET before_digest = '00' WHERE row_key = '{OTHER}'"));
    let refused = server.rollback();
    assert_eq!((refused.status, &refused.detail()["reason"]), (409, &json!("snapshot_damaged")));
    assert_eq!(state(&deploy), after);
}
