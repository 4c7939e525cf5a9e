//! Installs the unit that restores the guard at boot on the host of a pod: programs, their libraries and the unit.
//!
//! The host's own libraries may be older than the image's, and it may have no `nft`. So everything that the two
//! programs are linked with comes along, and the image's loader starts them.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::atomic;

/// The folder on the host, below its root.
const FOLDER: &str = "opt/sennit/boot";
/// The folder of systemd's units, below the host's root.
const UNITS: &str = "etc/systemd/system";
/// The unit's name.
const UNIT: &str = "sennit-guard.service";
/// The folder of what the boot asks for, below that of the units.
const WANTS: &str = "sysinit.target.wants";
/// The unit as hosts without Kubernetes have it; the command is replaced.
const TEXT: &str = include_str!("../../../deploy/systemd/sennit-guard.service");

/// Why it could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// The answer of the system.
        source: io::Error,
    },
    /// What a program is linked with cannot be told.
    #[error("{program}: what it is linked with cannot be told: {reason}")]
    Libraries {
        /// The program.
        program: String,
        /// What is wrong.
        reason: String,
    },
    /// A program is not there.
    #[error("{0} is not on PATH; install the package nftables, or use the project's image")]
    Missing(&'static str),
}

fn of(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    move |source| InstallError::File { path: path.display().to_string(), source }
}

/// Installs programs, libraries and unit below the host's root; `agent` is this program, `nft` the other. Returns
/// how many files were written: none where all is as it should be.
///
/// # Errors
/// Returns [`InstallError`]. What was installed before stays usable.
pub fn install(root: &Path, agent: &Path, nft: &Path, state_dir: &Path) -> Result<usize, InstallError> {
    let mut files = BTreeMap::new();
    let mut loader = None;
    for (name, program) in [("mesh-agent", agent), ("nft", nft)] {
        files.insert(PathBuf::from("bin").join(name), program.to_owned());
        for library in libraries(program)? {
            let Some(file) = library.file_name() else { continue };
            if file.to_string_lossy().starts_with("ld-") || file.to_string_lossy().starts_with("ld64") {
                loader = Some(file.to_owned());
            }
            files.insert(PathBuf::from("lib").join(file), library.clone());
        }
    }
    let folder = root.join(FOLDER);
    let mut written = 0;
    for (to, from) in files {
        let to = folder.join(to);
        make_dir(to.parent().unwrap_or(&folder))?;
        let content = std::fs::read(&from).map_err(of(&from))?;
        written += usize::from(atomic::replace(&to, &content, 0o755).map_err(of(&to))?);
    }
    let units = root.join(UNITS);
    make_dir(&units.join(WANTS))?;
    let unit = units.join(UNIT);
    let text = unit_text(loader.as_ref().map(PathBuf::from).as_deref(), state_dir);
    written += usize::from(atomic::replace(&unit, text.as_bytes(), 0o644).map_err(of(&unit))?);
    let link = units.join(WANTS).join(UNIT);
    match std::os::unix::fs::symlink(Path::new("..").join(UNIT), &link) {
        Ok(()) => written += 1,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(of(&link)(e)),
    }
    // The power may fail next, and without the link the unit does not run.
    let wants = units.join(WANTS);
    std::fs::File::open(&wants).and_then(|folder| folder.sync_all()).map_err(of(&wants))?;
    Ok(written)
}

/// Removes what [`install`] made. What is gone is no error.
///
/// # Errors
/// Returns the first thing that could not be removed; the rest is tried all the same.
pub fn remove(root: &Path) -> Result<(), InstallError> {
    let units = root.join(UNITS);
    let mut first = Ok(());
    let mut note = |path: &Path, result: io::Result<()>| {
        if let Err(e) = result
            && e.kind() != io::ErrorKind::NotFound
            && first.is_ok()
        {
            first = Err(of(path)(e));
        }
    };
    for path in [units.join(WANTS).join(UNIT), units.join(UNIT)] {
        note(&path, std::fs::remove_file(&path));
    }
    let folder = root.join(FOLDER);
    note(&folder, std::fs::remove_dir_all(&folder));
    first
}

fn make_dir(path: &Path) -> Result<(), InstallError> {
    std::fs::create_dir_all(path).map_err(of(path))
}

/// The unit with the command that starts what was installed.
fn unit_text(loader: Option<&Path>, state_dir: &Path) -> String {
    let folder = Path::new("/").join(FOLDER);
    let start = match loader {
        Some(loader) => {
            let (loader, libraries) = (folder.join("lib").join(loader), folder.join("lib"));
            format!("{} --library-path {} ", loader.display(), libraries.display())
        }
        // Linked with nothing.
        None => String::new(),
    };
    let program = |name: &str| format!("{start}{}", folder.join("bin").join(name).display());
    TEXT.lines().fold(String::new(), |mut text, line| {
        if line.starts_with("ExecStart=") {
            text.push_str(&format!("Environment=\"SENNIT_NFT={}\"\n", program("nft")));
            let command = format!("guard restore --state-dir {}", state_dir.display());
            text.push_str(&format!("ExecStart={} {command}\n", program("mesh-agent")));
        } else if line.starts_with("RequiresMountsFor=") {
            text.push_str(&format!("RequiresMountsFor={} {}\n", folder.display(), state_dir.display()));
        } else {
            text.push_str(line);
            text.push('\n');
        }
        text
    })
}

/// The libraries that a program is linked with, its loader among them, as the loader tells (ld.so(8)).
fn libraries(program: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let failed = |reason: String| InstallError::Libraries { program: program.display().to_string(), reason };
    let told = Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1").output();
    let told = told.map_err(|e| failed(e.to_string()))?;
    if !told.status.success() {
        return Err(failed(format!("the loader ended with {}", told.status)));
    }
    let text = String::from_utf8_lossy(&told.stdout);
    let paths = text.lines().filter_map(|line| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path).split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    Ok(paths.collect())
}

/// Finds a program on PATH and in the folders of the system's own.
///
/// # Errors
/// Returns [`InstallError::Missing`].
pub fn find(name: &'static str) -> Result<PathBuf, InstallError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    let executable = |path: &PathBuf| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    folders.map(|folder| folder.join(name)).find(executable).ok_or(InstallError::Missing(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_runs_by_its_own_libraries() {
        let root = tempfile::tempdir().unwrap();
        let sh = find("sh").unwrap();
        let state = Path::new("/srv/state");
        assert!(install(root.path(), &sh, &sh, state).unwrap() > 3);
        assert_eq!(install(root.path(), &sh, &sh, state).unwrap(), 0, "a second time writes nothing");
        let unit = std::fs::read_to_string(root.path().join(UNITS).join(WANTS).join(UNIT)).unwrap();
        let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let command = command.replace("/opt/sennit", &root.path().join("opt/sennit").display().to_string());
        let mut words = command.split(' ').take_while(|word| *word != "guard");
        let ran = Command::new(words.next().unwrap()).args(words).args(["-c", "echo it runs"]).output();
        assert_eq!(ran.unwrap().stdout, b"it runs\n");
        for wanted in [
            "Before=network-pre.target kubelet.service",
            "SENNIT_NFT=/opt/sennit/boot/lib/ld",
            "RequiresMountsFor=/opt/sennit/boot /srv/state\n",
        ] {
            assert!(unit.contains(wanted), "{unit}");
        }
        remove(root.path()).unwrap();
        remove(root.path()).unwrap();
        assert!(!root.path().join(FOLDER).exists() && !root.path().join(UNITS).join(UNIT).exists());
    }

    #[test]
    fn a_host_that_cannot_be_written_is_named() {
        let sh = find("sh").unwrap();
        let error = install(Path::new("/proc/1/no"), &sh, &sh, Path::new("/s")).unwrap_err().to_string();
        assert!(error.contains("/proc/1/no"), "{error}");
    }
}
