use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::{Bind, Error, Result};

const NONE: Option<&str> = None;

/// Furnishes the calling thread's fresh mount namespace: nothing propagates in or out, `/run` (and
/// `/var/run` where it is a directory of its own) and `tmpfs` are empty, `/sys` is this network namespace's,
/// `binds` are made. Gives warnings for what could be left out.
pub(crate) fn furnish(tmpfs: &[PathBuf], binds: &[Bind]) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(Error::errno("make / private in the host's mount namespace"))?;
    // Opened before anything is covered, and after the namespace was made: a bind source must be in it.
    let sources = binds.iter().map(|bind| open(&bind.source)).collect::<Result<Vec<_>>>()?;
    let mut fresh = vec![PathBuf::from("/run")];
    if fs::canonicalize("/var/run").is_ok_and(|path| path != Path::new("/run")) {
        fresh.push(PathBuf::from("/var/run"));
    }
    fresh.extend(tmpfs.iter().cloned());
    let limits = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    for path in &fresh {
        mount(Some("netlab"), path, Some("tmpfs"), limits, Some("mode=0755"))
            .map_err(Error::errno(format!("mount a tmpfs at {}", path.display())))?;
    }
    if let Err(errno) = mount(Some("netlab"), "/sys", Some("sysfs"), limits | MsFlags::MS_NOEXEC, NONE) {
        warnings.push(format!("/sys shows the interfaces outside: mounting sysfs failed: {errno}"));
    }
    for (bind, source) in binds.iter().zip(&sources) {
        make_mount_point(bind, source, &fresh)?;
        let from = format!("/proc/self/fd/{}", source.as_raw_fd());
        let what = || format!("bind {} to {}", bind.source.display(), bind.target.display());
        mount(Some(from.as_str()), &bind.target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .map_err(Error::errno(what()))?;
        if bind.read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NONE, &bind.target, NONE, flags, NONE).map_err(Error::errno(what()))?;
        }
    }
    Ok(warnings)
}

fn open(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .map_err(Error::system(format!("open {} to bind it", path.display())))
}

fn make_mount_point(bind: &Bind, source: &File, fresh: &[PathBuf]) -> Result<()> {
    let target = &bind.target;
    if target.exists() {
        return Ok(());
    }
    // Elsewhere the file system is the machine's own: nothing may be made there.
    if !fresh.iter().any(|path| target.starts_with(path)) {
        return Err(Error::spec(
            target.display().to_string(),
            "the mount point does not exist and is under no fresh tmpfs; make it, or list its parent in `tmpfs`",
        ));
    }
    let failed = || format!("make the mount point {}", target.display());
    if source.metadata().map_err(Error::system(failed()))?.is_dir() {
        return fs::create_dir_all(target).map_err(Error::system(failed()));
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(Error::system(failed()))?;
    }
    File::create(target).map(drop).map_err(Error::system(failed()))
}
