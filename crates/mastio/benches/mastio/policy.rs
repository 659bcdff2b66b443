//! Decisions about calls by a thousand policies, in this process: what a call pays for them.

use std::time::Instant;

use mastio::gateway::{Mode, Rule, Rules, Subject};
use serde::Serialize;
use serde_json::json;

use crate::Failure;

/// Policies in force.
const POLICIES: usize = 1000;
/// Decisions of which the mean is taken.
const DECISIONS: u32 = 20_000;

/// What one set of policies costs.
#[derive(Serialize)]
pub struct Policies {
    /// What the policies are about.
    pub about: &'static str,
    /// Policies in force.
    pub policies: usize,
    /// Those of them that speak of the call that is measured.
    pub speak_of_the_call: usize,
    /// Reading and compiling all of them, once for each change.
    pub compile_ms: f64,
    /// The first decision about an agent and a tool.
    pub first_us: f64,
    /// Each further one.
    pub decision_us: f64,
}

/// Measures policies that each speak of one tool, and the worst case: each speaks of every call.
pub async fn measure() -> Result<Vec<Policies>, Failure> {
    let of_one_tool = |n: usize| {
        let tool = n / 4;
        let text = match n % 4 {
            0 => format!(
                r#"forbid(principal, action, resource == Tool::"tool_{tool}") when {{ context.arguments.amount > {n} }};"#
            ),
            1 => format!(
                r#"permit(principal, action, resource == Tool::"tool_{tool}") when {{ context.arguments has to }};"#
            ),
            2 => format!(
                r#"forbid(principal == Agent::"acme::agent_{n}", action, resource == Tool::"tool_{tool}");"#
            ),
            _ => format!(r#"forbid(principal, action, resource in Upstream::"upstream_{n}");"#),
        };
        (text, (n % 4 < 2).then(|| format!("tool_{tool}")))
    };
    let of_every_call = |n: usize| {
        (
            format!(
                r#"forbid(principal, action, resource) when {{ principal.capabilities.contains("c{n}") }};"#
            ),
            None,
        )
    };
    Ok(vec![
        one("four for each of 250 tools", 2, &of_one_tool).await?,
        one("every one for every call", POLICIES, &of_every_call).await?,
    ])
}

async fn one(
    about: &'static str,
    speak_of_the_call: usize,
    text: &dyn Fn(usize) -> (String, Option<String>),
) -> Result<Policies, Failure> {
    let rules: Vec<Rule> = (0..POLICIES)
        .map(|n| {
            let (text, tool) = text(n);
            let (saved_at, saved_by) = (String::new(), String::new());
            Rule {
                change: 1,
                name: format!("p{n}"),
                version: 1,
                tool,
                mode: Mode::Enforce,
                text,
                saved_at,
                saved_by,
            }
        })
        .collect();
    let started = Instant::now();
    let rules = Rules::of(1, &rules);
    let compile_ms = started.elapsed().as_secs_f64() * 1e3;
    let input_schema = json!({ "type": "object" });
    let arguments = json!({ "amount": 5, "to": "it", "note": "an argument that no policy looks at" });
    let capabilities = ["pay".to_owned(), "read".to_owned()];
    let subject = Subject {
        agent_id: "acme::agent_1",
        principal_type: "agent",
        capabilities: &capabilities,
        tool: "tool_7",
        upstream: "bank",
        input_schema: &input_schema,
        arguments: Some(&arguments),
    };
    let started = Instant::now();
    let verdict = rules.judge(&subject).await?;
    let first_us = started.elapsed().as_secs_f64() * 1e6;
    if !verdict.allowed {
        return Err(format!("the call that is measured was to be allowed: {verdict:?}").into());
    }
    let started = Instant::now();
    for _ in 0..DECISIONS {
        std::hint::black_box(rules.judge(&subject).await?);
    }
    let decision_us = started.elapsed().as_secs_f64() * 1e6 / f64::from(DECISIONS);
    Ok(Policies { about, policies: POLICIES, speak_of_the_call, compile_ms, first_us, decision_us })
}
