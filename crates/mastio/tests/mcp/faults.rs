//! Servers that die, flap, dawdle and storm, and our own death among 64 calls: nothing is stuck, nothing is mixed up,
//! nothing is missing in the log, and everything recovers by itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Database, wait_for};
use crate::hostile::{Hostile, Mood, tool};
use crate::world::{World, call};

/// Of a call that must not wait for anybody else's.
const SOON: Duration = Duration::from_secs(5);

fn reason_of(world: &World) -> Value {
    world.last("mcp.tool_called")["reason"].clone()
}

fn is_fine(answer: &Value) -> bool {
    answer["result"]["content"][0]["text"].is_string()
}

#[test]
fn a_server_in_trouble_hurts_nobody_else_and_is_back_by_itself() {
    let world = World::new(Database::Sqlite);
    let (troubled, fine) =
        (Hostile::start(vec![tool("echo"), tool("slow")]), Hostile::start(vec![tool("other")]));
    let long = std::env::var_os("MASTIO_TEST_ALL").is_some();
    // A test need not wait for half a minute to see that nobody else does.
    let (patience_ms, slowness_ms) = if long { (20_000, 30_000) } else { (300, 2_000) };
    world.server_with("troubled", &troubled.url, &json!({ "timeout_ms": patience_ms }), &[&world.alice]);
    world.server("fine", &fine.url, &[&world.alice]);
    let alice = &world.alice;
    let others_are_served = || {
        let begun = Instant::now();
        assert!(is_fine(&alice.call("other", &json!({}))));
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    };
    let recovers = || {
        wait_for("the server to be asked again", || is_fine(&alice.call("echo", &json!({}))).then_some(()));
    };
    assert!(is_fine(&alice.call("echo", &json!({}))));

    // Killed in mid-call.
    let cut = std::thread::scope(|scope| {
        let calling = scope.spawn(|| alice.call("slow", &json!({ "ms": 200 })));
        wait_for("the call", || (!troubled.calls("slow").is_empty()).then_some(()));
        troubled.set(Mood::Dead);
        others_are_served();
        calling.join().unwrap()
    });
    assert_eq!(cut["error"]["code"], -32001, "{cut}");
    assert_eq!(
        world.events("mcp.tool_called").iter().find(|event| event["tool"] == "slow").unwrap()["reason"],
        "upstream_unreachable"
    );
    troubled.set(Mood::Fine);
    recovers();

    // Slow: 16 calls wait for it, and nobody for them. What they asked for is done once.
    let before = troubled.calls("slow").len();
    std::thread::scope(|scope| {
        let slow: Vec<_> = (0..16)
            .map(|_| {
                let headers = [("Mcp-Protocol-Version", "2025-11-25")];
                let body = call("slow", &json!({ "ms": slowness_ms }));
                scope.spawn(move || alice.send("POST", &headers, &body).json())
            })
            .collect();
        wait_for("the calls", || (troubled.calls("slow").len() >= before + 16).then_some(()));
        others_are_served();
        for call in slow {
            let answer = call.join().unwrap();
            assert_eq!(answer["error"]["code"], -32001, "{answer}");
        }
    });
    assert_eq!(reason_of(&world), "upstream_timeout");
    assert_eq!(troubled.calls("slow").len(), before + 16);
    recovers();

    // A storm: it is left alone after five failures, so that it is not held down, and asked again by itself.
    troubled.set(Mood::Storm);
    let asked = troubled.calls("echo").len();
    for _ in 0..5 {
        assert_eq!(alice.call("echo", &json!({}))["error"]["code"], -32003);
        assert_eq!(reason_of(&world), "upstream_status");
    }
    for _ in 0..5 {
        assert_eq!(alice.call("echo", &json!({}))["error"]["code"], -32001);
        assert_eq!(reason_of(&world), "upstream_resting");
    }
    assert_eq!(troubled.calls("echo").len(), asked + 5);
    others_are_served();
    troubled.set(Mood::Fine);
    recovers();

    // Flapping: who is answered is answered rightly, and whoever is not is told so.
    troubled.set(Mood::Flapping);
    let answers: Vec<Value> = (0..20).map(|number| alice.call("echo", &json!({ "n": number }))).collect();
    for (number, answer) in answers.iter().enumerate() {
        let text = answer["result"]["content"][0]["text"].as_str();
        let expected = json!({ "n": number }).to_string();
        assert!(text == Some(expected.as_str()) || answer["error"]["code"] == -32003, "{answer}");
    }
    assert!(answers.iter().any(is_fine) && !answers.iter().all(is_fine));
    troubled.set(Mood::Fine);
    recovers();

    // Each decision has its outcome: nothing was forgotten on the way.
    let events = world.events("mcp.tool_called");
    let (decided, ended) = decisions_and_outcomes(&events);
    assert_eq!(decided, ended);
    let verdict = world.deploy.admin_get("/v1/admin/audit/verify").expect(200);
    assert_eq!(verdict["sound"], true, "{verdict}");
}

/// The request ids that were allowed to wait for a server, and those whose outcome is recorded.
fn decisions_and_outcomes(events: &[Value]) -> (Vec<String>, Vec<String>) {
    let ids = |wanted: &dyn Fn(&Value) -> bool| {
        let mut ids: Vec<String> = events
            .iter()
            .filter(|event| wanted(event))
            .map(|event| event["request_id"].as_str().unwrap().to_owned())
            .collect();
        ids.sort_unstable();
        ids
    };
    let decided = ids(&|event| event["decision"] == "allowed" && event.get("outcome").is_none());
    let ended = ids(&|event| event.get("latency_ms").is_some());
    (decided, ended)
}

fn our_death_among_64_calls(database: Database) {
    let mut world = World::new(database);
    let server = Hostile::start(vec![tool("slow")]);
    world.server("slow", &server.url, &[&world.alice, &world.bob]);
    let session = world.alice.session();
    let answered = AtomicUsize::new(0);
    let deploy = &mut world.deploy;
    let (alice, bob) = (&world.alice, &world.bob);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..64_usize)
            .map(|number| {
                let (server, answered) = (&server, &answered);
                scope.spawn(move || {
                    let caller = if number % 2 == 0 { alice } else { bob };
                    for round in 0.. {
                        let asked =
                            json!({ "ms": 60, "caller": caller.id, "call": format!("{number}.{round}") });
                        // Nothing is answered by a process that is dead; nothing hangs either.
                        let answer = caller.send("POST", &[], &call("slow", &asked));
                        if answer.status == 0 {
                            return;
                        }
                        // Everybody gets the answer to what they asked.
                        let text = answer.json()["result"]["content"][0]["text"].clone();
                        if text.is_null() {
                            assert_eq!(answer.json()["error"]["code"], -32001, "{answer:?}");
                            continue;
                        }
                        assert_eq!(text, asked.to_string(), "{answer:?}");
                        answered.fetch_add(1, Ordering::SeqCst);
                        assert!(server.calls("slow").len() < 100_000);
                    }
                })
            })
            .collect();
        wait_for("calls to be answered, and others to be under way", || {
            let answered = answered.load(Ordering::SeqCst);
            (answered >= 64 && server.calls("slow").len() >= answered + 8).then_some(())
        });
        deploy.kill9();
        for caller in callers {
            caller.join().unwrap();
        }
    });
    deploy.start();
    let verdict = world.deploy.admin_get("/v1/admin/audit/verify").expect(200);
    assert_eq!(verdict["sound"], true, "{verdict}");
    let events = world.events("mcp.tool_called");
    let (decided, ended) = decisions_and_outcomes(&events);
    // What was answered is recorded; what has an outcome was decided; at most one call of each caller was cut off.
    assert!(ended.len() >= answered.load(Ordering::SeqCst));
    assert!(ended.iter().all(|id| decided.binary_search(id).is_ok()));
    let cut_off = decided.len() - ended.len();
    assert!((1..=64).contains(&cut_off), "{cut_off} of {} were cut off", decided.len());
    // No call reached the server without a decision.
    assert!(server.calls("slow").len() <= decided.len());
    // And everything goes on, sessions included.
    let answer = world.alice.send(
        "POST",
        &[crate::world::STREAMS, ("Mcp-Session-Id", session.as_str())],
        &call("slow", &json!({ "ms": 1 })),
    );
    assert!(is_fine(&answer.json()), "{answer:?}");
    assert!(is_fine(&world.bob.call("slow", &json!({ "ms": 1 }))));
}

#[test]
fn our_death_among_64_calls_leaves_no_gap_no_mixture_and_nothing_stuck_on_sqlite() {
    our_death_among_64_calls(Database::Sqlite);
}

#[test]
fn our_death_among_64_calls_leaves_no_gap_no_mixture_and_nothing_stuck_on_postgresql() {
    our_death_among_64_calls(Database::Postgres);
}
