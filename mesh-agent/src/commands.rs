//! What each command does.

mod check;
mod cleanup;
mod device;
mod guard;
mod identity;
pub mod join;
mod plan;
mod policy;
mod status;

use std::path::Path;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use crate::cli::{Cli, Command, Configured};
use crate::config::Config;
use crate::{boot, federate, run};

/// Runs a command to its end.
///
/// # Errors
/// What went wrong, in one line for the terminal.
pub fn execute(cli: Cli) -> anyhow::Result<()> {
    crate::descriptors::raise();
    match cli.command {
        Command::Run(configured) => run_agent(&configured),
        Command::Device(asked) => {
            log_to_stderr("info");
            if asked.probe { block_on(device::probe(&asked)) } else { block_on(device::run(&asked)) }
        }
        Command::Join(asked) => block_on(join::join(&asked)),
        Command::Federate(asked) => {
            log_to_stderr("info");
            block_on(federate::federate(&asked))
        }
        Command::InstallCheck { configured, output } => block_on(check::check(load(&configured)?, output)),
        Command::Status { socket, probe: true, peers, .. } => block_on(status::probe(&socket, peers)),
        Command::Status { socket, output, watch: true, .. } => block_on(status::watch(&socket, output)),
        Command::Status { socket, output, .. } => block_on(status::show(&socket, output)),
        Command::Trace { peer, socket, output } => block_on(status::trace(&socket, &peer, output)),
        Command::Plan { state, node, config, output } => plan::show(&state, &node, config.as_deref(), output),
        Command::Policy { command } => policy::execute(command),
        Command::Rekey { after, configured } => identity::rekey(after, &load(&configured)?),
        Command::Forget { name, configured } => identity::forget(&name, &load(&configured)?),
        Command::Guard { command } => guard::execute(command),
        Command::Cleanup { configured, keep_key, stay } => {
            let config = load(&configured)?;
            start_log(&config);
            block_on(async {
                cleanup::clean(&config, keep_key).await?;
                if stay { until_told().await } else { Ok(()) }
            })
        }
    }
}

/// Runs the agent. What stood last stands before anything else is opened or parsed; a configuration that cannot be
/// used gives way to the last one that could.
fn run_agent(configured: &Configured) -> anyhow::Result<()> {
    let state_dir = boot::state_dir(&configured.config);
    let restored = block_on(async { Ok(boot::restore(&state_dir).await) })?;
    let mut logging = false;
    loop {
        let kept = state_dir.join(boot::CONFIG);
        let (config, complaint) = match load(configured) {
            Ok(config) => (config, None),
            Err(why) => {
                let Ok(last) = Config::load(&kept, configured.node.as_deref()) else { return Err(why) };
                let (file, node) = (configured.config.clone(), configured.node.clone());
                (last, Some(run::Complaint { why: format!("{why:#}"), file, node }))
            }
        };
        if !std::mem::replace(&mut logging, true) {
            start_log(&config);
            match &restored {
                Ok(0) => {}
                Ok(changes) => tracing::info!(changes, "the guard stands as it stood last"),
                Err(why) => tracing::error!("restoring the guard: {why}"),
            }
        }
        if complaint.is_none() {
            keep_config(&configured.config, &config);
        }
        if block_on(run::run(config, complaint)).map_err(crate::descriptors::explained)? == run::Ended::Told {
            return Ok(());
        }
    }
}

/// Keeps a configuration that is fine, for the day when it is not.
fn keep_config(file: &Path, config: &Config) {
    let kept = config.state_dir.join(boot::CONFIG);
    let written = crate::atomic::make_dir(&config.state_dir, 0o700)
        .and_then(|()| std::fs::read(file))
        .and_then(|text| crate::atomic::replace(&kept, &text, 0o600));
    if let Err(e) = written {
        tracing::warn!("{}: {e}; without it a configuration that breaks stops the agent", kept.display());
    }
}

/// Waits for SIGTERM or SIGINT.
async fn until_told() -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

fn load(configured: &Configured) -> anyhow::Result<Config> {
    Ok(Config::load(&configured.config, configured.node.as_deref())?)
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let result = LocalSet::new().block_on(&runtime, future);
    // A resolver that still waits for an answer must not hold up the exit.
    runtime.shutdown_background();
    result
}

fn start_log(config: &Config) {
    log_to_stderr(config.log.as_str());
}

fn log_to_stderr(level: &str) {
    // The API's client would log whole answers that it cannot read, and every failure, which status and our own log tell too.
    let fallback = tracing_subscriber::EnvFilter::new(format!("{level},kube_client=off"));
    let filter = tracing_subscriber::EnvFilter::try_from_env("SENNIT_LOG").unwrap_or(fallback);
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Prints to standard output; a reader that went away is no error.
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("writing to standard output"),
        _ => Ok(()),
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
