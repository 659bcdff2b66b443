//! What a leaf lacks of the agent profile, beside its other facts, and the index by which old enrollment tags are found.
//!
//! NULL in `agent_certificates.profile_gaps` is *not looked yet*: the first boot on this step fills it.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 2,
    name: "profile gaps",
    both: r"
ALTER TABLE agent_certificates ADD COLUMN profile_gaps TEXT
--;
CREATE INDEX agent_certificates_profile_gaps ON agent_certificates (profile_gaps, agent_id)
--;
ALTER TABLE update_run_certificates ADD COLUMN profile_gaps TEXT
--;
ALTER TABLE update_run_certificates ADD COLUMN old_profile_gaps TEXT
--;
CREATE INDEX internal_agents_enrollment ON internal_agents (enrollment_method)
",
    sqlite: "",
    postgres: "",
};
