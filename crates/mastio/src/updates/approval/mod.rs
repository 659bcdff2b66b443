//! Two-person approval: where the setting asks for it, an apply or a rollback needs a plan that one operator has
//! proposed and another has approved.
//!
//! A proposal names an update, a direction and a plan digest, so what is approved is exactly what both have seen: when
//! the state moves, the digest is another one and the proposal is void. It is used up by one run, under the lock that
//! admits the run, it expires, and it ends with the operators who stand behind it. Nobody approves what they have proposed. The shared secret and a command typed
//! without a credential name no person, so they count as one.

pub(super) mod store;

use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use serde_json::{Value, json};
use std::sync::Arc;

use super::error::UpdateError;
use super::{Direction, Updates, event, rehearsal};
use crate::http::authn::AdminCaller;
use crate::store::{Query, WriteTx};
use store as rows;

/// A proposal is void so long after it was made.
const PROPOSAL_S: i64 = 24 * 3600;
/// Proposals that a list shows at most.
const LISTED_MAX: i64 = 50;
/// How the audit log names whoever types commands on the machine, without a credential.
const COMMAND_LINE: &str = "command-line";

/// A plan that somebody wants to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// ULID.
    pub proposal_id: String,
    /// Which update.
    pub migration_id: String,
    /// `apply` or `rollback`.
    pub direction: String,
    /// What the plan covers.
    pub plan_digest: String,
    /// Who proposed it.
    pub proposed_by: String,
    /// When.
    pub proposed_at: String,
    /// Until when it may be approved and used, exclusive; Unix seconds.
    pub expires_at: i64,
    /// Who approved it.
    pub approved_by: Option<String>,
    /// When.
    pub approved_at: Option<String>,
    /// The run that has used it.
    pub run_id: Option<String>,
    /// Why it is void, where it is: `superseded`, `state_moved` or `operator_gone`.
    pub void: Option<String>,
}

impl Proposal {
    /// Whether it may still be approved or used.
    fn is_open(&self, now: UnixTime) -> bool {
        self.run_id.is_none() && self.void.is_none() && now.0 < self.expires_at
    }

    /// Whether `actor` is the person who has proposed it, as far as names tell.
    #[must_use]
    pub fn is_by(&self, actor: &str) -> bool {
        person(&self.proposed_by) == person(actor)
    }

    /// `proposed`, `approved`, `used`, `expired`, or why it is void.
    #[must_use]
    pub fn status(&self, now: UnixTime) -> &str {
        match (&self.run_id, &self.void, &self.approved_by) {
            (Some(_), _, _) => "used",
            (None, Some(void), _) => void,
            _ if now.0 >= self.expires_at => "expired",
            (None, None, Some(_)) => "approved",
            (None, None, None) => "proposed",
        }
    }

    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self, now: UnixTime) -> Value {
        json!({
            "proposal_id": self.proposal_id,
            "migration_id": self.migration_id,
            "direction": self.direction,
            "plan_digest": self.plan_digest,
            "status": self.status(now),
            "proposed_by": self.proposed_by,
            "proposed_at": self.proposed_at,
            "approved_by": self.approved_by,
            "approved_at": self.approved_at,
            "expires_at": UnixTime(self.expires_at).to_rfc3339(),
            "run_id": self.run_id,
        })
    }
}

/// Who stands behind a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Approval {
    /// Who proposed its plan.
    pub proposed_by: String,
    /// Who approved it.
    pub approved_by: String,
}

/// The person behind an actor's name, as far as it names one.
fn person(actor: &str) -> &str {
    if actor == COMMAND_LINE { AdminCaller::SHARED } else { actor }
}

/// The plan that may be run: approved, and not yet used.
///
/// Errors: [`UpdateError::ApprovalRequired`] says what is missing.
pub(super) async fn approved(
    tx: &mut impl Query,
    migration_id: &str,
    direction: Direction,
    now: UnixTime,
) -> Result<Proposal, UpdateError> {
    let missing = |proposal: Option<&Proposal>| UpdateError::ApprovalRequired {
        migration_id: migration_id.to_owned(),
        direction: direction.as_str(),
        proposed_by: proposal.map(|proposal| proposal.proposed_by.clone()),
    };
    let open = rows::newest(tx, migration_id, direction.as_str()).await?.filter(|open| open.is_open(now));
    match open {
        Some(open) if open.approved_by.is_some() => Ok(open),
        open => Err(missing(open.as_ref())),
    }
}

/// Uses an approved proposal up for the run that is being admitted, in its transaction.
///
/// Errors: [`UpdateError::ApprovalRequired`], where another run or a new proposal came in between.
pub(super) async fn take(
    tx: &mut WriteTx,
    migration_id: &str,
    direction: Direction,
    plan_digest: &str,
    run_id: &str,
    now: UnixTime,
) -> Result<Approval, UpdateError> {
    let proposal = approved(tx, migration_id, direction, now).await?;
    let required = || UpdateError::ApprovalRequired {
        migration_id: migration_id.to_owned(),
        direction: direction.as_str(),
        proposed_by: None,
    };
    let approved_by = proposal.approved_by.filter(|_| proposal.plan_digest == plan_digest);
    let approved_by = approved_by.ok_or_else(required)?;
    rows::set_used(tx, &proposal.proposal_id, run_id).await?;
    Ok(Approval { proposed_by: proposal.proposed_by, approved_by })
}

impl Updates {
    /// Proposes the plan with `plan_digest` to the other operators. Proposing the same again gives the same proposal;
    /// another digest takes the place of what was proposed before.
    ///
    /// Errors: [`UpdateError::PlanChanged`] where the plan is another one by now; [`UpdateError::AlreadyProposed`] where
    /// somebody else has proposed it: approve that; what the run would be refused with.
    pub async fn propose_plan(
        self: &Arc<Self>,
        migration_id: &str,
        direction: Direction,
        plan_digest: &str,
        actor: &str,
    ) -> Result<Proposal, UpdateError> {
        let migration = self.known(migration_id).await?;
        rehearsal::compare(self, migration, direction, plan_digest).await?;
        let mut tx = self.pki.store.write().await?;
        let now = self.pki.clock.now();
        let open = rows::newest(&mut tx, migration_id, direction.as_str()).await?;
        if let Some(open) = open.filter(|open| open.is_open(now.seconds()) && open.plan_digest == plan_digest)
        {
            if open.is_by(actor) {
                return Ok(open);
            }
            return Err(UpdateError::AlreadyProposed {
                migration_id: open.migration_id,
                by: open.proposed_by,
            });
        }
        rows::void_open(&mut tx, migration_id, direction.as_str(), "superseded").await?;
        let proposal = Proposal {
            proposal_id: self.pki.entropy.ulid(now),
            migration_id: migration_id.to_owned(),
            direction: direction.as_str().to_owned(),
            plan_digest: plan_digest.to_owned(),
            proposed_by: actor.to_owned(),
            proposed_at: now.seconds().to_rfc3339(),
            expires_at: now.seconds().plus(PROPOSAL_S).0,
            approved_by: None,
            approved_at: None,
            run_id: None,
            void: None,
        };
        rows::insert(&mut tx, &proposal).await?;
        tx.commit(&[event(EventType::UpdateProposed, actor, migration_id, details(&proposal))]).await?;
        Ok(proposal)
    }

    /// Approves a proposal of somebody else's.
    ///
    /// Errors: [`UpdateError::NoProposal`]; [`UpdateError::SamePerson`]; [`UpdateError::ProposalClosed`];
    /// [`UpdateError::PlanChanged`] where the state has moved, which makes the proposal void.
    pub async fn approve_plan(
        self: &Arc<Self>,
        migration_id: &str,
        proposal_id: &str,
        actor: &str,
    ) -> Result<Proposal, UpdateError> {
        let migration = self.known(migration_id).await?;
        let missing = || UpdateError::NoProposal { migration_id: migration_id.to_owned() };
        let found = rows::by_id(&mut self.pki.store.read().await?, migration_id, proposal_id).await?;
        let found = found.ok_or_else(missing)?;
        self.approvable(&found, actor)?;
        let direction = if found.direction == "apply" { Direction::Apply } else { Direction::Rollback };
        let compared = rehearsal::compare(self, migration, direction, &found.plan_digest).await;
        let mut tx = self.pki.store.write().await?;
        // Under the lock again: somebody may have approved, proposed or run since.
        let mut proposal = rows::by_id(&mut tx, migration_id, proposal_id).await?.ok_or_else(missing)?;
        self.approvable(&proposal, actor)?;
        if let Err(error) = compared {
            if matches!(error, UpdateError::PlanChanged { .. }) {
                rows::void_open(&mut tx, migration_id, direction.as_str(), "state_moved").await?;
                let details = details(&proposal);
                tx.commit(&[event(EventType::UpdateProposalVoid, actor, migration_id, details)]).await?;
            }
            return Err(error);
        }
        let now = self.pki.clock.now().seconds().to_rfc3339();
        rows::set_approved(&mut tx, proposal_id, actor, &now).await?;
        proposal.approved_by = Some(actor.to_owned());
        proposal.approved_at = Some(now);
        tx.commit(&[event(EventType::UpdateApproved, actor, migration_id, details(&proposal))]).await?;
        Ok(proposal)
    }

    fn approvable(&self, proposal: &Proposal, actor: &str) -> Result<(), UpdateError> {
        let now = self.pki.clock.now().seconds();
        if !proposal.is_open(now) || proposal.approved_by.is_some() {
            return Err(UpdateError::ProposalClosed { status: proposal.status(now).to_owned() });
        }
        if proposal.is_by(actor) {
            return Err(UpdateError::SamePerson { by: proposal.proposed_by.clone() });
        }
        Ok(())
    }

    /// Whether two operators have to stand behind a run.
    #[must_use]
    pub fn needs_two_operators(&self) -> bool {
        self.two_person
    }

    /// The proposal that may still be approved or used, if there is one.
    pub async fn open_proposal(
        &self,
        migration_id: &str,
        direction: Direction,
    ) -> Result<Option<Proposal>, UpdateError> {
        let now = self.pki.clock.now().seconds();
        let mut tx = self.pki.store.read().await?;
        let newest = rows::newest(&mut tx, migration_id, direction.as_str()).await?;
        Ok(newest.filter(|proposal| proposal.is_open(now)))
    }

    /// The proposals of an update, newest first.
    pub async fn proposals(&self, migration_id: &str) -> Result<Vec<Value>, UpdateError> {
        self.known(migration_id).await?;
        let now = self.pki.clock.now().seconds();
        let list = rows::list(&mut self.pki.store.read().await?, migration_id, LISTED_MAX).await?;
        Ok(list.iter().map(|proposal| proposal.to_json(now)).collect())
    }
}

fn details(proposal: &Proposal) -> Value {
    json!({
        "proposal_id": proposal.proposal_id,
        "direction": proposal.direction,
        "plan_digest": proposal.plan_digest,
        "proposed_by": proposal.proposed_by,
        "approved_by": proposal.approved_by,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_names_no_person_counts_as_one() {
        assert_eq!(person("command-line"), person("admin"));
        assert_ne!(person("alice"), person("admin"));
        assert_ne!(person("alice"), person("bob"));
    }

    #[test]
    fn a_proposal_is_open_until_its_end_and_not_at_it() {
        let mut proposal = Proposal {
            proposal_id: "p".to_owned(),
            migration_id: "m".to_owned(),
            direction: "apply".to_owned(),
            plan_digest: "d".to_owned(),
            proposed_by: "alice".to_owned(),
            proposed_at: String::new(),
            expires_at: 1000,
            approved_by: None,
            approved_at: None,
            run_id: None,
            void: None,
        };
        assert!(proposal.is_open(UnixTime(999)));
        assert!(!proposal.is_open(UnixTime(1000)));
        assert_eq!(proposal.status(UnixTime(999)), "proposed");
        assert_eq!(proposal.status(UnixTime(1000)), "expired");
        proposal.approved_by = Some("bob".to_owned());
        assert_eq!(proposal.status(UnixTime(999)), "approved");
        proposal.void = Some("superseded".to_owned());
        assert!(!proposal.is_open(UnixTime(999)));
        assert_eq!(proposal.status(UnixTime(999)), "superseded");
        proposal.run_id = Some("r".to_owned());
        assert_eq!(proposal.status(UnixTime(999)), "used");
    }
}
