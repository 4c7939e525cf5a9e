//! What the kernel tells of denied flows, as lines of JSON in a file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mesh_policy::Compiler;
use mesh_policy::flowlog::{
    FlowLog, Head, Identify, Identity, Label, Limits, Listener, Logged, Record, RuleName,
};
use nix::fcntl::OFlag;
use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;

use crate::config::{Config, Mode};
use crate::descriptors::is_shortage;

/// A file that is larger is put aside, and the one put aside before is gone; in bytes.
const FILE_MOST: u64 = 16 << 20;
/// A group that could not be had is tried again after this.
pub(super) const LISTEN_AGAIN: Duration = Duration::from_secs(10);
/// The most names that are remembered for one window.
const NAMES_MOST: usize = 20_000;
/// Reads of a socket in one turn: whatever the kernel tells, policies and timers have theirs.
const READS_MOST: usize = 512;
/// What is left is read after this, so that others have their turn.
pub(super) const READ_AGAIN: Duration = Duration::from_millis(1);
/// The socket's buffer, in bytes.
const BUFFER: u32 = 4 << 20;

/// The socket, for waiting. The kernel's messages are taken in a turn.
pub(super) type Socket = Rc<AsyncFd<Ears>>;

pub(super) struct Ears(Mutex<Listener>, std::os::fd::RawFd);

impl Ears {
    /// Takes packets that wait, of so many reads at most. Returns whether there may be more.
    pub(super) fn receive(&self, reads: usize, each: impl FnMut(Logged<'_>)) -> io::Result<bool> {
        self.0.lock().receive_some(reads, each)
    }
}

impl std::os::fd::AsRawFd for Ears {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.1
    }
}

pub(super) struct Flows {
    group: Option<u16>,
    path: PathBuf,
    file: Option<(File, u64)>,
    socket: Option<Socket>,
    // When to try to listen again.
    listens_at: Instant,
    // More may wait to be read.
    more: bool,
    log: FlowLog,
    // Who had an address and what a rule meant when packets of this window were told.
    names: Names,
    // Why nothing is heard, and why nothing is written.
    deaf: Option<String>,
    mute: Option<String>,
    written: u64,
    lost: u64,
}

/// Waits for messages of the kernel.
pub(super) async fn readable(socket: &Socket) {
    if let Ok(mut ready) = socket.readable().await {
        ready.clear_ready();
    }
}

impl Flows {
    pub(super) fn new(config: &Config) -> Self {
        let log = &config.policy.log;
        let wanted = config.policy.mode != Mode::Off && log.denied.max(log.allowed) > 0;
        Self {
            group: wanted.then_some(log.group),
            path: config.flow_log(),
            file: None,
            socket: None,
            listens_at: Instant::now(),
            more: false,
            log: FlowLog::new(Limits::default()),
            names: Names::default(),
            deaf: None,
            mute: None,
            written: 0,
            lost: 0,
        }
    }

    /// Whether what the kernel tells is heard. Else it is not asked to: where it cannot, it refuses rules that say so.
    pub(super) fn hears(&self) -> bool {
        self.socket.is_some()
    }

    /// Begins to listen, where that is wanted and time for another try.
    pub(super) fn listen(&mut self) {
        let Some(group) = self.group.filter(|_| self.socket.is_none()) else { return };
        if Instant::now() < self.listens_at {
            return;
        }
        self.listens_at = Instant::now() + LISTEN_AGAIN;
        match listen(group, None) {
            Ok(socket) => {
                self.socket = Some(socket);
                self.deaf = None;
            }
            Err(e) => {
                let remedy = if is_shortage(&e) { "it is tried again" } else { "another group may be free" };
                self.deaf = Some(format!(
                    "policy.log: NFLOG group {group}: {e}; denied flows are counted, and not told; {remedy}"
                ));
            }
        }
    }

    pub(super) fn listener(&self) -> Option<Socket> {
        self.socket.clone()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.deaf.clone().or_else(|| self.mute.clone())
    }

    /// Lines written; messages, runs of messages and lines lost.
    pub(super) fn counts(&self) -> (u64, u64) {
        let overruns = self.socket.as_ref().map_or(0, |socket| socket.get_ref().0.lock().overruns());
        (self.written, self.lost + overruns + self.log.uncounted())
    }

    /// When what was put together is to be written, or when to try to listen again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let deaf = self.group.is_some() && self.socket.is_none();
        let due = self.log.due().map(|due| {
            let left = due.duration_since(Timestamp::now());
            Instant::now() + Duration::try_from(left).unwrap_or_default()
        });
        let more = self.more.then(|| Instant::now() + READ_AGAIN);
        [deaf.then_some(self.listens_at), due, more].into_iter().flatten().min()
    }

    /// Takes what the kernel has told, and writes what is due, or all at the end.
    pub(super) fn turn(&mut self, compiler: &Compiler, end: bool) {
        let now = Timestamp::now();
        if let Some(socket) = self.socket.clone() {
            let Self { log, names, .. } = self;
            let told = socket.get_ref().receive(READS_MOST, |logged| {
                log.note(now, &logged);
                names.learn(&logged, compiler);
            });
            self.more = *told.as_ref().unwrap_or(&false);
            if let Err(e) = told {
                self.deaf = Some(format!("policy.log: reading NFLOG: {e}"));
                self.socket = None;
            }
        }
        let records = if end { self.log.flush() } else { self.log.drain(now) };
        if records.is_empty() {
            return;
        }
        match self.write(&records, compiler) {
            Ok(()) => {
                self.written += records.len() as u64;
                self.mute = None;
            }
            Err(e) => {
                self.lost += records.len() as u64;
                // Not half a line before the next one.
                if let Some((file, length)) = self.file.take() {
                    let _ = file.set_len(length);
                }
                self.mute = Some(format!(
                    "policy.log.file {}: {e}; denied flows are counted, and not told",
                    self.path.display()
                ));
            }
        }
        self.names = Names::default();
    }

    fn write(&mut self, records: &[Record], compiler: &Compiler) -> io::Result<()> {
        let who = Who { names: &self.names, compiler };
        let mut text = Vec::new();
        for record in records {
            serde_json::to_writer(&mut text, &record.to_json(&who))?;
            text.push(b'\n');
        }
        // Somebody may have put it aside himself.
        let same = |file: &File| -> io::Result<bool> {
            let (held, there) = (file.metadata()?, std::fs::metadata(&self.path)?);
            Ok((held.dev(), held.ino()) == (there.dev(), there.ino()))
        };
        if self.file.as_ref().is_some_and(|(file, _)| !same(file).unwrap_or(false)) {
            self.file = None;
        }
        if self.file.is_none() {
            self.file = Some(open(&self.path)?);
        }
        if self.file.as_ref().is_some_and(|(_, length)| *length >= FILE_MOST) {
            std::fs::rename(&self.path, aside(&self.path))?;
            self.file = Some(open(&self.path)?);
        }
        if let Some((file, length)) = &mut self.file {
            file.write_all(&text)?;
            *length += text.len() as u64;
        }
        Ok(())
    }
}

/// Opens the log, which has to be a plain file: nobody is waited for at a pipe. Who speaks with whom is not for everybody.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
    let file = OpenOptions::new().create(true).append(true).mode(0o600).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no plain file"));
    }
    if metadata.mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok((file, metadata.len()))
}

/// Where a flow log that is full is put.
pub fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

pub(super) fn listen(group: u16, range: Option<u32>) -> io::Result<Socket> {
    use std::os::fd::AsRawFd as _;
    let listener = match range {
        None => Listener::new(group, BUFFER)?,
        Some(range) => Listener::with_range(group, BUFFER, range)?,
    };
    let fd = listener.as_raw_fd();
    #[expect(deprecated, reason = "its successor is unsafe; `Ears` owns its descriptor and never changes it")]
    let socket = AsyncFd::new(Ears(Mutex::new(listener), fd))?;
    Ok(Rc::new(socket))
}

/// Who had an address and what a rule meant when it was told.
#[derive(Default)]
struct Names {
    addresses: BTreeMap<IpAddr, Identity>,
    rules: BTreeMap<String, RuleName>,
}

impl Names {
    fn learn(&mut self, logged: &Logged<'_>, compiler: &Compiler) {
        if self.addresses.len() + self.rules.len() > NAMES_MOST {
            return;
        }
        if let Some(head) = Head::read(logged.packet) {
            for address in [head.source, head.destination] {
                self.addresses.entry(address).or_insert_with(|| identity(compiler, address));
            }
        }
        if let Some(label) = Label::parse(logged.prefix)
            && !self.rules.contains_key(label.id())
            && let Some(name) = rule_name(compiler, label.id())
        {
            self.rules.insert(label.id().to_owned(), name);
        }
    }
}

fn identity(compiler: &Compiler, address: IpAddr) -> Identity {
    let world = &compiler.state().world;
    let pod = world.holder(address);
    Identity {
        pod: pod.map(|pod| pod.key.name.clone()),
        namespace: pod.map(|pod| pod.key.namespace.clone()),
        node: pod.and_then(|pod| pod.node.clone()).or_else(|| world.node_of(address).map(str::to_owned)),
        site: world.site_of(address).map(str::to_owned),
    }
}

fn rule_name(compiler: &Compiler, id: &str) -> Option<RuleName> {
    let base =
        |text: &str| RuleName { tier: "base".to_owned(), policies: Vec::new(), rule: Some(text.to_owned()) };
    match id {
        "spoofed" => Some(base("the packet says it comes from where it cannot come from")),
        "unknown" => Some(base("no known pod of this node has the address")),
        id => compiler.rule_name(id).cloned(),
    }
}

/// What is remembered, and where nothing is, what is known now.
struct Who<'a> {
    names: &'a Names,
    compiler: &'a Compiler,
}

impl Identify for Who<'_> {
    fn address(&self, address: IpAddr) -> Identity {
        let remembered = self.names.addresses.get(&address).cloned();
        remembered.unwrap_or_else(|| identity(self.compiler, address))
    }

    fn rule(&self, id: &str) -> Option<RuleName> {
        self.names.rules.get(id).cloned().or_else(|| rule_name(self.compiler, id))
    }
}
