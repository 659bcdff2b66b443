//! The set-up of a new organisation: one person who can read the log becomes its first operator with a name.
//!
//! A deploy that we have created offers it until it is done: each boot makes a token, prints it in the log once, and
//! keeps only its digest. Whoever sends it names the organisation and themselves, and gets a secret of their own, shown
//! once. An adopted deploy has its operator already and offers none. The shared secret goes on beside it.

use std::net::IpAddr;

use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{Issued, OperatorError, Operators, check_name, event, store};
use crate::http::authn::Role;
use crate::store::StoreError;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 16;
/// Characters of an organisation's name.
const ORGANISATION_CHARACTERS: std::ops::RangeInclusive<usize> = 1..=100;

fn digest(token: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    crate::pki::store::hex(digest.as_ref())
}

impl Operators {
    /// A token for the set-up, which replaces the one of the boot before. `None`: there is nothing to set up.
    pub async fn offer_setup(&self) -> Result<Option<Zeroizing<String>>, StoreError> {
        let mut tx = self.store.write().await?;
        if store::setup(&mut tx).await?.is_none() {
            return Ok(None);
        }
        let token = Zeroizing::new(self.entropy.text::<TOKEN_BYTES>());
        store::offer_setup(&mut tx, &digest(&token)).await?;
        tx.commit_unaudited().await?;
        Ok(Some(token))
    }

    /// Whether the deploy waits to be set up.
    pub async fn is_setup_open(&self) -> Result<bool, StoreError> {
        Ok(store::setup(&mut self.store.read().await?).await?.is_some())
    }

    /// What the organisation is called; nothing where nobody has said it.
    pub async fn organisation_name(&self) -> Result<Option<String>, StoreError> {
        store::organisation_name(&mut self.store.read().await?).await
    }

    /// Names the organisation and its first operator, an admin, who gets a secret.
    ///
    /// Errors: [`OperatorError::SetupToken`] for a wrong token, and where there is nothing to set up;
    /// [`OperatorError::TooManyTries`]; [`OperatorError::Organisation`], [`OperatorError::Name`],
    /// [`OperatorError::Exists`], after which the token is still good.
    pub async fn set_up(
        &self,
        token: &str,
        organisation: &str,
        name: &str,
        address: IpAddr,
        now: UnixTime,
    ) -> Result<Issued, OperatorError> {
        self.attempt(address, now)?;
        let wanted = digest(token);
        let matches = |stored: &Option<String>| {
            stored.as_deref().is_some_and(|stored| bool::from(stored.as_bytes().ct_eq(wanted.as_bytes())))
        };
        if !matches(&store::setup(&mut self.store.read().await?).await?) {
            return Err(OperatorError::SetupToken);
        }
        self.backoff.succeeded(address);
        check_name(name)?;
        if !ORGANISATION_CHARACTERS.contains(&organisation.chars().count()) {
            return Err(OperatorError::Organisation);
        }
        let (secret, credential) = self.new_secret().await?;
        let mut tx = self.store.write().await?;
        // Read again under the lock: of two who have the token, one sets up.
        if !matches(&store::setup(&mut tx).await?) {
            return Err(OperatorError::SetupToken);
        }
        if !store::insert(&mut tx, name, Role::Admin, &credential, &now.to_rfc3339(), "setup").await? {
            return Err(OperatorError::Exists(name.to_owned()));
        }
        store::end_setup(&mut tx, organisation).await?;
        let details =
            json!({ "organisation": organisation, "operator": name, "address": address.to_string() });
        tx.commit(&[event(EventType::DeploySetUp, name, details)]).await?;
        Ok(Issued { name: name.to_owned(), role: Role::Admin, secret })
    }
}
