//! Enrollment by an operator's approval (wire contract §3.1).
//!
//! A client makes a key, proves that it holds it, and asks for an identity. An operator looks at who asks, says which
//! agent it is, and approves or rejects. The client polls; what it may read of the outcome it gets only with a proof by
//! the same key, and the certificate comes from the agent's row, so that it is the one in force also after an update.
//! A request that nobody decides ends after half an hour. Nothing is signed before the approval, and then under a
//! permit, as every leaf.

pub mod http;
pub mod store;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::token::enrollment::{public_key_fingerprint, verify_enrollment_pop, verify_status_proof};
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::{spki_der_from_pem, spki_pem};
use serde_json::{Value, json};

use super::{Agents, Certified, EnrollmentError, PrincipalType, STALE_ROUNDS_MAX, check_capabilities};
use crate::http::context::Context;
use crate::http::limits::source_key;
use crate::pki::PkiError;

/// A request waits so long for a decision.
pub const REQUEST_LIFETIME_S: i64 = 30 * 60;
/// Requests that may wait at once, from everywhere. One more is refused with 503.
const WAITING_MAX: i64 = 1000;
/// Requests that may wait at once from one source: no address fills the list for the others.
const WAITING_PER_SOURCE_MAX: i64 = 50;
const PUBLIC_KEY_PEM_CHARACTERS: (usize, usize) = (100, 8192);
const NAME_CHARACTERS: (usize, usize) = (1, 200);
const EMAIL_CHARACTERS: (usize, usize) = (3, 320);
const REASON_CHARACTERS_MAX: usize = 1000;
const DEVICE_INFO_CHARACTERS_MAX: usize = 500;
const REJECTION_CHARACTERS: (usize, usize) = (1, 500);

/// What was decided of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing yet.
    Open,
    /// The key was certified.
    Approved {
        /// For this agent.
        agent_id: String,
    },
    /// The request was refused.
    Rejected {
        /// What the operator says to the requester.
        reason: String,
    },
}

/// A request for an identity, as its row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrollmentRequest {
    /// 24 random bytes, base64url.
    pub session_id: String,
    /// What was decided.
    pub decision: Decision,
    /// The key to be certified, PEM.
    pub spki_pem: String,
    /// SHA-256 of its SPKI, lowercase hex.
    pub spki_sha256: String,
    /// What it is to be.
    pub principal_type: PrincipalType,
    /// Thumbprint of its persistent DPoP key.
    pub dpop_jkt: Option<String>,
    /// Who asks, in their own words, as are the next three.
    pub requester_name: String,
    /// Their address.
    pub requester_email: String,
    /// Why they ask.
    pub reason: Option<String>,
    /// From which device.
    pub device_info: Option<String>,
    /// The address that asked, as limits count it.
    pub source: String,
    /// When they asked.
    pub created_at: UnixTime,
    /// When the request ends.
    pub expires_at: UnixTime,
    /// When it was decided.
    pub decided_at: Option<UnixTime>,
    /// By whom.
    pub decided_by: Option<String>,
}

impl EnrollmentRequest {
    /// `pending`, `approved`, `rejected` or `expired`.
    #[must_use]
    pub fn status(&self, now: UnixTime) -> &'static str {
        match self.decision {
            Decision::Open if now < self.expires_at => "pending",
            Decision::Open => "expired",
            Decision::Approved { .. } => "approved",
            Decision::Rejected { .. } => "rejected",
        }
    }

    /// As operators read it: the wire contract's fields, and what came of it.
    #[must_use]
    pub fn to_json(&self, now: UnixTime) -> Value {
        let (agent_id, rejection_reason) = match &self.decision {
            Decision::Open => (None, None),
            Decision::Approved { agent_id } => (Some(agent_id), None),
            Decision::Rejected { reason } => (None, Some(reason)),
        };
        json!({
            "session_id": self.session_id,
            "requester_name": self.requester_name,
            "requester_email": self.requester_email,
            "reason": self.reason,
            "device_info": self.device_info,
            "pubkey_fingerprint": self.spki_sha256,
            "principal_type": self.principal_type.as_str(),
            "dpop_jkt": self.dpop_jkt,
            "source": self.source,
            "created_at": self.created_at.to_rfc3339(),
            "expires_at": self.expires_at.to_rfc3339(),
            "status": self.status(now),
            "agent_id": agent_id,
            "rejection_reason": rejection_reason,
            "decided_at": self.decided_at.map(UnixTime::to_rfc3339),
            "decided_by": self.decided_by,
        })
    }

    fn spki_der(&self) -> Result<Vec<u8>, EnrollmentError> {
        spki_der_from_pem(&self.spki_pem)
            .map_err(|_| PkiError::State { what: "a key in enrollment_requests" }.into())
    }

    /// Errors: [`EnrollmentError::Decided`] unless it waits for a decision.
    fn check_open(&self, now: UnixTime) -> Result<(), EnrollmentError> {
        match self.status(now) {
            "pending" => Ok(()),
            status => Err(EnrollmentError::Decided { session_id: self.session_id.clone(), status }),
        }
    }
}

/// What a client asks with. Lengths are in characters.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Ask {
    /// Its public key: SPKI PEM, P-256 or RSA; 100 to 8192.
    pub pubkey_pem: String,
    /// Who asks; 1 to 200.
    pub requester_name: String,
    /// Their address; 3 to 320.
    pub requester_email: String,
    /// Why; at most 1000.
    #[serde(default)]
    pub reason: Option<String>,
    /// From which device; at most 500.
    #[serde(default)]
    pub device_info: Option<String>,
    /// The public half of a persistent DPoP key.
    #[serde(default)]
    pub dpop_jwk: Option<Value>,
    /// Proof that the client holds the key.
    pub pop_signature: String,
    /// `agent`, the default, or `workload`.
    #[serde(default)]
    pub principal_type: Option<String>,
}

/// What a client reads of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `pending`, `approved`, `rejected` or `expired`.
    pub status: &'static str,
    /// The agent that it has become, its chain and capabilities: only with a proof, once approved.
    pub granted: Option<Granted>,
    /// The operator's words: only with a proof, once rejected.
    pub rejection_reason: Option<String>,
}

/// What an approval gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The agent.
    pub agent_id: String,
    /// Leaf and intermediate in force, PEM; absent where the agent has another key by now.
    pub cert_pem: Option<String>,
    /// What the agent may do.
    pub capabilities: Vec<String>,
}

fn field(field: &'static str, problem: impl Into<String>) -> EnrollmentError {
    EnrollmentError::Field { field, problem: problem.into() }
}

fn check_length(
    name: &'static str,
    text: &str,
    (least, most): (usize, usize),
) -> Result<(), EnrollmentError> {
    if (least..=most).contains(&text.chars().count()) {
        return Ok(());
    }
    Err(field(name, format!("must be {least}..={most} characters")))
}

/// `^[^@\s]+@[^@\s]+\.[^@\s]+$`
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.split_once('@') else { return false };
    let plain = |part: &str| !part.is_empty() && !part.chars().any(|c| c == '@' || c.is_whitespace());
    // Some dot has something on both sides.
    let dotted =
        domain.char_indices().any(|(at, c)| c == '.' && plain(&domain[..at]) && plain(&domain[at + 1..]));
    plain(local) && plain(domain) && dotted
}

impl Ask {
    fn check(&self) -> Result<PrincipalType, EnrollmentError> {
        check_length("pubkey_pem", &self.pubkey_pem, PUBLIC_KEY_PEM_CHARACTERS)?;
        check_length("requester_name", &self.requester_name, NAME_CHARACTERS)?;
        check_length("requester_email", &self.requester_email, EMAIL_CHARACTERS)?;
        if !is_email(&self.requester_email) {
            return Err(field("requester_email", "is not of the form name@host.domain"));
        }
        check_length("reason", self.reason.as_deref().unwrap_or_default(), (0, REASON_CHARACTERS_MAX))?;
        let device_info = self.device_info.as_deref().unwrap_or_default();
        check_length("device_info", device_info, (0, DEVICE_INFO_CHARACTERS_MAX))?;
        match self.principal_type.as_deref() {
            None | Some("agent") => Ok(PrincipalType::Agent),
            Some("workload") => Ok(PrincipalType::Workload),
            Some(_) => Err(field("principal_type", "must be agent or workload")),
        }
    }
}

impl Agents {
    /// Takes a request for an identity. Goes on under a halt: nothing is signed here.
    ///
    /// Errors: [`EnrollmentError::Field`] for a field of the wrong length or form; [`EnrollmentError::Possession`] and
    /// [`EnrollmentError::Key`] for a key that is not accepted or not proved; [`EnrollmentError::TooManyWaiting`].
    pub async fn ask(&self, context: &Context, ask: &Ask) -> Result<EnrollmentRequest, EnrollmentError> {
        let principal_type = ask.check()?;
        let spki =
            spki_der_from_pem(&ask.pubkey_pem).map_err(|error| EnrollmentError::Key(error.to_string()))?;
        verify_enrollment_pop(&spki, &ask.pop_signature).map_err(EnrollmentError::Possession)?;
        let dpop_jkt = ask
            .dpop_jwk
            .as_ref()
            .map(|jwk| PublicJwk::from_value(jwk).map(|jwk| jwk.thumbprint()))
            .transpose()
            .map_err(EnrollmentError::DpopKey)?;
        let now = context.now.seconds();
        let request = EnrollmentRequest {
            session_id: self.pki().entropy.text::<24>(),
            decision: Decision::Open,
            spki_pem: spki_pem(&spki),
            spki_sha256: public_key_fingerprint(&spki),
            principal_type,
            dpop_jkt,
            requester_name: ask.requester_name.clone(),
            requester_email: ask.requester_email.clone(),
            reason: ask.reason.clone(),
            device_info: ask.device_info.clone(),
            source: source_key(context.source),
            created_at: now,
            expires_at: now.plus(REQUEST_LIFETIME_S),
            decided_at: None,
            decided_by: None,
        };
        let mut tx = self.pki().store.write().await?;
        let (all, of_source) = store::waiting(&mut tx, &request.source, now).await?;
        if of_source >= WAITING_PER_SOURCE_MAX {
            return Err(EnrollmentError::TooManyWaiting { from_this_source: true });
        }
        if all >= WAITING_MAX {
            return Err(EnrollmentError::TooManyWaiting { from_this_source: false });
        }
        store::insert(&mut tx, &request).await?;
        tx.commit(&[Event {
            event_type: EventType::EnrollmentRequested,
            actor: "anonymous".to_owned(),
            details: json!({
                "session_id": request.session_id,
                "requester_name": request.requester_name,
                "requester_email": request.requester_email,
                "pubkey_fingerprint": request.spki_sha256,
                "principal_type": principal_type.as_str(),
                "source": request.source,
                "request_id": context.request_id,
            }),
        }])
        .await?;
        Ok(request)
    }

    /// What became of a request. Without a proof by its key, only its status.
    ///
    /// Errors: [`EnrollmentError::UnknownRequest`].
    pub async fn outcome(
        &self,
        context: &Context,
        session_id: &str,
        proof: Option<&str>,
    ) -> Result<Outcome, EnrollmentError> {
        // One view for both: an approval that is seen has its certificate.
        let mut tx = self.pki().store.read().await?;
        let request = store::request(&mut tx, session_id)
            .await?
            .ok_or_else(|| EnrollmentError::UnknownRequest(session_id.to_owned()))?;
        let mut outcome =
            Outcome { status: request.status(context.now.seconds()), granted: None, rejection_reason: None };
        let spki = request.spki_der()?;
        let proven = proof.is_some_and(|proof| verify_status_proof(&spki, session_id, proof).is_ok());
        if !proven {
            return Ok(outcome);
        }
        match request.decision {
            Decision::Open => {}
            Decision::Rejected { reason } => outcome.rejection_reason = Some(reason),
            Decision::Approved { agent_id } => {
                let agent = super::store::agent(&mut tx, &agent_id).await?;
                // Another key is another requester by now: this one gets no certificate for it.
                let own = agent.as_ref().filter(|agent| {
                    agent.leaf.as_ref().is_some_and(|leaf| leaf.public_key_matches_spki(&spki))
                });
                outcome.granted = Some(Granted {
                    agent_id,
                    cert_pem: own.and_then(|agent| agent.cert_pem.clone()),
                    capabilities: own.map(|agent| agent.capabilities.clone()).unwrap_or_default(),
                });
            }
        }
        Ok(outcome)
    }

    /// One request. Errors: [`EnrollmentError::UnknownRequest`].
    pub async fn request(&self, session_id: &str) -> Result<EnrollmentRequest, EnrollmentError> {
        let mut tx = self.pki().store.read().await?;
        store::request(&mut tx, session_id)
            .await?
            .ok_or_else(|| EnrollmentError::UnknownRequest(session_id.to_owned()))
    }

    /// Requests of one status, a page at a time, by session id after `after`.
    ///
    /// Errors: [`EnrollmentError::Filter`] for an unknown status.
    pub async fn requests(
        &self,
        status: &str,
        after: &str,
        limit: i64,
    ) -> Result<Vec<EnrollmentRequest>, EnrollmentError> {
        let (stored, expired) = match status {
            "pending" => ("pending", false),
            "expired" => ("pending", true),
            "approved" | "rejected" => (status, false),
            _ => {
                return Err(EnrollmentError::Filter("status must be pending, expired, approved or rejected"));
            }
        };
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.read().await?;
        Ok(store::page(&mut tx, stored, expired, now, after, limit).await?)
    }

    /// Certifies the key of a request for agent `agent_id`, given bare or as `<org>::<name>`. A known agent is enrolled
    /// anew in place: it keeps its names, bindings and, where `capabilities` is empty, its capabilities; its former
    /// certificate and DPoP key stay good for 48 hours.
    ///
    /// Errors: [`EnrollmentError::UnknownRequest`], [`EnrollmentError::Decided`], [`EnrollmentError::Field`];
    /// [`EnrollmentError::NotReplaceable`] where the agent is inactive, of another type, or its owner's; and
    /// [`PkiError::Halted`] under a halt.
    pub async fn approve(
        &self,
        session_id: &str,
        agent_id: &str,
        capabilities: &[String],
        actor: &str,
    ) -> Result<String, EnrollmentError> {
        check_capabilities(capabilities)?;
        for _round in 0..STALE_ROUNDS_MAX {
            let now = self.pki().clock.now().seconds();
            let request = self.request(session_id).await?;
            request.check_open(now)?;
            let (permit, authority) = self.pki().permit().await?;
            let named = self.named(&authority, request.principal_type, agent_id)?;
            let (leaf, chain) = authority.issue_agent_leaf(
                &permit,
                &self.pki().entropy,
                &named.agent_id,
                &named.spiffe_id,
                &request.spki_der()?,
                now,
            )?;
            let named = named.row();
            let mut tx = self.pki().store.write().await?;
            if tx.epoch() != permit.epoch() {
                drop(tx);
                self.pki().refresh().await?;
                continue;
            }
            // Read again under the lock: somebody else may have decided.
            let request = store::request(&mut tx, session_id)
                .await?
                .ok_or_else(|| EnrollmentError::UnknownRequest(session_id.to_owned()))?;
            request.check_open(now)?;
            let certified = Certified {
                leaf: &leaf,
                cert_pem: &chain,
                issuer: authority.mastio_ca.as_ref(),
                dpop_jkt: request.dpop_jkt.clone(),
                enrollment: crate::updates::halt::EnrollmentType::Connector,
                principal_type: request.principal_type,
            };
            let anew = self.enroll(&mut tx, &named, &certified, capabilities, now).await?;
            let decision = Decision::Approved { agent_id: named.agent_id.clone() };
            store::decide(&mut tx, session_id, &decision, actor, now).await?;
            tx.commit(&[Event {
                event_type: EventType::EnrollmentApproved,
                actor: actor.to_owned(),
                details: json!({
                    "session_id": session_id,
                    "agent_id": named.agent_id,
                    "enrolled_anew": anew,
                    "pubkey_fingerprint": request.spki_sha256,
                    "serial": leaf.serial_hex(),
                    "fingerprint": leaf.fingerprint(),
                    "not_after": leaf.not_after().to_rfc3339(),
                }),
            }])
            .await?;
            self.pki().refresh().await?;
            return Ok(named.agent_id);
        }
        Err(EnrollmentError::Busy)
    }

    /// Refuses a request; `reason`, 1 to 500 characters, is what its sender reads. Goes on under a halt.
    ///
    /// Errors: [`EnrollmentError::UnknownRequest`], [`EnrollmentError::Decided`], [`EnrollmentError::Field`].
    pub async fn reject(&self, session_id: &str, reason: &str, actor: &str) -> Result<(), EnrollmentError> {
        check_length("reason", reason, REJECTION_CHARACTERS)?;
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.write().await?;
        let request = store::request(&mut tx, session_id)
            .await?
            .ok_or_else(|| EnrollmentError::UnknownRequest(session_id.to_owned()))?;
        request.check_open(now)?;
        let decision = Decision::Rejected { reason: reason.to_owned() };
        store::decide(&mut tx, session_id, &decision, actor, now).await?;
        tx.commit(&[Event {
            event_type: EventType::EnrollmentRejected,
            actor: actor.to_owned(),
            details: json!({
                "session_id": session_id, "reason": reason, "pubkey_fingerprint": request.spki_sha256,
            }),
        }])
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_judged_as_the_wire_contract_s_pattern_does() {
        for good in ["a@b.c", "ada@mail.example.com", "a@b..c", "a@.b.c"] {
            assert!(is_email(good), "{good}");
        }
        for bad in ["", "a", "a@b", "@b.c", "a@b.", "a@.c", "a@@b.c", "a b@c.d", "a@b c.d", "a@b.c@d"] {
            assert!(!is_email(bad), "{bad}");
        }
    }
}
