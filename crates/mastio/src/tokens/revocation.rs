//! Revocation (RFC 7009): an agent gives a token back before it expires.
//!
//! The token's `jti` goes on the deny list until the token would have expired. Every use of a token asks that list in the
//! transaction that records the use, so a revocation bites on the next request of every replica.

use mastio_core::audit::event::{Event, EventType};
use mastio_core::token::LEEWAY_S;
use serde_json::json;

use super::error::GrantError;
use super::form::Form;
use super::grant::Names;
use super::{TokenEndpointError, Tokens};
use crate::http::context::Context;
use crate::store::ephemeral;

impl Tokens {
    /// Revokes the token of a form for the client that it was issued to. Goes on under a halt: nothing is signed.
    ///
    /// A token that is not good any more is no error, for there is nothing left to revoke (RFC 7009 §2.2).
    /// Errors: 401 for a client that is not authenticated; [`GrantError::NotYours`].
    pub async fn revoke(
        &self,
        context: &Context,
        form: &Form,
        names: &Names,
    ) -> Result<(), TokenEndpointError> {
        let now = context.now.seconds();
        let text = form.require("token")?;
        let client = self.authenticate_client(context, form, names, now).await?;
        let agent_id = self.establish(&client.presented, now).await?.agent.agent_id.clone();
        self.agents.admit(&agent_id, context)?;
        let claims = match self.access_token(text, now).await {
            Ok(claims) => claims,
            Err(TokenEndpointError::AccessToken(_) | TokenEndpointError::UnknownKey) => return Ok(()),
            Err(error) => return Err(error),
        };
        if claims.subject != agent_id {
            return Err(GrantError::NotYours.into());
        }
        let mut tx = self.pki.store.write().await?;
        if let Some(one_use) = &client.one_use
            && !ephemeral::burn(&mut tx, &one_use.id, one_use.expires_at).await?
        {
            return Err(TokenEndpointError::Replayed);
        }
        if ephemeral::revoke_token(&mut tx, &claims.jwt_id, &agent_id, claims.expires_at.plus(LEEWAY_S))
            .await?
        {
            tx.commit(&[Event {
                event_type: EventType::TokenRevoked,
                actor: agent_id,
                details: json!({ "jti": claims.jwt_id, "request_id": context.request_id }),
            }])
            .await?;
        }
        Ok(())
    }
}
