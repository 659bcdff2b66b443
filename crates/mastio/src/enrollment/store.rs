//! Rows of agents.

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;

use super::Agent;
use super::lifecycle::Expiring;
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

/// A page of active agents whose certificate ends before an instant, after an id.
pub async fn page_expiring(
    tx: &mut impl Query,
    before: UnixTime,
    after: &str,
    limit: i64,
) -> Result<Vec<Agent>, StoreError> {
    tx.rows(
        "SELECT a.agent_id, a.display_name, a.capabilities, a.cert_pem, a.is_active, a.enrollment_method, a.dpop_jkt, \
         a.principal_type, a.previous_cert_pem, a.previous_dpop_jkt, a.previous_grace_period_expires_at, a.federated, \
         a.created_at FROM agent_certificates c JOIN internal_agents a ON a.agent_id = c.agent_id \
         WHERE c.not_after < $1 AND a.is_active = 1 AND a.agent_id > $2 ORDER BY a.agent_id LIMIT $3",
        values![before.0, after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// How many active agents' certificates have ended or end soon.
pub async fn expiring(tx: &mut impl Query, now: UnixTime) -> Result<Expiring, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(CASE WHEN c.not_after < $1 THEN 1 END), \
             COUNT(CASE WHEN c.not_after >= $1 AND c.not_after < $2 THEN 1 END), \
             COUNT(CASE WHEN c.not_after >= $1 THEN 1 END) FROM agent_certificates c \
             JOIN internal_agents a ON a.agent_id = c.agent_id WHERE c.not_after < $3 AND a.is_active = 1",
            values![now.0, now.plus(7 * 86_400).0, now.plus(30 * 86_400).0],
        )
        .await?;
    let Some(row) = row else { return Ok(Expiring::default()) };
    Ok(Expiring { expired: row.integer(0)?, within_7_days: row.integer(1)?, within_30_days: row.integer(2)? })
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

/// What proves an agent, with what did before and still does for a while.
pub struct Credentials {
    /// Leaf and what follows it, PEM.
    pub cert_pem: Option<String>,
    /// Thumbprint of the persistent DPoP key.
    pub dpop_jkt: Option<String>,
    /// The certificate before.
    pub previous_cert_pem: Option<String>,
    /// The DPoP key before.
    pub previous_dpop_jkt: Option<String>,
    /// Until when the two above are accepted.
    pub previous_until: Option<UnixTime>,
}

/// Under which key of `proxy_config` an agent's private key lies, where we hold it.
#[must_use]
pub fn key_name(agent_id: &str) -> String {
    format!("agent_key:{agent_id}")
}

/// Inserts an agent.
pub async fn insert(tx: &mut WriteTx, agent: &Agent, spiffe_id: &str) -> Result<(), StoreError> {
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
            agent.enrollment.as_str(),
            spiffe_id,
            agent.dpop_jkt.clone(),
            &agent.principal_type
        ],
    )
    .await
    .map(drop)
}

/// Writes an agent's credentials. The facts of a certificate that changes have to follow.
pub async fn set_credentials(
    tx: &mut WriteTx,
    agent_id: &str,
    credentials: &Credentials,
) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE internal_agents SET cert_pem = $2, dpop_jkt = $3, previous_cert_pem = $4, previous_dpop_jkt = $5, \
         previous_grace_period_expires_at = $6 WHERE agent_id = $1",
        values![
            agent_id,
            credentials.cert_pem.clone(),
            credentials.dpop_jkt.clone(),
            credentials.previous_cert_pem.clone(),
            credentials.previous_dpop_jkt.clone(),
            credentials.previous_until.map(UnixTime::to_rfc3339),
        ],
    )
    .await
    .map(drop)
}

/// Writes what an agent may do.
pub async fn set_capabilities(
    tx: &mut WriteTx,
    agent_id: &str,
    capabilities: &[String],
) -> Result<(), StoreError> {
    let capabilities = serde_json::to_string(capabilities).unwrap_or_else(|_| "[]".to_owned());
    tx.execute(
        "UPDATE internal_agents SET capabilities = $2 WHERE agent_id = $1",
        values![agent_id, capabilities],
    )
    .await
    .map(drop)
}

/// Sets an agent aside, or takes it back.
pub async fn set_active(
    tx: &mut WriteTx,
    agent_id: &str,
    active: bool,
    now: UnixTime,
) -> Result<(), StoreError> {
    let revoked_at = (!active).then(|| now.to_rfc3339());
    tx.execute(
        "UPDATE internal_agents SET is_active = $2, revoked_at = $3 WHERE agent_id = $1",
        values![agent_id, active, revoked_at],
    )
    .await
    .map(drop)
}

/// Forgets the private key of an agent, where we hold it.
pub async fn forget_key(tx: &mut WriteTx, agent_id: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM proxy_config WHERE key = $1", values![key_name(agent_id)]).await.map(drop)
}

/// Deletes an agent's row and what would be the next one's of its name: bindings to tools, former certificates. The
/// facts of its certificate go with the row.
pub async fn delete(tx: &mut WriteTx, agent_id: &str) -> Result<(), StoreError> {
    for statement in [
        "DELETE FROM local_agent_resource_bindings WHERE agent_id = $1",
        "DELETE FROM superseded_certificates WHERE agent_id = $1",
        "DELETE FROM agent_certificates WHERE agent_id = $1",
        "DELETE FROM internal_agents WHERE agent_id = $1",
    ] {
        tx.execute(statement, values![agent_id]).await?;
    }
    Ok(())
}
