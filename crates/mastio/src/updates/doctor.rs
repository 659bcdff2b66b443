//! The doctor: explains every state of updates, runs, snapshots and the halt that it finds, and the next step of each.
//!
//! It reads and changes nothing, so it can be asked of a running server and of a stopped deploy as a crash left it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mastio_core::time::UnixTime;
use serde_json::{Value, json};

use super::halt::{self, HaltReason};
use super::migration::Need;
use super::snapshots::{self, Snapshot};
use super::store::{self, RunRow, UpdateRow};
use super::{RUN_SILENCE_MAX, UpdateError, Updates, engine, order, registry};
use crate::http::error::chain;
use crate::store::Query;

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What kind of thing: stable, snake case.
    pub finding: &'static str,
    /// About what: a migration id, a run, a key.
    pub subject: String,
    /// Whether it stays as it is until an operator acts.
    pub needs_operator: bool,
    /// What it is.
    pub what: String,
    /// What to do next.
    pub next: String,
}

impl Finding {
    fn act(finding: &'static str, subject: &str, what: impl Into<String>, next: impl Into<String>) -> Self {
        let (subject, what, next) = (subject.to_owned(), what.into(), next.into());
        Self { finding, subject, needs_operator: true, what, next }
    }

    fn note(finding: &'static str, subject: &str, what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { needs_operator: false, ..Self::act(finding, subject, what, next) }
    }
}

/// What to do about a failed row.
#[must_use]
pub fn remedy(migration_id: &str) -> String {
    format!(
        "nothing was changed: remove the cause that the error names, then apply again (mastio updates apply \
         {migration_id}); mastio updates rollback {migration_id} leaves the state as it is"
    )
}

/// As the API and the command line show findings.
#[must_use]
pub fn report(findings: &[Finding]) -> Value {
    json!({ "healthy": !findings.iter().any(|finding| finding.needs_operator), "findings": findings })
}

/// What is known of an open run beyond its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Its process works at it.
    UnderWay,
    /// Its process is gone.
    Dead,
    /// Its process lives and has ended it, with this error where it is known; the database has not taken that down.
    Ended(Option<String>),
}

/// Tells what is known of an open run.
pub type Knows<'a> = &'a (dyn Fn(&RunRow) -> Known + Sync);

/// A run that another process gave a sign of life of lately.
#[must_use]
pub fn gave_a_sign(run: &RunRow, now: UnixTime) -> bool {
    // The other's clock may run ahead of ours; one that is far ahead tells nothing.
    u64::try_from((now.0 - run.updated_at).abs()).is_ok_and(|age| age <= RUN_SILENCE_MAX.as_secs())
}

/// Looks at everything that the database tells.
pub async fn examine(tx: &mut impl Query, knows: Knows<'_>) -> Result<Vec<Finding>, UpdateError> {
    let rows = store::rows(tx).await?;
    let reasons = halt::read(tx).await?.reasons;
    let impossible = store::impossible_checks(tx).await?;
    let snapshots = snapshots::current(tx).await?;
    let mut findings = Vec::new();
    if let Some(open) = store::open_run(tx).await? {
        findings.push(open_run(&open, &knows(&open)));
    }
    for reason in &reasons {
        findings.extend(halting(reason));
    }
    for run in store::unverified_runs(tx).await? {
        findings.push(unverified(&run));
    }
    let halting = order::halting(&reasons);
    for row in &rows {
        findings.extend(waiting(row, &rows, &halting, &impossible));
    }
    for (migration_id, reason) in &impossible {
        findings.push(Finding::act(
            "repair_impossible",
            migration_id,
            format!("the state is wrong, and its repair cannot run here: {reason}"),
            "repair it with the tool that holds the key, then restart the server",
        ));
    }
    for snapshot in &snapshots {
        findings.extend(of_snapshot(snapshot, &rows));
    }
    for row in rows.iter().filter(|row| row.status == "applied") {
        if !snapshots.iter().any(|snapshot| snapshot.migration_id == row.migration_id) {
            findings.push(Finding::note(
                "no_way_back",
                &row.migration_id,
                "it is applied and has no snapshot: closed without a change, or applied by another program",
                "nothing; it cannot be rolled back",
            ));
        }
    }
    Ok(findings)
}

fn open_run(run: &RunRow, known: &Known) -> Finding {
    let id = &run.migration_id;
    let place = format!("{} of {id} in phase {} ({} of {})", run.direction, run.phase, run.done, run.total);
    match known {
        Known::UnderWay => {
            let watch = format!("wait; GET /proxy/updates/{id}/events shows it");
            return Finding::note("run_under_way", &run.run_id, format!("{place} is under way"), watch);
        }
        Known::Ended(error) => {
            let state = if run.committed {
                "it had committed, so the state is wholly new and is still to be verified"
            } else {
                "it had not committed, so the state is wholly old and nothing was changed"
            };
            let error = error.as_deref().map(|error| format!(" ({error})")).unwrap_or_default();
            return Finding::act(
                "run_not_closed",
                &run.run_id,
                format!("{place} has ended{error}, and the database has not taken that down: {state}"),
                "see that the database writes again: the server then closes the run by itself within seconds",
            );
        }
        Known::Dead => {}
    }
    let (state, next) = if run.committed {
        (
            "it had committed, so the state is wholly new and has not been verified yet",
            "start the server, which verifies the stored state and lifts the halt",
        )
    } else {
        (
            "it had not committed, so the state is wholly old and nothing was changed",
            "start the server, which marks the run failed; then apply again, or roll back to forget the attempt",
        )
    };
    Finding::act(
        "run_of_a_dead_process",
        &run.run_id,
        format!("{place} was left by a process that ended: {state}"),
        next,
    )
}

/// A reason of the halt that no other finding explains.
fn halting(reason: &HaltReason) -> Option<Finding> {
    let what = reason.detail();
    match reason {
        // The row, and the run, each have a finding of their own.
        HaltReason::PendingMigration { .. } | HaltReason::UnverifiedRun { .. } => None,
        HaltReason::FailedCheck { migration_id } => Some(check_failed(migration_id, what)),
        HaltReason::StagedRotation { kid } => Some(Finding::act(
            "rotation_staged",
            kid,
            what,
            "decide the rotation of the token key: activate the staged key, or drop it",
        )),
    }
}

fn check_failed(migration_id: &str, what: String) -> Finding {
    Finding::act(
        "check_failed",
        migration_id,
        what,
        "look for cullis_proxy_update_check_failed in the log; restart once its cause is gone, or run the version that \
         corrects the check",
    )
}

fn unverified(run: &store::UnverifiedRun) -> Finding {
    let id = &run.migration_id;
    let error = run.error.as_deref().unwrap_or("no error was recorded");
    Finding::act(
        "committed_not_verified",
        id,
        format!(
            "the {} was committed and its stored state has not passed verification: {error}",
            run.direction
        ),
        format!("signing stays halted; mastio updates rollback {id} goes back to the snapshot"),
    )
}

fn waiting(
    row: &UpdateRow,
    rows: &[UpdateRow],
    halting: &[String],
    impossible: &[(String, String)],
) -> Option<Finding> {
    let id = &row.migration_id;
    if impossible.iter().any(|(impossible, _)| impossible == id) {
        return None;
    }
    let halts = if halting.contains(id) { "; signing is halted until it is applied" } else { "" };
    let next = match order::with_required(id, &order::waiting(rows, halting)).into_iter().next() {
        Some(first) if first != *id => format!("apply what it requires first: mastio updates apply {first}"),
        _ => format!("mastio updates plan {id}, then mastio updates apply {id}"),
    };
    let known = registry::find(id).is_some();
    match row.status.as_str() {
        "pending" | "failed" if !known => Some(Finding::act(
            "unknown_to_this_version",
            id,
            format!("it is {} and this version does not know it{halts}", row.status),
            "run the version that knows it, or set its row to status='rolled_back' to go on without it",
        )),
        "pending" => Some(Finding::act("pending", id, format!("it waits to be applied{halts}"), next)),
        "failed" => {
            let error = row.error.as_deref().unwrap_or("no error was recorded");
            Some(Finding::act("failed", id, format!("its last apply failed: {error}{halts}"), remedy(id)))
        }
        "applied" | "rolled_back" => None,
        other => Some(Finding::act(
            "unknown_status",
            id,
            format!("its row says {other:?}, which no version writes"),
            "set the status to pending, applied, failed or rolled_back, or delete the row",
        )),
    }
}

fn of_snapshot(snapshot: &Snapshot, rows: &[UpdateRow]) -> Option<Finding> {
    let id = &snapshot.migration_id;
    if let Some(at) = &snapshot.damaged_at {
        return Some(Finding::act(
            "snapshot_damaged",
            id,
            format!("its snapshot does not read as it was written, at {at}"),
            "a rollback is refused and changes nothing; restore a backup if you need the way back",
        ));
    }
    if rows.iter().any(|row| row.migration_id == *id) {
        return None;
    }
    Some(Finding::note(
        "snapshot_without_row",
        id,
        "it has a snapshot and no row: the row was deleted by hand",
        format!("nothing; mastio updates rollback {id} still works, and the next boot asks the check again"),
    ))
}

impl Updates {
    /// Explains what the database and the checks tell, of a running server.
    pub async fn doctor(&self) -> Result<Value, UpdateError> {
        let now = self.pki.clock.now().seconds();
        let at_work = self.running.load(Ordering::SeqCst);
        let ours = |run: &RunRow| run.replica == self.replica || self.pki.store.sqlite_path().is_some();
        let knows = |run: &RunRow| match (ours(run), at_work) {
            (true, true) => Known::UnderWay,
            (true, false) => Known::Ended(self.unwritten_end(&run.run_id).map(|error| chain(error.as_ref()))),
            (false, _) if gave_a_sign(run, now) => Known::UnderWay,
            (false, _) => Known::Dead,
        };
        let mut findings = Vec::new();
        if let Some(obstacle) = self.pki.store.obstacle() {
            findings.push(Finding::act(
                "database_refuses_writes",
                obstacle.as_str(),
                "the database refuses to write, so nothing is signed, recorded or changed; what is stored is whole",
                format!("{}; service resumes by itself", obstacle.explained()),
            ));
        }
        findings.extend(examine(&mut self.pki.store.read().await?, &knows).await?);
        for row in store::rows(&mut self.pki.store.read().await?).await? {
            if row.status == "applied" {
                findings.extend(self.disagreement(&row.migration_id).await?);
            }
        }
        // One that is critical halts, and is found in the database.
        let halting =
            |id: &str| findings.iter().any(|found| found.finding == "check_failed" && found.subject == id);
        let failing: Vec<String> =
            self.findings().failing.iter().filter(|id| !halting(id)).cloned().collect();
        findings
            .extend(failing.iter().map(|id| check_failed(id, "its check stopped unexpectedly".to_owned())));
        Ok(report(&findings))
    }

    /// A row that says applied while the check finds the state wrong.
    async fn disagreement(&self, migration_id: &str) -> Result<Option<Finding>, UpdateError> {
        let Some(migration) = registry::find(migration_id) else { return Ok(None) };
        let view = Arc::new(engine::view(self, migration_id).await?);
        let checked = tokio::task::spawn_blocking(move || migration.check(&view)).await;
        Ok(matches!(checked, Ok(Need::Needed { .. } | Need::Refused(_))).then(|| {
            Finding::act(
                "applied_and_still_needed",
                migration_id,
                "its row says applied, and the check finds the state wrong",
                "delete the row and restart: the detector proposes it again",
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(status: &str) -> UpdateRow {
        UpdateRow {
            migration_id: "2026-04-23-org-ca-pathlen-1".to_owned(),
            status: status.to_owned(),
            detected_at: "2026-04-23T19:04:21Z".to_owned(),
            applied_at: None,
            rolled_back_at: None,
            error: (status == "failed").then(|| "disk full".to_owned()),
            criticality: None,
            affects_enrollments: None,
            requires: None,
        }
    }

    fn run(committed: bool) -> RunRow {
        RunRow {
            run_id: "01".to_owned(),
            migration_id: "x".to_owned(),
            direction: "apply".to_owned(),
            phase: "prepare".to_owned(),
            actor: "admin".to_owned(),
            committed,
            verified: false,
            replica: "r".to_owned(),
            updated_at: 1000,
            done: 1,
            total: 2,
            beats: 0,
        }
    }

    #[test]
    fn every_status_has_its_explanation_and_next_step() {
        let found = |status: &str| {
            let row = row(status);
            waiting(&row, std::slice::from_ref(&row), &[], &[]).map(|finding| (finding.finding, finding.next))
        };
        assert_eq!(found("applied"), None);
        assert_eq!(found("rolled_back"), None);
        assert!(
            found("pending").is_some_and(|(kind, next)| kind == "pending" && next.contains("updates plan"))
        );
        assert!(found("failed").is_some_and(|(kind, next)| kind == "failed" && next.contains("apply again")));
        assert!(found("aplied").is_some_and(|(kind, _)| kind == "unknown_status"));
    }

    #[test]
    fn an_open_run_is_waited_for_while_alive_and_explained_when_dead() {
        assert!(!open_run(&run(false), &Known::UnderWay).needs_operator);
        for (committed, state) in [(false, "wholly old"), (true, "wholly new")] {
            let dead = open_run(&run(committed), &Known::Dead);
            assert!(dead.what.contains(state) && dead.next.contains("start the server"), "{dead:?}");
            let ended = open_run(&run(committed), &Known::Ended(Some("disk full".to_owned())));
            assert!(ended.what.contains(state) && ended.what.contains("disk full"), "{ended:?}");
            assert!(ended.next.contains("by itself"), "{ended:?}");
        }
        let silence_s = i64::try_from(RUN_SILENCE_MAX.as_secs()).unwrap_or(0);
        assert!(gave_a_sign(&run(true), UnixTime(1000 + silence_s)));
        assert!(!gave_a_sign(&run(true), UnixTime(1001 + silence_s)));
    }

    #[test]
    fn notes_alone_are_healthy() {
        assert_eq!(report(&[Finding::note("no_way_back", "x", "a", "b")])["healthy"], true);
        assert_eq!(report(&[Finding::act("pending", "x", "a", "b")])["healthy"], false);
    }
}
