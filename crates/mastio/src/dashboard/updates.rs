//! `/proxy/updates`: what waits, what an apply or a rollback would do, the run under way, what happened.

use std::collections::BTreeMap;
use std::time::Instant;

use askama::Template;
use serde::Deserialize;

use super::checks::Check;
use super::error::DashboardError;
use super::{Dashboard, Frame, urlencoded};
use crate::http::authn::Session;
use crate::updates::{CertificateSummary, Plan, UpdateError};

use crate::updates::history::RollbackOutline;
use crate::updates::migration::Declaration;
use crate::updates::registry;
use crate::updates::store::RunRecord;

/// An update as `/proxy/updates/api` tells it; one that is registered and has no row besides.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Update {
    pub migration_id: String,
    pub description: String,
    pub migration_type: String,
    pub criticality: String,
    pub affects_enrollments: Vec<String>,
    pub status: String,
    pub detected_at: Option<String>,
    pub applied_at: Option<String>,
    pub rolled_back_at: Option<String>,
    pub error: Option<String>,
    #[serde(default)]
    pub requires: Vec<String>,
    pub note: Option<String>,
    #[serde(default)]
    pub not_covered: BTreeMap<String, i64>,
    /// Whether signing waits for it.
    #[serde(default)]
    pub halts: bool,
}

impl Update {
    fn without_row(declaration: &Declaration) -> Self {
        Self {
            migration_id: declaration.migration_id.to_owned(),
            description: declaration.description.to_owned(),
            migration_type: declaration.migration_type.as_str().to_owned(),
            criticality: declaration.criticality.as_str().to_owned(),
            affects_enrollments: declaration.affected_tags().into_iter().map(str::to_owned).collect(),
            status: "not needed".to_owned(),
            detected_at: None,
            applied_at: None,
            rolled_back_at: None,
            error: None,
            requires: declaration.requires.iter().map(|&id| id.to_owned()).collect(),
            note: None,
            not_covered: BTreeMap::new(),
            halts: false,
        }
    }

    /// Its page.
    pub fn path(&self) -> String {
        format!("/proxy/updates/{}", urlencoded(&self.migration_id))
    }

    /// The equivalent command line.
    fn command(&self, verb: &str) -> String {
        format!("mastio updates {verb} {}", self.migration_id)
    }

    fn waits(&self) -> bool {
        matches!(self.status.as_str(), "pending" | "failed")
    }

    fn may_be_applied(&self) -> bool {
        matches!(self.status.as_str(), "pending" | "failed" | "rolled_back")
    }

    fn status_class(&self) -> &'static str {
        match self.status.as_str() {
            "applied" | "not needed" => "good",
            "rolled_back" => "waiting",
            _ => "bad",
        }
    }

    fn status_word(&self) -> String {
        self.status.replace('_', " ")
    }
}

/// A run, with what its record means.
pub(super) struct Run(RunRecord);

impl Run {
    fn is_open(&self) -> bool {
        self.0.finished_at.is_none()
    }

    fn class(&self) -> &'static str {
        match (&self.0.finished_at, &self.0.error) {
            (None, _) => "waiting",
            (Some(_), Some(_)) => "bad",
            (Some(_), None) => "good",
        }
    }

    fn outcome(&self) -> String {
        let record = &self.0;
        match (&record.finished_at, &record.error, &record.committed_at) {
            (None, _, _) => format!("under way: {}", record.phase),
            (Some(_), Some(error), None) => format!("nothing was changed: {error}"),
            (Some(_), Some(error), Some(_)) => format!("changed, and not verified: {error}"),
            (Some(_), None, Some(_)) => "changed and verified".to_owned(),
            (Some(_), None, None) => "nothing was needed".to_owned(),
        }
    }

    fn percent(&self) -> i64 {
        if self.0.total > 0 { (self.0.done.saturating_mul(100) / self.0.total).clamp(0, 100) } else { 0 }
    }

    /// Each phase, and whether it is `done`, `now` or `ahead`.
    fn phases(&self) -> Vec<(&'static str, &'static str, &'static str)> {
        const PHASES: [(&str, &str); 6] = [
            ("detect", "The check is asked again"),
            ("snapshot", "What will change is copied aside"),
            ("prepare", "The new state is computed and staged"),
            ("verify", "The staged state is judged"),
            ("commit", "One transaction changes everything"),
            ("activate", "The stored state is read and judged"),
        ];
        let present = PHASES.iter().position(|(name, _)| *name == self.0.phase).unwrap_or(0);
        PHASES
            .iter()
            .enumerate()
            .map(|(index, (name, meaning))| {
                let state = match index.cmp(&present) {
                    std::cmp::Ordering::Less => "done",
                    std::cmp::Ordering::Equal => "now",
                    std::cmp::Ordering::Greater => "ahead",
                };
                (*name, *meaning, state)
            })
            .collect()
    }
}

/// One certificate in a picture of a chain.
pub(super) struct Node {
    role: &'static str,
    name: String,
    key: String,
    not_after: String,
    path_len: Option<u32>,
    /// What an apply does with it: a class, and words.
    mark: Option<(&'static str, &'static str)>,
}

impl Node {
    fn of(role: &'static str, certificate: &CertificateSummary) -> Self {
        Self {
            role,
            name: certificate.subject.clone(),
            key: certificate.spki_sha256.clone(),
            not_after: certificate.not_after.clone(),
            path_len: certificate.path_len,
            mark: None,
        }
    }

    /// Whether its key does not exist yet.
    fn is_new(&self) -> bool {
        self.mark.is_some_and(|(class, _)| class == "new")
    }

    fn marked(mut self, class: &'static str, words: &'static str) -> Self {
        self.mark = Some((class, words));
        self
    }
}

/// A chain before and after, and what of it changes.
pub(super) struct Picture {
    before: Vec<Node>,
    after: Vec<Node>,
}

impl Picture {
    fn of(plan: &Plan, intermediate: Option<CertificateSummary>) -> Self {
        let [root_before, root_after] = &plan.org_ca;
        let changes = |name: &str| plan.cells.iter().any(|cell| cell.contains(name));
        let mut before = vec![Node::of("Org CA", root_before)];
        let root_mark = match (root_before.spki_sha256 == root_after.spki_sha256, changes("org_ca_cert")) {
            (false, _) => ("new", "new key, same name and end"),
            (true, true) => ("kept", "same key, issued again"),
            (true, false) => ("kept", "stays"),
        };
        let mut after = vec![Node::of("Org CA", root_after).marked(root_mark.0, root_mark.1)];
        if let Some(intermediate) = &intermediate {
            before.push(Node::of("Mastio CA", intermediate));
        }
        match (intermediate, changes("mastio_ca_cert"), changes("mastio_ca_key")) {
            (Some(summary), true, false) => {
                after.push(Node::of("Mastio CA", &summary).marked("kept", "same key, issued again"));
            }
            (Some(summary), false, _) => after.push(Node::of("Mastio CA", &summary).marked("kept", "stays")),
            (_, true, true) => after.push(Node {
                role: "Mastio CA",
                name: plan.samples.first().map_or_else(String::new, |[_, leaf]| leaf.issuer.clone()),
                key: String::new(),
                not_after: String::new(),
                path_len: Some(0),
                mark: Some(("new", "new")),
            }),
            _ => {}
        }
        if let Some([leaf_before, leaf_after]) = plan.samples.first() {
            before.push(Node::of("Agent leaf", leaf_before));
            after.push(Node::of("Agent leaf", leaf_after).marked("kept", "same key, signed again"));
        }
        Self { before, after }
    }
}

/// `/proxy/updates`.
#[derive(Template)]
#[template(path = "updates.html")]
pub(super) struct ListPage {
    frame: Frame,
    updates: Vec<Update>,
    running: Option<String>,
}

/// `/proxy/updates/{id}`.
#[derive(Template)]
#[template(path = "update.html")]
pub(super) struct DetailPage {
    frame: Frame,
    update: Update,
    open: Option<Run>,
    history: Vec<Run>,
    has_snapshot: bool,
    checks: Vec<Check>,
}

/// The part of [`DetailPage`] that moves.
#[derive(Template)]
#[template(path = "run.html")]
pub(super) struct RunFragment {
    update: Update,
    run: Run,
}

/// `/proxy/updates/{id}/apply-review`.
#[derive(Template)]
#[template(path = "apply_plan.html")]
pub(super) struct ApplyPlanPage {
    frame: Frame,
    update: Update,
    plan: Plan,
    picture: Picture,
    seconds: u64,
}

/// `/proxy/updates/{id}/rollback-review`.
#[derive(Template)]
#[template(path = "rollback_plan.html")]
pub(super) struct RollbackPlanPage {
    frame: Frame,
    update: Update,
    plan: Option<RollbackOutline>,
}

impl Dashboard {
    /// Every registered update, and every row besides.
    pub(super) async fn updates(&self) -> Result<Vec<Update>, DashboardError> {
        let mut updates: Vec<Update> = Vec::new();
        for row in self.health.updates.list(None).await? {
            // Our own list in our own shape; what did not fit would be a fault of ours.
            updates.push(serde_json::from_value(row).map_err(|_| DashboardError::Malformed)?);
        }
        for migration in registry::REGISTRY {
            let declaration = migration.declaration();
            if !updates.iter().any(|update| update.migration_id == declaration.migration_id) {
                updates.push(Update::without_row(declaration));
            }
        }
        // What waits comes first and in the order in which it may be applied, then what is settled, newest first.
        let (mut waiting, mut settled): (Vec<_>, Vec<_>) = updates.into_iter().partition(Update::waits);
        waiting
            .sort_by(|one, other| (!one.halts, &one.migration_id).cmp(&(!other.halts, &other.migration_id)));
        settled.sort_by(|one, other| other.migration_id.cmp(&one.migration_id));
        waiting.append(&mut settled);
        Ok(waiting)
    }

    /// One update, if there is one of this id.
    pub(super) async fn update(&self, migration_id: &str) -> Result<Option<Update>, DashboardError> {
        Ok(self.updates().await?.into_iter().find(|update| update.migration_id == migration_id))
    }

    async fn known(&self, migration_id: &str) -> Result<Update, DashboardError> {
        let update = self.update(migration_id).await?;
        update.ok_or_else(|| DashboardError::NotFound(format!("update {migration_id}")))
    }

    /// What a rollback would do; nothing where there is no snapshot.
    async fn rollback_plan(&self, id: &str) -> Result<Option<RollbackOutline>, DashboardError> {
        match self.health.updates.rollback_outline(id).await {
            Ok(plan) => Ok(Some(plan)),
            Err(UpdateError::NoSnapshot | UpdateError::Unknown(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn runs(&self, migration_id: &str) -> Result<Vec<Run>, DashboardError> {
        Ok(self.health.updates.runs(migration_id).await?.into_iter().map(Run).collect())
    }

    pub(super) async fn updates_page(&self, session: &Session) -> Result<ListPage, DashboardError> {
        let updates = self.updates().await?;
        let mut running = None;
        for update in &updates {
            if self.runs(&update.migration_id).await?.first().is_some_and(Run::is_open) {
                running = Some(update.migration_id.clone());
            }
        }
        Ok(ListPage { frame: self.frame(Some(session), "updates", "Updates").await?, updates, running })
    }

    pub(super) async fn update_page(
        &self,
        session: &Session,
        id: &str,
    ) -> Result<DetailPage, DashboardError> {
        let update = self.known(id).await?;
        let mut history = self.runs(id).await?;
        let is_open = history.first().is_some_and(Run::is_open);
        let open = is_open.then(|| history.remove(0));
        let has_snapshot = self.health.updates.has_snapshot(id).await?;
        let checks = if update.status == "applied" && open.is_none() {
            self.verify_after_apply(&update).await?
        } else {
            Vec::new()
        };
        let mut frame = self.frame(Some(session), "updates", update.migration_id.clone()).await?;
        frame.moving = open.is_some();
        Ok(DetailPage { frame, update, open, history, has_snapshot, checks })
    }

    /// The run under way, or none any more.
    pub(super) async fn run_fragment(&self, id: &str) -> Result<Option<RunFragment>, DashboardError> {
        let update = self.known(id).await?;
        let run = self.runs(id).await?.into_iter().next().filter(Run::is_open);
        Ok(run.map(|run| RunFragment { update, run }))
    }

    pub(super) async fn apply_plan_page(
        &self,
        session: &Session,
        id: &str,
    ) -> Result<ApplyPlanPage, DashboardError> {
        let update = self.known(id).await?;
        let began = Instant::now();
        let plan = self.health.updates.plan(id).await?;
        let intermediate = self.pki().authority().mastio_ca.as_ref().map(CertificateSummary::of);
        let picture = Picture::of(&plan, intermediate);
        let seconds = began.elapsed().as_secs() + 1;
        let frame = self.frame(Some(session), "updates", format!("Apply {id}")).await?;
        Ok(ApplyPlanPage { frame, update, plan, picture, seconds })
    }

    pub(super) async fn rollback_plan_page(
        &self,
        session: &Session,
        id: &str,
    ) -> Result<RollbackPlanPage, DashboardError> {
        let update = self.known(id).await?;
        let plan = self.rollback_plan(id).await?;
        let frame = self.frame(Some(session), "updates", format!("Roll back {id}")).await?;
        Ok(RollbackPlanPage { frame, update, plan })
    }
}
