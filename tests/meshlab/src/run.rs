//! A whole run: build the lab, walk the steps, look once more, tear down.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::agents::Binaries;
use crate::layout::Layout;
use crate::report::{Outcome, Report, StepReport};
use crate::scenario::step::{Action, Step};
use crate::scenario::{Scenario, ScenarioError};
use crate::stage::Stage;
use crate::steps::{self, Trouble};

/// Told about progress as it happens.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step begins: its number from 1, how many there are, its name.
    Begin(usize, usize, &'a str),
    /// A step ended.
    End(&'a StepReport),
    /// Something worth a line.
    Note(&'a str),
}

/// Receives [`Event`]s.
pub type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// What to do with the lab after the last step and before it is taken down; the report is the final one.
pub type Hold = Box<dyn FnOnce(&mut Stage, &Report)>;

/// How to run.
pub struct Options {
    /// Directory that `source` in `apply` is relative to.
    pub base: PathBuf,
    /// Where a failed run leaves its traces. Default: `reports/<scenario>-<n>` in the current directory.
    pub dump_dir: Option<PathBuf>,
    /// Where `mesh-agent` and `mesh-wg` are. Default: `$SENNIT_BIN_DIR`, beside this program, `PATH`.
    pub bin_dir: Option<PathBuf>,
    /// Set to end the run early; everything is torn down.
    pub interrupt: Arc<AtomicBool>,
    /// Told about progress.
    pub observer: Observer,
    /// Keeps the lab for as long as this runs.
    pub hold: Option<Hold>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            base: PathBuf::from("."),
            dump_dir: None,
            bin_dir: None,
            interrupt: Arc::default(),
            observer: Arc::new(|_| {}),
            hold: None,
        }
    }
}

/// The run could not begin: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The scenario is wrong.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// Something that the scenario needs is not on this machine.
    #[error("missing: {0}")]
    Missing(String),
    /// The lab cannot be made from this scenario.
    #[error("the lab refuses the scenario: {0}")]
    Lab(String),
}

/// Reads and runs a scenario from text.
///
/// # Errors
/// [`RunError`] when the run could not begin. A failed step is no error but part of the [`Report`].
pub fn run_text(text: &str, options: Options) -> Result<Report, RunError> {
    let (scenario, layout) = Scenario::parse(text, "scenario")?;
    run(&scenario, &layout, options)
}

/// Reads and runs a scenario file; `source` is relative to the file's directory.
///
/// # Errors
/// As [`run_text`].
pub fn run_file(path: &std::path::Path, options: Options) -> Result<Report, RunError> {
    let (scenario, layout) = Scenario::load(path)?;
    let base = path.parent().map_or_else(|| PathBuf::from("."), PathBuf::from);
    run(&scenario, &layout, Options { base, ..options })
}

/// Runs a scenario that was read before.
///
/// # Errors
/// As [`run_text`].
pub fn run(scenario: &Scenario, layout: &Layout, mut options: Options) -> Result<Report, RunError> {
    let begun = Instant::now();
    let hold = options.hold.take();
    let binaries = prerequisites(scenario, &options)?;
    let mut run = Run { scenario, options: &options, steps: Vec::new(), number: 0 };

    let stage = run.own_step("build the lab", "lab", || {
        Stage::build(scenario, layout, binaries.clone(), &options).map(|stage| (stage, layout.summary()))
    });
    let mut stage = match stage {
        Ok(stage) => stage,
        Err(BuildFailed::CannotBegin(error)) => return Err(error),
        Err(BuildFailed::Step) => {
            run.skip_rest();
            return Ok(run.report(begun, None, Default::default()));
        }
    };

    run.walk(&mut stage);

    let interrupted = options.interrupt.load(Ordering::SeqCst);
    if !interrupted {
        stage.look_once_more();
    }
    let failed = run.steps.iter().any(|step| step.outcome == Outcome::Failed);
    let dump = if failed { run.dump(&mut stage) } else { None };
    let picture = stage.picture().clone();
    // The verdict stands here: a signal that ends the holding, or comes during the teardown, changes nothing.
    if let Some(hold) = hold.filter(|_| !interrupted) {
        let report = run.report(begun, dump, picture);
        hold(&mut stage, &report);
        stage.tear_down();
        return Ok(report);
    }
    let mut report = run.report(begun, dump, picture);
    stage.tear_down();
    report.duration = begun.elapsed();
    Ok(report)
}

fn prerequisites(scenario: &Scenario, options: &Options) -> Result<Option<Binaries>, RunError> {
    use netlab::Feature;
    let mut features = vec![
        Feature::Privilege,
        Feature::NetNamespaces,
        Feature::MountNamespaces,
        Feature::PidNamespaces,
        Feature::Veth,
        Feature::Nftables,
    ];
    let links = || scenario.sites.iter().filter_map(|site| site.value.link.as_ref());
    if scenario.agents {
        features.push(Feature::Tun);
    }
    if scenario.sites.iter().any(|site| site.value.nat != crate::scenario::Nat::None) {
        features.push(Feature::Nat);
    }
    if links().any(|link| link.latency.is_some()) {
        features.push(Feature::Netem);
    }
    if links().any(|link| link.rate.is_some()) {
        features.push(Feature::Tbf);
    }
    netlab::capabilities().require(&features).map_err(|error| RunError::Missing(error.to_string()))?;
    if scenario.steps.iter().any(|step| step.value.dhcp.is_some()) {
        steps::lease::programs().map_err(RunError::Missing)?;
    }
    if !scenario.agents {
        return Ok(None);
    }
    Binaries::find(options.bin_dir.as_deref()).map(Some).map_err(RunError::Missing)
}

/// How [`Stage::build`] can fail.
pub(crate) enum BuildFailed {
    /// The run could not even begin.
    CannotBegin(RunError),
    /// A step of the run failed; it is in the list already.
    Step,
}

struct Run<'a> {
    scenario: &'a Scenario,
    options: &'a Options,
    steps: Vec<StepReport>,
    number: usize,
}

impl Run<'_> {
    fn note(&self, text: &str) {
        (self.options.observer)(&Event::Note(text));
    }

    fn interrupted(&self) -> bool {
        self.options.interrupt.load(Ordering::SeqCst)
    }

    fn total(&self) -> usize {
        self.scenario.steps.len() + 1 + usize::from(self.scenario.agents)
    }

    fn begin(&mut self, name: &str) -> Instant {
        self.number += 1;
        (self.options.observer)(&Event::Begin(self.number, self.total(), name));
        Instant::now()
    }

    fn end(&mut self, name: &str, action: &str, begun: Instant, verdict: Result<String, Trouble>) -> bool {
        let (outcome, detail, failures) = match verdict {
            Ok(detail) => (Outcome::Passed, detail, Vec::new()),
            // A wait that a signal cut short looks like a check that did not hold.
            Err(Trouble::Interrupted | Trouble::Failed(_)) if self.interrupted() => {
                (Outcome::Interrupted, String::new(), vec!["interrupted by a signal".to_owned()])
            }
            Err(Trouble::Failed(failures)) => (Outcome::Failed, String::new(), failures),
            Err(Trouble::CannotBegin(error)) => (Outcome::Failed, String::new(), vec![error.to_string()]),
            Err(Trouble::Interrupted) => {
                (Outcome::Interrupted, String::new(), vec!["interrupted by a signal".to_owned()])
            }
        };
        let step = StepReport {
            name: name.to_owned(),
            action: action.to_owned(),
            outcome,
            duration: begun.elapsed(),
            detail,
            failures,
        };
        (self.options.observer)(&Event::End(&step));
        self.steps.push(step);
        outcome == Outcome::Passed
    }

    fn own_step<T>(
        &mut self,
        name: &str,
        action: &str,
        work: impl FnOnce() -> Result<(T, String), Trouble>,
    ) -> Result<T, BuildFailed> {
        let begun = self.begin(name);
        match work() {
            Ok((value, detail)) => {
                self.end(name, action, begun, Ok(detail));
                Ok(value)
            }
            Err(Trouble::CannotBegin(error)) => Err(BuildFailed::CannotBegin(error)),
            Err(trouble) => {
                self.end(name, action, begun, Err(trouble));
                Err(BuildFailed::Step)
            }
        }
    }

    /// Leading steps that prepare the ground, then the agents, then the other steps; ends at the first failure.
    fn walk(&mut self, stage: &mut Stage) {
        let steps: Vec<&Step> = self.scenario.steps.iter().map(|step| &step.value).collect();
        let prepares = |step: &&Step| step.actions().first().is_some_and(Action::prepares);
        let leading =
            if self.scenario.agents { steps.iter().take_while(|step| prepares(step)).count() } else { 0 };
        let (first, rest) = steps.split_at(leading);
        let mut standing = first.iter().all(|step| self.scenario_step(stage, step));
        if standing && self.scenario.agents {
            let started =
                self.own_step("start the agents", "agents", || stage.start_all_agents().map(|d| ((), d)));
            standing = started.is_ok();
        }
        if standing {
            let _ = rest.iter().all(|step| self.scenario_step(stage, step));
        }
        self.skip_rest();
    }

    fn scenario_step(&mut self, stage: &mut Stage, step: &Step) -> bool {
        let (name, action) = (step.title(), step.actions().first().map_or("", |action| action.keyword()));
        let begun = self.begin(&name);
        let verdict =
            if stage.interrupted() { Err(Trouble::Interrupted) } else { steps::perform(stage, step) };
        self.end(&name, action, begun, verdict)
    }

    /// Lists the steps that were never tried.
    fn skip_rest(&mut self) {
        let own = |report: &&StepReport| matches!(report.action.as_str(), "lab" | "agents");
        let tried = self.steps.len() - self.steps.iter().filter(own).count();
        for step in self.scenario.steps.iter().skip(tried) {
            self.steps.push(StepReport {
                name: step.value.title(),
                action: step.value.actions().first().map_or("", |action| action.keyword()).to_owned(),
                outcome: Outcome::Skipped,
                duration: Duration::ZERO,
                detail: String::new(),
                failures: Vec::new(),
            });
        }
    }

    fn dump(&self, stage: &mut Stage) -> Option<PathBuf> {
        let wanted = self.options.dump_dir.clone();
        match crate::dump::write(stage, wanted) {
            Ok(folder) => Some(folder),
            Err(error) => {
                self.note(&format!("the traces could not be written: {error}"));
                None
            }
        }
    }

    fn report(self, begun: Instant, dump: Option<PathBuf>, picture: crate::picture::Picture) -> Report {
        let has = |outcome| self.steps.iter().any(|step| step.outcome == outcome);
        let verdict = if has(Outcome::Interrupted) || self.interrupted() {
            Outcome::Interrupted
        } else if has(Outcome::Failed) {
            Outcome::Failed
        } else {
            Outcome::Passed
        };
        Report {
            scenario: self.scenario.name.clone(),
            description: self.scenario.description.clone(),
            verdict,
            duration: begun.elapsed(),
            steps: self.steps,
            dump,
            picture,
        }
    }
}
