//! The path prober: which of a peer's addresses is alive, how far away it is, how large a packet it carries, and which one
//! to use. Without IO: datagrams, the time and the peers come in, datagrams and decisions go out.
//!
//! Probes are datagrams on the WireGuard port ([`wire`]), so that firewalls and NATs treat them as they treat the tunnel. Each
//! address of a peer is a [line](line::Line) with its own liveness, round-trip time, loss and path MTU ([`pmtu`], RFC 8899). The lines of a
//! peer form a ladder: direct ones first, then WireGuard inside of VXLAN. [`choice`] leaves a rung when it dies, and climbs back when
//! a better one has lived for a while.
//!
//! A probe proves itself by its key alone; what is learned from one, such as an address behind NAT, counts only after
//! a question of ours was answered from there. So a recorded probe that is sent again can at most ask for an answer that is not larger
//! than itself, and those have a rate.

pub mod choice;
mod limit;
pub mod line;
mod pair;
pub mod pmtu;
pub mod prober;
pub mod through;
pub mod wire;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

pub use choice::Decision;
pub use line::{LineReport, Liveness};
pub use prober::{PeerPaths, PeerReport, Prober, Transmit};
pub use through::{Reach, ThroughReport};

/// How packets reach a peer, best first. All but the last are encrypted from node to node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rung {
    /// WireGuard over UDP between the nodes' own addresses.
    Direct,
    /// The same datagrams inside of VXLAN between the nodes.
    Vxlan,
    /// Packets in clear inside of VXLAN: no rung that a pair which can speak WireGuard ever comes to, but the only one of a pair that
    /// cannot and that the operator has exempted.
    Cleartext,
}

impl Rung {
    /// Those that a peer which speaks WireGuard can be reached by, best first.
    pub const ENCRYPTED: [Self; 2] = [Self::Direct, Self::Vxlan];
    /// All, best first.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Vxlan, Self::Cleartext];

    /// Its name, as plan and status tell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Vxlan => "vxlan",
            Self::Cleartext => "cleartext",
        }
    }
}

/// Where an address comes from, the most trusted first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The peer published it.
    Published,
    /// The peer published that others see it there, behind its NAT.
    Reflexive,
    /// Probes or tunnel packets of the peer came from there.
    Learned,
    /// Its address on our VXLAN device.
    Carrier,
}

/// An address at which a peer may be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Where datagrams are sent.
    pub address: SocketAddr,
    /// By which carrier.
    pub rung: Rung,
    /// How it became known.
    pub origin: Origin,
    /// The largest packet that our side can put on this carrier, in bytes of IP.
    pub mtu_most: u16,
}

impl Candidate {
    /// How good it is beside another one, the best first; two of one rank are as good as each other.
    pub fn rank(&self) -> (Rung, Origin) {
        (self.rung, self.origin)
    }
}

/// Bytes of IP and UDP headers before a datagram's payload.
pub fn headers(to: &SocketAddr) -> u16 {
    if to.is_ipv4() { 28 } else { 48 }
}
