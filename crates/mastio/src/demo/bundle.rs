//! The legacy deploy that the demo brings along: throwaway keys that protect nothing.
//!
//! Made by the generator; `fixtures/demo/README.md` says how to make it anew when its leaves have expired.

/// The organisation in the database.
pub(super) const ORG_ID: &str = "acme";
/// A database that the Python system wrote: an Org CA with `pathLen=0` and five agents under it.
pub(super) const DATABASE: &[u8] = include_bytes!("../../fixtures/demo/mcp_proxy.db");
/// The CA file that every agent pins.
pub(super) const ORG_CA: &str = include_str!("../../fixtures/demo/keys/org-ca.crt");

/// What one agent has on disk.
pub(super) struct AgentFiles {
    /// Its name, without the organisation.
    pub name: &'static str,
    /// Its certificate, issued under the broken CA.
    pub certificate: &'static str,
    /// Its private key.
    pub private_key: &'static str,
}

impl AgentFiles {
    /// `org::name`.
    pub(super) fn agent_id(&self) -> String {
        format!("{ORG_ID}::{}", self.name)
    }
}

macro_rules! agent {
    ($name:literal) => {
        AgentFiles {
            name: $name,
            certificate: include_str!(concat!("../../fixtures/demo/keys/", $name, ".crt")),
            private_key: include_str!(concat!("../../fixtures/demo/keys/", $name, ".key")),
        }
    };
}

/// The whole fleet.
pub(super) const AGENTS: [AgentFiles; 5] = [
    agent!("agent-0001"),
    agent!("agent-0002"),
    agent!("agent-0003"),
    agent!("agent-0004"),
    agent!("agent-0005"),
];
