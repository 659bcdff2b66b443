//! What is read and decided before the first change: whether this database can be adopted at all.
//!
//! Everything that could fail later for what lies in the file is looked at here, so that a refusal leaves it as it was.

use std::collections::BTreeMap;

use mastio_core::x509::Certificate;
use zeroize::Zeroizing;

use super::fernet::{Fernet, FernetError, KeyPair};
use super::store::{self, TABLES};
use super::{AdoptError, REVISION};
use crate::pki::keys::PrivateKey;
use crate::pki::store::{config, config_key, config_place, hex, token_key_place};
use crate::store::Query;

/// A database that can be adopted.
pub(super) struct Findings {
    pub org_id: String,
    pub agents: i64,
    pub org_ca: Certificate,
    pub intermediate: Option<Certificate>,
    /// CA keys of the encrypted store, in clear, to be sealed into `proxy_config`.
    pub stored: Vec<StoredCa>,
    pub snapshots: Vec<Snapshot>,
}

/// A CA whose key the predecessor had encrypted.
pub(super) struct StoredCa {
    /// Key of its certificate in `proxy_config`.
    pub cert_key: &'static str,
    /// Key of its private key there.
    pub key_key: &'static str,
    /// The certificate where `proxy_config` lacks it.
    pub missing_cert_pem: Option<String>,
    pub key_pem: Zeroizing<String>,
}

/// A snapshot of the predecessor's, understood.
pub(super) struct Snapshot {
    pub migration_id: String,
    pub created_at: String,
    pub status: Option<String>,
    pub org_ca: Certificate,
    pub org_ca_cert_pem: String,
    pub org_ca_key_pem: Option<Zeroizing<String>>,
    /// Whether that key belongs to that certificate.
    pub key_matches: bool,
    pub leaves: BTreeMap<String, Option<String>>,
}

/// The predecessor's JSON. A field that it does not write might hold a key in clear, so none is passed over.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotJson {
    org_ca_cert_pem: String,
    org_ca_key_pem: Option<String>,
    internal_agents: BTreeMap<String, Option<String>>,
}

/// Decides. Reads only.
pub(super) async fn examine(tx: &mut impl Query, passphrase: Option<&str>) -> Result<Findings, AdoptError> {
    let revisions = store::revisions(tx).await?;
    if revisions != [REVISION] {
        let found = if revisions.is_empty() { "(none)".to_owned() } else { revisions.join(", ") };
        return Err(AdoptError::Revision { found, expected: REVISION });
    }
    for table in TABLES {
        if !store::has_table(tx, table).await? {
            return Err(AdoptError::Missing { what: format!("table {table}") });
        }
    }
    if let Some(finding) = store::damage(tx).await? {
        return Err(AdoptError::Damaged { finding });
    }
    let org_id = config(tx, config_key::ORG_ID)
        .await?
        .ok_or_else(|| AdoptError::Missing { what: "row org_id in proxy_config".to_owned() })?;

    let mut stored = stored_keys(tx, passphrase).await?;
    let org = authority(tx, config_key::ORG_CA_CERT, config_key::ORG_CA_KEY, stored.remove("org_ca")).await?;
    let mastio = authority(
        tx,
        config_key::MASTIO_CA_CERT,
        config_key::MASTIO_CA_KEY,
        stored.remove("intermediate_ca"),
    )
    .await?;
    let org_ca = org
        .certificate
        .ok_or_else(|| AdoptError::Missing { what: "row org_ca_cert in proxy_config".to_owned() })?;
    let found = org_ca.subject_common_name().map(|name| name.to_string()).unwrap_or_default();
    if found != format!("{org_id} CA") {
        return Err(AdoptError::Name { org_id, found });
    }
    token_keys(tx).await?;
    Ok(Findings {
        agents: store::agents(tx).await?,
        org_id,
        org_ca,
        intermediate: mastio.certificate,
        stored: [org.stored, mastio.stored].into_iter().flatten().collect(),
        snapshots: snapshots(tx).await?,
    })
}

/// Opens the active keys of the encrypted store, by their type.
async fn stored_keys(
    tx: &mut impl Query,
    passphrase: Option<&str>,
) -> Result<BTreeMap<String, KeyPair>, AdoptError> {
    let mut opened = BTreeMap::new();
    if !store::is_encrypted(tx).await? {
        return Ok(opened);
    }
    let passphrase = Zeroizing::new(passphrase.ok_or(AdoptError::PassphraseMissing)?.to_owned());
    let fernet = tokio::task::spawn_blocking(move || Fernet::derive(&passphrase))
        .await
        .map_err(|_| AdoptError::Stopped)?;
    for row in store::active_stored_keys(tx).await? {
        let place = format!("pki_key_store/{}/ciphertext", row.key_id);
        let pair = fernet.open(&row.ciphertext).map_err(|error| match error {
            FernetError::Key => AdoptError::PassphraseWrong,
            FernetError::Shape => {
                AdoptError::not_understood(&place, "it is no Fernet token of a key and its certificate")
            }
        })?;
        if !matches!(row.key_type.as_str(), "org_ca" | "intermediate_ca") {
            return Err(AdoptError::not_understood(&place, format!("its key_type is {}", row.key_type)));
        }
        if opened.insert(row.key_type.clone(), pair).is_some() {
            return Err(AdoptError::not_understood(
                &place,
                format!("it is the second active {}", row.key_type),
            ));
        }
    }
    Ok(opened)
}

/// One CA as found.
struct Found {
    certificate: Option<Certificate>,
    stored: Option<StoredCa>,
}

/// Reads a CA from `proxy_config` and the encrypted store, and holds both against each other.
async fn authority(
    tx: &mut impl Query,
    cert_key: &'static str,
    key_key: &'static str,
    pair: Option<KeyPair>,
) -> Result<Found, AdoptError> {
    let cert_place = config_place(cert_key);
    let key_place = config_place(key_key);
    let cert_pem = config(tx, cert_key).await?;
    let mut certificate = cert_pem.as_deref().map(|pem| certificate(&cert_place, pem)).transpose()?;
    if let Some(key_pem) = config(tx, key_key).await?.map(Zeroizing::new) {
        if pair.is_some() {
            return Err(AdoptError::not_understood(&key_place, "the same key lies in pki_key_store too"));
        }
        let spki = key_spki(&key_place, &key_pem)?;
        if certificate.as_ref().is_some_and(|certificate| certificate.spki_sha256() != spki) {
            return Err(AdoptError::KeyMismatch { place: key_place });
        }
    }
    let Some(pair) = pair else { return Ok(Found { certificate, stored: None }) };
    let own = self::certificate("pki_key_store", &pair.cert_pem)?;
    if key_spki("pki_key_store", &pair.key_pem)? != own.spki_sha256() {
        return Err(AdoptError::KeyMismatch { place: "pki_key_store".to_owned() });
    }
    if certificate.as_ref().is_some_and(|public| public.fingerprint() != own.fingerprint()) {
        return Err(AdoptError::not_understood(
            &cert_place,
            "the active key in pki_key_store has another certificate",
        ));
    }
    let missing_cert_pem = certificate.is_none().then_some(pair.cert_pem);
    certificate.get_or_insert(own);
    Ok(Found {
        certificate,
        stored: Some(StoredCa { cert_key, key_key, missing_cert_pem, key_pem: pair.key_pem }),
    })
}

fn certificate(place: &str, pem: &str) -> Result<Certificate, AdoptError> {
    Certificate::from_pem(pem)
        .map_err(|error| AdoptError::not_understood(place, format!("not a certificate: {error}")))
}

/// SHA-256 of a private key's SPKI, lowercase hex.
fn key_spki(place: &str, pem: &str) -> Result<String, AdoptError> {
    let key = PrivateKey::from_pem(place, pem)
        .map_err(|_| AdoptError::not_understood(place, "not a PKCS#8 P-256 or RSA private key"))?;
    Ok(hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, key.spki_der()).as_ref()))
}

/// A token key that does not parse would stop the server later.
async fn token_keys(tx: &mut impl Query) -> Result<(), AdoptError> {
    let mut after = String::new();
    loop {
        let page = store::token_keys(tx, &after).await?;
        let Some(last) = page.last() else { return Ok(()) };
        for key in &page {
            key_spki(&token_key_place(&key.row_key), &key.pem)?;
        }
        after.clone_from(&last.row_key);
    }
}

async fn snapshots(tx: &mut impl Query) -> Result<Vec<Snapshot>, AdoptError> {
    /// The predecessor wrote a whole fleet as one text, which has to be read as one: 150 MB for 100,000 agents.
    const SNAPSHOT_CHARACTERS_MAX: i64 = 512 * 1024 * 1024;
    if let Some(found) = store::largest_backup(tx).await?.filter(|found| *found > SNAPSHOT_CHARACTERS_MAX) {
        let why =
            format!("a snapshot of {found} characters, where {SNAPSHOT_CHARACTERS_MAX} are read at most");
        return Err(AdoptError::not_understood("migration_state_backups/snapshot_json", why));
    }
    let mut snapshots = Vec::new();
    for row in store::backups(tx).await? {
        let place = format!("migration_state_backups/{}/snapshot_json", row.migration_id);
        let json: SnapshotJson = serde_json::from_str(&row.snapshot_json)
            // The cause quotes what it stumbles over, which may be a key.
            .map_err(|error| {
                AdoptError::not_understood(&place, format!("line {} is no snapshot", error.line()))
            })?;
        let org_ca = certificate(&place, &json.org_ca_cert_pem)?;
        let org_ca_key_pem = json.org_ca_key_pem.map(Zeroizing::new);
        let key_matches = match &org_ca_key_pem {
            Some(pem) => key_spki(&place, pem)? == org_ca.spki_sha256(),
            None => false,
        };
        snapshots.push(Snapshot {
            migration_id: row.migration_id,
            created_at: row.created_at,
            status: row.status,
            org_ca,
            org_ca_cert_pem: json.org_ca_cert_pem,
            org_ca_key_pem,
            key_matches,
            leaves: json.internal_agents,
        });
    }
    Ok(snapshots)
}
