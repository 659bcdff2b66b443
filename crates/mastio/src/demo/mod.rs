//! `mastio demo`: a broken legacy deploy is adopted, halted, repaired and verified, with live state at each step.
//!
//! The database and the agents' files are bundled; the server is the real one, in this process, on a new data
//! directory; the operator's and the agent's requests are real HTTPS. The agent is built once from its old files and
//! lives through the whole story, which is the point: it is never told that anything changed.

pub mod agent;
mod bundle;
mod upstream;

use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mastio_core::x509::{Certificate, path};
use serde_json::{Value, json};

use crate::app::Running;
use crate::cli::remote::Remote;
use crate::cli::{Direction, Failure, Progress, print, stop_signal, watched_change};
use crate::clock::{Clock as _, SystemClock};
use crate::config::{self, AdminSecret, ENV_FILE, Flags, Resolved, Surroundings};
use crate::entropy::Entropy;
use agent::{AgentClient, AgentError};
use upstream::{TOOL, Upstream};

/// The update that the bundled deploy needs: the page's own example.
const MIGRATION_ID: &str = "2026-04-23-org-ca-pathlen-1";

/// What `mastio demo` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A new directory to run in, kept afterwards; by default a temporary one that is removed at the end.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where to serve HTTPS; port 0 picks one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9443")]
    listen: String,
    /// End after the story instead of serving on.
    #[arg(long)]
    once: bool,
}

/// Tells the story, then serves until Ctrl-C.
pub async fn run(options: Options) -> Result<(), Failure> {
    crate::logging::init(false, "error");
    let folder = Folder::new(options.data_dir)?;
    let resolved = unpack(&folder.path, &options.listen)?;
    let admin_secret = resolved.config.admin_secret.clone();
    let upstream = Upstream::start()
        .await
        .map_err(|error| Failure::because("the demo's MCP server cannot listen", error))?;
    let stopped = stop_signal()?;
    let begun = Instant::now();
    let running = crate::app::start(resolved).await.map_err(|error| {
        Failure::because(
            "the demo's server did not start; if its port is taken, choose another with --listen 127.0.0.1:0",
            error,
        )
    })?;
    let started = begun.elapsed();
    let stage = Stage {
        operator: Remote::new(&running.url, None, &admin_secret)?,
        agent: client(&running, bundle::ORG_CA, 0)?,
        step: 0,
    };
    tokio::pin!(stopped);
    // Ctrl-C ends the story as well as the serving after it.
    let told = tokio::select! {
        told = stage.tell(&running, &upstream, started) => Some(told),
        () = &mut stopped => None,
    };
    let ended = match told {
        Some(Ok(())) if !options.once => {
            let invited = invite(&running, &folder, &admin_secret);
            stopped.await;
            invited
        }
        Some(told) => told,
        None => Ok(()),
    };
    running.stop().await;
    ended
}

/// The directory that the demo runs in.
struct Folder {
    path: PathBuf,
    temporary: bool,
}

impl Folder {
    fn new(given: Option<PathBuf>) -> Result<Self, Failure> {
        let temporary = given.is_none();
        let path = given.unwrap_or_else(|| {
            config::temporary_folder().join(format!("mastio-demo-{}", Entropy::default().uuid()))
        });
        // Keys lie in it, throwaway as they are.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|error| {
            Failure::because(format!("the directory {} cannot be made", path.display()), error)
        })?;
        Ok(Self { path, temporary })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.temporary
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = %error, "demo_folder_not_removed");
        }
    }
}

/// Puts the legacy database in place and configures a server for it. Nothing of the operator's own environment is
/// read: the demo must never touch a deploy of theirs.
fn unpack(folder: &Path, listen: &str) -> Result<Resolved, Failure> {
    let unwritable =
        |path: &Path, error| Failure::because(format!("{} cannot be written", path.display()), error);
    let file = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(content))
            .map_err(|error| unwritable(&path, error))
    };
    if folder.join("mcp_proxy.db").exists() {
        return Err(Failure::Refused(format!(
            "{0} holds a deploy already: serve it with `mastio serve --data-dir {0}`, or name a new directory",
            folder.display()
        )));
    }
    file("mcp_proxy.db", bundle::DATABASE)?;
    file("org-ca.crt", bundle::ORG_CA.as_bytes())?;
    for agent in &bundle::AGENTS {
        file(&format!("{}.crt", agent.name), agent.certificate.as_bytes())?;
        file(&format!("{}.key", agent.name), agent.private_key.as_bytes())?;
    }
    let flags = Flags::default()
        .with("MCP_PROXY_DATA_DIR", folder.to_string_lossy())
        .with("MCP_PROXY_LISTEN", listen)
        .with("MCP_PROXY_INTERNAL_HOST_ALLOWLIST", "127.0.0.1");
    let surroundings = Surroundings::alone_in(folder);
    Ok(config::resolve(&flags, &surroundings, AdminSecret::Needed, &Entropy::default())?)
}

/// An agent built from the files it has always had, trusting `ca_pem`.
fn client(running: &Running, ca_pem: &str, index: usize) -> Result<AgentClient, Failure> {
    let files = &bundle::AGENTS[index];
    AgentClient::new(&running.url, ca_pem, files.certificate, files.private_key, &files.agent_id())
        .map_err(|error| Failure::because(format!("agent {} cannot be built", files.name), error))
}

/// Who is on stage.
struct Stage {
    operator: Remote,
    /// Built before the story begins, and never again.
    agent: AgentClient,
    step: u8,
}

impl Stage {
    async fn tell(
        mut self,
        running: &Running,
        upstream: &Upstream,
        started: Duration,
    ) -> Result<(), Failure> {
        let unexpected = |what: &str| Failure::failed(format!("the demo's story went another way: {what}"));
        say(
            "A deploy that the Python system wrote: organisation acme, five agents, an Org CA with pathLen=0.",
        )?;
        say("Chains below such a CA are rejected by strict verifiers, and no SDK can tell its agents.")?;

        self.step("Adopted: ids, keys, agents and audit log are carried over in place")?;
        let agents = self.operator.get(&["v1", "admin", "agents"], &[]).await?;
        let agents: Vec<&str> =
            agents.as_array().into_iter().flatten().filter_map(|a| a["agent_id"].as_str()).collect();
        state(&format!("adopted and serving on {} after {} ms", running.url, started.as_millis()))?;
        state(&format!("agents: {}", agents.join(", ")))?;

        self.step("Pending: the boot detector has found what is wrong")?;
        let health = self.operator.get(&["healthz"], &[]).await?;
        state(&format!("GET /healthz → {health}"))?;
        if health["pending_updates"] != 1 {
            return Err(unexpected("no update is pending"));
        }

        self.step("Halted: an agent asks for a token, and a human-readable 503 comes back")?;
        match self.agent.login().await {
            Err(AgentError::Refused { path, status: 503, detail }) => {
                state(&format!("POST {path} → 503 {detail}"))?
            }
            Err(error) => return Err(Failure::because("the agent was refused for another reason", error)),
            Ok(_) => return Err(unexpected("a token was minted under a halt")),
        }
        let registered = self.register(upstream).await;
        registered.map_err(|failure| Failure::because("the demo's tool cannot be registered", failure))?;

        self.step("Planned: what the update would do, computed for real, verified, and dropped")?;
        let plan = self.operator.plan_update(Direction::Apply, MIGRATION_ID).await?;
        let ca = |side: usize| {
            let ca = &plan["org_ca"][side];
            format!("pathLen={}, valid until {}", ca["path_len"], ca["not_after"].as_str().unwrap_or("?"))
        };
        state(&format!("Org CA: {}  →  {}", ca(0), ca(1)))?;
        state(&format!("leaves re-signed, every agent's key kept: {}", plan["leaves"]))?;

        self.step("Applied: one commit, with a snapshot to roll back to")?;
        let begun = Instant::now();
        let applied = self.apply().await?;
        state(&format!("POST /proxy/updates/{MIGRATION_ID}/apply → {applied}"))?;
        let health = self.operator.get(&["healthz"], &[]).await?;
        state(&format!("after {} ms GET /healthz → {health}", begun.elapsed().as_millis()))?;
        if health != json!({ "status": "ok" }) {
            return Err(unexpected("the deploy is not clean after the apply"));
        }

        self.step("Verified: every agent's new chain, from the new root, by the full rules")?;
        let root_pem = self.bundle().await?;
        let roots =
            Certificate::chain_from_pem(&root_pem).map_err(|error| Failure::because("/pki/ca.crt", error))?;
        let root = roots.first().ok_or_else(|| unexpected("/pki/ca.crt is empty"))?;
        let now = SystemClock.now().seconds();
        for (index, files) in bundle::AGENTS.iter().enumerate() {
            let chain = self.chain_of(running, index).await?;
            let (leaf, intermediates) = chain.split_first().ok_or_else(|| unexpected("an empty chain"))?;
            path::validate_strict(leaf, intermediates, root, now)
                .map_err(|error| Failure::because(format!("the chain of {}", files.name), error))?;
            let old = Certificate::from_pem(files.certificate)
                .map_err(|error| Failure::because(format!("the old leaf of {}", files.name), error))?;
            if old.spki_der() != leaf.spki_der() {
                return Err(unexpected("an agent's key has changed"));
            }
            state(&format!(
                "{} → {} → {}: valid, same key",
                files.agent_id(),
                leaf.issuer_display(),
                root.subject_display()
            ))?;
        }

        self.step("Token minted: the same agent, with the leaf and the CA file it has always had")?;
        let claims = match self.agent.login().await {
            Ok(access) => access.claims(),
            Err(error) => return Err(Failure::because("the agent could not log in after the apply", error)),
        };
        state(&format!(
            "token for {}, issued by {}, bound to key {}",
            claims["sub"], claims["iss"], claims["cnf"]["jkt"]
        ))?;
        let mut renewed = client(running, &root_pem, 0)?;
        renewed
            .login()
            .await
            .map_err(|error| Failure::because("an agent that trusts the new root cannot log in", error))?;
        state("and an agent started anew with its old files and the new /pki/ca.crt logs in as well")?;

        self.step("Tool called: through the gateway, to a real MCP server")?;
        let called = async {
            let tools = self.agent.list_tools().await?;
            let names: Vec<&str> = tools.iter().filter_map(|tool| tool["name"].as_str()).collect();
            Ok::<_, AgentError>((
                names.join(", "),
                self.agent.call_tool(TOOL, json!({ "a": 19, "b": 23 })).await?,
            ))
        };
        let (tools, result) =
            called.await.map_err(|error| Failure::because("the tool could not be called", error))?;
        state(&format!("tools/list → {tools}"))?;
        state(&format!("tools/call {TOOL} → {}", result["content"][0]["text"].as_str().unwrap_or("?")))
    }

    fn step(&mut self, title: &str) -> Result<(), Failure> {
        self.step += 1;
        let (bold, plain) =
            if std::io::stdout().is_terminal() { ("\u{1b}[1m", "\u{1b}[0m") } else { ("", "") };
        say(&format!("\n{bold}{}. {title}{plain}", self.step))
    }

    /// Registers the tool and lets the agent use it: registration signs nothing, so a halt does not stop it.
    async fn register(&self, upstream: &Upstream) -> Result<(), Failure> {
        let resource = json!({
            "name": TOOL, "endpoint_url": upstream.url(), "description": "Adds two numbers", "auth_type": "none",
            "allowed_domains": [], "enabled": true,
        });
        let resource = self.operator.post(&["v1", "admin", "mcp-resources"], &resource).await?;
        let binding = json!({
            "agent_id": bundle::AGENTS[0].agent_id(), "resource_id": resource["resource_id"],
            "principal_type": "agent",
        });
        self.operator.post(&["v1", "admin", "mcp-resources", "bindings"], &binding).await.map(|_| ())
    }

    async fn apply(&self) -> Result<Value, Failure> {
        let bar = Progress::new("apply", false);
        let applied = watched_change(&self.operator, Direction::Apply, MIGRATION_ID, None, &bar).await;
        bar.clear();
        applied
    }

    /// `/pki/ca.crt`: the new root first, then the one that retires.
    async fn bundle(&self) -> Result<String, Failure> {
        match self.operator.get(&["pki", "ca.crt"], &[]).await? {
            Value::String(pem) => Ok(pem),
            _ => Err(Failure::failed("/pki/ca.crt is not PEM")),
        }
    }

    /// The chain that the server now has for an agent, asked for by the agent itself.
    async fn chain_of(&self, running: &Running, index: usize) -> Result<Vec<Certificate>, Failure> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            Failure::because(format!("the new chain of {}", bundle::AGENTS[index].name), error)
        };
        let pem = client(running, bundle::ORG_CA, index)?
            .current_chain()
            .await
            .map_err(|error| failed(error.into()))?;
        Certificate::chain_from_pem(&pem).map_err(|error| failed(error.into()))
    }
}

fn say(text: &str) -> Result<(), Failure> {
    print(text)
}

fn state(text: &str) -> Result<(), Failure> {
    print(&format!("   {text}"))
}

/// What to try while the demo serves on: the page's own commands.
fn invite(running: &Running, folder: &Folder, admin_secret: &str) -> Result<(), Failure> {
    let (url, path) = (&running.url, folder.path.display());
    say(&format!(
        "
Serving on. Dashboard: {url}/proxy/updates
Admin secret: {admin_secret}

The page's commands run as printed in {path}, where {ENV_FILE} lies:

  cd {path}
  ADMIN_SECRET=\"$(grep ^MCP_PROXY_ADMIN_SECRET {ENV_FILE} | cut -d= -f2)\"
  MASTIO=\"{url}\"
  MIGRATION_ID=\"{MIGRATION_ID}\"
  curl -sk \"$MASTIO/healthz\" | jq
  curl -sk \"$MASTIO/proxy/updates/api\" -H \"X-Admin-Secret: $ADMIN_SECRET\" | jq
  curl -sk -X POST \"$MASTIO/proxy/updates/$MIGRATION_ID/rollback\" \\
    -H \"X-Admin-Secret: $ADMIN_SECRET\" -H \"Content-Type: application/json\" -d '{{\"confirm\": true}}'
  curl -sk \"$MASTIO/metrics\" | grep cullis_pending_updates_total
  curl -sk \"$MASTIO/v1/admin/audit?event_type=admin.update_applied\" -H \"X-Admin-Secret: $ADMIN_SECRET\" | jq

Ctrl-C ends it{}.",
        if folder.temporary { " and removes the directory" } else { "" }
    ))
}
