//! The engine: runs a migration's change set, or its inverse, through the phases
//! `detect → snapshot → prepare → verify → commit → activate`.
//!
//! Before *commit* nothing has changed, whatever happens. *Commit* is one transaction: images after, what they
//! supersede, the row's status, the epoch, the audit event. After it only *activate* is left, which any later boot can
//! do. A run is a task of its own; callers watch it.

use std::num::NonZero;
use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use mastio_core::x509::path;
use serde_json::json;

use super::crash::crash_point;
use super::error::UpdateError;
use super::halt::ExemptPermit;
use super::migration::{
    After, CarryBack, Cell, ChangeSet, Criticality, Expected, FleetAfter, FleetChange, FleetRow, Migration,
    Need, RestoredAuthority, Tools,
};
use super::store::{self as rows, FleetCell, StagedLeaf};
use super::verify;
use super::view::View;
use super::{Direction, Phase, Progress, Updates};
use crate::entropy::Entropy;
use crate::pki::store::{self as pki_rows, CertificateFacts, config_key, hex};
use crate::store::WriteTx;
use crate::values;

/// Leaves that are read, signed, verified and staged together; bounds memory whatever the fleet's size.
const BATCH_LEAVES: i64 = 1024;
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

/// What a plan found: the change set, computed for real, verified and dropped.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Plan {
    /// The migration.
    pub migration_id: String,
    /// What the check said, where it said more than the description.
    pub note: Option<String>,
    /// Single cells that change.
    pub cells: Vec<String>,
    /// Leaves that change.
    pub leaves: i64,
    /// Agents that are deliberately left alone, by enrollment type.
    pub not_covered: serde_json::Value,
    /// The Org CA before and after.
    pub org_ca: [CertificateSummary; 2],
    /// A few leaves before and after.
    pub samples: Vec<[CertificateSummary; 2]>,
}

/// The fields of a certificate that an operator compares.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CertificateSummary {
    /// Subject.
    pub subject: String,
    /// Issuer.
    pub issuer: String,
    /// SHA-256 of the public key, lowercase hex.
    pub spki_sha256: String,
    /// End of validity.
    pub not_after: String,
    /// `pathLen`, where it is a CA.
    pub path_len: Option<u32>,
}

impl CertificateSummary {
    /// The summary of `certificate`.
    #[must_use]
    pub fn of(certificate: &Certificate) -> Self {
        Self {
            subject: certificate.subject_display(),
            issuer: certificate.issuer_display(),
            spki_sha256: certificate.spki_sha256(),
            not_after: certificate.not_after().to_rfc3339(),
            path_len: certificate.basic_constraints().and_then(|constraints| constraints.path_len),
        }
    }
}

/// One run of one migration in one direction.
pub(super) struct Run<'a> {
    pub updates: &'a Updates,
    pub migration: &'static dyn Migration,
    pub run_id: String,
    pub actor: String,
    pub direction: Direction,
}

impl Run<'_> {
    fn id(&self) -> &'static str {
        self.migration.declaration().migration_id
    }

    fn now(&self) -> UnixTime {
        self.updates.pki.clock.now().seconds()
    }

    async fn enter(&self, phase: Phase, done: i64, total: i64) -> Result<(), UpdateError> {
        self.updates.show(Progress {
            run_id: self.run_id.clone(),
            migration_id: self.id().to_owned(),
            direction: self.direction,
            phase,
            done,
            total,
        });
        let mut tx = self.updates.pki.store.write().await?;
        rows::progress(&mut tx, &self.run_id, phase.as_str(), done, total, self.now()).await?;
        Ok(tx.commit_unaudited().await?)
    }

    async fn view(&self) -> Result<View, UpdateError> {
        view(self.updates, self.id()).await
    }

    /// Runs an apply to its end. `Ok(None)`: the check says that nothing is needed any more.
    pub async fn apply(&self) -> Result<Option<Outcome>, UpdateError> {
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

        self.enter(Phase::Prepare, 0, total).await?;
        let view = Arc::new(view);
        let change_set = self.change_set(Arc::clone(&view)).await?;
        let ChangeSet { cells, fleet, result } = change_set;
        verify::authority(&result, self.now())?;
        tracing::info!(migration_id = self.id(), "update_keys_ready");
        let fleet: Option<Arc<dyn FleetChange>> = fleet.map(Arc::from);
        self.stage_cells(&cells).await?;
        if let Some(fleet) = &fleet {
            self.stage_fleet(fleet, &result, total).await?;
        }
        crash_point("apply.prepare");

        self.enter(Phase::Verify, 0, total).await?;
        self.verify_staged().await?;
        crash_point("apply.verify");

        self.enter(Phase::Commit, 0, total).await?;
        let mut outcome = None;
        for _round in 0..CATCH_UP_ROUNDS_MAX {
            match self.commit_apply(&view, &cells, &result).await? {
                Commit::Done(done) => {
                    outcome = Some(done);
                    break;
                }
                Commit::Moved(agent_ids) => self.follow(&agent_ids, fleet.as_ref(), &result).await?,
            }
        }
        let outcome = outcome.ok_or(UpdateError::CannotCatchUp)?;
        crash_point("apply.commit");
        self.activate().await?;
        Ok(Some(outcome))
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
        total += i64::try_from(images.len()).unwrap_or(i64::MAX);
        if scope.fleet {
            total += self.snapshot_fleet().await?;
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

    /// An earlier attempt that never committed has nothing to give back: its images go with its descriptor.
    async fn drop_superseded_attempt(&self, tx: &mut WriteTx) -> Result<(), UpdateError> {
        let Some(earlier) = rows::snapshot(tx, self.id()).await? else { return Ok(()) };
        let run = rows::run_by_id(tx, &earlier.run_id).await?;
        if run.is_some_and(|run| !run.committed && run.actor != super::PREDECESSOR) {
            rows::drop_images(tx, &earlier.run_id).await?;
        }
        Ok(())
    }

    async fn snapshot_fleet(&self) -> Result<i64, UpdateError> {
        let store = &self.updates.pki.store;
        let (mut after, mut total) = (String::new(), 0);
        loop {
            let page = rows::fleet_page(&mut store.read().await?, &after, BATCH_LEAVES).await?;
            let Some(last) = page.last() else { return Ok(total) };
            after.clone_from(&last.agent_id);
            let images: Vec<_> = page
                .iter()
                .map(|cell| rows::fleet_image(&self.run_id, &cell.agent_id, &cell.cert_pem, None))
                .collect();
            let mut tx = store.write().await?;
            rows::insert_images(&mut tx, &images).await?;
            tx.commit_unaudited().await?;
            total += i64::try_from(images.len()).unwrap_or(i64::MAX);
        }
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

    async fn change_set(&self, view: Arc<View>) -> Result<ChangeSet, UpdateError> {
        let migration = self.migration;
        let entropy = Arc::clone(&self.updates.pki.entropy);
        let now = self.now();
        // A panic in a migration ends its task; the run fails with a clear state instead of taking the server down.
        tokio::task::spawn_blocking(move || {
            let permit = ExemptPermit::for_run();
            migration.prepare(&view, &Tools { permit: &permit, entropy: &entropy, now })
        })
        .await
        .map_err(|_| UpdateError::Stopped)?
    }

    async fn stage_cells(&self, cells: &[(Cell, After)]) -> Result<(), UpdateError> {
        let sealing = self.updates.pki.sealing();
        let mut tx = self.updates.pki.store.write().await?;
        for (cell, after) in cells {
            let after = match after {
                After::Text(text) => text.clone(),
                After::Key(key) => key.seal(sealing, &rows::image_place(&self.run_id, cell, "after"))?,
            };
            rows::set_cell_after(&mut tx, &self.run_id, cell, Some(after)).await?;
        }
        Ok(tx.commit_unaudited().await?)
    }

    async fn stage_fleet(
        &self,
        fleet: &Arc<dyn FleetChange>,
        result: &Expected,
        total: i64,
    ) -> Result<(), UpdateError> {
        let (mut after, mut done) = (String::new(), 0);
        loop {
            let store = &self.updates.pki.store;
            let page = rows::image_page(&mut store.read().await?, &self.run_id, &after, BATCH_LEAVES).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after.clone_from(&last.agent_id);
            done += i64::try_from(page.len()).unwrap_or(i64::MAX);
            self.stage_leaves(page, fleet, result).await?;
            self.enter(Phase::Prepare, done, total).await?;
        }
    }

    async fn stage_leaves(
        &self,
        page: Vec<FleetCell>,
        fleet: &Arc<dyn FleetChange>,
        result: &Expected,
    ) -> Result<(), UpdateError> {
        let staged = change_leaves(
            page,
            Arc::clone(fleet),
            result.clone(),
            Arc::clone(&self.updates.pki.entropy),
            self.now(),
        )
        .await?;
        let mut tx = self.updates.pki.store.write().await?;
        rows::stage(&mut tx, &self.run_id, &staged).await?;
        Ok(tx.commit_unaudited().await?)
    }

    async fn verify_staged(&self) -> Result<(), UpdateError> {
        let mut tx = self.updates.pki.store.read().await?;
        if let Some(serial) = rows::duplicate_serial(&mut tx, &self.run_id).await? {
            return Err(UpdateError::Verification {
                what: format!("serial {serial}, which two leaves share"),
                cause: None,
            });
        }
        Ok(())
    }

    /// Sees agents anew that entered, left or changed, and prepares them again, outside the lock.
    async fn follow(
        &self,
        agent_ids: &[String],
        fleet: Option<&Arc<dyn FleetChange>>,
        result: &Expected,
    ) -> Result<(), UpdateError> {
        let store = &self.updates.pki.store;
        let mut tx = store.write().await?;
        rows::forget_images(&mut tx, &self.run_id, agent_ids).await?;
        let mut present = Vec::new();
        for agent_id in agent_ids {
            present.extend(rows::fleet_cell(&mut tx, agent_id).await?);
        }
        let images: Vec<_> = present
            .iter()
            .map(|cell| rows::fleet_image(&self.run_id, &cell.agent_id, &cell.cert_pem, None))
            .collect();
        rows::insert_images(&mut tx, &images).await?;
        tx.commit_unaudited().await?;
        if let Some(fleet) = fleet {
            for page in present.chunks(usize::try_from(BATCH_LEAVES).unwrap_or(1)) {
                self.stage_leaves(page.to_vec(), fleet, result).await?;
            }
        }
        self.verify_staged().await
    }

    /// The one commit of an apply.
    async fn commit_apply(
        &self,
        view: &View,
        cells: &[(Cell, After)],
        result: &Expected,
    ) -> Result<Commit, UpdateError> {
        let pki = &self.updates.pki;
        let declaration = self.migration.declaration();
        let mut tx = pki.store.write().await?;
        let now = self.now();
        if self.migration.scope().fleet {
            let moved = rows::moved(&mut tx, &self.run_id, MOVED_LEAVES_MAX).await?;
            if !moved.is_empty() {
                return Ok(Commit::Moved(moved));
            }
        }
        self.refuse_if_cells_moved(&mut tx).await?;
        // The replaced root goes on as a retiring anchor; its key signs our TLS leaf until the overlap ends.
        if let Some(replaced) = &result.replaced_org_ca {
            let stored = pki_rows::config(&mut tx, config_key::ORG_CA_KEY).await?;
            let from = pki_rows::config_place(config_key::ORG_CA_KEY);
            let to = pki_rows::anchor_place(&replaced.fingerprint());
            let key = match stored {
                Some(sealed) => Some(pki.sealing().move_sealed(&from, &to, &sealed)?),
                None => None,
            };
            pki_rows::add_retiring_anchor(&mut tx, replaced, key, &self.run_id, now).await?;
        }
        for (cell, _) in cells {
            self.write_cell(&mut tx, cell).await?;
        }
        let leaves = rows::write_fleet(&mut tx, &self.run_id, now).await?;
        rows::set_applied(&mut tx, declaration, now).await?;
        rows::set_committed(&mut tx, &self.run_id, declaration.criticality == Criticality::Critical, now)
            .await?;
        let leaves = i64::try_from(leaves).unwrap_or(i64::MAX);
        tx.bump_epoch().await?;
        crash_point("apply.commit.before");
        tx.commit(&[self.event(
            EventType::UpdateApplied,
            json!({
                "leaves": leaves,
                "org_ca_before": view.authority.org_ca.fingerprint(),
                "org_ca_after": result.org_ca.fingerprint(),
                "mastio_ca_after": result.mastio_ca.fingerprint(),
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
    async fn still_as_written(
        &self,
        tx: &mut WriteTx,
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

    async fn write_cell(&self, tx: &mut WriteTx, cell: &Cell) -> Result<(), UpdateError> {
        let sealing = self.updates.pki.sealing();
        let Some(after) = rows::image(tx, &self.run_id, cell).await?.and_then(|image| image.after) else {
            return Ok(());
        };
        let value = if cell.sealed {
            let from = rows::image_place(&self.run_id, cell, "after");
            sealing.move_sealed(&from, &cell.place(), &after)?
        } else {
            after
        };
        Ok(pki_rows::set_config(tx, cell.row_key, &value).await?)
    }

    /// Takes up the new state in memory, reads the *stored* state again and judges it; then the halt lifts.
    pub async fn activate(&self) -> Result<(), UpdateError> {
        self.enter(Phase::Activate, 0, 0).await?;
        let pki = &self.updates.pki;
        let authority = pki.refresh().await?;
        crash_point(match self.direction {
            Direction::Apply => "apply.activate",
            Direction::Rollback => "rollback.activate",
        });
        if let (Direction::Apply, Some(mastio_ca)) = (self.direction, &authority.mastio_ca) {
            path::verify_ca_chain(mastio_ca, &authority.org_ca, self.now())
                .map_err(|_| UpdateError::StoredState("the intermediate under the Org CA".to_owned()))?;
        }
        if self.direction == Direction::Apply {
            let wrong = rows::leaves_not_as_written(&mut pki.store.read().await?, &self.run_id).await?;
            if wrong > 0 {
                return Err(UpdateError::StoredState(format!("{wrong} leaves")));
            }
        }
        let mut tx = pki.store.write().await?;
        rows::finish_run(&mut tx, &self.run_id, true, None, self.now()).await?;
        tx.bump_epoch().await?;
        tx.commit(&[self.event(EventType::UpdateVerified, json!({ "direction": self.direction.as_str() }))])
            .await?;
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
        self.enter(Phase::Detect, 0, 0).await?;
        let store = &self.updates.pki.store;
        let mut tx = store.read().await?;
        let snapshot = rows::snapshot(&mut tx, self.id()).await?.ok_or(UpdateError::NoSnapshot)?;
        let apply = rows::run_by_id(&mut tx, &snapshot.run_id).await?;
        if let Some(blocker) = rows::blocker(&mut tx, self.id(), &snapshot.run_id).await? {
            return Err(UpdateError::Blocked { blocker });
        }
        if let Some(row) = rows::damaged_image(&mut tx, &snapshot.run_id).await? {
            return Err(UpdateError::SnapshotDamaged { migration_id: self.id().to_owned(), row });
        }
        drop(tx);
        crash_point("rollback.detect");
        let committed = apply.as_ref().is_some_and(|apply| apply.committed);
        let torn = apply.as_ref().is_some_and(|apply| !apply.committed && apply.actor == super::PREDECESSOR);
        if !committed && !torn {
            return self.drop_uncommitted(&snapshot.run_id).await;
        }
        if torn {
            self.take_torn_as_committed(&snapshot.run_id).await?;
        }
        let restored = self.restored_authority(&snapshot.run_id).await?;
        let carry_back: Arc<dyn CarryBack> = Arc::from(self.migration.carry_back(restored));
        self.enter(Phase::Prepare, 0, 0).await?;
        let mut after = String::new();
        loop {
            let page =
                rows::changed_since_page(&mut store.read().await?, &snapshot.run_id, &after, BATCH_LEAVES)
                    .await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.agent_id);
            self.stage_carried(page, &carry_back).await?;
        }
        crash_point("rollback.prepare");
        self.enter(Phase::Commit, 0, 0).await?;
        let mut outcome = None;
        for _round in 0..CATCH_UP_ROUNDS_MAX {
            match self.commit_rollback(&snapshot.run_id).await? {
                Commit::Done(done) => {
                    outcome = Some(done);
                    break;
                }
                Commit::Moved(agent_ids) => {
                    let mut present = Vec::new();
                    for agent_id in &agent_ids {
                        present.extend(rows::fleet_cell(&mut store.read().await?, agent_id).await?);
                    }
                    self.stage_carried(present, &carry_back).await?;
                }
            }
        }
        let outcome = outcome.ok_or(UpdateError::CannotCatchUp)?;
        crash_point("rollback.commit");
        self.activate().await?;
        Ok(outcome)
    }

    /// An apply that never committed is undone by forgetting it.
    async fn drop_uncommitted(&self, apply_run: &str) -> Result<Outcome, UpdateError> {
        let mut tx = self.updates.pki.store.write().await?;
        let now = self.now();
        rows::drop_images(&mut tx, apply_run).await?;
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

    async fn restored_authority(&self, apply_run: &str) -> Result<RestoredAuthority, UpdateError> {
        let pki = &self.updates.pki;
        let authority = pki.authority();
        let mut tx = pki.store.read().await?;
        let damaged = |what: &str| UpdateError::SnapshotDamaged {
            migration_id: self.id().to_owned(),
            row: format!("proxy_config/{what}"),
        };
        let cert = Cell::config(config_key::ORG_CA_CERT);
        let key = Cell::config_key(config_key::ORG_CA_KEY);
        let org_ca = match rows::image(&mut tx, apply_run, &cert).await?.filter(|image| image.changes) {
            Some(image) => Certificate::from_pem(image.restored().ok_or_else(|| damaged(cert.row_key))?)?,
            None => authority.org_ca.clone(),
        };
        let org_ca_key = match rows::image(&mut tx, apply_run, &key).await?.filter(|image| image.changes) {
            Some(image) => {
                let side = if image.restore.is_some() { "restore" } else { "before" };
                let sealed = image.restored().ok_or_else(|| damaged(key.row_key))?;
                Arc::new(pki.sealing().open_key(&rows::image_place(apply_run, &key, side), sealed)?)
            }
            None => authority.org_ca_key.clone().ok_or(UpdateError::KeyMissing("Org CA"))?,
        };
        if !org_ca.public_key_matches_spki(org_ca_key.spki_der()) {
            return Err(damaged(key.row_key));
        }
        let cert = Cell::config(config_key::MASTIO_CA_CERT);
        let key = Cell::config_key(config_key::MASTIO_CA_KEY);
        let mastio_ca = match rows::image(&mut tx, apply_run, &cert).await?.filter(|image| image.changes) {
            Some(image) => image.restored().map(|pem| Certificate::from_pem(pem)).transpose()?,
            None => authority.mastio_ca.clone(),
        };
        let made_by_apply = rows::image(&mut tx, apply_run, &key).await?.is_some_and(|image| image.changes);
        let mastio_ca_key = if made_by_apply { None } else { authority.mastio_ca_key.clone() };
        Ok(RestoredAuthority { org_ca, org_ca_key, mastio_ca, mastio_ca_key })
    }

    async fn stage_carried(
        &self,
        page: Vec<FleetCell>,
        carry_back: &Arc<dyn CarryBack>,
    ) -> Result<(), UpdateError> {
        let mut tx = self.updates.pki.store.write().await?;
        let images: Vec<_> = page
            .iter()
            .map(|cell| rows::fleet_image(&self.run_id, &cell.agent_id, &cell.cert_pem, None))
            .collect();
        rows::insert_images(&mut tx, &images).await?;
        let permit = ExemptPermit::for_run();
        let entropy = &self.updates.pki.entropy;
        let mut staged = Vec::new();
        for cell in page {
            let row = fleet_row(&cell)?;
            if let Some(after) = carry_back.carry_back(&row, &permit, entropy)? {
                staged.push(staged_leaf(&row, after, None));
            }
        }
        rows::stage(&mut tx, &self.run_id, &staged).await?;
        Ok(tx.commit_unaudited().await?)
    }

    /// The one commit of a rollback.
    async fn commit_rollback(&self, apply_run: &str) -> Result<Commit, UpdateError> {
        let pki = &self.updates.pki;
        let mut tx = pki.store.write().await?;
        let now = self.now();
        let moved = rows::carry_back_moved(&mut tx, apply_run, &self.run_id, MOVED_LEAVES_MAX).await?;
        if !moved.is_empty() {
            return Ok(Commit::Moved(moved));
        }
        let before = pki.authority().org_ca.clone();
        let restored_leaves = rows::restore_fleet(&mut tx, apply_run, &self.run_id, now).await?;
        let carried = rows::write_fleet(&mut tx, &self.run_id, now).await?;
        let mut restored_root = None;
        for cell in self.migration.scope().cells {
            let Some(image) = rows::image(&mut tx, apply_run, cell).await?.filter(|image| image.changes)
            else {
                continue;
            };
            if !self.still_as_written(&mut tx, apply_run, cell, &image).await? {
                // Somebody has changed it since (I3): half a CA must not come back, so none of it does.
                return Err(UpdateError::Blocked { blocker: format!("a later change of {}", cell.place()) });
            }
            match (cell.sealed, image.restored()) {
                (_, None) => {
                    tx.execute("DELETE FROM proxy_config WHERE key = $1", values![cell.row_key]).await?;
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
        if let Some(restored) = &restored_root {
            // The replaced root stays trusted, without its key: who pinned it or holds a leaf under it goes on.
            pki_rows::add_retiring_anchor(&mut tx, &before, None, &self.run_id, now).await?;
            tx.execute(
                "UPDATE pki_anchors SET state = 'retired', key_sealed = NULL WHERE fingerprint = $1",
                values![restored.fingerprint()],
            )
            .await?;
        }
        refill_facts(&mut tx, restored_root.as_ref(), pki).await?;
        rows::drop_snapshot(&mut tx, self.id()).await?;
        rows::drop_images(&mut tx, apply_run).await?;
        rows::drop_images(&mut tx, &self.run_id).await?;
        rows::set_rolled_back(&mut tx, self.id(), now).await?;
        rows::set_committed(&mut tx, &self.run_id, false, now).await?;
        tx.bump_epoch().await?;
        crash_point("rollback.commit.before");
        let leaves = i64::try_from(restored_leaves).unwrap_or(i64::MAX);
        tx.commit(&[self.event(
            EventType::UpdateRolledBack,
            json!({
                "restored_leaves": leaves,
                "carried_back_leaves": carried,
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
        }
        Event { event_type, actor: self.actor.clone(), details }
    }
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
    let mut candidates: Vec<Certificate> = authority.mastio_ca.iter().cloned().collect();
    candidates.extend(restored_root.cloned());
    candidates.push(authority.org_ca.clone());
    candidates.extend(authority.retiring.iter().map(|anchor| anchor.certificate.clone()));
    let mut after = String::new();
    loop {
        let page = rows::without_facts(tx, &after, BATCH_LEAVES).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after.clone_from(&last.agent_id);
        let mut facts = Vec::new();
        for cell in &page {
            // An operator's SQL may have put anything there: it stays unknown.
            if let Ok(leaf) = Certificate::from_pem(&cell.cert_pem) {
                facts.push(CertificateFacts::of(&leaf, &candidates).row(&cell.agent_id));
            }
        }
        pki_rows::set_certificate_facts(tx, &facts).await?;
    }
}

fn fleet_row(cell: &FleetCell) -> Result<FleetRow, UpdateError> {
    Ok(FleetRow {
        agent_id: cell.agent_id.clone(),
        leaf: Certificate::from_pem(&cell.cert_pem)?,
        issuer_key_id: cell.issuer_key_id.clone(),
    })
}

fn staged_leaf(row: &FleetRow, after: FleetAfter, issuer: Option<&Certificate>) -> StagedLeaf {
    let mut old = CertificateFacts::issued_by(&row.leaf, None);
    old.issuer_key_id.clone_from(&row.issuer_key_id);
    let mut facts = CertificateFacts::issued_by(&after.leaf, issuer);
    if issuer.is_none() {
        facts.issuer_key_id = after.leaf.authority_key_id().map(hex).unwrap_or_default();
    }
    StagedLeaf { agent_id: row.agent_id.clone(), cert_pem: after.cert_pem, facts, old }
}

/// Changes and verifies leaves on all cores, off the executor's threads.
async fn change_leaves(
    page: Vec<FleetCell>,
    fleet: Arc<dyn FleetChange>,
    result: Expected,
    entropy: Arc<Entropy>,
    now: UnixTime,
) -> Result<Vec<StagedLeaf>, UpdateError> {
    tokio::task::spawn_blocking(move || {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let size = page.len().div_ceil(cores).max(1);
        let one = |cells: &[FleetCell]| -> Result<Vec<StagedLeaf>, UpdateError> {
            let permit = ExemptPermit::for_run();
            let mut staged = Vec::with_capacity(cells.len());
            for cell in cells {
                let row = fleet_row(cell)?;
                let Some(after) = fleet.change(&row, &permit, &entropy)? else { continue };
                verify::leaf(&row, &after, &result, now)?;
                staged.push(staged_leaf(&row, after, Some(&result.mastio_ca)));
            }
            Ok(staged)
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = page.chunks(size).map(|cells| scope.spawn(|| one(cells))).collect();
            let mut staged = Vec::with_capacity(page.len());
            for worker in workers {
                staged.extend(worker.join().map_err(|_| UpdateError::Stopped)??);
            }
            Ok(staged)
        })
    })
    .await
    .map_err(|_| UpdateError::Stopped)?
}

/// Computes a migration's change set with keys that are thrown away, verifies it, and drops it.
pub(super) async fn plan(updates: &Updates, migration: &'static dyn Migration) -> Result<Plan, UpdateError> {
    let declaration = migration.declaration();
    let view = Arc::new(view(updates, declaration.migration_id).await?);
    let note = match migration.check(&view) {
        Need::Needed { note } => note,
        Need::NotNeeded => return Err(UpdateError::NotNeeded),
        Need::Impossible(refusal) | Need::Refused(refusal) => return Err(UpdateError::Refused(refusal)),
    };
    let pki = &updates.pki;
    let now = pki.clock.now().seconds();
    let (for_task, entropy) = (Arc::clone(&view), Arc::clone(&pki.entropy));
    let change_set = tokio::task::spawn_blocking(move || {
        let permit = ExemptPermit::for_run();
        migration.prepare(&for_task, &Tools { permit: &permit, entropy: &entropy, now })
    })
    .await
    .map_err(|_| UpdateError::Stopped)??;
    verify::authority(&change_set.result, now)?;
    let mut leaves = 0;
    let mut samples = Vec::new();
    if let Some(fleet) = change_set.fleet {
        let fleet: Arc<dyn FleetChange> = Arc::from(fleet);
        let mut after = String::new();
        loop {
            let page = rows::fleet_page(&mut pki.store.read().await?, &after, BATCH_LEAVES).await?;
            let Some(last) = page.last() else { break };
            after.clone_from(&last.agent_id);
            let before: Vec<_> = page.iter().take(3).cloned().collect();
            let staged = change_leaves(
                page,
                Arc::clone(&fleet),
                change_set.result.clone(),
                Arc::clone(&pki.entropy),
                now,
            )
            .await?;
            leaves += i64::try_from(staged.len()).unwrap_or(i64::MAX);
            for cell in before.iter().take(3_usize.saturating_sub(samples.len())) {
                if let Some(after) = staged.iter().find(|leaf| leaf.agent_id == cell.agent_id) {
                    samples.push([
                        CertificateSummary::of(&Certificate::from_pem(&cell.cert_pem)?),
                        CertificateSummary::of(&Certificate::from_pem(&after.cert_pem)?),
                    ]);
                }
            }
        }
    }
    let mut tx = pki.store.read().await?;
    let not_covered = super::view::not_covered(&mut tx, declaration.affects_enrollments).await?;
    Ok(Plan {
        migration_id: declaration.migration_id.to_owned(),
        note,
        cells: change_set.cells.iter().map(|(cell, _)| cell.place()).collect(),
        leaves,
        not_covered: super::not_covered_json(&not_covered),
        org_ca: [
            CertificateSummary::of(&view.authority.org_ca),
            CertificateSummary::of(&change_set.result.org_ca),
        ],
        samples,
    })
}
