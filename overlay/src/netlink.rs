//! Links, addresses, routes and rules of this network namespace, through rtnetlink.

mod links;
mod routes;
mod socket;
mod surroundings;
mod underlay;
mod vxlan;
mod watch;

use std::io;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteHeader, RouteProtocol, RouteType};

use crate::backend::{BackendError, NetBackend, ObservedNet};
use crate::link::LinkChange;
use crate::local::{InterfaceName, Routing};
use crate::route::{RouteChange, RouteKind};
use crate::vxlan::{ObservedVxlan, VxlanChange, VxlanConfig};

pub(crate) use links::{
    Link, create_wireguard, delete as delete_link, find as find_link, find_now as find_link_now,
    mark as mark_link,
};
pub(crate) use socket::{RouteSocket, errno, exchange_now};
pub use watch::Watch;

/// The kernel's links, addresses, routes and rules. It works on the network namespace of the thread that made it.
pub struct Netlink {
    socket: RouteSocket,
}

impl Netlink {
    /// Opens a socket. Needs a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> Result<Self, BackendError> {
        let socket = RouteSocket::new().map_err(|e| BackendError::failed("opening a netlink socket", e))?;
        Ok(Self { socket })
    }
}

/// Returns the reason why the mesh interface has, or would have, no IPv6.
pub fn ipv6_disabled(interface: &InterfaceName) -> Option<String> {
    underlay::ipv6_disabled(interface.as_str())
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> BackendError {
    move |error| BackendError::failed(action, error)
}

/// As [`failed`], and for IPv6 with the reason why the host has none.
fn failed_family(
    action: String,
    v6: bool,
    interface: &InterfaceName,
) -> impl FnOnce(io::Error) -> BackendError {
    move |error| match ipv6_disabled(interface).filter(|_| v6) {
        Some(reason) => BackendError::failed(action, format_args!("{error}; {reason}")),
        None => BackendError::failed(action, error),
    }
}

impl NetBackend for Netlink {
    async fn observe(
        &mut self,
        interface: &InterfaceName,
        routing: &Routing,
    ) -> Result<ObservedNet, BackendError> {
        let socket = &mut self.socket;
        let links = links::all(socket).await.map_err(failed("reading the links"))?;
        let addresses = links::addresses(socket).await.map_err(failed("reading the addresses"))?;
        let mesh = links.iter().find(|link| link.name == interface.as_str());
        let index = mesh.map(|link| link.index);
        let mut found = ObservedNet::default();
        let mut main = Vec::new();
        for family in routes::FAMILIES {
            let ours = routes::table(socket, family, routing.table)
                .await
                .map_err(failed(format!("reading routing table {}", routing.table)))?;
            routes::sort(&ours, routing.protocol, index, &links, &mut found.routes);
            main.extend(
                routes::table(socket, family, u32::from(RouteHeader::RT_TABLE_MAIN))
                    .await
                    .map_err(failed("reading the main routing table"))?,
            );
            let rules =
                routes::rules(socket, family, routing).await.map_err(failed("reading the routing rules"))?;
            for rule in rules {
                match (rule, family) {
                    (routes::OurRule::Own(own, _), _) => drop(found.routes.own.insert(own)),
                    (routes::OurRule::Table(_), AddressFamily::Inet) => found.routes.rule_v4 = true,
                    (routes::OurRule::Table(_), _) => found.routes.rule_v6 = true,
                }
            }
        }
        found.link = mesh.map(|link| links::observed(link, &addresses));
        found.underlay = underlay::observed(&links, &addresses, &main, index);
        Ok(found)
    }

    async fn apply_link(
        &mut self,
        interface: &InterfaceName,
        change: &LinkChange,
    ) -> Result<(), BackendError> {
        let action = || match change {
            LinkChange::SetAlias => format!("marking {interface} as ours"),
            LinkChange::SetMtu(mtu) => format!("setting the MTU of {interface} to {mtu}"),
            LinkChange::AddAddress(net) => format!("adding address {net} to {interface}"),
            LinkChange::RemoveAddress(net) => format!("removing address {net} from {interface}"),
            LinkChange::SetUp => format!("bringing {interface} up"),
        };
        let link = self.find(interface).await?.ok_or_else(|| gone(action(), interface))?;
        let v6 = matches!(change, LinkChange::AddAddress(net) if net.addr().is_ipv6());
        match links::change(&mut self.socket, link.index, change).await {
            // A kernel WireGuard device binds its port only now.
            Err(e) if e.raw_os_error() == Some(errno::EADDRINUSE) && *change == LinkChange::SetUp => {
                Err(BackendError::failed(
                    action(),
                    "its UDP port is in use by another process: free it, or set `wireguard.listenPort` to another",
                ))
            }
            result => result.map_err(failed_family(action(), v6, interface)),
        }
    }

    async fn apply_route(
        &mut self,
        interface: &InterfaceName,
        routing: &Routing,
        change: &RouteChange,
    ) -> Result<(), BackendError> {
        let table = routing.table;
        match change {
            RouteChange::AddRule { v6 } => {
                let family = if *v6 { "IPv6" } else { "IPv4" };
                let action = format!("adding the {family} rule for routing table {table}");
                routes::add_rule(&mut self.socket, *v6, routing)
                    .await
                    .map_err(failed_family(action, *v6, interface))
            }
            RouteChange::AddOwn(rule) => {
                let to = rule.to();
                let action = format!("adding the rule for this node's own prefix {to}");
                let result = routes::add_own(&mut self.socket, rule, routing).await;
                result.map_err(failed_family(action, to.addr().is_ipv6(), interface))
            }
            RouteChange::RemoveOwn(rule) => routes::remove_own(&mut self.socket, rule, routing)
                .await
                .map_err(failed(format!("removing the rule for this node's own prefix {}", rule.to()))),
            RouteChange::Set(route) => {
                let action = format!("setting route {} in table {table}", route.to);
                let through = match &route.kind {
                    RouteKind::Mesh { .. } => Some(interface),
                    RouteKind::Cleartext { device, .. } => Some(device),
                    RouteKind::Throw | RouteKind::Blackhole => None,
                };
                let index = match through {
                    Some(name) => {
                        let link = self.find(name).await?;
                        Some(link.ok_or_else(|| gone(action.clone(), name))?.index)
                    }
                    None => None,
                };
                let v6 = route.to.addr().is_ipv6();
                let result = routes::set(&mut self.socket, route, index, routing).await;
                result.map_err(failed_family(action, v6, interface))
            }
            RouteChange::Remove(route) => {
                let kind = routes::route_type(&route.kind);
                routes::remove(&mut self.socket, route.to, route.kind.metric(), kind, routing)
                    .await
                    .map_err(failed(format!("removing route {} from table {table}", route.to)))
            }
            RouteChange::RemoveStray(stray) => {
                let kind = RouteType::from(stray.kind);
                routes::remove(&mut self.socket, stray.to, stray.metric, kind, routing)
                    .await
                    .map_err(failed(format!("removing stray route {} from table {table}", stray.to)))
            }
        }
    }

    async fn observe_vxlan(&mut self, name: &InterfaceName) -> Result<Option<ObservedVxlan>, BackendError> {
        vxlan::observe(&mut self.socket, name.as_str()).await.map_err(failed(format!("reading {name}")))
    }

    async fn own_vxlan(&mut self) -> Result<Vec<InterfaceName>, BackendError> {
        let links = links::all(&mut self.socket).await.map_err(failed("reading the links"))?;
        let ours = links.iter().filter(|link| link.is_marked() && link.kind.as_deref() == Some("vxlan"));
        Ok(ours.filter_map(|link| link.name.parse().ok()).collect())
    }

    async fn apply_vxlan(&mut self, config: &VxlanConfig, change: &VxlanChange) -> Result<(), BackendError> {
        let name = &config.name;
        let action = match change {
            VxlanChange::Create => {
                format!("making the VXLAN device {name} with VNI {} on UDP port {}", config.vni, config.port)
            }
            VxlanChange::Remove => format!("removing the VXLAN device {name}"),
            change => format!("changing the VXLAN device {name} ({change:?})"),
        };
        let index = match change {
            VxlanChange::Create => 0,
            _ => self.find(name).await?.ok_or_else(|| gone(action.clone(), name))?.index,
        };
        match vxlan::change(&mut self.socket, config, index, change).await {
            // Two devices of one VNI and port, or one that shares a port and wants other flags on its socket.
            Err(e) if [Some(errno::EEXIST), Some(errno::EADDRINUSE)].contains(&e.raw_os_error()) => {
                Err(BackendError::failed(
                    action,
                    "another device or program has them: set `vxlan.vni` or `vxlan.port`, the same at all nodes",
                ))
            }
            result => result.map_err(failed(action)),
        }
    }

    async fn remove_vxlan(&mut self, name: &InterfaceName) -> Result<(), BackendError> {
        match self.find(name).await? {
            Some(link) if link.is_marked() && link.kind.as_deref() == Some("vxlan") => {
                let removed = links::delete(&mut self.socket, link.index).await;
                removed.map_err(failed(format!("removing the VXLAN device {name}")))
            }
            _ => Ok(()),
        }
    }

    async fn remove_all(&mut self, routing: &Routing) -> Result<(), BackendError> {
        let socket = &mut self.socket;
        let table = routing.table;
        for family in routes::FAMILIES {
            let rules =
                routes::rules(socket, family, routing).await.map_err(failed("reading the routing rules"))?;
            for rule in rules {
                let (routes::OurRule::Table(rule) | routes::OurRule::Own(_, rule)) = rule;
                routes::remove_rule(socket, rule)
                    .await
                    .map_err(failed(format!("removing the rule for routing table {table}")))?;
            }
            let ours = routes::table(socket, family, table)
                .await
                .map_err(failed(format!("reading routing table {table}")))?;
            let protocol = RouteProtocol::from(routing.protocol);
            for message in ours.iter().filter(|message| message.header.protocol == protocol) {
                let Some(facts) = routes::facts(message) else { continue };
                routes::remove(socket, facts.to, facts.metric, message.header.kind, routing)
                    .await
                    .map_err(failed(format!("removing route {} from table {table}", facts.to)))?;
            }
        }
        Ok(())
    }
}

impl Netlink {
    async fn find(&mut self, interface: &InterfaceName) -> Result<Option<Link>, BackendError> {
        find_link(&mut self.socket, interface.as_str())
            .await
            .map_err(failed(format!("looking for {interface}")))
    }
}

fn gone(action: String, interface: &InterfaceName) -> BackendError {
    BackendError::failed(action, format_args!("there is no interface {interface}"))
}
