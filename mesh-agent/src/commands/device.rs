//! `mesh-agent device`: the process of a userspace device, apart from the agent's, so that it outlives it.

use std::convert::Infallible;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use mesh_overlay::wireguard::{UserspaceConfig, Wireguard};

use crate::cli::Device;

/// Becomes the device. Where the kernel's WireGuard is used, waits for SIGTERM or SIGINT.
pub(super) async fn run(asked: &Device) -> anyhow::Result<()> {
    if let Wireguard::Kernel(_) = choose(asked)? {
        tracing::info!(interface = %asked.interface, "the kernel has WireGuard: no process is needed");
        return super::until_told().await;
    }
    let never = become_device(asked)?;
    match never {}
}

fn choose(asked: &Device) -> anyhow::Result<Wireguard> {
    let userspace = UserspaceConfig {
        interface: asked.interface,
        binary: asked.userspace_binary.clone(),
        run_dir: PathBuf::from("/run/sennit"),
        uapi_dir: PathBuf::from(UserspaceConfig::UAPI_DIR),
        own: None,
        external: true,
    };
    Ok(Wireguard::choose(asked.backend, userspace)?)
}

fn become_device(asked: &Device) -> anyhow::Result<Infallible> {
    let binary = &asked.userspace_binary;
    let mut command = Command::new(binary);
    command.arg("--foreground").arg(asked.interface.as_str());
    Err(command.exec()).with_context(|| format!("starting {}", binary.display()))
}

/// Whether the device answers, or none is needed.
pub(super) async fn probe(asked: &Device) -> anyhow::Result<()> {
    let mut wireguard = choose(asked)?;
    if let Wireguard::Userspace(device) = &mut wireguard
        && !device.answers().await?
    {
        bail!("{}: there is no device that answers", asked.interface);
    }
    Ok(())
}
