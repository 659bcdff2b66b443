//! The identity of a deploy: made once in an empty database, and completed where a piece is missing.
//!
//! Order at boot: [`create_organisation`] (empty database only), then the update detector, then [`Pki::complete`]. So
//! nothing is ever added to a deploy whose halt has not been judged yet. Both sign under a permit that is read in
//! their own write transaction, which holds the epoch.

use std::sync::Arc;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::token::claims::kid_for_public_key_pem;
use mastio_core::x509::{Certificate, Names, Validity, profile, spki_pem};
use serde_json::json;

use super::keys::{PrivateKey, SealingKey};
use super::store::{self as rows, config_key};
use super::{BACKDATE_S, Pki, PkiError};
use crate::entropy::Entropy;
use crate::store::Store;
use crate::updates::halt;
use crate::values;

/// The Org CA lives fifteen years, the intermediate five, a token key's certificate one.
const ORG_CA_VALIDITY_S: i64 = 15 * 365 * 86_400;
const MASTIO_CA_VALIDITY_S: i64 = 5 * 365 * 86_400;
const TOKEN_KEY_VALIDITY_S: i64 = 365 * 86_400;

/// Whether the database has an organisation.
pub async fn has_organisation(store: &Store) -> Result<bool, PkiError> {
    let mut tx = store.read().await?;
    Ok(rows::config(&mut tx, config_key::ORG_CA_CERT).await?.is_some())
}

/// Makes a new organisation: an Org CA (P-256, `pathLen=1`) in an empty database.
///
/// `org_id`: by default the first 16 hex digits of the SHA-256 of the Org CA's public key.
pub async fn create_organisation(
    store: &Store,
    sealing: &SealingKey,
    org_id: Option<&str>,
    entropy: &Entropy,
) -> Result<String, PkiError> {
    let now = store.clock().now().seconds();
    let mut tx = store.write().await?;
    let permit = halt::permit_in(&mut tx).await??;
    let new = PrivateKey::generate_p256()?;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, new.key.spki_der());
    let org_id = org_id.map_or_else(|| rows::hex(&digest.as_ref()[..8]), str::to_owned);
    let tbs = profile::org_ca(
        Names { common_name: format!("{org_id} CA"), organization: Some(org_id.clone()) },
        new.key.spki_der(),
        &entropy.serial(),
        Validity { not_before: now.plus(-BACKDATE_S), not_after: now.plus(ORG_CA_VALIDITY_S) },
        1,
        new.key.signature_algorithm(),
    )?;
    let certificate = new.key.sign_certificate(&permit, tbs)?;
    rows::set_config(&mut tx, config_key::ORG_ID, &org_id).await?;
    let keys = Some((config_key::ORG_CA_KEY, &new));
    rows::set_ca(&mut tx, sealing, config_key::ORG_CA_CERT, &certificate, keys).await?;
    rows::wait_for_setup(&mut tx).await?;
    tx.commit(&[Event {
        event_type: EventType::DeployCreated,
        actor: "system".to_owned(),
        details: json!({ "org_id": org_id, "org_ca_fingerprint": certificate.fingerprint() }),
    }])
    .await?;
    Ok(org_id)
}

impl Pki {
    /// Adds what a working deploy has and this one lacks: the intermediate, the token key, its certificate.
    ///
    /// Does nothing while signing is halted, or where the key it would need is held elsewhere.
    pub async fn complete(&self) -> Result<(), PkiError> {
        let authority = self.refresh().await?;
        let now = self.clock.now().seconds();
        let mut tx = self.store.write().await?;
        let Ok(permit) = halt::permit_in(&mut tx).await? else { return Ok(()) };
        let mut events = Vec::new();

        let intermediate = match (&authority.mastio_ca, &authority.mastio_ca_key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), Arc::clone(key))),
            _ => match &authority.org_ca_key {
                // An Org CA with pathLen=0 leaves no room: no verifier would accept what it signs below itself.
                Some(org_ca_key)
                    if authority.org_ca.not_after() > now && !authority.org_ca_has_legacy_path_len() =>
                {
                    let new = PrivateKey::generate_p256()?;
                    let tbs = profile::mastio_ca(
                        &authority.org_ca,
                        Names {
                            common_name: format!("{} Mastio CA", authority.org_id),
                            organization: Some(authority.org_id.clone()),
                        },
                        new.key.spki_der(),
                        &self.entropy.serial(),
                        Validity {
                            not_before: now.plus(-BACKDATE_S),
                            not_after: now.plus(MASTIO_CA_VALIDITY_S).min(authority.org_ca.not_after()),
                        },
                        org_ca_key.signature_algorithm(),
                    )?;
                    let certificate = org_ca_key.sign_certificate(&permit, tbs)?;
                    let keys = Some((config_key::MASTIO_CA_KEY, &new));
                    rows::set_ca(&mut tx, &self.sealing, config_key::MASTIO_CA_CERT, &certificate, keys)
                        .await?;
                    events.push(issued("mastio_ca", &certificate));
                    Some((certificate, Arc::new(new.key)))
                }
                _ => None,
            },
        };
        let issuer = intermediate.as_ref().map(|(certificate, key)| (certificate, key.as_ref()));
        self.complete_token_key(&mut tx, &permit, &authority, issuer, now, &mut events).await?;
        if events.is_empty() {
            return Ok(());
        }
        // The intermediate is no halting fact, so no trigger moves the epoch for it.
        tx.bump_epoch().await?;
        tx.commit(&events).await?;
        self.refresh().await.map(drop)
    }

    /// The token key, and its certificate where there is an intermediate to sign it.
    async fn complete_token_key(
        &self,
        tx: &mut crate::store::WriteTx,
        permit: &halt::SignPermit,
        authority: &super::Authority,
        issuer: Option<(&Certificate, &PrivateKey)>,
        now: UnixTime,
        events: &mut Vec<Event>,
    ) -> Result<(), PkiError> {
        let spiffe_id = format!("spiffe://{}/proxy/{}", self.trust_domain, authority.org_id);
        let certify = |spki_der: &[u8]| -> Result<Option<Certificate>, PkiError> {
            let Some((issuer, issuer_key)) = issuer else { return Ok(None) };
            let tbs = profile::token_signer(
                issuer,
                &authority.org_id,
                &spiffe_id,
                spki_der,
                &self.entropy.serial(),
                Validity {
                    not_before: now.plus(-BACKDATE_S),
                    not_after: now.plus(TOKEN_KEY_VALIDITY_S).min(issuer.not_after()),
                },
                issuer_key.signature_algorithm(),
            )?;
            Ok(Some(issuer_key.sign_certificate(permit, tbs)?))
        };
        let certificate = match authority.active_token_key() {
            None => {
                let new = PrivateKey::generate_p256()?;
                let public_pem = spki_pem(new.key.spki_der());
                let kid = kid_for_public_key_pem(&public_pem);
                let certificate = certify(new.key.spki_der())?;
                let sealed = new.seal(&self.sealing, &rows::token_key_place(&kid))?;
                tx.execute(
                    "INSERT INTO mastio_keys (kid, pubkey_pem, privkey_pem, cert_pem, created_at, activated_at) \
                     VALUES ($1, $2, $3, $4, $5, $5)",
                    values![
                        &kid,
                        public_pem,
                        sealed,
                        certificate.as_ref().map(Certificate::to_pem),
                        now.to_rfc3339()
                    ],
                )
                .await?;
                events.push(Event {
                    event_type: EventType::PkiTokenKeyCreated,
                    actor: "system".to_owned(),
                    details: json!({ "kid": kid }),
                });
                certificate
            }
            Some(key) => {
                let chains = issuer.is_none_or(|(issuer, _)| {
                    key.certificate
                        .as_ref()
                        .is_some_and(|certificate| certificate.verify_signature(issuer).is_ok())
                });
                if chains {
                    return Ok(());
                }
                let certificate = certify(key.key.spki_der())?;
                tx.execute(
                    "UPDATE mastio_keys SET cert_pem = $1 WHERE kid = $2",
                    values![certificate.as_ref().map(Certificate::to_pem), &key.kid],
                )
                .await?;
                certificate
            }
        };
        events.extend(certificate.map(|certificate| issued("token_key", &certificate)));
        Ok(())
    }
}

/// The event of a certificate that we issued for ourselves.
pub(super) fn issued(purpose: &str, certificate: &Certificate) -> Event {
    Event {
        event_type: EventType::PkiCertificateIssued,
        actor: "system".to_owned(),
        details: json!({
            "purpose": purpose,
            "fingerprint": certificate.fingerprint(),
            "serial": certificate.serial_hex(),
            "not_after": certificate.not_after().to_rfc3339(),
        }),
    }
}
