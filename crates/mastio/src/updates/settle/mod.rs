//! The end of a trust overlap (design §4): the replaced Org CA retires, its key is destroyed, and what stood under it is
//! not accepted any more.
//!
//! Until then agents go on with the leaf and the CA file they have. [`Updates::overlap`] tells who still needs it: agents
//! that present a former leaf, agents whose present certificate stands under the replaced Org CA alone (a BYOCA owner has
//! to enroll again first), and what no server can see, which is what each client has pinned. [`Updates::settle`] ends it
//! in one transaction with its audit event: anchors, former certificates, snapshots, keys and the epoch. It cannot be
//! undone, so no rollback goes back behind it. An overlap also ends by itself, when the replaced Org CA expires.

mod store;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use mastio_core::x509::Certificate;
use mastio_core::x509::path::{self, Anchor};
use serde_json::{Value, json};

use super::crash::crash_point;
use super::error::UpdateError;
use super::halt::EnrollmentType;
use super::rehearsal::CertificateSummary;
use super::store as updates_rows;
use super::{Updates, registry, shown};
use crate::pki::Authority;
use crate::pki::store::hex;
use crate::store::{Query, WriteTx, adopt};
use store as rows;

/// Agents that one list names.
const NAMED_MAX: usize = 100;
/// Certificates that are judged together.
const BATCH: i64 = 512;
/// How often a settling whose epoch moved is judged again.
const STALE_ROUNDS_MAX: usize = 5;

/// What no server can see, and an operator has to know before the overlap ends.
const CANNOT_BE_SEEN: [&str; 3] = [
    "which CA file each client has pinned: a client that pins the retiring Org CA alone cannot connect any more; give it \
     /pki/ca.crt first",
    "agents that have not connected since the overlap began: they may hold either leaf",
    "copies of the retiring Org CA's key in backups and in the sealed copy that an adoption made: destroy those yourself",
];

/// An agent whose present certificate stands under a retiring Org CA alone.
struct Blocking {
    agent_id: String,
    enrollment: EnrollmentType,
}

impl Blocking {
    fn to_json(&self) -> Value {
        let next = match self.enrollment {
            EnrollmentType::Byoca => {
                "its owner enrolls again under the current Org CA: mastio pki issue-byoca --csr FILE"
            }
            EnrollmentType::Spire => {
                "SPIRE has to issue it a certificate under a bundle that does not retire"
            }
            EnrollmentType::Connector => "apply the update that re-signs it, or enroll it again",
        };
        json!({ "agent_id": self.agent_id, "enrollment": self.enrollment.as_str(), "next": next })
    }
}

/// Who needs the overlap, as of one epoch.
struct Needs {
    active: i64,
    seen: i64,
    on_old_leaf: i64,
    old_leaves: Vec<rows::OldLeaf>,
    blocking: Vec<Blocking>,
    blocking_count: usize,
}

impl Updates {
    /// The overlap as it stands: what retires, who still needs it, what cannot be seen, and what settling would do.
    pub async fn overlap(&self) -> Result<Value, UpdateError> {
        let authority = self.pki.refresh().await?;
        let mut tx = self.pki.store.read().await?;
        let retiring = rows::retiring(&mut tx).await?;
        if retiring.is_empty() {
            return Ok(json!({ "overlap": false, "retiring": [] }));
        }
        let needs = self.needs(&mut tx, &authority).await?;
        let ends_rollback_of = ends_rollback_of(&mut tx).await?;
        let refused = match self.refusal(&mut tx, &authority, &needs, false).await {
            Ok(()) => Value::Null,
            Err(error) => crate::http::error::Problem::detail(&error),
        };
        let anchors: Vec<Value> = authority
            .retiring
            .iter()
            .map(|anchor| {
                let fingerprint = anchor.certificate.fingerprint();
                let row = retiring.iter().find(|row| row.fingerprint == fingerprint);
                json!({
                    "fingerprint": fingerprint,
                    "certificate": CertificateSummary::of(&anchor.certificate),
                    "since": row.map(|row| shown(&row.added_at)),
                    "added_by": row.map(|row| &row.added_by),
                    "key": if anchor.key.is_some() { "here" } else { "destroyed" },
                })
            })
            .collect();
        let old_leaves: Vec<Value> = needs.old_leaves.iter().map(old_leaf).collect();
        let blocking: Vec<Value> = needs.blocking.iter().map(Blocking::to_json).collect();
        Ok(json!({
            "overlap": true,
            "org_ca": CertificateSummary::of(&authority.org_ca),
            "retiring": anchors,
            "agents": {
                "active": needs.active,
                "on_old_leaf": needs.on_old_leaf,
                "on_present_leaf": needs.seen - needs.on_old_leaf,
                "not_seen": needs.active - needs.seen,
            },
            "on_old_leaf": old_leaves,
            "blocking": { "count": needs.blocking_count, "agents": blocking },
            "cannot_be_seen": CANNOT_BE_SEEN,
            "settling": {
                "refused": refused,
                "breaks_agents": needs.on_old_leaf,
                "ends_rollback_of": ends_rollback_of,
            },
        }))
    }

    /// How many Org CAs retire, and how many active agents present a former leaf: for the gauges.
    pub async fn overlap_counts(&self, tx: &mut impl Query) -> Result<(i64, i64), UpdateError> {
        let retiring = rows::retiring(tx).await?.len();
        let on_old_leaf = if retiring == 0 { 0 } else { rows::on_old_leaf(tx).await? };
        Ok((i64::try_from(retiring).unwrap_or(i64::MAX), on_old_leaf))
    }

    /// Ends the overlap, for good. `break_agents`: although agents still present a former leaf.
    ///
    /// Errors: [`UpdateError::NoOverlap`]; [`UpdateError::Running`]; [`UpdateError::AgentsBlock`];
    /// [`UpdateError::AgentsBreak`]; [`UpdateError::NoTlsIssuer`]. Nothing has changed then.
    pub async fn settle(&self, break_agents: bool, actor: &str) -> Result<Value, UpdateError> {
        for _round in 0..STALE_ROUNDS_MAX {
            let authority = self.pki.refresh().await?;
            let mut tx = self.pki.store.read().await?;
            let needs = self.needs(&mut tx, &authority).await?;
            self.refusal(&mut tx, &authority, &needs, break_agents).await?;
            drop(tx);
            let mut tx = self.pki.store.write().await?;
            // Whatever was judged moves the epoch when it changes.
            if tx.epoch() != authority.epoch {
                continue;
            }
            self.refuse_under_a_run(&mut tx).await?;
            let retired: Vec<&Certificate> =
                authority.retiring.iter().map(|anchor| &anchor.certificate).collect();
            return self.end_overlap(tx, &authority, &retired, true, "confirmed", actor).await;
        }
        Err(UpdateError::CannotCatchUp)
    }

    /// Retires what has expired: nobody can be standing under it any more.
    pub async fn settle_expired(&self) -> Result<(), UpdateError> {
        let now = self.pki.clock.now().seconds();
        let expired = |certificate: &Certificate| certificate.not_after() <= now;
        // Without a look at the database: asked every few seconds.
        if !self.pki.authority().retiring.iter().any(|anchor| expired(&anchor.certificate)) {
            return Ok(());
        }
        let authority = self.pki.refresh().await?;
        let retired: Vec<&Certificate> = authority
            .retiring
            .iter()
            .map(|anchor| &anchor.certificate)
            .filter(|certificate| expired(certificate))
            .collect();
        let mut tx = self.pki.store.write().await?;
        if tx.epoch() != authority.epoch || self.refuse_under_a_run(&mut tx).await.is_err() {
            // The next turn looks again.
            return Ok(());
        }
        let all = retired.len() == authority.retiring.len();
        self.end_overlap(tx, &authority, &retired, all, "expired", "system").await.map(drop)
    }

    /// The one transaction. `all`: nothing retires any more after it.
    async fn end_overlap(
        &self,
        mut tx: WriteTx,
        authority: &Authority,
        retired: &[&Certificate],
        all: bool,
        why: &'static str,
        actor: &str,
    ) -> Result<Value, UpdateError> {
        let now = self.pki.clock.now().seconds();
        for certificate in retired {
            rows::retire(&mut tx, &certificate.fingerprint()).await?;
        }
        let (mut former, mut ended) = (0, Vec::new());
        if all {
            former = rows::forget_former(&mut tx).await?;
            ended = end_rollbacks(&mut tx, now).await?;
            rows::destroy_sealed_images(&mut tx).await?;
        }
        let fingerprints: Vec<String> = retired.iter().map(|certificate| certificate.fingerprint()).collect();
        let details = json!({
            "why": why,
            "org_ca": authority.org_ca.fingerprint(),
            "retired": fingerprints,
            "former_certificates": former,
            "ended_rollback_of": ended,
        });
        tx.bump_epoch().await?;
        crash_point("settle.commit.before");
        let event = Event {
            event_type: EventType::PkiOverlapEnded,
            actor: actor.to_owned(),
            details: details.clone(),
        };
        tx.commit(&[event]).await?;
        crash_point("settle.commit");
        tracing::info!(why, retired = fingerprints.join(","), "trust_overlap_ended");
        self.pki.refresh().await?;
        if let Some(tls) = self.tls.get() {
            tls.refresh(&self.pki).await?;
        }
        let mut answer = details;
        if let Some(answer) = answer.as_object_mut() {
            answer.insert("settled_at".to_owned(), json!(now.to_rfc3339()));
        }
        Ok(answer)
    }

    async fn needs(&self, tx: &mut impl Query, authority: &Authority) -> Result<Needs, UpdateError> {
        let limit = i64::try_from(NAMED_MAX).unwrap_or(i64::MAX);
        let (blocking, blocking_count) = self.blocking(tx, authority).await?;
        Ok(Needs {
            active: rows::active(tx).await?,
            seen: rows::seen(tx).await?,
            on_old_leaf: rows::on_old_leaf(tx).await?,
            old_leaves: rows::old_leaves(tx, limit).await?,
            blocking,
            blocking_count,
        })
    }

    /// Active agents whose present certificate is good today, and would not be without what retires.
    async fn blocking(
        &self,
        tx: &mut impl Query,
        authority: &Authority,
    ) -> Result<(Vec<Blocking>, usize), UpdateError> {
        let now = self.pki.clock.now().seconds();
        let org_ca = hex(&authority.org_ca.key_id());
        let mastio_ca = authority.mastio_ca.as_ref().map_or_else(|| org_ca.clone(), |ca| hex(&ca.key_id()));
        let staying = authority.staying_trust();
        let (mut named, mut count, mut after) = (Vec::new(), 0, String::new());
        loop {
            let page = rows::not_issued_by(tx, [&org_ca, &mastio_ca], &after, BATCH).await?;
            let Some(last) = page.last() else { return Ok((named, count)) };
            after.clone_from(&last.agent_id);
            for candidate in page {
                if !stands_under_what_retires(&candidate.cert_pem, authority, &staying, now) {
                    continue;
                }
                count += 1;
                if named.len() < NAMED_MAX {
                    let enrollment = EnrollmentType::from_tag(candidate.enrollment_method.as_deref());
                    named.push(Blocking { agent_id: candidate.agent_id, enrollment });
                }
            }
        }
    }

    /// Why the overlap cannot be ended now.
    async fn refusal(
        &self,
        tx: &mut impl Query,
        authority: &Authority,
        needs: &Needs,
        break_agents: bool,
    ) -> Result<(), UpdateError> {
        if authority.retiring.is_empty() {
            return Err(UpdateError::NoOverlap);
        }
        self.refuse_under_a_run(tx).await?;
        let own_files = self.tls.get().is_some_and(|tls| tls.has_own_files());
        if !own_files && !authority.can_issue_tls_without_retiring(self.pki.clock.now().seconds()) {
            return Err(UpdateError::NoTlsIssuer);
        }
        if needs.blocking_count > 0 {
            let agents = needs.blocking.iter().map(Blocking::to_json).collect();
            return Err(UpdateError::AgentsBlock { count: needs.blocking_count, agents });
        }
        if needs.on_old_leaf > 0 && !break_agents {
            let agents = needs.old_leaves.iter().map(old_leaf).collect();
            return Err(UpdateError::AgentsBreak { count: needs.on_old_leaf, agents });
        }
        Ok(())
    }

    async fn refuse_under_a_run(&self, tx: &mut impl Query) -> Result<(), UpdateError> {
        if let Some(open) = updates_rows::open_run(tx).await? {
            return Err(UpdateError::Running { migration_id: open.migration_id });
        }
        match updates_rows::unverified_runs(tx).await?.into_iter().next() {
            Some(run) => Err(UpdateError::Running { migration_id: run.migration_id }),
            None => Ok(()),
        }
    }
}

fn old_leaf(leaf: &rows::OldLeaf) -> Value {
    json!({
        "agent_id": leaf.agent_id,
        "fingerprint": leaf.fingerprint,
        "seen_at": rows::shown(leaf.seen_at),
        "present_leaf_seen_at": leaf.present_seen_at.map(rows::shown),
    })
}

fn stands_under_what_retires(
    cert_pem: &str,
    authority: &Authority,
    staying: &[Anchor],
    now: UnixTime,
) -> bool {
    // An operator's SQL may have put anything there: what cannot be read is not accepted today either.
    let Ok(chain) = Certificate::chain_from_pem(cert_pem) else { return false };
    let Some((leaf, presented)) = chain.split_first() else { return false };
    let own = authority.mastio_ca.as_slice();
    authority.validate_client(leaf, presented, now).is_ok()
        && path::validate(leaf, presented, own, staying, now).is_err()
}

/// The updates whose rollback would bring back a certificate that is not accepted any more.
async fn ends_rollback_of(tx: &mut impl Query) -> Result<Vec<String>, UpdateError> {
    let mut ended = Vec::new();
    for (migration_id, _) in updates_rows::snapshots_taken(tx).await? {
        // What this version does not know may have certificates in it.
        let certificates =
            registry::find(&migration_id).is_none_or(|migration| migration.scope().has_certificates());
        let open = match updates_rows::snapshot(tx, &migration_id).await {
            Ok(descriptor) => descriptor.is_some_and(|descriptor| descriptor.settled_at.is_none()),
            // Nobody rolls back to a damaged one.
            Err(UpdateError::SnapshotDamaged { .. }) => false,
            Err(error) => return Err(error),
        };
        if certificates && open {
            ended.push(migration_id);
        }
    }
    Ok(ended)
}

async fn end_rollbacks(tx: &mut WriteTx, now: UnixTime) -> Result<Vec<String>, UpdateError> {
    let ended = ends_rollback_of(tx).await?;
    for migration_id in &ended {
        let Some(mut descriptor) = updates_rows::snapshot(tx, migration_id).await? else { continue };
        descriptor.settled_at = Some(now.to_rfc3339());
        adopt::set_snapshot(tx, migration_id, &json!(descriptor).to_string()).await?;
    }
    Ok(ended)
}
