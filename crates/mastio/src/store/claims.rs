//! Provisional claims in Redis or Valkey on identifiers that may be used once, where `MCP_PROXY_REDIS_URL` is set.
//!
//! An identifier is burnt by the commit of what it was used for, in the database ([`super::group`]): that decides. A
//! claim goes before the commit, so that a replay is refused without a transaction, and also where a database has
//! forgotten its last commits (a fail-over to a standby that was behind). It is released when the request was not
//! recorded, and ends with the identifier otherwise.
//!
//! While Redis is away nothing can be claimed, so requests that use up an identifier are refused: replay protection
//! fails closed (design §8). One task keeps the connection. It tries a write every second, drops a connection at its
//! first error and makes a new one, so requests are refused at once and never wait for a Redis that is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use mastio_core::time::UnixTime;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError};
use tokio::sync::Notify;

use super::group::OneUse;

/// How long Redis may take to accept a connection, or to answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// How often Redis is looked at: how late an outage or its end is seen at most.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// A claim outlives a clock that says its identifier has expired already.
const LIFE_S_MIN: i64 = 1;
/// Written to see whether Redis takes writes: one that is read-only or full answers a ping too.
const PROBE_KEY: &str = "mastio:probe";
const PROBE_LIFE_MS: i64 = 1000;

/// A text is not the URL of a Redis.
#[derive(Debug, thiserror::Error)]
#[error("MCP_PROXY_REDIS_URL is not a redis:// or rediss:// URL")]
pub struct NotRedis;

/// Why a claim was not made. Nothing is claimed then.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// An identifier is claimed already.
    #[error("an identifier that may be used once is claimed already")]
    Taken,
    /// Redis is away.
    #[error("Redis cannot be reached")]
    Away,
}

/// The claims of this deploy. Cheap to clone.
#[derive(Clone)]
pub struct Claims(Arc<Inner>);

struct Inner {
    client: Client,
    /// None while Redis is away.
    connection: ArcSwapOption<MultiplexedConnection>,
    /// Told when the connection is dropped.
    dropped: Notify,
    /// Whether the present outage is in the log.
    said: AtomicBool,
}

impl Claims {
    /// Claims in the Redis at `url`. Nobody is connected before [`Self::look`] or [`Self::keep`].
    ///
    /// Errors: [`NotRedis`], which does not repeat the URL: it may hold a password.
    pub fn new(url: &str) -> Result<Self, NotRedis> {
        let client = Client::open(url).map_err(|_| NotRedis)?;
        Ok(Self(Arc::new(Inner {
            client,
            connection: ArcSwapOption::empty(),
            dropped: Notify::new(),
            said: AtomicBool::new(false),
        })))
    }

    /// Whether claims can be made, as of the last look or claim.
    #[must_use]
    pub fn is_reachable(&self) -> bool {
        self.0.connection.load().is_some()
    }

    /// Claims every identifier or none, in one round trip, until it expires.
    ///
    /// Errors: [`ClaimError`]. Where Redis fell silent, or the caller hung up, a claim may stand all the same, until its
    /// identifier expires.
    pub async fn claim(&self, one_use: &[OneUse], now: UnixTime) -> Result<(), ClaimError> {
        let connection = self.0.connection.load_full().ok_or(ClaimError::Away)?;
        let mut pipeline = redis::pipe();
        for one_use in one_use {
            let life_ms = (one_use.expires_at.0 - now.0).max(LIFE_S_MIN).saturating_mul(1000);
            pipeline.cmd("SET").arg(key(one_use)).arg(1).arg("NX").arg("PX").arg(life_ms);
        }
        // `OK` for what is ours now, nothing for what was another's.
        let answers: Result<Vec<Option<String>>, RedisError> =
            pipeline.query_async(&mut connection.as_ref().clone()).await;
        let answers = answers.map_err(|error| {
            self.drop_connection(&connection, &error);
            ClaimError::Away
        })?;
        if answers.iter().all(Option::is_some) {
            return Ok(());
        }
        let ours = one_use.iter().zip(&answers).filter(|(_, answer)| answer.is_some());
        self.release(ours.map(|(one_use, _)| one_use)).await;
        Err(ClaimError::Taken)
    }

    /// Gives claims back that this request has made. Where Redis is away now they end with their identifiers.
    pub async fn release(&self, one_use: impl Iterator<Item = &OneUse>) {
        let keys: Vec<String> = one_use.map(key).collect();
        let Some(connection) = self.0.connection.load_full().filter(|_| !keys.is_empty()) else { return };
        let released: Result<(), RedisError> =
            redis::cmd("DEL").arg(keys).query_async(&mut connection.as_ref().clone()).await;
        if let Err(error) = released {
            self.drop_connection(&connection, &error);
        }
    }

    /// Looks at Redis every second, and at once when a connection was dropped. Never ends.
    pub async fn keep(&self) {
        let mut ticks = tokio::time::interval(LOOK_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.0.dropped.notified() => {}
            }
            self.look().await;
        }
    }

    /// Connects where there is no connection, and tries the one there is.
    pub async fn look(&self) {
        if let Some(connection) = self.0.connection.load_full() {
            if let Err(error) = probe(&connection).await {
                self.drop_connection(&connection, &error);
            }
            return;
        }
        match self.connect().await {
            Ok(connection) => {
                self.0.connection.store(Some(Arc::new(connection)));
                if self.0.said.swap(false, Ordering::SeqCst) {
                    tracing::info!("redis_reachable");
                }
            }
            Err(error) => self.say_once(&error),
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(TIMEOUT))
            .set_response_timeout(Some(TIMEOUT));
        let connection = self.0.client.get_multiplexed_async_connection_with_config(&config).await?;
        probe(&connection).await?;
        Ok(connection)
    }

    fn drop_connection(&self, failed: &Arc<MultiplexedConnection>, error: &RedisError) {
        let failed = Some(Arc::clone(failed));
        let was = self.0.connection.compare_and_swap(&failed, None);
        // Another request may have been first, and the connection be a new one already.
        if was.as_ref().map(Arc::as_ptr) == failed.as_ref().map(Arc::as_ptr) {
            self.say_once(error);
            self.0.dropped.notify_one();
        }
    }

    /// Only what kind of error it was: what a server answers may repeat what it was sent, a password too.
    fn say_once(&self, error: &RedisError) {
        if !self.0.said.swap(true, Ordering::SeqCst) {
            tracing::error!(
                kind = ?error.kind(),
                refused = error.is_connection_refusal(),
                timed_out = error.is_timeout(),
                "redis_unreachable: requests that use up an identifier are refused until it is back"
            );
        }
    }
}

async fn probe(connection: &MultiplexedConnection) -> Result<(), RedisError> {
    let mut set = redis::cmd("SET");
    set.arg(PROBE_KEY).arg(1).arg("PX").arg(PROBE_LIFE_MS);
    set.query_async(&mut connection.clone()).await
}

fn key(one_use: &OneUse) -> String {
    format!("mastio:used:{}", one_use.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_of_redis_and_valkey_are_taken() {
        for url in
            ["redis://:pw@redis:6379/0", "rediss://redis", "valkey://v", "redis+unix:///run/r.sock?db=1"]
        {
            assert!(Claims::new(url).is_ok(), "{url}");
        }
        for url in ["http://redis", "redis", "redis://", "rediss://redis/#secure", "redis://redis/zero"] {
            assert!(Claims::new(url).is_err(), "{url}");
        }
    }
}
