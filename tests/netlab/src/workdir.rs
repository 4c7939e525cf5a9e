use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// A lab's directory outside. It is locked while the lab lives, so that a later lab can tell what a killed
/// one left behind and remove it.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    _alive: File,
}

impl WorkDir {
    pub(crate) fn new() -> Result<WorkDir> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let base = base()?;
        // Held over sweeping and making: a directory between its making and its locking looks stale.
        let gate = lock_file(&base.join("lock"))?;
        gate.lock().map_err(Error::system(format!("lock {}", base.join("lock").display())))?;
        sweep(&base);
        let name = format!("lab-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = base.join(name);
        make(&path).map_err(Error::system(format!("make {}", path.display())))?;
        let alive = lock_file(&path.join("alive"))?;
        alive.lock().map_err(Error::system(format!("lock {}", path.display())))?;
        Ok(WorkDir { path, _alive: alive })
    }

    /// Makes a directory inside.
    pub(crate) fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(Error::system(format!("make {}", path.display())))?;
        Ok(path)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn lock_file(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::system(format!("open {}", path.display())))
}

fn make(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// `$TMPDIR/netlab-UID`, ours alone. The uid is the one outside any user namespace, because that owns it.
fn base() -> Result<PathBuf> {
    let inside = nix::unistd::geteuid().as_raw();
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let path = std::env::temp_dir().join(format!("netlab-{}", outer_uid(&map, inside)));
    match make(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::system(format!("make {}", path.display()))(error));
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(&path).map_err(Error::system(format!("stat {}", path.display())))?;
    if !meta.is_dir() || meta.uid() != inside || meta.mode() & 0o077 != 0 {
        let error = io::Error::other("it is not a directory of mode 0700 owned by this user: remove it");
        return Err(Error::system(format!("use {}", path.display()))(error));
    }
    Ok(path)
}

fn outer_uid(map: &str, inside: u32) -> u32 {
    map.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().map(str::parse::<u32>);
            let (first, outer, count) = (fields.next()?.ok()?, fields.next()?.ok()?, fields.next()?.ok()?);
            let offset = inside.checked_sub(first).filter(|offset| *offset < count)?;
            outer.checked_add(offset)
        })
        .next()
        .unwrap_or(inside)
}

/// Removes directories that no living lab holds.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with("lab-") {
            continue;
        }
        let stale = match File::open(entry.path().join("alive")) {
            Ok(alive) => alive.try_lock().is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if stale {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::outer_uid;

    #[test]
    fn uid_outside_is_read_from_the_map() {
        assert_eq!(outer_uid("         0          0 4294967295\n", 0), 0);
        assert_eq!(outer_uid("         0      65534          1\n", 0), 65534);
        assert_eq!(outer_uid("0 100000 65536\n", 7), 100_007);
        assert_eq!(outer_uid("garbage", 7), 7);
    }
}
