//! What this node has to look like, computed from what is known of all nodes.

pub mod mtu;
pub mod path;
pub mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_keyring::{NodeName, PublicKey, SiteName};
use serde::Serialize;

use crate::device::{DeviceConfig, DevicePeer};
use crate::guard::Guard;
use crate::local::{Grants, LocalNode};
use crate::peer::Peer;
use crate::prefix;
use crate::route::{Route, RouteKind, RouteTable};
use path::Resolution;

/// How packets reach a peer. More rungs follow; this one is always encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// WireGuard over UDP between the nodes' own endpoints.
    Direct,
}

/// One peer in the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedPeer {
    /// Its site.
    pub site: SiteName,
    /// Its key.
    pub public_key: PublicKey,
    /// The carrier.
    pub path: PathKind,
    /// Where it is dialled, best first; empty when it has to dial us.
    pub candidates: Vec<SocketAddr>,
    /// All it may send from and be sent to.
    pub allowed_ips: BTreeSet<IpNet>,
    /// The MTU of routes to it, in bytes.
    pub mtu: u16,
}

/// The whole plan of one node. Equal input gives an equal plan, in whatever order it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshPlan {
    /// The node itself.
    pub node: NodeName,
    /// Addresses of the mesh interface.
    pub addresses: BTreeSet<IpNet>,
    /// MTU of the mesh interface, in bytes.
    pub mtu: u16,
    /// All peers by name.
    pub peers: BTreeMap<NodeName, PlannedPeer>,
    /// The WireGuard device.
    pub device: DeviceConfig,
    /// Our routing table.
    pub routes: RouteTable,
    /// What keeps mesh packets off the underlay.
    pub guard: Guard,
}

/// The addresses a node has on the mesh: the derived IPv6 one, and where it holds IPv4 pods the first address of
/// that prefix, which no pod uses.
pub fn mesh_addresses(local: &LocalNode, grants: &Grants) -> BTreeSet<IpNet> {
    let v6 = IpNet::V6(Ipv6Net::from(local.address(&grants.mesh)));
    let v4 = local.prefixes.iter().find_map(|net| match net {
        IpNet::V4(net) => Some(IpNet::V4(Ipv4Net::from(net.network()))),
        IpNet::V6(_) => None,
    });
    [v6].into_iter().chain(v4).collect()
}

impl MeshPlan {
    /// Computes the plan. `peers` are admitted, so that no two hold the same key or overlapping prefixes.
    pub fn compute(
        local: &LocalNode,
        grants: &Grants,
        peers: &BTreeMap<NodeName, Peer>,
        resolved: &Resolution,
    ) -> Self {
        let planned: BTreeMap<NodeName, PlannedPeer> =
            peers.iter().map(|(name, peer)| (name.clone(), plan_peer(local, peer, resolved))).collect();
        let device = DeviceConfig {
            listen_port: local.listen_port,
            peers: planned
                .values()
                .map(|p| {
                    let peer = DevicePeer {
                        candidates: p.candidates.clone(),
                        allowed_ips: p.allowed_ips.clone(),
                        keepalive: local.keepalive,
                    };
                    (p.public_key, peer)
                })
                .collect(),
        };
        Self {
            node: local.name.clone(),
            addresses: mesh_addresses(local, grants),
            mtu: mtu::device(local.underlay_mtu),
            routes: routes(local, grants, &planned),
            guard: guard(local, grants, &planned),
            device,
            peers: planned,
        }
    }
}

fn plan_peer(local: &LocalNode, peer: &Peer, resolved: &Resolution) -> PlannedPeer {
    let own = IpNet::from(IpAddr::V6(peer.address));
    PlannedPeer {
        site: peer.claim.site.clone(),
        public_key: peer.claim.public_key,
        path: PathKind::Direct,
        candidates: path::candidates(local, peer, resolved),
        allowed_ips: peer.prefixes.iter().copied().chain([own]).collect(),
        mtu: mtu::route(local.underlay_mtu, peer.claim.mtu),
    }
}

/// All that may travel through the mesh only: the sites' grants, the mesh addresses, what peers hold.
fn mesh_prefixes(grants: &Grants, planned: &BTreeMap<NodeName, PlannedPeer>) -> BTreeSet<IpNet> {
    (grants.sites.values().flatten().copied())
        .chain([IpNet::V6(grants.mesh_prefix())])
        .chain(planned.values().flat_map(|p| p.allowed_ips.iter().copied()))
        .collect()
}

fn routes(local: &LocalNode, grants: &Grants, planned: &BTreeMap<NodeName, PlannedPeer>) -> RouteTable {
    let mut routes = BTreeMap::new();
    for net in mesh_prefixes(grants, planned) {
        routes.insert((net, RouteKind::Blackhole.metric()), Route::new(net, RouteKind::Blackhole));
    }
    // Our own prefixes lie inside of a grant that is black-holed; `throw` leaves them to the main table.
    for &net in &local.prefixes {
        routes.insert((net, RouteKind::Throw.metric()), Route::new(net, RouteKind::Throw));
    }
    for peer in planned.values() {
        for &net in &peer.allowed_ips {
            let kind = RouteKind::Mesh { mtu: peer.mtu };
            routes.insert((net, kind.metric()), Route::new(net, kind));
        }
    }
    RouteTable {
        routing: local.routing,
        interface: local.interface.clone(),
        routes: routes.into_values().collect(),
    }
}

fn guard(local: &LocalNode, grants: &Grants, planned: &BTreeMap<NodeName, PlannedPeer>) -> Guard {
    let wide: Vec<IpNet> = IpNet::aggregate(&mesh_prefixes(grants, planned).into_iter().collect());
    let own_addresses = mesh_addresses(local, grants);
    let local_prefixes = local.prefixes.iter().copied().chain(own_addresses);
    let inside = |net: &IpNet| wide.iter().any(|w| prefix::overlap(w, net));
    Guard {
        interfaces: BTreeSet::from([local.interface.clone()]),
        local: IpNet::aggregate(&local_prefixes.filter(inside).collect()).into_iter().collect(),
        mesh: wide.into_iter().collect(),
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
