//! What a run leaves: every sample, and on what it was taken.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::program::Program;

/// The version of the file format.
const FORMAT: u32 = 1;

/// A results file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    format: u32,
    /// As given by the caller.
    pub(crate) date: String,
    /// The machine.
    pub(crate) machine: Machine,
    /// How it was measured.
    pub(crate) setup: Setup,
    /// The programs, ours first.
    pub(crate) programs: Vec<Program>,
    /// Every sample, in the order they were taken.
    pub(crate) samples: Vec<Sample>,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// `uname -r`.
    pub(crate) kernel: String,
    /// Model name of the first CPU.
    pub(crate) cpu: String,
    /// CPUs that this process may use.
    pub(crate) cores: usize,
    /// TCP congestion control of all streams.
    pub(crate) congestion_control: String,
    /// First line of `iperf3 --version`.
    pub(crate) iperf3: String,
}

/// How it was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// MTU of the tunnel in bytes, where the suite has none of its own.
    pub(crate) mtu: u32,
    /// Rounds of the main suite.
    pub(crate) rounds: u32,
    /// Length of a run in seconds.
    pub(crate) seconds: u64,
    /// The fixed rate of small packets a second, once found.
    pub(crate) udp_rate: Option<u64>,
    /// Peers of the many.
    pub(crate) peers: u32,
    /// Packets a second of the many peers' traffic.
    pub(crate) peers_rate: u64,
    /// Packets a second of an attack.
    pub(crate) attack_rate: u64,
}

/// One number, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Name of the suite.
    pub(crate) suite: String,
    /// Name of the metric.
    pub(crate) metric: String,
    /// Name of the program.
    pub(crate) program: String,
    /// Round, from 1.
    pub(crate) round: u32,
    /// The number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) value: Option<f64>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) failed: Option<String>,
}

/// The samples of one metric, suite and program.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Summary {
    /// What was measured, ascending.
    pub(crate) values: Vec<f64>,
    /// How many runs failed.
    pub(crate) failures: usize,
}

impl Summary {
    /// The middle value, or the mean of the middle two. `None` without values.
    pub(crate) fn median(&self) -> Option<f64> {
        let half = self.values.len() / 2;
        let upper = *self.values.get(half)?;
        if self.values.len() % 2 == 1 {
            Some(upper)
        } else {
            Some((self.values.get(half - 1)? + upper) / 2.0)
        }
    }

    /// Smallest and largest.
    pub(crate) fn range(&self) -> Option<(f64, f64)> {
        Some((*self.values.first()?, *self.values.last()?))
    }
}

impl Results {
    /// No samples yet.
    pub(crate) fn new(date: String, machine: Machine, setup: Setup, programs: Vec<Program>) -> Results {
        Results { format: FORMAT, date, machine, setup, programs, samples: Vec::new() }
    }

    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Results> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let results: Results =
            serde_json::from_str(&text).with_context(|| format!("{} is no results file", path.display()))?;
        if results.format != FORMAT {
            bail!("{} has format {}, this program reads {FORMAT}", path.display(), results.format);
        }
        Ok(results)
    }

    /// Writes a file, whole or not at all.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let context = || format!("write {}", path.display());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(context)?;
        }
        let unfinished = path.with_extension("unfinished");
        fs::write(&unfinished, serde_json::to_string_pretty(self)? + "\n").with_context(context)?;
        fs::rename(&unfinished, path).with_context(context)
    }

    /// The samples of one metric.
    pub(crate) fn summary(&self, suite: &str, metric: &str, program: &str) -> Summary {
        let mut summary = Summary::default();
        for sample in &self.samples {
            if sample.suite == suite && sample.metric == metric && sample.program == program {
                match sample.value.filter(|value| value.is_finite()) {
                    Some(value) => summary.values.push(value),
                    None => summary.failures += 1,
                }
            }
        }
        summary.values.sort_by(f64::total_cmp);
        summary
    }

    /// Names of the suites that have samples.
    pub(crate) fn suites(&self) -> BTreeSet<&str> {
        self.samples.iter().map(|sample| sample.suite.as_str()).collect()
    }

    /// What went wrong, each reason once for all metrics of a run.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut runs: Vec<(&Sample, &String, Vec<&str>)> = Vec::new();
        for sample in &self.samples {
            let Some(reason) = &sample.failed else { continue };
            let same = |(run, known, _): &&mut (&Sample, &String, Vec<&str>)| {
                (&run.suite, &run.program, run.round, *known)
                    == (&sample.suite, &sample.program, sample.round, reason)
            };
            match runs.iter_mut().find(same) {
                Some((.., metrics)) => metrics.push(&sample.metric),
                None => runs.push((sample, reason, vec![&sample.metric])),
            }
        }
        let line = |(run, reason, metrics): &(&Sample, &String, Vec<&str>)| {
            let more =
                if metrics.len() > 3 { format!(" and {} more", metrics.len() - 3) } else { String::new() };
            let metrics = metrics[..metrics.len().min(3)].join(", ");
            format!("{} {} round {}, {metrics}{more}: {reason}", run.suite, run.program, run.round)
        };
        runs.iter().map(line).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results with these samples: suite, metric, program, value.
    pub(crate) fn results(samples: &[(&str, &str, &str, Option<f64>)]) -> Results {
        let mut results = Results::new("2026-01-02".into(), Machine::default(), Setup::default(), Vec::new());
        for (suite, metric, program, value) in samples {
            if !results.programs.iter().any(|known| known.name == *program) {
                results.programs.push(Program {
                    name: (*program).into(),
                    command: vec![(*program).into()],
                    version: "1".into(),
                    sha256: "00".into(),
                    origin: None,
                });
            }
            results.samples.push(Sample {
                suite: (*suite).into(),
                metric: (*metric).into(),
                program: (*program).into(),
                round: 1,
                value: *value,
                failed: value.is_none().then(|| "it broke".into()),
            });
        }
        results
    }

    #[test]
    fn the_median_is_the_middle_and_failures_are_no_zeros() {
        let of = |values: &[Option<f64>]| {
            let samples: Vec<_> = values.iter().map(|value| ("v4", "tcp1_gbps", "a", *value)).collect();
            results(&samples).summary("v4", "tcp1_gbps", "a")
        };
        assert_eq!(of(&[Some(9.0), Some(1.0), Some(2.0)]).median(), Some(2.0));
        assert_eq!(of(&[Some(1.0), Some(2.0)]).median(), Some(1.5));
        let broken = of(&[None, Some(4.0), Some(f64::NAN)]);
        assert_eq!((broken.median(), broken.failures), (Some(4.0), 2));
        assert_eq!((of(&[None]).median(), of(&[None]).range()), (None, None));
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let before = results(&[("v4", "tcp1_gbps", "a", Some(1.25)), ("v4", "tcp1_gbps", "b", None)]);
        let text = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), before);
    }
}
