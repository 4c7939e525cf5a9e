//! `mesh-agent device`: the process of a userspace device, apart from the agent's, so that it outlives it.

use std::convert::Infallible;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, bail};
use mesh_overlay::wireguard::Wireguard;

use crate::config::Config;
use crate::run;

/// Becomes the device. Where the kernel's WireGuard is used, waits for SIGTERM or SIGINT.
pub(super) async fn run(config: &Config) -> anyhow::Result<()> {
    let interface = &config.wireguard.interface;
    if let Wireguard::Kernel(_) = run::wireguard(config, None)? {
        tracing::info!(%interface, "the kernel has WireGuard: no process is needed");
        return super::until_told().await;
    }
    let never = become_device(config)?;
    match never {}
}

fn become_device(config: &Config) -> anyhow::Result<Infallible> {
    let binary = &config.wireguard.userspace_binary;
    let mut command = Command::new(binary);
    command.arg("--foreground").arg(config.wireguard.interface.as_str());
    Err(command.exec()).with_context(|| format!("starting {}", binary.display()))
}

/// Whether the device answers, or none is needed.
pub(super) async fn probe(config: &Config) -> anyhow::Result<()> {
    let mut wireguard = run::wireguard(config, None)?;
    if let Wireguard::Userspace(device) = &mut wireguard
        && !device.answers().await?
    {
        bail!("{}: there is no device that answers", config.wireguard.interface);
    }
    Ok(())
}
