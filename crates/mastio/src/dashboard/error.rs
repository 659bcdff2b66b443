//! What can go wrong with a page, mapped once to what its reader is told.

use axum::http::{HeaderName, HeaderValue};
use mastio_core::error::Kind;

use crate::enrollment::EnrollmentError;
use crate::gateway::GatewayError;
use crate::http::error::{ApiError, Problem};
use crate::operators::OperatorError;
use crate::operators::sso::SsoError;
use crate::pki::PkiError;
use crate::store::StoreError;
use crate::updates::UpdateError;

/// Why a page was not shown or a form not acted upon.
#[derive(Debug, thiserror::Error)]
pub enum DashboardError {
    /// Nobody has signed in.
    #[error("sign in first")]
    SignedOut {
        /// Where to go on after it.
        next: String,
    },
    /// The secret is wrong.
    #[error(
        "this is not the admin secret: it is MCP_PROXY_ADMIN_SECRET in proxy.env, or your own with your name"
    )]
    WrongSecret,
    /// As many pages as may do follow the audit log.
    #[error("too many pages follow the audit log: close one, or reload this page to see what is new")]
    TooManyFollowers,
    /// Who asks may not, or cannot be told from others now.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// The form does not carry this session's token.
    #[error("this form belongs to another session: go back, reload the page and send it again")]
    ForeignForm,
    /// The form is not one of ours.
    #[error("the form cannot be read")]
    Malformed,
    /// A form that has no way back does not name what it is about.
    #[error("nothing was changed: type {0} to confirm it")]
    OtherName(String),
    /// A key cannot be read.
    #[error("the JWK is refused: {0}")]
    Jwk(String),
    /// Arguments that are only asked about are no JSON.
    #[error("the arguments are no JSON: write an object, such as {{\"amount\": 5}}, or nothing")]
    Arguments,
    /// A capability has said it for the API already.
    #[error("{}", .0.message())]
    Told(ApiError),
    /// There is no such thing.
    #[error("there is no {0}")]
    NotFound(String),
    /// A template could not be rendered.
    #[error("the page cannot be rendered")]
    Render(#[from] askama::Error),
    /// Single sign-on.
    #[error(transparent)]
    Sso(#[from] SsoError),
    /// Updates.
    #[error(transparent)]
    Update(#[from] UpdateError),
    /// Agents.
    #[error(transparent)]
    Enrollment(#[from] EnrollmentError),
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Problem for DashboardError {
    fn kind(&self) -> Kind {
        match self {
            Self::SignedOut { .. } => Kind::Unauthenticated,
            Self::WrongSecret | Self::ForeignForm => Kind::Denied,
            Self::TooManyFollowers => Kind::Limited,
            Self::Operator(error) => error.kind(),
            Self::Malformed | Self::OtherName(_) | Self::Jwk(_) => Kind::Invalid,
            Self::Arguments => Kind::Unprocessable,
            Self::Told(error) => error.kind(),
            Self::NotFound(_) => Kind::NotFound,
            Self::Render(_) => Kind::Internal,
            Self::Sso(error) => error.kind(),
            Self::Update(error) => error.kind(),
            Self::Enrollment(error) => error.kind(),
            Self::Pki(error) => error.kind(),
            Self::Gateway(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    fn detail(&self) -> serde_json::Value {
        match self {
            Self::Operator(error) => error.detail(),
            Self::Update(error) => error.detail(),
            // The API's shape for a field is for programs.
            Self::Enrollment(error @ EnrollmentError::Field { .. }) => {
                serde_json::Value::String(error.to_string())
            }
            Self::Enrollment(error) => error.detail(),
            Self::Gateway(GatewayError::Fields(problems)) => {
                let words = problems.iter().map(|problem| format!("{} {}", problem.field, problem.message));
                serde_json::Value::String(words.collect::<Vec<_>>().join("; "))
            }
            Self::Gateway(error) => error.detail(),
            Self::Store(error) => error.detail(),
            other => serde_json::Value::String(other.to_string()),
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Operator(error) => error.header(),
            _ => None,
        }
    }
}
