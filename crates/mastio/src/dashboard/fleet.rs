//! `/proxy/agents`: the fleet by id, a page at a time and never counted in full, and one agent with its chain.

use askama::Template;
use mastio_core::x509::Certificate;

use super::error::DashboardError;
use super::trust::{CertificateView, Event, events};
use super::{Dashboard, Frame};
use crate::audit::Filter;
use crate::enrollment::Agent;
use crate::http::authn::Session;

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
    /// The latest events about it.
    events: Vec<Event>,
    command: String,
}

impl Dashboard {
    /// Agents after the id `after`; or from the first id that begins with `from`, a name or a whole id.
    pub(super) async fn agents_page(
        &self,
        session: &Session,
        from: &str,
        after: &str,
    ) -> Result<AgentsPage, DashboardError> {
        let mut agents = Vec::new();
        let begin = if from.is_empty() { String::new() } else { self.agents.canonical(from) };
        // Keys are read after a key: the wanted first one is looked up by itself.
        if after.is_empty() && !begin.is_empty() {
            agents.extend(self.agents.agent(&begin).await?.map(|agent| Agent::clone(&agent)));
        }
        let after = if after.is_empty() { &begin } else { after };
        agents.extend(self.agents.list(after, PAGE_ROWS + 1).await?);
        if !begin.is_empty() {
            agents.retain(|agent| agent.agent_id.starts_with(&begin));
        }
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = agents.len() > rows;
        agents.truncate(rows);
        let next = if more { agents.last().map(|agent| agent.agent_id.clone()) } else { None };
        let frame = self.frame(Some(session), "agents", "Agents").await?;
        Ok(AgentsPage { frame, from: from.to_owned(), agents, next })
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
        Ok(AgentPage {
            command: format!("mastio agents show {}", agent.agent_id),
            events: events(&self.pki().store, &filter).await?,
            frame: self.frame(Some(session), "agents", agent.agent_id.clone()).await?,
            chain: chain.collect(),
            verdict,
            anchor_is_current,
            agent: Agent::clone(&agent),
        })
    }
}
