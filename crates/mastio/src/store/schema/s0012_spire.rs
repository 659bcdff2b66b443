//! Which SPIFFE id belongs to which agent, and the bundle that vouches for it: for agents enrolled with an SVID alone.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 12,
    name: "spire",
    both: r"
CREATE TABLE spire_identities (
  agent_id TEXT PRIMARY KEY, spiffe_id TEXT NOT NULL UNIQUE, bundle_pem TEXT NOT NULL)
",
    sqlite: "",
    postgres: "",
};
