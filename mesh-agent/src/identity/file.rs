//! The record kept beside the key: its generation, its owner and the machine it was made on.

use std::io;
use std::path::{Path, PathBuf};

use mesh_keyring::{NodeName, PublicKey};
use mesh_overlay::advertisement::EPOCH_MOST;
use serde::{Deserialize, Serialize};

use super::machine::Machine;
use crate::atomic;

/// The largest file that is read, in bytes.
const FILE_MOST: u64 = 64 << 10;

/// An identity as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// Which key this is about.
    pub public_key: PublicKey,
    /// The generation that was published last.
    pub generation: u64,
    /// The one that the key was made with.
    pub made: u64,
    /// The node that it was made for.
    pub node: NodeName,
    /// The machine that it was made on.
    #[serde(default)]
    pub machine: Machine,
    /// The number of agents that have started with this state.
    #[serde(default)]
    pub starts: u32,
    /// The last of them.
    #[serde(default)]
    pub instance: Option<u64>,
    /// The state of this node was copied; from which node.
    #[serde(default)]
    pub copied_from: Option<NodeName>,
}

/// The generation after `last` at this time of day, in milliseconds since 1970. It grows whatever was done
/// to the clock.
pub fn later(last: Option<u64>, now: u64) -> u64 {
    // A clock that is off by ages must not use up all the numbers that there are.
    let now = now.min(EPOCH_MOST / 2);
    last.map_or(now, |last| now.max(last.saturating_add(1))).min(EPOCH_MOST)
}

/// The file that holds it.
#[derive(Debug, Clone)]
pub struct IdentityFile {
    path: PathBuf,
}

impl IdentityFile {
    /// The file beside a key file.
    pub fn beside(key: &Path) -> Self {
        Self { path: key.with_file_name("identity.json") }
    }

    /// Returns the file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it. A broken one is none, with a sentence for the log.
    pub fn load(&self) -> (Option<Kept>, Option<String>) {
        let read = std::fs::File::open(&self.path).and_then(|file| atomic::read_at_most(file, FILE_MOST));
        let broken = |why: String| (None, Some(format!("{}: {why}; it is made anew", self.path.display())));
        match read {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(kept) => (Some(kept), None),
                Err(e) => broken(e.to_string()),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => (None, None),
            Err(e) => broken(e.to_string()),
        }
    }

    /// Writes it, where it changed.
    ///
    /// # Errors
    /// Returns the system's error. The old file is then unchanged.
    pub fn store(&self, kept: &Kept) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(kept).map_err(io::Error::other)?;
        atomic::replace(&self.path, &text, 0o600).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_broken_file_is_none_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = IdentityFile::beside(&dir.path().join("private.key"));
        assert_eq!(file.load(), (None, None));
        for broken in [&b"{"[..], b"", &[0xff], b"[]"] {
            std::fs::write(file.path(), broken).unwrap();
            let (kept, why) = file.load();
            assert!(kept.is_none() && why.unwrap().contains("identity.json"));
        }
    }

    proptest! {
        #[test]
        fn a_generation_grows_whatever_the_clock_says(last in 0..EPOCH_MOST, now: u64) {
            prop_assert!(later(Some(last), now) > last && later(None, now) < EPOCH_MOST);
        }
    }
}
