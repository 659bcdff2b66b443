//! The pure half of Mastio: bytes and values in, values or errors out.
//!
//! Nothing here does I/O, logs, knows what time it is, or draws randomness: callers hand in `now`,
//! serials and nonces (`tests/tidy.rs` holds that line). Certificates live in [`x509`], tokens in
//! [`token`] and [`dpop`], the audit chain in [`audit`].

pub mod audit;
pub mod dpop;
pub mod error;
pub mod json;
pub mod time;
pub mod token;
pub mod x509;
