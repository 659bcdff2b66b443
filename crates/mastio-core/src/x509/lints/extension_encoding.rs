//! Every extension that is understood here can be read (RFC 5280 §4.2.1).

use super::Judged;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    judged.certificate.malformed_extensions().first().map(|oid| format!("extension {oid} cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};

    #[test]
    fn an_extension_that_cannot_be_read_is_found_unless_it_was_copied() {
        let mut fixture = Fixture::agent();
        // SEQUENCE { OID extKeyUsage, OCTET STRING { NULL } }
        fixture.extensions[2] = vec![0x30, 0x09, 0x06, 0x03, 0x55, 0x1d, 0x25, 0x04, 0x02, 0x05, 0x00];
        assert_eq!(fixture.full(Role::Agent), ["extension_encoding"]);
        assert_eq!(fixture.resign(), [""; 0]);
    }
}
