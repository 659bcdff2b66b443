//! In which order updates are applied, and who may be let in now.
//!
//! An update comes after what it requires; a halting one, and with it what it requires, before the others; otherwise
//! ids decide, which sort by time. While a halt stands, only the update that it names and what that one requires may
//! be applied: anything else is told what comes first.

use std::collections::BTreeSet;

use super::error::UpdateError;
use super::halt::{self, HaltReason};
use super::migration::Migration;
use super::store::{self, UpdateRow};
use super::{Direction, registry};
use crate::store::Query;

/// An update that waits to be applied, as the order sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its id.
    pub migration_id: String,
    /// Whether signing is halted until it is applied.
    pub halts: bool,
    /// What has to be applied before it.
    pub requires: Vec<String>,
}

/// The ids of `waiting` in the order in which they are to be applied.
#[must_use]
pub fn in_order(waiting: &[Waiting]) -> Vec<String> {
    let mut roots: Vec<&Waiting> = waiting.iter().collect();
    roots.sort_by_key(|update| (!update.halts, &update.migration_id));
    let mut ordered = Vec::with_capacity(waiting.len());
    for root in roots {
        visit(root, waiting, &mut ordered);
    }
    ordered
}

/// `migration_id` and everything that waits and that it requires, in order. Empty where it does not wait.
#[must_use]
pub fn with_required(migration_id: &str, waiting: &[Waiting]) -> Vec<String> {
    let mut ordered = Vec::new();
    if let Some(root) = find(migration_id, waiting) {
        visit(root, waiting, &mut ordered);
    }
    ordered
}

fn find<'a>(migration_id: &str, waiting: &'a [Waiting]) -> Option<&'a Waiting> {
    waiting.iter().find(|update| update.migration_id == migration_id)
}

/// Appends `root` after what it requires. A circle, which only SQL can make, is entered once and left again.
fn visit(root: &Waiting, waiting: &[Waiting], ordered: &mut Vec<String>) {
    let mut entered: BTreeSet<&str> = BTreeSet::new();
    let mut path = vec![root];
    while let Some(update) = path.last().copied() {
        entered.insert(&update.migration_id);
        let mut required: Vec<&Waiting> = update.requires.iter().filter_map(|id| find(id, waiting)).collect();
        required.sort_by_key(|update| &update.migration_id);
        let next = required.into_iter().find(|required| {
            !entered.contains(required.migration_id.as_str()) && !ordered.contains(&required.migration_id)
        });
        match next {
            Some(required) => path.push(required),
            None => {
                path.pop();
                if !ordered.contains(&update.migration_id) {
                    ordered.push(update.migration_id.clone());
                }
            }
        }
    }
}

/// What waits among `rows`, with `halting` ids marked. A row that was rolled back counts only where another requires
/// it: nobody waits for it, and what stands on it has to wait, unless the state was put right in another way.
#[must_use]
pub fn waiting(rows: &[UpdateRow], halting: &[String]) -> Vec<Waiting> {
    rows.iter()
        .filter(|row| row.status != "applied")
        .map(|row| Waiting {
            migration_id: row.migration_id.clone(),
            halts: halting.contains(&row.migration_id),
            requires: required(row),
        })
        .collect()
}

/// What a row requires: as this version declares it, or as the version did that wrote the row.
fn required(row: &UpdateRow) -> Vec<String> {
    match registry::find(&row.migration_id) {
        Some(migration) => migration.declaration().requires.iter().map(|id| (*id).to_owned()).collect(),
        None => halt::list(row.requires.as_deref()),
    }
}

/// The ids of the updates for which signing is halted.
#[must_use]
pub fn halting(reasons: &[HaltReason]) -> Vec<String> {
    reasons
        .iter()
        .filter(|reason| matches!(reason, HaltReason::PendingMigration { .. }))
        .filter_map(HaltReason::migration_id)
        .map(str::to_owned)
        .collect()
}

/// Whether a run of `migration` may begin now. Under the lock of the audit head this decides; elsewhere it informs.
///
/// Errors: [`UpdateError::AlreadyApplied`], [`UpdateError::Running`], [`UpdateError::NoSnapshot`],
/// [`UpdateError::Blocked`], [`UpdateError::OutOfOrder`].
pub async fn admissible(
    tx: &mut impl Query,
    migration: &'static dyn Migration,
    direction: Direction,
) -> Result<(), UpdateError> {
    let migration_id = migration.declaration().migration_id;
    let rows = store::rows(tx).await?;
    let row = rows.iter().find(|row| row.migration_id == migration_id);
    if direction == Direction::Apply && row.is_some_and(|row| row.status == "applied") {
        return Err(UpdateError::AlreadyApplied);
    }
    if let Some(open) = store::open_run(tx).await? {
        return Err(UpdateError::Running { migration_id: open.migration_id });
    }
    match direction {
        Direction::Rollback => {
            let snapshot = store::rollback_snapshot(tx, migration_id).await?;
            match store::blocker(tx, migration_id, &snapshot.run_id).await? {
                Some(blocker) => Err(UpdateError::Blocked { blocker }),
                None => Ok(()),
            }
        }
        Direction::Apply => {
            let reasons = halt::read(tx).await?.reasons;
            let put_right = store::put_right(tx).await?;
            let met = |row: &UpdateRow| row.status == "rolled_back" && put_right.contains(&row.migration_id);
            let rows: Vec<UpdateRow> = rows.into_iter().filter(|row| !met(row)).collect();
            match first(migration, &rows, &reasons) {
                Some(first) => Err(UpdateError::OutOfOrder { first }),
                None => Ok(()),
            }
        }
    }
}

/// What has to be done before `migration` can be applied.
fn first(migration: &dyn Migration, rows: &[UpdateRow], reasons: &[HaltReason]) -> Option<String> {
    let declaration = migration.declaration();
    let mut waiting = waiting(rows, &halting(reasons));
    if find(declaration.migration_id, &waiting).is_none() {
        waiting.push(Waiting {
            migration_id: declaration.migration_id.to_owned(),
            halts: false,
            requires: declaration.requires.iter().map(|id| (*id).to_owned()).collect(),
        });
    }
    first_of(declaration.migration_id, &waiting, reasons)
}

fn first_of(migration_id: &str, waiting: &[Waiting], reasons: &[HaltReason]) -> Option<String> {
    let own = with_required(migration_id, waiting).into_iter().next();
    if let Some(required) = own.filter(|required| required != migration_id) {
        return Some(required);
    }
    match reasons.first()? {
        HaltReason::StagedRotation { kid } => Some(format!("the staged rotation to key {kid}")),
        reason => {
            let halting = reason.migration_id().unwrap_or_default();
            if halting == migration_id {
                return None;
            }
            let mut chain = with_required(halting, waiting);
            if chain.iter().any(|id| id == migration_id) {
                return None;
            }
            // A run that has not verified and a check that failed have no row that waits.
            Some(if chain.is_empty() { halting.to_owned() } else { chain.swap_remove(0) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(migration_id: &str, halts: bool, requires: &[&str]) -> Waiting {
        Waiting {
            migration_id: migration_id.to_owned(),
            halts,
            requires: requires.iter().map(|id| (*id).to_owned()).collect(),
        }
    }

    fn halt(migration_id: &str) -> HaltReason {
        HaltReason::PendingMigration { migration_id: migration_id.to_owned() }
    }

    #[test]
    fn halting_updates_and_what_they_require_come_first() {
        let waiting = [
            update("a", false, &[]),
            update("b", false, &["d"]),
            update("c", true, &["e"]),
            update("d", true, &[]),
            update("e", false, &[]),
        ];
        assert_eq!(in_order(&waiting), ["e", "c", "d", "a", "b"]);
    }

    #[test]
    fn requirements_decide_before_ids_and_what_does_not_wait_is_met() {
        let waiting = [update("a", false, &["c", "x"]), update("b", false, &[]), update("c", false, &["b"])];
        assert_eq!(in_order(&waiting), ["b", "c", "a"]);
        assert_eq!(with_required("c", &waiting), ["b", "c"]);
        assert!(with_required("x", &waiting).is_empty());
    }

    #[test]
    fn a_circle_ends_and_names_everyone_once() {
        let waiting = [update("a", true, &["b"]), update("b", true, &["c"]), update("c", true, &["a"])];
        assert_eq!(in_order(&waiting), ["c", "b", "a"]);
        assert_eq!(in_order(&[update("a", true, &["a"])]), ["a"]);
    }

    #[test]
    fn what_is_required_is_named_and_may_be_applied_under_the_halt_of_what_requires_it() {
        let waiting = [
            update("a", false, &[]),
            update("b", true, &["c"]),
            update("c", false, &["d"]),
            update("d", false, &[]),
        ];
        let reasons = [halt("b")];
        let first = |id| first_of(id, &waiting, &reasons);
        // Another's halt stands: what comes first of all is named, so that each answer is a step forward.
        assert_eq!(first("a").as_deref(), Some("d"));
        assert_eq!(first("b").as_deref(), Some("d"));
        assert_eq!(first("c").as_deref(), Some("d"));
        assert_eq!(first("d"), None);
        assert_eq!(first_of("a", &waiting, &[]), None);
    }

    #[test]
    fn a_halt_without_a_waiting_row_and_a_staged_rotation_are_named() {
        let waiting = [update("a", false, &[])];
        let unverified = HaltReason::UnverifiedRun { migration_id: "z".to_owned() };
        assert_eq!(first_of("a", &waiting, &[unverified]).as_deref(), Some("z"));
        let staged = HaltReason::StagedRotation { kid: "k1".to_owned() };
        assert_eq!(first_of("a", &waiting, &[staged]).as_deref(), Some("the staged rotation to key k1"));
    }
}
