//! A leaf cannot sign certificates: no cA bit (RFC 5280 §4.2.1.9) and no keyCertSign (§4.2.1.3).
//!
//! Where the fields are an owner's, only the cA bit counts: keyUsage is the owner's, and without cA it opens nothing.

use super::{Judged, Role, Rules};
use crate::x509::extension::BASIC_CONSTRAINTS;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    if judged.rules == Rules::Full(Role::CertificateAuthority) {
        return None;
    }
    let certificate = judged.certificate;
    // What we cannot read, another verifier may read as a CA.
    if certificate.malformed_extensions().contains(&BASIC_CONSTRAINTS) {
        return Some("basicConstraints cannot be read".to_owned());
    }
    if certificate.basic_constraints().is_some_and(|constraints| constraints.ca) {
        return Some("a leaf says that it is a ca".to_owned());
    }
    let signs = certificate.key_usage().is_some_and(|usage| usage.key_cert_sign());
    (signs && !judged.rules.copied()).then(|| "a leaf has keyCertSign".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};
    use crate::x509::extension::{basic_constraints, key_usage};
    use crate::x509::{BasicConstraints, KeyUsage};

    #[test]
    fn a_leaf_with_the_ca_bit_is_found_under_both_rule_sets() {
        let mut fixture = Fixture::agent();
        fixture.extensions[0] = basic_constraints(BasicConstraints { ca: true, path_len: None });
        assert_eq!(fixture.full(Role::Agent), ["end_entity"]);
        assert_eq!(fixture.resign(), ["end_entity"]);
    }

    #[test]
    fn a_leaf_with_key_cert_sign_alone_is_found_unless_it_was_copied() {
        let mut fixture = Fixture::agent();
        fixture.extensions[1] = key_usage(KeyUsage::CERTIFICATE_AND_CRL_SIGN);
        assert_eq!(fixture.full(Role::Agent), ["end_entity"]);
        assert_eq!(fixture.resign(), [""; 0]);
    }
}
