//! The server side of [`crate::probe`]: one thread, many namespaces.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo, Ipv6V6Only, ReuseAddr};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    SockaddrStorage, bind, listen, recvmsg, sendmsg, setsockopt, socket,
};

use crate::asking::deepen;
use crate::{Error, Namespace, Result};

/// See [`Echo`].
pub const WHERE_AM_I: &[u8] = b"netlab: where am I?";

const BUFFER: usize = 1 << 16;
/// Epoll tokens: the bell, then the sockets.
const BELL: u64 = 0;

/// UDP and TCP echo servers on one port of many namespaces, all addresses and both families, served by one
/// thread. They answer from the address they were asked at. Dropping it closes them.
///
/// A UDP datagram of exactly [`WHERE_AM_I`] is answered with the sender's address as text instead: what NAT
/// made of it.
#[derive(Debug)]
pub struct Echo {
    port: u16,
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Listens in every one of `namespaces`.
    pub fn serve<'a>(namespaces: impl IntoIterator<Item = &'a Namespace>, port: u16) -> Result<Echo> {
        let failed = || Error::errno("start the echo server");
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed())?;
        let bell = Arc::new(bell);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed())?;
        epoll.add(&bell, EpollEvent::new(EpollFlags::EPOLLIN, BELL)).map_err(failed())?;
        let mut server = Server { epoll, sockets: BTreeMap::new(), next: BELL + 1, buffer: vec![0; BUFFER] };
        for namespace in namespaces {
            let what = format!("listen on port {port} in namespace {}", namespace.name());
            let sockets = namespace.inline(move || listening(port))?.map_err(Error::errno(what.clone()))?;
            for socket in sockets {
                server.add(socket).map_err(Error::errno(what.clone()))?;
            }
        }
        let thread = std::thread::Builder::new()
            .name(format!("echo {port}"))
            .spawn(move || server.run())
            .map_err(Error::system("start the echo server"))?;
        Ok(Echo { port, bell, thread: Some(thread) })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.bell.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Socket {
    Udp(OwnedFd),
    Listener(TcpListener),
    Stream { stream: TcpStream, pending: Vec<u8> },
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Udp(fd) => fd.as_fd(),
            Socket::Listener(listener) => listener.as_fd(),
            Socket::Stream { stream, .. } => stream.as_fd(),
        }
    }
}

/// Opens the four sockets in the calling thread's network namespace.
fn listening(port: u16) -> nix::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    let v4 = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    let v6 = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0));
    for address in [v4, v6] {
        for kind in [SockType::Datagram, SockType::Stream] {
            let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
            if address.is_ipv6() {
                setsockopt(&fd, Ipv6V6Only, &true)?;
            }
            if kind == SockType::Stream {
                setsockopt(&fd, ReuseAddr, &true)?;
            } else if address.is_ipv4() {
                deepen(&fd);
                setsockopt(&fd, Ipv4PacketInfo, &true)?;
            } else {
                deepen(&fd);
                setsockopt(&fd, Ipv6RecvPacketInfo, &true)?;
            }
            bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
            sockets.push(if kind == SockType::Stream {
                listen(&fd, Backlog::new(512)?)?;
                Socket::Listener(TcpListener::from(fd))
            } else {
                Socket::Udp(fd)
            });
        }
    }
    Ok(sockets)
}

struct Server {
    epoll: Epoll,
    sockets: BTreeMap<u64, Socket>,
    next: u64,
    buffer: Vec<u8>,
}

impl Server {
    fn add(&mut self, socket: Socket) -> nix::Result<()> {
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.next))?;
        self.sockets.insert(self.next, socket);
        self.next += 1;
        Ok(())
    }

    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 128];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(_) => return,
            };
            for event in &events[..ready] {
                if event.data() == BELL {
                    return;
                }
                self.serve(event.data());
            }
        }
    }

    fn serve(&mut self, token: u64) {
        let Some(socket) = self.sockets.get_mut(&token) else { return };
        match socket {
            Socket::Udp(fd) => {
                // Bounded, so that one busy socket does not starve the rest.
                for _ in 0..64 {
                    if echo_datagram(fd, &mut self.buffer).is_err_and(|errno| errno == Errno::EAGAIN) {
                        break;
                    }
                }
            }
            Socket::Listener(listener) => {
                if let Ok((stream, _)) = listener.accept() {
                    let ready = stream.set_nonblocking(true).is_ok();
                    let _ = stream.set_nodelay(true);
                    if ready {
                        let _ = self.add(Socket::Stream { stream, pending: Vec::new() });
                    }
                }
            }
            Socket::Stream { stream, pending } => {
                let mut before = !pending.is_empty();
                match echo_stream(stream, pending, &mut self.buffer) {
                    Ok(true) => {
                        let after = !pending.is_empty();
                        if before != after {
                            let flags = if after { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
                            before = self.epoll.modify(&*stream, &mut EpollEvent::new(flags, token)).is_err();
                            if before {
                                self.sockets.remove(&token);
                            }
                        }
                    }
                    Ok(false) | Err(_) => drop(self.sockets.remove(&token)),
                }
            }
        }
    }
}

/// Answers one datagram from the address it was sent to.
fn echo_datagram(fd: &OwnedFd, buffer: &mut [u8]) -> nix::Result<()> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let (length, from, to) = {
        let mut slices = [IoSliceMut::new(buffer)];
        let message = recvmsg::<SockaddrStorage>(
            fd.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let to = message.cmsgs()?.find(|c| {
            matches!(c, ControlMessageOwned::Ipv4PacketInfo(_) | ControlMessageOwned::Ipv6PacketInfo(_))
        });
        (message.bytes, message.address, to)
    };
    let Some(from) = from else { return Ok(()) };
    let where_from;
    let answer = if &buffer[..length] == WHERE_AM_I {
        where_from = from.to_string();
        where_from.as_bytes()
    } else {
        &buffer[..length]
    };
    let answer = [IoSlice::new(answer)];
    let v4;
    let v6;
    // Interface 0: the route decides, the source address stays.
    let control = match to {
        Some(ControlMessageOwned::Ipv4PacketInfo(info)) => {
            v4 = libc::in_pktinfo { ipi_ifindex: 0, ..info };
            Some(ControlMessage::Ipv4PacketInfo(&v4))
        }
        Some(ControlMessageOwned::Ipv6PacketInfo(info)) => {
            v6 = libc::in6_pktinfo { ipi6_ifindex: 0, ..info };
            Some(ControlMessage::Ipv6PacketInfo(&v6))
        }
        _ => None,
    };
    sendmsg(fd.as_raw_fd(), &answer, control.as_slice(), MsgFlags::MSG_DONTWAIT, Some(&from)).map(drop)
}

/// Reads and writes back what it can; `false` when the other side has closed and everything is written.
fn echo_stream(stream: &mut TcpStream, pending: &mut Vec<u8>, buffer: &mut [u8]) -> io::Result<bool> {
    loop {
        if pending.is_empty() {
            match stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(length) => pending.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        match stream.write(pending) {
            Ok(length) => drop(pending.drain(..length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}
