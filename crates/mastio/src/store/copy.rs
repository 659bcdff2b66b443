//! Moving a deploy from SQLite to PostgreSQL: every row of every table of ours, as it stands.
//!
//! Sealed values stay as they are, so the deploy must be sealed under a passphrase, which the replicas will share. The
//! predecessor's further tables stay behind. Everything is written in one transaction; then the target's chain
//! goes on with the event that says so.

use mastio_core::audit::event::{Event, EventType};
use serde_json::json;

use super::value::{Cell, Value};
use super::{Query as _, Row, Store, StoreError, WriteTx, schema};

/// Rows that are held in memory at once.
const PAGE_ROWS: i64 = 512;

/// A table and its columns; a number is marked by `#`.
struct Table {
    name: &'static str,
    columns: &'static [&'static str],
}

/// Every table that a deploy of ours stands on. `audit_head` is last: it makes the copy whole.
const TABLES: &[Table] = &[
    Table { name: "proxy_config", columns: &["key", "value"] },
    Table {
        name: "internal_agents",
        columns: &[
            "agent_id",
            "display_name",
            "capabilities",
            "cert_pem",
            "created_at",
            "#is_active",
            "#federated",
            "federated_at",
            "#federation_revision",
            "#last_pushed_revision",
            "device_info",
            "dpop_jkt",
            "enrollment_method",
            "spiffe_id",
            "enrolled_at",
            "reach",
            "last_attestation",
            "revoked_at",
            "revoked_reason",
            "last_stale_event_at",
            "previous_cert_pem",
            "previous_dpop_jkt",
            "previous_grace_period_expires_at",
            "principal_type",
        ],
    },
    Table {
        name: "mastio_keys",
        columns: &[
            "kid",
            "pubkey_pem",
            "privkey_pem",
            "cert_pem",
            "created_at",
            "activated_at",
            "deprecated_at",
            "expires_at",
        ],
    },
    Table {
        name: "pending_updates",
        columns: &[
            "migration_id",
            "detected_at",
            "status",
            "applied_at",
            "error",
            "rolled_back_at",
            "criticality",
            "affects_enrollments",
            "requires",
        ],
    },
    Table { name: "migration_state_backups", columns: &["migration_id", "created_at", "snapshot_json"] },
    Table {
        name: "audit_log",
        columns: &[
            "#id",
            "timestamp",
            "agent_id",
            "action",
            "tool_name",
            "status",
            "detail",
            "request_id",
            "duration_ms",
            "#chain_seq",
            "prev_hash",
            "row_hash",
            "dpop_jkt",
            "on_behalf_of_user_id",
            "device_attestation",
            "effective_tier",
            "hash_format",
        ],
    },
    Table {
        name: "local_audit",
        columns: &[
            "#id",
            "timestamp",
            "agent_id",
            "event_type",
            "details",
            "previous_hash",
            "entry_hash",
            "session_id",
            "org_id",
            "result",
            "#chain_seq",
            "peer_org_id",
            "peer_row_hash",
            "hash_format",
        ],
    },
    Table {
        name: "local_mcp_resources",
        columns: &[
            "resource_id",
            "org_id",
            "name",
            "description",
            "endpoint_url",
            "auth_type",
            "auth_secret_ref",
            "required_capability",
            "allowed_domains",
            "#enabled",
            "created_at",
            "updated_at",
            "input_schema",
        ],
    },
    Table {
        name: "local_agent_resource_bindings",
        columns: &[
            "binding_id",
            "agent_id",
            "resource_id",
            "org_id",
            "granted_by",
            "granted_at",
            "revoked_at",
            "principal_type",
        ],
    },
    Table {
        name: "mcp_upstreams",
        columns: &[
            "upstream_id",
            "name",
            "endpoint_url",
            "description",
            "auth_type",
            "credential_sealed",
            "allowed_domains",
            "required_capability",
            "ca_pem",
            "#timeout_ms",
            "#calls_max",
            "#enabled",
            "revision",
            "capabilities",
            "discovered_at",
            "discovery_error",
            "created_at",
            "updated_at",
            "#asserts_caller",
        ],
    },
    Table {
        name: "mcp_tools",
        columns: &[
            "tool_id",
            "upstream_id",
            "upstream_name",
            "name",
            "state",
            "definition",
            "definition_digest",
            "found",
            "found_digest",
            "#present",
            "imitates",
            "required_capability",
            "#calls_per_minute",
            "first_seen_at",
            "approved_at",
            "approved_by",
            "#retention_days",
        ],
    },
    Table {
        name: "mcp_evidence",
        columns: &[
            "part_id",
            "evidence_id",
            "part",
            "tool",
            "agent_id",
            "request_id",
            "#called_at",
            "#expires_at",
            "digest",
            "#bytes",
            "sealed",
        ],
    },
    Table {
        name: "mcp_policy_versions",
        columns: &["#change", "name", "#version", "tool", "mode", "text", "saved_at", "saved_by"],
    },
    Table { name: "deploy_state", columns: &["key", "value"] },
    Table {
        name: "audit_events",
        columns: &["#seq", "id", "timestamp", "event_type", "actor", "details", "prev_hash", "hash"],
    },
    Table {
        name: "agent_certificates",
        columns: &[
            "agent_id",
            "fingerprint",
            "spki_sha256",
            "serial",
            "issuer_key_id",
            "#not_after",
            "profile_gaps",
        ],
    },
    Table {
        name: "enrollment_requests",
        columns: &[
            "session_id",
            "status",
            "spki_pem",
            "spki_sha256",
            "principal_type",
            "dpop_jkt",
            "requester_name",
            "requester_email",
            "reason",
            "device_info",
            "source",
            "#created_at",
            "#expires_at",
            "agent_id",
            "rejection_reason",
            "#decided_at",
            "decided_by",
        ],
    },
    Table {
        name: "superseded_certificates",
        columns: &[
            "fingerprint",
            "agent_id",
            "spki_sha256",
            "superseded_at",
            "superseded_by",
            "serial",
            "issuer_key_id",
            "#not_after",
        ],
    },
    Table {
        name: "revoked_certificates",
        columns: &[
            "fingerprint",
            "agent_id",
            "serial",
            "issuer_key_id",
            "#not_after",
            "#revoked_at",
            "reason",
            "revoked_by",
        ],
    },
    Table { name: "spire_identities", columns: &["agent_id", "spiffe_id", "bundle_pem"] },
    Table {
        name: "pki_crls",
        columns: &[
            "issuer_key_id",
            "#number",
            "#this_update",
            "#next_update",
            "content_digest",
            "der_base64",
        ],
    },
    Table {
        name: "pki_anchors",
        columns: &["fingerprint", "cert_pem", "key_sealed", "state", "added_at", "added_by"],
    },
    Table {
        name: "pki_cross_certificates",
        columns: &["fingerprint", "subject_spki_sha256", "issuer_spki_sha256", "cert_pem", "added_at"],
    },
    Table {
        name: "update_runs",
        columns: &[
            "run_id",
            "migration_id",
            "direction",
            "phase",
            "#done",
            "#total",
            "actor",
            "started_at",
            "#updated_at",
            "finished_at",
            "committed_at",
            "verified_at",
            "#halts",
            "replica",
            "error",
            "#only_one",
            "#written",
            "#beats",
            "images_digest",
            "follows",
        ],
    },
    Table {
        name: "update_images",
        columns: &[
            "run_id",
            "table_name",
            "row_key",
            "column_name",
            "#sealed",
            "before",
            "before_digest",
            "restore",
            "#restores",
            "after",
            "#changes",
            "accepted",
            "#follows",
        ],
    },
    Table {
        name: "update_run_certificates",
        columns: &[
            "run_id",
            "agent_id",
            "fingerprint",
            "spki_sha256",
            "serial",
            "issuer_key_id",
            "#not_after",
            "old_fingerprint",
            "old_serial",
            "old_issuer_key_id",
            "profile_gaps",
            "old_profile_gaps",
        ],
    },
    Table {
        name: "operators",
        columns: &[
            "name",
            "role",
            "credential",
            "created_at",
            "created_by",
            "last_seen_at",
            "deactivated_at",
        ],
    },
    Table {
        name: "update_proposals",
        columns: &[
            "proposal_id",
            "migration_id",
            "direction",
            "plan_digest",
            "proposed_by",
            "proposed_at",
            "#expires_at",
            "approved_by",
            "approved_at",
            "run_id",
            "void",
        ],
    },
    Table { name: "used_jwt_ids", columns: &["jwt_id", "#expires_at"] },
    Table { name: "revoked_tokens", columns: &["jwt_id", "agent_id", "#expires_at"] },
    Table {
        name: "resource_servers",
        columns: &["resource_server_id", "name", "resource", "secret_sha256", "created_at", "created_by"],
    },
    Table { name: "audit_head", columns: &["#id", "#sequence", "hash", "#epoch", "#epoch_sequence"] },
];

/// Why a deploy is not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source is not a SQLite file of ours.
    #[error("only a deploy on SQLite is copied: the source is not one")]
    Source,
    /// The target has something in it.
    #[error("the target database is not empty: create a new one")]
    TargetNotEmpty,
    /// The keys are sealed under a file that the target's replicas would not have.
    #[error(
        "this deploy is sealed under seal.key: with PostgreSQL it must be sealed under MCP_PROXY_DB_ENCRYPTION_KEY; set it and run mastio seal rotate"
    )]
    SealedUnderFile,
    /// A database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Copies everything from `source` into the empty database `target`, and tells how many rows went.
///
/// Errors: [`CopyError`]; the target is empty then, and the source is never changed.
pub async fn copy(source: &Store, target: &Store) -> Result<u64, CopyError> {
    if source.sqlite_path().is_none() || !schema::is_ours(source).await? {
        return Err(CopyError::Source);
    }
    if schema::is_ours(target).await? {
        return Err(CopyError::TargetNotEmpty);
    }
    let mut from = source.read().await?;
    let source_of_key = from.row("SELECT value FROM deploy_state WHERE key = 'sealing_source'", &[]).await?;
    if source_of_key.map(|row| row.text(0)).transpose()?.as_deref() != Some("passphrase") {
        return Err(CopyError::SealedUnderFile);
    }
    let mut to = WriteTx::begin_schema(
        &target.backend,
        std::sync::Arc::clone(&target.clock),
        std::sync::Arc::clone(&target.entropy),
    )
    .await?;
    schema::apply(&mut to, &target.clock.now().seconds().to_rfc3339()).await?;
    let mut rows = 0;
    for table in TABLES {
        rows += copy_table(&mut from, &mut to, table).await?;
    }
    to.commit_unaudited().await?;
    let from = source.sqlite_path().map(|path| path.display().to_string());
    target
        .write()
        .await?
        .commit(&[Event {
            event_type: EventType::DeployCopied,
            actor: "command-line".to_owned(),
            details: json!({ "rows": rows, "from": from }),
        }])
        .await?;
    Ok(rows)
}

async fn copy_table(from: &mut super::ReadTx, to: &mut WriteTx, table: &Table) -> Result<u64, StoreError> {
    let names: Vec<&str> = table.columns.iter().map(|column| column.trim_start_matches('#')).collect();
    let list = names.join(", ");
    // The head is there since the schema was made, and its epoch has moved with every row before it.
    if table.name == "audit_head" {
        to.execute("DELETE FROM audit_head", &[]).await?;
    }
    let select = format!("SELECT rowid, {list} FROM {} WHERE rowid > $1 ORDER BY rowid LIMIT $2", table.name);
    let insert = format!("{} ({list})", table.name);
    let (mut after, mut copied) = (i64::MIN, 0);
    loop {
        let page = from.rows_built(select.clone(), crate::values![after, PAGE_ROWS]).await?;
        let Some(last) = page.last() else { return Ok(copied) };
        after = last.integer(0)?;
        let rows: Vec<Vec<Value>> = page.into_iter().map(|row| typed(row, table)).collect();
        copied += to.insert_many_built(&insert, &rows).await?;
    }
}

/// The cells of a row as their columns want them; SQLite keeps whatever type was written.
fn typed(row: Row, table: &Table) -> Vec<Value> {
    row.0
        .into_iter()
        .skip(1)
        .zip(table.columns)
        .map(|(cell, column)| match (column.starts_with('#'), cell) {
            (true, Cell::Null) => Value::Integer(None),
            (true, Cell::Integer(number)) => Value::Integer(Some(number)),
            (true, Cell::Text(text)) => Value::Integer(text.parse().ok()),
            (false, Cell::Null) => Value::Text(None),
            (false, Cell::Integer(number)) => Value::Text(Some(number.to_string())),
            (false, Cell::Text(text)) => Value::Text(Some(text)),
        })
        .collect()
}
