//! Our own TLS certificate: which key signs it, what it is sent with, when it is made anew.
//!
//! While the Org CA has `pathLen=0`, the leaf is issued directly by it: no verifier would accept the intermediate
//! below. After an update that replaced the Org CA, the leaf stays under the *outgoing* key and is followed by the
//! old-with-new certificate (RFC 4210 §4.4): who pins the old root finds leaf ← old root, who pins the new one finds
//! leaf ← old-with-new ← new root. The same chain goes on after a rollback. With a healthy Org CA and nothing
//! retiring, the leaf comes from the intermediate. Where no key of the organisation can sign, it comes from a CA
//! made for it alone, so that the server always boots and can say what is wrong.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::{Certificate, Names, Validity, profile};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;

use super::keys::{self, PrivateKey};
use super::sealing::{set_state, state};
use super::{Authority, BACKDATE_S, Pki, PkiError, store as rows};
use crate::http::server::tls_config;
use crate::updates::halt::ExemptPermit;

/// A server certificate lives ninety days and is renewed thirty days ahead.
const VALIDITY_S: i64 = 90 * 86_400;
const RENEW_BEFORE_S: i64 = 30 * 86_400;
const KEY_PLACE: &str = "deploy_state/tls_key/value";

/// By which names clients reach us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerNames {
    /// DNS names, the most public one first.
    pub dns: Vec<String>,
    /// IP addresses.
    pub ips: Vec<IpAddr>,
}

/// Who signs the TLS leaf, and what follows the leaf in the handshake.
struct Signer<'a> {
    issuer: &'a Certificate,
    key: &'a PrivateKey,
    follows: Vec<&'a Certificate>,
}

impl Authority {
    /// Whether our TLS certificate has somebody to sign it when no retiring key is left.
    #[must_use]
    pub fn can_issue_tls_without_retiring(&self, now: UnixTime) -> bool {
        self.tls_signer_after(None, now).is_some()
    }

    fn tls_signer(&self, now: UnixTime) -> Option<Signer<'_>> {
        let outgoing =
            self.retiring.iter().find_map(|anchor| Some((&anchor.certificate, anchor.key.as_deref()?)));
        self.tls_signer_after(outgoing, now)
    }

    fn tls_signer_after<'a>(
        &'a self,
        outgoing: Option<(&'a Certificate, &'a PrivateKey)>,
        now: UnixTime,
    ) -> Option<Signer<'a>> {
        let legacy_root = self
            .org_ca_key
            .as_deref()
            .filter(|_| self.org_ca_has_legacy_path_len())
            .map(|key| (&self.org_ca, key));
        if let Some((issuer, key)) =
            outgoing.or(legacy_root).filter(|(certificate, _)| certificate.not_after() > now)
        {
            let follows = self
                .cross_certificates
                .iter()
                .filter(|cross| cross.spki_der() == issuer.spki_der() && cross.not_after() > now)
                .collect();
            return Some(Signer { issuer, key, follows });
        }
        let (issuer, key) = (self.mastio_ca.as_ref()?, self.mastio_ca_key.as_deref()?);
        (issuer.not_after() > now).then(|| Signer { issuer, key, follows: vec![issuer] })
    }
}

/// The server certificate in force. Cheap to share.
pub struct Tls {
    names: ServerNames,
    files: Option<(PathBuf, PathBuf)>,
    /// The configuration that new connections get.
    pub config: Arc<ArcSwap<ServerConfig>>,
    not_after: ArcSwap<UnixTime>,
    // Which key signs and what follows the leaf, as they were when the chain was built.
    built_from: ArcSwap<Vec<String>>,
}

impl Tls {
    /// Issues or loads the server certificate.
    ///
    /// `files`: a certificate chain and key of the operator's own, which override ours.
    pub async fn start(
        pki: &Pki,
        names: ServerNames,
        files: Option<(PathBuf, PathBuf)>,
    ) -> Result<Self, PkiError> {
        let (config, not_after) = current(pki, &names, files.as_ref()).await?;
        Ok(Self {
            names,
            files,
            config: Arc::new(ArcSwap::from_pointee(config)),
            not_after: ArcSwap::from_pointee(not_after),
            built_from: ArcSwap::from_pointee(built_from(pki)),
        })
    }

    /// Whether the operator's own files are served instead of a certificate of ours.
    #[must_use]
    pub fn has_own_files(&self) -> bool {
        self.files.is_some()
    }

    /// Whether the authority would have another chain built than the one that is served.
    #[must_use]
    pub fn chain_differs(&self, pki: &Pki) -> bool {
        self.files.is_none() && **self.built_from.load() != built_from(pki)
    }

    /// Takes up what changed: another Org CA, another old-with-new certificate, a leaf that is due.
    pub async fn refresh(&self, pki: &Pki) -> Result<(), PkiError> {
        let (config, not_after) = current(pki, &self.names, self.files.as_ref()).await?;
        self.config.store(Arc::new(config));
        self.not_after.store(Arc::new(not_after));
        self.built_from.store(Arc::new(built_from(pki)));
        Ok(())
    }

    /// Whether the leaf is due for renewal at `now`. An operator's own file is read again instead.
    #[must_use]
    pub fn is_due(&self, now: UnixTime) -> bool {
        now.plus(RENEW_BEFORE_S) >= **self.not_after.load()
    }

    /// When the server certificate ends.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        **self.not_after.load()
    }
}

fn built_from(pki: &Pki) -> Vec<String> {
    let authority = pki.authority();
    authority.tls_signer(pki.clock.now().seconds()).map_or_else(Vec::new, |signer| {
        std::iter::once(signer.issuer).chain(signer.follows).map(Certificate::fingerprint).collect()
    })
}

async fn current(
    pki: &Pki,
    names: &ServerNames,
    files: Option<&(PathBuf, PathBuf)>,
) -> Result<(ServerConfig, UnixTime), PkiError> {
    if let Some((cert_file, key_file)) = files {
        return from_files(cert_file, key_file);
    }
    cross_certify(pki).await?;
    let authority = pki.authority();
    let now = pki.clock.now().seconds();
    let Some(signer) = authority.tls_signer(now) else {
        tracing::warn!("no usable CA key: serving with a certificate that nobody can verify");
        return self_made(pki, names, now);
    };
    let (leaf, key) = leaf(pki, &signer, names, now).await?;
    let chain = std::iter::once(&leaf)
        .chain(signer.follows)
        .map(|certificate| CertificateDer::from(certificate.der().to_vec()))
        .collect();
    Ok((tls_config(chain, key)?, leaf.not_after()))
}

/// The stored leaf while it fits, or a new one.
async fn leaf(
    pki: &Pki,
    signer: &Signer<'_>,
    names: &ServerNames,
    now: UnixTime,
) -> Result<(Certificate, PrivateKeyDer<'static>), PkiError> {
    let mut tx = pki.store.read().await?;
    let stored = (state(&mut tx, "tls_cert").await?, state(&mut tx, "tls_key").await?);
    drop(tx);
    if let (Some(pem), Some(sealed)) = stored {
        let leaf = Certificate::from_pem(&pem)?;
        let fits = leaf.verify_signature(signer.issuer).is_ok()
            && now < leaf.not_after()
            // A leaf that ends with its issuer cannot be renewed into a longer one.
            && (now.plus(RENEW_BEFORE_S) < leaf.not_after() || leaf.not_after() >= signer.issuer.not_after())
            && leaf.dns_sans() == names.dns.as_slice()
            && leaf.ip_sans() == names.ips.as_slice();
        if fits {
            return Ok((leaf, keys::tls_key(&pki.sealing, KEY_PLACE, &sealed)?));
        }
    }
    let new = PrivateKey::generate_p256()?;
    let tbs = profile::tls_server(
        signer.issuer,
        names.dns.first().map_or("localhost", String::as_str),
        &names.dns,
        &names.ips,
        new.key.spki_der(),
        &pki.entropy.serial(),
        Validity {
            not_before: now.plus(-BACKDATE_S),
            not_after: now.plus(VALIDITY_S).min(signer.issuer.not_after()),
        },
        signer.key.signature_algorithm(),
    )?;
    let leaf = signer.key.sign_certificate(&ExemptPermit::for_own_tls(), tbs)?;
    let sealed = new.seal(&pki.sealing, KEY_PLACE)?;
    let mut tx = pki.store.write().await?;
    set_state(&mut tx, "tls_cert", &leaf.to_pem()).await?;
    set_state(&mut tx, "tls_key", &sealed).await?;
    tx.commit(&[Event {
        event_type: EventType::PkiTlsCertificateIssued,
        actor: "system".to_owned(),
        details: json!({
            "fingerprint": leaf.fingerprint(),
            "issuer_key_id": rows::hex(&signer.issuer.key_id()),
            "dns": names.dns,
            "not_after": leaf.not_after().to_rfc3339(),
        }),
    }])
    .await?;
    let key = keys::tls_key(&pki.sealing, KEY_PLACE, &sealed)?;
    Ok((leaf, key))
}

/// Signs the old-with-new certificate of every retiring Org CA that lacks one under the current root. It is part of
/// our TLS chain, so the halt does not hold it back.
async fn cross_certify(pki: &Pki) -> Result<(), PkiError> {
    let authority = pki.authority();
    let now = pki.clock.now().seconds();
    let Some(root_key) = authority.org_ca_key.as_deref() else { return Ok(()) };
    let mut missing = Vec::new();
    for anchor in authority.retiring.iter().filter(|anchor| anchor.key.is_some()) {
        let have = authority.cross_certificates.iter().any(|cross| {
            cross.spki_der() == anchor.certificate.spki_der()
                && cross.verify_signature(&authority.org_ca).is_ok()
        });
        if !have && anchor.certificate.not_after() > now && !authority.org_ca_has_legacy_path_len() {
            let serial = pki.entropy.serial();
            let tbs = profile::old_with_new(
                &anchor.certificate,
                &authority.org_ca,
                &serial,
                root_key.signature_algorithm(),
            )?;
            missing.push(root_key.sign_certificate(&ExemptPermit::for_own_tls(), tbs)?);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let mut tx = pki.store.write().await?;
    let mut events = Vec::new();
    for cross in &missing {
        rows::add_cross_certificate(&mut tx, cross, &authority.org_ca, now).await?;
        events.push(super::bootstrap::issued("old_with_new", cross));
    }
    tx.bump_epoch().await?;
    tx.commit(&events).await?;
    pki.refresh().await.map(drop)
}

/// A certificate under a CA that exists for this one signature, so that the server can be reached at all.
fn self_made(pki: &Pki, names: &ServerNames, now: UnixTime) -> Result<(ServerConfig, UnixTime), PkiError> {
    let permit = ExemptPermit::for_own_tls();
    let validity = Validity { not_before: now.plus(-BACKDATE_S), not_after: now.plus(VALIDITY_S) };
    let issuer = PrivateKey::generate_p256()?;
    let tbs = profile::org_ca(
        Names { common_name: "Mastio without a usable Org CA".to_owned(), organization: None },
        issuer.key.spki_der(),
        &pki.entropy.serial(),
        validity,
        0,
        issuer.key.signature_algorithm(),
    )?;
    let root = issuer.key.sign_certificate(&permit, tbs)?;
    let new = PrivateKey::generate_p256()?;
    let tbs = profile::tls_server(
        &root,
        names.dns.first().map_or("localhost", String::as_str),
        &names.dns,
        &names.ips,
        new.key.spki_der(),
        &pki.entropy.serial(),
        validity,
        issuer.key.signature_algorithm(),
    )?;
    let leaf = issuer.key.sign_certificate(&permit, tbs)?;
    let chain = [&leaf, &root].map(|certificate| CertificateDer::from(certificate.der().to_vec())).to_vec();
    Ok((tls_config(chain, new.tls_key()?)?, validity.not_after))
}

fn from_files(cert_file: &Path, key_file: &Path) -> Result<(ServerConfig, UnixTime), PkiError> {
    let pem = std::fs::read_to_string(cert_file)
        .map_err(|source| keys::KeyError::File { path: cert_file.display().to_string(), source })?;
    let chain = Certificate::chain_from_pem(&pem)?;
    let key = keys::tls_key_from_file(key_file)?;
    let not_after = chain.first().map_or(UnixTime(0), Certificate::not_after);
    let chain = chain.iter().map(|certificate| CertificateDer::from(certificate.der().to_vec())).collect();
    Ok((tls_config(chain, key)?, not_after))
}
