//! `/healthz`, `/health`, `/readyz` and `/metrics`: what is, computed when asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Map, Value, json};

use crate::metrics::{self, AgentCount, CertificateTier, Metrics, Snapshot};
use crate::pki::Pki;
use crate::pki::tls::Tls;
use crate::store::Query as _;
use crate::store::claims::Claims;
use crate::store::obstacle::Obstacle;
use crate::updates::Updates;
use crate::updates::error::UpdateError;
use crate::updates::halt::HaltReason;

/// What health is told from.
#[derive(Clone)]
pub struct Health {
    /// The certificate authority.
    pub pki: Arc<Pki>,
    /// Updates.
    pub updates: Arc<Updates>,
    /// The server certificate.
    pub tls: Arc<Tls>,
    /// Redis, where it is configured.
    pub claims: Option<Claims>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What the image calls itself.
    pub version: String,
    /// Whether the process is draining.
    pub stopping: Arc<AtomicBool>,
}

/// The routes of this capability.
pub fn routes(health: Health) -> Router {
    Router::new()
        .route("/healthz", get(show_health))
        .route("/health", get(show_health_with_version))
        .route("/readyz", get(show_readiness))
        .route("/metrics", get(show_metrics))
        .with_state(health)
}

impl Health {
    /// What operators should know, by stable names.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let authority = self.pki.authority();
        let mut warnings = Vec::new();
        if authority.org_ca_has_legacy_path_len() {
            warnings.push("org_ca_legacy_pathlen_zero".to_owned());
        }
        if authority.org_ca.not_after() <= self.pki.clock.now().seconds() {
            warnings.push("org_ca_expired".to_owned());
        }
        let findings = self.updates.findings();
        warnings.extend(findings.impossible.iter().cloned());
        warnings.extend(findings.failing.iter().map(|id| format!("update_check_failed:{id}")));
        warnings
    }

    /// The page's body: both further keys are left out when there is nothing to say.
    async fn body(&self) -> Map<String, Value> {
        let mut body = Map::new();
        body.insert("status".to_owned(), json!("ok"));
        let warnings = self.warnings();
        if !warnings.is_empty() {
            body.insert("warnings".to_owned(), json!(warnings));
        }
        // The process is alive even when the database is not; then the number is left out.
        let waiting: i64 = self.updates.counts().await.map_or(0, |counts| {
            counts
                .iter()
                .filter(|(status, _)| matches!(*status, "pending" | "failed"))
                .map(|(_, count)| count)
                .sum()
        });
        if waiting > 0 {
            body.insert("pending_updates".to_owned(), json!(waiting));
        }
        body
    }

    async fn snapshot(&self) -> Result<Snapshot, UpdateError> {
        let counts = self.updates.counts().await?;
        let of = |status: &str| {
            counts
                .iter()
                .find(|(name, _)| *name == status)
                .map_or(0, |(_, count)| u64::try_from(*count).unwrap_or(0))
        };
        let mut tx = self.pki.store.read().await?;
        let halt = crate::updates::halt::read(&mut tx).await?;
        let agents = crate::enrollment::store::counts(&mut tx).await?;
        let expiring = crate::enrollment::store::expiring(&mut tx, self.pki.clock.now().seconds()).await?;
        let (retiring, on_old_leaf) = self.updates.overlap_counts(&mut tx).await?;
        drop(tx);
        let number = |count: i64| u64::try_from(count).unwrap_or(0);
        let authority = self.pki.authority();
        let mut certificates = vec![
            (CertificateTier::OrgCa, authority.org_ca.not_after().0),
            (CertificateTier::TlsServer, self.tls.not_after().0),
        ];
        if let Some(mastio_ca) = &authority.mastio_ca {
            certificates.push((CertificateTier::MastioCa, mastio_ca.not_after().0));
        }
        if let Some(certificate) = authority.active_token_key().and_then(|key| key.certificate.as_ref()) {
            certificates.push((CertificateTier::TokenKey, certificate.not_after().0));
        }
        Ok(Snapshot {
            updates_pending: of("pending"),
            updates_applied: of("applied"),
            updates_rolled_back: of("rolled_back"),
            updates_failed: of("failed"),
            sign_halted: !halt.reasons.is_empty(),
            rotation_staged: halt
                .reasons
                .iter()
                .any(|reason| matches!(reason, HaltReason::StagedRotation { .. })),
            legacy_ca_pathlen_zero: authority.org_ca_has_legacy_path_len(),
            update_checks_failing: self.updates.findings().failing.len() as u64,
            retiring_anchors: u64::try_from(retiring).unwrap_or(0),
            agents_on_old_leaf: u64::try_from(on_old_leaf).unwrap_or(0),
            certificates,
            agents_expiring: [
                ("expired", number(expiring.expired)),
                ("7d", number(expiring.within_7_days)),
                ("30d", number(expiring.within_30_days)),
            ],
            agents: agents
                .into_iter()
                .map(|(kind, active, count)| AgentCount {
                    enrollment: kind.as_str(),
                    active,
                    count: u64::try_from(count).unwrap_or(0),
                })
                .collect(),
        })
    }
}

async fn show_health(State(health): State<Health>) -> axum::Json<Value> {
    axum::Json(Value::Object(health.body().await))
}

async fn show_health_with_version(State(health): State<Health>) -> axum::Json<Value> {
    let mut body = health.body().await;
    body.insert("version".to_owned(), json!(health.version));
    axum::Json(Value::Object(body))
}

async fn show_readiness(State(health): State<Health>) -> Response {
    let reads = match health.pki.store.read().await {
        Ok(mut tx) => tx.row("SELECT epoch FROM audit_head WHERE id = 1", &[]).await.is_ok(),
        Err(_) => false,
    };
    // Nothing is answered that cannot be recorded, so a database that only reads serves nobody.
    let database = match (reads, health.pki.store.obstacle()) {
        (false, _) => Some("unavailable"),
        (true, obstacle) => obstacle.map(Obstacle::as_str),
    };
    let stopping = health.stopping.load(Ordering::SeqCst);
    let signing = health.pki.halted().is_ok();
    let redis = health.claims.as_ref().map(Claims::is_reachable);
    let ready = database.is_none() && redis != Some(false) && !stopping;
    let word = |good: bool, bad: &'static str| if good { "ok" } else { bad };
    let mut body = json!({
        "status": if ready { "ready" } else { "not_ready" },
        "checks": {
            "database": database.unwrap_or("ok"),
            "process": word(!stopping, "stopping"),
            // A halted deploy is ready: it has to be reached to be repaired.
            "signing": word(signing, "halted"),
        },
    });
    if let Some(redis) = redis {
        body["checks"]["redis"] = json!(word(redis, "unreachable"));
    }
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, axum::Json(body)).into_response()
}

async fn show_metrics(State(health): State<Health>) -> Response {
    match health.snapshot().await {
        Ok(snapshot) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], health.metrics.render(&snapshot))
            .into_response(),
        Err(error) => crate::http::error::ApiError::from(error).into_response(),
    }
}
