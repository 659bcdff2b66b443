//! Every database that the predecessor left: what it does at boot, on apply, on rollback, and at the next boot.
//!
//! Each is adopted where it lies, and walked there and on PostgreSQL, to which it is copied.
//! [`CASES`] is the last table of `fixtures/legacy/README.md`, row by row; its cells marked (2) are listed as owed.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mastio::demo::agent::{AgentClient, AgentError};
use serde_json::{Value, json};

use crate::rows;
use crate::server::{Deploy, MIGRATION, On, PASSPHRASE, Server, legacy, output};
use crate::state::{PkiState, certificate, dump, open_runs, status, text};

const LEGACY_ROOT: &str = "org_ca_legacy_pathlen_zero";
/// Leaves do not expire while a token lives; SDKs pin the CA that the server named at boot.
const MINTING_AGENT: &str = "agent-0002";
const FOREIGN_AGENT: &str = "agent-0005";

/// What an apply answers.
#[derive(Clone, Copy)]
enum Apply {
    /// 200, and so many leaves are re-signed.
    Applied(usize),
    /// 409 with this reason and nothing changed.
    Refused(&'static str),
}

/// What a rollback answers after that.
#[derive(Clone, Copy, PartialEq)]
enum Rollback {
    /// 200, and everything is as it was before the apply.
    Restored,
    /// 200, and everything is as the snapshot in the file says.
    RestoredFromFile,
    /// 404: there is no snapshot.
    NoSnapshot,
}

struct Case {
    fixture: &'static str,
    row: Option<&'static str>,
    halted: bool,
    warnings: &'static [&'static str],
    apply: Apply,
    rollback: Rollback,
    owed: &'static str,
}

impl Case {
    /// The update that halts it, where one does.
    fn halting(&self) -> &'static str {
        match self.row {
            // Of the predecessor's apply the intermediate is left to repair.
            Some("applied") => rows::REISSUE,
            _ => MIGRATION,
        }
    }

    const fn pending(fixture: &'static str, leaves: usize) -> Self {
        Self {
            fixture,
            row: Some("pending"),
            halted: true,
            warnings: &[LEGACY_ROOT],
            apply: Apply::Applied(leaves),
            rollback: Rollback::Restored,
            owed: "",
        }
    }

    const fn standing(
        fixture: &'static str,
        row: Option<&'static str>,
        warnings: &'static [&'static str],
        reason: &'static str,
    ) -> Self {
        Self {
            fixture,
            row,
            halted: false,
            warnings,
            apply: Apply::Refused(reason),
            rollback: Rollback::NoSnapshot,
            owed: "",
        }
    }
}

const CASES: &[Case] = &[
    Case::pending("v01_root5", 5),
    Case::pending("chain5", 5),
    Case::pending("py_connector5_pending", 5),
    Case::pending("v01_byoca", 4),
    Case::pending("py_mixed_byoca_pending", 4),
    Case::pending("v01_inactive", 5),
    Case::pending("v01_no_intermediate", 5),
    Case {
        halted: true,
        ..Case::standing("v01_expired", Some("pending"), &[LEGACY_ROOT, "org_ca_expired"], "org_ca_expired")
    },
    Case {
        halted: true,
        ..Case::standing(
            "py_expired_failed",
            Some("failed"),
            &[LEGACY_ROOT, "org_ca_expired"],
            "org_ca_expired",
        )
    },
    Case::standing("v01_healthy_pathlen1", None, &[], "not_needed"),
    Case::standing("py_healthy_pathlen1", None, &[], "not_needed"),
    Case {
        owed: "doctor names the disagreement",
        ..Case::standing("v01_applied_row_only", Some("applied"), &[LEGACY_ROOT], "already applied")
    },
    Case::standing("v01_nokey", None, &[LEGACY_ROOT, "org_ca_key_unavailable"], "org_ca_key_unavailable"),
    Case {
        halted: true,
        rollback: Rollback::RestoredFromFile,
        ..Case::standing("py_applied", Some("applied"), &[], "already applied")
    },
    Case {
        halted: true,
        rollback: Rollback::RestoredFromFile,
        ..Case::standing("py_mixed_byoca_applied", Some("applied"), &[], "already applied")
    },
    Case { row: Some("rolled_back"), halted: false, ..Case::pending("py_rolled_back", 5) },
    Case::pending("py_encrypted", 5),
    Case { warnings: &[], rollback: Rollback::RestoredFromFile, ..Case::pending("py_torn5", 5) },
];

fn deploy_of(fixture: &str) -> Deploy {
    let deploy = Deploy::of(fixture);
    if fixture == "py_encrypted" { deploy.with_passphrase() } else { deploy }
}

/// Where an agent's certificate and key lie: those that it holds when the file is met.
fn credentials(fixture: &str, agent: &str) -> Vec<(PathBuf, PathBuf)> {
    ["", "old_leaves/", "new_leaves/"]
        .iter()
        .map(|folder| legacy(&format!("keys/{fixture}/{folder}{agent}")))
        .map(|stem| (stem.with_extension("crt"), stem.with_extension("key")))
        .filter(|(certificate, _)| certificate.exists())
        .collect()
}

/// What an agent gets that asks for a token with the files it holds and the roots in `ca`: 200 or the refusal.
fn mint(server: &Server, ca: &str, agent_id: &str, files: &(PathBuf, PathBuf)) -> Result<(), (u16, String)> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let agent = AgentClient::new(&server.url, ca, &read(&files.0), &read(&files.1), agent_id).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match runtime.block_on(agent.mint()) {
        Ok(_) => Ok(()),
        Err(AgentError::Refused { status, detail, .. }) => Err((status, detail)),
        Err(error) => panic!("{agent_id} got no answer: {error}: {:?}", std::error::Error::source(&error)),
    }
}

/// Asserts that each of the case's agents mints with what it holds, or that each is told of the halt.
fn assert_mints(case: &Case, server: &Server, ca: &str, state: &PkiState, halted: bool) -> usize {
    let mut minted = 0;
    for name in [MINTING_AGENT, FOREIGN_AGENT] {
        let agent_id = state.agents.keys().find(|id| id.ends_with(name)).unwrap();
        let active = state.agents[agent_id]["is_active"] == 1;
        for files in credentials(case.fixture, name) {
            // The predecessor made it, and it was lost when the run was torn: no row has it.
            if case.fixture == "py_torn5"
                && name == FOREIGN_AGENT
                && files.0.starts_with(legacy("keys/py_torn5/new_leaves"))
            {
                continue;
            }
            match mint(server, ca, agent_id, &files) {
                Err((status, detail)) if halted => {
                    assert_eq!(status, 503, "{agent_id}: {detail}");
                    assert_eq!(detail, format!("signing halted — pending migration {}", case.halting()));
                }
                Ok(()) if !halted && active => minted += 1,
                Err((401 | 403, _)) if !halted && !active => {}
                other => panic!(
                    "{agent_id} with {}: halted={halted} active={active}: {other:?}",
                    files.0.display()
                ),
            }
        }
    }
    minted
}

/// Asserts that the stored key of the Org CA is the certificate's: what it signs verifies.
fn assert_org_ca_key_signs(deploy: &Deploy, server: &Server) {
    let (key, csr) = (deploy.folder().join("byoca.key"), deploy.folder().join("byoca.csr"));
    output(
        Command::new("openssl")
            .args([
                "req",
                "-new",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=x",
            ])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&csr),
    );
    let body = json!({ "agent_name": "byoca-probe", "csr_pem": std::fs::read_to_string(&csr).unwrap() });
    let answer = server.post("/v1/admin/pki/byoca-certificates", &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    let root = text(&deploy.rows("SELECT value FROM proxy_config WHERE key = 'org_ca_cert'")[0], "value");
    let issued = text(&answer.json(), "cert_pem");
    certificate(&issued).verify_signature(&certificate(&root)).unwrap();
}

fn assert_at_boot(case: &Case, server: &Server, when: &str) {
    let fixture = case.fixture;
    let own = i64::from(matches!(case.row, Some("pending" | "failed")));
    let health = rows::health(case.warnings, own + rows::further(fixture));
    assert_eq!(server.health(), health, "{fixture} {when}");
    assert_eq!(server.halted(), case.halted, "{fixture} {when}");
    assert_eq!(server.item().map(|item| text(&item, "status")).as_deref(), case.row, "{fixture} {when}");
    let halt = server.logged("cullis_proxy_sign_halt_pending_migration");
    assert_eq!(halt.is_some(), case.halted, "{fixture} {when}");
    if let Some(halt) = halt {
        assert_eq!((&halt["level"], &halt["migration_id"]), (&json!("ERROR"), &json!(case.halting())));
    }
}

/// Columns that a boot may move: none of them says anything about keys, certificates, agents, updates or events.
fn without_bookkeeping(dump: BTreeSet<String>) -> BTreeSet<String> {
    dump.into_iter()
        // The epoch moves whenever halting facts are written anew; sequence and hash are held by `audit_events`.
        .filter(|statement| !statement.starts_with("audit_head"))
        .collect()
}

/// What a fixture did, for the table.
struct Line {
    boot: String,
    apply: String,
    rollback: String,
}

fn walk(case: &Case, on: On) -> Line {
    let fixture = case.fixture;
    let deploy = deploy_of(fixture);
    let deploy = if on == On::Postgres { deploy.with_passphrase() } else { deploy };
    let in_file = PkiState::read(&deploy);

    // The boot that adopts.
    let server = deploy.start();
    assert_at_boot(case, &server, "at the first boot");
    let copies = std::fs::read_dir(deploy.folder()).unwrap();
    let aside =
        copies.filter(|copy| copy.as_ref().unwrap().file_name().to_string_lossy().contains("before-mastio"));
    assert_eq!(aside.count(), 1, "{fixture} was not copied aside once");
    server.stop();
    deploy.audit_verifies();
    let adopted = PkiState::read(&deploy);
    if fixture == "py_encrypted" {
        adopted.assert_rest_is(&PkiState { org_ca: in_file.org_ca, mastio_ca: None, ..adopted.clone() });
        assert_eq!(in_file.leaves, adopted.leaves);
    } else {
        assert_eq!(
            PkiState { config: vec![], ..in_file.clone() },
            PkiState { config: vec![], ..adopted.clone() }
        );
        assert_eq!(in_file.config, adopted.config, "{fixture}: the org id or another setting moved");
    }

    let deploy = if on == On::Postgres { deploy.on_postgres() } else { deploy };
    assert_eq!(PkiState::read(&deploy), adopted, "{fixture}: the copy is another state");
    deploy.audit_verifies();

    // A boot that finds nothing to do.
    let first = dump(&deploy);
    let server = deploy.start();
    server.stop();
    let second = dump(&deploy);
    let (first, second) = (without_bookkeeping(first), without_bookkeeping(second));
    let moved: Vec<_> = first.symmetric_difference(&second).collect();
    assert!(moved.is_empty(), "{fixture}: the second boot changed {moved:#?}");

    let server = deploy.start();
    assert_at_boot(case, &server, "at a further boot");
    let ca = server.ca();
    let mut minted = assert_mints(case, &server, &ca, &adopted, case.halted);
    let mut line = Line {
        boot: format!(
            "{}, {}{}{}",
            case.row.unwrap_or("no row"),
            if case.halted { "halted" } else { "no halt" },
            if case.warnings.is_empty() { "" } else { ", warns " },
            case.warnings.join(" "),
        ),
        apply: String::new(),
        rollback: String::new(),
    };
    let before = PkiState::read(&deploy);

    // The apply, or the attempt.
    let answer = server.apply();
    match case.apply {
        Apply::Applied(leaves) => {
            assert_eq!(answer.status, 200, "{fixture}: {answer:?}");
            let after = PkiState::read(&deploy);
            if fixture == "py_torn5" {
                after.assert_under_one_chain();
                after.assert_rest_is(&before);
                assert_eq!(after.of_mastio().len(), leaves);
            } else {
                after.assert_repaired_from(&before);
                let changed = before.leaves.iter().filter(|(id, leaf)| after.leaves[*id] != **leaf).count();
                assert_eq!(changed, leaves, "{fixture}");
            }
            let further = rows::further(fixture);
            assert_eq!(server.health(), rows::health(&[], further), "{fixture} after its apply");
            assert!(!server.halted());
            minted += assert_mints(case, &server, &ca, &after, false);
            minted += assert_mints(case, &server, &server.ca(), &after, false);
            let again = server.apply();
            assert_eq!((again.status, again.detail()), (409, json!("already applied")), "{fixture}");
            line.apply = format!("applied, {leaves} leaves on the new chain");
        }
        Apply::Refused(reason) => {
            assert_eq!(answer.status, 409, "{fixture}: {answer:?}");
            let detail = answer.detail();
            let told = detail.as_str().or(detail["reason"].as_str());
            assert_eq!(told, Some(reason), "{fixture}");
            if reason == "org_ca_expired" {
                assert_eq!(detail["page"], "Rotate keys § 2");
            }
            assert_eq!(PkiState::read(&deploy), before, "{fixture}: a refused apply changed something");
            assert_at_boot(case, &server, "after the refused apply");
            line.apply = format!("409 {reason}, nothing changed");
        }
    }

    // The rollback.
    let answer = server.rollback();
    match case.rollback {
        Rollback::NoSnapshot => {
            assert_eq!(answer.status, 404, "{fixture}: {answer:?}");
            assert_eq!(answer.detail(), "no snapshot — state has already moved");
            assert_eq!(PkiState::read(&deploy), before, "{fixture}: a refused rollback changed something");
            line.rollback = "404 no snapshot".to_owned();
        }
        Rollback::Restored | Rollback::RestoredFromFile => {
            assert_eq!(answer.status, 200, "{fixture}: {answer:?}");
            let restored = PkiState::read(&deploy);
            if case.rollback == Rollback::Restored {
                restored.assert_rest_is(&before);
                // A token key that was made in between stays: tokens out there are signed with it.
                let restored = PkiState { token_keys: before.token_keys.clone(), ..restored.clone() };
                assert_eq!(restored, before, "{fixture}: not byte for byte");
            } else {
                // The predecessor re-signed even leaves of an owner's CA: they come back too.
                restored.assert_records_are(&before);
                assert_eq!(restored.mastio_ca, before.mastio_ca, "{fixture}");
                assert_snapshot_in_file_restored(fixture, &restored);
            }
            assert_eq!(status(&deploy).as_deref(), Some("rolled_back"));
            // Under the restored Org CA the intermediate is no orphan: that row is closed with the rollback.
            let further = rows::further(fixture) - i64::from(case.halted && case.halting() != MIGRATION);
            assert_eq!(server.health(), rows::health(&[LEGACY_ROOT], further), "{fixture}");
            assert!(!server.halted());
            minted += assert_mints(case, &server, &ca, &restored, false);
            assert_org_ca_key_signs(&deploy, &server);
            assert_eq!(server.rollback().status, 404);
            line.rollback = match case.rollback {
                Rollback::Restored => "byte for byte as before".to_owned(),
                _ => "as the snapshot in the file says".to_owned(),
            };
        }
    }
    assert_eq!(open_runs(&deploy), 0, "{fixture}");
    assert!(minted > 0 || case.halted, "{fixture}: nobody has minted");
    server.stop();

    // The end state boots, and says the same.
    let server = deploy.start();
    let expected = match case.rollback {
        Rollback::NoSnapshot => case.row,
        _ => Some("rolled_back"),
    };
    assert_eq!(server.item().map(|item| text(&item, "status")).as_deref(), expected);
    server.stop();
    deploy.audit_verifies();
    line
}

/// Asserts that Org CA and leaves are those that agents and files had before the predecessor's apply.
fn assert_snapshot_in_file_restored(fixture: &str, restored: &PkiState) {
    if fixture == "py_mixed_byoca_applied" {
        // Its twin file was taken just before the same server's apply.
        let before = PkiState::read(&Deploy::of("py_mixed_byoca_pending"));
        assert_eq!((&restored.org_ca, &restored.leaves), (&before.org_ca, &before.leaves));
        return;
    }
    let pem = |name: &str| {
        std::fs::read_to_string(legacy(&format!("keys/{fixture}/old_leaves/{name}.crt"))).unwrap()
    };
    assert_eq!(restored.org_ca, pem("org-ca"), "{fixture}");
    for (agent_id, leaf) in &restored.leaves {
        let name = agent_id.rsplit("::").next().unwrap();
        assert_eq!(*leaf, pem(name), "{fixture}: {agent_id}");
    }
}

/// What stands under an intermediate that is gone serves nobody, and misleads whoever reads it.
#[test]
fn a_rollback_that_takes_the_intermediate_away_takes_the_token_key_s_certificate_too() {
    let deploy = Deploy::of("v01_no_intermediate");
    let server = deploy.start();
    let keys = || deploy.rows("SELECT kid, cert_pem FROM mastio_keys");
    let has_certificate = |keys: &[serde_json::Value]| keys.iter().any(|key| !key["cert_pem"].is_null());
    assert_eq!(server.apply().status, 200);
    let applied = keys();
    assert!(has_certificate(&applied), "{applied:?}");
    assert_eq!(server.rollback().status, 200);
    let rolled_back = keys();
    assert!(!has_certificate(&rolled_back), "{rolled_back:?}");
    assert_eq!(rolled_back[0]["kid"], applied[0]["kid"], "the key itself stays");
    // The next intermediate certifies it anew.
    deploy.execute(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
    server.stop();
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    assert!(has_certificate(&keys()));
}

#[test]
fn every_fixture_does_what_its_table_says_on_both_databases() {
    let walks: Vec<_> = CASES.iter().flat_map(|case| On::BOTH.map(|on| (case, on))).collect();
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(vec![None; walks.len()]));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    let Some((case, on)) = walks.get(index) else { break };
                    let walked = catch_unwind(AssertUnwindSafe(|| walk(case, *on)));
                    lines.lock().unwrap()[index] = walked
                        .ok()
                        .map(|line| format!("{:<72} {:<46} {}", line.boot, line.apply, line.rollback));
                }
            });
        }
    });
    println!("{:<24} {:<11} {:<72} {:<46} on rollback", "file", "on", "at boot", "on apply");
    let lines = lines.into_inner().unwrap();
    let mut failed = Vec::new();
    for ((case, on), line) in walks.iter().zip(lines) {
        match line {
            Some(line) => println!("{:<24} {:<11} {line}", case.fixture, on.name()),
            None => failed.push((case.fixture, on.name())),
        }
        if *on == On::Postgres && !case.owed.is_empty() {
            println!("{:<24} {:<11} owed: {}", "", "", case.owed);
        }
    }
    assert!(failed.is_empty(), "{failed:?} did something else");
}

#[test]
fn the_table_has_every_file_of_the_folder() {
    let folder = legacy("");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .filter_map(|entry| {
            entry.unwrap().file_name().to_string_lossy().strip_suffix(".db").map(str::to_owned)
        })
        .collect();
    files.sort();
    let mut cases: Vec<&str> = CASES.iter().map(|case| case.fixture).collect();
    cases.sort_unstable();
    assert_eq!(files, cases);
}

#[test]
fn an_encrypted_database_without_its_passphrase_is_refused_untouched() {
    let deploy = Deploy::of("py_encrypted");
    let before = std::fs::read(deploy.file()).unwrap();
    let Err((status, log)) = deploy.start_with(&[]) else { panic!("it booted") };
    assert!(!status.success());
    assert!(log.contains("MCP_PROXY_DB_ENCRYPTION_KEY"), "{log}");
    assert_eq!(std::fs::read(deploy.file()).unwrap(), before);
    let wrong = [("MCP_PROXY_DB_ENCRYPTION_KEY", "another-passphrase-0123456789abcdef")];
    let Err((_, log)) = deploy.start_with(&wrong) else { panic!("it booted") };
    assert!(log.contains("MCP_PROXY_DB_ENCRYPTION_KEY"), "{log}");
    assert_eq!(std::fs::read(deploy.file()).unwrap(), before);
    // Nothing that was tried stands in the way of the right one.
    deploy.start_with(&[("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE)]).map(Server::stop).unwrap();
}

#[test]
fn a_torn_apply_is_recognized_and_says_how_far_it_came() {
    let deploy = Deploy::of("py_torn5");
    let server = deploy.start();
    let note = server.item().unwrap()["note"].as_str().unwrap().to_owned();
    assert!(note.contains("2 of 5 leaves are on the new chain"), "{note}");
    assert!(server.logged("2 of 5 leaves are on the new chain").is_some());
    assert!(server.halted());
}

#[test]
fn a_torn_apply_can_be_rolled_back_without_finishing_it() {
    let deploy = Deploy::of("py_torn5");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    let answer = server.rollback();
    assert_eq!(answer.status, 200, "{answer:?}");
    let restored = PkiState::read(&deploy);
    restored.assert_rest_is(&before);
    assert_eq!(restored.mastio_ca, before.mastio_ca);
    assert_snapshot_in_file_restored("py_torn5", &restored);
    assert_eq!(server.health(), rows::health(&[LEGACY_ROOT], rows::further("py_torn5")));
    assert_org_ca_key_signs(&deploy, &server);
}

#[test]
fn an_inactive_agent_is_re_signed_and_stays_inactive() {
    let deploy = Deploy::of("v01_inactive");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    assert_eq!(server.apply().status, 200);
    let after = PkiState::read(&deploy);
    let agent = "legacy-org::agent-0005";
    assert_ne!(after.leaves[agent], before.leaves[agent]);
    assert_eq!(after.agents[agent]["is_active"], 0);
    assert_eq!(after.agents[agent]["revoked_at"], before.agents[agent]["revoked_at"]);
}

#[test]
fn a_certificate_of_the_owner_s_own_ca_is_left_alone_and_flagged() {
    for fixture in ["v01_byoca", "py_mixed_byoca_pending"] {
        let deploy = Deploy::of(fixture);
        let server = deploy.start();
        assert_eq!(server.item().unwrap()["not_covered"], json!({ "byoca": 1 }), "{fixture}");
        let byoca = "SELECT agent_id, cert_pem FROM internal_agents WHERE enrollment_method = 'byoca'";
        let before = deploy.rows(byoca);
        assert_eq!(before.len(), 1);
        assert_eq!(server.apply().status, 200);
        assert_eq!(deploy.rows(byoca), before, "{fixture}");
        assert_eq!(server.item().unwrap()["not_covered"], json!({ "byoca": 1 }), "{fixture}");
    }
}

#[test]
fn an_org_ca_whose_key_is_held_elsewhere_is_never_replaced() {
    let deploy = Deploy::of("v01_nokey");
    let root = PkiState::read(&deploy).org_ca;
    for _boot in 0..2 {
        let server = deploy.start();
        let impossible = server.logged("held elsewhere").unwrap();
        assert_eq!((&impossible["level"], &impossible["migration_id"]), (&json!("WARN"), &json!(MIGRATION)));
        let answer = server.apply();
        assert_eq!((answer.status, &answer.detail()["reason"]), (409, &json!("org_ca_key_unavailable")));
        assert_eq!(server.rollback().status, 404);
        assert_eq!(PkiState::read(&deploy).org_ca, root);
        let keys = deploy.rows("SELECT key FROM proxy_config WHERE key = 'org_ca_key'");
        assert_eq!(keys, Vec::<Value>::new());
        server.stop();
    }
}

#[test]
fn the_reason_why_an_expired_org_ca_cannot_be_repaired_is_visible() {
    for fixture in ["v01_expired", "py_expired_failed"] {
        let deploy = Deploy::of(fixture);
        let server = deploy.start();
        let item = server.item().unwrap();
        assert!(item["note"].as_str().unwrap().contains("rotate the Org CA"), "{item}");
        if fixture == "py_expired_failed" {
            assert!(!text(&item, "error").is_empty(), "{item}");
        }
        let message = text(&server.apply().detail(), "message");
        assert!(message.contains("rotate the Org CA"), "{message}");
    }
}
