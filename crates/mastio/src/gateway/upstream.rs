//! The HTTP client towards upstream servers: one JSON-RPC message out, the messages of its answer in, all bounded.
//!
//! A call is a POST with headers that we built ourselves, so no credential of a caller ever reaches an upstream server.
//! Redirects are not followed and no proxy is used, because each would connect to an address that nobody has checked
//! (see [`super::address`]). The answer is JSON or a stream of events; [`Incoming`] gives its messages one by one.
//! What a server of today's MCP needs besides (revisions, sessions) is [`super::peer`]'s.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
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
/// Bytes of one message of an upstream answer at most.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of a whole event stream at most, comments included.
const STREAM_BYTES_MAX: usize = 16 * 1024 * 1024;
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
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// As many calls to the host are under way as may be.
    #[error("upstream server has too many calls under way: try again")]
    Busy,
    /// The server failed several times in a row and is left alone for a while.
    #[error("upstream server has failed several times: it is left alone for a few seconds")]
    Resting,
    /// The caller went away or took the request back.
    #[error("the request was cancelled")]
    Cancelled,
    /// The server is not one that was looked at successfully.
    #[error("upstream server has not been discovered yet")]
    Undiscovered,
    /// The endpoint is not one that may be called.
    #[error("upstream server is not allowed: {0}")]
    Endpoint(&'static str),
    /// The host is, or resolves to, an address that is not allowed.
    #[error("upstream server has an address that is not allowed")]
    Address,
    /// No connection, or it broke.
    #[error("upstream server is unreachable")]
    Unreachable(#[source] Arc<reqwest::Error>),
    /// No answer in time.
    #[error("upstream server did not answer in time")]
    Timeout,
    /// The credential for the upstream server is missing here or unusable.
    #[error("the credential for the upstream server is not available")]
    Credential,
    /// The server wants our word for who calls, and signing is halted.
    #[error("the upstream server must be told who calls, and signing is halted: try again later")]
    Halted,
    /// The upstream server refused our credential.
    #[error("upstream server refused our credential (HTTP {0})")]
    Authentication(u16),
    /// The upstream server sent us elsewhere, where nobody has checked the address.
    #[error("upstream server answered with a redirect (HTTP {0}), which is not followed")]
    Redirect(u16),
    /// The upstream server answered with another status than success.
    #[error("upstream server answered HTTP {0}")]
    Status(u16),
    /// The answer is of another type than MCP has.
    #[error("upstream server answered with something that is neither JSON nor an event stream")]
    ContentType,
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
            Self::Busy
            | Self::Resting
            | Self::Cancelled
            | Self::Undiscovered
            | Self::Endpoint(_)
            | Self::Address
            | Self::Unreachable(_)
            | Self::Timeout => code::UNREACHABLE,
            Self::Credential | Self::Halted | Self::Authentication(_) => code::UPSTREAM_AUTHENTICATION,
            Self::Redirect(_)
            | Self::Status(_)
            | Self::ContentType
            | Self::TooLarge
            | Self::Garbage(_)
            | Self::Answered { .. } => code::TOOL_ERROR,
        }
    }

    /// One word for the audit log.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Busy => "upstream_busy",
            Self::Resting => "upstream_resting",
            Self::Cancelled => "cancelled",
            Self::Undiscovered => "upstream_undiscovered",
            Self::Endpoint(_) => "upstream_endpoint_refused",
            Self::Address => "upstream_address_refused",
            Self::Unreachable(_) => "upstream_unreachable",
            Self::Timeout => "upstream_timeout",
            Self::Credential => "upstream_credential_missing",
            Self::Halted => "signing_halted",
            Self::Authentication(_) => "upstream_authentication_refused",
            Self::Redirect(_) => "upstream_redirect",
            Self::Status(_) => "upstream_status",
            Self::ContentType => "upstream_content_type",
            Self::TooLarge => "upstream_answer_too_large",
            Self::Garbage(_) => "upstream_answer_unreadable",
            Self::Answered { .. } => "upstream_error",
        }
    }
}

/// How we prove ourselves to the server of a registered tool.
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
            if is_own_setting(name) {
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

/// Whether the variable is one of our own settings, the key that seals all others among them.
#[must_use]
pub fn is_own_setting(variable: &str) -> bool {
    let upper = variable.to_ascii_uppercase();
    ["MCP_PROXY_", "CULLIS_", "MASTIO_"].iter().any(|prefix| upper.starts_with(prefix))
}

/// An endpoint that passed the checks which need no look-up. Made by [`Upstream::endpoint`] alone.
#[derive(Debug, Clone)]
pub struct Endpoint {
    url: Url,
    reach: Reach,
    authority: String,
}

impl Endpoint {
    /// Whether both have one scheme, host and port.
    #[must_use]
    pub fn has_same_origin(&self, other: &Self) -> bool {
        self.url.origin() == other.url.origin()
    }
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
        self.slot_of(&endpoint.authority, CALLS_PER_HOST_MAX)
    }

    /// Takes a place among the `calls_max` to what `key` names.
    ///
    /// Errors: [`UpstreamError::Busy`] at once when all are taken.
    pub fn slot_of(&self, key: &str, calls_max: usize) -> Result<Slot, UpstreamError> {
        let semaphore = {
            let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            if hosts.len() >= HOSTS_MAX {
                hosts.retain(|_, calls| Arc::strong_count(calls) > 1);
            }
            let new = || Arc::new(Semaphore::new(calls_max));
            Arc::clone(hosts.entry(key.to_owned()).or_insert_with(new))
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
        let mut headers = HeaderMap::new();
        headers.extend(credential.header(&self.secrets)?);
        let answer = async {
            let mut incoming = self.post(endpoint, None, headers, body).await?;
            incoming.is_success()?;
            while let Some(message) = incoming.next().await? {
                // Progress and log messages may come before the answer.
                if let Some(answer) = answer_in(&message, request.id) {
                    return answer;
                }
            }
            Err(UpstreamError::Garbage("no answer to our request id"))
        };
        tokio::time::timeout(timeout, answer).await.map_err(|_| UpstreamError::Timeout)?
    }

    /// Posts a JSON-RPC message and gives the response, whatever its status. `client` is the server's own, where it
    /// needs one; otherwise the common one of the endpoint's reach.
    ///
    /// Errors: [`UpstreamError::Address`], [`UpstreamError::Unreachable`], [`UpstreamError::Timeout`] of the connection,
    /// [`UpstreamError::TooLarge`] for an answer that announces too much.
    pub async fn post(
        &self,
        endpoint: &Endpoint,
        client: Option<&Client>,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Incoming, UpstreamError> {
        let response = self
            .client(endpoint, client)
            .post(endpoint.url.clone())
            .header(header::ACCEPT, "application/json, text/event-stream")
            .header(header::CONTENT_TYPE, "application/json")
            .headers(headers)
            .body(body)
            .send()
            .await
            .map_err(unreachable)?;
        Incoming::of(response)
    }

    /// Posts a form, for a token endpoint, and gives the JSON of a success.
    ///
    /// Errors: as [`Upstream::post`], and [`UpstreamError::Authentication`] for any other status than success.
    pub async fn post_form(
        &self,
        endpoint: &Endpoint,
        client: Option<&Client>,
        headers: HeaderMap,
        form: String,
    ) -> Result<Vec<u8>, UpstreamError> {
        let sent = self
            .client(endpoint, client)
            .post(endpoint.url.clone())
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .headers(headers)
            .body(form)
            .send();
        let answer = async {
            let mut incoming = Incoming::of(sent.await.map_err(unreachable)?)?;
            match incoming.status() {
                200..=299 => Ok(incoming.next().await?.unwrap_or_default()),
                status => Err(UpstreamError::Authentication(status)),
            }
        };
        tokio::time::timeout(CALL_TIMEOUT, answer).await.map_err(|_| UpstreamError::Timeout)?
    }

    /// Opens the stream on which a server speaks by itself. `timeout` is for its first sign only.
    ///
    /// Errors: as [`Upstream::post`], and [`UpstreamError::Timeout`].
    pub async fn listen(
        &self,
        endpoint: &Endpoint,
        client: Option<&Client>,
        headers: HeaderMap,
        timeout: Duration,
    ) -> Result<Incoming, UpstreamError> {
        let sent = self
            .client(endpoint, client)
            .get(endpoint.url.clone())
            .header(header::ACCEPT, "text/event-stream")
            .headers(headers)
            .send();
        let response = tokio::time::timeout(timeout, sent).await.map_err(|_| UpstreamError::Timeout)?;
        Incoming::of(response.map_err(unreachable)?)
    }

    /// Ends a session at the server. Nobody waits for what it says.
    pub async fn delete(&self, endpoint: &Endpoint, client: Option<&Client>, headers: HeaderMap) {
        let sent = self.client(endpoint, client).delete(endpoint.url.clone()).headers(headers).send();
        // The server forgets the session by itself, sooner or later.
        let _told = tokio::time::timeout(SCHEMA_TIMEOUT, sent).await;
    }

    fn client<'a>(&'a self, endpoint: &Endpoint, own: Option<&'a Client>) -> &'a Client {
        match (own, endpoint.reach) {
            (Some(own), _) => own,
            (None, Reach::Public) => &self.public,
            (None, Reach::Internal) => &self.internal,
        }
    }

    /// A client that trusts `ca_pem` besides the machine's roots and shows `identity_pem` (certificate and key).
    ///
    /// Errors: [`UpstreamError::Credential`] for what is no certificate or key.
    pub fn own_client(
        endpoint: &Endpoint,
        ca_pem: Option<&str>,
        identity_pem: Option<&str>,
    ) -> Result<Client, UpstreamError> {
        let mut builder = builder(endpoint.reach);
        if let Some(pem) = ca_pem {
            let certificates = reqwest::Certificate::from_pem_bundle(pem.as_bytes())
                .map_err(|_| UpstreamError::Credential)?;
            if certificates.is_empty() {
                return Err(UpstreamError::Credential);
            }
            // In their place, not beside them: whoever names a CA means that one.
            builder = builder.tls_certs_only(certificates);
        }
        if let Some(pem) = identity_pem {
            let identity =
                reqwest::Identity::from_pem(pem.as_bytes()).map_err(|_| UpstreamError::Credential)?;
            builder = builder.identity(identity);
        }
        builder.build().map_err(|_| UpstreamError::Credential)
    }
}

/// A response on its way: its JSON-RPC messages one by one.
pub struct Incoming {
    response: Response,
    streamed: bool,
    /// Whether it says of itself that it is another thing than MCP has.
    foreign: bool,
    events: Option<EventStream>,
    waiting: VecDeque<Vec<u8>>,
    body: Vec<u8>,
    bytes_read: usize,
    /// Bytes since the last whole message.
    bytes_pending: usize,
}

impl Incoming {
    fn of(response: Response) -> Result<Self, UpstreamError> {
        if response.content_length().is_some_and(|bytes| bytes > ANSWER_BYTES_MAX as u64) {
            return Err(UpstreamError::TooLarge);
        }
        let streamed = is_event_stream(response.headers());
        let is_json = |essence: &str| essence == "application/json" || essence.ends_with("+json");
        let foreign = !streamed && essence(response.headers()).is_some_and(|it| !is_json(&it));
        Ok(Self {
            response,
            streamed,
            foreign,
            events: Some(EventStream::default()),
            waiting: VecDeque::new(),
            body: Vec::new(),
            bytes_read: 0,
            bytes_pending: 0,
        })
    }

    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// Whether its messages are events, not its whole body.
    #[must_use]
    pub fn is_event_stream(&self) -> bool {
        self.streamed
    }

    /// Errors: the status is none of success.
    pub fn is_success(&self) -> Result<(), UpstreamError> {
        match self.status() {
            200..=299 => Ok(()),
            redirect @ 300..=399 => Err(UpstreamError::Redirect(redirect)),
            refused @ (401 | 403) => Err(UpstreamError::Authentication(refused)),
            other => Err(UpstreamError::Status(other)),
        }
    }

    /// A response header of ASCII.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    /// The next message: the data of an event, or the whole body. Absent at the end.
    ///
    /// Errors: [`UpstreamError::TooLarge`], [`UpstreamError::Unreachable`] when the connection breaks,
    /// [`UpstreamError::Garbage`] for a message that is too deep, [`UpstreamError::ContentType`] for what is no message.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, UpstreamError> {
        loop {
            if let Some(message) = self.waiting.pop_front() {
                if jsonrpc::is_deeper_than(&message, jsonrpc::DEPTH_MAX) {
                    return Err(UpstreamError::Garbage("it is nested too deep"));
                }
                return Ok(Some(message));
            }
            let Some(events) = &mut self.events else { return Ok(None) };
            let Some(chunk) = self.response.chunk().await.map_err(unreachable)? else {
                let events = self.events.take().unwrap_or_default();
                let last = if self.streamed { events.finish() } else { Some(std::mem::take(&mut self.body)) };
                self.waiting.extend(last.filter(|last| !last.is_empty()));
                continue;
            };
            // A failure is one by its status, whatever page comes with it.
            if self.foreign && self.response.status().is_success() && !chunk.is_empty() {
                return Err(UpstreamError::ContentType);
            }
            self.bytes_read += chunk.len();
            self.bytes_pending += chunk.len();
            if self.bytes_pending > ANSWER_BYTES_MAX || self.bytes_read > STREAM_BYTES_MAX {
                return Err(UpstreamError::TooLarge);
            }
            if !self.streamed {
                self.body.extend_from_slice(&chunk);
                continue;
            }
            let whole = events.push(&chunk);
            if !whole.is_empty() {
                self.bytes_pending = 0;
                self.waiting.extend(whole.into_iter().filter(|data| !data.is_empty()));
            }
        }
    }
}

/// The answer to the request `id`, where `json` is one. Absent for any other message.
pub(crate) fn answer_in(json: &[u8], id: &str) -> Option<Result<Box<RawValue>, UpstreamError>> {
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
    if error.is_timeout() {
        UpstreamError::Timeout
    } else {
        UpstreamError::Unreachable(Arc::new(error.without_url()))
    }
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

fn builder(reach: Reach) -> reqwest::ClientBuilder {
    Client::builder()
        .user_agent(concat!("mastio/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(CALLS_PER_HOST_MAX)
        .dns_resolver(GuardedResolver(reach))
}

fn client(reach: Reach) -> Result<Client, GatewayError> {
    // reqwest takes the process's provider; ours is the only one in the tree, so whoever was first is fine.
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // TLS trusts what the machine trusts, an operator's own CA included (SSL_CERT_FILE).
    builder(reach).build().or_else(|error| {
        tracing::warn!(
            error = &error as &dyn Error,
            "upstream_trust_store_missing: https upstream servers are refused; install CA certificates"
        );
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let trusting_nobody = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        Ok(builder(reach).tls_backend_preconfigured(trusting_nobody).build()?)
    })
}

/// Whether the content type says that events follow, whatever its parameters say.
fn is_event_stream(headers: &HeaderMap) -> bool {
    essence(headers).as_deref() == Some("text/event-stream")
}

/// The content type, in lower case and without its parameters. Absent where none is given.
fn essence(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().unwrap_or_default();
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stream_is_what_its_content_type_says_exactly() {
        for (content_type, expected) in [
            ("text/event-stream", true),
            ("Text/Event-Stream; charset=utf-8", true),
            ("text/event-streamX", false),
            ("application/json", false),
            ("application/x; a=text/event-stream", false),
            ("", false),
        ] {
            let headers =
                HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))]);
            assert_eq!(is_event_stream(&headers), expected, "{content_type}");
        }
        assert!(!is_event_stream(&HeaderMap::new()));
    }
}
