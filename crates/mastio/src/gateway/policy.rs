//! Rules in Cedar on top of bindings: a call that is granted goes through them before it is made.
//!
//! A rule is saved with a name and, where it speaks of arguments, for one tool; then it is validated against that
//! tool's schema. Every version is kept. A rule in shadow decides nothing: it is told what it would have denied.
//!
//! What is bound is allowed, unless a `forbid` matches. As soon as a `permit` speaks of a call's agent and tool, one
//! must match. A rule that cannot be read or evaluated denies: Cedar would skip it, and a skipped `forbid` would be a
//! hole. For the same reason every argument reaches the rules: what Cedar has no type for is there as a text, and
//! comparing it fails.
//!
//! Without arguments the question is whether there can be any that would do. Then a `forbid` that looks at them is left
//! out, and a `permit` that looks at them counts as one that matches.

use std::collections::{HashMap, HashSet};
use std::str::FromStr as _;
use std::sync::Arc;

use cedar_policy::{
    AuthorizationError, Authorizer, Context, Decision, Effect, Entities, Entity, EntityId, EntityTypeName,
    EntityUid, Policy, PolicyId, PolicySet, PrincipalConstraint, Request, ResourceConstraint, Response,
    RestrictedExpression, Schema, ValidationMode, ValidationWarning, Validator,
};
use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use moka::future::Cache;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};

use super::error::FieldProblem;
use super::{Gateway, GatewayError, event, is_tool_name, store};
use crate::store::WriteTx;

/// Bytes of a rule at most.
const TEXT_BYTES_MAX: usize = 16 * 1024;
/// Rules that may be in force, in shadow or off.
pub(super) const POLICIES_MAX: usize = 2000;
/// Versions of one rule that are shown.
const VERSIONS_SHOWN_MAX: i64 = 100;
/// Sets of rules for one agent and one tool that are kept.
const SETS_MAX: u64 = 20_000;
/// Objects within objects that rules may look into.
const DEPTH_MAX: usize = 4;
/// The name under which the log speaks of a call that no rule but its binding allows.
const BINDING: &str = "binding";

/// Whether a rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It decides.
    Enforce,
    /// It is evaluated, and what it would have denied is logged.
    Shadow,
    /// It is kept and does nothing.
    Off,
    /// It is no more; its versions are.
    Deleted,
}

impl Mode {
    /// The mode as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Shadow => "shadow",
            Self::Off => "off",
            Self::Deleted => "deleted",
        }
    }

    /// Reads a stored mode. What is unknown decides: it must not fall out by a slip of somebody's SQL.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "shadow" => Self::Shadow,
            "off" => Self::Off,
            "deleted" => Self::Deleted,
            _ => Self::Enforce,
        }
    }
}

/// A version of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Position among all changes of rules.
    pub change: i64,
    /// Its name.
    pub name: String,
    /// Counted from 1.
    pub version: i64,
    /// The tool whose arguments it may speak of.
    pub tool: Option<String>,
    /// Whether it decides.
    pub mode: Mode,
    /// One Cedar policy.
    pub text: String,
    /// RFC 3339.
    pub saved_at: String,
    /// Who saved it.
    pub saved_by: String,
}

impl Rule {
    /// `name@version`, by which answers and events speak of it; `name@draft` of one that is not saved.
    #[must_use]
    pub fn id(&self) -> String {
        let Self { name, version, .. } = self;
        if *version == 0 { format!("{name}@draft") } else { format!("{name}@{version}") }
    }
}

/// A rule as an operator writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewRule {
    /// One Cedar policy.
    pub text: String,
    /// The tool whose arguments it may speak of.
    pub tool: Option<String>,
    /// Whether it decides.
    #[serde(default = "enforce")]
    pub mode: Mode,
}

fn enforce() -> Mode {
    Mode::Enforce
}

/// What the rules say of a call. Rules are named `name@version`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it may be made.
    pub allowed: bool,
    /// The rules that decided; `binding` where none had to.
    pub policies: Vec<String>,
    /// Those of them that deny because they cannot be read or evaluated.
    pub failed: Vec<String>,
    /// Rules in shadow that would have denied it.
    pub shadow_denied_by: Vec<String>,
    /// Rules whose word depends on arguments that were not given.
    pub depends_on_arguments: Vec<String>,
}

impl Verdict {
    fn by_binding() -> Self {
        Self { allowed: true, policies: vec![BINDING.to_owned()], ..Self::default() }
    }

    /// Errors: [`GatewayError::PolicyFailed`], [`GatewayError::PolicyDenied`].
    pub(super) fn into_result(self) -> Result<(), GatewayError> {
        match self {
            Self { allowed: true, .. } => Ok(()),
            Self { failed, .. } if !failed.is_empty() => Err(GatewayError::PolicyFailed(failed)),
            Self { policies, .. } => Err(GatewayError::PolicyDenied(policies)),
        }
    }
}

/// A call, as rules see it.
pub struct Subject<'a> {
    /// `org::name`.
    pub agent_id: &'a str,
    /// `agent`, `user` or `workload`.
    pub principal_type: &'a str,
    /// What the agent has.
    pub capabilities: &'a [String],
    /// The tool's name.
    pub tool: &'a str,
    /// Its server's name; empty for a resource.
    pub upstream: &'a str,
    /// The schema of its arguments.
    pub input_schema: &'a Value,
    /// The arguments; absent for whether there can be any that would do.
    pub arguments: Option<&'a Value>,
}

/// A rule, read once. Without a policy it cannot be read.
struct Compiled {
    id: String,
    tool: Option<String>,
    shadow: bool,
    policy: Option<Policy>,
    looks_at_arguments: bool,
}

impl Compiled {
    fn of(rule: &Rule) -> Self {
        let id = rule.id();
        let policy = Policy::parse(Some(PolicyId::new(&id)), &rule.text).ok();
        let looks_at_arguments = policy.as_ref().is_some_and(looks_at_context);
        Self { id, tool: rule.tool.clone(), shadow: rule.mode == Mode::Shadow, policy, looks_at_arguments }
    }
}

fn looks_at_context(policy: &Policy) -> bool {
    fn mentions(value: &Value) -> bool {
        match value {
            Value::Object(members) => {
                members.get("Var").is_some_and(|name| name == "context") || members.values().any(mentions)
            }
            Value::Array(items) => items.iter().any(mentions),
            _ => false,
        }
    }
    // A policy without a form in JSON is taken to look at everything.
    policy.to_json().map_or(true, |json| mentions(&json["conditions"]))
}

/// The rules that speak of one agent and one tool, ready to be asked.
struct Applicable {
    /// What is in `entities`.
    principal_type: String,
    capabilities: Vec<String>,
    upstream: String,
    principal: EntityUid,
    action: EntityUid,
    resource: EntityUid,
    entities: Entities,
    enforced: Rulings,
    /// The same with those in shadow; absent where there are none.
    with_shadow: Option<Rulings>,
}

/// What a set of rules says.
struct Rulings {
    with_arguments: PolicySet,
    /// For a call whose arguments are not known.
    without: PolicySet,
    permits: Vec<String>,
    look_at_arguments: Vec<String>,
    unreadable: Vec<String>,
}

/// Every rule, compiled, as of one change.
pub struct Rules {
    change: i64,
    compiled: Vec<Compiled>,
    sets: Cache<(String, String), Arc<Applicable>>,
}

impl Default for Rules {
    fn default() -> Self {
        Self::of(0, &[])
    }
}

/// The rules that were seen last, and the epoch of the database at which they were.
pub struct Known {
    epoch: i64,
    rules: Arc<Rules>,
}

impl Default for Known {
    fn default() -> Self {
        Self { epoch: i64::MIN, rules: Arc::default() }
    }
}

impl Rules {
    /// Reads rules, as of `change`.
    #[must_use]
    pub fn of(change: i64, rules: &[Rule]) -> Self {
        let counts = |rule: &&Rule| matches!(rule.mode, Mode::Enforce | Mode::Shadow);
        let compiled = rules.iter().filter(counts).map(Compiled::of).collect();
        Self { change, compiled, sets: Cache::new(SETS_MAX) }
    }

    /// Judges a call.
    ///
    /// Errors: [`GatewayError::PolicyFailed`] when the rules cannot be asked at all.
    pub async fn judge(&self, subject: &Subject<'_>) -> Result<Verdict, GatewayError> {
        if self.compiled.is_empty() {
            return Ok(Verdict::by_binding());
        }
        let key = (subject.agent_id.to_owned(), subject.tool.to_owned());
        let known = self.sets.get(&key).await.filter(|known| {
            known.principal_type == subject.principal_type
                && known.capabilities == subject.capabilities
                && known.upstream == subject.upstream
        });
        let applicable = match known {
            Some(applicable) => applicable,
            None => {
                let applicable = Arc::new(self.applicable(subject)?);
                self.sets.insert(key, Arc::clone(&applicable)).await;
                applicable
            }
        };
        let context = match subject.arguments {
            None => Context::empty(),
            Some(arguments) => {
                let arguments = ("arguments".to_owned(), expression(arguments, subject.input_schema));
                Context::from_pairs([arguments]).map_err(|_| unaskable(subject.tool))?
            }
        };
        let Applicable { principal, action, resource, entities, .. } = &*applicable;
        let request = Request::new(principal.clone(), action.clone(), resource.clone(), context, None)
            .map_err(|_| unaskable(subject.tool))?;
        let given = subject.arguments.is_some();
        let mut verdict = applicable.enforced.ask(&request, entities, given);
        if let (true, Some(with_shadow)) = (verdict.allowed, &applicable.with_shadow) {
            let would = with_shadow.ask(&request, entities, given);
            if !would.allowed {
                verdict.shadow_denied_by = would.policies;
            }
        }
        Ok(verdict)
    }

    fn applicable(&self, subject: &Subject<'_>) -> Result<Applicable, GatewayError> {
        let unaskable = || unaskable(subject.tool);
        let principal = uid("Agent", subject.agent_id)?;
        let resource = uid("Tool", subject.tool)?;
        let upstream =
            (!subject.upstream.is_empty()).then(|| uid("Upstream", subject.upstream)).transpose()?;
        let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let capabilities = RestrictedExpression::new_set(subject.capabilities.iter().map(|held| text(held)));
        let of_agent = [("principal_type", text(subject.principal_type)), ("capabilities", capabilities)];
        let of_tool = [("name", text(subject.tool)), ("upstream", text(subject.upstream))];
        let named = |members: [(&str, RestrictedExpression); 2]| -> HashMap<String, RestrictedExpression> {
            members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let parents: HashSet<EntityUid> = upstream.iter().cloned().collect();
        let mut entities = vec![
            Entity::new(principal.clone(), named(of_agent), HashSet::new()).map_err(|_| unaskable())?,
            Entity::new(resource.clone(), named(of_tool), parents).map_err(|_| unaskable())?,
        ];
        entities.extend(upstream.iter().cloned().map(|uid| Entity::new_no_attrs(uid, HashSet::new())));
        let entities = Entities::from_entities(entities, None).map_err(|_| unaskable())?;

        let speaks_of = |rule: &&Compiled| {
            let by_policy = rule.policy.as_ref().is_none_or(|policy| {
                let by_agent = match policy.principal_constraint() {
                    PrincipalConstraint::Eq(wanted) | PrincipalConstraint::In(wanted) => wanted == principal,
                    _ => true,
                };
                let by_tool = match policy.resource_constraint() {
                    ResourceConstraint::Eq(wanted) => wanted == resource,
                    ResourceConstraint::In(wanted) => {
                        wanted == resource || upstream.as_ref() == Some(&wanted)
                    }
                    _ => true,
                };
                by_agent && by_tool
            });
            by_policy && rule.tool.as_deref().is_none_or(|wanted| wanted == subject.tool)
        };
        let rules: Vec<&Compiled> = self.compiled.iter().filter(speaks_of).collect();
        let in_force: Vec<&Compiled> = rules.iter().copied().filter(|rule| !rule.shadow).collect();
        let with_shadow = if in_force.len() < rules.len() { Some(Rulings::of(&rules)?) } else { None };
        Ok(Applicable {
            principal_type: subject.principal_type.to_owned(),
            capabilities: subject.capabilities.to_vec(),
            upstream: subject.upstream.to_owned(),
            principal,
            action: uid("Action", "call")?,
            resource,
            entities,
            enforced: Rulings::of(&in_force)?,
            with_shadow,
        })
    }
}

impl Rulings {
    fn of(rules: &[&Compiled]) -> Result<Self, GatewayError> {
        let bound = || {
            Policy::parse(Some(PolicyId::new(BINDING)), "permit(principal, action, resource);")
                .map_err(|_| unaskable(BINDING))
        };
        let mut rulings = Self {
            with_arguments: PolicySet::new(),
            without: PolicySet::new(),
            permits: Vec::new(),
            look_at_arguments: Vec::new(),
            unreadable: Vec::new(),
        };
        let mut permitted_by_arguments = false;
        for rule in rules {
            let Some(policy) = &rule.policy else {
                rulings.unreadable.push(rule.id.clone());
                continue;
            };
            let permits = policy.effect() == Effect::Permit;
            rulings.with_arguments.add(policy.clone()).map_err(|_| unaskable(&rule.id))?;
            if rule.looks_at_arguments {
                rulings.look_at_arguments.push(rule.id.clone());
                permitted_by_arguments |= permits;
            } else {
                rulings.without.add(policy.clone()).map_err(|_| unaskable(&rule.id))?;
            }
            if permits {
                rulings.permits.push(rule.id.clone());
            }
        }
        if rulings.permits.is_empty() {
            rulings.with_arguments.add(bound()?).map_err(|_| unaskable(BINDING))?;
        }
        if rulings.permits.is_empty() || permitted_by_arguments {
            rulings.without.add(bound()?).map_err(|_| unaskable(BINDING))?;
        }
        Ok(rulings)
    }

    fn ask(&self, request: &Request, entities: &Entities, arguments_given: bool) -> Verdict {
        let set = if arguments_given { &self.with_arguments } else { &self.without };
        let answer = Authorizer::new().is_authorized(request, set, entities);
        let mut failed: Vec<String> = answer.diagnostics().errors().map(failed_rule).collect();
        failed.extend(self.unreadable.iter().cloned());
        failed.sort_unstable();
        let allowed = answer.decision() == Decision::Allow && failed.is_empty();
        let policies = match named(&answer) {
            _ if !failed.is_empty() => failed.clone(),
            // Nothing forbids it: one of these would have had to permit it.
            none if none.is_empty() => self.permits.clone(),
            named => named,
        };
        let depends_on_arguments = if arguments_given { Vec::new() } else { self.look_at_arguments.clone() };
        Verdict { allowed, policies, failed, shadow_denied_by: Vec::new(), depends_on_arguments }
    }
}

fn named(answer: &Response) -> Vec<String> {
    let mut names: Vec<String> = answer.diagnostics().reason().map(ToString::to_string).collect();
    names.sort_unstable();
    names
}

/// The rule that could not be evaluated.
fn failed_rule(error: &AuthorizationError) -> String {
    match error {
        AuthorizationError::PolicyEvaluationError(error) => error.policy_id().to_string(),
    }
}

fn unaskable(what: &str) -> GatewayError {
    GatewayError::PolicyFailed(vec![what.to_owned()])
}

fn uid(kind: &str, id: &str) -> Result<EntityUid, GatewayError> {
    let kind = EntityTypeName::from_str(kind).map_err(|_| unaskable(id))?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(id)))
}

/// A JSON value as Cedar knows it, of the type that `schema` gives it. Made value by value, because Cedar's own reading
/// of JSON takes some objects for entities, and these are the caller's.
fn expression(value: &Value, schema: &Value) -> RestrictedExpression {
    match value {
        Value::Bool(truth) => RestrictedExpression::new_bool(*truth),
        Value::Number(number) if schema["type"] == "number" => match decimal(number) {
            Some(decimal) => RestrictedExpression::new_decimal(decimal),
            None => RestrictedExpression::new_string(number.to_string()),
        },
        Value::Number(number) => match whole(number) {
            Some(whole) => RestrictedExpression::new_long(whole),
            None => RestrictedExpression::new_string(number.to_string()),
        },
        Value::String(text) => RestrictedExpression::new_string(text.clone()),
        Value::Null => nothing(),
        Value::Array(items) => {
            let items = items.iter().map(|item| expression(item, &schema["items"]));
            RestrictedExpression::new_set(items)
        }
        Value::Object(members) => {
            let members = members
                .iter()
                .map(|(name, value)| (name.clone(), expression(value, &schema["properties"][name.as_str()])));
            // A name that is there twice is all that could fail, and a map has none.
            RestrictedExpression::new_record(members).unwrap_or_else(|_| nothing())
        }
    }
}

/// There, and equal to nothing that a rule could name.
fn nothing() -> RestrictedExpression {
    let there = [("null".to_owned(), RestrictedExpression::new_bool(true))];
    RestrictedExpression::new_record(there).unwrap_or_else(|_| RestrictedExpression::new_bool(false))
}

/// `5.0` is an integer to JSON Schema, so it is one here.
fn whole(number: &Number) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    number.as_i64().or_else(|| {
        let number = number.as_f64()?;
        #[expect(clippy::cast_possible_truncation, reason = "whole and in the exact range, as tested")]
        (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i64)
    })
}

/// A number as Cedar's decimal, which has four places after the point and fits into 64 bits.
fn decimal(number: &Number) -> Option<String> {
    const WHOLE_MAX: u64 = 922_337_203_685_476;
    let text = number.to_string();
    let (whole, places) = text.split_once('.').unwrap_or((&text, "0"));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let unsigned = whole.strip_prefix('-').unwrap_or(whole);
    let fits = digits(unsigned)
        && digits(places)
        && places.len() <= 4
        && unsigned.parse::<u64>().is_ok_and(|whole| whole <= WHOLE_MAX);
    fits.then(|| format!("{whole}.{places}"))
}

/// What a rule may speak of: agents, tools, servers, and the arguments of `input_schema` where it is for one tool.
fn schema(input_schema: Option<&Value>) -> Result<Schema, String> {
    let context = match input_schema {
        Some(schema) => json!({ "arguments": { "type": "Record", "attributes": attributes(schema, 0) } }),
        None => json!({}),
    };
    let text = json!({ "type": "String" });
    let record = |attributes: Value| json!({ "type": "Record", "attributes": attributes });
    let agent = json!({ "principal_type": text, "capabilities": { "type": "Set", "element": text } });
    let whole = json!({ "": {
        "entityTypes": {
            "Agent": { "shape": record(agent) },
            "Upstream": {},
            "Tool": { "memberOfTypes": ["Upstream"], "shape": record(json!({ "name": text, "upstream": text })) },
        },
        "actions": { "call": { "appliesTo": {
            "principalTypes": ["Agent"], "resourceTypes": ["Tool"], "context": record(context) } } },
    } });
    Schema::from_json_value(whole).map_err(|error| error.to_string())
}

/// The attributes of a JSON Schema's properties, of the types that Cedar has.
fn attributes(schema: &Value, depth: usize) -> Value {
    let required: HashSet<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut found = Map::new();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(mut kind) = type_of(property, depth)
            && let Some(members) = kind.as_object_mut()
        {
            members.insert("required".to_owned(), json!(required.contains(name.as_str())));
            found.insert(name.clone(), kind);
        }
    }
    Value::Object(found)
}

fn type_of(property: &Value, depth: usize) -> Option<Value> {
    Some(match property["type"].as_str()? {
        "string" => json!({ "type": "String" }),
        "integer" => json!({ "type": "Long" }),
        "number" => json!({ "type": "Extension", "name": "decimal" }),
        "boolean" => json!({ "type": "Boolean" }),
        _ if depth >= DEPTH_MAX => return None,
        "array" => json!({ "type": "Set", "element": type_of(&property["items"], depth + 1)? }),
        "object" => json!({ "type": "Record", "attributes": attributes(property, depth + 1) }),
        _ => return None,
    })
}

fn field(field: &'static str, message: impl Into<String>) -> GatewayError {
    GatewayError::Fields(vec![FieldProblem { field, message: message.into() }])
}

impl Gateway {
    /// The rules as the database has them. `epoch`: where that was seen before, what is in memory will do; whoever
    /// saves a rule moves the epoch, and a decision of an older one is refused by the commit that would record it.
    ///
    /// Errors: [`GatewayError::Store`].
    pub(super) async fn rules(&self, epoch: Option<i64>) -> Result<Arc<Rules>, GatewayError> {
        let known = self.rules.load_full();
        if epoch == Some(known.epoch) {
            return Ok(Arc::clone(&known.rules));
        }
        let mut tx = self.store.read().await?;
        let change = store::rules_change(&mut tx).await?;
        let rules = if known.rules.change == change {
            Arc::clone(&known.rules)
        } else {
            Arc::new(Rules::of(change, &store::rules(&mut tx).await?))
        };
        if let Some(epoch) = epoch {
            self.rules.store(Arc::new(Known { epoch, rules: Arc::clone(&rules) }));
        }
        Ok(rules)
    }

    /// Rules in force, in shadow and off, by name.
    pub async fn list_rules(&self) -> Result<Vec<Rule>, GatewayError> {
        Ok(store::rules(&mut self.store.read().await?).await?)
    }

    /// The same, a page at a time: at most `limit` of those after the name `after`.
    pub async fn rules_after(&self, after: &str, limit: i64) -> Result<Vec<Rule>, GatewayError> {
        Ok(store::rules_after(&mut self.store.read().await?, after, limit).await?)
    }

    /// Every version of a rule, newest first.
    ///
    /// Errors: [`GatewayError::UnknownPolicy`].
    pub async fn rule_versions(&self, name: &str) -> Result<Vec<Rule>, GatewayError> {
        let versions = store::rule_versions(&mut self.store.read().await?, name, VERSIONS_SHOWN_MAX).await?;
        if versions.is_empty() { Err(GatewayError::UnknownPolicy(name.to_owned())) } else { Ok(versions) }
    }

    /// Reads and validates a rule.
    ///
    /// Errors: [`GatewayError::Fields`] with what Cedar says.
    pub async fn check_rule(&self, name: &str, new: &NewRule) -> Result<(), GatewayError> {
        let input_schema = match &new.tool {
            None => None,
            Some(tool) => Some(
                self.input_schema(tool)
                    .await?
                    .ok_or_else(|| field("tool", "must be the name of a resource or of an approved tool"))?,
            ),
        };
        check(name, new, input_schema.as_ref())
    }

    /// The schema of a tool's arguments: of a resource, or as approved.
    async fn input_schema(&self, tool: &str) -> Result<Option<Value>, GatewayError> {
        let mut tx = self.store.read().await?;
        if let Some(tool) = store::server_tool(&mut tx, tool).await? {
            return Ok(tool.input_schema());
        }
        Ok(store::resource_schema(&mut tx, &self.org_id, tool).await?.map(read_schema))
    }

    /// Saves a rule, as its next version. `after`: the version that it is to take the place of, 0 for none; absent for
    /// whatever there is.
    ///
    /// Errors: as [`Gateway::check_rule`], [`GatewayError::TooManyPolicies`], and [`GatewayError::PolicyMoved`].
    pub async fn save_rule(
        &self,
        actor: &str,
        now: UnixTime,
        name: &str,
        new: NewRule,
        after: Option<i64>,
    ) -> Result<Rule, GatewayError> {
        self.check_rule(name, &new).await?;
        let mut tx = self.store.write().await?;
        let rules = store::rules(&mut tx).await?;
        let newest = rules.iter().find(|rule| rule.name == name).map_or(0, |rule| rule.version);
        if after.is_some_and(|after| after != newest) {
            return Err(GatewayError::PolicyMoved(name.to_owned()));
        }
        if rules.len() >= POLICIES_MAX && !rules.iter().any(|rule| rule.name == name) {
            return Err(GatewayError::TooManyPolicies(POLICIES_MAX));
        }
        let (rule, saved) = write(&mut tx, actor, now, name, new).await?;
        tx.commit(&[saved]).await?;
        Ok(rule)
    }

    /// Ends a rule. Its versions stay.
    ///
    /// Errors: [`GatewayError::UnknownPolicy`].
    pub async fn delete_rule(&self, actor: &str, now: UnixTime, name: &str) -> Result<Rule, GatewayError> {
        let mut tx = self.store.write().await?;
        let (rule, deleted) = delete(&mut tx, actor, now, name).await?;
        tx.commit(&[deleted]).await?;
        Ok(rule)
    }

    /// The rules with a draft among them, in place of the stored one of its name.
    ///
    /// Errors: as [`Gateway::check_rule`].
    pub(super) async fn rules_with(
        &self,
        draft: Option<(&str, &NewRule)>,
    ) -> Result<Arc<Rules>, GatewayError> {
        let Some((name, new)) = draft else { return self.rules(None).await };
        self.check_rule(name, new).await?;
        let mut rules = self.list_rules().await?;
        rules.retain(|rule| rule.name != name);
        rules.push(Rule {
            change: 0,
            name: name.to_owned(),
            version: 0,
            tool: new.tool.clone(),
            mode: new.mode,
            text: new.text.clone(),
            saved_at: String::new(),
            saved_by: String::new(),
        });
        Ok(Arc::new(Rules::of(-1, &rules)))
    }
}

/// A stored schema; what cannot be read says nothing.
pub(super) fn read_schema(text: Option<String>) -> Value {
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_else(|| json!({}))
}

/// Reads and validates a rule. `input_schema`: of the tool whose arguments it speaks of.
///
/// Errors: [`GatewayError::Fields`] with what Cedar says.
pub(super) fn check(name: &str, new: &NewRule, input_schema: Option<&Value>) -> Result<(), GatewayError> {
    let policy = parse(name, new)?;
    let schema = schema(input_schema).map_err(|error| field("tool", error))?;
    let mut set = PolicySet::new();
    set.add(policy).map_err(|error| field("text", error.to_string()))?;
    let validated = Validator::new(schema).validate(&set, ValidationMode::Strict);
    // A condition that can never hold passes for valid, and a `forbid` with a slip in `has` would forbid nothing.
    let never = validated.validation_warnings().filter(|warning| {
        use ValidationWarning::{BidiCharsInIdentifier, BidiCharsInString, ImpossiblePolicy};
        matches!(warning, ImpossiblePolicy(_) | BidiCharsInString(_) | BidiCharsInIdentifier(_))
    });
    let errors = validated.validation_errors().map(ToString::to_string);
    let problems: Vec<String> = errors.chain(never.map(ToString::to_string)).take(5).collect();
    if problems.is_empty() { Ok(()) } else { Err(field("text", problems.join("; "))) }
}

/// Reads a rule, without a look at what it speaks of.
///
/// Errors: as [`check`].
pub(super) fn parse(name: &str, new: &NewRule) -> Result<Policy, GatewayError> {
    if !is_tool_name(name) || name == BINDING {
        return Err(field("name", "must match ^[A-Za-z0-9_.-]{1,64}$, and not be `binding`"));
    }
    if new.mode == Mode::Deleted {
        return Err(field("mode", "must be one of enforce, shadow, off"));
    }
    if new.text.len() > TEXT_BYTES_MAX {
        return Err(field("text", "must have at most 16384 bytes"));
    }
    Policy::parse(Some(PolicyId::new(name)), &new.text)
        .map_err(|error| field("text", format!("is not one Cedar policy: {error}")))
}

/// Writes the next version of a rule that was checked; gives the event.
pub(super) async fn write(
    tx: &mut WriteTx,
    actor: &str,
    now: UnixTime,
    name: &str,
    new: NewRule,
) -> Result<(Rule, Event), GatewayError> {
    write_as(tx, actor, now, name, new, EventType::McpPolicySaved).await
}

/// Ends a rule; gives the event.
///
/// Errors: [`GatewayError::UnknownPolicy`].
pub(super) async fn delete(
    tx: &mut WriteTx,
    actor: &str,
    now: UnixTime,
    name: &str,
) -> Result<(Rule, Event), GatewayError> {
    let known = store::rules(tx).await?.into_iter().find(|rule| rule.name == name);
    let known = known.ok_or_else(|| GatewayError::UnknownPolicy(name.to_owned()))?;
    let last = NewRule { text: known.text, tool: known.tool, mode: Mode::Deleted };
    write_as(tx, actor, now, name, last, EventType::McpPolicyDeleted).await
}

async fn write_as(
    tx: &mut WriteTx,
    actor: &str,
    now: UnixTime,
    name: &str,
    new: NewRule,
    event_type: EventType,
) -> Result<(Rule, Event), GatewayError> {
    let (change, version) = store::next_rule(tx, name).await?;
    let rule = Rule {
        change,
        name: name.to_owned(),
        version,
        tool: new.tool,
        mode: new.mode,
        text: new.text,
        saved_at: now.to_rfc3339(),
        saved_by: actor.to_owned(),
    };
    store::insert_rule(tx, &rule).await?;
    // Every replica takes it up with its next decision: one that was judged by the old rules is not recorded.
    tx.bump_epoch().await?;
    let details = json!({
        "policy": rule.name,
        "version": rule.version,
        "tool": rule.tool,
        "mode": rule.mode.as_str(),
        "text": rule.text,
    });
    Ok((rule, event(event_type, actor, details)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn rule(name: &str, mode: Mode, tool: Option<&str>, text: &str) -> Rule {
        Rule {
            change: 1,
            name: name.to_owned(),
            version: 1,
            tool: tool.map(str::to_owned),
            mode,
            text: text.to_owned(),
            saved_at: String::new(),
            saved_by: String::new(),
        }
    }

    fn transfer() -> Value {
        json!({ "type": "object", "required": ["amount"], "properties": {
            "amount": { "type": "integer" }, "to": { "type": "string" }, "rate": { "type": "number" },
            "at": { "type": "object", "properties": { "city": { "type": "string" } } },
            "tags": { "type": "array", "items": { "type": "string" } } } })
    }

    async fn asked(rules: &[Rule], agent_id: &str, arguments: Option<&Value>) -> Verdict {
        let subject = Subject {
            agent_id,
            principal_type: "agent",
            capabilities: &["pay".to_owned()],
            tool: "transfer",
            upstream: "bank",
            input_schema: &transfer(),
            arguments,
        };
        Rules::of(1, rules).judge(&subject).await.unwrap()
    }

    async fn judge(rules: &[Rule], agent_id: &str, arguments: Value) -> Verdict {
        asked(rules, agent_id, Some(&arguments)).await
    }

    #[tokio::test]
    async fn what_is_bound_is_allowed_unless_a_forbid_matches() {
        let small = json!({ "amount": 5 });
        assert!(judge(&[], "acme::a", small.clone()).await.allowed);
        let over = r#"forbid(principal, action, resource == Tool::"transfer") when { context.arguments.amount > 100 };"#;
        let over = [rule("over", Mode::Enforce, Some("transfer"), over)];
        assert_eq!(judge(&over, "acme::a", small.clone()).await.policies, [BINDING]);
        for (amount, allowed) in
            [(json!(100), true), (json!(101), false), (json!(5.0), true), (json!(500.0), false)]
        {
            let verdict = judge(&over, "acme::a", json!({ "amount": amount })).await;
            assert_eq!(verdict.allowed, allowed, "{verdict:?}");
            assert_eq!(verdict.failed.len(), 0, "{verdict:?}");
        }
        let upstream = r#"forbid(principal == Agent::"acme::b", action, resource in Upstream::"bank");"#;
        let upstream = [rule("not_b", Mode::Enforce, None, upstream)];
        assert!(judge(&upstream, "acme::a", small.clone()).await.allowed);
        assert_eq!(judge(&upstream, "acme::b", small).await.policies, ["not_b@1"]);
    }

    #[tokio::test]
    async fn a_rule_that_cannot_be_read_or_evaluated_denies_whatever_the_arguments_are() {
        // `has` must see whatever is there: what Cedar has no type for may not slip by.
        let over = "forbid(principal, action, resource) when \
                    { context.arguments has amount && context.arguments.amount > 100 };";
        let over = [rule("over", Mode::Enforce, Some("transfer"), over)];
        assert!(judge(&over, "acme::a", json!({})).await.allowed);
        for odd in
            [json!("lots"), json!(500.5), json!(1e300), json!(null), json!([500]), json!({ "amount": 5 })]
        {
            let verdict = judge(&over, "acme::a", json!({ "amount": odd })).await;
            assert_eq!(
                (verdict.allowed, verdict.failed.as_slice()),
                (false, &["over@1".to_owned()][..]),
                "{odd}"
            );
        }
        // A stored text that is none any more denies what it may have been about, and nothing else.
        let broken =
            |tool| [rule("broken", Mode::Enforce, tool, "forbid(principal"), rule("x", Mode::Off, None, "?")];
        for (tool, allowed) in [(None, false), (Some("transfer"), false), (Some("other"), true)] {
            let verdict = judge(&broken(tool), "acme::a", json!({ "amount": 1 })).await;
            assert_eq!(verdict.allowed, allowed, "{tool:?}");
            assert_eq!(asked(&broken(tool), "acme::a", None).await.allowed, allowed, "{tool:?}");
        }
        let shadow = [rule("broken", Mode::Shadow, None, "forbid(principal")];
        let verdict = judge(&shadow, "acme::a", json!({ "amount": 1 })).await;
        assert_eq!((verdict.allowed, verdict.shadow_denied_by), (true, vec!["broken@1".to_owned()]));
        // A mode that nobody knows decides.
        assert_eq!(Mode::parse("shadwo"), Mode::Enforce);
    }

    #[tokio::test]
    async fn where_a_permit_speaks_of_a_call_one_must_match() {
        let permit = r#"permit(principal, action, resource == Tool::"transfer") when { principal.capabilities.contains("pay") && context.arguments.to == "it" };"#;
        let permit = [rule("known_payee", Mode::Enforce, Some("transfer"), permit)];
        assert_eq!(judge(&permit, "acme::a", json!({ "to": "it" })).await.policies, ["known_payee@1"]);
        let denied = judge(&permit, "acme::a", json!({ "to": "me" })).await;
        assert_eq!((denied.allowed, denied.policies), (false, vec!["known_payee@1".to_owned()]));
        // An object that Cedar's own JSON would take for an entity is a record, and no text.
        let escape = json!({ "to": { "__entity": { "type": "Agent", "id": "it" } } });
        assert!(!judge(&permit, "acme::a", escape).await.allowed);
        // A permit for another agent asks nothing of this one.
        let other = r#"permit(principal == Agent::"acme::b", action, resource) when { false };"#;
        let other = [rule("b", Mode::Enforce, None, other)];
        assert!(judge(&other, "acme::a", json!({})).await.allowed);
        assert!(!judge(&other, "acme::b", json!({})).await.allowed);
    }

    #[tokio::test]
    async fn fractions_are_decimals_where_the_schema_says_number() {
        let over = r#"forbid(principal, action, resource) when { context.arguments.rate.greaterThan(decimal("1.5")) };"#;
        let over = [rule("over", Mode::Enforce, Some("transfer"), over)];
        for (rate, allowed) in [
            (json!(1), true),
            (json!(1.5), true),
            (json!(1.5001), false),
            (json!(2), false),
            (json!(-3), true),
            // More places than a decimal has, and more than it can hold: it cannot be compared, so it is denied.
            (json!(1.000_01), false),
            (json!(1e30), false),
        ] {
            assert_eq!(judge(&over, "acme::a", json!({ "rate": rate })).await.allowed, allowed, "{rate}");
        }
    }

    #[tokio::test]
    async fn a_rule_in_shadow_decides_nothing_and_says_what_it_would_have_denied() {
        let nobody = "forbid(principal, action, resource);";
        let verdict = judge(&[rule("nobody", Mode::Shadow, None, nobody)], "acme::a", json!({})).await;
        assert_eq!((verdict.allowed, verdict.shadow_denied_by), (true, vec!["nobody@1".to_owned()]));
        let verdict = judge(&[rule("nobody", Mode::Off, None, nobody)], "acme::a", json!({})).await;
        assert_eq!((verdict.allowed, verdict.shadow_denied_by.len()), (true, 0));
        // A permit in shadow would have had to match.
        let only = r#"permit(principal, action, resource) when { principal.principal_type == "user" };"#;
        let verdict = judge(&[rule("only", Mode::Shadow, None, only)], "acme::a", json!({})).await;
        assert_eq!((verdict.allowed, verdict.shadow_denied_by), (true, vec!["only@1".to_owned()]));
        // What a rule in force denies is not the shadow's doing.
        let both = [rule("now", Mode::Enforce, None, nobody), rule("next", Mode::Shadow, None, nobody)];
        let verdict = judge(&both, "acme::a", json!({})).await;
        assert_eq!((verdict.policies, verdict.shadow_denied_by), (vec!["now@1".to_owned()], Vec::new()));
    }

    #[tokio::test]
    async fn without_arguments_it_is_asked_whether_any_would_do() {
        let never = r#"forbid(principal == Agent::"acme::b", action, resource);"#;
        let over = "forbid(principal, action, resource) when { context.arguments.amount > 100 };";
        let known = r#"permit(principal, action, resource) when { context.arguments.to == "it" };"#;
        let rules = [
            rule("known", Mode::Enforce, Some("transfer"), known),
            rule("never", Mode::Enforce, None, never),
            rule("over", Mode::Enforce, Some("transfer"), over),
        ];
        let verdict = asked(&rules, "acme::a", None).await;
        assert!(verdict.allowed, "{verdict:?}");
        assert_eq!(verdict.depends_on_arguments, ["known@1", "over@1"]);
        let verdict = asked(&rules, "acme::b", None).await;
        assert_eq!((verdict.allowed, verdict.policies), (false, vec!["never@1".to_owned()]));
        // The only permit is for others: there are none that would do.
        let users = r#"permit(principal, action, resource) when { principal.principal_type == "user" };"#;
        assert!(!asked(&[rule("users", Mode::Enforce, None, users)], "acme::a", None).await.allowed);
    }

    #[test]
    fn a_rule_is_validated_against_the_arguments_of_its_tool() {
        let input = transfer();
        let validates = |text: &str, input: Option<&Value>| {
            let mut set = PolicySet::new();
            set.add(Policy::parse(None, text).unwrap()).unwrap();
            let schema = schema(input).unwrap();
            Validator::new(schema).validate(&set, ValidationMode::Strict).validation_errors().next().is_none()
        };
        let when = |condition: &str| format!("forbid(principal, action, resource) when {{ {condition} }};");
        for (condition, fits) in [
            ("context.arguments.amount > 5", true),
            ("context.arguments.amuont > 5", false),
            ("context.arguments.amount == \"x\"", false),
            ("context.arguments.to == \"x\"", false),
            ("context.arguments has to && context.arguments.to == \"x\"", true),
            (
                "context.arguments has at && context.arguments.at has city && context.arguments.at.city == \"x\"",
                true,
            ),
            ("context.arguments has tags && context.arguments.tags.contains(\"x\")", true),
            ("context.arguments has rate && context.arguments.rate.lessThan(decimal(\"0.5\"))", true),
            ("context.arguments has rate && context.arguments.rate < 1", false),
            ("principal.principal_type == \"user\"", true),
            ("principal.nothing", false),
        ] {
            assert_eq!(validates(&when(condition), Some(&input)), fits, "{condition}");
        }
        // Without a tool there are no arguments to speak of.
        assert!(!validates(&when("context.arguments.amount > 5"), None));
    }
}
