//! JSON-RPC 2.0 as MCP uses it: what a caller's body asks for, and how an answer is written.
//!
//! A body is read once into a [`Message`]; everything behind it works with typed values. What passes through us
//! (ids, arguments, results) stays the text it was, so nothing is reordered, rounded or re-escaped on the way.
//! Source: JSON-RPC 2.0 §4 and §5; MCP 2024-11-05, base protocol.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// Bytes of a request id at most. Clients count or use UUIDs.
const ID_BYTES_MAX: usize = 256;
/// Bytes of a tool's name in a call at most; no registered name is longer than 64.
const TOOL_NAME_BYTES_MAX: usize = 128;
/// Bytes of a method name that an error repeats at most.
const METHOD_BYTES_SHOWN_MAX: usize = 64;

/// Error codes of the wire contract §5.
pub mod code {
    /// The body is not JSON.
    pub const PARSE: i64 = -32700;
    /// The body is not a request.
    pub const INVALID_REQUEST: i64 = -32600;
    /// No such method.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// The parameters have the wrong shape or size.
    pub const INVALID_PARAMS: i64 = -32602;
    /// Our fault.
    pub const INTERNAL: i64 = -32603;
    /// The caller has no active binding to the tool.
    pub const NO_BINDING: i64 = -32000;
    /// The upstream server cannot be reached, or has too much to do.
    pub const UNREACHABLE: i64 = -32001;
    /// The upstream server refused our credential.
    pub const UPSTREAM_AUTHENTICATION: i64 = -32002;
    /// The upstream server answered with an error, or the caller lacks a capability.
    pub const TOOL_ERROR: i64 = -32003;
    /// No such tool.
    pub const UNKNOWN_TOOL: i64 = -32004;
}

/// What a request body asks for.
#[derive(Debug)]
pub enum Message {
    /// It is not a request at all: HTTP 400, with a null id where none could be read.
    Malformed(RpcError),
    /// It wants no answer.
    Notification,
    /// It wants an answer under its id.
    Request {
        /// The id to answer under.
        id: Id,
        /// What is asked.
        method: Method,
    },
}

/// What is asked of us.
#[derive(Debug)]
pub enum Method {
    /// `initialize`
    Initialize,
    /// `ping`
    Ping,
    /// `tools/list`
    ListTools,
    /// `tools/call`
    CallTool(ToolCall),
    /// A method that we do not know, or parameters that do not fit: HTTP 200 with this error.
    Unanswerable(RpcError),
}

/// The parameters of `tools/call`. Their size and the caller's rights are judged later.
#[derive(Debug)]
pub struct ToolCall {
    /// The tool's name, as the caller wrote it.
    pub name: String,
    /// A JSON object, as the caller wrote it.
    pub arguments: Box<RawValue>,
}

/// The id of a request: a JSON string or number, as the caller wrote it.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Id(Box<RawValue>);

impl Id {
    /// The id as text: a string's content, a number's digits. Sent upstream as a JSON string.
    #[must_use]
    pub fn text(&self) -> String {
        serde_json::from_str(self.0.get()).unwrap_or_else(|_| self.0.get().to_owned())
    }

    fn read(raw: &RawValue) -> Option<Self> {
        let text = raw.get();
        // MCP forbids the null id that JSON-RPC discourages.
        let fits = text.starts_with(|first: char| first == '"' || first == '-' || first.is_ascii_digit());
        (fits && text.len() <= ID_BYTES_MAX).then(|| Self(raw.to_owned()))
    }
}

/// A JSON-RPC error object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RpcError {
    /// One of [`code`].
    pub code: i64,
    /// What went wrong, for a person.
    pub message: String,
}

impl RpcError {
    /// An error of this code.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

#[derive(Deserialize)]
struct Envelope<'a> {
    jsonrpc: Option<String>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    method: Option<String>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
}

/// Reads a request body.
#[must_use]
pub fn read(body: &[u8]) -> Message {
    let envelope: Envelope<'_> = match serde_json::from_slice(body) {
        Ok(envelope) => envelope,
        Err(error) if error.is_data() => return malformed("the body is not one JSON-RPC request object"),
        Err(_) => return Message::Malformed(RpcError::new(code::PARSE, "Parse error: the body is not JSON")),
    };
    if envelope.jsonrpc.as_deref() != Some("2.0") {
        return malformed("jsonrpc is not \"2.0\"");
    }
    let Some(name) = envelope.method else { return malformed("method is missing") };
    let Some(id) = envelope.id else {
        return if name.starts_with("notifications/") {
            Message::Notification
        } else {
            // A call without an id could not be answered, and a tool must not run unseen.
            malformed("id is missing")
        };
    };
    match Id::read(id) {
        Some(id) => Message::Request { id, method: method(&name, envelope.params) },
        None => malformed("id is not a string or a number of at most 256 bytes"),
    }
}

fn malformed(what: &str) -> Message {
    Message::Malformed(RpcError::new(code::INVALID_REQUEST, format!("Invalid Request: {what}")))
}

fn method(name: &str, params: Option<&RawValue>) -> Method {
    match name {
        "initialize" => Method::Initialize,
        "ping" => Method::Ping,
        "tools/list" => Method::ListTools,
        "tools/call" => match tool_call(params) {
            Ok(call) => Method::CallTool(call),
            Err(what) => {
                Method::Unanswerable(RpcError::new(code::INVALID_PARAMS, format!("Invalid params: {what}")))
            }
        },
        unknown => {
            let shown = shorten(unknown, METHOD_BYTES_SHOWN_MAX);
            Method::Unanswerable(RpcError::new(code::METHOD_NOT_FOUND, format!("Method not found: {shown}")))
        }
    }
}

#[derive(Deserialize)]
struct CallParams<'a> {
    name: String,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
}

fn tool_call(params: Option<&RawValue>) -> Result<ToolCall, &'static str> {
    let params = params.ok_or("params is missing")?;
    let params: CallParams<'_> =
        serde_json::from_str(params.get()).map_err(|_| "params is not {name, arguments}")?;
    if params.name.is_empty() || params.name.len() > TOOL_NAME_BYTES_MAX {
        return Err("name is empty or longer than 128 bytes");
    }
    let arguments = params.arguments.map(ToOwned::to_owned).unwrap_or_else(empty_object);
    if !arguments.get().starts_with('{') {
        return Err("arguments is not an object");
    }
    Ok(ToolCall { name: params.name, arguments })
}

/// `{}` as raw JSON.
#[must_use]
pub fn empty_object() -> Box<RawValue> {
    serde_json::value::to_raw_value(&Value::Object(serde_json::Map::new()))
        .unwrap_or_else(|_| RawValue::NULL.to_owned())
}

/// Bytes that `json` has without insignificant whitespace. `json` must be valid.
#[must_use]
pub fn compact_bytes(json: &str) -> usize {
    let mut bytes = 0;
    let mut in_string = false;
    let mut escaped = false;
    for byte in json.bytes() {
        if in_string {
            bytes += 1;
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else if !byte.is_ascii_whitespace() {
            bytes += 1;
            in_string = byte == b'"';
        }
    }
    bytes
}

/// The first `bytes_max` bytes of `text`, whole characters only.
#[must_use]
pub fn shorten(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[derive(Serialize)]
struct Answer<'a> {
    jsonrpc: &'static str,
    id: Option<&'a Id>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a RpcError>,
}

/// Writes an answer: `outcome` under `id`, or under null where none could be read.
///
/// Errors: [`serde_json::Error`], which raw values that were valid cannot cause.
pub fn write(id: Option<&Id>, outcome: Result<&RawValue, &RpcError>) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Answer { jsonrpc: "2.0", id, result: outcome.ok(), error: outcome.err() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::panic)]

    use super::*;

    fn code_of(body: &str) -> Option<i64> {
        match read(body.as_bytes()) {
            Message::Malformed(error) => Some(error.code),
            Message::Request { method: Method::Unanswerable(error), .. } => Some(error.code),
            Message::Notification | Message::Request { .. } => None,
        }
    }

    #[test]
    fn every_malformed_body_has_its_code() {
        for (body, expected) in [
            ("{", Some(code::PARSE)),
            ("", Some(code::PARSE)),
            ("[]", Some(code::INVALID_REQUEST)),
            (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, Some(code::INVALID_REQUEST)),
            ("7", Some(code::INVALID_REQUEST)),
            (r#"{"id":1,"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"1.0","id":1,"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1,"method":7}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":{},"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":null,"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":true,"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","method":"tools/call"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":1,"method":"resources/list"}"#, Some(code::METHOD_NOT_FOUND)),
            (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call"}"#, Some(code::INVALID_PARAMS)),
            (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":[]}"#, Some(code::INVALID_PARAMS)),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":""}}"#,
                Some(code::INVALID_PARAMS),
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"t","arguments":[1]}}"#,
                Some(code::INVALID_PARAMS),
            ),
            (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"t"}}"#, None),
            (r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#, None),
            (r#"{"jsonrpc":"2.0","id":"a","method":"ping","extra":1}"#, None),
        ] {
            assert_eq!(code_of(body), expected, "{body}");
        }
    }

    #[test]
    fn a_long_id_is_refused_at_its_bound() {
        let body = |length: usize| {
            format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"ping"}}"#, "a".repeat(length - 2))
        };
        assert_eq!(code_of(&body(ID_BYTES_MAX)), None);
        assert_eq!(code_of(&body(ID_BYTES_MAX + 1)), Some(code::INVALID_REQUEST));
    }

    #[test]
    fn the_id_keeps_its_spelling_and_goes_upstream_as_text() {
        for (raw, text) in [("1", "1"), ("1.50", "1.50"), (r#""a\u0062""#, "ab"), ("-3", "-3")] {
            let body = format!(r#"{{"jsonrpc":"2.0","id":{raw},"method":"ping"}}"#);
            let Message::Request { id, .. } = read(body.as_bytes()) else { panic!("{raw} is a request") };
            assert_eq!(id.text(), text);
            let written = write(Some(&id), Ok(RawValue::NULL)).expect("raw values are valid");
            assert!(String::from_utf8_lossy(&written).contains(&format!(r#""id":{raw},"#)));
        }
    }

    #[test]
    fn only_whitespace_between_tokens_is_free() {
        for (json, expected) in [("{ }", 2), (r#"{ "a" : " b \" c " }"#, 16), ("[1,\n 2]", 5)] {
            assert_eq!(compact_bytes(json), expected, "{json}");
        }
    }
}
