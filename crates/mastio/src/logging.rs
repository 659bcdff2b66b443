//! Structured logs on standard error: for people, or one JSON object a line (`LOG_FORMAT=json`).
//!
//! The names of events that operators alert on (`cullis_proxy_…`) stand in the message; what belongs to them is in
//! fields. A token, proof, key or certificate request is never logged.

use std::io::IsTerminal as _;
use std::net::SocketAddr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Whether `text` is a filter that [`init`] accepts.
#[must_use]
pub fn is_filter(text: &str) -> bool {
    // The parser of tracing-subscriber 0.3 panics where a character of several bytes stands before a separator.
    text.is_ascii() && EnvFilter::try_new(text).is_ok()
}

/// Starts logging for the life of the process. A second call does nothing, so that tests may call it freely.
pub fn init(json: bool, filter: &str) {
    let color = std::io::stderr().is_terminal();
    let _already_started =
        tracing::dispatcher::set_global_default(dispatch(json, filter, color, std::io::stderr));
}

fn dispatch<W>(json: bool, filter: &str, color: bool, writer: W) -> tracing::Dispatch
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    if json {
        // Flattened: a collector finds `message` and `migration_id` beside `level`, not below `fields`.
        base.json().flatten_event(true).with_current_span(false).with_span_list(false).finish().into()
    } else {
        base.with_ansi(color).with_target(false).finish().into()
    }
}

/// Writes the line that says where the server listens. Whoever starts the binary on port 0 waits for it.
pub fn listening(address: SocketAddr, url: &str) {
    tracing::info!(address = %address, url, "listening");
}

/// A new organisation waits for its first operator. The one secret that the log shows, for whoever can read it is whom
/// the set-up is for; it is good once, and until the next start.
pub fn setup_open(url: &str, token: &str) {
    tracing::info!(url = format!("{url}/proxy/setup"), token, "setup_open");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(json: bool, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let dispatch = dispatch(json, "info", false, move || writer.clone());
        tracing::dispatcher::with_default(&dispatch, log);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_json_line_has_its_fields_beside_its_message() {
        let text = logged(true, || {
            tracing::error!(
                migration_id = "2026-04-23-org-ca-pathlen-1",
                "cullis_proxy_sign_halt_pending_migration"
            );
        });
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert_eq!(line["message"], "cullis_proxy_sign_halt_pending_migration");
        assert_eq!(line["migration_id"], "2026-04-23-org-ca-pathlen-1");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_line_for_people_names_level_event_and_fields() {
        let text = logged(false, || listening(([127, 0, 0, 1], 9443).into(), "https://localhost:9443"));
        assert!(
            text.contains(" INFO listening address=127.0.0.1:9443 url=\"https://localhost:9443\""),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn what_the_filter_leaves_out_is_not_written() {
        assert_eq!(logged(true, || tracing::debug!("hidden")), "");
        assert!(is_filter("info,mastio=debug") && !is_filter("a=b=c"));
    }
}
