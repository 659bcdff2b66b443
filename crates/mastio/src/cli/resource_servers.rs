//! `mastio resource-servers`: credentials of the services that may ask about access tokens.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Failure, Target, Way, local, show, table, way};

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum ResourceServersCommand {
    /// List the resource servers.
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Register a resource server; its secret is shown once.
    Add {
        /// Its name: A-Z a-z 0-9 . _ -
        name: String,
        /// The resource that agents ask tokens for: an https URL.
        #[arg(long, value_name = "URL")]
        resource: String,
        #[command(flatten)]
        target: Target,
    },
    /// Withdraw a resource server's credential.
    Remove {
        /// Its id, as `list` shows it.
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        target: Target,
    },
}

pub(super) async fn run(command: ResourceServersCommand) -> Result<(), Failure> {
    const PATH: [&str; 3] = ["v1", "admin", "resource-servers"];
    match command {
        ResourceServersCommand::List { target } => {
            let list = match way(&target)? {
                Way::Server(remote) => remote.get(&PATH, &[]).await?,
                Way::InProcess(config) => local::list_resource_servers(&config).await?,
            };
            show(&target, &list, |list| {
                let rows: Vec<String> = list.as_array().into_iter().flatten().map(table::fields).collect();
                if rows.is_empty() { "no resource servers".to_owned() } else { rows.join("\n") }
            })
        }
        ResourceServersCommand::Add { name, resource, target } => {
            let added: Value = match way(&target)? {
                Way::Server(remote) => {
                    remote.post(&PATH, &json!({ "name": name, "resource": resource })).await?
                }
                Way::InProcess(config) => local::add_resource_server(&config, &name, &resource).await?,
            };
            show(&target, &added, table::fields)
        }
        ResourceServersCommand::Remove { id, target } => {
            match way(&target)? {
                Way::Server(remote) => {
                    remote.delete(&[PATH[0], PATH[1], PATH[2], &id], &[]).await?;
                }
                Way::InProcess(config) => local::remove_resource_server(&config, &id).await?,
            }
            show(&target, &json!({ "resource_server_id": id, "removed": true }), table::fields)
        }
    }
}
