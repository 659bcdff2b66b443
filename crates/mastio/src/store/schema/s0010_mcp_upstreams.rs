//! MCP servers with many tools, and what an operator has approved of each.
//!
//! `mcp_tools.definition` is what was approved, `found` what the server says now. A binding names a tool or a whole
//! server by its id in `local_agent_resource_bindings.resource_id`.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 10,
    name: "mcp_upstreams",
    both: r"
CREATE TABLE mcp_upstreams (
  upstream_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, endpoint_url TEXT NOT NULL, description TEXT,
  auth_type TEXT NOT NULL, credential_sealed TEXT, allowed_domains TEXT NOT NULL, required_capability TEXT,
  ca_pem TEXT, timeout_ms BIGINT NOT NULL, calls_max BIGINT NOT NULL, enabled BIGINT NOT NULL,
  revision TEXT, capabilities TEXT NOT NULL, discovered_at TEXT, discovery_error TEXT,
  created_at TEXT NOT NULL, updated_at TEXT NOT NULL)
--;
CREATE TABLE mcp_tools (
  tool_id TEXT PRIMARY KEY, upstream_id TEXT NOT NULL, upstream_name TEXT NOT NULL, name TEXT NOT NULL UNIQUE,
  state TEXT NOT NULL, definition TEXT, definition_digest TEXT, found TEXT NOT NULL, found_digest TEXT NOT NULL,
  present BIGINT NOT NULL, imitates TEXT, required_capability TEXT, calls_per_minute BIGINT,
  first_seen_at TEXT NOT NULL, approved_at TEXT, approved_by TEXT, UNIQUE (upstream_id, upstream_name))
",
    sqlite: "",
    postgres: "",
};
