//! `/proxy/updates`: what waits, what an apply or a rollback would do, the run under way, what happened.

use std::collections::BTreeMap;
use std::time::Instant;

use askama::Template;
use mastio_core::time::UnixTime;
use serde::Deserialize;
use serde_json::Value;

use super::checks::Check;
use super::error::DashboardError;
use super::trust::{Event, events_of_update};
use super::{Dashboard, Frame, urlencoded};
use crate::http::authn::Session;
use crate::updates::approval::Proposal;
use crate::updates::{CertificateSummary, Direction, Plan, UpdateError};

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

/// A proposal as the API tells it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Proposed {
    direction: String,
    plan_digest: String,
    status: String,
    proposed_by: String,
    proposed_at: String,
    approved_by: Option<String>,
}

impl Proposed {
    fn is_open(&self) -> bool {
        matches!(self.status.as_str(), "proposed" | "approved")
    }

    fn class(&self) -> &'static str {
        match self.status.as_str() {
            "proposed" => "waiting",
            "approved" | "used" => "good",
            _ => "over",
        }
    }

    fn status_word(&self) -> String {
        self.status.replace('_', " ")
    }
}

/// What whoever looks at a plan may do with it.
pub(super) enum Stand {
    /// Have it carried out. `approved`: where two operators have to stand behind it, and do.
    Run { approved: Option<Proposal> },
    /// Propose it to the others. `stale`: who has proposed another one, which this would replace.
    Propose { stale: Option<String> },
    /// Wait for another operator.
    Wait { until: String },
    /// Approve what somebody else has proposed.
    Approve { proposal: Proposal },
}

/// A run, with what its record means and what the audit log has of it.
pub(super) struct Run {
    record: RunRecord,
    /// Empty for the run under way.
    events: Vec<Event>,
}

fn is_open(record: &RunRecord) -> bool {
    record.finished_at.is_none()
}

impl Run {
    fn class(&self) -> &'static str {
        match (&self.record.finished_at, &self.record.error) {
            (None, _) => "waiting",
            (Some(_), Some(_)) => "bad",
            (Some(_), None) => "good",
        }
    }

    fn title(&self) -> &'static str {
        if self.record.direction == "apply" { "Apply" } else { "Rollback" }
    }

    fn outcome_word(&self) -> &'static str {
        match (&self.record.finished_at, &self.record.error, &self.record.committed_at) {
            (None, _, _) => "under way",
            (Some(_), Some(_), None) => "nothing was changed",
            (Some(_), Some(_), Some(_)) => "changed, and not verified",
            (Some(_), None, Some(_)) => "changed and verified",
            (Some(_), None, None) => "nothing was needed",
        }
    }

    fn percent(&self) -> i64 {
        if self.record.total > 0 {
            (self.record.done.saturating_mul(100) / self.record.total).clamp(0, 100)
        } else {
            0
        }
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
        let present = PHASES.iter().position(|(name, _)| *name == self.record.phase).unwrap_or(0);
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
    proposals: Vec<Proposed>,
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
    digest: String,
    stand: Stand,
    /// What has moved since the plan that was sent, where that is why this page is shown.
    moved: Option<Vec<String>>,
}

/// `/proxy/updates/{id}/rollback-review`.
#[derive(Template)]
#[template(path = "rollback_plan.html")]
pub(super) struct RollbackPlanPage {
    frame: Frame,
    update: Update,
    plan: Option<RollbackOutline>,
    digest: String,
    stand: Stand,
    /// As for an apply.
    moved: Option<Vec<String>>,
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

    /// The newest run, and the others with their evidence.
    async fn runs(&self, migration_id: &str) -> Result<Vec<RunRecord>, DashboardError> {
        Ok(self.health.updates.runs(migration_id).await?)
    }

    /// What the audit log has of each run: what names it, or is of its update and time.
    async fn with_evidence(
        &self,
        migration_id: &str,
        records: Vec<RunRecord>,
    ) -> Result<Vec<Run>, DashboardError> {
        let events = events_of_update(&self.pki().store, migration_id).await?;
        let mut runs: Vec<Run> =
            records.into_iter().map(|record| Run { record, events: Vec::new() }).collect();
        for (run_id, event) in events {
            if let Some(run) = runs.iter_mut().find(|run| run.record.run_id == run_id) {
                run.events.push(event);
            }
        }
        Ok(runs)
    }

    /// What `session`'s operator may do with the plan of this digest.
    async fn stand(
        &self,
        session: &Session,
        id: &str,
        direction: Direction,
        digest: &str,
    ) -> Result<Stand, DashboardError> {
        let updates = &self.health.updates;
        if !updates.needs_two_operators() {
            return Ok(Stand::Run { approved: None });
        }
        Ok(match updates.open_proposal(id, direction).await? {
            None => Stand::Propose { stale: None },
            Some(open) if open.plan_digest != digest => Stand::Propose { stale: Some(open.proposed_by) },
            Some(open) if open.approved_by.is_some() => Stand::Run { approved: Some(open) },
            Some(open) if open.is_by(&session.actor) => {
                Stand::Wait { until: UnixTime(open.expires_at).to_rfc3339() }
            }
            Some(open) => Stand::Approve { proposal: open },
        })
    }

    pub(super) async fn updates_page(&self, session: &Session) -> Result<ListPage, DashboardError> {
        let updates = self.updates().await?;
        let mut running = None;
        for update in &updates {
            if self.runs(&update.migration_id).await?.first().is_some_and(is_open) {
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
        let mut records = self.runs(id).await?;
        let open = records.first().is_some_and(is_open).then(|| records.remove(0));
        let open = open.map(|record| Run { record, events: Vec::new() });
        let history = self.with_evidence(id, records).await?;
        let proposals = match self.health.updates.proposals(id).await {
            // Our own list in our own shape.
            Ok(list) => serde_json::from_value(list.into()).map_err(|_| DashboardError::Malformed)?,
            // A row of another version's has no plan to propose.
            Err(UpdateError::Unknown(_)) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let has_snapshot = self.health.updates.has_snapshot(id).await?;
        let checks = if update.status == "applied" && open.is_none() {
            self.verify_after_apply(&update).await?
        } else {
            Vec::new()
        };
        let mut frame = self.frame(Some(session), "updates", update.migration_id.clone()).await?;
        frame.moving = open.is_some();
        Ok(DetailPage { frame, update, open, history, proposals, has_snapshot, checks })
    }

    /// The run under way, or none any more.
    pub(super) async fn run_fragment(&self, id: &str) -> Result<Option<RunFragment>, DashboardError> {
        let update = self.known(id).await?;
        let run = self.runs(id).await?.into_iter().next().filter(is_open);
        Ok(run.map(|record| RunFragment { update, run: Run { record, events: Vec::new() } }))
    }

    pub(super) async fn apply_plan_page(
        &self,
        session: &Session,
        id: &str,
        moved: Option<Vec<String>>,
    ) -> Result<ApplyPlanPage, DashboardError> {
        let update = self.known(id).await?;
        let began = Instant::now();
        let plan = self.health.updates.plan(id).await?;
        let intermediate = self.pki().authority().mastio_ca.as_ref().map(CertificateSummary::of);
        let picture = Picture::of(&plan, intermediate);
        let seconds = began.elapsed().as_secs() + 1;
        let frame = self.frame(Some(session), "updates", format!("Apply {id}")).await?;
        let digest = plan.plan_digest.clone();
        let stand = self.stand(session, id, Direction::Apply, &digest).await?;
        Ok(ApplyPlanPage { frame, update, plan, picture, seconds, digest, stand, moved })
    }

    pub(super) async fn rollback_plan_page(
        &self,
        session: &Session,
        id: &str,
        moved: Option<Vec<String>>,
    ) -> Result<RollbackPlanPage, DashboardError> {
        let update = self.known(id).await?;
        let plan = self.rollback_plan(id).await?;
        // What the outline tells is read; what the form is held to is computed.
        let digest = match plan.as_ref().filter(|plan| plan.blocker.is_none()) {
            Some(_) => self.health.updates.rollback_plan(id).await?.plan_digest,
            None => String::new(),
        };
        let stand = self.stand(session, id, Direction::Rollback, &digest).await?;
        let frame = self.frame(Some(session), "updates", format!("Roll back {id}")).await?;
        Ok(RollbackPlanPage { frame, update, plan, digest, stand, moved })
    }
}

/// What has moved between two plans, in words. `differences`: as [`UpdateError::PlanChanged`] has them.
pub(super) fn in_words(differences: &Value) -> Vec<String> {
    let names = |list: &Value| {
        let names: Vec<&str> = list.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        names.join(", ")
    };
    if differences["known"] != true {
        let why = differences["message"].as_str().unwrap_or("which values moved is not kept");
        return vec![format!("not known: {why}")];
    }
    let mut lines = Vec::new();
    let cells = names(&differences["cells"]);
    if !cells.is_empty() {
        lines.push(format!("values: {cells}"));
    }
    for (kind, words) in
        [("entered", "agents that came"), ("left", "agents that left"), ("changed", "agents that changed")]
    {
        let count = differences[kind]["count"].as_u64().unwrap_or(0);
        if count > 0 {
            lines.push(format!("{count} {words}: {}", names(&differences[kind]["agents"])));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_moved_between_two_plans_is_told_in_words() {
        let nobody = json!({ "count": 0, "agents": [] });
        let moved = json!({
            "known": true, "cells": ["proxy_config/org_ca_cert/value"], "entered": nobody,
            "left": { "count": 2, "agents": ["a", "b"] }, "changed": nobody,
        });
        assert_eq!(in_words(&moved), ["values: proxy_config/org_ca_cert/value", "2 agents that left: a, b"]);
        let unknown = json!({ "known": false, "message": "it was long ago" });
        assert_eq!(in_words(&unknown), ["not known: it was long ago"]);
    }
}
