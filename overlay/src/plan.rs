//! What this node has to look like, computed from what is known of all nodes.

pub mod mtu;
pub mod path;
pub mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_keyring::{NodeName, PublicKey, SiteName};
use serde::Serialize;

use crate::address::{self, Carried};
use crate::device::{DeviceConfig, DevicePeer};
use crate::endpoint::Endpoint;
use crate::exemption::Exemption;
use crate::guard::{Carriers, Cleartext, Exempt, Guard};
use crate::local::{Grants, InterfaceName, LocalNode};
use crate::path::{Candidate, Origin, PeerPaths, Rung};
use crate::peer::Peer;
use crate::prefix::{self, PrefixIndex};
use crate::route::{Route, RouteKind, RouteTable};
use crate::vxlan::{self, VxlanConfig};
use path::Resolution;

/// What the prober has found of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathChoice {
    /// The carrier in use.
    pub rung: Rung,
    /// The address in use; `None` while it does not answer.
    pub address: Option<SocketAddr>,
    /// The path MTU both ways, in bytes of IP, where it is known.
    pub mtu: Option<u16>,
    /// All addresses that are probed.
    pub probed: BTreeSet<SocketAddr>,
    /// How it sees us, if the path in use is a direct one that answers.
    pub seen_as: Option<SocketAddr>,
}

/// The prober's choices, by peer. A peer that is absent was reached nowhere yet.
pub type Paths = BTreeMap<PublicKey, PathChoice>;

/// One peer in the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedPeer {
    /// Its site.
    pub site: SiteName,
    /// Its key.
    pub public_key: PublicKey,
    /// The carrier.
    pub path: Rung,
    /// Whether packets to it are encrypted. Where one of the two cannot do WireGuard they are not, and without an exemption none goes.
    pub encrypted: bool,
    /// The exemption by which packets to it travel in clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exemption: Option<Exemption>,
    /// Where it is dialled, best first; empty when it has to dial us.
    pub candidates: Vec<SocketAddr>,
    /// All it may send from and be sent to.
    pub allowed_ips: BTreeSet<IpNet>,
    /// The MTU of routes to it, in bytes.
    pub mtu: u16,
    /// Every address at which the prober looks for it.
    #[serde(skip)]
    pub paths: PeerPaths,
}

/// The whole plan of one node. Equal input gives an equal plan, in whatever order it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshPlan {
    /// The node itself.
    pub node: NodeName,
    /// Addresses of the mesh interface.
    pub addresses: BTreeSet<IpNet>,
    /// Whether there is a WireGuard device.
    pub encrypts: bool,
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
    /// The VXLAN devices.
    pub vxlan: Vec<VxlanConfig>,
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
        paths: &Paths,
    ) -> Self {
        let mesh = mesh_prefixes(local, grants, peers, reserved);
        let through = PrefixIndex::new(mesh.iter().chain(&local.prefixes).map(|net| (*net, ())));
        let dialable = |to: &SocketAddr| {
            let ourselves = local.underlay_addresses.contains(&to.ip()) && to.port() == local.listen_port;
            through.holding(to.ip()).is_none() && !ourselves
        };
        let planned: BTreeMap<NodeName, PlannedPeer> = peers
            .iter()
            .map(|(name, peer)| (name.clone(), plan_peer(local, grants, peer, resolved, paths, &dialable)))
            .collect();
        let mut vxlan = Vec::new();
        for (carried, encrypted) in [(Carried::Wireguard, true), (Carried::Cleartext, false)] {
            let carries =
                |peer: &PlannedPeer| peer.encrypted == encrypted && (encrypted || peer.exemption.is_some());
            if encrypted && local.encrypts || planned.values().any(carries) {
                let carried_to = peers.iter().filter(|(name, _)| carries(&planned[*name]));
                let remotes = carried_to.map(|(name, peer)| {
                    (peer, planned[name].candidates.iter().map(SocketAddr::ip).collect::<Vec<_>>())
                });
                vxlan.extend(vxlan::plan(local, grants, carried, remotes));
            }
        }
        let addresses = mesh_addresses(local, grants);
        if let Some(device) = vxlan.first_mut().filter(|_| !local.encrypts) {
            device.addresses.extend(&addresses);
        }
        let device = DeviceConfig {
            listen_port: local.listen_port,
            peers: planned
                .values()
                .filter(|peer| peer.encrypted)
                .map(|p| {
                    let peer = DevicePeer {
                        candidates: p.candidates.clone(),
                        chosen: paths.get(&p.public_key).and_then(|path| path.address),
                        probed: paths.get(&p.public_key).map(|path| path.probed.clone()).unwrap_or_default(),
                        allowed_ips: p.allowed_ips.clone(),
                        keepalive: local.keepalive,
                    };
                    (p.public_key, peer)
                })
                .collect(),
        };
        Self {
            node: local.name.clone(),
            encrypts: local.encrypts,
            mtu: mtu::device(local.underlay_mtu),
            routes: routes(
                local,
                grants,
                &planned,
                &mesh,
                &Clear { vxlan: &vxlan, addresses: &addresses, paths },
            ),
            guard: guard(local, grants, mesh, &vxlan, &planned),
            addresses,
            device,
            peers: planned,
            vxlan,
        }
    }
}

fn plan_peer(
    local: &LocalNode,
    grants: &Grants,
    peer: &Peer,
    resolved: &Resolution,
    paths: &Paths,
    dialable: &impl Fn(&SocketAddr) -> bool,
) -> PlannedPeer {
    let mut candidates = path::candidates(local, peer, resolved);
    // A name may resolve to anything, also into the mesh itself.
    candidates.retain(dialable);
    let own = IpNet::from(IpAddr::V6(peer.address));
    let encrypted = local.encrypts && peer.claim.encrypts;
    let exemption = exemption(local, grants, peer).filter(|_| !encrypted);
    let found = paths.get(&peer.claim.public_key);
    let paths = if encrypted || exemption.is_some() {
        probed(local, grants, peer, &candidates, encrypted)
    } else {
        PeerPaths::default()
    };
    let rung = if encrypted { found.map_or(Rung::Direct, |path| path.rung) } else { Rung::Cleartext };
    // What our side can put on the carrier, before anything was measured.
    let on_rung = paths.candidates.iter().filter(|one| one.rung == rung);
    let most = on_rung.map(|one| one.mtu_most).min();
    let measured = found.filter(|path| path.rung == rung).and_then(|path| path.mtu);
    let mtu = if encrypted {
        let most = most.filter(|_| rung != Rung::Direct);
        mtu::route(local.underlay_mtu, peer.claim.mtu.into_iter().chain(measured).chain(most).min())
    } else {
        most.into_iter().chain(measured).min().unwrap_or(0).max(1280)
    };
    PlannedPeer {
        site: peer.claim.site.clone(),
        public_key: peer.claim.public_key,
        path: rung,
        encrypted,
        exemption,
        paths,
        candidates,
        allowed_ips: peer.prefixes.iter().copied().chain([own]).collect(),
        mtu,
    }
}

/// The exemption in force for a peer; of several the one that ends last.
fn exemption(local: &LocalNode, grants: &Grants, peer: &Peer) -> Option<Exemption> {
    let pair = ((&local.name, &local.site), (&peer.name, &peer.claim.site));
    let covering = grants.exemptions.iter().filter(|exemption| exemption.covers(pair.0, pair.1));
    covering.max_by_key(|exemption| exemption.expires()).cloned().filter(|_| local.vxlan.is_some())
}

/// The addresses at which the prober looks for a peer: what it published, and its place on each VXLAN device. Where packets travel in clear
/// that place is all.
fn probed(
    local: &LocalNode,
    grants: &Grants,
    peer: &Peer,
    candidates: &[SocketAddr],
    encrypted: bool,
) -> PeerPaths {
    let theirs = peer.claim.mtu.unwrap_or(u16::MAX);
    let most = local.underlay_mtu.min(theirs);
    let direct =
        |address: SocketAddr, origin| Candidate { address, rung: Rung::Direct, origin, mtu_most: most };
    let published = candidates.iter().map(|address| direct(*address, Origin::Published));
    let reflexive = peer.claim.reflexive_endpoints.iter().filter_map(|endpoint| match endpoint {
        // Inside of a site nobody is behind a NAT from another.
        Endpoint::Address(address) if peer.claim.site != local.site && !candidates.contains(address) => {
            Some(direct(*address, Origin::Reflexive))
        }
        _ => None,
    });
    let reflexive = reflexive.take(path::REFLEXIVE_MOST);
    let (carried, rung) =
        if encrypted { (Carried::Wireguard, Rung::Vxlan) } else { (Carried::Cleartext, Rung::Cleartext) };
    let carriers = [false, true].into_iter().filter_map(|outer_v6| {
        local.vxlan.as_ref()?;
        // It listens on VXLAN at one of the addresses at which it is dialled, and for WireGuard where it does anyway.
        let outside = candidates.iter().find(|to| to.is_ipv6() == outer_v6)?;
        let inner = address::carrier_address(&grants.mesh, &peer.claim.site, &peer.name, carried, outer_v6);
        Some(Candidate {
            address: SocketAddr::new(IpAddr::V6(inner), outside.port()),
            rung,
            origin: Origin::Carrier,
            mtu_most: most.saturating_sub(vxlan::overhead(outer_v6)),
        })
    });
    let direct = published.chain(reflexive).filter(|_| encrypted);
    PeerPaths {
        candidates: direct.chain(carriers).collect(),
        mtu_most: if encrypted { most } else { 0 },
        inside: if encrypted { inside(local, grants, peer) } else { Vec::new() },
        asking: if encrypted { asking(peer) } else { Vec::new() },
    }
}

/// Between which mesh addresses packets have to go through the tunnel: of each family in which both nodes hold pods. Nodes
/// without such a family have their IPv6 addresses alone.
fn inside(local: &LocalNode, grants: &Grants, peer: &Peer) -> Vec<(IpAddr, IpAddr)> {
    let v4 = |nets: &[IpNet]| nets.iter().find(|net| net.addr().is_ipv4()).map(IpNet::network);
    let holds_v6 = |nets: &[IpNet]| nets.iter().any(|net| net.addr().is_ipv6());
    let v4 = v4(&local.prefixes).zip(v4(&peer.prefixes));
    let v6 = (IpAddr::V6(local.address(&grants.mesh)), IpAddr::V6(peer.address));
    let both = holds_v6(&local.prefixes) && holds_v6(&peer.prefixes);
    v4.into_iter().chain((both || v4.is_none()).then_some(v6)).collect()
}

/// The addresses that a peer may ask from inside of the tunnel: which of its IPv4 prefixes is its first, others do not know.
fn asking(peer: &Peer) -> Vec<IpAddr> {
    let v4 = peer.prefixes.iter().filter(|net| net.addr().is_ipv4()).map(IpNet::network);
    [IpAddr::V6(peer.address)].into_iter().chain(v4).collect()
}

/// All that may travel through the mesh only: the sites' grants, the mesh addresses, what nodes hold. What is
/// reserved inside of a prefix that somebody holds is protected by that, and its blackhole would take a part
/// of it from its holder.
fn mesh_prefixes(
    local: &LocalNode,
    grants: &Grants,
    peers: &BTreeMap<NodeName, Peer>,
    reserved: &BTreeSet<IpNet>,
) -> BTreeSet<IpNet> {
    let held = peers.values().flat_map(|peer| &peer.prefixes).chain(&local.prefixes).chain(&local.former);
    let held: BTreeSet<IpNet> = held.copied().collect();
    let reserved = reserved.iter().filter(|net| !prefix::within(net, &held));
    (grants.sites.values().flatten().chain(reserved).copied())
        .chain([IpNet::V6(grants.mesh_prefix())])
        .chain(peers.values().flat_map(|p| p.prefixes.iter().copied()))
        .collect()
}

/// Protected addresses inside of a grant, and the underlay's that the operator has named: they are none of
/// the mesh. Nothing else, least of all an address that was merely observed, opens a hole.
fn outside<'a>(
    local: &'a LocalNode,
    grants: &'a Grants,
    mesh: &'a BTreeSet<IpNet>,
) -> impl Iterator<Item = IpNet> + 'a {
    let inside = |ip: &&IpAddr| mesh.iter().any(|net| net.contains(*ip));
    grants.protected.iter().chain(&local.holes).filter(inside).map(|ip| IpNet::from(*ip))
}

fn routes(
    local: &LocalNode,
    grants: &Grants,
    planned: &BTreeMap<NodeName, PlannedPeer>,
    mesh: &BTreeSet<IpNet>,
    clear: &Clear<'_>,
) -> RouteTable {
    let mut routes = BTreeMap::new();
    let mut add = |net: IpNet, kind: RouteKind| {
        routes.insert((net, kind.metric()), Route::new(net, kind));
    };
    for &net in mesh {
        add(net, RouteKind::Blackhole);
    }
    // What lies inside of a black-holed grant and is not for the mesh to carry is left to the main table.
    let own = local.prefixes.iter().chain(&local.former).copied();
    for net in own.clone().chain(outside(local, grants, mesh)) {
        add(net, RouteKind::Throw);
    }
    for peer in planned.values() {
        let hop = clear.hop(peer);
        for &net in &peer.allowed_ips {
            add(net, RouteKind::Blackhole);
            let of_family = |ip: &IpAddr| ip.is_ipv6() == net.addr().is_ipv6();
            match hop {
                _ if peer.encrypted => add(net, RouteKind::Mesh { mtu: peer.mtu }),
                Some((device, via)) => {
                    let source = clear.addresses.iter().map(IpNet::addr).find(of_family);
                    add(net, RouteKind::Cleartext { device, via, source, mtu: peer.mtu });
                }
                None => {}
            }
        }
    }
    RouteTable {
        routing: local.routing,
        interface: local.interface,
        routes: routes.into_values().collect(),
        own: own.collect(),
    }
}

/// What there is for packets in clear: devices, our addresses, and what the prober has found.
struct Clear<'a> {
    vxlan: &'a [VxlanConfig],
    addresses: &'a BTreeSet<IpNet>,
    paths: &'a Paths,
}

impl Clear<'_> {
    /// The device for packets in clear to an exempt peer, and the peer's address on it: the one that answers, if one does.
    fn hop(&self, peer: &PlannedPeer) -> Option<(InterfaceName, Ipv6Addr)> {
        let used = self.paths.get(&peer.public_key).and_then(|path| path.address).map(|address| address.ip());
        let offered = peer.paths.candidates.iter().filter(|one| one.rung == Rung::Cleartext);
        let offered = offered.map(|one| one.address.ip());
        let chosen = offered.clone().filter(|address| Some(*address) == used);
        chosen.chain(offered).find_map(|address| {
            let IpAddr::V6(via) = address else { return None };
            let device = self.vxlan.iter().find(|device| device.neighbours.contains_key(&via))?;
            Some((device.name, via))
        })
    }
}

fn guard(
    local: &LocalNode,
    grants: &Grants,
    mesh: BTreeSet<IpNet>,
    vxlan: &[VxlanConfig],
    planned: &BTreeMap<NodeName, PlannedPeer>,
) -> Guard {
    let own = local.prefixes.iter().chain(&local.former).copied();
    let held = own.chain(mesh_addresses(local, grants));
    let held: BTreeSet<IpNet> = IpNet::aggregate(&held.collect()).into_iter().collect();
    let names = |carried: Carried| -> BTreeSet<InterfaceName> {
        let prefix = address::carrier_prefix(&grants.mesh, carried);
        let inside =
            |device: &&VxlanConfig| device.addresses.iter().any(|net| IpNet::V6(prefix).contains(net));
        vxlan.iter().filter(inside).map(|device| device.name).collect()
    };
    let carriers =
        Some(names(Carried::Wireguard)).filter(|names| !names.is_empty()).map(|interfaces| Carriers {
            interfaces,
            prefix: address::carrier_prefix(&grants.mesh, Carried::Wireguard),
            port: local.listen_port,
        });
    let mut exempt = BTreeMap::<i64, Exempt>::new();
    for peer in planned.values() {
        let Some(exemption) = &peer.exemption else { continue };
        let until = exempt.entry(exemption.expires().as_second()).or_default();
        until.prefixes.extend(&peer.allowed_ips);
        until.remotes.extend(peer.candidates.iter().map(|to| IpNet::from(to.ip())));
    }
    let cleartext = local.vxlan.as_ref().map(|vxlan| Cleartext {
        local: held.clone(),
        interfaces: names(Carried::Cleartext),
        prefix: address::carrier_prefix(&grants.mesh, Carried::Cleartext),
        port: local.listen_port,
        vxlan_port: vxlan.port,
        vni: vxlan.vni(Carried::Cleartext),
        underlay: local.underlay_links.clone(),
        exempt,
    });
    Guard {
        carriers,
        cleartext,
        interfaces: if local.encrypts { BTreeSet::from([local.interface]) } else { BTreeSet::new() },
        pod_kinds: local.pod_kinds.clone(),
        underlay: local.underlay_links.clone(),
        local: held,
        outside: outside(local, grants, &mesh).collect(),
        mesh: IpNet::aggregate(&mesh.into_iter().collect()).into_iter().collect(),
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
