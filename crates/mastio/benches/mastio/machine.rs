//! What the machine itself allows, measured in the same run: signatures, keys, the disk, bare row writes.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use serde::Serialize;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use crate::Failure;

const EACH: Duration = Duration::from_millis(400);
/// What is signed: as long as a token or the signed part of a leaf.
const MESSAGE: [u8; 600] = [0x5a; 600];
/// Generating an RSA key takes as long as luck wants: the mean of a few.
const RSA_SAMPLES: u32 = 5;

/// Rates a second and times of this machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cores: usize,
    pub p256_sign_one_core: f64,
    pub p256_verify_one_core: f64,
    pub p256_sign_all_cores: f64,
    pub p256_verify_all_cores: f64,
    pub rsa4096_generate_mean_s: f64,
    pub rsa4096_generate_max_s: f64,
    pub fdatasync_per_s: f64,
    /// Two verifications and one signature a mint, on all cores.
    pub mints_by_cryptography_alone: f64,
}

impl Machine {
    /// Measures for a few seconds.
    pub fn measure(folder: &Path) -> Result<Self, Failure> {
        let cores = std::thread::available_parallelism()?.get();
        let [sign_one, verify_one] = [rate(1, sign)?, rate(1, verify)?];
        let [sign_all, verify_all] = [rate(cores, sign)?, rate(cores, verify)?];
        let mut samples = Vec::new();
        for _ in 0..RSA_SAMPLES {
            let begun = Instant::now();
            let key = rsa::KeyPair::generate(rsa::KeySize::Rsa4096).map_err(|_| "no RSA key")?;
            samples.push(begun.elapsed().as_secs_f64());
            key.as_der().map_err(|_| "no RSA key")?;
        }
        Ok(Self {
            cores,
            p256_sign_one_core: sign_one,
            p256_verify_one_core: verify_one,
            p256_sign_all_cores: sign_all,
            p256_verify_all_cores: verify_all,
            rsa4096_generate_mean_s: samples.iter().sum::<f64>() / f64::from(RSA_SAMPLES),
            rsa4096_generate_max_s: samples.iter().copied().fold(0.0, f64::max),
            fdatasync_per_s: fdatasync(folder)?,
            mints_by_cryptography_alone: 1.0 / (2.0 / verify_all + 1.0 / sign_all),
        })
    }

    /// Seconds that the signatures and verifications of an apply need on all cores.
    pub fn leaves_s(&self, leaves: u32) -> f64 {
        f64::from(leaves) * (1.0 / self.p256_sign_all_cores + 1.0 / self.p256_verify_all_cores)
    }
}

fn rate(threads: usize, work: fn(Instant) -> Result<u32, Failure>) -> Result<f64, Failure> {
    let begun = Instant::now();
    let deadline = begun + EACH;
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(move || work(deadline))).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| "a worker panicked")?)
            .sum::<Result<u32, Failure>>()
    })?;
    Ok(f64::from(done) / begun.elapsed().as_secs_f64())
}

fn sign(deadline: Instant) -> Result<u32, Failure> {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_| "no P-256 key")?;
    let (random, mut done) = (SystemRandom::new(), 0);
    while Instant::now() < deadline {
        key.sign(&random, &MESSAGE).map_err(|_| "no signature")?;
        done += 1;
    }
    Ok(done)
}

fn verify(deadline: Instant) -> Result<u32, Failure> {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_| "no P-256 key")?;
    let signature = key.sign(&SystemRandom::new(), &MESSAGE).map_err(|_| "no signature")?;
    let mut done = 0;
    while Instant::now() < deadline {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref())
            .verify(&MESSAGE, signature.as_ref())
            .map_err(|_| "a good signature is refused")?;
        done += 1;
    }
    Ok(done)
}

fn fdatasync(folder: &Path) -> Result<f64, Failure> {
    let mut file = std::fs::File::create(folder.join("fdatasync"))?;
    let (begun, mut done) = (Instant::now(), 0_u32);
    while begun.elapsed() < EACH {
        file.write_all(&MESSAGE[..300])?;
        file.sync_data()?;
        done += 1;
    }
    Ok(f64::from(done) / begun.elapsed().as_secs_f64())
}

/// Seconds that the rows of an apply take with nothing around them: an image of each leaf before and after, and the
/// leaf itself, in statements of 64 rows and one durable commit.
pub async fn bare_rows_s(folder: &Path, leaves: u32) -> Result<f64, Failure> {
    let mut connection = SqliteConnectOptions::new()
        .filename(folder.join(format!("bare-{leaves}.db")))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await?;
    let run = |sql: &'static str| sqlx::query(sql);
    run("CREATE TABLE agents (agent_id TEXT PRIMARY KEY, cert_pem TEXT)").execute(&mut connection).await?;
    run("CREATE TABLE images (agent_id TEXT PRIMARY KEY, before TEXT, after TEXT)")
        .execute(&mut connection)
        .await?;
    let (before, after) = ("b".repeat(900), "a".repeat(1800));
    sqlx::query(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < $1) \
         INSERT INTO agents SELECT 'acme::agent-' || printf('%06d', i), $2 FROM n",
    )
    .bind(leaves)
    .bind(&before)
    .execute(&mut connection)
    .await?;
    let begun = Instant::now();
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let ids: Vec<u32> = (1..=leaves).collect();
    for chunk in ids.chunks(64) {
        let places = vec!["(?,?,?)"; chunk.len()].join(",");
        let mut insert = sqlx::query(AssertSqlSafe(format!("INSERT INTO images VALUES {places}")));
        for id in chunk {
            insert = insert.bind(format!("acme::agent-{id:06}")).bind(&before).bind(&after);
        }
        insert.execute(&mut *tx).await?;
    }
    run("UPDATE agents SET cert_pem = i.after FROM images i WHERE i.agent_id = agents.agent_id")
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    let took = begun.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(took)
}
