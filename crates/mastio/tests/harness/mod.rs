//! What the black-box tests stand on: the real binary in a directory of its own, and the real tools around it.
//!
//! A [`Deploy`] is what an operator has: a working directory with `proxy.env` and `data/`, a server started there and
//! its log. It is looked at from outside only: by curl, by SQL, by the command line, by agents built on the SDK.
//! Whatever a test starts dies with the test: [`Drop`] ends it, and the kernel does if the test itself is killed.
// Each test file compiles this module for itself and uses its own part of it.
#![allow(dead_code)]

pub mod forge;
pub mod process;
pub mod sdk;

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use process::{Log, Process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The page's own example.
pub const MIGRATION: &str = "2026-04-23-org-ca-pathlen-1";
/// What the operator's `proxy.env` has.
pub const ADMIN_SECRET: &str = "an-admin-secret-for-the-tests-0123456789";
/// What seals keys where the database is PostgreSQL, and what the predecessor's `py_encrypted` was made with.
pub const PASSPHRASE: &str = "peer-test-passphrase-0123456789abcdef";
/// How long anything that should happen may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A variable that `./test` sets. A test without it fails: nothing is skipped in silence.
pub fn required_environment(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run through ./test"))
}

/// The folder with the predecessor's databases and the page, or nothing where the machine has none.
///
/// Panics without it where `CI=true`: there nothing may be left out.
pub fn shared() -> Option<PathBuf> {
    let folder = std::env::var_os("MASTIO_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    if folder.join("fixtures/legacy").is_dir() {
        return Some(folder);
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "CI needs the shared folder beside the repository, or MASTIO_SHARED"
    );
    println!("LEFT OUT: no shared folder with the predecessor's databases (MASTIO_SHARED)");
    None
}

/// Which database a deploy stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Database {
    /// The file in the data directory.
    Sqlite,
    /// A database of the test's own in the server that `./test` runs.
    Postgres,
    /// The database `cullis` in that server, by the name that the page's psql line has. For one test at a time.
    PostgresByPageName,
}

/// What a program answered over HTTP.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// The body, if the status is `status`.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        if self.body.is_empty() { Value::Null } else { self.json() }
    }

    /// Why it was refused.
    pub fn detail(&self) -> Value {
        self.json()["detail"].clone()
    }
}

/// An operator's deploy: a working directory, and a server in it or not.
pub struct Deploy {
    folder: TempDir,
    database: Database,
    database_url: Option<String>,
    port: u16,
    settings: Vec<(String, String)>,
    server: Option<Process>,
    log: Log,
    /// How many log lines there were when the last server started.
    log_start: usize,
}

impl Deploy {
    /// A deploy on the legacy database `name` of the shared folder, not started; nothing without that folder.
    pub fn legacy(name: &str) -> Option<Self> {
        let fixture = shared()?.join("fixtures/legacy").join(format!("{name}.db"));
        assert!(fixture.is_file(), "no legacy database {}", fixture.display());
        Some(Self::on_file(&fixture))
    }

    /// A deploy on a copy of `file`, not started.
    pub fn on_file(file: &Path) -> Self {
        let deploy = Self::empty();
        fs::copy(file, deploy.sqlite_file()).unwrap();
        fs::set_permissions(deploy.sqlite_file(), fs::Permissions::from_mode(0o600)).unwrap();
        deploy
    }

    /// A deploy without a database yet.
    pub fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        Self {
            folder,
            database: Database::Sqlite,
            database_url: None,
            port: 0,
            settings: vec![
                ("MCP_PROXY_ADMIN_SECRET".to_owned(), ADMIN_SECRET.to_owned()),
                ("MCP_PROXY_INTERNAL_HOST_ALLOWLIST".to_owned(), "127.0.0.1".to_owned()),
                ("LOG_FORMAT".to_owned(), "json".to_owned()),
            ],
            server: None,
            log: Log::default(),
            log_start: 0,
        }
    }

    /// Sets `name` in `proxy.env`, from the next start on.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Serves on `port` rather than on one that the system picks, if nobody else has it.
    pub fn listening_on_if_free(mut self, port: u16) -> Self {
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            self.port = port;
        }
        self
    }

    /// Puts the deploy on `database`. A legacy state gets to PostgreSQL as an operator's does: adopted where it lies,
    /// its keys sealed under the passphrase, then copied by `mastio database copy`.
    pub fn on(self, database: Database) -> Self {
        let url = match database {
            Database::Sqlite => return self,
            Database::Postgres => create_database(""),
            Database::PostgresByPageName => {
                let url = required_environment("MASTIO_TEST_POSTGRES_URL");
                let name = url.rsplit_once('/').map(|(_, name)| name);
                assert_eq!(
                    name,
                    Some("cullis"),
                    "the page's psql line names the database cullis: run through ./test"
                );
                psql(&url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public");
                url
            }
        };
        let mut deploy = self.set("MCP_PROXY_DB_ENCRYPTION_KEY", PASSPHRASE);
        // A file that is there is adopted, and without one a new organisation begins.
        deploy.start();
        deploy.stop();
        deploy.mastio_ok(&["database", "copy", "--to", &url]);
        // What serves from here on is PostgreSQL alone.
        fs::rename(deploy.sqlite_file(), deploy.data_dir().join("left-behind.db")).unwrap();
        deploy.database = database;
        deploy.database_url = Some(url.clone());
        deploy.set("MCP_PROXY_DATABASE_URL", &url)
    }

    /// Starts the server and waits until it listens.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// Starts the server with `environment` beside `proxy.env` and waits until it listens.
    pub fn start_with(&mut self, environment: &[(&str, &str)]) {
        self.spawn(environment);
        let listening = self.server.as_mut().unwrap().listening();
        let listening = listening.unwrap_or_else(|status| panic!("no boot ({status}):\n{}", self.log_text()));
        let address = listening["address"].as_str().unwrap();
        self.port = address.rsplit_once(':').unwrap().1.parse().unwrap();
    }

    /// Starts the server and waits until it has ended by itself. Returns its exit code (nothing after a signal).
    pub fn start_and_wait_for_its_end(&mut self, environment: &[(&str, &str)]) -> Option<i32> {
        self.spawn(environment);
        self.wait_for_its_end()
    }

    fn spawn(&mut self, environment: &[(&str, &str)]) {
        assert!(self.server.is_none(), "the server runs already");
        self.write_settings();
        let mut command = process::mastio();
        command.arg("serve");
        let server = Process::start(self.here(command).envs(environment.iter().copied()), &self.log);
        self.log_start = server.log_start();
        self.server = Some(server);
    }

    fn write_settings(&self) {
        let mut text = format!("MCP_PROXY_LISTEN=127.0.0.1:{}\n", self.port);
        for (name, value) in &self.settings {
            text.push_str(&format!("{name}={value}\n"));
        }
        fs::write(self.folder.path().join("proxy.env"), text).unwrap();
    }

    /// `command` in the working directory, without any setting of the machine that runs the test.
    fn here(&self, mut command: Command) -> Command {
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let a_setting =
                ["MCP_PROXY_", "CULLIS_", "MASTIO_"].iter().any(|prefix| text.starts_with(prefix));
            if a_setting || text == "LOG_FORMAT" || text == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        command.current_dir(self.folder.path());
        command
    }

    /// Waits until the server has ended by itself. Returns its exit code (nothing after a signal).
    pub fn wait_for_its_end(&mut self) -> Option<i32> {
        self.server.take().expect("a server").wait_for_its_end().code()
    }

    /// Ends the server as an operator does, by SIGTERM, and waits until it has drained.
    pub fn stop(&mut self) {
        self.server.take().expect("a server").stop();
    }

    /// Ends the server as a power cut does.
    pub fn kill9(&mut self) {
        self.server.take().expect("a server").kill9();
    }

    /// Stops the server and starts it again, at the address that its agents know.
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Where the server is, by the name in its certificate.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// The port that the server has.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The working directory.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// `MCP_PROXY_DATA_DIR`.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The SQLite database file.
    pub fn sqlite_file(&self) -> PathBuf {
        self.data_dir().join("mcp_proxy.db")
    }

    /// What the deploy stands on.
    pub fn database(&self) -> Database {
        self.database
    }

    /// The URL of the database, where it is not the file in the data directory.
    pub fn database_url(&self) -> Option<&str> {
        self.database_url.as_deref()
    }

    /// Everything that the servers of this deploy have logged.
    pub fn log(&self) -> Vec<Value> {
        self.log.lines()
    }

    /// What the present server has logged.
    pub fn log_since_start(&self) -> Vec<Value> {
        self.log.lines().split_off(self.log_start)
    }

    /// The log, to be shown when something is wrong.
    pub fn log_text(&self) -> String {
        self.log.text()
    }

    /// Waits for a line of the present server's log.
    pub fn wait_for_log(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.log
            .wait(self.log_start, wanted, DEADLINE)
            .unwrap_or_else(|| panic!("no log line of {what} in:\n{}", self.log_text()))
    }

    /// Runs SQL by hand: with sqlite3 or psql, as an operator does. Rows come one a line, columns joined by `|`.
    pub fn sql(&self, statement: &str) -> String {
        match &self.database_url {
            Some(url) => psql(url, statement),
            None => sqlite3(&self.sqlite_file(), statement),
        }
    }

    /// Runs a command line of the page in bash, in the working directory. `environment` is what the operator has set
    /// before. Returns what it printed; it must end well.
    pub fn bash(&self, line: &str, environment: &[(&str, &str)]) -> String {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", line]).envs(environment.iter().copied());
        let output = self.here(command).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{line}\n{}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `mastio` in the working directory.
    pub fn mastio(&self, arguments: &[&str]) -> Output {
        self.write_settings();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mastio"));
        command.args(arguments);
        self.here(command).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs `mastio`, which must end well. Returns what it printed.
    pub fn mastio_ok(&self, arguments: &[&str]) -> String {
        let output = self.mastio(arguments);
        assert!(output.status.success(), "mastio {arguments:?}\n{}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// One request by curl, `arguments` before the URL.
    pub fn curl(&self, path: &str, arguments: &[&str]) -> Answer {
        curl(&format!("{}{path}", self.url()), arguments)
    }

    /// GET without any credential.
    pub fn get(&self, path: &str) -> Answer {
        self.curl(path, &[])
    }

    /// GET as the administrator.
    pub fn admin_get(&self, path: &str) -> Answer {
        self.curl(path, &["-H", &format!("X-Admin-Secret: {ADMIN_SECRET}")])
    }

    /// POST as the administrator.
    pub fn admin_post(&self, path: &str, body: &Value) -> Answer {
        let secret = format!("X-Admin-Secret: {ADMIN_SECRET}");
        let body = body.to_string();
        self.curl(path, &["-H", &secret, "-H", "Content-Type: application/json", "-X", "POST", "-d", &body])
    }

    /// Applies the page's update.
    pub fn apply(&self) -> Answer {
        self.admin_post(&format!("/proxy/updates/{MIGRATION}/apply"), &json!({ "confirm": true }))
    }

    /// Rolls the page's update back.
    pub fn roll_back(&self) -> Answer {
        self.admin_post(&format!("/proxy/updates/{MIGRATION}/rollback"), &json!({ "confirm": true }))
    }

    /// The value of a metric, named with its labels.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").body;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Whether signing is halted, by the page's gauge.
    pub fn is_halted(&self) -> bool {
        self.metric("cullis_mastio_sign_halted").expect("cullis_mastio_sign_halted") > 0.0
    }

    /// Registers the upstream tool `name` at `endpoint_url` and lets `agents` call it.
    pub fn register_tool(&self, name: &str, endpoint_url: &str, agents: &[&str]) {
        let resource = json!({ "name": name, "endpoint_url": endpoint_url, "auth_type": "none" });
        let resource = self.admin_post("/v1/admin/mcp-resources", &resource).expect(201);
        for agent_id in agents {
            self.let_call(agent_id, resource["resource_id"].as_str().unwrap());
        }
    }

    /// Lets an agent call a registered tool.
    pub fn let_call(&self, agent_id: &str, resource_id: &str) {
        let binding = json!({ "agent_id": agent_id, "resource_id": resource_id, "principal_type": "agent" });
        self.admin_post("/v1/admin/mcp-resources/bindings", &binding).expect(201);
    }
}

impl Drop for Deploy {
    fn drop(&mut self) {
        // Its last lines are in the log then, and nobody uses the database.
        drop(self.server.take());
        if std::thread::panicking() {
            println!("---- log of the server\n{}", self.log_text());
        }
        if let (Database::Postgres, Some(url)) = (self.database, &self.database_url) {
            drop_database(url);
        }
    }
}

/// Creates a database of the test's own in the PostgreSQL that `./test` runs. Returns its URL.
///
/// `options` is the rest of the statement: `TEMPLATE name`, or empty.
pub fn create_database(options: &str) -> String {
    let server_url = required_environment("MASTIO_TEST_POSTGRES_URL");
    let (base, _) = server_url.rsplit_once('/').expect("a database in MASTIO_TEST_POSTGRES_URL");
    let name = format!("e2e_{}", unique());
    psql(&server_url, &format!("CREATE DATABASE {name} {options}"));
    format!("{base}/{name}")
}

/// Drops a database that [`create_database`] made.
pub fn drop_database(url: &str) {
    let (_, name) = url.rsplit_once('/').unwrap_or_default();
    let drop = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
    let server_url = std::env::var("MASTIO_TEST_POSTGRES_URL").unwrap_or_default();
    // The whole server is thrown away at the end; what is left here lives no longer.
    let _dropped = Command::new("psql").args(["-X", "-q", &server_url, "-c", &drop]).output();
}

/// A name that no other test has.
fn unique() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    format!("{}_{}", std::process::id(), now.as_nanos())
}

/// One request by curl to any server, `arguments` before the URL.
pub fn curl(url: &str, arguments: &[&str]) -> Answer {
    let mut command = Command::new("curl");
    command.args(["-sk", "--max-time", "120", "-w", "\n%{http_code}"]);
    let output = run(command.args(arguments).arg(url));
    let (body, status) = output.rsplit_once('\n').unwrap();
    Answer { status: status.parse().unwrap(), body: body.to_owned() }
}

/// A port that nobody has right now, for programs that cannot pick one themselves.
pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Looks until `look` sees something; fails after the deadline, naming `what`.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Runs a program, which must end well. Returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}\n{}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program with `input`, whatever it ends with.
pub fn run_with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn both(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Runs SQL on a SQLite file that a server may have open.
pub fn sqlite3(file: &Path, statement: &str) -> String {
    run(Command::new("sqlite3").args(["-cmd", ".timeout 20000"]).arg(file).arg(statement))
        .trim_end()
        .to_owned()
}

/// Runs SQL on a PostgreSQL database.
pub fn psql(url: &str, statement: &str) -> String {
    run(Command::new("psql").args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", url, "-c", statement]))
        .trim_end()
        .to_owned()
}

/// What `jq -r FILTER` makes of `input`.
pub fn jq(filter: &str, input: &str) -> String {
    let output = run_with_input(Command::new("jq").args(["-r", filter]), input);
    assert!(output.status.success(), "jq {filter} on {input}\n{}", both(&output));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// What `openssl ARGUMENTS` makes of a PEM text.
pub fn openssl(arguments: &[&str], pem: &str) -> String {
    let output = run_with_input(Command::new("openssl").args(arguments), pem);
    assert!(output.status.success(), "openssl {arguments:?} on {pem}\n{}", both(&output));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// The certificates of a PEM text, one each.
pub fn certificates(pem: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----\n";
    let pem = if pem.ends_with('\n') { pem.to_owned() } else { format!("{pem}\n") };
    pem.split_inclusive(END).map(str::to_owned).filter(|part| part.contains("BEGIN CERTIFICATE")).collect()
}
