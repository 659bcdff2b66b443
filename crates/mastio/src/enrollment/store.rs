//! Rows of agents.

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;

use super::Agent;
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::updates::halt::EnrollmentType;
use crate::values;

fn read(row: &Row) -> Result<Agent, StoreError> {
    let capabilities = row.text(2)?;
    let cert_pem = row.optional_text(3)?;
    Ok(Agent {
        agent_id: row.text(0)?,
        display_name: row.text(1)?,
        capabilities: serde_json::from_str(&capabilities).unwrap_or_default(),
        leaf: cert_pem.as_deref().and_then(|pem| Certificate::from_pem(pem).ok()),
        cert_pem,
        is_active: row.truth(4)?,
        enrollment: EnrollmentType::from_tag(row.optional_text(5)?.as_deref()),
        dpop_jkt: row.optional_text(6)?,
        principal_type: row.text(7)?,
        previous_cert_pem: row.optional_text(8)?,
        previous_dpop_jkt: row.optional_text(9)?,
        previous_until: row.optional_text(10)?.and_then(|text| UnixTime::parse(&text)),
        federated: row.truth(11)?,
        created_at: row.text(12)?,
    })
}

/// One agent.
pub async fn agent(tx: &mut impl Query, agent_id: &str) -> Result<Option<Agent>, StoreError> {
    let row = tx
        .row(
            "SELECT agent_id, display_name, capabilities, cert_pem, is_active, enrollment_method, dpop_jkt, principal_type, \
             previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at \
             FROM internal_agents WHERE agent_id = $1",
            values![agent_id],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

/// A page of agents after an id.
pub async fn page(tx: &mut impl Query, after: &str, limit: i64) -> Result<Vec<Agent>, StoreError> {
    tx.rows(
        "SELECT agent_id, display_name, capabilities, cert_pem, is_active, enrollment_method, dpop_jkt, principal_type, \
         previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at \
         FROM internal_agents WHERE agent_id > $1 ORDER BY agent_id LIMIT $2",
        values![after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// How many agents there are by enrollment type and activity.
pub async fn counts(tx: &mut impl Query) -> Result<Vec<(EnrollmentType, bool, i64)>, StoreError> {
    let mut counts: Vec<(EnrollmentType, bool, i64)> = Vec::new();
    for row in tx
        .rows(
            "SELECT enrollment_method, is_active, COUNT(*) FROM internal_agents GROUP BY enrollment_method, is_active",
            &[],
        )
        .await?
    {
        // Several stored tags are one type.
        let (kind, active) = (EnrollmentType::from_tag(row.optional_text(0)?.as_deref()), row.truth(1)?);
        let count = row.integer(2)?;
        match counts.iter_mut().find(|(other, is_active, _)| (*other, *is_active) == (kind, active)) {
            Some((_, _, sum)) => *sum += count,
            None => counts.push((kind, active, count)),
        }
    }
    Ok(counts)
}

/// Whether a certificate is a former one of this agent.
pub async fn is_superseded(
    tx: &mut impl Query,
    fingerprint: &str,
    agent_id: &str,
) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT 1 FROM superseded_certificates WHERE fingerprint = $1 AND agent_id = $2",
            values![fingerprint, agent_id],
        )
        .await?;
    Ok(row.is_some())
}

/// Inserts an agent.
pub async fn insert(
    tx: &mut WriteTx,
    agent: &Agent,
    method: &str,
    spiffe_id: &str,
) -> Result<(), StoreError> {
    let capabilities = serde_json::to_string(&agent.capabilities).unwrap_or_else(|_| "[]".to_owned());
    tx.execute(
        "INSERT INTO internal_agents (agent_id, display_name, capabilities, cert_pem, created_at, is_active, federated, \
         enrollment_method, spiffe_id, enrolled_at, dpop_jkt, principal_type) \
         VALUES ($1, $2, $3, $4, $5, 1, $6, $7, $8, $5, $9, $10)",
        values![
            &agent.agent_id,
            &agent.display_name,
            capabilities,
            agent.cert_pem.clone(),
            &agent.created_at,
            agent.federated,
            method,
            spiffe_id,
            agent.dpop_jkt.clone(),
            &agent.principal_type
        ],
    )
    .await
    .map(drop)
}

/// Sets the pinned DPoP key; a changed one puts the former into its grace. False: no such agent.
pub async fn set_dpop_jkt(
    tx: &mut WriteTx,
    agent_id: &str,
    jkt: &str,
    grace_until: UnixTime,
) -> Result<bool, StoreError> {
    let touched = tx
        .execute(
            "UPDATE internal_agents SET \
             previous_dpop_jkt = CASE WHEN dpop_jkt IS NOT NULL AND dpop_jkt <> $2 THEN dpop_jkt ELSE previous_dpop_jkt END, \
             previous_grace_period_expires_at = CASE WHEN dpop_jkt IS NOT NULL AND dpop_jkt <> $2 THEN $3 \
             ELSE previous_grace_period_expires_at END, dpop_jkt = $2 WHERE agent_id = $1",
            values![agent_id, jkt, grace_until.to_rfc3339()],
        )
        .await?;
    Ok(touched > 0)
}

/// Deactivates an agent. False: no such agent.
pub async fn deactivate(tx: &mut WriteTx, agent_id: &str, now: UnixTime) -> Result<bool, StoreError> {
    let touched = tx
        .execute(
            "UPDATE internal_agents SET is_active = 0, revoked_at = COALESCE(revoked_at, $2) WHERE agent_id = $1",
            values![agent_id, now.to_rfc3339()],
        )
        .await?;
    Ok(touched > 0)
}
