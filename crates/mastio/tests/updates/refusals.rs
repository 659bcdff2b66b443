//! Requests that must be refused with a stable status and without an effect.

use serde_json::json;

use crate::server::{ADMIN_SECRET, Deploy, MIGRATION};
use crate::state::{PkiState, open_runs, status};

#[test]
fn a_wrong_confirmation_is_refused_and_nothing_changes() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    let before = (PkiState::read(&deploy), deploy.rows("SELECT * FROM audit_head"));
    for verb in ["apply", "rollback"] {
        let path = format!("/proxy/updates/{MIGRATION}/{verb}");
        let bodies = [
            "",
            "{}",
            "[]",
            "null",
            "true",
            "1",
            "\"confirm\"",
            "{\"confirm\": \"true\"}",
            "{\"confirm\": 1}",
            "{\"confirm\": false}",
            "{\"confirm\": null}",
            "{\"confirm\": [true]}",
            "{\"Confirm\": true}",
            "{\"confirm\": true",
            "confirm=true",
            "{'confirm': true}",
        ];
        for body in bodies {
            let answer = server.request("POST", &path, Some(ADMIN_SECRET), Some(body));
            assert_eq!(answer.status, 400, "{verb} {body:?}: {answer:?}");
            assert!(answer.detail().is_string(), "{verb} {body:?}: {answer:?}");
        }
        assert_eq!(server.request("POST", &path, Some(ADMIN_SECRET), None).status, 400);
        assert_eq!(server.request("GET", &path, Some(ADMIN_SECRET), None).status, 405);
    }
    assert_eq!((PkiState::read(&deploy), deploy.rows("SELECT * FROM audit_head")), before);
    assert_eq!(status(&deploy).as_deref(), Some("pending"));
    assert_eq!(deploy.count("SELECT COUNT(*) FROM update_runs"), 0);
    assert!(server.halted());
}

#[test]
fn only_the_admin_secret_opens_the_updates() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    let before = PkiState::read(&deploy);
    let confirmed = json!({ "confirm": true }).to_string();
    let routes = [
        ("GET", "/proxy/updates/api".to_owned()),
        ("GET", "/proxy/updates/doctor".to_owned()),
        ("GET", "/proxy/updates/snapshots".to_owned()),
        ("GET", format!("/proxy/updates/{MIGRATION}/plan")),
        ("GET", format!("/proxy/updates/{MIGRATION}/plan?full=true")),
        ("GET", format!("/proxy/updates/{MIGRATION}/rollback-plan")),
        ("GET", format!("/proxy/updates/{MIGRATION}/progress")),
        ("GET", format!("/proxy/updates/{MIGRATION}/events")),
        ("POST", format!("/proxy/updates/{MIGRATION}/apply?dry_run=true")),
        ("POST", format!("/proxy/updates/{MIGRATION}/rollback?dry_run=true")),
        ("POST", format!("/proxy/updates/{MIGRATION}/apply")),
        ("POST", format!("/proxy/updates/{MIGRATION}/rollback")),
    ];
    for (method, path) in &routes {
        let body = (*method == "POST").then_some(confirmed.as_str());
        assert_eq!(server.request(method, path, None, body).status, 401, "{method} {path}");
        for wrong in ["wrong", &ADMIN_SECRET[1..], &format!("{ADMIN_SECRET}x")] {
            assert_eq!(server.request(method, path, Some(wrong), body).status, 403, "{method} {path}");
        }
    }
    assert_eq!(PkiState::read(&deploy), before);
    assert_eq!((status(&deploy).as_deref(), open_runs(&deploy)), (Some("pending"), 0));
}

#[test]
fn an_unknown_update_is_not_found_and_an_unknown_status_is_invalid() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    for id in ["2026-01-01-nothing", "..%2Fapi", "%27%20OR%201%3D1"] {
        for verb in ["apply", "rollback"] {
            let answer = server.post(&format!("/proxy/updates/{id}/{verb}"), &json!({ "confirm": true }));
            assert_eq!(answer.status, 404, "{id} {verb}: {answer:?}");
        }
        for what in ["plan", "rollback-plan", "events", "progress"] {
            assert_eq!(server.get(&format!("/proxy/updates/{id}/{what}")).status, 404, "{id} {what}");
        }
    }
    assert_eq!(server.get("/proxy/updates/api?status=open").status, 400);
    assert_eq!(server.get("/proxy/updates/api?status=applied").json(), json!([]));
    assert_eq!(server.get("/proxy/updates/api?status=pending").json().as_array().unwrap().len(), 2);
}

#[test]
fn an_oversized_body_is_refused() {
    let deploy = Deploy::of("chain5");
    let server = deploy.start();
    let body = json!({ "confirm": true, "padding": "x".repeat(3 * 1024 * 1024) }).to_string();
    for verb in ["apply", "rollback"] {
        let path = format!("/proxy/updates/{MIGRATION}/{verb}");
        let answer = server.request("POST", &path, Some(ADMIN_SECRET), Some(&body));
        assert_eq!(answer.status, 413, "{verb}: {answer:?}");
    }
    assert_eq!(status(&deploy).as_deref(), Some("pending"));
}
