//! `/proxy/pki`, `/proxy/mastio-key` and `/proxy/audit`: what the organisation vouches with, and what it has recorded.

use askama::Template;
use mastio_core::audit::event::EventType;
use mastio_core::x509::{Certificate, KeyAlgorithm};
use serde::Deserialize;
use serde_json::Value;

use super::error::DashboardError;
use super::{Dashboard, Frame};
use crate::audit::{self, Filter, Verdict};
use crate::http::authn::Session;
use crate::store::{Store, StoreError};

/// Events on a page.
const PAGE_ROWS: i64 = 50;

/// A certificate as pages show it.
pub(super) struct CertificateView {
    pub role: &'static str,
    pub subject: String,
    pub issuer: String,
    pub serial: String,
    pub key: String,
    pub fingerprint: String,
    pub spki_sha256: String,
    pub not_before: String,
    pub not_after: String,
    pub path_len: Option<u32>,
}

impl CertificateView {
    pub fn of(role: &'static str, certificate: &Certificate) -> Self {
        Self {
            role,
            subject: certificate.subject_display(),
            issuer: certificate.issuer_display(),
            serial: certificate.serial_hex(),
            key: match certificate.key_algorithm() {
                KeyAlgorithm::P256 => "P-256".to_owned(),
                KeyAlgorithm::Rsa { .. } => "RSA".to_owned(),
                _ => "other".to_owned(),
            },
            fingerprint: certificate.fingerprint(),
            spki_sha256: certificate.spki_sha256(),
            not_before: certificate.not_before().to_rfc3339(),
            not_after: certificate.not_after().to_rfc3339(),
            path_len: certificate.basic_constraints().and_then(|constraints| constraints.path_len),
        }
    }
}

/// An event of the audit log.
pub(super) struct Event {
    pub seq: i64,
    pub timestamp: String,
    pub event_type: String,
    pub actor: String,
    /// The details on one line.
    pub summary: String,
    pub details: String,
    pub prev_hash: String,
    pub hash: String,
}

/// `name value` for the plain members of an object, separated by commas: a line to skim, not to parse.
fn summary(details: &Value) -> String {
    let members = details.as_object().into_iter().flatten().filter_map(|(name, value)| match value {
        Value::String(text) => Some(format!("{name} {text}")),
        Value::Number(_) | Value::Bool(_) => Some(format!("{name} {value}")),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    });
    let line = members.collect::<Vec<_>>().join(", ");
    if line.is_empty() { "—".to_owned() } else { line }
}

impl Event {
    fn of(event: &Value) -> Self {
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        Self {
            seq: event["seq"].as_i64().unwrap_or(0),
            timestamp: text("timestamp"),
            event_type: text("event_type"),
            actor: text("actor"),
            summary: summary(&event["details"]),
            details: serde_json::to_string_pretty(&event["details"]).unwrap_or_default(),
            prev_hash: text("prev_hash"),
            hash: text("hash"),
        }
    }
}

/// Events, newest first.
pub(super) async fn events(store: &Store, filter: &Filter) -> Result<Vec<Event>, StoreError> {
    Ok(audit::list(store, filter).await?.iter().map(Event::of).collect())
}

/// `/proxy/pki`.
#[derive(Template)]
#[template(path = "pki.html")]
pub(super) struct PkiPage {
    frame: Frame,
    chain: Vec<CertificateView>,
    retiring: Vec<(CertificateView, bool)>,
    tls_not_after: String,
    legacy: bool,
}

/// A token key.
pub(super) struct Key {
    kid: String,
    state: &'static str,
    class: &'static str,
    activated_at: Option<String>,
    deprecated_at: Option<String>,
    expires_at: Option<String>,
    thumbprint: String,
}

/// `/proxy/mastio-key`.
#[derive(Template)]
#[template(path = "keys.html")]
pub(super) struct KeysPage {
    frame: Frame,
    keys: Vec<Key>,
}

/// `/proxy/audit`.
#[derive(Template)]
#[template(path = "audit.html")]
pub(super) struct AuditPage {
    frame: Frame,
    events: Vec<Event>,
    types: Vec<(&'static str, bool)>,
    event_type: String,
    subject: String,
    next: Option<i64>,
    /// Whether the newest events are shown, so that newer ones may join them.
    follows: bool,
    verdict: Option<Verdict>,
}

/// The part of [`AuditPage`] that moves.
#[derive(Template)]
#[template(path = "events.html")]
pub(super) struct EventsFragment {
    events: Vec<Event>,
}

/// `/proxy/audit/{seq}`.
#[derive(Template)]
#[template(path = "event.html")]
pub(super) struct EventPage {
    frame: Frame,
    event: Event,
    link: Result<(), String>,
    before: Option<i64>,
    after: Option<i64>,
    command: String,
}

/// What the audit page is asked for.
#[derive(Debug, Default, Deserialize)]
pub(super) struct AuditQuery {
    #[serde(default)]
    event_type: String,
    #[serde(default)]
    subject: String,
    before: Option<i64>,
}

impl AuditQuery {
    fn event_type(&self) -> Option<EventType> {
        EventType::parse(&self.event_type)
    }

    fn filter(&self, limit: i64) -> Filter {
        let subject = self.subject.trim();
        Filter {
            event_type: self.event_type().map(|wanted| wanted.as_str().to_owned()),
            subject: (!subject.is_empty()).then(|| subject.to_owned()),
            before: self.before,
            limit,
            ..Filter::default()
        }
    }
}

impl Dashboard {
    pub(super) async fn pki_page(&self, session: &Session) -> Result<PkiPage, DashboardError> {
        let authority = self.pki().authority();
        let mut chain = vec![CertificateView::of("Org CA", &authority.org_ca)];
        chain.extend(authority.mastio_ca.as_ref().map(|ca| CertificateView::of("Mastio CA", ca)));
        let retiring = authority.retiring.iter().map(|anchor| {
            (CertificateView::of("Retiring Org CA", &anchor.certificate), anchor.key.is_some())
        });
        Ok(PkiPage {
            frame: self.frame(Some(session), "pki", "PKI").await?,
            chain,
            retiring: retiring.collect(),
            tls_not_after: self.health.tls.not_after().to_rfc3339(),
            legacy: authority.org_ca_has_legacy_path_len(),
        })
    }

    pub(super) async fn keys_page(&self, session: &Session) -> Result<KeysPage, DashboardError> {
        let now = self.pki().clock.now().seconds();
        let authority = self.pki().authority();
        let keys = authority.token_keys.iter().map(|key| {
            let (state, class) = match (key.activated_at, key.deprecated_at) {
                (None, _) => ("staged", "bad"),
                (Some(_), None) => ("signs", "good"),
                (Some(_), Some(_)) if key.verifies_at(now) => {
                    ("in grace: verifies, does not sign", "waiting")
                }
                (Some(_), Some(_)) => ("over", "over"),
            };
            let text = |time: Option<mastio_core::time::UnixTime>| time.map(|time| time.to_rfc3339());
            Key {
                kid: key.kid.clone(),
                state,
                class,
                activated_at: text(key.activated_at),
                deprecated_at: text(key.deprecated_at),
                expires_at: text(key.expires_at),
                thumbprint: key.public.thumbprint(),
            }
        });
        let keys = keys.collect();
        Ok(KeysPage { frame: self.frame(Some(session), "keys", "Signing keys").await?, keys })
    }

    /// Events as the query wants them. `verify`: the whole chain is verified now.
    pub(super) async fn audit_page(
        &self,
        session: &Session,
        query: &AuditQuery,
        verify: bool,
    ) -> Result<AuditPage, DashboardError> {
        let wanted = query.event_type();
        let store = &self.pki().store;
        let mut events = events(store, &query.filter(PAGE_ROWS + 1)).await?;
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = events.len() > rows;
        events.truncate(rows);
        let next = if more { events.last().map(|event| event.seq) } else { None };
        let verdict = if verify { Some(audit::verify(store).await?) } else { None };
        let mut types: Vec<(&'static str, bool)> =
            EventType::ALL.iter().map(|kind| (kind.as_str(), Some(*kind) == wanted)).collect();
        types.sort_unstable();
        Ok(AuditPage {
            frame: self.frame(Some(session), "audit", "Audit").await?,
            events,
            types,
            event_type: wanted.map(|wanted| wanted.as_str().to_owned()).unwrap_or_default(),
            subject: query.subject.trim().to_owned(),
            next,
            follows: query.before.is_none(),
            verdict,
        })
    }

    /// The newest events, for a page that follows them.
    pub(super) async fn audit_rows(&self, query: &AuditQuery) -> Result<EventsFragment, DashboardError> {
        Ok(EventsFragment { events: events(&self.pki().store, &query.filter(PAGE_ROWS)).await? })
    }

    pub(super) async fn event_page(&self, session: &Session, seq: i64) -> Result<EventPage, DashboardError> {
        let placed = audit::event(&self.pki().store, seq).await?;
        let placed = placed.ok_or_else(|| DashboardError::NotFound(format!("event {seq}")))?;
        let (after, before) = (seq.saturating_sub(1), seq.saturating_add(1));
        Ok(EventPage {
            frame: self.frame(Some(session), "audit", format!("Event {seq}")).await?,
            event: Event::of(&placed.event),
            link: placed.link.map_err(|broken| broken.to_string()),
            before: placed.before,
            after: placed.after,
            command: format!(
                "curl -sk \"https://localhost:9443/v1/admin/audit?after={after}&before={before}\" \
                 -H \"X-Admin-Secret: $ADMIN_SECRET\" | jq"
            ),
        })
    }
}
