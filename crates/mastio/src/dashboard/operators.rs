//! `/proxy/operators`: who may act on this deploy, for those who manage them.

use askama::Template;

use super::error::DashboardError;
use super::{Dashboard, Frame, urlencoded};
use crate::http::authn::{Role, Session};
use crate::operators::{Issued, Operator};

/// `/proxy/operators`.
#[derive(Template)]
#[template(path = "operators.html")]
pub(super) struct OperatorsPage {
    frame: Frame,
    operators: Vec<Operator>,
    /// Who is signed in by single sign-on: name, role, last seen.
    signed_on: Vec<(String, String, String)>,
}

/// What is shown once a secret has been made, and never again.
#[derive(Template)]
#[template(path = "issued.html")]
pub(super) struct IssuedPage {
    frame: Frame,
    issued: Issued,
}

/// Where the forms about an operator go.
pub(super) fn path(operator: &Operator) -> String {
    format!("/proxy/operators/{}", urlencoded(&operator.name))
}

impl Dashboard {
    pub(super) async fn operators_page(&self, session: &Session) -> Result<OperatorsPage, DashboardError> {
        let mut operators = self.operators.list().await?;
        // Those who are gone come last; their names stay taken.
        operators.sort_by_key(|operator| operator.deactivated_at.is_some());
        let now = self.pki().clock.now().seconds();
        let signed_on = super::session::signed_on(&self.pki().store, now).await?;
        let frame = self.frame(Some(session), "operators", "Operators").await?;
        Ok(OperatorsPage { frame, operators, signed_on })
    }

    pub(super) async fn issued_page(
        &self,
        session: &Session,
        issued: Issued,
    ) -> Result<IssuedPage, DashboardError> {
        let frame = self.frame(Some(session), "operators", "A new secret").await?;
        Ok(IssuedPage { frame, issued })
    }
}
