//! A deploy with two agents, and what operators and agents do with it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};
use serde_json::{Value, json};

use crate::harness::forge::{Key, Response, Wire, now, unique};
use crate::harness::sdk::Program;
use crate::harness::{ADMIN_SECRET, DEADLINE, Database, Deploy, certificates, required_environment};

pub const MCP: &str = "/v1/mcp";
/// What a client of Streamable HTTP accepts.
pub const STREAMS: (&str, &str) = ("Accept", "application/json, text/event-stream");

/// The Python that has the official SDK and FastMCP.
pub fn python() -> String {
    required_environment("MASTIO_TEST_MCP_PYTHON")
}

/// A deploy, Alice and Bob.
pub struct World {
    pub deploy: Deploy,
    pub alice: Caller,
    pub bob: Caller,
}

/// An agent with its files and a token.
pub struct Caller {
    pub id: String,
    pub folder: PathBuf,
    key: Arc<Key>,
    token: String,
    wire: Wire,
    url: String,
    port: u16,
}

impl World {
    /// Started, on `database`.
    pub fn new(database: Database) -> Self {
        Self::of(Deploy::empty().on(database))
    }

    /// On a deploy that is not started.
    pub fn of(deploy: Deploy) -> Self {
        let mut deploy = deploy.set("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0");
        deploy.start();
        let (alice, bob) = (Caller::new(&deploy, "alice"), Caller::new(&deploy, "bob"));
        Self { deploy, alice, bob }
    }

    /// Registers an MCP server and gives what the answer says.
    pub fn register(&self, name: &str, url: &str, more: &Value) -> Value {
        let mut body = json!({ "name": name, "endpoint_url": url });
        for (name, value) in more.as_object().into_iter().flatten() {
            body[name] = value.clone();
        }
        self.deploy.admin_post("/v1/admin/mcp-upstreams", &body).expect(201)
    }

    /// Registers an MCP server, approves all that it has and binds `callers` to it. Gives its id.
    pub fn server(&self, name: &str, url: &str, callers: &[&Caller]) -> String {
        self.server_with(name, url, &json!({}), callers)
    }

    pub fn server_with(&self, name: &str, url: &str, more: &Value, callers: &[&Caller]) -> String {
        let registered = self.register(name, url, more);
        assert_eq!(registered["discovery_error"], Value::Null, "{registered}");
        assert_eq!(registered["found"]["unusable"], json!([]), "{registered}");
        let id = registered["upstream_id"].as_str().unwrap().to_owned();
        self.approve_all();
        for caller in callers {
            self.deploy.let_call(&caller.id, &id);
        }
        id
    }

    /// Approves whatever is not.
    pub fn approve_all(&self) {
        let tools = self.deploy.admin_get("/v1/admin/mcp-tools").expect(200);
        for tool in tools.as_array().unwrap().iter().filter(|tool| tool["standing"] != "approved") {
            self.approve(tool);
        }
    }

    pub fn approve(&self, tool: &Value) {
        let path = format!("/v1/admin/mcp-tools/{}/approve", tool["tool_id"].as_str().unwrap());
        let body = json!({ "digest": tool["found_digest"], "accept_imitation": true });
        self.deploy.admin_post(&path, &body).expect(200);
    }

    pub fn refresh(&self, upstream: &str) -> Value {
        self.deploy.admin_post(&format!("/v1/admin/mcp-upstreams/{upstream}/refresh"), &json!({})).expect(200)
    }

    /// A place where MCP clients without credentials speak as `caller`, and its URL.
    pub fn front(&self, caller: &Caller) -> (Program, String) {
        let told = json!({
            "url": self.deploy.url(), "agent_id": caller.id, "key": caller.folder.join("agent.key"),
            "ca": caller.folder.join("ca.crt"),
        });
        let mut front = Program::start("node", "mcp/front.mjs", &[&told.to_string()]);
        let url = front.read()["url"].as_str().unwrap().to_owned();
        (front, url)
    }

    /// The details of the newest event of a type.
    pub fn last(&self, event_type: &str) -> Value {
        let path = format!("/v1/admin/audit?event_type={event_type}&limit=1");
        self.deploy.admin_get(&path).expect(200)[0]["details"].clone()
    }

    /// The details of all events of a type, newest first.
    pub fn events(&self, event_type: &str) -> Vec<Value> {
        let path = format!("/v1/admin/audit?event_type={event_type}&limit=10000");
        let events = self.deploy.admin_get(&path).expect(200);
        events.as_array().unwrap().iter().map(|event| event["details"].clone()).collect()
    }

    /// Sends `body` as the administrator by `method`.
    pub fn admin(&self, method: &str, path: &str, body: &Value) -> crate::harness::Answer {
        let secret = format!("X-Admin-Secret: {ADMIN_SECRET}");
        let body = body.to_string();
        self.deploy
            .curl(path, &["-H", &secret, "-H", "Content-Type: application/json", "-X", method, "-d", &body])
    }
}

impl Caller {
    fn new(deploy: &Deploy, name: &str) -> Self {
        let created = deploy
            .admin_post("/v1/admin/agents", &json!({ "agent_name": name, "capabilities": [] }))
            .expect(201);
        let folder = deploy.folder().join(name);
        fs::create_dir(&folder).unwrap();
        let ca = deploy.get("/pki/ca.crt").body;
        let text = |name: &str| created[name].as_str().unwrap().to_owned();
        for (file, text) in
            [("agent.crt", &text("cert_pem")), ("agent.key", &text("private_key_pem")), ("ca.crt", &ca)]
        {
            fs::write(folder.join(file), text).unwrap();
        }
        let mut caller = Self {
            id: text("agent_id"),
            folder,
            key: Arc::new(Key::new()),
            token: String::new(),
            wire: Wire::new(deploy.port(), &ca, None),
            url: deploy.url(),
            port: deploy.port(),
        };
        caller.log_in(&text("cert_pem"), &text("private_key_pem"));
        caller
    }

    fn log_in(&mut self, chain: &str, key_pem: &str) {
        let x5c: Vec<String> = certificates(chain)
            .iter()
            .map(|pem| pem.lines().filter(|line| !line.starts_with("-----")).collect())
            .collect();
        let header = json!({ "alg": "ES256", "typ": "JWT", "x5c": x5c });
        let claims = json!({
            "sub": self.id, "iss": self.id, "aud": "agent-trust-broker", "iat": now(), "exp": now() + 300,
            "jti": unique(),
        });
        let assertion = Key::from_pem(key_pem).sign(&header, &claims);
        let answer = self.log_in_with(&assertion);
        assert_eq!(answer.status, 200, "{answer:?}");
        self.token = answer.json()["access_token"].as_str().unwrap().to_owned();
    }

    /// The access token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The headers of one request.
    fn credentials(&self, method: &str) -> [(String, String); 2] {
        self.credentials_of(method, &self.token)
    }

    fn credentials_of(&self, method: &str, token: &str) -> [(String, String); 2] {
        let proof = self.key.proof(method, &format!("{}{MCP}", self.url), Some(token));
        [("Authorization".to_owned(), format!("DPoP {token}")), ("DPoP".to_owned(), proof)]
    }

    /// A list of tools, asked for with something else in the token's place, and a good proof beside it.
    pub fn list_with(&self, token: &str) -> Response {
        let credentials = self.credentials_of("POST", token);
        let mut headers: Vec<(&str, &str)> = vec![("Content-Type", "application/json")];
        headers.extend(credentials.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        self.wire.send("POST", MCP, &headers, r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#)
    }

    /// A request for a token with this in the assertion's place, and a good proof beside it.
    pub fn log_in_with(&self, assertion: &str) -> Response {
        let proof = self.key.proof("POST", &format!("{}/v1/auth/token", self.url), None);
        let body = json!({ "client_assertion": assertion }).to_string();
        let headers = [("Content-Type", "application/json"), ("DPoP", proof.as_str())];
        self.wire.send("POST", "/v1/auth/token", &headers, &body)
    }

    /// One request to the gateway.
    pub fn send(&self, method: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let credentials = self.credentials(method);
        let mut all: Vec<(&str, &str)> = vec![("Content-Type", "application/json")];
        all.extend(credentials.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        all.extend_from_slice(headers);
        self.wire.send(method, MCP, &all, body)
    }

    /// A cold call of a tool, as the SDK makes it.
    pub fn call(&self, tool: &str, arguments: &Value) -> Value {
        let body = call(tool, arguments);
        let answer = self.send("POST", &[], &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    /// The names of the tools that the caller is offered.
    pub fn tools(&self) -> Vec<String> {
        let answer =
            self.send("POST", &[], &json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/list" }).to_string());
        let tools = answer.json()["result"]["tools"].clone();
        tools.as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Begins a session of 2025-11-25. Gives its id.
    pub fn session(&self) -> String {
        self.session_of("2025-11-25")
    }

    /// Begins a session of a revision. Gives its id.
    pub fn session_of(&self, revision: &str) -> String {
        let params = json!({ "protocolVersion": revision, "capabilities": {},
            "clientInfo": { "name": "t", "version": "1" } });
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params });
        let answer = self.send("POST", &[STREAMS], &body.to_string());
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.header("mcp-session-id").unwrap().to_owned()
    }

    /// A request of 2026-07-28 with the headers that belong to it.
    pub fn modern(&self, method: &str, name: Option<&str>, params: &Value) -> Response {
        let (body, headers) = modern(method, name, params);
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.send("POST", &headers, &body)
    }

    /// A request whose answer is a stream, read as it comes.
    pub fn open(&self, method: &str, headers: &[(&str, &str)], body: &str) -> Events {
        let mut stream = self.wire.connect();
        let mut request = format!("{method} {MCP} HTTP/1.1\r\nHost: localhost:{}\r\n", self.port);
        let credentials = self.credentials(method);
        let ours = [("Content-Type".to_owned(), "application/json".to_owned())];
        for (name, value) in credentials.iter().chain(&ours) {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        stream.write_all(request.as_bytes()).unwrap();
        Events::read(stream)
    }
}

/// The body and headers of a request of 2026-07-28.
pub fn modern(method: &str, name: Option<&str>, params: &Value) -> (String, Vec<(&'static str, String)>) {
    let mut params = params.clone();
    params["_meta"] = json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {} });
    let body = json!({ "jsonrpc": "2.0", "id": 5, "method": method, "params": params }).to_string();
    let mut headers = vec![
        ("Accept", STREAMS.1.to_owned()),
        ("Mcp-Protocol-Version", "2026-07-28".to_owned()),
        ("Mcp-Method", method.to_owned()),
    ];
    headers.extend(name.map(|name| ("Mcp-Name", name.to_owned())));
    (body, headers)
}

/// The body of a call.
pub fn call(tool: &str, arguments: &Value) -> String {
    let params = json!({ "name": tool, "arguments": arguments });
    json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params }).to_string()
}

/// An open stream of events.
pub struct Events {
    pub status: u16,
    /// The ids of the events so far.
    pub ids: Vec<String>,
    lines: BufReader<StreamOwned<ClientConnection, TcpStream>>,
}

impl Events {
    fn read(stream: StreamOwned<ClientConnection, TcpStream>) -> Self {
        stream.sock.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        while line != "\r\n" {
            line.clear();
            lines.read_line(&mut line).unwrap();
        }
        Self { status, ids: Vec::new(), lines }
    }

    /// The next message. Nothing when the stream has ended.
    pub fn next(&mut self) -> Option<Value> {
        loop {
            let mut line = String::new();
            // Chunk sizes and comments are lines of their own: we write each event as a whole.
            if self.lines.read_line(&mut line).ok()? == 0 || line == "0\r\n" {
                return None;
            }
            if let Some(id) = line.strip_prefix("id: ") {
                self.ids.push(id.trim_end().to_owned());
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data.trim_end()).unwrap());
            }
        }
    }

    /// The next message of this method.
    pub fn wait(&mut self, method: &str) -> Value {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let message = self.next().unwrap_or_else(|| panic!("the stream ended before {method}"));
            if message["method"] == method {
                return message;
            }
        }
        panic!("waited in vain for {method}");
    }

    /// Whether nothing is said for so long.
    pub fn is_quiet(&mut self, lasting: Duration) -> bool {
        self.lines.get_ref().sock.set_read_timeout(Some(lasting)).unwrap();
        let quiet = loop {
            let mut line = String::new();
            match self.lines.read_line(&mut line) {
                Err(_) | Ok(0) => break true,
                Ok(_) if line.starts_with("data:") => break false,
                Ok(_) => {}
            }
        };
        self.lines.get_ref().sock.set_read_timeout(Some(DEADLINE)).unwrap();
        quiet
    }
}
