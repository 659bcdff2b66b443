//! Operators: who may act on this deploy, how they prove it, and what their role lets them do.
//!
//! The shared secret (`MCP_PROXY_ADMIN_SECRET`) is the first operator: `admin`, always there, never locked out; on an
//! adopted deploy the password of the predecessor's dashboard signs in as `admin` too ([`password`]). The
//! others have a name, a [`Role`] and a secret of their own, which we make, show once, and keep only as its argon2id
//! hash ([`credential`]). They present it as `X-Admin-Secret: NAME:SECRET`, or at the dashboard's sign-in. [`access`] is
//! the one table of which role each route asks for, and [`http::guard`] holds every request to it.
//!
//! A hash costs time, so a secret that was right is remembered for minutes by a keyed digest, bound to the stored hash: a
//! reset or a deactivation counts at once, on every replica. How many hashes are computed at once, how many callers wait
//! for it, and how fast an address may guess are bounded. A name that does not exist costs as much as one that does. No
//! name is ever locked, because then anybody could lock it; our secrets are too long to be guessed.

pub mod access;
mod backoff;
mod credential;
pub mod error;
pub mod http;
mod password;
mod setup;
pub mod sso;
mod store;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use moka::future::Cache;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::entropy::Entropy;
use crate::http::authn::{AdminCaller, AdminSecret, Role};
use crate::http::error::chain;
use crate::store::{Store, StoreError};
use backoff::Backoff;
pub use error::OperatorError;

/// Characters of an operator's name at most.
const NAME_CHARACTERS_MAX: usize = 64;
/// Names that the audit log uses for those who are no operators.
const RESERVED_NAMES: [&str; 6] = ["admin", "system", "command-line", "predecessor", "setup", "unknown"];
/// Random bytes of an operator's secret: as many bits as a SHA-256 digest has.
const SECRET_BYTES: usize = 32;
/// How long a secret that was right is not hashed again.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Secrets that are remembered at most.
const REMEMBERED_MAX: u64 = 1024;
/// Hashes that are computed at once: each takes 19 MiB and a core.
const HASHES_AT_ONCE: usize = 2;
/// Callers that wait for their turn at most.
const WAITING_MAX: usize = 32;
/// A sign of life is written at most so often: reading must not mean writing.
const TOUCH_S: i64 = 60;

/// An operator with a secret of their own, as their row says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// How they sign in, and how the audit log names them.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// When they were added, as stored.
    pub created_at: String,
    /// Who added them.
    pub created_by: String,
    /// When they were last seen, to the minute.
    pub last_seen_at: Option<String>,
    /// When they were deactivated, which is for good.
    pub deactivated_at: Option<String>,
    credential: String,
}

impl Operator {
    /// As the API and the command line show it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "role": self.role.as_str(),
            "created_at": self.created_at,
            "created_by": self.created_by,
            "last_seen_at": self.last_seen_at,
            "deactivated_at": self.deactivated_at,
        })
    }
}

/// An operator's secret, shown once.
pub struct Issued {
    /// Whose.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// The secret, base64url.
    pub secret: Zeroizing<String>,
}

impl Issued {
    /// As the API and the command line show it, this once.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "role": self.role.as_str(),
            "secret": *self.secret,
            "header": format!("X-Admin-Secret: {}:{}", self.name, *self.secret),
        })
    }
}

/// The operators of this deploy.
pub struct Operators {
    store: Store,
    entropy: Arc<Entropy>,
    shared: AdminSecret,
    backoff: Backoff,
    /// Of this process alone: what is remembered is worth nothing elsewhere.
    remembering_key: hmac::Key,
    remembered: Cache<Vec<u8>, String>,
    hashing: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Operators {
    /// The operators in `store`, and the shared secret.
    #[must_use]
    pub fn new(store: Store, entropy: Arc<Entropy>, shared: AdminSecret) -> Self {
        Self {
            store,
            remembering_key: hmac::Key::new(hmac::HMAC_SHA256, &entropy.bytes::<32>()),
            entropy,
            shared,
            backoff: Backoff::default(),
            remembered: Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(REMEMBERED).build(),
            hashing: Arc::new(Semaphore::new(HASHES_AT_ONCE)),
            waiting: Arc::new(Semaphore::new(HASHES_AT_ONCE + WAITING_MAX)),
        }
    }

    /// Who presents `credential`: the shared secret, or `NAME:SECRET`.
    ///
    /// Errors: [`OperatorError::Wrong`], the same for an unknown name, a wrong secret and a deactivated operator;
    /// [`OperatorError::TooManyTries`], never for the shared secret; [`OperatorError::Busy`].
    pub async fn authenticate(
        &self,
        credential: &[u8],
        address: IpAddr,
        now: UnixTime,
    ) -> Result<AdminCaller, OperatorError> {
        if self.shared.matches(credential) {
            return Ok(AdminCaller::shared());
        }
        let text = std::str::from_utf8(credential).map_err(|_| OperatorError::Wrong { failures: 0 })?;
        let (name, secret) = text.split_once(':').ok_or(OperatorError::Wrong { failures: 0 })?;
        if name == AdminCaller::SHARED && self.shared.matches(secret.as_bytes()) {
            return Ok(AdminCaller::shared());
        }
        let operator = self.active(name).await?;
        // Before the waits: what was right a minute ago must not wait for somebody else's guesses from here.
        if let Some(operator) = &operator
            && self.remembered.get(&self.remembering(name, secret)).await.as_ref()
                == Some(&operator.credential)
        {
            self.touch(operator, now).await;
            return Ok(caller(operator));
        }
        self.judge(operator, name, secret, address, now).await
    }

    /// Who signs in with `name` (empty: the shared secret's, or the predecessor's password) and `secret`. Errors: as [`Self::authenticate`].
    ///
    /// Here the shared secret waits too after wrong tries; in the header it goes on working.
    pub async fn sign_in(
        &self,
        name: &str,
        secret: &str,
        address: IpAddr,
        now: UnixTime,
    ) -> Result<AdminCaller, OperatorError> {
        if !name.is_empty() && name != AdminCaller::SHARED {
            return self.judge(self.active(name).await?, name, secret, address, now).await;
        }
        let failures = self.attempt(address, now)?;
        if !self.shared.matches(secret.as_bytes()) && !self.password_matches(secret).await? {
            return Err(OperatorError::Wrong { failures });
        }
        self.backoff.succeeded(address);
        Ok(AdminCaller::shared())
    }

    /// Who acts as `name` now, without asking for a secret: for what has proved the name already, such as a session.
    pub async fn standing(&self, name: &str) -> Result<Option<AdminCaller>, StoreError> {
        if name == AdminCaller::SHARED {
            return Ok(Some(AdminCaller::shared()));
        }
        Ok(self.active(name).await?.as_ref().map(caller))
    }

    /// Every operator with a secret of their own, by name.
    pub async fn list(&self) -> Result<Vec<Operator>, StoreError> {
        store::operators(&mut self.store.read().await?).await
    }

    /// The list as the API and the command line show it: the shared secret first.
    pub async fn to_json(&self) -> Result<Value, StoreError> {
        let shared = json!({
            "name": AdminCaller::SHARED,
            "role": Role::Admin.as_str(),
            "shared_secret": true,
            "last_seen_at": null,
            "deactivated_at": null,
        });
        let others = self.list().await?;
        Ok(std::iter::once(shared).chain(others.iter().map(Operator::to_json)).collect())
    }

    /// Adds an operator, and gives their secret, which nobody can read again.
    ///
    /// Errors: [`OperatorError::Name`]; [`OperatorError::Exists`], also for one who was deactivated: what the audit log
    /// says of a name must stay about one person.
    pub async fn add(&self, name: &str, role: Role, actor: &str) -> Result<Issued, OperatorError> {
        check_name(name)?;
        let (secret, credential) = self.new_secret().await?;
        let now = self.store.clock().now().seconds();
        let mut tx = self.store.write().await?;
        if !store::insert(&mut tx, name, role, &credential, &now.to_rfc3339(), actor).await? {
            return Err(OperatorError::Exists(name.to_owned()));
        }
        let details = json!({ "name": name, "role": role.as_str() });
        tx.commit(&[event(EventType::OperatorAdded, actor, details)]).await?;
        Ok(Issued { name: name.to_owned(), role, secret })
    }

    /// Deactivates an operator for good: their next request is refused, their sessions end, and what they have proposed
    /// or approved and nobody has run yet is void.
    ///
    /// Errors: [`OperatorError::Shared`]; [`OperatorError::Unknown`]; [`OperatorError::Deactivated`].
    pub async fn deactivate(&self, name: &str, actor: &str) -> Result<(), OperatorError> {
        let now = self.store.clock().now().seconds();
        let mut tx = self.store.write().await?;
        present(store::operator(&mut tx, name).await?, name)?;
        store::deactivate(&mut tx, name, &now.to_rfc3339()).await?;
        store::end_sessions(&mut tx, name).await?;
        let mut events = vec![event(EventType::OperatorDeactivated, actor, json!({ "name": name }))];
        for (proposal_id, migration_id) in store::void_proposals(&mut tx, name).await? {
            let details = json!({
                "proposal_id": proposal_id,
                "migration_id": migration_id,
                "operator_gone": name,
            });
            events.push(event(EventType::UpdateProposalVoid, actor, details));
        }
        tx.commit(&events).await?;
        Ok(())
    }

    /// Gives an operator another role, from their next request on. Errors: as [`Self::deactivate`].
    pub async fn set_role(&self, name: &str, role: Role, actor: &str) -> Result<(), OperatorError> {
        let mut tx = self.store.write().await?;
        let former = present(store::operator(&mut tx, name).await?, name)?.role;
        if former == role {
            return Ok(());
        }
        store::set_role(&mut tx, name, role).await?;
        let details = json!({ "name": name, "role": role.as_str(), "former_role": former.as_str() });
        tx.commit(&[event(EventType::OperatorRoleChanged, actor, details)]).await?;
        Ok(())
    }

    /// Gives an operator another secret; the former one, and their sessions, end at once. Errors: as
    /// [`Self::deactivate`].
    pub async fn reset_secret(&self, name: &str, actor: &str) -> Result<Issued, OperatorError> {
        let (secret, credential) = self.new_secret().await?;
        let mut tx = self.store.write().await?;
        let operator = present(store::operator(&mut tx, name).await?, name)?;
        store::set_credential(&mut tx, name, &credential).await?;
        store::end_sessions(&mut tx, name).await?;
        tx.commit(&[event(EventType::OperatorSecretReset, actor, json!({ "name": name }))]).await?;
        Ok(Issued { name: name.to_owned(), role: operator.role, secret })
    }

    /// Forgets the wrong tries of an address from which somebody has signed in.
    pub fn succeeded(&self, address: IpAddr) {
        self.backoff.succeeded(address);
    }

    async fn active(&self, name: &str) -> Result<Option<Operator>, StoreError> {
        let operator = store::operator(&mut self.store.read().await?, name).await?;
        Ok(operator.filter(|operator| operator.deactivated_at.is_none()))
    }

    /// Counts a sign-in of `address` as wrong before it is judged. Errors: [`OperatorError::TooManyTries`].
    pub fn attempt(&self, address: IpAddr, now: UnixTime) -> Result<u32, OperatorError> {
        self.backoff.attempt(address, now).map_err(|seconds| OperatorError::TooManyTries { seconds })
    }

    /// Hashes `secret` and compares it, whether or not there is such an operator.
    async fn judge(
        &self,
        operator: Option<Operator>,
        name: &str,
        secret: &str,
        address: IpAddr,
        now: UnixTime,
    ) -> Result<AdminCaller, OperatorError> {
        let failures = self.attempt(address, now)?;
        // The work must not tell an unknown name from a known one.
        let stored = operator.as_ref().map_or(credential::NOBODY, |operator| &operator.credential).to_owned();
        let candidate = Zeroizing::new(secret.to_owned());
        let matches = self.hash(move || credential::matches(&stored, &candidate)).await?;
        let Some(operator) = operator.filter(|_| matches) else {
            tracing::warn!(address = %address, failures, "operator_refused");
            return Err(OperatorError::Wrong { failures });
        };
        self.backoff.succeeded(address);
        self.remembered.insert(self.remembering(name, secret), operator.credential.clone()).await;
        self.touch(&operator, now).await;
        Ok(caller(&operator))
    }

    fn remembering(&self, name: &str, secret: &str) -> Vec<u8> {
        // A name has no colon, so that no two pairs share a text.
        let text = Zeroizing::new(format!("{name}:{secret}"));
        hmac::sign(&self.remembering_key, text.as_bytes()).as_ref().to_vec()
    }

    async fn new_secret(&self) -> Result<(Zeroizing<String>, String), OperatorError> {
        let secret = Zeroizing::new(self.entropy.text::<SECRET_BYTES>());
        let (to_hash, salt) = (secret.clone(), self.entropy.bytes::<{ credential::SALT_BYTES }>());
        let credential = self.hash(move || credential::hash(&to_hash, &salt)).await??;
        Ok((secret, credential))
    }

    /// Does work with argon2 off the executor's threads, a bounded number at once, with a bounded queue before it.
    async fn hash<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, OperatorError> {
        let _place = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| OperatorError::Busy)?;
        let turn = Arc::clone(&self.hashing).acquire_owned().await.map_err(|_| OperatorError::Busy)?;
        // The turn goes with the work: a caller who hangs up must not let in one more.
        let work = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        work.await.map_err(|_| OperatorError::Busy)
    }

    /// Notes a sign of life. Whoever may act does so also where it cannot be noted.
    async fn touch(&self, operator: &Operator, now: UnixTime) {
        let seen = operator.last_seen_at.as_deref().and_then(UnixTime::parse);
        if seen.is_some_and(|seen| now.0 - seen.0 < TOUCH_S) {
            return;
        }
        let touched = async {
            let mut tx = self.store.write().await?;
            store::touch(&mut tx, &operator.name, &now.to_rfc3339()).await?;
            tx.commit_unaudited().await
        };
        if let Err(error) = touched.await {
            tracing::warn!(name = operator.name, error = chain(&error), "operator_not_noted");
        }
    }
}

/// The role of this name; none given is an operator's.
pub(crate) fn role(name: Option<&str>) -> Result<Role, OperatorError> {
    let Some(name) = name else { return Ok(Role::Operator) };
    Role::parse(name).ok_or_else(|| OperatorError::UnknownRole(name.to_owned()))
}

fn caller(operator: &Operator) -> AdminCaller {
    AdminCaller { actor: operator.name.clone(), role: operator.role }
}

/// The operator who can be changed.
fn present(operator: Option<Operator>, name: &str) -> Result<Operator, OperatorError> {
    if name == AdminCaller::SHARED {
        return Err(OperatorError::Shared);
    }
    let operator = operator.ok_or_else(|| OperatorError::Unknown(name.to_owned()))?;
    match operator.deactivated_at {
        Some(_) => Err(OperatorError::Deactivated(operator.name)),
        None => Ok(operator),
    }
}

/// A name is what an HTTP header, a URL and the audit log can carry alike; e-mail addresses are such names.
fn check_name(name: &str) -> Result<(), OperatorError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = (1..=NAME_CHARACTERS_MAX).contains(&name.len())
        && name.starts_with(plain)
        && name.chars().all(|c| plain(c) || "._@+-".contains(c));
    match (good, RESERVED_NAMES.contains(&name)) {
        (true, false) => Ok(()),
        (true, true) => Err(OperatorError::Name("is one that the audit log uses itself".to_owned())),
        (false, _) => Err(OperatorError::Name(format!(
            "must be 1..={NAME_CHARACTERS_MAX} of a-z 0-9 . _ @ + - and begin with a letter or digit"
        ))),
    }
}

fn event(event_type: EventType, actor: &str, details: Value) -> Event {
    Event { event_type, actor: actor.to_owned(), details }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_a_header_a_url_and_the_audit_log_can_carry() {
        for good in ["a", "alice", "alice.b", "a-1_2", "alice+ops@example.com", "0day", &"a".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "Alice", "a:b", "a b", "-a", ".a", "ä", "a/b", "a\n", &"a".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for reserved in RESERVED_NAMES {
            assert!(check_name(reserved).is_err(), "{reserved}");
        }
    }
}
