//! Cryptokey routing: longest-prefix match from an inner address to whoever owns it.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Prefixes and their owners. A prefix has one owner; inserting it again moves it.
#[derive(Clone)]
pub struct AllowedIps<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }
}

impl<T> AllowedIps<T> {
    /// Gives `prefix` (host bits are ignored) to `owner` and returns who held it before.
    pub fn insert(&mut self, prefix: IpNet, owner: T) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.insert(prefix, owner),
            IpNet::V6(prefix) => self.v6.insert(prefix, owner),
        }
    }

    /// Takes `prefix` away and returns who held it.
    pub fn remove(&mut self, prefix: IpNet) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.remove(&prefix),
            IpNet::V6(prefix) => self.v6.remove(&prefix),
        }
    }

    /// Who holds exactly this prefix.
    pub fn owner(&self, prefix: IpNet) -> Option<&T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.get(&prefix),
            IpNet::V6(prefix) => self.v6.get(&prefix),
        }
    }

    /// The owner of the longest prefix that holds `address`.
    #[inline]
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, owner)| owner),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, owner)| owner),
        }
    }

    /// Forgets all prefixes.
    pub fn clear(&mut self) {
        self.v4.clear();
        self.v6.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins_and_families_do_not_mix() {
        let mut table = AllowedIps::default();
        table.insert(net("0.0.0.0/0"), 'd');
        table.insert(net("10.0.0.0/8"), 'a');
        table.insert(net("10.1.0.0/16"), 'b');
        table.insert(net("10.1.2.3/32"), 'c');
        assert_eq!(table.lookup([10, 1, 2, 3].into()), Some(&'c'));
        assert_eq!(table.lookup([10, 1, 2, 4].into()), Some(&'b'));
        assert_eq!(table.lookup([10, 2, 0, 0].into()), Some(&'a'));
        assert_eq!(table.lookup([192, 0, 2, 1].into()), Some(&'d'));
        assert_eq!(table.lookup("fd00::1".parse().unwrap()), None);
    }

    #[test]
    fn a_prefix_moves_to_its_new_owner() {
        let mut table = AllowedIps::default();
        assert_eq!(table.insert(net("10.0.0.0/24"), 'a'), None);
        assert_eq!(table.insert(net("10.0.0.7/24"), 'b'), Some('a'));
        assert_eq!(table.lookup([10, 0, 0, 1].into()), Some(&'b'));
        assert_eq!(table.remove(net("10.0.0.0/24")), Some('b'));
        assert_eq!(table.lookup([10, 0, 0, 1].into()), None);
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            // Few distinct bits, so that prefixes nest and collide.
            (any::<u8>(), 0u8..=32).prop_map(|(b, len)| {
                IpNet::from(Ipv4Net::new([10, b & 3, b >> 6, b & 7].into(), len).unwrap())
            }),
            (any::<u8>(), 0u8..=128).prop_map(|(b, len)| {
                let mut octets = [0u8; 16];
                octets[0] = 0xfd;
                octets[7] = b & 3;
                octets[15] = b >> 5;
                IpNet::from(Ipv6Net::new(octets.into(), len).unwrap())
            }),
        ]
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_linear_search(
            steps in proptest::collection::vec((any::<bool>(), any_net()), 1..80),
            probes in proptest::collection::vec(any_net(), 1..40),
        ) {
            let mut table = AllowedIps::default();
            let mut model: Vec<(IpNet, usize)> = Vec::new();
            for (owner, (add, prefix)) in steps.into_iter().enumerate() {
                model.retain(|(held, _)| *held != prefix.trunc());
                if add {
                    model.push((prefix.trunc(), owner));
                    table.insert(prefix, owner);
                } else {
                    table.remove(prefix);
                }
            }
            for probe in probes {
                let expected = model
                    .iter()
                    .filter(|(held, _)| held.contains(&probe.addr()))
                    .max_by_key(|(held, _)| held.prefix_len())
                    .map(|(_, owner)| *owner);
                prop_assert_eq!(table.lookup(probe.addr()).copied(), expected);
            }
        }
    }
}
