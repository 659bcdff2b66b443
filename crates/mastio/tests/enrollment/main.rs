//! Every way in, from the outside: the real binary, real databases, and the unmodified `cullis-sdk`.
//!
//! [`approval`] has operators decide, [`agents`] is the life of an agent afterwards, [`revocation`] its sudden end;
//! [`external`] has owners bring their own keys. [`paths`] presents what must not be believed;
//! [`discovery`] is what one may read; [`matrix`] has the SDK do all that it can, however it came in.
//! [`world`] has what they share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agents;
mod approval;
mod discovery;
mod external;
#[path = "../harness/mod.rs"]
mod harness;
mod matrix;
mod paths;
mod revocation;
mod world;
