//! From a name to a running device.

use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::device::Device;
use crate::event_loop::{Ended, EventLoop};
use crate::features::Features;
use crate::lane::Lane;
use crate::name::InterfaceName;
use crate::network::Network;
use crate::pool::Pool;
use crate::sys::daemon;
use crate::sys::event::Signals;
use crate::sys::tun::{LinkWatch, Tun, TunError};
use crate::uapi::{Force, ListenError, Server, SocketFile};
use crate::worker::Shared;

/// The MTU in bytes of a link that we create: what fits into 1,500 with an IPv6 underlay.
pub const DEFAULT_MTU: u16 = 1420;

/// How a device works, as opposed to what it is configured to do.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What it may use of the kernel.
    pub features: Features,
    /// Threads that move traffic, the event loop's among them.
    pub threads: NonZeroUsize,
}

/// Why a device does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No TUN device.
    #[error(transparent)]
    Tun(#[from] TunError),
    /// No UAPI socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Anything else.
    #[error("cannot {step}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// A device that is ready: the link exists and the UAPI socket is listening.
pub struct Running {
    event_loop: EventLoop,
}

/// Makes the link and the UAPI socket and begins to serve the latter. Call it in the process that stays.
pub fn start(name: &InterfaceName, settings: Settings) -> Result<Running, StartError> {
    let step = |step| move |source| StartError::Io { step, source };
    daemon::private_files();
    let signals = Signals::catch().map_err(step("catch signals"))?;
    let tun = Tun::open(name, settings.features)?;
    let link = LinkWatch::new().map_err(step("watch links"))?;
    if tun.is_new() {
        link.set_mtu(&tun, DEFAULT_MTU).map_err(step("set the MTU"))?;
    }
    let (socket_file, listener) = SocketFile::listen(Path::new(SocketFile::DIRECTORY), name)?;
    let device = Arc::new(Device::new());
    let network = Arc::new(Network::new(settings.features).map_err(step("make an eventfd"))?);
    let force = Force { features: tun.features(), threads: settings.threads.get() };
    let server = Server::new(Arc::clone(&device), Arc::clone(&network) as _, force);
    let pool = Pool::new(settings.threads.get() - 1);
    let shared = Arc::new(Shared {
        device,
        network,
        tun,
        outgoing: Lane::default(),
        incoming: Default::default(),
        pool,
    });
    Pool::fill(&shared).map_err(step("start threads"))?;
    let event_loop =
        EventLoop::new(shared, link, signals, socket_file).map_err(step("set up the event loop"))?;
    thread::Builder::new()
        .name("uapi".into())
        .spawn(move || server.run(&listener))
        .map_err(step("start the UAPI thread"))?;
    Ok(Running { event_loop })
}

impl Running {
    /// Runs until something ends it, then removes the UAPI socket and the link.
    pub fn run(self) -> io::Result<Ended> {
        self.event_loop.run()
    }
}
