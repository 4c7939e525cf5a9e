//! Our routing table and the rules that consult it: messages to what they mean, and back.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::links::{Link, tolerate};
use super::socket::{RouteSocket, errno};
use crate::local::Routing;
use crate::route::{ObservedRoutes, OwnRule, Route, RouteKind, StrayRoute};

/// The families in the order in which they are read.
pub(crate) const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// Every route of a table, of one family.
pub(crate) async fn table(
    socket: &mut RouteSocket,
    family: AddressFamily,
    table: u32,
) -> io::Result<Vec<RouteMessage>> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    set_table(&mut message, table);
    let answers = match socket.dump(RouteNetlinkMessage::GetRoute(message)).await {
        Ok(answers) => answers,
        // The table does not exist before its first route.
        Err(error) if error.raw_os_error() == Some(errno::ENOENT) => Vec::new(),
        Err(error) => return Err(error),
    };
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route)
                if route.header.address_family == family && table_of(&route) == table =>
            {
                Some(route)
            }
            _ => None,
        })
        .collect())
}

fn set_table(message: &mut RouteMessage, table: u32) {
    message.header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RouteAttribute::Table(table));
}

fn table_of(message: &RouteMessage) -> u32 {
    (message.attributes.iter())
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(u32::from(message.header.table))
}

/// What of a route matters here.
pub(crate) struct Facts {
    pub(crate) to: IpNet,
    pub(crate) metric: u32,
    pub(crate) interface: Option<u32>,
    pub(crate) mtu: Option<u32>,
    source: Option<IpAddr>,
    gateway: Gateway,
}

/// The next hop of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gateway {
    None,
    V6(Ipv6Addr),
    Other,
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

pub(crate) fn facts(message: &RouteMessage) -> Option<Facts> {
    let unspecified: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut facts = Facts {
        to: IpNet::new(unspecified, message.header.destination_prefix_length).ok()?,
        metric: 0,
        interface: None,
        mtu: None,
        source: None,
        gateway: Gateway::None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
                facts.to = IpNet::new((*ip).into(), facts.to.prefix_len()).ok()?;
            }
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                facts.to = IpNet::new((*ip).into(), facts.to.prefix_len()).ok()?;
            }
            RouteAttribute::Priority(metric) => facts.metric = *metric,
            RouteAttribute::Oif(index) => facts.interface = Some(*index),
            RouteAttribute::PrefSource(address) => facts.source = ip_of(address),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) | RouteAttribute::Via(RouteVia::Inet6(ip)) => {
                facts.gateway = Gateway::V6(*ip);
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
                facts.gateway = Gateway::Other;
            }
            RouteAttribute::Metrics(metrics) => {
                facts.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(facts)
}

/// Sorts the routes of our protocol into those that a plan can ask for and strays.
pub(crate) fn sort(
    messages: &[RouteMessage],
    protocol: u8,
    interface: Option<u32>,
    links: &[Link],
    into: &mut ObservedRoutes,
) {
    for message in messages {
        if message.header.protocol != RouteProtocol::from(protocol) {
            continue;
        }
        let Some(facts) = facts(message) else { continue };
        let kind = match message.header.kind {
            RouteType::Unicast => {
                let mtu = facts.mtu.and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(0);
                let through = links.iter().find(|link| Some(link.index) == facts.interface);
                match (facts.gateway, through.and_then(|link| link.name.parse().ok())) {
                    (Gateway::None, _) if facts.interface == interface && interface.is_some() => {
                        Some(RouteKind::Mesh { mtu })
                    }
                    (Gateway::V6(via), Some(device)) => {
                        Some(RouteKind::Cleartext { device, via, source: facts.source, mtu })
                    }
                    _ => None,
                }
            }
            RouteType::Throw => Some(RouteKind::Throw),
            RouteType::BlackHole => Some(RouteKind::Blackhole),
            _ => None,
        };
        match kind {
            Some(kind) if kind.metric() == facts.metric => {
                into.routes.insert(Route::new(facts.to, kind));
            }
            _ => {
                let kind = u8::from(message.header.kind);
                into.strays.insert(StrayRoute { to: facts.to, metric: facts.metric, kind });
            }
        }
    }
}

fn route_message(to: IpNet, metric: u32, kind: RouteType, routing: &Routing) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match to {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = to.prefix_len();
    message.header.protocol = RouteProtocol::from(routing.protocol);
    message.header.kind = kind;
    message.header.scope = RouteScope::Universe;
    set_table(&mut message, routing.table);
    message.attributes.push(RouteAttribute::Destination(to.network().into()));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

/// Adds a route, or replaces the one of its prefix and metric in place; `interface` is what it leads through.
pub(crate) async fn set(
    socket: &mut RouteSocket,
    route: &Route,
    interface: Option<u32>,
    routing: &Routing,
) -> io::Result<()> {
    let mut message = route_message(route.to, route.kind.metric(), route_type(&route.kind), routing);
    if let RouteKind::Mesh { mtu } | RouteKind::Cleartext { mtu, .. } = route.kind {
        let index = interface.ok_or_else(|| io::Error::from_raw_os_error(errno::ENODEV))?;
        message.attributes.push(RouteAttribute::Oif(index));
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(u32::from(mtu))]));
    }
    let v4 = matches!(route.to, IpNet::V4(_));
    match route.kind {
        RouteKind::Mesh { .. } if v4 => message.header.scope = RouteScope::Link,
        RouteKind::Cleartext { via, source, .. } => {
            message.attributes.push(if v4 {
                RouteAttribute::Via(RouteVia::Inet6(via))
            } else {
                RouteAttribute::Gateway(RouteAddress::Inet6(via))
            });
            message.attributes.extend(source.map(|ip| RouteAttribute::PrefSource(ip.into())));
        }
        _ => {}
    }
    socket.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE).await
}

/// Removes a route of our protocol; one that is gone is no error.
pub(crate) async fn remove(
    socket: &mut RouteSocket,
    to: IpNet,
    metric: u32,
    kind: RouteType,
    routing: &Routing,
) -> io::Result<()> {
    let mut message = route_message(to, metric, kind, routing);
    // IPv4 compares the scope unless it is this one.
    message.header.scope = RouteScope::NoWhere;
    let result = socket.change(RouteNetlinkMessage::DelRoute(message), 0).await;
    tolerate(result, &[errno::ESRCH, errno::ENOENT])
}

pub(crate) fn route_type(kind: &RouteKind) -> RouteType {
    match kind {
        RouteKind::Mesh { .. } | RouteKind::Cleartext { .. } => RouteType::Unicast,
        RouteKind::Throw => RouteType::Throw,
        RouteKind::Blackhole => RouteType::BlackHole,
    }
}

/// A rule of ours as the kernel has it.
pub(crate) enum OurRule {
    /// Consults our table for every packet.
    Table(RuleMessage),
    /// Is for a prefix of our own pods.
    Own(OwnRule, RuleMessage),
}

/// Our rules of one family, by priority and content.
pub(crate) async fn rules(
    socket: &mut RouteSocket,
    family: AddressFamily,
    routing: &Routing,
) -> io::Result<Vec<OurRule>> {
    let mut message = RuleMessage::default();
    message.header.family = family;
    let answers = socket.dump(RouteNetlinkMessage::GetRule(message)).await?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) if rule.header.family == family => {
                if is_ours(&rule, routing) {
                    return Some(OurRule::Table(rule));
                }
                own_rule(&rule, routing).map(|own| OurRule::Own(own, rule))
            }
            _ => None,
        })
        .collect())
}

fn own_rule(rule: &RuleMessage, routing: &Routing) -> Option<OwnRule> {
    let header = &rule.header;
    let (mut priority, mut table, mut to) = (0, u32::from(header.table), None);
    let (mut only, mut protocol) = (u32::MAX, None);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(found) => priority = *found,
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::Destination(ip) => to = IpNet::new(*ip, header.dst_len).ok(),
            RuleAttribute::SuppressPrefixLen(found) => only = *found,
            RuleAttribute::Protocol(found) => protocol = Some(*found),
            RuleAttribute::Other(_) => {}
            _ => return None,
        }
    }
    let plain = header.src_len == 0
        && header.tos == 0
        && !header.flags.contains(rtnetlink::packet_route::rule::RuleFlags::Invert)
        && protocol == Some(RouteProtocol::from(routing.protocol));
    let to = to.filter(|_| plain)?;
    let specific = OwnRule::Specific(to);
    let nowhere = OwnRule::Nowhere(to);
    match header.action {
        RuleAction::ToTable
            if priority == routing.priority + specific.offset()
                && table == u32::from(RouteHeader::RT_TABLE_MAIN)
                && only == u32::from(to.prefix_len().saturating_sub(1)) =>
        {
            Some(specific)
        }
        RuleAction::Blackhole if priority == routing.priority + nowhere.offset() => Some(nowhere),
        _ => None,
    }
}

fn own_message(rule: &OwnRule, routing: &Routing) -> RuleMessage {
    let to = rule.to();
    let mut message = RuleMessage::default();
    message.header.family = if to.addr().is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.dst_len = to.prefix_len();
    message.attributes.push(RuleAttribute::Destination(to.network()));
    message.attributes.push(RuleAttribute::Priority(routing.priority + rule.offset()));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::from(routing.protocol)));
    match rule {
        OwnRule::Specific(_) => {
            message.header.action = RuleAction::ToTable;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            let only = u32::from(to.prefix_len().saturating_sub(1));
            message.attributes.push(RuleAttribute::SuppressPrefixLen(only));
        }
        OwnRule::Nowhere(_) => message.header.action = RuleAction::Blackhole,
    }
    message
}

/// Adds a rule for a prefix of our own; one that stands is no error.
pub(crate) async fn add_own(socket: &mut RouteSocket, rule: &OwnRule, routing: &Routing) -> io::Result<()> {
    let message = own_message(rule, routing);
    let result = socket.change(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL).await;
    tolerate(result, &[errno::EEXIST])
}

/// Removes a rule for a prefix of our own; one that is gone is no error.
pub(crate) async fn remove_own(
    socket: &mut RouteSocket,
    rule: &OwnRule,
    routing: &Routing,
) -> io::Result<()> {
    remove_rule(socket, own_message(rule, routing)).await
}

fn is_ours(rule: &RuleMessage, routing: &Routing) -> bool {
    let header = &rule.header;
    let everything = header.src_len == 0 && header.dst_len == 0 && header.tos == 0;
    let mut priority = 0;
    let mut table = u32::from(header.table);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(found) => priority = *found,
            RuleAttribute::Table(found) => table = *found,
            // The kernel shows "suppress nothing" as all ones.
            RuleAttribute::Protocol(_) | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            RuleAttribute::Other(_) => {}
            _ => return false,
        }
    }
    everything
        && header.action == RuleAction::ToTable
        && priority == routing.priority
        && table == routing.table
        && !header.flags.contains(rtnetlink::packet_route::rule::RuleFlags::Invert)
}

/// Adds the rule; one that stands is no error.
pub(crate) async fn add_rule(socket: &mut RouteSocket, v6: bool, routing: &Routing) -> io::Result<()> {
    let mut message = RuleMessage::default();
    message.header.family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(routing.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
    message.attributes.push(RuleAttribute::Table(routing.table));
    message.attributes.push(RuleAttribute::Priority(routing.priority));
    message.attributes.push(RuleAttribute::Protocol(RouteProtocol::from(routing.protocol)));
    let result = socket.change(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL).await;
    tolerate(result, &[errno::EEXIST])
}

pub(crate) async fn remove_rule(socket: &mut RouteSocket, rule: RuleMessage) -> io::Result<()> {
    let result = socket.change(RouteNetlinkMessage::DelRule(rule), 0).await;
    tolerate(result, &[errno::ENOENT, errno::ESRCH])
}
