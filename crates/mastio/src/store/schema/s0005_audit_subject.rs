//! Whom an audit event is about, as a column of its own: every event about one agent is found by an index.
//!
//! The database computes it from what is hashed, so it cannot say anything else: the agent that the details name, or
//! else the actor.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 5,
    name: "audit subject",
    both: "",
    sqlite: r"
ALTER TABLE audit_events ADD COLUMN subject TEXT
GENERATED ALWAYS AS (COALESCE(json_extract(details, '$.agent_id'), actor)) VIRTUAL
--;
CREATE INDEX audit_events_subject ON audit_events (subject, seq)
",
    // Not by a JSON type: those refuse an escaped NUL, and an event must never be refused for the words in it. Our
    // details are canonical, and a quote inside a string is escaped, so the pattern meets member names only.
    postgres: r#"
ALTER TABLE audit_events ADD COLUMN subject TEXT
GENERATED ALWAYS AS (COALESCE(substring(details from '[{,]"agent_id":"([^"\\]*)"'), actor)) STORED
--;
CREATE INDEX audit_events_subject ON audit_events (subject, seq)
"#,
};
