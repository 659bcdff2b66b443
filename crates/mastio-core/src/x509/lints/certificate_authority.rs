//! A CA says so in critical extensions: basicConstraints with cA (RFC 5280 §4.2.1.9), keyUsage with
//! keyCertSign (§4.2.1.3), and an SKI that is not critical (§4.2.1.2).

use super::{Judged, Role, Rules};
use crate::x509::ObjectIdentifier;
use crate::x509::extension::{BASIC_CONSTRAINTS, KEY_USAGE, SUBJECT_KEY_IDENTIFIER};

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    if judged.rules != Rules::Full(Role::CertificateAuthority) {
        return None;
    }
    let certificate = judged.certificate;
    let critical = |oid: ObjectIdentifier| {
        certificate.extensions().iter().any(|extension| extension.oid() == oid && extension.critical())
    };
    let finding = if !certificate.basic_constraints().is_some_and(|constraints| constraints.ca) {
        "basicConstraints does not say ca"
    } else if !critical(BASIC_CONSTRAINTS) {
        "basicConstraints is not critical"
    } else if !certificate.key_usage().is_some_and(|usage| usage.key_cert_sign()) {
        "keyUsage lacks keyCertSign"
    } else if !critical(KEY_USAGE) {
        "keyUsage is not critical"
    } else if certificate.subject_key_id().is_none() {
        "subjectKeyIdentifier is missing"
    } else if critical(SUBJECT_KEY_IDENTIFIER) {
        "subjectKeyIdentifier is critical"
    } else {
        return None;
    };
    Some(finding.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};

    #[test]
    fn a_ca_without_one_of_its_extensions_is_found() {
        assert_eq!(Fixture::ca().full(Role::CertificateAuthority), [""; 0]);
        for missing in 0..3 {
            let mut fixture = Fixture::ca();
            fixture.extensions.remove(missing);
            assert_eq!(fixture.full(Role::CertificateAuthority), ["certificate_authority"], "{missing}");
        }
    }

    #[test]
    fn basic_constraints_that_are_not_critical_are_found() {
        let mut fixture = Fixture::ca();
        // SEQUENCE { OID basicConstraints, OCTET STRING { SEQUENCE { TRUE, 0 } } }
        let plain = [0x30, 0x0f, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x04, 0x08, 0x30, 0x06, 0x01, 0x01, 0xff];
        fixture.extensions[0] = [&plain[..], &[0x02, 0x01, 0x00]].concat();
        assert_eq!(fixture.full(Role::CertificateAuthority), ["certificate_authority"]);
    }
}
