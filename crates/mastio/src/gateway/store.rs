//! SQL of the gateway: `local_mcp_resources` and `local_agent_resource_bindings`.
//!
//! A predecessor's rows may lack the organisation, which then is ours, and may name an agent by its bare name. So
//! every look-up by agent takes both names.

use super::{Binding, Resource};
use crate::store::{Query, ReadTx, Row, StoreError, WriteTx};
use crate::values;

/// Who holds bindings.
pub(super) struct Holder {
    /// `agent`, `user` or `workload`.
    pub principal_type: String,
    /// `org::name`.
    pub canonical: String,
    /// `name`.
    pub bare: String,
}

/// An enabled tool, as a call needs it.
#[derive(Debug)]
pub(super) struct Tool {
    pub resource_id: String,
    pub endpoint_url: String,
    pub auth_type: String,
    pub auth_secret_ref: Option<String>,
    pub required_capability: Option<String>,
    pub allowed_domains: Vec<String>,
    /// Whether the holder has an active binding.
    pub bound: bool,
}

/// The enabled tool of this name, and whether the holder is bound to it.
pub(super) async fn tool(
    tx: &mut ReadTx,
    org_id: &str,
    holder: &Holder,
    name: &str,
) -> Result<Option<Tool>, StoreError> {
    // Two rows can share a name where one has no organisation: a bound one goes first, then our own.
    let row = tx
        .row(
            "SELECT r.resource_id, r.endpoint_url, r.auth_type, r.auth_secret_ref, r.required_capability, \
             r.allowed_domains, b.binding_id FROM local_mcp_resources r LEFT JOIN local_agent_resource_bindings b \
             ON b.resource_id = r.resource_id AND b.principal_type = $3 AND b.agent_id IN ($4, $5) \
             AND b.revoked_at IS NULL WHERE r.name = $2 AND (r.org_id = $1 OR r.org_id IS NULL) AND r.enabled = 1 \
             ORDER BY CASE WHEN b.binding_id IS NULL THEN 1 ELSE 0 END, \
             CASE WHEN r.org_id IS NULL THEN 1 ELSE 0 END, r.resource_id LIMIT 1",
            values![org_id, name, &holder.principal_type, &holder.canonical, &holder.bare],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    let domains = row.text(5)?;
    Ok(Some(Tool {
        resource_id: row.text(0)?,
        endpoint_url: row.text(1)?,
        auth_type: row.text(2)?,
        auth_secret_ref: row.optional_text(3)?,
        required_capability: capability(&row, 4)?,
        // A list that cannot be read must not widen what is allowed: no host bears the empty name.
        allowed_domains: serde_json::from_str(&domains).unwrap_or_else(|_| vec![String::new()]),
        bound: row.optional_text(6)?.is_some(),
    }))
}

/// A tool in the list that a caller sees.
pub(super) struct BoundTool {
    pub name: String,
    pub description: Option<String>,
    pub input_schema: Option<String>,
    pub required_capability: Option<String>,
}

/// The enabled tools that the holder has an active binding to, by name.
pub(super) async fn bound_tools(
    tx: &mut ReadTx,
    org_id: &str,
    holder: &Holder,
    limit: i64,
) -> Result<Vec<BoundTool>, StoreError> {
    let rows = tx
        .rows(
            "SELECT r.name, r.description, r.input_schema, r.required_capability FROM local_mcp_resources r \
             WHERE (r.org_id = $1 OR r.org_id IS NULL) AND r.enabled = 1 AND r.resource_id IN (\
             SELECT b.resource_id FROM local_agent_resource_bindings b WHERE b.agent_id IN ($3, $4) \
             AND b.principal_type = $2 AND b.revoked_at IS NULL) \
             ORDER BY r.name, CASE WHEN r.org_id IS NULL THEN 1 ELSE 0 END, r.resource_id LIMIT $5",
            values![org_id, &holder.principal_type, &holder.canonical, &holder.bare, limit],
        )
        .await?;
    let mut tools = Vec::with_capacity(rows.len());
    for row in &rows {
        tools.push(BoundTool {
            name: row.text(0)?,
            description: row.optional_text(1)?,
            input_schema: row.optional_text(2)?,
            required_capability: capability(row, 3)?,
        });
    }
    // The one that a call would reach: the first, as in `tool`.
    tools.dedup_by(|later, first| later.name == first.name);
    Ok(tools)
}

/// The predecessor took an empty capability for none; agents that could call must go on.
fn capability(row: &Row, index: usize) -> Result<Option<String>, StoreError> {
    Ok(row.optional_text(index)?.filter(|capability| !capability.is_empty()))
}

/// Whether a resource of this name exists, enabled or not.
pub(super) async fn name_is_taken(tx: &mut WriteTx, org_id: &str, name: &str) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT resource_id FROM local_mcp_resources WHERE name = $2 AND (org_id = $1 OR org_id IS NULL) LIMIT 1",
            values![org_id, name],
        )
        .await?;
    Ok(row.is_some())
}

/// How many resources there are.
pub(super) async fn count_resources(tx: &mut WriteTx) -> Result<i64, StoreError> {
    let row = tx.row("SELECT COUNT(*) FROM local_mcp_resources", &[]).await?;
    row.map_or(Ok(0), |row| row.integer(0))
}

/// Adds a resource.
pub(super) async fn insert_resource(
    tx: &mut WriteTx,
    resource: &Resource,
    auth_secret_ref: Option<&str>,
    allowed_domains: &str,
    input_schema: Option<&str>,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO local_mcp_resources (resource_id, org_id, name, description, endpoint_url, auth_type, \
         auth_secret_ref, required_capability, allowed_domains, enabled, created_at, updated_at, input_schema) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        values![
            &resource.resource_id,
            resource.org_id.as_deref(),
            &resource.name,
            resource.description.as_deref(),
            &resource.endpoint_url,
            &resource.auth_type,
            auth_secret_ref,
            resource.required_capability.as_deref(),
            allowed_domains,
            resource.enabled,
            &resource.created_at,
            &resource.created_at,
            input_schema,
        ],
    )
    .await?;
    Ok(())
}

/// Resources by name.
pub(super) async fn resources(
    tx: &mut ReadTx,
    org_id: &str,
    limit: i64,
) -> Result<Vec<Resource>, StoreError> {
    let rows = tx
        .rows(
            "SELECT resource_id, name, endpoint_url, description, auth_type, required_capability, enabled, org_id, \
             created_at FROM local_mcp_resources WHERE org_id = $1 OR org_id IS NULL ORDER BY name, resource_id \
             LIMIT $2",
            values![org_id, limit],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Resource {
                resource_id: row.text(0)?,
                name: row.text(1)?,
                endpoint_url: row.text(2)?,
                description: row.optional_text(3)?,
                auth_type: row.text(4)?,
                required_capability: capability(row, 5)?,
                enabled: row.truth(6)?,
                org_id: row.optional_text(7)?,
                created_at: row.text(8)?,
            })
        })
        .collect()
}

/// The name of a resource of ours.
pub(super) async fn resource_name(
    tx: &mut WriteTx,
    org_id: &str,
    resource_id: &str,
) -> Result<Option<String>, StoreError> {
    let row = tx
        .row(
            "SELECT name FROM local_mcp_resources WHERE resource_id = $2 AND (org_id = $1 OR org_id IS NULL)",
            values![org_id, resource_id],
        )
        .await?;
    row.map(|row| row.text(0)).transpose()
}

/// Deletes a resource and its bindings; gives the number of the latter.
pub(super) async fn delete_resource(tx: &mut WriteTx, resource_id: &str) -> Result<u64, StoreError> {
    let bindings = tx
        .execute("DELETE FROM local_agent_resource_bindings WHERE resource_id = $1", values![resource_id])
        .await?;
    tx.execute("DELETE FROM local_mcp_resources WHERE resource_id = $1", values![resource_id]).await?;
    Ok(bindings)
}

/// Whether the holder has an active binding to the resource.
pub(super) async fn is_bound(
    tx: &mut WriteTx,
    holder: &Holder,
    resource_id: &str,
) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT binding_id FROM local_agent_resource_bindings WHERE agent_id IN ($1, $2) AND principal_type = $3 \
             AND resource_id = $4 AND revoked_at IS NULL LIMIT 1",
            values![&holder.canonical, &holder.bare, &holder.principal_type, resource_id],
        )
        .await?;
    Ok(row.is_some())
}

/// Writes an active binding. A revoked one of the same three names is in the way of the table's UNIQUE, so it
/// becomes this one, under the new id: whoever still holds the old id cannot revoke the new grant.
pub(super) async fn grant(tx: &mut WriteTx, binding: &Binding, granted_by: &str) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO local_agent_resource_bindings (binding_id, agent_id, resource_id, org_id, granted_by, granted_at, \
         revoked_at, principal_type) VALUES ($1, $2, $3, $4, $5, $6, NULL, $7) \
         ON CONFLICT (agent_id, principal_type, resource_id) DO UPDATE SET binding_id = excluded.binding_id, \
         org_id = excluded.org_id, granted_by = excluded.granted_by, granted_at = excluded.granted_at, \
         revoked_at = NULL",
        values![
            &binding.binding_id,
            &binding.agent_id,
            &binding.resource_id,
            binding.org_id.as_deref(),
            granted_by,
            &binding.granted_at,
            &binding.principal_type,
        ],
    )
    .await?;
    Ok(())
}

const BINDING_EVERY: &str = "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, revoked_at \
     FROM local_agent_resource_bindings WHERE binding_id > $1 ORDER BY binding_id LIMIT $2";
const BINDING_BY_RESOURCE: &str = "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, \
     revoked_at FROM local_agent_resource_bindings WHERE binding_id > $1 AND resource_id = $3 ORDER BY binding_id LIMIT $2";
const BINDING_BY_AGENT: &str = "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, revoked_at \
     FROM local_agent_resource_bindings WHERE binding_id > $1 AND agent_id IN ($3, $4) ORDER BY binding_id LIMIT $2";
const BINDING_BY_BOTH: &str = "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, revoked_at \
     FROM local_agent_resource_bindings WHERE binding_id > $1 AND agent_id IN ($3, $4) AND resource_id = $5 \
     ORDER BY binding_id LIMIT $2";

/// Bindings after the id `after`, of an agent (both its names) or to a resource where these are given.
pub(super) async fn bindings(
    tx: &mut ReadTx,
    agent: Option<(String, String)>,
    resource_id: Option<String>,
    after: String,
    limit: i64,
) -> Result<Vec<Binding>, StoreError> {
    let rows = match (agent, resource_id) {
        (None, None) => tx.rows(BINDING_EVERY, values![after, limit]).await?,
        (None, Some(resource_id)) => tx.rows(BINDING_BY_RESOURCE, values![after, limit, resource_id]).await?,
        (Some((canonical, bare)), None) => {
            tx.rows(BINDING_BY_AGENT, values![after, limit, canonical, bare]).await?
        }
        (Some((canonical, bare)), Some(resource_id)) => {
            tx.rows(BINDING_BY_BOTH, values![after, limit, canonical, bare, resource_id]).await?
        }
    };
    rows.iter()
        .map(|row| {
            Ok(Binding {
                binding_id: row.text(0)?,
                agent_id: row.text(1)?,
                principal_type: row.text(2)?,
                resource_id: row.text(3)?,
                org_id: row.optional_text(4)?,
                granted_at: row.text(5)?,
                revoked_at: row.optional_text(6)?,
            })
        })
        .collect()
}

/// What a revoked binding was about.
pub(super) struct Revoked {
    pub agent_id: String,
    pub principal_type: String,
    pub resource_id: String,
}

/// Ends an active binding; absent when there is none of this id.
pub(super) async fn revoke(
    tx: &mut WriteTx,
    binding_id: &str,
    now: &str,
) -> Result<Option<Revoked>, StoreError> {
    let row = tx
        .row(
            "UPDATE local_agent_resource_bindings SET revoked_at = $2 WHERE binding_id = $1 AND revoked_at IS NULL \
             RETURNING agent_id, principal_type, resource_id",
            values![binding_id, now],
        )
        .await?;
    row.map(|row| {
        Ok(Revoked { agent_id: row.text(0)?, principal_type: row.text(1)?, resource_id: row.text(2)? })
    })
    .transpose()
}
