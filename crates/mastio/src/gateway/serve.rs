//! One HTTP request of an agent: what it asks for, what was decided, and what comes of it.
//!
//! [`serve`] plans every message first, which writes nothing, makes the decisions and the proof's identifier durable in
//! one commit, and only then does what was planned. A plan that was made for a standing that has changed is made again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::HeaderValue;
use axum::http::request::Parts;
use futures_util::future::join_all;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::error::Kind;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::access::has_capability;
use super::definition::sha256_hex;
use super::evidence::Keeping;
use super::jsonrpc::{self, Body, Call, Id, Message, RpcError, ToolCall, code};
use super::listen::{Level, Listening, Logs, Place as StreamPlace, Wanted, server_key};
use super::peer::{Answered, Ask, Link, Listener, SessionKey, request_key};
use super::policy::Rules;
use super::protocol::{
    self, META_SERVER, NotThisRevision, PARAMETER_PREFIX, Revision, SESSION_HEADER, server_info,
};
use super::resume::Reader;
use super::servers::{SERVERS_MAX, Server, Tool};
use super::session::{ReplyTo, Session};
use super::store;
use super::trace::Trace;
use super::upstream::{CALL_TIMEOUT, Credential, Endpoint, Slot, UpstreamError};
use super::{Caller, Gateway, GatewayError, RESOURCES_MAX, bare, canonical, event, set};
use crate::http::context::Context;
use crate::http::error::{ApiError, Problem as _, chain};
use crate::store::group::{Append, AppendError, Kept, OneUse};

/// How often a caller is judged for one request: once more when its standing changed in between.
pub(super) const JUDGED_MAX: usize = 2;
/// How long one of several servers may take to list what it has; a slower one is left out.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages of one server's list that are put together with others'.
const LIST_PAGES_MAX: usize = 10;
/// Bytes of a name or URI in an event.
const TARGET_BYTES_SHOWN_MAX: usize = 256;

/// Requests under way in sessions, by which their callers can take them back.
#[derive(Default)]
pub struct Underway(Mutex<HashMap<(String, String), Arc<Notify>>>);

/// A place in [`Underway`], left when dropped.
struct Place<'a> {
    underway: &'a Underway,
    key: Option<(String, String)>,
}

impl Underway {
    fn enter(&self, key: Option<(String, String)>) -> (Place<'_>, Option<Arc<Notify>>) {
        let notify = key.clone().map(|key| {
            let notify = Arc::new(Notify::new());
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&notify));
            notify
        });
        (Place { underway: self, key }, notify)
    }

    fn cancel(&self, key: &(String, String)) {
        if let Some(notify) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key) {
            notify.notify_one();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(key) = &self.key {
            self.underway.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        }
    }
}

/// A request as it came.
pub(super) struct Asked {
    pub context: Context,
    pub parts: Parts,
    pub body: axum::body::Bytes,
}

/// What goes back for one message.
#[derive(Debug)]
pub(super) enum Answer {
    /// Nothing, and the message was taken up.
    Nothing,
    /// The body was no request, or not one of its revision.
    Malformed(Option<Id>, RpcError),
    /// There is no such method, or no such session.
    Missing(Option<Id>, RpcError),
    /// A result or an error under the request's id.
    Under(Id, Answered),
}

/// What goes back for a whole body.
pub(super) struct Answers {
    pub answers: Vec<Answer>,
    /// Whether they go out as a list.
    pub batch: bool,
    /// Whether the caller is the SDK, cold.
    pub cold: bool,
    /// Whether the caller speaks 2026-07-28, which has HTTP statuses for some errors.
    pub stateless: bool,
    /// The session that was begun.
    pub session_id: Option<String>,
}

/// Who speaks, and how.
pub(super) struct Speaker {
    pub revision: Revision,
    pub session: Option<Session>,
    /// Whether it said that it reads streams.
    pub streams: bool,
    /// Whether it named a revision at all.
    pub cold: bool,
}

/// What a message will lead to, decided before anything is recorded.
struct Plan {
    events: Vec<Event>,
    step: Step,
}

enum Step {
    Answer(Answer),
    /// A session begins with this answer.
    Begin(Answer, String),
    /// A tool of one's own, as the predecessor had them.
    Forward(Box<Forward>),
    /// A request to an MCP server.
    Relay(Box<Relay>),
    /// A list, put together from several servers.
    Gather(Id, Box<Gather>),
    /// An answer to a server's own request.
    Reply(Box<(ReplyTo, Link, Box<RawValue>)>),
    /// A request under way is taken back.
    Cancel((String, String)),
    /// A stream on which the caller is told what changes.
    Listen(Box<Listening>),
}

/// A call of a resource's tool that may go upstream.
struct Forward {
    id: Id,
    tool: String,
    arguments: Box<RawValue>,
    endpoint: Endpoint,
    credential: Credential,
    slot: Slot,
    details: Value,
}

/// A request that may go to an MCP server.
struct Relay {
    id: Id,
    link: Link,
    slot: Slot,
    method: String,
    params: Option<Box<RawValue>>,
    name: Option<String>,
    event_type: Option<EventType>,
    /// What both events of it say.
    details: Value,
    /// The tool's name, for the metrics.
    tool: Option<String>,
    /// What is kept of the call, and its arguments until they are.
    keeping: Option<Keeping>,
    kept: Option<Kept>,
}

struct Gather {
    method: String,
    params: Option<Box<RawValue>>,
    member: &'static str,
    links: Vec<Link>,
}

/// Serves the messages of an authenticated caller.
///
/// Errors: 401 for a replayed proof or a standing that changed twice, 503 when the audit log or the database is away.
pub(super) async fn serve(
    gateway: Arc<Gateway>,
    asked: Asked,
    mut caller: Caller,
    mut listener: Listener,
) -> Result<Answers, ApiError> {
    let mut judged = 1;
    loop {
        let planned = gateway.plan(&asked, &caller).await?;
        let (speaker, plans, batch) = planned;
        let (mut events, mut kept) = (Vec::new(), Vec::new());
        let mut steps = Vec::with_capacity(plans.len());
        for mut plan in plans {
            if let (true, Step::Answer(Answer::Malformed(_, error))) = (plan.events.is_empty(), &plan.step) {
                events.push(refusal(&asked, &caller, error));
            }
            events.extend(plan.events);
            if let Step::Relay(relay) = &mut plan.step {
                kept.extend(relay.kept.take());
            }
            steps.push(plan.step);
        }
        let append = Append {
            events,
            kept,
            one_use: caller.one_use.clone(),
            access_token: caller.access_token.clone(),
            epoch: Some(caller.epoch),
        };
        match gateway.journal.append(append).await {
            Ok(_sequence) => {
                listener.hang_up_cancels = speaker.revision.is_stateless();
                if !speaker.streams || speaker.cold {
                    listener.sender = None;
                }
                listener.session = speaker.session.clone();
                listener.sealing = Some(Arc::clone(&gateway.sealing));
                let mut answers = Answers {
                    answers: Vec::with_capacity(steps.len()),
                    batch,
                    cold: speaker.cold,
                    stateless: speaker.revision.is_stateless(),
                    session_id: None,
                };
                for step in steps {
                    let answer = match step {
                        Step::Begin(answer, id) => {
                            answers.session_id = Some(id);
                            answer
                        }
                        step => gateway.take(&asked, &caller, &speaker, step, &mut listener).await?,
                    };
                    answers.answers.push(answer);
                }
                return Ok(answers);
            }
            Err(AppendError::Stale) if judged < JUDGED_MAX => {
                judged += 1;
                gateway.authenticate.refresh().await?;
                caller = gateway.authenticate.caller(&asked.context, &asked.parts).await?;
            }
            Err(error) => return Err(gateway.refused(&asked.context, &asked.parts, error).await),
        }
    }
}

/// Ends a caller's session. False: it was none of the caller's.
///
/// Errors: as [`serve`].
pub(super) async fn end_session(
    gateway: &Gateway,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
) -> Result<bool, ApiError> {
    let id = parts.headers.get(SESSION_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let session = Session::open(id, caller, context.now.seconds(), &gateway.sealing);
    let (event_type, ended) = match &session {
        Some(session) => (EventType::McpSessionEnded, Some(session)),
        None => (EventType::McpSessionRefused, None),
    };
    let mut one_use = caller.one_use.clone();
    one_use.extend(ended.map(|session| OneUse { id: session.ended_id(), expires_at: session.expires_at() }));
    let details = json!({ "request_id": context.request_id });
    let events = vec![event(event_type, &caller.agent_id, details)];
    let append = Append {
        events,
        one_use,
        access_token: caller.access_token.clone(),
        epoch: Some(caller.epoch),
        ..Append::default()
    };
    if let Err(error) = gateway.journal.append(append).await {
        return Err(gateway.refused(context, parts, error).await);
    }
    if let Some(session) = &session {
        gateway.resumable.forget(&session.nonce);
        gateway.end_peer_sessions(caller, &session.nonce).await?;
    }
    Ok(session.is_some())
}

/// Opens the GET stream of a session: admits it, and leaves the rest to [`follow`]. Absent: it is none of the caller's.
///
/// Errors: as [`serve`], and 409 where the session has a stream already, 429 where there are too many.
pub(super) async fn open_stream(
    gateway: &Arc<Gateway>,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
) -> Result<Option<(Session, StreamPlace)>, ApiError> {
    let session = own_session(gateway, context, parts, caller).await?;
    let place = match &session {
        Some(session) => Some(gateway.stream_place(caller, Some(session))?),
        None => None,
    };
    admit(gateway, context, parts, caller, session.as_ref()).await?;
    Ok(session.zip(place))
}

/// Takes over a stream that has lost its connection, after the event that the request names. Absent: the session is none
/// of the caller's.
///
/// Errors: as [`serve`], and 400 for an event that no stream of the session has any more.
pub(super) async fn resume_stream(
    gateway: &Arc<Gateway>,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
    last_event_id: &HeaderValue,
) -> Result<Option<Reader>, ApiError> {
    let session = own_session(gateway, context, parts, caller).await?;
    admit(gateway, context, parts, caller, session.as_ref()).await?;
    let Some(session) = session else { return Ok(None) };
    let last_event_id = last_event_id.to_str().unwrap_or_default();
    let reader = gateway.resumable.resume(&session, last_event_id);
    reader.map(Some).ok_or_else(|| GatewayError::UnknownEvent.into())
}

/// The session that the request names, if it is the caller's and not over.
async fn own_session(
    gateway: &Gateway,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
) -> Result<Option<Session>, GatewayError> {
    let id = parts.headers.get(SESSION_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let Some(session) = Session::open(id, caller, context.now.seconds(), &gateway.sealing) else {
        return Ok(None);
    };
    let ended = store::is_used_up(&mut gateway.store.read().await?, &session.ended_id()).await?;
    Ok((!ended).then_some(session))
}

/// Uses up the proof of a request for a stream, and records one for a session that is none of the caller's.
async fn admit(
    gateway: &Gateway,
    context: &Context,
    parts: &Parts,
    caller: &Caller,
    session: Option<&Session>,
) -> Result<(), ApiError> {
    let refused =
        || event(EventType::McpSessionRefused, &caller.agent_id, json!({ "request_id": context.request_id }));
    let append = Append {
        events: if session.is_some() { Vec::new() } else { vec![refused()] },
        one_use: caller.one_use.clone(),
        access_token: caller.access_token.clone(),
        epoch: Some(caller.epoch),
        ..Append::default()
    };
    match gateway.journal.append(append).await {
        Ok(_) => Ok(()),
        Err(error) => Err(gateway.refused(context, parts, error).await),
    }
}

/// Tells a session on its GET stream what changes, until the stream ends.
///
/// Errors: the database.
pub(super) async fn follow(
    gateway: Arc<Gateway>,
    asked: Asked,
    caller: Caller,
    (session, place): (Session, StreamPlace),
    mut listener: Listener,
) -> Result<Answers, ApiError> {
    let speaker =
        Speaker { revision: session.revision(), session: Some(session.clone()), streams: true, cold: false };
    listener.logs = gateway.streams.logs(&session).await;
    listener.session = Some(session);
    listener.sealing = Some(Arc::clone(&gateway.sealing));
    let listening = Gateway::session_stream(place);
    gateway.listen(&asked, &caller, &speaker, listening, &listener).await?;
    Ok(Answers { answers: Vec::new(), batch: false, cold: false, stateless: false, session_id: None })
}

impl Plan {
    fn answer(answer: Answer) -> Self {
        Self { events: Vec::new(), step: Step::Answer(answer) }
    }

    fn result(id: &Id, result: &Value) -> Result<Self, GatewayError> {
        Ok(Self::answer(Answer::Under(id.clone(), Ok(to_raw_value(result)?))))
    }

    fn error(id: &Id, error: &RpcError) -> Result<Self, GatewayError> {
        Ok(Self::answer(Answer::Under(id.clone(), Err(to_raw_value(error)?))))
    }

    fn step(step: Step) -> Self {
        Self { events: Vec::new(), step }
    }
}

impl Gateway {
    /// What a caller is told whom the commit refused.
    async fn refused(&self, context: &Context, parts: &Parts, error: AppendError) -> ApiError {
        let error = GatewayError::from(error);
        let (kind, reason) = (error.kind(), error.reason());
        let error = ApiError::from(error);
        if kind == Kind::Unauthenticated {
            return self.authenticate.refused(context, parts, reason, error).await;
        }
        error
    }

    /// Reads the body and decides about each of its messages.
    async fn plan(
        self: &Arc<Self>,
        asked: &Asked,
        caller: &Caller,
    ) -> Result<(Speaker, Vec<Plan>, bool), GatewayError> {
        let speaker = match self.speaker(asked, caller).await? {
            Ok(speaker) => speaker,
            Err(plan) => {
                let cold =
                    Speaker { revision: Revision::V2024_11_05, session: None, streams: false, cold: true };
                return Ok((cold, vec![plan], false));
            }
        };
        let (messages, batch) = match jsonrpc::read(&asked.body, speaker.revision.has_batches()) {
            Body::One(message) => (vec![message], false),
            Body::Batch(messages) => (messages, true),
        };
        // A body may speak 2026-07-28 by its `_meta` alone; then its headers are missing, and that is said.
        let mut speaker = speaker;
        if let (false, Some(Message::Request { id, call })) = (batch, messages.first()) {
            match protocol::is_stateless(Some(speaker.revision), call.params.as_deref()) {
                Ok(true) => {
                    speaker = Speaker {
                        revision: Revision::V2026_07_28,
                        session: None,
                        streams: speaker.streams,
                        cold: false,
                    };
                    if let Err(NotThisRevision(error)) = protocol::check_mirrored(&asked.parts.headers, call)
                    {
                        let refused = Answer::Malformed(Some(id.clone()), error);
                        return Ok((speaker, vec![Plan::answer(refused)], false));
                    }
                }
                Ok(false) => {}
                Err(NotThisRevision(error)) => {
                    let refused = Answer::Malformed(Some(id.clone()), error);
                    return Ok((speaker, vec![Plan::answer(refused)], false));
                }
            }
        }
        let mut plans = Vec::with_capacity(messages.len());
        for message in messages {
            plans.push(self.plan_message(asked, caller, &speaker, message).await?);
        }
        Ok((speaker, plans, batch))
    }

    /// Ends the sessions with servers that belong to a session of the caller's.
    pub(super) async fn end_peer_sessions(&self, caller: &Caller, session: &str) -> Result<(), GatewayError> {
        let mut tx = self.store.read().await?;
        let servers = store::bound_servers(&mut tx, &self.holder(caller), SERVERS_MAX).await?;
        drop(tx);
        let mut links = Vec::with_capacity(servers.len());
        for server in servers {
            links.extend(self.link_unrecorded(caller, &Arc::new(server)).await);
        }
        self.peers.forget(&self.upstream, session, &links).await;
        Ok(())
    }

    /// Who speaks, by the headers. Inside, the refusal of a revision or session that is none.
    async fn speaker(&self, asked: &Asked, caller: &Caller) -> Result<Result<Speaker, Plan>, GatewayError> {
        let headers = &asked.parts.headers;
        let streams = protocol::reads_streams(headers);
        let named = match protocol::named_revision(headers) {
            Ok(named) => named,
            Err(NotThisRevision(error)) => {
                return Ok(Err(Plan::answer(Answer::Malformed(jsonrpc::peek_id(&asked.body), error))));
            }
        };
        if named.is_some_and(Revision::is_stateless) {
            return Ok(Ok(Speaker { revision: Revision::V2026_07_28, session: None, streams, cold: false }));
        }
        let Some(id) = headers.get(SESSION_HEADER) else {
            let cold = named.is_none();
            let revision = named.unwrap_or(Revision::V2024_11_05);
            return Ok(Ok(Speaker { revision, session: None, streams, cold }));
        };
        let id = id.to_str().unwrap_or_default();
        let now = asked.context.now.seconds();
        let session = Session::open(id, caller, now, &self.sealing);
        let ended = match &session {
            Some(session) => store::is_used_up(&mut self.store.read().await?, &session.ended_id()).await?,
            None => true,
        };
        match session.filter(|_| !ended) {
            Some(session) => {
                Ok(Ok(Speaker { revision: session.revision(), session: Some(session), streams, cold: false }))
            }
            None => {
                let error =
                    RpcError::new(code::INVALID_REQUEST, "Session not found: begin one by initialize");
                let details = json!({ "request_id": asked.context.request_id });
                Ok(Err(Plan {
                    events: vec![event(EventType::McpSessionRefused, &caller.agent_id, details)],
                    step: Step::Answer(Answer::Missing(jsonrpc::peek_id(&asked.body), error)),
                }))
            }
        }
    }

    async fn plan_message(
        self: &Arc<Self>,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        message: Message,
    ) -> Result<Plan, GatewayError> {
        let (id, call) = match message {
            Message::Malformed(error) => return Ok(Plan::answer(Answer::Malformed(None, error))),
            Message::Notification(call) => return Ok(Self::plan_notification(speaker, &call)),
            Message::Response { id, raw } => return self.plan_reply(caller, speaker, &id, raw).await,
            Message::Request { id, call } => (id, call),
        };
        let legacy = !speaker.revision.is_stateless();
        match call.method.as_str() {
            "initialize" if legacy => self.plan_initialize(asked, caller, speaker, &id, &call).await,
            "ping" if legacy => Ok(Plan::answer(Answer::Under(id, Ok(jsonrpc::empty_object())))),
            "server/discover" if !legacy => self.plan_discover(caller, &id).await,
            "tools/list" => {
                let tools = self.list_tools(caller).await?;
                let list = to_raw_value(&json!({ "tools": tools }))?;
                Ok(Plan::answer(Answer::Under(id, Ok(finished(list, speaker.revision, true, true)?))))
            }
            "tools/call" => match jsonrpc::tool_call(call.params.as_deref()) {
                Ok(tool_call) => self.plan_call(asked, caller, speaker, &id, &tool_call).await,
                Err(error) => Plan::error(&id, &error),
            },
            _ if speaker.cold => Plan::error(&id, &RpcError::unknown_method(&call.method)),
            "resources/list" => {
                self.plan_list(asked, caller, speaker, id, call, "resources", "resources").await
            }
            "resources/templates/list" => {
                self.plan_list(asked, caller, speaker, id, call, "resources", "resourceTemplates").await
            }
            "prompts/list" => self.plan_list(asked, caller, speaker, id, call, "prompts", "prompts").await,
            "subscriptions/listen" if !legacy => self.plan_listen(caller, speaker, id, &call),
            "logging/setLevel" if legacy => self.plan_set_level(asked, caller, speaker, id, call).await,
            // Each belongs to the other revisions.
            "initialize" | "ping" | "logging/setLevel" | "resources/subscribe" | "resources/unsubscribe"
                if !legacy =>
            {
                Ok(unknown_method(speaker, id, &call.method)?)
            }
            "server/discover" | "subscriptions/listen" => Ok(unknown_method(speaker, id, &call.method)?),
            _ => self.plan_other(asked, caller, speaker, id, call).await,
        }
    }

    fn plan_listen(
        self: &Arc<Self>,
        caller: &Caller,
        speaker: &Speaker,
        id: Id,
        call: &Call,
    ) -> Result<Plan, GatewayError> {
        if !speaker.streams {
            let error = RpcError::new(
                code::INVALID_REQUEST,
                "Invalid Request: what changes is told on a stream: accept text/event-stream",
            );
            return Ok(Plan::answer(Answer::Malformed(Some(id), error)));
        }
        match Wanted::read(call.params.as_deref()) {
            Ok(wanted) => {
                let place = self.stream_place(caller, None)?;
                Ok(Plan::step(Step::Listen(Box::new(Listening { id: Some(id), wanted, _place: place }))))
            }
            Err(error) => Plan::error(&id, &error),
        }
    }

    /// Which log messages a session hears is ours to keep; servers that keep it too are told.
    async fn plan_set_level(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: Id,
        call: Call,
    ) -> Result<Plan, GatewayError> {
        #[derive(Deserialize)]
        struct Wanted {
            level: String,
        }
        let servers = self.bound_servers(caller).await?;
        let mut logging: Vec<Server> =
            servers.into_iter().filter(|server| server.capabilities.contains_key("logging")).collect();
        if logging.is_empty() {
            return unknown_method(speaker, id, &call.method);
        }
        let wanted =
            call.params.as_deref().and_then(|params| serde_json::from_str::<Wanted>(params.get()).ok());
        let Some(level) = wanted.and_then(|wanted| Level::parse(&wanted.level)) else {
            let error = RpcError::new(code::INVALID_PARAMS, "Invalid params: level is no log level");
            return Plan::error(&id, &error);
        };
        if let Some(session) = &speaker.session {
            self.streams.set_level(session, level).await;
        }
        logging.retain(|server| !server.revision.is_some_and(Revision::is_stateless));
        let links = self.links_for(caller, logging).await;
        match <[Link; 1]>::try_from(links) {
            Ok([link]) => {
                self.plan_relay(asked, id, call, link, None, Some((caller, EventType::McpRequestForwarded)))
            }
            Err(links) => {
                // To whom is not said, so to all; who does not answer stays as it is.
                let gather = Gather { method: call.method, params: call.params, member: "", links };
                Ok(Plan::step(Step::Gather(id, Box::new(gather))))
            }
        }
    }

    fn plan_notification(speaker: &Speaker, call: &Call) -> Plan {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Cancelled {
            request_id: Box<RawValue>,
        }
        if let (Some(session), "notifications/cancelled", Some(params)) =
            (&speaker.session, call.method.as_str(), &call.params)
            && let Ok(cancelled) = serde_json::from_str::<Cancelled>(params.get())
        {
            return Plan::step(Step::Cancel((session.nonce.clone(), cancelled.request_id.get().to_owned())));
        }
        Plan::answer(Answer::Nothing)
    }

    async fn plan_reply(
        &self,
        caller: &Caller,
        speaker: &Speaker,
        id: &str,
        raw: Box<RawValue>,
    ) -> Result<Plan, GatewayError> {
        let reply = speaker.session.as_ref().and_then(|session| ReplyTo::open(id, session, &self.sealing));
        if let Some(reply) = reply
            && let Some(server) = store::server(&mut self.store.read().await?, &reply.upstream_id).await?
            && let Ok(link) = self.link_for(caller, &Arc::new(server)).await
        {
            return Ok(Plan::step(Step::Reply(Box::new((reply, link, raw)))));
        }
        let error = RpcError::new(code::INVALID_REQUEST, "Invalid Request: nothing was asked under this id");
        Ok(Plan::answer(Answer::Malformed(None, error)))
    }

    async fn plan_initialize(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: &Id,
        call: &Call,
    ) -> Result<Plan, GatewayError> {
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "camelCase", default)]
        struct Wanted {
            protocol_version: Option<String>,
            capabilities: Value,
        }
        let wanted: Wanted = call
            .params
            .as_deref()
            .and_then(|params| serde_json::from_str(params.get()).ok())
            .unwrap_or_default();
        let version = wanted.protocol_version.as_deref();
        let known = version.and_then(Revision::parse).filter(|revision| !revision.is_stateless());
        if !speaker.streams {
            // The SDK's form: no session, and plain JSON.
            return Plan::result(
                id,
                &json!({
                    "protocolVersion": known.unwrap_or(Revision::V2024_11_05).as_str(),
                    "capabilities": { "tools": {} },
                    "serverInfo": { "name": "cullis-proxy", "version": "0.1.0" },
                }),
            );
        }
        let revision = known.unwrap_or(Revision::NEWEST_WITH_SESSIONS);
        let now = asked.context.now.seconds();
        let session = Session::begin(caller, revision, &wanted.capabilities, now, &self.entropy);
        let session_id = session.id(&self.sealing).ok_or(GatewayError::Stopped)?;
        let result = to_raw_value(&json!({
            "protocolVersion": revision.as_str(),
            "capabilities": self.capabilities(caller).await?,
            "serverInfo": server_info(),
        }))?;
        Ok(Plan::step(Step::Begin(Answer::Under(id.clone(), Ok(result)), session_id)))
    }

    async fn plan_discover(&self, caller: &Caller, id: &Id) -> Result<Plan, GatewayError> {
        let supported: Vec<&str> = Revision::ALL.into_iter().map(Revision::as_str).collect();
        Plan::result(
            id,
            &json!({
                "resultType": "complete",
                "supportedVersions": supported,
                "capabilities": self.capabilities(caller).await?,
                "serverInfo": server_info(),
                "ttlMs": 0,
                "cacheScope": "private",
                "_meta": { META_SERVER: server_info() },
            }),
        )
    }

    /// What the caller's servers offer, of what we pass on.
    async fn capabilities(&self, caller: &Caller) -> Result<Map<String, Value>, GatewayError> {
        let mut capabilities = Map::from_iter([("tools".to_owned(), json!({ "listChanged": true }))]);
        for server in self.bound_servers(caller).await? {
            for name in ["resources", "prompts", "completions", "logging"] {
                let Some(offered) = server.capabilities.get(name) else { continue };
                let ours = capabilities.entry(name).or_insert_with(|| match name {
                    "resources" | "prompts" => json!({ "listChanged": true }),
                    _ => json!({}),
                });
                if let (Some(ours), true) = (ours.as_object_mut(), offered["subscribe"] == true) {
                    ours.insert("subscribe".to_owned(), Value::Bool(true));
                }
            }
        }
        Ok(capabilities)
    }

    /// The servers that the caller is bound to as a whole and has the capability for.
    pub(super) async fn bound_servers(&self, caller: &Caller) -> Result<Vec<Server>, GatewayError> {
        let mut tx = self.store.read().await?;
        let mut servers = store::bound_servers(&mut tx, &self.holder(caller), SERVERS_MAX).await?;
        servers.retain(|server| has_capability(caller, server.required_capability.as_deref()).is_ok());
        Ok(servers)
    }

    /// The tools that the caller may call, each as registered or as approved, by name.
    pub(super) async fn list_tools(&self, caller: &Caller) -> Result<Vec<Box<RawValue>>, GatewayError> {
        #[derive(serde::Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Listed {
            name: String,
            description: String,
            input_schema: Box<RawValue>,
        }
        let mut tx = self.store.read().await?;
        let holder = self.holder(caller);
        let bound = store::bound_tools(&mut tx, &self.org_id, &holder, RESOURCES_MAX).await?;
        let approved = store::bound_server_tools(&mut tx, &holder, RESOURCES_MAX).await?;
        drop(tx);
        let rules = self.rules(Some(caller.epoch)).await?;
        let mut tools = Vec::with_capacity(bound.len() + approved.len());
        for tool in bound {
            if has_capability(caller, tool.required_capability.as_deref()).is_err()
                || !self.may_ever(caller, &tool.name, "", &rules).await?
            {
                continue;
            }
            let input_schema = tool
                .input_schema
                .and_then(|schema| RawValue::from_string(schema).ok())
                .unwrap_or_else(any_object_schema);
            let name = tool.name;
            let listed = Listed {
                name: name.clone(),
                description: tool.description.unwrap_or_default(),
                input_schema,
            };
            tools.push((name, to_raw_value(&listed)?));
        }
        for (tool, server, server_capability) in approved {
            let may = has_capability(caller, tool.required_capability.as_deref()).is_ok()
                && has_capability(caller, server_capability.as_deref()).is_ok()
                && self.may_ever(caller, &tool.name, &server, &rules).await?;
            if let (true, true, Some(definition)) = (may, tool.is_offered(), tool.definition) {
                let definition = RawValue::from_string(definition)?;
                let name = to_raw_value(&tool.name)?;
                tools.push((tool.name, jsonrpc::with_member(&definition, "name", &name)?));
            }
        }
        tools.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(tools.into_iter().map(|(_, tool)| tool).collect())
    }

    async fn plan_call(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: &Id,
        call: &ToolCall,
    ) -> Result<Plan, GatewayError> {
        let holder = self.holder(caller);
        let mut tx = self.store.read().await?;
        let resource = store::tool(&mut tx, &self.org_id, &holder, &call.name).await?;
        let approved = match &resource {
            Some(_) => None,
            None => store::offered_tool(&mut tx, &call.name).await?,
        };
        let bound = match &approved {
            Some((tool, _)) => store::is_bound_to_either(&mut tx, &holder, tool).await?,
            None => false,
        };
        drop(tx);
        let trace = self.trace(asked, Some(&call.params));
        let mut details = json!({
            "tool": call.name,
            "resource_id": resource.as_ref().map(|tool| tool.resource_id.clone()),
            "request_id": asked.context.request_id,
            "trace_id": trace.trace_id(),
            "arguments_digest": sha256_hex(call.arguments.get().as_bytes()),
        });
        if let (Some(details), Some((tool, _))) = (details.as_object_mut(), &approved) {
            details.insert("resource_id".to_owned(), json!(tool.tool_id));
            details.insert("upstream_id".to_owned(), json!(tool.upstream_id));
            details.insert("definition_digest".to_owned(), json!(tool.definition_digest));
        }
        let rules = self.rules(Some(caller.epoch)).await?;
        let step = match approved {
            Some((tool, server)) => {
                let of = (tool, server, bound);
                self.plan_approved(asked, caller, id, call, of, &rules, &mut details).await
            }
            None => match self.plan_resource(caller, call, resource, &rules, &mut details).await {
                Ok(tool) => self
                    .reach(&tool)
                    .map(|(endpoint, credential, slot)| {
                        Step::Forward(Box::new(Forward {
                            id: id.clone(),
                            tool: call.name.clone(),
                            arguments: call.arguments.clone(),
                            endpoint,
                            credential,
                            slot,
                            details: details.clone(),
                        }))
                    })
                    .map_err(GatewayError::Upstream),
                Err(denied) => Err(denied),
            },
        };
        let error = match step {
            Ok(step) => {
                set(&mut details, "decision", "allowed");
                return Ok(Plan {
                    events: vec![event(EventType::McpToolCalled, &caller.agent_id, details)],
                    step,
                });
            }
            Err(error) => error,
        };
        if let GatewayError::Upstream(_) = error {
            // Allowed, but there is nothing to wait for: decision and outcome are one event.
            set(&mut details, "decision", "allowed");
            set(&mut details, "outcome", "error");
        } else {
            set(&mut details, "decision", "denied");
        }
        set(&mut details, "reason", error.reason());
        let Some(rpc) = error.as_rpc() else { return Err(error) };
        self.metrics.mcp_call("", known_tool(&error, &call.name), error.reason(), Duration::ZERO);
        let answer = match &error {
            // Since 2025-11-25 what is wrong with the arguments is told to the model, which can mend them.
            GatewayError::Arguments(_) if speaker.revision >= Revision::V2025_11_25 => {
                let text = json!({ "content": [{ "type": "text", "text": rpc.message }], "isError": true });
                let result = finished(to_raw_value(&text)?, speaker.revision, false, true)?;
                Answer::Under(id.clone(), Ok(result))
            }
            GatewayError::HeaderMismatch(mismatch) => Answer::Malformed(Some(id.clone()), mismatch.clone()),
            _ => Answer::Under(id.clone(), Err(to_raw_value(&rpc)?)),
        };
        Ok(Plan {
            events: vec![event(EventType::McpToolCalled, &caller.agent_id, details)],
            step: Step::Answer(answer),
        })
    }

    #[expect(clippy::too_many_arguments, reason = "one call site, and each is a different thing")]
    async fn plan_approved(
        &self,
        asked: &Asked,
        caller: &Caller,
        id: &Id,
        call: &ToolCall,
        (tool, server, bound): (Tool, Server, bool),
        rules: &Rules,
        details: &mut Value,
    ) -> Result<Step, GatewayError> {
        let of = (&tool, &server, bound);
        let (verdict, schema, arguments) =
            self.judge_tool(caller, &call.name, Some(&call.arguments), of, rules).await?;
        self.settle(caller, &tool.name, verdict, details)?;
        let per_minute = tool.calls_per_minute.and_then(|calls| u32::try_from(calls).ok()).unwrap_or(0);
        let limited = format!("{} {}", tool.tool_id, caller.agent_id);
        if !self.tool_limits.admit_at(&limited, per_minute, asked.context.now) {
            return Err(GatewayError::TooOften(tool.name.clone()));
        }
        if protocol::named_revision(&asked.parts.headers)
            .is_ok_and(|named| named.is_some_and(Revision::is_stateless))
        {
            let arguments = arguments.unwrap_or_default();
            protocol::check_parameters(&asked.parts.headers, &schema.value, &arguments)
                .map_err(|NotThisRevision(error)| GatewayError::HeaderMismatch(error))?;
        }
        let server = Arc::new(server);
        let link = self.link_for(caller, &server).await?;
        self.peers.admit(&server.upstream_id)?;
        let slot = self.server_slot(&server)?;
        let keeping = self.keeping(&tool, caller, &asked.context);
        let kept = match &keeping {
            Some(keeping) => {
                set(details, "evidence_id", &keeping.evidence_id);
                self.sealed(keeping, "arguments", &call.arguments)?
            }
            None => None,
        };
        let params = if tool.name == tool.upstream_name {
            call.params.clone()
        } else {
            jsonrpc::with_member(&call.params, "name", &to_raw_value(&tool.upstream_name)?)?
        };
        Ok(Step::Relay(Box::new(Relay {
            id: id.clone(),
            link,
            slot,
            method: "tools/call".to_owned(),
            params: Some(params),
            name: Some(tool.upstream_name),
            event_type: Some(EventType::McpToolCalled),
            details: details.clone(),
            tool: Some(tool.name),
            keeping,
            kept,
        })))
    }

    async fn plan_resource(
        &self,
        caller: &Caller,
        call: &ToolCall,
        found: Option<store::Tool>,
        rules: &Rules,
        details: &mut Value,
    ) -> Result<store::Tool, GatewayError> {
        let judged = self.judge_resource(caller, &call.name, Some(&call.arguments), found, rules).await;
        let (verdict, tool) = judged?;
        self.settle(caller, &call.name, verdict, details)?;
        Ok(tool)
    }

    fn server_slot(&self, server: &Server) -> Result<Slot, UpstreamError> {
        let calls_max = usize::try_from(server.calls_max).unwrap_or(1);
        self.upstream.slot_of(&format!("{}:{calls_max}", server.upstream_id), calls_max)
    }

    /// Everything about a resource's call that can fail without waiting.
    fn reach(&self, tool: &store::Tool) -> Result<(Endpoint, Credential, Slot), UpstreamError> {
        let endpoint = self.upstream.endpoint(&tool.endpoint_url, &tool.allowed_domains)?;
        let credential = Credential::parse(&tool.auth_type, tool.auth_secret_ref.as_deref())
            .map_err(|_| UpstreamError::Credential)?;
        let slot = self.upstream.slot(&endpoint)?;
        Ok((endpoint, credential, slot))
    }

    /// A list of one server goes through as it is; of several it is put together.
    #[expect(clippy::too_many_arguments, reason = "three lists, told apart by two words")]
    async fn plan_list(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: Id,
        call: Call,
        capability: &str,
        member: &'static str,
    ) -> Result<Plan, GatewayError> {
        let mut servers = self.bound_servers(caller).await?;
        servers.retain(|server| server.capabilities.contains_key(capability));
        if servers.is_empty() {
            let list = to_raw_value(&json!({ member: [] }))?;
            return Ok(Plan::answer(Answer::Under(id, Ok(finished(list, speaker.revision, true, true)?))));
        }
        servers.retain(|server| self.peers.admit(&server.upstream_id).is_ok());
        let links = self.links_for(caller, servers).await;
        match <[Link; 1]>::try_from(links) {
            Ok([link]) => self.plan_relay(asked, id, call, link, None, None),
            Err(links) => {
                let gather = Gather { method: call.method, params: None, member, links };
                Ok(Plan::step(Step::Gather(id, Box::new(gather))))
            }
        }
    }

    /// Those of the servers that can be spoken to.
    async fn links_for(&self, caller: &Caller, servers: Vec<Server>) -> Vec<Link> {
        let mut links = Vec::with_capacity(servers.len());
        for server in servers {
            links.extend(self.link_for(caller, &Arc::new(server)).await);
        }
        links
    }

    /// Anything else: for the one server of the caller's whom it can concern.
    async fn plan_other(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: Id,
        call: Call,
    ) -> Result<Plan, GatewayError> {
        let (capability, target) = target(&call);
        let mut servers = self.bound_servers(caller).await?;
        if let Some(capability) = capability {
            servers.retain(|server| server.capabilities.contains_key(capability));
        }
        let mut links = self.links_for(caller, servers).await;
        if links.len() > 1 {
            let Some((target, capability)) = target.as_deref().zip(capability) else {
                return unknown_method(speaker, id, &call.method);
            };
            links = self.owners(asked, caller, speaker, links, capability, target).await;
        }
        match links.into_iter().next() {
            Some(link) => {
                self.plan_relay(asked, id, call, link, target, Some((caller, EventType::McpRequestForwarded)))
            }
            None if capability.is_none() || target.is_none() => {
                Ok(unknown_method(speaker, id, &call.method)?)
            }
            None => {
                let code = match call.method.as_str() {
                    // Until 2025-11-25 an unknown resource had a code of its own.
                    "resources/read" if !speaker.revision.is_stateless() => -32002,
                    _ => code::INVALID_PARAMS,
                };
                let target = target.unwrap_or_default();
                let shown = jsonrpc::shorten(&target, TARGET_BYTES_SHOWN_MAX);
                Plan::error(
                    &id,
                    &RpcError::new(code, format!("Not found: {shown}")).with(json!({ "uri": shown })),
                )
            }
        }
    }

    /// Those of `links` whose server has the resource or prompt `target`.
    pub(super) async fn owners(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        links: Vec<Link>,
        capability: &str,
        target: &str,
    ) -> Vec<Link> {
        let lists: &[(&str, &str, &str)] = if capability == "prompts" {
            &[("prompts/list", "prompts", "name")]
        } else {
            &[
                ("resources/list", "resources", "uri"),
                ("resources/templates/list", "resourceTemplates", "uriTemplate"),
            ]
        };
        let trace = self.trace(asked, None);
        let asked_all = links.into_iter().map(|link| async {
            for (method, member, key) in lists {
                let items = self.pages(&link, caller, speaker, method, member, &trace).await;
                let has = |item: &RawValue| {
                    let found = jsonrpc::members(item)
                        .into_iter()
                        .find(|(name, _)| name == key)
                        .and_then(|(_, value)| serde_json::from_str::<String>(value.get()).ok());
                    found.is_some_and(|found| match found.split_once('{') {
                        // A template stands for whatever begins as it does.
                        Some((prefix, _)) if *key == "uriTemplate" => {
                            !prefix.is_empty() && target.starts_with(prefix)
                        }
                        _ => found == target,
                    })
                };
                if items.iter().any(|item| has(item)) {
                    return Some(link);
                }
            }
            None
        });
        join_all(asked_all).await.into_iter().flatten().collect()
    }

    fn plan_relay(
        &self,
        asked: &Asked,
        id: Id,
        call: Call,
        link: Link,
        target: Option<String>,
        audited: Option<(&Caller, EventType)>,
    ) -> Result<Plan, GatewayError> {
        let admitted =
            self.peers.admit(&link.server.upstream_id).and_then(|()| self.server_slot(&link.server));
        let mut details = json!({
            "method": jsonrpc::shorten(&call.method, jsonrpc::METHOD_BYTES_SHOWN_MAX),
            "target": target.as_deref().map(|target| jsonrpc::shorten(target, TARGET_BYTES_SHOWN_MAX)),
            "upstream_id": link.server.upstream_id,
            "request_id": asked.context.request_id,
            "trace_id": self.trace(asked, call.params.as_deref()).trace_id(),
        });
        let slot = match admitted {
            Ok(slot) => slot,
            Err(error) => return Plan::error(&id, &RpcError::new(error.code(), error.to_string())),
        };
        let relay = Relay {
            id,
            link,
            slot,
            method: call.method,
            params: call.params,
            name: target,
            event_type: audited.map(|(_, event_type)| event_type),
            details: details.clone(),
            tool: None,
            keeping: None,
            kept: None,
        };
        let mut plan = Plan::step(Step::Relay(Box::new(relay)));
        if let Some((caller, event_type)) = audited {
            set(&mut details, "decision", "allowed");
            plan.events.push(event(event_type, &caller.agent_id, details));
        }
        Ok(plan)
    }

    /// Does what was planned and recorded.
    async fn take(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        step: Step,
        listener: &mut Listener,
    ) -> Result<Answer, GatewayError> {
        match step {
            Step::Answer(answer) | Step::Begin(answer, _) => Ok(answer),
            Step::Forward(forward) => self.forward(caller, speaker, *forward).await,
            Step::Relay(relay) => self.relay(asked, caller, speaker, *relay, listener).await,
            Step::Gather(id, gather) => self.gather(asked, caller, speaker, id, *gather).await,
            Step::Listen(listening) => {
                let Some(id) = listening.id.clone() else { return Ok(Answer::Nothing) };
                let ended = self.listen(asked, caller, speaker, *listening, listener).await?;
                Ok(Answer::Under(id, Ok(ended)))
            }
            Step::Cancel(key) => {
                self.underway.cancel(&key);
                Ok(Answer::Nothing)
            }
            Step::Reply(reply) => {
                let (reply, link, raw) = *reply;
                match self.peers.reply(&self.upstream, &link, &reply, &raw).await {
                    Ok(()) => Ok(Answer::Nothing),
                    Err(error) => {
                        tracing::warn!(
                            upstream = link.server.name,
                            error = chain(&error),
                            "mcp_answer_not_delivered"
                        );
                        let error = RpcError::new(code::UNREACHABLE, error.to_string());
                        Ok(Answer::Malformed(None, error))
                    }
                }
            }
        }
    }

    /// Calls a resource's upstream server and records the outcome before it is told.
    async fn forward(
        &self,
        caller: &Caller,
        speaker: &Speaker,
        forward: Forward,
    ) -> Result<Answer, GatewayError> {
        let started = Instant::now();
        let Forward { id, tool, arguments, endpoint, credential, slot, mut details } = forward;
        let result = self.upstream.call(&endpoint, &credential, &id.text(), &tool, &arguments).await;
        drop(slot);
        let outcome = match result {
            Ok(result) => {
                let (result, is_error) = as_tool_result(result)?;
                note_outcome(&mut details, is_error.then_some("tool_error"));
                note_statement(&mut details, &result);
                Ok(finished(result, speaker.revision, false, false)?)
            }
            Err(error) => {
                note_failure(&mut details, &error);
                Err(to_raw_value(&RpcError::new(error.code(), error.to_string()))?)
            }
        };
        let named = ("resource", tool.as_str());
        self.record_outcome(caller, EventType::McpToolCalled, details, Vec::new(), named, started).await?;
        Ok(Answer::Under(id, outcome))
    }

    /// Asks an MCP server and records the outcome before it is told.
    async fn relay(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        relay: Relay,
        listener: &mut Listener,
    ) -> Result<Answer, GatewayError> {
        let started = Instant::now();
        let Relay { id, link, slot, method, params, name, event_type, mut details, tool, keeping, .. } =
            relay;
        let (place, cancelled) =
            self.underway.enter(speaker.session.as_ref().map(|session| request_key(session, &id)));
        listener.cancelled = cancelled;
        listener.logs = match &speaker.session {
            Some(session) => self.streams.logs(session).await,
            None if speaker.revision.is_stateless() => {
                let asked_for = protocol::meta(params.as_deref()).log_level;
                asked_for.and_then(|level| Level::parse(&level)).map_or(Logs::None, Logs::From)
            }
            None => Logs::All,
        };
        let trace = self.trace(asked, params.as_deref());
        let mirrored = asked
            .parts
            .headers
            .iter()
            .filter(|(name, _)| name.as_str().starts_with(PARAMETER_PREFIX))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let timeout = Duration::from_millis(u64::try_from(link.server.timeout_ms).unwrap_or(0));
        let ask = Ask {
            method: &method,
            params,
            name: name.as_deref(),
            mirrored,
            key: self.session_key(caller, speaker, &link.server),
            capabilities: client_capabilities(speaker),
            trace: &trace,
            // The SDK gives up after ten seconds.
            idle_timeout: if speaker.cold { timeout.min(CALL_TIMEOUT) } else { timeout },
            revision: speaker.revision,
            listener,
        };
        let answered = self.peers.ask(&self.upstream, &link, &ask).await;
        drop((slot, place));
        let list = matches!(
            method.as_str(),
            "resources/list" | "resources/templates/list" | "prompts/list" | "resources/read"
        );
        let mut kept = Vec::new();
        if let (Some(keeping), Ok(Ok(said) | Err(said))) = (&keeping, &answered)
            && let Some(result) = self.sealed(keeping, "result", said)?
        {
            set(&mut details, "result_digest", &result.digest);
            kept.push(result);
        }
        let outcome = match answered {
            Ok(Ok(result)) => {
                if needs_input(&result) && !speaker.revision.is_stateless() {
                    let error = UpstreamError::Garbage("it asks for input that this caller cannot give");
                    note_failure(&mut details, &error);
                    Err(to_raw_value(&RpcError::new(error.code(), error.to_string()))?)
                } else {
                    note_outcome(&mut details, (tool.is_some() && is_error(&result)).then_some("tool_error"));
                    note_statement(&mut details, &result);
                    let ours = link.server.revision.is_some_and(Revision::is_stateless);
                    Ok(if ours { private(result)? } else { finished(result, speaker.revision, list, false)? })
                }
            }
            Ok(Err(error)) => {
                note_outcome(&mut details, Some("upstream_error"));
                Err(error)
            }
            Err(error) => {
                note_failure(&mut details, &error);
                Err(to_raw_value(&RpcError::new(error.code(), error.to_string()))?)
            }
        };
        if let Some(event_type) = event_type {
            let named = (link.server.name.as_str(), tool.as_deref().unwrap_or_default());
            self.record_outcome(caller, event_type, details, kept, named, started).await?;
        }
        Ok(Answer::Under(id, outcome))
    }

    async fn record_outcome(
        &self,
        caller: &Caller,
        event_type: EventType,
        mut details: Value,
        kept: Vec<Kept>,
        (upstream, tool): (&str, &str),
        started: Instant,
    ) -> Result<(), GatewayError> {
        let took = started.elapsed();
        let latency_ms = i64::try_from(took.as_millis()).unwrap_or(i64::MAX);
        let outcome = details["reason"].as_str().or_else(|| details["outcome"].as_str()).unwrap_or_default();
        self.metrics.mcp_call(upstream, tool, outcome, took);
        if details["outcome"] == "error" {
            tracing::warn!(
                request_id = details["request_id"].as_str(),
                upstream,
                tool,
                latency_ms,
                reason = outcome,
                "mcp_upstream_call_failed"
            );
        }
        if let Some(details) = details.as_object_mut() {
            details.insert("latency_ms".to_owned(), json!(latency_ms));
        }
        // No epoch: the call was made, so its outcome belongs into the log whatever has changed since.
        let events = vec![event(event_type, &caller.agent_id, details)];
        self.journal.append(Append { events, kept, ..Append::default() }).await?;
        Ok(())
    }

    /// Puts a list together from several servers. One that does not answer is left out.
    async fn gather(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        id: Id,
        gather: Gather,
    ) -> Result<Answer, GatewayError> {
        let trace = self.trace(asked, None);
        let Gather { method, params, member, links } = gather;
        if member.is_empty() {
            let told = links
                .iter()
                .map(|link| self.tell_one(link, caller, speaker, &method, params.clone(), &trace));
            join_all(told).await;
            return Ok(Answer::Under(id, Ok(jsonrpc::empty_object())));
        }
        let lists = links.iter().map(|link| self.pages(link, caller, speaker, &method, member, &trace));
        let items: Vec<Box<RawValue>> = join_all(lists).await.into_iter().flatten().collect();
        let list = to_raw_value(&json!({ member: items }))?;
        Ok(Answer::Under(id, Ok(finished(list, speaker.revision, true, true)?)))
    }

    /// The items of a list of one server, of all its pages.
    async fn pages(
        &self,
        link: &Link,
        caller: &Caller,
        speaker: &Speaker,
        method: &str,
        member: &str,
        trace: &Trace,
    ) -> Vec<Box<RawValue>> {
        let listener = Listener::default();
        let mut items = Vec::new();
        let mut params = json!({});
        for _page in 0..LIST_PAGES_MAX {
            let ask =
                self.short_ask(link, caller, speaker, method, to_raw_value(&params).ok(), trace, &listener);
            let Ok(Ok(result)) = self.peers.ask(&self.upstream, link, &ask).await else { break };
            let mut next = None;
            for (name, value) in jsonrpc::members(&result) {
                if name == member {
                    items.extend(serde_json::from_str::<Vec<Box<RawValue>>>(value.get()).unwrap_or_default());
                } else if name == "nextCursor" {
                    next = serde_json::from_str::<String>(value.get()).ok();
                }
            }
            match next {
                Some(cursor) => params = json!({ "cursor": cursor }),
                None => break,
            }
        }
        items
    }

    /// Tells one of several servers what concerns them all.
    async fn tell_one(
        &self,
        link: &Link,
        caller: &Caller,
        speaker: &Speaker,
        method: &str,
        params: Option<Box<RawValue>>,
        trace: &Trace,
    ) {
        let listener = Listener::default();
        let ask = self.short_ask(link, caller, speaker, method, params, trace, &listener);
        if let Err(error) = self.peers.ask(&self.upstream, link, &ask).await {
            tracing::debug!(upstream = link.server.name, error = chain(&error), "mcp_server_not_told");
        }
    }

    /// A request of which only the answer counts, and that soon.
    #[expect(clippy::too_many_arguments, reason = "two call sites, and each is a different thing")]
    fn short_ask<'a>(
        &self,
        link: &Link,
        caller: &Caller,
        speaker: &Speaker,
        method: &'a str,
        params: Option<Box<RawValue>>,
        trace: &'a Trace,
        listener: &'a Listener,
    ) -> Ask<'a> {
        Ask {
            method,
            params,
            name: None,
            mirrored: Vec::new(),
            key: self.session_key(caller, speaker, &link.server),
            capabilities: client_capabilities(speaker),
            trace,
            idle_timeout: LIST_TIMEOUT,
            revision: speaker.revision,
            listener,
        }
    }

    fn session_key(&self, caller: &Caller, speaker: &Speaker, server: &Server) -> SessionKey {
        SessionKey {
            upstream: server_key(server),
            caller: (caller.principal_type.clone(), canonical(&self.org_id, &caller.agent_id)),
            session: speaker.session.as_ref().map(|session| session.nonce.clone()),
        }
    }

    fn trace(&self, asked: &Asked, params: Option<&RawValue>) -> Trace {
        let meta = protocol::meta(params);
        let said = (meta.traceparent.as_deref(), meta.tracestate.as_deref());
        Trace::of(&asked.parts.headers, said, &self.entropy)
    }

    pub(super) fn holder(&self, caller: &Caller) -> store::Holder {
        store::Holder {
            principal_type: caller.principal_type.clone(),
            canonical: canonical(&self.org_id, &caller.agent_id),
            bare: bare(&self.org_id, &caller.agent_id),
        }
    }
}

/// What the caller's own client can do for a server that is spoken to in its revision.
pub(super) fn client_capabilities(speaker: &Speaker) -> Map<String, Value> {
    match &speaker.session {
        // Only who reads the stream hears a server's request.
        Some(session) if speaker.streams => session.capabilities.clone(),
        _ => Map::new(),
    }
}

/// Which capability of a server a method needs, and what it is about.
fn target(call: &Call) -> (Option<&'static str>, Option<String>) {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Named {
        name: Option<String>,
        uri: Option<String>,
        r#ref: Option<Reference>,
    }
    #[derive(Deserialize)]
    struct Reference {
        name: Option<String>,
        uri: Option<String>,
    }
    let named: Named =
        call.params.as_deref().and_then(|params| serde_json::from_str(params.get()).ok()).unwrap_or_default();
    match call.method.as_str() {
        "resources/read" | "resources/subscribe" | "resources/unsubscribe" => (Some("resources"), named.uri),
        "prompts/get" => (Some("prompts"), named.name),
        "completion/complete" => match named.r#ref {
            Some(Reference { name: Some(name), .. }) => (Some("prompts"), Some(name)),
            Some(Reference { uri: Some(uri), .. }) => (Some("resources"), Some(uri)),
            _ => (Some("completions"), None),
        },
        "logging/setLevel" => (Some("logging"), None),
        _ => (None, None),
    }
}

fn unknown_method(speaker: &Speaker, id: Id, method: &str) -> Result<Plan, GatewayError> {
    let error = RpcError::unknown_method(method);
    if speaker.revision.is_stateless() {
        return Ok(Plan::answer(Answer::Missing(Some(id), error)));
    }
    Plan::error(&id, &error)
}

/// A result as 2026-07-28 wants it: with its type, and where it can be cached, for how long and for whom. What is ours
/// says so. Older revisions get it as it is.
fn finished(
    result: Box<RawValue>,
    revision: Revision,
    cacheable: bool,
    ours: bool,
) -> Result<Box<RawValue>, GatewayError> {
    if !revision.is_stateless() {
        return Ok(result);
    }
    let mut members = jsonrpc::members(&result);
    let (complete, zero, private) = (to_raw_value("complete")?, to_raw_value(&0)?, to_raw_value("private")?);
    let meta = to_raw_value(&json!({ META_SERVER: server_info() }))?;
    let mut add = |name: &str, value| {
        if !members.iter().any(|(known, _)| known == name) {
            members.push((name.to_owned(), value));
        }
    };
    add("resultType", &*complete);
    if cacheable {
        // Who may see what changes with the next binding, and differs from caller to caller.
        add("ttlMs", &*zero);
        add("cacheScope", &*private);
    }
    if ours {
        add("_meta", &*meta);
    }
    Ok(jsonrpc::object(&members)?)
}

/// A server's result without its leave to show it to others: who may see what it says is ours to decide, each time.
fn private(result: Box<RawValue>) -> Result<Box<RawValue>, GatewayError> {
    let private = to_raw_value("private")?;
    let public = jsonrpc::members(&result)
        .iter()
        .any(|(name, value)| name == "cacheScope" && value.get() != private.get());
    Ok(if public { jsonrpc::with_member(&result, "cacheScope", &private)? } else { result })
}

/// The event of a request that was refused before it could be served.
fn refusal(asked: &Asked, caller: &Caller, error: &RpcError) -> Event {
    let reason = match error.code {
        _ if jsonrpc::is_deeper_than(&asked.body, jsonrpc::DEPTH_MAX) => "too_deep",
        code::PARSE => "not_json",
        code::HEADER_MISMATCH => "header_mismatch",
        code::UNSUPPORTED_VERSION => "unsupported_version",
        code::INVALID_PARAMS => "invalid_params",
        _ => "invalid_request",
    };
    let details = json!({ "request_id": asked.context.request_id, "reason": reason });
    event(EventType::McpRequestRefused, &caller.agent_id, details)
}

/// The result of `tools/call` and whether it says that the tool failed. A result with a `content` list passes
/// untouched; anything else, which an MCP client could not read, becomes one block of text.
fn as_tool_result(result: Box<RawValue>) -> Result<(Box<RawValue>, bool), GatewayError> {
    let has_content = jsonrpc::members(&result)
        .iter()
        .any(|(name, value)| name == "content" && value.get().starts_with('['));
    if has_content {
        let is_error = is_error(&result);
        return Ok((result, is_error));
    }
    let text = serde_json::from_str::<String>(result.get()).unwrap_or_else(|_| result.get().to_owned());
    let wrapped = json!({ "content": [{ "type": "text", "text": text }], "isError": false });
    Ok((to_raw_value(&wrapped)?, false))
}

fn is_error(result: &RawValue) -> bool {
    jsonrpc::members(result).iter().any(|(name, value)| name == "isError" && value.get() == "true")
}

fn needs_input(result: &RawValue) -> bool {
    jsonrpc::members(result)
        .iter()
        .any(|(name, value)| name == "resultType" && value.get() == "\"input_required\"")
}

fn note_outcome(details: &mut Value, failed: Option<&str>) {
    set(details, "outcome", if failed.is_some() { "error" } else { "ok" });
    if let Some(reason) = failed {
        set(details, "reason", reason);
    }
}

/// Copies what a tool states about itself for the audit log (wire contract §9): three texts under one name, somewhere in
/// its result. It is the tool's word, so it stands apart from what we say.
fn note_statement(details: &mut Value, result: &RawValue) {
    /// Objects and arrays within each other that are looked into.
    const DEPTH_MAX: usize = 8;
    const NAME: &str = "_cullis_audit";
    const BYTES_MAX: usize = 256;
    fn find(value: &Value, depth: usize) -> Option<&Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        match value {
            Value::Object(members) => members
                .get(NAME)
                .filter(|found| found.is_object())
                .or_else(|| members.values().find_map(|value| find(value, depth + 1))),
            Value::Array(items) => items.iter().find_map(|value| find(value, depth + 1)),
            _ => None,
        }
    }
    // Most results have none, and are not read for it.
    if !result.get().contains(NAME) {
        return;
    }
    let Ok(value) = serde_json::from_str::<Value>(result.get()) else { return };
    let Some(found) = find(&value, 1) else { return };
    let text = |name: &str| found[name].as_str().map(|text| jsonrpc::shorten(text, BYTES_MAX));
    if let (Some(action), Some(subject), Some(outcome)) = (text("action"), text("subject"), text("outcome"))
        && let Some(details) = details.as_object_mut()
    {
        let statement = json!({ "action": action, "subject": subject, "outcome": outcome });
        details.insert("tool_statement".to_owned(), statement);
    }
}

fn note_failure(details: &mut Value, error: &UpstreamError) {
    let outcome = if matches!(error, UpstreamError::Cancelled) { "cancelled" } else { "error" };
    set(details, "outcome", outcome);
    set(details, "reason", error.reason());
    tracing::debug!(error = chain(error), "mcp_upstream_error");
}

fn any_object_schema() -> Box<RawValue> {
    to_raw_value(&json!({ "type": "object", "properties": {} })).unwrap_or_else(|_| jsonrpc::empty_object())
}

/// The tool's name as a label: what a caller made up would be a series of its own.
fn known_tool<'a>(error: &GatewayError, name: &'a str) -> &'a str {
    if matches!(error, GatewayError::UnknownTool(_)) { "" } else { name }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn stated(result: &str) -> Value {
        let mut details = json!({});
        note_statement(&mut details, &RawValue::from_string(result.to_owned()).unwrap());
        details["tool_statement"].clone()
    }

    #[test]
    fn what_a_tool_states_is_copied_where_it_is_whole_and_not_too_deep() {
        let statement = r#"{"action":"read","subject":"file","outcome":"done","more":1}"#;
        let expected = json!({ "action": "read", "subject": "file", "outcome": "done" });
        let nested = |depth: usize| {
            let (open, close) = (r#"{"a":"#.repeat(depth), "}".repeat(depth));
            format!(r#"{open}{{"_cullis_audit":{statement}}}{close}"#)
        };
        assert_eq!(stated(&nested(0)), expected);
        assert_eq!(stated(&nested(7)), expected);
        assert_eq!(stated(&nested(8)), Value::Null);
        assert_eq!(
            stated(r#"{"content":[{"_cullis_audit":{"action":"x","subject":1,"outcome":"y"}}]}"#),
            Value::Null
        );
        assert_eq!(stated(r#"{"content":[{"text":"_cullis_audit"}]}"#), Value::Null);
    }
}
