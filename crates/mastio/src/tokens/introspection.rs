//! Introspection (RFC 7662): what a resource server is told of a token that it was shown.
//!
//! Only of tokens for its own resource; of all others it learns nothing but that they are not good for it. The answer is
//! read from the database at each request: a token of a deactivated agent, or a revoked one, is inactive at once.

use std::sync::Arc;

use mastio_core::token::claims::AccessTokenClaims;

use super::{TokenEndpointError, Tokens};
use crate::enrollment::IdentityError;
use crate::http::context::Context;
use crate::store::ephemeral;

impl Tokens {
    /// The claims of `text` if the token is good for the resource of the resource server that asks, else nothing.
    ///
    /// Errors: 401 for a wrong credential; a token that is not good is no error (RFC 7662 §2.2).
    pub async fn introspect(
        &self,
        context: &Context,
        credential: (&str, &str),
        text: &str,
    ) -> Result<Option<Arc<AccessTokenClaims>>, TokenEndpointError> {
        let (id, secret) = credential;
        let server = self.resource_server(id, secret).await?;
        let now = context.now.seconds();
        let claims = match self.access_token(text, now).await {
            Ok(claims) => claims,
            Err(TokenEndpointError::AccessToken(_) | TokenEndpointError::UnknownKey) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Strict about the end: whoever asks adds a clock difference of their own.
        if claims.audience != server.resource || now >= claims.expires_at {
            return Ok(None);
        }
        match self.agents.token_holder(&claims.subject, claims.issued_at).await {
            Ok(_) => {}
            Err(IdentityError::UnknownOrInactive | IdentityError::TokenRevoked) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let revoked = ephemeral::is_revoked(&self.pki.store, &claims.jwt_id).await?;
        Ok((!revoked).then_some(claims))
    }
}
