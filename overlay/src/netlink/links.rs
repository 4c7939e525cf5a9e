//! Links and addresses: messages to what they mean, and back.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::socket::{RouteSocket, errno, exchange_now};
use crate::link::{ALIAS, LinkChange, ObservedLink};

/// A link without its addresses.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    pub(crate) kind: Option<String>,
    pub(crate) alias: Option<String>,
}

/// An address with its link.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(crate) index: u32,
    pub(crate) net: IpNet,
    pub(crate) scope: AddressScope,
    pub(crate) flags: AddressFlags,
}

impl Link {
    /// Whether it has our alias.
    pub(crate) fn is_marked(&self) -> bool {
        self.alias.as_deref() == Some(ALIAS)
    }

    /// Its kind, for an error's text.
    pub(crate) fn kind_text(&self) -> &str {
        self.kind.as_deref().unwrap_or("a hardware link")
    }
}

pub(crate) fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        name: String::new(),
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        mtu: 0,
        kind: None,
        alias: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn address(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    let (mut local, mut remote) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => remote = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let net = IpNet::new(local.or(remote)?, message.header.prefix_len).ok()?;
    Some(Address { index: message.header.index, net, scope: message.header.scope, flags })
}

pub(crate) async fn all(socket: &mut RouteSocket) -> io::Result<Vec<Link>> {
    let answers = socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).await?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })
        .collect())
}

pub(crate) async fn addresses(socket: &mut RouteSocket) -> io::Result<Vec<Address>> {
    let answers = socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).await?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => address(&message),
            _ => None,
        })
        .collect())
}

pub(crate) async fn find(socket: &mut RouteSocket, name: &str) -> io::Result<Option<Link>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Ok(match socket.get(RouteNetlinkMessage::GetLink(message)).await? {
        Some(RouteNetlinkMessage::NewLink(message)) => Some(link(message)),
        _ => None,
    })
}

/// As [`find`], at once and without a runtime, on a socket of its own.
pub(crate) fn find_now(name: &str) -> io::Result<Option<Link>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match exchange_now(NETLINK_ROUTE, RouteNetlinkMessage::GetLink(message)) {
        Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })),
        Err(error) if error.raw_os_error() == Some(errno::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates a link of the kind "wireguard". The kernel takes no alias here.
pub(crate) async fn create_wireguard(socket: &mut RouteSocket, name: &str) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]));
    socket.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await
}

/// Writes our alias on a link.
pub(crate) async fn mark(socket: &mut RouteSocket, index: u32) -> io::Result<()> {
    change(socket, index, &LinkChange::SetAlias).await
}

/// Deletes a link; one that is gone is no error.
pub(crate) async fn delete(socket: &mut RouteSocket, index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    tolerate(socket.change(RouteNetlinkMessage::DelLink(message), 0).await, &[errno::ENODEV])
}

/// `Ok` also for the errors that say that things are already as wanted.
pub(crate) fn tolerate(result: io::Result<()>, fine: &[i32]) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| fine.contains(&code)) => Ok(()),
        other => other,
    }
}

/// The mesh link with its addresses, less the link-local ones that the kernel makes.
pub(crate) fn observed(link: &Link, addresses: &[Address]) -> ObservedLink {
    let addresses: BTreeSet<IpNet> = addresses
        .iter()
        .filter(|address| address.index == link.index && !is_link_local(address.net.addr()))
        .map(|address| address.net)
        .collect();
    ObservedLink {
        index: link.index,
        up: link.up,
        mtu: link.mtu,
        kind: link.kind.clone(),
        alias: link.alias.clone(),
        addresses,
    }
}

pub(crate) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

pub(crate) async fn change(socket: &mut RouteSocket, index: u32, change: &LinkChange) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    match change {
        LinkChange::SetAlias => message.attributes.push(LinkAttribute::IfAlias(ALIAS.to_owned())),
        LinkChange::SetMtu(mtu) => message.attributes.push(LinkAttribute::Mtu(u32::from(*mtu))),
        LinkChange::SetUp => {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        LinkChange::AddAddress(net) => {
            let message = RouteNetlinkMessage::NewAddress(address_message(index, *net));
            return socket.change(message, NLM_F_CREATE | NLM_F_REPLACE).await;
        }
        LinkChange::RemoveAddress(net) => {
            let message = RouteNetlinkMessage::DelAddress(address_message(index, *net));
            return tolerate(socket.change(message, 0).await, &[errno::EADDRNOTAVAIL]);
        }
    }
    socket.change(RouteNetlinkMessage::SetLink(message), 0).await
}

fn address_message(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = net.prefix_len();
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message.attributes.push(AddressAttribute::Address(net.addr()));
    message.header.family = match net {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => {
            // Nobody on a tunnel can hold the address as well, and it has to be usable at once.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            AddressFamily::Inet6
        }
    };
    message
}
