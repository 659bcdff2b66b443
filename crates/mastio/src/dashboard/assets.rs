//! What pages load: embedded, and served under names that hold a digest of the content, so that browsers keep them
//! for good and never mix two versions.

use std::sync::LazyLock;

/// A file that pages load.
pub struct Asset {
    /// `<stem>.<digest>.<extension>`.
    pub name: String,
    /// Its `Content-Type`.
    pub content_type: &'static str,
    /// Its content.
    pub content: &'static str,
}

impl Asset {
    fn new(stem: &str, extension: &str, content_type: &'static str, content: &'static str) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, content.as_bytes());
        let digest: String = crate::pki::store::hex(digest.as_ref()).chars().take(16).collect();
        Self { name: format!("{stem}.{digest}.{extension}"), content_type, content }
    }

    /// Where it is served.
    #[must_use]
    pub fn url(&self) -> String {
        format!("/proxy/assets/{}", self.name)
    }
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The stylesheet.
pub static STYLE: LazyLock<Asset> = LazyLock::new(|| {
    Asset::new("mastio", "css", "text/css; charset=utf-8", include_str!("assets/mastio.css"))
});
/// Our own script: copying, local times.
pub static OWN_SCRIPT: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("mastio", "js", SCRIPT, include_str!("assets/mastio.js")));
/// htmx (0BSD, `assets/htmx-LICENSE`), as npm has it.
pub static HTMX: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("htmx", "js", SCRIPT, include_str!("assets/htmx-2.0.11.min.js")));
/// The icon.
pub static ICON: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("mastio", "svg", "image/svg+xml", include_str!("assets/mastio.svg")));

/// The asset of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Asset> {
    [&*STYLE, &*OWN_SCRIPT, &*HTMX, &*ICON].into_iter().find(|asset| asset.name == name)
}
