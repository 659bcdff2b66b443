//! `/proxy`: how the deploy fares, each fact a link to where it comes from. And the two pages around it: sign-in and
//! error.

use askama::Template;

use super::chart::Chart;
use super::error::DashboardError;
use super::trust::{Event, events};
use super::updates::Update;
use super::{Dashboard, Frame};
use crate::audit::Filter;
use crate::config::{InForce, Origin};
use crate::enrollment::lifecycle::Expiring;
use crate::http::authn::Session;
use crate::metrics::recent::Traffic;

/// Events that the overview shows.
const EVENTS: i64 = 8;
/// A certificate that ends within so many days is marked.
const SOON_DAYS: i64 = 60;

/// When a certificate ends.
pub(super) struct Ending {
    what: &'static str,
    not_after: String,
    days: i64,
}

impl Ending {
    fn class(&self) -> &'static str {
        match self.days {
            ..0 => "bad",
            0..SOON_DAYS => "waiting",
            _ => "good",
        }
    }

    fn words(&self) -> String {
        if self.days < 0 { "expired".to_owned() } else { format!("in {} days", self.days) }
    }
}

/// `/proxy`.
#[derive(Template)]
#[template(path = "overview.html")]
pub(super) struct OverviewPage {
    frame: Frame,
    warnings: Vec<String>,
    waiting: Vec<Update>,
    endings: Vec<Ending>,
    retiring: i64,
    /// Active agents seen with a former leaf; nothing while no Org CA retires.
    on_old_leaf: Option<i64>,
    expiring: Expiring,
    charts: [Chart; 2],
    events: Vec<Event>,
}

/// `/proxy/settings`.
#[derive(Template)]
#[template(path = "settings.html")]
pub(super) struct SettingsPage<'a> {
    frame: Frame,
    settings: &'a [InForce],
}

/// `/proxy/login`.
#[derive(Template)]
#[template(path = "login.html")]
pub(super) struct LoginPage {
    frame: Frame,
    next: String,
    problem: Option<String>,
    /// The host of the provider that operators may sign on with.
    sso: Option<String>,
    /// Whether the password of the predecessor's dashboard is accepted.
    password: bool,
    /// Whether the organisation waits to be set up.
    setup: bool,
}

/// What is shown instead of a page that cannot be shown.
#[derive(Template)]
#[template(path = "error.html")]
pub(super) struct ErrorPage {
    frame: Frame,
    status: u16,
    message: String,
}

impl Dashboard {
    pub(super) async fn overview_page(&self, session: &Session) -> Result<OverviewPage, DashboardError> {
        let waiting =
            self.updates().await?.into_iter().filter(|u| matches!(u.status.as_str(), "pending" | "failed"));
        let waiting = waiting.collect();
        let authority = self.pki().authority();
        let now = self.pki().clock.now().seconds();
        let ending = |what, not_after: mastio_core::time::UnixTime| Ending {
            what,
            not_after: not_after.to_rfc3339(),
            days: not_after.since(now).div_euclid(86_400),
        };
        let mut endings = vec![ending("Org CA", authority.org_ca.not_after())];
        endings.extend(authority.mastio_ca.as_ref().map(|ca| ending("Mastio CA", ca.not_after())));
        let token_key = authority.active_token_key().and_then(|key| key.certificate.as_ref());
        endings.extend(token_key.map(|certificate| ending("Token key", certificate.not_after())));
        endings.push(ending("TLS server", self.health.tls.not_after()));
        endings.sort_by_key(|ending| ending.days);
        let filter = Filter { limit: EVENTS, ..Filter::default() };
        let on_old_leaf = if authority.retiring.is_empty() {
            None
        } else {
            let mut tx = self.pki().store.read().await?;
            Some(self.health.updates.overlap_counts(&mut tx).await?.1)
        };
        Ok(OverviewPage {
            on_old_leaf,
            expiring: self.agents.expiring().await?,
            frame: self.frame(Some(session), "overview", "Overview").await?,
            warnings: self.health.warnings(),
            waiting,
            endings,
            retiring: i64::try_from(authority.retiring.len()).unwrap_or(i64::MAX),
            charts: [
                self.chart("Tokens", "/proxy/audit?event_type=auth.token_issued", Traffic::Tokens),
                self.chart("Calls of tools", "/proxy/audit?event_type=mcp.tool_called", Traffic::Calls),
            ],
            events: events(&self.pki().store, &filter).await?,
        })
    }

    fn chart(&self, title: &'static str, href: &'static str, traffic: Traffic) -> Chart {
        Chart::of(title, href, &self.health.metrics.last_hour(traffic))
    }

    pub(super) async fn settings_page(&self, session: &Session) -> Result<SettingsPage<'_>, DashboardError> {
        let frame = self.frame(Some(session), "settings", "Settings").await?;
        Ok(SettingsPage { frame, settings: &self.settings })
    }

    pub(super) async fn login_page(
        &self,
        next: String,
        problem: Option<String>,
    ) -> Result<LoginPage, DashboardError> {
        Ok(LoginPage {
            sso: self.sso.as_ref().map(|(sso, _)| sso.host()),
            password: self.operators.has_password().await?,
            setup: self.operators.is_setup_open().await?,
            frame: self.frame(None, "", "Sign in").await?,
            next,
            problem,
        })
    }

    pub(super) async fn error_page(
        &self,
        session: Option<&Session>,
        status: u16,
        message: String,
    ) -> Result<ErrorPage, DashboardError> {
        let frame = self.frame(session, "", format!("Error {status}")).await?;
        Ok(ErrorPage { frame, status, message })
    }
}
