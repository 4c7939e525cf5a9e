//! The figures that tests report beside their results.

use std::io::Write as _;
use std::path::PathBuf;

/// Names a test that is left out, and what it lacks; under CI that fails.
///
/// # Panics
/// Under CI.
pub fn skipped(test: &str, missing: &str) {
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: missing {missing}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "under CI nothing is skipped: {test} needs {missing}"
    );
}

/// Shows a figure of a check, also when it passes.
pub fn figure(text: &str) {
    let _ = write!(std::io::stderr(), "\n      {text} ");
}

/// The paths that `make kernel-test` names in the environment; without one of them the test is skipped.
pub fn from_environment<const N: usize>(test: &str, names: [&str; N]) -> Option<[PathBuf; N]> {
    let values = names.map(|name| std::env::var_os(name).map(PathBuf::from));
    if values.iter().any(Option::is_none) {
        skipped(test, &format!("{}: run `make kernel-test`", names.join(", ")));
        return None;
    }
    Some(values.map(Option::unwrap_or_default))
}
