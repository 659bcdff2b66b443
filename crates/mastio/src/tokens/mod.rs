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

pub mod error;
pub mod http;

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::dpop::{Proof, ProofRequest, UnverifiedProof};
use mastio_core::time::UnixTime;
use mastio_core::token::assertion::{Assertion, UnverifiedAssertion};
use mastio_core::token::claims::{
    ACCESS_TOKEN_AUDIENCE, ACCESS_TOKEN_SCOPE, AccessTokenClaims, UnverifiedAccessToken,
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
    verified: Cache<[u8; 32], Arc<AccessTokenClaims>>,
}

/// A verified assertion with the chain that came in its `x5c`.
struct Presented {
    assertion: Assertion,
    leaf: Certificate,
    beside: Vec<Certificate>,
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
}

/// A caller whom an access token and its proof have established.
pub struct TokenCaller {
    /// The agent.
    pub agent: Arc<Agent>,
    /// The proof's `jti`, to be burnt with what the request does.
    pub one_use: OneUse,
    /// The epoch at which this was judged.
    pub epoch: i64,
}

impl Tokens {
    /// Issues tokens for `agents`, recorded in `journal`.
    #[must_use]
    pub fn new(agents: Arc<Agents>, journal: Journal) -> Self {
        let pki = Arc::clone(agents.pki());
        Self { pki, agents, journal, verified: Cache::new(CACHE_ENTRIES_MAX) }
    }

    /// The certificate authority.
    #[must_use]
    pub fn pki(&self) -> &Arc<Pki> {
        &self.pki
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
        let presented = presented(&unverified, now)?;
        let proven = self.establish(&presented, now).await?;
        if proven.agent.agent_id != agent_id || presented.assertion.nonce.as_deref() != Some(nonce) {
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
        let (proof, presented) = credentials(proof, text, urls, now)?;
        // Established first: an allowance must not be used up by somebody who only names the agent.
        let mut proven = self.establish(&presented, now).await?;
        self.agents.admit(&proven.agent.agent_id, context)?;
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            // Judged anew when the epoch has moved: what moved it may have deactivated the agent.
            if proven.epoch != permit.epoch() {
                proven = self.establish(&presented, now).await?;
            }
            let claims = AccessTokenClaims {
                issuer: self.issuer(),
                audience: ACCESS_TOKEN_AUDIENCE.to_owned(),
                subject: proven.agent.agent_id.clone(),
                scope: ACCESS_TOKEN_SCOPE.to_owned(),
                issued_at: now,
                expires_at: now.plus(ACCESS_TOKEN_LIFETIME_S),
                jwt_id: self.pki.entropy.uuid(),
                jkt: proof.jkt.clone(),
                principal_type: proven.agent.principal_type.clone(),
                org: authority.org_id.clone(),
            };
            let epoch = permit.epoch();
            let (access_token, kid) = sign(&permit, &authority, &claims)?;
            let event = Event {
                event_type: EventType::TokenIssued,
                actor: claims.subject.clone(),
                details: json!({
                    "jti": claims.jwt_id,
                    "kid": kid,
                    "jkt": claims.jkt,
                    "expires_at": claims.expires_at.to_rfc3339(),
                    "certificate_serial": proven.certificate.serial_hex(),
                    "request_id": context.request_id,
                }),
            };
            let append = Append {
                events: vec![event],
                one_use: vec![proof_one_use(&proof), assertion_one_use(&presented.assertion)],
                epoch: Some(epoch),
            };
            match self.record(append).await {
                Ok(_) => {
                    return Ok(AccessToken {
                        access_token,
                        expires_in: ACCESS_TOKEN_LIFETIME_S,
                        issuer: claims.issuer,
                    });
                }
                Err(TokenEndpointError::Stale) => self.pki.refresh().await.map(drop)?,
                Err(error) => return Err(error),
            }
        }
        Err(TokenEndpointError::Stale)
    }

    /// Establishes the caller of a request that carries an access token (wire contract §4.7).
    pub async fn caller(
        &self,
        context: &Context,
        access_token: &str,
        proof: &str,
        method: &str,
        urls: &[String],
    ) -> Result<TokenCaller, TokenEndpointError> {
        let now = context.now.seconds();
        let claims = self.access_token(access_token, now).await?;
        let proof = verify_proof(proof, method, urls, Some(access_token), now)?;
        if proof.jkt != claims.jkt {
            return Err(TokenEndpointError::ProofKey);
        }
        let epoch = self.pki.authority().epoch;
        let agent = self
            .agents
            .agent(&claims.subject)
            .await?
            .filter(|agent| agent.is_active)
            .ok_or(TokenEndpointError::Identity(crate::enrollment::IdentityError::UnknownOrInactive))?;
        self.agents.admit(&agent.agent_id, context)?;
        Ok(TokenCaller { agent, one_use: proof_one_use(&proof), epoch })
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
        let Presented { assertion, leaf, beside } = presented;
        Ok(self.agents.authenticate_assertion(leaf, beside, &assertion.subject, now).await?)
    }

    async fn record(&self, append: Append) -> Result<i64, TokenEndpointError> {
        self.journal.append(append).await.map_err(|error| match error {
            AppendError::Replayed => TokenEndpointError::Replayed,
            AppendError::Stale => TokenEndpointError::Stale,
            AppendError::Busy => TokenEndpointError::Busy,
            AppendError::Unguarded => TokenEndpointError::Unguarded,
            AppendError::Unavailable => TokenEndpointError::AuditUnavailable,
        })
    }
}

fn verify_proof(
    text: &str,
    method: &str,
    urls: &[String],
    access_token: Option<&str>,
    now: UnixTime,
) -> Result<Proof, TokenEndpointError> {
    UnverifiedProof::parse(text)
        .and_then(|proof| proof.verify(&ProofRequest { method, urls, access_token, nonce: None, now }))
        .map_err(TokenEndpointError::Proof)
}

/// The proof and the assertion of a token request.
fn credentials(
    proof: &str,
    assertion: &str,
    urls: &[String],
    now: UnixTime,
) -> Result<(Proof, Presented), TokenEndpointError> {
    let proof = verify_proof(proof, "POST", urls, None, now)?;
    let assertion = UnverifiedAssertion::parse(assertion).map_err(TokenEndpointError::Assertion)?;
    Ok((proof, presented(&assertion, now)?))
}

/// The assertion, verified under the leaf that it carries; the leaf itself is not judged yet.
fn presented(unverified: &UnverifiedAssertion, now: UnixTime) -> Result<Presented, TokenEndpointError> {
    let mut chain = Vec::new();
    for der in unverified.chain_der() {
        let certificate = Certificate::from_der(der).map_err(|_| TokenEndpointError::Chain)?;
        if !chain.contains(&certificate) {
            chain.push(certificate);
        }
    }
    let mut chain = chain.into_iter();
    let leaf = chain.next().ok_or(TokenEndpointError::Chain)?;
    let assertion = unverified.verify(leaf.spki_der(), now).map_err(TokenEndpointError::Assertion)?;
    Ok(Presented { assertion, leaf, beside: chain.collect() })
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
