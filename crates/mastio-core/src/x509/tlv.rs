//! Tag, length, value: the strict DER layer (X.690) under everything here.
//!
//! Reading leans on the `der` crate for tags and minimal lengths, and keeps the raw bytes of each
//! element, because re-signing copies fields byte for byte. Writing needs so few shapes that plain
//! functions do.

use std::ops::Range;

use der::{Header, Reader as _, SliceReader};
use jiff::{SignedDuration, civil};

use super::X509Error;
use crate::time::UnixTime;

pub(super) const BOOLEAN: u8 = 0x01;
pub(super) const INTEGER: u8 = 0x02;
pub(super) const BIT_STRING: u8 = 0x03;
pub(super) const OCTET_STRING: u8 = 0x04;
pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(super) const ENUMERATED: u8 = 0x0a;
pub(super) const UTF8_STRING: u8 = 0x0c;
pub(super) const PRINTABLE_STRING: u8 = 0x13;
pub(super) const TELETEX_STRING: u8 = 0x14;
pub(super) const IA5_STRING: u8 = 0x16;
pub(super) const UTC_TIME: u8 = 0x17;
pub(super) const GENERALIZED_TIME: u8 = 0x18;
pub(super) const BMP_STRING: u8 = 0x1e;
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const SET: u8 = 0x31;

/// `[number]`, primitive.
pub(super) const fn context(number: u8) -> u8 {
    0x80 | number
}

/// `[number]`, constructed.
pub(super) const fn context_constructed(number: u8) -> u8 {
    0xa0 | number
}

/// One element: its first identifier octet, all its bytes, and its content.
#[derive(Clone, Copy)]
pub(super) struct Tlv<'a> {
    pub(super) tag: u8,
    pub(super) raw: &'a [u8],
    pub(super) value: &'a [u8],
}

/// Reads elements one after the other; `what` names the structure in errors.
pub(super) struct Reader<'a> {
    inner: SliceReader<'a>,
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], what: &'static str) -> Result<Self, X509Error> {
        let inner = SliceReader::new(bytes).map_err(|_| X509Error::Malformed { what })?;
        Ok(Self { inner, what })
    }

    pub(super) fn malformed(&self) -> X509Error {
        X509Error::Malformed { what: self.what }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.inner.is_finished()
    }

    pub(super) fn next(&mut self) -> Result<Tlv<'a>, X509Error> {
        let header = Header::peek(&self.inner).map_err(|_| self.malformed())?;
        let raw = self.inner.tlv_bytes().map_err(|_| self.malformed())?;
        let length = usize::try_from(header.length()).map_err(|_| self.malformed())?;
        let value = raw
            .len()
            .checked_sub(length)
            .and_then(|start| raw.get(start..))
            .ok_or_else(|| self.malformed())?;
        let tag = raw.first().copied().ok_or_else(|| self.malformed())?;
        Ok(Tlv { tag, raw, value })
    }

    pub(super) fn expect(&mut self, tag: u8) -> Result<Tlv<'a>, X509Error> {
        if self.inner.peek_byte() == Some(tag) { self.next() } else { Err(self.malformed()) }
    }

    pub(super) fn next_if(&mut self, tag: u8) -> Result<Option<Tlv<'a>>, X509Error> {
        if self.inner.peek_byte() == Some(tag) { self.next().map(Some) } else { Ok(None) }
    }

    pub(super) fn finish(self) -> Result<(), X509Error> {
        if self.is_finished() { Ok(()) } else { Err(X509Error::TrailingBytes { what: self.what }) }
    }
}

/// Reads the one element that `bytes` must consist of.
pub(super) fn single<'a>(bytes: &'a [u8], tag: u8, what: &'static str) -> Result<Tlv<'a>, X509Error> {
    let mut reader = Reader::new(bytes, what)?;
    let element = reader.expect(tag)?;
    reader.finish()?;
    Ok(element)
}

/// The octets of a BIT STRING whose length is a whole number of octets, as keys and signatures are.
pub(super) fn whole_octets<'a>(element: Tlv<'a>, what: &'static str) -> Result<&'a [u8], X509Error> {
    match element.value.split_first() {
        Some((0, octets)) => Ok(octets),
        _ => Err(X509Error::Malformed { what }),
    }
}

/// Whether `content` is the content of a DER INTEGER: at least one octet, minimal.
pub(super) fn is_integer(content: &[u8]) -> bool {
    match content {
        [] => false,
        [_] => true,
        [0x00, second, ..] => *second >= 0x80,
        [0xff, second, ..] => *second < 0x80,
        _ => true,
    }
}

/// A small non-negative INTEGER.
pub(super) fn small_integer(content: &[u8]) -> Option<u32> {
    if !is_integer(content) || content.first().is_some_and(|first| *first >= 0x80) || content.len() > 5 {
        return None;
    }
    let value = content.iter().fold(0_u64, |value, octet| (value << 8) | u64::from(*octet));
    u32::try_from(value).ok()
}

/// Where `part`, a slice of `whole`, lies in it.
pub(super) fn range_in(whole: &[u8], part: &[u8]) -> Range<usize> {
    let start = part.as_ptr().addr().wrapping_sub(whole.as_ptr().addr());
    start..start.wrapping_add(part.len())
}

/// Writes one element whose content is `parts` one after the other.
pub(super) fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length = parts.iter().map(|part| part.len()).sum::<usize>();
    let mut element = Vec::with_capacity(length + 6);
    element.push(tag);
    if length < 0x80 {
        element.push(u8::try_from(length).unwrap_or(0x7f));
    } else {
        let octets = length.to_be_bytes();
        let skip = octets.iter().take_while(|octet| **octet == 0).count();
        let significant = octets.get(skip..).unwrap_or_default();
        element.push(0x80 | u8::try_from(significant.len()).unwrap_or(8));
        element.extend_from_slice(significant);
    }
    for part in parts {
        element.extend_from_slice(part);
    }
    element
}

/// 1970-01-01T00:00:00. `jiff`'s timestamps end a day before 9999-12-31T23:59:59Z, which RFC 5280
/// §4.1.2.5 gives a meaning of its own; its civil times do not.
const EPOCH: civil::DateTime = civil::date(1970, 1, 1).at(0, 0, 0, 0);

/// Writes a Time as RFC 5280 §4.1.2.5 wants it: UTCTime through 2049, GeneralizedTime after.
pub(super) fn time(instant: UnixTime) -> Result<Vec<u8>, X509Error> {
    let refused = || X509Error::Time { seconds: instant.0 };
    let civil = EPOCH.checked_add(SignedDuration::from_secs(instant.0)).map_err(|_| refused())?;
    let (year, month, day) = (civil.year(), civil.month(), civil.day());
    let (hour, minute, second) = (civil.hour(), civil.minute(), civil.second());
    if year < 0 {
        return Err(refused());
    }
    if (1950..2050).contains(&year) {
        let text = format!("{:02}{month:02}{day:02}{hour:02}{minute:02}{second:02}Z", year % 100);
        Ok(tlv(UTC_TIME, &[text.as_bytes()]))
    } else {
        let text = format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}Z");
        Ok(tlv(GENERALIZED_TIME, &[text.as_bytes()]))
    }
}

/// Reads a Time: whole seconds and `Z`, nothing else (RFC 5280 §4.1.2.5.1 and .2).
pub(super) fn read_time(element: Tlv<'_>) -> Result<UnixTime, X509Error> {
    let malformed = || X509Error::Malformed { what: "time" };
    let (year_digits, rest) = match element.tag {
        UTC_TIME if element.value.len() == 13 => element.value.split_at(2),
        GENERALIZED_TIME if element.value.len() == 15 => element.value.split_at(4),
        _ => return Err(malformed()),
    };
    let [month1, month2, day1, day2, hour1, hour2, minute1, minute2, second1, second2, b'Z'] = rest else {
        return Err(malformed());
    };
    let pair = |tens: u8, ones: u8| -> Option<i8> {
        (tens.is_ascii_digit() && ones.is_ascii_digit())
            .then(|| (tens - b'0') * 10 + (ones - b'0'))
            .and_then(|number| i8::try_from(number).ok())
    };
    let read = || -> Option<civil::DateTime> {
        let year = match year_digits {
            [tens, ones] => {
                let year = i16::from(pair(*tens, *ones)?);
                if year < 50 { 2000 + year } else { 1900 + year }
            }
            [thousands, hundreds, tens, ones] => {
                i16::from(pair(*thousands, *hundreds)?) * 100 + i16::from(pair(*tens, *ones)?)
            }
            _ => return None,
        };
        civil::DateTime::new(
            year,
            pair(*month1, *month2)?,
            pair(*day1, *day2)?,
            pair(*hour1, *hour2)?,
            pair(*minute1, *minute2)?,
            pair(*second1, *second2)?,
            0,
        )
        .ok()
    };
    read().map(|civil| UnixTime(civil.duration_since(EPOCH).as_secs())).ok_or_else(malformed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn times_switch_encoding_at_2050_and_come_back_unchanged() {
        let cases = [
            (-631_152_000, "17 500101000000Z"),
            (0, "17 700101000000Z"),
            (2_524_607_999, "17 491231235959Z"),
            (2_524_608_000, "18 20500101000000Z"),
            (253_402_300_799, "18 99991231235959Z"),
        ];
        for (seconds, expected) in cases {
            let der = time(UnixTime(seconds)).unwrap();
            let element = Reader::new(&der, "time").unwrap().next().unwrap();
            let shown = format!("{:x} {}", element.tag, String::from_utf8_lossy(element.value));
            assert_eq!(shown, expected);
            assert_eq!(read_time(element).unwrap(), UnixTime(seconds), "{expected}");
        }
        assert!(time(UnixTime(253_402_300_800)).is_err());
        assert!(time(UnixTime(i64::MIN)).is_err());
    }

    #[test]
    fn long_lengths_are_minimal() {
        assert_eq!(tlv(OCTET_STRING, &[&[0; 127]])[..2], [0x04, 0x7f]);
        assert_eq!(tlv(OCTET_STRING, &[&[0; 128]])[..3], [0x04, 0x81, 0x80]);
        assert_eq!(tlv(OCTET_STRING, &[&[0; 200], &[0; 100]])[..4], [0x04, 0x82, 0x01, 0x2c]);
        assert!(single(&[0x04, 0x81, 0x01, 0x00], OCTET_STRING, "test").is_err());
        assert!(single(&[0x04, 0x01, 0x00, 0x00], OCTET_STRING, "test").is_err());
    }
}
