//! The predecessor's encrypted key store: Fernet tokens under a key from `MCP_PROXY_DB_ENCRYPTION_KEY`.
//!
//! Source: the Fernet specification (version 0x80, AES-128-CBC with PKCS#7, HMAC-SHA256 over everything before it).

use std::num::NonZeroU32;

use aws_lc_rs::cipher::{AES_128, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::{hmac, pbkdf2};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

/// What every ciphertext in `pki_key_store` begins with.
const PREFIX: &str = "enc:pki:v1:";
const SALT: &[u8] = b"cullis-mastio-pki-v1";
const ROUNDS: NonZeroU32 = NonZeroU32::MIN.saturating_add(599_999);
const VERSION: u8 = 0x80;
/// Version and timestamp.
const HEAD_BYTES: usize = 9;
const IV_BYTES: usize = 16;
const TAG_BYTES: usize = 32;

/// The predecessor's key, derived once.
pub(super) struct Fernet(Zeroizing<[u8; 32]>);

/// One key of the predecessor's store, opened.
#[derive(serde::Deserialize)]
struct Entry {
    key_pem: String,
    cert_pem: String,
}

/// A key and its certificate, as the predecessor kept them.
pub(super) struct KeyPair {
    /// PKCS#8 PEM.
    pub key_pem: Zeroizing<String>,
    /// PEM.
    pub cert_pem: String,
}

/// Why an entry does not open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FernetError {
    /// The entry is no Fernet token of the predecessor's.
    Shape,
    /// The token was changed, or made under another passphrase.
    Key,
}

impl Fernet {
    /// Derives the key. Takes a fifth of a second: not on the executor's threads.
    pub fn derive(passphrase: &str) -> Self {
        let mut bytes = Zeroizing::new([0u8; 32]);
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ROUNDS, SALT, passphrase.as_bytes(), bytes.as_mut());
        Self(bytes)
    }

    /// Opens one `ciphertext` of `pki_key_store`.
    pub fn open(&self, ciphertext: &str) -> Result<KeyPair, FernetError> {
        let token = ciphertext.strip_prefix(PREFIX).ok_or(FernetError::Shape)?;
        let token = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).map_err(|_| FernetError::Shape)?;
        let (signed, tag) = token
            .len()
            .checked_sub(TAG_BYTES)
            .and_then(|length| token.split_at_checked(length))
            .ok_or(FernetError::Shape)?;
        let (sign_key, cipher_key) = self.0.split_at(16);
        // Before anything is decrypted, and in constant time: CBC without that is a padding oracle.
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, sign_key), signed, tag)
            .map_err(|_| FernetError::Key)?;
        let (head, body) = signed.split_at_checked(HEAD_BYTES).ok_or(FernetError::Shape)?;
        let (iv, encrypted) = body.split_at_checked(IV_BYTES).ok_or(FernetError::Shape)?;
        let iv = <[u8; IV_BYTES]>::try_from(iv).map_err(|_| FernetError::Shape)?;
        if head.first() != Some(&VERSION) {
            return Err(FernetError::Shape);
        }
        let key = UnboundCipherKey::new(&AES_128, cipher_key).map_err(|_| FernetError::Key)?;
        let mut buffer = Zeroizing::new(encrypted.to_vec());
        let clear = PaddedBlockDecryptingKey::cbc_pkcs7(key)
            .and_then(|key| key.decrypt(&mut buffer, DecryptionContext::Iv128(FixedLength::from(iv))))
            .map_err(|_| FernetError::Key)?;
        let entry: Entry = serde_json::from_slice(clear).map_err(|_| FernetError::Shape)?;
        Ok(KeyPair { key_pem: Zeroizing::new(entry.key_pem), cert_pem: entry.cert_pem })
    }
}
