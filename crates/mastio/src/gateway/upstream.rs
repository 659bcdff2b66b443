//! The HTTP client towards upstream servers: one JSON-RPC request out, one answer in, everything bounded.
//!
//! A call is a POST with headers that we built ourselves; nothing of the caller's request but the tool's name, its
//! arguments and the request id goes out, so no credential of a caller ever reaches an upstream server. Redirects
//! are not followed and no proxy is used, because each would connect to an address that nobody has checked (see
//! [`super::address`]). The answer is JSON or a stream of events; of a stream the first event that answers our id
//! counts, and the rest is not waited for.

use std::collections::HashMap;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, header};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, Response, Url};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::address::{Allowlist, Reach, in_domains, normal_host};
use super::error::GatewayError;
use super::jsonrpc::{self, code, shorten};
use super::sse::EventStream;

/// How long a tool call may take. The SDK gives up after 10 s; the audit commit and the way back need the rest.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(9);
/// How long a registration waits for the tool's schema.
pub const SCHEMA_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a connection, TLS included, may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an idle connection is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of an upstream answer at most, a whole event stream included.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a tool's input schema at most; a larger one is not kept.
pub const SCHEMA_BYTES_MAX: usize = 64 * 1024;
/// Calls that may be under way to one upstream host. One more is refused at once.
pub const CALLS_PER_HOST_MAX: usize = 64;
/// Hosts whose calls are counted before those at rest are forgotten.
const HOSTS_MAX: usize = 4096;
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// Bytes of an upstream error message that the caller gets to see.
const MESSAGE_BYTES_MAX: usize = 512;

/// Looks up a secret by name: the environment, handed in by `config.rs`, which alone reads it.
pub type Secrets = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// Why an upstream call gave no result. The text is what the caller reads; it names no address.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// As many calls to the host are under way as may be.
    #[error("upstream server has too many calls under way: try again")]
    Busy,
    /// The endpoint is not one that may be called.
    #[error("upstream server is not allowed: {0}")]
    Endpoint(&'static str),
    /// The host is, or resolves to, an address that is not allowed.
    #[error("upstream server has an address that is not allowed")]
    Address,
    /// No connection, or it broke.
    #[error("upstream server is unreachable")]
    Unreachable(#[source] reqwest::Error),
    /// No answer in time.
    #[error("upstream server did not answer in time")]
    Timeout,
    /// The credential for the upstream server is missing here or unusable.
    #[error("the credential for the upstream server is not available")]
    Credential,
    /// The upstream server refused our credential.
    #[error("upstream server refused our credential (HTTP {0})")]
    Authentication(u16),
    /// The upstream server answered with another status than success.
    #[error("upstream server answered HTTP {0}")]
    Status(u16),
    /// The answer is larger than its bound.
    #[error("upstream server answered with more than {ANSWER_BYTES_MAX} bytes")]
    TooLarge,
    /// The answer is not a JSON-RPC answer to our request.
    #[error("upstream server did not answer as JSON-RPC: {0}")]
    Garbage(&'static str),
    /// The upstream server answered with a JSON-RPC error.
    #[error("upstream server answered with error {code}: {message}")]
    Answered {
        /// Its code.
        code: i64,
        /// Its message, shortened.
        message: String,
    },
}

impl UpstreamError {
    /// The JSON-RPC code that the caller gets.
    #[must_use]
    pub fn code(&self) -> i64 {
        match self {
            Self::Busy | Self::Endpoint(_) | Self::Address | Self::Unreachable(_) | Self::Timeout => {
                code::UNREACHABLE
            }
            Self::Credential | Self::Authentication(_) => code::UPSTREAM_AUTHENTICATION,
            Self::Status(_) | Self::TooLarge | Self::Garbage(_) | Self::Answered { .. } => code::TOOL_ERROR,
        }
    }

    /// One word for the audit log.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Busy => "upstream_busy",
            Self::Endpoint(_) => "upstream_endpoint_refused",
            Self::Address => "upstream_address_refused",
            Self::Unreachable(_) => "upstream_unreachable",
            Self::Timeout => "upstream_timeout",
            Self::Credential => "upstream_credential_missing",
            Self::Authentication(_) => "upstream_authentication_refused",
            Self::Status(_) => "upstream_status",
            Self::TooLarge => "upstream_answer_too_large",
            Self::Garbage(_) => "upstream_answer_unreadable",
            Self::Answered { .. } => "upstream_error",
        }
    }
}

/// How we prove ourselves to an upstream server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Not at all.
    None,
    /// `Authorization: Bearer` with the secret of this name.
    Bearer(String),
    /// `X-API-Key` with the secret of this name.
    ApiKey(String),
}

impl Credential {
    /// Reads `auth_type` and `auth_secret_ref`.
    ///
    /// Errors: what is wrong, for the operator. Only `env://NAME` is understood, and not our own settings: an
    /// upstream server must never be handed the key that seals the others.
    pub fn parse(auth_type: &str, secret_ref: Option<&str>) -> Result<Self, &'static str> {
        let name = match secret_ref {
            None => None,
            Some(text) => Some(text.strip_prefix("env://").ok_or("must have the form env://NAME")?),
        };
        if let Some(name) = name {
            let wellformed = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            if !wellformed || name.len() > 128 {
                return Err("must have the form env://NAME");
            }
            let upper = name.to_ascii_uppercase();
            if upper.starts_with("MCP_PROXY_") || upper.starts_with("CULLIS_") {
                return Err("must not name a setting of the Mastio itself");
            }
        }
        match (auth_type, name) {
            ("none", _) => Ok(Self::None),
            ("bearer", Some(name)) => Ok(Self::Bearer(name.to_owned())),
            ("api_key", Some(name)) => Ok(Self::ApiKey(name.to_owned())),
            ("bearer" | "api_key", None) => Err("is required for this auth_type"),
            _ => Err("auth_type must be one of none, bearer, api_key"),
        }
    }

    fn header(&self, secrets: &Secrets) -> Result<Option<(HeaderName, HeaderValue)>, UpstreamError> {
        let secret = |name: &str| secrets(name).filter(|secret| !secret.is_empty());
        let (name, text) = match self {
            Self::None => return Ok(None),
            Self::Bearer(name) => {
                (header::AUTHORIZATION, secret(name).map(|secret| format!("Bearer {secret}")))
            }
            Self::ApiKey(name) => (HeaderName::from_static("x-api-key"), secret(name)),
        };
        let text = text.ok_or(UpstreamError::Credential)?;
        let mut value = HeaderValue::try_from(text).map_err(|_| UpstreamError::Credential)?;
        value.set_sensitive(true);
        Ok(Some((name, value)))
    }
}

/// An endpoint that passed the checks which need no look-up. Made by [`Upstream::endpoint`] alone.
#[derive(Debug, Clone)]
pub struct Endpoint {
    url: Url,
    reach: Reach,
    authority: String,
}

/// A place among the calls to one host. Held while the call is under way.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
}

/// What an upstream server is asked.
#[derive(Serialize)]
struct Request<'a, P: Serialize> {
    jsonrpc: &'static str,
    id: &'a str,
    method: &'static str,
    params: P,
}

#[derive(Serialize)]
struct CallParams<'a> {
    name: &'a str,
    arguments: &'a RawValue,
}

/// The client. Shared by every call.
pub struct Upstream {
    public: Client,
    internal: Client,
    allowlist: Allowlist,
    secrets: Secrets,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
    call_timeout: Duration,
}

impl Upstream {
    /// Builds the client. `internal_host_allowlist` has `host` or `host:port` of the private hosts that upstream
    /// servers may have; everything else must lie on the public internet.
    ///
    /// Errors: [`GatewayError::Client`] and [`GatewayError::Tls`], at boot.
    pub fn new(internal_host_allowlist: &[String], secrets: Secrets) -> Result<Self, GatewayError> {
        Ok(Self {
            public: client(Reach::Public)?,
            internal: client(Reach::Internal)?,
            allowlist: Allowlist::new(internal_host_allowlist),
            secrets,
            hosts: Mutex::default(),
            call_timeout: CALL_TIMEOUT,
        })
    }

    /// The same client with another limit on calls, so that a test need not wait for nine seconds.
    #[cfg(test)]
    #[must_use]
    pub fn with_call_timeout(mut self, call_timeout: Duration) -> Self {
        self.call_timeout = call_timeout;
        self
    }

    /// Checks an endpoint: an http or https URL without credentials, its host in `allowed_domains` (by default its
    /// own), and where the host is an address, one that is allowed. Names are checked when they are resolved.
    ///
    /// Errors: [`UpstreamError::Endpoint`], [`UpstreamError::Address`].
    pub fn endpoint(&self, url: &str, allowed_domains: &[String]) -> Result<Endpoint, UpstreamError> {
        let url = Url::parse(url).map_err(|_| UpstreamError::Endpoint("the endpoint is not a URL"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(UpstreamError::Endpoint("the endpoint is neither http nor https"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err(UpstreamError::Endpoint("the endpoint has credentials or a fragment in its URL"));
        }
        let (Some(host), Some(port)) = (url.host_str().map(normal_host), url.port_or_known_default()) else {
            return Err(UpstreamError::Endpoint("the endpoint has no host"));
        };
        if !allowed_domains.is_empty() && !in_domains(&host, allowed_domains) {
            return Err(UpstreamError::Endpoint("the endpoint's host is not in allowed_domains"));
        }
        let reach = if self.allowlist.lists(&host, port) { Reach::Internal } else { Reach::Public };
        // The client asks no resolver about an address, so this is the only check it gets. An operator who lists
        // an address itself means that address, whatever its class.
        if let Ok(address) = host.parse::<IpAddr>()
            && reach == Reach::Public
            && !reach.admits(address)
        {
            return Err(UpstreamError::Address);
        }
        Ok(Endpoint { authority: format!("{host}:{port}"), url, reach })
    }

    /// Takes a place among the calls to the endpoint's host.
    ///
    /// Errors: [`UpstreamError::Busy`] at once when [`CALLS_PER_HOST_MAX`] are under way.
    pub fn slot(&self, endpoint: &Endpoint) -> Result<Slot, UpstreamError> {
        let semaphore = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            if hosts.len() >= HOSTS_MAX {
                hosts.retain(|_, calls| calls.available_permits() < CALLS_PER_HOST_MAX);
            }
            let new = || Arc::new(Semaphore::new(CALLS_PER_HOST_MAX));
            Arc::clone(hosts.entry(endpoint.authority.clone()).or_insert_with(new))
        };
        let permit = semaphore.try_acquire_owned().map_err(|_| UpstreamError::Busy)?;
        Ok(Slot { _permit: permit })
    }

    /// Calls `tool` and gives the `result` of the answer as the upstream server wrote it.
    ///
    /// `id` is the caller's request id as text. Errors: [`UpstreamError`], within [`CALL_TIMEOUT`].
    pub async fn call(
        &self,
        endpoint: &Endpoint,
        credential: &Credential,
        id: &str,
        tool: &str,
        arguments: &RawValue,
    ) -> Result<Box<RawValue>, UpstreamError> {
        let params = CallParams { name: tool, arguments };
        let request = Request { jsonrpc: "2.0", id, method: "tools/call", params };
        self.exchange(endpoint, credential, &request, self.call_timeout).await
    }

    /// Asks the upstream server for the input schema of `tool`: best effort, absent when anything is amiss.
    pub async fn input_schema(
        &self,
        endpoint: &Endpoint,
        credential: &Credential,
        tool: &str,
    ) -> Option<Box<RawValue>> {
        #[derive(Deserialize)]
        struct Tools<'a> {
            #[serde(borrow)]
            tools: Vec<Tool<'a>>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Tool<'a> {
            name: String,
            #[serde(borrow)]
            input_schema: Option<&'a RawValue>,
        }
        let request =
            Request { jsonrpc: "2.0", id: "schema", method: "tools/list", params: jsonrpc::empty_object() };
        let result = self.exchange(endpoint, credential, &request, SCHEMA_TIMEOUT).await.ok()?;
        let listed: Tools<'_> = serde_json::from_str(result.get()).ok()?;
        let schema = listed.tools.into_iter().find(|listed| listed.name == tool)?.input_schema?;
        (schema.get().starts_with('{') && schema.get().len() <= SCHEMA_BYTES_MAX).then(|| schema.to_owned())
    }

    async fn exchange<P: Serialize>(
        &self,
        endpoint: &Endpoint,
        credential: &Credential,
        request: &Request<'_, P>,
        timeout: Duration,
    ) -> Result<Box<RawValue>, UpstreamError> {
        let body = serde_json::to_vec(request).map_err(|_| UpstreamError::Garbage("the request"))?;
        let authorization = credential.header(&self.secrets)?;
        let client = match endpoint.reach {
            Reach::Public => &self.public,
            Reach::Internal => &self.internal,
        };
        let mut post = client
            .post(endpoint.url.clone())
            .header(header::ACCEPT, "application/json, text/event-stream")
            .header(header::CONTENT_TYPE, "application/json")
            .body(body);
        if let Some((name, value)) = authorization {
            post = post.header(name, value);
        }
        let answer = async { read_answer(post.send().await.map_err(unreachable)?, request.id).await };
        tokio::time::timeout(timeout, answer).await.map_err(|_| UpstreamError::Timeout)?
    }
}

/// Reads the answer to the request `id` from a response.
async fn read_answer(mut response: Response, id: &str) -> Result<Box<RawValue>, UpstreamError> {
    match response.status().as_u16() {
        200..=299 => {}
        refused @ (401 | 403) => return Err(UpstreamError::Authentication(refused)),
        other => return Err(UpstreamError::Status(other)),
    }
    if response.content_length().is_some_and(|bytes| bytes > ANSWER_BYTES_MAX as u64) {
        return Err(UpstreamError::TooLarge);
    }
    let streamed = response
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.trim_start().to_ascii_lowercase().starts_with("text/event-stream"));
    let mut bytes_read = 0;
    let mut body = Vec::new();
    let mut events = EventStream::default();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        bytes_read += chunk.len();
        if bytes_read > ANSWER_BYTES_MAX {
            return Err(UpstreamError::TooLarge);
        }
        if !streamed {
            body.extend_from_slice(&chunk);
            continue;
        }
        for data in events.push(&chunk) {
            // Progress and log messages may come before the answer.
            if let Some(answer) = answer_in(&data, id) {
                return answer;
            }
        }
    }
    let last = if streamed { events.finish().unwrap_or_default() } else { body };
    answer_in(&last, id).unwrap_or(Err(UpstreamError::Garbage("no answer to our request id")))
}

/// The answer to the request `id`, where `json` is one. Absent for any other message.
fn answer_in(json: &[u8], id: &str) -> Option<Result<Box<RawValue>, UpstreamError>> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        id: Option<&'a RawValue>,
        #[serde(borrow)]
        result: Option<&'a RawValue>,
        error: Option<AnswerError>,
    }
    #[derive(Deserialize)]
    struct AnswerError {
        #[serde(default)]
        code: i64,
        #[serde(default)]
        message: String,
    }
    let answer: Answer<'_> = serde_json::from_slice(json).ok()?;
    let answered = answer.id?.get();
    // Some servers answer a string of digits as a number. The connection carries one exchange, so that is no doubt.
    if answered != id && serde_json::from_str::<String>(answered).ok().as_deref() != Some(id) {
        return None;
    }
    match (answer.result, answer.error) {
        (_, Some(error)) => Some(Err(UpstreamError::Answered {
            code: error.code,
            message: shorten(&error.message, MESSAGE_BYTES_MAX).to_owned(),
        })),
        (Some(result), None) => Some(Ok(result.to_owned())),
        (None, None) => None,
    }
}

/// What a failed exchange means. An address that was refused hides among the causes of a failed connection.
fn unreachable(error: reqwest::Error) -> UpstreamError {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(found) = cause {
        if found.is::<AddressRefused>() {
            return UpstreamError::Address;
        }
        cause = found.source();
    }
    if error.is_timeout() { UpstreamError::Timeout } else { UpstreamError::Unreachable(error.without_url()) }
}

/// Every address of a name is one that may not be connected to.
#[derive(Debug, thiserror::Error)]
#[error("no address of the name may be connected to")]
struct AddressRefused;

/// Resolves names to addresses that [`Reach`] admits. The client connects to these and asks nobody again.
struct GuardedResolver(Reach);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.0;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let admitted: Vec<SocketAddr> =
                found.filter(|address| reach.admits(address.ip())).take(ADDRESSES_MAX).collect();
            if admitted.is_empty() {
                return Err(AddressRefused.into());
            }
            Ok(Box::new(admitted.into_iter()) as Addrs)
        })
    }
}

fn client(reach: Reach) -> Result<Client, GatewayError> {
    // reqwest takes the process's provider; ours is the only one in the tree, so whoever was first is fine.
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let builder = || {
        Client::builder()
            .user_agent(concat!("mastio/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(CALLS_PER_HOST_MAX)
            .dns_resolver(GuardedResolver(reach))
    };
    // TLS trusts what the machine trusts, an operator's own CA included (SSL_CERT_FILE).
    builder().build().or_else(|error| {
        tracing::warn!(
            error = &error as &dyn Error,
            "upstream_trust_store_missing: https upstream servers are refused; install CA certificates"
        );
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let trusting_nobody = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        Ok(builder().tls_backend_preconfigured(trusting_nobody).build()?)
    })
}
