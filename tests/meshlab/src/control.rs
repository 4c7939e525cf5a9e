//! Reaches a lab that another process holds: a Unix socket in a folder of the user's own.
//!
//! One request and one answer per connection, each a line of JSON. The holder only tells where namespaces
//! are; entering them is up to the caller, who needs the rights for it anyway.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use netlab::{Host, Namespace};
use serde::{Deserialize, Serialize};

use crate::agents::{self, Binaries};
use crate::stage::Stage;

const PATIENCE: Duration = Duration::from_secs(15);
const LONGEST_LINE: u64 = 1 << 20;

/// What can be asked of a lab's holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "ask")]
pub enum Request {
    /// Where is this node, pod or router?
    Where {
        /// Its name; routers are `router@SITE`.
        name: String,
    },
    /// What is running?
    Status,
    /// Take the lab down.
    Down,
}

/// The holder's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum Answer {
    /// Paths of the namespaces to enter.
    Where(Entrance),
    /// What is running.
    Status(LabStatus),
    /// The lab is being taken down.
    Down {
        /// The holder's process id; the lab is gone when the process is.
        pid: u32,
    },
    /// The request cannot be answered.
    Refused {
        /// Why.
        reason: String,
    },
}

/// The namespaces of one node, pod or router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entrance {
    /// Network namespace.
    pub net: PathBuf,
    /// Mount namespace.
    pub mount: PathBuf,
    /// UTS namespace.
    pub uts: PathBuf,
    /// PID namespace.
    pub pid: PathBuf,
}

/// A lab as its holder describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabStatus {
    /// The scenario's name.
    pub scenario: String,
    /// The holder's process id.
    pub pid: u32,
    /// One per node.
    pub nodes: Vec<NodeLine>,
}

/// A node in a [`LabStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLine {
    /// The node's name.
    pub name: String,
    /// Its pods' names and addresses.
    pub pods: Vec<String>,
    /// Its agent in a few words.
    pub agent: String,
}

/// The folder with the sockets of this user's labs, made if need be.
///
/// `$MESHLAB_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/meshlab`, else `meshlab-<uid>` in the temporary directory.
///
/// # Errors
/// When it cannot be made, or belongs to someone else or is open to others.
pub fn runtime_dir() -> io::Result<PathBuf> {
    let uid = nix::unistd::Uid::effective().as_raw();
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = of("MESHLAB_RUNTIME_DIR")
        .or_else(|| of("XDG_RUNTIME_DIR").map(|folder| folder.join("meshlab")))
        .unwrap_or_else(|| std::env::temp_dir().join(format!("meshlab-{uid}")));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    let meta = std::fs::symlink_metadata(&folder)?;
    if !meta.is_dir() || meta.uid() != uid || meta.permissions().mode() & 0o022 != 0 {
        return Err(io::Error::other(format!(
            "{} belongs to someone else or is writable by others; remove it or set MESHLAB_RUNTIME_DIR",
            folder.display()
        )));
    }
    Ok(folder)
}

/// A socket that answers for a lab until it is dropped.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Known {
    scenario: String,
    places: BTreeMap<String, Namespace>,
    hosts: Vec<(Host, Vec<String>)>,
    binaries: Option<Binaries>,
    down: Arc<AtomicBool>,
}

impl Control {
    /// Answers for `stage`; sets `down` when asked to take the lab down.
    ///
    /// # Errors
    /// When the socket cannot be made, or a lab of this name is up already.
    pub fn serve(stage: &Stage, folder: &Path, down: Arc<AtomicBool>) -> io::Result<Self> {
        let path = folder.join(format!("{}.sock", stage.scenario().name));
        if UnixStream::connect(&path).is_ok() {
            return Err(io::Error::other(format!("a lab `{}` is up already", stage.scenario().name)));
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let known = Known::of(stage, down);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            for connection in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                // A caller that goes away midway hurts only itself.
                let _ = connection.and_then(|stream| known.answer_on(stream));
            }
        })?;
        Ok(Self { path, stop, thread: Some(thread) })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread from its accept.
        let _ = UnixStream::connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Known {
    fn of(stage: &Stage, down: Arc<AtomicBool>) -> Self {
        let lab = stage.lab();
        let mut places = BTreeMap::new();
        places.extend(lab.sites().iter().map(|site| (format!("router@{}", site.name()), (**site).clone())));
        places.extend(lab.hosts().iter().map(|host| (host.name().to_owned(), (**host).clone())));
        places.extend(lab.pods().iter().map(|pod| (pod.name().to_owned(), (**pod).clone())));
        let pods = |host: &Host| {
            let own = stage.layout().pods().filter(|pod| pod.node == host.name());
            own.map(|pod| {
                let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
                format!("{} {}", pod.name, addresses.join(" "))
            })
            .collect()
        };
        Self {
            scenario: stage.scenario().name.clone(),
            places,
            hosts: lab.hosts().iter().map(|host| (host.clone(), pods(host))).collect(),
            binaries: stage.binaries().cloned(),
            down,
        }
    }

    fn answer_on(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new((&stream).take(LONGEST_LINE)).read_line(&mut line)?;
        let answer = match serde_json::from_str(&line) {
            Ok(request) => self.answer(&request),
            Err(error) => Answer::Refused { reason: format!("no request: {error}") },
        };
        write_line(&stream, &answer)
    }

    fn answer(&self, request: &Request) -> Answer {
        match request {
            Request::Where { name } => match self.places.get(name) {
                Some(namespace) => {
                    let paths = namespace.paths();
                    let netlab::NamespacePaths { net, mount, uts, pid, .. } = paths;
                    Answer::Where(Entrance { net, mount, uts, pid })
                }
                None => {
                    let names: Vec<&str> = self.places.keys().map(String::as_str).collect();
                    Answer::Refused {
                        reason: format!("there is no `{name}`; there are {}", names.join(", ")),
                    }
                }
            },
            Request::Status => Answer::Status(self.status()),
            Request::Down => {
                self.down.store(true, Ordering::SeqCst);
                Answer::Down { pid: std::process::id() }
            }
        }
    }

    fn status(&self) -> LabStatus {
        let hosts: Vec<&Host> = self.hosts.iter().map(|(host, _)| host).collect();
        let agents: Vec<String> = match &self.binaries {
            None => hosts.iter().map(|_| "no agent".to_owned()).collect(),
            Some(binaries) => agents::statuses(&hosts, binaries)
                .into_iter()
                .map(|status| match status {
                    Ok(status) => {
                        let up = status.peers.iter().filter(|peer| peer.state == "established").count();
                        let ready = if status.ready { "ready" } else { "not ready" };
                        format!("{ready}, {up} of {} peers established", status.peers.len())
                    }
                    Err(error) => error,
                })
                .collect(),
        };
        let nodes = self.hosts.iter().zip(agents).map(|((host, pods), agent)| NodeLine {
            name: host.name().to_owned(),
            pods: pods.clone(),
            agent,
        });
        LabStatus { scenario: self.scenario.clone(), pid: std::process::id(), nodes: nodes.collect() }
    }
}

/// Asks the holder of a lab.
///
/// # Errors
/// When it cannot be reached or answers nonsense.
pub fn ask(socket: &Path, request: &Request) -> io::Result<Answer> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write_line(&stream, request)?;
    let mut line = String::new();
    BufReader::new((&stream).take(LONGEST_LINE)).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(io::Error::other)
}

fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value).map_err(io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The sockets of labs that are up in this folder, by name; sockets that nobody answers on are removed.
///
/// # Errors
/// When the folder cannot be read.
pub fn running(folder: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".sock"));
        let Some(name) = name else { continue };
        if UnixStream::connect(&path).is_ok() {
            found.push((name.to_owned(), path.clone()));
        } else {
            let _ = std::fs::remove_file(&path);
        }
    }
    found.sort();
    Ok(found)
}
