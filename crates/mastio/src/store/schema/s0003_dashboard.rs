//! Sessions of the dashboard.
//!
//! `id` is a keyed digest of the cookie: neither the file nor a copy of it lets anybody in. A deploy that moves to another
//! database leaves them behind, and its operators sign in again.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 3,
    name: "dashboard",
    both: r"
CREATE TABLE dashboard_sessions (
  id TEXT PRIMARY KEY, actor TEXT NOT NULL, address TEXT NOT NULL, created_at BIGINT NOT NULL, seen_at BIGINT NOT NULL)
",
    sqlite: "",
    postgres: "",
};
