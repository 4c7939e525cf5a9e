//! The command line: arguments in, exit code out.

mod hold;
mod terminal;

use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use meshlab::report::count;
use meshlab::{Options, Outcome, Report, RunError, Scenario};

/// Runs mesh scenarios in a lab of network namespaces.
///
/// Exit codes: 0 passed, 1 a step failed, 2 the scenario is wrong or something it needs is missing,
/// 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "meshlab", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the lab, run the steps, print the verdict, tear down.
    Run(RunArgs),
    /// Build the lab, start the agents and hold both until `down` or Ctrl-C.
    Up {
        /// The scenario; its steps are not run.
        scenario: PathBuf,
    },
    /// Run a command on a node, in a pod, or on a router (`router@SITE`) of a lab that is held.
    Exec {
        /// Which lab; only needed when several are up.
        #[arg(long)]
        lab: Option<String>,
        /// Node, pod or router@SITE.
        place: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show the labs that are held, or one of them.
    Status {
        /// Which lab. Default: all.
        lab: Option<String>,
        /// text or json.
        #[arg(short, long, value_enum, default_value = "text")]
        output: Format,
    },
    /// Take down a lab that is held.
    Down {
        /// Which lab; only needed when several are up.
        lab: Option<String>,
    },
    /// Read a scenario and say what is wrong with it; needs no rights and builds nothing.
    Check {
        /// The scenario.
        scenario: PathBuf,
    },
    /// Print the JSON schema of scenarios.
    Schema,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The scenario.
    scenario: PathBuf,
    /// Write a JUnit XML report to this file.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// What to print on standard output.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    /// Hold the lab after the last step until `down` or Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Where a failed run leaves its traces. Default: reports/SCENARIO-N.
    #[arg(long)]
    dump_dir: Option<PathBuf>,
    /// Also write the report to this file: JSON if it ends in .json, else text with the picture.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Print a picture of the lab after the verdict: map, reachability, tunnels, what the wire showed.
    #[arg(long)]
    picture: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For a person.
    Text,
    /// For a program.
    Json,
}

/// Reads the arguments and does what they ask.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("meshlab: {error:#}");
            ExitCode::from(if error.is::<RunError>() || error.is::<meshlab::ScenarioError>() { 2 } else { 1 })
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) => run(args),
        Command::Up { scenario } => hold::up(&scenario),
        Command::Exec { lab, place, command } => hold::exec(lab.as_deref(), place, &command),
        Command::Status { lab, output } => hold::status(lab.as_deref(), output == Format::Json),
        Command::Down { lab } => hold::down(lab.as_deref()),
        Command::Check { scenario } => {
            let (scenario, layout) = Scenario::load(&scenario)?;
            let steps = count(scenario.steps.len(), "step");
            print(&format!("{}: {}, {steps}: fine\n", scenario.name, layout.summary()))?;
            Ok(0)
        }
        Command::Schema => {
            print(&meshlab::scenario::json_schema_text())?;
            Ok(0)
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<u8> {
    // Without root a user namespace may do; what it cannot do is named when the lab is about to be built.
    let _ = netlab::enter_userns();
    let interrupt = interrupt()?;
    let mut options = Options {
        dump_dir: args.dump_dir.clone(),
        interrupt: Arc::clone(&interrupt),
        observer: terminal::observer(),
        ..Options::default()
    };
    let (args, told) = (Rc::new(args), Rc::new(Cell::new(false)));
    if args.keep {
        let (args, told) = (Rc::clone(&args), Rc::clone(&told));
        options.hold = Some(Box::new(move |stage, report| {
            // A report that cannot be written now is tried again, and complained about, at the end.
            told.set(tell(&args, report).is_ok());
            if let Err(error) = hold::until_released(stage, &interrupt) {
                eprintln!("meshlab: {error:#}");
            }
        }));
    }
    let report = meshlab::run_file(&args.scenario, options)?;
    if !told.get() {
        tell(&args, &report)?;
    }
    if report.verdict == Outcome::Interrupted {
        eprintln!("meshlab: interrupted; the lab is torn down");
    } else if args.keep {
        eprintln!("meshlab: the lab is torn down");
    }
    Ok(report.exit_code())
}

/// Writes and prints the report as the arguments ask for.
fn tell(args: &RunArgs, report: &Report) -> anyhow::Result<()> {
    if let Some(file) = &args.junit {
        write(file, &report.to_junit())?;
    }
    if let Some(file) = &args.report {
        let json = file.extension().is_some_and(|end| end == "json");
        write(file, &if json { report.to_json() } else { text(report, true) })?;
    }
    match args.output {
        Format::Json => print(&report.to_json()),
        Format::Text if terminal::shows_all() => {
            print(&with_picture(report.verdict_text(), report, args.picture))
        }
        Format::Text => print(&text(report, args.picture)),
    }
}

fn text(report: &Report, picture: bool) -> String {
    with_picture(report.to_text(), report, picture)
}

fn with_picture(mut text: String, report: &Report, picture: bool) -> String {
    if picture {
        text.push('\n');
        text.push_str(&report.picture.render());
    }
    text
}

/// A flag that the first SIGINT or SIGTERM sets; the second one ends the program at once.
fn interrupt() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .context("cannot watch for signals")?;
    }
    Ok(flag)
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever read us has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
