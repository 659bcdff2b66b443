//! Calls of a trivial tool through the gateway, beside the same calls straight to its server; and open streams.

use std::net::TcpListener;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::Failure;
use crate::client::{Connection, Target};
use crate::load::{self, Load};
use crate::server::{ADMIN_SECRET, Deploy, Server};

/// Streams that are opened.
const STREAMS: usize = 1000;
/// Proofs are made for so many calls a second: more than there will be.
const MOST_PER_S: f64 = 8000.0;
/// Proofs are good for a minute; they are made on all cores just before.
const LONGEST: Duration = Duration::from_secs(10);

/// What a call takes, straight and through us.
#[derive(Serialize)]
pub struct Calls {
    pub connections: usize,
    pub direct: Load,
    pub through: Load,
    pub added_p50_ms: f64,
    pub added_p99_ms: f64,
}

/// What open streams take.
#[derive(Serialize)]
pub struct OpenStreams {
    pub streams: usize,
    pub before_mib: f64,
    pub with_mib: f64,
}

/// Registers a trivial server, lets every agent call it, and measures.
pub async fn measure(
    deploy: &Deploy,
    server: &Server,
    lasting: Duration,
) -> Result<(Vec<Calls>, Option<OpenStreams>), Failure> {
    let lasting = lasting.min(LONGEST);
    let port = trivial_server()?;
    let admin = load::target(deploy, server, 0)?;
    let mut admin_connection = admin.connect().await?;
    let mut ask = async |path: &str, body: Value, expected: u16| -> Result<Value, Failure> {
        let request = admin.request("POST", path, &[("x-admin-secret", ADMIN_SECRET)], &body.to_string());
        Ok(serde_json::from_slice(admin_connection.expect(&request, expected).await?)?)
    };
    let endpoint = format!("http://127.0.0.1:{port}/mcp");
    let registered =
        ask("/v1/admin/mcp-upstreams", json!({ "name": "trivial", "endpoint_url": endpoint }), 201).await?;
    let digest = mastio::gateway::definition::sha256_hex(
        mastio::gateway::definition::canonical(&serde_json::value::to_raw_value(&tool())?)?.as_bytes(),
    );
    ask("/v1/admin/mcp-tools/echo/approve", json!({ "digest": digest }), 200).await?;
    for files in &deploy.files {
        let binding = json!({ "agent_id": files.agent_id, "resource_id": registered["upstream_id"] });
        ask("/v1/admin/mcp-resources/bindings", binding, 201).await?;
    }
    let mut calls = Vec::new();
    for connections in [1, 16, 32, 64] {
        let straight = Target::plain(port);
        let request = straight.request("POST", "/mcp", &[], &call().to_string());
        let direct = load::repeated(server, &straight, &request, connections, lasting).await?;
        let through = through(deploy, server, connections, lasting).await?;
        let (added_p50_ms, added_p99_ms) = (through.p50_ms - direct.p50_ms, through.p99_ms - direct.p99_ms);
        calls.push(Calls { connections, direct, through, added_p50_ms, added_p99_ms });
    }
    let streams = open_streams(deploy, server).await?;
    Ok((calls, Some(streams)))
}

async fn through(
    deploy: &Deploy,
    server: &Server,
    connections: usize,
    lasting: Duration,
) -> Result<Load, Failure> {
    let mut agents = Vec::new();
    for index in 0..connections {
        let mut agent = load::agent(deploy, server, &deploy.files[index % deploy.files.len()])?;
        agent.login().await?;
        agents.push((agent, load::target(deploy, server, index)?));
    }
    let each = (MOST_PER_S * lasting.as_secs_f64()) as usize / connections + 1;
    let body = call().to_string();
    let connections: Vec<_> = agents.iter().map(|(agent, target)| (agent, target)).collect();
    let prepared = load::prepare(&connections, each, |agent, target| {
        let (authorization, proof) = agent.prepare_call()?;
        let headers = [("authorization", authorization.as_str()), ("dpop", proof.as_str())];
        Ok(target.request("POST", "/v1/mcp", &headers, &body))
    })?;
    load::measure(server, prepared, lasting).await
}

async fn open_streams(deploy: &Deploy, server: &Server) -> Result<OpenStreams, Failure> {
    let before_mib = server.memory_mib("VmRSS")?;
    let mut agents = Vec::new();
    for files in &deploy.files {
        let mut agent = load::agent(deploy, server, files)?;
        agent.login().await?;
        agents.push(agent);
    }
    let meta = json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {} });
    let params = json!({ "_meta": meta, "notifications": { "toolsListChanged": true } });
    let body =
        json!({ "jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": params }).to_string();
    let mut open: Vec<Connection> = Vec::new();
    for index in 0..STREAMS {
        let target = load::target(deploy, server, index)?;
        let (authorization, proof) = agents[index % agents.len()].prepare_call()?;
        let headers = [
            ("authorization", authorization.as_str()),
            ("dpop", proof.as_str()),
            ("accept", "application/json, text/event-stream"),
            ("mcp-protocol-version", "2026-07-28"),
            ("mcp-method", "subscriptions/listen"),
        ];
        let mut connection = target.connect().await?;
        let request = target.request("POST", "/v1/mcp", &headers, &body);
        connection.open(&request, "notifications/subscriptions/acknowledged").await?;
        open.push(connection);
    }
    Ok(OpenStreams { streams: open.len(), before_mib, with_mib: server.memory_mib("VmRSS")? })
}

fn tool() -> Value {
    json!({ "name": "echo", "inputSchema": { "type": "object", "properties": { "text": { "type": "string" } } } })
}

fn call() -> Value {
    let params = json!({ "name": "echo", "arguments": { "text": "hello" } });
    json!({ "jsonrpc": "2.0", "id": "1", "method": "tools/call", "params": params })
}

/// An MCP server of 2026-07-28 that does nothing, on a thread of its own. Gives its port.
fn trivial_server() -> Result<u16, Failure> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                // A client that hangs up ends it.
                tokio::spawn(async move {
                    let _ended = serve(stream).await;
                });
            }
            #[expect(unreachable_code, reason = "names the error of the block")]
            Ok::<(), std::io::Error>(())
        })
    });
    Ok(port)
}

async fn serve(mut stream: tokio::net::TcpStream) -> Result<(), Failure> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let (body_at, length) = loop {
            if let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                let text = std::str::from_utf8(&buffer[..head])?;
                let length = text.lines().find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
                });
                break (head + 4, length.unwrap_or(0));
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        while buffer.len() < body_at + length {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let asked: Value = serde_json::from_slice(&buffer[body_at..body_at + length])?;
        buffer.drain(..body_at + length);
        let result = match asked["method"].as_str().unwrap_or_default() {
            "server/discover" => json!({ "resultType": "complete", "supportedVersions": ["2026-07-28"],
                "capabilities": { "tools": {} } }),
            "tools/list" => json!({ "resultType": "complete", "tools": [tool()] }),
            _ => json!({ "resultType": "complete", "content": [{ "type": "text", "text": "hello" }] }),
        };
        let answer = json!({ "jsonrpc": "2.0", "id": asked["id"], "result": result }).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            answer.len()
        );
        stream.write_all(&[head.as_bytes(), answer.as_bytes()].concat()).await?;
    }
}
