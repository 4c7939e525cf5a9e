//! Datagrams with whatever source address, through a raw IPv4 socket (raw(7)).

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, socket,
};
use nix::time::{ClockId, clock_gettime};

use super::Pace;
use super::socket::{BATCH, Sender, enlarge};

const IP_HEADER: usize = 20;
const HEADERS: usize = IP_HEADER + 8;
const UDP: u8 = 17;
// An attacker does not spare anyone's buffers.
const BACKLOG: Duration = Duration::from_millis(200);
// WireGuard data message (WireGuard paper, section 5.4.6).
const DATA: [u8; 4] = [4, 0, 0, 0];

/// An IPv4 UDP datagram with its headers. It carries no checksum, which IPv4 allows (RFC 768).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Datagram(Vec<u8>);

impl Datagram {
    /// Puts headers before a payload of at most 1,400 bytes.
    pub(crate) fn new(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Datagram {
        let payload = &payload[..payload.len().min(1400)];
        let length = (8 + payload.len()) as u16;
        let mut bytes = Vec::with_capacity(HEADERS + payload.len());
        // The kernel fills in total length, identification and header checksum.
        bytes.extend([0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, UDP, 0, 0]);
        bytes.extend(from.ip().octets());
        bytes.extend(to.ip().octets());
        bytes.extend(from.port().to_be_bytes());
        bytes.extend(to.port().to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(payload);
        Datagram(bytes)
    }

    /// Gives it another source.
    pub(crate) fn set_source(&mut self, from: SocketAddrV4) {
        self.0[12..16].copy_from_slice(&from.ip().octets());
        self.0[IP_HEADER..IP_HEADER + 2].copy_from_slice(&from.port().to_be_bytes());
    }

    /// The WireGuard data message for this port in a captured packet, ready to be sent again.
    fn captured(packet: &[u8], port: u16) -> Option<Datagram> {
        let header: &[u8; HEADERS] = packet.first_chunk()?;
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
        if header[0] != 0x45 || header[9] != UDP || word(22) != port {
            return None;
        }
        let payload = packet.get(HEADERS..HEADERS + usize::from(word(24)).checked_sub(8)?)?;
        let from = SocketAddrV4::new(address(12), word(20));
        let to = SocketAddrV4::new(address(16), port);
        // Longer ones may be several in one, put together on the way.
        (payload.starts_with(&DATA) && payload.len() < 500).then(|| Datagram::new(from, to, payload))
    }
}

/// What an attack really was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attack {
    /// Datagrams that the kernel took.
    pub(crate) sent: u64,
    /// How long it lasted.
    pub(crate) length: Duration,
    /// CPU time of the sending thread, what the kernel does on the way to the target's socket included.
    pub(crate) cpu: Duration,
}

/// Sends these datagrams over and over from the calling thread's namespace, `rate` a second; `vary` may change each
/// before it goes.
pub(crate) fn send(
    datagrams: &mut [Datagram],
    to: SocketAddrV4,
    rate: u64,
    length: Duration,
    mut vary: impl FnMut(&mut Datagram),
) -> Result<Attack> {
    let socket = open(SockProtocol::Raw)?;
    enlarge(&socket);
    let to = Some(SockaddrStorage::from(to));
    let mut sender = Sender::new();
    let mut pace = Pace::new(rate, Instant::now(), length, BACKLOG);
    let mut at = 0;
    let mut sent = 0;
    while let Some(mut due) = pace.due(Instant::now()) {
        while due > 0 {
            let end = datagrams.len().min(at + BATCH.min(due as usize));
            datagrams[at..end].iter_mut().for_each(&mut vary);
            let batch: Vec<_> =
                datagrams[at..end].iter().map(|datagram| (datagram.0.as_slice(), to)).collect();
            sent += sender.send(&socket, &batch).context("send raw datagrams")? as u64;
            due -= (end - at) as u64;
            at = if end == datagrams.len() { 0 } else { end };
        }
        pace.rest();
    }
    let cpu = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("read the thread's clock")?;
    Ok(Attack { sent, length, cpu: cpu.into() })
}

/// Sees all UDP that reaches the host.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    /// Starts in the calling thread's namespace.
    pub(crate) fn open() -> Result<Tap> {
        let socket = open(SockProtocol::Udp)?;
        enlarge(&socket);
        Ok(Tap(socket))
    }

    /// The data messages for this port so far.
    pub(crate) fn drain(&self, port: u16) -> Result<Vec<Datagram>> {
        let mut found = Vec::new();
        let mut buffer = vec![0; 65536];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => found.extend(Datagram::captured(&buffer[..length], port)),
                Err(Errno::EAGAIN) => return Ok(found),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("read a raw socket"),
            }
        }
    }
}

fn open(protocol: SockProtocol) -> Result<OwnedFd> {
    socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).context("open a raw socket")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_data_message_is_sent_again_as_it_was() {
        let (from, to): (SocketAddrV4, SocketAddrV4) =
            ("192.0.2.1:7".parse().unwrap(), "192.0.2.2:51820".parse().unwrap());
        let data = Datagram::new(from, to, &[4, 0, 0, 0, 9, 9, 9, 9]);
        assert_eq!(Datagram::captured(&data.0, 51820), Some(data.clone()));
        assert_eq!(Datagram::captured(&data.0, 51821), None, "another port");
        assert_eq!(Datagram::captured(&data.0[..30], 51820), None, "cut short");
        assert_eq!(Datagram::captured(&Datagram::new(from, to, &[1, 0, 0, 0]).0, 51820), None, "a handshake");
        let mut other = data.clone();
        other.set_source("198.18.0.1:8".parse().unwrap());
        let moved = Datagram::new("198.18.0.1:8".parse().unwrap(), to, &[4, 0, 0, 0, 9, 9, 9, 9]);
        assert_eq!(other, moved);
    }
}
