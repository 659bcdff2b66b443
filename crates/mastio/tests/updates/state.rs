//! What stands in a database, read from outside and comparable.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use mastio_core::x509::Certificate;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::Value;

use crate::server::{Deploy, MIGRATION, output};

/// The public part of the PKI state, every text as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkiState {
    pub org_ca: String,
    pub mastio_ca: Option<String>,
    /// `cert_pem` by agent.
    pub leaves: BTreeMap<String, String>,
    /// Every other column of every agent.
    pub agents: BTreeMap<String, Value>,
    /// Every column of the token keys but the sealed private half.
    pub token_keys: Vec<Value>,
    /// `proxy_config` without private keys, which adoption seals, and certificates of the CA.
    pub config: Vec<Value>,
}

impl PkiState {
    pub fn read(deploy: &Deploy) -> Self {
        let mut config: BTreeMap<String, String> = deploy
            .rows("SELECT key, value FROM proxy_config ORDER BY key")
            .iter()
            .map(|row| (text(row, "key"), text(row, "value")))
            .collect();
        let org_ca = config.remove("org_ca_cert").unwrap();
        let mastio_ca = config.remove("mastio_ca_cert");
        config.retain(|key, _| !key.ends_with("_key") && !key.starts_with("agent_key:"));
        let (mut leaves, mut agents) = (BTreeMap::new(), BTreeMap::new());
        for mut row in deploy.rows("SELECT * FROM internal_agents ORDER BY agent_id") {
            let agent_id = text(&row, "agent_id");
            if let Some(Value::String(leaf)) = row.as_object_mut().unwrap().remove("cert_pem") {
                leaves.insert(agent_id.clone(), leaf);
            }
            agents.insert(agent_id, row);
        }
        let token_keys = deploy.rows(
            "SELECT kid, pubkey_pem, cert_pem, created_at, activated_at, deprecated_at, expires_at FROM mastio_keys \
             ORDER BY kid",
        );
        let config = config.into_iter().map(|(key, value)| serde_json::json!([key, value])).collect();
        Self { org_ca, mastio_ca, leaves, agents, token_keys, config }
    }

    /// Agents that hold a certificate of ours.
    pub fn of_mastio(&self) -> Vec<&str> {
        let foreign = ["byoca", "spire", "spiffe"];
        let ours =
            |id: &&String| !foreign.contains(&self.agents[*id]["enrollment_method"].as_str().unwrap_or(""));
        self.leaves.keys().filter(ours).map(String::as_str).collect()
    }

    /// Asserts that `self` is what an apply makes of `before`: a new `pathLen=1` root of the same name and end, the
    /// intermediate and every leaf of ours below it with the keys they had, and nothing else changed.
    pub fn assert_repaired_from(&self, before: &Self) {
        assert_ne!(self.org_ca, before.org_ca);
        let (old, new) = (certificate(&before.org_ca), certificate(&self.org_ca));
        assert_eq!(new.basic_constraints().unwrap().path_len, Some(1));
        assert_eq!(new.subject_der(), old.subject_der());
        assert_eq!(new.not_after(), old.not_after());
        if let Some(former) = &before.mastio_ca {
            let present = certificate(self.mastio_ca.as_ref().unwrap());
            assert_eq!(present.spki_sha256(), certificate(former).spki_sha256());
        }
        self.assert_under_one_chain();
        for agent_id in self.of_mastio() {
            let (old, new) = (certificate(&before.leaves[agent_id]), certificate(&self.leaves[agent_id]));
            assert_ne!(old.fingerprint(), new.fingerprint(), "{agent_id} was not re-signed");
            assert_eq!(old.spki_sha256(), new.spki_sha256(), "{agent_id} has another key");
            assert_eq!(old.subject_der(), new.subject_der(), "{agent_id} has another subject");
            assert_eq!(old.not_after(), new.not_after(), "{agent_id} has another end");
        }
        self.assert_rest_is(before);
    }

    /// Asserts that what no apply may touch is as before: ids, org id, token keys, leaves that others issued.
    pub fn assert_rest_is(&self, before: &Self) {
        self.assert_records_are(before);
        let ours: BTreeSet<&str> = before.of_mastio().into_iter().collect();
        for (agent_id, leaf) in before.leaves.iter().filter(|(agent_id, _)| !ours.contains(agent_id.as_str()))
        {
            assert_eq!(&self.leaves[agent_id], leaf, "{agent_id} has a certificate of another CA");
        }
    }

    /// Asserts the same without the leaves.
    pub fn assert_records_are(&self, before: &Self) {
        assert_eq!(self.agents, before.agents);
        // Where there was no intermediate, the token key is made as soon as there is one.
        if !before.token_keys.is_empty() {
            assert_eq!(self.token_keys, before.token_keys);
        }
        assert_eq!(self.config, before.config);
    }

    /// Asserts by rustls-webpki that every leaf of ours stands under the intermediate under the root.
    pub fn assert_under_one_chain(&self) {
        let root = der(&self.org_ca);
        let anchor = webpki::anchor_from_trusted_cert(&root).unwrap();
        let between = der(self.mastio_ca.as_ref().unwrap());
        for agent_id in self.of_mastio() {
            let leaf = der(&self.leaves[agent_id]);
            let leaf = webpki::EndEntityCert::try_from(&leaf).unwrap();
            leaf.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                std::slice::from_ref(&anchor),
                std::slice::from_ref(&between),
                UnixTime::now(),
                webpki::KeyUsage::client_auth(),
                None,
                None,
            )
            .unwrap_or_else(|error| panic!("{agent_id}: {error}"));
        }
    }
}

pub fn text(row: &Value, column: &str) -> String {
    row[column].as_str().unwrap_or_else(|| panic!("{column} of {row}")).to_owned()
}

pub fn certificate(pem: &str) -> Certificate {
    Certificate::from_pem(pem).unwrap()
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// The migration's row: its status.
pub fn status(deploy: &Deploy) -> Option<String> {
    let sql = format!("SELECT status FROM pending_updates WHERE migration_id = '{MIGRATION}'");
    deploy.rows(&sql).first().map(|row| text(row, "status"))
}

/// Runs that have not come to an end.
pub fn open_runs(deploy: &Deploy) -> i64 {
    deploy.count("SELECT COUNT(*) FROM update_runs WHERE finished_at IS NULL")
}

/// Everything in a stopped deploy's database, row by row: its table's name, then its values.
pub fn dump(deploy: &Deploy) -> BTreeSet<String> {
    if deploy.file().exists() {
        let text = output(Command::new("sqlite3").arg(deploy.file()).arg(".dump"));
        return text.split("\nINSERT INTO ").map(str::to_owned).collect();
    }
    let every_table = "SELECT string_agg(format('SELECT %L || row_to_json(t)::text AS line FROM %I t', \
        tablename || ' ', tablename), ' UNION ALL ') AS sql FROM pg_tables WHERE schemaname = 'public'";
    let sql = text(&deploy.rows(every_table)[0], "sql");
    deploy.rows(&sql).iter().map(|row| text(row, "line")).collect()
}
