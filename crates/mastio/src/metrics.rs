//! What `/metrics` shows: counters and histograms of this process, gauges of the database.
//!
//! A gauge of state is never kept in a process: it is read from the database at each scrape into a [`Snapshot`], so
//! that every replica shows the same and an operator's SQL shows at once. What this process did is counted in
//! [`Metrics`], a value that `app.rs` makes once and hands on; there is no global registry.

pub mod recent;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// The `Content-Type` of what [`Metrics::render`] writes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Upper bounds in seconds of requests and mints: from a tenth of a millisecond to the SDK's own patience.
const REQUEST_BUCKETS_S: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// Upper bounds in seconds of the phases of an update: a million leaves take minutes.
const PHASE_BUCKETS_S: [f64; 12] = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteStatus {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Tier {
    tier: CertificateTier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Fleet {
    enrollment: &'static str,
    active: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Within {
    within: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct McpCall {
    upstream: String,
    tool: String,
    outcome: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct McpUpstream {
    upstream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct McpPolicy {
    policy: String,
}

/// What a certificate is for, in `cullis_certificate_not_after_seconds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CertificateTier {
    /// The Org CA.
    OrgCa,
    /// The Mastio intermediate.
    MastioCa,
    /// The certificate of the active token key.
    TokenKey,
    /// Our TLS server certificate.
    TlsServer,
}

impl CertificateTier {
    fn as_str(self) -> &'static str {
        match self {
            Self::OrgCa => "org_ca",
            Self::MastioCa => "mastio_ca",
            Self::TokenKey => "token_key",
            Self::TlsServer => "tls_server",
        }
    }
}

impl EncodeLabelValue for CertificateTier {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(self.as_str())
    }
}

/// Active or inactive agents of one enrollment type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentCount {
    /// `connector`, `byoca` or `spire`.
    pub enrollment: &'static str,
    /// Whether they may act.
    pub active: bool,
    /// How many there are.
    pub count: u64,
}

/// What the database says at the moment of a scrape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Rows of `pending_updates` with status `pending`.
    pub updates_pending: u64,
    /// Rows with status `applied`.
    pub updates_applied: u64,
    /// Rows with status `rolled_back`.
    pub updates_rolled_back: u64,
    /// Rows with status `failed`.
    pub updates_failed: u64,
    /// Whether nothing is signed.
    pub sign_halted: bool,
    /// Whether a rotation of the token key is staged and undecided.
    pub rotation_staged: bool,
    /// Whether the Org CA has `pathLen=0`.
    pub legacy_ca_pathlen_zero: bool,
    /// Migrations whose check failed at the last boot.
    pub update_checks_failing: u64,
    /// `notAfter` of the certificates in force, in Unix seconds.
    pub certificates: Vec<(CertificateTier, i64)>,
    /// Active agents whose certificate has ended, ends within seven days, and within thirty.
    pub agents_expiring: [(&'static str, u64); 3],
    /// Org CAs that are being phased out.
    pub retiring_anchors: u64,
    /// Active agents that present a former leaf while one is.
    pub agents_on_old_leaf: u64,
    /// The fleet; empty where it was not counted.
    pub agents: Vec<AgentCount>,
}

/// What this process has done since it started. Cheap to share behind an `Arc`.
pub struct Metrics {
    registry: Registry,
    token_mint: Histogram,
    tokens_issued: Counter,
    token_refusals: Family<Reason, Counter>,
    http_requests: Family<RouteStatus, Counter>,
    http_request: Family<Route, Histogram>,
    audit_append_failures: Counter,
    update_phase: Family<Phase, Histogram>,
    recent: recent::Recent,
    mcp_calls: Family<McpCall, Counter>,
    mcp_call: Family<McpUpstream, Histogram>,
    mcp_shadow_denials: Family<McpPolicy, Counter>,
    mcp_streams: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Counters at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let token_mint = Histogram::new(REQUEST_BUCKETS_S);
        let tokens_issued = Counter::default();
        let token_refusals = Family::default();
        let http_requests = Family::default();
        let http_request =
            Family::new_with_constructor((|| Histogram::new(REQUEST_BUCKETS_S)) as fn() -> Histogram);
        let audit_append_failures = Counter::default();
        let update_phase =
            Family::new_with_constructor((|| Histogram::new(PHASE_BUCKETS_S)) as fn() -> Histogram);
        let mcp_calls = Family::default();
        let mcp_call =
            Family::new_with_constructor((|| Histogram::new(REQUEST_BUCKETS_S)) as fn() -> Histogram);
        let mcp_shadow_denials = Family::default();
        // A counter's name is given without `_total`: the exposition adds it.
        registry.register(
            "cullis_token_mint_seconds",
            "Time from a token request to its answer",
            token_mint.clone(),
        );
        registry.register("cullis_tokens_issued", "Access tokens issued", tokens_issued.clone());
        registry.register(
            "cullis_token_refusals",
            "Token requests refused, by reason",
            token_refusals.clone(),
        );
        registry.register(
            "cullis_http_requests",
            "Requests answered, by route and status",
            http_requests.clone(),
        );
        registry.register(
            "cullis_http_request_seconds",
            "Time to answer a request, by route",
            http_request.clone(),
        );
        registry.register(
            "cullis_audit_append_failures",
            "Audit events that could not be made durable",
            audit_append_failures.clone(),
        );
        registry.register(
            "cullis_update_phase_seconds",
            "Time spent in each phase of an update run",
            update_phase.clone(),
        );
        registry.register("cullis_mcp_calls", "Calls of tools, by what came of them", mcp_calls.clone());
        registry.register(
            "cullis_mcp_call_seconds",
            "Time that upstream servers take for a call",
            mcp_call.clone(),
        );
        registry.register(
            "cullis_mcp_shadow_denials",
            "Calls that a policy in shadow would have denied",
            mcp_shadow_denials.clone(),
        );
        let mcp_streams = Gauge::default();
        registry.register(
            "cullis_mcp_streams",
            "Streams on which agents are told what changes, open in this process",
            mcp_streams.clone(),
        );
        Self {
            registry,
            mcp_calls,
            mcp_call,
            mcp_shadow_denials,
            mcp_streams,
            token_mint,
            tokens_issued,
            token_refusals,
            http_requests,
            http_request,
            audit_append_failures,
            update_phase,
            recent: recent::Recent::new(),
        }
    }

    /// A token was issued; `took` counts from the arrival of its request.
    pub fn token_issued(&self, took: Duration) {
        self.tokens_issued.inc();
        self.token_mint.observe(took.as_secs_f64());
    }

    /// A token was refused. `reason` is one of a fixed few: each distinct text is a series of its own.
    pub fn token_refused(&self, reason: &'static str) {
        self.token_refusals.get_or_create(&Reason { reason }).inc();
    }

    /// An audit event could not be made durable, so what it records was refused.
    pub fn audit_append_failed(&self) {
        self.audit_append_failures.inc();
    }

    /// A phase of an update run has ended.
    pub fn update_phase_ended(&self, phase: &'static str, took: Duration) {
        self.update_phase.get_or_create(&Phase { phase }).observe(took.as_secs_f64());
    }

    /// A tool was called, or was not. `upstream` and `tool` are registered names, or empty where there is none;
    /// `outcome` is one of a fixed few.
    pub fn mcp_call(&self, upstream: &str, tool: &str, outcome: &str, took: Duration) {
        let (upstream, tool) = (upstream.to_owned(), tool.to_owned());
        if !upstream.is_empty() {
            let of = McpUpstream { upstream: upstream.clone() };
            self.mcp_call.get_or_create(&of).observe(took.as_secs_f64());
        }
        self.mcp_calls.get_or_create(&McpCall { upstream, tool, outcome: outcome.to_owned() }).inc();
    }

    /// A call was allowed that this policy would have denied if it were not in shadow.
    pub fn mcp_shadow_denied(&self, policy: &str) {
        self.mcp_shadow_denials.get_or_create(&McpPolicy { policy: policy.to_owned() }).inc();
    }

    /// So many streams are open on which agents are told what changes.
    pub fn mcp_streams(&self, open: usize) {
        self.mcp_streams.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// A request to `route` was answered.
    pub fn request_answered(&self, route: &str, status: u16, took: Duration) {
        self.http_requests.get_or_create(&RouteStatus { route: route.to_owned(), status }).inc();
        self.http_request.get_or_create(&Route { route: route.to_owned() }).observe(took.as_secs_f64());
        if let Some(traffic) = recent::Traffic::of(route) {
            self.recent.note(traffic, status >= 500, took);
        }
    }

    /// What this process answered in the last hour.
    #[must_use]
    pub fn last_hour(&self, traffic: recent::Traffic) -> recent::Hour {
        self.recent.hour(traffic)
    }

    /// The page that Prometheus scrapes: `snapshot`'s gauges first, then this process's counters and histograms.
    #[must_use]
    pub fn render(&self, snapshot: &Snapshot) -> String {
        let mut page = String::with_capacity(16 * 1024);
        let written = encode_registry(&mut page, &snapshot.registry())
            .and_then(|()| encode_registry(&mut page, &self.registry))
            .and_then(|()| encode_eof(&mut page));
        if written.is_err() {
            // Writing to a string does not fail; a page without `# EOF` is refused by Prometheus rather than half read.
            tracing::error!("metrics_not_rendered");
        }
        page
    }
}

impl Snapshot {
    fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        let updates = Family::<Status, Gauge>::default();
        for (status, count) in [
            ("pending", self.updates_pending),
            ("applied", self.updates_applied),
            ("rolled_back", self.updates_rolled_back),
            ("failed", self.updates_failed),
        ] {
            updates.get_or_create(&Status { status }).set(gauge_value(count));
        }
        // Its name ends in `_total` and it is a gauge: the page's name, which alert rules out there already use.
        registry.register("cullis_pending_updates_total", "Framework updates by status", updates);
        let number = |value: i64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(value);
            gauge
        };
        let flag = |value: bool| number(i64::from(value));
        registry.register("cullis_mastio_sign_halted", "1 while nothing is signed", flag(self.sign_halted));
        registry.register(
            "cullis_mastio_rotation_staged",
            "1 while a rotation of the token key is staged and undecided",
            flag(self.rotation_staged),
        );
        registry.register(
            "cullis_proxy_legacy_ca_pathlen_zero",
            "1 while the Org CA has pathLen=0",
            flag(self.legacy_ca_pathlen_zero),
        );
        registry.register(
            "cullis_update_checks_failing",
            "Migrations whose check failed",
            number(gauge_value(self.update_checks_failing)),
        );
        registry.register(
            "cullis_retiring_anchors",
            "Org CAs that are being phased out; 0 without a trust overlap",
            number(gauge_value(self.retiring_anchors)),
        );
        registry.register(
            "cullis_agents_on_old_leaf",
            "Active agents that have presented a former leaf, and not the present one since",
            number(gauge_value(self.agents_on_old_leaf)),
        );
        let certificates = Family::<Tier, Gauge>::default();
        for (tier, not_after) in &self.certificates {
            certificates.get_or_create(&Tier { tier: *tier }).set(*not_after);
        }
        registry.register(
            "cullis_certificate_not_after_seconds",
            "When a certificate in force expires, in Unix seconds",
            certificates,
        );
        let expiring = Family::<Within, Gauge>::default();
        for (within, count) in self.agents_expiring.iter().filter(|(within, _)| !within.is_empty()) {
            expiring.get_or_create(&Within { within }).set(gauge_value(*count));
        }
        registry.register(
            "cullis_agent_certificates_expiring",
            "Active agents whose certificate has expired, or expires within so many days",
            expiring,
        );
        let agents = Family::<Fleet, Gauge>::default();
        for AgentCount { enrollment, active, count } in &self.agents {
            agents.get_or_create(&Fleet { enrollment, active: *active }).set(gauge_value(*count));
        }
        registry.register("cullis_agents", "Agents by enrollment type", agents);
        registry
    }
}

fn gauge_value(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Times every request by the route that it matched. For `axum::middleware::from_fn_with_state` on the whole router.
pub async fn observe(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    // The matched pattern, never the path: an id in a label would make a series for each caller.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let started = Instant::now();
    let response = next.run(request).await;
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    metrics.request_answered(route, response.status().as_u16(), started.elapsed());
    response
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt as _;

    use super::*;

    fn page(metrics: &Metrics, snapshot: &Snapshot) -> Vec<String> {
        metrics.render(snapshot).lines().map(str::to_owned).collect()
    }

    fn has(page: &[String], line: &str) {
        assert!(page.iter().any(|found| found == line), "no line {line} in\n{}", page.join("\n"));
    }

    #[test]
    fn the_page_s_gauges_come_out_exactly_as_it_prints_them() {
        let snapshot = Snapshot { updates_pending: 1, sign_halted: true, ..Snapshot::default() };
        let page = page(&Metrics::new(), &snapshot);
        for line in [
            "# TYPE cullis_pending_updates_total gauge",
            r#"cullis_pending_updates_total{status="pending"} 1"#,
            r#"cullis_pending_updates_total{status="applied"} 0"#,
            r#"cullis_pending_updates_total{status="rolled_back"} 0"#,
            r#"cullis_pending_updates_total{status="failed"} 0"#,
            "cullis_mastio_sign_halted 1",
            "cullis_mastio_rotation_staged 0",
            "cullis_proxy_legacy_ca_pathlen_zero 0",
            "cullis_update_checks_failing 0",
        ] {
            has(&page, line);
        }
        assert_eq!(page.last().map(String::as_str), Some("# EOF"));
    }

    #[test]
    fn certificates_and_agents_are_gauges_with_labels() {
        let snapshot = Snapshot {
            certificates: vec![
                (CertificateTier::OrgCa, 1_900_000_000),
                (CertificateTier::TlsServer, 1_800_000_000),
            ],
            agents: vec![AgentCount { enrollment: "connector", active: true, count: 5 }],
            ..Snapshot::default()
        };
        let page = page(&Metrics::new(), &snapshot);
        has(&page, r#"cullis_certificate_not_after_seconds{tier="org_ca"} 1900000000"#);
        has(&page, r#"cullis_certificate_not_after_seconds{tier="tls_server"} 1800000000"#);
        has(&page, r#"cullis_agents{enrollment="connector",active="true"} 5"#);
    }

    #[test]
    fn counters_of_the_token_path_are_there_before_the_first_token() {
        let metrics = Metrics::new();
        has(&page(&metrics, &Snapshot::default()), "cullis_tokens_issued_total 0");
        metrics.token_issued(Duration::from_micros(300));
        metrics.token_refused("halted");
        metrics.audit_append_failed();
        metrics.update_phase_ended("commit", Duration::from_millis(40));
        let page = page(&metrics, &Snapshot::default());
        has(&page, "cullis_tokens_issued_total 1");
        has(&page, "cullis_token_mint_seconds_count 1");
        has(&page, r#"cullis_token_mint_seconds_bucket{le="0.0005"} 1"#);
        has(&page, r#"cullis_token_refusals_total{reason="halted"} 1"#);
        has(&page, "cullis_audit_append_failures_total 1");
        has(&page, r#"cullis_update_phase_seconds_count{phase="commit"} 1"#);
    }

    #[tokio::test]
    async fn requests_are_counted_by_matched_route_and_never_by_path() {
        let metrics = Arc::new(Metrics::new());
        let router = Router::new()
            .route("/agents/{id}", get(|| async { "ok" }))
            .layer(axum::middleware::from_fn_with_state(Arc::clone(&metrics), observe));
        for path in ["/agents/one", "/agents/two", "/nowhere"] {
            let request = axum::http::Request::get(path).body(Body::empty()).unwrap();
            router.clone().oneshot(request).await.unwrap();
        }
        let page = page(&metrics, &Snapshot::default());
        has(&page, r#"cullis_http_requests_total{route="/agents/{id}",status="200"} 2"#);
        has(&page, r#"cullis_http_requests_total{route="unmatched",status="404"} 1"#);
        has(&page, r#"cullis_http_request_seconds_count{route="/agents/{id}"} 2"#);
    }
}
