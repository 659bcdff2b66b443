//! An agent has exactly one SAN URI, of the scheme `spiffe` (SPIFFE X509-SVID §2); a server has a DNS name or
//! an address; an empty subject needs a critical SAN (RFC 5280 §4.2.1.6).

use super::{Judged, Role, Rules};
use crate::x509::extension::SUBJECT_ALTERNATIVE_NAME;

/// An RDNSequence without elements.
const EMPTY: [u8; 2] = [0x30, 0x00];

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let certificate = judged.certificate;
    let critical = certificate
        .extensions()
        .iter()
        .any(|extension| extension.oid() == SUBJECT_ALTERNATIVE_NAME && extension.critical());
    if certificate.subject_der() == EMPTY && !critical {
        return Some("subject is empty and no critical subjectAltName stands in for it".to_owned());
    }
    match judged.rules {
        Rules::Full(Role::Agent) => match certificate.uri_sans() {
            [uri] if uri.starts_with("spiffe://") => None,
            [_] => Some("the uri is not a spiffe id".to_owned()),
            uris => Some(format!("found {} uris, expected exactly one spiffe id", uris.len())),
        },
        Rules::Full(Role::Server) => (certificate.dns_sans().is_empty() && certificate.ip_sans().is_empty())
            .then(|| "a server has neither dns name nor address".to_owned()),
        Rules::Full(Role::CertificateAuthority) | Rules::Resign | Rules::Complete => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::super::{Role, fixture::Fixture};
    use super::EMPTY;
    use crate::x509::extension::{server_alternative_names, uri_alternative_name};

    #[test]
    fn an_agent_without_exactly_one_spiffe_uri_is_found() {
        let mut fixture = Fixture::agent();
        fixture.extensions[3] = uri_alternative_name("https://acme.example/bot").unwrap();
        assert_eq!(fixture.full(Role::Agent), ["subject_alternative_name"]);
        fixture.extensions.remove(3);
        assert_eq!(fixture.full(Role::Agent), ["subject_alternative_name"]);
        assert_eq!(fixture.resign(), [""; 0]);
    }

    #[test]
    fn a_server_without_any_name_is_found() {
        let mut fixture = Fixture::agent();
        assert_eq!(fixture.full(Role::Server), ["subject_alternative_name"]);
        fixture.extensions[3] = server_alternative_names(&["mastio.example".to_owned()], &[]).unwrap();
        assert_eq!(fixture.full(Role::Server), [""; 0]);
    }

    #[test]
    fn an_empty_subject_without_a_critical_alternative_name_is_found() {
        let fixture = Fixture { subject: EMPTY.to_vec(), ..Fixture::agent() };
        assert_eq!(fixture.full(Role::Agent), ["subject_alternative_name"]);
    }
}
