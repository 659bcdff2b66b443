//! Sessions: opened by an operator's secret, carried by a cookie, ended by time, by sign-out, or by another secret.
//!
//! The cookie is 256 random bits. The database knows only their digest under the admin secret, and the CSRF token is
//! another such digest. So nobody who reads or writes the database gets in, and a changed shared secret ends every
//! session. What its operator may do is asked anew for each request, so a deactivated one has no session any more.

use std::net::IpAddr;

use mastio_core::audit::event::{Event, EventType};
use mastio_core::time::UnixTime;
use serde_json::json;

use super::store as rows;
use crate::entropy::Entropy;
use crate::http::authn::{AdminSecret, Session};
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

/// Opens a session and ends the one that the browser had before, so that no id outlives a sign-in. Gives the cookie's
/// value.
pub(super) async fn open(
    store: &Store,
    secret: &AdminSecret,
    entropy: &Entropy,
    former: Option<&str>,
    actor: &str,
    address: IpAddr,
    now: UnixTime,
) -> Result<String, StoreError> {
    let token = entropy.text::<32>();
    let new = id(secret, &token);
    let mut tx = store.write().await?;
    if let Some(former) = former {
        rows::delete(&mut tx, &id(secret, former)).await?;
    }
    rows::delete_ended(&mut tx, now.0 - ABSOLUTE_S, now.0 - IDLE_S).await?;
    rows::insert(&mut tx, &new, actor, &address.to_string(), now.0).await?;
    tx.commit(&[Event {
        event_type: EventType::DashboardLogin,
        actor: actor.to_owned(),
        details: json!({ "session": shown(&new), "address": address.to_string() }),
    }])
    .await?;
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
    let Some(caller) = operators.standing(&row.actor).await? else { return Ok(None) };
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

/// Records a refused sign-in.
pub(super) async fn refused(store: &Store, address: IpAddr, failures: u32) -> Result<(), StoreError> {
    let event = Event {
        event_type: EventType::DashboardLoginFailed,
        actor: "unknown".to_owned(),
        details: json!({ "address": address.to_string(), "failures": failures }),
    };
    store.write().await?.commit(&[event]).await.map(drop)
}
