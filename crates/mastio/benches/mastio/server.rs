//! The real binary as a process of its own, on a legacy database in a temporary directory.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Failure;

/// The admin secret of every server that is measured.
pub const ADMIN_SECRET: &str = "benchmark-admin-secret-0123456789";
/// Longer than any start on any machine.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// The kernel's clock ticks a second in `/proc/<pid>/stat`, on every Linux of the last twenty years.
const TICKS_PER_S: f64 = 100.0;

/// A legacy deploy in a temporary directory: its database, its CA and a few agents' files.
pub struct Deploy {
    /// Agents in the database.
    pub agents: u32,
    /// The CA file that agents pin.
    pub ca_pem: String,
    /// Certificate and key of a few agents, with their ids.
    pub files: Vec<AgentFiles>,
    folder: tempfile::TempDir,
}

/// What one agent has on disk.
pub struct AgentFiles {
    /// `org::name`.
    pub agent_id: String,
    /// Its certificate.
    pub certificate: String,
    /// Its key.
    pub private_key: String,
}

/// Has the project's generator make a legacy database with its keys. False where the generator is not at hand.
fn generate(agents: u32, database: &Path, keys: &Path) -> Result<bool, Failure> {
    let shared = std::env::var_os("MASTIO_SHARED").map(PathBuf::from);
    let generator = shared.map(|shared| shared.join("fixtures/make_legacy_db.py"));
    let Some(generator) = generator.filter(|path| path.exists()) else { return Ok(false) };
    std::fs::create_dir_all(keys)?;
    // Renamed when it is whole: what an interrupted generator leaves must not be taken for a deploy.
    let unfinished = database.with_extension("unfinished");
    let made = Command::new("python3")
        .arg(generator)
        .arg(&unfinished)
        .args(["--agents", &agents.to_string(), "--org", "acme", "--jobs", "2"])
        // As the predecessor's own databases; the generator's default makes smaller files.
        .args(["--page-size", "4096", "--keys-dir"])
        .arg(keys)
        .stdout(Stdio::null())
        .status()?;
    if !made.success() {
        return Err("the generator of legacy databases failed".into());
    }
    std::fs::rename(unfinished, database)?;
    Ok(true)
}

impl Deploy {
    /// Lays a legacy deploy out: the bundled one for five agents, otherwise by the project's generator. `None` where
    /// the generator's folder is not at hand.
    pub fn new(agents: u32) -> Result<Option<Self>, Failure> {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("data");
        std::fs::create_dir(&data)?;
        let database = data.join("mcp_proxy.db");
        let keys = if agents == 5 {
            let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo");
            std::fs::copy(bundled.join("mcp_proxy.db"), &database)?;
            bundled.join("keys")
        } else {
            // Generating takes minutes: done once where a folder to keep deploys in is named.
            let kept = std::env::var_os("MASTIO_BENCH_DEPLOYS").map(PathBuf::from);
            let kept = kept.unwrap_or_else(|| folder.path().to_owned()).join(agents.to_string());
            let (made, keys) = (kept.join("mcp_proxy.db"), kept.join("keys"));
            if !made.exists() && !generate(agents, &made, &keys)? {
                return Ok(None);
            }
            std::fs::copy(made, &database)?;
            keys
        };
        let mut names: Vec<_> = std::fs::read_dir(&keys)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".key").map(str::to_owned))
            .filter(|name| name.starts_with("agent-"))
            .collect();
        names.sort();
        let files = names
            .iter()
            .map(|name| {
                Ok::<_, Failure>(AgentFiles {
                    agent_id: format!("acme::{name}"),
                    certificate: std::fs::read_to_string(keys.join(format!("{name}.crt")))?,
                    private_key: std::fs::read_to_string(keys.join(format!("{name}.key")))?,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let ca_pem = std::fs::read_to_string(keys.join("org-ca.crt"))?;
        Ok(Some(Self { agents, ca_pem, files, folder }))
    }

    /// Its database file.
    pub fn database(&self) -> PathBuf {
        self.folder.path().join("data/mcp_proxy.db")
    }

    /// Starts the binary on it and waits until it listens.
    pub fn start(&self) -> Result<Server, Failure> {
        let begun = Instant::now();
        // Another build of the binary may be named, to compare the two with the same client.
        let binary = std::env::var_os("MASTIO_BENCH_BINARY");
        let mut child = Command::new(binary.as_deref().unwrap_or(OsStr::new(env!("CARGO_BIN_EXE_mastio"))))
            .arg("serve")
            .env_clear()
            .env("MCP_PROXY_DATA_DIR", self.folder.path().join("data"))
            .env("MCP_PROXY_LISTEN", "127.0.0.1:0")
            .env("MCP_PROXY_ADMIN_SECRET", ADMIN_SECRET)
            .env("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0")
            .env("MCP_PROXY_INTERNAL_HOST_ALLOWLIST", "127.0.0.1")
            .env("LOG_FORMAT", "json")
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().ok_or("the server has no standard error")?;
        let (log, (sender, listening)) = (Arc::new(Mutex::new(Vec::new())), mpsc::channel());
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let at = Instant::now();
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if value["message"] == "listening" {
                    // Nobody waits any more when the start has timed out.
                    let _gone = sender.send((at, value["url"].as_str().unwrap_or_default().to_owned()));
                }
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(value);
            }
        });
        let Ok((at, url)) = listening.recv_timeout(START_TIMEOUT) else {
            child.kill()?;
            let log = log.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(format!("the server did not start: {:?}", log.last()).into());
        };
        let port = url.rsplit(':').next().unwrap_or_default().parse()?;
        Ok(Server { child, port, url, log, started_in: at - begun })
    }
}

/// A server that listens. Dropping it kills it.
pub struct Server {
    child: Child,
    /// Its port on this machine.
    pub port: u16,
    /// Its URL.
    pub url: String,
    /// From exec to listening.
    pub started_in: Duration,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Server {
    /// What it has logged under this message.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().filter(|line| line["message"] == message).cloned().collect()
    }

    /// A size in `/proc/<pid>/status`, in MiB: `VmRSS`, `VmHWM`.
    pub fn memory_mib(&self, name: &str) -> Result<f64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib: f64 = line.and_then(|line| line.split_whitespace().next()).ok_or("no such size")?.parse()?;
        Ok(kib / 1024.0)
    }

    /// Processor time that it has used so far.
    pub fn cpu_s(&self) -> Result<f64, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The second field, the name, may hold spaces; it ends at the last parenthesis.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks =
            |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        Ok((ticks(11) + ticks(12)) / TICKS_PER_S)
    }

    /// Ends it as an operator does and waits.
    pub fn stop(mut self) -> Result<(), Failure> {
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone after `stop`.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
