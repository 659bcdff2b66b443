//! The last hour of this process, minute by minute: what the dashboard draws.
//!
//! Prometheus keeps history; this is only for the operator who looks before anything is set up. It is a fixed few
//! kilobytes, and it forgets by itself.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::REQUEST_BUCKETS_S;

/// Minutes that are remembered.
pub const MINUTES: usize = 60;
const BUCKETS: usize = REQUEST_BUCKETS_S.len() + 1;

/// What an agent asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// An access token.
    Tokens,
    /// A call through the gateway.
    Calls,
}

impl Traffic {
    /// What a request to this route asks for. `None`: nothing that is drawn.
    #[must_use]
    pub fn of(route: &str) -> Option<Self> {
        match route {
            "/v1/auth/token" => Some(Self::Tokens),
            "/v1/mcp" => Some(Self::Calls),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Tally {
    answered: u32,
    failed: u32,
    buckets: [u32; BUCKETS],
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// Which minute since the start this slot counts; another one's counts are over.
    minute: u64,
    tokens: Tally,
    calls: Tally,
}

/// One kind of traffic in the last hour.
#[derive(Debug, Clone, PartialEq)]
pub struct Hour {
    /// Requests answered in each minute, oldest first; the last one is not over yet.
    pub answered: [u32; MINUTES],
    /// Those of them that failed for a reason of ours (status 5xx).
    pub failed: [u32; MINUTES],
    /// The time within which half of the answers came. `None` without answers.
    pub median: Option<Duration>,
    /// The time within which 99 of 100 answers came. `None` without answers.
    pub p99: Option<Duration>,
}

impl Hour {
    /// Answers in the whole hour.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.answered.iter().map(|&count| u64::from(count)).sum()
    }
}

pub(super) struct Recent {
    started: Instant,
    slots: Mutex<[Slot; MINUTES]>,
}

impl Recent {
    pub fn new() -> Self {
        Self { started: Instant::now(), slots: Mutex::new([Slot::default(); MINUTES]) }
    }

    fn minute(&self) -> u64 {
        self.started.elapsed().as_secs() / 60
    }

    pub fn note(&self, traffic: Traffic, failed: bool, took: Duration) {
        self.note_at(self.minute(), traffic, failed, took);
    }

    fn note_at(&self, minute: u64, traffic: Traffic, failed: bool, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = REQUEST_BUCKETS_S.iter().position(|&bound| seconds <= bound).unwrap_or(BUCKETS - 1);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = slots.get_mut(place(minute)) else { return };
        if slot.minute != minute {
            *slot = Slot { minute, ..Slot::default() };
        }
        let tally = match traffic {
            Traffic::Tokens => &mut slot.tokens,
            Traffic::Calls => &mut slot.calls,
        };
        tally.answered = tally.answered.saturating_add(1);
        tally.failed = tally.failed.saturating_add(u32::from(failed));
        if let Some(count) = tally.buckets.get_mut(bucket) {
            *count = count.saturating_add(1);
        }
    }

    pub fn hour(&self, traffic: Traffic) -> Hour {
        self.hour_at(self.minute(), traffic)
    }

    fn hour_at(&self, now: u64, traffic: Traffic) -> Hour {
        let slots = *self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hour = Hour { answered: [0; MINUTES], failed: [0; MINUTES], median: None, p99: None };
        let mut buckets = [0_u64; BUCKETS];
        let oldest = (now + 1).saturating_sub(MINUTES as u64);
        for minute in oldest..=now {
            let Some(slot) = slots.get(place(minute)).filter(|slot| slot.minute == minute) else { continue };
            let tally = match traffic {
                Traffic::Tokens => &slot.tokens,
                Traffic::Calls => &slot.calls,
            };
            // Counted from the end, so that a young process draws its few minutes on the right.
            let from_end = usize::try_from(now - minute).unwrap_or(usize::MAX);
            let Some(index) = (MINUTES - 1).checked_sub(from_end) else { continue };
            if let (Some(answered), Some(failed)) = (hour.answered.get_mut(index), hour.failed.get_mut(index))
            {
                (*answered, *failed) = (tally.answered, tally.failed);
            }
            for (sum, count) in buckets.iter_mut().zip(tally.buckets) {
                *sum += u64::from(count);
            }
        }
        hour.median = within(&buckets, 50);
        hour.p99 = within(&buckets, 99);
        hour
    }
}

fn place(minute: u64) -> usize {
    usize::try_from(minute % MINUTES as u64).unwrap_or(0)
}

/// The upper bound of the bucket that holds the given percentile; beyond the last bound, that bound.
fn within(buckets: &[u64; BUCKETS], percent: u64) -> Option<Duration> {
    let total: u64 = buckets.iter().sum();
    if total == 0 {
        return None;
    }
    let wanted = (total * percent).div_ceil(100);
    let mut seen = 0;
    let position = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted
    })?;
    REQUEST_BUCKETS_S.get(position).or(REQUEST_BUCKETS_S.last()).map(|&bound| Duration::from_secs_f64(bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_hour_shows_its_minutes_oldest_first_and_forgets_the_one_before() {
        let recent = Recent::new();
        recent.note_at(3, Traffic::Tokens, false, MS);
        recent.note_at(62, Traffic::Tokens, false, MS);
        recent.note_at(62, Traffic::Tokens, true, MS);
        recent.note_at(62, Traffic::Calls, false, MS);
        let hour = recent.hour_at(62, Traffic::Tokens);
        assert_eq!((hour.answered[0], hour.answered[59], hour.failed[59]), (1, 2, 1));
        assert_eq!(hour.total(), 3);
        // Minute 3 shares its slot with minute 63, and is out of sight by then.
        let hour = recent.hour_at(63, Traffic::Tokens);
        assert_eq!((hour.answered[58], hour.answered[59], hour.total()), (2, 0, 2));
        assert_eq!(recent.hour_at(200, Traffic::Tokens).total(), 0);
    }

    #[test]
    fn percentiles_are_the_bounds_of_their_buckets() {
        let recent = Recent::new();
        assert_eq!(recent.hour_at(0, Traffic::Calls).median, None);
        for _ in 0..98 {
            recent.note_at(0, Traffic::Calls, false, MS);
        }
        recent.note_at(0, Traffic::Calls, false, 40 * MS);
        recent.note_at(0, Traffic::Calls, false, 60_000 * MS);
        let hour = recent.hour_at(0, Traffic::Calls);
        assert_eq!(hour.median, Some(MS));
        assert_eq!(hour.p99, Some(50 * MS));
    }
}
