//! Distinguished names (RFC 5280 §4.1.2.4): read for display, written for our own profiles.

use std::fmt::Write as _;

use der::oid::ObjectIdentifier;

use super::X509Error;
use super::tlv::{
    BMP_STRING, IA5_STRING, OBJECT_IDENTIFIER, PRINTABLE_STRING, Reader, SEQUENCE, SET, TELETEX_STRING, Tlv,
    UTF8_STRING, single, tlv,
};

const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
const ORGANIZATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.10");

/// Attribute types that have a short name of their own in RFC 4514 §3 and common tools.
const SHORT_NAMES: [(ObjectIdentifier, &str); 9] = [
    (COMMON_NAME, "CN"),
    (ORGANIZATION, "O"),
    (ObjectIdentifier::new_unwrap("2.5.4.11"), "OU"),
    (ObjectIdentifier::new_unwrap("2.5.4.6"), "C"),
    (ObjectIdentifier::new_unwrap("2.5.4.7"), "L"),
    (ObjectIdentifier::new_unwrap("2.5.4.8"), "ST"),
    (ObjectIdentifier::new_unwrap("2.5.4.5"), "serialNumber"),
    (ObjectIdentifier::new_unwrap("0.9.2342.19200300.100.1.25"), "DC"),
    (ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.1"), "emailAddress"),
];

/// Longest common name and organization, in characters (RFC 5280 appendix A.1, ub-common-name).
const ATTRIBUTE_CHARACTERS_MAX: usize = 64;

/// The subject of a certificate of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The common name, 1 to 64 characters.
    pub common_name: String,
    /// The organization, 1 to 64 characters; `None` leaves it out.
    pub organization: Option<String>,
}

/// Where a subject comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubjectName {
    /// Written anew: CN, then O, as UTF8String.
    Names(Names),
    /// The DER of another certificate's subject, copied byte for byte.
    Der(Vec<u8>),
}

impl From<Names> for SubjectName {
    fn from(names: Names) -> Self {
        Self::Names(names)
    }
}

impl From<&Names> for SubjectName {
    fn from(names: &Names) -> Self {
        Self::Names(names.clone())
    }
}

impl SubjectName {
    /// The Name's DER.
    ///
    /// Errors: [`X509Error::Name`] for empty, over-long or unprintable values; [`X509Error::Malformed`]
    /// where copied DER is no Name.
    pub(super) fn into_der(self) -> Result<Vec<u8>, X509Error> {
        match self {
            Self::Der(der) => {
                attributes(&der)?;
                Ok(der)
            }
            Self::Names(names) => {
                let common_name = attribute(&COMMON_NAME, &names.common_name, "common name")?;
                let organization = match &names.organization {
                    Some(text) => attribute(&ORGANIZATION, text, "organization")?,
                    None => Vec::new(),
                };
                Ok(tlv(SEQUENCE, &[&common_name, &organization]))
            }
        }
    }
}

fn attribute(oid: &ObjectIdentifier, text: &str, field: &'static str) -> Result<Vec<u8>, X509Error> {
    let characters = text.chars().count();
    if characters == 0 {
        return Err(X509Error::Name { field, reason: "it is empty" });
    }
    if characters > ATTRIBUTE_CHARACTERS_MAX {
        return Err(X509Error::Name { field, reason: "it is longer than 64 characters" });
    }
    // A NUL in a name made verifiers that read C strings see another name.
    if text.chars().any(char::is_control) {
        return Err(X509Error::Name { field, reason: "it holds a control character" });
    }
    let oid = tlv(OBJECT_IDENTIFIER, &[oid.as_bytes()]);
    let value = tlv(UTF8_STRING, &[text.as_bytes()]);
    Ok(tlv(SET, &[&tlv(SEQUENCE, &[&oid, &value])]))
}

/// The attributes of a Name in order; a multi-valued RDN gives several.
pub(super) fn attributes(name: &[u8]) -> Result<Vec<(ObjectIdentifier, Tlv<'_>)>, X509Error> {
    let mut found = Vec::new();
    let mut names = Reader::new(single(name, SEQUENCE, "name")?.value, "name")?;
    while !names.is_finished() {
        let mut set = Reader::new(names.expect(SET)?.value, "name")?;
        if set.is_finished() {
            return Err(set.malformed());
        }
        while !set.is_finished() {
            let mut pair = Reader::new(set.expect(SEQUENCE)?.value, "name")?;
            let oid = pair.expect(OBJECT_IDENTIFIER)?;
            let value = pair.next()?;
            pair.finish()?;
            let oid =
                ObjectIdentifier::from_bytes(oid.value).map_err(|_| X509Error::Malformed { what: "name" })?;
            found.push((oid, value));
        }
    }
    Ok(found)
}

/// The first common name.
pub(super) fn common_name(attributes: &[(ObjectIdentifier, Tlv<'_>)]) -> Option<String> {
    attributes.iter().find(|(oid, _)| *oid == COMMON_NAME).and_then(|(_, value)| text(*value))
}

fn text(value: Tlv<'_>) -> Option<String> {
    match value.tag {
        UTF8_STRING => std::str::from_utf8(value.value).ok().map(str::to_owned),
        PRINTABLE_STRING | IA5_STRING if value.value.is_ascii() => {
            std::str::from_utf8(value.value).ok().map(str::to_owned)
        }
        // T.61 was Latin-1 in practice.
        TELETEX_STRING => Some(value.value.iter().copied().map(char::from).collect()),
        BMP_STRING if value.value.len().is_multiple_of(2) => {
            let units = value.value.chunks_exact(2).map(|pair| match pair {
                [high, low] => u16::from_be_bytes([*high, *low]),
                _ => 0xfffd,
            });
            char::decode_utf16(units).collect::<Result<String, _>>().ok()
        }
        _ => None,
    }
}

/// `CN=acme CA, O=acme`, in the order of encoding. For people; never compare it.
pub(super) fn display(name: &[u8]) -> String {
    let mut shown = String::new();
    for (oid, value) in attributes(name).unwrap_or_default() {
        if !shown.is_empty() {
            shown.push_str(", ");
        }
        match SHORT_NAMES.iter().find(|(known, _)| *known == oid) {
            Some((_, short)) => shown.push_str(short),
            None => _ = write!(shown, "{oid}"),
        }
        shown.push('=');
        match text(value) {
            Some(text) => {
                for character in text.chars() {
                    match character {
                        ',' | '\\' | '=' => shown.extend(['\\', character]),
                        character if character.is_control() => shown.extend(character.escape_default()),
                        character => shown.push(character),
                    }
                }
            }
            None => {
                shown.push('#');
                shown.push_str(&super::hex(value.raw));
            }
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_name_is_shown_in_its_order_with_separators_escaped() {
        let names = Names { common_name: "a, b".to_owned(), organization: Some("übung".to_owned()) };
        let der = SubjectName::from(&names).into_der().unwrap();
        assert_eq!(display(&der), "CN=a\\, b, O=übung");
        assert_eq!(common_name(&attributes(&der).unwrap()).as_deref(), Some("a, b"));
    }

    #[test]
    fn names_that_no_verifier_agrees_on_are_refused() {
        for common_name in ["", "a\0b", &"x".repeat(65)] {
            let names = Names { common_name: common_name.to_owned(), organization: None };
            assert!(matches!(SubjectName::from(names).into_der(), Err(X509Error::Name { .. })));
        }
        let names = Names { common_name: "ü".repeat(64), organization: None };
        assert!(SubjectName::from(names).into_der().is_ok());
    }
}
