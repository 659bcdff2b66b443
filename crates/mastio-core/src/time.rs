//! Instants as whole seconds and microseconds since the Unix epoch. Arithmetic and text only; never "now".

use jiff::{Timestamp, tz::TimeZone};

/// Whole seconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(pub i64);

impl UnixTime {
    /// The instant `seconds` later (earlier when negative), saturating at the ends.
    #[must_use]
    pub fn plus(self, seconds: i64) -> Self {
        Self(self.0.saturating_add(seconds))
    }

    /// Seconds from `earlier` to `self`, negative when `self` is the earlier one.
    #[must_use]
    pub fn since(self, earlier: Self) -> i64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The form the operator's page shows: `2026-04-23T19:08:12Z`.
    #[must_use]
    pub fn to_rfc3339(self) -> String {
        Timestamp::from_second(self.0).unwrap_or(Timestamp::MAX).to_string()
    }

    /// Reads RFC 3339 text, with or without microseconds, with `Z` or an offset.
    ///
    /// The predecessor's `2026-11-23T14:14:24.313041+00:00` is one such form; a fraction is dropped.
    /// Errors: `None` when the text is no timestamp.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(timestamp) = text.parse::<Timestamp>() {
            return Some(Self(timestamp.as_second()));
        }
        // A few legacy columns hold local-less text; the predecessor wrote UTC everywhere.
        let civil: jiff::civil::DateTime = text.parse().ok()?;
        TimeZone::UTC.to_timestamp(civil).ok().map(|timestamp| Self(timestamp.as_second()))
    }
}

/// Microseconds since 1970-01-01T00:00:00Z, for audit events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMicros(pub i64);

impl UnixMicros {
    /// RFC 3339 with exactly six digits of fraction: `2026-04-23T19:08:12.000417Z`.
    #[must_use]
    pub fn to_rfc3339(self) -> String {
        let timestamp = Timestamp::from_microsecond(self.0).unwrap_or(Timestamp::MAX);
        format!("{timestamp:.6}")
    }

    /// The same instant in whole seconds, rounded down.
    #[must_use]
    pub fn seconds(self) -> UnixTime {
        UnixTime(self.0.div_euclid(1_000_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_s_form_and_the_predecessor_s_forms_are_read() {
        let expected = Some(UnixTime(1_776_971_061));
        for text in [
            "2026-04-23T19:04:21Z",
            "2026-04-23T19:04:21.313041+00:00",
            "2026-04-23T19:04:21",
            "2026-04-23 19:04:21",
        ] {
            assert_eq!(UnixTime::parse(text), expected, "{text}");
        }
        assert_eq!(UnixTime::parse("yesterday"), None);
    }

    #[test]
    fn times_are_written_as_the_page_shows_them() {
        assert_eq!(UnixTime(1_776_971_061).to_rfc3339(), "2026-04-23T19:04:21Z");
        assert_eq!(UnixMicros(1_776_971_061_000_417).to_rfc3339(), "2026-04-23T19:04:21.000417Z");
    }
}
