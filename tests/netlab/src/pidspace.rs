use std::fs::File;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::namespace::lock;
use crate::{Error, Result, sys};

/// The PID namespace of a lab's processes and the thread that keeps its init alive.
#[derive(Debug)]
pub(crate) struct PidSpace {
    init: Pid,
    namespace: File,
    children: Mutex<Vec<Arc<Reaped>>>,
    keeper: Mutex<Option<(Sender<()>, JoinHandle<()>)>>,
}

/// A child of this process that lives in the PID namespace, and its status once it was waited for.
#[derive(Debug)]
pub(crate) struct Reaped(Mutex<(Child, Option<ExitStatus>)>);

impl Reaped {
    pub(crate) fn try_wait(&self) -> std::io::Result<Option<ExitStatus>> {
        let mut cell = lock(&self.0);
        if cell.1.is_none() {
            cell.1 = cell.0.try_wait()?;
        }
        Ok(cell.1)
    }

    fn wait(&self) {
        let mut cell = lock(&self.0);
        if cell.1.is_none() {
            cell.1 = cell.0.wait().ok();
        }
    }
}

impl PidSpace {
    pub(crate) fn new() -> Result<PidSpace> {
        let (ready, is_ready) = channel();
        let (stop, stopped) = channel::<()>();
        // The init's parent-death signal is tied to the thread that forked it: this thread must live as long
        // as the lab, and it alone does the forking.
        let keeper = std::thread::Builder::new()
            .name("netlab-keeper".into())
            .spawn(move || {
                let start = || -> Result<(Pid, std::os::fd::OwnedFd)> {
                    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
                        .map_err(Error::errno("make the init's pipe"))?;
                    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| {
                        crate::namespace::unshare_error(crate::Feature::PidNamespaces, errno)
                    })?;
                    let init = sys::fork_init(std::os::fd::AsFd::as_fd(&read))
                        .map_err(Error::system("fork the init"))?;
                    Ok((init, write))
                };
                match start() {
                    Ok((init, lifeline)) => {
                        let _ = ready.send(Ok(init));
                        let _ = stopped.recv();
                        drop(lifeline);
                        let _ = waitpid(init, None);
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            })
            .map_err(Error::system("start the keeper thread"))?;
        let gone = || Error::Panicked { namespace: "netlab-keeper".into() };
        let init = is_ready.recv().map_err(|_| gone())??;
        let path = format!("/proc/{init}/ns/pid");
        let namespace = File::open(&path).map_err(Error::system(format!("open {path}")))?;
        Ok(PidSpace {
            init,
            namespace,
            children: Mutex::new(Vec::new()),
            keeper: Mutex::new(Some((stop, keeper))),
        })
    }

    pub(crate) fn init(&self) -> i32 {
        self.init.as_raw()
    }

    /// Makes what the calling thread forks from now on a member. Such a thread can start no other threads.
    pub(crate) fn enter(&self) -> nix::Result<()> {
        setns(&self.namespace, CloneFlags::CLONE_NEWPID)
    }

    /// Takes charge of reaping a child: the init cannot end before all of them are reaped.
    pub(crate) fn adopt(&self, child: Child) -> Arc<Reaped> {
        let child = Arc::new(Reaped(Mutex::new((child, None))));
        let mut children = lock(&self.children);
        children.retain(|child| matches!(child.try_wait(), Ok(None)));
        children.push(Arc::clone(&child));
        child
    }

    /// Kills everything inside and waits until it is gone. Idempotent.
    pub(crate) fn shutdown(&self) {
        let Some((stop, keeper)) = lock(&self.keeper).take() else { return };
        let _ = kill(self.init, Signal::SIGKILL);
        for child in lock(&self.children).drain(..) {
            child.wait();
        }
        drop(stop);
        let _ = keeper.join();
    }
}

impl Drop for PidSpace {
    fn drop(&mut self) {
        self.shutdown();
    }
}
