//! Rules in Cedar for calls of tools: every version of each. The newest of a name counts; one that is `deleted` is no
//! more. Versions are history, so none is ever changed.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 18,
    name: "mcp_policies",
    both: r"
CREATE TABLE mcp_policy_versions (
  change BIGINT PRIMARY KEY, name TEXT NOT NULL, version BIGINT NOT NULL, tool TEXT, mode TEXT NOT NULL,
  text TEXT NOT NULL, saved_at TEXT NOT NULL, saved_by TEXT NOT NULL, UNIQUE (name, version))
",
    sqlite: r"
CREATE TRIGGER mcp_policy_versions_no_update BEFORE UPDATE ON mcp_policy_versions
BEGIN SELECT RAISE(ABORT, 'mcp_policy_versions is append-only: UPDATE refused'); END
--;
CREATE TRIGGER mcp_policy_versions_no_delete BEFORE DELETE ON mcp_policy_versions
BEGIN SELECT RAISE(ABORT, 'mcp_policy_versions is append-only: DELETE refused'); END
",
    postgres: r"
CREATE TRIGGER mcp_policy_versions_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON mcp_policy_versions
FOR EACH STATEMENT EXECUTE FUNCTION mastio_append_only()
",
};
