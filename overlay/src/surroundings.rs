//! What else on this host decides where packets go: links, routes and rules that are not the mesh's.
//!
//! Everything here is what the kernel says at one moment, read with budgets and judged by others. Only [`Surroundings::outside`]
//! decides something: which interfaces lead to no pod of this node.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

/// The most links that are looked at.
pub const LINKS_MOST: usize = 8_192;
/// The most routes of one family.
pub const ROUTES_MOST: usize = 65_536;
/// The most rules of one family.
pub const RULES_MOST: usize = 4_096;
/// The most other network namespaces that are looked into.
pub const NAMESPACES_MOST: usize = 512;

/// A link of this network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Neighbour {
    /// Its index.
    pub index: u32,
    /// Its name, as the kernel has it.
    pub name: String,
    /// `IFLA_INFO_KIND`; `None` for hardware.
    pub kind: Option<String>,
    /// The bridge, bond or VRF that it belongs to.
    pub master: Option<u32>,
    /// Whether a program of XDP is attached.
    pub xdp: bool,
    /// How many virtual functions the hardware has given away (SR-IOV).
    pub functions: u32,
    /// Its addresses, and whether each is for ever: what the network gave ends by itself.
    pub addresses: Vec<(IpNet, bool)>,
}

/// One way of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The link.
    pub interface: u32,
    /// The next host on it; `None`: the destination itself.
    pub gateway: Option<IpAddr>,
}

/// A route of any table but `local`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// Its table.
    pub table: u32,
    /// Its destinations.
    pub to: IpNet,
    /// Where they are; empty for those that lead nowhere (blackhole, throw).
    pub hops: Vec<Hop>,
    /// Whether it ends by itself: the network said so (a router advertisement).
    pub learnt: bool,
}

/// What a rule does with the packets that it selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Looks into a table.
    Table(u32),
    /// Looks into the table of the VRF that the packet's interface belongs to.
    Vrf,
    /// Goes on at the rule of this priority.
    Goto(u32),
    /// Drops them, or does nothing.
    Nowhere,
}

/// A policy routing rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingRule {
    /// Whether it is of IPv6.
    pub v6: bool,
    /// Its priority: the smallest is asked first.
    pub priority: u32,
    /// What it does.
    pub action: Action,
    /// The sources that it selects; `None`: all.
    pub from: Option<IpNet>,
    /// The destinations that it selects; `None`: all.
    pub to: Option<IpNet>,
    /// Whether it selects by something that few packets have: a mark, a user, a port, a type of service, an output interface.
    pub narrow: bool,
    /// Whether it selects what the rest of it does not.
    pub inverted: bool,
    /// Routes of the table as short as this, or shorter, do not count.
    pub suppress: Option<u32>,
    /// The interface that packets come in by; `None`: any.
    pub iif: Option<String>,
}

/// A link of another network namespace that sends through a link of this one, past all of its hooks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// The link here.
    pub parent: u32,
    /// `macvlan`, `ipvlan` and the like.
    pub kind: String,
    /// Packets that it has sent.
    pub sent: u64,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Links.
    pub links: Vec<Neighbour>,
    /// Routes of both families.
    pub ways: Vec<Way>,
    /// Rules of both families.
    pub rules: Vec<RoutingRule>,
    /// Links of other namespaces, of those that the kernel has a number for.
    pub children: Vec<Child>,
    /// What was more than its budget, in words.
    pub cut: Vec<&'static str>,
}

/// Kinds of links that carry an underlay or another network, and never a pod of this node by its own address.
const CARRIERS: [&str; 16] = [
    "bond",
    "team",
    "vlan",
    "macvlan",
    "macvtap",
    "ipvlan",
    "ipvtap",
    "wireguard",
    "vxlan",
    "geneve",
    "gre",
    "ip6gre",
    "ipip",
    "sit",
    "ip6tnl",
    "xfrm",
];

impl Surroundings {
    /// The link of this index.
    pub fn link(&self, index: u32) -> Option<&Neighbour> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Whether an interface leads to addresses of these prefixes that live on this node.
    ///
    /// A route to some of them, without a gateway or by one of them, has to leave by it. Not counted are what the network gives
    /// (routes and addresses that end by themselves), hardware and what carries an underlay, and interfaces with a gateway beside
    /// these prefixes: there the network could say so.
    pub fn leads_to(&self, link: &Neighbour, own: &BTreeSet<IpNet>) -> bool {
        let Some(kind) = &link.kind else { return false };
        !CARRIERS.contains(&kind.as_str())
            && !self.has_gateway(link, own)
            && self.ways.iter().filter(|way| !way.learnt).any(|way| {
                let inside = own.iter().any(|net| net.contains(&way.to));
                let around = own.iter().any(|net| {
                    way.to.contains(net)
                        && link.addresses.iter().any(|(ip, fixed)| *fixed && net.contains(&ip.addr()))
                });
                (inside || around)
                    && way.hops.iter().any(|hop| {
                        let of_them = |ip: &IpAddr| own.iter().any(|net| net.contains(ip));
                        hop.interface == link.index
                            && hop.gateway.as_ref().is_none_or(|ip| inside && of_them(ip))
                    })
            })
    }

    /// Whether other networks are behind it: a route leaves by it through a host that is none of these, or it is a default route.
    fn has_gateway(&self, link: &Neighbour, own: &BTreeSet<IpNet>) -> bool {
        self.ways.iter().any(|way| {
            way.hops.iter().any(|hop| {
                let foreign = |ip: IpAddr| !own.iter().any(|net| net.contains(&ip)) && !is_of_link(ip);
                hop.interface == link.index && (way.to.prefix_len() == 0 || hop.gateway.is_some_and(foreign))
            })
        })
    }

    /// The names of the interfaces that lead to no pod of this node: hardware, what carries an underlay, what has a gateway, and what
    /// has an address of another network for ever. All others may, those above all that nobody has seen yet. `own`: this node's
    /// prefixes.
    pub fn outside(&self, own: &BTreeSet<IpNet>) -> BTreeSet<String> {
        let is_outside = |link: &&Neighbour| {
            let carries = link.kind.as_ref().is_none_or(|kind| CARRIERS.contains(&kind.as_str()));
            let elsewhere = |(net, fixed): &(IpNet, bool)| {
                let ip = net.addr();
                *fixed && !ip.is_loopback() && !is_of_link(ip) && !own.iter().any(|own| own.contains(&ip))
            };
            link.name != "lo"
                && !self.leads_to(link, own)
                && (carries || self.has_gateway(link, own) || link.addresses.iter().any(elsewhere))
        };
        self.links.iter().filter(is_outside).map(|link| link.name.clone()).collect()
    }
}

fn is_of_link(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
#[path = "surroundings/tests.rs"]
mod tests;
