//! What we say of ourselves: as authorization server (RFC 8414) and as protected resource (RFC 9728).

use mastio_core::token::claims::ACCESS_TOKEN_SCOPE;
use serde_json::{Value, json};

/// Path of the token endpoint.
pub const TOKEN_PATH: &str = "/v1/auth/token";
/// Path of the revocation endpoint.
pub const REVOKE_PATH: &str = "/v1/auth/revoke";
/// Path of the introspection endpoint.
pub const INTROSPECT_PATH: &str = "/v1/auth/introspect";
/// Path of the gateway, the resource that most tokens are for.
pub const GATEWAY_PATH: &str = "/v1/mcp";
/// Where a protected resource's metadata lies; the resource's own path follows (RFC 9728 §3.1).
pub const PROTECTED_RESOURCE_PATH: &str = "/.well-known/oauth-protected-resource";
/// Algorithms that a DPoP proof may have.
const PROOF_ALGORITHMS: [&str; 2] = ["ES256", "PS256"];
/// How clients authenticate.
const CLIENT_AUTHENTICATION: [&str; 2] = ["private_key_jwt", "tls_client_auth"];
const ASSERTION_ALGORITHMS: [&str; 3] = ["ES256", "RS256", "PS256"];

/// Authorization server metadata. `base` is our issuer identifier: our URL without a path.
///
/// Source: RFC 8414 §2; RFC 9449 §5.1; RFC 8705 §3.3; RFC 9728 §4.
#[must_use]
pub fn authorization_server(base: &str) -> Value {
    json!({
        "issuer": base,
        "token_endpoint": format!("{base}{TOKEN_PATH}"),
        "token_endpoint_auth_methods_supported": CLIENT_AUTHENTICATION,
        "token_endpoint_auth_signing_alg_values_supported": ASSERTION_ALGORITHMS,
        "jwks_uri": format!("{base}/.well-known/jwks-local.json"),
        "scopes_supported": [ACCESS_TOKEN_SCOPE],
        // There is no authorization endpoint, hence no response type.
        "response_types_supported": [],
        "grant_types_supported": ["client_credentials"],
        "revocation_endpoint": format!("{base}{REVOKE_PATH}"),
        "revocation_endpoint_auth_methods_supported": CLIENT_AUTHENTICATION,
        "revocation_endpoint_auth_signing_alg_values_supported": ASSERTION_ALGORITHMS,
        "introspection_endpoint": format!("{base}{INTROSPECT_PATH}"),
        "introspection_endpoint_auth_methods_supported": ["client_secret_basic"],
        "dpop_signing_alg_values_supported": PROOF_ALGORITHMS,
        "tls_client_certificate_bound_access_tokens": true,
        "protected_resources": [format!("{base}{GATEWAY_PATH}")],
    })
}

/// Protected resource metadata of the resource at `path` under `base`; an empty path is this server as a whole.
///
/// Source: RFC 9728 §2.
#[must_use]
pub fn protected_resource(base: &str, path: &str, org_id: &str) -> Value {
    json!({
        "resource": format!("{base}{path}"),
        "authorization_servers": [base],
        "scopes_supported": [ACCESS_TOKEN_SCOPE],
        "bearer_methods_supported": ["header"],
        "resource_name": format!("Mastio of {org_id}"),
        "tls_client_certificate_bound_access_tokens": true,
        "dpop_signing_alg_values_supported": PROOF_ALGORITHMS,
        // A token may be bound to a client certificate instead. An unbound one is never accepted.
        "dpop_bound_access_tokens_required": false,
    })
}

/// The value of `WWW-Authenticate` on a 401 or 403 of the resource at `path`.
///
/// The Bearer challenge comes first: MCP clients look for `resource_metadata` there. `scope` is all that any request
/// needs: what an agent may do is in its bindings and capabilities, and no other token would change that.
/// Source: RFC 6750 §3, RFC 9449 §7.1, RFC 9728 §5.1; MCP 2026-07-28, authorization, scope challenge handling.
#[must_use]
pub fn challenge(base: Option<&str>, path: &str, error: Option<&str>) -> String {
    let metadata = base.map_or_else(String::new, |base| {
        format!(", resource_metadata=\"{base}{PROTECTED_RESOURCE_PATH}{path}\"")
    });
    let error = error.map_or_else(String::new, |error| format!(", error=\"{error}\""));
    let scope = format!(", scope=\"{ACCESS_TOKEN_SCOPE}\"");
    let algorithms = PROOF_ALGORITHMS.join(" ");
    format!(
        "Bearer realm=\"mcp-proxy\"{error}{scope}{metadata}, \
         DPoP realm=\"mcp-proxy\", algs=\"{algorithms}\"{error}{scope}{metadata}"
    )
}
