//! What is around the mesh: the other interfaces' addresses, default routes and forwarding.

use std::collections::BTreeSet;
use std::net::IpAddr;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressFlags, AddressScope};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};

use super::links::{Address, Link, is_link_local};
use super::routes::facts;
use crate::link::{ObservedUnderlay, OtherLink};

/// Puts the underlay together. `main` holds the main table, IPv4 first; `mesh` is the mesh's own link.
pub(crate) fn observed(
    links: &[Link],
    addresses: &[Address],
    main: &[RouteMessage],
    mesh: Option<u32>,
) -> ObservedUnderlay {
    let mut found = ObservedUnderlay { forwarding: forwarding(), ..ObservedUnderlay::default() };
    let global: Vec<&Address> =
        addresses.iter().filter(|address| Some(address.index) != mesh && is_global(address)).collect();
    found.addresses = global.iter().map(|address| address.net.addr()).collect();
    found.links = links
        .iter()
        .filter(|link| Some(link.index) != mesh && link.name != "lo" && !link.is_marked())
        .map(|link| {
            let of_link = global.iter().filter(|address| address.index == link.index);
            let permanent = |address: &&&Address| address.flags.contains(AddressFlags::Permanent);
            let addresses = of_link.map(|address| (address.net.addr(), permanent(&address))).collect();
            (link.index, OtherLink { name: link.name.clone(), addresses, ..OtherLink::default() })
        })
        .collect();
    let mut through: Vec<u32> = Vec::new();
    for message in main {
        let least = if message.header.address_family == AddressFamily::Inet { 8 } else { 16 };
        let length = message.header.destination_prefix_length;
        if message.header.kind != RouteType::Unicast || length >= least {
            continue;
        }
        for (index, gateway) in hops(message) {
            if let Some(link) = found.links.get_mut(&index) {
                link.leads_away = true;
                link.gateways.extend(gateway);
            }
        }
        if length != 0 {
            continue;
        }
        let Some(facts) = facts(message) else { continue };
        for index in hops(message).into_iter().map(|(index, _)| index).filter(|index| Some(*index) != mesh) {
            let link = links.iter().find(|link| link.index == index);
            // A default route may carry a smaller MTU than its link, as on cloud networks with jumbo frames.
            let mtu = link.map(|link| link.mtu).into_iter().chain(facts.mtu.filter(|mtu| *mtu > 0)).min();
            found.mtu = found.mtu.into_iter().chain(mtu).min();
            through.push(index);
        }
    }
    let mut seen = BTreeSet::new();
    for v6 in [false, true] {
        for index in &through {
            let of_link = global.iter().filter(|address| address.index == *index);
            let usable = of_link.filter(|address| {
                // A temporary IPv6 address (RFC 8981; it shares its flag with "secondary") is gone tomorrow.
                address.net.addr().is_ipv6() == v6 && !(v6 && address.flags.contains(AddressFlags::Secondary))
            });
            let fresh = usable.map(|address| address.net.addr()).filter(|ip| seen.insert(*ip));
            found.default_route_addresses.extend(fresh);
        }
    }
    found
}

fn is_global(address: &Address) -> bool {
    let ip: IpAddr = address.net.addr();
    let unusable = AddressFlags::Tentative | AddressFlags::Deprecated | AddressFlags::Dadfailed;
    matches!(address.scope, AddressScope::Universe | AddressScope::Site)
        && !ip.is_loopback()
        && !is_link_local(ip)
        && !address.flags.intersects(unusable)
}

/// The interfaces that a route leaves through, each with its gateway.
fn hops(message: &RouteMessage) -> Vec<(u32, Option<IpAddr>)> {
    let gateway = |attributes: &[RouteAttribute]| {
        attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) | RouteAttribute::Via(RouteVia::Inet(ip)) => {
                Some(IpAddr::from(*ip))
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) | RouteAttribute::Via(RouteVia::Inet6(ip)) => {
                Some(IpAddr::from(*ip))
            }
            _ => None,
        })
    };
    let single = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some((*index, gateway(&message.attributes))),
        _ => None,
    });
    let several = message.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => {
            hops.iter().map(|hop| (hop.interface_index, gateway(&hop.attributes))).collect()
        }
        _ => Vec::new(),
    });
    single.into_iter().chain(several).collect()
}

fn forwarding() -> (bool, bool) {
    // What cannot be read now, for want of descriptors perhaps, is not told to be off.
    let on = |path: &str| match std::fs::read_to_string(path) {
        Ok(text) => text.trim() != "0",
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    (on("/proc/sys/net/ipv4/ip_forward"), on("/proc/sys/net/ipv6/conf/all/forwarding"))
}

/// Returns the reason why an interface has no IPv6, if it is switched off: for all, for it, or for those that are made new.
pub(crate) fn ipv6_disabled(interface: &str) -> Option<String> {
    let setting = |of: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{of}/disable_ipv6"));
    let off = |of: &str| setting(of).is_ok_and(|text| text.trim() != "0");
    if setting("all").is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return Some(
            "the kernel runs without IPv6 (ipv6.disable=1 or no such module): boot it with IPv6".to_owned(),
        );
    }
    // An interface begins with what `default` says.
    let own = if setting(interface).is_ok() { interface } else { "default" };
    let switch = ["all", own].into_iter().find(|of| off(of))?;
    Some(format!("IPv6 is disabled (net.ipv6.conf.{switch}.disable_ipv6 is not 0): set it to 0"))
}
