//! Operators from outside: secrets of their own, roles on every route, names in the audit log.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::process::Output;

use harness::{ADMIN_SECRET, Answer, Database, Deploy, MIGRATION, PASSPHRASE};
use mastio::http::authn::Role;
use mastio::operators::access::{Access, TABLE};
use serde_json::{Value, json};

/// `X-Admin-Secret` of an operator with a name.
fn header(credential: &str) -> String {
    format!("X-Admin-Secret: {credential}")
}

fn get(deploy: &Deploy, path: &str, credential: &str) -> Answer {
    deploy.curl(path, &["-H", &header(credential)])
}

fn post(deploy: &Deploy, path: &str, credential: &str, body: &Value) -> Answer {
    let body = body.to_string();
    let json = "Content-Type: application/json";
    deploy.curl(path, &["-H", &header(credential), "-H", json, "-X", "POST", "-d", &body])
}

/// Adds an operator over the API and gives `NAME:SECRET`.
fn add(deploy: &Deploy, name: &str, role: &str) -> String {
    let added = deploy.admin_post("/v1/admin/operators", &json!({ "name": name, "role": role })).expect(201);
    assert_eq!((added["name"].as_str(), added["role"].as_str()), (Some(name), Some(role)));
    format!("{name}:{}", added["secret"].as_str().unwrap())
}

fn actors(deploy: &Deploy, event_type: &str) -> Vec<String> {
    let events = deploy.admin_get(&format!("/v1/admin/audit?event_type={event_type}")).expect(200);
    events.as_array().unwrap().iter().map(|event| event["actor"].as_str().unwrap().to_owned()).collect()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_operator_s_life_on_sqlite() {
    an_operator_s_life(Database::Sqlite);
}

#[test]
fn an_operator_s_life_on_postgres() {
    an_operator_s_life(Database::Postgres);
}

fn an_operator_s_life(database: Database) {
    let mut deploy = Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE);
    deploy.start();
    add(&deploy, "zoe", "viewer");
    deploy.stop();
    // A deploy that moves takes its operators along.
    let mut deploy = deploy.on(database);
    // On a stopped deploy the command line adds one; the secret is shown once, and stored only as a hash.
    let added = stdout(&deploy.mastio(&["admin", "add", "alice", "--role", "admin", "--json"]));
    let added: Value = serde_json::from_str(&added).unwrap();
    let secret = added["secret"].as_str().unwrap().to_owned();
    let alice = format!("alice:{secret}");
    assert_eq!(added["header"], format!("X-Admin-Secret: {alice}"));
    let stored = deploy.sql("SELECT credential FROM operators WHERE name = 'alice'");
    assert!(stored.starts_with("$argon2id$v=19$") && !stored.contains(&secret), "{stored}");

    deploy.start();
    let list = get(&deploy, "/v1/admin/operators", &alice).expect(200);
    assert_eq!(list[0]["name"], "admin");
    assert_eq!(list[0]["shared_secret"], true);
    assert_eq!(list[1]["name"], "alice");
    assert_eq!(list[1]["created_by"], "command-line");
    assert!(list[1].get("credential").is_none() && list[1].get("secret").is_none(), "{list}");
    let seen = get(&deploy, "/v1/admin/operators", &alice).expect(200)[1]["last_seen_at"].clone();
    assert!(seen.is_string(), "{seen}");

    // What she does bears her name; what the shared secret does goes on bearing `admin`.
    let bob = post(&deploy, "/v1/admin/operators", &alice, &json!({ "name": "bob" })).expect(201);
    assert_eq!(bob["role"], "operator");
    let carol = add(&deploy, "carol", "viewer");
    assert_eq!(actors(&deploy, "admin.operator_added"), ["admin", "alice", "command-line", "admin"]);
    assert_eq!(get(&deploy, "/proxy/updates/api", &carol).status, 200);
    // The command line on a running server speaks for whoever's credential is set.
    let speaking = ["--operator-credential", &alice];
    let listed = stdout(&deploy.mastio(&[&["admin", "list", "--json"][..], &speaking].concat()));
    assert_eq!(serde_json::from_str::<Value>(&listed).unwrap().as_array().unwrap().len(), 5);

    // Another role counts from the next request on.
    let role = |name: &str, role: &str| {
        let body = json!({ "role": role }).to_string();
        let json = "Content-Type: application/json";
        let path = format!("/v1/admin/operators/{name}");
        deploy.curl(&path, &["-H", &header(&alice), "-H", json, "-X", "PATCH", "-d", &body])
    };
    assert_eq!(get(&deploy, "/v1/admin/operators", &carol).status, 403);
    assert_eq!(role("carol", "admin").expect(200)["role"], "admin");
    assert_eq!(get(&deploy, "/v1/admin/operators", &carol).status, 200);
    let by_alice = ["--operator-credential", &alice];
    stdout(&deploy.mastio(&[&["admin", "set-role", "carol", "viewer"][..], &by_alice].concat()));
    assert_eq!(get(&deploy, "/v1/admin/operators", &carol).status, 403);
    assert_eq!((role("carol", "emperor").status, role("nobody", "viewer").status), (400, 404));
    assert_eq!(role("admin", "viewer").expect(409)["detail"]["reason"], "shared_secret");
    assert_eq!(actors(&deploy, "admin.operator_role_changed"), ["alice", "alice"]);

    // Names are given once.
    assert_eq!(
        deploy.admin_post("/v1/admin/operators", &json!({ "name": "bob" })).expect(409)["detail"]["reason"],
        "operator_exists"
    );
    for (body, status) in [
        (json!({ "name": "admin" }), 400),
        (json!({ "name": "a:b" }), 400),
        (json!({ "name": "dora", "role": "emperor" }), 400),
        (json!({}), 422),
    ] {
        assert_eq!(deploy.admin_post("/v1/admin/operators", &body).status, status, "{body}");
    }

    // Another secret ends the former one at once, remembered or not.
    assert_eq!(get(&deploy, "/proxy/updates/api", &carol).status, 200);
    let path = "/v1/admin/operators/carol/reset-password";
    let reset = post(&deploy, path, &alice, &json!({})).expect(200);
    assert_eq!(get(&deploy, "/proxy/updates/api", &carol).status, 403);
    let carol = format!("carol:{}", reset["secret"].as_str().unwrap());
    assert_eq!(get(&deploy, "/proxy/updates/api", &carol).status, 200);

    // So does a deactivation, which is for good, and cannot touch the shared secret.
    let delete = |name: &str| {
        let path = format!("/v1/admin/operators/{name}");
        deploy.curl(&path, &["-H", &header(&alice), "-X", "DELETE"])
    };
    assert_eq!(delete("carol").status, 204);
    assert_eq!(get(&deploy, "/proxy/updates/api", &carol).status, 403);
    assert_eq!(delete("carol").expect(409)["detail"]["reason"], "operator_deactivated");
    assert_eq!(delete("nobody").status, 404);
    assert_eq!(delete("admin").expect(409)["detail"]["reason"], "shared_secret");
    let path = "/v1/admin/operators/admin/reset-password";
    assert_eq!(post(&deploy, path, &alice, &json!({})).status, 409);
    assert_eq!(deploy.admin_post("/v1/admin/operators", &json!({ "name": "carol" })).status, 409);
    assert_eq!(actors(&deploy, "admin.operator_deactivated"), ["alice"]);
    assert_eq!(actors(&deploy, "admin.operator_secret_reset"), ["alice"]);
    assert_eq!(deploy.admin_get("/proxy/updates/api").status, 200);
    assert!(!deploy.log_text().contains(&secret), "a secret is in the log");
    let audit = deploy.admin_get("/v1/admin/audit").body;
    assert!(!audit.contains(&secret), "a secret is in the audit log");
}

/// Every line of the table with every role: refused below the role it asks for, let in from there on.
#[test]
fn every_admin_route_asks_for_its_role() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let credentials =
        Role::ALL.map(|role| (role, add(&deploy, &format!("a-{}", role.as_str()), role.as_str())));
    for (method, route, access) in TABLE {
        let Access::Api(required) = access else { continue };
        // What a path names does not exist, and bodies are empty: whoever is let in is told that instead.
        let path: String = route
            .split('/')
            .map(|segment| if segment.starts_with('{') { "no-such-thing" } else { segment })
            .collect::<Vec<_>>()
            .join("/");
        let ask = |arguments: &[&str]| {
            let mut all = vec!["-X", *method, "--max-time", "5"];
            all.extend(arguments);
            deploy.curl(&path, &all)
        };
        assert_eq!(ask(&[]).status, 401, "{method} {route} without a secret");
        assert_eq!(ask(&["-H", "X-Admin-Secret: wrong"]).status, 403, "{method} {route}");
        for (role, credential) in &credentials {
            let answer = ask(&["-H", &header(credential)]);
            if role < required {
                assert_eq!(answer.status, 403, "{method} {route} as {}", role.as_str());
                assert_eq!(answer.detail()["reason"], "role_insufficient", "{method} {route}");
            } else {
                assert!(!matches!(answer.status, 401 | 403 | 405), "{method} {route}: {answer:?}");
            }
        }
    }
    assert_eq!(deploy.curl("/proxy/updates/api", &["-X", "DELETE", "-H", &header(ADMIN_SECRET)]).status, 405);
}

/// The same for pages: with a session of each role, and the token that our forms carry.
#[test]
fn every_page_asks_for_its_role() {
    let mut deploy = Deploy::empty();
    deploy.start();
    for role in Role::ALL {
        let credential = add(&deploy, &format!("p-{}", role.as_str()), role.as_str());
        let (name, secret) = credential.split_once(':').unwrap();
        let jar = deploy.folder().join(format!("{name}.jar"));
        let jar = jar.to_str().unwrap();
        let ask = |path: &str, arguments: &[&str]| {
            let mut all = vec!["-b", jar, "-c", jar, "--max-time", "5"];
            all.extend(arguments);
            deploy.curl(path, &all)
        };
        let fields = [format!("name={name}"), format!("secret={secret}")];
        assert_eq!(ask("/proxy/login", &["-d", &fields[0], "-d", &fields[1]]).status, 303);
        let page = ask("/proxy", &[]).body;
        let (_, token) = page.split_once("name=\"csrf_token\" value=\"").unwrap();
        let token = format!("csrf_token={}", token.split('"').next().unwrap());
        // The way out comes last, and what follows for ever is another test's.
        let skipped = ["/proxy/logout", "/proxy/audit/stream"];
        for (method, route, access) in TABLE.iter().filter(|(_, route, _)| !skipped.contains(route)) {
            let Access::Page(required) = access else { continue };
            let segments = route
                .split('/')
                .map(|segment| if segment.starts_with('{') { "no-such-thing" } else { segment });
            let path: String = segments.collect::<Vec<_>>().join("/");
            let answer = match *method {
                "POST" => ask(&path, &["-d", &token]),
                _ => ask(&path, &[]),
            };
            let refused = answer.status == 403
                && answer.body.contains(&format!("this needs the role {}", required.as_str()));
            assert_eq!(refused, role < *required, "{method} {route} as {}: {answer:?}", role.as_str());
            assert!(!matches!(answer.status, 303 | 401) || *method == "POST", "{method} {route}: {answer:?}");
        }
        assert_eq!(ask("/proxy/logout", &["-d", &token]).status, 303);
    }
}

#[test]
fn nobody_learns_which_name_exists_and_guesses_wait() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let alice = add(&deploy, "alice", "viewer");
    assert_eq!(get(&deploy, "/proxy/updates/api", &alice).status, 200);
    let wrong = get(&deploy, "/proxy/updates/api", "alice:wrong");
    let unknown = get(&deploy, "/proxy/updates/api", "nobody:wrong");
    assert_eq!((wrong.status, &wrong.body), (403, &unknown.body));
    let mut refused = (0..10).map(|_| get(&deploy, "/proxy/updates/api", "alice:wrong"));
    let limited = refused.find(|answer| answer.status == 429).expect("a wait");
    assert!(limited.body.contains("too many wrong tries"), "{limited:?}");
    // What was right a minute ago and the shared secret go on.
    assert_eq!(get(&deploy, "/proxy/updates/api", &alice).status, 200);
    assert_eq!(deploy.admin_get("/proxy/updates/api").status, 200);
    assert_eq!(get(&deploy, "/proxy/updates/api", &format!("admin:{ADMIN_SECRET}")).status, 200);
    let twice = [header(&alice), header(ADMIN_SECRET)];
    assert_eq!(deploy.curl("/proxy/updates/api", &["-H", &twice[0], "-H", &twice[1]]).status, 401);
}

#[test]
fn a_session_has_the_role_of_its_operator_and_ends_with_them() {
    let Some(mut deploy) = Deploy::legacy("py_connector5_pending") else { return };
    deploy.start();
    let credential = add(&deploy, "vera", "viewer");
    let (_, secret) = credential.split_once(':').unwrap();
    let jar = deploy.folder().join("vera.jar");
    let jar = jar.to_str().unwrap();
    let ask = |path: &str, arguments: &[&str]| {
        let mut all = vec!["-b", jar, "-c", jar];
        all.extend(arguments);
        deploy.curl(path, &all)
    };
    let form = |name: &str, secret: &str| {
        let (name, secret) = (format!("name={name}"), format!("secret={secret}"));
        ask("/proxy/login", &["--data-urlencode", &name, "--data-urlencode", &secret])
    };
    assert_eq!(form("", secret).status, 403, "her secret is not the shared one");
    let foreign = ["-H", "Sec-Fetch-Site: cross-site", "-d", "name=vera", "-d", "secret=x"];
    assert_eq!(ask("/proxy/login", &foreign).status, 403);
    assert_eq!(form("vera", secret).status, 303);
    let page = ask("/proxy", &[]);
    assert_eq!(page.status, 200);
    let (_, token) = page.body.split_once("name=\"csrf_token\" value=\"").unwrap();
    let token = token.split('"').next().unwrap();
    // She reads, by page and by API, and changes nothing by either.
    assert_eq!(ask(&format!("/proxy/updates/{MIGRATION}/apply-review"), &[]).status, 200);
    assert_eq!(ask("/proxy/updates/api", &[]).status, 200);
    let field = format!("csrf_token={token}");
    let path = format!("/proxy/updates/{MIGRATION}/apply-review");
    let refused = ask(&path, &["-d", &field, "-d", "confirm=yes"]);
    assert_eq!(refused.status, 403);
    assert!(refused.body.contains("this needs the role operator, and vera has viewer"), "{}", refused.body);
    let csrf = format!("X-CSRF-Token: {token}");
    let path = format!("/proxy/updates/{MIGRATION}/apply");
    let refused = ask(&path, &["-H", &csrf, "-d", "{\"confirm\": true}"]);
    assert_eq!((refused.status, refused.detail()["reason"].as_str()), (403, Some("role_insufficient")));
    assert_eq!(deploy.admin_get("/proxy/updates/api").expect(200)[0]["status"], "pending");
    assert_eq!(actors(&deploy, "dashboard.login"), ["vera"]);
    assert_eq!(actors(&deploy, "dashboard.login_failed"), ["unknown"]);

    deploy.curl("/v1/admin/operators/vera", &["-H", &header(ADMIN_SECRET), "-X", "DELETE"]);
    assert_eq!(ask("/proxy", &[]).status, 303);
    assert_eq!(ask("/proxy/updates/api", &[]).status, 401);
}

#[test]
fn an_apply_bears_the_name_of_its_operator() {
    let Some(mut deploy) = Deploy::legacy("py_connector5_pending") else { return };
    deploy.start();
    let oscar = add(&deploy, "oscar", "operator");
    let path = format!("/proxy/updates/{MIGRATION}/apply");
    post(&deploy, &path, &oscar, &json!({ "confirm": true })).expect(200);
    assert_eq!(actors(&deploy, "admin.update_applied"), ["oscar"]);
    // On a stopped deploy too.
    deploy.stop();
    let output = deploy.mastio(&["updates", "rollback", MIGRATION, "--yes", "--operator-credential", &oscar]);
    stdout(&output);
    let output =
        deploy.mastio(&["updates", "apply", MIGRATION, "--yes", "--operator-credential", "oscar:wrong"]);
    assert!(!output.status.success());
    deploy.start();
    assert_eq!(actors(&deploy, "admin.update_rolled_back"), ["oscar"]);
}

/// A deploy on which two operators stand behind a run: bob and alice may, vera may not.
fn guarded(database: Database) -> Option<(Deploy, [String; 3])> {
    let deploy = Deploy::legacy("py_connector5_pending")?.on(database);
    let mut deploy = deploy.set("MCP_PROXY_UPDATE_APPROVALS", "2");
    deploy.start();
    let operators = [("bob", "operator"), ("alice", "admin"), ("vera", "viewer")];
    let operators = operators.map(|(name, role)| add(&deploy, name, role));
    Some((deploy, operators))
}

fn digest(deploy: &Deploy, plan: &str) -> String {
    let plan = deploy.admin_get(&format!("/proxy/updates/{MIGRATION}/{plan}")).expect(200);
    plan["plan_digest"].as_str().unwrap().to_owned()
}

fn reason(answer: &Answer) -> String {
    assert_eq!(answer.status, 409, "{answer:?}");
    answer.detail()["reason"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn two_operators_stand_behind_an_apply_and_a_rollback_on_sqlite() {
    two_operators_stand_behind_a_run(Database::Sqlite);
}

#[test]
fn two_operators_stand_behind_an_apply_and_a_rollback_on_postgres() {
    two_operators_stand_behind_a_run(Database::Postgres);
}

fn two_operators_stand_behind_a_run(database: Database) {
    let Some((mut deploy, [bob, alice, vera])) = guarded(database) else { return };
    let path = |action: &str| format!("/proxy/updates/{MIGRATION}/{action}");
    let yes = json!({ "confirm": true });
    let refused = post(&deploy, &path("apply"), &bob, &yes);
    assert_eq!(reason(&refused), "approval_required");
    let next = format!("mastio updates propose {MIGRATION}");
    assert!(refused.detail()["message"].as_str().unwrap().ends_with(&next), "{refused:?}");
    let plan = digest(&deploy, "plan");
    let with_plan = json!({ "confirm": true, "plan_digest": plan });
    assert_eq!(reason(&post(&deploy, &path("apply"), &bob, &with_plan)), "approval_required");

    // Bob proposes; neither he nor a viewer approves; proposing it again is the same proposal.
    let body = json!({ "plan_digest": plan });
    let proposal = post(&deploy, &path("proposals"), &bob, &body).expect(201);
    assert_eq!(
        (proposal["status"].as_str(), proposal["direction"].as_str()),
        (Some("proposed"), Some("apply"))
    );
    let again = post(&deploy, &path("proposals"), &bob, &body).expect(201);
    assert_eq!(again["proposal_id"], proposal["proposal_id"]);
    assert_eq!(reason(&post(&deploy, &path("proposals"), &alice, &body)), "already_proposed");
    let approve = path(&format!("proposals/{}/approve", proposal["proposal_id"].as_str().unwrap()));
    assert_eq!(reason(&post(&deploy, &approve, &bob, &json!({}))), "same_person");
    assert_eq!(post(&deploy, &approve, &vera, &json!({})).status, 403);
    let waiting = post(&deploy, &path("apply"), &bob, &yes);
    assert_eq!(
        (reason(&waiting), waiting.detail()["proposed_by"].as_str()),
        ("approval_required".to_owned(), Some("bob"))
    );
    assert_eq!(post(&deploy, &path("proposals/no-such/approve"), &alice, &json!({})).status, 404);

    // Alice approves, once; then the plan is run, once.
    assert_eq!(post(&deploy, &approve, &alice, &json!({})).expect(200)["status"], "approved");
    assert_eq!(reason(&post(&deploy, &approve, &alice, &json!({}))), "proposal_closed");
    post(&deploy, &path("apply"), &bob, &yes).expect(200);
    let applied = deploy.admin_get("/v1/admin/audit?event_type=admin.update_applied").expect(200);
    assert_eq!(applied[0]["actor"], "bob");
    let details = &applied[0]["details"];
    assert_eq!(
        (details["proposed_by"].as_str(), details["approved_by"].as_str()),
        (Some("bob"), Some("alice"))
    );
    assert_eq!(actors(&deploy, "admin.update_proposed"), ["bob"]);
    assert_eq!(actors(&deploy, "admin.update_approved"), ["alice"]);

    // The rollback needs its own, and the command line obeys on a stopped deploy too.
    assert_eq!(reason(&post(&deploy, &path("rollback"), &bob, &yes)), "approval_required");
    let propose = ["updates", "propose", MIGRATION, "--rollback", "--yes", "--operator-credential", &alice];
    stdout(&deploy.mastio(&propose));
    deploy.stop();
    let rollback = ["updates", "rollback", MIGRATION, "--yes"];
    let refused = deploy.mastio(&rollback);
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
    let approve = ["updates", "approve", MIGRATION, "--rollback", "--yes"];
    let by_alice = deploy.mastio(&[&approve[..], &["--operator-credential", &alice]].concat());
    assert_eq!(by_alice.status.code(), Some(3), "{}", String::from_utf8_lossy(&by_alice.stderr));
    stdout(&deploy.mastio(&[&approve[..], &["--operator-credential", &bob]].concat()));
    stdout(&deploy.mastio(&rollback));
    deploy.start();
    let rolled_back = deploy.admin_get("/v1/admin/audit?event_type=admin.update_rolled_back").expect(200);
    let details = &rolled_back[0]["details"];
    assert_eq!(
        (details["proposed_by"].as_str(), details["approved_by"].as_str()),
        (Some("alice"), Some("bob"))
    );
    let listed = deploy.admin_get(&path("proposals")).expect(200);
    let states: Vec<_> =
        listed.as_array().unwrap().iter().map(|one| one["status"].as_str().unwrap()).collect();
    assert_eq!(states, ["used", "used"]);
    // What was used up does not count twice.
    assert_eq!(reason(&post(&deploy, &path("apply"), &bob, &yes)), "approval_required");
}

#[test]
fn a_proposal_is_void_when_the_state_has_moved_or_its_time_is_over() {
    let Some((deploy, [bob, alice, _])) = guarded(Database::Sqlite) else { return };
    let path = |action: &str| format!("/proxy/updates/{MIGRATION}/{action}");
    let propose = |by: &str| {
        let body = json!({ "plan_digest": digest(&deploy, "plan") });
        let proposal = post(&deploy, &path("proposals"), by, &body).expect(201);
        path(&format!("proposals/{}/approve", proposal["proposal_id"].as_str().unwrap()))
    };
    let stale = json!({ "plan_digest": "00".repeat(32) });
    assert_eq!(reason(&post(&deploy, &path("proposals"), &bob, &stale)), "plan_changed");

    // The state moves before the approval.
    let approve = propose(&bob);
    deploy.sql("DELETE FROM internal_agents WHERE agent_id LIKE '%::agent-0001'");
    let moved = post(&deploy, &approve, &alice, &json!({}));
    assert_eq!(reason(&moved), "plan_changed");
    assert_eq!(moved.detail()["differences"]["left"]["count"], 1, "{moved:?}");
    assert_eq!(reason(&post(&deploy, &approve, &alice, &json!({}))), "proposal_closed");
    assert_eq!(actors(&deploy, "admin.update_proposal_void"), ["alice"]);

    // It moves after the approval, and before the run.
    let approve = propose(&bob);
    post(&deploy, &approve, &alice, &json!({})).expect(200);
    deploy.sql("DELETE FROM internal_agents WHERE agent_id LIKE '%::agent-0002'");
    let moved = post(&deploy, &path("apply"), &bob, &json!({ "confirm": true }));
    assert_eq!(reason(&moved), "plan_changed");

    // Its time is over.
    let approve = propose(&alice);
    deploy.sql("UPDATE update_proposals SET expires_at = 1 WHERE void IS NULL AND run_id IS NULL");
    assert_eq!(reason(&post(&deploy, &approve, &bob, &json!({}))), "proposal_closed");
    let refused = post(&deploy, &path("apply"), &bob, &json!({ "confirm": true }));
    assert_eq!(
        (reason(&refused), refused.detail()["proposed_by"].clone()),
        ("approval_required".to_owned(), Value::Null)
    );

    // The shared secret and a command without a credential are one person.
    let approve = propose(ADMIN_SECRET);
    deploy.sql(
        "UPDATE update_proposals SET proposed_by = 'command-line' WHERE void IS NULL AND run_id IS NULL",
    );
    assert_eq!(reason(&deploy.admin_post(approve.as_str(), &json!({}))), "same_person");
    post(&deploy, &approve, &bob, &json!({})).expect(200);
    post(&deploy, &path("apply"), &bob, &json!({ "confirm": true })).expect(200);
}

#[test]
fn a_proposal_ends_with_the_operator_who_made_or_approved_it() {
    let Some((deploy, [bob, alice, _])) = guarded(Database::Sqlite) else { return };
    let path = |action: &str| format!("/proxy/updates/{MIGRATION}/{action}");
    let yes = json!({ "confirm": true });
    let propose = |by: &str| {
        let body = json!({ "plan_digest": digest(&deploy, "plan") });
        let proposal = post(&deploy, &path("proposals"), by, &body).expect(201);
        path(&format!("proposals/{}/approve", proposal["proposal_id"].as_str().unwrap()))
    };
    let leave = |name: &str| {
        let path = format!("/v1/admin/operators/{name}");
        let answer = deploy.curl(&path, &["-X", "DELETE", "-H", &format!("X-Admin-Secret: {ADMIN_SECRET}")]);
        assert_eq!(answer.status, 204, "{answer:?}");
    };
    let states = || -> Vec<String> {
        let listed = deploy.admin_get(&path("proposals")).expect(200);
        listed.as_array().unwrap().iter().map(|one| one["status"].as_str().unwrap().to_owned()).collect()
    };
    // Approved by Bob, who leaves before it is run.
    let approve = propose(&alice);
    post(&deploy, &approve, &bob, &json!({})).expect(200);
    leave("bob");
    assert_eq!(states(), ["operator_gone"]);
    assert_eq!(reason(&post(&deploy, &path("apply"), &alice, &yes)), "approval_required");
    // Proposed by Alice, who leaves before it is approved.
    let approve = propose(&alice);
    leave("alice");
    assert_eq!(states(), ["operator_gone", "operator_gone"]);
    assert_eq!(reason(&deploy.admin_post(&approve, &json!({}))), "proposal_closed");
    let void = deploy.admin_get("/v1/admin/audit?event_type=admin.update_proposal_void").expect(200);
    let gone: Vec<_> =
        void.as_array().unwrap().iter().map(|event| event["details"]["operator_gone"].clone()).collect();
    assert_eq!(gone, ["alice", "bob"]);
    // The others go on: what is proposed anew is approved and run.
    let carol = add(&deploy, "carol", "admin");
    let approve = propose(&carol);
    deploy.admin_post(&approve, &json!({})).expect(200);
    post(&deploy, &path("apply"), &carol, &yes).expect(200);
}

// ---------------------------------------------------------------- the set-up of a new organisation

/// The token that the newest start has printed.
fn setup_token(deploy: &Deploy) -> String {
    let line = deploy.wait_for_log("the set-up", |line| line["message"] == "setup_open");
    assert!(line["url"].as_str().unwrap().ends_with("/proxy/setup"), "{line}");
    line["token"].as_str().unwrap().to_owned()
}

fn set_up(deploy: &Deploy, token: &str, organisation: &str, name: &str) -> Answer {
    let fields = [("token", token), ("organisation", organisation), ("name", name)];
    let fields = fields.map(|(field, value)| format!("{field}={value}"));
    let arguments: Vec<&str> = fields.iter().flat_map(|field| ["--data-urlencode", field.as_str()]).collect();
    deploy.curl("/proxy/setup", &arguments)
}

#[test]
fn a_new_organisation_is_set_up_once_by_whoever_reads_its_log() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let first = setup_token(&deploy);
    assert!(deploy.get("/proxy/login").body.contains("href=\"/proxy/setup\""));
    let page = deploy.get("/proxy/setup");
    assert_eq!(page.status, 200, "{}", page.body);
    let created = deploy.admin_get("/v1/admin/audit?event_type=deploy.created").expect(200);
    let fingerprint = created[0]["details"]["org_ca_fingerprint"].as_str().unwrap();
    assert!(page.body.contains(fingerprint), "{}", page.body);

    // Another start makes another token; what the database holds is none.
    deploy.restart();
    let token = setup_token(&deploy);
    assert_ne!(token, first);
    assert_ne!(deploy.sql("SELECT value FROM deploy_state WHERE key = 'setup'"), token);
    for wrong in [first.as_str(), "", "x"] {
        assert_eq!(set_up(&deploy, wrong, "Acme", "alice").status, 403, "{wrong}");
    }
    for (organisation, name) in [("", "alice"), ("Acme", "Alice"), ("Acme", "admin"), ("Acme", "setup")] {
        let refused = set_up(&deploy, &token, organisation, name);
        assert_eq!(refused.status, 400, "{organisation} {name}: {}", refused.body);
    }
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM operators"), "0");

    let done = set_up(&deploy, &token, "Acme <b>Tools</b>", "alice");
    assert_eq!(done.status, 200, "{}", done.body);
    assert!(done.body.contains(fingerprint) && !done.body.contains("<b>"), "{}", done.body);
    let (_, rest) = done.body.split_once("data-copy=\"").unwrap();
    let credential = format!("X-Admin-Secret: alice:{}", rest.split('"').next().unwrap());
    assert_eq!(deploy.curl("/v1/admin/operators", &["-H", &credential]).status, 200);
    let event = &deploy.admin_get("/v1/admin/audit?event_type=deploy.set_up").expect(200)[0];
    assert_eq!(
        (&event["actor"], &event["details"]["organisation"]),
        (&json!("alice"), &json!("Acme <b>Tools</b>"))
    );

    // Once, also after a start.
    assert_eq!(set_up(&deploy, &token, "Acme", "mallory").status, 404);
    assert_eq!(deploy.get("/proxy/setup").status, 404);
    deploy.restart();
    assert_eq!(deploy.get("/proxy/setup").status, 404);
    assert!(!deploy.get("/proxy/login").body.contains("/proxy/setup"));
    assert!(deploy.get("/proxy/login").body.contains("Acme &#60;b&#62;Tools"));
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn of_two_who_have_the_token_one_sets_up() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let token = setup_token(&deploy);
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..4)
            .map(|number| {
                let (deploy, token) = (&deploy, &token);
                scope.spawn(move || set_up(deploy, token, "Acme", &format!("operator-{number}")).status)
            })
            .collect();
        tries.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM operators"), "1");
}

#[test]
fn an_adopted_deploy_has_nothing_to_set_up() {
    let Some(mut deploy) = Deploy::legacy("py_connector5_pending") else { return };
    deploy.start();
    assert_eq!(deploy.get("/proxy/setup").status, 404);
    assert!(!deploy.log_text().contains("setup_open"));
}
