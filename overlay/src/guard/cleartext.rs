//! What may travel in clear, to whom and until when: the rules for VXLAN devices without WireGuard inside.
//!
//! The end of an exemption is in the rules themselves (`meta time`), so that it ends with no agent too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::{Slot, TABLE, names};
use crate::local::InterfaceName;

/// The packets in clear that pass. Present wherever VXLAN is spoken, so that those of strangers are counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cleartext {
    /// What this node holds: nothing else passes at its end.
    pub local: BTreeSet<IpNet>,
    /// The VXLAN devices that carry them; none without an exemption.
    pub interfaces: BTreeSet<InterfaceName>,
    /// All addresses of nodes on these devices: probes travel between them.
    pub prefix: Ipv6Net,
    /// The port of probes.
    pub port: u16,
    /// The UDP port of VXLAN.
    pub vxlan_port: u16,
    /// The network identifier of what travels in clear.
    pub vni: u32,
    /// The kernel's indexes of the underlay's interfaces: VXLAN in clear comes in by these, never from a pod or a
    /// tunnel. Empty: they are not known, and any does.
    #[serde(default)]
    pub underlay: BTreeSet<u32>,
    /// Who is exempt, by the end of the exemption: seconds since 1970.
    pub exempt: BTreeMap<i64, Exempt>,
}

/// Peers whose exemptions end together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exempt {
    /// All that they hold.
    pub prefixes: BTreeSet<IpNet>,
    /// Their underlay addresses.
    pub remotes: BTreeSet<IpNet>,
}

/// The members of a set that are of one family: nft lists neighbours as one, and refuses a prefix inside of another.
pub(super) fn of_family(nets: &BTreeSet<IpNet>, v6: bool) -> Option<String> {
    let nets = IpNet::aggregate(&nets.iter().copied().collect());
    let members: Vec<_> =
        nets.iter().filter(|net| matches!(net, IpNet::V6(_)) == v6).map(IpNet::to_string).collect();
    (!members.is_empty()).then(|| members.join(", "))
}

pub(super) const FAMILIES: [(&str, bool); 2] = [("ip", false), ("ip6", true)];

impl Cleartext {
    /// The rules of one of the chains `egress` and `ingress` (`add` says which): exempt peers and probes until their end, and
    /// nothing else.
    pub(super) fn inside(&self, add: &str, leaving: bool) -> String {
        let mut text = String::new();
        let Some((&last, _)) = self.exempt.last_key_value().filter(|_| !self.interfaces.is_empty()) else {
            return text;
        };
        let (interface, side) = if leaving { ("oifname", "sport") } else { ("iifname", "dport") };
        let on =
            format!("{add} {interface} {{ {} }}", names(self.interfaces.iter().map(InterfaceName::as_str)));
        for (until, exempt) in &self.exempt {
            for (family, v6) in FAMILIES {
                let (Some(ours), Some(theirs)) =
                    (of_family(&self.local, v6), of_family(&exempt.prefixes, v6))
                else {
                    continue;
                };
                let (from, to) = if leaving { (ours, theirs) } else { (theirs, ours) };
                let _ = writeln!(
                    text,
                    "{on} {family} saddr {{ {from} }} {family} daddr {{ {to} }} meta time < {until} accept"
                );
            }
        }
        let Self { prefix, port, .. } = self;
        let _ = write!(
            text,
            "{on} ip6 saddr {prefix} ip6 daddr {prefix} udp {side} {port} meta time < {last} accept\n\
             {on} counter name cleartext drop\n"
        );
        text
    }

    /// The rules of the chain `outer`: VXLAN in clear from exempt peers until their end, and from nobody else. IPv6 packets are put
    /// together only after it: a first fragment that is too short to tell its network identifier, or its protocol (RFC 7112), is
    /// nobody's.
    pub(super) fn outer(&self, slot: Slot) -> String {
        let add = format!("add rule inet {TABLE} {}", slot.chain("outer"));
        let port = format!("{add} udp dport {}", self.vxlan_port);
        let vxlan = format!("{port} @th,96,24 {}", self.vni);
        let links = self.underlay.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let by = if links.is_empty() { String::new() } else { format!(" iif {{ {links} }}") };
        let from = format!("{add}{by} udp dport {} @th,96,24 {}", self.vxlan_port, self.vni);
        let mut text = String::new();
        for (until, exempt) in &self.exempt {
            for (family, v6) in FAMILIES {
                if let Some(remotes) = of_family(&exempt.remotes, v6) {
                    let _ =
                        writeln!(text, "{from} {family} saddr {{ {remotes} }} meta time < {until} accept");
                }
            }
        }
        let _ = write!(
            text,
            "{vxlan} counter name cleartext drop\n\
             {port} @th,96,24 != {} accept\n\
             {port} exthdr frag exists counter name cleartext drop\n\
             {add} meta l4proto != 255 accept\n\
             {add} exthdr frag exists counter name cleartext drop\n",
            self.vni
        );
        text
    }
}
