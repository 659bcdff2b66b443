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

/// The list of agents.
pub(super) fn agents(list: &Value) -> String {
    if rows(list).next().is_none() {
        return "no such agents".to_owned();
    }
    let mut table = table(&["agent", "name", "enrollment", "active", "capabilities", "certificate ends"]);
    for row in rows(list) {
        let [id, name, enrollment, active, capabilities] =
            ["agent_id", "display_name", "enrollment", "is_active", "capabilities"]
                .map(|field| cell(&row[field]));
        table.add_row([id, name, enrollment, active, capabilities, cell(&row["certificate"]["not_after"])]);
    }
    table.to_string()
}

/// A list as a table of these columns, `(header, member)`; `none` where it is empty.
fn list(of: &Value, columns: &[(&str, &str)], none: &str) -> String {
    if rows(of).next().is_none() {
        return none.to_owned();
    }
    let mut table = table(&columns.iter().map(|(header, _)| *header).collect::<Vec<_>>());
    for row in rows(of) {
        table.add_row(columns.iter().map(|(_, member)| cell(&row[*member])));
    }
    table.to_string()
}

/// MCP servers.
pub(super) fn upstreams(of: &Value) -> String {
    let columns = [
        ("upstream", "name"),
        ("endpoint", "endpoint_url"),
        ("credential", "auth_type"),
        ("enabled", "enabled"),
        ("revision", "revision"),
        ("last looked at", "discovered_at"),
        ("failed with", "discovery_error"),
    ];
    list(of, &columns, "no MCP server: register one with `mastio upstreams add`")
}

/// One MCP server with its tools.
pub(super) fn upstream(of: &Value) -> String {
    let mut server = of.clone();
    let tools = server.as_object_mut().and_then(|server| server.remove("tools")).unwrap_or_default();
    format!("{}\n{}", fields(&server), self::tools(&tools))
}

/// A server that was registered, and what was found there.
pub(super) fn added_upstream(of: &Value) -> String {
    let name = cell(&of["name"]);
    match of["found"]["new"].as_array() {
        Some(new) => {
            let names = cell(&Value::Array(new.clone()));
            format!(
                "{name} is registered and offers {} tools: {names}\nnext: mastio tools approve TOOL",
                new.len()
            )
        }
        None => format!(
            "{name} is registered, but looking at it failed: {}\nnext: mastio upstreams refresh {name}",
            cell(&of["discovery_error"])
        ),
    }
}

/// Tools of MCP servers.
pub(super) fn tools(of: &Value) -> String {
    let columns = [
        ("tool", "name"),
        ("upstream", "upstream"),
        ("standing", "standing"),
        ("imitates", "imitates"),
        ("capability", "required_capability"),
        ("calls a minute", "calls_per_minute"),
        ("approved by", "approved_by"),
    ];
    list(of, &columns, "no tools")
}

/// One tool: what its server says now, and how that differs from what was approved. A definition is data: it is shown as
/// JSON, which escapes what could move a terminal's cursor.
pub(super) fn tool(of: &Value) -> String {
    let mut about = of.clone();
    let found = about.as_object_mut().map(|about| {
        about.remove("definition");
        about.remove("differences");
        about.remove("found")
    });
    let mut text = fields(&about);
    let found = found.flatten().unwrap_or_default();
    text.push_str("\nwhat the server says now:\n");
    text.push_str(&plain(&serde_json::to_string_pretty(&found).unwrap_or_default()));
    if !of["definition"].is_null() {
        text.push_str(if rows(&of["differences"]).next().is_none() {
            "\nwhich is what was approved"
        } else {
            "\nwhich differs from what was approved:"
        });
    }
    for difference in rows(&of["differences"]) {
        let (path, before, after) = (&difference["path"], &difference["before"], &difference["after"]);
        text.push_str(&plain(&format!("\n  {}: {before} became {after}", cell(path))));
    }
    text
}

/// Without what could move the cursor or turn the writing: JSON escapes the control characters below U+0020 alone.
fn plain(text: &str) -> String {
    text.chars()
        .map(|character| match character {
            '\n' => character,
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            control if control.is_control() => '\u{fffd}',
            other => other,
        })
        .collect()
}

/// Calls of which something is kept.
pub(super) fn evidence(of: &Value) -> String {
    let columns = [
        ("call", "evidence_id"),
        ("tool", "tool"),
        ("agent", "agent_id"),
        ("called", "called_at"),
        ("kept until", "expires_at"),
        ("bytes of arguments", "arguments_bytes"),
        ("of the result", "result_bytes"),
    ];
    list(
        of,
        &columns,
        "nothing is kept: set a retention with `mastio tools limit TOOL --retention-days DAYS`",
    )
}

/// Who may call what, and why.
pub(super) fn access(of: &Value) -> String {
    let columns = [
        ("agent", "agent_id"),
        ("tool", "tool"),
        ("may", "allowed"),
        ("why", "reason"),
        ("policies", "policies"),
        ("depends on arguments", "depends_on_arguments"),
    ];
    list(of, &columns, "nobody is bound to anything")
}

const POLICY_COLUMNS: [(&str, &str); 6] = [
    ("policy", "name"),
    ("version", "version"),
    ("mode", "mode"),
    ("tool", "tool"),
    ("saved", "saved_at"),
    ("by", "saved_by"),
];

/// Policies.
pub(super) fn policies(of: &Value) -> String {
    list(of, &POLICY_COLUMNS, "no policies: what is bound is allowed")
}

/// Every version of one policy, and the text of the newest.
pub(super) fn policy_versions(of: &Value) -> String {
    format!("{}\n{}", list(of, &POLICY_COLUMNS, "no such policy"), cell(&of[0]["text"]).trim_end())
}

/// What an import changes, and what waits.
pub(super) fn config_plan(of: &Value) -> String {
    let mut text = String::new();
    for change in rows(&of["changes"]) {
        let [action, kind, name] = ["action", "kind", "name"].map(|field| cell(&change[field]));
        text.push_str(&format!("{action} {kind} {name}\n"));
        for difference in rows(&change["differences"]).filter(|_| action == "change" || action == "approve") {
            let (before, after) = (cell(&difference["before"]), cell(&difference["after"]));
            text.push_str(&format!("  {}: {before} becomes {after}\n", cell(&difference["path"])));
        }
    }
    if text.is_empty() {
        text.push_str("nothing to change\n");
    }
    for wait in rows(&of["waits"]) {
        let [kind, name, why] = ["kind", "name", "why"].map(|field| cell(&wait[field]));
        text.push_str(&format!("waits: {kind} {name}: {why}\n"));
    }
    text.push_str(&format!("plan {}", cell(&of["plan_digest"])));
    text
}

/// The list of revoked certificates.
pub(super) fn revoked(list: &Value) -> String {
    if rows(list).next().is_none() {
        return "no certificate is revoked".to_owned();
    }
    let mut table = table(&["agent", "serial", "since", "reason", "by", "would end"]);
    for row in rows(list) {
        table.add_row(
            ["agent_id", "serial", "revoked_at", "reason", "revoked_by", "not_after"]
                .map(|field| cell(&row[field])),
        );
    }
    table.to_string()
}

/// The trust overlap.
pub(super) fn overlap(overlap: &Value) -> String {
    if overlap["overlap"] != true {
        return "no trust overlap: no Org CA is retiring".to_owned();
    }
    let mut anchors = table(&["retiring Org CA", "since", "not after", "key"]);
    for anchor in rows(&overlap["retiring"]) {
        anchors.add_row([
            cell(&anchor["certificate"]["subject"]),
            cell(&anchor["since"]),
            cell(&anchor["certificate"]["not_after"]),
            cell(&anchor["key"]),
        ]);
    }
    let agents = &overlap["agents"];
    let mut text = format!(
        "{anchors}\n{} active agents: {} present a former leaf, {} the present one, {} have not been seen",
        cell(&agents["active"]),
        cell(&agents["on_old_leaf"]),
        cell(&agents["on_present_leaf"]),
        cell(&agents["not_seen"]),
    );
    for leaf in rows(&overlap["on_old_leaf"]) {
        let (agent_id, seen_at) = (cell(&leaf["agent_id"]), cell(&leaf["seen_at"]));
        text.push_str(&format!("\n  {agent_id} presented a former leaf at {seen_at}"));
    }
    for agent in rows(&overlap["blocking"]["agents"]) {
        text.push_str(&format!(
            "\nblocks: {} ({}): {}",
            cell(&agent["agent_id"]),
            cell(&agent["enrollment"]),
            cell(&agent["next"])
        ));
    }
    for unseen in rows(&overlap["cannot_be_seen"]) {
        text.push_str(&format!("\ncannot be seen: {}", cell(unseen)));
    }
    let settling = &overlap["settling"];
    if rows(&settling["ends_rollback_of"]).next().is_some() {
        text.push_str(&format!("\nno way back any more from: {}", cell(&settling["ends_rollback_of"])));
    }
    if !settling["refused"].is_null() {
        text.push_str(&format!("\nsettling is refused: {}", cell(&settling["refused"]["message"])));
    }
    text
}

/// The list of operators.
pub(super) fn operators(list: &Value) -> String {
    let mut table = table(&["operator", "role", "last seen", "added", "by", "deactivated"]);
    for row in rows(list) {
        let mut cells = ["name", "role", "last_seen_at", "created_at", "created_by", "deactivated_at"]
            .map(|field| cell(&row[field]));
        if row["shared_secret"] == true {
            cells[3] = "the shared secret".to_owned();
        }
        table.add_row(cells);
    }
    table.to_string()
}

/// The list of requests for an identity.
pub(super) fn enrollments(list: &Value) -> String {
    if rows(list).next().is_none() {
        return "no such enrollments".to_owned();
    }
    let mut table = table(&["session", "status", "requester", "email", "from", "key", "ends"]);
    for row in rows(list) {
        table.add_row(
            [
                "session_id",
                "status",
                "requester_name",
                "requester_email",
                "source",
                "pubkey_fingerprint",
                "expires_at",
            ]
            .map(|field| cell(&row[field])),
        );
    }
    table.to_string()
}

/// An operator's secret, which is shown this once.
pub(super) fn issued(issued: &Value) -> String {
    format!(
        "{} ({}): {}\nThis secret is shown once. Over HTTP: {}\nOn the command line: MCP_PROXY_OPERATOR_CREDENTIAL={}:{}",
        cell(&issued["name"]),
        cell(&issued["role"]),
        cell(&issued["secret"]),
        cell(&issued["header"]),
        cell(&issued["name"]),
        cell(&issued["secret"]),
    )
}

/// Plans that wait for another operator, or have been run.
pub(super) fn proposals(list: &Value) -> String {
    if rows(list).next().is_none() {
        return "no proposals".to_owned();
    }
    let mut table =
        table(&["proposal", "direction", "status", "proposed by", "approved by", "until", "plan digest"]);
    for row in rows(list) {
        table.add_row(
            ["proposal_id", "direction", "status", "proposed_by", "approved_by", "expires_at", "plan_digest"]
                .map(|field| cell(&row[field])),
        );
    }
    table.to_string()
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
            ("remedy", "next step"),
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

/// What an update or its rollback would change.
pub(super) fn plan(plan: &Value) -> String {
    let back = plan["direction"] == "rollback";
    let what = if back { "rollback plan" } else { "plan" };
    let mut text = format!("{what} of {}, verified; nothing was changed\n", cell(&plan["migration_id"]));
    if let Some(note) = plan["note"].as_str() {
        text.push_str(&format!("{note}\n"));
    }
    let mut certificates = table(&["certificate", "", "issuer", "key", "pathLen", "not after"]);
    let pairs = std::iter::once(&plan["org_ca"]).chain(rows(&plan["samples"]));
    for pair in pairs.filter(|pair| pair.is_array()) {
        for (when, side) in [("before", &pair[0]), ("after", &pair[1])] {
            let key: String = cell(&side["spki_sha256"]).chars().take(16).collect();
            certificates.add_row([
                cell(&side["subject"]),
                when.to_owned(),
                cell(&side["issuer"]),
                format!("{} {key}", cell(&side["key"])).trim().to_owned(),
                cell(&side["path_len"]),
                cell(&side["not_after"]),
            ]);
        }
    }
    let mut counts = table(&[]);
    let mut count = |name: &str, value: String| {
        if !value.is_empty() {
            counts.add_row([name.to_owned(), value]);
        }
    };
    count(if back { "leaves set back" } else { "leaves re-signed" }, cell(&plan["leaves"]));
    count("leaves carried back", cell(&plan["carry_back"]));
    count("snapshot taken", cell(&plan["snapshot"]["taken_at"]));
    count("agents left alone", cell(&plan["not_covered"]));
    count("values that change", cell(&plan["cells"]).replace(", ", "\n"));
    for (name, side) in [("halt before", "before"), ("halt after", "after")] {
        let halt = &plan["halt"][side];
        let none = halt.as_array().is_some_and(Vec::is_empty);
        count(name, if none { "none".to_owned() } else { cell(halt).replace(", ", "\n") });
    }
    if let Some(seconds) = plan["estimate"]["seconds"].as_u64() {
        let rate = plan["estimate"]["leaves_per_second"].as_u64();
        let rate = rate.map(|rate| format!(", {rate} leaves a second")).unwrap_or_default();
        count("computing takes about", format!("{seconds} s{rate}"));
    }
    count("plan digest", cell(&plan["plan_digest"]));
    let mut reasons = String::new();
    for left in rows(&plan["left_alone"]) {
        reasons.push_str(&format!(
            "\n{} agents ({}) are left alone: {}. Next: {}.",
            cell(&left["enrollment"]),
            cell(&left["agents"]),
            cell(&left["why"]),
            cell(&left["next"]),
        ));
    }
    format!("{text}{certificates}\n{counts}{reasons}")
}

/// One line of a full plan.
pub(super) fn change(line: &Value) -> String {
    let side = |side: &Value| match side.as_object() {
        Some(certificate) => ["issuer", "serial"]
            .iter()
            .filter_map(|field| certificate.get(*field))
            .map(cell)
            .chain(side["path_len"].as_u64().map(|length| format!("pathLen={length}")))
            .collect::<Vec<_>>()
            .join(" "),
        None if side.is_null() => "nothing".to_owned(),
        None => cell(side),
    };
    match line["kind"].as_str() {
        Some("plan") => plan(&line["plan"]),
        Some("error") => String::new(),
        kind => {
            let subject = cell(&line["agent_id"]) + &cell(&line["cell"]);
            let how = if kind == Some("carried_back") { " (carried back)" } else { "" };
            format!("{subject}{how}: {} -> {}", side(&line["before"]), side(&line["after"]))
        }
    }
}

/// What the doctor found.
pub(super) fn doctor(report: &Value) -> String {
    let mut text = String::new();
    for finding in rows(&report["findings"]) {
        let mark = if finding["needs_operator"] == true { "needs you" } else { "note" };
        text.push_str(&format!(
            "{mark}: {} ({})\n  what: {}\n  next: {}\n",
            cell(&finding["subject"]),
            cell(&finding["finding"]).replace('_', " "),
            cell(&finding["what"]),
            cell(&finding["next"]),
        ));
    }
    if report["healthy"] == true {
        text.push_str("all is well");
    }
    text.trim_end().to_owned()
}

/// The snapshots.
pub(super) fn snapshots(list: &Value) -> String {
    let mut table =
        table(&["migration", "state", "taken", "age", "rows", "size", "digest", "run", "verifies"]);
    for row in rows(list) {
        let age = row["age_s"].as_u64().map_or_else(String::new, |seconds| match seconds {
            0..7200 => format!("{} min", seconds / 60),
            7200..172_800 => format!("{} h", seconds / 3600),
            _ => format!("{} d", seconds / 86_400),
        });
        let size = format!("{} KiB", row["bytes"].as_u64().unwrap_or(0).div_ceil(1024));
        // Enough to tell two apart; `--json` has the whole.
        let digest: String = cell(&row["digest"]).chars().take(19).collect();
        let sound = if row["sound"] == true {
            "yes".to_owned()
        } else {
            format!("no, damaged at {}", cell(&row["damaged_at"]))
        };
        let [migration, state, taken, count, run] =
            ["migration_id", "state", "taken_at", "rows", "run_id"].map(|field| cell(&row[field]));
        table.add_row([migration, state, taken, age, count, size, digest, run, sound]);
    }
    if rows(list).next().is_none() {
        "no snapshots: nothing can be rolled back".to_owned()
    } else {
        table.to_string()
    }
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
    fn a_rollback_plan_says_what_comes_back_and_why_agents_are_left_alone() {
        let text = plan(&json!({
            "migration_id": "x", "direction": "rollback", "leaves": 4, "carry_back": 1, "cells": [],
            "snapshot": { "taken_at": "2026-04-23T19:08:12Z" }, "halt": { "before": [], "after": [] },
            "left_alone": [{ "enrollment": "byoca", "agents": 2, "why": "the owner holds the key", "next": "enroll" }],
        }));
        for part in ["rollback plan of x", "carried back", "2026-04-23T19:08:12Z", "the owner holds the key"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn the_doctor_names_what_and_next() {
        let finding = json!({
            "finding": "run_of_a_dead_process", "subject": "01", "needs_operator": true, "what": "a", "next": "b",
        });
        let text = doctor(&json!({ "healthy": false, "findings": [finding] }));
        assert_eq!(text, "needs you: 01 (run of a dead process)\n  what: a\n  next: b");
        assert_eq!(doctor(&json!({ "healthy": true, "findings": [] })), "all is well");
    }

    #[test]
    fn the_end_of_an_apply_is_one_line() {
        let answer =
            json!({ "migration_id": "x", "status": "rolled_back", "rolled_back_at": "2026-04-23T19:08:12Z" });
        assert_eq!(done(&answer), "x rolled back at 2026-04-23T19:08:12Z");
    }
}
