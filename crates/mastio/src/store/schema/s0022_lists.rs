//! What lists of the dashboard are read by: agents by how they were enrolled, bindings by what they are to, and tools
//! that wait for a decision.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 22,
    name: "lists",
    both: r"
CREATE INDEX internal_agents_type ON internal_agents
((CASE WHEN enrollment_method = 'byoca' THEN 'byoca' WHEN enrollment_method IN ('spire', 'spiffe') THEN 'spire' ELSE 'connector' END), agent_id)
--;
CREATE INDEX local_agent_resource_bindings_resource ON local_agent_resource_bindings (resource_id, binding_id)
--;
CREATE INDEX mcp_tools_waiting ON mcp_tools (name)
WHERE present = 1 AND (state = 'proposed' OR (state = 'approved' AND COALESCE(definition_digest, '') <> found_digest))
",
    sqlite: "",
    postgres: "",
};
