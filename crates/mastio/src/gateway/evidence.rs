//! Arguments and results of calls, kept sealed for as long as an operator has set for the tool.
//!
//! Nothing is kept unless it is asked for. What is kept is written in the commit of the event that speaks of it, which
//! has its digest; it is read by operators only, one call at a time, and each reading is an event of its own. When its
//! time is over it is deleted, which is an event too.

use mastio_core::audit::event::EventType;
use mastio_core::time::UnixTime;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::definition::sha256_hex;
use super::servers::Tool;
use super::{Caller, Gateway, GatewayError, canonical, event, store};
use crate::http::context::Context;
use crate::store::group::Kept;

/// Days that an operator may set at most.
pub const DAYS_MAX: i64 = 3650;
/// Bytes of what is kept of arguments, or of a result.
const CONTENT_BYTES_MAX: usize = 1024 * 1024;
/// Calls in one answer.
const CALLS_SHOWN_MAX: i64 = 1000;
/// Calls that are deleted at once.
const DELETED_AT_ONCE_MAX: i64 = 1000;

/// What to keep of one call.
#[derive(Debug, Clone)]
pub(super) struct Keeping {
    /// Names it in both events.
    pub evidence_id: String,
    pub tool: String,
    pub agent_id: String,
    pub request_id: String,
    pub called_at: UnixTime,
    pub expires_at: UnixTime,
}

/// A call of which something is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// As in the call's events.
    pub evidence_id: String,
    /// The tool.
    pub tool: String,
    /// `org::name`.
    pub agent_id: String,
    /// Of the request that made the call.
    pub request_id: String,
    /// RFC 3339.
    pub called_at: String,
    /// When it is deleted, RFC 3339.
    pub expires_at: String,
    /// Bytes of the arguments.
    pub arguments_bytes: i64,
    /// Bytes of the result; absent where there is none, or it was too large.
    pub result_bytes: Option<i64>,
}

fn place(evidence_id: &str, part: &str) -> String {
    format!("mcp_evidence/{evidence_id}/{part}/sealed")
}

impl Gateway {
    /// What to keep of a call of this tool; nothing for a tool without a retention.
    pub(super) fn keeping(&self, tool: &Tool, caller: &Caller, context: &Context) -> Option<Keeping> {
        let days = tool.retention_days?.clamp(1, DAYS_MAX);
        let now = context.now.seconds();
        Some(Keeping {
            // Sorts by its time, finer than the second that is stored.
            evidence_id: self.entropy.ulid(context.now),
            tool: tool.name.clone(),
            agent_id: canonical(&self.org_id, &caller.agent_id),
            request_id: context.request_id.clone(),
            called_at: now,
            expires_at: now.plus(days * 86_400),
        })
    }

    /// A part of a call, sealed: `arguments` or `result`. Nothing for a result that is too large.
    ///
    /// Errors: [`GatewayError::Sealing`], which only the crypto library can cause.
    pub(super) fn sealed(
        &self,
        keeping: &Keeping,
        part: &'static str,
        content: &RawValue,
    ) -> Result<Option<Kept>, GatewayError> {
        let text = content.get();
        if text.len() > CONTENT_BYTES_MAX {
            return Ok(None);
        }
        let sealed = self
            .sealing
            .seal(&place(&keeping.evidence_id, part), text.as_bytes())
            .map_err(|_| GatewayError::Sealing)?;
        Ok(Some(Kept {
            evidence_id: keeping.evidence_id.clone(),
            part,
            tool: keeping.tool.clone(),
            agent_id: keeping.agent_id.clone(),
            request_id: keeping.request_id.clone(),
            called_at: keeping.called_at,
            expires_at: keeping.expires_at,
            digest: sha256_hex(text.as_bytes()),
            bytes: i64::try_from(text.len()).unwrap_or(i64::MAX),
            sealed,
        }))
    }

    /// Calls of which something is kept, newest first: of a tool or an agent where these are given, those that follow `after`.
    ///
    /// Errors: [`GatewayError::Store`].
    pub async fn list_evidence(
        &self,
        tool: Option<&str>,
        agent_id: Option<&str>,
        after: Option<&str>,
    ) -> Result<Vec<Evidence>, GatewayError> {
        let agent_id = agent_id.map(|agent_id| canonical(&self.org_id, agent_id));
        let mut tx = self.store.read().await?;
        Ok(store::evidence(&mut tx, tool, agent_id.as_deref(), after, CALLS_SHOWN_MAX).await?)
    }

    /// What is kept of one call, opened. The event that says who read it is durable before it is shown.
    ///
    /// Errors: [`GatewayError::UnknownEvidence`], [`GatewayError::Sealing`] for what does not open or is not what was kept.
    pub async fn read_evidence(
        &self,
        actor: &str,
        now: UnixTime,
        evidence_id: &str,
    ) -> Result<Value, GatewayError> {
        let mut tx = self.store.write().await?;
        let parts = store::evidence_parts(&mut tx, evidence_id, now).await?;
        let first = parts.first().ok_or_else(|| GatewayError::UnknownEvidence(evidence_id.to_owned()))?;
        let (tool, agent_id) = (first.tool.clone(), first.agent_id.clone());
        let mut shown = json!({ "evidence_id": evidence_id, "tool": tool, "agent_id": agent_id });
        for part in &parts {
            let text = self
                .sealing
                .open(&place(evidence_id, &part.part), &part.sealed)
                .map_err(|_| GatewayError::Sealing)?;
            if sha256_hex(text.as_bytes()) != part.digest {
                return Err(GatewayError::Sealing);
            }
            let content: Value = serde_json::from_str(&text)?;
            shown[part.part.as_str()] = content;
            shown[format!("{}_digest", part.part)] = json!(part.digest);
        }
        let details = json!({ "evidence_id": evidence_id, "tool": tool, "agent_id": agent_id });
        tx.commit(&[event(EventType::McpEvidenceRead, actor, details)]).await?;
        Ok(shown)
    }

    /// Deletes what is over its time. Gives how many parts went.
    ///
    /// Errors: [`GatewayError::Store`].
    pub async fn delete_expired_evidence(&self, now: UnixTime) -> Result<u64, GatewayError> {
        let mut deleted = 0;
        loop {
            if !store::has_expired_evidence(&mut self.store.read().await?, now).await? {
                return Ok(deleted);
            }
            let mut tx = self.store.write().await?;
            let gone = store::delete_expired_evidence(&mut tx, now, DELETED_AT_ONCE_MAX).await?;
            if gone == 0 {
                // Another replica was first.
                return Ok(deleted);
            }
            let details = json!({ "parts": gone, "expired_before": now.to_rfc3339() });
            tx.commit(&[event(EventType::McpEvidenceDeleted, "system", details)]).await?;
            deleted += gone;
        }
    }
}
