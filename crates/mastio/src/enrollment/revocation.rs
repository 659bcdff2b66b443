//! Ending certificates for good.
//!
//! A revocation is by certificate: all of an agent's, or the one with a serial. It is in force when the call returns, on
//! every replica and at every door: mTLS and assertions look the certificate up, and access tokens of the agent from
//! before are void. The agent stays, so that it can be enrolled again in place, with another key.

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use mastio_core::x509::crl::RevocationReason;

use super::{Agent, Agents, EnrollmentError, store};
use crate::pki::revocation::{self, Revocation};
use crate::pki::store::CertificateFacts;
use crate::store::Query;

/// Rows of previous certificates that are looked through at once.
const PAGE_ROWS: i64 = 1000;

/// What is to be revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// Every certificate of an agent: present, previous, superseded.
    Agent(String),
    /// The certificate with this serial, hexadecimal, with or without colons.
    Serial(String),
}

/// Reads a reason by its name in RFC 5280; none is `unspecified`.
///
/// Errors: [`EnrollmentError::Field`] for another name, and for `certificateHold`: whoever is to come back is deactivated.
pub fn revocation_reason(name: Option<&str>) -> Result<RevocationReason, EnrollmentError> {
    let reason = name.map_or(Some(RevocationReason::Unspecified), RevocationReason::parse);
    reason.filter(|reason| *reason != RevocationReason::CertificateHold).ok_or_else(|| {
        EnrollmentError::Field {
            field: "reason",
            problem:
                "must be unspecified, keyCompromise, affiliationChanged, superseded, cessationOfOperation or \
                  privilegeWithdrawn"
                    .to_owned(),
        }
    })
}

/// A serial as it is stored: lowercase, two digits an octet, no leading zero octets.
fn normal_serial(text: &str) -> String {
    let digits: String = text.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
    let digits = digits.strip_prefix("0x").unwrap_or(&digits);
    let even = if digits.len().is_multiple_of(2) { digits.to_owned() } else { format!("0{digits}") };
    let mut rest = even.as_str();
    while let Some(shorter) = rest.strip_prefix("00").filter(|shorter| !shorter.is_empty()) {
        rest = shorter;
    }
    rest.to_owned()
}

impl Agents {
    /// Revokes certificates, and gives them. Goes on under a halt.
    ///
    /// Errors: [`EnrollmentError::Unknown`], [`EnrollmentError::UnknownSerial`], [`EnrollmentError::AlreadyRevoked`].
    pub async fn revoke(
        &self,
        which: &Which,
        reason: RevocationReason,
        actor: &str,
    ) -> Result<Vec<Revocation>, EnrollmentError> {
        let now = self.pki().clock.now().seconds();
        let mut tx = self.pki().store.write().await?;
        let (named, mut revocations) = match which {
            Which::Agent(agent_id) => {
                let agent = store::agent(&mut tx, agent_id).await?;
                let agent = agent.ok_or_else(|| EnrollmentError::Unknown(agent_id.clone()))?;
                (agent_id.clone(), self.certificates_of(&mut tx, &agent, reason, actor, now).await?)
            }
            Which::Serial(serial) => {
                let serial = normal_serial(serial);
                let mut found = Vec::new();
                for agent_id in agents_of_serial(&mut tx, &serial).await? {
                    let Some(agent) = store::agent(&mut tx, &agent_id).await? else { continue };
                    found.extend(self.certificates_of(&mut tx, &agent, reason, actor, now).await?);
                }
                found.retain(|revocation| revocation.serial == serial);
                if found.is_empty() {
                    return Err(EnrollmentError::UnknownSerial(serial));
                }
                (serial, found)
            }
        };
        let mut fresh = Vec::with_capacity(revocations.len());
        for revocation in revocations.drain(..) {
            if !revocation::store::is_revoked(&mut tx, &revocation.fingerprint).await? {
                fresh.push(revocation);
            }
        }
        if fresh.is_empty() {
            return Err(EnrollmentError::AlreadyRevoked(named));
        }
        revocation::store::insert(&mut tx, &fresh).await?;
        tx.commit(&fresh.iter().map(|revocation| revocation.event(actor)).collect::<Vec<_>>()).await?;
        self.pki().everywhere().await?;
        Ok(fresh)
    }

    /// Every certificate that proves an agent or did, as it would be revoked.
    pub(super) async fn certificates_of(
        &self,
        tx: &mut impl Query,
        agent: &Agent,
        reason: RevocationReason,
        actor: &str,
        now: UnixTime,
    ) -> Result<Vec<Revocation>, EnrollmentError> {
        let authority = self.pki().authority();
        let mut candidates: Vec<Certificate> = authority.mastio_ca.iter().cloned().collect();
        candidates.push(authority.org_ca.clone());
        candidates.extend(authority.retiring.iter().map(|anchor| anchor.certificate.clone()));
        let revocation =
            |fingerprint: String, serial: String, issuer_key_id: String, not_after: UnixTime| Revocation {
                fingerprint,
                agent_id: agent.agent_id.clone(),
                serial,
                issuer_key_id,
                not_after,
                revoked_at: now,
                reason,
                revoked_by: actor.to_owned(),
            };
        let previous = agent.previous_cert_pem.as_deref().and_then(|pem| Certificate::from_pem(pem).ok());
        let mut found: Vec<Revocation> = Vec::new();
        for leaf in agent.leaf.iter().chain(previous.iter()) {
            let facts = CertificateFacts::of(leaf, &candidates);
            found.push(revocation(facts.fingerprint, facts.serial, facts.issuer_key_id, leaf.not_after()));
        }
        for former in store::superseded(tx, &agent.agent_id).await? {
            if found.iter().any(|other| other.fingerprint == former.fingerprint) {
                continue;
            }
            found.push(revocation(
                former.fingerprint,
                former.serial.unwrap_or_default(),
                former.issuer_key_id.unwrap_or_default(),
                // Not known of the oldest rows; it only says how long the entry is kept.
                former.not_after.unwrap_or(authority.org_ca.not_after()),
            ));
        }
        found.dedup_by(|next, kept| next.fingerprint == kept.fingerprint);
        Ok(found)
    }
}

async fn agents_of_serial(tx: &mut impl Query, serial: &str) -> Result<Vec<String>, EnrollmentError> {
    let found = store::agents_of_serial(tx, serial).await?;
    if !found.is_empty() {
        return Ok(found);
    }
    // Previous certificates have no facts beside them, and there are few: 48 hours' worth.
    let mut after = String::new();
    loop {
        let page = store::previous_certificates(tx, &after, PAGE_ROWS).await?;
        for (agent_id, pem) in &page {
            if Certificate::from_pem(pem).is_ok_and(|previous| previous.serial_hex() == serial) {
                return Ok(vec![agent_id.clone()]);
            }
        }
        match page.last() {
            Some((agent_id, _)) => after.clone_from(agent_id),
            None => return Ok(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_found_however_tools_print_it() {
        for text in ["0a1b", "0A:1B", "0x0a1b", "a1b", "00:0a:1b", "000a1b"] {
            assert_eq!(normal_serial(text), "0a1b", "{text}");
        }
        assert_eq!(normal_serial("00"), "00");
    }
}
