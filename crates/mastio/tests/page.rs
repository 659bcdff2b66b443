//! The page “Apply updates”, line by line, against the running binary: each statement is quoted here and either proven
//! by a named step or listed as owed to a later issue. The quotes, joined, are the page: nothing can be passed over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod harness;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::sdk::{Agent, Python, TOOL, Upstream, mint};
use harness::{
    ADMIN_SECRET, Database, Deploy, MIGRATION, certificates, jq, openssl, required_environment, run, shared,
    wait_for,
};
use serde_json::{Value, json};
use tempfile::TempDir;

// The commands of the page, as printed.
const HEALTHZ: &str = "curl -sk https://localhost:9443/healthz | jq";
const SECRET: &str = r#"ADMIN_SECRET="$(grep ^MCP_PROXY_ADMIN_SECRET proxy.env | cut -d= -f2)""#;
const LIST: &str = r#"curl -sk https://localhost:9443/proxy/updates/api \
-H "X-Admin-Secret: $ADMIN_SECRET" | jq"#;
const VARIABLES: &str = r#"MASTIO="https://localhost:9443"
MIGRATION_ID="2026-04-23-org-ca-pathlen-1""#;
const APPLY: &str = r#"curl -sk -X POST "$MASTIO/proxy/updates/$MIGRATION_ID/apply" \
-H "X-Admin-Secret: $ADMIN_SECRET" \
-H "Content-Type: application/json" \
-d '{"confirm": true}'"#;
const ROLLBACK: &str = r#"curl -sk -X POST "$MASTIO/proxy/updates/$MIGRATION_ID/rollback" \
-H "X-Admin-Secret: $ADMIN_SECRET" \
-H "Content-Type: application/json" \
-d '{"confirm": true}'"#;
const DELETE_SQLITE: &str = r#"sqlite3 /data/mcp_proxy.db \
"DELETE FROM pending_updates WHERE migration_id = '$MIGRATION_ID';""#;
const DELETE_POSTGRES: &str = r#"psql -h "$PG_HOST" -U cullis -d cullis -c \
"DELETE FROM pending_updates WHERE migration_id = '$MIGRATION_ID';""#;

// The outputs of the page, as printed.
const HEALTHZ_OUTPUT: &str =
    r#"{ "status": "ok", "warnings": ["org_ca_legacy_pathlen_zero"], "pending_updates": 1 }"#;
const GAUGES: [&str; 3] = [
    r#"cullis_pending_updates_total{status="pending"} 1"#,
    r#"cullis_pending_updates_total{status="applied"} 0"#,
    r#"cullis_pending_updates_total{status="rolled_back"} 0"#,
];
const LIST_OUTPUT: &str = r#"[
{
"migration_id": "2026-04-23-org-ca-pathlen-1",
"description": "Rotate the Org CA to BasicConstraints(pathLen=1) preserving every agent's public key — repairs proxies whose Org CA was generated before PR #284 fixed the pathLen=0 bug.",
"migration_type": "cert-schema",
"criticality": "critical",
"affects_enrollments": ["connector"],
"status": "pending",
"detected_at": "2026-04-23T19:04:21Z"
}
]"#;
const APPLY_OUTPUT: &str = r#"{"migration_id": "2026-04-23-org-ca-pathlen-1", "status": "applied", "applied_at": "2026-04-23T19:08:12Z"}"#;
const ROLLBACK_OUTPUT: &str = r#"{"migration_id": "...", "status": "rolled_back", "rolled_back_at": "..."}"#;

/// What becomes of a quote.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    /// It states nothing about the server: a title, a word that leads to the next line.
    Title,
    /// These steps prove it.
    Proven(&'static [&'static str]),
    /// We do otherwise, as docs/page.md says, and these steps prove what we do.
    Otherwise(&'static str, &'static [&'static str]),
    /// This step proves it in the walk on that database, for it names the database.
    On(Database, &'static str),
    /// Not yet: whoever owes it is named.
    Owed(&'static str),
}

use Verdict::{On, Otherwise, Owed, Proven, Title};

const BUNDLE: &str = "the deploy bundle";
const LINKED: &str = "the linked pages";

/// The page, quote by quote, in its order.
const PAGE: &[(&str, Verdict)] = &[
    ("Apply updates", Title),
    (
        "Who this is for: a Mastio operator whose deploy boots with a pending-updates warning,",
        Proven(&["warned at boot"]),
    ),
    (
        "or who wants to understand how Cullis ships cross-cutting PKI/protocol fixes without silently breaking agents.",
        Proven(&["agents go on"]),
    ),
    (
        "Prerequisites - A reasonably recent Mastio image (docker compose -p cullis-mastio exec mcp-proxy printenv CULLIS_MASTIO_VERSION).",
        Owed(BUNDLE),
    ),
    ("On the bundle,./deploy.sh --upgrade <version>keeps you current.", Owed(BUNDLE)),
    (
        "- Admin secret available",
        Proven(&["the commands of the page find the secret", "no secret, no entry"]),
    ),
    ("- A fresh backup of the deploy — see Disaster recovery", Owed(LINKED)),
    ("curl,jq", Proven(&["the health of a halted deploy"])),
    ("What a framework update is", Title),
    ("Some bugs need more than a code change.", Title),
    (
        "Consider the Org CA that Cullis v0.1 emitted with BasicConstraints(pathLen=0)",
        Proven(&["the legacy CA is broken"]),
    ),
    (
        "— a git pull + rebuild patched the generator, but every Mastio already bootstrapped kept the broken CA in its database.",
        Proven(&["the legacy CA is broken"]),
    ),
    (
        "External verifiers (compliance auditors, stdlib x509 libraries) reject those chains.",
        Proven(&["verifiers reject the legacy chain"]),
    ),
    (
        "A framework update is a Python migration class that ships alongside the code fix.",
        Otherwise("a migration is a Rust file", &["the list of a halted deploy"]),
    ),
    (
        "The Mastio discovers it at boot, inserts a row in the pending_updates table, and",
        Proven(&["a row is inserted"]),
    ),
    (
        "— if the migration is marked critical and affects enrollment methods the proxy actively uses — halts signing until the operator applies it.",
        Proven(&[
            "signing is refused",
            "an update that touches nobody does not halt",
            "an update that is not critical does not halt",
            "clean after the apply",
        ]),
    ),
    (
        "The admin then calls one endpoint to run the migration, which mutates state idempotently and records a rollback snapshot.",
        Proven(&["apply", "a repaired state is left alone", "the snapshot"]),
    ),
    (
        "Three surfaces: - Registry — mcp_proxy/updates/migrations/holds migration classes.",
        Otherwise(
            "the folder is crates/mastio/src/updates/migrations/, of Rust files",
            &["the list of a halted deploy"],
        ),
    ),
    (
        "Each migration declares itsmigration_id,migration_type,criticality,affects_enrollments, and adescriptionstring",
        Proven(&["the list of a halted deploy"]),
    ),
    ("that shows up verbatim in the dashboard.", Proven(&["the dashboard lists it"])),
    (
        "- Boot detector — runs after Mastio identity bootstrap. Every registered migration’s check()runs; pending rows insert withstatus='pending';",
        Proven(&["a row is inserted"]),
    ),
    (
        "thecullis_pending_updates_total{status}gauge refreshes;",
        Proven(&["the gauges of a halted deploy", "clean after the apply"]),
    ),
    (
        "acriticalmigration whoseaffects_enrollmentsintersects the live enrollment types flips the sign-halt flag.",
        Proven(&["signing is refused", "an update that touches nobody does not halt"]),
    ),
    (
        "- Admin apply/rollback — POST /proxy/updates/<id>/applyrunsup(), writes a snapshot tomigration_state_backups, marks the rowapplied.",
        Proven(&["apply", "the snapshot"]),
    ),
    (
        "POST /proxy/updates/<id>/rollbackrestores from the snapshot.",
        Proven(&["rollback", "the rollback restores every byte"]),
    ),
    ("Detect pending updates /healthz", Title),
    (HEALTHZ, Proven(&["the health of a halted deploy"])),
    ("Example output:", Title),
    (HEALTHZ_OUTPUT, Proven(&["the health of a halted deploy"])),
    ("A clean Mastio omits both warnings and pending_updates.", Proven(&["clean after the apply"])),
    ("Prometheus gauge", Title),
    (GAUGES[0], Proven(&["the gauges of a halted deploy"])),
    (GAUGES[1], Proven(&["the gauges of a halted deploy"])),
    (GAUGES[2], Proven(&["the gauges of a halted deploy"])),
    (
        r#"Alert on cullis_pending_updates_total{status="pending"} > 0 for more than 24 hours in production."#,
        Proven(&["the alert"]),
    ),
    ("Dashboard + admin API", Title),
    (
        "The dashboard exposes the pending list at https://mastio.example.com/proxy/updates",
        Proven(&["the dashboard lists it"]),
    ),
    ("— JSON list is available at /proxy/updates/api:", Proven(&["the list of a halted deploy"])),
    (SECRET, Proven(&["the commands of the page find the secret"])),
    (LIST, Proven(&["the list of a halted deploy"])),
    ("Example:", Title),
    (LIST_OUTPUT, Proven(&["the list of a halted deploy"])),
    (
        "A note on affects_enrollments: the label \"connector\" is the internal enrollment-type tag for Mastio-managed enrollment (the Mastio holds the Org CA private key and mints agent certs itself).",
        Proven(&["an agent that we mint is a connector"]),
    ),
    ("It is NOT a reference to the Connector binary, which is no longer part of the public repo.", Title),
    (
        "BYOCA-enrolled agents are flagged separately because their cert material lives outside the Mastio.",
        Proven(&["BYOCA is flagged and left alone"]),
    ),
    (
        "Sign halt If the boot detector sees a migration with criticality == \"critical\" and affects_enrollments that overlaps your deploy’s active enrollment types, it engages a sign halt:",
        Proven(&[
            "signing is refused",
            "an update that touches nobody does not halt",
            "an update that is not critical does not halt",
        ]),
    ),
    (
        "every signing call raises RuntimeError: signing halted — pending migration {id}.",
        Otherwise("a signing call answers 503 with the text", &["signing is refused"]),
    ),
    (
        "Agents cannot mint new DPoP-bound tokens until you apply the update.",
        Proven(&["signing is refused", "a token and a call"]),
    ),
    (
        "This is deliberate. The alternative is issuing tokens external verifiers will reject for reasons you can’t diagnose from logs.",
        Proven(&["verifiers reject the legacy chain"]),
    ),
    ("Indicators of a sign halt in progress:", Title),
    (
        "ERROR cullis_proxy_sign_halt_pending_migrationin the logs with themigration_id",
        Proven(&["the log of a halted deploy"]),
    ),
    (
        "/healthzreturns 200 but/v1/auth/tokenand every signing call fails fast with a human-readable503",
        Proven(&["the health of a halted deploy", "signing is refused"]),
    ),
    ("cullis_mastio_sign_haltedgauge = 1", Proven(&["the gauges of a halted deploy"])),
    (
        "Apply an update Review the migration first. Read the description,",
        Proven(&["the list of a halted deploy"]),
    ),
    ("check the PR linked in the release notes,", Title),
    (
        "confirm the rollback snapshot behavior matches your recovery tolerance.",
        Proven(&["the rollback restores every byte"]),
    ),
    ("From the admin API", Title),
    (SECRET, Proven(&["the commands of the page find the secret"])),
    (VARIABLES, Proven(&["apply"])),
    (APPLY, Proven(&["apply"])),
    ("Expected:", Title),
    (APPLY_OUTPUT, Proven(&["apply"])),
    (
        "The migration runs idempotently: check() short-circuits to no-op if the state is already fixed.",
        Proven(&["a repaired state is left alone"]),
    ),
    (
        "Re-applying is safe but the backup snapshot is overwritten.",
        Otherwise("an applied row answers 409; any other is applied again", &["re-applied"]),
    ),
    (
        "From the dashboard https://mastio.example.com/proxy/updates lists every registered migration with description, criticality badge, and two buttons (Apply / View rollback plan). Same outcome as the API call above.",
        Otherwise(
            "Apply opens the plan, where it is confirmed",
            &["the dashboard lists it", "applied from the dashboard"],
        ),
    ),
    ("Roll back", Title),
    (
        "Every successful apply writes a snapshot to migration_state_backups keyed by migration_id.",
        Proven(&["the snapshot"]),
    ),
    ("Roll back with:", Title),
    (ROLLBACK, Proven(&["rollback"])),
    ("Expected:", Title),
    (ROLLBACK_OUTPUT, Proven(&["rollback"])),
    (".", Title),
    (
        "A second rollback for the same migration_id fails with 404 no snapshot — state has already moved.",
        Proven(&["a second rollback"]),
    ),
    ("The row moves to status='rolled_back';", Proven(&["rollback"])),
    (
        "the boot detector won’t re-propose it to pending.",
        Proven(&["a row rolled back is not proposed again"]),
    ),
    (
        "If you want the migration back in pending, drop the row manually.",
        Proven(&["a dropped row is proposed again"]),
    ),
    ("SQLite (default): docker compose -p cullis-mastio exec mcp-proxy", Owed(BUNDLE)),
    (DELETE_SQLITE, On(Database::Sqlite, "a dropped row is proposed again")),
    ("Postgres (opt-in):", Title),
    (DELETE_POSTGRES, On(Database::PostgresByPageName, "a dropped row is proposed again")),
    (
        "The detector will re-insert it on next boot if check() still returns True.",
        Proven(&["a dropped row is proposed again", "a repaired state is left alone"]),
    ),
    ("Worked example — Org CA pathLen=0", Title),
    ("Migration id: 2026-04-23-org-ca-pathlen-1.", Proven(&["the list of a halted deploy"])),
    ("What it does", Title),
    (
        "- Detects BasicConstraints(pathLen=0)on the Org CA root",
        Proven(&["the legacy CA is broken", "a row is inserted"]),
    ),
    (
        "- Generates a fresh RSA-4096 Org CA with pathLen=1, inheritingnotAfterfrom the old CA",
        Proven(&["the new Org CA"]),
    ),
    (
        "- Re-signs every agent’s leaf certificate, preserving subject, public key, SAN, and validity",
        Proven(&["the new leaves"]),
    ),
    (
        "- Assigns fresh 128-bit leaf serials (RFC 5280 §4.1.2.2) to avoid stale-cache verifier conflicts",
        Proven(&["the new leaves"]),
    ),
    (
        "- Writes the pre-apply state to migration_state_backupsbefore mutating anything",
        Proven(&["the snapshot", "a failed apply is rolled back"]),
    ),
    ("Why agents don’t re-enroll The migration preserves agent public keys.", Proven(&["the new leaves"])),
    ("Agents keep signing with the private keys they already hold.", Proven(&["agents go on"])),
    (
        "Only the cert chain changes — the SDK reloads the Org CA bundle on the next handshake without any user-visible step.",
        Otherwise(
            "the SDK reloads nothing; the server serves a chain that both CA files verify",
            &["agents go on", "a token and a call"],
        ),
    ),
    (
        "What is explicitly out of scope - BYOCA agents. The org holds their private keys, not the Mastio, so the auto-migrator can’t re-sign leaves.",
        Proven(&["BYOCA is flagged and left alone"]),
    ),
    (
        "BYOCA operators re-run enroll_via_byocaagainst the new Org CA. Tracked separately.",
        Proven(&["a BYOCA owner enrolls again under the new Org CA"]),
    ),
    (
        "- Expired Org CA. The migration refuses to run if the current CA’s notAfteris in the past — the repair would extend expiry silently.",
        Proven(&["an expired Org CA is refused"]),
    ),
    ("Use the operator-driven Org CA rotation instead", Proven(&["an expired Org CA is refused"])),
    ("(see Rotate keys § 2).", Owed(LINKED)),
    ("Verify after apply", Title),
    (
        r#"cullis_pending_updates_total{status="pending"}= 0 (for this migration)"#,
        Proven(&["clean after the apply"]),
    ),
    ("/healthzdropsorg_ca_legacy_pathlen_zerofrom thewarningsarray", Proven(&["clean after the apply"])),
    ("cullis_mastio_sign_halted= 0", Proven(&["clean after the apply"])),
    (
        "- One agent end-to-end (mint a token + make a call) succeeds against the new chain",
        Proven(&["a token and a call"]),
    ),
    ("Troubleshoot", Title),
    (
        "Apply returns 409 already applied : The row is already status='applied'.",
        Proven(&["already applied"]),
    ),
    ("Read detected_at + applied_at — someone else applied it", Proven(&["already applied"])),
    (
        "(check the audit log, filter event_type=admin.update_applied). No action needed.",
        Proven(&["the audit log tells who applied it"]),
    ),
    (
        "Apply returns 412 sign halt mismatch : Another migration is engaged on the halt flag.",
        Proven(&["another update comes first"]),
    ),
    (
        "Apply that one first, or drop it explicitly; GET /proxy/updates/api?status=pending lists them in order.",
        Proven(&["another update comes first"]),
    ),
    (
        "up() raises mid-apply : The snapshot was written before the mutation — rollback is safe. Call POST /proxy/updates/{id}/rollback,",
        Proven(&["a failed apply is rolled back"]),
    ),
    (
        "inspect the logs (cullis_proxy_update_apply_failed with a traceback),",
        Otherwise("the log event has the chain of causes", &["a failed apply is rolled back"]),
    ),
    (
        "then either fix the environment and retry, or escalate the migration as a defect.",
        Proven(&["re-applied"]),
    ),
    (
        "I want to disable a migration I consider incompatible : Set status='rolled_back' directly in pending_updates via SQL (commands above).",
        Proven(&["set aside by SQL"]),
    ),
    ("The detector respects non-pending rows.", Proven(&["set aside by SQL"])),
    (
        "This is a last resort — the migration shipped as critical for a reason, and the halt will re-engage on any subsequent detected_at if you delete the row.",
        Proven(&["a dropped row is proposed again"]),
    ),
    ("Next", Title),
    ("- Rotate keys — manual key rotation when a framework update isn’t the right tool", Owed(LINKED)),
    ("- Disaster recovery — take a backup before applying any update", Owed(LINKED)),
    ("- Audit export — confirm apply events landed in the hash chain", Owed(LINKED)),
    ("- Runbook § monitoring — where to point Prometheus at the new gauge", Owed(LINKED)),
];

/// Without any white space: where the page breaks its lines says nothing.
fn squeezed(text: &str) -> String {
    text.chars().filter(|character| !character.is_whitespace()).collect()
}

/// The quotes, joined, are the page: nothing is left out, nothing added.
fn assert_quotes_are_the_page(page: &str) {
    let page = squeezed(page);
    let mut rest = page.as_str();
    for (quote, _) in PAGE {
        let after = rest.strip_prefix(squeezed(quote).as_str());
        let near: String = rest.chars().take(160).collect();
        rest = after.unwrap_or_else(|| panic!("the page goes on\n  {near}\nand not with\n  {quote}"));
    }
    assert_eq!(rest, "", "not quoted");
}

/// A walk through the page on one database.
struct Walk {
    deploy: Deploy,
    files: PathBuf,
    proven: BTreeSet<&'static str>,
}

impl Walk {
    fn proven(&mut self, step: &'static str) {
        println!("proven: {step}");
        self.proven.insert(step);
    }

    /// Runs a command of the page as it is printed, in the operator's working directory, with the variables that the
    /// page has set before.
    fn page(&self, command: &str) -> String {
        let line = format!("{SECRET}\n{VARIABLES}\n{command}");
        self.deploy.bash(&line.replace("localhost:9443", &format!("localhost:{}", self.deploy.port())), &[])
    }

    /// A page of the dashboard, or what it answers to a form, for an operator who signs in first.
    fn dashboard(&self, path: &str, arguments: &[&str]) -> String {
        let jar = self.deploy.folder().join("browser.jar");
        let signed_in = jar.exists();
        let jar = jar.to_str().unwrap();
        if !signed_in {
            let secret = format!("secret={ADMIN_SECRET}");
            self.deploy.curl("/proxy/login", &["-c", jar, "--data-urlencode", &secret]);
        }
        let answer = self.deploy.curl(path, &[&["-b", jar][..], arguments].concat());
        assert!(matches!(answer.status, 200 | 303), "{path}: {answer:?}");
        answer.body
    }

    fn identity(&self, name: &str) -> PathBuf {
        self.files.join(name)
    }

    fn mint(&self) -> Value {
        let (certificate, key) =
            (self.identity("agent-0002").join("agent.crt"), self.identity("agent-0002").join("agent.key"));
        mint(&self.deploy.url(), "legacy-org::agent-0002", &certificate, &key)
    }

    fn row(&self, column: &str) -> String {
        self.deploy.sql(&format!("SELECT {column} FROM pending_updates WHERE migration_id = '{MIGRATION}'"))
    }

    fn listed(&self) -> Value {
        let list = self.deploy.admin_get("/proxy/updates/api").expect(200);
        let row = list.as_array().unwrap().iter().find(|row| row["migration_id"] == MIGRATION).cloned();
        row.expect("the migration in the list")
    }

    /// What the update touches and what it must not, as the database has it.
    fn touched(&self) -> String {
        self.deploy.sql(
            "SELECT agent_id, cert_pem, dpop_jkt, is_active, previous_cert_pem FROM internal_agents ORDER BY agent_id",
        ) + &self.current_root()
    }

    fn current_root(&self) -> String {
        certificates(&self.deploy.get("/pki/ca.crt").body)[0].clone()
    }

    /// An agent's leaf as the database has it.
    fn leaf(&self, name: &str) -> String {
        let id = format!("legacy-org::{name}");
        let pem = self.deploy.sql(&format!("SELECT cert_pem FROM internal_agents WHERE agent_id = '{id}'"));
        certificates(&pem)[0].clone()
    }

    fn assert_halted(&self, halted: bool) {
        assert_eq!(self.deploy.is_halted(), halted);
        let status = self.mint()["status"].as_u64().unwrap();
        assert_eq!(status, if halted { 503 } else { 200 });
    }
}

/// An RFC 3339 time in UTC to the second, as the page prints it.
fn is_a_time(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    text.len() == "2026-04-23T19:08:12Z".len() && text.ends_with('Z') && text.as_bytes()[10] == b'T'
}

/// `output` has the keys of the page's `example` in the same order, first and foremost, and the same values but for
/// those named, which are times.
fn assert_like_the_example(output: &Value, example: &str, times: &[&str]) {
    let example: Value = serde_json::from_str(example).unwrap();
    let (output, example) = (output.as_object().unwrap(), example.as_object().unwrap());
    let keys: Vec<_> = output.keys().take(example.len()).collect();
    assert_eq!(keys, example.keys().collect::<Vec<_>>());
    for (key, expected) in example {
        if times.contains(&key.as_str()) {
            assert!(is_a_time(&output[key]), "{key}: {}", output[key]);
        } else {
            assert_eq!(&output[key], expected, "{key}");
        }
    }
}

/// The lines of `openssl x509` for a certificate.
fn x509(pem: &str, arguments: &[&str]) -> String {
    let arguments: Vec<&str> = ["x509", "-noout"].iter().chain(arguments).copied().collect();
    openssl(&arguments, pem)
}

/// The page's deploy has one row pending. The stored file's leaves lack their profile as well, which is a row of its own:
/// they are made complete, for the same keys. The database, and the folder of what agents hold.
fn only_the_path_length_is_wrong(shared: &Path) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (file, keys) = (folder.path().join("page.db"), folder.path().join("keys"));
    let legacy = shared.join("fixtures/legacy");
    run(Command::new(required_environment("MASTIO_TEST_JUDGES_PYTHON"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/updates/reshape_legacy_db.py"))
        .arg(legacy.join("v01_root5.db"))
        .arg(&file)
        .arg("--keys")
        .arg(legacy.join("keys/v01_root5"))
        .arg(&keys)
        .arg("--complete-leaves"));
    (folder, file, keys)
}

fn walk(database: Database) {
    let Some(shared) = shared() else { return };
    let page = fs::read_to_string(shared.join("seeds/000_de34ea8cbe5b71cc.txt")).unwrap();
    assert_quotes_are_the_page(&page);

    let (_folder, file, keys) = only_the_path_length_is_wrong(&shared);
    let deploy = Deploy::on_file(&file).listening_on_if_free(9443).on(database);
    let files = deploy.folder().join("agents");
    for name in ["agent-0001", "agent-0002", "agent-0003"] {
        fs::create_dir_all(files.join(name)).unwrap();
        for kind in ["crt", "key"] {
            let from = keys.join(format!("{name}.{kind}"));
            fs::copy(from, files.join(name).join(format!("agent.{kind}"))).unwrap();
        }
    }
    let mut walk = Walk { deploy, files, proven: BTreeSet::new() };
    let old_root = fs::read_to_string(keys.join("org-ca.crt")).unwrap();

    halted_deploy(&mut walk, &old_root, &shared);
    order_of_updates(&mut walk);
    applied(&mut walk, &old_root, &keys);
    rolled_back_and_again(&mut walk, database);
    other_deploys(&mut walk, database);
    alert(&mut walk);
    conclude(&walk, database);
}

fn halted_deploy(walk: &mut Walk, old_root: &str, shared: &Path) {
    walk.deploy.start();

    let root = walk.current_root();
    assert_eq!(root.trim(), old_root.trim());
    assert!(x509(&root, &["-ext", "basicConstraints"]).contains("pathlen:0"));
    walk.proven("the legacy CA is broken");

    let chain5 = shared.join("fixtures/legacy/keys/chain5");
    let rejected = Command::new("openssl")
        .args(["verify", "-CAfile"])
        .arg(chain5.join("org-ca.crt"))
        .arg("-untrusted")
        .arg(chain5.join("mastio-ca.crt"))
        .arg(chain5.join("agent-0002.crt"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&rejected.stderr).to_lowercase();
    assert!(!rejected.status.success() && said.contains("path length constraint exceeded"), "{said}");
    walk.proven("verifiers reject the legacy chain");

    let warned = walk.deploy.wait_for_log("the halt", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("cullis_proxy_sign_halt_pending_migration"))
    });
    assert_eq!((&warned["level"], &warned["migration_id"]), (&json!("ERROR"), &json!(MIGRATION)));
    walk.proven("the log of a halted deploy");
    walk.proven("warned at boot");

    assert_eq!(walk.row("status"), "pending");
    walk.proven("a row is inserted");

    let shown = walk.page(HEALTHZ);
    assert_eq!(jq("-c", &shown).is_empty(), shown.is_empty());
    assert_eq!(
        serde_json::from_str::<Value>(&shown).unwrap(),
        serde_json::from_str::<Value>(HEALTHZ_OUTPUT).unwrap()
    );
    let health = walk.deploy.get("/healthz");
    assert_eq!(
        (health.status, health.body.as_str()),
        (200, r#"{"status":"ok","warnings":["org_ca_legacy_pathlen_zero"],"pending_updates":1}"#)
    );
    walk.proven("the health of a halted deploy");

    let metrics = walk.deploy.get("/metrics").body;
    for gauge in GAUGES.iter().chain(&["cullis_mastio_sign_halted 1"]) {
        assert!(metrics.lines().any(|line| line == *gauge), "{gauge} in\n{metrics}");
    }
    walk.proven("the gauges of a halted deploy");

    assert_eq!(walk.deploy.bash(&format!("{SECRET}\necho \"$ADMIN_SECRET\""), &[]).trim(), ADMIN_SECRET);
    walk.proven("the commands of the page find the secret");
    assert_eq!(walk.deploy.get("/proxy/updates/api").status, 401);
    assert_eq!(walk.deploy.curl("/proxy/updates/api", &["-H", "X-Admin-Secret: wrong"]).status, 403);
    walk.proven("no secret, no entry");

    let list: Value = serde_json::from_str(&walk.page(LIST)).unwrap();
    let example = LIST_OUTPUT.trim_start_matches('[').trim_end_matches(']');
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    assert_like_the_example(&list[0], example, &["detected_at"]);
    walk.proven("the list of a halted deploy");

    let page = walk.dashboard("/proxy/updates", &[]);
    let description = list[0]["description"].as_str().unwrap().replace('\'', "&#39;");
    for part in [description.as_str(), ">critical<", ">pending<", ">Apply</a>", ">View rollback plan</a>"] {
        assert!(page.contains(part), "{part} in {page}");
    }
    for registered in
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/updates/migrations")).unwrap()
    {
        let name = registered.unwrap().file_name().into_string().unwrap();
        let Some(id) = name.strip_prefix('m').and_then(|name| name.strip_suffix(".rs")) else { continue };
        if id.starts_with(|c: char| c.is_ascii_digit()) {
            let id = id.replace('_', "-");
            assert!(page.contains(&format!("href=\"/proxy/updates/{id}\"")), "{id} in {page}");
        }
    }
    walk.proven("the dashboard lists it");

    signing_is_refused(walk);
    assert_eq!(walk.deploy.sql("SELECT COUNT(*) FROM migration_state_backups"), "0");
}

fn signing_is_refused(walk: &mut Walk) {
    let text = format!("signing halted — pending migration {MIGRATION}");
    let refused = walk.mint();
    assert_eq!(refused["status"], 503);
    assert!(refused["body"].as_str().unwrap().contains(&text), "{refused}");
    assert!(refused["seconds"].as_f64().unwrap() < 1.0, "fails fast: {refused}");

    let identity = walk.identity("agent-0002");
    let (certificate, key) = (identity.join("agent.crt"), identity.join("agent.key"));
    let post = ["-X", "POST", "-H", "Content-Type: application/json"];
    let with_certificate = ["--cert", certificate.to_str().unwrap(), "--key", key.to_str().unwrap()];
    let challenge = walk.deploy.curl("/v1/auth/login-challenge", &[&post[..2], &with_certificate].concat());
    let nonce = challenge.expect(200)["nonce"].as_str().unwrap().to_owned();
    let body = json!({ "client_assertion": "e30.e30.e30", "nonce": nonce }).to_string();
    let countersigned = walk
        .deploy
        .curl("/v1/auth/sign-challenged-assertion", &[&post[..], &with_certificate, &["-d", &body]].concat());
    let created =
        walk.deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "late", "capabilities": [] }));
    let request = run(Command::new("openssl").args([
        "req",
        "-new",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=x",
        "-keyout",
        "/dev/null",
    ]));
    let body = json!({ "agent_name": "late", "csr_pem": request });
    let issued = walk.deploy.admin_post("/v1/admin/pki/byoca-certificates", &body);
    for refused in [countersigned, created, issued] {
        assert_eq!(refused.status, 503, "{}", refused.body);
        assert!(refused.body.contains(&text), "{}", refused.body);
    }
    walk.proven("signing is refused");
}

fn order_of_updates(walk: &mut Walk) {
    // A critical update that this version does not know, as a newer one would have left it.
    const OTHER: &str = "2026-01-01-other";
    walk.deploy.sql(&format!(
        "INSERT INTO pending_updates (migration_id, detected_at, status) \
         VALUES ('{OTHER}', '2026-01-01T00:00:00Z', 'pending')"
    ));
    let refused = walk.deploy.apply();
    assert_eq!(refused.status, 412, "{}", refused.body);
    assert!(refused.body.contains("sign halt mismatch") && refused.body.contains(OTHER), "{}", refused.body);
    assert_eq!(walk.row("status"), "pending");
    let list = walk.deploy.admin_get("/proxy/updates/api?status=pending").expect(200);
    let ids: Vec<_> =
        list.as_array().unwrap().iter().map(|row| row["migration_id"].as_str().unwrap()).collect();
    assert_eq!(ids, [OTHER, MIGRATION]);
    assert_eq!(walk.deploy.admin_get("/proxy/updates/api?status=applied").expect(200), json!([]));
    assert_eq!(walk.deploy.admin_get("/proxy/updates/api?status=pending2").status, 400);
    walk.deploy.sql(&format!("DELETE FROM pending_updates WHERE migration_id = '{OTHER}'"));
    let unconfirmed = walk.deploy.admin_post(&format!("/proxy/updates/{MIGRATION}/apply"), &json!({}));
    assert_eq!(unconfirmed.status, 400, "{}", unconfirmed.body);
    let unknown = walk.deploy.admin_post("/proxy/updates/2026-01-01-none/apply", &json!({ "confirm": true }));
    assert_eq!(unknown.status, 404, "{}", unknown.body);
    walk.proven("another update comes first");
}

fn applied(walk: &mut Walk, old_root: &str, keys: &Path) {
    const NAMES: [&str; 5] = ["agent-0001", "agent-0002", "agent-0003", "agent-0004", "agent-0005"];
    let before = NAMES.map(|name| walk.leaf(name));
    let touched = walk.touched();

    let output: Value = serde_json::from_str(&walk.page(APPLY)).unwrap();
    assert_like_the_example(&output, APPLY_OUTPUT, &["applied_at"]);
    assert_eq!(output.as_object().unwrap().len(), 3, "{output}");
    assert_eq!(walk.row("status"), "applied");
    walk.proven("apply");

    // Verify after apply: the four points of the page, with no restart.
    assert_eq!(walk.deploy.get("/healthz").body, r#"{"status":"ok"}"#);
    let metrics = walk.deploy.get("/metrics").body;
    for gauge in [
        r#"cullis_pending_updates_total{status="pending"} 0"#,
        r#"cullis_pending_updates_total{status="applied"} 1"#,
        "cullis_mastio_sign_halted 0",
    ] {
        assert!(metrics.lines().any(|line| line == gauge), "{gauge} in\n{metrics}");
    }
    assert_eq!(walk.mint()["status"], 200);
    walk.proven("clean after the apply");
    let upstream = Upstream::start();
    walk.deploy.register_tool(TOOL, upstream.url(), &["legacy-org::agent-0002", "legacy-org::agent-0003"]);
    let new_root = walk.current_root();
    let new_root_file = walk.deploy.folder().join("new-root.crt");
    fs::write(&new_root_file, &new_root).unwrap();
    let open = |name: &str, ca: &Path| {
        let id = format!("legacy-org::{name}");
        Agent::open(Python::Plain, &walk.deploy.url(), &id, &walk.identity(name), ca)
    };
    let mut on_new_chain = open("agent-0002", &new_root_file);
    on_new_chain.login().unwrap();
    on_new_chain.call().unwrap();
    let mut on_old_files = open("agent-0003", &keys.join("org-ca.crt"));
    on_old_files.call().unwrap();
    walk.proven("a token and a call");

    // What it did.
    let old_end = x509(old_root, &["-enddate"]);
    assert_eq!(x509(&new_root, &["-enddate"]), old_end);
    assert!(x509(&new_root, &["-ext", "basicConstraints"]).contains("CA:TRUE, pathlen:1"));
    assert!(x509(&new_root, &["-text"]).contains("Public-Key: (4096 bit)"));
    assert_ne!(x509(&new_root, &["-pubkey"]), x509(old_root, &["-pubkey"]));
    walk.proven("the new Org CA");
    let mut serials = BTreeSet::new();
    for (name, old) in NAMES.iter().zip(&before) {
        let new = walk.leaf(name);
        let kept = ["-subject", "-pubkey", "-dates", "-ext", "subjectAltName"];
        assert_eq!(x509(&new, &kept), x509(old, &kept), "{name}");
        let serial = x509(&new, &["-serial"]).trim_start_matches("serial=").to_owned();
        assert_ne!(x509(old, &["-serial"]), format!("serial={serial}"), "{name}");
        // 128 random bits: at most 16 octets, and hardly ever fewer than 14.
        assert!((28..=32).contains(&serial.len()), "{name}: {serial}");
        assert!(serials.insert(serial), "{name}: a serial twice");
    }
    walk.proven("the new leaves");

    // The snapshot and the log of what was done.
    let snapshots = "SELECT migration_id FROM migration_state_backups";
    assert_eq!(walk.deploy.sql(snapshots), MIGRATION);
    let events = walk.deploy.admin_get("/v1/admin/audit?limit=1000").expect(200);
    let position = |event_type: &str| {
        let of_type = |event: &&Value| event["event_type"] == event_type;
        let event = events.as_array().unwrap().iter().find(of_type);
        event.unwrap_or_else(|| panic!("no {event_type} in {events}"))["seq"].as_i64().unwrap()
    };
    assert!(position("admin.update_snapshot_taken") < position("admin.update_applied"));
    walk.proven("the snapshot");

    // Again.
    assert_eq!(walk.page(APPLY), r#"{"detail":"already applied"}"#);
    assert_eq!(walk.deploy.apply().status, 409);
    let row = walk.listed();
    assert!(is_a_time(&row["detected_at"]) && row["applied_at"] == output["applied_at"], "{row}");
    assert_eq!(walk.row("status"), "applied");
    walk.proven("already applied");
    let by_command = ["audit", "list", "--event-type", "admin.update_applied", "--json"];
    let listed: Value = serde_json::from_str(&walk.deploy.mastio_ok(&by_command)).unwrap();
    let over_http = walk.deploy.admin_get("/v1/admin/audit?event_type=admin.update_applied").expect(200);
    assert_eq!(listed, over_http);
    assert_eq!(over_http.as_array().unwrap().len(), 1, "{over_http}");
    assert!(over_http[0].to_string().contains(MIGRATION), "{over_http}");
    walk.proven("the audit log tells who applied it");

    not_critical(walk);

    // The same in a new process: not proposed again, nothing to do.
    walk.deploy.restart();
    assert_eq!(walk.deploy.get("/healthz").body, r#"{"status":"ok"}"#);
    on_old_files.call().unwrap();
    on_new_chain.call().unwrap();
    repaired_state_is_left_alone(walk);

    let output: Value = serde_json::from_str(&walk.page(ROLLBACK)).unwrap();
    let keys: Vec<_> = output.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["migration_id", "status", "rolled_back_at"]);
    assert_eq!((&output["migration_id"], &output["status"]), (&json!(MIGRATION), &json!("rolled_back")));
    assert!(is_a_time(&output["rolled_back_at"]), "{output}");
    assert_eq!(walk.row("status"), "rolled_back");
    walk.proven("rollback");
    assert_eq!(walk.touched(), touched);
    assert_eq!(walk.deploy.sql("SELECT COUNT(*) FROM migration_state_backups"), "0");
    walk.proven("the rollback restores every byte");
    assert_eq!(walk.page(ROLLBACK), r#"{"detail":"no snapshot — state has already moved"}"#);
    assert_eq!(walk.deploy.roll_back().status, 404);
    walk.proven("a second rollback");
    on_old_files.call().unwrap();
    on_new_chain.call().unwrap();
    walk.proven("agents go on");
}

/// An update that is not critical waits without a halt.
fn not_critical(walk: &mut Walk) {
    walk.deploy.sql(
        "INSERT INTO pending_updates (migration_id, detected_at, status, criticality, affects_enrollments) VALUES \
         ('2026-01-02-mild', '2026-01-02T00:00:00Z', 'pending', 'warning', '[\"connector\"]')",
    );
    assert_eq!(walk.deploy.get("/healthz").body, r#"{"status":"ok","pending_updates":1}"#);
    walk.assert_halted(false);
    walk.deploy.sql("DELETE FROM pending_updates WHERE migration_id = '2026-01-02-mild'");
    walk.proven("an update that is not critical does not halt");
}

/// With the row dropped and the state right, the check has nothing to say, and an apply changes nothing.
fn repaired_state_is_left_alone(walk: &mut Walk) {
    let touched = walk.touched();
    let row = "migration_id, detected_at, status, applied_at, criticality, affects_enrollments";
    let columns = walk.row("detected_at || '|' || applied_at");
    let (detected_at, applied_at) = columns.split_once('|').unwrap();
    walk.deploy.sql(&format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'"));
    walk.deploy.restart();
    assert_eq!(walk.row("status"), "");
    let refused = walk.deploy.apply();
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(refused.body.contains("not_needed"), "{}", refused.body);
    assert_eq!(walk.deploy.get("/healthz").body, r#"{"status":"ok"}"#);
    assert_eq!(walk.touched(), touched);
    walk.deploy.sql(&format!(
        "INSERT INTO pending_updates ({row}) VALUES \
         ('{MIGRATION}', '{detected_at}', 'applied', '{applied_at}', 'critical', '[\"connector\"]')"
    ));
    walk.proven("a repaired state is left alone");
}

fn rolled_back_and_again(walk: &mut Walk, database: Database) {
    const WARNED: &str = r#"{"status":"ok","warnings":["org_ca_legacy_pathlen_zero"]}"#;
    walk.deploy.restart();
    assert_eq!(walk.row("status"), "rolled_back");
    assert_eq!(walk.deploy.get("/healthz").body, WARNED);
    walk.assert_halted(false);
    walk.proven("a row rolled back is not proposed again");

    let delete = |walk: &Walk| match database {
        Database::Sqlite => {
            let line = DELETE_SQLITE.replace("/data/mcp_proxy.db", "data/mcp_proxy.db");
            walk.deploy.bash(&format!("{VARIABLES}\n{line}"), &[]);
        }
        Database::Postgres | Database::PostgresByPageName => {
            let url = walk.deploy.database_url().unwrap();
            let address = url.split_once('@').unwrap().1.split_once('/').unwrap().0;
            let (host, port) = address.split_once(':').unwrap();
            let environment = [("PG_HOST", host), ("PGPORT", port)];
            walk.deploy.bash(&format!("{VARIABLES}\n{DELETE_POSTGRES}"), &environment);
        }
    };
    delete(walk);
    assert_eq!(walk.row("status"), "");
    walk.assert_halted(false);
    walk.deploy.restart();
    assert_eq!(walk.row("status"), "pending");
    walk.assert_halted(true);

    // Set aside by SQL: the halt is lifted without a restart, and stays away after one.
    let started = Instant::now();
    walk.deploy.sql(&format!(
        "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '{MIGRATION}'"
    ));
    let body = json!({ "agent_name": "minted", "capabilities": [] });
    let minted = wait_for("signing to go on", || {
        let created = walk.deploy.admin_post("/v1/admin/agents", &body);
        (created.status == 201).then_some(created)
    });
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(walk.deploy.get("/healthz").body, WARNED);
    walk.assert_halted(false);
    walk.deploy.restart();
    assert_eq!(walk.row("status"), "rolled_back");
    walk.assert_halted(false);
    walk.proven("set aside by SQL");
    let agent_id = minted.json()["agent_id"].as_str().unwrap().to_owned();
    let agents = walk.deploy.admin_get("/v1/admin/agents").expect(200);
    let agent =
        agents.as_array().unwrap().iter().find(|agent| agent["agent_id"] == agent_id.as_str()).unwrap();
    assert_eq!(agent["enrollment"], "connector");
    walk.proven("an agent that we mint is a connector");

    delete(walk);
    walk.deploy.restart();
    assert_eq!(walk.row("status"), "pending");
    walk.assert_halted(true);
    walk.proven("a dropped row is proposed again");

    failed_apply(walk);
}

/// The environment is broken: a leaf in the database cannot be read.
fn failed_apply(walk: &mut Walk) {
    let leaf =
        walk.deploy.sql("SELECT cert_pem FROM internal_agents WHERE agent_id = 'legacy-org::agent-0005'");
    let set = |walk: &Walk, pem: &str| {
        walk.deploy.sql(&format!(
            "UPDATE internal_agents SET cert_pem = '{pem}' WHERE agent_id = 'legacy-org::agent-0005'"
        ))
    };
    let stored = format!("{leaf}\n");
    set(walk, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let touched = walk.touched();
    let failed = walk.deploy.apply();
    assert_eq!(failed.status, 500, "{}", failed.body);
    let logged = walk.deploy.wait_for_log("the failure", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("cullis_proxy_update_apply_failed"))
    });
    assert_eq!((&logged["level"], &logged["migration_id"]), (&json!("ERROR"), &json!(MIGRATION)));
    assert!(!logged["error"].as_str().unwrap().is_empty(), "{logged}");
    assert_eq!(walk.row("status"), "failed");
    assert_eq!(walk.touched(), touched);
    walk.assert_halted(true);
    walk.deploy.roll_back().expect(200);
    assert_eq!(walk.row("status"), "rolled_back");
    assert_eq!(walk.touched(), touched);
    walk.proven("a failed apply is rolled back");

    // The environment mended, tried again.
    set(walk, &stored);
    walk.deploy.apply().expect(200);
    assert_eq!(walk.deploy.get("/healthz").body, r#"{"status":"ok"}"#);
    let snapshot = "SELECT created_at, snapshot_json FROM migration_state_backups";
    let first = walk.deploy.sql(snapshot);
    walk.deploy.roll_back().expect(200);
    let review = format!("/proxy/updates/{MIGRATION}/apply-review");
    let plan = walk.dashboard(&review, &[]);
    let (_, token) = plan.split_once("name=\"csrf_token\" value=\"").unwrap();
    let token = format!("csrf_token={}", token.split('"').next().unwrap());
    walk.dashboard(&review, &["-d", "confirm=yes", "-d", &token]);
    wait_for("the apply from the dashboard", || {
        (walk.row("status") == "applied" && !walk.deploy.is_halted()).then_some(())
    });
    walk.proven("applied from the dashboard");
    let second = walk.deploy.sql(snapshot);
    assert!(!first.is_empty() && !second.is_empty() && first != second);
    assert_eq!(walk.deploy.sql("SELECT COUNT(*) FROM migration_state_backups"), "1");
    walk.assert_halted(false);
    walk.proven("re-applied");
}

/// What the page says of deploys that differ from the walk's.
fn other_deploys(walk: &mut Walk, database: Database) {
    let database = if database == Database::Sqlite { Database::Sqlite } else { Database::Postgres };

    let mut deploy = Deploy::legacy("py_mixed_byoca_pending").unwrap().on(database);
    deploy.start();
    let list = deploy.admin_get("/proxy/updates/api").expect(200);
    assert_eq!(list[0]["not_covered"]["byoca"], 1, "{list}");
    let byoca = "SELECT cert_pem FROM internal_agents WHERE enrollment_method = 'byoca'";
    let ours = "SELECT cert_pem FROM internal_agents WHERE enrollment_method <> 'byoca' ORDER BY agent_id";
    let before = (deploy.sql(byoca), deploy.sql(ours));
    deploy.apply().expect(200);
    assert_eq!(deploy.sql(byoca), before.0);
    assert_ne!(deploy.sql(ours), before.1);
    walk.proven("BYOCA is flagged and left alone");
    owner_enrolls_again(walk, &deploy);

    let mut deploy = Deploy::legacy("v01_expired").unwrap().on(database);
    deploy.start();
    let fleet = "SELECT agent_id, cert_pem FROM internal_agents ORDER BY agent_id";
    let before = (deploy.sql(fleet), deploy.get("/pki/ca.crt").body);
    let refused = deploy.apply().expect(409);
    assert_eq!(refused["detail"]["reason"], "org_ca_expired", "{refused}");
    assert!(refused.to_string().to_lowercase().contains("rotat"), "{refused}");
    assert_eq!((deploy.sql(fleet), deploy.get("/pki/ca.crt").body), before);
    assert!(deploy.is_halted());
    walk.proven("an expired Org CA is refused");

    // The same broken CA, and a fleet that it does not touch.
    let deploy = Deploy::legacy("v01_root5").unwrap();
    deploy.sql("UPDATE internal_agents SET enrollment_method = 'byoca'");
    let mut deploy = deploy.on(database);
    deploy.start();
    let list = deploy.admin_get("/proxy/updates/api?status=pending").expect(200);
    assert_eq!(list[0]["migration_id"], MIGRATION);
    assert!(!deploy.is_halted());
    let created = deploy.admin_post("/v1/admin/agents", &json!({ "agent_name": "new", "capabilities": [] }));
    assert_eq!(created.status, 201, "{}", created.body);
    walk.proven("an update that touches nobody does not halt");
}

/// The owner keeps the key, has it certified under the new Org CA, and re-runs `enroll_via_byoca` of the SDK.
fn owner_enrolls_again(walk: &mut Walk, deploy: &Deploy) {
    let key = shared().unwrap().join("fixtures/legacy/keys/py_mixed_byoca_pending/agent-0004.key");
    let row = "SELECT cert_pem FROM internal_agents WHERE agent_id = 'acme::agent-0004'";
    let before = deploy.sql(row);
    let csr = run(Command::new("openssl").args(["req", "-new", "-subj", "/CN=whoever", "-key"]).arg(&key));
    let body = json!({ "agent_name": "agent-0004", "csr_pem": csr });
    let issued = deploy.admin_post("/v1/admin/pki/byoca-certificates", &body).expect(201);
    let ca = deploy.folder().join("new-ca.crt");
    let roots = deploy.get("/pki/ca.crt").body;
    fs::write(&ca, &roots).unwrap();
    let key = fs::read_to_string(key).unwrap();
    let mut owner = Agent::bare(Python::Plain);
    let enrolled = owner.ask(&json!({
        "cmd": "enroll-byoca", "mastio_url": deploy.url(), "ca": ca, "admin_secret": ADMIN_SECRET,
        "agent_name": "agent-0004", "cert_pem": issued["cert_pem"], "private_key_pem": key,
        "persist_to": deploy.folder().join("owner"),
    }));
    enrolled.unwrap_or_else(|raised| panic!("{raised:?}"));
    let after = deploy.sql(row);
    assert_ne!(after, before);
    assert_eq!(certificates(&after)[0].trim(), issued["cert_pem"].as_str().unwrap().trim());
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    fs::write(&root, &certificates(&roots)[0]).unwrap();
    openssl(&["verify", "-x509_strict", "-CAfile", root.to_str().unwrap()], &after);
    walk.proven("a BYOCA owner enrolls again under the new Org CA");
}

fn alert(walk: &mut Walk) {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ops");
    run(Command::new("promtool").args(["check", "rules"]).arg(rules.join("alerts.yml")));
    run(Command::new("promtool").args(["test", "rules"]).arg(rules.join("alerts_test.yml")));
    let text = squeezed(&fs::read_to_string(rules.join("alerts.yml")).unwrap());
    assert!(text.contains(r#"expr:cullis_pending_updates_total{status="pending"}>0for:24h"#), "{text}");
    walk.proven("the alert");
}

/// Prints the page with what became of each quote. Every step that a quote names was taken, and every step is named.
fn conclude(walk: &Walk, database: Database) {
    let mut named = BTreeSet::new();
    let mut missing: Vec<&str> = Vec::new();
    println!("\nThe page, on {database:?}, port {}", walk.deploy.port());
    for (quote, verdict) in PAGE {
        let mut steps: Vec<&'static str> = Vec::new();
        let becomes = match verdict {
            Title => "-".to_owned(),
            Proven(by) => {
                steps.extend(*by);
                format!("proven by: {}", by.join("; "))
            }
            Otherwise(how, by) => {
                steps.extend(*by);
                format!("otherwise: {how}; proven by: {}", by.join("; "))
            }
            On(on, step) if *on == database => {
                steps.push(step);
                format!("proven by: {step}")
            }
            On(on, step) => {
                named.insert(*step);
                format!("proven in the walk on {on:?}")
            }
            Owed(to) => format!("OWED by {to}"),
        };
        println!("| {} | {becomes} |", quote.split_whitespace().collect::<Vec<_>>().join(" "));
        missing.extend(steps.iter().copied().filter(|step| !walk.proven.contains(step)));
        named.extend(steps);
    }
    assert!(missing.is_empty(), "named and not taken: {missing:?}");
    let unnamed: Vec<_> = walk.proven.difference(&named).collect();
    assert!(unnamed.is_empty(), "taken and not named: {unnamed:?}");
}

#[test]
fn every_line_of_the_page_holds_on_sqlite_or_is_listed_as_owed() {
    walk(Database::Sqlite);
}

#[test]
fn every_line_of_the_page_holds_on_postgresql_or_is_listed_as_owed() {
    walk(Database::PostgresByPageName);
}
