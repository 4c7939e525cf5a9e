//! What mesh-wg is to reach.

use crate::metric::METRICS;
use crate::program::OURS;
use crate::results::Results;

/// What our number is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Against {
    /// The same number of another program; the limit is for the ratio ours : theirs.
    Program(&'static str),
    /// Another number of our own; the limit is for the ratio.
    Metric(&'static str),
    /// Nothing: the limit is for the number itself.
    Nothing,
}

/// One thing to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bar {
    pub(crate) suite: &'static str,
    pub(crate) metric: &'static str,
    pub(crate) against: Against,
    pub(crate) limit: f64,
}

const fn beside(metric: &'static str, program: &'static str, limit: f64) -> Bar {
    Bar { suite: "v4", metric, against: Against::Program(program), limit }
}

const GO: &str = "wireguard-go";

/// All of them. Whether the limit is the least or the most follows from what is better.
pub(crate) const BARS: &[Bar] = &[
    beside("tcp1_gbps", GO, 1.9),
    beside("tcp4_gbps", GO, 1.9),
    beside("reverse_gbps", GO, 1.9),
    beside("tcp1_cpu_s_per_gb", GO, 0.5),
    beside("udp64_kpps", GO, 4.0),
    beside("udp64_cpu_us", GO, 0.2),
    beside("ping_avg_ms", GO, 1.0),
    beside("ping_loaded_avg_ms", GO, 1.0),
    beside("tcp1_gbps", "boringtun-cli", 6.0),
    Bar {
        suite: "many-peers",
        metric: "receive_many_cpu_us",
        against: Against::Metric("receive1_cpu_us"),
        limit: 1.3,
    },
    Bar {
        suite: "many-peers",
        metric: "send_many_cpu_us",
        against: Against::Metric("send1_cpu_us"),
        limit: 1.3,
    },
    Bar {
        suite: "many-peers",
        metric: "receive_many_cpu_us",
        against: Against::Metric("receive1_apart_cpu_us"),
        limit: 1.3,
    },
    Bar {
        suite: "many-peers",
        metric: "send_many_cpu_us",
        against: Against::Metric("send1_apart_cpu_us"),
        limit: 1.3,
    },
    Bar { suite: "idle-peers", metric: "peers1000_idle_cpu", against: Against::Nothing, limit: 0.5 },
    Bar { suite: "hostile", metric: "flood_ratio", against: Against::Nothing, limit: 0.7 },
    Bar { suite: "hostile", metric: "replay_ratio", against: Against::Nothing, limit: 0.7 },
];

/// How a bar came out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) bar: Bar,
    /// The ratio or number; `None` where a side of it is missing.
    pub(crate) reached: Option<f64>,
    /// Whether the limit is the least to reach and not the most.
    pub(crate) at_least: bool,
}

impl Outcome {
    /// Whether it is met; `None` where it could not be told.
    pub(crate) fn met(&self) -> Option<bool> {
        self.reached
            .map(|reached| if self.at_least { reached >= self.bar.limit } else { reached <= self.bar.limit })
    }

    /// As one line.
    pub(crate) fn describe(&self) -> String {
        let verdict = match self.met() {
            Some(true) => "met    ",
            Some(false) => "NOT MET",
            None => "unknown",
        };
        let title = |id: &str| {
            METRICS.iter().find(|metric| metric.id == id).map_or(id.to_owned(), |m| m.title.into())
        };
        let against = match self.bar.against {
            Against::Program(program) => format!(", against {program}"),
            Against::Metric(metric) => format!(", against {}", title(metric)),
            Against::Nothing => String::new(),
        };
        let sign = if self.at_least { "≥" } else { "≤" };
        let reached = self.reached.map_or("-".into(), |reached| format!("{reached:.2}"));
        format!("{verdict}  {reached:>6} {sign} {:<4} {}{against}", self.bar.limit, title(self.bar.metric))
    }
}

/// `ours : theirs`, if both are known and it means something.
pub(crate) fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    let (ours, theirs) = (ours?, theirs?);
    (theirs > 0.0).then(|| ours / theirs).filter(|ratio| ratio.is_finite())
}

/// How all bars came out whose suite was run.
pub(crate) fn outcomes(results: &Results) -> Vec<Outcome> {
    let ran = results.suites();
    let outcome = |bar: &Bar| {
        let of = |metric, program| results.summary(bar.suite, metric, program).median();
        let own = of(bar.metric, OURS);
        let reached = match bar.against {
            Against::Program(program) => ratio(own, of(bar.metric, program)),
            Against::Metric(metric) => ratio(own, of(metric, OURS)),
            Against::Nothing => own,
        };
        let at_least = METRICS.iter().any(|metric| metric.id == bar.metric && metric.higher_is_better);
        Outcome { bar: *bar, reached, at_least }
    };
    BARS.iter().filter(|bar| ran.contains(bar.suite)).map(outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::results;

    fn reached(results: &Results, metric: &str) -> (Option<f64>, Option<bool>) {
        let outcomes = outcomes(results);
        let outcome = outcomes.iter().find(|outcome| outcome.bar.metric == metric).unwrap();
        (outcome.reached, outcome.met())
    }

    #[test]
    fn more_and_less_are_judged_each_their_way() {
        let results = results(&[
            ("v4", "tcp1_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp1_gbps", "wireguard-go", Some(2.5)),
            ("v4", "tcp1_cpu_s_per_gb", "mesh-wg", Some(3.0)),
            ("v4", "tcp1_cpu_s_per_gb", "wireguard-go", Some(5.0)),
            ("many-peers", "receive_many_cpu_us", "mesh-wg", Some(4.0)),
            ("many-peers", "receive1_cpu_us", "mesh-wg", Some(4.0)),
            ("hostile", "flood_ratio", "mesh-wg", Some(0.5)),
        ]);
        assert_eq!(reached(&results, "tcp1_gbps"), (Some(2.0), Some(true)));
        assert_eq!(reached(&results, "tcp1_cpu_s_per_gb"), (Some(0.6), Some(false)));
        assert_eq!(reached(&results, "receive_many_cpu_us"), (Some(1.0), Some(true)));
        assert_eq!(reached(&results, "flood_ratio"), (Some(0.5), Some(false)));
    }

    #[test]
    fn what_is_missing_or_failed_is_neither_met_nor_not() {
        let results = results(&[
            ("v4", "tcp1_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp1_gbps", "wireguard-go", None),
            ("v4", "tcp4_gbps", "mesh-wg", Some(5.0)),
            ("v4", "tcp4_gbps", "wireguard-go", Some(0.0)),
        ]);
        assert_eq!(reached(&results, "tcp1_gbps"), (None, None));
        assert_eq!(reached(&results, "tcp4_gbps"), (None, None));
        assert!(
            outcomes(&results).iter().all(|outcome| outcome.bar.suite == "v4"),
            "other suites were not run"
        );
    }

    #[test]
    fn every_bar_is_about_a_metric_that_exists() {
        for bar in BARS {
            let known = |id: &str| METRICS.iter().any(|metric| metric.id == id);
            assert!(
                METRICS.iter().any(|metric| metric.id == bar.metric && metric.compared),
                "{}",
                bar.metric
            );
            assert!(crate::metric::SUITES.iter().any(|suite| suite.name == bar.suite), "{}", bar.suite);
            if let Against::Metric(metric) = bar.against {
                assert!(known(metric), "{metric}");
            }
        }
    }
}
