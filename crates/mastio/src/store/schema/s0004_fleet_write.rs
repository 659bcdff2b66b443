//! Triggers that leave the engine's own write of a fleet alone.
//!
//! What an operator's SQL does to a leaf row moves the epoch and forgets the facts beside it, row by row. The one
//! statement of an update does both itself, once for the fleet, so that everybody waits for it half as long. The mark
//! in `deploy_state` is set and taken back in that transaction and never seen outside it.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 4,
    name: "fleet write",
    both: r"
CREATE INDEX update_images_unchanged ON update_images (run_id) WHERE changes = 0
",
    sqlite: r"
DROP TRIGGER epoch_on_internal_agents_update
--;
CREATE TRIGGER epoch_on_internal_agents_update AFTER UPDATE ON internal_agents
WHEN NOT EXISTS (SELECT 1 FROM deploy_state WHERE key = 'fleet_write')
BEGIN UPDATE audit_head SET epoch = epoch + 1, epoch_sequence = sequence; END
--;
DROP TRIGGER certificate_unknown_after_update
--;
CREATE TRIGGER certificate_unknown_after_update AFTER UPDATE OF cert_pem ON internal_agents
WHEN NEW.cert_pem IS NOT OLD.cert_pem AND NOT EXISTS (SELECT 1 FROM deploy_state WHERE key = 'fleet_write')
BEGIN DELETE FROM agent_certificates WHERE agent_id = NEW.agent_id; END
",
    postgres: r"
CREATE OR REPLACE FUNCTION mastio_certificate_unknown() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' AND EXISTS (SELECT 1 FROM deploy_state WHERE key = 'fleet_write') THEN RETURN NULL; END IF;
  DELETE FROM agent_certificates c USING agents_before b
  WHERE c.agent_id = b.agent_id AND NOT EXISTS (
    SELECT 1 FROM internal_agents a WHERE a.agent_id = b.agent_id AND a.cert_pem IS NOT DISTINCT FROM b.cert_pem);
  RETURN NULL;
END $$
",
};
