//! `/proxy/agents`: the fleet by id, a page at a time and never counted in full, and one agent with its chain.

use askama::Template;
use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use mastio_core::x509::crl::RevocationReason;

use super::error::DashboardError;
use super::trust::{CertificateView, Event, events};
use super::{Dashboard, Frame, shell_word};
use crate::audit::Filter;
use crate::enrollment::Agent;
use crate::gateway::{Binding, BindingFilter};
use crate::http::authn::Session;
use crate::updates::halt::EnrollmentType;

/// Agents on a page.
const PAGE_ROWS: i64 = 50;
/// Events that an agent's page shows.
const EVENTS: i64 = 10;

/// `/proxy/agents`.
#[derive(Template)]
#[template(path = "agents.html")]
pub(super) struct AgentsPage {
    frame: Frame,
    from: String,
    filter: &'static str,
    /// Each filter by its name and words, and whether it is the one in force.
    filters: [(&'static str, &'static str, bool); 8],
    agents: Vec<Agent>,
    next: Option<String>,
}

/// `/proxy/agents/{id}`.
#[derive(Template)]
#[template(path = "agent.html")]
pub(super) struct AgentPage {
    frame: Frame,
    agent: Agent,
    chain: Vec<CertificateView>,
    verdict: Result<(), String>,
    anchor_is_current: bool,
    /// Revocation reasons that a form offers.
    reasons: Vec<&'static str>,
    previous_until: Option<String>,
    bindings: Vec<(Binding, Option<String>)>,
    last_token: Option<Deed>,
    last_call: Option<Deed>,
    path: String,
    /// The latest events about it.
    events: Vec<Event>,
    command: String,
}

/// What a list of agents is narrowed to, by the name in its address.
const FILTERS: [(&str, &str); 8] = [
    ("", "all"),
    ("active", "active"),
    ("inactive", "inactive"),
    ("ends-7d", "ends within 7 days, or has ended"),
    ("ends-30d", "ends within 30 days, or has ended"),
    ("connector", "enrolled by us: connector"),
    ("byoca", "enrolled with their own CA: byoca"),
    ("spire", "enrolled by SPIRE: spire"),
];

/// When an agent did something last, and where that stands.
pub(super) struct Deed {
    at: String,
    seq: i64,
}

impl Dashboard {
    async fn agents_of(&self, filter: &str, after: &str) -> Result<Vec<Agent>, DashboardError> {
        let (agents, limit) = (&self.agents, PAGE_ROWS + 1);
        Ok(match filter {
            "active" => agents.list_by_state(true, after, limit).await?,
            "inactive" => agents.list_by_state(false, after, limit).await?,
            "ends-7d" => agents.list_expiring(7, after, limit).await?,
            "ends-30d" => agents.list_expiring(30, after, limit).await?,
            "connector" => agents.list_by_enrollment(EnrollmentType::Connector, after, limit).await?,
            "byoca" => agents.list_by_enrollment(EnrollmentType::Byoca, after, limit).await?,
            "spire" => agents.list_by_enrollment(EnrollmentType::Spire, after, limit).await?,
            _ => agents.list(after, limit).await?,
        })
    }

    /// Agents after the id `after`; or from the first id that begins with `from`, a name or a whole id.
    pub(super) async fn agents_page(
        &self,
        session: &Session,
        from: &str,
        filter: &str,
        after: &str,
    ) -> Result<AgentsPage, DashboardError> {
        let filter = FILTERS.into_iter().map(|(name, _)| name).find(|name| *name == filter).unwrap_or("");
        let mut agents = Vec::new();
        let begin = if from.is_empty() { String::new() } else { self.agents.canonical(from) };
        // Keys are read after a key: the wanted first one is looked up by itself.
        if after.is_empty() && !begin.is_empty() && filter.is_empty() {
            agents.extend(self.agents.agent(&begin).await?.map(|agent| Agent::clone(&agent)));
        }
        let after = if after.is_empty() { &begin } else { after };
        agents.extend(self.agents_of(filter, after).await?);
        if !begin.is_empty() {
            agents.retain(|agent| agent.agent_id.starts_with(&begin));
        }
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = agents.len() > rows;
        agents.truncate(rows);
        let next = if more { agents.last().map(|agent| agent.agent_id.clone()) } else { None };
        let frame = self.frame(Some(session), "agents", "Agents").await?;
        let filters = FILTERS.map(|(name, words)| (name, words, name == filter));
        Ok(AgentsPage { frame, from: from.to_owned(), filter, filters, agents, next })
    }

    pub(super) async fn agent_page(&self, session: &Session, id: &str) -> Result<AgentPage, DashboardError> {
        let agent = self.agents.agent(&self.agents.canonical(id)).await?;
        let agent = agent.ok_or_else(|| DashboardError::NotFound(format!("agent {id}")))?;
        let now = self.pki().clock.now().seconds();
        let authority = self.pki().authority();
        // What an operator's SQL put there may be anything: then there is no chain to show.
        let chain =
            Certificate::chain_from_pem(agent.cert_pem.as_deref().unwrap_or_default()).unwrap_or_default();
        let verdict = match chain.split_first() {
            None => Err("no certificate is stored".to_owned()),
            Some((leaf, rest)) => {
                authority.validate_client(leaf, rest, now).map_err(|error| error.to_string())
            }
        };
        let current = authority.trust().get(..1).unwrap_or_default();
        let anchor_is_current = chain.split_first().is_some_and(|(leaf, rest)| {
            mastio_core::x509::path::validate(leaf, rest, authority.mastio_ca.as_slice(), current, now)
                .is_ok()
        });
        let roles = ["Leaf", "Issuer", "Issuer of the issuer"];
        let chain = chain.iter().zip(roles).map(|(certificate, role)| CertificateView::of(role, certificate));
        let filter = Filter { subject: Some(agent.agent_id.clone()), limit: EVENTS, ..Filter::default() };
        let of = |agent_id: &str| BindingFilter {
            agent_id: Some(agent_id.to_owned()),
            resource_id: None,
            after: None,
            limit: Some(PAGE_ROWS),
        };
        let mut bindings = Vec::new();
        for binding in self.gateway.list_bindings(of(&agent.agent_id)).await? {
            if binding.revoked_at.is_none() {
                let name = self.gateway.resource_of(&binding.resource_id).await?;
                bindings.push((binding, name));
            }
        }
        let withdrawn = |reason: &RevocationReason| *reason != RevocationReason::CertificateHold;
        Ok(AgentPage {
            reasons: RevocationReason::ALL
                .iter()
                .copied()
                .filter(withdrawn)
                .map(RevocationReason::as_str)
                .collect(),
            previous_until: agent.previous_until.filter(|until| now < *until).map(UnixTime::to_rfc3339),
            bindings,
            last_token: self.last_deed(&agent.agent_id, EventType::TokenIssued).await?,
            last_call: self.last_deed(&agent.agent_id, EventType::McpToolCalled).await?,
            path: format!("/proxy/agents/{}", super::urlencoded(&agent.agent_id)),
            command: format!("mastio agents show {}", shell_word(&agent.agent_id)),
            events: events(&self.pki().store, &filter).await?,
            frame: self.frame(Some(session), "agents", agent.agent_id.clone()).await?,
            chain: chain.collect(),
            verdict,
            anchor_is_current,
            agent: Agent::clone(&agent),
        })
    }

    async fn last_deed(&self, agent_id: &str, event_type: EventType) -> Result<Option<Deed>, DashboardError> {
        let filter = Filter {
            subject: Some(agent_id.to_owned()),
            event_type: Some(event_type.as_str().to_owned()),
            limit: 1,
            ..Filter::default()
        };
        let events = events(&self.pki().store, &filter).await?;
        Ok(events.into_iter().next().map(|event| Deed { at: event.timestamp, seq: event.seq }))
    }
}
