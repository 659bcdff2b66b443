//! Updates from the outside: the real binary on real databases, killed where it hurts and judged by others.
//!
//! [`fixtures`] walks every database that the predecessor left; [`chains`] has verifiers that share no code with us
//! judge what an apply made; [`crashes`] kills the process at every phase; [`fence`] engages the halt under load;
//! [`refusals`] asks wrongly. [`server`] starts the binary, [`state`] reads what it left in its database.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chains;
mod crashes;
mod fence;
mod fixtures;
#[path = "../harness/mod.rs"]
mod harness;
mod refusals;
mod server;
mod state;
