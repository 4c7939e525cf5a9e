//! A pair of UDP sockets on one port, and batches of datagrams through them.
#![allow(unsafe_code)]

mod address;
mod headers;
mod receive;
mod send;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

pub use receive::{ReceiveBatch, Train};
pub use send::{SendBatch, SendReport};

use self::address::{from_storage, to_storage, zeroed_storage};
use super::check;
use crate::features::Features;

/// Messages per system call. With segmentation each is a run of datagrams.
pub const BATCH: usize = 64;

const SOCKET_BUFFER: libc::c_int = 7 << 20;
const SEND_TIMEOUT_MICROSECONDS: libc::suseconds_t = 50_000;
const ANY_PORT_ATTEMPTS: usize = 100;

/// An IPv4 and an IPv6 socket on the same port. The IPv6 one is missing where the kernel has no IPv6.
#[derive(Debug)]
pub struct UdpPair {
    v4: Socket,
    v6: Option<Socket>,
    port: u16,
}

/// One of the two.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    gro: bool,
    // Turned off when a device on the way turns out not to go along with it.
    gso: AtomicBool,
}

impl Socket {
    pub(super) fn has_gso(&self) -> bool {
        self.gso.load(Ordering::Relaxed)
    }

    pub(super) fn give_up_gso(&self) {
        if self.gso.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                "the network device does not segment datagrams; sending them one by one from now on"
            );
        }
    }
}

impl UdpPair {
    /// Binds both sockets to a port, or to any free one for 0, with a firewall mark on what they send.
    pub fn bind(port: u16, mark: u32, wanted: Features) -> io::Result<Self> {
        let mut attempts = if port == 0 { ANY_PORT_ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::bind_once(port, mark, wanted) {
                // The port that the first socket got is taken for the second: draw again.
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) && attempts > 0 => {}
                result => return result,
            }
        }
    }

    fn bind_once(port: u16, mark: u32, wanted: Features) -> io::Result<Self> {
        let v4 = open(libc::AF_INET, wanted)?;
        bind(&v4.fd, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
        let port = local_port(&v4.fd)?;
        let v6 = match open(libc::AF_INET6, wanted) {
            Ok(v6) => {
                match bind(&v6.fd, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into()) {
                    Ok(()) => Some(v6),
                    // IPv6 is compiled in but disabled.
                    Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => None,
                    Err(error) => return Err(error),
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(error),
        };
        let pair = Self { v4, v6, port };
        if mark != 0 {
            pair.set_mark(mark)?;
        }
        Ok(pair)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Puts a firewall mark on what is sent; 0 for none.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        for socket in std::iter::once(&self.v4).chain(&self.v6) {
            set(&socket.fd, libc::SOL_SOCKET, libc::SO_MARK, &(mark as libc::c_int))?;
        }
        Ok(())
    }

    /// The IPv4 socket, for watching.
    pub fn v4(&self) -> BorrowedFd<'_> {
        self.v4.fd.as_fd()
    }

    /// The IPv6 socket, for watching.
    pub fn v6(&self) -> Option<BorrowedFd<'_>> {
        self.v6.as_ref().map(|socket| socket.fd.as_fd())
    }

    /// What is in force; what concerns the TUN device is off. A feature counts if one of the two sockets has it.
    pub fn features(&self) -> Features {
        let any = |has: fn(&Socket) -> bool| std::iter::once(&self.v4).chain(&self.v6).any(has);
        Features { udp_gso: any(Socket::has_gso), udp_gro: any(|socket| socket.gro), ..Features::NONE }
    }

    pub(super) fn for_remote(&self, remote: &SocketAddr) -> Option<&Socket> {
        match remote {
            SocketAddr::V4(_) => Some(&self.v4),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }
}

fn open(family: libc::c_int, wanted: Features) -> io::Result<Socket> {
    // SAFETY: takes no pointers; the returned descriptor is ours alone.
    let fd = unsafe {
        OwnedFd::from_raw_fd(check(libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?)
    };
    for (forced, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        // Beyond the system's limit only with CAP_NET_ADMIN; up to it otherwise. Neither is worth failing for.
        let _ = set(&fd, libc::SOL_SOCKET, forced, &SOCKET_BUFFER)
            .or_else(|_| set(&fd, libc::SOL_SOCKET, plain, &SOCKET_BUFFER));
    }
    let timeout = libc::timeval { tv_sec: 0, tv_usec: SEND_TIMEOUT_MICROSECONDS };
    set(&fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &timeout)?;
    let on: libc::c_int = 1;
    if family == libc::AF_INET6 {
        set(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &on)?;
        set(&fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &on)?;
    } else {
        set(&fd, libc::IPPROTO_IP, libc::IP_PKTINFO, &on)?;
    }
    // A kernel that does not know the option refuses it; this value leaves things as they are.
    let off: libc::c_int = 0;
    let gso = wanted.udp_gso && set(&fd, libc::SOL_UDP, libc::UDP_SEGMENT, &off).is_ok();
    let gro = wanted.udp_gro && set(&fd, libc::SOL_UDP, libc::UDP_GRO, &on).is_ok();
    Ok(Socket { fd, gro, gso: AtomicBool::new(gso) })
}

fn set<T>(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value outlives the call, which is told its size; all uses pass what the option expects.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

fn bind(fd: &OwnedFd, address: &SocketAddr) -> io::Result<()> {
    let (storage, length) = to_storage(address);
    // SAFETY: the address outlives the call, which is told its size.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const storage).cast(), length) })?;
    Ok(())
}

fn local_port(fd: &OwnedFd) -> io::Result<u16> {
    let mut storage = zeroed_storage();
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: the storage has room for every address, and the call is told its size.
    check(unsafe { libc::getsockname(fd.as_raw_fd(), (&raw mut storage).cast(), &raw mut length) })?;
    from_storage(&storage).map(|address| address.port()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
