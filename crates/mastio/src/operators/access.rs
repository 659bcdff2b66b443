//! Who may call what: one line for every route of `/proxy` and `/v1/admin`.
//!
//! A viewer reads, an operator acts, an admin manages operators and ends what cannot be begun again. A route without a
//! line lets nobody in, whatever its handler forgets; `tests/tidy.rs` compares the table with the routes in the source.

use axum::http::Method;

use crate::http::authn::Role;

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Anyone: the sign-in, the set-up by its token, and what their pages are drawn with.
    Anyone,
    /// A page for people: a session whose operator has at least this role; without one it leads to the sign-in.
    Page(Role),
    /// The API: a secret, or a session with its token, of at least this role.
    Api(Role),
}

use Access::{Anyone, Api, Page};
use Role::{Admin, Operator, Viewer};

/// Method, path as the routers spell it, and who may call it.
pub const TABLE: &[(&str, &str, Access)] = &[
    // Agents.
    ("GET", "/v1/admin/agents", Api(Viewer)),
    ("POST", "/v1/admin/agents", Api(Operator)),
    ("GET", "/v1/admin/agents/{agent_id}", Api(Viewer)),
    ("DELETE", "/v1/admin/agents/{agent_id}", Api(Operator)),
    ("POST", "/v1/admin/agents/{agent_id}/deactivate", Api(Operator)),
    ("POST", "/v1/admin/agents/{agent_id}/reactivate", Api(Operator)),
    ("POST", "/v1/admin/agents/{agent_id}/renew", Api(Operator)),
    ("POST", "/v1/admin/agents/{agent_id}/dpop-jwk", Api(Operator)),
    ("POST", "/v1/admin/agents/enroll/byoca", Api(Operator)),
    ("POST", "/v1/admin/agents/enroll/spiffe", Api(Operator)),
    // Requests for an identity.
    ("GET", "/v1/admin/enrollments", Api(Viewer)),
    ("GET", "/v1/admin/enrollments/{session_id}", Api(Viewer)),
    ("POST", "/v1/admin/enrollments/{session_id}/approve", Api(Operator)),
    ("POST", "/v1/admin/enrollments/{session_id}/reject", Api(Operator)),
    // Upstream tools.
    ("GET", "/v1/admin/mcp-resources", Api(Viewer)),
    ("POST", "/v1/admin/mcp-resources", Api(Operator)),
    ("DELETE", "/v1/admin/mcp-resources/{resource_id}", Api(Operator)),
    ("GET", "/v1/admin/mcp-resources/bindings", Api(Viewer)),
    ("POST", "/v1/admin/mcp-resources/bindings", Api(Operator)),
    ("DELETE", "/v1/admin/mcp-resources/bindings/{binding_id}", Api(Operator)),
    // MCP servers and their tools.
    ("GET", "/v1/admin/mcp-upstreams", Api(Viewer)),
    ("POST", "/v1/admin/mcp-upstreams", Api(Operator)),
    ("GET", "/v1/admin/mcp-upstreams/{upstream}", Api(Viewer)),
    ("PUT", "/v1/admin/mcp-upstreams/{upstream}", Api(Operator)),
    ("DELETE", "/v1/admin/mcp-upstreams/{upstream}", Api(Operator)),
    ("POST", "/v1/admin/mcp-upstreams/{upstream}/refresh", Api(Operator)),
    ("GET", "/v1/admin/mcp-tools", Api(Viewer)),
    ("GET", "/v1/admin/mcp-tools/{tool}", Api(Viewer)),
    ("PATCH", "/v1/admin/mcp-tools/{tool}", Api(Operator)),
    ("POST", "/v1/admin/mcp-tools/{tool}/approve", Api(Operator)),
    ("POST", "/v1/admin/mcp-tools/{tool}/block", Api(Operator)),
    // Rules for calls. A test changes nothing.
    ("GET", "/v1/admin/mcp-policies", Api(Viewer)),
    ("POST", "/v1/admin/mcp-policies/test", Api(Viewer)),
    ("GET", "/v1/admin/mcp-policies/{policy}", Api(Viewer)),
    ("PUT", "/v1/admin/mcp-policies/{policy}", Api(Operator)),
    ("DELETE", "/v1/admin/mcp-policies/{policy}", Api(Operator)),
    ("GET", "/v1/admin/mcp-access", Api(Viewer)),
    // What was kept of a call is opened one by one, and each reading leaves an event.
    ("GET", "/v1/admin/mcp-evidence", Api(Viewer)),
    ("GET", "/v1/admin/mcp-evidence/{evidence}", Api(Operator)),
    // A plan says whether a credential is the one there is, which must not be found out by trying.
    ("GET", "/v1/admin/mcp-config", Api(Viewer)),
    ("POST", "/v1/admin/mcp-config/plan", Api(Operator)),
    ("POST", "/v1/admin/mcp-config/import", Api(Operator)),
    // Who may ask about access tokens: a secret for each.
    ("GET", "/v1/admin/resource-servers", Api(Viewer)),
    ("POST", "/v1/admin/resource-servers", Api(Operator)),
    ("DELETE", "/v1/admin/resource-servers/{resource_server_id}", Api(Operator)),
    // Certificates.
    ("POST", "/v1/admin/certs/revoke", Api(Operator)),
    ("GET", "/v1/admin/certs/revoked", Api(Viewer)),
    ("POST", "/v1/admin/pki/byoca-certificates", Api(Operator)),
    ("GET", "/v1/admin/pki/overlap", Api(Viewer)),
    // It destroys a key.
    ("POST", "/v1/admin/pki/settle", Api(Admin)),
    // The audit log.
    ("GET", "/v1/admin/audit", Api(Viewer)),
    ("GET", "/v1/admin/audit/verify", Api(Viewer)),
    // Operators.
    ("GET", "/v1/admin/operators", Api(Admin)),
    ("POST", "/v1/admin/operators", Api(Admin)),
    ("PATCH", "/v1/admin/operators/{name}", Api(Admin)),
    ("DELETE", "/v1/admin/operators/{name}", Api(Admin)),
    ("POST", "/v1/admin/operators/{name}/reset-password", Api(Admin)),
    // Updates.
    ("GET", "/proxy/updates/api", Api(Viewer)),
    ("GET", "/proxy/updates/doctor", Api(Viewer)),
    ("GET", "/proxy/updates/snapshots", Api(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/plan", Api(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/rollback-plan", Api(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/progress", Api(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/events", Api(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/proposals", Api(Viewer)),
    ("POST", "/proxy/updates/{migration_id}/proposals", Api(Operator)),
    ("POST", "/proxy/updates/{migration_id}/proposals/{proposal_id}/approve", Api(Operator)),
    ("POST", "/proxy/updates/{migration_id}/apply", Api(Operator)),
    ("POST", "/proxy/updates/{migration_id}/rollback", Api(Operator)),
    // Pages.
    ("GET", "/proxy", Page(Viewer)),
    ("GET", "/proxy/login", Anyone),
    ("POST", "/proxy/login", Anyone),
    ("GET", "/proxy/login/sso", Anyone),
    ("GET", "/proxy/login/sso/callback", Anyone),
    ("GET", "/proxy/setup", Anyone),
    ("POST", "/proxy/setup", Anyone),
    ("POST", "/proxy/logout", Page(Viewer)),
    ("GET", "/proxy/updates", Page(Viewer)),
    ("GET", "/proxy/updates/{migration_id}", Page(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/run", Page(Viewer)),
    ("GET", "/proxy/updates/{migration_id}/apply-review", Page(Viewer)),
    ("POST", "/proxy/updates/{migration_id}/apply-review", Page(Operator)),
    ("GET", "/proxy/updates/{migration_id}/rollback-review", Page(Viewer)),
    ("POST", "/proxy/updates/{migration_id}/rollback-review", Page(Operator)),
    ("POST", "/proxy/updates/{migration_id}/propose-plan", Page(Operator)),
    ("POST", "/proxy/updates/{migration_id}/approve-plan", Page(Operator)),
    ("GET", "/proxy/agents", Page(Viewer)),
    ("GET", "/proxy/agents/{agent_id}", Page(Viewer)),
    ("POST", "/proxy/agents/{agent_id}/deactivate", Page(Operator)),
    ("POST", "/proxy/agents/{agent_id}/reactivate", Page(Operator)),
    ("POST", "/proxy/agents/{agent_id}/renew", Page(Operator)),
    ("POST", "/proxy/agents/{agent_id}/dpop-key", Page(Operator)),
    ("POST", "/proxy/agents/{agent_id}/revoke", Page(Operator)),
    ("POST", "/proxy/agents/{agent_id}/delete", Page(Operator)),
    ("GET", "/proxy/enrollments", Page(Viewer)),
    ("GET", "/proxy/enrollments/rows", Page(Viewer)),
    ("GET", "/proxy/enrollments/{session_id}", Page(Viewer)),
    ("POST", "/proxy/enrollments/{session_id}/approve", Page(Operator)),
    ("POST", "/proxy/enrollments/{session_id}/reject", Page(Operator)),
    ("GET", "/proxy/tools", Page(Viewer)),
    ("POST", "/proxy/tools/servers", Page(Operator)),
    ("POST", "/proxy/tools/servers/{upstream_id}/look", Page(Operator)),
    ("POST", "/proxy/tools/servers/{upstream_id}/delete", Page(Operator)),
    ("GET", "/proxy/tools/{tool_id}", Page(Viewer)),
    ("POST", "/proxy/tools/{tool_id}/approve", Page(Operator)),
    ("POST", "/proxy/tools/{tool_id}/block", Page(Operator)),
    ("POST", "/proxy/tools/{tool_id}/limits", Page(Operator)),
    ("POST", "/proxy/tools/{tool_id}/try", Page(Operator)),
    ("POST", "/proxy/tools/{tool_id}/bind", Page(Operator)),
    ("POST", "/proxy/tools/{tool_id}/unbind", Page(Operator)),
    ("GET", "/proxy/policies", Page(Viewer)),
    ("POST", "/proxy/policies", Page(Operator)),
    // Asks, and changes nothing.
    ("POST", "/proxy/policies/test", Page(Viewer)),
    ("GET", "/proxy/policies/{name}", Page(Viewer)),
    ("POST", "/proxy/policies/{name}/mode", Page(Operator)),
    ("POST", "/proxy/policies/{name}/delete", Page(Operator)),
    ("GET", "/proxy/access", Page(Viewer)),
    ("GET", "/proxy/pki", Page(Viewer)),
    ("GET", "/proxy/pki/overlap", Page(Viewer)),
    ("POST", "/proxy/pki/settle", Page(Admin)),
    ("GET", "/proxy/pki/certificates/{fingerprint}", Page(Viewer)),
    ("GET", "/proxy/mastio-key", Page(Viewer)),
    ("GET", "/proxy/settings", Page(Viewer)),
    ("GET", "/proxy/operators", Page(Admin)),
    ("POST", "/proxy/operators", Page(Admin)),
    ("POST", "/proxy/operators/end-sessions", Page(Admin)),
    ("POST", "/proxy/operators/{name}/role", Page(Admin)),
    ("POST", "/proxy/operators/{name}/reset", Page(Admin)),
    ("POST", "/proxy/operators/{name}/deactivate", Page(Admin)),
    ("GET", "/proxy/audit", Page(Viewer)),
    ("GET", "/proxy/audit/rows", Page(Viewer)),
    ("GET", "/proxy/audit/stream", Page(Viewer)),
    ("GET", "/proxy/audit/{seq}", Page(Viewer)),
    // Reads the whole log; a form all the same.
    ("POST", "/proxy/audit", Page(Viewer)),
    ("GET", "/proxy/assets/{name}", Anyone),
];

/// Whether the table decides about this path.
#[must_use]
pub fn governs(path: &str) -> bool {
    path == "/proxy" || path.starts_with("/proxy/") || path.starts_with("/v1/admin/")
}

/// Who may call `method` of the route `path`. `None`: nobody.
#[must_use]
pub fn of(method: &Method, path: &str) -> Option<Access> {
    // The routers answer HEAD with what GET says.
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    TABLE.iter().find(|(known, route, _)| *known == method && *route == path).map(|(_, _, access)| *access)
}

/// Who may send a form to `path`, which names things where the table has `{…}`. `None`: nobody.
#[must_use]
pub fn of_form(path: &str) -> Option<Access> {
    let path = path.split('#').next().unwrap_or(path);
    let fits = |route: &str| {
        let mut segments = path.split('/');
        let all = route.split('/').all(|wanted| {
            segments.next().is_some_and(|segment| wanted == segment || wanted.starts_with('{'))
        });
        all && segments.next().is_none()
    };
    TABLE.iter().find(|(method, route, _)| *method == "POST" && fits(route)).map(|(_, _, access)| *access)
}

/// Whether the route `path` has a line for any method.
#[must_use]
pub fn knows(path: &str) -> bool {
    TABLE.iter().any(|(_, route, _)| *route == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_about_a_governed_path_and_none_stands_there_twice() {
        for (index, (method, path, _)) in TABLE.iter().enumerate() {
            assert!(governs(path), "{path}");
            let again = TABLE[index + 1..].iter().any(|(other, route, _)| (other, route) == (method, path));
            assert!(!again, "{method} {path} stands there twice");
        }
    }

    #[test]
    fn whatever_changes_something_asks_for_more_than_a_viewer() {
        // A dry run of a policy is a question too long for a URL.
        let reads = [
            "/proxy/login",
            "/proxy/logout",
            "/proxy/setup",
            "/proxy/audit",
            "/v1/admin/mcp-policies/test",
            "/proxy/policies/test",
        ];
        for (method, path, access) in TABLE {
            if *method != "GET" && !reads.contains(path) {
                assert!(matches!(access, Page(role) | Api(role) if *role > Viewer), "{method} {path}");
            }
        }
    }

    #[test]
    fn a_route_without_a_line_is_nobody_s() {
        assert_eq!(of(&Method::GET, "/v1/admin/no-such-route"), None);
        assert_eq!(of(&Method::DELETE, "/proxy/updates/api"), None);
        assert_eq!(of(&Method::HEAD, "/proxy/updates/api"), Some(Api(Viewer)));
        assert_eq!(of_form("/proxy/agents/acme::a-1/renew"), Some(Page(Operator)));
        assert_eq!(of_form("/proxy/operators/alice/role"), Some(Page(Admin)));
        assert_eq!(of_form("/proxy/agents/acme::a-1/renew/x"), None);
        assert_eq!(of_form("/proxy/agents/acme::a-1"), None);
        assert!(governs("/v1/admin/no-such-route") && governs("/proxy") && !governs("/proxyfoo"));
    }
}
