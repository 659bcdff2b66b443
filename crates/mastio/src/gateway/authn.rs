//! Callers of the gateway: agents whom an access token and its DPoP proof establish (wire contract §4.7).

use std::sync::Arc;

use axum::http::request::Parts;
use futures_util::future::BoxFuture;

use super::{Authenticate, Caller};
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::urls::ExternalUrls;
use crate::tokens::http::{access_token, proof};
use crate::tokens::{TokenEndpointError, Tokens};

/// Judges callers by what the authorization server issued.
pub struct TokenCallers {
    tokens: Arc<Tokens>,
    urls: ExternalUrls,
}

impl TokenCallers {
    /// `urls`: by which a proof's `htu` may name us.
    #[must_use]
    pub fn new(tokens: Arc<Tokens>, urls: ExternalUrls) -> Self {
        Self { tokens, urls }
    }

    async fn judge(&self, context: &Context, parts: &Parts) -> Result<Caller, TokenEndpointError> {
        let token = access_token(&parts.headers)?;
        let proof = proof(&parts.headers)?;
        let urls = self.urls.of(&parts.headers, parts.uri.path());
        let caller = self.tokens.caller(context, token, proof, parts.method.as_str(), &urls).await?;
        Ok(Caller {
            agent_id: caller.agent.agent_id.clone(),
            principal_type: caller.agent.principal_type.clone(),
            capabilities: caller.agent.capabilities.clone(),
            one_use: caller.one_use,
            epoch: caller.epoch,
        })
    }
}

impl Authenticate for TokenCallers {
    fn caller<'a>(
        &'a self,
        context: &'a Context,
        parts: &'a Parts,
    ) -> BoxFuture<'a, Result<Caller, ApiError>> {
        Box::pin(async move { Ok(self.judge(context, parts).await?) })
    }

    fn refresh(&self) -> BoxFuture<'_, Result<(), ApiError>> {
        Box::pin(async move {
            self.tokens.pki().refresh().await?;
            Ok(())
        })
    }
}
