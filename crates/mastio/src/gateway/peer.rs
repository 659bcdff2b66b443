//! A real MCP server behind us: which revision it speaks, our sessions with it, and one request and what comes back.
//!
//! A server of 2026-07-28 gets each request by itself, with the headers that mirror it. An older one gets a session for
//! each caller, so that nothing which it keeps for one caller is seen by another; a caller with a session of its own
//! has one there too. A session that the server has forgotten (HTTP 404) is begun again, once, and the request sent
//! again, because such an answer says that it was not served. Nothing else is ever sent twice.
//!
//! A server that fails several times in a row is left alone for a few seconds, then tried with one request.

use std::collections::HashMap;
use std::future::pending;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use moka::future::Cache;
use reqwest::Client;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::credential::{AccessTokens, Asserted, CALLER_HEADER, ServerAuth};
use super::jsonrpc::{self, Id};
use super::listen::{Heard, Logs, belongs_to_a_request};
use super::protocol::{
    META_CAPABILITIES, META_CLIENT, META_LOG_LEVEL, META_VERSION, METHOD_HEADER, NAME_HEADER, Revision,
    SESSION_HEADER, VERSION_HEADER, encoded, server_info,
};
use super::servers::Server;
use super::session::{ReplyTo, Session};
use super::trace::Trace;
use super::upstream::{Endpoint, Incoming, Upstream, UpstreamError};
use crate::pki::keys::SealingKey;

/// Sessions with upstream servers that are kept at most; the one unused for longest goes first.
const SESSIONS_MAX: u64 = 20_000;
/// A session with an upstream server that nobody uses is forgotten after so long.
const SESSION_IDLE: Duration = Duration::from_secs(1800);
/// Failures in a row after which a server is left alone.
const FAILURES_MAX: u32 = 5;
/// How long it is left alone.
const REST: Duration = Duration::from_secs(5);
/// A request takes no longer than this, however often it says how far it is.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// How long a handshake or a look at a server may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients of servers with certificates of their own that are kept.
const CLIENTS_MAX: usize = 1024;

/// Whose session with an upstream server it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionKey {
    /// The upstream server, and when it was last changed.
    pub upstream: (String, String),
    /// The caller's type and id.
    pub caller: (String, String),
    /// The caller's own session with us, where it has one.
    pub session: Option<String>,
}

/// A session with an upstream server. Without an id where the server keeps none.
#[derive(Debug, Clone)]
struct PeerSession {
    id: Option<String>,
    revision: Revision,
}

/// What is kept between requests to upstream servers.
pub struct Peers {
    sessions: Cache<SessionKey, Arc<PeerSession>>,
    health: Mutex<HashMap<String, Health>>,
    clients: Mutex<HashMap<String, (Arc<Server>, Client)>>,
    tokens: AccessTokens,
    ids: AtomicU64,
}

impl Default for Peers {
    fn default() -> Self {
        Self {
            sessions: Cache::builder().max_capacity(SESSIONS_MAX).time_to_idle(SESSION_IDLE).build(),
            health: Mutex::default(),
            clients: Mutex::default(),
            tokens: AccessTokens::default(),
            ids: AtomicU64::new(1),
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Health {
    failures: u32,
    rests_until: Option<Instant>,
}

/// An upstream server that can be spoken to: checked, unsealed, its client at hand.
pub struct Link {
    /// The server.
    pub server: Arc<Server>,
    pub(super) endpoint: Endpoint,
    pub(super) client: Option<Client>,
    pub(super) auth: ServerAuth,
    /// Who calls, where the server is told; absent where we ask for ourselves.
    pub(super) asserted: Option<Asserted>,
}

/// One request to an upstream server.
pub struct Ask<'a> {
    /// The method.
    pub method: &'a str,
    /// Its parameters, as the caller wrote them but for a tool's own name.
    pub params: Option<Box<RawValue>>,
    /// The name or URI that `Mcp-Name` mirrors.
    pub name: Option<&'a str>,
    /// `Mcp-Param-…` headers of the caller's that the tool's schema asks for.
    pub mirrored: Vec<(HeaderName, HeaderValue)>,
    /// Whose session it is.
    pub key: SessionKey,
    /// What the client of a session can do for the server.
    pub capabilities: Map<String, Value>,
    /// The trace.
    pub trace: &'a Trace,
    /// Between two messages, and before the first.
    pub idle_timeout: Duration,
    /// The revision that the caller speaks.
    pub revision: Revision,
    /// What the caller hears before the answer.
    pub listener: &'a Listener,
}

/// Where what a server says before its answer goes.
#[derive(Default)]
pub struct Listener {
    /// The caller's stream. Absent for one that reads none.
    pub sender: Option<mpsc::Sender<Bytes>>,
    /// The caller's session: whoever has one can be asked, too.
    pub session: Option<Session>,
    /// Whether a caller that hangs up has taken its request back.
    pub hang_up_cancels: bool,
    /// Told when the caller takes its request back.
    pub cancelled: Option<Arc<tokio::sync::Notify>>,
    /// Seals where an answer to a server's own request goes.
    pub sealing: Option<Arc<SealingKey>>,
    /// Which log messages the caller hears.
    pub logs: Logs,
}

impl Listener {
    /// Ends when the caller has taken its request back.
    async fn gone(&self) {
        let hung_up = async {
            match &self.sender {
                Some(sender) if self.hang_up_cancels => sender.closed().await,
                _ => pending().await,
            }
        };
        let cancelled = async {
            match &self.cancelled {
                Some(cancelled) => cancelled.notified().await,
                None => pending().await,
            }
        };
        tokio::select! { () = hung_up => {} () = cancelled => {} }
    }

    /// Ends when the caller does not read its stream any more.
    pub async fn hung_up(&self) {
        match &self.sender {
            Some(sender) => sender.closed().await,
            None => pending().await,
        }
    }

    /// Tells the caller a message, on one line.
    pub async fn tell(&self, message: Vec<u8>) {
        if let Some(sender) = &self.sender {
            // A caller that hung up hears nothing; what it asked for goes on all the same.
            let _gone = sender.send(Bytes::from(message)).await;
        }
    }
}

/// What a server answered: a result, or its error object, each as it was written.
pub type Answered = Result<Box<RawValue>, Box<RawValue>>;

/// A message of a server's.
#[derive(Deserialize)]
struct Said<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: Option<String>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// What looking at a server found.
#[derive(Debug)]
pub struct Discovered {
    /// The revision that it is spoken to in.
    pub revision: Revision,
    /// What it offers.
    pub capabilities: Map<String, Value>,
    /// Its tools' definitions, in its order.
    pub tools: Vec<Box<RawValue>>,
}

/// Pages of a list that are read.
const PAGES_MAX: usize = 20;
/// Tools of one server.
pub const TOOLS_MAX: usize = 500;

impl Peers {
    /// Refuses while the server is left alone.
    ///
    /// Errors: [`UpstreamError::Resting`].
    pub fn admit(&self, upstream_id: &str) -> Result<(), UpstreamError> {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = health.get_mut(upstream_id) else { return Ok(()) };
        match known.rests_until {
            Some(until) if Instant::now() < until => Err(UpstreamError::Resting),
            Some(_) => {
                // One request is let through to see; the others wait for what it finds.
                known.rests_until = Some(Instant::now() + REST);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Takes note of how a request to the server ended.
    fn note(&self, upstream_id: &str, outcome: Result<&Answered, &UpstreamError>) {
        let failed = match outcome {
            Err(UpstreamError::Unreachable(_) | UpstreamError::Timeout) => true,
            Err(UpstreamError::Status(status)) => *status >= 500,
            Err(UpstreamError::Cancelled) => return,
            _ => false,
        };
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        if !failed {
            health.remove(upstream_id);
            return;
        }
        let known = health.entry(upstream_id.to_owned()).or_default();
        known.failures = known.failures.saturating_add(1);
        if known.failures >= FAILURES_MAX {
            known.rests_until = Some(Instant::now() + REST);
        }
    }

    /// The client of a server that has certificates of its own.
    ///
    /// Errors: [`UpstreamError::Credential`].
    pub fn client(
        &self,
        server: &Arc<Server>,
        endpoint: &Endpoint,
        auth: &ServerAuth,
    ) -> Result<Option<Client>, UpstreamError> {
        let identity = auth.identity_pem();
        if identity.is_none() && server.ca_pem.is_none() {
            return Ok(None);
        }
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, client)) = clients.get(&server.upstream_id)
            && of.credential_sealed == server.credential_sealed
            && of.ca_pem == server.ca_pem
            && of.endpoint_url == server.endpoint_url
        {
            return Ok(Some(client.clone()));
        }
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        let client = Upstream::own_client(endpoint, server.ca_pem.as_deref(), identity)?;
        clients.insert(server.upstream_id.clone(), (Arc::clone(server), client.clone()));
        Ok(Some(client))
    }

    /// Asks a server and gives its answer. What it says before goes to the listener.
    ///
    /// Errors: [`UpstreamError`].
    pub async fn ask(&self, http: &Upstream, link: &Link, ask: &Ask<'_>) -> Result<Answered, UpstreamError> {
        let asked = self.ask_within_session(http, link, ask);
        let answered = match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
            Ok(answered) => answered,
            Err(_) => Err(UpstreamError::Timeout),
        };
        self.note(&link.server.upstream_id, answered.as_ref());
        answered
    }

    async fn ask_within_session(
        &self,
        http: &Upstream,
        link: &Link,
        ask: &Ask<'_>,
    ) -> Result<Answered, UpstreamError> {
        let revision = link.server.revision.ok_or(UpstreamError::Undiscovered)?;
        if revision.is_stateless() {
            let session = PeerSession { id: None, revision };
            return match self.try_once(http, link, ask, &session).await? {
                Tried::Answered(answered) => Ok(answered),
                Tried::Forgotten(status) => Err(UpstreamError::Status(status)),
            };
        }
        let mut begun_again = false;
        loop {
            let session = self.session(http, link, revision, &ask.key, &ask.capabilities).await?;
            match self.try_once(http, link, ask, &session).await? {
                Tried::Answered(answered) => return Ok(answered),
                Tried::Forgotten(status) if begun_again => return Err(UpstreamError::Status(status)),
                Tried::Forgotten(_) => {
                    begun_again = true;
                    self.sessions.invalidate(&ask.key).await;
                }
            }
        }
    }

    /// The session of this key with a server, begun where there is none.
    async fn session(
        &self,
        http: &Upstream,
        link: &Link,
        revision: Revision,
        key: &SessionKey,
        capabilities: &Map<String, Value>,
    ) -> Result<Arc<PeerSession>, UpstreamError> {
        let begin = self.begin(http, link, revision, capabilities);
        let session = self.sessions.try_get_with(key.clone(), async { begin.await.map(Arc::new) });
        session.await.map_err(|error| (*error).clone())
    }

    /// Hears what a server says outside a request, and passes on what the caller wants to hear. False: the server has
    /// no such stream.
    ///
    /// Errors: [`UpstreamError`].
    pub(super) async fn hear(
        &self,
        http: &Upstream,
        link: &Link,
        heard: &Heard<'_>,
    ) -> Result<bool, UpstreamError> {
        let revision = link.server.revision.ok_or(UpstreamError::Undiscovered)?;
        let (session, mut incoming) = if revision.is_stateless() {
            let session = Arc::new(PeerSession { id: None, revision });
            let mut headers = session.headers();
            headers.insert(METHOD_HEADER, HeaderValue::from_static("subscriptions/listen"));
            let meta =
                json!({ META_VERSION: revision.as_str(), META_CLIENT: server_info(), META_CAPABILITIES: {} });
            let params = json!({ "_meta": meta, "notifications": heard.wanted.to_json() });
            let body = message(Some(&self.next_id()), "subscriptions/listen", Some(&raw(&params)?))?;
            let sent = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.send(http, link, headers, body));
            (session, sent.await.map_err(|_| UpstreamError::Timeout)??)
        } else {
            let session = self.session(http, link, revision, &heard.key, &heard.capabilities).await?;
            for uri in heard.wanted.uris() {
                let id = self.next_id();
                let body = message(Some(&id), "resources/subscribe", Some(&raw(&json!({ "uri": uri }))?))?;
                let asked = async {
                    let mut incoming = self.send(http, link, session.headers(), body).await?;
                    incoming.is_success()?;
                    only_answer(&mut incoming, &id).await
                };
                // What cannot be subscribed to is not told of; the rest is.
                let _subscribed = tokio::time::timeout(HANDSHAKE_TIMEOUT, asked).await;
            }
            let headers = self.headers(http, link, session.headers()).await?;
            let opened =
                http.listen(&link.endpoint, link.client.as_ref(), headers, HANDSHAKE_TIMEOUT).await?;
            if opened.status() == 404 && session.id.is_some() {
                self.sessions.invalidate(&heard.key).await;
                return Ok(true);
            }
            (session, opened)
        };
        if matches!(incoming.status(), 400 | 404 | 405 | 406 | 501) {
            return Ok(false);
        }
        incoming.is_success()?;
        if !incoming.is_event_stream() {
            return Ok(false);
        }
        while let Some(data) = incoming.next().await? {
            let Ok(said) = serde_json::from_slice::<Said<'_>>(&data) else { continue };
            match (said.method.as_deref(), said.id) {
                (Some(method), None) => {
                    if method == "notifications/tools/list_changed" {
                        heard.tools_changed.notify_one();
                    }
                    if let Some(told) = heard.told(method, &data) {
                        heard.listener.tell(told).await;
                    }
                }
                (Some(method), Some(asked)) => {
                    self.relay_request(http, link, heard.listener, &session, method, asked, &data).await;
                }
                _ => {}
            }
        }
        Ok(true)
    }

    /// `initialize` and `notifications/initialized`.
    async fn begin(
        &self,
        http: &Upstream,
        link: &Link,
        revision: Revision,
        capabilities: &Map<String, Value>,
    ) -> Result<PeerSession, UpstreamError> {
        let begun =
            async { self.initialize(http, link, revision, capabilities).await.map(|(session, _)| session) };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, begun).await.map_err(|_| UpstreamError::Timeout)?
    }

    async fn initialize(
        &self,
        http: &Upstream,
        link: &Link,
        revision: Revision,
        capabilities: &Map<String, Value>,
    ) -> Result<(PeerSession, Map<String, Value>), UpstreamError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Initialized {
            protocol_version: String,
            #[serde(default)]
            capabilities: Map<String, Value>,
        }
        let id = self.next_id();
        let params = json!({
            "protocolVersion": revision.as_str(),
            "capabilities": capabilities,
            "clientInfo": server_info(),
        });
        let body = message(Some(&id), "initialize", Some(&raw(&params)?))?;
        let mut incoming = self.send(http, link, HeaderMap::new(), body).await?;
        incoming.is_success()?;
        let session_id = incoming.header(SESSION_HEADER).map(str::to_owned);
        let result = only_answer(&mut incoming, &id).await?.map_err(|error| refused(&error))?;
        let said: Initialized = serde_json::from_str(result.get())
            .map_err(|_| UpstreamError::Garbage("its initialize result"))?;
        let revision = Revision::parse(&said.protocol_version)
            .filter(|revision| !revision.is_stateless())
            .ok_or(UpstreamError::Garbage("it speaks a protocol version that we do not"))?;
        let session = PeerSession { id: session_id, revision };
        let body = message(None, "notifications/initialized", None)?;
        self.send(http, link, session.headers(), body).await?.is_success()?;
        Ok((session, said.capabilities))
    }

    async fn try_once(
        &self,
        http: &Upstream,
        link: &Link,
        ask: &Ask<'_>,
        session: &PeerSession,
    ) -> Result<Tried, UpstreamError> {
        let id = self.next_id();
        let mut headers = session.headers();
        let params = with_meta(ask, session.revision)?;
        if session.revision.is_stateless() {
            headers.extend(
                HeaderValue::from_str(ask.method)
                    .ok()
                    .map(|value| (HeaderName::from_static(METHOD_HEADER), value)),
            );
            let name = ask.name.and_then(encoded);
            headers.extend(name.map(|value| (HeaderName::from_static(NAME_HEADER), value)));
            headers.extend(ask.mirrored.iter().cloned());
        }
        headers.extend(
            HeaderValue::from_str(&ask.trace.parent())
                .ok()
                .map(|value| (HeaderName::from_static("traceparent"), value)),
        );
        let state = ask.trace.state().and_then(|state| HeaderValue::from_str(state).ok());
        headers.extend(state.map(|value| (HeaderName::from_static("tracestate"), value)));
        let body = message(Some(&id), ask.method, params.as_deref())?;
        let told = async {
            let sent = tokio::time::timeout(ask.idle_timeout, self.send(http, link, headers, body));
            let mut incoming = sent.await.map_err(|_| UpstreamError::Timeout)??;
            let status = incoming.status();
            if status == 404 && session.id.is_some() {
                return Ok(Tried::Forgotten(status));
            }
            loop {
                let next = tokio::time::timeout(ask.idle_timeout, incoming.next());
                let Some(data) = next.await.map_err(|_| UpstreamError::Timeout)?? else {
                    incoming.is_success()?;
                    return Err(UpstreamError::Garbage("no answer to our request id"));
                };
                let Ok(said) = serde_json::from_slice::<Said<'_>>(&data) else {
                    incoming.is_success()?;
                    if incoming.is_event_stream() {
                        continue;
                    }
                    return Err(UpstreamError::Garbage("it is not JSON-RPC"));
                };
                match (said.method.as_deref(), said.id, said.result, said.error) {
                    (None, Some(answered), Some(result), None) if is_id(answered, &id) => {
                        incoming.is_success()?;
                        return Ok(Tried::Answered(Ok(result.to_owned())));
                    }
                    // A refusal comes under our id, or under none where the server did not read so far.
                    (None, answered, None, Some(error))
                        if answered
                            .is_none_or(|answered| is_id(answered, &id) || answered.get() == "null") =>
                    {
                        match incoming.is_success() {
                            Err(refused @ UpstreamError::Authentication(_)) => return Err(refused),
                            Err(UpstreamError::Status(status)) if status >= 500 => {
                                return Err(UpstreamError::Status(status));
                            }
                            _ => return Ok(Tried::Answered(Err(error.to_owned()))),
                        }
                    }
                    (Some(method), None, ..) => {
                        let belongs = belongs_to_a_request(method, ask.revision);
                        if belongs && ask.listener.logs.hear(method, &data) {
                            ask.listener.tell(one_line(&data)).await;
                        }
                    }
                    (Some(method), Some(asked), ..) => {
                        self.relay_request(http, link, ask.listener, session, method, asked, &data).await;
                    }
                    // Another request's answer: not for us, and not for our caller.
                    _ => {}
                }
            }
        };
        let outcome = tokio::select! {
            told = told => told,
            () = ask.listener.gone() => Err(UpstreamError::Cancelled),
        };
        if matches!(outcome, Err(UpstreamError::Cancelled | UpstreamError::Timeout))
            && !session.revision.is_stateless()
        {
            // There a broken connection says nothing; this does.
            let params = json!({ "requestId": id, "reason": "the caller does not wait any longer" });
            let body = message(None, "notifications/cancelled", Some(&raw(&params)?))?;
            let told = self.send(http, link, session.headers(), body);
            let _told = tokio::time::timeout(HANDSHAKE_TIMEOUT, told).await;
        }
        outcome
    }

    /// A request of the server's own, made while it serves ours: told to a caller who can answer, else refused.
    #[expect(clippy::too_many_arguments, reason = "one call site, and each is a different thing")]
    async fn relay_request(
        &self,
        http: &Upstream,
        link: &Link,
        listener: &Listener,
        session: &PeerSession,
        method: &str,
        asked: &RawValue,
        data: &[u8],
    ) {
        let needed = match method {
            "sampling/createMessage" => Some("sampling"),
            "elicitation/create" => Some("elicitation"),
            "roots/list" => Some("roots"),
            _ => None,
        };
        let can = |caller: &Session| needed.is_some_and(|needed| caller.capabilities.contains_key(needed));
        let told = match (&listener.session, &listener.sealing, &listener.sender) {
            (Some(caller), Some(sealing), Some(_)) if can(caller) => {
                let reply = ReplyTo {
                    session: caller.nonce.clone(),
                    upstream_id: link.server.upstream_id.clone(),
                    upstream_session: session.id.clone(),
                    revision: session.revision.as_str().to_owned(),
                    id: asked.get().to_owned(),
                };
                reply.seal(sealing).and_then(|id| under_id(data, &id))
            }
            _ => None,
        };
        if let Some(told) = told {
            listener.tell(one_line(told.get().as_bytes())).await;
            return;
        }
        let answer = if method == "ping" {
            json!({ "jsonrpc": "2.0", "id": asked, "result": {} })
        } else {
            let error = json!({ "code": -32601, "message": "Method not found" });
            json!({ "jsonrpc": "2.0", "id": asked, "error": error })
        };
        let _told = self.send(http, link, session.headers(), answer.to_string().into_bytes()).await;
    }

    /// Hands a caller's answer to the server that asked.
    ///
    /// Errors: [`UpstreamError`].
    pub async fn reply(
        &self,
        http: &Upstream,
        link: &Link,
        reply: &ReplyTo,
        answer: &RawValue,
    ) -> Result<(), UpstreamError> {
        let revision = Revision::parse(&reply.revision).ok_or(UpstreamError::Undiscovered)?;
        let session = PeerSession { id: reply.upstream_session.clone(), revision };
        let garbage = |_| UpstreamError::Garbage("the answer");
        let id = RawValue::from_string(reply.id.clone()).map_err(garbage)?;
        let body = jsonrpc::with_member(answer, "id", &id).map_err(garbage)?;
        let sent = self.send(http, link, session.headers(), body.get().as_bytes().to_vec());
        let incoming =
            tokio::time::timeout(HANDSHAKE_TIMEOUT, sent).await.map_err(|_| UpstreamError::Timeout)??;
        incoming.is_success()
    }

    /// Forgets the sessions that belong to a caller's session, and tells their servers where `links` has them.
    pub async fn forget(&self, http: &Upstream, session: &str, links: &[Link]) {
        let own: Vec<(SessionKey, Arc<PeerSession>)> = self
            .sessions
            .iter()
            .filter(|(key, _)| key.session.as_deref() == Some(session))
            .map(|(key, session)| ((*key).clone(), session))
            .collect();
        for (key, session) in own {
            self.sessions.invalidate(&key).await;
            let link = links.iter().find(|link| link.server.upstream_id == key.upstream.0);
            if let (Some(link), Some(_)) = (link, &session.id)
                && let Ok(headers) = self.headers(http, link, session.headers()).await
            {
                http.delete(&link.endpoint, link.client.as_ref(), headers).await;
            }
        }
    }

    /// Looks at a server: which revision, what it offers, which tools.
    ///
    /// Errors: [`UpstreamError`].
    pub async fn discover(&self, http: &Upstream, link: &Link) -> Result<Discovered, UpstreamError> {
        let (session, capabilities) = match self.probe(http, link).await? {
            Some(capabilities) => (PeerSession { id: None, revision: Revision::V2026_07_28 }, capabilities),
            None => {
                // Some servers show a tool only to a client that can do what it asks for; our callers' clients may.
                let everything = everything_a_client_can();
                let begun = self.initialize(http, link, Revision::NEWEST_WITH_SESSIONS, &everything);
                tokio::time::timeout(HANDSHAKE_TIMEOUT, begun).await.map_err(|_| UpstreamError::Timeout)??
            }
        };
        let tools = if capabilities.contains_key("tools") {
            self.list_tools(http, link, &session).await
        } else {
            Ok(Vec::new())
        };
        if session.id.is_some()
            && let Ok(headers) = self.headers(http, link, session.headers()).await
        {
            http.delete(&link.endpoint, link.client.as_ref(), headers).await;
        }
        Ok(Discovered { revision: session.revision, capabilities, tools: tools? })
    }

    /// `server/discover`. Absent for a server that does not speak 2026-07-28.
    async fn probe(&self, http: &Upstream, link: &Link) -> Result<Option<Map<String, Value>>, UpstreamError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Found {
            supported_versions: Vec<String>,
            #[serde(default)]
            capabilities: Map<String, Value>,
        }
        let session = PeerSession { id: None, revision: Revision::V2026_07_28 };
        let found = self.plain(http, link, &session, "server/discover", Map::new()).await;
        match found {
            Ok(Ok(result)) => Ok(serde_json::from_str::<Found>(result.get())
                .ok()
                .filter(|found| {
                    found.supported_versions.iter().any(|version| version == session.revision.as_str())
                })
                .map(|found| found.capabilities)),
            // An older server refuses in one way or another.
            Ok(Err(_))
            | Err(
                UpstreamError::Status(_)
                | UpstreamError::ContentType
                | UpstreamError::Garbage(_)
                | UpstreamError::Timeout,
            ) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn list_tools(
        &self,
        http: &Upstream,
        link: &Link,
        session: &PeerSession,
    ) -> Result<Vec<Box<RawValue>>, UpstreamError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Page {
            tools: Vec<Box<RawValue>>,
            next_cursor: Option<String>,
        }
        let mut tools = Vec::new();
        let mut params = Map::new();
        for _page in 0..PAGES_MAX {
            let listed = self.plain(http, link, session, "tools/list", params).await?;
            let listed = listed.map_err(|error| refused(&error))?;
            let page: Page = serde_json::from_str(listed.get())
                .map_err(|_| UpstreamError::Garbage("its list of tools"))?;
            tools.extend(page.tools);
            if tools.len() > TOOLS_MAX {
                return Err(UpstreamError::Garbage("it has more than 500 tools"));
            }
            match page.next_cursor {
                None => return Ok(tools),
                Some(cursor) => params = Map::from_iter([("cursor".to_owned(), Value::from(cursor))]),
            }
        }
        Err(UpstreamError::Garbage("its list of tools has more than 20 pages"))
    }

    /// A request of our own, of which only the answer counts.
    async fn plain(
        &self,
        http: &Upstream,
        link: &Link,
        session: &PeerSession,
        method: &'static str,
        mut params: Map<String, Value>,
    ) -> Result<Answered, UpstreamError> {
        let id = self.next_id();
        let mut headers = session.headers();
        if session.revision.is_stateless() {
            headers.insert(METHOD_HEADER, HeaderValue::from_static(method));
            let able = everything_a_client_can();
            let meta = json!({ META_VERSION: session.revision.as_str(), META_CLIENT: server_info(), META_CAPABILITIES: able });
            params.insert("_meta".to_owned(), meta);
        }
        let body = message(Some(&id), method, Some(&raw(&Value::Object(params))?))?;
        let asked = async {
            let mut incoming = self.send(http, link, headers, body).await?;
            match incoming.is_success() {
                Ok(()) => only_answer(&mut incoming, &id).await,
                Err(error) => Err(error),
            }
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, asked).await.map_err(|_| UpstreamError::Timeout)?
    }

    async fn send(
        &self,
        http: &Upstream,
        link: &Link,
        headers: HeaderMap,
        body: Vec<u8>,
    ) -> Result<Incoming, UpstreamError> {
        let headers = self.headers(http, link, headers).await?;
        let incoming = http.post(&link.endpoint, link.client.as_ref(), headers, body).await?;
        if incoming.status() == 401 {
            link.auth.forget_token(&self.tokens, &link.server, link.asserted.as_ref()).await;
        }
        Ok(incoming)
    }

    async fn headers(
        &self,
        http: &Upstream,
        link: &Link,
        mut headers: HeaderMap,
    ) -> Result<HeaderMap, UpstreamError> {
        let asserted = link.asserted.as_ref();
        headers.extend(link.auth.header(http, &self.tokens, &link.server, asserted).await?);
        if let Some(word) = asserted.and_then(|asserted| asserted.for_server.as_deref()) {
            let mut word = HeaderValue::from_str(word).map_err(|_| UpstreamError::Credential)?;
            word.set_sensitive(true);
            headers.insert(HeaderName::from_static(CALLER_HEADER), word);
        }
        Ok(headers)
    }

    fn next_id(&self) -> String {
        format!("m{}", self.ids.fetch_add(1, Ordering::Relaxed))
    }
}

/// What clients can do for servers, of what we pass on.
fn everything_a_client_can() -> Map<String, Value> {
    ["elicitation", "roots", "sampling"].into_iter().map(|name| (name.to_owned(), json!({}))).collect()
}

enum Tried {
    Answered(Answered),
    /// The server does not know our session any more.
    Forgotten(u16),
}

impl PeerSession {
    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        // The header came with 2025-06-18; older servers are not troubled with it.
        if self.revision >= Revision::V2025_06_18 {
            headers.insert(VERSION_HEADER, HeaderValue::from_static(self.revision.as_str()));
        }
        let id = self.id.as_deref().and_then(|id| HeaderValue::from_str(id).ok());
        headers.extend(id.map(|id| (HeaderName::from_static(SESSION_HEADER), id)));
        headers
    }
}

/// The parameters with the `_meta` that the server's revision wants: the trace always, the revision where it is
/// named in every request, and not where it is not.
fn with_meta(ask: &Ask<'_>, revision: Revision) -> Result<Option<Box<RawValue>>, UpstreamError> {
    let broken = |_| UpstreamError::Garbage("the parameters");
    let empty = jsonrpc::empty_object();
    let params = ask.params.as_deref().unwrap_or(&empty);
    let known = jsonrpc::members(params)
        .into_iter()
        .find(|(name, _)| name == "_meta")
        .map(|(_, meta)| meta.to_owned());
    let mut meta = jsonrpc::members(known.as_deref().unwrap_or(&empty));
    meta.retain(|(name, _)| !matches!(name.as_str(), "traceparent" | "tracestate" | META_VERSION));
    let parent = raw(&Value::from(ask.trace.parent()))?;
    meta.push(("traceparent".to_owned(), &parent));
    let state = ask.trace.state().map(|state| raw(&Value::from(state))).transpose()?;
    meta.extend(state.as_deref().map(|state| ("tracestate".to_owned(), state)));
    let (version, nothing) = (raw(&Value::from(revision.as_str()))?, jsonrpc::empty_object());
    let client = raw(&server_info())?;
    let level = match ask.listener.logs {
        Logs::From(level) => Some(raw(&Value::from(level.as_str()))?),
        Logs::All | Logs::None => None,
    };
    if revision.is_stateless() {
        let asks_itself = meta.iter().any(|(known, _)| known == META_LOG_LEVEL);
        meta.extend(
            level.as_deref().filter(|_| !asks_itself).map(|level| (META_LOG_LEVEL.to_owned(), level)),
        );
        meta.push((META_VERSION.to_owned(), &version));
        for (name, value) in [(META_CAPABILITIES, &nothing), (META_CLIENT, &client)] {
            if !meta.iter().any(|(known, _)| known == name) {
                meta.push((name.to_owned(), value));
            }
        }
    } else {
        // What a client of 2026-07-28 can do, it cannot do through a session.
        meta.retain(|(name, _)| !matches!(name.as_str(), META_CAPABILITIES | META_CLIENT | META_LOG_LEVEL));
    }
    let meta = jsonrpc::object(&meta).map_err(broken)?;
    jsonrpc::with_member(params, "_meta", &meta).map(Some).map_err(broken)
}

fn raw(value: &Value) -> Result<Box<RawValue>, UpstreamError> {
    to_raw_value(value).map_err(|_| UpstreamError::Garbage("the request"))
}

fn message(id: Option<&str>, method: &str, params: Option<&RawValue>) -> Result<Vec<u8>, UpstreamError> {
    #[derive(serde::Serialize)]
    struct Message<'a> {
        jsonrpc: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<&'a str>,
        method: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        params: Option<&'a RawValue>,
    }
    serde_json::to_vec(&Message { jsonrpc: "2.0", id, method, params })
        .map_err(|_| UpstreamError::Garbage("the request"))
}

/// The answer to the request `id`, the rest unheard.
async fn only_answer(incoming: &mut Incoming, id: &str) -> Result<Answered, UpstreamError> {
    while let Some(data) = incoming.next().await? {
        let Ok(said) = serde_json::from_slice::<Said<'_>>(&data) else { continue };
        match (said.id.is_some_and(|answered| is_id(answered, id)), said.result, said.error) {
            (true, Some(result), None) => return Ok(Ok(result.to_owned())),
            (true, None, Some(error)) => return Ok(Err(error.to_owned())),
            _ => {}
        }
    }
    Err(UpstreamError::Garbage("no answer to our request id"))
}

fn is_id(raw: &RawValue, id: &str) -> bool {
    serde_json::from_str::<String>(raw.get()).is_ok_and(|text| text == id)
}

/// What an error object of a server's says, for our own requests to it.
fn refused(error: &RawValue) -> UpstreamError {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Refusal {
        code: i64,
        message: String,
    }
    let Refusal { code, message } = serde_json::from_str(error.get()).unwrap_or_default();
    UpstreamError::Answered { code, message: jsonrpc::shorten(&message, 512).to_owned() }
}

/// The message under another id.
pub(crate) fn under_id(data: &[u8], id: &str) -> Option<Box<RawValue>> {
    let message: Box<RawValue> = serde_json::from_slice(data).ok()?;
    let id = to_raw_value(id).ok()?;
    jsonrpc::with_member(&message, "id", &id).ok()
}

/// JSON on one line, for an event: a string has no bare line ends, and elsewhere they mean nothing.
#[must_use]
pub fn one_line(json: &[u8]) -> Vec<u8> {
    json.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'\r')).collect()
}

/// The key under which a request under way can be taken back.
#[must_use]
pub fn request_key(session: &Session, id: &Id) -> (String, String) {
    (session.nonce.clone(), id.raw().to_owned())
}
