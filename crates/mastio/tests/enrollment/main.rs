//! Every way in, from the outside: the real binary, real databases, and the unmodified `cullis-sdk`.
//!
//! [`approval`] has operators decide, [`agents`] is the life of an agent afterwards. [`world`] has what they share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agents;
mod approval;
#[path = "../harness/mod.rs"]
mod harness;
mod world;
