//! Rate limits: how much one caller, or all together, may ask for.
//!
//! The generic cell rate algorithm: a caller may use a minute's allowance at once and then gets it back evenly. One
//! number a caller is all that is kept. Counted in this process; replicas count for themselves.
//!
//! What a request was counted against is told in its answer: `RateLimit-Policy` and `RateLimit`
//! (draft-ietf-httpapi-ratelimit-headers-10).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mastio_core::error::Kind;
use mastio_core::time::UnixMicros;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::context::Context;
use super::error::ApiError;

/// Callers that are remembered at most; those who have nothing used up are forgotten first.
const CALLERS_MAX: usize = 100_000;
const MINUTE_US: i64 = 60_000_000;
const SECOND_US: i64 = 1_000_000;

/// An allowance for each caller.
pub struct RateLimit {
    /// How answers call it.
    policy: &'static str,
    /// Requests in a window; 0 is no limit.
    requests: u32,
    /// Microseconds of a window. A caller may be so far ahead: the whole allowance at once.
    window_us: i64,
    /// Until when each caller's allowance is used up.
    used_until_us: Mutex<HashMap<String, i64>>,
}

impl RateLimit {
    /// `requests` a minute for each caller; 0 is no limit.
    #[must_use]
    pub fn per_minute(requests: u32) -> Self {
        Self::new("agent", requests, MINUTE_US)
    }

    /// `requests` a second; 0 is no limit.
    #[must_use]
    pub fn per_second(requests: u32) -> Self {
        Self::new("server", requests, SECOND_US)
    }

    fn new(policy: &'static str, requests: u32, window_us: i64) -> Self {
        Self { policy, requests, window_us, used_until_us: Mutex::default() }
    }

    /// Takes one request from the allowance of `caller`. False: there is none left.
    #[must_use]
    pub fn admit(&self, caller: &str, now: UnixMicros) -> bool {
        self.take(caller, self.requests, now).is_none_or(|(admitted, _)| admitted)
    }

    /// The same, told in the answer of the request that `context` is of.
    #[must_use]
    pub fn admit_told(&self, caller: &str, context: &Context) -> bool {
        let Some((admitted, quota)) = self.take(caller, self.requests, context.now) else { return true };
        context.quotas.add(quota);
        admitted
    }

    /// Takes one request from an allowance of `requests` a window, whatever the common one is. For limits that differ
    /// from caller to caller.
    #[must_use]
    pub fn admit_at(&self, caller: &str, requests: u32, now: UnixMicros) -> bool {
        self.take(caller, requests, now).is_none_or(|(admitted, _)| admitted)
    }

    /// Takes one request, and tells what is left. Nothing: there is no limit.
    fn take(&self, caller: &str, requests: u32, now: UnixMicros) -> Option<(bool, Quota)> {
        if requests == 0 {
            return None;
        }
        let cost_us = (self.window_us / i64::from(requests)).max(1);
        let mut used = self.used_until_us.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() >= CALLERS_MAX && !used.contains_key(caller) {
            used.retain(|_, until| *until > now.0);
        }
        let used_until = used.get(caller).copied().unwrap_or(0).max(now.0);
        let until = used_until + cost_us;
        let admitted = until - now.0 <= self.window_us;
        if admitted {
            // Not asked for by a new text where the caller is known.
            match used.get_mut(caller) {
                Some(known) => *known = until,
                None => drop(used.insert(caller.to_owned(), until)),
            }
        }
        let ahead_us = if admitted { until } else { used_until } - now.0;
        let remaining = (self.window_us - ahead_us) / cost_us;
        Some((
            admitted,
            Quota {
                policy: self.policy,
                requests,
                window_s: self.window_us / SECOND_US,
                remaining,
                // Until the whole allowance is back.
                reset_s: (ahead_us + SECOND_US - 1) / SECOND_US,
            },
        ))
    }
}

/// What is left of one allowance.
#[derive(Debug, Clone, Copy)]
struct Quota {
    policy: &'static str,
    requests: u32,
    window_s: i64,
    remaining: i64,
    reset_s: i64,
}

/// The allowances that one request was counted against.
#[derive(Debug, Clone, Default)]
pub struct Quotas(Arc<Mutex<Vec<Quota>>>);

impl Quotas {
    fn add(&self, quota: Quota) {
        let mut quotas = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A request that is judged twice is told once.
        quotas.retain(|other| other.policy != quota.policy);
        quotas.push(quota);
    }

    /// Writes the headers, where there is something to tell.
    pub fn tell(&self, headers: &mut HeaderMap) {
        let quotas = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if quotas.is_empty() {
            return;
        }
        let list = |of: fn(&Quota) -> String| {
            let items: Vec<String> = quotas.iter().map(of).collect();
            HeaderValue::from_str(&items.join(", "))
        };
        let policies =
            list(|quota| format!("\"{}\";q={};w={}", quota.policy, quota.requests, quota.window_s));
        let left = list(|quota| format!("\"{}\";r={};t={}", quota.policy, quota.remaining, quota.reset_s));
        if let (Ok(policies), Ok(left)) = (policies, left) {
            headers.insert("ratelimit-policy", policies);
            headers.insert("ratelimit", left);
        }
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
    if limit.admit_told(&source_key(context.source), &context) {
        return next.run(request).await;
    }
    ApiError::new(Kind::Limited, "too many requests from this address: wait a minute").into_response()
}

/// The same over all routes but those that tell how the server fares. Its allowance is counted beside a route's own.
pub fn by_address(limit: &RateLimit, context: &Context, path: &str) -> Result<(), ApiError> {
    if tells_how_it_fares(path)
        || limit.requests == 0
        || limit.admit_told(&source_key(context.source), context)
    {
        return Ok(());
    }
    Err(ApiError::new(
        Kind::Limited,
        "too many requests from this address: wait, or raise MCP_PROXY_ADDRESS_RATE_LIMIT_PER_MINUTE",
    ))
}

fn tells_how_it_fares(path: &str) -> bool {
    path.starts_with("/health") || path == "/readyz" || path == "/metrics"
}

/// `requests` a minute for each source of one route, as [`per_source`] takes it.
#[must_use]
pub fn per_minute(requests: u32) -> Arc<RateLimit> {
    Arc::new(RateLimit::new("address", requests, MINUTE_US))
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
pub fn shed(limit: &RateLimit, context: &Context, path: &str) -> Result<(), ApiError> {
    let exempt = tells_how_it_fares(path) || path.starts_with("/.well-known/");
    if exempt || limit.admit("", context.now) {
        return Ok(());
    }
    Err(ApiError::new(Kind::Unavailable, "the server's request rate is exceeded: try again"))
}

/// Requests that are served at once. One more is told to come again, instead of waiting in a queue without end.
const REQUESTS_MAX: usize = 2048;

/// Room for the requests that are served at once.
#[must_use]
pub fn room() -> Semaphore {
    Semaphore::new(REQUESTS_MAX)
}

/// Takes a place in the room, held until it is dropped; refuses a request over [`REQUESTS_MAX`] at once: 503 with
/// `Retry-After`.
pub fn enter(room: &Semaphore) -> Result<SemaphorePermit<'_>, ApiError> {
    room.try_acquire().map_err(|_| ApiError::new(Kind::Unavailable, "overloaded: try again"))
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
    fn what_is_left_and_when_it_is_back_is_told() {
        let limit = RateLimit::per_minute(60);
        let now = UnixMicros(1_000_000_000_000);
        let told = |caller: &str| {
            limit.take(caller, 60, now).map(|(admitted, quota)| (admitted, quota.remaining, quota.reset_s))
        };
        assert_eq!(told("a"), Some((true, 59, 1)));
        assert_eq!(told("a"), Some((true, 58, 2)));
        assert_eq!((0..58).filter(|_| limit.admit("a", now)).count(), 58);
        assert_eq!(told("a"), Some((false, 0, 60)));
        let quotas = Quotas::default();
        let mut headers = HeaderMap::new();
        quotas.tell(&mut headers);
        assert!(headers.is_empty());
        if let Some((_, quota)) = limit.take("b", 60, now) {
            quotas.add(quota);
        }
        quotas.tell(&mut headers);
        assert_eq!(headers["ratelimit-policy"], "\"agent\";q=60;w=60");
        assert_eq!(headers["ratelimit"], "\"agent\";r=59;t=1");
    }

    #[test]
    fn zero_is_no_limit() {
        let limit = RateLimit::per_minute(0);
        assert!((0..10_000).all(|_| limit.admit("a", UnixMicros(0))));
    }
}
