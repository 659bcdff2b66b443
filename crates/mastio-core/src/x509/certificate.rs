//! One certificate: its bytes, and what they say, read once.

use std::{fmt, net::IpAddr, ops::Range, sync::Arc};

use aws_lc_rs::digest;
use der::oid::ObjectIdentifier;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::extension::{self, BasicConstraints, Extension, Facts, KeyUsage};
use super::signature::PublicKey;
use super::tlv::{
    BIT_STRING, INTEGER, Reader, SEQUENCE, context, context_constructed, is_integer, range_in, read_time,
    single, tlv, whole_octets,
};
use super::{X509Error, hex, name, pem, serial_hex, sha256_hex};
use crate::time::UnixTime;

const PEM_LABEL: &str = "CERTIFICATE";

/// The kind of a public key, as far as the profiles care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// EC on the curve P-256, uncompressed point.
    P256,
    /// RSA.
    Rsa {
        /// The modulus' length in bits.
        bits: u32,
    },
    /// Anything else.
    Other,
}

/// An X.509 certificate, of any version. Cloning copies a pointer. Two are equal when their DER is.
#[derive(Clone)]
pub struct Certificate(Arc<Parsed>);

struct Parsed {
    der: Arc<[u8]>,
    tbs: Range<usize>,
    version: u8,
    serial: Range<usize>,
    inner_algorithm: Range<usize>,
    outer_algorithm: Range<usize>,
    signature: Range<usize>,
    issuer_name: Range<usize>,
    validity: Range<usize>,
    not_before_der: Range<usize>,
    not_after_der: Range<usize>,
    subject: Range<usize>,
    spki: Range<usize>,
    not_before: UnixTime,
    not_after: UnixTime,
    common_name: Option<String>,
    key_algorithm: KeyAlgorithm,
    extensions: Vec<Extension>,
    facts: Facts,
}

impl Certificate {
    /// Reads exactly one certificate.
    ///
    /// Errors: [`X509Error::Malformed`] where the bytes are not strict DER of RFC 5280 §4.1,
    /// [`X509Error::TrailingBytes`] where more follows.
    /// Not here: whether extensions can be read, and whether anything in it makes sense; the lints and
    /// path validation judge that.
    pub fn from_der(der: &[u8]) -> Result<Self, X509Error> {
        const WHAT: &str = "certificate";
        let der: Arc<[u8]> = Arc::from(der);
        let at = |part: &[u8]| range_in(&der, part);

        let mut outer = Reader::new(single(&der, SEQUENCE, WHAT)?.value, WHAT)?;
        let tbs = outer.expect(SEQUENCE)?;
        let outer_algorithm = outer.expect(SEQUENCE)?;
        let signature = whole_octets(outer.expect(BIT_STRING)?, WHAT)?;
        outer.finish()?;

        let mut fields = Reader::new(tbs.value, WHAT)?;
        let version = match fields.next_if(context_constructed(0))? {
            None => 1,
            Some(element) => match single(element.value, INTEGER, WHAT)?.value {
                // The default may not be encoded, but some v1 certificates do it.
                [0] => 1,
                [1] => 2,
                [2] => 3,
                _ => return Err(fields.malformed()),
            },
        };
        let serial = fields.expect(INTEGER)?.value;
        if !is_integer(serial) {
            return Err(fields.malformed());
        }
        let inner_algorithm = fields.expect(SEQUENCE)?;
        let issuer_name = fields.expect(SEQUENCE)?;
        let validity = fields.expect(SEQUENCE)?;
        let subject = fields.expect(SEQUENCE)?;
        let spki = fields.expect(SEQUENCE)?;
        if version > 1 {
            // issuerUniqueID and subjectUniqueID: read over, never used (RFC 5280 §4.1.2.8).
            fields.next_if(context(1))?;
            fields.next_if(context(2))?;
        }
        let extensions = match fields.next_if(context_constructed(3))? {
            Some(element) if version == 3 => extension::read_all(&der, element.value)?,
            Some(_) => return Err(fields.malformed()),
            None => Vec::new(),
        };
        fields.finish()?;

        let mut times = Reader::new(validity.value, "validity")?;
        let not_before = times.next()?;
        let not_after = times.next()?;
        times.finish()?;
        name::attributes(issuer_name.raw)?;
        let common_name = name::common_name(&name::attributes(subject.raw)?);
        let key_algorithm = PublicKey::read(spki.raw)?.key_algorithm();
        let facts = Facts::read(&extensions);

        Ok(Self(Arc::new(Parsed {
            tbs: at(tbs.raw),
            version,
            serial: at(serial),
            inner_algorithm: at(inner_algorithm.raw),
            outer_algorithm: at(outer_algorithm.raw),
            signature: at(signature),
            issuer_name: at(issuer_name.raw),
            validity: at(validity.raw),
            not_before_der: at(not_before.raw),
            not_after_der: at(not_after.raw),
            subject: at(subject.raw),
            spki: at(spki.raw),
            not_before: read_time(not_before)?,
            not_after: read_time(not_after)?,
            common_name,
            key_algorithm,
            extensions,
            facts,
            der: Arc::clone(&der),
        })))
    }

    /// Reads the first `CERTIFICATE` block of a PEM text; others are ignored.
    ///
    /// Errors: [`X509Error::Pem`] where there is none, and those of [`Certificate::from_der`].
    pub fn from_pem(pem: &str) -> Result<Self, X509Error> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| X509Error::Pem { label: PEM_LABEL })?;
        Self::from_der(&der)
    }

    /// Reads every `CERTIFICATE` block in order, at least one; blocks of other kinds are passed over.
    ///
    /// Errors: those of [`Certificate::from_pem`], for any block.
    pub fn chain_from_pem(pem: &str) -> Result<Vec<Self>, X509Error> {
        let mut chain = Vec::new();
        for block in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let der = block.map_err(|_| X509Error::Pem { label: PEM_LABEL })?;
            chain.push(Self::from_der(&der)?);
        }
        if chain.is_empty() { Err(X509Error::Pem { label: PEM_LABEL }) } else { Ok(chain) }
    }

    fn slice(&self, range: &Range<usize>) -> &[u8] {
        self.0.der.get(range.clone()).unwrap_or_default()
    }

    /// The certificate's bytes.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.0.der
    }

    /// The certificate as PEM: 64 columns, LF, final newline.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem(PEM_LABEL, self.der())
    }

    /// SHA-256 of the DER in lowercase hex.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        sha256_hex(self.der())
    }

    /// 1, 2 or 3.
    #[must_use]
    pub fn version(&self) -> u8 {
        self.0.version
    }

    /// The TBSCertificate, tag and length included: what the signature covers.
    #[must_use]
    pub fn tbs_der(&self) -> &[u8] {
        self.slice(&self.0.tbs)
    }

    /// The signature's octets.
    #[must_use]
    pub fn signature(&self) -> &[u8] {
        self.slice(&self.0.signature)
    }

    /// The AlgorithmIdentifier inside the signed part.
    #[must_use]
    pub fn signed_algorithm_der(&self) -> &[u8] {
        self.slice(&self.0.inner_algorithm)
    }

    /// The AlgorithmIdentifier beside the signature.
    #[must_use]
    pub fn signature_algorithm_der(&self) -> &[u8] {
        self.slice(&self.0.outer_algorithm)
    }

    /// The serial number's content octets as encoded, sign octet included.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        self.slice(&self.0.serial)
    }

    /// The serial number in lowercase hex, two digits an octet, without a leading sign octet.
    #[must_use]
    pub fn serial_hex(&self) -> String {
        serial_hex(self.serial())
    }

    /// The subject, tag and length included.
    #[must_use]
    pub fn subject_der(&self) -> &[u8] {
        self.slice(&self.0.subject)
    }

    /// The issuer name, tag and length included.
    #[must_use]
    pub fn issuer_name_der(&self) -> &[u8] {
        self.slice(&self.0.issuer_name)
    }

    /// The SubjectPublicKeyInfo, tag and length included.
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        self.slice(&self.0.spki)
    }

    /// The Validity, tag and length included.
    #[must_use]
    pub fn validity_der(&self) -> &[u8] {
        self.slice(&self.0.validity)
    }

    /// notBefore as encoded, tag and length included.
    #[must_use]
    pub fn not_before_der(&self) -> &[u8] {
        self.slice(&self.0.not_before_der)
    }

    /// notAfter as encoded, tag and length included.
    #[must_use]
    pub fn not_after_der(&self) -> &[u8] {
        self.slice(&self.0.not_after_der)
    }

    /// The subject's first common name; `None` where there is none, or none that is text.
    #[must_use]
    pub fn subject_common_name(&self) -> Option<&str> {
        self.0.common_name.as_deref()
    }

    /// The subject for people, as `CN=acme CA, O=acme`; never compare it.
    #[must_use]
    pub fn subject_display(&self) -> String {
        name::display(self.subject_der())
    }

    /// The issuer name for people; never compare it.
    #[must_use]
    pub fn issuer_display(&self) -> String {
        name::display(self.issuer_name_der())
    }

    /// The first valid second.
    #[must_use]
    pub fn not_before(&self) -> UnixTime {
        self.0.not_before
    }

    /// The last valid second.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.0.not_after
    }

    /// SHA-256 of the SubjectPublicKeyInfo in lowercase hex.
    #[must_use]
    pub fn spki_sha256(&self) -> String {
        sha256_hex(self.spki_der())
    }

    /// The key identifier that certificates below this one name: the SKI value where present, else the
    /// SHA-1 of the subjectPublicKey octets (RFC 5280 §4.2.1.2 method 1).
    #[must_use]
    pub fn key_id(&self) -> Vec<u8> {
        match self.subject_key_id() {
            Some(key_id) => key_id.to_vec(),
            None => PublicKey::read(self.spki_der()).map(key_id).unwrap_or_default(),
        }
    }

    /// The value of the SKI extension; `None` where absent or malformed.
    #[must_use]
    pub fn subject_key_id(&self) -> Option<&[u8]> {
        self.0.facts.subject_key_id.as_deref()
    }

    /// The keyIdentifier of the AKI extension; `None` where absent or malformed.
    #[must_use]
    pub fn authority_key_id(&self) -> Option<&[u8]> {
        self.0.facts.authority_key_id.as_deref()
    }

    /// basicConstraints; `None` where absent or malformed.
    #[must_use]
    pub fn basic_constraints(&self) -> Option<BasicConstraints> {
        self.0.facts.basic_constraints
    }

    /// keyUsage; `None` where absent or malformed.
    #[must_use]
    pub fn key_usage(&self) -> Option<KeyUsage> {
        self.0.facts.key_usage
    }

    /// The key purposes of extKeyUsage in order; empty where absent or malformed.
    #[must_use]
    pub fn extended_key_usages(&self) -> &[ObjectIdentifier] {
        &self.0.facts.extended_key_usages
    }

    /// The URIs of the SAN in order; empty where absent or malformed.
    #[must_use]
    pub fn uri_sans(&self) -> &[String] {
        &self.0.facts.uri_sans
    }

    /// The DNS names of the SAN in order; empty where absent or malformed.
    #[must_use]
    pub fn dns_sans(&self) -> &[String] {
        &self.0.facts.dns_sans
    }

    /// The IP addresses of the SAN in order; empty where absent or malformed.
    #[must_use]
    pub fn ip_sans(&self) -> &[IpAddr] {
        &self.0.facts.ip_sans
    }

    /// The kind of the subject's key.
    #[must_use]
    pub fn key_algorithm(&self) -> KeyAlgorithm {
        self.0.key_algorithm
    }

    /// Whether subject and issuer name are the same bytes (RFC 5280 §6.1).
    #[must_use]
    pub fn is_self_issued(&self) -> bool {
        self.subject_der() == self.issuer_name_der()
    }

    /// The extensions in order, understood or not.
    #[must_use]
    pub fn extensions(&self) -> &[Extension] {
        &self.0.extensions
    }

    /// The understood extensions whose value cannot be read. Facts about them are missing.
    #[must_use]
    pub fn malformed_extensions(&self) -> &[ObjectIdentifier] {
        &self.0.facts.malformed
    }

    /// An extension type that occurs more than once, against RFC 5280 §4.2; only its first counts.
    #[must_use]
    pub fn duplicated_extension(&self) -> Option<ObjectIdentifier> {
        self.0.facts.duplicated
    }

    /// Verifies that `issuer` signed this certificate.
    ///
    /// Shape: ECDSA on P-256 or P-384, or RSA PKCS #1 v1.5 from 2048 bits, with SHA-256, 384 or 512.
    /// Errors: [`X509Error::IssuerNameMismatch`], [`X509Error::UnsupportedSignatureAlgorithm`],
    /// [`X509Error::SignatureInvalid`]; [`X509Error::Malformed`] where the two algorithm fields differ.
    /// Not here: whether `issuer` may sign certificates, and any time.
    pub fn verify_signature(&self, issuer: &Self) -> Result<(), X509Error> {
        if self.issuer_name_der() != issuer.subject_der() {
            return Err(X509Error::IssuerNameMismatch);
        }
        if self.signed_algorithm_der() != self.signature_algorithm_der() {
            return Err(X509Error::Malformed { what: "signature algorithm" });
        }
        let algorithm = single(self.signature_algorithm_der(), SEQUENCE, "signature algorithm")?.value;
        PublicKey::read(issuer.spki_der())?.verify(algorithm, self.tbs_der(), self.signature())
    }

    /// Whether the subject's key is the one in `spki_der`, byte for byte.
    #[must_use]
    pub fn public_key_matches_spki(&self, spki_der: &[u8]) -> bool {
        self.spki_der() == spki_der
    }
}

/// SHA-1 of the subjectPublicKey octets (RFC 5280 §4.2.1.2 method 1): a name for a key, not a proof.
pub(super) fn key_id(key: PublicKey<'_>) -> Vec<u8> {
    digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, key.key).as_ref().to_vec()
}

/// Puts a certificate together from its three parts.
pub(super) fn assemble(tbs: &[u8], algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    tlv(SEQUENCE, &[tbs, algorithm, &tlv(BIT_STRING, &[&[0], signature])])
}

impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.der() == other.der()
    }
}

impl Eq for Certificate {}

impl std::hash::Hash for Certificate {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.der().hash(state);
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = digest::digest(&digest::SHA256, self.der());
        write!(formatter, "Certificate({}, {})", self.subject_display(), hex(digest.as_ref()))
    }
}
