//! The invariants of docs/architecture.md that text can show.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use mastio::operators::access;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Every Rust file below `folder`, with its path from there and its text without tests.
fn sources(folder: &str) -> Vec<(String, String)> {
    let base = root().join(folder);
    let mut folders = vec![base.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&base).unwrap().to_string_lossy().into_owned();
                let text = fs::read_to_string(&path).unwrap();
                if !name.ends_with("tests.rs") && !name.contains("tests/") {
                    files.push((name, text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()));
                }
            }
        }
    }
    files.sort();
    files
}

/// The lines of code that contain `needle`, as `file:line`, without comments, in files that `allowed` does not name.
fn offenders(folder: &str, needle: &str, allowed: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, text) in sources(folder) {
        if allowed
            .iter()
            .any(|allowed| name == *allowed || (allowed.ends_with('/') && name.starts_with(allowed)))
        {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or(line);
            if code.contains(needle) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    found
}

fn assert_only_in(folder: &str, needle: &str, allowed: &[&str]) {
    let found = offenders(folder, needle, allowed);
    assert!(
        found.is_empty(),
        "`{needle}` belongs to {allowed:?} alone, and stands in:\n{}",
        found.join("\n")
    );
}

const CORE: &str = "crates/mastio-core/src";
const SERVER: &str = "crates/mastio/src";

#[test]
fn core_does_no_io_and_knows_no_now() {
    for needle in [
        "std::fs",
        "std::net::Tcp",
        "std::env",
        "SystemTime",
        "Instant::now",
        "Timestamp::now",
        "tokio",
        "tracing",
    ] {
        assert_only_in(CORE, needle, &[]);
    }
}

#[test]
fn sql_is_spoken_only_in_store_folders_and_files() {
    let allowed: Vec<String> = sources(SERVER)
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("store/") || name.ends_with("/store.rs"))
        .collect();
    let allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    assert_only_in(SERVER, "sqlx::", &allowed);
}

#[test]
fn wall_time_is_read_in_the_clock_alone() {
    for needle in ["SystemTime::now", "Timestamp::now", "Zoned::now"] {
        assert_only_in(SERVER, needle, &["clock.rs"]);
    }
}

#[test]
fn the_environment_is_read_in_the_configuration_alone() {
    // `crash.rs`, and what sets the clock wrong, are compiled for tests only.
    assert_only_in(SERVER, "std::env::var", &["config.rs", "clock.rs", "updates/crash.rs"]);
}

#[test]
fn randomness_is_drawn_in_two_places() {
    // The demo's agent is a client with keys of its own.
    assert_only_in(SERVER, "SystemRandom", &["entropy.rs", "pki/keys.rs", "demo/agent.rs"]);
}

#[test]
fn private_keys_are_handled_in_one_module() {
    for needle in ["EcdsaKeyPair", "RsaKeyPair", "RandomizedNonceKey"] {
        assert_only_in(SERVER, needle, &["pki/keys.rs", "demo/agent.rs"]);
    }
    let (_, keys) = sources(SERVER).into_iter().find(|(name, _)| name == "pki/keys.rs").unwrap();
    for forbidden in ["Clone", "Debug", "Serialize"] {
        let derived = keys.lines().any(|line| {
            line.trim_start().starts_with("#[derive")
                && line.contains(forbidden)
                && !line.contains("thiserror")
        });
        assert!(!derived, "nothing in pki/keys.rs is {forbidden}");
    }
}

#[test]
fn status_codes_are_known_to_http_alone() {
    let allowed: Vec<String> = sources(SERVER)
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("http/") || name.ends_with("/http.rs"))
        .collect();
    let mut allowed: Vec<&str> = allowed.iter().map(String::as_str).collect();
    // They ask or are asked over HTTP themselves.
    allowed.extend([
        "health.rs",
        "metrics.rs",
        "cli/",
        "cli.rs",
        "demo/",
        "gateway/upstream.rs",
        "gateway/tests.rs",
    ]);
    assert_only_in(SERVER, "StatusCode", &allowed);
}

#[test]
fn commits_without_an_event_have_a_closed_list_of_callers() {
    assert_only_in(
        SERVER,
        "commit_unaudited",
        &[
            // The schema and the sealing key of a database that has no chain yet; a copy that carries its chain along.
            "app.rs",
            "store/schema/mod.rs",
            "store/copy.rs",
            "store/tx.rs",
            // Nonces and identifiers that live for minutes.
            "store/ephemeral.rs",
            // Clearing a journal mark.
            "store/adopt/mod.rs",
            // A session's and an operator's last sign of life.
            "dashboard/session.rs",
            "operators/mod.rs",
            // The digest of a set-up token: what comes of it has its event.
            "operators/setup.rs",
            // The journal of update runs.
            "updates/engine.rs",
            "updates/mod.rs",
        ],
    );
}

#[test]
fn exempt_permits_are_made_for_three_purposes() {
    assert_only_in(SERVER, "ExemptPermit::for_run", &["updates/engine.rs", "updates/halt.rs"]);
    assert_only_in(SERVER, "ExemptPermit::for_crl", &["pki/revocation/mod.rs", "updates/halt.rs"]);
    assert_only_in(SERVER, "ExemptPermit::for_own_tls", &["pki/tls.rs", "updates/halt.rs"]);
}

#[test]
fn the_halt_imports_only_what_everyone_may() {
    let (_, halt) = sources(SERVER).into_iter().find(|(name, _)| name == "updates/halt.rs").unwrap();
    for line in halt.lines().filter(|line| line.starts_with("use crate::")) {
        let good = line.starts_with("use crate::store")
            || line.starts_with("use crate::http::error")
            || line.starts_with("use crate::values");
        assert!(good, "updates/halt.rs: {line}");
    }
}

#[test]
fn http_imports_no_capability() {
    for capability in ["pki", "tokens", "enrollment", "gateway", "updates", "audit", "operators", "app"] {
        let found: Vec<_> = offenders(SERVER, &format!("crate::{capability}"), &[])
            .into_iter()
            .filter(|line| line.starts_with("http/"))
            .collect();
        assert!(found.is_empty(), "{found:?}");
    }
}

/// `.route("/path", get(…).post(…))` of every router in the server's source, as method and path.
fn routes() -> Vec<(String, String)> {
    let mut routes = Vec::new();
    for (name, text) in sources(SERVER).into_iter().filter(|(name, _)| name.ends_with("http.rs")) {
        for rest in text.split(".route(").skip(1) {
            let rest = rest.trim_start();
            let Some((path, rest)) = rest.strip_prefix('"').and_then(|rest| rest.split_once('"')) else {
                continue;
            };
            // Up to where the call of `route` ends.
            let mut depth = 1;
            let end = rest.find(|c| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                depth == 0
            });
            let handlers = &rest[..end.unwrap_or_else(|| panic!("{name}: a route without an end: {path}"))];
            for method in ["get", "post", "put", "patch", "delete"] {
                let called = |prefix: &str| handlers.contains(&format!("{prefix}{method}("));
                if called(" ") || called(".") || called("\n") {
                    routes.push((method.to_ascii_uppercase(), path.to_owned()));
                }
            }
        }
    }
    routes
}

#[test]
fn every_route_of_an_operator_says_which_role_it_asks_for() {
    let routes: Vec<_> = routes().into_iter().filter(|(_, path)| access::governs(path)).collect();
    assert!(routes.len() > 30, "{routes:?}");
    for (method, path) in &routes {
        let listed = access::TABLE.iter().any(|(known, route, _)| known == method && route == path);
        assert!(listed, "{method} {path} lets nobody in: give it a line in operators/access.rs");
    }
    for (method, path, _) in access::TABLE {
        let there = routes.iter().any(|(known, route)| known == method && route == path);
        assert!(there, "operators/access.rs names {method} {path}, and no router has it");
    }
}

#[test]
fn every_file_that_the_architecture_names_exists() {
    let text = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    for name in text.split('`').filter(|name| name.starts_with("crates/") || name.starts_with("tests/")) {
        let path = if name.starts_with("tests/") {
            root().join("crates/mastio").join(name)
        } else {
            root().join(name)
        };
        assert!(path.exists(), "docs/architecture.md names {name}");
    }
}

#[test]
fn no_file_names_a_path_of_somebody_s_machine() {
    for folder in [CORE, SERVER] {
        for needle in ["/home/", "/root/", "/work/"] {
            assert_only_in(folder, needle, &[]);
        }
    }
}
