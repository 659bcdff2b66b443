//! Tokens: a login challenge, the assertion countersigned, and the DPoP-bound access token.
//!
//! Signatures are made and verified where the request stands: each takes less than 100 µs, as much as a TLS handshake
//! does there anyway, and the way to another thread and back costs as much again. What takes longer goes elsewhere.
//!
//! A client proves its certificate's key in the TLS handshake, takes a challenge, signs an assertion over it, has it
//! countersigned, and trades it for an access token bound to a DPoP key of its own (wire contract §4). Order of a mint:
//! halt, proof, assertion, agent and path, permit, signature, and one durable commit that burns both `jti`s, writes
//! `auth.token_issued` and refuses a permit whose epoch has passed. Only then the token leaves. There is no unbound
//! token.
//!
//! Ordinary OAuth clients get the same tokens by the `client_credentials` grant ([`grant`]), ask about them by
//! introspection ([`introspection`], for [`resource_servers`]), and give them back by [`revocation`]; [`metadata`] tells
//! them how.

pub mod egress;
pub mod error;
pub(crate) mod form;
pub mod grant;
pub mod http;
pub mod introspection;
pub mod metadata;
pub mod nonce;
pub mod resource_servers;
pub mod revocation;
pub mod server_held;
mod store;

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::dpop::{Proof, ProofRequest, UnverifiedProof};
use mastio_core::time::UnixTime;
use mastio_core::token::assertion::{Assertion, UnverifiedAssertion};
use mastio_core::token::claims::{
    ACCESS_TOKEN_AUDIENCE, ACCESS_TOKEN_SCOPE, AccessTokenClaims, CallerClaims, Confirmation, TokenError,
    UnverifiedAccessToken, certificate_thumbprint,
};
use mastio_core::token::jws::assemble;
use mastio_core::x509::Certificate;
use moka::future::Cache;
use serde_json::json;

use crate::enrollment::{Agent, Agents, ProvenAgent};
use crate::http::context::Context;
use crate::pki::Pki;
use crate::store::ephemeral;
use crate::store::group::{Append, AppendError, Journal, OneUse};
use crate::updates::halt::SignPermit;
pub use error::TokenEndpointError;
pub use nonce::DpopNonces;

/// An access token lives fifteen minutes: also how long a withdrawn right can linger in one.
pub const ACCESS_TOKEN_LIFETIME_S: i64 = 900;
/// A login challenge lives two minutes.
pub const CHALLENGE_LIFETIME_S: i64 = 120;
/// A used `jti` is kept for so long: the proof's window on both sides, with room for clocks that jump.
const PROOF_REMEMBERED_S: i64 = 300;
/// How often a mint whose epoch moved is made again before the caller is told to come back.
const STALE_ROUNDS_MAX: usize = 5;
/// Verified access tokens that are remembered between requests.
const CACHE_ENTRIES_MAX: u64 = 50_000;

/// The authorization server.
pub struct Tokens {
    pki: Arc<Pki>,
    agents: Arc<Agents>,
    journal: Journal,
    nonces: Arc<DpopNonces>,
    nonce_required: bool,
    verified: Cache<[u8; 32], Arc<AccessTokenClaims>>,
}

/// An agent as a request names it, with the certificate whose key it has proved. Not judged yet.
struct Presented {
    subject: String,
    leaf: Certificate,
    beside: Vec<Certificate>,
}

/// What a token is asked for, once all of it has been verified.
struct Order {
    client: Presented,
    confirmation: Confirmation,
    audience: String,
    one_use: Vec<OneUse>,
}

/// A login challenge.
pub struct Challenge {
    /// 32 random bytes, base64url.
    pub nonce: String,
    /// For whom.
    pub agent_id: String,
}

/// An issued access token.
pub struct AccessToken {
    /// The JWT.
    pub access_token: String,
    /// Seconds it lives.
    pub expires_in: i64,
    /// `iss`.
    pub issuer: String,
    /// What it is bound to.
    pub confirmation: Confirmation,
}

/// An access token as a request shows it.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// The token.
    pub access_token: &'a str,
    /// Whether it came under the scheme `DPoP`; otherwise it was `Bearer`.
    pub dpop_scheme: bool,
    /// The proof beside it.
    pub proof: Option<&'a str>,
}

/// A caller whom an access token and its proof have established.
pub struct TokenCaller {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The proof's `jti`, to be burnt with what the request does; none where a certificate is the binding.
    pub one_use: Vec<OneUse>,
    /// `jti` of the access token, to be held against the deny list by the commit of what the request does.
    pub jwt_id: String,
    /// The epoch at which this was judged.
    pub epoch: i64,
    /// When the token was issued.
    pub issued_at: UnixTime,
    /// Until when it is good (exclusive).
    pub expires_at: UnixTime,
}

impl Tokens {
    /// Issues tokens for `agents`, recorded in `journal`. `nonce_required`: whether proofs need one of `nonces`.
    #[must_use]
    pub fn new(agents: Arc<Agents>, journal: Journal, nonces: Arc<DpopNonces>, nonce_required: bool) -> Self {
        let pki = Arc::clone(agents.pki());
        Self { pki, agents, journal, nonces, nonce_required, verified: Cache::new(CACHE_ENTRIES_MAX) }
    }

    fn verify_proof(
        &self,
        text: &str,
        method: &str,
        urls: &[String],
        access_token: Option<&str>,
        now: UnixTime,
    ) -> Result<Proof, TokenEndpointError> {
        let accepted = self.nonce_required.then(|| self.nonces.accepted(now));
        let nonce = accepted.as_ref().map(<[String; 2]>::as_slice);
        UnverifiedProof::parse(text)
            .and_then(|proof| proof.verify(&ProofRequest { method, urls, access_token, nonce, now }))
            .map_err(TokenEndpointError::Proof)
    }

    /// The certificate authority.
    #[must_use]
    pub fn pki(&self) -> &Arc<Pki> {
        &self.pki
    }

    /// Whether proofs at the token endpoint and the gateway need a nonce.
    #[must_use]
    pub fn requires_nonce(&self) -> bool {
        self.nonce_required
    }

    /// The present DPoP nonce.
    #[must_use]
    pub fn nonce(&self, now: UnixTime) -> String {
        self.nonces.current(now)
    }

    /// The agent of this id, as it stands now.
    pub async fn agent(&self, agent_id: &str) -> Result<Option<Arc<Agent>>, crate::store::StoreError> {
        self.agents.agent(agent_id).await
    }

    /// Our word for who calls, for one upstream server.
    ///
    /// `epoch`: at which the caller was judged. Whoever records the call names it too, so that a signature whose permit
    /// has passed is dropped with the call.
    ///
    /// Errors: [`TokenEndpointError::Halted`]; [`TokenEndpointError::Stale`] where the permit is of an earlier epoch.
    pub async fn assert_caller(
        &self,
        (agent_id, principal_type): (&str, &str),
        audience: &str,
        epoch: i64,
        now: UnixTime,
    ) -> Result<String, TokenEndpointError> {
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            if permit.epoch() < epoch {
                self.pki.refresh().await.map(drop)?;
                continue;
            }
            let claims = CallerClaims {
                issuer: self.issuer(),
                audience: audience.to_owned(),
                subject: agent_id.to_owned(),
                issued_at: now,
                jwt_id: self.pki.entropy.uuid(),
                principal_type: principal_type.to_owned(),
                org: authority.org_id.clone(),
            };
            let key = authority.active_token_key().ok_or(crate::pki::PkiError::NoTokenKey)?;
            let unsigned = claims.to_unsigned(&key.kid);
            let signature =
                key.key.sign_jws(&permit, unsigned.as_bytes()).map_err(crate::pki::PkiError::from)?;
            return Ok(assemble(&unsigned, &signature));
        }
        Err(TokenEndpointError::Stale)
    }

    fn issuer(&self) -> String {
        format!("cullis-mastio:{}", self.pki.authority().org_id)
    }

    /// Gives the agent on this connection a challenge to sign. Goes on under a halt: nothing is signed here.
    pub async fn challenge(&self, context: &Context) -> Result<Challenge, TokenEndpointError> {
        let now = context.now.seconds();
        let caller = self.agents.authenticate(context).await?;
        let nonce = self.pki.entropy.text::<32>();
        ephemeral::store_challenge(
            &self.pki.store,
            &nonce,
            &caller.agent.agent_id,
            now.plus(CHALLENGE_LIFETIME_S),
        )
        .await?;
        Ok(Challenge { nonce, agent_id: caller.agent.agent_id.clone() })
    }

    /// Countersigns an assertion over a challenge (wire contract §4.2). The challenge is used up first, whatever follows.
    pub async fn countersign(
        &self,
        context: &Context,
        text: &str,
        nonce: &str,
    ) -> Result<(String, String), TokenEndpointError> {
        self.pki.halted()?;
        let now = context.now.seconds();
        let caller = self.agents.authenticate(context).await?;
        let agent_id = caller.agent.agent_id.clone();
        if !ephemeral::take_challenge(&self.pki.store, nonce, &agent_id, now).await? {
            return Err(TokenEndpointError::Challenge);
        }
        let unverified = UnverifiedAssertion::parse(text).map_err(TokenEndpointError::Assertion)?;
        let (assertion, presented) = presented(&unverified, now)?;
        let proven = self.establish(&presented, now).await?;
        if proven.agent.agent_id != agent_id || assertion.nonce.as_deref() != Some(nonce) {
            return Err(TokenEndpointError::Challenge);
        }
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            let key = authority.active_token_key().ok_or(crate::pki::PkiError::NoTokenKey)?;
            let signature =
                key.key.countersign(&permit, text.as_bytes()).map_err(crate::pki::PkiError::from)?;
            // Nothing is recorded of a countersignature but that its permit still stood.
            match self.record(Append { epoch: Some(permit.epoch()), ..Append::default() }).await {
                Ok(_) => return Ok((agent_id, URL_SAFE_NO_PAD.encode(signature))),
                Err(TokenEndpointError::Stale) => self.pki.refresh().await.map(drop)?,
                Err(error) => return Err(error),
            }
        }
        Err(TokenEndpointError::Stale)
    }

    /// Issues an access token for a client assertion and a DPoP proof.
    ///
    /// `urls`: every acceptable external URL of the token endpoint.
    pub async fn issue(
        &self,
        context: &Context,
        text: &str,
        proof: &str,
        urls: &[String],
    ) -> Result<AccessToken, TokenEndpointError> {
        // First, so that a halted deploy answers at once and every caller reads why.
        self.pki.halted()?;
        let now = context.now.seconds();
        let proof = self.verify_proof(proof, "POST", urls, None, now)?;
        let assertion = UnverifiedAssertion::parse(text).map_err(TokenEndpointError::Assertion)?;
        let (assertion, client) = presented(&assertion, now)?;
        let order = Order {
            client,
            confirmation: Confirmation::DpopKey(proof.jkt.clone()),
            audience: ACCESS_TOKEN_AUDIENCE.to_owned(),
            one_use: vec![proof_one_use(&proof), assertion_one_use(&assertion)],
        };
        self.mint(context, order).await
    }

    /// Judges the client of `order`, signs its token, and lets it out once its event is durable.
    async fn mint(&self, context: &Context, order: Order) -> Result<AccessToken, TokenEndpointError> {
        let now = context.now.seconds();
        let Order { client, confirmation, audience, one_use } = order;
        // Established first: an allowance must not be used up by somebody who only names the agent.
        let mut proven = self.establish(&client, now).await?;
        self.agents.admit(&proven.agent.agent_id, context)?;
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            // Judged anew when the epoch has moved: what moved it may have deactivated the agent.
            if proven.epoch != permit.epoch() {
                proven = self.establish(&client, now).await?;
            }
            let claims = AccessTokenClaims {
                issuer: self.issuer(),
                audience: audience.clone(),
                subject: proven.agent.agent_id.clone(),
                scope: ACCESS_TOKEN_SCOPE.to_owned(),
                issued_at: now,
                expires_at: now.plus(ACCESS_TOKEN_LIFETIME_S),
                jwt_id: self.pki.entropy.uuid(),
                confirmation: confirmation.clone(),
                principal_type: proven.agent.principal_type.clone(),
                org: authority.org_id.clone(),
            };
            let epoch = permit.epoch();
            let (access_token, kid) = sign(&permit, &authority, &claims)?;
            let mut details = json!({
                "jti": claims.jwt_id,
                "kid": kid,
                "expires_at": claims.expires_at.to_rfc3339(),
                "certificate_serial": proven.certificate.serial_hex(),
                "request_id": context.request_id,
            });
            if let (Some(details), Some(bound)) =
                (details.as_object_mut(), claims.confirmation.to_value().as_object())
            {
                details.extend(bound.clone());
                if audience != ACCESS_TOKEN_AUDIENCE {
                    details.insert("aud".to_owned(), json!(audience));
                }
            }
            let event = Event { event_type: EventType::TokenIssued, actor: claims.subject.clone(), details };
            let append = Append {
                events: vec![event],
                one_use: one_use.clone(),
                epoch: Some(epoch),
                ..Append::default()
            };
            match self.record(append).await {
                Ok(_) => {
                    return Ok(AccessToken {
                        access_token,
                        expires_in: ACCESS_TOKEN_LIFETIME_S,
                        issuer: claims.issuer,
                        confirmation: claims.confirmation,
                    });
                }
                Err(TokenEndpointError::Stale) => self.pki.refresh().await.map(drop)?,
                Err(error) => return Err(error),
            }
        }
        Err(TokenEndpointError::Stale)
    }

    /// Establishes the caller of a request that carries an access token (wire contract §4.7, RFC 8705 §3).
    ///
    /// Not here: whether the token is revoked, which the commit of what the request does asks.
    pub async fn caller(
        &self,
        context: &Context,
        shown: Shown<'_>,
        method: &str,
        urls: &[String],
    ) -> Result<TokenCaller, TokenEndpointError> {
        let now = context.now.seconds();
        let claims = self.access_token(shown.access_token, now).await?;
        if claims.audience != ACCESS_TOKEN_AUDIENCE {
            return Err(TokenEndpointError::AccessToken(TokenError::Audience));
        }
        let one_use = match (&claims.confirmation, shown.dpop_scheme) {
            (Confirmation::DpopKey(jkt), true) => {
                let proof = shown.proof.ok_or(TokenEndpointError::ProofMissing)?;
                let proof = self.verify_proof(proof, method, urls, Some(shown.access_token), now)?;
                if proof.jkt != *jkt {
                    return Err(TokenEndpointError::ProofKey);
                }
                vec![proof_one_use(&proof)]
            }
            (Confirmation::Certificate(thumbprint), false) => {
                let der =
                    context.client_certificate.as_ref().ok_or(TokenEndpointError::CertificateMissing)?;
                if certificate_thumbprint(der) != *thumbprint {
                    return Err(TokenEndpointError::CertificateMismatch);
                }
                let proven = self.agents.prove_connection(context).await?;
                if proven.agent.agent_id != claims.subject {
                    return Err(TokenEndpointError::CertificateMismatch);
                }
                Vec::new()
            }
            _ => return Err(TokenEndpointError::Scheme),
        };
        let (agent, epoch) = self.agents.token_holder(&claims.subject, claims.issued_at).await?;
        self.agents.admit(&agent.agent_id, context)?;
        Ok(TokenCaller {
            agent,
            one_use,
            jwt_id: claims.jwt_id.clone(),
            epoch,
            issued_at: claims.issued_at,
            expires_at: claims.expires_at,
        })
    }

    /// The agent for whom a token was issued at `issued_at`, as it stands now, and at which epoch. Absent where it would
    /// not be let in.
    ///
    /// Errors: [`TokenEndpointError`] where that cannot be said.
    pub async fn holder(
        &self,
        agent_id: &str,
        issued_at: UnixTime,
    ) -> Result<Option<(Arc<Agent>, i64)>, TokenEndpointError> {
        match self.agents.token_holder(agent_id, issued_at).await {
            Ok(standing) => Ok(Some(standing)),
            Err(
                crate::enrollment::IdentityError::UnknownOrInactive
                | crate::enrollment::IdentityError::TokenRevoked,
            ) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Establishes the caller of a request that only reads, and uses its proof up.
    pub async fn admit_once(
        &self,
        context: &Context,
        shown: Shown<'_>,
        method: &str,
        urls: &[String],
    ) -> Result<Arc<Agent>, TokenEndpointError> {
        let caller = self.caller(context, shown, method, urls).await?;
        self.record(Append {
            events: Vec::new(),
            one_use: caller.one_use,
            access_token: Some(caller.jwt_id),
            epoch: Some(caller.epoch),
            ..Append::default()
        })
        .await?;
        Ok(caller.agent)
    }

    async fn active(&self, agent_id: &str) -> Result<Arc<Agent>, TokenEndpointError> {
        self.pki.current().await?;
        let agent = self.agents.agent(agent_id).await?.filter(|agent| agent.is_active);
        Ok(agent.ok_or(crate::enrollment::IdentityError::UnknownOrInactive)?)
    }

    async fn access_token(
        &self,
        text: &str,
        now: UnixTime,
    ) -> Result<Arc<AccessTokenClaims>, TokenEndpointError> {
        let unverified = UnverifiedAccessToken::parse(text).map_err(TokenEndpointError::AccessToken)?;
        let authority = self.pki.authority();
        // Looked up even for a remembered token: a key past its grace ends every token it signed.
        let key = authority
            .token_keys
            .iter()
            .find(|key| key.kid == unverified.kid() && key.verifies_at(now))
            .ok_or(TokenEndpointError::UnknownKey)?
            .public
            .clone();
        let mut digest = [0; 32];
        digest
            .copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes()).as_ref());
        if let Some(claims) = self.verified.get(&digest).await
            && now < claims.expires_at
        {
            return Ok(claims);
        }
        let claims = unverified
            .verify(&key, &self.issuer(), now)
            .map(Arc::new)
            .map_err(TokenEndpointError::AccessToken)?;
        self.verified.insert(digest, Arc::clone(&claims)).await;
        Ok(claims)
    }

    async fn establish(
        &self,
        presented: &Presented,
        now: UnixTime,
    ) -> Result<ProvenAgent, TokenEndpointError> {
        let Presented { subject, leaf, beside } = presented;
        Ok(self.agents.authenticate_assertion(leaf, beside, subject, now).await?)
    }

    async fn record(&self, append: Append) -> Result<i64, TokenEndpointError> {
        self.journal.append(append).await.map_err(|error| match error {
            AppendError::Replayed => TokenEndpointError::Replayed,
            AppendError::Revoked => TokenEndpointError::Revoked,
            AppendError::Stale => TokenEndpointError::Stale,
            AppendError::Busy => TokenEndpointError::Busy,
            AppendError::Unguarded => TokenEndpointError::Unguarded,
            AppendError::Unavailable => TokenEndpointError::AuditUnavailable,
        })
    }
}

/// The assertion, verified under the leaf that it carries; the leaf itself is not judged yet.
fn presented(
    unverified: &UnverifiedAssertion,
    now: UnixTime,
) -> Result<(Assertion, Presented), TokenEndpointError> {
    let (leaf, beside) = chain(unverified)?.ok_or(TokenEndpointError::Chain)?;
    let assertion = unverified.verify(leaf.spki_der(), now).map_err(TokenEndpointError::Assertion)?;
    let subject = assertion.subject.clone();
    Ok((assertion, Presented { subject, leaf, beside }))
}

/// The leaf of `x5c` and what stands beside it, each once. Nothing where there is no `x5c`.
fn chain(
    unverified: &UnverifiedAssertion,
) -> Result<Option<(Certificate, Vec<Certificate>)>, TokenEndpointError> {
    let mut chain = Vec::new();
    for der in unverified.chain_der() {
        let certificate = Certificate::from_der(der).map_err(|_| TokenEndpointError::Chain)?;
        if !chain.contains(&certificate) {
            chain.push(certificate);
        }
    }
    let mut chain = chain.into_iter();
    Ok(chain.next().map(|leaf| (leaf, chain.collect())))
}

fn sign(
    permit: &SignPermit,
    authority: &crate::pki::Authority,
    claims: &AccessTokenClaims,
) -> Result<(String, String), crate::pki::PkiError> {
    let key = authority.active_token_key().ok_or(crate::pki::PkiError::NoTokenKey)?;
    let unsigned = claims.to_unsigned(&key.kid);
    let signature = key.key.sign_jws(permit, unsigned.as_bytes())?;
    Ok((assemble(&unsigned, &signature), key.kid.clone()))
}

fn proof_one_use(proof: &Proof) -> OneUse {
    OneUse {
        id: format!("dpop:{}:{}", proof.jkt, proof.jwt_id),
        expires_at: proof.issued_at.plus(PROOF_REMEMBERED_S),
    }
}

fn assertion_one_use(assertion: &Assertion) -> OneUse {
    OneUse {
        id: format!("assertion:{}:{}", assertion.subject, assertion.jwt_id),
        expires_at: assertion.expires_at.plus(PROOF_REMEMBERED_S),
    }
}
