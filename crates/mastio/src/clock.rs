//! The one reader of wall time.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use mastio_core::time::UnixMicros;

/// Tells what time it is.
pub trait Clock: Send + Sync + 'static {
    /// Microseconds since the Unix epoch.
    fn now(&self) -> UnixMicros;
}

/// The machine's clock.
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixMicros {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMicros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX).saturating_add(offset_us()))
    }
}

/// How far the test has set the clock wrong: seconds in the file that `MASTIO_CLOCK_OFFSET_FILE` names.
#[cfg(feature = "crash-points")]
fn offset_us() -> i64 {
    let seconds =
        std::env::var("MASTIO_CLOCK_OFFSET_FILE").ok().and_then(|file| std::fs::read_to_string(file).ok());
    seconds.and_then(|seconds| seconds.trim().parse::<i64>().ok()).map_or(0, |seconds| seconds * 1_000_000)
}

/// None.
#[cfg(not(feature = "crash-points"))]
fn offset_us() -> i64 {
    0
}

/// A clock that stands still until a test moves it.
pub struct ManualClock(AtomicI64);

impl ManualClock {
    /// A clock that shows `now`.
    #[must_use]
    pub fn at(now: UnixMicros) -> Self {
        Self(AtomicI64::new(now.0))
    }

    /// Moves the clock by whole seconds, backwards when negative.
    pub fn advance(&self, seconds: i64) {
        self.0.fetch_add(seconds * 1_000_000, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> UnixMicros {
        UnixMicros(self.0.load(Ordering::SeqCst))
    }
}
