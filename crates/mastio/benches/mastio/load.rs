//! Load on a server: mints, logins and health checks over kept-alive connections, and the times they take.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mastio::demo::agent::AgentClient;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::Failure;
use crate::client::{Connection, Target};
use crate::server::{AgentFiles, Deploy, Server};

/// Where requests go, and the requests.
pub type Prepared = (Target, Vec<Vec<u8>>);

/// What a load measured. Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Load {
    pub connections: usize,
    pub per_s: f64,
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// Processor time of the server for each, in microseconds: what the measuring client takes is not in it.
    pub server_cpu_us: f64,
}

impl Load {
    fn of(connections: usize, mut times: Vec<Duration>, took: Duration, cpu_s: f64) -> Self {
        times.sort_unstable();
        let ms = |part: f64| percentile_ms(&times, part);
        let done = times.len() as f64;
        Self {
            connections,
            per_s: done / took.as_secs_f64(),
            p50_ms: ms(0.50),
            p95_ms: ms(0.95),
            p99_ms: ms(0.99),
            max_ms: ms(1.0),
            server_cpu_us: cpu_s * 1e6 / done.max(1.0),
        }
    }
}

/// The time that so large a part of them does not exceed, in milliseconds. `times` are sorted.
pub fn percentile_ms(times: &[Duration], part: f64) -> f64 {
    let index = ((times.len() as f64 * part).ceil() as usize).saturating_sub(1);
    times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

/// An agent of a deploy, as the raw client.
pub fn target(deploy: &Deploy, server: &Server, index: usize) -> Result<Target, Failure> {
    let files = &deploy.files[index % deploy.files.len()];
    Target::new(server.port, &deploy.ca_pem, &files.certificate, &files.private_key)
}

/// An agent of a deploy with its files.
pub fn agent(deploy: &Deploy, server: &Server, files: &AgentFiles) -> Result<AgentClient, Failure> {
    Ok(AgentClient::new(
        &server.url,
        &deploy.ca_pem,
        &files.certificate,
        &files.private_key,
        &files.agent_id,
    )?)
}

/// Signs `each` requests of every connection, on all cores, so that the proofs are young when they are used.
pub fn prepare(
    connections: &[(&AgentClient, &Target)],
    each: usize,
    request: impl Fn(&AgentClient, &Target) -> Result<Vec<u8>, Failure> + Sync,
) -> Result<Vec<Prepared>, Failure> {
    let cores = std::thread::available_parallelism()?.get();
    let request = &request;
    std::thread::scope(|scope| {
        let sign = |(agent, target): &(&AgentClient, &Target)| -> Result<Prepared, Failure> {
            Ok(((*target).clone(), (0..each).map(|_| request(agent, target)).collect::<Result<_, _>>()?))
        };
        let workers: Vec<_> = connections
            .chunks(connections.len().div_ceil(cores))
            .map(|chunk| scope.spawn(move || chunk.iter().map(sign).collect::<Result<Vec<_>, Failure>>()))
            .collect();
        let mut prepared = Vec::new();
        for worker in workers {
            prepared.extend(worker.join().map_err(|_| "a worker panicked")??);
        }
        Ok(prepared)
    })
}

/// Token mints. Assertions and proofs are signed beforehand, `most_per_s` a second at most.
pub async fn mints(
    deploy: &Deploy,
    server: &Server,
    connections: usize,
    lasting: Duration,
    most_per_s: f64,
) -> Result<Load, Failure> {
    let each = (most_per_s * lasting.as_secs_f64()) as usize / connections + 1;
    let agents =
        deploy.files.iter().map(|files| agent(deploy, server, files)).collect::<Result<Vec<_>, _>>()?;
    let targets: Vec<Target> =
        (0..deploy.files.len()).map(|index| target(deploy, server, index)).collect::<Result<_, _>>()?;
    let connections: Vec<_> = (0..connections)
        .map(|index| (&agents[index % agents.len()], &targets[index % targets.len()]))
        .collect();
    let prepared = prepare(&connections, each, |agent, target| {
        let (proof, body) = agent.prepare()?.into_request();
        Ok(target.request("POST", "/v1/auth/token", &[("dpop", &proof)], &body))
    })?;
    measure(server, prepared, lasting).await
}

/// `GET /healthz`.
pub async fn health(
    deploy: &Deploy,
    server: &Server,
    connections: usize,
    lasting: Duration,
) -> Result<Load, Failure> {
    let target = target(deploy, server, 0)?;
    let request = target.request("GET", "/healthz", &[], "");
    repeated(server, &target, &request, connections, lasting).await
}

/// One request again and again, on each of so many connections.
pub async fn repeated(
    server: &Server,
    target: &Target,
    request: &[u8],
    connections: usize,
    lasting: Duration,
) -> Result<Load, Failure> {
    let opened = open((0..connections).map(|_| target.clone())).await?;
    let (cpu, begun) = (server.cpu_s()?, Instant::now());
    let mut tasks = JoinSet::new();
    for mut connection in opened {
        let request = request.to_vec();
        tasks.spawn(async move {
            let mut times = Vec::new();
            while begun.elapsed() < lasting {
                let sent = Instant::now();
                connection.expect(&request, 200).await?;
                times.push(sent.elapsed());
            }
            Ok::<_, Failure>(times)
        });
    }
    finish(server, tasks, connections, begun, cpu).await
}

/// Requests that were made beforehand, each once.
pub async fn measure(
    server: &Server,
    prepared: Vec<(Target, Vec<Vec<u8>>)>,
    lasting: Duration,
) -> Result<Load, Failure> {
    let connections = prepared.len();
    let opened = open(prepared.iter().map(|(target, _)| target.clone())).await?;
    let (cpu, begun) = (server.cpu_s()?, Instant::now());
    let mut tasks = JoinSet::new();
    for (mut connection, (_, requests)) in opened.into_iter().zip(prepared) {
        tasks.spawn(async move {
            let mut times = Vec::with_capacity(requests.len());
            for request in requests {
                if begun.elapsed() >= lasting {
                    break;
                }
                let sent = Instant::now();
                connection.expect(&request, 200).await?;
                times.push(sent.elapsed());
            }
            Ok::<_, Failure>(times)
        });
    }
    finish(server, tasks, connections, begun, cpu).await
}

async fn open(targets: impl Iterator<Item = Target>) -> Result<Vec<Connection>, Failure> {
    let mut opened = Vec::new();
    for target in targets {
        opened.push(target.connect().await?);
    }
    Ok(opened)
}

async fn finish(
    server: &Server,
    mut tasks: JoinSet<Result<Vec<Duration>, Failure>>,
    connections: usize,
    begun: Instant,
    cpu: f64,
) -> Result<Load, Failure> {
    let mut times = Vec::new();
    while let Some(done) = tasks.join_next().await {
        times.extend(done??);
    }
    let took = begun.elapsed();
    Ok(Load::of(connections, times, took, server.cpu_s()? - cpu))
}

/// Full logins as the SDK does them: challenge, assertion, countersignature, proof, token. The client's own
/// signatures are inside.
pub async fn logins(
    deploy: &Deploy,
    server: &Server,
    connections: usize,
    lasting: Duration,
) -> Result<Load, Failure> {
    let mut agents = Vec::new();
    for index in 0..connections {
        let mut agent = agent(deploy, server, &deploy.files[index % deploy.files.len()])?;
        agent.login().await?;
        agents.push(agent);
    }
    let (cpu, begun) = (server.cpu_s()?, Instant::now());
    let mut tasks = JoinSet::new();
    for mut agent in agents {
        tasks.spawn(async move {
            let mut times = Vec::new();
            while begun.elapsed() < lasting {
                let sent = Instant::now();
                agent.login().await?;
                times.push(sent.elapsed());
            }
            Ok::<_, Failure>(times)
        });
    }
    finish(server, tasks, connections, begun, cpu).await
}

/// One request again and again on a thread of its own, until told to stop: the longest time it took, and when.
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Vec<(jiff::Timestamp, Duration)>, Failure>>,
}

impl Probe {
    /// Starts to ask every `pause`.
    pub fn start(target: Target, request: Vec<u8>, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut connection = target.connect().await?;
                let mut times = Vec::new();
                while !stopped.load(Ordering::Relaxed) {
                    let (at, sent) = (jiff::Timestamp::now(), Instant::now());
                    connection.expect(&request, 200).await?;
                    times.push((at, sent.elapsed()));
                    std::thread::sleep(pause);
                }
                Ok(times)
            })
        });
        Self { stop, thread }
    }

    /// Stops and gives the longest delay in milliseconds with the moment in which it began.
    pub fn longest(self) -> Result<(jiff::Timestamp, f64), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let times = self.thread.join().map_err(|_| "a probe panicked")??;
        let longest = times.into_iter().max_by_key(|(_, took)| *took).ok_or("a probe without an answer")?;
        Ok((longest.0, longest.1.as_secs_f64() * 1e3))
    }
}
