//! `mastio seal rotate` and `mastio adopt --undo`: everything sealed goes under another key or none of it does, and the
//! predecessor's database comes back as it was put aside.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::server::{Deploy, On, PASSPHRASE, run};
use crate::state::{PkiState, dump, text};

const NEW_PASSPHRASE: &str = "another-passphrase-0123456789abcdef";

/// Every sealed value in a stopped deploy's database, with the table it lies in.
fn sealed(deploy: &Deploy) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in dump(deploy) {
        let table = line.split([' ', '(']).next().unwrap_or_default().to_owned();
        for part in line.split("enc:v1:").skip(1) {
            let end =
                part.find(|c: char| !c.is_ascii_alphanumeric() && !"+/=".contains(c)).unwrap_or(part.len());
            found.insert(part[..end].to_owned(), table.clone());
        }
    }
    found
}

/// A deploy with a value in every place that seals one, stopped; and its state before the update that it applied.
fn lived_in(deploy: Deploy) -> (Deploy, PkiState) {
    deploy.start().stop();
    let before = PkiState::read(&deploy);
    let server = deploy.start();
    assert_eq!(server.apply().status, 200);
    let upstream = json!({
        "name": "docs", "endpoint_url": "https://docs.example/mcp", "auth": { "type": "bearer", "secret": "s3cret" },
    });
    let registered = server.post("/v1/admin/mcp-upstreams", &upstream);
    assert_eq!(registered.status, 201, "{registered:?}");
    let created = server.post("/v1/admin/agents", &json!({ "agent_name": "late", "capabilities": [] }));
    assert_eq!(created.status, 201, "{created:?}");
    server.stop();
    (deploy, before)
}

/// Rotates, and asserts that nothing is left that the former key opens.
fn rotate(deploy: &Deploy, arguments: &[&str], variable: Option<&str>) -> Value {
    let former = sealed(deploy);
    let mut command = deploy.mastio(&["seal", "rotate", "--yes", "--json"]);
    command.args(arguments);
    if let Some(passphrase) = variable {
        command.env("MCP_PROXY_DB_ENCRYPTION_KEY", passphrase);
    }
    let output = run(&mut command);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let present = sealed(deploy);
    let tables = |of: &BTreeMap<String, String>| {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for table in of.values() {
            *counts.entry(table.trim_matches('"').to_owned()).or_default() += 1;
        }
        counts
    };
    assert_eq!(tables(&present), tables(&former), "values went or came");
    let left: Vec<_> = former.keys().filter(|value| present.contains_key(*value)).collect();
    assert!(left.is_empty(), "not sealed anew: {left:?} in {:?}", tables(&former));
    let told: BTreeMap<String, u64> = serde_json::from_value(report["values"].clone()).unwrap();
    let told: BTreeMap<_, _> = told.into_iter().filter(|(_, count)| *count > 0).collect();
    assert_eq!(told, tables(&present));
    if deploy.file().exists() {
        // Neither in the pages that were given up.
        let bytes = std::fs::read(deploy.file()).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            !former.keys().any(|value| text.contains(&value[..48.min(value.len())])),
            "still in the file"
        );
    }
    report
}

fn refused_at_boot(deploy: &Deploy, why: &str) {
    let (_, log) = deploy.start_with(&[]).err().expect("it booted under the former key");
    assert!(log.contains(why), "{log}");
}

/// The deploy works under the key it has: signs, and goes back to the state before its update.
fn assert_works(deploy: &Deploy, before: &PkiState) {
    let server = deploy.start();
    assert!(!server.halted());
    let created = server.post("/v1/admin/agents", &json!({ "agent_name": "later", "capabilities": [] }));
    assert_eq!(created.status, 201, "{created:?}");
    assert_eq!(server.rollback().status, 200, "the snapshot's keys do not open");
    let after = PkiState::read(deploy);
    assert_eq!((&after.org_ca, &after.mastio_ca), (&before.org_ca, &before.mastio_ca));
    for (agent_id, leaf) in &before.leaves {
        assert_eq!(&after.leaves[agent_id], leaf);
    }
    server.stop();
    deploy.audit_verifies();
}

fn passphrase_file(folder: &Path, passphrase: &str) -> String {
    let path = folder.join("new-passphrase");
    std::fs::write(&path, format!("{passphrase}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn everything_goes_from_a_file_to_another_and_to_a_passphrase_and_back() {
    let (deploy, before) = lived_in(Deploy::of("chain5"));
    let key_file = deploy.folder().join("seal.key");
    let first = std::fs::read_to_string(&key_file).unwrap();
    let report = rotate(&deploy, &[], None);
    assert_eq!((&report["from"], &report["to"]), (&json!("file"), &json!("file")));
    assert_eq!(report["copies"].as_array().unwrap().len(), 1, "{report}");
    assert_ne!(std::fs::read_to_string(&key_file).unwrap(), first);
    assert_eq!(std::fs::read_to_string(deploy.folder().join("seal.key.former")).unwrap(), first);
    assert_works(&deploy.copy(), &before);
    let old = deploy.copy();
    std::fs::write(old.folder().join("seal.key"), &first).unwrap();
    refused_at_boot(&old, "is not the key that sealed this database");

    // A boot with the passphrase alone names the command.
    let deploy = deploy.with_passphrase();
    refused_at_boot(&deploy, "mastio seal rotate");
    let report = rotate(&deploy, &[], None);
    assert_eq!((&report["from"], &report["to"]), (&json!("file"), &json!("passphrase")));
    assert!(!key_file.exists());
    assert_works(&deploy.copy(), &before);

    let file = passphrase_file(deploy.folder(), NEW_PASSPHRASE);
    rotate(&deploy, &["--new-passphrase-file", &file], None);
    refused_at_boot(&deploy, "is not the passphrase that sealed this database");
    let deploy = deploy.with_passphrase_of(Some(NEW_PASSPHRASE));
    assert_works(&deploy.copy(), &before);

    let unsaid = run(&mut deploy.mastio(&["seal", "rotate", "--yes"]));
    assert_eq!(unsaid.status.code(), Some(2), "{unsaid:?}");
    rotate(&deploy, &["--to-file"], None);
    refused_at_boot(&deploy, "unset it");
    let deploy = deploy.with_passphrase_of(None);
    assert_works(&deploy.copy(), &before);

    // Not beside a server, and the copy of the adoption has gone along every time.
    let server = deploy.start();
    let refused = run(&mut deploy.mastio(&["seal", "rotate", "--yes"]));
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    server.stop();
    let events = "SELECT COUNT(*) FROM audit_events WHERE event_type = 'deploy.seal_rotated'";
    assert_eq!(deploy.count(events), 4);
    let undone = run(&mut deploy.mastio(&["adopt", "--undo", "--yes", "--json"]));
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
}

#[test]
fn what_the_predecessor_encrypted_goes_along_too() {
    let (deploy, before) = lived_in(Deploy::of("py_encrypted").with_passphrase());
    let report = rotate(&deploy, &["--to-file"], None);
    assert!(report["values"]["legacy_pki_archive"].as_u64().unwrap() > 0, "{report}");
    assert_works(&deploy.with_passphrase_of(None), &before);
}

#[test]
fn on_postgresql_every_replica_has_to_be_stopped_and_a_passphrase_follows_another() {
    let (deploy, before) = lived_in(Deploy::of("chain5").on(On::Postgres));
    let file = passphrase_file(deploy.folder(), NEW_PASSPHRASE);
    let server = deploy.start();
    let untouched = deploy.rows("SELECT key, value FROM deploy_state ORDER BY key");
    let refused = run(&mut deploy.mastio(&["seal", "rotate", "--yes", "--new-passphrase-file", &file]));
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("stop every replica"), "{refused:?}");
    assert_eq!(deploy.rows("SELECT key, value FROM deploy_state ORDER BY key"), untouched);
    server.stop();
    let refused = run(&mut deploy.mastio(&["seal", "rotate", "--yes", "--to-file"]));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    rotate(&deploy, &["--new-passphrase-file", &file], None);
    refused_at_boot(&deploy, "is not the passphrase that sealed this database");
    assert_works(&deploy.with_passphrase_of(Some(NEW_PASSPHRASE)), &before);
}

/// Whatever the moment, one of the two keys is in force, and the next start knows which.
#[test]
fn a_crash_at_any_moment_of_a_rotation_leaves_one_of_the_two_keys_in_force() {
    let (deploy, before) = lived_in(Deploy::of("chain5"));
    let former = sealed(&deploy);
    for (point, committed) in [("seal.commit.before", false), ("seal.commit", true), ("seal.finished", true)]
    {
        for passphrase in [None, Some(PASSPHRASE)] {
            let deploy = deploy.copy().with_passphrase_of(passphrase);
            let mut command = deploy.mastio(&["seal", "rotate", "--yes"]);
            let crashed = run(command.env("MASTIO_CRASH_AT", point));
            assert_eq!(crashed.status.code(), None, "{point}: {crashed:?}");
            let present: BTreeSet<String> = sealed(&deploy).into_keys().collect();
            let is_former = |value: &String| former.contains_key(value);
            assert!(
                if committed { !present.iter().any(is_former) } else { present.iter().all(is_former) },
                "{point}: half of it"
            );
            let deploy = if committed { deploy } else { deploy.with_passphrase_of(None) };
            assert_works(&deploy, &before);
            // The copy of the adoption is under the key in force, and no file of a rotation waits any more.
            let waiting: Vec<_> = std::fs::read_dir(deploy.folder())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.ends_with(".sealed.next") || (committed && name == "seal.key.next"))
                .collect();
            assert!(waiting.is_empty(), "{point}: {waiting:?}");
            let undone = run(&mut deploy.mastio(&["adopt", "--undo", "--yes"]));
            assert!(undone.status.success(), "{point}: {}", String::from_utf8_lossy(&undone.stderr));
        }
    }
}

#[test]
fn an_adoption_is_undone_to_the_predecessor_s_rows_and_refused_where_it_cannot_be() {
    let deploy = Deploy::of("py_connector5_pending");
    let theirs = dump(&deploy);
    let nothing = run(&mut deploy.mastio(&["adopt", "--undo", "--yes"]));
    assert_eq!(nothing.status.code(), Some(3), "{nothing:?}");
    let (deploy, _) = lived_in(deploy);
    let undo = |deploy: &Deploy, more: &[&str]| {
        let output = run(deploy.mastio(&["adopt", "--undo", "--json"]).args(more));
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), told, serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default())
    };
    let server = deploy.start();
    assert_eq!(undo(&deploy, &["--yes"]).0, Some(3), "beside a server");
    server.stop();
    let ours = dump(&deploy);
    let untouched = |deploy: &Deploy| assert_eq!(dump(deploy), ours);
    // Nobody has said yes.
    let (code, told, _) = undo(&deploy, &[]);
    assert_eq!(code, Some(2));
    assert!(told.contains("1 agents that have come since"), "{told}");
    untouched(&deploy);

    let name = std::fs::read_dir(deploy.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .find(|name| name.ends_with(".sealed"))
        .unwrap();
    let of = |deploy: &Deploy| deploy.folder().join(&name);
    type Spoil = fn(&Path);
    let spoilt: [(&str, Spoil); 3] = [
        ("names another SHA-256", |path| {
            let mut bytes = std::fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }),
        ("is not beside", |path| std::fs::remove_file(path).unwrap()),
        ("2 copies lie beside", |path| {
            let other = path.to_str().unwrap().replace("before-mastio-2", "before-mastio-1");
            std::fs::copy(path, other).unwrap();
        }),
    ];
    for (what, spoil) in spoilt {
        let deploy = deploy.copy();
        spoil(&of(&deploy));
        let (code, told, _) = undo(&deploy, &["--yes"]);
        assert_eq!(code, Some(3), "{told}");
        assert!(told.contains(what), "{told}");
        untouched(&deploy);
        assert!(!deploy.folder().join("mcp_proxy.db.restoring").exists(), "keys in clear are left");
    }

    let events = deploy.count("SELECT COUNT(*) FROM audit_events");
    let (code, told, report) = undo(&deploy, &["--yes"]);
    assert_eq!(code, Some(0), "{told}");
    assert_eq!((&report["agents_lost"], &report["events_lost"]), (&json!(1), &json!(events)));
    assert_eq!(dump(&deploy), theirs, "the predecessor's rows are not as they were");
    let kept = text(&report, "kept");
    let kept = deploy.folder().join(Path::new(&kept).file_name().unwrap());
    std::fs::rename(deploy.file(), deploy.folder().join("theirs.db")).unwrap();
    std::fs::rename(kept, deploy.file()).unwrap();
    assert_eq!(dump(&deploy), ours, "the present database was not kept whole");
    assert!(!deploy.start().halted());
}
