//! `mesh-agent guard`

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{block_on, load, log_to_stderr, print, shown};
use crate::cli::GuardCommand;
use crate::config::Config;
use crate::run::control::{Answer, Request};
use crate::state::LastGoodFile;
use crate::{boot, run};

/// How long the agent has to answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn execute(command: GuardCommand) -> anyhow::Result<()> {
    match command {
        GuardCommand::Restore { config, state_dir } => {
            log_to_stderr("info");
            let state_dir = state_dir.unwrap_or_else(|| boot::state_dir(&config));
            let changes = block_on(async { Ok(boot::restore(&state_dir).await?) })?;
            print(&format!("{changes} changes, by {}\n", shown(&state_dir.join(boot::FILE))))
        }
        GuardCommand::Install { root, remove: true, .. } => {
            boot::install::remove(&root)?;
            print("removed\n")
        }
        GuardCommand::Install { root, state_dir, .. } => {
            let agent = std::env::current_exe().context("finding this program")?;
            let nft = boot::install::find("nft")?;
            let written = boot::install::install(&root, &agent, &nft, &state_dir)?;
            print(&format!("{written} files written below {}\n", shown(&root)))
        }
        GuardCommand::Release { what, configured } => release(&what, &load(&configured)?),
    }
}

/// Releases each of these; says which are kept under no such name.
fn release(names: &[String], config: &Config) -> anyhow::Result<()> {
    let (mut released, mut unknown) = (Vec::new(), Vec::new());
    for name in names {
        let what = name.strip_prefix("site/").map_or(name.clone(), |site| format!("site {site}"));
        let found = match block_on(ask(&config.control_socket(), &Request::Release(what.clone()))) {
            Ok(Answer::Released(found)) => found,
            Ok(Answer::Refused(why)) => bail!("{name}: {why}"),
            Ok(other) => bail!("{name}: the agent answered something else: {other:?}"),
            // Nobody runs: the next start finds it done.
            Err(why) => release_at_rest(config, &what).map_err(|e| why.context(format!("{e:#}")))?,
        };
        if found.is_empty() {
            unknown.push(name.as_str());
        }
        released.extend(found);
    }
    if !released.is_empty() {
        print(&format!("released: {}\n", released.join(", ")))?;
    }
    if unknown.is_empty() {
        return Ok(());
    }
    bail!(
        "nothing is kept under {}; `mesh-agent status` lists what is, and what somebody holds is not released",
        unknown.join(", ")
    )
}

fn release_at_rest(config: &Config, what: &str) -> anyhow::Result<Vec<String>> {
    let _lock = run::lock(config)?;
    let file = LastGoodFile::new(&config.state_dir);
    let (mut state, broken) = file.load();
    if let Some(why) = broken {
        bail!("{why}");
    }
    let held = state.peers.0.values().flat_map(|peer| peer.prefixes.iter().chain(&peer.withheld));
    let held = held.chain(&state.prefixes).chain(&state.accepted).copied().collect();
    let released = state.guarded.release(what, &held);
    file.store(&state).with_context(|| shown(file.path()))?;
    Ok(released.iter().map(ToString::to_string).collect())
}

pub(super) async fn ask(socket: &Path, request: &Request) -> anyhow::Result<Answer> {
    let asking = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut line = serde_json::to_vec(request).map_err(std::io::Error::other)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = tokio::time::timeout(PATIENCE, asking)
        .await
        .with_context(|| {
            format!("{}: the agent does not answer within {} s", shown(socket), PATIENCE.as_secs())
        })?
        .with_context(|| format!("{}: is the agent running, and may you use its socket?", shown(socket)))?;
    serde_json::from_str(&text).context("the agent's answer")
}
