//! Request bodies as they arrive: bounded in bytes and in time.
//!
//! A client that sends a byte now and then would hold a request, and what was read of it, for as long as it likes. So a
//! body that is not whole in time is cut; the clock starts when we first have to wait for it.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{self, Body, Bytes};
use http_body_util::LengthLimitError;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use mastio_core::error::Kind;
use tokio::time::{Sleep, sleep};

use super::error::ApiError;

/// A body that takes longer to arrive is cut. Two megabytes over a slow line take as long; the SDK gives up after ten
/// seconds.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);

/// A body was not whole in time.
#[derive(Debug, thiserror::Error)]
#[error("the request body did not arrive within {} s", BODY_TIMEOUT.as_secs())]
struct TooSlow;

/// A body that must arrive in time.
pub struct TimedBody {
    inner: Incoming,
    // Most bodies are there at once and need no timer.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl TimedBody {
    /// The body of a connection.
    #[must_use]
    pub fn new(inner: Incoming) -> Self {
        Self { inner, deadline: None }
    }
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(task) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(BODY_TIMEOUT)));
        deadline.as_mut().poll(task).map(|()| Some(Err(TooSlow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
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
