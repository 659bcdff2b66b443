//! W3C Trace Context: a call's trace goes on upstream, in headers and in `_meta`, and is named in the audit log.
//!
//! Source: W3C Trace Context §3.2 and §3.3; MCP 2026-07-28, OpenTelemetry trace context.

use axum::http::HeaderMap;

use crate::entropy::Entropy;
use crate::pki::store::hex;

/// Bytes of a `tracestate` at most; a longer one is dropped (Trace Context §3.3.1.5 asks for 512).
const STATE_BYTES_MAX: usize = 512;

/// The trace that a request belongs to, and our own span in it.
#[derive(Debug, Clone)]
pub struct Trace {
    trace_id: String,
    span_id: String,
    flags: String,
    state: Option<String>,
}

impl Trace {
    /// Goes on with the caller's trace, from its headers or from `_meta`, or begins one.
    #[must_use]
    pub fn of(headers: &HeaderMap, meta: (Option<&str>, Option<&str>), entropy: &Entropy) -> Self {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let (parent, state) = match header("traceparent") {
            Some(parent) => (Some(parent), header("tracestate")),
            None => meta,
        };
        let span_id = hex(&entropy.bytes::<8>());
        match parent.and_then(parse) {
            Some((trace_id, flags)) => Self {
                trace_id,
                span_id,
                flags,
                state: state.filter(|state| is_state(state)).map(str::to_owned),
            },
            None => {
                Self { trace_id: hex(&entropy.bytes::<16>()), span_id, flags: "00".to_owned(), state: None }
            }
        }
    }

    /// 32 hex digits.
    #[must_use]
    pub fn trace_id(&self) -> &str {
        &self.trace_id
    }

    /// `traceparent` for what we call.
    #[must_use]
    pub fn parent(&self) -> String {
        format!("00-{}-{}-{}", self.trace_id, self.span_id, self.flags)
    }

    /// `tracestate` for what we call, as it came.
    #[must_use]
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

/// The trace id and the flags of a `traceparent`. Absent for one that is not well formed.
fn parse(text: &str) -> Option<(String, String)> {
    let mut parts = text.split('-');
    let (version, trace_id, parent_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length: usize| {
        text.len() == length
            && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let well_formed = is_hex(version, 2)
        && version != "ff"
        && (version != "00" || parts.next().is_none())
        && is_hex(trace_id, 32)
        && is_hex(parent_id, 16)
        && is_hex(flags, 2);
    let zero = |text: &str| text.bytes().all(|byte| byte == b'0');
    (well_formed && !zero(trace_id) && !zero(parent_id)).then(|| (trace_id.to_owned(), flags.to_owned()))
}

fn is_state(text: &str) -> bool {
    text.len() <= STATE_BYTES_MAX && text.bytes().all(|byte| (0x20..=0x7e).contains(&byte))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_trace_goes_on_under_a_span_of_ours_and_a_broken_one_is_begun_anew() {
        let entropy = Entropy::default();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
        let mut headers = HeaderMap::new();
        let from_meta = Trace::of(&headers, (Some(parent), Some("a=b")), &entropy);
        assert_eq!(from_meta.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        assert!(from_meta.parent().ends_with("-01") && !from_meta.parent().contains("00f067aa0ba902b7"));
        assert_eq!(from_meta.state(), Some("a=b"));
        headers.insert(
            "traceparent",
            "00-11111111111111111111111111111111-2222222222222222-00".parse().unwrap(),
        );
        let from_header = Trace::of(&headers, (Some(parent), Some("a=b")), &entropy);
        assert_eq!((from_header.trace_id(), from_header.state()), ("11111111111111111111111111111111", None));
        for broken in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
            "00-0AF7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
            "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01-x",
        ] {
            let begun = Trace::of(&HeaderMap::new(), (Some(broken), Some("a=b")), &entropy);
            assert!(
                begun.trace_id() != "0af7651916cd43dd8448eb211c80319c" && begun.state().is_none(),
                "{broken}"
            );
        }
    }
}
