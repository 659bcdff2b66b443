//! Which addresses an upstream server may have: the guard against server-side request forgery.
//!
//! An endpoint is an administrator's word, but the address behind its name is not. So only addresses of the public
//! internet are connected to, unless the operator has listed the host; then private ones are too. What no upstream
//! server can have (link-local, where clouds serve credentials; multicast; unspecified) is refused even behind a
//! listed name, because a name may be pointed anywhere by whoever runs its zone. The check is made on the address
//! that is then connected to, so a second look-up cannot give another one (DNS rebinding).
//! Source: RFC 6890 and the IANA special-purpose address registries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How far a host may lie inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The public internet alone.
    Public,
    /// Private networks and this machine too: the operator has listed the host.
    Internal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Public,
    Internal,
    Never,
}

impl Reach {
    /// Whether a connection to `address` is allowed.
    #[must_use]
    pub fn admits(self, address: IpAddr) -> bool {
        let class = match address {
            IpAddr::V4(address) => class_v4(address),
            IpAddr::V6(address) => class_v6(address),
        };
        match class {
            Class::Public => true,
            Class::Internal => self == Self::Internal,
            Class::Never => false,
        }
    }
}

/// Addresses outside 169.254.0.0/16 at which clouds serve credentials: Azure, Oracle, Alibaba.
const METADATA_V4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(192, 0, 0, 192), Ipv4Addr::new(100, 100, 100, 200)];
/// The same, over IPv6: AWS.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

fn class_v4(address: Ipv4Addr) -> Class {
    let [a, b, c, _] = address.octets();
    if METADATA_V4.contains(&address) {
        return Class::Never;
    }
    match (a, b, c) {
        // This network, link-local, multicast, reserved and broadcast.
        (0, ..) | (169, 254, _) | (224.., ..) => Class::Never,
        // Loopback and RFC 1918.
        (127 | 10, ..) | (172, 16..=31, _) | (192, 168, _) => Class::Internal,
        // Carrier-grade NAT, protocol assignments, 6to4 relay, benchmarks, documentation.
        (100, 64..=127, _)
        | (192, 0, 0 | 2)
        | (192, 88, 99)
        | (198, 18..=19, _)
        | (198, 51, 100)
        | (203, 0, 113) => Class::Internal,
        _ => Class::Public,
    }
}

fn class_v6(address: Ipv6Addr) -> Class {
    let segments = address.segments();
    if address == METADATA_V6 {
        return Class::Never;
    }
    if address == Ipv6Addr::LOCALHOST {
        return Class::Internal;
    }
    // An IPv4 address in IPv6 clothes. Mapped ones reach the IPv4 address; nobody publishes them in the DNS, so
    // they are never public. NAT64 (RFC 6052) is how an IPv6-only network reaches the IPv4 internet.
    if let Some(mapped) = address.to_ipv4_mapped() {
        return match class_v4(mapped) {
            Class::Never => Class::Never,
            Class::Public | Class::Internal => Class::Internal,
        };
    }
    let low = Ipv4Addr::from((u32::from(segments[6]) << 16) | u32::from(segments[7]));
    match segments {
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => class_v4(low),
        // Unique local.
        [0xfc00..=0xfdff, ..] => Class::Internal,
        // Teredo and other protocol assignments, documentation, 6to4: they carry or hide other addresses.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x2002, ..] | [0x3fff, 0..=0xfff, ..] => {
            Class::Never
        }
        // Global unicast. What lies outside is link-local, site-local, multicast, unspecified or unassigned.
        [0x2000..=0x3fff, ..] => Class::Public,
        _ => Class::Never,
    }
}

/// Hosts that the operator has listed as internal, each for every port or for one.
#[derive(Debug, Clone, Default)]
pub struct Allowlist(Vec<(String, Option<u16>)>);

impl Allowlist {
    /// Reads entries `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
    #[must_use]
    pub fn new(entries: &[String]) -> Self {
        let entries = entries.iter().map(|entry| entry.trim()).filter(|entry| !entry.is_empty());
        Self(entries.map(Self::entry).collect())
    }

    fn entry(entry: &str) -> (String, Option<u16>) {
        if entry.parse::<Ipv6Addr>().is_ok() {
            return (normal_host(entry), None);
        }
        match entry.rsplit_once(':') {
            Some((host, port)) => match port.parse() {
                Ok(port) => (normal_host(host), Some(port)),
                Err(_) => (normal_host(entry), None),
            },
            None => (normal_host(entry), None),
        }
    }

    /// Whether `host` (as [`normal_host`] writes it) is listed for `port`.
    #[must_use]
    pub fn lists(&self, host: &str, port: u16) -> bool {
        self.0.iter().any(|(listed, only)| listed == host && only.is_none_or(|only| only == port))
    }
}

/// A host as it is compared: lower case, without brackets and without the final dot of the DNS root.
#[must_use]
pub fn normal_host(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

/// Whether `host` is one of `domains`: a name itself, or `*.name` for exactly one label more.
#[must_use]
pub fn in_domains(host: &str, domains: &[String]) -> bool {
    domains.iter().any(|domain| match domain.strip_prefix("*.") {
        Some(parent) => {
            host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == normal_host(parent))
        }
        None => host == normal_host(domain),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn each_special_address_has_its_class() {
        for (text, public, internal) in [
            ("1.1.1.1", true, true),
            ("172.15.255.255", true, true),
            ("172.32.0.0", true, true),
            ("100.63.255.255", true, true),
            ("100.128.0.0", true, true),
            ("2606:4700::1111", true, true),
            ("64:ff9b::101:101", true, true),
            ("127.0.0.1", false, true),
            ("127.255.255.254", false, true),
            ("10.0.0.1", false, true),
            ("172.16.0.0", false, true),
            ("172.31.255.255", false, true),
            ("192.168.1.1", false, true),
            ("100.64.0.1", false, true),
            ("100.127.255.255", false, true),
            ("198.18.0.1", false, true),
            ("203.0.113.9", false, true),
            ("::1", false, true),
            ("fd12::1", false, true),
            ("::ffff:1.1.1.1", false, true),
            ("::ffff:127.0.0.1", false, true),
            ("64:ff9b::a00:1", false, true),
            ("0.0.0.0", false, false),
            ("0.1.2.3", false, false),
            ("169.254.169.254", false, false),
            ("168.63.129.16", false, false),
            ("100.100.100.200", false, false),
            ("192.0.0.192", false, false),
            ("224.0.0.1", false, false),
            ("240.0.0.1", false, false),
            ("255.255.255.255", false, false),
            ("::", false, false),
            ("::ffff:169.254.169.254", false, false),
            ("64:ff9b::a9fe:a9fe", false, false),
            ("::7f00:1", false, false),
            ("fe80::1", false, false),
            ("fec0::1", false, false),
            ("ff02::1", false, false),
            ("fd00:ec2::254", false, false),
            ("2002:7f00:1::", false, false),
            ("2001:0:53aa::1", false, false),
            ("2001:db8::1", false, false),
        ] {
            let address: IpAddr = text.parse().expect("the test's address");
            assert_eq!(Reach::Public.admits(address), public, "{text} from outside");
            assert_eq!(Reach::Internal.admits(address), internal, "{text} inside");
        }
    }

    #[test]
    fn a_listed_port_lists_no_other() {
        let entries = ["tools.corp:8080", "Erp.Corp.", "127.0.0.1:9", "::1", "[fd00::1]:80"];
        let allowlist = Allowlist::new(&entries.map(str::to_owned));
        for (host, port, listed) in [
            ("tools.corp", 8080, true),
            ("tools.corp", 8081, false),
            ("erp.corp", 1, true),
            ("x.erp.corp", 1, false),
            ("127.0.0.1", 9, true),
            ("127.0.0.1", 10, false),
            ("::1", 5, true),
            ("fd00::1", 80, true),
            ("fd00::1", 81, false),
        ] {
            assert_eq!(allowlist.lists(host, port), listed, "{host}:{port}");
        }
    }

    #[test]
    fn a_wildcard_domain_stands_for_one_label() {
        let domains = ["*.tools.example".to_owned(), "Mcp.Example".to_owned()];
        for (host, expected) in [
            ("a.tools.example", true),
            ("a.b.tools.example", false),
            ("tools.example", false),
            (".tools.example", false),
            ("atools.example", false),
            ("mcp.example", true),
            ("x.mcp.example", false),
        ] {
            assert_eq!(in_domains(host, &domains), expected, "{host}");
        }
    }
}
