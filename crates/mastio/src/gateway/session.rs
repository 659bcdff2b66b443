//! Sessions of the revisions that have them: what `initialize` agreed on, in the session's own id.
//!
//! The id is sealed under the deploy's sealing key, so every replica reads it, a restart forgets none, and nobody makes
//! one or reads another's. It names the caller whom it was given to: in anybody else's request it is no session. What
//! cannot be in it is that it was ended: that is an identifier used up in the store, until the session would have
//! expired anyway.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mastio_core::time::UnixTime;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Caller;
use super::protocol::Revision;
use crate::entropy::Entropy;
use crate::pki::keys::SealingKey;

/// A session lives a day; then its client begins another.
pub const LIFETIME_S: i64 = 86_400;
/// Bytes of what a client can do that a session remembers; of more, only the names.
const CAPABILITIES_BYTES_MAX: usize = 512;
/// Bytes of a session id at most.
const ID_BYTES_MAX: usize = 2048;
const PLACE: &str = "gateway/mcp_session/id";
const REPLY_PLACE: &str = "gateway/mcp_server_request/id";

/// A session, as its id says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Unique among sessions.
    #[serde(rename = "n")]
    pub nonce: String,
    #[serde(rename = "a")]
    agent_id: String,
    #[serde(rename = "p")]
    principal_type: String,
    #[serde(rename = "r")]
    revision: String,
    #[serde(rename = "t")]
    begun_at: i64,
    /// What the client can do for a server: `sampling`, `elicitation`, `roots`.
    #[serde(rename = "c")]
    pub capabilities: Map<String, Value>,
}

impl Session {
    /// Begins a session of `caller`.
    #[must_use]
    pub fn begin(
        caller: &Caller,
        revision: Revision,
        capabilities: &Value,
        now: UnixTime,
        entropy: &Entropy,
    ) -> Self {
        let mut kept: Map<String, Value> = Map::new();
        for name in ["sampling", "elicitation", "roots"] {
            if let Some(value) = capabilities.get(name).filter(|value| value.is_object()) {
                kept.insert(name.to_owned(), value.clone());
            }
        }
        if serde_json::to_string(&kept).map_or(usize::MAX, |text| text.len()) > CAPABILITIES_BYTES_MAX {
            kept.values_mut().for_each(|value| *value = Value::Object(Map::new()));
        }
        Self {
            nonce: entropy.text::<16>(),
            agent_id: caller.agent_id.clone(),
            principal_type: caller.principal_type.clone(),
            revision: revision.as_str().to_owned(),
            begun_at: now.0,
            capabilities: kept,
        }
    }

    /// The session's id, for `Mcp-Session-Id`. Absent if the crypto library refuses.
    #[must_use]
    pub fn id(&self, sealing: &SealingKey) -> Option<String> {
        seal(sealing, PLACE, self)
    }

    /// The session that `id` names, if it is the caller's and not over. Whether it was ended is in the store.
    #[must_use]
    pub fn open(id: &str, caller: &Caller, now: UnixTime, sealing: &SealingKey) -> Option<Self> {
        let session: Self = open(sealing, PLACE, id)?;
        let own = session.agent_id == caller.agent_id && session.principal_type == caller.principal_type;
        let lives = now.0 < session.begun_at.saturating_add(LIFETIME_S);
        (own && lives && Revision::parse(&session.revision).is_some()).then_some(session)
    }

    /// The revision agreed on.
    #[must_use]
    pub fn revision(&self) -> Revision {
        Revision::parse(&self.revision).unwrap_or(Revision::V2025_03_26)
    }

    /// The identifier that is used up when the session is ended.
    #[must_use]
    pub fn ended_id(&self) -> String {
        format!("mcp-session-ended:{}", self.nonce)
    }

    /// When it is over by itself.
    #[must_use]
    pub fn expires_at(&self) -> UnixTime {
        UnixTime(self.begun_at.saturating_add(LIFETIME_S))
    }
}

/// Where the answer to an upstream server's own request goes. It is the id under which the client sees that request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// The session in which the request was told.
    #[serde(rename = "n")]
    pub session: String,
    /// The upstream server.
    #[serde(rename = "u")]
    pub upstream_id: String,
    /// Our session there.
    #[serde(rename = "s")]
    pub upstream_session: Option<String>,
    /// The revision spoken there.
    #[serde(rename = "r")]
    pub revision: String,
    /// The id of its request, as it wrote it.
    #[serde(rename = "i")]
    pub id: String,
}

impl ReplyTo {
    /// The id for the client.
    #[must_use]
    pub fn seal(&self, sealing: &SealingKey) -> Option<String> {
        seal(sealing, REPLY_PLACE, self)
    }

    /// Reads an id that [`ReplyTo::seal`] made for this session.
    #[must_use]
    pub fn open(id: &str, session: &Session, sealing: &SealingKey) -> Option<Self> {
        open::<Self>(sealing, REPLY_PLACE, id).filter(|reply| reply.session == session.nonce)
    }
}

fn seal(sealing: &SealingKey, place: &str, value: &impl Serialize) -> Option<String> {
    let clear = serde_json::to_vec(value).ok()?;
    Some(URL_SAFE_NO_PAD.encode(sealing.seal_bytes(place, &clear).ok()?))
}

fn open<T: serde::de::DeserializeOwned>(sealing: &SealingKey, place: &str, id: &str) -> Option<T> {
    if id.len() > ID_BYTES_MAX {
        return None;
    }
    let sealed = URL_SAFE_NO_PAD.decode(id).ok()?;
    serde_json::from_slice(&sealing.open_bytes(place, &sealed).ok()?).ok()
}

/// A session of 2025-11-25, of somebody.
#[cfg(test)]
pub(super) fn any() -> Session {
    let capabilities = Map::new();
    let (nonce, agent_id) = (Entropy::default().text::<16>(), "acme::a".to_owned());
    let (principal_type, revision) = ("agent".to_owned(), Revision::V2025_11_25.as_str().to_owned());
    Session { nonce, agent_id, principal_type, revision, begun_at: 1_000_000, capabilities }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn caller(agent_id: &str) -> Caller {
        Caller {
            agent_id: agent_id.to_owned(),
            principal_type: "agent".to_owned(),
            capabilities: Vec::new(),
            one_use: Vec::new(),
            access_token: None,
            epoch: 0,
            issued_at: UnixTime(1_000_000),
            expires_at: UnixTime(1_000_900),
        }
    }

    #[test]
    fn a_session_is_its_caller_s_alone_and_ends_with_the_day() {
        let folder = tempfile::tempdir().unwrap();
        let entropy = Entropy::default();
        let sealing = SealingKey::create_file(&folder.path().join("a"), &entropy).unwrap();
        let other = SealingKey::create_file(&folder.path().join("b"), &entropy).unwrap();
        let (now, a) = (UnixTime(1_000_000), caller("acme::a"));
        let capabilities = json!({ "sampling": {}, "x": 1 });
        let session = Session::begin(&a, Revision::V2025_06_18, &capabilities, now, &entropy);
        let id = session.id(&sealing).unwrap();
        assert!(id.bytes().all(|byte| (0x21..=0x7e).contains(&byte)));
        let at = |seconds: i64| now.plus(seconds);
        assert_eq!(Session::open(&id, &a, at(LIFETIME_S - 1), &sealing), Some(session.clone()));
        assert_eq!(session.capabilities.len(), 1);
        assert_eq!(Session::open(&id, &a, at(LIFETIME_S), &sealing), None);
        assert_eq!(Session::open(&id, &caller("acme::b"), now, &sealing), None);
        assert_eq!(Session::open(&id, &a, now, &other), None);
        let mut torn = id.clone();
        torn.pop();
        assert_eq!(Session::open(&torn, &a, now, &sealing), None);

        let reply = ReplyTo {
            session: session.nonce.clone(),
            upstream_id: "u".to_owned(),
            upstream_session: None,
            revision: "2025-06-18".to_owned(),
            id: "1".to_owned(),
        };
        let told = reply.seal(&sealing).unwrap();
        assert_eq!(ReplyTo::open(&told, &session, &sealing), Some(reply));
        let another = Session::begin(&a, Revision::V2025_06_18, &json!({}), now, &entropy);
        assert_eq!(ReplyTo::open(&told, &another, &sealing), None);
        assert_eq!(ReplyTo::open(&id, &session, &sealing), None);
    }
}
