//! Rows of snapshots: reading them whole, and keeping former ones.

use aws_lc_rs::digest::{Context, SHA256};

use super::State;
use crate::pki::store::hex;
use crate::store::{Query, StoreError, WriteTx};
use crate::updates::store::digest;
use crate::values;

/// A run's images, read whole.
pub struct Images {
    /// How many there are.
    pub rows: i64,
    /// Bytes of text in them.
    pub bytes: i64,
    /// SHA-256 over them in the order of their keys, lowercase hex. Of sealed ones the digest of the clear text counts, so
    /// that it stays when they are sealed under another key, and when their keys are destroyed.
    pub digest: String,
    /// The first public one whose text is not the one that it was written with.
    pub damaged_at: Option<String>,
}

/// Reads a run's images, a page at a time.
pub async fn read_images(tx: &mut impl Query, run_id: &str) -> Result<Images, StoreError> {
    let (mut context, mut rows, mut bytes, mut damaged_at) = (Context::new(&SHA256), 0, 0, None);
    let mut part = |text: Option<&str>| {
        // Lengths in front: no two lists of parts read alike. No text is another thing than an empty one.
        context.update(&text.map_or(u64::MAX, |text| text.len() as u64).to_be_bytes());
        context.update(text.unwrap_or_default().as_bytes());
    };
    let (mut table, mut key) = (String::new(), String::new());
    loop {
        let page = tx
            .rows(
                "SELECT table_name, row_key, column_name, sealed, before, before_digest, restores, restore, changes, after, \
                 follows FROM update_images WHERE run_id = $1 AND (table_name, row_key) > ($2, $3) \
                 ORDER BY table_name, row_key LIMIT 512",
                values![run_id, &table, &key],
            )
            .await?;
        let Some(last) = page.last() else { break };
        (table, key) = (last.text(0)?, last.text(1)?);
        for row in &page {
            rows += 1;
            for index in [0, 1, 2, 5] {
                part(Some(&row.text(index)?));
            }
            part(Some(if row.truth(6)? { "restores" } else { "" }));
            part(Some(match (row.truth(8)?, row.truth(10)?) {
                (true, true) => "changes, and the intermediate follows",
                (true, false) => "changes",
                (false, _) => "",
            }));
            let texts = [row.optional_text(4)?, row.optional_text(7)?, row.optional_text(9)?];
            bytes += texts.iter().flatten().map(String::len).sum::<usize>();
            if row.truth(3)? {
                continue;
            }
            let [before, restore, after] = &texts;
            if damaged_at.is_none() && digest(before.as_deref()) != row.text(5)? {
                damaged_at = Some(format!("{}/{}", row.text(0)?, row.text(1)?));
            }
            part(restore.as_deref());
            part(after.as_deref());
        }
    }
    let row = tx.row("SELECT follows FROM update_runs WHERE run_id = $1", values![run_id]).await?;
    if let Some(follows) = row.map(|row| row.optional_text(0)).transpose()?.flatten() {
        part(Some(&follows));
    }
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    Ok(Images { rows, bytes, digest: hex(context.finish().as_ref()), damaged_at })
}

/// Where what was read of a run's images is not what its verification has left.
pub async fn damage(tx: &mut impl Query, run_id: &str, read: &Images) -> Result<Option<String>, StoreError> {
    if read.damaged_at.is_some() {
        return Ok(read.damaged_at.clone());
    }
    let row = tx.row("SELECT images_digest FROM update_runs WHERE run_id = $1", values![run_id]).await?;
    // A run that has not verified has none, and neither has one of an older version or of the predecessor.
    let recorded = row.map(|row| row.optional_text(0)).transpose()?.flatten();
    Ok(recorded
        .filter(|recorded| *recorded != read.digest)
        .map(|_| "its rows, of which some were changed, added or taken away".to_owned()))
}

/// Notes the digest that a run's images have now that its stored state has verified.
pub async fn set_digest(tx: &mut WriteTx, run_id: &str, digest: &str) -> Result<(), StoreError> {
    tx.execute("UPDATE update_runs SET images_digest = $2 WHERE run_id = $1", values![run_id, digest])
        .await
        .map(drop)
}

/// Makes a run's images a former snapshot, and gives up the oldest of `migration_id` beyond `kept_max`.
///
/// Its private keys are destroyed: nobody goes back to it. The current snapshot is never one of those.
pub async fn keep(
    tx: &mut WriteTx,
    migration_id: &str,
    run_id: &str,
    state: State,
    kept_max: i64,
) -> Result<(), StoreError> {
    tx.execute("UPDATE update_runs SET phase = $2 WHERE run_id = $1", values![run_id, state.as_str()])
        .await?;
    tx.execute(
        // What is sealed lies in single cells: so the fleet's images are passed by in their index.
        "UPDATE update_images SET before = NULL, restore = NULL, after = NULL WHERE run_id = $1 \
         AND table_name <> 'internal_agents' AND sealed = 1",
        values![run_id],
    )
    .await?;
    tx.execute(
        "UPDATE update_runs SET phase = 'discarded' WHERE migration_id = $1 AND phase IN ('rolled_back', 'superseded') \
         AND run_id NOT IN (SELECT run_id FROM update_runs WHERE migration_id = $1 \
         AND phase IN ('rolled_back', 'superseded') ORDER BY run_id DESC LIMIT $2)",
        values![migration_id, kept_max],
    )
    .await
    .map(drop)
}

/// A former snapshot that is kept.
pub struct Kept {
    /// Whose.
    pub migration_id: String,
    /// Which run's images it is.
    pub run_id: String,
    /// When that run began, as stored.
    pub began_at: String,
    /// What has become of it.
    pub state: State,
}

/// The former snapshots, the newest of each update first.
pub async fn kept(tx: &mut impl Query) -> Result<Vec<Kept>, StoreError> {
    tx.rows(
        "SELECT migration_id, run_id, started_at, phase FROM update_runs WHERE phase IN ('rolled_back', 'superseded') \
         ORDER BY migration_id, run_id DESC",
        &[],
    )
    .await?
    .iter()
    .map(|row| {
        let state = if row.text(3)? == "rolled_back" { State::RolledBack } else { State::Superseded };
        Ok(Kept { migration_id: row.text(0)?, run_id: row.text(1)?, began_at: row.text(2)?, state })
    })
    .collect()
}
