//! Operators with a secret of their own.
//!
//! `credential` is the argon2id hash of the secret, a PHC string. The shared secret has no row: it is configuration.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 8,
    name: "operators",
    both: r"
CREATE TABLE operators (
  name TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('viewer', 'operator', 'admin')), credential TEXT NOT NULL,
  created_at TEXT NOT NULL, created_by TEXT NOT NULL, last_seen_at TEXT, deactivated_at TEXT)
",
    sqlite: "",
    postgres: "",
};
