//! `/proxy/…`: the pages, signing in and out, what pages load.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use askama::Template;
use axum::extract::{Form, FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use futures_util::StreamExt as _;
use mastio_core::error::Kind;
use mastio_core::token::jwk::PublicJwk;
use serde::Deserialize;
use serde_json::json;

use super::enrollments::EnrollmentsQuery;
use super::error::DashboardError;
use super::policies::{AccessQuery, Draft, Question, Said};
use super::session::Who;
use super::tools::ToolsQuery;
use super::trust::AuditQuery;
use super::updates::in_words;
use super::{Dashboard, assets, policies, session, tools, urlencoded};
use crate::enrollment::revocation::{Which, revocation_reason};
use crate::gateway::NewRule;
use crate::gateway::servers::ToolLimits;
use crate::http::authn::{AdminCaller, Session};
use crate::http::context::Context;
use crate::http::error::{ApiError, Problem as _};
use crate::operators::OperatorError;
use crate::operators::http::Insufficient;
use crate::operators::sso;
use crate::updates::{Direction, UpdateError};

/// `__Host-`: only we can have set it, over TLS, for this host alone.
const COOKIE: &str = "__Host-mastio-session";
/// What a single sign-on under way has to remember.
const FLOW_COOKIE: &str = "__Host-mastio-sso";
/// Nothing from elsewhere, nothing inline, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
/// Where a sign-in leads by itself.
const HOME: &str = "/proxy";

/// The routes of this capability.
pub fn routes(dashboard: Arc<Dashboard>) -> Router {
    Router::new()
        .route("/proxy", get(show_overview))
        .route("/proxy/login", get(show_login).post(sign_in))
        .route("/proxy/login/sso", get(begin_sso))
        .route("/proxy/login/sso/callback", get(complete_sso))
        .route("/proxy/logout", post(sign_out))
        .route("/proxy/setup", get(show_setup).post(set_up))
        .route("/proxy/updates", get(show_updates))
        .route("/proxy/updates/{migration_id}", get(show_update))
        .route("/proxy/updates/{migration_id}/run", get(show_run))
        .route("/proxy/updates/{migration_id}/apply-review", get(show_apply_plan).post(begin_apply))
        .route("/proxy/updates/{migration_id}/rollback-review", get(show_rollback_plan).post(begin_rollback))
        .route("/proxy/updates/{migration_id}/propose-plan", post(propose_plan))
        .route("/proxy/updates/{migration_id}/approve-plan", post(approve_plan))
        .route("/proxy/agents", get(show_agents))
        .route("/proxy/agents/{agent_id}", get(show_agent))
        .route("/proxy/agents/{agent_id}/deactivate", post(deactivate_agent))
        .route("/proxy/agents/{agent_id}/reactivate", post(reactivate_agent))
        .route("/proxy/agents/{agent_id}/renew", post(renew_agent))
        .route("/proxy/agents/{agent_id}/dpop-key", post(pin_dpop_key))
        .route("/proxy/agents/{agent_id}/revoke", post(revoke_agent))
        .route("/proxy/agents/{agent_id}/delete", post(delete_agent))
        .route("/proxy/enrollments", get(show_enrollments))
        .route("/proxy/enrollments/rows", get(show_enrollment_rows))
        .route("/proxy/enrollments/{session_id}", get(show_enrollment))
        .route("/proxy/enrollments/{session_id}/approve", post(approve_enrollment))
        .route("/proxy/enrollments/{session_id}/reject", post(reject_enrollment))
        .route("/proxy/tools", get(show_tools))
        .route("/proxy/tools/servers", post(register_server))
        .route("/proxy/tools/servers/{upstream_id}/look", post(look_at_server))
        .route("/proxy/tools/servers/{upstream_id}/delete", post(delete_server))
        .route("/proxy/tools/{tool_id}", get(show_tool))
        .route("/proxy/tools/{tool_id}/approve", post(approve_tool))
        .route("/proxy/tools/{tool_id}/block", post(block_tool))
        .route("/proxy/tools/{tool_id}/limits", post(limit_tool))
        .route("/proxy/tools/{tool_id}/try", post(try_tool))
        .route("/proxy/tools/{tool_id}/bind", post(bind_agent))
        .route("/proxy/tools/{tool_id}/unbind", post(unbind_agent))
        .route("/proxy/policies", get(show_policies).post(save_policy))
        .route("/proxy/policies/test", post(test_policy))
        .route("/proxy/policies/{name}", get(show_policy))
        .route("/proxy/policies/{name}/mode", post(set_policy_mode))
        .route("/proxy/policies/{name}/delete", post(delete_policy))
        .route("/proxy/access", get(show_access))
        .route("/proxy/pki", get(show_pki))
        .route("/proxy/pki/overlap", get(show_overlap))
        .route("/proxy/pki/settle", post(settle_overlap))
        .route("/proxy/pki/certificates/{fingerprint}", get(show_certificate))
        .route("/proxy/mastio-key", get(show_keys))
        .route("/proxy/settings", get(show_settings))
        .route("/proxy/operators", get(show_operators).post(add_operator))
        .route("/proxy/operators/end-sessions", post(end_sso_sessions))
        .route("/proxy/operators/{name}/role", post(set_operator_role))
        .route("/proxy/operators/{name}/reset", post(reset_operator))
        .route("/proxy/operators/{name}/deactivate", post(deactivate_operator))
        .route("/proxy/audit", get(show_audit).post(verify_audit))
        .route("/proxy/audit/rows", get(show_audit_rows))
        .route("/proxy/audit/stream", get(follow_audit))
        .route("/proxy/audit/{seq}", get(show_event))
        .layer(middleware::from_fn_with_state(Arc::clone(&dashboard), pages))
        .route("/proxy/assets/{name}", get(show_asset))
        .with_state(dashboard)
}

/// Puts the session that a request's cookie proves into its extensions, for these pages and for the admin API.
pub async fn attach_session(dashboard: &Dashboard, request: &mut Request) -> Result<(), ApiError> {
    let path = request.uri().path();
    let wanted = (path == HOME || path.starts_with("/proxy/") || path.starts_with("/v1/admin/"))
        && !path.starts_with("/proxy/assets/");
    if wanted
        && let Some(token) = cookie(request.headers(), COOKIE)
        && let Some(now) = request.extensions().get::<Context>().map(|context| context.now.seconds())
    {
        let found =
            session::find(&dashboard.pki().store, &dashboard.secret, &dashboard.operators, token, now).await;
        match found {
            Ok(Some(session)) => drop(request.extensions_mut().insert(session)),
            Ok(None) => {}
            Err(error) => return Err(ApiError::from(error)),
        }
    }
    Ok(())
}

fn cookie<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == wanted).then_some(value))
}

/// Renders an error of a handler as a page, and puts the policy on whatever leaves.
async fn pages(State(dashboard): State<Arc<Dashboard>>, request: Request, next: Next) -> Response {
    let session = request.extensions().get::<Session>().cloned();
    let in_background = page_behind(request.headers());
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Arc<DashboardError>>() {
        response = explain(&dashboard, session.as_ref(), &problem, in_background.as_deref()).await;
    }
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

/// The page whose script asks, where it is a script that asks.
fn page_behind(headers: &HeaderMap) -> Option<String> {
    let url = headers.get("hx-request").and(headers.get("hx-current-url"))?.to_str().ok()?;
    let path = url.split_once("://").and_then(|(_, rest)| rest.find('/').and_then(|at| rest.get(at..)));
    Some(path.unwrap_or(HOME).to_owned())
}

async fn explain(
    dashboard: &Dashboard,
    session: Option<&Session>,
    problem: &DashboardError,
    in_background: Option<&str>,
) -> Response {
    if let DashboardError::SignedOut { next } = problem {
        let login = |next: &str| format!("/proxy/login?next={}", urlencoded(next));
        // A script that fetches a part of a page must not put the sign-in into the middle of it.
        return match in_background {
            Some(page) => {
                let header = (HeaderName::from_static("hx-redirect"), login(page));
                (StatusCode::UNAUTHORIZED, [header]).into_response()
            }
            None => see_other(&login(next)),
        };
    }
    let message = if problem.kind() == Kind::Internal {
        tracing::error!(error = crate::http::error::chain(problem), "page_failed");
        "Something went wrong on our side. The log has the cause.".to_owned()
    } else {
        ApiError::new(problem.kind(), problem.detail()).message().to_owned()
    };
    let mut response = ApiError::new(problem.kind(), message.clone()).into_response();
    let status = response.status().as_u16();
    // A refused sign-in shows the form again, with the reason.
    let signing_in = matches!(
        problem,
        DashboardError::WrongSecret
            | DashboardError::Sso(_)
            | DashboardError::Operator(OperatorError::TooManyTries { .. } | OperatorError::Busy)
    );
    let page = if signing_in {
        dashboard.login_page(HOME.to_owned(), Some(message)).await.and_then(|page| Ok(page.render()?))
    } else {
        let page = dashboard.error_page(session, status, message).await;
        page.and_then(|page| Ok(page.render()?))
    };
    // Where not even the page around the error can be made, the plain error tells as much.
    if let Ok(text) = page {
        *response.body_mut() = text.into();
        let html = HeaderValue::from_static("text/html; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, html);
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if let Some((name, value)) = problem.header() {
        response.headers_mut().insert(name, value);
    }
    response
}

/// An error on its way to [`pages`], which makes it readable.
struct Failure(DashboardError);

impl<E: Into<DashboardError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
        response.extensions_mut().insert(Arc::new(self.0));
        response
    }
}

type Shown = Result<Response, Failure>;

fn html(page: &impl Template) -> Shown {
    let text = page.render().map_err(DashboardError::from)?;
    Ok(axum::response::Html(text).into_response())
}

fn see_other(path: &str) -> Response {
    match HeaderValue::from_str(path) {
        Ok(location) => (StatusCode::SEE_OTHER, [(header::LOCATION, location)]).into_response(),
        Err(_) => StatusCode::BAD_REQUEST.into_response(),
    }
}

/// An operator who has signed in.
struct Viewer(Session);

impl<S: Send + Sync> FromRequestParts<S> for Viewer {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        let next = parts.uri.path_and_query().map_or(HOME, |path| path.as_str()).to_owned();
        Ok(Self(admitted(&parts.extensions, next)?))
    }
}

/// The session that the guard has let in for this route. `next`: where to go on after a sign-in.
fn admitted(extensions: &Extensions, next: String) -> Result<Session, DashboardError> {
    if let Some(Insufficient { name, role, required }) = extensions.get::<Insufficient>().cloned() {
        return Err(OperatorError::Role { name, role, required }.into());
    }
    match (extensions.get::<Session>(), extensions.get::<AdminCaller>()) {
        (Some(session), Some(_)) => Ok(session.clone()),
        _ => Err(DashboardError::SignedOut { next }),
    }
}

/// A form of ours, sent by an operator who has signed in, with the session's token.
struct Sent {
    session: Session,
    fields: HashMap<String, String>,
}

impl Sent {
    /// What stands in a field; nothing where the form has none of that name.
    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", |value| value.trim())
    }

    /// What cannot be undone asks for the name of what it is done to.
    fn names(&self, name: &str) -> Result<(), DashboardError> {
        if self.field("confirm") == name { Ok(()) } else { Err(DashboardError::OtherName(name.to_owned())) }
    }

    fn confirms(&self) -> Result<(), UpdateError> {
        if self.fields.get("confirm").is_some_and(|value| value == "yes") {
            Ok(())
        } else {
            Err(UpdateError::Unconfirmed)
        }
    }
}

impl<S: Send + Sync> FromRequest<S> for Sent {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Self::Rejection> {
        // Whoever signs in again starts from a page, not from a half-sent form.
        let next = HOME.to_owned();
        let session = admitted(request.extensions(), next)?;
        let Form(fields) = Form::<HashMap<String, String>>::from_request(request, state)
            .await
            .map_err(|_| DashboardError::Malformed)?;
        let token = fields.get("csrf_token").map_or("", String::as_str);
        if !session.accepts(token.as_bytes()) {
            return Err(DashboardError::ForeignForm.into());
        }
        Ok(Self { session, fields })
    }
}

/// `next`, if it is a page of ours; anything else could lead an operator who has just signed in to somewhere else.
fn own_page(next: &str) -> &str {
    let rest = next.strip_prefix(HOME);
    let ours = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || rest.starts_with('?'));
    let plain = next.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/-._~:?=&%".contains(&byte));
    if ours && plain && !next.contains("//") { next } else { HOME }
}

#[derive(Deserialize)]
struct LoginQuery {
    #[serde(default)]
    next: String,
}

async fn show_login(
    State(dashboard): State<Arc<Dashboard>>,
    session: Option<Extension<Session>>,
    Query(query): Query<LoginQuery>,
) -> Shown {
    let next = own_page(&query.next);
    if session.is_some() {
        return Ok(see_other(next));
    }
    html(&dashboard.login_page(next.to_owned(), None).await?)
}

#[derive(Deserialize)]
struct Login {
    #[serde(default)]
    name: String,
    secret: String,
    #[serde(default)]
    next: String,
}

/// There is no session yet whose token a form could carry: a browser says itself whether another site sends it.
async fn sign_in(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    headers: HeaderMap,
    form: Result<Form<Login>, axum::extract::rejection::FormRejection>,
) -> Shown {
    let foreign = headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none");
    if foreign {
        return Err(DashboardError::ForeignForm.into());
    }
    let Form(login) = form.map_err(|_| DashboardError::Malformed)?;
    let (address, now) = (context.peer.ip(), context.now.seconds());
    let store = &dashboard.pki().store;
    let signed_in = dashboard.operators.sign_in(login.name.trim(), login.secret.trim(), address, now).await;
    let caller = match signed_in {
        Ok(caller) => caller,
        Err(OperatorError::Wrong { failures }) => {
            session::refused(store, address, json!({ "failures": failures })).await?;
            return Err(DashboardError::WrongSecret.into());
        }
        Err(error) => return Err(error.into()),
    };
    open_session(&dashboard, &context, &headers, Who { actor: &caller.actor, role: None }, &login.next).await
}

/// Opens a session, hands its cookie over, and leads to `next` where that is a page of ours.
async fn open_session(
    dashboard: &Dashboard,
    context: &Context,
    headers: &HeaderMap,
    who: Who<'_>,
    next: &str,
) -> Shown {
    let (address, now) = (context.peer.ip(), context.now.seconds());
    let (pki, secret) = (dashboard.pki(), &dashboard.secret);
    let former = cookie(headers, COOKIE);
    let token = session::open(&pki.store, secret, &pki.entropy, former, who, address, now).await?;
    // Lax: a link in an alert opens the page; what changes anything is a POST, and needs the token besides.
    Ok((set_cookie(COOKIE, &token, ""), see_other(own_page(next))).into_response())
}

fn set_cookie(name: &str, value: &str, further: &str) -> AppendCookie {
    AppendCookie(format!("{name}={value}; Path=/; Secure; HttpOnly; SameSite=Lax{further}"))
}

/// Leads to the single sign-on provider.
async fn begin_sso(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    headers: HeaderMap,
    Query(query): Query<LoginQuery>,
) -> Shown {
    let Some((sso, urls)) = &dashboard.sso else {
        return Err(DashboardError::NotFound("single sign-on here".to_owned()).into());
    };
    let base = urls.base(&headers).ok_or(DashboardError::Malformed)?;
    let (pki, now) = (dashboard.pki(), context.now.seconds());
    let begun = sso.begin(&base, own_page(&query.next), &pki.entropy, pki.sealing(), now).await;
    let (location, flow) = begun?;
    Ok((set_cookie(FLOW_COOKIE, &flow, "; Max-Age=600"), see_other(&location)).into_response())
}

/// Where the provider sends the browser back to. A way back counts as a try, as a secret does, until it has succeeded.
async fn complete_sso(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    headers: HeaderMap,
    Query(answer): Query<sso::Answer>,
) -> Shown {
    let Some((sso, _)) = &dashboard.sso else {
        return Err(DashboardError::NotFound("single sign-on here".to_owned()).into());
    };
    let (address, now) = (context.peer.ip(), context.now.seconds());
    let (pki, operators) = (dashboard.pki(), &dashboard.operators);
    operators.attempt(address, now)?;
    match sso.complete(cookie(&headers, FLOW_COOKIE), answer, pki.sealing(), now).await {
        Ok(signed_on) => {
            operators.succeeded(address);
            let who = Who { actor: &signed_on.actor, role: Some(signed_on.role) };
            let opened = open_session(&dashboard, &context, &headers, who, &signed_on.next).await?;
            Ok((set_cookie(FLOW_COOKIE, "", "; Max-Age=0"), opened).into_response())
        }
        Err(error) => {
            let details = json!({ "single_sign_on": true, "reason": error.to_string() });
            session::refused(&pki.store, address, details).await?;
            Err(error.into())
        }
    }
}

async fn show_setup(State(dashboard): State<Arc<Dashboard>>) -> Shown {
    html(&dashboard.setup_page(None).await?)
}

#[derive(Deserialize)]
struct SetUp {
    token: String,
    organisation: String,
    name: String,
}

/// The token is what a form of ours carries otherwise: nobody else's page knows it.
async fn set_up(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    form: Result<Form<SetUp>, axum::extract::rejection::FormRejection>,
) -> Shown {
    let Form(form) = form.map_err(|_| DashboardError::Malformed)?;
    let (organisation, name) = (form.organisation.trim(), form.name.trim());
    let (address, now) = (context.peer.ip(), context.now.seconds());
    let done = dashboard.operators.set_up(form.token.trim(), organisation, name, address, now).await;
    match done {
        Ok(issued) => html(&dashboard.set_up_page(organisation, issued).await?),
        // Where there is nothing to set up, the page says that instead of the reason.
        Err(
            error @ (OperatorError::SetupToken
            | OperatorError::Organisation
            | OperatorError::Name(_)
            | OperatorError::Exists(_)),
        ) => {
            let status = ApiError::new(error.kind(), "").into_response().status();
            let page = dashboard.setup_page(Some(error.to_string())).await?;
            Ok((status, html(&page)?).into_response())
        }
        Err(error) => Err(error.into()),
    }
}

async fn sign_out(State(dashboard): State<Arc<Dashboard>>, headers: HeaderMap, sent: Sent) -> Shown {
    if let Some(token) = cookie(&headers, COOKIE) {
        session::close(&dashboard.pki().store, &dashboard.secret, token, &sent.session.actor).await?;
    }
    Ok((set_cookie(COOKIE, "", "; Max-Age=0"), see_other("/proxy/login")).into_response())
}

/// A `Set-Cookie` on whatever it stands before.
struct AppendCookie(String);

impl axum::response::IntoResponseParts for AppendCookie {
    type Error = std::convert::Infallible;

    fn into_response_parts(
        self,
        mut parts: axum::response::ResponseParts,
    ) -> Result<axum::response::ResponseParts, Self::Error> {
        // Base64url and constants always make a header value.
        if let Ok(value) = HeaderValue::from_str(&self.0) {
            parts.headers_mut().append(header::SET_COOKIE, value);
        }
        Ok(parts)
    }
}

async fn show_overview(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.overview_page(&session).await?)
}

async fn show_updates(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.updates_page(&session).await?)
}

async fn show_update(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(migration_id): Path<String>,
) -> Shown {
    html(&dashboard.update_page(&session, &migration_id).await?)
}

/// The run under way as a part of a page; when it is over, the whole page has something to tell.
async fn show_run(
    State(dashboard): State<Arc<Dashboard>>,
    _viewer: Viewer,
    Path(migration_id): Path<String>,
) -> Shown {
    match dashboard.run_fragment(&migration_id).await? {
        Some(fragment) => html(&fragment),
        None => Ok([(HeaderName::from_static("hx-refresh"), "true")].into_response()),
    }
}

async fn show_apply_plan(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(migration_id): Path<String>,
) -> Shown {
    html(&dashboard.apply_plan_page(&session, &migration_id, None).await?)
}

async fn show_rollback_plan(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(migration_id): Path<String>,
) -> Shown {
    html(&dashboard.rollback_plan_page(&session, &migration_id, None).await?)
}

async fn begin_apply(
    State(dashboard): State<Arc<Dashboard>>,
    Path(migration_id): Path<String>,
    sent: Sent,
) -> Shown {
    begin(&dashboard, &migration_id, Direction::Apply, &sent).await
}

async fn begin_rollback(
    State(dashboard): State<Arc<Dashboard>>,
    Path(migration_id): Path<String>,
    sent: Sent,
) -> Shown {
    begin(&dashboard, &migration_id, Direction::Rollback, &sent).await
}

/// Only what the page has shown is done, by the digest of its plan.
async fn begin(dashboard: &Dashboard, migration_id: &str, direction: Direction, sent: &Sent) -> Shown {
    sent.confirms()?;
    let digest = Some(sent.field("plan_digest")).filter(|digest| !digest.is_empty());
    let begun = dashboard.health.updates.begin(migration_id, direction, &sent.session.actor, digest).await;
    if let Err(error) = begun {
        return moved(dashboard, sent, migration_id, direction, error).await;
    }
    Ok(see_other(&update_path(migration_id)))
}

fn update_path(migration_id: &str) -> String {
    format!("/proxy/updates/{}", urlencoded(migration_id))
}

/// Where the state has moved since the plan that was sent: the plan as it is now, and what differs.
async fn moved(
    dashboard: &Dashboard,
    sent: &Sent,
    migration_id: &str,
    direction: Direction,
    error: UpdateError,
) -> Shown {
    let UpdateError::PlanChanged { differences, .. } = &error else { return Err(error.into()) };
    let (session, differences) = (&sent.session, Some(in_words(differences)));
    let page = match direction {
        Direction::Apply => html(&dashboard.apply_plan_page(session, migration_id, differences).await?),
        Direction::Rollback => html(&dashboard.rollback_plan_page(session, migration_id, differences).await?),
    };
    Ok((StatusCode::CONFLICT, page?).into_response())
}

fn direction(sent: &Sent) -> Result<Direction, DashboardError> {
    match sent.field("direction") {
        "apply" => Ok(Direction::Apply),
        "rollback" => Ok(Direction::Rollback),
        _ => Err(DashboardError::Malformed),
    }
}

async fn propose_plan(
    State(dashboard): State<Arc<Dashboard>>,
    Path(migration_id): Path<String>,
    sent: Sent,
) -> Shown {
    let (direction, actor) = (direction(&sent)?, &sent.session.actor);
    let updates = &dashboard.health.updates;
    match updates.propose_plan(&migration_id, direction, sent.field("plan_digest"), actor).await {
        Ok(_) => Ok(see_other(&format!("{}/{}-review", update_path(&migration_id), direction.as_str()))),
        Err(error) => moved(&dashboard, &sent, &migration_id, direction, error).await,
    }
}

async fn approve_plan(
    State(dashboard): State<Arc<Dashboard>>,
    Path(migration_id): Path<String>,
    sent: Sent,
) -> Shown {
    sent.confirms()?;
    let (direction, actor) = (direction(&sent)?, &sent.session.actor);
    let updates = &dashboard.health.updates;
    match updates.approve_plan(&migration_id, sent.field("proposal_id"), actor).await {
        Ok(_) => Ok(see_other(&format!("{}/{}-review", update_path(&migration_id), direction.as_str()))),
        Err(error) => moved(&dashboard, &sent, &migration_id, direction, error).await,
    }
}

#[derive(Deserialize)]
struct AgentsQuery {
    #[serde(default)]
    from: String,
    #[serde(default)]
    only: String,
    #[serde(default)]
    after: String,
}

async fn show_agents(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<AgentsQuery>,
) -> Shown {
    html(&dashboard.agents_page(&session, query.from.trim(), &query.only, &query.after).await?)
}

async fn show_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(agent_id): Path<String>,
) -> Shown {
    html(&dashboard.agent_page(&session, &agent_id).await?)
}

fn agent_path(agent_id: &str) -> String {
    format!("/proxy/agents/{}", urlencoded(agent_id))
}

async fn deactivate_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    dashboard.agents.deactivate(&agent_id, &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

async fn reactivate_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    dashboard.agents.reactivate(&agent_id, &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

/// Another certificate for the key that the agent has.
async fn renew_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    dashboard.agents.renew(&agent_id, None, None, &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

async fn pin_dpop_key(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    let jwk = serde_json::from_str(sent.field("jwk"))
        .map_err(|_| DashboardError::Jwk("it is no JSON".to_owned()))?;
    let jwk = PublicJwk::from_value(&jwk).map_err(|error| DashboardError::Jwk(error.to_string()))?;
    dashboard.agents.set_dpop_key(&agent_id, &jwk.thumbprint(), &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

/// There is no way back: the form has to say whose name it is.
async fn revoke_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    sent.names(&agent_id)?;
    let reason = revocation_reason(Some(sent.field("reason")))?;
    let which = Which::Agent(agent_id.clone());
    dashboard.agents.revoke(&which, reason, &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

/// There is no way back: the form has to say whose name it is.
async fn delete_agent(
    State(dashboard): State<Arc<Dashboard>>,
    Path(agent_id): Path<String>,
    sent: Sent,
) -> Shown {
    sent.names(&agent_id)?;
    dashboard.agents.delete(&agent_id, &sent.session.actor).await?;
    Ok(see_other("/proxy/agents"))
}

async fn show_enrollments(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<EnrollmentsQuery>,
) -> Shown {
    html(&dashboard.enrollments_page(&session, &query).await?)
}

async fn show_enrollment_rows(
    State(dashboard): State<Arc<Dashboard>>,
    _viewer: Viewer,
    Query(query): Query<EnrollmentsQuery>,
) -> Shown {
    html(&dashboard.enrollment_rows(&query).await?)
}

async fn show_enrollment(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(session_id): Path<String>,
) -> Shown {
    html(&dashboard.enrollment_page(&session, &session_id).await?)
}

async fn approve_enrollment(
    State(dashboard): State<Arc<Dashboard>>,
    Path(session_id): Path<String>,
    sent: Sent,
) -> Shown {
    let capabilities: Vec<String> =
        sent.field("capabilities").split_whitespace().map(str::to_owned).collect();
    let agent_id = sent.field("agent_id");
    let agent_id =
        dashboard.agents.approve(&session_id, agent_id, &capabilities, &sent.session.actor).await?;
    Ok(see_other(&agent_path(&agent_id)))
}

async fn reject_enrollment(
    State(dashboard): State<Arc<Dashboard>>,
    Path(session_id): Path<String>,
    sent: Sent,
) -> Shown {
    dashboard.agents.reject(&session_id, sent.field("reason"), &sent.session.actor).await?;
    Ok(see_other("/proxy/enrollments"))
}

async fn show_tools(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<ToolsQuery>,
) -> Shown {
    html(&dashboard.tools_page(&session, &query).await?)
}

async fn register_server(State(dashboard): State<Arc<Dashboard>>, context: Context, sent: Sent) -> Shown {
    let field = |name| sent.field(name);
    let new = tools::new_server(
        field("name"),
        field("endpoint_url"),
        field("secret"),
        field("required_capability"),
    );
    dashboard.gateway.register_server(&sent.session.actor, context.now.seconds(), new).await?;
    Ok(see_other("/proxy/tools"))
}

async fn look_at_server(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(upstream_id): Path<String>,
    sent: Sent,
) -> Shown {
    // What a look finds, and why it fails, stands in the server's row, which the page shows.
    if let Err(error) = dashboard.gateway.look(&sent.session.actor, context.now.seconds(), &upstream_id).await
        && error.kind() != Kind::Unavailable
    {
        return Err(error.into());
    }
    Ok(see_other("/proxy/tools"))
}

/// There is no way back: the form has to say whose name it is.
async fn delete_server(
    State(dashboard): State<Arc<Dashboard>>,
    Path(upstream_id): Path<String>,
    sent: Sent,
) -> Shown {
    let server = dashboard.gateway.server(&upstream_id).await?;
    sent.names(&server.name)?;
    dashboard.gateway.delete_server(&sent.session.actor, &upstream_id).await?;
    Ok(see_other("/proxy/tools"))
}

fn tool_path(tool_id: &str) -> String {
    format!("/proxy/tools/{}", urlencoded(tool_id))
}

async fn show_tool(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(tool_id): Path<String>,
) -> Shown {
    html(&dashboard.tool_page(&session, &tool_id, None).await?)
}

/// Approves what the page has shown, by its digest: what the server says since then is not approved with it.
async fn approve_tool(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(tool_id): Path<String>,
    sent: Sent,
) -> Shown {
    let (digest, imitates) = (sent.field("digest"), sent.field("accept_imitation") == "yes");
    let (gateway, actor) = (&dashboard.gateway, &sent.session.actor);
    gateway.approve_tool(actor, context.now.seconds(), &tool_id, digest, imitates).await?;
    Ok(see_other(&tool_path(&tool_id)))
}

async fn block_tool(
    State(dashboard): State<Arc<Dashboard>>,
    Path(tool_id): Path<String>,
    sent: Sent,
) -> Shown {
    dashboard.gateway.block_tool(&sent.session.actor, &tool_id).await?;
    Ok(see_other(&tool_path(&tool_id)))
}

async fn limit_tool(
    State(dashboard): State<Arc<Dashboard>>,
    Path(tool_id): Path<String>,
    sent: Sent,
) -> Shown {
    let given = |name| Some(sent.field(name)).filter(|value| !value.is_empty());
    let calls = given("calls_per_minute").map(str::parse).transpose();
    let calls = calls.map_err(|_| DashboardError::Malformed)?;
    let capability = given("required_capability").map(str::to_owned);
    let limits = ToolLimits {
        required_capability: capability,
        calls_per_minute: calls,
        ..ToolLimits::of(&dashboard.gateway.server_tool(&tool_id).await?)
    };
    dashboard.gateway.limit_tool(&sent.session.actor, &tool_id, limits).await?;
    Ok(see_other(&tool_path(&tool_id)))
}

/// Shows what the tool answered in the answer to the form: it is kept nowhere.
async fn try_tool(State(dashboard): State<Arc<Dashboard>>, Path(tool_id): Path<String>, sent: Sent) -> Shown {
    let (arguments, actor) = (sent.field("arguments"), &sent.session.actor);
    let trial = dashboard.gateway.try_tool(actor, &tool_id, arguments).await?;
    html(&dashboard.tool_page(&sent.session, &tool_id, Some((arguments.to_owned(), trial))).await?)
}

async fn bind_agent(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(tool_id): Path<String>,
    sent: Sent,
) -> Shown {
    let agent_id = dashboard.agents.canonical(sent.field("agent_id"));
    let agent = dashboard.agents.show(&agent_id).await?;
    let (gateway, actor) = (&dashboard.gateway, &sent.session.actor);
    gateway.bind(actor, context.now.seconds(), &agent_id, &agent.principal_type, &tool_id).await?;
    Ok(see_other(&tool_path(&tool_id)))
}

async fn unbind_agent(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(tool_id): Path<String>,
    sent: Sent,
) -> Shown {
    let (gateway, actor) = (&dashboard.gateway, &sent.session.actor);
    gateway.revoke_binding(actor, context.now.seconds(), sent.field("binding_id")).await?;
    Ok(see_other(&tool_path(&tool_id)))
}

#[derive(Deserialize)]
struct PoliciesQuery {
    #[serde(default)]
    after: String,
}

async fn show_policies(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<PoliciesQuery>,
) -> Shown {
    html(&dashboard.policies_page(&session, &query.after, Said::default()).await?)
}

async fn show_policy(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(name): Path<String>,
) -> Shown {
    html(&dashboard.policy_page(&session, &name, Said::default()).await?)
}

async fn show_access(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<AccessQuery>,
) -> Shown {
    html(&dashboard.access_page(&session, &query).await?)
}

/// What a form says of a policy; nothing where it has none.
fn draft(sent: &Sent) -> Result<Option<Draft>, DashboardError> {
    if !sent.fields.contains_key("text") {
        return Ok(None);
    }
    let field = |name: &str| sent.field(name).to_owned();
    Ok(Some(Draft {
        name: field("name"),
        tool: field("tool"),
        mode: Draft::mode(sent.field("mode")),
        text: field("text"),
        version: version(sent)?,
    }))
}

/// The version of a policy that a form is about.
fn version(sent: &Sent) -> Result<i64, DashboardError> {
    sent.field("version").parse().map_err(|_| DashboardError::Malformed)
}

fn question(sent: &Sent) -> Question {
    let field = |name: &str| sent.field(name).to_owned();
    Question { agent_id: field("agent_id"), called: field("called"), arguments: field("arguments") }
}

/// The form again, with what it says, and what came of it: nobody writes a rule twice.
async fn say(dashboard: &Dashboard, session: &Session, said: Said) -> Shown {
    let status = if said.problem.is_some() { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
    let saved = said.draft.as_ref().filter(|draft| draft.version > 0).map(|draft| draft.name.clone());
    let page = match saved {
        Some(name) => html(&dashboard.policy_page(session, &name, said).await?)?,
        None => html(&dashboard.policies_page(session, "", said).await?)?,
    };
    Ok((status, page).into_response())
}

/// What whoever wrote a form can put right, in words; every other error goes on.
fn fault(error: DashboardError) -> Result<String, DashboardError> {
    if error.kind() != Kind::Unprocessable {
        return Err(error);
    }
    Ok(ApiError::new(error.kind(), error.detail()).message().to_owned())
}

/// Says what would become of a call; by the policy of the form, where it has one. Changes nothing.
async fn test_policy(State(dashboard): State<Arc<Dashboard>>, sent: Sent) -> Shown {
    let (question, draft) = (question(&sent), draft(&sent)?);
    let (answer, problem) = match dashboard.asked_of_policies(&question, draft.as_ref()).await {
        Ok(answer) => (Some(answer), None),
        Err(error) => (None, Some(fault(error)?)),
    };
    say(&dashboard, &sent.session, Said { question, draft, answer, problem }).await
}

/// Saves a policy, in the place of the version that the form began with.
async fn save_policy(State(dashboard): State<Arc<Dashboard>>, context: Context, sent: Sent) -> Shown {
    let draft = draft(&sent)?.ok_or(DashboardError::Malformed)?;
    let (gateway, actor, now) = (&dashboard.gateway, &sent.session.actor, context.now.seconds());
    match gateway.save_rule(actor, now, &draft.name, draft.rule(), Some(draft.version)).await {
        Ok(saved) => Ok(see_other(&policies::path(&saved.name))),
        Err(error) => {
            let problem = Some(fault(error.into())?);
            let (question, draft) = (question(&sent), Some(draft));
            say(&dashboard, &sent.session, Said { question, draft, answer: None, problem }).await
        }
    }
}

/// Saves the version that the page has shown in another mode.
async fn set_policy_mode(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(name): Path<String>,
    sent: Sent,
) -> Shown {
    let (gateway, actor, now) = (&dashboard.gateway, &sent.session.actor, context.now.seconds());
    let shown = version(&sent)?;
    let rule = gateway.rule_versions(&name).await?.into_iter().find(|rule| rule.version == shown);
    let rule = rule.ok_or(DashboardError::Malformed)?;
    let mode = policies::mode(sent.field("mode")).ok_or(DashboardError::Malformed)?;
    let new = NewRule { text: rule.text, tool: rule.tool, mode };
    gateway.save_rule(actor, now, &name, new, Some(shown)).await?;
    Ok(see_other(&policies::path(&name)))
}

/// Its versions stay; the form has to say its name all the same.
async fn delete_policy(
    State(dashboard): State<Arc<Dashboard>>,
    context: Context,
    Path(name): Path<String>,
    sent: Sent,
) -> Shown {
    sent.names(&name)?;
    dashboard.gateway.delete_rule(&sent.session.actor, context.now.seconds(), &name).await?;
    Ok(see_other("/proxy/policies"))
}

async fn show_pki(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.pki_page(&session).await?)
}

async fn show_overlap(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.overlap_page(&session).await?)
}

/// There is no way back: the form has to name the organisation.
async fn settle_overlap(State(dashboard): State<Arc<Dashboard>>, sent: Sent) -> Shown {
    let org_id = dashboard.pki().authority().org_id.clone();
    sent.names(&org_id)?;
    let break_agents = sent.field("break_agents") == "yes";
    dashboard.health.updates.settle(break_agents, &sent.session.actor).await?;
    Ok(see_other("/proxy/pki"))
}

/// A certificate of ours as a file, by its fingerprint.
async fn show_certificate(
    State(dashboard): State<Arc<Dashboard>>,
    _viewer: Viewer,
    Path(fingerprint): Path<String>,
) -> Shown {
    let pem = dashboard.certificate_pem(&fingerprint)?;
    let name = format!("attachment; filename=\"{fingerprint}.pem\"");
    let name = HeaderValue::try_from(name).map_err(|_| DashboardError::Malformed)?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-pem-file")),
        (header::CONTENT_DISPOSITION, name),
    ];
    Ok((headers, pem).into_response())
}

async fn show_keys(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.keys_page(&session).await?)
}

async fn show_settings(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.settings_page(&session).await?)
}

async fn show_operators(State(dashboard): State<Arc<Dashboard>>, Viewer(session): Viewer) -> Shown {
    html(&dashboard.operators_page(&session).await?)
}

/// Shows the secret in the answer to the form: there is no address under which it could be asked for again.
async fn add_operator(State(dashboard): State<Arc<Dashboard>>, sent: Sent) -> Shown {
    let role = crate::operators::role(Some(sent.field("role")))?;
    let issued = dashboard.operators.add(sent.field("name"), role, &sent.session.actor).await?;
    html(&dashboard.issued_page(&sent.session, issued).await?)
}

async fn set_operator_role(
    State(dashboard): State<Arc<Dashboard>>,
    Path(name): Path<String>,
    sent: Sent,
) -> Shown {
    let role = crate::operators::role(Some(sent.field("role")))?;
    dashboard.operators.set_role(&name, role, &sent.session.actor).await?;
    Ok(see_other("/proxy/operators"))
}

async fn reset_operator(
    State(dashboard): State<Arc<Dashboard>>,
    Path(name): Path<String>,
    sent: Sent,
) -> Shown {
    let issued = dashboard.operators.reset_secret(&name, &sent.session.actor).await?;
    html(&dashboard.issued_page(&sent.session, issued).await?)
}

/// There is no way back: the form has to say whose name it is.
async fn deactivate_operator(
    State(dashboard): State<Arc<Dashboard>>,
    Path(name): Path<String>,
    sent: Sent,
) -> Shown {
    sent.names(&name)?;
    dashboard.operators.deactivate(&name, &sent.session.actor).await?;
    Ok(see_other("/proxy/operators"))
}

/// Ends what single sign-on has opened for somebody: their role is the provider's to take away.
async fn end_sso_sessions(State(dashboard): State<Arc<Dashboard>>, sent: Sent) -> Shown {
    let (store, actor) = (&dashboard.pki().store, sent.field("actor"));
    session::close_signed_on(store, actor, &sent.session.actor).await?;
    Ok(see_other("/proxy/operators"))
}

async fn show_audit(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Query(query): Query<AuditQuery>,
) -> Shown {
    html(&dashboard.audit_page(&session, &query, false).await?)
}

/// Changes nothing; a form all the same, because reading the whole log is not what a link should do.
async fn verify_audit(State(dashboard): State<Arc<Dashboard>>, sent: Sent) -> Shown {
    html(&dashboard.audit_page(&sent.session, &AuditQuery::default(), true).await?)
}

async fn show_audit_rows(
    State(dashboard): State<Arc<Dashboard>>,
    _viewer: Viewer,
    Query(query): Query<AuditQuery>,
) -> Shown {
    html(&dashboard.audit_rows(&query).await?)
}

async fn show_event(
    State(dashboard): State<Arc<Dashboard>>,
    Viewer(session): Viewer,
    Path(seq): Path<String>,
) -> Shown {
    let seq = seq.parse().map_err(|_| DashboardError::NotFound(format!("event {seq}")))?;
    html(&dashboard.event_page(&session, seq).await?)
}

/// Says that the log has grown; the page then fetches what it shows.
async fn follow_audit(State(dashboard): State<Arc<Dashboard>>, _viewer: Viewer) -> Shown {
    let heads = dashboard.follow_audit()?;
    let events = heads.map(|seq| Ok::<_, Infallible>(Event::default().data(seq.to_string())));
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

async fn show_asset(Path(name): Path<String>) -> Response {
    match assets::find(&name) {
        Some(asset) => (
            [
                (header::CONTENT_TYPE, asset.content_type),
                (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
            ],
            asset.content,
        )
            .into_response(),
        None => ApiError::new(Kind::NotFound, "Not Found").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_in_leads_only_to_pages_of_ours() {
        for good in ["/proxy", "/proxy/updates", "/proxy/audit?event_type=agent.created&before=3"] {
            assert_eq!(own_page(good), good);
        }
        for bad in [
            "",
            "//evil.example",
            "https://evil.example",
            "/proxyevil",
            "/proxy//evil.example",
            "/proxy/\\evil",
            "/proxy/\r\nX: y",
            "/",
            "javascript:alert(1)",
        ] {
            assert_eq!(own_page(bad), HOME, "{bad}");
        }
    }
}
