//! By which URLs a request may name us: what a DPoP proof's `htu` is compared with.

use axum::http::{HeaderMap, header};

/// The configured public URL, and the hosts under which we are reached besides.
#[derive(Debug, Clone)]
pub struct ExternalUrls {
    public_url: Option<String>,
    hosts: Vec<String>,
}

impl ExternalUrls {
    /// `public_url` without trailing slash; `hosts` as names or addresses without port.
    #[must_use]
    pub fn new(public_url: Option<String>, hosts: Vec<String>) -> Self {
        Self { public_url, hosts }
    }

    /// The URL by which this caller knows us, without path: the configured one, else the request's own host where that is
    /// ours. Nothing under any other host: what we say of ourselves must not be dictated by a header.
    #[must_use]
    pub fn base(&self, headers: &HeaderMap) -> Option<String> {
        self.of(headers, "").into_iter().next()
    }

    /// Every acceptable external URL of a request for `path`.
    ///
    /// The `Host` header is believed only where its host is one of ours: a proof made for another server's URL must
    /// not fit because its request was sent on to us.
    #[must_use]
    pub fn of(&self, headers: &HeaderMap, path: &str) -> Vec<String> {
        let mut urls = Vec::with_capacity(2);
        if let Some(public_url) = &self.public_url {
            urls.push(format!("{public_url}{path}"));
        }
        if let Some(authority) = headers.get(header::HOST).and_then(|value| value.to_str().ok()) {
            let host = match authority.rsplit_once(':') {
                Some((host, port)) if port.chars().all(|c| c.is_ascii_digit()) => host,
                _ => authority,
            };
            let host = host.trim_start_matches('[').trim_end_matches(']');
            if self.hosts.iter().any(|ours| ours.eq_ignore_ascii_case(host)) {
                urls.push(format!("https://{authority}{path}"));
            }
        }
        urls
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn urls(host: &str) -> Vec<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        let hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        ExternalUrls::new(Some("https://mastio.example.com".to_owned()), hosts).of(&headers, "/v1/mcp")
    }

    #[test]
    fn the_public_url_and_our_own_hosts_are_accepted() {
        assert_eq!(
            urls("localhost:9443"),
            ["https://mastio.example.com/v1/mcp", "https://localhost:9443/v1/mcp"]
        );
        assert_eq!(urls("[::1]:9443")[1], "https://[::1]:9443/v1/mcp");
    }

    #[test]
    fn we_are_called_by_the_configured_url_or_by_a_host_of_ours() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "localhost:9443".parse().unwrap());
        let configured = ExternalUrls::new(Some("https://mastio.example.com".to_owned()), Vec::new());
        assert_eq!(configured.base(&headers).unwrap(), "https://mastio.example.com");
        let ours = ExternalUrls::new(None, vec!["localhost".to_owned()]);
        assert_eq!(ours.base(&headers).unwrap(), "https://localhost:9443");
        headers.insert(header::HOST, "evil.example.com".parse().unwrap());
        assert_eq!(ours.base(&headers), None);
    }

    #[test]
    fn another_server_s_host_is_not_accepted() {
        assert_eq!(urls("evil.example.com"), ["https://mastio.example.com/v1/mcp"]);
    }
}
