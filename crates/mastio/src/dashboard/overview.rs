//! `/proxy`: how the deploy fares, each fact a link to where it comes from. And the two pages around it: sign-in and
//! error.

use askama::Template;
use mastio_core::audit::event::EventType;

use super::chart::Chart;
use super::error::DashboardError;
use super::trust::{Event, events};
use super::updates::Update;
use super::{Dashboard, Frame, shell_word};
use crate::audit::Filter;
use crate::config::{InForce, Origin};
use crate::enrollment::lifecycle::Expiring;
use crate::http::authn::Session;
use crate::metrics::recent::Traffic;

/// Events that the overview shows.
const EVENTS: i64 = 8;
/// A certificate that ends within so many days is marked.
const SOON_DAYS: i64 = 60;

/// Where tokens, and calls of tools, are listed.
const TOKENS: &str = "/proxy/audit?event_type=auth.token_issued";
const CALLS: &str = "/proxy/audit?event_type=mcp.tool_called";

/// When a certificate ends.
pub(super) struct Ending {
    what: &'static str,
    href: &'static str,
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
    /// The update whose snapshot is the latest, and when it was taken.
    snapshot: Option<(String, String)>,
    /// The event of the adoption, which has put a copy aside.
    adopted: Option<Event>,
    backup: String,
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
        let ending = |what, href, not_after: mastio_core::time::UnixTime| Ending {
            what,
            href,
            not_after: not_after.to_rfc3339(),
            days: not_after.since(now).div_euclid(86_400),
        };
        let mut endings = vec![ending("Org CA", "/proxy/pki", authority.org_ca.not_after())];
        endings
            .extend(authority.mastio_ca.as_ref().map(|ca| ending("Mastio CA", "/proxy/pki", ca.not_after())));
        let token_key = authority.active_token_key().and_then(|key| key.certificate.as_ref());
        endings.extend(
            token_key.map(|certificate| ending("Token key", "/proxy/mastio-key", certificate.not_after())),
        );
        endings.push(ending("TLS server", "/proxy/pki", self.health.tls.not_after()));
        endings.sort_by_key(|ending| ending.days);
        let filter = Filter { limit: EVENTS, ..Filter::default() };
        let on_old_leaf = if authority.retiring.is_empty() {
            None
        } else {
            let mut tx = self.pki().store.read().await?;
            Some(self.health.updates.overlap_counts(&mut tx).await?.1)
        };
        let snapshot = self.health.updates.latest_snapshot().await?;
        let adopted = Filter {
            event_type: Some(EventType::DeployAdopted.as_str().to_owned()),
            limit: 1,
            ..Filter::default()
        };
        Ok(OverviewPage {
            snapshot: snapshot.map(|(id, at)| (id, at.to_rfc3339())),
            adopted: events(&self.pki().store, &adopted).await?.into_iter().next(),
            backup: self.backup_command(),
            on_old_leaf,
            expiring: self.agents.expiring().await?,
            frame: self.frame(Some(session), "overview", "Overview").await?,
            warnings: self.health.warnings(),
            waiting,
            endings,
            retiring: i64::try_from(authority.retiring.len()).unwrap_or(i64::MAX),
            charts: [
                self.chart("Tokens", TOKENS, "/proxy/audit?event_type=auth.refused", Traffic::Tokens),
                self.chart("Calls of tools", CALLS, CALLS, Traffic::Calls),
            ],
            events: events(&self.pki().store, &filter).await?,
        })
    }

    /// How this deploy's database is copied while we run.
    fn backup_command(&self) -> String {
        match self.pki().store.sqlite_path() {
            Some(path) => {
                let database = shell_word(&path.display().to_string());
                format!("sqlite3 {database} \".backup mastio-backup.db\"")
            }
            None => {
                "pg_dump --format=custom --file=mastio-backup.dump \"$MCP_PROXY_DATABASE_URL\"".to_owned()
            }
        }
    }

    fn chart(
        &self,
        title: &'static str,
        href: &'static str,
        failures: &'static str,
        traffic: Traffic,
    ) -> Chart {
        Chart::of(title, href, failures, &self.health.metrics.last_hour(traffic))
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
