//! A TLS front before the server: whose word on a client certificate is taken, and whose is not. A real nginx as the
//! front, and curl from two addresses of this machine, of which one is configured.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use harness::sdk::{Agent, Python, TOOL, Upstream};
use harness::{ADMIN_SECRET, Answer, Deploy, certificates, curl, free_port, run, wait_for};
use serde_json::json;

/// The address that the tests configure as the front's.
const FRONT: &str = "127.0.0.1";
/// Another one of this machine.
const ELSEWHERE: &str = "127.0.0.2";
/// Tells the agent that the certificate proves, or why there is none.
const WHO: &str = "/v1/auth/login-challenge";

/// An agent with its files.
struct Enrolled {
    agent_id: String,
    directory: PathBuf,
    leaf: String,
}

impl Enrolled {
    fn new(deploy: &Deploy, name: &str) -> Self {
        let body = json!({ "agent_name": name, "capabilities": [] });
        let created = deploy.admin_post("/v1/admin/agents", &body).expect(201);
        let directory = deploy.folder().join(name);
        let chain = created["cert_pem"].as_str().unwrap();
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("agent.crt"), chain).unwrap();
        fs::write(directory.join("agent.key"), created["private_key_pem"].as_str().unwrap()).unwrap();
        let agent_id = created["agent_id"].as_str().unwrap().to_owned();
        Self { agent_id, directory, leaf: certificates(chain)[0].clone() }
    }

    /// The leaf as a front sends it.
    fn header(&self) -> String {
        format!("X-SSL-Client-Cert: {}", escaped(&self.leaf))
    }

    /// What makes curl show the certificate itself.
    fn own(&self) -> [String; 4] {
        let file = |name: &str| self.directory.join(name).display().to_string();
        ["--cert".to_owned(), file("agent.crt"), "--key".to_owned(), file("agent.key")]
    }
}

/// Percent-encoding that leaves `+` as it is, which a form decoder would turn into a space.
fn escaped(pem: &str) -> String {
    pem.replace('\n', "%0A").replace(' ', "%20")
}

/// Asks who the caller is, from `address`, with `headers` and whatever else curl is given.
fn who(deploy: &Deploy, address: &str, headers: &[&str], own: &[String]) -> Answer {
    let mut arguments = vec!["-X", "POST", "--interface", address];
    for header in headers {
        arguments.extend(["-H", header]);
    }
    arguments.extend(own.iter().map(String::as_str));
    deploy.curl(WHO, &arguments)
}

fn assert_is(answer: &Answer, agent: &Enrolled) {
    assert_eq!(answer.expect(200)["agent_id"], agent.agent_id.as_str());
}

fn assert_refused(answer: &Answer, status: u16, reason: &str) {
    assert_eq!(answer.expect(status)["detail"]["reason"], reason, "{answer:?}");
}

/// A deploy with two agents, behind a front at `front`.
fn deploy_behind(front: &str) -> (Deploy, Enrolled, Enrolled) {
    let mut deploy = Deploy::empty().set("MCP_PROXY_TRUSTED_FRONT", front);
    deploy.start();
    let (one, other) = (Enrolled::new(&deploy, "one"), Enrolled::new(&deploy, "other"));
    (deploy, one, other)
}

#[test]
fn from_everywhere_but_the_front_a_claimed_certificate_is_dropped() {
    let (deploy, one, other) = deploy_behind(FRONT);
    let verified = ["X-SSL-Client-Verify: SUCCESS", &other.header()];
    assert_is(&who(&deploy, FRONT, &verified, &[]), &other);
    assert_refused(&who(&deploy, ELSEWHERE, &verified, &[]), 401, "client_cert_required");
    // What the handshake has proved stands, whatever is claimed beside it, once or twice.
    assert_is(&who(&deploy, ELSEWHERE, &verified, &one.own()), &one);
    let twice = [verified[0], verified[0], verified[1], verified[1]];
    assert_is(&who(&deploy, ELSEWHERE, &twice, &one.own()), &one);
    assert_refused(&who(&deploy, ELSEWHERE, &twice, &[]), 401, "client_cert_required");

    // Nor may an address that is named by nobody, be it written as another family's.
    let (deploy, one, other) = deploy_behind("::ffff:127.0.0.2, 10.0.0.0/8");
    let verified = ["X-SSL-Client-Verify: SUCCESS", &other.header()];
    assert_is(&who(&deploy, ELSEWHERE, &verified, &[]), &other);
    assert_refused(&who(&deploy, FRONT, &verified, &[]), 401, "client_cert_required");
    assert_is(&who(&deploy, FRONT, &verified, &one.own()), &one);
}

#[test]
fn without_a_configured_front_nobody_s_claim_counts() {
    let mut deploy = Deploy::empty();
    deploy.start();
    let one = Enrolled::new(&deploy, "one");
    let verified = ["X-SSL-Client-Verify: SUCCESS", &one.header()];
    for address in [FRONT, ELSEWHERE] {
        assert_refused(&who(&deploy, address, &verified, &[]), 401, "client_cert_required");
    }
}

#[test]
fn the_front_s_word_is_taken_only_when_it_is_plain() {
    let (deploy, one, other) = deploy_behind(&format!("192.0.2.0/24,{FRONT}"));
    let (verified, certificate) = ("X-SSL-Client-Verify: SUCCESS", one.header());
    assert_is(&who(&deploy, FRONT, &[verified, &certificate], &[]), &one);
    let crlf =
        format!("X-SSL-Client-Cert: {}", escaped(&one.leaf.replace('\n', "\r\n")).replace('\r', "%0d"));
    assert_is(&who(&deploy, FRONT, &[verified, &crlf], &[]), &one);

    // Not verified: no certificate, also where the front shows one of its own to us.
    for verify in ["NONE", "FAILED:certificate has expired", "success", "SUCCESS, SUCCESS"] {
        let verify = format!("X-SSL-Client-Verify: {verify}");
        for own in [&[][..], &other.own()[..]] {
            let answer = who(&deploy, FRONT, &[&verify, &certificate], own);
            assert_refused(&answer, 401, "client_cert_required");
        }
    }
    assert_refused(&who(&deploy, FRONT, &[&certificate], &[]), 401, "client_cert_required");
    // Verified: the client's certificate, not the front's own.
    assert_is(&who(&deploy, FRONT, &[verified, &certificate], &other.own()), &one);
    // Neither header: it did not come through the front.
    assert_is(&who(&deploy, FRONT, &[], &other.own()), &other);
    assert_refused(&who(&deploy, FRONT, &[], &[]), 401, "client_cert_required");

    // Twice: somebody before the front wrote one of them.
    for headers in [
        [verified, &certificate, &certificate],
        [verified, &certificate, &other.header()],
        [verified, verified, &certificate],
        ["X-SSL-Client-Verify: NONE", verified, &certificate],
    ] {
        assert_refused(&who(&deploy, FRONT, &headers, &[]), 400, "forwarded_cert_repeated");
    }
    // Verified, and not there or not a certificate.
    for wrong in ["X-SSL-Client-Cert;", "X-SSL-Client-Cert: %", "X-SSL-Client-Cert: abc", "X-Other: 1"] {
        let answer = who(&deploy, FRONT, &[verified, wrong], &other.own());
        assert_refused(&answer, 400, "forwarded_cert_malformed");
    }

    // What is judged of a certificate is judged of this one too.
    let stranger = self_signed(&deploy, "stranger", &format!("/CN={}", one.agent_id));
    let stranger = format!("X-SSL-Client-Cert: {}", escaped(&fs::read_to_string(&stranger.0).unwrap()));
    assert_refused(&who(&deploy, FRONT, &[verified, &stranger], &[]), 401, "client_cert_pin_mismatch");
    deactivate(&deploy, &one);
    let answer = who(&deploy, FRONT, &[verified, &certificate], &[]);
    assert_refused(&answer, 401, "agent_unknown_or_inactive");
    // Where no identity is asked for, no certificate is either.
    let answer = deploy.curl("/healthz", &["-H", "X-SSL-Client-Verify: NONE"]);
    assert_eq!(answer.status, 200);
}

#[test]
fn the_configured_front_is_shown() {
    let (deploy, ..) = deploy_behind("127.0.0.1, 10.0.0.0/24");
    let shown = deploy.mastio_ok(&["config"]);
    let line = shown.lines().find(|line| line.contains("MCP_PROXY_TRUSTED_FRONT")).unwrap();
    assert!(line.contains("127.0.0.1, 10.0.0.0/24"), "{line}");
    let refused = Deploy::empty().set("MCP_PROXY_TRUSTED_FRONT", "nginx.internal").mastio(&["serve"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("MCP_PROXY_TRUSTED_FRONT (env file"), "{said}");
}

#[test]
fn agents_behind_nginx_sign_in_and_call_tools_and_cannot_claim_to_be_another() {
    let (deploy, one, other) = deploy_behind(FRONT);
    let upstream = Upstream::start();
    deploy.register_tool(TOOL, upstream.url(), &[&one.agent_id]);
    let nginx = Nginx::before(&deploy);
    let mut agent = Agent::open(Python::Plain, &nginx.url, &one.agent_id, &one.directory, &nginx.certificate);
    agent.login().unwrap();
    assert_eq!(agent.tools(), [TOOL]);
    agent.call().unwrap();
    // The SDK's own route with a client certificate alone.
    agent.public_key(&other.agent_id).unwrap();

    let ask = |own: &[String], headers: &[&str]| {
        let mut arguments = vec!["-X", "POST"];
        arguments.extend(own.iter().map(String::as_str));
        headers.iter().for_each(|header| arguments.extend(["-H", header]));
        curl(&format!("{}{WHO}", nginx.url), &arguments)
    };
    assert_is(&ask(&one.own(), &[]), &one);
    assert_refused(&ask(&[], &[]), 401, "client_cert_required");
    // nginx sets both headers, so what a client writes there never arrives.
    let claim = ["X-SSL-Client-Verify: SUCCESS", &other.header()];
    assert_refused(&ask(&[], &claim), 401, "client_cert_required");
    assert_is(&ask(&one.own(), &claim), &one);

    deactivate(&deploy, &one);
    assert_refused(&ask(&one.own(), &[]), 401, "agent_unknown_or_inactive");
    agent.login().expect_err("a deactivated agent signed in");
}

fn deactivate(deploy: &Deploy, agent: &Enrolled) {
    let secret = format!("X-Admin-Secret: {ADMIN_SECRET}");
    let answer =
        deploy.curl(&format!("/v1/admin/agents/{}", agent.agent_id), &["-X", "DELETE", "-H", &secret]);
    assert!(matches!(answer.status, 200 | 204), "{answer:?}");
}

/// A certificate for `localhost` that signs itself, and its key.
fn self_signed(deploy: &Deploy, name: &str, subject: &str) -> (PathBuf, PathBuf) {
    let (certificate, key) =
        (deploy.folder().join(format!("{name}.crt")), deploy.folder().join(format!("{name}.key")));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    openssl.args(["-days", "2", "-subj", subject, "-addext", "subjectAltName=DNS:localhost", "-keyout"]);
    run(openssl.arg(&key).arg("-out").arg(&certificate));
    (certificate, key)
}

/// A real nginx with a certificate of its own, configured as docs/operations.md says.
struct Nginx {
    child: Child,
    url: String,
    certificate: PathBuf,
}

impl Nginx {
    fn before(deploy: &Deploy) -> Self {
        let folder = deploy.folder();
        let (certificate, key) = self_signed(deploy, "front", "/CN=front");
        fs::write(folder.join("ca.crt"), deploy.get("/pki/ca.crt").body).unwrap();
        let port = free_port();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {};", folder.join("nginx").join(kind).display()))
            .concat();
        fs::create_dir(folder.join("nginx")).unwrap();
        let settings = format!(
            "daemon off; master_process off; pid {folder}/nginx/pid; error_log stderr; events {{}}
            http {{
              access_log off; {temporary}
              server {{
                listen {FRONT}:{port} ssl;
                ssl_certificate {certificate};
                ssl_certificate_key {key};
                ssl_client_certificate {folder}/ca.crt;
                ssl_verify_client optional;
                ssl_verify_depth 2;
                location / {{
                  proxy_pass https://{FRONT}:{mastio};
                  proxy_http_version 1.1;
                  proxy_ssl_verify on;
                  proxy_ssl_trusted_certificate {folder}/ca.crt;
                  proxy_ssl_name localhost;
                  proxy_set_header Host $http_host;
                  proxy_set_header X-SSL-Client-Cert $ssl_client_escaped_cert;
                  proxy_set_header X-SSL-Client-Verify $ssl_client_verify;
                }}
              }}
            }}",
            folder = folder.display(),
            certificate = certificate.display(),
            key = key.display(),
            mastio = deploy.port(),
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, settings).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nginx", "-c"]).arg(&file);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        wait_for("nginx to listen", || {
            assert!(child.try_wait().unwrap().is_none(), "nginx has ended");
            TcpStream::connect((FRONT, port)).ok()
        });
        Self { child, url: format!("https://localhost:{port}"), certificate }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}
