//! One deploy with a world of its own: a data directory, a database, a port, and the real binary on it.
//!
//! Where the deploy of `harness` has its server in it, this one and its servers are apart: a test copies a deploy as
//! it lies, and starts on it what will crash.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::process::{self, Log, Process};
pub use crate::harness::{
    ADMIN_SECRET, Answer, MIGRATION, PASSPHRASE, required_environment as variable, run as output,
};
use crate::harness::{create_database, drop_database, psql, run_with_input, sqlite3};

/// The shared folder with the predecessor's databases.
pub fn legacy(path: &str) -> PathBuf {
    let shared = variable("MASTIO_SHARED");
    Path::new(&shared).join("fixtures/legacy").join(path)
}

/// Runs a program of the system to its end, whatever that is.
pub fn run(command: &mut Command) -> Output {
    run_with_input(command, "")
}

/// Copies a folder's files.
fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Which database a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    Sqlite,
    Postgres,
}

impl On {
    pub const BOTH: [Self; 2] = [Self::Sqlite, Self::Postgres];

    /// As tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite",
            Self::Postgres => "PostgreSQL",
        }
    }
}

#[derive(Clone)]
enum Database {
    Sqlite,
    Postgres(String),
}

/// A deploy on disk. Whoever holds it may start the server on it, one after the other.
pub struct Deploy {
    folder: TempDir,
    database: Database,
    passphrase: Option<&'static str>,
    variable: Option<(&'static str, &'static str)>,
}

impl Deploy {
    /// An empty data directory: the first boot creates an organisation.
    pub fn fresh() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            database: Database::Sqlite,
            passphrase: None,
            variable: None,
        }
    }

    /// A copy of a legacy database.
    pub fn of_file(path: &Path) -> Self {
        let deploy = Self::fresh();
        assert!(path.exists(), "{} is missing: run through ./test", path.display());
        std::fs::copy(path, deploy.file()).unwrap();
        deploy
    }

    /// A copy of a fixture of the shared folder.
    pub fn of(fixture: &str) -> Self {
        Self::of_file(&legacy(&format!("{fixture}.db")))
    }

    /// Sealed under a passphrase instead of a key file.
    pub fn with_passphrase(self) -> Self {
        self.with_passphrase_of(Some(PASSPHRASE))
    }

    /// Started with that passphrase, or with none.
    pub fn with_passphrase_of(mut self, passphrase: Option<&'static str>) -> Self {
        self.passphrase = passphrase;
        self
    }

    /// With a variable of its own in the environment.
    pub fn with_variable(mut self, name: &'static str, value: &'static str) -> Self {
        self.variable = Some((name, value));
        self
    }

    /// A copy of everything, on the same kind of database. No server may run on `self`.
    pub fn copy(&self) -> Self {
        self.copy_to(tempfile::tempdir().unwrap())
    }

    /// The same in `folder`.
    pub fn copy_to(&self, folder: TempDir) -> Self {
        copy_files(self.folder.path(), folder.path());
        let database = match &self.database {
            Database::Sqlite => Database::Sqlite,
            Database::Postgres(url) => {
                let (_, template) = url.rsplit_once('/').unwrap();
                Database::Postgres(create_database(&format!("TEMPLATE {template}")))
            }
        };
        Self { folder, database, passphrase: self.passphrase, variable: self.variable }
    }

    /// The same deploy on `on`. A legacy file gets to PostgreSQL as an operator's does: adopted where it lies, sealed
    /// under a passphrase, then copied.
    pub fn on(self, on: On) -> Self {
        match on {
            On::Sqlite => self,
            On::Postgres => {
                let deploy = self.with_passphrase();
                deploy.start().stop();
                deploy.on_postgres()
            }
        }
    }

    /// The same deploy, adopted, moved to a PostgreSQL database of its own. Needs a passphrase.
    pub fn on_postgres(self) -> Self {
        self.on_postgres_with("")
    }

    /// The same, the database made with `options`.
    pub fn on_postgres_with(self, options: &str) -> Self {
        let url = create_database(options);
        let copied = run(self.mastio(&["database", "copy"]).args(["--to", &url]));
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        let folder = tempfile::tempdir().unwrap();
        Self {
            folder,
            database: Database::Postgres(url),
            passphrase: self.passphrase,
            variable: self.variable,
        }
    }

    /// Another process's place on the same PostgreSQL database, with a data directory of its own.
    pub fn replica(&self) -> Self {
        assert!(matches!(self.database, Database::Postgres(_)), "a file has one server");
        let folder = tempfile::tempdir().unwrap();
        Self { folder, database: self.database.clone(), passphrase: self.passphrase, variable: self.variable }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The SQLite file.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("mcp_proxy.db")
    }

    /// The binary with this deploy's settings.
    pub fn mastio(&self, arguments: &[&str]) -> Command {
        let mut command = process::mastio();
        command
            .args(arguments)
            .env_clear()
            .current_dir(self.folder.path())
            .env("MCP_PROXY_ADMIN_SECRET", ADMIN_SECRET)
            .env("MCP_PROXY_DATA_DIR", self.folder.path())
            .env("MCP_PROXY_LISTEN", "127.0.0.1:0")
            .env("LOG_FORMAT", "json");
        if let Database::Postgres(url) = &self.database {
            command.env("MCP_PROXY_DATABASE_URL", url);
        }
        command.envs(self.variable);
        if let Some(passphrase) = self.passphrase {
            command.env("MCP_PROXY_DB_ENCRYPTION_KEY", passphrase);
        }
        command
    }

    /// Starts the server and waits until it listens.
    pub fn start(&self) -> Server {
        self.start_with(&[]).unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"))
    }

    /// Starts the server so that it dies at a crash point.
    pub fn start_to_crash_at(&self, point: &str) -> Server {
        self.start_with(&[("MASTIO_CRASH_AT", point)])
            .unwrap_or_else(|(status, log)| panic!("no boot ({status}): {log}"))
    }

    /// Starts the server; what it wrote, where it did not come up.
    pub fn start_with(&self, variables: &[(&str, &str)]) -> Result<Server, (ExitStatus, String)> {
        let log = Log::default();
        let mut process = Process::start(self.mastio(&["serve"]).envs(variables.iter().copied()), &log);
        match process.listening() {
            Ok(line) => Ok(Server { process, url: line["url"].as_str().unwrap().to_owned(), log }),
            Err(status) => Err((status, log.text())),
        }
    }

    /// Starts the server so that a write beyond a file size limit is an error to it, as on a disk that fails, and not its
    /// end: that is what the limit's signal would be.
    pub fn start_ignoring_the_size_signal(&self, variables: &[(&str, &str)]) -> Server {
        let server = self.mastio(&["serve"]);
        let mut command = Command::new("env");
        command.arg("--ignore-signal=XFSZ").arg(server.get_program()).args(server.get_args());
        command.env_clear().current_dir(self.folder.path()).envs(variables.iter().copied());
        command.env("PATH", std::env::var_os("PATH").unwrap());
        command.envs(server.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let log = Log::default();
        let mut process = Process::start(&mut command, &log);
        let line = process.listening().unwrap_or_else(|status| panic!("no boot ({status}): {}", log.text()));
        Server { process, url: line["url"].as_str().unwrap().to_owned(), log }
    }

    /// The address of its PostgreSQL database.
    pub fn url(&self) -> &str {
        match &self.database {
            Database::Sqlite => panic!("a file has no address"),
            Database::Postgres(url) => url,
        }
    }

    /// Rows of a query, asked by the database's own command line, as an operator would.
    pub fn rows(&self, sql: &str) -> Vec<Value> {
        match &self.database {
            Database::Sqlite => {
                let mut command = Command::new("sqlite3");
                command.args(["-json", "-cmd", ".timeout 10000"]).arg(self.file()).arg(sql);
                let text = output(&mut command);
                if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text).unwrap() }
            }
            Database::Postgres(url) => {
                let text = psql(url, &format!("SELECT row_to_json(t) FROM ({sql}) t"));
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
            }
        }
    }

    /// One number.
    pub fn count(&self, sql: &str) -> i64 {
        self.rows(&format!("SELECT ({sql}) AS n"))[0]["n"].as_i64().unwrap()
    }

    /// Statements of an operator, in one transaction that holds its locks from the first of them on.
    pub fn execute(&self, sql: &str) -> String {
        match &self.database {
            Database::Sqlite => sqlite3(&self.file(), &format!("BEGIN IMMEDIATE; {sql}; COMMIT;")),
            // Statements that come together are one transaction.
            Database::Postgres(url) => psql(url, sql),
        }
    }

    /// Has the binary verify the audit chain; a running server is asked, otherwise the database is opened.
    pub fn audit_verifies(&self) {
        let verified = run(&mut self.mastio(&["audit", "verify"]));
        assert!(verified.status.success(), "audit verify: {}", String::from_utf8_lossy(&verified.stderr));
    }
}

impl Drop for Deploy {
    fn drop(&mut self) {
        if let Database::Postgres(url) = &self.database {
            drop_database(url);
        }
    }
}

/// A server that runs. Dropped: killed.
pub struct Server {
    process: Process,
    pub url: String,
    log: Log,
}

impl Server {
    /// One request by curl, with the admin secret where `secret` has one.
    pub fn request(&self, method: &str, path: &str, secret: Option<&str>, body: Option<&str>) -> Answer {
        request(&self.url, method, path, secret, body)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, Some(ADMIN_SECRET), None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, Some(ADMIN_SECRET), Some(&body.to_string()))
    }

    pub fn apply(&self) -> Answer {
        self.post(&format!("/proxy/updates/{MIGRATION}/apply"), &json!({ "confirm": true }))
    }

    pub fn rollback(&self) -> Answer {
        self.post(&format!("/proxy/updates/{MIGRATION}/rollback"), &json!({ "confirm": true }))
    }

    pub fn health(&self) -> Value {
        self.get("/healthz").json()
    }

    /// The migration's item of the list, where there is one.
    pub fn item(&self) -> Option<Value> {
        let list = self.get("/proxy/updates/api").json();
        list.as_array().unwrap().iter().find(|item| item["migration_id"] == MIGRATION).cloned()
    }

    /// The halt as the gauge tells it.
    pub fn halted(&self) -> bool {
        let metrics = self.get("/metrics").body;
        let line = metrics.lines().find(|line| line.starts_with("cullis_mastio_sign_halted ")).unwrap();
        line.ends_with(" 1")
    }

    /// The roots that clients are told to pin.
    pub fn ca(&self) -> String {
        self.request("GET", "/pki/ca.crt", None, None).body
    }

    /// Log events so far.
    pub fn log(&self) -> Vec<Value> {
        self.log.lines()
    }

    /// The first log event whose message contains `text`.
    pub fn logged(&self, text: &str) -> Option<Value> {
        self.log().into_iter().find(|event| event["message"].as_str().is_some_and(|m| m.contains(text)))
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.process.kill9();
    }

    /// SIGTERM, and the clean end that it asks for.
    pub fn stop(mut self) {
        self.process.stop();
    }

    /// Waits for a process that dies by itself.
    pub fn dies(mut self) -> Vec<Value> {
        let status = self.process.wait_for_its_end();
        assert!(!status.success(), "the server ended well, and had to crash");
        self.log()
    }
}

/// One request by curl, the body as it stands. Status 0: the connection broke.
pub fn request(url: &str, method: &str, path: &str, secret: Option<&str>, body: Option<&str>) -> Answer {
    let mut command = Command::new("curl");
    command.args(["-sk", "--max-time", "120", "-X", method, "-w", "\n%{http_code}"]);
    if let Some(secret) = secret {
        command.args(["-H", &format!("X-Admin-Secret: {secret}")]);
    }
    if body.is_some() {
        command.args(["-H", "Content-Type: application/json", "--data-binary", "@-"]);
    }
    let output = run_with_input(command.arg(format!("{url}{path}")), body.unwrap_or_default());
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    Answer { status: status.parse().unwrap(), body: body.to_owned() }
}
