//! Arguments and results of calls, sealed, for as long as an operator has set for the tool. `part_id` is
//! `evidence_id/part`: where a value is sealed for has one key.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 20,
    name: "mcp_evidence",
    both: r"
ALTER TABLE mcp_tools ADD COLUMN retention_days BIGINT
--;
CREATE TABLE mcp_evidence (
  part_id TEXT PRIMARY KEY, evidence_id TEXT NOT NULL, part TEXT NOT NULL, tool TEXT NOT NULL, agent_id TEXT NOT NULL,
  request_id TEXT NOT NULL, called_at BIGINT NOT NULL, expires_at BIGINT NOT NULL, digest TEXT NOT NULL,
  bytes BIGINT NOT NULL, sealed TEXT NOT NULL, UNIQUE (evidence_id, part))
--;
CREATE INDEX mcp_evidence_by_expiry ON mcp_evidence (expires_at)
--;
CREATE INDEX mcp_evidence_by_call ON mcp_evidence (called_at, evidence_id)
",
    sqlite: "",
    postgres: "",
};
