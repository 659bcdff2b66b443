//! Charts, drawn by the server as SVG: no script, no style attribute, a sentence for those who do not see it.

use std::time::Duration;

use crate::metrics::recent::Hour;

/// Units of the drawing: a minute is so wide, and the highest bar so high.
const MINUTE_WIDTH: u32 = 10;
const HEIGHT: u32 = 60;

/// One minute's bar: how high, and how much of it failed.
pub(super) struct Bar {
    pub x: u32,
    pub height: u32,
    pub failed: u32,
}

/// A rate over the last hour.
pub(super) struct Chart {
    pub title: &'static str,
    /// Where what is drawn comes from.
    pub href: &'static str,
    /// Where what failed of it comes from.
    pub failures: &'static str,
    pub bars: Vec<Bar>,
    pub total: u64,
    pub failed: u64,
    /// The most in one minute: what the highest bar stands for.
    pub most: u32,
    pub median: String,
    pub p99: String,
}

impl Chart {
    pub fn of(title: &'static str, href: &'static str, failures: &'static str, hour: &Hour) -> Self {
        let most = hour.answered.iter().copied().max().unwrap_or(0);
        let scaled = |count: u32| {
            if count == 0 {
                return 0;
            }
            // What happened at all is seen.
            u64::from(count)
                .saturating_mul(u64::from(HEIGHT))
                .checked_div(u64::from(most))
                .and_then(|height| u32::try_from(height).ok())
                .unwrap_or(HEIGHT)
                .max(1)
        };
        let bars = (0..).zip(hour.answered.iter().zip(&hour.failed));
        Self {
            title,
            href,
            failures,
            bars: bars
                .filter(|(_, (answered, _))| **answered > 0)
                .map(|(minute, (answered, failed))| Bar {
                    x: minute * MINUTE_WIDTH,
                    height: scaled(*answered),
                    failed: scaled(*failed),
                })
                .collect(),
            total: hour.total(),
            failed: hour.failed.iter().map(|&count| u64::from(count)).sum(),
            most,
            median: words(hour.median),
            p99: words(hour.p99),
        }
    }

    /// Where a bar of this height begins: SVG counts from above.
    pub fn top(&self, height: &u32) -> u32 {
        HEIGHT.saturating_sub(*height)
    }
}

fn words(time: Option<Duration>) -> String {
    match time {
        None => "—".to_owned(),
        Some(time) if time < Duration::from_millis(1) => format!("{} µs", time.as_micros()),
        Some(time) if time < Duration::from_secs(1) => format!("{} ms", time.as_millis()),
        Some(time) => format!("{} s", time.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::recent::MINUTES;

    #[test]
    fn bars_are_scaled_to_the_busiest_minute_and_a_single_request_is_seen() {
        let mut hour = Hour { answered: [0; MINUTES], failed: [0; MINUTES], median: None, p99: None };
        hour.answered[0] = 1;
        hour.answered[59] = 6000;
        hour.failed[59] = 3000;
        let chart = Chart::of("Tokens", "/proxy/audit", "/proxy/audit", &hour);
        let drawn: Vec<_> = chart.bars.iter().map(|bar| (bar.x, bar.height, bar.failed)).collect();
        assert_eq!(drawn, [(0, 1, 0), (590, 60, 30)]);
        assert_eq!((chart.total, chart.failed, chart.most), (6001, 3000, 6000));
        assert_eq!(chart.median, "—");
    }

    #[test]
    fn times_are_read_in_the_unit_that_fits() {
        assert_eq!(words(Some(Duration::from_micros(250))), "250 µs");
        assert_eq!(words(Some(Duration::from_micros(2500))), "2 ms");
        assert_eq!(words(Some(Duration::from_secs(10))), "10 s");
    }
}
