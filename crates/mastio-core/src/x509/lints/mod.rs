//! The rules that a certificate must meet before it is signed, one file for each.
//!
//! A lint reads the finished bytes, as a stranger would, and not the values they were made of: a mistake in
//! writing is found by the code that did not write. There are two rule sets. The *full* one is for what we
//! issue by our own profiles. The *resign* one is for a leaf whose owner's fields are copied: those stay as
//! they are, so only what we set is judged, and that we do not make a CA. The *complete* one is for a leaf that
//! was copied and got what the agent profile asks for besides: it is *resign*, and nothing may be missing any more.

mod authority_key_identifier;
mod certificate_authority;
mod duplicate_extensions;
mod end_entity;
mod extension_encoding;
mod issuer_name;
mod key_size;
mod leaf_profile;
mod path_length;
mod serial;
mod signature_algorithm;
mod subject_alternative_name;
mod validity;

pub use self::leaf_profile::leaf_gaps;

use super::{Certificate, Finding, SignatureAlgorithm, X509Error, certificate::assemble};

/// What a certificate is for, where the full profile differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Signs certificates.
    CertificateAuthority,
    /// Names an agent, or Mastio's own token key, by one SPIFFE URI.
    Agent,
    /// A TLS server.
    Server,
}

/// Which rules apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    Full(Role),
    Resign,
    Complete,
}

impl Rules {
    /// Whether the fields are an owner's, copied as they are.
    fn copied(self) -> bool {
        matches!(self, Self::Resign | Self::Complete)
    }
}

/// What a lint looks at.
struct Judged<'a> {
    certificate: &'a Certificate,
    /// The certificate itself where it is self-signed.
    issuer: &'a Certificate,
    rules: Rules,
}

impl Judged<'_> {
    fn self_signed(&self) -> bool {
        self.certificate == self.issuer
    }
}

/// A lint's name and its judgement: `None` where it finds nothing.
type Lint = (&'static str, fn(&Judged<'_>) -> Option<String>);

const FULL: [Lint; 12] = [
    ("extension_encoding", extension_encoding::judge),
    ("duplicate_extensions", duplicate_extensions::judge),
    ("serial", serial::judge),
    ("signature_algorithm", signature_algorithm::judge),
    ("issuer_name", issuer_name::judge),
    ("validity", validity::judge),
    ("key_size", key_size::judge),
    ("certificate_authority", certificate_authority::judge),
    ("end_entity", end_entity::judge),
    ("path_length", path_length::judge),
    ("authority_key_identifier", authority_key_identifier::judge),
    ("subject_alternative_name", subject_alternative_name::judge),
];

const RESIGN: [Lint; 7] = [
    ("duplicate_extensions", duplicate_extensions::judge),
    ("serial", serial::judge),
    ("signature_algorithm", signature_algorithm::judge),
    ("issuer_name", issuer_name::judge),
    ("validity", validity::judge),
    ("end_entity", end_entity::judge),
    ("authority_key_identifier", authority_key_identifier::judge),
];

const COMPLETE: [Lint; 8] = [
    ("duplicate_extensions", duplicate_extensions::judge),
    ("serial", serial::judge),
    ("signature_algorithm", signature_algorithm::judge),
    ("issuer_name", issuer_name::judge),
    ("validity", validity::judge),
    ("end_entity", end_entity::judge),
    ("authority_key_identifier", authority_key_identifier::judge),
    ("leaf_profile", leaf_profile::judge),
];

fn run(lints: &[Lint], judged: &Judged<'_>) -> Vec<Finding> {
    lints.iter().filter_map(|(lint, judge)| judge(judged).map(|detail| Finding { lint, detail })).collect()
}

/// What the full profile finds in a certificate; empty where it meets the profile.
///
/// Shape: for a self-signed certificate `issuer` is the certificate itself.
/// Not here: signatures and the present time.
#[must_use]
pub fn full_findings(certificate: &Certificate, issuer: &Certificate, role: Role) -> Vec<Finding> {
    run(&FULL, &Judged { certificate, issuer, rules: Rules::Full(role) })
}

/// What the `resign` rules find in a re-signed leaf; empty where it meets them.
#[must_use]
pub fn resign_findings(certificate: &Certificate, issuer: &Certificate) -> Vec<Finding> {
    run(&RESIGN, &Judged { certificate, issuer, rules: Rules::Resign })
}

/// What the `complete` rules find in a leaf that was copied and completed; empty where it meets them.
#[must_use]
pub fn complete_findings(certificate: &Certificate, issuer: &Certificate) -> Vec<Finding> {
    run(&COMPLETE, &Judged { certificate, issuer, rules: Rules::Complete })
}

/// Bytes that the lints have passed and that may be signed. Only this module makes one.
#[derive(Debug, Clone)]
pub struct LintedTbs {
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
}

impl LintedTbs {
    /// The TBSCertificate's DER: the message to be signed.
    #[must_use]
    pub fn to_be_signed(&self) -> &[u8] {
        &self.tbs
    }

    /// How to sign it.
    #[must_use]
    pub fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// Puts the signature below the signed bytes.
    ///
    /// Shape: `signature` is a DER ECDSA-Sig-Value, or the octets of an RSA signature.
    /// Errors: [`X509Error::SignatureInvalid`] where it is empty.
    /// Not here: its verification; see [`Certificate::verify_signature`].
    pub fn into_certificate(self, signature: &[u8]) -> Result<Certificate, X509Error> {
        if signature.is_empty() {
            return Err(X509Error::SignatureInvalid);
        }
        Certificate::from_der(&assemble(&self.tbs, &self.algorithm.identifier_der(), signature))
    }
}

/// Runs the full rules on what is to be signed by `issuer`.
pub(super) fn admit(
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
    issuer: &Certificate,
    role: Role,
) -> Result<LintedTbs, X509Error> {
    let unsigned = unsigned(&tbs, algorithm)?;
    conclude(tbs, algorithm, full_findings(&unsigned, issuer, role))
}

/// Runs the full rules on a root that is to be signed by its own key.
pub(super) fn admit_self_signed(tbs: Vec<u8>, algorithm: SignatureAlgorithm) -> Result<LintedTbs, X509Error> {
    let unsigned = unsigned(&tbs, algorithm)?;
    conclude(tbs, algorithm, full_findings(&unsigned, &unsigned, Role::CertificateAuthority))
}

/// Runs the `resign` rules on what is to be signed by `issuer`.
pub(super) fn admit_resigned(
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
    issuer: &Certificate,
) -> Result<LintedTbs, X509Error> {
    let unsigned = unsigned(&tbs, algorithm)?;
    conclude(tbs, algorithm, resign_findings(&unsigned, issuer))
}

/// Runs the `complete` rules on what is to be signed by `issuer`.
pub(super) fn admit_completed(
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
    issuer: &Certificate,
) -> Result<LintedTbs, X509Error> {
    let unsigned = unsigned(&tbs, algorithm)?;
    conclude(tbs, algorithm, complete_findings(&unsigned, issuer))
}

/// The certificate-to-be with an empty signature, so that lints read it like any other.
fn unsigned(tbs: &[u8], algorithm: SignatureAlgorithm) -> Result<Certificate, X509Error> {
    Certificate::from_der(&assemble(tbs, &algorithm.identifier_der(), &[]))
}

fn conclude(
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
    findings: Vec<Finding>,
) -> Result<LintedTbs, X509Error> {
    if findings.is_empty() { Ok(LintedTbs { tbs, algorithm }) } else { Err(X509Error::Lint { findings }) }
}

#[cfg(test)]
mod fixture {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::time::UnixTime;
    use crate::x509::extension::{self, CLIENT_AUTH};
    use crate::x509::signature::P256_ALGORITHM;
    use crate::x509::tlv::{BIT_STRING, INTEGER, SEQUENCE, context_constructed, time, tlv};
    use crate::x509::{BasicConstraints, KeyUsage, Names, SubjectName};

    /// A certificate by its parts, each of which a test may spoil. Its signature is empty.
    pub(super) struct Fixture {
        pub(super) serial: Vec<u8>,
        pub(super) inner_algorithm: Vec<u8>,
        pub(super) outer_algorithm: Vec<u8>,
        pub(super) issuer_name: Vec<u8>,
        pub(super) validity: [Vec<u8>; 2],
        pub(super) subject: Vec<u8>,
        pub(super) spki: Vec<u8>,
        pub(super) extensions: Vec<Vec<u8>>,
    }

    pub(super) fn name(common_name: &str) -> Vec<u8> {
        let names = Names { common_name: common_name.to_owned(), organization: None };
        SubjectName::from(names).into_der().unwrap()
    }

    pub(super) const ISSUER_KEY_ID: &[u8] = b"the issuer's key id!";

    impl Fixture {
        fn new(subject: &str, issuer: &str, extensions: Vec<Vec<u8>>) -> Self {
            let algorithm = SignatureAlgorithm::EcdsaP256Sha256.identifier_der();
            let point = [&[0, 4][..], &[7; 64]].concat();
            Self {
                serial: vec![0x00, 0x81, 0x02],
                inner_algorithm: algorithm.clone(),
                outer_algorithm: algorithm,
                issuer_name: name(issuer),
                validity: [time(UnixTime(1_700_000_000)).unwrap(), time(UnixTime(1_800_000_000)).unwrap()],
                subject: name(subject),
                spki: tlv(SEQUENCE, &[&tlv(SEQUENCE, &[P256_ALGORITHM]), &tlv(BIT_STRING, &[&point])]),
                extensions,
            }
        }

        /// A self-signed CA with pathLen 1, the issuer of the others.
        pub(super) fn root() -> Self {
            Self::new("root", "root", Self::ca_extensions(1))
        }

        pub(super) fn ca() -> Self {
            Self::new("ca", "root", Self::ca_extensions(0))
        }

        fn ca_extensions(path_len: u32) -> Vec<Vec<u8>> {
            vec![
                extension::basic_constraints(BasicConstraints { ca: true, path_len: Some(path_len) }),
                extension::key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN),
                extension::subject_key_identifier(ISSUER_KEY_ID),
                extension::authority_key_identifier(ISSUER_KEY_ID),
            ]
        }

        pub(super) fn agent() -> Self {
            Self::new(
                "acme::bot",
                "root",
                vec![
                    extension::basic_constraints(BasicConstraints { ca: false, path_len: None }),
                    extension::key_usage(KeyUsage::DIGITAL_SIGNATURE),
                    extension::extended_key_usage(&CLIENT_AUTH),
                    extension::uri_alternative_name("spiffe://cullis.local/acme/bot").unwrap(),
                    extension::subject_key_identifier(b"leaf"),
                    extension::authority_key_identifier(ISSUER_KEY_ID),
                ],
            )
        }

        pub(super) fn certificate(&self) -> Certificate {
            let extensions: Vec<&[u8]> = self.extensions.iter().map(Vec::as_slice).collect();
            let tbs = tlv(
                SEQUENCE,
                &[
                    &tlv(context_constructed(0), &[&tlv(INTEGER, &[&[2]])]),
                    &tlv(INTEGER, &[&self.serial]),
                    &self.inner_algorithm,
                    &self.issuer_name,
                    &tlv(SEQUENCE, &[&self.validity[0], &self.validity[1]]),
                    &self.subject,
                    &self.spki,
                    &tlv(context_constructed(3), &[&tlv(SEQUENCE, &extensions)]),
                ],
            );
            Certificate::from_der(&assemble(&tbs, &self.outer_algorithm, &[])).unwrap()
        }

        /// The names of the lints that find something under the full rules.
        pub(super) fn full(&self, role: Role) -> Vec<&'static str> {
            let issuer = Self::root().certificate();
            names(full_findings(&self.certificate(), &issuer, role))
        }

        /// The same under the `resign` rules.
        pub(super) fn resign(&self) -> Vec<&'static str> {
            names(resign_findings(&self.certificate(), &Self::root().certificate()))
        }

        /// The same under the `complete` rules.
        pub(super) fn complete(&self) -> Vec<&'static str> {
            names(complete_findings(&self.certificate(), &Self::root().certificate()))
        }
    }

    fn names(findings: Vec<Finding>) -> Vec<&'static str> {
        findings.iter().map(|finding| finding.lint).collect()
    }

    #[test]
    fn sound_certificates_of_every_role_pass_every_lint() {
        assert_eq!(Fixture::agent().full(Role::Agent), [""; 0]);
        assert_eq!(Fixture::agent().resign(), [""; 0]);
        assert_eq!(Fixture::ca().full(Role::CertificateAuthority), [""; 0]);
        let root = Fixture::root().certificate();
        assert_eq!(full_findings(&root, &root, Role::CertificateAuthority), []);
    }
}
