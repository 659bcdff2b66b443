//! JSON-RPC 2.0 as MCP uses it: what a caller's body asks for, and how an answer is written.
//!
//! A body is read once into [`Message`]s; everything behind them works with typed values. What passes through us
//! (ids, parameters, results, errors) stays the text it was, so nothing is reordered, rounded or re-escaped on the way.
//! Source: JSON-RPC 2.0 §4 to §6; MCP, base protocol.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// Bytes of a request id at most. Clients count or use UUIDs.
const ID_BYTES_MAX: usize = 256;
/// Bytes of a tool's name in a call at most; no registered name is longer than 64.
const TOOL_NAME_BYTES_MAX: usize = 128;
/// Bytes of a method name that an error repeats at most.
pub const METHOD_BYTES_SHOWN_MAX: usize = 64;
/// Objects and arrays within each other, in anything that we read from outside.
pub const DEPTH_MAX: usize = 64;
/// Messages of one body at most, where a revision has batches.
pub const BATCH_MESSAGES_MAX: usize = 32;

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
    /// The caller's client lacks a capability that the request needs (MCP 2026-07-28).
    pub const MISSING_CAPABILITY: i64 = -32021;
    /// Headers and body disagree (MCP 2026-07-28).
    pub const HEADER_MISMATCH: i64 = -32020;
    /// A revision that we do not speak (MCP 2026-07-28).
    pub const UNSUPPORTED_VERSION: i64 = -32022;
}

/// What a request body holds.
#[derive(Debug)]
pub enum Body {
    /// One message.
    One(Message),
    /// Several, where the revision has batches.
    Batch(Vec<Message>),
}

/// One message of a caller's.
#[derive(Debug)]
pub enum Message {
    /// It is no message at all: HTTP 400, with a null id where none could be read.
    Malformed(RpcError),
    /// It wants no answer.
    Notification(Call),
    /// It answers a request that an upstream server made of the caller.
    Response {
        /// The id of that request, as we told it.
        id: String,
        /// The whole message.
        raw: Box<RawValue>,
    },
    /// It wants an answer under its id.
    Request {
        /// The id to answer under.
        id: Id,
        /// What is asked.
        call: Call,
    },
}

/// A method and its parameters.
#[derive(Debug, Clone)]
pub struct Call {
    /// The method's name.
    pub method: String,
    /// The parameters, as the caller wrote them.
    pub params: Option<Box<RawValue>>,
}

/// The parameters of `tools/call`. Their size and the caller's rights are judged later.
#[derive(Debug)]
pub struct ToolCall {
    /// The tool's name, as the caller wrote it.
    pub name: String,
    /// A JSON object, as the caller wrote it.
    pub arguments: Box<RawValue>,
    /// Everything, as the caller wrote it.
    pub params: Box<RawValue>,
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

    /// The id as the caller wrote it.
    #[must_use]
    pub fn raw(&self) -> &str {
        self.0.get()
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
    /// What a program needs to know besides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<Value>>,
}

impl RpcError {
    /// An error of this code.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), data: None }
    }

    /// The same with `data`.
    #[must_use]
    pub fn with(self, data: Value) -> Self {
        Self { data: Some(Box::new(data)), ..self }
    }

    /// A method that we do not know.
    #[must_use]
    pub fn unknown_method(method: &str) -> Self {
        Self::new(
            code::METHOD_NOT_FOUND,
            format!("Method not found: {}", shorten(method, METHOD_BYTES_SHOWN_MAX)),
        )
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
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

/// Reads a request body.
#[must_use]
pub fn read(body: &[u8], batches: bool) -> Body {
    if is_deeper_than(body, DEPTH_MAX) {
        return Body::One(malformed("objects and arrays lie deeper in each other than 64"));
    }
    if !batches || body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'[') {
        return Body::One(read_one(body));
    }
    match serde_json::from_slice::<Vec<&RawValue>>(body) {
        Err(_) => Body::One(not_json()),
        Ok(items) if items.is_empty() => Body::One(malformed("the batch is empty")),
        Ok(items) if items.len() > BATCH_MESSAGES_MAX => {
            Body::One(malformed("the batch has more than 32 messages"))
        }
        Ok(items) => Body::Batch(items.into_iter().map(|item| read_one(item.get().as_bytes())).collect()),
    }
}

/// The id of a body that is not served, where one can be read.
#[must_use]
pub fn peek_id(body: &[u8]) -> Option<Id> {
    #[derive(Deserialize)]
    struct Peeked<'a> {
        #[serde(borrow)]
        id: Option<&'a RawValue>,
    }
    if is_deeper_than(body, DEPTH_MAX) {
        return None;
    }
    serde_json::from_slice::<Peeked<'_>>(body).ok()?.id.and_then(Id::read)
}

fn not_json() -> Message {
    Message::Malformed(RpcError::new(code::PARSE, "Parse error: the body is not JSON"))
}

fn read_one(body: &[u8]) -> Message {
    let envelope: Envelope<'_> = match serde_json::from_slice(body) {
        Ok(envelope) => envelope,
        Err(error) if error.is_data() => return malformed("the body is not one JSON-RPC request object"),
        Err(_) => return not_json(),
    };
    if envelope.jsonrpc.as_deref() != Some("2.0") {
        return malformed("jsonrpc is not \"2.0\"");
    }
    let Some(method) = envelope.method else { return response(&envelope, body) };
    let call = Call { method, params: envelope.params.map(ToOwned::to_owned) };
    let Some(id) = envelope.id else {
        return if call.method.starts_with("notifications/") {
            Message::Notification(call)
        } else {
            // A call without an id could not be answered, and a tool must not run unseen.
            malformed("id is missing")
        };
    };
    match Id::read(id) {
        Some(id) => Message::Request { id, call },
        None => malformed("id is not a string or a number of at most 256 bytes"),
    }
}

/// An answer to a request that we have told the caller: its id is one of ours, a string.
fn response(envelope: &Envelope<'_>, body: &[u8]) -> Message {
    let id = envelope.id.and_then(|id| serde_json::from_str::<String>(id.get()).ok());
    match (id, envelope.result.is_some() != envelope.error.is_some(), serde_json::from_slice(body)) {
        (Some(id), true, Ok(raw)) => Message::Response { id, raw },
        _ => malformed("method is missing"),
    }
}

fn malformed(what: &str) -> Message {
    Message::Malformed(RpcError::new(code::INVALID_REQUEST, format!("Invalid Request: {what}")))
}

/// Whether objects and arrays lie deeper in each other than `depth_max`. `json` need not be valid.
#[must_use]
pub fn is_deeper_than(json: &[u8], depth_max: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > depth_max {
                    return true;
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[derive(Deserialize)]
struct CallParams<'a> {
    name: String,
    #[serde(borrow)]
    arguments: Option<&'a RawValue>,
}

/// Reads the parameters of `tools/call`.
///
/// Errors: `-32602` with what is wrong.
pub fn tool_call(params: Option<&RawValue>) -> Result<ToolCall, RpcError> {
    read_tool_call(params)
        .map_err(|what| RpcError::new(code::INVALID_PARAMS, format!("Invalid params: {what}")))
}

fn read_tool_call(whole: Option<&RawValue>) -> Result<ToolCall, &'static str> {
    let whole = whole.ok_or("params is missing")?;
    let params: CallParams<'_> =
        serde_json::from_str(whole.get()).map_err(|_| "params is not {name, arguments}")?;
    if params.name.is_empty() || params.name.len() > TOOL_NAME_BYTES_MAX {
        return Err("name is empty or longer than 128 bytes");
    }
    let arguments = params.arguments.map(ToOwned::to_owned).unwrap_or_else(empty_object);
    if !arguments.get().starts_with('{') {
        return Err("arguments is not an object");
    }
    Ok(ToolCall { name: params.name, arguments, params: whole.to_owned() })
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

/// The members of an object in their order, each value as it was written. Empty for what is no object.
#[must_use]
pub fn members(object: &RawValue) -> Vec<(String, &RawValue)> {
    struct Members<'a>(Vec<(String, &'a RawValue)>);
    impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Vec<(String, &'de RawValue)>;
                fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    formatter.write_str("an object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(
                    self,
                    mut map: A,
                ) -> Result<Self::Value, A::Error> {
                    let mut members = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        members.push(member);
                    }
                    Ok(members)
                }
            }
            deserializer.deserialize_map(Visitor).map(Members)
        }
    }
    serde_json::from_str::<Members<'_>>(object.get()).map_or_else(|_| Vec::new(), |members| members.0)
}

/// An object of these members, in this order.
///
/// Errors: [`serde_json::Error`], which raw values that were valid cannot cause.
pub fn object(members: &[(String, &RawValue)]) -> Result<Box<RawValue>, serde_json::Error> {
    use serde::ser::SerializeMap as _;
    struct Object<'a>(&'a [(String, &'a RawValue)]);
    impl Serialize for Object<'_> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(Some(self.0.len()))?;
            for (name, value) in self.0 {
                map.serialize_entry(name, value)?;
            }
            map.end()
        }
    }
    serde_json::value::to_raw_value(&Object(members))
}

/// `object` with `name` set to `value`: where it stood, or at the end.
///
/// Errors: as [`object`].
pub fn with_member(
    object_: &RawValue,
    name: &str,
    value: &RawValue,
) -> Result<Box<RawValue>, serde_json::Error> {
    let mut members = members(object_);
    match members.iter_mut().find(|(known, _)| known == name) {
        Some((_, present)) => *present = value,
        None => members.push((name.to_owned(), value)),
    }
    object(&members)
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
    error: Option<&'a RawValue>,
}

/// Writes an answer: `outcome` under `id`, or under null where none could be read.
///
/// Errors: [`serde_json::Error`], which raw values that were valid cannot cause.
pub fn write(id: Option<&Id>, outcome: Result<&RawValue, &RawValue>) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Answer { jsonrpc: "2.0", id, result: outcome.ok(), error: outcome.err() })
}

/// Writes an error of our own.
///
/// Errors: as [`write`].
pub fn write_error(id: Option<&Id>, error: &RpcError) -> Result<Vec<u8>, serde_json::Error> {
    write(id, Err(&*serde_json::value::to_raw_value(error)?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::panic)]

    use super::*;

    fn one(body: &str) -> Message {
        match read(body.as_bytes(), false) {
            Body::One(message) => message,
            Body::Batch(_) => panic!("{body} is one message"),
        }
    }

    fn code_of(body: &str) -> Option<i64> {
        match one(body) {
            Message::Malformed(error) => Some(error.code),
            Message::Request { call, .. } if call.method == "tools/call" => {
                tool_call(call.params.as_deref()).err().map(|error| error.code)
            }
            _ => None,
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
            (r#"{"jsonrpc":"2.0","id":7,"result":{}}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":"x","result":{},"error":{}}"#, Some(code::INVALID_REQUEST)),
            (r#"{"jsonrpc":"2.0","id":"x","result":{}}"#, None),
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
            let Message::Request { id, .. } = one(&body) else { panic!("{raw} is a request") };
            assert_eq!(id.text(), text);
            let written = write(Some(&id), Ok(RawValue::NULL)).expect("raw values are valid");
            assert!(String::from_utf8_lossy(&written).contains(&format!(r#""id":{raw},"#)));
        }
    }

    #[test]
    fn depth_is_refused_at_its_bound_and_brackets_in_strings_are_none() {
        let nested = |depth: usize| {
            let (open, close) = ("[".repeat(depth - 1), "]".repeat(depth - 1));
            format!(r#"{{"jsonrpc":"2.0","id":"[{{\\\"","method":"ping","params":{open}{close}}}"#)
        };
        assert_eq!(code_of(&nested(DEPTH_MAX)), None);
        assert_eq!(code_of(&nested(DEPTH_MAX + 1)), Some(code::INVALID_REQUEST));
        assert_eq!(code_of(&"[".repeat(2 * 1024 * 1024)), Some(code::INVALID_REQUEST));
    }

    #[test]
    fn a_batch_is_read_where_there_are_batches_up_to_its_bound() {
        let ping = r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#;
        let batch = |count: usize| format!(" [{}]", vec![ping; count].join(","));
        let size = |body: &str| match read(body.as_bytes(), true) {
            Body::Batch(messages) => Some(messages.len()),
            Body::One(_) => None,
        };
        assert_eq!(size(&batch(BATCH_MESSAGES_MAX)), Some(BATCH_MESSAGES_MAX));
        for one in [batch(BATCH_MESSAGES_MAX + 1), "[]".to_owned(), "[{".to_owned(), ping.to_owned()] {
            assert_eq!(size(&one), None);
        }
        assert!(matches!(read(batch(1).as_bytes(), false), Body::One(Message::Malformed(_))));
    }

    #[test]
    fn a_member_is_set_and_everything_else_stays_as_it_was_written() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).expect("JSON");
        let set = |object: &str| with_member(&raw(object), "b", &raw("2")).expect("JSON").get().to_owned();
        assert_eq!(set(r#"{"a" : 1.50e3,"b":{ },"c":"\u00e9"}"#), r#"{"a":1.50e3,"b":2,"c":"\u00e9"}"#);
        assert_eq!(set(r#"{"a":[1, 2]}"#), r#"{"a":[1, 2],"b":2}"#);
        assert_eq!(set("{}"), r#"{"b":2}"#);
    }

    #[test]
    fn only_whitespace_between_tokens_is_free() {
        for (json, expected) in [("{ }", 2), (r#"{ "a" : " b \" c " }"#, 16), ("[1,\n 2]", 5)] {
            assert_eq!(compact_bytes(json), expected, "{json}");
        }
    }
}
