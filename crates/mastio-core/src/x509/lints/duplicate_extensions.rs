//! No extension occurs twice (RFC 5280 §4.2): verifiers disagree about which one counts.

use super::Judged;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    judged.certificate.duplicated_extension().map(|oid| format!("extension {oid} occurs more than once"))
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};

    #[test]
    fn an_extension_that_occurs_twice_is_found_under_both_rule_sets() {
        let mut fixture = Fixture::agent();
        fixture.extensions.push(fixture.extensions[3].clone());
        assert_eq!(fixture.full(Role::Agent), ["duplicate_extensions"]);
        assert_eq!(fixture.resign(), ["duplicate_extensions"]);
        fixture.extensions.pop();
        assert_eq!(fixture.resign(), [""; 0]);
    }
}
