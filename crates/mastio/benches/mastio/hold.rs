//! More load than the server can serve, for minutes: what becomes of the requests that it takes on, and of the rest.
//!
//! The server gets one half of the cores and this client the other, so that what is measured is the server. First the
//! rate that it can serve is found, then its delays at half of that, then it is asked for twice as much by clients that
//! do not wait for each other, and at last for all that it can do again, a second after that load has ended.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mastio::demo::agent::AgentClient;
use serde::Serialize;
use tokio::task::LocalSet;
use tokio::time::{sleep, sleep_until, timeout};

use crate::Failure;
use crate::client::{Connection, Target};
use crate::load::{agent, percentile_ms, target};
use crate::server::{Deploy, Server};
use crate::update;

/// Clients that ask at once.
const CLIENTS: usize = 64;
/// Connections that each client has from the beginning.
const CONNECTIONS: usize = 4;
/// Connections that a client opens at most while its requests wait. A request more is not sent.
const CONNECTIONS_MAX: usize = 32;
/// How long the rate that the server can serve is looked for.
const FULL: Duration = Duration::from_secs(5);
/// How long at least the delays at half of that rate are measured.
const HALF_MIN: Duration = Duration::from_secs(10);
/// How long after the load everything must be as before.
const RECOVERED_AFTER: Duration = Duration::from_secs(1);
/// A connection that nobody has used for so long is not used again: the server may be about to close it.
const IDLE_MAX: Duration = Duration::from_secs(5);
/// No answer for so long is none.
const PATIENCE: Duration = Duration::from_secs(30);

/// The delay of accepted requests under too much load, as a multiple of that at half load, both at p99.
const DELAY_TIMES_MAX: f64 = 3.0;
/// Memory at the end by that after a fifth of the load.
const MEMORY_TIMES_MAX: f64 = 1.1;
/// The rate a second after the load by that before it.
const RECOVERED_SHARE_MIN: f64 = 0.8;
/// The share of what should be sent that this client must have managed to send.
const SENT_SHARE_MIN: f64 = 0.9;

/// What a server did under more load than it can serve.
#[derive(Debug, Clone, Serialize)]
pub struct Held {
    /// What it can serve: mints a second, 64 clients that each wait for their answer.
    pub full_per_s: f64,
    pub half: Offered,
    pub twice: Offered,
    /// As `full_per_s`, a second after the load.
    pub recovered_per_s: f64,
    /// Resident MiB before the load, after a fifth of it, and at its end.
    pub memory_mib: [f64; 3],
}

/// What came of mints that were asked for at one rate.
#[derive(Debug, Clone, Serialize)]
pub struct Offered {
    pub seconds: f64,
    pub wanted_per_s: f64,
    pub sent_per_s: f64,
    pub accepted_per_s: f64,
    pub accepted_p50_ms: f64,
    pub accepted_p99_ms: f64,
    /// 503 with `Retry-After`.
    pub shed_per_s: f64,
    pub shed_p99_ms: f64,
    /// Any other answer but 200, by its status; 0 is a connection that broke or an answer that did not come.
    pub wrong: BTreeMap<u16, u64>,
    /// How the first connection broke.
    pub broken: Option<String>,
}

impl Held {
    /// What was not as it has to be; empty where everything was.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut judge = |fine: bool, fault: String| {
            if !fine {
                faults.push(fault);
            }
        };
        for (name, offered) in [("half", &self.half), ("twice", &self.twice)] {
            let broken = offered.broken.as_deref().unwrap_or_default();
            judge(
                offered.wrong.is_empty(),
                format!("answers at {name} the rate: {:?} {broken}", offered.wrong),
            );
            let share = offered.sent_per_s / offered.wanted_per_s;
            judge(
                share >= SENT_SHARE_MIN,
                format!("only {:.0} % of {name} the rate was sent", share * 100.0),
            );
        }
        let times = self.delay_times();
        judge(times <= DELAY_TIMES_MAX, format!("p99 is {times:.1} times that at half the rate"));
        let [_, early, late] = self.memory_mib;
        judge(late <= early * MEMORY_TIMES_MAX, format!("memory grew from {early:.1} to {late:.1} MiB"));
        let share = self.recovered_per_s / self.full_per_s;
        judge(share >= RECOVERED_SHARE_MIN, format!("a second later it served {:.0} %", share * 100.0));
        faults
    }

    fn delay_times(&self) -> f64 {
        self.twice.accepted_p99_ms / self.half.accepted_p99_ms
    }

    pub fn show(&self) {
        println!("full rate: {:.0} mints/s by {CLIENTS} clients", self.full_per_s);
        println!(
            "{:<6} {:>6} {:>8} {:>8} {:>10} {:>8} {:>8} {:>8} {:>8}  wrong",
            "", "s", "asked/s", "sent/s", "accepted/s", "p50 ms", "p99 ms", "503/s", "p99 ms"
        );
        for (name, offered) in [("half", &self.half), ("twice", &self.twice)] {
            println!(
                "{name:<6} {:>6.0} {:>8.0} {:>8.0} {:>10.0} {:>8.2} {:>8.2} {:>8.0} {:>8.2}  {:?}",
                offered.seconds,
                offered.wanted_per_s,
                offered.sent_per_s,
                offered.accepted_per_s,
                offered.accepted_p50_ms,
                offered.accepted_p99_ms,
                offered.shed_per_s,
                offered.shed_p99_ms,
                offered.wrong
            );
        }
        let [before, early, late] = self.memory_mib;
        println!("p99 of the accepted: {:.2} times that at half the rate", self.delay_times());
        println!(
            "resident: {before:.1} MiB before, {early:.1} after a fifth of the load, {late:.1} at its end"
        );
        println!(
            "a second after the load: {:.0} mints/s, {:.0} % of the full rate",
            self.recovered_per_s,
            100.0 * self.recovered_per_s / self.full_per_s
        );
    }
}

/// Holds a server of five agents under load for so long.
pub async fn measure(lasting: Duration) -> Result<Held, Failure> {
    let cores = std::thread::available_parallelism()?.get();
    let (of_server, of_client) = halves(cores)?;
    let deploy = Deploy::new(5)?.ok_or("the bundled deploy is missing")?;
    stay_on(&of_server)?;
    let server = deploy.start()?;
    stay_on(&of_client)?;
    update::apply(&deploy, &server).await?;
    let clients = Clients::connect(&deploy, &server).await?;
    let full_per_s = clients.serve_all(FULL).await?;
    let half = clients.ask(full_per_s / 2.0, (lasting / 5).max(HALF_MIN), &server).await?.0;
    let before = server.memory_mib("VmRSS")?;
    let (twice, memory) = clients.ask(full_per_s * 2.0, lasting, &server).await?;
    sleep(RECOVERED_AFTER).await;
    let recovered_per_s = clients.serve_all(FULL).await?;
    server.stop()?;
    let at = |share: usize| memory.get(memory.len().saturating_sub(1) * share / 5).copied().unwrap_or(before);
    Ok(Held { full_per_s, half, twice, recovered_per_s, memory_mib: [before, at(1), at(5)] })
}

/// The cores of the server and those of this client, as `taskset` lists them.
fn halves(cores: usize) -> Result<(String, String), Failure> {
    if cores < 2 {
        return Err("server and client need a core each".into());
    }
    Ok((format!("0-{}", cores / 2 - 1), format!("{}-{}", cores / 2, cores - 1)))
}

/// Keeps this process, and what it starts from now on, on these cores.
fn stay_on(cores: &str) -> Result<(), Failure> {
    let mut taskset = Command::new("taskset");
    let pinned = taskset
        .args(["--all-tasks", "--pid", "--cpu-list", cores, &std::process::id().to_string()])
        .stdout(Stdio::null())
        .status()?;
    if pinned.success() { Ok(()) } else { Err(format!("taskset cannot choose the cores {cores}").into()) }
}

/// Clients of a few agents, each with connections of its own.
struct Clients(Vec<Client>);

struct Client {
    agent: Rc<AgentClient>,
    target: Target,
    free: Rc<Free>,
}

/// The connections of a client.
struct Free {
    waiting: RefCell<Vec<(Connection, Instant)>>,
    open: Cell<usize>,
}

impl Free {
    /// The one that was used last.
    fn take(&self) -> Option<Connection> {
        let (connection, since) = self.waiting.borrow_mut().pop()?;
        if since.elapsed() < IDLE_MAX {
            return Some(connection);
        }
        // The others have waited longer still.
        let gone = 1 + self.waiting.borrow_mut().drain(..).count();
        self.open.set(self.open.get() - gone);
        None
    }

    fn give_back(&self, connection: Connection) {
        self.waiting.borrow_mut().push((connection, Instant::now()));
    }
}

impl Clients {
    async fn connect(deploy: &Deploy, server: &Server) -> Result<Self, Failure> {
        let agents = deploy
            .files
            .iter()
            .map(|files| agent(deploy, server, files).map(Rc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let mut clients = Vec::new();
        for index in 0..CLIENTS {
            let target = target(deploy, server, index)?;
            let mut free = Vec::new();
            for _ in 0..CONNECTIONS {
                free.push((target.connect().await?, Instant::now()));
            }
            clients.push(Client {
                agent: Rc::clone(&agents[index % agents.len()]),
                target,
                free: Rc::new(Free { waiting: RefCell::new(free), open: Cell::new(CONNECTIONS) }),
            });
        }
        Ok(Self(clients))
    }

    /// The mints a second of clients that each wait for their answer.
    async fn serve_all(&self, lasting: Duration) -> Result<f64, Failure> {
        let (local, begun, served) = (LocalSet::new(), Instant::now(), Rc::new(Cell::new(0_u32)));
        let tasks: Vec<_> = self
            .0
            .iter()
            .map(|client| {
                let (agent, target, served) =
                    (Rc::clone(&client.agent), client.target.clone(), Rc::clone(&served));
                let free = Rc::clone(&client.free);
                local.spawn_local(async move {
                    let mut connection = match free.take() {
                        Some(connection) => connection,
                        None => {
                            free.open.set(free.open.get() + 1);
                            target.connect().await?
                        }
                    };
                    while begun.elapsed() < lasting {
                        // Whoever is told to come again comes again.
                        if connection.exchange(&mint(&agent, &target)?).await?.0 == 200 {
                            served.set(served.get() + 1);
                        }
                    }
                    free.give_back(connection);
                    Ok::<_, Failure>(())
                })
            })
            .collect();
        local.await;
        for task in tasks {
            task.await??;
        }
        Ok(f64::from(served.get()) / begun.elapsed().as_secs_f64())
    }

    /// Asks for so many mints a second, whatever becomes of them; and the server's memory, second by second.
    async fn ask(
        &self,
        wanted_per_s: f64,
        lasting: Duration,
        server: &Server,
    ) -> Result<(Offered, Vec<f64>), Failure> {
        let (local, begun) = (LocalSet::new(), tokio::time::Instant::now());
        let seen = Rc::new(RefCell::new(Seen::default()));
        for (index, client) in self.0.iter().enumerate() {
            let (agent, target, free, seen) =
                (Rc::clone(&client.agent), client.target.clone(), Rc::clone(&client.free), Rc::clone(&seen));
            let mut gaps = Gaps::new(index, wanted_per_s / CLIENTS as f64);
            local.spawn_local(async move {
                let mut due = begun;
                loop {
                    due += gaps.next();
                    if due.duration_since(begun) >= lasting {
                        return;
                    }
                    sleep_until(due).await;
                    let taken = free.take();
                    if taken.is_none() && free.open.get() >= CONNECTIONS_MAX {
                        continue;
                    }
                    if taken.is_none() {
                        free.open.set(free.open.get() + 1);
                    }
                    let (agent, target, free, seen) =
                        (Rc::clone(&agent), target.clone(), Rc::clone(&free), Rc::clone(&seen));
                    tokio::task::spawn_local(async move {
                        match one(&agent, &target, taken, &seen).await {
                            Ok(connection) => free.give_back(connection),
                            Err(error) => {
                                free.open.set(free.open.get() - 1);
                                let mut seen = seen.borrow_mut();
                                *seen.wrong.entry(0).or_default() += 1;
                                seen.broken.get_or_insert(error.to_string());
                            }
                        }
                    });
                }
            });
        }
        let mut memory = Vec::new();
        local
            .run_until(async {
                while begun.elapsed() < lasting {
                    memory.push(server.memory_mib("VmRSS")?);
                    sleep(Duration::from_secs(1)).await;
                }
                Ok::<_, Failure>(())
            })
            .await?;
        local.await;
        let Seen { sent, mut accepted, mut shed, wrong, broken } = seen.take();
        let seconds = lasting.as_secs_f64();
        accepted.sort_unstable();
        shed.sort_unstable();
        let offered = Offered {
            seconds,
            wanted_per_s,
            sent_per_s: sent as f64 / seconds,
            accepted_per_s: accepted.len() as f64 / seconds,
            accepted_p50_ms: percentile_ms(&accepted, 0.50),
            accepted_p99_ms: percentile_ms(&accepted, 0.99),
            shed_per_s: shed.len() as f64 / seconds,
            shed_p99_ms: percentile_ms(&shed, 0.99),
            wrong,
            broken,
        };
        Ok((offered, memory))
    }
}

/// What was seen of requests.
#[derive(Default)]
struct Seen {
    sent: u64,
    accepted: Vec<Duration>,
    shed: Vec<Duration>,
    wrong: BTreeMap<u16, u64>,
    broken: Option<String>,
}

async fn one(
    agent: &AgentClient,
    target: &Target,
    connection: Option<Connection>,
    seen: &RefCell<Seen>,
) -> Result<Connection, Failure> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => timeout(PATIENCE, target.connect()).await??,
    };
    let request = mint(agent, target)?;
    seen.borrow_mut().sent += 1;
    let sent = Instant::now();
    let status = timeout(PATIENCE, connection.exchange(&request)).await??.0;
    let (took, mut seen) = (sent.elapsed(), seen.borrow_mut());
    match status {
        200 => seen.accepted.push(took),
        503 if connection.has_header("retry-after") => seen.shed.push(took),
        other => *seen.wrong.entry(other).or_default() += 1,
    }
    Ok(connection)
}

fn mint(agent: &AgentClient, target: &Target) -> Result<Vec<u8>, Failure> {
    let (proof, body) = agent.prepare()?.into_request();
    Ok(target.request("POST", "/v1/auth/token", &[("dpop", &proof)], &body))
}

/// The gaps between the requests of one client that takes no notice of the others: exponential, and the same at every
/// run (xorshift64).
struct Gaps {
    state: u64,
    mean_s: f64,
}

impl Gaps {
    fn new(index: usize, per_s: f64) -> Self {
        Self {
            state: 0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1).wrapping_mul(0x2545_f491_4f6c_dd1d),
            mean_s: 1.0 / per_s,
        }
    }

    fn next(&mut self) -> Duration {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let share = (self.state >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - share).ln() * self.mean_s)
    }
}
