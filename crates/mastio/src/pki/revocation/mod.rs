//! Which certificates no longer count, and the signed lists that tell others (RFC 5280 §5).
//!
//! We ourselves look into the database, on each request: `revoked_certificates` by fingerprint, and whether the agent is
//! active. The lists are for everybody else. There is one for each key that issues: the intermediate's, and the Org
//! CA's. A list has what was revoked under its key, and on hold the certificates of agents that are set aside. It is
//! signed anew when what it has to say changes, or half of its time is over, when somebody asks; its number is kept
//! by key and only grows, so that an Org CA that comes back by a rollback goes on where it was. The intermediate keeps
//! its key through an update, and what an update re-signs inherits its revocation, so its list goes on too. A retiring
//! key signs our TLS leaf and nothing else: certificates that only it has signed are refused here, and listed nowhere.
//!
//! Lists are exempt from the halt: they take trust away and give none.

pub mod store;

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use mastio_core::x509::crl::{RevocationReason, RevokedCertificate, crl};
use serde_json::{Value, json};

use super::keys::PrivateKey;
use super::store::hex;
use super::{Authority, Pki, PkiError};
use crate::updates::halt::ExemptPermit;

/// A list is good for so long.
const CRL_LIFETIME_S: i64 = 24 * 3600;
/// From then on a new one is signed for whoever asks.
const CRL_RENEWED_AFTER_S: i64 = CRL_LIFETIME_S / 2;
/// Lists begin this long before they are signed, for clocks that lag.
const CRL_BACKDATE_S: i64 = 60;
/// An entry stays until so long after its certificate's end (RFC 5280 §3.3 asks for one list more).
const KEPT_AFTER_END_S: i64 = 2 * CRL_LIFETIME_S;
/// How often a list is made again when another replica was faster.
const ROUNDS_MAX: usize = 5;

/// A certificate that no longer counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// SHA-256 of its DER, lowercase hex.
    pub fingerprint: String,
    /// Whose it was.
    pub agent_id: String,
    /// Its serial in lowercase hex; empty where it is not known.
    pub serial: String,
    /// Key id of the CA that signed it, lowercase hex; empty where none that we know did.
    pub issuer_key_id: String,
    /// When it ends by itself.
    pub not_after: UnixTime,
    /// Since when it does not count.
    pub revoked_at: UnixTime,
    /// Why.
    pub reason: RevocationReason,
    /// By whom.
    pub revoked_by: String,
}

impl Revocation {
    /// As operators read it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "agent_id": self.agent_id,
            "serial": self.serial,
            "fingerprint": self.fingerprint,
            "issuer_key_id": self.issuer_key_id,
            "not_after": self.not_after.to_rfc3339(),
            "revoked_at": self.revoked_at.to_rfc3339(),
            "reason": self.reason.as_str(),
            "revoked_by": self.revoked_by,
        })
    }

    /// The event that records it.
    #[must_use]
    pub fn event(&self, actor: &str) -> Event {
        Event {
            event_type: EventType::PkiCertificateRevoked,
            actor: actor.to_owned(),
            details: json!({
                "agent_id": self.agent_id,
                "serial": self.serial,
                "fingerprint": self.fingerprint,
                "reason": self.reason.as_str(),
            }),
        }
    }
}

/// A signed list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crl {
    /// crlNumber.
    pub number: i64,
    /// thisUpdate.
    pub this_update: UnixTime,
    /// nextUpdate.
    pub next_update: UnixTime,
    /// SHA-256 over issuer and entries: whether there is anything new to say.
    pub content_digest: String,
    /// The list.
    pub der_base64: String,
}

impl Crl {
    /// The list's DER.
    ///
    /// Errors: [`PkiError::State`] where the row holds something else.
    pub fn der(&self) -> Result<Vec<u8>, PkiError> {
        STANDARD.decode(&self.der_base64).map_err(|_| PkiError::State { what: "a list in pki_crls" })
    }
}

struct Issuer {
    certificate: Certificate,
    key: Arc<PrivateKey>,
}

impl Authority {
    /// The keys that sign lists, the one that issues agents' certificates first.
    fn crl_issuers(&self) -> Vec<Issuer> {
        let pairs = [(self.mastio_ca.as_ref(), &self.mastio_ca_key), (Some(&self.org_ca), &self.org_ca_key)];
        pairs
            .into_iter()
            .filter_map(|(certificate, key)| {
                Some(Issuer { certificate: certificate?.clone(), key: Arc::clone(key.as_ref()?) })
            })
            .collect()
    }
}

fn octets(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2);
    let octets: Option<Vec<u8>> =
        digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
    octets.map(|octets| octets.into_iter().skip_while(|octet| *octet == 0).collect())
}

/// What a list has to say, each serial once: a revocation goes before a hold.
fn entries(rows: Vec<(String, UnixTime, RevocationReason)>) -> Vec<RevokedCertificate> {
    let mut entries: Vec<RevokedCertificate> = Vec::with_capacity(rows.len());
    for (serial, revoked_at, reason) in rows {
        // A predecessor's serial may be anything; what cannot stand in a list is refused here all the same.
        let Some(serial) = octets(&serial).filter(|serial| (1..=20).contains(&serial.len())) else {
            continue;
        };
        entries.push(RevokedCertificate { serial, revoked_at, reason });
    }
    entries.sort_by(|one, other| {
        let held = |entry: &RevokedCertificate| entry.reason == RevocationReason::CertificateHold;
        (&one.serial, held(one), one.revoked_at).cmp(&(&other.serial, held(other), other.revoked_at))
    });
    entries.dedup_by(|next, kept| next.serial == kept.serial);
    entries
}

fn digest(issuer: &Certificate, entries: &[RevokedCertificate]) -> String {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(issuer.der());
    for entry in entries {
        let line = format!("\n{} {} {}", hex(&entry.serial), entry.revoked_at.0, entry.reason.as_str());
        context.update(line.as_bytes());
    }
    hex(context.finish().as_ref())
}

impl Pki {
    /// The list of the key that issues agents' certificates, or of the key with the identifier `key_id` in hex.
    ///
    /// Errors: [`PkiError::NoCrl`] where no key of ours has that identifier.
    pub async fn crl(&self, key_id: Option<&str>) -> Result<Arc<Crl>, PkiError> {
        let issuers = self.current().await?.crl_issuers();
        let issuer = issuers
            .into_iter()
            .find(|issuer| key_id.is_none_or(|wanted| hex(&issuer.certificate.key_id()) == wanted))
            .ok_or(PkiError::NoCrl)?;
        self.crl_of(&issuer).await
    }

    /// Every list of ours, the one of the key that issues agents' certificates first.
    pub async fn crls(&self) -> Result<Vec<Arc<Crl>>, PkiError> {
        let mut crls = Vec::new();
        for issuer in self.current().await?.crl_issuers() {
            crls.push(self.crl_of(&issuer).await?);
        }
        Ok(crls)
    }

    async fn crl_of(&self, issuer: &Issuer) -> Result<Arc<Crl>, PkiError> {
        let key_id = hex(&issuer.certificate.key_id());
        for _round in 0..ROUNDS_MAX {
            // Every write to what a list tells moves the epoch.
            let epoch = self.current().await?.epoch;
            let now = self.clock.now().seconds();
            if let Some(known) = self.crl_known(&key_id, epoch, now) {
                return Ok(known);
            }
            let mut tx = self.store.read().await?;
            let entries = entries(store::entries(&mut tx, &key_id, now.plus(-KEPT_AFTER_END_S)).await?);
            let before = store::crl(&mut tx, &key_id).await?;
            drop(tx);
            let content_digest = digest(&issuer.certificate, &entries);
            if let Some(present) = &before
                && present.content_digest == content_digest
                && !is_due(present, now)
            {
                return Ok(self.remember_crl(key_id, epoch, present.clone()));
            }
            let number = before.as_ref().map_or(0, |present| present.number) + 1;
            let (this_update, next_update) = (now.plus(-CRL_BACKDATE_S), now.plus(CRL_LIFETIME_S));
            let algorithm = issuer.key.signature_algorithm();
            let tbs = crl(&issuer.certificate, number, this_update, next_update, &entries, algorithm)?;
            let (key, certificate) = (Arc::clone(&issuer.key), issuer.certificate.clone());
            // An Org CA's RSA key takes milliseconds.
            let der = tokio::task::spawn_blocking(move || {
                key.sign_crl(&ExemptPermit::for_crl(), &certificate, tbs)
            })
            .await
            .map_err(|_| PkiError::Stopped)??;
            let signed =
                Crl { number, this_update, next_update, content_digest, der_base64: STANDARD.encode(der) };
            let mut tx = self.store.write().await?;
            if store::crl(&mut tx, &key_id).await? != before {
                // Another replica was faster: one number, one list.
                continue;
            }
            store::set_crl(&mut tx, &key_id, &signed).await?;
            tx.commit(&[Event {
                event_type: EventType::PkiCrlIssued,
                actor: "system".to_owned(),
                details: json!({
                    "issuer_key_id": key_id,
                    "number": number,
                    "entries": entries.len(),
                    "next_update": next_update.to_rfc3339(),
                }),
            }])
            .await?;
            return Ok(self.remember_crl(key_id, epoch, signed));
        }
        Err(PkiError::Moved)
    }

    fn crl_known(&self, key_id: &str, epoch: i64, now: UnixTime) -> Option<Arc<Crl>> {
        let known = self.crls.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (at, crl) = known.get(key_id)?;
        (*at == epoch && !is_due(crl, now)).then(|| Arc::clone(crl))
    }

    fn remember_crl(&self, key_id: String, epoch: i64, crl: Crl) -> Arc<Crl> {
        let crl = Arc::new(crl);
        let mut known = self.crls.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // One for each key that we hold; what an update has replaced is asked for no more.
        known.retain(|_, (at, _)| *at == epoch);
        known.insert(key_id, (epoch, Arc::clone(&crl)));
        crl
    }

    /// Revoked certificates, a page at a time, by fingerprint after `after`.
    pub async fn revocations(&self, after: &str, limit: i64) -> Result<Vec<Revocation>, PkiError> {
        Ok(store::page(&mut self.store.read().await?, after, limit).await?)
    }
}

fn is_due(crl: &Crl, now: UnixTime) -> bool {
    now >= crl.this_update.plus(CRL_RENEWED_AFTER_S) || now < crl.this_update
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_listed_once_and_a_revocation_goes_before_a_hold() {
        let hold = RevocationReason::CertificateHold;
        let rows = vec![
            ("0a".to_owned(), UnixTime(1), hold),
            ("0a".to_owned(), UnixTime(5), RevocationReason::KeyCompromise),
            ("ff01".to_owned(), UnixTime(2), hold),
            (String::new(), UnixTime(2), hold),
            ("not hex".to_owned(), UnixTime(2), hold),
            ("0000".to_owned(), UnixTime(2), hold),
        ];
        let listed: Vec<_> = entries(rows).into_iter().map(|entry| (entry.serial, entry.reason)).collect();
        assert_eq!(listed, [(vec![0x0a], RevocationReason::KeyCompromise), (vec![0xff, 0x01], hold)]);
    }
}
