//! The one place where an error becomes a status code and a body.
//!
//! The body is `{"detail": …}` (wire contract §2). A failure on our side says nothing of its cause; the cause is
//! in the log, with the request id.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mastio_core::error::Kind;
use serde_json::{Value, json};

/// Seconds after which a caller may try again when signing is halted.
const HALTED_RETRY_AFTER_S: u32 = 30;
/// Seconds after which a caller may try again when we are overloaded or the database is away.
const UNAVAILABLE_RETRY_AFTER_S: u32 = 1;
/// Seconds after which a caller may try again when it asked too often.
const LIMITED_RETRY_AFTER_S: u32 = 60;

/// What a capability's error tells this module.
pub trait Problem: std::error::Error {
    /// Its class, which decides the status.
    fn kind(&self) -> Kind;

    /// What the caller reads. Not used for [`Kind::Internal`].
    fn detail(&self) -> Value {
        Value::String(self.to_string())
    }

    /// A header that goes with it.
    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        None
    }
}

/// An error on its way to the caller.
#[derive(Debug)]
pub struct ApiError {
    kind: Kind,
    // Boxed: an error is the rare branch of every result that carries it.
    detail: Box<Value>,
    // Empty for most, and then without an allocation.
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    /// An error that is the caller's and needs no type of its own.
    pub fn new(kind: Kind, detail: impl Into<Value>) -> Self {
        Self { kind, detail: Box::new(detail.into()), headers: Vec::new() }
    }

    /// The same with a header, in place of one of that name.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.retain(|(other, _)| *other != name);
        self.headers.push((name, value));
        self
    }

    /// Its class.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a person reads: the detail's text, or its `message`.
    #[must_use]
    pub fn message(&self) -> &str {
        self.detail.as_str().or_else(|| self.detail["message"].as_str()).unwrap_or("The request was refused")
    }

    fn status(&self) -> StatusCode {
        match self.kind {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
            Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
            Kind::Denied => StatusCode::FORBIDDEN,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::OutOfOrder => StatusCode::PRECONDITION_FAILED,
            Kind::TimedOut => StatusCode::REQUEST_TIMEOUT,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::Limited => StatusCode::TOO_MANY_REQUESTS,
            Kind::Halted | Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl<E: Problem> From<E> for ApiError {
    fn from(error: E) -> Self {
        let kind = error.kind();
        let detail = match kind {
            Kind::Internal => {
                tracing::error!(error = chain(&error), "request_failed");
                json!("Internal server error")
            }
            Kind::Unavailable => {
                tracing::warn!(error = chain(&error), "request_refused_unavailable");
                error.detail()
            }
            _ => error.detail(),
        };
        Self { kind, detail: Box::new(detail), headers: error.header().into_iter().collect() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = (status, axum::Json(json!({ "detail": self.detail }))).into_response();
        let headers = response.headers_mut();
        let retry_after_s = match self.kind {
            Kind::Halted => Some(HALTED_RETRY_AFTER_S),
            Kind::Unavailable => Some(UNAVAILABLE_RETRY_AFTER_S),
            Kind::Limited => Some(LIMITED_RETRY_AFTER_S),
            _ => None,
        };
        if let Some(seconds) = retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        for (name, value) in self.headers {
            headers.insert(name, value);
        }
        response
    }
}

/// Bytes of a refusal's text that are kept, at most.
const REFUSAL_BYTES_MAX: usize = 16 * 1024;

/// Gives the refusals of the framework itself (a method that is not there, a path or query that cannot be read) the
/// envelope that all others have.
pub async fn envelope(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let content_type = response.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let bare = content_type.is_none_or(|content_type| content_type.starts_with(b"text/plain"));
    if !response.status().is_client_error() || !bare {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, REFUSAL_BYTES_MAX).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let detail = match text.trim() {
        "" => parts.status.canonical_reason().unwrap_or("refused"),
        text => text,
    };
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Response::from_parts(parts, Body::from(json!({ "detail": detail }).to_string()))
}

/// An error with every cause below it: `a: b: c`.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
