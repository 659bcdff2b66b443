//! Tests over several files of this module: what is issued here, and what becomes of it elsewhere.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::Cell;
use std::collections::HashSet;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::signature::{self as crypto, EcdsaKeyPair, KeyPair as _, RsaKeyPair};
use der::oid::ObjectIdentifier;
use proptest::prelude::*;
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use x509_parser::prelude::FromDer as _;

use super::extension::{AUTHORITY_KEY_IDENTIFIER, CLIENT_AUTH, SERVER_AUTH, basic_constraints, key_usage};
use super::path::{PRESENTED_MAX, validate, validate_server_strict, validate_strict, verify_ca_chain};
use super::tbs::Fields;
use super::tlv::{OBJECT_IDENTIFIER, OCTET_STRING, SEQUENCE, time, tlv};
use super::*;

macro_rules! vector {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/x509/", $name))
    };
}

/// 2026-11-23, inside the validity of the legacy vectors.
const NOW: UnixTime = UnixTime(1_795_400_000);
const DAY: i64 = 86_400;
const SPIFFE_ID: &str = "spiffe://cullis.local/acme/bot";

fn validity() -> Validity {
    Validity { not_before: NOW.plus(-DAY), not_after: NOW.plus(365 * DAY) }
}

fn serial() -> Serial {
    thread_local!(static NEXT: Cell<u128> = const { Cell::new(1 << 127) });
    Serial::new(NEXT.replace(NEXT.get() + 1).to_be_bytes()).unwrap()
}

enum Key {
    P256(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl Key {
    fn p256() -> Self {
        Self::P256(EcdsaKeyPair::generate(&crypto::ECDSA_P256_SHA256_ASN1_SIGNING).unwrap())
    }

    fn rsa(pem: &str) -> Self {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap();
        Self::Rsa(RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).unwrap())
    }

    fn rsa_a() -> Self {
        Self::rsa(vector!("rsa_a.key"))
    }

    fn rsa_b() -> Self {
        Self::rsa(vector!("rsa_b.key"))
    }

    fn spki(&self) -> Vec<u8> {
        match self {
            Self::P256(key) => p256_spki_der(key.public_key().as_ref()).unwrap(),
            Self::Rsa(key) => {
                let der: PublicKeyX509Der<'_> = key.public_key().as_der().unwrap();
                der.as_ref().to_vec()
            }
        }
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        match self {
            Self::P256(_) => SignatureAlgorithm::EcdsaP256Sha256,
            Self::Rsa(_) => SignatureAlgorithm::RsaPkcs1Sha256,
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::P256(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&crypto::RSA_PKCS1_SHA256, &random, message, &mut signature).unwrap();
                signature
            }
        }
    }

    fn complete(&self, linted: Result<LintedTbs, X509Error>) -> Certificate {
        let linted = linted.unwrap();
        let signature = self.sign(linted.to_be_signed());
        linted.into_certificate(&signature).unwrap()
    }
}

/// A root, an intermediate below it and an agent's leaf below that.
struct Pki {
    root_key: Key,
    root: Certificate,
    ca_key: Key,
    ca: Certificate,
    leaf: Certificate,
}

fn org_names() -> Names {
    Names { common_name: "acme CA".to_owned(), organization: Some("acme".to_owned()) }
}

fn root(key: &Key, path_len: u32) -> Certificate {
    key.complete(profile::org_ca(org_names(), &key.spki(), &serial(), validity(), path_len, key.algorithm()))
}

fn ca(issuer: &Certificate, issuer_key: &Key, key: &Key) -> Certificate {
    let names = Names { common_name: "acme Mastio CA".to_owned(), organization: Some("acme".to_owned()) };
    let algorithm = issuer_key.algorithm();
    issuer_key.complete(profile::mastio_ca(issuer, names, &key.spki(), &serial(), validity(), algorithm))
}

fn leaf(issuer: &Certificate, issuer_key: &Key, key: &Key) -> Certificate {
    issuer_key.complete(profile::agent_leaf(
        issuer,
        "acme::bot",
        "acme",
        SPIFFE_ID,
        &key.spki(),
        &serial(),
        validity(),
        issuer_key.algorithm(),
    ))
}

impl Pki {
    fn new() -> Self {
        Self::under(Key::rsa_a())
    }

    fn under(root_key: Key) -> Self {
        let root = root(&root_key, 1);
        let ca_key = Key::p256();
        let ca = ca(&root, &root_key, &ca_key);
        let leaf = leaf(&ca, &ca_key, &Key::p256());
        Self { root_key, root, ca_key, ca, leaf }
    }

    fn anchors(&self) -> [Anchor; 1] {
        [Anchor::from_certificate(&self.root).unwrap()]
    }
}

/// Signs what no lint would admit, as an attacker would.
struct Forged<'a> {
    issuer: &'a Certificate,
    issuer_key: &'a Key,
    subject: &'a str,
    key: &'a Key,
    validity: Validity,
    extensions: Vec<Vec<u8>>,
}

impl Forged<'_> {
    fn certificate(&self) -> Certificate {
        let names = Names { common_name: self.subject.to_owned(), organization: Some("acme".to_owned()) };
        let validity = tlv(
            SEQUENCE,
            &[&time(self.validity.not_before).unwrap(), &time(self.validity.not_after).unwrap()],
        );
        let extensions: Vec<&[u8]> = self.extensions.iter().map(Vec::as_slice).collect();
        let algorithm = self.issuer_key.algorithm();
        let tbs = Fields {
            serial: &serial(),
            algorithm,
            issuer_name: self.issuer.subject_der(),
            validity: &validity,
            subject: &SubjectName::from(names).into_der().unwrap(),
            spki: &self.key.spki(),
            extensions: &extensions,
        }
        .encode();
        let der = certificate::assemble(&tbs, &algorithm.identifier_der(), &self.issuer_key.sign(&tbs));
        Certificate::from_der(&der).unwrap()
    }
}

fn unknown_critical_extension() -> Vec<u8> {
    let oid = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.99999.1");
    let oid = tlv(OBJECT_IDENTIFIER, &[oid.as_bytes()]);
    tlv(SEQUENCE, &[&oid, &[0x01, 0x01, 0xff], &tlv(OCTET_STRING, &[&[0x05, 0x00]])])
}

fn legacy() -> [Certificate; 3] {
    let chain = Certificate::chain_from_pem(vector!("legacy_agent_p256_chain.pem")).unwrap();
    let root = Certificate::from_pem(vector!("legacy_org_ca.pem")).unwrap();
    [chain[0].clone(), chain[1].clone(), root]
}

// Reading.

#[test]
fn legacy_certificates_are_read_with_all_their_facts() {
    let [leaf, ca, root] = legacy();
    assert_eq!(ca, Certificate::from_pem(vector!("legacy_mastio_ca.pem")).unwrap());
    assert_eq!(root.subject_display(), "CN=legacy-org CA, O=legacy-org");
    assert_eq!(root.basic_constraints(), Some(BasicConstraints { ca: true, path_len: Some(0) }));
    assert_eq!(root.key_algorithm(), KeyAlgorithm::Rsa { bits: 4096 });
    assert!(root.is_self_issued() && !ca.is_self_issued());
    assert!(root.key_usage().unwrap().key_cert_sign() && root.key_usage().unwrap().digital_signature());
    assert_eq!(root.key_id(), root.subject_key_id().unwrap());
    assert_eq!(leaf.subject_common_name(), Some("legacy-org::agent-0002"));
    assert_eq!(leaf.issuer_display(), "CN=legacy-org Mastio CA, O=legacy-org");
    assert_eq!(leaf.uri_sans(), ["spiffe://cullis.local/legacy-org/agent-0002"]);
    assert_eq!(leaf.key_algorithm(), KeyAlgorithm::P256);
    assert_eq!(leaf.basic_constraints(), None);
    assert_eq!(leaf.key_usage(), None);
    assert_eq!(identity(&leaf).unwrap().agent_id(), "legacy-org::agent-0002");
    assert_eq!(identity(&leaf).unwrap().trust_domain.as_deref(), Some("cullis.local"));
    assert!(leaf.verify_signature(&ca).is_ok());
    assert!(ca.verify_signature(&root).is_ok());
    assert!(root.verify_signature(&root).is_ok());
    assert_eq!(leaf.verify_signature(&root), Err(X509Error::IssuerNameMismatch));
    assert!(leaf.public_key_matches_spki(leaf.spki_der()) && !leaf.public_key_matches_spki(ca.spki_der()));
}

#[test]
fn another_parser_reads_the_same_facts() {
    let issued = Pki::new();
    let v1 = Certificate::from_pem(vector!("v1_self_signed.pem")).unwrap();
    let rsa = Certificate::from_pem(vector!("legacy_root5_agent_rsa.pem")).unwrap();
    for certificate in legacy().into_iter().chain([issued.root, issued.ca, issued.leaf, v1, rsa]) {
        let (rest, other) = x509_parser::certificate::X509Certificate::from_der(certificate.der()).unwrap();
        assert!(rest.is_empty());
        assert_eq!(certificate.serial(), other.raw_serial());
        assert_eq!(certificate.subject_der(), other.subject().as_raw());
        assert_eq!(certificate.issuer_name_der(), other.issuer().as_raw());
        assert_eq!(certificate.spki_der(), other.public_key().raw);
        assert_eq!(certificate.not_before().0, other.validity().not_before.timestamp());
        assert_eq!(certificate.not_after().0, other.validity().not_after.timestamp());
        assert_eq!(certificate.signature(), other.signature_value.data.as_ref());
        assert_eq!(certificate.subject_display(), other.subject().to_string());
        assert_eq!(u32::from(certificate.version()), other.version().0 + 1);
        assert_eq!(certificate.extensions().len(), other.extensions().len());
        for (ours, theirs) in certificate.extensions().iter().zip(other.extensions()) {
            assert_eq!(ours.oid().to_string(), theirs.oid.to_id_string());
            assert_eq!(ours.critical(), theirs.critical);
            assert_eq!(ours.value(), theirs.value);
        }
        let constraints = other.basic_constraints().unwrap().map(|extension| {
            let constraints = extension.value;
            BasicConstraints { ca: constraints.ca, path_len: constraints.path_len_constraint }
        });
        assert_eq!(certificate.basic_constraints(), constraints);
        let usage = other.key_usage().unwrap().map(|extension| extension.value.flags);
        let ours = certificate
            .key_usage()
            .map(|usage| (0..9).filter(|bit| usage.bit(*bit)).fold(0, |flags, bit| flags | 1 << bit));
        assert_eq!(ours, usage);
    }
}

#[test]
fn pem_is_written_as_it_was_read() {
    for text in [vector!("legacy_org_ca.pem"), vector!("v1_self_signed.pem")] {
        assert_eq!(Certificate::from_pem(text).unwrap().to_pem(), text);
    }
    let chain = Certificate::chain_from_pem(vector!("legacy_agent_p256_chain.pem")).unwrap();
    let text: String = chain.iter().map(Certificate::to_pem).collect();
    assert_eq!(text, vector!("legacy_agent_p256_chain.pem"));
}

#[test]
fn pem_without_a_certificate_and_der_with_more_after_it_are_refused() {
    let missing = Err(X509Error::Pem { label: "CERTIFICATE" });
    assert_eq!(Certificate::chain_from_pem("").map(|_| ()), missing);
    assert_eq!(Certificate::from_pem(vector!("rsa_a.key")).map(|_| ()), missing);
    let broken = vector!("legacy_org_ca.pem").replace("MII", "M!I");
    assert_eq!(Certificate::chain_from_pem(&broken).map(|_| ()), missing);
    let mut der = legacy()[0].der().to_vec();
    der.push(0);
    assert_eq!(
        Certificate::from_der(&der).map(|_| ()),
        Err(X509Error::TrailingBytes { what: "certificate" })
    );
}

#[test]
fn a_version_1_certificate_is_read() {
    let certificate = Certificate::from_pem(vector!("v1_self_signed.pem")).unwrap();
    assert_eq!(certificate.version(), 1);
    assert_eq!(certificate.spki_der(), Key::rsa_a().spki());
    assert_eq!(certificate.key_id().len(), 20);
    assert!(certificate.verify_signature(&certificate).is_ok());
    assert_eq!(identity(&certificate).unwrap().agent_id(), "acme::bot");
}

#[test]
fn public_keys_are_wrapped_as_other_tools_wrap_them() {
    let key = Key::p256();
    let Key::P256(pair) = &key else { panic!() };
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
    assert_eq!(key.spki(), der.as_ref());
    let pem = spki_pem(&key.spki());
    assert!(pem.starts_with("-----BEGIN PUBLIC KEY-----\n") && pem.ends_with("-----END PUBLIC KEY-----\n"));
    let mut off_curve = pair.public_key().as_ref().to_vec();
    off_curve[64] ^= 1;
    for point in [&off_curve[..], &off_curve[..64], &[]] {
        assert!(matches!(p256_spki_der(point), Err(X509Error::PublicKey { .. })));
    }
}

// Serials.

#[test]
fn ten_thousand_serials_are_unique_and_positive() {
    let random = SystemRandom::new();
    let mut seen = HashSet::new();
    for _ in 0..10_000 {
        let drawn: [u8; 16] = rand::generate(&random).unwrap().expose();
        let serial = Serial::new(drawn).unwrap();
        assert!(serial.content()[0] < 0x80 && serial.content().len() <= 17);
        assert!(tlv::is_integer(serial.content()));
        assert!(seen.insert(serial.hex()));
    }
}

#[test]
fn a_serial_is_a_minimal_positive_integer() {
    assert_eq!(Serial::new([0; 16]), None);
    let mut drawn = [0; 16];
    drawn[15] = 1;
    assert_eq!(Serial::new(drawn).unwrap().content(), [1]);
    drawn[14] = 0x80;
    assert_eq!(Serial::new(drawn).unwrap().content(), [0, 0x80, 1]);
    assert_eq!(Serial::new(drawn).unwrap().hex(), "8001");
    let highest = Serial::new([0xff; 16]).unwrap();
    assert_eq!(highest.content().len(), 17);
    assert_eq!(highest.hex(), "ff".repeat(16));
}

#[test]
fn a_certificate_shows_the_serial_it_was_given() {
    let key = Key::p256();
    let given = serial();
    let validity = ValiditySpec::from(validity());
    let certificate =
        key.complete(profile::org_ca(org_names(), &key.spki(), &given, validity, 1, key.algorithm()));
    assert_eq!(certificate.serial_hex(), given.hex());
    assert_eq!(certificate.serial(), given.content());
}

// Profiles.

#[test]
fn an_issued_chain_validates_strictly_and_carries_what_strict_verifiers_ask_for() {
    let pki = Pki::new();
    let path = validate_strict(&pki.leaf, std::slice::from_ref(&pki.ca), &pki.root, NOW).unwrap();
    assert_eq!(path.intermediates(), std::slice::from_ref(&pki.ca));
    assert_eq!(path.anchor(), &pki.root);
    assert_eq!(path.issuer(), &pki.ca);
    assert_eq!(verify_ca_chain(&pki.ca, &pki.root, NOW), Ok(()));
    for (subject, issuer) in [(&pki.leaf, &pki.ca), (&pki.ca, &pki.root), (&pki.root, &pki.root)] {
        assert_eq!(subject.authority_key_id(), issuer.subject_key_id());
        assert!(subject.subject_key_id().is_some());
    }
    assert_eq!(pki.leaf.subject_display(), "CN=acme::bot, O=acme");
    assert_eq!(pki.leaf.extended_key_usages(), [CLIENT_AUTH]);
    assert_eq!(identity(&pki.leaf).unwrap().agent_id(), "acme::bot");
}

#[test]
fn a_server_leaf_serves_and_is_no_client() {
    let pki = Pki::new();
    let key = Key::p256();
    let leaf = pki.root_key.complete(profile::tls_server(
        &pki.root,
        "mastio.example",
        &["mastio.example".to_owned()],
        &["127.0.0.1".parse().unwrap()],
        &key.spki(),
        &serial(),
        validity(),
        pki.root_key.algorithm(),
    ));
    assert_eq!(leaf.extended_key_usages(), [SERVER_AUTH]);
    assert!(validate_server_strict(&leaf, &[], &pki.root, NOW).is_ok());
    assert_eq!(validate(&leaf, &[], &[], &pki.anchors(), NOW).err(), Some(PathError::ExtendedKeyUsage));
    assert_eq!(
        validate_server_strict(&pki.leaf, &[pki.ca], &pki.root, NOW).err(),
        Some(PathError::ExtendedKeyUsage)
    );
}

#[test]
fn a_token_signer_names_the_organization_s_proxy() {
    let pki = Pki::new();
    let signer = pki.ca_key.complete(profile::token_signer(
        &pki.ca,
        "acme",
        "spiffe://cullis.local/proxy/acme",
        &Key::p256().spki(),
        &serial(),
        validity(),
        pki.ca_key.algorithm(),
    ));
    assert_eq!(signer.subject_common_name(), Some("proxy:acme"));
    // It must not pass for an agent of the organization.
    assert_eq!(identity(&signer).unwrap().org_id, "proxy");
}

#[test]
fn a_certificate_request_becomes_a_leaf_for_its_key() {
    let csr = CertificateRequest::from_pem(vector!("csr_p256.pem")).unwrap();
    assert_eq!(csr.subject_common_name(), Some("acme::bot"));
    assert_eq!(csr.uri_sans(), [SPIFFE_ID]);
    assert_eq!(csr.key_algorithm(), KeyAlgorithm::P256);
    let rsa = CertificateRequest::from_pem(
        &vector!("csr_rsa.pem").replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"),
    )
    .unwrap();
    assert_eq!(rsa.spki_der(), Key::rsa_a().spki());
    assert!(rsa.uri_sans().is_empty());

    let pki = Pki::new();
    for csr in [csr, rsa] {
        let leaf = pki.root_key.complete(profile::externally_keyed_leaf(
            &pki.root,
            &csr,
            "acme::bot",
            "acme",
            SPIFFE_ID,
            &serial(),
            validity(),
            pki.root_key.algorithm(),
        ));
        assert!(leaf.public_key_matches_spki(csr.spki_der()));
        assert!(validate_strict(&leaf, &[], &pki.root, NOW).is_ok());
    }
}

#[test]
fn a_certificate_request_that_its_key_did_not_sign_is_refused() {
    let der =
        rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(vector!("csr_p256.pem").as_bytes());
    let mut der = der.unwrap().as_ref().to_vec();
    let position = der.windows(9).position(|window| window == b"acme::bot").unwrap();
    der[position + 8] = b'x';
    assert_eq!(CertificateRequest::from_der(&der).map(|_| ()), Err(X509Error::SignatureInvalid));
}

#[test]
fn nothing_is_admitted_that_breaks_its_profile() {
    let pki = Pki::new();
    let lints = |outcome: Result<LintedTbs, X509Error>| match outcome {
        Err(X509Error::Lint { findings }) => findings.iter().map(|finding| finding.lint).collect(),
        _ => Vec::new(),
    };
    let algorithm = pki.ca_key.algorithm();
    let reversed = Validity { not_before: NOW, not_after: NOW.plus(-1) };
    let spki = Key::p256().spki();
    let agent = |issuer, uri, validity, algorithm| {
        profile::agent_leaf(issuer, "acme::bot", "acme", uri, &spki, &serial(), validity, algorithm)
    };
    assert_eq!(lints(agent(&pki.ca, SPIFFE_ID, reversed, algorithm)), ["validity"]);
    assert_eq!(lints(agent(&pki.ca, "https://acme/", validity(), algorithm)), ["subject_alternative_name"]);
    assert_eq!(
        lints(agent(&pki.ca, SPIFFE_ID, validity(), SignatureAlgorithm::RsaPkcs1Sha256)),
        ["signature_algorithm"]
    );
    let error = agent(&pki.ca, SPIFFE_ID, reversed, SignatureAlgorithm::RsaPkcs1Sha256).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("signature_algorithm: ") && text.contains("; validity: "), "{text}");
    // An intermediate below an intermediate of pathLen 0.
    let below = profile::mastio_ca(&pki.ca, org_names(), &spki, &serial(), validity(), algorithm);
    assert_eq!(lints(below), ["path_length"]);
}

#[test]
fn a_new_root_inherits_the_name_and_the_encoded_end_of_the_old() {
    let [.., old] = legacy();
    let key = Key::rsa_a();
    let spec = ValiditySpec::InheritNotAfter { not_before: NOW, from: old.clone() };
    let subject = SubjectName::Der(old.subject_der().to_vec());
    let new = key.complete(profile::org_ca(subject, &key.spki(), &serial(), spec, 1, key.algorithm()));
    assert_eq!(new.subject_der(), old.subject_der());
    assert_eq!(new.not_after_der(), old.not_after_der());
    assert_eq!(new.not_before(), NOW);
    assert!(new.is_self_issued());
    let spec = ValiditySpec::from(validity());
    let broken = SubjectName::Der(vec![0x30, 0x01, 0x00]);
    let outcome = profile::org_ca(broken, &key.spki(), &serial(), spec, 1, key.algorithm());
    assert!(matches!(outcome, Err(X509Error::Malformed { .. })));
}

// Re-signing.

#[test]
fn re_signing_keeps_every_byte_that_belongs_to_the_owner() {
    let pki = Pki::new();
    let rsa = Certificate::from_pem(vector!("legacy_root5_agent_rsa.pem")).unwrap();
    let [legacy_leaf, ..] = legacy();
    for leaf in [rsa, legacy_leaf, pki.leaf.clone()] {
        let given = serial();
        let algorithm = pki.ca_key.algorithm();
        let resigned = pki.ca_key.complete(resign::resign_leaf(&leaf, &pki.ca, &given, algorithm));
        assert_eq!(resigned.subject_der(), leaf.subject_der());
        assert_eq!(resigned.spki_der(), leaf.spki_der());
        assert_eq!(resigned.validity_der(), leaf.validity_der());
        let others = |certificate: &Certificate| -> Vec<Vec<u8>> {
            let kept = certificate
                .extensions()
                .iter()
                .filter(|extension| extension.oid() != AUTHORITY_KEY_IDENTIFIER);
            kept.map(|extension| extension.raw().to_vec()).collect()
        };
        assert_eq!(others(&resigned), others(&leaf));
        assert_eq!(resigned.serial(), given.content());
        assert_eq!(resigned.issuer_name_der(), pki.ca.subject_der());
        assert_eq!(resigned.authority_key_id(), pki.ca.subject_key_id());
        assert!(lints::resign_findings(&resigned, &pki.ca).is_empty());
        assert!(validate_strict(&resigned, std::slice::from_ref(&pki.ca), &pki.root, NOW).is_ok());
        assert_eq!(identity(&resigned), identity(&leaf));
    }
}

#[test]
fn an_authority_key_identifier_is_replaced_in_its_place_or_appended() {
    let pki = Pki::new();
    let position = |certificate: &Certificate| {
        certificate.extensions().iter().position(|extension| extension.oid() == AUTHORITY_KEY_IDENTIFIER)
    };
    let root = root(&Key::rsa_b(), 1);
    let algorithm = SignatureAlgorithm::RsaPkcs1Sha256;
    let middle = Forged {
        issuer: &pki.ca,
        issuer_key: &pki.ca_key,
        subject: "acme::bot",
        key: &Key::p256(),
        validity: validity(),
        extensions: vec![
            extension::authority_key_identifier(b"some other key"),
            extension::uri_alternative_name(SPIFFE_ID).unwrap(),
        ],
    }
    .certificate();
    let resigned = Key::rsa_b().complete(resign::resign_leaf(&middle, &root, &serial(), algorithm));
    assert_eq!(position(&resigned), Some(0));
    assert_eq!(resigned.extensions().len(), 2);
    let [bare, ..] = legacy();
    let resigned = Key::rsa_b().complete(resign::resign_leaf(&bare, &root, &serial(), algorithm));
    assert_eq!(position(&bare), None);
    assert_eq!(position(&resigned), Some(bare.extensions().len()));
}

#[test]
fn completing_a_leaf_adds_what_it_lacks_and_keeps_every_byte_of_the_rest() {
    let pki = Pki::new();
    let [bare, ..] = legacy();
    let algorithm = pki.ca_key.algorithm();
    for leaf in [bare, pki.leaf.clone()] {
        let done = pki.ca_key.complete(resign::complete_leaf(&leaf, &pki.ca, &serial(), algorithm));
        assert_eq!(lints::leaf_gaps(&done), [""; 0]);
        assert_eq!(lints::complete_findings(&done, &pki.ca), []);
        assert_eq!(done.subject_der(), leaf.subject_der());
        assert_eq!(done.spki_der(), leaf.spki_der());
        assert_eq!(done.validity_der(), leaf.validity_der());
        assert_eq!(done.uri_sans(), leaf.uri_sans());
        assert_eq!(done.subject_key_id(), Some(leaf.key_id().as_slice()));
        let has = |raw: &[u8]| done.extensions().iter().any(|extension| extension.raw() == raw);
        let mut others =
            leaf.extensions().iter().filter(|extension| extension.oid() != AUTHORITY_KEY_IDENTIFIER);
        assert!(others.all(|extension| has(extension.raw())));
        assert!(validate_strict(&done, std::slice::from_ref(&pki.ca), &pki.root, NOW).is_ok());
    }
}

#[test]
fn a_reissued_root_is_the_same_anchor_with_both_key_identifiers() {
    let key = Key::rsa_a();
    let bare = Forged {
        issuer: &root(&key, 1),
        issuer_key: &key,
        subject: "acme CA",
        key: &key,
        validity: validity(),
        extensions: vec![
            extension::basic_constraints(crate::x509::BasicConstraints { ca: true, path_len: None }),
            extension::key_usage(crate::x509::KeyUsage::CERTIFICATE_AND_CRL_SIGN),
        ],
    }
    .certificate();
    let after = key.complete(resign::reissue_root(&bare, &serial(), key.algorithm()));
    assert_eq!(bare.subject_key_id(), None);
    assert_eq!(after.subject_der(), bare.subject_der());
    assert_eq!(after.spki_der(), bare.spki_der());
    assert_eq!(after.validity_der(), bare.validity_der());
    assert_eq!(after.basic_constraints(), bare.basic_constraints());
    assert_eq!(after.subject_key_id(), Some(bare.key_id().as_slice()));
    assert_eq!(after.authority_key_id(), after.subject_key_id());
    assert_eq!(after.verify_signature(&after), Ok(()));
}

#[test]
fn a_version_1_leaf_becomes_version_3_when_re_signed() {
    let pki = Pki::new();
    let old = Certificate::from_pem(vector!("v1_self_signed.pem")).unwrap();
    let algorithm = pki.ca_key.algorithm();
    let resigned = pki.ca_key.complete(resign::resign_leaf(&old, &pki.ca, &serial(), algorithm));
    assert_eq!(resigned.version(), 3);
    assert_eq!(resigned.validity_der(), old.validity_der());
    assert_eq!(resigned.extensions().len(), 1);
}

#[test]
fn a_ca_is_never_re_signed_as_a_leaf() {
    let pki = Pki::new();
    let outcome = resign::resign_leaf(&pki.ca, &pki.root, &serial(), pki.root_key.algorithm());
    let Err(X509Error::Lint { findings }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(findings[0].lint, "end_entity");
}

#[test]
fn a_reissued_intermediate_keeps_name_key_and_key_id_and_its_leaves() {
    let [leaf, old_ca, _] = legacy();
    let new_key = Key::rsa_b();
    let new_root = {
        let [.., old_root] = legacy();
        let spec = ValiditySpec::InheritNotAfter { not_before: NOW, from: old_root.clone() };
        let subject = SubjectName::Der(old_root.subject_der().to_vec());
        let algorithm = new_key.algorithm();
        new_key.complete(profile::org_ca(subject, &new_key.spki(), &serial(), spec, 1, algorithm))
    };
    let reissue = |at_most| {
        let linted = resign::reissue_ca(&old_ca, &new_root, &serial(), at_most, new_key.algorithm());
        new_key.complete(linted)
    };
    let new_ca = reissue(UnixTime(i64::MAX));
    assert_eq!(new_ca.subject_der(), old_ca.subject_der());
    assert_eq!(new_ca.spki_der(), old_ca.spki_der());
    assert_eq!(new_ca.subject_key_id(), old_ca.subject_key_id());
    assert_eq!(new_ca.not_after_der(), old_ca.not_after_der());
    assert_eq!(new_ca.authority_key_id(), new_root.subject_key_id());
    assert_eq!(verify_ca_chain(&new_ca, &new_root, NOW), Ok(()));
    assert!(validate_strict(&leaf, &[new_ca], &new_root, NOW).is_ok());
    assert_eq!(reissue(NOW.plus(DAY)).not_after(), NOW.plus(DAY));

    let short_key = Key::rsa_a();
    let spec = Validity { not_before: NOW, not_after: NOW.plus(7) };
    let short = short_key.complete(profile::org_ca(
        org_names(),
        &short_key.spki(),
        &serial(),
        spec,
        1,
        short_key.algorithm(),
    ));
    let bounded = short_key.complete(resign::reissue_ca(
        &old_ca,
        &short,
        &serial(),
        UnixTime(i64::MAX),
        short_key.algorithm(),
    ));
    assert_eq!(bounded.not_after(), NOW.plus(7), "never past the issuer's");
}

// Old with new.

#[test]
fn old_with_new_leads_leaves_under_the_old_key_to_the_new_root() {
    let (old_key, new_key) = (Key::rsa_a(), Key::rsa_b());
    // The old root carries the defect: no intermediate may stand below it.
    let (old, new) = (root(&old_key, 0), root(&new_key, 1));
    let leaf = leaf(&old, &old_key, &Key::p256());
    let bridge = new_key.complete(profile::old_with_new(&old, &new, &serial(), new_key.algorithm()));
    assert_eq!(bridge.subject_der(), old.subject_der());
    assert_eq!(bridge.spki_der(), old.spki_der());
    assert_eq!(bridge.subject_key_id(), old.subject_key_id());
    assert_eq!(bridge.authority_key_id(), new.subject_key_id());
    assert_eq!(bridge.not_before_der(), new.not_before_der());
    assert_eq!(bridge.basic_constraints(), Some(BasicConstraints { ca: true, path_len: Some(0) }));
    assert!(bridge.is_self_issued());

    let presented = std::slice::from_ref(&bridge);
    let new_only = [Anchor::from_certificate(&new).unwrap()];
    assert_eq!(validate(&leaf, presented, &[], &new_only, NOW).unwrap().intermediates(), presented);
    assert!(validate_strict(&leaf, presented, &new, NOW).unwrap().intermediates() == presented);
    assert_eq!(validate(&leaf, &[], &[], &new_only, NOW).err(), Some(PathError::BadSignature));
    assert!(validate_strict(&leaf, presented, &old, NOW).unwrap().intermediates().is_empty());
    let both = [Anchor::from_certificate(&new).unwrap(), Anchor::from_certificate(&old).unwrap()];
    assert!(validate(&leaf, presented, &[], &both, NOW).is_ok());
    assert!(validate(&leaf, &[], &[], &both, NOW).is_ok());
}

#[test]
fn old_with_new_ends_with_the_earlier_root_and_needs_one_name() {
    let (old_key, new_key) = (Key::rsa_a(), Key::rsa_b());
    let new = root(&new_key, 1);
    for (days, expected) in [(10, 10), (1_000, 365)] {
        let ends = Validity { not_before: NOW.plus(-DAY), not_after: NOW.plus(days * DAY) };
        let algorithm = old_key.algorithm();
        let old =
            old_key.complete(profile::org_ca(org_names(), &old_key.spki(), &serial(), ends, 0, algorithm));
        let bridge = new_key.complete(profile::old_with_new(&old, &new, &serial(), new_key.algorithm()));
        assert_eq!(bridge.not_after(), NOW.plus(expected * DAY));
    }
    let [.., other] = legacy();
    let outcome = profile::old_with_new(&other, &new, &serial(), new_key.algorithm());
    assert_eq!(outcome.map(|_| ()), Err(X509Error::IssuerNameMismatch));
}

// Paths.

#[test]
fn legacy_agents_are_let_in_and_judged_as_what_they_are() {
    let [leaf, ca, root] = legacy();
    let anchors = [Anchor::from_certificate(&root).unwrap()];
    let ca = std::slice::from_ref(&ca);
    assert!(validate(&leaf, ca, &[], &anchors, NOW).is_ok());
    assert!(validate(&leaf, &[], ca, &anchors, NOW).is_ok(), "a bare leaf");
    assert_eq!(validate(&leaf, &[], &[], &anchors, NOW).err(), Some(PathError::NoPath));
    assert_eq!(validate_strict(&leaf, ca, &root, NOW).err(), Some(PathError::PathLengthExceeded));
    assert_eq!(verify_ca_chain(&ca[0], &root, NOW), Err(PathError::PathLengthExceeded));

    let root5 = Certificate::from_pem(vector!("legacy_root5_org_ca.pem")).unwrap();
    let rsa = Certificate::from_pem(vector!("legacy_root5_agent_rsa.pem")).unwrap();
    assert_eq!(rsa.key_algorithm(), KeyAlgorithm::Rsa { bits: 2048 });
    assert!(validate(&rsa, &[], &[], &[Anchor::from_certificate(&root5).unwrap()], NOW).is_ok());
    assert!(validate_strict(&rsa, &[], &root5, NOW).is_ok());
}

#[test]
fn an_anchor_s_own_expiry_locks_nobody_out_but_fails_the_strict_judgement() {
    let key = Key::rsa_a();
    let ended = Validity { not_before: NOW.plus(-2 * DAY), not_after: NOW.plus(-1) };
    let algorithm = key.algorithm();
    let root = key.complete(profile::org_ca(org_names(), &key.spki(), &serial(), ended, 1, algorithm));
    let leaf = leaf(&root, &key, &Key::p256());
    assert!(validate(&leaf, &[], &[], &[Anchor::from_certificate(&root).unwrap()], NOW).is_ok());
    assert_eq!(validate_strict(&leaf, &[], &root, NOW).err(), Some(PathError::Expired));
    let early = NOW.plus(-3 * DAY);
    assert_eq!(validate_strict(&leaf, &[], &root, early).err(), Some(PathError::NotYetValid));
}

#[test]
fn a_leaf_that_acts_as_an_issuer_is_refused() {
    let pki = Pki::new();
    let attacker_key = Key::p256();
    let attacker = leaf(&pki.ca, &pki.ca_key, &attacker_key);
    let ca_bit = basic_constraints(BasicConstraints { ca: true, path_len: None });
    for extensions in [vec![], vec![ca_bit.clone(), key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN)]] {
        let mut forged = Forged {
            issuer: &attacker,
            issuer_key: &attacker_key,
            subject: "acme::victim",
            key: &Key::p256(),
            validity: validity(),
            extensions: vec![extension::uri_alternative_name("spiffe://cullis.local/acme/victim").unwrap()],
        };
        let victim = forged.certificate();
        let presented = [attacker.clone(), pki.ca.clone()];
        assert_eq!(
            validate(&victim, &presented, &[], &pki.anchors(), NOW).err(),
            Some(PathError::IssuerNotCa)
        );
        assert_eq!(validate_strict(&victim, &presented, &pki.root, NOW).err(), Some(PathError::IssuerNotCa));
        // Claiming to be a CA oneself does not help either.
        forged.extensions = extensions;
        let own = forged.certificate();
        assert!(
            validate(&victim, &[own, attacker.clone(), pki.ca.clone()], &[], &pki.anchors(), NOW).is_err()
        );
    }
    // A legacy leaf, without any constraints at all, is no issuer either.
    let bare_key = Key::p256();
    let bare = Forged {
        issuer: &pki.root,
        issuer_key: &pki.root_key,
        subject: "acme::old",
        key: &bare_key,
        validity: validity(),
        extensions: vec![extension::uri_alternative_name("spiffe://cullis.local/acme/old").unwrap()],
    }
    .certificate();
    let victim = leaf(&bare, &bare_key, &Key::p256());
    assert_eq!(
        validate(&victim, std::slice::from_ref(&bare), &[], &pki.anchors(), NOW).err(),
        Some(PathError::IssuerNotCa)
    );
    assert!(validate(&bare, &[], &[], &pki.anchors(), NOW).is_ok());
    assert!(matches!(Anchor::from_certificate(&bare), Err(X509Error::NotACertificateAuthority)));
    assert!(matches!(Anchor::from_certificate(&pki.leaf), Err(X509Error::NotACertificateAuthority)));
}

/// A CA below `issuer` with these extensions, and an agent's leaf below it.
fn below(
    issuer: &Certificate,
    issuer_key: &Key,
    extensions: Vec<Vec<u8>>,
) -> (Certificate, Key, Certificate) {
    let key = Key::p256();
    let certificate =
        Forged { issuer, issuer_key, subject: "acme lower CA", key: &key, validity: validity(), extensions }
            .certificate();
    let below = leaf(&certificate, &key, &Key::p256());
    (certificate, key, below)
}

#[test]
fn intermediates_beyond_a_path_length_are_refused() {
    let pki = Pki::new();
    let ca_bit = basic_constraints(BasicConstraints { ca: true, path_len: None });
    let (lower, _, victim) = below(&pki.ca, &pki.ca_key, vec![ca_bit]);
    let presented = [lower, pki.ca.clone()];
    assert_eq!(
        validate(&victim, &presented, &[], &pki.anchors(), NOW).err(),
        Some(PathError::PathLengthExceeded)
    );
    assert_eq!(
        validate_strict(&victim, &presented, &pki.root, NOW).err(),
        Some(PathError::PathLengthExceeded)
    );
}

#[test]
fn an_issuer_that_may_not_sign_certificates_is_refused() {
    let pki = Pki::new();
    let ca_bit = basic_constraints(BasicConstraints { ca: true, path_len: None });
    let cases = [
        (vec![ca_bit.clone()], None),
        (vec![ca_bit.clone(), key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN)], None),
        (
            vec![ca_bit.clone(), key_usage(KeyUsage::DIGITAL_SIGNATURE)],
            Some(PathError::KeyUsageForbidsSigning),
        ),
        // SEQUENCE { OID keyUsage, OCTET STRING { NULL } }: unreadable is not absent.
        (
            vec![ca_bit.clone(), vec![0x30, 0x09, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x04, 0x02, 0x05, 0x00]],
            Some(PathError::Malformed),
        ),
        (vec![], Some(PathError::IssuerNotCa)),
        (vec![ca_bit, unknown_critical_extension()], Some(PathError::UnknownCriticalExtension)),
    ];
    for (extensions, expected) in cases {
        let (lower, _, leaf) = below(&pki.root, &pki.root_key, extensions);
        let outcome = validate(&leaf, std::slice::from_ref(&lower), &[], &pki.anchors(), NOW);
        assert_eq!(outcome.err(), expected);
        let outcome = verify_ca_chain(&lower, &pki.root, NOW).err();
        assert_eq!(outcome, expected);
    }
}

#[test]
fn a_leaf_is_refused_for_what_it_says_of_itself() {
    let pki = Pki::new();
    let san = extension::uri_alternative_name(SPIFFE_ID).unwrap();
    let server = extension::extended_key_usage(&SERVER_AUTH);
    let client = extension::extended_key_usage(&CLIENT_AUTH);
    let ca_bit = basic_constraints(BasicConstraints { ca: true, path_len: None });
    let cases = [
        (vec![san.clone()], None),
        (vec![san.clone(), client], None),
        (vec![san.clone(), server], Some(PathError::ExtendedKeyUsage)),
        (vec![san.clone(), unknown_critical_extension()], Some(PathError::UnknownCriticalExtension)),
        (vec![san.clone(), ca_bit], Some(PathError::LeafIsCa)),
        (vec![san.clone(), san], Some(PathError::Malformed)),
    ];
    for (extensions, expected) in cases {
        let leaf = Forged {
            issuer: &pki.root,
            issuer_key: &pki.root_key,
            subject: "acme::bot",
            key: &Key::p256(),
            validity: validity(),
            extensions,
        }
        .certificate();
        assert_eq!(validate(&leaf, &[], &[], &pki.anchors(), NOW).err(), expected);
    }
    let v1 = Certificate::from_pem(vector!("v1_self_signed.pem")).unwrap();
    assert_eq!(validate(&v1, &[], &[], &pki.anchors(), NOW).err(), Some(PathError::Malformed));
}

#[test]
fn validity_ends_are_inclusive() {
    let pki = Pki::new();
    let validity = validity();
    for (now, expected) in [
        (validity.not_before.plus(-1), Some(PathError::NotYetValid)),
        (validity.not_before, None),
        (validity.not_before.plus(1), None),
        (validity.not_after.plus(-1), None),
        (validity.not_after, None),
        (validity.not_after.plus(1), Some(PathError::Expired)),
    ] {
        let presented = std::slice::from_ref(&pki.ca);
        assert_eq!(validate(&pki.leaf, presented, &[], &pki.anchors(), now).err(), expected);
        assert_eq!(verify_ca_chain(&pki.ca, &pki.root, now).err(), expected);
        assert_eq!(validate_strict(&pki.leaf, presented, &pki.root, now).err(), expected);
    }
}

#[test]
fn a_foreign_root_of_the_same_name_is_refused() {
    let (ours, theirs) = (Pki::under(Key::rsa_a()), Pki::under(Key::rsa_b()));
    assert_eq!(ours.root.subject_der(), theirs.root.subject_der());
    let presented = [theirs.ca.clone(), theirs.root.clone()];
    let outcome = validate(&theirs.leaf, &presented, &[], &ours.anchors(), NOW);
    assert_eq!(outcome.err(), Some(PathError::BadSignature));
    let outcome = validate(&theirs.leaf, &presented, std::slice::from_ref(&ours.ca), &ours.anchors(), NOW);
    assert_eq!(outcome.err(), Some(PathError::BadSignature));
    // AKI names the foreign key, which is found before the signature is tried.
    assert_eq!(verify_ca_chain(&theirs.ca, &ours.root, NOW), Err(PathError::KeyIdentifierMismatch));
}

#[test]
fn a_bag_may_be_in_any_order_with_duplicates_and_roots_but_not_endless() {
    let pki = Pki::new();
    let other = Pki::under(Key::rsa_b());
    let bag = [pki.root.clone(), other.ca, pki.leaf.clone(), pki.ca.clone(), pki.ca.clone(), other.root];
    assert_eq!(bag.len(), PRESENTED_MAX);
    let path = validate(&pki.leaf, &bag, std::slice::from_ref(&pki.ca), &pki.anchors(), NOW).unwrap();
    assert_eq!(path.intermediates(), std::slice::from_ref(&pki.ca));
    let endless = vec![pki.ca.clone(); PRESENTED_MAX + 1];
    assert_eq!(validate(&pki.leaf, &endless, &[], &pki.anchors(), NOW).err(), Some(PathError::TooLong));
    assert_eq!(validate(&pki.leaf, &bag, &[], &[], NOW).err(), Some(PathError::NoPath));
}

#[test]
fn an_authority_key_identifier_of_another_key_fails_the_strict_judgement_alone() {
    let pki = Pki::new();
    let leaf = Forged {
        issuer: &pki.root,
        issuer_key: &pki.root_key,
        subject: "acme::bot",
        key: &Key::p256(),
        validity: validity(),
        extensions: vec![extension::authority_key_identifier(b"another key")],
    }
    .certificate();
    assert!(validate(&leaf, &[], &[], &pki.anchors(), NOW).is_ok());
    assert_eq!(validate_strict(&leaf, &[], &pki.root, NOW).err(), Some(PathError::KeyIdentifierMismatch));
}

#[test]
fn an_altered_certificate_does_not_verify() {
    let pki = Pki::new();
    let mut der = pki.leaf.der().to_vec();
    let position = der.windows(9).position(|window| window == b"acme::bot").unwrap();
    der[position + 6] ^= 1;
    let altered = Certificate::from_der(&der).unwrap();
    assert_eq!(altered.verify_signature(&pki.ca), Err(X509Error::SignatureInvalid));
    let outcome = validate(&altered, std::slice::from_ref(&pki.ca), &[], &pki.anchors(), NOW);
    assert_eq!(outcome.err(), Some(PathError::BadSignature));
    assert_ne!(altered, pki.leaf);
}

#[test]
fn every_reason_has_a_word_of_its_own() {
    let reasons = [
        PathError::NoPath,
        PathError::Expired,
        PathError::NotYetValid,
        PathError::BadSignature,
        PathError::LeafIsCa,
        PathError::IssuerNotCa,
        PathError::PathLengthExceeded,
        PathError::KeyUsageForbidsSigning,
        PathError::ExtendedKeyUsage,
        PathError::UnknownCriticalExtension,
        PathError::NameConstraints,
        PathError::KeyIdentifierMismatch,
        PathError::TooLong,
        PathError::Malformed,
    ];
    let words: HashSet<&str> = reasons.iter().map(|reason| reason.reason()).collect();
    assert_eq!(words.len(), reasons.len());
    assert!(words.iter().all(|word| word.bytes().all(|octet| octet.is_ascii_lowercase() || octet == b'_')));
}

#[test]
fn an_unreadable_alternative_name_does_not_fall_back_to_the_common_name() {
    let pki = Pki::new();
    let leaf = |extensions| {
        let (issuer, issuer_key, key) = (&pki.root, &pki.root_key, &Key::p256());
        Forged { issuer, issuer_key, subject: "acme::bot", key, validity: validity(), extensions }
            .certificate()
    };
    assert_eq!(identity(&leaf(vec![])).unwrap().agent_id(), "acme::bot");
    let https = extension::uri_alternative_name("https://acme.example/").unwrap();
    assert_eq!(identity(&leaf(vec![https])).unwrap().agent_id(), "acme::bot");
    let odd = extension::uri_alternative_name("spiffe://cullis.local/acme").unwrap();
    assert_eq!(identity(&leaf(vec![odd])), Err(X509Error::NoIdentity));
    // SEQUENCE { OID subjectAltName, OCTET STRING { NULL } }
    let broken = vec![0x30, 0x09, 0x06, 0x03, 0x55, 0x1d, 0x11, 0x04, 0x02, 0x05, 0x00];
    assert_eq!(identity(&leaf(vec![broken])), Err(X509Error::NoIdentity));
}

// Hostile bytes.

/// Asks everything that can be asked of bytes from outside.
fn exercise(bytes: &[u8]) {
    _ = CertificateRequest::from_der(bytes);
    let Ok(certificate) = Certificate::from_der(bytes) else { return };
    _ = (identity(&certificate), certificate.key_id(), format!("{certificate:?}"), certificate.to_pem());
    _ = certificate.verify_signature(&certificate);
    _ = lints::full_findings(&certificate, &certificate, Role::Agent);
    let [leaf, ca, root] = legacy();
    let anchors = [Anchor::from_certificate(&root).unwrap()];
    _ = validate(&certificate, &[certificate.clone(), ca], &[], &anchors, NOW);
    _ = validate(&leaf, std::slice::from_ref(&certificate), &[], &anchors, NOW);
    _ = validate_strict(&leaf, std::slice::from_ref(&certificate), &certificate, NOW);
    _ = verify_ca_chain(&certificate, &root, NOW);
    _ = resign::resign_leaf(&certificate, &root, &serial(), SignatureAlgorithm::RsaPkcs1Sha256);
    if let Ok(anchor) = Anchor::from_certificate(&certificate) {
        _ = validate(&leaf, &[], &[], &[anchor], NOW);
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), text in ".*") {
        exercise(&bytes);
        _ = Certificate::from_pem(&text);
        _ = Certificate::chain_from_pem(&text);
        _ = CertificateRequest::from_pem(&text);
        _ = spki_pem(&bytes);
        _ = p256_spki_der(&bytes);
    }

    #[test]
    fn spoiled_certificates_never_panic(
        which in 0_usize..4,
        spoils in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let csr = rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(
            vector!("csr_p256.pem").as_bytes(),
        )
        .unwrap();
        let mut bytes = match legacy().get(which) {
            Some(certificate) => certificate.der().to_vec(),
            None => csr.as_ref().to_vec(),
        };
        for (position, octet) in spoils {
            let position = position.index(bytes.len());
            bytes[position] = octet;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }
}

mod revocation_lists {
    use x509_parser::revocation_list::CertificateRevocationList;

    use super::super::crl::{RevocationReason, RevokedCertificate, crl, crl_pem, verify_crl};
    use super::*;

    fn revoked(serial: &[u8], reason: RevocationReason) -> RevokedCertificate {
        RevokedCertificate { serial: serial.to_vec(), revoked_at: NOW, reason }
    }

    fn sign(pki: &Pki, number: i64, list: &[RevokedCertificate]) -> Result<Vec<u8>, X509Error> {
        let tbs = crl(&pki.ca, number, NOW, NOW.plus(DAY), list, pki.ca_key.algorithm())?;
        let signature = pki.ca_key.sign(tbs.to_be_signed());
        tbs.into_crl(&pki.ca, &signature)
    }

    #[test]
    fn a_list_is_read_back_by_another_parser_with_its_number_entries_and_reasons() {
        let pki = Pki::new();
        let list = [
            revoked(&[0x81, 2], RevocationReason::KeyCompromise),
            revoked(&[7], RevocationReason::Unspecified),
            revoked(&[0xff; 20], RevocationReason::CertificateHold),
        ];
        let der = sign(&pki, 300, &list).unwrap();
        verify_crl(&der, &pki.ca).unwrap();
        assert!(verify_crl(&der, &pki.root).is_err());
        let (rest, read) = CertificateRevocationList::from_der(&der).unwrap();
        assert!(rest.is_empty());
        assert_eq!(read.version().map(|version| version.0), Some(1));
        assert_eq!(read.issuer().as_raw(), pki.ca.subject_der());
        assert_eq!(read.last_update().timestamp(), NOW.0);
        assert_eq!(read.next_update().map(|time| time.timestamp()), Some(NOW.0 + DAY));
        assert_eq!(read.crl_number().map(ToString::to_string).as_deref(), Some("300"));
        let entries: Vec<(String, Option<u8>)> = read
            .iter_revoked_certificates()
            .map(|entry| (entry.raw_serial_as_string(), entry.reason_code().map(|(_, reason)| reason.0)))
            .collect();
        assert_eq!(entries[0], ("07".to_owned(), None));
        assert_eq!(entries[1], ("00:81:02".to_owned(), Some(1)));
        assert_eq!(entries[2].1, Some(6));
        assert!(crl_pem(&der).starts_with("-----BEGIN X509 CRL-----\n"));
    }

    #[test]
    fn an_empty_list_has_no_entries_at_all() {
        let pki = Pki::new();
        let der = sign(&pki, 1, &[]).unwrap();
        let (_, read) = CertificateRevocationList::from_der(&der).unwrap();
        assert_eq!(read.iter_revoked_certificates().count(), 0);
    }

    #[test]
    fn a_list_that_would_say_something_wrong_is_refused() {
        let pki = Pki::new();
        let twice =
            [revoked(&[7], RevocationReason::Superseded), revoked(&[7], RevocationReason::Unspecified)];
        for (what, number, list) in [
            ("twice", 1, &twice[..]),
            ("number", 0, &[]),
            ("empty", 1, &[revoked(&[], RevocationReason::Unspecified)]),
            ("zero", 1, &[revoked(&[0], RevocationReason::Unspecified)]),
            ("long", 1, &[revoked(&[1; 21], RevocationReason::Unspecified)]),
        ] {
            assert!(matches!(sign(&pki, number, list), Err(X509Error::Crl { .. })), "{what}");
        }
        assert!(crl(&pki.ca, 1, NOW, NOW, &[], pki.ca_key.algorithm()).is_err());
        // A leaf signs no list, and nobody signs for another.
        assert!(crl(&pki.leaf, 1, NOW, NOW.plus(DAY), &[], pki.ca_key.algorithm()).is_err());
        let tbs = crl(&pki.ca, 1, NOW, NOW.plus(DAY), &[], pki.ca_key.algorithm()).unwrap();
        let signature = pki.root_key.sign(tbs.to_be_signed());
        assert!(tbs.into_crl(&pki.ca, &signature).is_err());
    }

    #[test]
    fn reasons_are_found_by_their_names() {
        for reason in RevocationReason::ALL {
            assert_eq!(RevocationReason::parse(reason.as_str()), Some(reason));
        }
        assert_eq!(RevocationReason::parse("removeFromCRL"), None);
    }
}
