//! Files that are either the old or the new one, never half of each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Replaces `path` by `content`, unless it holds just that already; says whether it wrote. On failure (a full
/// disk) the old file is untouched and nothing else is left.
///
/// # Errors
/// What the system says.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    if holds(path, content) {
        return Ok(false);
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    // A dot keeps half-written files out of what a registry reads.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}", std::process::id()));
    let written = write_synced(&temporary, content, mode)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(dir)?.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| true)
}

/// Reads what is left of a file, where that is no more than `most` bytes.
///
/// # Errors
/// Returns what the system says, or that it has more.
pub fn read_at_most(file: impl io::Read, most: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    if file.take(most + 1).read_to_end(&mut content)? as u64 > most {
        return Err(io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(content)
}

/// Whether a regular file holds just this. Whatever else stands there, a pipe or a link to an endless device, is not
/// read.
fn holds(path: &Path, content: &[u8]) -> bool {
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    let Ok(file) = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) else { return false };
    let equal_size = file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() == content.len() as u64);
    let mut old = Vec::with_capacity(content.len());
    equal_size && file.take(content.len() as u64).read_to_end(&mut old).is_ok() && old == content
}

fn write_synced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Makes a directory with its parents, with this mode where it is new.
///
/// # Errors
/// What the system says.
pub fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_content_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(replace(&path, b"one", 0o600).unwrap());
        assert!(!replace(&path, b"one", 0o600).unwrap());
        assert!(replace(&path, b"two", 0o600).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("x"), "keeps the directory from being replaced").unwrap();
        assert!(replace(&path, b"new", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
