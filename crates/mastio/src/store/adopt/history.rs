//! The predecessor's two audit chains, verified before they are bound to ours.
//!
//! A chain that breaks is adopted all the same: it is the only history there is. The break goes into the event that
//! adopts it, so that nobody can say later that it happened here.

use mastio_core::audit::legacy::{AuditLogVerifier, LocalAuditVerifier};
use serde_json::{Map, Value, json};

use super::store;
use crate::store::{Query, StoreError};

/// What the adopting event says of one table.
pub(super) struct History {
    /// Rows, last sequence number and hash, and the verdict.
    pub details: Value,
    /// Where the chain breaks, if it does.
    pub fault: Option<String>,
}

fn verdict(mut details: Map<String, Value>, fault: Option<String>) -> History {
    match &fault {
        Some(fault) => details.insert("break".to_owned(), json!(fault)),
        None => details.insert("verified".to_owned(), json!(true)),
    };
    History { details: Value::Object(details), fault }
}

/// A row that is in no chain, and that the predecessor would not have written.
fn misplaced(table: &str, row: Option<(i64, String)>) -> Option<String> {
    row.map(|(id, found)| {
        format!("{table} row id {id} breaks the chain: its chain_seq is {found} and not a number")
    })
}

/// Verifies `audit_log`.
pub(super) async fn audit_log(tx: &mut impl Query) -> Result<History, StoreError> {
    let mut verifier = AuditLogVerifier::new();
    let mut after = (i64::MIN, i64::MIN);
    // The gap that such a row leaves is found as well, and says less.
    let mut fault = misplaced("audit_log", store::audit_log_misplaced(tx).await?);
    'pages: loop {
        let page = store::audit_log_page(tx, after).await?;
        let Some(last) = page.last() else { break };
        after = (last.chain_seq.unwrap_or(i64::MAX), last.id);
        for row in &page {
            if let Err(broken) = verifier.push(row) {
                fault.get_or_insert(broken.to_string());
                break 'pages;
            }
        }
    }
    let (rows, outside) = store::audit_log_size(tx).await?;
    let mut details = Map::new();
    details.insert("rows".to_owned(), json!(rows));
    details.insert("outside".to_owned(), json!(outside));
    if let Some((sequence, hash)) = store::audit_log_last(tx).await? {
        details.insert("last_seq".to_owned(), json!(sequence));
        details.insert("last_hash".to_owned(), json!(hash));
    }
    Ok(verdict(details, fault))
}

/// Verifies `local_audit`, one chain for each org.
pub(super) async fn local_audit(tx: &mut impl Query) -> Result<History, StoreError> {
    let mut verifier = LocalAuditVerifier::new();
    let mut fault = misplaced("local_audit", store::local_audit_misplaced(tx).await?);
    let mut chains = Vec::new();
    for org_id in store::local_audit_orgs(tx).await? {
        let mut after = (i64::MIN, i64::MIN);
        'pages: loop {
            let page = store::local_audit_page(tx, org_id.as_deref(), after).await?;
            let Some(last) = page.last() else { break };
            after = (last.chain_seq.unwrap_or(i64::MAX), last.id);
            for row in &page {
                if let Err(broken) = verifier.push(row) {
                    fault.get_or_insert(broken.to_string());
                    break 'pages;
                }
            }
        }
        if let Some((sequence, hash)) = store::local_audit_last(tx, org_id.as_deref()).await? {
            chains.push(json!({ "org_id": org_id, "last_seq": sequence, "last_hash": hash }));
        }
    }
    let (rows, outside) = store::local_audit_size(tx).await?;
    let mut details = Map::new();
    details.insert("rows".to_owned(), json!(rows));
    details.insert("outside".to_owned(), json!(outside));
    details.insert("chains".to_owned(), json!(chains));
    Ok(verdict(details, fault))
}
