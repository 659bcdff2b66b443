//! “Verify after apply”: the page's four checks, made by the server at the moment they are shown.
//!
//! The server cannot be an agent. So of the last one it makes what it can make (one stored chain by the strict rules,
//! and the right to sign), and for the rest it looks for an agent that has really done it, in the audit log.

use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use mastio_core::x509::{Certificate, path};

use super::Dashboard;
use super::error::DashboardError;
use super::updates::Update;
use crate::audit;
use crate::enrollment::Agent;
use crate::updates::halt::EnrollmentType;
use crate::updates::registry;

/// How many agents are looked at to find one that is active and ours.
const AGENTS_LOOKED_AT: i64 = 64;

/// How many of the latest events of a type are looked at.
const EVENTS_LOOKED_AT: i64 = 200;

/// What an agent did, as the audit log has it.
struct Deed {
    actor: String,
    /// Always in the log's own form, so that two of them compare as text.
    at: String,
    outcome: String,
}

/// What a check found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    Waiting,
    Bad,
}

/// One check.
pub(super) struct Check {
    pub verdict: Verdict,
    pub what: &'static str,
    pub found: String,
}

impl Check {
    pub fn class(&self) -> &'static str {
        match self.verdict {
            Verdict::Good => "good",
            Verdict::Waiting => "waiting",
            Verdict::Bad => "bad",
        }
    }

    pub fn word(&self) -> &'static str {
        match self.verdict {
            Verdict::Good => "yes",
            Verdict::Waiting => "not yet seen",
            Verdict::Bad => "no",
        }
    }
}

fn check(what: &'static str, good: bool, found: impl Into<String>) -> Check {
    Check { verdict: if good { Verdict::Good } else { Verdict::Bad }, what, found: found.into() }
}

impl Dashboard {
    /// The page's four checks for an update that has been applied.
    pub(super) async fn verify_after_apply(&self, update: &Update) -> Result<Vec<Check>, DashboardError> {
        let waits = matches!(update.status.as_str(), "pending" | "failed");
        let mut checks = vec![check(
            "The update no longer waits",
            !waits,
            format!("cullis_pending_updates_total: this update is {}", update.status),
        )];
        let warning =
            registry::find(&update.migration_id).and_then(|migration| migration.declaration().warning);
        if let Some(warning) = warning {
            let stands = self.health.warnings().iter().any(|name| name == warning);
            let found = format!("{warning} is {}in the warnings", if stands { "" } else { "not " });
            checks.push(check("/healthz has dropped the warning", !stands, found));
        }
        let mut tx = self.pki().store.read().await?;
        let halt = crate::updates::halt::read(&mut tx).await?;
        drop(tx);
        checks.push(check(
            "Signing goes on",
            halt.reasons.is_empty(),
            halt.reasons.first().map_or_else(|| "cullis_mastio_sign_halted is 0".to_owned(), |r| r.detail()),
        ));
        checks.push(self.end_to_end(update).await?);
        Ok(checks)
    }

    async fn end_to_end(&self, update: &Update) -> Result<Check, DashboardError> {
        const WHAT: &str = "One agent end to end against the new chain";
        let agents = self.agents.list("", AGENTS_LOOKED_AT).await?;
        let ours = agents.iter().find(|agent| {
            agent.is_active && agent.enrollment == EnrollmentType::Connector && agent.cert_pem.is_some()
        });
        let Some(agent) = ours else {
            let found = "no active agent with a certificate of ours to try it on".to_owned();
            return Ok(Check { verdict: Verdict::Waiting, what: WHAT, found });
        };
        if let Err(why) = self.chain_is_sound(agent) {
            return Ok(check(WHAT, false, format!("{}: {why}", agent.agent_id)));
        }
        let applied_at = update.applied_at.as_deref().and_then(UnixTime::parse);
        let tokens = self.since(EventType::TokenIssued, applied_at).await?;
        let Some(minted) = tokens.first() else {
            let found = format!(
                "the stored chain of {} verifies strictly; no agent has asked for a token since",
                agent.agent_id
            );
            return Ok(Check { verdict: Verdict::Waiting, what: WHAT, found });
        };
        let calls = self.since(EventType::McpToolCalled, applied_at).await?;
        // A call counts if it succeeded, and with a token that cannot be older than the new chain.
        let called = calls.iter().filter(|call| call.outcome == "ok").find_map(|call| {
            let minted = tokens.iter().find(|token| token.actor == call.actor && token.at <= call.at)?;
            Some((minted, call))
        });
        Ok(match called {
            Some((minted, call)) => check(
                WHAT,
                true,
                format!(
                    "{} minted a token at {} and called a tool at {}",
                    minted.actor,
                    super::utc(&minted.at),
                    super::utc(&call.at)
                ),
            ),
            None => Check {
                verdict: Verdict::Waiting,
                what: WHAT,
                found: format!(
                    "{} minted a token at {}; no call of a tool has succeeded since",
                    minted.actor,
                    super::utc(&minted.at)
                ),
            },
        })
    }

    /// The chain that an agent would be given, by the rules of an outside verifier.
    fn chain_is_sound(&self, agent: &Agent) -> Result<(), String> {
        let now = self.pki().clock.now().seconds();
        let authority = self.pki().authority();
        let chain = Certificate::chain_from_pem(agent.cert_pem.as_deref().unwrap_or_default())
            .map_err(|error| error.to_string())?;
        let (leaf, stored) = chain.split_first().ok_or("no certificate is stored")?;
        let presented: Vec<Certificate> = stored.iter().chain(&authority.mastio_ca).cloned().collect();
        path::validate_strict(leaf, &presented, &authority.org_ca, now)
            .map(drop)
            .map_err(|error| error.to_string())?;
        authority.active_token_key().map(drop).ok_or_else(|| "no token key is active".to_owned())
    }

    /// The latest events of a type since `since`, newest first.
    async fn since(
        &self,
        event_type: EventType,
        since: Option<UnixTime>,
    ) -> Result<Vec<Deed>, DashboardError> {
        let filter = audit::Filter {
            event_type: Some(event_type.as_str().to_owned()),
            limit: EVENTS_LOOKED_AT,
            ..audit::Filter::default()
        };
        let events = audit::list(&self.pki().store, &filter).await?;
        let deeds = events.iter().map(|event| {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            Deed {
                actor: text(&event["actor"]),
                at: text(&event["timestamp"]),
                outcome: text(&event["details"]["outcome"]),
            }
        });
        let is_since =
            |deed: &Deed| UnixTime::parse(&deed.at).zip(since).is_none_or(|(at, since)| at >= since);
        Ok(deeds.take_while(is_since).collect())
    }
}
