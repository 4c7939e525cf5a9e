//! The event loop: the thread that waits, moves packets, lets time pass, and notices what happens to link and sockets.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::peer::Now;
use crate::shed::{ALL, Shedding};
use crate::sys::event::{Poll, Signals};
use crate::sys::tun::LinkWatch;
use crate::uapi::SocketFile;
use crate::worker::{Family, Shared, Worker};

const TICK: Duration = Duration::from_millis(250);
const HOUSEKEEPING: Duration = Duration::from_secs(1);

const TUN: u64 = 0;
const V4: u64 = 1;
const V6: u64 = 2;
const LINK: u64 = 3;
const SIGNAL: u64 = 4;
const NETWORK: u64 = 5;

/// Why the event loop ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A signal asked for it.
    Signal,
    /// The interface was deleted.
    InterfaceGone,
    /// The UAPI socket was removed.
    SocketGone,
}

/// Everything the loop works on.
pub struct EventLoop {
    // Dropped first: whoever finds the socket gone may expect that the link is going.
    socket_file: SocketFile,
    shared: Arc<Shared>,
    worker: Worker,
    link: LinkWatch,
    signals: Signals,
    poll: Poll,
    routes_changed: bool,
    // Whether it has been said that there are no sockets.
    reported: bool,
    // What the sockets let through.
    shedding: Shedding,
}

// Whether to try once more what failed; not on every event, which can come in thousands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    Yes,
    No,
}

#[derive(Default)]
struct Ready {
    tun: bool,
    v4: bool,
    v6: bool,
    link: bool,
    signal: bool,
    network: bool,
}

impl EventLoop {
    /// A loop over a TUN device whose UAPI socket is served elsewhere.
    pub fn new(
        shared: Arc<Shared>,
        link: LinkWatch,
        signals: Signals,
        socket_file: SocketFile,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.watch(shared.tun.fd(), TUN)?;
        poll.watch(link.fd(), LINK)?;
        poll.watch(signals.fd(), SIGNAL)?;
        poll.watch(shared.network.changed().fd(), NETWORK)?;
        let worker = Worker::new(Arc::clone(&shared));
        Ok(Self {
            shared,
            worker,
            link,
            signals,
            socket_file,
            poll,
            routes_changed: false,
            reported: false,
            shedding: Shedding::NONE,
        })
    }

    /// Runs until the interface, the UAPI socket or a signal ends it.
    pub fn run(mut self) -> io::Result<Ended> {
        self.refresh_link(Retry::Yes);
        let mut next_tick = Instant::now() + TICK;
        let mut next_housekeeping = Instant::now() + HOUSEKEEPING;
        let mut ready = Ready::default();
        let mut sweeping = false;
        loop {
            let busy = ready.tun || ready.v4 || ready.v6 || sweeping;
            let wait =
                if busy { Duration::ZERO } else { next_tick.saturating_duration_since(Instant::now()) };
            self.poll.wait(wait, |token| match token {
                TUN => ready.tun = true,
                V4 => ready.v4 = true,
                V6 => ready.v6 = true,
                LINK => ready.link = true,
                SIGNAL => ready.signal = true,
                NETWORK => ready.network = true,
                _ => {}
            })?;
            if std::mem::take(&mut ready.signal)
                && let Some(signal) = self.signals.take()
            {
                tracing::info!(signal, "asked to end");
                return Ok(Ended::Signal);
            }
            if std::mem::take(&mut ready.network) {
                self.shared.network.changed().reset();
                self.replace_sockets()?;
            }
            if std::mem::take(&mut ready.link) {
                self.link.drain();
                self.routes_changed = true;
                self.refresh_link(Retry::No);
            }
            if ready.v4 {
                ready.v4 = self.worker.receive(Family::V4);
            }
            if ready.v6 {
                ready.v6 = self.worker.receive(Family::V6);
            }
            if ready.tun {
                if !self.shared.device.is_up() {
                    // A packet can come before the news that the link is up.
                    self.refresh_link(Retry::No);
                }
                match self.worker.transmit() {
                    Ok(more) => ready.tun = more,
                    // The kernel has detached us from a deleted link.
                    Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                        return Ok(Ended::InterfaceGone);
                    }
                    Err(error) => return Err(error),
                }
            }
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                // Not at once: routes can change thousands of times a second.
                if std::mem::take(&mut self.routes_changed) {
                    self.shared.device.forget_local_addresses();
                }
                sweeping = true;
            }
            if sweeping {
                sweeping = self.worker.tick();
            }
            if now >= next_housekeeping {
                next_housekeeping = now + HOUSEKEEPING;
                self.shed();
                if !self.socket_file.is_ours() {
                    return Ok(Ended::SocketGone);
                }
                self.refresh_link(Retry::Yes);
            }
        }
    }

    fn replace_sockets(&mut self) -> io::Result<()> {
        let Some(old) = self.worker.renew_sockets() else { return Ok(()) };
        let new = self.worker.sockets();
        // They can be replaced again between the news and the look at them; then the same news comes twice.
        if old.as_ref().map(Arc::as_ptr) == new.map(Arc::as_ptr) {
            return Ok(());
        }
        if let Some(old) = old {
            // Others may hold them still, so that they stay open.
            self.poll.unwatch(old.v4());
            old.v6().into_iter().for_each(|v6| self.poll.unwatch(v6));
        }
        if let Some(sockets) = new {
            self.poll.watch(sockets.v4(), V4)?;
            if let Some(v6) = sockets.v6() {
                self.poll.watch(v6, V6)?;
            }
            tracing::info!(port = sockets.port(), "listening");
        }
        // They may be ones that were in use before.
        self.shedding = Shedding::NONE;
        if let Some(sockets) = self.worker.sockets() {
            sockets.shed(&self.shedding)?;
        }
        Ok(())
    }

    fn shed(&mut self) {
        let wanted = self.shared.device.shedding(Now::read());
        let Some(sockets) = self.worker.sockets().filter(|_| wanted != self.shedding) else { return };
        match sockets.shed(&wanted) {
            Ok(()) => {
                tracing::info!(shares = ?wanted.shares, of = ALL, "handshake initiations that the kernel lets through");
                self.shedding = wanted;
            }
            Err(error) => {
                tracing::info!(%error, "the kernel drops no handshake initiations");
                self.shared.device.give_up_shedding();
            }
        }
    }

    fn refresh_link(&mut self, retry: Retry) {
        let Ok(link) = self.link.link(&self.shared.tun) else { return };
        // The MTU of a link in another network namespace cannot be asked for: what was known of it stands.
        if let Some(mtu) = link.mtu {
            self.shared.device.set_mtu(mtu);
        }
        let comes_up = link.up && !self.shared.device.is_up();
        if comes_up {
            tracing::info!(mtu = link.mtu, "link is up");
        } else if !link.up && self.shared.device.is_up() {
            tracing::info!("link is down");
        }
        if link.up && (comes_up || retry == Retry::Yes) {
            match self.shared.network.open() {
                Ok(()) => self.reported = false,
                Err(error) if !self.reported => {
                    self.reported = true;
                    tracing::error!(%error, "cannot open UDP sockets; trying again every second");
                }
                Err(_) => {}
            }
        }
        self.shared.device.set_up(link.up);
    }
}
