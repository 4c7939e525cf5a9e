//! A fresh host for a test: network, mount and process namespaces of its own. Its processes end with it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

const INSIDE: &str = "SENNIT_BACKENDS_INSIDE";

/// Says loudly that a test did not run. Where CI is on, that is a failure.
pub(crate) fn skipped(test: &str, missing: &str) {
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{test} has to run under CI: {missing}");
}

fn missing(programs: &[&str]) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root".to_owned());
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        return Some("/dev/net/tun".to_owned());
    }
    programs.iter().find(|name| find(name).is_none()).map(|name| format!("the program {name}"))
}

/// A program: in SENNIT_BIN_DIR, beside this executable, in its parent directory, or on PATH.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().ok();
    let beside = own.iter().flat_map(|path| path.ancestors().skip(1).take(2)).map(PathBuf::from);
    let named = std::env::var_os("SENNIT_BIN_DIR").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = named.into_iter().chain(beside).chain(std::env::split_paths(&path)).collect();
    dirs.into_iter().map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Runs this test again inside of fresh namespaces. True for the run inside, which is to do the work.
pub(crate) fn inside(test: &str, programs: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let needed: Vec<&str> =
        ["unshare", "ip", "nft", "mount"].into_iter().chain(programs.iter().copied()).collect();
    if let Some(missing) = missing(&needed) {
        skipped(test, &missing);
        return false;
    }
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"])
        .arg("mount -t tmpfs tmpfs /run && ip link set lo up && exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprint!("{said}");
    assert!(output.status.success(), "{test} failed in its namespace");
    assert!(said.contains("1 passed"), "{test} did not run in its namespace");
    false
}

/// Runs a program that has to succeed, and returns what it printed.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
