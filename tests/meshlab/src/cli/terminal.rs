//! Progress on standard error: one line that changes on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use meshlab::{Event, Observer, Outcome};

pub(super) fn observer() -> Observer {
    let terminal = std::io::stderr().is_terminal();
    Arc::new(move |event| {
        let mut out = std::io::stderr().lock();
        // Progress that cannot be shown is no reason to fail.
        let _ = out.write_all(line(event, terminal).as_bytes()).and_then(|()| out.flush());
    })
}

/// Whether progress and report end up at the same place, be it a terminal, a pipe or a file; the steps stand
/// there already when the report comes.
pub(super) fn shows_all() -> bool {
    let place = |stream: BorrowedFd<'_>| {
        nix::sys::stat::fstat(stream).ok().map(|stat| (stat.st_dev, stat.st_ino, stat.st_rdev))
    };
    let (out, err) = (std::io::stdout(), std::io::stderr());
    let progress = place(err.as_fd());
    progress.is_some() && progress == place(out.as_fd())
}

fn line(event: &Event<'_>, terminal: bool) -> String {
    match event {
        Event::Begin(number, total, name) if terminal => format!("[{number}/{total}] {name} ..."),
        Event::Begin(number, total, name) => format!("[{number}/{total}] {name}\n"),
        Event::End(step) => {
            let seconds = step.duration.as_secs_f64();
            let word = step.outcome.word();
            let colon = if step.detail.is_empty() { "" } else { ": " };
            let failures: String =
                step.failures.iter().map(|failure| format!("      - {failure}\n")).collect();
            let tail = format!("{word} in {seconds:.2} s{colon}{}\n{failures}", step.detail);
            match (terminal, step.outcome) {
                (false, _) => format!("    {tail}"),
                (true, Outcome::Passed) => format!("\r\x1b[K\x1b[32m✓\x1b[0m {}  {tail}", step.name),
                (true, _) => format!("\r\x1b[K\x1b[31m✗\x1b[0m {}  {tail}", step.name),
            }
        }
        Event::Note(text) => format!("{text}\n"),
        _ => String::new(),
    }
}
