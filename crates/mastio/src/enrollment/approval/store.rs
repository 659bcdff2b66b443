//! Rows of requests for an identity.

use mastio_core::time::UnixTime;

use super::{Decision, EnrollmentRequest, PrincipalType};
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::values;

fn read(row: &Row) -> Result<EnrollmentRequest, StoreError> {
    let decided_at = row.optional_integer(14)?.map(UnixTime);
    Ok(EnrollmentRequest {
        session_id: row.text(0)?,
        decision: match row.text(1)?.as_str() {
            "approved" => Decision::Approved { agent_id: row.text(12)? },
            "rejected" => Decision::Rejected { reason: row.text(13)? },
            _ => Decision::Open,
        },
        spki_pem: row.text(2)?,
        spki_sha256: row.text(3)?,
        principal_type: PrincipalType::from_tag(&row.text(4)?),
        dpop_jkt: row.optional_text(5)?,
        requester_name: row.text(6)?,
        requester_email: row.text(7)?,
        reason: row.optional_text(8)?,
        device_info: row.optional_text(9)?,
        source: row.text(10)?,
        created_at: UnixTime(row.integer(11)?),
        expires_at: UnixTime(row.integer(15)?),
        decided_at,
        decided_by: row.optional_text(16)?,
    })
}

/// One request.
pub async fn request(tx: &mut impl Query, session_id: &str) -> Result<Option<EnrollmentRequest>, StoreError> {
    let row = tx
        .row(
            "SELECT session_id, status, spki_pem, spki_sha256, principal_type, dpop_jkt, requester_name, requester_email, \
             reason, device_info, source, created_at, agent_id, rejection_reason, decided_at, expires_at, decided_by \
             FROM enrollment_requests WHERE session_id = $1",
            values![session_id],
        )
        .await?;
    row.as_ref().map(read).transpose()
}

/// A page of requests after a session id; `status` is one of the stored three. Of the pending ones, `open_at` chooses
/// those that have not expired then, or with `expired` those that have.
pub async fn page(
    tx: &mut impl Query,
    status: &str,
    expired: bool,
    open_at: UnixTime,
    after: &str,
    limit: i64,
) -> Result<Vec<EnrollmentRequest>, StoreError> {
    tx.rows(
        "SELECT session_id, status, spki_pem, spki_sha256, principal_type, dpop_jkt, requester_name, requester_email, \
         reason, device_info, source, created_at, agent_id, rejection_reason, decided_at, expires_at, decided_by \
         FROM enrollment_requests WHERE status = $1 AND session_id > $2 \
         AND (status <> 'pending' OR (CASE WHEN expires_at <= $3 THEN 1 ELSE 0 END) = $4) \
         ORDER BY session_id LIMIT $5",
        values![status, after, open_at.0, expired, limit],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// How many requests wait for a decision: all, and those of one source.
pub async fn waiting(tx: &mut impl Query, source: &str, now: UnixTime) -> Result<(i64, i64), StoreError> {
    let row = tx
        .row(
            "SELECT COUNT(*), COUNT(CASE WHEN source = $1 THEN 1 END) FROM enrollment_requests \
             WHERE status = 'pending' AND expires_at > $2",
            values![source, now.0],
        )
        .await?;
    match row {
        Some(row) => Ok((row.integer(0)?, row.integer(1)?)),
        None => Ok((0, 0)),
    }
}

/// Keeps a new request.
pub async fn insert(tx: &mut WriteTx, request: &EnrollmentRequest) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO enrollment_requests (session_id, status, spki_pem, spki_sha256, principal_type, dpop_jkt, \
         requester_name, requester_email, reason, device_info, source, created_at, expires_at) \
         VALUES ($1, 'pending', $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        values![
            &request.session_id,
            &request.spki_pem,
            &request.spki_sha256,
            request.principal_type.as_str(),
            request.dpop_jkt.clone(),
            &request.requester_name,
            &request.requester_email,
            request.reason.clone(),
            request.device_info.clone(),
            &request.source,
            request.created_at.0,
            request.expires_at.0,
        ],
    )
    .await
    .map(drop)
}

/// Writes what was decided of a request that was open.
pub async fn decide(
    tx: &mut WriteTx,
    session_id: &str,
    decision: &Decision,
    actor: &str,
    now: UnixTime,
) -> Result<(), StoreError> {
    let (status, agent_id, reason) = match decision {
        Decision::Open => return Ok(()),
        Decision::Approved { agent_id } => ("approved", Some(agent_id.clone()), None),
        Decision::Rejected { reason } => ("rejected", None, Some(reason.clone())),
    };
    tx.execute(
        "UPDATE enrollment_requests SET status = $2, agent_id = $3, rejection_reason = $4, decided_at = $5, \
         decided_by = $6 WHERE session_id = $1 AND status = 'pending'",
        values![session_id, status, agent_id, reason, now.0, actor],
    )
    .await
    .map(drop)
}

/// Forgets the granted requests of an agent that is deleted.
pub async fn forget_agent(tx: &mut WriteTx, agent_id: &str) -> Result<(), StoreError> {
    tx.execute("DELETE FROM enrollment_requests WHERE agent_id = $1", values![agent_id]).await.map(drop)
}
