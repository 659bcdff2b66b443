//! What an attacker has: any key, any JWS, and any bytes on a TLS connection.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

/// Base64url without padding.
pub fn b64u(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// `ath` of a token.
pub fn ath(token: &str) -> String {
    b64u(digest(&SHA256, token.as_bytes()))
}

/// Unix seconds.
pub fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_secs()).unwrap()
}

/// An identifier that nobody has used.
pub fn unique() -> String {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    b64u(bytes)
}

/// The claims of a compact JWS, unverified.
pub fn claims(jws: &str) -> Value {
    let payload = jws.split('.').nth(1).unwrap_or_default();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap_or_default()).unwrap_or_default()
}

/// A P-256 key that signs whatever it is given.
pub struct Key(EcdsaKeyPair);

impl Key {
    /// A new one.
    pub fn new() -> Self {
        Self(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    /// From PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Self {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der()).unwrap())
    }

    /// The public key.
    pub fn jwk(&self) -> Value {
        let point = self.0.public_key().as_ref();
        json!({ "kty": "EC", "crv": "P-256", "x": b64u(&point[1..33]), "y": b64u(&point[33..]) })
    }

    /// A compact JWS over these texts, whatever they are.
    pub fn sign_text(&self, header: &str, payload: &str) -> String {
        let input = format!("{}.{}", b64u(header), b64u(payload));
        let signature = self.0.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", b64u(signature))
    }

    /// A compact JWS.
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        self.sign_text(&header.to_string(), &claims.to_string())
    }

    /// Header and claims of a good proof for one request.
    pub fn proof_parts(&self, method: &str, url: &str, token: Option<&str>) -> (Value, Value) {
        let header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": self.jwk() });
        let mut claims = json!({ "jti": unique(), "htm": method, "htu": url, "iat": now() });
        if let Some(token) = token {
            claims["ath"] = json!(ath(token));
        }
        (header, claims)
    }

    /// A good proof for one request.
    pub fn proof(&self, method: &str, url: &str, token: Option<&str>) -> String {
        let (header, claims) = self.proof_parts(method, url, token);
        self.sign(&header, &claims)
    }
}

/// `value` with members changed; one that is `"<absent>"` is removed.
pub fn with(value: &Value, changes: &Value) -> Value {
    let mut value = value.clone();
    for (name, change) in changes.as_object().unwrap() {
        if change == "<absent>" {
            value.as_object_mut().unwrap().remove(name);
        } else {
            value[name] = change.clone();
        }
    }
    value
}

/// An HTTP response as it came.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code; 0 where nothing came.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Response {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Self { status, head: head.to_owned(), body: body.to_owned() }
    }

    /// The body as JSON, or null.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (other, value) = line.split_once(':')?;
            other.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// A client that writes bytes, not requests.
#[derive(Clone)]
pub struct Wire {
    port: u16,
    config: Arc<ClientConfig>,
}

impl Wire {
    /// To the server on this port, which it authenticates by `ca_pem`; with a client certificate or without.
    pub fn new(port: u16, ca_pem: &str, certificate: Option<(&str, &str)>) -> Self {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = match certificate {
            None => config.with_no_client_auth(),
            Some((chain, key)) => {
                let chain =
                    CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
                let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config.with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key)).unwrap()
            }
        };
        Self { port, config: Arc::new(config) }
    }

    /// An open connection.
    pub fn connect(&self) -> StreamOwned<ClientConnection, TcpStream> {
        self.over(TcpStream::connect(("127.0.0.1", self.port)).unwrap())
    }

    fn over(&self, stream: TcpStream) -> StreamOwned<ClientConnection, TcpStream> {
        stream.set_read_timeout(Some(Duration::from_secs(90))).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        StreamOwned::new(connection, stream)
    }

    /// Writes these bytes and reads until the server closes the connection.
    pub fn raw(&self, bytes: &[u8]) -> Response {
        let Ok(stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return Response::parse(b"") };
        let mut stream = self.over(stream);
        // A server that has seen enough may close before it has read everything.
        let _written = stream.write_all(bytes).and_then(|()| stream.flush());
        let mut answer = Vec::new();
        let _until_closed = stream.read_to_end(&mut answer);
        Response::parse(&answer)
    }

    /// One well-formed request.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost:{}\r\n", self.port);
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()));
        self.raw(request.as_bytes())
    }
}
