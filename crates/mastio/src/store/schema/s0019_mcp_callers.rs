//! Which MCP servers are told who calls.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 19,
    name: "mcp_callers",
    both: r"
ALTER TABLE mcp_upstreams ADD COLUMN asserts_caller BIGINT NOT NULL DEFAULT 0
",
    sqlite: "",
    postgres: "",
};
