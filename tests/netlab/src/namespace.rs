use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Pid, gettid};

use crate::pidspace::PidSpace;
use crate::{BlockId, Capture, CaptureSpec, Command, Error, Feature, Result, Rule, capture, firewall, tool};

/// Paths under `/proc` by which other programs (`nsenter`) may enter a namespace while the lab lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespacePaths {
    /// Network namespace.
    pub net: PathBuf,
    /// Mount namespace (the lab process's own for routers and pods).
    pub mount: PathBuf,
    /// UTS namespace.
    pub uts: PathBuf,
    /// PID namespace of the lab's processes.
    pub pid: PathBuf,
}

/// A namespace of the lab: core, router, host or pod. Cheap to clone; every method may be called from any
/// thread. After the lab was dropped all of them answer [`crate::Error::Gone`].
#[derive(Debug, Clone)]
pub struct Namespace {
    inner: Arc<Inner>,
}

type Job = Box<dyn FnOnce() + Send>;

struct Inner {
    name: String,
    thread_id: Pid,
    thread: Mutex<Option<(Sender<Job>, JoinHandle<()>)>>,
    pids: Arc<PidSpace>,
    blocks: Mutex<Blocks>,
}

#[derive(Debug, Default)]
struct Blocks {
    last: u64,
    rules: BTreeMap<u64, Rule>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (thread {})", self.name, self.thread_id)
    }
}

/// A namespace whose thread was started and may not be ready yet.
pub(crate) struct Starting {
    name: String,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
    ready: std::sync::mpsc::Receiver<Result<Pid>>,
    pids: Arc<PidSpace>,
}

/// Poisoning is no news here: a panic under a lock leaves counters and handles, no half-done invariants.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Explains the refusal of a namespace.
pub(crate) fn unshare_error(feature: Feature, errno: nix::errno::Errno) -> Error {
    use nix::errno::Errno;
    let why = match errno {
        Errno::EPERM => {
            "the kernel refuses it to this user: run as root, or call netlab::enter_userns() first in main"
                .to_owned()
        }
        Errno::EINVAL => "this kernel was built without it".to_owned(),
        Errno::ENOSPC => {
            "the limit of namespaces is reached: raise user.max_*_namespaces (sysctl)".to_owned()
        }
        other => other.to_string(),
    };
    Error::Unsupported { feature, why }
}

impl Starting {
    /// Starts the thread: fresh network namespace, further `flags`, then `prepare` inside.
    pub(crate) fn new(
        name: &str,
        flags: CloneFlags,
        pids: &Arc<PidSpace>,
        prepare: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Starting> {
        let (jobs, queue) = channel::<Job>();
        let (report, ready) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("ns {name}"))
            .spawn(move || {
                let start = || -> Result<Pid> {
                    unshare(CloneFlags::CLONE_NEWNET | flags)
                        .map_err(|errno| unshare_error(Feature::NetNamespaces, errno))?;
                    prepare()?;
                    Ok(gettid())
                };
                let started = start();
                let failed = started.is_err();
                let _ = report.send(started);
                if !failed {
                    queue.iter().for_each(|job| job());
                }
            })
            .map_err(Error::system(format!("start the thread of namespace {name}")))?;
        Ok(Starting { name: name.to_owned(), jobs, thread, ready, pids: Arc::clone(pids) })
    }

    pub(crate) fn ready(self) -> Result<Namespace> {
        let thread_id = self.ready.recv().map_err(|_| Error::Panicked { namespace: self.name.clone() })??;
        Ok(Namespace {
            inner: Arc::new(Inner {
                name: self.name,
                thread_id,
                thread: Mutex::new(Some((self.jobs, self.thread))),
                pids: self.pids,
                blocks: Mutex::default(),
            }),
        })
    }
}

impl Namespace {
    /// Name, unique in the lab.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Runs `f` on a fresh thread inside the namespace (network, and a host's mount and UTS namespaces) and
    /// returns its result. Concurrent calls do not wait for each other. Sockets opened by `f` stay in the
    /// namespace wherever they are moved.
    ///
    /// In a host `/proc` shows the lab's PID namespace, so `/proc/self` does not resolve inside `f`.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        self.spawn(f)?.join().map_err(|_| Error::Panicked { namespace: self.name().to_owned() })
    }

    /// As [`Namespace::run`] without waiting for the end. A thread that outlives the lab keeps its network
    /// namespace alive.
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
        let name = format!("in {}", self.name());
        self.inline(move || std::thread::Builder::new().name(name).spawn(f))?
            .map_err(Error::system(format!("start a thread in namespace {}", self.name())))
    }

    /// Runs a short `f` on the namespace's own thread.
    pub(crate) fn inline<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let gone = || Error::Gone { namespace: self.name().to_owned() };
        let jobs = lock(&self.inner.thread).as_ref().ok_or_else(gone)?.0.clone();
        let (answer, answered) = channel();
        jobs.send(Box::new(move || drop(answer.send(catch_unwind(AssertUnwindSafe(f))))))
            .map_err(|_| gone())?;
        drop(jobs);
        answered
            .recv()
            .map_err(|_| gone())?
            .map_err(|_| Error::Panicked { namespace: self.name().to_owned() })
    }

    pub(crate) fn pids(&self) -> &Arc<PidSpace> {
        &self.inner.pids
    }

    /// A process to start inside; found on this process's PATH.
    pub fn command(&self, program: impl Into<std::ffi::OsString>) -> Command {
        Command::new(self.clone(), program.into())
    }

    /// Drops packets that match, from now on and whatever connection they belong to. Neighbour discovery,
    /// multicast listener reports and ARP always pass.
    pub fn block(&self, rule: Rule) -> Result<BlockId> {
        rule.validate()?;
        let mut blocks = lock(&self.inner.blocks);
        let id = blocks.last + 1;
        blocks.rules.insert(id, rule);
        if let Err(error) = tool::nft(self, &firewall::render(&blocks.rules, None)) {
            blocks.rules.remove(&id);
            return Err(error);
        }
        blocks.last = id;
        Ok(BlockId(id))
    }

    /// Lifts a block.
    pub fn unblock(&self, id: BlockId) -> Result<()> {
        let mut blocks = lock(&self.inner.blocks);
        let unknown = || Error::UnknownBlock { namespace: self.name().to_owned(), id: id.0 };
        let rule = blocks.rules.remove(&id.0).ok_or_else(unknown)?;
        let done = tool::nft(self, &firewall::render(&blocks.rules, Some(id.0)));
        if done.is_err() {
            blocks.rules.insert(id.0, rule);
        }
        done
    }

    /// Packets dropped by a block so far.
    pub fn blocked_packets(&self, id: BlockId) -> Result<u64> {
        let unknown = || Error::UnknownBlock { namespace: self.name().to_owned(), id: id.0 };
        if !lock(&self.inner.blocks).rules.contains_key(&id.0) {
            return Err(unknown());
        }
        let listing = tool::nft_read(self, &firewall::list_counter(id.0))?;
        firewall::packets(&listing).ok_or_else(unknown)
    }

    /// Captures on an interface of this namespace; frames that cross it after this call returns are seen.
    pub fn capture(&self, interface: &str, spec: CaptureSpec) -> Result<Capture> {
        capture::start(self, interface, spec)
    }

    /// Forgets all connection tracking state, hence all NAT mappings, as a rebooting router does.
    pub fn flush_connections(&self) -> Result<()> {
        self.inline(crate::conntrack::flush)?
            .map_err(Error::errno(format!("flush the connections of namespace {}", self.name())))
    }

    /// Runs a script of `ip` commands (`ip -batch` syntax, one a line without the leading `ip`).
    pub fn ip(&self, script: &str) -> Result<()> {
        tool::ip(self, script)
    }

    /// Writes a sysctl of this namespace, by path below `/proc/sys/net`, such as `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.inline(move || write_sysctl(&key, &value))?
    }

    /// Where to enter it from outside.
    pub fn paths(&self) -> NamespacePaths {
        let thread = PathBuf::from(self.thread_path());
        NamespacePaths {
            net: thread.join("net"),
            mount: thread.join("mnt"),
            uts: thread.join("uts"),
            pid: PathBuf::from(format!("/proc/{}/ns/pid", self.inner.pids.init())),
        }
    }

    /// `/proc/PID/task/TID/ns`.
    pub(crate) fn thread_path(&self) -> String {
        format!("/proc/{}/task/{}/ns", std::process::id(), self.inner.thread_id)
    }

    /// Ends the thread, and with it the namespace once no socket and no process holds it. Idempotent.
    pub(crate) fn stop(&self) {
        if let Some((jobs, thread)) = lock(&self.inner.thread).take() {
            drop(jobs);
            let _ = thread.join();
        }
    }
}

/// Writes below `/proc/sys/net` of the calling thread's network namespace; call it in a lab's thread only.
pub(crate) fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{key}");
    std::fs::write(&path, value).map_err(Error::system(format!(
        "write {value:?} to {path} (in a container /proc/sys must be writable, as with --privileged)"
    )))
}
