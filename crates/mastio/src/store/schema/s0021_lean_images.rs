//! Images that do not repeat the intermediate behind every leaf.
//!
//! `update_runs.follows` is what follows every leaf that the run writes; `update_images.follows` says of which images.
//! From this step on a row of `superseded_certificates` is written before the run that it names in `superseded_by` has
//! committed, and counts from its commit.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 21,
    name: "lean images",
    both: r"
ALTER TABLE update_runs ADD COLUMN follows TEXT
--;
ALTER TABLE update_images ADD COLUMN follows BIGINT NOT NULL DEFAULT 0
",
    sqlite: "",
    postgres: "",
};
