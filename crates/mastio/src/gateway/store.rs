//! SQL of the gateway: `local_mcp_resources`, `mcp_upstreams`, `mcp_tools` and `local_agent_resource_bindings`.
//!
//! A predecessor's rows may lack the organisation, which then is ours, and may name an agent by its bare name. So
//! every look-up by agent takes both names.

use mastio_core::time::UnixTime;

use super::evidence::Evidence;
use super::peer::Discovered;
use super::policy::{Mode, Rule};
use super::protocol::Revision;
use super::servers::{Server, Tool as ServerTool, ToolState};
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
    /// The schema of its arguments, where it is known.
    pub input_schema: Option<String>,
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
             r.allowed_domains, b.binding_id, r.input_schema FROM local_mcp_resources r LEFT JOIN local_agent_resource_bindings b \
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
        input_schema: row.optional_text(7)?,
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
            "SELECT resource_id FROM local_mcp_resources WHERE name = $2 AND (org_id = $1 OR org_id IS NULL) \
             UNION SELECT tool_id FROM mcp_tools WHERE name = $2 LIMIT 1",
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
    tx: &mut impl Query,
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

/// The name of what a binding can be to: a resource of ours, a server, or a server's tool.
pub(super) async fn bindable_name(
    tx: &mut impl Query,
    org_id: &str,
    resource_id: &str,
) -> Result<Option<String>, StoreError> {
    let row = tx
        .row(
            "SELECT name FROM local_mcp_resources WHERE resource_id = $2 AND (org_id = $1 OR org_id IS NULL) \
             UNION ALL SELECT name FROM mcp_upstreams WHERE upstream_id = $2 \
             UNION ALL SELECT name FROM mcp_tools WHERE tool_id = $2 LIMIT 1",
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
    rows.iter().map(read_binding).collect()
}

fn read_binding(row: &Row) -> Result<Binding, StoreError> {
    Ok(Binding {
        binding_id: row.text(0)?,
        agent_id: row.text(1)?,
        principal_type: row.text(2)?,
        resource_id: row.text(3)?,
        org_id: row.optional_text(4)?,
        granted_at: row.text(5)?,
        revoked_at: row.optional_text(6)?,
    })
}

/// Bindings to a resource that are not revoked, by id.
pub(super) async fn active_bindings_to(
    tx: &mut ReadTx,
    resource_id: &str,
    limit: i64,
) -> Result<Vec<Binding>, StoreError> {
    let rows = tx
        .rows(
            "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, revoked_at \
             FROM local_agent_resource_bindings WHERE resource_id = $1 AND revoked_at IS NULL \
             ORDER BY binding_id LIMIT $2",
            values![resource_id, limit],
        )
        .await?;
    rows.iter().map(read_binding).collect()
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

// ---------------------------------------------------------------- servers with many tools

const SERVER: &str = "SELECT upstream_id, name, endpoint_url, description, auth_type, credential_sealed, \
     allowed_domains, required_capability, ca_pem, timeout_ms, calls_max, enabled, revision, capabilities, \
     discovered_at, discovery_error, created_at, updated_at, asserts_caller FROM mcp_upstreams WHERE upstream_id = $1 OR name = $1 \
     ORDER BY CASE WHEN upstream_id = $1 THEN 0 ELSE 1 END LIMIT 1";
const SERVERS: &str = "SELECT upstream_id, name, endpoint_url, description, auth_type, credential_sealed, \
     allowed_domains, required_capability, ca_pem, timeout_ms, calls_max, enabled, revision, capabilities, \
     discovered_at, discovery_error, created_at, updated_at, asserts_caller FROM mcp_upstreams ORDER BY name LIMIT $1";
const BOUND_SERVERS: &str = "SELECT upstream_id, name, endpoint_url, description, auth_type, credential_sealed, \
     allowed_domains, required_capability, ca_pem, timeout_ms, calls_max, enabled, revision, capabilities, \
     discovered_at, discovery_error, created_at, updated_at, asserts_caller FROM mcp_upstreams WHERE enabled = 1 AND upstream_id IN (\
     SELECT b.resource_id FROM local_agent_resource_bindings b WHERE b.agent_id IN ($2, $3) \
     AND b.principal_type = $1 AND b.revoked_at IS NULL) ORDER BY name LIMIT $4";

fn read_server(row: &Row) -> Result<Server, StoreError> {
    Ok(Server {
        upstream_id: row.text(0)?,
        name: row.text(1)?,
        endpoint_url: row.text(2)?,
        description: row.optional_text(3)?,
        auth_type: row.text(4)?,
        credential_sealed: row.optional_text(5)?,
        // As for a resource: what cannot be read must not widen what is allowed.
        allowed_domains: serde_json::from_str(&row.text(6)?).unwrap_or_else(|_| vec![String::new()]),
        required_capability: row.optional_text(7)?,
        ca_pem: row.optional_text(8)?,
        timeout_ms: row.integer(9)?,
        calls_max: row.integer(10)?,
        enabled: row.truth(11)?,
        revision: row.optional_text(12)?.as_deref().and_then(Revision::parse),
        capabilities: serde_json::from_str(&row.text(13)?).unwrap_or_default(),
        discovered_at: row.optional_text(14)?,
        discovery_error: row.optional_text(15)?,
        created_at: row.text(16)?,
        updated_at: row.text(17)?,
        asserts_caller: row.truth(18)?,
    })
}

/// The server of this id or name.
pub(super) async fn server(tx: &mut impl Query, id: &str) -> Result<Option<Server>, StoreError> {
    tx.row(SERVER, values![id]).await?.map(|row| read_server(&row)).transpose()
}

/// Servers by name.
pub(super) async fn servers(tx: &mut impl Query, limit: i64) -> Result<Vec<Server>, StoreError> {
    tx.rows(SERVERS, values![limit]).await?.iter().map(read_server).collect()
}

/// The enabled servers that the holder is bound to as a whole, by name.
pub(super) async fn bound_servers(
    tx: &mut ReadTx,
    holder: &Holder,
    limit: i64,
) -> Result<Vec<Server>, StoreError> {
    let values = values![&holder.principal_type, &holder.canonical, &holder.bare, limit];
    tx.rows(BOUND_SERVERS, values).await?.iter().map(read_server).collect()
}

/// How many servers there are.
pub(super) async fn count_servers(tx: &mut WriteTx) -> Result<i64, StoreError> {
    tx.row("SELECT COUNT(*) FROM mcp_upstreams", &[]).await?.map_or(Ok(0), |row| row.integer(0))
}

/// Adds a server.
pub(super) async fn insert_server(tx: &mut WriteTx, server: &Server) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO mcp_upstreams (upstream_id, name, endpoint_url, description, auth_type, credential_sealed, \
         allowed_domains, required_capability, ca_pem, timeout_ms, calls_max, enabled, revision, capabilities, \
         created_at, updated_at, asserts_caller) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, NULL, '{}', $13, $14, $15)",
        values![
            &server.upstream_id,
            &server.name,
            &server.endpoint_url,
            server.description.as_deref(),
            &server.auth_type,
            server.credential_sealed.as_deref(),
            domains(server),
            server.required_capability.as_deref(),
            server.ca_pem.as_deref(),
            server.timeout_ms,
            server.calls_max,
            server.enabled,
            &server.created_at,
            &server.updated_at,
            server.asserts_caller,
        ],
    )
    .await
    .map(drop)
}

fn domains(server: &Server) -> String {
    serde_json::to_string(&server.allowed_domains).unwrap_or_else(|_| "[\"\"]".to_owned())
}

/// Changes a server's settings.
pub(super) async fn update_server(tx: &mut WriteTx, server: &Server) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE mcp_upstreams SET name = $2, endpoint_url = $3, description = $4, auth_type = $5, \
         credential_sealed = $6, allowed_domains = $7, required_capability = $8, ca_pem = $9, timeout_ms = $10, \
         calls_max = $11, enabled = $12, updated_at = $13, asserts_caller = $14 WHERE upstream_id = $1",
        values![
            &server.upstream_id,
            &server.name,
            &server.endpoint_url,
            server.description.as_deref(),
            &server.auth_type,
            server.credential_sealed.as_deref(),
            domains(server),
            server.required_capability.as_deref(),
            server.ca_pem.as_deref(),
            server.timeout_ms,
            server.calls_max,
            server.enabled,
            &server.updated_at,
            server.asserts_caller,
        ],
    )
    .await
    .map(drop)
}

/// Removes a server; gives the numbers of its tools and of the bindings that went with it.
pub(super) async fn delete_server(tx: &mut WriteTx, upstream_id: &str) -> Result<(u64, u64), StoreError> {
    let bindings = tx
        .execute(
            "DELETE FROM local_agent_resource_bindings WHERE resource_id = $1 \
             OR resource_id IN (SELECT tool_id FROM mcp_tools WHERE upstream_id = $1)",
            values![upstream_id],
        )
        .await?;
    let tools = tx.execute("DELETE FROM mcp_tools WHERE upstream_id = $1", values![upstream_id]).await?;
    tx.execute("DELETE FROM mcp_upstreams WHERE upstream_id = $1", values![upstream_id]).await?;
    Ok((tools, bindings))
}

/// Notes how a look at a server ended.
pub(super) async fn note_discovery(
    tx: &mut WriteTx,
    upstream_id: &str,
    found: Option<&Discovered>,
    error: Option<&str>,
    now: UnixTime,
) -> Result<(), StoreError> {
    let Some(found) = found else {
        return tx
            .execute(
                "UPDATE mcp_upstreams SET discovery_error = $2 WHERE upstream_id = $1",
                values![upstream_id, error],
            )
            .await
            .map(drop);
    };
    let capabilities = serde_json::to_string(&found.capabilities).unwrap_or_else(|_| "{}".to_owned());
    tx.execute(
        "UPDATE mcp_upstreams SET revision = $2, capabilities = $3, discovered_at = $4, discovery_error = NULL \
         WHERE upstream_id = $1",
        values![upstream_id, found.revision.as_str(), capabilities, now.to_rfc3339()],
    )
    .await
    .map(drop)
}

const TOOL_BY_ID: &str = "SELECT tool_id, upstream_id, upstream_name, name, state, definition, definition_digest, \
     found, found_digest, present, imitates, required_capability, calls_per_minute, first_seen_at, approved_at, \
     approved_by, retention_days FROM mcp_tools WHERE tool_id = $1 OR name = $1 \
     ORDER BY CASE WHEN tool_id = $1 THEN 0 ELSE 1 END LIMIT 1";
const TOOL_BY_NAME: &str = "SELECT tool_id, upstream_id, upstream_name, name, state, definition, definition_digest, \
     found, found_digest, present, imitates, required_capability, calls_per_minute, first_seen_at, approved_at, \
     approved_by, retention_days FROM mcp_tools WHERE name = $1";
const TOOLS: &str = "SELECT tool_id, upstream_id, upstream_name, name, state, definition, definition_digest, \
     found, found_digest, present, imitates, required_capability, calls_per_minute, first_seen_at, approved_at, \
     approved_by, retention_days FROM mcp_tools ORDER BY name";
const TOOLS_OF: &str = "SELECT tool_id, upstream_id, upstream_name, name, state, definition, definition_digest, \
     found, found_digest, present, imitates, required_capability, calls_per_minute, first_seen_at, approved_at, \
     approved_by, retention_days FROM mcp_tools WHERE upstream_id = $1 ORDER BY name LIMIT $2";

fn read_tool(row: &Row) -> Result<ServerTool, StoreError> {
    Ok(ServerTool {
        tool_id: row.text(0)?,
        upstream_id: row.text(1)?,
        upstream_name: row.text(2)?,
        name: row.text(3)?,
        state: ToolState::parse(&row.text(4)?),
        definition: row.optional_text(5)?,
        definition_digest: row.optional_text(6)?,
        found: row.text(7)?,
        found_digest: row.text(8)?,
        present: row.truth(9)?,
        imitates: row.optional_text(10)?,
        required_capability: row.optional_text(11)?,
        calls_per_minute: row.optional_integer(12)?,
        first_seen_at: row.text(13)?,
        approved_at: row.optional_text(14)?,
        approved_by: row.optional_text(15)?,
        retention_days: row.optional_integer(16)?,
    })
}

/// The tool of this id or name.
pub(super) async fn server_tool(tx: &mut impl Query, id: &str) -> Result<Option<ServerTool>, StoreError> {
    tx.row(TOOL_BY_ID, values![id]).await?.map(|row| read_tool(&row)).transpose()
}

/// The tool that agents know by this name, and its server where that is enabled.
pub(super) async fn offered_tool(
    tx: &mut ReadTx,
    name: &str,
) -> Result<Option<(ServerTool, Server)>, StoreError> {
    let Some(row) = tx.row(TOOL_BY_NAME, values![name]).await? else { return Ok(None) };
    let tool = read_tool(&row)?;
    let server = server(tx, &tool.upstream_id).await?.filter(|server| server.enabled);
    Ok(server.map(|server| (tool, server)))
}

// What waits is what `ServerTool::standing` calls so, in the words of an index.
macro_rules! tools_where {
    ($not:literal) => {
        concat!(
            "SELECT t.tool_id, t.upstream_id, t.upstream_name, t.name, t.state, t.definition, t.definition_digest, \
             t.found, t.found_digest, t.present, t.imitates, t.required_capability, t.calls_per_minute, \
             t.first_seen_at, t.approved_at, t.approved_by, t.retention_days, u.name FROM mcp_tools t \
             JOIN mcp_upstreams u ON u.upstream_id = t.upstream_id WHERE ",
            $not,
            "(t.present = 1 AND (t.state = 'proposed' OR (t.state = 'approved' AND \
             COALESCE(t.definition_digest, '') <> t.found_digest))) AND t.name > $1 ORDER BY t.name LIMIT $2"
        )
    };
}
const TOOLS_WAITING: &str = tools_where!("");
const TOOLS_DECIDED: &str = tools_where!("NOT ");

/// A page of tools that wait for a decision, or of those that do not, after a name; each with its server's name.
pub(super) async fn tools_by_decision(
    tx: &mut ReadTx,
    waiting: bool,
    after: &str,
    limit: i64,
) -> Result<Vec<(ServerTool, String)>, StoreError> {
    let sql = if waiting { TOOLS_WAITING } else { TOOLS_DECIDED };
    let rows = tx.rows(sql, values![after, limit]).await?;
    rows.iter().map(|row| Ok((read_tool(row)?, row.text(17)?))).collect()
}

/// The tools of a server, by name.
pub(super) async fn tools_of(
    tx: &mut impl Query,
    upstream_id: &str,
    limit: i64,
) -> Result<Vec<ServerTool>, StoreError> {
    tx.rows(TOOLS_OF, values![upstream_id, limit]).await?.iter().map(read_tool).collect()
}

/// Every tool of every server, by name.
pub(super) async fn every_tool(tx: &mut impl Query) -> Result<Vec<ServerTool>, StoreError> {
    tx.rows(TOOLS, &[]).await?.iter().map(read_tool).collect()
}

/// The id of the tool, upstream or resource of this name.
pub(super) async fn id_by_name(
    tx: &mut impl Query,
    org_id: &str,
    kind: &str,
    name: &str,
) -> Result<Option<String>, StoreError> {
    let row = match kind {
        "tool" => tx.row("SELECT tool_id FROM mcp_tools WHERE name = $1", values![name]).await?,
        "upstream" => tx.row("SELECT upstream_id FROM mcp_upstreams WHERE name = $1", values![name]).await?,
        _ => {
            tx.row(
                "SELECT resource_id FROM local_mcp_resources WHERE name = $2 AND (org_id = $1 OR org_id IS NULL) \
                 ORDER BY CASE WHEN org_id IS NULL THEN 1 ELSE 0 END LIMIT 1",
                values![org_id, name],
            )
            .await?
        }
    };
    row.map(|row| row.text(0)).transpose()
}

/// The names and argument schemas of resources.
pub(super) async fn resource_schemas(
    tx: &mut impl Query,
    org_id: &str,
) -> Result<Vec<(String, Option<String>)>, StoreError> {
    let rows = tx
        .rows(
            "SELECT name, input_schema FROM local_mcp_resources WHERE org_id = $1 OR org_id IS NULL ORDER BY name",
            values![org_id],
        )
        .await?;
    rows.iter().map(|row| Ok((row.text(0)?, row.optional_text(1)?))).collect()
}

/// Every active binding.
pub(super) async fn active_bindings(tx: &mut impl Query) -> Result<Vec<Binding>, StoreError> {
    let rows = tx
        .rows(
            "SELECT binding_id, agent_id, principal_type, resource_id, org_id, granted_at, revoked_at \
             FROM local_agent_resource_bindings WHERE revoked_at IS NULL ORDER BY binding_id",
            &[],
        )
        .await?;
    rows.iter().map(read_binding).collect()
}

/// Whether the holder is bound to the tool or to its server.
pub(super) async fn is_bound_to_either(
    tx: &mut ReadTx,
    holder: &Holder,
    tool: &ServerTool,
) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT binding_id FROM local_agent_resource_bindings WHERE resource_id IN ($1, $2) \
             AND principal_type = $3 AND agent_id IN ($4, $5) AND revoked_at IS NULL LIMIT 1",
            values![
                &tool.tool_id,
                &tool.upstream_id,
                &holder.principal_type,
                &holder.canonical,
                &holder.bare
            ],
        )
        .await?;
    Ok(row.is_some())
}

/// The tools that the holder is bound to, by themselves or with their servers, whose servers are enabled; with the
/// server's name and the capability that it asks for.
pub(super) async fn bound_server_tools(
    tx: &mut ReadTx,
    holder: &Holder,
    limit: i64,
) -> Result<Vec<(ServerTool, String, Option<String>)>, StoreError> {
    let rows = tx
        .rows(
            "SELECT t.tool_id, t.upstream_id, t.upstream_name, t.name, t.state, t.definition, t.definition_digest, \
             t.found, t.found_digest, t.present, t.imitates, t.required_capability, t.calls_per_minute, \
             t.first_seen_at, t.approved_at, t.approved_by, t.retention_days, u.name, u.required_capability FROM mcp_tools t \
             JOIN mcp_upstreams u ON u.upstream_id = t.upstream_id AND u.enabled = 1 WHERE t.state = 'approved' \
             AND EXISTS (SELECT 1 FROM local_agent_resource_bindings b WHERE b.resource_id IN (t.tool_id, t.upstream_id) \
             AND b.principal_type = $1 AND b.agent_id IN ($2, $3) AND b.revoked_at IS NULL) ORDER BY t.name LIMIT $4",
            values![&holder.principal_type, &holder.canonical, &holder.bare, limit],
        )
        .await?;
    rows.iter().map(|row| Ok((read_tool(row)?, row.text(17)?, row.optional_text(18)?))).collect()
}

/// Every name that a tool has, of whatever kind.
pub(super) async fn every_tool_name(
    tx: &mut impl Query,
) -> Result<std::collections::HashSet<String>, StoreError> {
    let rows = tx
        .rows("SELECT name FROM local_mcp_resources UNION SELECT name FROM mcp_tools ORDER BY name", &[])
        .await?;
    rows.iter().map(|row| row.text(0)).collect()
}

/// Adds a tool.
pub(super) async fn insert_tool(tx: &mut WriteTx, tool: &ServerTool) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO mcp_tools (tool_id, upstream_id, upstream_name, name, state, found, found_digest, present, \
         imitates, first_seen_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        values![
            &tool.tool_id,
            &tool.upstream_id,
            &tool.upstream_name,
            &tool.name,
            tool.state.as_str(),
            &tool.found,
            &tool.found_digest,
            tool.present,
            tool.imitates.as_deref(),
            &tool.first_seen_at,
        ],
    )
    .await
    .map(drop)
}

/// Writes what a look has found of a tool.
pub(super) async fn update_found(tx: &mut WriteTx, tool: &ServerTool) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE mcp_tools SET found = $2, found_digest = $3, present = $4 WHERE tool_id = $1",
        values![&tool.tool_id, &tool.found, &tool.found_digest, tool.present],
    )
    .await
    .map(drop)
}

/// Writes what an operator has decided about a tool.
pub(super) async fn update_tool(tx: &mut WriteTx, tool: &ServerTool) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE mcp_tools SET state = $2, definition = $3, definition_digest = $4, required_capability = $5, \
         calls_per_minute = $6, approved_at = $7, approved_by = $8, retention_days = $9 WHERE tool_id = $1",
        values![
            &tool.tool_id,
            tool.state.as_str(),
            tool.definition.as_deref(),
            tool.definition_digest.as_deref(),
            tool.required_capability.as_deref(),
            tool.calls_per_minute,
            tool.approved_at.as_deref(),
            tool.approved_by.as_deref(),
            tool.retention_days,
        ],
    )
    .await
    .map(drop)
}

/// The sequence number of the newest event.
pub(super) async fn newest_event(tx: &mut ReadTx) -> Result<i64, StoreError> {
    let row = tx.row("SELECT sequence FROM audit_head WHERE id = 1", &[]).await?;
    row.ok_or(StoreError::HeadMissing)?.integer(0)
}

/// Whether an event after `seq` (exclusive) can have changed what somebody is offered, or ended somebody's standing.
pub(super) async fn something_changed(tx: &mut ReadTx, seq: i64) -> Result<bool, StoreError> {
    let row = tx
        .row(
            "SELECT seq FROM audit_events WHERE seq > $1 AND event_type IN ('mcp.resource_created', \
             'mcp.resource_deleted', 'mcp.binding_created', 'mcp.binding_revoked', 'mcp.upstream_created', \
             'mcp.upstream_changed', 'mcp.upstream_deleted', 'mcp.tools_discovered', 'mcp.tool_approved', \
             'mcp.tool_blocked', 'mcp.tool_changed', 'agent.created', 'agent.deactivated', 'agent.reactivated', \
             'agent.deleted', 'pki.certificate_revoked', 'auth.token_revoked', 'deploy.set_up') LIMIT 1",
            values![seq],
        )
        .await?;
    Ok(row.is_some())
}

/// Whether a session was ended.
pub(super) async fn is_used_up(tx: &mut ReadTx, id: &str) -> Result<bool, StoreError> {
    let row = tx.row("SELECT jwt_id FROM used_jwt_ids WHERE jwt_id = $1", values![id]).await?;
    Ok(row.is_some())
}

// ---------------------------------------------------------------- evidence

/// Calls of which something is kept, newest first: of a tool or an agent where given, after the call `after` in that order.
pub(super) async fn evidence(
    tx: &mut ReadTx,
    tool: Option<&str>,
    agent_id: Option<&str>,
    after: Option<&str>,
    limit: i64,
) -> Result<Vec<Evidence>, StoreError> {
    let rows = tx
        .rows(
            "SELECT a.evidence_id, a.tool, a.agent_id, a.request_id, a.called_at, a.expires_at, a.bytes, r.bytes \
             FROM mcp_evidence a LEFT JOIN mcp_evidence r ON r.evidence_id = a.evidence_id AND r.part = 'result' \
             WHERE a.part = 'arguments' AND (a.tool = $1 OR $1 = '') AND (a.agent_id = $2 OR $2 = '') \
             AND ($3 = '' OR (a.called_at, a.evidence_id) < \
             (SELECT c.called_at, c.evidence_id FROM mcp_evidence c WHERE c.evidence_id = $3 AND c.part = 'arguments')) \
             ORDER BY a.called_at DESC, a.evidence_id DESC LIMIT $4",
            values![tool.unwrap_or_default(), agent_id.unwrap_or_default(), after.unwrap_or_default(), limit],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Evidence {
                evidence_id: row.text(0)?,
                tool: row.text(1)?,
                agent_id: row.text(2)?,
                request_id: row.text(3)?,
                called_at: UnixTime(row.integer(4)?).to_rfc3339(),
                expires_at: UnixTime(row.integer(5)?).to_rfc3339(),
                arguments_bytes: row.integer(6)?,
                result_bytes: row.optional_integer(7)?,
            })
        })
        .collect()
}

/// A part of a call, sealed.
pub(super) struct Part {
    pub part: String,
    pub tool: String,
    pub agent_id: String,
    pub digest: String,
    pub sealed: String,
}

/// What is kept of one call and is not over its time, arguments first.
pub(super) async fn evidence_parts(
    tx: &mut impl Query,
    evidence_id: &str,
    now: UnixTime,
) -> Result<Vec<Part>, StoreError> {
    let rows = tx
        .rows(
            "SELECT part, tool, agent_id, digest, sealed FROM mcp_evidence WHERE evidence_id = $1 \
             AND expires_at > $2 ORDER BY part",
            values![evidence_id, now.0],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Part {
                part: row.text(0)?,
                tool: row.text(1)?,
                agent_id: row.text(2)?,
                digest: row.text(3)?,
                sealed: row.text(4)?,
            })
        })
        .collect()
}

/// Whether something is over its time.
pub(super) async fn has_expired_evidence(tx: &mut impl Query, now: UnixTime) -> Result<bool, StoreError> {
    let row = tx.row("SELECT part FROM mcp_evidence WHERE expires_at <= $1 LIMIT 1", values![now.0]).await?;
    Ok(row.is_some())
}

/// Deletes what is over its time, at most `limit` calls; gives how many parts went.
pub(super) async fn delete_expired_evidence(
    tx: &mut WriteTx,
    now: UnixTime,
    limit: i64,
) -> Result<u64, StoreError> {
    tx.execute(
        "DELETE FROM mcp_evidence WHERE evidence_id IN (\
         SELECT evidence_id FROM mcp_evidence WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)",
        values![now.0, limit],
    )
    .await
}

// ---------------------------------------------------------------- rules

fn read_rule(row: &Row) -> Result<Rule, StoreError> {
    Ok(Rule {
        change: row.integer(0)?,
        name: row.text(1)?,
        version: row.integer(2)?,
        tool: row.optional_text(3)?,
        mode: Mode::parse(&row.text(4)?),
        text: row.text(5)?,
        saved_at: row.text(6)?,
        saved_by: row.text(7)?,
    })
}

/// The number of the last change of a rule; 0 for none.
pub(super) async fn rules_change(tx: &mut impl Query) -> Result<i64, StoreError> {
    let row = tx.row("SELECT COALESCE(MAX(change), 0) FROM mcp_policy_versions", &[]).await?;
    row.map_or(Ok(0), |row| row.integer(0))
}

/// The newest version of each rule that is not deleted, by name.
///
/// Without a bound: one that is left out would be a hole. As many are saved as the gateway lets be saved.
pub(super) async fn rules(tx: &mut impl Query) -> Result<Vec<Rule>, StoreError> {
    let rows = tx
        .rows(
            "SELECT p.change, p.name, p.version, p.tool, p.mode, p.text, p.saved_at, p.saved_by \
             FROM mcp_policy_versions p WHERE p.mode <> 'deleted' AND p.version = \
             (SELECT MAX(n.version) FROM mcp_policy_versions n WHERE n.name = p.name) ORDER BY p.name",
            &[],
        )
        .await?;
    rows.iter().map(read_rule).collect()
}

/// A page of [`rules`], after a name.
pub(super) async fn rules_after(
    tx: &mut impl Query,
    after: &str,
    limit: i64,
) -> Result<Vec<Rule>, StoreError> {
    let rows = tx
        .rows(
            "SELECT p.change, p.name, p.version, p.tool, p.mode, p.text, p.saved_at, p.saved_by \
             FROM mcp_policy_versions p WHERE p.name > $1 AND p.mode <> 'deleted' AND p.version = \
             (SELECT MAX(n.version) FROM mcp_policy_versions n WHERE n.name = p.name) ORDER BY p.name LIMIT $2",
            values![after, limit],
        )
        .await?;
    rows.iter().map(read_rule).collect()
}

/// The versions of a rule, newest first.
pub(super) async fn rule_versions(tx: &mut ReadTx, name: &str, limit: i64) -> Result<Vec<Rule>, StoreError> {
    let rows = tx
        .rows(
            "SELECT change, name, version, tool, mode, text, saved_at, saved_by FROM mcp_policy_versions \
             WHERE name = $1 ORDER BY version DESC LIMIT $2",
            values![name, limit],
        )
        .await?;
    rows.iter().map(read_rule).collect()
}

/// The numbers of the next change, and of the next version of this rule.
pub(super) async fn next_rule(tx: &mut WriteTx, name: &str) -> Result<(i64, i64), StoreError> {
    let change = rules_change(tx).await? + 1;
    let row = tx
        .row("SELECT COALESCE(MAX(version), 0) FROM mcp_policy_versions WHERE name = $1", values![name])
        .await?;
    Ok((change, row.map_or(Ok(0), |row| row.integer(0))? + 1))
}

/// Adds a version of a rule.
pub(super) async fn insert_rule(tx: &mut WriteTx, rule: &Rule) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO mcp_policy_versions (change, name, version, tool, mode, text, saved_at, saved_by) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        values![
            rule.change,
            &rule.name,
            rule.version,
            rule.tool.as_deref(),
            rule.mode.as_str(),
            &rule.text,
            &rule.saved_at,
            &rule.saved_by,
        ],
    )
    .await
    .map(drop)
}

/// The schema of a resource's arguments, where it is known; absent without such a resource.
pub(super) async fn resource_schema(
    tx: &mut ReadTx,
    org_id: &str,
    name: &str,
) -> Result<Option<Option<String>>, StoreError> {
    let row = tx
        .row(
            "SELECT input_schema FROM local_mcp_resources WHERE name = $2 AND (org_id = $1 OR org_id IS NULL) LIMIT 1",
            values![org_id, name],
        )
        .await?;
    row.map(|row| row.optional_text(0)).transpose()
}

/// The names of resources and of servers' tools after `after`, in order.
pub(super) async fn every_callable(
    tx: &mut ReadTx,
    after: &str,
    limit: i64,
) -> Result<Vec<String>, StoreError> {
    let rows = tx
        .rows(
            "SELECT name FROM local_mcp_resources WHERE name > $1 UNION SELECT name FROM mcp_tools WHERE name > $1 \
             ORDER BY name LIMIT $2",
            values![after, limit],
        )
        .await?;
    rows.iter().map(|row| row.text(0)).collect()
}

/// Agents with an active binding, as bindings name them, from `from` (inclusive) on. One that is bound by both its names
/// is there by the longer.
pub(super) async fn bound_agents(
    tx: &mut ReadTx,
    org_id: &str,
    from: &str,
    limit: i64,
) -> Result<Vec<String>, StoreError> {
    let rows = tx
        .rows(
            "SELECT DISTINCT b.agent_id FROM local_agent_resource_bindings b WHERE b.agent_id >= $2 \
             AND b.revoked_at IS NULL AND NOT EXISTS (SELECT 1 FROM local_agent_resource_bindings c \
             WHERE c.agent_id = $1 || '::' || b.agent_id AND c.revoked_at IS NULL) ORDER BY b.agent_id LIMIT $3",
            values![org_id, from, limit],
        )
        .await?;
    rows.iter().map(|row| row.text(0)).collect()
}
