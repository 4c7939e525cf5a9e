//! Listens on the mesh interface for probes that have come through the tunnel, before this host's firewall judges them.
//!
//! A host that lets nothing in by the mesh interface still forwards pods' packets: what its firewall does to its own input says
//! nothing of the tunnel. What the tunnel hands out has passed the peer's routes and firewall, and WireGuard's AllowedIPs.
#![allow(unsafe_code, reason = "no library builds the link-layer address that a packet socket is bound to")]

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use mesh_overlay::path::wire::{MOST, RouteId};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use super::{filter, packet};

const V6_HEADER: usize = 40;
/// Packets that are read at once.
const BURST: usize = 128;

/// One family's packet socket.
struct Ear {
    socket: tokio::net::UdpSocket,
    v6: bool,
}

/// The sockets that receive probes on one interface.
pub(super) struct Tap {
    index: u32,
    ears: Vec<Ear>,
    buffer: Vec<u8>,
}

impl Tap {
    /// Opens it on the interface of this index.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`, or when the interface has gone.
    pub(super) fn open(index: u32, ids: &[RouteId]) -> io::Result<Self> {
        let ears = [false, true].map(|v6| Ear::open(index, v6, ids));
        let ears = ears.into_iter().collect::<io::Result<_>>()?;
        Ok(Self { index, ears, buffer: vec![0; MOST + 128] })
    }

    /// The index of its interface.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Hears the peers of these route ids, and nobody else.
    pub(super) fn admit(&self, ids: &[RouteId]) {
        for ear in &self.ears {
            if let Err(e) = SockRef::from(&ear.socket).attach_filter(&filter::tapped(ear.v6, ids)) {
                tracing::warn!("the end-to-end check: {e}: peers of now are not heard");
            }
        }
    }

    /// Waits until something arrived.
    pub(super) async fn readable(&self) {
        match self.ears.as_slice() {
            [v4, v6] => tokio::select! { () = v4.readable() => {}, () = v6.readable() => {} },
            _ => std::future::pending().await,
        }
    }

    /// Hands out what has arrived, up to a burst of each family: sender, our address, payload.
    ///
    /// # Errors
    /// Fails if the interface is gone.
    pub(super) fn receive(
        &mut self,
        mut each: impl FnMut(SocketAddr, Option<IpAddr>, &mut [u8]),
    ) -> io::Result<()> {
        for ear in &self.ears {
            for _ in 0..BURST {
                let length = match ear.socket.try_recv(&mut self.buffer) {
                    Ok(length) => length,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                };
                let read = &self.buffer[..length];
                let found = if ear.v6 { read_v6(read) } else { read_v4(read) };
                if let Some((from, local, range)) = found {
                    each(from, Some(local), &mut self.buffer[range]);
                }
            }
        }
        Ok(())
    }
}

type Found = Option<(SocketAddr, IpAddr, std::ops::Range<usize>)>;

fn read_v4(read: &[u8]) -> Found {
    let (from, range) = packet::read_v4(read)?;
    Some((from, packet::destination_v4(read)?, range))
}

fn read_v6(read: &[u8]) -> Found {
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = read.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::V6(Ipv6Addr::from(octets)))
    };
    let (from, range) = packet::read_v6(read.get(V6_HEADER..)?, address(8)?)?;
    Some((from, address(24)?, range.start + V6_HEADER..range.end + V6_HEADER))
}

impl Ear {
    fn open(index: u32, v6: bool, ids: &[RouteId]) -> io::Result<Self> {
        // Of protocol 0 it hears nothing until it is bound.
        let socket = Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(Protocol::from(0)))?;
        socket.attach_filter(&filter::tapped(v6, ids))?;
        let protocol = (if v6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP } as u16).to_be();
        socket.bind(&link_address(index, protocol)?)?;
        let socket = std::net::UdpSocket::from(std::os::fd::OwnedFd::from(socket));
        Ok(Self { socket: tokio::net::UdpSocket::from_std(socket)?, v6 })
    }

    async fn readable(&self) {
        if self.socket.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The address of an interface's packets of one protocol (packet(7)).
fn link_address(index: u32, protocol: u16) -> io::Result<SockAddr> {
    let index = i32::try_from(index).map_err(io::Error::other)?;
    // SAFETY: the storage is at least as large and as aligned as any socket address, zeroed as sockaddr_ll may be, and the length
    // that is given is the one of what was written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            (*link).sll_family = libc::AF_PACKET as u16;
            (*link).sll_protocol = protocol;
            (*link).sll_ifindex = index;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_with_both_addresses() {
        for (from, to) in [("10.1.0.0", "10.2.0.0:7"), ("fd07::1", "[fd07::2]:7")] {
            let (from, to): (IpAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let built = packet::build(from, 51820, to, 65, b"probe").unwrap();
            let read = if from.is_ipv4() { read_v4 } else { read_v6 };
            let (sender, local, range) = read(&built).unwrap();
            assert_eq!((sender, local), (SocketAddr::new(from, 51820), to.ip()));
            assert_eq!(&built[range], b"probe");
            for length in 0..built.len() {
                assert_eq!(read(&built[..length]), None, "{length}");
            }
        }
    }
}
