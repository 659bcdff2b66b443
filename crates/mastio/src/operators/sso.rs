//! Single sign-on by OpenID Connect (Core 1.0 §3.1): the code flow with PKCE, state and nonce.
//!
//! The browser carries what we have to remember between the way out and the way back, in a cookie that only we can open,
//! so any replica completes what another has begun. The ID token is read by `jsonwebtoken` under the provider's published
//! keys, with asymmetric algorithms only. Its claims become a role by the operator's own table; whoever has no line in
//! it is refused. The actor is `sso:` and a claim of the provider's, a name that no operator of ours can have. The other
//! ways in, the shared secret and operators' own, do not depend on any of this.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use mastio_core::error::Kind;
use mastio_core::time::UnixTime;
use reqwest::Url;
use reqwest::header;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::entropy::Entropy;
use crate::http::authn::Role;
use crate::http::error::chain;
use crate::pki::keys::SealingKey;

/// What the way out asks for comes back within so long.
const FLOW_S: i64 = 600;
/// How far the provider's clock may be from ours.
const LEEWAY_S: i64 = 60;
/// How long the provider's metadata is not asked for again.
const METADATA_KEPT: Duration = Duration::from_secs(600);
/// A provider that takes longer is away.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a provider's answer at most.
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// Characters of the claim that names a person at most.
const NAME_CHARACTERS_MAX: usize = 200;
/// What the flow's cookie is sealed for.
const PLACE: &str = "dashboard single sign-on";
/// Signatures that only the provider can make.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// Which values of a claim give which role: `VALUE=ROLE;VALUE=ROLE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, Role>);

impl FromStr for Roles {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut roles = BTreeMap::new();
        for line in text.split(';').map(str::trim).filter(|line| !line.is_empty()) {
            // A value may have `=` in it, as a distinguished name does; a role has none.
            let (value, role) = line.rsplit_once('=').ok_or(())?;
            let (value, role) = (value.trim(), Role::parse(role.trim()).ok_or(())?);
            if value.is_empty() || roles.insert(value.to_owned(), role).is_some() {
                return Err(());
            }
        }
        if roles.is_empty() { Err(()) } else { Ok(Self(roles)) }
    }
}

impl Roles {
    /// The strongest role that `values` give. `None`: no line names any of them.
    fn of<'a>(&self, values: impl Iterator<Item = &'a str>) -> Option<Role> {
        values.filter_map(|value| self.0.get(value).copied()).max()
    }
}

/// How this deploy signs on with a provider. The secret is not shown.
#[derive(Clone)]
pub struct Settings {
    /// The provider, exactly as its metadata and its tokens spell it.
    pub issuer: String,
    /// Who we are to it.
    pub client_id: String,
    /// How we prove that; without it PKCE alone does.
    pub client_secret: Option<String>,
    /// What is asked for, `openid` included.
    pub scope: String,
    /// The claim that gives the role: a name, or names with dots between for one inside another.
    pub role_claim: String,
    /// Which of its values give which role.
    pub roles: Roles,
    /// The claim that names the person in the audit log.
    pub name_claim: String,
}

impl fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Settings").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// Whether `issuer` may be a provider: https; or http on this machine, for trying it out.
#[must_use]
pub fn is_issuer(issuer: &str) -> bool {
    let Ok(url) = Url::parse(issuer) else { return false };
    let local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    let plain = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    plain && url.has_host() && (url.scheme() == "https" || (url.scheme() == "http" && local))
}

/// Why nobody was signed on.
#[derive(Debug, thiserror::Error)]
pub enum SsoError {
    /// The way back does not belong to a way out of this browser.
    #[error("this sign-in was not begun in this browser, or too long ago: begin it again")]
    Foreign,
    /// The provider does not answer, or not as a provider does.
    #[error("the single sign-on provider cannot be used now ({0}): sign in with your secret, or try again")]
    Provider(String),
    /// The provider refused.
    #[error("the single sign-on provider refused: {0}")]
    Refused(String),
    /// The ID token is not one for us and this sign-in.
    #[error("the single sign-on provider's token was not accepted: {0}")]
    Token(&'static str),
    /// No line of the table gives this person a role.
    #[error(
        "{name} has no role here: none of the values of the claim {claim} has a line in MCP_PROXY_OIDC_ROLES"
    )]
    NoRole {
        /// Who.
        name: String,
        /// Where the roles are looked for.
        claim: String,
    },
    /// Our own cookie could not be made.
    #[error("the sign-in cannot be begun")]
    Sealing,
}

impl SsoError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Foreign | Self::Refused(_) | Self::Token(_) | Self::NoRole { .. } => Kind::Denied,
            Self::Provider(_) => Kind::Unavailable,
            Self::Sealing => Kind::Internal,
        }
    }
}

/// What a provider publishes of itself (OpenID Connect Discovery 1.0 §3).
#[derive(Debug, Deserialize)]
struct Metadata {
    issuer: String,
    authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Vec<String>,
    /// RFC 9207 §3.
    #[serde(default)]
    authorization_response_iss_parameter_supported: bool,
}

/// What we have to remember between the way out and the way back.
#[derive(Serialize, Deserialize)]
struct Flow {
    state: String,
    nonce: String,
    verifier: String,
    redirect_uri: String,
    next: String,
    until: i64,
}

/// What the provider sends the browser back with.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Answer {
    code: Option<String>,
    state: Option<String>,
    iss: Option<String>,
    error: Option<String>,
    error_description: Option<String>,
}

/// Somebody whom the provider knows and whose claims give a role.
#[derive(Debug)]
pub(crate) struct SignedOn {
    /// How the audit log names them.
    pub actor: String,
    pub role: Role,
    /// The page that they wanted.
    pub next: String,
}

/// A deploy's single sign-on.
pub struct Sso {
    settings: Settings,
    client: reqwest::Client,
    metadata: Mutex<Option<(Instant, Arc<Metadata>)>>,
}

impl Sso {
    /// Nothing is asked of the provider yet. Errors: the HTTP client cannot be set up.
    pub fn new(settings: Settings) -> Result<Self, reqwest::Error> {
        // reqwest asks for a process-wide provider where the machine's own roots decide.
        let _already_installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self { settings, client, metadata: Mutex::default() })
    }

    /// The provider's host, for those who choose a way in.
    pub(crate) fn host(&self) -> String {
        let url = Url::parse(&self.settings.issuer).ok();
        url.and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default()
    }

    /// The way out: where the browser goes, and the cookie that it keeps. `base`: the URL by which it knows us.
    pub(crate) async fn begin(
        &self,
        base: &str,
        next: &str,
        entropy: &Entropy,
        sealing: &SealingKey,
        now: UnixTime,
    ) -> Result<(String, String), SsoError> {
        let metadata = self.metadata().await?;
        let flow = Flow {
            state: entropy.text::<32>(),
            nonce: entropy.text::<32>(),
            verifier: entropy.text::<32>(),
            redirect_uri: format!("{base}/proxy/login/sso/callback"),
            next: next.to_owned(),
            until: now.0 + FLOW_S,
        };
        let challenge = digest::digest(&digest::SHA256, flow.verifier.as_bytes());
        let mut url = Url::parse(&metadata.authorization_endpoint)
            .map_err(|_| SsoError::Provider("its authorization_endpoint is no URL".to_owned()))?;
        url.query_pairs_mut()
            .append_pair("response_type", "code")
            .append_pair("client_id", &self.settings.client_id)
            .append_pair("redirect_uri", &flow.redirect_uri)
            .append_pair("scope", &self.settings.scope)
            .append_pair("state", &flow.state)
            .append_pair("nonce", &flow.nonce)
            .append_pair("code_challenge", &URL_SAFE_NO_PAD.encode(challenge.as_ref()))
            .append_pair("code_challenge_method", "S256");
        let text = Zeroizing::new(serde_json::to_vec(&flow).map_err(|_| SsoError::Sealing)?);
        let sealed = sealing.seal_bytes(PLACE, &text).map_err(|_| SsoError::Sealing)?;
        Ok((url.into(), URL_SAFE_NO_PAD.encode(sealed)))
    }

    /// The way back. Nothing is asked of the provider before the cookie and the state are known to be of one flow.
    ///
    /// Errors: [`SsoError`].
    pub(crate) async fn complete(
        &self,
        cookie: Option<&str>,
        answer: Answer,
        sealing: &SealingKey,
        now: UnixTime,
    ) -> Result<SignedOn, SsoError> {
        let flow = opened(cookie, sealing).filter(|flow| now.0 < flow.until).ok_or(SsoError::Foreign)?;
        let state = answer.state.unwrap_or_default();
        if !bool::from(state.as_bytes().ct_eq(flow.state.as_bytes())) {
            return Err(SsoError::Foreign);
        }
        let metadata = self.metadata().await?;
        // RFC 9207 §2.4: an answer of another provider's is not taken to this one.
        match answer.iss.as_deref() {
            Some(iss) if iss != metadata.issuer => return Err(SsoError::Foreign),
            None if metadata.authorization_response_iss_parameter_supported => return Err(SsoError::Foreign),
            _ => {}
        }
        if let Some(error) = answer.error {
            let words = [Some(error), answer.error_description].into_iter().flatten();
            let words: String = words.collect::<Vec<_>>().join(", ").chars().take(200).collect();
            return Err(SsoError::Refused(words));
        }
        let code = answer.code.ok_or_else(|| SsoError::Refused("it sent no code".to_owned()))?;
        let id_token = self.id_token(&metadata, &code, &flow).await?;
        let claims = self.verified(&metadata, &id_token).await?;
        self.check(&claims, &metadata.issuer, &flow.nonce, now)?;
        let (actor, role) = self.who(&claims)?;
        Ok(SignedOn { actor, role, next: flow.next })
    }

    async fn metadata(&self) -> Result<Arc<Metadata>, SsoError> {
        let kept = self.metadata.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, metadata)) = kept.filter(|(at, _)| at.elapsed() < METADATA_KEPT) {
            return Ok(metadata);
        }
        let url = format!("{}/.well-known/openid-configuration", self.settings.issuer.trim_end_matches('/'));
        let metadata: Metadata = self.fetch(self.client.get(url)).await?;
        // Discovery §4.3: otherwise it speaks for somebody else.
        if metadata.issuer != self.settings.issuer {
            return Err(SsoError::Provider("its metadata names another issuer".to_owned()));
        }
        let plain = self.settings.issuer.starts_with("http:");
        let good = |url: &String| url.starts_with("https:") || (plain && url.starts_with("http:"));
        if ![&metadata.authorization_endpoint, &metadata.token_endpoint, &metadata.jwks_uri]
            .into_iter()
            .all(good)
        {
            return Err(SsoError::Provider("one of its endpoints is not https".to_owned()));
        }
        let metadata = Arc::new(metadata);
        *self.metadata.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), Arc::clone(&metadata)));
        Ok(metadata)
    }

    /// Exchanges the code (OpenID Connect Core §3.1.3).
    async fn id_token(&self, metadata: &Metadata, code: &str, flow: &Flow) -> Result<String, SsoError> {
        #[derive(Deserialize)]
        struct Granted {
            id_token: String,
        }
        let mut fields = vec![
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", flow.redirect_uri.as_str()),
            ("code_verifier", flow.verifier.as_str()),
        ];
        let mut request = self.client.post(&metadata.token_endpoint);
        let methods = &metadata.token_endpoint_auth_methods_supported;
        // Where a provider does not say, it takes Basic (Core §9).
        let basic = methods.is_empty() || methods.iter().any(|method| method == "client_secret_basic");
        match &self.settings.client_secret {
            Some(secret) if basic => {
                let pair =
                    Zeroizing::new(format!("{}:{}", encoded(&self.settings.client_id), encoded(secret)));
                let value = format!("Basic {}", STANDARD.encode(pair.as_bytes()));
                let mut value = header::HeaderValue::try_from(value).map_err(|_| SsoError::Sealing)?;
                value.set_sensitive(true);
                request = request.header(header::AUTHORIZATION, value);
            }
            secret => {
                fields.push(("client_id", &self.settings.client_id));
                fields.extend(secret.as_ref().map(|secret| ("client_secret", secret.as_str())));
            }
        }
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
        let request = request
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json")
            .body(body);
        Ok(self.fetch::<Granted>(request).await?.id_token)
    }

    /// The claims of an ID token that one of the provider's keys has signed.
    async fn verified(&self, metadata: &Metadata, id_token: &str) -> Result<Map<String, Value>, SsoError> {
        #[derive(Deserialize)]
        struct Keys {
            keys: Vec<Value>,
        }
        let header =
            jsonwebtoken::decode_header(id_token).map_err(|_| SsoError::Token("it cannot be read"))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(SsoError::Token("its algorithm is not one of a provider's"));
        }
        let keys: Keys = self.fetch(self.client.get(&metadata.jwks_uri)).await?;
        // Keys of kinds that we do not know are none of ours to judge.
        let keys = keys.keys.into_iter().filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
        let fits = |key: &Jwk| {
            let common = &key.common;
            let signs = common.public_key_use.as_ref().is_none_or(|use_| *use_ == PublicKeyUse::Signature);
            signs && (header.kid.is_none() || common.key_id == header.kid)
        };
        let key = keys
            .into_iter()
            .find(fits)
            .ok_or(SsoError::Token("none of the provider's keys has signed it"))?;
        let key = DecodingKey::from_jwk(&key).map_err(|_| SsoError::Token("its key cannot be used"))?;
        let mut validation = Validation::new(header.alg);
        // Times, issuer and audience are compared in one place, by our own clock.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        jsonwebtoken::decode(id_token, &key, &validation)
            .map(|token| token.claims)
            .map_err(|_| SsoError::Token("its signature is wrong"))
    }

    /// OpenID Connect Core §3.1.3.7.
    fn check(
        &self,
        claims: &Map<String, Value>,
        issuer: &str,
        nonce: &str,
        now: UnixTime,
    ) -> Result<(), SsoError> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str).unwrap_or_default();
        let time = |name: &str| claims.get(name).and_then(Value::as_f64);
        let client_id = self.settings.client_id.as_str();
        if text("iss") != issuer {
            return Err(SsoError::Token("it is another issuer's"));
        }
        let (for_us, parties) = match claims.get("aud") {
            Some(Value::String(aud)) => (aud == client_id, 1),
            Some(Value::Array(all)) => (all.iter().any(|aud| aud == client_id), all.len()),
            _ => (false, 0),
        };
        let azp = claims.get("azp").and_then(Value::as_str);
        if !for_us || (parties > 1 && azp.is_none()) || azp.is_some_and(|azp| azp != client_id) {
            return Err(SsoError::Token("it is for another client"));
        }
        #[expect(clippy::cast_precision_loss, reason = "seconds of this century are exact")]
        let now = now.0 as f64;
        #[expect(clippy::cast_precision_loss, reason = "a minute")]
        let leeway = LEEWAY_S as f64;
        if time("exp").is_none_or(|exp| now >= exp + leeway) {
            return Err(SsoError::Token("it is over"));
        }
        if time("iat").is_none_or(|iat| iat > now + leeway)
            || time("nbf").is_some_and(|nbf| nbf > now + leeway)
        {
            return Err(SsoError::Token("it is of a time to come"));
        }
        if !bool::from(text("nonce").as_bytes().ct_eq(nonce.as_bytes())) {
            return Err(SsoError::Token("it was made for another sign-in"));
        }
        Ok(())
    }

    /// The name and the role that claims give.
    fn who(&self, claims: &Map<String, Value>) -> Result<(String, Role), SsoError> {
        let name = claim(claims, &self.settings.name_claim).and_then(Value::as_str).unwrap_or_default();
        let plain = name.chars().all(|c| !c.is_control() && !c.is_whitespace());
        if name.is_empty() || name.chars().count() > NAME_CHARACTERS_MAX || !plain {
            return Err(SsoError::Token(
                "it does not name anybody by the claim of MCP_PROXY_OIDC_NAME_CLAIM",
            ));
        }
        let values = claim(claims, &self.settings.role_claim);
        let role = match values {
            Some(Value::String(value)) => self.settings.roles.of(std::iter::once(value.as_str())),
            Some(Value::Array(values)) => self.settings.roles.of(values.iter().filter_map(Value::as_str)),
            _ => None,
        };
        let claim = || self.settings.role_claim.clone();
        let role = role.ok_or_else(|| SsoError::NoRole { name: name.to_owned(), claim: claim() })?;
        Ok((format!("sso:{name}"), role))
    }

    /// A JSON answer, of bounded length.
    async fn fetch<T: serde::de::DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<T, SsoError> {
        let away = |error: reqwest::Error| {
            let error = error.without_url();
            tracing::warn!(error = chain(&error), "single_sign_on_provider_unavailable");
            SsoError::Provider("it does not answer".to_owned())
        };
        let mut response = request.send().await.map_err(away)?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(SsoError::Provider("its answer is too long".to_owned()));
            }
            body.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            let named = serde_json::from_slice::<Value>(&body).ok();
            let error = named.as_ref().and_then(|body| body["error"].as_str()).unwrap_or("no reason");
            tracing::warn!(status = status.as_u16(), error, "single_sign_on_provider_refused");
            let error: String = error.chars().take(100).collect();
            return Err(SsoError::Provider(format!("it answers {} with {error}", status.as_u16())));
        }
        serde_json::from_slice(&body).map_err(|_| SsoError::Provider("its answer cannot be read".to_owned()))
    }
}

fn opened(cookie: Option<&str>, sealing: &SealingKey) -> Option<Flow> {
    let sealed = URL_SAFE_NO_PAD.decode(cookie?).ok()?;
    serde_json::from_slice(&sealing.open_bytes(PLACE, &sealed).ok()?).ok()
}

/// RFC 6749 §2.3.1: id and secret are form-encoded before they become Basic.
fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// The claim of this name; where there is none, the one that the names between its dots lead to.
fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(value) = claims.get(name) {
        return Some(value);
    }
    let (first, rest) = name.split_once('.')?;
    rest.split('.').try_fold(claims.get(first)?, |value, name| value.get(name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn sso() -> Sso {
        let settings = Settings {
            issuer: "https://id.example".to_owned(),
            client_id: "mastio".to_owned(),
            client_secret: None,
            scope: "openid".to_owned(),
            role_claim: "realm.groups".to_owned(),
            roles: "cn=admins,ou=it=admin; staff=viewer".parse().unwrap(),
            name_claim: "sub".to_owned(),
        };
        Sso::new(settings).unwrap()
    }

    fn claims(changes: Value) -> Map<String, Value> {
        let mut claims = json!({
            "iss": "https://id.example", "aud": "mastio", "sub": "u-1", "nonce": "n", "iat": 1000, "exp": 1300,
            "realm": { "groups": ["staff", "others"] },
        });
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims.as_object().unwrap().clone()
    }

    #[test]
    fn a_token_is_taken_only_where_every_claim_is_for_us_and_for_this_sign_in() {
        let check = |changes: Value, now: i64| {
            sso().check(&claims(changes), "https://id.example", "n", UnixTime(now)).is_ok()
        };
        assert!(check(json!({}), 1000));
        assert!(check(json!({ "aud": ["other", "mastio"], "azp": "mastio" }), 1000));
        for (changes, now) in [
            (json!({ "iss": "https://id.example/" }), 1000),
            (json!({ "aud": "other" }), 1000),
            (json!({ "aud": null }), 1000),
            (json!({ "aud": ["other", "mastio"] }), 1000),
            (json!({ "azp": "other" }), 1000),
            (json!({ "nonce": "m" }), 1000),
            (json!({ "nonce": null }), 1000),
            (json!({ "exp": null }), 1000),
            (json!({ "iat": null }), 1000),
            (json!({}), 1360),
            (json!({}), 939),
            (json!({ "nbf": 1100 }), 1000),
        ] {
            assert!(!check(changes.clone(), now), "{changes} at {now}");
        }
        assert!(check(json!({}), 1359) && check(json!({}), 940));
    }

    #[test]
    fn the_strongest_role_counts_and_nobody_has_one_by_default() {
        let who = |changes: Value| sso().who(&claims(changes));
        assert_eq!(who(json!({})).unwrap(), ("sso:u-1".to_owned(), Role::Viewer));
        let both = json!({ "realm": { "groups": ["staff", "cn=admins,ou=it"] } });
        assert_eq!(who(both).unwrap().1, Role::Admin);
        assert_eq!(who(json!({ "realm": { "groups": "staff" } })).unwrap().1, Role::Viewer);
        // The exact name comes before a path of names.
        assert_eq!(who(json!({ "realm.groups": ["cn=admins,ou=it"] })).unwrap().1, Role::Admin);
        for changes in [
            json!({ "realm": { "groups": ["Staff", "admins"] } }),
            json!({ "realm": { "groups": [] } }),
            json!({ "realm": null }),
            json!({ "sub": "" }),
            json!({ "sub": "a b" }),
            json!({ "sub": 7 }),
        ] {
            assert!(who(changes.clone()).is_err(), "{changes}");
        }
    }

    #[test]
    fn the_table_of_roles_says_each_value_once_with_a_role_that_exists() {
        for bad in ["", ";", "staff", "staff=emperor", "=viewer", "staff=viewer;staff=admin"] {
            assert!(bad.parse::<Roles>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_provider_is_asked_over_tls_or_on_this_machine() {
        for good in [
            "https://id.example",
            "https://id.example/realms/a",
            "http://localhost:8080",
            "http://127.0.0.1:1",
        ] {
            assert!(is_issuer(good), "{good}");
        }
        for bad in
            ["http://id.example", "id.example", "https://id.example?a", "https://u@id.example", "file:///etc"]
        {
            assert!(!is_issuer(bad), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_way_back_without_a_way_out_of_this_browser_is_refused_before_anything_is_asked() {
        let entropy = Entropy::default();
        let file = tempfile::tempdir().unwrap();
        let sealing = SealingKey::create_file(&file.path().join("key"), &entropy).unwrap();
        let flow = |until: i64| {
            let flow = Flow {
                state: "s".to_owned(),
                nonce: "n".to_owned(),
                verifier: "v".to_owned(),
                redirect_uri: String::new(),
                next: "/proxy".to_owned(),
                until,
            };
            let sealed = sealing.seal_bytes(PLACE, &serde_json::to_vec(&flow).unwrap()).unwrap();
            URL_SAFE_NO_PAD.encode(sealed)
        };
        let answer = |state: &str| Answer {
            code: Some("c".to_owned()),
            state: Some(state.to_owned()),
            ..Answer::default()
        };
        for (cookie, state) in [
            (None, "s"),
            (Some("garbage".to_owned()), "s"),
            (Some(flow(1000)), "s"),
            (Some(flow(2000)), "another"),
            (Some(flow(2000)), ""),
        ] {
            let refused = sso().complete(cookie.as_deref(), answer(state), &sealing, UnixTime(1000)).await;
            assert!(matches!(refused, Err(SsoError::Foreign)), "{cookie:?} {state}: {refused:?}");
        }
    }
}
