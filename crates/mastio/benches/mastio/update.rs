//! An apply and its rollback: how long each phase takes, and how long anybody else has to wait meanwhile.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::Failure;
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

async fn run(deploy: &Deploy, server: &Server, direction: &str) -> Result<Run, Failure> {
    let agent = target(deploy, server, 0)?;
    let secret = [("x-admin-secret", ADMIN_SECRET)];
    let mut operator = agent.connect().await?;
    let seen = server.logged("update_progress").len();
    let keys_seen = server.logged("update_keys_ready").len();
    let reads =
        Probe::start(agent.clone(), agent.request("GET", "/healthz", &[], ""), Duration::from_millis(1));
    let write = agent.request("POST", "/v1/auth/login-challenge", &[], "");
    let writes = Probe::start(agent.clone(), write, Duration::from_millis(2));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let path = format!("/proxy/updates/{MIGRATION}/{direction}");
    let request = agent.request("POST", &path, &secret, r#"{"confirm": true}"#);
    let begun = Instant::now();
    operator.expect(&request, 200).await?;
    let took_s = begun.elapsed().as_secs_f64();
    let end = Timestamp::now();
    let (read, write) = (reads.longest()?, writes.longest()?);

    let at = |line: &Value| line["timestamp"].as_str().unwrap_or_default().parse::<Timestamp>();
    let mut starts: Vec<(String, Timestamp)> = Vec::new();
    for line in &server.logged("update_progress")[seen..] {
        let phase = line["phase"].as_str().unwrap_or_default();
        if starts.last().is_none_or(|(last, _)| last != phase) {
            starts.push((phase.to_owned(), at(line)?));
        }
    }
    if let Some(ready) = server.logged("update_keys_ready").get(keys_seen)
        && let Some(prepare) = starts.iter().position(|(phase, _)| phase == "prepare")
    {
        starts[prepare].0 = "keys".to_owned();
        starts.insert(prepare + 1, ("prepare".to_owned(), at(ready)?));
    }
    let ends = starts.iter().skip(1).map(|(_, at)| *at).chain([end]);
    let phases =
        starts.iter().zip(ends).map(|((phase, from), to)| (phase.clone(), (to - *from).as_secs_f64()));
    let phases = phases.collect();
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
