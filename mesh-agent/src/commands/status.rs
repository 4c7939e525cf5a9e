//! `mesh-agent status` and `mesh-agent trace`

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

use super::{print, shown};
use crate::cli::StatusOutput;
use crate::status::Status;

/// How long the agent has to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a watched status is shown.
const WATCH: Duration = Duration::from_secs(1);

/// The agent's status, once.
pub(super) async fn show(socket: &Path, output: StatusOutput) -> anyhow::Result<()> {
    let status = ask(socket).await?;
    match output {
        StatusOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&status)?)),
        StatusOutput::Table => print(&status.to_table()),
    }
}

/// Fails with all that is amiss. `peers`: also when a peer is not reached.
pub(super) async fn probe(socket: &Path, peers: bool) -> anyhow::Result<()> {
    let status = ask(socket).await?;
    anyhow::ensure!(status.ready, "not ready: {}", status.errors.join("; "));
    let away = status.peers.iter().filter(|peer| peers && !peer.is_up());
    let away: Vec<&str> = away.map(|peer| peer.name.as_str()).collect();
    let (count, all) = (away.len(), status.peers.len());
    anyhow::ensure!(away.is_empty(), "{count} of {all} peers are not reached: {}", away.join(", "));
    Ok(())
}

/// Again and again: a screen for people, one line each time for programs. An agent that restarts is waited for.
pub(super) async fn watch(socket: &Path, output: StatusOutput) -> anyhow::Result<()> {
    loop {
        let shown = match (ask(socket).await, output) {
            (Ok(status), StatusOutput::Json) => format!("{}\n", serde_json::to_string(&status)?),
            // Home, the text, and nothing below it (ECMA-48: CUP, ED).
            (Ok(status), StatusOutput::Table) => {
                format!("\x1b[H\x1b[2J{}\n{}", status.observed_at, status.to_table())
            }
            (Err(error), StatusOutput::Table) => format!("\x1b[H\x1b[2J{error:#}\n"),
            (Err(error), StatusOutput::Json) => {
                format!("{}\n", serde_json::json!({"error": format!("{error:#}")}))
            }
        };
        print(&shown)?;
        tokio::time::sleep(WATCH).await;
    }
}

/// How a peer is reached and why.
pub(super) async fn trace(socket: &Path, peer: &str, output: StatusOutput) -> anyhow::Result<()> {
    let status = ask(socket).await?;
    let Some(found) = status.peers.iter().find(|found| found.name.as_str() == peer) else {
        let known: Vec<&str> = status.peers.iter().map(|peer| peer.name.as_str()).collect();
        let refused =
            status.refused.iter().find(|one| one.node.as_ref().is_some_and(|node| node.as_str() == peer));
        let why = refused.map_or(String::new(), |one| format!("; it was refused: {}", one.reason));
        anyhow::bail!("{peer} is no peer of {}{why}; its peers are {}", status.node, known.join(", "));
    };
    match output {
        StatusOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(found)?)),
        StatusOutput::Table => print(&found.to_trace()),
    }
}

async fn ask(socket: &Path) -> anyhow::Result<Status> {
    let read = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = tokio::time::timeout(PATIENCE, read)
        .await
        .with_context(|| {
            format!("{}: the agent does not answer within {} s", shown(socket), PATIENCE.as_secs())
        })?
        .with_context(|| format!("{}: is the agent running, and may you read its socket?", shown(socket)))?;
    serde_json::from_str(&text).context("the agent's answer")
}
