//! The UAPI socket: one short-lived thread per client, few clients at a time, and none that can hold up others.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use std::{fs, thread};

use parking_lot::Mutex;
use zeroize::Zeroize;

use super::parse::{MAX_LINE, Operation, Reader};
use super::render::{SocketSnapshot, render_errno, render_features, render_get};
use crate::config::DeviceUpdate;
use crate::configure::ApplyError;
use crate::device::Device;
use crate::features::Features;
use crate::name::InterfaceName;

const MAX_CLIENTS: usize = 32;
const IDLE: Duration = Duration::from_secs(10);
const WHOLE_REQUEST: Duration = Duration::from_secs(30);

/// The part of the configuration that concerns UDP sockets.
pub trait SocketControl: Send + Sync {
    /// The port and mark as they are now.
    fn snapshot(&self) -> SocketSnapshot;
    /// Moves to another port (0 for any) or fails without having changed anything.
    fn set_listen_port(&self, port: u16) -> io::Result<()>;
    /// What is in force of UDP's features.
    fn features(&self) -> Features;
    /// Marks outgoing datagrams.
    fn set_fwmark(&self, mark: u32) -> io::Result<()>;
}

/// How a device works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Force {
    /// What is in force at the link.
    pub features: Features,
    /// Threads that move traffic.
    pub threads: usize,
}

/// Why the UAPI socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("{0} is served by a running process; stop that one or choose another interface name")]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} is not a socket; remove it")]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Our socket file; removed when dropped, unless it is someone else's by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

// Inode numbers are soon used again; the time of birth, where the file system knows it, tells the two apart.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(file: &fs::Metadata) -> Identity {
    (file.dev(), file.ino(), file.created().ok())
}

impl SocketFile {
    /// Where wg(8) looks for sockets.
    pub const DIRECTORY: &str = "/var/run/wireguard";

    /// Listens on `directory/interface.sock`, replacing what a dead process left there.
    pub fn listen(directory: &Path, interface: &InterfaceName) -> Result<(Self, UnixListener), ListenError> {
        let path = directory.join(format!("{interface}.sock"));
        let failed = |source| ListenError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        match fs::symlink_metadata(&path) {
            Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(path)),
            Ok(_) => match UnixStream::connect(&path) {
                Ok(_) => return Err(ListenError::InUse(path)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(&path).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let bound = fs::symlink_metadata(&path).map_err(failed)?;
        Ok((Self { path: path.clone(), identity: identity(&bound) }, listener))
    }

    /// Whether the file is there and still the one we made.
    pub fn is_ours(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Serves a device to the clients of its UAPI socket.
pub struct Server {
    device: Arc<Device>,
    sockets: Arc<dyn SocketControl>,
    link: Force,
    // A failed set must be undone by nobody, so sets run one at a time from the first check to the last change.
    setting: Mutex<()>,
    clients: Mutex<Clients>,
}

#[derive(Default)]
struct Clients {
    next: u64,
    open: VecDeque<(u64, UnixStream)>,
}

impl Server {
    /// A server that changes `device` and its `sockets`, and tells what is in force at its link.
    pub fn new(device: Arc<Device>, sockets: Arc<dyn SocketControl>, link: Force) -> Arc<Self> {
        Arc::new(Self { device, sockets, link, setting: Mutex::new(()), clients: Mutex::default() })
    }

    /// Serves clients until the process ends.
    pub fn run(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client of the UAPI socket");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let Ok(handle) = stream.try_clone() else { return };
        let id = {
            let mut clients = self.clients.lock();
            if clients.open.len() >= MAX_CLIENTS
                && let Some((_, oldest)) = clients.open.pop_front()
            {
                // Whoever has been connected longest is the least likely to be doing anything.
                let _ = oldest.shutdown(Shutdown::Both);
            }
            clients.next += 1;
            let id = clients.next;
            clients.open.push_back((id, handle));
            id
        };
        let server = Arc::clone(self);
        let spawned =
            thread::Builder::new().name("uapi-client".into()).stack_size(256 * 1024).spawn(move || {
                if let Err(error) = server.serve(stream) {
                    tracing::debug!(%error, "a client of the UAPI socket went away");
                }
                server.clients.lock().open.retain(|(open, _)| *open != id);
            });
        if spawned.is_err() {
            self.clients.lock().open.retain(|(open, _)| *open != id);
        }
    }

    /// Serves one client until it closes, is idle for too long or takes too long over one request.
    pub fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        let scope_of = |name: &str| crate::sys::tun::interface_index(name);
        let mut reader = Reader::new(&scope_of);
        let mut lines = Lines::default();
        let mut began = Instant::now();
        let mut chunk = [0u8; 16 * 1024];
        let result = loop {
            let length = match stream.read(&mut chunk) {
                Ok(0) => break Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => break Err(error),
            };
            let mut answered = Ok(());
            lines.push(&chunk[..length], |line| {
                if reader.is_fresh() {
                    began = Instant::now();
                }
                if let Some(request) = reader.line(line)
                    && answered.is_ok()
                {
                    let mut answer = match request {
                        Ok(operation) => self.perform(operation),
                        Err(error) => {
                            tracing::debug!(%error, "refused a UAPI request");
                            render_errno(error.errno())
                        }
                    };
                    answered = stream.write_all(answer.as_bytes());
                    answer.zeroize();
                }
            });
            if let Err(error) = answered {
                break Err(error);
            }
            if !reader.is_fresh() && began.elapsed() > WHOLE_REQUEST {
                break Err(io::ErrorKind::TimedOut.into());
            }
        };
        chunk.zeroize();
        result
    }

    /// Performs one request and renders the answer.
    pub fn perform(&self, operation: Operation) -> String {
        match operation {
            Operation::Get => {
                let mut snapshot = self.device.snapshot();
                let answer = render_get(&snapshot, self.sockets.snapshot());
                snapshot.private_key = None;
                answer
            }
            Operation::Features => {
                render_features(self.link.features | self.sockets.features(), self.link.threads)
            }
            Operation::Set(update) => match self.set(&update) {
                Ok(()) => render_errno(0),
                Err(errno) => render_errno(errno),
            },
        }
    }

    fn set(&self, update: &DeviceUpdate) -> Result<(), i32> {
        let _one_at_a_time = self.setting.lock();
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let before = self.sockets.snapshot();
        // The sockets come first: only they can refuse what is well-formed.
        if let Some(mark) = update.fwmark {
            self.sockets.set_fwmark(mark).map_err(errno)?;
        }
        if let Some(port) = update.listen_port
            && let Err(error) = self.sockets.set_listen_port(port)
        {
            tracing::error!(port, %error, "cannot listen on the UDP port");
            if update.fwmark.is_some() {
                let _ = self.sockets.set_fwmark(before.fwmark);
            }
            return Err(errno(error));
        }
        self.device.apply(update).map_err(|error| {
            tracing::error!(%error, "a UAPI request was applied in part");
            match error {
                ApplyError::TooManyPeers => libc::ENOSPC,
                ApplyError::Random(_) => libc::EIO,
            }
        })
    }
}

/// Cuts a stream into lines and never holds more than one of bounded length.
#[derive(Default)]
struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    fn push(&mut self, mut bytes: &[u8], mut line: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.keep(&bytes[..end]);
            line(&self.partial);
            self.partial.zeroize();
            bytes = &bytes[end + 1..];
        }
        self.keep(bytes);
    }

    // One byte beyond the limit is enough to tell that the line is too long.
    fn keep(&mut self, bytes: &[u8]) {
        let room = (MAX_LINE + 1).saturating_sub(self.partial.len());
        self.partial.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}
