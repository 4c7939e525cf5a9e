//! Raw sockets beside the WireGuard device on its own port.
//!
//! A raw socket is given a copy of what the host's firewall has let in, so that a probe is blocked where the tunnel is; of all of it
//! a filter in the kernel keeps probes of peers to our port only ([`filter`]). The device gets them as well, and
//! drops what is none of WireGuard's. What is sent has a hop limit that is never the device's and never twice the same, so that no
//! receiver's GRO joins a probe with a datagram before or behind it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use mesh_overlay::path::wire::{MOST, RouteId};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::{filter, packet};

/// How long a source address that the kernel has chosen is used.
const SOURCE_FOR: Duration = Duration::from_secs(1);
const SOURCES_MOST: usize = 8192;
/// Datagrams that are read at once.
const BURST: usize = 128;
const BUFFER: usize = 1 << 20;

/// One family's socket for what arrives.
struct Receiver {
    // Receiving is the same for raw sockets, and the runtime has this type.
    socket: tokio::net::UdpSocket,
    v6: bool,
}

/// What sends and receives probes.
pub(super) struct Sockets {
    port: u16,
    receivers: Vec<Receiver>,
    v4: Option<Socket>,
    v6: Option<Socket>,
    sources: HashMap<IpAddr, (IpAddr, Instant)>,
    hop: u8,
    buffer: Vec<u8>,
}

impl Sockets {
    /// Opens them. A host without IPv6 has those of IPv4 alone.
    pub(super) fn open(port: u16) -> io::Result<Self> {
        let v4 = Receiver::open(port, false)?;
        let v6 = Receiver::open(port, true).ok();
        let sender = |domain| Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::from(255)));
        Ok(Self {
            port,
            receivers: [Some(v4), v6].into_iter().flatten().collect(),
            v4: Some(sender(Domain::IPV4)?),
            v6: sender(Domain::IPV6).ok(),
            sources: HashMap::new(),
            hop: 0,
            buffer: vec![0; MOST + 128],
        })
    }

    /// The port that they are for.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Lets the kernel hand out what bears one of these route ids, in order, and nothing else. Strangers take no place in the queue then.
    pub(super) fn admit(&self, ids: &[RouteId]) {
        for receiver in &self.receivers {
            let socket = SockRef::from(&receiver.socket);
            let attached = socket.attach_filter(&filter::program(self.port, receiver.v6, ids));
            // The kernel limits the memory of filters (net.core.optmem_max): one without ids is short.
            if let Err(e) = attached.or_else(|_| socket.attach_filter(&filter::any(self.port, receiver.v6))) {
                tracing::warn!("probes on UDP port {}: {e}: peers of now are not heard", self.port);
            }
        }
    }

    /// Sends a probe. What cannot be sent is lost, as on any path.
    pub(super) fn send(&mut self, to: SocketAddr, from: Option<IpAddr>, payload: &[u8], now: Instant) {
        let Some(from) = from.or_else(|| self.source(to, now)) else { return };
        // 65 to 127: above what devices begin with.
        self.hop = (self.hop + 1) % 63;
        let Some(packet) = packet::build(from, self.port, to, 65 + self.hop, payload) else { return };
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        if let Some(socket) = socket {
            // The port of a raw socket's address is a protocol number.
            let _ = socket.send_to(&packet, &SockAddr::from(SocketAddr::new(to.ip(), 0)));
        }
    }

    /// The address that the kernel would send from.
    fn source(&mut self, to: SocketAddr, now: Instant) -> Option<IpAddr> {
        if let Some((source, at)) = self.sources.get(&to.ip())
            && now.saturating_duration_since(*at) < SOURCE_FOR
        {
            return Some(*source);
        }
        if self.sources.len() >= SOURCES_MOST {
            self.sources.clear();
        }
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let asking = UdpSocket::bind(any).ok()?;
        asking.connect(to).ok()?;
        let source = asking.local_addr().ok()?.ip();
        self.sources.insert(to.ip(), (source, now));
        Some(source)
    }

    /// Waits until something arrived.
    pub(super) async fn readable(&self) {
        match self.receivers.as_slice() {
            [v4, v6] => tokio::select! { () = v4.readable() => {}, () = v6.readable() => {} },
            [v4] => v4.readable().await,
            _ => std::future::pending().await,
        }
    }

    /// Hands out what has arrived, up to a burst of each family.
    pub(super) fn receive(&mut self, mut each: impl FnMut(SocketAddr, Option<IpAddr>, &mut [u8])) {
        for receiver in &self.receivers {
            for _ in 0..BURST {
                match receiver.read(&mut self.buffer) {
                    Ok(Some((from, range))) => {
                        let local = if receiver.v6 { None } else { packet::destination_v4(&self.buffer) };
                        each(from, local, &mut self.buffer[range]);
                    }
                    Ok(None) => {}
                    Err(_) => break,
                }
            }
        }
    }
}

type Read = Option<(SocketAddr, std::ops::Range<usize>)>;

impl Receiver {
    fn open(port: u16, v6: bool) -> io::Result<Self> {
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP))?;
        // Nobody's, until the peers are known.
        socket.attach_filter(&filter::program(port, v6, &[]))?;
        // What arrived before the filter stood.
        let mut scrap = [std::mem::MaybeUninit::uninit(); 1];
        while socket.recv(&mut scrap).is_ok() {}
        let _ = socket.set_recv_buffer_size(BUFFER);
        let socket = std::net::UdpSocket::from(std::os::fd::OwnedFd::from(socket));
        Ok(Self { socket: tokio::net::UdpSocket::from_std(socket)?, v6 })
    }

    async fn readable(&self) {
        if self.socket.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// `Err` when nothing is there.
    fn read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        let (length, from) = self.socket.try_recv_from(buffer)?;
        let read = if self.v6 {
            packet::read_v6(&buffer[..length], from.ip())
        } else {
            packet::read_v4(&buffer[..length])
        };
        Ok(read)
    }
}
