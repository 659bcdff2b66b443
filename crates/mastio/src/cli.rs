//! The command line: what an operator types, turned into the same verbs that HTTP offers.
//!
//! `serve` and `demo` run a server. Every other command that needs state talks to the server that holds the data
//! directory ([`remote`]), and opens the database itself when none does ([`local`]). Both answer with the JSON of the
//! HTTP API; [`table`] shows it to people, `--json` prints it as it is.

mod admin;
mod declare;
mod fleet;
mod gateway;
mod local;
pub(crate) mod remote;
mod resource_servers;
mod table;

use std::error::Error as StdError;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use mastio_core::error::Kind;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::app::{AppError, SealChoice};
use crate::config::{self, AdminSecret, Config, ConfigError, Flags, Origin, Resolved, Surroundings};
use crate::entropy::Entropy;
use crate::http::error::{Problem, chain};
use crate::pki::seal_rotation::RotationError;
use crate::store::DatabaseUrl;
use crate::store::adopt::undo::Undoing;
pub(crate) use crate::updates::Direction;
use crate::updates::order;
use remote::Remote;
use resource_servers::ResourceServersCommand;

/// Between two lines about a run where there is no terminal to draw a bar on.
const PROGRESS_LINE_PERIOD: Duration = Duration::from_secs(1);

/// What a command without a server logs: the halt and the rows that opening the deploy finds are its answer anyway.
const IN_PROCESS_LOG: &str = "warn,mastio::updates::halt=off,mastio::updates::detector=off";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; the message says at what
  2  wrong usage or a wrong setting; nothing was done
  3  refused by the state of the world (HTTP 409 or 412): already applied, not needed, something else comes first
  4  signing is halted by a pending update";

/// Mastio: the certificate authority, token issuer, MCP gateway and audit log of an organisation's AI agents.
#[derive(Debug, Parser)]
#[command(name = "mastio", version, about, after_help = EXIT_CODES, max_term_width = 120)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve HTTPS until SIGTERM.
    Serve {
        #[command(flatten)]
        flags: Flags,
    },
    /// Repair a bundled legacy deploy before your eyes, then keep serving it.
    Demo(crate::demo::Options),
    /// Show which settings are in force and where each came from, secrets hidden.
    Config {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        flags: Flags,
    },
    /// List, plan, apply and roll back framework updates.
    #[command(subcommand)]
    Updates(UpdatesCommand),
    /// Read and verify the audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Create, look at, renew, set aside and delete agents.
    #[command(subcommand)]
    Agents(fleet::AgentsCommand),
    /// Decide who gets an identity.
    #[command(subcommand)]
    Enrollments(fleet::EnrollmentsCommand),
    /// Work with certificates.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Register MCP servers and look at what they offer.
    #[command(subcommand)]
    Upstreams(gateway::UpstreamsCommand),
    /// Approve, block and bind tools, and say who may call what.
    #[command(subcommand)]
    Tools(gateway::ToolsCommand),
    /// Export, compare and import MCP servers, bindings and policies as one YAML file.
    #[command(subcommand)]
    Gateway(declare::GatewayCommand),
    /// Save and test the policies that calls of tools go through.
    #[command(subcommand)]
    Policy(gateway::PolicyCommand),
    /// Give services beside this one a credential to ask about access tokens with.
    #[command(subcommand)]
    ResourceServers(ResourceServersCommand),
    /// Add, list and deactivate operators.
    #[command(subcommand)]
    Admin(admin::AdminCommand),
    /// Look at a predecessor's database, or take an adoption back. Adoption itself is `serve`'s.
    Adopt {
        /// Say whether it can be adopted and what would happen; change nothing.
        #[arg(long, required_unless_present = "undo")]
        check: bool,
        /// Put the predecessor's database back as it was, and keep the present one beside it. No server may run.
        #[arg(long, conflicts_with = "check")]
        undo: bool,
        /// The copy to put back, where it is not the only one beside the database.
        #[arg(long, value_name = "FILE", requires = "undo")]
        copy: Option<PathBuf>,
        /// Do not ask.
        #[arg(long, short, requires = "undo")]
        yes: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Move the database.
    #[command(subcommand)]
    Database(DatabaseCommand),
    /// Look after the key that every private key in the database is sealed under.
    #[command(subcommand)]
    Seal(SealCommand),
}

#[derive(Debug, Subcommand)]
enum UpdatesCommand {
    /// List updates.
    List {
        /// Only those with this status: pending, applied, failed or rolled_back.
        #[arg(long, value_name = "STATUS")]
        status: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Compute what an update would change, verify it, and change nothing.
    Plan {
        /// The migration id.
        id: String,
        /// What a rollback would restore instead.
        #[arg(long)]
        rollback: bool,
        /// Every single change, one a line as they are computed (with --json a JSON value a line), the plan last.
        #[arg(long)]
        full: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Apply an update, or with --all every one that waits.
    Apply {
        /// Apply everything that waits, in order; stop at the first that fails.
        #[arg(long, conflicts_with_all = ["id", "plan_digest"])]
        all: bool,
        /// The migration id.
        #[arg(required_unless_present = "all")]
        id: Option<String>,
        #[command(flatten)]
        change: Change,
    },
    /// Roll an update back to its snapshot.
    Rollback {
        /// The migration id.
        id: String,
        #[command(flatten)]
        change: Change,
    },
    /// Propose the plan of an update, or of its rollback, for another operator to approve.
    Propose {
        /// The migration id.
        id: String,
        /// Its rollback instead.
        #[arg(long)]
        rollback: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Approve the plan that another operator has proposed.
    Approve {
        /// The migration id.
        id: String,
        /// Its rollback instead.
        #[arg(long)]
        rollback: bool,
        #[command(flatten)]
        change: Change,
    },
    /// List the proposals of an update.
    Proposals {
        /// The migration id.
        id: String,
        #[command(flatten)]
        target: Target,
    },
    /// Explain what is found of updates, runs, snapshots and the halt, and what to do next; change nothing.
    ///
    /// Exit code 0 when all is well, 1 when something needs you.
    Doctor {
        #[command(flatten)]
        target: Target,
    },
    /// List the snapshots that rollbacks go back to, and whether they verify.
    Snapshots {
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
struct Change {
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
    /// Only if the plan is still the one with this digest; see `plan`.
    #[arg(long, value_name = "DIGEST")]
    plan_digest: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// List events, newest first.
    List {
        /// Only events of this type, such as admin.update_applied.
        #[arg(long, value_name = "TYPE")]
        event_type: Option<String>,
        /// Events at most.
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
        #[command(flatten)]
        target: Target,
    },
    /// Verify the whole chain: any edit, deletion, insertion or reordering is found.
    Verify {
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Subcommand)]
enum PkiCommand {
    /// Show the trust overlap: what retires, which agents still need it, and what cannot be seen.
    Overlap {
        #[command(flatten)]
        target: Target,
    },
    /// End the trust overlap for good: the retiring Org CA's key is destroyed, and former leaves are refused.
    Settle {
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
        /// Although agents still present a former leaf, and will be refused.
        #[arg(long)]
        break_agents: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Sign the request of an owner who holds the key (BYOCA) under the current Org CA; PEM on standard output.
    IssueByoca {
        /// The certificate request, PEM or `-` for standard input.
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// The agent's name, without the organisation.
        #[arg(long, value_name = "NAME")]
        agent_name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Revoke certificates of agents for good: they are refused everywhere when the command returns.
    Revoke {
        #[command(flatten)]
        which: RevokeWhich,
        /// keyCompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn or unspecified.
        #[arg(long, value_name = "REASON", default_value = "unspecified")]
        reason: String,
        #[command(flatten)]
        target: Target,
    },
    /// List revoked certificates.
    Revoked {
        /// Begin after this fingerprint.
        #[arg(long, value_name = "FINGERPRINT", default_value = "")]
        after: String,
        /// Certificates at most.
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct RevokeWhich {
    /// The certificate with this serial, hexadecimal.
    #[arg(long, value_name = "HEX")]
    serial: Option<String>,
    /// Every certificate of this agent, as NAME or ORG::NAME.
    #[arg(long, value_name = "AGENT")]
    agent: Option<String>,
}

#[derive(Debug, Subcommand)]
enum DatabaseCommand {
    /// Copy everything into another, empty database. No server may run on either.
    Copy {
        /// Where to: a sqlite: or postgres: URL.
        #[arg(long, value_name = "URL")]
        to: String,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Subcommand)]
enum SealCommand {
    /// Seal everything under another key. No server may run.
    ///
    /// Without a choice: from seal.key to MCP_PROXY_DB_ENCRYPTION_KEY where that is set, else to a new seal.key.
    Rotate {
        /// Under the passphrase in this file's first line.
        #[arg(long, value_name = "FILE", conflicts_with = "to_file")]
        new_passphrase_file: Option<PathBuf>,
        /// Under a new seal.key in the data directory.
        #[arg(long)]
        to_file: bool,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        target: Target,
    },
}

/// Whom a command speaks to, and how it answers.
#[derive(Debug, Args)]
struct Target {
    /// Print JSON, as the HTTP API answers.
    #[arg(long)]
    json: bool,
    /// Talk to the server at this URL instead of the one that holds the data directory.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Trust this CA file for --url; without it the machine's own, and none is needed on loopback.
    #[arg(long, value_name = "FILE", requires = "url")]
    ca: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

/// Why a command did not do what was asked; each kind has its exit code.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The command cannot be understood as it was typed.
    #[error("{0}")]
    Usage(String),
    /// The state of the world forbids it.
    #[error("{0}")]
    Refused(String),
    /// Signing is halted.
    #[error("{0}")]
    Halted(String),
    /// Anything else.
    #[error("{what}")]
    Failed {
        /// What failed, and what to do.
        what: String,
        /// Why.
        #[source]
        cause: Option<Box<dyn StdError + Send + Sync>>,
    },
}

impl Failure {
    /// A failure without a cause below it.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), cause: None }
    }

    /// A failure and its cause.
    pub fn because(what: impl Into<String>, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Failed { what: what.into(), cause: Some(cause.into()) }
    }

    /// The same, told of one of several things.
    fn at(self, subject: &str) -> Self {
        match self {
            Self::Usage(text) => Self::Usage(format!("{subject}: {text}")),
            Self::Refused(text) => Self::Refused(format!("{subject}: {text}")),
            Self::Halted(text) => Self::Halted(format!("{subject}: {text}")),
            Self::Failed { what, cause } => Self::Failed { what: format!("{subject}: {what}"), cause },
            config @ Self::Config(_) => config,
        }
    }

    /// A capability's own error, by its kind.
    pub(crate) fn of(problem: &dyn Problem) -> Self {
        let detail = remote::detail(&problem.detail());
        match problem.kind() {
            Kind::Conflict | Kind::OutOfOrder => Self::Refused(detail),
            Kind::Halted => Self::Halted(detail),
            Kind::Invalid | Kind::Unprocessable => Self::Usage(detail),
            // In this process nobody must be kept from the cause.
            Kind::Internal | Kind::Unavailable => Self::failed(chain(&problem)),
            _ => Self::failed(detail),
        }
    }

    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed { .. } => 1,
            Self::Config(_) | Self::Usage(_) => 2,
            Self::Refused(_) => 3,
            Self::Halted(_) => 4,
        })
    }
}

impl From<AppError> for Failure {
    fn from(error: AppError) -> Self {
        match error {
            AppError::NotInitialised { .. } | AppError::Listen { .. } => Self::Usage(chain(&error)),
            AppError::Locked { .. }
            | AppError::DatabaseLost { .. }
            | AppError::StrictPki(_)
            | AppError::Undo(_)
            | AppError::SealRotation(RotationError::InUse(_))
            | AppError::Adopt(_) => Self::Refused(chain(&error)),
            AppError::SealRotation(
                RotationError::Unsaid | RotationError::PassphraseRequired | RotationError::PassphraseEmpty,
            ) => Self::Usage(chain(&error)),
            AppError::Updates(error) => Self::of(&error),
            error => Self::because("the deploy cannot be opened", error),
        }
    }
}

/// Reads the command line, does what it says, and tells how it ended. The whole of `main`.
#[must_use]
pub fn run() -> ExitCode {
    let command = CommandLine::parse().command;
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("the runtime cannot be started", error))
        .and_then(|runtime| runtime.block_on(execute(command)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Standard error may be gone; then the exit code alone has to tell.
            let _gone = writeln!(std::io::stderr(), "mastio: {}", chain(&failure));
            failure.exit_code()
        }
    }
}

async fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Serve { flags } => serve(resolve(&flags, AdminSecret::Needed)?).await,
        Command::Demo(options) => crate::demo::run(options).await,
        Command::Config { json, flags } => show_config(&resolve(&flags, AdminSecret::Optional)?, json),
        Command::Updates(command) => updates(command).await,
        Command::Audit(command) => audit(command).await,
        Command::Agents(command) => fleet::agents(command).await,
        Command::Enrollments(command) => fleet::enrollments(command).await,
        Command::Pki(PkiCommand::Overlap { target }) => {
            let overlap = show_overlap(&way(&target)?).await?;
            show(&target, &overlap, table::overlap)
        }
        Command::Pki(PkiCommand::Settle { yes, break_agents, target }) => {
            settle(yes, break_agents, &target).await
        }
        Command::Pki(PkiCommand::IssueByoca { csr, agent_name, target }) => {
            let csr_pem = read_text(&csr, "the certificate request")?;
            let issued = match way(&target)? {
                Way::Server(remote) => remote.issue_byoca(&agent_name, &csr_pem).await?,
                Way::InProcess(config) => local::issue_byoca(&config, &agent_name, &csr_pem).await?,
            };
            show(&target, &issued, |issued| {
                issued["cert_pem"].as_str().unwrap_or_default().trim_end().to_owned()
            })
        }
        Command::Upstreams(command) => gateway::upstreams(command).await,
        Command::Tools(command) => gateway::tools(command).await,
        Command::Gateway(command) => declare::run(command).await,
        Command::Policy(command) => gateway::policy(command).await,
        Command::ResourceServers(command) => resource_servers::run(command).await,
        Command::Admin(command) => admin::execute(command).await,
        Command::Pki(PkiCommand::Revoke { which, reason, target }) => {
            let RevokeWhich { serial, agent } = which;
            let done = match way(&target)? {
                Way::Server(remote) => {
                    let body = json!({ "serial_hex": serial, "agent_id": agent, "reason": reason });
                    remote.post(&["v1", "admin", "certs", "revoke"], &body).await?
                }
                Way::InProcess(config) => {
                    local::revoke(&config, serial.as_deref(), agent.as_deref(), &reason).await?
                }
            };
            show(&target, &done, |done| table::revoked(&done["revoked"]))
        }
        Command::Pki(PkiCommand::Revoked { after, limit, target }) => {
            let list = match way(&target)? {
                Way::Server(remote) => {
                    let limit = limit.to_string();
                    let query = [("after", after.as_str()), ("limit", limit.as_str())];
                    remote.get(&["v1", "admin", "certs", "revoked"], &query).await?
                }
                Way::InProcess(config) => local::list_revoked(&config, &after, limit).await?,
            };
            show(&target, &list, table::revoked)
        }
        Command::Adopt { undo: true, copy, yes, target, .. } => match way(&target)? {
            Way::Server(_) => {
                Err(Failure::Refused("stop the server before its adoption is undone".to_owned()))
            }
            Way::InProcess(config) => {
                let agreed = |undoing: &Undoing| {
                    if yes {
                        return Ok(());
                    }
                    ask(&format!(
                        "{} agents that have come since and {} events of the audit log would be unknown to the Python \
                         Mastio; the present database stays as {}.\nput {} back",
                        undoing.agents_lost,
                        undoing.events_lost,
                        undoing.aside.display(),
                        undoing.copy.display(),
                    ))
                };
                let report = local::undo_adoption(&config, copy.as_deref(), agreed).await?;
                show(&target, &report, table::fields)
            }
        },
        Command::Adopt { target, .. } => match way(&target)? {
            Way::Server(_) => {
                Err(Failure::Refused("a server runs on this database: it is adopted already".to_owned()))
            }
            Way::InProcess(config) => {
                let report = local::check_adoption(&config).await?;
                show(&target, &report, table::fields)
            }
        },
        Command::Seal(SealCommand::Rotate { new_passphrase_file, to_file, yes, target }) => {
            let choice = match new_passphrase_file {
                Some(path) => SealChoice::Passphrase(first_line(&path)?),
                None if to_file => SealChoice::File,
                None => SealChoice::Another,
            };
            match way(&target)? {
                Way::Server(_) => {
                    Err(Failure::Refused("stop the server before its seal is rotated".to_owned()))
                }
                Way::InProcess(config) => {
                    if !yes {
                        ask(
                            "seal every private key under another key; a backup made until now needs the former one",
                        )?;
                    }
                    let report = local::rotate_seal(&config, choice).await?;
                    show(&target, &report, table::fields)
                }
            }
        }
        Command::Database(DatabaseCommand::Copy { to, target }) => {
            let destination = DatabaseUrl::parse(&to)
                .map_err(|_| Failure::Usage("--to is neither a sqlite: nor a postgres: URL".to_owned()))?;
            match way(&target)? {
                Way::Server(_) => {
                    Err(Failure::Refused("stop the server before its database is copied".to_owned()))
                }
                Way::InProcess(config) => {
                    let report = local::copy_database(&config, &destination).await?;
                    show(&target, &report, table::fields)
                }
            }
        }
    }
}

fn resolve(flags: &Flags, admin_secret: AdminSecret) -> Result<Resolved, ConfigError> {
    config::resolve(flags, &Surroundings::of_process(), admin_secret, &Entropy::default())
}

/// Serves until SIGTERM or SIGINT, then lets accepted requests finish.
async fn serve(resolved: Resolved) -> Result<(), Failure> {
    crate::logging::init(resolved.config.log_json, &resolved.config.log_filter);
    for in_force in &resolved.settings {
        if let Origin::Generated(path) = &in_force.origin {
            tracing::info!(name = in_force.setting.name, path = %path.display(), "secret_generated");
        }
    }
    if !resolved.unused.is_empty() {
        tracing::info!(names = resolved.unused.join(","), "settings_unused: this server does not have them");
    }
    let stopped = stop_signal()?;
    let running = crate::app::start(resolved).await?;
    stopped.await;
    tracing::info!("stopping: accepted requests finish first");
    running.stop().await;
    tracing::info!("stopped");
    Ok(())
}

/// Ends at the first SIGTERM or SIGINT. Registered when called, so that no signal is lost while the server starts.
pub(crate) fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let registered =
        |kind| signal(kind).map_err(|error| Failure::because("signals cannot be received", error));
    let (mut terminate, mut interrupt) =
        (registered(SignalKind::terminate())?, registered(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn show_config(resolved: &Resolved, as_json: bool) -> Result<(), Failure> {
    if !as_json {
        return print(&table::settings(resolved));
    }
    let settings: Vec<Value> = resolved
        .settings
        .iter()
        .map(|in_force| {
            let origin = match &in_force.origin {
                Origin::Flag => json!({ "source": "flag" }),
                Origin::Environment => json!({ "source": "environment" }),
                Origin::EnvFile(path) => json!({ "source": "env_file", "path": path }),
                Origin::Generated(path) => json!({ "source": "generated", "path": path }),
                Origin::Default => json!({ "source": "default" }),
            };
            let mut row = json!({
                "name": in_force.setting.name,
                "flag": format!("--{}", in_force.setting.flag),
                "value": in_force.shown,
                "secret": in_force.setting.secret,
            });
            if let (Some(row), Some(origin)) = (row.as_object_mut(), origin.as_object()) {
                row.extend(origin.clone());
            }
            row
        })
        .collect();
    print(&pretty(&json!({ "settings": settings, "unused": resolved.unused })))
}

async fn updates(command: UpdatesCommand) -> Result<(), Failure> {
    match command {
        UpdatesCommand::List { status, target } => {
            let list = list_updates(&way(&target)?, status.as_deref()).await?;
            show(&target, &list, table::updates)
        }
        UpdatesCommand::Plan { id, rollback, full, target } => {
            let direction = way_of(rollback);
            if full {
                return full_plan(direction, &id, &target).await;
            }
            let plan = plan_update(&way(&target)?, direction, &id).await?;
            show(&target, &plan, table::plan)
        }
        UpdatesCommand::Apply { all: false, id, change } => {
            change_update(Direction::Apply, &id.unwrap_or_default(), &change).await
        }
        UpdatesCommand::Apply { all: true, id: _, change } => apply_all(&change).await,
        UpdatesCommand::Rollback { id, change } => change_update(Direction::Rollback, &id, &change).await,
        UpdatesCommand::Propose { id, rollback, change } => propose(way_of(rollback), &id, &change).await,
        UpdatesCommand::Approve { id, rollback, change } => approve(way_of(rollback), &id, &change).await,
        UpdatesCommand::Proposals { id, target } => {
            let list = list_proposals(&way(&target)?, &id).await?;
            show(&target, &list, table::proposals)
        }
        UpdatesCommand::Doctor { target } => {
            let report = match way(&target)? {
                Way::Server(remote) => remote.ask_doctor().await?,
                Way::InProcess(config) => local::ask_doctor(&config).await?,
            };
            show(&target, &report, table::doctor)?;
            if report["healthy"] == true {
                return Ok(());
            }
            Err(Failure::failed("something needs you; each finding names the next step"))
        }
        UpdatesCommand::Snapshots { target } => {
            let list = match way(&target)? {
                Way::Server(remote) => remote.list_snapshots().await?,
                Way::InProcess(config) => local::list_snapshots(&config).await?,
            };
            show(&target, &list, table::snapshots)
        }
    }
}

fn way_of(rollback: bool) -> Direction {
    if rollback { Direction::Rollback } else { Direction::Apply }
}

async fn plan_update(way: &Way, direction: Direction, id: &str) -> Result<Value, Failure> {
    match way {
        Way::Server(remote) => remote.plan_update(direction, id).await,
        Way::InProcess(config) => local::plan_update(config, direction, id).await,
    }
}

async fn list_proposals(way: &Way, id: &str) -> Result<Value, Failure> {
    match way {
        Way::Server(remote) => remote.list_proposals(id).await,
        Way::InProcess(config) => local::list_proposals(config, id).await,
    }
}

/// Shows the plan, asks, and proposes exactly that plan.
async fn propose(direction: Direction, id: &str, change: &Change) -> Result<(), Failure> {
    let way = way(&change.target)?;
    let digest = match &change.plan_digest {
        Some(digest) => digest.clone(),
        None => {
            let plan = plan_update(&way, direction, id).await?;
            if !change.yes {
                terminal(direction)?;
                writeln!(std::io::stderr(), "{}", table::plan(&plan))
                    .map_err(|error| Failure::because("the terminal cannot be written", error))?;
                ask("propose this plan")?;
            }
            plan["plan_digest"].as_str().unwrap_or_default().to_owned()
        }
    };
    let proposal = match &way {
        Way::Server(remote) => remote.propose_plan(direction, id, &digest).await?,
        Way::InProcess(config) => local::propose_plan(config, direction, id, &digest).await?,
    };
    show(&change.target, &proposal, |proposal| table::proposals(&json!([proposal])))
}

/// Approves the proposal that is open, and with a plan digest only if it is of that plan.
async fn approve(direction: Direction, id: &str, change: &Change) -> Result<(), Failure> {
    let way = way(&change.target)?;
    let list = list_proposals(&way, id).await?;
    let open = list.as_array().into_iter().flatten().find(|proposal| {
        let digest = change.plan_digest.as_deref();
        proposal["direction"] == direction.as_str()
            && proposal["status"] == "proposed"
            && digest.is_none_or(|digest| proposal["plan_digest"] == digest)
    });
    let Some(open) = open else {
        let verb = direction.as_str();
        return Err(Failure::Refused(format!(
            "nobody has proposed this {verb} of {id}: mastio updates propose"
        )));
    };
    if !change.yes {
        terminal(direction)?;
        writeln!(std::io::stderr(), "{}", table::proposals(&json!([open])))
            .map_err(|error| Failure::because("the terminal cannot be written", error))?;
        ask("approve it")?;
    }
    let proposal_id = open["proposal_id"].as_str().unwrap_or_default();
    let proposal = match &way {
        Way::Server(remote) => remote.approve_proposal(id, proposal_id).await?,
        Way::InProcess(config) => local::approve_proposal(config, id, proposal_id).await?,
    };
    show(&change.target, &proposal, |proposal| table::proposals(&json!([proposal])))
}

/// Prints each change as it is computed, so that a fleet of any size goes through.
async fn full_plan(direction: Direction, id: &str, target: &Target) -> Result<(), Failure> {
    let mut ended = Err(Failure::failed("the plan broke off before its end: nothing was changed"));
    let mut told = |line: Value| {
        match line["kind"].as_str() {
            Some("error") => ended = Err(Failure::failed(remote::detail(&line))),
            Some("plan") => ended = Ok(()),
            _ => {}
        }
        print(&if target.json { line.to_string() } else { table::change(&line) })
    };
    match way(target)? {
        Way::Server(remote) => remote.full_plan(direction, id, &mut told).await?,
        Way::InProcess(config) => local::full_plan(&config, direction, id, &mut told).await?,
    }
    ended
}

async fn list_updates(way: &Way, status: Option<&str>) -> Result<Value, Failure> {
    match way {
        Way::Server(remote) => remote.list_updates(status).await,
        Way::InProcess(config) => local::list_updates(config, status).await,
    }
}

async fn change_update(direction: Direction, id: &str, change: &Change) -> Result<(), Failure> {
    let way = way(&change.target)?;
    if !change.yes {
        terminal(direction)?;
        let list = list_updates(&way, None).await?;
        confirm(direction, &[id], &list)?;
    }
    let done = run_change(&way, direction, id, change).await?;
    show(&change.target, &done, table::done)
}

/// Applies everything that waits. The list is read anew before each: an apply may have settled the next one too.
async fn apply_all(change: &Change) -> Result<(), Failure> {
    let way = way(&change.target)?;
    let list = list_updates(&way, None).await?;
    let waiting = in_order(&list);
    if waiting.is_empty() {
        return show(&change.target, &json!([]), table::updates);
    }
    if !change.yes {
        terminal(Direction::Apply)?;
        confirm(Direction::Apply, &waiting.iter().map(String::as_str).collect::<Vec<_>>(), &list)?;
    }
    let mut done = Vec::new();
    let mut ended = Ok(());
    // Each turn ends one of those that waited, so there are no more turns than rows.
    for _turn in 0..waiting.len() {
        let list = list_updates(&way, None).await?;
        let Some(next) = in_order(&list).into_iter().next() else { break };
        match run_change(&way, Direction::Apply, &next, change).await {
            Ok(applied) => {
                if !change.target.json {
                    print(&table::done(&applied))?;
                }
                done.push(applied);
            }
            Err(failure) => {
                ended = Err(failure.at(&next));
                break;
            }
        }
    }
    if change.target.json {
        print(&pretty(&Value::Array(done)))?;
    }
    ended
}

/// The ids of a list that wait to be applied, in the order in which they are to be.
fn in_order(list: &Value) -> Vec<String> {
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let waiting: Vec<order::Waiting> = list
        .as_array()
        .into_iter()
        .flatten()
        .filter(|row| matches!(row["status"].as_str(), Some("pending" | "failed")))
        .map(|row| order::Waiting {
            migration_id: row["migration_id"].as_str().unwrap_or_default().to_owned(),
            halts: row["halts"] == true,
            requires: texts(&row["requires"]),
        })
        .collect();
    order::in_order(&waiting)
}

async fn run_change(way: &Way, direction: Direction, id: &str, change: &Change) -> Result<Value, Failure> {
    let bar = Progress::new(direction.as_str(), change.target.json);
    let digest = change.plan_digest.as_deref();
    let done = match way {
        Way::Server(remote) => watched_change(remote, direction, id, digest, &bar).await,
        Way::InProcess(config) => {
            local::change_update(config, direction, id, digest, &|progress| bar.show(progress)).await
        }
    };
    bar.clear();
    done
}

/// Has a server change an update, and shows what it tells meanwhile. Its run goes on whatever becomes of this watcher.
pub(crate) async fn watched_change(
    remote: &Remote,
    direction: Direction,
    id: &str,
    plan_digest: Option<&str>,
    bar: &Progress,
) -> Result<Value, Failure> {
    let mut events = remote.events(id).await;
    let run = remote.change_update(direction, id, plan_digest);
    tokio::pin!(run);
    loop {
        let event = async {
            match &mut events {
                Some(events) => events.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = &mut run => return done,
            event = event => match event {
                Some(event) => bar.show(&event),
                None => events = None,
            },
        }
    }
}

/// Without a terminal `--yes` has to say it: a script must not change trust by accident.
fn terminal(direction: Direction) -> Result<(), Failure> {
    on_terminal(&format!("{} changes the trust of every agent", direction.as_str()), "--yes")
}

/// Refuses to ask where there is nobody to ask.
fn on_terminal(why: &str, instead: &str) -> Result<(), Failure> {
    if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() {
        return Ok(());
    }
    Err(Failure::Usage(format!("{why} and there is no terminal to ask on: add {instead}")))
}

/// Shows on the terminal what is asked about.
fn tell(text: &str) -> Result<(), Failure> {
    writeln!(std::io::stderr(), "{text}")
        .map_err(|error| Failure::because("the terminal cannot be written", error))
}

/// Asks on the terminal.
fn confirm(direction: Direction, ids: &[&str], list: &Value) -> Result<(), Failure> {
    let verb = direction.as_str();
    let mut question = String::new();
    for id in ids {
        let row = list.as_array().and_then(|rows| rows.iter().find(|row| row["migration_id"] == *id));
        let description =
            row.and_then(|row| row["description"].as_str()).unwrap_or("not in the list of updates");
        question.push_str(&format!("{id}: {description}\n"));
    }
    let what = if ids.len() > 1 { "them in this order" } else { "it" };
    ask(&format!("{question}{verb} {what} now"))
}

async fn show_overlap(way: &Way) -> Result<Value, Failure> {
    match way {
        Way::Server(remote) => remote.show_overlap().await,
        Way::InProcess(config) => local::show_overlap(config).await,
    }
}

/// Shows who still needs the overlap, asks, and ends it.
async fn settle(yes: bool, break_agents: bool, target: &Target) -> Result<(), Failure> {
    let way = way(target)?;
    if !yes {
        if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
            let why = "settling cannot be undone and there is no terminal to ask on: add --yes";
            return Err(Failure::Usage(why.to_owned()));
        }
        writeln!(std::io::stderr(), "{}", table::overlap(&show_overlap(&way).await?))
            .map_err(|error| Failure::because("the terminal cannot be written", error))?;
        ask("end the overlap for good, without a way back")?;
    }
    let settled = match &way {
        Way::Server(remote) => remote.settle_overlap(break_agents).await?,
        Way::InProcess(config) => local::settle_overlap(config, break_agents).await?,
    };
    show(target, &settled, table::fields)
}

/// Asks whether to do what the question says.
fn first_line(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::because(format!("{} cannot be read", path.display()), error))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn ask(question: &str) -> Result<(), Failure> {
    let mut out = std::io::stderr();
    let mut answer = String::new();
    write!(out, "{question}? [y/N] ")
        .and_then(|()| out.flush())
        .and_then(|()| std::io::stdin().read_line(&mut answer))
        .map_err(|error| Failure::because("the terminal cannot be asked", error))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::Usage("not confirmed: nothing was changed".to_owned()))
}

async fn audit(command: AuditCommand) -> Result<(), Failure> {
    match command {
        AuditCommand::List { event_type, limit, target } => {
            let list = match way(&target)? {
                Way::Server(remote) => remote.list_events(event_type.as_deref(), limit).await?,
                Way::InProcess(config) => local::list_events(&config, event_type.as_deref(), limit).await?,
            };
            show(&target, &list, table::events)
        }
        AuditCommand::Verify { target } => {
            let verdict = match way(&target)? {
                Way::Server(remote) => remote.verify_audit().await?,
                Way::InProcess(config) => local::verify_audit(&config).await?,
            };
            show(&target, &verdict, table::fields)?;
            if verdict["sound"] == true {
                return Ok(());
            }
            Err(Failure::failed(
                "the audit chain is broken: keep the database as it is and compare it with a backup",
            ))
        }
    }
}

/// How a command reaches the state.
enum Way {
    Server(Remote),
    InProcess(Box<Config>),
}

fn way(target: &Target) -> Result<Way, Failure> {
    let config = resolve(&target.flags, AdminSecret::Optional)?.config;
    let server = |url: &str, ca: Option<&Path>| {
        let credential = config.operator_credential.as_ref().unwrap_or(&config.admin_secret);
        if credential.is_empty() {
            let next_step =
                "the server at this address asks for it; set it in the environment or name its --env-file";
            return Err(ConfigError::Missing { name: "MCP_PROXY_ADMIN_SECRET", next_step }.into());
        }
        Remote::new(url, ca, credential).map(Way::Server)
    };
    if let Some(url) = &target.url {
        return server(url, target.ca.as_deref());
    }
    match remote::running_at(&config.data_dir)? {
        Some(url) => server(&url, None),
        None => {
            crate::logging::init(config.log_json, IN_PROCESS_LOG);
            Ok(Way::InProcess(Box::new(config)))
        }
    }
}

/// The text of a file, or of standard input for `-`.
fn read_text(path: &Path, what: &str) -> Result<String, Failure> {
    /// Bytes of what is read at most; every route takes less.
    const TEXT_BYTES_MAX: u64 = 4 * 1024 * 1024;
    let read =
        |source: &mut dyn std::io::Read| std::io::read_to_string(std::io::Read::take(source, TEXT_BYTES_MAX));
    let text = if path.as_os_str() == "-" {
        read(&mut std::io::stdin())
    } else {
        std::fs::File::open(path).and_then(|mut file| read(&mut file))
    };
    text.map_err(|error| Failure::because(format!("{what} {} cannot be read", path.display()), error))
}

fn show(target: &Target, answer: &Value, for_people: impl Fn(&Value) -> String) -> Result<(), Failure> {
    print(&if target.json { pretty(answer) } else { for_people(answer) })
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string())
}

/// Writes to standard output. A reader that has gone (`| head`) is not a failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::because("standard output cannot be written", error))
        }
        _ => Ok(()),
    }
}

/// Where an update is: a bar on a terminal, otherwise lines, a second apart at least within a phase.
pub(crate) struct Progress {
    what: &'static str,
    bar: ProgressBar,
    lines: bool,
    /// The phase of the last line, and when it was written.
    told: Mutex<Option<(String, Instant)>>,
}

impl Progress {
    pub(crate) fn new(what: &'static str, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if quiet || !terminal { ProgressBar::hidden() } else { ProgressBar::no_length() };
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {prefix} {msg:<24} {wide_bar} {pos}/{len} {elapsed}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { what, bar, lines: !quiet && !terminal, told: Mutex::new(None) }
    }

    /// Shows `{"phase": …, "done": …, "total": …, "time_left_s": …}`; anything else tells nothing.
    pub(crate) fn show(&self, progress: &Value) {
        let Some(phase) = progress["phase"].as_str() else { return };
        let (done, total) = (progress["done"].as_u64().unwrap_or(0), progress["total"].as_u64().unwrap_or(0));
        let left =
            progress["time_left_s"].as_u64().map(|left| format!(", {left} s left")).unwrap_or_default();
        self.bar.set_message(format!("{phase}{left}"));
        self.bar.set_length(total);
        self.bar.set_position(done);
        if !self.lines {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let repeated = |(last, at): &(String, Instant)| last == phase && at.elapsed() < PROGRESS_LINE_PERIOD;
        if told.as_ref().is_some_and(repeated) {
            return;
        }
        *told = Some((phase.to_owned(), Instant::now()));
        let counted = if total > 0 { format!(" {done}/{total}") } else { String::new() };
        // Standard error may be gone; the run goes on all the same.
        let _gone = writeln!(std::io::stderr(), "{} {phase}{counted}{left}", self.what);
    }

    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::CommandFactory as _;

    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Command, clap::error::ErrorKind> {
        let arguments = std::iter::once(&"mastio").chain(arguments);
        CommandLine::try_parse_from(arguments).map(|line| line.command).map_err(|error| error.kind())
    }

    #[test]
    fn the_command_tree_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_page_and_the_issue_is_understood() {
        for line in [
            "serve",
            "serve --env-file proxy.env --init --listen 127.0.0.1:0",
            "demo --once",
            "config --json",
            "updates list --status pending --json",
            "updates plan 2026-04-23-org-ca-pathlen-1",
            "updates apply 2026-04-23-org-ca-pathlen-1 --yes --json",
            "updates rollback 2026-04-23-org-ca-pathlen-1 -y --url https://localhost:9443",
            "updates plan 2026-04-23-org-ca-pathlen-1 --rollback --full",
            "updates apply --all --yes",
            "updates apply 2026-04-23-org-ca-pathlen-1 --plan-digest 00ff",
            "updates propose 2026-04-23-org-ca-pathlen-1 --yes",
            "updates approve 2026-04-23-org-ca-pathlen-1 --rollback --plan-digest 00ff",
            "updates proposals 2026-04-23-org-ca-pathlen-1 --json",
            "updates doctor --json",
            "updates snapshots",
            "audit list --event-type admin.update_applied --limit 5",
            "audit verify",
            "agents list --expiring-within-days 30",
            "agents list --after acme::billing --limit 10 --json",
            "agents show billing",
            "agents add billing --display-name Billing --capability invoices.read --capability invoices.write",
            "agents deactivate billing",
            "agents reactivate billing",
            "agents renew billing",
            "agents delete billing --yes",
            "enrollments list --status expired",
            "enrollments show abc",
            "enrollments approve abc --agent-id billing --capability invoices.read",
            "enrollments reject abc --reason unknown",
            "pki issue-byoca --csr agent.csr --agent-name billing",
            "pki overlap --json",
            "pki settle --yes --break-agents",
            "admin add alice --role viewer --json",
            "admin list",
            "admin deactivate alice",
            "admin reset-password alice",
            "pki revoke --serial 0a:1b --reason keyCompromise",
            "pki revoke --agent billing",
            "pki revoked --limit 5",
            "adopt --check",
            "database copy --to postgres://cullis@db/cullis",
        ] {
            let arguments: Vec<&str> = line.split(' ').collect();
            assert!(parsed(&arguments).is_ok(), "{line}");
        }
    }

    #[test]
    fn a_wrong_command_line_is_refused() {
        for line in [
            "",
            "updates",
            "updates apply",
            "updates apply x --all",
            "updates apply --all --plan-digest 00ff",
            "audit list --limit 0",
            "admin add",
            "admin add alice --role emperor",
            "adopt",
            "agents add",
            "pki revoke",
            "pki revoke --serial 01 --agent billing",
            "agents list --limit 0",
            "enrollments approve abc",
            "enrollments reject abc",
            "config --ca x",
            "serve --port 1",
        ] {
            let arguments: Vec<&str> = line.split_terminator(' ').collect();
            assert!(parsed(&arguments).is_err(), "{line}");
        }
    }

    #[test]
    fn each_kind_of_failure_has_its_exit_code() {
        let missing = ConfigError::Missing { name: "MCP_PROXY_TLS_KEY", next_step: "set it" };
        for (failure, code) in [
            (Failure::failed("x"), 1),
            (Failure::from(missing), 2),
            (Failure::Usage("x".to_owned()), 2),
            (Failure::Refused("x".to_owned()), 3),
            (Failure::Halted("x".to_owned()), 4),
        ] {
            assert_eq!(
                format!("{:?}", failure.exit_code()),
                format!("{:?}", ExitCode::from(code)),
                "{failure}"
            );
        }
    }

    #[test]
    fn help_names_every_setting_by_its_environment_name_and_the_exit_codes() {
        let mut command = CommandLine::command();
        assert!(command.render_help().to_string().contains("4  signing is halted"));
        let serve = command.find_subcommand_mut("serve").unwrap().render_long_help().to_string();
        let serve = serve.split_whitespace().collect::<Vec<_>>().join(" ");
        for setting in &config::SETTINGS {
            assert!(serve.contains(&format!("[env: {}]", setting.name)), "{}", setting.name);
            assert!(serve.contains(&format!("--{} <{}>", setting.flag, setting.value)), "{}", setting.flag);
        }
    }
}
