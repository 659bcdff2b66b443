//! Rehearsals: what an apply or a rollback would do, computed for real with keys that are thrown away, verified by the
//! code that judges a run, and dropped. Nothing is written.
//!
//! [`Rehearsal::begin`] asks the check, draws the keys and refuses what a run would refuse. [`Rehearsal::walk`] goes
//! over the fleet in batches, so that its memory does not grow with it, and ends in a [`Plan`]. The plan's digest
//! covers the images before and the intended fields, and leaves out what every run draws anew: keys, serials,
//! signatures, the present time. So two rehearsals of one state agree, and an apply can be held to what its operator
//! has seen: [`compare`] before it begins, [`hold`] once its own snapshot stands.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest::{self, Context, SHA256};
use mastio_core::x509::extension::{AUTHORITY_KEY_IDENTIFIER, SUBJECT_KEY_IDENTIFIER};
use mastio_core::x509::{Certificate, KeyAlgorithm};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::engine::{self, BATCH_LEAVES, Carried, Fleet};
use super::error::UpdateError;
use super::halt::{self, EnrollmentType};
use super::migration::{After, Cell, ChangeSet, FleetColumn, Migration, Need};
use super::store::{self as rows, FleetCell, SnapshotDescriptor};
use super::view::View;
use super::{Direction, Updates, shown, verify};
use crate::pki::store::{self as pki_rows, hex};

/// Certificates that a plan shows before and after, unless the full list is asked for.
const SAMPLES_MAX: usize = 3;
/// Leaves of a rollback that are looked at together: each comes with three texts beside it.
const BATCH_ROLLBACK_LEAVES: i64 = 256;
/// Rehearsals whose lines are kept, so that an apply can tell what has moved since.
const REMEMBERED_MAX: usize = 4;
/// Agents of one rehearsal that are kept; of a larger fleet only counts can be told.
const REMEMBERED_AGENTS_MAX: usize = 100_000;
/// Rehearsals under way at once: each computes on all cores.
const AT_ONCE_MAX: usize = 4;
/// Of these, those that are told line by line.
const STREAMS_MAX: usize = 2;
/// Rehearsals that wait for their turn at most.
const WAITING_MAX: usize = 16;
/// Agents that one list of differences names.
const NAMED_MAX: usize = 20;

/// The fields of a certificate that an operator compares.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CertificateSummary {
    /// Subject.
    pub subject: String,
    /// Issuer.
    pub issuer: String,
    /// Serial, lowercase hex.
    pub serial: String,
    /// `P-256`, `RSA-4096` and the like.
    pub key: String,
    /// SHA-256 of the public key, lowercase hex.
    pub spki_sha256: String,
    /// Begin of validity.
    pub not_before: String,
    /// End of validity.
    pub not_after: String,
    /// `pathLen`, where it is a CA.
    pub path_len: Option<u32>,
    /// The certificate's own key identifier, lowercase hex.
    pub subject_key_id: Option<String>,
    /// Its issuer's, lowercase hex.
    pub authority_key_id: Option<String>,
    /// URI names.
    pub uris: Vec<String>,
}

impl CertificateSummary {
    /// The summary of `certificate`.
    #[must_use]
    pub fn of(certificate: &Certificate) -> Self {
        Self {
            subject: certificate.subject_display(),
            issuer: certificate.issuer_display(),
            serial: certificate.serial_hex(),
            key: match certificate.key_algorithm() {
                KeyAlgorithm::P256 => "P-256".to_owned(),
                KeyAlgorithm::Rsa { bits } => format!("RSA-{bits}"),
                KeyAlgorithm::Other => "another".to_owned(),
            },
            spki_sha256: certificate.spki_sha256(),
            not_before: certificate.not_before().to_rfc3339(),
            not_after: certificate.not_after().to_rfc3339(),
            path_len: certificate.basic_constraints().and_then(|constraints| constraints.path_len),
            subject_key_id: certificate.subject_key_id().map(hex),
            authority_key_id: certificate.authority_key_id().map(hex),
            uris: certificate.uri_sans().to_vec(),
        }
    }
}

/// A single cell that changes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CellChange {
    /// Table, row and column.
    pub cell: String,
    /// What stands there: a certificate's fields, a text, the words for a private key, or nothing.
    pub before: Value,
    /// What would stand there.
    pub after: Value,
}

/// Agents that are deliberately left alone.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftAlone {
    /// How they came to their identity.
    pub enrollment: &'static str,
    /// How many active ones there are.
    pub agents: i64,
    /// Why.
    pub why: &'static str,
    /// What has to be done for them, and by whom.
    pub next: &'static str,
}

/// Whom the change touches.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Affected {
    /// The enrollment types whose certificates it changes.
    pub enrollments: Vec<&'static str>,
    /// How many agents get another certificate.
    pub agents: i64,
}

/// How long a run would take, as this rehearsal measured it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Estimate {
    /// For keys and leaves together, rounded up. Writing comes on top.
    pub seconds: u64,
    /// Leaves computed and verified a second; absent for an empty fleet.
    pub leaves_per_second: Option<u64>,
}

/// The halt before and after, as the reasons that each signing call is refused with.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct HaltChange {
    /// Now.
    pub before: Vec<String>,
    /// After the run.
    pub after: Vec<String>,
}

/// What a rollback would go back to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SnapshotTaken {
    /// When.
    pub taken_at: String,
    /// By which run.
    pub run_id: String,
    /// Whether that run has changed anything; if not, its rollback forgets it and no more.
    pub committed: bool,
}

/// What an apply or a rollback would change: computed for real, verified and dropped.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Plan {
    /// The migration.
    pub migration_id: String,
    /// `apply` or `rollback`.
    pub direction: &'static str,
    /// Covers the images before and the intended fields; an apply that carries it changes nothing else.
    pub plan_digest: String,
    /// What the check said, where it said more than the description.
    pub note: Option<String>,
    /// What the check saw.
    pub evidence: Value,
    /// Single cells that change.
    pub cells: Vec<String>,
    /// The same with what they hold before and after.
    pub changes: Vec<CellChange>,
    /// Leaves that change: re-signed by an apply, set back byte for byte by a rollback.
    pub leaves: i64,
    /// Of a rollback: leaves that arose or changed since the apply, re-signed under the restored CA for their keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carry_back: Option<i64>,
    /// Of a rollback: the snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotTaken>,
    /// Whom it touches.
    pub affected: Affected,
    /// Agents that are deliberately left alone, by enrollment type.
    pub not_covered: Value,
    /// The same with the reasons.
    pub left_alone: Vec<LeftAlone>,
    /// The Org CA before and after.
    pub org_ca: [CertificateSummary; 2],
    /// A few leaves before and after.
    pub samples: Vec<[CertificateSummary; 2]>,
    /// The halt before and after.
    pub halt: HaltChange,
    /// How long it would take.
    pub estimate: Estimate,
}

/// A finished rehearsal.
pub(super) struct Rehearsed {
    /// What it found.
    pub plan: Plan,
    /// Digest of the images before alone; see [`hold`].
    pub before: String,
}

/// A change set, or its inverse, whose keys are drawn and whose fleet has not been walked yet.
pub(super) struct Rehearsal {
    updates: Arc<Updates>,
    migration: &'static dyn Migration,
    way: Way,
    evidence: Value,
    note: Option<String>,
    took: Duration,
    _place: Place,
}

enum Way {
    Apply { view: Arc<View>, change_set: ChangeSet },
    Rollback { snapshot: SnapshotDescriptor, taken: SnapshotTaken, whole: bool, restored: Option<Restored> },
}

/// What a rollback brings leaves back under.
struct Restored {
    org_ca: Certificate,
    issuer: Certificate,
    carried: Option<Carried>,
}

impl Rehearsal {
    /// Asks what a run would ask and draws its keys. Errors: those that the run would end in before its fleet.
    pub async fn begin(
        updates: &Arc<Updates>,
        migration: &'static dyn Migration,
        direction: Direction,
    ) -> Result<Self, UpdateError> {
        let place = updates.rehearsals.place().await?;
        let began = Instant::now();
        let view = Arc::new(engine::view(updates, migration.declaration().migration_id).await?);
        let evidence = evidence(&view);
        let (way, note) = match direction {
            Direction::Apply => Self::begin_apply(updates, migration, view).await?,
            Direction::Rollback => (Self::begin_rollback(updates, migration).await?, None),
        };
        let took = began.elapsed();
        Ok(Self { updates: Arc::clone(updates), migration, way, evidence, note, took, _place: place })
    }

    async fn begin_apply(
        updates: &Updates,
        migration: &'static dyn Migration,
        view: Arc<View>,
    ) -> Result<(Way, Option<String>), UpdateError> {
        let note = match migration.check(&view) {
            Need::Needed { note } => note,
            Need::NotNeeded => return Err(UpdateError::NotNeeded),
            Need::Impossible(refusal) | Need::Refused(refusal) => return Err(UpdateError::Refused(refusal)),
        };
        let change_set = engine::prepare(updates, migration, Arc::clone(&view)).await?;
        verify::cells(&change_set.cells)?;
        if let Some(result) = &change_set.result {
            verify::authority(result, view.now)?;
        }
        Ok((Way::Apply { view, change_set }, note))
    }

    async fn begin_rollback(
        updates: &Updates,
        migration: &'static dyn Migration,
    ) -> Result<Way, UpdateError> {
        let migration_id = migration.declaration().migration_id;
        let mut tx = updates.pki.store.read().await?;
        let snapshot = rows::rollback_snapshot(&mut tx, migration_id).await?;
        let apply = rows::run_by_id(&mut tx, &snapshot.run_id).await?;
        if let Some(blocker) = rows::blocker(&mut tx, migration_id, &snapshot.run_id).await? {
            return Err(UpdateError::Blocked { blocker });
        }
        if let Some(row) = super::snapshots::damage(&mut tx, &snapshot.run_id).await? {
            return Err(UpdateError::SnapshotDamaged { migration_id: migration_id.to_owned(), row });
        }
        let taken_at = rows::snapshots_taken(&mut tx).await?.into_iter().find(|(id, _)| id == migration_id);
        let committed = apply.as_ref().is_some_and(|apply| apply.committed);
        let whole = apply.as_ref().is_some_and(|apply| !apply.committed && apply.actor == super::PREDECESSOR);
        let taken = SnapshotTaken {
            taken_at: taken_at.map(|(_, at)| shown(&at)).unwrap_or_default(),
            run_id: snapshot.run_id.clone(),
            committed: committed || whole,
        };
        drop(tx);
        let restored = if taken.committed {
            let authority =
                rollback_run(updates, migration).restored_authority(&snapshot.run_id, whole).await?;
            let issuer = match (&authority.mastio_ca, &authority.mastio_ca_key) {
                (Some(mastio_ca), Some(_)) => mastio_ca.clone(),
                _ => authority.org_ca.clone(),
            };
            let org_ca = authority.org_ca.clone();
            let carried = match (migration.carry_back(authority), migration.scope().fleet) {
                (Some(carry_back), Some(column)) => {
                    Some(Carried { column, carry_back: Arc::from(carry_back) })
                }
                _ => None,
            };
            Some(Restored { org_ca, issuer, carried })
        } else {
            None
        };
        Ok(Way::Rollback { snapshot, taken, whole, restored })
    }

    /// Goes over the fleet to the end. Every single change is sent to `lines` where somebody listens.
    ///
    /// Errors: those of the verification, and [`UpdateError::Stopped`] when the listener has gone.
    pub async fn walk(mut self, lines: Option<mpsc::Sender<Value>>) -> Result<Rehearsed, UpdateError> {
        let mut tally = Tally::new(lines);
        let declaration = self.migration.declaration();
        let (direction, present, org_ca, carry_back, snapshot) = match self.way {
            Way::Apply { ref view, ref mut change_set } => {
                let cells = std::mem::take(&mut change_set.cells);
                walk_cells(&self.updates, self.migration, &cells, &mut tally).await?;
                if let (Some(column), Some(change)) = (self.migration.scope().fleet, change_set.fleet.take())
                {
                    let fleet = Fleet { column, change: Arc::from(change) };
                    walk_fleet(&self.updates, &fleet, change_set, &mut tally).await?;
                }
                let present = view.authority.org_ca.clone();
                (
                    Direction::Apply,
                    present.clone(),
                    change_set.result.as_ref().map_or(present, |result| result.org_ca.clone()),
                    None,
                    None,
                )
            }
            Way::Rollback { ref snapshot, ref taken, whole, ref restored } => {
                let present = self.updates.pki.authority().org_ca.clone();
                if let Some(restored) = restored {
                    let (run_id, migration) = (&snapshot.run_id, self.migration);
                    walk_restored_cells(&self.updates, migration, run_id, whole, &mut tally).await?;
                    if let Some(column) = migration.scope().fleet {
                        let updates = &self.updates;
                        walk_restored_fleet(updates, column, run_id, whole, restored, &mut tally).await?;
                    }
                }
                let org_ca =
                    restored.as_ref().map_or_else(|| present.clone(), |restored| restored.org_ca.clone());
                (Direction::Rollback, present, org_ca, Some(tally.carried), Some(taken.clone()))
            }
        };
        let mut tx = self.updates.pki.store.read().await?;
        let not_covered = super::view::not_covered(&mut tx, declaration.affects_enrollments).await?;
        let halt = halt::read(&mut tx).await?;
        let details = |keep: &dyn Fn(&halt::HaltReason) -> bool| {
            halt.reasons.iter().filter(|reason| keep(reason)).map(halt::HaltReason::detail).collect()
        };
        let walked = tally.leaves + tally.carried;
        let before = finish(tally.before);
        let plan_digest = {
            let mut context = Context::new(&SHA256);
            add(&mut context, &["mastio-plan/1", declaration.migration_id, direction.as_str(), &before]);
            add(&mut context, &[&finish(tally.intended)]);
            finish(context)
        };
        let plan = Plan {
            migration_id: declaration.migration_id.to_owned(),
            direction: direction.as_str(),
            plan_digest: plan_digest.clone(),
            note: self.note.take(),
            evidence: std::mem::take(&mut self.evidence),
            cells: tally.changes.iter().map(|change| change.cell.clone()).collect(),
            changes: tally.changes,
            leaves: tally.leaves,
            carry_back,
            snapshot,
            affected: Affected { enrollments: declaration.affected_tags(), agents: walked },
            left_alone: left_alone(&not_covered),
            not_covered: super::not_covered_json(&not_covered),
            org_ca: [CertificateSummary::of(&present), CertificateSummary::of(&org_ca)],
            samples: tally.samples,
            halt: HaltChange {
                before: details(&|_| true),
                after: details(&|reason| reason.migration_id() != Some(declaration.migration_id)),
            },
            estimate: estimate(self.took, tally.computed, walked),
        };
        self.updates.rehearsals.remember(plan_digest, tally.lines);
        Ok(Rehearsed { plan, before })
    }
}

fn estimate(keys: Duration, fleet: Duration, leaves: i64) -> Estimate {
    let whole = keys + fleet;
    let per_second = u128::try_from(leaves).unwrap_or(0).saturating_mul(1000) / fleet.as_millis().max(1);
    Estimate {
        seconds: whole.as_secs() + u64::from(whole.subsec_nanos() > 0),
        leaves_per_second: (leaves > 0).then(|| u64::try_from(per_second).unwrap_or(u64::MAX)),
    }
}

/// What a check sees, for people.
fn evidence(view: &View) -> Value {
    let authority = &view.authority;
    json!({
        "checked_at": view.now.to_rfc3339(),
        "status": view.row_status,
        "org_ca": CertificateSummary::of(&authority.org_ca),
        "org_ca_key": if authority.org_ca_key.is_some() { "here" } else { "held elsewhere" },
        "intermediate": authority.mastio_ca.as_ref().map(CertificateSummary::of),
        "torn_apply": view.torn.as_ref().map(|torn| json!({
            "leaves": torn.leaves,
            "on_current_chain": torn.on_current_chain,
            "intermediate_is_foreign": torn.intermediate_is_foreign,
        })),
    })
}

fn left_alone(counts: &[(EnrollmentType, i64)]) -> Vec<LeftAlone> {
    counts
        .iter()
        .map(|(enrollment, agents)| {
            let (why, next) = match enrollment {
                EnrollmentType::Byoca => (
                    "the owner holds the private key and brought the certificate, so the Mastio cannot re-sign it; it \
                     stays accepted through the retiring Org CA",
                    "the owner enrolls again under the current Org CA: mastio pki issue-byoca --csr FILE",
                ),
                EnrollmentType::Spire => {
                    ("SPIRE issued the certificate under its own bundle, and renews it by itself", "nothing")
                }
                EnrollmentType::Connector => ("the update is not about certificates of the Mastio's own", "nothing"),
            };
            LeftAlone { enrollment: enrollment.as_str(), agents: *agents, why, next }
        })
        .collect()
}

/// The run that a rehearsed rollback would be, for what it asks of snapshots. It never begins.
fn rollback_run<'a>(updates: &'a Updates, migration: &'static dyn Migration) -> engine::Run<'a> {
    engine::Run {
        updates,
        migration,
        run_id: String::new(),
        actor: String::new(),
        direction: Direction::Rollback,
        planned: None,
        approval: None,
        tally: engine::Tally::new(),
    }
}

async fn walk_cells(
    updates: &Updates,
    migration: &'static dyn Migration,
    cells: &[(Cell, After)],
    tally: &mut Tally,
) -> Result<(), UpdateError> {
    for cell in migration.scope().cells {
        let stored = pki_rows::config(&mut updates.pki.store.read().await?, cell.row_key).await?;
        let digest = clear_digest(updates, cell, stored.as_deref())?;
        let after = cells.iter().find(|(changed, _)| changed == cell).map(|(_, after)| match after {
            After::Text(text) => Some(text.as_str()),
            After::Key(_) => None,
        });
        tally.cell(cell, &digest, stored.as_deref(), after).await?;
    }
    Ok(())
}

/// Digest of a cell's clear text, as the images of a run have it.
fn clear_digest(updates: &Updates, cell: &Cell, stored: Option<&str>) -> Result<String, UpdateError> {
    Ok(match (cell.sealed, stored) {
        (true, Some(sealed)) => rows::digest(Some(&updates.pki.sealing().open(&cell.place(), sealed)?)),
        (_, stored) => rows::digest(stored),
    })
}

async fn walk_fleet(
    updates: &Updates,
    fleet: &Fleet,
    change_set: &ChangeSet,
    tally: &mut Tally,
) -> Result<(), UpdateError> {
    let (pki, mut after) = (&updates.pki, String::new());
    loop {
        let began = Instant::now();
        let page = rows::fleet_page(&mut pki.store.read().await?, fleet.column, &after, BATCH_LEAVES).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after.clone_from(&last.agent_id);
        let (result, entropy) = (change_set.result.clone(), Arc::clone(&pki.entropy));
        let now = pki.clock.now().seconds();
        let staged = engine::change_leaves(page.clone(), fleet.clone(), result, entropy, now).await?;
        let computed = began.elapsed();
        let mut staged = staged.into_iter().peekable();
        let pairs = page
            .into_iter()
            .map(|cell| {
                let after =
                    staged.next_if(|staged| staged.agent_id == cell.agent_id).map(|staged| staged.text);
                Pair { cell, after, carried: false }
            })
            .collect();
        tally.leaves(pairs, computed).await?;
    }
}

async fn walk_restored_cells(
    updates: &Updates,
    migration: &'static dyn Migration,
    apply_run: &str,
    whole: bool,
    tally: &mut Tally,
) -> Result<(), UpdateError> {
    let run = rollback_run(updates, migration);
    let mut tx = updates.pki.store.read().await?;
    for cell in migration.scope().cells {
        let image = rows::image(&mut tx, apply_run, cell).await?.filter(|image| whole || image.changes);
        let Some(image) = image else { continue };
        if !whole && !run.still_as_written(&mut tx, apply_run, cell, &image).await? {
            return Err(UpdateError::Blocked { blocker: format!("a later change of {}", cell.place()) });
        }
        let stored = pki_rows::config(&mut tx, cell.row_key).await?;
        let digest = clear_digest(updates, cell, stored.as_deref())?;
        tally.cell(cell, &digest, stored.as_deref(), Some(image.restored().map(String::as_str))).await?;
    }
    Ok(())
}

async fn walk_restored_fleet(
    updates: &Updates,
    column: FleetColumn,
    apply_run: &str,
    whole: bool,
    restored: &Restored,
    tally: &mut Tally,
) -> Result<(), UpdateError> {
    let (pki, mut after) = (&updates.pki, String::new());
    loop {
        let began = Instant::now();
        let mut tx = pki.store.read().await?;
        let page =
            rows::rollback_page(&mut tx, column, apply_run, whole, &after, BATCH_ROLLBACK_LEAVES).await?;
        drop(tx);
        let Some(last) = page.last() else { return Ok(()) };
        after.clone_from(&last.cell.agent_id);
        let (carried_by, entropy) = (restored.carried.clone(), Arc::clone(&pki.entropy));
        let issuer = restored.issuer.clone();
        let pairs = tokio::task::spawn_blocking(move || {
            page.into_iter()
                .map(|row| match row.restore {
                    Some(after) => Ok(Pair { cell: row.cell, after, carried: false }),
                    None => {
                        let page = std::slice::from_ref(&row.cell);
                        let carried = match &carried_by {
                            Some(carried_by) => engine::carry_cells(page, carried_by, &entropy)?,
                            None => Vec::new(),
                        };
                        let after = carried.into_iter().next().map(|cell| cell.text);
                        if let Some(after) = &after {
                            judge_carried(&row.cell, after, &issuer)?;
                        }
                        Ok(Pair { cell: row.cell, after, carried: true })
                    }
                })
                .collect::<Result<Vec<_>, UpdateError>>()
        })
        .await
        .map_err(|_| UpdateError::Stopped)??;
        tally.leaves(pairs, began.elapsed()).await?;
    }
}

/// A leaf that a rollback carries back keeps name, key and validity, and the restored CA has signed it.
fn judge_carried(cell: &FleetCell, after: &str, issuer: &Certificate) -> Result<(), UpdateError> {
    let (before, after) = (Certificate::from_pem(&cell.text)?, Certificate::from_pem(after)?);
    let kept = before.subject_der() == after.subject_der()
        && before.spki_der() == after.spki_der()
        && before.validity_der() == after.validity_der();
    if kept && after.verify_signature(issuer).is_ok() {
        return Ok(());
    }
    let what = format!("{}: the leaf that is carried back", cell.agent_id);
    Err(UpdateError::Verification { what, cause: None })
}

/// A leaf before and after; `after` is absent where it stays.
struct Pair {
    cell: FleetCell,
    after: Option<String>,
    carried: bool,
}

/// What of a [`Pair`] is told, hashed and kept.
struct Line {
    agent_id: String,
    before: String,
    intended: Option<String>,
    shown: Option<[CertificateSummary; 2]>,
    /// Where the column holds no certificate.
    texts: Option<[String; 2]>,
    carried: bool,
}

impl Pair {
    fn line(self, show: bool) -> Line {
        let before = Certificate::from_pem(&self.cell.text).ok();
        let after = self.after.as_ref().and_then(|pem| Certificate::from_pem(pem).ok());
        let intended = self.after.as_ref().map(|text| match &after {
            Some(after) => intended_fields(before.as_ref(), after),
            // An operator's SQL may have put anything there; it comes back as it was.
            None => rows::digest(Some(text)),
        });
        let shown = match (show, &before, &after) {
            (true, Some(before), Some(after)) => {
                Some([CertificateSummary::of(before), CertificateSummary::of(after)])
            }
            _ => None,
        };
        let texts = match (show, &before, self.after) {
            (true, None, Some(after)) => Some([self.cell.text.clone(), after]),
            _ => None,
        };
        let before = rows::digest(Some(&self.cell.text));
        Line { agent_id: self.cell.agent_id, before, intended, shown, texts, carried: self.carried }
    }
}

/// The lines of a page, read and hashed on all cores.
fn lines(pairs: Vec<Pair>, show: bool) -> Result<Vec<Line>, UpdateError> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let size = pairs.len().div_ceil(cores).max(1);
    let mut pairs = pairs.into_iter();
    std::thread::scope(|scope| {
        let mut workers = Vec::with_capacity(cores);
        loop {
            let part: Vec<Pair> = pairs.by_ref().take(size).collect();
            if part.is_empty() {
                break;
            }
            workers.push(
                scope.spawn(move || part.into_iter().map(|pair| pair.line(show)).collect::<Vec<Line>>()),
            );
        }
        let mut lines = Vec::new();
        for worker in workers {
            lines.extend(worker.join().map_err(|_| UpdateError::Stopped)?);
        }
        Ok(lines)
    })
}

/// Digest of the fields that a run intends of a certificate: without what each run draws or signs anew.
///
/// Validity counts where it is inherited; where it begins or ends with the run, the present time would be in it.
fn intended_fields(before: Option<&Certificate>, after: &Certificate) -> String {
    let same_key = before.is_some_and(|before| before.spki_der() == after.spki_der());
    let mut fields = Context::new(&SHA256);
    add(&mut fields, &[after.subject_der(), after.issuer_name_der()]);
    let new_key = format!("{:?}", after.key_algorithm());
    add(&mut fields, &[if same_key { b"kept" } else { new_key.as_bytes() }]);
    for (was, is) in [
        (before.map(Certificate::not_before_der), after.not_before_der()),
        (before.map(Certificate::not_after_der), after.not_after_der()),
    ] {
        add(&mut fields, &[if was == Some(is) { is } else { b"of the run" }]);
    }
    for extension in after.extensions() {
        let drawn = extension.oid() == AUTHORITY_KEY_IDENTIFIER
            || (extension.oid() == SUBJECT_KEY_IDENTIFIER && !same_key);
        let value: &[u8] = if drawn { b"of the run" } else { extension.value() };
        let critical: &[u8] = if extension.critical() { b"critical" } else { b"" };
        add(&mut fields, &[extension.oid().as_bytes(), critical, value]);
    }
    finish(fields)
}

/// What a cell holds, for people. A private key is never shown.
fn shown_cell(cell: &Cell, text: Option<&str>) -> Value {
    match (cell.sealed, text) {
        (_, None) => Value::Null,
        (true, Some(_)) => json!("a private key"),
        (false, Some(text)) => match Certificate::from_pem(text) {
            Ok(certificate) => json!(CertificateSummary::of(&certificate)),
            Err(_) => json!(text),
        },
    }
}

/// What a walk adds up.
struct Tally {
    out: Option<mpsc::Sender<Value>>,
    /// What a run would take too: without the telling, and without waiting for a slow reader.
    computed: Duration,
    before: Context,
    intended: Context,
    lines: Lines,
    changes: Vec<CellChange>,
    samples: Vec<[CertificateSummary; 2]>,
    leaves: i64,
    carried: i64,
}

impl Tally {
    fn new(out: Option<mpsc::Sender<Value>>) -> Self {
        Self {
            out,
            computed: Duration::ZERO,
            before: Context::new(&SHA256),
            intended: Context::new(&SHA256),
            lines: Lines::default(),
            changes: Vec::new(),
            samples: Vec::new(),
            leaves: 0,
            carried: 0,
        }
    }

    /// Takes a cell of the scope. `after`: absent where it stays, `Some(None)` for a new private key or a deletion.
    async fn cell(
        &mut self,
        cell: &Cell,
        digest: &str,
        stored: Option<&str>,
        after: Option<Option<&str>>,
    ) -> Result<(), UpdateError> {
        let place = cell.place();
        add(&mut self.before, &[&place, digest]);
        let Some(after) = after else { return Ok(()) };
        let parsed = |text: Option<&str>| text.and_then(|text| Certificate::from_pem(text).ok());
        let intended = match (cell.sealed, after, parsed(after)) {
            // A sealed text differs at each sealing; that a key comes back, or is drawn, is what is intended.
            (true, _, _) => "a private key".to_owned(),
            (false, Some(_), Some(certificate)) => intended_fields(parsed(stored).as_ref(), &certificate),
            (false, after, None) => after.unwrap_or_default().to_owned(),
            (false, None, Some(_)) => String::new(),
        };
        add(&mut self.intended, &[&place, &intended]);
        self.lines.cells.insert(place.clone(), line_digest(digest, &intended));
        let shown_after = match (cell.sealed, after, stored) {
            (true, None, _) => json!("a new private key"),
            _ => shown_cell(cell, after),
        };
        let change = CellChange { cell: place, before: shown_cell(cell, stored), after: shown_after };
        self.send(
            || json!({ "kind": "cell", "cell": change.cell, "before": change.before, "after": change.after }),
        )
        .await?;
        self.changes.push(change);
        Ok(())
    }

    /// Takes a page of leaves, which took `computed` to compute.
    async fn leaves(&mut self, pairs: Vec<Pair>, computed: Duration) -> Result<(), UpdateError> {
        self.computed += computed;
        let show = self.out.is_some() || self.samples.len() < SAMPLES_MAX;
        let lines = tokio::task::spawn_blocking(move || lines(pairs, show))
            .await
            .map_err(|_| UpdateError::Stopped)??;
        for line in lines {
            self.leaf(line).await?;
        }
        Ok(())
    }

    async fn leaf(&mut self, line: Line) -> Result<(), UpdateError> {
        add(&mut self.before, &[&line.agent_id, &line.before]);
        let intended = line.intended.as_deref().unwrap_or_default();
        self.lines.agent(&line.agent_id, line_digest(&line.before, intended));
        if line.intended.is_none() {
            return Ok(());
        }
        add(&mut self.intended, &[&line.agent_id, intended]);
        if line.carried {
            self.carried += 1;
        } else {
            self.leaves += 1;
        }
        if let Some([before, after]) = &line.texts {
            return self
                .send(
                    || json!({ "kind": "tag", "agent_id": line.agent_id, "before": before, "after": after }),
                )
                .await;
        }
        let Some(shown) = line.shown else { return Ok(()) };
        let kind = if line.carried { "carried_back" } else { "leaf" };
        self.send(
            || json!({ "kind": kind, "agent_id": line.agent_id, "before": shown[0], "after": shown[1] }),
        )
        .await?;
        if self.samples.len() < SAMPLES_MAX {
            self.samples.push(shown);
        }
        Ok(())
    }

    async fn send(&self, line: impl FnOnce() -> Value) -> Result<(), UpdateError> {
        match &self.out {
            Some(out) => out.send(line()).await.map_err(|_| UpdateError::Stopped),
            None => Ok(()),
        }
    }
}

fn add<T: AsRef<[u8]>>(context: &mut Context, parts: &[T]) {
    for part in parts.iter().map(AsRef::as_ref) {
        // Lengths in front: no two lists of parts give the same bytes.
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
}

fn finish(context: Context) -> String {
    hex(context.finish().as_ref())
}

/// Short: only compared with lines of this process.
fn line_digest(before: &str, intended: &str) -> u64 {
    let whole = digest::digest(&SHA256, format!("{before}\n{intended}").as_bytes());
    let mut short = [0; 8];
    for (to, from) in short.iter_mut().zip(whole.as_ref()) {
        *to = *from;
    }
    u64::from_be_bytes(short)
}

/// What a rehearsal saw, line by line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Lines {
    cells: BTreeMap<String, u64>,
    agents: BTreeMap<Box<str>, u64>,
    /// Whether there were more agents than are kept.
    more: bool,
}

impl Lines {
    fn agent(&mut self, agent_id: &str, line: u64) {
        if self.agents.len() < REMEMBERED_AGENTS_MAX {
            self.agents.insert(Box::from(agent_id), line);
        } else {
            self.more = true;
        }
    }

    /// What differs from `earlier`, with bounded lists of names.
    fn since(&self, earlier: &Self) -> Value {
        if self.more || earlier.more {
            let message =
                format!("more than {REMEMBERED_AGENTS_MAX} agents: which of them moved is not kept");
            return json!({ "known": false, "message": message });
        }
        let cells: Vec<&String> = self
            .cells
            .keys()
            .chain(earlier.cells.keys().filter(|cell| !self.cells.contains_key(*cell)))
            .filter(|cell| self.cells.get(*cell) != earlier.cells.get(*cell))
            .collect();
        let entered = self.agents.keys().filter(|agent| !earlier.agents.contains_key(*agent));
        let left = earlier.agents.keys().filter(|agent| !self.agents.contains_key(*agent));
        let changed = self
            .agents
            .iter()
            .filter(|(agent, line)| earlier.agents.get(*agent).is_some_and(|earlier| earlier != *line))
            .map(|(agent, _)| agent);
        json!({
            "known": true,
            "cells": cells,
            "entered": named(entered),
            "left": named(left),
            "changed": named(changed),
        })
    }
}

/// How many there are, and the names of the first few.
fn named<'a>(agents: impl Iterator<Item = &'a Box<str>>) -> Value {
    let (mut count, mut names) = (0_u64, Vec::new());
    for agent in agents {
        count += 1;
        if names.len() < NAMED_MAX {
            names.push(agent);
        }
    }
    json!({ "count": count, "agents": names })
}

/// The last few rehearsals of this process, and the places for those under way.
pub(super) struct Rehearsals {
    kept: Mutex<VecDeque<(String, Lines)>>,
    places: Arc<Semaphore>,
    queue: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Default for Rehearsals {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            places: Arc::new(Semaphore::new(AT_ONCE_MAX)),
            queue: Arc::new(Semaphore::new(AT_ONCE_MAX + WAITING_MAX)),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        }
    }
}

/// A place among the rehearsals under way.
struct Place {
    _place: OwnedSemaphorePermit,
    _queue: OwnedSemaphorePermit,
}

impl Rehearsals {
    /// A place for one more, waited for in a bounded queue. Errors: [`UpdateError::TooManyRehearsals`].
    async fn place(&self) -> Result<Place, UpdateError> {
        let full = |_| UpdateError::TooManyRehearsals;
        let queue = Arc::clone(&self.queue).try_acquire_owned().map_err(full)?;
        let place =
            Arc::clone(&self.places).acquire_owned().await.map_err(|_| UpdateError::TooManyRehearsals)?;
        Ok(Place { _place: place, _queue: queue })
    }

    /// The right to tell a rehearsal line by line: a reader that is slow holds its place for long.
    ///
    /// Errors: [`UpdateError::TooManyRehearsals`].
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, UpdateError> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| UpdateError::TooManyRehearsals)
    }

    fn remember(&self, plan_digest: String, lines: Lines) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(digest, _)| *digest != plan_digest);
        kept.push_back((plan_digest, lines));
        while kept.len() > REMEMBERED_MAX {
            kept.pop_front();
        }
    }

    /// What differs between two plans, as far as this process has made both.
    fn differences(&self, earlier: &str, present: &str) -> Value {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = |digest: &str| kept.iter().find(|(kept, _)| kept == digest).map(|(_, lines)| lines);
        match (lines(earlier), lines(present)) {
            (Some(earlier), Some(present)) => present.since(earlier),
            _ => json!({ "known": false, "message": "another process made that plan, or it was long ago" }),
        }
    }
}

/// Rehearses again and compares with the plan that an operator has seen. Gives the digest of the images before.
///
/// Errors: [`UpdateError::PlanChanged`] with the differences; those of a rehearsal.
pub(super) async fn compare(
    updates: &Arc<Updates>,
    migration: &'static dyn Migration,
    direction: Direction,
    plan_digest: &str,
) -> Result<Rehearsed, UpdateError> {
    let rehearsed = Rehearsal::begin(updates, migration, direction).await?.walk(None).await?;
    let present = &rehearsed.plan.plan_digest;
    if present == plan_digest {
        return Ok(rehearsed);
    }
    let differences = updates.rehearsals.differences(plan_digest, present);
    Err(UpdateError::PlanChanged { present: present.clone(), differences: Box::new(differences) })
}

/// Holds a run to its plan: its snapshot must be of the very images that the plan was made of.
///
/// What a migration intends is a function of those, so nothing else needs to be compared.
/// Errors: [`UpdateError::MovedSincePlan`].
pub(super) async fn hold(
    updates: &Updates,
    migration: &'static dyn Migration,
    run_id: &str,
    planned: &str,
) -> Result<(), UpdateError> {
    let (store, mut before) = (&updates.pki.store, Context::new(&SHA256));
    let scope = migration.scope();
    let mut tx = store.read().await?;
    for cell in scope.cells {
        let image = rows::image(&mut tx, run_id, cell).await?;
        add(&mut before, &[&cell.place(), &image.map(|image| image.before_digest).unwrap_or_default()]);
    }
    drop(tx);
    let mut after = String::new();
    while let Some(column) = scope.fleet {
        let page = rows::image_page(&mut store.read().await?, column, run_id, &after, BATCH_LEAVES).await?;
        let Some(last) = page.last() else { break };
        after.clone_from(&last.agent_id);
        for cell in &page {
            add(&mut before, &[&cell.agent_id, &rows::digest(Some(&cell.text))]);
        }
    }
    if finish(before) == planned { Ok(()) } else { Err(UpdateError::MovedSincePlan) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(agents: &[(&str, u64)]) -> Lines {
        let mut lines = Lines::default();
        lines.cells.insert("proxy_config/org_ca_cert/value".to_owned(), 1);
        for (agent, line) in agents {
            lines.agent(agent, *line);
        }
        lines
    }

    #[test]
    fn differences_name_who_entered_left_and_changed() {
        let mut present = lines(&[("a", 1), ("b", 2), ("d", 4)]);
        present.cells.insert("proxy_config/org_ca_key/value".to_owned(), 2);
        let since = present.since(&lines(&[("a", 1), ("b", 3), ("c", 3)]));
        assert_eq!(
            since,
            json!({
                "known": true,
                "cells": ["proxy_config/org_ca_key/value"],
                "entered": { "count": 1, "agents": ["d"] },
                "left": { "count": 1, "agents": ["c"] },
                "changed": { "count": 1, "agents": ["b"] },
            })
        );
    }

    #[test]
    fn differences_are_bounded() {
        let mut present = lines(&[]);
        for number in 0..1000 {
            present.agent(&format!("agent-{number:04}"), number);
        }
        let since = present.since(&lines(&[]));
        assert_eq!(since["entered"]["count"], 1000);
        assert_eq!(since["entered"]["agents"].as_array().map(Vec::len), Some(NAMED_MAX));
    }

    #[test]
    fn only_the_last_rehearsals_are_kept_and_another_process_s_plan_is_unknown() {
        let kept = Rehearsals::default();
        for number in 0..10 {
            kept.remember(format!("digest-{number}"), lines(&[("a", number)]));
        }
        assert_eq!(kept.differences("digest-8", "digest-9")["changed"]["count"], 1);
        assert_eq!(kept.differences("digest-0", "digest-9")["known"], false);
    }

    #[test]
    fn parts_cannot_be_shifted_between_each_other() {
        let digest = |parts: &[&str]| {
            let mut context = Context::new(&SHA256);
            add(&mut context, parts);
            finish(context)
        };
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
    }
}
