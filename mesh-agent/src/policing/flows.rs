//! What the kernel tells of denied flows, as lines of JSON in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mesh_policy::Compiler;
use mesh_policy::flowlog::{FlowLog, Identify, Identity, Limits, Listener, Record, RuleName};
use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;

use crate::config::{Config, Mode};

/// A file that is larger is put aside, and the one put aside before is gone; in bytes.
const FILE_MOST: u64 = 16 << 20;
/// The socket's buffer, in bytes.
const BUFFER: u32 = 4 << 20;

/// The socket, for waiting. The kernel's messages are taken in a turn.
type Socket = Rc<AsyncFd<Ears>>;

pub(super) struct Ears(Mutex<Listener>, std::os::fd::RawFd);

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
    log: FlowLog,
    failure: Option<String>,
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
            path: log.file.clone().unwrap_or_else(|| config.state_dir.join("flows.jsonl")),
            file: None,
            socket: None,
            log: FlowLog::new(Limits::default()),
            failure: None,
            written: 0,
            lost: 0,
        }
    }

    /// Begins to listen, where that is wanted.
    pub(super) fn listen(&mut self) {
        let Some(group) = self.group else { return };
        match listen(group) {
            Ok(socket) => self.socket = Some(socket),
            Err(e) => {
                self.failure = Some(format!(
                    "policy.log: NFLOG group {group}: {e}; denied flows are counted, and not told; another group may be free"
                ));
            }
        }
    }

    pub(super) fn listener(&self) -> Option<Socket> {
        self.socket.clone()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    /// Lines written; messages, runs of messages and lines lost.
    pub(super) fn counts(&self) -> (u64, u64) {
        let overruns = self.socket.as_ref().map_or(0, |socket| socket.get_ref().0.lock().overruns());
        (self.written, self.lost + overruns + self.log.uncounted())
    }

    /// When what was put together is to be written.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let left = self.log.due()?.duration_since(Timestamp::now());
        Some(Instant::now() + Duration::try_from(left).unwrap_or_default())
    }

    /// Takes what the kernel has told, and writes what is due.
    pub(super) fn turn(&mut self, compiler: &Compiler) {
        let Some(socket) = self.socket.clone() else { return };
        let now = Timestamp::now();
        let log = &mut self.log;
        if let Err(e) = socket.get_ref().0.lock().receive(|logged| log.note(now, &logged)) {
            self.failure = Some(format!("policy.log: reading NFLOG: {e}"));
            self.socket = None;
        }
        let records = self.log.drain(now);
        if records.is_empty() {
            return;
        }
        match self.write(&records, compiler) {
            Ok(()) => {
                self.written += records.len() as u64;
                self.failure = None;
            }
            Err(e) => {
                self.lost += records.len() as u64;
                self.file = None;
                self.failure = Some(format!(
                    "policy.log.file {}: {e}; denied flows are counted, and not told",
                    self.path.display()
                ));
            }
        }
    }

    fn write(&mut self, records: &[Record], compiler: &Compiler) -> io::Result<()> {
        let who = Who(compiler);
        let mut text = Vec::new();
        for record in records {
            serde_json::to_writer(&mut text, &record.to_json(&who))?;
            text.push(b'\n');
        }
        if self.file.as_ref().is_some_and(|(_, length)| *length >= FILE_MOST) {
            std::fs::rename(&self.path, aside(&self.path))?;
            self.file = None;
        }
        if self.file.is_none() {
            // Who speaks with whom is not for everybody.
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
            let length = file.metadata()?.len();
            self.file = Some((file, length));
        }
        if let Some((file, length)) = &mut self.file {
            file.write_all(&text)?;
            *length += text.len() as u64;
        }
        Ok(())
    }
}

/// Where a flow log that is full is put.
pub fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn listen(group: u16) -> io::Result<Socket> {
    use std::os::fd::AsRawFd as _;
    let listener = Listener::new(group, BUFFER)?;
    let fd = listener.as_raw_fd();
    #[expect(deprecated, reason = "its successor is unsafe; `Ears` owns its descriptor and never changes it")]
    let socket = AsyncFd::new(Ears(Mutex::new(listener), fd))?;
    Ok(Rc::new(socket))
}

/// Who has an address and what a rule means, as policy knows it when the line is written.
struct Who<'a>(&'a Compiler);

impl Identify for Who<'_> {
    fn address(&self, address: IpAddr) -> Identity {
        let world = &self.0.state().world;
        let pod = world.holder(address);
        Identity {
            pod: pod.map(|pod| pod.key.name.clone()),
            namespace: pod.map(|pod| pod.key.namespace.clone()),
            node: pod.and_then(|pod| pod.node.clone()).or_else(|| world.node_of(address).map(str::to_owned)),
            site: world.site_of(address).map(str::to_owned),
        }
    }

    fn rule(&self, id: &str) -> Option<RuleName> {
        let base = |text: &str| RuleName {
            tier: "base".to_owned(),
            policies: Vec::new(),
            rule: Some(text.to_owned()),
        };
        match id {
            "spoofed" => Some(base("the tunnel's packet says it comes from where it cannot come from")),
            "unknown" => Some(base("no known pod of this node has the address")),
            id => self.0.rule_name(id).cloned(),
        }
    }
}
