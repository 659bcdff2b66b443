//! The engine: runs a migration's change set, or its inverse, through the phases
//! `detect → snapshot → prepare → verify → commit → activate`.
//!
//! Before *commit* nothing has changed, whatever happens. *Commit* is one transaction: images after, what they
//! supersede, the row's status, the epoch, the audit event. After it only *activate* is left, which any later boot can
//! do. A run is a task of its own; callers watch it.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use serde_json::json;

use super::approval::Approval;
use super::crash::{crash_point, substituted};
use super::error::UpdateError;
use super::halt::ExemptPermit;
use super::migration::{
    After, CarryBack, Cell, ChangeSet, Criticality, Expected, FleetAfter, FleetChange, FleetColumn, FleetRow,
    Migration, Need, RestoredAuthority, Tools,
};
use super::snapshots::{self, State};
use super::store::{self as rows, FingerprintRange, FleetCell, RestoredFleet, StagedCell, StagedFacts};
use super::view::View;
use super::{Direction, Phase, Progress, Updates, rehearsal};
use super::{stored, verify};
use crate::entropy::Entropy;
use crate::pki::store::{self as pki_rows, CertificateFacts, config_key, hex};
use crate::pki::{Authority, PkiError};
use crate::store::{Query, Value, WriteTx};
use crate::values;

/// Leaves that are read, signed, verified and staged together; bounds memory whatever the fleet's size, and how long
/// anybody else waits for one of the many small commits before the one.
pub(super) const BATCH_LEAVES: i64 = 256;
/// Replaced leaves that are written together.
const SUPERSEDED_LEAVES: i64 = 16384;
/// How often a run follows a fleet that moves under it before it gives up.
const CATCH_UP_ROUNDS_MAX: usize = 8;
/// Leaves that may be prepared again while the commit's lock is held; more go back to *prepare*.
const MOVED_LEAVES_MAX: i64 = 4096;

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// When its commit was made.
    pub at: UnixTime,
    /// Leaves that it changed.
    pub leaves: i64,
}

/// One run of one migration in one direction.
pub(super) struct Run<'a> {
    pub updates: &'a Updates,
    pub migration: &'static dyn Migration,
    pub run_id: String,
    pub actor: String,
    pub direction: Direction,
    /// Digest of the images before that the operator's plan was made of; the run may change nothing else.
    pub planned: Option<String>,
    /// The two operators who stand behind it, where two have to.
    pub approval: Option<Approval>,
    /// What the run knows of its own work and does not read back.
    pub tally: Tally,
}

/// Counts that the stored state is held to.
#[derive(Default)]
pub(super) struct Tally {
    /// Cells of the fleet that are staged.
    staged: AtomicI64,
    /// Leaves of others without facts when the commit was made; negative: not asked.
    foreign_without_facts: AtomicI64,
}

impl Tally {
    /// Of a run that has done nothing yet, or whose process has died.
    pub fn new() -> Self {
        Self { staged: AtomicI64::new(0), foreign_without_facts: AtomicI64::new(-1) }
    }
}

impl Run<'_> {
    fn id(&self) -> &'static str {
        self.migration.declaration().migration_id
    }

    fn now(&self) -> UnixTime {
        self.updates.pki.clock.now().seconds()
    }

    async fn enter(&self, phase: Phase, done: i64, total: i64) -> Result<(), UpdateError> {
        let mut tx = self.updates.pki.store.write().await?;
        self.note(&mut tx, phase, done, total).await?;
        Ok(tx.commit_unaudited().await?)
    }

    /// Shows where the run is, and notes it with whatever else `tx` makes durable.
    async fn note(&self, tx: &mut WriteTx, phase: Phase, done: i64, total: i64) -> Result<(), UpdateError> {
        self.updates.show(Progress {
            run_id: self.run_id.clone(),
            migration_id: self.id().to_owned(),
            direction: self.direction,
            phase,
            done,
            total,
        });
        let place = (phase.as_str(), done, total);
        if rows::progress(tx, &self.run_id, &self.updates.replica, place, self.now()).await? {
            Ok(())
        } else {
            Err(UpdateError::TakenOver)
        }
    }

    /// Whether the run may commit: nobody has closed it in the belief that this process was dead (invariant I8).
    async fn is_still_ours(&self, tx: &mut WriteTx) -> Result<(), UpdateError> {
        if rows::is_run_of(tx, &self.run_id, &self.updates.replica).await? {
            Ok(())
        } else {
            Err(UpdateError::TakenOver)
        }
    }

    async fn view(&self) -> Result<View, UpdateError> {
        view(self.updates, self.id()).await
    }

    /// Runs an apply to its end. `Ok(None)`: the check says that nothing is needed any more.
    pub async fn apply(&self) -> Result<Option<Outcome>, UpdateError> {
        crash_point("apply.admitted");
        self.enter(Phase::Detect, 0, 0).await?;
        let view = self.view().await?;
        match self.migration.check(&view) {
            Need::Needed { .. } => {}
            Need::NotNeeded => return Ok(None),
            Need::Impossible(refusal) | Need::Refused(refusal) => return Err(UpdateError::Refused(refusal)),
        }
        crash_point("apply.detect");
        let total = self.snapshot(&view).await?;
        crash_point("apply.snapshot");
        if let Some(planned) = &self.planned {
            rehearsal::hold(self.updates, self.migration, &self.run_id, planned).await?;
        }

        self.enter(Phase::Prepare, 0, total).await?;
        let view = Arc::new(view);
        let change_set = prepare(self.updates, self.migration, Arc::clone(&view)).await?;
        let ChangeSet { cells, fleet, result } = change_set;
        verify::cells(&cells)?;
        if let Some(result) = &result {
            verify::authority(result, self.now())?;
        }
        tracing::info!(migration_id = self.id(), "update_keys_ready");
        let fleet = self.fleet(fleet);
        self.stage_cells(&cells, result.as_ref()).await?;
        crash_point("apply.prepare.part");
        if let Some(fleet) = &fleet {
            self.stage_fleet(fleet, result.as_ref(), total).await?;
        }
        crash_point("apply.prepare");

        self.enter(Phase::Verify, 0, total).await?;
        crash_point("apply.verify.part");
        self.verify_staged(total).await?;
        crash_point("apply.verify");

        self.enter(Phase::Commit, 0, total).await?;
        let mut outcome = None;
        for _round in 0..CATCH_UP_ROUNDS_MAX {
            let seen = self.moved().await?;
            if !seen.agent_ids.is_empty() {
                if self.planned.is_some() {
                    return Err(UpdateError::MovedSincePlan);
                }
                self.follow(&seen.agent_ids, fleet.as_ref(), result.as_ref()).await?;
                continue;
            }
            match self.commit_apply(seen.epoch, &view, &cells, result.as_ref()).await? {
                Commit::Done(done) => {
                    outcome = Some(done);
                    break;
                }
                Commit::Moved(_) if self.planned.is_some() => return Err(UpdateError::MovedSincePlan),
                Commit::Moved(agent_ids) => self.follow(&agent_ids, fleet.as_ref(), result.as_ref()).await?,
            }
        }
        let outcome = outcome.ok_or(UpdateError::CannotCatchUp)?;
        crash_point("apply.commit");
        self.activate().await?;
        Ok(Some(outcome))
    }

    /// The column of the fleet in scope, with what changes it.
    fn fleet(&self, change: Option<Box<dyn FleetChange>>) -> Option<Fleet> {
        Some(Fleet { column: self.migration.scope().fleet?, change: Arc::from(change?) })
    }

    /// Copies the scope, durable before anything else happens (invariant I3).
    async fn snapshot(&self, view: &View) -> Result<i64, UpdateError> {
        self.enter(Phase::Snapshot, 0, 0).await?;
        let store = &self.updates.pki.store;
        let sealing = self.updates.pki.sealing();
        let scope = self.migration.scope();
        // A torn run of the predecessor left its own snapshot: what that says is what a rollback restores.
        let inherited = match view.torn {
            Some(_) => {
                let mut tx = store.read().await?;
                rows::predecessor_run(&mut tx, self.id()).await?
            }
            None => None,
        };
        let mut total = 0;
        let mut images = Vec::new();
        let mut tx = store.write().await?;
        for cell in scope.cells {
            let stored = pki_rows::config(&mut tx, cell.row_key).await?;
            let (before, digest) = match (cell.sealed, stored) {
                (true, Some(sealed)) => {
                    let clear = sealing.open(&cell.place(), &sealed)?;
                    let place = rows::image_place(&self.run_id, cell, "before");
                    (Some(sealing.seal(&place, clear.as_bytes())?), rows::digest(Some(&clear)))
                }
                (_, stored) => {
                    let digest = rows::digest(stored.as_deref());
                    (stored, digest)
                }
            };
            images.push(rows::cell_image(&self.run_id, cell, before, digest));
        }
        rows::insert_images(&mut tx, &images).await?;
        tx.commit_unaudited().await?;
        crash_point("apply.snapshot.part");
        total += i64::try_from(images.len()).unwrap_or(i64::MAX);
        if let Some(column) = scope.fleet {
            total += self.snapshot_fleet(column).await?;
        }
        let mut tx = store.write().await?;
        if let Some(inherited) = &inherited {
            self.inherit(&mut tx, inherited, scope.cells).await?;
        }
        self.drop_superseded_attempt(&mut tx).await?;
        rows::set_snapshot(&mut tx, self.id(), &self.run_id, total, self.now()).await?;
        tx.commit(&[self.event(EventType::UpdateSnapshotTaken, json!({ "rows": total }))]).await?;
        Ok(total)
    }

    /// Keeps the images of an apply that no rollback goes back to any more as a former snapshot.
    async fn keep(&self, tx: &mut WriteTx, apply_run: &str, state: State) -> Result<(), UpdateError> {
        Ok(snapshots::store::keep(tx, self.id(), apply_run, state, self.updates.snapshots_kept).await?)
    }

    /// An earlier attempt that never committed has nothing to give back: its images go with its descriptor.
    async fn drop_superseded_attempt(&self, tx: &mut WriteTx) -> Result<(), UpdateError> {
        let Some(earlier) = rows::snapshot(tx, self.id()).await? else { return Ok(()) };
        match rows::run_by_id(tx, &earlier.run_id).await? {
            Some(run) if run.committed => self.keep(tx, &earlier.run_id, State::Superseded).await,
            Some(run) if run.actor != super::PREDECESSOR => {
                Ok(rows::discard_images(tx, &earlier.run_id).await?)
            }
            _ => Ok(()),
        }
    }

    /// Copies the fleet's column, a page being read while the one before is written.
    async fn snapshot_fleet(&self, column: FleetColumn) -> Result<i64, UpdateError> {
        let (mut after, mut total) = (String::new(), 0);
        let mut images = Vec::new();
        loop {
            let read = async {
                let mut tx = self.updates.pki.store.read().await?;
                Ok(rows::fleet_page(&mut tx, column, &after, BATCH_LEAVES).await?)
            };
            let (page, ()) = tokio::try_join!(read, self.write_images(&images))?;
            let Some(last) = page.last() else { return Ok(total) };
            after.clone_from(&last.agent_id);
            total += i64::try_from(page.len()).unwrap_or(i64::MAX);
            images = page.iter().map(|cell| rows::fleet_image(&self.run_id, column, cell)).collect();
        }
    }

    async fn write_images(&self, images: &[Vec<Value>]) -> Result<(), UpdateError> {
        if images.is_empty() {
            return Ok(());
        }
        let mut tx = self.updates.pki.store.write().await?;
        rows::insert_images(&mut tx, images).await?;
        Ok(tx.commit_unaudited().await?)
    }

    /// Takes over what a predecessor's snapshot says a rollback restores.
    async fn inherit(&self, tx: &mut WriteTx, inherited: &str, cells: &[Cell]) -> Result<(), UpdateError> {
        tx.execute(
            "UPDATE update_images SET restores = 1, restore = i.before FROM update_images i WHERE i.run_id = $1 \
             AND update_images.run_id = $2 AND i.table_name = update_images.table_name \
             AND i.row_key = update_images.row_key AND i.column_name = update_images.column_name AND i.sealed = 0",
            values![inherited, &self.run_id],
        )
        .await?;
        let sealing = self.updates.pki.sealing();
        for cell in cells.iter().filter(|cell| cell.sealed) {
            let Some(image) = rows::image(tx, inherited, cell).await? else { continue };
            let Some(sealed) = image.before else { continue };
            let from = rows::image_place(inherited, cell, "before");
            let to = rows::image_place(&self.run_id, cell, "restore");
            let moved = sealing.move_sealed(&from, &to, &sealed)?;
            tx.execute(
                "UPDATE update_images SET restores = 1, restore = $5 WHERE run_id = $1 AND table_name = $2 \
                 AND row_key = $3 AND column_name = $4",
                values![&self.run_id, cell.table, cell.row_key, cell.column, moved],
            )
            .await?;
        }
        Ok(())
    }

    /// Stages the single cells, and what follows every leaf that is to be written.
    async fn stage_cells(
        &self,
        cells: &[(Cell, After)],
        result: Option<&Expected>,
    ) -> Result<(), UpdateError> {
        let sealing = self.updates.pki.sealing();
        let mut tx = self.updates.pki.store.write().await?;
        if let Some(result) = result {
            rows::set_follows(&mut tx, &self.run_id, &result.mastio_ca.to_pem()).await?;
        }
        for (cell, after) in cells {
            let after = match after {
                After::Text(text) => text.clone(),
                After::Key(key) => key.seal(sealing, &rows::image_place(&self.run_id, cell, "after"))?,
            };
            rows::set_cell_after(&mut tx, &self.run_id, cell, Some(after)).await?;
        }
        Ok(tx.commit_unaudited().await?)
    }

    /// Changes the fleet's column batch by batch; one is signed on all cores while the one before is written.
    async fn stage_fleet(
        &self,
        fleet: &Fleet,
        result: Option<&Expected>,
        total: i64,
    ) -> Result<(), UpdateError> {
        // The cells are staged already; the total counts them too.
        let cells = self.migration.scope().cells.len();
        let (mut after, mut done) = (String::new(), i64::try_from(cells).unwrap_or(0));
        let mut staged: Option<Vec<StagedCell>> = None;
        loop {
            let store = &self.updates.pki.store;
            let mut tx = store.read().await?;
            let page = rows::image_page(&mut tx, fleet.column, &self.run_id, &after, BATCH_LEAVES).await?;
            drop(tx);
            let read = i64::try_from(page.len()).unwrap_or(i64::MAX);
            let last = page.last().map(|last| last.agent_id.clone());
            let write = async {
                match &staged {
                    Some(staged) => self.write_staged(fleet, result, staged, Some((done, total))).await,
                    None => Ok(()),
                }
            };
            let (changed, ()) = tokio::try_join!(self.changed(page, fleet, result), write)?;
            let Some(last) = last else { return Ok(()) };
            (after, staged) = (last, Some(changed));
            done += read;
            crash_point("apply.prepare.page");
        }
    }

    async fn stage_leaves(
        &self,
        page: Vec<FleetCell>,
        fleet: &Fleet,
        result: Option<&Expected>,
    ) -> Result<(), UpdateError> {
        let staged = self.changed(page, fleet, result).await?;
        self.write_staged(fleet, result, &staged, None).await
    }

    async fn changed(
        &self,
        page: Vec<FleetCell>,
        fleet: &Fleet,
        result: Option<&Expected>,
    ) -> Result<Vec<StagedCell>, UpdateError> {
        let entropy = Arc::clone(&self.updates.pki.entropy);
        change_leaves(page, fleet.clone(), result.cloned(), entropy, self.now()).await
    }

    async fn write_staged(
        &self,
        fleet: &Fleet,
        result: Option<&Expected>,
        staged: &[StagedCell],
        progress: Option<(i64, i64)>,
    ) -> Result<(), UpdateError> {
        let follows = result.map(|result| result.mastio_ca.to_pem());
        let mut tx = self.updates.pki.store.write().await?;
        rows::stage(&mut tx, fleet.column, &self.run_id, staged, follows.as_deref()).await?;
        if let Some((done, total)) = progress {
            self.note(&mut tx, Phase::Prepare, done, total).await?;
        }
        tx.commit_unaudited().await?;
        self.tally.staged.fetch_add(i64::try_from(staged.len()).unwrap_or(i64::MAX), Ordering::SeqCst);
        Ok(())
    }

    /// Judges what only all leaves together show, and writes those that they replace, `total` at most.
    async fn verify_staged(&self, total: i64) -> Result<(), UpdateError> {
        let store = &self.updates.pki.store;
        if let Some(serial) = rows::duplicate_serial(&mut store.read().await?, &self.run_id).await? {
            return Err(UpdateError::Verification {
                what: format!("serial {serial}, which two leaves share"),
                cause: None,
            });
        }
        if let Some(column) = self.migration.scope().fleet {
            let staged = rows::staged(&mut store.read().await?, column, &self.run_id).await?;
            self.is_whole(staged, column)?;
        }
        if self.migration.scope().fleet != Some(FleetColumn::CertPem) {
            return Ok(());
        }
        for range in FingerprintRange::split(total, SUPERSEDED_LEAVES) {
            let mut tx = store.write().await?;
            rows::clear_superseded(&mut tx, &self.run_id, &range).await?;
            rows::supersede_staged(&mut tx, &self.run_id, &range, self.now()).await?;
            tx.commit_unaudited().await?;
        }
        Ok(())
    }

    /// Whether `found` cells of the fleet are all that this run has staged.
    fn is_whole(&self, found: i64, column: FleetColumn) -> Result<(), UpdateError> {
        let staged = self.tally.staged.load(Ordering::SeqCst);
        if found == staged {
            return Ok(());
        }
        let what = format!("{} of {found} agents, where {staged} were prepared", column.as_str());
        Err(UpdateError::Verification { what, cause: None })
    }

    /// Sees agents anew that entered, left or changed, and prepares them again, outside the lock.
    async fn follow(
        &self,
        agent_ids: &[String],
        fleet: Option<&Fleet>,
        result: Option<&Expected>,
    ) -> Result<(), UpdateError> {
        let Some(fleet) = fleet else { return Ok(()) };
        let store = &self.updates.pki.store;
        let mut tx = store.write().await?;
        let forgotten = rows::forget_images(&mut tx, &self.run_id, agent_ids).await?;
        let mut present = Vec::new();
        for agent_id in agent_ids {
            present.extend(rows::fleet_cell(&mut tx, fleet.column, agent_id).await?);
        }
        let images: Vec<_> =
            present.iter().map(|cell| rows::fleet_image(&self.run_id, fleet.column, cell)).collect();
        rows::insert_images(&mut tx, &images).await?;
        tx.commit_unaudited().await?;
        self.tally.staged.fetch_sub(i64::try_from(forgotten).unwrap_or(0), Ordering::SeqCst);
        for page in present.chunks(usize::try_from(BATCH_LEAVES).unwrap_or(1)) {
            self.stage_leaves(page.to_vec(), fleet, result).await?;
        }
        self.verify_staged(rows::count_images(&mut store.read().await?, &self.run_id).await?).await
    }

    /// Who has moved since the run saw the fleet, asked outside the lock. Every write to the fleet moves the epoch, so
    /// whoever finds the same epoch under the lock need not ask again.
    async fn moved(&self) -> Result<Seen, UpdateError> {
        let mut tx = self.updates.pki.store.read().await?;
        let epoch = rows::epoch(&mut tx).await?;
        let agent_ids = match self.migration.scope().fleet {
            Some(column) => rows::moved(&mut tx, column, &self.run_id, MOVED_LEAVES_MAX).await?,
            None => Vec::new(),
        };
        Ok(Seen { epoch, agent_ids, otherwise: false })
    }

    /// The same for what a rollback carries back.
    async fn moved_since(&self, apply_run: &str, carried: Option<&Carried>) -> Result<Seen, UpdateError> {
        let mut tx = self.updates.pki.store.read().await?;
        let epoch = rows::epoch(&mut tx).await?;
        let agent_ids = match carried {
            Some(Carried { column, .. }) => {
                rows::carry_back_moved(&mut tx, *column, apply_run, &self.run_id, MOVED_LEAVES_MAX).await?
            }
            None => Vec::new(),
        };
        let otherwise = self.migration.scope().fleet == Some(FleetColumn::CertPem)
            && rows::has_same_leaf_otherwise(&mut tx, apply_run).await?;
        Ok(Seen { epoch, agent_ids, otherwise })
    }

    /// The one commit of an apply.
    async fn commit_apply(
        &self,
        seen_epoch: i64,
        view: &View,
        cells: &[(Cell, After)],
        result: Option<&Expected>,
    ) -> Result<Commit, UpdateError> {
        let pki = &self.updates.pki;
        let declaration = self.migration.declaration();
        let mut tx = pki.store.write().await?;
        self.is_still_ours(&mut tx).await?;
        let now = self.now();
        let column = self.migration.scope().fleet;
        if let Some(column) = column.filter(|_| tx.epoch() != seen_epoch) {
            let moved = rows::moved(&mut tx, column, &self.run_id, MOVED_LEAVES_MAX).await?;
            if !moved.is_empty() {
                return Ok(Commit::Moved(moved));
            }
        }
        self.refuse_if_cells_moved(&mut tx).await?;
        // The replaced root goes on as a retiring anchor; its key signs our TLS leaf until the overlap ends.
        if let Some(replaced) = result.and_then(|result| result.replaced_org_ca.as_ref()) {
            let stored = pki_rows::config(&mut tx, config_key::ORG_CA_KEY).await?;
            let from = pki_rows::config_place(config_key::ORG_CA_KEY);
            let to = pki_rows::anchor_place(&replaced.fingerprint());
            let key = match stored {
                Some(sealed) => Some(pki.sealing().move_sealed(&from, &to, &sealed)?),
                None => None,
            };
            pki_rows::add_retiring_anchor(&mut tx, replaced, key, &self.run_id, now).await?;
        }
        for (cell, after) in cells {
            self.write_cell(&mut tx, cell, after).await?;
        }
        let leaves = match column {
            Some(column) => rows::write_fleet(&mut tx, column, &self.run_id).await?,
            None => 0,
        };
        let leaves = i64::try_from(leaves).unwrap_or(i64::MAX);
        if let Some(column) = column {
            self.is_whole(leaves, column)?;
        }
        crash_point("apply.commit.part");
        rows::settle_images(&mut tx, &self.run_id).await?;
        rows::set_applied(&mut tx, declaration, now).await?;
        let halts = declaration.criticality == Criticality::Critical;
        rows::set_committed(&mut tx, &self.run_id, halts, leaves, now).await?;
        let foreign = rows::foreign_without_facts(&mut tx).await?;
        self.tally.foreign_without_facts.store(foreign, Ordering::SeqCst);
        tx.bump_epoch().await?;
        crash_point("apply.commit.before");
        tx.commit(&[self.event(
            EventType::UpdateApplied,
            json!({
                "leaves": leaves,
                "org_ca_before": view.authority.org_ca.fingerprint(),
                "org_ca_after": result.map(|result| result.org_ca.fingerprint()),
                "mastio_ca_after": result.map(|result| result.mastio_ca.fingerprint()),
            }),
        )])
        .await?;
        Ok(Commit::Done(Outcome { at: now, leaves }))
    }

    /// A cell that changed since the run saw it is somebody else's work: refuse rather than overwrite.
    async fn refuse_if_cells_moved(&self, tx: &mut WriteTx) -> Result<(), UpdateError> {
        let sealing = self.updates.pki.sealing();
        for cell in self.migration.scope().cells {
            let stored = pki_rows::config(tx, cell.row_key).await?;
            let Some(image) = rows::image(tx, &self.run_id, cell).await? else { continue };
            let digest = match (cell.sealed, &stored) {
                (true, Some(sealed)) => rows::digest(Some(&sealing.open(&cell.place(), sealed)?)),
                _ => rows::digest(stored.as_deref()),
            };
            if digest != image.before_digest {
                return Err(UpdateError::CannotCatchUp);
            }
        }
        Ok(())
    }

    /// Whether a cell reads as the apply wrote it. What a torn run of the predecessor wrote has no image after.
    pub async fn still_as_written(
        &self,
        tx: &mut impl Query,
        apply_run: &str,
        cell: &Cell,
        image: &rows::Image,
    ) -> Result<bool, UpdateError> {
        let stored = pki_rows::config(tx, cell.row_key).await?;
        match (cell.sealed, &image.after, &stored) {
            (true, Some(after), Some(stored)) => {
                let place = rows::image_place(apply_run, cell, "after");
                Ok(self.updates.pki.sealing().same_clear_text((&place, after), (&cell.place(), stored))?)
            }
            (true, None, _) => Ok(image.restore.is_some()),
            (_, after, stored) => Ok(after == stored),
        }
    }

    /// Writes a cell as it is staged, which has to be what was prepared.
    async fn write_cell(&self, tx: &mut WriteTx, cell: &Cell, prepared: &After) -> Result<(), UpdateError> {
        let sealing = self.updates.pki.sealing();
        let staged = rows::image(tx, &self.run_id, cell).await?.and_then(|image| image.after);
        let value = match (prepared, staged) {
            (After::Text(text), Some(staged)) if *text == staged => Some(staged),
            (After::Key(key), Some(staged)) => {
                let from = rows::image_place(&self.run_id, cell, "after");
                let opened = sealing.open_key(&from, &staged).ok();
                match opened.filter(|opened| opened.spki_der() == key.key.spki_der()) {
                    Some(_) => Some(sealing.move_sealed(&from, &cell.place(), &staged)?),
                    None => None,
                }
            }
            _ => None,
        };
        let Some(value) = value else {
            let what = format!("{}, which is not staged as it was prepared", cell.place());
            return Err(UpdateError::Verification { what, cause: None });
        };
        Ok(pki_rows::set_config(tx, cell.row_key, &value).await?)
    }

    /// Judges what stands in the database after the commit, with what stands in memory.
    async fn judge_stored(&self, authority: &Authority) -> Result<(), UpdateError> {
        let scope = self.migration.scope();
        stored::authority(authority, self.direction, scope.has_certificates(), self.now())?;
        stored::recorded(self.updates, self.direction, &self.run_id).await?;
        if self.direction == Direction::Rollback {
            return Ok(());
        }
        let mut tx = self.updates.pki.store.read().await?;
        for cell in scope.cells {
            if let Some(image) = rows::image(&mut tx, &self.run_id, cell).await?.filter(|image| image.changes)
                && !self.still_as_written(&mut tx, &self.run_id, cell, &image).await?
            {
                return Err(UpdateError::StoredState(cell.place()));
            }
        }
        let seen = self.tally.foreign_without_facts.load(Ordering::SeqCst);
        let touched = rows::foreign_without_facts(&mut tx).await? - seen;
        drop(tx);
        if seen >= 0 && touched > 0 {
            return Err(UpdateError::StoredState(format!("{touched} leaves of other issuers")));
        }
        if let Some(column) = scope.fleet {
            stored::fleet(self.updates, column, self.direction, &self.run_id).await?;
        }
        stored::overlap(self.updates, authority, &self.run_id).await
    }

    /// Takes up the new state in memory, reads the *stored* state again and judges it; then the halt lifts.
    pub async fn activate(&self) -> Result<(), UpdateError> {
        self.enter(Phase::Activate, 0, 0).await?;
        let pki = &self.updates.pki;
        let authority = pki.reload().await.map_err(|error| match error {
            PkiError::Store(_) => UpdateError::Pki(error),
            unreadable => UpdateError::StoredState(format!("the CA, which cannot be read: {unreadable}")),
        })?;
        crash_point(match self.direction {
            Direction::Apply => "apply.activate",
            Direction::Rollback => "rollback.activate",
        });
        self.judge_stored(&authority).await?;
        let images = match self.direction {
            Direction::Apply => {
                Some(snapshots::store::read_images(&mut pki.store.read().await?, &self.run_id).await?)
            }
            Direction::Rollback => None,
        };
        let mut tx = pki.store.write().await?;
        self.is_still_ours(&mut tx).await?;
        if let Some(images) = images {
            snapshots::store::set_digest(&mut tx, &self.run_id, &images.digest).await?;
        }
        rows::finish_run(&mut tx, &self.run_id, true, None, self.now()).await?;
        rows::overrule_earlier(&mut tx, self.id(), &self.run_id).await?;
        if self.direction == Direction::Rollback {
            rows::discard_images(&mut tx, &self.run_id).await?;
        }
        tx.bump_epoch().await?;
        tx.commit(&[self.event(EventType::UpdateVerified, json!({ "direction": self.direction.as_str() }))])
            .await?;
        crash_point(match self.direction {
            Direction::Apply => "apply.activated",
            Direction::Rollback => "rollback.activated",
        });
        pki.refresh().await?;
        // What the halt held back, and the certificate that carries the trust change to clients.
        pki.complete().await?;
        if let Some(tls) = self.updates.tls.get() {
            tls.refresh(pki).await?;
        }
        Ok(())
    }

    /// Runs a rollback to its end.
    pub async fn rollback(&self) -> Result<Outcome, UpdateError> {
        crash_point("rollback.admitted");
        self.enter(Phase::Detect, 0, 0).await?;
        let store = &self.updates.pki.store;
        let mut tx = store.read().await?;
        let snapshot = rows::rollback_snapshot(&mut tx, self.id()).await?;
        let apply = rows::run_by_id(&mut tx, &snapshot.run_id).await?;
        if let Some(blocker) = rows::blocker(&mut tx, self.id(), &snapshot.run_id).await? {
            return Err(UpdateError::Blocked { blocker });
        }
        let committed = apply.as_ref().is_some_and(|apply| apply.committed);
        let torn = apply.as_ref().is_some_and(|apply| !apply.committed && apply.actor == super::PREDECESSOR);
        // Of a run that never committed nothing is restored, whatever its images read.
        if (committed || torn)
            && let Some(row) = snapshots::damage(&mut tx, &snapshot.run_id).await?
        {
            return Err(UpdateError::SnapshotDamaged { migration_id: self.id().to_owned(), row });
        }
        drop(tx);
        crash_point("rollback.detect");
        if !committed && !torn {
            return self.drop_uncommitted(&snapshot.run_id).await;
        }
        if torn {
            self.take_torn_as_committed(&snapshot.run_id).await?;
        }
        // Its stored state was never known to be right: what differs from what it wrote is damage, not somebody's work.
        let damaged = apply.as_ref().is_some_and(|apply| apply.committed && !apply.verified);
        if let Some(column) = self.migration.scope().fleet.filter(|_| damaged) {
            let mut tx = store.write().await?;
            rows::take_damage_as_written(&mut tx, column, &snapshot.run_id).await?;
            tx.commit_unaudited().await?;
        }
        let restored = self.restored_authority(&snapshot.run_id, false).await?;
        let carried = match (self.migration.carry_back(restored), self.migration.scope().fleet) {
            (Some(carry_back), Some(column)) => Some(Carried { column, carry_back: Arc::from(carry_back) }),
            _ => None,
        };
        let total = match &carried {
            Some(carried) => {
                let mut tx = store.read().await?;
                rows::rollback_counts(&mut tx, carried.column, &snapshot.run_id, false).await?.1
            }
            None => 0,
        };
        self.enter(Phase::Prepare, 0, total).await?;
        crash_point("rollback.prepare.part");
        if let Some(carried) = &carried {
            self.carry_back(&snapshot.run_id, carried, total).await?;
        }
        crash_point("rollback.prepare");
        self.enter(Phase::Commit, 0, 0).await?;
        let has_restores = rows::has_restores(&mut store.read().await?, &snapshot.run_id).await?;
        let mut outcome = None;
        for round in 1..=CATCH_UP_ROUNDS_MAX {
            let seen = self.moved_since(&snapshot.run_id, carried.as_ref()).await?;
            let mut moved = seen.agent_ids;
            if moved.is_empty() {
                self.supersede_restored(&snapshot.run_id).await?;
                let apply = Applied {
                    run_id: &snapshot.run_id,
                    has_restores,
                    damaged,
                    seen_epoch: seen.epoch,
                    otherwise: seen.otherwise,
                    waits: round < CATCH_UP_ROUNDS_MAX,
                };
                match self.commit_rollback(apply, carried.as_ref()).await? {
                    Commit::Done(done) => {
                        outcome = Some(done);
                        break;
                    }
                    Commit::Moved(agent_ids) => moved = agent_ids,
                }
            }
            if let Some(carried) = &carried {
                let mut present = Vec::new();
                for agent_id in &moved {
                    let mut tx = store.read().await?;
                    present.extend(rows::fleet_cell(&mut tx, carried.column, agent_id).await?);
                }
                self.stage_carried(present, carried, None).await?;
            }
        }
        let outcome = outcome.ok_or(UpdateError::CannotCatchUp)?;
        crash_point("rollback.commit");
        self.activate().await?;
        Ok(outcome)
    }

    /// Carries back what arose or changed since the apply, page by page.
    async fn carry_back(&self, apply_run: &str, carried: &Carried, total: i64) -> Result<(), UpdateError> {
        let store = &self.updates.pki.store;
        let (mut after, mut done) = (String::new(), 0);
        loop {
            let mut tx = store.read().await?;
            let page =
                rows::changed_since_page(&mut tx, carried.column, apply_run, &after, BATCH_LEAVES).await?;
            drop(tx);
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.agent_id);
            done += i64::try_from(page.len()).unwrap_or(i64::MAX);
            // Whoever arises meanwhile counts too.
            self.stage_carried(page, carried, Some((done, total.max(done)))).await?;
        }
    }

    /// The leaves that this rollback takes from agents stay accepted, those that it carries back too: written before the
    /// commit, they count from it.
    async fn supersede_restored(&self, apply_run: &str) -> Result<(), UpdateError> {
        if self.migration.scope().fleet != Some(FleetColumn::CertPem) {
            return Ok(());
        }
        let store = &self.updates.pki.store;
        let total = rows::count_images(&mut store.read().await?, apply_run).await?;
        for range in FingerprintRange::split(total, SUPERSEDED_LEAVES) {
            let mut tx = store.write().await?;
            self.supersede_range(&mut tx, apply_run, &range).await?;
            tx.commit_unaudited().await?;
        }
        Ok(())
    }

    async fn supersede_range(
        &self,
        tx: &mut WriteTx,
        apply_run: &str,
        range: &FingerprintRange,
    ) -> Result<(), UpdateError> {
        rows::clear_superseded(tx, &self.run_id, range).await?;
        rows::supersede_restored(tx, apply_run, &self.run_id, range, self.now()).await?;
        Ok(rows::supersede_staged(tx, &self.run_id, range, self.now()).await?)
    }

    /// An apply that never committed is undone by forgetting it.
    async fn drop_uncommitted(&self, apply_run: &str) -> Result<Outcome, UpdateError> {
        let mut tx = self.updates.pki.store.write().await?;
        self.is_still_ours(&mut tx).await?;
        let now = self.now();
        rows::discard_images(&mut tx, apply_run).await?;
        rows::drop_snapshot(&mut tx, self.id()).await?;
        rows::set_rolled_back(&mut tx, self.id(), now).await?;
        rows::finish_run(&mut tx, &self.run_id, true, None, now).await?;
        tx.commit(&[
            self.event(EventType::UpdateRolledBack, json!({ "restored_leaves": 0, "committed": false }))
        ])
        .await?;
        self.updates.pki.refresh().await?;
        self.updates.pki.complete().await?;
        Ok(Outcome { at: now, leaves: 0 })
    }

    /// Treats a predecessor's torn run as one that wrote what stands: its snapshot is restored whole.
    async fn take_torn_as_committed(&self, apply_run: &str) -> Result<(), UpdateError> {
        let pki = &self.updates.pki;
        let mut tx = pki.store.write().await?;
        tx.execute(
            "UPDATE update_images SET after = a.cert_pem, changes = 1 FROM internal_agents a \
             WHERE update_images.run_id = $1 AND update_images.table_name = 'internal_agents' \
             AND a.agent_id = update_images.row_key",
            values![apply_run],
        )
        .await?;
        for cell in self.migration.scope().cells {
            if rows::image(&mut tx, apply_run, cell).await?.is_none() {
                continue;
            }
            let after = match (cell.sealed, pki_rows::config(&mut tx, cell.row_key).await?) {
                (true, Some(sealed)) => {
                    let to = rows::image_place(apply_run, cell, "after");
                    Some(pki.sealing().move_sealed(&cell.place(), &to, &sealed)?)
                }
                (_, stored) => stored,
            };
            rows::set_cell_after(&mut tx, apply_run, cell, after).await?;
        }
        Ok(tx.commit_unaudited().await?)
    }

    /// The CA as a rollback restores it. `whole`: every image counts, not only those of cells that changed.
    pub async fn restored_authority(
        &self,
        apply_run: &str,
        whole: bool,
    ) -> Result<RestoredAuthority, UpdateError> {
        let counts = |image: &rows::Image| whole || image.changes;
        let pki = &self.updates.pki;
        let authority = pki.authority();
        let mut tx = pki.store.read().await?;
        let damaged = |what: &str| UpdateError::SnapshotDamaged {
            migration_id: self.id().to_owned(),
            row: format!("proxy_config/{what}"),
        };
        let cert = Cell::config(config_key::ORG_CA_CERT);
        let key = Cell::config_key(config_key::ORG_CA_KEY);
        let org_ca = match rows::image(&mut tx, apply_run, &cert).await?.filter(counts) {
            Some(image) => Certificate::from_pem(image.restored().ok_or_else(|| damaged(cert.row_key))?)?,
            None => authority.org_ca.clone(),
        };
        let org_ca_key = match rows::image(&mut tx, apply_run, &key).await?.filter(counts) {
            Some(image) => {
                let side = if image.restore.is_some() { "restore" } else { "before" };
                let sealed = image.restored().ok_or_else(|| damaged(key.row_key))?;
                Some(Arc::new(pki.sealing().open_key(&rows::image_place(apply_run, &key, side), sealed)?))
            }
            None => authority.org_ca_key.clone(),
        };
        if org_ca_key.as_ref().is_some_and(|key| !org_ca.public_key_matches_spki(key.spki_der())) {
            return Err(damaged(key.row_key));
        }
        let cert = Cell::config(config_key::MASTIO_CA_CERT);
        let key = Cell::config_key(config_key::MASTIO_CA_KEY);
        let mastio_ca = match rows::image(&mut tx, apply_run, &cert).await?.filter(counts) {
            Some(image) => image.restored().map(|pem| Certificate::from_pem(pem)).transpose()?,
            None => authority.mastio_ca.clone(),
        };
        let made_by_apply = rows::image(&mut tx, apply_run, &key).await?.is_some_and(|image| counts(&image));
        let mastio_ca_key = if made_by_apply { None } else { authority.mastio_ca_key.clone() };
        Ok(RestoredAuthority { org_ca, org_ca_key, mastio_ca, mastio_ca_key })
    }

    async fn stage_carried(
        &self,
        page: Vec<FleetCell>,
        carried: &Carried,
        progress: Option<(i64, i64)>,
    ) -> Result<(), UpdateError> {
        let mut tx = self.updates.pki.store.write().await?;
        let images: Vec<_> =
            page.iter().map(|cell| rows::fleet_image(&self.run_id, carried.column, cell)).collect();
        rows::insert_images(&mut tx, &images).await?;
        let staged = carry_cells(&page, carried, &self.updates.pki.entropy)?;
        rows::stage(&mut tx, carried.column, &self.run_id, &staged, None).await?;
        if let Some((done, total)) = progress {
            self.note(&mut tx, Phase::Prepare, done, total).await?;
        }
        Ok(tx.commit_unaudited().await?)
    }

    /// The one commit of a rollback.
    async fn commit_rollback(
        &self,
        apply: Applied<'_>,
        carried: Option<&Carried>,
    ) -> Result<Commit, UpdateError> {
        let pki = &self.updates.pki;
        let Applied { run_id: apply_run, damaged, mut otherwise, .. } = apply;
        let mut tx = pki.store.write().await?;
        self.is_still_ours(&mut tx).await?;
        let now = self.now();
        let column = self.migration.scope().fleet;
        if tx.epoch() != apply.seen_epoch && column.is_some() {
            if let Some(Carried { column, .. }) = carried {
                let moved =
                    rows::carry_back_moved(&mut tx, *column, apply_run, &self.run_id, MOVED_LEAVES_MAX)
                        .await?;
                if !moved.is_empty() {
                    return Ok(Commit::Moved(moved));
                }
            }
            if apply.waits {
                return Ok(Commit::Moved(Vec::new()));
            }
            // Somebody writes all the time: what was done before the lock is done again under it.
            if column == Some(FleetColumn::CertPem) {
                self.supersede_range(&mut tx, apply_run, &FingerprintRange::all()).await?;
                otherwise = true;
            }
        }
        let before = pki.authority().org_ca.clone();
        let (mut restored, mut carried_leaves) = (RestoredFleet { cells: 0, without_facts: false }, 0);
        if let Some(column) = column {
            restored = rows::restore_fleet(&mut tx, column, apply_run, otherwise, apply.has_restores).await?;
            carried_leaves = rows::write_fleet(&mut tx, column, &self.run_id).await?;
            if damaged {
                rows::forget_facts(&mut tx, apply_run).await?;
            }
        }
        crash_point("rollback.commit.part");
        let mut restored_root = None;
        for cell in self.migration.scope().cells {
            let Some(image) = rows::image(&mut tx, apply_run, cell).await?.filter(|image| image.changes)
            else {
                continue;
            };
            if !damaged && !self.still_as_written(&mut tx, apply_run, cell, &image).await? {
                // Somebody has changed it since (I3): half a CA must not come back, so none of it does.
                return Err(UpdateError::Blocked { blocker: format!("a later change of {}", cell.place()) });
            }
            match (cell.sealed, image.restored()) {
                (_, None) => {
                    tx.execute("DELETE FROM proxy_config WHERE key = $1", values![cell.row_key]).await?;
                    if cell.row_key == config_key::MASTIO_CA_CERT {
                        // There was none before: what the token keys' certificates stand under is gone with it.
                        pki_rows::forget_token_certificates(&mut tx).await?;
                    }
                }
                (true, Some(sealed)) => {
                    let side = if image.restore.is_some() { "restore" } else { "before" };
                    let from = rows::image_place(apply_run, cell, side);
                    let value = pki.sealing().move_sealed(&from, &cell.place(), sealed)?;
                    pki_rows::set_config(&mut tx, cell.row_key, &value).await?;
                }
                (false, Some(text)) => {
                    pki_rows::set_config(&mut tx, cell.row_key, text).await?;
                    if cell.row_key == config_key::ORG_CA_CERT {
                        restored_root = Some(Certificate::from_pem(text)?);
                    }
                }
            }
        }
        // A root that was issued again for the same name and key is the same anchor (design §4).
        if let Some(restored) = restored_root.as_ref().filter(|root| root.spki_der() != before.spki_der()) {
            // The replaced root stays trusted, without its key: who pinned it or holds a leaf under it goes on.
            pki_rows::add_retiring_anchor(&mut tx, &before, None, &self.run_id, now).await?;
            tx.execute(
                "UPDATE pki_anchors SET state = 'retired', key_sealed = NULL WHERE fingerprint = $1",
                values![restored.fingerprint()],
            )
            .await?;
        }
        if restored.without_facts || damaged {
            refill_facts(&mut tx, restored_root.as_ref(), pki).await?;
        }
        rows::drop_snapshot(&mut tx, self.id()).await?;
        self.keep(&mut tx, apply_run, State::RolledBack).await?;
        rows::set_rolled_back(&mut tx, self.id(), now).await?;
        let leaves = i64::try_from(restored.cells).unwrap_or(i64::MAX);
        rows::set_committed(&mut tx, &self.run_id, false, leaves, now).await?;
        tx.bump_epoch().await?;
        crash_point("rollback.commit.before");
        tx.commit(&[self.event(
            EventType::UpdateRolledBack,
            json!({
                "restored_leaves": leaves,
                "carried_back_leaves": carried_leaves,
                "org_ca_before": before.fingerprint(),
                "org_ca_after": restored_root.map(|root| root.fingerprint()),
            }),
        )])
        .await?;
        Ok(Commit::Done(Outcome { at: now, leaves }))
    }

    fn event(&self, event_type: EventType, mut details: serde_json::Value) -> Event {
        if let Some(object) = details.as_object_mut() {
            object.insert("migration_id".to_owned(), json!(self.id()));
            object.insert("run_id".to_owned(), json!(self.run_id));
            if let Some(approval) = &self.approval {
                object.insert("proposed_by".to_owned(), json!(approval.proposed_by));
                object.insert("approved_by".to_owned(), json!(approval.approved_by));
            }
        }
        Event { event_type, actor: self.actor.clone(), details }
    }
}

/// The column of the fleet that a run changes, and how.
#[derive(Clone)]
pub(super) struct Fleet {
    pub column: FleetColumn,
    pub change: Arc<dyn FleetChange>,
}

/// The column of the fleet that a rollback carries back, and how.
#[derive(Clone)]
pub(super) struct Carried {
    pub column: FleetColumn,
    pub carry_back: Arc<dyn CarryBack>,
}

/// The apply that a rollback undoes.
#[derive(Clone, Copy)]
struct Applied<'a> {
    run_id: &'a str,
    /// What [`rows::has_restores`] says: the images of a committed run do not change.
    has_restores: bool,
    /// Whether its stored state was never found right.
    damaged: bool,
    /// As of which epoch everything was prepared.
    seen_epoch: i64,
    /// What [`rows::has_same_leaf_otherwise`] said then.
    otherwise: bool,
    /// Whether to prepare again rather than do under the lock what another epoch asks for.
    waits: bool,
}

/// The agents that have moved, as of an epoch.
struct Seen {
    epoch: i64,
    agent_ids: Vec<String>,
    /// What [`rows::has_same_leaf_otherwise`] says, for a rollback.
    otherwise: bool,
}

enum Commit {
    Done(Outcome),
    Moved(Vec<String>),
}

/// Reads what a migration sees, with the keys of the same epoch.
pub(super) async fn view(updates: &Updates, migration_id: &str) -> Result<View, UpdateError> {
    let authority = updates.pki.refresh().await?;
    let mut tx = updates.pki.store.read().await?;
    View::read(&mut tx, authority, migration_id, updates.pki.clock.now().seconds()).await
}

/// Fills the facts of certificates that have none: a torn run's restored leaves, an operator's SQL.
async fn refill_facts(
    tx: &mut WriteTx,
    restored_root: Option<&Certificate>,
    pki: &crate::pki::Pki,
) -> Result<(), UpdateError> {
    let authority = pki.authority();
    let mut candidates = authority_certificates(&authority, restored_root);
    // As it stands after the restore: memory has the one before, or none where the stored one was damaged.
    let restored_ca = pki_rows::config(tx, config_key::MASTIO_CA_CERT).await?;
    candidates.extend(restored_ca.and_then(|pem| Certificate::from_pem(&pem).ok()));
    let mut after = String::new();
    loop {
        let page = rows::without_facts(tx, &after, BATCH_LEAVES).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after.clone_from(&last.agent_id);
        let mut facts = Vec::new();
        for cell in &page {
            // An operator's SQL may have put anything there: it stays unknown.
            if let Ok(leaf) = Certificate::from_pem(&cell.text) {
                facts.push(CertificateFacts::of(&leaf, &candidates).row(&cell.agent_id));
            }
        }
        pki_rows::set_certificate_facts(tx, &facts).await?;
    }
}

/// Fills the facts of leaves that an operator's SQL has put there, so that the checks see them.
async fn find_forgotten_facts(pki: &crate::pki::Pki) -> Result<(), UpdateError> {
    /// Leaves that are read and judged under one lock.
    const FORGOTTEN_LEAVES: i64 = 256;
    {
        let mut tx = pki.store.read().await?;
        // What stands where a stored state is wrong is for the rollback to set back, not for the checks to judge.
        if rows::facts_forgotten(&mut tx, 1).await?.is_empty()
            || !rows::unverified_runs(&mut tx).await?.is_empty()
        {
            return Ok(());
        }
    }
    let candidates = authority_certificates(&pki.authority(), None);
    loop {
        let mut tx = pki.store.write().await?;
        let page = rows::facts_forgotten(&mut tx, FORGOTTEN_LEAVES).await?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        let mut facts = Vec::new();
        for (agent_id, pem) in &page {
            // An operator's SQL may have put anything there: it stays unknown.
            if let Some(Ok(leaf)) = pem.as_deref().map(Certificate::from_pem) {
                facts.push(CertificateFacts::of(&leaf, &candidates).row(agent_id));
            }
        }
        pki_rows::set_certificate_facts(&mut tx, &facts).await?;
        rows::facts_looked_at(&mut tx, last).await?;
        tx.commit_unaudited().await?;
    }
}

/// Every CA that may have signed a leaf, the likeliest first.
fn authority_certificates(
    authority: &crate::pki::Authority,
    restored_root: Option<&Certificate>,
) -> Vec<Certificate> {
    let mut candidates: Vec<Certificate> = authority.mastio_ca.iter().cloned().collect();
    candidates.extend(restored_root.cloned());
    candidates.push(authority.org_ca.clone());
    candidates.extend(authority.retiring.iter().map(|anchor| anchor.certificate.clone()));
    candidates
}

/// Fills what older facts do not say. At boot, before the checks ask; once a database does it find anything.
pub(super) async fn complete_facts(pki: &crate::pki::Pki) -> Result<(), UpdateError> {
    find_forgotten_facts(pki).await?;
    let mut after = String::new();
    loop {
        let page = rows::without_profile_gaps(&mut pki.store.read().await?, &after, BATCH_LEAVES).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after.clone_from(&last.agent_id);
        let mut facts = Vec::with_capacity(page.len());
        for cell in &page {
            // An operator's SQL may have put anything there: it stays unknown.
            let Ok(leaf) = Certificate::from_pem(&cell.text) else { continue };
            let mut known = CertificateFacts::issued_by(&leaf, None);
            known.issuer_key_id.clone_from(&cell.issuer_key_id);
            facts.push(known.row(&cell.agent_id));
        }
        let mut tx = pki.store.write().await?;
        pki_rows::set_certificate_facts(&mut tx, &facts).await?;
        tx.commit_unaudited().await?;
    }
}

fn fleet_row(cell: &FleetCell, column: FleetColumn) -> Result<FleetRow, UpdateError> {
    Ok(FleetRow {
        agent_id: cell.agent_id.clone(),
        leaf: match column {
            FleetColumn::CertPem => Some(Certificate::from_pem(&cell.text)?),
            FleetColumn::EnrollmentMethod => None,
        },
        text: cell.text.clone(),
        issuer_key_id: cell.issuer_key_id.clone(),
    })
}

fn staged_cell(row: &FleetRow, after: FleetAfter, issuer: Option<&Certificate>) -> StagedCell {
    let facts = row.leaf.as_ref().zip(after.leaf.as_ref()).map(|(before, leaf)| {
        let mut old = CertificateFacts::issued_by(before, None);
        old.issuer_key_id.clone_from(&row.issuer_key_id);
        let mut new = CertificateFacts::issued_by(leaf, issuer);
        if issuer.is_none() {
            new.issuer_key_id = leaf.authority_key_id().map(hex).unwrap_or_default();
        }
        StagedFacts { new, old }
    });
    StagedCell { agent_id: row.agent_id.clone(), text: after.text, facts }
}

/// Has the migration say what changes, off the executor's threads.
pub(super) async fn prepare(
    updates: &Updates,
    migration: &'static dyn Migration,
    view: Arc<View>,
) -> Result<ChangeSet, UpdateError> {
    let (entropy, now) = (Arc::clone(&updates.pki.entropy), updates.pki.clock.now().seconds());
    // A panic in a migration ends its task; the run fails with a clear state instead of taking the server down.
    tokio::task::spawn_blocking(move || {
        let permit = ExemptPermit::for_run();
        migration.prepare(&view, &Tools { permit: &permit, entropy: &entropy, now })
    })
    .await
    .map_err(|_| UpdateError::Stopped)?
}

/// What cells that arose or changed since an apply become under what its rollback restores.
pub(super) fn carry_cells(
    page: &[FleetCell],
    carried: &Carried,
    entropy: &Entropy,
) -> Result<Vec<StagedCell>, UpdateError> {
    let permit = ExemptPermit::for_run();
    let mut staged = Vec::new();
    for cell in page {
        let row = fleet_row(cell, carried.column)?;
        if let Some(after) = carried.carry_back.carry_back(&row, &permit, entropy)? {
            staged.push(staged_cell(&row, after, None));
        }
    }
    Ok(staged)
}

/// Changes and verifies leaves on all cores, off the executor's threads.
pub(super) async fn change_leaves(
    page: Vec<FleetCell>,
    fleet: Fleet,
    result: Option<Expected>,
    entropy: Arc<Entropy>,
    now: UnixTime,
) -> Result<Vec<StagedCell>, UpdateError> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let (leaves, share) = (page.len(), page.len().div_ceil(cores));
    let result = result.map(Arc::new);
    let (mut rest, mut workers) = (page.into_iter(), Vec::with_capacity(cores));
    while rest.len() > 0 {
        let cells: Vec<FleetCell> = rest.by_ref().take(share).collect();
        let (fleet, result, entropy) = (fleet.clone(), result.clone(), Arc::clone(&entropy));
        workers.push(tokio::task::spawn_blocking(move || {
            change_cells(&cells, &fleet, result.as_deref(), &entropy, now)
        }));
    }
    let mut staged = Vec::with_capacity(leaves);
    for worker in workers {
        // A panic in a migration ends its task; the run fails with a clear state.
        staged.extend(worker.await.map_err(|_| UpdateError::Stopped)??);
    }
    Ok(staged)
}

fn change_cells(
    cells: &[FleetCell],
    fleet: &Fleet,
    result: Option<&Expected>,
    entropy: &Entropy,
    now: UnixTime,
) -> Result<Vec<StagedCell>, UpdateError> {
    let permit = ExemptPermit::for_run();
    let mut staged = Vec::with_capacity(cells.len());
    for cell in cells {
        let row = fleet_row(cell, fleet.column)?;
        let Some(after) = fleet.change.change(&row, &permit, entropy)? else { continue };
        let after = substituted(&row.agent_id, after)?;
        verify::row(&row, &after, result, now)?;
        staged.push(staged_cell(&row, after, result.map(|result| &result.mastio_ca)));
    }
    Ok(staged)
}
