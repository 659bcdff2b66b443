//! The forms of ordinary OAuth clients: names and values, each name once.

use super::error::GrantError;

/// Parameters of a form, at most. The longest request of any client has a dozen.
const PARAMETERS_MAX: usize = 32;
/// Parameters that a client may repeat (RFC 8707 §2).
const REPEATABLE: [&str; 2] = ["resource", "audience"];

/// A form, as parameters in the order in which they came.
#[derive(Debug)]
pub struct Form(Vec<(String, String)>);

impl Form {
    /// Reads a form.
    ///
    /// Errors: [`GrantError::Form`]; [`GrantError::Repeated`], because two readers of such a form would not agree.
    /// An empty value counts as absent.
    /// Source: RFC 6749 §3.2.
    pub fn parse(body: &[u8]) -> Result<Self, GrantError> {
        // Percent-encoded bytes that are no UTF-8 would be replaced by the reader, so that two texts become one.
        let text = std::str::from_utf8(body).map_err(|_| GrantError::Form(PARAMETERS_MAX))?;
        let parameters: Vec<(String, String)> = form_urlencoded::parse(text.as_bytes())
            .take(PARAMETERS_MAX + 1)
            .map(|(name, value)| (name.into_owned(), value.into_owned()))
            .collect();
        let unreadable = |(name, value): &(String, String)| {
            [name, value].into_iter().any(|text| text.contains(['\u{fffd}', '\0']))
        };
        if parameters.len() > PARAMETERS_MAX || parameters.iter().any(unreadable) {
            return Err(GrantError::Form(PARAMETERS_MAX));
        }
        for (at, (name, _)) in parameters.iter().enumerate() {
            let repeated = parameters.iter().skip(at + 1).any(|(other, _)| other == name);
            if repeated && !REPEATABLE.contains(&name.as_str()) {
                return Err(GrantError::Repeated(name.chars().take(64).collect()));
            }
        }
        Ok(Self(parameters.into_iter().filter(|(_, value)| !value.is_empty()).collect()))
    }

    /// The value of a parameter.
    #[must_use]
    pub fn get(&self, name: &'static str) -> Option<&str> {
        self.all(name).next()
    }

    /// The value of a parameter that must be there.
    pub fn require(&self, name: &'static str) -> Result<&str, GrantError> {
        self.get(name).ok_or(GrantError::Missing(name))
    }

    /// Every value of a parameter that may be repeated.
    pub fn all(&self, name: &'static str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(other, _)| other == name).map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_form_gives_each_parameter_once() {
        let form =
            Form::parse(b"grant_type=client_credentials&scope=&a=1%202+3&resource=x&resource=y").unwrap();
        assert_eq!(form.get("grant_type"), Some("client_credentials"));
        assert_eq!(form.get("scope"), None, "an empty value is none");
        assert_eq!(form.get("a"), Some("1 2 3"));
        assert_eq!(form.all("resource").collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(form.require("token"), Err(GrantError::Missing("token")));
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let too_many = (0..33).map(|n| format!("p{n}=1")).collect::<Vec<_>>().join("&");
        for (name, body) in [
            ("twice", &b"client_id=a&client_id=b"[..]),
            ("twice, once empty", b"client_id=a&client_id="),
            ("not utf-8", b"client_id=\xff"),
            ("escaped and not utf-8", b"client_id=%ff"),
            ("nul", b"client_id=a%00b"),
            ("too many", too_many.as_bytes()),
        ] {
            assert!(Form::parse(body).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(body: Vec<u8>) {
            let _ = Form::parse(&body);
        }
    }
}
