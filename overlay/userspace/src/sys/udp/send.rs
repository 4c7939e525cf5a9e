//! Sending batches: several messages per system call, several datagrams per message.
#![allow(unsafe_code)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use super::address::{self, Storage};
use super::control::{self, Control};
use super::pair::{Socket, UdpPair};
use super::refusals::Refusals;
use super::runs::Runs;
use crate::peer::Endpoint;
use crate::sys::check;

// Messages per system call.
const MESSAGES: usize = 128;

/// Datagrams that wait for being sent together, in memory allocated once.
///
/// Those to one endpoint (both its addresses) that follow each other and have one length, the last perhaps a shorter
/// one, leave as one message where the kernel can split it: up to 64 datagrams and 65,487 bytes.
pub struct SendBatch {
    runs: Runs,
    refusals: Refusals,
    messages: Vec<Message>,
    addresses: Vec<Storage>,
    controls: Vec<Control>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

// SAFETY: the raw pointers are to memory that the batch owns, and are set anew before each use.
unsafe impl Send for SendBatch {}

/// How sending a batch went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SendReport {
    /// Datagrams that the system did not take.
    pub failed: usize,
    /// Those of our addresses that answers were to leave by and that no longer work.
    pub lost_addresses: Vec<IpAddr>,
    /// Whether the system would not split a message, so that its datagrams left one by one. That is known from now on:
    /// for a minute and this destination, or for good and this socket (see [`UdpPair::features`]).
    pub gso_refused: bool,
}

// Where sending has got to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    run: usize,
    datagram: usize,
}

// What a header stands for: some datagrams of a run, and the address they leave by.
#[derive(Clone, Copy, Debug)]
struct Message {
    at: Position,
    count: usize,
    local: Option<IpAddr>,
}

// What the headers are made from.
struct Plan<'a> {
    v6: bool,
    gso: bool,
    now: Instant,
    lost: &'a [IpAddr],
}

enum After {
    Go(Position),
    Full,
}

impl SendBatch {
    /// An empty batch.
    pub fn new() -> Self {
        // SAFETY: all-zero iovec and mmsghdr are valid.
        let (vector, header): (libc::iovec, libc::mmsghdr) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            runs: Runs::new(),
            refusals: Refusals::default(),
            messages: Vec::with_capacity(MESSAGES),
            addresses: vec![address::zeroed(); MESSAGES],
            controls: vec![Control::default(); MESSAGES],
            vectors: vec![vector; MESSAGES],
            headers: vec![header; MESSAGES],
        }
    }

    /// Whether there is room for one more datagram of `length` bytes; there always is in an empty batch, for whatever
    /// fits into a datagram. Otherwise the batch has to be sent first.
    pub fn has_room(&self, length: usize) -> bool {
        self.runs.has_room(length)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.runs.runs().is_empty()
    }

    /// `length` bytes for the next datagram: the same ones with their content until it is pushed. Fewer if there is
    /// no room.
    pub fn space(&mut self, length: usize) -> &mut [u8] {
        self.runs.space(length)
    }

    /// The first `length` bytes of the space are a datagram for `to`. Without room it is dropped.
    pub fn push(&mut self, to: &Endpoint, length: usize) {
        self.runs.push(to, length);
    }

    /// Sends all that waits, in order to each destination. Waits a little where the system's buffers are full.
    pub fn send(&mut self, sockets: &UdpPair, now: Instant) -> SendReport {
        self.send_through(sockets, now, transmit)
    }

    fn send_through(
        &mut self,
        sockets: &UdpPair,
        now: Instant,
        mut transmit: impl FnMut(BorrowedFd<'_>, &mut [libc::mmsghdr]) -> io::Result<usize>,
    ) -> SendReport {
        let mut report = SendReport::default();
        for v6 in [false, true] {
            match sockets.socket(v6) {
                Some(socket) => self.send_family(socket, v6, now, &mut transmit, &mut report),
                None => report.failed += self.left(Position::default(), v6),
            }
        }
        self.runs.clear();
        report
    }

    fn send_family(
        &mut self,
        socket: &Socket,
        v6: bool,
        now: Instant,
        transmit: &mut impl FnMut(BorrowedFd<'_>, &mut [libc::mmsghdr]) -> io::Result<usize>,
        report: &mut SendReport,
    ) {
        let mut position = Position::default();
        loop {
            let plan = Plan { v6, gso: socket.has_gso(), now, lost: &report.lost_addresses };
            self.plan(position, &plan);
            if self.messages.is_empty() {
                return;
            }
            let after = match transmit(socket.fd(), self.prepare()) {
                Ok(sent) => After::Go(self.behind(sent.clamp(1, self.messages.len()) - 1)),
                Err(error) => self.recover(error, socket, now, transmit, report),
            };
            match after {
                After::Go(to) => position = to,
                // The system has had its time: what cannot leave now is lost, as on any full link.
                After::Full => {
                    report.failed += self.left(position, v6);
                    return;
                }
            }
        }
    }

    /// What to do about the first message, which the system did not take.
    fn recover(
        &mut self,
        mut error: io::Error,
        socket: &Socket,
        now: Instant,
        transmit: &mut impl FnMut(BorrowedFd<'_>, &mut [libc::mmsghdr]) -> io::Result<usize>,
        report: &mut SendReport,
    ) -> After {
        let first = self.messages[0];
        let run = self.runs.runs()[first.at.run];
        if let Some(lost) = first.local.filter(|_| may_be_the_source(&error)) {
            self.messages.truncate(1);
            self.messages[0].local = None;
            match transmit(socket.fd(), self.prepare()) {
                Ok(_) => {
                    if !report.lost_addresses.contains(&lost) {
                        report.lost_addresses.push(lost);
                    }
                    return After::Go(self.behind(0));
                }
                Err(without) => error = without,
            }
        }
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::Interrupted, _) => After::Go(first.at),
            (io::ErrorKind::WouldBlock, _) => After::Full,
            // Once it is known that there is no splitting, what is left of the run is planned as single datagrams.
            (_, Some(code @ (libc::EMSGSIZE | libc::EINVAL))) if first.count > 1 => {
                // Smaller ones may fit where these did not; EINVAL says nothing about that.
                let from = if code == libc::EMSGSIZE { run.segment } else { 0 };
                self.refusals.note(run.to.remote.ip(), from, now);
                report.gso_refused = true;
                After::Go(first.at)
            }
            // The device has no checksum offload (before Linux 6.11), or the path is through IPsec.
            (_, Some(libc::EIO)) if first.count > 1 => {
                socket.give_up_gso();
                report.gso_refused = true;
                After::Go(first.at)
            }
            _ => {
                report.failed += first.count;
                After::Go(self.behind(0))
            }
        }
    }

    /// Decides on the next messages.
    fn plan(&mut self, from: Position, plan: &Plan<'_>) {
        self.messages.clear();
        let mut at = from;
        while let Some(run) = self.runs.runs().get(at.run)
            && self.messages.len() < MESSAGES
        {
            if run.to.remote.is_ipv6() != plan.v6 {
                at = Position { run: at.run + 1, datagram: 0 };
                continue;
            }
            let left = run.count - at.datagram;
            let whole =
                plan.gso && left > 1 && self.refusals.allow(run.to.remote.ip(), run.segment, plan.now);
            let count = if whole { left } else { 1 };
            let local = run.to.local.filter(|local| !plan.lost.contains(local));
            let message = Message { at, count, local };
            self.messages.push(message);
            at = message.end(run.count);
        }
    }

    /// Makes the headers of the messages decided on.
    fn prepare(&mut self) -> &mut [libc::mmsghdr] {
        for (i, message) in self.messages.iter().enumerate() {
            let run = &self.runs.runs()[message.at.run];
            let bytes = self.runs.bytes(run.range(message.at.datagram, message.count));
            // Only ever read from.
            self.vectors[i] =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let name_length = address::put(&mut self.addresses[i], &run.to.remote);
            // The segments of more than one fit into 65,487 bytes.
            let segment = (message.count > 1).then_some(run.segment as u16);
            let control_length = control::put(&mut self.controls[i], message.local, segment);
            let header = &mut self.headers[i].msg_hdr;
            header.msg_name = (&raw mut self.addresses[i]).cast();
            header.msg_namelen = name_length;
            header.msg_iov = &raw mut self.vectors[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[i]).cast();
            header.msg_controllen = control_length as _;
        }
        &mut self.headers[..self.messages.len()]
    }

    fn behind(&self, message: usize) -> Position {
        let message = self.messages[message];
        message.end(self.runs.runs()[message.at.run].count)
    }

    /// How many datagrams of a family are still to be sent.
    fn left(&self, from: Position, v6: bool) -> usize {
        let runs = self.runs.runs().iter().enumerate().skip(from.run);
        runs.filter(|(_, run)| run.to.remote.is_ipv6() == v6)
            .map(|(i, run)| if i == from.run { run.count - from.datagram } else { run.count })
            .sum()
    }
}

impl Message {
    fn end(&self, of: usize) -> Position {
        let datagram = self.at.datagram + self.count;
        if datagram < of {
            Position { run: self.at.run, datagram }
        } else {
            Position { run: self.at.run + 1, datagram: 0 }
        }
    }
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

fn transmit(fd: BorrowedFd<'_>, headers: &mut [libc::mmsghdr]) -> io::Result<usize> {
    // SAFETY: the headers come from `prepare`: each points to its own address, control space and vector, and this to
    // bytes of the batch, which outlive the call.
    let sent = check(unsafe {
        libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), headers.len() as libc::c_uint, 0)
    })?;
    Ok(sent as usize)
}

/// Whether sending may have failed only because the address to leave by is not ours any more, or has no route.
fn may_be_the_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENODEV)
    )
}

#[cfg(test)]
mod tests;
