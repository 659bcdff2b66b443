//! Request bodies: JSON of a bounded size, or a clear refusal.

use axum::extract::{FromRequest, Request};
use mastio_core::error::Kind;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use serde_path_to_error::Segment;

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
            let loc = place::<T>(bytes);
            let detail =
                json!([{ "type": "value_error", "loc": loc, "msg": error.to_string(), "input": null }]);
            ApiError::new(Kind::Unprocessable, detail)
        } else {
            ApiError::new(Kind::Invalid, format!("request body is not JSON: {error}"))
        }
    })
}

/// Where the first thing stands that does not fit: `body`, then names and indices. Read a second time to find it.
fn place<T: DeserializeOwned>(bytes: &[u8]) -> Vec<Value> {
    let mut loc = vec![json!("body")];
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    if let Err(error) = serde_path_to_error::deserialize::<_, T>(&mut reader) {
        loc.extend(error.path().iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(json!(index)),
            Segment::Map { key } => Some(json!(key)),
            Segment::Enum { .. } | Segment::Unknown => None,
        }));
    }
    loc
}
