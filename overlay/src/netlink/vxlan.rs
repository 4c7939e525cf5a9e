//! VXLAN devices with their forwarding and neighbour tables: messages to what they mean, and back.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, VxlanDf,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::links::{self, is_link_local, tolerate};
use super::socket::{RouteSocket, errno};
use crate::link::LinkChange;
use crate::vxlan::{Mac, ObservedVxlan, VxlanChange, VxlanConfig};

/// The device with its tables; `None` when there is no link of that name.
pub(crate) async fn observe(socket: &mut RouteSocket, name: &str) -> io::Result<Option<ObservedVxlan>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let Some(RouteNetlinkMessage::NewLink(message)) =
        socket.get(RouteNetlinkMessage::GetLink(message)).await?
    else {
        return Ok(None);
    };
    let mut found = device(message);
    let addresses = links::addresses(socket).await?;
    let own = addresses.iter().filter(|address| address.index == found.index);
    found.addresses = own.map(|address| address.net).filter(|net| !is_link_local(net.addr())).collect();
    for message in table(socket, AddressFamily::Bridge, found.index).await? {
        let (mac, remote) = entry(&message);
        if let (Some(mac), Some(remote)) = (mac, remote) {
            found.remotes.entry(mac).or_default().insert(remote);
        }
    }
    for message in table(socket, AddressFamily::Inet6, found.index).await? {
        let (mac, ip) = entry(&message);
        if let (Some(mac), Some(IpAddr::V6(ip)), NeighbourState::Permanent) = (mac, ip, message.header.state)
        {
            found.neighbours.insert(ip, mac);
        }
    }
    Ok(Some(found))
}

fn device(message: LinkMessage) -> ObservedVxlan {
    let mut mac = None;
    let mut found = ObservedVxlan::default();
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    let LinkInfo::Data(InfoData::Vxlan(all)) = info else { continue };
                    for info in all {
                        match info {
                            InfoVxlan::Id(vni) => found.vni = *vni,
                            InfoVxlan::Port(port) => found.port = *port,
                            InfoVxlan::PortRange(range) => found.sources = *range,
                            InfoVxlan::Learning(on) => found.learning = *on,
                            _ => {}
                        }
                    }
                }
            }
            _ => {}
        }
    }
    let link = links::link(message);
    ObservedVxlan {
        index: link.index,
        up: link.up,
        mtu: link.mtu,
        kind: link.kind,
        alias: link.alias,
        mac,
        ..found
    }
}

async fn table(
    socket: &mut RouteSocket,
    family: AddressFamily,
    index: u32,
) -> io::Result<Vec<NeighbourMessage>> {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    // The neighbour dump takes its filter as an attribute, that of the forwarding table in the header.
    if family == AddressFamily::Bridge {
        message.header.ifindex = index;
    } else {
        message.attributes.push(NeighbourAttribute::IfIndex(index));
    }
    let answers = socket.dump(RouteNetlinkMessage::GetNeighbour(message)).await?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) if message.header.ifindex == index => Some(message),
            _ => None,
        })
        .collect())
}

fn entry(message: &NeighbourMessage) -> (Option<Mac>, Option<IpAddr>) {
    let (mut mac, mut ip) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::try_from(bytes.as_slice()).ok(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
            // The family of a forwarding entry is the bridge's; its address tells its own by its length.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|v4| IpAddr::V4(v4.into()));
                ip = v4.ok().or(<[u8; 16]>::try_from(bytes.as_slice()).map(|v6| IpAddr::V6(v6.into())).ok());
            }
            _ => {}
        }
    }
    (mac, ip)
}

/// Applies one change; `index` is the link's, of no use for [`VxlanChange::Create`].
pub(crate) async fn change(
    socket: &mut RouteSocket,
    config: &VxlanConfig,
    index: u32,
    change: &VxlanChange,
) -> io::Result<()> {
    let link = match change {
        VxlanChange::Create => return create(socket, config).await,
        VxlanChange::Remove => return links::delete(socket, index).await,
        VxlanChange::SetRemote(mac, remote) => {
            let message = RouteNetlinkMessage::NewNeighbour(forwarding(index, mac, *remote));
            return socket.change(message, NLM_F_CREATE | NLM_F_REPLACE).await;
        }
        VxlanChange::RemoveRemote(mac, remote) => {
            let message = RouteNetlinkMessage::DelNeighbour(forwarding(index, mac, *remote));
            return tolerate(socket.change(message, 0).await, &[errno::ENOENT]);
        }
        VxlanChange::SetNeighbour(address, mac) => {
            let message = RouteNetlinkMessage::NewNeighbour(neighbour(index, *address, Some(mac)));
            return socket.change(message, NLM_F_CREATE | NLM_F_REPLACE).await;
        }
        VxlanChange::RemoveNeighbour(address) => {
            let message = RouteNetlinkMessage::DelNeighbour(neighbour(index, *address, None));
            return tolerate(socket.change(message, 0).await, &[errno::ENOENT]);
        }
        VxlanChange::SetAlias => LinkChange::SetAlias,
        VxlanChange::SetMtu(mtu) => LinkChange::SetMtu(*mtu),
        VxlanChange::AddAddress(net) => LinkChange::AddAddress(*net),
        VxlanChange::RemoveAddress(net) => LinkChange::RemoveAddress(*net),
        VxlanChange::SetUp => LinkChange::SetUp,
    };
    links::change(socket, index, &link).await
}

async fn create(socket: &mut RouteSocket, config: &VxlanConfig) -> io::Result<()> {
    // The family outside is that of the local address, also of the unspecified one.
    let local = if config.outer_v6 {
        InfoVxlan::Local6(Ipv6Addr::UNSPECIFIED)
    } else {
        InfoVxlan::Local(Ipv4Addr::UNSPECIFIED)
    };
    let data = vec![
        InfoVxlan::Id(config.vni),
        local,
        InfoVxlan::Learning(false),
        InfoVxlan::PortRange((config.port, config.port.saturating_add(1))),
        InfoVxlan::Port(config.port),
        InfoVxlan::Df(VxlanDf::Set),
    ];
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(config.name.to_string()));
    message.attributes.push(LinkAttribute::Address(config.mac.to_vec()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Vxlan),
        LinkInfo::Data(InfoData::Vxlan(data)),
    ]));
    socket.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await
}

fn forwarding(index: u32, mac: &Mac, remote: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Other(0xc0); // NUD_PERMANENT | NUD_NOARP
    message.header.flags = NeighbourFlags::Own;
    let remote = match remote {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(remote));
    message
}

fn neighbour(index: u32, address: Ipv6Addr, mac: Option<&Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
    message
}
