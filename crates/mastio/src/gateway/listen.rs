//! What changes, told as it changes: `subscriptions/listen` of 2026-07-28, and the GET stream of the revisions with
//! sessions.
//!
//! Which tools a caller has is ours to tell: no change is without its audit event, so one task that follows the log
//! wakes every open stream, and a stream speaks when its own caller's list is another. What servers say about their
//! resources and prompts is passed on from a stream of ours to each of them, one for each stream of a caller, so that
//! nothing which a server says to one caller is heard by another. A server that says its tools have changed is looked
//! at; what it says now is offered when an operator has approved it.
//!
//! A stream ends with the access token that opened it, when the caller's standing is lost, and when we stop. Its client
//! opens it again.
//! Source: MCP 2026-07-28, subscriptions; 2025-11-25, transports, listening for messages from the server.

use std::collections::{HashMap, HashSet};
use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use moka::future::Cache;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::definition::sha256_hex;
use super::jsonrpc::{self, Id, RpcError, code};
use super::peer::{Listener, SessionKey, one_line};
use super::protocol::{META_SERVER, META_SUBSCRIPTION, Revision, server_info};
use super::serve::{Asked, Speaker};
use super::servers::Server;
use super::session::{LIFETIME_S, Session};
use super::{Caller, Gateway, GatewayError, canonical, store};
use crate::http::error::chain;
use crate::store::group::{Append, AppendError};

/// Streams that one agent may have open.
const STREAMS_PER_AGENT_MAX: usize = 256;
/// Streams that may be open in this process.
const STREAMS_MAX: usize = 8192;
/// Servers that one stream hears.
const SERVERS_HEARD_MAX: usize = 16;
/// Streams of ours to one server.
pub(super) const STREAMS_PER_SERVER_MAX: usize = 1024;
/// Resources that one stream follows.
const URIS_MAX: usize = 64;
/// Between two looks at the audit log, while anybody listens.
const PERIOD: Duration = Duration::from_millis(500);
/// Before a stream to a server is opened again; doubled each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A server that says its tools have changed is looked at so often a minute at most.
const LOOKS_PER_MINUTE: u32 = 12;
/// Log levels of sessions that are remembered.
const LEVELS_MAX: u64 = 20_000;

/// How much a log message matters, least first (RFC 5424).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// `debug`
    Debug,
    /// `info`
    Info,
    /// `notice`
    Notice,
    /// `warning`
    Warning,
    /// `error`
    Error,
    /// `critical`
    Critical,
    /// `alert`
    Alert,
    /// `emergency`
    Emergency,
}

impl Level {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Debug, "debug"),
        (Self::Info, "info"),
        (Self::Notice, "notice"),
        (Self::Warning, "warning"),
        (Self::Error, "error"),
        (Self::Critical, "critical"),
        (Self::Alert, "alert"),
        (Self::Emergency, "emergency"),
    ];

    /// Reads a level. Absent for what is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, name)| *name == text).map(|(level, _)| level)
    }

    /// The level as it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::ALL.into_iter().find(|(level, _)| *level == self).map_or("", |(_, name)| name)
    }
}

/// Which log messages a caller hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Logs {
    /// All: a session that has not said.
    #[default]
    All,
    /// Those of this level and above.
    From(Level),
    /// None: a request of 2026-07-28 that does not ask for any.
    None,
}

impl Logs {
    /// Whether a notification is heard. Everything but log messages is.
    #[must_use]
    pub fn hear(self, method: &str, message: &[u8]) -> bool {
        #[derive(Deserialize)]
        struct Logged<'a> {
            #[serde(borrow)]
            params: LogParams<'a>,
        }
        #[derive(Deserialize)]
        struct LogParams<'a> {
            level: &'a str,
        }
        if method != "notifications/message" {
            return true;
        }
        match self {
            Self::All => true,
            Self::None => false,
            Self::From(least) => serde_json::from_slice::<Logged<'_>>(message)
                .ok()
                .and_then(|logged| Level::parse(logged.params.level))
                .is_some_and(|level| level >= least),
        }
    }
}

/// The open streams of this process, and what sessions have said about log messages.
pub struct Streams {
    open: Mutex<Open>,
    levels: Cache<String, Level>,
    changes: watch::Sender<i64>,
    closed: watch::Sender<bool>,
}

#[derive(Default)]
struct Open {
    by_agent: HashMap<String, usize>,
    sessions: HashSet<String>,
    total: usize,
}

impl Default for Streams {
    fn default() -> Self {
        let day = Duration::from_secs(LIFETIME_S.unsigned_abs());
        Self {
            open: Mutex::default(),
            levels: Cache::builder().max_capacity(LEVELS_MAX).time_to_live(day).build(),
            changes: watch::Sender::new(0),
            closed: watch::Sender::new(false),
        }
    }
}

/// A place among the open streams, left when dropped.
pub(super) struct Place {
    gateway: Arc<Gateway>,
    agent_id: String,
    session: Option<String>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.gateway.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.total -= 1;
        self.gateway.metrics.mcp_streams(open.total);
        if let Some(session) = &self.session {
            open.sessions.remove(session);
        }
        if let Some(of_agent) = open.by_agent.get_mut(&self.agent_id) {
            *of_agent -= 1;
            if *of_agent == 0 {
                open.by_agent.remove(&self.agent_id);
            }
        }
    }
}

impl Streams {
    /// Ends every stream: the server stops.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Which log messages a session hears.
    pub(super) async fn logs(&self, session: &Session) -> Logs {
        self.levels.get(&session.nonce).await.map_or(Logs::All, Logs::From)
    }

    pub(super) async fn set_level(&self, session: &Session, level: Level) {
        self.levels.insert(session.nonce.clone(), level).await;
    }
}

/// What a caller wants to hear of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Wanted {
    tools_list_changed: bool,
    prompts_list_changed: bool,
    resources_list_changed: bool,
    resource_subscriptions: Vec<String>,
}

impl Wanted {
    /// Reads the parameters of `subscriptions/listen`.
    ///
    /// Errors: `-32602`.
    pub fn read(params: Option<&RawValue>) -> Result<Self, RpcError> {
        #[derive(Deserialize)]
        struct Params {
            notifications: Wanted,
        }
        let invalid = |what: &str| RpcError::new(code::INVALID_PARAMS, format!("Invalid params: {what}"));
        let params: Params = params
            .and_then(|params| serde_json::from_str(params.get()).ok())
            .ok_or_else(|| invalid("notifications is not a filter of notifications"))?;
        if params.notifications.resource_subscriptions.len() > URIS_MAX {
            return Err(invalid("resourceSubscriptions has more than 64 entries"));
        }
        Ok(params.notifications)
    }

    /// The resources that are followed.
    #[must_use]
    pub fn uris(&self) -> &[String] {
        &self.resource_subscriptions
    }

    fn everything() -> Self {
        Self {
            tools_list_changed: true,
            prompts_list_changed: true,
            resources_list_changed: true,
            resource_subscriptions: Vec::new(),
        }
    }

    /// As it is sent to a server, and acknowledged to a caller.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut filter = Map::new();
        for (name, wanted) in [
            ("toolsListChanged", self.tools_list_changed),
            ("promptsListChanged", self.prompts_list_changed),
            ("resourcesListChanged", self.resources_list_changed),
        ] {
            if wanted {
                filter.insert(name.to_owned(), Value::Bool(true));
            }
        }
        if !self.resource_subscriptions.is_empty() {
            filter.insert("resourceSubscriptions".to_owned(), json!(self.resource_subscriptions));
        }
        Value::Object(filter)
    }
}

/// A stream that a caller has opened.
pub(super) struct Listening {
    /// The request's id, for 2026-07-28.
    pub id: Option<Id>,
    pub wanted: Wanted,
    /// Held while the stream is open.
    pub _place: Place,
}

/// What one stream of ours to a server is to pass on.
pub(super) struct Heard<'a> {
    /// The caller's words.
    listening: &'a Listening,
    /// What is wanted of this server.
    pub wanted: Wanted,
    /// Whose session it is there.
    pub key: SessionKey,
    /// What the caller's client can do for a server.
    pub capabilities: Map<String, Value>,
    pub listener: &'a Listener,
    /// Told when the server says that its tools have changed.
    pub tools_changed: Notify,
}

impl Heard<'_> {
    /// What the caller is told of a server's notification. Absent for what it did not ask for.
    pub fn told(&self, method: &str, data: &[u8]) -> Option<Vec<u8>> {
        let (wanted, modern) = (&self.wanted, self.listening.id.is_some());
        let passes = match method {
            // Ours to tell, once an operator has approved.
            "notifications/tools/list_changed" => false,
            "notifications/prompts/list_changed" => wanted.prompts_list_changed,
            "notifications/resources/list_changed" => wanted.resources_list_changed,
            "notifications/resources/updated" => {
                !modern || uri_of(data).is_some_and(|uri| wanted.resource_subscriptions.contains(&uri))
            }
            "notifications/message" => !modern && self.listener.logs.hear(method, data),
            "notifications/subscriptions/acknowledged" | "notifications/progress" => false,
            _ => !modern,
        };
        if !passes {
            return None;
        }
        let message: Box<RawValue> = serde_json::from_slice(data).ok()?;
        let told = under_subscription(&message, self.listening.id.as_ref()).ok()?;
        Some(one_line(told.get().as_bytes()))
    }
}

fn uri_of(data: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Updated {
        params: Params,
    }
    #[derive(Deserialize)]
    struct Params {
        uri: String,
    }
    serde_json::from_slice::<Updated>(data).ok().map(|updated| updated.params.uri)
}

/// A notification of a server's under the caller's own subscription, or under none.
fn under_subscription(message: &RawValue, id: Option<&Id>) -> Result<Box<RawValue>, serde_json::Error> {
    let find = |object: &RawValue, wanted: &str| {
        jsonrpc::members(object)
            .into_iter()
            .find(|(name, _)| name == wanted)
            .map(|(_, value)| value.to_owned())
    };
    let params = find(message, "params").unwrap_or_else(jsonrpc::empty_object);
    let known = find(&params, "_meta").unwrap_or_else(jsonrpc::empty_object);
    let mut meta = jsonrpc::members(&known);
    meta.retain(|(name, _)| name != META_SUBSCRIPTION);
    let id = id.map(to_raw_value).transpose()?;
    meta.extend(id.as_deref().map(|id| (META_SUBSCRIPTION.to_owned(), id)));
    let meta = jsonrpc::object(&meta)?;
    let params = jsonrpc::with_member(&params, "_meta", &meta)?;
    jsonrpc::with_member(message, "params", &params)
}

fn changed(what: &str, id: Option<&Id>) -> Vec<u8> {
    let mut message =
        json!({ "jsonrpc": "2.0", "method": format!("notifications/{what}/list_changed"), "params": {} });
    if let Some(id) = id {
        message["params"] = json!({ "_meta": { META_SUBSCRIPTION: id } });
    }
    message.to_string().into_bytes()
}

impl Gateway {
    /// Follows the audit log while anybody listens, and wakes the streams when something has changed that a list of
    /// tools, resources or prompts can depend on. Never ends.
    pub async fn follow_changes(&self) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut seen = None;
        loop {
            ticks.tick().await;
            if self.streams.changes.receiver_count() == 0 {
                seen = None;
                continue;
            }
            match self.changes_since(seen).await {
                Ok((newest, moved)) => {
                    seen = Some(newest);
                    if moved {
                        self.streams.changes.send_replace(newest);
                    }
                }
                // The streams stay as they are until the database answers again.
                Err(error) => tracing::debug!(error = chain(&error), "mcp_changes_not_followed"),
            }
        }
    }

    async fn changes_since(&self, seen: Option<i64>) -> Result<(i64, bool), GatewayError> {
        let mut tx = self.store.read().await?;
        let newest = store::newest_event(&mut tx).await?;
        let moved = match seen {
            // Whoever came while nobody followed may have missed something: each looks once.
            None => true,
            Some(seen) if seen == newest => false,
            Some(seen) => store::something_changed(&mut tx, seen).await?,
        };
        Ok((newest, moved))
    }

    /// Takes a place for a stream of the caller's.
    ///
    /// Errors: [`GatewayError::TooManyStreams`], [`GatewayError::StreamOpen`] where the session has one.
    pub(super) fn stream_place(
        self: &Arc<Self>,
        caller: &Caller,
        session: Option<&Session>,
    ) -> Result<Place, GatewayError> {
        let mut open = self.streams.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_agent = open.by_agent.get(&caller.agent_id).copied().unwrap_or(0);
        if open.total >= STREAMS_MAX || of_agent >= STREAMS_PER_AGENT_MAX {
            return Err(GatewayError::TooManyStreams);
        }
        let session = session.map(|session| session.nonce.clone());
        if let Some(session) = &session
            && !open.sessions.insert(session.clone())
        {
            // Each message goes to one stream only.
            return Err(GatewayError::StreamOpen);
        }
        open.by_agent.insert(caller.agent_id.clone(), of_agent + 1);
        open.total += 1;
        self.metrics.mcp_streams(open.total);
        Ok(Place { gateway: Arc::clone(self), agent_id: caller.agent_id.clone(), session })
    }

    /// A GET stream of a session: everything that there is to hear.
    pub(super) fn session_stream(place: Place) -> Listening {
        Listening { id: None, wanted: Wanted::everything(), _place: place }
    }

    /// Tells the caller what changes, until the stream ends. Gives what a stream of 2026-07-28 ends with.
    ///
    /// Errors: [`GatewayError::Store`].
    pub(super) fn listen<'a>(
        &'a self,
        asked: &'a Asked,
        caller: &'a Caller,
        speaker: &'a Speaker,
        listening: Listening,
        listener: &'a Listener,
    ) -> BoxFuture<'a, Result<Box<RawValue>, GatewayError>> {
        Box::pin(self.listen_until_the_end(asked, caller, speaker, listening, listener))
    }

    async fn listen_until_the_end(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        mut listening: Listening,
        listener: &Listener,
    ) -> Result<Box<RawValue>, GatewayError> {
        let ending = json!({
            "resultType": "complete",
            "_meta": { META_SUBSCRIPTION: listening.id, META_SERVER: server_info() },
        });
        let lives_s = caller.expires_at.0.saturating_sub(asked.context.now.seconds().0).max(0).unsigned_abs();
        let until = Instant::now() + Duration::from_secs(lives_s);
        let (mut changes, mut closed) = (self.streams.changes.subscribe(), self.streams.closed.subscribe());
        let mut caller = caller.clone();
        let mut tools = self.tools_digest(&caller).await?;
        // A stream of 2026-07-28 belongs to no session: it has one of its own with each server of an older revision.
        let own_session = match &speaker.session {
            Some(session) => session.nonce.clone(),
            None => format!("listen-{}", self.entropy.uuid()),
        };
        let mut first = true;
        loop {
            let servers = self.bound_servers(&caller).await?;
            let heard = self.heard(asked, &caller, speaker, &mut listening, servers).await;
            if std::mem::take(&mut first)
                && let Some(id) = &listening.id
            {
                let acknowledged = json!({
                    "jsonrpc": "2.0",
                    "method": "notifications/subscriptions/acknowledged",
                    "params": { "_meta": { META_SUBSCRIPTION: id }, "notifications": listening.wanted.to_json() },
                });
                listener.tell(acknowledged.to_string().into_bytes()).await;
            }
            let standing: Vec<(String, String)> =
                heard.iter().map(|(server, _)| server_key(server)).collect();
            let listening = &listening;
            let holder = (caller.principal_type.clone(), canonical(&self.org_id, &caller.agent_id));
            let by = caller.clone();
            let mut heard_servers: Vec<BoxFuture<'_, ()>> = Vec::with_capacity(heard.len());
            for (server, wanted) in heard {
                let heard = Heard {
                    listening,
                    wanted,
                    key: SessionKey {
                        upstream: server_key(&server),
                        caller: holder.clone(),
                        session: Some(own_session.clone()),
                    },
                    capabilities: super::serve::client_capabilities(speaker),
                    listener,
                    tools_changed: Notify::new(),
                };
                heard_servers.push(Box::pin(self.hear(&by, Arc::new(server), heard)));
            }
            let hearing = async {
                join_all(heard_servers).await;
                pending::<()>().await;
            };
            tokio::pin!(hearing);
            let moved = loop {
                tokio::select! {
                    () = &mut hearing => {}
                    woken = changes.changed() => if woken.is_err() { break false },
                    _ = closed.wait_for(|closed| *closed) => break false,
                    () = tokio::time::sleep_until(until) => break false,
                    () = listener.hung_up() => break false,
                }
                match self.standing(&caller).await? {
                    Some(now) => caller = now,
                    None => break false,
                }
                let now = self.tools_digest(&caller).await?;
                if now != tools {
                    tools = now;
                    if listening.wanted.tools_list_changed {
                        listener.tell(changed("tools", listening.id.as_ref())).await;
                    }
                }
                let now = self.bound_servers(&caller).await?;
                if !now.iter().take(SERVERS_HEARD_MAX).map(server_key).eq(standing.iter().cloned()) {
                    break true;
                }
            };
            if !moved {
                break;
            }
            for (what, wanted) in [
                ("resources", listening.wanted.resources_list_changed),
                ("prompts", listening.wanted.prompts_list_changed),
            ] {
                if wanted {
                    listener.tell(changed(what, listening.id.as_ref())).await;
                }
            }
        }
        if speaker.session.is_none() {
            self.end_peer_sessions(&caller, &own_session).await?;
        }
        Ok(to_raw_value(&ending)?)
    }

    /// The caller as it stands now. Absent for one who would not be let in any more.
    async fn standing(&self, caller: &Caller) -> Result<Option<Caller>, GatewayError> {
        let token = Append { access_token: caller.access_token.clone(), ..Append::default() };
        match self.journal.append(token).await {
            Ok(_) => {}
            Err(AppendError::Revoked) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        self.authenticate.standing(caller).await.map_err(|_| GatewayError::Stopped)
    }

    async fn tools_digest(&self, caller: &Caller) -> Result<String, GatewayError> {
        Ok(sha256_hex(&serde_json::to_vec(&self.list_tools(caller).await?)?))
    }

    /// Which servers are heard, and what of each. The first time it also settles what a caller of 2026-07-28 can have.
    async fn heard(
        &self,
        asked: &Asked,
        caller: &Caller,
        speaker: &Speaker,
        listening: &mut Listening,
        mut servers: Vec<Server>,
    ) -> Vec<(Server, Wanted)> {
        servers.truncate(SERVERS_HEARD_MAX);
        let mut owners: HashMap<String, Vec<String>> = HashMap::new();
        if listening.id.is_some() {
            let mut had = Vec::new();
            for uri in std::mem::take(&mut listening.wanted.resource_subscriptions) {
                let mut links = Vec::new();
                for server in servers.iter().filter(|server| server.capabilities.contains_key("resources")) {
                    links.extend(self.link_unrecorded(caller, &Arc::new(server.clone())).await);
                }
                // No server is told of another's resources.
                let owner =
                    self.owners(asked, caller, speaker, links, "resources", &uri).await.into_iter().next();
                if let Some(owner) = owner {
                    owners.entry(owner.server.upstream_id.clone()).or_default().push(uri.clone());
                    had.push(uri);
                }
            }
            listening.wanted.resource_subscriptions = had;
            let offered = |name: &str| servers.iter().any(|server| server.capabilities.contains_key(name));
            listening.wanted.prompts_list_changed &= offered("prompts");
            listening.wanted.resources_list_changed &= offered("resources");
        }
        servers
            .into_iter()
            .map(|server| {
                let has = |name: &str| server.capabilities.contains_key(name);
                let wanted = Wanted {
                    tools_list_changed: listening.wanted.tools_list_changed && has("tools"),
                    prompts_list_changed: listening.wanted.prompts_list_changed && has("prompts"),
                    resources_list_changed: listening.wanted.resources_list_changed && has("resources"),
                    resource_subscriptions: owners.remove(&server.upstream_id).unwrap_or_default(),
                };
                (server, wanted)
            })
            .collect()
    }

    /// Hears one server and passes on what the caller wants, until it says that there is nothing to hear.
    async fn hear(&self, caller: &Caller, server: Arc<Server>, heard: Heard<'_>) {
        if heard.wanted == Wanted::default() {
            return;
        }
        let (first, longest) = PAUSES;
        let mut pause = first;
        loop {
            let began = Instant::now();
            let ended = match (self.link_unrecorded(caller, &server).await, self.stream_slot(&server)) {
                (Ok(link), Ok(_slot)) => {
                    tokio::select! {
                        ended = self.peers.hear(&self.upstream, &link, &heard) => ended,
                        never = self.look_when_told(&server, &heard.tools_changed) => never,
                    }
                }
                (Err(error), _) | (_, Err(error)) => Err(error),
            };
            match ended {
                // It has no such stream.
                Ok(false) => return,
                Ok(true) => {}
                Err(error) => {
                    tracing::debug!(upstream = server.name, error = chain(&error), "mcp_stream_ended");
                }
            }
            if began.elapsed() > longest {
                pause = first;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    fn stream_slot(&self, server: &Server) -> Result<super::upstream::Slot, super::upstream::UpstreamError> {
        self.upstream.slot_of(&format!("{}:streams", server.upstream_id), STREAMS_PER_SERVER_MAX)
    }

    async fn look_when_told<T>(&self, server: &Server, tools_changed: &Notify) -> T {
        loop {
            tools_changed.notified().await;
            self.tools_may_have_changed(server).await;
        }
    }

    /// Looks at a server that says its tools have changed, unless it says so too often.
    async fn tools_may_have_changed(&self, server: &Server) {
        let now = self.store.clock().now();
        if !self.tool_limits.admit_at(&format!("look {}", server.upstream_id), LOOKS_PER_MINUTE, now) {
            return;
        }
        match self.look("system", now.seconds(), &server.upstream_id).await {
            // Here it shows at once, and elsewhere when the log is next looked at.
            Ok(_) => self.streams.changes.send_modify(|_| {}),
            Err(error) => {
                tracing::warn!(upstream = server.name, error = chain(&error), "mcp_upstream_not_discovered");
            }
        }
    }
}

/// What tells one standing of a server from another.
pub(super) fn server_key(server: &Server) -> (String, String) {
    (server.upstream_id.clone(), server.updated_at.clone())
}

/// Whether a notification of a server's may come on the answer of a request, in this revision.
#[must_use]
pub(super) fn belongs_to_a_request(method: &str, revision: Revision) -> bool {
    !revision.is_stateless() || matches!(method, "notifications/progress" | "notifications/message")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn log_messages_are_heard_from_the_level_that_was_asked_for() {
        let message = |level: &str| {
            format!(r#"{{"method":"notifications/message","params":{{"level":"{level}","data":1}}}}"#)
        };
        let heard = |logs: Logs, level: &str| logs.hear("notifications/message", message(level).as_bytes());
        for (index, (least, _)) in Level::ALL.into_iter().enumerate() {
            for (other, (_, name)) in Level::ALL.into_iter().enumerate() {
                assert_eq!(heard(Logs::From(least), name), other >= index, "{least:?} {name}");
            }
            assert_eq!(Level::parse(least.as_str()), Some(least));
        }
        assert!(!heard(Logs::From(Level::Debug), "loud") && !heard(Logs::None, "emergency"));
        assert!(heard(Logs::All, "debug") && Logs::None.hear("notifications/progress", b"{}"));
        assert_eq!(Level::parse("warn"), None);
    }

    #[test]
    fn a_notification_goes_under_the_caller_s_subscription_and_no_other() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        let said = raw(
            r#"{"jsonrpc":"2.0","method":"m","params":{"uri":"a:b","_meta":{"x":1.0,"io.modelcontextprotocol/subscriptionId":"m7"}}}"#,
        );
        let told = under_subscription(&said, None).unwrap();
        assert_eq!(told.get(), r#"{"jsonrpc":"2.0","method":"m","params":{"uri":"a:b","_meta":{"x":1.0}}}"#);
        let bare = raw(r#"{"jsonrpc":"2.0","method":"m"}"#);
        assert_eq!(
            under_subscription(&bare, None).unwrap().get(),
            r#"{"jsonrpc":"2.0","method":"m","params":{"_meta":{}}}"#
        );
    }
}
