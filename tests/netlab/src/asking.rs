//! The client side of [`crate::probe`]: many probes on one epoll.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::sockopt::{Ipv4RecvErr, Ipv6RecvErr, RcvBuf, RcvBufForce, ReuseAddr, SocketError};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, getsockopt,
    recv, send, setsockopt, socket,
};

use crate::probe::{Answer, Failure, Kind, Probe};
use crate::sys;

type Outcome = std::result::Result<Answer, Failure>;

const IN_FLIGHT: usize = 256;
/// Narrowings of the path MTU that a probe which may be fragmented puts up with.
const MTU_LESSONS: u32 = 8;
const BUFFER: usize = 1 << 17;
/// ICMP and ICMPv6 echo header (RFC 792, RFC 4443 section 4.1).
pub(crate) const ECHO_HEADER: usize = 8;

/// Asks all, [`IN_FLIGHT`] at a time, answers in order.
pub(crate) fn all(probes: &[Probe]) -> Vec<Outcome> {
    ask(probes, |_, _| ())
}

/// Asks a [`crate::probe::WHERE_AM_I`] and reads the address in the answer.
pub(crate) fn ask_where(probe: &Probe) -> std::result::Result<SocketAddr, Failure> {
    let mut seen = None;
    let outcome = ask(std::slice::from_ref(probe), |_, answer| {
        seen = std::str::from_utf8(answer).ok().and_then(|text| text.parse().ok());
    });
    match (seen, outcome.into_iter().next()) {
        (Some(address), _) => Ok(address),
        (None, Some(Err(failure))) => Err(failure),
        (None, _) => Err(Failure::Mismatch),
    }
}

fn ask(probes: &[Probe], mut on_answer: impl FnMut(usize, &[u8])) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = vec![Err(Failure::Timeout); probes.len()];
    let epoll = match Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC) {
        Ok(epoll) => epoll,
        Err(errno) => return vec![Err(Failure::Local(errno.to_string())); probes.len()],
    };
    let mut buffer = vec![0; BUFFER];
    let mut flying: BTreeMap<usize, Flight<'_>> = BTreeMap::new();
    let mut waiting = probes.iter().enumerate();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        while flying.len() < IN_FLIGHT {
            let Some((index, probe)) = waiting.next() else { break };
            match Flight::start(probe, &epoll, index) {
                Ok(flight) => drop(flying.insert(index, flight)),
                Err(failure) => outcomes[index] = Err(failure),
            }
        }
        let Some(wake) = flying.values().map(Flight::wake_at).min() else { return outcomes };
        let wait = wake.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX);
        let ready = epoll.wait(&mut events, timeout).unwrap_or(0);
        for event in &events[..ready] {
            let index = event.data() as usize;
            let Some(flight) = flying.get_mut(&index) else { continue };
            if let Some(outcome) =
                flight.advance(event.events(), &mut buffer, |bytes| on_answer(index, bytes))
            {
                outcomes[index] = outcome;
                flying.remove(&index);
            }
        }
        let now = Instant::now();
        flying.retain(|index, flight| match flight.on_time(now) {
            Some(failure) => {
                outcomes[*index] = Err(failure);
                false
            }
            None => true,
        });
    }
}

/// A probe under way. Dropping it closes its socket, which also takes it off the epoll.
struct Flight<'a> {
    probe: &'a Probe,
    epoll: &'a Epoll,
    index: u64,
    fd: OwnedFd,
    deadline: Instant,
    retry_at: Option<Instant>,
    sent_at: Instant,
    attempts: u32,
    /// Bytes of the payload written and read back so far (TCP).
    written: usize,
    read: usize,
    connected: bool,
    /// What to report instead of a timeout.
    last_failure: Option<Failure>,
}

impl<'a> Flight<'a> {
    fn start(probe: &'a Probe, epoll: &'a Epoll, index: usize) -> Result<Flight<'a>, Failure> {
        let (to, kind) = (probe.to, probe.kind);
        let source = (probe.source, probe.source_port);
        let dont_fragment = probe.dont_fragment;
        let opened = probe.from.inline(move || open(to, kind, source, dont_fragment));
        let fd = opened.map_err(|error| Failure::Local(error.to_string()))?.map_err(from_errno)?;
        let now = Instant::now();
        let stream = matches!(kind, Kind::Tcp(_));
        let mut flight = Flight {
            probe,
            epoll,
            index: index as u64,
            fd,
            deadline: now + probe.deadline,
            retry_at: probe.retry.filter(|_| !stream).map(|interval| now + interval),
            sent_at: now,
            attempts: 1,
            written: 0,
            read: 0,
            connected: false,
            last_failure: None,
        };
        let wanted = if stream { EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
        epoll
            .add(&flight.fd, EpollEvent::new(wanted | EpollFlags::EPOLLIN, index as u64))
            .map_err(|errno| Failure::Local(errno.to_string()))?;
        if !stream {
            flight.send().or_else(|failure| flight.survive(failure))?;
        }
        Ok(flight)
    }

    /// A probe that is sent again outlives an error; the last one is its verdict.
    fn survive(&mut self, failure: Failure) -> Result<(), Failure> {
        if self.retry_at.is_none() {
            return Err(failure);
        }
        self.last_failure = Some(failure);
        Ok(())
    }

    fn send(&mut self) -> Result<(), Failure> {
        self.sent_at = Instant::now();
        let payload = &self.probe.payload;
        let sent = match self.probe.kind {
            Kind::Icmp => {
                let message = echo_request(self.probe.to, self.attempts as u16, payload);
                send(self.fd.as_raw_fd(), &message, MsgFlags::MSG_DONTWAIT)
            }
            Kind::Udp(_) | Kind::Tcp(_) => send(self.fd.as_raw_fd(), payload, MsgFlags::MSG_DONTWAIT),
        };
        sent.map(drop).map_err(from_errno)
    }

    fn wake_at(&self) -> Instant {
        self.retry_at.map_or(self.deadline, |retry| retry.min(self.deadline))
    }

    /// Sends again when due; says so when the deadline has passed.
    fn on_time(&mut self, now: Instant) -> Option<Failure> {
        if now >= self.deadline {
            return Some(self.last_failure.take().unwrap_or(Failure::Timeout));
        }
        if let (Some(due), Some(interval)) = (self.retry_at, self.probe.retry)
            && now >= due
        {
            self.retry_at = Some(now + interval);
            self.attempts += 1;
            return self.send().or_else(|failure| self.survive(failure)).err();
        }
        None
    }

    fn advance(
        &mut self,
        events: EpollFlags,
        buffer: &mut [u8],
        on_answer: impl FnOnce(&[u8]),
    ) -> Option<Outcome> {
        if events.contains(EpollFlags::EPOLLERR) {
            let pending = getsockopt(&self.fd, SocketError).unwrap_or(0);
            // Empties the error queue, which would keep the socket in this state.
            while recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT).is_ok() {
            }
            if pending == Errno::EMSGSIZE as i32 && !self.probe.dont_fragment && self.attempts <= MTU_LESSONS
            {
                // A router told the path MTU; the kernel now knows how to cut it.
                self.attempts += 1;
                if let Err(failure) = self.send().or_else(|failure| self.survive(failure)) {
                    return Some(Err(failure));
                }
            } else if pending != 0
                && let Err(failure) = self.survive(from_errno(Errno::from_raw(pending)))
            {
                return Some(Err(failure));
            }
        }
        match self.probe.kind {
            Kind::Tcp(_) => self.advance_stream(events, buffer),
            Kind::Udp(_) | Kind::Icmp => self.take_datagram(buffer, on_answer),
        }
    }

    fn take_datagram(&mut self, buffer: &mut [u8], on_answer: impl FnOnce(&[u8])) -> Option<Outcome> {
        let length = match recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            Err(errno) => return self.survive(from_errno(errno)).err().map(Err),
        };
        let header = if self.probe.kind == Kind::Icmp { ECHO_HEADER } else { 0 };
        let answer = buffer.get(header..length).unwrap_or_default();
        on_answer(answer);
        if answer == self.probe.payload {
            return Some(Ok(Answer { round_trip: self.sent_at.elapsed(), attempts: self.attempts }));
        }
        Some(Err(Failure::Mismatch))
    }

    fn advance_stream(&mut self, events: EpollFlags, buffer: &mut [u8]) -> Option<Outcome> {
        let payload = &self.probe.payload;
        if !self.connected {
            if !events.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP) {
                return None;
            }
            match getsockopt(&self.fd, SocketError) {
                Ok(0) => self.connected = true,
                Ok(errno) => return Some(Err(from_errno(Errno::from_raw(errno)))),
                Err(errno) => return Some(Err(from_errno(errno))),
            }
        }
        while self.written < payload.len() {
            match send(
                self.fd.as_raw_fd(),
                &payload[self.written..],
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            ) {
                Ok(length) => self.written += length,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(errno) => return Some(Err(from_errno(errno))),
            }
        }
        if self.written == payload.len() {
            // A socket with nothing to write would wake us all the time.
            let mut wanted = EpollEvent::new(EpollFlags::EPOLLIN, self.index);
            if let Err(errno) = self.epoll.modify(&self.fd, &mut wanted) {
                return Some(Err(from_errno(errno)));
            }
        }
        while self.read < payload.len() {
            match recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Some(Err(Failure::Refused)),
                Ok(length) => {
                    let until = (self.read + length).min(payload.len());
                    if buffer[..length] != payload[self.read..until] {
                        return Some(Err(Failure::Mismatch));
                    }
                    self.read = until;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return None,
                Err(errno) => return Some(Err(from_errno(errno))),
            }
        }
        Some(Ok(Answer { round_trip: self.sent_at.elapsed(), attempts: self.attempts }))
    }
}

/// Opens and connects a socket in the calling thread's network namespace.
pub(crate) fn open(
    to: IpAddr,
    kind: Kind,
    (source, source_port): (Option<IpAddr>, u16),
    dont_fragment: bool,
) -> nix::Result<OwnedFd> {
    let v6 = to.is_ipv6();
    let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let (sort, protocol, port) = match kind {
        Kind::Icmp if v6 => (SockType::Datagram, Some(SockProtocol::IcmpV6), 0),
        Kind::Icmp => (SockType::Datagram, Some(SockProtocol::Icmp), 0),
        Kind::Udp(port) => (SockType::Datagram, None, port),
        Kind::Tcp(port) => (SockType::Stream, None, port),
    };
    let fd = socket(family, sort, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
    if sort == SockType::Datagram {
        deepen(&fd);
    }
    // Errors of routers on the way, which a plain socket keeps to itself.
    if v6 {
        setsockopt(&fd, Ipv6RecvErr, &true)?;
    } else {
        setsockopt(&fd, Ipv4RecvErr, &true)?;
    }
    if dont_fragment {
        sys::set_dont_fragment(fd.as_fd(), v6)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    }
    if source.is_some() || source_port != 0 {
        setsockopt(&fd, ReuseAddr, &true)?;
        let any = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let port = if kind == Kind::Icmp { 0 } else { source_port };
        let address = SocketAddr::new(source.unwrap_or(any), port);
        bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    }
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, port))) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(errno) => Err(errno),
    }
}

/// Gives a datagram socket a queue that outlasts a busy machine's scheduling, as far as allowed: what the lab's
/// own ends lose would be blamed on the network.
pub(crate) fn deepen(fd: &OwnedFd) {
    const QUEUE: usize = 8 << 20;
    let _ = setsockopt(fd, RcvBufForce, &QUEUE).or_else(|_| setsockopt(fd, RcvBuf, &QUEUE));
}

/// An echo request; the kernel fills in identifier and checksum.
pub(crate) fn echo_request(to: IpAddr, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if to.is_ipv6() { 128 } else { 8 };
    let [high, low] = sequence.to_be_bytes();
    let mut message = vec![kind, 0, 0, 0, 0, 0, high, low];
    message.extend_from_slice(payload);
    message
}

fn from_errno(errno: Errno) -> Failure {
    match errno {
        Errno::ECONNREFUSED | Errno::ECONNRESET => Failure::Refused,
        Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EHOSTDOWN => {
            Failure::Unreachable(errno.desc().to_owned())
        }
        Errno::EMSGSIZE => Failure::TooBig,
        Errno::ETIMEDOUT => Failure::Timeout,
        Errno::EPERM => Failure::Local("the namespace's own firewall dropped it (EPERM)".to_owned()),
        other => Failure::Local(other.to_string()),
    }
}
