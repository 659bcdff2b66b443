//! Rate limits: how much one caller, or all together, may ask for.
//!
//! The generic cell rate algorithm: a caller may use a minute's allowance at once and then gets it back evenly. One
//! number a caller is all that is kept. Counted in this process; replicas count for themselves.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mastio_core::error::Kind;
use mastio_core::time::UnixMicros;

use super::context::Context;
use super::error::ApiError;

/// Callers that are remembered at most; those who have nothing used up are forgotten first.
const CALLERS_MAX: usize = 100_000;
const MINUTE_US: i64 = 60_000_000;
const SECOND_US: i64 = 1_000_000;

/// An allowance for each caller.
pub struct RateLimit {
    /// Microseconds that one request costs; 0 is no limit.
    cost_us: i64,
    /// Microseconds that a caller may be ahead: the whole window's allowance at once.
    ahead_us_max: i64,
    /// Until when each caller's allowance is used up.
    used_until_us: Mutex<HashMap<String, i64>>,
}

impl RateLimit {
    /// `requests` a minute for each caller; 0 is no limit.
    #[must_use]
    pub fn per_minute(requests: u32) -> Self {
        Self::new(requests, MINUTE_US)
    }

    /// `requests` a second; 0 is no limit.
    #[must_use]
    pub fn per_second(requests: u32) -> Self {
        Self::new(requests, SECOND_US)
    }

    fn new(requests: u32, window_us: i64) -> Self {
        let cost_us = if requests == 0 { 0 } else { (window_us / i64::from(requests)).max(1) };
        Self { cost_us, ahead_us_max: window_us, used_until_us: Mutex::default() }
    }

    /// Takes one request from the allowance of `caller`. False: there is none left.
    #[must_use]
    pub fn admit(&self, caller: &str, now: UnixMicros) -> bool {
        self.cost_us == 0 || self.take(caller, self.cost_us, now)
    }

    /// Takes one request from an allowance of `requests` a minute, whatever the common one is. For limits that differ
    /// from caller to caller.
    #[must_use]
    pub fn admit_at(&self, caller: &str, requests: u32, now: UnixMicros) -> bool {
        requests == 0 || self.take(caller, (MINUTE_US / i64::from(requests)).max(1), now)
    }

    fn take(&self, caller: &str, cost_us: i64, now: UnixMicros) -> bool {
        let mut used = self.used_until_us.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() >= CALLERS_MAX && !used.contains_key(caller) {
            used.retain(|_, until| *until > now.0);
        }
        let until = used.get(caller).copied().unwrap_or(0).max(now.0) + cost_us;
        if until - now.0 > self.ahead_us_max {
            return false;
        }
        used.insert(caller.to_owned(), until);
        true
    }
}

/// An allowance for each source address, for one route:
/// `get(show).layer(from_fn_with_state(per_minute(30), limits::per_source))`. Over it: 429 with `Retry-After`.
///
/// A source is what [`Context::source`] says: the client, also behind a trusted front. Of IPv6 the first 64 bits count,
/// since one host has all that are below.
pub async fn per_source(
    State(limit): State<Arc<RateLimit>>,
    context: Context,
    request: Request,
    next: Next,
) -> Response {
    if limit.admit(&source_key(context.source), context.now) {
        return next.run(request).await;
    }
    ApiError::new(Kind::Limited, "too many requests from this address: wait a minute").into_response()
}

/// `requests` a minute for each source of one route, as [`per_source`] takes it.
#[must_use]
pub fn per_minute(requests: u32) -> Arc<RateLimit> {
    Arc::new(RateLimit::per_minute(requests))
}

/// What counts as one source.
#[must_use]
pub fn source_key(source: IpAddr) -> String {
    match source.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::/64")
        }
    }
}

/// Sheds requests over the whole server's rate, except those that tell how it fares.
pub async fn shed(State(limit): State<Arc<RateLimit>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let exempt = path.starts_with("/health")
        || path == "/readyz"
        || path == "/metrics"
        || path.starts_with("/.well-known/");
    let now = request.extensions().get::<Context>().map(|context| context.now);
    if !exempt && now.is_some_and(|now| !limit.admit("", now)) {
        return ApiError::new(Kind::Unavailable, "the server's request rate is exceeded: try again")
            .into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_s_allowance_may_be_used_at_once_and_comes_back_evenly() {
        let limit = RateLimit::per_minute(60);
        let at = |seconds: i64| UnixMicros(1_000_000_000_000 + seconds * SECOND_US);
        let admitted = (0..100).filter(|_| limit.admit("a", at(0))).count();
        assert_eq!(admitted, 60);
        assert!(!limit.admit("a", at(0)));
        assert!(limit.admit("b", at(0)), "another caller has its own");
        assert!(limit.admit("a", at(1)), "a second gives one back");
        assert!(!limit.admit("a", at(1)));
    }

    #[test]
    fn an_ipv6_host_is_one_source_whatever_addresses_it_takes() {
        let key = |text: &str| text.parse().map(source_key).unwrap_or_default();
        assert_eq!(key("2001:db8:1:2::1"), key("2001:db8:1:2:ffff::9"));
        assert_ne!(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
        assert_eq!(key("::ffff:192.0.2.1"), "192.0.2.1");
    }

    #[test]
    fn zero_is_no_limit() {
        let limit = RateLimit::per_minute(0);
        assert!((0..10_000).all(|_| limit.admit("a", UnixMicros(0))));
    }
}
