//! Keys that sign what the tests verify.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::LazyLock;

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
        RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaPssSaltLength, RsaSignatureEncoding,
    },
};
use serde_json::{Value, json};

use super::{
    jwk::PublicJwk,
    jws::{assemble, signing_input},
};

/// RSA keys are slow to make, so the tests share one.
pub static RSA: LazyLock<TestKey> =
    LazyLock::new(|| TestKey::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()));

pub static EC: LazyLock<TestKey> = LazyLock::new(TestKey::ec);

pub enum TestKey {
    Ec(Vec<u8>, EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl TestKey {
    pub fn ec() -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self::Ec(key.to_pkcs8v1().unwrap().as_ref().to_vec(), key)
    }

    pub fn public(&self) -> PublicJwk {
        PublicJwk::from_spki_der(&self.spki_der()).unwrap()
    }

    pub fn spki_der(&self) -> Vec<u8> {
        let der: PublicKeyX509Der<'_> = match self {
            Self::Ec(_, key) => key.public_key().as_der().unwrap(),
            Self::Rsa(key) => key.public_key().as_der().unwrap(),
        };
        der.as_ref().to_vec()
    }

    fn sign_rsa(key: &RsaKeyPair, encoding: &'static RsaSignatureEncoding, message: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(encoding, &SystemRandom::new(), message, &mut signature).unwrap();
        signature
    }

    /// As the SDK proves possession: ECDSA in DER, or PSS with the longest salt.
    pub fn prove_possession(&self, message: &[u8]) -> Vec<u8> {
        static LONGEST_SALT: RsaSignatureEncoding =
            RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);
        match self {
            Self::Ec(pkcs8, _) => EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8)
                .unwrap()
                .sign(&SystemRandom::new(), message)
                .unwrap()
                .as_ref()
                .to_vec(),
            Self::Rsa(key) => Self::sign_rsa(key, &LONGEST_SALT, message),
        }
    }

    /// A compact JWS signed as the header's `alg` says, and with the key's usual algorithm if it says
    /// something else.
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        self.sign_input(&signing_input(header, claims), header["alg"] == "PS256")
    }

    pub fn sign_input(&self, input: &str, pss: bool) -> String {
        let signature = match self {
            Self::Ec(_, key) => key.sign(&SystemRandom::new(), input.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Rsa(key) if pss => Self::sign_rsa(key, &RSA_PSS_SHA256, input.as_bytes()),
            Self::Rsa(key) => Self::sign_rsa(key, &RSA_PKCS1_SHA256, input.as_bytes()),
        };
        assemble(input, &signature)
    }
}

/// `value` with the members of `changes`; a member changed to `"<absent>"` is taken out.
pub fn with(value: &Value, changes: &Value) -> Value {
    let mut value = value.clone();
    for (name, change) in changes.as_object().unwrap() {
        if *change == json!("<absent>") {
            value.as_object_mut().unwrap().remove(name);
        } else {
            value[name] = change.clone();
        }
    }
    value
}
