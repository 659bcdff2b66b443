//! Which certificate each agent has presented last, while a trust overlap runs: what an operator asks before ending it.
//!
//! Noted in memory, a certificate that is not the present one at most once a minute and the present one once an hour,
//! and written in groups by a job. A process that ends loses the last few seconds.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use mastio_core::time::UnixTime;

use super::{Agent, ProvenAgent};

/// Between two notes of an agent's former and of its present certificate.
const NOTE_S: [i64; 2] = [60, 3600];
/// Agents that are remembered at most; beyond, everybody is noted anew.
const AGENTS_MAX: usize = 200_000;
/// Notes that wait for the job at most; beyond, they are dropped, and the next request notes again.
const WAITING_MAX: usize = 100_000;

/// A certificate that an agent has presented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sighting {
    /// The agent.
    pub agent_id: String,
    /// SHA-256 of the certificate's DER, lowercase hex.
    pub fingerprint: String,
    /// When, in Unix seconds.
    pub seen_at: i64,
}

/// What has been presented since the job last came by.
#[derive(Default)]
pub(super) struct Sightings {
    /// When each agent's former and present certificate was noted last.
    noted: Mutex<HashMap<String, [i64; 2]>>,
    waiting: Mutex<Vec<Sighting>>,
}

impl Sightings {
    /// Notes what `proven` has presented, unless that was noted a moment ago.
    pub fn note(&self, proven: &ProvenAgent, now: UnixTime) {
        let kind = usize::from(is_present(&proven.agent, proven));
        let agent_id = &proven.agent.agent_id;
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        match noted.get_mut(agent_id) {
            Some(at) if now.0 - at[kind] < NOTE_S[kind] => return,
            Some(at) => at[kind] = now.0,
            None => {
                if noted.len() >= AGENTS_MAX {
                    noted.clear();
                }
                let mut at = [i64::MIN / 2; 2];
                at[kind] = now.0;
                noted.insert(agent_id.clone(), at);
            }
        }
        drop(noted);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < WAITING_MAX {
            let fingerprint = proven.certificate.fingerprint();
            waiting.push(Sighting { agent_id: agent_id.clone(), fingerprint, seen_at: now.0 });
        }
    }

    /// Hands over what has been noted.
    pub fn take(&self) -> Vec<Sighting> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn is_present(agent: &Agent, proven: &ProvenAgent) -> bool {
    agent.leaf.as_ref().is_some_and(|leaf| leaf.der() == proven.certificate.der())
}
