//! The subject's key is P-256, or RSA from 2048 to 8192 bits (RFC 5480 §4, NIST SP 800-57 part 1 table 2).
//!
//! The upper bound is that of the verifiers: a longer key could be certified and never used.

use super::Judged;
use crate::x509::KeyAlgorithm;

pub(super) fn judge(judged: &Judged<'_>) -> Option<String> {
    match judged.certificate.key_algorithm() {
        KeyAlgorithm::P256 => None,
        KeyAlgorithm::Rsa { bits } => (!(2048..=8192).contains(&bits))
            .then(|| format!("rsa key has {bits} bits, expected 2048 to 8192")),
        KeyAlgorithm::Other => Some("key is neither p-256 nor rsa".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Role, fixture::Fixture};
    use crate::x509::tlv::{BIT_STRING, INTEGER, SEQUENCE, tlv};

    fn rsa(bits: usize) -> Vec<u8> {
        let modulus = [vec![0x00, 0x80], vec![1; bits / 8 - 1]].concat();
        let key = tlv(SEQUENCE, &[&tlv(INTEGER, &[&modulus]), &tlv(INTEGER, &[&[1, 0, 1]])]);
        let algorithm =
            [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
        tlv(SEQUENCE, &[&algorithm, &tlv(BIT_STRING, &[&[0], &key])])
    }

    #[test]
    fn short_rsa_keys_and_unknown_keys_are_found() {
        for (spki, passes) in [(rsa(1024), false), (rsa(2040), false), (rsa(2048), true), (rsa(4096), true)] {
            let fixture = Fixture { spki, ..Fixture::agent() };
            assert_eq!(fixture.full(Role::Agent).is_empty(), passes);
        }
        let ed25519 =
            [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00][..], &[9; 32]];
        let fixture = Fixture { spki: ed25519.concat(), ..Fixture::agent() };
        assert_eq!(fixture.full(Role::Agent), ["key_size"]);
        assert_eq!(fixture.resign(), [""; 0]);
    }
}
