//! What happened: the type of an event, who did it, and the details.

use serde_json::Value;

/// One thing that happened, before it is linked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// What kind of thing.
    pub event_type: EventType,
    /// Who did it: `admin` (the shared secret), an operator's name, `system`, or an agent's id.
    pub actor: String,
    /// What it was done to. A JSON object without floats.
    pub details: Value,
}

/// Makes the enum, its names and its list from one table, so that a new type is one line.
macro_rules! event_types {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Every type of event that we write. The names are interface: operators search for them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum EventType {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl EventType {
            /// Every type, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name as stored.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The type of this name. `None` for a name that this version does not write.
            #[must_use]
            pub fn parse(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

event_types! {
    /// An access token was issued to an agent.
    TokenIssued = "auth.token_issued",
    /// A client assertion was signed with the agent's key that we hold.
    AssertionSigned = "auth.assertion_signed",
    /// An access token was revoked by the agent that it was issued to.
    TokenRevoked = "auth.token_revoked",
    /// Somebody was refused for what it presented.
    Refused = "auth.refused",
    /// So many more were refused, for the same reason, than have an event each.
    RefusalsSummarised = "auth.refusals_summarised",
    /// A resource server was given a credential to ask about access tokens with.
    ResourceServerCreated = "auth.resource_server_created",
    /// A resource server's credential was withdrawn.
    ResourceServerDeleted = "auth.resource_server_deleted",
    /// A framework update was detected as needed.
    UpdateDetected = "admin.update_detected",
    /// The rows an update would change were written to a snapshot.
    UpdateSnapshotTaken = "admin.update_snapshot_taken",
    /// An update was applied.
    UpdateApplied = "admin.update_applied",
    /// An update was not applied; nothing changed.
    UpdateApplyFailed = "admin.update_apply_failed",
    /// An applied update was undone.
    UpdateRolledBack = "admin.update_rolled_back",
    /// An applied update was not undone; nothing changed.
    UpdateRollbackFailed = "admin.update_rollback_failed",
    /// The state that an update left behind was verified.
    UpdateVerified = "admin.update_verified",
    /// An update is no longer needed, and was closed without being applied.
    UpdateClosed = "admin.update_closed",
    /// An operator proposed the plan of an update, or of its rollback, to the others.
    UpdateProposed = "admin.update_proposed",
    /// Another operator approved a proposed plan.
    UpdateApproved = "admin.update_approved",
    /// A proposal is void, because the state has moved since.
    UpdateProposalVoid = "admin.update_proposal_void",
    /// The key that signs access tokens was rotated.
    MastioKeyRotated = "admin.mastio_key_rotated",
    /// A predecessor's database was taken over.
    DeployAdopted = "deploy.adopted",
    /// A new deployment was set up.
    DeployCreated = "deploy.created",
    /// A new deployment got its name and its first operator.
    DeploySetUp = "deploy.set_up",
    /// Everything was sealed under another key.
    DeploySealRotated = "deploy.seal_rotated",
    /// A deployment was copied to another database.
    DeployCopied = "deploy.copied",
    /// Somebody asked for an agent's identity, with a key of their own.
    EnrollmentRequested = "enrollment.requested",
    /// A request for an identity was granted, and its key certified.
    EnrollmentApproved = "enrollment.approved",
    /// A request for an identity was refused.
    EnrollmentRejected = "enrollment.rejected",
    /// An agent was created.
    AgentCreated = "agent.created",
    /// An agent was deactivated.
    AgentDeactivated = "agent.deactivated",
    /// A deactivated agent was taken back.
    AgentReactivated = "agent.reactivated",
    /// An agent's certificate was issued anew, for its key or another one.
    AgentCertificateRenewed = "agent.certificate_renewed",
    /// An agent was deleted.
    AgentDeleted = "agent.deleted",
    /// An agent's persistent DPoP key was set.
    AgentDpopKeySet = "agent.dpop_key_set",
    /// An agent was enrolled with a certificate of its owner's.
    AgentByocaEnrolled = "agent.byoca_enrolled",
    /// An agent was enrolled with an SVID.
    AgentSpireEnrolled = "agent.spire_enrolled",
    /// A certificate was issued for an owner's CSR, for enrollment by its owner.
    AgentByocaCertificateIssued = "agent.byoca_certificate_issued",
    /// An upstream MCP server was registered.
    McpResourceCreated = "mcp.resource_created",
    /// An upstream MCP server was removed.
    McpResourceDeleted = "mcp.resource_deleted",
    /// An agent was allowed to use an upstream MCP server.
    McpBindingCreated = "mcp.binding_created",
    /// An agent's use of an upstream MCP server was ended.
    McpBindingRevoked = "mcp.binding_revoked",
    /// An MCP server with tools of its own was registered.
    McpUpstreamCreated = "mcp.upstream_created",
    /// An MCP server's settings were changed.
    McpUpstreamChanged = "mcp.upstream_changed",
    /// An MCP server was removed, with its tools and their bindings.
    McpUpstreamDeleted = "mcp.upstream_deleted",
    /// A look at an MCP server found tools that are new, changed or gone.
    McpToolsDiscovered = "mcp.tools_discovered",
    /// A tool's definition was approved.
    McpToolApproved = "mcp.tool_approved",
    /// A tool was blocked by an operator.
    McpToolBlocked = "mcp.tool_blocked",
    /// A tool's limits were changed.
    McpToolChanged = "mcp.tool_changed",
    /// An agent read a resource or a prompt, or asked an MCP server for something else than a tool.
    McpRequestForwarded = "mcp.request_forwarded",
    /// A rule for calls of tools was saved.
    McpPolicySaved = "mcp.policy_saved",
    /// A rule for calls of tools was deleted.
    McpPolicyDeleted = "mcp.policy_deleted",
    /// A document with MCP servers, bindings and rules was taken up; its changes have events of their own.
    McpConfigImported = "mcp.config_imported",
    /// An operator read the kept arguments and result of a call.
    McpEvidenceRead = "mcp.evidence_read",
    /// Kept arguments and results were deleted because their time was over.
    McpEvidenceDeleted = "mcp.evidence_deleted",
    /// An agent ended its MCP session.
    McpSessionEnded = "mcp.session_ended",
    /// A request was refused before it could be served: it is malformed, or its headers say otherwise than its body.
    McpRequestRefused = "mcp.request_refused",
    /// An agent presented an MCP session that is not its own, or over.
    McpSessionRefused = "mcp.session_refused",
    /// An agent called a tool.
    McpToolCalled = "mcp.tool_called",
    /// An operator tried a tool out.
    McpToolTried = "mcp.tool_tried",
    /// A key to sign access tokens with was made.
    PkiTokenKeyCreated = "pki.token_key_created",
    /// The secret that DPoP nonces are made with was made.
    PkiDpopNonceKeyCreated = "pki.dpop_nonce_key_created",
    /// A certificate was issued.
    PkiCertificateIssued = "pki.certificate_issued",
    /// A certificate was revoked.
    PkiCertificateRevoked = "pki.certificate_revoked",
    /// A revocation list was issued.
    PkiCrlIssued = "pki.crl_issued",
    /// A certificate for our own TLS listener was issued.
    PkiTlsCertificateIssued = "pki.tls_certificate_issued",
    /// A replaced Org CA retired: its key is destroyed, and what stood under it is not accepted any more.
    PkiOverlapEnded = "pki.overlap_ended",
    /// An operator signed in to the dashboard.
    DashboardLogin = "dashboard.login",
    /// A sign-in to the dashboard was refused.
    DashboardLoginFailed = "dashboard.login_failed",
    /// An operator signed out of the dashboard.
    DashboardLogout = "dashboard.logout",
    /// An operator was given a secret of their own.
    OperatorAdded = "admin.operator_added",
    /// An operator was given another role.
    OperatorRoleChanged = "admin.operator_role_changed",
    /// An operator was deactivated.
    OperatorDeactivated = "admin.operator_deactivated",
    /// An operator was given another secret.
    OperatorSecretReset = "admin.operator_secret_reset",
    /// The hash of a predecessor's password was replaced by a stronger one.
    OperatorSecretRehashed = "admin.operator_secret_rehashed",
    /// The head of this chain was signed.
    AuditHeadSigned = "audit.head_signed",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_name_and_no_two_share_one() {
        for event_type in EventType::ALL {
            assert_eq!(EventType::parse(event_type.as_str()), Some(*event_type));
        }
        assert_eq!(EventType::parse("admin.update_applied"), Some(EventType::UpdateApplied));
        assert_eq!(EventType::parse("updates.apply"), None);
        assert_eq!(EventType::parse(""), None);
    }
}
