//! `mesh-agent cleanup`

use std::fs;
use std::io;
use std::path::Path;

use anyhow::bail;
use mesh_overlay::backend::{BackendError, NetBackend as _, NftBackend as _, WireguardBackend as _};
use mesh_overlay::netlink::Netlink;
use mesh_overlay::nft::Nft;

use super::shown;
use crate::config::Config;
use crate::identity::file::IdentityFile;
use crate::registry::Registry;
use crate::run;
use crate::state::LastGoodFile;

/// Removes all that the agent made. Every step is tried, also after one failed.
pub(super) async fn clean(config: &Config, keep_key: bool) -> anyhow::Result<()> {
    let _lock = run::lock(config)?;
    let mut failures = Vec::new();
    let mut tried = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            tracing::error!("cleanup: {what}: {why}");
            failures.push(what.to_owned());
        }
    };
    // The publication first: the others stop sending before the device goes.
    let withdrawn = match Registry::open(&config.registry, &config.grants.mesh, &config.site, false).await {
        Ok((registry, _)) => registry.withdraw(&config.node).await,
        Err(e) => Err(e),
    };
    tried("publication", withdrawn.map_err(|e| e.to_string()));
    let device = match run::wireguard(config, None) {
        Ok(mut wireguard) => wireguard.remove().await.map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    tried("device", device);
    let routes = match Netlink::new() {
        Ok(mut net) => net.remove_all(&config.routing).await.map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    tried("routes", routes);
    tried("VXLAN devices", leave_carriers().await.map_err(|e| e.to_string()));
    // Nothing comes out of a tunnel any more.
    tried("policy", crate::policing::remove());
    // The guard last: until here it keeps what the mesh carried off the underlay.
    tried("guard", Nft::new().remove().await.map_err(|e| e.to_string()));
    let flows = config.flow_log();
    tried("flow log", remove(&flows).and_then(|()| remove(&crate::policing::aside(&flows))));
    tried("state", remove(LastGoodFile::new(&config.state_dir).path()));
    tried("guard's state", remove(&config.state_dir.join(crate::boot::FILE)));
    tried("last good configuration", remove(&config.state_dir.join(crate::boot::CONFIG)));
    tried("lock of the state", remove(&run::state_lock_path(config)));
    tried("names", remove(&config.state_dir.join(crate::policing::NAMES)));
    if !keep_key {
        tried("key", remove(run::key_file(config).path()));
        tried("identity", remove(IdentityFile::beside(run::key_file(config).path()).path()));
        tried("key directory", remove_empty(&config.state_dir.join("keys")));
        tried("state directory", remove_empty(&config.state_dir));
    }
    tried("socket", remove(&config.socket()));
    tried("control socket", remove(&config.control_socket()));
    tried("device log", remove(&run::device_log(config)));
    tried("lock", remove(&run::lock_path(config)));
    tried("run directory", remove_empty(&config.run_dir));
    if failures.is_empty() { Ok(()) } else { bail!("not all was removed: {}", failures.join(", ")) }
}

async fn leave_carriers() -> Result<(), BackendError> {
    let mut net = Netlink::new()?;
    for name in net.own_vxlan().await? {
        net.remove_vxlan(&name).await?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", shown(path))),
        _ => Ok(()),
    }
}

/// Removes a directory; one with files of others stays, and so does one that is mounted into a container.
fn remove_empty(path: &Path) -> Result<(), String> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound, ReadOnlyFilesystem, ResourceBusy};
    match fs::remove_dir(path) {
        Err(e) if ![NotFound, DirectoryNotEmpty, ReadOnlyFilesystem, ResourceBusy].contains(&e.kind()) => {
            Err(format!("{}: {e}", shown(path)))
        }
        _ => Ok(()),
    }
}
