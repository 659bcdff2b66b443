//! The only home of private keys (invariant I7).
//!
//! In the database a key is *sealed*: AES-256-GCM-SIV under the deploy's sealing key, bound to the place where it
//! lies (`table/row/column`), so that a sealed key copied to another row does not open. In clear it exists only
//! inside this module, and where a protocol needs it, named one by one: [`PrivateKey::generate_p256`] hands a managed
//! agent its key once, [`tls_key`] feeds the TLS library. Signing demands a permit of the halt gate and,
//! for a certificate, a to-be-signed part that the lints have passed.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
    RSA_PKCS1_SHA256,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mastio_core::x509::{Certificate, SignatureAlgorithm, crl::CrlTbs, lints::LintedTbs, p256_spki_der};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::entropy::Entropy;
use crate::updates::halt::Permit;

/// What every sealed value begins with; anything else is a predecessor's clear text.
pub const SEALED_PREFIX: &str = "enc:v1:";
/// argon2id: 19 MiB, two passes, one lane (OWASP's floor). Once a boot.
const ARGON2: (u32, u32, u32) = (19 * 1024, 2, 1);

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The sealed text was changed, moved, or sealed under another key.
    #[error("the sealed value at {place} does not open: it was changed, moved, or sealed under another key")]
    Sealed {
        /// `table/row/column`.
        place: String,
    },
    /// The text is not a PKCS#8 key of a kind that we use.
    #[error("the private key at {place} is not a PKCS#8 P-256 or RSA key")]
    Unreadable {
        /// `table/row/column`, or what the key is for.
        place: String,
    },
    /// The crypto library refused.
    #[error("the crypto library refused to {0}")]
    Library(&'static str),
    /// A signed certificate does not parse.
    #[error("a certificate that was just signed does not parse")]
    Certificate(#[from] mastio_core::x509::X509Error),
    /// The file that holds the sealing key cannot be read or made.
    #[error("the sealing key file {path} cannot be used")]
    File {
        /// Where it lies.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file that holds the sealing key has another length than 32 bytes in base64.
    #[error("the sealing key file {path} does not hold a sealing key: restore it from the backup")]
    FileContent {
        /// Where it lies.
        path: String,
    },
}

/// The key under which every other key is sealed. Never shown, never copied.
pub struct SealingKey(RandomizedNonceKey);

impl SealingKey {
    fn from_bytes(bytes: &[u8; 32]) -> Result<Self, KeyError> {
        RandomizedNonceKey::new(&AES_256_GCM_SIV, bytes)
            .map(Self)
            .map_err(|_| KeyError::Library("make a sealing key"))
    }

    /// Derives the sealing key from an operator's passphrase with argon2id.
    pub fn from_passphrase(passphrase: &str, salt: &[u8]) -> Result<Self, KeyError> {
        let (memory_kib, passes, lanes) = ARGON2;
        let parameters = argon2::Params::new(memory_kib, passes, lanes, Some(32))
            .map_err(|_| KeyError::Library("set up argon2id"))?;
        let mut bytes = Zeroizing::new([0u8; 32]);
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, parameters)
            .hash_password_into(passphrase.as_bytes(), salt, bytes.as_mut())
            .map_err(|_| KeyError::Library("derive a key by argon2id"))?;
        Self::from_bytes(&bytes)
    }

    /// Reads the sealing key from a file that only its owner may read.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let text =
            std::fs::read_to_string(path).map(Zeroizing::new).map_err(|source| Self::file(path, source))?;
        let decoded = STANDARD.decode(text.trim()).map(Zeroizing::new).ok();
        let bytes = decoded.as_ref().and_then(|bytes| <&[u8; 32]>::try_from(bytes.as_slice()).ok());
        Self::from_bytes(bytes.ok_or_else(|| KeyError::FileContent { path: path.display().to_string() })?)
    }

    /// Makes a new sealing key file, mode 0600, durable before anything is sealed under it.
    pub fn create_file(path: &Path, entropy: &Entropy) -> Result<Self, KeyError> {
        let bytes = Zeroizing::new(entropy.bytes::<32>());
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(Zeroizing::new(STANDARD.encode(*bytes)).as_bytes())?;
            file.sync_all()?;
            path.parent().map_or(Ok(()), |folder| std::fs::File::open(folder)?.sync_all())
        };
        write().map_err(|source| Self::file(path, source))?;
        Self::from_bytes(&bytes)
    }

    fn file(path: &Path, source: std::io::Error) -> KeyError {
        KeyError::File { path: path.display().to_string(), source }
    }

    /// Seals `clear` for `place` (`table/row/column`).
    pub fn seal(&self, place: &str, clear: &[u8]) -> Result<String, KeyError> {
        let mut buffer = Zeroizing::new(clear.to_vec());
        let nonce = self
            .0
            .seal_in_place_append_tag(Aad::from(place.as_bytes()), &mut *buffer)
            .map_err(|_| KeyError::Library("seal"))?;
        let mut bytes = nonce.as_ref().to_vec();
        bytes.extend_from_slice(&buffer);
        Ok(format!("{SEALED_PREFIX}{}", STANDARD.encode(bytes)))
    }

    /// Opens what [`Self::seal`] made for the same place.
    pub fn open(&self, place: &str, sealed: &str) -> Result<Zeroizing<String>, KeyError> {
        let refused = || KeyError::Sealed { place: place.to_owned() };
        let encoded = sealed.strip_prefix(SEALED_PREFIX).ok_or_else(refused)?;
        let bytes = STANDARD.decode(encoded).map_err(|_| refused())?;
        let (nonce, ciphertext) = bytes.split_at_checked(NONCE_LEN).ok_or_else(refused)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| refused())?;
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let clear =
            self.0.open_in_place(nonce, Aad::from(place.as_bytes()), &mut buffer).map_err(|_| refused())?;
        String::from_utf8(clear.to_vec()).map(Zeroizing::new).map_err(|_| refused())
    }

    /// Seals a chunk of a file for `place`; the bytes begin with their nonce.
    pub fn seal_bytes(&self, place: &str, clear: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut buffer = Zeroizing::new(clear.to_vec());
        let nonce = self
            .0
            .seal_in_place_append_tag(Aad::from(place.as_bytes()), &mut *buffer)
            .map_err(|_| KeyError::Library("seal"))?;
        Ok([nonce.as_ref().as_slice(), buffer.as_slice()].concat())
    }

    /// Opens what [`Self::seal_bytes`] made for the same place.
    pub fn open_bytes(&self, place: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let refused = || KeyError::Sealed { place: place.to_owned() };
        let (nonce, ciphertext) = sealed.split_at_checked(NONCE_LEN).ok_or_else(refused)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| refused())?;
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let length = self
            .0
            .open_in_place(nonce, Aad::from(place.as_bytes()), &mut buffer)
            .map_err(|_| refused())?
            .len();
        buffer.truncate(length);
        Ok(buffer)
    }

    /// Opens a sealed private key.
    pub fn open_key(&self, place: &str, sealed: &str) -> Result<PrivateKey, KeyError> {
        PrivateKey::from_pem(place, &self.open(place, sealed)?)
    }

    /// Moves a sealed value to another place. The clear text does not leave this module.
    pub fn move_sealed(&self, from: &str, to: &str, sealed: &str) -> Result<String, KeyError> {
        self.seal(to, self.open(from, sealed)?.as_bytes())
    }

    /// Seals what this key opens under another one, for the same place. The clear text does not leave this module.
    pub fn reseal(&self, new: &Self, place: &str, sealed: &str) -> Result<String, KeyError> {
        new.seal(place, self.open(place, sealed)?.as_bytes())
    }

    /// Whether this is the same key: it opens what the other one seals.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        other.seal("the same key", b"").and_then(|sealed| self.open("the same key", &sealed)).is_ok()
    }

    /// Whether two sealed values hold the same clear text, each read from its own place.
    pub fn same_clear_text(&self, one: (&str, &str), other: (&str, &str)) -> Result<bool, KeyError> {
        let (one, other) = (self.open(one.0, one.1)?, self.open(other.0, other.1)?);
        Ok(subtle::ConstantTimeEq::ct_eq(one.as_bytes(), other.as_bytes()).into())
    }
}

/// A private key that can sign. Not cloneable, not printable.
pub struct PrivateKey {
    kind: KeyKind,
    spki_der: Vec<u8>,
}

enum KeyKind {
    /// The same key twice: certificates want an ASN.1 signature, a JWS wants `r ‖ s`.
    P256 {
        asn1: EcdsaKeyPair,
        fixed: EcdsaKeyPair,
    },
    Rsa(Box<RsaKeyPair>),
}

/// A new private key, in clear exactly once: sealed by the caller, or handed to the agent it is for.
pub struct NewKey {
    /// The key, ready to sign.
    pub key: PrivateKey,
    pem: Zeroizing<String>,
}

impl NewKey {
    /// Seals the key for the place where it is stored.
    pub fn seal(&self, sealing: &SealingKey, place: &str) -> Result<String, KeyError> {
        sealing.seal(place, self.pem.as_bytes())
    }

    /// A second handle to the key, to sign with while this one waits to be sealed.
    pub fn key_again(&self) -> Result<PrivateKey, KeyError> {
        PrivateKey::from_pem("a new key", &self.pem)
    }

    /// The key in clear, for the answer that hands a managed agent its key once.
    #[must_use]
    pub fn hand_over(self) -> Zeroizing<String> {
        self.pem
    }

    /// The key in the form that the TLS library wants, for a certificate that is not stored.
    pub fn tls_key(&self) -> Result<PrivateKeyDer<'static>, KeyError> {
        read_tls_key("the server key", &self.pem)
    }
}

impl PrivateKey {
    /// Reads a PKCS#8 PEM.
    pub fn from_pem(place: &str, pem: &str) -> Result<Self, KeyError> {
        let unreadable = || KeyError::Unreadable { place: place.to_owned() };
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| unreadable())?;
        Self::from_pkcs8(der.secret_pkcs8_der()).ok_or_else(unreadable)
    }

    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        if let Ok(asn1) = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der) {
            let fixed = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der).ok()?;
            let spki_der = p256_spki_der(asn1.public_key().as_ref()).ok()?;
            return Some(Self { kind: KeyKind::P256 { asn1, fixed }, spki_der });
        }
        let rsa = RsaKeyPair::from_pkcs8(der).ok()?;
        let spki: aws_lc_rs::encoding::PublicKeyX509Der<'_> = rsa.public_key().as_der().ok()?;
        let spki_der = spki.as_ref().to_vec();
        Some(Self { kind: KeyKind::Rsa(Box::new(rsa)), spki_der })
    }

    /// A new P-256 key.
    pub fn generate_p256() -> Result<NewKey, KeyError> {
        let refused = || KeyError::Library("generate a P-256 key");
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| refused())?;
        Self::new_key(document.as_ref()).ok_or_else(refused)
    }

    /// A new RSA-4096 key. Takes from a quarter of a second to several: never on the executor's threads.
    pub fn generate_rsa4096() -> Result<NewKey, KeyError> {
        let refused = || KeyError::Library("generate an RSA-4096 key");
        let pair = RsaKeyPair::generate(KeySize::Rsa4096).map_err(|_| refused())?;
        let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| refused())?;
        Self::new_key(der.as_ref()).ok_or_else(refused)
    }

    fn new_key(pkcs8: &[u8]) -> Option<NewKey> {
        let encoded = Zeroizing::new(STANDARD.encode(pkcs8));
        let mut pem = Zeroizing::new(String::with_capacity(encoded.len() + 128));
        pem.push_str("-----BEGIN PRIVATE KEY-----\n");
        for line in encoded.as_bytes().chunks(64) {
            pem.push_str(std::str::from_utf8(line).ok()?);
            pem.push('\n');
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        Some(NewKey { key: Self::from_pkcs8(pkcs8)?, pem })
    }

    /// The public half of a private key that somebody else holds, for seeing that they do: PKCS#8, SEC1 or PKCS#1 PEM. The
    /// private half is forgotten here.
    pub fn spki_of(place: &str, pem: &str) -> Result<Vec<u8>, KeyError> {
        let unreadable = || KeyError::Unreadable { place: place.to_owned() };
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| unreadable())?;
        if let PrivateKeyDer::Pkcs1(der) = &der {
            let rsa = RsaKeyPair::from_der(der.secret_pkcs1_der()).map_err(|_| unreadable())?;
            let spki: aws_lc_rs::encoding::PublicKeyX509Der<'_> =
                rsa.public_key().as_der().map_err(|_| unreadable())?;
            return Ok(spki.as_ref().to_vec());
        }
        if let Some(key) = Self::from_pkcs8(der.secret_der()) {
            return Ok(key.spki_der);
        }
        let ec = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_der())
            .map_err(|_| unreadable())?;
        p256_spki_der(ec.public_key().as_ref()).map_err(|_| unreadable())
    }

    /// The public key as a SubjectPublicKeyInfo (RFC 5280 §4.1.2.7).
    #[must_use]
    pub fn spki_der(&self) -> &[u8] {
        &self.spki_der
    }

    /// How this key signs certificates.
    #[must_use]
    pub fn signature_algorithm(&self) -> SignatureAlgorithm {
        match self.kind {
            KeyKind::P256 { .. } => SignatureAlgorithm::EcdsaP256Sha256,
            KeyKind::Rsa(_) => SignatureAlgorithm::RsaPkcs1Sha256,
        }
    }

    /// Signs a certificate that the lints have passed. The permit says that signing is not halted, or that this
    /// signature is exempt.
    pub fn sign_certificate(&self, _permit: &impl Permit, tbs: LintedTbs) -> Result<Certificate, KeyError> {
        let signature = self.sign_asn1(tbs.to_be_signed())?;
        Ok(tbs.into_certificate(&signature)?)
    }

    /// Signs a revocation list of `issuer`, whose key this is, and gives its DER.
    pub fn sign_crl(
        &self,
        _permit: &impl Permit,
        issuer: &Certificate,
        tbs: CrlTbs,
    ) -> Result<Vec<u8>, KeyError> {
        let signature = self.sign_asn1(tbs.to_be_signed())?;
        Ok(tbs.into_crl(issuer, &signature)?)
    }

    /// Signs `message` for a JWS: ES256, `r ‖ s` (RFC 7518 §3.4). For typed claims only.
    pub fn sign_jws(&self, _permit: &impl Permit, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.kind {
            KeyKind::P256 { fixed, .. } => fixed
                .sign(&SystemRandom::new(), message)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| KeyError::Library("sign a token")),
            KeyKind::Rsa(_) => Err(KeyError::Library("sign a token with an RSA key")),
        }
    }

    /// Signs a client assertion for the agent whose key this is: ES256 or RS256.
    pub fn sign_assertion(&self, permit: &impl Permit, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.kind {
            KeyKind::P256 { .. } => self.sign_jws(permit, message),
            // RSASSA-PKCS1-v1_5 with SHA-256 is the same in a certificate and in a JWS.
            KeyKind::Rsa(_) => self.sign_asn1(message),
        }
    }

    /// Whether this is an RSA key; otherwise it is a P-256 key.
    #[must_use]
    pub fn is_rsa(&self) -> bool {
        matches!(self.kind, KeyKind::Rsa(_))
    }

    /// Countersigns an assertion: ECDSA-SHA256 in ASN.1 (wire contract §4.2).
    pub fn countersign(&self, _permit: &impl Permit, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.sign_asn1(message)
    }

    fn sign_asn1(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.kind {
            KeyKind::P256 { asn1, .. } => asn1
                .sign(&SystemRandom::new(), message)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| KeyError::Library("sign with a P-256 key")),
            KeyKind::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature)
                    .map_err(|_| KeyError::Library("sign with an RSA key"))?;
                Ok(signature)
            }
        }
    }
}

/// A sealed key in the form that the TLS library wants.
pub fn tls_key(sealing: &SealingKey, place: &str, sealed: &str) -> Result<PrivateKeyDer<'static>, KeyError> {
    read_tls_key(place, &sealing.open(place, sealed)?)
}

/// An operator's own key file in the form that the TLS library wants.
pub fn tls_key_from_file(path: &Path) -> Result<PrivateKeyDer<'static>, KeyError> {
    let pem =
        std::fs::read_to_string(path).map(Zeroizing::new).map_err(|source| SealingKey::file(path, source))?;
    read_tls_key(&path.display().to_string(), &pem)
}

fn read_tls_key(place: &str, pem: &str) -> Result<PrivateKeyDer<'static>, KeyError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| KeyError::Unreadable { place: place.to_owned() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sealing() -> SealingKey {
        SealingKey::from_bytes(&[7; 32]).unwrap()
    }

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let sealed = sealing().seal("proxy_config/org_ca_key/value", b"secret").unwrap();
        assert!(sealed.starts_with(SEALED_PREFIX) && !sealed.contains("secret"));
        assert_eq!(sealing().open("proxy_config/org_ca_key/value", &sealed).unwrap().as_str(), "secret");
        assert!(sealing().open("proxy_config/mastio_ca_key/value", &sealed).is_err());
    }

    #[test]
    fn a_sealed_value_that_was_changed_does_not_open() {
        let sealed = sealing().seal("a/b/c", b"secret").unwrap();
        let mut bytes = STANDARD.decode(&sealed[SEALED_PREFIX.len()..]).unwrap();
        for index in 0..bytes.len() {
            bytes[index] ^= 1;
            assert!(sealing().open("a/b/c", &format!("{SEALED_PREFIX}{}", STANDARD.encode(&bytes))).is_err());
            bytes[index] ^= 1;
        }
    }

    #[test]
    fn a_key_survives_its_pem_and_its_seal() {
        let new = PrivateKey::generate_p256().unwrap();
        let sealed = new.seal(&sealing(), "x/y/z").unwrap();
        assert_eq!(sealing().open_key("x/y/z", &sealed).unwrap().spki_der(), new.key.spki_der());
    }

    #[test]
    fn a_passphrase_and_its_salt_give_the_same_sealing_key_again() {
        let sealed = SealingKey::from_passphrase("correct horse", b"0123456789abcdef")
            .unwrap()
            .seal("p", b"s")
            .unwrap();
        assert!(
            SealingKey::from_passphrase("correct horse", b"0123456789abcdef")
                .unwrap()
                .open("p", &sealed)
                .is_ok()
        );
        assert!(
            SealingKey::from_passphrase("wrong horse", b"0123456789abcdef")
                .unwrap()
                .open("p", &sealed)
                .is_err()
        );
    }
}
