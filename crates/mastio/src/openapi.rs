//! The API as OpenAPI 3.1, for tools: `GET /openapi.json`, and the same text in `docs/openapi.json`.
//!
//! [`OPERATIONS`] has an entry for each route: who may call it, what goes in and what comes out, by example. The schemas
//! are read off the examples, so that an example cannot contradict its schema. `tests/openapi.rs` finds every mounted
//! route in the source and fails where one is missing here, or where the checked-in document is not this one.
//!
//! Handlers answer with JSON values and not with types of their own, which is why nothing is derived from types.

mod operations;

use axum::Router;
use axum::http::HeaderMap;
use axum::routing::get;
use serde_json::{Map, Value, json};

use crate::http::cache::cached;
pub use operations::{OPERATIONS, PAGES};

/// Who may call an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Anybody.
    Anyone,
    /// An operator, by `X-Admin-Secret`.
    Admin,
    /// An agent, by its client certificate.
    Certificate,
    /// An agent, by an access token and what it is bound to.
    Token,
    /// A client that authenticates in the body.
    Client,
    /// A resource server, by HTTP Basic.
    ResourceServer,
}

/// What an operation answers when all went well.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    /// JSON, by example.
    Json(u16, &'static str),
    /// Another media type.
    Other(u16, &'static str),
    /// Nothing but the status.
    Empty(u16),
}

/// What goes in.
#[derive(Debug, Clone, Copy)]
pub enum Input {
    /// No body.
    Nothing,
    /// JSON, by example.
    Json(&'static str),
    /// A form, by an example in JSON.
    Form(&'static str),
    /// Either, JSON first.
    Either(&'static str, &'static str),
}

/// One method of one path.
///
/// Members of an example whose name ends in `?` may be absent, in `~` may be null.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    /// `GET`, `POST` or `DELETE`.
    pub method: &'static str,
    /// With `{name}` for what varies.
    pub path: &'static str,
    /// Whom it serves.
    pub tag: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Who may call.
    pub who: Who,
    /// Query parameters: name, type, what for.
    pub query: &'static [(&'static str, &'static str, &'static str)],
    /// Request headers that matter: name, whether required, what for.
    pub headers: &'static [(&'static str, bool, &'static str)],
    /// The request's body.
    pub input: Input,
    /// The answer.
    pub answer: Answer,
    /// Statuses of refusals.
    pub errors: &'static [u16],
}

/// Serves the document.
pub fn routes() -> Router {
    let text: std::sync::Arc<str> = document_text().into();
    Router::new().route(
        "/openapi.json",
        get(|headers: HeaderMap| async move {
            cached(&headers, text.as_bytes(), "application/json", "public, max-age=300")
        }),
    )
}

/// The document, indented, with a line feed at its end.
#[must_use]
pub fn document_text() -> String {
    serde_json::to_string_pretty(&document()).unwrap_or_default() + "\n"
}

/// The document.
#[must_use]
pub fn document() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        insert(&mut paths, operation.path, operation.method, describe(operation));
    }
    for (method, path) in PAGES {
        insert(&mut paths, path, method, page(method, path));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Mastio",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "description": "Names here are interface. docs/api.md has the whole story.",
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "admin": { "type": "apiKey", "in": "header", "name": "X-Admin-Secret" },
                "certificate": { "type": "mutualTLS", "description": "The agent's registered certificate" },
                "dpop": { "type": "http", "scheme": "dpop", "description": "RFC 9449, with a proof in the header DPoP" },
                "bearer": { "type": "http", "scheme": "bearer", "description": "A certificate-bound token (RFC 8705)" },
                "resource_server": { "type": "http", "scheme": "basic" },
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["detail"],
                    "properties": {
                        "detail": { "description": "A text, an object with reason and hint, or a list of fields" },
                        "error": { "type": "string", "description": "Of a form: RFC 6749 §5.2" },
                        "error_description": { "type": "string" },
                    },
                },
            },
            "responses": {
                "Error": {
                    "description": "Refused; docs/api.md says when",
                    "content": { "application/json": {
                        "schema": { "$ref": "#/components/schemas/Error" },
                        "example": { "detail": "what was refused, and what to do" },
                    } },
                },
            },
        },
    })
}

fn insert(paths: &mut Map<String, Value>, path: &str, method: &str, operation: Value) {
    let item = paths.entry(path.to_owned()).or_insert_with(|| json!({}));
    if let Some(item) = item.as_object_mut() {
        item.insert(method.to_ascii_lowercase(), operation);
    }
}

fn describe(operation: &Operation) -> Value {
    let mut described = json!({
        "operationId": operation_id(operation.method, operation.path),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters(operation),
        "security": match operation.who {
            Who::Anyone | Who::Client => json!([]),
            Who::Admin => json!([{ "admin": [] }]),
            Who::Certificate => json!([{ "certificate": [] }]),
            Who::Token => json!([{ "dpop": [] }, { "bearer": [], "certificate": [] }]),
            Who::ResourceServer => json!([{ "resource_server": [] }]),
        },
        "responses": responses(operation),
    });
    let content = match operation.input {
        Input::Nothing => None,
        Input::Json(example) => Some(json!({ "application/json": media(example) })),
        Input::Form(example) => Some(json!({ "application/x-www-form-urlencoded": media(example) })),
        Input::Either(json, form) => Some(json!({
            "application/json": media(json), "application/x-www-form-urlencoded": media(form),
        })),
    };
    if let (Some(content), Some(described)) = (content, described.as_object_mut()) {
        described.insert("requestBody".to_owned(), json!({ "required": true, "content": content }));
    }
    described
}

fn page(method: &str, path: &str) -> Value {
    json!({
        "operationId": operation_id(method, path),
        "tags": ["dashboard"],
        "summary": "For people; its content is not interface",
        "parameters": path_parameters(path),
        "security": [],
        "responses": { "default": { "description": "A page, a part of one, or the way to sign in" } },
    })
}

fn operation_id(method: &str, path: &str) -> String {
    let words: String = path.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let words: Vec<&str> = words.split('_').filter(|word| !word.is_empty()).collect();
    format!("{}_{}", method.to_ascii_lowercase(), words.join("_"))
}

fn path_parameters(path: &str) -> Vec<Value> {
    path.split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string", "minLength": 1 } })
        })
        .collect()
}

fn parameters(operation: &Operation) -> Vec<Value> {
    let mut parameters = path_parameters(operation.path);
    for (name, kind, purpose) in operation.query {
        parameters.push(json!({
            "name": name, "in": "query", "required": false, "description": purpose, "schema": { "type": kind },
        }));
    }
    for (name, required, purpose) in operation.headers {
        parameters.push(json!({
            "name": name, "in": "header", "required": required, "description": purpose,
            "schema": { "type": "string" },
        }));
    }
    parameters
}

fn responses(operation: &Operation) -> Value {
    let mut responses = Map::new();
    let (status, response) = match operation.answer {
        Answer::Json(status, example) => {
            (status, json!({ "description": "Done", "content": { "application/json": media(example) } }))
        }
        Answer::Other(status, media_type) => {
            (status, json!({ "description": "Done", "content": { media_type: {} } }))
        }
        Answer::Empty(status) => (status, json!({ "description": "Done" })),
    };
    responses.insert(status.to_string(), response);
    for status in operation.errors {
        responses.insert(status.to_string(), json!({ "$ref": "#/components/responses/Error" }));
    }
    // 405, 408, 413 and 429 are the same everywhere.
    responses.insert("default".to_owned(), json!({ "$ref": "#/components/responses/Error" }));
    Value::Object(responses)
}

/// Schema and example. An example that cannot be read is the author's mistake, which a test finds.
fn media(example: &str) -> Value {
    let example: Value = serde_json::from_str(example).unwrap_or_default();
    json!({ "schema": schema(&example), "example": plain(&example) })
}

fn schema(example: &Value) -> Value {
    match example {
        Value::Null => json!({}),
        Value::Bool(_) => json!({ "type": "boolean" }),
        Value::Number(_) => json!({ "type": "integer" }),
        Value::String(_) => json!({ "type": "string" }),
        Value::Array(items) => match items.first() {
            Some(item) => json!({ "type": "array", "items": schema(item) }),
            None => json!({ "type": "array" }),
        },
        Value::Object(members) => {
            let (mut properties, mut required) = (Map::new(), Vec::new());
            for (member, example) in members {
                let (name, optional, nullable) = name(member);
                let mut described = schema(example);
                if nullable && let Some(kind) = described.get("type").cloned() {
                    described["type"] = json!([kind, "null"]);
                }
                properties.insert(name.to_owned(), described);
                if !optional {
                    required.push(name.to_owned());
                }
            }
            json!({ "type": "object", "properties": properties, "required": required })
        }
    }
}

/// The example without the marks.
fn plain(example: &Value) -> Value {
    match example {
        Value::Object(members) => {
            members.iter().map(|(member, example)| (name(member).0.to_owned(), plain(example))).collect()
        }
        Value::Array(items) => items.iter().map(plain).collect(),
        other => other.clone(),
    }
}

/// A member's name, whether it may be absent, and whether it may be null.
fn name(member: &str) -> (&str, bool, bool) {
    let marks = member.len() - member.trim_end_matches(['?', '~']).len();
    let (name, marks) = member.split_at(member.len() - marks);
    (name, marks.contains('?'), marks.contains('~'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_example_can_be_read() {
        for operation in OPERATIONS {
            let mut examples = Vec::new();
            if let Answer::Json(_, example) = operation.answer {
                examples.push(example);
            }
            match operation.input {
                Input::Nothing => {}
                Input::Json(example) | Input::Form(example) => examples.push(example),
                Input::Either(json, form) => examples.extend([json, form]),
            }
            for example in examples {
                assert!(serde_json::from_str::<Value>(example).is_ok(), "{} {example}", operation.path);
            }
        }
    }

    #[test]
    fn a_schema_says_what_its_example_does() {
        let example = json!({ "a": "x", "b?": 1, "c~": "y", "d?~": [true] });
        assert_eq!(plain(&example), json!({ "a": "x", "b": 1, "c": "y", "d": [true] }));
        assert_eq!(
            schema(&example),
            json!({
                "type": "object",
                "properties": {
                    "a": { "type": "string" },
                    "b": { "type": "integer" },
                    "c": { "type": ["string", "null"] },
                    "d": { "type": ["array", "null"], "items": { "type": "boolean" } },
                },
                "required": ["a", "c"],
            })
        );
    }
}
