//! Plans: what an apply or a rollback would do, told before it is done, and runs that are held to what was told.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::rows::reshaped;
use crate::server::{Answer, Deploy, MIGRATION, Server, run};
use crate::state::{PkiState, certificate, open_runs, status, text};

/// One active agent of five is BYOCA.
const MIXED: &str = "py_mixed_byoca_pending";
const AGENT: &str = "acme::agent-0002";

/// The fixture on SQLite, and the same on PostgreSQL.
fn both(fixture: &str) -> [Deploy; 2] {
    let sealed = Deploy::of(fixture).with_passphrase();
    sealed.start().stop();
    [Deploy::of(fixture), sealed.on_postgres()]
}

fn plan(server: &Server, path: &str) -> Value {
    let answer = server.get(&format!("/proxy/updates/{MIGRATION}/{path}"));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn digest(server: &Server) -> String {
    text(&plan(server, "plan"), "plan_digest")
}

fn change(server: &Server, verb: &str, plan_digest: &str) -> Answer {
    let body = json!({ "confirm": true, "plan_digest": plan_digest });
    server.post(&format!("/proxy/updates/{MIGRATION}/{verb}"), &body)
}

/// Everything that a rehearsal must leave as it is.
fn untouched(deploy: &Deploy) -> (PkiState, Vec<Value>) {
    let rows = "SELECT h.sequence, h.hash, h.epoch, (SELECT COUNT(*) FROM update_runs) AS runs, \
                (SELECT COUNT(*) FROM update_images) AS images, (SELECT COUNT(*) FROM pki_anchors) AS anchors, \
                (SELECT COUNT(*) FROM update_run_certificates) AS staged FROM audit_head h";
    (PkiState::read(deploy), deploy.rows(rows))
}

#[test]
fn a_plan_tells_what_changes_for_whom_and_why_and_writes_nothing() {
    for deploy in both(MIXED) {
        let server = deploy.start();
        let before = untouched(&deploy);
        let first = plan(&server, "plan");
        assert_eq!((&first["migration_id"], &first["direction"]), (&json!(MIGRATION), &json!("apply")));
        assert_eq!((&first["leaves"], &first["affected"]["agents"]), (&json!(4), &json!(4)));
        assert_eq!(first["affected"]["enrollments"], json!(["connector"]));
        assert_eq!(first["not_covered"], json!({ "byoca": 1 }));
        let alone = &first["left_alone"][0];
        assert_eq!((&alone["enrollment"], &alone["agents"]), (&json!("byoca"), &json!(1)));
        assert!(text(alone, "why").contains("private key") && text(alone, "next").contains("issue-byoca"));
        assert_eq!(
            (&first["org_ca"][0]["path_len"], &first["org_ca"][1]["path_len"]),
            (&json!(0), &json!(1))
        );
        assert_eq!(first["org_ca"][0]["not_after"], first["org_ca"][1]["not_after"]);
        for sample in first["samples"].as_array().unwrap() {
            for kept in ["subject", "spki_sha256", "not_before", "not_after", "uris"] {
                assert_eq!(sample[0][kept], sample[1][kept], "{kept}");
            }
            for fresh in ["serial", "authority_key_id"] {
                assert_ne!(sample[0][fresh], sample[1][fresh], "{fresh}");
            }
        }
        assert_eq!(first["samples"].as_array().unwrap().len(), 3);
        let changes = first["changes"].as_array().unwrap();
        let change = |cell: &str| changes.iter().find(|change| change["cell"] == cell).unwrap();
        assert_eq!(change("proxy_config/org_ca_cert/value")["after"]["path_len"], 1);
        let key = change("proxy_config/org_ca_key/value");
        assert_eq!((&key["before"], &key["after"]), (&json!("a private key"), &json!("a new private key")));
        let halt = format!("signing halted — pending migration {MIGRATION}");
        assert_eq!(first["halt"], json!({ "before": [halt], "after": [] }));
        assert_eq!(first["evidence"]["org_ca"]["path_len"], 0);
        assert_eq!(
            (&first["evidence"]["status"], &first["evidence"]["org_ca_key"]),
            (&json!("pending"), &json!("here"))
        );
        assert!(first["estimate"]["seconds"].as_u64().unwrap() >= 1);
        assert!(first["estimate"]["leaves_per_second"].is_u64());

        // The keys were thrown away, and the digest does not know them.
        let second = plan(&server, "plan");
        assert_eq!(first["plan_digest"], second["plan_digest"]);
        assert_ne!(first["org_ca"][1]["spki_sha256"], second["org_ca"][1]["spki_sha256"]);
        let dry = server.request(
            "POST",
            &format!("/proxy/updates/{MIGRATION}/apply?dry_run=true"),
            Some(crate::server::ADMIN_SECRET),
            None,
        );
        assert_eq!((dry.status, &dry.json()["plan_digest"]), (200, &first["plan_digest"]));
        assert_eq!(untouched(&deploy), before);
        assert!(server.halted());

        // What was told is what is done.
        let applied = change_as_planned(&server, "apply", &first);
        assert_eq!(applied.status, 200, "{applied:?}");
        PkiState::read(&deploy).assert_repaired_from(&before.0);
        server.stop();
        deploy.audit_verifies();
    }
}

fn change_as_planned(server: &Server, verb: &str, plan: &Value) -> Answer {
    change(server, verb, &text(plan, "plan_digest"))
}

#[test]
fn the_command_line_tells_the_same_plan_of_a_stopped_and_of_a_running_deploy() {
    let deploy = Deploy::of(MIXED);
    deploy.start().stop();
    let asked = |arguments: &[&str]| {
        let output = run(&mut deploy.mastio(arguments));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let stopped: Value = serde_json::from_str(&asked(&["updates", "plan", MIGRATION, "--json"])).unwrap();
    let server = deploy.start();
    let running: Value = serde_json::from_str(&asked(&["updates", "plan", MIGRATION, "--json"])).unwrap();
    assert_eq!(stopped["plan_digest"], running["plan_digest"]);
    let told = asked(&["updates", "plan", MIGRATION]);
    for part in
        ["byoca agents (1) are left alone", "halt before", "plan digest", "proxy_config/org_ca_key/value"]
    {
        assert!(told.contains(part), "{part} in\n{told}");
    }
    let full = asked(&["updates", "plan", MIGRATION, "--full"]);
    assert!(full.contains(AGENT) && full.contains("plan digest"), "{full}");
    server.stop();
    let full = asked(&["updates", "plan", MIGRATION, "--full", "--json"]);
    let last: Value = serde_json::from_str(full.lines().last().unwrap()).unwrap();
    assert_eq!(last["plan"]["plan_digest"], stopped["plan_digest"]);
}

#[test]
fn the_full_list_has_every_change_once_and_the_plan_last() {
    for deploy in both(MIXED) {
        let server = deploy.start();
        let before = untouched(&deploy);
        let answer = server.get(&format!("/proxy/updates/{MIGRATION}/plan?full=true"));
        assert_eq!(answer.status, 200);
        let lines: Vec<Value> = answer.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).collect::<Vec<_>>();
        let named: BTreeSet<String> = of("leaf").iter().map(|line| text(line, "agent_id")).collect();
        assert_eq!(named, before.0.of_mastio().into_iter().map(str::to_owned).collect());
        let plan = &lines.last().unwrap()["plan"];
        assert_eq!(plan["cells"].as_array().unwrap().len(), of("cell").len());
        assert_eq!(lines.len(), named.len() + of("cell").len() + 1);
        assert_eq!(text(plan, "plan_digest"), digest(&server));
        assert_eq!(untouched(&deploy), before);
        // What fails before the first change has its status.
        assert_eq!(server.get(&format!("/proxy/updates/{MIGRATION}/rollback-plan?full=true")).status, 404);
        assert_eq!(server.get(&format!("/proxy/updates/{MIGRATION}/plan?full=yes")).status, 400);
    }
}

#[test]
fn an_apply_is_refused_with_the_differences_when_the_state_has_moved() {
    for deploy in both(MIXED) {
        let server = deploy.start();
        let seen = digest(&server);
        let refused = |part: &str, names: Value| {
            let answer = change(&server, "apply", &seen);
            assert_eq!(answer.status, 409, "{answer:?}");
            let detail = answer.detail();
            assert_eq!(detail["reason"], "plan_changed");
            assert_eq!(detail["differences"]["known"], true);
            for kind in ["entered", "left", "changed"] {
                let expected = if kind == part { names.clone() } else { json!([]) };
                assert_eq!(detail["differences"][kind]["agents"], expected, "{part}: {detail}");
            }
            assert_eq!(detail["differences"]["cells"], json!([]));
            assert_eq!(text(&detail, "plan_digest"), digest(&server));
            assert_eq!((status(&deploy).as_deref(), open_runs(&deploy)), (Some("pending"), 0));
            let dry = server.post(
                &format!("/proxy/updates/{MIGRATION}/apply?dry_run=true"),
                &json!({ "plan_digest": seen }),
            );
            assert_eq!((dry.status, &dry.detail()["reason"]), (409, &json!("plan_changed")));
        };
        // An agent enters, is gone again, changes, comes back.
        deploy.execute(&format!(
            "INSERT INTO internal_agents (agent_id, display_name, cert_pem, created_at) \
             SELECT 'acme::late', 'late', cert_pem, created_at FROM internal_agents WHERE agent_id = '{AGENT}'"
        ));
        refused("entered", json!(["acme::late"]));
        deploy.execute("DELETE FROM internal_agents WHERE agent_id = 'acme::late'");
        assert_eq!(digest(&server), seen);
        let leaf = format!("SELECT cert_pem FROM internal_agents WHERE agent_id = '{AGENT}'");
        let leaf = text(&deploy.rows(&leaf)[0], "cert_pem");
        let other = text(
            &deploy.rows(&format!(
                "SELECT cert_pem FROM internal_agents WHERE agent_id > '{AGENT}' AND enrollment_method <> 'byoca' \
                 ORDER BY agent_id LIMIT 1"
            ))[0],
            "cert_pem",
        );
        deploy
            .execute(&format!("UPDATE internal_agents SET cert_pem = '{other}' WHERE agent_id = '{AGENT}'"));
        refused("changed", json!([AGENT]));
        deploy.execute(&format!("UPDATE internal_agents SET cert_pem = NULL WHERE agent_id = '{AGENT}'"));
        refused("left", json!([AGENT]));
        deploy.execute(&format!("UPDATE internal_agents SET cert_pem = '{leaf}' WHERE agent_id = '{AGENT}'"));
        // What the plan does not touch does not move it.
        deploy
            .execute("UPDATE internal_agents SET display_name = 'renamed' WHERE enrollment_method = 'byoca'");
        assert_eq!(digest(&server), seen);
        let unknown = change(&server, "apply", &"00".repeat(32));
        assert_eq!((unknown.status, &unknown.detail()["differences"]["known"]), (409, &json!(false)));
        let body = json!({ "confirm": true, "plan_digest": 7 });
        assert_eq!(server.post(&format!("/proxy/updates/{MIGRATION}/apply"), &body).status, 400);
        assert_eq!(change(&server, "apply", &seen).status, 200);
        let applied = change(&server, "apply", &seen);
        assert_eq!((applied.status, applied.detail()), (409, json!("already applied")));
    }
}

#[test]
fn a_run_is_held_to_its_plan_after_it_was_compared() {
    let deploy = Deploy::of(MIXED);
    let server = deploy.start();
    let seen = digest(&server);
    let before = PkiState::read(&deploy);
    // The state moves in the very transaction that begins the run.
    deploy.execute(&format!(
        "CREATE TRIGGER moves AFTER INSERT ON update_runs BEGIN UPDATE internal_agents SET cert_pem = \
         (SELECT cert_pem FROM internal_agents WHERE agent_id > '{AGENT}' AND enrollment_method <> 'byoca' ORDER BY agent_id LIMIT 1) \
         WHERE agent_id = '{AGENT}'; END"
    ));
    let answer = change(&server, "apply", &seen);
    assert_eq!((answer.status, &answer.detail()["reason"]), (409, &json!("plan_changed")), "{answer:?}");
    let after = PkiState::read(&deploy);
    assert_eq!((&after.org_ca, &after.mastio_ca), (&before.org_ca, &before.mastio_ca));
    let moved: Vec<_> = before.leaves.iter().filter(|(id, leaf)| after.leaves[*id] != **leaf).collect();
    assert_eq!(moved.len(), 1, "only what the trigger changed");
    // It was let in and failed: the row says so, with the next step, and signing stays halted.
    let item = server.item().unwrap();
    assert_eq!(item["status"], "failed");
    assert!(
        text(&item, "error").contains("plan again") && text(&item, "remedy").contains("nothing was changed")
    );
    assert!(server.halted());
    deploy.execute("DROP TRIGGER moves");
    let again = change(&server, "apply", &digest(&server));
    assert_eq!(again.status, 200, "{again:?} {:?}", server.item());
}

#[test]
fn a_rollback_plan_tells_what_comes_back_and_what_becomes_of_those_who_came_since() {
    for deploy in both(MIXED) {
        let server = deploy.start();
        let old = PkiState::read(&deploy);
        assert_eq!(server.get(&format!("/proxy/updates/{MIGRATION}/rollback-plan")).status, 404);
        assert_eq!(server.apply().status, 200);
        let empty = plan(&server, "rollback-plan");
        assert_eq!((&empty["leaves"], &empty["carry_back"]), (&json!(4), &json!(0)));
        let created = server.post("/v1/admin/agents", &json!({ "agent_name": "since", "capabilities": [] }));
        assert_eq!(created.status, 201, "{created:?}");

        let before = untouched(&deploy);
        let told = plan(&server, "rollback-plan");
        assert_ne!(told["plan_digest"], empty["plan_digest"]);
        assert_eq!(told["plan_digest"], plan(&server, "rollback-plan")["plan_digest"]);
        assert_eq!((&told["leaves"], &told["carry_back"]), (&json!(4), &json!(1)));
        assert_eq!((&told["org_ca"][0]["path_len"], &told["org_ca"][1]["path_len"]), (&json!(1), &json!(0)));
        assert_eq!(told["snapshot"]["committed"], true);
        let taken = deploy.rows("SELECT created_at FROM migration_state_backups");
        assert_eq!(told["snapshot"]["taken_at"], taken[0]["created_at"]);
        let full = server.get(&format!("/proxy/updates/{MIGRATION}/rollback-plan?full=true")).body;
        let lines: Vec<Value> = full.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let carried: Vec<_> = lines.iter().filter(|line| line["kind"] == "carried_back").collect();
        assert_eq!(carried.len(), 1);
        assert!(text(carried[0], "agent_id").ends_with("since"));
        assert_eq!(carried[0]["before"]["spki_sha256"], carried[0]["after"]["spki_sha256"]);
        assert_eq!(lines.iter().filter(|line| line["kind"] == "leaf").count(), 4);
        let dry = server.post(&format!("/proxy/updates/{MIGRATION}/rollback?dry_run=true"), &json!({}));
        assert_eq!((dry.status, &dry.json()["plan_digest"]), (200, &told["plan_digest"]));
        assert_eq!(untouched(&deploy), before);

        let refused = change_as_planned(&server, "rollback", &empty);
        assert_eq!(refused.status, 409, "{refused:?}");
        let since = text(carried[0], "agent_id");
        assert_eq!(refused.detail()["differences"]["entered"]["agents"], json!([since]));
        assert_eq!(change_as_planned(&server, "rollback", &told).status, 200);
        let after = PkiState::read(&deploy);
        assert_eq!((&after.org_ca, &after.mastio_ca), (&old.org_ca, &old.mastio_ca));
        for (agent, leaf) in &old.leaves {
            assert_eq!(after.leaves[agent], *leaf);
        }
        // What the plan showed of each restored leaf is what stands there.
        for line in lines.iter().filter(|line| line["kind"] == "leaf") {
            let leaf = certificate(&after.leaves[&text(line, "agent_id")]);
            assert_eq!(text(&line["after"], "serial"), leaf.serial_hex());
        }
        server.stop();
        deploy.audit_verifies();
    }
}

#[test]
fn the_rollback_of_a_torn_apply_is_planned_as_the_snapshot_in_the_file_says() {
    let deploy = Deploy::of("py_torn5");
    let server = deploy.start();
    let before = untouched(&deploy);
    let told = plan(&server, "rollback-plan");
    assert_eq!(told["org_ca"][1]["path_len"], 0, "{told}");
    let full = server.get(&format!("/proxy/updates/{MIGRATION}/rollback-plan?full=true")).body;
    assert_eq!(untouched(&deploy), before);
    assert_eq!(change_as_planned(&server, "rollback", &told).status, 200);
    let after = PkiState::read(&deploy);
    let lines = full.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let leaves: Vec<Value> = lines.filter(|line| line["kind"] == "leaf").collect();
    assert_eq!(leaves.len(), 5);
    for line in leaves {
        let leaf = certificate(&after.leaves[&text(&line, "agent_id")]);
        assert_eq!(text(&line["after"], "serial"), leaf.serial_hex());
    }
}

#[test]
fn the_rollback_of_an_attempt_that_never_committed_restores_nothing() {
    let deploy = Deploy::of(MIXED);
    let server = deploy.start_to_crash_at("apply.prepare");
    assert_eq!(server.apply().status, 0);
    server.dies();
    let server = deploy.start();
    let before = untouched(&deploy);
    let told = plan(&server, "rollback-plan");
    assert_eq!(told["snapshot"]["committed"], false, "{told}");
    assert_eq!((&told["leaves"], &told["carry_back"], &told["changes"]), (&json!(0), &json!(0), &json!([])));
    assert_eq!(told["org_ca"][0], told["org_ca"][1]);
    assert_eq!(untouched(&deploy), before);
    assert_eq!(change_as_planned(&server, "rollback", &told).status, 200);
    assert_eq!(PkiState::read(&deploy), before.0);
    assert_eq!(status(&deploy).as_deref(), Some("rolled_back"));
}

#[test]
fn a_rollback_is_refused_while_a_later_update_stands_on_this_one() {
    for deploy in both("chain5") {
        let server = deploy.start();
        assert_eq!(server.apply().status, 200);
        let repaired = PkiState::read(&deploy);
        let rollback = || {
            let dry = server.post(&format!("/proxy/updates/{MIGRATION}/rollback?dry_run=true"), &json!({}));
            let answer = server.rollback();
            assert_eq!((dry.status, dry.detail()), (answer.status, answer.detail()));
            answer
        };
        let row = |id: &str, requires: &str| {
            deploy.execute(&format!(
                "INSERT INTO pending_updates (migration_id, detected_at, status, criticality, affects_enrollments, requires) \
                 VALUES ('{id}', '2026-09-01T00:00:00Z', 'applied', 'warning', '[\"connector\"]', '{requires}')"
            ))
        };
        // One that requires it.
        row("2026-09-01-later", &format!("[\"{MIGRATION}\"]"));
        let refused = rollback();
        assert_eq!(refused.status, 409, "{refused:?}");
        assert_eq!(refused.detail()["blocker"], "2026-09-01-later");
        deploy.execute("DELETE FROM pending_updates WHERE migration_id = '2026-09-01-later'");
        // One that has written what it wrote.
        row("2026-09-02-writer", "[]");
        deploy.execute(
            "INSERT INTO update_runs (run_id, migration_id, direction, phase, actor, started_at, updated_at, replica, \
             committed_at, verified_at, finished_at) SELECT 'Z' || run_id, '2026-09-02-writer', 'apply', 'activate', actor, \
             started_at, updated_at, replica, committed_at, verified_at, finished_at FROM update_runs \
             WHERE direction = 'apply'",
        );
        deploy.execute(
            "INSERT INTO update_images (run_id, table_name, row_key, column_name, before_digest, changes) \
             SELECT 'Z' || run_id, table_name, row_key, column_name, before_digest, 1 FROM update_images \
             WHERE table_name = 'internal_agents' LIMIT 1",
        );
        let refused = rollback();
        assert_eq!((refused.status, &refused.detail()["blocker"]), (409, &json!("2026-09-02-writer")));
        assert_eq!(PkiState::read(&deploy), repaired);
        deploy.execute(
            "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '2026-09-02-writer'",
        );
        assert_eq!(server.rollback().status, 200);
    }
}

#[test]
fn apply_all_goes_in_order_and_stops_at_the_first_failure() {
    for stopped in [true, false] {
        let deploy = reshaped("chain5", &["--complete-leaves"]);
        deploy.start().stop();
        // Earlier by its id, it halts nothing; and this version cannot apply it.
        deploy.execute(
            "INSERT INTO pending_updates (migration_id, detected_at, status, criticality, affects_enrollments, requires) \
             VALUES ('2026-01-01-unknown', '2026-01-01T00:00:00Z', 'pending', 'warning', '[\"connector\"]', '[]')",
        );
        let server = (!stopped).then(|| deploy.start());
        let output = run(&mut deploy.mastio(&["updates", "apply", "--all", "--yes", "--json"]));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let done: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(done.as_array().unwrap().len(), 1, "{done}");
        assert_eq!((&done[0]["migration_id"], &done[0]["status"]), (&json!(MIGRATION), &json!("applied")));
        assert!(String::from_utf8_lossy(&output.stderr).contains("2026-01-01-unknown"));
        assert_eq!(status(&deploy).as_deref(), Some("applied"));
        deploy.execute("DELETE FROM pending_updates WHERE migration_id = '2026-01-01-unknown'");
        let output = run(&mut deploy.mastio(&["updates", "apply", "--all", "--yes", "--json"]));
        assert_eq!((output.status.code(), output.stdout.trim_ascii()), (Some(0), b"[]".as_slice()));
        drop(server);
    }
}

#[test]
fn a_failed_row_shows_its_error_and_what_to_do() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    deploy.execute("UPDATE pending_updates SET status = 'failed', error = 'disk full'");
    let item = server.item().unwrap();
    assert_eq!((&item["error"], &item["halts"]), (&json!("disk full"), &json!(true)));
    assert!(text(&item, "remedy").contains(&format!("mastio updates apply {MIGRATION}")));
    let told = run(&mut deploy.mastio(&["updates", "list"]));
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("error: disk full") && told.contains("next step: nothing was changed"), "{told}");
}
