//! An agent, as small as it can be: what the SDK does with a certificate, a key and a CA file that it has on disk.
//!
//! It logs in (challenge, countersigned assertion, token), asks for tools and calls one; wire contract §4 and §5. The
//! demo speaks through it, and the benchmark measures with it: [`AgentClient::prepare`] does the agent's own
//! signatures, so that [`AgentClient::send`] is the server's part alone. The private key here is the agent's, which
//! an agent holds by nature; the server's keys stay in `pki::keys`.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::Method;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Map, Value, json};

use crate::clock::{Clock as _, SystemClock};
use crate::entropy::Entropy;

/// Seconds that an assertion is good for: the most the server takes (wire contract §4.3).
const ASSERTION_LIFETIME_S: i64 = 300;
/// The SDK's own patience.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const TOKEN_PATH: &str = "/v1/auth/token";
const MCP_PATH: &str = "/v1/mcp";

/// Why an agent could not do what it wanted.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its files cannot be used.
    #[error("the agent's {what} cannot be used")]
    Credentials {
        /// Which of them.
        what: &'static str,
    },
    /// TLS or the HTTP client cannot be set up with them.
    #[error("the agent's connection cannot be set up")]
    SetUp(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No answer came.
    #[error("the server did not answer {path}")]
    Unanswered {
        /// What was asked.
        path: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The server said no.
    #[error("{path} answered {status}: {detail}")]
    Refused {
        /// What was asked.
        path: String,
        /// The HTTP status.
        status: u16,
        /// What the body says.
        detail: String,
    },
    /// The answer has another shape than the wire contract's.
    #[error("the answer of {path} has no {field}")]
    Answer {
        /// What was asked.
        path: String,
        /// What is missing.
        field: &'static str,
    },
    /// The MCP gateway answered with a JSON-RPC error.
    #[error("{method} error code={code} message={message:?}")]
    Mcp {
        /// The JSON-RPC method.
        method: &'static str,
        /// The JSON-RPC code.
        code: i64,
        /// Its message.
        message: String,
    },
    /// A tool was wanted before a login.
    #[error("the agent has no token: log in first")]
    NotLoggedIn,
    /// The crypto library refused.
    #[error("the crypto library refused to {0}")]
    Library(&'static str),
}

/// A token and the key it is bound to. Not shown by `Debug`.
pub struct AccessToken {
    token: String,
    proof_key: ProofKey,
}

impl AccessToken {
    /// What the token says, unverified: for showing, never for deciding.
    #[must_use]
    pub fn claims(&self) -> Value {
        let payload = self.token.split('.').nth(1).and_then(|payload| URL_SAFE_NO_PAD.decode(payload).ok());
        payload.and_then(|payload| serde_json::from_slice(&payload).ok()).unwrap_or_default()
    }
}

/// Everything of a token request that the agent computes.
pub struct PreparedMint {
    assertion: String,
    countersignature: Option<String>,
    proof: String,
    proof_key: ProofKey,
}

impl PreparedMint {
    /// The request as it is sent: the DPoP header and the body. For whoever measures the server and not this client.
    #[must_use]
    pub fn into_request(self) -> (String, String) {
        (self.proof, json!({ "client_assertion": self.assertion }).to_string())
    }
}

/// The key that DPoP proofs are made with: fresh for each token.
struct ProofKey {
    pair: EcdsaKeyPair,
    jwk: Value,
}

impl ProofKey {
    fn generate() -> Result<Self, AgentError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .map_err(|_| AgentError::Library("generate a key for DPoP proofs"))?;
        // An uncompressed point: 4, x, y.
        let coordinate = |from: usize| {
            let bytes = pair.public_key().as_ref().get(from..from + 32).unwrap_or_default();
            URL_SAFE_NO_PAD.encode(bytes)
        };
        let jwk = json!({ "kty": "EC", "crv": "P-256", "x": coordinate(1), "y": coordinate(33) });
        Ok(Self { pair, jwk })
    }

    /// A proof for one request (RFC 9449 §4.2); with `ath` when a token goes along.
    fn proof(&self, method: &str, url: &str, token: Option<&str>, now: &Now) -> Result<String, AgentError> {
        let header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": self.jwk });
        let mut claims = json!({ "jti": now.id, "htm": method, "htu": url, "iat": now.seconds });
        if let (Some(token), Some(claims)) = (token, claims.as_object_mut()) {
            let ath = URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes()));
            claims.insert("ath".to_owned(), json!(ath));
        }
        jws(&self.pair, &header, &claims)
    }
}

/// The moment and the id that one signature needs.
struct Now {
    seconds: i64,
    id: String,
}

/// One agent with one connection pool.
pub struct AgentClient {
    http: reqwest::Client,
    base_url: String,
    agent_id: String,
    x5c: Vec<String>,
    key: EcdsaKeyPair,
    entropy: Entropy,
    access: Option<AccessToken>,
}

impl AgentClient {
    /// An agent with the files it holds: the CA that it pins, its certificate (leaf first), its PKCS#8 P-256 key.
    ///
    /// The CA file is read here and never again, as the SDK does.
    /// Errors: [`AgentError::Credentials`] names the file that cannot be used.
    pub fn new(
        base_url: &str,
        ca_pem: &str,
        chain_pem: &str,
        key_pem: &str,
        agent_id: &str,
    ) -> Result<Self, AgentError> {
        let certificates = |pem: &str, what| {
            let parsed: Result<Vec<CertificateDer<'static>>, _> =
                CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            parsed.ok().filter(|chain| !chain.is_empty()).ok_or(AgentError::Credentials { what })
        };
        let chain = certificates(chain_pem, "certificate")?;
        let mut roots = RootCertStore::empty();
        for root in certificates(ca_pem, "CA file")? {
            roots.add(root).map_err(|_| AgentError::Credentials { what: "CA file" })?;
        }
        let unusable_key = || AgentError::Credentials { what: "private key" };
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| unusable_key())?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.secret_pkcs8_der())
            .map_err(|_| unusable_key())?;
        let x5c = chain.iter().map(|certificate| STANDARD.encode(certificate)).collect();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| AgentError::SetUp(error.into()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(pkcs8))
            .map_err(|error| AgentError::SetUp(error.into()))?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .timeout(REQUEST_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| AgentError::SetUp(error.into()))?;
        Ok(Self {
            http,
            base_url: base_url.trim_end_matches('/').to_owned(),
            agent_id: agent_id.to_owned(),
            x5c,
            key,
            entropy: Entropy::default(),
            access: None,
        })
    }

    /// Logs in as the SDK does: challenge, countersigned assertion, token. The token is kept for tool calls.
    pub async fn login(&mut self) -> Result<&AccessToken, AgentError> {
        let challenge = self.post("/v1/auth/login-challenge", None, &[]).await?;
        let nonce = text(&challenge, "/v1/auth/login-challenge", "nonce")?;
        let assertion = self.assertion(Some(nonce))?;
        let path = "/v1/auth/sign-challenged-assertion";
        let body = json!({ "client_assertion": assertion, "nonce": nonce });
        let countersigned = self.post(path, Some(&body), &[]).await?;
        let countersignature = countersigned["mastio_signature"].as_str().map(str::to_owned);
        let prepared = self.prepare_with(assertion, countersignature)?;
        let access = self.send(prepared).await?;
        Ok(self.access.insert(access))
    }

    /// Gets a token from an assertion alone, without a challenge: the one call that the token path is measured by.
    pub async fn mint(&self) -> Result<AccessToken, AgentError> {
        self.send(self.prepare()?).await
    }

    /// Makes the assertion, the proof key and the proof of one token request.
    pub fn prepare(&self) -> Result<PreparedMint, AgentError> {
        self.prepare_with(self.assertion(None)?, None)
    }

    fn prepare_with(
        &self,
        assertion: String,
        countersignature: Option<String>,
    ) -> Result<PreparedMint, AgentError> {
        let proof_key = ProofKey::generate()?;
        let proof = proof_key.proof("POST", &self.url(TOKEN_PATH), None, &self.now())?;
        Ok(PreparedMint { assertion, countersignature, proof, proof_key })
    }

    /// Sends a prepared token request. Each can be sent once: its identifiers are burnt by the token.
    pub async fn send(&self, prepared: PreparedMint) -> Result<AccessToken, AgentError> {
        let mut headers = vec![("DPoP", prepared.proof)];
        headers.extend(prepared.countersignature.map(|signature| ("X-Cullis-Mastio-Signature", signature)));
        let body = json!({ "client_assertion": prepared.assertion });
        let answer = self.post(TOKEN_PATH, Some(&body), &headers).await?;
        let token = text(&answer, TOKEN_PATH, "access_token")?.to_owned();
        Ok(AccessToken { token, proof_key: prepared.proof_key })
    }

    /// The tools that this agent may use.
    pub async fn list_tools(&self) -> Result<Vec<Value>, AgentError> {
        let result = self.mcp("tools/list", None).await?;
        let tools = result["tools"].as_array().cloned();
        tools.ok_or_else(|| AgentError::Answer { path: MCP_PATH.to_owned(), field: "result.tools" })
    }

    /// Calls a tool; the answer is the tool's own `{content, isError}`.
    pub async fn call_tool(&self, name: &str, arguments: Value) -> Result<Value, AgentError> {
        self.mcp("tools/call", Some(json!({ "name": name, "arguments": arguments }))).await
    }

    /// `Authorization` and `DPoP` of one request to the gateway. For whoever measures the server and not this client.
    ///
    /// Errors: [`AgentError::NotLoggedIn`].
    pub fn prepare_call(&self) -> Result<(String, String), AgentError> {
        let access = self.access.as_ref().ok_or(AgentError::NotLoggedIn)?;
        let proof = access.proof_key.proof("POST", &self.url(MCP_PATH), Some(&access.token), &self.now())?;
        Ok((format!("DPoP {}", access.token), proof))
    }

    /// The chain that the server now has for this agent, PEM: what is offered after an update.
    pub async fn current_chain(&self) -> Result<String, AgentError> {
        let path = format!("/v1/egress/agents/{}/public-key", self.agent_id);
        let answer = self.exchange(Method::GET, &path, None, &[]).await?;
        text(&answer, &path, "cert_pem").map(str::to_owned)
    }

    async fn mcp(&self, method: &'static str, params: Option<Value>) -> Result<Value, AgentError> {
        let (authorization, proof) = self.prepare_call()?;
        let headers = [("Authorization", authorization), ("DPoP", proof)];
        let mut message = Map::from_iter([
            ("jsonrpc".to_owned(), json!("2.0")),
            ("id".to_owned(), json!(1)),
            ("method".to_owned(), json!(method)),
        ]);
        message.extend(params.map(|params| ("params".to_owned(), params)));
        let answer = self.post(MCP_PATH, Some(&Value::Object(message)), &headers).await?;
        if let Some(error) = answer.get("error") {
            let code = error["code"].as_i64().unwrap_or_default();
            let message = error["message"].as_str().unwrap_or_default().to_owned();
            return Err(AgentError::Mcp { method, code, message });
        }
        let result = answer.get("result").cloned();
        result.ok_or_else(|| AgentError::Answer { path: MCP_PATH.to_owned(), field: "result" })
    }

    fn assertion(&self, nonce: Option<&str>) -> Result<String, AgentError> {
        let now = self.now();
        let header = json!({ "alg": "ES256", "typ": "JWT", "x5c": self.x5c });
        let mut claims = json!({
            "sub": self.agent_id,
            "iss": self.agent_id,
            "aud": "agent-trust-broker",
            "iat": now.seconds,
            "exp": now.seconds + ASSERTION_LIFETIME_S,
            "jti": now.id,
        });
        if let (Some(nonce), Some(claims)) = (nonce, claims.as_object_mut()) {
            claims.insert("nonce".to_owned(), json!(nonce));
        }
        jws(&self.key, &header, &claims)
    }

    fn now(&self) -> Now {
        Now { seconds: SystemClock.now().seconds().0, id: self.entropy.uuid() }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base_url)
    }

    async fn post(
        &self,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, String)],
    ) -> Result<Value, AgentError> {
        self.exchange(Method::POST, path, body, headers).await
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, String)],
    ) -> Result<Value, AgentError> {
        let unanswered = |source: reqwest::Error| AgentError::Unanswered { path: path.to_owned(), source };
        let mut request = self.http.request(method, self.url(path));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(unanswered)?;
        let status = response.status();
        let body = response.text().await.map_err(unanswered)?;
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        if status.is_success() {
            return Ok(answer);
        }
        let detail = match &answer["detail"] {
            Value::String(detail) => detail.clone(),
            Value::Null => body,
            other => other.to_string(),
        };
        Err(AgentError::Refused { path: path.to_owned(), status: status.as_u16(), detail })
    }
}

fn text<'a>(answer: &'a Value, path: &str, field: &'static str) -> Result<&'a str, AgentError> {
    answer[field].as_str().ok_or_else(|| AgentError::Answer { path: path.to_owned(), field })
}

/// A compact JWS, ES256 (RFC 7515 §7.1).
fn jws(key: &EcdsaKeyPair, header: &Value, claims: &Value) -> Result<String, AgentError> {
    let encoded = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut message = format!("{}.{}", encoded(header), encoded(claims));
    let signature = key
        .sign(&SystemRandom::new(), message.as_bytes())
        .map_err(|_| AgentError::Library("sign for the agent"))?;
    message.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut message);
    Ok(message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

    use super::*;
    use crate::demo::bundle;

    fn agent() -> AgentClient {
        let files = &bundle::AGENTS[0];
        AgentClient::new(
            "https://localhost:9443/",
            bundle::ORG_CA,
            files.certificate,
            files.private_key,
            &files.agent_id(),
        )
        .unwrap()
    }

    fn part(jws: &str, index: usize) -> Value {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(jws.split('.').nth(index).unwrap()).unwrap()).unwrap()
    }

    fn is_signed_by(jws: &str, key: &EcdsaKeyPair) -> bool {
        let (message, signature) = jws.rsplit_once('.').unwrap();
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.public_key().as_ref())
            .verify(message.as_bytes(), &signature)
            .is_ok()
    }

    #[test]
    fn an_assertion_has_the_claims_and_the_chain_of_the_wire_contract() {
        let agent = agent();
        let assertion = agent.assertion(Some("nonce-1")).unwrap();
        assert!(is_signed_by(&assertion, &agent.key));
        let (header, claims) = (part(&assertion, 0), part(&assertion, 1));
        assert_eq!((&header["alg"], &header["typ"]), (&json!("ES256"), &json!("JWT")));
        assert_eq!(header["x5c"].as_array().unwrap().len(), 1);
        assert_eq!(
            (&claims["sub"], &claims["iss"]),
            (&json!("acme::agent-0001"), &json!("acme::agent-0001"))
        );
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 300);
        assert_eq!((&claims["aud"], &claims["nonce"]), (&json!("agent-trust-broker"), &json!("nonce-1")));
        assert!(part(&agent.assertion(None).unwrap(), 1).get("nonce").is_none());
    }

    #[test]
    fn a_proof_is_bound_to_its_request_and_its_token() {
        let agent = agent();
        let prepared = agent.prepare().unwrap();
        assert!(is_signed_by(&prepared.proof, &prepared.proof_key.pair));
        let (header, claims) = (part(&prepared.proof, 0), part(&prepared.proof, 1));
        assert_eq!(header.as_object().unwrap().keys().collect::<Vec<_>>(), ["typ", "alg", "jwk"]);
        assert_eq!(header["jwk"]["x"].as_str().unwrap().len(), 43);
        assert_eq!(claims["htu"], "https://localhost:9443/v1/auth/token");
        assert!(claims.get("ath").is_none());
        let bound =
            prepared.proof_key.proof("POST", "https://x/v1/mcp", Some("token"), &agent.now()).unwrap();
        // SHA-256 of "token".
        assert_eq!(part(&bound, 1)["ath"], "PEaenWxYddN6Q_NT1PiOYfz4EsZu7jRXRlpAsNpBU-A");
        assert_ne!(part(&bound, 1)["jti"], claims["jti"]);
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let files = &bundle::AGENTS[0];
        let refusal = |ca: &str, chain: &str, key: &str| {
            AgentClient::new("https://localhost", ca, chain, key, "acme::x").err().unwrap().to_string()
        };
        assert!(refusal("", files.certificate, files.private_key).contains("CA file"));
        assert!(refusal(bundle::ORG_CA, "", files.private_key).contains("certificate"));
        assert!(refusal(bundle::ORG_CA, files.certificate, "").contains("private key"));
    }
}
