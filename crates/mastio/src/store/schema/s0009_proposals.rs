//! Plans that one operator proposes and another approves.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 9,
    name: "proposals",
    both: r"
CREATE TABLE update_proposals (
  proposal_id TEXT PRIMARY KEY, migration_id TEXT NOT NULL,
  direction TEXT NOT NULL CHECK (direction IN ('apply', 'rollback')), plan_digest TEXT NOT NULL,
  proposed_by TEXT NOT NULL, proposed_at TEXT NOT NULL, expires_at BIGINT NOT NULL, approved_by TEXT, approved_at TEXT,
  run_id TEXT, void TEXT)
--;
CREATE INDEX update_proposals_migration ON update_proposals (migration_id, direction, proposal_id)
",
    sqlite: "",
    postgres: "",
};
