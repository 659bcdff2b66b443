//! The gateway from the outside: the real binary between clients and servers that others wrote, and between clients and
//! servers that mean harm.
//!
//! [`conformance`] has the MCP project's own suite judge us; [`sdks`] has the official SDKs, everything-server, FastMCP
//! and the unmodified `cullis-sdk` speak through us, with the same results as without; [`streams`] tells sessions what
//! changes; [`callers`] tells servers who calls; [`evidence`] keeps what was said; [`attacks`] prints what was tried and why it was refused; [`faults`] breaks servers and ourselves.
//! [`world`] is a deploy with two agents, [`hostile`] a server that does what none should.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attacks;
mod callers;
mod conformance;
mod evidence;
mod faults;
#[path = "../harness/mod.rs"]
mod harness;
mod hostile;
mod sdks;
mod streams;
mod world;
