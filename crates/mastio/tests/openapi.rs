//! The OpenAPI document: it is what the code says, it is what is checked in, and no mounted route is missing in it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{ADMIN_SECRET, Deploy, required_environment};
use mastio::openapi;
use serde_json::{Value, json};

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// The sources of the server, without its tests and the demonstration's own upstream.
fn sources() -> Vec<String> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut texts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "demo" && name != "tests" {
                folders.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
                let text = fs::read_to_string(&path).unwrap();
                texts.push(text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned());
            }
        }
    }
    texts
}

/// The value of `const NAME: &str = "…";`, wherever it stands.
fn constant(sources: &[String], name: &str) -> String {
    let declared = format!("const {name}: &str = \"");
    let found = sources.iter().find_map(|text| text.split(&declared).nth(1));
    found.unwrap_or_else(|| panic!("no constant {name}")).split('"').next().unwrap().to_owned()
}

/// Every method and path of a `.route(…)` in the sources.
fn mounted() -> BTreeSet<(String, String)> {
    let sources = sources();
    let mut routes = BTreeSet::new();
    for text in &sources {
        for call in text.split(".route(").skip(1) {
            let mut depth = 1;
            let end = call
                .char_indices()
                .find(|(_, c)| {
                    depth += i32::from(*c == '(') - i32::from(*c == ')');
                    depth == 0
                })
                .map_or(call.len(), |(at, _)| at);
            let (path, handlers) = call[..end].split_once(',').unwrap();
            let path = match path.trim().strip_prefix('"') {
                Some(literal) => literal.trim_end_matches('"').to_owned(),
                None => constant(&sources, path.trim()),
            };
            let (mut depth, mut word) = (0, String::new());
            for c in handlers.chars() {
                if c == '(' {
                    if depth == 0 && METHODS.contains(&word.as_str()) {
                        routes.insert((word.to_ascii_uppercase(), path.clone()));
                    }
                    depth += 1;
                } else if c == ')' {
                    depth -= 1;
                }
                if c.is_ascii_alphanumeric() || c == '_' {
                    word.push(c);
                } else {
                    word.clear();
                }
            }
        }
    }
    routes
}

fn described() -> BTreeSet<(String, String)> {
    let document = openapi::document();
    let paths = document["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, item)| {
            item.as_object().unwrap().keys().map(|method| (method.to_ascii_uppercase(), path.clone()))
        })
        .collect()
}

#[test]
fn every_mounted_route_is_described_and_nothing_else_is() {
    let (mounted, described) = (mounted(), described());
    assert!(mounted.len() > 60, "{mounted:?}");
    let missing: Vec<_> = mounted.difference(&described).collect();
    assert!(missing.is_empty(), "describe these in src/openapi/operations.rs: {missing:?}");
    let gone: Vec<_> = described.difference(&mounted).collect();
    assert!(gone.is_empty(), "these are described and not mounted: {gone:?}");
}

/// `MASTIO_WRITE_OPENAPI=1` writes the document instead.
#[test]
fn the_document_that_is_checked_in_is_the_one_of_the_code() {
    let file = root().join("docs/openapi.json");
    if std::env::var_os("MASTIO_WRITE_OPENAPI").is_some() {
        fs::write(&file, openapi::document_text()).unwrap();
    }
    let checked_in = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        checked_in == openapi::document_text(),
        "docs/openapi.json is not what the code says: run this test with MASTIO_WRITE_OPENAPI=1"
    );
}

#[test]
fn every_operation_has_an_id_of_its_own_and_an_example_of_what_goes_in_and_out() {
    let document = openapi::document();
    let mut ids = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{method} {path}: {id}");
            let contents =
                operation["responses"].as_object().unwrap().values().chain([&operation["requestBody"]]);
            for content in contents.filter_map(|part| part["content"]["application/json"].as_object()) {
                assert_ne!(content.get("example").unwrap_or(&Value::Null), &Value::Null, "{method} {path}");
            }
        }
    }
}

#[test]
fn the_server_serves_the_document() {
    let mut deploy = Deploy::empty();
    deploy.start();
    assert_eq!(deploy.get("/openapi.json").expect(200), openapi::document());
}

/// How many requests schemathesis makes up for each operation beside its examples; with `MASTIO_TEST_ALL` the second.
const EXAMPLES: [&str; 2] = ["3", "40"];

/// An operator's secret, an agent's certificate and the document, in the hands of a program that does not know us.
#[test]
fn whatever_schemathesis_makes_of_the_document_is_answered_as_it_says() {
    let mut deploy = Deploy::empty().set("MCP_PROXY_RATE_LIMIT_PER_MINUTE", "0");
    deploy.start();
    let agent = deploy
        .admin_post("/v1/admin/agents", &json!({ "agent_name": "judge", "capabilities": [] }))
        .expect(201);
    let file = |name: &str, text: &str| {
        let path = deploy.folder().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let ca = file("ca.crt", &deploy.get("/pki/ca.crt").body);
    let certificate = file("agent.crt", agent["cert_pem"].as_str().unwrap());
    let key = file("agent.key", agent["private_key_pem"].as_str().unwrap());
    let examples = EXAMPLES[usize::from(std::env::var_os("MASTIO_TEST_ALL").is_some())];
    let output = Command::new(required_environment("MASTIO_TEST_API_PYTHON"))
        .current_dir(deploy.folder())
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(root().join("judges/schemathesis.toml"))
        .args(["run", &format!("{}/openapi.json", deploy.url()), "--url", &deploy.url()])
        .args(["--header", &format!("X-Admin-Secret: {ADMIN_SECRET}"), "--exclude-tag", "dashboard"])
        .arg("--tls-verify")
        .arg(ca)
        .arg("--request-cert")
        .arg(certificate)
        .arg("--request-cert-key")
        .arg(key)
        .args(["--phases", "examples,coverage,fuzzing", "--max-examples", examples])
        .args(["--seed", "2026", "--generation-database", "none", "--no-color", "--continue-on-failure"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{}", &said[said.floor_char_boundary(said.len().saturating_sub(6000))..]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let failed = |line: &Value| {
        matches!(line["message"].as_str(), Some("request_failed" | "panicked")) || line["level"] == "ERROR"
    };
    let faults: Vec<Value> = deploy.log().into_iter().filter(failed).collect();
    assert!(faults.is_empty(), "{faults:?}");
}
