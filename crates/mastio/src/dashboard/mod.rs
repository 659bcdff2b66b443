//! The dashboard at `/proxy`: pages for operators, rendered by the server, served by the same binary.
//!
//! A page is a struct with a template (checked when we compile) and shows what the capabilities' public verbs tell; the
//! dashboard knows nothing of its own but who has signed in. Every page reads and acts without JavaScript; scripts add
//! live progress, local times and copying. A change needs a session ([`session`]) and the token that our forms carry.
//! A run that a page starts goes on by itself: the pages only watch its row, so a reload, a second browser or another
//! replica sees the same.

mod assets;
mod chart;
mod checks;
mod enrollments;
pub mod error;
mod fleet;
mod follow;
pub mod http;
mod operators;
mod overview;
mod policies;
mod session;
mod setup;
mod store;
mod tools;
mod trust;
mod updates;

use std::fmt::Display;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::config::InForce;
use crate::enrollment::Agents;
use crate::gateway::Gateway;
use crate::health::Health;
use crate::http::authn::{AdminSecret, Role, Session};
use crate::http::urls::ExternalUrls;
use crate::operators::Operators;
use crate::operators::access::{self, Access};
use crate::operators::sso::Sso;
use crate::pki::Pki;
use crate::updates::halt::{self, HaltReason};
use error::DashboardError;

/// What pages are made from.
pub struct Dashboard {
    health: Health,
    agents: Arc<Agents>,
    operators: Arc<Operators>,
    gateway: Arc<Gateway>,
    secret: AdminSecret,
    settings: Vec<InForce>,
    /// Single sign-on, and the URLs by which browsers know us.
    sso: Option<(Sso, ExternalUrls)>,
    followers: Arc<Semaphore>,
}

/// What every page shows around its own content.
pub struct Frame {
    title: String,
    /// Which entry of the navigation is marked.
    section: &'static str,
    csrf_token: String,
    /// Who looks, and what they may do; nobody on the page that signs in.
    viewer: Option<(String, Role)>,
    /// Its name, or else its id.
    organisation: String,
    version: String,
    halt: Option<HaltBanner>,
    /// Without scripts, a page that shows something moving is fetched again by itself.
    moving: bool,
}

impl Frame {
    fn is_signed_in(&self) -> bool {
        self.viewer.is_some()
    }

    /// Whether whoever looks may send a form to `action`.
    fn may(&self, action: impl Display) -> bool {
        self.refusal(action).is_none()
    }

    /// Why whoever looks may not send a form to `action`: what the guard would answer.
    fn refusal(&self, action: impl Display) -> Option<String> {
        let required = match access::of_form(&action.to_string())? {
            Access::Anyone => return None,
            Access::Page(required) | Access::Api(required) => required,
        };
        let (_, role) = self.viewer.as_ref().filter(|(_, role)| *role < required)?;
        Some(format!("This needs the role {}; yours is {}.", required.as_str(), role.as_str()))
    }

    /// Whether whoever looks manages operators.
    fn is_admin(&self) -> bool {
        self.viewer.as_ref().is_some_and(|(_, role)| *role == Role::Admin)
    }
}

/// The banner that stands on every page while signing is halted.
struct HaltBanner {
    what: String,
    since: Option<String>,
    further: i64,
    /// The one thing to do: where, and what it says.
    act: Option<(String, &'static str)>,
}

impl Dashboard {
    /// A dashboard over the parts of a running server.
    #[must_use]
    pub fn new(
        health: Health,
        agents: Arc<Agents>,
        operators: Arc<Operators>,
        gateway: Arc<Gateway>,
        secret: AdminSecret,
        settings: Vec<InForce>,
        sso: Option<(Sso, ExternalUrls)>,
    ) -> Self {
        Self {
            health,
            agents,
            operators,
            gateway,
            secret,
            settings,
            sso,
            followers: Arc::new(Semaphore::new(follow::FOLLOWERS_MAX)),
        }
    }

    fn pki(&self) -> &Pki {
        &self.health.pki
    }

    /// The frame of a page. `session`: none on the page that signs in.
    async fn frame(
        &self,
        session: Option<&Session>,
        section: &'static str,
        title: impl Into<String>,
    ) -> Result<Frame, DashboardError> {
        let halt = match session {
            // What stands still is for those who may know.
            Some(_) => self.halt().await?,
            None => None,
        };
        Ok(Frame {
            title: title.into(),
            section,
            csrf_token: session.map(|session| session.csrf_token.clone()).unwrap_or_default(),
            viewer: session.map(|session| (session.actor.clone(), session.role)),
            organisation: match self.operators.organisation_name().await? {
                Some(name) => name,
                None => self.pki().authority().org_id.clone(),
            },
            version: self.health.version.clone(),
            halt,
            moving: false,
        })
    }

    async fn halt(&self) -> Result<Option<HaltBanner>, DashboardError> {
        // From the database, not from memory: another replica, or an operator's SQL, may just have changed it.
        let halt = halt::read(&mut self.pki().store.read().await?).await?;
        let Some(reason) = halt.reasons.first() else { return Ok(None) };
        let further = i64::try_from(halt.reasons.len()).unwrap_or(i64::MAX) - 1;
        let since = match reason.migration_id() {
            Some(id) => self.update(id).await?.and_then(|update| update.detected_at),
            None => None,
        };
        let page = |id: &str| format!("/proxy/updates/{}", urlencoded(id));
        let act = match reason {
            HaltReason::PendingMigration { migration_id } => {
                Some((page(migration_id), "Review the update and apply it"))
            }
            HaltReason::UnverifiedRun { migration_id } => {
                Some((page(migration_id), "See how the verification goes"))
            }
            HaltReason::FailedCheck { migration_id } => {
                Some((page(migration_id), "See why its check failed"))
            }
            HaltReason::StagedRotation { .. } => Some(("/proxy/mastio-key".to_owned(), "See the staged key")),
        };
        let detail = reason.detail();
        // The banner's own words say the beginning already.
        let what = detail.strip_prefix("signing halted — ").unwrap_or(&detail).to_owned();
        Ok(Some(HaltBanner { what, since, further, act }))
    }
}

/// `text` as one segment of a path.
fn urlencoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&crate::pki::store::hex(&[byte]));
        }
    }
    out
}

/// `text` as one word of a shell's command, whatever stands in it: commands are there to be copied.
fn shell_word(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/@%+=,".contains(&byte);
    if !text.is_empty() && !text.starts_with('-') && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A stored time as people read it where no script makes it local: `2026-04-23 19:04:21 UTC`.
fn utc(rfc3339: &str) -> String {
    match (rfc3339.get(..10), rfc3339.get(11..19)) {
        (Some(day), Some(time)) if rfc3339.ends_with('Z') => format!("{day} {time} UTC"),
        _ => rfc3339.to_owned(),
    }
}

/// The beginning of a long digest, for reading; the whole stands beside it for copying.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

/// `n` things: `1 leaf`, `3 leaves`.
fn counted(n: &i64, one: &str, many: &str) -> String {
    if *n == 1 { format!("1 {one}") } else { format!("{n} {many}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_segment_stays_one() {
        assert_eq!(urlencoded("acme::a-1"), "acme::a-1");
        assert_eq!(urlencoded("a/../b?c#<d>"), "a%2f..%2fb%3fc%23%3cd%3e");
    }

    #[test]
    fn whatever_is_named_in_a_command_is_one_word_of_it() {
        assert_eq!(shell_word("acme::a-1"), "acme::a-1");
        assert_eq!(shell_word("$(id); 'x'"), r"'$(id); '\''x'\'''");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn times_are_readable_without_a_script() {
        assert_eq!(utc("2026-04-23T19:04:21Z"), "2026-04-23 19:04:21 UTC");
        assert_eq!(utc("2026-04-23T19:04:21.123456Z"), "2026-04-23 19:04:21 UTC");
        assert_eq!(utc("yesterday"), "yesterday");
    }
}
