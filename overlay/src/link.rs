//! The mesh interface as a network link.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::local::InterfaceName;

/// The link as it should be, once the WireGuard device exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// Its name.
    pub name: InterfaceName,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// Its addresses.
    pub addresses: BTreeSet<IpNet>,
}

/// The link as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLink {
    /// Interface index.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The kind that the kernel names (`IFLA_INFO_KIND`): "tun", "wireguard", "veth"; `None` for hardware.
    pub kind: Option<String>,
    /// The alias (`IFLA_IFALIAS`); ours is [`ALIAS`].
    pub alias: Option<String>,
    /// Its addresses, without the link-local ones that the kernel makes.
    pub addresses: BTreeSet<IpNet>,
}

/// The alias of links that are ours.
pub const ALIAS: &str = "sennit";

/// One change to the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkChange {
    /// Write our alias.
    SetAlias,
    /// Set the MTU, in bytes.
    SetMtu(u16),
    /// Add an address.
    AddAddress(IpNet),
    /// Remove an address.
    RemoveAddress(IpNet),
    /// Bring it up.
    SetUp,
}

impl LinkConfig {
    /// The changes from `observed` to this; bringing the link up is the last.
    pub fn diff(&self, observed: &ObservedLink) -> Vec<LinkChange> {
        let mut changes = Vec::new();
        if observed.alias.as_deref() != Some(ALIAS) {
            changes.push(LinkChange::SetAlias);
        }
        if observed.mtu != u32::from(self.mtu) {
            changes.push(LinkChange::SetMtu(self.mtu));
        }
        changes.extend(observed.addresses.difference(&self.addresses).map(|a| LinkChange::RemoveAddress(*a)));
        changes.extend(self.addresses.difference(&observed.addresses).map(|a| LinkChange::AddAddress(*a)));
        changes.extend((!observed.up).then_some(LinkChange::SetUp));
        changes
    }
}

/// The underlay as the kernel tells it: what the interface of the default route has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedUnderlay {
    /// Every global address of every interface but the mesh's.
    pub addresses: BTreeSet<IpAddr>,
    /// The global addresses of the interfaces that a default route leaves through, IPv4 first.
    pub default_route_addresses: Vec<IpAddr>,
    /// Every other link but the mesh's and the loopback, by index.
    pub links: BTreeMap<u32, OtherLink>,
    /// The smallest MTU of those interfaces, in bytes.
    pub mtu: Option<u32>,
    /// Whether the kernel forwards packets, for IPv4 and IPv6; pods cannot reach the mesh without it.
    pub forwarding: (bool, bool),
}

/// A link that is none of the mesh's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OtherLink {
    /// Its name, in whatever characters.
    pub name: String,
    /// Its global addresses; whether each was given for good, not by a router advertisement or a lease.
    pub addresses: BTreeMap<IpAddr, bool>,
    /// Whether a route of table `main` that is wider than any pod prefix (/8, /16 for IPv6) leaves through it.
    pub leads_away: bool,
    /// The gateways of default routes through it.
    pub gateways: BTreeSet<IpAddr>,
}

impl ObservedUnderlay {
    /// Returns the links that lead away from this host, whose pods hold `own`: those that wide routes leave
    /// through, and those with an address that is none of the pods'. A permanent address among the pods'
    /// marks a pod bridge, which may have other addresses too.
    pub fn away(&self, own: &[IpNet]) -> BTreeSet<u32> {
        let of_pods = |ip: &IpAddr| own.iter().any(|net| net.contains(ip));
        let away = |link: &OtherLink| {
            let bridge = link.addresses.iter().any(|(ip, permanent)| *permanent && of_pods(ip));
            link.leads_away || !bridge && link.addresses.keys().any(|ip| !of_pods(ip))
        };
        self.links.iter().filter(|(_, link)| away(link)).map(|(index, _)| *index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_away_by_route_or_address() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let link = |addresses: &[(&str, bool)], leads_away: bool| OtherLink {
            addresses: addresses.iter().map(|(text, permanent)| (ip(text), *permanent)).collect(),
            leads_away,
            ..OtherLink::default()
        };
        let underlay = ObservedUnderlay {
            links: BTreeMap::from([
                (2, link(&[("192.0.2.1", false)], true)),
                (3, link(&[("10.1.0.1", true)], false)),
                (4, link(&[], false)),
                (5, link(&[("198.51.100.7", false)], false)),
                // A pod bridge with a second address, and a LAN on which somebody announces our pods' prefix.
                (6, link(&[("10.1.0.1", true), ("192.168.7.1", true)], false)),
                (7, link(&[("10.1.0.77", false), ("192.168.7.2", true)], false)),
                (8, link(&[("10.1.0.1", true)], true)),
            ]),
            ..ObservedUnderlay::default()
        };
        let away = underlay.away(&["10.1.0.0/24".parse().unwrap()]);
        assert_eq!(away, BTreeSet::from([2, 5, 7, 8]));
    }

    #[test]
    fn a_new_link_comes_up_last_and_a_right_one_is_left_alone() {
        let config = LinkConfig {
            name: "sennit0".parse().unwrap(),
            mtu: 1420,
            addresses: BTreeSet::from(["10.1.1.0/32".parse().unwrap()]),
        };
        let mut observed = ObservedLink {
            index: 5,
            up: false,
            mtu: 1500,
            kind: Some("tun".to_owned()),
            alias: None,
            addresses: BTreeSet::from(["10.9.9.9/32".parse().unwrap()]),
        };
        let changes = config.diff(&observed);
        assert_eq!(changes.len(), 5);
        assert_eq!(changes.last(), Some(&LinkChange::SetUp));
        observed = ObservedLink {
            up: true,
            mtu: 1420,
            alias: Some(ALIAS.to_owned()),
            addresses: config.addresses.clone(),
            ..observed
        };
        assert_eq!(config.diff(&observed), []);
    }
}
