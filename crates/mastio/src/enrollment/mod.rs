//! Agents: who they are, how a certificate that a connection proved becomes an agent, and how one is created.
//!
//! The TLS handshake proves that the client holds the certificate's key. Here the rest is judged, on each request: the
//! identity that the certificate names, whether the agent exists and is active, whether the certificate is registered
//! for it, and whether it chains to an anchor that is current or retiring. Each refusal is a 401 with a stable reason.
//! What was judged is kept for as long as the epoch stands: every write to `internal_agents` moves it.
//!
//! How an agent comes to its identity: [`lifecycle`] makes one whose key we hand over, and has everything that
//! happens to agents afterwards; [`approval`] certifies the key of somebody whom an operator approves. [`external`]
//! takes agents whose owner brings key and certificate. [`revocation`] ends certificates for good.

pub mod approval;
pub mod error;
pub mod external;
pub mod http;
pub mod lifecycle;
pub mod revocation;
mod sightings;
pub mod store;

use std::sync::Arc;

use mastio_core::time::UnixTime;
use mastio_core::x509::{Certificate, identity, path};
use moka::future::Cache;

use crate::http::context::Context;
use crate::http::limits::RateLimit;
use crate::pki::{Authority, Pki};
use crate::store::StoreError;
use crate::store::ephemeral::note_presented;
use crate::updates::halt::EnrollmentType;
use crate::values;
pub use error::{EnrollmentError, IdentityError};
use lifecycle::{Certified, STALE_ROUNDS_MAX, check_capabilities};
pub use lifecycle::{CreatedAgent, PrincipalType};
use sightings::Sightings;

/// Certificates and agents that are remembered between requests.
const CACHE_ENTRIES_MAX: u64 = 50_000;

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
    /// When a certificate of its was revoked last. Tokens from before are void: nobody knows with which one they were
    /// got.
    pub last_revocation: Option<UnixTime>,
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

impl ProvenAgent {
    /// Whether the certificate is the agent's present one, not one that a grace covers or that was superseded.
    fn is_present(&self) -> bool {
        self.agent.leaf.as_ref().is_some_and(|leaf| leaf.der() == self.certificate.der())
    }
}

/// The agents of this deploy.
pub struct Agents {
    pki: Arc<Pki>,
    limit: RateLimit,
    sightings: Sightings,
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
            sightings: Sightings::default(),
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
        self.sight(&proven, context.now.seconds());
        self.admit(&proven.agent.agent_id, context)?;
        Ok(proven)
    }

    /// The same without taking from the agent's allowance, for whoever takes it elsewhere.
    pub async fn prove_connection(&self, context: &Context) -> Result<Arc<ProvenAgent>, IdentityError> {
        self.prove(context.client_certificate.as_ref(), context.now.seconds()).await
    }

    /// Takes one request from an agent's allowance. Errors: [`IdentityError::Limited`] when none is left.
    pub fn admit(&self, agent_id: &str, context: &Context) -> Result<(), IdentityError> {
        if self.limit.admit_told(agent_id, context) { Ok(()) } else { Err(IdentityError::Limited) }
    }

    async fn prove(&self, der: Option<&Arc<[u8]>>, now: UnixTime) -> Result<Arc<ProvenAgent>, IdentityError> {
        let der = der.ok_or(IdentityError::Missing)?;
        let authority = self.pki.current().await?;
        if let Some(proven) = self.known(der, &authority, now).await {
            return Ok(proven);
        }
        let certificate = Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
        let agent = self.registered(&certificate, None, now).await?;
        self.validate(&authority, &agent, &certificate, &[], now).await?;
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
        let authority = self.pki.current().await?;
        let key: Arc<[u8]> = Arc::from(leaf.der());
        let proven = match self.known(&key, &authority, now).await {
            Some(proven) if proven.agent.agent_id == subject => proven,
            _ => {
                let agent = self.registered(leaf, Some(subject), now).await?;
                self.validate(&authority, &agent, leaf, presented, now).await?;
                let proven =
                    Arc::new(ProvenAgent { agent, certificate: leaf.clone(), epoch: authority.epoch });
                self.by_certificate.insert(key, Arc::clone(&proven)).await;
                proven
            }
        };
        self.sight(&proven, now);
        Ok(ProvenAgent::clone(&proven))
    }

    /// The agent of a certificate that was judged at this epoch. What time alone changes is judged again: the
    /// certificate's own end here, and the end of a grace by who asks, for whom nothing is known then.
    async fn known(&self, der: &Arc<[u8]>, authority: &Authority, now: UnixTime) -> Option<Arc<ProvenAgent>> {
        let proven = self.by_certificate.get(der).await?;
        let good = proven.epoch == authority.epoch
            && still_valid(&proven, now)
            && (proven.agent.previous_until.is_none() || proven.is_present());
        good.then_some(proven)
    }

    /// While an Org CA retires, operators want to know who presents which certificate.
    fn sight(&self, proven: &ProvenAgent, now: UnixTime) {
        if !self.pki.authority().retiring.is_empty() {
            self.sightings.note(proven, now);
        }
    }

    /// Writes down who has presented which certificate since the last time.
    pub async fn note_sightings(&self) -> Result<(), StoreError> {
        let mut seen = self.sightings.take();
        // The last word on a certificate counts, and one statement names each row once.
        seen.sort_by(|a, b| {
            (&a.agent_id, &a.fingerprint, b.seen_at).cmp(&(&b.agent_id, &b.fingerprint, a.seen_at))
        });
        seen.dedup_by(|b, a| (&a.agent_id, &a.fingerprint) == (&b.agent_id, &b.fingerprint));
        if seen.is_empty() {
            return Ok(());
        }
        let rows: Vec<_> = seen
            .into_iter()
            .map(|sighting| values![sighting.agent_id, sighting.fingerprint, sighting.seen_at].to_vec())
            .collect();
        note_presented(&self.pki.store, &rows).await
    }

    /// Which agent a certificate names: by the identity of ours in it, or as an SVID that an agent was enrolled with.
    async fn agent_id_of(&self, certificate: &Certificate) -> Result<String, IdentityError> {
        let named = identity::identity(certificate).map_err(|_| IdentityError::NoIdentity);
        let refusal = match named {
            Ok(named) if named.org_id == self.pki.authority().org_id => return Ok(named.agent_id()),
            Ok(_) => IdentityError::OrgMismatch,
            Err(refusal) => refusal,
        };
        // An SVID names one URI (SPIFFE X509-SVID §2).
        let [spiffe_id] = certificate.uri_sans() else { return Err(refusal) };
        let mut tx = self.pki.store.read().await?;
        store::spire_of_id(&mut tx, spiffe_id).await?.map(|identity| identity.agent_id).ok_or(refusal)
    }

    /// Whether a path leads from a registered leaf to whoever may vouch for it: the organisation, or for an agent that was
    /// enrolled with an SVID its bundle and nobody else.
    async fn validate(
        &self,
        authority: &Authority,
        agent: &Agent,
        leaf: &Certificate,
        presented: &[Certificate],
        now: UnixTime,
    ) -> Result<(), IdentityError> {
        if agent.enrollment == EnrollmentType::Spire {
            let mut tx = self.pki.store.read().await?;
            if let Some(identity) = store::spire_of_agent(&mut tx, &agent.agent_id).await? {
                let anchors = external::anchors(&identity.bundle_pem).unwrap_or_default();
                return path::validate(leaf, presented, &[], &anchors, now)
                    .map(drop)
                    .map_err(IdentityError::Path);
            }
        }
        authority.validate_client(leaf, presented, now).map_err(IdentityError::Path)
    }

    /// The agent for whom a token was issued at `issued_at`, and the epoch at which it was judged.
    ///
    /// Errors: [`IdentityError::UnknownOrInactive`]; [`IdentityError::TokenRevoked`] where a certificate of the agent was
    /// revoked since, or the agent is another one of the same name.
    pub async fn token_holder(
        &self,
        agent_id: &str,
        issued_at: UnixTime,
    ) -> Result<(Arc<Agent>, i64), IdentityError> {
        let epoch = self.pki.current().await?.epoch;
        let agent = self
            .agent(agent_id)
            .await?
            .filter(|agent| agent.is_active)
            .ok_or(IdentityError::UnknownOrInactive)?;
        let revoked_since = agent.last_revocation.is_some_and(|revoked_at| issued_at <= revoked_at);
        let before_it_was_made = UnixTime::parse(&agent.created_at).is_some_and(|made| issued_at < made);
        if revoked_since || before_it_was_made {
            return Err(IdentityError::TokenRevoked);
        }
        Ok((agent, epoch))
    }

    /// The active agent for which `certificate` is registered: as its present leaf; as a superseded one with the
    /// present key; or as the previous one inside its grace.
    async fn registered(
        &self,
        certificate: &Certificate,
        subject: Option<&str>,
        now: UnixTime,
    ) -> Result<Arc<Agent>, IdentityError> {
        let agent_id = self.agent_id_of(certificate).await?;
        if subject.is_some_and(|subject| subject != agent_id) {
            return Err(IdentityError::SubjectMismatch);
        }
        let agent = self
            .agent(&agent_id)
            .await?
            .filter(|agent| agent.is_active)
            .ok_or(IdentityError::UnknownOrInactive)?;
        if agent.last_revocation.is_some() {
            let mut tx = self.pki.store.read().await?;
            if crate::pki::revocation::store::is_revoked(&mut tx, &certificate.fingerprint()).await? {
                return Err(IdentityError::Revoked);
            }
        }
        let present = agent.leaf.as_ref().ok_or(IdentityError::PinMismatch)?;
        // Typed principals are pinned by their key (wire contract §1.2).
        let by_key = agent.principal_type != "agent" && present.spki_der() == certificate.spki_der();
        if by_key || present.der() == certificate.der() {
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

/// What time alone changes, and no epoch tells: the certificate's own end, and that of the grace of a former one.
fn still_valid(proven: &ProvenAgent, now: UnixTime) -> bool {
    let ProvenAgent { agent, certificate, .. } = proven;
    let is_present = || agent.leaf.as_ref().is_some_and(|leaf| leaf.der() == certificate.der());
    certificate.not_before() <= now
        && now < certificate.not_after()
        && (agent.previous_until.is_none_or(|until| now < until) || is_present())
}
