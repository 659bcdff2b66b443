//! The bytes to be signed, put together. Nothing is decided here.

use super::tlv::{INTEGER, SEQUENCE, context_constructed, tlv};
use super::{Serial, SignatureAlgorithm};

/// The fields of a v3 TBSCertificate (RFC 5280 §4.1.2). Slices are whole elements.
pub(super) struct Fields<'a> {
    pub(super) serial: &'a Serial,
    pub(super) algorithm: SignatureAlgorithm,
    pub(super) issuer_name: &'a [u8],
    pub(super) validity: &'a [u8],
    pub(super) subject: &'a [u8],
    pub(super) spki: &'a [u8],
    pub(super) extensions: &'a [&'a [u8]],
}

impl Fields<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let version = tlv(context_constructed(0), &[&tlv(INTEGER, &[&[2]])]);
        let serial = tlv(INTEGER, &[self.serial.content()]);
        let extensions = tlv(context_constructed(3), &[&tlv(SEQUENCE, self.extensions)]);
        tlv(
            SEQUENCE,
            &[
                &version,
                &serial,
                &self.algorithm.identifier_der(),
                self.issuer_name,
                self.validity,
                self.subject,
                self.spki,
                &extensions,
            ],
        )
    }
}
