//! An apply and its rollback: how long each phase takes, and how long anybody else has to wait meanwhile.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use crate::Failure;
use crate::client::{Connection, Target};
use crate::load::{Probe, target};
use crate::machine::Machine;
use crate::server::{ADMIN_SECRET, Deploy, Server};

const MIGRATION: &str = "2026-04-23-org-ca-pathlen-1";

/// What an apply and its rollback took.
#[derive(Debug, Clone, Serialize)]
pub struct Update {
    pub agents: u32,
    pub apply_s: f64,
    /// Seconds by phase; `keys` is the part of *prepare* before the first leaf, the RSA key in the main.
    pub phases: Vec<(String, f64)>,
    pub floor: Floor,
    /// The apply by its floor, with the mean time of an RSA key in the floor.
    pub ratio: f64,
    /// The same without keys on both sides: their time is luck.
    pub ratio_without_keys: f64,
    pub longest_read_ms: f64,
    pub longest_read_in: String,
    pub longest_write_ms: f64,
    pub longest_write_in: String,
    pub rollback_s: f64,
    pub rollback_phases: Vec<(String, f64)>,
    pub longest_read_in_rollback_ms: f64,
    pub longest_write_in_rollback_ms: f64,
}

/// What an apply cannot be faster than, in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Floor {
    pub rsa_key_s: f64,
    pub signatures_s: f64,
    pub rows_s: f64,
    pub total_s: f64,
}

struct Run {
    took_s: f64,
    phases: Vec<(String, f64)>,
    read: (String, f64),
    write: (String, f64),
}

/// The phases of a run in their order, as the metrics name them.
const PHASES: [&str; 6] = ["detect", "snapshot", "prepare", "verify", "commit", "activate"];

/// Seconds that each phase has taken since the server started.
async fn phase_sums(operator: &mut Connection, agent: &Target) -> Result<[f64; 6], Failure> {
    let body = operator.expect(&agent.request("GET", "/metrics", &[], ""), 200).await?;
    let text = std::str::from_utf8(body)?;
    let mut sums = [0.0; 6];
    for (sum, phase) in sums.iter_mut().zip(PHASES) {
        let name = format!("cullis_update_phase_seconds_sum{{phase=\"{phase}\"}} ");
        if let Some(value) = text.lines().find_map(|line| line.strip_prefix(&name)) {
            *sum = value.parse()?;
        }
    }
    Ok(sums)
}

async fn run(deploy: &Deploy, server: &Server, direction: &str) -> Result<Run, Failure> {
    let agent = target(deploy, server, 0)?;
    let secret = [("x-admin-secret", ADMIN_SECRET)];
    let mut operator = agent.connect().await?;
    let before = phase_sums(&mut operator, &agent).await?;
    let keys_seen = server.logged("update_keys_ready").len();
    let reads =
        Probe::start(agent.clone(), agent.request("GET", "/healthz", &[], ""), Duration::from_millis(1));
    let write = agent.request("POST", "/v1/auth/login-challenge", &[], "");
    let writes = Probe::start(agent.clone(), write, Duration::from_millis(2));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let path = format!("/proxy/updates/{MIGRATION}/{direction}");
    let request = agent.request("POST", &path, &secret, r#"{"confirm": true}"#);
    let (began_at, begun) = (Timestamp::now(), Instant::now());
    operator.expect(&request, 200).await?;
    let took_s = begun.elapsed().as_secs_f64();
    let (read, write) = (reads.longest()?, writes.longest()?);

    let took = phase_sums(&mut operator, &agent).await?;
    let mut phases: Vec<(String, f64)> = PHASES
        .iter()
        .zip(took.iter().zip(&before))
        .map(|(phase, (after, before))| ((*phase).to_owned(), after - before))
        .filter(|(_, took)| *took > 0.0)
        .collect();
    let mut starts: Vec<(String, Timestamp)> = Vec::new();
    let mut moment = began_at;
    for (phase, took) in &phases {
        starts.push((phase.clone(), moment));
        moment += SignedDuration::from_secs_f64(*took);
    }
    // The run says when its keys are there: what *prepare* took before is luck.
    if let Some(ready) = server.logged("update_keys_ready").get(keys_seen)
        && let Some(prepare) = phases.iter().position(|(phase, _)| phase == "prepare")
    {
        let ready: Timestamp = ready["timestamp"].as_str().unwrap_or_default().parse()?;
        let keys = ready.duration_since(starts[prepare].1).as_secs_f64().clamp(0.0, phases[prepare].1);
        phases[prepare].1 -= keys;
        phases.insert(prepare, ("keys".to_owned(), keys));
        starts[prepare].0 = "keys".to_owned();
        starts.insert(prepare + 1, ("prepare".to_owned(), ready));
    }
    let during = |moment: Timestamp| {
        let phase = starts.iter().rev().find(|(_, from)| *from <= moment);
        phase.map_or_else(|| "before".to_owned(), |(phase, _)| phase.clone())
    };
    Ok(Run { took_s, phases, read: (during(read.0), read.1), write: (during(write.0), write.1) })
}

/// Applies the page's own update to a deploy, and rolls it back.
pub async fn measure(
    deploy: &Deploy,
    server: &Server,
    machine: &Machine,
    rows_s: f64,
) -> Result<Update, Failure> {
    let apply = run(deploy, server, "apply").await?;
    let rollback = run(deploy, server, "rollback").await?;
    let signatures_s = machine.leaves_s(deploy.agents);
    let floor = Floor {
        rsa_key_s: machine.rsa4096_generate_mean_s,
        signatures_s,
        rows_s,
        total_s: machine.rsa4096_generate_mean_s + signatures_s + rows_s,
    };
    let keys_s: f64 = apply.phases.iter().filter(|(phase, _)| phase == "keys").map(|(_, took)| took).sum();
    Ok(Update {
        agents: deploy.agents,
        apply_s: apply.took_s,
        ratio: apply.took_s / floor.total_s,
        ratio_without_keys: (apply.took_s - keys_s) / (floor.signatures_s + floor.rows_s),
        floor,
        phases: apply.phases,
        longest_read_ms: apply.read.1,
        longest_read_in: apply.read.0,
        longest_write_ms: apply.write.1,
        longest_write_in: apply.write.0,
        rollback_s: rollback.took_s,
        rollback_phases: rollback.phases,
        longest_read_in_rollback_ms: rollback.read.1,
        longest_write_in_rollback_ms: rollback.write.1,
    })
}

/// Applies without measuring: the token path needs a deploy that signs.
pub async fn apply(deploy: &Deploy, server: &Server) -> Result<(), Failure> {
    let agent = target(deploy, server, 0)?;
    let path = format!("/proxy/updates/{MIGRATION}/apply");
    let request = agent.request("POST", &path, &[("x-admin-secret", ADMIN_SECRET)], r#"{"confirm": true}"#);
    agent.connect().await?.expect(&request, 200).await.map(drop)
}

/// How long the detector takes to ask every check.
#[derive(Debug, Clone, Serialize)]
pub struct Detector {
    pub agents: u32,
    pub median_ms: f64,
    pub longest_ms: f64,
    pub start_ms: f64,
}

/// Boots of which the median is shown.
const BOOTS: usize = 5;

impl Detector {
    /// Multiplies an adopted deploy's agents by SQL, and starts the binary on it again and again. The update that it
    /// detects stays pending, so that every check is asked in full.
    pub async fn measure(agents: u32) -> Result<Self, Failure> {
        let deploy = Deploy::new(5)?.ok_or("the bundled deploy")?;
        deploy.start()?.stop()?;
        let mut database = SqliteConnectOptions::new().filename(deploy.database()).connect().await?;
        for sql in [
            "INSERT INTO internal_agents (agent_id, display_name, capabilities, cert_pem, created_at, is_active, \
             enrollment_method, spiffe_id) SELECT a.agent_id || '-' || n.i, a.display_name, a.capabilities, a.cert_pem, \
             a.created_at, a.is_active, a.enrollment_method, a.spiffe_id || '-' || n.i FROM internal_agents a, \
             (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1 / 5) SELECT i FROM n) n",
            "INSERT INTO agent_certificates (agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, \
             profile_gaps) SELECT c.agent_id || '-' || n.i, lower(hex(randomblob(32))), c.spki_sha256, \
             lower(hex(randomblob(16))), c.issuer_key_id, c.not_after, c.profile_gaps FROM agent_certificates c, \
             (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1 / 5) SELECT i FROM n) n",
        ] {
            sqlx::query(sql).bind(agents).execute(&mut database).await?;
        }
        let row: (i64,) =
            sqlx::query_as("SELECT COUNT(*) FROM internal_agents").fetch_one(&mut database).await?;
        database.close().await?;
        let (mut times, mut starts) = (Vec::new(), Vec::new());
        for _ in 0..BOOTS {
            let server = deploy.start()?;
            starts.push(server.started_in.as_secs_f64() * 1e3);
            let line =
                server.logged("update_checks_ended").into_iter().next().ok_or("no checks were asked")?;
            times.push(line["took_s"].as_f64().ok_or("checks took no time")? * 1e3);
            server.stop()?;
        }
        times.sort_unstable_by(f64::total_cmp);
        starts.sort_unstable_by(f64::total_cmp);
        Ok(Self {
            agents: row.0.try_into()?,
            median_ms: times[BOOTS / 2],
            longest_ms: times[BOOTS - 1],
            start_ms: starts[BOOTS / 2],
        })
    }
}
