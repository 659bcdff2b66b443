//! Which agent a certificate names (wire contract §1.2).

use std::fmt;

use super::extension::SUBJECT_ALTERNATIVE_NAME;
use super::{Certificate, X509Error};

/// An agent as its certificate names it. Nothing here says that it exists.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AgentIdentity {
    /// The trust domain of the SPIFFE id; `None` where the common name told the rest.
    pub trust_domain: Option<String>,
    /// The organization.
    pub org_id: String,
    /// The agent's name in it; for users and workloads `user::<name>` and `workload::<name>`.
    pub name: String,
}

impl AgentIdentity {
    /// The canonical id, `<org>::<name>`.
    #[must_use]
    pub fn agent_id(&self) -> String {
        format!("{}::{}", self.org_id, self.name)
    }
}

impl fmt::Display for AgentIdentity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}::{}", self.org_id, self.name)
    }
}

/// Reads the agent's identity from a leaf.
///
/// Shape: the first SAN URI of the scheme `spiffe`, as `spiffe://<td>/<org>/<name>` or
/// `spiffe://<td>/<org>/<agent|user|workload>/<name>`; `agent` is left out of the name, the others stand
/// before it. Without such a URI the common name `<org>::<name>`.
/// Errors: [`X509Error::NoIdentity`] where neither is there, and where a SPIFFE URI has another shape: a
/// certificate that says something odd is not given a second reading.
/// Not here: whether the certificate is valid. Call this on proven leaves only.
pub fn identity(certificate: &Certificate) -> Result<AgentIdentity, X509Error> {
    // An unreadable SAN looks empty; falling back to the common name would let it hide.
    if certificate.malformed_extensions().contains(&SUBJECT_ALTERNATIVE_NAME)
        || certificate.duplicated_extension().is_some()
    {
        return Err(X509Error::NoIdentity);
    }
    if let Some(uri) = certificate.uri_sans().iter().find_map(|uri| strip_scheme(uri)) {
        return from_spiffe(uri).ok_or(X509Error::NoIdentity);
    }
    certificate.subject_common_name().and_then(from_common_name).ok_or(X509Error::NoIdentity)
}

/// What follows `spiffe://`; the scheme is case-insensitive (RFC 3986 §3.1).
fn strip_scheme(uri: &str) -> Option<&str> {
    const SCHEME: &str = "spiffe://";
    let (scheme, rest) = uri.split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then_some(rest)
}

fn from_spiffe(rest: &str) -> Option<AgentIdentity> {
    let mut segments = rest.split('/');
    let trust_domain = segments.next()?;
    let segments: Vec<&str> = segments.collect();
    if trust_domain.is_empty() || !segments.iter().all(|segment| is_segment(segment)) {
        return None;
    }
    let (org_id, name) = match segments.as_slice() {
        [org, name] => (*org, (*name).to_owned()),
        [org, "agent", name] => (*org, (*name).to_owned()),
        [org, kind @ ("user" | "workload"), name] => (*org, format!("{kind}::{name}")),
        _ => return None,
    };
    Some(AgentIdentity { trust_domain: Some(trust_domain.to_owned()), org_id: org_id.to_owned(), name })
}

/// A colon inside a segment could make two identities spell the same agent id: agent `user::x` and user `x`.
fn is_segment(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|octet| octet.is_ascii_graphic() && octet != b':')
}

fn from_common_name(common_name: &str) -> Option<AgentIdentity> {
    let (org_id, name) = common_name.split_once("::")?;
    let printable = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
    if !printable(org_id) || !printable(name) || org_id.contains(':') || name.starts_with(':') {
        return None;
    }
    Some(AgentIdentity { trust_domain: None, org_id: org_id.to_owned(), name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn spiffe_ids_of_both_shapes_name_an_agent() {
        let cases = [
            ("cullis.local/acme/bot", Some("acme::bot")),
            ("cullis.local/acme/agent/bot", Some("acme::bot")),
            ("cullis.local/acme/user/ada", Some("acme::user::ada")),
            ("cullis.local/acme/workload/batch", Some("acme::workload::batch")),
            ("cullis.local/proxy/acme", Some("proxy::acme")),
            ("cullis.local/acme/robot/bot", None),
            ("cullis.local/acme/user::ada", None),
            ("cullis.local/acme", None),
            ("cullis.local/acme/", None),
            ("/acme/bot", None),
            ("cullis.local//bot", None),
            ("cullis.local/acme/agent/bot/more", None),
        ];
        for (rest, expected) in cases {
            let found = from_spiffe(rest).map(|identity| identity.agent_id());
            assert_eq!(found.as_deref(), expected, "{rest}");
        }
        assert_eq!(strip_scheme("SPIFFE://td/x"), Some("td/x"));
        assert_eq!(strip_scheme("https://td/x"), None);
    }

    #[test]
    fn a_common_name_names_an_agent_only_with_both_halves() {
        assert_eq!(from_common_name("acme::bot").map(|identity| identity.agent_id()).unwrap(), "acme::bot");
        for common_name in ["acme", "acme::", "::bot", "acme:::bot", "a:b::bot"] {
            assert_eq!(from_common_name(common_name), None, "{common_name}");
        }
    }
}
