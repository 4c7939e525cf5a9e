//! Runs of all programs in turn, round by round.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use crate::lab::{Family, Pair};
use crate::measure::{self, Measurement, Numbers, Settings};
use crate::results::{Results, Sample};
use crate::stop::Stop;

/// A run in progress: takes down samples and tells how far it is.
pub(crate) struct Run {
    pub(crate) results: Results,
    pub(crate) stop: Stop,
    file: PathBuf,
    began: Instant,
    expected: f64,
}

/// A suite on tunnels between two devices of the same kind.
pub(crate) struct TunnelSuite<'a> {
    pub(crate) name: &'static str,
    pub(crate) family: Family,
    pub(crate) mtu: u32,
    pub(crate) rounds: u32,
    pub(crate) measurements: &'a [Measurement],
}

// Making two hosts, starting and configuring two devices.
const PAIR_SECONDS: f64 = 0.4;

impl TunnelSuite<'_> {
    /// Roughly how long it takes, in seconds.
    pub(crate) fn expected_seconds(&self, programs: usize, seconds: u64) -> f64 {
        let once: f64 = self.measurements.iter().map(|m| m.expected_seconds(seconds)).sum();
        let search = if self.measurements.contains(&Measurement::Udp64Rate) { 3.0 } else { 0.0 };
        programs as f64 * (f64::from(self.rounds) * (once + PAIR_SECONDS) + search)
    }

    /// Runs it. A round goes through the measurements, and each measurement through the programs, so that a machine
    /// that slows down slows all of them.
    pub(crate) fn run(&self, run: &mut Run) -> Result<()> {
        for round in 1..=self.rounds {
            let pairs = self.pairs(run, round)?;
            for measurement in self.measurements {
                if *measurement == Measurement::Udp64Rate && run.results.setup.udp_rate.is_none() {
                    run.results.setup.udp_rate = self.find_rate(run, &pairs);
                }
                for (program, pair) in &pairs {
                    let setup = &run.results.setup;
                    let settings = Settings { seconds: setup.seconds, udp_rate: setup.udp_rate };
                    let numbers = measurement.run(pair, settings);
                    let what = Taken {
                        suite: self.name,
                        program,
                        round,
                        of: self.rounds,
                        metrics: measurement.metrics(),
                    };
                    run.take(&what, numbers)?;
                }
            }
            run.save()?;
        }
        Ok(())
    }

    fn pairs(&self, run: &mut Run, round: u32) -> Result<Vec<(String, Pair)>> {
        let mut pairs = Vec::new();
        for program in run.results.programs.clone() {
            match Pair::new(&run.stop, &program, self.family, self.mtu) {
                Ok(pair) => pairs.push((program.name, pair)),
                Err(error) => {
                    let metrics: Vec<&str> =
                        self.measurements.iter().flat_map(|m| m.metrics()).copied().collect();
                    let what = Taken {
                        suite: self.name,
                        program: &program.name,
                        round,
                        of: self.rounds,
                        metrics: &metrics,
                    };
                    run.take(&what, Err(error))?;
                }
            }
        }
        Ok(pairs)
    }

    // Below what the slowest of them delivered in a flood, and no more than is plenty to measure by.
    fn find_rate(&self, run: &Run, pairs: &[(String, Pair)]) -> Option<u64> {
        const MOST: f64 = 40_000.0;
        let delivered = |(program, _): &(String, Pair)| {
            run.results.summary(self.name, "udp64_kpps", program).median().map(|kpps| kpps * 1e3 * 0.8)
        };
        let most = pairs.iter().filter_map(delivered).fold(MOST, f64::min);
        let pairs: Vec<&Pair> = pairs.iter().map(|(_, pair)| pair).collect();
        measure::sustained_rate(&pairs, most as u64)
    }
}

/// What a set of numbers is about.
pub(crate) struct Taken<'a> {
    pub(crate) suite: &'a str,
    pub(crate) program: &'a str,
    pub(crate) round: u32,
    pub(crate) of: u32,
    /// What is missing if it failed.
    pub(crate) metrics: &'a [&'static str],
}

impl Run {
    /// A run that is expected to last this many seconds.
    pub(crate) fn new(results: Results, stop: Stop, file: PathBuf, expected: f64) -> Run {
        Run { results, stop, file, began: Instant::now(), expected }
    }

    /// Takes down numbers or a failure. The only error is the user's wish to stop.
    pub(crate) fn take(&mut self, what: &Taken<'_>, numbers: Result<Numbers>) -> Result<()> {
        self.stop.check()?;
        let first = what.metrics.first().copied().unwrap_or_default();
        let told = match &numbers {
            Ok(numbers) => numbers.first().map_or("-".into(), |(_, value)| format!("{value:.2}")),
            Err(error) => format!("FAILED: {error:#}"),
        };
        eprintln!(
            "[{:>4.0} of about {:.0} s] {} {}/{} {first} {}: {told}",
            self.began.elapsed().as_secs_f64(),
            self.expected,
            what.suite,
            what.round,
            what.of,
            what.program
        );
        let sample = |metric: &str, value, failed| Sample {
            suite: what.suite.into(),
            metric: metric.into(),
            program: what.program.into(),
            round: what.round,
            value,
            failed,
        };
        match numbers {
            Ok(numbers) => {
                self.results
                    .samples
                    .extend(numbers.into_iter().map(|(metric, value)| sample(metric, Some(value), None)));
            }
            Err(error) => {
                let reason = format!("{error:#}");
                self.results
                    .samples
                    .extend(what.metrics.iter().map(|metric| sample(metric, None, Some(reason.clone()))));
            }
        }
        Ok(())
    }

    /// Writes what there is so far.
    pub(crate) fn save(&self) -> Result<()> {
        self.results.save(&self.file)
    }
}
