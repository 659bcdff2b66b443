//! Resource servers: services beside this one that agents call with our tokens, and that may ask about them.
//!
//! Each has a credential of its own, shown once, and one resource: the only audience that it is told about. Several may
//! serve one resource, which is also how a credential is replaced without a gap: add one, switch over, remove the other.

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::audit::event::{Event, EventType};
use mastio_core::error::Kind;
use mastio_core::token::claims::{ACCESS_TOKEN_AUDIENCE, AUDIENCE_CHARACTERS_MAX};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use super::error::GrantError;
use super::{TokenEndpointError, Tokens, store};
use crate::http::error::Problem;
use crate::pki::Pki;
use crate::store::StoreError;

/// Resource servers that may be registered.
const RESOURCE_SERVERS_MAX: usize = 1000;
const NAME_CHARACTERS_MAX: usize = 64;

/// A registered resource server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceServer {
    /// What it calls itself by HTTP Basic: `rs_` and a ULID.
    pub resource_server_id: String,
    /// For people; unique.
    pub name: String,
    /// The audience that it is told about.
    pub resource: String,
    /// RFC 3339.
    pub created_at: String,
}

impl ResourceServer {
    /// As the API shows it; the secret is not in it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "resource_server_id": self.resource_server_id,
            "name": self.name,
            "resource": self.resource,
            "created_at": self.created_at,
        })
    }
}

/// A resource server that was just registered, with the secret that is shown once.
#[must_use]
pub fn created_json(server: &ResourceServer, secret: &str) -> Value {
    let mut answer = server.to_json();
    if let Some(answer) = answer.as_object_mut() {
        answer.insert("client_secret".to_owned(), json!(secret));
    }
    answer
}

/// Why a resource server is not registered or removed.
#[derive(Debug, thiserror::Error)]
pub enum ResourceServerError {
    /// A field is not what it should be.
    #[error("{field} {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The name is taken.
    #[error("resource server {0} exists already: remove it first, or choose another name")]
    Exists(String),
    /// There are as many as there may be.
    #[error("there are {0} resource servers already: remove one first")]
    TooMany(usize),
    /// No such resource server.
    #[error("no resource server {0}")]
    Unknown(String),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Problem for ResourceServerError {
    fn kind(&self) -> Kind {
        match self {
            Self::Field { .. } => Kind::Unprocessable,
            Self::Exists(_) | Self::TooMany(_) => Kind::Conflict,
            Self::Unknown(_) => Kind::NotFound,
            Self::Store(error) => error.kind(),
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Field { field, .. } => {
                json!([{ "type": "value_error", "loc": ["body", field], "msg": self.to_string(), "input": null }])
            }
            Self::Store(_) => json!("the database is not available"),
            other => json!(other.to_string()),
        }
    }
}

/// Registers a resource server, and gives its secret, which is shown here and never again.
///
/// `resource`: an `https` URL without fragment (RFC 8707 §2), or `cullis-local` for what this server serves itself.
/// Errors: [`ResourceServerError`]; nothing is changed then.
pub async fn add(
    pki: &Pki,
    name: &str,
    resource: &str,
    actor: &str,
) -> Result<(ResourceServer, String), ResourceServerError> {
    let good_name = (1..=NAME_CHARACTERS_MAX).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if !good_name {
        let problem = format!("must be 1..={NAME_CHARACTERS_MAX} of A-Z a-z 0-9 . _ -");
        return Err(ResourceServerError::Field { field: "name", problem });
    }
    if !is_resource(resource) {
        let problem = format!("must be an https URL without fragment, or {ACCESS_TOKEN_AUDIENCE}");
        return Err(ResourceServerError::Field { field: "resource", problem });
    }
    let now = pki.clock.now();
    let secret = pki.entropy.text::<32>();
    let server = ResourceServer {
        resource_server_id: format!("rs_{}", pki.entropy.ulid(now)),
        name: name.to_owned(),
        resource: resource.to_owned(),
        created_at: now.seconds().to_rfc3339(),
    };
    let mut tx = pki.store.write().await?;
    let present = store::resource_servers(&mut tx).await?;
    if present.iter().any(|other| other.name == name) {
        return Err(ResourceServerError::Exists(name.to_owned()));
    }
    if present.len() >= RESOURCE_SERVERS_MAX {
        return Err(ResourceServerError::TooMany(RESOURCE_SERVERS_MAX));
    }
    store::insert_resource_server(&mut tx, &server, &secret_digest(&secret), actor).await?;
    tx.commit(&[Event {
        event_type: EventType::ResourceServerCreated,
        actor: actor.to_owned(),
        details: json!({
            "resource_server_id": server.resource_server_id, "name": name, "resource": resource,
        }),
    }])
    .await?;
    Ok((server, secret))
}

/// Every resource server, by name.
pub async fn list(pki: &Pki) -> Result<Vec<ResourceServer>, ResourceServerError> {
    Ok(store::resource_servers(&mut pki.store.read().await?).await?)
}

/// Withdraws a resource server's credential. Tokens for its resource live out their minutes.
pub async fn remove(pki: &Pki, id: &str, actor: &str) -> Result<(), ResourceServerError> {
    let mut tx = pki.store.write().await?;
    if !store::delete_resource_server(&mut tx, id).await? {
        return Err(ResourceServerError::Unknown(id.to_owned()));
    }
    tx.commit(&[Event {
        event_type: EventType::ResourceServerDeleted,
        actor: actor.to_owned(),
        details: json!({ "resource_server_id": id }),
    }])
    .await?;
    Ok(())
}

impl Tokens {
    /// The resource server that presents this credential.
    pub(super) async fn resource_server(
        &self,
        id: &str,
        secret: &str,
    ) -> Result<ResourceServer, TokenEndpointError> {
        let found = store::resource_server(&mut self.pki.store.read().await?, id).await?;
        let (server, expected) = found.ok_or(GrantError::ResourceServerWrong)?;
        if bool::from(secret_digest(secret).as_bytes().ct_eq(expected.as_bytes())) {
            Ok(server)
        } else {
            Err(GrantError::ResourceServerWrong.into())
        }
    }
}

/// Of 32 random bytes, so that nothing slower is needed.
fn secret_digest(secret: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, secret.as_bytes()))
}

fn is_resource(resource: &str) -> bool {
    let is_url =
        resource.strip_prefix("https://").is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
            && resource.len() <= AUDIENCE_CHARACTERS_MAX
            && resource.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'#' | b'"' | b'\\'));
    is_url || resource == ACCESS_TOKEN_AUDIENCE
}
