//! How fast an address may guess: a few tries at once, then twice the wait for each further one, up to minutes.
//!
//! Nothing is ever locked: the wait ends by itself, other addresses are not touched, and the shared secret in
//! `X-Admin-Secret` goes on working. Counted in this process; replicas count for themselves.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use mastio_core::time::UnixTime;

/// Wrong tries that cost nothing: a person mistypes.
const FREE_TRIES: u32 = 5;
/// The longest wait.
const WAIT_S_MAX: i64 = 300;
/// An address is forgotten so long after its last wrong try.
const FORGET_S: i64 = 3600;
/// Addresses that are remembered at most.
const ADDRESSES_MAX: usize = 10_000;

#[derive(Clone, Copy)]
struct Record {
    failures: u32,
    last: i64,
}

impl Record {
    fn wait_s(self) -> i64 {
        match self.failures.checked_sub(FREE_TRIES) {
            None => 0,
            Some(beyond) => 1i64.checked_shl(beyond.min(9)).unwrap_or(WAIT_S_MAX).min(WAIT_S_MAX),
        }
    }
}

/// Wrong tries by address.
#[derive(Default)]
pub(super) struct Backoff(Mutex<HashMap<IpAddr, Record>>);

impl Backoff {
    /// Counts a try of `address` as wrong before it is judged, so that many at once are no way around.
    ///
    /// Gives how many there are now. Errors: the seconds after which it may try again; then nothing is judged.
    pub fn attempt(&self, address: IpAddr, now: UnixTime) -> Result<u32, i64> {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = network(address);
        if records.len() >= ADDRESSES_MAX && !records.contains_key(&key) {
            records.retain(|_, record| now.0 - record.last < WAIT_S_MAX);
            if records.len() >= ADDRESSES_MAX {
                // So many networks at once are an attack; the secret's length is what stands against it.
                records.clear();
            }
        }
        let record = records.entry(key).or_insert(Record { failures: 0, last: now.0 });
        if now.0 - record.last >= FORGET_S {
            record.failures = 0;
        }
        let left = record.last + record.wait_s() - now.0;
        if left > 0 {
            return Err(left);
        }
        record.failures = record.failures.saturating_add(1);
        record.last = now.0;
        Ok(record.failures)
    }

    /// Forgets the wrong tries of an address that has shown the secret.
    pub fn succeeded(&self, address: IpAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&network(address));
    }
}

/// Who counts as one: an IPv4 address, or the /64 that one IPv6 subscriber has.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn waits_grow_and_end_and_touch_nobody_else() {
        let backoff = Backoff::default();
        for n in 1..=FREE_TRIES {
            assert_eq!(backoff.attempt(HERE, UnixTime(1000)), Ok(n));
        }
        assert_eq!(backoff.attempt(HERE, UnixTime(1000)), Err(1));
        assert_eq!(backoff.attempt(HERE, UnixTime(1001)), Ok(6));
        assert_eq!(backoff.attempt(HERE, UnixTime(1002)), Err(1));
        assert_eq!(backoff.attempt(IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), UnixTime(1002)), Ok(1));
        let mut now = 2000;
        for _ in 0..40 {
            assert!(backoff.attempt(HERE, UnixTime(now)).is_ok(), "never longer than {WAIT_S_MAX} s");
            now += WAIT_S_MAX;
        }
        backoff.succeeded(HERE);
        assert_eq!(backoff.attempt(HERE, UnixTime(now)), Ok(1));
    }
}
