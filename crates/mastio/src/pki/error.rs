//! What can go wrong in the certificate authority.

use axum::http::{HeaderName, HeaderValue};
use mastio_core::error::Kind;
use mastio_core::x509::X509Error;
use mastio_core::x509::path::PathError;
use serde_json::Value;

use super::keys::KeyError;
use crate::http::error::Problem;
use crate::store::StoreError;
use crate::updates::halt::Halted;

/// Why the certificate authority could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Signing is halted.
    #[error(transparent)]
    Halted(#[from] Halted),
    /// There is no intermediate to sign with.
    #[error("no Mastio intermediate: apply the pending update, or restart with the Org CA key available")]
    NoIntermediate,
    /// No key of ours has the identifier that was asked for, or none can sign.
    #[error("no revocation list: no key of this organisation that is held here has this identifier")]
    NoCrl,
    /// There is no key to sign tokens with.
    #[error("no active token key")]
    NoTokenKey,
    /// The Org CA's key is held elsewhere.
    #[error("the Org CA key is held elsewhere: sign with the tool that holds it")]
    OrgCaKeyUnavailable,
    /// The state kept changing while we signed.
    #[error("the PKI state kept changing: try again")]
    Moved,
    /// A certificate request is not usable.
    #[error("the certificate request is refused")]
    Request(#[source] X509Error),
    /// The state in the database is not what a certificate authority needs.
    #[error("{what} in the database is missing or unreadable")]
    State {
        /// The row.
        what: &'static str,
    },
    /// The state in the database is inconsistent.
    #[error("the stored certificates do not form a chain")]
    Chain(#[from] PathError),
    /// A certificate cannot be read or built.
    #[error("a certificate cannot be read or built")]
    Certificate(#[from] X509Error),
    /// A key cannot be opened or used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The TLS library refused a certificate or key.
    #[error("the TLS library refused the server certificate")]
    Tls(#[from] rustls::Error),
    /// A task that signs was stopped.
    #[error("a signing task was stopped")]
    Stopped,
}

impl Problem for PkiError {
    fn kind(&self) -> Kind {
        match self {
            Self::Halted(halted) => halted.kind(),
            Self::NoIntermediate | Self::NoTokenKey | Self::Moved => Kind::Unavailable,
            Self::NoCrl => Kind::NotFound,
            Self::OrgCaKeyUnavailable => Kind::Conflict,
            Self::Request(_) => Kind::Invalid,
            Self::Store(error) => error.kind(),
            Self::State { .. }
            | Self::Chain(_)
            | Self::Certificate(_)
            | Self::Key(_)
            | Self::Tls(_)
            | Self::Stopped => Kind::Internal,
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Request(cause) => Value::String(format!("certificate request refused: {cause}")),
            Self::Store(_) => Value::String("the database is not available".to_owned()),
            other => Value::String(other.to_string()),
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Halted(halted) => halted.header(),
            _ => None,
        }
    }
}
