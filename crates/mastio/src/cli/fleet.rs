//! `mastio agents` and `mastio enrollments`: each command is one request to the server, or the same verb in this process.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Failure, Target, Way, local, show, table, way};

/// Rows that one answer has at most.
const ROWS_MAX: i64 = 10_000;

fn limit() -> clap::builder::RangedI64ValueParser<i64> {
    clap::value_parser!(i64).range(1..=ROWS_MAX)
}

#[derive(Debug, Subcommand)]
pub(super) enum AgentsCommand {
    /// List agents by id.
    List {
        /// Only active ones whose certificate ends within so many days, or has ended.
        #[arg(long, value_name = "DAYS")]
        expiring_within_days: Option<i64>,
        /// Begin after this id.
        #[arg(long, value_name = "ID", default_value = "")]
        after: String,
        /// Agents at most.
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = limit())]
        limit: i64,
        #[command(flatten)]
        target: Target,
    },
    /// Show an agent with its certificate.
    Show {
        /// The agent, as NAME or ORG::NAME.
        agent: String,
        #[command(flatten)]
        target: Target,
    },
    /// Create an agent whose key is made here; certificate and key, PEM, on standard output, this once.
    Add {
        /// Its name: 1 to 64 of A-Z a-z 0-9 . _ -
        name: String,
        /// What people call it.
        #[arg(long, value_name = "TEXT")]
        display_name: Option<String>,
        /// What it may do; may be given more than once.
        #[arg(long = "capability", value_name = "CAPABILITY")]
        capabilities: Vec<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Set an agent aside: its next request is refused everywhere.
    Deactivate {
        /// The agent, as NAME or ORG::NAME.
        agent: String,
        #[command(flatten)]
        target: Target,
    },
    /// Take a deactivated agent back, with the certificate that it has.
    Reactivate {
        /// The agent, as NAME or ORG::NAME.
        agent: String,
        #[command(flatten)]
        target: Target,
    },
    /// Delete an agent with its certificate, key and bindings. Its name is free then.
    Delete {
        /// The agent, as NAME or ORG::NAME.
        agent: String,
        /// Say that it is meant: there is no way back.
        #[arg(long, short, required = true)]
        yes: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Issue an agent's certificate anew for the key that it has; the former one stays good for 48 hours.
    Renew {
        /// The agent, as NAME or ORG::NAME.
        agent: String,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum EnrollmentsCommand {
    /// List requests for an identity.
    List {
        /// pending, expired, approved or rejected.
        #[arg(long, value_name = "STATUS", default_value = "pending")]
        status: String,
        /// Begin after this session id.
        #[arg(long, value_name = "ID", default_value = "")]
        after: String,
        /// Requests at most.
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = limit())]
        limit: i64,
        #[command(flatten)]
        target: Target,
    },
    /// Show a request: who asks, from where, with which key.
    Show {
        /// The session id.
        #[arg(allow_hyphen_values = true)]
        session: String,
        #[command(flatten)]
        target: Target,
    },
    /// Certify the requester's key as an agent. A known agent is enrolled anew in place.
    Approve {
        /// The session id.
        #[arg(allow_hyphen_values = true)]
        session: String,
        /// The agent, as NAME or ORG::NAME.
        #[arg(long, value_name = "AGENT")]
        agent_id: String,
        /// What it may do; may be given more than once.
        #[arg(long = "capability", value_name = "CAPABILITY")]
        capabilities: Vec<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Refuse a request.
    Reject {
        /// The session id.
        #[arg(allow_hyphen_values = true)]
        session: String,
        /// What the requester reads.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        #[command(flatten)]
        target: Target,
    },
}

pub(super) async fn agents(command: AgentsCommand) -> Result<(), Failure> {
    match command {
        AgentsCommand::List { expiring_within_days, after, limit, target } => {
            let list = match way(&target)? {
                Way::Server(remote) => {
                    let (limit, days) =
                        (limit.to_string(), expiring_within_days.map(|days| days.to_string()));
                    let mut query = vec![("after", after.as_str()), ("limit", &limit)];
                    query.extend(days.as_deref().map(|days| ("expiring_within_days", days)));
                    remote.get(&["v1", "admin", "agents"], &query).await?
                }
                Way::InProcess(config) => {
                    local::list_agents(&config, expiring_within_days, &after, limit).await?
                }
            };
            show(&target, &list, table::agents)
        }
        AgentsCommand::Show { agent, target } => {
            let shown = match way(&target)? {
                Way::Server(remote) => remote.get(&["v1", "admin", "agents", &agent], &[]).await?,
                Way::InProcess(config) => local::show_agent(&config, &agent).await?,
            };
            show(&target, &shown, table::fields)
        }
        AgentsCommand::Add { name, display_name, capabilities, target } => {
            let created = match way(&target)? {
                Way::Server(remote) => {
                    let body = json!({ "agent_name": name, "display_name": display_name, "capabilities": capabilities });
                    remote.post(&["v1", "admin", "agents"], &body).await?
                }
                Way::InProcess(config) => {
                    local::add_agent(&config, &name, display_name.as_deref(), &capabilities).await?
                }
            };
            show(&target, &created, |created| {
                let text = |field: &str| created[field].as_str().unwrap_or_default().to_owned();
                (text("cert_pem") + &text("private_key_pem")).trim_end().to_owned()
            })
        }
        AgentsCommand::Deactivate { agent, target } => set_active(&target, &agent, false).await,
        AgentsCommand::Reactivate { agent, target } => set_active(&target, &agent, true).await,
        AgentsCommand::Delete { agent, yes: _, target } => {
            match way(&target)? {
                Way::Server(remote) => {
                    remote.delete(&["v1", "admin", "agents", &agent], &[("permanently", "true")]).await?
                }
                Way::InProcess(config) => local::delete_agent(&config, &agent).await?,
            };
            show(&target, &json!({ "agent_id": agent, "deleted": true }), table::fields)
        }
        AgentsCommand::Renew { agent, target } => {
            let renewed = match way(&target)? {
                Way::Server(remote) => {
                    remote.post(&["v1", "admin", "agents", &agent, "renew"], &json!({})).await?
                }
                Way::InProcess(config) => local::renew_agent(&config, &agent).await?,
            };
            show(&target, &renewed, |renewed| {
                renewed["cert_pem"].as_str().unwrap_or_default().trim_end().to_owned()
            })
        }
    }
}

async fn set_active(target: &Target, agent: &str, active: bool) -> Result<(), Failure> {
    let verb = if active { "reactivate" } else { "deactivate" };
    let done: Value = match way(target)? {
        Way::Server(remote) => remote.post(&["v1", "admin", "agents", agent, verb], &json!({})).await?,
        Way::InProcess(config) => local::set_active(&config, agent, active).await?,
    };
    show(target, &done, table::fields)
}

pub(super) async fn enrollments(command: EnrollmentsCommand) -> Result<(), Failure> {
    const PATH: [&str; 3] = ["v1", "admin", "enrollments"];
    match command {
        EnrollmentsCommand::List { status, after, limit, target } => {
            let list = match way(&target)? {
                Way::Server(remote) => {
                    let limit = limit.to_string();
                    let query = [("status", status.as_str()), ("after", &after), ("limit", &limit)];
                    remote.get(&PATH, &query).await?
                }
                Way::InProcess(config) => local::list_requests(&config, &status, &after, limit).await?,
            };
            show(&target, &list, table::enrollments)
        }
        EnrollmentsCommand::Show { session, target } => {
            let shown = match way(&target)? {
                Way::Server(remote) => remote.get(&[&PATH[..], &[session.as_str()]].concat(), &[]).await?,
                Way::InProcess(config) => local::show_request(&config, &session).await?,
            };
            show(&target, &shown, table::fields)
        }
        EnrollmentsCommand::Approve { session, agent_id, capabilities, target } => {
            let done = match way(&target)? {
                Way::Server(remote) => {
                    let body = json!({ "agent_id": agent_id, "capabilities": capabilities });
                    remote.post(&[&PATH[..], &[session.as_str(), "approve"]].concat(), &body).await?
                }
                Way::InProcess(config) => local::approve(&config, &session, &agent_id, &capabilities).await?,
            };
            show(&target, &done, table::fields)
        }
        EnrollmentsCommand::Reject { session, reason, target } => {
            let done = match way(&target)? {
                Way::Server(remote) => {
                    let path = [&PATH[..], &[session.as_str(), "reject"]].concat();
                    remote.post(&path, &json!({ "reason": reason })).await?
                }
                Way::InProcess(config) => local::reject(&config, &session, &reason).await?,
            };
            show(&target, &done, table::fields)
        }
    }
}
