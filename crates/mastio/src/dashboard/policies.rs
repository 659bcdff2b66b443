//! `/proxy/policies` and `/proxy/access`: the rules for calls of tools with their versions, who may call what, and what
//! would become of a call.
//!
//! The answers are the gateway's own, as the API and the command line give them: nothing here decides about a call.

use askama::Template;
use serde::Deserialize;
use serde_json::Value;

use super::error::DashboardError;
use super::{Dashboard, Frame, shell_word, urlencoded};
use crate::gateway::{Access, Mode, NewRule, Rule};
use crate::http::authn::Session;

/// Rows of who may call what on a page. Each asks the database a handful of questions.
const ACCESS_ROWS: usize = 25;
/// Policies on a page.
const PAGE_ROWS: i64 = 100;
/// What a draft is called that has no name yet.
const UNNAMED: &str = "draft";

/// A policy as a form has it.
#[derive(Default)]
pub(super) struct Draft {
    pub name: String,
    pub tool: String,
    pub mode: &'static str,
    pub text: String,
    /// The version that it takes the place of; 0 for none.
    pub version: i64,
}

/// The modes that a policy may be saved in, and what each means.
pub(super) const MODES: [(&str, &str); 3] = [
    ("shadow", "shadow: it denies nothing, and what it would have denied is told"),
    ("enforce", "enforce: it decides"),
    ("off", "off: it does nothing"),
];

/// The mode of this name, if a policy may be saved in it.
pub(super) fn mode(name: &str) -> Option<Mode> {
    MODES.into_iter().find(|(known, _)| *known == name).map(|(known, _)| Mode::parse(known))
}

impl Draft {
    /// The mode of this name; shadow where it is none, which denies nothing.
    pub(super) fn mode(name: &str) -> &'static str {
        mode(name).map_or("shadow", Mode::as_str)
    }

    pub(super) fn rule(&self) -> NewRule {
        NewRule {
            text: self.text.clone(),
            tool: (!self.tool.is_empty()).then(|| self.tool.clone()),
            mode: Mode::parse(self.mode),
        }
    }

    /// What the form for the next version begins with.
    fn after(rule: &Rule) -> Self {
        // A removed one is no more: what is saved under its name takes the place of nothing.
        let version = if rule.mode == Mode::Deleted { 0 } else { rule.version };
        Self {
            name: rule.name.clone(),
            tool: rule.tool.clone().unwrap_or_default(),
            mode: Self::mode(rule.mode.as_str()),
            text: rule.text.clone(),
            version,
        }
    }
}

/// A call that is only asked about.
#[derive(Default)]
pub(super) struct Question {
    pub agent_id: String,
    pub called: String,
    pub arguments: String,
}

impl Question {
    /// Errors: [`DashboardError::Arguments`]. Nothing: whether there are any that would do.
    fn arguments(&self) -> Result<Option<Value>, DashboardError> {
        if self.arguments.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&self.arguments).map_err(|_| DashboardError::Arguments)?))
    }
}

/// What a form has asked or saved, and what came of it.
#[derive(Default)]
pub(super) struct Said {
    pub question: Question,
    /// Nothing where nothing was asked about a draft.
    pub draft: Option<Draft>,
    pub answer: Option<Access>,
    pub problem: Option<String>,
}

/// The page of the policy that `name@version` speaks of; none for a binding and for a draft.
pub(super) fn page_of(id: &str) -> Option<String> {
    let (name, version) = id.rsplit_once('@')?;
    (version != "draft").then(|| path(name))
}

pub(super) fn path(name: &str) -> String {
    format!("/proxy/policies/{}", urlencoded(name))
}

pub(super) fn class(mode: &Mode) -> &'static str {
    match mode {
        Mode::Enforce => "good",
        Mode::Shadow => "waiting",
        Mode::Off | Mode::Deleted => "over",
    }
}

/// `/proxy/policies`.
#[derive(Template)]
#[template(path = "policies.html")]
pub(super) struct PoliciesPage {
    frame: Frame,
    policies: Vec<Rule>,
    next: Option<String>,
    draft: Draft,
    question: Question,
    answer: Option<Access>,
    problem: Option<String>,
}

/// `/proxy/policies/{name}`.
#[derive(Template)]
#[template(path = "policy.html")]
pub(super) struct PolicyPage {
    frame: Frame,
    rule: Rule,
    /// Newest first.
    versions: Vec<Rule>,
    draft: Draft,
    question: Question,
    answer: Option<Access>,
    problem: Option<String>,
    path: String,
    command: String,
}

/// What the page of who may call what is asked for; `after_…` is where the page before has ended.
#[derive(Debug, Default, Deserialize)]
pub(super) struct AccessQuery {
    #[serde(default)]
    agent_id: String,
    #[serde(default)]
    tool: String,
    #[serde(default)]
    after_agent: String,
    #[serde(default)]
    after_tool: String,
}

/// `/proxy/access`.
#[derive(Template)]
#[template(path = "access.html")]
pub(super) struct AccessPage {
    frame: Frame,
    agent_id: String,
    tool: String,
    rows: Vec<Access>,
    next: Option<(String, String)>,
    command: String,
}

impl Dashboard {
    /// `after`: the name that the page before has ended with.
    pub(super) async fn policies_page(
        &self,
        session: &Session,
        after: &str,
        said: Said,
    ) -> Result<PoliciesPage, DashboardError> {
        let mut policies = self.gateway.rules_after(after, PAGE_ROWS + 1).await?;
        let rows = usize::try_from(PAGE_ROWS).unwrap_or(usize::MAX);
        let more = policies.len() > rows;
        policies.truncate(rows);
        Ok(PoliciesPage {
            frame: self.frame(Some(session), "tools", "Policies").await?,
            next: if more { policies.last().map(|rule| rule.name.clone()) } else { None },
            policies,
            draft: said.draft.unwrap_or(Draft { mode: "shadow", ..Draft::default() }),
            question: said.question,
            answer: said.answer,
            problem: said.problem,
        })
    }

    pub(super) async fn policy_page(
        &self,
        session: &Session,
        name: &str,
        said: Said,
    ) -> Result<PolicyPage, DashboardError> {
        let versions = self.gateway.rule_versions(name).await?;
        let rule = versions.first().cloned();
        let rule = rule.ok_or_else(|| DashboardError::NotFound(format!("policy {name}")))?;
        Ok(PolicyPage {
            frame: self.frame(Some(session), "tools", rule.name.clone()).await?,
            draft: said.draft.unwrap_or_else(|| Draft::after(&rule)),
            question: said.question,
            answer: said.answer,
            problem: said.problem,
            path: path(&rule.name),
            command: format!("mastio policy show {}", shell_word(&rule.name)),
            versions,
            rule,
        })
    }

    /// What would become of the call that a form asks about; of its draft, where it has one.
    ///
    /// Errors: what is wrong with the draft or the arguments, with words for a person.
    pub(super) async fn asked_of_policies(
        &self,
        question: &Question,
        draft: Option<&Draft>,
    ) -> Result<Access, DashboardError> {
        let arguments = question.arguments()?;
        let draft = draft.map(|draft| {
            let name = if draft.name.is_empty() { UNNAMED } else { draft.name.as_str() };
            (name, draft.rule())
        });
        if let Some((name, rule)) = &draft {
            self.gateway.check_rule(name, rule).await?;
        }
        let draft = draft.as_ref().map(|(name, rule)| (*name, rule));
        let (agent_id, called) = (&question.agent_id, &question.called);
        self.gateway.explain(agent_id, called, arguments.as_ref(), draft).await.map_err(DashboardError::Told)
    }

    pub(super) async fn access_page(
        &self,
        session: &Session,
        query: &AccessQuery,
    ) -> Result<AccessPage, DashboardError> {
        let given = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        let (agent_id, tool) = (given(&query.agent_id), given(&query.tool));
        let after = given(&query.after_agent).map(|agent| (agent, query.after_tool.clone()));
        let after = after.as_ref().map(|(agent, tool)| (agent.as_str(), tool.as_str()));
        let asked = self.gateway.access_page(agent_id.as_deref(), tool.as_deref(), after, ACCESS_ROWS).await;
        let (rows, next) = asked.map_err(DashboardError::Told)?;
        let mut command = "mastio tools access".to_owned();
        for (option, value) in [("--agent", &agent_id), ("--tool", &tool)] {
            if let Some(value) = value {
                command = format!("{command} {option} {}", shell_word(value));
            }
        }
        Ok(AccessPage {
            frame: self.frame(Some(session), "tools", "Who may call what").await?,
            agent_id: agent_id.unwrap_or_default(),
            tool: tool.unwrap_or_default(),
            rows,
            next,
            command,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decided_leads_to_its_policy_where_it_is_one() {
        assert_eq!(page_of("no_x@3").as_deref(), Some("/proxy/policies/no_x"));
        assert_eq!((page_of("binding"), page_of("no_x@draft")), (None, None));
    }

    #[test]
    fn a_mode_that_is_none_denies_nothing() {
        assert_eq!(
            (Draft::mode("enforce"), Draft::mode("deleted"), Draft::mode("")),
            ("enforce", "shadow", "shadow")
        );
    }
}
