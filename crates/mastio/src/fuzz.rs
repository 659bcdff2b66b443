//! What is done with bytes from outside, one function for each kind of them that this crate reads itself; the core's
//! are in `mastio-core/fuzz/targets.rs`. libFuzzer calls them from `fuzz/fuzz_targets/`, the ordinary tests from below.
//! None may panic, and what was read must mean the same when read again.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use mastio_core::x509::Certificate;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::config::{self, AdminSecret, Flags, Surroundings};
use crate::entropy::Entropy;
use crate::gateway::jsonrpc::{self, Body, Call, Message};
use crate::gateway::sse::EventStream;
use crate::gateway::{definition, peer, protocol, trace, upstream};
use crate::http::front::{self, Forwarded, Front};
use crate::http::urls::ExternalUrls;
use crate::pki::keys::PrivateKey;
use crate::store::DatabaseUrl;
use crate::tokens::form::Form;
use crate::tokens::http as token_headers;

/// What is done with arbitrary bytes. It may refuse them in any way but by a panic.
pub type Target = fn(&[u8]);

/// Every target by its name, which is that of its corpus too.
pub const TARGETS: [(&str, Target); 8] = [
    ("form", form),
    ("mcp_message", mcp_message),
    ("mcp_answer", mcp_answer),
    ("event_stream", event_stream),
    ("tool_definition", tool_definition),
    ("headers", headers),
    ("settings", settings),
    ("owner_files", owner_files),
];

/// Runs the target of this name.
pub fn run(name: &str, data: &[u8]) {
    if let Some((_, target)) = TARGETS.iter().find(|(other, _)| *other == name) {
        target(data);
    }
}

fn form(data: &[u8]) {
    let Ok(form) = Form::parse(data) else { return };
    for name in ["client_id", "client_secret", "grant_type", "token", "client_assertion"] {
        assert!(form.all(name).count() <= 1, "two readers could take two values");
        assert!(form.get(name).is_none_or(|value| !value.is_empty()));
    }
}

fn mcp_message(data: &[u8]) {
    let peeked = jsonrpc::peek_id(data);
    for batches in [false, true] {
        match jsonrpc::read(data, batches) {
            Body::One(message) => {
                if let (Message::Request { id, .. }, Some(peeked)) = (&message, &peeked) {
                    assert_eq!(id.raw(), peeked.raw(), "a refusal answers the same id");
                }
                use_message(message);
            }
            Body::Batch(messages) => {
                assert!(batches && (1..=jsonrpc::BATCH_MESSAGES_MAX).contains(&messages.len()));
                messages.into_iter().for_each(use_message);
            }
        }
    }
}

fn use_message(message: Message) {
    let (id, call) = match message {
        Message::Malformed(error) => {
            let text = jsonrpc::write_error(None, &error).expect("an error of ours can be written");
            return drop(serde_json::from_slice::<Value>(&text).expect("and read"));
        }
        Message::Response { raw, .. } => return drop(jsonrpc::members(&raw)),
        Message::Notification(call) => (None, call),
        Message::Request { id, call } => (Some(id), call),
    };
    let written = jsonrpc::write(id.as_ref(), Ok(RawValue::NULL)).expect("an answer can be written");
    let answer: Value = serde_json::from_slice(&written).expect("and read");
    if let (Some(id), Some(said)) = (&id, answer["id"].as_str()) {
        assert_eq!(id.text(), said, "the caller gets its own id");
    }
    let _meta = protocol::meta(call.params.as_deref());
    if let Ok(tool) = jsonrpc::tool_call(call.params.as_deref()) {
        let arguments = tool.arguments.get();
        assert!(jsonrpc::compact_bytes(arguments) <= arguments.len());
        let value = jsonrpc::empty_object();
        let set = jsonrpc::with_member(&tool.params, "_meta", &value).expect("raw values are valid");
        assert!(jsonrpc::members(&set).iter().any(|(name, value)| name == "_meta" && value.get() == "{}"));
    }
}

/// What an MCP server answers.
fn mcp_answer(data: &[u8]) {
    if let Some(Ok(result)) = upstream::answer_in(data, "7") {
        let _value: Value = serde_json::from_str(result.get()).expect("a result is JSON");
    }
    let line = peer::one_line(data);
    assert!(!line.contains(&b'\n') && !line.contains(&b'\r'), "one event's data is one line");
    if let Some(message) = peer::under_id(data, "ours")
        && message.get().starts_with('{')
    {
        let members = jsonrpc::members(&message);
        assert!(members.iter().any(|(name, value)| name == "id" && value.get() == "\"ours\""));
    }
}

/// The first byte says in which pieces the rest arrives.
fn event_stream(data: &[u8]) {
    let Some((size, bytes)) = data.split_first() else { return };
    let read = |size: usize| {
        let mut stream = EventStream::default();
        let mut events: Vec<Vec<u8>> =
            bytes.chunks(size.max(1)).flat_map(|piece| stream.push(piece)).collect();
        events.extend(stream.finish());
        events
    };
    let whole = read(bytes.len());
    assert_eq!(read(usize::from(*size)), whole, "the same events however the bytes are cut");
    assert!(whole.iter().map(Vec::len).sum::<usize>() <= bytes.len());
}

/// What a tool says of itself, and arguments that are held against its schema.
fn tool_definition(data: &[u8]) {
    let Ok(raw) = serde_json::from_slice::<&RawValue>(data) else { return };
    let Ok(canonical) = definition::canonical(raw) else { return };
    let again = RawValue::from_string(canonical.clone()).expect("the one form is JSON");
    assert_eq!(definition::canonical(&again).as_ref(), Ok(&canonical), "one form");
    let value: Value = serde_json::from_str(&canonical).expect("the one form is JSON");
    assert!(definition::differences(&value, &value).is_empty());
    let name = value["name"].as_str().unwrap_or_default();
    assert_eq!(definition::skeleton(name), definition::skeleton(&name.to_ascii_uppercase()));
    let schema = value.get("inputSchema").unwrap_or(&value);
    if let Ok(validator) = definition::validator(schema) {
        let _verdict = validator.is_valid(&value["arguments"]);
        let _mirrored = protocol::check_parameters(&HeaderMap::new(), schema, &value["arguments"]);
    }
}

/// Header lines, an empty line, and a body.
fn headers(data: &[u8]) {
    let (head, body) = data
        .windows(2)
        .position(|pair| pair == b"\n\n")
        .map_or((data, &[][..]), |at| (&data[..at], &data[at + 2..]));
    let mut headers = HeaderMap::new();
    for line in head.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    if let Ok(Forwarded::Certificate(der)) = front::forwarded(&headers) {
        Certificate::from_der(&der).expect("what a front shows can be read");
    }
    if let Some(IpAddr::V6(address)) = front::client_address(&headers) {
        assert!(address.to_ipv4_mapped().is_none(), "one client has one address");
    }
    let ours = ExternalUrls::new(None, vec!["localhost".to_owned()]);
    for url in ours.of(&headers, "/v1/mcp") {
        assert!(url.starts_with("https://") && url.to_ascii_lowercase().contains("localhost"), "{url}");
    }
    let _token = token_headers::shown(&headers).is_ok();
    let _proof = token_headers::proof(&headers).is_ok();
    let _client = token_headers::basic(&headers);
    let trace = trace::Trace::of(&headers, (None, None), &Entropy::default());
    assert_eq!((trace.trace_id().len(), trace.parent().len()), (32, 55));
    let _revision = protocol::named_revision(&headers);
    let _streams = protocol::reads_streams(&headers);
    if let Body::One(Message::Request { call, .. }) = jsonrpc::read(body, false) {
        let Call { method, .. } = &call;
        if protocol::check_mirrored(&headers, &call).is_ok() {
            assert_eq!(headers["mcp-method"], method.as_str(), "headers and body say the same");
        }
    }
}

/// An env file; what it sets is then read as if the environment said it.
fn settings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(url) = DatabaseUrl::parse(text.trim()) {
        let _shown = url.redacted();
    }
    if let Ok(front) = text.trim().parse::<Front>() {
        assert!(!front.trusts(Ipv4Addr::UNSPECIFIED.into()) || text.contains("0.0.0.0"));
    }
    let Ok(lines) = config::env_lines(Path::new("env"), text) else { return };
    let environment: BTreeMap<_, _> = lines.into_iter().map(|(name, value)| (name, value.into())).collect();
    let nowhere = Surroundings::with(environment, Path::new("/nonexistent"));
    let _resolved = config::resolve(&Flags::default(), &nowhere, AdminSecret::Optional, &Entropy::default());
}

/// A key and certificates in PEM, as owners bring them.
fn owner_files(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let spki = PrivateKey::spki_of("the request", text);
    if let (Ok(spki), Ok(key)) = (&spki, PrivateKey::from_pem("the request", text)) {
        assert_eq!(key.spki_der(), spki, "two readers, one key");
    }
    if let Ok(chain) = Certificate::chain_from_pem(text) {
        let _fits =
            chain.iter().any(|certificate| spki.as_deref().is_ok_and(|spki| certificate.spki_der() == spki));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::fs;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_an_entry_for_libfuzzer_and_the_corpus_breaks_nothing() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        for (name, target) in TARGETS {
            assert!(fuzz.join(format!("fuzz_targets/{name}.rs")).is_file(), "{name}");
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            let folder = fs::read_dir(fuzz.join("corpus").join(name)).unwrap();
            let files: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name}");
            for file in files {
                let seed = fs::read(&file).unwrap();
                target(&seed);
                // Cut short and torn in the middle, as a connection that breaks off leaves it.
                target(&seed[..seed.len() / 2]);
                target(&seed[seed.len() / 3..]);
            }
        }
    }
}
