//! Questions about sets of IP prefixes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// First and last address of a prefix on one line for both families, IPv4 before IPv6.
fn span(net: &IpNet) -> (u8, u128, u128) {
    match net {
        IpNet::V4(net) => (4, u128::from(u32::from(net.network())), u128::from(u32::from(net.broadcast()))),
        IpNet::V6(net) => (6, u128::from(net.network()), u128::from(net.broadcast())),
    }
}

/// Whether two prefixes share an address.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// Reports whether a prefix is one of these, or lies inside of one.
pub fn within(net: &IpNet, wide: &BTreeSet<IpNet>) -> bool {
    (0..=net.prefix_len())
        .any(|length| IpNet::new(net.addr(), length).is_ok_and(|outer| wide.contains(&outer.trunc())))
}

/// Prefixes with their owners, ordered so that overlaps and lookups need no pairwise comparison.
#[derive(Debug, Clone)]
pub struct PrefixIndex<T> {
    /// Sorted by family, first address, then widest first.
    entries: Vec<(IpNet, T)>,
    /// `widest[i]`: of all entries up to `i` the one that reaches furthest.
    widest: Vec<usize>,
}

impl<T> PrefixIndex<T> {
    /// An index over these prefixes.
    pub fn new(entries: impl IntoIterator<Item = (IpNet, T)>) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by_key(|(net, _)| {
            let (family, first, _) = span(net);
            (family, first, net.prefix_len())
        });
        let mut widest: Vec<usize> = Vec::with_capacity(entries.len());
        for (i, (net, _)) in entries.iter().enumerate() {
            let (family, _, last) = span(net);
            let best = widest.last().copied().filter(|&w| {
                let (f, _, l) = span(&entries[w].0);
                f == family && l >= last
            });
            widest.push(best.unwrap_or(i));
        }
        Self { entries, widest }
    }

    /// Every pair of entries that share an address: each entry with the one that holds it.
    pub fn overlaps(&self) -> impl Iterator<Item = (&(IpNet, T), &(IpNet, T))> {
        (1..self.entries.len()).filter_map(move |i| {
            let (inner, outer) = (&self.entries[i], &self.entries[self.widest[i - 1]]);
            outer.0.contains(&inner.0).then_some((outer, inner))
        })
    }

    /// Some entry that holds this address.
    pub fn holding(&self, ip: IpAddr) -> Option<&(IpNet, T)> {
        let wanted = span(&IpNet::from(ip));
        let after = self.entries.partition_point(|(net, _)| {
            let (family, first, _) = span(net);
            (family, first) <= (wanted.0, wanted.1)
        });
        let best = &self.entries[*self.widest.get(after.checked_sub(1)?)?];
        best.0.contains(&ip).then_some(best)
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), len))
}

const fn v6(first: u16, len: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), len))
}

/// Ranges that no site can own, with the reason (RFC 6890).
const SPECIAL: [(IpNet, &str); 7] = [
    (v4(0, 0, 0, 0, 8), "\"this network\" addresses"),
    (v4(127, 0, 0, 0, 8), "loopback addresses"),
    (v4(169, 254, 0, 0, 16), "link-local addresses (cloud metadata services live there)"),
    (v4(224, 0, 0, 0, 3), "multicast and reserved addresses"),
    (v6(0, 8), "unspecified, loopback and mapped addresses"),
    (v6(0xfe80, 10), "link-local addresses"),
    (v6(0xff00, 8), "multicast addresses"),
];

/// Why no site may hold this prefix, if so: too wide (a default route in disguise) or special by RFC 6890.
pub fn forbidden(net: &IpNet) -> Option<String> {
    let least = match net {
        IpNet::V4(_) => 8,
        IpNet::V6(_) => 16,
    };
    if net.prefix_len() < least {
        return Some(format!("it is wider than /{least}"));
    }
    let special = SPECIAL.iter().find(|(range, _)| overlap(range, net));
    special.map(|(range, what)| format!("it holds {what} ({range})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (0u32..4096, 16u8..=32).prop_map(|(a, l)| Ipv4Net::new_assert((a << 18).into(), l).trunc());
        let v6 = (0u128..64, 4u8..=64).prop_map(|(a, l)| Ipv6Net::new_assert((a << 66).into(), l).trunc());
        prop_oneof![v4.prop_map(IpNet::V4), v6.prop_map(IpNet::V6)]
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_pairwise_comparison(nets in prop::collection::vec(net(), 0..24), probe in net()) {
            let index = PrefixIndex::new(nets.iter().copied().enumerate().map(|(i, n)| (n, i)));
            let mut involved: Vec<usize> =
                index.overlaps().flat_map(|(a, b)| [a.1, b.1]).collect();
            involved.sort_unstable();
            involved.dedup();
            // Whoever lies inside another is found; the outermost of each nest is found as the holder.
            for (i, a) in nets.iter().enumerate() {
                let inside = nets.iter().enumerate().any(|(j, b)| i != j && b.contains(a));
                if inside {
                    prop_assert!(involved.contains(&i) , "{a} lies inside another and is not reported");
                }
            }
            for &i in &involved {
                prop_assert!(nets.iter().enumerate().any(|(j, b)| j != i && overlap(&nets[i], b)));
            }
            let ip = probe.addr();
            prop_assert_eq!(index.holding(ip).is_some(), nets.iter().any(|n| n.contains(&ip)));
        }
    }

    #[test]
    fn the_default_route_and_special_ranges_are_forbidden() {
        for text in [
            "0.0.0.0/0",
            "128.0.0.0/1",
            "::/0",
            "2000::/3",
            "127.0.0.0/24",
            "169.254.169.254/32",
            "ff00::/16",
        ] {
            assert!(forbidden(&text.parse().unwrap()).is_some(), "{text}");
        }
        for text in ["10.0.0.0/8", "100.64.0.0/10", "203.0.113.0/24", "fd00::/16", "2001:db8::/32"] {
            assert_eq!(forbidden(&text.parse().unwrap()), None, "{text}");
        }
    }
}
