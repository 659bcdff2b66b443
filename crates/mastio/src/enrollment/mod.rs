//! Agents: who they are, how a certificate that a connection proved becomes an agent, and how one is created.
//!
//! The TLS handshake proves that the client holds the certificate's key. Here the rest is judged, on each request: the
//! identity that the certificate names, whether the agent exists and is active, whether the certificate is registered
//! for it, and whether it chains to an anchor that is current or retiring. Each refusal is a 401 with a stable reason.
//! What was judged is kept for as long as the epoch stands: every write to `internal_agents` moves it.

pub mod error;
pub mod http;
pub mod store;

use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::{Certificate, identity};
use moka::future::Cache;
use serde_json::json;

use crate::http::context::Context;
use crate::http::limits::RateLimit;
use crate::pki::keys::PrivateKey;
use crate::pki::store::{CertificateFacts, set_certificate_facts};
use crate::pki::{Pki, PkiError};
use crate::store::StoreError;
use crate::updates::halt::EnrollmentType;
pub use error::{EnrollmentError, IdentityError};

/// Certificates and agents that are remembered between requests.
const CACHE_ENTRIES_MAX: u64 = 50_000;
/// RFC 5280 appendix A.1, ub-common-name: the agent's id is its certificate's common name.
const COMMON_NAME_CHARACTERS_MAX: usize = 64;
/// How often an issuance whose epoch moved is made again before the caller is told to come back.
const STALE_ROUNDS_MAX: usize = 5;

/// An agent as its row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// `<org>::<name>`.
    pub agent_id: String,
    /// For people.
    pub display_name: String,
    /// What it may do, as tools demand it.
    pub capabilities: Vec<String>,
    /// Leaf and what follows it, PEM.
    pub cert_pem: Option<String>,
    /// The present leaf, read once; absent where there is none that can be read.
    pub leaf: Option<Certificate>,
    /// Whether it may do anything at all.
    pub is_active: bool,
    /// How it came to its identity.
    pub enrollment: EnrollmentType,
    /// Thumbprint of its persistent DPoP key, where one is pinned.
    pub dpop_jkt: Option<String>,
    /// `agent` or `workload`.
    pub principal_type: String,
    /// The leaf before the present one, in its grace.
    pub previous_cert_pem: Option<String>,
    /// The DPoP key before the present one, in its grace.
    pub previous_dpop_jkt: Option<String>,
    /// Until when the two above are accepted.
    pub previous_until: Option<UnixTime>,
    /// Whether it is published to a federation.
    pub federated: bool,
    /// When its row was made.
    pub created_at: String,
}

/// An agent that a certificate proved, at one epoch.
#[derive(Debug, Clone)]
pub struct ProvenAgent {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The certificate it presented.
    pub certificate: Certificate,
    /// The epoch at which this was judged.
    pub epoch: i64,
}

/// A newly created agent, with the key that is handed over once.
pub struct CreatedAgent {
    /// The agent.
    pub agent: Agent,
    /// Its private key, PKCS#8 PEM; shown here and never again.
    pub private_key_pem: zeroize::Zeroizing<String>,
}

/// The agents of this deploy.
pub struct Agents {
    pki: Arc<Pki>,
    limit: RateLimit,
    by_id: Cache<String, (i64, Option<Arc<Agent>>)>,
    by_certificate: Cache<Arc<[u8]>, Arc<ProvenAgent>>,
}

impl Agents {
    /// The agents in `pki`'s database, each with an allowance of requests.
    #[must_use]
    pub fn new(pki: Arc<Pki>, limit: RateLimit) -> Self {
        Self {
            limit,
            pki,
            by_id: Cache::new(CACHE_ENTRIES_MAX),
            by_certificate: Cache::new(CACHE_ENTRIES_MAX),
        }
    }

    /// The certificate authority.
    #[must_use]
    pub fn pki(&self) -> &Arc<Pki> {
        &self.pki
    }

    /// The agent of this id, as it stands at the present epoch.
    pub async fn agent(&self, agent_id: &str) -> Result<Option<Arc<Agent>>, StoreError> {
        let epoch = self.pki.authority().epoch;
        if let Some((at, agent)) = self.by_id.get(agent_id).await
            && at == epoch
        {
            return Ok(agent);
        }
        let mut tx = self.pki.store.read().await?;
        let agent = store::agent(&mut tx, agent_id).await?.map(Arc::new);
        // Read after the epoch was taken: if the row moved in between, the entry is a newer row under an older epoch,
        // which only makes it be read again.
        self.by_id.insert(agent_id.to_owned(), (epoch, agent.clone())).await;
        Ok(agent)
    }

    /// Judges the certificate that a connection proved (wire contract §1.2, design §4).
    ///
    /// Errors: [`IdentityError`], each with a stable reason and answered with 401.
    pub async fn authenticate(&self, context: &Context) -> Result<Arc<ProvenAgent>, IdentityError> {
        let proven = self.prove(context.client_certificate.as_ref(), context.now.seconds()).await?;
        self.admit(&proven.agent.agent_id, context)?;
        Ok(proven)
    }

    /// Takes one request from an agent's allowance. Errors: [`IdentityError::Limited`] when none is left.
    pub fn admit(&self, agent_id: &str, context: &Context) -> Result<(), IdentityError> {
        if self.limit.admit(agent_id, context.now) { Ok(()) } else { Err(IdentityError::Limited) }
    }

    async fn prove(&self, der: Option<&Arc<[u8]>>, now: UnixTime) -> Result<Arc<ProvenAgent>, IdentityError> {
        let der = der.ok_or(IdentityError::Missing)?;
        let authority = self.pki.authority();
        if let Some(proven) = self.by_certificate.get(der).await
            && proven.epoch == authority.epoch
            && still_valid(&proven, now)
        {
            return Ok(proven);
        }
        let certificate = Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
        let agent = self.registered(&certificate, None, now).await?;
        authority.validate_client(&certificate, &[], now).map_err(IdentityError::Path)?;
        let proven = Arc::new(ProvenAgent { agent, certificate, epoch: authority.epoch });
        self.by_certificate.insert(Arc::clone(der), Arc::clone(&proven)).await;
        Ok(proven)
    }

    /// Judges a leaf that a client assertion presented, with what stood beside it in `x5c`.
    pub async fn authenticate_assertion(
        &self,
        leaf: &Certificate,
        presented: &[Certificate],
        subject: &str,
        now: UnixTime,
    ) -> Result<ProvenAgent, IdentityError> {
        let authority = self.pki.authority();
        let agent = self.registered(leaf, Some(subject), now).await?;
        let key: Arc<[u8]> = Arc::from(leaf.der());
        // The path of a certificate that a connection has proved at this epoch is known to be good.
        let known = self
            .by_certificate
            .get(&key)
            .await
            .is_some_and(|proven| proven.epoch == authority.epoch && still_valid(&proven, now));
        if !known {
            authority.validate_client(leaf, presented, now).map_err(IdentityError::Path)?;
            let proven =
                ProvenAgent { agent: Arc::clone(&agent), certificate: leaf.clone(), epoch: authority.epoch };
            self.by_certificate.insert(key, Arc::new(proven)).await;
        }
        Ok(ProvenAgent { agent, certificate: leaf.clone(), epoch: authority.epoch })
    }

    /// The active agent for which `certificate` is registered: as its present leaf; as a superseded one with the
    /// present key; or as the previous one inside its grace.
    async fn registered(
        &self,
        certificate: &Certificate,
        subject: Option<&str>,
        now: UnixTime,
    ) -> Result<Arc<Agent>, IdentityError> {
        let named = identity::identity(certificate).map_err(|_| IdentityError::NoIdentity)?;
        if named.org_id != self.pki.authority().org_id {
            return Err(IdentityError::OrgMismatch);
        }
        let agent_id = named.agent_id();
        if subject.is_some_and(|subject| subject != agent_id) {
            return Err(IdentityError::SubjectMismatch);
        }
        let agent = self
            .agent(&agent_id)
            .await?
            .filter(|agent| agent.is_active)
            .ok_or(IdentityError::UnknownOrInactive)?;
        let present = agent.leaf.as_ref().ok_or(IdentityError::PinMismatch)?;
        if present.der() == certificate.der() {
            return Ok(agent);
        }
        let in_grace = agent.previous_until.is_some_and(|until| now < until)
            && agent
                .previous_cert_pem
                .as_deref()
                .and_then(|pem| Certificate::from_pem(pem).ok())
                .is_some_and(|previous| previous.der() == certificate.der());
        if in_grace {
            return Ok(agent);
        }
        if present.spki_der() == certificate.spki_der() {
            let mut tx = self.pki.store.read().await?;
            if store::is_superseded(&mut tx, &certificate.fingerprint(), &agent_id).await? {
                return Ok(agent);
            }
        }
        Err(IdentityError::PinMismatch)
    }

    /// Creates an agent whose key we make and hand over once (wire contract §3.2).
    ///
    /// `name`: `[a-zA-Z0-9._-]{1,64}`. Errors: [`EnrollmentError::Exists`]; [`PkiError::Halted`] under a halt.
    pub async fn create_managed(
        &self,
        name: &str,
        display_name: &str,
        capabilities: &[String],
        federated: bool,
        actor: &str,
    ) -> Result<CreatedAgent, EnrollmentError> {
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            let now = self.pki.clock.now().seconds();
            let agent_id = format!("{}::{name}", authority.org_id);
            if agent_id.chars().count() > COMMON_NAME_CHARACTERS_MAX {
                let problem = format!(
                    "makes {agent_id} longer than the {COMMON_NAME_CHARACTERS_MAX} characters of a common name"
                );
                return Err(EnrollmentError::Field { field: "agent_name", problem });
            }
            let spiffe_id = format!("spiffe://{}/{}/{name}", self.pki.trust_domain, authority.org_id);
            let new = PrivateKey::generate_p256().map_err(PkiError::from)?;
            let (leaf, chain) = authority.issue_agent_leaf(
                &permit,
                &self.pki.entropy,
                &agent_id,
                &spiffe_id,
                new.key.spki_der(),
                now,
            )?;
            let mut tx = self.pki.store.write().await?;
            if tx.epoch() != permit.epoch() {
                drop(tx);
                self.pki.refresh().await?;
                continue;
            }
            if store::agent(&mut tx, &agent_id).await?.is_some() {
                return Err(EnrollmentError::Exists(agent_id));
            }
            let agent = Agent {
                agent_id: agent_id.clone(),
                display_name: display_name.to_owned(),
                capabilities: capabilities.to_vec(),
                cert_pem: Some(chain),
                leaf: Some(leaf.clone()),
                is_active: true,
                enrollment: EnrollmentType::Connector,
                dpop_jkt: None,
                principal_type: "agent".to_owned(),
                previous_cert_pem: None,
                previous_dpop_jkt: None,
                previous_until: None,
                federated,
                created_at: now.to_rfc3339(),
            };
            store::insert(&mut tx, &agent, "connector", &spiffe_id).await?;
            let facts = CertificateFacts::issued_by(&leaf, authority.mastio_ca.as_ref());
            set_certificate_facts(&mut tx, &[facts.row(&agent_id)]).await?;
            let key_name = format!("agent_key:{agent_id}");
            let sealed = new
                .seal(self.pki.sealing(), &crate::pki::store::config_place(&key_name))
                .map_err(PkiError::from)?;
            crate::pki::store::set_config(&mut tx, &key_name, &sealed).await?;
            tx.commit(&[Event {
                event_type: EventType::AgentCreated,
                actor: actor.to_owned(),
                details: json!({
                    "agent_id": agent_id,
                    "enrollment": "connector",
                    "serial": leaf.serial_hex(),
                    "fingerprint": leaf.fingerprint(),
                    "not_after": leaf.not_after().to_rfc3339(),
                }),
            }])
            .await?;
            self.pki.refresh().await?;
            return Ok(CreatedAgent { agent, private_key_pem: new.hand_over() });
        }
        Err(EnrollmentError::Busy)
    }

    /// Pins an agent's persistent DPoP key; the one before stays good for 48 hours.
    pub async fn set_dpop_key(&self, agent_id: &str, jkt: &str, actor: &str) -> Result<(), EnrollmentError> {
        let now = self.pki.clock.now().seconds();
        let mut tx = self.pki.store.write().await?;
        if !store::set_dpop_jkt(&mut tx, agent_id, jkt, now.plus(GRACE_S)).await? {
            return Err(EnrollmentError::Unknown(agent_id.to_owned()));
        }
        tx.commit(&[Event {
            event_type: EventType::AgentDpopKeySet,
            actor: actor.to_owned(),
            details: json!({ "agent_id": agent_id, "dpop_jkt": jkt }),
        }])
        .await?;
        self.pki.refresh().await?;
        Ok(())
    }

    /// Every agent, a page at a time, by id after `after`.
    pub async fn list(&self, after: &str, limit: i64) -> Result<Vec<Agent>, EnrollmentError> {
        Ok(store::page(&mut self.pki.store.read().await?, after, limit).await?)
    }

    /// Deactivates an agent: its next request is refused everywhere. The row stays.
    pub async fn deactivate(&self, agent_id: &str, actor: &str) -> Result<(), EnrollmentError> {
        let now = self.pki.clock.now().seconds();
        let mut tx = self.pki.store.write().await?;
        if !store::deactivate(&mut tx, agent_id, now).await? {
            return Err(EnrollmentError::Unknown(agent_id.to_owned()));
        }
        tx.commit(&[Event {
            event_type: EventType::AgentDeactivated,
            actor: actor.to_owned(),
            details: json!({ "agent_id": agent_id }),
        }])
        .await?;
        self.pki.refresh().await?;
        Ok(())
    }

    /// The canonical form of an id that may be given bare: `name` becomes `<org>::name`.
    #[must_use]
    pub fn canonical(&self, agent_id: &str) -> String {
        if agent_id.contains("::") {
            agent_id.to_owned()
        } else {
            format!("{}::{agent_id}", self.pki.authority().org_id)
        }
    }
}

/// A replaced key or certificate stays good for 48 hours (wire contract §3.1).
const GRACE_S: i64 = 48 * 3600;

fn still_valid(proven: &ProvenAgent, now: UnixTime) -> bool {
    proven.certificate.not_before() <= now && now < proven.certificate.not_after()
}
