//! The predecessor's rows, read and rewritten. SQLite alone: a predecessor's PostgreSQL is not adopted.

use mastio_core::audit::legacy::{AuditLogRow, LocalAuditRow};
use zeroize::Zeroizing;

use crate::store::{Query, Row, StoreError, Value, WriteTx};
use crate::values;

/// Agents, keys and the like that one statement reads.
pub(super) const PAGE_ROWS: i64 = 512;
/// Tables that every database of the predecessor has and that are carried over.
pub(super) const TABLES: [&str; 11] = [
    "proxy_config",
    "internal_agents",
    "mastio_keys",
    "pending_updates",
    "migration_state_backups",
    "audit_log",
    "local_audit",
    "pki_key_store",
    "legacy_pki_archive",
    "local_mcp_resources",
    "local_agent_resource_bindings",
];

/// What a database's tables say about whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is no table.
    Nobody,
    /// It has our schema table.
    Us,
    /// It has the predecessor's.
    Predecessor,
    /// It has tables of neither.
    Stranger,
}

pub(super) async fn owner(tx: &mut impl Query) -> Result<Owner, StoreError> {
    if has_table(tx, "mastio_schema").await? {
        return Ok(Owner::Us);
    }
    if has_table(tx, "alembic_version").await? {
        return Ok(Owner::Predecessor);
    }
    let any = tx.row("SELECT 1 FROM sqlite_master WHERE type = 'table' LIMIT 1", &[]).await?;
    Ok(if any.is_some() { Owner::Stranger } else { Owner::Nobody })
}

pub(super) async fn has_table(tx: &mut impl Query, table: &str) -> Result<bool, StoreError> {
    Ok(tx
        .row("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = $1", values![table])
        .await?
        .is_some())
}

/// The predecessor's schema revisions; one, unless its upgrade was interrupted.
pub(super) async fn revisions(tx: &mut impl Query) -> Result<Vec<String>, StoreError> {
    tx.rows("SELECT version_num FROM alembic_version ORDER BY version_num LIMIT 8", &[])
        .await?
        .iter()
        .map(|row| row.text(0))
        .collect()
}

pub(super) async fn set_revision(tx: &mut WriteTx, revision: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE alembic_version SET version_num = $1", values![revision]).await.map(drop)
}

/// What SQLite finds damaged, if anything: the first finding.
pub(super) async fn damage(tx: &mut impl Query) -> Result<Option<String>, StoreError> {
    let row = tx.row("PRAGMA integrity_check(1)", &[]).await?;
    let finding = row.map(|row| row.text(0)).transpose()?.unwrap_or_default();
    Ok((finding != "ok").then_some(finding))
}

pub(super) async fn agents(tx: &mut impl Query) -> Result<i64, StoreError> {
    count(tx, "SELECT COUNT(*) FROM internal_agents").await
}

async fn count(tx: &mut impl Query, sql: &'static str) -> Result<i64, StoreError> {
    tx.row(sql, &[]).await?.map_or(Ok(0), |row| row.integer(0))
}

/// A CA key of the predecessor's encrypted store.
pub(super) struct StoredKey {
    pub key_id: String,
    pub key_type: String,
    pub ciphertext: String,
}

/// Whether the predecessor encrypted its CA keys.
pub(super) async fn is_encrypted(tx: &mut impl Query) -> Result<bool, StoreError> {
    Ok(tx.row("SELECT 1 FROM pki_key_store LIMIT 1", &[]).await?.is_some())
}

/// The active keys of the encrypted store. Staged and deprecated ones stay as they are, under their ciphertext.
pub(super) async fn active_stored_keys(tx: &mut impl Query) -> Result<Vec<StoredKey>, StoreError> {
    tx.rows(
        "SELECT key_id, key_type, ciphertext FROM pki_key_store \
         WHERE activated_at IS NOT NULL AND deprecated_at IS NULL ORDER BY key_type, key_id LIMIT 16",
        &[],
    )
    .await?
    .iter()
    .map(|row| Ok(StoredKey { key_id: row.text(0)?, key_type: row.text(1)?, ciphertext: row.text(2)? }))
    .collect()
}

/// A snapshot of the predecessor's, with the status of its update.
pub(super) struct BackupRow {
    pub migration_id: String,
    pub created_at: String,
    pub snapshot_json: Zeroizing<String>,
    /// Absent where the row of the update was deleted.
    pub status: Option<String>,
}

/// Writes the descriptor of a snapshot.
pub async fn set_snapshot(tx: &mut WriteTx, migration_id: &str, descriptor: &str) -> Result<(), StoreError> {
    tx.execute(
        "UPDATE migration_state_backups SET snapshot_json = $2 WHERE migration_id = $1",
        values![migration_id, descriptor],
    )
    .await
    .map(drop)
}

/// Characters of the largest snapshot; absent where there is none.
pub(super) async fn largest_backup(tx: &mut impl Query) -> Result<Option<i64>, StoreError> {
    let row = tx.row("SELECT MAX(LENGTH(snapshot_json)) FROM migration_state_backups", &[]).await?;
    Ok(row.map(|row| row.optional_integer(0)).transpose()?.flatten())
}

/// Every snapshot. The predecessor knows one migration, so there is one at most.
pub(super) async fn backups(tx: &mut impl Query) -> Result<Vec<BackupRow>, StoreError> {
    tx.rows(
        "SELECT b.migration_id, b.created_at, b.snapshot_json, p.status FROM migration_state_backups b \
         LEFT JOIN pending_updates p ON p.migration_id = b.migration_id ORDER BY b.migration_id",
        &[],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(BackupRow {
            migration_id: row.text(0)?,
            created_at: row.text(1)?,
            snapshot_json: Zeroizing::new(row.text(2)?),
            status: row.optional_text(3)?,
        })
    })
    .collect()
}

/// A private key as it lies in clear, with the key of its row.
pub(super) struct ClearKey {
    pub row_key: String,
    pub pem: Zeroizing<String>,
}

fn clear_keys(rows: &[Row]) -> Result<Vec<ClearKey>, StoreError> {
    rows.iter().map(|row| Ok(ClearKey { row_key: row.text(0)?, pem: Zeroizing::new(row.text(1)?) })).collect()
}

/// A page of `proxy_config` rows that hold a private key, after `row_key`.
pub(super) async fn config_keys(tx: &mut impl Query, after: &str) -> Result<Vec<ClearKey>, StoreError> {
    clear_keys(
        &tx.rows(
            // The semicolon follows the colon: a range over the primary key instead of a LIKE over the table.
            "SELECT key, value FROM proxy_config WHERE key > $1 AND (key IN ('org_ca_key', 'mastio_ca_key', \
             'mastio_leaf_key') OR (key >= 'agent_key:' AND key < 'agent_key;')) ORDER BY key LIMIT $2",
            values![after, PAGE_ROWS],
        )
        .await?,
    )
}

/// A page of token keys after `kid`.
pub(super) async fn token_keys(tx: &mut impl Query, after: &str) -> Result<Vec<ClearKey>, StoreError> {
    clear_keys(
        &tx.rows(
            "SELECT kid, privkey_pem FROM mastio_keys WHERE kid > $1 ORDER BY kid LIMIT $2",
            values![after, PAGE_ROWS],
        )
        .await?,
    )
}

/// A page of the clear copies that the predecessor kept when it encrypted its keys.
pub(super) async fn archived_keys(tx: &mut impl Query, after: &str) -> Result<Vec<ClearKey>, StoreError> {
    clear_keys(
        &tx.rows(
            "SELECT key_id, legacy_pem FROM legacy_pki_archive WHERE key_id > $1 ORDER BY key_id LIMIT $2",
            values![after, PAGE_ROWS],
        )
        .await?,
    )
}

pub(super) async fn set_config_key(tx: &mut WriteTx, key: &str, sealed: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE proxy_config SET value = $2 WHERE key = $1", values![key, sealed]).await.map(drop)
}

pub(super) async fn set_token_key(tx: &mut WriteTx, kid: &str, sealed: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE mastio_keys SET privkey_pem = $2 WHERE kid = $1", values![kid, sealed]).await.map(drop)
}

pub(super) async fn set_archived_key(tx: &mut WriteTx, key_id: &str, sealed: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE legacy_pki_archive SET legacy_pem = $2 WHERE key_id = $1", values![key_id, sealed])
        .await
        .map(drop)
}

/// An agent and the certificate in its row.
pub(super) struct AgentRow {
    pub agent_id: String,
    pub cert_pem: Option<String>,
}

/// A page of agents after `agent_id`.
pub(super) async fn agent_page(tx: &mut impl Query, after: &str) -> Result<Vec<AgentRow>, StoreError> {
    tx.rows(
        "SELECT agent_id, cert_pem FROM internal_agents WHERE agent_id > $1 ORDER BY agent_id LIMIT $2",
        values![after, PAGE_ROWS],
    )
    .await?
    .iter()
    .map(|row| Ok(AgentRow { agent_id: row.text(0)?, cert_pem: row.optional_text(1)? }))
    .collect()
}

/// One image for [`insert_images`].
pub(super) struct ImageRow<'a> {
    pub table: &'a str,
    pub row_key: &'a str,
    pub column: &'a str,
    pub sealed: bool,
    pub before: Option<&'a str>,
    pub before_digest: &'a str,
    pub after: Option<&'a str>,
    pub changes: bool,
}

impl ImageRow<'_> {
    pub fn values(&self, run_id: &str) -> Vec<Value> {
        values![
            run_id,
            self.table,
            self.row_key,
            self.column,
            self.sealed,
            self.before,
            self.before_digest,
            self.after,
            self.changes
        ]
        .to_vec()
    }
}

pub(super) async fn insert_images(tx: &mut WriteTx, images: &[Vec<Value>]) -> Result<(), StoreError> {
    tx.insert_many(
        "update_images (run_id, table_name, row_key, column_name, sealed, before, before_digest, after, changes)",
        images,
        "",
    )
    .await
    .map(drop)
}

/// Rows are fingerprint, agent, SPKI's SHA-256, time, and by whom.
pub(super) async fn insert_superseded(tx: &mut WriteTx, rows: &[Vec<Value>]) -> Result<(), StoreError> {
    tx.insert_many(
        "superseded_certificates (fingerprint, agent_id, spki_sha256, superseded_at, superseded_by)",
        rows,
        "ON CONFLICT (fingerprint) DO NOTHING",
    )
    .await
    .map(drop)
}

/// A run that the predecessor made, as ours are recorded.
pub(super) struct RunRow<'a> {
    pub run_id: &'a str,
    pub migration_id: &'a str,
    pub committed: bool,
    /// When the snapshot was taken, which is all that is known of the run's times.
    pub at: &'a str,
    pub images: i64,
    /// Unix seconds.
    pub now: i64,
}

pub(super) async fn insert_run(tx: &mut WriteTx, run: &RunRow<'_>, actor: &str) -> Result<(), StoreError> {
    let committed_at = run.committed.then_some(run.at);
    let phase = if run.committed { "committed" } else { "snapshot" };
    tx.execute(
        "INSERT INTO update_runs (run_id, migration_id, direction, phase, done, total, actor, started_at, updated_at, \
         finished_at, committed_at, verified_at, replica) VALUES ($1, $2, 'apply', $3, $4, $4, $5, $6, $7, $6, $8, $8, $5)",
        values![run.run_id, run.migration_id, phase, run.images, actor, run.at, run.now, committed_at],
    )
    .await
    .map(drop)
}

/// A page of `audit_log` in the order of its chain, after a sequence number and an id.
pub(super) async fn audit_log_page(
    tx: &mut impl Query,
    after: (i64, i64),
) -> Result<Vec<AuditLogRow>, StoreError> {
    tx.rows(
        "SELECT id, timestamp, agent_id, action, tool_name, status, detail, request_id, chain_seq, prev_hash, row_hash, \
         dpop_jkt, on_behalf_of_user_id, hash_format FROM audit_log \
         WHERE typeof(chain_seq) = 'integer' AND chain_seq >= $1 AND (chain_seq > $1 OR id > $2) ORDER BY chain_seq, id LIMIT $3",
        values![after.0, after.1, PAGE_ROWS],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(AuditLogRow {
            id: row.integer(0)?,
            timestamp: row.optional_text(1)?,
            agent_id: row.optional_text(2)?,
            action: row.optional_text(3)?,
            tool_name: row.optional_text(4)?,
            status: row.optional_text(5)?,
            detail: row.optional_text(6)?,
            request_id: row.optional_text(7)?,
            chain_seq: row.optional_integer(8)?,
            prev_hash: row.optional_text(9)?,
            row_hash: row.optional_text(10)?,
            dpop_jkt: row.optional_text(11)?,
            on_behalf_of_user_id: row.optional_text(12)?,
            hash_format: row.optional_text(13)?,
        })
    })
    .collect()
}

/// A page of one org's `local_audit` in the order of its chain, after a sequence number and an id.
pub(super) async fn local_audit_page(
    tx: &mut impl Query,
    org_id: Option<&str>,
    after: (i64, i64),
) -> Result<Vec<LocalAuditRow>, StoreError> {
    tx.rows(
        "SELECT id, timestamp, agent_id, event_type, details, previous_hash, entry_hash, session_id, org_id, result, \
         chain_seq, peer_org_id, hash_format FROM local_audit \
         WHERE org_id IS $1 AND typeof(chain_seq) = 'integer' AND chain_seq >= $2 AND (chain_seq > $2 OR id > $3) \
         ORDER BY chain_seq, id LIMIT $4",
        values![org_id, after.0, after.1, PAGE_ROWS],
    )
    .await?
    .iter()
    .map(|row| {
        Ok(LocalAuditRow {
            id: row.integer(0)?,
            timestamp: row.optional_text(1)?,
            agent_id: row.optional_text(2)?,
            event_type: row.optional_text(3)?,
            details: row.optional_text(4)?,
            previous_hash: row.optional_text(5)?,
            entry_hash: row.optional_text(6)?,
            session_id: row.optional_text(7)?,
            org_id: row.optional_text(8)?,
            result: row.optional_text(9)?,
            chain_seq: row.optional_integer(10)?,
            peer_org_id: row.optional_text(11)?,
            hash_format: row.optional_text(12)?,
        })
    })
    .collect()
}

/// The first row of `audit_log` whose place in the chain is no number, with what stands there instead. SQLite keeps any
/// text in a column of numbers.
pub(super) async fn audit_log_misplaced(tx: &mut impl Query) -> Result<Option<(i64, String)>, StoreError> {
    let row = tx
        .row(
            "SELECT id, substr(quote(chain_seq), 1, 64) FROM audit_log \
             WHERE typeof(chain_seq) NOT IN ('integer', 'null') ORDER BY id LIMIT 1",
            &[],
        )
        .await?;
    row.as_ref().map(last).transpose()
}

/// As [`audit_log_misplaced`].
pub(super) async fn local_audit_misplaced(tx: &mut impl Query) -> Result<Option<(i64, String)>, StoreError> {
    let row = tx
        .row(
            "SELECT id, substr(quote(chain_seq), 1, 64) FROM local_audit \
             WHERE typeof(chain_seq) NOT IN ('integer', 'null') ORDER BY id LIMIT 1",
            &[],
        )
        .await?;
    row.as_ref().map(last).transpose()
}

/// The orgs that have a chain in `local_audit`.
pub(super) async fn local_audit_orgs(tx: &mut impl Query) -> Result<Vec<Option<String>>, StoreError> {
    tx.rows("SELECT DISTINCT org_id FROM local_audit WHERE chain_seq IS NOT NULL ORDER BY org_id", &[])
        .await?
        .iter()
        .map(|row| row.optional_text(0))
        .collect()
}

/// How many rows a legacy audit table has, and how many of them are outside its chain.
pub(super) async fn audit_log_size(tx: &mut impl Query) -> Result<(i64, i64), StoreError> {
    Ok((
        count(tx, "SELECT COUNT(*) FROM audit_log").await?,
        count(tx, "SELECT COUNT(*) FROM audit_log WHERE chain_seq IS NULL").await?,
    ))
}

/// As [`audit_log_size`].
pub(super) async fn local_audit_size(tx: &mut impl Query) -> Result<(i64, i64), StoreError> {
    Ok((
        count(tx, "SELECT COUNT(*) FROM local_audit").await?,
        count(tx, "SELECT COUNT(*) FROM local_audit WHERE chain_seq IS NULL").await?,
    ))
}

/// The last row of a legacy chain, verified or not: its sequence number and hash.
pub(super) async fn audit_log_last(tx: &mut impl Query) -> Result<Option<(i64, String)>, StoreError> {
    let row = tx
        .row(
            "SELECT chain_seq, row_hash FROM audit_log WHERE typeof(chain_seq) = 'integer' \
             ORDER BY chain_seq DESC, id DESC LIMIT 1",
            &[],
        )
        .await?;
    row.as_ref().map(last).transpose()
}

/// As [`audit_log_last`], of one org.
pub(super) async fn local_audit_last(
    tx: &mut impl Query,
    org_id: Option<&str>,
) -> Result<Option<(i64, String)>, StoreError> {
    let row = tx
        .row(
            "SELECT chain_seq, entry_hash FROM local_audit WHERE org_id IS $1 AND typeof(chain_seq) = 'integer' \
             ORDER BY chain_seq DESC, id DESC LIMIT 1",
            values![org_id],
        )
        .await?;
    row.as_ref().map(last).transpose()
}

fn last(row: &Row) -> Result<(i64, String), StoreError> {
    Ok((row.integer(0)?, row.optional_text(1)?.unwrap_or_default()))
}
