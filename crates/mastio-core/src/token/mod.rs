//! Client assertions and access tokens.
