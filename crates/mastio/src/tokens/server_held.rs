//! Login with a key that the server holds (wire contract §4.4): the assertion is made and signed here.
//!
//! Only for agents whose key we made and keep. An owner's key (BYOCA) is never stored, so for them there is nothing to
//! sign with.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::token::assertion;
use mastio_core::token::jws::assemble;
use serde_json::json;

use super::{STALE_ROUNDS_MAX, TokenEndpointError, Tokens};
use crate::enrollment::Agent;
use crate::http::context::Context;
use crate::pki::keys::PrivateKey;
use crate::pki::store::{config, config_place};
use crate::pki::{Authority, PkiError};
use crate::store::group::Append;

/// An assertion that we signed for an agent.
pub struct SignedAssertion {
    /// The assertion.
    pub client_assertion: String,
    /// For whom.
    pub agent_id: String,
    /// Our countersignature, base64url of ECDSA in ASN.1.
    pub mastio_signature: String,
}

impl Tokens {
    /// Makes and signs the assertion of the agent on this connection.
    ///
    /// Errors: [`TokenEndpointError::NoStoredKey`], 404; a halt, 503.
    pub async fn sign_assertion(&self, context: &Context) -> Result<SignedAssertion, TokenEndpointError> {
        self.pki.halted()?;
        let now = context.now.seconds();
        let caller = self.agents.authenticate(context).await?;
        for _round in 0..STALE_ROUNDS_MAX {
            let (permit, authority) = self.pki.permit().await?;
            let agent = self.active(&caller.agent.agent_id).await?;
            let key = self.stored_key(&agent).await?.ok_or(TokenEndpointError::NoStoredKey)?;
            let token_key = authority.active_token_key().ok_or(PkiError::NoTokenKey)?;
            let jwt_id = self.pki.entropy.uuid();
            let chain = chain_of(&agent, &authority);
            let chain: Vec<&[u8]> = chain.iter().map(Vec::as_slice).collect();
            let unsigned = assertion::to_unsigned(&chain, key.is_rsa(), &agent.agent_id, &jwt_id, now);
            let signature = key.sign_assertion(&permit, unsigned.as_bytes()).map_err(PkiError::from)?;
            let client_assertion = assemble(&unsigned, &signature);
            let countersignature =
                token_key.key.countersign(&permit, client_assertion.as_bytes()).map_err(PkiError::from)?;
            let event = Event {
                event_type: EventType::AssertionSigned,
                actor: agent.agent_id.clone(),
                details: json!({ "jti": jwt_id, "request_id": context.request_id }),
            };
            let append = Append { events: vec![event], epoch: Some(permit.epoch()), ..Append::default() };
            match self.record(append).await {
                Ok(_) => {
                    return Ok(SignedAssertion {
                        client_assertion,
                        agent_id: agent.agent_id.clone(),
                        mastio_signature: URL_SAFE_NO_PAD.encode(countersignature),
                    });
                }
                Err(TokenEndpointError::Stale) => self.pki.refresh().await.map(drop)?,
                Err(error) => return Err(error),
            }
        }
        Err(TokenEndpointError::Stale)
    }

    /// The agent's key, where we hold it and it is the one of its present certificate.
    async fn stored_key(&self, agent: &Agent) -> Result<Option<PrivateKey>, TokenEndpointError> {
        let name = format!("agent_key:{}", agent.agent_id);
        let Some(sealed) = config(&mut self.pki.store.read().await?, &name).await? else { return Ok(None) };
        let key = self.pki.sealing().open_key(&config_place(&name), &sealed).map_err(PkiError::from)?;
        // A certificate of another key has replaced it since.
        let is_present = agent.leaf.as_ref().is_some_and(|leaf| leaf.spki_der() == key.spki_der());
        Ok(is_present.then_some(key))
    }
}

/// Leaf and intermediate, DER.
fn chain_of(agent: &Agent, authority: &Authority) -> Vec<Vec<u8>> {
    agent
        .leaf
        .iter()
        .chain(authority.mastio_ca.as_ref())
        .map(|certificate| certificate.der().to_vec())
        .collect()
}
