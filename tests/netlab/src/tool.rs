use std::io::Write;
use std::process::{Command, Stdio};

use crate::{Error, Namespace, Result};

/// Runs `ip -batch` in a namespace.
pub(crate) fn ip(namespace: &Namespace, script: &str) -> Result<()> {
    feed(namespace, "ip", &["-batch", "-"], script).map(drop)
}

/// As [`ip`], giving what it printed, one object a line.
pub(crate) fn ip_read(namespace: &Namespace, script: &str) -> Result<String> {
    feed(namespace, "ip", &["-oneline", "-batch", "-"], script)
}

/// Runs `nft -f` in a namespace: one transaction.
pub(crate) fn nft(namespace: &Namespace, ruleset: &str) -> Result<()> {
    feed(namespace, "nft", &["-f", "-"], ruleset).map(drop)
}

/// As [`nft`], giving what it printed.
pub(crate) fn nft_read(namespace: &Namespace, ruleset: &str) -> Result<String> {
    feed(namespace, "nft", &["-f", "-"], ruleset)
}

/// Runs `tc` in a namespace.
pub(crate) fn tc(namespace: &Namespace, args: &[&str]) -> Result<()> {
    feed(namespace, "tc", args, "").map(drop)
}

fn feed(namespace: &Namespace, tool: &'static str, args: &[&str], input: &str) -> Result<String> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let input = input.to_owned();
    let failure = {
        let namespace = namespace.name().to_owned();
        move |message: String| Error::Tool { tool, namespace, message }
    };
    match namespace.run(move || run(tool, &args, &input))? {
        Ok(output) => Ok(output),
        Err(message) => Err(failure(message)),
    }
}

/// Runs a tool with `input` in the calling thread's namespaces; the error is its stderr.
pub(crate) fn run(tool: &str, args: &[String], input: &str) -> std::result::Result<String, String> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {tool}: {error}; install it (iproute2, nftables)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends early closes its end; its stderr says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let numbered: String =
        input.lines().enumerate().map(|(n, line)| format!("\n{:>4} {line}", n + 1)).take(60).collect();
    Err(format!("{} {}: {}{numbered}", tool, args.join(" "), stderr.trim()))
}
