//! The agents of a lab: their binaries, processes and status.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use netlab::{Host, Process};

use crate::status::NodeStatus;

/// Where nodes see the registry directory.
pub const REGISTRY: &str = "/run/netlab/shared/registry";
/// Where a node sees its configuration file.
pub const CONFIG: &str = "/run/netlab/private/agent.yaml";
/// Where a node's agent keeps its state.
pub const STATE_DIR: &str = "/run/netlab/private/state";
/// Where a node's agent keeps its sockets.
pub const RUN_DIR: &str = "/run/sennit";
/// The status socket of every node's agent.
pub const SOCKET: &str = "/run/sennit/agent.sock";

const STATUS_DEADLINE: Duration = Duration::from_secs(3);

/// The programs under test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// The node agent.
    pub agent: PathBuf,
    /// The userspace WireGuard device.
    pub device: PathBuf,
}

impl Binaries {
    /// Looks in `bin_dir`, in `$SENNIT_BIN_DIR`, beside this program and one directory above, then on `PATH`.
    ///
    /// # Errors
    /// A sentence naming the program that is missing and where it was looked for.
    pub fn find(bin_dir: Option<&Path>) -> Result<Self, String> {
        let mut folders: Vec<PathBuf> = bin_dir.map(PathBuf::from).into_iter().collect();
        if folders.is_empty() {
            folders.extend(std::env::var_os("SENNIT_BIN_DIR").map(PathBuf::from));
            if let Ok(own) = std::env::current_exe() {
                folders.extend(own.ancestors().skip(1).take(2).map(PathBuf::from));
            }
            folders.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
        }
        let find = |name: &str| {
            let found = folders.iter().map(|folder| folder.join(name)).find(|path| is_program(path));
            found.and_then(|path| path.canonicalize().ok()).ok_or_else(|| {
                format!(
                    "the program {name} is neither in $SENNIT_BIN_DIR nor beside this program nor on PATH; \
                     build it with `cargo build -p mesh-agent -p mesh-wg`"
                )
            })
        };
        Ok(Self { agent: find("mesh-agent")?, device: find("mesh-wg")? })
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Starts a node's agent; its output is appended to the node's log file.
///
/// # Errors
/// What the lab says when it cannot start the process.
pub fn start(host: &Host, binaries: &Binaries) -> Result<Process, String> {
    host.command(&binaries.agent)
        .args(["run", "--config", CONFIG])
        .log_to(log_file(host))
        .spawn()
        .map_err(|error| format!("{}: cannot start mesh-agent: {error}", host.name()))
}

/// The file that a node's agent writes its log to, as seen from here.
pub fn log_file(host: &Host) -> PathBuf {
    host.private_dir().join("agent.log")
}

/// Asks a node's agent for its status.
///
/// # Errors
/// A sentence beginning with the node's name.
pub fn status(host: &Host, binaries: &Binaries) -> Result<NodeStatus, String> {
    let name = host.name();
    let output = host
        .command(&binaries.agent)
        .args(["status", "-o", "json", "--socket", SOCKET])
        .output(STATUS_DEADLINE)
        .map_err(|error| format!("{name}: {error}"))?;
    if !output.success() {
        let said = output.stderr_text();
        let line = said.lines().last().unwrap_or("no answer");
        return Err(format!("{name}: status: {line}"));
    }
    NodeStatus::parse(&output.stdout_text()).map_err(|error| format!("{name}: {error}"))
}

/// Asks many nodes at once, in their order.
pub fn statuses(hosts: &[&Host], binaries: &Binaries) -> Vec<Result<NodeStatus, String>> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = hosts.iter().map(|host| scope.spawn(|| status(host, binaries))).collect();
        asked
            .into_iter()
            .zip(hosts)
            .map(|(thread, host)| {
                thread.join().unwrap_or_else(|_| Err(format!("{}: the status query panicked", host.name())))
            })
            .collect()
    })
}

/// The last lines of an agent's log, for a message.
pub fn log_tail(host: &Host, lines: usize) -> String {
    let text = std::fs::read(log_file(host)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join(" | ")
}

/// The process ids of a node's WireGuard device, as this process sees them.
///
/// Found by program name and network namespace, because the device makes itself a daemon and is no child of
/// the agent's any more.
pub fn device_pids(host: &Host, binaries: &Binaries) -> Vec<u32> {
    let Ok(net) = std::fs::read_link(host.paths().net) else { return Vec::new() };
    let wanted =
        binaries.device.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // The kernel cuts a process's name to 15 bytes.
    let wanted = &wanted[..wanted.len().min(15)];
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            let inside = std::fs::read_link(entry.path().join("ns/net")).ok()?;
            (name.trim_end() == wanted && inside == net).then_some(pid)
        })
        .collect()
}

/// Waits for a condition, polling; true when it came true in time.
pub(crate) fn wait_for(deadline: Instant, mut condition: impl FnMut() -> bool) -> bool {
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
