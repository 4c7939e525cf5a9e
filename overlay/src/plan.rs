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
use crate::prefix::PrefixIndex;
use crate::route::{Route, RouteKind, RouteTable};
use path::Resolution;

/// How packets reach a peer. More rungs follow; this one is always encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// WireGuard over UDP between the nodes' own endpoints.
    Direct,
}

impl PathKind {
    /// Its name, as plan and status tell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
        }
    }

    /// Whether packets on it are encrypted.
    pub fn is_encrypted(self) -> bool {
        match self {
            Self::Direct => true,
        }
    }
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
    /// Computes the plan. `peers` are admitted, so that no two hold the same key or overlapping prefixes. `reserved`
    /// are prefixes of nodes that are no peers (yet): nothing goes to them, least of all in clear.
    pub fn compute(
        local: &LocalNode,
        grants: &Grants,
        peers: &BTreeMap<NodeName, Peer>,
        reserved: &BTreeSet<IpNet>,
        resolved: &Resolution,
    ) -> Self {
        let mesh = mesh_prefixes(grants, peers, reserved);
        let through = PrefixIndex::new(mesh.iter().chain(&local.prefixes).map(|net| (*net, ())));
        let dialable = |to: &SocketAddr| {
            let ourselves = local.underlay_addresses.contains(&to.ip()) && to.port() == local.listen_port;
            through.holding(to.ip()).is_none() && !ourselves
        };
        let planned: BTreeMap<NodeName, PlannedPeer> = peers
            .iter()
            .map(|(name, peer)| (name.clone(), plan_peer(local, peer, resolved, &dialable)))
            .collect();
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
            routes: routes(local, grants, &planned, &mesh),
            guard: guard(local, grants, mesh),
            device,
            peers: planned,
        }
    }
}

fn plan_peer(
    local: &LocalNode,
    peer: &Peer,
    resolved: &Resolution,
    dialable: &impl Fn(&SocketAddr) -> bool,
) -> PlannedPeer {
    let mut candidates = path::candidates(local, peer, resolved);
    // A name may resolve to anything, also into the mesh itself.
    candidates.retain(dialable);
    let own = IpNet::from(IpAddr::V6(peer.address));
    PlannedPeer {
        site: peer.claim.site.clone(),
        public_key: peer.claim.public_key,
        path: PathKind::Direct,
        candidates,
        allowed_ips: peer.prefixes.iter().copied().chain([own]).collect(),
        mtu: mtu::route(local.underlay_mtu, peer.claim.mtu),
    }
}

/// All that may travel through the mesh only: the sites' grants, the mesh addresses, what nodes hold.
fn mesh_prefixes(
    grants: &Grants,
    peers: &BTreeMap<NodeName, Peer>,
    reserved: &BTreeSet<IpNet>,
) -> BTreeSet<IpNet> {
    (grants.sites.values().flatten().chain(reserved).copied())
        .chain([IpNet::V6(grants.mesh_prefix())])
        .chain(peers.values().flat_map(|p| p.prefixes.iter().copied()))
        .collect()
}

/// Protected addresses inside of a grant: the operator's word that they are none of the mesh.
fn outside<'a>(grants: &'a Grants, mesh: &'a BTreeSet<IpNet>) -> impl Iterator<Item = IpNet> + 'a {
    let inside = |ip: &&IpAddr| mesh.iter().any(|net| net.contains(*ip));
    grants.protected.iter().filter(inside).map(|ip| IpNet::from(*ip))
}

fn routes(
    local: &LocalNode,
    grants: &Grants,
    planned: &BTreeMap<NodeName, PlannedPeer>,
    mesh: &BTreeSet<IpNet>,
) -> RouteTable {
    let mut routes = BTreeMap::new();
    let mut add = |net: IpNet, kind: RouteKind| {
        routes.insert((net, kind.metric()), Route::new(net, kind));
    };
    for &net in mesh {
        add(net, RouteKind::Blackhole);
    }
    // What lies inside of a black-holed grant and is not for the mesh to carry is left to the main table.
    for net in local.prefixes.iter().copied().chain(outside(grants, mesh)) {
        add(net, RouteKind::Throw);
    }
    for peer in planned.values() {
        for &net in &peer.allowed_ips {
            add(net, RouteKind::Blackhole);
            add(net, RouteKind::Mesh { mtu: peer.mtu });
        }
    }
    RouteTable {
        routing: local.routing,
        interface: local.interface.clone(),
        routes: routes.into_values().collect(),
    }
}

fn guard(local: &LocalNode, grants: &Grants, mesh: BTreeSet<IpNet>) -> Guard {
    let local_prefixes = local.prefixes.iter().copied().chain(mesh_addresses(local, grants));
    Guard {
        interfaces: BTreeSet::from([local.interface.clone()]),
        underlay: local.underlay_interfaces.iter().filter(|i| **i != local.interface).cloned().collect(),
        local: IpNet::aggregate(&local_prefixes.collect()).into_iter().collect(),
        outside: outside(grants, &mesh).collect(),
        mesh: IpNet::aggregate(&mesh.into_iter().collect()).into_iter().collect(),
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
