//! Owners who bring key and certificate: BYOCA and SPIFFE.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::sdk::{Agent, Python, TOOL, Upstream};
use crate::harness::{ADMIN_SECRET, Answer, Database, Deploy, certificates, run, wait_for};
use crate::world::{ClientKey, Identity, approve, ca_file, events, fresh, managed, start};

/// A certificate request for `key`, made by OpenSSL.
fn request(folder: &Path, key: &str) -> String {
    let file = folder.join("request.key");
    fs::write(&file, key).unwrap();
    run(Command::new("openssl").args(["req", "-new", "-subj", "/CN=whoever", "-key"]).arg(&file))
}

/// A certificate of the present Org CA for `key`, as its owner gets one.
pub fn under_org_ca(deploy: &Deploy, name: &str, key: &str) -> String {
    let body = json!({ "agent_name": name, "csr_pem": request(deploy.folder(), key) });
    let issued = deploy.admin_post("/v1/admin/pki/byoca-certificates", &body).expect(201);
    issued["cert_pem"].as_str().unwrap().to_owned()
}

fn rsa_key() -> String {
    run(Command::new("openssl").args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]))
}

fn enroll(deploy: &Deploy, name: &str, cert_pem: &str, key_pem: &str, more: Value) -> Answer {
    let mut body = json!({
        "agent_name": name, "display_name": "", "capabilities": ["x.read"], "cert_pem": cert_pem,
        "private_key_pem": key_pem, "federated": false,
    });
    for (field, value) in more.as_object().unwrap() {
        body[field] = value.clone();
    }
    deploy.admin_post("/v1/admin/agents/enroll/byoca", &body)
}

/// The SDK's own enrollment, and the agent that its files make.
pub fn by_sdk(deploy: &Deploy, python: Python, name: &str, request: Value) -> Agent {
    let directory = deploy.folder().join(format!("sdk-{name}"));
    let ca = ca_file(deploy);
    let mut agent = Agent::bare(python);
    let mut ask = json!({
        "mastio_url": deploy.url(), "ca": ca, "admin_secret": ADMIN_SECRET, "agent_name": name, "persist_to": directory,
    });
    for (field, value) in request.as_object().unwrap() {
        ask[field] = value.clone();
    }
    agent.ask(&ask).unwrap_or_else(|raised| panic!("{raised:?}"));
    let id = deploy.admin_get(&format!("/v1/admin/agents/{name}")).expect(200)["agent_id"].clone();
    agent
        .ask(&json!({ "cmd": "open", "identity_dir": directory, "ca": ca, "mastio_url": deploy.url(), "agent_id": id }))
        .unwrap();
    agent
}

fn byoca(database: Database, python: Python) {
    let deploy = fresh(database);
    let upstream = Upstream::start();
    let key = ClientKey::new();
    let certificate = under_org_ca(&deploy, "billing", &key.private_pem());
    let body =
        json!({ "cmd": "enroll-byoca", "cert_pem": certificate, "private_key_pem": key.private_pem() });
    let mut agent = by_sdk(&deploy, python, "billing", body);
    let shown = deploy.admin_get("/v1/admin/agents/billing").expect(200);
    assert_eq!((&shown["enrollment"], shown["dpop_jkt"].is_string()), (&json!("byoca"), true));
    deploy.register_tool(TOOL, upstream.url(), &[shown["agent_id"].as_str().unwrap()]);
    agent.call().unwrap();
    assert_eq!(agent.tools(), [TOOL]);
    // The key is its owner's: nothing of it is kept, and nobody signs with it here.
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM proxy_config WHERE key LIKE 'agent_key:%'"), "0");
    let raised = agent.ask(&json!({ "cmd": "login-proxy" })).unwrap_err();
    assert!(raised.text.contains("404"), "{raised:?}");
    assert_eq!(events(&deploy, "agent.byoca_enrolled").len(), 1);
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn the_sdk_enrolls_an_owner_s_certificate_on_sqlite() {
    byoca(Database::Sqlite, Python::Plain);
}

#[test]
fn the_sdk_on_a_strict_python_enrolls_an_owner_s_certificate_on_postgresql() {
    byoca(Database::Postgres, Python::Strict);
}

#[test]
fn the_private_key_of_an_owner_lies_in_no_file_of_ours() {
    let mut deploy = fresh(Database::Sqlite);
    let key = ClientKey::new();
    let certificate = under_org_ca(&deploy, "billing", &key.private_pem());
    enroll(&deploy, "billing", &certificate, &key.private_pem(), json!({})).expect(201);
    deploy.stop();
    let needle = key.private_pem().lines().nth(1).unwrap().to_owned();
    for entry in fs::read_dir(deploy.data_dir()).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(!bytes.windows(needle.len()).any(|part| part == needle.as_bytes()), "{}", path.display());
    }
    assert!(!deploy.log_text().contains(&needle));
}

#[test]
fn what_does_not_fit_together_is_refused_and_changes_nothing() {
    let deploy = fresh(Database::Sqlite);
    let (key, other) = (ClientKey::new(), ClientKey::new());
    let pem = key.private_pem();
    let certificate = under_org_ca(&deploy, "billing", &pem);
    let (_, managed_chain, managed_key) = managed(&deploy, "managed");
    let foreign = foreign_ca(&deploy, "foreign");
    let org =
        deploy.admin_get("/v1/admin/agents/managed").expect(200)["agent_id"].as_str().unwrap().to_owned();
    let org = org.split_once("::").unwrap().0.to_owned();
    let stranger = foreign.issue(&key, &format!("URI:spiffe://cullis.local/{org}/billing"), "clientAuth");
    for (what, name, cert, private, status, says) in [
        ("another key", "billing", &certificate, other.private_pem(), 400, "not the certificate's"),
        ("no key", "billing", &certificate, "nothing".to_owned(), 400, "private key"),
        ("no certificate", "billing", &"nothing".to_owned(), pem.clone(), 400, "cannot be read"),
        ("another name", "payroll", &certificate, pem.clone(), 400, "::billing, not"),
        ("a name that none has", "a b", &certificate, pem.clone(), 422, "agent_name"),
        ("the intermediate's leaf", "managed", &managed_chain, managed_key, 400, "no_path"),
        ("another CA's", "billing", &stranger, pem.clone(), 400, "Org CA itself"),
    ] {
        let answer = enroll(&deploy, name, cert, &private, json!({}));
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.body.contains(says), "{what}: {answer:?}");
    }
    let mut private = key.jwk();
    private["d"] = json!("AAAA");
    assert_eq!(enroll(&deploy, "billing", &certificate, &pem, json!({ "dpop_jwk": private })).status, 400);
    let unauthenticated = deploy.curl("/v1/admin/agents/enroll/byoca", &["-d", "{}"]);
    assert_eq!(unauthenticated.status, 401);
    assert_eq!(deploy.sql("SELECT COUNT(*) FROM internal_agents"), "1");

    // The same CA, the same agent: said once, and again only where it is meant.
    let first = enroll(&deploy, "billing", &certificate, &pem, json!({ "dpop_jwk": key.jwk() })).expect(201);
    assert_eq!(first["cert_thumbprint"].as_str().unwrap().len(), 64);
    assert!(first["spiffe_id"].as_str().unwrap().ends_with("/billing"));
    assert_eq!(enroll(&deploy, "billing", &certificate, &pem, json!({})).status, 409);
    let second = under_org_ca(&deploy, "billing", &other.private_pem());
    assert_eq!(enroll(&deploy, "billing", &second, &other.private_pem(), json!({})).status, 409);
    let meant = json!({ "update_existing": true, "capabilities": [] });
    let updated = enroll(&deploy, "billing", &second, &other.private_pem(), meant.clone()).expect(200);
    assert_eq!(updated["capabilities"], json!(["x.read"]), "what the operator has set stays");
    Identity::new(&deploy, "second", &second, &other.private_pem()).challenge(&deploy).expect(200);
    // Another kind of agent is not enrolled over, nor is one that is set aside; nor does an approval take this one.
    let over = under_org_ca(&deploy, "managed", &pem);
    assert_eq!(enroll(&deploy, "managed", &over, &pem, meant.clone()).status, 409);
    let session = start(&deploy, &ClientKey::new().ask());
    assert_eq!(approve(&deploy, &session, "billing").status, 409);
    // It renews through its owner.
    let renewed = deploy.admin_post("/v1/admin/agents/billing/renew", &json!({}));
    assert!(renewed.expect(409)["detail"].as_str().unwrap().contains("owner"));
    // What was revoked does not come back.
    deploy.admin_post("/v1/admin/certs/revoke", &json!({ "agent_id": "billing" })).expect(200);
    assert_eq!(enroll(&deploy, "billing", &second, &other.private_pem(), meant.clone()).status, 409);
    let third = under_org_ca(&deploy, "billing", &other.private_pem());
    enroll(&deploy, "billing", &third, &other.private_pem(), meant).expect(200);
    Identity::new(&deploy, "third", &third, &other.private_pem()).challenge(&deploy).expect(200);
}

#[test]
fn keys_are_read_in_each_form_that_tools_write() {
    let deploy = fresh(Database::Sqlite);
    let file = deploy.folder().join("form.key");
    let convert = |key: &str, arguments: &[&str]| {
        fs::write(&file, key).unwrap();
        run(Command::new("openssl").args(arguments).arg("-in").arg(&file))
    };
    let (ec, rsa) = (ClientKey::new().private_pem(), rsa_key());
    let forms = [
        ("pkcs8-ec", ec.clone()),
        ("sec1", convert(&ec, &["ec"])),
        ("pkcs8-rsa", rsa.clone()),
        ("pkcs1", convert(&rsa, &["rsa", "-traditional"])),
    ];
    for (name, key) in forms {
        let certificate = under_org_ca(&deploy, name, &key);
        enroll(&deploy, name, &certificate, &key, json!({})).expect(201);
        Identity::new(&deploy, name, &certificate, &key).challenge(&deploy).expect(200);
    }
}

/// The owner's way through an update that replaces the Org CA: on with the old certificate, then a new one in place.
fn through_an_update(database: Database) {
    let Some(deploy) = Deploy::legacy("py_connector5_pending") else { return };
    let mut deploy = deploy.on(database);
    deploy.start();
    deploy.sql("UPDATE pending_updates SET status = 'rolled_back'");
    let probe = json!({ "agent_name": "probe", "capabilities": [] });
    wait_for("signing to go on", || {
        (deploy.admin_post("/v1/admin/agents", &probe).status == 201).then_some(())
    });
    let upstream = Upstream::start();
    let key = ClientKey::new();
    let old = under_org_ca(&deploy, "ledger", &key.private_pem());
    let body = json!({ "cmd": "enroll-byoca", "cert_pem": old, "private_key_pem": key.private_pem() });
    let mut agent = by_sdk(&deploy, Python::Plain, "ledger", body.clone());
    deploy.register_tool(TOOL, upstream.url(), &["acme::ledger"]);
    agent.call().unwrap();
    deploy.sql("DELETE FROM pending_updates WHERE migration_id = '2026-04-23-org-ca-pathlen-1'");
    deploy.restart();
    deploy.apply().expect(200);
    // Untouched, and good through the anchor that retires.
    let mut identity = Identity::new(&deploy, "old", &old, &key.private_pem());
    identity.challenge(&deploy).expect(200);
    // The page: re-run enroll_via_byoca against the new Org CA.
    let stale = enroll(&deploy, "ledger", &old, &key.private_pem(), json!({}));
    assert_eq!(stale.status, 400, "the old CA's certificate is no new one: {stale:?}");
    let new = under_org_ca(&deploy, "ledger", &key.private_pem());
    let mut body = body;
    body["cert_pem"] = json!(new);
    let mut agent = by_sdk(&deploy, Python::Strict, "ledger", body);
    agent.call().unwrap();
    identity.challenge(&deploy).expect(200);
    identity = Identity::new(&deploy, "new", &new, &key.private_pem());
    identity.challenge(&deploy).expect(200);
    assert_eq!(
        enroll(&deploy, "ledger", &new, &key.private_pem(), json!({})).status,
        409,
        "the CA is the same now"
    );
    let again = events(&deploy, "agent.byoca_enrolled");
    assert_eq!((again.len(), &again[0]["details"]["enrolled_anew"]), (2, &json!(true)));
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn an_owner_follows_a_replaced_org_ca_in_place_on_sqlite() {
    through_an_update(Database::Sqlite);
}

#[test]
fn an_owner_follows_a_replaced_org_ca_in_place_on_postgresql() {
    through_an_update(Database::Postgres);
}

/// A CA outside: SPIRE's, or a stranger's. OpenSSL runs it.
pub struct ForeignCa {
    folder: PathBuf,
}

pub fn foreign_ca(deploy: &Deploy, name: &str) -> ForeignCa {
    let folder = deploy.folder().join(name);
    fs::create_dir(&folder).unwrap();
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "30",
    ]);
    command.args(["-subj", "/O=SPIRE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
    command.args(["-addext", "basicConstraints=critical,CA:TRUE"]);
    run(command.arg("-keyout").arg(folder.join("ca.key")).arg("-out").arg(folder.join("ca.crt")));
    ForeignCa { folder }
}

impl ForeignCa {
    /// Its certificate.
    pub fn pem(&self) -> String {
        fs::read_to_string(self.folder.join("ca.crt")).unwrap()
    }

    /// A leaf for `key`.
    pub fn issue(&self, key: &ClientKey, san: &str, usage: &str) -> String {
        let csr = request(&self.folder, &key.private_pem());
        fs::write(self.folder.join("leaf.csr"), csr).unwrap();
        let extensions = format!(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage={usage}\n\
             subjectAltName={san}\nauthorityKeyIdentifier=keyid\n"
        );
        fs::write(self.folder.join("leaf.cnf"), extensions).unwrap();
        let mut command = Command::new("openssl");
        command.current_dir(&self.folder);
        command.args(["x509", "-req", "-in", "leaf.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "7"]);
        run(command.args(["-extfile", "leaf.cnf"]))
    }
}

/// An identity of SPIRE's.
pub const SPIFFE_ID: &str = "spiffe://prod.example/ns/billing/sa/ledger";

fn spiffe(database: Database, python: Python) {
    let deploy = fresh(database);
    let upstream = Upstream::start();
    let spire = foreign_ca(&deploy, "spire");
    let key = ClientKey::new();
    let svid = spire.issue(&key, &format!("URI:{SPIFFE_ID}"), "clientAuth,serverAuth");
    let body = json!({
        "cmd": "enroll-spiffe", "svid_pem": svid, "svid_key_pem": key.private_pem(), "trust_bundle_pem": spire.pem(),
    });
    let mut agent = by_sdk(&deploy, python, "ledger", body);
    let shown = deploy.admin_get("/v1/admin/agents/ledger").expect(200);
    assert_eq!(shown["enrollment"], "spire");
    deploy.register_tool(TOOL, upstream.url(), &[shown["agent_id"].as_str().unwrap()]);
    agent.call().unwrap();
    Identity::new(&deploy, "svid", &svid, &key.private_pem()).challenge(&deploy).expect(200);
    assert_eq!(events(&deploy, "agent.spire_enrolled")[0]["details"]["spiffe_id"], SPIFFE_ID);
    deploy.mastio_ok(&["audit", "verify"]);
}

#[test]
fn the_sdk_enrolls_an_svid_on_sqlite() {
    spiffe(Database::Sqlite, Python::Plain);
}

#[test]
fn the_sdk_on_a_strict_python_enrolls_an_svid_on_postgresql() {
    spiffe(Database::Postgres, Python::Strict);
}

#[test]
fn a_bundle_vouches_for_its_own_agent_alone() {
    let deploy = fresh(Database::Sqlite);
    let (spire, stranger) = (foreign_ca(&deploy, "spire"), foreign_ca(&deploy, "stranger"));
    let (agent_id, ..) = managed(&deploy, "victim");
    let org = agent_id.split_once("::").unwrap().0.to_owned();
    let key = ClientKey::new();
    let uri = format!("URI:{SPIFFE_ID}");
    let svid = spire.issue(&key, &uri, "clientAuth");
    let enroll = |name: &str, svid: &str, bundle: Option<String>, more: Value| {
        let mut body = json!({ "agent_name": name, "svid_pem": svid, "svid_key_pem": key.private_pem() });
        if let Some(bundle) = bundle {
            body["trust_bundle_pem"] = json!(bundle);
        }
        for (field, value) in more.as_object().unwrap() {
            body[field] = value.clone();
        }
        deploy.admin_post("/v1/admin/agents/enroll/spiffe", &body)
    };
    let ours = deploy.get("/pki/ca.crt").body;
    for (what, name, svid, bundle, status) in [
        ("nobody vouches", "ledger", svid.clone(), None, 503),
        ("a stranger vouches", "ledger", svid.clone(), Some(stranger.pem()), 400),
        ("we vouch", "ledger", svid.clone(), Some(ours), 400),
        ("a leaf vouches", "ledger", svid.clone(), Some(svid.clone()), 400),
        ("no bundle", "ledger", svid.clone(), Some("nothing".to_owned()), 400),
        ("no SPIFFE id", "ledger", spire.issue(&key, "DNS:ledger", "clientAuth"), Some(spire.pem()), 400),
        (
            "two ids",
            "ledger",
            spire.issue(&key, &format!("{uri},URI:spiffe://x/y"), "clientAuth"),
            Some(spire.pem()),
            400,
        ),
        ("for servers", "ledger", spire.issue(&key, &uri, "serverAuth"), Some(spire.pem()), 400),
        (
            "the name of one of ours",
            "ledger",
            spire.issue(&key, &format!("URI:spiffe://cullis.local/{org}/victim"), "clientAuth"),
            Some(spire.pem()),
            400,
        ),
    ] {
        let answer = enroll(name, &svid, bundle, json!({}));
        assert_eq!(answer.status, status, "{what}: {answer:?}");
    }
    // The predecessor's setting is understood.
    let bundle = spire.pem().replace('\n', "' || char(10) || '");
    deploy.sql(&format!("INSERT INTO proxy_config (key, value) VALUES ('spire_trust_bundle', '{bundle}')"));
    enroll("ledger", &svid, None, json!({})).expect(201);
    assert_eq!(enroll("ledger", &svid, None, json!({})).status, 409);
    assert_eq!(enroll("ledger2", &svid, None, json!({})).status, 409, "one SPIFFE id, one agent");
    let identity = Identity::new(&deploy, "svid", &svid, &key.private_pem());
    identity.challenge(&deploy).expect(200);

    // SPIRE's CA names an agent of ours, and is believed by nobody: neither for a managed agent nor for an unknown one.
    for (name, reason) in [("victim", "client_cert_pin_mismatch"), ("nobody", "agent_unknown_or_inactive")] {
        let forged = spire.issue(&key, &format!("URI:spiffe://cullis.local/{org}/{name}"), "clientAuth");
        assert_eq!(Identity::new(&deploy, "forged", &forged, &key.private_pem()).refusal(&deploy), reason);
    }
    // Nor is another SVID of the same id, unless it is enrolled.
    let other = ClientKey::new();
    let second = spire.issue(&other, &uri, "clientAuth");
    let unknown = Identity::new(&deploy, "second", &second, &other.private_pem());
    assert_eq!(unknown.refusal(&deploy), "client_cert_pin_mismatch");
    let rotated = json!({ "update_existing": true, "svid_pem": second, "svid_key_pem": other.private_pem() });
    enroll("ledger", &second, None, rotated).expect(200);
    unknown.challenge(&deploy).expect(200);
    identity.challenge(&deploy).expect(200);
    // Deleted, its id is free.
    let secret = format!("X-Admin-Secret: {ADMIN_SECRET}");
    deploy.curl("/v1/admin/agents/ledger?permanently=true", &["-X", "DELETE", "-H", &secret]);
    assert_eq!(unknown.refusal(&deploy), "client_cert_no_identity");
    assert_eq!(certificates(&spire.pem()).len(), 1);
    enroll("ledger3", &spire.issue(&key, &uri, "clientAuth"), None, json!({})).expect(201);
}
