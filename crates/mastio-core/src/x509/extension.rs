//! Extensions (RFC 5280 §4.2): the few that are understood here, read and written.

use std::{fmt, net::IpAddr, ops::Range, sync::Arc};

use der::oid::ObjectIdentifier;

use super::X509Error;
use super::tlv::{
    BIT_STRING, BOOLEAN, INTEGER, OBJECT_IDENTIFIER, OCTET_STRING, Reader, SEQUENCE, context, range_in,
    single, small_integer, tlv,
};

/// id-ce-subjectKeyIdentifier (RFC 5280 §4.2.1.2).
pub const SUBJECT_KEY_IDENTIFIER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.14");
/// id-ce-keyUsage (RFC 5280 §4.2.1.3).
pub const KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.15");
/// id-ce-subjectAltName (RFC 5280 §4.2.1.6).
pub const SUBJECT_ALTERNATIVE_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");
/// id-ce-basicConstraints (RFC 5280 §4.2.1.9).
pub const BASIC_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.19");
/// id-ce-nameConstraints (RFC 5280 §4.2.1.10).
pub const NAME_CONSTRAINTS: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.30");
/// id-ce-authorityKeyIdentifier (RFC 5280 §4.2.1.1).
pub const AUTHORITY_KEY_IDENTIFIER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.35");
/// id-ce-extKeyUsage (RFC 5280 §4.2.1.12).
pub const EXTENDED_KEY_USAGE: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.37");
/// id-kp-serverAuth (RFC 5280 §4.2.1.12).
pub const SERVER_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1");
/// id-kp-clientAuth (RFC 5280 §4.2.1.12).
pub const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");

/// One extension as it lies in its certificate.
#[derive(Clone)]
pub struct Extension {
    der: Arc<[u8]>,
    oid: ObjectIdentifier,
    critical: bool,
    raw: Range<usize>,
    value: Range<usize>,
}

impl Extension {
    /// The extension's type.
    #[must_use]
    pub fn oid(&self) -> ObjectIdentifier {
        self.oid
    }

    /// Whether a verifier that does not know the type must refuse the certificate.
    #[must_use]
    pub fn critical(&self) -> bool {
        self.critical
    }

    /// The content of `extnValue`: the DER of the extension's own type.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        self.der.get(self.value.clone()).unwrap_or_default()
    }

    /// The whole Extension SEQUENCE, tag and length included.
    #[must_use]
    pub fn raw(&self) -> &[u8] {
        self.der.get(self.raw.clone()).unwrap_or_default()
    }
}

impl fmt::Debug for Extension {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Extension({}{})", self.oid, if self.critical { ", critical" } else { "" })
    }
}

/// Reads `Extensions`, whose DER `extensions` is a slice of `der`.
pub(super) fn read_all(der: &Arc<[u8]>, extensions: &[u8]) -> Result<Vec<Extension>, X509Error> {
    const WHAT: &str = "extensions";
    let mut found = Vec::new();
    let mut reader = Reader::new(single(extensions, SEQUENCE, WHAT)?.value, WHAT)?;
    while !reader.is_finished() {
        let element = reader.expect(SEQUENCE)?;
        let mut fields = Reader::new(element.value, WHAT)?;
        let oid = ObjectIdentifier::from_bytes(fields.expect(OBJECT_IDENTIFIER)?.value)
            .map_err(|_| X509Error::Malformed { what: WHAT })?;
        let critical = match fields.next_if(BOOLEAN)?.map(|element| element.value) {
            None => false,
            Some([0xff]) => true,
            // An encoded default is not DER, but old toolkits wrote it and webpki reads it.
            Some([0x00]) => false,
            Some(_) => return Err(fields.malformed()),
        };
        let value = fields.expect(OCTET_STRING)?.value;
        fields.finish()?;
        found.push(Extension {
            der: Arc::clone(der),
            oid,
            critical,
            raw: range_in(der, element.raw),
            value: range_in(der, value),
        });
    }
    Ok(found)
}

/// The content of a basicConstraints extension (RFC 5280 §4.2.1.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BasicConstraints {
    /// Whether the key may sign certificates.
    pub ca: bool,
    /// How many intermediate certificates may follow; `None` sets no bound.
    pub path_len: Option<u32>,
}

/// The content of a keyUsage extension: a set of bits (RFC 5280 §4.2.1.3).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyUsage(u16);

impl KeyUsage {
    /// digitalSignature alone.
    pub const DIGITAL_SIGNATURE: Self = Self(1);
    /// keyCertSign and cRLSign.
    pub const CERTIFICATE_AND_CRL_SIGN: Self = Self(1 << 5 | 1 << 6);

    /// Whether bit `number` of the BIT STRING is set; 0 is digitalSignature, 8 is decipherOnly.
    #[must_use]
    pub fn bit(self, number: u8) -> bool {
        number < 16 && self.0 >> number & 1 == 1
    }

    /// Bit 0: the key verifies signatures other than on certificates and CRLs.
    #[must_use]
    pub fn digital_signature(self) -> bool {
        self.bit(0)
    }

    /// Bit 5: the key verifies signatures on certificates.
    #[must_use]
    pub fn key_cert_sign(self) -> bool {
        self.bit(5)
    }

    /// Bit 6: the key verifies signatures on CRLs.
    #[must_use]
    pub fn crl_sign(self) -> bool {
        self.bit(6)
    }
}

impl fmt::Debug for KeyUsage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: Vec<u8> = (0..16).filter(|number| self.bit(*number)).collect();
        write!(formatter, "KeyUsage{set:?}")
    }
}

/// What the understood extensions say. Those that cannot be read are named in `malformed`.
#[derive(Default)]
pub(super) struct Facts {
    pub(super) basic_constraints: Option<BasicConstraints>,
    pub(super) key_usage: Option<KeyUsage>,
    pub(super) extended_key_usages: Vec<ObjectIdentifier>,
    pub(super) uri_sans: Vec<String>,
    pub(super) dns_sans: Vec<String>,
    pub(super) ip_sans: Vec<IpAddr>,
    pub(super) subject_key_id: Option<Vec<u8>>,
    pub(super) authority_key_id: Option<Vec<u8>>,
    pub(super) malformed: Vec<ObjectIdentifier>,
    pub(super) duplicated: Option<ObjectIdentifier>,
}

impl Facts {
    /// Reads every understood extension. Of duplicates the first counts, and the type is remembered.
    ///
    /// A malformed extension is no error here: an adopted database must open whatever its owner's
    /// certificates hold. Path validation, identity and the lints refuse it where it matters.
    pub(super) fn read(extensions: &[Extension]) -> Self {
        let mut facts = Self::default();
        for (position, extension) in extensions.iter().enumerate() {
            let earlier = extensions.get(..position).unwrap_or_default();
            if earlier.iter().any(|other| other.oid == extension.oid) {
                facts.duplicated = Some(extension.oid);
                continue;
            }
            if facts.read_one(extension).is_err() {
                facts.malformed.push(extension.oid);
            }
        }
        facts
    }

    fn read_one(&mut self, extension: &Extension) -> Result<(), X509Error> {
        let value = extension.value();
        match extension.oid {
            BASIC_CONSTRAINTS => self.basic_constraints = Some(read_basic_constraints(value)?),
            KEY_USAGE => self.key_usage = Some(read_key_usage(value)?),
            EXTENDED_KEY_USAGE => self.extended_key_usages = read_extended_key_usages(value)?,
            SUBJECT_ALTERNATIVE_NAME => self.read_alternative_names(value)?,
            SUBJECT_KEY_IDENTIFIER => {
                let key_id = single(value, OCTET_STRING, "subject key identifier")?.value;
                if key_id.is_empty() {
                    return Err(X509Error::Malformed { what: "subject key identifier" });
                }
                self.subject_key_id = Some(key_id.to_vec());
            }
            AUTHORITY_KEY_IDENTIFIER => {
                const WHAT: &str = "authority key identifier";
                let mut reader = Reader::new(single(value, SEQUENCE, WHAT)?.value, WHAT)?;
                let key_id = reader.next_if(context(0))?;
                while !reader.is_finished() {
                    reader.next()?;
                }
                self.authority_key_id = key_id.map(|element| element.value.to_vec());
            }
            _ => {}
        }
        Ok(())
    }

    fn read_alternative_names(&mut self, value: &[u8]) -> Result<(), X509Error> {
        const WHAT: &str = "subject alternative name";
        let malformed = X509Error::Malformed { what: WHAT };
        let mut reader = Reader::new(single(value, SEQUENCE, WHAT)?.value, WHAT)?;
        let (mut uris, mut dns, mut ips) = (Vec::new(), Vec::new(), Vec::new());
        while !reader.is_finished() {
            let name = reader.next()?;
            let ascii =
                || std::str::from_utf8(name.value).ok().filter(|text| text.is_ascii()).map(str::to_owned);
            match name.tag {
                tag if tag == context(6) => uris.push(ascii().ok_or_else(|| malformed.clone())?),
                tag if tag == context(2) => dns.push(ascii().ok_or_else(|| malformed.clone())?),
                tag if tag == context(7) => ips.push(
                    <[u8; 4]>::try_from(name.value)
                        .map(IpAddr::from)
                        .or_else(|_| <[u8; 16]>::try_from(name.value).map(IpAddr::from))
                        .map_err(|_| malformed.clone())?,
                ),
                _ => {}
            }
        }
        (self.uri_sans, self.dns_sans, self.ip_sans) = (uris, dns, ips);
        Ok(())
    }
}

fn read_basic_constraints(value: &[u8]) -> Result<BasicConstraints, X509Error> {
    const WHAT: &str = "basic constraints";
    let mut reader = Reader::new(single(value, SEQUENCE, WHAT)?.value, WHAT)?;
    let ca = match reader.next_if(BOOLEAN)?.map(|element| element.value) {
        None | Some([0x00]) => false,
        Some([0xff]) => true,
        Some(_) => return Err(reader.malformed()),
    };
    let path_len = match reader.next_if(INTEGER)? {
        None => None,
        Some(element) => Some(small_integer(element.value).ok_or_else(|| reader.malformed())?),
    };
    reader.finish()?;
    Ok(BasicConstraints { ca, path_len })
}

fn read_key_usage(value: &[u8]) -> Result<KeyUsage, X509Error> {
    let malformed = X509Error::Malformed { what: "key usage" };
    let content = single(value, BIT_STRING, "key usage")?.value;
    let (unused, octets) = content.split_first().ok_or_else(|| malformed.clone())?;
    if *unused > 7 || octets.len() > 2 || (octets.is_empty() && *unused != 0) {
        return Err(malformed);
    }
    let mut bits = 0_u16;
    for (position, octet) in octets.iter().enumerate() {
        bits |= u16::from(octet.reverse_bits()) << (8 * position);
    }
    Ok(KeyUsage(bits))
}

fn read_extended_key_usages(value: &[u8]) -> Result<Vec<ObjectIdentifier>, X509Error> {
    const WHAT: &str = "extended key usage";
    let mut reader = Reader::new(single(value, SEQUENCE, WHAT)?.value, WHAT)?;
    let mut usages = Vec::new();
    while !reader.is_finished() {
        let oid = reader.expect(OBJECT_IDENTIFIER)?;
        usages
            .push(ObjectIdentifier::from_bytes(oid.value).map_err(|_| X509Error::Malformed { what: WHAT })?);
    }
    if usages.is_empty() { Err(reader.malformed()) } else { Ok(usages) }
}

/// Writes an Extension; `value` is the DER of its own type.
pub(super) fn write(oid: &ObjectIdentifier, critical: bool, value: &[u8]) -> Vec<u8> {
    let oid = tlv(OBJECT_IDENTIFIER, &[oid.as_bytes()]);
    let critical = if critical { tlv(BOOLEAN, &[&[0xff]]) } else { Vec::new() };
    tlv(SEQUENCE, &[&oid, &critical, &tlv(OCTET_STRING, &[value])])
}

pub(super) fn basic_constraints(constraints: BasicConstraints) -> Vec<u8> {
    let ca = if constraints.ca { tlv(BOOLEAN, &[&[0xff]]) } else { Vec::new() };
    let path_len = match constraints.path_len {
        Some(number) => tlv(INTEGER, &[&minimal(number)]),
        None => Vec::new(),
    };
    write(&BASIC_CONSTRAINTS, true, &tlv(SEQUENCE, &[&ca, &path_len]))
}

fn minimal(number: u32) -> Vec<u8> {
    let octets = number.to_be_bytes();
    let skip = octets.iter().take(3).take_while(|octet| **octet == 0).count();
    let significant = octets.get(skip..).unwrap_or_default();
    let pad = significant.first().is_some_and(|first| *first >= 0x80);
    pad.then_some(0).into_iter().chain(significant.iter().copied()).collect()
}

pub(super) fn key_usage(usage: KeyUsage) -> Vec<u8> {
    // A named bit list ends at its last set bit (X.690 §11.2.2).
    let octets: Vec<u8> = if usage.0 > 0xff {
        usage.0.to_le_bytes().iter().map(|octet| octet.reverse_bits()).collect()
    } else {
        vec![usage.0.to_le_bytes()[0].reverse_bits()]
    };
    let unused = octets.last().map_or(0, |last| last.trailing_zeros().min(7));
    let unused = [u8::try_from(unused).unwrap_or(7)];
    write(&KEY_USAGE, true, &tlv(BIT_STRING, &[&unused, &octets]))
}

pub(super) fn extended_key_usage(usage: &ObjectIdentifier) -> Vec<u8> {
    let oid = tlv(OBJECT_IDENTIFIER, &[usage.as_bytes()]);
    write(&EXTENDED_KEY_USAGE, false, &tlv(SEQUENCE, &[&oid]))
}

pub(super) fn subject_key_identifier(key_id: &[u8]) -> Vec<u8> {
    write(&SUBJECT_KEY_IDENTIFIER, false, &tlv(OCTET_STRING, &[key_id]))
}

pub(super) fn authority_key_identifier(key_id: &[u8]) -> Vec<u8> {
    write(&AUTHORITY_KEY_IDENTIFIER, false, &tlv(SEQUENCE, &[&tlv(context(0), &[key_id])]))
}

pub(super) fn uri_alternative_name(uri: &str) -> Result<Vec<u8>, X509Error> {
    let names = tlv(context(6), &[visible_ascii(uri, "uri san")?]);
    Ok(write(&SUBJECT_ALTERNATIVE_NAME, false, &tlv(SEQUENCE, &[&names])))
}

pub(super) fn server_alternative_names(dns: &[String], ips: &[IpAddr]) -> Result<Vec<u8>, X509Error> {
    let mut names = Vec::new();
    for name in dns {
        names.extend(tlv(context(2), &[visible_ascii(name, "dns san")?]));
    }
    for ip in ips {
        names.extend(match ip {
            IpAddr::V4(address) => tlv(context(7), &[&address.octets()]),
            IpAddr::V6(address) => tlv(context(7), &[&address.octets()]),
        });
    }
    Ok(write(&SUBJECT_ALTERNATIVE_NAME, false, &tlv(SEQUENCE, &[&names])))
}

fn visible_ascii<'a>(text: &'a str, field: &'static str) -> Result<&'a [u8], X509Error> {
    if text.is_empty() {
        return Err(X509Error::Name { field, reason: "it is empty" });
    }
    if !text.bytes().all(|octet| octet.is_ascii_graphic()) {
        return Err(X509Error::Name { field, reason: "it holds something other than visible ascii" });
    }
    Ok(text.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read_back(extension: &[u8]) -> Facts {
        let der: Arc<[u8]> = tlv(SEQUENCE, &[extension]).into();
        let read = read_all(&der, &der).unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].raw(), extension);
        let facts = Facts::read(&read);
        assert!(facts.malformed.is_empty());
        facts
    }

    #[test]
    fn what_is_written_is_read_back() {
        for path_len in [None, Some(0), Some(1), Some(127), Some(128), Some(65_536)] {
            let constraints = BasicConstraints { ca: true, path_len };
            assert_eq!(read_back(&basic_constraints(constraints)).basic_constraints, Some(constraints));
        }
        for bits in 1..512 {
            let usage = KeyUsage(bits);
            assert_eq!(read_back(&key_usage(usage)).key_usage, Some(usage), "{usage:?}");
        }
        assert_eq!(key_usage(KeyUsage::DIGITAL_SIGNATURE)[12..], [0x03, 0x02, 0x07, 0x80]);
        assert_eq!(key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN)[12..], [0x03, 0x02, 0x01, 0x06]);
        let facts = read_back(
            &server_alternative_names(
                &["mastio.example".to_owned()],
                &["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()],
            )
            .unwrap(),
        );
        assert_eq!(facts.dns_sans, ["mastio.example"]);
        assert_eq!(facts.ip_sans.len(), 2);
        assert_eq!(read_back(&authority_key_identifier(b"12")).authority_key_id.as_deref(), Some(&b"12"[..]));
        assert_eq!(read_back(&subject_key_identifier(b"12")).subject_key_id.as_deref(), Some(&b"12"[..]));
    }

    #[test]
    fn a_malformed_extension_is_remembered_and_tells_nothing() {
        let der: Arc<[u8]> =
            tlv(SEQUENCE, &[&write(&SUBJECT_ALTERNATIVE_NAME, false, b"\x30\x05oops")]).into();
        let facts = Facts::read(&read_all(&der, &der).unwrap());
        assert_eq!(facts.malformed, [SUBJECT_ALTERNATIVE_NAME]);
        assert!(facts.uri_sans.is_empty());
    }
}
