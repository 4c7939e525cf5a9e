//! The command line.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::generate::hostile::{self, Kind, Stage};
use crate::generate::many::{self, Crowd, Load};
use crate::idle;
use crate::lab::{CONGESTION_CONTROL, Family};
use crate::measure::Measurement;
use crate::metric::{METRICS, SHORT, SUITES};
use crate::program::{self, Program};
use crate::results::{Machine, Results, Setup};
use crate::rounds::{Run, TunnelSuite};
use crate::stop::Stop;
use crate::{plot, suites, table};

/// Measures mesh-wg beside other userspace WireGuard devices, in network namespaces of this machine. Needs root.
#[derive(Parser)]
#[command(name = "meshbench")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Measures, writes a results file and a plot, and prints the tables.
    Run(RunArgs),
    /// One device and many real peers in namespaces of their own: each peer in turn sends a 100-byte packet, then is sent one.
    ManyPeers(ManyArgs),
    /// A TCP stream beside a flood of handshake initiations from spoofed strangers.
    HandshakeFlood(AttackArgs),
    /// A TCP stream beside captured messages of its own tunnel, sent again.
    Replay(AttackArgs),
    /// Prints the tables of a results file and writes its plot beside it.
    Report {
        /// A file that `run` wrote.
        file: PathBuf,
    },
}

#[derive(Args)]
struct RunArgs {
    /// Rounds of the main suite; the others make do with fewer.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of a run in seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Suites, by comma: v4, v6, mtu1280, idle-peers, many-peers, hostile. Default all.
    #[arg(long, value_delimiter = ',', value_parser = suite_name)]
    suite: Vec<String>,
    /// Measurements of the suites v4, v6 and mtu1280, by comma: rss-idle, ping, tcp1, tcp4, reverse, bidir, udp64,
    /// udp64-rate, udp1200, ping-loaded, rss-loaded. Without --suite, only v4 is run.
    #[arg(long, value_delimiter = ',', value_parser = measurement)]
    only: Vec<Measurement>,
    /// MTU of the tunnel in bytes.
    #[arg(long, default_value_t = 1420, value_parser = clap::value_parser!(u32).range(1280..=1440))]
    mtu: u32,
    /// A further program: NAME=COMMAND; the interface's name takes the place of {} or comes last.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = program::parse_with)]
    with: Vec<(String, Vec<String>)>,
    /// Leaves a program out that was found.
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// The rate of udp64-rate in packets a second. Default: one that all programs sustain.
    #[arg(long, value_name = "PPS", value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
    udp_rate: Option<u64>,
    /// Date for results and file names.
    #[arg(long, default_value = "undated", value_parser = date)]
    date: String,
    /// Folder for results and plot.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

#[derive(Args)]
struct ManyArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// Peers.
    #[arg(long, default_value_t = PEERS, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    peers: u32,
    /// Packets a second of all peers together.
    #[arg(long, default_value_t = RATE, value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
    rate: u64,
}

#[derive(Args)]
struct AttackArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// Hostile datagrams a second.
    #[arg(long, default_value_t = RATE, value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
    rate: u64,
}

#[derive(Args)]
struct TargetArgs {
    /// Which program, of those that `run` would find.
    #[arg(long, default_value = program::OURS)]
    program: String,
    /// A further program: NAME=COMMAND.
    #[arg(long, value_name = "NAME=COMMAND", value_parser = program::parse_with)]
    with: Vec<(String, Vec<String>)>,
    /// Length of a run in seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// MTU of the tunnel in bytes.
    #[arg(long, default_value_t = 1420, value_parser = clap::value_parser!(u32).range(1280..=1440))]
    mtu: u32,
}

// What the many peers and the attacks of a whole run are.
const PEERS: u32 = 1000;
const RATE: u64 = 100_000;
// Rounds of the suites beside the main one, at most: the whole is to end within a quarter of an hour.
const SHORT_ROUNDS: u32 = 3;
const MANY_ROUNDS: u32 = 2;

fn suite_name(text: &str) -> Result<String, String> {
    match SUITES.iter().any(|suite| suite.name == text) {
        true => Ok(text.to_owned()),
        false => Err(format!("known are {}", SUITES.map(|suite| suite.name).join(", "))),
    }
}

fn measurement(text: &str) -> Result<Measurement, String> {
    Measurement::named(text)
        .ok_or_else(|| format!("known are {}", Measurement::ALL.map(Measurement::name).join(", ")))
}

// It becomes part of a file name.
fn date(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_:+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("letters, digits and -_:+ only".into())
    }
}

pub(crate) fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Cmd::Run(args) => run(&args),
        Cmd::Report { file } => report(&file),
        Cmd::ManyPeers(args) => many_peers(&args),
        Cmd::HandshakeFlood(args) => attack(&args, Kind::Flood),
        Cmd::Replay(args) => attack(&args, Kind::Replay),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "meshbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(file: &Path) -> Result<()> {
    let results = Results::load(file)?;
    let picture = file.with_extension("svg");
    fs::write(&picture, plot::render(&results)).with_context(|| format!("write {}", picture.display()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", table::render(&results))?;
    writeln!(out, "results {}, plot {}", file.display(), picture.display())?;
    Ok(())
}

/// Whether this can be run at all here; says so if not, and fails in CI.
fn able() -> Result<bool> {
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if root {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        // A socket for each of the many peers.
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        return Ok(true);
    }
    writeln!(std::io::stderr(), "SKIPPED meshbench: missing root (network namespaces and TUN devices)")?;
    if std::env::var("CI").as_deref() == Ok("true") {
        bail!("root is needed");
    }
    Ok(false)
}

fn run(args: &RunArgs) -> Result<()> {
    if !able()? {
        return Ok(());
    }
    let stop = Stop::on_signals()?;
    let programs = program::find(&args.with, &args.without)?;
    announce(&programs);
    let setup = Setup {
        mtu: args.mtu,
        rounds: args.rounds,
        seconds: args.seconds,
        udp_rate: args.udp_rate,
        peers: PEERS,
        peers_rate: RATE,
        attack_rate: RATE,
    };
    let tunnels = tunnel_suites(args);
    let expected = expected_seconds(args, &tunnels, programs.len());
    let results = Results::new(args.date.clone(), machine()?, setup, programs);
    let file = args.out.join(format!("{}-results.json", args.date));
    let mut run = Run::new(results, stop, file.clone(), expected);
    let outcome = all_suites(args, &tunnels, &mut run);
    // What there is counts, even after Ctrl-C.
    run.save()?;
    report(&file)?;
    outcome
}

fn all_suites(args: &RunArgs, tunnels: &[TunnelSuite<'_>], run: &mut Run) -> Result<()> {
    tunnels.iter().try_for_each(|suite| suite.run(run))?;
    if wanted(args, "idle-peers") {
        suites::idle_peers(run)?;
    }
    if wanted(args, "many-peers") {
        suites::many_peers(run, args.rounds.min(MANY_ROUNDS))?;
    }
    if wanted(args, "hostile") {
        suites::hostile(run, args.rounds.min(SHORT_ROUNDS))?;
    }
    Ok(())
}

fn expected_seconds(args: &RunArgs, tunnels: &[TunnelSuite<'_>], programs: usize) -> f64 {
    let seconds = args.seconds;
    let once: f64 = tunnels.iter().map(|suite| suite.expected_seconds(programs, seconds)).sum();
    let each = |suite, rounds: u32, per_program: f64| {
        if wanted(args, suite) {
            programs as f64 * f64::from(args.rounds.min(rounds)) * per_program
        } else {
            0.0
        }
    };
    once + each("idle-peers", 1, 3.0 * idle::expected_seconds(seconds))
        + each("many-peers", MANY_ROUNDS, many::expected_seconds(PEERS, seconds))
        + each("hostile", SHORT_ROUNDS, hostile::expected_seconds(seconds))
}

fn target(args: &TargetArgs) -> Result<(Stop, Program)> {
    let found = program::find(&args.with, &[])?;
    let program = found.into_iter().find(|program| program.name == args.program);
    Ok((Stop::on_signals()?, program.ok_or_else(|| anyhow!("no program {:?}; see peers.sh", args.program))?))
}

fn many_peers(args: &ManyArgs) -> Result<()> {
    if !able()? {
        return Ok(());
    }
    let (stop, program) = target(&args.target)?;
    let load = Load { rate: args.rate, length: Duration::from_secs(args.target.seconds) };
    let mut crowd = Crowd::new(&stop, &program, args.peers, args.target.mtu)?;
    let (receive, send) = (crowd.receive(load)?, crowd.send(load)?);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} with {} peers, {} packets a second", program.name, args.peers, args.rate)?;
    for (title, direction) in [("from the peers", receive), ("to the peers", send)] {
        writeln!(
            out,
            "{title}: {:.1} kpps offered, {:.1} delivered, {:.2} µs of CPU each",
            direction.offered_kpps, direction.kpps, direction.cpu_us
        )?;
    }
    // The kernel counts in hundredths of a second.
    if args.peers >= 100 {
        writeln!(out, "a handshake: {:.2} ms of CPU", crowd.handshake_cpu_ms)?;
    }
    Ok(())
}

fn attack(args: &AttackArgs, kind: Kind) -> Result<()> {
    if !able()? {
        return Ok(());
    }
    let (stop, program) = target(&args.target)?;
    let seconds = args.target.seconds;
    let stage = Stage::new(&stop, &program, args.target.mtu)?;
    let before = stage.calm(seconds)?;
    let attacked = stage.attacked(kind, seconds, args.rate)?;
    let calm = (before + stage.calm(seconds)?) / 2.0;
    let metrics = if kind == Kind::Flood { hostile::FLOOD } else { hostile::REPLAY };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: undisturbed {calm:.2} Gb/s", program.name)?;
    for (id, value) in attacked.numbers(metrics, calm) {
        let metric = METRICS.iter().find(|metric| metric.id == id);
        let (title, unit) = metric.map_or((id, ""), |metric| (metric.title, metric.unit));
        writeln!(out, "{title}: {value:.2} {unit}")?;
    }
    Ok(())
}

fn tunnel_suites(args: &RunArgs) -> Vec<TunnelSuite<'_>> {
    let short = args.rounds.min(SHORT_ROUNDS);
    let all: &[Measurement] = if args.only.is_empty() { &Measurement::ALL } else { &args.only };
    let some: &[Measurement] = if args.only.is_empty() { &SHORT } else { &args.only };
    let suite =
        |name, family, mtu, rounds, measurements| TunnelSuite { name, family, mtu, rounds, measurements };
    let mut suites = vec![
        suite("v4", Family::V4, args.mtu, args.rounds, all),
        suite("v6", Family::V6, args.mtu, short, some),
        suite("mtu1280", Family::V4, 1280, short, some),
    ];
    suites.retain(|suite| wanted(args, suite.name));
    suites
}

fn wanted(args: &RunArgs, suite: &str) -> bool {
    match (args.suite.is_empty(), args.only.is_empty()) {
        (true, true) => true,
        (true, false) => suite == "v4",
        (false, _) => args.suite.iter().any(|wanted| wanted == suite),
    }
}

fn announce(programs: &[Program]) {
    for program in programs {
        eprintln!("{}: {} ({})", program.name, program.version, program.command.join(" "));
    }
}

fn machine() -> Result<Machine> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let cpu = read("/proc/cpuinfo")?;
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let iperf3 = Command::new("iperf3").arg("--version").output().context("run iperf3: install it")?;
    Ok(Machine {
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpu: cpu.map_or("an unknown CPU", |(_, name)| name.trim()).to_owned(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        congestion_control: CONGESTION_CONTROL.to_owned(),
        iperf3: String::from_utf8_lossy(&iperf3.stdout).lines().next().unwrap_or("unknown").to_owned(),
    })
}
