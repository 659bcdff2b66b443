//! The organisation's certificate authority: Org CA → Mastio intermediate → leaves, and the token keys.
//!
//! What is in force is a row in the database; [`Authority`] is that row's image in memory, with its keys opened,
//! and carries the epoch at which it was read. [`Pki`] holds the newest image and the halt gate, reads both anew
//! whenever the epoch moves, and is where everyone else asks for a permit. A permit and an image of different
//! epochs do not sign together.
//!
//! `proxy_config` has the current Org CA (`org_ca_cert`, `org_ca_key`) and intermediate (`mastio_ca_cert`,
//! `mastio_ca_key`), `mastio_keys` the token keys, `pki_anchors` the Org CAs that are retiring,
//! `pki_cross_certificates` the old-with-new certificates. Private keys are sealed and opened in [`keys`] alone.

pub mod bootstrap;
pub mod byoca;
pub mod error;
pub mod http;
pub mod keys;
pub mod revocation;
pub mod seal_rotation;
pub mod sealing;
pub mod store;
pub mod tls;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mastio_core::time::UnixTime;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::path::{self, Anchor, PathError};
use mastio_core::x509::{Certificate, Validity, profile};
use tokio::sync::{Mutex, watch};

use crate::clock::Clock;
use crate::entropy::Entropy;
use crate::store::{ReadTx, Store};
use crate::updates::halt::{self, Gate, Halted, Permit, SignPermit};
pub use error::PkiError;
use keys::{PrivateKey, SealingKey};

/// An agent leaf lives this long.
pub const AGENT_LEAF_VALIDITY_S: i64 = 365 * 86_400;
/// Certificates begin this long before they are signed, for clocks that lag.
pub const BACKDATE_S: i64 = 300;

/// Identities are judged by an image that was in force so recently at most. Four looks a second keep it younger.
const IMAGE_AGE_MAX: Duration = Duration::from_secs(1);

/// An Org CA that is being phased out. Its name and key are still trusted; its key signs our TLS leaf and
/// nothing else, where it is still there.
pub struct RetiringAnchor {
    /// The certificate.
    pub certificate: Certificate,
    /// The key, until the overlap ends; absent after a rollback, which destroys the replaced root's key.
    pub key: Option<Arc<PrivateKey>>,
}

/// A key that signs tokens, or did.
pub struct TokenKey {
    /// `mastio-` and 16 hex digits.
    pub kid: String,
    /// The public half.
    pub public: PublicJwk,
    /// The private half.
    pub key: Arc<PrivateKey>,
    /// Its certificate under the intermediate, where it has one.
    pub certificate: Option<Certificate>,
    /// Absent while staged.
    pub activated_at: Option<UnixTime>,
    /// Set when another key took over.
    pub deprecated_at: Option<UnixTime>,
    /// Until when signatures of a deprecated key are still accepted.
    pub expires_at: Option<UnixTime>,
}

impl TokenKey {
    /// Whether tokens signed by this key are accepted at `now`.
    #[must_use]
    pub fn verifies_at(&self, now: UnixTime) -> bool {
        self.activated_at.is_some() && self.expires_at.is_none_or(|expires_at| now < expires_at)
    }
}

/// The PKI state of one epoch, its keys opened.
pub struct Authority {
    /// The epoch at which it was read.
    pub epoch: i64,
    /// The organisation's id; never changes, not even with the Org CA.
    pub org_id: String,
    /// The current Org CA.
    pub org_ca: Certificate,
    /// Its key; absent where it is held elsewhere.
    pub org_ca_key: Option<Arc<PrivateKey>>,
    /// The Mastio intermediate.
    pub mastio_ca: Option<Certificate>,
    /// Its key.
    pub mastio_ca_key: Option<Arc<PrivateKey>>,
    /// Org CAs that are being phased out.
    pub retiring: Vec<RetiringAnchor>,
    /// Old-with-new certificates (RFC 4210 §4.4).
    pub cross_certificates: Vec<Certificate>,
    /// Token keys, by `kid`.
    pub token_keys: Vec<TokenKey>,
    /// The current Org CA, then the retiring ones in their order, then any other.
    trust: Vec<Anchor>,
    opened: HashMap<String, Arc<PrivateKey>>,
}

impl Authority {
    /// The anchors that client certificates may chain to: the current Org CA, then the retiring ones.
    #[must_use]
    pub fn trust(&self) -> &[Anchor] {
        &self.trust
    }

    /// The same without those that retire: what is left when the overlap ends.
    #[must_use]
    pub fn staying_trust(&self) -> Vec<Anchor> {
        let retires = |index: usize| (1..=self.retiring.len()).contains(&index);
        self.trust
            .iter()
            .enumerate()
            .filter(|(index, _)| !retires(*index))
            .map(|(_, anchor)| anchor.clone())
            .collect()
    }

    /// Validates a client's certificate against the current and retiring anchors (design §4).
    pub fn validate_client(
        &self,
        leaf: &Certificate,
        presented: &[Certificate],
        now: UnixTime,
    ) -> Result<(), PathError> {
        path::validate(leaf, presented, self.mastio_ca.as_slice(), &self.trust, now).map(drop)
    }

    /// The token key that signs, where one is active.
    #[must_use]
    pub fn active_token_key(&self) -> Option<&TokenKey> {
        self.token_keys.iter().find(|key| key.activated_at.is_some() && key.deprecated_at.is_none())
    }

    /// Whether the Org CA is the defect of the page's worked example: `pathLen=0`.
    #[must_use]
    pub fn org_ca_has_legacy_path_len(&self) -> bool {
        self.org_ca.basic_constraints().is_some_and(|constraints| constraints.path_len == Some(0))
    }

    /// The current root first, then the retiring ones, as PEM: what `/pki/ca.crt` serves.
    #[must_use]
    pub fn bundle_pem(&self) -> String {
        let mut pem = self.org_ca.to_pem();
        for anchor in &self.retiring {
            pem.push_str(&anchor.certificate.to_pem());
        }
        pem
    }

    /// Issues an agent leaf under the intermediate, and gives the chain as PEM: leaf, intermediate.
    ///
    /// Errors: [`PkiError::NoIntermediate`] where there is none to sign with.
    pub fn issue_agent_leaf(
        &self,
        permit: &impl Permit,
        entropy: &Entropy,
        agent_id: &str,
        spiffe_id: &str,
        spki_der: &[u8],
        now: UnixTime,
    ) -> Result<(Certificate, String), PkiError> {
        let (Some(issuer), Some(key)) = (&self.mastio_ca, &self.mastio_ca_key) else {
            return Err(PkiError::NoIntermediate);
        };
        let not_after = now.plus(AGENT_LEAF_VALIDITY_S).min(issuer.not_after()).min(self.org_ca.not_after());
        let tbs = profile::agent_leaf(
            issuer,
            agent_id,
            &self.org_id,
            spiffe_id,
            spki_der,
            &entropy.serial(),
            Validity { not_before: now.plus(-BACKDATE_S), not_after },
            key.signature_algorithm(),
        )?;
        let leaf = key.sign_certificate(permit, tbs)?;
        let chain = leaf.to_pem() + &issuer.to_pem();
        Ok((leaf, chain))
    }
}

/// The certificate authority of this deploy. Shared by every capability.
pub struct Pki {
    /// The database.
    pub store: Store,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub entropy: Arc<Entropy>,
    /// The SPIFFE trust domain of agents.
    pub trust_domain: String,
    sealing: Arc<SealingKey>,
    gate: Gate,
    authority: ArcSwap<Authority>,
    /// When the image was last seen to be the one in the database: before that look began.
    confirmed: ArcSwap<Instant>,
    refreshing: Mutex<()>,
    epoch: watch::Sender<i64>,
    /// The newest revocation list of each key, and the epoch at which it was.
    crls: std::sync::Mutex<HashMap<String, (i64, Arc<revocation::Crl>)>>,
}

impl Pki {
    /// Reads the state in force. The identity has been bootstrapped already.
    pub async fn load(
        store: Store,
        sealing: SealingKey,
        trust_domain: String,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
    ) -> Result<Self, PkiError> {
        let looked = Instant::now();
        let mut tx = store.read().await?;
        let halt = halt::read(&mut tx).await?;
        let authority = store::load(&mut tx, &sealing, halt.epoch, &HashMap::new()).await?;
        drop(tx);
        Ok(Self {
            store,
            clock,
            entropy,
            trust_domain,
            sealing: Arc::new(sealing),
            epoch: watch::Sender::new(halt.epoch),
            gate: Gate::new(halt),
            authority: ArcSwap::from_pointee(authority),
            confirmed: ArcSwap::from_pointee(looked),
            crls: std::sync::Mutex::default(),
            refreshing: Mutex::new(()),
        })
    }

    /// The newest image that was read.
    #[must_use]
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// The gate, for showing the halt.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The key that seals keys.
    #[must_use]
    pub fn sealing(&self) -> &SealingKey {
        &self.sealing
    }

    /// The same, for a capability that seals what is its own.
    #[must_use]
    pub fn shared_sealing(&self) -> Arc<SealingKey> {
        Arc::clone(&self.sealing)
    }

    /// The right to sign one thing, with the image to sign from, both of one epoch.
    ///
    /// Errors: [`PkiError::Halted`]; [`PkiError::Store`] when a newer image cannot be read.
    pub async fn permit(&self) -> Result<(SignPermit, Arc<Authority>), PkiError> {
        loop {
            let permit = self.gate.permit()?;
            let authority = self.authority();
            if authority.epoch == permit.epoch() {
                return Ok((permit, authority));
            }
            // The two are swapped one after the other; whoever falls in between reads again.
            self.refresh().await?;
        }
    }

    /// Whether signing is halted right now. Errors: [`Halted`] with the reason.
    pub fn halted(&self) -> Result<(), Halted> {
        self.gate.permit().map(drop)
    }

    /// Reads state and halt anew, if the epoch in the database has moved.
    pub async fn refresh(&self) -> Result<Arc<Authority>, PkiError> {
        let _one_at_a_time = self.refreshing.lock().await;
        self.look().await
    }

    /// Reads state and halt anew, whether or not the epoch has moved: for whoever judges what is stored. Not every row that
    /// belongs to the image moves the epoch when SQL changes it.
    pub async fn reload(&self) -> Result<Arc<Authority>, PkiError> {
        let _one_at_a_time = self.refreshing.lock().await;
        let looked = Instant::now();
        let mut tx = self.store.read().await?;
        let halt = halt::read(&mut tx).await?;
        self.take_up(tx, halt, looked).await
    }

    /// The image to judge identities by: no older than [`IMAGE_AGE_MAX`], so that [`Self::everywhere`] can promise that
    /// what was taken back is taken back on every replica.
    ///
    /// Errors: [`PkiError::Store`] where the database has not answered for so long, and does not now.
    pub async fn current(&self) -> Result<Arc<Authority>, PkiError> {
        if self.confirmed.load().elapsed() < IMAGE_AGE_MAX {
            return Ok(self.authority());
        }
        let _one_at_a_time = self.refreshing.lock().await;
        // Whoever had the lock before has looked for us too.
        if self.confirmed.load().elapsed() < IMAGE_AGE_MAX {
            return Ok(self.authority());
        }
        self.look().await
    }

    /// Returns when what was committed before the call is in force on every replica: here at once, and elsewhere when no
    /// image that is still used can be older.
    pub async fn everywhere(&self) -> Result<(), PkiError> {
        self.refresh().await?;
        // A SQLite file has one server.
        if self.store.sqlite_path().is_none() {
            tokio::time::sleep(IMAGE_AGE_MAX).await;
        }
        Ok(())
    }

    async fn look(&self) -> Result<Arc<Authority>, PkiError> {
        let looked = Instant::now();
        let mut tx = self.store.read().await?;
        let halt = halt::read(&mut tx).await?;
        let present = self.authority();
        if present.epoch == halt.epoch && self.gate.halt().epoch == halt.epoch {
            self.confirmed.store(Arc::new(looked));
            return Ok(present);
        }
        self.take_up(tx, halt, looked).await
    }

    async fn take_up(
        &self,
        mut tx: ReadTx,
        halt: halt::Halt,
        looked: Instant,
    ) -> Result<Arc<Authority>, PkiError> {
        let present = self.authority();
        let authority = Arc::new(store::load(&mut tx, &self.sealing, halt.epoch, &present.opened).await?);
        drop(tx);
        let epoch = halt.epoch;
        self.authority.store(Arc::clone(&authority));
        let before = self.gate.halt();
        self.gate.set(halt);
        announce(&before, &self.gate.halt());
        self.confirmed.store(Arc::new(looked));
        self.epoch.send_replace(epoch);
        Ok(authority)
    }

    /// Tells whenever an image of another epoch is in force.
    #[must_use]
    pub fn epochs(&self) -> watch::Receiver<i64> {
        self.epoch.subscribe()
    }
}

/// Logs a halt that begins or ends, with the page's event name.
fn announce(before: &halt::Halt, after: &halt::Halt) {
    // An apply that has just committed halts for the same migration until it is verified: that is no news.
    let known = |reason: &halt::HaltReason| {
        before.reasons.contains(reason)
            || (reason.migration_id().is_some()
                && before.reasons.iter().any(|earlier| earlier.migration_id() == reason.migration_id()))
    };
    for reason in after.reasons.iter().filter(|reason| !known(reason)) {
        halt::log(reason);
    }
    if !before.reasons.is_empty() && after.reasons.is_empty() {
        tracing::info!("cullis_proxy_sign_halt_lifted");
    }
}
