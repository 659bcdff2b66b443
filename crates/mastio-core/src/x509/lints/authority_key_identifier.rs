//! The AKI is there, is not critical, and names the issuer's key; a self-signed certificate may leave it out
//! (RFC 5280 §4.2.1.1).

use super::Judged;
use crate::x509::extension::AUTHORITY_KEY_IDENTIFIER;
use crate::x509::hex;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let certificate = judged.certificate;
    let extension =
        certificate.extensions().iter().find(|extension| extension.oid() == AUTHORITY_KEY_IDENTIFIER);
    if extension.is_none() && judged.self_signed() {
        return None;
    }
    if extension.is_some_and(|extension| extension.critical()) {
        return Some("authorityKeyIdentifier is critical".to_owned());
    }
    let expected = judged.issuer.key_id();
    match certificate.authority_key_id() {
        None => Some("authorityKeyIdentifier is missing".to_owned()),
        Some(found) if found == expected => None,
        Some(found) => Some(format!(
            "authorityKeyIdentifier is {}, expected the issuer's {}",
            hex(found),
            hex(&expected)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture, full_findings};
    use crate::x509::extension::authority_key_identifier;

    #[test]
    fn a_missing_or_foreign_authority_key_identifier_is_found() {
        let mut fixture = Fixture::agent();
        fixture.extensions[5] = authority_key_identifier(b"another key");
        assert_eq!(fixture.full(Role::Agent), ["authority_key_identifier"]);
        assert_eq!(fixture.resign(), ["authority_key_identifier"]);
        fixture.extensions.pop();
        assert_eq!(fixture.full(Role::Agent), ["authority_key_identifier"]);
        assert_eq!(fixture.resign(), ["authority_key_identifier"]);
    }

    #[test]
    fn a_self_signed_certificate_may_leave_it_out() {
        let mut fixture = Fixture::root();
        fixture.extensions.pop();
        let root = fixture.certificate();
        assert_eq!(full_findings(&root, &root, Role::CertificateAuthority), []);
    }
}
