//! `exec`: a command and what came of it.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use super::{Trouble, Verdict};
use crate::scenario::step::Exec;
use crate::scenario::value::Span;
use crate::selector;
use crate::stage::Stage;

/// How long a wait goes on before it looks whether the run was interrupted.
const SLICE: Duration = Duration::from_millis(50);

/// Runs the command; it is killed when `time` is over or the run is interrupted.
pub(super) fn exec(stage: &mut Stage, exec: &Exec, time: Duration) -> Verdict {
    let place = selector::place(&stage.layout, &exec.on).map_err(Trouble::failed)?;
    let Some((program, arguments)) = exec.command.0.split_first() else {
        return Err(Trouble::failed("the command is empty"));
    };
    let process = stage.namespace_of(place)?.command(program).args(arguments).spawn()?;
    let deadline = Instant::now() + time;
    let status = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let status = process.wait(left.min(SLICE))?;
        if status.is_some() || left.is_zero() {
            break status;
        }
        // Dropping the process kills it.
        stage.go_on()?;
    };
    if status.is_none() {
        process.kill()?;
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (stdout, stderr) = (text(process.stdout()), text(process.stderr()));
    let code = status.map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
    let failures = complaints(exec, code, time, &stdout);
    if failures.is_empty() {
        return Ok(format!("exit code {}", exec.exit_code));
    }
    let mut all = failures;
    for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
        all.extend(text.lines().take(20).map(|line| format!("{name}: {line}")));
    }
    Err(Trouble::Failed(all))
}

fn complaints(exec: &Exec, code: Option<i32>, time: Duration, stdout: &str) -> Vec<String> {
    let mut found = Vec::new();
    match code {
        None => found.push(format!("the command did not end within {} and was killed", Span(time))),
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
