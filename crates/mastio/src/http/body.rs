//! Request bodies as they arrive: bounded in bytes and in time.
//!
//! A client that sends a byte now and then would hold a request, and what was read of it, for as long as it likes. So a
//! body that is not whole in time is cut; the clock starts when we first have to wait for it.
//!
//! A request may be answered before its body is there: it is refused for what its headers say. Were the connection closed
//! then, whoever still writes would be told of a broken connection and not of the refusal (RFC 9112 §9.6). So what nobody
//! wanted to read is read and thrown away, for a moment.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{self, Body, Bytes};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use mastio_core::error::Kind;
use tokio::time::{Sleep, sleep, timeout};

use super::error::ApiError;

/// A body that takes longer to arrive is cut. Two megabytes over a slow line take as long; the SDK gives up after ten
/// seconds.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the rest of a body is thrown away before the connection is closed.
const UNWANTED_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a body that are thrown away at most: more than any route accepts.
const UNWANTED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A body was not whole in time.
#[derive(Debug, thiserror::Error)]
#[error("the request body did not arrive within {} s", BODY_TIMEOUT.as_secs())]
struct TooSlow;

/// A body that must arrive in time.
pub struct TimedBody {
    // None once it has failed.
    inner: Option<Incoming>,
    // Most bodies are there at once and need no timer.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl TimedBody {
    /// The body of a connection.
    #[must_use]
    pub fn new(inner: Incoming) -> Self {
        Self { inner: Some(inner), deadline: None }
    }
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let failed = match Pin::new(inner).poll_frame(task) {
            Poll::Ready(Some(Err(error))) => error.into(),
            Poll::Ready(frame) => return Poll::Ready(frame.map(|frame| frame.map_err(Into::into))),
            Poll::Pending => {
                let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(BODY_TIMEOUT)));
                ready!(deadline.as_mut().poll(task));
                TooSlow.into()
            }
        };
        self.inner = None;
        Poll::Ready(Some(Err(failed)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map(HttpBody::size_hint).unwrap_or_default()
    }
}

impl Drop for TimedBody {
    fn drop(&mut self) {
        if let Some(rest) = self.inner.take().filter(|rest| !rest.is_end_stream())
            && rest.size_hint().lower() <= UNWANTED_BYTES_MAX as u64
        {
            let rest = Limited::new(rest, UNWANTED_BYTES_MAX);
            tokio::spawn(timeout(UNWANTED_TIMEOUT, throw_away(rest)));
        }
    }
}

async fn throw_away(mut rest: Limited<Incoming>) {
    while let Some(Ok(_)) = rest.frame().await {}
}

/// The whole of a body.
///
/// Errors: 413 over `bytes_max`; 408 when it was too slow; 400 when it ended before it was whole.
pub async fn read(body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    body::to_bytes(body, bytes_max).await.map_err(|error| {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
        while let Some(error) = cause {
            if error.is::<LengthLimitError>() {
                return ApiError::new(Kind::TooLarge, format!("request body exceeds {bytes_max} bytes"));
            }
            if error.is::<TooSlow>() {
                return ApiError::new(Kind::TimedOut, TooSlow.to_string());
            }
            cause = error.source();
        }
        ApiError::new(Kind::Invalid, "the request body ended before it was whole")
    })
}
