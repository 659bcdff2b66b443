//! `mastio admin`: operators with secrets of their own.

use clap::Subcommand;
use serde_json::json;

use super::{Failure, Target, Way, local, show, table, way};
use crate::http::authn::Role;

#[derive(Debug, Subcommand)]
pub(super) enum AdminCommand {
    /// Add an operator and show their secret, once.
    Add {
        /// How they sign in and how the audit log names them: a-z 0-9 . _ @ + -
        name: String,
        /// What they may do: viewer reads, operator applies and enrolls, admin manages operators too.
        #[arg(long, value_name = "ROLE", default_value = "operator", value_parser = role)]
        role: Role,
        #[command(flatten)]
        target: Target,
    },
    /// List operators; the shared secret is the first of them.
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Give an operator another role.
    SetRole {
        /// Whom.
        name: String,
        /// viewer, operator or admin.
        #[arg(value_parser = role)]
        role: Role,
        #[command(flatten)]
        target: Target,
    },
    /// Deactivate an operator, for good.
    Deactivate {
        /// Whom.
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Give an operator another secret and show it, once; the former one ends.
    ResetPassword {
        /// Whom.
        name: String,
        #[command(flatten)]
        target: Target,
    },
}

fn role(text: &str) -> Result<Role, String> {
    Role::parse(text).ok_or_else(|| "one of viewer, operator, admin".to_owned())
}

pub(super) async fn execute(command: AdminCommand) -> Result<(), Failure> {
    match command {
        AdminCommand::Add { name, role, target } => {
            let issued = match way(&target)? {
                Way::Server(remote) => remote.add_operator(&name, role.as_str()).await?,
                Way::InProcess(config) => local::add_operator(&config, &name, role).await?,
            };
            show(&target, &issued, table::issued)
        }
        AdminCommand::List { target } => {
            let list = match way(&target)? {
                Way::Server(remote) => remote.list_operators().await?,
                Way::InProcess(config) => local::list_operators(&config).await?,
            };
            show(&target, &list, table::operators)
        }
        AdminCommand::SetRole { name, role, target } => {
            match way(&target)? {
                Way::Server(remote) => drop(remote.set_operator_role(&name, role.as_str()).await?),
                Way::InProcess(config) => local::set_operator_role(&config, &name, role).await?,
            }
            show(&target, &json!({ "name": name, "role": role.as_str() }), table::fields)
        }
        AdminCommand::Deactivate { name, target } => {
            match way(&target)? {
                Way::Server(remote) => drop(remote.deactivate_operator(&name).await?),
                Way::InProcess(config) => local::deactivate_operator(&config, &name).await?,
            }
            show(&target, &json!({ "name": name, "deactivated": true }), table::fields)
        }
        AdminCommand::ResetPassword { name, target } => {
            let issued = match way(&target)? {
                Way::Server(remote) => remote.reset_password(&name).await?,
                Way::InProcess(config) => local::reset_password(&config, &name).await?,
            };
            show(&target, &issued, table::issued)
        }
    }
}
