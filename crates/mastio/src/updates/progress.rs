//! Watching a run: where it is, how long it will take, and how it ended.
//!
//! The row in `update_runs` is the truth, so that everybody sees the same run, also one of another replica and also
//! after a reconnect. A run of this process is told from memory, which is as exact and sooner.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::Stream;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::store::{self, RunRecord};
use super::{Direction, Progress, UpdateError, Updates, doctor, shown};

/// How often the row of a run is looked at.
const LOOK_PERIOD: Duration = Duration::from_millis(250);

/// What a watcher is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// `idle`, `progress`, or as the last one `applied`, `rolled_back` or `failed`.
    pub name: &'static str,
    /// The run, where there is one.
    pub run_id: Option<String>,
    /// What is told, as the API shows it.
    pub body: Value,
}

/// A run's place in its journal, compared to tell each only once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    run_id: String,
    direction: String,
    phase: String,
    done: i64,
    total: i64,
}

impl Place {
    fn of(run: &RunRecord, local: Option<&Progress>) -> Self {
        let place = Self {
            run_id: run.run_id.clone(),
            direction: run.direction.clone(),
            phase: run.phase.clone(),
            done: run.done,
            total: run.total,
        };
        match local.filter(|local| local.run_id == run.run_id) {
            Some(local) => {
                Self { phase: local.phase.as_str().to_owned(), done: local.done, total: local.total, ..place }
            }
            None => place,
        }
    }

    fn to_json(&self, migration_id: &str, time_left: Option<Duration>) -> Value {
        json!({
            "run_id": self.run_id,
            "migration_id": migration_id,
            "direction": self.direction,
            "phase": self.phase,
            "done": self.done,
            "total": self.total,
            "time_left_s": time_left.map(|left| left.as_secs() + u64::from(left.subsec_nanos() > 0)),
        })
    }
}

/// How fast a phase goes, from when this watcher first saw it.
struct Pace {
    run_id: String,
    phase: String,
    done: i64,
    since: Instant,
}

impl Pace {
    fn time_left(&self, place: &Place) -> Option<Duration> {
        let done = u32::try_from(place.done - self.done).ok().filter(|done| *done > 0)?;
        let left = u32::try_from(place.total - place.done).ok()?;
        Some((self.since.elapsed() / done).saturating_mul(left))
    }
}

/// How an ended run is told.
fn end(migration_id: &str, run: &RunRecord) -> Report {
    let at = run.committed_at.as_ref().or(run.finished_at.as_ref()).map(|at| shown(at));
    let (name, time) = match (&run.error, run.direction == Direction::Apply.as_str()) {
        (Some(_), _) => ("failed", "failed_at"),
        (None, true) => ("applied", "applied_at"),
        (None, false) => ("rolled_back", "rolled_back_at"),
    };
    let mut body = json!({
        "migration_id": migration_id, "status": name, time: at, "run_id": run.run_id, "direction": run.direction,
    });
    if let (Some(error), Some(body)) = (&run.error, body.as_object_mut()) {
        body.insert("error".to_owned(), json!(error));
        body.insert("remedy".to_owned(), json!(doctor::remedy(migration_id)));
    }
    Report { name, run_id: Some(run.run_id.clone()), body }
}

struct Watcher {
    updates: Arc<Updates>,
    migration_id: String,
    local: watch::Receiver<Option<Progress>>,
    closing: watch::Receiver<bool>,
    /// The run that had ended before anybody looked.
    over: Option<RunRecord>,
    told: Option<Place>,
    greeted: bool,
    ended: bool,
    pace: Option<Pace>,
}

impl Watcher {
    async fn next(&mut self) -> Option<Report> {
        while !self.ended && !*self.closing.borrow() {
            if let Some(report) = self.look().await {
                self.greeted = true;
                return Some(report);
            }
            tokio::select! {
                // The sender lives as long as the updates that we hold.
                _ = self.local.changed() => {}
                () = tokio::time::sleep(LOOK_PERIOD) => {}
                _ = self.closing.changed() => {}
            }
        }
        None
    }

    async fn look(&mut self) -> Option<Report> {
        let local = self.local.borrow_and_update().clone();
        // A database that is away is not the end of the run: the next look tells.
        let run = self.updates.last_run(&self.migration_id).await.ok()?;
        let Some(run) = run.filter(|run| self.over.as_ref().is_none_or(|over| over.run_id != run.run_id))
        else {
            return (!self.greeted).then(|| self.idle());
        };
        if run.finished_at.is_some() {
            self.ended = true;
            return Some(end(&self.migration_id, &run));
        }
        let place = Place::of(&run, local.as_ref());
        if self.told.as_ref() == Some(&place) {
            return None;
        }
        let pace = self.pace.take().filter(|pace| pace.run_id == place.run_id && pace.phase == place.phase);
        let pace = pace.unwrap_or_else(|| Pace {
            run_id: place.run_id.clone(),
            phase: place.phase.clone(),
            done: place.done,
            since: Instant::now(),
        });
        let body = place.to_json(&self.migration_id, pace.time_left(&place));
        self.pace = Some(pace);
        let run_id = Some(place.run_id.clone());
        self.told = Some(place);
        Some(Report { name: "progress", run_id, body })
    }

    fn idle(&self) -> Report {
        let last = self.over.as_ref().map(|run| end(&self.migration_id, run).body);
        Report {
            name: "idle",
            run_id: None,
            body: json!({ "migration_id": self.migration_id, "last_run": last }),
        }
    }
}

impl Updates {
    async fn last_run(&self, migration_id: &str) -> Result<Option<RunRecord>, UpdateError> {
        Ok(store::runs(&mut self.pki.store.read().await?, migration_id, 1).await?.into_iter().next())
    }

    /// Where the run of an update is, on whichever replica; `None` while none is under way.
    pub async fn progress_of(&self, migration_id: &str) -> Result<Option<Value>, UpdateError> {
        let local = self.watch().borrow().clone();
        let run = self.last_run(migration_id).await?.filter(|run| run.finished_at.is_none());
        Ok(run.map(|run| Place::of(&run, local.as_ref()).to_json(migration_id, None)))
    }

    /// The reports of an update's run as they come; the last one says how it ended.
    ///
    /// The present state comes at once: `progress` of a run under way, `idle` where none is, and then the next run is
    /// waited for. `back`: the watcher has seen a run before; if none is under way any more, its end comes at once.
    /// Errors: [`UpdateError::Unknown`].
    pub async fn follow(
        self: &Arc<Self>,
        migration_id: &str,
        back: bool,
    ) -> Result<impl Stream<Item = Report> + use<>, UpdateError> {
        self.known(migration_id).await?;
        let last = self.last_run(migration_id).await?;
        let over = last.filter(|run| run.finished_at.is_some() && !back);
        let watcher = Watcher {
            updates: Arc::clone(self),
            migration_id: migration_id.to_owned(),
            local: self.watch(),
            closing: self.closing.subscribe(),
            over,
            told: None,
            greeted: false,
            ended: false,
            pace: None,
        };
        Ok(futures_util::stream::unfold(watcher, |mut watcher| async move {
            watcher.next().await.map(|report| (report, watcher))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(direction: &str, finished: bool, error: Option<&str>) -> RunRecord {
        RunRecord {
            actor: "admin".to_owned(),
            started_at: "2026-11-23T00:00:00Z".to_owned(),
            verified_at: None,
            run_id: "01".to_owned(),
            direction: direction.to_owned(),
            phase: "prepare".to_owned(),
            done: 10,
            total: 100,
            committed_at: None,
            finished_at: finished.then(|| "2026-04-23T19:08:12Z".to_owned()),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn a_run_ends_applied_rolled_back_or_failed() {
        assert_eq!(end("x", &run("apply", true, None)).name, "applied");
        assert_eq!(end("x", &run("rollback", true, None)).body["rolled_back_at"], "2026-04-23T19:08:12Z");
        let failed = end("x", &run("apply", true, Some("disk full")));
        assert_eq!((failed.name, &failed.body["error"]), ("failed", &json!("disk full")));
        assert!(failed.body["remedy"].is_string());
    }

    #[test]
    fn memory_is_believed_only_about_the_same_run() {
        let mut local = Progress {
            run_id: "01".to_owned(),
            migration_id: "x".to_owned(),
            direction: Direction::Apply,
            phase: super::super::Phase::Verify,
            done: 0,
            total: 100,
        };
        assert_eq!(Place::of(&run("apply", false, None), Some(&local)).phase, "verify");
        local.run_id = "02".to_owned();
        assert_eq!(Place::of(&run("apply", false, None), Some(&local)).phase, "prepare");
    }

    #[test]
    fn time_left_is_known_once_something_was_done() {
        let place = Place::of(&run("apply", false, None), None);
        let since = Instant::now();
        let pace = |done| Pace { run_id: "01".to_owned(), phase: "prepare".to_owned(), done, since };
        assert_eq!(pace(10).time_left(&place), None);
        assert!(pace(0).time_left(&place).is_some());
    }
}
