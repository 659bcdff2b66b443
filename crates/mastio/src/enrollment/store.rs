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
        last_revocation: row.optional_integer(13)?.map(UnixTime),
    })
}

/// One agent.
pub async fn agent(tx: &mut impl Query, agent_id: &str) -> Result<Option<Agent>, StoreError> {
    let row = tx
        .row(
            "SELECT agent_id, display_name, capabilities, cert_pem, is_active, enrollment_method, dpop_jkt, principal_type, \
             previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at, \
             (SELECT MAX(r.revoked_at) FROM revoked_certificates r WHERE r.agent_id = internal_agents.agent_id) \
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
         previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at, \
         (SELECT MAX(r.revoked_at) FROM revoked_certificates r WHERE r.agent_id = internal_agents.agent_id) \
         FROM internal_agents WHERE agent_id > $1 ORDER BY agent_id LIMIT $2",
        values![after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// A page of active agents whose certificate ends before an instant, after an id.
///
/// The `+` and the `|| ''` keep SQLite on the index of ends: by that of states or ids it would look at the whole fleet.
pub async fn page_expiring(
    tx: &mut impl Query,
    before: UnixTime,
    after: &str,
    limit: i64,
) -> Result<Vec<Agent>, StoreError> {
    tx.rows(
        "SELECT a.agent_id, a.display_name, a.capabilities, a.cert_pem, a.is_active, a.enrollment_method, a.dpop_jkt, \
         a.principal_type, a.previous_cert_pem, a.previous_dpop_jkt, a.previous_grace_period_expires_at, a.federated, \
         a.created_at, (SELECT MAX(r.revoked_at) FROM revoked_certificates r WHERE r.agent_id = a.agent_id) \
         FROM agent_certificates c JOIN internal_agents a ON a.agent_id = c.agent_id \
         WHERE c.not_after < $1 AND +a.is_active = 1 AND a.agent_id || '' > $2 ORDER BY a.agent_id || '' LIMIT $3",
        values![before.0, after, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// A page of agents after an id that are active, or that are not.
pub async fn page_by_state(
    tx: &mut impl Query,
    active: bool,
    after: &str,
    limit: i64,
) -> Result<Vec<Agent>, StoreError> {
    tx.rows(
        "SELECT agent_id, display_name, capabilities, cert_pem, is_active, enrollment_method, dpop_jkt, principal_type, \
         previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at, \
         (SELECT MAX(r.revoked_at) FROM revoked_certificates r WHERE r.agent_id = internal_agents.agent_id) \
         FROM internal_agents WHERE is_active = $3 AND agent_id > $1 ORDER BY agent_id LIMIT $2",
        values![after, limit, active],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// A page of agents after an id that were enrolled in this way; the expression is [`EnrollmentType::from_tag`], and that
/// of an index.
pub async fn page_by_enrollment(
    tx: &mut impl Query,
    enrollment: EnrollmentType,
    after: &str,
    limit: i64,
) -> Result<Vec<Agent>, StoreError> {
    tx.rows(
        "SELECT agent_id, display_name, capabilities, cert_pem, is_active, enrollment_method, dpop_jkt, principal_type, \
         previous_cert_pem, previous_dpop_jkt, previous_grace_period_expires_at, federated, created_at, \
         (SELECT MAX(r.revoked_at) FROM revoked_certificates r WHERE r.agent_id = internal_agents.agent_id) \
         FROM internal_agents WHERE (CASE WHEN enrollment_method = 'byoca' THEN 'byoca' \
         WHEN enrollment_method IN ('spire', 'spiffe') THEN 'spire' ELSE 'connector' END) = $3 \
         AND agent_id > $1 ORDER BY agent_id LIMIT $2",
        values![after, limit, enrollment.as_str()],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// How many active agents' certificates have ended or end soon. The `+` is that of [`page_expiring`].
pub async fn expiring(tx: &mut impl Query, now: UnixTime) -> Result<Expiring, StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(CASE WHEN c.not_after < $1 THEN 1 END), \
             COUNT(CASE WHEN c.not_after >= $1 AND c.not_after < $2 THEN 1 END), \
             COUNT(CASE WHEN c.not_after >= $1 THEN 1 END) FROM agent_certificates c \
             JOIN internal_agents a ON a.agent_id = c.agent_id WHERE c.not_after < $3 AND +a.is_active = 1",
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

/// Whether a certificate is a former one of this agent. What an update has only staged does not count.
pub async fn is_superseded(
    tx: &mut impl Query,
    fingerprint: &str,
    agent_id: &str,
) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT 1 FROM superseded_certificates s WHERE s.fingerprint = $1 AND s.agent_id = $2 \
             AND NOT EXISTS (SELECT 1 FROM update_runs r WHERE r.run_id = s.superseded_by AND r.committed_at IS NULL)",
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
pub async fn insert(tx: &mut WriteTx, agent: &Agent, spiffe_id: Option<&str>) -> Result<(), StoreError> {
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
        "DELETE FROM spire_identities WHERE agent_id = $1",
        "DELETE FROM internal_agents WHERE agent_id = $1",
    ] {
        tx.execute(statement, values![agent_id]).await?;
    }
    Ok(())
}

/// A former certificate that is accepted while its agent has the same key.
pub struct Superseded {
    /// SHA-256 of its DER, lowercase hex.
    pub fingerprint: String,
    /// Its serial, where it is known.
    pub serial: Option<String>,
    /// Key id of its issuer, where it is known.
    pub issuer_key_id: Option<String>,
    /// When it ends, where it is known.
    pub not_after: Option<UnixTime>,
}

/// An agent's former certificates.
pub async fn superseded(tx: &mut impl Query, agent_id: &str) -> Result<Vec<Superseded>, StoreError> {
    tx.rows(
        "SELECT fingerprint, serial, issuer_key_id, not_after FROM superseded_certificates WHERE agent_id = $1 \
         ORDER BY fingerprint",
        values![agent_id],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(Superseded {
            fingerprint: row.text(0)?,
            serial: row.optional_text(1)?,
            issuer_key_id: row.optional_text(2)?,
            not_after: row.optional_integer(3)?.map(UnixTime),
        })
    })
    .collect()
}

/// The agents whose present or former certificate has this serial.
pub async fn agents_of_serial(tx: &mut impl Query, serial: &str) -> Result<Vec<String>, StoreError> {
    tx.rows(
        "SELECT agent_id FROM agent_certificates WHERE serial = $1 UNION \
         SELECT agent_id FROM superseded_certificates WHERE serial = $1 ORDER BY agent_id LIMIT 100",
        values![serial],
    )
    .await?
    .iter()
    .map(|row| row.text(0))
    .collect()
}

/// A page of agents that have a previous certificate, with it, after an id.
pub async fn previous_certificates(
    tx: &mut impl Query,
    after: &str,
    limit: i64,
) -> Result<Vec<(String, String)>, StoreError> {
    tx.rows(
        "SELECT agent_id, previous_cert_pem FROM internal_agents WHERE previous_cert_pem IS NOT NULL AND agent_id > $1 \
         ORDER BY agent_id LIMIT $2",
        values![after, limit],
    )
    .await?
    .iter()
    .map(|row| Ok((row.text(0)?, row.text(1)?)))
    .collect()
}

/// An agent that was enrolled with an SVID: its id, its SPIFFE id, and the bundle that vouches for it.
pub struct SpireIdentity {
    /// The agent.
    pub agent_id: String,
    /// What its SVIDs name.
    pub spiffe_id: String,
    /// Trust anchors, PEM.
    pub bundle_pem: String,
}

fn read_spire(row: &Row) -> Result<SpireIdentity, StoreError> {
    Ok(SpireIdentity { agent_id: row.text(0)?, spiffe_id: row.text(1)?, bundle_pem: row.text(2)? })
}

/// The SPIFFE identity of an agent.
pub async fn spire_of_agent(
    tx: &mut impl Query,
    agent_id: &str,
) -> Result<Option<SpireIdentity>, StoreError> {
    let row = tx
        .row(
            "SELECT agent_id, spiffe_id, bundle_pem FROM spire_identities WHERE agent_id = $1",
            values![agent_id],
        )
        .await?;
    row.as_ref().map(read_spire).transpose()
}

/// The agent of a SPIFFE id.
pub async fn spire_of_id(tx: &mut impl Query, spiffe_id: &str) -> Result<Option<SpireIdentity>, StoreError> {
    let row = tx
        .row(
            "SELECT agent_id, spiffe_id, bundle_pem FROM spire_identities WHERE spiffe_id = $1",
            values![spiffe_id],
        )
        .await?;
    row.as_ref().map(read_spire).transpose()
}

/// Keeps an agent's SPIFFE identity.
pub async fn set_spire(tx: &mut WriteTx, identity: &SpireIdentity) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO spire_identities (agent_id, spiffe_id, bundle_pem) VALUES ($1, $2, $3) \
         ON CONFLICT (agent_id) DO UPDATE SET spiffe_id = excluded.spiffe_id, bundle_pem = excluded.bundle_pem",
        values![&identity.agent_id, &identity.spiffe_id, &identity.bundle_pem],
    )
    .await
    .map(drop)
}

/// An agent as other agents see it.
pub struct Peer {
    /// Its id.
    pub agent_id: String,
    /// For people.
    pub display_name: String,
    /// What it may do.
    pub capabilities: Vec<String>,
}

/// The first active agents by id.
pub async fn peers(tx: &mut impl Query, limit: i64) -> Result<Vec<Peer>, StoreError> {
    tx.rows(
        "SELECT agent_id, display_name, capabilities FROM internal_agents WHERE is_active = 1 ORDER BY agent_id LIMIT $1",
        values![limit],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(Peer {
            agent_id: row.text(0)?,
            display_name: row.text(1)?,
            capabilities: serde_json::from_str(&row.text(2)?).unwrap_or_default(),
        })
    })
    .collect()
}
