//! What every route shares: who asked and when, the admin's credential, bounds, and how errors look.
//!
//! This folder knows no capability. [`server`] terminates TLS and hands each request its [`context::Context`];
//! [`error`] alone knows status codes.

pub mod authn;
pub mod body;
pub mod cache;
pub mod context;
pub mod error;
pub mod front;
pub mod headers;
pub mod json;
pub mod limits;
pub mod overload;
pub mod server;
pub mod urls;
