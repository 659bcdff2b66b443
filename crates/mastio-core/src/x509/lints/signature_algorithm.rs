//! Both algorithm fields agree, are one that we sign with, and fit the issuer's key (RFC 5280 §4.1.1.2).

use super::Judged;
use crate::x509::SignatureAlgorithm;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let inner = judged.certificate.signed_algorithm_der();
    if inner != judged.certificate.signature_algorithm_der() {
        return Some("the signed algorithm field differs from the one beside the signature".to_owned());
    }
    let Some(expected) = SignatureAlgorithm::for_key(judged.issuer.key_algorithm()) else {
        return Some("the issuer's key is neither p-256 nor rsa".to_owned());
    };
    (inner != expected.identifier_der())
        .then(|| format!("the algorithm is not {expected:?}, which the issuer's key asks for"))
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};
    use crate::x509::SignatureAlgorithm;

    #[test]
    fn algorithm_fields_that_differ_or_do_not_fit_the_key_are_found() {
        let rsa = SignatureAlgorithm::RsaPkcs1Sha256.identifier_der();
        let differs = Fixture { outer_algorithm: rsa.clone(), ..Fixture::agent() };
        assert_eq!(differs.full(Role::Agent), ["signature_algorithm"]);
        let unfit = Fixture { inner_algorithm: rsa.clone(), outer_algorithm: rsa, ..Fixture::agent() };
        assert_eq!(unfit.full(Role::Agent), ["signature_algorithm"]);
        assert_eq!(unfit.resign(), ["signature_algorithm"]);
        assert_eq!(Fixture::agent().full(Role::Agent), [""; 0]);
    }
}
