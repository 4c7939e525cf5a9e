//! The address plan: names and addresses of all nodes and pods, computed from the sites alone.
//!
//! Pods get addresses from their site's prefixes: each node a slice (a /24 or /64 where the prefix has room),
//! of which the second and following host addresses are the pods'. The network address stays free, because
//! an agent takes it as the node's IPv4 mesh address.
//! LANs and uplinks use the ranges set aside for benchmarks and documentation (RFC 2544, RFC 3849), and
//! RFC 1918 addresses behind a NAT, so that they never meet pod prefixes by accident.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::report::count;
use crate::scenario::value::NodeList;
use crate::scenario::{Family, Nat, Site, Underlay};

/// Sites in one scenario.
pub const MAX_SITES: usize = 100;
/// Nodes in one site: a LAN is a /24.
pub const MAX_NODES_PER_SITE: usize = 200;
/// Pods on one node.
pub const MAX_PODS_PER_NODE: u16 = 200;
/// The WireGuard port of every node.
pub const LISTEN_PORT: u16 = 51820;

/// Ranges that pod prefixes may not touch: the underlay lives there.
const UNDERLAY_RANGES: [&str; 3] = ["198.18.0.0/15", "192.168.0.0/16", "2001:db8::/32"];

/// Everything that has a name and an address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// In the order of the scenario.
    pub sites: Vec<SiteLayout>,
}

/// A site's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteLayout {
    /// The site's name.
    pub name: String,
    /// The prefixes that the operator grants to the site.
    pub prefixes: Vec<IpNet>,
    /// The LAN's prefixes; the first host address is the router's.
    pub lan: Vec<IpNet>,
    /// The router's outside addresses with their prefixes.
    pub uplink: Vec<IpNet>,
    /// Bytes.
    pub mtu: u16,
    /// The router's translation.
    pub nat: Nat,
    /// The nodes in order.
    pub nodes: Vec<NodeLayout>,
}

/// A node's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeLayout {
    /// The node's name.
    pub name: String,
    /// Its site's name.
    pub site: String,
    /// Its addresses on the LAN, IPv4 first.
    pub lan: Vec<IpAddr>,
    /// Its slices of the site's prefixes, IPv4 first.
    pub pod_cidrs: Vec<IpNet>,
    /// Its pods.
    pub pods: Vec<PodLayout>,
}

/// A pod's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLayout {
    /// `<node>-pod-<n>`
    pub name: String,
    /// The node that it is on.
    pub node: String,
    /// IPv4 first.
    pub addresses: Vec<IpAddr>,
}

/// The sites cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum LayoutError {
    #[error("there are {0} sites; write 1 to {MAX_SITES}")]
    SiteCount(usize),
    #[error("site `{0}`: {1} nodes; write 1 to {MAX_NODES_PER_SITE}")]
    NodeCount(String, usize),
    #[error("site `{0}`: podsPerNode is {1}; at most {MAX_PODS_PER_NODE}")]
    PodCount(String, u16),
    #[error(
        "`{0}` is no usable name: write 1 to {1} lower-case letters, digits and dashes, starting with a letter"
    )]
    Name(String, usize),
    #[error("the name `{0}` is given twice; every site, node and pod needs its own")]
    Duplicate(String),
    #[error("`{0}` is a word with its own meaning in steps; choose another name")]
    ReservedName(String),
    #[error("site `{0}`: more than one {1} prefix; write at most one of each family")]
    TwoPrefixes(String, &'static str),
    #[error("site `{0}`: prefix {1} has host bits set; write {2}")]
    HostBits(String, IpNet, IpNet),
    #[error("site `{0}`: families lists {1}, but prefixes has no {1} prefix; add one")]
    FamilyWithoutPrefix(String, &'static str),
    #[error("site `{0}`: no pod family is left; give it a prefix and a family")]
    NoFamily(String),
    #[error(
        "site `{site}`: prefix {prefix} is too small for {nodes} nodes with {pods} pods each; \
         use /{enough} or shorter"
    )]
    PrefixTooSmall { site: String, prefix: IpNet, nodes: usize, pods: u16, enough: u8 },
    #[error("site `{0}`: prefix {1} overlaps {2} of site `{3}`; give each site its own")]
    Overlap(String, IpNet, IpNet, String),
    #[error("site `{0}`: prefix {1} overlaps {2}, where the lab's own links live; choose another")]
    OverlapsUnderlay(String, IpNet, IpNet),
    #[error("site `{0}`: prefix {1} is not unicast; choose another")]
    NotUnicast(String, IpNet),
    #[error("site `{0}`: mtu {1} is out of range; write {2} to 9000")]
    Mtu(String, u16, u16),
}

impl Layout {
    /// Lays out the sites.
    ///
    /// # Errors
    /// Every problem found, each with the index of its site (or none for the whole).
    pub fn compute(sites: &[&Site]) -> Result<Self, Vec<(Option<usize>, LayoutError)>> {
        let mut problems = Vec::new();
        if sites.is_empty() || sites.len() > MAX_SITES {
            problems.push((None, LayoutError::SiteCount(sites.len())));
            return Err(problems);
        }
        let mut layouts = Vec::new();
        for (index, site) in sites.iter().enumerate() {
            match lay_out_site(index, site) {
                Ok(layout) => layouts.push((index, layout)),
                Err(error) => problems.push((Some(index), error)),
            }
        }
        problems.extend(duplicates(&layouts));
        problems.extend(overlaps(&layouts));
        if problems.is_empty() {
            Ok(Self { sites: layouts.into_iter().map(|(_, layout)| layout).collect() })
        } else {
            problems.sort_by_key(|(index, _)| *index);
            Err(problems)
        }
    }

    /// How much there is: `2 sites, 3 nodes, 1 pod`.
    pub fn summary(&self) -> String {
        [
            count(self.sites.len(), "site"),
            count(self.nodes().count(), "node"),
            count(self.pods().count(), "pod"),
        ]
        .join(", ")
    }

    /// All nodes, site by site.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeLayout> {
        self.sites.iter().flat_map(|site| &site.nodes)
    }

    /// All pods, node by node.
    pub fn pods(&self) -> impl Iterator<Item = &PodLayout> {
        self.nodes().flat_map(|node| &node.pods)
    }

    /// The site of this name.
    pub fn site(&self, name: &str) -> Option<&SiteLayout> {
        self.sites.iter().find(|site| site.name == name)
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&NodeLayout> {
        self.nodes().find(|node| node.name == name)
    }

    /// The pod of this name.
    pub fn pod(&self, name: &str) -> Option<&PodLayout> {
        self.pods().find(|pod| pod.name == name)
    }
}

fn lay_out_site(index: usize, site: &Site) -> Result<SiteLayout, LayoutError> {
    check_name(&site.name, 20)?;
    let names = match &site.nodes {
        NodeList::Count(count) => (1..=*count).map(|n| format!("{}-{n}", site.name)).collect(),
        NodeList::Names(names) => names.clone(),
    };
    if names.is_empty() || names.len() > MAX_NODES_PER_SITE {
        return Err(LayoutError::NodeCount(site.name.clone(), names.len()));
    }
    if site.pods_per_node > MAX_PODS_PER_NODE {
        return Err(LayoutError::PodCount(site.name.clone(), site.pods_per_node));
    }
    // IPv6 needs 1280 bytes on every link (RFC 8200, section 5).
    let least = if site.underlay == Underlay::Ipv4 { 576 } else { 1280 };
    if site.mtu < least || site.mtu > 9000 {
        return Err(LayoutError::Mtu(site.name.clone(), site.mtu, least));
    }
    let prefixes = prefixes(index, site)?;
    let slices: Vec<(IpNet, u8)> = prefixes
        .iter()
        .filter(|prefix| match &site.families {
            Some(families) => families.contains(&Family::of(prefix.addr())),
            None => true,
        })
        .map(|prefix| Ok((*prefix, slice_length(site, *prefix, names.len())?)))
        .collect::<Result<_, LayoutError>>()?;
    if slices.is_empty() {
        return Err(LayoutError::NoFamily(site.name.clone()));
    }

    let lan = lan_prefixes(index, site);
    let mut nodes = Vec::new();
    for (position, name) in names.into_iter().enumerate() {
        check_name(&name, 40)?;
        let pod_cidrs: Vec<IpNet> =
            slices.iter().map(|(prefix, length)| slice(*prefix, *length, position as u128)).collect();
        let pods = (0..site.pods_per_node)
            .map(|pod| PodLayout {
                name: format!("{name}-pod-{}", pod + 1),
                node: name.clone(),
                addresses: pod_cidrs.iter().map(|cidr| host(*cidr, 2 + u128::from(pod))).collect(),
            })
            .collect();
        nodes.push(NodeLayout {
            site: site.name.clone(),
            lan: lan.iter().map(|lan| host(*lan, 11 + position as u128)).collect(),
            pod_cidrs,
            pods,
            name,
        });
    }
    Ok(SiteLayout {
        name: site.name.clone(),
        prefixes,
        lan,
        uplink: uplinks(index, site),
        mtu: site.mtu,
        nat: site.nat,
        nodes,
    })
}

fn prefixes(index: usize, site: &Site) -> Result<Vec<IpNet>, LayoutError> {
    let number = index as u16 + 1;
    let mut prefixes = match &site.prefixes {
        Some(written) => written.clone(),
        None => vec![net4([10, number as u8, 0, 0], 16), net6([0xfd00, number, 0, 0, 0, 0, 0, 0], 48)],
    };
    prefixes.sort_by_key(|prefix| Family::of(prefix.addr()));
    for pair in prefixes.windows(2) {
        let family = Family::of(pair[0].addr());
        if family == Family::of(pair[1].addr()) {
            return Err(LayoutError::TwoPrefixes(site.name.clone(), family.label()));
        }
    }
    for prefix in &prefixes {
        if prefix.trunc() != *prefix {
            return Err(LayoutError::HostBits(site.name.clone(), *prefix, prefix.trunc()));
        }
        let not_unicast = match prefix {
            IpNet::V4(net) => {
                net.addr().octets()[0] >= 224 || net.addr().octets()[0] == 127 || net.addr().octets()[0] == 0
            }
            IpNet::V6(net) => {
                let first = net.addr().segments()[0];
                first >= 0xfe80 || first == 0
            }
        };
        if not_unicast {
            return Err(LayoutError::NotUnicast(site.name.clone(), *prefix));
        }
        for range in UNDERLAY_RANGES.iter().filter_map(|range| range.parse::<IpNet>().ok()) {
            if range.contains(prefix) || prefix.contains(&range) {
                return Err(LayoutError::OverlapsUnderlay(site.name.clone(), *prefix, range));
            }
        }
    }
    for family in site.families.iter().flatten() {
        if !prefixes.iter().any(|prefix| Family::of(prefix.addr()) == *family) {
            return Err(LayoutError::FamilyWithoutPrefix(site.name.clone(), family.label()));
        }
    }
    Ok(prefixes)
}

/// The prefix length of one node's slice.
fn slice_length(site: &Site, prefix: IpNet, nodes: usize) -> Result<u8, LayoutError> {
    let node_bits = bits_for(nodes as u128);
    // Mesh address, gateway, broadcast and the pods.
    let host_bits = bits_for(u128::from(site.pods_per_node) + 3);
    let (usual, longest) = match prefix {
        IpNet::V4(_) => (24, 32 - host_bits),
        IpNet::V6(_) => (64, 128 - host_bits),
    };
    let shortest = prefix.prefix_len() + node_bits;
    if shortest > longest {
        return Err(LayoutError::PrefixTooSmall {
            site: site.name.clone(),
            prefix,
            nodes,
            pods: site.pods_per_node,
            enough: longest.saturating_sub(node_bits),
        });
    }
    Ok(shortest.max(usual.min(longest)))
}

/// How many bits count to `n`.
fn bits_for(n: u128) -> u8 {
    (128 - n.saturating_sub(1).leading_zeros()) as u8
}

fn slice(prefix: IpNet, length: u8, position: u128) -> IpNet {
    match prefix {
        IpNet::V4(net) => {
            let base = u32::from(net.network()) + ((position as u32) << (32 - length));
            IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(base), length))
        }
        IpNet::V6(net) => {
            let base = u128::from(net.network()) + (position << (128 - length));
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(base), length))
        }
    }
}

/// The `position`-th address of a prefix, counted from its network address.
fn host(prefix: IpNet, position: u128) -> IpAddr {
    match prefix {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + position as u32).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + position).into(),
    }
}

fn net4(octets: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(octets.into(), length))
}

fn net6(segments: [u16; 8], length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(segments.into(), length))
}

fn lan_prefixes(index: usize, site: &Site) -> Vec<IpNet> {
    let number = index as u8 + 1;
    site.underlay
        .families()
        .iter()
        .map(|family| match (family, site.nat) {
            (Family::Ipv4, Nat::None) => net4([198, 18, number, 0], 24),
            (Family::Ipv4, _) => net4([192, 168, number, 0], 24),
            (Family::Ipv6, _) => net6([0x2001, 0xdb8, u16::from(number), 0, 0, 0, 0, 0], 64),
        })
        .collect()
}

fn uplinks(index: usize, site: &Site) -> Vec<IpNet> {
    let number = index as u8 + 1;
    let address = |family: &Family| match family {
        Family::Ipv4 => net4([198, 19, number, 2], 24),
        Family::Ipv6 => net6([0x2001, 0xdb8, 0xffff, u16::from(number), 0, 0, 0, 2], 64),
    };
    site.underlay.families().iter().map(address).collect()
}

fn check_name(name: &str, most: usize) -> Result<(), LayoutError> {
    if matches!(name, "all" | "pods" | "nodes" | "router") {
        return Err(LayoutError::ReservedName(name.to_owned()));
    }
    let good = (1..=most).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if good { Ok(()) } else { Err(LayoutError::Name(name.to_owned(), most)) }
}

fn duplicates(layouts: &[(usize, SiteLayout)]) -> Vec<(Option<usize>, LayoutError)> {
    let mut seen = std::collections::HashSet::new();
    let mut found = Vec::new();
    for (index, site) in layouts {
        let names = std::iter::once(&site.name).chain(
            site.nodes
                .iter()
                .flat_map(|node| std::iter::once(&node.name).chain(node.pods.iter().map(|pod| &pod.name))),
        );
        for name in names {
            if !seen.insert(name.as_str()) {
                found.push((Some(*index), LayoutError::Duplicate(name.clone())));
            }
        }
    }
    found
}

fn overlaps(layouts: &[(usize, SiteLayout)]) -> Vec<(Option<usize>, LayoutError)> {
    let mut found = Vec::new();
    for (position, (index, site)) in layouts.iter().enumerate() {
        for (_, earlier) in &layouts[..position] {
            for ours in &site.prefixes {
                for theirs in &earlier.prefixes {
                    if ours.contains(theirs) || theirs.contains(ours) {
                        let error =
                            LayoutError::Overlap(site.name.clone(), *ours, *theirs, earlier.name.clone());
                        found.push((Some(*index), error));
                    }
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests;
