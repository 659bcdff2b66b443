//! More requests than can be served: some are refused at once, so that the others are answered in time.
//!
//! A burst is no overload: it waits its turn, and its turn comes. But where so many requests wait for so long that the
//! queue does not empty any more, everybody would wait ever longer, and a queue of a thousand serves nobody sooner. From
//! then on only as many are let in as are answered within [`AIM`], by the rate at which they are being answered; the rest
//! get 503 with `Retry-After` before any work is done for them. When nobody had to be refused for a moment, it is over.
//!
//! Operators are never refused here, nor is whoever asks how the server fares. Requests to the gateway wait for others
//! than us, so they are not counted; under overload they too are let in only where there is room.
//! Source: K. Nichols, V. Jacobson, RFC 8289 §3 (a standing queue is what matters), and Little's law.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use mastio_core::error::Kind;

use super::error::ApiError;

/// What is looked at together.
const WINDOW: Duration = Duration::from_millis(100);
/// Requests that wait throughout a window, for it to count as full. More than the clients of any ordinary deploy at one
/// moment, and at the slowest measured rate still less than a second of work.
const STANDING: usize = 128;
/// Full windows, one after the other, that are an overload.
const FULL_WINDOWS: u32 = 3;
/// How long a request should take under overload.
const AIM: Duration = Duration::from_millis(10);
/// Or so many times what one takes alone, where that is more: on a slow disk every request takes long.
const AIM_TIMES: f64 = 2.0;
/// Requests that are let in at once, at least.
const AT_ONCE_MIN: f64 = 8.0;
/// Nobody refused for so long: the overload is over.
const CALM: Duration = Duration::from_millis(500);

/// How many requests are being served, and whether there are too many.
pub struct Overload(Mutex<Load>);

struct Load {
    at_once: usize,
    /// Seconds that a request takes which finds nobody else, smoothed.
    alone_s: f64,
    window: Window,
    full_windows: u32,
    shedding: Option<Shedding>,
}

struct Window {
    began: Instant,
    least_at_once: usize,
    answered: u32,
}

struct Shedding {
    at_once_max: f64,
    last_refused: Instant,
    refused: u64,
}

/// A request that was let in. Dropping it ends it.
pub struct Admitted {
    overload: Arc<Overload>,
    since: Instant,
    alone: bool,
}

impl Overload {
    /// Nothing is being served yet.
    #[must_use]
    pub fn new(now: Instant) -> Arc<Self> {
        let window = Window { began: now, least_at_once: 0, answered: 0 };
        Arc::new(Self(Mutex::new(Load { at_once: 0, alone_s: 0.0, window, full_windows: 0, shedding: None })))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Load) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets a request in, or nobody.
    #[must_use]
    pub fn admit(self: &Arc<Self>, now: Instant) -> Option<Admitted> {
        self.with(|load| {
            load.has_room(now).then(|| {
                load.at_once += 1;
                Admitted { overload: Arc::clone(self), since: now, alone: load.at_once == 1 }
            })
        })
    }

    /// Whether there is room for a request that is not counted.
    #[must_use]
    pub fn has_room(&self, now: Instant) -> bool {
        self.with(|load| load.has_room(now))
    }

    fn end(&self, since: Instant, alone: bool, now: Instant) {
        self.with(|load| {
            load.look(now);
            load.at_once = load.at_once.saturating_sub(1);
            load.window.least_at_once = load.window.least_at_once.min(load.at_once);
            load.window.answered += 1;
            if alone {
                let took_s = now.saturating_duration_since(since).as_secs_f64();
                load.alone_s = if load.alone_s == 0.0 { took_s } else { 0.9 * load.alone_s + 0.1 * took_s };
            }
        });
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.overload.end(self.since, self.alone, Instant::now());
    }
}

impl Load {
    fn has_room(&mut self, now: Instant) -> bool {
        self.look(now);
        let Some(shedding) = &mut self.shedding else { return true };
        if (self.at_once as f64) < shedding.at_once_max {
            return true;
        }
        shedding.refused += 1;
        shedding.last_refused = now;
        false
    }

    /// Judges the window that is over, if one is.
    fn look(&mut self, now: Instant) {
        if let Some(shedding) = &self.shedding
            && now.saturating_duration_since(shedding.last_refused) >= CALM
        {
            tracing::info!(refused = shedding.refused, "overload_ended");
            self.shedding = None;
            self.full_windows = 0;
        }
        let took = now.saturating_duration_since(self.window.began);
        if took < WINDOW {
            return;
        }
        let per_s = f64::from(self.window.answered) / took.as_secs_f64();
        self.full_windows = if self.window.least_at_once >= STANDING { self.full_windows + 1 } else { 0 };
        self.window = Window { began: now, least_at_once: self.at_once, answered: 0 };
        // By Little's law: whoever is let in among so many is answered after the aim.
        let at_once = (per_s * AIM.as_secs_f64().max(AIM_TIMES * self.alone_s)).max(AT_ONCE_MIN);
        match &mut self.shedding {
            Some(shedding) => shedding.at_once_max = 0.75 * shedding.at_once_max + 0.25 * at_once,
            None if self.full_windows >= FULL_WINDOWS => {
                tracing::warn!(waiting = self.at_once, answered_per_s = per_s, "overload_began");
                self.shedding = Some(Shedding { at_once_max: at_once, last_refused: now, refused: 0 });
            }
            None => {}
        }
    }
}

/// What a request is to this module.
#[derive(Debug, PartialEq, Eq)]
enum Served {
    /// Always let in, never counted.
    Always,
    /// It waits for others than us: let in where there is room, not counted.
    Elsewhere,
    /// Let in where there is room, and counted.
    Here,
}

fn served(path: &str) -> Served {
    let operators = ["/proxy", "/v1/admin", "/health", "/readyz", "/metrics"];
    if operators.iter().any(|start| path.starts_with(start)) {
        Served::Always
    } else if path.starts_with("/v1/mcp") {
        Served::Elsewhere
    } else {
        Served::Here
    }
}

/// Refuses what is too much: 503 with `Retry-After`.
pub async fn shed(State(overload): State<Arc<Overload>>, request: Request, next: Next) -> Response {
    let now = Instant::now();
    let (room, _held) = match served(request.uri().path()) {
        Served::Always => (true, None),
        Served::Elsewhere => (overload.has_room(now), None),
        Served::Here => {
            let admitted = overload.admit(now);
            (admitted.is_some(), admitted)
        }
    };
    if !room {
        return ApiError::new(Kind::Unavailable, "overloaded: try again").into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers `per_s` requests a second in their order, asked by the millisecond.
    struct Server {
        overload: Arc<Overload>,
        began: Instant,
        waiting: std::collections::VecDeque<u64>,
        answered: f64,
        at: u64,
    }

    impl Server {
        fn new() -> Self {
            let began = Instant::now();
            Self { overload: Overload::new(began), began, waiting: Default::default(), answered: 0.0, at: 0 }
        }

        fn now(&self) -> Instant {
            self.began + Duration::from_millis(self.at)
        }

        /// Runs for `ms`, asked `wanted_per_s` and able to answer `per_s`: how many were refused, and the waits of those
        /// that were answered, in milliseconds.
        fn run(&mut self, ms: u64, wanted_per_s: u64, per_s: f64) -> (u64, Vec<u64>) {
            let (mut refused, mut waits) = (0, Vec::new());
            let until = self.at + ms;
            while self.at < until {
                for _ in 0..(wanted_per_s / 1000) {
                    match self.overload.admit(self.now()) {
                        Some(admitted) => {
                            self.waiting.push_back(self.at);
                            // Ended below, at the test's own time.
                            std::mem::forget(admitted);
                        }
                        None => refused += 1,
                    }
                }
                self.answered += per_s / 1000.0;
                while self.answered >= 1.0 {
                    self.answered -= 1.0;
                    let Some(since) = self.waiting.pop_front() else { continue };
                    waits.push(self.at - since);
                    let alone = self.waiting.is_empty();
                    self.overload.end(self.began + Duration::from_millis(since), alone, self.now());
                }
                self.at += 1;
            }
            (refused, waits)
        }
    }

    #[test]
    fn a_burst_is_served_and_not_refused() {
        let mut server = Server::new();
        let (refused, first) = server.run(1, 500_000, 2000.0);
        assert_eq!(refused, 0);
        let (refused, others) = server.run(300, 0, 2000.0);
        assert_eq!((refused, first.len() + others.len()), (0, 500));
    }

    #[test]
    fn as_many_as_can_be_served_are_served_and_nobody_is_refused() {
        let mut server = Server::new();
        assert_eq!(server.run(5000, 2000, 2000.0).0, 0);
    }

    #[test]
    fn under_twice_the_rate_whoever_is_let_in_waits_a_moment_and_the_rate_is_kept() {
        let mut server = Server::new();
        server.run(2000, 4000, 2000.0);
        let (refused, mut waits) = server.run(10_000, 4000, 2000.0);
        waits.sort_unstable();
        assert!(waits.len() >= 19_500, "{} of 20000 answered", waits.len());
        assert!(waits[waits.len() * 99 / 100] <= 20, "{:?} ms", waits[waits.len() * 99 / 100]);
        assert!((19_000..=21_000).contains(&refused), "{refused} refused");
    }

    #[test]
    fn when_the_load_ends_nobody_is_refused_any_more() {
        let mut server = Server::new();
        assert!(server.run(3000, 4000, 2000.0).0 > 0);
        server.run(600, 0, 2000.0);
        let (refused, waits) = server.run(1, 100_000, 2000.0);
        assert_eq!((refused, waits.len()), (0, 2));
    }

    #[test]
    fn operators_and_who_asks_how_it_fares_are_always_let_in() {
        for path in ["/proxy/updates/api", "/v1/admin/agents", "/healthz", "/readyz", "/metrics"] {
            assert_eq!(served(path), Served::Always, "{path}");
        }
        assert_eq!(served("/v1/mcp"), Served::Elsewhere);
        for path in ["/v1/auth/token", "/v1/enrollment/start", "/pki/ca.crt", "/nothing"] {
            assert_eq!(served(path), Served::Here, "{path}");
        }
    }
}
