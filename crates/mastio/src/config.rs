//! The one reader of flags, environment and env file: a typed [`Config`], or one sentence naming what is wrong.
//!
//! [`SETTINGS`] declares every setting once: its environment name, its flag, its default and what it is for. The
//! flags of the command line, the look-up in the environment and in the env file, and `mastio config` all walk that
//! table. A flag wins over the environment, the environment over the env file, the env file over the default. An
//! empty value counts as none, because compose files pass unset variables that way.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, error::Error as ClapError};

use crate::entropy::Entropy;
use crate::http::front::Front;
use crate::operators::sso;
use crate::store::DatabaseUrl;
use crate::store::claims::Claims;

/// The env file that is used without being named, when it lies in the working directory.
pub const ENV_FILE: &str = "proxy.env";
/// The file in the data directory that holds a SQLite deploy; the predecessor's name.
const DATABASE_FILE: &str = "mcp_proxy.db";
/// Bytes of an env file at most.
const ENV_FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Bytes of a generated admin secret: as many random bits as a SHA-256 digest has.
const ADMIN_SECRET_BYTES: usize = 32;

/// Everything that can be set. `serve`'s flags, their environment names and their defaults are [`SETTINGS`].
#[derive(Clone)]
pub struct Config {
    /// `MCP_PROXY_DATA_DIR`: the SQLite file, `seal.key`, the lock.
    pub data_dir: PathBuf,
    /// `MCP_PROXY_LISTEN`: where to serve HTTPS; port 0 picks one and logs it.
    pub listen: SocketAddr,
    /// `MCP_PROXY_DATABASE_URL`; by default `mcp_proxy.db` in the data directory.
    pub database_url: DatabaseUrl,
    /// Whether a database URL was given, rather than the default taken.
    pub database_url_given: bool,
    /// `--init`: a new organisation may be created where a database URL was given.
    pub init: bool,
    /// `MCP_PROXY_ADMIN_SECRET`. Empty only for commands that do not serve.
    pub admin_secret: String,
    /// `MCP_PROXY_OPERATOR_CREDENTIAL`: who the command line is, `NAME:SECRET`.
    pub operator_credential: Option<String>,
    /// `MCP_PROXY_ORG_ID`, for a new organisation.
    pub org_id: Option<String>,
    /// `MCP_PROXY_TRUST_DOMAIN`, default `cullis.local`.
    pub trust_domain: String,
    /// `MCP_PROXY_PROXY_PUBLIC_URL`: the URL by which agents know us, without trailing slash.
    pub public_url: Option<String>,
    /// `MCP_PROXY_DB_ENCRYPTION_KEY`: the passphrase that seals keys.
    pub db_encryption_key: Option<String>,
    /// `MCP_PROXY_REDIS_URL`.
    pub redis_url: Option<String>,
    /// `MCP_PROXY_STRICT_PKI`: refuse to serve with a legacy Org CA.
    pub strict_pki: bool,
    /// `MCP_PROXY_UPDATE_APPROVALS=2`: an apply and a rollback need a plan that two operators stand behind.
    pub two_person: bool,
    /// `MCP_PROXY_UPDATE_SNAPSHOTS_KEPT`: former snapshots of each update that are kept beside the current one.
    pub update_snapshots_kept: u32,
    /// `MCP_PROXY_INTERNAL_HOST_ALLOWLIST`: private hosts that upstream tools may have, in lower case.
    pub internal_host_allowlist: Vec<String>,
    /// `MCP_PROXY_RATE_LIMIT_PER_MINUTE`: an agent's; 0 is none.
    pub rate_limit_per_minute: u32,
    /// `MCP_PROXY_ADDRESS_RATE_LIMIT_PER_MINUTE`: a source address's over all routes; 0 is none.
    pub address_rate_limit_per_minute: u32,
    /// `MCP_PROXY_GLOBAL_RATE_LIMIT_RPS`; none by default.
    pub global_rate_limit_rps: Option<u32>,
    /// `MCP_PROXY_DPOP_NONCE`: whether proofs at the token endpoint and the gateway need a nonce of ours.
    pub dpop_nonce: bool,
    /// `CULLIS_EGRESS_DPOP_MODE`: whether agents prove their persistent DPoP key beside their certificate.
    pub egress_dpop: EgressDpop,
    /// `MCP_PROXY_OIDC_…`: single sign-on for operators.
    pub single_sign_on: Option<sso::Settings>,
    /// `MCP_PROXY_TLS_CERT` and `MCP_PROXY_TLS_KEY`: a server certificate of the operator's own.
    pub tls_files: Option<(PathBuf, PathBuf)>,
    /// `MCP_PROXY_TRUSTED_FRONT`: whose word on a client certificate is taken; nobody's by default.
    pub trusted_front: Front,
    /// `CULLIS_MASTIO_VERSION`: what the image calls itself.
    pub version: String,
    /// `LOG_FORMAT=json`.
    pub log_json: bool,
    /// `RUST_LOG`: which log events are written.
    pub log_filter: String,
}

/// A secret that an upstream server is reached with, from the environment variable that its `env://NAME` names.
#[must_use]
pub fn environment_secret(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Secrets are never shown.
impl fmt::Debug for Config {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Config")
            .field("data_dir", &self.data_dir)
            .field("listen", &self.listen)
            .field("database_url", &self.database_url.redacted())
            .finish_non_exhaustive()
    }
}

/// One setting: declared here and nowhere else.
#[derive(Debug)]
pub struct Setting {
    /// Its name in the environment and in the env file.
    pub name: &'static str,
    /// Its flag, without the dashes.
    pub flag: &'static str,
    /// What its value looks like, for `--help`.
    pub value: &'static str,
    /// Its default, where it has one that does not depend on other settings.
    pub default: Option<&'static str>,
    /// Whether its value is never shown.
    pub secret: bool,
    /// What it is for: one sentence without a full stop.
    pub purpose: &'static str,
}

const ADMIN_SECRET: &str = "MCP_PROXY_ADMIN_SECRET";
const OPERATOR_CREDENTIAL: &str = "MCP_PROXY_OPERATOR_CREDENTIAL";
const ORG_ID: &str = "MCP_PROXY_ORG_ID";
const TRUST_DOMAIN: &str = "MCP_PROXY_TRUST_DOMAIN";
const PUBLIC_URL: &str = "MCP_PROXY_PROXY_PUBLIC_URL";
const DATABASE_URL: &str = "MCP_PROXY_DATABASE_URL";
const REDIS_URL: &str = "MCP_PROXY_REDIS_URL";
const DB_ENCRYPTION_KEY: &str = "MCP_PROXY_DB_ENCRYPTION_KEY";
const STRICT_PKI: &str = "MCP_PROXY_STRICT_PKI";
const UPDATE_APPROVALS: &str = "MCP_PROXY_UPDATE_APPROVALS";
const UPDATE_SNAPSHOTS_KEPT: &str = "MCP_PROXY_UPDATE_SNAPSHOTS_KEPT";
/// More would fill the disk of a large fleet before anybody looks at them.
const UPDATE_SNAPSHOTS_KEPT_MAX: u32 = 100;
const INTERNAL_HOST_ALLOWLIST: &str = "MCP_PROXY_INTERNAL_HOST_ALLOWLIST";
const RATE_LIMIT_PER_MINUTE: &str = "MCP_PROXY_RATE_LIMIT_PER_MINUTE";
const ADDRESS_RATE_LIMIT_PER_MINUTE: &str = "MCP_PROXY_ADDRESS_RATE_LIMIT_PER_MINUTE";
const GLOBAL_RATE_LIMIT_RPS: &str = "MCP_PROXY_GLOBAL_RATE_LIMIT_RPS";
const DPOP_NONCE: &str = "MCP_PROXY_DPOP_NONCE";
const EGRESS_DPOP_MODE: &str = "CULLIS_EGRESS_DPOP_MODE";
const OIDC_ISSUER: &str = "MCP_PROXY_OIDC_ISSUER";
const OIDC_CLIENT_ID: &str = "MCP_PROXY_OIDC_CLIENT_ID";
const OIDC_CLIENT_SECRET: &str = "MCP_PROXY_OIDC_CLIENT_SECRET";
const OIDC_SCOPE: &str = "MCP_PROXY_OIDC_SCOPE";
const OIDC_ROLE_CLAIM: &str = "MCP_PROXY_OIDC_ROLE_CLAIM";
const OIDC_ROLES: &str = "MCP_PROXY_OIDC_ROLES";
const OIDC_NAME_CLAIM: &str = "MCP_PROXY_OIDC_NAME_CLAIM";
const TLS_CERT: &str = "MCP_PROXY_TLS_CERT";
const TLS_KEY: &str = "MCP_PROXY_TLS_KEY";
const TRUSTED_FRONT: &str = "MCP_PROXY_TRUSTED_FRONT";
const MASTIO_VERSION: &str = "CULLIS_MASTIO_VERSION";
const LOG_FORMAT: &str = "LOG_FORMAT";
const LOG_FILTER: &str = "RUST_LOG";
const DATA_DIR: &str = "MCP_PROXY_DATA_DIR";
const LISTEN: &str = "MCP_PROXY_LISTEN";

const fn setting(
    name: &'static str,
    flag: &'static str,
    value: &'static str,
    purpose: &'static str,
) -> Setting {
    Setting { name, flag, value, default: None, secret: false, purpose }
}

const fn with_default(setting: Setting, default: &'static str) -> Setting {
    Setting { default: Some(default), ..setting }
}

const fn secret(setting: Setting) -> Setting {
    Setting { secret: true, ..setting }
}

/// Whether agents prove their persistent DPoP key beside their certificate (wire contract §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EgressDpop {
    /// The certificate is enough, and a proof is not looked at.
    Off,
    /// A proof that is there must be good.
    Optional,
    /// There must be one, by the key that is registered.
    Required,
}

impl EgressDpop {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "off" => Some(Self::Off),
            "optional" => Some(Self::Optional),
            "required" => Some(Self::Required),
            _ => None,
        }
    }
}

/// Every setting, in the order in which `--help` and `mastio config` show them.
pub const SETTINGS: [Setting; 32] = [
    with_default(
        setting(DATA_DIR, "data-dir", "DIR", "Where the SQLite file, seal.key and the lock lie"),
        "./data",
    ),
    with_default(
        setting(LISTEN, "listen", "ADDRESS", "Where to serve HTTPS; port 0 picks one and logs it"),
        "0.0.0.0:9443",
    ),
    setting(
        PUBLIC_URL,
        "public-url",
        "URL",
        "The URL by which agents know this server; DPoP proofs are compared with it",
    ),
    secret(setting(
        ADMIN_SECRET,
        "admin-secret",
        "SECRET",
        "What operators send as X-Admin-Secret; generated into proxy.env where nothing is configured",
    )),
    secret(setting(
        OPERATOR_CREDENTIAL,
        "operator-credential",
        "NAME:SECRET",
        "Whom the command line speaks for; without it for whoever has the admin secret",
    )),
    setting(ORG_ID, "org-id", "ID", "The id of a new organisation; an existing one keeps its own"),
    with_default(
        setting(TRUST_DOMAIN, "trust-domain", "DOMAIN", "The SPIFFE trust domain of agent identities"),
        "cullis.local",
    ),
    setting(
        DATABASE_URL,
        "database-url",
        "URL",
        "sqlite: or postgres: URL; by default mcp_proxy.db in the data directory",
    ),
    secret(setting(
        DB_ENCRYPTION_KEY,
        "db-encryption-key",
        "PASSPHRASE",
        "Seals the private keys in the database; without it seal.key in the data directory does",
    )),
    setting(
        REDIS_URL,
        "redis-url",
        "URL",
        "Redis or Valkey, where replicas claim identifiers that may be used once",
    ),
    with_default(
        setting(STRICT_PKI, "strict-pki", "BOOL", "Refuse to serve while the Org CA has pathLen=0"),
        "false",
    ),
    with_default(
        setting(
            UPDATE_APPROVALS,
            "update-approvals",
            "1|2",
            "How many operators must stand behind an apply or a rollback",
        ),
        "1",
    ),
    with_default(
        setting(
            UPDATE_SNAPSHOTS_KEPT,
            "update-snapshots-kept",
            "NUMBER",
            "How many former snapshots of each update are kept, beside the one that a rollback goes back to",
        ),
        "2",
    ),
    with_default(
        setting(
            INTERNAL_HOST_ALLOWLIST,
            "internal-host-allowlist",
            "HOSTS",
            "Private hosts that upstream tools may have, separated by commas",
        ),
        "",
    ),
    with_default(
        setting(
            RATE_LIMIT_PER_MINUTE,
            "rate-limit-per-minute",
            "N",
            "Requests that one agent may make in a minute; 0 is no limit",
        ),
        "1800",
    ),
    with_default(
        setting(
            ADDRESS_RATE_LIMIT_PER_MINUTE,
            "address-rate-limit-per-minute",
            "N",
            "Requests that one source address may make in a minute, over all routes; 0 is no limit",
        ),
        "0",
    ),
    with_default(
        setting(
            GLOBAL_RATE_LIMIT_RPS,
            "global-rate-limit-rps",
            "N",
            "Requests a second over all callers; 0 is no limit, bounded queues shed the load",
        ),
        "0",
    ),
    with_default(
        setting(
            DPOP_NONCE,
            "dpop-nonce",
            "BOOL",
            "Demand a nonce of the server's in DPoP proofs at the token endpoint and the gateway",
        ),
        "false",
    ),
    with_default(
        setting(
            EGRESS_DPOP_MODE,
            "egress-dpop-mode",
            "MODE",
            "Persistent DPoP keys beside client certificates on /v1/egress: off, optional or required",
        ),
        "optional",
    ),
    setting(
        OIDC_ISSUER,
        "oidc-issuer",
        "URL",
        "The OpenID Connect provider that operators may sign on with; goes with the client id and the roles",
    ),
    setting(OIDC_CLIENT_ID, "oidc-client-id", "ID", "Who this server is to that provider"),
    secret(setting(
        OIDC_CLIENT_SECRET,
        "oidc-client-secret",
        "SECRET",
        "How it proves that; without one PKCE alone does",
    )),
    with_default(
        setting(OIDC_SCOPE, "oidc-scope", "SCOPE", "What is asked of the provider, separated by spaces"),
        "openid profile email",
    ),
    with_default(
        setting(OIDC_ROLE_CLAIM, "oidc-role-claim", "CLAIM", "The claim of the ID token that gives the role"),
        "groups",
    ),
    setting(
        OIDC_ROLES,
        "oidc-roles",
        "VALUE=ROLE;…",
        "Which values of that claim give which role; whoever has none of them is refused",
    ),
    with_default(
        setting(
            OIDC_NAME_CLAIM,
            "oidc-name-claim",
            "CLAIM",
            "The claim that names a person in the audit log; nobody may be able to choose theirs",
        ),
        "sub",
    ),
    setting(
        TLS_CERT,
        "tls-cert",
        "FILE",
        "A server certificate of your own, PEM, leaf first; goes with its key",
    ),
    setting(TLS_KEY, "tls-key", "FILE", "The private key of that certificate, PEM"),
    with_default(
        setting(
            TRUSTED_FRONT,
            "trusted-front",
            "ADDRESSES",
            "TLS fronts that may forward a client certificate: addresses or CIDR blocks, separated by commas",
        ),
        "",
    ),
    with_default(
        setting(MASTIO_VERSION, "mastio-version", "VERSION", "What the image calls itself"),
        env!("CARGO_PKG_VERSION"),
    ),
    with_default(
        setting(LOG_FORMAT, "log-format", "FORMAT", "json for one JSON object a line, text for people"),
        "text",
    ),
    with_default(
        setting(LOG_FILTER, "log-filter", "FILTER", "Which log events are written, as in RUST_LOG"),
        "info",
    ),
];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// The environment of the process.
    Environment,
    /// The env file at this path.
    EnvFile(PathBuf),
    /// Made by this run and written to the env file at this path.
    Generated(PathBuf),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => formatter.write_str("flag"),
            Self::Environment => formatter.write_str("environment"),
            Self::EnvFile(path) => write!(formatter, "env file {}", path.display()),
            Self::Generated(path) => write!(formatter, "generated into {}", path.display()),
            Self::Default => formatter.write_str("default"),
        }
    }
}

/// Why the configuration cannot be used. Each is one sentence that names the variable or the file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value is not what it must be. `reason` never repeats a secret.
    #[error("{name} ({origin}) {reason}")]
    Value {
        /// The variable.
        name: &'static str,
        /// Where its value came from.
        origin: Origin,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A value is missing.
    #[error("{name} is not set: {next_step}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What to do.
        next_step: &'static str,
    },
    /// The env file cannot be read.
    #[error("the env file {} (--env-file) cannot be read: {source}", path.display())]
    EnvFile {
        /// Where it was looked for.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A line of the env file is not understood. The line is not repeated: it may hold a secret.
    #[error("line {line} of the env file {} is not NAME=value", path.display())]
    EnvFileLine {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// The generated secret cannot be kept.
    #[error(
        "{ADMIN_SECRET} is not set and a generated one cannot be written to {}: {source}; set it in the environment",
        path.display()
    )]
    Generate {
        /// Where it should have gone.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// What the command line says: a flag for each of [`SETTINGS`], `--env-file` and `--init`.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// By the name of the setting.
    values: BTreeMap<&'static str, String>,
    env_file: Option<PathBuf>,
    init: bool,
}

impl Flags {
    /// Sets what a flag would set, for commands that bring values of their own.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.values.insert(name, value.into());
        self
    }
}

impl clap::FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, ClapError> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), ClapError> {
        for setting in &SETTINGS {
            if let Some(value) = matches.get_one::<String>(setting.flag) {
                self.values.insert(setting.name, value.clone());
            }
        }
        self.env_file = matches.get_one::<PathBuf>("env-file").cloned();
        self.init = matches.get_flag("init");
        Ok(())
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        let command = command
            .arg(
                Arg::new("env-file")
                    .long("env-file")
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help_heading("Settings")
                    .help("NAME=value lines to read settings from [default: proxy.env, where it exists]"),
            )
            .arg(
                Arg::new("init")
                    .long("init")
                    .action(ArgAction::SetTrue)
                    .help_heading("Settings")
                    .help("Allow a new organisation in an empty database that a database URL points at"),
            );
        SETTINGS.iter().fold(command, |command, setting| {
            let default = setting.default.filter(|default| !default.is_empty());
            let default = default.map(|default| format!(" [default: {default}]")).unwrap_or_default();
            command.arg(
                Arg::new(setting.flag)
                    .long(setting.flag)
                    .value_name(setting.value)
                    .help_heading("Settings")
                    .help(format!("{} [env: {}]{default}", setting.purpose, setting.name)),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// What surrounds the process: its environment and its working directory. Captured once, so that tests can bring
/// their own.
pub struct Surroundings {
    environment: BTreeMap<String, OsString>,
    working_directory: PathBuf,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect();
        Self { environment, working_directory: PathBuf::new() }
    }

    /// An empty environment and a working directory of its own: for what must not touch the operator's deploy.
    #[must_use]
    pub fn alone_in(working_directory: &Path) -> Self {
        Self::with(BTreeMap::new(), working_directory)
    }

    /// These.
    #[must_use]
    pub fn with(environment: BTreeMap<String, OsString>, working_directory: &Path) -> Self {
        Self { environment, working_directory: working_directory.to_owned() }
    }
}

/// Where the machine keeps temporary files (`TMPDIR`).
#[must_use]
pub fn temporary_folder() -> PathBuf {
    std::env::temp_dir()
}

/// Whether an admin secret may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdminSecret {
    /// It is needed: generated where nothing is configured, otherwise its absence is an error.
    Needed,
    /// It is used where it is set; nothing is written.
    Optional,
}

/// A setting as it is in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The setting.
    pub setting: &'static Setting,
    /// Its value as an operator may see it; absent where it has none.
    pub shown: Option<String>,
    /// Where the value came from.
    pub origin: Origin,
}

/// A configuration and where each value came from.
#[derive(Debug)]
pub struct Resolved {
    /// The typed configuration.
    pub config: Config,
    /// Every setting.
    pub settings: Vec<InForce>,
    /// Names of the predecessor's settings that are set and that this program does not have.
    pub unused: Vec<String>,
}

/// Reads flags, environment and env file.
///
/// Errors: [`ConfigError`], before anything is written, except for the secret that [`AdminSecret::Needed`] allows.
pub fn resolve(
    flags: &Flags,
    surroundings: &Surroundings,
    admin_secret: AdminSecret,
    entropy: &Entropy,
) -> Result<Resolved, ConfigError> {
    let default_file = surroundings.working_directory.join(ENV_FILE);
    let env_file = match &flags.env_file {
        Some(path) => Some(path.clone()),
        None => default_file.exists().then(|| default_file.clone()),
    };
    let mut values = Values { raw: BTreeMap::new() };
    let mut unused = Vec::new();
    if let Some(path) = &env_file {
        for (name, value) in read_env_file(path)? {
            match SETTINGS.iter().find(|setting| setting.name == name) {
                Some(setting) => values.set(setting.name, value, Origin::EnvFile(path.clone())),
                None => unused.push(name),
            }
        }
    }
    for (name, value) in &surroundings.environment {
        match SETTINGS.iter().find(|setting| setting.name == name) {
            Some(setting) => {
                let origin = Origin::Environment;
                let value = value.to_str().ok_or_else(|| ConfigError::Value {
                    name: setting.name,
                    origin: origin.clone(),
                    reason: "is not UTF-8 text".to_owned(),
                })?;
                values.set(setting.name, value.to_owned(), origin);
            }
            None if name.starts_with("MCP_PROXY_") => unused.push(name.clone()),
            None => {}
        }
    }
    for (name, value) in &flags.values {
        values.set(name, value.clone(), Origin::Flag);
    }
    unused.sort();
    unused.dedup();

    let mut config = values.config(flags.init)?;
    if config.admin_secret.is_empty() && admin_secret == AdminSecret::Needed {
        config.admin_secret = generated_secret(&config, env_file.as_deref(), &default_file, entropy)?;
        values.set(ADMIN_SECRET, config.admin_secret.clone(), Origin::Generated(default_file));
    }
    Ok(Resolved { settings: values.in_force(&config), config, unused })
}

/// Makes the admin secret of a deploy that nobody has configured, and keeps it in [`ENV_FILE`].
fn generated_secret(
    config: &Config,
    env_file: Option<&Path>,
    target: &Path,
    entropy: &Entropy,
) -> Result<String, ConfigError> {
    if env_file.is_some() {
        // The file is the operator's: adding to it would surprise, and a typo in a name must not go unseen.
        return Err(ConfigError::Missing { name: ADMIN_SECRET, next_step: "add it to the env file" });
    }
    if matches!(config.database_url, DatabaseUrl::Postgres(_)) {
        let next_step = "with PostgreSQL every replica needs the same one, so none is generated";
        return Err(ConfigError::Missing { name: ADMIN_SECRET, next_step });
    }
    // base64url without padding: no `=`, so that the page's `cut -d= -f2` gives the whole of it.
    let secret = entropy.text::<ADMIN_SECRET_BYTES>();
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
        writeln!(
            file,
            "# Written once by `mastio serve`. Keep it secret; settings may be added, NAME=value."
        )?;
        writeln!(file, "{ADMIN_SECRET}={secret}")?;
        file.sync_all()
    };
    write().map_err(|source| ConfigError::Generate { path: target.to_owned(), source })?;
    Ok(secret)
}

/// Reads NAME=value lines.
///
/// Not an interpolating reader: the page takes the secret out of this file with `grep` and `cut`, so a `$` in it
/// must mean itself. A pair of quotes around a value and a comment after white space are taken off, as compose does.
fn read_env_file(path: &Path) -> Result<Vec<(String, String)>, ConfigError> {
    let unreadable = |source| ConfigError::EnvFile { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let text = std::io::read_to_string(std::io::Read::take(file, ENV_FILE_BYTES_MAX)).map_err(unreadable)?;
    env_lines(path, &text)
}

/// The settings in the text of an env file.
pub(crate) fn env_lines(path: &Path, text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let mut values = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = || ConfigError::EnvFileLine { path: path.to_owned(), line: index + 1 };
        let (name, value) = line.split_once('=').ok_or_else(wrong)?;
        let name = name.trim_end();
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(wrong());
        }
        values.push((name.to_owned(), unquoted(value.trim()).to_owned()));
    }
    Ok(values)
}

fn unquoted(value: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some((inner, _)) = value.strip_prefix(quote).and_then(|rest| rest.split_once(quote)) {
            return inner;
        }
    }
    if value.starts_with('#') {
        return "";
    }
    match value.find(" #").or_else(|| value.find("\t#")) {
        Some(comment) => value[..comment].trim_end(),
        None => value,
    }
}

/// Raw values with their origins, on their way to a [`Config`].
struct Values {
    raw: BTreeMap<&'static str, (String, Origin)>,
}

impl Values {
    /// A later origin wins over an earlier one; an empty value is none.
    fn set(&mut self, name: &'static str, value: String, origin: Origin) {
        if !value.trim().is_empty() {
            self.raw.insert(name, (value, origin));
        }
    }

    fn given(&self, name: &str) -> Option<&str> {
        self.raw.get(name).map(|(value, _)| value.as_str())
    }

    /// The value that is in force: given, or the default.
    fn text(&self, name: &str) -> &str {
        let default =
            || SETTINGS.iter().find(|setting| setting.name == name).and_then(|setting| setting.default);
        self.given(name).or_else(default).unwrap_or_default().trim()
    }

    fn wrong(&self, name: &'static str, reason: String) -> ConfigError {
        let origin = self.raw.get(name).map_or(Origin::Default, |(_, origin)| origin.clone());
        ConfigError::Value { name, origin, reason }
    }

    /// Reads a value that may be shown.
    fn read<T>(
        &self,
        name: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let text = self.text(name);
        parse(text).ok_or_else(|| self.wrong(name, format!("is {text:?}, expected {expected}")))
    }

    /// Reads a value that may be absent and may be shown.
    fn read_given<T>(
        &self,
        name: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        self.given(name).map(|_| self.read(name, expected, parse)).transpose()
    }

    fn config(&self, init: bool) -> Result<Config, ConfigError> {
        let data_dir = PathBuf::from(self.text(DATA_DIR));
        Ok(Config {
            listen: self
                .read(LISTEN, "an address and a port such as 0.0.0.0:9443", |text| text.parse().ok())?,
            database_url: self.database_url(&data_dir)?,
            database_url_given: self.given(DATABASE_URL).is_some(),
            init,
            admin_secret: self.admin_secret()?,
            operator_credential: self.operator_credential()?,
            org_id: self.read_given(ORG_ID, "1 to 64 letters, digits, '.', '_' or '-'", |text| {
                is_name(text, 64, false).then(|| text.to_owned())
            })?,
            trust_domain: self.read(
                TRUST_DOMAIN,
                "a SPIFFE trust domain: at most 255 lower-case letters, digits, '.', '_' or '-'",
                |text| is_name(text, 255, true).then(|| text.to_owned()),
            )?,
            public_url: self.read_given(
                PUBLIC_URL,
                "a URL such as https://mastio.example.com:9443",
                public_url,
            )?,
            db_encryption_key: self.given(DB_ENCRYPTION_KEY).map(str::to_owned),
            redis_url: self.redis_url()?,
            strict_pki: self.read(STRICT_PKI, "true or false", truth)?,
            two_person: self.read(UPDATE_APPROVALS, "1 or 2", |text| match text {
                "1" => Some(false),
                "2" => Some(true),
                _ => None,
            })?,
            update_snapshots_kept: self.read(
                UPDATE_SNAPSHOTS_KEPT,
                "a whole number from 0 to 100",
                |text| text.parse().ok().filter(|kept| *kept <= UPDATE_SNAPSHOTS_KEPT_MAX),
            )?,
            internal_host_allowlist: self.read(
                INTERNAL_HOST_ALLOWLIST,
                "host names or addresses separated by commas, without a scheme or a path",
                hosts,
            )?,
            rate_limit_per_minute: self
                .read(RATE_LIMIT_PER_MINUTE, "a whole number", |text| text.parse().ok())?,
            address_rate_limit_per_minute: self.read(
                ADDRESS_RATE_LIMIT_PER_MINUTE,
                "a whole number",
                |text| text.parse().ok(),
            )?,
            global_rate_limit_rps: self
                .read(GLOBAL_RATE_LIMIT_RPS, "a whole number", |text| text.parse().ok())
                .map(|limit| Some(limit).filter(|limit| *limit > 0))?,
            dpop_nonce: self.read(DPOP_NONCE, "true or false", truth)?,
            egress_dpop: self.read(EGRESS_DPOP_MODE, "off, optional or required", EgressDpop::parse)?,
            single_sign_on: self.single_sign_on()?,
            tls_files: self.tls_files()?,
            trusted_front: self.read(
                TRUSTED_FRONT,
                "addresses or CIDR blocks such as 10.0.0.7 or 10.0.0.0/24, separated by commas",
                |text| text.parse().ok(),
            )?,
            version: self.text(MASTIO_VERSION).to_owned(),
            log_json: self.read(LOG_FORMAT, "json or text", |text| {
                match text.to_ascii_lowercase().as_str() {
                    "json" => Some(true),
                    "text" | "console" | "human" => Some(false),
                    _ => None,
                }
            })?,
            log_filter: self.read(LOG_FILTER, "a filter such as info or mastio=debug", |text| {
                crate::logging::is_filter(text).then(|| text.to_owned())
            })?,
            data_dir,
        })
    }

    fn database_url(&self, data_dir: &Path) -> Result<DatabaseUrl, ConfigError> {
        let Some(text) = self.given(DATABASE_URL) else {
            return Ok(DatabaseUrl::Sqlite(data_dir.join(DATABASE_FILE)));
        };
        // The text may hold a password, so the reason shows no more than the scheme.
        let expected = "expected sqlite:///path/to/mcp_proxy.db or postgres://user:password@host/database";
        match DatabaseUrl::parse(text.trim()) {
            Ok(DatabaseUrl::Sqlite(path)) if path.as_os_str() == ":memory:" => Err(self.wrong(
                DATABASE_URL,
                format!("is a database in memory, which would lose the Org CA: {expected}"),
            )),
            Ok(url) => Ok(url),
            Err(_) => {
                let scheme = text
                    .split_once(':')
                    .map_or("no scheme".to_owned(), |(scheme, _)| format!("scheme {scheme:?}"));
                Err(self.wrong(DATABASE_URL, format!("has {scheme}, {expected}")))
            }
        }
    }

    fn redis_url(&self) -> Result<Option<String>, ConfigError> {
        let Some(text) = self.given(REDIS_URL).map(str::trim) else { return Ok(None) };
        // The text may hold a password too.
        if Claims::new(text).is_ok() {
            return Ok(Some(text.to_owned()));
        }
        Err(self.wrong(REDIS_URL, "is not a redis:// or rediss:// URL".to_owned()))
    }

    fn admin_secret(&self) -> Result<String, ConfigError> {
        let secret = self.text(ADMIN_SECRET);
        if secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(secret.to_owned());
        }
        let reason = "has a character that an HTTP header cannot carry: use visible ASCII without spaces";
        Err(self.wrong(ADMIN_SECRET, reason.to_owned()))
    }

    fn operator_credential(&self) -> Result<Option<String>, ConfigError> {
        let Some(text) = self.given(OPERATOR_CREDENTIAL).map(str::trim) else { return Ok(None) };
        let plain = text.bytes().all(|byte| byte.is_ascii_graphic());
        match text.split_once(':') {
            Some((name, secret)) if plain && !name.is_empty() && !secret.is_empty() => {
                Ok(Some(text.to_owned()))
            }
            _ => Err(self
                .wrong(OPERATOR_CREDENTIAL, "is not NAME:SECRET, as mastio admin add shows it".to_owned())),
        }
    }

    fn single_sign_on(&self) -> Result<Option<sso::Settings>, ConfigError> {
        let next_step = "a provider, a client id and the roles go together; set all three or none";
        let named = [OIDC_ISSUER, OIDC_CLIENT_ID, OIDC_ROLES];
        if named.iter().all(|name| self.given(name).is_none()) {
            return Ok(None);
        }
        if let Some(name) = named.into_iter().find(|name| self.given(name).is_none()) {
            return Err(ConfigError::Missing { name, next_step });
        }
        let claim = |name| self.read(name, "the name of a claim", |text| Some(text.to_owned()));
        Ok(Some(sso::Settings {
            issuer: self.read(
                OIDC_ISSUER,
                "the provider's https URL, exactly as its metadata spells it",
                |text| sso::is_issuer(text).then(|| text.to_owned()),
            )?,
            client_id: self.text(OIDC_CLIENT_ID).to_owned(),
            client_secret: self.given(OIDC_CLIENT_SECRET).map(|secret| secret.trim().to_owned()),
            scope: self.read(OIDC_SCOPE, "scopes with openid among them", |text| {
                text.split_whitespace().any(|scope| scope == "openid").then(|| text.to_owned())
            })?,
            role_claim: claim(OIDC_ROLE_CLAIM)?,
            roles: self.read(
                OIDC_ROLES,
                "VALUE=ROLE;VALUE=ROLE, each value once, roles viewer, operator or admin",
                |text| text.parse().ok(),
            )?,
            name_claim: claim(OIDC_NAME_CLAIM)?,
        }))
    }

    fn tls_files(&self) -> Result<Option<(PathBuf, PathBuf)>, ConfigError> {
        let next_step = "a certificate and its key go together; set both or neither";
        let (cert, key) = match (self.given(TLS_CERT), self.given(TLS_KEY)) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(ConfigError::Missing { name: TLS_KEY, next_step }),
            (None, Some(_)) => return Err(ConfigError::Missing { name: TLS_CERT, next_step }),
            (Some(cert), Some(key)) => (cert.trim(), key.trim()),
        };
        for (name, path) in [(TLS_CERT, cert), (TLS_KEY, key)] {
            if let Err(error) = File::open(path) {
                return Err(self.wrong(name, format!("is {path:?}, which cannot be read: {error}")));
            }
        }
        Ok(Some((cert.into(), key.into())))
    }

    fn in_force(&self, config: &Config) -> Vec<InForce> {
        let shown = |setting: &Setting| -> Option<String> {
            if setting.secret {
                return self.given(setting.name).map(|_| "(hidden)".to_owned());
            }
            match setting.name {
                DATABASE_URL => Some(config.database_url.redacted()),
                REDIS_URL => config.redis_url.as_deref().map(without_password),
                _ => Some(self.text(setting.name).to_owned()).filter(|text| !text.is_empty()),
            }
        };
        let origin = |name| self.raw.get(name).map_or(Origin::Default, |(_, origin)| origin.clone());
        SETTINGS
            .iter()
            .map(|setting| InForce { setting, shown: shown(setting), origin: origin(setting.name) })
            .collect()
    }
}

/// A URL without the password in its authority, and without its query, which is where a socket's password stands.
fn without_password(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or(url);
    match (url.find("//"), url.rfind('@')) {
        (Some(start), Some(at)) if start + 2 < at => {
            let user = url[start + 2..at].split(':').next().unwrap_or("");
            format!("{}{user}:***{}", &url[..start + 2], &url[at..])
        }
        _ => url.to_owned(),
    }
}

fn is_name(text: &str, length_max: usize, lower_case: bool) -> bool {
    let allowed = |c: char| match c {
        'A'..='Z' => !lower_case,
        'a'..='z' | '0'..='9' | '.' | '_' | '-' => true,
        _ => false,
    };
    !text.is_empty() && text.len() <= length_max && text.chars().all(allowed)
}

/// The spellings that the predecessor understands.
fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Some(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Some(false),
        _ => None,
    }
}

fn public_url(text: &str) -> Option<String> {
    let url = reqwest::Url::parse(text).ok()?;
    let plain = url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    let usable = matches!(url.scheme(), "https" | "http") && url.has_host() && plain;
    usable.then(|| text.trim_end_matches('/').to_owned())
}

fn hosts(text: &str) -> Option<Vec<String>> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']' | '*');
    let mut hosts = Vec::new();
    for host in text.split(',').map(str::trim).filter(|host| !host.is_empty()) {
        if !host.chars().all(allowed) {
            return None;
        }
        let host = host.to_ascii_lowercase();
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    Some(hosts)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Case {
        folder: tempfile::TempDir,
        flags: Flags,
        environment: BTreeMap<String, OsString>,
    }

    impl Case {
        fn new() -> Self {
            Self {
                folder: tempfile::tempdir().unwrap(),
                flags: Flags::default(),
                environment: BTreeMap::new(),
            }
        }

        fn variable(mut self, name: &str, value: &str) -> Self {
            self.environment.insert(name.to_owned(), value.into());
            self
        }

        fn flag(mut self, name: &'static str, value: &str) -> Self {
            self.flags = self.flags.with(name, value);
            self
        }

        fn file(self, text: &str) -> Self {
            std::fs::write(self.folder.path().join(ENV_FILE), text).unwrap();
            self
        }

        fn resolve(&self, admin_secret: AdminSecret) -> Result<Resolved, ConfigError> {
            let surroundings = Surroundings {
                environment: self.environment.clone(),
                working_directory: self.folder.path().to_owned(),
            };
            resolve(&self.flags, &surroundings, admin_secret, &Entropy::default())
        }

        fn config(&self) -> Config {
            self.resolve(AdminSecret::Optional).unwrap().config
        }

        fn refusal(&self) -> String {
            self.resolve(AdminSecret::Optional).unwrap_err().to_string()
        }
    }

    fn origin_of(resolved: &Resolved, name: &str) -> String {
        let found = resolved.settings.iter().find(|in_force| in_force.setting.name == name).unwrap();
        found.origin.to_string()
    }

    #[test]
    fn nothing_configured_gives_the_defaults() {
        let config = Case::new().config();
        assert_eq!(config.data_dir, Path::new("./data"));
        assert_eq!(config.listen.to_string(), "0.0.0.0:9443");
        assert_eq!(config.database_url, DatabaseUrl::Sqlite("./data/mcp_proxy.db".into()));
        assert!(!config.database_url_given && !config.strict_pki && !config.log_json);
        assert_eq!(config.rate_limit_per_minute, 1800);
        assert_eq!(config.global_rate_limit_rps, None);
        assert_eq!(config.trust_domain, "cullis.local");
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_env_file() {
        let case = Case::new()
            .file("MCP_PROXY_ORG_ID=from-file\nLOG_FORMAT=json\nMCP_PROXY_RATE_LIMIT_PER_MINUTE=7\n");
        let case =
            case.variable(ORG_ID, "from-environment").variable(LOG_FORMAT, "text").flag(ORG_ID, "from-flag");
        let resolved = case.resolve(AdminSecret::Optional).unwrap();
        assert_eq!(resolved.config.org_id.as_deref(), Some("from-flag"));
        assert!(!resolved.config.log_json);
        assert_eq!(resolved.config.rate_limit_per_minute, 7);
        assert_eq!(origin_of(&resolved, ORG_ID), "flag");
        assert_eq!(origin_of(&resolved, LOG_FORMAT), "environment");
        assert!(origin_of(&resolved, RATE_LIMIT_PER_MINUTE).starts_with("env file "));
        assert_eq!(origin_of(&resolved, LISTEN), "default");
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let case = Case::new().file("MCP_PROXY_ORG_ID=acme\n").variable(ORG_ID, "");
        assert_eq!(case.config().org_id.as_deref(), Some("acme"));
    }

    #[test]
    fn a_wrong_value_is_refused_with_one_sentence_that_names_the_variable() {
        for (name, value, part) in [
            (LISTEN, "9443", "expected an address and a port"),
            (LISTEN, "0.0.0.0:99999", "expected an address and a port"),
            (ORG_ID, "a/b", "letters, digits"),
            (TRUST_DOMAIN, "Cullis.Local", "lower-case"),
            (PUBLIC_URL, "mastio.example.com", "expected a URL"),
            (PUBLIC_URL, "https://user:pw@mastio.example.com", "expected a URL"),
            (DATABASE_URL, "mysql://x", "scheme \"mysql\""),
            (DATABASE_URL, "sqlite:///:memory:", "in memory"),
            (REDIS_URL, "http://redis", "redis://"),
            (STRICT_PKI, "maybe", "true or false"),
            (INTERNAL_HOST_ALLOWLIST, "http://tools", "separated by commas"),
            (RATE_LIMIT_PER_MINUTE, "-1", "a whole number"),
            (RATE_LIMIT_PER_MINUTE, "1.5", "a whole number"),
            (ADDRESS_RATE_LIMIT_PER_MINUTE, "-1", "a whole number"),
            (GLOBAL_RATE_LIMIT_RPS, "many", "a whole number"),
            (DPOP_NONCE, "maybe", "true or false"),
            (EGRESS_DPOP_MODE, "bound", "off, optional or required"),
            (TRUSTED_FRONT, "nginx", "CIDR blocks"),
            (TRUSTED_FRONT, "0.0.0.0/0", "CIDR blocks"),
            (TRUSTED_FRONT, "10.0.0.5/8", "CIDR blocks"),
            (ADMIN_SECRET, "with space", "visible ASCII"),
            (LOG_FORMAT, "xml", "json or text"),
            (LOG_FILTER, "a=b=c", "a filter"),
            (LOG_FILTER, "0123\u{c}\t,\tx=\u{4820}y", "a filter"),
        ] {
            let refusal = Case::new().variable(name, value).refusal();
            assert!(refusal.starts_with(&format!("{name} (environment) ")), "{refusal}");
            assert!(refusal.contains(part), "{refusal}");
            assert!(!refusal.contains('\n'), "{refusal}");
        }
    }

    #[test]
    fn a_refusal_never_repeats_a_secret() {
        for (name, value) in [
            (ADMIN_SECRET, "hunter2 hunter2"),
            (DATABASE_URL, "mysql://cullis:hunter2@db/cullis"),
            (REDIS_URL, "http://:hunter2@redis"),
            (REDIS_URL, "redis://:hunter2@redis/zero"),
        ] {
            assert!(!Case::new().variable(name, value).refusal().contains("hunter2"), "{name}");
        }
    }

    #[test]
    fn what_is_shown_holds_no_secret() {
        let case = Case::new()
            .variable(ADMIN_SECRET, "hunter2")
            .variable(DB_ENCRYPTION_KEY, "hunter2")
            .variable(DATABASE_URL, "postgresql+asyncpg://cullis:hunter2@db/cullis")
            .variable(REDIS_URL, "redis://:hunter2@redis:6379/0");
        let resolved = case.resolve(AdminSecret::Optional).unwrap();
        let shown = format!("{resolved:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
        let socket = Case::new().variable(REDIS_URL, "redis+unix:///run/redis.sock?pass=hunter2");
        let shown = format!("{:?}", socket.resolve(AdminSecret::Optional).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn truthy_spellings_are_understood() {
        for yes in ["1", "true", "True", "YES", "on"] {
            assert!(Case::new().variable(STRICT_PKI, yes).config().strict_pki, "{yes}");
        }
        for no in ["0", "false", "No", "off"] {
            assert!(!Case::new().variable(STRICT_PKI, no).config().strict_pki, "{no}");
        }
    }

    #[test]
    fn zero_is_no_limit() {
        let config =
            Case::new().variable(GLOBAL_RATE_LIMIT_RPS, "0").variable(RATE_LIMIT_PER_MINUTE, "0").config();
        assert_eq!((config.global_rate_limit_rps, config.rate_limit_per_minute), (None, 0));
        assert_eq!(Case::new().variable(GLOBAL_RATE_LIMIT_RPS, "1").config().global_rate_limit_rps, Some(1));
    }

    #[test]
    fn a_public_url_loses_its_trailing_slash_and_hosts_their_spaces() {
        let case = Case::new()
            .variable(PUBLIC_URL, "https://mastio.example.com:9443/")
            .variable(INTERNAL_HOST_ALLOWLIST, "Tools.internal, 10.0.0.7:8080,,tools.internal");
        assert_eq!(case.config().public_url.as_deref(), Some("https://mastio.example.com:9443"));
        assert_eq!(case.config().internal_host_allowlist, ["tools.internal", "10.0.0.7:8080"]);
    }

    #[test]
    fn a_certificate_without_its_key_is_refused() {
        assert!(
            Case::new().variable(TLS_CERT, "/dev/null").refusal().starts_with("MCP_PROXY_TLS_KEY is not set")
        );
        assert!(
            Case::new().variable(TLS_KEY, "/dev/null").refusal().starts_with("MCP_PROXY_TLS_CERT is not set")
        );
        let absent = Case::new().variable(TLS_CERT, "/no/such.pem").variable(TLS_KEY, "/dev/null").refusal();
        assert!(absent.starts_with("MCP_PROXY_TLS_CERT (environment) is \"/no/such.pem\""), "{absent}");
    }

    #[test]
    fn the_env_file_is_read_as_grep_and_cut_read_it() {
        let case = Case::new().file(
            "# comment\n\nexport MCP_PROXY_ORG_ID=acme\nMCP_PROXY_ADMIN_SECRET=pa$$word$HOME\n\
             MCP_PROXY_TRUST_DOMAIN=\"example.org\" # ours\nLOG_FORMAT=json # for the collector\n\
             MCP_PROXY_DASHBOARD_SIGNING_KEY=x\n",
        );
        let resolved = case.resolve(AdminSecret::Needed).unwrap();
        assert_eq!(resolved.config.admin_secret, "pa$$word$HOME");
        assert_eq!(resolved.config.org_id.as_deref(), Some("acme"));
        assert_eq!(resolved.config.trust_domain, "example.org");
        assert!(resolved.config.log_json);
        assert_eq!(resolved.unused, ["MCP_PROXY_DASHBOARD_SIGNING_KEY"]);
    }

    #[test]
    fn a_line_that_is_not_understood_is_named_and_not_repeated() {
        let refusal = Case::new().file("MCP_PROXY_ORG_ID=acme\nhunter2\n").refusal();
        assert!(refusal.starts_with("line 2 of the env file ") && !refusal.contains("hunter2"), "{refusal}");
    }

    #[test]
    fn an_env_file_that_was_named_must_exist() {
        let mut case = Case::new();
        case.flags.env_file = Some("/no/such.env".into());
        assert!(case.refusal().starts_with("the env file /no/such.env"));
    }

    #[test]
    fn a_secret_is_generated_once_and_read_back() {
        let case = Case::new();
        let first = case.resolve(AdminSecret::Needed).unwrap();
        let path = case.folder.path().join(ENV_FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(origin_of(&first, ADMIN_SECRET).starts_with("generated into "));
        // What the page's grep and cut give.
        let text = std::fs::read_to_string(&path).unwrap();
        let line = text.lines().find(|line| line.starts_with("MCP_PROXY_ADMIN_SECRET")).unwrap();
        assert_eq!(line.split('=').collect::<Vec<_>>(), [ADMIN_SECRET, &first.config.admin_secret]);

        let second = case.resolve(AdminSecret::Needed).unwrap();
        assert_eq!(second.config.admin_secret, first.config.admin_secret);
        assert!(origin_of(&second, ADMIN_SECRET).starts_with("env file "));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn no_secret_is_generated_where_one_may_be_missing_or_something_is_configured() {
        let case = Case::new();
        assert!(case.resolve(AdminSecret::Optional).unwrap().config.admin_secret.is_empty());
        assert!(!case.folder.path().join(ENV_FILE).exists());

        let case = Case::new().file("MCP_PROXY_ORG_ID=acme\n");
        let refusal = case.resolve(AdminSecret::Needed).unwrap_err().to_string();
        assert_eq!(refusal, "MCP_PROXY_ADMIN_SECRET is not set: add it to the env file");

        let case = Case::new().variable(DATABASE_URL, "postgres://db/cullis");
        let refusal = case.resolve(AdminSecret::Needed).unwrap_err().to_string();
        assert!(refusal.starts_with("MCP_PROXY_ADMIN_SECRET is not set: with PostgreSQL"), "{refusal}");
        assert!(!case.folder.path().join(ENV_FILE).exists());
    }

    #[test]
    fn every_setting_is_documented() {
        let documented = include_str!("../../../docs/defaults.md");
        for setting in &SETTINGS {
            let line = format!("| `{}` | `--{}` | ", setting.name, setting.flag);
            assert!(documented.contains(&line), "docs/defaults.md has no line {line}");
        }
    }
}
