//! WireGuard as a process of its own (`mesh-wg`, or any program with wireguard-go's command line), spoken to over
//! its UAPI socket. The process outlives the agent.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use mesh_keyring::{PrivateKey, PublicKey};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use super::process;
use super::uapi::{self, AnswerError};
use crate::backend::{BackendError, Ensured, WireguardBackend};
use crate::device::{DeviceChange, ObservedDevice};
use crate::local::InterfaceName;
use crate::netlink::{Link, RouteSocket, errno, find_link, mark_link};

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(2);
/// A device that answers nothing for so long is wedged. More than one [`ANSWER`], so that it takes several questions: a
/// host without processor time to spare must not lose its sessions.
const WEDGED: Duration = Duration::from_secs(6);
/// How long a new device may take to be ready.
const START: Duration = Duration::from_secs(10);
/// How long an ended device may take to be gone.
const END: Duration = Duration::from_secs(5);
/// How long a TUN without a process is given to vanish: its process may be dying just now.
const DYING: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);
/// More than a device with every peer that fits a mesh answers with.
const MAX_ANSWER: usize = 256 << 20;

/// Where a userspace device lives.
#[derive(Debug, Clone)]
pub struct UserspaceConfig {
    /// The interface.
    pub interface: InterfaceName,
    /// The program: a name on PATH or an absolute path.
    pub binary: PathBuf,
    /// Where its log file goes.
    pub run_dir: PathBuf,
    /// Where it puts its UAPI socket; see [`UserspaceConfig::UAPI_DIR`].
    pub uapi_dir: PathBuf,
    /// This node's public key: a device that has it is ours also without our alias.
    pub own: Option<PublicKey>,
    /// The process is somebody else's: it is waited for, and neither started nor ended.
    pub external: bool,
}

impl UserspaceConfig {
    /// Where all implementations put their sockets.
    pub const UAPI_DIR: &str = "/var/run/wireguard";
}

/// A device in a process of its own.
pub struct Userspace {
    config: UserspaceConfig,
    program: String,
    links: RouteSocket,
    /// Since when every question went without an answer.
    silent_since: Option<Instant>,
    /// When a device was made last. The one before may hold its port for a moment: a process gives back its TUN first.
    made: Option<Instant>,
}

/// What the UAPI socket says to a `get`.
enum Reply {
    Device(Zeroizing<String>),
    /// Nobody listens.
    Absent,
    /// No answer in time.
    Silent,
    /// It hung up: it died while it was asked, or it is out of order.
    Broken,
}

impl Userspace {
    /// Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(config: UserspaceConfig) -> Result<Self, BackendError> {
        let links = RouteSocket::new().map_err(|e| BackendError::failed("opening a netlink socket", e))?;
        let program = process::program_name(&config.binary);
        Ok(Self { config, program, links, silent_since: None, made: None })
    }

    pub(crate) fn interface(&self) -> &InterfaceName {
        &self.config.interface
    }

    /// Whether there is a device that answers, whoever it belongs to.
    ///
    /// # Errors
    /// When its socket cannot be used.
    pub async fn answers(&mut self) -> Result<bool, BackendError> {
        Ok(matches!(self.ask().await?, Reply::Device(_)))
    }

    fn name(&self) -> &str {
        self.config.interface.as_str()
    }

    fn socket_path(&self) -> PathBuf {
        self.config.uapi_dir.join(format!("{}.sock", self.config.interface))
    }

    fn failed(&self, action: &str, reason: impl std::fmt::Display) -> BackendError {
        BackendError::failed(format!("{action} {}", self.name()), reason)
    }

    fn foreign(&self, what: impl Into<String>) -> BackendError {
        BackendError::ForeignInterface { name: self.name().to_owned(), what: what.into() }
    }

    fn owner(&self) -> Option<Pid> {
        process::owner(&self.program, self.name())
    }

    async fn link(&mut self) -> Result<Option<Link>, BackendError> {
        let name = self.config.interface.as_str();
        find_link(&mut self.links, name)
            .await
            .map_err(|e| BackendError::failed(format!("looking for {name}"), e))
    }

    /// The link if it is a device of ours: a TUN with our alias, or what `reply` shows to be empty or with our key.
    async fn own_link(&mut self, reply: &Reply) -> Result<Option<Link>, BackendError> {
        let Some(link) = self.link().await? else { return Ok(None) };
        if link.kind.as_deref() != Some("tun") {
            return Err(self.foreign(format!("its kind is {}", link.kind_text())));
        }
        if link.is_marked() {
            return Ok(Some(link));
        }
        let Reply::Device(answer) = reply else {
            return Err(self.foreign("a TUN without our alias, and no device of it answers"));
        };
        let device = uapi::parse_device(answer).map_err(|e| self.failed("asking the device", e))?;
        match super::adoptable(&link, &device, self.config.own.as_ref()) {
            Ok(()) => Ok(Some(link)),
            Err(what) => Err(self.foreign(what)),
        }
    }

    /// Writes our alias on the link, if it has none.
    async fn mark(&mut self, link: &Link) -> Result<(), BackendError> {
        if link.is_marked() {
            return Ok(());
        }
        mark_link(&mut self.links, link.index).await.map_err(|e| self.failed("marking as ours", e))
    }

    /// Asks, and keeps account of the silence.
    async fn ask(&mut self) -> Result<Reply, BackendError> {
        let begun = Instant::now();
        let reply = match talk(&self.socket_path(), uapi::GET).await {
            Ok(answer) => Reply::Device(answer),
            Err(e) => match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Reply::Absent,
                // WouldBlock: nobody has accepted for so long that the socket's queue is full.
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Reply::Silent,
                io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    Reply::Broken
                }
                _ => return Err(self.failed("asking the device", e)),
            },
        };
        self.silent_since = match reply {
            Reply::Silent | Reply::Broken => self.silent_since.or(Some(begun)),
            Reply::Device(_) | Reply::Absent => None,
        };
        Ok(reply)
    }

    /// A device that hung up may be dying just now; then it is absent in a moment.
    async fn settled(&mut self, reply: Reply) -> Reply {
        if !matches!(reply, Reply::Broken) {
            return reply;
        }
        let deadline = Instant::now() + DYING;
        while self.owner().is_some() {
            if Instant::now() >= deadline {
                return Reply::Broken;
            }
            sleep(POLL).await;
        }
        self.silent_since = None;
        Reply::Absent
    }

    /// An error as long as a silent device may still come to itself.
    fn wedged(&self) -> Result<(), BackendError> {
        let silent = self.silent_since.map_or(Duration::ZERO, |since| since.elapsed());
        if silent >= WEDGED {
            return Ok(());
        }
        let reason = format!(
            "it has not answered for {:.1} s; after {} s it will be replaced",
            silent.as_secs_f64(),
            WEDGED.as_secs()
        );
        Err(self.failed("asking the device", reason))
    }

    /// Waits until the link is gone.
    async fn vanished(&mut self, within: Duration) -> Result<bool, BackendError> {
        let deadline = Instant::now() + within;
        loop {
            if self.link().await?.is_none() {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            sleep(POLL).await;
        }
    }

    /// Ends our process and waits until it and its interface are gone.
    async fn end(&mut self, pid: Pid, signal: Signal) -> Result<(), BackendError> {
        process::signal(pid, signal).map_err(|e| self.failed("ending the device", e))?;
        let deadline = Instant::now() + END;
        while process::runs(pid) && Instant::now() < deadline {
            sleep(POLL).await;
        }
        if process::runs(pid) && signal != Signal::SIGKILL {
            process::signal(pid, Signal::SIGKILL).map_err(|e| self.failed("ending the device", e))?;
        }
        if self.vanished(END).await? {
            Ok(())
        } else {
            Err(self.failed("ending the device", format_args!("process {pid} did not let go of it in 5 s")))
        }
    }

    /// Of an external device: who has to do something about it.
    fn awaited(&self, what: &str) -> BackendError {
        self.failed(
            "waiting for",
            format_args!(
                "{what}; `wireguard.externalDevice` is set, so that whoever runs its process has to see to it: the \
                 DaemonSet sennit-device, where the agent runs as a pod"
            ),
        )
    }

    async fn create(&self) -> Result<(), BackendError> {
        let action = "starting a device for";
        // What a dead device left behind would only be in the way of the new one.
        match std::fs::remove_file(self.socket_path()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(self
                    .failed("removing the stale socket of", format_args!("{:?}: {e}", self.socket_path())));
            }
            _ => {}
        }
        for (dir, mode) in [(&self.config.run_dir, 0o755), (&self.config.uapi_dir, 0o700)] {
            use std::os::unix::fs::DirBuilderExt as _;
            let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir);
            made.map_err(|e| self.failed(action, format_args!("{}: {e}", dir.display())))?;
        }
        let log = self.config.run_dir.join(format!("{}.log", self.config.interface));
        let mut child = Command::new(&self.config.binary)
            .arg(self.name())
            .env("MESH_WG_LOG_FILE", log)
            .current_dir("/")
            // What ends the agent's process group leaves the device alone.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| self.cannot_spawn(&e))?;
        let mut stderr = child.stderr.take();
        let mut said = Vec::new();
        let listen = async {
            if let Some(stderr) = &mut stderr {
                let _ = stderr.take(16_384).read_to_end(&mut said).await;
            }
            // What counts is that the program ended; a daemon may hold the pipe for good.
            std::future::pending::<std::convert::Infallible>().await
        };
        let ended = tokio::select! {
            never = listen => match never {},
            ended = timeout(START, child.wait()) => ended,
        };
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => {
                if let Some(stderr) = &mut stderr {
                    let mut rest = stderr.take(16_384);
                    let _ = timeout(Duration::from_millis(200), rest.read_to_end(&mut said)).await;
                }
                let said = String::from_utf8_lossy(&said);
                let said = said.trim();
                Err(self.failed(action, format_args!("{} ended with {status}: {said}", self.program)))
            }
            Ok(Err(e)) => Err(self.failed(action, e)),
            Err(_) => Err(self.failed(action, format_args!("{} is not ready after 10 s", self.program))),
        }
    }

    fn cannot_spawn(&self, error: &io::Error) -> BackendError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => BackendError::MissingProgram {
                program: self.config.binary.display().to_string(),
                reason: error.to_string(),
                package: "mesh-wg, or set `wireguard.userspaceBinary`",
            },
            _ => self.failed("starting a device for", error),
        }
    }
}

/// One request and its answer, up to the empty line. The buffer is wiped whenever it grows and on drop: an answer
/// may hold keys.
async fn talk(path: &Path, request: &str) -> io::Result<Zeroizing<String>> {
    let conversation = async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Zeroizing::new(vec![0_u8; 16_384]);
        let mut filled = 0;
        loop {
            if filled == answer.len() {
                if filled >= MAX_ANSWER {
                    return Err(io::Error::other("the device's answer has no end"));
                }
                let mut wider = Zeroizing::new(vec![0_u8; filled * 4]);
                wider[..filled].copy_from_slice(&answer);
                answer = wider;
            }
            match stream.read(&mut answer[filled..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
            if answer[..filled].ends_with(b"\n\n") {
                break;
            }
        }
        let text = std::str::from_utf8(&answer[..filled])
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the device's answer is no text"))?;
        Ok(Zeroizing::new(text.to_owned()))
    };
    timeout(ANSWER, conversation).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

impl WireguardBackend for Userspace {
    fn kind(&self) -> &'static str {
        "userspace"
    }

    async fn ensure(&mut self) -> Result<Ensured, BackendError> {
        let reply = self.ask().await?;
        let reply = self.settled(reply).await;
        let link = match self.own_link(&reply).await {
            // A TUN vanishes with its process, and that may be dying just now.
            Err(BackendError::ForeignInterface { .. })
                if matches!(reply, Reply::Absent) && self.vanished(DYING).await? =>
            {
                None
            }
            link => link?,
        };
        let owner = self.owner();
        match (reply, link, owner) {
            (Reply::Device(_), Some(link), _) => {
                self.mark(&link).await?;
                return Ok(Ensured::Adopted);
            }
            (Reply::Device(_), None, None) => {
                let socket = self.socket_path();
                let reason = format!(
                    "{} answers, but the interface is not in this network namespace: another namespace's device \
                     uses the same directory; give each a /run of its own",
                    socket.display()
                );
                return Err(self.failed("adopting", reason));
            }
            (Reply::Absent, ..) if self.config.external => return Err(self.awaited("there is no device")),
            (..) if self.config.external => return Err(self.awaited("its device does not answer")),
            (Reply::Silent | Reply::Broken, _, None) => {
                return Err(
                    self.foreign(format!("its device does not answer, and no {} holds it", self.program))
                );
            }
            // Somebody else holds it, unless its process is dying just now.
            (Reply::Absent, Some(_), None) => {
                if !self.vanished(DYING).await? {
                    return Err(self.foreign(format!("a TUN that no {} holds", self.program)));
                }
            }
            (reply, _, Some(pid)) => {
                if matches!(reply, Reply::Silent | Reply::Broken) {
                    self.wedged()?;
                }
                tracing::warn!(interface = self.name(), %pid, "replacing a WireGuard device that does not work");
                self.end(pid, Signal::SIGKILL).await?;
            }
            (Reply::Absent, None, None) => {}
        }
        self.silent_since = None;
        self.create().await?;
        self.made = Some(Instant::now());
        // Before anything else is written to it: from here on it is known as ours whatever happens to us.
        let link = self.link().await?.ok_or_else(|| self.failed("marking as ours", "it is gone again"))?;
        self.mark(&link).await?;
        Ok(Ensured::Created)
    }

    async fn observe(&mut self) -> Result<Option<ObservedDevice>, BackendError> {
        let reply = self.ask().await?;
        match &reply {
            Reply::Absent => Ok(None),
            Reply::Broken => Err(self.failed("asking the device", "it hung up")),
            Reply::Silent => Err(self.failed("asking the device", "it does not answer within 2 s")),
            Reply::Device(answer) => match self.own_link(&reply).await {
                Ok(Some(_)) => {
                    uapi::parse_device(answer).map(Some).map_err(|e| self.failed("asking the device", e))
                }
                Ok(None) | Err(BackendError::ForeignInterface { .. }) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    async fn features(&mut self) -> Vec<String> {
        // Other implementations do not know the question.
        let answer = talk(&self.socket_path(), uapi::FEATURES).await.unwrap_or_default();
        uapi::parse_features(&answer)
    }

    async fn apply(&mut self, change: &DeviceChange, key: &PrivateKey) -> Result<(), BackendError> {
        loop {
            let answer = talk(&self.socket_path(), &uapi::render(change, key))
                .await
                .map_err(|e| self.failed(&super::action(change), e))?;
            self.silent_since = None;
            return match (uapi::parse_result(&answer), change) {
                (Ok(()), _) => Ok(()),
                (Err(AnswerError::Errno(errno::EADDRINUSE)), DeviceChange::SetListenPort(port)) => {
                    if self.made.is_some_and(|made| made.elapsed() < DYING) {
                        sleep(POLL).await;
                        continue;
                    }
                    Err(BackendError::PortTaken(*port))
                }
                (Err(error), _) => Err(self.failed(&super::action(change), error)),
            };
        }
    }

    async fn remove(&mut self) -> Result<(), BackendError> {
        let reply = self.ask().await?;
        match self.own_link(&reply).await {
            Ok(Some(_)) if self.config.external => {
                return Err(self
                    .failed("ending the device", "its process is not ours: whoever runs it has to end it"));
            }
            Ok(Some(_)) => match self.owner() {
                Some(pid) => {
                    // A stopped process would not see it.
                    let _ = process::signal(pid, Signal::SIGCONT);
                    self.end(pid, Signal::SIGTERM).await?;
                }
                None if self.vanished(DYING).await? => {}
                None => return Err(self.foreign(format!("a TUN that no {} holds", self.program))),
            },
            Ok(None) => {}
            // Somebody else's; there is nothing of ours to remove.
            Err(BackendError::ForeignInterface { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
        if let Reply::Absent = self.ask().await? {
            let _ = std::fs::remove_file(self.socket_path());
        }
        Ok(())
    }
}
