//! The audit chain: what happened, in an order that cannot be changed unseen.
//!
//! An [`event`] says what happened; [`chain`] links it to everything before it and verifies such chains;
//! [`legacy`] verifies the two chains of the predecessor by their own rules. Appending, and keeping the head
//! under a lock, is the store's work.

pub mod chain;
pub mod event;
pub mod legacy;
