//! The event loop: one thread that moves packets from the TUN device to the network and back, run to completion.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::Device;
use crate::network::Network;
use crate::peer::{Endpoint, Now, Output};
use crate::sys::event::{Poll, Signals};
use crate::sys::tun::{LinkWatch, Tun};
use crate::sys::udp::{BATCH, ReceiveBatch, SLOT, SendBatch, UdpPair};
use crate::uapi::SocketFile;

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
    device: Arc<Device>,
    network: Arc<Network>,
    link: LinkWatch,
    signals: Signals,
    socket_file: SocketFile,
    poll: Poll,
    outbox: Outbox,
    received: ReceiveBatch,
    read: Vec<u8>,
    routes_changed: bool,
    // Whether it has been said that there are no sockets.
    reported: bool,
}

// Where the core's output goes. Datagrams gather until the batch is full or `flush` is called.
struct Outbox {
    tun: Tun,
    sockets: Option<Arc<UdpPair>>,
    send: SendBatch,
    packet: Vec<u8>,
    lost_addresses: Vec<IpAddr>,
}

impl Outbox {
    fn flush(&mut self) {
        if let Some(sockets) = &self.sockets {
            self.lost_addresses.extend(self.send.send(sockets).lost_addresses);
        }
    }
}

impl Output for Outbox {
    fn datagram_space(&mut self, _length: usize) -> &mut [u8] {
        if self.send.is_full() {
            self.flush();
        }
        self.send.space()
    }

    fn datagram_done(&mut self, to: &Endpoint, length: usize) {
        // Without sockets there is nowhere to go; with them the batch is emptied before it is asked for space.
        if self.sockets.is_some() {
            self.send.push(to, length);
        }
    }

    fn packet_space(&mut self, _length: usize) -> &mut [u8] {
        &mut self.packet
    }

    fn packet_done(&mut self, length: usize) {
        // A full queue or a link that has just gone down drops packets, as any link does.
        let _ = self.tun.write(&self.packet[..length]);
    }
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
        device: Arc<Device>,
        network: Arc<Network>,
        tun: Tun,
        link: LinkWatch,
        signals: Signals,
        socket_file: SocketFile,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.watch(tun.fd(), TUN)?;
        poll.watch(link.fd(), LINK)?;
        poll.watch(signals.fd(), SIGNAL)?;
        poll.watch(network.changed().fd(), NETWORK)?;
        Ok(Self {
            device,
            network,
            link,
            signals,
            socket_file,
            poll,
            outbox: Outbox {
                tun,
                sockets: None,
                send: SendBatch::new(),
                packet: vec![0; SLOT],
                lost_addresses: Vec::new(),
            },
            received: ReceiveBatch::new(),
            read: vec![0; SLOT],
            routes_changed: false,
            reported: false,
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
                self.network.changed().reset();
                self.replace_sockets()?;
            }
            if std::mem::take(&mut ready.link) {
                self.link.drain();
                self.routes_changed = true;
                self.refresh_link(Retry::No);
            }
            let now = Now::read();
            if ready.v4 {
                ready.v4 = self.receive(V4, now);
            }
            if ready.v6 {
                ready.v6 = self.receive(V6, now);
            }
            if ready.tun {
                match self.read_tun(now) {
                    Ok(more) => ready.tun = more,
                    Err(error) => {
                        // EBADFD: the kernel has detached us from a deleted link.
                        if error.raw_os_error() == Some(libc::EBADFD) {
                            return Ok(Ended::InterfaceGone);
                        }
                        return Err(error);
                    }
                }
            }
            if now.monotonic >= next_tick {
                next_tick = now.monotonic + TICK;
                // Not at once: routes can change thousands of times a second.
                if std::mem::take(&mut self.routes_changed) {
                    self.device.forget_local_addresses();
                }
                sweeping = true;
            }
            if sweeping {
                sweeping = self.device.tick(now, &mut self.outbox);
                self.finish_batch();
            }
            if now.monotonic >= next_housekeeping {
                next_housekeeping = now.monotonic + HOUSEKEEPING;
                if !self.socket_file.is_ours() {
                    return Ok(Ended::SocketGone);
                }
                self.refresh_link(Retry::Yes);
            }
        }
    }

    /// Sends what the last batch left behind.
    fn finish_batch(&mut self) {
        self.outbox.flush();
        for lost in self.outbox.lost_addresses.drain(..) {
            self.device.forget_local_address(lost);
        }
    }

    /// One batch from a socket. Returns whether there may be more.
    fn receive(&mut self, token: u64, now: Now) -> bool {
        let Some(sockets) = &self.outbox.sockets else { return false };
        let fd = if token == V4 { Some(sockets.v4()) } else { sockets.v6() };
        let Some(Ok(count)) = fd.map(|fd| self.received.receive(fd)) else { return false };
        {
            let mut batch = self.device.batch(now);
            for (from, datagram) in self.received.datagrams() {
                batch.datagram(from, datagram, &mut self.outbox);
            }
        }
        self.finish_batch();
        count == BATCH
    }

    /// One batch from the TUN device. Returns whether there may be more.
    fn read_tun(&mut self, now: Now) -> io::Result<bool> {
        if !self.device.is_up() {
            // A packet can come before the news that the link is up.
            self.refresh_link(Retry::No);
        }
        let result = self.read_packets(now);
        self.finish_batch();
        result
    }

    fn read_packets(&mut self, now: Now) -> io::Result<bool> {
        let mut batch = self.device.batch(now);
        for _ in 0..BATCH {
            match self.outbox.tun.read(&mut self.read) {
                Ok(length) => batch.packet(&mut self.read, length, &mut self.outbox),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The link is down; there is nothing to read until it is up.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn replace_sockets(&mut self) -> io::Result<()> {
        let sockets = self.network.sockets();
        let (old, new) = (self.outbox.sockets.as_ref(), sockets.as_ref());
        // They can be replaced again between the news and the look at them; then the same news comes twice.
        if old.map(Arc::as_ptr) == new.map(Arc::as_ptr) {
            return Ok(());
        }
        if let Some(old) = old {
            // Others may hold them still, so that they stay open.
            self.poll.unwatch(old.v4());
            old.v6().into_iter().for_each(|v6| self.poll.unwatch(v6));
        }
        self.outbox.sockets = sockets;
        if let Some(sockets) = &self.outbox.sockets {
            self.poll.watch(sockets.v4(), V4)?;
            if let Some(v6) = sockets.v6() {
                self.poll.watch(v6, V6)?;
            }
            tracing::info!(port = sockets.port(), "listening");
        }
        Ok(())
    }

    fn refresh_link(&mut self, retry: Retry) {
        let Ok(link) = self.link.link(&self.outbox.tun) else { return };
        // The MTU of a link in another network namespace cannot be asked for: what was known of it stands.
        if let Some(mtu) = link.mtu {
            self.device.set_mtu(mtu);
        }
        let comes_up = link.up && !self.device.is_up();
        if comes_up {
            tracing::info!(mtu = link.mtu, "link is up");
        } else if !link.up && self.device.is_up() {
            tracing::info!("link is down");
        }
        if link.up && (comes_up || retry == Retry::Yes) {
            match self.network.open() {
                Ok(()) => self.reported = false,
                Err(error) if !self.reported => {
                    self.reported = true;
                    tracing::error!(%error, "cannot open UDP sockets; trying again every second");
                }
                Err(_) => {}
            }
        }
        self.device.set_up(link.up);
    }
}
