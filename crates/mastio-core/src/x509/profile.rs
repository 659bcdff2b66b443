//! The certificates that Mastio issues, one function for each kind.
//!
//! Every profile carries what strict verifiers ask for (Python's `VERIFY_X509_STRICT`, `openssl verify
//! -x509_strict`): critical basicConstraints and keyUsage, an SKI, and an AKI equal to the issuer's SKI.
//! The predecessor's certificates lacked the AKI, and clients that pin its root and are strict refuse them.

use std::net::IpAddr;

use super::extension::{self, BasicConstraints, CLIENT_AUTH, KeyUsage, SERVER_AUTH};
use super::lints::{self, LintedTbs, Role};
use super::signature::PublicKey;
use super::tbs::Fields;
use super::tlv::{SEQUENCE, time, tlv};
use super::{
    Certificate, CertificateRequest, Names, Serial, SignatureAlgorithm, SubjectName, Validity, X509Error,
    certificate,
};
use crate::time::UnixTime;

/// Where a certificate's validity comes from.
#[derive(Debug, Clone)]
pub enum ValiditySpec {
    /// Two instants, written anew.
    Values(Validity),
    /// A fresh notBefore, and the notAfter of another certificate as it is encoded there.
    InheritNotAfter {
        /// The first valid second.
        not_before: UnixTime,
        /// The certificate whose notAfter is copied.
        from: Certificate,
    },
}

impl From<Validity> for ValiditySpec {
    fn from(validity: Validity) -> Self {
        Self::Values(validity)
    }
}

impl From<&Validity> for ValiditySpec {
    fn from(validity: &Validity) -> Self {
        Self::Values(*validity)
    }
}

impl ValiditySpec {
    fn into_der(self) -> Result<Vec<u8>, X509Error> {
        match self {
            Self::Values(validity) => {
                Ok(tlv(SEQUENCE, &[&time(validity.not_before)?, &time(validity.not_after)?]))
            }
            Self::InheritNotAfter { not_before, from } => {
                Ok(tlv(SEQUENCE, &[&time(not_before)?, from.not_after_der()]))
            }
        }
    }
}

/// A self-signed Org CA.
///
/// Shape: critical basicConstraints with cA and `path_len`; critical keyUsage keyCertSign and cRLSign; SKI;
/// AKI equal to it.
/// Errors: [`X509Error::Lint`] where the result breaks the full profile; [`X509Error::Name`],
/// [`X509Error::Time`] and [`X509Error::Malformed`] for parts that cannot be encoded.
/// Source: RFC 5280 §4.2.1.1 to §4.2.1.3, §4.2.1.9.
pub fn org_ca(
    subject: impl Into<SubjectName>,
    spki_der: &[u8],
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    path_len: u32,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let subject = subject.into().into_der()?;
    let key_id = certificate::key_id(PublicKey::read(spki_der)?);
    let constraints = BasicConstraints { ca: true, path_len: Some(path_len) };
    let fields = Fields {
        serial,
        algorithm,
        issuer_name: &subject,
        validity: &validity.into().into_der()?,
        subject: &subject,
        spki: spki_der,
        extensions: &[
            &extension::basic_constraints(constraints),
            &extension::key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN),
            &extension::subject_key_identifier(&key_id),
            &extension::authority_key_identifier(&key_id),
        ],
    };
    lints::admit_self_signed(fields.encode(), algorithm)
}

/// The Mastio intermediate: a CA with `pathLen=0` under `issuer`.
///
/// Shape and errors as for [`org_ca`], with the issuer's key identifier as AKI. Refused, too, where the
/// issuer's own pathLen leaves no room for an intermediate.
pub fn mastio_ca(
    issuer: &Certificate,
    subject: impl Into<SubjectName>,
    spki_der: &[u8],
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let key_id = certificate::key_id(PublicKey::read(spki_der)?);
    let subject = subject.into().into_der()?;
    intermediate(issuer, &subject, spki_der, &key_id, serial, &validity.into().into_der()?, algorithm)
}

/// A CA with `pathLen=0`, of which every varying part is given as DER.
pub(super) fn intermediate(
    issuer: &Certificate,
    subject: &[u8],
    spki_der: &[u8],
    key_id: &[u8],
    serial: &Serial,
    validity: &[u8],
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let constraints = BasicConstraints { ca: true, path_len: Some(0) };
    let fields = Fields {
        serial,
        algorithm,
        issuer_name: issuer.subject_der(),
        validity,
        subject,
        spki: spki_der,
        extensions: &[
            &extension::basic_constraints(constraints),
            &extension::key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN),
            &extension::subject_key_identifier(key_id),
            &extension::authority_key_identifier(&issuer.key_id()),
        ],
    };
    lints::admit(fields.encode(), algorithm, issuer, Role::CertificateAuthority)
}

/// An agent's leaf.
///
/// Shape: subject CN=`agent_id`, O=`org_id`; SAN with `spiffe_id` as its one URI; critical basicConstraints
/// without cA; critical keyUsage digitalSignature; extKeyUsage clientAuth; SKI; AKI.
/// Errors: as for [`org_ca`].
#[expect(clippy::too_many_arguments, reason = "each is a field of the certificate, and none has a default")]
pub fn agent_leaf(
    issuer: &Certificate,
    agent_id: &str,
    org_id: &str,
    spiffe_id: &str,
    spki_der: &[u8],
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let alternative_name = extension::uri_alternative_name(spiffe_id)?;
    let leaf =
        Leaf { common_name: agent_id, organization: Some(org_id), alternative_name, role: Role::Agent };
    leaf.admit(issuer, spki_der, serial, validity.into(), algorithm)
}

/// The certificate of the key that signs tokens: an agent's profile with CN=`proxy:<org>`.
///
/// Shape: as for [`agent_leaf`]; the predecessor's `spiffe_id` is `spiffe://<td>/proxy/<org>`.
/// Errors: as for [`org_ca`].
pub fn token_signer(
    issuer: &Certificate,
    org_id: &str,
    spiffe_id: &str,
    spki_der: &[u8],
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let common_name = format!("proxy:{org_id}");
    let leaf = Leaf {
        common_name: &common_name,
        organization: Some(org_id),
        alternative_name: extension::uri_alternative_name(spiffe_id)?,
        role: Role::Agent,
    };
    leaf.admit(issuer, spki_der, serial, validity.into(), algorithm)
}

/// The TLS server's leaf.
///
/// Shape: subject CN=`common_name`; SAN with every name of `dns` and every address of `ips`, at least one;
/// critical keyUsage digitalSignature; extKeyUsage serverAuth; SKI; AKI.
/// Errors: as for [`org_ca`].
#[expect(clippy::too_many_arguments, reason = "each is a field of the certificate, and none has a default")]
pub fn tls_server(
    issuer: &Certificate,
    common_name: &str,
    dns: &[String],
    ips: &[IpAddr],
    spki_der: &[u8],
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    let alternative_name = extension::server_alternative_names(dns, ips)?;
    let leaf = Leaf { common_name, organization: None, alternative_name, role: Role::Server };
    leaf.admit(issuer, spki_der, serial, validity.into(), algorithm)
}

/// The agent profile for the key of a certificate request: how a BYOCA owner gets a new certificate.
///
/// Shape and errors as for [`agent_leaf`]. Names come from the caller; the request's own are not used.
#[expect(clippy::too_many_arguments, reason = "each is a field of the certificate, and none has a default")]
pub fn externally_keyed_leaf(
    issuer: &Certificate,
    csr: &CertificateRequest,
    agent_id: &str,
    org_id: &str,
    spiffe_id: &str,
    serial: &Serial,
    validity: impl Into<ValiditySpec>,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    agent_leaf(issuer, agent_id, org_id, spiffe_id, csr.spki_der(), serial, validity, algorithm)
}

/// The old root's name and key, signed by the new root.
///
/// A client that pins the new root finds its way to leaves under the old key through it. Subject, SPKI and
/// key identifier are the old root's; AKI is the new root's; notBefore is the new root's, notAfter the
/// earlier of both, as encoded there.
/// Shape: a CA with `pathLen=0`, critical keyUsage keyCertSign and cRLSign.
/// Errors: [`X509Error::IssuerNameMismatch`] where the two roots' names differ, and as for [`org_ca`].
/// Source: RFC 4210 §4.4.
pub fn old_with_new(
    old_root: &Certificate,
    new_root: &Certificate,
    serial: &Serial,
    algorithm: SignatureAlgorithm,
) -> Result<LintedTbs, X509Error> {
    // Leaves name their issuer, not its key: under another name nobody would look at this certificate.
    if old_root.subject_der() != new_root.subject_der() {
        return Err(X509Error::IssuerNameMismatch);
    }
    let earlier = if old_root.not_after() < new_root.not_after() { old_root } else { new_root };
    let validity = tlv(SEQUENCE, &[new_root.not_before_der(), earlier.not_after_der()]);
    let (subject, spki, key_id) = (old_root.subject_der(), old_root.spki_der(), old_root.key_id());
    intermediate(new_root, subject, spki, &key_id, serial, &validity, algorithm)
}

struct Leaf<'a> {
    common_name: &'a str,
    organization: Option<&'a str>,
    alternative_name: Vec<u8>,
    role: Role,
}

impl Leaf<'_> {
    fn admit(
        &self,
        issuer: &Certificate,
        spki_der: &[u8],
        serial: &Serial,
        validity: ValiditySpec,
        algorithm: SignatureAlgorithm,
    ) -> Result<LintedTbs, X509Error> {
        let names = Names {
            common_name: self.common_name.to_owned(),
            organization: self.organization.map(str::to_owned),
        };
        let purpose = if self.role == Role::Server { &SERVER_AUTH } else { &CLIENT_AUTH };
        let key_id = certificate::key_id(PublicKey::read(spki_der)?);
        let constraints = BasicConstraints { ca: false, path_len: None };
        let fields = Fields {
            serial,
            algorithm,
            issuer_name: issuer.subject_der(),
            validity: &validity.into_der()?,
            subject: &SubjectName::from(names).into_der()?,
            spki: spki_der,
            extensions: &[
                &extension::basic_constraints(constraints),
                &extension::key_usage(KeyUsage::DIGITAL_SIGNATURE),
                &extension::extended_key_usage(purpose),
                &self.alternative_name,
                &extension::subject_key_identifier(&key_id),
                &extension::authority_key_identifier(&issuer.key_id()),
            ],
        };
        lints::admit(fields.encode(), algorithm, issuer, self.role)
    }
}
