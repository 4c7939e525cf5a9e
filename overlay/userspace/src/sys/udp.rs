//! A pair of UDP sockets on one port, and batches of datagrams through them.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;
use crate::peer::Endpoint;

/// Datagrams per system call.
pub const BATCH: usize = 64;
/// Bytes per datagram: the largest there can be, and what encryption may write beyond that before it is refused.
pub const SLOT: usize = 65_536 + 64;

const SOCKET_BUFFER: libc::c_int = 7 << 20;
const SEND_TIMEOUT_MICROSECONDS: libc::suseconds_t = 50_000;
const ANY_PORT_ATTEMPTS: usize = 100;
// Room for one in6_pktinfo with its header, aligned as cmsghdr wants it.
const CONTROL_WORDS: usize = 8;

type Control = [u64; CONTROL_WORDS];

/// An IPv4 and an IPv6 socket on the same port. The IPv6 one is missing where the kernel has no IPv6.
#[derive(Debug)]
pub struct UdpPair {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
    port: u16,
}

impl UdpPair {
    /// Binds both sockets to a port, or to any free one for 0, with a firewall mark on what they send.
    pub fn bind(port: u16, mark: u32) -> io::Result<Self> {
        let mut attempts = if port == 0 { ANY_PORT_ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::bind_once(port, mark) {
                // The port that the first socket got is taken for the second: draw again.
                Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) && attempts > 0 => {}
                result => return result,
            }
        }
    }

    fn bind_once(port: u16, mark: u32) -> io::Result<Self> {
        let v4 = open(libc::AF_INET)?;
        bind(&v4, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
        let port = local_port(&v4)?;
        let v6 = match open(libc::AF_INET6) {
            Ok(v6) => {
                match bind(&v6, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into()) {
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
        for fd in std::iter::once(&self.v4).chain(&self.v6) {
            set(fd, libc::SOL_SOCKET, libc::SO_MARK, &(mark as libc::c_int))?;
        }
        Ok(())
    }

    /// The IPv4 socket, for watching.
    pub fn v4(&self) -> BorrowedFd<'_> {
        self.v4.as_fd()
    }

    /// The IPv6 socket, for watching.
    pub fn v6(&self) -> Option<BorrowedFd<'_>> {
        self.v6.as_ref().map(|fd| fd.as_fd())
    }

    fn for_remote(&self, remote: &SocketAddr) -> Option<&OwnedFd> {
        match remote {
            SocketAddr::V4(_) => Some(&self.v4),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }
}

fn open(family: libc::c_int) -> io::Result<OwnedFd> {
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
    Ok(fd)
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

fn zeroed_storage() -> libc::sockaddr_storage {
    // SAFETY: an all-zero sockaddr_storage is valid.
    unsafe { std::mem::zeroed() }
}

fn to_storage(address: &SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    let mut storage = zeroed_storage();
    // SAFETY: sockaddr_storage is large enough and aligned for both kinds of address.
    let length = unsafe {
        match address {
            SocketAddr::V4(v4) => {
                let target: *mut libc::sockaddr_in = (&raw mut storage).cast();
                (*target).sin_family = libc::AF_INET as libc::sa_family_t;
                (*target).sin_port = v4.port().to_be();
                (*target).sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(v6) => {
                let target: *mut libc::sockaddr_in6 = (&raw mut storage).cast();
                (*target).sin6_family = libc::AF_INET6 as libc::sa_family_t;
                (*target).sin6_port = v6.port().to_be();
                (*target).sin6_addr.s6_addr = v6.ip().octets();
                (*target).sin6_scope_id = v6.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        }
    };
    (storage, length as libc::socklen_t)
}

fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the family says which kind of address the storage, large enough for both, holds.
    unsafe {
        match libc::c_int::from(storage.ss_family) {
            libc::AF_INET => {
                let source: *const libc::sockaddr_in = std::ptr::from_ref(storage).cast();
                let ip = Ipv4Addr::from((*source).sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be((*source).sin_port)).into())
            }
            libc::AF_INET6 => {
                let source: *const libc::sockaddr_in6 = std::ptr::from_ref(storage).cast();
                let ip = Ipv6Addr::from((*source).sin6_addr.s6_addr);
                // Only link-local addresses depend on the interface; elsewhere a scope would look like roaming.
                let scope = if ip.is_unicast_link_local() { (*source).sin6_scope_id } else { 0 };
                Some(SocketAddrV6::new(ip, u16::from_be((*source).sin6_port), 0, scope).into())
            }
            _ => None,
        }
    }
}

// What the system calls want around the buffers, so that none of it is zeroed per call.
struct Headers {
    addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Headers {
    fn new() -> Self {
        // SAFETY: all-zero iovec and mmsghdr are valid.
        let (vector, header): (libc::iovec, libc::mmsghdr) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            addresses: vec![zeroed_storage(); BATCH].into(),
            controls: vec![[0; CONTROL_WORDS]; BATCH].into(),
            vectors: vec![vector; BATCH].into(),
            headers: vec![header; BATCH].into(),
        }
    }

    /// Points header `i` at a buffer, its address and its control space, and hands it out.
    fn prepare(&mut self, i: usize, buffer: &mut [u8]) -> &mut libc::msghdr {
        self.vectors[i] = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let header = &mut self.headers[i].msg_hdr;
        header.msg_name = (&raw mut self.addresses[i]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_iov = &raw mut self.vectors[i];
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut self.controls[i]).cast();
        header.msg_controllen = size_of::<Control>() as _;
        header.msg_flags = 0;
        header
    }
}

/// Buffers for receiving, allocated once.
pub struct ReceiveBatch {
    buffers: Box<[u8]>,
    headers: Headers,
    received: Vec<(Endpoint, usize)>,
}

impl ReceiveBatch {
    /// Buffers for [`BATCH`] datagrams. Memory is used only as far as datagrams fill it.
    pub fn new() -> Self {
        Self {
            buffers: vec![0; BATCH * SLOT].into(),
            headers: Headers::new(),
            received: Vec::with_capacity(BATCH),
        }
    }

    /// Receives what is there, up to [`BATCH`] datagrams, without waiting. Returns how many were taken from the
    /// socket.
    pub fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.received.clear();
        for (i, slot) in self.buffers.chunks_exact_mut(SLOT).enumerate() {
            self.headers.prepare(i, slot);
        }
        // SAFETY: each header points to its own address, control space and buffer, which outlive the call.
        let count = check(unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.headers.headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })? as usize;
        for (header, address) in self.headers.headers[..count].iter().zip(&self.headers.addresses) {
            // What cannot be answered or was cut keeps its place, with a length that no message has.
            let whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            let remote = from_storage(address);
            let length = if whole && remote.is_some() { header.msg_len as usize } else { 0 };
            let remote = remote.unwrap_or(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)));
            self.received.push((Endpoint { remote, local: local_address(&header.msg_hdr) }, length));
        }
        Ok(count)
    }

    /// What the last [`ReceiveBatch::receive`] brought.
    pub fn datagrams(&self) -> impl Iterator<Item = (&Endpoint, &[u8])> {
        self.received
            .iter()
            .zip(self.buffers.chunks_exact(SLOT))
            .map(|((endpoint, length), slot)| (endpoint, &slot[..*length]))
    }
}

impl Default for ReceiveBatch {
    fn default() -> Self {
        Self::new()
    }
}

fn local_address(header: &libc::msghdr) -> Option<IpAddr> {
    // SAFETY: the header was filled by the kernel, so its control messages are well-formed; the type says what
    // is read, which may be unaligned.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let address = Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes());
                    return usable_source(address.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    return usable_source(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                _ => control = libc::CMSG_NXTHDR(header, control),
            }
        }
    }
    None
}

// A datagram to a group has no address of ours to be answered from.
fn usable_source(address: IpAddr) -> Option<IpAddr> {
    (!address.is_multicast() && !address.is_unspecified()).then_some(address)
}

/// Datagrams that wait for being sent together, in buffers allocated once.
pub struct SendBatch {
    buffers: Box<[u8]>,
    headers: Headers,
    queued: Vec<(Endpoint, usize)>,
}

/// How sending a batch went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// Datagrams that the system did not take.
    pub failed: usize,
    /// Those of our addresses that answers were to leave by and that no longer work.
    pub lost_addresses: Vec<IpAddr>,
}

impl SendBatch {
    /// Buffers for [`BATCH`] datagrams. Memory is used only as far as datagrams fill it.
    pub fn new() -> Self {
        Self {
            buffers: vec![0; BATCH * SLOT].into(),
            headers: Headers::new(),
            queued: Vec::with_capacity(BATCH),
        }
    }

    /// Whether the batch has to be sent before there is space again.
    pub fn is_full(&self) -> bool {
        self.queued.len() == BATCH
    }

    /// The next datagram's space. The batch must not be full.
    pub fn space(&mut self) -> &mut [u8] {
        let at = self.queued.len().min(BATCH - 1) * SLOT;
        &mut self.buffers[at..at + SLOT]
    }

    /// The first `length` bytes of the space are a datagram for `to`.
    pub fn push(&mut self, to: &Endpoint, length: usize) {
        if !self.is_full() {
            self.queued.push((*to, length.min(SLOT)));
        }
    }

    /// Sends all that waits, in order. Waits a little where the system's buffers are full.
    pub fn send(&mut self, sockets: &UdpPair) -> SendReport {
        let mut report = SendReport::default();
        let mut from = 0;
        // By family, IPv6 second: the socket had its time and took nothing more.
        let mut full = [false; 2];
        while from < self.queued.len() {
            let v6 = self.queued[from].0.remote.is_ipv6();
            let run = self.queued[from..].iter().take_while(|(to, _)| to.remote.is_ipv6() == v6).count();
            match sockets.for_remote(&self.queued[from].0.remote) {
                Some(fd) if !full[usize::from(v6)] => {
                    full[usize::from(v6)] = self.send_run(fd, from, run, &mut report);
                }
                _ => report.failed += run,
            }
            from += run;
        }
        self.queued.clear();
        report
    }

    /// Returns whether the socket is full.
    fn send_run(&mut self, fd: &OwnedFd, mut from: usize, run: usize, report: &mut SendReport) -> bool {
        let end = from + run;
        while from < end {
            match self.send_some(fd, from, end, true) {
                Ok(sent) => from += sent.max(1),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The system has had its time: what cannot leave now is lost, as on any full link.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    report.failed += end - from;
                    return true;
                }
                Err(error) if self.queued[from].0.local.is_some() && may_be_the_source(&error) => {
                    match (self.queued[from].0.local, self.send_some(fd, from, from + 1, false)) {
                        (Some(lost), Ok(_)) if !report.lost_addresses.contains(&lost) => {
                            report.lost_addresses.push(lost);
                        }
                        (_, Ok(_)) => {}
                        (_, Err(_)) => report.failed += 1,
                    }
                    from += 1;
                }
                Err(_) => {
                    report.failed += 1;
                    from += 1;
                }
            }
        }
        false
    }

    fn send_some(&mut self, fd: &OwnedFd, from: usize, end: usize, with_local: bool) -> io::Result<usize> {
        for (i, (to, length)) in self.queued[from..end].iter().enumerate() {
            let slot = &mut self.buffers[(from + i) * SLOT..][..*length];
            let (address, address_length) = to_storage(&to.remote);
            self.headers.addresses[i] = address;
            let header = self.headers.prepare(i, slot);
            header.msg_namelen = address_length;
            match to.local.filter(|_| with_local) {
                Some(local) => header.msg_controllen = put_local_address(header, local) as _,
                None => (header.msg_control, header.msg_controllen) = (std::ptr::null_mut(), 0),
            }
        }
        // SAFETY: each header points to its own address, control space and buffer, which outlive the call.
        let sent = check(unsafe {
            libc::sendmmsg(fd.as_raw_fd(), self.headers.headers.as_mut_ptr(), (end - from) as libc::c_uint, 0)
        })?;
        Ok(sent as usize)
    }
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether sending may have failed only because the address to leave by is not ours any more, or has no route.
fn may_be_the_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENODEV)
    )
}

/// Writes the source address into the header's control space and returns how long it became.
fn put_local_address(header: &mut libc::msghdr, local: IpAddr) -> usize {
    // SAFETY: the control space is aligned and large enough for the larger of the two; all-zero
    // pktinfo structures are valid.
    unsafe {
        let control = libc::CMSG_FIRSTHDR(header);
        let length = match local {
            IpAddr::V4(v4) => {
                let mut info: libc::in_pktinfo = std::mem::zeroed();
                info.ipi_spec_dst.s_addr = u32::from_ne_bytes(v4.octets());
                (*control).cmsg_level = libc::IPPROTO_IP;
                (*control).cmsg_type = libc::IP_PKTINFO;
                libc::CMSG_DATA(control).cast::<libc::in_pktinfo>().write_unaligned(info);
                size_of::<libc::in_pktinfo>()
            }
            IpAddr::V6(v6) => {
                let mut info: libc::in6_pktinfo = std::mem::zeroed();
                info.ipi6_addr.s6_addr = v6.octets();
                (*control).cmsg_level = libc::IPPROTO_IPV6;
                (*control).cmsg_type = libc::IPV6_PKTINFO;
                libc::CMSG_DATA(control).cast::<libc::in6_pktinfo>().write_unaligned(info);
                size_of::<libc::in6_pktinfo>()
            }
        };
        (*control).cmsg_len = libc::CMSG_LEN(length as libc::c_uint) as _;
        libc::CMSG_SPACE(length as libc::c_uint) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_not_ours_is_named_once_and_the_datagrams_leave_all_the_same() {
        let sockets = UdpPair::bind(0, 0).unwrap();
        let remote = SocketAddr::from((Ipv4Addr::LOCALHOST, sockets.port()));
        let (lost, good) = (IpAddr::from([203, 0, 113, 1]), IpAddr::from([127, 0, 0, 1]));
        let mut batch = SendBatch::new();
        for local in [lost, good, lost] {
            batch.push(&Endpoint { remote, local: Some(local) }, 10);
        }
        let report = batch.send(&sockets);
        assert_eq!(report, SendReport { failed: 0, lost_addresses: vec![lost] });
    }

    #[test]
    fn answers_leave_by_no_group_and_no_wildcard() {
        for address in ["224.0.0.1", "0.0.0.0", "ff02::1", "::"] {
            assert_eq!(usable_source(address.parse().unwrap()), None);
        }
        assert!(usable_source(Ipv4Addr::LOCALHOST.into()).is_some());
    }
}
