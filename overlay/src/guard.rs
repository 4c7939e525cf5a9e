//! The fail-closed guard: mesh prefixes enter and leave this node through mesh interfaces only.
//!
//! It is an nftables table that outlives the agent. It stands before any link comes up and judges packets by
//! address and interface alone, so that no crash, restart or half-done pass puts a mesh packet on the underlay.
//!
//! This node's own prefixes are judged by an allow-list too: they pass interfaces of a kind that leads to
//! pods, and nothing else. Hardware, VLANs, macvlans, tunnels and whatever comes up later are of other kinds.

mod cleartext;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::local::InterfaceName;
pub use cleartext::{Cleartext, Exempt};
use cleartext::{FAMILIES, of_family};

/// The one nftables table that is ours, family `inet`.
pub const TABLE: &str = "sennit";
/// What begins the comment of each chain's first rule; the fingerprint follows.
pub const MARK: &str = "sennit guard ";

/// Name, hook and priority of each chain. After source NAT's priority nothing changes a packet
/// any more; before conntrack's -200 nothing has yet. Segment sizes are clamped where others mangle. VXLAN's outer packets are
/// judged on their way to its socket, when they are whole. What crosses between the tunnel and pods is counted before any firewall of this
/// host judges what it forwards, and behind all of them.
pub(crate) const CHAINS: [(&str, &str, i64); 6] = [
    ("egress", "postrouting", 300),
    ("ingress", "prerouting", -300),
    ("clamp", "forward", -150),
    ("outer", "input", -300),
    ("crossing", "forward", -140),
    ("crossed", "postrouting", 299),
];
/// How many of them, at the end, a guard of before may lack.
pub(crate) const LATE: usize = 3;
/// The counters: drops by place, and packets that crossed between the tunnel and pods.
pub(crate) const COUNTERS: [&str; 6] = ["egress", "ingress", "carrier", "cleartext", "crossing", "crossed"];

/// Which of its two places in the table a guard takes: the next one stands in the other before this one goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// Chains that end in `_a`.
    A,
    /// Chains that end in `_b`.
    B,
}

impl Slot {
    /// Both.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    pub fn other(self) -> Self {
        if self == Self::A { Self::B } else { Self::A }
    }

    /// The name of a chain in this slot.
    pub(crate) fn chain(self, name: &str) -> String {
        format!("{name}_{}", if self == Self::A { 'a' } else { 'b' })
    }
}

/// Kinds of interfaces that lead to pods where the operator names none: pairs, bridges, Open vSwitch ports
/// and netkit devices (`IFLA_INFO_KIND`).
pub const POD_KINDS: [&str; 4] = ["bridge", "netkit", "openvswitch", "veth"];

/// What the guard protects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    /// All prefixes of the mesh, aggregated.
    pub mesh: BTreeSet<IpNet>,
    /// Those of them that live on this node.
    pub local: BTreeSet<IpNet>,
    /// Addresses inside of the mesh's prefixes that are none of its own: what the operator protects.
    pub outside: BTreeSet<IpNet>,
    /// The interfaces that encrypt.
    pub interfaces: BTreeSet<InterfaceName>,
    /// The kinds of interfaces that this node's own prefixes may pass.
    pub pod_kinds: BTreeSet<String>,
    /// The kernel's indexes of the underlay's interfaces. This node's own prefixes do not pass them, whatever
    /// kind they are of.
    pub underlay: BTreeSet<u32>,
    /// The VXLAN devices that carry WireGuard, and nothing else: VXLAN authenticates nobody, so that anyone on the underlay can
    /// put a packet in there.
    pub carriers: Option<Carriers>,
    /// What travels in clear, by the operator's exemption.
    pub cleartext: Option<Cleartext>,
}

/// What may pass the VXLAN devices: UDP between carrier addresses, from or to the WireGuard port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carriers {
    /// Their names.
    pub interfaces: BTreeSet<InterfaceName>,
    /// All carrier addresses.
    pub prefix: Ipv6Net,
    /// Our WireGuard port.
    pub port: u16,
}

/// The rules that count what crosses: the interface that is the tunnel, and a test before it. Postrouting sees what this host itself sends
/// as well; it came in by no interface.
pub(crate) const CROSSING: [(&str, [(&str, &str); 2]); 2] = [
    ("crossing", [("iifname", ""), ("oifname", "")]),
    ("crossed", [("iifname", ""), ("oifname", "iif != 0 ")]),
];

impl Guard {
    /// A short digest of what the guard protects; in the comment of each chain's first rule, so that a restarted
    /// agent knows its own work.
    pub fn fingerprint(&self) -> String {
        digest(&self.rules("", Slot::A, true))
    }

    /// Returns the digest by which an agent of before, which did not count what crosses, knows the same guard.
    pub(crate) fn former_fingerprint(&self) -> String {
        digest(&self.rules("", Slot::A, false))
    }

    /// The guard in a slot, as `nft -f` takes it. It takes nothing away: once it stands, [`render_retirement`] takes
    /// the one in the other slot.
    ///
    /// To replace a guard in a single transaction would not do, although it is atomic by the manual: Linux 6.18
    /// makes the new rules live a moment before the interval sets that they look into, and packets slip out.
    pub fn render(&self, slot: Slot) -> String {
        let mut text = format!("add table inet {TABLE}\n");
        for name in COUNTERS {
            let _ = writeln!(text, "add counter inet {TABLE} {name}");
        }
        for (name, hook, priority) in CHAINS {
            let chain = slot.chain(name);
            let _ = writeln!(
                text,
                "add chain inet {TABLE} {chain} {{ type filter hook {hook} priority {priority}; policy accept; }}"
            );
        }
        text + &self.rules(&self.fingerprint(), slot, true)
    }

    /// As [`Guard::render`], for a table that holds other things than ours: all of it is deleted first.
    pub fn render_anew(&self) -> String {
        render_removal() + &self.render(Slot::A)
    }

    /// Verdicts in the order of their chain: what encrypts, what carries, what is exempt, what is none of ours, what is
    /// local on the underlay, what is local on interfaces of pods, and all else of the mesh, local or not. An empty set
    /// makes no rule. `listing` reads exactly this.
    ///
    /// Segments of TCP connections through the mesh are as small as the route's MTU wants them both ways: the kernel looks
    /// at the route there and at the one back.
    fn rules(&self, mark: &str, slot: Slot, counts: bool) -> String {
        let interfaces = names(self.interfaces.iter().map(InterfaceName::as_str).chain(["lo"]));
        let underlay = self.underlay.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let kinds = names(self.pod_kinds.iter().map(String::as_str));
        let nothing = BTreeSet::new();
        let all: BTreeSet<IpNet> = self.mesh.union(&self.local).copied().collect();
        let mut text = String::new();
        for (name, interface, address) in [("egress", "oifname", "daddr"), ("ingress", "iifname", "saddr")] {
            let add = format!("add rule inet {TABLE} {}", slot.chain(name));
            let _ = writeln!(text, "{add} {interface} {{ {interfaces} }} accept comment \"{MARK}{mark}\"");
            let drop = format!("counter name {name} drop");
            if let Some(Carriers { interfaces, prefix, port }) = &self.carriers {
                let on = format!(
                    "{add} {interface} {{ {} }}",
                    names(interfaces.iter().map(InterfaceName::as_str))
                );
                let side = if name == "egress" { "sport" } else { "dport" };
                let _ = write!(
                    text,
                    "{on} ip6 saddr {prefix} ip6 daddr {prefix} udp {side} {port} accept\n{on} counter name carrier drop\n"
                );
            }
            if let Some(cleartext) = &self.cleartext {
                text.push_str(&cleartext.inside(&add, name == "egress"));
            }
            let side = &interface[..3];
            let on_underlay = format!("{side} {{ {underlay} }} ");
            let of_kind = format!("meta {side}kind {{ {kinds} }} ");
            let kept = if underlay.is_empty() { &nothing } else { &self.local };
            let pods = if kinds.is_empty() { &nothing } else { &self.local };
            for (nets, through, verdict) in [
                (&self.outside, "", "accept"),
                (kept, on_underlay.as_str(), drop.as_str()),
                (pods, of_kind.as_str(), "accept"),
                (&all, "", drop.as_str()),
            ] {
                for (family, v6) in FAMILIES {
                    if let Some(members) = of_family(nets, v6) {
                        let _ = writeln!(text, "{add} {through}{family} {address} {{ {members} }} {verdict}");
                    }
                }
            }
        }
        if let Some(cleartext) = &self.cleartext {
            text.push_str(&cleartext.outer(slot));
        }
        let tunnel = names(self.interfaces.iter().map(InterfaceName::as_str));
        for (name, tests) in CROSSING.into_iter().filter(|_| counts && !tunnel.is_empty()) {
            let add = format!("add rule inet {TABLE} {}", slot.chain(name));
            for (interface, before) in tests {
                let _ = writeln!(text, "{add} {before}{interface} {{ {tunnel} }} counter name {name}");
            }
        }
        let through = self.clamped();
        let through = names(through.iter().map(InterfaceName::as_str));
        for interface in ["iifname", "oifname"].into_iter().filter(|_| !through.is_empty()) {
            let add = format!("add rule inet {TABLE} {}", slot.chain("clamp"));
            let _ = writeln!(
                text,
                "{add} {interface} {{ {through} }} tcp flags syn tcp option maxseg size set rt mtu"
            );
        }
        text
    }
}

impl Guard {
    /// What may travel in clear, and until when (seconds since 1970).
    pub fn exempt(&self) -> impl Iterator<Item = (IpNet, i64)> {
        let all = self.cleartext.iter().flat_map(|cleartext| &cleartext.exempt);
        // As nft lists them.
        let nets = |exempt: &Exempt| IpNet::aggregate(&exempt.prefixes.iter().copied().collect());
        all.flat_map(move |(until, exempt)| nets(exempt).into_iter().map(|net| (net, *until)))
    }

    /// The interfaces at which segment sizes are clamped.
    pub(crate) fn clamped(&self) -> BTreeSet<InterfaceName> {
        let cleartext = self.cleartext.iter().filter(|cleartext| !cleartext.exempt.is_empty());
        self.interfaces.iter().chain(cleartext.flat_map(|cleartext| &cleartext.interfaces)).copied().collect()
    }
}

fn digest(rules: &str) -> String {
    let digest = Sha256::digest(rules);
    digest.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Interface names as the members of an nft set.
fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ")
}

/// The nft commands that take the guard out of a slot.
pub fn render_retirement(slot: Slot) -> String {
    CHAINS.iter().fold(String::new(), |mut text, (name, ..)| {
        let chain = slot.chain(name);
        // One that a guard of before lacked is deleted all the same.
        let _ = writeln!(
            text,
            "add chain inet {TABLE} {chain}\nflush chain inet {TABLE} {chain}\ndelete chain inet {TABLE} {chain}"
        );
        text
    })
}

/// The nft command that removes our table, and nothing else.
pub fn render_removal() -> String {
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(mesh: &[&str]) -> Guard {
        Guard {
            mesh: mesh.iter().map(|n| n.parse().unwrap()).collect(),
            local: BTreeSet::from(["10.1.1.0/24".parse().unwrap()]),
            interfaces: BTreeSet::from(["sennit0".parse().unwrap()]),
            outside: BTreeSet::new(),
            pod_kinds: ["bridge", "veth"].map(str::to_owned).into(),
            underlay: BTreeSet::new(),
            carriers: None,
            cleartext: None,
        }
    }

    #[test]
    fn a_new_guard_takes_nothing_away() {
        let text = guard(&["10.0.0.0/8", "fd00::/16"]).render(Slot::B);
        assert!(!text.contains("delete") && !text.contains("flush"), "{text}");
        assert!(text.lines().all(|line| line.contains("inet sennit")), "{text}");
        assert_eq!(text.matches("drop").count(), 4, "{text}");
        assert!(
            text.contains("egress_b ip daddr { 10.0.0.0/8 } counter name egress drop")
                && text.contains("ingress_b ip6 saddr { fd00::/16 } counter name ingress drop"),
            "{text}"
        );
        assert!(text.contains("oifname { \"sennit0\", \"lo\" } accept"), "{text}");
        assert!(!render_retirement(Slot::A).contains("_b"));
    }

    #[test]
    fn a_guard_of_nothing_has_no_empty_set() {
        let nothing = Guard {
            mesh: BTreeSet::new(),
            local: BTreeSet::new(),
            outside: BTreeSet::new(),
            interfaces: BTreeSet::new(),
            pod_kinds: BTreeSet::new(),
            underlay: BTreeSet::new(),
            carriers: None,
            cleartext: None,
        };
        let text = nothing.render(Slot::A);
        assert!(text.contains("{ \"lo\" }") && !text.contains("{  }"), "{text}");
    }

    #[test]
    fn own_prefixes_pass_interfaces_of_pods_alone() {
        let mut guard = guard(&["10.0.0.0/8"]);
        guard.underlay = BTreeSet::from([2]);
        guard.outside = BTreeSet::from(["10.9.0.1/32".parse().unwrap()]);
        let text = guard.render(Slot::A);
        let egress = [
            "oifname { \"sennit0\", \"lo\" } accept",
            "egress_a ip daddr { 10.9.0.1/32 } accept",
            "egress_a oif { 2 } ip daddr { 10.1.1.0/24 } counter name egress drop",
            "egress_a meta oifkind { \"bridge\", \"veth\" } ip daddr { 10.1.1.0/24 } accept",
            "egress_a ip daddr { 10.0.0.0/8 } counter name egress drop",
        ];
        let places: Vec<_> = egress.iter().map(|rule| text.find(rule).expect(rule)).collect();
        assert!(places.is_sorted(), "{text}");
        let ingress = "ingress_a iif { 2 } ip saddr { 10.1.1.0/24 } counter name ingress drop";
        assert!(text.contains(ingress), "{text}");
        // Own prefixes that lie in none of the mesh's are held back all the same.
        guard.mesh.clear();
        let alone = guard.render(Slot::A);
        assert!(alone.contains("egress_a ip daddr { 10.1.1.0/24 } counter name egress drop"), "{alone}");
        guard.local.clear();
        assert!(!guard.render(Slot::A).contains("oif {"));
    }

    #[test]
    fn a_carrier_passes_wireguard_between_carriers_and_nothing_else() {
        let mut guard = guard(&["10.0.0.0/8"]);
        guard.carriers = Some(Carriers {
            interfaces: BTreeSet::from(["sennitx4".parse().unwrap()]),
            prefix: "fd53::/63".parse().unwrap(),
            port: 51820,
        });
        let text = guard.render(Slot::A);
        for (chain, interface, side) in [("egress_a", "oifname", "sport"), ("ingress_a", "iifname", "dport")]
        {
            let on = format!("{chain} {interface} {{ \"sennitx4\" }}");
            let passes = format!("{on} ip6 saddr fd53::/63 ip6 daddr fd53::/63 udp {side} 51820 accept");
            let drops = format!("{on} counter name carrier drop");
            assert!(text.find(&passes).unwrap() < text.find(&drops).unwrap(), "{text}");
        }
    }

    #[test]
    fn another_prefix_gives_another_fingerprint() {
        assert_eq!(guard(&["10.0.0.0/8"]).fingerprint(), guard(&["10.0.0.0/8"]).fingerprint());
        assert_ne!(guard(&["10.0.0.0/8"]).fingerprint(), guard(&["10.0.0.0/9"]).fingerprint());
    }
}
