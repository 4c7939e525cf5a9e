//! Two sockets on one port, and their options.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::{address, filter};
use crate::features::Features;
use crate::shed::Shedding;
use crate::sys::check;

// Bytes the kernel may keep for us, its own overhead included twice over. More of either makes bursts survive and
// latency under load grow.
const RECEIVE_BUFFER: libc::c_int = 7 << 20;
const SEND_BUFFER: libc::c_int = 7 << 20;
const SEND_TIMEOUT_MICROSECONDS: libc::suseconds_t = 50_000;
const ANY_PORT_ATTEMPTS: usize = 100;

/// An IPv4 and an IPv6 socket on the same port. The IPv6 one is missing where the kernel has no IPv6.
#[derive(Debug)]
pub struct UdpPair {
    v4: Socket,
    v6: Option<Socket>,
    port: u16,
}

#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    gro: bool,
    // Switched off for good when the kernel cannot do it after all.
    gso: AtomicBool,
}

impl UdpPair {
    /// Binds both sockets to a port, or to any free one for 0, with a firewall mark on what they send, and with the
    /// wanted features as far as the kernel has them.
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
        let v4 = Socket::open(libc::AF_INET, wanted)?;
        v4.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
        let port = v4.port()?;
        let v6 = match Socket::open(libc::AF_INET6, wanted) {
            Ok(v6) => {
                match v6.bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into()) {
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

    /// Which of `udp-gso` and `udp-gro` is in force, on every socket there is.
    pub fn features(&self) -> Features {
        Features {
            udp_gso: self.all().all(Socket::has_gso),
            udp_gro: self.all().all(|socket| socket.gro),
            ..Features::NONE
        }
    }

    /// Puts a firewall mark on what is sent; 0 for none.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        for socket in self.all() {
            set(&socket.fd, libc::SOL_SOCKET, libc::SO_MARK, &(mark as libc::c_int))?;
        }
        Ok(())
    }

    /// The IPv4 socket, for watching and receiving.
    pub fn v4(&self) -> BorrowedFd<'_> {
        self.v4.fd()
    }

    /// The IPv6 socket, for watching and receiving.
    pub fn v6(&self) -> Option<BorrowedFd<'_>> {
        self.v6.as_ref().map(Socket::fd)
    }

    /// Lets the kernel drop what is not to be let through. An error leaves all let through.
    pub fn shed(&self, shedding: &Shedding) -> io::Result<()> {
        let attached = self.all().zip([false, true]).try_for_each(|(socket, v6)| {
            if shedding.is_none() {
                filter::detach(socket.fd())
            } else {
                filter::attach(socket.fd(), &filter::program(shedding, v6))
            }
        });
        if attached.is_err() {
            for socket in self.all() {
                let _ = filter::detach(socket.fd());
            }
        }
        attached
    }

    pub(super) fn socket(&self, v6: bool) -> Option<&Socket> {
        if v6 { self.v6.as_ref() } else { Some(&self.v4) }
    }

    fn all(&self) -> impl Iterator<Item = &Socket> {
        std::iter::once(&self.v4).chain(&self.v6)
    }
}

impl Socket {
    fn open(family: libc::c_int, wanted: Features) -> io::Result<Self> {
        // SAFETY: takes no pointers; the returned descriptor is ours alone.
        let fd = unsafe {
            OwnedFd::from_raw_fd(check(libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?)
        };
        for (forced, plain, bytes) in [
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER),
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER),
        ] {
            // Beyond the system's limit only with CAP_NET_ADMIN; up to it otherwise. Neither is worth failing for.
            let _ = set(&fd, libc::SOL_SOCKET, forced, &bytes)
                .or_else(|_| set(&fd, libc::SOL_SOCKET, plain, &bytes));
        }
        let timeout = libc::timeval { tv_sec: 0, tv_usec: SEND_TIMEOUT_MICROSECONDS };
        set(&fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &timeout)?;
        let (on, off): (libc::c_int, libc::c_int) = (1, 0);
        if family == libc::AF_INET6 {
            set(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &on)?;
            set(&fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &on)?;
        } else {
            set(&fd, libc::IPPROTO_IP, libc::IP_PKTINFO, &on)?;
        }
        let gro = wanted.udp_gro && set(&fd, libc::SOL_UDP, libc::UDP_GRO, &on).is_ok();
        // The segment size comes with each message; the option is set to what it is to learn whether there is one.
        let gso = wanted.udp_gso && set(&fd, libc::SOL_UDP, libc::UDP_SEGMENT, &off).is_ok();
        Ok(Self { fd, gro, gso: gso.into() })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn has_gso(&self) -> bool {
        self.gso.load(Ordering::Relaxed)
    }

    pub(super) fn give_up_gso(&self) {
        self.gso.store(false, Ordering::Relaxed);
    }

    fn bind(&self, address: &SocketAddr) -> io::Result<()> {
        let mut storage = address::zeroed();
        let length = address::put(&mut storage, address);
        // SAFETY: the address outlives the call, which is told its size.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const storage).cast(), length) })?;
        Ok(())
    }

    fn port(&self) -> io::Result<u16> {
        let (mut storage, mut length) = (address::zeroed(), address::SIZE);
        // SAFETY: the storage has room for the addresses of this socket's family, and the call is told its size.
        check(unsafe { libc::getsockname(self.fd.as_raw_fd(), (&raw mut storage).cast(), &raw mut length) })?;
        address::take(&storage).map(|address| address.port()).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
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
