//! The conversion, inside the one transaction: keys sealed in place, facts of leaves beside them, snapshots as ours.
//!
//! No column is touched but those that hold a private key. `pending_updates` stays as it is; the detector completes
//! its rows.

use std::num::NonZero;
use std::sync::Arc;

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use serde_json::json;
use zeroize::Zeroizing;

use super::examine::{Findings, Snapshot, StoredCa};
use super::store::{self, AgentRow, ImageRow, RunRow};
use super::{AdoptError, PREDECESSOR};
use crate::entropy::Entropy;
use crate::pki::keys::SealingKey;
use crate::pki::store::{
    CertificateFacts, add_retiring_anchor, anchor_place, config, config_key, config_place, hex,
    set_certificate_facts, set_config, token_key_place,
};
use crate::store::{Value, WriteTx};
use crate::values;

/// What the conversion did.
#[derive(Debug, Default)]
pub(super) struct Converted {
    pub keys_sealed: i64,
    pub leaves_unreadable: i64,
    pub leaves_superseded: i64,
    pub snapshots: i64,
    pub retiring_anchors: i64,
}

/// Converts everything that was found.
pub(super) async fn convert(
    tx: &mut WriteTx,
    findings: Findings,
    sealing: &SealingKey,
    entropy: &Entropy,
    now: mastio_core::time::UnixMicros,
) -> Result<Converted, AdoptError> {
    let mut done = Converted::default();
    seal_keys(tx, sealing, &findings.stored, &mut done).await?;

    let mut candidates: Vec<Certificate> = findings.intermediate.iter().cloned().collect();
    candidates.push(findings.org_ca.clone());
    candidates.extend(findings.snapshots.iter().map(|snapshot| snapshot.org_ca.clone()));
    let runs = findings
        .snapshots
        .into_iter()
        .map(|snapshot| Run { run_id: entropy.ulid(now), at: recorded_time(&snapshot.created_at), snapshot })
        .collect();
    let fleet = Arc::new(Fleet { candidates, runs });
    let images = convert_fleet(tx, &fleet, &mut done).await?;
    for (run, leaves) in fleet.runs.iter().zip(images) {
        convert_snapshot(tx, run, leaves, &findings.org_ca, sealing, now.seconds(), &mut done).await?;
    }
    Ok(done)
}

/// Our form of a time that the predecessor wrote. One that cannot be read stays as it is.
fn recorded_time(text: &str) -> String {
    UnixTime::parse(text).map_or_else(|| text.to_owned(), UnixTime::to_rfc3339)
}

async fn seal_keys(
    tx: &mut WriteTx,
    sealing: &SealingKey,
    stored: &[StoredCa],
    done: &mut Converted,
) -> Result<(), AdoptError> {
    let mut after = String::new();
    loop {
        let page = store::config_keys(tx, &after).await?;
        let Some(last) = page.last() else { break };
        for key in &page {
            let sealed = sealing.seal(&config_place(&key.row_key), key.pem.as_bytes())?;
            store::set_config_key(tx, &key.row_key, &sealed).await?;
            done.keys_sealed += 1;
        }
        after.clone_from(&last.row_key);
    }
    after.clear();
    loop {
        let page = store::token_keys(tx, &after).await?;
        let Some(last) = page.last() else { break };
        for key in &page {
            let sealed = sealing.seal(&token_key_place(&key.row_key), key.pem.as_bytes())?;
            store::set_token_key(tx, &key.row_key, &sealed).await?;
            done.keys_sealed += 1;
        }
        after.clone_from(&last.row_key);
    }
    after.clear();
    loop {
        let page = store::archived_keys(tx, &after).await?;
        let Some(last) = page.last() else { break };
        for key in &page {
            let place = format!("legacy_pki_archive/{}/legacy_pem", key.row_key);
            store::set_archived_key(tx, &key.row_key, &sealing.seal(&place, key.pem.as_bytes())?).await?;
            done.keys_sealed += 1;
        }
        after.clone_from(&last.row_key);
    }
    for ca in stored {
        if let Some(pem) = &ca.missing_cert_pem {
            set_config(tx, ca.cert_key, pem).await?;
        }
        set_config(tx, ca.key_key, &sealing.seal(&config_place(ca.key_key), ca.key_pem.as_bytes())?).await?;
        done.keys_sealed += 1;
    }
    Ok(())
}

/// A predecessor's run on its way to becoming a row of ours.
struct Run {
    run_id: String,
    at: String,
    snapshot: Snapshot,
}

impl Run {
    /// Whether it changed state as a whole. Anything else left what it left when it stopped.
    fn is_committed(&self) -> bool {
        self.snapshot.status.as_deref() == Some("applied")
    }

    /// Whether its changes stand, wholly or in part: then agents out there hold what was there before.
    fn stands(&self) -> bool {
        self.snapshot.status.as_deref() != Some("rolled_back")
    }
}

/// What every page of agents is held against.
struct Fleet {
    candidates: Vec<Certificate>,
    runs: Vec<Run>,
}

/// What one page of agents gives.
#[derive(Default)]
struct Page {
    facts: Vec<Vec<Value>>,
    unreadable: i64,
    superseded: Vec<Vec<Value>>,
    images: Vec<Vec<Value>>,
    images_by_run: Vec<i64>,
}

impl Page {
    fn absorb(&mut self, other: Self) {
        self.facts.extend(other.facts);
        self.unreadable += other.unreadable;
        self.superseded.extend(other.superseded);
        self.images.extend(other.images);
        for (sum, images) in self.images_by_run.iter_mut().zip(other.images_by_run) {
            *sum += images;
        }
    }
}

impl Fleet {
    fn page(&self) -> Page {
        Page { images_by_run: vec![0; self.runs.len()], ..Page::default() }
    }

    /// Facts, images and superseded leaves of some agents. All CPU: signatures are verified.
    fn read(&self, agents: &[AgentRow]) -> Page {
        let mut page = self.page();
        for agent in agents {
            let leaf = agent.cert_pem.as_deref().map(leaf);
            match &leaf {
                Some(Some(leaf)) => {
                    page.facts.push(CertificateFacts::of(leaf, &self.candidates).row(&agent.agent_id));
                }
                // Its facts stay unknown, and the detector treats it so.
                Some(None) => page.unreadable += 1,
                None => {}
            }
            for (run, images) in self.runs.iter().zip(&mut page.images_by_run) {
                let Some(before) = run.snapshot.leaves.get(&agent.agent_id) else { continue };
                // Of a torn run the whole snapshot is kept: a rollback has to know what it need not touch.
                if *before == agent.cert_pem && run.is_committed() {
                    continue;
                }
                let image = ImageRow {
                    table: "internal_agents",
                    row_key: &agent.agent_id,
                    column: "cert_pem",
                    sealed: false,
                    before: before.as_deref(),
                    before_digest: &digest(before.as_deref()),
                    after: agent.cert_pem.as_deref().filter(|_| run.is_committed()),
                    changes: run.is_committed(),
                };
                page.images.push(image.values(&run.run_id));
                *images += 1;
                let Some(old) = before.as_deref().and_then(self::leaf).filter(|_| run.stands()) else {
                    continue;
                };
                let current = leaf.as_ref().and_then(Option::as_ref).map(Certificate::fingerprint);
                if current.as_ref() != Some(&old.fingerprint()) {
                    page.superseded.push(
                        values![old.fingerprint(), &agent.agent_id, old.spki_sha256(), &run.at, PREDECESSOR]
                            .to_vec(),
                    );
                }
            }
        }
        page
    }
}

/// The agent's own certificate: the first block, which is the one that authentication pins.
fn leaf(pem: &str) -> Option<Certificate> {
    Certificate::from_pem(pem).ok()
}

/// SHA-256 of clear text, lowercase hex; empty for NULL.
fn digest(text: Option<&str>) -> String {
    text.map(|text| hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes()).as_ref()))
        .unwrap_or_default()
}

/// Walks the fleet page by page on all cores. Tells how many images each run got.
async fn convert_fleet(
    tx: &mut WriteTx,
    fleet: &Arc<Fleet>,
    done: &mut Converted,
) -> Result<Vec<i64>, AdoptError> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let mut images_by_run = vec![0; fleet.runs.len()];
    let mut after = String::new();
    loop {
        let mut agents = store::agent_page(tx, &after).await?;
        let Some(last) = agents.last() else { return Ok(images_by_run) };
        after.clone_from(&last.agent_id);
        let share = agents.len().div_ceil(cores);
        let mut tasks = Vec::with_capacity(cores);
        while !agents.is_empty() {
            let rest = agents.split_off(share.min(agents.len()));
            let (fleet, part) = (Arc::clone(fleet), std::mem::replace(&mut agents, rest));
            tasks.push(tokio::task::spawn_blocking(move || fleet.read(&part)));
        }
        let mut page = fleet.page();
        for task in tasks {
            page.absorb(task.await.map_err(|_| AdoptError::Stopped)?);
        }
        set_certificate_facts(tx, &page.facts).await?;
        store::insert_images(tx, &page.images).await?;
        store::insert_superseded(tx, &page.superseded).await?;
        done.leaves_unreadable += page.unreadable;
        done.leaves_superseded += i64::try_from(page.superseded.len()).unwrap_or(i64::MAX);
        for (sum, images) in images_by_run.iter_mut().zip(page.images_by_run) {
            *sum += images;
        }
    }
}

/// Turns one snapshot into a run of ours with its images, and its root into a retiring anchor.
async fn convert_snapshot(
    tx: &mut WriteTx,
    run: &Run,
    leaves: i64,
    org_ca: &Certificate,
    sealing: &SealingKey,
    now: UnixTime,
    done: &mut Converted,
) -> Result<(), AdoptError> {
    let (run_id, snapshot) = (&run.run_id, &run.snapshot);
    let committed = run.is_committed();

    let current = config(tx, config_key::ORG_CA_CERT).await?;
    let image = ImageRow {
        table: "proxy_config",
        row_key: config_key::ORG_CA_CERT,
        column: "value",
        sealed: false,
        before: Some(&snapshot.org_ca_cert_pem),
        before_digest: &digest(Some(&snapshot.org_ca_cert_pem)),
        after: current.as_deref().filter(|_| committed),
        changes: committed && current.as_deref() != Some(&*snapshot.org_ca_cert_pem),
    };
    let cert_image = image.values(run_id);

    let place =
        |side: &str| format!("update_images/{run_id}/{}/{side}", config_place(config_key::ORG_CA_KEY));
    let clear: Option<&Zeroizing<String>> = snapshot.org_ca_key_pem.as_ref();
    let before = clear.map(|pem| sealing.seal(&place("before"), pem.as_bytes())).transpose()?;
    let after = match config(tx, config_key::ORG_CA_KEY).await?.filter(|_| committed) {
        Some(sealed) => {
            Some(sealing.move_sealed(&config_place(config_key::ORG_CA_KEY), &place("after"), &sealed)?)
        }
        None => None,
    };
    let same = match (&before, &after) {
        (Some(before), Some(after)) => {
            sealing.same_clear_text((&place("before"), before), (&place("after"), after))?
        }
        (before, after) => before.is_none() && after.is_none(),
    };
    let image = ImageRow {
        table: "proxy_config",
        row_key: config_key::ORG_CA_KEY,
        column: "value",
        sealed: true,
        before: before.as_deref(),
        before_digest: &digest(clear.map(|pem| pem.as_str())),
        after: after.as_deref(),
        changes: committed && !same,
    };
    store::insert_images(tx, &[cert_image, image.values(run_id)]).await?;

    let images = leaves + 2;
    let row =
        RunRow { run_id, migration_id: &snapshot.migration_id, committed, at: &run.at, images, now: now.0 };
    store::insert_run(tx, &row, PREDECESSOR).await?;
    let descriptor = json!({ "run_id": run_id, "format": "mastio/1", "rows": images }).to_string();
    store::set_snapshot(tx, &snapshot.migration_id, &descriptor).await?;
    done.snapshots += 1;

    let fingerprint = snapshot.org_ca.fingerprint();
    if run.stands() && fingerprint != org_ca.fingerprint() {
        let key = match clear.filter(|_| snapshot.key_matches) {
            Some(pem) => Some(sealing.seal(&anchor_place(&fingerprint), pem.as_bytes())?),
            None => None,
        };
        add_retiring_anchor(tx, &snapshot.org_ca, key, PREDECESSOR, now).await?;
        done.retiring_anchors += 1;
    }
    Ok(())
}
