//! notBefore comes before notAfter, each as UTCTime through 2049 and as GeneralizedTime after
//! (RFC 5280 §4.1.2.5).
//!
//! A re-signed leaf keeps its owner's encoding, so there only the order is judged.

use super::Judged;
use crate::x509::tlv::time;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let certificate = judged.certificate;
    let (not_before, not_after) = (certificate.not_before(), certificate.not_after());
    if not_before > not_after {
        return Some(format!(
            "notBefore {} is after notAfter {}",
            not_before.to_rfc3339(),
            not_after.to_rfc3339()
        ));
    }
    if judged.rules.copied() {
        return None;
    }
    [(not_before, certificate.not_before_der()), (not_after, certificate.not_after_der())]
        .into_iter()
        .find(|(instant, der)| time(*instant).as_deref() != Ok(*der))
        .map(|(instant, _)| format!("{} has the other time type's encoding", instant.to_rfc3339()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::super::{Role, fixture::Fixture};
    use super::time;
    use crate::time::UnixTime;
    use crate::x509::tlv::{GENERALIZED_TIME, tlv};

    #[test]
    fn a_reversed_validity_is_found_under_both_rule_sets() {
        let instant = |seconds| time(UnixTime(seconds)).unwrap();
        for (not_after, passes) in [(99, false), (100, true), (101, true)] {
            let fixture = Fixture { validity: [instant(100), instant(not_after)], ..Fixture::agent() };
            assert_eq!(fixture.full(Role::Agent).is_empty(), passes, "{not_after}");
            assert_eq!(fixture.resign().is_empty(), passes, "{not_after}");
        }
    }

    #[test]
    fn generalized_time_before_2050_is_found_unless_it_was_copied() {
        let early = tlv(GENERALIZED_TIME, &[b"20300101000000Z"]);
        let fixture = Fixture { validity: [time(UnixTime(100)).unwrap(), early], ..Fixture::agent() };
        assert_eq!(fixture.full(Role::Agent), ["validity"]);
        assert_eq!(fixture.resign(), [""; 0]);
        let late = tlv(GENERALIZED_TIME, &[b"20500101000000Z"]);
        let fixture = Fixture { validity: [time(UnixTime(100)).unwrap(), late], ..Fixture::agent() };
        assert_eq!(fixture.full(Role::Agent), [""; 0]);
    }
}
