//! The revisions of MCP that we speak, and what a request says about the one it is written in.
//!
//! Three kinds of caller post to `/v1/mcp`. One that names no revision is *cold*: the SDK, which asks without a
//! handshake and reads plain JSON. One with a session has begun it by `initialize` (2024-11-05 to 2025-11-25). And one
//! of 2026-07-28 carries its revision and capabilities in every request, mirrored in headers that must agree.
//! Source: MCP 2026-07-28, base protocol and Streamable HTTP; the transports pages of the revisions before.

use axum::http::{HeaderMap, HeaderValue, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::jsonrpc::{Call, RpcError, code};
use super::listen::Level;

/// `_meta` key of the revision.
pub const META_VERSION: &str = "io.modelcontextprotocol/protocolVersion";
/// `_meta` key of what the client can do.
pub const META_CAPABILITIES: &str = "io.modelcontextprotocol/clientCapabilities";
/// `_meta` key of who the client says it is.
pub const META_CLIENT: &str = "io.modelcontextprotocol/clientInfo";
/// `_meta` key of who the server says it is.
pub const META_SERVER: &str = "io.modelcontextprotocol/serverInfo";

/// `_meta` key of the subscription that a notification belongs to.
pub const META_SUBSCRIPTION: &str = "io.modelcontextprotocol/subscriptionId";
/// `_meta` key of the log messages that a request asks for.
pub const META_LOG_LEVEL: &str = "io.modelcontextprotocol/logLevel";

/// Names the revision.
pub const VERSION_HEADER: &str = "mcp-protocol-version";
/// Names the session.
pub const SESSION_HEADER: &str = "mcp-session-id";
/// Mirrors the method.
pub const METHOD_HEADER: &str = "mcp-method";
/// Mirrors the name of the tool or prompt, or the resource's URI.
pub const NAME_HEADER: &str = "mcp-name";
/// Begins the name of a header that mirrors an argument.
pub const PARAMETER_PREFIX: &str = "mcp-param-";

/// A published revision of MCP, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Revision {
    /// 2024-11-05: the first.
    V2024_11_05,
    /// 2025-03-26: Streamable HTTP, sessions, batches.
    V2025_03_26,
    /// 2025-06-18: the version header; no more batches.
    V2025_06_18,
    /// 2025-11-25: the last with a handshake.
    V2025_11_25,
    /// 2026-07-28: no handshake, no sessions.
    V2026_07_28,
}

impl Revision {
    /// Every revision, newest first, as we offer them.
    pub const ALL: [Self; 5] =
        [Self::V2026_07_28, Self::V2025_11_25, Self::V2025_06_18, Self::V2025_03_26, Self::V2024_11_05];
    /// The newest one that begins with a handshake.
    pub const NEWEST_WITH_SESSIONS: Self = Self::V2025_11_25;

    /// The revision as it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V2024_11_05 => "2024-11-05",
            Self::V2025_03_26 => "2025-03-26",
            Self::V2025_06_18 => "2025-06-18",
            Self::V2025_11_25 => "2025-11-25",
            Self::V2026_07_28 => "2026-07-28",
        }
    }

    /// Reads a revision. Absent for one that we do not speak.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|revision| revision.as_str() == text)
    }

    /// Whether every request stands for itself.
    #[must_use]
    pub fn is_stateless(self) -> bool {
        self >= Self::V2026_07_28
    }

    /// Whether one body may hold several messages.
    #[must_use]
    pub fn has_batches(self) -> bool {
        self == Self::V2025_03_26
    }
}

/// Who we are, in `initialize` and `server/discover`.
#[must_use]
pub fn server_info() -> Value {
    json!({ "name": "mastio", "version": env!("CARGO_PKG_VERSION") })
}

/// A request that does not fit its own headers, or names a revision that we do not speak. HTTP 400.
#[derive(Debug, Clone)]
pub struct NotThisRevision(pub RpcError);

/// The revision that the headers name. Absent where they name none.
///
/// Errors: one that we do not speak, with those that we do.
pub fn named_revision(headers: &HeaderMap) -> Result<Option<Revision>, NotThisRevision> {
    let Some(value) = headers.get(VERSION_HEADER) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    Revision::parse(text).map(Some).ok_or_else(|| unsupported(text))
}

fn unsupported(requested: &str) -> NotThisRevision {
    let supported: Vec<&str> = Revision::ALL.into_iter().map(Revision::as_str).collect();
    let requested: String = requested.chars().take(64).collect();
    let data = json!({ "supported": supported, "requested": requested });
    NotThisRevision(RpcError::new(code::UNSUPPORTED_VERSION, "Unsupported protocol version").with(data))
}

/// The members of `params` that the protocol itself reads.
#[derive(Debug, Default, Deserialize)]
struct Mirrored<'a> {
    name: Option<String>,
    uri: Option<String>,
    #[serde(borrow, rename = "_meta")]
    meta: Option<&'a RawValue>,
}

/// The members of `_meta` that the protocol itself reads.
#[derive(Debug, Default, Deserialize)]
pub struct Meta<'a> {
    /// The revision of this request.
    #[serde(rename = "io.modelcontextprotocol/protocolVersion")]
    pub version: Option<String>,
    /// What the client can do.
    #[serde(borrow, rename = "io.modelcontextprotocol/clientCapabilities")]
    pub capabilities: Option<&'a RawValue>,
    /// From which level on log messages are asked for.
    #[serde(rename = "io.modelcontextprotocol/logLevel")]
    pub log_level: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// W3C trace context.
    pub tracestate: Option<String>,
}

/// The `_meta` of `params`. Empty where there is none, or where it is no object.
#[must_use]
pub fn meta(params: Option<&RawValue>) -> Meta<'_> {
    #[derive(Deserialize)]
    struct Outer<'a> {
        #[serde(borrow, rename = "_meta")]
        meta: Option<&'a RawValue>,
    }
    params
        .and_then(|params| serde_json::from_str::<Outer<'_>>(params.get()).ok())
        .and_then(|outer| outer.meta)
        .and_then(|meta| serde_json::from_str(meta.get()).ok())
        .unwrap_or_default()
}

/// Whether a request speaks 2026-07-28: its headers say so, or its body does.
///
/// Errors: headers or body name a revision that we do not speak.
pub fn is_stateless(named: Option<Revision>, params: Option<&RawValue>) -> Result<bool, NotThisRevision> {
    if named.is_some_and(Revision::is_stateless) {
        return Ok(true);
    }
    match meta(params).version {
        None => Ok(false),
        Some(version) => match Revision::parse(&version) {
            Some(revision) => Ok(revision.is_stateless()),
            None => Err(unsupported(&version)),
        },
    }
}

/// Compares the headers of a 2026-07-28 request with its body.
///
/// Errors: `-32020` for headers that are missing or disagree, `-32602` for a `_meta` without its required members.
pub fn check_mirrored(headers: &HeaderMap, call: &Call) -> Result<(), NotThisRevision> {
    let mismatch = |what: String| {
        NotThisRevision(RpcError::new(code::HEADER_MISMATCH, format!("Header mismatch: {what}")))
    };
    let header = |name: &'static str| -> Result<&str, NotThisRevision> {
        let value = single(headers, name).map_err(mismatch)?;
        value.ok_or_else(|| mismatch(format!("the header {name} is missing")))
    };
    let params = call.params.as_deref();
    let mirrored: Mirrored<'_> =
        params.and_then(|params| serde_json::from_str(params.get()).ok()).unwrap_or_default();
    let meta: Meta<'_> =
        mirrored.meta.and_then(|meta| serde_json::from_str(meta.get()).ok()).unwrap_or_default();
    let version = header(VERSION_HEADER)?;
    let invalid =
        |what: &str| NotThisRevision(RpcError::new(code::INVALID_PARAMS, format!("Invalid params: {what}")));
    match &meta.version {
        None => return Err(invalid("_meta lacks io.modelcontextprotocol/protocolVersion")),
        Some(said) if said != version => {
            return Err(mismatch(format!("{VERSION_HEADER} does not match the body's protocol version")));
        }
        Some(_) => {}
    }
    if !meta.capabilities.is_some_and(|capabilities| capabilities.get().starts_with('{')) {
        return Err(invalid("_meta lacks io.modelcontextprotocol/clientCapabilities"));
    }
    if meta.log_level.as_deref().is_some_and(|level| Level::parse(level).is_none()) {
        return Err(invalid("io.modelcontextprotocol/logLevel is no log level"));
    }
    if header(METHOD_HEADER)? != call.method {
        return Err(mismatch(format!("{METHOD_HEADER} does not match the body's method")));
    }
    let named = match call.method.as_str() {
        "tools/call" | "prompts/get" => mirrored.name,
        "resources/read" => mirrored.uri,
        _ => return Ok(()),
    };
    let sent =
        decoded(header(NAME_HEADER)?).ok_or_else(|| mismatch(format!("{NAME_HEADER} is not readable")))?;
    if named.as_deref() != Some(sent.as_str()) {
        return Err(mismatch(format!("{NAME_HEADER} does not match the body")));
    }
    Ok(())
}

/// Compares the headers that mirror arguments with the arguments, by the `x-mcp-header` marks of the tool's schema.
///
/// Errors: `-32020` for a header that is missing, unreadable or says otherwise.
pub fn check_parameters(
    headers: &HeaderMap,
    schema: &Value,
    arguments: &Value,
) -> Result<(), NotThisRevision> {
    let mut marks = Vec::new();
    collect_marks(schema, &mut Vec::new(), &mut marks);
    for (name, path) in marks {
        let header = format!("{PARAMETER_PREFIX}{}", name.to_ascii_lowercase());
        let mismatch = |what: &str| {
            NotThisRevision(RpcError::new(code::HEADER_MISMATCH, format!("Header mismatch: {header} {what}")))
        };
        let value =
            path.iter().try_fold(arguments, |value, key| value.get(key)).filter(|value| !value.is_null());
        let sent = single(headers, &header).map_err(|_| mismatch("appears more than once"))?;
        match (value, sent) {
            (None, _) => {}
            (Some(_), None) => return Err(mismatch("is missing")),
            (Some(value), Some(sent)) => {
                let sent = decoded(sent).ok_or_else(|| mismatch("is not readable"))?;
                if !says(&sent, value) {
                    return Err(mismatch("does not match the body"));
                }
            }
        }
    }
    Ok(())
}

/// The arguments that a schema wants mirrored: the header's name and the way to the value.
fn collect_marks(schema: &Value, path: &mut Vec<String>, found: &mut Vec<(String, Vec<String>)>) {
    /// Properties within properties that are looked into.
    const DEPTH_MAX: usize = 8;
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    for (key, property) in properties {
        path.push(key.clone());
        if let Some(name) = property.get("x-mcp-header").and_then(Value::as_str) {
            found.push((name.to_owned(), path.clone()));
        }
        if path.len() < DEPTH_MAX {
            collect_marks(property, path, found);
        }
        path.pop();
    }
}

fn says(sent: &str, value: &Value) -> bool {
    match value {
        Value::String(text) => text == sent,
        Value::Bool(truth) => sent == if *truth { "true" } else { "false" },
        // Numerically: 42.0 and 42 are one number.
        Value::Number(number) => match (sent.parse::<f64>(), number.as_f64()) {
            (Ok(sent), Some(number)) => sent == number,
            _ => false,
        },
        _ => false,
    }
}

/// The one value of a header. Errors: there are several, or it is not ASCII.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, String> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => value.to_str().map(Some).map_err(|_| format!("{name} is not ASCII")),
        (Some(_), Some(_)) => Err(format!("{name} appears more than once")),
    }
}

/// A mirrored value, out of its base64 form where it is in one. Absent for bad base64 or UTF-8.
fn decoded(value: &str) -> Option<String> {
    match value.strip_prefix("=?base64?").and_then(|rest| rest.strip_suffix("?=")) {
        None => Some(value.to_owned()),
        Some(encoded) => String::from_utf8(STANDARD.decode(encoded).ok()?).ok(),
    }
}

/// A value as a mirrored header carries it.
#[must_use]
pub fn encoded(value: &str) -> Option<HeaderValue> {
    let plain = value.bytes().all(|byte| (0x20..=0x7e).contains(&byte))
        && value.trim() == value
        && !(value.starts_with("=?base64?") && value.ends_with("?="));
    if plain {
        return HeaderValue::from_str(value).ok();
    }
    HeaderValue::from_str(&format!("=?base64?{}?=", STANDARD.encode(value))).ok()
}

/// Whether the caller says that it reads event streams. `*/*` does not say so: the SDK sends it and reads none.
#[must_use]
pub fn reads_streams(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.to_ascii_lowercase().contains("text/event-stream"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn call(method: &str, params: &str) -> Call {
        Call { method: method.to_owned(), params: Some(RawValue::from_string(params.to_owned()).unwrap()) }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    const META: &str = r#""_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}"#;

    #[test]
    fn headers_and_body_must_agree() {
        let version = (VERSION_HEADER, "2026-07-28");
        let method = (METHOD_HEADER, "tools/call");
        let body = format!(r#"{{"name":"wetter","arguments":{{}},{META}}}"#);
        let umlaut = format!(r#"{{"name":"größe",{META}}}"#);
        for (what, given, body, expected) in [
            ("all agree", vec![version, method, (NAME_HEADER, "wetter")], body.as_str(), None),
            (
                "base64",
                vec![version, method, (NAME_HEADER, "=?base64?Z3LDtsOfZQ==?=")],
                umlaut.as_str(),
                None,
            ),
            ("no version", vec![method, (NAME_HEADER, "wetter")], body.as_str(), Some(-32020)),
            (
                "other version",
                vec![(VERSION_HEADER, "2025-11-25"), method, (NAME_HEADER, "wetter")],
                body.as_str(),
                Some(-32020),
            ),
            ("no method", vec![version, (NAME_HEADER, "wetter")], body.as_str(), Some(-32020)),
            (
                "other method",
                vec![version, (METHOD_HEADER, "tools/list"), (NAME_HEADER, "wetter")],
                body.as_str(),
                Some(-32020),
            ),
            ("no name", vec![version, method], body.as_str(), Some(-32020)),
            ("other name", vec![version, method, (NAME_HEADER, "Wetter")], body.as_str(), Some(-32020)),
            (
                "two names",
                vec![version, method, (NAME_HEADER, "wetter"), (NAME_HEADER, "other")],
                body.as_str(),
                Some(-32020),
            ),
            ("bad base64", vec![version, method, (NAME_HEADER, "=?base64?*?=")], body.as_str(), Some(-32020)),
            ("no meta", vec![version, method, (NAME_HEADER, "wetter")], r#"{"name":"wetter"}"#, Some(-32602)),
            (
                "no capabilities",
                vec![version, method, (NAME_HEADER, "wetter")],
                r#"{"name":"wetter","_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28"}}"#,
                Some(-32602),
            ),
        ] {
            let found =
                check_mirrored(&headers(&given), &call("tools/call", body)).err().map(|error| error.0.code);
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn a_mirrored_argument_is_compared_with_the_argument() {
        let schema = json!({ "properties": {
            "region": { "type": "string", "x-mcp-header": "Region" },
            "deep": { "type": "object", "properties": { "n": { "type": "integer", "x-mcp-header": "Count" } } } } });
        let arguments = json!({ "region": "us", "deep": { "n": 42 } });
        for (given, fits) in [
            (vec![("mcp-param-region", "us"), ("mcp-param-count", "42.0")], true),
            (vec![("mcp-param-region", "us"), ("mcp-param-count", "43")], false),
            (vec![("mcp-param-region", "us")], false),
            (vec![("mcp-param-region", "eu"), ("mcp-param-count", "42")], false),
        ] {
            assert_eq!(check_parameters(&headers(&given), &schema, &arguments).is_ok(), fits, "{given:?}");
        }
        assert!(check_parameters(&HeaderMap::new(), &schema, &json!({ "region": null })).is_ok());
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for value in ["plain", " padded ", "größe", "a\nb", "=?base64?literal?=", "file:///a b"] {
            let header = encoded(value).unwrap();
            assert_eq!(decoded(header.to_str().unwrap()).as_deref(), Some(value));
        }
    }

    #[test]
    fn a_revision_is_read_as_it_is_written_and_no_other() {
        for revision in Revision::ALL {
            assert_eq!(Revision::parse(revision.as_str()), Some(revision));
        }
        assert_eq!(Revision::parse("2026-07-29"), None);
        let error = named_revision(&headers(&[(VERSION_HEADER, "1900-01-01")])).unwrap_err().0;
        assert_eq!((error.code, error.data.unwrap()["requested"].as_str()), (-32022, Some("1900-01-01")));
    }
}
