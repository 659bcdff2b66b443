//! Mastio.
fn main() {}
