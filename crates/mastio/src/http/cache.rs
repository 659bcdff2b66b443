//! Responses that clients may keep: a strong `ETag`, and 304 for who has it already.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// A response with a strong `ETag`, or 304 where the caller has it already.
#[must_use]
pub fn cached(
    headers: &HeaderMap,
    body: impl AsRef<[u8]>,
    content_type: &'static str,
    cache: &'static str,
) -> Response {
    let body = body.as_ref();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, body);
    let etag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(&digest.as_ref()[..24]));
    let matches =
        headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok()).any(|value| {
            value.split(',').map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
        });
    let mut response = if matches {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], body.to_vec()).into_response()
    };
    let out = response.headers_mut();
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        out.insert(header::ETAG, etag);
    }
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static(cache));
    response
}
