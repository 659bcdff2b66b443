//! The digest of a run's images as they were when its stored state had verified: what a snapshot is held to on read.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 16,
    name: "snapshot digest",
    both: r"
ALTER TABLE update_runs ADD COLUMN images_digest TEXT
",
    sqlite: "",
    postgres: "",
};
