//! The password of the predecessor's dashboard: `admin_password_hash` in `proxy_config`, a bcrypt hash.
//!
//! Whoever could sign in there can sign in here, as `admin`, and only at the sign-in: programs have the shared secret. The
//! first sign-in replaces the hash by an argon2id one. Where the predecessor's `local_password_enabled` says no, the
//! password is nobody's; the shared secret goes on working, so nobody is locked out.

use mastio_core::audit::event::EventType;
use serde_json::json;
use zeroize::Zeroizing;

use super::{OperatorError, Operators, credential, event, store};
use crate::http::authn::AdminCaller;
use crate::http::error::chain;
use crate::store::StoreError;

impl Operators {
    /// Whether the deploy has a password of its predecessor's dashboard that may be used.
    pub async fn has_password(&self) -> Result<bool, StoreError> {
        Ok(store::password(&mut self.store.read().await?).await?.is_some())
    }

    /// Whether `secret` is that password. A hash of the predecessor's form is replaced.
    pub(super) async fn password_matches(&self, secret: &str) -> Result<bool, OperatorError> {
        let Some(stored) = store::password(&mut self.store.read().await?).await? else { return Ok(false) };
        let old = credential::is_bcrypt(&stored);
        let (expected, candidate) = (stored.clone(), Zeroizing::new(secret.to_owned()));
        let matches = self.hash(move || match old {
            true => credential::matches_bcrypt(&expected, &candidate),
            false => credential::matches(&expected, &candidate),
        });
        if !matches.await? {
            return Ok(false);
        }
        // Whoever has shown the password gets in, also where its hash cannot be replaced now.
        if old && let Err(error) = self.replace_password_hash(&stored, secret).await {
            tracing::warn!(error = chain(&error), "password_hash_not_replaced");
        }
        Ok(true)
    }

    async fn replace_password_hash(&self, stored: &str, secret: &str) -> Result<(), OperatorError> {
        let (candidate, salt) =
            (Zeroizing::new(secret.to_owned()), self.entropy.bytes::<{ credential::SALT_BYTES }>());
        let replacement = self.hash(move || credential::hash(&candidate, &salt)).await??;
        let mut tx = self.store.write().await?;
        // Of two who sign in at once, one replaces it.
        if store::replace_password(&mut tx, stored, &replacement).await? {
            let details = json!({ "name": AdminCaller::SHARED, "from": "bcrypt", "to": "argon2id" });
            tx.commit(&[event(EventType::OperatorSecretRehashed, AdminCaller::SHARED, details)]).await?;
        }
        Ok(())
    }
}
