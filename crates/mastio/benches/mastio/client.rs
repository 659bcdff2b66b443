//! A client that costs next to nothing: it shares the cores with the server that it measures.
//!
//! One kept-alive TLS connection, requests whose bytes are made beforehand, and as much of HTTP/1.1 as the server's
//! answers need.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::Failure;

/// Where an agent's files lie and what it trusts.
#[derive(Clone)]
pub struct Target {
    port: u16,
    /// Absent: in clear.
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    /// An agent with its files, for the server on `port` of this machine.
    pub fn new(port: u16, ca_pem: &str, chain_pem: &str, key_pem: &str) -> Result<Self, Failure> {
        let certificates =
            |pem: &str| CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
        let mut roots = RootCertStore::empty();
        for root in certificates(ca_pem)? {
            roots.add(root)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_client_auth_cert(
                certificates(chain_pem)?,
                PrivateKeyDer::from_pem_slice(key_pem.as_bytes())?,
            )?;
        Ok(Self { port, tls: Some(Arc::new(tls)) })
    }

    /// A server on `port` of this machine that is spoken to in clear.
    pub fn plain(port: u16) -> Self {
        Self { port, tls: None }
    }

    /// The bytes of a request.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
        let mut text = format!("{method} {path} HTTP/1.1\r\nhost: localhost:{}\r\n", self.port);
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        if method != "GET" {
            text.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()));
        }
        text.push_str("\r\n");
        text.push_str(body);
        text.into_bytes()
    }

    /// The bytes of a form.
    pub fn form(&self, path: &str, fields: &str) -> Vec<u8> {
        let kind = "content-type: application/x-www-form-urlencoded";
        let (port, length) = (self.port, fields.len());
        format!(
            "POST {path} HTTP/1.1\r\nhost: localhost:{port}\r\n{kind}\r\ncontent-length: {length}\r\n\r\n{fields}"
        )
        .into_bytes()
    }

    /// Connects and shakes hands.
    pub async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::try_from("localhost")?;
                Box::new(TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?)
            }
        };
        Ok(Connection { stream, buffer: Vec::with_capacity(16 * 1024), head: 0 })
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One kept-alive connection.
pub struct Connection {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    /// Bytes of the last answer's head.
    head: usize,
}

impl Connection {
    /// Sends a request and waits for the whole answer: status and body.
    pub async fn exchange(&mut self, request: &[u8]) -> Result<(u16, &[u8]), Failure> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let (head, length) = loop {
            self.read().await?;
            if let Some(head) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break (head + 4, content_length(&self.buffer[..head])?);
            }
        };
        while self.buffer.len() < head + length {
            self.read().await?;
        }
        self.head = head;
        let status = std::str::from_utf8(self.buffer.get(9..12).unwrap_or_default())?.parse()?;
        Ok((status, &self.buffer[head..head + length]))
    }

    /// Whether the last answer had a header of this name.
    pub fn has_header(&self, name: &str) -> bool {
        let end = self.buffer.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(0);
        let head = String::from_utf8_lossy(&self.buffer[..end]);
        head.lines()
            .filter_map(|line| line.split_once(':'))
            .any(|(found, _)| found.eq_ignore_ascii_case(name))
    }

    /// [`Self::exchange`], where any status but `expected` ends the measurement.
    pub async fn expect(&mut self, request: &[u8], expected: u16) -> Result<&[u8], Failure> {
        let (status, body) = self.exchange(request).await?;
        if status != expected {
            return Err(format!("{status} instead of {expected}: {}", String::from_utf8_lossy(body)).into());
        }
        Ok(body)
    }

    /// A header of the last answer.
    pub fn header(&self, wanted: &str) -> Option<String> {
        let head = std::str::from_utf8(self.buffer.get(..self.head)?).ok()?;
        let mut headers = head.lines().filter_map(|line| line.split_once(':'));
        headers.find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim().to_owned())
    }

    /// Sends a request whose answer is a stream, and waits until it has said `text`.
    pub async fn open(&mut self, request: &[u8], text: &str) -> Result<(), Failure> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        while !String::from_utf8_lossy(&self.buffer).contains(text) {
            self.read().await?;
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Failure> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Err("the server closed the connection".into());
        }
        Ok(())
    }
}

fn content_length(head: &[u8]) -> Result<usize, Failure> {
    let head = std::str::from_utf8(head)?;
    let value = head.lines().find_map(|line| {
        line.split_once(':')
            .filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map(|(_, value)| value)
    });
    Ok(value.ok_or("an answer without a length")?.trim().parse()?)
}
