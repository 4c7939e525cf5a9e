//! Reachability: echo servers in namespaces and many concurrent probes against them.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::Namespace;
use crate::asking;
pub use crate::echo::{Echo, WHERE_AM_I};

/// What a probe speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// ICMP or ICMPv6 echo; needs no [`Echo`].
    Icmp,
    /// UDP to an [`Echo`] on this port.
    Udp(u16),
    /// TCP to an [`Echo`] on this port.
    Tcp(u16),
}

/// One question: does `to` echo `payload` to `from` in time?
#[derive(Debug, Clone)]
pub struct Probe {
    /// Where the socket is opened.
    pub from: Namespace,
    /// Source address; `None`: the kernel chooses.
    pub source: Option<IpAddr>,
    /// Source port of UDP and TCP; 0: the kernel chooses.
    pub source_port: u16,
    /// Destination.
    pub to: IpAddr,
    /// Protocol and port.
    pub kind: Kind,
    /// Bytes to be echoed.
    pub payload: Vec<u8>,
    /// How long to wait in all.
    pub deadline: Duration,
    /// Sends UDP and ICMP again at this interval until answered, whatever ICMP errors come meanwhile; `None`:
    /// once. TCP connects once.
    pub retry: Option<Duration>,
    /// Sends with DF set and ignores the known path MTU, so that a too small link shows as
    /// [`Failure::TooBig`] or [`Failure::Timeout`]. Without it packets are cut as ordinary sockets have it: DF
    /// is set until a router tells the path MTU, so each direction may lose a packet to learn it; see
    /// [`Probe::retry`].
    pub dont_fragment: bool,
}

/// Why a probe failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// Port unreachable or connection reset.
    #[error("refused")]
    Refused,
    /// No route, or a router or the host said unreachable or prohibited.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// Larger than the path MTU.
    #[error("larger than the path MTU")]
    TooBig,
    /// The echo differed.
    #[error("the echo differs from what was sent")]
    Mismatch,
    /// The probe could not be made: the namespace is gone, or a local error such as a local firewall's.
    #[error("local error: {0}")]
    Local(String),
}

/// A probe that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// From the last send (TCP: from connect) to the full echo.
    pub round_trip: Duration,
    /// Sends it took.
    pub attempts: u32,
}

impl Probe {
    /// A probe of one second, sent once, with a short default payload.
    pub fn new(from: &Namespace, to: IpAddr, kind: Kind) -> Probe {
        Probe {
            from: from.clone(),
            source: None,
            source_port: 0,
            to,
            kind,
            payload: b"netlab probe".to_vec(),
            deadline: Duration::from_secs(1),
            retry: None,
            dont_fragment: false,
        }
    }

    /// Sets the payload.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Probe {
        self.payload = payload.into();
        self
    }

    /// Sets the deadline.
    pub fn deadline(mut self, deadline: Duration) -> Probe {
        self.deadline = deadline;
        self
    }

    /// Sends again at this interval until answered.
    pub fn retry(mut self, interval: Duration) -> Probe {
        self.retry = Some(interval);
        self
    }

    /// Asks. See [`batch`] for many.
    pub fn ask(&self) -> std::result::Result<Answer, Failure> {
        batch(std::slice::from_ref(self)).pop().unwrap_or(Err(Failure::Timeout))
    }
}

/// Asks many concurrently (up to 256 in flight); answers in the order of `probes`.
pub fn batch(probes: &[Probe]) -> Vec<std::result::Result<Answer, Failure>> {
    asking::all(probes)
}

/// ICMP echo, once, with a default payload.
pub fn icmp(from: &Namespace, to: IpAddr, deadline: Duration) -> std::result::Result<Answer, Failure> {
    Probe::new(from, to, Kind::Icmp).deadline(deadline).ask()
}

/// UDP echo, once.
pub fn udp(from: &Namespace, to: SocketAddr, deadline: Duration) -> std::result::Result<Answer, Failure> {
    Probe::new(from, to.ip(), Kind::Udp(to.port())).deadline(deadline).ask()
}

/// TCP connect and echo.
pub fn tcp(from: &Namespace, to: SocketAddr, deadline: Duration) -> std::result::Result<Answer, Failure> {
    Probe::new(from, to.ip(), Kind::Tcp(to.port())).deadline(deadline).ask()
}

/// The address an [`Echo`] at `to` sees a UDP socket of `from` with this source port as (0: any port).
pub fn reflexive(
    from: &Namespace,
    source_port: u16,
    to: SocketAddr,
    deadline: Duration,
) -> std::result::Result<SocketAddr, Failure> {
    let probe = Probe {
        source_port,
        payload: WHERE_AM_I.to_vec(),
        deadline,
        ..Probe::new(from, to.ip(), Kind::Udp(to.port()))
    };
    asking::ask_where(&probe)
}
