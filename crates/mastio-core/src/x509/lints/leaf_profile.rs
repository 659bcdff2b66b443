//! An agent's leaf has basicConstraints, keyUsage, extKeyUsage, SKI and AKI: strict verifiers ask for each
//! (Python's `VERIFY_X509_STRICT`, `openssl verify -x509_strict`), and the predecessor wrote none of the first four.

use super::Judged;
use crate::x509::extension::{
    AUTHORITY_KEY_IDENTIFIER, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, KEY_USAGE, SUBJECT_KEY_IDENTIFIER,
};
use crate::x509::{Certificate, ObjectIdentifier};

/// What the profile asks for, in its order, by the names of RFC 5280.
const PROFILE: [(ObjectIdentifier, &str); 5] = [
    (BASIC_CONSTRAINTS, "basicConstraints"),
    (KEY_USAGE, "keyUsage"),
    (EXTENDED_KEY_USAGE, "extKeyUsage"),
    (SUBJECT_KEY_IDENTIFIER, "subjectKeyIdentifier"),
    (AUTHORITY_KEY_IDENTIFIER, "authorityKeyIdentifier"),
];

/// The extensions of the agent profile that a leaf lacks, in the profile's order; empty where it has them all.
///
/// Not here: whether those that it has say the right thing; what is an owner's own is not judged.
#[must_use]
pub fn leaf_gaps(leaf: &Certificate) -> Vec<&'static str> {
    let has = |oid| leaf.extensions().iter().any(|extension| extension.oid() == oid);
    PROFILE.iter().filter(|(oid, _)| !has(*oid)).map(|(_, name)| *name).collect()
}

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let gaps = leaf_gaps(judged.certificate);
    (!gaps.is_empty()).then(|| format!("missing: {}", gaps.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::leaf_gaps;

    #[test]
    fn each_missing_extension_is_named_and_found() {
        assert_eq!(leaf_gaps(&Fixture::agent().certificate()), [""; 0]);
        assert_eq!(Fixture::agent().complete(), [""; 0]);
        // The fourth is the SAN, which no leaf has to have.
        let names = ["basicConstraints", "keyUsage", "extKeyUsage", "", "subjectKeyIdentifier"];
        for (index, name) in names.into_iter().enumerate() {
            let mut fixture = Fixture::agent();
            fixture.extensions.remove(index);
            let found: &[&str] = if name.is_empty() { &[] } else { &["leaf_profile"] };
            assert_eq!(fixture.complete(), found, "{index}");
            let gaps: Vec<&str> = Some(name).into_iter().filter(|name| !name.is_empty()).collect();
            assert_eq!(leaf_gaps(&fixture.certificate()), gaps);
        }
        let mut fixture = Fixture::agent();
        fixture.extensions.pop();
        assert_eq!(fixture.complete(), ["authority_key_identifier", "leaf_profile"]);
        assert_eq!(leaf_gaps(&fixture.certificate()), ["authorityKeyIdentifier"]);
    }
}
