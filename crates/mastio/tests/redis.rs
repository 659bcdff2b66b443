//! Redis beside the database: replicas claim in it what may be used once, and without it they refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};

use harness::{Answer, Database, Deploy, PASSPHRASE, curl, free_port, required_environment, run, wait_for};
use mastio::demo::agent::{AgentClient, AgentError};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Whose appearance in a log or an answer would be a leak.
const PASSWORD: &str = "hunter2-of-redis";
const REPLAYED: &str = "DPoP proof replay detected";
const UNGUARDED: &str = "replay protection is not available: nothing was issued, try again";

/// A Redis of the test's own, which it may kill, at one address.
struct Redis {
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Redis {
    fn stopped() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), port: free_port(), child: None }
    }

    fn started() -> Self {
        let mut redis = Self::stopped();
        redis.start();
        redis
    }

    fn start(&mut self) {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "redis-server", "--bind", "127.0.0.1", "--port"]);
        command.arg(self.port.to_string()).args(["--requirepass", PASSWORD, "--save", "", "--dir"]);
        let child = command.arg(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.child = Some(child.unwrap());
        wait_for("Redis to answer", || {
            let output = self.cli(&["ping"]).output().unwrap();
            (output.stdout == b"PONG\n").then_some(())
        });
    }

    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn signal(&self, name: &str) {
        run(Command::new("kill").args([name, &self.child.as_ref().unwrap().id().to_string()]));
    }

    fn url(&self) -> String {
        format!("redis://:{PASSWORD}@127.0.0.1:{}/0", self.port)
    }

    fn cli(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("redis-cli");
        command.args(["--no-auth-warning", "-a", PASSWORD, "-p", &self.port.to_string()]).args(arguments);
        command
    }

    /// How many claims there are.
    fn claims(&self) -> usize {
        run(&mut self.cli(&["--scan", "--pattern", "mastio:used:*"])).lines().count()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

/// An agent that makes token requests, which the test sends where and as often as it likes.
struct Minter(AgentClient);

/// One token request, as it goes over the wire.
struct Mint {
    proof: String,
    body: String,
}

impl Minter {
    /// An agent of `deploy`, whose URL its proofs name.
    fn new(deploy: &Deploy) -> Self {
        let body = json!({ "agent_name": "minter", "capabilities": [] });
        let created = deploy.admin_post("/v1/admin/agents", &body).expect(201);
        let text = |name: &str| created[name].as_str().unwrap().to_owned();
        let ca = deploy.get("/pki/ca.crt").body;
        let (chain, key, id) = (text("cert_pem"), text("private_key_pem"), text("agent_id"));
        Self(AgentClient::new(&deploy.url(), &ca, &chain, &key, &id).unwrap())
    }

    fn request(&self) -> Mint {
        let (proof, body) = self.0.prepare().unwrap().into_request();
        Mint { proof, body }
    }
}

impl Mint {
    fn send(&self, deploy: &Deploy) -> Answer {
        self.send_to(&deploy.url(), &[])
    }

    fn send_to(&self, url: &str, arguments: &[&str]) -> Answer {
        let proof = format!("DPoP: {}", self.proof);
        let mut all = vec!["-H", &proof, "-H", "Content-Type: application/json", "-d", &self.body];
        all.extend(arguments);
        curl(&format!("{url}/v1/auth/token"), &all)
    }
}

fn assert_replayed(answer: &Answer) {
    assert_eq!(answer.expect(401)["detail"], REPLAYED);
}

fn assert_unguarded(answer: &Answer) {
    assert_eq!(answer.expect(503)["detail"], UNGUARDED);
}

/// Waits until `/readyz` answers `status`, and tells its checks.
fn ready(deploy: &Deploy, status: u16) -> Value {
    let body = wait_for(&format!("/readyz to answer {status}"), || {
        let answer = deploy.get("/readyz");
        (answer.status == status).then(|| answer.json())
    });
    body["checks"].clone()
}

fn times_logged(deploy: &Deploy, message: &str) -> usize {
    let said = |line: &&Value| line["message"].as_str().is_some_and(|text| text.starts_with(message));
    deploy.log_since_start().iter().filter(said).count()
}

#[test]
fn what_one_replica_has_burnt_every_other_refuses() {
    let redis_url = required_environment("MASTIO_TEST_REDIS_URL");
    let mut one = Deploy::empty().set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE);
    one.start();
    one.stop();
    let mut one = one.on(Database::Postgres).set("MCP_PROXY_REDIS_URL", &redis_url);
    one.start();
    let mut two = Deploy::empty()
        .set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE)
        .set("MCP_PROXY_DATABASE_URL", one.database_url().unwrap())
        .set("MCP_PROXY_PROXY_PUBLIC_URL", &one.url())
        .set("MCP_PROXY_REDIS_URL", &redis_url);
    two.start();
    for replica in [&one, &two] {
        assert_eq!(ready(replica, 200)["redis"], "ok");
    }
    let minter = Minter::new(&one);

    let first = minter.request();
    first.send(&one).expect(200);
    assert_replayed(&first.send(&two));
    assert_replayed(&first.send(&one));
    // Redis remembers what a database has lost.
    one.sql("DELETE FROM used_jwt_ids");
    assert_replayed(&first.send(&two));

    // The database remembers what Redis has lost.
    let second = minter.request();
    second.send(&two).expect(200);
    run(Command::new("redis-cli").args(["-u", &redis_url, "flushdb"]));
    assert_replayed(&second.send(&one));

    // Of many at once, one.
    for _ in 0..5 {
        let (mint, urls) = (minter.request(), [one.url(), two.url()]);
        let statuses: Vec<u16> = std::thread::scope(|scope| {
            let sent: Vec<_> = (0..8)
                .map(|number| {
                    let (mint, url) = (&mint, &urls[number % 2]);
                    scope.spawn(move || mint.send_to(url, &[]).status)
                })
                .collect();
            sent.into_iter().map(|sent| sent.join().unwrap()).collect()
        });
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == 401).count(), 7, "{statuses:?}");
    }
}

#[test]
fn without_redis_nothing_is_minted_and_with_it_everything_again_without_a_restart() {
    let mut redis = Redis::started();
    let mut deploy = Deploy::empty().set("MCP_PROXY_REDIS_URL", &redis.url());
    deploy.start();
    let minter = Minter::new(&deploy);
    minter.request().send(&deploy).expect(200);
    assert_eq!(times_logged(&deploy, "redis_"), 0);

    redis.kill();
    let refused = minter.request();
    assert_unguarded(&refused.send(&deploy));
    let headers = refused.send_to(&deploy.url(), &["-D", "-", "-o", "/dev/null"]).body;
    assert!(headers.to_ascii_lowercase().contains("retry-after: 1"), "{headers}");
    let checks = ready(&deploy, 503);
    assert_eq!(checks["redis"], "unreachable");
    assert_eq!(checks["database"], "ok");
    assert_unguarded(&refused.send(&deploy));
    let counter = r#"cullis_token_refusals_total{reason="replay_protection_unavailable"}"#;
    assert_eq!(deploy.metric(counter), Some(3.0), "{}", deploy.get("/metrics").body);
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM audit_events WHERE event_type = 'auth.token_issued'"), "1");
    assert_eq!(times_logged(&deploy, "redis_unreachable"), 1, "{}", deploy.log_text());
    // What uses nothing up goes on.
    deploy.get("/healthz").expect(200);
    deploy.admin_get("/v1/admin/agents").expect(200);

    redis.start();
    assert_eq!(ready(&deploy, 200)["redis"], "ok");
    refused.send(&deploy).expect(200);
    assert_replayed(&refused.send(&deploy));

    // One that is full answers a ping, and takes no claims.
    run(&mut redis.cli(&["config", "set", "maxmemory", "1"]));
    ready(&deploy, 503);
    let refused = minter.request();
    assert_unguarded(&refused.send(&deploy));
    run(&mut redis.cli(&["config", "set", "maxmemory", "0"]));
    ready(&deploy, 200);
    refused.send(&deploy).expect(200);

    // One that hangs is away as well.
    redis.signal("-STOP");
    assert_unguarded(&minter.request().send(&deploy));
    ready(&deploy, 503);
    redis.signal("-CONT");
    ready(&deploy, 200);
    minter.request().send(&deploy).expect(200);

    // Each outage is said, and its end; the password never.
    let said = ["redis_unreachable", "redis_reachable"].map(|message| times_logged(&deploy, message));
    assert!(said[0] >= 3 && said[0] == said[1], "{said:?}: {}", deploy.log_text());
    assert!(!deploy.log_text().contains(PASSWORD));
    assert!(!deploy.mastio_ok(&["config"]).contains(PASSWORD));
}

#[test]
fn a_server_whose_redis_is_away_starts_and_says_so() {
    let mut redis = Redis::stopped();
    let mut deploy = Deploy::empty().set("MCP_PROXY_REDIS_URL", &redis.url());
    deploy.start();
    assert_eq!(ready(&deploy, 503)["redis"], "unreachable");
    let minter = Minter::new(&deploy);
    let mint = minter.request();
    assert_unguarded(&mint.send(&deploy));
    redis.start();
    ready(&deploy, 200);
    mint.send(&deploy).expect(200);
    assert_eq!(redis.claims(), 2, "the proof's and the assertion's");

    // A server that may not write there says so too, and nothing of the password.
    redis.kill();
    let wrong = redis.url().replace(PASSWORD, "another-password");
    redis.start();
    deploy.stop();
    let mut deploy = deploy.set("MCP_PROXY_REDIS_URL", &wrong);
    deploy.start();
    ready(&deploy, 503);
    assert!(!deploy.log_text().contains("another-password"), "{}", deploy.log_text());
    let refused =
        Deploy::empty().set("MCP_PROXY_REDIS_URL", "redis://:hunter2@redis/zero").mastio(&["serve"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("MCP_PROXY_REDIS_URL") && !said.contains("hunter2"), "{said}");
}

#[test]
fn a_mint_that_a_halt_overtakes_gives_its_claims_back() {
    let redis = Redis::started();
    let mut deploy = Deploy::empty().set("MCP_PROXY_REDIS_URL", &redis.url());
    deploy.start();
    let mint = Minter::new(&deploy).request();

    // An operator engages a halt and holds the lock, so that the mint is signed and claimed, and waits to be recorded.
    let mut sqlite = Command::new("sqlite3")
        .args(["-cmd", ".timeout 20000"])
        .arg(deploy.sqlite_file())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, output) = (sqlite.stdin.take().unwrap(), sqlite.stdout.take().unwrap());
    writeln!(
        input,
        "BEGIN IMMEDIATE; INSERT INTO pending_updates (migration_id, detected_at, status) \
         VALUES ('2026-01-01-other', '2026-01-01T00:00:00Z', 'pending'); SELECT 'locked';"
    )
    .unwrap();
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    let answer = std::thread::scope(|scope| {
        let sent = scope.spawn(|| mint.send(&deploy));
        wait_for("the claims", || (redis.claims() == 2).then_some(()));
        writeln!(input, "COMMIT;").unwrap();
        drop(input);
        assert!(sqlite.wait().unwrap().success());
        sent.join().unwrap()
    });
    let detail = answer.expect(503)["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with("signing halted"), "{detail}");
    assert_eq!(redis.claims(), 0);

    // The same request is good when the halt is over.
    deploy.sql("UPDATE pending_updates SET status = 'rolled_back'");
    deploy.wait_for_log("the end of the halt", |line| line["message"] == "cullis_proxy_sign_halt_lifted");
    mint.send(&deploy).expect(200);
    assert_replayed(&mint.send(&deploy));
    assert_eq!(redis.claims(), 2);
}

#[test]
fn the_gateway_serves_nobody_without_redis_and_the_same_token_again_with_it() {
    let mut redis = Redis::started();
    let mut deploy = Deploy::empty().set("MCP_PROXY_REDIS_URL", &redis.url());
    deploy.start();
    let Minter(mut agent) = Minter::new(&deploy);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(agent.login()).unwrap();
    runtime.block_on(agent.list_tools()).unwrap();
    redis.kill();
    match runtime.block_on(agent.list_tools()) {
        Err(AgentError::Refused { status: 503, detail, .. }) => {
            assert_eq!(detail, "replay protection is not available: try again");
        }
        other => panic!("{other:?}"),
    }
    redis.start();
    ready(&deploy, 200);
    runtime.block_on(agent.list_tools()).unwrap();
}

#[test]
fn redis_is_reached_over_tls_with_a_ca_of_the_operator_s_own() {
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let config = "[req]\ndistinguished_name = name\n[name]\n[ca]\nbasicConstraints = critical, CA:TRUE\n\
                  keyUsage = critical, keyCertSign\n[leaf]\nbasicConstraints = critical, CA:FALSE\n\
                  subjectAltName = DNS:localhost\n";
    fs::write(file("openssl.cnf"), config).unwrap();
    let certify = |name: &str, extra: &[&str]| {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
        command.args(["-days", "2", "-config", &file("openssl.cnf"), "-extensions", name]);
        command.args(["-subj", &format!("/CN={name}"), "-keyout", &file(&format!("{name}.key"))]);
        run(command.args(["-out", &file(&format!("{name}.crt"))]).args(extra));
    };
    certify("ca", &[]);
    certify("leaf", &["-CA", &file("ca.crt"), "-CAkey", &file("ca.key")]);
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "redis-server", "--bind", "127.0.0.1", "--port", "0", "--tls-port"]);
    command.arg(port.to_string()).args(["--tls-cert-file", &file("leaf.crt")]);
    command.args(["--tls-key-file", &file("leaf.key"), "--tls-auth-clients", "no", "--save", ""]);
    command.args(["--tls-ca-cert-file", &file("ca.crt"), "--dir", &file("")]);
    let mut server = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();

    let url = format!("rediss://localhost:{port}");
    let mut deploy = Deploy::empty().set("MCP_PROXY_REDIS_URL", &url);
    deploy.start_with(&[("SSL_CERT_FILE", &file("ca.crt"))]);
    assert_eq!(ready(&deploy, 200)["redis"], "ok");
    Minter::new(&deploy).request().send(&deploy).expect(200);
    deploy.stop();
    // A certificate of nobody whom the machine trusts is refused.
    certify("ca", &[]);
    deploy.start_with(&[("SSL_CERT_FILE", &file("ca.crt"))]);
    assert_eq!(ready(&deploy, 503)["redis"], "unreachable");
    server.kill().unwrap();
    server.wait().unwrap();
}
