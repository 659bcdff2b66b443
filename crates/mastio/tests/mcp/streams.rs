//! What changes is told as it changes: on the GET stream of a session, and on `subscriptions/listen`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::sdk::Program;
use crate::harness::{Database, wait_for};
use crate::hostile::{Hostile, tool};
use crate::world::{Caller, STREAMS, World, modern, python};

fn listen(caller: &Caller, filter: &Value) -> crate::world::Events {
    let (body, headers) = modern("subscriptions/listen", None, &json!({ "notifications": filter }));
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    caller.open("POST", &headers, &body)
}

fn streams_open(world: &World) -> f64 {
    world.deploy.metric("cullis_mcp_streams").unwrap()
}

#[test]
fn what_changes_is_told_to_whom_it_concerns_and_to_nobody_else() {
    let world = World::new(Database::Sqlite);
    let hostile = Hostile::start(vec![tool("echo")]);
    let mut program = Program::start(&python(), "mcp/upstream.py", &["--until", "2025-11-25"]);
    let url = program.read()["url"].as_str().unwrap().to_owned();
    world.server("old", &url, &[&world.alice]);

    let session = world.alice.session();
    let with_session = [("Accept", "text/event-stream"), ("Mcp-Session-Id", session.as_str())];
    let mut old = world.alice.open("GET", &with_session, "");
    assert_eq!(old.status, 200);
    let filter = json!({ "toolsListChanged": true, "resourceSubscriptions": ["test://watched-resource", "test://none"] });
    let mut new = listen(&world.alice, &filter);
    let acknowledged = new.wait("notifications/subscriptions/acknowledged");
    let honored = json!({ "toolsListChanged": true, "resourceSubscriptions": ["test://watched-resource"] });
    assert_eq!(acknowledged["params"]["notifications"], honored);
    assert_eq!(acknowledged["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], 5);
    let mut bobs = listen(&world.bob, &json!({ "toolsListChanged": true }));
    bobs.wait("notifications/subscriptions/acknowledged");
    assert_eq!(streams_open(&world), 3.0);

    // A second stream of the session would hear each message again, somebody else's session is nobody's.
    assert_eq!(world.alice.send("GET", &with_session, "").status, 409);
    assert_eq!(world.bob.send("GET", &with_session, "").status, 404);
    assert_eq!(world.alice.send("GET", &[("Accept", "text/event-stream")], "").status, 405);
    assert_eq!(world.alice.send("GET", &[("Mcp-Session-Id", session.as_str())], "").status, 406);

    // A new server's tools are Alice's when they are approved and she is bound.
    let id = world.server("hostile", &hostile.url, &[]);
    world.deploy.let_call(&world.alice.id, &id);
    new.wait("notifications/tools/list_changed");
    old.wait("notifications/tools/list_changed");
    assert!(world.alice.tools().contains(&"echo".to_owned()));
    // A tool that says something else is taken away, by the next look.
    hostile.set_tools(vec![
        json!({ "name": "echo", "description": "other", "inputSchema": { "type": "object" } }),
    ]);
    world.refresh("hostile");
    new.wait("notifications/tools/list_changed");
    // Bob has none of this.
    assert!(bobs.is_quiet(Duration::from_millis(600)));

    // A server of 2025-11-25 says that a resource has changed: on a stream of ours that is this caller's alone.
    let touch = |uri: &str| world.alice.call("touch", &json!({ "uri": uri }));
    let updated = std::thread::scope(|scope| {
        let heard = scope.spawn(|| new.wait("notifications/resources/updated"));
        wait_for("the resource's change", || {
            touch("test://watched-resource");
            heard.is_finished().then_some(())
        });
        heard.join().unwrap()
    });
    assert_eq!(updated["params"]["uri"], "test://watched-resource");
    assert_eq!(updated["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], 5);

    // A server that has learnt a tool is looked at when it says so.
    std::thread::scope(|scope| {
        let looked = scope.spawn(|| {
            wait_for("the look", || {
                let tools = world.deploy.admin_get("/v1/admin/mcp-tools?standing=proposed").expect(200);
                tools.as_array().unwrap().iter().any(|tool| tool["name"] == "learnt").then_some(())
            });
        });
        let with_session = [STREAMS, ("Mcp-Session-Id", session.as_str())];
        let learn = crate::world::call("learn", &json!({ "name": "learnt" }));
        assert_eq!(world.alice.send("POST", &with_session, &learn).status, 200);
        looked.join().unwrap();
    });

    // Who is not let in any more hears nothing any more.
    drop(old);
    assert_eq!(world.admin("DELETE", &format!("/v1/admin/agents/{}", world.bob.id), &json!({})).status, 204);
    let last = bobs.next().unwrap();
    assert_eq!((&last["id"], &last["result"]["resultType"]), (&json!(5), &json!("complete")));
    assert_eq!(bobs.next(), None);
    wait_for("one stream", || (streams_open(&world) == 1.0).then_some(()));
    // And when we stop, we say that it is over.
    let mut deploy = world.deploy;
    deploy.stop();
    let last = std::iter::from_fn(|| new.next()).last().unwrap();
    assert_eq!((&last["id"], &last["result"]["resultType"]), (&json!(5), &json!("complete")));
}

/// What a stream says: the texts of its log messages, and of the result.
fn told(events: &mut crate::world::Events) -> Vec<String> {
    std::iter::from_fn(|| events.next())
        .map(|said| {
            let text =
                said["params"]["data"].as_str().or_else(|| said["result"]["content"][0]["text"].as_str());
            text.unwrap_or_else(|| panic!("{said}")).to_owned()
        })
        .collect()
}

#[test]
fn whoever_loses_the_connection_in_mid_call_reads_on_where_it_stopped() {
    let world = World::new(Database::Sqlite);
    let hostile = Hostile::start(vec![tool("waits")]);
    world.server("slow", &hostile.url, &[&world.alice, &world.bob]);
    let body = crate::world::call("waits", &json!({}));
    let session = world.alice.session();
    let with = |session: &str, last: &str| {
        [("Accept", "text/event-stream"), ("Mcp-Session-Id", session), ("Last-Event-ID", last)]
            .map(|(name, value)| (name, value.to_owned()))
    };
    let resume = |caller: &Caller, session: &str, last: &str| {
        let headers = with(session, last);
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        caller.open("GET", &headers, "")
    };

    let mut stream = world.alice.open("POST", &[STREAMS, ("Mcp-Session-Id", &session)], &body);
    assert_eq!(stream.next().unwrap()["params"]["data"], "before");
    // The first event has no data: there is something to resume from before anything was said.
    let [primed, before] = &stream.ids[..] else { panic!("{:?}", stream.ids) };
    let (primed, before) = (primed.clone(), before.clone());
    // Cut while the call is under way; what was asked for goes on, and is done once.
    drop(stream);
    let mut again = resume(&world.alice, &session, &before);
    assert_eq!(again.status, 200);
    hostile.release();
    assert_eq!(told(&mut again), ["after", "done"]);
    // Until it is forgotten it is told as often as it is asked for, from wherever it was heard to.
    assert_eq!(told(&mut resume(&world.alice, &session, &primed)), ["before", "after", "done"]);
    assert_eq!(told(&mut resume(&world.alice, &session, again.ids.last().unwrap())), Vec::<String>::new());
    assert_eq!(hostile.calls("waits").len(), 1);

    // Nobody else's, no other session's, and nothing that was never said.
    assert_eq!(resume(&world.bob, &session, &before).status, 404);
    assert_eq!(resume(&world.bob, &world.bob.session(), &before).status, 400);
    assert_eq!(resume(&world.alice, &world.alice.session(), &before).status, 400);
    assert_eq!(resume(&world.alice, &session, "nothing.7").status, 400);
    let unknown: Vec<(&str, String)> = with(&session, "nothing.7").to_vec();
    let headers: Vec<(&str, &str)> = unknown.iter().map(|(name, value)| (*name, value.as_str())).collect();
    assert!(world.alice.send("GET", &headers, "").body.contains("no stream of this session"));

    // Revisions that have it, and those that have not.
    for (revision, primes, resumable) in [
        ("2024-11-05", false, false),
        ("2025-03-26", false, true),
        ("2025-06-18", false, true),
        ("2025-11-25", true, true),
    ] {
        let session = world.alice.session_of(revision);
        let mut stream = world.alice.open("POST", &[STREAMS, ("Mcp-Session-Id", &session)], &body);
        assert_eq!(told(&mut stream), ["before", "after", "done"], "{revision}");
        let expected = if resumable { 3 + usize::from(primes) } else { 0 };
        assert_eq!(stream.ids.len(), expected, "{revision}: {:?}", stream.ids);
    }
    let (body, headers) = modern("tools/call", Some("waits"), &json!({ "name": "waits", "arguments": {} }));
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let answer = world.alice.send("POST", &headers, &body);
    assert_eq!(answer.json()["result"]["content"][0]["text"], "done", "{answer:?}");

    // A session that has ended takes its streams along.
    assert_eq!(world.alice.send("DELETE", &[("Mcp-Session-Id", &session)], "").status, 204);
    assert_eq!(resume(&world.alice, &session, &before).status, 404);
    assert_eq!(world.deploy.admin_get("/v1/admin/audit/verify").expect(200)["sound"], true);
}
