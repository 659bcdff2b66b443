//! Certificates: read, built, linted, validated (RFC 5280).
