//! Updates from the outside: the real binary on real databases, killed where it hurts and judged by others.
//!
//! [`fixtures`] walks every database that the predecessor left; [`chains`] has verifiers that share no code with us
//! judge what an apply made; [`contract`] is what every migration meets, [`repairs`] what each does; [`crashes`] kills
//! the process at every phase over a large fleet; [`fence`] engages the halt under load; [`rows`] lists every row of
//! every database; [`refusals`] asks wrongly; [`rehearsal`] plans and holds runs to plans; [`progress`] watches them;
//! [`doctor`] has what was left explained; [`faults`] takes away what a run stands on; [`properties`] walks random histories; [`settle`] ends the trust overlap; [`seal`] moves everything under another key. [`server`] starts the binary, [`state`] reads what it left behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chains;
mod contract;
mod corruptions;
mod crashes;
mod doctor;
mod faults;
mod fence;
mod fixtures;
#[path = "../harness/mod.rs"]
mod harness;
mod life;
mod points;
mod progress;
mod properties;
mod refusals;
mod rehearsal;
mod repairs;
mod replicas;
mod rows;
mod seal;
mod server;
mod settle;
mod state;
