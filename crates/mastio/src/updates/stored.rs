//! Judges the state as it is stored, after a run's commit: what was accepted is what stands there, whole.
//!
//! `verify` judges what a migration made before anything changes. Between that and the activation lie the database,
//! an operator's SQL and our own statements; nothing of that is believed here. Memory stays bounded by pages, and each
//! cell of the fleet is compared by the digest that it was accepted with.

use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use mastio_core::x509::{Certificate, path};

use super::error::UpdateError;
use super::migration::{Cell, FleetColumn};
use super::store as rows;
use super::{Direction, Updates};
use crate::audit::{self, Verdict};
use crate::pki::Authority;
use crate::pki::store::{config_key, hex};

/// Cells that are read together.
const PAGE: i64 = 512;

fn wrong(what: impl Into<String>) -> UpdateError {
    UpdateError::StoredState(what.into())
}

/// The CA in force: each key is its certificate's, and after an apply the intermediate stands under the Org CA.
pub(super) fn authority(
    authority: &Authority,
    direction: Direction,
    has_certificates: bool,
    now: UnixTime,
) -> Result<(), UpdateError> {
    let fits = |certificate: &Certificate, key: Option<&[u8]>| {
        key.is_none_or(|spki| certificate.public_key_matches_spki(spki))
    };
    if !fits(&authority.org_ca, authority.org_ca_key.as_deref().map(|key| key.spki_der())) {
        return Err(wrong("the Org CA, whose key is another one"));
    }
    let Some(mastio_ca) = &authority.mastio_ca else { return Ok(()) };
    if !fits(mastio_ca, authority.mastio_ca_key.as_deref().map(|key| key.spki_der())) {
        return Err(wrong("the intermediate, whose key is another one"));
    }
    if direction == Direction::Apply && has_certificates {
        path::verify_ca_chain(mastio_ca, &authority.org_ca, now)
            .map_err(|_| wrong("the intermediate under the Org CA"))?;
    }
    Ok(())
}

/// Events by which an agent's row goes on to something else through our own doors.
const GOES_ON: [EventType; 6] = [
    EventType::AgentCertificateRenewed,
    EventType::AgentDeleted,
    EventType::AgentCreated,
    EventType::EnrollmentApproved,
    EventType::AgentByocaEnrolled,
    EventType::AgentSpireEnrolled,
];
/// Events about one agent that are looked at, and agents about whom they are looked for.
const EVENTS: i64 = 64;
const GONE_ON_MAX: usize = 1000;

/// Whether the agent has renewed, was enrolled anew or deleted since the event `since`. No change is without its event
/// (invariant I4), and the chain of events is verified beside this.
async fn has_gone_on(updates: &Updates, agent_id: &str, since: i64) -> Result<bool, UpdateError> {
    let filter = audit::Filter {
        subject: Some(agent_id.to_owned()),
        after: Some(since),
        limit: EVENTS,
        ..audit::Filter::default()
    };
    let events = audit::list(&updates.pki.store, &filter).await?;
    let goes_on = |name: &str| GOES_ON.iter().any(|event_type| event_type.as_str() == name);
    Ok(events.iter().any(|event| event["event_type"].as_str().is_some_and(goes_on)))
}

/// The event with which a run of this direction was committed.
fn committed_as(direction: Direction) -> EventType {
    match direction {
        Direction::Apply => EventType::UpdateApplied,
        Direction::Rollback => EventType::UpdateRolledBack,
    }
}

/// Every cell of the fleet that the run wrote reads as it was accepted, and there are as many as it wrote. An agent that
/// has gone on since is left to what it has become.
pub(super) async fn fleet(
    updates: &Updates,
    column: FleetColumn,
    direction: Direction,
    run_id: &str,
) -> Result<(), UpdateError> {
    let store = &updates.pki.store;
    let committed = audit::event_of_run(store, committed_as(direction), run_id).await?;
    let mut gone_on = 0;
    let (mut after, mut seen, mut differ, mut first) = (String::new(), 0, 0_u64, None);
    loop {
        let page = rows::written_page(&mut store.read().await?, column, run_id, &after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after.clone_from(&last.agent_id);
        seen += i64::try_from(page.len()).unwrap_or(i64::MAX);
        for cell in &page {
            if !is_as_accepted(cell, column, run_id) {
                if gone_on < GONE_ON_MAX
                    && let Some(committed) = committed
                    && has_gone_on(updates, &cell.agent_id, committed).await?
                {
                    gone_on += 1;
                    continue;
                }
                differ += 1;
                first.get_or_insert_with(|| cell.agent_id.clone());
            }
        }
    }
    if let Some(agent_id) = first {
        return Err(wrong(format!("{differ} agents' {}, {agent_id} the first", column.as_str())));
    }
    let mut tx = store.read().await?;
    match rows::written(&mut tx, run_id).await? {
        Some(written) if written != seen => {
            Err(wrong(format!("{} that {written} agents got and {seen} have", column.as_str())))
        }
        _ => Ok(()),
    }
}

fn is_as_accepted(cell: &rows::WrittenCell, column: FleetColumn, run_id: &str) -> bool {
    let Some(text) = &cell.text else { return false };
    if column == FleetColumn::CertPem && cell.facts.is_none() {
        return false;
    }
    match &cell.accepted {
        Some(accepted) => {
            *accepted == rows::accepted(run_id, column, &cell.agent_id, text, cell.facts.as_ref())
        }
        // A run of an older version has no digests.
        None => cell.after.as_ref() == Some(text),
    }
}

/// What keeps old leaves going: they are superseded, not forgotten, and the Org CA that was replaced is still trusted.
pub(super) async fn overlap(
    updates: &Updates,
    authority: &Authority,
    run_id: &str,
) -> Result<(), UpdateError> {
    let mut tx = updates.pki.store.read().await?;
    let forgotten = rows::not_superseded(&mut tx, run_id).await?;
    if forgotten > 0 {
        return Err(wrong(format!("{forgotten} replaced leaves, which are not kept as superseded")));
    }
    let root = rows::image(&mut tx, run_id, &Cell::config(config_key::ORG_CA_CERT)).await?;
    let Some(before) = root.filter(|image| image.changes).and_then(|image| image.before) else {
        return Ok(());
    };
    let replaced = Certificate::from_pem(&before)?;
    if replaced.spki_der() == authority.org_ca.spki_der() {
        return Ok(());
    }
    let anchor = authority.retiring.iter().find(|anchor| anchor.certificate == replaced);
    let Some(anchor) = anchor else {
        return Err(wrong("the trust bundle, in which the replaced Org CA is missing"));
    };
    let had_key = rows::image(&mut tx, run_id, &Cell::config_key(config_key::ORG_CA_KEY))
        .await?
        .is_some_and(|image| image.before.is_some());
    let key_fits = anchor.key.as_deref().is_some_and(|key| replaced.public_key_matches_spki(key.spki_der()));
    if had_key && !key_fits {
        return Err(wrong("the replaced Org CA, whose key is missing or another one"));
    }
    // Every leaf of ours stands under the CA in force, also one that no run has seen (invariant I2).
    let root = hex(&authority.org_ca.key_id());
    let between = authority.mastio_ca.as_ref().map_or_else(|| root.clone(), |ca| hex(&ca.key_id()));
    match rows::leaves_under_another_ca(&mut tx, [&root, &between]).await? {
        0 => Ok(()),
        left => Err(wrong(format!("{left} leaves, which stand under another CA"))),
    }
}

/// The run's own events stand in the chain, and it is unbroken from the first of them on (invariants I4 and I5).
pub(super) async fn recorded(
    updates: &Updates,
    direction: Direction,
    run_id: &str,
) -> Result<(), UpdateError> {
    let store = &updates.pki.store;
    let first = match direction {
        Direction::Apply => EventType::UpdateSnapshotTaken,
        Direction::Rollback => EventType::UpdateRolledBack,
    };
    let began = audit::event_of_run(store, first, run_id).await?;
    let committed = audit::event_of_run(store, committed_as(direction), run_id).await?;
    let (Some(began), Some(_)) = (began, committed) else {
        return Err(wrong("the audit log, in which this run is missing"));
    };
    match audit::verify_since(store, began).await? {
        Verdict::Sound(_) => Ok(()),
        Verdict::Broken(found) => Err(wrong(format!("the audit log: {found}"))),
    }
}
