//! A certificate for a BYOCA owner's key, signed directly by the Org CA.
//!
//! After an update has replaced the Org CA, its key has never left us, so the owner cannot sign a certificate under it
//! alone. They bring a certificate request; the certificate they get is what they re-enroll with.

use mastio_core::audit::event::{Event, EventType};
use mastio_core::x509::csr::CertificateRequest;
use mastio_core::x509::{Certificate, Validity, profile};
use serde_json::json;

use super::{AGENT_LEAF_VALIDITY_S, BACKDATE_S, Pki, PkiError};

/// How often an issuance whose epoch moved is made again.
const STALE_ROUNDS_MAX: usize = 5;

/// What an owner gets.
pub struct ByocaCertificate {
    /// Whom the certificate names.
    pub agent_id: String,
    /// The certificate.
    pub certificate: Certificate,
    /// Who signed it.
    pub org_ca: Certificate,
}

impl Pki {
    /// Signs the key of an owner's certificate request for agent `name`. The request's own names are not taken over.
    ///
    /// Errors: [`PkiError::Request`] when the request is malformed, not signed by its key, or its key is not accepted;
    /// [`PkiError::OrgCaKeyUnavailable`]; [`PkiError::Halted`].
    pub async fn issue_byoca(
        &self,
        name: &str,
        csr_pem: &str,
        actor: &str,
    ) -> Result<ByocaCertificate, PkiError> {
        let request = CertificateRequest::from_pem(csr_pem).map_err(PkiError::Request)?;
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.permit().await?;
            let key = authority.org_ca_key.clone().ok_or(PkiError::OrgCaKeyUnavailable)?;
            let now = self.clock.now().seconds();
            let agent_id = format!("{}::{name}", authority.org_id);
            let spiffe_id = format!("spiffe://{}/{}/{name}", self.trust_domain, authority.org_id);
            let tbs = profile::externally_keyed_leaf(
                &authority.org_ca,
                &request,
                &agent_id,
                &authority.org_id,
                &spiffe_id,
                &self.entropy.serial(),
                Validity {
                    not_before: now.plus(-BACKDATE_S),
                    not_after: now.plus(AGENT_LEAF_VALIDITY_S).min(authority.org_ca.not_after()),
                },
                key.signature_algorithm(),
            )
            .map_err(PkiError::Request)?;
            let epoch = permit.epoch();
            let certificate = tokio::task::spawn_blocking(move || key.sign_certificate(&permit, tbs))
                .await
                .map_err(|_| PkiError::Stopped)??;
            let tx = self.store.write().await?;
            if tx.epoch() != epoch {
                drop(tx);
                self.refresh().await?;
                continue;
            }
            tx.commit(&[Event {
                event_type: EventType::AgentByocaCertificateIssued,
                actor: actor.to_owned(),
                details: json!({
                    "agent_id": agent_id,
                    "serial": certificate.serial_hex(),
                    "fingerprint": certificate.fingerprint(),
                    "spki_sha256": certificate.spki_sha256(),
                    "not_after": certificate.not_after().to_rfc3339(),
                }),
            }])
            .await?;
            return Ok(ByocaCertificate { agent_id, certificate, org_ca: authority.org_ca.clone() });
        }
        Err(PkiError::Moved)
    }
}
