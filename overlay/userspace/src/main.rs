//! `mesh-wg`: see `--help`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use mesh_wg::name::InterfaceName;
use mesh_wg::start::{Running, start};
use mesh_wg::sys::daemon::{self, Readiness, Side};
use tracing_subscriber::filter::LevelFilter;

const HELP: &str = "\
Userspace WireGuard device, configured with wg(8) or wg-quick(8).

Usage: mesh-wg [-f | --foreground] INTERFACE

Creates the TUN interface INTERFACE, serves /var/run/wireguard/INTERFACE.sock and
goes into the background. It ends when the interface is deleted, when the socket
is removed, or on SIGTERM.

  -f, --foreground   stay in the foreground
      --version      print the version
      --help         print this text

Environment:
  LOG_LEVEL          silent, error, info, debug or verbose; default info
  MESH_WG_LOG_FILE   where the background process logs to; default nowhere
";

fn main() -> ExitCode {
    let mut foreground = false;
    let mut name = None;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "-f" | "--foreground" => foreground = true,
            "--version" => return print(concat!("mesh-wg ", env!("CARGO_PKG_VERSION"), "\n")),
            "-h" | "--help" => return print(HELP),
            _ if name.is_none() && !argument.starts_with('-') => name = Some(argument),
            _ => return usage(&format!("unexpected argument {argument:?}")),
        }
    }
    let Some(name) = name else { return usage("no interface name") };
    match name.parse() {
        Ok(name) => launch(&name, foreground),
        Err(error) => fail(&format!("{error}")),
    }
}

fn launch(name: &InterfaceName, foreground: bool) -> ExitCode {
    if foreground {
        log();
        return match start(name) {
            Ok(running) => run(name, running),
            Err(error) => fail(&error.to_string()),
        };
    }
    match daemon::split() {
        Ok(Side::Parent(Ok(()))) => ExitCode::SUCCESS,
        Ok(Side::Parent(Err(reason))) => fail(&reason),
        Ok(Side::Child(readiness)) => background(name, readiness),
        Err(error) => fail(&format!("cannot fork: {error}")),
    }
}

fn background(name: &InterfaceName, readiness: Readiness) -> ExitCode {
    log();
    match start(name) {
        Ok(running) => {
            let log_file = std::env::var_os("MESH_WG_LOG_FILE").map(PathBuf::from);
            match readiness.ready(log_file.as_deref()) {
                Ok(()) => run(name, running),
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            readiness.failed(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(name: &InterfaceName, running: Running) -> ExitCode {
    tracing::info!(interface = %name, version = env!("CARGO_PKG_VERSION"), "started");
    match running.run() {
        Ok(ended) => {
            tracing::info!(interface = %name, ?ended, "ended");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!(interface = %name, %error, "failed");
            ExitCode::FAILURE
        }
    }
}

fn log() {
    let level = match std::env::var("LOG_LEVEL").as_deref() {
        Ok("silent") => LevelFilter::OFF,
        Ok("error") => LevelFilter::ERROR,
        Ok("debug") => LevelFilter::DEBUG,
        Ok("verbose") => LevelFilter::TRACE,
        _ => LevelFilter::INFO,
    };
    let own = tracing_subscriber::filter::Targets::new()
        .with_default(level)
        // It reports every silent peer as an error, and without saying which.
        .with_target("boringtun", if level >= LevelFilter::TRACE { level } else { LevelFilter::OFF });
    use tracing_subscriber::layer::SubscriberExt as _;
    use tracing_subscriber::util::SubscriberInitExt as _;
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    let _ = tracing_subscriber::registry().with(lines).with(own).try_init();
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn usage(problem: &str) -> ExitCode {
    fail(&format!("{problem}\n\n{HELP}"))
}

fn fail(problem: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "mesh-wg: {problem}");
    ExitCode::FAILURE
}
