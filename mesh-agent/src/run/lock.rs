//! Keeps a second agent of this host away.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::bail;
use nix::fcntl::{Flock, FlockArg};

use super::{lock_path, state_lock_path};
use crate::atomic;
use crate::config::Config;

/// The file in each of the two folders.
pub(super) const FILE: &str = "agent.lock";

/// Locks in runDir and stateDir. One of them is enough to run: a folder that cannot be used stops no guard.
#[derive(Debug)]
pub struct Lock {
    held: Vec<Flock<File>>,
    missing: Vec<Place>,
    failure: Option<String>,
}

/// A file to lock.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    folder: PathBuf,
    setting: &'static str,
}

impl Lock {
    /// Returns which folder cannot be used, and why.
    pub fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    /// Takes what could not be taken before, and makes its folder: sockets can be bound there then.
    pub fn again(&mut self) {
        if !self.missing.is_empty() {
            // Who holds it is another agent with another folder of the other kind: told, and nobody's end.
            let _ = self.take();
        }
    }

    /// Returns the file that somebody else holds, if one is.
    fn take(&mut self) -> Option<String> {
        let mut foreign = None;
        let mut failures = Vec::new();
        for place in std::mem::take(&mut self.missing) {
            let shown = place.path.display();
            match take(&place) {
                Ok(Some(lock)) => {
                    self.held.push(lock);
                    continue;
                }
                Ok(None) => {
                    let why = format!(
                        "{shown}: another mesh-agent runs on this host with the same {}",
                        place.setting
                    );
                    failures.push(why.clone());
                    foreign.get_or_insert(why);
                }
                Err(e) => failures.push(format!("{}: {shown}: {e}; it is tried again", place.setting)),
            }
            self.missing.push(place);
        }
        self.failure = (!failures.is_empty()).then(|| failures.join("; "));
        foreign
    }
}

/// Takes the lock of this host's agent.
///
/// # Errors
/// Fails if another agent holds the lock, or if neither folder can be used.
pub fn lock(config: &Config) -> anyhow::Result<Lock> {
    let place = |path: PathBuf, folder: &Path, setting| Place { path, folder: folder.to_owned(), setting };
    let missing = vec![
        place(lock_path(config), &config.run_dir, "runDir"),
        place(state_lock_path(config), &config.state_dir, "stateDir"),
    ];
    let mut lock = Lock { held: Vec::new(), missing, failure: None };
    if let Some(foreign) = lock.take() {
        bail!("{foreign}");
    }
    match &lock.failure {
        Some(why) if lock.held.is_empty() => bail!("{why}"),
        _ => Ok(lock),
    }
}

/// `None`: somebody else holds it.
fn take(place: &Place) -> io::Result<Option<Flock<File>>> {
    atomic::make_dir(&place.folder, 0o700)?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&place.path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EAGAIN)) => Ok(None),
        Err((_, e)) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> Config {
        let text = format!(
            "node: n\nsite: s\nmesh: m\nregistry: {{file: {{dir: /r}}}}\nrunDir: {0}/run\nstateDir: {0}/state\n",
            folder.display()
        );
        Config::parse("agent.yaml", &text, None).unwrap()
    }

    #[test]
    fn one_folder_is_enough_for_one_agent() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        std::fs::write(&config.run_dir, "a file").unwrap();
        let mut first = lock(&config).unwrap();
        assert!(first.failure().unwrap().starts_with("runDir: "), "{first:?}");
        assert!(lock(&config).unwrap_err().to_string().contains("another mesh-agent"));
        std::fs::remove_file(&config.run_dir).unwrap();
        assert!(lock(&config).unwrap_err().to_string().contains("the same stateDir"));
        first.again();
        assert_eq!(first.failure(), None);
        assert!(lock(&config).unwrap_err().to_string().contains("the same runDir"));
        drop(first);
        assert!(lock(&config).unwrap().failure().is_none());
    }

    #[test]
    fn without_both_folders_there_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        std::fs::write(&config.run_dir, "a file").unwrap();
        std::fs::write(&config.state_dir, "a file").unwrap();
        let why = lock(&config).unwrap_err().to_string();
        assert!(why.contains("runDir") && why.contains("stateDir"), "{why}");
    }
}
