//! What no policy takes from a node: so that nobody locks themselves out.

use std::collections::BTreeSet;

use crate::model::Direction;
use crate::protocol::Protocol;

/// Ports that a protected node always answers on, and always reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailSafe {
    /// Its own.
    pub inbound: BTreeSet<(Protocol, u16)>,
    /// Others'.
    pub outbound: BTreeSet<(Protocol, u16)>,
}

impl FailSafe {
    /// None at all.
    pub fn none() -> Self {
        Self { inbound: BTreeSet::new(), outbound: BTreeSet::new() }
    }

    /// Whether a flow of a node's, seen from it in this direction, is among them.
    pub fn holds(&self, direction: Direction, protocol: Protocol, port: u16) -> bool {
        let ports = match direction {
            Direction::Ingress => &self.inbound,
            Direction::Egress => &self.outbound,
        };
        ports.contains(&(protocol, port))
    }
}

/// As Calico has it: SSH, DHCP, BGP, etcd, Typha, the API server (Felix' `FailsafeInboundHostPorts`, `FailsafeOutboundHostPorts`); and
/// DNS outbound.
impl Default for FailSafe {
    fn default() -> Self {
        let (tcp, udp) = (|port| (Protocol::TCP, port), |port| (Protocol::UDP, port));
        let both = [179, 2379, 2380, 5473, 6443, 6666, 6667].map(tcp);
        Self {
            inbound: both.into_iter().chain([tcp(22), udp(68)]).collect(),
            outbound: both.into_iter().chain([udp(53), udp(67)]).collect(),
        }
    }
}
