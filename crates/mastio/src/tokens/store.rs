//! Rows of resource servers.

use super::resource_servers::ResourceServer;
use crate::store::{Query, Row, StoreError, WriteTx};
use crate::values;

fn read(row: &Row) -> Result<ResourceServer, StoreError> {
    Ok(ResourceServer {
        resource_server_id: row.text(0)?,
        name: row.text(1)?,
        resource: row.text(2)?,
        created_at: row.text(3)?,
    })
}

/// Every resource server, by name. As many as `RESOURCE_SERVERS_MAX`.
pub async fn resource_servers(tx: &mut impl Query) -> Result<Vec<ResourceServer>, StoreError> {
    tx.rows(
        "SELECT resource_server_id, name, resource, created_at FROM resource_servers ORDER BY name LIMIT 1000",
        &[],
    )
    .await?
    .iter()
    .map(read)
    .collect()
}

/// One resource server, with the digest of its secret.
pub async fn resource_server(
    tx: &mut impl Query,
    id: &str,
) -> Result<Option<(ResourceServer, String)>, StoreError> {
    let row = tx
        .row(
            "SELECT resource_server_id, name, resource, created_at, secret_sha256 FROM resource_servers \
             WHERE resource_server_id = $1",
            values![id],
        )
        .await?;
    row.map(|row| Ok((read(&row)?, row.text(4)?))).transpose()
}

/// Whether some resource server serves this resource.
pub async fn resource_is_served(tx: &mut impl Query, resource: &str) -> Result<bool, StoreError> {
    let row = tx.row("SELECT name FROM resource_servers WHERE resource = $1", values![resource]).await?;
    Ok(row.is_some())
}

/// Inserts a resource server.
pub async fn insert_resource_server(
    tx: &mut WriteTx,
    server: &ResourceServer,
    secret_sha256: &str,
    actor: &str,
) -> Result<(), StoreError> {
    tx.execute(
        "INSERT INTO resource_servers (resource_server_id, name, resource, secret_sha256, created_at, created_by) \
         VALUES ($1, $2, $3, $4, $5, $6)",
        values![
            &server.resource_server_id,
            &server.name,
            &server.resource,
            secret_sha256,
            &server.created_at,
            actor
        ],
    )
    .await
    .map(drop)
}

/// Deletes a resource server. False: there was none.
pub async fn delete_resource_server(tx: &mut WriteTx, id: &str) -> Result<bool, StoreError> {
    let touched =
        tx.execute("DELETE FROM resource_servers WHERE resource_server_id = $1", values![id]).await?;
    Ok(touched > 0)
}
