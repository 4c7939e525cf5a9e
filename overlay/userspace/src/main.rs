//! `mesh-wg`: see `--help`.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mesh_wg::features::Features;
use mesh_wg::name::InterfaceName;
use mesh_wg::pool::{MAX_THREADS, default_threads};
use mesh_wg::start::{Running, Settings, start};
use mesh_wg::sys::daemon::{self, Readiness, Side};
use mesh_wg::uapi::{self, SocketFile};
use tracing_subscriber::filter::LevelFilter;

const HELP: &str = "\
Userspace WireGuard device, configured with wg(8) or wg-quick(8).

Usage: mesh-wg [-f | --foreground] INTERFACE
       mesh-wg --features INTERFACE

Creates the TUN interface INTERFACE, serves /var/run/wireguard/INTERFACE.sock and
goes into the background. It ends when the interface is deleted, when the socket
is removed, or on SIGTERM.

  -f, --foreground   stay in the foreground
      --features     tell what the device that runs as INTERFACE uses of the kernel
      --version      print the version
      --help         print this text

Environment:
  LOG_LEVEL          silent, error, info, debug or verbose; default info
  MESH_WG_LOG_FILE   where the background process logs to; default nowhere
  MESH_WG_DISABLE    what not to use of the kernel, separated by commas:
                     tun-tso, tun-uso, udp-gso, udp-gro
  MESH_WG_THREADS    threads that move traffic; default half the processors, 1 to 4
";

fn main() -> ExitCode {
    let mut foreground = false;
    let mut features = false;
    let mut name = None;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "-f" | "--foreground" => foreground = true,
            "--features" => features = true,
            "--version" => return print(concat!("mesh-wg ", env!("CARGO_PKG_VERSION"), "\n")),
            "-h" | "--help" => return print(HELP),
            _ if name.is_none() && !argument.starts_with('-') => name = Some(argument),
            _ => return usage(&format!("unexpected argument {argument:?}")),
        }
    }
    let Some(name) = name else { return usage("no interface name") };
    let name: InterfaceName = match name.parse() {
        Ok(name) => name,
        Err(error) => return fail(&format!("{error}")),
    };
    if features {
        return match uapi::ask_features(Path::new(SocketFile::DIRECTORY), &name) {
            Ok(answer) => print(&answer),
            Err(error) => fail(&format!("cannot ask the device {name}: {error}; is it running?")),
        };
    }
    match settings() {
        Ok(settings) => launch(&name, settings, foreground),
        Err(problem) => fail(&problem),
    }
}

fn settings() -> Result<Settings, String> {
    let features = match std::env::var("MESH_WG_DISABLE") {
        Ok(list) => Features::without(&list).map_err(|error| format!("MESH_WG_DISABLE: {error}"))?,
        Err(_) => Features::ALL,
    };
    let threads = match std::env::var("MESH_WG_THREADS") {
        Ok(number) => {
            number.parse::<NonZeroUsize>().ok().filter(|number| number.get() <= MAX_THREADS).ok_or_else(
                || format!("MESH_WG_THREADS: {number:?} is not a number from 1 to {MAX_THREADS}"),
            )?
        }
        Err(_) => default_threads(),
    };
    Ok(Settings { features, threads })
}

fn launch(name: &InterfaceName, settings: Settings, foreground: bool) -> ExitCode {
    if foreground {
        log();
        return match start(name, settings) {
            Ok(running) => run(name, running),
            Err(error) => fail(&error.to_string()),
        };
    }
    match daemon::split() {
        Ok(Side::Parent(Ok(()))) => ExitCode::SUCCESS,
        Ok(Side::Parent(Err(reason))) => fail(&reason),
        Ok(Side::Child(readiness)) => background(name, settings, readiness),
        Err(error) => fail(&format!("cannot fork: {error}")),
    }
}

fn background(name: &InterfaceName, settings: Settings, readiness: Readiness) -> ExitCode {
    log();
    match start(name, settings) {
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
