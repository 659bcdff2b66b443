//! Headers that every response carries (wire contract §2), and request headers that the network may not set.

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::context::Context;
use super::error::ApiError;
use super::front::{Forwarded, Front, client_address, forwarded};

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

/// Takes or drops what only a trusted front may claim, runs the request, adds the security headers.
///
/// `X-SSL-Client-*` claim a client certificate. On our own listener the handshake has proved the real one, so
/// taking the claim from anybody but the configured front would be an authentication bypass.
pub async fn guard(State(front): State<Front>, mut request: Request, next: Next) -> Response {
    let taken = take_forwarded(&front, &mut request);
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
    let quotas = request.extensions().get::<Context>().map(|context| context.quotas.clone());
    let mut response = match taken {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in &SECURITY {
        headers.insert(name, value.clone());
    }
    if let Some(quotas) = quotas {
        quotas.tell(headers);
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Puts the certificate that a trusted front has verified where the handshake's would be, and its client's address where
/// its own would be.
///
/// A certificate that the front itself showed us is not its client's: it never stands in for one that is missing.
fn take_forwarded(front: &Front, request: &mut Request) -> Result<(), ApiError> {
    let is_front = |context: &Context| front.trusts(context.peer.ip());
    if !request.extensions().get::<Context>().is_some_and(is_front) {
        return Ok(());
    }
    if let Some(source) = client_address(request.headers())
        && let Some(context) = request.extensions_mut().get_mut::<Context>()
    {
        context.source = source;
    }
    let client_certificate = match forwarded(request.headers())? {
        Forwarded::Nothing => return Ok(()),
        Forwarded::NoCertificate => None,
        Forwarded::Certificate(der) => Some(der),
    };
    if let Some(context) = request.extensions_mut().get_mut::<Context>() {
        context.client_certificate = client_certificate;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use axum::Router;
    use axum::body::Body;
    use axum::http::HeaderMap;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn what_only_a_front_or_the_server_may_say_reaches_no_handler() {
        let names = |headers: HeaderMap| async move {
            headers.keys().map(|name| name.as_str().to_owned()).collect::<Vec<_>>().join(" ")
        };
        let router = Router::new().route("/", get(names)).layer(from_fn_with_state(Front::default(), guard));
        let request = Request::get("/")
            .header("X-SSL-Client-Cert", "x")
            .header("X-SSL-Client-Verify", "SUCCESS")
            .header("X-SSL-Client-Anything", "x")
            .header("X-Cullis-Role", "broker")
            .header("X-Cullis-Mastio-Signature", "x")
            .header("X-Cullis-Session-Token", "x")
            .header("X-Cullis-On-Behalf-Of-User", "x")
            .header("X-Cullis-Device-Attestation", "x")
            .header("X-Other", "x");
        let response = router.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.headers()[header::X_FRAME_OPTIONS], "DENY");
        assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
        let body = axum::body::to_bytes(response.into_body(), 1000).await.unwrap();
        let mut seen: Vec<&str> = std::str::from_utf8(&body).unwrap().split(' ').collect();
        seen.sort_unstable();
        assert_eq!(
            seen,
            [
                "x-cullis-device-attestation",
                "x-cullis-on-behalf-of-user",
                "x-cullis-session-token",
                "x-other",
            ]
        );
    }
}
