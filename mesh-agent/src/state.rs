//! What survives a restart besides the key: the last good peers, and what the operator said for the mesh.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use mesh_overlay::{Memory, Ratchet};
use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::settings::Settings;

/// What the agent knew when it last knew everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
// Another version may have written more: what this one knows of it counts.
#[serde(rename_all = "camelCase")]
pub struct LastGood {
    /// Whether the registry knew this node.
    pub registered: bool,
    /// Whether this node's publication stood there.
    pub published: bool,
    /// This node's own prefixes.
    pub prefixes: Vec<IpNet>,
    /// The peers.
    pub peers: Memory,
    /// Whether the registry could hold MeshNodes.
    #[serde(default)]
    pub mesh_nodes: bool,
    /// What the Mesh said, if there is one.
    #[serde(default)]
    pub settings: Option<Settings>,
    /// This agent never understood its Mesh, and admits nobody.
    #[serde(default)]
    pub waiting: bool,
    /// Whether the registry has an object for each pod of this node: whether a kubelet runs here.
    #[serde(default)]
    pub knows_pods: Option<bool>,
    /// Whether there were no policies, and no word of sites; unknown to an agent that has never enforced any.
    #[serde(default)]
    pub unpoliced: Option<bool>,
    /// Where the API was reached.
    #[serde(default)]
    pub servers: BTreeSet<IpAddr>,
    /// Every prefix that was guarded and not released.
    #[serde(default)]
    pub guarded: Ratchet,
    /// Grants of sites that were once in force here. An address that this host is given later takes none back.
    #[serde(default)]
    pub accepted: BTreeSet<IpNet>,
}

/// The file that holds it.
#[derive(Debug, Clone)]
pub struct LastGoodFile {
    path: PathBuf,
}

impl LastGoodFile {
    /// The file in the agent's state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("last-good.json") }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it. No file is an empty state; a broken one too, with a sentence for the log.
    pub fn load(&self) -> (LastGood, Option<String>) {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return (LastGood::default(), None),
            Err(e) => return (LastGood::default(), Some(format!("{}: {e}", self.path.display()))),
        };
        match serde_json::from_slice(&text) {
            Ok(state) => (state, None),
            Err(e) => {
                let why = format!("{}: {e}; starting without the last good peers", self.path.display());
                (LastGood::default(), Some(why))
            }
        }
    }

    /// Writes it, where it changed; says whether it wrote.
    ///
    /// # Errors
    /// What the system says; the old file is untouched.
    pub fn store(&self, state: &LastGood) -> io::Result<bool> {
        let text = serde_json::to_vec(state).map_err(io::Error::other)?;
        atomic::replace(&self.path, &text, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_good_state_survives_and_a_broken_file_does_not_stop_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let file = LastGoodFile::new(dir.path());
        assert_eq!(file.load(), (LastGood::default(), None));
        let state = LastGood {
            registered: true,
            prefixes: vec!["10.0.0.0/24".parse().unwrap()],
            ..LastGood::default()
        };
        assert!(file.store(&state).unwrap());
        assert!(!file.store(&state).unwrap());
        assert_eq!(file.load(), (state, None));
        for broken in [&b"{"[..], b"", &[0xff], b"{\"registered\":1}"] {
            fs::write(file.path(), broken).unwrap();
            let (state, why) = file.load();
            assert_eq!(state, LastGood::default());
            assert!(why.unwrap().contains("last-good.json"));
        }
    }
}
