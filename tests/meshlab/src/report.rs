//! What a run found: verdict, steps, figures; and how it is written down.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::picture::Picture;

/// `1 agent`, `3 agents`.
pub fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// How a run or a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It held.
    Passed,
    /// It did not.
    Failed,
    /// It was not tried, because an earlier step failed.
    Skipped,
    /// The run was interrupted meanwhile.
    Interrupted,
}

impl Outcome {
    /// The word for a person.
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
            Self::Interrupted => "interrupted",
        }
    }
}

/// One step of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    /// The step's name.
    pub name: String,
    /// The action's keyword, or `lab` and `agents` for the run's own steps.
    pub action: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
    /// One line about what was seen, whether it passed or not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Everything that was not as it should be.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1000.0).round() / 1000.0)
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// The scenario's description.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Passed only if every step passed.
    pub verdict: Outcome,
    /// The whole run in seconds, building and tearing down included.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
    /// The steps in order.
    pub steps: Vec<StepReport>,
    /// Where a failed run left its traces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dump: Option<PathBuf>,
    /// What the lab looked like at the end.
    pub picture: Picture,
}

impl Report {
    /// True if every step passed.
    pub fn passed(&self) -> bool {
        self.verdict == Outcome::Passed
    }

    /// The program's exit code: 0 passed, 1 failed, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self.verdict {
            Outcome::Passed => 0,
            Outcome::Interrupted => 130,
            Outcome::Failed | Outcome::Skipped => 1,
        }
    }

    /// The report as indented JSON.
    pub fn to_json(&self) -> String {
        // Nothing in a report can fail to print; the fallback only spares a panic path.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The report as text: steps, failures, verdict.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let width = self.steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0).min(70);
        for step in &self.steps {
            let line = format!(
                "{:<11} {:>7.2}s  {:<width$}  {}",
                step.outcome.word(),
                step.duration.as_secs_f64(),
                step.name,
                step.detail
            );
            text.push_str(line.trim_end());
            text.push('\n');
            for failure in &step.failures {
                text.push_str(&format!("{:>23}{failure}\n", "- "));
            }
        }
        text.push('\n');
        text.push_str(&self.verdict_text());
        text
    }

    /// The verdict alone, and where the traces of a failure are.
    pub fn verdict_text(&self) -> String {
        let passed = self.steps.iter().filter(|step| step.outcome == Outcome::Passed).count();
        let mut text = format!(
            "{}: {} ({passed} of {} steps, {:.1} s)\n",
            self.scenario,
            self.verdict.word(),
            self.steps.len(),
            self.duration.as_secs_f64()
        );
        if let Some(dump) = &self.dump {
            text.push_str(&format!("traces of the failure: {}\n", dump.display()));
        }
        text
    }

    /// The report as JUnit XML, one test case per step.
    pub fn to_junit(&self) -> String {
        crate::junit::render(self)
    }
}
