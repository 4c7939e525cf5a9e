use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

use crate::pidspace::Reaped;
use crate::{Error, Namespace, Result, sys};

/// A process to start in a namespace. It gets its own process group, the lab's PID namespace, no stdin
/// unless given, and dies with the lab even when it daemonises.
#[derive(Debug, Clone)]
pub struct Command {
    namespace: Namespace,
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, Option<OsString>)>,
    directory: Option<PathBuf>,
    input: Option<Vec<u8>>,
    log: Option<PathBuf>,
    inherit: bool,
}

/// What a finished process left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit status; `None` when the deadline passed and the process was killed.
    pub status: Option<ExitStatus>,
    /// Standard output (empty when sent to a log file or inherited).
    pub stdout: Vec<u8>,
    /// Standard error (likewise).
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it ended in time with exit code 0.
    pub fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Standard output as text, invalid UTF-8 replaced.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text, invalid UTF-8 replaced.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl Command {
    pub(crate) fn new(namespace: Namespace, program: OsString) -> Command {
        Command {
            namespace,
            program,
            args: Vec::new(),
            env: Vec::new(),
            directory: None,
            input: None,
            log: None,
            inherit: false,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Command {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Command {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Command {
        self.env.push((key.into(), Some(value.into())));
        self
    }

    /// Removes a variable from its environment.
    pub fn env_remove(mut self, key: impl Into<OsString>) -> Command {
        self.env.push((key.into(), None));
        self
    }

    /// Sets its working directory.
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Command {
        self.directory = Some(directory.into());
        self
    }

    /// Gives it these bytes as standard input.
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Command {
        self.input = Some(input.into());
        self
    }

    /// Appends its standard output and error to a file (path outside the namespace).
    pub fn log_to(mut self, file: impl Into<PathBuf>) -> Command {
        self.log = Some(file.into());
        self
    }

    /// Leaves it this process's stdin, stdout, stderr and process group, for interactive use.
    pub fn inherit_stdio(mut self) -> Command {
        self.inherit = true;
        self
    }

    /// Starts it.
    pub fn spawn(&self) -> Result<Process> {
        let describe = format!("start {:?} in namespace {}", self.program, self.namespace.name());
        let failed = || Error::system(describe.clone());
        let mut command = std::process::Command::new(&self.program);
        command.args(&self.args);
        for (key, value) in &self.env {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let (mut stdout, mut stderr) = (None, None);
        if !self.inherit {
            command.process_group(0).stdin(self.standard_input().map_err(failed())?);
            if let Some(path) = &self.log {
                let log = File::options().create(true).append(true).open(path).map_err(failed())?;
                command.stdout(log.try_clone().map_err(failed())?).stderr(log);
            } else {
                let out = memory().map_err(failed())?;
                let err = memory().map_err(failed())?;
                command.stdout(out.try_clone().map_err(failed())?);
                command.stderr(err.try_clone().map_err(failed())?);
                (stdout, stderr) = (Some(out), Some(err));
            }
        }
        let pids = Arc::clone(self.namespace.pids());
        // A thread of its own, because a thread that entered a PID namespace can start no further threads.
        let child = self
            .namespace
            .run(move || {
                pids.enter()?;
                command.spawn()
            })?
            .map_err(failed())?;
        let pid = child.id();
        let child = self.namespace.pids().adopt(child);
        let ended = sys::pidfd_open(pid).map_err(failed())?;
        Ok(Process { pid, child, ended, stdout, stderr, own_group: !self.inherit, kill_on_drop: true })
    }

    fn standard_input(&self) -> std::io::Result<Stdio> {
        let Some(input) = &self.input else { return Ok(Stdio::null()) };
        let mut file = memory()?;
        file.write_all(input)?;
        file.rewind()?;
        Ok(file.into())
    }

    /// Starts it, waits until `deadline` from now at most, then kills its process group.
    pub fn output(&self, deadline: Duration) -> Result<Output> {
        let process = self.spawn()?;
        let status = process.wait(deadline)?;
        if status.is_none() {
            process.kill()?;
        }
        Ok(Output { status, stdout: process.stdout(), stderr: process.stderr() })
    }
}

/// A file in memory. Unlike a pipe it needs no reader, and a daemon that keeps it open keeps nobody waiting.
fn memory() -> std::io::Result<File> {
    Ok(memfd_create("netlab", MFdFlags::MFD_CLOEXEC)?.into())
}

fn contents(file: Option<&File>) -> Vec<u8> {
    let read = |file: &File| -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
        // The offset is shared with the process and must stay where it is.
        let length = file.read_at(&mut bytes, 0)?;
        bytes.truncate(length);
        Ok(bytes)
    };
    file.and_then(|file| read(file).ok()).unwrap_or_default()
}

/// A running process of the lab. Dropping the handle kills its process group if it still runs; see
/// [`Process::detach`].
#[derive(Debug)]
pub struct Process {
    pid: u32,
    child: Arc<Reaped>,
    ended: OwnedFd,
    stdout: Option<File>,
    stderr: Option<File>,
    own_group: bool,
    kill_on_drop: bool,
}

impl Process {
    /// Process id as seen by this process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the end, `deadline` from now at most; `None` when it still runs.
    pub fn wait(&self, deadline: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut ended = [PollFd::new(self.ended.as_fd(), PollFlags::POLLIN)];
            // Rounded up, so that the last wait is not a spin.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut ended, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::errno(format!("wait for process {}", self.pid))(errno)),
            }
        }
    }

    /// Its exit status if it has ended.
    pub fn try_wait(&self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(Error::system(format!("wait for process {}", self.pid)))
    }

    /// Sends a signal to the process alone, by number (`libc::SIGTERM`). No error when it already ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let failed = || Error::errno(format!("send signal {signal} to process {}", self.pid));
        let signal = nix::sys::signal::Signal::try_from(signal).map_err(failed())?;
        // Not yet reaped, the id cannot have been given to another process.
        if self.try_wait()?.is_some() {
            return Ok(());
        }
        match nix::sys::signal::kill(Pid::from_raw(self.pid as i32), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(failed()(errno)),
        }
    }

    /// Kills its process group with SIGKILL and reaps it. No error when it already ended; then nothing is
    /// killed.
    pub fn kill(&self) -> Result<()> {
        if self.try_wait()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid as i32);
        if self.own_group {
            let _ = nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL);
        }
        self.signal(libc::SIGKILL)?;
        self.wait(Duration::from_secs(5)).map(drop)
    }

    /// Standard output so far; empty when it goes to a log file or is inherited.
    pub fn stdout(&self) -> Vec<u8> {
        contents(self.stdout.as_ref())
    }

    /// Standard error so far; empty when it goes to a log file or is inherited.
    pub fn stderr(&self) -> Vec<u8> {
        contents(self.stderr.as_ref())
    }

    /// Leaves it running until the lab ends.
    pub fn detach(mut self) {
        self.kill_on_drop = false;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.kill_on_drop {
            let _ = self.kill();
        }
    }
}
