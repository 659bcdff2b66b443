//! Framework updates: wrong state in a live deploy is found at boot, halts signing if it is critical, is shown,
//! repaired in one atomic and verified step, and can be rolled back.
//!
//! The cast: [`registry`] lists the migrations; [`detector`] asks each at boot whether it is needed; [`halt`] decides
//! whether anything may be signed; [`rehearsal`] computes a change set and drops it; [`order`] says who is next;
//! [`approval`] whether two operators stand behind it; [`engine`] runs a migration's change set through the phases, which [`progress`] shows; [`verify`] judges it;
//! [`settle`] ends the trust overlap that an update began; [`snapshots`] keeps what rollbacks go back to; [`doctor`] explains what it finds; [`store`] keeps rows, runs and
//! images. Order of an apply: admission under the lock of the audit head, then the run as a task of its own, which the
//! caller only watches. A run that a crash has left behind is finished by the next boot, or sooner by another replica
//! that misses its signs of life: before its commit it has changed nothing and fails, after it only the activation is
//! left. What stands in the database after a commit is judged by [`stored`].

pub mod approval;
pub(crate) mod crash;
pub mod detector;
pub mod doctor;
mod engine;
pub mod error;
pub mod halt;
pub mod history;
pub mod http;
pub mod migration;
pub mod migrations;
pub mod order;
pub mod progress;
pub mod registry;
pub mod rehearsal;
mod settle;
pub mod snapshots;
pub mod store;
mod stored;
mod verify;
pub mod view;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, watch};

use crate::http::error::chain;
use crate::metrics::Metrics;
use crate::pki::Pki;
use crate::pki::tls::Tls;
pub use engine::Outcome;
pub use error::UpdateError;
use halt::EnrollmentType;
use migration::Migration;
use rehearsal::Rehearsal;
pub use rehearsal::{CertificateSummary, Plan};
use store::RunRow;

/// How runs that the predecessor left name their actor.
pub const PREDECESSOR: &str = "predecessor";
/// A run gives a sign of life so often.
const BEAT_PERIOD: Duration = Duration::from_secs(2);
/// A run that another replica saw give none for so long is finished by that one.
const RUN_SILENCE_MAX: Duration = Duration::from_secs(15);
/// Between two lines of the log about one run's progress.
const PROGRESS_LOG_PERIOD: Duration = Duration::from_secs(1);

/// Rows that a sweep removes in one transaction.
const SWEEP_ROWS: i64 = 256;

/// Which way a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Towards the repaired state.
    Apply,
    /// Back to the state before.
    Rollback,
}

impl Direction {
    /// As it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Rollback => "rollback",
        }
    }
}

/// Where a run is: journal, progress report and crash point in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The check is asked again.
    Detect,
    /// The scope is copied.
    Snapshot,
    /// The new state is computed and staged.
    Prepare,
    /// The staged state is judged.
    Verify,
    /// The one transaction that changes state.
    Commit,
    /// Memory takes up the new state, and the stored state is judged.
    Activate,
}

impl Phase {
    /// As it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Detect => "detect",
            Self::Snapshot => "snapshot",
            Self::Prepare => "prepare",
            Self::Verify => "verify",
            Self::Commit => "commit",
            Self::Activate => "activate",
        }
    }
}

/// Where the present run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The run.
    pub run_id: String,
    /// Its migration.
    pub migration_id: String,
    /// Its direction.
    pub direction: Direction,
    /// Its phase.
    pub phase: Phase,
    /// Rows done of the phase.
    pub done: i64,
    /// Rows of the phase; 0 when it does not count.
    pub total: i64,
}

impl Progress {
    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "run_id": self.run_id,
            "migration_id": self.migration_id,
            "direction": self.direction.as_str(),
            "phase": self.phase.as_str(),
            "done": self.done,
            "total": self.total,
        })
    }
}

/// What a check found at the last detection, kept for those who ask about health.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Checks that failed, by migration id.
    pub failing: Vec<String>,
    /// Notes by migration id: what a check said beyond the description.
    pub notes: Vec<(String, String)>,
    /// Repairs that cannot run here: reasons for `/healthz`.
    pub impossible: Vec<String>,
}

/// The updates of this deploy.
pub struct Updates {
    /// The certificate authority that they repair.
    pub pki: Arc<Pki>,
    tls: OnceLock<Arc<Tls>>,
    metrics: OnceLock<Arc<Metrics>>,
    replica: String,
    two_person: bool,
    snapshots_kept: i64,
    progress: watch::Sender<Option<Progress>>,
    closing: watch::Sender<bool>,
    rehearsals: rehearsal::Rehearsals,
    logged_at: Mutex<Option<Instant>>,
    phase_since: Mutex<Option<(Phase, Instant)>>,
    running: AtomicBool,
    /// Another replica's run as it was seen last, and since when it stands so, by our own steady clock.
    sight: Mutex<Option<(RunRow, Instant)>>,
    /// How our last run ended, where the database would not take that down.
    unwritten: Mutex<Option<(String, Arc<UpdateError>)>>,
    findings: ArcSwap<Findings>,
}

/// The plan that a run may carry out.
struct HeldTo {
    digest: String,
    /// Digest of the images before alone.
    before: String,
}

/// A run that was let in.
struct Admitted {
    run_id: String,
    planned: Option<String>,
    approval: Option<approval::Approval>,
}

/// Gives signs of life of a run until it is dropped.
struct Heartbeat(tokio::task::JoinHandle<()>);

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What an apply or rollback ended in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// The update.
    pub migration_id: String,
    /// When its state changed.
    pub at: UnixTime,
}

impl Done {
    /// As the API and the command line show it, in the page's words.
    #[must_use]
    pub fn to_json(&self, direction: Direction) -> Value {
        let at = self.at.to_rfc3339();
        match direction {
            Direction::Apply => {
                json!({ "migration_id": self.migration_id, "status": "applied", "applied_at": at })
            }
            Direction::Rollback => {
                json!({ "migration_id": self.migration_id, "status": "rolled_back", "rolled_back_at": at })
            }
        }
    }
}

impl Updates {
    /// The updates of `pki`. `replica` names this process in the journal; `two_person`: a run needs an [`approval`].
    /// `snapshots_kept`: former snapshots of each update that are kept.
    #[must_use]
    pub fn new(pki: Arc<Pki>, replica: String, two_person: bool, snapshots_kept: u32) -> Self {
        Self {
            pki,
            tls: OnceLock::new(),
            metrics: OnceLock::new(),
            replica,
            two_person,
            snapshots_kept: i64::from(snapshots_kept),
            progress: watch::Sender::new(None),
            closing: watch::Sender::new(false),
            rehearsals: rehearsal::Rehearsals::default(),
            logged_at: Mutex::new(None),
            phase_since: Mutex::new(None),
            running: AtomicBool::new(false),
            sight: Mutex::new(None),
            unwritten: Mutex::new(None),
            findings: ArcSwap::default(),
        }
    }

    /// Has `run_id` give signs of life. One file has one server, and nobody to tell.
    fn heartbeat(self: &Arc<Self>, run_id: &str) -> Option<Heartbeat> {
        if self.pki.store.sqlite_path().is_some() {
            return None;
        }
        let (updates, run_id) = (Arc::clone(self), run_id.to_owned());
        Some(Heartbeat(tokio::spawn(async move {
            loop {
                tokio::time::sleep(BEAT_PERIOD).await;
                if let Err(error) = updates.beat(&run_id).await {
                    tracing::warn!(run_id, error = chain(&error), "update_run_beat_failed");
                }
            }
        })))
    }

    async fn beat(&self, run_id: &str) -> Result<(), UpdateError> {
        let mut tx = self.pki.store.write().await?;
        store::beat(&mut tx, run_id, &self.replica, self.pki.clock.now().seconds()).await?;
        Ok(tx.commit_unaudited().await?)
    }

    /// Whether a run has stood still, in our own sight and by our own steady clock, for longer than a live one does.
    fn is_silent(&self, open: &RunRow) -> bool {
        let mut sight = self.sight.lock().unwrap_or_else(PoisonError::into_inner);
        match &*sight {
            Some((seen, since)) if seen == open => since.elapsed() > RUN_SILENCE_MAX,
            _ => {
                *sight = Some((open.clone(), Instant::now()));
                false
            }
        }
    }

    fn lose_sight(&self) {
        *self.sight.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Has the server certificate and the metrics follow every run. Once, after boot; the command line serves nothing.
    pub fn attach(&self, tls: Arc<Tls>, metrics: Arc<Metrics>) {
        // A second call would come from a second server on the same state, which the lock forbids.
        let _already = (self.tls.set(tls), self.metrics.set(metrics));
    }

    /// The present run's progress, live.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Option<Progress>> {
        self.progress.subscribe()
    }

    /// Has everyone stop watching: the process is about to end, and must not wait for them.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// What the last detection found.
    #[must_use]
    pub fn findings(&self) -> Arc<Findings> {
        self.findings.load_full()
    }

    /// Notes that a phase has begun, and how long the one before took.
    fn time(&self, phase: Option<Phase>) {
        let mut since = self.phase_since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_some_and(|(present, _)| Some(present) == phase) {
            return;
        }
        if let (Some((ended, began)), Some(metrics)) = (*since, self.metrics.get()) {
            metrics.update_phase_ended(ended.as_str(), began.elapsed());
        }
        *since = phase.map(|phase| (phase, Instant::now()));
    }

    fn show(&self, progress: Progress) {
        self.time(Some(progress.phase));
        let mut logged_at = self.logged_at.lock().unwrap_or_else(PoisonError::into_inner);
        if logged_at.is_none_or(|at| at.elapsed() >= PROGRESS_LOG_PERIOD) {
            *logged_at = Some(Instant::now());
            tracing::info!(
                migration_id = progress.migration_id,
                direction = progress.direction.as_str(),
                phase = progress.phase.as_str(),
                done = progress.done,
                total = progress.total,
                "update_progress"
            );
        }
        drop(logged_at);
        self.progress.send_replace(Some(progress));
    }

    /// The rows, each with what its migration declares, as the page's list shows them.
    ///
    /// `status` filters strictly. Errors: [`UpdateError::UnknownStatus`].
    pub async fn list(&self, status: Option<&str>) -> Result<Vec<Value>, UpdateError> {
        if let Some(status) = status
            && !["pending", "applied", "failed", "rolled_back"].contains(&status)
        {
            return Err(UpdateError::UnknownStatus(status.to_owned()));
        }
        let mut tx = self.pki.store.read().await?;
        let mut rows = store::rows(&mut tx).await?;
        let halting = order::halting(&halt::read(&mut tx).await?.reasons);
        if matches!(status, Some("pending" | "failed")) {
            // What waits is listed in the order in which it is to be applied, as the page says.
            let ordered = order::in_order(&order::waiting(&rows, &halting));
            rows.sort_by_key(|row| ordered.iter().position(|id| *id == row.migration_id));
        }
        let mut list = Vec::new();
        for row in rows.into_iter().filter(|row| status.is_none_or(|status| row.status == status)) {
            let declaration = registry::find(&row.migration_id).map(|migration| migration.declaration());
            let affects = declaration.map_or_else(
                || halt::list(row.affects_enrollments.as_deref()),
                |declaration| declaration.affected_tags().into_iter().map(str::to_owned).collect(),
            );
            let mut item = Map::new();
            item.insert("migration_id".to_owned(), json!(row.migration_id));
            item.insert(
                "description".to_owned(),
                json!(declaration.map_or("unknown to this version", |declaration| declaration.description)),
            );
            item.insert(
                "migration_type".to_owned(),
                json!(declaration.map_or("unknown", |declaration| declaration.migration_type.as_str())),
            );
            let criticality = declaration.map(|declaration| declaration.criticality.as_str().to_owned());
            item.insert(
                "criticality".to_owned(),
                json!(criticality.or(row.criticality).unwrap_or_else(|| "critical".to_owned())),
            );
            item.insert("affects_enrollments".to_owned(), json!(affects));
            item.insert("status".to_owned(), json!(row.status));
            item.insert("detected_at".to_owned(), json!(shown(&row.detected_at)));
            for (name, time) in [("applied_at", row.applied_at), ("rolled_back_at", row.rolled_back_at)] {
                if let Some(time) = time {
                    item.insert(name.to_owned(), json!(shown(&time)));
                }
            }
            if let Some(error) = row.error {
                item.insert("error".to_owned(), json!(error));
            }
            if row.status == "failed" {
                item.insert("remedy".to_owned(), json!(doctor::remedy(&row.migration_id)));
            }
            if halting.contains(&row.migration_id) {
                item.insert("halts".to_owned(), json!(true));
            }
            let requires = halt::list(row.requires.as_deref());
            if !requires.is_empty() {
                item.insert("requires".to_owned(), json!(requires));
            }
            if let Some((_, note)) = self.findings().notes.iter().find(|(id, _)| *id == row.migration_id) {
                item.insert("note".to_owned(), json!(note));
            }
            if let Some(declaration) = declaration {
                let not_covered = view::not_covered(&mut tx, declaration.affects_enrollments).await?;
                if !not_covered.is_empty() {
                    item.insert("not_covered".to_owned(), not_covered_json(&not_covered));
                }
            }
            list.push(Value::Object(item));
        }
        Ok(list)
    }

    /// Computes the change set of an apply, verifies it, and drops it.
    pub async fn plan(self: &Arc<Self>, migration_id: &str) -> Result<Plan, UpdateError> {
        let migration = self.known(migration_id).await?;
        Ok(Rehearsal::begin(self, migration, Direction::Apply).await?.walk(None).await?.plan)
    }

    /// Computes what a rollback would restore, verifies it, and drops it.
    pub async fn rollback_plan(self: &Arc<Self>, migration_id: &str) -> Result<Plan, UpdateError> {
        let migration = self.known(migration_id).await?;
        Ok(Rehearsal::begin(self, migration, Direction::Rollback).await?.walk(None).await?.plan)
    }

    /// A plan with every single change, one value each, as they are computed; the last one is the plan itself, or
    /// `{"kind": "error"}`. A receiver that is dropped ends the work.
    ///
    /// Errors: those of a plan that show before the first change.
    pub async fn full_plan(
        self: &Arc<Self>,
        migration_id: &str,
        direction: Direction,
    ) -> Result<mpsc::Receiver<Value>, UpdateError> {
        /// Changes that wait for a slow reader.
        const WAITING_MAX: usize = 256;
        let migration = self.known(migration_id).await?;
        let stream = self.rehearsals.stream()?;
        let rehearsal = Rehearsal::begin(self, migration, direction).await?;
        let (lines, reader) = mpsc::channel(WAITING_MAX);
        tokio::spawn(async move {
            let _stream = stream;
            let last = match rehearsal.walk(Some(lines.clone())).await {
                Ok(rehearsed) => json!({ "kind": "plan", "plan": rehearsed.plan }),
                Err(error) => json!({ "kind": "error", "detail": chain(&error) }),
            };
            // Nobody reads any more: nothing to tell.
            let _gone = lines.send(last).await;
        });
        Ok(reader)
    }

    /// Rehearses what [`Self::apply`] or [`Self::rollback`] would do now, admission included.
    ///
    /// Errors: what they would be refused with; [`UpdateError::PlanChanged`] where `plan_digest` is another's.
    pub async fn dry_run(
        self: &Arc<Self>,
        migration_id: &str,
        direction: Direction,
        plan_digest: Option<&str>,
    ) -> Result<Plan, UpdateError> {
        let migration = self.known(migration_id).await?;
        order::admissible(&mut self.pki.store.read().await?, migration, direction).await?;
        match plan_digest {
            Some(digest) => Ok(rehearsal::compare(self, migration, direction, digest).await?.plan),
            None => Ok(Rehearsal::begin(self, migration, direction).await?.walk(None).await?.plan),
        }
    }

    /// Applies an update, or says why not. Nothing has changed when this fails before the commit.
    pub async fn apply(self: &Arc<Self>, migration_id: &str, actor: &str) -> Result<Done, UpdateError> {
        self.change(migration_id, Direction::Apply, actor, None).await
    }

    /// Rolls an update back to its snapshot, or says why not.
    pub async fn rollback(self: &Arc<Self>, migration_id: &str, actor: &str) -> Result<Done, UpdateError> {
        self.change(migration_id, Direction::Rollback, actor, None).await
    }

    /// Applies or rolls back. `plan_digest`: only if the plan is still the one with this digest.
    ///
    /// An apply is held to it until its commit, a rollback until it begins. Errors: [`UpdateError::PlanChanged`].
    pub async fn change(
        self: &Arc<Self>,
        migration_id: &str,
        direction: Direction,
        actor: &str,
        plan_digest: Option<&str>,
    ) -> Result<Done, UpdateError> {
        let migration = self.known(migration_id).await?;
        let held_to = self.held_to(migration, direction, plan_digest).await?;
        let (updates, actor) = (Arc::clone(self), actor.to_owned());
        // A task of its own: a caller who hangs up between admission and start must not leave a run that nobody drives.
        tokio::spawn(async move {
            let admitted = updates.admit(migration, direction, &actor, held_to).await?;
            updates.run(migration, admitted, direction, &actor).await
        })
        .await
        .unwrap_or(Err(UpdateError::Stopped))
    }

    /// Admits a run and lets it go on by itself, for a caller who comes back to look.
    ///
    /// `plan_digest`: as for [`Self::change`]. Errors: why it was not admitted. How the run ends is in its row and in the log.
    pub async fn begin(
        self: &Arc<Self>,
        migration_id: &str,
        direction: Direction,
        actor: &str,
        plan_digest: Option<&str>,
    ) -> Result<(), UpdateError> {
        let migration = self.known(migration_id).await?;
        let held_to = self.held_to(migration, direction, plan_digest).await?;
        let (updates, actor) = (Arc::clone(self), actor.to_owned());
        // A task of its own here too.
        let admission = tokio::spawn(async move {
            let admitted = updates.admit(migration, direction, &actor, held_to).await?;
            tokio::spawn(async move {
                if let Err(error) = updates.run(migration, admitted, direction, &actor).await {
                    tracing::warn!(error = chain(&error), "update_run_ended_with_error");
                }
            });
            Ok(())
        });
        admission.await.unwrap_or(Err(UpdateError::Stopped))
    }

    async fn known(&self, migration_id: &str) -> Result<&'static dyn Migration, UpdateError> {
        registry::find(migration_id).ok_or_else(|| UpdateError::Unknown(migration_id.to_owned()))
    }

    /// The plan that a run is held to: the one that its operator names, or that two operators stand behind.
    ///
    /// Errors: [`UpdateError::PlanChanged`]; [`UpdateError::ApprovalRequired`].
    async fn held_to(
        self: &Arc<Self>,
        migration: &'static dyn Migration,
        direction: Direction,
        plan_digest: Option<&str>,
    ) -> Result<Option<HeldTo>, UpdateError> {
        if plan_digest.is_none() && !self.two_person {
            return Ok(None);
        }
        let mut tx = self.pki.store.read().await?;
        order::admissible(&mut tx, migration, direction).await?;
        let digest = if self.two_person {
            let now = self.pki.clock.now().seconds();
            let migration_id = migration.declaration().migration_id;
            let approved = approval::approved(&mut tx, migration_id, direction, now).await?;
            // Of another plan than the approved one, it is told how the present one differs.
            plan_digest.map_or(approved.plan_digest, str::to_owned)
        } else {
            plan_digest.unwrap_or_default().to_owned()
        };
        drop(tx);
        let before = rehearsal::compare(self, migration, direction, &digest).await?.before;
        Ok(Some(HeldTo { digest, before }))
    }

    /// Lets one run in, under the lock of the audit head (invariant I8).
    async fn admit(
        &self,
        migration: &'static dyn Migration,
        direction: Direction,
        actor: &str,
        held_to: Option<HeldTo>,
    ) -> Result<Admitted, UpdateError> {
        let migration_id = migration.declaration().migration_id;
        let mut tx = self.pki.store.write().await?;
        order::admissible(&mut tx, migration, direction).await?;
        let now = self.pki.clock.now();
        let run_id = self.pki.entropy.ulid(now);
        store::begin_run(
            &mut tx,
            &run_id,
            migration_id,
            direction.as_str(),
            actor,
            &self.replica,
            now.seconds(),
        )
        .await?;
        let approval = match (&held_to, self.two_person) {
            (Some(HeldTo { digest, .. }), true) => {
                let now = now.seconds();
                Some(approval::take(&mut tx, migration_id, direction, digest, &run_id, now).await?)
            }
            _ => None,
        };
        // Set before the commit that makes the run visible, or `recover` would take it for an orphan.
        self.running.store(true, Ordering::SeqCst);
        if let Err(error) = tx.commit_unaudited().await {
            self.running.store(false, Ordering::SeqCst);
            return Err(error.into());
        }
        Ok(Admitted { run_id, planned: held_to.map(|held_to| held_to.before), approval })
    }

    /// Runs as a task of its own: a caller that hangs up does not stop it.
    async fn run(
        self: &Arc<Self>,
        migration: &'static dyn Migration,
        admitted: Admitted,
        direction: Direction,
        actor: &str,
    ) -> Result<Done, UpdateError> {
        let Admitted { run_id, planned, approval } = admitted;
        let (updates, actor) = (Arc::clone(self), actor.to_owned());
        let migration_id = migration.declaration().migration_id;
        tokio::spawn(async move {
            let for_run = Arc::clone(&updates);
            let beats = updates.heartbeat(&run_id);
            // The inner task catches a panic, so that the end of the run is written down whatever happens.
            let (id, by) = (run_id.clone(), actor.clone());
            let result = tokio::spawn(async move {
                let run = engine::Run {
                    updates: &for_run,
                    migration,
                    run_id: id,
                    actor: by,
                    direction,
                    planned,
                    approval,
                    tally: engine::Tally::new(),
                };
                match direction {
                    Direction::Apply => run.apply().await,
                    Direction::Rollback => run.rollback().await.map(Some),
                }
            })
            .await
            .unwrap_or(Err(UpdateError::Stopped));
            let end = updates.end(migration, &run_id, direction, &actor, result).await;
            drop(beats);
            // What the run changed may have repaired, or brought back, what another row waits for.
            if let (Ok(_), Err(error)) = (&end, updates.detect().await) {
                tracing::warn!(migration_id, error = chain(&error), "update_detection_failed");
            }
            updates.running.store(false, Ordering::SeqCst);
            updates.progress.send_replace(None);
            updates.time(None);
            if end.is_ok() {
                tracing::info!(migration_id, run_id, direction = direction.as_str(), "update_run_ended");
            }
            end
        })
        .await
        .unwrap_or(Err(UpdateError::Stopped))
    }

    /// Writes down how a run ended.
    async fn end(
        &self,
        migration: &'static dyn Migration,
        run_id: &str,
        direction: Direction,
        actor: &str,
        result: Result<Option<Outcome>, UpdateError>,
    ) -> Result<Done, UpdateError> {
        let migration_id = migration.declaration().migration_id;
        let now = self.pki.clock.now().seconds();
        match result {
            Ok(Some(outcome)) => Ok(Done { migration_id: migration_id.to_owned(), at: outcome.at }),
            Ok(None) => {
                let mut tx = self.pki.store.write().await?;
                let open = store::rows(&mut tx).await?.iter().any(|row| {
                    row.migration_id == migration_id && matches!(row.status.as_str(), "pending" | "failed")
                });
                if !open {
                    store::finish_run(&mut tx, run_id, true, Some("not needed"), now).await?;
                    tx.commit_unaudited().await?;
                    return Err(UpdateError::NotNeeded);
                }
                store::set_closed(&mut tx, migration.declaration(), now).await?;
                store::finish_run(&mut tx, run_id, true, None, now).await?;
                tx.commit(&[event(EventType::UpdateClosed, actor, migration_id, json!({}))]).await?;
                self.pki.refresh().await?;
                self.pki.complete().await?;
                Ok(Done { migration_id: migration_id.to_owned(), at: now })
            }
            // The run is another replica's now, and ends there.
            Err(UpdateError::TakenOver) => Err(UpdateError::TakenOver),
            Err(error) => {
                if let Err(unwritten) = self.fail(migration_id, run_id, direction, actor, &error).await {
                    // The run is open until the database takes its end down: `recover` sees to it.
                    tracing::error!(
                        migration_id,
                        run_id,
                        error = chain(&error),
                        "update_run_end_not_written"
                    );
                    *self.unwritten() = Some((run_id.to_owned(), Arc::new(error)));
                    return Err(unwritten);
                }
                Err(error)
            }
        }
    }

    fn unwritten(&self) -> MutexGuard<'_, Option<(String, Arc<UpdateError>)>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How an open run of ours ended, if the database would not take that down.
    fn unwritten_end(&self, run_id: &str) -> Option<Arc<UpdateError>> {
        self.unwritten().as_ref().filter(|(id, _)| id == run_id).map(|(_, error)| Arc::clone(error))
    }

    async fn fail(
        &self,
        migration_id: &str,
        run_id: &str,
        direction: Direction,
        actor: &str,
        error: &UpdateError,
    ) -> Result<(), UpdateError> {
        let now = self.pki.clock.now().seconds();
        let refused = matches!(
            error,
            UpdateError::Refused(_)
                | UpdateError::NoSnapshot
                | UpdateError::Blocked { .. }
                | UpdateError::Settled { .. }
                | UpdateError::SnapshotDamaged { .. }
        );
        let mut tx = self.pki.store.write().await?;
        let run = store::run_by_id(&mut tx, run_id).await?;
        let committed = run.is_some_and(|run| run.committed);
        if committed && error.is_of_the_database() {
            // Nobody has seen the stored state: the run stays open, and `recover` looks again.
            tracing::warn!(migration_id, run_id, error = chain(error), "update_activation_postponed");
            return Ok(());
        }
        if refused {
            store::finish_run(&mut tx, run_id, true, Some(&error.to_string()), now).await?;
            // An apply is refused before it has staged anything; a rollback may have.
            store::discard_images(&mut tx, run_id).await?;
            return Ok(tx.commit_unaudited().await?);
        }
        let text = chain(error);
        let (name, event_type) = match direction {
            Direction::Apply => ("cullis_proxy_update_apply_failed", EventType::UpdateApplyFailed),
            Direction::Rollback => ("cullis_proxy_update_rollback_failed", EventType::UpdateRollbackFailed),
        };
        let reason = error.reason();
        tracing::error!(migration_id, run_id, reason, error = text, "{name}");
        if committed {
            // The state has changed and does not verify: the halt stays, for either direction now.
            tx.execute(
                "UPDATE update_runs SET halts = 1, error = $2, finished_at = $3 WHERE run_id = $1",
                crate::values![run_id, &text, now.to_rfc3339()],
            )
            .await?;
        } else {
            store::finish_run(&mut tx, run_id, true, Some(&text), now).await?;
            match direction {
                Direction::Apply => store::set_failed(&mut tx, migration_id, &text).await?,
                Direction::Rollback => store::discard_images(&mut tx, run_id).await?,
            }
        }
        tx.bump_epoch().await?;
        tx.commit(&[event(
            event_type,
            actor,
            migration_id,
            json!({ "error": text, "reason": reason, "committed": committed, "run_id": run_id }),
        )])
        .await?;
        self.pki.refresh().await?;
        Ok(())
    }

    /// Finishes a run that a dead process left: at boot, and again and again for other replicas' runs.
    pub async fn recover(self: &Arc<Self>) -> Result<(), UpdateError> {
        if self.running.load(Ordering::SeqCst) {
            self.lose_sight();
            return Ok(());
        }
        let Some(open) = self.orphan().await? else { return Ok(()) };
        let _beats = self.heartbeat(&open.run_id);
        let direction = if open.direction == "apply" { Direction::Apply } else { Direction::Rollback };
        let ended = self.unwritten_end(&open.run_id);
        let what = match ended {
            Some(_) => "the database takes down how this run ended",
            None => "a process ended in the middle of this run",
        };
        tracing::warn!(
            migration_id = open.migration_id,
            direction = open.direction,
            phase = open.phase,
            committed = open.committed,
            "update_run_recovered: {what}; its state is {}",
            if open.committed { "wholly new" } else { "wholly old" }
        );
        let Some(migration) = registry::find(&open.migration_id) else { return Ok(()) };
        if open.committed {
            let run = engine::Run {
                updates: self,
                migration,
                run_id: open.run_id.clone(),
                actor: open.actor.clone(),
                direction,
                planned: None,
                approval: None,
                tally: engine::Tally::new(),
            };
            let result = run.activate().await;
            self.progress.send_replace(None);
            if let Err(error) = result {
                self.fail(&open.migration_id, &open.run_id, direction, &open.actor, &error).await?;
            }
            return Ok(());
        }
        let error = ended.unwrap_or_else(|| Arc::new(UpdateError::Interrupted));
        self.fail(&open.migration_id, &open.run_id, direction, &open.actor, &error).await?;
        *self.unwritten() = None;
        Ok(())
    }

    /// The open run, if nobody works at it any more; it is ours from then on.
    async fn orphan(&self) -> Result<Option<RunRow>, UpdateError> {
        let seen = async { Ok::<_, UpdateError>(store::open_run(&mut self.pki.store.read().await?).await?) };
        let seen = match seen.await {
            Ok(Some(open)) => open,
            // A database that was away has hidden signs of life too.
            other => {
                self.lose_sight();
                return other;
            }
        };
        let is_own = |open: &RunRow| open.replica == self.replica || self.pki.store.sqlite_path().is_some();
        if !is_own(&seen) && !self.is_silent(&seen) {
            return Ok(None);
        }
        // Under the lock: PostgreSQL may still be at the last statement of the dead process, which can be its commit.
        let mut tx = self.pki.store.write().await?;
        let Some(open) = store::open_run(&mut tx).await? else { return Ok(None) };
        if self.running.load(Ordering::SeqCst) || !(is_own(&open) || open == seen) {
            return Ok(None);
        }
        store::claim_run(&mut tx, &open.run_id, &self.replica, self.pki.clock.now().seconds()).await?;
        tx.commit_unaudited().await?;
        self.lose_sight();
        Ok(Some(open))
    }

    /// Removes what finished runs have given up, a few rows at a time, so that nobody waits for it.
    pub async fn sweep(&self) -> Result<(), UpdateError> {
        let runs = store::discarded_runs(&mut self.pki.store.read().await?).await?;
        for run_id in runs {
            loop {
                let mut tx = self.pki.store.write().await?;
                let dropped = store::drop_some_images(&mut tx, &run_id, SWEEP_ROWS).await?;
                tx.commit_unaudited().await?;
                if dropped == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// How many rows have each status.
    pub async fn counts(&self) -> Result<[(&'static str, i64); 4], UpdateError> {
        let mut counts = [("pending", 0), ("applied", 0), ("rolled_back", 0), ("failed", 0)];
        for row in store::rows(&mut self.pki.store.read().await?).await? {
            for (status, count) in &mut counts {
                if row.status == *status {
                    *count += 1;
                }
            }
        }
        Ok(counts)
    }
}

/// A legacy time in the form the page shows; one that cannot be read is shown as it stands.
fn shown(text: &str) -> String {
    UnixTime::parse(text).map_or_else(|| text.to_owned(), UnixTime::to_rfc3339)
}

fn not_covered_json(counts: &[(EnrollmentType, i64)]) -> Value {
    Value::Object(counts.iter().map(|(kind, count)| (kind.as_str().to_owned(), json!(count))).collect())
}

fn event(event_type: EventType, actor: &str, migration_id: &str, mut details: Value) -> Event {
    if let Some(object) = details.as_object_mut() {
        object.insert("migration_id".to_owned(), json!(migration_id));
    }
    Event { event_type, actor: actor.to_owned(), details }
}
