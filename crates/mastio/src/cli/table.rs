//! Answers of the HTTP API as tables for people. What is not there is left blank, never made up.

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

use crate::config::Resolved;

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    if !header.is_empty() {
        table.set_header(header);
    }
    table
}

/// A value in one cell.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{name}: {}", cell(value)))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}

fn rows(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// Settings in force.
pub(super) fn settings(resolved: &Resolved) -> String {
    let mut table = table(&["setting", "value", "from"]);
    for in_force in &resolved.settings {
        let shown = in_force.shown.clone().unwrap_or_default();
        table.add_row([in_force.setting.name.to_owned(), shown, in_force.origin.to_string()]);
    }
    let mut text = table.to_string();
    if !resolved.unused.is_empty() {
        text.push_str(&format!("\nset, and not used by this program: {}", resolved.unused.join(", ")));
    }
    text
}

/// The list of updates.
pub(super) fn updates(list: &Value) -> String {
    let mut table = table(&["migration", "status", "criticality", "affects", "detected", "description"]);
    let mut notes = String::new();
    for row in rows(list) {
        table.add_row(
            ["migration_id", "status", "criticality", "affects_enrollments", "detected_at", "description"]
                .map(|field| cell(&row[field])),
        );
        for (field, words) in [
            ("applied_at", "applied"),
            ("rolled_back_at", "rolled back"),
            ("error", "error"),
            ("note", "note"),
            ("requires", "requires"),
            ("not_covered", "agents left alone"),
        ] {
            if !row[field].is_null() {
                notes.push_str(&format!("\n{} {words}: {}", cell(&row["migration_id"]), cell(&row[field])));
            }
        }
    }
    if rows(list).next().is_none() {
        return "no such updates: nothing waits here".to_owned();
    }
    format!("{table}{notes}")
}

/// What an update would change.
pub(super) fn plan(plan: &Value) -> String {
    let mut text = format!("plan of {}, verified; nothing was changed\n", cell(&plan["migration_id"]));
    if let Some(note) = plan["note"].as_str() {
        text.push_str(&format!("{note}\n"));
    }
    let mut certificates = table(&["certificate", "", "issuer", "public key", "pathLen", "not after"]);
    let pairs = std::iter::once(&plan["org_ca"]).chain(rows(&plan["samples"]));
    for pair in pairs.filter(|pair| pair.is_array()) {
        for (when, side) in [("before", &pair[0]), ("after", &pair[1])] {
            let key: String = cell(&side["spki_sha256"]).chars().take(16).collect();
            certificates.add_row([
                cell(&side["subject"]),
                when.to_owned(),
                cell(&side["issuer"]),
                key,
                cell(&side["path_len"]),
                cell(&side["not_after"]),
            ]);
        }
    }
    let mut counts = table(&[]);
    counts.add_row(["leaves re-signed".to_owned(), cell(&plan["leaves"])]);
    counts.add_row(["agents left alone".to_owned(), cell(&plan["not_covered"])]);
    counts.add_row(["values that change".to_owned(), cell(&plan["cells"])]);
    format!("{text}{certificates}\n{counts}")
}

/// The end of an apply or a rollback.
pub(super) fn done(answer: &Value) -> String {
    let at = ["applied_at", "rolled_back_at"].map(|field| cell(&answer[field])).concat();
    format!("{} {} at {at}", cell(&answer["migration_id"]), cell(&answer["status"]).replace('_', " "))
}

/// Audit events.
pub(super) fn events(list: &Value) -> String {
    let mut table = table(&["seq", "time", "event", "actor", "details"]);
    for row in rows(list) {
        table.add_row(["seq", "timestamp", "event_type", "actor", "details"].map(|field| cell(&row[field])));
    }
    if rows(list).next().is_none() { "no such events".to_owned() } else { table.to_string() }
}

/// Any object, a field a row.
pub(super) fn fields(answer: &Value) -> String {
    let mut table = table(&[]);
    for (name, value) in answer.as_object().into_iter().flatten() {
        table.add_row([name.replace('_', " "), cell(value)]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_update_shows_its_fields_and_whom_it_leaves_alone() {
        let text = updates(&json!([{
            "migration_id": "2026-04-23-org-ca-pathlen-1", "description": "Rotate the Org CA", "status": "pending",
            "migration_type": "cert-schema", "criticality": "critical", "affects_enrollments": ["connector"],
            "detected_at": "2026-04-23T19:04:21Z", "not_covered": { "byoca": 1 },
        }]));
        for part in
            ["2026-04-23-org-ca-pathlen-1", "pending", "critical", "connector", "agents left alone: byoca: 1"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(updates(&json!([])).starts_with("no such updates"));
    }

    #[test]
    fn a_plan_shows_before_and_after() {
        let side = |path_len: u32| json!({ "subject": "CN=acme CA", "issuer": "CN=acme CA", "spki_sha256": "ab", "not_after": "2036-01-01T00:00:00Z", "path_len": path_len });
        let text = plan(&json!({
            "migration_id": "x", "note": null, "cells": ["proxy_config/org_ca_cert/value"], "leaves": 5,
            "not_covered": {}, "org_ca": [side(0), side(1)], "samples": [],
        }));
        for part in ["before", "after", "proxy_config/org_ca_cert/value", "leaves re-signed"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn the_end_of_an_apply_is_one_line() {
        let answer =
            json!({ "migration_id": "x", "status": "rolled_back", "rolled_back_at": "2026-04-23T19:08:12Z" });
        assert_eq!(done(&answer), "x rolled back at 2026-04-23T19:08:12Z");
    }
}
