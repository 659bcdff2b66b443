//! Limits from outside: what is left is told, who asks too often waits, and who is slow is cut, while everybody else is
//! served.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use harness::forge::{Response, Wire};
use harness::{Database, Deploy, wait_for};
use serde_json::json;

const JWKS: &str = "/.well-known/jwks-local.json";
const CHALLENGE: &str = "/v1/auth/login-challenge";
/// Connections that do nothing; with `MASTIO_TEST_ALL` ten times as many, where the machine lets a process have them.
const IDLE: usize = 1000;

/// A deploy with an agent; a connection without a certificate and one with the agent's.
fn deploy(settings: &[(&str, &str)]) -> (Deploy, Wire, Wire) {
    let mut deploy = Deploy::empty();
    for (name, value) in settings {
        deploy = deploy.set(name, value);
    }
    deploy.start();
    let created = deploy
        .admin_post("/v1/admin/agents", &json!({ "agent_name": "agent", "capabilities": [] }))
        .expect(201);
    let text = |name: &str| created[name].as_str().unwrap().to_owned();
    let ca = deploy.get("/pki/ca.crt").body;
    let plain = Wire::new(deploy.port(), &ca, None);
    let agent = Wire::new(deploy.port(), &ca, Some((&text("cert_pem"), &text("private_key_pem"))));
    (deploy, plain, agent)
}

#[test]
fn an_agent_and_an_address_are_told_what_is_left_and_wait_when_nothing_is() {
    let (deploy, plain, agent) = deploy(&[("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "5")]);
    let first = agent.send("POST", CHALLENGE, &[], "");
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.header("RateLimit-Policy"), Some("\"agent\";q=5;w=60"));
    assert_eq!(first.header("RateLimit"), Some("\"agent\";r=4;t=12"));
    let refused = (0..6)
        .map(|_| agent.send("POST", CHALLENGE, &[], ""))
        .find(|answer| answer.status == 429)
        .expect("a refusal");
    assert_eq!(refused.header("Retry-After"), Some("60"));
    assert!(refused.header("RateLimit").unwrap().starts_with("\"agent\";r=0;t="), "{refused:?}");
    // Another caller has its own allowance, and what is not counted is not told.
    let first = plain.send("GET", JWKS, &[], "");
    assert_eq!((first.status, first.header("RateLimit-Policy")), (200, Some("\"address\";q=30;w=60")));
    assert_eq!(plain.send("GET", "/healthz", &[], "").header("RateLimit"), None);
    let answers: Vec<Response> = (0..35).map(|_| plain.send("GET", JWKS, &[], "")).collect();
    let refused = answers.iter().find(|answer| answer.status == 429).expect("a refusal");
    assert!(refused.header("RateLimit").unwrap().starts_with("\"address\";r=0;t="), "{refused:?}");
    assert!(refused.header("Retry-After").is_some());
    assert_eq!(deploy.get("/healthz").status, 200);
}

#[test]
fn an_address_has_one_allowance_over_all_routes_where_it_is_set() {
    let (deploy, plain, _agent) = deploy(&[("MCP_PROXY_ADDRESS_RATE_LIMIT_PER_MINUTE", "20")]);
    let answers: Vec<Response> = (0..30).map(|_| plain.send("POST", "/v1/mcp", &[], "")).collect();
    assert_eq!(answers[0].status, 401);
    let refused = answers.iter().find(|answer| answer.status == 429).expect("a refusal");
    assert!(refused.body.contains("MCP_PROXY_ADDRESS_RATE_LIMIT_PER_MINUTE"), "{refused:?}");
    for _ in 0..30 {
        assert_eq!(deploy.get("/healthz").status, 200, "it tells how the server fares, and is never limited");
    }
}

/// How long a slow client is borne, and what it is told.
fn slow(what: &str, wire: &Wire, bytes: &str) -> (Duration, Response) {
    let mut stream = wire.connect();
    let began = Instant::now();
    stream.write_all(bytes.as_bytes()).unwrap();
    stream.flush().unwrap();
    let mut answer = Vec::new();
    let _until_closed = stream.read_to_end(&mut answer);
    println!("{what}: cut after {:?}", began.elapsed());
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (began.elapsed(), Response { status, head: text, body: String::new() })
}

#[test]
fn who_is_slow_is_cut_and_everybody_else_is_served_meanwhile() {
    let (deploy, plain, _agent) = deploy(&[]);
    let body = "POST /v1/auth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    let chunked = "POST /v1/mcp HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\"";
    let headers = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
    std::thread::scope(|scope| {
        let (plain, port) = (&plain, deploy.port());
        let body = scope.spawn(move || slow("body", plain, body));
        let refused_first = scope.spawn(move || slow("chunked body without a token", plain, chunked));
        let headers = scope.spawn(move || slow("headers", plain, headers));
        let handshake = scope.spawn(move || {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
            let began = Instant::now();
            // The beginning of a ClientHello, and no more of it.
            stream.write_all(&[0x16, 0x03, 0x01]).unwrap();
            let _until_closed = stream.read_to_end(&mut Vec::new());
            println!("handshake: cut after {:?}", began.elapsed());
            began.elapsed()
        });
        for _ in 0..20 {
            let began = Instant::now();
            assert_eq!(deploy.get("/healthz").status, 200);
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        }
        let (took, answer) = body.join().unwrap();
        assert_eq!(answer.status, 408, "{answer:?}");
        let refused = deploy.admin_get("/v1/admin/audit?event_type=auth.refused").expect(200);
        let mut refused = refused.as_array().unwrap().iter().map(|event| &event["details"]["reason"]);
        assert!(refused.any(|reason| reason == "body_too_slow"), "the log says so");
        assert!((Duration::from_secs(19)..Duration::from_secs(40)).contains(&took), "{took:?}");
        // Who has no token is refused before a byte of the body is waited for.
        let (_, answer) = refused_first.join().unwrap();
        assert_eq!(answer.status, 401, "{answer:?}");
        assert!(headers.join().unwrap().0 < Duration::from_secs(40));
        assert!(handshake.join().unwrap() < Duration::from_secs(40));
    });
    let long = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: {}\r\n\r\n", "x".repeat(70_000));
    let answer = plain.raw(long.as_bytes());
    assert!(matches!(answer.status, 431 | 0), "{answer:?}");
    assert_eq!(deploy.get("/healthz").status, 200);
}

#[test]
fn who_is_refused_before_the_body_is_there_reads_the_refusal_and_is_served_again() {
    let (_deploy, plain, _agent) = deploy(&[]);
    let mut stream = plain.connect();
    let body = "x".repeat(100_000);
    let head = format!("POST /v1/mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    let mut refusal = [0; 12];
    stream.read_exact(&mut refusal).unwrap();
    assert_eq!(std::str::from_utf8(&refusal), Ok("HTTP/1.1 401"));
    stream.write_all(body.as_bytes()).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("HTTP/1.1 200"), "{rest}");
}

#[test]
fn whatever_a_busy_time_leaves_is_forgotten_and_nothing_that_still_counts() {
    for database in [Database::Sqlite, Database::Postgres] {
        let mut deploy = Deploy::empty().on(database);
        deploy.start();
        deploy.sql(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200) \
             INSERT INTO used_jwt_ids SELECT 'old' || i, 1 FROM n",
        );
        deploy.sql("INSERT INTO used_jwt_ids VALUES ('counts', 99999999999)");
        wait_for("the end of what has expired", || {
            (deploy.sql("SELECT jwt_id FROM used_jwt_ids") == "counts").then_some(())
        });
    }
}

#[test]
fn connections_that_do_nothing_keep_nobody_from_being_served() {
    let wanted = if std::env::var_os("MASTIO_TEST_ALL").is_some() { 10 * IDLE } else { IDLE };
    let (deploy, plain, agent) = deploy(&[]);
    let began = Instant::now();
    let idle: Vec<_> = (0..wanted)
        .map(|_| {
            let mut stream = plain.connect();
            while stream.conn.is_handshaking() {
                stream.conn.complete_io(&mut stream.sock).unwrap();
            }
            stream
        })
        .collect();
    println!("{} idle connections in {:?}", idle.len(), began.elapsed());
    let began = Instant::now();
    for _ in 0..10 {
        assert_eq!(deploy.get("/healthz").status, 200);
        assert_eq!(agent.send("POST", CHALLENGE, &[], "").status, 200);
    }
    println!("20 requests beside them in {:?}", began.elapsed());
    drop(idle);
    assert_eq!(agent.send("POST", CHALLENGE, &[], "").status, 200);
}
