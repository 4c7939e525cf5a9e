//! Runs whole meshes for the suites beside it: real agents, real devices, real packets in network namespaces.

#![allow(clippy::print_stdout, reason = "the suites tell what they do")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use meshlab::{Options, Report, RunError};

/// A directory of the programs under test: `$SENNIT_BIN_DIR`, or where cargo puts what it builds with the tests.
pub fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("SENNIT_BIN_DIR") {
        return PathBuf::from(dir);
    }
    let test = std::env::current_exe().unwrap_or_default();
    let target = test.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    target.to_owned()
}

/// The programs that the suites cannot do without.
const NEEDED: [&str; 3] = ["mesh-agent", "mesh-wg", "meshlab"];

/// Whether a lab can be built here; if not, says so loudly, and under `CI=true` fails.
pub fn can_run(test: &str) -> bool {
    let missing = if !is_root() {
        "root".to_owned()
    } else {
        let absent: Vec<&str> = NEEDED.into_iter().filter(|p| !programs().join(p).exists()).collect();
        if absent.is_empty() {
            return true;
        }
        format!(
            "the programs {} in {} (cargo build --workspace --bins)",
            absent.join(", "),
            programs().display()
        )
    };
    skip(test, &missing);
    false
}

/// Says loudly that a test is skipped; under `CI=true` it fails.
fn skip(test: &str, missing: &str) {
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "under CI nothing is skipped: {test} needs {missing}"
    );
}

/// Returns the report of a run; `None`, loudly, where this machine lacks what the scenario needs.
///
/// # Panics
/// Panics if the run fails for another reason, and under `CI=true` for any reason.
pub fn ran(test: &str, run: Result<Report, RunError>) -> Option<Report> {
    match run {
        Ok(report) => Some(report),
        Err(RunError::Missing(missing)) => {
            skip(test, &missing);
            None
        }
        Err(error) => panic!("{test} cannot run: {error}"),
    }
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|text| text.lines().any(|line| line.starts_with("Uid:\t0\t") || line.contains("Uid:\t0 ")))
}

/// Runs a scenario and panics with its report unless it passes.
///
/// # Panics
/// When the scenario fails or cannot run.
pub fn passes(test: &str, scenario: &str) {
    if !can_run(test) {
        return;
    }
    let dump_dir = Some(programs().join("reports").join(test));
    let options = Options { bin_dir: Some(programs()), dump_dir, ..Options::default() };
    let Some(report) = ran(test, meshlab::run_text(scenario, options)) else { return };
    println!("{}", report.to_text());
    assert!(report.passed(), "{test} failed:\n{}", report.to_text());
}
