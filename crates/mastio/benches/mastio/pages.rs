//! How long each page of the dashboard takes on a large deploy: a hundred thousand agents, a million audit events.
//!
//! The rows are copies, written by SQL into a stopped deploy: their hashes do not chain, their certificate is one agent's,
//! and when it ends is made up. A time is from the request's first byte to the answer's last one, TLS included. The
//! two pages that compute a plan are left out: they do what an apply does, which is measured as such.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Failure;
use crate::client::{Connection, Target};
use crate::server::{ADMIN_SECRET, Deploy};

/// Requests of one page, after one that warms up.
const REQUESTS: usize = 20;
/// The agent whose row is copied.
const MODEL: &str = "acme::agent-0001";

/// A page and its times.
#[derive(Serialize)]
pub struct Page {
    path: String,
    bytes: usize,
    first_ms: f64,
    median_ms: f64,
    longest_ms: f64,
}

/// Fills a deploy and asks it for every page.
pub async fn measure(agents: u32, events: u32) -> Result<Vec<Page>, Failure> {
    let deploy = Deploy::new(5)?.ok_or("the bundled deploy is missing")?;
    // The first start adopts it.
    deploy.start()?.stop()?;
    fill(&deploy, agents, events)?;
    let server = deploy.start()?;
    let [files, ..] = deploy.files.as_slice() else { return Err("the bundled deploy has no agent".into()) };
    let target = Target::new(server.port, &deploy.ca_pem, &files.certificate, &files.private_key)?;
    let mut connection = target.connect().await?;
    let cookie = sign_in(&target, &mut connection).await?;
    let one = format!("/proxy/agents/acme::bulk-{:06}", agents / 2);
    let newest = events - 5;
    let mut pages = Vec::new();
    for path in [
        "/proxy".to_owned(),
        "/proxy/updates".to_owned(),
        "/proxy/updates/2026-04-23-org-ca-pathlen-1".to_owned(),
        "/proxy/agents".to_owned(),
        format!("/proxy/agents?after=acme::bulk-{:06}", agents - 100),
        "/proxy/agents?from=bulk-05".to_owned(),
        "/proxy/agents?only=active".to_owned(),
        "/proxy/agents?only=inactive".to_owned(),
        "/proxy/agents?only=ends-7d".to_owned(),
        "/proxy/agents?only=ends-30d".to_owned(),
        "/proxy/agents?only=byoca".to_owned(),
        format!("/proxy/agents?only=connector&after=acme::bulk-{:06}", agents - 100),
        one,
        "/proxy/enrollments".to_owned(),
        "/proxy/enrollments?status=approved".to_owned(),
        "/proxy/tools".to_owned(),
        "/proxy/tools?after=bulk-1900".to_owned(),
        "/proxy/tools/bulk-1".to_owned(),
        "/proxy/policies".to_owned(),
        "/proxy/policies/bulk-1".to_owned(),
        "/proxy/access".to_owned(),
        format!("/proxy/access?agent_id=acme::bulk-{:06}", agents / 3),
        "/proxy/access?tool=bulk-1".to_owned(),
        "/proxy/pki".to_owned(),
        "/proxy/pki/overlap".to_owned(),
        "/proxy/mastio-key".to_owned(),
        "/proxy/audit".to_owned(),
        format!("/proxy/audit?before={}", events / 2),
        "/proxy/audit?event_type=mcp.tool_called".to_owned(),
        "/proxy/audit?event_type=admin.update_applied".to_owned(),
        format!("/proxy/audit?subject=acme::bulk-{:06}", agents / 3),
        format!("/proxy/audit?event_type=mcp.tool_called&subject=acme::bulk-{:06}", agents / 3),
        format!("/proxy/audit/{newest}"),
        "/proxy/settings".to_owned(),
        "/proxy/operators".to_owned(),
    ] {
        let request = target.request("GET", &path, &[("cookie", &cookie)], "");
        let begun = Instant::now();
        let bytes = connection.expect(&request, 200).await?.len();
        let first = begun.elapsed();
        let mut times = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            let begun = Instant::now();
            connection.expect(&request, 200).await?;
            times.push(begun.elapsed());
        }
        let longest = times.iter().max().copied().unwrap_or_default();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        pages.push(Page {
            path,
            bytes,
            first_ms: ms(first),
            median_ms: crate::median_ms(times),
            longest_ms: ms(longest),
        });
    }
    server.stop()?;
    Ok(pages)
}

/// What is shown for people.
pub fn table(pages: &[Page]) -> String {
    let mut text =
        format!("{:<64} {:>8} {:>9} {:>10} {:>11}\n", "", "bytes", "first ms", "median ms", "longest ms");
    for Page { path, bytes, first_ms, median_ms, longest_ms } in pages {
        // Writing to a String cannot fail.
        let _infallible =
            writeln!(text, "{path:<64} {bytes:>8} {first_ms:>9.1} {median_ms:>10.1} {longest_ms:>11.1}");
    }
    text
}

async fn sign_in(target: &Target, connection: &mut Connection) -> Result<String, Failure> {
    let request = target.form("/proxy/login", &format!("secret={ADMIN_SECRET}"));
    connection.exchange(&request).await?;
    let cookie = connection.header("set-cookie").ok_or("the sign-in gave no cookie")?;
    Ok(cookie.split(';').next().unwrap_or_default().to_owned())
}

/// Copies of one agent, with certificates that end in the course of a year, and events about them.
fn fill(deploy: &Deploy, agents: u32, events: u32) -> Result<(), Failure> {
    let statements = format!(
        "PRAGMA synchronous = OFF; PRAGMA cache_size = -200000; BEGIN;
         CREATE TEMP TABLE numbers AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {most}) SELECT i FROM n;
         INSERT INTO internal_agents (agent_id, display_name, capabilities, cert_pem, created_at, is_active, enrollment_method, principal_type)
         SELECT printf('acme::bulk-%06d', i), printf('Bulk %d', i), m.capabilities, m.cert_pem, m.created_at, i % 50 > 0, 'connector', 'agent'
         FROM numbers, (SELECT * FROM internal_agents WHERE agent_id = '{MODEL}') m WHERE i <= {agents};
         INSERT INTO agent_certificates (agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after)
         SELECT printf('acme::bulk-%06d', i), m.fingerprint, m.spki_sha256, m.serial,
         m.issuer_key_id, unixepoch() + i * (365 * 86400 / {agents})
         FROM numbers, (SELECT * FROM agent_certificates WHERE agent_id = '{MODEL}') m WHERE i <= {agents};
         INSERT INTO mcp_upstreams (upstream_id, name, endpoint_url, auth_type, allowed_domains, timeout_ms, calls_max, enabled, capabilities, created_at, updated_at)
         SELECT 'bulk', 'bulk', 'https://tools.invalid/mcp', 'none', '[]', 1000, 1, 1, '{{}}', m.created_at, m.created_at
         FROM internal_agents m WHERE agent_id = '{MODEL}';
         INSERT INTO mcp_tools (tool_id, upstream_id, upstream_name, name, state, definition, definition_digest, found, found_digest, present, first_seen_at)
         SELECT printf('tool-%d', i), 'bulk', printf('bulk-%d', i), printf('bulk-%d', i), iif(i % 100, 'approved', 'proposed'),
         d.text, 'x', d.text, 'x', 1, '2026-01-01T00:00:00Z'
         FROM numbers, (SELECT printf('{{\"name\":\"x\",\"inputSchema\":{{\"type\":\"object\",\"description\":\"%s\"}}}}', hex(zeroblob(1000))) AS text) d WHERE i <= 2000;
         INSERT INTO local_agent_resource_bindings (binding_id, agent_id, resource_id, granted_by, granted_at)
         SELECT printf('bulk-%d', i), printf('acme::bulk-%06d', i), 'bulk', 'sql', '2026-01-01T00:00:00Z' FROM numbers WHERE i <= {agents};
         INSERT INTO mcp_policy_versions (change, name, version, mode, text, saved_at, saved_by)
         SELECT i, printf('bulk-%d', i), 1, 'enforce', printf('forbid(principal == Agent::\"acme::bulk-%06d\", action, resource == Tool::\"bulk-%d\");', i, i), '2026-01-01T00:00:00Z', 'sql'
         FROM numbers WHERE i <= 1000;
         INSERT INTO audit_events (seq, id, timestamp, event_type, actor, details, prev_hash, hash)
         SELECT h.sequence + i, printf('bulk-%d', i), strftime('%Y-%m-%dT%H:%M:%S.000000Z', unixepoch() - {events} + i, 'unixepoch'),
         CASE WHEN i % 10 < 6 THEN 'auth.token_issued' WHEN i % 10 < 9 THEN 'mcp.tool_called' ELSE 'agent.certificate_renewed' END,
         printf('acme::bulk-%06d', i % {agents}), printf('{{\"agent_id\":\"acme::bulk-%06d\",\"outcome\":\"ok\"}}', i % {agents}),
         lower(hex(randomblob(32))), lower(hex(randomblob(32)))
         FROM numbers, (SELECT sequence FROM audit_head WHERE id = 1) h WHERE i <= {events};
         UPDATE audit_head SET sequence = (SELECT MAX(seq) FROM audit_events),
         hash = (SELECT hash FROM audit_events ORDER BY seq DESC LIMIT 1);
         COMMIT;",
        most = agents.max(events),
    );
    let mut sqlite =
        Command::new("sqlite3").arg("-bail").arg(deploy.database()).stdin(Stdio::piped()).spawn()?;
    sqlite.stdin.take().ok_or("sqlite3 has no input")?.write_all(statements.as_bytes())?;
    if !sqlite.wait()?.success() {
        return Err("sqlite3 did not fill the database".into());
    }
    Ok(())
}
