//! A TLS front that may say which client certificate it has verified (wire contract §1.1, design §6).
//!
//! Without configuration there is none, and a claim of a certificate is dropped whoever makes it: it would be an
//! authentication bypass. From an address in `MCP_PROXY_TRUSTED_FRONT` the claim takes the place of the handshake.
//! That the client holds the key is all that it proves, as the handshake does: path, standing and revocation are judged
//! afterwards, on each request.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use mastio_core::error::Kind;
use mastio_core::x509::Certificate;
use serde_json::json;

use super::error::ApiError;

/// The leaf as percent-encoded PEM: nginx's `$ssl_client_escaped_cert`.
const CERTIFICATE: HeaderName = HeaderName::from_static("x-ssl-client-cert");
/// What came of verifying it: nginx's `$ssl_client_verify`.
const VERIFY: HeaderName = HeaderName::from_static("x-ssl-client-verify");
/// The one value of [`VERIFY`] that vouches for a certificate.
const VERIFIED: &str = "SUCCESS";

/// The addresses whose word is taken. None by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Front(Vec<Network>);

/// Addresses that share their first `prefix` bits with `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u32,
}

/// What a front says of the client certificate of one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// Nothing at all: this request did not come through it, and the handshake counts.
    Nothing,
    /// The client has shown none, or none that the front could verify.
    NoCertificate,
    /// DER of the certificate whose key the client has proved to the front.
    Certificate(Arc<[u8]>),
}

/// A text is not a list of addresses.
#[derive(Debug, thiserror::Error)]
#[error("not addresses or CIDR blocks separated by commas")]
pub struct NotAddresses;

impl FromStr for Front {
    type Err = NotAddresses;

    /// Reads addresses and CIDR blocks separated by commas. A block with bits behind its prefix, or with the prefix 0,
    /// is refused: it would trust more than its author means.
    fn from_str(text: &str) -> Result<Self, NotAddresses> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(|part| Network::parse(part).ok_or(NotAddresses)).collect::<Result<_, _>>().map(Self)
    }
}

impl Front {
    /// Whether the word of `peer` is taken.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(peer))
    }
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let (bits, length) = bits(address);
        let prefix = prefix.unwrap_or(length);
        let mask = u128::MAX.checked_shl(length.checked_sub(prefix)?).unwrap_or(0);
        (prefix > 0 && bits & mask == bits).then_some(Self { address, prefix })
    }

    fn contains(&self, peer: IpAddr) -> bool {
        let ((ours, length), (theirs, their_length)) = (bits(self.address), bits(peer));
        let behind = length.saturating_sub(self.prefix);
        length == their_length && ours.checked_shr(behind) == theirs.checked_shr(behind)
    }
}

/// An address as a number, and how many bits it has. A listener on `::` sees IPv4 peers as `::ffff:a.b.c.d`.
fn bits(address: IpAddr) -> (u128, u32) {
    match address.to_canonical() {
        IpAddr::V4(address) => (u128::from(address.to_bits()), u32::BITS),
        IpAddr::V6(address) => (address.to_bits(), u128::BITS),
    }
}

/// Reads what a trusted front says of the client certificate.
///
/// Errors: 400 where a header comes twice (somebody before the front wrote one of them), or where a certificate that
/// is said to be verified cannot be read.
pub fn forwarded(headers: &HeaderMap) -> Result<Forwarded, ApiError> {
    let (certificate, verify) = (once(headers, &CERTIFICATE)?, once(headers, &VERIFY)?);
    match (certificate, verify) {
        (None, None) => Ok(Forwarded::Nothing),
        (certificate, Some(verify)) if verify == VERIFIED => {
            let der = certificate.and_then(|value| certificate_der(value.as_bytes()));
            der.map(Forwarded::Certificate).ok_or_else(|| {
                refusal(
                    "forwarded_cert_malformed",
                    "the front's X-SSL-Client-Cert is not a percent-encoded PEM",
                )
            })
        }
        (_, verify) => {
            tracing::debug!(verify = ?verify, "front_verified_no_client_certificate");
            Ok(Forwarded::NoCertificate)
        }
    }
}

/// The client's address as a trusted front tells it: the last entry of `X-Forwarded-For`, which is the one that the front
/// itself has added. What stands before it is the client's own word. Nothing where the front says nothing readable.
#[must_use]
pub fn client_address(headers: &HeaderMap) -> Option<IpAddr> {
    let last = headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
    last.rsplit(',').next()?.trim().parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

fn once<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    match values.next() {
        None => Ok(first),
        Some(_) => Err(refusal(
            "forwarded_cert_repeated",
            "the front's X-SSL-Client headers come twice: it must set them, not add to what clients send",
        )),
    }
}

fn refusal(reason: &'static str, hint: &'static str) -> ApiError {
    tracing::warn!(reason, "front_request_refused");
    ApiError::new(Kind::Invalid, json!({ "reason": reason, "hint": hint }))
}

fn certificate_der(escaped: &[u8]) -> Option<Arc<[u8]>> {
    let pem = String::from_utf8(percent_decoded(escaped)?).ok()?;
    Certificate::from_pem(&pem).ok().map(|certificate| Arc::from(certificate.der()))
}

/// Percent-decoding, not form decoding: base64 has `+`, which stays what it is.
fn percent_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        rest = match rest {
            [] => return Some(decoded),
            [b'%', high, low, rest @ ..] => {
                decoded.push(digit(high)? * 16 + digit(low)?);
                rest
            }
            [b'%', ..] => return None,
            [byte, rest @ ..] => {
                decoded.push(*byte);
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn trusts(front: &str, peer: &str) -> bool {
        front.parse::<Front>().unwrap().trusts(peer.parse().unwrap())
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn an_address_is_trusted_only_where_it_is_named() {
        assert!(!trusts("", "127.0.0.1"));
        assert!(trusts("127.0.0.1", "127.0.0.1"));
        assert!(!trusts("127.0.0.1", "127.0.0.2"));
        assert!(trusts("10.1.0.0/16, 192.0.2.7", "10.1.255.9"));
        assert!(trusts("10.1.0.0/16, 192.0.2.7", "192.0.2.7"));
        assert!(!trusts("10.1.0.0/16, 192.0.2.7", "10.2.0.1"));
        assert!(trusts("2001:db8::/32", "2001:db8:1::5"));
        assert!(!trusts("2001:db8::/32", "2001:db9::5"));
        assert!(trusts("::1", "::1"));
    }

    #[test]
    fn an_ipv4_peer_of_an_ipv6_listener_is_the_same_address() {
        assert!(trusts("127.0.0.1", "::ffff:127.0.0.1"));
        assert!(!trusts("127.0.0.1", "::1"));
        // The same 32 bits at the end of another family.
        assert!(!trusts("0.0.0.1", "::1"));
        assert!(!trusts("::1", "0.0.0.1"));
    }

    #[test]
    fn what_would_trust_more_than_it_says_is_refused() {
        for text in [
            "0.0.0.0/0",
            "::/0",
            "10.0.0.5/8",
            "10.0.0.0/33",
            "::1/129",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "nginx",
            "10.0.0.1:443",
            "10.0.0.1 10.0.0.2",
            "*",
        ] {
            assert!(text.parse::<Front>().is_err(), "{text}");
        }
    }

    #[test]
    fn percent_decoding_leaves_a_plus_alone() {
        assert_eq!(percent_decoded(b"a%20b%0Ac+d%2B").unwrap(), b"a b\nc+d+");
        assert_eq!(percent_decoded(b"%2f%2F").unwrap(), b"//");
        for wrong in [&b"%"[..], b"%2", b"%zz", b"%+1", b"abc%"] {
            assert_eq!(percent_decoded(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn only_a_verified_certificate_counts() {
        assert_eq!(forwarded(&headers(&[])).unwrap(), Forwarded::Nothing);
        for verify in ["NONE", "FAILED:certificate has expired", "success", "SUCCESS ok", ""] {
            let said = headers(&[("x-ssl-client-verify", verify), ("x-ssl-client-cert", "anything")]);
            assert_eq!(forwarded(&said).unwrap(), Forwarded::NoCertificate, "{verify:?}");
        }
        let alone = headers(&[("x-ssl-client-cert", "anything")]);
        assert_eq!(forwarded(&alone).unwrap(), Forwarded::NoCertificate);
    }

    #[test]
    fn the_client_s_address_is_what_the_front_itself_has_added() {
        let told = |values: &[&str]| {
            let pairs: Vec<(&'static str, &str)> =
                values.iter().map(|value| ("x-forwarded-for", *value)).collect();
            client_address(&headers(&pairs)).map(|address| address.to_string())
        };
        assert_eq!(told(&[]), None);
        assert_eq!(told(&["192.0.2.7"]).as_deref(), Some("192.0.2.7"));
        assert_eq!(told(&["203.0.113.9, 192.0.2.7"]).as_deref(), Some("192.0.2.7"));
        assert_eq!(told(&["203.0.113.9", "2001:db8::7"]).as_deref(), Some("2001:db8::7"));
        assert_eq!(told(&["::ffff:192.0.2.7"]).as_deref(), Some("192.0.2.7"));
        assert_eq!(told(&["192.0.2.7, unknown"]), None);
    }

    #[test]
    fn a_verified_certificate_that_cannot_be_read_is_refused() {
        assert!(forwarded(&headers(&[("x-ssl-client-verify", "SUCCESS")])).is_err());
        for certificate in
            ["", "abc", "%ZZ", "-----BEGIN%20CERTIFICATE-----%0AAAAA%0A-----END%20CERTIFICATE-----"]
        {
            let said = headers(&[("x-ssl-client-verify", "SUCCESS"), ("x-ssl-client-cert", certificate)]);
            assert!(forwarded(&said).is_err(), "{certificate:?}");
        }
    }

    #[test]
    fn a_header_that_comes_twice_is_refused_even_with_the_same_value() {
        for name in ["x-ssl-client-verify", "x-ssl-client-cert"] {
            assert!(forwarded(&headers(&[(name, "NONE"), (name, "NONE")])).is_err(), "{name}");
        }
    }
}
