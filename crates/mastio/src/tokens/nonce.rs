//! DPoP nonces (RFC 9449 §8 and §9): proof that a DPoP proof was made just now.
//!
//! Stateless: a nonce is the HMAC of the present five minutes under a secret that lies sealed in the database, so that
//! every replica knows every other's nonces and a restart forgets none. The present and the previous one are accepted.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde_json::json;

use crate::pki::sealing::{set_state, state};
use crate::pki::{Pki, PkiError};

/// Seconds for which a nonce is the present one (wire contract §10).
const PERIOD_S: i64 = 300;
/// Bytes of a nonce: too many to guess in two periods.
const NONCE_BYTES: usize = 16;
const STATE_KEY: &str = "dpop_nonce_key";
const STATE_PLACE: &str = "deploy_state/dpop_nonce_key/value";

/// Makes nonces, and knows them again.
pub struct DpopNonces(hmac::Key);

impl DpopNonces {
    /// Opens the secret, or makes it where there is none yet.
    pub async fn open(pki: &Pki) -> Result<Self, PkiError> {
        if let Some(sealed) = state(&mut pki.store.read().await?, STATE_KEY).await? {
            return Self::from_sealed(pki, &sealed);
        }
        let mut tx = pki.store.write().await?;
        // Another replica may have been first.
        if let Some(sealed) = state(&mut tx, STATE_KEY).await? {
            return Self::from_sealed(pki, &sealed);
        }
        let secret = zeroize::Zeroizing::new(pki.entropy.text::<32>());
        set_state(&mut tx, STATE_KEY, &pki.sealing().seal(STATE_PLACE, secret.as_bytes())?).await?;
        tx.commit(&[Event {
            event_type: EventType::PkiDpopNonceKeyCreated,
            actor: "system".to_owned(),
            details: json!({}),
        }])
        .await?;
        Ok(Self::from_secret(secret.as_bytes()))
    }

    fn from_sealed(pki: &Pki, sealed: &str) -> Result<Self, PkiError> {
        Ok(Self::from_secret(pki.sealing().open(STATE_PLACE, sealed)?.as_bytes()))
    }

    fn from_secret(secret: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// The present nonce.
    #[must_use]
    pub fn current(&self, now: UnixTime) -> String {
        self.at(now.0.div_euclid(PERIOD_S))
    }

    /// The nonces that are accepted: the present one and the one before.
    #[must_use]
    pub fn accepted(&self, now: UnixTime) -> [String; 2] {
        let period = now.0.div_euclid(PERIOD_S);
        [self.at(period), self.at(period - 1)]
    }

    fn at(&self, period: i64) -> String {
        let tag = hmac::sign(&self.0, format!("mastio dpop nonce\0{period}").as_bytes());
        URL_SAFE_NO_PAD.encode(tag.as_ref().get(..NONCE_BYTES).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_accepted_for_its_own_five_minutes_and_the_next() {
        let nonces = DpopNonces::from_secret(b"secret");
        let given = nonces.current(UnixTime(1_200));
        for (now, accepted) in
            [(1_199, false), (1_200, true), (1_499, true), (1_500, true), (1_799, true), (1_800, false)]
        {
            assert_eq!(nonces.accepted(UnixTime(now)).contains(&given), accepted, "{now}");
        }
        assert_eq!(given.len(), 22);
        assert_ne!(given, DpopNonces::from_secret(b"another").current(UnixTime(1_200)));
        // Another replica with the same secret.
        assert_eq!(given, DpopNonces::from_secret(b"secret").current(UnixTime(1_499)));
    }
}
