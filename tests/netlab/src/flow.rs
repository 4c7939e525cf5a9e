//! A constant-rate stream of numbered echo requests, for counting what a change loses.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::time::TimeSpec;

use crate::asking::{ECHO_HEADER, echo_request, open};
use crate::namespace::lock;
use crate::probe::Kind;
use crate::{Error, Namespace, Result};

/// What to send.
#[derive(Debug, Clone)]
pub struct FlowSpec {
    /// Destination.
    pub to: IpAddr,
    /// [`Kind::Udp`] (needs an [`crate::probe::Echo`] there) or [`Kind::Icmp`].
    pub kind: Kind,
    /// Requests per second, 1 to 100,000.
    pub rate: u32,
    /// Follows the 8-byte sequence number in every request.
    pub payload: Vec<u8>,
}

/// Counters of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowReport {
    /// Requests sent.
    pub sent: u64,
    /// Distinct requests answered.
    pub received: u64,
    /// Requests sent and not answered, `sent - received`.
    pub lost: u64,
    /// Further answers to requests already answered.
    pub duplicates: u64,
    /// Sends the kernel refused (counted in `sent` and `lost`).
    pub send_errors: u64,
    /// Longest time between two consecutive answers, from the first request to the last.
    pub max_gap: Duration,
    /// Largest round trip.
    pub max_round_trip: Duration,
    /// From first to last request.
    pub elapsed: Duration,
}

/// A running flow; a thread. Dropping it stops it.
#[derive(Debug)]
pub struct Flow {
    bell: Arc<EventFd>,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts a flow in a namespace.
pub fn start(from: &Namespace, spec: FlowSpec) -> Result<Flow> {
    let what = format!("start a flow from namespace {} to {}", from.name(), spec.to);
    if matches!(spec.kind, Kind::Tcp(_)) || !(1..=100_000).contains(&spec.rate) {
        return Err(Error::spec("flow", "it needs UDP or ICMP and a rate of 1 to 100000 a second"));
    }
    let (to, kind) = (spec.to, spec.kind);
    let socket =
        from.inline(move || open(to, kind, (None, 0), false))?.map_err(Error::errno(what.clone()))?;
    let bell =
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(Error::errno(&what))?;
    let bell = Arc::new(bell);
    let state = Arc::new(Mutex::new(State::default()));
    let sender = Sender { socket, spec, bell: Arc::clone(&bell), state: Arc::clone(&state) };
    let thread = std::thread::Builder::new()
        .name("flow".into())
        .spawn(move || sender.run())
        .map_err(Error::system(what))?;
    Ok(Flow { bell, state, thread: Some(thread) })
}

impl Flow {
    /// Counters so far; requests still under way count as lost.
    pub fn snapshot(&self) -> FlowReport {
        lock(&self.state).report()
    }

    /// Stops sending, waits until every request was answered or `grace` passed, and reports.
    pub fn stop(mut self, grace: Duration) -> Result<FlowReport> {
        lock(&self.state).stop_by = Some(Instant::now() + grace);
        self.end()?;
        Ok(lock(&self.state).report())
    }

    fn end(&mut self) -> Result<()> {
        let _ = self.bell.write(1);
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Error::Panicked { namespace: "flow".into() }),
            _ => Ok(()),
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        lock(&self.state).stop_by.get_or_insert_with(Instant::now);
        let _ = self.end();
    }
}

/// What was sent and answered; time comes in as an argument.
#[derive(Debug, Default)]
struct State {
    /// By sequence number: when sent, and whether answered.
    requests: Vec<(Instant, bool)>,
    received: u64,
    duplicates: u64,
    send_errors: u64,
    last_answer: Option<Instant>,
    max_gap: Duration,
    max_round_trip: Duration,
    stop_by: Option<Instant>,
}

impl State {
    fn sent(&mut self, now: Instant) -> u64 {
        self.requests.push((now, false));
        self.requests.len() as u64 - 1
    }

    fn answered(&mut self, sequence: u64, now: Instant) {
        let request = usize::try_from(sequence).ok().and_then(|index| self.requests.get_mut(index));
        let Some((sent, answered)) = request else { return };
        if std::mem::replace(answered, true) {
            self.duplicates += 1;
            return;
        }
        self.received += 1;
        self.max_round_trip = self.max_round_trip.max(now.saturating_duration_since(*sent));
        let before = self.last_answer.or(self.requests.first().map(|first| first.0)).unwrap_or(now);
        self.max_gap = self.max_gap.max(now.saturating_duration_since(before));
        self.last_answer = Some(now);
    }

    fn complete(&self) -> bool {
        self.received == self.requests.len() as u64
    }

    fn report(&self) -> FlowReport {
        let sent = self.requests.len() as u64;
        let (first, last) = (self.requests.first(), self.requests.last());
        let span = |from: Option<Instant>| match (from, last) {
            (Some(from), Some(last)) => last.0.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        let start = first.map(|first| first.0);
        FlowReport {
            sent,
            received: self.received,
            lost: sent - self.received,
            duplicates: self.duplicates,
            send_errors: self.send_errors,
            // An outage that lasts to the end is a gap too.
            max_gap: self.max_gap.max(span(self.last_answer.or(start))),
            max_round_trip: self.max_round_trip,
            elapsed: span(start),
        }
    }
}

struct Sender {
    socket: OwnedFd,
    spec: FlowSpec,
    bell: Arc<EventFd>,
    state: Arc<Mutex<State>>,
}

impl Sender {
    fn run(self) {
        let interval = Duration::from_secs(1) / self.spec.rate;
        let start = Instant::now();
        let mut due = start;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let stop_by = lock(&self.state).stop_by;
            let now = Instant::now();
            let wake = match stop_by {
                None => {
                    // A late wake-up sends what it owes, so that the rate holds.
                    while due <= now {
                        self.send();
                        due += interval;
                    }
                    due
                }
                Some(stop_by) if now >= stop_by || lock(&self.state).complete() => return,
                Some(stop_by) => stop_by,
            };
            let wait = TimeSpec::from(wake.saturating_duration_since(Instant::now()));
            let mut ready = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
            ];
            let _ = ppoll(&mut ready, Some(wait), None);
            let _ = self.bell.read();
            self.receive(&mut buffer);
        }
    }

    fn send(&self) {
        let sequence = lock(&self.state).sent(Instant::now());
        let mut message = sequence.to_be_bytes().to_vec();
        message.extend_from_slice(&self.spec.payload);
        if self.spec.kind == Kind::Icmp {
            message = echo_request(self.spec.to, sequence as u16, &message);
        }
        let send = || send(self.socket.as_raw_fd(), &message, MsgFlags::MSG_DONTWAIT);
        // A pending ICMP error makes one send fail without sending; the next one goes out.
        let failed = send().is_err() && send().is_err();
        if failed {
            lock(&self.state).send_errors += 1;
        }
    }

    fn receive(&self, buffer: &mut [u8]) {
        let header = if self.spec.kind == Kind::Icmp { ECHO_HEADER } else { 0 };
        let fd = self.socket.as_raw_fd();
        while recv(fd, buffer, MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT).is_ok() {}
        loop {
            match recv(fd, buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let answer = buffer.get(header..length).unwrap_or_default();
                    let Some((sequence, payload)) = answer.split_first_chunk::<8>() else { continue };
                    if payload == self.spec.payload {
                        lock(&self.state).answered(u64::from_be_bytes(*sequence), Instant::now());
                    }
                }
                Err(Errno::EAGAIN) => return,
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_losses_and_duplicates_are_counted() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut state = State::default();
        for ms in [0, 10, 20, 30] {
            state.sent(at(ms));
        }
        state.answered(0, at(1));
        state.answered(2, at(25));
        state.answered(2, at(26));
        state.answered(99, at(27));
        let report = state.report();
        assert_eq!((report.sent, report.received, report.lost, report.duplicates), (4, 2, 2, 1));
        assert_eq!(report.max_gap, Duration::from_millis(24));
        assert_eq!(report.max_round_trip, Duration::from_millis(5));
        assert_eq!(report.elapsed, Duration::from_millis(30));
    }

    #[test]
    fn an_outage_to_the_end_is_a_gap() {
        let start = Instant::now();
        let mut state = State::default();
        state.sent(start);
        state.sent(start + Duration::from_secs(2));
        assert_eq!(state.report().max_gap, Duration::from_secs(2));
    }
}
