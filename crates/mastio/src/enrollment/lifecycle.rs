//! What happens to an agent: it is created, its certificate renewed, it is set aside, taken back, deleted.
//!
//! Every verb is one transaction with its event. What signs asks for a permit first, signs, and compares the epoch under
//! the lock; where it has moved, it signs anew.

use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::Certificate;
use mastio_core::x509::crl::RevocationReason;
use mastio_core::x509::csr::CertificateRequest;
use serde_json::{Value, json};

use super::store::Credentials;
use super::{Agent, Agents, EnrollmentError, ProvenAgent, approval, store};
use crate::pki::keys::PrivateKey;
use crate::pki::store::{CertificateFacts, config_place, set_certificate_facts, set_config};
use crate::pki::{Authority, PkiError, revocation};
use crate::store::WriteTx;
use crate::updates::halt::EnrollmentType;

/// How often an issuance whose epoch moved is made again before the caller is told to come back.
pub(super) const STALE_ROUNDS_MAX: usize = 5;
/// A replaced key or certificate stays good for 48 hours (wire contract §3.1).
const GRACE_S: i64 = 48 * 3600;
/// RFC 5280 appendix A.1, ub-common-name: the agent's id is its certificate's common name.
const COMMON_NAME_CHARACTERS_MAX: usize = 64;
const AGENT_NAME_CHARACTERS_MAX: usize = 64;
const DISPLAY_NAME_CHARACTERS_MAX: usize = 256;
const CAPABILITIES_MAX: usize = 256;
const CAPABILITY_CHARACTERS_MAX: usize = 256;
/// Agents among which peers are looked for.
const PEERS_LOOKED_AT: i64 = 2000;
/// Agents that a log line names.
const NAMED_MAX: i64 = 10;
const DAY_S: i64 = 86_400;

/// What kind of caller an agent is; its certificate names it so (wire contract §1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrincipalType {
    /// The default. Pinned by its certificate.
    Agent,
    /// A workload, `<org>::workload::<name>`. Pinned by its key.
    Workload,
}

impl PrincipalType {
    /// As stored, and as access tokens say it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Workload => "workload",
        }
    }

    /// Reads a stored tag; an unknown one is an agent.
    #[must_use]
    pub fn from_tag(tag: &str) -> Self {
        if tag == "workload" { Self::Workload } else { Self::Agent }
    }
}

/// A newly created agent, with the key that is handed over once.
pub struct CreatedAgent {
    /// The agent.
    pub agent: Agent,
    /// Its private key, PKCS#8 PEM; shown here and never again.
    pub private_key_pem: zeroize::Zeroizing<String>,
}

/// What an agent is called whose certificate we make.
pub(super) struct OwnName {
    pub(super) name: String,
    pub(super) agent_id: String,
    pub(super) spiffe_id: String,
}

impl OwnName {
    /// The row that it makes.
    pub(super) fn row(self) -> Named {
        let Self { name, agent_id, spiffe_id } = self;
        Named { agent_id, spiffe_id: Some(spiffe_id), display_name: name, federated: false }
    }
}

/// What an agent is called in its row.
pub(super) struct Named {
    pub(super) agent_id: String,
    /// Absent where an owner's certificate has none.
    pub(super) spiffe_id: Option<String>,
    /// What people call it, if it is new.
    pub(super) display_name: String,
    /// Whether it is published to a federation, if it is new.
    pub(super) federated: bool,
}

/// A certificate on its way into an agent's row.
pub(super) struct Certified<'a> {
    pub(super) leaf: &'a Certificate,
    /// What is stored and sent: the leaf and what follows it.
    pub(super) cert_pem: &'a str,
    /// Whose signature the leaf bears, where it is one of our CAs.
    pub(super) issuer: Option<&'a Certificate>,
    pub(super) dpop_jkt: Option<String>,
    pub(super) enrollment: EnrollmentType,
    pub(super) principal_type: PrincipalType,
}

/// A certificate for a key that the agent has had or brings.
#[derive(Debug, Clone)]
pub struct Renewed {
    /// The agent.
    pub agent_id: String,
    /// The new leaf.
    pub leaf: Certificate,
    /// Leaf and intermediate, PEM.
    pub cert_pem: String,
}

impl Renewed {
    /// As the agent or an operator reads it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "agent_id": self.agent_id,
            "cert_pem": self.cert_pem,
            "serial": self.leaf.serial_hex(),
            "not_after": self.leaf.not_after().to_rfc3339(),
        })
    }
}

/// Active agents whose certificate has ended, or ends soon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expiring {
    /// Has ended.
    pub expired: i64,
    /// Ends within seven days; those that have ended are not counted again.
    pub within_7_days: i64,
    /// Ends within thirty days, the former included.
    pub within_30_days: i64,
}

impl Agent {
    /// As operators read it: the wire contract's fields, and the certificate in force.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let certificate = self.leaf.as_ref().map(|leaf| {
            json!({
                "serial": leaf.serial_hex(),
                "fingerprint": leaf.fingerprint(),
                "spki_sha256": leaf.spki_sha256(),
                "issuer": leaf.issuer_display(),
                "not_before": leaf.not_before().to_rfc3339(),
                "not_after": leaf.not_after().to_rfc3339(),
            })
        });
        json!({
            "agent_id": self.agent_id,
            "display_name": self.display_name,
            "capabilities": self.capabilities,
            "federated": self.federated,
            "federated_at": null,
            "federation_revision": 0,
            "is_active": self.is_active,
            "enrollment": self.enrollment.as_str(),
            "principal_type": self.principal_type,
            "created_at": self.created_at,
            "certificate": certificate,
        })
    }

    /// The same with the chain, the pinned DPoP key, and what is in its grace.
    #[must_use]
    pub fn to_full_json(&self) -> Value {
        let mut full = self.to_json();
        full["cert_pem"] = json!(self.cert_pem);
        full["dpop_jkt"] = json!(self.dpop_jkt);
        full["previous_dpop_jkt"] = json!(self.previous_dpop_jkt);
        full["previous_until"] = json!(self.previous_until.map(UnixTime::to_rfc3339));
        full
    }

    fn credentials(&self) -> Credentials {
        Credentials {
            cert_pem: self.cert_pem.clone(),
            dpop_jkt: self.dpop_jkt.clone(),
            previous_cert_pem: self.previous_cert_pem.clone(),
            previous_dpop_jkt: self.previous_dpop_jkt.clone(),
            previous_until: self.previous_until,
        }
    }

    /// The same, without what is past its grace: a new grace must not bring it back.
    fn credentials_at(&self, now: UnixTime) -> Credentials {
        let mut credentials = self.credentials();
        if credentials.previous_until.is_none_or(|until| until <= now) {
            credentials.previous_cert_pem = None;
            credentials.previous_dpop_jkt = None;
            credentials.previous_until = None;
        }
        credentials
    }
}

/// Whether `name` is what an agent may be called.
pub(crate) fn check_agent_name(name: &str) -> Result<(), EnrollmentError> {
    let good = (1..=AGENT_NAME_CHARACTERS_MAX).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if good {
        Ok(())
    } else {
        let problem = format!("must be 1..={AGENT_NAME_CHARACTERS_MAX} of A-Z a-z 0-9 . _ -");
        Err(EnrollmentError::Field { field: "agent_name", problem })
    }
}

/// Whether `capabilities` are few and short enough.
pub(super) fn check_capabilities(capabilities: &[String]) -> Result<(), EnrollmentError> {
    let refused = |problem| Err(EnrollmentError::Field { field: "capabilities", problem });
    if capabilities.len() > CAPABILITIES_MAX {
        return refused(format!("must be at most {CAPABILITIES_MAX}"));
    }
    let fits = |capability: &String| (1..=CAPABILITY_CHARACTERS_MAX).contains(&capability.chars().count());
    if !capabilities.iter().all(fits) {
        return refused(format!("must each have 1..={CAPABILITY_CHARACTERS_MAX} characters"));
    }
    Ok(())
}

pub(super) fn check_display_name(display_name: &str) -> Result<(), EnrollmentError> {
    if display_name.chars().count() <= DISPLAY_NAME_CHARACTERS_MAX {
        return Ok(());
    }
    let problem = format!("must be at most {DISPLAY_NAME_CHARACTERS_MAX} characters");
    Err(EnrollmentError::Field { field: "display_name", problem })
}

impl Agents {
    /// What an agent is called whose id is given bare or whole.
    pub(super) fn named(
        &self,
        authority: &Authority,
        principal_type: PrincipalType,
        agent_id: &str,
    ) -> Result<OwnName, EnrollmentError> {
        let bare = agent_id.strip_prefix(&format!("{}::", authority.org_id)).unwrap_or(agent_id);
        let (name, kind, path) = match principal_type {
            PrincipalType::Agent => (bare, "", ""),
            PrincipalType::Workload => {
                (bare.strip_prefix("workload::").unwrap_or(bare), "workload::", "workload/")
            }
        };
        check_agent_name(name)?;
        let agent_id = format!("{}::{kind}{name}", authority.org_id);
        if agent_id.chars().count() > COMMON_NAME_CHARACTERS_MAX {
            let problem = format!(
                "makes {agent_id} longer than the {COMMON_NAME_CHARACTERS_MAX} characters of a common name"
            );
            return Err(EnrollmentError::Field { field: "agent_name", problem });
        }
        let spiffe_id = format!("spiffe://{}/{}/{path}{name}", self.pki().trust_domain, authority.org_id);
        Ok(OwnName { agent_id, spiffe_id, name: name.to_owned() })
    }

    /// Puts a certified key into its agent's row, which is made where there is none. Tells whether there was one.
    ///
    /// Errors: [`EnrollmentError::NotReplaceable`].
    pub(super) async fn enroll(
        &self,
        tx: &mut WriteTx,
        named: &Named,
        certified: &Certified<'_>,
        capabilities: &[String],
        now: UnixTime,
    ) -> Result<bool, EnrollmentError> {
        let agent_id = &named.agent_id;
        let known = store::agent(tx, agent_id).await?;
        match &known {
            None => {
                let agent = Agent {
                    agent_id: agent_id.clone(),
                    display_name: named.display_name.clone(),
                    capabilities: capabilities.to_vec(),
                    cert_pem: Some(certified.cert_pem.to_owned()),
                    leaf: Some(certified.leaf.clone()),
                    is_active: true,
                    enrollment: certified.enrollment,
                    dpop_jkt: certified.dpop_jkt.clone(),
                    principal_type: certified.principal_type.as_str().to_owned(),
                    previous_cert_pem: None,
                    previous_dpop_jkt: None,
                    previous_until: None,
                    federated: named.federated,
                    created_at: now.to_rfc3339(),
                    last_revocation: None,
                };
                store::insert(tx, &agent, named.spiffe_id.as_deref()).await?;
            }
            Some(present) => {
                let refused =
                    |why: String| Err(EnrollmentError::NotReplaceable { agent_id: agent_id.clone(), why });
                if !present.is_active {
                    return refused("it is inactive: reactivate it first, or delete it".to_owned());
                }
                if present.enrollment != certified.enrollment {
                    return refused(format!(
                        "it was enrolled as {}: delete it first",
                        present.enrollment.as_str()
                    ));
                }
                if present.principal_type != certified.principal_type.as_str() {
                    return refused(format!("it is of type {}", present.principal_type));
                }
                let credentials = Credentials {
                    cert_pem: Some(certified.cert_pem.to_owned()),
                    dpop_jkt: certified.dpop_jkt.clone(),
                    previous_cert_pem: present.cert_pem.clone(),
                    previous_dpop_jkt: present.dpop_jkt.clone(),
                    previous_until: Some(now.plus(GRACE_S)),
                };
                store::set_credentials(tx, agent_id, &credentials).await?;
                if !capabilities.is_empty() {
                    store::set_capabilities(tx, agent_id, capabilities).await?;
                }
                // Where we held the former key, it is not this agent's any more.
                store::forget_key(tx, agent_id).await?;
            }
        }
        let facts = CertificateFacts::issued_by(certified.leaf, certified.issuer);
        set_certificate_facts(tx, &[facts.row(agent_id)]).await?;
        Ok(known.is_some())
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
        check_agent_name(name)?;
        check_display_name(display_name)?;
        check_capabilities(capabilities)?;
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki().permit().await?;
            let now = self.pki().clock.now().seconds();
            let OwnName { agent_id, spiffe_id, .. } = self.named(&authority, PrincipalType::Agent, name)?;
            let new = PrivateKey::generate_p256().map_err(PkiError::from)?;
            let (leaf, chain) = authority.issue_agent_leaf(
                &permit,
                &self.pki().entropy,
                &agent_id,
                &spiffe_id,
                new.key.spki_der(),
                now,
            )?;
            let mut tx = self.pki().store.write().await?;
            if tx.epoch() != permit.epoch() {
                drop(tx);
                self.pki().refresh().await?;
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
                principal_type: PrincipalType::Agent.as_str().to_owned(),
                previous_cert_pem: None,
                previous_dpop_jkt: None,
                previous_until: None,
                federated,
                created_at: now.to_rfc3339(),
                last_revocation: None,
            };
            store::insert(&mut tx, &agent, Some(&spiffe_id)).await?;
            let facts = CertificateFacts::issued_by(&leaf, authority.mastio_ca.as_ref());
            set_certificate_facts(&mut tx, &[facts.row(&agent_id)]).await?;
            let key_name = store::key_name(&agent_id);
            let sealed = new.seal(self.pki().sealing(), &config_place(&key_name)).map_err(PkiError::from)?;
            set_config(&mut tx, &key_name, &sealed).await?;
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
            self.pki().refresh().await?;
            return Ok(CreatedAgent { agent, private_key_pem: new.hand_over() });
        }
        Err(EnrollmentError::Busy)
    }

    /// Issues an agent's certificate anew: for the key that it has, or for that of `request`, which its key has signed.
    /// The certificate that `presented` showed, else the present one, stays good for 48 hours. The agent asks over its
    /// connection, an operator for it.
    ///
    /// Errors: [`EnrollmentError::Unknown`]; [`EnrollmentError::NotReplaceable`] for an agent that is inactive, or whose
    /// certificates are its owner's to renew; [`EnrollmentError::Key`]; [`PkiError::Halted`] under a halt.
    pub async fn renew(
        &self,
        agent_id: &str,
        request: Option<&CertificateRequest>,
        presented: Option<&ProvenAgent>,
        actor: &str,
    ) -> Result<Renewed, EnrollmentError> {
        if let Some(request) = request {
            PublicJwk::from_spki_der(request.spki_der())
                .map_err(|error| EnrollmentError::Key(error.to_string()))?;
        }
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki().permit().await?;
            let now = self.pki().clock.now().seconds();
            let agent = self.agent(agent_id).await?;
            let agent = agent.ok_or_else(|| EnrollmentError::Unknown(agent_id.to_owned()))?;
            let refused = |why: &str| EnrollmentError::NotReplaceable {
                agent_id: agent_id.to_owned(),
                why: why.to_owned(),
            };
            if !agent.is_active {
                return Err(refused("it is inactive: reactivate it first"));
            }
            if agent.enrollment != EnrollmentType::Connector {
                return Err(refused("its owner holds its key and renews its certificate: enroll it again"));
            }
            let present =
                agent.leaf.as_ref().ok_or_else(|| refused("it has no certificate that can be read"))?;
            let spki = request.map_or(present.spki_der(), CertificateRequest::spki_der);
            let named = self.named(&authority, PrincipalType::from_tag(&agent.principal_type), agent_id)?;
            let (leaf, cert_pem) = authority.issue_agent_leaf(
                &permit,
                &self.pki().entropy,
                &named.agent_id,
                &named.spiffe_id,
                spki,
                now,
            )?;
            let rekeyed = spki != present.spki_der();
            let mut tx = self.pki().store.write().await?;
            if tx.epoch() != permit.epoch() {
                drop(tx);
                self.pki().refresh().await?;
                continue;
            }
            let mut credentials = agent.credentials_at(now);
            credentials.previous_cert_pem =
                presented.map(|proven| proven.certificate.to_pem()).or(credentials.cert_pem);
            credentials.previous_until = Some(now.plus(GRACE_S));
            credentials.cert_pem = Some(cert_pem.clone());
            store::set_credentials(&mut tx, agent_id, &credentials).await?;
            if rekeyed {
                store::forget_key(&mut tx, agent_id).await?;
            }
            let facts = CertificateFacts::issued_by(&leaf, authority.mastio_ca.as_ref());
            set_certificate_facts(&mut tx, &[facts.row(agent_id)]).await?;
            tx.commit(&[Event {
                event_type: EventType::AgentCertificateRenewed,
                actor: actor.to_owned(),
                details: json!({
                    "agent_id": agent_id,
                    "rekeyed": rekeyed,
                    "replaced_serial": present.serial_hex(),
                    "serial": leaf.serial_hex(),
                    "fingerprint": leaf.fingerprint(),
                    "not_after": leaf.not_after().to_rfc3339(),
                }),
            }])
            .await?;
            self.pki().refresh().await?;
            return Ok(Renewed { agent_id: agent_id.to_owned(), leaf, cert_pem });
        }
        Err(EnrollmentError::Busy)
    }

    /// Pins an agent's persistent DPoP key; the one before stays good for 48 hours.
    pub async fn set_dpop_key(&self, agent_id: &str, jkt: &str, actor: &str) -> Result<(), EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.write().await?;
        let agent = store::agent(&mut tx, agent_id).await?;
        let agent = agent.ok_or_else(|| EnrollmentError::Unknown(agent_id.to_owned()))?;
        let mut credentials = agent.credentials_at(now);
        if credentials.dpop_jkt.as_deref().is_some_and(|present| present != jkt) {
            credentials.previous_dpop_jkt = credentials.dpop_jkt.take();
            credentials.previous_until = Some(now.plus(GRACE_S));
        }
        credentials.dpop_jkt = Some(jkt.to_owned());
        store::set_credentials(&mut tx, agent_id, &credentials).await?;
        tx.commit(&[Event {
            event_type: EventType::AgentDpopKeySet,
            actor: actor.to_owned(),
            details: json!({ "agent_id": agent_id, "dpop_jkt": jkt }),
        }])
        .await?;
        self.pki().refresh().await?;
        Ok(())
    }

    /// Every agent, a page at a time, by id after `after`.
    pub async fn list(&self, after: &str, limit: i64) -> Result<Vec<Agent>, EnrollmentError> {
        Ok(store::page(&mut self.pki().store.read().await?, after, limit).await?)
    }

    /// The agents that are active, or those that are not; a page at a time, by id after `after`.
    pub async fn list_by_state(
        &self,
        active: bool,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Agent>, EnrollmentError> {
        Ok(store::page_by_state(&mut self.pki().store.read().await?, active, after, limit).await?)
    }

    /// The agents that were enrolled in this way; a page at a time, by id after `after`.
    pub async fn list_by_enrollment(
        &self,
        enrollment: EnrollmentType,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Agent>, EnrollmentError> {
        Ok(store::page_by_enrollment(&mut self.pki().store.read().await?, enrollment, after, limit).await?)
    }

    /// How many active agents' certificates have ended or end soon.
    pub async fn expiring(&self) -> Result<Expiring, EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        Ok(store::expiring(&mut self.pki().store.read().await?, now).await?)
    }

    /// Active agents whose certificate ends within `days`, or has ended; a page at a time, by id after `after`.
    pub async fn list_expiring(
        &self,
        days: i64,
        after: &str,
        limit: i64,
    ) -> Result<Vec<Agent>, EnrollmentError> {
        let before = self.pki().clock.now().seconds().plus(days.saturating_mul(DAY_S));
        Ok(store::page_expiring(&mut self.pki().store.read().await?, before, after, limit).await?)
    }

    /// Active agents but `caller`, by id, whose id or display name holds `wanted` in any case; at most `limit`. Of a
    /// large fleet the first [`PEERS_LOOKED_AT`] are looked at: an agent's question must not cost a fleet's reading.
    pub async fn peers(
        &self,
        caller: &str,
        wanted: &str,
        limit: usize,
    ) -> Result<Vec<store::Peer>, EnrollmentError> {
        let mut tx = self.pki().store.read().await?;
        let wanted = wanted.to_lowercase();
        let mut peers = store::peers(&mut tx, PEERS_LOOKED_AT).await?;
        peers.retain(|peer| {
            let holds = |text: &str| text.to_lowercase().contains(&wanted);
            peer.agent_id != caller && (holds(&peer.agent_id) || holds(&peer.display_name))
        });
        peers.truncate(limit);
        Ok(peers)
    }

    /// One agent, as the database says now.
    ///
    /// Errors: [`EnrollmentError::Unknown`].
    pub async fn show(&self, agent_id: &str) -> Result<Agent, EnrollmentError> {
        let mut tx = self.pki().store.read().await?;
        store::agent(&mut tx, agent_id).await?.ok_or_else(|| EnrollmentError::Unknown(agent_id.to_owned()))
    }

    /// Deactivates an agent: from the return on its requests are refused on every replica. The row stays, and its
    /// certificate is on hold in the revocation list.
    pub async fn deactivate(&self, agent_id: &str, actor: &str) -> Result<(), EnrollmentError> {
        self.set_active(agent_id, false, EventType::AgentDeactivated, actor).await
    }

    /// Takes a deactivated agent back, with the certificate and key that it has.
    pub async fn reactivate(&self, agent_id: &str, actor: &str) -> Result<(), EnrollmentError> {
        self.set_active(agent_id, true, EventType::AgentReactivated, actor).await
    }

    /// Errors: [`EnrollmentError::Unknown`]. An agent that is so already stays as it is, without an event.
    async fn set_active(
        &self,
        agent_id: &str,
        active: bool,
        event_type: EventType,
        actor: &str,
    ) -> Result<(), EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.write().await?;
        let agent = store::agent(&mut tx, agent_id).await?;
        let agent = agent.ok_or_else(|| EnrollmentError::Unknown(agent_id.to_owned()))?;
        if agent.is_active == active {
            return Ok(());
        }
        store::set_active(&mut tx, agent_id, active, now).await?;
        tx.commit(&[Event { event_type, actor: actor.to_owned(), details: json!({ "agent_id": agent_id }) }])
            .await?;
        self.pki().refresh().await?;
        Ok(())
    }

    /// Deletes an agent with everything that is its own: certificates, which are revoked, key, bindings, granted requests.
    /// The name is free then; what the audit log says of the agent stays.
    ///
    /// Errors: [`EnrollmentError::Unknown`].
    pub async fn delete(&self, agent_id: &str, actor: &str) -> Result<(), EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.write().await?;
        let agent = store::agent(&mut tx, agent_id).await?;
        let agent = agent.ok_or_else(|| EnrollmentError::Unknown(agent_id.to_owned()))?;
        let revocations =
            self.certificates_of(&mut tx, &agent, RevocationReason::CessationOfOperation, actor, now).await?;
        revocation::store::insert(&mut tx, &revocations).await?;
        store::delete(&mut tx, agent_id).await?;
        store::forget_key(&mut tx, agent_id).await?;
        approval::store::forget_agent(&mut tx, agent_id).await?;
        tx.commit(&[Event {
            event_type: EventType::AgentDeleted,
            actor: actor.to_owned(),
            details: json!({
                "agent_id": agent_id,
                "enrollment": agent.enrollment.as_str(),
                "serial": agent.leaf.as_ref().map(Certificate::serial_hex),
                "fingerprint": agent.leaf.as_ref().map(Certificate::fingerprint),
            }),
        }])
        .await?;
        self.pki().everywhere().await?;
        Ok(())
    }

    /// Logs which active agents' certificates have ended or end within a week; nothing where none do.
    pub async fn log_expiring(self: &Arc<Self>) -> Result<(), EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.read().await?;
        let expiring = store::expiring(&mut tx, now).await?;
        if expiring.expired == 0 && expiring.within_7_days == 0 {
            return Ok(());
        }
        let first = store::page_expiring(&mut tx, now.plus(7 * DAY_S), "", NAMED_MAX).await?;
        let ids: Vec<&str> = first.iter().map(|agent| agent.agent_id.as_str()).collect();
        tracing::warn!(
            expired = expiring.expired,
            within_7_days = expiring.within_7_days,
            first = ids.join(","),
            "agent_certificates_expiring"
        );
        Ok(())
    }
}
