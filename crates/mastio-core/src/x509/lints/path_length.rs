//! pathLen stands only where cA is set, and no CA is issued where the issuer's pathLen leaves no room for it
//! (RFC 5280 §4.2.1.9). The latter is the defect that the Org CA update repairs.

use super::Judged;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let constraints = judged.certificate.basic_constraints()?;
    if !constraints.ca {
        return constraints.path_len.map(|length| format!("pathLen {length} without the ca bit"));
    }
    if judged.self_signed() {
        return None;
    }
    match judged.issuer.basic_constraints().and_then(|issuer| issuer.path_len) {
        Some(0) => Some("the issuer's pathLen is 0, so no ca may stand below it".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture, full_findings};
    use crate::x509::BasicConstraints;
    use crate::x509::extension::basic_constraints;

    #[test]
    fn a_path_length_on_a_leaf_is_found() {
        let mut fixture = Fixture::agent();
        fixture.extensions[0] = basic_constraints(BasicConstraints { ca: false, path_len: Some(0) });
        assert_eq!(fixture.full(Role::Agent), ["path_length"]);
    }

    #[test]
    fn a_ca_below_path_length_zero_is_found_and_a_leaf_is_not() {
        let mut root = Fixture::root();
        root.extensions[0] = basic_constraints(BasicConstraints { ca: true, path_len: Some(0) });
        let root = root.certificate();
        let findings = full_findings(&Fixture::ca().certificate(), &root, Role::CertificateAuthority);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].lint, "path_length");
        assert_eq!(full_findings(&Fixture::agent().certificate(), &root, Role::Agent), []);
    }
}
