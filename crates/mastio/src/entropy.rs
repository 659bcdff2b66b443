//! The one source of randomness. Key generation and signatures draw from the crypto library's own.

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::time::UnixMicros;
use mastio_core::x509::Serial;

/// The operating system's generator.
pub struct Entropy(SystemRandom);

impl Default for Entropy {
    fn default() -> Self {
        Self(SystemRandom::new())
    }
}

impl Entropy {
    /// `N` random bytes.
    ///
    /// There is no error to handle: a machine whose generator fails must not go on, so the process ends.
    #[must_use]
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0u8; N];
        if self.0.fill(&mut bytes).is_err() {
            tracing::error!("the operating system's random generator failed; stopping");
            std::process::abort();
        }
        bytes
    }

    /// `N` random bytes as base64url text.
    #[must_use]
    pub fn text<const N: usize>(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.bytes::<N>())
    }

    /// A certificate serial: 128 random bits, never zero (RFC 5280 §4.1.2.2).
    #[must_use]
    pub fn serial(&self) -> Serial {
        loop {
            if let Some(serial) = Serial::new(self.bytes()) {
                return serial;
            }
        }
    }

    /// A ULID for `now`: sorts by time, unique by its 80 random bits.
    #[must_use]
    pub fn ulid(&self, now: UnixMicros) -> String {
        let milliseconds = u64::try_from(now.0 / 1000).unwrap_or(0);
        ulid::Ulid::from_parts(milliseconds, u128::from_be_bytes(self.bytes())).to_string()
    }

    /// A random UUID (RFC 9562 version 4).
    #[must_use]
    pub fn uuid(&self) -> String {
        uuid::Builder::from_random_bytes(self.bytes()).into_uuid().to_string()
    }
}
