//! What an apply made, judged by verifiers and linters that share no code with us.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::server::{Deploy, MIGRATION, Server, run, variable};
use crate::state::{PkiState, text};

fn judge(name: &str) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges").join(name);
    let mut command = Command::new(path);
    // The judges ask for it themselves; asked here first, the message names what to do.
    command.env("MASTIO_TEST_JUDGES_PYTHON", variable("MASTIO_TEST_JUDGES_PYTHON"));
    command
}

/// PEM files of one deploy.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, pem: &str) -> PathBuf {
        let path = self.0.path().join(name.replace("::", "-"));
        std::fs::write(&path, pem).unwrap();
        path
    }
}

/// The five verdicts, by judge.
fn verdicts(output: &Output) -> Vec<(String, String)> {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| {
            (line["judge"].as_str().unwrap().to_owned(), line["verdict"].as_str().unwrap().to_owned())
        })
        .collect()
}

fn assert_judged(root: &Path, untrusted: Option<&Path>, leaf: &Path, purpose: &str, expect: &[&str]) {
    let mut command = judge("verify-chain");
    command.arg("--root").arg(root).arg("--leaf").arg(leaf).args(["--purpose", purpose]).args(expect);
    if let Some(untrusted) = untrusted {
        command.arg("--untrusted").arg(untrusted);
    }
    let output = run(&mut command);
    assert_eq!(verdicts(&output).len(), 5, "run through ./test: {output:?}");
    let told =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} under {}: {told}", leaf.display(), root.display());
}

const ACCEPT: &[&str] = &["--expect", "accept"];

fn judged_after_the_apply(fixture: &str) {
    let deploy = Deploy::of(fixture);
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    let state = PkiState::read(&deploy);
    let files = Files::new();
    let root = files.write("root.pem", &state.org_ca);
    let between = files.write("mastio-ca.pem", state.mastio_ca.as_ref().unwrap());
    for agent_id in state.of_mastio() {
        let chain = &state.leaves[agent_id];
        let leaf = files.write(&format!("{agent_id}.pem"), first(chain));
        assert_judged(&root, Some(&between), &leaf, "client", ACCEPT);
        // What the row has is enough by itself: the intermediate follows the leaf.
        let chain = files.write(&format!("{agent_id}.chain.pem"), chain);
        assert_judged(&root, None, &chain, "client", ACCEPT);
    }
    // A leaf of another agent is not the intermediate's issuer, and the root stands alone.
    let strict =
        run(Command::new("openssl").args(["verify", "-x509_strict", "-CAfile"]).arg(&root).arg(&between));
    assert!(strict.status.success(), "{strict:?}");
    // One that the new intermediate issues from now on.
    let created = create_agent(&server);
    let leaf = files.write("created.pem", &created);
    assert_judged(&root, None, &leaf, "client", ACCEPT);
}

#[test]
fn five_verifiers_accept_every_chain_of_v01_root5_after_the_apply() {
    judged_after_the_apply("v01_root5");
}

#[test]
fn five_verifiers_accept_every_chain_of_chain5_after_the_apply() {
    judged_after_the_apply("chain5");
}

#[test]
fn five_verifiers_accept_every_chain_of_py_connector5_pending_after_the_apply() {
    judged_after_the_apply("py_connector5_pending");
}

#[test]
fn five_verifiers_accept_every_chain_of_v01_no_intermediate_after_the_apply() {
    judged_after_the_apply("v01_no_intermediate");
}

#[test]
fn five_verifiers_blame_the_path_length_before_the_apply() {
    let deploy = Deploy::of("chain5");
    let state = PkiState::read(&deploy);
    let files = Files::new();
    let root = files.write("root.pem", &state.org_ca);
    for agent_id in state.of_mastio() {
        let chain = files.write(&format!("{agent_id}.pem"), &state.leaves[agent_id]);
        assert_judged(&root, None, &chain, "client", &["--expect", "reject", "--because", "path-length"]);
    }
}

/// The certificates that the server presents, leaf first.
fn presented(server: &Server) -> Vec<String> {
    let address = server.url.trim_start_matches("https://").replace("localhost", "127.0.0.1");
    let output = run(Command::new("openssl").args(["s_client", "-connect", &address, "-showcerts"]));
    certificates(&String::from_utf8_lossy(&output.stdout))
}

fn certificates(text: &str) -> Vec<String> {
    let end = "-----END CERTIFICATE-----";
    text.split_inclusive(end)
        .filter_map(|part| part.find("-----BEGIN").map(|begin| part[begin..].to_owned() + "\n"))
        .collect()
}

fn first(chain: &str) -> &str {
    let end = "-----END CERTIFICATE-----\n";
    &chain[..chain.find(end).unwrap() + end.len()]
}

/// Asserts that clients which pin `root` alone accept the server's certificate, by name and by address.
fn assert_serves(server: &Server, root: &Path, who: &str) {
    let port = server.url.rsplit(':').next().unwrap();
    let handshake = run(Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-servername", "localhost"])
        .args([
            "-verify_return_error",
            "-verify_hostname",
            "localhost",
            "-x509_strict",
            "-no-CApath",
            "-CAfile",
        ])
        .arg(root));
    let text = String::from_utf8_lossy(&handshake.stdout);
    assert!(handshake.status.success() && text.contains("Verify return code: 0 (ok)"), "{who}: {text}");
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("https://{host}:{port}/healthz");
        let answer = run(Command::new("curl").args(["-sS", "--fail", "--cacert"]).arg(root).arg(&url));
        assert!(answer.status.success(), "{who}: curl {url}: {}", String::from_utf8_lossy(&answer.stderr));
    }
    let chain = presented(server);
    let files = Files::new();
    let leaf = files.write("leaf.pem", &chain[0]);
    let rest = files.write("rest.pem", &chain[1..].concat());
    assert_judged(root, (chain.len() > 1).then_some(&*rest), &leaf, "server", ACCEPT);
}

#[test]
fn clients_that_pin_the_old_or_the_new_root_accept_the_server_throughout() {
    for fixture in ["v01_root5", "v01_no_intermediate", "py_torn5"] {
        let deploy = Deploy::of(fixture);
        let server = deploy.start();
        let files = Files::new();
        let roots = certificates(&server.ca());
        let pins = |files: &Files, roots: &[String], when: &str| -> Vec<PathBuf> {
            let write = |(index, root): (usize, &String)| files.write(&format!("{when}-{index}.pem"), root);
            roots.iter().enumerate().map(write).collect()
        };
        let before = pins(&files, &roots, "before");
        for root in &before {
            assert_serves(&server, root, &format!("{fixture} before the apply"));
        }
        assert_eq!(server.apply().status, 200);
        // The new root is named first, the old ones after it.
        let after = pins(&files, &certificates(&server.ca()), "after");
        for root in before.iter().chain(&after) {
            assert_serves(&server, root, &format!("{fixture} after the apply"));
        }
        assert_eq!(server.rollback().status, 200);
        let back = pins(&files, &certificates(&server.ca()), "back");
        for root in before.iter().chain(&after).chain(&back) {
            assert_serves(&server, root, &format!("{fixture} after the rollback"));
        }
        server.stop();
        let server = deploy.start();
        for root in before.iter().chain(&after) {
            assert_serves(&server, root, &format!("{fixture} after the rollback, started again"));
        }
    }
}

fn create_agent(server: &Server) -> String {
    let answer = server.post("/v1/admin/agents", &json!({ "agent_name": "judged", "capabilities": [] }));
    assert_eq!(answer.status, 201, "{answer:?}");
    text(&answer.json(), "cert_pem")
}

fn assert_lints(named: &[(&str, String)]) {
    let files = Files::new();
    let mut command = judge("lint-certificates");
    for (name, pem) in named {
        for (index, certificate) in certificates(pem).iter().enumerate() {
            command.arg(files.write(&format!("{name}-{index}.pem"), certificate));
        }
    }
    let output = run(&mut command);
    let found =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{found}");
}

#[test]
fn pkilint_finds_nothing_in_what_an_apply_and_the_server_issue() {
    let deploy = Deploy::of("v01_no_intermediate");
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    let state = PkiState::read(&deploy);
    let cross = deploy.rows("SELECT cert_pem FROM pki_cross_certificates");
    assert_eq!(cross.len(), 1, "one old-with-new certificate for {MIGRATION}");
    let token_key = text(&deploy.rows("SELECT cert_pem FROM mastio_keys")[0], "cert_pem");
    assert_lints(&[
        ("org-ca", state.org_ca.clone()),
        ("mastio-ca", state.mastio_ca.clone().unwrap()),
        ("agent", create_agent(&server)),
        ("old-with-new", text(&cross[0], "cert_pem")),
        ("token-key", token_key),
        ("tls", presented(&server)[0].clone()),
    ]);
}

#[test]
fn pkilint_finds_nothing_in_a_fresh_organisation() {
    let deploy = Deploy::fresh();
    let server = deploy.start();
    let state = PkiState::read(&deploy);
    let token_key = text(&deploy.rows("SELECT cert_pem FROM mastio_keys")[0], "cert_pem");
    assert_lints(&[
        ("org-ca", state.org_ca.clone()),
        ("mastio-ca", state.mastio_ca.clone().unwrap()),
        ("agent", create_agent(&server)),
        ("token-key", token_key),
        ("tls", presented(&server).concat()),
    ]);
    let files = Files::new();
    let root = files.write("root.pem", &state.org_ca);
    assert_serves(&server, &root, "a fresh organisation");
}
