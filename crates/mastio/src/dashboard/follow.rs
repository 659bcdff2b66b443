//! Pages that follow the audit log: told when it grows, by server-sent events.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Interval};

use super::Dashboard;
use super::error::DashboardError;
use crate::audit;
use crate::health::Health;

/// Pages that may follow at once; each asks the database twice a second.
pub(super) const FOLLOWERS_MAX: usize = 32;
const PERIOD: Duration = Duration::from_millis(500);
/// A stream ends then, and the browser opens it again: so an ended session stops following.
const LIFE: Duration = Duration::from_secs(300);

struct Follower {
    health: Health,
    ticks: Interval,
    until: Instant,
    seen: Option<i64>,
    _place: OwnedSemaphorePermit,
}

impl Follower {
    /// The next sequence number of the head, once it has moved; nothing when the stream is over.
    async fn next(&mut self) -> Option<i64> {
        loop {
            self.ticks.tick().await;
            if Instant::now() >= self.until || self.health.stopping.load(Ordering::SeqCst) {
                return None;
            }
            // A database that is away ends the stream; the browser tries again.
            let head = audit::newest(&self.health.pki.store).await.ok()?;
            if self.seen.replace(head).is_some_and(|seen| seen != head) {
                return Some(head);
            }
        }
    }
}

impl Dashboard {
    /// Sequence numbers of the audit head, each time it has moved.
    ///
    /// Errors: [`DashboardError::TooManyFollowers`].
    pub(super) fn follow_audit(&self) -> Result<impl Stream<Item = i64> + Send + 'static, DashboardError> {
        let place =
            Arc::clone(&self.followers).try_acquire_owned().map_err(|_| DashboardError::TooManyFollowers)?;
        let follower = Follower {
            health: self.health.clone(),
            ticks: tokio::time::interval(PERIOD),
            until: Instant::now() + LIFE,
            seen: None,
            _place: place,
        };
        Ok(futures_util::stream::unfold(follower, |mut follower| async move {
            let head = follower.next().await?;
            Some((head, follower))
        }))
    }
}
