//! Performs the steps of a scenario on a running lab.

pub(crate) mod block;
mod command;
pub(crate) mod lease;
mod process;
mod reach;
mod record;
mod registry;
mod traffic;

use std::time::{Duration, Instant};

use crate::report::count;
use crate::run::RunError;
use crate::scenario::ruled_out;
use crate::scenario::step::{Action, Always, Eventually, StatusCheck, Step};
use crate::scenario::value::{OneOrMany, Span};
use crate::stage::Stage;
use crate::{condition, selector, status};

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// A command inside of `eventually` and `always` gets this much, because each of its runs has to come to an end.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
const MOST_FAILURES: usize = 12;

/// Why a step did not pass.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// What was not as it should be.
    Failed(Vec<String>),
    /// The run was asked to end.
    Interrupted,
    /// While the lab is built: the scenario cannot be run here at all.
    CannotBegin(RunError),
}

impl Trouble {
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::Failed(vec![text.into()])
    }
}

impl From<netlab::Error> for Trouble {
    fn from(error: netlab::Error) -> Self {
        Self::failed(error.to_string())
    }
}

/// A line about what was seen, or the trouble.
pub(crate) type Verdict = Result<String, Trouble>;

/// Performs one step; a check is tried until it holds or the step's timeout runs out.
pub(crate) fn perform(stage: &mut Stage, step: &Step) -> Verdict {
    let time = step.timeout.map_or(DEFAULT_TIMEOUT, |timeout| timeout.0);
    let deadline = Instant::now() + time;
    let actions = step.actions();
    let Some(action) = actions.first() else { return Ok(String::new()) };
    match *action {
        Action::Expect(expect) => reach::expect(stage, expect, deadline),
        Action::Handshakes(nodes) => handshakes(stage, nodes, deadline),
        Action::Status(check) => until(stage, deadline, |stage| status_holds(stage, check)),
        Action::Apply(apply) => registry::apply(stage, apply),
        Action::Delete(delete) => registry::delete(stage, delete),
        Action::Block(block) => block::place(stage, block),
        Action::Unblock(at) => block::lift(stage, at),
        Action::ForgetNat(sites) => block::forget_nat(stage, sites),
        Action::Kill(kill) => process::kill(stage, kill, deadline),
        Action::Restart(kill) => process::restart(stage, kill, deadline),
        Action::Stop(nodes) => process::stop(stage, nodes, deadline),
        Action::Start(nodes) => process::start(stage, nodes, deadline),
        Action::Exec(exec) => command::exec(stage, exec, time),
        Action::Capture(_) => record::start(stage),
        Action::AssertNoCleartext(bounds) => record::assert_no_cleartext(stage, *bounds),
        Action::Dhcp(dhcp) => lease::perform(stage, dhcp, deadline),
        Action::Traffic(traffic) => traffic::perform(stage, traffic, deadline),
        Action::Eventually(Eventually { deadline, step }) => {
            until(stage, Instant::now() + deadline.0, |stage| once(stage, step, deadline.0))
        }
        Action::Always(Always { duration, step }) => always(stage, duration.0, step),
    }
}

/// Performs an inner step without any retry of its own; `whole` is how long the step around it lasts.
fn once(stage: &mut Stage, step: &Step, whole: Duration) -> Verdict {
    let usual = if step.exec.is_some() { COMMAND_TIMEOUT.min(whole) } else { Duration::ZERO };
    let hasty = Step { timeout: Some(step.timeout.unwrap_or(Span(usual))), ..step.clone() };
    perform(stage, &hasty)
}

/// Tries until it passes or the deadline is over; the last failures are the step's.
fn until(stage: &mut Stage, deadline: Instant, mut attempt: impl FnMut(&mut Stage) -> Verdict) -> Verdict {
    loop {
        stage.go_on()?;
        match attempt(stage) {
            Err(Trouble::Failed(failures)) if Instant::now() >= deadline => {
                return Err(Trouble::Failed(failures));
            }
            Err(Trouble::Failed(_)) => std::thread::sleep(POLL),
            other => return other,
        }
    }
}

fn always(stage: &mut Stage, duration: Duration, step: &Step) -> Verdict {
    let begun = Instant::now();
    let mut tries = 0;
    // The last try begins after the time is over, so that the whole of it is covered.
    loop {
        stage.go_on()?;
        let over = begun.elapsed() >= duration;
        let detail = once(stage, step, duration).map_err(|trouble| match trouble {
            Trouble::Failed(mut failures) => {
                failures.insert(
                    0,
                    format!(
                        "held {}, then not, after {:.1} s",
                        count(tries, "time"),
                        begun.elapsed().as_secs_f64()
                    ),
                );
                Trouble::Failed(failures)
            }
            other => other,
        })?;
        tries += 1;
        if over {
            return Ok(format!("held {}: {detail}", count(tries, "time")));
        }
        std::thread::sleep(POLL);
    }
}

fn handshakes(stage: &mut Stage, nodes: &OneOrMany, deadline: Instant) -> Verdict {
    let names: Vec<String> = chosen(stage, nodes)?.into_iter().map(|node| node.name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let pairs = names.len() * (names.len() - 1) / 2;
    let mut last = None;
    let verdict = until(stage, deadline, |stage| {
        let statuses = stage.statuses(&names);
        let (good, missing) = status::missing_handshakes(&names, &statuses, |a, b| {
            ruled_out::why_no_tunnel(&stage.scenario, &stage.layout, a, b)
        });
        last = Some(statuses);
        if good == pairs && missing.is_empty() {
            Ok(format!("{good} of {pairs} node pairs"))
        } else {
            let mut failures = vec![format!("{good} of {pairs} node pairs have a handshake")];
            failures.extend(missing);
            Err(Trouble::Failed(shortened(failures)))
        }
    })?;
    if names.len() == stage.layout.nodes().count() && stage.picture.seconds_to_handshakes.is_none() {
        stage.picture.seconds_to_handshakes = stage.since_agents();
    }
    Ok(verdict)
}

fn status_holds(stage: &mut Stage, check: &StatusCheck) -> Verdict {
    let names: Vec<String> = chosen(stage, &check.nodes)?.into_iter().map(|node| node.name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut failures = Vec::new();
    for (name, status) in names.iter().zip(stage.statuses(&names)) {
        match status {
            Err(error) => failures.push(error),
            Ok(status) => failures.extend(
                check
                    .conditions
                    .iter()
                    .filter_map(|condition| condition::holds(condition, &status.document).err())
                    .map(|sentence| format!("{name}: {sentence}")),
            ),
        }
    }
    if failures.is_empty() {
        Ok(format!("{} on {}", count(check.conditions.len(), "condition"), count(names.len(), "node")))
    } else {
        Err(Trouble::Failed(shortened(failures)))
    }
}

/// The nodes that the words stand for.
fn chosen(stage: &Stage, names: &OneOrMany) -> Result<Vec<crate::layout::NodeLayout>, Trouble> {
    Ok(selector::nodes(&stage.layout, names).map_err(Trouble::failed)?.into_iter().cloned().collect())
}

/// Keeps a report readable when hundreds of probes fail for one reason.
fn shortened(mut failures: Vec<String>) -> Vec<String> {
    if failures.len() > MOST_FAILURES {
        let more = failures.len() - MOST_FAILURES;
        failures.truncate(MOST_FAILURES);
        failures.push(format!("... and {more} more"));
    }
    failures
}
