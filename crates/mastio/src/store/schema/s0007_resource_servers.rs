//! Who may ask about access tokens, and which of them are revoked.
//!
//! A resource server's secret is 32 random bytes, so its plain digest tells nothing. A revoked token is on the list until
//! it would have expired (with the clock leeway), so the list stays as short as tokens are short-lived.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 7,
    name: "resource servers",
    both: r"
CREATE TABLE resource_servers (
  resource_server_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, resource TEXT NOT NULL, secret_sha256 TEXT NOT NULL,
  created_at TEXT NOT NULL, created_by TEXT NOT NULL)
--;
CREATE TABLE revoked_tokens (jwt_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL, expires_at BIGINT NOT NULL)
--;
CREATE INDEX revoked_tokens_expiry ON revoked_tokens (expires_at)
",
    sqlite: "",
    postgres: "",
};
