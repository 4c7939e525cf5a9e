//! The addresses that no DNS answer may open.
//!
//! A policy by names means hosts outside of the cluster. An answer that names an address of the
//! host itself, of the link, of the mesh or of a node would turn such a policy into one about pods
//! and nodes, and its author is whoever owns the zone.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len))
}

const fn v6(first: u16, second: u16, len: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), len))
}

/// Ranges that no host of the Internet or of a company has (RFC 6890). The overlay refuses the same
/// ones as prefixes.
const SPECIAL: [(IpNet, &str); 9] = [
    (v4(0, 0, 0, 0, 8), "is of \"this network\""),
    (v4(127, 0, 0, 0, 8), "is a loopback address"),
    (v4(169, 254, 0, 0, 16), "is link-local, where cloud metadata services live"),
    (v4(192, 0, 0, 0, 24), "is reserved for protocols"),
    (v4(224, 0, 0, 0, 3), "is multicast, broadcast or reserved"),
    (v6(0, 0, 8), "is unspecified, loopback or reserved"),
    (v6(0xfe80, 0, 10), "is link-local"),
    (v6(0xfec0, 0, 10), "is site-local"),
    (v6(0xff00, 0, 8), "is multicast"),
];

/// Prefixes whose addresses hold an IPv4 address: the byte where it begins (RFC 6052, RFC 8215, RFC
/// 3056).
const HOLDING: [(IpNet, usize); 3] = [
    (v6(0x64, 0xff9b, 96), 12),
    (IpNet::V6(Ipv6Net::new_assert(LOCAL_NAT64, 48)), 12),
    (v6(0x2002, 0, 16), 2),
];
const LOCAL_NAT64: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0);

/// Prefixes of the mesh and addresses of nodes, for quick look-ups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Protected {
    // First and last address of each range; they do not overlap.
    v4: Vec<(u128, u128)>,
    v6: Vec<(u128, u128)>,
    nodes: HashSet<IpAddr>,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn joined(nets: impl Iterator<Item = IpNet>) -> Vec<(u128, u128)> {
    let mut all: Vec<_> = nets.map(|net| (number(net.network()), number(net.broadcast()))).collect();
    all.sort_unstable();
    let mut joined: Vec<(u128, u128)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match joined.last_mut() {
            Some((_, end)) if first <= *end => *end = (*end).max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}

impl Protected {
    /// Protects these prefixes of the mesh and these addresses of nodes.
    pub fn of(nets: impl Iterator<Item = IpNet> + Clone, nodes: impl Iterator<Item = IpAddr>) -> Self {
        Self {
            v4: joined(nets.clone().filter(|net| matches!(net, IpNet::V4(_)))),
            v6: joined(nets.filter(|net| matches!(net, IpNet::V6(_)))),
            nodes: nodes.map(|address| address.to_canonical()).collect(),
        }
    }

    /// Why no answer may open this address; `None` where one may.
    pub fn refuses(&self, address: IpAddr) -> Option<&'static str> {
        let address = address.to_canonical();
        // Whoever translates for such an address is to be asked about the address inside.
        if let IpAddr::V6(outer) = address
            && let Some((_, at)) = HOLDING.iter().find(|(net, _)| net.contains(&address))
        {
            let bytes: [u8; 4] = outer.octets().get(*at..at + 4)?.try_into().ok()?;
            return self.refuses(Ipv4Addr::from(bytes).into());
        }
        if let Some((_, why)) = SPECIAL.iter().find(|(net, _)| net.contains(&address)) {
            return Some(why);
        }
        let ranges = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let wanted = number(address);
        let after = ranges.partition_point(|(first, _)| *first <= wanted);
        let range = after.checked_sub(1).and_then(|at| ranges.get(at));
        if range.is_some_and(|(_, last)| wanted <= *last) {
            return Some("is in a prefix of the mesh");
        }
        self.nodes.contains(&address).then_some("is an address of a node")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_and_own_addresses_are_refused() {
        let nets: Vec<IpNet> = ["10.0.0.0/16", "10.0.1.0/24", "10.2.0.0/16", "fd00:1::/48"]
            .iter()
            .map(|net| net.parse().unwrap())
            .collect();
        let node: IpAddr = "203.0.113.5".parse().unwrap();
        let protected = Protected::of(nets.iter().copied(), [node].into_iter());
        for refused in [
            "0.0.0.0",
            "127.0.0.1",
            "169.254.169.254",
            "224.0.0.251",
            "240.0.0.1",
            "255.255.255.255",
            "10.0.0.0",
            "10.0.1.7",
            "10.0.255.255",
            "10.2.3.4",
            "203.0.113.5",
            "::",
            "::1",
            "::10.0.1.7",
            "fe80::1",
            "ff02::fb",
            "fd00:1::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.1.7",
            "::ffff:203.0.113.5",
            "64:ff9b::a00:107",
            "64:ff9b::7f00:1",
            "64:ff9b:1::a00:107",
            "2002:a00:107::1",
            "2002:7f00:1::",
        ] {
            assert!(protected.refuses(refused.parse().unwrap()).is_some(), "{refused}");
        }
        for fine in [
            "192.0.2.1",
            "10.1.0.0",
            "10.3.0.0",
            "9.255.255.255",
            "2001:db8::1",
            "64:ff9b::c000:201",
            "2002:c000:201::1",
            "fd00:2::1",
        ] {
            assert_eq!(protected.refuses(fine.parse().unwrap()), None, "{fine}");
        }
    }
}
