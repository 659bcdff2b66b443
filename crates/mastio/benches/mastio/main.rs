//! What a Mastio does on this machine, beside what the machine itself allows: `cargo bench -p mastio`.
//!
//! The real binary runs as a process of its own on a legacy database; cryptography, disk and bare row writes are
//! measured in the same run, so that the ratios mean something on a noisy machine. `docs/benchmarks.md` explains the
//! figures. Nothing here asserts a time; `--hold` asserts ratios within its run.

mod client;
mod gateway;
mod hold;
mod load;
mod machine;
mod pages;
mod policy;
mod server;
mod update;

use std::time::Duration;

use clap::Parser as _;
use serde::Serialize;

use gateway::{Calls, OpenStreams};
use load::Load;
use machine::Machine;
use policy::Policies;
use server::Deploy;
use update::{Detector, Update};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whatever ends a measurement.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Starts of an adopted deploy of which the median is shown.
const STARTS: usize = 5;
/// How long a server rests before its memory is read.
const REST: Duration = Duration::from_secs(2);

#[derive(clap::Parser)]
#[command(
    name = "cargo bench -p mastio --",
    about = "What a Mastio does on this machine, beside what the machine itself allows"
)]
struct Options {
    /// Sizes of the fleets to apply; more than five need python3 and MASTIO_SHARED
    #[arg(long, value_delimiter = ',', default_values_t = [5, 1000, 10_000])]
    agents: Vec<u32>,
    /// How long each load lasts
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Leave the gateway out
    #[arg(long)]
    no_gateway: bool,
    /// Ask the detector at a fleet of this size too, made by SQL
    #[arg(long)]
    detector: Option<u32>,
    /// Leave the token path out
    #[arg(long)]
    no_load: bool,
    /// Only the dashboard: every page's time, with so many agents and events
    #[arg(long, num_args = 0..=2, value_names = ["AGENTS", "EVENTS"])]
    pages: Option<Vec<u32>>,
    /// Only this: ask for twice what the server can serve, for so many seconds, and fail unless it holds
    #[arg(long, value_name = "SECONDS")]
    hold: Option<u64>,
    /// Only decisions by policies
    #[arg(long)]
    only_policies: bool,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// What cargo itself passes
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    mints: Vec<Load>,
    logins: Vec<Load>,
    health: Vec<Load>,
    policies: Vec<Policies>,
    calls: Vec<Calls>,
    open_streams: Option<OpenStreams>,
    updates: Vec<Update>,
    sizes_left_out: Vec<u32>,
    process: Vec<Process>,
    detector: Option<Detector>,
}

/// Start and memory of one deploy's process.
#[derive(Serialize)]
struct Process {
    agents: u32,
    first_start_with_adoption_ms: f64,
    start_ms: f64,
    idle_after_adoption_mib: f64,
    idle_after_start_mib: f64,
    peak_mib: f64,
}

fn main() -> Result<(), Failure> {
    let options = Options::parse();
    // One thread: the cores belong to the server.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(sizes) = &options.pages {
        let size = |index: usize, default| sizes.get(index).copied().unwrap_or(default);
        let pages = runtime.block_on(pages::measure(size(0, 100_000), size(1, 1_000_000)))?;
        if options.json {
            println!("{}", serde_json::to_string_pretty(&pages)?);
        } else {
            print!("{}", pages::table(&pages));
        }
        return Ok(());
    }
    if let Some(seconds) = options.hold {
        let held = runtime.block_on(hold::measure(Duration::from_secs(seconds)))?;
        if options.json {
            println!("{}", serde_json::to_string_pretty(&held)?);
        } else {
            held.show();
        }
        let faults = held.faults();
        return if faults.is_empty() { Ok(()) } else { Err(faults.join("; ").into()) };
    }
    if options.only_policies {
        show_policies(&runtime.block_on(policy::measure())?);
        return Ok(());
    }
    let report = runtime.block_on(report(&options))?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        show(&report);
    }
    Ok(())
}

fn median_ms(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

async fn report(options: &Options) -> Result<Report, Failure> {
    let folder = tempfile::tempdir()?;
    let machine = Machine::measure(folder.path())?;
    let lasting = Duration::from_secs(options.seconds);
    let (mut mints, mut logins, mut health) = (Vec::new(), Vec::new(), Vec::new());
    let (mut calls, mut open_streams) = (Vec::new(), None);
    let (mut updates, mut process, mut sizes_left_out) = (Vec::new(), Vec::new(), Vec::new());
    for (index, agents) in options.agents.iter().enumerate() {
        let Some(deploy) = Deploy::new(*agents)? else {
            sizes_left_out.push(*agents);
            continue;
        };
        let adopting = deploy.start()?;
        let first_start = adopting.started_in;
        tokio::time::sleep(REST).await;
        let idle_after_adoption_mib = adopting.memory_mib("VmRSS")?;
        adopting.stop()?;
        let mut starts = Vec::new();
        for _ in 1..STARTS {
            let server = deploy.start()?;
            starts.push(server.started_in);
            server.stop()?;
        }
        let server = deploy.start()?;
        starts.push(server.started_in);
        tokio::time::sleep(REST).await;
        let idle_after_start_mib = server.memory_mib("VmRSS")?;
        let rows_s = machine::bare_rows_s(folder.path(), *agents).await?;
        updates.push(update::measure(&deploy, &server, &machine, rows_s).await?);
        if index == 0 && !(options.no_load && options.no_gateway) {
            update::apply(&deploy, &server).await?;
        }
        if index == 0 && !options.no_gateway {
            (calls, open_streams) = gateway::measure(&deploy, &server, lasting).await?;
        }
        if index == 0 && !options.no_load {
            for (connections, share) in [(1, 0.4), (16, 1.0), (64, 1.0)] {
                let most_per_s = machine.mints_by_cryptography_alone * share;
                mints.push(load::mints(&deploy, &server, connections, lasting, most_per_s).await?);
            }
            logins.push(load::logins(&deploy, &server, 16, lasting).await?);
            for connections in [1, 64] {
                health.push(load::health(&deploy, &server, connections, lasting).await?);
            }
        }
        process.push(Process {
            agents: *agents,
            first_start_with_adoption_ms: first_start.as_secs_f64() * 1e3,
            start_ms: median_ms(starts),
            idle_after_adoption_mib,
            idle_after_start_mib,
            peak_mib: server.memory_mib("VmHWM")?,
        });
        server.stop()?;
    }
    let detector = match options.detector {
        Some(agents) => Some(Detector::measure(agents).await?),
        None => None,
    };
    let policies = policy::measure().await?;
    Ok(Report {
        machine,
        mints,
        logins,
        health,
        calls,
        open_streams,
        policies,
        updates,
        sizes_left_out,
        process,
        detector,
    })
}

fn show_policies(policies: &[Policies]) {
    for set in policies {
        println!(
            "{} policies, {} ({} speak of the call): a decision {:.1} µs, the first {:.0} µs; compiled in {:.0} ms",
            set.policies, set.about, set.speak_of_the_call, set.decision_us, set.first_us, set.compile_ms
        );
    }
}

fn show(report: &Report) {
    let machine = &report.machine;
    println!("Machine: {} cores", machine.cores);
    println!(
        "  P-256, one core: {:.0} signatures/s, {:.0} verifications/s; all cores: {:.0} and {:.0}",
        machine.p256_sign_one_core,
        machine.p256_verify_one_core,
        machine.p256_sign_all_cores,
        machine.p256_verify_all_cores
    );
    println!(
        "  RSA-4096 key: {:.2} s mean, {:.2} s longest; fdatasync: {:.0}/s",
        machine.rsa4096_generate_mean_s, machine.rsa4096_generate_max_s, machine.fdatasync_per_s
    );
    println!(
        "  Mints that the cryptography alone allows on all cores: {:.0}/s",
        machine.mints_by_cryptography_alone
    );
    let loads = |name: &str, loads: &[Load], most: Option<f64>| {
        for load in loads {
            let ratio = most.map(|most| {
                let by_cpu = machine.cores as f64 * 1e6 / load.server_cpu_us;
                format!(
                    "  {:3.0} % of the cryptography ({:.0} % by the server's own CPU)",
                    100.0 * load.per_s / most,
                    100.0 * by_cpu / most
                )
            });
            println!(
                "{name:<10} {:>4} {:>8.0} {:>8.2} {:>8.2} {:>8.2} {:>8.1} {:>8.0}{}",
                load.connections,
                load.per_s,
                load.p50_ms,
                load.p95_ms,
                load.p99_ms,
                load.max_ms,
                load.server_cpu_us,
                ratio.unwrap_or_default()
            );
        }
    };
    if !report.mints.is_empty() {
        println!(
            "\n{:<10} {:>4} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
            "", "conn", "per s", "p50 ms", "p95 ms", "p99 ms", "max ms", "CPU µs"
        );
    }
    loads("mint", &report.mints, Some(machine.mints_by_cryptography_alone));
    loads("login", &report.logins, None);
    loads("/healthz", &report.health, None);
    println!();
    show_policies(&report.policies);
    for Calls { connections, direct, through, added_p50_ms, added_p99_ms } in &report.calls {
        println!(
            "call, {connections:>2} connections: {:.0}/s, p50 {:.2} ms, p99 {:.2} ms; straight {:.0}/s, p50 {:.2} ms, p99 \
             {:.2} ms; added p50 {added_p50_ms:.2} ms, p99 {added_p99_ms:.2} ms; {:.0} µs of our CPU each",
            through.per_s,
            through.p50_ms,
            through.p99_ms,
            direct.per_s,
            direct.p50_ms,
            direct.p99_ms,
            through.server_cpu_us
        );
    }
    if let Some(OpenStreams { streams, before_mib, with_mib }) = &report.open_streams {
        println!("{streams} open streams: {before_mib:.0} MiB resident before, {with_mib:.0} MiB with them");
    }
    let phases = |phases: &[(String, f64)]| {
        let shown: Vec<_> = phases.iter().map(|(phase, took)| format!("{phase} {took:.3}")).collect();
        shown.join(", ")
    };
    for update in &report.updates {
        println!("\n{} agents", update.agents);
        println!("  apply {:.2} s: {}", update.apply_s, phases(&update.phases));
        println!(
            "  floor {:.2} s: RSA key {:.2}, signatures {:.2}, rows {:.2}; {:.1} times the floor, {:.1} times without the key",
            update.floor.total_s,
            update.floor.rsa_key_s,
            update.floor.signatures_s,
            update.floor.rows_s,
            update.ratio,
            update.ratio_without_keys
        );
        println!(
            "  longest wait meanwhile: read {:.0} ms ({}), write {:.0} ms ({})",
            update.longest_read_ms, update.longest_read_in, update.longest_write_ms, update.longest_write_in
        );
        println!("  rollback {:.2} s: {}", update.rollback_s, phases(&update.rollback_phases));
        println!(
            "  longest wait meanwhile: read {:.0} ms, write {:.0} ms",
            update.longest_read_in_rollback_ms, update.longest_write_in_rollback_ms
        );
    }
    println!();
    for process in &report.process {
        println!(
            "{} agents: started in {:.0} ms (with adoption {:.0} ms); resident {:.0} MiB after adoption, {:.0} MiB \
             after a start, {:.0} MiB at most",
            process.agents,
            process.start_ms,
            process.first_start_with_adoption_ms,
            process.idle_after_adoption_mib,
            process.idle_after_start_mib,
            process.peak_mib
        );
    }
    if let Some(detector) = &report.detector {
        println!(
            "{} agents: every check of the detector in {:.1} ms at boot (median; {:.1} ms at most), started in {:.0} ms",
            detector.agents, detector.median_ms, detector.longest_ms, detector.start_ms
        );
    }
    for agents in &report.sizes_left_out {
        println!("{agents} agents: left out, MASTIO_SHARED does not name the folder of the generator");
    }
}
