//! Headers that every response carries (wire contract §2), and request headers that the network may not set.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;

const SECURITY: [(HeaderName, HeaderValue); 5] = [
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("strict-origin-when-cross-origin")),
    (
        HeaderName::from_static("permissions-policy"),
        HeaderValue::from_static("camera=(), microphone=(), geolocation=()"),
    ),
    (header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000; includeSubDomains")),
];

/// Inbound `X-Cullis-*` headers that clients may send; any other is dropped.
const CULLIS_ALLOWED: [&str; 3] =
    ["x-cullis-session-token", "x-cullis-on-behalf-of-user", "x-cullis-device-attestation"];

/// Drops what only a trusted front may claim, runs the request, adds the security headers.
///
/// `X-SSL-Client-*` claim a client certificate. On our own listener the handshake has proved the real one, so
/// taking the claim from the network would be an authentication bypass.
pub async fn guard(mut request: Request, next: Next) -> Response {
    let spoofable: Vec<HeaderName> = request
        .headers()
        .keys()
        .filter(|name| {
            let name = name.as_str();
            name.starts_with("x-ssl-client-")
                || (name.starts_with("x-cullis-") && !CULLIS_ALLOWED.contains(&name))
        })
        .cloned()
        .collect();
    for name in spoofable {
        request.headers_mut().remove(name);
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in &SECURITY {
        headers.insert(name, value.clone());
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}
