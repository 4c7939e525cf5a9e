//! The step `dhcp`: what a server on a site's LAN gives a node.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Family, Scenario, Underlay};
use crate::layout::Layout;

/// The smallest MTU of IPv4 (RFC 791).
const MTU_LEAST: u16 = 68;
const MTU_MOST: u16 = 9_000;
/// The most routes of one lease: option 121 holds 255 bytes, and a route takes up to nine.
const ROUTES_MOST: usize = 24;

/// A lease for a node, or the end of its leases. Exactly one of `lease` and `release`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dhcp {
    /// The node whose client takes a lease. A server for it starts at its site's router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// The node whose clients end, with their addresses and routes. Its servers end too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// With `lease`: the node's address with the LAN's prefix length, IPv4 or IPv6 (stateful DHCPv6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// With `lease`: the server's own address. Default: the prefix's first host address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// With `lease`: the server is the default router: option 3, or by router advertisements with IPv6. Default: false.
    #[serde(default)]
    pub gateway: bool,
    /// With `lease`, IPv4 only: classless static routes by way of the server (option 121).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<String>,
    /// With `lease`, IPv4 only: the MTU (option 26), 68 to 9000, which the client gives to `eth0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

/// A DHCP offer, read and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The node's address, with the LAN's prefix length.
    pub(crate) address: IpNet,
    /// The server's.
    pub(crate) server: IpNet,
    /// Destinations by way of the server.
    pub(crate) routes: Vec<IpNet>,
}

impl Offer {
    /// Returns the family of the lease.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.address.addr())
    }
}

impl Dhcp {
    /// Reads the addresses.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub(crate) fn offer(&self) -> Result<Offer, String> {
        let text = self.address.as_deref().ok_or("dhcp: `lease` needs `address`, such as 10.2.0.77/24")?;
        let address: IpNet =
            text.parse().map_err(|_| format!("dhcp: address `{text}` is no address with a prefix length"))?;
        let family = Family::of(address.addr());
        let server: IpAddr = match &self.server {
            Some(text) => text.parse().map_err(|_| format!("dhcp: server `{text}` is no address"))?,
            // Of IPv6 the first is the anycast address of routers.
            None => address.hosts().find(|ip| *ip != address.network()).unwrap_or(address.addr()),
        };
        if !address.contains(&server) || server == address.addr() {
            return Err(format!("dhcp: server {server} has to be another address of {}", address.trunc()));
        }
        if family == Family::Ipv6 && (!self.routes.is_empty() || self.mtu.is_some()) {
            return Err("dhcp: routes and mtu are options of IPv4 only".to_owned());
        }
        if self.routes.len() > ROUTES_MOST {
            return Err(format!("dhcp: {} routes; at most {ROUTES_MOST}", self.routes.len()));
        }
        let route = |text: &String| match text.parse::<IpNet>() {
            Ok(net) if net.trunc() == net && net.addr().is_ipv4() => Ok(net),
            _ => Err(format!("dhcp: route `{text}` is no IPv4 prefix")),
        };
        let routes = self.routes.iter().map(route).collect::<Result<_, _>>()?;
        if self.mtu.is_some_and(|mtu| !(MTU_LEAST..=MTU_MOST).contains(&mtu)) {
            return Err(format!("dhcp: mtu has to be {MTU_LEAST} to {MTU_MOST}"));
        }
        let server = IpNet::new(server, address.prefix_len()).map_err(|e| e.to_string())?;
        Ok(Offer { address, server, routes })
    }

    /// Checks the step; `leased` are nodes that hold a lease at this point.
    pub(super) fn check<'a>(
        &'a self,
        scenario: &Scenario,
        layout: &Layout,
        leased: &mut BTreeSet<&'a str>,
    ) -> Result<(), String> {
        match (&self.lease, &self.release) {
            (Some(name), None) => {
                let node = layout.node(name).ok_or_else(|| format!("dhcp: there is no node `{name}`"))?;
                let family = self.offer()?.family();
                let site = scenario.sites.iter().find(|site| site.value.name == node.site);
                let speaks = site.is_some_and(|site| match site.value.underlay {
                    Underlay::Dual => true,
                    Underlay::Ipv4 => family == Family::Ipv4,
                    Underlay::Ipv6 => family == Family::Ipv6,
                });
                if !speaks {
                    return Err(format!("dhcp: the LAN of site `{}` has no {}", node.site, family.label()));
                }
                leased.insert(name);
                Ok(())
            }
            (None, Some(name)) => {
                let rest = Self { release: Some(name.clone()), ..Self::default() };
                if *self != rest {
                    return Err("dhcp: with `release` there is nothing else".to_owned());
                }
                if leased.remove(name.as_str()) {
                    Ok(())
                } else {
                    Err(format!("dhcp: node `{name}` holds no lease here"))
                }
            }
            _ => Err("dhcp: write either `lease` or `release`".to_owned()),
        }
    }
}
