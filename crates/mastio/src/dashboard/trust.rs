//! `/proxy/pki`, `/proxy/mastio-key` and `/proxy/audit`: what the organisation vouches with, and what it has recorded.

use askama::Template;
use mastio_core::audit::event::EventType;
use mastio_core::x509::{Certificate, KeyAlgorithm};
use serde::Deserialize;
use serde_json::Value;

use super::error::DashboardError;
use super::{Dashboard, Frame, shell_word};
use crate::audit::{self, Filter, Verdict};
use crate::gateway::definition::sha256_hex;
use crate::http::authn::Session;
use crate::pki::PkiError;
use crate::pki::store::hex;
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

/// The latest events about runs of an update, oldest first, each with the run that it names.
pub(super) async fn events_of_update(
    store: &Store,
    migration_id: &str,
) -> Result<Vec<(String, Event)>, StoreError> {
    /// Of each type; runs come one at a time, and rarely.
    const LATEST: i64 = 50;
    const TYPES: [EventType; 6] = [
        EventType::UpdateSnapshotTaken,
        EventType::UpdateApplied,
        EventType::UpdateApplyFailed,
        EventType::UpdateRolledBack,
        EventType::UpdateRollbackFailed,
        EventType::UpdateVerified,
    ];
    let mut found = Vec::new();
    for kind in TYPES {
        let filter =
            Filter { event_type: Some(kind.as_str().to_owned()), limit: LATEST, ..Filter::default() };
        for event in audit::list(store, &filter).await? {
            let details = &event["details"];
            if details["migration_id"] == migration_id
                && let Some(run_id) = details["run_id"].as_str()
            {
                found.push((run_id.to_owned(), Event::of(&event)));
            }
        }
    }
    found.sort_by_key(|(_, event)| event.seq);
    Ok(found)
}

/// `/proxy/pki`.
#[derive(Template)]
#[template(path = "pki.html")]
pub(super) struct PkiPage {
    frame: Frame,
    chain: Vec<CertificateView>,
    /// Each with whether its key is here.
    retiring: Vec<(CertificateView, bool)>,
    /// What the present root and the retiring ones say of each other.
    cross: Vec<CertificateView>,
    token_key: Option<CertificateView>,
    tls_not_after: String,
    tls_is_own: bool,
    crls: Vec<List>,
    bundle_sha256: String,
    legacy: bool,
}

/// A revocation list.
pub(super) struct List {
    issuer: &'static str,
    /// Nothing: its issuer's key is not here.
    signed: Option<SignedList>,
}

/// A revocation list that is signed.
pub(super) struct SignedList {
    number: i64,
    this_update: String,
    next_update: String,
    path: String,
    sha256: String,
}

/// An agent that an overlap is for.
#[derive(Debug, Deserialize)]
pub(super) struct Holding {
    agent_id: String,
    #[serde(default)]
    enrollment: Option<String>,
    #[serde(default)]
    next: Option<String>,
}

/// `/proxy/pki/overlap`.
#[derive(Template)]
#[template(path = "overlap.html")]
pub(super) struct OverlapPage {
    frame: Frame,
    overlap: bool,
    /// Active, seen with the present leaf, seen with a former one, not seen.
    counts: [i64; 4],
    old_leaves: Vec<Holding>,
    blocking_count: i64,
    blocking: Vec<Holding>,
    cannot_be_seen: Vec<String>,
    ends_rollback_of: Vec<String>,
    /// Why the overlap cannot be ended now.
    refused: Option<String>,
    /// Whether it could be, at the price of agents that still present a former leaf.
    breaks: bool,
    org_id: String,
}

/// A token key.
pub(super) struct Key {
    kid: String,
    state: &'static str,
    class: &'static str,
    activated_at: Option<String>,
    deprecated_at: Option<String>,
    expires_at: Option<String>,
    certificate_ends: Option<String>,
    thumbprint: String,
}

/// `/proxy/mastio-key`.
#[derive(Template)]
#[template(path = "keys.html")]
pub(super) struct KeysPage {
    frame: Frame,
    keys: Vec<Key>,
    /// Staged keys, each with the command that drops it.
    staged: Vec<(String, String)>,
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
        let issuers = [("Mastio CA", authority.mastio_ca.as_ref()), ("Org CA", Some(&authority.org_ca))];
        let mut crls = Vec::new();
        for (issuer, certificate) in issuers {
            let Some(certificate) = certificate else { continue };
            let key_id = hex(&certificate.key_id());
            let signed = match self.pki().crl(Some(&key_id)).await {
                Ok(crl) => Some(SignedList {
                    number: crl.number,
                    this_update: crl.this_update.to_rfc3339(),
                    next_update: crl.next_update.to_rfc3339(),
                    path: format!("/pki/crl/{key_id}"),
                    sha256: sha256_hex(&crl.der()?),
                }),
                Err(PkiError::NoCrl) => None,
                Err(error) => return Err(error.into()),
            };
            crls.push(List { issuer, signed });
        }
        let cross = authority.cross_certificates.iter();
        let token_key = authority.active_token_key().and_then(|key| key.certificate.as_ref());
        Ok(PkiPage {
            frame: self.frame(Some(session), "pki", "PKI").await?,
            chain,
            retiring: retiring.collect(),
            cross: cross
                .map(|certificate| CertificateView::of("Org CA, cross-signed", certificate))
                .collect(),
            token_key: token_key.map(|certificate| CertificateView::of("Token key", certificate)),
            tls_not_after: self.health.tls.not_after().to_rfc3339(),
            tls_is_own: self.health.tls.has_own_files(),
            crls,
            bundle_sha256: sha256_hex(authority.bundle_pem().as_bytes()),
            legacy: authority.org_ca_has_legacy_path_len(),
        })
    }

    /// A certificate of ours by its fingerprint, PEM. Errors: [`DashboardError::NotFound`].
    pub(super) fn certificate_pem(&self, fingerprint: &str) -> Result<String, DashboardError> {
        let authority = self.pki().authority();
        let mut ours = std::iter::once(&authority.org_ca)
            .chain(&authority.mastio_ca)
            .chain(authority.retiring.iter().map(|anchor| &anchor.certificate))
            .chain(&authority.cross_certificates)
            .chain(authority.token_keys.iter().filter_map(|key| key.certificate.as_ref()));
        let found = ours.find(|certificate| certificate.fingerprint() == fingerprint);
        found
            .map(Certificate::to_pem)
            .ok_or_else(|| DashboardError::NotFound(format!("certificate {fingerprint} of ours")))
    }

    pub(super) async fn overlap_page(&self, session: &Session) -> Result<OverlapPage, DashboardError> {
        let told = self.health.updates.overlap().await?;
        let number = |value: &Value| value.as_i64().unwrap_or(0);
        let agents = &told["agents"];
        let texts = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let holding = |value: &Value| -> Vec<Holding> {
            value.as_array().into_iter().flatten().filter_map(|row| Holding::deserialize(row).ok()).collect()
        };
        let settling = &told["settling"];
        let refused = &settling["refused"];
        Ok(OverlapPage {
            frame: self.frame(Some(session), "pki", "The trust overlap").await?,
            overlap: told["overlap"] == true,
            counts: ["active", "on_present_leaf", "on_old_leaf", "not_seen"]
                .map(|name| number(&agents[name])),
            old_leaves: holding(&told["on_old_leaf"]),
            blocking_count: number(&told["blocking"]["count"]),
            blocking: holding(&told["blocking"]["agents"]),
            cannot_be_seen: texts(&told["cannot_be_seen"]),
            ends_rollback_of: texts(&settling["ends_rollback_of"]),
            breaks: refused["reason"] == "agents_on_old_leaf",
            refused: refused["message"].as_str().or_else(|| refused.as_str()).map(str::to_owned),
            org_id: self.pki().authority().org_id.clone(),
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
                certificate_ends: text(key.certificate.as_ref().map(Certificate::not_after)),
                thumbprint: key.public.thumbprint(),
            }
        });
        let keys: Vec<Key> = keys.collect();
        let staged = keys.iter().filter(|key| key.activated_at.is_none() && key.deprecated_at.is_none());
        let staged = staged.map(|key| (key.kid.clone(), self.drop_command(&key.kid))).collect();
        Ok(KeysPage { frame: self.frame(Some(session), "keys", "Signing keys").await?, keys, staged })
    }

    /// How an operator drops a staged key: rows of this table are theirs to change, and the halt follows.
    fn drop_command(&self, kid: &str) -> String {
        let kid = kid.replace('\'', "''");
        let sql = format!(
            "DELETE FROM mastio_keys WHERE kid = '{kid}' AND activated_at IS NULL AND deprecated_at IS NULL"
        );
        match self.pki().store.sqlite_path() {
            Some(path) => {
                format!("sqlite3 {} {}", shell_word(&path.display().to_string()), shell_word(&sql))
            }
            None => format!("psql \"$MCP_PROXY_DATABASE_URL\" -c {}", shell_word(&sql)),
        }
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
