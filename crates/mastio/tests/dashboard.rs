//! The dashboard from outside: over HTTP by curl, and in a real Chromium.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::sdk::{Agent, Provider, Python, TOOL, Upstream};
use harness::{
    ADMIN_SECRET, Answer, Database, Deploy, MIGRATION, required_environment, run, shared, wait_for,
};
use serde_json::{Value, json};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
/// Every page, with what a path names filled in.
const PAGES: [&str; 22] = [
    "/proxy",
    "/proxy/updates",
    "/proxy/updates/2026-04-23-org-ca-pathlen-1",
    "/proxy/updates/2026-04-23-org-ca-pathlen-1/apply-review",
    "/proxy/updates/2026-04-23-org-ca-pathlen-1/rollback-review",
    "/proxy/agents",
    "/proxy/agents/acme::agent-0001",
    "/proxy/enrollments",
    "/proxy/enrollments?status=rejected",
    "/proxy/agents?only=inactive",
    "/proxy/agents?only=byoca",
    "/proxy/tools",
    "/proxy/policies",
    "/proxy/access?agent_id=agent-0001",
    "/proxy/pki",
    "/proxy/pki/overlap",
    "/proxy/mastio-key",
    "/proxy/audit",
    "/proxy/audit?subject=acme::agent-0001",
    "/proxy/audit/1",
    "/proxy/settings",
    "/proxy/operators",
];

/// An operator's browser as far as curl is one: a cookie jar.
struct Browser<'a> {
    deploy: &'a Deploy,
    jar: PathBuf,
}

impl<'a> Browser<'a> {
    fn new(deploy: &'a Deploy, name: &str) -> Self {
        Self { deploy, jar: deploy.folder().join(format!("{name}.jar")) }
    }

    fn ask(&self, path: &str, arguments: &[&str]) -> Answer {
        let jar = self.jar.to_str().unwrap();
        let mut all = vec!["-b", jar, "-c", jar];
        all.extend(arguments);
        self.deploy.curl(path, &all)
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(path, &[])
    }

    /// The headers of an answer to GET, in lower case.
    fn headers(&self, path: &str, arguments: &[&str]) -> String {
        let mut all = vec!["-D", "-", "-o", "/dev/null"];
        all.extend(arguments);
        self.ask(path, &all).body.to_ascii_lowercase()
    }

    fn sign_in(&self) -> String {
        let headers = self.headers("/proxy/login", &["--data-urlencode", &format!("secret={ADMIN_SECRET}")]);
        assert!(headers.starts_with("http/1.1 303"), "{headers}");
        headers
    }

    fn csrf_token(&self) -> String {
        let page = self.get("/proxy").body;
        let (_, rest) = page.split_once("name=\"csrf_token\" value=\"").expect("a token in the page");
        rest.split('"').next().unwrap().to_owned()
    }

    fn cookie(&self) -> String {
        let jar = fs::read_to_string(&self.jar).unwrap();
        let line = jar.lines().find(|line| line.contains("__Host-mastio-session")).expect("a cookie");
        line.split('\t').next_back().unwrap().to_owned()
    }
}

fn pending() -> Option<Deploy> {
    Deploy::legacy("py_connector5_pending")
}

fn location(headers: &str) -> &str {
    headers.lines().find_map(|line| line.strip_prefix("location: ")).expect("a location").trim()
}

#[test]
fn pages_lead_to_the_sign_in_and_the_api_answers_401() {
    let Some(mut deploy) = pending() else { return };
    deploy.start();
    let browser = Browser::new(&deploy, "a");
    for page in PAGES {
        let headers = browser.headers(page, &[]);
        assert!(headers.starts_with("http/1.1 303"), "{page}: {headers}");
        assert!(location(&headers).starts_with("/proxy/login?next=%2fproxy"), "{page}: {headers}");
        assert!(headers.contains(&POLICY.to_ascii_lowercase()), "{page}: {headers}");
    }
    assert_eq!(browser.get("/proxy/updates/api").status, 401);
    assert_eq!(browser.get("/v1/admin/agents").status, 401);
    for path in ["/proxy/no-such-page", "/proxy/assets/mastio.css", "/proxy/assets/..%2fmod.rs"] {
        assert_eq!(browser.get(path).status, 404, "{path}");
    }
    // A part of a page that a script fetches says where to go instead of bringing the sign-in with it.
    let path = format!("/proxy/updates/{MIGRATION}/run");
    let from = ["-H", "HX-Request: true", "-H", "HX-Current-URL: https://x/proxy/updates"];
    let headers = browser.headers(&path, &from);
    assert!(headers.starts_with("http/1.1 401"), "{headers}");
    assert!(headers.contains("hx-redirect: /proxy/login?next=%2fproxy%2fupdates\r"), "{headers}");
}

/// Every route that the source declares, whoever adds one.
#[test]
fn no_route_tells_or_changes_anything_without_a_session() {
    let Some(mut deploy) = pending() else { return };
    deploy.start();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dashboard/http.rs");
    let source = fs::read_to_string(source).unwrap();
    let routes: Vec<&str> =
        source.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(routes.len() > 12, "{routes:?}");
    let open = [
        "/proxy/login",
        "/proxy/login/sso",
        "/proxy/login/sso/callback",
        "/proxy/setup",
        "/proxy/assets/{name}",
    ];
    for route in routes.into_iter().filter(|route| !open.contains(route)) {
        let path = route.replace("{migration_id}", MIGRATION).replace("{agent_id}", "acme::agent-0001");
        let path = path.replace("{seq}", "1").replace("{session_id}", "no-such-request");
        let path = path.replace("{tool_id}", "no-such-tool").replace("{upstream_id}", "no-such-server");
        let path = path.replace("{name}", "nobody").replace("{fingerprint}", "00");
        assert!(!path.contains('{'), "{route}: say in this test what it names");
        for arguments in [&[][..], &["-d", "confirm=yes"]] {
            let answer = deploy.curl(&path, arguments);
            let untold = ["", r#"{"detail":"Method Not Allowed"}"#].contains(&answer.body.as_str());
            assert!(matches!(answer.status, 303 | 405) && untold, "{path} {arguments:?}: {answer:?}");
        }
    }
    assert_eq!(status(&deploy), "pending");
}

#[test]
fn a_session_begins_with_the_secret_and_ends_by_sign_out_time_or_another_secret() {
    let Some(deploy) = pending() else { return };
    let mut deploy = deploy;
    deploy.start();
    let browser = Browser::new(&deploy, "a");
    let wrong = browser.ask("/proxy/login", &["--data-urlencode", "secret=wrong"]);
    assert_eq!(wrong.status, 403);
    assert!(wrong.body.contains("this is not the admin secret"), "{}", wrong.body);
    let headers = browser.sign_in();
    let cookie = headers.lines().find(|line| line.starts_with("set-cookie: ")).expect("a cookie");
    for part in ["__host-mastio-session=", "path=/", "secure", "httponly", "samesite=lax"] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains("domain"), "{cookie}");
    for page in PAGES {
        let answer = browser.get(page);
        assert_eq!(answer.status, 200, "{page}: {}", answer.body);
        assert!(!answer.body.contains("style=") && !answer.body.contains("onclick"), "{page}");
        assert!(!answer.body.contains("<script>") && !answer.body.contains("http://"), "{page}");
    }

    assert!(!browser.get("/proxy/settings").body.contains(ADMIN_SECRET));

    // Whoever reads the database has no cookie: what is stored is not what the browser sends.
    let first = browser.cookie();
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM dashboard_sessions"), "1");
    assert_eq!(deploy.sql(&format!("SELECT COUNT(*) FROM dashboard_sessions WHERE id = '{first}'")), "0");

    // Signing in again makes another session and ends the one before.
    browser.sign_in();
    assert_ne!(browser.cookie(), first);
    let old = deploy.curl("/proxy", &["-H", &format!("Cookie: __Host-mastio-session={first}")]);
    assert_eq!(old.status, 303);

    // Idle, and too old.
    assert_eq!(browser.get("/proxy").status, 200);
    deploy.sql("UPDATE dashboard_sessions SET seen_at = seen_at - 1800");
    assert_eq!(browser.get("/proxy").status, 303);
    browser.sign_in();
    deploy.sql("UPDATE dashboard_sessions SET created_at = created_at - 43200");
    assert_eq!(browser.get("/proxy").status, 303);

    // Signed out.
    browser.sign_in();
    let token = browser.csrf_token();
    let kept = browser.cookie();
    let out = browser.ask("/proxy/logout", &["-d", &format!("csrf_token={token}")]);
    assert_eq!(out.status, 303);
    let old = deploy.curl("/proxy", &["-H", &format!("Cookie: __Host-mastio-session={kept}")]);
    assert_eq!(old.status, 303);
    let events = deploy.admin_get("/v1/admin/audit?limit=100").expect(200);
    let of =
        |name: &str| events.as_array().unwrap().iter().filter(|event| event["event_type"] == name).count();
    assert_eq!((of("dashboard.login"), of("dashboard.login_failed"), of("dashboard.logout")), (4, 1, 1));
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);

    // Another secret ends every session.
    browser.sign_in();
    let jar = browser.jar.clone();
    deploy.stop();
    let mut deploy = deploy.set("MCP_PROXY_ADMIN_SECRET", "another-secret-for-the-tests-0123456789");
    deploy.start();
    let browser = Browser { deploy: &deploy, jar };
    assert_eq!(browser.get("/proxy").status, 303);
}

#[test]
fn a_session_changes_something_only_with_its_own_token() {
    let Some(mut deploy) = pending() else { return };
    deploy.start();
    let (browser, other) = (Browser::new(&deploy, "a"), Browser::new(&deploy, "b"));
    browser.sign_in();
    other.sign_in();
    let (token, foreign) = (browser.csrf_token(), other.csrf_token());
    assert_ne!(token, foreign);
    let apply = format!("/proxy/updates/{MIGRATION}/apply-review");
    let rollback = format!("/proxy/updates/{MIGRATION}/rollback-review");
    for path in [apply.as_str(), rollback.as_str(), "/proxy/logout", "/proxy/audit"] {
        for fields in ["confirm=yes".to_owned(), format!("confirm=yes&csrf_token={foreign}")] {
            assert_eq!(browser.ask(path, &["-d", &fields]).status, 403, "{path} {fields}");
        }
        assert_eq!(deploy.curl(path, &["-d", "confirm=yes"]).status, 303, "{path} without a session");
    }
    // The token without the confirmation is not enough either.
    let unconfirmed = browser.ask(&apply, &["-d", &format!("csrf_token={token}")]);
    assert_eq!(unconfirmed.status, 400, "{}", unconfirmed.body);

    // The admin API takes the session too: to read by itself, to change with the token in a header.
    assert_eq!(browser.get("/proxy/updates/api").expect(200)[0]["status"], "pending");
    assert_eq!(browser.get("/v1/admin/agents").status, 200);
    let path = format!("/proxy/updates/{MIGRATION}/apply");
    for header in ["X-None: 1".to_owned(), format!("X-CSRF-Token: {foreign}")] {
        let answer = browser.ask(&path, &["-H", &header, "-d", r#"{"confirm": true}"#]);
        assert_eq!(answer.status, 403, "{header}: {}", answer.body);
    }
    assert_eq!(status(&deploy), "pending");
    let header = format!("X-CSRF-Token: {token}");
    let done = browser.ask(&path, &["-H", &header, "-d", r#"{"confirm": true}"#]).expect(200);
    assert_eq!(done["status"], "applied");
    // A wrong secret is wrong, whatever else is sent.
    assert_eq!(browser.ask("/v1/admin/agents", &["-H", "X-Admin-Secret: wrong"]).status, 403);
}

#[test]
fn guessing_gets_slow_and_nobody_is_locked_out_for_good() {
    let Some(mut deploy) = pending() else { return };
    deploy.start();
    let guess =
        |secret: &str| deploy.curl("/proxy/login", &["--data-urlencode", &format!("secret={secret}")]);
    let refused = wait_for("a refusal for too many tries", || {
        let answer = guess("wrong");
        (answer.status == 429).then_some(answer)
    });
    assert!(refused.body.contains("try again in") && refused.body.contains("<form"), "{}", refused.body);
    // The header goes on working, from the same address.
    deploy.admin_get("/proxy/updates/api").expect(200);
    // Tries that were not judged are not recorded, so nobody can flood the log.
    let events = deploy.admin_get("/v1/admin/audit?event_type=dashboard.login_failed").expect(200);
    assert!(events.as_array().unwrap().len() >= 5, "{events}");
    // The right secret gets in as soon as the wait is over.
    wait_for("the wait to end", || (guess(ADMIN_SECRET).status == 303).then_some(()));
}

#[test]
fn what_an_agent_s_name_holds_is_text() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let script = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'";
    let body = json!({ "agent_name": "mallory", "display_name": script, "capabilities": [script] });
    let agent = deploy.admin_post("/v1/admin/agents", &body).expect(201);
    let browser = Browser::new(&deploy, "a");
    browser.sign_in();
    let agent_id = agent["agent_id"].as_str().unwrap();
    for page in [
        "/proxy/agents".to_owned(),
        format!("/proxy/agents/{agent_id}"),
        "/proxy/agents?from=%3Cscript%3Ealert(1)%3C/script%3E".to_owned(),
        "/proxy/agents/%3Cscript%3Ealert(1)%3C%2Fscript%3E".to_owned(),
        "/proxy/audit?event_type=%3Cscript%3Ealert(1)%3C/script%3E".to_owned(),
        "/proxy/updates/%3Cscript%3Ealert(1)%3C%2Fscript%3E".to_owned(),
        "/proxy/login?next=%22%3E%3Cscript%3Ealert(1)%3C/script%3E".to_owned(),
    ] {
        let body = browser.get(&page).body;
        assert!(!body.contains("<script>") && !body.contains("<img src=x"), "{page}: {body}");
    }
    assert!(browser.get("/proxy/agents").body.contains("&#60;script&#62;alert(1)"));
}

#[test]
fn every_event_about_an_agent_is_found_on_both_databases() {
    for database in [Database::Sqlite, Database::Postgres] {
        let Some(deploy) = pending() else { return };
        let mut deploy = deploy.on(database);
        deploy.start();
        deploy.apply().expect(200);
        let agents = ["alpha", "beta\\u0000\"agent_id\":\"x\""].map(|name| {
            let body = json!({ "agent_name": name.split('\\').next(), "display_name": name });
            let agent = deploy.admin_post("/v1/admin/agents", &body).expect(201);
            agent["agent_id"].as_str().unwrap().to_owned()
        });
        let about = |subject: &str| {
            let path = format!("/v1/admin/audit?subject={subject}");
            let events = deploy.admin_get(&path).expect(200);
            let types = events.as_array().unwrap().iter().map(|event| event["event_type"].clone());
            types.map(|name| name.as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        for agent_id in &agents {
            assert!(about(agent_id).contains(&"agent.created".to_owned()), "{agent_id} on {database:?}");
            let filtered = format!("/v1/admin/audit?subject={agent_id}&event_type=agent.created");
            assert_eq!(deploy.admin_get(&filtered).expect(200).as_array().unwrap().len(), 1);
        }
        assert_eq!(about("x"), Vec::<String>::new());
        let newest = deploy.admin_get("/v1/admin/audit?limit=1").expect(200)[0]["seq"].as_i64().unwrap();
        let after = deploy.admin_get(&format!("/v1/admin/audit?after={}", newest - 2)).expect(200);
        assert_eq!(after.as_array().unwrap().len(), 2);
    }
}

/// Rows that an operator's SQL, another version or a broken disk put there.
#[test]
fn rows_that_nobody_expected_are_shown_as_text_and_named_as_wrong() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let script = "<script>alert(1)</script>";
    let id = "2027-01-01-<script>";
    deploy.sql(&format!(
        "INSERT INTO pending_updates (migration_id, detected_at, status, error) \
         VALUES ('{id}', '2027-01-01T00:00:00Z', 'failed', '{script}')"
    ));
    deploy.sql(&format!(
        "INSERT INTO audit_events (seq, id, timestamp, event_type, actor, details, prev_hash, hash) VALUES \
         (1000, 'x', '2027-01-01T00:00:00.000000Z', '{script}', '{script}', '{{\"{script}\": \"{script}\"}}', 'x', 'y')"
    ));
    wait_for("the halt", || deploy.is_halted().then_some(()));
    let browser = Browser::new(&deploy, "a");
    browser.sign_in();
    let page = "/proxy/updates/2027-01-01-%3cscript%3e";
    for path in ["/proxy", "/proxy/updates", page, &format!("{page}/rollback-review"), "/proxy/audit"] {
        let answer = browser.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        assert!(!answer.body.contains("<script>"), "{path}: {}", answer.body);
        assert!(answer.body.contains(&format!("href=\"{page}\"")), "the banner on {path}: {}", answer.body);
    }
    // What an upstream or an operator of another version has put there, on every page that shows it.
    let hostile = format!("{script}<img src=x onerror=alert(2)>");
    deploy.sql(&format!(
        "INSERT INTO operators (name, role, credential, created_at, created_by, last_seen_at) \
         VALUES ('{hostile}', 'viewer', 'x', '{hostile}', '{hostile}', '{hostile}')"
    ));
    deploy.sql(&format!(
        "INSERT INTO internal_agents (agent_id, display_name, capabilities, created_at, is_active, enrollment_method, \
         cert_pem, dpop_jkt, principal_type, federated) \
         VALUES ('acme::{script}', '{hostile}', '[\"{hostile}\"]', '{hostile}', 1, 'byoca', '{hostile}', '{hostile}', '{hostile}', 0)"
    ));
    for path in [
        "/proxy",
        "/proxy/agents",
        "/proxy/agents/acme::%3cscript%3ealert(1)%3c%2fscript%3e",
        "/proxy/agents?only=active",
        "/proxy/operators",
        "/proxy/pki",
        "/proxy/mastio-key",
        "/proxy/settings",
    ] {
        let answer = browser.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        assert!(
            !answer.body.contains("<script>") && !answer.body.contains("<img src=x"),
            "{path}: {}",
            answer.body
        );
    }
    // This version cannot apply what it does not know.
    let plan = browser.get(&format!("{page}/apply-review"));
    assert_eq!(plan.status, 404, "{}", plan.body);
    let token = browser.csrf_token();
    assert_eq!(browser.get("/proxy/audit/999").status, 404);
    assert_eq!(browser.get("/proxy/audit/%3Cscript%3E").status, 404);
    let event = browser.get("/proxy/audit/1000").body;
    assert!(event.contains("Broken: audit row 1000") && !event.contains("<script>"), "{event}");
    let verified = browser.ask("/proxy/audit", &["-d", &format!("csrf_token={token}")]);
    assert!(verified.body.contains("Broken:"), "{}", verified.body);
}

#[test]
fn a_sign_in_leads_to_no_other_site() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let browser = Browser::new(&deploy, "a");
    let secret = format!("secret={ADMIN_SECRET}");
    for (next, expected) in [
        ("/proxy/audit", "/proxy/audit"),
        ("https://evil.example/", "/proxy"),
        ("//evil.example/proxy", "/proxy"),
        ("/proxy//evil.example", "/proxy"),
        ("/proxy/\\evil.example", "/proxy"),
    ] {
        let next = format!("next={next}");
        let arguments = ["--data-urlencode", &secret, "--data-urlencode", &next];
        let headers = browser.headers("/proxy/login", &arguments);
        assert_eq!(location(&headers), expected, "{next}");
    }
}

#[test]
fn what_pages_load_is_kept_for_good_under_a_name_of_its_own() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let browser = Browser::new(&deploy, "a");
    let page = browser.get("/proxy/login").body;
    let assets: Vec<&str> = page.split('"').filter(|text| text.starts_with("/proxy/assets/")).collect();
    assert!(assets.len() >= 4, "{page}");
    for asset in assets {
        let headers = browser.headers(asset, &[]);
        assert!(headers.starts_with("http/1.1 200"), "{asset}: {headers}");
        assert!(headers.contains("cache-control: public, max-age=31536000, immutable"), "{asset}: {headers}");
    }
}

/// The numbers that a rollback plan shows, in order.
fn counts(page: &str) -> Vec<i64> {
    let numbers = page.split("<dd>").skip(1).map(|rest| rest.split('<').next().unwrap().trim().parse());
    numbers.collect::<Result<_, _>>().unwrap()
}

#[test]
fn a_rollback_plan_says_what_the_rollback_then_does() {
    // The predecessor's own apply, its torn apply, ours over that, and ours.
    for (fixture, database, apply) in [
        ("py_applied", Database::Sqlite, false),
        ("py_torn5", Database::Sqlite, false),
        ("py_torn5", Database::Postgres, false),
        ("py_torn5", Database::Sqlite, true),
        ("py_connector5_pending", Database::Postgres, true),
    ] {
        let Some(deploy) = Deploy::legacy(fixture) else { return };
        let mut deploy = deploy.on(database);
        deploy.start();
        if apply {
            deploy.apply().expect(200);
        }
        if !deploy.is_halted() {
            deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "enrolled-since" })).expect(201);
        }
        let browser = Browser::new(&deploy, "a");
        browser.sign_in();
        let path = format!("/proxy/updates/{MIGRATION}/rollback-review");
        let page = browser.get(&path).body;
        let token = browser.csrf_token();
        let sent = browser.ask(&path, &["-d", &format!("confirm=yes&csrf_token={token}")]);
        assert_eq!(sent.status, 303, "{}", sent.body);
        wait_for("the rollback", || (status(&deploy) == "rolled_back").then_some(()));
        let events = deploy.admin_get("/v1/admin/audit?event_type=admin.update_rolled_back").expect(200);
        let details = &events[0]["details"];
        let done = ["restored_leaves", "carried_back_leaves"].map(|name| details[name].as_i64().unwrap());
        println!("{fixture} on {database:?}, applied by us: {apply}: {done:?}");
        assert_eq!(counts(&page), done, "{fixture} on {database:?}, applied by us: {apply}: {page}");
        let gone = browser.get(&path).body;
        assert!(gone.contains("There is nothing to roll back to yet"), "{gone}");
    }
}

/// The status of the page's own update; the fixtures may need others besides.
fn status(deploy: &Deploy) -> String {
    deploy.sql(&format!("SELECT status FROM pending_updates WHERE migration_id = '{MIGRATION}'"))
}

// ---------------------------------------------------------------- in a real browser

/// A halted deploy whose apply waits in its middle for as long as the returned file exists.
fn held(database: Database) -> Option<(Deploy, PathBuf)> {
    let mut deploy = Deploy::legacy("py_mixed_byoca_pending")?.on(database);
    let hold = deploy.folder().join("hold");
    fs::write(&hold, "").unwrap();
    deploy.start_with(&[("MASTIO_HOLD_AT", "apply.prepare"), ("MASTIO_HOLD_FILE", hold.to_str().unwrap())]);
    Some((deploy, hold))
}

fn tell(deploy: &Deploy, story: &str, hold: &Path) -> Value {
    tell_with(deploy, story, json!({ "hold": hold }))
}

/// `further`: what the story needs besides.
fn tell_with(deploy: &Deploy, story: &str, further: Value) -> Value {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let screenshots = std::env::var_os("MASTIO_SCREENSHOTS").map(|folder| repository.join(folder));
    if let Some(folder) = &screenshots {
        fs::create_dir_all(folder).unwrap();
    }
    let mut settings = json!({
        "url": deploy.url(), "secret": ADMIN_SECRET, "migration": MIGRATION, "story": story,
        "screenshots": screenshots,
    });
    settings.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
    required_environment("MASTIO_TEST_BROWSER");
    required_environment("MASTIO_TEST_CHROMIUM");
    let script = repository.join("judges/browser/dashboard.mjs");
    let told = run(Command::new("node").arg(script).arg(settings.to_string()));
    println!("{told}");
    serde_json::from_str(told.trim()).unwrap()
}

/// The page's story: an operator finds the halt, reads the plan, applies, watches it in two browsers, verifies, sees an
/// agent go on with what it has always had, and rolls back.
fn by_mouse(database: Database) {
    let Some((deploy, hold)) = held(database) else { return };
    let files = shared().unwrap().join("fixtures/legacy/keys/py_mixed_byoca_pending");
    let agent_id = "acme::agent-0001";
    let ca = deploy.folder().join("org-ca.crt");
    fs::write(&ca, deploy.sql("SELECT value FROM proxy_config WHERE key = 'org_ca_cert'") + "\n").unwrap();
    let again = database == Database::Postgres;
    tell_with(&deploy, "mouse", json!({ "hold": hold, "again": again }));
    assert!(!deploy.is_halted());

    let upstream = Upstream::start();
    deploy.register_tool(TOOL, upstream.url(), &[agent_id]);
    let mut agent = Agent::open(Python::Plain, &deploy.url(), agent_id, &files.join("agent-0001"), &ca);
    agent.login().unwrap();
    agent.call().unwrap();
    tell_with(&deploy, "afterwards", json!({ "again": again }));
    assert_eq!(status(&deploy), "rolled_back");
    agent.call().unwrap();
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn the_page_s_story_by_mouse_on_sqlite() {
    by_mouse(Database::Sqlite);
}

#[test]
fn the_page_s_story_by_mouse_on_postgresql() {
    by_mouse(Database::Postgres);
}

#[test]
fn a_server_s_tools_are_registered_approved_and_bound_by_forms() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let created = deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "caller" })).expect(201);
    let agent_id = created["agent_id"].as_str().unwrap();
    let upstream = Upstream::start();
    let browser = Browser::new(&deploy, "a");
    browser.sign_in();
    assert!(browser.get("/proxy/tools").body.contains("No server has been looked at yet"));
    let token = format!("csrf_token={}", browser.csrf_token());
    let send = |path: &str, fields: &[(&str, &str)], status: u16| {
        let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut arguments = vec!["--data-urlencode", token.as_str()];
        arguments.extend(fields.iter().flat_map(|field| ["--data-urlencode", field.as_str()]));
        let answer = browser.ask(path, &arguments);
        assert_eq!(answer.status, status, "{path} {fields:?}: {}", answer.body);
        answer.body
    };
    send("/proxy/tools/servers", &[("name", "echoes"), ("endpoint_url", upstream.url())], 303);
    let refused = send("/proxy/tools/servers", &[("name", "no name"), ("endpoint_url", "nowhere")], 422);
    assert!(refused.contains("name"), "{refused}");

    let list = browser.get("/proxy/tools").body;
    let (_, rest) = list.split_once("href=\"/proxy/tools/").unwrap_or_else(|| panic!("no tool in {list}"));
    let page = format!("/proxy/tools/{}", rest.split('"').next().unwrap());
    let shown = |part: &str| {
        let body = browser.get(&page).body;
        assert!(body.contains(part), "{part} in {body}");
        body
    };
    let body = shown(">proposed<");
    assert!(body.contains("Returns its arguments.") && body.contains("Nobody yet."), "{body}");
    let (_, digest) = body.split_once("name=\"digest\" value=\"").unwrap();
    let digest = digest.split('"').next().unwrap();
    // What the page has not shown is not approved.
    send(&format!("{page}/approve"), &[("digest", "00")], 409);
    send(&format!("{page}/approve"), &[("digest", digest)], 303);
    shown(">approved<");
    send(&format!("{page}/limits"), &[("required_capability", "echo"), ("calls_per_minute", "60")], 303);
    shown("value=\"60\"");
    send(&format!("{page}/limits"), &[("calls_per_minute", "many")], 400);
    send(&format!("{page}/bind"), &[("agent_id", "nobody")], 404);
    send(&format!("{page}/bind"), &[("agent_id", agent_id)], 303);
    let body = shown(agent_id);
    let (_, binding) = body.split_once("name=\"binding_id\" value=\"").unwrap();
    send(&format!("{page}/unbind"), &[("binding_id", binding.split('"').next().unwrap())], 303);
    shown("Nobody yet.");
    send(&format!("{page}/block"), &[], 303);
    shown(">blocked<");

    let (_, server) = list.split_once("action=\"/proxy/tools/servers/").unwrap();
    let server = format!("/proxy/tools/servers/{}", server.split('/').next().unwrap());
    send(&format!("{server}/look"), &[], 303);
    send(&format!("{server}/delete"), &[("confirm", "another")], 400);
    send(&format!("{server}/delete"), &[("confirm", "echoes")], 303);
    assert_eq!(browser.get(&page).status, 404);
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

/// The cells of the row of a page that speaks of this agent and this tool, as text.
fn row(page: &str, agent_id: &str, tool: &str) -> Vec<String> {
    let rows = page.split("<tr>").skip(1).map(|rest| rest.split("</tr>").next().unwrap());
    let text = |cell: &str| {
        let parts = cell.split('<').map(|part| part.split_once('>').map_or(part, |(_, text)| text));
        parts.collect::<String>().trim().to_owned()
    };
    let cells = rows.map(|row| row.split("<td").skip(1).map(|cell| text(&format!("<td{cell}"))).collect());
    cells
        .into_iter()
        .find(|cells: &Vec<String>| {
            cells.first().is_some_and(|cell| cell.split(' ').next() == Some(agent_id))
                && (tool.is_empty() || cells[1] == tool)
        })
        .unwrap_or_else(|| panic!("no row of {agent_id} and {tool} in {page}"))
}

/// What a page says of a call is what the API and the command line say.
#[test]
fn pages_the_api_and_the_command_line_give_one_answer_to_who_may_call_what_and_why() {
    for database in [Database::Sqlite, Database::Postgres] {
        let mut deploy = Deploy::empty().on(database);
        deploy.start();
        let agents = ["ada", "bob", "cyd"].map(|name| {
            let agent = deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": name })).expect(201);
            agent["agent_id"].as_str().unwrap().to_owned()
        });
        let tools = deploy.folder().join("tools");
        let tool = |name: &str| json!({ "name": name, "inputSchema": { "type": "object", "properties": { "n": { "type": "integer" } } } });
        fs::write(&tools, json!({ "tools": [tool("add"), tool("drop")] }).to_string()).unwrap();
        let upstream = Upstream::described_by(&tools);
        let server = json!({ "name": "numbers", "endpoint_url": upstream.url() });
        let server = deploy.admin_post("/v1/admin/mcp-upstreams", &server).expect(201);
        for name in ["add", "drop"] {
            let path = format!("/v1/admin/mcp-tools/{name}");
            let digest = deploy.admin_get(&path).expect(200)["found_digest"].clone();
            deploy.admin_post(&format!("{path}/approve"), &json!({ "digest": digest })).expect(200);
        }
        for agent_id in &agents[..2] {
            deploy.let_call(agent_id, server["upstream_id"].as_str().unwrap());
        }
        deploy.admin_post(&format!("/v1/admin/agents/{}/deactivate", agents[1]), &json!({}));

        let browser = Browser::new(&deploy, "a");
        browser.sign_in();
        assert!(browser.get("/proxy/policies").body.contains("None: what is bound is allowed"));
        let token = format!("csrf_token={}", browser.csrf_token());
        let send = |path: &str, fields: &[(&str, &str)], status: u16| {
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let mut arguments = vec!["--data-urlencode", token.as_str()];
            arguments.extend(fields.iter().flat_map(|field| ["--data-urlencode", field.as_str()]));
            let answer = browser.ask(path, &arguments);
            assert_eq!(answer.status, status, "{path} {fields:?}: {}", answer.body);
            answer.body
        };
        let never = r#"forbid(principal, action, resource == Tool::"drop");"#;
        let large = r#"forbid(principal, action, resource == Tool::"add") when { context.arguments has n && context.arguments.n > 9 };"#;
        let nobody = r#"forbid(principal, action, resource == Tool::"add");"#;
        let policy = |name, tool, mode, text, version| {
            [("name", name), ("tool", tool), ("mode", mode), ("text", text), ("version", version)]
        };
        // What cannot be saved comes back as it was written, with the reason, and changes nothing.
        let refused = send("/proxy/policies", &policy("large", "", "enforce", large, "0"), 422);
        assert!(
            refused.contains("context.arguments.n &#62; 9") && refused.contains("role=\"alert\""),
            "{refused}"
        );
        assert_eq!(deploy.admin_get("/v1/admin/mcp-policies").expect(200), json!([]));
        // Asking about a draft changes nothing either, and says what saving it would.
        let asked = [("agent_id", agents[0].as_str()), ("called", "add"), ("arguments", r#"{"n": 12}"#)];
        let tried = send(
            "/proxy/policies/test",
            &[&policy("large", "add", "enforce", large, "0")[..], &asked].concat(),
            200,
        );
        assert!(tried.contains("It would be denied.") && tried.contains("large@draft"), "{tried}");
        assert_eq!(deploy.admin_get("/v1/admin/mcp-policies").expect(200), json!([]));
        send("/proxy/policies", &policy("large", "add", "enforce", large, "0"), 303);
        send("/proxy/policies", &policy("never", "", "enforce", never, "0"), 303);
        send("/proxy/policies", &policy("nobody", "", "shadow", nobody, "0"), 303);
        // Whoever has not seen the present version saves nothing over it.
        send("/proxy/policies", &policy("nobody", "", "enforce", nobody, "0"), 409);

        let said = |access: &Value| {
            let list = |field: &str| {
                let ids = access[field].as_array().unwrap().iter().map(|id| id.as_str().unwrap());
                ids.collect::<Vec<_>>().join(", ")
            };
            let word = if access["allowed"] == true { "allowed" } else { access["reason"].as_str().unwrap() };
            let of = |label: &str, ids: String| if ids.is_empty() { ids } else { format!("{label}{ids}") };
            [
                word.to_owned(),
                of("by ", list("policies")),
                of("in shadow, would deny: ", list("shadow_denied_by")),
            ]
        };
        let all = deploy.admin_get("/v1/admin/mcp-access").expect(200);
        assert_eq!(all.as_array().unwrap().len(), 4, "{all}");
        let cli: Value =
            serde_json::from_str(&deploy.mastio_ok(&["tools", "access", "--json", "--url", &deploy.url()]))
                .unwrap();
        assert_eq!(cli, all);
        let words: Vec<_> = all.as_array().unwrap().iter().map(said).collect();
        assert_eq!(words[0], ["allowed", "by binding", "in shadow, would deny: nobody@1"]);
        assert_eq!(words[1], ["policy_denied", "by never@1", ""]);
        assert_eq!(words[2][0], "unknown_or_inactive_agent");
        for access in all.as_array().unwrap() {
            let (agent_id, tool) = (access["agent_id"].as_str().unwrap(), access["tool"].as_str().unwrap());
            for path in [
                "/proxy/access".to_owned(),
                format!("/proxy/access?agent_id={agent_id}"),
                format!("/proxy/access?tool={tool}"),
            ] {
                assert_eq!(row(&browser.get(&path).body, agent_id, tool)[2..5], said(access), "{path}");
            }
            let page = browser.get(&format!("/proxy/tools/{tool}")).body;
            assert_eq!(row(&page, agent_id, "")[2..5], said(access), "{tool} {agent_id}");
        }
        // The rules that decide lead to their page, and what depends on arguments says so.
        let page = browser.get("/proxy/access?tool=add").body;
        assert!(page.contains("href=\"/proxy/policies/nobody\">nobody@1</a>"), "{page}");
        assert!(row(&page, &agents[0], "add")[5].contains("depends on the arguments: large@1"), "{page}");
        // An agent that is bound to nothing is asked about by its name.
        assert_eq!(row(&browser.get("/proxy/access?agent_id=cyd").body, &agents[2], "add")[2], "no_binding");

        // A dry run by the form and by the API.
        for arguments in [r#"{"n": 12}"#, r#"{"n": 3}"#, r#"{"n": "x"}"#, ""] {
            let mut body = json!({ "agent_id": agents[0], "tool": "add" });
            if let Ok(arguments) = serde_json::from_str::<Value>(arguments) {
                body["arguments"] = arguments;
            }
            let told = deploy.admin_post("/v1/admin/mcp-policies/test", &body).expect(200);
            let page = send("/proxy/policies/test", &[asked[0], asked[1], ("arguments", arguments)], 200);
            assert_eq!(page.contains("It would be allowed."), told["allowed"] == true, "{arguments}: {page}");
            let reason = format!("<code>{}</code>", told["reason"].as_str().unwrap());
            assert_eq!(page.contains(&reason), told["allowed"] == false, "{arguments}: {page}");
        }
        send("/proxy/policies/test", &[asked[0], asked[1], ("arguments", "{")], 422);

        // Out of the shadow, by the version that the page has shown.
        send("/proxy/policies/nobody/mode", &[("mode", "enforce"), ("version", "1")], 303);
        send("/proxy/policies/nobody/mode", &[("mode", "off"), ("version", "1")], 409);
        send("/proxy/policies/nobody/mode", &[("mode", "deleted"), ("version", "2")], 400);
        let page = browser.get("/proxy/policies/nobody").body;
        assert!(page.contains("Text of version 1") && page.contains("Text of version 2"), "{page}");
        assert_eq!(row(&browser.get("/proxy/access?tool=add").body, &agents[0], "add")[2], "policy_denied");
        send("/proxy/policies/nobody/delete", &[("confirm", "another")], 400);
        send("/proxy/policies/nobody/delete", &[("confirm", "nobody")], 303);
        assert!(browser.get("/proxy/policies/nobody").body.contains("It was removed"));
        assert_eq!(row(&browser.get("/proxy/access?tool=add").body, &agents[0], "add")[2], "allowed");
        assert_eq!(browser.get("/proxy/policies/unknown").status, 404);
        assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
    }
}

/// Each page of who may call what ends where the next one begins.
#[test]
fn who_may_call_what_is_read_a_page_at_a_time() {
    for database in [Database::Sqlite, Database::Postgres] {
        let mut deploy = Deploy::empty().on(database);
        deploy.start();
        let agent = deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "x" })).expect(201);
        let (org, _) = agent["agent_id"].as_str().unwrap().split_once("::").unwrap();
        let mut statements = String::new();
        for n in 0..7 {
            statements += &format!(
                "INSERT INTO local_mcp_resources (resource_id, name, endpoint_url, created_at, updated_at) \
                 VALUES ('r{n}', 'tool-{n}', 'https://tools.invalid/mcp', '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z');"
            );
        }
        // Some by their bare names, as the predecessor wrote them, and one by both.
        for n in 0..60 {
            let name = if n % 3 == 0 { format!("agent-{n:02}") } else { format!("{org}::agent-{n:02}") };
            for name in [Some(name), (n == 3).then(|| format!("{org}::agent-{n:02}"))].into_iter().flatten() {
                statements += &format!(
                    "INSERT INTO local_agent_resource_bindings (binding_id, agent_id, resource_id, granted_by, granted_at) \
                     VALUES ('b{name}', '{name}', 'r1', 'sql', '2026-01-01T00:00:00Z');"
                );
            }
        }
        deploy.sql(&statements);
        let browser = Browser::new(&deploy, "a");
        browser.sign_in();
        for query in ["", "tool=tool-1", "agent_id=agent-00"] {
            let all = deploy.admin_get(&format!("/v1/admin/mcp-access?{query}")).expect(200);
            let wanted: Vec<_> = all
                .as_array()
                .unwrap()
                .iter()
                .map(|row| format!("{} {}", row["agent_id"].as_str().unwrap(), row["tool"].as_str().unwrap()))
                .collect();
            assert_eq!(
                wanted.len(),
                match query {
                    "" => 420,
                    "tool=tool-1" => 60,
                    _ => 7,
                }
            );
            let (mut seen, mut next) = (Vec::new(), Some(format!("/proxy/access?{query}")));
            while let Some(path) = next.take() {
                let page = browser.get(&path).body;
                let links = |text: &str, before: &str| {
                    let links = text
                        .split(before)
                        .skip(1)
                        .map(|rest| rest.split(['"', '<']).next().unwrap().to_owned());
                    links.collect::<Vec<_>>()
                };
                let table = page.split("<tbody>").nth(1).unwrap().split("</tbody>").next().unwrap();
                let agents = links(table, "<a href=\"/proxy/agents/");
                let tools = links(table, "<a href=\"/proxy/access?tool=");
                seen.extend(agents.iter().zip(tools).map(|(agent, tool)| format!("{agent} {tool}")));
                next = links(&page, "<a class=\"button quiet\" href=\"")
                    .into_iter()
                    .find(|link| link.contains("after_agent="));
                next = next.map(|link| link.replace("&amp;", "&"));
            }
            assert_eq!(seen, wanted, "{query} on {database:?}");
        }
    }
}

/// What a rotation of the Python system has left half-way.
#[test]
fn a_staged_key_is_shown_with_the_command_that_drops_it() {
    let mut deploy = Deploy::empty();
    deploy.start();
    deploy.sql(
        "INSERT INTO mastio_keys (kid, pubkey_pem, privkey_pem, created_at) \
         SELECT 'it''s staged', pubkey_pem, privkey_pem, created_at FROM mastio_keys",
    );
    wait_for("the halt", || deploy.is_halted().then_some(()));
    let browser = Browser::new(&deploy, "a");
    browser.sign_in();
    assert!(browser.get("/proxy").body.contains("href=\"/proxy/mastio-key\">See the staged key</a>"));
    // The halt is in force before the keys behind it are read again.
    let page = wait_for("the staged key in its page", || {
        Some(browser.get("/proxy/mastio-key").body).filter(|page| page.contains("staged key waits"))
    });
    let (_, rest) =
        page.split_once("<pre><code class=\"copy\" data-copy=\"").unwrap_or_else(|| panic!("{page}"));
    let command = rest.split('"').next().unwrap().replace("&#39;", "'").replace("&#34;", "\"");
    deploy.bash(&command, &[]);
    wait_for("the halt to lift", || (!deploy.is_halted()).then_some(()));
    let page = wait_for("the end of the staged key", || {
        Some(browser.get("/proxy/mastio-key").body).filter(|page| !page.contains("staged key waits"))
    });
    assert!(page.contains(">signs<"), "{page}");
}

/// Two clients of the SDK wait for what an operator decides by hand.
#[test]
fn an_operator_decides_over_enrollments_while_the_sdk_waits() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let hold = deploy.folder().join("hold");
    fs::write(&hold, "").unwrap();
    let ca = deploy.folder().join("ca.crt");
    fs::write(&ca, deploy.get("/pki/ca.crt").body).unwrap();
    let ask = |name: &str| {
        let mut agent = Agent::bare(Python::Plain);
        let request = json!({
            "cmd": "enroll", "mastio_url": deploy.url(), "ca": ca, "save_to": deploy.folder().join(&name[..3]),
            "requester_name": name, "requester_email": "somebody@example.com", "poll_interval_s": 0.5,
            "reason": "</dd><script>alert(1)</script>", "device_info": "\"><script>alert(1)</script>",
        });
        agent.ask(&request).unwrap();
        agent
    };
    std::thread::scope(|scope| {
        let told = scope.spawn(|| tell(&deploy, "enrollments", &hold));
        wait_for("the page", || (!hold.exists() || told.is_finished()).then_some(()));
        let (mut ada, mut mallory) = (ask("Ada <img src=x onerror=alert(1)>"), ask("Mallory"));
        ada.ask(&json!({ "cmd": "enroll-wait" })).unwrap();
        let raised = mallory.ask(&json!({ "cmd": "enroll-wait" })).unwrap_err();
        assert!(raised.text.contains("nobody knows you"), "{raised:?}");
        told.join().unwrap();
    });
    let events = deploy.admin_get("/v1/admin/audit?limit=1000").expect(200);
    let of = |name: &str| {
        let mut found = events.as_array().unwrap().iter().filter(|event| event["event_type"] == name);
        assert_eq!(found.next().unwrap_or_else(|| panic!("no {name} in {events}"))["actor"], "admin");
    };
    for name in ["enrollment.approved", "enrollment.rejected", "agent.certificate_renewed"] {
        of(name);
    }
    for name in ["agent.deactivated", "agent.reactivated", "agent.deleted"] {
        of(name);
    }
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn a_new_organisation_is_set_up_in_a_browser_and_every_page_says_what_to_do_first() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let line = deploy.wait_for_log("the set-up", |line| line["message"] == "setup_open");
    tell_with(&deploy, "setUp", json!({ "token": line["token"] }));
    assert_eq!(deploy.sql("SELECT name, role FROM operators"), "ada|admin");
}

#[test]
fn an_admin_manages_operators_in_a_browser_and_two_of_them_stand_behind_an_apply() {
    let Some(deploy) = Deploy::legacy("py_mixed_byoca_pending") else { return };
    let mut deploy = deploy.set("MCP_PROXY_UPDATE_APPROVALS", "2");
    deploy.start();
    tell_with(&deploy, "operators", json!({}));
    assert_eq!(status(&deploy), "applied");
    let event = &deploy.admin_get("/v1/admin/audit?event_type=admin.update_applied").expect(200)[0];
    assert_eq!((&event["actor"], &event["details"]["approved_by"]), (&json!("bob"), &json!("admin")));
    let roles = deploy.admin_get("/v1/admin/audit?event_type=admin.operator_role_changed").expect(200);
    assert_eq!(roles[0]["details"], json!({ "name": "bob", "role": "operator", "former_role": "viewer" }));
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn a_tool_is_registered_approved_bound_and_approved_again_after_a_change_in_a_browser() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let created = deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "caller" })).expect(201);
    let description = deploy.folder().join("description");
    fs::write(&description, "Returns its arguments.").unwrap();
    let upstream = Upstream::described_by(&description);
    let further =
        json!({ "upstream": upstream.url(), "description": description, "agent": created["agent_id"] });
    tell_with(&deploy, "tools", further);
    let tried = deploy.admin_get("/v1/admin/audit?event_type=mcp.tool_tried").expect(200);
    let outcomes: Vec<_> =
        tried.as_array().unwrap().iter().map(|event| &event["details"]["outcome"]).collect();
    assert_eq!(outcomes, [&json!("ok"), &Value::Null], "{tried}");
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

/// What an attacker would like to be more than text, marked with where it stands.
fn hostile(field: &str) -> String {
    format!(
        "F[{field}]\"'></textarea></title></pre></svg><x-planted></x-planted><img src=x onerror=alert(1)>\
         <script>alert(1)</script>"
    )
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Writes a row whose every column of text is hostile; but for those in `given`, as SQL. Gives the fields.
fn plant(deploy: &Deploy, table: &str, given: &[(&str, String)]) {
    let (mut names, mut values) = (Vec::new(), Vec::new());
    for line in deploy.sql(&format!("SELECT name, type FROM pragma_table_info('{table}')")).lines() {
        let (name, kind) = line.split_once('|').unwrap();
        let value = match given.iter().find(|(wanted, _)| *wanted == name) {
            Some((_, value)) => value.clone(),
            None if kind == "TEXT" => literal(&hostile(&format!("{table}.{name}"))),
            None => "0".to_owned(),
        };
        names.push(name.to_owned());
        values.push(value);
    }
    let (names, values) = (names.join(", "), values.join(", "));
    deploy.sql(&format!("INSERT INTO {table} ({names}) VALUES ({values})"));
}

/// Every column of text of every table that a page reads, whoever may write it: agents, upstream servers, operators,
/// single sign-on, somebody's SQL.
#[test]
fn what_stands_in_any_column_of_any_table_is_text_on_every_page() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let text = |text: &str| literal(text);
    let of = |field: &str| literal(&hostile(field));
    let listed = |field: &str| literal(&json!([hostile(field)]).to_string());

    // In a server's own words: its tools, what is no tool's name, what it answers, and how it fails.
    let words = deploy.folder().join("words");
    let tool = json!({ "name": "spoken", "title": hostile("spoken.title"), "description": hostile("spoken.description"),
        "inputSchema": { "type": "object", "properties": { (hostile("spoken.property")): { "type": "string", "description": hostile("spoken.schema") } } } });
    let unusable = json!({ "name": hostile("spoken.name"), "inputSchema": { "type": "object" } });
    fs::write(&words, json!({ "tools": [tool, unusable] }).to_string()).unwrap();
    let upstream = Upstream::described_by(&words);
    let server = json!({ "name": "speaks", "endpoint_url": upstream.url() });
    let server = deploy.admin_post("/v1/admin/mcp-upstreams", &server).expect(201);
    let server_id = server["upstream_id"].as_str().unwrap();
    fs::write(&words, json!({ "error": hostile("server.error") }).to_string()).unwrap();
    deploy.admin_post(&format!("/v1/admin/mcp-upstreams/{server_id}/refresh"), &json!({}));

    // In a certificate's own words.
    let certificate = run(Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            "/dev/null",
            "-days",
            "9",
            "-subj",
        ])
        .arg("/CN=F[subject.cn]<x-planted><img src=x onerror=alert(1)>"));

    let agent = [
        ("agent_id", text("acme::planted")),
        ("is_active", "1".to_owned()),
        ("enrollment_method", text("byoca")),
        ("principal_type", text("agent")),
        ("capabilities", listed("internal_agents.capabilities")),
        ("cert_pem", text(&certificate)),
        ("previous_grace_period_expires_at", "NULL".to_owned()),
    ];
    plant(&deploy, "internal_agents", &agent);
    let strange = [
        ("is_active", "1".to_owned()),
        ("capabilities", text("[]")),
        ("previous_grace_period_expires_at", "NULL".to_owned()),
    ];
    plant(&deploy, "internal_agents", &strange);
    for (status, id) in [("pending", "asks"), ("approved", "had"), ("rejected", "lost")] {
        let request = [
            ("session_id", text(id)),
            ("status", text(status)),
            ("created_at", "1780000000".to_owned()),
            ("expires_at", "4000000000".to_owned()),
            ("decided_at", "1780000000".to_owned()),
        ];
        plant(&deploy, "enrollment_requests", &request);
    }
    let resource =
        [("org_id", "NULL".to_owned()), ("enabled", "1".to_owned()), ("allowed_domains", text("[]"))];
    plant(&deploy, "local_mcp_resources", &resource);
    let planted_server = [
        ("upstream_id", text("planted")),
        ("allowed_domains", text("[]")),
        ("capabilities", text("{}")),
        ("enabled", "1".to_owned()),
    ];
    plant(&deploy, "mcp_upstreams", &planted_server);
    let definition = |field: &str| {
        json!({ "name": "x", "title": hostile(&format!("{field}.title")), "description": hostile(&format!("{field}.description")),
        "inputSchema": { "type": "object", (hostile(&format!("{field}.key"))): hostile(&format!("{field}.value")) } }).to_string()
    };
    let planted_tool = [
        ("tool_id", text("planted")),
        ("upstream_id", text("planted")),
        ("state", text("approved")),
        ("present", "1".to_owned()),
        ("definition", text(&definition("approved"))),
        ("found", text(&definition("found"))),
    ];
    plant(&deploy, "mcp_tools", &planted_tool);
    for (id, resource, agent_id) in
        [("b1", "planted", "acme::planted"), ("b2", "planted", ""), ("b3", server_id, "acme::planted")]
    {
        let agent_id = if agent_id.is_empty() { of("bindings.agent_id") } else { text(agent_id) };
        let binding = [
            ("binding_id", text(id)),
            ("resource_id", text(resource)),
            ("agent_id", agent_id),
            ("revoked_at", "NULL".to_owned()),
            ("principal_type", text("agent")),
        ];
        plant(&deploy, "local_agent_resource_bindings", &binding);
    }
    plant(
        &deploy,
        "mcp_policy_versions",
        &[
            ("name", text("planted")),
            ("version", "1".to_owned()),
            ("change", "1".to_owned()),
            ("mode", text("enforce")),
        ],
    );
    plant(
        &deploy,
        "mcp_policy_versions",
        &[
            ("version", "1".to_owned()),
            ("change", "2".to_owned()),
            ("mode", text("shadow")),
            ("tool", "NULL".to_owned()),
        ],
    );
    plant(&deploy, "operators", &[("role", text("viewer")), ("deactivated_at", "NULL".to_owned())]);
    plant(
        &deploy,
        "dashboard_sessions",
        &[
            ("role", text("operator")),
            ("created_at", "strftime('%s')".to_owned()),
            ("seen_at", "strftime('%s')".to_owned()),
        ],
    );
    let migration = "2027-01-01-<x-planted>";
    plant(
        &deploy,
        "pending_updates",
        &[
            ("migration_id", text(migration)),
            ("status", text("failed")),
            ("criticality", text("critical")),
            ("affects_enrollments", text("[]")),
            ("requires", listed("pending_updates.requires")),
        ],
    );
    plant(
        &deploy,
        "update_runs",
        &[
            ("migration_id", text(migration)),
            ("direction", text("apply")),
            ("committed_at", "NULL".to_owned()),
        ],
    );
    plant(
        &deploy,
        "update_proposals",
        &[
            ("migration_id", text(migration)),
            ("direction", text("apply")),
            ("expires_at", "4000000000".to_owned()),
        ],
    );
    let details = json!({ (hostile("details.key")): hostile("details.value"), "agent_id": "acme::planted", "list": [hostile("details.list")] });
    plant(&deploy, "audit_events", &[("seq", "100000".to_owned()), ("details", text(&details.to_string()))]);
    plant(
        &deploy,
        "audit_events",
        &[
            ("seq", "100001".to_owned()),
            ("event_type", text("auth.token_issued")),
            ("details", text(&details.to_string())),
            ("id", text("100001")),
        ],
    );
    plant(
        &deploy,
        "audit_events",
        &[
            ("seq", "100002".to_owned()),
            ("event_type", text("mcp.tool_called")),
            ("id", text("100002")),
            ("subject", text("acme::planted")),
            ("details", text(&details.to_string())),
        ],
    );
    deploy.sql(&format!("INSERT INTO deploy_state (key, value) VALUES ('organisation_name', {}) ON CONFLICT (key) DO UPDATE SET value = excluded.value", of("organisation")));
    wait_for("the halt", || deploy.is_halted().then_some(()));

    let strange_agent = encoded(&hostile("internal_agents.agent_id"));
    let strange_policy = encoded(&hostile("mcp_policy_versions.name"));
    let strange_update = encoded(migration);
    let discovered =
        deploy.sql("SELECT MAX(seq) FROM audit_events WHERE event_type = 'mcp.tools_discovered'");
    let reflected = encoded(&hostile("reflected"));
    let pages = [
        "/proxy".to_owned(),
        "/proxy/updates".to_owned(),
        format!("/proxy/updates/{strange_update}"),
        format!("/proxy/updates/{strange_update}/apply-review"),
        format!("/proxy/updates/{strange_update}/rollback-review"),
        "/proxy/agents".to_owned(),
        "/proxy/agents?only=byoca".to_owned(),
        "/proxy/agents/acme::planted".to_owned(),
        format!("/proxy/agents/{strange_agent}"),
        "/proxy/enrollments".to_owned(),
        "/proxy/enrollments?status=approved".to_owned(),
        "/proxy/enrollments?status=rejected".to_owned(),
        "/proxy/enrollments/asks".to_owned(),
        "/proxy/enrollments/had".to_owned(),
        "/proxy/enrollments/lost".to_owned(),
        "/proxy/tools".to_owned(),
        "/proxy/tools/planted".to_owned(),
        "/proxy/tools/spoken".to_owned(),
        "/proxy/policies".to_owned(),
        "/proxy/policies/planted".to_owned(),
        format!("/proxy/policies/{strange_policy}"),
        "/proxy/access".to_owned(),
        "/proxy/access?agent_id=acme::planted".to_owned(),
        "/proxy/pki".to_owned(),
        "/proxy/pki/overlap".to_owned(),
        "/proxy/mastio-key".to_owned(),
        "/proxy/audit".to_owned(),
        "/proxy/audit/100000".to_owned(),
        "/proxy/audit/100001".to_owned(),
        "/proxy/audit/100002".to_owned(),
        format!("/proxy/audit/{discovered}"),
        "/proxy/settings".to_owned(),
        "/proxy/operators".to_owned(),
        // What stands in an address comes back on these.
        format!("/proxy/agents?from={reflected}"),
        format!("/proxy/agents/{reflected}"),
        format!("/proxy/access?agent_id={reflected}&tool={reflected}"),
        format!("/proxy/audit?subject={reflected}&event_type={reflected}"),
        format!("/proxy/policies/{reflected}"),
        format!("/proxy/tools/{reflected}"),
        format!("/proxy/enrollments/{reflected}"),
        format!("/proxy/audit/{reflected}"),
        format!("/proxy/updates/{reflected}"),
        format!("/proxy/login?next={reflected}"),
    ];
    let told = tell_with(&deploy, "hostile", json!({ "pages": &pages[..] }));
    let seen: Vec<&str> =
        told["fields"].as_array().unwrap().iter().map(|field| field.as_str().unwrap()).collect();
    println!("{} fields on {} pages: {seen:?}", seen.len(), pages.len());
    for field in HOSTILE_FIELDS {
        assert!(seen.contains(field), "{field} was on no page: {seen:?}");
    }
}

/// `text` as one segment of a path, or one value of a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// What somebody outside writes and a page shows.
const HOSTILE_FIELDS: &[&str] = &[
    "internal_agents.agent_id",
    "internal_agents.display_name",
    "internal_agents.capabilities",
    "internal_agents.dpop_jkt",
    "subject.cn",
    "enrollment_requests.requester_name",
    "enrollment_requests.requester_email",
    "enrollment_requests.reason",
    "enrollment_requests.device_info",
    "enrollment_requests.source",
    "enrollment_requests.agent_id",
    "enrollment_requests.rejection_reason",
    "enrollment_requests.decided_by",
    "local_mcp_resources.name",
    "local_mcp_resources.endpoint_url",
    "local_mcp_resources.required_capability",
    "bindings.agent_id",
    "mcp_upstreams.name",
    "mcp_upstreams.endpoint_url",
    "mcp_upstreams.required_capability",
    "mcp_upstreams.discovery_error",
    "mcp_tools.name",
    "mcp_tools.upstream_name",
    "mcp_tools.imitates",
    "mcp_tools.required_capability",
    "mcp_tools.approved_by",
    "approved.description",
    "approved.value",
    "found.title",
    "found.description",
    "found.key",
    "found.value",
    "spoken.title",
    "spoken.description",
    "spoken.property",
    "spoken.schema",
    "server.error",
    "mcp_policy_versions.name",
    "mcp_policy_versions.tool",
    "mcp_policy_versions.text",
    "mcp_policy_versions.saved_by",
    "operators.name",
    "operators.created_by",
    "dashboard_sessions.actor",
    "pending_updates.error",
    "pending_updates.requires",
    "update_runs.actor",
    "update_runs.error",
    "audit_events.event_type",
    "audit_events.actor",
    "details.key",
    "details.value",
    "details.list",
    "organisation",
    "reflected",
];

#[test]
fn operators_sign_on_with_a_provider_by_their_groups_and_the_secret_goes_on_working() {
    let mut deploy = Deploy::empty();
    deploy.start();
    deploy.stop();
    // What we say and what the provider was told must be the same to the letter.
    let redirect_uri = format!("{}/proxy/login/sso/callback", deploy.url());
    let accounts = json!({ "alice": ["staff", "mastio-operators"], "mallory": ["staff"] });
    let provider = Provider::start(&redirect_uri, "mastio", "a secret/with=signs", &accounts);
    let mut deploy = deploy
        .set("MCP_PROXY_OIDC_ISSUER", provider.issuer())
        .set("MCP_PROXY_OIDC_CLIENT_ID", "mastio")
        .set("MCP_PROXY_OIDC_CLIENT_SECRET", "'a secret/with=signs'")
        .set("MCP_PROXY_OIDC_ROLES", "mastio-operators=operator;mastio-admins=admin");
    deploy.start();
    tell_with(&deploy, "singleSignOn", json!({ "issuer": provider.issuer() }));
    let logins = deploy.admin_get("/v1/admin/audit?event_type=dashboard.login").expect(200);
    let alice = logins.as_array().unwrap().iter().find(|event| event["actor"] == "sso:alice").unwrap();
    assert_eq!(
        (&alice["details"]["single_sign_on"], &alice["details"]["role"]),
        (&json!(true), &json!("operator"))
    );
    let refused = deploy.admin_get("/v1/admin/audit?event_type=dashboard.login_failed").expect(200);
    assert_eq!(refused.as_array().unwrap().len(), 3, "{refused}");
    assert!(!deploy.log_text().contains("a secret/with=signs"));

    // A provider that is away locks nobody out, and says so.
    drop(provider);
    deploy.restart();
    let browser = Browser::new(&deploy, "a");
    let away = browser.get("/proxy/login/sso");
    assert_eq!(away.status, 503, "{}", away.body);
    assert!(away.body.contains("sign in with your secret") && away.body.contains("<form"), "{}", away.body);
    browser.sign_in();
    assert_eq!(deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}

#[test]
fn the_predecessor_s_password_signs_in_and_its_hash_is_replaced() {
    // bcrypt of the alphabet, cost 6: a test vector of jBCrypt.
    const HASH: &str = "$2a$06$.rCVZVOThsIa97pEDOxvGuRRgzG64bvtJ0938xuqzv18d3ZpQhstC";
    const PASSWORD: &str = "abcdefghijklmnopqrstuvwxyz";
    for database in [Database::Sqlite, Database::Postgres] {
        let Some(deploy) = pending() else { return };
        deploy.sql(&format!("UPDATE proxy_config SET value = '{HASH}' WHERE key = 'admin_password_hash'"));
        let mut deploy = deploy.on(database);
        deploy.start();
        assert!(deploy.get("/proxy/login").body.contains("the password of the dashboard before"));
        let stored = || {
            deploy.sql("SELECT value FROM proxy_config WHERE key = 'admin_password_hash'").trim().to_owned()
        };
        let sign_in = |name: &str, secret: &str| {
            let fields = [format!("name={name}"), format!("secret={secret}")];
            let arguments = ["--data-urlencode", &fields[0], "--data-urlencode", &fields[1]];
            deploy.curl("/proxy/login", &arguments).status
        };
        assert_eq!(sign_in("", "abcdefghijklmnopqrstuvwxy"), 403);
        assert_eq!(stored(), HASH);
        // It is the dashboard's, not the API's, and nobody's but the shared operator's.
        let header = format!("X-Admin-Secret: {PASSWORD}");
        assert_eq!(deploy.curl("/v1/admin/agents", &["-H", &header]).status, 403);
        assert_eq!(sign_in("alice", PASSWORD), 403);
        assert_eq!(sign_in("admin", PASSWORD), 303);
        assert!(stored().starts_with("$argon2id$v=19$"), "{}", stored());
        let event =
            &deploy.admin_get("/v1/admin/audit?event_type=admin.operator_secret_rehashed").expect(200)[0];
        assert_eq!(event["details"], json!({ "name": "admin", "from": "bcrypt", "to": "argon2id" }));
        assert_eq!((sign_in("", PASSWORD), sign_in("", ADMIN_SECRET)), (303, 303));
        let events =
            deploy.admin_get("/v1/admin/audit?event_type=admin.operator_secret_rehashed").expect(200);
        assert_eq!(events.as_array().unwrap().len(), 1);
        // Switched off as the predecessor did it: the secret is the way in that stays.
        deploy.sql("INSERT INTO proxy_config (key, value) VALUES ('local_password_enabled', 'false')");
        assert_eq!((sign_in("", PASSWORD), sign_in("", ADMIN_SECRET)), (403, 303));
    }
}

/// What an apply by the page is held to.
#[test]
fn a_form_runs_the_plan_that_it_has_shown_or_tells_what_has_moved() {
    let Some(mut deploy) = pending() else { return };
    deploy.start();
    let browser = Browser::new(&deploy, "a");
    browser.sign_in();
    let token = browser.csrf_token();
    let path = format!("/proxy/updates/{MIGRATION}/apply-review");
    let digest = |page: &str| {
        let (_, rest) = page.split_once("name=\"plan_digest\" value=\"").expect("a digest in the page");
        rest.split('"').next().unwrap().to_owned()
    };
    let seen = digest(&browser.get(&path).body);
    deploy.sql("DELETE FROM internal_agents WHERE agent_id LIKE '%::agent-0001'");
    let send = |digest: &str| {
        let fields = format!("confirm=yes&csrf_token={token}&plan_digest={digest}");
        browser.ask(&path, &["-d", &fields])
    };
    let moved = send(&seen);
    assert_eq!(moved.status, 409, "{}", moved.body);
    assert!(moved.body.contains("1 agents that left: acme::agent-0001"), "{}", moved.body);
    assert_eq!(status(&deploy), "pending");
    // The page shows the plan as it is now, and that one is run.
    let present = digest(&moved.body);
    assert_ne!(present, seen);
    assert_eq!(send(&present).status, 303);
    wait_for("the apply", || (status(&deploy) == "applied").then_some(()));
    let applied = &deploy.admin_get("/v1/admin/audit?event_type=admin.update_applied").expect(200)[0];
    assert_eq!(applied["details"]["plan_digest"].as_str().unwrap_or(&present), present);
}

#[test]
fn the_page_s_story_by_keyboard() {
    let Some((deploy, hold)) = held(Database::Sqlite) else { return };
    tell(&deploy, "keyboard", &hold);
    let done = deploy.admin_get("/v1/admin/audit?event_type=admin.update_applied").expect(200);
    assert_eq!((done.as_array().unwrap().len(), status(&deploy).as_str()), (1, "rolled_back"));
}

#[test]
fn the_page_s_story_without_scripts() {
    let Some((deploy, hold)) = held(Database::Sqlite) else { return };
    tell(&deploy, "noscript", &hold);
    assert_eq!(status(&deploy), "applied");
}
