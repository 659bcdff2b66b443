//! Commands without a server: the capability verbs, in this process, on the database that the configuration names.
//!
//! Used when no server holds the data directory; the deploy is opened as `serve` opens it, lock included, so what a
//! boot would find and finish is found and finished here too. Each function answers with the JSON of its HTTP twin.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Method, Request};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::{Failure, remote};
use crate::app::{self, Deploy, SealChoice};
use crate::audit::{self, Filter};
use crate::clock::SystemClock;
use crate::config::Config;
use crate::enrollment::revocation::{Which, revocation_reason};
use crate::enrollment::{Agent, Agents, EnrollmentError};
use crate::entropy::Entropy;
use crate::http::authn::{AdminCaller, AdminSecret, Role};
use crate::http::error::chain;
use crate::http::limits::RateLimit;
use crate::operators::Operators;
use crate::pki::bootstrap;
use crate::pki::revocation::Revocation;
use crate::store::adopt::undo::Undoing;
use crate::store::{DatabaseUrl, Store, StoreError, adopt, copy};
use crate::tokens::resource_servers::{self, ResourceServer, created_json};
use crate::updates::doctor::Known;
use crate::updates::store::RunRow;
use crate::updates::{Direction, doctor};

/// How the audit log names whoever types commands on this machine.
const ACTOR: &str = "command-line";

/// Opens a deploy that exists. A command must never create an organisation because it was typed in another folder.
async fn open(config: &Config) -> Result<Deploy, Failure> {
    exists(config)?;
    let existing = Config { init: false, database_url_given: true, ..config.clone() };
    Ok(app::open(&existing).await?)
}

fn exists(config: &Config) -> Result<(), Failure> {
    if let DatabaseUrl::Sqlite(path) = &config.database_url
        && !path.exists()
    {
        return Err(Failure::Usage(format!(
            "there is no deploy at {}: name its --data-dir, or the --url of its server",
            path.display()
        )));
    }
    Ok(())
}

/// Whom the audit log names: the operator whose credential is set, or whoever types commands on this machine.
async fn actor(config: &Config, deploy: &Deploy) -> Result<String, Failure> {
    let Some(credential) = &config.operator_credential else { return Ok(ACTOR.to_owned()) };
    let now = deploy.pki.clock.now().seconds();
    let caller = operators(config, deploy)
        .authenticate(credential.as_bytes(), IpAddr::V4(Ipv4Addr::LOCALHOST), now)
        .await
        .map_err(|error| Failure::of(&error))?;
    Ok(caller.actor)
}

fn operators(config: &Config, deploy: &Deploy) -> Operators {
    let shared = AdminSecret::new(config.admin_secret.clone());
    Operators::new(deploy.pki.store.clone(), Arc::clone(&deploy.pki.entropy), shared)
}

/// The rows of `GET /v1/admin/operators`.
pub(super) async fn list_operators(config: &Config) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    operators(config, &deploy).to_json().await.map_err(|error| unreadable(&error))
}

/// The answer of `POST /v1/admin/operators`.
pub(super) async fn add_operator(config: &Config, name: &str, role: Role) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    let issued = operators(config, &deploy).add(name, role, &actor).await;
    issued.map(|issued| issued.to_json()).map_err(|error| Failure::of(&error))
}

/// What `PATCH /v1/admin/operators/{name}` does.
pub(super) async fn set_operator_role(config: &Config, name: &str, role: Role) -> Result<(), Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    operators(config, &deploy).set_role(name, role, &actor).await.map_err(|error| Failure::of(&error))
}

/// What `DELETE /v1/admin/operators/{name}` does.
pub(super) async fn deactivate_operator(config: &Config, name: &str) -> Result<(), Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    operators(config, &deploy).deactivate(name, &actor).await.map_err(|error| Failure::of(&error))
}

/// The answer of `POST /v1/admin/operators/{name}/reset-password`.
pub(super) async fn reset_password(config: &Config, name: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    let issued = operators(config, &deploy).reset_secret(name, &actor).await;
    issued.map(|issued| issued.to_json()).map_err(|error| Failure::of(&error))
}

/// What a route of the gateway's answers, asked in this process. `path` and query as in its URL.
pub(super) async fn ask_gateway(
    config: &Config,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let admin = AdminCaller { actor: actor(config, &deploy).await?, role: Role::Admin };
    let routes = app::gateway_routes(&deploy, config, admin).await?;
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let request = Request::builder().method(method).uri(path).body(body);
    let request = request.map_err(|error| Failure::because("the request cannot be made", error))?;
    let response = match routes.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let status = response.status();
    let read = axum::body::to_bytes(response.into_body(), usize::MAX).await;
    let bytes = read.map_err(|error| Failure::because("the answer cannot be read", error))?;
    let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    if status.is_success() { Ok(answer) } else { Err(remote::refused(status, &answer)) }
}

fn unreadable(error: &StoreError) -> Failure {
    Failure::failed(chain(error))
}

/// The rows of `GET /proxy/updates/api`.
pub async fn list_updates(config: &Config, status: Option<&str>) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    deploy.updates.list(status).await.map(Value::Array).map_err(|error| Failure::of(&error))
}

/// The answer of `GET /proxy/updates/{id}/plan` or `…/rollback-plan`.
pub(super) async fn plan_update(config: &Config, direction: Direction, id: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let plan = match direction {
        Direction::Apply => deploy.updates.plan(id).await,
        Direction::Rollback => deploy.updates.rollback_plan(id).await,
    };
    let plan = plan.map_err(|error| Failure::of(&error))?;
    serde_json::to_value(plan).map_err(|error| Failure::because("the plan cannot be shown", error))
}

/// The lines of the same with `?full=true`.
pub(super) async fn full_plan(
    config: &Config,
    direction: Direction,
    id: &str,
    told: &mut dyn FnMut(Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let deploy = open(config).await?;
    let mut lines = deploy.updates.full_plan(id, direction).await.map_err(|error| Failure::of(&error))?;
    while let Some(line) = lines.recv().await {
        told(line)?;
    }
    Ok(())
}

/// The answer of `POST /proxy/updates/{id}/apply` or `…/rollback`. `progress` is told what the events tell.
pub(super) async fn change_update(
    config: &Config,
    direction: Direction,
    id: &str,
    plan_digest: Option<&str>,
    progress: &dyn Fn(&Value),
) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let reports = deploy.updates.follow(id, false).await.map_err(|error| Failure::of(&error))?;
    // An ended stream stays ended: the run's own answer is what is waited for.
    let reports = reports.chain(futures_util::stream::pending());
    let actor = actor(config, &deploy).await?;
    let run = deploy.updates.change(id, direction, &actor, plan_digest);
    tokio::pin!(run, reports);
    loop {
        tokio::select! {
            done = &mut run => return done.map(|done| done.to_json(direction)).map_err(|error| Failure::of(&error)),
            Some(report) = reports.next() => progress(&report.body),
        }
    }
}

/// The rows of `GET /proxy/updates/{id}/proposals`.
pub(super) async fn list_proposals(config: &Config, id: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    deploy.updates.proposals(id).await.map(Value::Array).map_err(|error| Failure::of(&error))
}

/// The answer of `POST /proxy/updates/{id}/proposals`.
pub(super) async fn propose_plan(
    config: &Config,
    direction: Direction,
    id: &str,
    plan_digest: &str,
) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    let proposal = deploy.updates.propose_plan(id, direction, plan_digest, &actor).await;
    let now = deploy.pki.clock.now().seconds();
    proposal.map(|proposal| proposal.to_json(now)).map_err(|error| Failure::of(&error))
}

/// The answer of `POST /proxy/updates/{id}/proposals/{proposal_id}/approve`.
pub(super) async fn approve_proposal(config: &Config, id: &str, proposal_id: &str) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    let proposal = deploy.updates.approve_plan(id, proposal_id, &actor).await;
    let now = deploy.pki.clock.now().seconds();
    proposal.map(|proposal| proposal.to_json(now)).map_err(|error| Failure::of(&error))
}

/// The rows of `GET /proxy/updates/snapshots`.
pub async fn list_snapshots(config: &Config) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    deploy.updates.snapshots().await.map(Value::Array).map_err(|error| Failure::of(&error))
}

/// What `GET /proxy/updates/doctor` would tell, of the database as it lies: nothing is finished or changed by asking.
pub async fn ask_doctor(config: &Config) -> Result<Value, Failure> {
    exists(config)?;
    let store = store_at(&config.database_url).await?;
    let legacy = match store.sqlite_path() {
        Some(_) => adopt::examine(&store, config.db_encryption_key.as_deref()).await,
        None => Ok(None),
    };
    let findings = match legacy {
        Ok(None) => examined(&store).await,
        // What the predecessor's tables hold is told by the check of the adoption.
        Ok(Some(_)) => Err(Failure::Refused(
            "this is the predecessor's database, not adopted yet: mastio adopt --check looks at it, mastio serve adopts it"
                .to_owned(),
        )),
        Err(error) => Err(Failure::Refused(chain(&error))),
    };
    store.close().await;
    findings.map(|findings| doctor::report(&findings))
}

async fn examined(store: &Store) -> Result<Vec<doctor::Finding>, Failure> {
    if !bootstrap::has_organisation(store).await.map_err(|error| Failure::of(&error))? {
        return Err(Failure::Refused(
            "the database holds no organisation yet: mastio serve creates one".to_owned(),
        ));
    }
    let now = store.clock().now().seconds();
    // A file has one server, and none runs; a database may have another replica.
    let shared = store.sqlite_path().is_none();
    let knows = |run: &RunRow| {
        if shared && doctor::gave_a_sign(run, now) { Known::UnderWay } else { Known::Dead }
    };
    let mut tx = store.read().await.map_err(|error| unreadable(&error))?;
    doctor::examine(&mut tx, &knows).await.map_err(|error| Failure::of(&error))
}

/// The rows of `GET /v1/admin/audit`.
pub async fn list_events(config: &Config, event_type: Option<&str>, limit: u32) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let filter =
        Filter { event_type: event_type.map(str::to_owned), limit: i64::from(limit), ..Filter::default() };
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
    let actor = actor(config, &deploy).await?;
    let issued =
        deploy.pki.issue_byoca(agent_name, csr_pem, &actor).await.map_err(|error| Failure::of(&error))?;
    Ok(json!({
        "agent_id": issued.agent_id,
        "cert_pem": issued.certificate.to_pem(),
        "ca_pem": issued.org_ca.to_pem(),
        "serial": issued.certificate.serial_hex(),
        "not_after": issued.certificate.not_after().to_rfc3339(),
    }))
}

async fn agents(config: &Config) -> Result<(Deploy, Agents), Failure> {
    let deploy = open(config).await?;
    let agents = Agents::new(Arc::clone(&deploy.pki), RateLimit::per_minute(0));
    Ok((deploy, agents))
}

fn refused(error: EnrollmentError) -> Failure {
    Failure::of(&error)
}

/// The rows of `GET /v1/admin/agents`.
pub async fn list_agents(
    config: &Config,
    expiring_within_days: Option<i64>,
    after: &str,
    limit: i64,
) -> Result<Value, Failure> {
    let (_deploy, agents) = agents(config).await?;
    let list = match expiring_within_days {
        Some(days) => agents.list_expiring(days, after, limit).await,
        None => agents.list(after, limit).await,
    };
    Ok(list.map_err(refused)?.iter().map(Agent::to_json).collect())
}

/// The answer of `GET /v1/admin/agents/{id}`.
pub async fn show_agent(config: &Config, agent_id: &str) -> Result<Value, Failure> {
    let (_deploy, agents) = agents(config).await?;
    Ok(agents.show(&agents.canonical(agent_id)).await.map_err(refused)?.to_full_json())
}

/// The answer of `POST /v1/admin/agents`.
pub async fn add_agent(
    config: &Config,
    name: &str,
    display_name: Option<&str>,
    capabilities: &[String],
) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    let display_name = display_name.unwrap_or(name);
    let created =
        agents.create_managed(name, display_name, capabilities, false, &actor).await.map_err(refused)?;
    Ok(json!({
        "agent_id": created.agent.agent_id,
        "display_name": created.agent.display_name,
        "capabilities": created.agent.capabilities,
        "federated": false,
        "cert_pem": created.agent.cert_pem,
        "private_key_pem": created.private_key_pem.as_str(),
    }))
}

/// The answer of `POST /v1/admin/agents/{id}/deactivate` or `…/reactivate`.
pub async fn set_active(config: &Config, agent_id: &str, active: bool) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    let agent_id = agents.canonical(agent_id);
    let done = if active {
        agents.reactivate(&agent_id, &actor).await
    } else {
        agents.deactivate(&agent_id, &actor).await
    };
    done.map_err(refused)?;
    Ok(json!({ "agent_id": agent_id, "is_active": active }))
}

/// What `DELETE /v1/admin/agents/{id}?permanently=true` does.
pub async fn delete_agent(config: &Config, agent_id: &str) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    agents.delete(&agents.canonical(agent_id), &actor).await.map_err(refused)?;
    Ok(Value::Null)
}

/// The answer of `POST /v1/admin/agents/{id}/renew`.
pub async fn renew_agent(config: &Config, agent_id: &str) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    let renewed = agents.renew(&agents.canonical(agent_id), None, None, &actor).await.map_err(refused)?;
    Ok(renewed.to_json())
}

/// The answer of `POST /v1/admin/certs/revoke`.
pub async fn revoke(
    config: &Config,
    serial: Option<&str>,
    agent_id: Option<&str>,
    reason: &str,
) -> Result<Value, Failure> {
    let (_deploy, agents) = agents(config).await?;
    let which = match (serial, agent_id) {
        (Some(serial), _) => Which::Serial(serial.to_owned()),
        (None, agent_id) => Which::Agent(agents.canonical(agent_id.unwrap_or_default())),
    };
    let reason = revocation_reason(Some(reason)).map_err(refused)?;
    let revoked = agents.revoke(&which, reason, ACTOR).await.map_err(refused)?;
    Ok(json!({ "revoked": revoked.iter().map(Revocation::to_json).collect::<Vec<_>>() }))
}

/// The rows of `GET /v1/admin/certs/revoked`.
pub async fn list_revoked(config: &Config, after: &str, limit: i64) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let list = deploy.pki.revocations(after, limit).await.map_err(|error| Failure::of(&error))?;
    Ok(list.iter().map(Revocation::to_json).collect())
}

/// The rows of `GET /v1/admin/enrollments`.
pub async fn list_requests(config: &Config, status: &str, after: &str, limit: i64) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let now = deploy.pki.clock.now().seconds();
    let list = agents.requests(status, after, limit).await.map_err(refused)?;
    Ok(list.iter().map(|request| request.to_json(now)).collect())
}

/// The answer of `GET /v1/admin/enrollments/{session}`.
pub async fn show_request(config: &Config, session_id: &str) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let now = deploy.pki.clock.now().seconds();
    Ok(agents.request(session_id).await.map_err(refused)?.to_json(now))
}

/// The answer of `POST /v1/admin/enrollments/{session}/approve`.
pub async fn approve(
    config: &Config,
    session_id: &str,
    agent_id: &str,
    capabilities: &[String],
) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    let agent_id = agents.approve(session_id, agent_id, capabilities, &actor).await.map_err(refused)?;
    Ok(json!({ "status": "approved", "agent_id": agent_id }))
}

/// The answer of `POST /v1/admin/enrollments/{session}/reject`.
pub async fn reject(config: &Config, session_id: &str, reason: &str) -> Result<Value, Failure> {
    let (deploy, agents) = agents(config).await?;
    let actor = actor(config, &deploy).await?;
    agents.reject(session_id, reason, &actor).await.map_err(refused)?;
    Ok(json!({ "status": "rejected" }))
}

/// The rows of `GET /v1/admin/resource-servers`.
pub(super) async fn list_resource_servers(config: &Config) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let list = resource_servers::list(&deploy.pki).await.map_err(|error| Failure::of(&error))?;
    Ok(Value::Array(list.iter().map(ResourceServer::to_json).collect()))
}

/// The answer of `POST /v1/admin/resource-servers`.
pub(super) async fn add_resource_server(
    config: &Config,
    name: &str,
    resource: &str,
) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    let added = resource_servers::add(&deploy.pki, name, resource, &actor).await;
    let (server, secret) = added.map_err(|error| Failure::of(&error))?;
    Ok(created_json(&server, &secret))
}

/// What `DELETE /v1/admin/resource-servers/{id}` does.
pub(super) async fn remove_resource_server(config: &Config, id: &str) -> Result<(), Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    resource_servers::remove(&deploy.pki, id, &actor).await.map_err(|error| Failure::of(&error))
}

/// The answer of `GET /v1/admin/pki/overlap`.
pub(super) async fn show_overlap(config: &Config) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    deploy.updates.overlap().await.map_err(|error| Failure::of(&error))
}

/// The answer of `POST /v1/admin/pki/settle`.
pub(super) async fn settle_overlap(config: &Config, break_agents: bool) -> Result<Value, Failure> {
    let deploy = open(config).await?;
    let actor = actor(config, &deploy).await?;
    deploy.updates.settle(break_agents, &actor).await.map_err(|error| Failure::of(&error))
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

/// Puts the predecessor's database back; `agreed` is asked once it is known what would be lost.
pub(super) async fn undo_adoption(
    config: &Config,
    copy: Option<&Path>,
    agreed: impl FnOnce(&Undoing) -> Result<(), Failure>,
) -> Result<Value, Failure> {
    exists(config)?;
    app::undo_adoption(config, copy, agreed).await
}

/// Seals everything under another key.
pub(super) async fn rotate_seal(config: &Config, choice: SealChoice) -> Result<Value, Failure> {
    exists(config)?;
    let mut rotated = app::rotate_seal(config, choice, ACTOR).await?;
    let (kept, next) = if rotated["to"] == "passphrase" {
        (rotated["from"] == "file", "start with MCP_PROXY_DB_ENCRYPTION_KEY set to the new passphrase")
    } else {
        (rotated["from"] == "file", "start without MCP_PROXY_DB_ENCRYPTION_KEY, and back seal.key up")
    };
    if let Some(report) = rotated.as_object_mut() {
        report.insert("next".to_owned(), json!(next));
        if kept {
            let former = "seal.key.former opens the backups made until now: keep it with them, or delete it";
            report.insert("former_key".to_owned(), json!(former));
        }
    }
    Ok(rotated)
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
