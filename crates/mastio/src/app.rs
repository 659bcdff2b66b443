//! The wiring: every part built once, in the order of the boot, routes mounted, jobs started, and the way down.
//!
//! Boot: lock the data directory, open the store, adopt a predecessor's database, bring the schema up, open the
//! sealing key, create the organisation where there is none, finish what a crash left, run the detector, complete the
//! identity, make the TLS certificate, listen. Nothing is signed before the detector has spoken, and no request is
//! accepted before the halt is known.

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Router};
use mastio_core::error::Kind;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::clock::{Clock, SystemClock};
use crate::config::{Config, Resolved};
use crate::dashboard::{self, Dashboard};
use crate::enrollment::{self, Agents};
use crate::entropy::Entropy;
use crate::gateway::{self, Gateway};
use crate::health::{self, Health};
use crate::http::authn::{AdminCaller, AdminSecret};
use crate::http::context::Context;
use crate::http::error::{ApiError, chain, envelope};
use crate::http::json::BODY_BYTES_MAX;
use crate::http::limits::{self, RateLimit};
use crate::http::overload::{self, Overload};
use crate::http::server::{self, Server};
use crate::http::urls::ExternalUrls;
use crate::metrics::{self, Metrics};
use crate::operators::sso::Sso;
use crate::operators::{self, Operators};
use crate::pki::seal_rotation::{self, NewSeal, RotationError};
use crate::pki::sealing::{self, SealingError};
use crate::pki::tls::{ServerNames, Tls};
use crate::pki::{self, Pki, PkiError, bootstrap};
use crate::store::adopt::undo::{UndoError, Undoing};
use crate::store::adopt::{self, AdoptError};
use crate::store::claims::{Claims, NotRedis};
use crate::store::ephemeral;
use crate::store::group::Journal;
use crate::store::refusals::Refusals;
use crate::store::{DatabaseUrl, Store, StoreError, schema};
use crate::tokens::http::Proofs;
use crate::tokens::{self, DpopNonces, Tokens};
use crate::updates::{self, UpdateError, Updates};

/// How often the epoch in the database is looked at: how late an operator's SQL is seen at most.
const EPOCH_POLL: Duration = Duration::from_millis(250);
/// How often expired identifiers are forgotten.
const FORGET_PERIOD: Duration = Duration::from_secs(5);
/// How often the refusals that have no event each are looked at.
const SUMMARISE_PERIOD: Duration = Duration::from_secs(10);
/// How often SQLite's log is emptied into its file.
const CHECKPOINT_PERIOD: Duration = Duration::from_secs(1);
/// How often runs of dead replicas are looked for.
const RECOVER_PERIOD: Duration = Duration::from_secs(2);
/// How often it is written down which certificates agents present.
const SIGHTINGS_PERIOD: Duration = Duration::from_secs(2);
/// How often the server certificate's end is looked at.
const TLS_PERIOD: Duration = Duration::from_secs(3600);
/// How often agents' certificates that end soon are logged.
const EXPIRY_PERIOD: Duration = Duration::from_secs(3600);
/// How often MCP servers are asked for their tools.
const UPSTREAM_PERIOD: Duration = Duration::from_secs(300);
/// The file that says which process holds the data directory.
const LOCK_FILE: &str = "mastio.lock";
/// The file that names this replica in the journal of runs.
const REPLICA_FILE: &str = "replica.id";

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Single sign-on cannot be set up.
    #[error("single sign-on (MCP_PROXY_OIDC_ISSUER) cannot be set up")]
    SingleSignOn(#[source] reqwest::Error),
    /// Another process serves from the data directory.
    #[error("{path} is held by another mastio: stop it first, or choose another data directory")]
    Locked {
        /// The lock file.
        path: String,
    },
    /// The data directory cannot be used.
    #[error("the data directory {path} cannot be used")]
    DataDir {
        /// Which.
        path: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A sealing key lies there, and its database does not.
    #[error(
        "{path} holds seal.key but no database: restore the database, or remove seal.key to begin a new organisation"
    )]
    DatabaseLost {
        /// The data directory.
        path: String,
    },
    /// The database has no organisation, and was named by URL.
    #[error(
        "the database {url} holds no organisation: check MCP_PROXY_DATABASE_URL, or start once with --init to create one"
    )]
    NotInitialised {
        /// The database, without password.
        url: String,
    },
    /// Strict mode and a legacy Org CA.
    #[error(
        "MCP_PROXY_STRICT_PKI is set and the Org CA has pathLen=0: run `mastio updates apply {0}`, then start again"
    )]
    StrictPki(&'static str),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: MCP_PROXY_LISTEN chooses another address")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Adoption.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The sealing key.
    #[error(transparent)]
    Sealing(#[from] SealingError),
    /// Undoing an adoption.
    #[error(transparent)]
    Undo(#[from] UndoError),
    /// Moving to another sealing key.
    #[error(transparent)]
    SealRotation(#[from] RotationError),
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Updates.
    #[error(transparent)]
    Updates(#[from] UpdateError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The URL of Redis.
    #[error(transparent)]
    Redis(#[from] NotRedis),
    /// The gateway.
    #[error("the gateway cannot start")]
    Gateway(#[from] gateway::GatewayError),
}

/// A deploy whose state is open: what the server and the command line both stand on.
pub struct Deploy {
    /// The certificate authority.
    pub pki: Arc<Pki>,
    /// Updates, detected.
    pub updates: Arc<Updates>,
    _lock: Option<File>,
}

/// Opens a deploy: adopts, migrates, unseals, creates, recovers, detects, completes.
pub async fn open(config: &Config) -> Result<Deploy, AppError> {
    let data_dir = &config.data_dir;
    std::fs::create_dir_all(data_dir).map_err(|source| data_dir_error(data_dir, source))?;
    let sqlite = matches!(config.database_url, DatabaseUrl::Sqlite(_));
    let lock = if sqlite { Some(lock(data_dir)?) } else { None };
    let fresh = match &config.database_url {
        DatabaseUrl::Sqlite(path) => !path.exists(),
        DatabaseUrl::Postgres(_) => false,
    };
    let may_create = config.init || !config.database_url_given;
    if fresh && !may_create {
        return Err(AppError::NotInitialised { url: config.database_url.redacted() });
    }
    if fresh && data_dir.join(sealing::SEAL_KEY_FILE).exists() {
        return Err(AppError::DatabaseLost { path: data_dir.display().to_string() });
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let entropy = Arc::new(Entropy::default());
    let store =
        Store::open(&config.database_url, may_create, Arc::clone(&clock), Arc::clone(&entropy)).await?;
    let passphrase = config.db_encryption_key.as_deref();
    if let Some(adopted) = adopt::adopt_if_legacy(&store, data_dir, passphrase, &entropy).await? {
        tracing::info!(agents = adopted.agents, copy = %adopted.copy.display(), "deploy_adopted");
        if let Some(found) = &adopted.audit_break {
            tracing::warn!(found, "the predecessor's audit chain does not verify; the break is recorded");
        }
    }
    schema::migrate(&store).await?;
    match adopt::finish_scrub(&store).await {
        // Somebody reads the file just now; the mark stays, and the next boot tries again.
        Err(error @ AdoptError::Scrub { .. }) => {
            tracing::warn!(error = chain(&error), "adoption_scrub_postponed")
        }
        other => other?,
    }
    let opened = sealing::open(&mut store.read().await?, data_dir, passphrase).await?;
    let sealing = match opened {
        Some(sealing) => {
            // What a rotation left that ended between its commit and its files.
            seal_rotation::finish(&store, data_dir, &sealing)?;
            sealing
        }
        None if !may_create => return Err(AppError::NotInitialised { url: config.database_url.redacted() }),
        None => {
            let mut tx = store.write().await?;
            let sealing = sealing::create(&mut tx, data_dir, passphrase, !sqlite, &entropy).await?;
            tx.commit_unaudited().await?;
            sealing
        }
    };
    if !bootstrap::has_organisation(&store).await? {
        if !may_create {
            return Err(AppError::NotInitialised { url: config.database_url.redacted() });
        }
        let org_id =
            bootstrap::create_organisation(&store, &sealing, config.org_id.as_deref(), &entropy).await?;
        tracing::info!(org_id, "organisation_created");
    }
    let pki = Arc::new(Pki::load(store, sealing, config.trust_domain.clone(), clock, entropy).await?);
    for reason in &pki.gate().halt().reasons {
        updates::halt::log(reason);
    }
    let replica = replica(data_dir, &pki.entropy).map_err(|source| data_dir_error(data_dir, source))?;
    let updates =
        Arc::new(Updates::new(Arc::clone(&pki), replica, config.two_person, config.update_snapshots_kept));
    updates.recover().await?;
    updates.detect().await?;
    pki.complete().await?;
    Ok(Deploy { pki, updates, _lock: lock })
}

/// Where an operator wants everything sealed.
pub enum SealChoice {
    /// Under another key of the same kind; or under the passphrase that is set, where `seal.key` is in force.
    Another,
    /// Under a new `seal.key`.
    File,
    /// Under this passphrase.
    Passphrase(String),
}

/// Seals everything of a stopped deploy under another key, and tells what went.
///
/// Errors: [`AppError::Locked`] while a server runs; [`AppError::SealRotation`].
pub async fn rotate_seal(config: &Config, choice: SealChoice, actor: &str) -> Result<Value, AppError> {
    let data_dir = &config.data_dir;
    let sqlite = matches!(config.database_url, DatabaseUrl::Sqlite(_));
    let _lock = if sqlite { Some(lock(data_dir)?) } else { None };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let entropy = Arc::new(Entropy::default());
    let open = || Store::open(&config.database_url, false, Arc::clone(&clock), Arc::clone(&entropy));
    let store = open().await?;
    if !schema::is_ours(&store).await? {
        return Err(AppError::NotInitialised { url: config.database_url.redacted() });
    }
    schema::migrate(&store).await?;
    let set = config.db_encryption_key.as_deref();
    let source = sealing::state(&mut store.read().await?, "sealing_source").await?;
    let by_passphrase = source.as_deref() == Some("passphrase");
    let new = match choice {
        SealChoice::File => NewSeal::File,
        SealChoice::Passphrase(passphrase) => NewSeal::Passphrase(passphrase),
        SealChoice::Another if by_passphrase => return Err(RotationError::Unsaid.into()),
        SealChoice::Another => set.map_or(NewSeal::File, |set| NewSeal::Passphrase(set.to_owned())),
    };
    let present = set.filter(|_| by_passphrase);
    let former = sealing::open(&mut store.read().await?, data_dir, present).await?;
    let former = former.ok_or_else(|| AppError::NotInitialised { url: config.database_url.redacted() })?;
    seal_rotation::finish(&store, data_dir, &former)?;
    // Another replica's session must be told from our own.
    store.close().await;
    let store = open().await?;
    let rotated = seal_rotation::rotate(&store, data_dir, &former, new, actor, &entropy).await?;
    let scrubbed = adopt::finish_scrub(&store).await;
    store.close().await;
    match scrubbed {
        // Somebody reads the file just now; the mark stays, and the next boot tries again.
        Err(error @ AdoptError::Scrub { .. }) => tracing::warn!(error = chain(&error), "scrub_postponed"),
        other => other?,
    }
    Ok(rotated)
}

/// Has the predecessor's database take the place of an adopted one. `agreed` is told what would be lost.
///
/// Errors: [`AppError::Locked`] while a server runs; [`AppError::Undo`].
pub async fn undo_adoption<E: From<AppError>>(
    config: &Config,
    copy: Option<&Path>,
    agreed: impl FnOnce(&Undoing) -> Result<(), E>,
) -> Result<Value, E> {
    let undone = async {
        let data_dir = &config.data_dir;
        if !matches!(config.database_url, DatabaseUrl::Sqlite(_)) {
            return Err(AppError::Undo(UndoError::NotAdopted));
        }
        let lock = lock(data_dir)?;
        let entropy = Arc::new(Entropy::default());
        let store = Store::open(&config.database_url, false, Arc::new(SystemClock), entropy).await?;
        if !schema::is_ours(&store).await? {
            return Err(AppError::Undo(UndoError::NotAdopted));
        }
        let passphrase = config.db_encryption_key.as_deref();
        let key = sealing::open(&mut store.read().await?, data_dir, passphrase).await?;
        let key = key.ok_or(AppError::Undo(UndoError::NotAdopted))?;
        let undoing = adopt::undo::look(&store, &key, copy).await;
        store.close().await;
        Ok::<_, AppError>((lock, undoing?))
    };
    let (_lock, undoing) = undone.await?;
    agreed(&undoing)?;
    let report = json!({
        "restored": undoing.copy.display().to_string(),
        "kept": undoing.aside.display().to_string(),
        "agents_lost": undoing.agents_lost,
        "events_lost": undoing.events_lost,
        "next": "start the Python Mastio on it; mastio serve would adopt it again",
    });
    undoing.finish().map_err(AppError::from)?;
    Ok(report)
}

/// A server that accepts requests.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    /// The URL on this machine.
    pub url: String,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    jobs: Vec<JoinHandle<()>>,
    journal: JoinHandle<()>,
    pki: Arc<Pki>,
    stopping: Arc<AtomicBool>,
    gateway: Arc<Gateway>,
    // Held until the process has drained: another one must not open the data directory before.
    deploy: Deploy,
}

impl Running {
    /// Drains: accepted requests finish, their events are durable, then everything is closed.
    pub async fn stop(self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Those who watch a run would keep their connections open for good.
        self.deploy.updates.close();
        self.gateway.streams.close();
        drop(self.gateway);
        self.stop.send_replace(true);
        for job in self.jobs {
            job.abort();
        }
        // A task that panicked has nothing left to drain.
        let _ended = self.server.await;
        let _ended = tokio::time::timeout(Duration::from_secs(10), self.journal).await;
        self.pki.store.close().await;
    }
}

/// Starts everything and listens.
pub async fn start(resolved: Resolved) -> Result<Running, AppError> {
    let Resolved { config, settings, .. } = resolved;
    let deploy = open(&config).await?;
    let (pki, updates) = (Arc::clone(&deploy.pki), Arc::clone(&deploy.updates));
    if config.strict_pki && pki.authority().org_ca_has_legacy_path_len() {
        return Err(AppError::StrictPki(updates::migrations::m2026_04_23_org_ca_pathlen_1::ID));
    }
    let names = server_names(&config);
    let tls = Arc::new(Tls::start(&pki, names.clone(), config.tls_files.clone()).await?);
    let metrics = Arc::new(Metrics::new());
    updates.attach(Arc::clone(&tls), Arc::clone(&metrics));
    let failures = Arc::clone(&metrics);
    let claims = config.redis_url.as_deref().map(Claims::new).transpose()?;
    if let Some(claims) = &claims {
        // A Redis that is away does not stop the boot: the server has to be reached to say so.
        claims.look().await;
    }
    let (journal, journal_task) =
        Journal::start(pki.store.clone(), Box::new(move || failures.audit_append_failed()));
    let journal = journal.with_claims(claims.clone());
    let refusals = Refusals::new(journal.clone());
    let agents = Arc::new(Agents::new(Arc::clone(&pki), RateLimit::per_minute(config.rate_limit_per_minute)));
    let nonces = Arc::new(DpopNonces::open(&pki).await?);
    let tokens = Arc::new(Tokens::new(Arc::clone(&agents), journal.clone(), nonces, config.dpop_nonce));
    let hosts = names.dns.iter().cloned().chain(names.ips.iter().map(IpAddr::to_string)).collect();
    let urls = ExternalUrls::new(config.public_url.clone(), hosts);
    let stopping = Arc::new(AtomicBool::new(false));
    let gateway =
        gateway(&pki, &config, journal, Arc::clone(&tokens), urls.clone(), refusals.clone(), &metrics)?;

    let listener = server::bind(config.listen)
        .await
        .map_err(|source| AppError::Listen { address: config.listen, source })?;
    let address =
        listener.local_addr().map_err(|source| AppError::Listen { address: config.listen, source })?;
    let url = local_url(address);
    note_url(&config.data_dir, &url).map_err(|source| data_dir_error(&config.data_dir, source))?;

    let health = Health {
        pki: Arc::clone(&pki),
        updates: Arc::clone(&updates),
        tls: Arc::clone(&tls),
        claims: claims.clone(),
        metrics: Arc::clone(&metrics),
        version: config.version.clone(),
        stopping: Arc::clone(&stopping),
    };
    let secret = AdminSecret::new(config.admin_secret.clone());
    let proofs = Proofs {
        tokens: Arc::clone(&tokens),
        urls: urls.clone(),
        egress: config.egress_dpop,
        refusals: refusals.clone(),
    };
    let operators = Arc::new(Operators::new(pki.store.clone(), Arc::clone(&pki.entropy), secret.clone()));
    let setup_token = operators.offer_setup().await?;
    let sso = config.single_sign_on.clone().map(Sso::new).transpose().map_err(AppError::SingleSignOn)?;
    let dashboard = Arc::new(Dashboard::new(
        health.clone(),
        Arc::clone(&agents),
        Arc::clone(&operators),
        Arc::clone(&gateway),
        secret,
        settings,
        sso.map(|sso| (sso, urls.clone())),
    ));
    let entrance = Arc::new(Entrance {
        room: limits::room(),
        all_together: RateLimit::per_second(config.global_rate_limit_rps.unwrap_or(0)),
        by_address: limits::per_minute(config.address_rate_limit_per_minute),
        dashboard: Arc::clone(&dashboard),
        operators: Arc::clone(&operators),
        proofs,
    });
    let router = Router::new()
        .merge(health::routes(health))
        .merge(crate::openapi::routes())
        .merge(pki::http::routes(Arc::clone(&pki)))
        .merge(enrollment::http::routes(Arc::clone(&agents), refusals.clone()))
        .merge(tokens::http::routes(tokens, urls, Arc::clone(&metrics), refusals.clone()))
        .merge(gateway::routes(Arc::clone(&gateway)))
        .merge(updates::http::routes(Arc::clone(&updates)))
        .merge(crate::audit::http::routes(pki.store.clone()))
        .merge(operators::http::routes(Arc::clone(&operators)))
        .merge(dashboard::http::routes(Arc::clone(&dashboard)))
        .fallback(|| async { ApiError::new(Kind::NotFound, "Not Found") })
        .layer(middleware::from_fn_with_state(entrance, enter))
        .layer(middleware::from_fn_with_state(Overload::new(Instant::now()), overload::shed))
        .layer(middleware::from_fn_with_state(Arc::clone(&metrics), metrics::observe))
        .layer(middleware::from_fn(envelope))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(config.trusted_front.clone(), crate::http::headers::guard));
    let (stop, stopped) = watch::channel(false);
    let server = Server {
        listener,
        tls: Arc::clone(&tls.config),
        router,
        clock: Arc::clone(&pki.clock),
        entropy: Arc::clone(&pki.entropy),
        refusals: refusals.clone(),
    };
    let mut jobs = jobs(&pki, &updates, &tls, &agents);
    jobs.push(summarise(refusals, Arc::clone(&pki)));
    jobs.push(look_at_upstreams(Arc::clone(&gateway)));
    jobs.push(follow_changes(Arc::clone(&gateway)));
    jobs.extend(claims.map(|claims| tokio::spawn(async move { claims.keep().await })));
    let server = tokio::spawn(server.run(stopped));
    crate::logging::listening(address, &url);
    if let Some(token) = setup_token {
        crate::logging::setup_open(&url, &token);
    }
    Ok(Running { address, url, stop, server, jobs, journal: journal_task, pki, stopping, gateway, deploy })
}

/// The gateway of a deploy.
fn gateway(
    pki: &Pki,
    config: &Config,
    journal: Journal,
    tokens: Arc<Tokens>,
    urls: ExternalUrls,
    refusals: Refusals,
    metrics: &Arc<Metrics>,
) -> Result<Arc<Gateway>, AppError> {
    let secrets: gateway::Secrets = Arc::new(crate::config::environment_secret);
    Ok(Arc::new(Gateway {
        store: pki.store.clone(),
        journal,
        upstream: gateway::Upstream::new(&config.internal_host_allowlist, secrets)?,
        org_id: pki.authority().org_id.clone(),
        entropy: Arc::clone(&pki.entropy),
        authenticate: Arc::new(gateway::TokenCallers::new(tokens, urls.clone(), refusals)),
        sealing: pki.shared_sealing(),
        peers: gateway::Peers::default(),
        underway: gateway::Underway::default(),
        streams: gateway::Streams::default(),
        resumable: Arc::default(),
        schemas: moka::future::Cache::new(gateway::SCHEMAS_MAX),
        rules: arc_swap::ArcSwap::default(),
        tool_limits: RateLimit::per_minute(0),
        urls,
        metrics: Arc::clone(metrics),
    }))
}

/// The gateway's routes for a deploy without a server. Nobody is asked who they are: whoever has the database is let in
/// as `admin`.
pub(crate) async fn gateway_routes(
    deploy: &Deploy,
    config: &Config,
    admin: AdminCaller,
) -> Result<Router, AppError> {
    let pki = &deploy.pki;
    let metrics = Arc::new(Metrics::new());
    let (journal, _nothing_waits) = Journal::start(pki.store.clone(), Box::new(|| {}));
    let agents = Arc::new(Agents::new(Arc::clone(pki), RateLimit::per_minute(0)));
    let nonces = Arc::new(DpopNonces::open(pki).await?);
    let tokens = Arc::new(Tokens::new(agents, journal.clone(), nonces, config.dpop_nonce));
    let urls = ExternalUrls::new(config.public_url.clone(), Vec::new());
    let refusals = Refusals::new(journal.clone());
    let gateway = gateway(pki, config, journal, tokens, urls, refusals, &metrics)?;
    let now = pki.clock.now();
    let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let context = Context {
        request_id: pki.entropy.ulid(now),
        now,
        peer: here,
        source: here.ip(),
        client_certificate: None,
        quotas: limits::Quotas::default(),
    };
    Ok(gateway::routes(gateway).layer(Extension(admin)).layer(Extension(context)))
}

/// What stands before every route.
struct Entrance {
    room: Semaphore,
    all_together: RateLimit,
    by_address: Arc<RateLimit>,
    dashboard: Arc<Dashboard>,
    operators: Arc<Operators>,
    proofs: Proofs,
}

/// Lets a request in, or says why not. One layer for all of it: each layer of axum's copies those below it for every
/// request.
async fn enter(
    State(entrance): State<Arc<Entrance>>,
    context: Context,
    mut request: Request,
    next: Next,
) -> Result<Response, Response> {
    let refused = ApiError::into_response;
    let _held = limits::enter(&entrance.room).map_err(refused)?;
    limits::shed(&entrance.all_together, &context, request.uri().path()).map_err(refused)?;
    limits::by_address(&entrance.by_address, &context, request.uri().path()).map_err(refused)?;
    // Whoever a session stands for must be known before the guard asks.
    dashboard::http::attach_session(&entrance.dashboard, &mut request).await.map_err(refused)?;
    operators::http::guard(&entrance.operators, &mut request).await?;
    let nonce = entrance.proofs.nonce(&context, request.uri().path());
    // Its parts can be lent while we wait; the whole cannot, because of its body.
    let (headers, method, path) = (request.headers(), request.method(), request.uri().path());
    let proven = entrance.proofs.prove_persistent_key(&context, headers, method, path).await;
    let mut response = match proven {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    if let Some(nonce) = nonce {
        response.headers_mut().insert("dpop-nonce", nonce);
    }
    Ok(response)
}

/// Writes the refusals that were only counted, when their minute is over.
fn summarise(refusals: Refusals, pki: Arc<Pki>) -> JoinHandle<()> {
    let mut ticks = tokio::time::interval(SUMMARISE_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::spawn(async move {
        loop {
            ticks.tick().await;
            refusals.summarise(pki.clock.now().seconds()).await;
        }
    })
}

/// Wakes the streams on which agents are told what changes.
fn follow_changes(gateway: Arc<Gateway>) -> JoinHandle<()> {
    tokio::spawn(async move { gateway.follow_changes().await })
}

/// Looks at every MCP server now and then: a definition that has changed is blocked before anybody calls it. Deletes what
/// was kept of calls and is over its time.
fn look_at_upstreams(gateway: Arc<Gateway>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(UPSTREAM_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = gateway.store.clock().now().seconds();
            if let Err(error) = gateway.delete_expired_evidence(now).await {
                tracing::warn!(error = chain(&error), "mcp_evidence_not_deleted");
            }
            gateway.look_at_all(now).await;
        }
    })
}

/// Timed work. Each job that fails says so and tries again at its next turn.
fn jobs(pki: &Arc<Pki>, updates: &Arc<Updates>, tls: &Arc<Tls>, agents: &Arc<Agents>) -> Vec<JoinHandle<()>> {
    let every = |period: Duration| {
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        interval
    };
    let follow = {
        let (pki, mut ticks) = (Arc::clone(pki), every(EPOCH_POLL));
        tokio::spawn(async move {
            let mut failing = false;
            loop {
                ticks.tick().await;
                let refreshed = pki.refresh().await;
                // Said once when it begins, not four times a second.
                if let (Err(error), false) = (&refreshed, failing) {
                    tracing::error!(error = chain(error), "epoch_poll_failed");
                }
                failing = refreshed.is_err();
            }
        })
    };
    let forget = {
        let (pki, mut ticks) = (Arc::clone(pki), every(FORGET_PERIOD));
        tokio::spawn(async move {
            loop {
                ticks.tick().await;
                if let Err(error) = ephemeral::forget_expired(&pki.store, pki.clock.now().seconds()).await {
                    tracing::warn!(error = chain(&error), "forget_expired_failed");
                }
            }
        })
    };
    let checkpoint = {
        let (store, mut ticks) = (pki.store.clone(), every(CHECKPOINT_PERIOD));
        tokio::spawn(async move {
            loop {
                ticks.tick().await;
                if let Err(error) = store.sqlite_checkpoint().await {
                    tracing::warn!(error = chain(&error), "sqlite_checkpoint_failed");
                }
            }
        })
    };
    let recover = {
        let (updates, mut ticks) = (Arc::clone(updates), every(RECOVER_PERIOD));
        tokio::spawn(async move {
            loop {
                ticks.tick().await;
                if let Err(error) = updates.pki.store.try_to_write().await {
                    tracing::error!(error = chain(&error), "database_refuses_writes");
                    continue;
                }
                if let Err(error) = updates.recover().await {
                    tracing::warn!(error = chain(&error), "update_recovery_failed");
                }
                if let Err(error) = updates.sweep().await {
                    tracing::warn!(error = chain(&error), "update_sweep_failed");
                }
                if let Err(error) = updates.settle_expired().await {
                    tracing::warn!(error = chain(&error), "overlap_settling_failed");
                }
            }
        })
    };
    let sight = {
        let (agents, mut ticks) = (Arc::clone(agents), every(SIGHTINGS_PERIOD));
        tokio::spawn(async move {
            loop {
                ticks.tick().await;
                if let Err(error) = agents.note_sightings().await {
                    tracing::warn!(error = chain(&error), "sightings_not_noted");
                }
            }
        })
    };
    let renew = {
        let (pki, tls, mut ticks) = (Arc::clone(pki), Arc::clone(tls), every(TLS_PERIOD));
        // Another replica's update changes the chain that we present: follow the epochs too.
        let mut epochs = pki.epochs();
        tokio::spawn(async move {
            loop {
                let due = tokio::select! {
                    _ = ticks.tick() => tls.is_due(pki.clock.now().seconds()),
                    changed = epochs.changed() => changed.is_ok() && tls.chain_differs(&pki),
                };
                if due && let Err(error) = tls.refresh(&pki).await {
                    tracing::error!(error = chain(&error), "tls_certificate_refresh_failed");
                }
            }
        })
    };
    let expiry = {
        let (agents, mut ticks) = (Arc::clone(agents), every(EXPIRY_PERIOD));
        tokio::spawn(async move {
            loop {
                ticks.tick().await;
                if let Err(error) = agents.log_expiring().await {
                    tracing::warn!(error = chain(&error), "expiry_watch_failed");
                }
            }
        })
    };
    vec![follow, forget, checkpoint, recover, sight, renew, expiry]
}

fn data_dir_error(path: &Path, source: std::io::Error) -> AppError {
    AppError::DataDir { path: path.display().to_string(), source }
}

/// Takes the data directory for this process. The lock goes with the process, however it ends.
fn lock(data_dir: &Path) -> Result<File, AppError> {
    let path = data_dir.join(LOCK_FILE);
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|source| data_dir_error(data_dir, source))?;
    file.try_lock().map_err(|_| AppError::Locked { path: path.display().to_string() })?;
    Ok(file)
}

/// Writes where this process serves, for the command line.
fn note_url(data_dir: &Path, url: &str) -> std::io::Result<()> {
    let mut file = File::options().create(true).write(true).truncate(true).open(data_dir.join(LOCK_FILE))?;
    file.write_all(json!({ "pid": std::process::id(), "url": url }).to_string().as_bytes())
}

fn replica(data_dir: &Path, entropy: &Entropy) -> std::io::Result<String> {
    let path = data_dir.join(REPLICA_FILE);
    if let Ok(name) = std::fs::read_to_string(&path) {
        return Ok(name.trim().to_owned());
    }
    let name = entropy.uuid();
    std::fs::write(&path, &name)?;
    Ok(name)
}

fn server_names(config: &Config) -> ServerNames {
    let mut dns = Vec::new();
    let mut ips = Vec::new();
    let host = config.public_url.as_deref().and_then(|url| url.split_once("://")).map(|(_, rest)| {
        let authority = rest.split('/').next().unwrap_or(rest);
        match authority.rsplit_once(':') {
            Some((host, port)) if port.chars().all(|c| c.is_ascii_digit()) => host,
            _ => authority,
        }
    });
    let mut add = |host: &str| match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(ip) if !ips.contains(&ip) => ips.push(ip),
        Ok(_) => {}
        Err(_) if !dns.iter().any(|known: &String| known == host) => dns.push(host.to_owned()),
        Err(_) => {}
    };
    if let Some(host) = host {
        add(host);
    }
    for host in ["localhost", "127.0.0.1", "::1"] {
        add(host);
    }
    if !config.listen.ip().is_unspecified() {
        add(&config.listen.ip().to_string());
    }
    ServerNames { dns, ips }
}

fn local_url(address: SocketAddr) -> String {
    if address.ip().is_unspecified() || address.ip().is_loopback() {
        format!("https://localhost:{}", address.port())
    } else {
        format!("https://{address}")
    }
}

/// Where a data directory's lock file lies, for the command line.
#[must_use]
pub fn lock_path(data_dir: &Path) -> PathBuf {
    data_dir.join(LOCK_FILE)
}
