//! What proves a run: a digest of each cell that its verification accepted, how many its commit wrote, and its signs
//! of life, which other replicas count.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 15,
    name: "run proof",
    both: r"
ALTER TABLE update_images ADD COLUMN accepted TEXT
--;
ALTER TABLE update_runs ADD COLUMN written BIGINT
--;
ALTER TABLE update_runs ADD COLUMN beats BIGINT NOT NULL DEFAULT 0
",
    sqlite: "",
    postgres: "",
};
