//! The serial number is positive and at most 20 octets long (RFC 5280 §4.1.2.2).

use super::Judged;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let serial = judged.certificate.serial();
    if serial.len() > 20 {
        return Some(format!("serial has {} octets, expected at most 20", serial.len()));
    }
    if serial.first().is_some_and(|first| *first >= 0x80) {
        return Some("serial is negative".to_owned());
    }
    serial.iter().all(|octet| *octet == 0).then(|| "serial is zero".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};

    #[test]
    fn only_positive_serials_of_at_most_twenty_octets_pass() {
        for (serial, passes) in [
            (vec![1], true),
            (vec![0x7f; 20], true),
            (vec![0x7f; 21], false),
            (vec![0x80], false),
            (vec![0], false),
        ] {
            let fixture = Fixture { serial, ..Fixture::agent() };
            assert_eq!(fixture.full(Role::Agent).is_empty(), passes, "{:?}", fixture.serial);
            assert_eq!(fixture.resign().is_empty(), passes, "{:?}", fixture.serial);
        }
    }
}
