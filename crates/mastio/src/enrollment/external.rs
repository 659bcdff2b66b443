//! Agents whose owner brings key and certificate: BYOCA (wire contract §3.3) and SPIFFE (§3.4).
//!
//! The owner holds the key. What is sent along shows only that they do; it is compared with the certificate and
//! forgotten, never stored. A BYOCA certificate is signed by the Org CA itself; an SVID by the SPIRE bundle, which from
//! then on vouches for this agent alone. Nothing is signed here, so it goes on under a halt: it is how an owner follows
//! an Org CA that an update has replaced.

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::path::{self, Anchor};
use mastio_core::x509::{Certificate, X509Error, identity};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::lifecycle::{Named, check_display_name};
use super::store::SpireIdentity;
use super::{
    Agent, Agents, Certified, EnrollmentError, PrincipalType, STALE_ROUNDS_MAX, check_capabilities, store,
};
use crate::pki::keys::PrivateKey;
use crate::pki::store::{config, hex};
use crate::pki::{Authority, revocation};
use crate::updates::halt::EnrollmentType;

/// Where the predecessor kept the bundle for all SVIDs.
const BUNDLE_KEY: &str = "spire_trust_bundle";
/// Certificates of a bundle, at most.
const BUNDLE_CERTIFICATES_MAX: usize = 32;

/// What an owner brings.
pub struct Brought {
    /// `[a-zA-Z0-9._-]{1,64}`.
    pub agent_name: String,
    /// For people; empty is the name.
    pub display_name: String,
    /// What the agent may do.
    pub capabilities: Vec<String>,
    /// Whether it is published to a federation.
    pub federated: bool,
    /// The certificate, PEM, with what follows it.
    pub cert_pem: String,
    /// Its private key, PEM: compared and forgotten.
    pub private_key_pem: Zeroizing<String>,
    /// The public half of a persistent DPoP key.
    pub dpop_jwk: Option<Value>,
    /// Whether the certificate of a known agent is replaced although its CA is the same.
    pub update_existing: bool,
}

/// An agent that was enrolled with what its owner brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The agent.
    pub agent_id: String,
    /// For people.
    pub display_name: String,
    /// What it may do.
    pub capabilities: Vec<String>,
    /// SHA-256 of the leaf's DER, lowercase hex.
    pub cert_thumbprint: String,
    /// What the leaf's SAN says.
    pub spiffe_id: Option<String>,
    /// Thumbprint of the persistent DPoP key.
    pub dpop_jkt: Option<String>,
    /// Whether it had been there before.
    pub anew: bool,
}

fn brought(problem: impl Into<String>) -> EnrollmentError {
    EnrollmentError::Brought(problem.into())
}

/// The anchors in a bundle.
pub(super) fn anchors(bundle_pem: &str) -> Result<Vec<Anchor>, X509Error> {
    let certificates = Certificate::chain_from_pem(bundle_pem)?;
    certificates.iter().take(BUNDLE_CERTIFICATES_MAX).map(Anchor::from_certificate).collect()
}

/// What an owner brought, read and found to fit together; nothing is known yet of who signed it.
struct Owned {
    leaf: Certificate,
    beside: Vec<Certificate>,
    dpop_jkt: Option<String>,
}

impl Brought {
    fn read(&self) -> Result<Owned, EnrollmentError> {
        super::lifecycle::check_agent_name(&self.agent_name)?;
        check_display_name(&self.display_name)?;
        check_capabilities(&self.capabilities)?;
        let mut chain = Certificate::chain_from_pem(&self.cert_pem)
            .map_err(|error| brought(format!("the certificate cannot be read: {error}")))?
            .into_iter();
        let leaf = chain.next().ok_or_else(|| brought("there is no certificate"))?;
        let spki = PrivateKey::spki_of("the request", &self.private_key_pem)
            .map_err(|_| brought("the private key is not a PEM P-256 or RSA key"))?;
        if spki != leaf.spki_der() {
            return Err(brought("the private key is not the certificate's"));
        }
        PublicJwk::from_spki_der(&spki).map_err(|error| EnrollmentError::Key(error.to_string()))?;
        let dpop_jkt = self
            .dpop_jwk
            .as_ref()
            .map(|jwk| PublicJwk::from_value(jwk).map(|jwk| jwk.thumbprint()))
            .transpose()
            .map_err(EnrollmentError::DpopKey)?;
        Ok(Owned { leaf, beside: chain.collect(), dpop_jkt })
    }

    fn named(&self, agent_id: String, spiffe_id: Option<String>) -> Named {
        let display_name =
            if self.display_name.is_empty() { self.agent_name.clone() } else { self.display_name.clone() };
        Named { agent_id, spiffe_id, display_name, federated: self.federated }
    }
}

/// The first URI of a leaf that is a SPIFFE id.
fn spiffe_id(leaf: &Certificate) -> Option<String> {
    leaf.uri_sans().iter().find(|uri| uri.to_ascii_lowercase().starts_with("spiffe://")).cloned()
}

impl Agents {
    /// Enrolls an agent with a certificate that the Org CA itself has signed. A known one is enrolled anew in place where
    /// its certificate is of another Org CA, or the owner says that it is meant.
    ///
    /// Errors: [`EnrollmentError::Brought`] for a certificate that does not fit its key, its name or the Org CA;
    /// [`EnrollmentError::Exists`]; [`EnrollmentError::NotReplaceable`]; those of its fields.
    pub async fn enroll_byoca(&self, request: &Brought, actor: &str) -> Result<Enrolled, EnrollmentError> {
        let owned = request.read()?;
        for _round in 0..STALE_ROUNDS_MAX {
            let authority = self.pki().current().await?;
            let now = self.pki().clock.now().seconds();
            let agent_id = format!("{}::{}", authority.org_id, request.agent_name);
            judge_byoca(&authority, &owned.leaf, &agent_id, now)?;
            let mut tx = self.pki().store.write().await?;
            if tx.epoch() != authority.epoch {
                drop(tx);
                self.pki().refresh().await?;
                continue;
            }
            let present = store::agent(&mut tx, &agent_id).await?;
            let replaced_ca = |agent: &Agent| {
                agent.leaf.as_ref().is_none_or(|leaf| leaf.verify_signature(&authority.org_ca).is_err())
            };
            if let Some(agent) = &present
                && !request.update_existing
                && !replaced_ca(agent)
            {
                return Err(EnrollmentError::Exists(agent_id));
            }
            let named = request.named(agent_id, spiffe_id(&owned.leaf));
            let certified = Certified {
                leaf: &owned.leaf,
                cert_pem: &owned.leaf.to_pem(),
                issuer: Some(&authority.org_ca),
                dpop_jkt: owned.dpop_jkt.clone(),
                enrollment: EnrollmentType::Byoca,
                principal_type: PrincipalType::Agent,
            };
            return self
                .finish(tx, request, named, certified, EventType::AgentByocaEnrolled, actor, now)
                .await;
        }
        Err(EnrollmentError::Busy)
    }

    /// Enrolls an agent with an SVID that a SPIRE bundle vouches for: the one sent along, else the one that
    /// `spire_trust_bundle` in `proxy_config` holds. A known one is enrolled anew in place where the owner says so.
    ///
    /// Errors: as [`Self::enroll_byoca`]; [`EnrollmentError::NoBundle`].
    pub async fn enroll_spire(
        &self,
        request: &Brought,
        trust_bundle_pem: Option<&str>,
        actor: &str,
    ) -> Result<Enrolled, EnrollmentError> {
        let owned = request.read()?;
        // SPIFFE X509-SVID §2: exactly one URI.
        let [uri] = owned.leaf.uri_sans() else {
            return Err(brought("an SVID has exactly one URI, its SPIFFE id"));
        };
        let spiffe = spiffe_id(&owned.leaf)
            .filter(|id| id == uri)
            .ok_or_else(|| brought("the SVID names no SPIFFE id"))?;
        for _round in 0..STALE_ROUNDS_MAX {
            let authority = self.pki().current().await?;
            let now = self.pki().clock.now().seconds();
            let agent_id = format!("{}::{}", authority.org_id, request.agent_name);
            // A SPIFFE id that reads as one of ours must not make two agents of one name.
            if let Ok(named) = identity::identity(&owned.leaf)
                && named.org_id == authority.org_id
                && named.agent_id() != agent_id
            {
                return Err(brought(format!("the SVID names {}, not {agent_id}", named.agent_id())));
            }
            let mut tx = self.pki().store.write().await?;
            if tx.epoch() != authority.epoch {
                drop(tx);
                self.pki().refresh().await?;
                continue;
            }
            let bundle_pem = match trust_bundle_pem {
                Some(bundle) => bundle.to_owned(),
                None => config(&mut tx, BUNDLE_KEY).await?.ok_or(EnrollmentError::NoBundle)?,
            };
            let trusted = anchors(&bundle_pem)
                .map_err(|error| brought(format!("the trust bundle is refused: {error}")))?;
            path::validate(&owned.leaf, &owned.beside, &[], &trusted, now).map_err(|error| {
                brought(format!(
                    "the SVID does not verify under the trust bundle: {error} ({})",
                    error.reason()
                ))
            })?;
            if store::agent(&mut tx, &agent_id).await?.is_some() && !request.update_existing {
                return Err(EnrollmentError::Exists(agent_id));
            }
            if let Some(other) = store::spire_of_id(&mut tx, &spiffe).await?
                && other.agent_id != agent_id
            {
                return Err(EnrollmentError::Exists(other.agent_id));
            }
            let named = request.named(agent_id.clone(), Some(spiffe.clone()));
            let cert_pem: String =
                std::iter::once(&owned.leaf).chain(&owned.beside).map(Certificate::to_pem).collect();
            let certified = Certified {
                leaf: &owned.leaf,
                cert_pem: &cert_pem,
                issuer: None,
                dpop_jkt: owned.dpop_jkt.clone(),
                enrollment: EnrollmentType::Spire,
                principal_type: PrincipalType::Agent,
            };
            let identity = SpireIdentity { agent_id, spiffe_id: spiffe.clone(), bundle_pem };
            store::set_spire(&mut tx, &identity).await?;
            return self
                .finish(tx, request, named, certified, EventType::AgentSpireEnrolled, actor, now)
                .await;
        }
        Err(EnrollmentError::Busy)
    }

    /// Writes the row, its event and the answer.
    #[expect(clippy::too_many_arguments, reason = "what the two ways have in common at their end")]
    async fn finish(
        &self,
        mut tx: crate::store::WriteTx,
        request: &Brought,
        named: Named,
        certified: Certified<'_>,
        event_type: EventType,
        actor: &str,
        now: UnixTime,
    ) -> Result<Enrolled, EnrollmentError> {
        let thumbprint = certified.leaf.fingerprint();
        if revocation::store::is_revoked(&mut tx, &thumbprint).await? {
            return Err(EnrollmentError::AlreadyRevoked(format!("the certificate of {}", named.agent_id)));
        }
        let anew = self.enroll(&mut tx, &named, &certified, &request.capabilities, now).await?;
        let agent = store::agent(&mut tx, &named.agent_id)
            .await?
            .ok_or_else(|| EnrollmentError::Unknown(named.agent_id.clone()))?;
        tx.commit(&[Event {
            event_type,
            actor: actor.to_owned(),
            details: json!({
                "agent_id": named.agent_id,
                "enrolled_anew": anew,
                "spiffe_id": named.spiffe_id,
                "serial": certified.leaf.serial_hex(),
                "fingerprint": thumbprint,
                "not_after": certified.leaf.not_after().to_rfc3339(),
            }),
        }])
        .await?;
        self.pki().refresh().await?;
        Ok(Enrolled {
            agent_id: agent.agent_id,
            display_name: agent.display_name,
            capabilities: agent.capabilities,
            cert_thumbprint: thumbprint,
            spiffe_id: named.spiffe_id,
            dpop_jkt: agent.dpop_jkt,
            anew,
        })
    }
}

/// Whether a leaf names this agent, and the Org CA itself has signed it.
fn judge_byoca(
    authority: &Authority,
    leaf: &Certificate,
    agent_id: &str,
    now: UnixTime,
) -> Result<(), EnrollmentError> {
    let named = identity::identity(leaf).map_err(|_| {
        brought("the certificate names no agent: neither a SPIFFE URI nor a common name org::name")
    })?;
    if named.agent_id() != agent_id {
        return Err(brought(format!("the certificate names {}, not {agent_id}", named.agent_id())));
    }
    let current = authority.trust().get(..1).unwrap_or_default();
    path::validate(leaf, &[], &[], current, now).map(drop).map_err(|error| {
        let key_id = hex(&authority.org_ca.key_id());
        brought(format!(
            "the certificate does not verify under the Org CA itself (key {key_id}): {error} ({})",
            error.reason()
        ))
    })
}
