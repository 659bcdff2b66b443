//! Real TLS clients against the real server: with the old root pinned, the new one, or both, at each stage of an update of
//! the Org CA. `docs/clients.md` has the table that this test makes; `MASTIO_WRITE_DOCS=1` writes it anew.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use harness::{Deploy, certificates, required_environment, run};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::json;

/// The stages of an update, in the order of the table.
const STAGES: [&str; 4] = ["before", "applied", "overlap ended", "rolled back"];
/// What a client has pinned.
const PINS: [&str; 3] = ["old", "new", "both"];

fn judges() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges")
}

/// Whether a client has connected, or what it said instead.
type Outcome = Result<(), String>;

/// Connects to a port of localhost, verified by a CA file.
type Connect = Box<dyn Fn(u16, &Path) -> Outcome>;

/// A client that connects to localhost and verifies the server by a CA file.
struct Client {
    name: String,
    connect: Connect,
}

/// A program that ends well when it has connected and verified.
fn program(name: impl Into<String>, command: impl Fn(u16, &str) -> Command + 'static) -> Client {
    let connect = move |port: u16, ca: &Path| {
        let output = command(port, ca.to_str().unwrap()).stdin(Stdio::null()).output().unwrap();
        if output.status.success() {
            return Ok(());
        }
        let told =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        Err(told)
    };
    Client { name: name.into(), connect: Box::new(connect) }
}

fn python(name: &str, variable: &'static str, mode: &'static str) -> Client {
    let interpreter = required_environment(variable);
    let version =
        run(Command::new(&interpreter).args(["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]));
    program(format!("Python {} ssl, {name}", version.trim()), move |port, ca| {
        let mut command = Command::new(&interpreter);
        command.arg(judges().join("clients/client.py")).args([mode, &port.to_string(), ca]);
        command
    })
}

/// The library verifies a path, and leaves connecting to others: OpenSSL brings what the server sends.
fn cryptography() -> Client {
    let interpreter = required_environment("MASTIO_TEST_JUDGES_PYTHON");
    let connect = move |port: u16, ca: &Path| {
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new("openssl");
        command.args(["s_client", "-connect", &address, "-servername", "localhost", "-showcerts"]);
        let sent = certificates(
            &run(&mut command)
                .lines()
                .skip_while(|line| !line.contains("BEGIN CERTIFICATE"))
                .fold(String::new(), |text, line| text + line + "\n"),
        );
        let sent: Vec<String> =
            sent.iter().map(|part| part[part.find("-----BEGIN").unwrap()..].to_owned()).collect();
        let folder = tempfile::tempdir().unwrap();
        let (leaf, untrusted) = (folder.path().join("leaf.pem"), folder.path().join("untrusted.pem"));
        fs::write(&leaf, &sent[0]).unwrap();
        fs::write(&untrusted, sent[1..].concat()).unwrap();
        let mut command = Command::new(&interpreter);
        command.arg(judges().join("verify_cryptography.py")).args([ca, &untrusted, &leaf]).arg("server");
        let verdict = run(&mut command);
        if verdict.starts_with("accept") { Ok(()) } else { Err(verdict) }
    };
    Client { name: "Python cryptography".to_owned(), connect: Box::new(connect) }
}

fn rustls() -> Client {
    let connect = |port: u16, ca: &Path| {
        let mut roots = RootCertStore::empty();
        for anchor in CertificateDer::pem_file_iter(ca).unwrap() {
            roots.add(anchor.unwrap()).map_err(|error| error.to_string())?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).map_err(|error| error.to_string())?;
        let socket = TcpStream::connect(("localhost", port)).map_err(|error| error.to_string())?;
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut tls = StreamOwned::new(connection, socket);
        tls.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").map_err(|error| error.to_string())
    };
    Client { name: "rustls".to_owned(), connect: Box::new(connect) }
}

/// Go's client, built when its source is newer.
fn go() -> Client {
    let source = judges().join("clients/go");
    let binary = judges().join("../.test/bin/client-go");
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    if modified(&binary) < modified(&source.join("client.go")) {
        fs::create_dir_all(binary.parent().unwrap()).unwrap();
        let mut build = Command::new("go");
        build.args(["build", "-o"]).arg(&binary).arg(".").current_dir(&source);
        run(build.env("GOFLAGS", "-mod=mod").env("GOPROXY", "off"));
    }
    let version = run(Command::new("go").arg("version"));
    let version = version.split(' ').nth(2).unwrap_or_default().trim_start_matches("go").to_owned();
    program(format!("Go {version}"), move |port, ca| {
        let mut command = Command::new(&binary);
        command.args([&port.to_string(), ca]);
        command
    })
}

fn version(command: &str, arguments: &[&str], part: usize) -> String {
    let text = run(Command::new(command).args(arguments));
    text.split_whitespace().nth(part).unwrap_or_default().trim_matches(['"', 'v']).to_owned()
}

fn clients() -> Vec<Client> {
    vec![
        python("as it is", "MASTIO_TEST_PYTHON", "plain"),
        python("VERIFY_X509_STRICT", "MASTIO_TEST_PYTHON", "strict"),
        python("VERIFY_X509_STRICT", "MASTIO_TEST_PYTHON_STRICT", "strict"),
        cryptography(),
        program(format!("curl {}", version("curl", &["--version"], 1)), |port, ca| {
            let mut command = Command::new("curl");
            command.args(["-sS", "--max-time", "20", "--cacert", ca]);
            command.arg(format!("https://localhost:{port}/healthz"));
            command
        }),
        program(
            format!("OpenSSL {} s_client -x509_strict", version("openssl", &["version"], 1)),
            |port, ca| {
                let mut command = Command::new("openssl");
                command.args([
                    "s_client",
                    "-connect",
                    &format!("127.0.0.1:{port}"),
                    "-verify_hostname",
                    "localhost",
                ]);
                command.args(["-verify_return_error", "-x509_strict", "-CAfile", ca]);
                command
            },
        ),
        program(format!("Node {}", version("node", &["--version"], 0)), |port, ca| {
            let mut command = Command::new("node");
            command.arg(judges().join("clients/client.mjs")).args([&port.to_string(), ca]);
            command
        }),
        go(),
        program(format!("Java {}", version("java", &["--version"], 1)), |port, ca| {
            let mut command = Command::new("java");
            command.arg(judges().join("clients/Client.java")).args([&port.to_string(), ca]);
            command
        }),
        program(format!("GnuTLS {}", version("gnutls-cli", &["--version"], 1)), |port, ca| {
            let mut command = Command::new("gnutls-cli");
            command.args(["--x509cafile", ca, "--port", &port.to_string(), "localhost"]);
            command
        }),
        rustls(),
    ]
}

/// What should become of a connection. Nothing: there is no new root yet.
fn expected(stage: &str, pin: &str) -> Option<bool> {
    match (stage, pin) {
        ("before", "old") => Some(true),
        ("before", _) => None,
        ("overlap ended", "old") => Some(false),
        _ => Some(true),
    }
}

#[test]
fn every_client_goes_on_with_the_files_it_has_until_the_overlap_ends() {
    let (Some(mut going_back), Some(mut settling)) =
        (Deploy::legacy("py_connector5_pending"), Deploy::legacy("py_connector5_pending"))
    else {
        return;
    };
    let clients = clients();
    let mut cells: Vec<[[Option<Outcome>; 4]; 3]> = clients.iter().map(|_| Default::default()).collect();
    let mut look = |deploy: &Deploy, stage: usize, roots: [Option<&Path>; 3]| {
        for (client, cells) in clients.iter().zip(&mut cells) {
            for (cell, ca) in cells.iter_mut().zip(roots) {
                cell[stage] = ca.map(|ca| (client.connect)(deploy.port(), ca));
            }
        }
    };
    let pin = |deploy: &Deploy, name: &str, pem: &str| {
        let file = deploy.folder().join(name);
        fs::write(&file, pem).unwrap();
        file
    };
    for (deploy, last) in [(&mut settling, 2), (&mut going_back, 3)] {
        deploy.start();
        let old = deploy.get("/pki/ca.crt").body;
        let old_file = pin(deploy, "old.pem", &old);
        if last == 3 {
            look(deploy, 0, [Some(&old_file), None, None]);
        }
        deploy.apply().expect(200);
        let both = deploy.get("/pki/ca.crt").body;
        let new = certificates(&both)[0].clone();
        assert_ne!(new.trim(), old.trim());
        let (new_file, both_file) = (pin(deploy, "new.pem", &new), pin(deploy, "both.pem", &both));
        let roots = [Some(&*old_file), Some(&*new_file), Some(&*both_file)];
        if last == 3 {
            look(deploy, 1, roots);
            deploy.roll_back().expect(200);
        } else {
            deploy.admin_post("/v1/admin/pki/settle", &json!({ "confirm": true })).expect(200);
        }
        look(deploy, last, roots);
    }

    let mut table = String::from("| client | pinned root |");
    for stage in STAGES {
        table.push_str(&format!(" {stage} |"));
    }
    table.push_str("\n| --- | --- | --- | --- | --- | --- |\n");
    let mut wrong = Vec::new();
    for (client, cells) in clients.iter().zip(&cells) {
        for (pin, stages) in PINS.iter().zip(cells) {
            table.push_str(&format!("| {} | {pin} |", client.name));
            for (stage, cell) in STAGES.iter().zip(stages) {
                let found = cell.as_ref().map(|cell| cell.is_ok());
                if found != expected(stage, pin) {
                    wrong.push(format!("{}, {pin} pinned, {stage}: {cell:?}", client.name));
                }
                table.push_str(match found {
                    Some(true) => " works |",
                    Some(false) => " refused |",
                    None => " – |",
                });
            }
            table.push('\n');
        }
    }
    println!("{table}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/clients.md");
    let text = fs::read_to_string(&page).unwrap();
    let begin = text.find("| client |").expect("a table in docs/clients.md");
    let end = begin + text[begin..].find("\n\n").map_or(text.len() - begin, |at| at + 1);
    if std::env::var("MASTIO_WRITE_DOCS").is_ok() {
        fs::write(&page, format!("{}{table}{}", &text[..begin], &text[end..])).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Versions differ from machine to machine; what works must not.
    let verdicts = |table: &str| -> Vec<Vec<String>> {
        table.lines().map(|line| line.split('|').skip(2).map(str::to_owned).collect()).collect()
    };
    let now = fs::read_to_string(&page).unwrap();
    let end = begin + now[begin..].find("\n\n").map_or(now.len() - begin, |at| at + 1);
    assert_eq!(
        verdicts(&now[begin..end]),
        verdicts(&table),
        "MASTIO_WRITE_DOCS=1 writes docs/clients.md anew"
    );
}
