//! Which process holds a TUN interface, read from /proc.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Linux keeps this many bytes of a process's name.
const COMM_BYTES: usize = 15;

/// The process of that program, in our network namespace, that holds the TUN interface of this name.
///
/// `SO_PEERCRED` of the UAPI socket does not tell: it names the process that called `listen`, and a device that
/// went into the background is another one.
pub(crate) fn owner(program: &str, interface: &str) -> Option<Pid> {
    let namespace = fs::read_link("/proc/self/ns/net").ok()?;
    let processes = fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .map(Pid::from_raw)
        .find(|pid| {
            is_program(*pid, program)
                && fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|of| of == namespace)
                && holds(*pid, interface)
        })
}

fn is_program(pid: Pid, program: &str) -> bool {
    let short: String = program.chars().take(COMM_BYTES).collect();
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if comm.trim_end() == short {
        return true;
    }
    // The name of a binary that an upgrade replaced has this at its end.
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_suffix(" (deleted)").unwrap_or(name) == program
    })
}

fn holds(pid: Pid, interface: &str) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    files.filter_map(|file| fs::read_to_string(file.ok()?.path()).ok()).any(|text| {
        text.lines().filter_map(|line| line.strip_prefix("iff:")).any(|name| name.trim() == interface)
    })
}

/// Sends a signal; a process that is gone is no error.
pub(crate) fn signal(pid: Pid, signal: Signal) -> std::io::Result<()> {
    match kill(pid, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether the process still runs; one that waits for its parent does not.
pub(crate) fn runs(pid: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state follows the name in parentheses, which may hold anything.
    !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with(['Z', 'X'])
}

/// A program's own name, of a name on PATH or a path.
pub(crate) fn program_name(binary: &Path) -> String {
    binary.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_the_interface_is_not_its_owner() {
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(owner(own.trim_end(), "no-such-tun"), None);
    }
}
