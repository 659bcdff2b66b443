//! `/proxy/setup`: the first page of a new organisation, for whoever can read its log.

use askama::Template;

use super::error::DashboardError;
use super::{Dashboard, Frame};
use crate::operators::Issued;

/// `/proxy/setup`.
#[derive(Template)]
#[template(path = "setup.html")]
pub(super) struct SetupPage {
    frame: Frame,
    fingerprint: String,
    problem: Option<String>,
}

/// What is shown once the set-up is done, and never again.
#[derive(Template)]
#[template(path = "set_up.html")]
pub(super) struct SetUpPage {
    frame: Frame,
    fingerprint: String,
    organisation: String,
    command: String,
    issued: Issued,
}

impl Dashboard {
    fn ca_fingerprint(&self) -> String {
        self.pki().authority().org_ca.fingerprint()
    }

    /// The form. Errors: [`DashboardError::NotFound`] where there is nothing to set up.
    pub(super) async fn setup_page(&self, problem: Option<String>) -> Result<SetupPage, DashboardError> {
        if !self.operators.is_setup_open().await? {
            return Err(DashboardError::NotFound("set-up: this deploy has its operators already".to_owned()));
        }
        let frame = self.frame(None, "", "Set up").await?;
        Ok(SetupPage { frame, fingerprint: self.ca_fingerprint(), problem })
    }

    pub(super) async fn set_up_page(
        &self,
        organisation: &str,
        issued: Issued,
    ) -> Result<SetUpPage, DashboardError> {
        let frame = self.frame(None, "", "Set up").await?;
        Ok(SetUpPage {
            frame,
            fingerprint: self.ca_fingerprint(),
            organisation: organisation.to_owned(),
            command: format!(
                "curl -sk https://localhost:9443/v1/admin/operators -H \"X-Admin-Secret: {}:$SECRET\" | jq",
                issued.name
            ),
            issued,
        })
    }
}
