//! Going into the background.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::check;

/// Which side of [`split`] this process is.
pub enum Side {
    /// The one that was started, with what the daemon reported: nothing, or why it failed.
    Parent(Result<(), String>),
    /// The daemon to be.
    Child(Readiness),
}

/// The daemon's duty to tell its parent how the start went.
pub struct Readiness {
    pipe: File,
}

/// Closes what was inherited, but for the standard streams, and forks. The parent returns once the child has
/// reported or died. Call it before any thread is started or file opened.
pub fn split() -> io::Result<Side> {
    // SAFETY: takes no pointers, and nobody in this process owns a descriptor yet. Where the kernel cannot do it
    // (before Linux 5.9), what was inherited stays open.
    unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, 0 as libc::c_uint) };
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two descriptors, which are ours alone afterwards.
    let (mut reader, writer) = unsafe {
        check(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        (File::from(OwnedFd::from_raw_fd(ends[0])), File::from(OwnedFd::from_raw_fd(ends[1])))
    };
    // SAFETY: the process has one thread, so the child may do all that the parent may.
    if check(unsafe { libc::fork() })? != 0 {
        drop(writer);
        let mut report = Vec::new();
        reader.read_to_end(&mut report)?;
        return Ok(Side::Parent(match report.as_slice() {
            [0] => Ok(()),
            [] => Err("the daemon died while starting".into()),
            reason => Err(String::from_utf8_lossy(reason).into_owned()),
        }));
    }
    // SAFETY: takes no pointers. A freshly forked process is no group leader, so this cannot fail.
    unsafe { libc::setsid() };
    Ok(Side::Child(Readiness { pipe: writer }))
}

impl Readiness {
    /// Lets go of the terminal and the working directory, then lets the parent succeed. What is logged goes to
    /// `log` from here on, or nowhere.
    pub fn ready(mut self, log: Option<&Path>) -> io::Result<()> {
        match detach(log) {
            Ok(()) => self.pipe.write_all(&[0]),
            Err(error) => {
                self.failed(&error.to_string());
                Err(error)
            }
        }
    }

    /// Lets the parent fail for this reason.
    pub fn failed(mut self, reason: &str) {
        let _ = self.pipe.write_all(reason.as_bytes());
    }
}

fn detach(log: Option<&Path>) -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let log =
        log.map(|path| OpenOptions::new().append(true).create(true).mode(0o600).open(path)).transpose()?;
    let output = log.as_ref().unwrap_or(&null);
    for (target, source) in [(0, &null), (1, output), (2, output)] {
        // SAFETY: both descriptors are open; the standard streams are never closed, only replaced.
        check(unsafe { libc::dup2(source.as_raw_fd(), target) })?;
    }
    std::env::set_current_dir("/")
}

/// Makes files that this process creates readable by its user only.
pub fn private_files() {
    // SAFETY: takes no pointers and always succeeds.
    unsafe { libc::umask(0o077) };
}
