//! What a migration sees: the PKI state in force, consistent, without the fleet's rows.
//!
//! What a check asks of the fleet is answered from indexes, so that the detector stays fast whatever its size.

use std::sync::Arc;

use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;

use super::error::UpdateError;
use super::halt::EnrollmentType;
use crate::pki::Authority;
use crate::pki::keys::PrivateKey;
use crate::pki::store::hex;
use crate::store::Query;
use crate::values;

/// The state at one epoch.
pub struct View {
    /// The certificate authority.
    pub authority: Arc<Authority>,
    /// When the view was taken.
    pub now: UnixTime,
    /// `status` of this migration's row, where there is one.
    pub row_status: Option<String>,
    /// What a predecessor's torn run left, where its row is still open.
    pub torn: Option<Torn>,
    /// Ids of all updates whose row is open: `pending` or `failed`.
    pub open: Vec<String>,
    /// Whether the fleet has an enrollment tag that the predecessor alone wrote.
    pub has_old_tags: bool,
    /// Whether a leaf that the Mastio issued lacks a part of the agent profile.
    pub has_incomplete_leaves: bool,
}

/// A predecessor's apply that stopped half-way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// Mastio-issued leaves under the current Org CA or intermediate.
    pub on_current_chain: i64,
    /// All Mastio-issued leaves.
    pub leaves: i64,
    /// Whether the intermediate is signed by an Org CA that is no longer current.
    pub intermediate_is_foreign: bool,
}

impl View {
    /// Reads the view for one migration.
    pub async fn read(
        tx: &mut impl Query,
        authority: Arc<Authority>,
        migration_id: &str,
        now: UnixTime,
    ) -> Result<Self, UpdateError> {
        let row_status = tx
            .row("SELECT status FROM pending_updates WHERE migration_id = $1", values![migration_id])
            .await?
            .map(|row| row.text(0))
            .transpose()?;
        let open = matches!(row_status.as_deref(), Some("pending" | "failed"));
        let snapshot_of_predecessor = super::store::predecessor_run(tx, migration_id).await?.is_some();
        let torn =
            if open && snapshot_of_predecessor { Some(Torn::read(tx, &authority).await?) } else { None };
        let open = tx
            .rows(
                "SELECT migration_id FROM pending_updates WHERE status IN ('pending', 'failed') ORDER BY 1",
                &[],
            )
            .await?
            .iter()
            .map(|row| row.text(0))
            .collect::<Result<_, _>>()?;
        let has_old_tags = tx
            .row("SELECT 1 FROM internal_agents WHERE enrollment_method IN ('admin', 'spiffe') LIMIT 1", &[])
            .await?
            .is_some();
        let has_incomplete_leaves = tx
            .row(
                "SELECT 1 FROM agent_certificates c JOIN internal_agents a ON a.agent_id = c.agent_id \
                 WHERE c.profile_gaps > '' AND COALESCE(a.enrollment_method, '') NOT IN ('byoca', 'spire', 'spiffe') \
                 LIMIT 1",
                &[],
            )
            .await?
            .is_some();
        Ok(Self { authority, now, row_status, torn, open, has_old_tags, has_incomplete_leaves })
    }

    /// Whether the row of an update is open.
    #[must_use]
    pub fn is_open(&self, migration_id: &str) -> bool {
        self.open.iter().any(|id| id == migration_id)
    }

    /// The Org CA's key. Errors: [`UpdateError::Refused`] where it is held elsewhere; checks say so before.
    pub fn org_ca_key(&self) -> Result<&PrivateKey, UpdateError> {
        self.authority.org_ca_key.as_deref().ok_or(UpdateError::KeyMissing("Org CA"))
    }
}

impl Torn {
    async fn read(tx: &mut impl Query, authority: &Authority) -> Result<Self, UpdateError> {
        let root = hex(&authority.org_ca.key_id());
        let intermediate = authority.mastio_ca.as_ref().map_or_else(String::new, |ca| hex(&ca.key_id()));
        let row = tx
            .row(
                "SELECT COUNT(*), CAST(COALESCE(SUM(CASE WHEN c.issuer_key_id IN ($1, $2) THEN 1 ELSE 0 END), 0) AS BIGINT) \
                 FROM internal_agents a JOIN agent_certificates c ON c.agent_id = a.agent_id \
                 WHERE COALESCE(a.enrollment_method, '') NOT IN ('byoca', 'spire', 'spiffe')",
                values![root, intermediate],
            )
            .await?
            .ok_or(UpdateError::Store(crate::store::StoreError::HeadMissing))?;
        Ok(Self {
            leaves: row.integer(0)?,
            on_current_chain: row.integer(1)?,
            intermediate_is_foreign: authority
                .mastio_ca
                .as_ref()
                .is_some_and(|ca: &Certificate| ca.verify_signature(&authority.org_ca).is_err()),
        })
    }

    /// Whether anything is left to repair.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.on_current_chain < self.leaves || self.intermediate_is_foreign
    }
}

/// Agents that a migration leaves alone, by enrollment type.
pub async fn not_covered(
    tx: &mut impl Query,
    affects: &[EnrollmentType],
) -> Result<Vec<(EnrollmentType, i64)>, UpdateError> {
    let mut counts = Vec::new();
    for enrollment_type in EnrollmentType::ALL {
        if affects.is_empty() || affects.contains(&enrollment_type) {
            continue;
        }
        let tags: [&str; 2] = match enrollment_type {
            EnrollmentType::Byoca => ["byoca", "byoca"],
            EnrollmentType::Spire => ["spire", "spiffe"],
            EnrollmentType::Connector => ["connector", "admin"],
        };
        let row = tx
            .row(
                "SELECT COUNT(*) FROM internal_agents WHERE is_active = 1 AND enrollment_method IN ($1, $2)",
                values![tags[0], tags[1]],
            )
            .await?;
        let count = row.map(|row| row.integer(0)).transpose()?.unwrap_or(0);
        if count > 0 {
            counts.push((enrollment_type, count));
        }
    }
    Ok(counts)
}
