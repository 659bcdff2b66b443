//! Certificates that no longer count, and the lists of them that were signed.
//!
//! A revocation is by fingerprint; `serial` is empty where a former certificate is known by its fingerprint alone. Times
//! are Unix seconds.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 11,
    name: "revocation",
    both: r"
CREATE TABLE revoked_certificates (
  fingerprint TEXT PRIMARY KEY, agent_id TEXT NOT NULL, serial TEXT NOT NULL, issuer_key_id TEXT NOT NULL,
  not_after BIGINT NOT NULL, revoked_at BIGINT NOT NULL, reason TEXT NOT NULL, revoked_by TEXT NOT NULL)
--;
CREATE INDEX revoked_certificates_agent ON revoked_certificates (agent_id, revoked_at)
--;
CREATE INDEX revoked_certificates_issuer ON revoked_certificates (issuer_key_id, not_after)
--;
CREATE TABLE pki_crls (
  issuer_key_id TEXT PRIMARY KEY, number BIGINT NOT NULL, this_update BIGINT NOT NULL, next_update BIGINT NOT NULL,
  content_digest TEXT NOT NULL, der_base64 TEXT NOT NULL)
--;
ALTER TABLE superseded_certificates ADD COLUMN serial TEXT
--;
ALTER TABLE superseded_certificates ADD COLUMN issuer_key_id TEXT
--;
ALTER TABLE superseded_certificates ADD COLUMN not_after BIGINT
",
    sqlite: r"
CREATE TRIGGER epoch_on_revoked_certificates_insert AFTER INSERT ON revoked_certificates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_revoked_certificates_update AFTER UPDATE ON revoked_certificates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
CREATE TRIGGER epoch_on_revoked_certificates_delete AFTER DELETE ON revoked_certificates
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
",
    postgres: r"
CREATE TRIGGER epoch_on_revoked_certificates BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON revoked_certificates
FOR EACH STATEMENT EXECUTE FUNCTION mastio_bump_epoch()
",
};
