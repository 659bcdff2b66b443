//! Persistent DPoP keys (wire contract §6): on `/v1/egress`, a proof of the agent's registered key beside its certificate.
//!
//! The certificate says who calls; the proof says that the agent's own key is there too. It needs a nonce always, carries
//! no `ath`, and its key must be the registered one, or the one before in its 48 hours.

use mastio_core::dpop::ProofRequest;
use mastio_core::dpop::UnverifiedProof;

use super::{TokenEndpointError, Tokens, proof_one_use};
use crate::config::EgressDpop;
use crate::http::context::Context;
use crate::store::group::Append;

impl Tokens {
    /// Judges the proof of a request whose certificate is judged by its route.
    ///
    /// `urls`: every acceptable external URL of the request. Where the certificate proves nobody there is nothing to
    /// compare with, and the route will say so.
    pub async fn prove_persistent_key(
        &self,
        context: &Context,
        proof: Option<&str>,
        mode: EgressDpop,
        method: &str,
        urls: &[String],
    ) -> Result<(), TokenEndpointError> {
        let proof = match (mode, proof) {
            (EgressDpop::Off, _) | (EgressDpop::Optional, None) => return Ok(()),
            (EgressDpop::Required, None) => return Err(TokenEndpointError::ProofMissing),
            (_, Some(proof)) => proof,
        };
        let Ok(proven) = self.agents.prove_connection(context).await else { return Ok(()) };
        let now = context.now.seconds();
        let nonces = self.nonces.accepted(now);
        let proof = UnverifiedProof::parse(proof)
            .and_then(|proof| {
                proof.verify(&ProofRequest { method, urls, access_token: None, nonce: Some(&nonces), now })
            })
            .map_err(TokenEndpointError::Proof)?;
        let agent = &proven.agent;
        let in_grace = agent.previous_until.is_some_and(|until| now < until)
            && agent.previous_dpop_jkt.as_deref() == Some(&proof.jkt);
        match agent.dpop_jkt.as_deref() {
            Some(registered) if registered == proof.jkt || in_grace => {}
            Some(_) => return Err(TokenEndpointError::PersistentKey),
            None if mode == EgressDpop::Required => return Err(TokenEndpointError::NoPersistentKey),
            None => {}
        }
        self.record(Append {
            one_use: vec![proof_one_use(&proof)],
            epoch: Some(proven.epoch),
            ..Append::default()
        })
        .await
        .map(drop)
    }
}
