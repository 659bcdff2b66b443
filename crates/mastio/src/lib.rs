//! Mastio: the certificate authority, token issuer, MCP gateway and audit log of an organisation's AI agents.
//!
//! `app` wires everything; each other folder is a capability that tells its own story in its `mod.rs`.

pub mod app;
pub mod audit;
pub mod cli;
pub mod clock;
pub mod config;
pub mod dashboard;
pub mod demo;
pub mod enrollment;
pub mod entropy;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod gateway;
pub mod health;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod openapi;
pub mod operators;
pub mod pki;
pub mod store;
pub mod tokens;
pub mod updates;
