//! How we prove ourselves to an upstream server: kept sealed, opened for a call, never shown, never the caller's own.

use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::servers::Server;
use super::upstream::{Endpoint, Upstream, UpstreamError};
use crate::pki::keys::SealingKey;

/// RFC 8693 §2.1 and §3.
const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT_TYPE: &str = "urn:ietf:params:oauth:token-type:jwt";
const ACCESS_TOKEN_TYPE: &str = "urn:ietf:params:oauth:token-type:access_token";
/// Bytes of a secret, or of a certificate with its key.
const SECRET_BYTES_MAX: usize = 32 * 1024;
/// An access token is asked for anew this long before it expires.
const RENEW_BEFORE: Duration = Duration::from_secs(30);
/// Access tokens that are kept.
const TOKENS_MAX: u64 = 4096;

/// A credential as the operator gives it and as it lies sealed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Auth {
    /// None.
    None,
    /// `Authorization: Bearer`.
    Bearer {
        /// The token.
        secret: String,
    },
    /// A key in a header.
    ApiKey {
        /// The header; `X-API-Key` unless told.
        #[serde(default = "api_key_header")]
        header: String,
        /// The key.
        secret: String,
    },
    /// A client certificate.
    Mtls {
        /// The certificate and what follows it, PEM.
        cert_pem: String,
        /// Its key, PKCS#8 PEM.
        key_pem: String,
    },
    /// An access token for our own client credentials (RFC 6749 §4.4).
    OauthClientCredentials {
        /// Where tokens are had.
        token_url: String,
        /// Our id there.
        client_id: String,
        /// Our secret there.
        client_secret: String,
        /// What is asked for.
        scope: Option<String>,
        /// For whom the token is (RFC 8707).
        resource: Option<String>,
    },
    /// An access token for each caller, in exchange for our word for who calls (RFC 8693). Where nobody calls, because
    /// we look at the server ourselves, a token for our own client credentials.
    OauthTokenExchange {
        /// Where tokens are had; whom our word is for.
        token_url: String,
        /// Our id there.
        client_id: String,
        /// Our secret there.
        client_secret: String,
        /// What is asked for.
        scope: Option<String>,
        /// For whom the token is, as a URL.
        resource: Option<String>,
        /// For whom the token is, by the name that the token endpoint knows.
        audience: Option<String>,
    },
}

/// Who calls, as a server is told.
#[derive(Debug)]
pub struct Asserted {
    /// The caller's type and id.
    pub caller: String,
    /// Our word for the server itself, where it wants it.
    pub for_server: Option<String>,
    /// Our word for its token endpoint, where tokens are exchanged.
    pub for_token_endpoint: Option<String>,
}

/// The type of a credential that is exchanged for each caller.
pub const EXCHANGED: &str = "oauth_token_exchange";
/// The header with our word for who calls.
pub const CALLER_HEADER: &str = "mastio-caller";

fn api_key_header() -> String {
    "x-api-key".to_owned()
}

/// Headers that are not a key's: they say what the request is, or who we are to somebody else.
const TAKEN_HEADERS: [&str; 9] = [
    "host",
    "content-length",
    "content-type",
    "transfer-encoding",
    "connection",
    "accept",
    "cookie",
    "dpop",
    "authorization",
];

impl Auth {
    /// The type's name.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bearer { .. } => "bearer",
            Self::ApiKey { .. } => "api_key",
            Self::Mtls { .. } => "mtls",
            Self::OauthClientCredentials { .. } => "oauth_client_credentials",
            Self::OauthTokenExchange { .. } => EXCHANGED,
        }
    }

    /// Errors: what is wrong, for the operator.
    pub fn check(&self, http: &Upstream, endpoint: &Endpoint) -> Result<(), &'static str> {
        let secret = |text: &str| {
            let fits = (1..=SECRET_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|byte| (0x20..=0x7e).contains(&byte));
            if fits { Ok(()) } else { Err("the secret must be printable ASCII") }
        };
        match self {
            Self::None => Ok(()),
            Self::Bearer { secret: text } => secret(text),
            Self::ApiKey { header, secret: text } => {
                let lower = header.to_ascii_lowercase();
                if HeaderName::from_bytes(lower.as_bytes()).is_err()
                    || TAKEN_HEADERS.contains(&lower.as_str())
                    || lower.starts_with("mcp-")
                    || lower == CALLER_HEADER
                {
                    return Err("the header cannot carry a key");
                }
                secret(text)
            }
            Self::Mtls { cert_pem, key_pem } => {
                let pem = Zeroizing::new(format!("{cert_pem}\n{key_pem}"));
                if pem.len() > SECRET_BYTES_MAX {
                    return Err("certificate and key are too large");
                }
                Upstream::own_client(endpoint, None, Some(&pem))
                    .map(drop)
                    .map_err(|_| "cert_pem and key_pem must be a certificate and its PKCS#8 key")
            }
            Self::OauthClientCredentials { token_url, client_id, client_secret, scope, resource } => {
                if http.endpoint(token_url, &[]).is_err() {
                    return Err("token_url is not a URL that may be called");
                }
                secret(client_id)?;
                secret(client_secret)?;
                [scope, resource].into_iter().flatten().try_for_each(|text| secret(text))
            }
            Self::OauthTokenExchange { token_url, client_id, client_secret, scope, resource, audience } => {
                if http.endpoint(token_url, &[]).is_err() {
                    return Err("token_url is not a URL that may be called");
                }
                secret(client_id)?;
                secret(client_secret)?;
                [scope, resource, audience].into_iter().flatten().try_for_each(|text| secret(text))
            }
        }
    }

    /// Seals the credential for its server.
    ///
    /// Errors: [`UpstreamError::Credential`], which only the crypto library can cause.
    pub fn seal(&self, sealing: &SealingKey, upstream_id: &str) -> Result<String, UpstreamError> {
        let clear = serde_json::to_vec(self).map(Zeroizing::new).map_err(|_| UpstreamError::Credential)?;
        sealing.seal(&place(upstream_id), &clear).map_err(|_| UpstreamError::Credential)
    }
}

fn place(upstream_id: &str) -> String {
    format!("mcp_upstreams/{upstream_id}/credential_sealed")
}

/// A credential that was opened for a call.
pub struct ServerAuth {
    auth: Auth,
    identity_pem: Option<Zeroizing<String>>,
}

impl Drop for ServerAuth {
    fn drop(&mut self) {
        use zeroize::Zeroize as _;
        match &mut self.auth {
            Auth::None => {}
            Auth::Bearer { secret } | Auth::ApiKey { secret, .. } => secret.zeroize(),
            Auth::Mtls { key_pem, .. } => key_pem.zeroize(),
            Auth::OauthClientCredentials { client_secret, .. }
            | Auth::OauthTokenExchange { client_secret, .. } => client_secret.zeroize(),
        }
    }
}

/// Access tokens that we were given, by the sealed credential they were given for and the caller, where it is one
/// caller's. Of this process alone: they are had again at no cost.
pub struct AccessTokens(Cache<(String, String), AccessToken>);

#[derive(Clone)]
struct AccessToken {
    value: HeaderValue,
    expires: Instant,
}

impl Default for AccessTokens {
    fn default() -> Self {
        Self(Cache::new(TOKENS_MAX))
    }
}

impl ServerAuth {
    /// Opens a server's credential.
    ///
    /// Errors: [`UpstreamError::Credential`].
    pub fn open(server: &Server, sealing: &SealingKey) -> Result<Self, UpstreamError> {
        let auth = match &server.credential_sealed {
            None => Auth::None,
            Some(sealed) => {
                let clear = sealing
                    .open(&place(&server.upstream_id), sealed)
                    .map_err(|_| UpstreamError::Credential)?;
                serde_json::from_str(&clear).map_err(|_| UpstreamError::Credential)?
            }
        };
        Ok(Self::of(auth))
    }

    /// A credential that is not stored yet.
    #[must_use]
    pub fn of(auth: Auth) -> Self {
        let identity_pem = match &auth {
            Auth::Mtls { cert_pem, key_pem } => Some(Zeroizing::new(format!("{cert_pem}\n{key_pem}"))),
            _ => None,
        };
        Self { auth, identity_pem }
    }

    /// Whether this is that credential.
    #[must_use]
    pub fn is(&self, auth: &Auth) -> bool {
        self.auth == *auth
    }

    /// Certificate and key for TLS.
    #[must_use]
    pub fn identity_pem(&self) -> Option<&str> {
        self.identity_pem.as_ref().map(|pem| pem.as_str())
    }

    /// The header of a request, where the credential is one.
    ///
    /// Errors: [`UpstreamError::Credential`], [`UpstreamError::Authentication`] of the token endpoint, and what a request
    /// to it can end in.
    pub async fn header(
        &self,
        http: &Upstream,
        tokens: &AccessTokens,
        server: &Server,
        asserted: Option<&Asserted>,
    ) -> Result<Option<(HeaderName, HeaderValue)>, UpstreamError> {
        let sensitive = |text: String| {
            let mut value = HeaderValue::try_from(text).map_err(|_| UpstreamError::Credential)?;
            value.set_sensitive(true);
            Ok::<_, UpstreamError>(value)
        };
        Ok(match &self.auth {
            Auth::None | Auth::Mtls { .. } => None,
            Auth::Bearer { secret } => Some((header::AUTHORIZATION, sensitive(format!("Bearer {secret}"))?)),
            Auth::ApiKey { header, secret } => {
                let name = HeaderName::try_from(header.to_ascii_lowercase())
                    .map_err(|_| UpstreamError::Credential)?;
                Some((name, sensitive(secret.clone())?))
            }
            Auth::OauthClientCredentials { .. } | Auth::OauthTokenExchange { .. } => {
                let key = self.token_key(server, asserted);
                if let Some(token) = tokens.0.get(&key).await
                    && Instant::now() < token.expires
                {
                    return Ok(Some((header::AUTHORIZATION, token.value)));
                }
                let token = self.request_token(http, asserted, &sensitive).await?;
                tokens.0.insert(key, token.clone()).await;
                Some((header::AUTHORIZATION, token.value))
            }
        })
    }

    /// Forgets a token that the server refused: the next call asks for another.
    pub async fn forget_token(&self, tokens: &AccessTokens, server: &Server, asserted: Option<&Asserted>) {
        tokens.0.invalidate(&self.token_key(server, asserted)).await;
    }

    fn token_key(&self, server: &Server, asserted: Option<&Asserted>) -> (String, String) {
        let caller = match &self.auth {
            Auth::OauthTokenExchange { .. } => asserted.map(|asserted| asserted.caller.clone()),
            _ => None,
        };
        (server.credential_sealed.clone().unwrap_or_default(), caller.unwrap_or_default())
    }

    /// The token endpoint that wants to know who calls.
    #[must_use]
    pub fn exchanges_at(&self) -> Option<&str> {
        match &self.auth {
            Auth::OauthTokenExchange { token_url, .. } => Some(token_url),
            _ => None,
        }
    }

    async fn request_token(
        &self,
        http: &Upstream,
        asserted: Option<&Asserted>,
        sensitive: &impl Fn(String) -> Result<HeaderValue, UpstreamError>,
    ) -> Result<AccessToken, UpstreamError> {
        #[derive(Deserialize)]
        struct Granted {
            access_token: String,
            token_type: String,
            expires_in: Option<u64>,
            issued_token_type: Option<String>,
        }
        let (token_url, client_id, client_secret, scope, resource, audience) = match &self.auth {
            Auth::OauthClientCredentials { token_url, client_id, client_secret, scope, resource } => {
                (token_url, client_id, client_secret, scope, resource, &None)
            }
            Auth::OauthTokenExchange { token_url, client_id, client_secret, scope, resource, audience } => {
                (token_url, client_id, client_secret, scope, resource, audience)
            }
            _ => return Err(UpstreamError::Credential),
        };
        let subject_token = asserted.and_then(|asserted| asserted.for_token_endpoint.as_deref());
        let endpoint = http.endpoint(token_url, &[])?;
        let mut form = reqwest::Url::parse("form:").map_err(|_| UpstreamError::Credential)?;
        {
            let mut pairs = form.query_pairs_mut();
            match subject_token {
                None => {
                    pairs.append_pair("grant_type", "client_credentials");
                }
                Some(subject_token) => {
                    pairs.append_pair("grant_type", TOKEN_EXCHANGE);
                    pairs.append_pair("subject_token", subject_token);
                    pairs.append_pair("subject_token_type", JWT_TYPE);
                    pairs.append_pair("requested_token_type", ACCESS_TOKEN_TYPE);
                }
            }
            for (name, value) in [("scope", scope), ("resource", resource), ("audience", audience)] {
                if let Some(value) = value {
                    pairs.append_pair(name, value);
                }
            }
        }
        // RFC 6749 §2.3.1: id and secret are form-encoded before they become Basic.
        let encode = |text: &str| {
            let mut url = reqwest::Url::parse("form:").map_err(|_| UpstreamError::Credential)?;
            url.query_pairs_mut().append_key_only(text);
            Ok::<_, UpstreamError>(Zeroizing::new(url.query().unwrap_or_default().to_owned()))
        };
        let pair =
            Zeroizing::new(format!("{}:{}", encode(client_id)?.as_str(), encode(client_secret)?.as_str()));
        let mut headers = HeaderMap::new();
        headers
            .insert(header::AUTHORIZATION, sensitive(format!("Basic {}", STANDARD.encode(pair.as_bytes())))?);
        let body =
            http.post_form(&endpoint, None, headers, form.query().unwrap_or_default().to_owned()).await?;
        let Granted { access_token, token_type, expires_in, issued_token_type } =
            serde_json::from_slice(&body)
                .map_err(|_| UpstreamError::Garbage("the token endpoint's answer"))?;
        let access_token = Zeroizing::new(access_token);
        if !token_type.eq_ignore_ascii_case("bearer") {
            return Err(UpstreamError::Garbage("the token endpoint gave another token than a bearer's"));
        }
        // RFC 8693 §2.2.1: what was issued is always said.
        if subject_token.is_some()
            && !matches!(issued_token_type.as_deref(), Some(ACCESS_TOKEN_TYPE | JWT_TYPE))
        {
            return Err(UpstreamError::Garbage(
                "the token endpoint exchanged for another type than it was asked for",
            ));
        }
        let lifetime = Duration::from_secs(expires_in.unwrap_or(300).min(86_400));
        Ok(AccessToken {
            value: sensitive(format!("Bearer {}", access_token.as_str()))?,
            expires: Instant::now() + lifetime.saturating_sub(RENEW_BEFORE),
        })
    }
}
