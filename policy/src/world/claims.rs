//! Which pod has an address. A pod's status is its node's word, and a node speaks for its own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Node, World};
use crate::object::{Key, Pod};

/// The pods whose status names an address.
#[derive(Debug, Clone, Default)]
pub(super) struct Claim {
    pub(super) keys: BTreeSet<Key>,
    pub(super) holder: Option<Key>,
}

/// How much a claim is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    /// The address is one of the pod's own node.
    Own,
    /// It is nobody's, and such addresses count.
    Free,
    /// It does not count.
    Nothing,
}

/// An address of a node's status that does not count, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) node: String,
    pub(super) address: IpAddr,
    why: String,
}

impl World {
    fn worth(&self, pod: &Pod, address: IpAddr) -> Worth {
        match (self.node_of(address), pod.node.as_deref()) {
            (Some(owner), Some(node)) if owner == node => Worth::Own,
            (None, Some(_)) | (_, None) if self.outside && self.node_at(address).is_none() => Worth::Free,
            _ => Worth::Nothing,
        }
    }

    /// Decides who has an address. Returns whether that is somebody else than before.
    pub(super) fn settle(&mut self, address: IpAddr) -> bool {
        let Some(claim) = self.claims.get(&address) else {
            return false;
        };
        let claims: Vec<(Worth, Arc<Pod>)> = claim
            .keys
            .iter()
            .filter_map(|key| self.pods.get(key))
            .map(|pod| (self.worth(pod, address), Arc::clone(pod)))
            .collect();
        let of = |worth: Worth| claims.iter().filter(move |(own, _)| *own == worth).map(|(_, pod)| pod);
        let age = |pod: &&Arc<Pod>| (pod.created.clone(), pod.uid.clone(), pod.key.clone());
        // Among nodes the one that had it first keeps it. On one node it belongs to the newest: it can only
        // have been free by then.
        let first = of(Worth::Own).next().or_else(|| of(Worth::Free).min_by_key(age));
        let is_kin = |pod: &&Arc<Pod>| first.is_some_and(|first| first.node == pod.node);
        let kin = of(Worth::Own).chain(of(Worth::Free)).filter(is_kin);
        let holder = kin.max_by_key(|pod| (!pod.terminating, age(pod)));
        let node = holder.map(|pod| pod.node.clone());
        let holder = holder.map(|pod| pod.key.clone());
        for (worth, pod) in &claims {
            let key = (pod.key.clone(), address);
            match *worth == Worth::Nothing || node.as_ref() != Some(&pod.node) {
                true => self.refused.insert(key),
                false => self.refused.remove(&key),
            };
        }
        let Some(claim) = self.claims.get_mut(&address) else { return false };
        std::mem::replace(&mut claim.holder, holder.clone()) != holder
    }

    /// Decides who has each address. Returns those that somebody else has now.
    pub(super) fn settle_all(&mut self) -> BTreeSet<IpAddr> {
        let all: Vec<IpAddr> = self.claims.keys().copied().collect();
        all.into_iter().filter(|address| self.settle(*address)).collect()
    }

    /// Returns how many addresses of pods and nodes do not count.
    pub fn refused_addresses(&self) -> usize {
        self.refused.len() + self.refused_status.len()
    }

    /// Tells which addresses of pods and nodes do not count, each with the remedy.
    pub fn address_refusals(&self) -> impl Iterator<Item = String> {
        let pods = self.refused.iter().map(|(key, address)| {
            let pod = self.pods.get(key);
            let node = pod.and_then(|pod| pod.node.as_deref()).unwrap_or("(none)");
            match (self.node_of(*address), self.holder(*address)) {
                (Some(owner), _) => format!(
                    "Pod {key} on node {node}: status.podIPs: {address} does not count, because it is of node \
                     {owner}: delete the pod, and find out what runs as the kubelet of {node}"
                ),
                (None, Some(holder)) => format!(
                    "Pod {key} on node {node}: status.podIPs: {address} does not count, because Pod {} of \
                     another node has had it for longer: delete the one of them that does not have it",
                    holder.key
                ),
                (None, None) => format!(
                    "Pod {key} on node {node}: status.podIPs: {address} does not count, because it lies in no \
                     prefix of its node: grant the node its prefixes (spec.podCIDRs, or a MeshNode of its name), \
                     or set policy.outsidePrefixes: allow"
                ),
            }
        });
        let nodes = self.refused_status.iter().map(|Refused { node, address, why }| {
            format!(
                "Node {node}: status.addresses: {address} does not count, because it {why}: correct the node's \
                 address (kubelet --node-ip), or find out what runs as its kubelet"
            )
        });
        pods.chain(nodes)
    }

    /// Takes the addresses out of the nodes' status that no node can have.
    pub(super) fn refuse_status(&self, nodes: &mut BTreeMap<String, Node>) -> Vec<Refused> {
        let mut refused = Vec::new();
        for (name, node) in nodes {
            node.status_addresses.retain(|address| {
                let why = self.impossible(name, *address);
                let refusal = why.map(|why| Refused { node: name.clone(), address: *address, why });
                let counts = refusal.is_none();
                refused.extend(refusal);
                counts
            });
        }
        refused
    }

    fn impossible(&self, node: &str, address: IpAddr) -> Option<String> {
        if is_special(address) {
            return Some("is special".to_owned());
        }
        match (self.node_at(address), self.node_of(address)) {
            // One that it has in the mesh.
            (Some(own), _) if own == node => None,
            (Some(other), _) => Some(format!("is node {other}'s in the mesh")),
            (None, Some(other)) => Some(format!("lies in a prefix of node {other}")),
            (None, None) => {
                let net = self.mesh.iter().find(|net| net.contains(&address))?;
                Some(format!("lies in {net}, which is the mesh's"))
            }
        }
    }
}

fn is_special(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local
}

/// What the mesh's prefixes are, and whether pods have addresses in no node's.
impl World {
    /// Sets the prefixes of the mesh, and whether an address in no node's prefixes counts as the word of
    /// the pod that says so. Counts from the next [`World::set_nodes`] on.
    pub fn set_bounds(&mut self, mesh: &BTreeSet<IpNet>, outside: bool) {
        if (&self.mesh, self.outside) != (mesh, outside) {
            (self.mesh, self.outside, self.unbound) = (mesh.clone(), outside, true);
        }
    }
}

#[cfg(test)]
#[path = "claims/tests.rs"]
mod tests;
