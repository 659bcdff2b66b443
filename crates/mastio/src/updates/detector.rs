//! The detector: asks every migration at boot, and after every run, whether it is needed.
//!
//! It runs after the identity exists and before the first request. A check that fails or panics does not stop the boot;
//! for a critical migration it halts, because nobody knows whether the state is right. What operators did to a row by
//! SQL is respected: `applied` and `rolled_back` are never proposed again.

use std::sync::Arc;
use std::time::Instant;

use mastio_core::audit::event::EventType;
use serde_json::json;

use super::migration::{Criticality, Migration, Need};
use super::{Findings, UpdateError, Updates, engine, event, registry, store};
use crate::http::error::chain;
use crate::pki::sealing::{clear_state, set_state};

impl Updates {
    /// Runs every check, writes what it found, and makes halt and findings current.
    pub async fn detect(&self) -> Result<(), UpdateError> {
        let began = Instant::now();
        engine::complete_facts(&self.pki).await?;
        let mut findings = Findings::default();
        for migration in registry::all() {
            self.detect_one(migration, &mut findings).await?;
        }
        self.findings.store(Arc::new(findings));
        self.pki.refresh().await?;
        tracing::info!(took_s = began.elapsed().as_secs_f64(), "update_checks_ended");
        Ok(())
    }

    async fn detect_one(
        &self,
        migration: &'static dyn Migration,
        findings: &mut Findings,
    ) -> Result<(), UpdateError> {
        let declaration = migration.declaration();
        let id = declaration.migration_id;
        let view = engine::view(self, id).await?;
        let row_status = view.row_status.clone();
        let checked = tokio::task::spawn_blocking(move || migration.check(&view)).await;
        let now = self.pki.clock.now().seconds();
        let open = matches!(row_status.as_deref(), Some("pending" | "failed"));
        let decided = matches!(row_status.as_deref(), Some("applied" | "rolled_back"));

        let mut tx = self.pki.store.write().await?;
        let keys = ["failed_check", "impossible_check", "put_right"].map(|what| format!("{what}:{id}"));
        let mut before = [None, None, None];
        for (key, before) in keys.iter().zip(&mut before) {
            *before = state(&mut tx, key).await?;
        }
        let mut after = [None, None, None];
        let mut events = Vec::new();
        match checked {
            Err(panicked) => {
                tracing::error!(
                    migration_id = id,
                    error = chain(&panicked),
                    "cullis_proxy_update_check_failed"
                );
                findings.failing.push(id.to_owned());
                if declaration.criticality == Criticality::Critical && !decided {
                    after[0] = Some("the check stopped unexpectedly".to_owned());
                }
            }
            Ok(Need::NotNeeded) if open => {
                store::set_closed(&mut tx, declaration, now).await?;
                events.push(event(EventType::UpdateClosed, "system", id, json!({})));
            }
            // Rolled back, and right all the same: somebody has put it right in another way, so nothing waits for it.
            Ok(Need::NotNeeded) if row_status.as_deref() == Some("rolled_back") => {
                after[2] = Some("not needed".to_owned());
            }
            Ok(Need::NotNeeded) => {}
            Ok(Need::Impossible(refusal)) => {
                tracing::warn!(
                    migration_id = id,
                    reason = refusal.reason,
                    "update_impossible: {}",
                    refusal.message
                );
                if !findings.impossible.iter().any(|reason| reason == refusal.reason) {
                    findings.impossible.push(refusal.reason.to_owned());
                }
                after[1] = Some(refusal.reason.to_owned());
            }
            Ok(Need::Needed { note }) => {
                if let Some(note) = note {
                    tracing::warn!(migration_id = id, "{note}");
                    findings.notes.push((id.to_owned(), note));
                }
                self.propose(&mut tx, migration, open, decided, &mut events).await?;
            }
            Ok(Need::Refused(refusal)) => {
                // One that halts and cannot be applied is for the operator at once; another waits for what comes first.
                if declaration.criticality == Criticality::Critical {
                    tracing::error!(migration_id = id, reason = refusal.reason, "{}", refusal.message);
                } else {
                    tracing::warn!(migration_id = id, reason = refusal.reason, "{}", refusal.message);
                }
                findings.notes.push((id.to_owned(), refusal.message.clone()));
                self.propose(&mut tx, migration, open, decided, &mut events).await?;
            }
        }
        for ((key, was), is) in keys.iter().zip(&before).zip(&after) {
            if was != is {
                match is {
                    Some(reason) => set_state(&mut tx, key, reason).await?,
                    None => clear_state(&mut tx, key).await?,
                }
                tx.bump_epoch().await?;
            }
        }
        tx.commit(&events).await?;
        Ok(())
    }

    async fn propose(
        &self,
        tx: &mut crate::store::WriteTx,
        migration: &'static dyn Migration,
        open: bool,
        decided: bool,
        events: &mut Vec<mastio_core::audit::event::Event>,
    ) -> Result<(), UpdateError> {
        let declaration = migration.declaration();
        if decided {
            return Ok(());
        }
        store::detect(tx, declaration, self.pki.clock.now().seconds()).await?;
        if !open {
            tracing::warn!(migration_id = declaration.migration_id, "update_detected");
            events.push(event(
                EventType::UpdateDetected,
                "system",
                declaration.migration_id,
                json!({ "criticality": declaration.criticality.as_str() }),
            ));
        }
        Ok(())
    }
}

async fn state(tx: &mut crate::store::WriteTx, key: &str) -> Result<Option<String>, UpdateError> {
    Ok(crate::pki::sealing::state(tx, key).await?)
}
