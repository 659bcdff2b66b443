//! The first step: the tables that operators know from the predecessor, and ours beside them.
//!
//! `pending_updates`, `migration_state_backups`, `mastio_keys` and `internal_agents` are interface: operators run
//! SQL on them. On an adopted database they are there already, with the predecessor's further columns, which stay.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 1,
    name: "foundation",
    both: r"
CREATE TABLE IF NOT EXISTS proxy_config (key TEXT PRIMARY KEY, value TEXT NOT NULL)
--;
CREATE TABLE IF NOT EXISTS internal_agents (
  agent_id TEXT PRIMARY KEY, display_name TEXT NOT NULL, capabilities TEXT NOT NULL DEFAULT '[]', cert_pem TEXT,
  created_at TEXT NOT NULL, is_active BIGINT NOT NULL DEFAULT 1, federated BIGINT NOT NULL DEFAULT 0,
  federated_at TEXT, federation_revision BIGINT NOT NULL DEFAULT 0, last_pushed_revision BIGINT NOT NULL DEFAULT 0,
  device_info TEXT, dpop_jkt TEXT, enrollment_method TEXT, spiffe_id TEXT, enrolled_at TEXT,
  reach TEXT NOT NULL DEFAULT 'both', last_attestation TEXT, revoked_at TEXT, revoked_reason TEXT,
  last_stale_event_at TEXT, previous_cert_pem TEXT, previous_dpop_jkt TEXT, previous_grace_period_expires_at TEXT,
  principal_type TEXT NOT NULL DEFAULT 'agent')
--;
CREATE INDEX internal_agents_live ON internal_agents (is_active, enrollment_method)
--;
CREATE TABLE IF NOT EXISTS mastio_keys (
  kid TEXT PRIMARY KEY, pubkey_pem TEXT NOT NULL, privkey_pem TEXT NOT NULL, cert_pem TEXT, created_at TEXT NOT NULL,
  activated_at TEXT, deprecated_at TEXT, expires_at TEXT)
--;
CREATE TABLE IF NOT EXISTS pending_updates (
  migration_id TEXT PRIMARY KEY, detected_at TEXT NOT NULL, status TEXT NOT NULL, applied_at TEXT, error TEXT)
--;
ALTER TABLE pending_updates ADD COLUMN rolled_back_at TEXT
--;
ALTER TABLE pending_updates ADD COLUMN criticality TEXT
--;
ALTER TABLE pending_updates ADD COLUMN affects_enrollments TEXT
--;
ALTER TABLE pending_updates ADD COLUMN requires TEXT
--;
CREATE TABLE IF NOT EXISTS migration_state_backups (
  migration_id TEXT PRIMARY KEY, created_at TEXT NOT NULL, snapshot_json TEXT NOT NULL)
--;
CREATE TABLE IF NOT EXISTS audit_log (
  id BIGINT PRIMARY KEY, timestamp TEXT NOT NULL, agent_id TEXT NOT NULL, action TEXT NOT NULL, tool_name TEXT,
  status TEXT NOT NULL, detail TEXT, request_id TEXT, duration_ms TEXT, chain_seq BIGINT, prev_hash TEXT, row_hash TEXT,
  dpop_jkt TEXT, on_behalf_of_user_id TEXT, device_attestation TEXT, effective_tier TEXT, hash_format TEXT)
--;
CREATE TABLE IF NOT EXISTS local_audit (
  id BIGINT PRIMARY KEY, timestamp TEXT NOT NULL, agent_id TEXT, event_type TEXT NOT NULL, details TEXT,
  previous_hash TEXT, entry_hash TEXT, session_id TEXT, org_id TEXT, result TEXT NOT NULL DEFAULT 'ok',
  chain_seq BIGINT, peer_org_id TEXT, peer_row_hash TEXT, hash_format TEXT)
--;
CREATE TABLE IF NOT EXISTS local_mcp_resources (
  resource_id TEXT PRIMARY KEY, org_id TEXT, name TEXT NOT NULL, description TEXT, endpoint_url TEXT NOT NULL,
  auth_type TEXT NOT NULL DEFAULT 'none', auth_secret_ref TEXT, required_capability TEXT,
  allowed_domains TEXT NOT NULL DEFAULT '[]', enabled BIGINT NOT NULL DEFAULT 1, created_at TEXT NOT NULL,
  updated_at TEXT NOT NULL, UNIQUE (org_id, name))
--;
ALTER TABLE local_mcp_resources ADD COLUMN input_schema TEXT
--;
CREATE TABLE IF NOT EXISTS local_agent_resource_bindings (
  binding_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL, resource_id TEXT NOT NULL, org_id TEXT, granted_by TEXT NOT NULL,
  granted_at TEXT NOT NULL, revoked_at TEXT, principal_type TEXT NOT NULL DEFAULT 'agent',
  UNIQUE (agent_id, principal_type, resource_id))
--;
CREATE TABLE deploy_state (key TEXT PRIMARY KEY, value TEXT NOT NULL)
--;
CREATE TABLE audit_head (
  id BIGINT PRIMARY KEY CHECK (id = 1), sequence BIGINT NOT NULL, hash TEXT NOT NULL, epoch BIGINT NOT NULL,
  epoch_sequence BIGINT NOT NULL)
--;
INSERT INTO audit_head (id, sequence, hash, epoch, epoch_sequence)
VALUES (1, 0, '0000000000000000000000000000000000000000000000000000000000000000', 1, 0)
--;
CREATE TABLE audit_events (
  seq BIGINT PRIMARY KEY, id TEXT NOT NULL UNIQUE, timestamp TEXT NOT NULL, event_type TEXT NOT NULL,
  actor TEXT NOT NULL, details TEXT NOT NULL, prev_hash TEXT NOT NULL, hash TEXT NOT NULL)
--;
CREATE INDEX audit_events_type ON audit_events (event_type, seq)
--;
CREATE TABLE agent_certificates (
  agent_id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, spki_sha256 TEXT NOT NULL, serial TEXT NOT NULL,
  issuer_key_id TEXT NOT NULL, not_after BIGINT NOT NULL)
--;
CREATE INDEX agent_certificates_issuer ON agent_certificates (issuer_key_id)
--;
CREATE INDEX agent_certificates_not_after ON agent_certificates (not_after)
--;
CREATE TABLE superseded_certificates (
  fingerprint TEXT PRIMARY KEY, agent_id TEXT NOT NULL, spki_sha256 TEXT NOT NULL, superseded_at TEXT NOT NULL,
  superseded_by TEXT NOT NULL)
--;
CREATE INDEX superseded_certificates_agent ON superseded_certificates (agent_id)
--;
CREATE TABLE pki_anchors (
  fingerprint TEXT PRIMARY KEY, cert_pem TEXT NOT NULL, key_sealed TEXT, state TEXT NOT NULL
  CHECK (state IN ('retiring', 'retired')), added_at TEXT NOT NULL, added_by TEXT NOT NULL)
--;
CREATE TABLE pki_cross_certificates (
  fingerprint TEXT PRIMARY KEY, subject_spki_sha256 TEXT NOT NULL, issuer_spki_sha256 TEXT NOT NULL,
  cert_pem TEXT NOT NULL, added_at TEXT NOT NULL)
--;
CREATE TABLE update_runs (
  run_id TEXT PRIMARY KEY, migration_id TEXT NOT NULL, direction TEXT NOT NULL CHECK (direction IN ('apply', 'rollback')),
  phase TEXT NOT NULL, done BIGINT NOT NULL DEFAULT 0, total BIGINT NOT NULL DEFAULT 0, actor TEXT NOT NULL,
  started_at TEXT NOT NULL, updated_at BIGINT NOT NULL, finished_at TEXT, committed_at TEXT, verified_at TEXT,
  halts BIGINT NOT NULL DEFAULT 0, replica TEXT NOT NULL, error TEXT, only_one BIGINT NOT NULL DEFAULT 1)
--;
CREATE UNIQUE INDEX update_runs_one_at_a_time ON update_runs (only_one) WHERE finished_at IS NULL
--;
CREATE INDEX update_runs_migration ON update_runs (migration_id, started_at)
--;
CREATE TABLE update_images (
  run_id TEXT NOT NULL, table_name TEXT NOT NULL, row_key TEXT NOT NULL, column_name TEXT NOT NULL,
  sealed BIGINT NOT NULL DEFAULT 0, before TEXT, before_digest TEXT NOT NULL, restore TEXT, restores BIGINT NOT NULL DEFAULT 0,
  after TEXT, changes BIGINT NOT NULL DEFAULT 0, PRIMARY KEY (run_id, table_name, row_key, column_name))
--;
CREATE TABLE update_run_certificates (
  run_id TEXT NOT NULL, agent_id TEXT NOT NULL, fingerprint TEXT NOT NULL, spki_sha256 TEXT NOT NULL,
  serial TEXT NOT NULL, issuer_key_id TEXT NOT NULL, not_after BIGINT NOT NULL, old_fingerprint TEXT NOT NULL,
  old_serial TEXT NOT NULL, old_issuer_key_id TEXT NOT NULL, PRIMARY KEY (run_id, agent_id))
--;
CREATE TABLE used_jwt_ids (jwt_id TEXT PRIMARY KEY, expires_at BIGINT NOT NULL)
--;
CREATE INDEX used_jwt_ids_expiry ON used_jwt_ids (expires_at)
--;
CREATE TABLE login_challenges (nonce TEXT PRIMARY KEY, agent_id TEXT NOT NULL, expires_at BIGINT NOT NULL)
",
    sqlite: r"
CREATE TRIGGER audit_events_no_update BEFORE UPDATE ON audit_events
BEGIN SELECT RAISE(ABORT, 'audit_events is append-only: UPDATE refused'); END
--;
CREATE TRIGGER audit_events_no_delete BEFORE DELETE ON audit_events
BEGIN SELECT RAISE(ABORT, 'audit_events is append-only: DELETE refused'); END
--;
CREATE TRIGGER epoch_on_pending_updates_insert AFTER INSERT ON pending_updates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_pending_updates_update AFTER UPDATE ON pending_updates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_pending_updates_delete AFTER DELETE ON pending_updates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_mastio_keys_insert AFTER INSERT ON mastio_keys
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_mastio_keys_update AFTER UPDATE ON mastio_keys
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_mastio_keys_delete AFTER DELETE ON mastio_keys
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_internal_agents_insert AFTER INSERT ON internal_agents
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_internal_agents_update AFTER UPDATE ON internal_agents
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_internal_agents_delete AFTER DELETE ON internal_agents
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence;
DELETE FROM agent_certificates WHERE agent_id = OLD.agent_id; END
--;
CREATE TRIGGER certificate_unknown_after_update AFTER UPDATE OF cert_pem ON internal_agents
WHEN NEW.cert_pem IS NOT OLD.cert_pem
BEGIN DELETE FROM agent_certificates WHERE agent_id = NEW.agent_id; END
",
    postgres: r"
CREATE FUNCTION mastio_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP; END $$
--;
CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
FOR EACH STATEMENT EXECUTE FUNCTION mastio_append_only()
--;
CREATE FUNCTION mastio_bump_epoch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; RETURN NULL; END $$
--;
CREATE TRIGGER epoch_on_pending_updates BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON pending_updates
FOR EACH STATEMENT EXECUTE FUNCTION mastio_bump_epoch()
--;
CREATE TRIGGER epoch_on_mastio_keys BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON mastio_keys
FOR EACH STATEMENT EXECUTE FUNCTION mastio_bump_epoch()
--;
CREATE TRIGGER epoch_on_internal_agents BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON internal_agents
FOR EACH STATEMENT EXECUTE FUNCTION mastio_bump_epoch()
--;
CREATE FUNCTION mastio_certificate_unknown() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM agent_certificates c USING agents_before b
  WHERE c.agent_id = b.agent_id AND NOT EXISTS (
    SELECT 1 FROM internal_agents a WHERE a.agent_id = b.agent_id AND a.cert_pem IS NOT DISTINCT FROM b.cert_pem);
  RETURN NULL;
END $$
--;
CREATE TRIGGER certificate_unknown_after_update AFTER UPDATE ON internal_agents
REFERENCING OLD TABLE AS agents_before FOR EACH STATEMENT EXECUTE FUNCTION mastio_certificate_unknown()
--;
CREATE TRIGGER certificate_unknown_after_delete AFTER DELETE ON internal_agents
REFERENCING OLD TABLE AS agents_before FOR EACH STATEMENT EXECUTE FUNCTION mastio_certificate_unknown()
",
};
