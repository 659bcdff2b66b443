//! Callers of the gateway: agents whom an access token and what it is bound to establish (wire contract §4.7).

use std::sync::Arc;

use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use futures_util::future::BoxFuture;
use mastio_core::error::Kind;
use mastio_core::time::UnixTime;

use super::{Authenticate, Caller, Holder};
use crate::http::context::Context;
use crate::http::error::ApiError;
use crate::http::urls::ExternalUrls;
use crate::store::refusals::{Refusal, Refusals};
use crate::tokens::error::INSUFFICIENT_SCOPE;
use crate::tokens::http::{record, shown};
use crate::tokens::metadata::{GATEWAY_PATH, challenge};
use crate::tokens::{TokenEndpointError, Tokens};

/// Judges callers by what the authorization server issued.
pub struct TokenCallers {
    tokens: Arc<Tokens>,
    urls: ExternalUrls,
    refusals: Refusals,
}

impl TokenCallers {
    /// `urls`: by which a proof's `htu` may name us. Who is refused is recorded in `refusals`.
    #[must_use]
    pub fn new(tokens: Arc<Tokens>, urls: ExternalUrls, refusals: Refusals) -> Self {
        Self { tokens, urls, refusals }
    }

    async fn judge(&self, context: &Context, parts: &Parts) -> Result<Caller, TokenEndpointError> {
        let shown = shown(&parts.headers)?;
        let urls = self.urls.of(&parts.headers, parts.uri.path());
        let caller = self.tokens.caller(context, shown, parts.method.as_str(), &urls).await?;
        Ok(Caller {
            agent_id: caller.agent.agent_id.clone(),
            principal_type: caller.agent.principal_type.clone(),
            capabilities: caller.agent.capabilities.clone(),
            one_use: caller.one_use,
            access_token: Some(caller.jwt_id),
            epoch: caller.epoch,
            issued_at: caller.issued_at,
            expires_at: caller.expires_at,
        })
    }

    /// A 401 or 403 with the challenge that leads an ordinary client to our metadata (RFC 9728 §5.1).
    fn challenged(&self, parts: &Parts, error: ApiError, code: Option<&str>) -> ApiError {
        let challenge = challenge(self.urls.base(&parts.headers).as_deref(), GATEWAY_PATH, code);
        match HeaderValue::from_str(&challenge) {
            Ok(challenge) => error.with_header(header::WWW_AUTHENTICATE, challenge),
            Err(_) => error,
        }
    }
}

impl Authenticate for TokenCallers {
    fn caller<'a>(
        &'a self,
        context: &'a Context,
        parts: &'a Parts,
    ) -> BoxFuture<'a, Result<Caller, ApiError>> {
        Box::pin(async move {
            match self.judge(context, parts).await {
                Ok(caller) => Ok(caller),
                Err(error) => {
                    record(&self.refusals, context, GATEWAY_PATH, &error).await;
                    let code = error.resource_code();
                    let error = ApiError::from(error);
                    if error.kind() == Kind::Unauthenticated || code == Some(INSUFFICIENT_SCOPE) {
                        return Err(self.challenged(parts, error, code));
                    }
                    Err(error)
                }
            }
        })
    }

    fn refused<'a>(
        &'a self,
        context: &'a Context,
        parts: &'a Parts,
        reason: &'static str,
        error: ApiError,
    ) -> BoxFuture<'a, ApiError> {
        Box::pin(async move {
            let refusal = Refusal {
                route: GATEWAY_PATH,
                reason,
                request_id: &context.request_id,
                address: context.source,
                now: context.now.seconds(),
            };
            self.refusals.record(refusal).await;
            let code = if reason == "replayed" { "invalid_dpop_proof" } else { "invalid_token" };
            self.challenged(parts, error, Some(code))
        })
    }

    fn agent<'a>(&'a self, agent_id: &'a str) -> BoxFuture<'a, Result<Option<Holder>, ApiError>> {
        Box::pin(async move {
            let agent = self.tokens.agent(agent_id).await?.filter(|agent| agent.is_active);
            Ok(agent.map(|agent| Holder {
                principal_type: agent.principal_type.clone(),
                capabilities: agent.capabilities.clone(),
            }))
        })
    }

    fn standing<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Option<Caller>, ApiError>> {
        Box::pin(async move {
            let holder =
                self.tokens.holder(&caller.agent_id, caller.issued_at).await.map_err(ApiError::from)?;
            Ok(holder.map(|(agent, epoch)| Caller {
                capabilities: agent.capabilities.clone(),
                epoch,
                ..caller.clone()
            }))
        })
    }

    fn assert<'a>(
        &'a self,
        caller: &'a Caller,
        audience: &'a str,
        now: UnixTime,
    ) -> BoxFuture<'a, Result<String, ApiError>> {
        Box::pin(async move {
            let who = (caller.agent_id.as_str(), caller.principal_type.as_str());
            Ok(self.tokens.assert_caller(who, audience, caller.epoch, now).await?)
        })
    }

    fn refresh(&self) -> BoxFuture<'_, Result<(), ApiError>> {
        Box::pin(async move {
            self.tokens.pki().refresh().await?;
            Ok(())
        })
    }
}
