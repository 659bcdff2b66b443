//! Which certificates agents present while a trust overlap runs. A deploy that moves to another database begins anew.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 13,
    name: "overlap",
    both: r"
CREATE TABLE presented_certificates (
  agent_id TEXT NOT NULL, fingerprint TEXT NOT NULL, seen_at BIGINT NOT NULL, PRIMARY KEY (agent_id, fingerprint))
",
    sqlite: "",
    postgres: "",
};
