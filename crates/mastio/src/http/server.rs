//! TLS and HTTP/1.1 in front: one task a connection.
//!
//! The handshake proves possession of the client's key and nothing else (design §4): no CA hints are sent, no path
//! is built, and a certificate that would be refused is refused later, by a 401 that can be read and audited. No
//! session is ever resumed, so no old decision outlives a change of trust.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::signature::{self, UnparsedPublicKey};
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use mastio_core::x509::{Certificate, KeyAlgorithm};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime as TlsTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::body::TimedBody;
use super::context::Context;
use super::limits::Quotas;
use crate::clock::Clock;
use crate::entropy::Entropy;
use crate::store::refusals::{Refusal, Refusals};

/// Connections that may be open at once.
const CONNECTIONS_MAX: usize = 16_384;
/// A handshake that takes longer is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers that take longer to arrive are not waited for.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of request line and headers that are read at most.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// How long accepted requests may take to finish after SIGTERM.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// A listening server.
pub struct Server {
    /// Where to listen; bound already, so that its port is known.
    pub listener: TcpListener,
    /// The TLS configuration in force; a new one serves from the next connection on.
    pub tls: Arc<ArcSwap<ServerConfig>>,
    /// Routes.
    pub router: Router,
    /// Stamps requests.
    pub clock: Arc<dyn Clock>,
    /// Names requests.
    pub entropy: Arc<Entropy>,
    /// Where it is written that somebody sends what is no HTTP request.
    pub refusals: Refusals,
}

/// Where a request that cannot be read would have gone.
const NO_ROUTE: &str = "-";

impl Server {
    /// Serves until `stop` turns true, then lets accepted requests finish.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let graceful = Arc::new(GracefulShutdown::new());
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = stop.wait_for(|stopping| *stopping) => break,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors: wait for connections to close instead of spinning.
                    tracing::warn!(error = %error, "accept_failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else { continue };
            let acceptor = TlsAcceptor::from(self.tls.load_full());
            let (router, clock, entropy) =
                (self.router.clone(), Arc::clone(&self.clock), Arc::clone(&self.entropy));
            let (watcher, refusals) = (graceful.watcher(), self.refusals.clone());
            tokio::spawn(async move {
                let (now, naming) = (Arc::clone(&clock), Arc::clone(&entropy));
                let served = serve(stream, peer, acceptor, router, clock, entropy, watcher).await;
                if let Err(error) = served {
                    tracing::debug!(peer = %peer, error = %error, "connection_ended");
                    // Two lengths, a folded header: it has been answered by 400, before there was a request.
                    if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
                        let now = now.now();
                        let refusal = Refusal {
                            route: NO_ROUTE,
                            reason: "http_malformed",
                            request_id: &naming.ulid(now),
                            address: peer.ip(),
                            now: now.seconds(),
                        };
                        refusals.record(refusal).await;
                    }
                }
                drop(permit);
            });
        }
        drop(self.listener);
        if let Some(graceful) = Arc::into_inner(graceful) {
            let _timed_out = tokio::time::timeout(DRAIN_TIMEOUT, graceful.shutdown()).await;
        }
    }
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    clock: Arc<dyn Clock>,
    entropy: Arc<Entropy>,
    watcher: hyper_util::server::graceful::Watcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let client_certificate: Option<Arc<[u8]>> = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|leaf| Arc::from(leaf.as_ref()));
    let service = router.map_request(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut request = request.map(|body| axum::body::Body::new(TimedBody::new(body)));
        let now = clock.now();
        request.extensions_mut().insert(Context {
            request_id: entropy.ulid(now),
            now,
            peer,
            source: peer.ip(),
            client_certificate: client_certificate.clone(),
            quotas: Quotas::default(),
        });
        request
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    Ok(watcher.watch(connection).await?)
}

/// Builds the TLS configuration for a certificate chain and its key.
///
/// Errors: [`rustls::Error`] when key and certificate do not fit.
pub fn tls_config(
    chain: Vec<CertificateDer<'static>>,
    key: rustls::pki_types::PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(PossessionOnly))
        .with_single_cert(chain, key)?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Accepts any client certificate whose key signs the handshake.
///
/// rustls' own helpers parse the certificate by webpki, which answers X.509 v1 and unknown critical extensions with
/// an alert, where the wire contract wants a 401. So the signature is checked against the leaf's SPKI directly.
#[derive(Debug)]
struct PossessionOnly;

impl PossessionOnly {
    fn verify(message: &[u8], cert: &CertificateDer<'_>, dss: &DigitallySignedStruct) -> Option<()> {
        let leaf = Certificate::from_der(cert.as_ref()).ok()?;
        let algorithm: &dyn signature::VerificationAlgorithm = match (dss.scheme, leaf.key_algorithm()) {
            (SignatureScheme::ECDSA_NISTP256_SHA256, KeyAlgorithm::P256) => {
                &signature::ECDSA_P256_SHA256_ASN1
            }
            (SignatureScheme::RSA_PSS_SHA256, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PSS_2048_8192_SHA256
            }
            (SignatureScheme::RSA_PSS_SHA384, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PSS_2048_8192_SHA384
            }
            (SignatureScheme::RSA_PSS_SHA512, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PSS_2048_8192_SHA512
            }
            (SignatureScheme::RSA_PKCS1_SHA256, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PKCS1_2048_8192_SHA256
            }
            (SignatureScheme::RSA_PKCS1_SHA384, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PKCS1_2048_8192_SHA384
            }
            (SignatureScheme::RSA_PKCS1_SHA512, KeyAlgorithm::Rsa { .. }) => {
                &signature::RSA_PKCS1_2048_8192_SHA512
            }
            _ => return None,
        };
        UnparsedPublicKey::new(algorithm, leaf.spki_der()).verify(message, dss.signature()).ok()
    }
}

impl ClientCertVerifier for PossessionOnly {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: TlsTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify(message, cert, dss)
            .map(|()| HandshakeSignatureValid::assertion())
            .ok_or(rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_tls12_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PKCS1_SHA256,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA512,
        ]
    }
}

/// Binds `address`. Errors: the operating system's, with the address in the caller's hands.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}
