//! `exec`: a command and what came of it.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use super::{Trouble, Verdict};
use crate::scenario::step::Exec;
use crate::selector;
use crate::stage::Stage;

/// A command gets this much even when a surrounding step allows a check only one quick try.
const LEAST: Duration = Duration::from_secs(10);

pub(super) fn exec(stage: &mut Stage, exec: &Exec, deadline: Instant) -> Verdict {
    let place = selector::place(&stage.layout, &exec.on).map_err(Trouble::failed)?;
    let Some((program, arguments)) = exec.command.0.split_first() else {
        return Err(Trouble::failed("the command is empty"));
    };
    let time = deadline.saturating_duration_since(Instant::now()).max(LEAST);
    let output = stage.namespace_of(place)?.command(program).args(arguments).output(time)?;
    let (stdout, stderr) = (output.stdout_text(), output.stderr_text());
    let code =
        output.status.map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
    let failures = complaints(exec, code, &stdout);
    if failures.is_empty() {
        return Ok(format!("exit code {}", exec.exit_code));
    }
    let mut all = failures;
    for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
        all.extend(text.lines().take(20).map(|line| format!("{name}: {line}")));
    }
    Err(Trouble::Failed(all))
}

fn complaints(exec: &Exec, code: Option<i32>, stdout: &str) -> Vec<String> {
    let mut found = Vec::new();
    match code {
        None => found.push("the command did not end in time and was killed".to_owned()),
        Some(code) if code != exec.exit_code => {
            found.push(format!("exit code {code}, expected {}", exec.exit_code));
        }
        Some(_) => {}
    }
    let texts = |list: &Option<crate::scenario::value::OneOrMany>| -> Vec<String> {
        list.iter().flat_map(|list| list.iter().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    for text in texts(&exec.contains).iter().filter(|text| !stdout.contains(text.as_str())) {
        found.push(format!("standard output does not contain `{text}`"));
    }
    for text in texts(&exec.not_contains).iter().filter(|text| stdout.contains(text.as_str())) {
        found.push(format!("standard output contains `{text}`"));
    }
    found
}
