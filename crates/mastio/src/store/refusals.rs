//! Refusals in the audit chain, at a bounded rate.
//!
//! Who is refused for what they presented leaves an event, so that an attack can be read in the log. Anybody can cause
//! refusals, so a flood must not fill the disk: in each minute so many of one reason and so many together have an event
//! each, and the rest are counted and written as one event a reason when the minute is over. Counted in this process;
//! replicas count for themselves. An event that cannot be written does not change the answer: nothing was done.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde_json::json;

use super::group::{Append, Journal};

/// Events of one reason on one route in a minute.
const EACH_MAX: u32 = 30;
/// Events of all reasons together in a minute.
const TOGETHER_MAX: u32 = 300;
/// Seconds after which the allowance is whole again.
const WINDOW_S: i64 = 60;
/// How the log names somebody who has not proved who they are.
const ACTOR: &str = "anonymous";

/// One refusal.
#[derive(Debug, Clone, Copy)]
pub struct Refusal<'a> {
    /// The route that refused.
    pub route: &'static str,
    /// Why, by its stable name.
    pub reason: &'static str,
    /// The request.
    pub request_id: &'a str,
    /// Where it came from.
    pub address: IpAddr,
    /// When.
    pub now: UnixTime,
}

/// Where refusals go. Cheap to clone.
#[derive(Clone)]
pub struct Refusals {
    journal: Journal,
    window: Arc<Mutex<Window>>,
}

struct Window {
    since: UnixTime,
    written: u32,
    counts: BTreeMap<(&'static str, &'static str), Count>,
}

impl Default for Window {
    fn default() -> Self {
        Self { since: UnixTime(0), written: 0, counts: BTreeMap::new() }
    }
}

#[derive(Default)]
struct Count {
    written: u32,
    left_out: i64,
}

impl Refusals {
    /// Written to `journal`.
    #[must_use]
    pub fn new(journal: Journal) -> Self {
        Self { journal, window: Arc::default() }
    }

    /// Records a refusal, or counts it where there were too many.
    pub async fn record(&self, refusal: Refusal<'_>) {
        let events = self.with(|window| window.take(refusal));
        self.write(events).await;
    }

    /// Writes what was only counted, once its minute is over. To be called now and then.
    pub async fn summarise(&self, now: UnixTime) {
        let events = self.with(|window| window.roll(now));
        self.write(events).await;
    }

    fn with(&self, act: impl FnOnce(&mut Window) -> Vec<Event>) -> Vec<Event> {
        act(&mut self.window.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn write(&self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        if let Err(error) = self.journal.append(Append { events, ..Append::default() }).await {
            tracing::warn!(error = %error, "refusal_not_recorded");
        }
    }
}

impl Window {
    fn take(&mut self, refusal: Refusal<'_>) -> Vec<Event> {
        let mut events = self.roll(refusal.now);
        let count = self.counts.entry((refusal.route, refusal.reason)).or_default();
        if count.written < EACH_MAX && self.written < TOGETHER_MAX {
            count.written += 1;
            self.written += 1;
            events.push(Event {
                event_type: EventType::Refused,
                actor: ACTOR.to_owned(),
                details: json!({
                    "route": refusal.route,
                    "reason": refusal.reason,
                    "address": refusal.address.to_canonical().to_string(),
                    "request_id": refusal.request_id,
                }),
            });
        } else {
            count.left_out += 1;
        }
        events
    }

    /// Begins a new minute where one is over, and tells of the old one what has no event yet.
    fn roll(&mut self, now: UnixTime) -> Vec<Event> {
        // A clock that was set back begins a new one too.
        if (0..WINDOW_S).contains(&now.since(self.since)) {
            return Vec::new();
        }
        let over = std::mem::take(self);
        self.since = now;
        over.counts
            .into_iter()
            .filter(|(_, count)| count.left_out > 0)
            .map(|((route, reason), count)| Event {
                event_type: EventType::RefusalsSummarised,
                actor: ACTOR.to_owned(),
                details: json!({
                    "route": route,
                    "reason": reason,
                    "count": count.left_out,
                    "since": over.since.to_rfc3339(),
                }),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refusal(reason: &'static str, now: i64) -> Refusal<'static> {
        Refusal {
            route: "/v1/mcp",
            reason,
            request_id: "r",
            address: [127, 0, 0, 1].into(),
            now: UnixTime(now),
        }
    }

    #[test]
    fn a_flood_leaves_a_bounded_number_of_events_and_its_count() {
        let mut window = Window::default();
        let of_one: usize = (0..1000).map(|_| window.take(refusal("jws_signature", 1_000)).len()).sum();
        assert_eq!(of_one, 30);
        let other = window.take(refusal("replayed", 1_059));
        assert_eq!(other.len(), 1, "another reason has its own allowance");
        let after = window.take(refusal("jws_signature", 1_060));
        assert_eq!(after.len(), 2);
        assert_eq!(after[0].event_type, EventType::RefusalsSummarised);
        assert_eq!(after[0].details["count"], 970);
        assert_eq!(after[0].details["since"], UnixTime(1_000).to_rfc3339());
        assert_eq!(after[1].event_type, EventType::Refused);
        assert!(window.roll(UnixTime(1_200)).is_empty(), "nothing was left out");
    }

    #[test]
    fn all_reasons_together_are_bounded_too() {
        let mut window = Window::default();
        let reasons: Vec<&'static str> = (0..20).map(|n| &*format!("reason_{n}").leak()).collect();
        let written: usize = (0..600).map(|n| window.take(refusal(reasons[n % 20], 1_000)).len()).sum();
        assert_eq!(written, 300);
        let left_out: i64 =
            window.roll(UnixTime(2_000)).iter().map(|event| event.details["count"].as_i64().unwrap()).sum();
        assert_eq!(left_out, 300);
    }
}
