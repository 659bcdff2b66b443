//! The `client_credentials` grant, as ordinary OAuth clients ask for it (RFC 6749 §4.4).
//!
//! The client is an agent, and its `client_id` the agent's id. It authenticates by an assertion under its registered key
//! (`private_key_jwt`, RFC 7523), or by its client certificate (`tls_client_auth`, RFC 8705 §2.1). The token is bound to
//! the key of a DPoP proof, or where there is none to the client certificate of the connection (RFC 8705 §3); it is for
//! one resource (RFC 8707). What follows is the mint of [`super`], the same for every client.

use mastio_core::time::UnixTime;
use mastio_core::token::assertion::UnverifiedAssertion;
use mastio_core::token::claims::{
    ACCESS_TOKEN_AUDIENCE, ACCESS_TOKEN_SCOPE, Confirmation, certificate_thumbprint,
};

use super::error::GrantError;
use super::form::Form;
use super::metadata::{GATEWAY_PATH, TOKEN_PATH};
use super::{
    AccessToken, Order, Presented, TokenEndpointError, Tokens, assertion_one_use, chain, proof_one_use, store,
};
use crate::enrollment::IdentityError;
use crate::http::context::Context;
use crate::store::group::OneUse;

const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// By which names this server may be meant, as URLs.
#[derive(Debug, Clone)]
pub struct Names {
    /// The base URLs by which we are reached.
    pub bases: Vec<String>,
    /// The endpoint at hand, under each of them.
    pub endpoints: Vec<String>,
}

/// A client that has authenticated, and what its authentication uses up.
pub(super) struct Client {
    pub(super) presented: Presented,
    pub(super) one_use: Option<OneUse>,
}

impl Tokens {
    /// Issues an access token for a form and a DPoP proof or a client certificate.
    pub async fn grant(
        &self,
        context: &Context,
        form: &Form,
        proof: Option<&str>,
        names: &Names,
    ) -> Result<AccessToken, TokenEndpointError> {
        self.pki.halted()?;
        let now = context.now.seconds();
        if form.require("grant_type")? != "client_credentials" {
            return Err(GrantError::GrantType.into());
        }
        if form.get("scope").is_some_and(|scope| scope != ACCESS_TOKEN_SCOPE) {
            return Err(GrantError::Scope.into());
        }
        let proof =
            proof.map(|proof| self.verify_proof(proof, "POST", &names.endpoints, None, now)).transpose()?;
        let Client { presented, one_use } = self.authenticate_client(context, form, names, now).await?;
        let mut one_use: Vec<OneUse> = one_use.into_iter().collect();
        let confirmation = match proof {
            Some(proof) => {
                one_use.push(proof_one_use(&proof));
                Confirmation::DpopKey(proof.jkt)
            }
            None => {
                let der = context.client_certificate.as_ref().ok_or(GrantError::Unbound)?;
                let proven = self.agents.prove_connection(context).await?;
                if proven.agent.agent_id != presented.subject {
                    return Err(GrantError::ClientMismatch.into());
                }
                Confirmation::Certificate(certificate_thumbprint(der))
            }
        };
        let audience = self.audience(form, names).await?;
        self.mint(context, Order { client: presented, confirmation, audience, one_use }).await
    }

    /// Who sends a form, by an assertion or by the connection's certificate. Its standing is judged by whoever goes on.
    pub(super) async fn authenticate_client(
        &self,
        context: &Context,
        form: &Form,
        names: &Names,
        now: UnixTime,
    ) -> Result<Client, TokenEndpointError> {
        let client_id = form.get("client_id").map(|id| self.agents.canonical(id));
        let client = match (form.get("client_assertion"), &client_id) {
            (Some(text), _) => {
                if form.require("client_assertion_type")? != JWT_BEARER {
                    return Err(GrantError::AssertionType.into());
                }
                self.by_assertion(text, names, now).await?
            }
            (None, Some(_)) if context.client_certificate.is_some() => {
                let proven = self.agents.prove_connection(context).await?;
                let presented = Presented {
                    subject: proven.agent.agent_id.clone(),
                    leaf: proven.certificate.clone(),
                    beside: Vec::new(),
                };
                Client { presented, one_use: None }
            }
            _ => return Err(GrantError::ClientMissing.into()),
        };
        if client_id.is_some_and(|client_id| client_id != client.presented.subject) {
            return Err(GrantError::ClientMismatch.into());
        }
        Ok(client)
    }

    /// An assertion under the key of the certificate that it carries or, as ordinary clients send none, of the
    /// registered one.
    async fn by_assertion(
        &self,
        text: &str,
        names: &Names,
        now: UnixTime,
    ) -> Result<Client, TokenEndpointError> {
        let unverified = UnverifiedAssertion::parse_standard(text).map_err(TokenEndpointError::Assertion)?;
        let (leaf, beside) = match chain(&unverified)? {
            Some(presented) => presented,
            None => {
                let agent = self.active(unverified.unverified_subject()).await?;
                (agent.leaf.clone().ok_or(IdentityError::PinMismatch)?, Vec::new())
            }
        };
        // RFC 7523 §3 leaves open by which of its names a server is meant; clients use its issuer and its token endpoint.
        let token_endpoints: Vec<String> =
            names.bases.iter().map(|base| format!("{base}{TOKEN_PATH}")).collect();
        let audiences: Vec<&str> =
            names.bases.iter().chain(&token_endpoints).chain(&names.endpoints).map(String::as_str).collect();
        let assertion = unverified
            .verify_standard(leaf.spki_der(), &audiences, now)
            .map_err(TokenEndpointError::Assertion)?;
        let one_use = Some(assertion_one_use(&assertion));
        Ok(Client { presented: Presented { subject: assertion.subject, leaf, beside }, one_use })
    }

    /// The one audience that is asked for (RFC 8707 §2): our own resources, or those of a registered resource server.
    async fn audience(&self, form: &Form, names: &Names) -> Result<String, TokenEndpointError> {
        let mut wanted = form.all("resource").chain(form.all("audience")).map(|resource| {
            let ours = resource == ACCESS_TOKEN_AUDIENCE
                || names.bases.iter().any(|base| {
                    resource
                        .strip_prefix(base.as_str())
                        .is_some_and(|path| matches!(path, "" | "/" | GATEWAY_PATH))
                });
            if ours { ACCESS_TOKEN_AUDIENCE } else { resource }
        });
        let Some(audience) = wanted.next() else { return Ok(ACCESS_TOKEN_AUDIENCE.to_owned()) };
        if wanted.any(|other| other != audience) {
            return Err(GrantError::Target.into());
        }
        let known = audience == ACCESS_TOKEN_AUDIENCE
            || store::resource_is_served(&mut self.pki.store.read().await?, audience).await?;
        if known { Ok(audience.to_owned()) } else { Err(GrantError::Target.into()) }
    }
}
