//! Commands without a server: the capability verbs, in this process, on the database that the configuration names.
//!
//! Used when no server holds the data directory; the deploy is opened as `serve` opens it, lock included, so what a
//! boot would find and finish is found and finished here too. Each function answers with the JSON of its HTTP twin.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{Direction, Failure};
use crate::app::{self, Deploy};
use crate::audit::{self, Filter};
use crate::clock::SystemClock;
use crate::config::Config;
use crate::entropy::Entropy;
use crate::http::error::chain;
use crate::store::{DatabaseUrl, Store, StoreError, adopt, copy};
use crate::updates::Progress;

/// How the audit log names whoever types commands on this machine.
const ACTOR: &str = "command-line";

/// Opens a deploy that exists. A command must never create an organisation because it was typed in another folder.
async fn open(config: &Config) -> Result<Deploy, Failure> {
    if let DatabaseUrl::Sqlite(path) = &config.database_url
        && !path.exists()
    {
        return Err(Failure::Usage(format!(
            "there is no deploy at {}: name its --data-dir, or the --url of its server",
            path.display()
        )));
    }
    let existing = Config { init: false, database_url_given: true, ..config.clone() };
    Ok(app::open(&existing).await?)
}

fn unreadable(error: &StoreError) -> Failure {
    Failure::failed(chain(error))
}

/// The rows of `GET /proxy/updates/api`.
pub async fn list_updates(config: &Config, status: Option<&str>) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    deploy.updates.list(status).await.map(Value::Array).map_err(|error| Failure::of(&error))
}

/// The answer of `GET /proxy/updates/{id}/plan`.
pub async fn plan_update(config: &Config, id: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let plan = deploy.updates.plan(id).await.map_err(|error| Failure::of(&error))?;
    serde_json::to_value(plan).map_err(|error| Failure::because("the plan cannot be shown", error))
}

/// The answer of `POST /proxy/updates/{id}/apply` or `…/rollback`. `progress` is told `{phase, done, total}`.
pub async fn change_update(
    config: &Config,
    direction: Direction,
    id: &str,
    progress: &dyn Fn(&Value),
) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let mut reports = deploy.updates.watch();
    let run = async {
        match direction {
            Direction::Apply => deploy.updates.apply(id, ACTOR).await,
            Direction::Rollback => deploy.updates.rollback(id, ACTOR).await,
        }
    };
    tokio::pin!(run);
    let done = loop {
        tokio::select! {
            done = &mut run => break done.map_err(|error| Failure::of(&error))?,
            Ok(()) = reports.changed() => {
                let report = reports.borrow_and_update().as_ref().map(shown);
                if let Some(report) = report {
                    progress(&report);
                }
            }
        }
    };
    let at = done.at.to_rfc3339();
    Ok(match direction {
        Direction::Apply => {
            json!({ "migration_id": done.migration_id, "status": "applied", "applied_at": at })
        }
        Direction::Rollback => {
            json!({ "migration_id": done.migration_id, "status": "rolled_back", "rolled_back_at": at })
        }
    })
}

fn shown(progress: &Progress) -> Value {
    progress.to_json()
}

/// The rows of `GET /v1/admin/audit`.
pub async fn list_events(config: &Config, event_type: Option<&str>, limit: u32) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let filter = Filter { event_type: event_type.map(str::to_owned), before: None, limit: i64::from(limit) };
    audit::list(&deploy.pki.store, &filter).await.map(Value::Array).map_err(|error| unreadable(&error))
}

/// `{"sound": true, "sequence": …, "hash": …}`, or `{"sound": false, "reason": …}`.
pub async fn verify_audit(config: &Config) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    Ok(audit::verify(&deploy.pki.store).await.map_err(|error| unreadable(&error))?.to_json())
}

/// The answer of `POST /v1/admin/pki/byoca-certificates`.
pub async fn issue_byoca(config: &Config, agent_name: &str, csr_pem: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let issued =
        deploy.pki.issue_byoca(agent_name, csr_pem, ACTOR).await.map_err(|error| Failure::of(&error))?;
    Ok(json!({
        "agent_id": issued.agent_id,
        "cert_pem": issued.certificate.to_pem(),
        "ca_pem": issued.org_ca.to_pem(),
        "serial": issued.certificate.serial_hex(),
        "not_after": issued.certificate.not_after().to_rfc3339(),
    }))
}

/// What `serve` would find in the database, which stays as it is.
pub async fn check_adoption(config: &Config) -> Result<Value, Failure> {
    let store = store_at(&config.database_url).await?;
    let found = adopt::examine(&store, config.db_encryption_key.as_deref())
        .await
        .map_err(|error| Failure::Refused(chain(&error)))?;
    store.close().await;
    Ok(match found {
        None => json!({ "adoptable": false, "reason": "the database is empty or Mastio's already" }),
        Some(found) => json!({
            "adoptable": true, "org_id": found.org_id, "agents": found.agents, "audit_break": found.audit_break,
        }),
    })
}

/// Copies every table into `destination`, which must be empty.
pub async fn copy_database(config: &Config, destination: &DatabaseUrl) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let target = store_at(destination).await?;
    let rows =
        copy::copy(&deploy.pki.store, &target).await.map_err(|error| Failure::Refused(chain(&error)))?;
    target.close().await;
    Ok(json!({ "rows": rows, "to": destination.redacted() }))
}

async fn store_at(url: &DatabaseUrl) -> Result<Store, Failure> {
    Store::open(url, false, Arc::new(SystemClock), Arc::new(Entropy::default()))
        .await
        .map_err(|error| unreadable(&error))
}
