//! What lists of the dashboard are read by, and the role of a session that single sign-on has opened; an operator's
//! session has none of its own.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 17,
    name: "dashboard lists",
    both: r"
ALTER TABLE dashboard_sessions ADD COLUMN role TEXT
--;
CREATE INDEX internal_agents_state ON internal_agents (is_active, agent_id)
",
    sqlite: "",
    postgres: "",
};
