//! The PKI state's rows, read into an [`Authority`] and written from new certificates and keys.

use std::collections::HashMap;
use std::sync::Arc;

use mastio_core::time::UnixTime;
use mastio_core::token::jwk::PublicJwk;
use mastio_core::x509::Certificate;
use mastio_core::x509::lints::leaf_gaps;
use mastio_core::x509::path::Anchor;

use super::keys::{NewKey, PrivateKey, SealingKey};
use super::{Authority, PkiError, RetiringAnchor, TokenKey};
use crate::store::{Query, WriteTx};
use crate::values;

/// Keys of `proxy_config`.
pub mod config_key {
    /// The organisation's id.
    pub const ORG_ID: &str = "org_id";
    /// The current Org CA's certificate, PEM.
    pub const ORG_CA_CERT: &str = "org_ca_cert";
    /// Its private key, sealed.
    pub const ORG_CA_KEY: &str = "org_ca_key";
    /// The intermediate's certificate, PEM.
    pub const MASTIO_CA_CERT: &str = "mastio_ca_cert";
    /// Its private key, sealed.
    pub const MASTIO_CA_KEY: &str = "mastio_ca_key";
}

/// Takes away the certificates of the token keys, whose issuer is no more. The keys stay.
pub async fn forget_token_certificates(tx: &mut WriteTx) -> Result<(), PkiError> {
    tx.execute("UPDATE mastio_keys SET cert_pem = NULL WHERE cert_pem IS NOT NULL", &[]).await?;
    Ok(())
}

/// Where a value of `proxy_config` lies, for sealing.
#[must_use]
pub fn config_place(key: &str) -> String {
    format!("proxy_config/{key}/value")
}

/// Where a token key lies.
#[must_use]
pub fn token_key_place(kid: &str) -> String {
    format!("mastio_keys/{kid}/privkey_pem")
}

/// Where a retiring Org CA's key lies.
#[must_use]
pub fn anchor_place(fingerprint: &str) -> String {
    format!("pki_anchors/{fingerprint}/key_sealed")
}

/// A value of `proxy_config`.
pub async fn config(tx: &mut impl Query, key: &str) -> Result<Option<String>, PkiError> {
    let row = tx.row("SELECT value FROM proxy_config WHERE key = $1", values![key]).await?;
    Ok(row.map(|row| row.text(0)).transpose()?)
}

/// Notes that a new organisation waits for its first operator (`operators/setup.rs`). No token fits yet.
pub async fn wait_for_setup(tx: &mut WriteTx) -> Result<(), PkiError> {
    tx.execute("INSERT INTO deploy_state (key, value) VALUES ('setup', '')", &[]).await?;
    Ok(())
}

/// Writes a value of `proxy_config`.
pub async fn set_config(tx: &mut WriteTx, key: &str, value: &str) -> Result<(), PkiError> {
    tx.execute(
        "INSERT INTO proxy_config (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        values![key, value],
    )
    .await?;
    Ok(())
}

/// Reads everything. `opened` has keys of an earlier image by their sealed text, so that a key is opened once.
pub(super) async fn load(
    tx: &mut impl Query,
    sealing: &SealingKey,
    epoch: i64,
    opened: &HashMap<String, Arc<PrivateKey>>,
) -> Result<Authority, PkiError> {
    let mut keys = KeyRing { sealing, earlier: opened, opened: HashMap::new() };
    let org_id =
        config(tx, config_key::ORG_ID).await?.ok_or(PkiError::State { what: "proxy_config org_id" })?;
    let org_ca_pem = config(tx, config_key::ORG_CA_CERT)
        .await?
        .ok_or(PkiError::State { what: "proxy_config org_ca_cert" })?;
    let org_ca = Certificate::from_pem(&org_ca_pem)?;
    let org_ca_key = keys.config(tx, config_key::ORG_CA_KEY).await?;
    let mastio_ca = match config(tx, config_key::MASTIO_CA_CERT).await? {
        Some(pem) => Some(Certificate::from_pem(&pem)?),
        None => None,
    };
    let mastio_ca_key = keys.config(tx, config_key::MASTIO_CA_KEY).await?;

    let mut retiring = Vec::new();
    for row in tx
        .rows(
            "SELECT fingerprint, cert_pem, key_sealed FROM pki_anchors WHERE state = 'retiring' ORDER BY added_at DESC",
            &[],
        )
        .await?
    {
        let key = match row.optional_text(2)? {
            Some(sealed) => Some(keys.open(&anchor_place(&row.text(0)?), &sealed)?),
            None => None,
        };
        retiring.push(RetiringAnchor { certificate: Certificate::from_pem(&row.text(1)?)?, key });
    }
    let mut cross_certificates = Vec::new();
    for row in
        tx.rows("SELECT cert_pem FROM pki_cross_certificates ORDER BY added_at, fingerprint", &[]).await?
    {
        cross_certificates.push(Certificate::from_pem(&row.text(0)?)?);
    }
    let mut token_keys = Vec::new();
    for row in tx
        .rows(
            "SELECT kid, privkey_pem, cert_pem, activated_at, deprecated_at, expires_at FROM mastio_keys ORDER BY kid",
            &[],
        )
        .await?
    {
        let kid = row.text(0)?;
        let key = keys.open(&token_key_place(&kid), &row.text(1)?)?;
        let time = |index| -> Result<Option<UnixTime>, PkiError> {
            Ok(row.optional_text(index)?.and_then(|text| UnixTime::parse(&text)))
        };
        token_keys.push(TokenKey {
            public: PublicJwk::from_spki_der(key.spki_der())
                .map_err(|_| PkiError::State { what: "the public key in mastio_keys" })?,
            certificate: row.optional_text(2)?.and_then(|pem| Certificate::from_pem(&pem).ok()),
            activated_at: time(3)?,
            deprecated_at: time(4)?,
            expires_at: time(5)?,
            kid,
            key,
        });
    }
    let mut trust = vec![Anchor::from_certificate(&org_ca)?];
    for anchor in &retiring {
        trust.push(Anchor::from_certificate(&anchor.certificate)?);
    }
    let opened = keys.opened;
    Ok(Authority {
        epoch,
        org_id,
        org_ca,
        org_ca_key,
        mastio_ca,
        mastio_ca_key,
        retiring,
        cross_certificates,
        token_keys,
        trust,
        opened,
    })
}

struct KeyRing<'a> {
    sealing: &'a SealingKey,
    earlier: &'a HashMap<String, Arc<PrivateKey>>,
    opened: HashMap<String, Arc<PrivateKey>>,
}

impl KeyRing<'_> {
    async fn config(&mut self, tx: &mut impl Query, key: &str) -> Result<Option<Arc<PrivateKey>>, PkiError> {
        match config(tx, key).await? {
            Some(sealed) => Ok(Some(self.open(&config_place(key), &sealed)?)),
            None => Ok(None),
        }
    }

    fn open(&mut self, place: &str, sealed: &str) -> Result<Arc<PrivateKey>, PkiError> {
        let key = match self.earlier.get(sealed) {
            Some(key) => Arc::clone(key),
            None => Arc::new(self.sealing.open_key(place, sealed)?),
        };
        self.opened.insert(sealed.to_owned(), Arc::clone(&key));
        Ok(key)
    }
}

/// Writes a CA's certificate and, where it is new, its key.
pub async fn set_ca(
    tx: &mut WriteTx,
    sealing: &SealingKey,
    cert_key: &str,
    certificate: &Certificate,
    private_key: Option<(&str, &NewKey)>,
) -> Result<(), PkiError> {
    set_config(tx, cert_key, &certificate.to_pem()).await?;
    if let Some((key, new)) = private_key {
        set_config(tx, key, &new.seal(sealing, &config_place(key))?).await?;
    }
    Ok(())
}

/// Adds an Org CA that is being phased out. One that is there already keeps its row.
pub async fn add_retiring_anchor(
    tx: &mut WriteTx,
    certificate: &Certificate,
    key_sealed: Option<String>,
    added_by: &str,
    now: UnixTime,
) -> Result<(), PkiError> {
    tx.execute(
        "INSERT INTO pki_anchors (fingerprint, cert_pem, key_sealed, state, added_at, added_by) \
         VALUES ($1, $2, $3, 'retiring', $4, $5) ON CONFLICT (fingerprint) DO UPDATE SET state = 'retiring', \
         key_sealed = COALESCE(excluded.key_sealed, pki_anchors.key_sealed)",
        values![certificate.fingerprint(), certificate.to_pem(), key_sealed, now.to_rfc3339(), added_by],
    )
    .await?;
    Ok(())
}

/// Keeps an old-with-new certificate.
pub async fn add_cross_certificate(
    tx: &mut WriteTx,
    certificate: &Certificate,
    issuer: &Certificate,
    now: UnixTime,
) -> Result<(), PkiError> {
    tx.execute(
        "INSERT INTO pki_cross_certificates (fingerprint, subject_spki_sha256, issuer_spki_sha256, cert_pem, added_at) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (fingerprint) DO NOTHING",
        values![
            certificate.fingerprint(),
            certificate.spki_sha256(),
            issuer.spki_sha256(),
            certificate.to_pem(),
            now.to_rfc3339()
        ],
    )
    .await?;
    Ok(())
}

/// What the detector asks of an agent's certificate, kept beside it in `agent_certificates`.
pub struct CertificateFacts {
    /// SHA-256 of the leaf's DER, lowercase hex.
    pub fingerprint: String,
    /// SHA-256 of its SPKI, lowercase hex.
    pub spki_sha256: String,
    /// Serial, lowercase hex.
    pub serial: String,
    /// Key id of the CA whose signature it bears, lowercase hex; empty where none that we know signed it.
    pub issuer_key_id: String,
    /// Unix seconds.
    pub not_after: i64,
    /// What the agent profile asks for and the leaf lacks, comma-separated; empty where it is complete.
    pub profile_gaps: String,
}

impl CertificateFacts {
    /// Facts of `leaf`, whose signature is tried against `candidates`.
    #[must_use]
    pub fn of(leaf: &Certificate, candidates: &[Certificate]) -> Self {
        let issuer = candidates.iter().find(|candidate| leaf.verify_signature(candidate).is_ok());
        Self::issued_by(leaf, issuer)
    }

    /// Facts of `leaf`, known to be signed by `issuer`.
    #[must_use]
    pub fn issued_by(leaf: &Certificate, issuer: Option<&Certificate>) -> Self {
        Self {
            fingerprint: leaf.fingerprint(),
            spki_sha256: leaf.spki_sha256(),
            serial: leaf.serial_hex(),
            issuer_key_id: issuer.map(|issuer| hex(&issuer.key_id())).unwrap_or_default(),
            not_after: leaf.not_after().0,
            profile_gaps: leaf_gaps(leaf).join(","),
        }
    }

    /// The row for `agent_certificates`, `agent_id` in front.
    #[must_use]
    pub fn row(&self, agent_id: &str) -> Vec<crate::store::Value> {
        values![
            agent_id,
            &self.fingerprint,
            &self.spki_sha256,
            &self.serial,
            &self.issuer_key_id,
            self.not_after,
            &self.profile_gaps
        ]
        .to_vec()
    }
}

/// Writes facts beside the certificates they are about.
pub async fn set_certificate_facts(
    tx: &mut WriteTx,
    rows: &[Vec<crate::store::Value>],
) -> Result<(), PkiError> {
    tx.insert_many(
        "agent_certificates (agent_id, fingerprint, spki_sha256, serial, issuer_key_id, not_after, profile_gaps)",
        rows,
        "ON CONFLICT (agent_id) DO UPDATE SET fingerprint = excluded.fingerprint, spki_sha256 = excluded.spki_sha256, \
         serial = excluded.serial, issuer_key_id = excluded.issuer_key_id, not_after = excluded.not_after, \
         profile_gaps = excluded.profile_gaps",
    )
    .await?;
    Ok(())
}

/// Lowercase hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}
