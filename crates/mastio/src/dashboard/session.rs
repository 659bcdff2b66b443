//! Sessions: opened by an operator's secret, carried by a cookie, ended by time, by sign-out, or by another secret.
//!
//! The cookie is 256 random bits. The database knows only their digest under the admin secret, and the CSRF token is
//! another such digest. So nobody who reads or writes the database gets in, and a changed shared secret ends every
//! session. What its operator may do is asked anew for each request, so a deactivated one has no session any more. Only
//! a session of single sign-on holds its role itself, as the provider gave it at the sign-in, and ends with the session.

use std::net::IpAddr;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde_json::{Value, json};

use super::store as rows;
use crate::entropy::Entropy;
use crate::http::authn::{AdminCaller, AdminSecret, Role, Session};
use crate::operators::Operators;
use crate::store::{Store, StoreError};

/// A session that nobody has used for so long is over.
const IDLE_S: i64 = 30 * 60;
/// A session is over so long after its sign-in, used or not.
const ABSOLUTE_S: i64 = 12 * 3600;
/// A sign of life is written at most so often: reading pages must not mean writing.
const TOUCH_S: i64 = 60;

fn id(secret: &AdminSecret, token: &str) -> String {
    secret.keyed_digest("session", token)
}

/// The part of a session's id that the audit log shows, so that sign-in and sign-out can be matched.
fn shown(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Who signs in. `role`: for those whose role nobody else keeps.
pub(super) struct Who<'a> {
    pub actor: &'a str,
    pub role: Option<Role>,
}

/// Opens a session and ends the one that the browser had before, so that no id outlives a sign-in. Gives the cookie's
/// value.
pub(super) async fn open(
    store: &Store,
    secret: &AdminSecret,
    entropy: &Entropy,
    former: Option<&str>,
    who: Who<'_>,
    address: IpAddr,
    now: UnixTime,
) -> Result<String, StoreError> {
    let actor = who.actor;
    let token = entropy.text::<32>();
    let new = id(secret, &token);
    let mut tx = store.write().await?;
    if let Some(former) = former {
        rows::delete(&mut tx, &id(secret, former)).await?;
    }
    rows::delete_ended(&mut tx, now.0 - ABSOLUTE_S, now.0 - IDLE_S).await?;
    rows::insert(&mut tx, &new, actor, who.role, &address.to_string(), now.0).await?;
    let mut details = json!({ "session": shown(&new), "address": address.to_string() });
    if let Some(role) = who.role {
        details["single_sign_on"] = json!(true);
        details["role"] = json!(role.as_str());
    }
    tx.commit(&[Event { event_type: EventType::DashboardLogin, actor: actor.to_owned(), details }]).await?;
    Ok(token)
}

/// The live session of a cookie, if there is one. Notes the sign of life.
pub(super) async fn find(
    store: &Store,
    secret: &AdminSecret,
    operators: &Operators,
    token: &str,
    now: UnixTime,
) -> Result<Option<Session>, StoreError> {
    let id = id(secret, token);
    let row = rows::session(&mut store.read().await?, &id).await?;
    let Some(row) = row.filter(|row| now.0 - row.created_at < ABSOLUTE_S && now.0 - row.seen_at < IDLE_S)
    else {
        return Ok(None);
    };
    let caller = match row.role {
        None => operators.standing(&row.actor).await?,
        Some(role) => Role::parse(&role).map(|role| AdminCaller { actor: row.actor, role }),
    };
    let Some(caller) = caller else { return Ok(None) };
    if now.0 - row.seen_at >= TOUCH_S {
        let mut tx = store.write().await?;
        rows::touch(&mut tx, &id, now.0).await?;
        tx.commit_unaudited().await?;
    }
    Ok(Some(Session {
        actor: caller.actor,
        role: caller.role,
        csrf_token: secret.keyed_digest("csrf", token),
    }))
}

/// Ends a session.
pub(super) async fn close(
    store: &Store,
    secret: &AdminSecret,
    token: &str,
    actor: &str,
) -> Result<(), StoreError> {
    let id = id(secret, token);
    let mut tx = store.write().await?;
    if !rows::delete(&mut tx, &id).await? {
        return Ok(());
    }
    let event = Event {
        event_type: EventType::DashboardLogout,
        actor: actor.to_owned(),
        details: json!({ "session": shown(&id) }),
    };
    tx.commit(&[event]).await.map(drop)
}

/// Ends every session that single sign-on has opened for `actor`; nothing where there is none.
pub(super) async fn close_signed_on(store: &Store, actor: &str, by: &str) -> Result<(), StoreError> {
    let mut tx = store.write().await?;
    if !rows::delete_signed_on(&mut tx, actor).await? {
        return Ok(());
    }
    let event = Event {
        event_type: EventType::DashboardLogout,
        actor: by.to_owned(),
        details: json!({ "ended_for": actor, "single_sign_on": true }),
    };
    tx.commit(&[event]).await.map(drop)
}

/// Who is signed in by single sign-on now: their name, their role, and when they were last seen.
pub(super) async fn signed_on(
    store: &Store,
    now: UnixTime,
) -> Result<Vec<(String, String, String)>, StoreError> {
    /// A page has no room for more.
    const LISTED_MAX: i64 = 200;
    let (created_after, seen_after) = (now.0 - ABSOLUTE_S, now.0 - IDLE_S);
    let rows = rows::signed_on(&mut store.read().await?, created_after, seen_after, LISTED_MAX).await?;
    Ok(rows.into_iter().map(|row| (row.actor, row.role, UnixTime(row.seen_at).to_rfc3339())).collect())
}

/// Records a refused sign-in.
pub(super) async fn refused(store: &Store, address: IpAddr, details: Value) -> Result<(), StoreError> {
    let mut all = json!({ "address": address.to_string() });
    if let (Some(all), Some(details)) = (all.as_object_mut(), details.as_object()) {
        all.extend(details.clone());
    }
    let event =
        Event { event_type: EventType::DashboardLoginFailed, actor: "unknown".to_owned(), details: all };
    store.write().await?.commit(&[event]).await.map(drop)
}
