//! Request bodies: JSON of a bounded size, or a clear refusal.

use axum::extract::{FromRequest, Request};
use mastio_core::error::Kind;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::body;
use super::error::ApiError;

/// Bytes of a request body at most (wire contract §10).
pub const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;

/// A body that is JSON of type `T`.
///
/// Errors: 413 over [`BODY_BYTES_MAX`], 408 when it is too slow, 400 when it is not JSON, 422 when it has another shape.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Self::Rejection> {
        let bytes = body::read(request.into_body(), BODY_BYTES_MAX).await?;
        parse(&bytes).map(Self)
    }
}

/// Reads `bytes` as JSON of type `T`. Errors: as for [`Json`].
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| {
        if error.is_data() {
            let detail =
                json!([{ "type": "value_error", "loc": ["body"], "msg": error.to_string(), "input": null }]);
            ApiError::new(Kind::Unprocessable, detail)
        } else {
            ApiError::new(Kind::Invalid, format!("request body is not JSON: {error}"))
        }
    })
}
