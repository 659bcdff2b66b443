#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;

use sqlx::{Column as _, Row as _};
use tempfile::TempDir;

use super::*;
use crate::clock::ManualClock;
use crate::pki::keys::SealingKey;
use crate::pki::store::{anchor_place, config_place};
use crate::store::{DatabaseUrl, Query};
use crate::values;

const PASSPHRASE: &str = "peer-test-passphrase-0123456789abcdef";
const MIGRATION: &str = "2026-04-23-org-ca-pathlen-1";
/// 2026-11-24T08:00:00Z, after every fixture was made.
const NOW: i64 = 1_795_507_200;
/// Tables that the predecessor has and in which a column or more is meant to change.
const REWRITTEN: [&str; 6] = [
    "alembic_version",
    "proxy_config",
    "mastio_keys",
    "migration_state_backups",
    "legacy_pki_archive",
    "sqlite_sequence",
];

fn fixtures() -> PathBuf {
    let shared = std::env::var_os("MASTIO_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    shared.join("fixtures/legacy")
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixtures())
        .unwrap()
        .filter_map(|entry| {
            entry.unwrap().file_name().to_string_lossy().strip_suffix(".db").map(str::to_owned)
        })
        .collect();
    names.sort();
    assert!(names.len() >= 17, "fixtures are missing: {names:?}");
    names
}

fn passphrase_of(name: &str) -> Option<&'static str> {
    (name == "py_encrypted").then_some(PASSPHRASE)
}

/// One fixture's own copy, and the folder it lies in.
struct Bench {
    folder: TempDir,
    database: PathBuf,
}

impl Bench {
    fn of(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("mcp_proxy.db");
        std::fs::write(&database, std::fs::read(fixtures().join(format!("{name}.db"))).unwrap()).unwrap();
        Self { folder, database }
    }

    async fn open(&self) -> Store {
        let clock = Arc::new(ManualClock::at(UnixMicros(NOW * 1_000_000)));
        Store::open(&DatabaseUrl::Sqlite(self.database.clone()), false, clock, Arc::new(Entropy::default()))
            .await
            .unwrap()
    }

    async fn adopt(&self, passphrase: Option<&str>) -> Result<Option<Adopted>, AdoptError> {
        let store = self.open().await;
        let adopted = adopt_if_legacy(&store, self.folder.path(), passphrase, &Entropy::default()).await;
        if adopted.is_ok() {
            finish_scrub(&store).await.unwrap();
        }
        store.close().await;
        adopted
    }

    async fn sealing(&self, passphrase: Option<&str>) -> SealingKey {
        let store = self.open().await;
        let key = sealing::open(&mut store.read().await.unwrap(), self.folder.path(), passphrase).await;
        store.close().await;
        key.unwrap().unwrap()
    }

    fn sql(&self, script: &str) {
        let done = std::process::Command::new("sqlite3").arg(&self.database).arg(script).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        std::fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
            })
            .collect()
    }

    /// Refused, and not a byte of the file is another.
    async fn refused(&self, passphrase: Option<&str>) -> String {
        let before = self.files();
        let message = self.adopt(passphrase).await.unwrap_err().to_string();
        assert_eq!(self.files(), before, "{message}");
        message
    }
}

type Table = Vec<BTreeMap<String, String>>;

/// Every row of every table, cells by column, as SQLite quotes them.
async fn dump(database: &Path) -> BTreeMap<String, Table> {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(database);
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    let names: Vec<String> =
        sqlx::query_scalar("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            .fetch_all(&pool)
            .await
            .unwrap();
    let mut tables = BTreeMap::new();
    for name in names {
        let columns: Vec<String> = sqlx::query_scalar("SELECT name FROM pragma_table_info($1) ORDER BY cid")
            .bind(&name)
            .fetch_all(&pool)
            .await
            .unwrap();
        let quoted: Vec<String> =
            columns.iter().map(|column| format!("quote(\"{column}\") AS \"{column}\"")).collect();
        let sql = format!("SELECT {} FROM \"{name}\" ORDER BY 1, 2", quoted.join(", "));
        let sql = if columns.len() == 1 { sql.replace("ORDER BY 1, 2", "ORDER BY 1") } else { sql };
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&pool).await.unwrap();
        let table = rows
            .iter()
            .map(|row| {
                row.columns()
                    .iter()
                    .map(|c| (c.name().to_owned(), row.get::<String, _>(c.ordinal())))
                    .collect()
            })
            .collect();
        tables.insert(name, table);
    }
    pool.close().await;
    tables
}

/// Cells of one column by the cells of another.
fn column<'a>(
    tables: &'a BTreeMap<String, Table>,
    table: &str,
    key: &str,
    value: &str,
) -> BTreeMap<&'a str, &'a str> {
    tables[table].iter().map(|row| (row[key].as_str(), row[value].as_str())).collect()
}

async fn text(store: &Store, sql: &'static str) -> String {
    store.read().await.unwrap().row(sql, &[]).await.unwrap().unwrap().text(0).unwrap()
}

async fn number(store: &Store, sql: &'static str) -> i64 {
    store.read().await.unwrap().row(sql, &[]).await.unwrap().unwrap().integer(0).unwrap()
}

#[tokio::test]
async fn every_fixture_is_adopted_and_nothing_but_private_keys_changes() {
    for name in names() {
        let bench = Bench::of(&name);
        let before = dump(&bench.database).await;
        let adopted = bench.adopt(passphrase_of(&name)).await.unwrap().unwrap();
        let after = dump(&bench.database).await;

        assert_eq!(adopted.agents as usize, before["internal_agents"].len(), "{name}");
        assert_eq!((adopted.leaves_unreadable, &adopted.audit_break), (0, &None), "{name}");
        for (table, rows) in &before {
            if REWRITTEN.contains(&table.as_str()) {
                continue;
            }
            for (row, kept) in rows.iter().zip(&after[table]) {
                for (column, cell) in row {
                    assert_eq!(&kept[column], cell, "{name} {table}.{column}");
                }
            }
            assert_eq!(rows.len(), after[table].len(), "{name} {table}");
        }
        let (was, is) =
            (column(&before, "proxy_config", "key", "value"), column(&after, "proxy_config", "key", "value"));
        for (key, value) in &was {
            if key.ends_with("_key'") || key.starts_with("'agent_key:") {
                assert!(is[key].starts_with("'enc:v1:"), "{name} {key}");
            } else {
                assert_eq!(&is[key], value, "{name} {key}");
            }
        }
        for public in ["pubkey_pem", "cert_pem", "created_at", "activated_at", "deprecated_at", "expires_at"]
        {
            assert_eq!(
                column(&before, "mastio_keys", "kid", public),
                column(&after, "mastio_keys", "kid", public),
                "{name} {public}"
            );
        }
        assert_eq!(after["alembic_version"][0]["version_num"], format!("'{ADOPTED_REVISION}'"));
        assert_eq!(after["audit_events"].len(), 1);
        assert_eq!(after["audit_events"][0]["event_type"], "'deploy.adopted'");
        assert_eq!(after["agent_certificates"].len(), before["internal_agents"].len(), "{name}");
    }
}

#[tokio::test]
async fn no_private_key_is_left_in_clear_in_any_file() {
    for name in names() {
        let bench = Bench::of(&name);
        bench.adopt(passphrase_of(&name)).await.unwrap().unwrap();
        for (file, bytes) in bench.files() {
            assert!(!bytes.windows(11).any(|window| window == b"PRIVATE KEY"), "{name} {file}");
        }
        assert!(!bench.folder.path().join(CLEAR_COPY_FILE).exists());
    }
}

#[tokio::test]
async fn a_database_whose_write_ahead_log_still_holds_keys_is_wiped_too() {
    let bench = Bench::of("chain5");
    let other = bench.folder.path().join("live.db");
    bench.sql("PRAGMA page_size = 4096; VACUUM; PRAGMA journal_mode = WAL");
    std::fs::rename(&bench.database, &other).unwrap();
    // A predecessor that was killed: its last writes lie in the log alone.
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&other);
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    sqlx::query("UPDATE mastio_keys SET privkey_pem = privkey_pem || char(10)").execute(&pool).await.unwrap();
    std::fs::copy(&other, &bench.database).unwrap();
    std::fs::copy(bench.folder.path().join("live.db-wal"), bench.folder.path().join("mcp_proxy.db-wal"))
        .unwrap();
    pool.close().await;
    std::fs::remove_file(&other).unwrap();

    let adopted = bench.adopt(None).await.unwrap().unwrap();
    for (file, bytes) in bench.files() {
        assert!(!bytes.windows(11).any(|window| window == b"PRIVATE KEY"), "{file}");
    }
    let target = bench.folder.path().join("restored.db");
    open_copy(&adopted.copy, &bench.sealing(None).await, &target).await.unwrap();
    assert!(dump(&target).await["mastio_keys"][0]["privkey_pem"].ends_with("\n\n'"));
}

#[tokio::test]
async fn a_second_boot_changes_no_row() {
    for name in names() {
        let bench = Bench::of(&name);
        bench.adopt(passphrase_of(&name)).await.unwrap().unwrap();
        let before = dump(&bench.database).await;
        assert_eq!(bench.adopt(passphrase_of(&name)).await.unwrap(), None, "{name}");
        assert_eq!(dump(&bench.database).await, before, "{name}");
    }
}

#[tokio::test]
async fn sealed_keys_open_in_their_place_as_what_they_were() {
    for name in names() {
        let bench = Bench::of(&name);
        let before = dump(&bench.database).await;
        bench.adopt(passphrase_of(&name)).await.unwrap().unwrap();
        let (after, sealing) = (dump(&bench.database).await, bench.sealing(passphrase_of(&name)).await);
        let is = column(&after, "proxy_config", "key", "value");
        for (key, value) in column(&before, "proxy_config", "key", "value") {
            if value.contains("PRIVATE KEY") {
                let opened =
                    sealing.open(&config_place(key.trim_matches('\'')), is[key].trim_matches('\'')).unwrap();
                assert_eq!(opened.as_str(), value.trim_matches('\''), "{name} {key}");
            }
        }
        let is = column(&after, "mastio_keys", "kid", "privkey_pem");
        for (kid, value) in column(&before, "mastio_keys", "kid", "privkey_pem") {
            let place = format!("mastio_keys/{}/privkey_pem", kid.trim_matches('\''));
            assert_eq!(
                sealing.open(&place, is[kid].trim_matches('\'')).unwrap().as_str(),
                value.trim_matches('\'')
            );
        }
    }
}

#[tokio::test]
async fn the_copy_restores_to_the_database_as_it_was() {
    for name in ["py_torn5", "py_encrypted", "py_mixed_byoca_applied"] {
        let bench = Bench::of(name);
        let before = dump(&bench.database).await;
        let adopted = bench.adopt(passphrase_of(name)).await.unwrap().unwrap();
        assert!(
            adopted.copy.to_string_lossy().ends_with("mcp_proxy.db.before-mastio-20261124T080000Z.sealed")
        );
        let target = bench.folder.path().join("restored.db");
        open_copy(&adopted.copy, &bench.sealing(passphrase_of(name)).await, &target).await.unwrap();
        assert_eq!(dump(&target).await, before, "{name}");
        let header = copy_header(&adopted.copy).unwrap();
        assert_eq!(header.sealing_salt.is_some(), header.sealing_source == "passphrase", "{name}");
        assert!(open_copy(&adopted.copy, &bench.sealing(passphrase_of(name)).await, &target).await.is_err());
    }
}

#[tokio::test]
async fn a_copy_that_was_cut_or_changed_restores_nothing() {
    let bench = Bench::of("chain5");
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    let (sealing, target) = (bench.sealing(None).await, bench.folder.path().join("restored.db"));
    let whole = std::fs::read(&adopted.copy).unwrap();
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() ^= 1;
    for bytes in [&whole[..whole.len() - 1], &whole[..40], &changed, b"mastio-copy/1\n".as_slice()] {
        std::fs::write(&adopted.copy, bytes).unwrap();
        assert!(open_copy(&adopted.copy, &sealing, &target).await.is_err());
        assert!(!target.exists());
    }
}

#[tokio::test]
async fn a_copy_of_several_chunks_restores_and_loses_none_unnoticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let sealing = SealingKey::create_file(&path("seal.key"), &Entropy::default()).unwrap();
    for length in [0, 1, 1024 * 1024, 2 * 1024 * 1024 + 1] {
        let clear: Vec<u8> = (0..length).map(|index: usize| (index % 251) as u8).collect();
        std::fs::write(path("clear"), &clear).unwrap();
        let source = ("file".to_owned(), None);
        copy::seal(&path("clear"), &path("part"), &path("sealed"), &sealing, source, &Entropy::default())
            .unwrap();
        open_copy(&path("sealed"), &sealing, &path("back")).await.unwrap();
        assert!(std::fs::read(path("back")).unwrap() == clear, "{length}");
        std::fs::remove_file(path("back")).unwrap();
    }
    // Without its last chunk the file ends between two blocks; the one before was not marked as the last.
    let mut sealed = std::fs::read(path("sealed")).unwrap();
    sealed.truncate(sealed.len() - (4 + 12 + 1 + 16));
    std::fs::write(path("sealed"), sealed).unwrap();
    assert!(open_copy(&path("sealed"), &sealing, &path("back")).await.is_err());
}

#[tokio::test]
async fn another_revision_is_refused_untouched() {
    let bench = Bench::of("chain5");
    bench.sql("UPDATE alembic_version SET version_num = '0039_pending_updates'");
    assert!(bench.refused(None).await.contains("0039_pending_updates"));
}

#[tokio::test]
async fn an_encrypted_database_is_refused_without_its_passphrase_and_with_a_wrong_one() {
    let bench = Bench::of("py_encrypted");
    assert!(bench.refused(None).await.contains("MCP_PROXY_DB_ENCRYPTION_KEY"));
    assert!(
        bench
            .refused(Some("not-the-passphrase-at-all-0123456789"))
            .await
            .contains("MCP_PROXY_DB_ENCRYPTION_KEY")
    );
}

#[tokio::test]
async fn a_running_predecessor_is_noticed_by_its_lock_and_its_locks_survive() {
    let bench = Bench::of("chain5");
    let path = bench.folder.path().join("mcp_proxy.db.audit_flush.lock");
    let file = File::create(&path).unwrap();
    file.try_lock().unwrap();
    assert!(bench.refused(None).await.contains("still running"));
    drop(file);
    assert!(bench.adopt(None).await.unwrap().is_some());
    assert!(path.exists());
}

#[tokio::test]
async fn a_write_lock_held_by_another_program_is_a_refusal() {
    let bench = Bench::of("chain5");
    let other = bench.open().await;
    let tx = WriteTx::begin_schema(&other.backend, Arc::clone(&other.clock), Arc::clone(&other.entropy))
        .await
        .unwrap();
    assert!(matches!(bench.adopt(None).await, Err(AdoptError::Locked(_))));
    drop(tx);
    other.close().await;
    assert!(bench.adopt(None).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_not_understood_is_refused_untouched() {
    for (what, script, said) in [
        ("another org's CA", "UPDATE proxy_config SET value = 'other' WHERE key = 'org_id'", "other CA"),
        ("no Org CA", "DELETE FROM proxy_config WHERE key IN ('org_ca_cert', 'org_ca_key')", "org_ca_cert"),
        ("no org id", "DELETE FROM proxy_config WHERE key = 'org_id'", "org_id"),
        ("a CA that is none", "UPDATE proxy_config SET value = 'x' WHERE key = 'org_ca_cert'", "org_ca_cert"),
        ("a key that is none", "UPDATE proxy_config SET value = 'x' WHERE key = 'org_ca_key'", "org_ca_key"),
        (
            "a key of another",
            "UPDATE proxy_config SET value = (SELECT value FROM proxy_config WHERE key = 'mastio_ca_key') \
             WHERE key = 'org_ca_key'",
            "does not belong",
        ),
        ("a token key that is none", "UPDATE mastio_keys SET privkey_pem = 'x'", "mastio_keys"),
        ("a missing table", "DROP TABLE local_audit", "local_audit"),
        ("two revisions", "INSERT INTO alembic_version VALUES ('0041_x')", "0041_x"),
        (
            "an unknown snapshot",
            "INSERT INTO migration_state_backups VALUES ('m', '2026-01-01T00:00:00+00:00', '{\"key\": \"k\"}')",
            "snapshot_json",
        ),
    ] {
        let bench = Bench::of("chain5");
        bench.sql(script);
        let message = bench.refused(None).await;
        assert!(message.contains(said), "{what}: {message}");
    }
}

#[tokio::test]
async fn a_stranger_s_database_is_refused_and_an_empty_one_is_nothing_to_adopt() {
    let bench = Bench::of("chain5");
    std::fs::remove_file(&bench.database).unwrap();
    bench.sql("CREATE TABLE somebody (id INTEGER)");
    assert!(bench.refused(None).await.contains("another program"));
    std::fs::write(&bench.database, []).unwrap();
    assert_eq!(bench.adopt_only().await.unwrap(), None);
}

impl Bench {
    /// Without the scrub, which needs our tables.
    async fn adopt_only(&self) -> Result<Option<Adopted>, AdoptError> {
        let store = self.open().await;
        let adopted = adopt_if_legacy(&store, self.folder.path(), None, &Entropy::default()).await;
        store.close().await;
        adopted
    }
}

#[tokio::test]
async fn a_leaf_that_cannot_be_read_is_adopted_and_counted() {
    let bench = Bench::of("chain5");
    bench.sql("UPDATE internal_agents SET cert_pem = 'not a certificate' WHERE agent_id LIKE '%agent-0002'");
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    assert_eq!((adopted.agents, adopted.leaves_unreadable), (5, 1));
    let store = bench.open().await;
    assert_eq!(number(&store, "SELECT COUNT(*) FROM agent_certificates").await, 4);
}

#[tokio::test]
async fn a_broken_audit_chain_is_adopted_and_its_break_recorded() {
    let bench = Bench::of("v01_root5");
    bench.sql(
        "DROP TRIGGER audit_log_no_update; UPDATE audit_log SET detail = 'forged' WHERE chain_seq = 3; \
         CREATE TRIGGER audit_log_no_update BEFORE UPDATE ON audit_log BEGIN SELECT RAISE(ABORT, 'no'); END",
    );
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    let said = adopted.audit_break.unwrap();
    assert!(said.contains("chain_seq 3"), "{said}");
    let store = bench.open().await;
    let details: serde_json::Value =
        serde_json::from_str(&text(&store, "SELECT details FROM audit_events WHERE seq = 1").await).unwrap();
    assert_eq!(details["audit_log"]["break"], said);
    assert_eq!(details["audit_log"]["last_seq"], 5);
    assert_eq!(details["local_audit"]["verified"], true);
    assert_eq!(details["copy_sha256"], adopted.copy_sha256);
    assert_eq!(details["source"], REVISION);
}

#[tokio::test]
async fn a_row_of_history_whose_place_is_no_number_is_adopted_and_recorded_as_a_break() {
    let bench = Bench::of("v01_root5");
    bench.sql(
        "DROP TRIGGER audit_log_no_update; UPDATE audit_log SET chain_seq = 'third' WHERE chain_seq = 3; \
         CREATE TRIGGER audit_log_no_update BEFORE UPDATE ON audit_log BEGIN SELECT RAISE(ABORT, 'no'); END; \
         INSERT INTO local_audit (timestamp, event_type, org_id, chain_seq) VALUES ('now', 'x', 'acme', X'00ff')",
    );
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    let said = adopted.audit_break.unwrap();
    assert!(said.starts_with("audit_log row id 3 breaks the chain: its chain_seq is 'third'"), "{said}");
    let store = bench.open().await;
    let details: serde_json::Value =
        serde_json::from_str(&text(&store, "SELECT details FROM audit_events WHERE seq = 1").await).unwrap();
    assert!(said.contains(details["audit_log"]["break"].as_str().unwrap()), "{details}");
    assert_eq!((&details["audit_log"]["rows"], &details["audit_log"]["last_seq"]), (&5.into(), &5.into()));
    assert!(details["local_audit"]["break"].as_str().unwrap().contains("X'00FF'"), "{details}");
    // What was found is kept as it was found.
    assert_eq!(number(&store, "SELECT COUNT(*) FROM audit_log WHERE typeof(chain_seq) = 'text'").await, 1);
}

#[tokio::test]
async fn an_applied_update_of_the_predecessor_can_be_rolled_back_and_its_agents_go_on() {
    // The predecessor re-signed the BYOCA leaf too; its owner goes on with the one it holds.
    for (name, agents, leaves) in [("py_applied", 5, 5), ("py_mixed_byoca_applied", 5, 5)] {
        let bench = Bench::of(name);
        let before = dump(&bench.database).await;
        let snapshot = snapshot_of(&before);
        let adopted = bench.adopt(None).await.unwrap().unwrap();
        assert_eq!((adopted.agents, adopted.leaves_superseded), (agents, leaves), "{name}");
        assert_eq!((adopted.snapshots, adopted.retiring_anchors), (1, 1), "{name}");
        let (store, sealing) = (bench.open().await, bench.sealing(None).await);

        let run_id = text(&store, "SELECT run_id FROM update_runs").await;
        assert_eq!(
            text(
                &store,
                "SELECT phase || '/' || actor || '/' || direction || '/' || migration_id FROM update_runs"
            )
            .await,
            format!("committed/predecessor/apply/{MIGRATION}")
        );
        assert_eq!(number(&store, "SELECT COUNT(*) FROM update_runs WHERE committed_at IS NOT NULL AND verified_at IS NOT NULL AND finished_at IS NOT NULL").await, 1);
        let descriptor = text(&store, "SELECT snapshot_json FROM migration_state_backups").await;
        let expected = serde_json::json!({ "run_id": run_id, "format": "mastio/1", "rows": leaves + 2 });
        assert_eq!(serde_json::from_str::<serde_json::Value>(&descriptor).unwrap(), expected);

        let mut tx = store.read().await.unwrap();
        let images = tx
            .rows("SELECT row_key, before, after, before_digest FROM update_images WHERE table_name = 'internal_agents' AND changes = 1 AND sealed = 0", &[])
            .await
            .unwrap();
        assert_eq!(images.len() as i64, leaves, "{name}");
        let current = column(&before, "internal_agents", "agent_id", "cert_pem");
        for image in &images {
            let agent_id = image.text(0).unwrap();
            let before = image.text(1).unwrap();
            assert_eq!(before, snapshot["internal_agents"][&agent_id].as_str().unwrap(), "{name}");
            assert_eq!(
                image.text(2).unwrap(),
                current[&*format!("'{agent_id}'")].trim_matches('\''),
                "{name}"
            );
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, before.as_bytes());
            assert_eq!(image.text(3).unwrap(), crate::pki::store::hex(digest.as_ref()));
        }
        let place = |side| format!("update_images/{run_id}/proxy_config/org_ca_key/value/{side}");
        let key = tx
            .row("SELECT before, after FROM update_images WHERE row_key = 'org_ca_key' AND sealed = 1 AND changes = 1", &[])
            .await
            .unwrap()
            .unwrap();
        let opened =
            |side, column| sealing.open(&place(side), &key.text(column).unwrap()).unwrap().to_string();
        assert_eq!(opened("before", 0), snapshot["org_ca_key_pem"].as_str().unwrap());
        let config = column(&before, "proxy_config", "key", "value");
        assert_eq!(opened("after", 1), config["'org_ca_key'"].trim_matches('\''));

        let anchor = tx
            .row("SELECT fingerprint, key_sealed, cert_pem, state FROM pki_anchors", &[])
            .await
            .unwrap()
            .unwrap();
        let key = sealing.open(&anchor_place(&anchor.text(0).unwrap()), &anchor.text(1).unwrap()).unwrap();
        assert_eq!(key.as_str(), snapshot["org_ca_key_pem"].as_str().unwrap());
        assert_eq!(anchor.text(3).unwrap(), "retiring");
        let superseded: BTreeSet<String> = tx
            .rows("SELECT fingerprint FROM superseded_certificates WHERE superseded_by = 'predecessor'", &[])
            .await
            .unwrap()
            .iter()
            .map(|row| row.text(0).unwrap())
            .collect();
        let replaced: BTreeSet<String> = images
            .iter()
            .map(|image| {
                mastio_core::x509::Certificate::from_pem(&image.text(1).unwrap()).unwrap().fingerprint()
            })
            .collect();
        assert_eq!(superseded, replaced, "{name}");
        assert_eq!(text(&store, "SELECT status FROM pending_updates").await, "applied");
    }
}

fn snapshot_of(tables: &BTreeMap<String, Table>) -> serde_json::Value {
    serde_json::from_str(tables["migration_state_backups"][0]["snapshot_json"].trim_matches('\'')).unwrap()
}

#[tokio::test]
async fn a_torn_run_of_the_predecessor_keeps_its_snapshot_as_the_way_back() {
    let bench = Bench::of("py_torn5");
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    assert_eq!((adopted.agents, adopted.leaves_superseded, adopted.retiring_anchors), (5, 2, 1));
    let store = bench.open().await;
    assert_eq!(
        number(&store, "SELECT COUNT(*) FROM update_runs WHERE phase = 'snapshot' AND committed_at IS NULL AND verified_at IS NULL AND finished_at IS NOT NULL").await,
        1
    );
    assert_eq!(
        number(&store, "SELECT COUNT(*) FROM update_images WHERE after IS NULL AND changes = 0").await,
        7,
        "the whole snapshot: certificate and key of the Org CA, and five leaves"
    );
    assert_eq!(number(&store, "SELECT COUNT(*) FROM update_images").await, 7);
    assert_eq!(text(&store, "SELECT status FROM pending_updates").await, "pending");
    // Who signed what is known, so that the detector can say how far the run came.
    assert_eq!(number(&store, "SELECT COUNT(DISTINCT issuer_key_id) FROM agent_certificates").await, 2);
    assert_eq!(number(&store, "SELECT COUNT(*) FROM agent_certificates WHERE issuer_key_id = ''").await, 0);
}

#[tokio::test]
async fn nothing_retires_where_the_predecessor_has_rolled_back_or_never_applied() {
    for name in ["py_rolled_back", "chain5", "py_healthy_pathlen1", "v01_nokey", "v01_applied_row_only"] {
        let bench = Bench::of(name);
        let adopted = bench.adopt(None).await.unwrap().unwrap();
        assert_eq!(
            (adopted.snapshots, adopted.retiring_anchors, adopted.leaves_superseded),
            (0, 0, 0),
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_snapshot_that_a_rollback_left_behind_is_sealed_and_retires_nothing() {
    let bench = Bench::of("py_applied");
    bench.sql("UPDATE pending_updates SET status = 'rolled_back'");
    let adopted = bench.adopt(None).await.unwrap().unwrap();
    assert_eq!((adopted.snapshots, adopted.retiring_anchors, adopted.leaves_superseded), (1, 0, 0));
    for (file, bytes) in bench.files() {
        assert!(!bytes.windows(11).any(|window| window == b"PRIVATE KEY"), "{file}");
    }
}

#[tokio::test]
async fn encrypted_keys_come_back_as_the_keys_that_were_encrypted() {
    let bench = Bench::of("py_encrypted");
    let before = dump(&bench.database).await;
    bench.adopt(Some(PASSPHRASE)).await.unwrap().unwrap();
    let (store, sealing) = (bench.open().await, bench.sealing(Some(PASSPHRASE)).await);
    for (key_type, key) in [("org_ca", "org_ca_key"), ("intermediate_ca", "mastio_ca_key")] {
        let archived = column(&before, "legacy_pki_archive", "key_type", "legacy_pem");
        let clear = archived[&*format!("'{key_type}'")].trim_matches('\'');
        let row = store
            .read()
            .await
            .unwrap()
            .row("SELECT value FROM proxy_config WHERE key = $1", values![key])
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            sealing.open(&config_place(key), &row.text(0).unwrap()).unwrap().trim(),
            clear.trim(),
            "{key}"
        );
    }
    let after = dump(&bench.database).await;
    assert_eq!(before["pki_key_store"], after["pki_key_store"]);
    assert!(after["proxy_config"].iter().any(|row| row["key"] == "'mastio_ca_cert'"));
}

#[tokio::test]
async fn a_scrub_that_a_crash_prevented_is_done_at_the_next_boot() {
    let bench = Bench::of("py_torn5");
    let store = bench.open().await;
    adopt_if_legacy(&store, bench.folder.path(), None, &Entropy::default()).await.unwrap().unwrap();
    assert_eq!(text(&store, "SELECT value FROM deploy_state WHERE key = 'scrub_pending'").await, "adoption");
    store.close().await;
    let store = bench.open().await;
    assert_eq!(adopt_if_legacy(&store, bench.folder.path(), None, &Entropy::default()).await.unwrap(), None);
    finish_scrub(&store).await.unwrap();
    assert_eq!(number(&store, "SELECT COUNT(*) FROM deploy_state WHERE key = 'scrub_pending'").await, 0);
    store.close().await;
    for (file, bytes) in bench.files() {
        assert!(!bytes.windows(11).any(|window| window == b"PRIVATE KEY"), "{file}");
    }
}

#[tokio::test]
async fn what_a_stopped_adoption_left_is_cleaned_and_the_next_one_succeeds() {
    let bench = Bench::of("chain5");
    std::fs::write(bench.folder.path().join(CLEAR_COPY_FILE), "-----BEGIN PRIVATE KEY-----").unwrap();
    std::fs::write(bench.folder.path().join("mcp_proxy.db.before-mastio.part"), "half").unwrap();
    SealingKey::create_file(&bench.folder.path().join(sealing::SEAL_KEY_FILE), &Entropy::default()).unwrap();
    bench.adopt(None).await.unwrap().unwrap();
    let left: BTreeSet<String> = bench.files().into_keys().filter(|name| !name.ends_with("-wal")).collect();
    assert!(!left.contains(CLEAR_COPY_FILE) && !left.contains("mcp_proxy.db.before-mastio.part"), "{left:?}");
}
