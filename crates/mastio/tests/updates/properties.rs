//! Properties that hold for every fleet and every order of events: the invariants of the design after each step of a
//! random history of applies, rollbacks, crashes, enrollments, renewals, revocations and operators' SQL.
//!
//! Each step is a real process on a real database; a crash is the process's death at one of the engine's points. The
//! histories come from a fixed seed, few of them by default; `MASTIO_TEST_ALL` walks many, `MASTIO_TEST_SEED` others.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

use crate::points::{APPLY_POINTS, ROLLBACK_POINTS};
use crate::server::{Deploy, MIGRATION, On, run};
use crate::state::{PkiState, certificate, open_runs, status, text};

/// Steps of a history.
const STEPS: std::ops::Range<usize> = 4..11;
/// Legacy databases that a history begins with.
const FIXTURES: [&str; 4] = ["chain5", "v01_root5", "v01_inactive", "py_mixed_byoca_pending"];

/// One step of a history.
#[derive(Debug, Clone)]
enum Step {
    /// An apply, killed at a point where there is one.
    Apply(Option<Index>),
    /// A rollback, killed at a point where there is one.
    Rollback(Option<Index>),
    Enroll,
    Renew(Index),
    Revoke(Index),
    Deactivate(Index),
    Reactivate(Index),
    Delete(Index),
    Sql(Sql, Index),
}

/// What an operator writes by hand.
#[derive(Debug, Clone, Copy)]
enum Sql {
    /// Another name for an agent.
    Rename,
    /// The same certificate as another text.
    RewriteLeaf,
    /// An agent set aside, or taken back.
    SetAside,
    /// The update's row deleted, as the page says.
    DeleteRow,
    /// The update disabled, as the page says.
    Disable,
}

fn steps() -> impl Strategy<Value = (usize, BTreeSet<u8>, Vec<Step>)> {
    let crash = || proptest::option::weighted(0.4, any::<Index>());
    let sql = prop_oneof![
        Just(Sql::Rename),
        Just(Sql::RewriteLeaf),
        Just(Sql::SetAside),
        Just(Sql::DeleteRow),
        Just(Sql::Disable)
    ];
    let step = prop_oneof![
        4 => crash().prop_map(Step::Apply),
        3 => crash().prop_map(Step::Rollback),
        2 => Just(Step::Enroll),
        1 => any::<Index>().prop_map(Step::Renew),
        1 => any::<Index>().prop_map(Step::Revoke),
        1 => any::<Index>().prop_map(Step::Deactivate),
        1 => any::<Index>().prop_map(Step::Reactivate),
        1 => any::<Index>().prop_map(Step::Delete),
        2 => (sql, any::<Index>()).prop_map(|(sql, of)| Step::Sql(sql, of)),
    ];
    let missing = proptest::collection::btree_set(0..5u8, 0..4);
    (0..FIXTURES.len(), missing, proptest::collection::vec(step, STEPS))
}

/// A deploy and what its history has promised so far.
struct World {
    deploy: Deploy,
    /// Before the last apply, while a rollback would go back to it.
    before: Option<PkiState>,
    /// Whose leaf came, went or changed since.
    touched: BTreeSet<String>,
    /// Every leaf that an agent may still hold, by its fingerprint.
    held: BTreeMap<String, BTreeSet<String>>,
    /// Every Org CA that somebody may have pinned.
    roots: BTreeSet<String>,
    enrolled: usize,
}

impl World {
    fn new(fixture: &str, missing: &BTreeSet<u8>, on: On) -> Self {
        let deploy = Deploy::of(fixture);
        let agents = deploy.rows("SELECT agent_id FROM internal_agents ORDER BY agent_id");
        // A fleet of its own: at least one of it stays.
        for index in missing.iter().filter(|index| usize::from(**index) + 1 < agents.len()) {
            let agent_id = text(&agents[usize::from(*index)], "agent_id");
            deploy.execute(&format!("DELETE FROM internal_agents WHERE agent_id = '{agent_id}'"));
        }
        let deploy = if on == On::Postgres { deploy.on(on) } else { deploy };
        let world = Self {
            deploy,
            before: None,
            touched: BTreeSet::new(),
            held: BTreeMap::new(),
            roots: BTreeSet::new(),
            enrolled: 0,
        };
        world.rows();
        world
    }

    /// One command to its end: its exit code, or nothing where it was killed.
    fn command(&self, arguments: &[&str], crash_at: Option<&str>) -> Option<i32> {
        let mut command = self.deploy.mastio(arguments);
        if let Some(point) = crash_at {
            command.env("MASTIO_CRASH_AT", point);
        }
        run(&mut command).status.code()
    }

    /// What waits, after a process has found and finished whatever a dead one left.
    fn rows(&self) -> Vec<Value> {
        let listed = run(&mut self.deploy.mastio(&["updates", "list", "--json"]));
        serde_json::from_slice(&listed.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&listed.stderr)))
    }

    fn halted(&self) -> bool {
        self.rows().iter().any(|row| row["halts"] == true)
    }

    /// Does `step` and holds everything to what it may have done.
    fn walk(&mut self, step: &Step) {
        let old = PkiState::read(&self.deploy);
        let halted = self.halted();
        let (applied, snapshots) = (self.events("admin.update_applied"), self.snapshots());
        let new = match step {
            Step::Apply(crash) => {
                let point = crash.map(|index| APPLY_POINTS[index.index(APPLY_POINTS.len())]);
                let code = self.command(&["updates", "apply", MIGRATION, "--yes"], point.map(|(at, _)| at));
                self.rows();
                let new = PkiState::read(&self.deploy);
                self.judge_apply(&old, &new, code, point);
                assert_eq!(
                    self.events("admin.update_applied") - applied,
                    i64::from(new.org_ca != old.org_ca)
                );
                new
            }
            Step::Rollback(crash) => {
                let point = crash.map(|index| ROLLBACK_POINTS[index.index(ROLLBACK_POINTS.len())]);
                let code =
                    self.command(&["updates", "rollback", MIGRATION, "--yes"], point.map(|(at, _)| at));
                self.rows();
                let new = PkiState::read(&self.deploy);
                assert!(snapshots > 0 || code != Some(0), "rolled back without a snapshot");
                self.judge_rollback(&old, &new, code, point);
                new
            }
            other => {
                let signs = matches!(other, Step::Enroll | Step::Renew(_));
                let code = self.live(other, &old);
                let new = PkiState::read(&self.deploy);
                if signs && halted {
                    // I1: nothing is signed under a halt.
                    assert!(code.is_none_or(|code| code == 4), "signed under a halt: {code:?}");
                    assert_eq!(new.leaves, old.leaves);
                }
                self.touched.extend(changed(&old, &new));
                assert_eq!((&new.org_ca, &new.mastio_ca), (&old.org_ca, &old.mastio_ca));
                new
            }
        };
        self.hold(&old, &new);
    }

    /// What agents and operators do between runs. Nothing where there is nobody to do it to.
    fn live(&mut self, step: &Step, old: &PkiState) -> Option<i32> {
        let ids: Vec<&String> = old.agents.keys().collect();
        let pick = |index: &Index| ids.get(index.index(ids.len().max(1))).map(|id| (*id).clone());
        match step {
            Step::Enroll => {
                self.enrolled += 1;
                self.command(&["agents", "add", &format!("late-{}", self.enrolled)], None)
            }
            Step::Renew(of) => {
                let agent_id = pick(of)?;
                let code = self.command(&["agents", "renew", &agent_id], None);
                // A renewal begins anew what its agent holds; the former one stays for 48 hours.
                self.held.remove(&agent_id);
                code
            }
            Step::Revoke(of) => {
                let agent_id = pick(of)?;
                self.held.remove(&agent_id);
                self.command(&["pki", "revoke", "--agent", &agent_id], None)
            }
            Step::Deactivate(of) => self.command(&["agents", "deactivate", &pick(of)?], None),
            Step::Reactivate(of) => self.command(&["agents", "reactivate", &pick(of)?], None),
            Step::Delete(of) => {
                let agent_id = pick(of)?;
                self.held.remove(&agent_id);
                self.command(&["agents", "delete", &agent_id, "--yes"], None)
            }
            Step::Sql(sql, of) => {
                let agent_id = pick(of)?;
                self.deploy.execute(&match sql {
                    Sql::Rename => {
                        format!("UPDATE internal_agents SET display_name = 'x' WHERE agent_id = '{agent_id}'")
                    }
                    Sql::RewriteLeaf => format!(
                        "UPDATE internal_agents SET cert_pem = '\n' || cert_pem WHERE agent_id = '{agent_id}'"
                    ),
                    Sql::SetAside => format!(
                        "UPDATE internal_agents SET is_active = 1 - is_active WHERE agent_id = '{agent_id}'"
                    ),
                    Sql::DeleteRow => {
                        format!("DELETE FROM pending_updates WHERE migration_id = '{MIGRATION}'")
                    }
                    Sql::Disable => format!(
                        "UPDATE pending_updates SET status = 'rolled_back' WHERE migration_id = '{MIGRATION}'"
                    ),
                });
                Some(0)
            }
            Step::Apply(_) | Step::Rollback(_) => unreachable!("judged by themselves"),
        }
    }

    /// I2: the state is wholly the one before or wholly the one after, and which one is said by where the process died.
    fn judge_apply(
        &mut self,
        old: &PkiState,
        new: &PkiState,
        code: Option<i32>,
        point: Option<(&str, bool)>,
    ) {
        if !took_place(old, new, code, point) {
            return;
        }
        new.assert_repaired_from(old);
        (self.before, self.touched) = (Some(old.clone()), BTreeSet::new());
        assert_eq!(status(&self.deploy).as_deref(), Some("applied"));
    }

    /// I3: an apply and its rollback are the identity on every byte that nobody else has changed meanwhile.
    fn judge_rollback(
        &mut self,
        old: &PkiState,
        new: &PkiState,
        code: Option<i32>,
        point: Option<(&str, bool)>,
    ) {
        if !took_place(old, new, code, point) {
            return;
        }
        let before = self.before.take().expect("there is an apply to roll back");
        assert_eq!((&new.org_ca, &new.mastio_ca), (&before.org_ca, &before.mastio_ca));
        assert_eq!((&new.token_keys, &new.config), (&before.token_keys, &before.config));
        assert_eq!(new.agents, old.agents, "a column that no migration writes");
        assert!(new.leaves.keys().eq(old.leaves.keys()), "somebody came or went with the rollback");
        for (agent_id, leaf) in &new.leaves {
            match before.leaves.get(agent_id).filter(|_| !self.touched.contains(agent_id)) {
                Some(former) => assert_eq!(leaf, former, "{agent_id} is not as it was before the apply"),
                None => assert_eq!(key(leaf), key(&old.leaves[agent_id]), "{agent_id} has another key"),
            }
        }
        self.touched.clear();
        assert_eq!(status(&self.deploy).as_deref(), Some("rolled_back"));
    }

    /// What holds after every step.
    fn hold(&mut self, old: &PkiState, new: &PkiState) {
        // I8: no run is left half-way, and none has run twice.
        assert_eq!(open_runs(&self.deploy), 0);
        // I2: every leaf of ours stands under the CA in force.
        new.assert_under_one_chain();
        for (agent_id, leaf) in &new.leaves {
            if let Some(former) = old.leaves.get(agent_id) {
                assert_eq!(key(leaf), key(former), "{agent_id} has another key");
            }
        }
        // I6: whoever holds a leaf or has pinned a root goes on.
        let accepted = self.set("SELECT fingerprint AS f FROM superseded_certificates");
        let retiring = self.set("SELECT fingerprint AS f FROM pki_anchors WHERE state = 'retiring'");
        self.roots.insert(certificate(&new.org_ca).fingerprint());
        for root in &self.roots {
            assert!(
                *root == certificate(&new.org_ca).fingerprint() || retiring.contains(root),
                "the root {root} is not trusted any more"
            );
        }
        let ours: BTreeSet<&str> = new.of_mastio().into_iter().collect();
        self.held.retain(|agent_id, _| new.leaves.contains_key(agent_id));
        for agent_id in ours {
            let present = certificate(&new.leaves[agent_id]).fingerprint();
            let held = self.held.entry(agent_id.to_owned()).or_default();
            held.insert(present.clone());
            for leaf in held.iter() {
                assert!(*leaf == present || accepted.contains(leaf), "{agent_id} would have to enroll again");
            }
        }
        // I4: the chain holds every change of state.
        self.deploy.audit_verifies();
        let committed = "SELECT COUNT(*) FROM update_runs WHERE direction = 'apply' AND committed_at IS NOT NULL \
             AND actor <> 'predecessor'";
        assert_eq!(self.deploy.count(committed), self.events("admin.update_applied"));
    }

    fn events(&self, event_type: &str) -> i64 {
        self.deploy.count(&format!("SELECT COUNT(*) FROM audit_events WHERE event_type = '{event_type}'"))
    }

    fn snapshots(&self) -> i64 {
        self.deploy.count("SELECT COUNT(*) FROM migration_state_backups")
    }

    fn set(&self, sql: &str) -> BTreeSet<String> {
        self.deploy.rows(sql).iter().map(|row| text(row, "f")).collect()
    }
}

/// Whether the run changed the state, after its exit code and the crash point have been held against that.
fn took_place(old: &PkiState, new: &PkiState, code: Option<i32>, point: Option<(&str, bool)>) -> bool {
    if new.org_ca == old.org_ca {
        assert_eq!(new, old, "a run that did not take place changed something");
        assert!(code.is_some() || point.is_some_and(|(_, new)| !new), "lost by a crash at {point:?}");
        return false;
    }
    assert!(code == Some(0) || point.is_some_and(|(_, new)| new), "{code:?} after a change at {point:?}");
    true
}

fn key(pem: &str) -> String {
    certificate(pem).spki_sha256()
}

/// Whose leaf is not what it was.
fn changed(old: &PkiState, new: &PkiState) -> BTreeSet<String> {
    let ids: BTreeSet<&String> = old.leaves.keys().chain(new.leaves.keys()).collect();
    ids.into_iter().filter(|id| old.leaves.get(*id) != new.leaves.get(*id)).cloned().collect()
}

/// Walks so many histories.
fn walk(on: On, few: u32, many: u32) {
    let all = std::env::var_os("MASTIO_TEST_ALL").is_some();
    let mut seed = [7; 32];
    if let Ok(other) = std::env::var("MASTIO_TEST_SEED") {
        let other: u64 = other.parse().unwrap_or_else(|_| panic!("MASTIO_TEST_SEED is no number: {other}"));
        seed[..8].copy_from_slice(&other.to_be_bytes());
    }
    let config = Config {
        cases: if all { many } else { few },
        // Each look at a shorter history takes as long as the history.
        max_shrink_iters: 24,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let walked = std::cell::Cell::new((0, 0));
    let result = TestRunner::new_with_rng(config, rng).run(&steps(), |(fixture, missing, steps)| {
        let mut world = World::new(FIXTURES[fixture], &missing, on);
        for step in &steps {
            world.walk(step);
            walked.set((walked.get().0, walked.get().1 + 1));
        }
        walked.set((walked.get().0 + 1, walked.get().1));
        Ok(())
    });
    let (histories, steps) = walked.get();
    println!("{}: {histories} histories, {steps} steps", on.name());
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn the_invariants_hold_after_every_step_of_any_history_on_sqlite() {
    walk(On::Sqlite, 3, 60);
}

#[test]
fn the_invariants_hold_after_every_step_of_any_history_on_postgresql() {
    walk(On::Postgres, 1, 20);
}
