//! The gateway as agents and administrators see it: real routes, a real SQLite file, a real upstream server.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, Request, StatusCode, header, request::Parts};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Router};
use futures_util::future::BoxFuture;
use http_body_util::BodyExt as _;
use mastio_core::error::Kind;
use mastio_core::time::UnixMicros;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::upstream::{CALLS_PER_HOST_MAX, SCHEMA_BYTES_MAX};
use super::*;
use crate::clock::ManualClock;
use crate::http::authn::AdminSecret;
use crate::operators::Operators;
use crate::store::{DatabaseUrl, Query as _, schema};
use crate::values;
use moka::future::Cache;

pub(super) const NOW: UnixMicros = UnixMicros(1_776_971_052_000_000);

/// What the upstream server saw: path, headers, body.
type Seen = Arc<Mutex<Vec<(String, HeaderMap, String)>>>;

#[derive(Clone, Default)]
struct UpstreamState {
    seen: Seen,
    /// Calls that wait at `/slow` until the test lets them go.
    gate: Arc<tokio::sync::Notify>,
    schema_bytes: Arc<AtomicUsize>,
}

/// A result whose spelling a parser would change.
const RESULT: &str = r#"{ "content":[{"type":"text","text":"caf\u00e9"}],"b":1.50e3, "a":12345678901234567890123, "isError" : false }"#;

async fn upstream_answer(
    Path(kind): Path<String>,
    State(state): State<UpstreamState>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let request: Value = serde_json::from_str(&body).unwrap();
    state.seen.lock().unwrap().push((kind.clone(), headers, body));
    let id = request["id"].to_string();
    if request["method"] == "tools/list" {
        let padding = "x".repeat(state.schema_bytes.load(Ordering::SeqCst));
        let tools = json!([{ "name": "other", "inputSchema": { "type": "string" } },
            { "name": "weather", "description": "not ours to repeat",
              "inputSchema": { "type": "object", "required": ["city"], "$comment": padding } }]);
        return axum::Json(json!({ "jsonrpc": "2.0", "id": request["id"], "result": { "tools": tools } }))
            .into_response();
    }
    let answer = |result: &str| format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#);
    let json = |body: String| ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    let stream =
        |body: Body| ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response();
    match kind.as_str() {
        "json" => json(answer(RESULT)),
        "digits" => json(answer(RESULT).replace(r#""id":"1""#, r#""id":1"#)),
        "sse" => stream(Body::from(format!(
            ": hello\n\nevent: message\ndata: {{\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\"}}\n\n\
             event: message\ndata: {}\n\n",
            answer(RESULT)
        ))),
        "endless-sse" => {
            let first = Ok::<_, std::io::Error>(Bytes::from(format!("data: {}\r\n\r\n", answer(RESULT))));
            let events = futures_util::stream::once(async { first });
            stream(Body::from_stream(futures_util::StreamExt::chain(events, futures_util::stream::pending())))
        }
        "plain" => json(answer(r#"{ "temperature" : 21 }"#)),
        "text" => json(answer(r#""warm""#)),
        "tool-error" => json(answer(r#"{"content":[],"isError":true}"#)),
        "rpc-error" => json(format!(
            r#"{{"jsonrpc":"2.0","id":{id},"error":{{"code":-32050,"message":"{}"}}}}"#,
            "no such city ".repeat(100)
        )),
        "other-id" => json(answer(RESULT).replace(&id, r#""2""#)),
        "sse-other-id" => stream(Body::from(format!("data: {}\n\n", answer(RESULT).replace(&id, r#""2""#)))),
        "no-result" => json(format!(r#"{{"jsonrpc":"2.0","id":{id}}}"#)),
        "html" => ([(header::CONTENT_TYPE, "text/html")], answer(RESULT)).into_response(),
        "other-json" => ([(header::CONTENT_TYPE, "Application/Vnd.x+JSON; charset=utf-8")], answer(RESULT))
            .into_response(),
        "not-quite-sse" => ([(header::CONTENT_TYPE, "text/event-streams")], answer(RESULT)).into_response(),
        "untyped" => Response::new(Body::from(answer(RESULT))),
        "garbage" => json("<html>".to_owned()),
        "empty" => json(String::new()),
        "announced-huge" => json(answer(&format!(r#""{}""#, "x".repeat(5 * 1024 * 1024)))),
        "huge" => {
            let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
            let chunks = futures_util::stream::repeat_with(move || Ok::<_, std::io::Error>(chunk.clone()));
            ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(chunks)).into_response()
        }
        "slow" => {
            state.gate.notified().await;
            json(answer(RESULT))
        }
        "redirect" => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, "/json")]).into_response(),
        "401" => StatusCode::UNAUTHORIZED.into_response(),
        "403" => StatusCode::FORBIDDEN.into_response(),
        "404" => StatusCode::NOT_FOUND.into_response(),
        "500" => (StatusCode::INTERNAL_SERVER_ERROR, "stack trace of the upstream server").into_response(),
        other => panic!("no upstream behaviour {other}"),
    }
}

/// Judges by two headers: whose token it is, and the proof's identifier.
pub(super) struct FakeAuthenticate {
    store: Store,
    pub(super) capabilities: Mutex<HashMap<String, Vec<String>>>,
    /// How often a caller is judged at an epoch that has passed.
    stale: AtomicI64,
    judged: AtomicI64,
    refreshed: AtomicI64,
    pub(super) halted: AtomicBool,
}

impl Authenticate for FakeAuthenticate {
    fn agent<'a>(&'a self, agent_id: &'a str) -> BoxFuture<'a, Result<Option<Holder>, ApiError>> {
        let capabilities = self.capabilities.lock().unwrap().get(agent_id).cloned().unwrap_or_default();
        Box::pin(std::future::ready(Ok(Some(Holder { principal_type: "agent".to_owned(), capabilities }))))
    }

    fn assert<'a>(
        &'a self,
        caller: &'a Caller,
        audience: &'a str,
        _now: UnixTime,
    ) -> BoxFuture<'a, Result<String, ApiError>> {
        let halted = ApiError::new(Kind::Unavailable, "signing halted");
        let said = format!("{} at {audience}", caller.agent_id);
        Box::pin(std::future::ready(if self.halted.load(Ordering::SeqCst) { Err(halted) } else { Ok(said) }))
    }

    fn refresh(&self) -> BoxFuture<'_, Result<(), ApiError>> {
        self.refreshed.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn caller<'a>(
        &'a self,
        context: &'a Context,
        parts: &'a Parts,
    ) -> BoxFuture<'a, Result<Caller, ApiError>> {
        Box::pin(async move {
            let text = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
            let agent_id = text("authorization")
                .and_then(|value| value.strip_prefix("DPoP "))
                .ok_or_else(|| ApiError::new(Kind::Unauthenticated, "missing access token"))?;
            self.judged.fetch_add(1, Ordering::SeqCst);
            let epoch = epoch(&self.store).await;
            let stale = self.stale.fetch_sub(1, Ordering::SeqCst) > 0;
            Ok(Caller {
                agent_id: agent_id.to_owned(),
                principal_type: text("x-test-principal-type").unwrap_or("agent").to_owned(),
                capabilities: self.capabilities.lock().unwrap().get(agent_id).cloned().unwrap_or_default(),
                one_use: vec![OneUse {
                    id: format!("dpop:{agent_id}:{}", text("dpop").unwrap_or_default()),
                    expires_at: context.now.seconds().plus(300),
                }],
                access_token: None,
                epoch: if stale { epoch - 1 } else { epoch },
                issued_at: context.now.seconds(),
                expires_at: context.now.seconds().plus(900),
            })
        })
    }

    fn standing<'a>(&'a self, caller: &'a Caller) -> BoxFuture<'a, Result<Option<Caller>, ApiError>> {
        let capabilities =
            self.capabilities.lock().unwrap().get(&caller.agent_id).cloned().unwrap_or_default();
        let gone = capabilities.iter().any(|held| held == "gone");
        Box::pin(async move {
            let epoch = epoch(&self.store).await;
            Ok((!gone).then(|| Caller { capabilities, epoch, ..caller.clone() }))
        })
    }
}

async fn epoch(store: &Store) -> i64 {
    let mut tx = store.read().await.unwrap();
    tx.row("SELECT epoch FROM audit_head", &[]).await.unwrap().unwrap().integer(0).unwrap()
}

pub(super) struct World {
    pub(super) gateway: Arc<Gateway>,
    pub(super) router: Router,
    pub(super) fake: Arc<FakeAuthenticate>,
    upstream: UpstreamState,
    upstream_address: SocketAddr,
    proofs: AtomicUsize,
    _directory: tempfile::TempDir,
}

impl World {
    pub(super) async fn new() -> Self {
        Self::with(&["127.0.0.1"], Duration::from_secs(9)).await
    }

    async fn with(allowlist: &[&str], call_timeout: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (clock, entropy) = (Arc::new(ManualClock::at(NOW)), Arc::new(Entropy::default()));
        let url = DatabaseUrl::Sqlite(directory.path().join("mcp_proxy.db"));
        let store = Store::open(&url, true, clock, Arc::clone(&entropy)).await.unwrap();
        schema::migrate(&store).await.unwrap();
        let (journal, _task) = Journal::start(store.clone(), Box::new(|| {}));

        let upstream = UpstreamState::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream_address = listener.local_addr().unwrap();
        let app = Router::new().route("/{kind}", post(upstream_answer)).with_state(upstream.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });

        let fake = Arc::new(FakeAuthenticate {
            store: store.clone(),
            capabilities: Mutex::default(),
            stale: AtomicI64::new(0),
            judged: AtomicI64::new(0),
            refreshed: AtomicI64::new(0),
            halted: AtomicBool::new(false),
        });
        let gateway = Arc::new(Gateway {
            store,
            journal,
            upstream: client(allowlist).with_call_timeout(call_timeout),
            org_id: "acme".to_owned(),
            sealing: Arc::new(SealingKey::create_file(&directory.path().join("seal.key"), &entropy).unwrap()),
            entropy,
            authenticate: Arc::clone(&fake) as Arc<dyn Authenticate>,
            peers: Peers::default(),
            underway: Underway::default(),
            streams: Streams::default(),
            resumable: Arc::default(),
            schemas: Cache::new(SCHEMAS_MAX),
            rules: arc_swap::ArcSwap::default(),
            tool_limits: RateLimit::per_minute(0),
            urls: ExternalUrls::new(Some("https://mastio.example".to_owned()), vec!["localhost".to_owned()]),
            metrics: Arc::new(Metrics::new()),
        });
        let follower = Arc::clone(&gateway);
        tokio::spawn(async move { follower.follow_changes().await });
        let router = router(&gateway);
        let proofs = AtomicUsize::new(0);
        Self { gateway, router, fake, upstream, upstream_address, proofs, _directory: directory }
    }

    fn url(&self, kind: &str) -> String {
        format!("http://{}/{kind}", self.upstream_address)
    }

    pub(super) async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        send(&self.router, request).await
    }

    pub(super) async fn admin(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        self.admin_at(method, &format!("/v1/admin/mcp-resources{path}"), body).await
    }

    pub(super) async fn admin_at(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-admin-secret", "s3cret")
            .body(if body.is_null() { Body::empty() } else { Body::from(body.to_string()) })
            .unwrap();
        let (status, text) = self.send(request).await;
        (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
    }

    /// Registers a resource and gives its id.
    async fn register(&self, body: Value) -> String {
        let (status, answer) = self.admin(Method::POST, "", body).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        answer["resource_id"].as_str().unwrap().to_owned()
    }

    pub(super) async fn bind(&self, agent_id: &str, resource_id: &str) -> String {
        let body = json!({ "agent_id": agent_id, "resource_id": resource_id });
        let (status, answer) = self.admin(Method::POST, "/bindings", body).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        answer["binding_id"].as_str().unwrap().to_owned()
    }

    /// A tool `weather` that behaves as `kind`, bound to `acme::a`.
    pub(super) async fn weather(&self, kind: &str) {
        let resource_id = self.register(json!({ "name": "weather", "endpoint_url": self.url(kind) })).await;
        self.bind("acme::a", &resource_id).await;
    }

    pub(super) fn post(&self, agent_id: &str, body: &str) -> Request<Body> {
        let proof = self.proofs.fetch_add(1, Ordering::SeqCst);
        Request::post("/v1/mcp")
            .header("authorization", format!("DPoP {agent_id}"))
            .header("dpop", format!("proof-{proof}"))
            .body(Body::from(body.to_owned()))
            .unwrap()
    }

    pub(super) async fn rpc(&self, agent_id: &str, body: &str) -> (StatusCode, String) {
        self.send(self.post(agent_id, body)).await
    }

    /// Calls `weather` and gives the text of the answer, which has status 200.
    async fn call(&self, agent_id: &str) -> String {
        let (status, text) = self.rpc(agent_id, CALL).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        text
    }

    async fn error(&self, agent_id: &str) -> (i64, String) {
        error_in(&self.call(agent_id).await)
    }

    pub(super) async fn tools(&self, agent_id: &str) -> Vec<Value> {
        let (status, text) = self.rpc(agent_id, LIST).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        answer["result"]["tools"].as_array().unwrap().clone()
    }

    /// Type, actor and details of every event in the log.
    pub(super) async fn events(&self) -> Vec<(String, String, Value)> {
        let mut tx = self.gateway.store.read().await.unwrap();
        let rows =
            tx.rows("SELECT event_type, actor, details FROM audit_events ORDER BY seq", &[]).await.unwrap();
        let event = |row: &crate::store::Row| {
            let details = serde_json::from_str(&row.text(2).unwrap()).unwrap();
            (row.text(0).unwrap(), row.text(1).unwrap(), details)
        };
        rows.iter().map(event).collect()
    }

    /// Details of the events about tool calls, without what differs from run to run.
    async fn calls(&self) -> Vec<Value> {
        let mut calls = Vec::new();
        for (event_type, actor, mut details) in self.events().await {
            if event_type == "mcp.tool_called" {
                let details = details.as_object_mut().unwrap();
                assert!(details.remove("request_id").unwrap().is_string());
                assert!(details.remove("latency_ms").is_none_or(|latency| latency.is_i64()));
                assert_eq!(details.remove("trace_id").unwrap().as_str().unwrap().len(), 32);
                assert_eq!(details.remove("arguments_digest").unwrap().as_str().unwrap().len(), 64);
                details.remove("resource_id").unwrap();
                details.remove("policies");
                assert!(actor.starts_with("acme::") || actor == "a", "{actor}");
                calls.push(Value::Object(details.clone()));
            }
        }
        calls
    }

    pub(super) fn seen(&self, kind: &str) -> usize {
        self.upstream
            .seen
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, _, body)| path == kind && body.contains("call"))
            .count()
    }
}

fn client(allowlist: &[&str]) -> Upstream {
    let allowlist: Vec<String> = allowlist.iter().map(|&entry| entry.to_owned()).collect();
    let secrets: Secrets = Arc::new(|name| (name == "WEATHER_KEY").then(|| "k3y".to_owned()));
    Upstream::new(&allowlist, secrets).unwrap()
}

async fn guarded(
    State(operators): State<Arc<Operators>>,
    mut request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Result<Response, Response> {
    crate::operators::http::guard(&operators, &mut request).await?;
    Ok(next.run(request).await)
}

fn router(gateway: &Arc<Gateway>) -> Router {
    let context = Context {
        request_id: "01JZREQUEST".to_owned(),
        now: NOW,
        peer: SocketAddr::from(([192, 0, 2, 1], 4000)),
        source: [192, 0, 2, 1].into(),
        client_certificate: None,
        quotas: crate::http::limits::Quotas::default(),
    };
    let shared = AdminSecret::new("s3cret".to_owned());
    let operators = Operators::new(gateway.store.clone(), Arc::clone(&gateway.entropy), shared);
    routes(Arc::clone(gateway))
        .layer(axum::middleware::from_fn_with_state(Arc::new(operators), guarded))
        .layer(Extension(context))
}

async fn send(router: &Router, request: Request<Body>) -> (StatusCode, String) {
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

pub(super) fn error_in(text: &str) -> (i64, String) {
    let answer: Value = serde_json::from_str(text).unwrap();
    let error = &answer["error"];
    assert!(error.is_object() && answer.get("result").is_none(), "{text}");
    (error["code"].as_i64().unwrap(), error["message"].as_str().unwrap().to_owned())
}

const LIST: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
const CALL: &str = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"weather","arguments":{"city" : "Roma"}}}"#;

#[tokio::test]
async fn a_cold_caller_gets_the_handshake_ping_and_notification_answered() {
    let world = World::new().await;
    let (status, text) =
        world.rpc("acme::a", r#"{"jsonrpc":"2.0","id":"x","method":"initialize","params":{}}"#).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        json!({ "jsonrpc": "2.0", "id": "x", "result": { "protocolVersion": "2024-11-05",
            "capabilities": { "tools": {} }, "serverInfo": { "name": "cullis-proxy", "version": "0.1.0" } } })
    );
    let (status, text) = world.rpc("acme::a", r#"{"jsonrpc":"2.0","id":7,"method":"ping"}"#).await;
    assert_eq!((status, text.as_str()), (StatusCode::OK, r#"{"jsonrpc":"2.0","id":7,"result":{}}"#));
    let notification = r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#;
    assert_eq!(world.rpc("acme::a", notification).await, (StatusCode::NO_CONTENT, String::new()));
    assert_eq!(world.events().await, []);
}

#[tokio::test]
async fn what_is_not_json_rpc_is_refused_with_its_code() {
    let world = World::new().await;
    for (body, status, code) in [
        ("{", StatusCode::BAD_REQUEST, -32700),
        ("[]", StatusCode::BAD_REQUEST, -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"resources/list"}"#, StatusCode::OK, -32601),
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{}}"#, StatusCode::OK, -32602),
    ] {
        let (found, text) = world.rpc("acme::a", body).await;
        assert_eq!((found, error_in(&text).0), (status, code), "{body}");
    }
}

#[tokio::test]
async fn without_a_token_nothing_is_read() {
    let world = World::new().await;
    let (status, _) = world.send(Request::post("/v1/mcp").body(Body::from(LIST)).unwrap()).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_body_over_its_bound_is_refused() {
    let world = World::new().await;
    let (status, _) = world.rpc("acme::a", &" ".repeat(2 * 1024 * 1024 + 1)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn only_tools_that_the_caller_may_call_are_listed() {
    let world = World::new().await;
    assert_eq!(world.tools("acme::a").await, Vec::<Value>::new());
    let mut ids = HashMap::new();
    for (name, capability, enabled) in [
        ("weather", Value::Null, true),
        ("erp", json!("erp.read"), true),
        ("hr", json!("hr.read"), true),
        ("unbound", Value::Null, true),
        ("off", Value::Null, false),
    ] {
        let body = json!({ "name": name, "endpoint_url": world.url("json"), "description": format!("the {name}"),
            "required_capability": capability, "enabled": enabled });
        ids.insert(name, world.register(body).await);
    }
    for name in ["weather", "erp", "hr", "off"] {
        world.bind("acme::a", &ids[name]).await;
    }
    world.bind("acme::b", &ids["unbound"]).await;
    world.fake.capabilities.lock().unwrap().insert("acme::a".to_owned(), vec!["erp.read".to_owned()]);

    let any = json!({ "type": "object", "properties": {} });
    let weather = json!({ "type": "object", "required": ["city"], "$comment": "" });
    assert_eq!(
        world.tools("acme::a").await,
        [
            json!({ "name": "erp", "description": "the erp", "inputSchema": any }),
            json!({ "name": "weather", "description": "the weather", "inputSchema": weather }),
        ]
    );
    // A binding is for one type of principal.
    let mut request = world.post("acme::a", LIST);
    request.headers_mut().insert("x-test-principal-type", "user".parse().unwrap());
    let (_, text) = world.send(request).await;
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["result"]["tools"], json!([]));
}

#[tokio::test]
async fn the_result_passes_through_as_the_upstream_server_wrote_it() {
    for kind in ["json", "sse", "endless-sse", "digits", "other-json", "untyped"] {
        let world = World::new().await;
        world.weather(kind).await;
        let expected = format!(r#"{{"jsonrpc":"2.0","id":1,"result":{RESULT}}}"#);
        assert_eq!(world.call("acme::a").await, expected, "{kind}");
        assert_eq!(
            world.calls().await,
            [
                json!({ "tool": "weather", "decision": "allowed" }),
                json!({ "tool": "weather", "outcome": "ok" })
            ],
            "{kind}"
        );
    }
}

#[tokio::test]
async fn a_result_that_is_no_tool_result_becomes_one_block_of_text() {
    for (kind, text) in [("plain", r#"{ "temperature" : 21 }"#), ("text", "warm")] {
        let world = World::new().await;
        world.weather(kind).await;
        let answer: Value = serde_json::from_str(&world.call("acme::a").await).unwrap();
        let expected = json!({ "content": [{ "type": "text", "text": text }], "isError": false });
        assert_eq!(answer["result"], expected, "{kind}");
    }
}

#[tokio::test]
async fn a_tool_that_says_it_failed_is_passed_through_and_audited_as_an_error() {
    let world = World::new().await;
    world.weather("tool-error").await;
    assert!(world.call("acme::a").await.contains(r#"{"content":[],"isError":true}"#));
    let outcome = json!({ "tool": "weather", "outcome": "error", "reason": "tool_error" });
    assert_eq!(world.calls().await[1], outcome);
}

#[tokio::test]
async fn the_upstream_server_sees_our_headers_and_none_of_the_caller_s() {
    let world = World::new().await;
    for (auth_type, expected) in [
        ("none", None),
        ("bearer", Some(("authorization", "Bearer k3y"))),
        ("api_key", Some(("x-api-key", "k3y"))),
    ] {
        let body = json!({ "name": "weather", "endpoint_url": world.url("json"), "auth_type": auth_type,
            "auth_secret_ref": expected.map(|_| "env://WEATHER_KEY") });
        let resource_id = world.register(body).await;
        world.bind("a", &resource_id).await;
        world.upstream.seen.lock().unwrap().clear();
        let mut request = world.post("acme::a", &CALL.replace(r#""id":1"#, r#""id":41"#));
        for name in [
            "cookie",
            "x-api-key",
            "x-forwarded-for",
            "x-cullis-session-token",
            "x-admin-secret",
            "forwarded",
        ] {
            request.headers_mut().insert(name, "callers".parse().unwrap());
        }
        assert_eq!(world.send(request).await.0, StatusCode::OK);
        let seen = world.upstream.seen.lock().unwrap().clone();
        let [(_, headers, body)] = seen.as_slice() else { panic!("one call, {} seen", seen.len()) };
        let mut found: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        found.sort_unstable();
        let (host, length) = (world.upstream_address.to_string(), body.len().to_string());
        let mut ours = vec![
            ("accept", "application/json, text/event-stream"),
            ("content-length", length.as_str()),
            ("content-type", "application/json"),
            ("host", host.as_str()),
            ("user-agent", concat!("mastio/", env!("CARGO_PKG_VERSION"))),
        ];
        ours.extend(expected);
        ours.sort_unstable();
        assert_eq!(found, ours, "{auth_type}");
        assert_eq!(
            body,
            r#"{"jsonrpc":"2.0","id":"41","method":"tools/call","params":{"name":"weather","arguments":{"city" : "Roma"}}}"#
        );
        assert_eq!(
            world.admin(Method::DELETE, &format!("/{resource_id}"), Value::Null).await.0,
            StatusCode::NO_CONTENT
        );
    }
}

#[tokio::test]
async fn a_credential_that_is_missing_here_is_an_upstream_authentication_error() {
    let world = World::new().await;
    let body = json!({ "name": "weather", "endpoint_url": world.url("json"), "auth_type": "bearer", "auth_secret_ref": "env://ABSENT" });
    let resource_id = world.register(body).await;
    world.bind("acme::a", &resource_id).await;
    assert_eq!(world.error("acme::a").await.0, -32002);
    assert_eq!(world.seen("json"), 0);
}

#[tokio::test]
async fn a_call_that_is_not_granted_is_denied_and_audited() {
    let world = World::new().await;
    let unknown = world.error("acme::a").await;
    assert_eq!(unknown, (-32004, "Unknown tool: weather".to_owned()));
    let body = json!({ "name": "weather", "endpoint_url": world.url("json"), "required_capability": "weather.read" });
    let resource_id = world.register(body).await;
    assert_eq!(world.error("acme::a").await.0, -32000);
    world.bind("acme::a", &resource_id).await;
    let missing = (-32003, "Forbidden: missing capability 'weather.read'".to_owned());
    assert_eq!(world.error("acme::a").await, missing);
    assert_eq!(world.seen("json"), 0);

    world.fake.capabilities.lock().unwrap().insert("acme::a".to_owned(), vec!["weather.read".to_owned()]);
    world.call("acme::a").await;
    assert_eq!(world.seen("json"), 1);
    let denied = |reason: &str| json!({ "tool": "weather", "decision": "denied", "reason": reason });
    assert_eq!(
        world.calls().await,
        [
            denied("unknown_tool"),
            denied("no_binding"),
            denied("missing_capability"),
            json!({ "tool": "weather", "decision": "allowed" }),
            json!({ "tool": "weather", "outcome": "ok" }),
        ]
    );
}

#[tokio::test]
async fn a_revoked_binding_ends_the_right_with_the_next_request_and_a_new_grant_restores_it() {
    let world = World::new().await;
    let resource_id = world.register(json!({ "name": "weather", "endpoint_url": world.url("json") })).await;
    let first = world.bind("acme::a", &resource_id).await;
    world.call("acme::a").await;

    let path = format!("/bindings/{first}");
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await.0, StatusCode::NO_CONTENT);
    assert_eq!(world.error("acme::a").await.0, -32000);
    assert!(world.tools("acme::a").await.is_empty());
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await.0, StatusCode::NOT_FOUND);

    let second = world.bind("acme::a", &resource_id).await;
    assert_ne!(first, second);
    world.call("acme::a").await;
    // Whoever holds the old id cannot end the new grant.
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await.0, StatusCode::NOT_FOUND);
    world.call("acme::a").await;
}

#[tokio::test]
async fn a_bare_name_and_a_canonical_id_are_the_same_agent() {
    let world = World::new().await;
    let resource_id = world.register(json!({ "name": "weather", "endpoint_url": world.url("json") })).await;
    let binding = world.bind("a", &resource_id).await;
    world.call("acme::a").await;
    world.call("a").await;
    let body = json!({ "agent_id": "acme::a", "resource_id": resource_id });
    assert_eq!(world.admin(Method::POST, "/bindings", body).await.0, StatusCode::CONFLICT);
    for other in ["other::a", "acme::b", "acme::a::a", "acme::acme::a"] {
        let (status, text) = world.rpc(other, CALL).await;
        assert_eq!((status, error_in(&text).0), (StatusCode::OK, -32000), "{other}");
    }
    // A predecessor's row with the bare name and without an organisation.
    let mut tx = world.gateway.store.write().await.unwrap();
    tx.execute(
        "UPDATE local_agent_resource_bindings SET agent_id = 'a', org_id = NULL WHERE binding_id = $1",
        values![binding],
    )
    .await
    .unwrap();
    tx.execute("UPDATE local_mcp_resources SET org_id = NULL, required_capability = ''", &[]).await.unwrap();
    tx.commit_unaudited().await.unwrap();
    world.call("acme::a").await;
    assert_eq!(world.tools("acme::a").await.len(), 1);
    assert_eq!(error_in(&world.rpc("other::a", CALL).await.1).0, -32000);
}

#[tokio::test]
async fn a_proof_is_good_for_one_request_of_any_kind() {
    let world = World::new().await;
    world.weather("json").await;
    let replay = |body: &str| {
        let request = Request::post("/v1/mcp").header("authorization", "DPoP acme::a").header("dpop", "once");
        request.body(Body::from(body.to_owned())).unwrap()
    };
    assert_eq!(world.send(replay(CALL)).await.0, StatusCode::OK);
    for body in [CALL, LIST, "{", r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#] {
        let (status, text) = world.send(replay(body)).await;
        assert_eq!(
            (status, text.as_str()),
            (StatusCode::UNAUTHORIZED, r#"{"detail":"DPoP proof replay detected"}"#)
        );
    }
    assert_eq!(world.seen("json"), 1);
    assert_eq!(world.calls().await.len(), 2);
    for (first, second) in [(LIST, CALL), ("{", LIST)] {
        let request = |body: &str| {
            let request =
                Request::post("/v1/mcp").header("authorization", "DPoP acme::a").header("dpop", first);
            request.body(Body::from(body.to_owned())).unwrap()
        };
        assert_ne!(world.send(request(first)).await.0, StatusCode::UNAUTHORIZED);
        assert_eq!(world.send(request(second)).await.0, StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test]
async fn a_caller_whose_standing_changed_is_judged_once_more_and_then_refused() {
    let world = World::new().await;
    world.weather("json").await;
    world.fake.stale.store(1, Ordering::SeqCst);
    world.call("acme::a").await;
    assert_eq!(world.fake.judged.load(Ordering::SeqCst), 2);
    assert_eq!(world.fake.refreshed.load(Ordering::SeqCst), 1);

    world.fake.stale.store(2, Ordering::SeqCst);
    let (status, text) = world.rpc("acme::a", CALL).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(!text.contains("use_dpop_nonce"));
    assert_eq!(world.seen("json"), 1);
    assert_eq!(world.calls().await.len(), 2);
}

#[tokio::test]
async fn when_the_audit_log_cannot_be_written_no_tool_is_called() {
    let world = World::new().await;
    world.weather("json").await;
    let mut tx = world.gateway.store.write().await.unwrap();
    tx.execute(
        "CREATE TRIGGER broken BEFORE INSERT ON audit_events BEGIN SELECT RAISE(ABORT, 'disk'); END",
        &[],
    )
    .await
    .unwrap();
    tx.commit_unaudited().await.unwrap();
    assert_eq!(world.rpc("acme::a", CALL).await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(world.seen("json"), 0);
}

#[tokio::test]
async fn an_outcome_that_cannot_be_recorded_is_not_told() {
    let world = World::new().await;
    world.weather("slow").await;
    let request = world.post("acme::a", CALL);
    let router = world.router.clone();
    let call = tokio::spawn(async move { send(&router, request).await });
    wait_until(|| world.seen("slow") == 1).await;
    let mut tx = world.gateway.store.write().await.unwrap();
    tx.execute(
        "CREATE TRIGGER broken BEFORE INSERT ON audit_events BEGIN SELECT RAISE(ABORT, 'disk'); END",
        &[],
    )
    .await
    .unwrap();
    tx.commit_unaudited().await.unwrap();
    world.upstream.gate.notify_waiters();
    assert_eq!(call.await.unwrap().0, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_outcome_in_the_log() {
    let world = World::new().await;
    world.weather("slow").await;
    let request = world.post("acme::a", CALL);
    let router = world.router.clone();
    let call = tokio::spawn(async move { send(&router, request).await });
    wait_until(|| world.seen("slow") == 1).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    world.upstream.gate.notify_waiters();
    while world.calls().await.len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.calls().await[1]["outcome"], "ok");
}

#[tokio::test]
async fn arguments_are_refused_above_128_kib_of_compact_json() {
    let world = World::new().await;
    world.weather("json").await;
    let call = |spaces: usize, letters: usize| {
        let arguments = format!(r#"{{{}"a":"{}"}}"#, " ".repeat(spaces), "x".repeat(letters));
        CALL.replace(r#"{"city" : "Roma"}"#, &arguments)
    };
    // {"a":""} has eight bytes of its own.
    for (spaces, letters, code) in
        [(0, 128 * 1024 - 8, None), (100_000, 128 * 1024 - 8, None), (0, 128 * 1024 - 7, Some(-32602))]
    {
        let (status, text) = world.rpc("acme::a", &call(spaces, letters)).await;
        assert_eq!(status, StatusCode::OK);
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["error"]["code"].as_i64(), code, "{spaces} spaces, {letters} letters");
    }
    let denied = json!({ "tool": "weather", "decision": "denied", "reason": "arguments_too_large" });
    assert_eq!(world.calls().await.last(), Some(&denied));
}

#[tokio::test]
async fn every_upstream_failure_has_its_code_and_its_word_in_the_log() {
    for (kind, code, reason) in [
        ("401", -32002, "upstream_authentication_refused"),
        ("403", -32002, "upstream_authentication_refused"),
        ("404", -32003, "upstream_status"),
        ("500", -32003, "upstream_status"),
        ("redirect", -32003, "upstream_redirect"),
        ("garbage", -32003, "upstream_answer_unreadable"),
        ("html", -32003, "upstream_content_type"),
        ("not-quite-sse", -32003, "upstream_content_type"),
        ("empty", -32003, "upstream_answer_unreadable"),
        ("no-result", -32003, "upstream_answer_unreadable"),
        ("other-id", -32003, "upstream_answer_unreadable"),
        ("sse-other-id", -32003, "upstream_answer_unreadable"),
        ("announced-huge", -32003, "upstream_answer_too_large"),
        ("huge", -32003, "upstream_answer_too_large"),
        ("rpc-error", -32003, "upstream_error"),
    ] {
        let world = World::new().await;
        world.weather(kind).await;
        let (found, message) = world.error("acme::a").await;
        assert_eq!(found, code, "{kind}: {message}");
        assert!(!message.contains("127.0.0.1") && !message.contains("stack trace"), "{kind}: {message}");
        assert!(message.len() < 600, "{kind}: {message}");
        assert_eq!(
            world.calls().await,
            [
                json!({ "tool": "weather", "decision": "allowed" }),
                json!({ "tool": "weather", "outcome": "error", "reason": reason }),
            ],
            "{kind}"
        );
        // A redirect is not followed.
        assert_eq!(world.seen("json"), 0, "{kind}");
    }
}

#[tokio::test]
async fn an_upstream_server_that_is_down_is_unreachable() {
    let world = World::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/json", listener.local_addr().unwrap());
    drop(listener);
    let resource_id = world.register(json!({ "name": "weather", "endpoint_url": url })).await;
    world.bind("acme::a", &resource_id).await;
    assert_eq!(world.error("acme::a").await, (-32001, "upstream server is unreachable".to_owned()));
    assert_eq!(world.calls().await[1]["reason"], "upstream_unreachable");
}

#[tokio::test]
async fn an_upstream_server_that_is_slow_is_not_waited_for() {
    let world = World::with(&["127.0.0.1"], Duration::from_millis(50)).await;
    world.weather("slow").await;
    assert_eq!(world.error("acme::a").await, (-32001, "upstream server did not answer in time".to_owned()));
    assert_eq!(world.calls().await[1]["reason"], "upstream_timeout");
}

#[tokio::test]
async fn over_its_bound_of_calls_an_upstream_host_is_busy_at_once() {
    let world = World::new().await;
    world.weather("slow").await;
    let calls: Vec<_> = (0..CALLS_PER_HOST_MAX)
        .map(|_| {
            let (router, request) = (world.router.clone(), world.post("acme::a", CALL));
            tokio::spawn(async move { send(&router, request).await })
        })
        .collect();
    wait_until(|| world.seen("slow") == CALLS_PER_HOST_MAX).await;
    let (code, message) = world.error("acme::a").await;
    assert_eq!((code, message.as_str()), (-32001, "upstream server has too many calls under way: try again"));
    let busy =
        json!({ "tool": "weather", "decision": "allowed", "outcome": "error", "reason": "upstream_busy" });
    assert_eq!(world.calls().await.last(), Some(&busy));
    world.upstream.gate.notify_waiters();
    for call in calls {
        let (status, text) = call.await.unwrap();
        assert!(status == StatusCode::OK && text.contains(RESULT), "{text}");
    }
    // Every place is free again.
    let (router, request) = (world.router.clone(), world.post("acme::a", CALL));
    let call = tokio::spawn(async move { send(&router, request).await });
    wait_until(|| world.seen("slow") == CALLS_PER_HOST_MAX + 1).await;
    world.upstream.gate.notify_waiters();
    assert!(call.await.unwrap().1.contains(RESULT));
}

#[tokio::test]
async fn a_private_address_is_refused_unless_the_operator_listed_the_host() {
    let world = World::with(&[], Duration::from_secs(9)).await;
    let port = world.upstream_address.port();
    for literal in
        ["127.0.0.1", "[::1]", "10.0.0.7", "169.254.169.254", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"]
    {
        let body = json!({ "name": "weather", "endpoint_url": format!("http://{literal}:{port}/json") });
        let (status, answer) = world.admin(Method::POST, "", body).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{literal}");
        assert_eq!(answer["detail"][0]["loc"], json!(["body", "endpoint_url"]), "{literal}");
    }
    // A name is looked up when it is called.
    let localhost = format!("http://localhost:{port}/json");
    let resource_id = world.register(json!({ "name": "weather", "endpoint_url": localhost })).await;
    world.bind("acme::a", &resource_id).await;
    let refused = (-32001, "upstream server has an address that is not allowed".to_owned());
    assert_eq!(world.error("acme::a").await, refused);
    assert_eq!(world.calls().await[1]["reason"], "upstream_address_refused");

    // A row from before the guard is no way round it.
    let mut tx = world.gateway.store.write().await.unwrap();
    tx.execute("UPDATE local_mcp_resources SET endpoint_url = $1", values![world.url("json")]).await.unwrap();
    tx.commit_unaudited().await.unwrap();
    assert_eq!(world.error("acme::a").await, refused);
    assert_eq!(world.upstream.seen.lock().unwrap().len(), 0);

    let listed = format!("LOCALHOST:{port}");
    for (entry, allowed) in [("localhost", true), (listed.as_str(), true), ("localhost:1", false)] {
        let upstream = client(&[entry]);
        let endpoint = upstream.endpoint(&localhost, &[]).unwrap();
        let arguments = jsonrpc::empty_object();
        let result = upstream.call(&endpoint, &Credential::None, "1", "weather", &arguments).await;
        assert_eq!(result.is_ok(), allowed, "{entry}: {result:?}");
    }
}

#[tokio::test]
async fn an_endpoint_outside_its_allowed_domains_is_refused_when_registered_and_when_called() {
    let world = World::new().await;
    for (domains, status) in [
        (json!([]), StatusCode::CREATED),
        (json!(["127.0.0.1", "*.example.com"]), StatusCode::CREATED),
        (json!(["*.example.com"]), StatusCode::UNPROCESSABLE_ENTITY),
        (json!(["exa mple"]), StatusCode::UNPROCESSABLE_ENTITY),
        (json!([""]), StatusCode::UNPROCESSABLE_ENTITY),
    ] {
        let name = format!("t{}", world.proofs.fetch_add(1, Ordering::SeqCst));
        let body = json!({ "name": name, "endpoint_url": world.url("json"), "allowed_domains": domains });
        assert_eq!(world.admin(Method::POST, "", body).await.0, status, "{domains}");
    }
    world.weather("json").await;
    for unreadable in ["[\"other.example\"]", "{}", "null"] {
        let mut tx = world.gateway.store.write().await.unwrap();
        tx.execute("UPDATE local_mcp_resources SET allowed_domains = $1", values![unreadable]).await.unwrap();
        tx.commit_unaudited().await.unwrap();
        assert_eq!(world.error("acme::a").await.0, -32001, "{unreadable}");
    }
}

#[tokio::test]
async fn a_resource_is_registered_listed_and_deleted_with_its_bindings() {
    let world = World::new().await;
    let url = world.url("json");
    let body = json!({ "name": "weather", "endpoint_url": url, "description": "Says how it is outside" });
    let (status, created) = world.admin(Method::POST, "", body.clone()).await;
    assert_eq!(status, StatusCode::CREATED);
    let resource_id = created["resource_id"].as_str().unwrap().to_owned();
    let expected = json!({ "resource_id": resource_id, "name": "weather", "endpoint_url": url,
        "description": "Says how it is outside", "auth_type": "none", "required_capability": null, "enabled": true,
        "org_id": "acme", "created_at": "2026-04-23T19:04:12Z" });
    assert_eq!(created, expected);
    assert_eq!(world.admin(Method::POST, "", body).await.0, StatusCode::CONFLICT);
    assert_eq!(world.admin(Method::GET, "", Value::Null).await, (StatusCode::OK, json!([expected])));

    let grant = json!({ "agent_id": "acme::a", "resource_id": resource_id, "principal_type": "workload" });
    let (status, binding) = world.admin(Method::POST, "/bindings", grant.clone()).await;
    assert_eq!(status, StatusCode::CREATED);
    let binding_id = binding["binding_id"].as_str().unwrap().to_owned();
    let expected = json!({ "binding_id": binding_id, "agent_id": "acme::a", "principal_type": "workload",
        "resource_id": resource_id, "org_id": "acme", "granted_at": "2026-04-23T19:04:12Z", "revoked_at": null });
    assert_eq!(binding, expected);
    assert_eq!(world.admin(Method::POST, "/bindings", grant).await.0, StatusCode::CONFLICT);
    for (query, found) in [
        ("", 1),
        ("?agent_id=a", 1),
        ("?agent_id=acme%3A%3Aa", 1),
        ("?agent_id=b", 0),
        ("?resource_id=none", 0),
        (format!("?resource_id={resource_id}&agent_id=a&limit=5").as_str(), 1),
        (format!("?after={binding_id}").as_str(), 0),
    ] {
        let (status, list) = world.admin(Method::GET, &format!("/bindings{query}"), Value::Null).await;
        assert_eq!((status, list.as_array().unwrap().len()), (StatusCode::OK, found), "{query}");
    }
    assert_eq!(
        world.admin(Method::GET, "/bindings?limit=x", Value::Null).await.0,
        StatusCode::UNPROCESSABLE_ENTITY
    );

    let path = format!("/{resource_id}");
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await, (StatusCode::NO_CONTENT, Value::Null));
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await.0, StatusCode::NOT_FOUND);
    assert_eq!(world.admin(Method::GET, "/bindings", Value::Null).await.1, json!([]));
    let unknown = json!({ "agent_id": "a", "resource_id": resource_id });
    assert_eq!(world.admin(Method::POST, "/bindings", unknown).await.0, StatusCode::NOT_FOUND);
    assert_eq!(world.admin(Method::DELETE, "/bindings/none", Value::Null).await.0, StatusCode::NOT_FOUND);

    let events: Vec<(String, String)> =
        world.events().await.into_iter().map(|(kind, actor, _)| (kind, actor)).collect();
    let admin = |kind: &str| (kind.to_owned(), "admin".to_owned());
    assert_eq!(
        events,
        [admin("mcp.resource_created"), admin("mcp.binding_created"), admin("mcp.resource_deleted")]
    );
    assert_eq!(world.events().await[2].2["bindings_deleted"], 1);
}

#[tokio::test]
async fn revoking_a_binding_leaves_its_event_and_its_row() {
    let world = World::new().await;
    let resource_id = world.register(json!({ "name": "weather", "endpoint_url": world.url("json") })).await;
    let binding_id = world.bind("a", &resource_id).await;
    let path = format!("/bindings/{binding_id}");
    assert_eq!(world.admin(Method::DELETE, &path, Value::Null).await.0, StatusCode::NO_CONTENT);
    let list = world.admin(Method::GET, "/bindings", Value::Null).await.1;
    assert_eq!(list[0]["revoked_at"], "2026-04-23T19:04:12Z");
    let (kind, _, details) = world.events().await.pop().unwrap();
    assert_eq!(kind, "mcp.binding_revoked");
    assert_eq!(
        details,
        json!({ "binding_id": binding_id, "agent_id": "acme::a", "principal_type": "agent", "resource_id": resource_id })
    );
}

#[tokio::test]
async fn a_registration_that_is_not_valid_names_each_field() {
    let world = World::new().await;
    let valid = json!({ "name": "weather", "endpoint_url": world.url("json") });
    for (field, value) in [
        ("name", json!("")),
        ("name", json!("a b")),
        ("name", json!("x".repeat(65))),
        ("endpoint_url", json!("ftp://127.0.0.1/")),
        ("endpoint_url", json!("http://user:pw@127.0.0.1/")),
        ("endpoint_url", json!("http://127.0.0.1/#x")),
        ("endpoint_url", json!("not a url")),
        ("description", json!("x".repeat(4097))),
        ("auth_type", json!("mtls")),
        ("auth_secret_ref", json!("vault://kv/weather")),
        ("auth_secret_ref", json!("env://MCP_PROXY_ADMIN_SECRET")),
        ("auth_secret_ref", json!("env://mcp_proxy_db_encryption_key")),
        ("auth_secret_ref", json!("env://")),
        ("required_capability", json!("")),
        ("required_capability", json!("a b")),
        ("org_id", json!("other")),
    ] {
        let mut body = valid.clone();
        body[field] = value.clone();
        let (status, answer) = world.admin(Method::POST, "", body).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{field} {value}");
        assert_eq!(answer["detail"].as_array().unwrap().len(), 1, "{answer}");
        assert_eq!(answer["detail"][0]["loc"], json!(["body", field]), "{answer}");
    }
    let bearer = json!({ "name": "w", "endpoint_url": world.url("json"), "auth_type": "bearer" });
    assert_eq!(
        world.admin(Method::POST, "", bearer).await.1["detail"][0]["loc"],
        json!(["body", "auth_secret_ref"])
    );
    for body in [json!({ "name": "weather" }), json!([]), json!({ "name": 1, "endpoint_url": "http://a/" })] {
        assert_eq!(world.admin(Method::POST, "", body).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    }
    for body in [
        json!({ "agent_id": "", "resource_id": "r" }),
        json!({ "agent_id": "a", "resource_id": "r", "principal_type": "root" }),
    ] {
        assert_eq!(world.admin(Method::POST, "/bindings", body).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    }
    assert_eq!(world.events().await, []);
}

#[tokio::test]
async fn only_an_administrator_reaches_the_registry() {
    let world = World::new().await;
    for (secret, status) in [(None, StatusCode::UNAUTHORIZED), (Some("wrong"), StatusCode::FORBIDDEN)] {
        for (method, path) in [
            (Method::POST, ""),
            (Method::GET, ""),
            (Method::DELETE, "/x"),
            (Method::POST, "/bindings"),
            (Method::GET, "/bindings"),
            (Method::DELETE, "/bindings/x"),
        ] {
            let mut request =
                Request::builder().method(&method).uri(format!("/v1/admin/mcp-resources{path}"));
            if let Some(secret) = secret {
                request = request.header("x-admin-secret", secret);
            }
            let (found, _) = world.send(request.body(Body::from("{}")).unwrap()).await;
            assert_eq!(found, status, "{method} {path}");
        }
    }
}

#[tokio::test]
async fn a_schema_that_is_too_large_or_absent_does_not_stop_the_registration() {
    let world = World::new().await;
    world.upstream.schema_bytes.store(SCHEMA_BYTES_MAX, Ordering::SeqCst);
    world.weather("json").await;
    assert_eq!(world.tools("acme::a").await[0]["inputSchema"], json!({ "type": "object", "properties": {} }));
}

/// Waits for something that a task of the test brings about.
pub(super) async fn wait_until(reached: impl Fn() -> bool) {
    let waiting = async {
        while !reached() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("reached in half a minute");
}
