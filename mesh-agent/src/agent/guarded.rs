//! Keeps in the guard what nobody holds any more, and what the network tries to take out of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_keyring::NodeName;
use mesh_overlay::link::ObservedUnderlay;
use mesh_overlay::{Admission, Grants, Kept, LocalNode, MeshPlan, Ratchet, prefix};

use super::Agent;
use crate::registry::{Problem, Snapshot};

/// How often prefixes that nobody holds are made older.
const OLDER: Duration = Duration::from_secs(60);
/// The most addresses of the underlay inside of the mesh that are named.
const INTRUDERS_MOST: usize = 8;

/// Returns who holds what now: this node, others, and what sites were granted (with `sites`).
pub(super) fn held(
    local: &LocalNode,
    grants: &Grants,
    admission: &Admission,
    sites: bool,
) -> BTreeMap<IpNet, String> {
    let sites = grants.sites.iter().filter(|_| sites);
    let of_sites = sites.flat_map(|(site, nets)| nets.iter().map(move |net| (*net, format!("site {site}"))));
    let peers = admission.peers.values();
    let of_peers = peers.flat_map(|peer| peer.prefixes.iter().map(|net| (*net, peer.name.to_string())));
    let reserved = admission.reserved.iter().map(|(net, name)| (*net, name.to_string()));
    let own = local.prefixes.iter().map(|net| (*net, local.name.to_string()));
    of_sites.chain(reserved).chain(of_peers).chain(own).collect()
}

/// Returns what nobody holds any more: what this node held itself, where it meets nobody else's, and the rest.
pub(super) fn kept(
    guarded: &Ratchet,
    held: &BTreeMap<IpNet, String>,
    own: &NodeName,
) -> (BTreeMap<IpNet, Kept>, BTreeMap<IpNet, Kept>) {
    let nets: BTreeSet<IpNet> = held.keys().copied().collect();
    let kept = guarded.beyond(&nets);
    let alone = |net: &IpNet| {
        let others = held.iter().filter(|(_, holder)| !holder.starts_with("site "));
        !others.clone().any(|(other, _)| prefix::overlap(net, other))
    };
    // Grants of sites surround everything; what lies in one is guarded by it, but may be ours to reach.
    let within = guarded.beyond(&others(held));
    let former = within
        .into_iter()
        .filter(|(net, kept)| kept.holder == own.as_str() && !held.contains_key(net) && alone(net));
    let former: BTreeMap<IpNet, Kept> = former.collect();
    let rest = kept.into_iter().filter(|(net, _)| !former.contains_key(net)).collect();
    (former, rest)
}

fn others(held: &BTreeMap<IpNet, String>) -> BTreeSet<IpNet> {
    held.iter().filter(|(_, holder)| !holder.starts_with("site ")).map(|(net, _)| *net).collect()
}

/// Reports addresses that appeared on the underlay inside of a prefix of the mesh. They take nothing from its guard.
pub(super) fn intruders(underlay: &ObservedUnderlay, local: &LocalNode, plan: &MeshPlan) -> Vec<String> {
    let links = underlay.links.iter().filter(|(index, _)| local.underlay_links.contains(index));
    let all = links.flat_map(|(_, link)| link.addresses.keys().map(|ip| (ip, link.name.as_str())));
    let inside = |ip: &IpAddr| plan.guard.mesh.iter().chain(&plan.guard.local).find(|net| net.contains(ip));
    let found = all.filter_map(|(ip, name)| Some((ip, name, inside(ip)?)));
    found
        .take(INTRUDERS_MOST)
        .map(|(ip, name, net)| {
            let shown: String = name.chars().take(15).filter(|c| !c.is_control()).collect();
            let holder = plan.peers.iter().find(|(_, peer)| peer.allowed_ips.iter().any(|net| net.contains(ip)));
            let holder = holder.map(|(name, _)| format!(" of node {name}")).unwrap_or_default();
            let does = if local.holes.contains(ip) {
                "the guard lets this address alone, since underlay.interfaces names its interface".to_owned()
            } else {
                format!(
                    "guard and tunnel stay as they are, and what the network has there is cut off; give {shown} \
                     another address, or name it in underlay.interfaces if it is right"
                )
            };
            format!("{ip} on {shown}, an underlay address of this node, lies inside of {net}{holder}: {does}")
        })
        .collect()
}

impl Agent {
    /// Remembers what is guarded now. Where the registry was read in full, what nobody holds gets older.
    pub(super) fn remember_guarded(&mut self, held: &BTreeMap<IpNet, String>, complete: bool, now: Instant) {
        let full = complete && self.is_synced();
        let since = *self.sighted.get_or_insert(now);
        let elapsed = now.saturating_duration_since(since);
        let older = full && elapsed >= OLDER;
        if older || !full {
            self.sighted = Some(now);
        }
        let (elapsed, grace) =
            if older { (elapsed, self.config.guard.grace()) } else { (Duration::ZERO, None) };
        self.held = held.keys().copied().collect();
        for (net, kept) in self.last_good.guarded.sight(held, elapsed, grace) {
            let why = "the guard lets go of a prefix: its grace is over, or too many of its region are kept";
            tracing::warn!(%net, holder = kept.holder, "{why}");
        }
    }

    /// Keeps a DNS answer from opening the guard: an address that only the API server's name leads to, and that lies
    /// in what is guarded already, is let alone only if it was before.
    pub(super) fn leave_guarded(&self, snapshot: &mut Snapshot) {
        let peers = self.last_good.peers.0.values();
        let guarded: Vec<IpNet> = peers
            .flat_map(|peer| peer.prefixes.iter().chain(&peer.withheld))
            .chain(&self.last_good.accepted)
            .copied()
            .collect();
        for ip in std::mem::take(&mut snapshot.named) {
            let known = self.last_good.servers.contains(&ip);
            let Some(net) = guarded.iter().find(|net| net.contains(&ip)).filter(|_| !known) else { continue };
            snapshot.servers.remove(&ip);
            let text = format!(
                "the API server's name leads to {ip}, which lies inside of {net}: it stays guarded; if it is right, add it to \
                 protectedAddresses"
            );
            snapshot.problems.push(Problem { node: None, text });
        }
    }

    /// Releases a prefix, or all that a node or `site NAME` held last, from the guard; returns what was released.
    /// A prefix that somebody holds stays.
    pub fn release(&mut self, name: &str) -> Vec<IpNet> {
        self.last_good.guarded.release(name, &self.held)
    }
}
