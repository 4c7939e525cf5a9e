//! WireGuard peers without a TUN device: each with its key, its UDP socket and its session with one device.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::PublicKey;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};

use super::socket::enlarge;
use super::{GENTLE, Pace};
use crate::lab::Key;
use crate::stop::Stop;

/// Bytes of the inner IP packets.
pub(crate) const INNER: usize = 100;
const DATA: [u8; 4] = [4, 0, 0, 0];
// A data message with nothing inside is a keepalive.
const KEEPALIVE: usize = 32;

/// One peer.
pub(crate) struct Session {
    tunnel: Tunn,
    socket: UdpSocket,
    packet: Vec<u8>,
}

/// A peer's address in the tunnel.
pub(crate) fn inner_address(peer: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 64, (peer / 250) as u8, (peer % 250 + 1) as u8)
}

impl Session {
    /// A peer in the calling thread's namespace, bound to `local` and a port of its own: as with real peers, no two
    /// share a flow.
    pub(crate) fn new(
        number: usize,
        key: &Key,
        device: PublicKey,
        local: Ipv4Addr,
        remote: SocketAddr,
        sink: (Ipv4Addr, u16),
    ) -> Result<Session> {
        let socket =
            UdpSocket::bind((local, 0)).context("bind a peer's socket (raise the limit of open files)")?;
        socket.connect(remote).context("connect a peer's socket")?;
        enlarge(&socket);
        let index = u32::try_from(number)?;
        let tunnel = Tunn::new(key.secret.clone(), device, None, None, index, None);
        let packet = udp_packet(inner_address(number), sink.0, sink.1, INNER);
        Ok(Session { tunnel, socket, packet })
    }

    /// Shakes hands, trying anew each second.
    pub(crate) fn establish(&mut self, stop: &Stop) -> Result<()> {
        const TRIES: usize = 8;
        let (mut out, mut buffer) = ([0; 256], [0; 256]);
        self.socket.set_read_timeout(Some(Duration::from_secs(1))).context("set a timeout")?;
        for _ in 0..TRIES {
            stop.check()?;
            if let TunnResult::WriteToNetwork(message) =
                self.tunnel.format_handshake_initiation(&mut out, true)
            {
                self.socket.send(message).context("send an initiation")?;
            }
            let Ok(length) = self.socket.recv(&mut buffer) else { continue };
            // The answer to a response is a keepalive, which tells the device that the session stands.
            if let TunnResult::WriteToNetwork(message) =
                self.tunnel.decapsulate(None, &buffer[..length], &mut out)
            {
                self.socket.send(message).context("send a keepalive")?;
                self.socket.set_nonblocking(true).context("make a socket non-blocking")?;
                return Ok(());
            }
        }
        bail!("no session after {TRIES} initiations")
    }

    fn send(&mut self, out: &mut [u8]) -> Result<bool> {
        match self.tunnel.encapsulate(&self.packet, out) {
            TunnResult::WriteToNetwork(message) => Ok(self.socket.send(message).is_ok()),
            TunnResult::Err(error) => Err(anyhow!("cannot encrypt: {error:?}")),
            _ => bail!("a session is gone"),
        }
    }
}

/// Sends one packet from each peer in turn, `rate` a second in all; returns how many the kernel took.
pub(crate) fn send(sessions: &mut [Session], rate: u64, length: Duration) -> Result<u64> {
    let mut out = [0; 2048];
    let mut pace = Pace::new(rate, Instant::now(), length, GENTLE);
    let (mut at, mut sent) = (0, 0);
    while let Some(due) = pace.due(Instant::now()) {
        for _ in 0..due {
            sent += u64::from(sessions[at].send(&mut out)?);
            at = (at + 1) % sessions.len();
        }
        pace.rest();
    }
    Ok(sent)
}

/// Counts the data messages that reach the peers until none came for `silence`, after at least `length`.
pub(crate) fn count(sessions: &[Session], length: Duration, silence: Duration) -> Result<u64> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("make an epoll")?;
    for (number, session) in sessions.iter().enumerate() {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number as u64);
        epoll.add(session.socket.as_fd(), event).context("watch a peer's socket")?;
    }
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut buffer = [0; 2048];
    let (began, mut last, mut count) = (Instant::now(), Instant::now(), 0);
    while began.elapsed() < length || last.elapsed() < silence {
        let ready = match epoll.wait(&mut events, EpollTimeout::from(50u8)) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno).context("wait for datagrams"),
        };
        for event in &events[..ready] {
            let Some(session) = sessions.get(event.data() as usize) else { continue };
            // A few at a time, so that one busy peer does not starve the others.
            for _ in 0..32 {
                match recv(session.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) if length > KEEPALIVE && buffer.starts_with(&DATA) => {
                        count += 1;
                        last = Instant::now();
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
    }
    Ok(count)
}

/// Drops what still waits in the peers' sockets.
pub(crate) fn drain(sessions: &[Session]) {
    let mut buffer = [0; 2048];
    for session in sessions {
        while recv(session.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
}

/// Handshake initiations for a device from as many strangers, each with a valid first MAC.
pub(crate) fn initiations(device: PublicKey, count: usize) -> Result<Vec<Vec<u8>>> {
    let initiation = |number: usize| {
        let mut tunnel = Tunn::new(Key::random()?.secret, device, None, None, u32::try_from(number)?, None);
        match tunnel.format_handshake_initiation(&mut [0; 256], true) {
            TunnResult::WriteToNetwork(message) => Ok(message.to_vec()),
            _ => Err(anyhow!("no initiation")),
        }
    };
    (0..count).map(initiation).collect()
}

fn checksum(bytes: impl IntoIterator<Item = u8>, start: u32) -> u16 {
    let sum = bytes.into_iter().enumerate().fold(start, |sum, (at, byte)| {
        sum + if at % 2 == 0 { u32::from(byte) << 8 } else { u32::from(byte) }
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// An IPv4 UDP packet of `length` bytes in all, with both checksums.
fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, port: u16, length: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; length.max(28)];
    let total = packet.len() as u16;
    packet[..12].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[20..22].copy_from_slice(&40_000u16.to_be_bytes());
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet[24..26].copy_from_slice(&(total - 20).to_be_bytes());
    packet[26..28].copy_from_slice(&[0, 0]);
    let header = checksum(packet[..20].iter().copied(), 0);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    // The pseudo header: addresses, protocol, length (RFC 768).
    let udp = checksum(packet[12..].iter().copied(), 17 + u32::from(total - 20));
    packet[26..28].copy_from_slice(&udp.to_be_bytes());
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_have_valid_checksums() {
        for length in [28, 29, 100] {
            let packet = udp_packet(inner_address(999), Ipv4Addr::new(10, 99, 0, 2), 9999, length);
            assert_eq!(packet.len(), length);
            assert_eq!(checksum(packet[..20].iter().copied(), 0), 0, "IP header, {length}");
            assert_eq!(checksum(packet[12..].iter().copied(), 17 + length as u32 - 20), 0, "UDP, {length}");
        }
    }

    #[test]
    fn initiations_are_for_the_device_and_differ() {
        let device = Key::random().unwrap();
        let all = initiations(device.public, 2).unwrap();
        assert!(all.iter().all(|message| message.len() == 148 && message[0] == 1));
        assert_ne!(all[0], all[1]);
    }
}
