//! `mesh-agent status`

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

pub(super) async fn show(socket: &Path, output: StatusOutput, probe: bool) -> anyhow::Result<()> {
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
    let status: Status = serde_json::from_str(&text).context("the agent's answer")?;
    if probe {
        anyhow::ensure!(status.ready, "not ready: {}", status.errors.join("; "));
        return Ok(());
    }
    match output {
        StatusOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&status)?)),
        StatusOutput::Table => print(&status.to_table()),
    }
}
