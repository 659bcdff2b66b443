//! Leaves whose facts were forgotten because an operator's SQL has put another one there: the detector looks at these and
//! lists no fleet.

use super::Step;

pub(super) const STEP: Step = Step {
    number: 14,
    name: "leaves without facts",
    both: r"
CREATE TABLE leaves_without_facts (agent_id TEXT PRIMARY KEY)
--;
INSERT INTO leaves_without_facts (agent_id) SELECT a.agent_id FROM internal_agents a WHERE a.cert_pem IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM agent_certificates c WHERE c.agent_id = a.agent_id)
",
    sqlite: r"
CREATE TRIGGER leaf_without_facts AFTER DELETE ON agent_certificates
BEGIN INSERT INTO leaves_without_facts (agent_id) VALUES (OLD.agent_id) ON CONFLICT (agent_id) DO NOTHING; END
",
    postgres: r"
CREATE FUNCTION mastio_leaf_without_facts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO leaves_without_facts (agent_id) SELECT agent_id FROM facts_before ON CONFLICT (agent_id) DO NOTHING;
  RETURN NULL;
END $$
--;
CREATE TRIGGER leaf_without_facts AFTER DELETE ON agent_certificates
REFERENCING OLD TABLE AS facts_before FOR EACH STATEMENT EXECUTE FUNCTION mastio_leaf_without_facts()
",
};
