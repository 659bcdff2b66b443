//! Certificate revocation lists (RFC 5280 §5): which certificates of one issuer no longer count.
//!
//! Written like certificates: the bytes to be signed are put together here, judged, and only then signed by the caller.

use super::extension::{self, write};
use super::signature::PublicKey;
use super::tlv::{
    BIT_STRING, ENUMERATED, INTEGER, Reader, SEQUENCE, context_constructed, single, time, tlv, whole_octets,
};
use super::{Certificate, ObjectIdentifier, SignatureAlgorithm, X509Error, certificate::assemble, pem};
use crate::time::UnixTime;

/// id-ce-cRLNumber (RFC 5280 §5.2.3).
const CRL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.20");
/// id-ce-cRLReasons (RFC 5280 §5.3.1).
const REASON_CODE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.21");

const WHAT: &str = "certificate revocation list";

/// Why a certificate no longer counts (RFC 5280 §5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RevocationReason {
    /// Not said; written by leaving the reason out.
    Unspecified,
    /// The key is, or may be, in other hands.
    KeyCompromise,
    /// The name has changed hands.
    AffiliationChanged,
    /// Another certificate has taken its place.
    Superseded,
    /// It is not needed any more.
    CessationOfOperation,
    /// For now: it may come back.
    CertificateHold,
    /// It may no longer do what it says.
    PrivilegeWithdrawn,
}

impl RevocationReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Unspecified,
        Self::KeyCompromise,
        Self::AffiliationChanged,
        Self::Superseded,
        Self::CessationOfOperation,
        Self::CertificateHold,
        Self::PrivilegeWithdrawn,
    ];

    /// The name in RFC 5280.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::KeyCompromise => "keyCompromise",
            Self::AffiliationChanged => "affiliationChanged",
            Self::Superseded => "superseded",
            Self::CessationOfOperation => "cessationOfOperation",
            Self::CertificateHold => "certificateHold",
            Self::PrivilegeWithdrawn => "privilegeWithdrawn",
        }
    }

    /// The reason of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }

    fn code(self) -> u8 {
        match self {
            Self::Unspecified => 0,
            Self::KeyCompromise => 1,
            Self::AffiliationChanged => 3,
            Self::Superseded => 4,
            Self::CessationOfOperation => 5,
            Self::CertificateHold => 6,
            Self::PrivilegeWithdrawn => 9,
        }
    }
}

/// One certificate that no longer counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevokedCertificate {
    /// The serial's octets, most significant first, without a sign octet.
    pub serial: Vec<u8>,
    /// Since when.
    pub revoked_at: UnixTime,
    /// Why.
    pub reason: RevocationReason,
}

/// The bytes of a list that may be signed.
#[derive(Debug, Clone)]
pub struct CrlTbs {
    tbs: Vec<u8>,
    algorithm: SignatureAlgorithm,
}

/// Puts a complete list of `issuer` together.
///
/// Shape: version 2; thisUpdate and nextUpdate; entries by serial with their reason; AKI and `number` as crlNumber.
/// Errors: [`X509Error::Crl`] for an issuer whose keyUsage lacks cRLSign, for a nextUpdate that is not later, a number
/// below 1, a serial that is empty or zero, has leading zeros or more than 20 octets, or comes twice.
/// Source: RFC 5280 §5.1 to §5.3.
pub fn crl(
    issuer: &Certificate,
    number: i64,
    this_update: UnixTime,
    next_update: UnixTime,
    revoked: &[RevokedCertificate],
    algorithm: SignatureAlgorithm,
) -> Result<CrlTbs, X509Error> {
    let refused = |reason| Err(X509Error::Crl { reason });
    if issuer.key_usage().is_some_and(|usage| !usage.crl_sign()) {
        return refused("the issuer's key usage forbids signing it");
    }
    if next_update <= this_update {
        return refused("next update is not after this update");
    }
    if number < 1 {
        return refused("its number is not positive");
    }
    let mut entries: Vec<&RevokedCertificate> = revoked.iter().collect();
    entries.sort_by(|one, other| (one.serial.len(), &one.serial).cmp(&(other.serial.len(), &other.serial)));
    if entries.windows(2).any(|pair| matches!(pair, [one, other] if one.serial == other.serial)) {
        return refused("a serial comes twice");
    }
    if entries
        .iter()
        .any(|entry| entry.serial.len() > 20 || entry.serial.first().is_none_or(|first| *first == 0))
    {
        return refused("a serial is empty, too long, or begins with zero");
    }
    let entries = entries.into_iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    let entries: Vec<&[u8]> = entries.iter().map(Vec::as_slice).collect();
    // An empty list is left out, not written empty (RFC 5280 §5.1.2.6).
    let list = if entries.is_empty() { Vec::new() } else { tlv(SEQUENCE, &entries) };
    let extensions = tlv(
        SEQUENCE,
        &[
            &extension::authority_key_identifier(&issuer.key_id()),
            &write(&CRL_NUMBER, false, &tlv(INTEGER, &[&magnitude(&number.to_be_bytes())])),
        ],
    );
    let tbs = tlv(
        SEQUENCE,
        &[
            &tlv(INTEGER, &[&[1]]),
            &algorithm.identifier_der(),
            issuer.subject_der(),
            &time(this_update)?,
            &time(next_update)?,
            &list,
            &tlv(context_constructed(0), &[&extensions]),
        ],
    );
    Ok(CrlTbs { tbs, algorithm })
}

fn entry(revoked: &RevokedCertificate) -> Result<Vec<u8>, X509Error> {
    let reason = match revoked.reason {
        RevocationReason::Unspecified => Vec::new(),
        reason => tlv(SEQUENCE, &[&write(&REASON_CODE, false, &tlv(ENUMERATED, &[&[reason.code()]]))]),
    };
    let serial = tlv(INTEGER, &[&magnitude(&revoked.serial)]);
    Ok(tlv(SEQUENCE, &[&serial, &time(revoked.revoked_at)?, &reason]))
}

/// The content of a positive INTEGER.
fn magnitude(octets: &[u8]) -> Vec<u8> {
    let skip = octets.iter().take_while(|octet| **octet == 0).count();
    let significant = octets.get(skip..).unwrap_or_default();
    let pad = significant.first().is_none_or(|first| *first >= 0x80);
    pad.then_some(0).into_iter().chain(significant.iter().copied()).collect()
}

impl CrlTbs {
    /// The TBSCertList's DER: the message to be signed.
    #[must_use]
    pub fn to_be_signed(&self) -> &[u8] {
        &self.tbs
    }

    /// Puts the signature below the signed bytes, and gives the list's DER.
    ///
    /// Shape: `signature` is a DER ECDSA-Sig-Value, or the octets of an RSA signature.
    /// Errors: [`X509Error::SignatureInvalid`] where `issuer` has not signed it so.
    pub fn into_crl(self, issuer: &Certificate, signature: &[u8]) -> Result<Vec<u8>, X509Error> {
        PublicKey::read(issuer.spki_der())?.verify(self.algorithm.identifier(), &self.tbs, signature)?;
        Ok(assemble(&self.tbs, &self.algorithm.identifier_der(), signature))
    }
}

/// A list as PEM (RFC 7468 §6): `BEGIN X509 CRL`, 64 columns, LF, final newline.
#[must_use]
pub fn crl_pem(der: &[u8]) -> String {
    pem("X509 CRL", der)
}

/// Verifies that `issuer` signed the list in `der`.
///
/// Errors: [`X509Error::Malformed`], [`X509Error::IssuerNameMismatch`], [`X509Error::SignatureInvalid`].
/// Not here: times, and what the list says.
pub fn verify_crl(der: &[u8], issuer: &Certificate) -> Result<(), X509Error> {
    let mut outer = Reader::new(single(der, SEQUENCE, WHAT)?.value, WHAT)?;
    let tbs = outer.expect(SEQUENCE)?;
    let algorithm = outer.expect(SEQUENCE)?;
    let signature = whole_octets(outer.expect(BIT_STRING)?, WHAT)?;
    outer.finish()?;
    let mut fields = Reader::new(tbs.value, WHAT)?;
    fields.expect(INTEGER)?;
    if fields.expect(SEQUENCE)?.raw != algorithm.raw {
        return Err(fields.malformed());
    }
    if fields.expect(SEQUENCE)?.raw != issuer.subject_der() {
        return Err(X509Error::IssuerNameMismatch);
    }
    PublicKey::read(issuer.spki_der())?.verify(algorithm.value, tbs.raw, signature)
}
