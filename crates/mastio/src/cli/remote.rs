//! Commands with a server: its HTTP API over TLS.
//!
//! Which server? The one that holds the data directory says so in its lock file: it keeps a lock on that file as long
//! as it lives and writes its address into it after it has bound its port. So while the lock is held, nobody else
//! can listen at that address.
//!
//! That is why on loopback, and only there, the server's certificate is not verified: it proves nothing that the lock
//! has not proved, the bytes never leave the machine, and the command must work in just the deploys whose chain is
//! broken. (The page's own `curl -sk` does the same.) Any other URL is verified, by `--ca` or the machine's roots.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, Response, StatusCode, Url};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde_json::{Value, json};

use super::Failure;
use crate::updates::Direction;

/// A server on the same machine answers a connection at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For everything but plans and runs, which take as long as the fleet is large.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The URL of the server that holds the data directory, if one does.
pub fn running_at(data_dir: &Path) -> Result<Option<String>, Failure> {
    let path = crate::app::lock_path(data_dir);
    let unreadable = |error| Failure::because(format!("the lock {} cannot be read", path.display()), error);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    match file.try_lock_shared() {
        // Nobody holds it: what it says is what a server that is gone has left.
        Ok(()) => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(unreadable(error)),
    }
    let text = std::io::read_to_string(&file).map_err(unreadable)?;
    let content: Value = serde_json::from_str(&text).unwrap_or_default();
    match content["url"].as_str() {
        Some(url) => Ok(Some(url.to_owned())),
        None => Err(Failure::failed(format!(
            "a server holds {} and has not said yet where it listens: try again in a moment, or name it by --url",
            path.display()
        ))),
    }
}

/// A server, as an operator with the admin secret sees it.
pub struct Remote {
    client: reqwest::Client,
    base: Url,
    admin_secret: String,
}

impl Remote {
    /// The server at `url`. Nothing is sent yet.
    ///
    /// Errors: [`Failure::Usage`] for what is not an https URL, [`Failure::Failed`] for a CA file that cannot be used.
    pub fn new(url: &str, ca: Option<&Path>, admin_secret: &str) -> Result<Self, Failure> {
        let base = Url::parse(url).ok().filter(|url| url.scheme() == "https" && url.has_host()).ok_or_else(
            || Failure::Usage(format!("--url {url:?} is not an https URL such as https://localhost:9443")),
        )?;
        let tls = match ca {
            Some(path) => Some(trusting(path)?),
            None if is_loopback(&base) => Some(trusting_any()?),
            None => None,
        };
        let unusable = |error| Failure::because("the HTTP client cannot be set up", error);
        // Where the machine's own roots decide, reqwest sets TLS up itself and asks for a process-wide provider.
        let _already_installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        let builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured(tls),
            None => builder,
        };
        Ok(Self { client: builder.build().map_err(unusable)?, base, admin_secret: admin_secret.to_owned() })
    }

    /// `GET /proxy/updates/api`.
    pub async fn list_updates(&self, status: Option<&str>) -> Result<Value, Failure> {
        let query: Vec<(&str, &str)> = status.map(|status| ("status", status)).into_iter().collect();
        self.get(&["proxy", "updates", "api"], &query).await
    }

    /// `GET /proxy/updates/doctor`.
    pub async fn ask_doctor(&self) -> Result<Value, Failure> {
        self.get(&["proxy", "updates", "doctor"], &[]).await
    }

    /// `GET /proxy/updates/snapshots`.
    pub async fn list_snapshots(&self) -> Result<Value, Failure> {
        self.get(&["proxy", "updates", "snapshots"], &[]).await
    }

    /// `GET /proxy/updates/{id}/plan` or `…/rollback-plan`.
    pub(crate) async fn plan_update(&self, direction: Direction, id: &str) -> Result<Value, Failure> {
        // It computes what a run computes, and takes as long as the fleet is large.
        let path = ["proxy", "updates", id, plan_segment(direction)];
        read(self.request(Method::GET, &path, &[], None, None).await?, &self.base).await
    }

    /// The same with every single change, told line by line; the last one is `{"kind": "plan"}` or `"error"`.
    pub(crate) async fn full_plan(
        &self,
        direction: Direction,
        id: &str,
        told: &mut dyn FnMut(Value) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let path = ["proxy", "updates", id, plan_segment(direction)];
        let response = self.request(Method::GET, &path, &[("full", "true")], None, None).await?;
        let mut lines = Lines::of(response);
        while let Some(line) = lines.next().await {
            told(serde_json::from_str(&line).unwrap_or(Value::String(line)))?;
        }
        Ok(())
    }

    /// `POST /proxy/updates/{id}/apply` or `…/rollback`, confirmed, and held to a plan where one is named.
    pub(crate) async fn change_update(
        &self,
        direction: Direction,
        id: &str,
        plan_digest: Option<&str>,
    ) -> Result<Value, Failure> {
        let path = ["proxy", "updates", id, direction.as_str()];
        let mut body = json!({ "confirm": true });
        if let (Some(digest), Some(body)) = (plan_digest, body.as_object_mut()) {
            body.insert("plan_digest".to_owned(), json!(digest));
        }
        self.send(Method::POST, &path, &[], Some(&body), None).await
    }

    /// `GET /proxy/updates/{id}/proposals`.
    pub(crate) async fn list_proposals(&self, id: &str) -> Result<Value, Failure> {
        self.get(&["proxy", "updates", id, "proposals"], &[]).await
    }

    /// `POST /proxy/updates/{id}/proposals`.
    pub(crate) async fn propose_plan(
        &self,
        direction: Direction,
        id: &str,
        plan_digest: &str,
    ) -> Result<Value, Failure> {
        let body = json!({ "plan_digest": plan_digest, "direction": direction.as_str() });
        // It computes the plan again.
        self.send(Method::POST, &["proxy", "updates", id, "proposals"], &[], Some(&body), None).await
    }

    /// `POST /proxy/updates/{id}/proposals/{proposal_id}/approve`.
    pub(crate) async fn approve_proposal(&self, id: &str, proposal_id: &str) -> Result<Value, Failure> {
        let path = ["proxy", "updates", id, "proposals", proposal_id, "approve"];
        self.send(Method::POST, &path, &[], None, None).await
    }

    /// `GET /proxy/updates/{id}/events`; nothing where the server does not tell.
    pub(crate) async fn events(&self, id: &str) -> Option<Events> {
        let path = ["proxy", "updates", id, "events"];
        let response = self.request(Method::GET, &path, &[], None, None).await.ok()?;
        Some(Events(Lines::of(response)))
    }

    /// `GET /v1/admin/audit`.
    pub async fn list_events(&self, event_type: Option<&str>, limit: u32) -> Result<Value, Failure> {
        let limit = limit.to_string();
        let mut query = vec![("limit", limit.as_str())];
        query.extend(event_type.map(|event_type| ("event_type", event_type)));
        self.get(&["v1", "admin", "audit"], &query).await
    }

    /// `GET /v1/admin/audit/verify`.
    pub async fn verify_audit(&self) -> Result<Value, Failure> {
        self.get(&["v1", "admin", "audit", "verify"], &[]).await
    }

    /// `POST /v1/admin/pki/byoca-certificates`.
    pub async fn issue_byoca(&self, agent_name: &str, csr_pem: &str) -> Result<Value, Failure> {
        let body = json!({ "agent_name": agent_name, "csr_pem": csr_pem });
        let path = ["v1", "admin", "pki", "byoca-certificates"];
        self.send(Method::POST, &path, &[], Some(&body), Some(READ_TIMEOUT)).await
    }

    /// `GET /v1/admin/pki/overlap`.
    pub async fn show_overlap(&self) -> Result<Value, Failure> {
        self.get(&["v1", "admin", "pki", "overlap"], &[]).await
    }

    /// `POST /v1/admin/pki/settle`, confirmed.
    pub async fn settle_overlap(&self, break_agents: bool) -> Result<Value, Failure> {
        let body = json!({ "confirm": true, "break_agents": break_agents });
        self.post(&["v1", "admin", "pki", "settle"], &body).await
    }

    /// `GET /v1/admin/operators`.
    pub async fn list_operators(&self) -> Result<Value, Failure> {
        self.get(&["v1", "admin", "operators"], &[]).await
    }

    /// `POST /v1/admin/operators`.
    pub async fn add_operator(&self, name: &str, role: &str) -> Result<Value, Failure> {
        self.post(&["v1", "admin", "operators"], &json!({ "name": name, "role": role })).await
    }

    /// `PATCH /v1/admin/operators/{name}`.
    pub async fn set_operator_role(&self, name: &str, role: &str) -> Result<Value, Failure> {
        let (path, body) = (["v1", "admin", "operators", name], json!({ "role": role }));
        self.send(Method::PATCH, &path, &[], Some(&body), Some(READ_TIMEOUT)).await
    }

    /// `DELETE /v1/admin/operators/{name}`.
    pub async fn deactivate_operator(&self, name: &str) -> Result<Value, Failure> {
        let path = ["v1", "admin", "operators", name];
        self.send(Method::DELETE, &path, &[], None, Some(READ_TIMEOUT)).await
    }

    /// `POST /v1/admin/operators/{name}/reset-password`.
    pub async fn reset_password(&self, name: &str) -> Result<Value, Failure> {
        let path = ["v1", "admin", "operators", name, "reset-password"];
        self.send(Method::POST, &path, &[], None, Some(READ_TIMEOUT)).await
    }

    /// Sends a JSON body to `path` below the server's URL.
    pub async fn post(&self, path: &[&str], body: &Value) -> Result<Value, Failure> {
        self.send(Method::POST, path, &[], Some(body), Some(READ_TIMEOUT)).await
    }

    /// Reads `path` below the server's URL.
    pub async fn get(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, Failure> {
        self.send(Method::GET, path, query, None, Some(READ_TIMEOUT)).await
    }

    /// Deletes what is at `path` below the server's URL.
    pub async fn delete(&self, path: &[&str], query: &[(&str, &str)]) -> Result<Value, Failure> {
        self.send(Method::DELETE, path, query, None, Some(READ_TIMEOUT)).await
    }

    /// Sends what the other verbs send.
    pub(super) async fn ask(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        self.send(method, path, query, body, Some(READ_TIMEOUT)).await
    }

    async fn send(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
        timeout: Option<Duration>,
    ) -> Result<Value, Failure> {
        read(self.request(method, path, query, body, timeout).await?, &self.base).await
    }

    /// Sends a request; a response that is no success becomes the failure that it tells of.
    async fn request(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        body: Option<&Value>,
        timeout: Option<Duration>,
    ) -> Result<Response, Failure> {
        let url = below(&self.base, path, query);
        let mut request = self.client.request(method, url).header("X-Admin-Secret", &self.admin_secret);
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|error| unreachable(&self.base, error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        Err(self.refusal(status, &read(response, &self.base).await?))
    }

    fn refusal(&self, status: StatusCode, answer: &Value) -> Failure {
        let detail = detail(answer);
        match status {
            StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED => Failure::Refused(detail),
            StatusCode::SERVICE_UNAVAILABLE if detail.starts_with("signing halted") => {
                Failure::Halted(detail)
            }
            StatusCode::FORBIDDEN if answer["detail"]["reason"] == "role_insufficient" => {
                Failure::failed(detail)
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::failed(format!(
                "the server at {} refuses the admin secret ({detail}): MCP_PROXY_ADMIN_SECRET must be the one it runs with, or MCP_PROXY_OPERATOR_CREDENTIAL an operator's",
                self.base
            )),
            _ => Failure::failed(format!("the server at {} answered {status}: {detail}", self.base)),
        }
    }
}

/// The URL of `path` below `base`.
pub(super) fn below(base: &Url, path: &[&str], query: &[(&str, &str)]) -> Url {
    let mut url = base.clone();
    // Segments are encoded one by one, so an id can never become another path.
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path);
    }
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query);
    }
    url
}

/// What a refusal of one of our own routes means, asked in this process.
pub(super) fn refused(status: StatusCode, answer: &Value) -> Failure {
    let detail = detail(answer);
    match status {
        StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED => Failure::Refused(detail),
        _ => Failure::failed(detail),
    }
}

fn plan_segment(direction: Direction) -> &'static str {
    match direction {
        Direction::Apply => "plan",
        Direction::Rollback => "rollback-plan",
    }
}

fn unreachable(base: &Url, error: reqwest::Error) -> Failure {
    Failure::because(format!("the server at {base} cannot be reached"), error.without_url())
}

/// The whole body as JSON; as a text where it is none.
async fn read(response: Response, base: &Url) -> Result<Value, Failure> {
    let text = response.text().await.map_err(|error| unreachable(base, error))?;
    Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// The lines of a response as they come.
struct Lines {
    response: Response,
    read: Vec<u8>,
}

impl Lines {
    fn of(response: Response) -> Self {
        Self { response, read: Vec::new() }
    }

    /// The next line without its end; nothing when the response ends or breaks. May be dropped and asked again.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            self.read.extend_from_slice(&self.response.chunk().await.ok()??);
        }
    }
}

/// Server-sent events as they come.
pub(crate) struct Events(Lines);

impl Events {
    /// The body of the next event; nothing when there are no more.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            let line = self.0.next().await?;
            // One line of data each; names and keep-alives tell nothing that a bar shows.
            if let Some(data) = line.strip_prefix("data:") {
                return Some(serde_json::from_str(data).unwrap_or_default());
            }
        }
    }
}

/// What an error answer says: `{"detail": "…"}`, `{"detail": {"reason", "message", "page"}}`, or a list of fields.
pub(super) fn detail(answer: &Value) -> String {
    let detail = answer.get("detail").unwrap_or(answer);
    if let Some(fields) = detail.as_array() {
        let told = fields.iter().map(|field| match field["msg"].as_str() {
            Some(what) => format!("{} {what}", place(&field["loc"])).trim_start().to_owned(),
            None => field.to_string(),
        });
        return told.collect::<Vec<_>>().join("; ");
    }
    let text = |key: &str| detail[key].as_str();
    match (detail.as_str(), text("reason"), text("message")) {
        (Some(detail), _, _) => detail.to_owned(),
        (None, Some(reason), Some(message)) => match text("page") {
            Some(page) => format!("{message} ({reason}; see {page})"),
            None => format!("{message} ({reason})"),
        },
        _ => detail.to_string(),
    }
}

/// Where something is wrong in what was sent: `upstreams[0].timeout_ms`.
fn place(loc: &Value) -> String {
    let mut place = String::new();
    for step in loc.as_array().into_iter().flatten().skip(1) {
        match (step.as_u64(), step.as_str()) {
            (Some(index), _) => place.push_str(&format!("[{index}]")),
            (None, Some(name)) if place.is_empty() => place.push_str(name),
            (None, Some(name)) => place.push_str(&format!(".{name}")),
            (None, None) => {}
        }
    }
    place
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn trusting(path: &Path) -> Result<ClientConfig, Failure> {
    let unusable =
        |error: String| Failure::because(format!("the CA file {} cannot be used", path.display()), error);
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(unusable("it has no certificate".to_owned()));
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(error.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn trusting_any() -> Result<ClientConfig, Failure> {
    let provider = provider();
    let verifier = Arc::new(AnyOnLoopback(Arc::clone(&provider)));
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::because("TLS cannot be set up", error))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth())
}

/// Takes any certificate whose key signs the handshake. For loopback only: see the module's comment.
#[derive(Debug)]
struct AnyOnLoopback(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyOnLoopback {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn no_lock_or_a_lock_that_nobody_holds_is_no_server() {
        let folder = tempfile::tempdir().unwrap();
        assert!(running_at(folder.path()).unwrap().is_none());
        std::fs::write(crate::app::lock_path(folder.path()), r#"{"pid":1,"url":"https://127.0.0.1:1"}"#)
            .unwrap();
        assert!(running_at(folder.path()).unwrap().is_none());
    }

    #[test]
    fn a_held_lock_names_its_server_or_says_that_it_is_starting() {
        let folder = tempfile::tempdir().unwrap();
        let path = crate::app::lock_path(folder.path());
        std::fs::write(&path, "").unwrap();
        let held = File::open(&path).unwrap();
        held.try_lock().unwrap();
        assert!(running_at(folder.path()).unwrap_err().to_string().contains("try again"));
        std::fs::write(&path, r#"{"pid":1,"url":"https://127.0.0.1:9443"}"#).unwrap();
        assert_eq!(running_at(folder.path()).unwrap().as_deref(), Some("https://127.0.0.1:9443"));
    }

    #[test]
    fn only_loopback_is_loopback() {
        for (url, expected) in [
            ("https://localhost:9443", true),
            ("https://127.0.0.1:9443", true),
            ("https://127.1.2.3", true),
            ("https://[::1]:9443", true),
            ("https://mastio.example.com", false),
            ("https://localhost.example.com", false),
            ("https://10.0.0.1", false),
        ] {
            assert_eq!(is_loopback(&Url::parse(url).unwrap()), expected, "{url}");
        }
    }

    #[test]
    fn the_secret_is_not_sent_without_tls() {
        assert!(matches!(Remote::new("http://localhost:9443", None, "s"), Err(Failure::Usage(_))));
        assert!(Remote::new("https://localhost:9443", None, "s").is_ok());
    }

    #[test]
    fn refusals_become_the_failures_with_their_exit_codes() {
        let remote = Remote::new("https://localhost:9443", None, "s").unwrap();
        let halted = json!({ "detail": "signing halted — pending migration x" });
        let expired = json!({ "detail": { "reason": "org_ca_expired", "message": "the Org CA has expired", "page": "rotate-keys" } });
        let failure = |status, answer: &Value| remote.refusal(status, answer);
        assert!(matches!(failure(StatusCode::SERVICE_UNAVAILABLE, &halted), Failure::Halted(_)));
        assert!(matches!(
            failure(StatusCode::SERVICE_UNAVAILABLE, &json!({"detail": "busy"})),
            Failure::Failed { .. }
        ));
        assert!(matches!(failure(StatusCode::PRECONDITION_FAILED, &halted), Failure::Refused(_)));
        let refused = failure(StatusCode::CONFLICT, &expired);
        assert!(matches!(refused, Failure::Refused(_)));
        assert_eq!(refused.to_string(), "the Org CA has expired (org_ca_expired; see rotate-keys)");
        assert!(
            failure(StatusCode::FORBIDDEN, &json!({"detail": "x"}))
                .to_string()
                .contains("MCP_PROXY_ADMIN_SECRET")
        );
    }
}
