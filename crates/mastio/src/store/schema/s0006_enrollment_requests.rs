//! Requests for an identity that wait for an operator's decision, and those that were granted.
//!
//! Times are Unix seconds. `status` is what was decided; that a pending one has expired is told by `expires_at`.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 6,
    name: "enrollment requests",
    both: r"
CREATE TABLE enrollment_requests (
  session_id TEXT PRIMARY KEY, status TEXT NOT NULL CHECK (status IN ('pending', 'approved', 'rejected')),
  spki_pem TEXT NOT NULL, spki_sha256 TEXT NOT NULL, principal_type TEXT NOT NULL, dpop_jkt TEXT,
  requester_name TEXT NOT NULL, requester_email TEXT NOT NULL, reason TEXT, device_info TEXT, source TEXT NOT NULL,
  created_at BIGINT NOT NULL, expires_at BIGINT NOT NULL, agent_id TEXT, rejection_reason TEXT, decided_at BIGINT,
  decided_by TEXT)
--;
CREATE INDEX enrollment_requests_status ON enrollment_requests (status, expires_at)
--;
CREATE INDEX enrollment_requests_agent ON enrollment_requests (agent_id)
",
    sqlite: "",
    postgres: "",
};
