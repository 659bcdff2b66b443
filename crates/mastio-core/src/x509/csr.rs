//! Certificate requests (PKCS #10, RFC 2986): a key whose holder has proved possession of it.

use std::sync::Arc;

use der::oid::ObjectIdentifier;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};

use super::extension::{self, Facts};
use super::signature::PublicKey;
use super::tlv::{
    BIT_STRING, INTEGER, OBJECT_IDENTIFIER, Reader, SEQUENCE, SET, context_constructed, single, whole_octets,
};
use super::{KeyAlgorithm, X509Error, name};

const WHAT: &str = "certificate request";
const PEM_LABEL: &str = "CERTIFICATE REQUEST";

/// extensionRequest (RFC 2985 §5.4.2).
const EXTENSION_REQUEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.14");

/// A request whose self-signature has been verified.
#[derive(Debug, Clone)]
pub struct CertificateRequest {
    spki: Vec<u8>,
    common_name: Option<String>,
    uri_sans: Vec<String>,
    key_algorithm: KeyAlgorithm,
}

impl CertificateRequest {
    /// Reads the first request of a PEM text, also under the label `NEW CERTIFICATE REQUEST`.
    ///
    /// Errors: [`X509Error::Pem`] where there is none, and those of [`CertificateRequest::from_der`].
    pub fn from_pem(pem: &str) -> Result<Self, X509Error> {
        // Older toolkits say NEW (RFC 7468 §7).
        let pem = pem.replace("NEW CERTIFICATE REQUEST", PEM_LABEL);
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| X509Error::Pem { label: PEM_LABEL })?;
        Self::from_der(&der)
    }

    /// Reads exactly one request and verifies that its own key signed it.
    ///
    /// Errors: [`X509Error::Malformed`], [`X509Error::TrailingBytes`],
    /// [`X509Error::UnsupportedSignatureAlgorithm`], [`X509Error::SignatureInvalid`].
    /// Source: RFC 2986 §4.
    pub fn from_der(der: &[u8]) -> Result<Self, X509Error> {
        let mut outer = Reader::new(single(der, SEQUENCE, WHAT)?.value, WHAT)?;
        let info = outer.expect(SEQUENCE)?;
        let algorithm = outer.expect(SEQUENCE)?;
        let signature = whole_octets(outer.expect(BIT_STRING)?, WHAT)?;
        outer.finish()?;

        let mut fields = Reader::new(info.value, WHAT)?;
        if fields.expect(INTEGER)?.value != [0] {
            return Err(fields.malformed());
        }
        let subject = fields.expect(SEQUENCE)?;
        let spki = fields.expect(SEQUENCE)?;
        // Mandatory, but OpenSSL could be told to leave it out.
        let attributes = fields.next_if(context_constructed(0))?;
        fields.finish()?;

        let key = PublicKey::read(spki.raw)?;
        key.verify(algorithm.value, info.raw, signature)?;

        let uri_sans = match attributes {
            Some(attributes) => requested_uris(attributes.value)?,
            None => Vec::new(),
        };
        Ok(Self {
            spki: spki.raw.to_vec(),
            common_name: name::common_name(&name::attributes(subject.raw)?),
            uri_sans,
            key_algorithm: key.key_algorithm(),
        })
    }

    /// The SubjectPublicKeyInfo, tag and length included.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.spki
    }

    /// The first common name of the subject that the requester asks for.
    #[must_use]
    pub fn subject_common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// The URIs of the SAN that the requester asks for, in order.
    #[must_use]
    pub fn uri_sans(&self) -> &[String] {
        &self.uri_sans
    }

    /// The kind of the requester's key.
    #[must_use]
    pub fn key_algorithm(&self) -> KeyAlgorithm {
        self.key_algorithm
    }
}

fn requested_uris(attributes: &[u8]) -> Result<Vec<String>, X509Error> {
    let mut reader = Reader::new(attributes, WHAT)?;
    let mut uris = Vec::new();
    while !reader.is_finished() {
        let mut attribute = Reader::new(reader.expect(SEQUENCE)?.value, WHAT)?;
        let oid = attribute.expect(OBJECT_IDENTIFIER)?;
        let values = attribute.expect(SET)?;
        attribute.finish()?;
        if oid.value != EXTENSION_REQUEST.as_bytes() {
            continue;
        }
        let extensions: Arc<[u8]> = Arc::from(single(values.value, SEQUENCE, WHAT)?.raw);
        let facts = Facts::read(&extension::read_all(&extensions, &extensions)?);
        if !facts.malformed.is_empty() || facts.duplicated.is_some() {
            return Err(reader.malformed());
        }
        uris.extend(facts.uri_sans);
    }
    Ok(uris)
}
