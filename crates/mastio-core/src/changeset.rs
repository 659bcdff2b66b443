//! What an update changes.
