//! Path validation (RFC 5280 §6): does this leaf lead to something we trust?
//!
//! The path is built and its signatures, times, names and constraints are checked by webpki. Every path that
//! webpki would accept then meets checks of our own, because webpki looks at no issuer's keyUsage, and the
//! predecessor's worst defect was a leaf that acted as an issuer.
//!
//! Two questions are asked here. [`validate`] asks whether a client is to be let in: an anchor is a name and
//! a key (RFC 5280 §6.1), and the anchor certificate's own pathLen and expiry do not lock agents out.
//! [`validate_strict`] asks whether a result is good enough for every verifier that an agent may use, so it
//! judges the root as well.

use std::{cell::Cell, time::Duration};

use rustls_pki_types::{CertificateDer, TrustAnchor};
use webpki::{EndEntityCert, VerifiedPath};

use super::extension::{
    AUTHORITY_KEY_IDENTIFIER, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, KEY_USAGE, NAME_CONSTRAINTS,
    SUBJECT_ALTERNATIVE_NAME, SUBJECT_KEY_IDENTIFIER,
};
use super::{Certificate, X509Error, signature};
use crate::time::UnixTime;

/// How many certificates a peer may present beside its leaf.
pub const PRESENTED_MAX: usize = 6;

/// A trust anchor: a name and a key that are believed (RFC 5280 §6.1).
#[derive(Debug, Clone)]
pub struct Anchor {
    certificate: Certificate,
    trusted: TrustAnchor<'static>,
}

impl Anchor {
    /// Takes a CA certificate's name and key as an anchor.
    ///
    /// Errors: [`X509Error::NotACertificateAuthority`] for a v3 certificate without cA, or with a keyUsage
    /// that lacks keyCertSign: a leaf must never become an anchor by a mistake in configuration.
    /// Not here: its validity, pathLen and signature.
    pub fn from_certificate(certificate: &Certificate) -> Result<Self, X509Error> {
        let says_ca = match certificate.basic_constraints() {
            Some(constraints) => constraints.ca,
            // Versions before 3 have no way to say it (RFC 5280 §6.1.4 (k)).
            None => certificate.version() < 3,
        };
        if !says_ca || !may_sign_certificates(certificate) || !is_sound(certificate) {
            return Err(X509Error::NotACertificateAuthority);
        }
        let trusted = webpki::anchor_from_trusted_cert(&CertificateDer::from(certificate.der()))
            .map_err(|_| X509Error::Malformed { what: "trust anchor" })?
            .to_owned();
        Ok(Self { certificate: certificate.clone(), trusted })
    }

    /// The certificate that the anchor was taken from.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}

/// Why a path is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PathError {
    /// No chain of issuer names leads from the leaf to an anchor.
    #[error("no path leads from the leaf to a trust anchor")]
    NoPath,
    /// A certificate on the path is past its notAfter.
    #[error("a certificate on the path has expired")]
    Expired,
    /// A certificate on the path is before its notBefore.
    #[error("a certificate on the path is not valid yet")]
    NotYetValid,
    /// Names lead to an anchor, but a signature does not verify or has an algorithm that is not accepted.
    #[error("a signature on the path does not verify")]
    BadSignature,
    /// The leaf says that it is a CA.
    #[error("the leaf is a ca")]
    LeafIsCa,
    /// A certificate that signed another one is no CA.
    #[error("an issuer on the path is not a ca")]
    IssuerNotCa,
    /// More CAs follow than a pathLen allows.
    #[error("the path is longer than a path length constraint allows")]
    PathLengthExceeded,
    /// An issuer has a keyUsage without keyCertSign.
    #[error("an issuer's key usage forbids signing certificates")]
    KeyUsageForbidsSigning,
    /// extKeyUsage is there and does not allow the purpose.
    #[error("extended key usage does not allow this purpose")]
    ExtendedKeyUsage,
    /// A critical extension is not understood.
    #[error("a critical extension is not understood")]
    UnknownCriticalExtension,
    /// A name lies outside an issuer's nameConstraints.
    #[error("a name lies outside the name constraints")]
    NameConstraints,
    /// An AKI names another key than the issuer's.
    #[error("an authority key identifier names another key")]
    KeyIdentifierMismatch,
    /// More certificates than may be presented, or a path too long to search.
    #[error("too many certificates")]
    TooLong,
    /// A certificate cannot be read, is not version 3, or says something twice.
    #[error("a certificate on the path is malformed")]
    Malformed,
}

impl PathError {
    /// The reason as a stable word for answers, logs and metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoPath => "no_path",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::BadSignature => "bad_signature",
            Self::LeafIsCa => "leaf_is_ca",
            Self::IssuerNotCa => "issuer_not_ca",
            Self::PathLengthExceeded => "path_length_exceeded",
            Self::KeyUsageForbidsSigning => "key_usage_forbids_signing",
            Self::ExtendedKeyUsage => "extended_key_usage",
            Self::UnknownCriticalExtension => "unknown_critical_extension",
            Self::NameConstraints => "name_constraints",
            Self::KeyIdentifierMismatch => "key_identifier_mismatch",
            Self::TooLong => "too_long",
            Self::Malformed => "malformed",
        }
    }

    fn from_webpki(error: webpki::Error) -> Self {
        use webpki::Error as Webpki;
        // `webpki::Error` may grow: what is not named here is malformed, which refuses as well.
        #[expect(clippy::wildcard_enum_match_arm, reason = "the enum is not exhaustive")]
        match error {
            Webpki::UnknownIssuer => Self::NoPath,
            Webpki::CertExpired { .. } => Self::Expired,
            Webpki::CertNotValidYet { .. } => Self::NotYetValid,
            Webpki::InvalidSignatureForPublicKey
            | Webpki::UnsupportedSignatureAlgorithmContext(_)
            | Webpki::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => Self::BadSignature,
            Webpki::CaUsedAsEndEntity => Self::LeafIsCa,
            Webpki::EndEntityUsedAsCa => Self::IssuerNotCa,
            Webpki::PathLenConstraintViolated => Self::PathLengthExceeded,
            Webpki::RequiredEkuNotFoundContext(_) | Webpki::EmptyEkuExtension => Self::ExtendedKeyUsage,
            Webpki::UnsupportedCriticalExtension => Self::UnknownCriticalExtension,
            Webpki::NameConstraintViolation => Self::NameConstraints,
            Webpki::MaximumPathDepthExceeded
            | Webpki::MaximumPathBuildCallsExceeded
            | Webpki::MaximumSignatureChecksExceeded
            | Webpki::MaximumNameConstraintComparisonsExceeded => Self::TooLong,
            _ => Self::Malformed,
        }
    }
}

/// A leaf that leads to an anchor, and how.
#[derive(Debug, Clone)]
pub struct ValidPath {
    leaf: Certificate,
    intermediates: Vec<Certificate>,
    anchor: Certificate,
}

impl ValidPath {
    /// The leaf.
    #[must_use]
    pub fn leaf(&self) -> &Certificate {
        &self.leaf
    }

    /// The intermediates, the leaf's issuer first; empty where the anchor signed the leaf.
    #[must_use]
    pub fn intermediates(&self) -> &[Certificate] {
        &self.intermediates
    }

    /// The certificate of the anchor that the path ends in.
    #[must_use]
    pub fn anchor(&self) -> &Certificate {
        &self.anchor
    }

    /// The certificate whose key signed the leaf.
    #[must_use]
    pub fn issuer(&self) -> &Certificate {
        self.intermediates.first().unwrap_or(&self.anchor)
    }
}

/// What a leaf is used for.
#[derive(Clone, Copy)]
enum Purpose {
    Client,
    Server,
}

/// Validates a client's leaf, from TLS or from an assertion's `x5c`.
///
/// Shape: `presented` is a bag, at most [`PRESENTED_MAX`]: order, duplicates and roots in it do not matter.
/// `own_intermediates` are ours, so that a bare leaf is enough. extKeyUsage, where present, must allow
/// clientAuth. Every issuer must be a CA that may sign certificates, and the leaf must not be one.
/// Units: validity ends are inclusive.
/// Errors: the most telling [`PathError`] of the paths that were tried.
/// Not here: revocation, standing, the leaf's own keyUsage (many owners set it for TLS suites long gone), and
/// the anchor certificate's pathLen and validity.
/// Source: RFC 5280 §6.1.
pub fn validate(
    leaf: &Certificate,
    presented: &[Certificate],
    own_intermediates: &[Certificate],
    anchors: &[Anchor],
    now: UnixTime,
) -> Result<ValidPath, PathError> {
    if presented.len() > PRESENTED_MAX {
        return Err(PathError::TooLong);
    }
    build(leaf, presented.iter().chain(own_intermediates), anchors, now, Purpose::Client, &|_, _| Ok(()))
}

/// Validates an agent's leaf as the strictest of its verifiers would: for judging an update.
///
/// As [`validate`], and the root itself must be a CA in its validity whose pathLen leaves room for every
/// intermediate. Self-issued intermediates are counted too, although RFC 5280 §4.2.1.9 does not, because
/// some verifiers do. Where an AKI is present it names the issuer's key.
/// Errors: those of [`validate`], about the root as well; [`PathError::KeyIdentifierMismatch`].
pub fn validate_strict(
    leaf: &Certificate,
    intermediates: &[Certificate],
    root: &Certificate,
    now: UnixTime,
) -> Result<ValidPath, PathError> {
    strict(leaf, intermediates, root, now, Purpose::Client)
}

/// [`validate_strict`] for our TLS server's leaf: extKeyUsage, where present, must allow serverAuth.
pub fn validate_server_strict(
    leaf: &Certificate,
    intermediates: &[Certificate],
    root: &Certificate,
    now: UnixTime,
) -> Result<ValidPath, PathError> {
    strict(leaf, intermediates, root, now, Purpose::Server)
}

fn strict(
    leaf: &Certificate,
    intermediates: &[Certificate],
    root: &Certificate,
    now: UnixTime,
    purpose: Purpose,
) -> Result<ValidPath, PathError> {
    judge_ca(root, now)?;
    let anchor = Anchor::from_certificate(root).map_err(|_| PathError::IssuerNotCa)?;
    build(leaf, intermediates.iter(), &[anchor], now, purpose, &|path, root| {
        if path_len(root).is_some_and(|length| path.len() > length) {
            return Err(PathError::PathLengthExceeded);
        }
        let issuers = path.iter().copied().chain([root]);
        let subjects = [leaf].into_iter().chain(path.iter().copied());
        for (subject, issuer) in subjects.zip(issuers) {
            judge_key_identifiers(subject, issuer)?;
        }
        Ok(())
    })
}

/// Verifies an intermediate under its root, both as strictly as [`validate_strict`].
///
/// The root must sign itself and leave room for one intermediate by its pathLen.
/// Errors: as there; [`PathError::BadSignature`] for either signature; [`PathError::NoPath`] where the
/// intermediate names another issuer.
pub fn verify_ca_chain(ca: &Certificate, root: &Certificate, now: UnixTime) -> Result<(), PathError> {
    let refused = |error| match error {
        X509Error::IssuerNameMismatch => PathError::NoPath,
        X509Error::Malformed { .. } => PathError::Malformed,
        _ => PathError::BadSignature,
    };
    judge_ca(root, now)?;
    root.verify_signature(root).map_err(refused)?;
    if path_len(root) == Some(0) {
        return Err(PathError::PathLengthExceeded);
    }
    judge_ca(ca, now)?;
    judge_key_identifiers(ca, root)?;
    ca.verify_signature(root).map_err(refused)
}

/// The root's or intermediate's own fields: sound, understood, a CA that may sign, in its validity.
fn judge_ca(certificate: &Certificate, now: UnixTime) -> Result<(), PathError> {
    if !is_sound(certificate) || certificate.version() != 3 {
        return Err(PathError::Malformed);
    }
    if certificate
        .extensions()
        .iter()
        .any(|extension| extension.critical() && !UNDERSTOOD.contains(&extension.oid()))
    {
        return Err(PathError::UnknownCriticalExtension);
    }
    if !certificate.basic_constraints().is_some_and(|constraints| constraints.ca) {
        return Err(PathError::IssuerNotCa);
    }
    if !may_sign_certificates(certificate) {
        return Err(PathError::KeyUsageForbidsSigning);
    }
    if now < certificate.not_before() {
        return Err(PathError::NotYetValid);
    }
    if now > certificate.not_after() {
        return Err(PathError::Expired);
    }
    Ok(())
}

/// What this file and webpki understand in a CA's certificate.
const UNDERSTOOD: [super::ObjectIdentifier; 7] = [
    AUTHORITY_KEY_IDENTIFIER,
    BASIC_CONSTRAINTS,
    EXTENDED_KEY_USAGE,
    KEY_USAGE,
    NAME_CONSTRAINTS,
    SUBJECT_ALTERNATIVE_NAME,
    SUBJECT_KEY_IDENTIFIER,
];

fn judge_key_identifiers(subject: &Certificate, issuer: &Certificate) -> Result<(), PathError> {
    match subject.authority_key_id() {
        Some(key_id) if key_id != issuer.key_id() => Err(PathError::KeyIdentifierMismatch),
        _ => Ok(()),
    }
}

fn path_len(certificate: &Certificate) -> Option<usize> {
    let length = certificate.basic_constraints()?.path_len?;
    // More than fits a usize bounds nothing.
    usize::try_from(length).ok()
}

/// An absent keyUsage forbids nothing (RFC 5280 §6.1.4 (n)).
fn may_sign_certificates(certificate: &Certificate) -> bool {
    certificate.key_usage().is_none_or(|usage| usage.key_cert_sign())
}

/// Whether each extension can be read in one way only.
///
/// A malformed keyUsage would otherwise look absent, and of two basicConstraints verifiers pick differently.
fn is_sound(certificate: &Certificate) -> bool {
    certificate.malformed_extensions().is_empty() && certificate.duplicated_extension().is_none()
}

/// A further judgement over a whole path: the intermediates from the leaf upwards, and the anchor.
type Judgement<'a> = dyn Fn(&[&Certificate], &Certificate) -> Result<(), PathError> + 'a;

fn build<'c>(
    leaf: &Certificate,
    candidates: impl Iterator<Item = &'c Certificate>,
    anchors: &[Anchor],
    now: UnixTime,
    purpose: Purpose,
    judge: &Judgement<'_>,
) -> Result<ValidPath, PathError> {
    if !is_sound(leaf) {
        return Err(PathError::Malformed);
    }
    let mut issuers: Vec<&Certificate> = Vec::new();
    for candidate in candidates {
        let anchored = anchors.iter().any(|anchor| anchor.certificate == *candidate);
        if anchored || candidate == leaf || issuers.contains(&candidate) {
            continue;
        }
        // Peers send their root along. As an intermediate it leads nowhere, and an untrusted one would be
        // reported as a path too long. Self-issued but signed by another key is old-with-new: that stays.
        if candidate.is_self_issued() && candidate.verify_signature(candidate).is_ok() {
            continue;
        }
        issuers.push(candidate);
    }

    let leaf_der = CertificateDer::from(leaf.der());
    let end_entity = EndEntityCert::try_from(&leaf_der).map_err(PathError::from_webpki)?;
    let issuers_der: Vec<CertificateDer<'_>> =
        issuers.iter().map(|issuer| CertificateDer::from(issuer.der())).collect();
    let trusted: Vec<TrustAnchor<'_>> = anchors.iter().map(|anchor| borrowed(&anchor.trusted)).collect();
    let instant = rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(
        u64::try_from(now.0).unwrap_or_default(),
    ));
    let usage = match purpose {
        Purpose::Client => webpki::KeyUsage::client_auth(),
        Purpose::Server => webpki::KeyUsage::server_auth(),
    };

    let resolve = |path: &VerifiedPath<'_>| -> Option<(Vec<&Certificate>, &Certificate)> {
        let intermediates = path
            .intermediate_certificates()
            .map(|used| issuers.iter().find(|issuer| issuer.der() == used.der().as_ref()).copied())
            .collect::<Option<Vec<_>>>()?;
        let position = trusted.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()))?;
        Some((intermediates, anchors.get(position)?.certificate()))
    };
    // webpki has no error for what we refuse, so the reason is kept beside it.
    let refused: Cell<Option<PathError>> = Cell::new(None);
    let own_checks = |path: &VerifiedPath<'_>| -> Result<(), webpki::Error> {
        let verdict = match resolve(path) {
            Some((intermediates, anchor)) => {
                judge_issuers(&intermediates).and_then(|()| judge(&intermediates, anchor))
            }
            None => Err(PathError::NoPath),
        };
        verdict.map_err(|error| {
            refused.set(Some(error));
            webpki::Error::UnknownIssuer
        })
    };
    let path = end_entity
        .verify_for_usage(
            signature::ACCEPTED,
            &trusted,
            &issuers_der,
            instant,
            usage,
            None,
            Some(&own_checks),
        )
        .map_err(|error| refused.get().unwrap_or_else(|| PathError::from_webpki(error)))?;
    let (intermediates, anchor) = resolve(&path).ok_or(PathError::NoPath)?;
    Ok(ValidPath {
        leaf: leaf.clone(),
        intermediates: intermediates.into_iter().cloned().collect(),
        anchor: anchor.clone(),
    })
}

fn judge_issuers(issuers: &[&Certificate]) -> Result<(), PathError> {
    for issuer in issuers {
        if !is_sound(issuer) {
            return Err(PathError::Malformed);
        }
        if !issuer.basic_constraints().is_some_and(|constraints| constraints.ca) {
            return Err(PathError::IssuerNotCa);
        }
        if !may_sign_certificates(issuer) {
            return Err(PathError::KeyUsageForbidsSigning);
        }
    }
    Ok(())
}

fn borrowed<'a>(anchor: &'a TrustAnchor<'_>) -> TrustAnchor<'a> {
    TrustAnchor {
        subject: anchor.subject.as_ref().into(),
        subject_public_key_info: anchor.subject_public_key_info.as_ref().into(),
        name_constraints: anchor.name_constraints.as_ref().map(|constraints| constraints.as_ref().into()),
    }
}
