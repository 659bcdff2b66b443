//! Why the gateway refuses, grouped by whose fault it is, and which JSON-RPC error or status that becomes.

use mastio_core::error::Kind;
use serde_json::{Value, json};

use super::definition::DefinitionError;
use super::jsonrpc::{RpcError, code};
use super::upstream::UpstreamError;
use crate::http::error::Problem;
use crate::store::StoreError;
use crate::store::group::AppendError;

/// A field of a request that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldProblem {
    /// The field's name in the body.
    pub field: &'static str,
    /// What it should be.
    pub message: String,
}

/// Why the gateway did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    // The caller's request is wrong.
    /// Fields of the body are not what they should be.
    #[error("{} fields of the body are not valid", .0.len())]
    Fields(Vec<FieldProblem>),
    /// The arguments of a tool call are too large.
    #[error("Invalid params: arguments have {found} bytes, at most {bytes_max} are allowed")]
    ArgumentsTooLarge {
        /// Bytes of the arguments, as compact JSON.
        found: usize,
        /// Bytes that are allowed.
        bytes_max: usize,
    },
    /// A header that mirrors an argument says otherwise.
    #[error("{}", .0.message)]
    HeaderMismatch(RpcError),
    /// A DPoP proof was used before.
    #[error("DPoP proof replay detected")]
    Replayed,
    /// The access token is revoked.
    #[error("invalid access token: it is revoked")]
    Revoked,

    // The caller may not.
    /// There is no tool of this name.
    #[error("Unknown tool: {0}")]
    UnknownTool(String),
    /// The caller has no active binding to the tool.
    #[error("Forbidden: no active binding for tool '{0}'")]
    NoBinding(String),
    /// The caller lacks the capability that the tool requires.
    #[error("Forbidden: missing capability '{0}'")]
    MissingCapability(String),

    // The world is otherwise.
    /// What the caller was judged by has changed, twice, while the request was served.
    #[error("the caller's standing changed while the request was served: sign in again")]
    StandingChanged,
    /// A resource of this name exists.
    #[error("MCP resource '{0}' already exists")]
    NameTaken(String),
    /// There are as many resources as there may be.
    #[error("there are {0} MCP resources already: delete one first")]
    TooManyResources(i64),
    /// The agent has an active binding to the resource.
    #[error("an active binding for this agent and resource already exists")]
    AlreadyBound,
    /// There is no such resource.
    #[error("MCP resource not found")]
    UnknownResource,
    /// There is no such MCP server.
    #[error("MCP server '{0}' not found")]
    UnknownUpstream(String),
    /// The tool may not be offered now.
    #[error("Tool '{name}' is not available: {standing}")]
    NotOffered {
        /// Its name.
        name: String,
        /// Why: `proposed`, `changed`, `blocked` or `gone`.
        standing: &'static str,
    },
    /// The arguments do not fit the schema that was approved.
    #[error("Invalid params: arguments do not match the tool's schema: {0}")]
    Arguments(String),
    /// The agent called the tool too often.
    #[error("Tool '{0}' was called too often: try again in a moment")]
    TooOften(String),
    /// The server's definition is not the one that was named.
    #[error("the definition of tool '{name}' is now {found}: look at it before you approve it")]
    DefinitionMoved {
        /// The tool.
        name: String,
        /// The digest of what the server says.
        found: String,
    },
    /// The tool's name imitates another's.
    #[error(
        "the name '{name}' imitates the tool '{other}': approve it with accept_imitation if that is meant"
    )]
    Imitates {
        /// The tool.
        name: String,
        /// The older one.
        other: String,
    },
    /// A rule forbids the call, or none of those that speak of it permits it.
    #[error("Forbidden: denied by policy {}", .0.join(", "))]
    PolicyDenied(Vec<String>),
    /// Rules cannot be read or evaluated for the call, so nothing is allowed past them.
    #[error("Forbidden: policy {} cannot be evaluated for this call", .0.join(", "))]
    PolicyFailed(Vec<String>),
    /// There is no such rule.
    #[error("policy '{0}' not found")]
    UnknownPolicy(String),
    /// Nothing is kept of such a call.
    #[error("nothing is kept of call '{0}'")]
    UnknownEvidence(String),
    /// Somebody has saved the rule meanwhile.
    #[error("policy '{0}' is another one by now: look at it, and decide again")]
    PolicyMoved(String),
    /// There are as many rules as there may be.
    #[error("there are {0} policies already: delete one first")]
    TooManyPolicies(usize),
    /// What an import would change is not what was named.
    #[error("the plan is now {0}: look at it before you import")]
    PlanMoved(String),
    /// A definition cannot be used.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// The agent has as many streams open as it may, or everybody together has.
    #[error("too many streams are open: close one first")]
    TooManyStreams,
    /// The session has a stream already.
    #[error("the session has an open stream already")]
    StreamOpen,
    /// No stream of the session that can be resumed has this event.
    #[error("no stream of this session has this event any more: ask again for what you asked for")]
    UnknownEvent,
    /// There is no such binding, or it is revoked already.
    #[error("binding not found")]
    UnknownBinding,

    // The upstream server failed.
    /// An upstream call did not give a result.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),

    // We cannot, right now or by our own fault.
    /// More requests wait to be recorded than there is room for.
    #[error("the server is busy: try again")]
    Busy,
    /// Redis is away, and with it the protection against replays.
    #[error("replay protection is not available: try again")]
    Unguarded,
    /// The audit log cannot be written, so the request is refused.
    #[error("the audit log cannot be written: try again")]
    AuditUnavailable,
    /// The database.
    #[error("the database is not available")]
    Store(#[from] StoreError),
    /// An answer could not be written as JSON.
    #[error("an answer cannot be written as JSON")]
    Json(#[from] serde_json::Error),
    /// What was kept cannot be sealed or opened.
    #[error("what is kept of a call cannot be sealed, or does not open as what was kept")]
    Sealing,
    /// The HTTP client for upstream servers could not be built.
    #[error("the HTTP client for upstream servers cannot be built")]
    Client(#[from] reqwest::Error),
    /// The TLS library refused its configuration.
    #[error("the TLS configuration for upstream servers cannot be built")]
    Tls(#[from] rustls::Error),
    /// A task that served a request was stopped.
    #[error("a task that served a request was stopped")]
    Stopped,
}

impl GatewayError {
    /// The error as a JSON-RPC caller sees it, where it is an answer to a call rather than a refusal to serve.
    #[must_use]
    pub fn as_rpc(&self) -> Option<RpcError> {
        let code = match self {
            Self::ArgumentsTooLarge { .. } | Self::Arguments(_) => code::INVALID_PARAMS,
            Self::HeaderMismatch(_) => code::HEADER_MISMATCH,
            Self::UnknownTool(_) | Self::NotOffered { .. } => code::UNKNOWN_TOOL,
            Self::TooOften(_) | Self::TooManyStreams => code::UNREACHABLE,
            Self::NoBinding(_) => code::NO_BINDING,
            Self::MissingCapability(_) | Self::PolicyDenied(_) | Self::PolicyFailed(_) => code::TOOL_ERROR,
            Self::Upstream(error) => error.code(),
            _ => return None,
        };
        Some(RpcError::new(code, self.to_string()))
    }

    /// One word for the audit log.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Replayed => "replayed",
            Self::Revoked => "token_revoked",
            Self::StandingChanged => "state_moved",
            Self::ArgumentsTooLarge { .. } => "arguments_too_large",
            Self::Arguments(_) => "arguments_invalid",
            Self::HeaderMismatch(_) => "header_mismatch",
            Self::NotOffered { standing: "changed", .. } => "tool_changed",
            Self::NotOffered { standing: "blocked", .. } => "tool_blocked",
            Self::NotOffered { standing: "gone", .. } => "tool_gone",
            Self::NotOffered { .. } => "tool_not_approved",
            Self::TooOften(_) => "too_often",
            Self::PolicyDenied(_) => "policy_denied",
            Self::PolicyFailed(_) => "policy_failed",
            Self::TooManyStreams => "too_many_streams",
            Self::UnknownEvent => "event_unknown",
            Self::UnknownTool(_) => "unknown_tool",
            Self::NoBinding(_) => "no_binding",
            Self::MissingCapability(_) => "missing_capability",
            Self::Upstream(error) => error.reason(),
            _ => "internal",
        }
    }
}

impl From<AppendError> for GatewayError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Replayed => Self::Replayed,
            AppendError::Revoked => Self::Revoked,
            AppendError::Stale => Self::StandingChanged,
            AppendError::Busy => Self::Busy,
            AppendError::Unguarded => Self::Unguarded,
            AppendError::Unavailable => Self::AuditUnavailable,
        }
    }
}

impl Problem for GatewayError {
    fn kind(&self) -> Kind {
        match self {
            Self::Fields(_)
            | Self::ArgumentsTooLarge { .. }
            | Self::Arguments(_)
            | Self::HeaderMismatch(_)
            | Self::Definition(_)
            | Self::Imitates { .. } => Kind::Unprocessable,
            Self::UnknownEvent => Kind::Invalid,
            Self::TooOften(_) | Self::TooManyStreams => Kind::Limited,
            Self::Replayed | Self::Revoked | Self::StandingChanged => Kind::Unauthenticated,
            Self::NoBinding(_)
            | Self::MissingCapability(_)
            | Self::PolicyDenied(_)
            | Self::PolicyFailed(_) => Kind::Denied,
            Self::NameTaken(_)
            | Self::TooManyResources(_)
            | Self::AlreadyBound
            | Self::PolicyMoved(_)
            | Self::TooManyPolicies(_)
            | Self::StreamOpen
            | Self::PlanMoved(_)
            | Self::DefinitionMoved { .. } => Kind::Conflict,
            Self::UnknownTool(_)
            | Self::NotOffered { .. }
            | Self::UnknownResource
            | Self::UnknownUpstream(_)
            | Self::UnknownPolicy(_)
            | Self::UnknownEvidence(_)
            | Self::UnknownBinding => Kind::NotFound,
            Self::Upstream(_) | Self::Busy | Self::Unguarded | Self::AuditUnavailable => Kind::Unavailable,
            Self::Store(error) => error.kind(),
            Self::Sealing | Self::Json(_) | Self::Client(_) | Self::Tls(_) | Self::Stopped => Kind::Internal,
        }
    }

    fn detail(&self) -> Value {
        match self {
            Self::Fields(problems) => problems
                .iter()
                .map(|problem| {
                    json!({
                        "type": "value_error",
                        "loc": ["body", problem.field],
                        "msg": problem.message,
                        "input": null,
                    })
                })
                .collect(),
            other => Value::String(other.to_string()),
        }
    }
}
