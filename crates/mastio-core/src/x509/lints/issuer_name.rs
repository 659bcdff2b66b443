//! The issuer name is not empty and is the issuer's subject, byte for byte (RFC 5280 §4.1.2.4, §6.1.3).

use super::Judged;

/// An RDNSequence without elements.
const EMPTY: [u8; 2] = [0x30, 0x00];

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    let name = judged.certificate.issuer_name_der();
    if name == EMPTY {
        return Some("issuer name is empty".to_owned());
    }
    (name != judged.issuer.subject_der()).then(|| {
        format!(
            "issuer name is {}, expected {}",
            judged.certificate.issuer_display(),
            judged.issuer.subject_display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture};

    #[test]
    fn an_empty_or_foreign_issuer_name_is_found() {
        for issuer_name in [super::EMPTY.to_vec(), fixture::name("somebody else")] {
            let fixture = fixture::Fixture { issuer_name, ..fixture::Fixture::agent() };
            assert_eq!(fixture.full(Role::Agent), ["issuer_name"]);
            assert_eq!(fixture.resign(), ["issuer_name"]);
        }
        assert_eq!(fixture::Fixture::agent().resign(), [""; 0]);
    }
}
