//! Agents on the unmodified `cullis-sdk`, and the tool that they call.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use super::required_environment;

/// The name of the upstream's one tool.
pub const TOOL: &str = "echo";

/// The folder of the judges.
pub fn judges() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../judges")
}

/// Which Python an agent runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Python {
    /// One whose `ssl` verifies as most do.
    Plain,
    /// 3.13 or later, whose `ssl` verifies X.509 strictly.
    Strict,
}

impl Python {
    fn interpreter(self) -> String {
        required_environment(match self {
            Self::Plain => "MASTIO_TEST_PYTHON",
            Self::Strict => "MASTIO_TEST_PYTHON_STRICT",
        })
    }
}

/// A program of the judges' that we speak to by lines. Its input stays open as long as this lives, and ends it.
pub struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Starts a script of `judges/`, that dies with the test.
    pub fn start(interpreter: &str, script: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(interpreter).arg(judges().join(script));
        // Nothing of the machine's may lead the SDK elsewhere.
        for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "SSL_CERT_FILE", "CULLIS_ENV"] {
            command.env_remove(name);
        }
        let command = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    /// The next line that it says.
    pub fn read(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("the program said {line:?}: {error}"))
    }

    fn write(&mut self, line: &Value) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.input.take());
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// A real MCP server behind the gateway.
pub struct Upstream {
    _program: Program,
    url: String,
}

impl Upstream {
    /// Starts one.
    pub fn start() -> Self {
        let mut program = Program::start(&Python::Plain.interpreter(), "sdk/mcp_upstream.py", &[TOOL]);
        let url = program.read()["url"].as_str().unwrap().to_owned();
        Self { _program: program, url }
    }

    /// Starts one over TLS: its certificate and key, and the CA of its clients.
    pub fn locked(tls: [&str; 3]) -> Self {
        let arguments = [&[TOOL, ""][..], &tls].concat();
        let interpreter = Python::Plain.interpreter();
        let mut program = Program::start(&interpreter, "sdk/mcp_upstream.py", &arguments);
        let url = program.read()["url"].as_str().unwrap().to_owned();
        Self { _program: program, url }
    }

    /// Starts one whose tool describes itself by what stands in `file`, which may change.
    pub fn described_by(file: &Path) -> Self {
        let arguments = [TOOL, file.to_str().unwrap()];
        let interpreter = Python::Plain.interpreter();
        let mut program = Program::start(&interpreter, "sdk/mcp_upstream.py", &arguments);
        let url = program.read()["url"].as_str().unwrap().to_owned();
        Self { _program: program, url }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }
}

/// A small OpenID Connect provider.
pub struct Provider {
    _program: Program,
    issuer: String,
}

impl Provider {
    /// Starts one that knows `accounts` (each with its groups) and one client.
    pub fn start(redirect_uri: &str, client_id: &str, client_secret: &str, accounts: &Value) -> Self {
        required_environment("MASTIO_TEST_OAUTH");
        let settings = json!({
            "redirect_uri": redirect_uri, "client_id": client_id, "client_secret": client_secret,
            "accounts": accounts,
        });
        let mut program = Program::start("node", "oauth/provider.mjs", &[&settings.to_string()]);
        let issuer = program.read()["issuer"].as_str().unwrap().to_owned();
        Self { _program: program, issuer }
    }

    /// What it calls itself.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }
}

/// A process with an agent in it, as an agent's author writes it. It never restarts.
pub struct Agent {
    program: Program,
    calls: u32,
}

/// What the SDK raised.
#[derive(Debug)]
pub struct Raised {
    /// The class of the exception.
    pub class: String,
    /// Its text, and the body of the HTTP answer if it carries one.
    pub text: String,
}

impl Agent {
    /// Builds a client once from files: the certificate and key in `identity`, the CA pinned, TLS verified.
    pub fn open(python: Python, mastio_url: &str, agent_id: &str, identity: &Path, ca: &Path) -> Self {
        let mut agent =
            Self { program: Program::start(&python.interpreter(), "sdk/agent_story.py", &[]), calls: 0 };
        let opened = agent.ask(&json!({
            "cmd": "open", "identity_dir": identity, "ca": ca, "mastio_url": mastio_url, "agent_id": agent_id,
        }));
        opened.unwrap_or_else(|raised| panic!("the client of {agent_id} cannot be built: {raised:?}"));
        agent
    }

    /// A process without a client yet.
    pub fn bare(python: Python) -> Self {
        Self { program: Program::start(&python.interpreter(), "sdk/agent_story.py", &[]), calls: 0 }
    }

    /// Asks the process. No warning may come with the answer: the SDK goes on without a certificate after only one.
    pub fn ask(&mut self, request: &Value) -> Result<Value, Raised> {
        self.program.write(request);
        let mut answer = self.program.read();
        let warnings = answer["warnings"].as_array().into_iter().flatten();
        // Python's own remark on the connections of a client object that the story has dropped.
        let mut said =
            warnings.filter(|warning| !warning.as_str().unwrap().starts_with("ResourceWarning: unclosed"));
        assert!(said.next().is_none(), "{request}: {answer}");
        if answer["ok"] == true {
            return Ok(answer["result"].take());
        }
        let text = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
        Err(Raised { class: text("type"), text: format!("{} {}", text("error"), text("body")) })
    }

    /// A client object built anew in the same process, from the same files, or with another CA file.
    pub fn build_anew(&mut self, ca: Option<&Path>) {
        let mut request = json!({ "cmd": "new-client" });
        if let Some(ca) = ca {
            request["ca"] = json!(ca);
        }
        self.ask(&request).unwrap();
    }

    /// Logs in with the agent's own key.
    pub fn login(&mut self) -> Result<Value, Raised> {
        self.ask(&json!({ "cmd": "login" }))
    }

    /// Calls the tool. The answer must be what was sent.
    pub fn call(&mut self) -> Result<(), Raised> {
        self.calls += 1;
        let arguments = json!({ "text": format!("call {}", self.calls) });
        let result = self.ask(&json!({ "cmd": "call", "tool": TOOL, "arguments": arguments }))?;
        assert_eq!(result["content"][0]["text"], arguments.to_string(), "{result}");
        assert_eq!(result["isError"], false, "{result}");
        Ok(())
    }

    /// The names of the tools that the agent may call.
    pub fn tools(&mut self) -> Vec<String> {
        let tools = self.ask(&json!({ "cmd": "list" })).unwrap();
        let names = tools.as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap().to_owned());
        names.collect()
    }

    /// The chain that the server has for an agent, as the SDK asks for it.
    pub fn public_key(&mut self, agent_id: &str) -> Result<Value, Raised> {
        self.ask(&json!({ "cmd": "public-key", "agent_id": agent_id }))
    }

    /// Which process this is, and on which SDK and Python.
    pub fn state(&mut self) -> Value {
        self.ask(&json!({ "cmd": "state" })).unwrap()
    }
}

/// One request for a token, built by the SDK's own functions, as one shot: no login, no client certificate.
const MINT: &str = r#"
import json, sys, httpx
from cullis_sdk.auth import build_client_assertion, build_dpop_proof, generate_dpop_keypair
base, certificate, key, agent_id = sys.argv[1:]
assertion, _ = build_client_assertion(agent_id, open(certificate).read(), open(key).read())
url = base + "/v1/auth/token"
proof = build_dpop_proof(*generate_dpop_keypair(), "POST", url)
answer = httpx.post(url, json={"client_assertion": assertion}, headers={"DPoP": proof}, verify=False, timeout=60)
print(json.dumps({"status": answer.status_code, "body": answer.text, "seconds": answer.elapsed.total_seconds()}))
"#;

/// Asks `/v1/auth/token` for a token with a sound assertion and proof. Answers `{"status", "body", "seconds"}`.
pub fn mint(mastio_url: &str, agent_id: &str, certificate: &Path, key: &Path) -> Value {
    let mut command = Command::new(Python::Plain.interpreter());
    command.args(["-c", MINT, mastio_url]).arg(certificate).arg(key).arg(agent_id);
    serde_json::from_str(&super::run(&mut command)).unwrap()
}
