//! `/proxy/enrollments`: who asks for an identity, what approving would issue, and the decision.

use askama::Template;
use mastio_core::time::UnixTime;
use serde::Deserialize;

use super::error::DashboardError;
use super::{Dashboard, Frame, urlencoded};
use crate::enrollment::approval::{Decision, EnrollmentRequest};
use crate::http::authn::Session;
use crate::pki::AGENT_LEAF_VALIDITY_S;

/// Requests on a page.
const PAGE_ROWS: i64 = 50;
/// The statuses that a list is for, what waits first.
const STATUSES: [&str; 4] = ["pending", "approved", "rejected", "expired"];

/// A request as pages show it.
pub(super) struct Asked {
    request: EnrollmentRequest,
    status: &'static str,
    asked_at: String,
    ends_at: String,
    decided_at: Option<String>,
}

impl Asked {
    fn of(request: EnrollmentRequest, now: UnixTime) -> Self {
        Self {
            status: request.status(now),
            asked_at: request.created_at.to_rfc3339(),
            ends_at: request.expires_at.to_rfc3339(),
            decided_at: request.decided_at.map(UnixTime::to_rfc3339),
            request,
        }
    }

    fn class(&self) -> &'static str {
        match self.status {
            "approved" => "good",
            "pending" => "waiting",
            _ => "over",
        }
    }

    fn path(&self) -> String {
        format!("/proxy/enrollments/{}", urlencoded(&self.request.session_id))
    }

    fn agent_id(&self) -> Option<&str> {
        match &self.request.decision {
            Decision::Approved { agent_id } => Some(agent_id),
            _ => None,
        }
    }

    fn rejection(&self) -> Option<&str> {
        match &self.request.decision {
            Decision::Rejected { reason } => Some(reason),
            _ => None,
        }
    }
}

/// What an approval would sign, but for the name that the operator gives.
pub(super) struct Offer {
    org_id: String,
    trust_domain: String,
    issuer: String,
    not_after: String,
}

/// What the list is asked for.
#[derive(Debug, Default, Deserialize)]
pub(super) struct EnrollmentsQuery {
    #[serde(default)]
    status: String,
    #[serde(default)]
    after: String,
}

impl EnrollmentsQuery {
    fn status(&self) -> &'static str {
        STATUSES.into_iter().find(|status| *status == self.status).unwrap_or("pending")
    }
}

/// `/proxy/enrollments`.
#[derive(Template)]
#[template(path = "enrollments.html")]
pub(super) struct EnrollmentsPage {
    frame: Frame,
    status: &'static str,
    /// Each status, and whether it is the one that is shown.
    tabs: [(&'static str, bool); 4],
    requests: Vec<Asked>,
    next: Option<String>,
    /// Whether what has just come joins the list by itself.
    follows: bool,
}

/// The part of [`EnrollmentsPage`] that moves.
#[derive(Template)]
#[template(path = "enrollment_rows.html")]
pub(super) struct RequestsFragment {
    status: &'static str,
    requests: Vec<Asked>,
}

/// `/proxy/enrollments/{session_id}`.
#[derive(Template)]
#[template(path = "enrollment.html")]
pub(super) struct EnrollmentPage {
    frame: Frame,
    asked: Asked,
    offer: Offer,
    command: String,
}

impl Dashboard {
    fn offer(&self, now: UnixTime) -> Offer {
        let pki = self.pki();
        let authority = pki.authority();
        let issuer = authority.mastio_ca.as_ref().unwrap_or(&authority.org_ca);
        Offer {
            org_id: authority.org_id.clone(),
            trust_domain: pki.trust_domain.clone(),
            issuer: issuer.subject_display(),
            not_after: now.plus(AGENT_LEAF_VALIDITY_S).min(issuer.not_after()).to_rfc3339(),
        }
    }

    async fn asked(&self, query: &EnrollmentsQuery, limit: i64) -> Result<Vec<Asked>, DashboardError> {
        let now = self.pki().clock.now().seconds();
        let requests = self.agents.requests(query.status(), &query.after, limit).await?;
        Ok(requests.into_iter().map(|request| Asked::of(request, now)).collect())
    }

    pub(super) async fn enrollments_page(
        &self,
        session: &Session,
        query: &EnrollmentsQuery,
    ) -> Result<EnrollmentsPage, DashboardError> {
        let mut requests = self.asked(query, PAGE_ROWS + 1).await?;
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = requests.len() > rows;
        requests.truncate(rows);
        Ok(EnrollmentsPage {
            frame: self.frame(Some(session), "enrollments", "Enrollments").await?,
            status: query.status(),
            tabs: STATUSES.map(|status| (status, status == query.status())),
            next: if more { requests.last().map(|asked| asked.request.session_id.clone()) } else { None },
            follows: query.after.is_empty(),
            requests,
        })
    }

    /// The first requests of a status, for a page that follows them.
    pub(super) async fn enrollment_rows(
        &self,
        query: &EnrollmentsQuery,
    ) -> Result<RequestsFragment, DashboardError> {
        Ok(RequestsFragment { status: query.status(), requests: self.asked(query, PAGE_ROWS).await? })
    }

    pub(super) async fn enrollment_page(
        &self,
        session: &Session,
        session_id: &str,
    ) -> Result<EnrollmentPage, DashboardError> {
        let now = self.pki().clock.now().seconds();
        let asked = Asked::of(self.agents.request(session_id).await?, now);
        Ok(EnrollmentPage {
            frame: self.frame(Some(session), "enrollments", "An enrollment").await?,
            command: format!("mastio enrollments approve {} --agent-id NAME", asked.request.session_id),
            offer: self.offer(now),
            asked,
        })
    }
}
