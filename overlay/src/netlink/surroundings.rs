//! Reads what else on this host decides where packets go.

use std::collections::BTreeSet;
use std::io;

use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage, LinkXdp, XdpAttached};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::routes::{FAMILIES, facts};
use super::{Netlink, failed};
use crate::backend::BackendError;
use crate::surroundings::{
    Action, Child, Hop, LINKS_MOST, NAMESPACES_MOST, Neighbour, ROUTES_MOST, RULES_MOST, RoutingRule,
    Surroundings, Way,
};

/// The kernel's own table of this host's addresses.
const RT_TABLE_LOCAL: u32 = 255;

impl Netlink {
    /// Reads links, routes, rules, and those links of other namespaces that send through ours.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn surroundings(&mut self) -> Result<Surroundings, BackendError> {
        let mut found = Surroundings::default();
        self.links_around(&mut found).await.map_err(failed("reading the links around"))?;
        for family in FAMILIES {
            self.ways_around(family, &mut found).await.map_err(failed("reading the routes around"))?;
            self.rules_around(family, &mut found).await.map_err(failed("reading the routing rules"))?;
        }
        // A kernel that shows nothing of other namespaces has said what it has.
        if let Err(error) = self.children(&mut found).await {
            tracing::debug!(%error, "links of other network namespaces cannot be read");
        }
        Ok(found)
    }

    async fn sample(
        &mut self,
        message: RouteNetlinkMessage,
        most: usize,
        what: &'static str,
        found: &mut Surroundings,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let (items, whole) = self.socket.sample(message, most).await?;
        if !whole {
            found.cut.push(what);
        }
        Ok(items)
    }

    async fn links_around(&mut self, found: &mut Surroundings) -> io::Result<()> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        for answer in self.sample(message, LINKS_MOST, "links", found).await? {
            if let RouteNetlinkMessage::NewLink(message) = answer {
                found.links.push(neighbour(&message));
            }
        }
        let message = RouteNetlinkMessage::GetAddress(Default::default());
        for answer in self.sample(message, LINKS_MOST * 4, "addresses", found).await? {
            let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
            let (mut local, mut remote, mut fixed) = (None, None, true);
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    AddressAttribute::Address(ip) => remote = Some(*ip),
                    AddressAttribute::CacheInfo(info) => fixed = info.ifa_valid == u32::MAX,
                    _ => {}
                }
            }
            let address = local.or(remote).and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok());
            let link = found.links.iter_mut().find(|link| link.index == message.header.index);
            if let (Some(link), Some(address)) = (link, address) {
                link.addresses.push((address, fixed));
            }
        }
        Ok(())
    }

    async fn ways_around(&mut self, family: AddressFamily, found: &mut Surroundings) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let message = RouteNetlinkMessage::GetRoute(message);
        for answer in self.sample(message, ROUTES_MOST, "routes", found).await? {
            if let RouteNetlinkMessage::NewRoute(message) = answer {
                found.ways.extend(way(&message));
            }
        }
        Ok(())
    }

    async fn rules_around(&mut self, family: AddressFamily, found: &mut Surroundings) -> io::Result<()> {
        let mut message = RuleMessage::default();
        message.header.family = family;
        let message = RouteNetlinkMessage::GetRule(message);
        for answer in self.sample(message, RULES_MOST, "routing rules", found).await? {
            if let RouteNetlinkMessage::NewRule(message) = answer
                && message.header.family == family
            {
                found.rules.push(rule(&message));
            }
        }
        Ok(())
    }

    /// Looks into the namespaces that the kernel has a number for here: it gives one when a link is moved there.
    async fn children(&mut self, found: &mut Surroundings) -> io::Result<()> {
        let message = RouteNetlinkMessage::GetNsId(NsidMessage::default());
        let mut numbers = BTreeSet::new();
        for answer in self.sample(message, NAMESPACES_MOST, "network namespaces", found).await? {
            if let RouteNetlinkMessage::NewNsId(message) = answer {
                numbers.extend(message.attributes.iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(number) if *number >= 0 => Some(*number),
                    _ => None,
                }));
            }
        }
        let parents: BTreeSet<u32> = found.links.iter().map(|link| link.index).collect();
        for number in numbers {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfNetnsId(number));
            // One that is gone meanwhile, or is another user's, is none of ours.
            let message = RouteNetlinkMessage::GetLink(message);
            let Ok((answers, _)) = self.socket.sample(message, LINKS_MOST).await else { continue };
            for answer in answers {
                if let RouteNetlinkMessage::NewLink(message) = answer {
                    found.children.extend(child(&message).filter(|child| parents.contains(&child.parent)));
                }
            }
        }
        Ok(())
    }
}

fn kind_of(infos: &[LinkInfo]) -> Option<String> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    })
}

fn neighbour(message: &LinkMessage) -> Neighbour {
    let mut link = Neighbour { index: message.header.index, ..Neighbour::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::LinkInfo(infos) => link.kind = kind_of(infos),
            LinkAttribute::Xdp(parts) => {
                link.xdp = parts.iter().any(
                    |part| matches!(part, LinkXdp::Attached(attached) if *attached != XdpAttached::None),
                );
            }
            _ => {}
        }
    }
    // Where /sys is another namespace's, a link of a kind may have the name of hardware.
    link.functions = if link.kind.is_none() { functions(&link.name) } else { 0 };
    link
}

/// What the driver has given away of this hardware. A name cannot lead elsewhere: the kernel allows no slash in it.
fn functions(name: &str) -> u32 {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/device/sriov_numvfs"));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A link on a parent of another namespace.
fn child(message: &LinkMessage) -> Option<Child> {
    let (mut parent, mut kind, mut elsewhere, mut sent) = (None, None, false, 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(
                        kind @ (InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan | InfoKind::IpVtap),
                    ) => Some(kind.to_string()),
                    _ => None,
                });
            }
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Stats64(stats) => sent = stats.tx_packets,
            _ => {}
        }
    }
    Some(Child { parent: parent.filter(|_| elsewhere)?, kind: kind?, sent })
}

fn gateway(attributes: &[RouteAttribute]) -> Option<std::net::IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some((*ip).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(ip)) | RouteAttribute::Via(RouteVia::Inet6(ip)) => {
            Some((*ip).into())
        }
        _ => None,
    })
}

fn way(message: &RouteMessage) -> Option<Way> {
    let facts = facts(message)?;
    let mut table = u32::from(message.header.table);
    let (mut hops, mut learnt) = (Vec::new(), false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(found) => table = *found,
            RouteAttribute::MultiPath(ways) => hops.extend(
                ways.iter()
                    .map(|way| Hop { interface: way.interface_index, gateway: gateway(&way.attributes) }),
            ),
            RouteAttribute::CacheInfo(info) => learnt = info.expires != 0,
            _ => {}
        }
    }
    if let Some(interface) = facts.interface {
        hops.push(Hop { interface, gateway: gateway(&message.attributes) });
    }
    if message.header.kind != RouteType::Unicast {
        hops.clear();
    }
    let local = table == RT_TABLE_LOCAL;
    (!local).then_some(Way { table, to: facts.to, hops, learnt })
}

fn rule(message: &RuleMessage) -> RoutingRule {
    let header = &message.header;
    let mut rule = RoutingRule {
        v6: header.family == AddressFamily::Inet6,
        priority: 0,
        action: Action::Nowhere,
        from: None,
        to: None,
        narrow: header.tos != 0,
        inverted: header.flags.contains(RuleFlags::Invert),
        suppress: None,
        iif: None,
    };
    let (mut table, mut vrf, mut target) = (u32::from(header.table), false, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Destination(ip) => rule.to = IpNet::new(*ip, header.dst_len).ok(),
            RuleAttribute::Source(ip) => rule.from = IpNet::new(*ip, header.src_len).ok(),
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::Priority(found) => rule.priority = *found,
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::Goto(found) => target = Some(*found),
            RuleAttribute::L3MDev(found) => vrf = *found,
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress = Some(*length),
            RuleAttribute::FwMark(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_)
            | RuleAttribute::TunId(_)
            | RuleAttribute::Realm(_) => rule.narrow = true,
            _ => {}
        }
    }
    rule.action = match header.action {
        RuleAction::ToTable if vrf => Action::Vrf,
        RuleAction::ToTable => Action::Table(table),
        RuleAction::Goto => target.map_or(Action::Nowhere, Action::Goto),
        _ => Action::Nowhere,
    };
    rule
}
