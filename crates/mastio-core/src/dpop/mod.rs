//! DPoP (RFC 9449): each request carries a proof that its sender holds the key a token is bound to.
//!
//! The proof names its own key, so parsing yields a key and verifying shows that the sender holds it; what
//! makes it mean anything is the caller's comparison of [`Proof::jkt`] with the token's `cnf.jkt`. The
//! caller also records [`Proof::jwt_id`], last of all, so that a refused request burns nothing.

mod proof;
#[cfg(test)]
mod tests;

pub use proof::{
    FUTURE_S_MAX, HTU_BYTES_MAX, PROOF_AGE_S_MAX, Proof, ProofError, ProofRequest, UnverifiedProof,
    normalize_url,
};
