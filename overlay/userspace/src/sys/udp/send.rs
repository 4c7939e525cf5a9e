//! Sending datagrams in runs.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::super::check;
use super::address::to_storage;
use super::headers::{Headers, put_ancillary};
use super::{BATCH, Socket, UdpPair};
use crate::peer::Endpoint;

const ARENA: usize = 256 << 10;
// What the kernel takes in one send: UDP_MAX_SEGMENTS (include/linux/udp.h), and what fits into one IPv6 packet.
const RUN_DATAGRAMS: usize = 64;
const RUN_BYTES: usize = 65_487;
// Destinations to which runs are refused, and for how long that is believed.
const REFUSING: usize = 1024;
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Datagrams that wait for being sent together, in a buffer allocated once.
pub struct SendBatch {
    arena: Box<[u8]>,
    used: usize,
    runs: Vec<Run>,
    headers: Headers,
    refusing: HashMap<SocketAddr, Instant>,
}

// Datagrams to one endpoint, one behind the other, all of one length but for the last, which may be shorter.
#[derive(Clone, Copy, Debug)]
struct Run {
    to: Endpoint,
    at: usize,
    length: usize,
    segment: usize,
    count: usize,
}

impl Run {
    fn takes(&self, to: &Endpoint, length: usize) -> bool {
        self.length == self.segment * self.count
            && length <= self.segment
            && length > 0
            && self.count < RUN_DATAGRAMS
            && self.length + length <= RUN_BYTES
            && self.to == *to
    }

    // Its datagrams, each a run of its own.
    fn apart(self) -> impl Iterator<Item = Run> {
        (0..self.count).map(move |i| {
            let at = self.at + i * self.segment;
            let length = self.segment.min(self.at + self.length - at);
            Run { at, length, segment: length, count: 1, ..self }
        })
    }
}

/// How sending a batch went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// Datagrams that the system did not take.
    pub failed: usize,
    /// Runs that had to be taken apart.
    pub refused_runs: usize,
    /// Those of our addresses that answers were to leave by and that no longer work.
    pub lost_addresses: Vec<IpAddr>,
}

enum Outcome {
    Sent,
    Full,
    Failed,
}

impl SendBatch {
    /// An empty batch. Memory is used only as far as datagrams fill it.
    pub fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into(),
            used: 0,
            runs: Vec::with_capacity(BATCH * RUN_DATAGRAMS),
            headers: Headers::new(),
            refusing: HashMap::new(),
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether there is space for a datagram of this many bytes before the batch has to be sent.
    pub fn has_room(&self, length: usize) -> bool {
        self.used + length <= ARENA && self.runs.len() < self.runs.capacity()
    }

    /// The next datagram's space: as many bytes, or fewer if there is no room.
    pub fn space(&mut self, length: usize) -> &mut [u8] {
        let end = (self.used + length).min(ARENA);
        &mut self.arena[self.used..end]
    }

    /// The first `length` bytes of the space are a datagram for `to`.
    pub fn push(&mut self, to: &Endpoint, length: usize) {
        let length = length.min(ARENA - self.used);
        let full = self.runs.len() == self.runs.capacity();
        match self.runs.last_mut() {
            Some(run) if run.takes(to, length) => {
                run.length += length;
                run.count += 1;
            }
            _ if full => return,
            _ => self.runs.push(Run { to: *to, at: self.used, length, segment: length, count: 1 }),
        }
        self.used += length;
    }

    /// Sends all that waits, in order. Waits a little where the system's buffers are full.
    pub fn send(&mut self, sockets: &UdpPair, now: Instant) -> SendReport {
        let mut report = SendReport::default();
        let mut runs = std::mem::take(&mut self.runs);
        if runs.iter().any(|run| run.count > 1 && !self.may_segment(sockets, run, now)) {
            runs = self.taken_apart(runs, sockets, now);
        }
        // By family, IPv6 second: the socket had its time and took nothing more.
        let mut full = [false; 2];
        let mut rest = &runs[..];
        while let Some(first) = rest.first() {
            let v6 = first.to.remote.is_ipv6();
            let same = rest.iter().take_while(|run| run.to.remote.is_ipv6() == v6).count();
            let (now_these, later) = rest.split_at(same);
            rest = later;
            match sockets.for_remote(&first.to.remote) {
                Some(socket) if !full[usize::from(v6)] => {
                    full[usize::from(v6)] = self.send_runs(socket, now_these, now, &mut report);
                }
                _ => report.failed += datagrams(now_these),
            }
        }
        runs.clear();
        self.runs = runs;
        self.used = 0;
        report
    }

    fn may_segment(&mut self, sockets: &UdpPair, run: &Run, now: Instant) -> bool {
        if !sockets.for_remote(&run.to.remote).is_some_and(Socket::has_gso) {
            return false;
        }
        match self.refusing.get(&run.to.remote) {
            Some(since) if now.saturating_duration_since(*since) < REFUSED_FOR => false,
            Some(_) => {
                self.refusing.remove(&run.to.remote);
                true
            }
            None => true,
        }
    }

    #[cold]
    fn taken_apart(&mut self, mut runs: Vec<Run>, sockets: &UdpPair, now: Instant) -> Vec<Run> {
        let whole = runs.clone();
        runs.clear();
        for run in whole {
            if run.count > 1 && !self.may_segment(sockets, &run, now) {
                runs.extend(run.apart());
            } else {
                runs.push(run);
            }
        }
        runs
    }

    /// Returns whether the socket is full.
    fn send_runs(&mut self, socket: &Socket, runs: &[Run], now: Instant, report: &mut SendReport) -> bool {
        let mut rest = runs;
        while let Some(first) = rest.first() {
            let some = &rest[..rest.len().min(BATCH)];
            match self.send_some(socket, some, true) {
                Ok(sent) => rest = &rest[sent.clamp(1, some.len())..],
                Err(error) => match self.send_hard(socket, first, &error, now, report) {
                    Outcome::Sent => rest = &rest[1..],
                    Outcome::Failed => {
                        report.failed += first.count;
                        rest = &rest[1..];
                    }
                    // The system has had its time: what cannot leave now is lost, as on any full link.
                    Outcome::Full => {
                        report.failed += datagrams(rest);
                        return true;
                    }
                },
            }
        }
        false
    }

    // The first of several runs did not leave. It may in another way.
    #[cold]
    fn send_hard(
        &mut self,
        socket: &Socket,
        run: &Run,
        error: &io::Error,
        now: Instant,
        report: &mut SendReport,
    ) -> Outcome {
        if error.kind() == io::ErrorKind::WouldBlock {
            return Outcome::Full;
        }
        if error.kind() == io::ErrorKind::Interrupted {
            let again = self.send_some(socket, std::slice::from_ref(run), true);
            return match again {
                Ok(_) => Outcome::Sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Outcome::Failed,
                Err(error) => self.send_hard(socket, run, &error, now, report),
            };
        }
        if let Some(lost) = run.to.local
            && may_be_the_source(error)
            && self.send_some(socket, std::slice::from_ref(run), false).is_ok()
        {
            if !report.lost_addresses.contains(&lost) {
                report.lost_addresses.push(lost);
            }
            return Outcome::Sent;
        }
        if run.count == 1 {
            return Outcome::Failed;
        }
        match error.raw_os_error() {
            // Older kernels, on devices that do not complete checksums.
            Some(libc::EIO) => socket.give_up_gso(),
            // The datagrams are larger than the link's MTU: the kernel fragments single ones, but no runs.
            Some(libc::EMSGSIZE | libc::EINVAL) => self.remember(run.to.remote, now),
            _ => return Outcome::Failed,
        }
        report.refused_runs += 1;
        for single in run.apart() {
            match self.send_some(socket, std::slice::from_ref(&single), true) {
                Ok(_) => {}
                Err(error) => match self.send_hard(socket, &single, &error, now, report) {
                    Outcome::Sent => {}
                    _ => report.failed += 1,
                },
            }
        }
        Outcome::Sent
    }

    fn remember(&mut self, remote: SocketAddr, now: Instant) {
        if self.refusing.len() >= REFUSING {
            self.refusing.clear();
        }
        self.refusing.insert(remote, now);
    }

    fn send_some(&mut self, socket: &Socket, runs: &[Run], with_local: bool) -> io::Result<usize> {
        for (i, run) in runs.iter().enumerate() {
            let bytes = &mut self.arena[run.at..run.at + run.length];
            let (address, address_length) = to_storage(&run.to.remote);
            self.headers.addresses[i] = address;
            let header = self.headers.prepare(i, bytes);
            header.msg_namelen = address_length;
            let segment = (run.count > 1).then_some(run.segment as u16);
            put_ancillary(header, run.to.local.filter(|_| with_local), segment);
        }
        // SAFETY: each header points to its own address, control space and buffer, which outlive the call.
        let sent = check(unsafe {
            libc::sendmmsg(
                socket.fd.as_raw_fd(),
                self.headers.headers.as_mut_ptr(),
                runs.len() as libc::c_uint,
                0,
            )
        })?;
        Ok(sent as usize)
    }
}

fn datagrams(runs: &[Run]) -> usize {
    runs.iter().map(|run| run.count).sum()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use std::net::Ipv4Addr;

    #[test]
    fn an_address_that_is_not_ours_is_named_once_and_the_datagrams_leave_all_the_same() {
        let sockets = UdpPair::bind(0, 0, Features::ALL).unwrap();
        let remote = SocketAddr::from((Ipv4Addr::LOCALHOST, sockets.port()));
        let (lost, good) = (IpAddr::from([203, 0, 113, 1]), IpAddr::from([127, 0, 0, 1]));
        let mut batch = SendBatch::new();
        for local in [lost, good, lost] {
            batch.push(&Endpoint { remote, local: Some(local) }, 10);
        }
        let report = batch.send(&sockets, Instant::now());
        assert_eq!(report, SendReport { lost_addresses: vec![lost], ..SendReport::default() });
    }
}
