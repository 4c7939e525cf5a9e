//! Puts up guard, blackholes and rules of the last good state before anything is opened or parsed.
//!
//! It needs no configuration, no registry and no device. `mesh-agent run` begins with it, and a unit that runs
//! before the network is up (`mesh-agent guard restore`) does nothing else.

pub mod install;

use std::io;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use mesh_overlay::backend::{BackendError, NetBackend as _, NftBackend as _};
use mesh_overlay::local::{InterfaceName, Routing};
use mesh_overlay::netlink::Netlink;
use mesh_overlay::nft::Nft;
use mesh_overlay::{Guard, MeshPlan, Route, RouteChange, RouteKind, RouteTable};
use serde::{Deserialize, Serialize};

use crate::atomic;

/// Names the state directory where nobody says.
pub const STATE_DIR: &str = "/var/lib/sennit";
/// The file in the state directory that holds what stands first.
pub const FILE: &str = "guard.json";
/// The file in the state directory that holds the last configuration that was fine.
pub const CONFIG: &str = "agent.last-good.yaml";
/// The largest state and configuration that are read, in bytes.
const FILE_MOST: u64 = 16 << 20;

/// Holds what has to stand first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    guard: Guard,
    interface: InterfaceName,
    /// Routing table, rule priority, protocol number.
    routing: (u32, u32, u8),
    blackholes: Vec<IpNet>,
    throws: Vec<IpNet>,
    own: Vec<IpNet>,
}

/// Why it could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file cannot be read, or is none of ours.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The kernel refused something. The rest was done.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Host(Vec<BackendError>),
}

impl Standing {
    /// Takes from a plan what has to stand before anything else is known. Interfaces are known by index, which
    /// means nothing after a reboot: those are left to the kinds that pods have, and to the agent.
    pub fn of(plan: &MeshPlan) -> Self {
        let of_kind = |kind: RouteKind| {
            let routes = plan.routes.routes.iter().filter(move |route| route.kind == kind);
            routes.map(|route| route.to).collect()
        };
        let mut guard = plan.guard.clone();
        guard.underlay.clear();
        // What is exempt now may not be when it is read.
        if let Some(cleartext) = &mut guard.cleartext {
            cleartext.exempt.clear();
        }
        let routing = plan.routes.routing;
        Self {
            guard,
            interface: plan.routes.interface,
            routing: (routing.table, routing.priority, routing.protocol),
            blackholes: of_kind(RouteKind::Blackhole),
            throws: of_kind(RouteKind::Throw),
            own: plan.routes.own.iter().copied().collect(),
        }
    }

    /// Returns the fingerprint of its guard.
    pub fn fingerprint(&self) -> String {
        self.guard.fingerprint()
    }

    /// Writes it, where it changed; reports whether it wrote.
    ///
    /// # Errors
    /// Returns what the system says; the old file is untouched.
    pub fn store(&self, state_dir: &Path) -> io::Result<bool> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        atomic::replace(&state_dir.join(FILE), &text, 0o600)
    }

    /// Reads it; `None` where there is none, as on a host that was never part of a mesh.
    ///
    /// # Errors
    /// Returns [`RestoreError::File`].
    pub fn load(state_dir: &Path) -> Result<Option<Self>, RestoreError> {
        let path = state_dir.join(FILE);
        let failed = |reason: String| RestoreError::File { path: path.display().to_string(), reason };
        let Some(text) = read(&path).map_err(|e| failed(e.to_string()))? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|e| failed(e.to_string()))
    }

    fn routes(&self) -> RouteTable {
        let of_kind = |nets: &[IpNet], kind: RouteKind| {
            nets.iter().map(|net| Route::new(*net, kind)).collect::<Vec<_>>()
        };
        let (table, priority, protocol) = self.routing;
        let mut routes = of_kind(&self.blackholes, RouteKind::Blackhole);
        routes.extend(of_kind(&self.throws, RouteKind::Throw));
        RouteTable {
            routing: Routing { table, priority, protocol },
            interface: self.interface,
            routes: routes.into_iter().collect(),
            own: self.own.iter().copied().collect(),
        }
    }
}

/// Puts up what stood last, where it does not stand; nothing is ever taken away. Returns how many changes were
/// made. Needs a tokio runtime.
///
/// # Errors
/// Returns [`RestoreError`]; what does not depend on it was done all the same.
pub async fn restore(state_dir: &Path) -> Result<usize, RestoreError> {
    let Some(standing) = Standing::load(state_dir)? else { return Ok(0) };
    let mut errors = Vec::new();
    let mut changes = 0;
    let mut note = |result: Result<(), BackendError>| match result {
        Ok(()) => changes += 1,
        Err(error) => errors.push(error),
    };
    let mut nft = Nft::new();
    match nft.stands().await {
        Ok(true) => {}
        Ok(false) => note(nft.apply(&standing.guard).await),
        Err(error) => note(Err(error)),
    }
    let table = standing.routes();
    let observed = match Netlink::new() {
        Ok(mut net) => match net.observe(&standing.interface, &table.routing).await {
            Ok(found) => Some((net, found)),
            Err(error) => {
                note(Err(error));
                None
            }
        },
        Err(error) => {
            note(Err(error));
            None
        }
    };
    if let Some((mut net, found)) = observed {
        let adds = |change: &RouteChange| {
            matches!(change, RouteChange::Set(_) | RouteChange::AddRule { .. } | RouteChange::AddOwn(_))
        };
        for change in table.diff(&found.routes, false).iter().filter(|change| adds(change)) {
            note(net.apply_route(&standing.interface, &table.routing, change).await);
        }
    }
    if errors.is_empty() { Ok(changes) } else { Err(RestoreError::Host(errors)) }
}

/// Finds the state directory that a configuration names, also in one that is broken otherwise: the last line
/// that begins with `stateDir:` counts. [`STATE_DIR`] where none does.
pub fn state_dir(config: &Path) -> PathBuf {
    let text = read(config).ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let said = text.lines().filter_map(|line| line.strip_prefix("stateDir:")).next_back();
    let said = said.or_else(|| {
        // A document in JSON, or in one line.
        let (_, rest) = text.split_once("\"stateDir\"").or_else(|| text.split_once("stateDir:"))?;
        rest.trim_start_matches([':', ' ']).split([',', '}', '\n']).next()
    });
    let said = said.map(|said| said.split(" #").next().unwrap_or_default());
    let path = PathBuf::from(said.unwrap_or_default().trim().trim_matches(['"', '\'']));
    if path.is_absolute() { path } else { PathBuf::from(STATE_DIR) }
}

/// Reads a regular file of bounded size; `None` where there is none.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    atomic::read_at_most(file, FILE_MOST).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_configurations_still_name_their_state() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.yaml");
        for (text, wanted) in [
            ("node: a\nstateDir: /s/one\nsite: [", "/s/one"),
            ("stateDir: '/s/two' # here\n{{{", "/s/two"),
            (r#"{"node": "a", "stateDir": "/s/three", "x": "#, "/s/three"),
            (r#"{"stateDir":"/s/four"}"#, "/s/four"),
            ("{node: a, stateDir: /s/five, site: }", "/s/five"),
            ("stateDir: relative\n", STATE_DIR),
            ("node: a\n", STATE_DIR),
            ("\u{fffd}\0", STATE_DIR),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(state_dir(&file), Path::new(wanted), "{text}");
        }
        assert_eq!(state_dir(Path::new("/no/such/file")), Path::new(STATE_DIR));
        assert_eq!(state_dir(Path::new("/dev/zero")), Path::new(STATE_DIR));
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Standing::load(dir.path()).unwrap().is_none());
        for broken in [&b"{"[..], b"", &[0xff], b"{\"guard\":1}"] {
            std::fs::write(dir.path().join(FILE), broken).unwrap();
            assert!(Standing::load(dir.path()).unwrap_err().to_string().contains(FILE));
        }
    }
}
