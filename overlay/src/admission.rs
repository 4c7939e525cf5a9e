//! Which nodes become peers, and with which prefixes.
//!
//! Every node is judged alone first, then against the others. Where two nodes collide, the one that held the
//! key or prefix before keeps it: copying a victim's key or prefix into another Node object takes nothing from
//! the victim. Where nobody held it, nobody gets it. A refusal is typed, names its node, and touches no other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_keyring::{NodeName, PublicKey, SiteName};
use serde::{Deserialize, Serialize};

use crate::address;
use crate::advertisement::{Advertisement, AdvertisementError, SITE_LABEL};
use crate::endpoint::Endpoint;
use crate::local::{Grants, LocalNode};
use crate::peer::Peer;
use crate::prefix::{self, PrefixIndex};

/// The most prefixes that one node can hold.
pub const PREFIXES_MOST: usize = 16;
/// The most prefixes that are guarded of a node that was granted more than it can hold.
const GUARDED_MOST: usize = 256;

/// A Node object as the registry yields it, not yet judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// `metadata.name`.
    pub name: NodeName,
    /// The operator's label `sennit.dev/site`; where present, the node's claim has to agree.
    pub site_label: Option<SiteName>,
    /// `spec.podCIDRs`, as written.
    pub pod_cidrs: Vec<String>,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// Why a node, or a part of what it claims or was granted, was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The annotations cannot be read.
    #[error("{0}")]
    Malformed(#[from] AdvertisementError),
    /// Another key with an earlier generation than one seen before.
    #[error(
        "annotation sennit.dev/epoch went back from {seen} to {claimed} with another key: an old claim was replayed; where the node \
         was installed anew, run `mesh-agent rekey --after {seen}` on it"
    )]
    RolledBack {
        /// The highest epoch seen.
        seen: u64,
        /// The epoch claimed now.
        claimed: u64,
    },
    /// Another key under the same epoch.
    #[error(
        "annotation sennit.dev/public-key changed while the epoch stayed {0}: a new key needs a later epoch; run `mesh-agent rekey` \
         on the node"
    )]
    KeyChanged(u64),
    /// The key belongs to another node.
    #[error("annotation sennit.dev/public-key: the key belongs to node {0}, which held it first")]
    KeyTaken(NodeName),
    /// Several nodes claim a key that nobody held before.
    #[error("annotation sennit.dev/public-key: nodes {} claim the same key", names(.0))]
    KeyContested(Vec<NodeName>),
    /// The site claimed is not the one that the operator labelled.
    #[error(
        "annotation sennit.dev/site says {claimed}, and the operator says {label} (a cluster's Node without the label \
         {SITE_LABEL} counts as {label}): set that label, or `site` in the node's agent.yaml"
    )]
    Site {
        /// What the node says.
        claimed: SiteName,
        /// What the operator says.
        label: SiteName,
    },
    /// The site is not one that the operator named.
    #[error("site {0} has no entry under `sites` of agent.yaml or the Mesh")]
    UnknownSite(SiteName),
    /// Not a prefix.
    #[error("spec.podCIDRs: {0:?} is no prefix such as 10.1.0.0/24")]
    NoPrefix(String),
    /// Too many prefixes.
    #[error("spec.podCIDRs has {0} entries; at most {PREFIXES_MOST} are granted")]
    TooManyPrefixes(usize),
    /// A prefix that nobody may hold.
    #[error("spec.podCIDRs: {0} is not granted to anybody: {1}")]
    PrefixForbidden(IpNet, String),
    /// A prefix that holds a protected address.
    #[error("spec.podCIDRs: {0} holds the protected address {1}")]
    PrefixProtected(IpNet, IpAddr),
    /// A prefix outside of the site's grant.
    #[error("spec.podCIDRs: {0} lies outside of what site {1} was granted")]
    PrefixOutsideSite(IpNet, SiteName),
    /// A prefix that overlaps another node's.
    #[error("spec.podCIDRs: {0} overlaps {1} of node {2}")]
    PrefixTaken(IpNet, IpNet, NodeName),
    /// An endpoint inside of the mesh: the tunnel would run through itself.
    #[error("endpoint {0} lies inside of the mesh prefix {1}: a tunnel cannot run through itself")]
    EndpointInsideMesh(Endpoint, IpNet),
    /// An endpoint that is this very node.
    #[error("endpoint {0} is an address of this node itself")]
    EndpointIsLocal(Endpoint),
}

impl Refusal {
    /// Reports whether the whole publication is refused, rather than a part of it.
    pub fn is_whole(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_)
                | Self::RolledBack { .. }
                | Self::KeyChanged(_)
                | Self::KeyTaken(_)
                | Self::KeyContested(_)
                | Self::Site { .. }
        )
    }
}

fn names(all: &[NodeName]) -> String {
    all.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ")
}

/// The last claim and prefixes that each node was admitted with; kept on disk by the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Memory(pub BTreeMap<NodeName, Peer>);

/// The outcome: who is a peer, and what was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    /// The peers by name.
    pub peers: BTreeMap<NodeName, Peer>,
    /// Refusals by node. A node can be a peer and still have a part refused.
    pub refused: BTreeMap<NodeName, Vec<Refusal>>,
    /// Nodes that publish no key (yet).
    pub unpublished: BTreeSet<NodeName>,
    /// Every prefix that the operator gave to some other node and that somebody may hold, with that node, whether
    /// it is a peer or not: nothing goes there in clear.
    pub reserved: BTreeMap<IpNet, NodeName>,
    /// What was remembered of nodes that are still known but no peers now.
    former: BTreeMap<NodeName, Peer>,
}

impl Admission {
    /// Everybody who is remembered, for as long as nobody can be judged.
    pub fn remembered(memory: &Memory) -> Self {
        let withheld =
            |peer: &'_ Peer| peer.withheld.iter().map(|net| (*net, peer.name.clone())).collect::<Vec<_>>();
        let reserved = memory.0.values().flat_map(withheld).collect();
        Self { peers: memory.0.clone(), reserved, ..Self::default() }
    }

    /// What the next admission has to remember: the peers of now, and what is still known of the others. A node that
    /// was silent for a while does not lose its key to somebody who claims it meanwhile.
    pub fn memory(&self) -> Memory {
        let former = self.former.iter().map(|(name, peer)| (name.clone(), peer.clone()));
        Memory(former.chain(self.peers.clone()).collect())
    }

    fn refuse(&mut self, node: &NodeName, why: Refusal) {
        self.refused.entry(node.clone()).or_default().push(why);
    }
}

/// Judges all nodes of a registry. Pure, and independent of the order of `records`; the local node's own record
/// is passed over.
pub fn admit(local: &LocalNode, grants: &Grants, records: &[NodeRecord], memory: &Memory) -> Admission {
    let mut admission = Admission::default();
    let records: BTreeMap<&NodeName, &NodeRecord> =
        records.iter().filter(|r| r.name != local.name).map(|r| (&r.name, r)).collect();

    let mut claims = BTreeMap::new();
    for (&name, record) in &records {
        match judge_claim(record, memory.0.get(name).map(|p| &p.claim), &mut admission) {
            Some(claim) => {
                claims.insert(name, claim);
            }
            None if !admission.refused.contains_key(name) => {
                admission.unpublished.insert(name.clone());
            }
            None => {}
        }
    }
    let known: BTreeSet<&NodeName> = records.keys().copied().collect();
    settle_keys(local, memory, &known, &mut claims, &mut admission);
    let prefixes = settle_prefixes(local, grants, &records, &claims, memory, &mut admission);
    let mut withheld = withheld(local, &records, memory, &admission);
    admission
        .reserved
        .extend(withheld.iter().flat_map(|(name, nets)| nets.iter().map(move |net| (*net, name.clone()))));
    for (name, claim) in claims {
        let peer = Peer {
            name: name.clone(),
            address: address::node_address(&grants.mesh, &claim.site, name),
            prefixes: prefixes.get(name).cloned().unwrap_or_default(),
            withheld: withheld.remove(name).unwrap_or_default(),
            claim,
        };
        admission.peers.insert(name.clone(), peer);
    }
    let known = memory.0.iter().filter(|(name, _)| records.contains_key(name));
    admission.former = known
        .filter(|(name, _)| !admission.peers.contains_key(*name))
        .map(|(name, peer)| (name.clone(), peer.clone()))
        .collect();
    drop_impossible_endpoints(local, grants, &mut admission);
    admission
}

/// The claim that counts for a node: what it says now, or what it said last where that is refused.
fn judge_claim(
    record: &NodeRecord,
    last: Option<&Advertisement>,
    out: &mut Admission,
) -> Option<Advertisement> {
    let refusal = match Advertisement::parse(&record.annotations) {
        Ok(None) => return None,
        Ok(Some(claim)) => match (last, &record.site_label) {
            (_, Some(label)) if *label != claim.site => {
                out.refuse(&record.name, Refusal::Site { claimed: claim.site, label: label.clone() });
                // An earlier claim counts only where it agrees with the operator.
                return last.filter(|last| last.site == *label).cloned();
            }
            // No replay: an older claim of the key brings nothing back that was revoked. What was revoked
            // before it stays so.
            (Some(last), _) if claim.public_key == last.public_key => {
                return Some(Advertisement { epoch: claim.epoch.max(last.epoch), ..claim });
            }
            (Some(last), _) if claim.epoch < last.epoch => {
                Refusal::RolledBack { seen: last.epoch, claimed: claim.epoch }
            }
            (Some(last), _) if claim.epoch == last.epoch => Refusal::KeyChanged(claim.epoch),
            _ => return Some(claim),
        },
        Err(error) => Refusal::Malformed(error),
    };
    out.refuse(&record.name, refusal);
    last.cloned()
}

fn settle_keys(
    local: &LocalNode,
    memory: &Memory,
    known: &BTreeSet<&NodeName>,
    claims: &mut BTreeMap<&NodeName, Advertisement>,
    out: &mut Admission,
) {
    // Who falls back to an earlier key may meet somebody there. Each node falls back or drops out once, so it ends.
    while settle_keys_once(local, memory, known, claims, out) {}
}

fn settle_keys_once(
    local: &LocalNode,
    memory: &Memory,
    known: &BTreeSet<&NodeName>,
    claims: &mut BTreeMap<&NodeName, Advertisement>,
    out: &mut Admission,
) -> bool {
    let mut settled = true;
    let mut holders: BTreeMap<PublicKey, Vec<&NodeName>> = BTreeMap::new();
    for (&name, claim) in claims.iter() {
        holders.entry(claim.public_key).or_default().push(name);
    }
    for (key, nodes) in holders {
        let held_before = |name: &&NodeName| memory.0.get(*name).is_some_and(|p| p.claim.public_key == key);
        // Also one that is silent now, as long as the operator knows it, and that has not moved on to another key.
        let silent = memory.0.iter().find(|(name, peer)| {
            peer.claim.public_key == key && known.contains(*name) && !claims.contains_key(*name)
        });
        let owner = if key == local.public_key {
            Some(&local.name)
        } else if let Some((name, _)) = silent {
            Some(name)
        } else if nodes.len() == 1 {
            continue;
        } else {
            nodes.iter().copied().find(held_before)
        };
        for &name in nodes.iter().filter(|&&name| Some(name) != owner) {
            settled = false;
            let why = match owner {
                Some(owner) => Refusal::KeyTaken(owner.clone()),
                None => Refusal::KeyContested(nodes.iter().map(|&n| n.clone()).collect()),
            };
            out.refuse(name, why);
            // What the node had before stays, unless that very key is the one in dispute.
            match memory.0.get(name).map(|p| &p.claim).filter(|last| last.public_key != key) {
                Some(last) => claims.insert(name, last.clone()),
                None => claims.remove(name),
            };
        }
    }
    !settled
}

/// The prefixes that each node holds. Nodes without a usable claim take part: what they were granted is theirs.
fn settle_prefixes(
    local: &LocalNode,
    grants: &Grants,
    records: &BTreeMap<&NodeName, &NodeRecord>,
    claims: &BTreeMap<&NodeName, Advertisement>,
    memory: &Memory,
    out: &mut Admission,
) -> BTreeMap<NodeName, Vec<IpNet>> {
    let own: Vec<(IpNet, NodeName)> = local.prefixes.iter().map(|&p| (p, local.name.clone())).collect();
    let own = PrefixIndex::new(own);
    let mut granted: BTreeMap<NodeName, BTreeSet<IpNet>> = BTreeMap::new();
    for (&name, record) in records {
        let site = claims.get(name).map(|c| &c.site).or(record.site_label.as_ref());
        if record.pod_cidrs.len() > PREFIXES_MOST {
            out.refuse(name, Refusal::TooManyPrefixes(record.pod_cidrs.len()));
            // Its pods have addresses in these all the same: nothing goes there, least of all in clear.
            let guarded = record.pod_cidrs.iter().take(GUARDED_MOST);
            let fine = guarded.filter_map(|text| judge_prefix(local, grants, site, text, &own).ok());
            out.reserved.extend(fine.map(|net| (net, name.clone())));
            continue;
        }
        for text in &record.pod_cidrs {
            match judge_prefix(local, grants, site, text, &own) {
                Ok(net) => {
                    granted.entry(name.clone()).or_default().insert(net);
                    out.reserved.insert(net, name.clone());
                }
                Err(why) => {
                    // What surrounds a protected address is guarded but for that address.
                    if let Refusal::PrefixProtected(net, _) = &why {
                        out.reserved.insert(*net, name.clone());
                    }
                    out.refuse(name, why);
                }
            }
        }
    }
    let held_before = |name: &NodeName, net: &IpNet| {
        memory.0.get(name).is_some_and(|p| p.prefixes.contains(net) || p.withheld.contains(net))
    };
    // Each round takes away at least one prefix, so that the loop ends.
    loop {
        let index = PrefixIndex::new(
            granted.iter().flat_map(|(name, nets)| nets.iter().map(move |&net| (net, name.clone()))),
        );
        let mut lost: BTreeSet<(NodeName, IpNet, IpNet, NodeName)> = BTreeSet::new();
        for ((outer, a), (inner, b)) in index.overlaps().filter(|(x, y)| x.1 != y.1) {
            let (first, second) = (held_before(a, outer), held_before(b, inner));
            if !first || second {
                lost.insert((a.clone(), *outer, *inner, b.clone()));
            }
            if !second || first {
                lost.insert((b.clone(), *inner, *outer, a.clone()));
            }
        }
        if lost.is_empty() {
            break;
        }
        for (loser, net, against, other) in lost {
            let removed = granted.get_mut(&loser).is_some_and(|nets| nets.remove(&net));
            if removed {
                out.refuse(&loser, Refusal::PrefixTaken(net, against, other));
            }
        }
    }
    granted.into_iter().map(|(name, nets)| (name, nets.into_iter().collect())).collect()
}

/// What nodes have held and may hold no longer, because the operator took it back from sites: what was encrypted does not
/// go out in clear then.
fn withheld(
    local: &LocalNode,
    records: &BTreeMap<&NodeName, &NodeRecord>,
    memory: &Memory,
    out: &Admission,
) -> BTreeMap<NodeName, Vec<IpNet>> {
    let mut all = BTreeMap::new();
    for (name, whys) in &out.refused {
        let Some(before) = memory.0.get(name) else { continue };
        let record = records.get(name).map_or(&[][..], |record| &record.pod_cidrs);
        let still = |net: &IpNet| {
            record.iter().any(|text| text.parse::<IpNet>().is_ok_and(|granted| granted.trunc() == *net))
        };
        let of_site = |why: &Refusal| {
            matches!(
                why,
                Refusal::UnknownSite(_) | Refusal::PrefixOutsideSite(..) | Refusal::PrefixProtected(..)
            )
        };
        if !whys.iter().any(of_site) {
            continue;
        }
        let held = before.prefixes.iter().chain(&before.withheld).copied().filter(still);
        let harmless = held.filter(|net| {
            let ours = local.prefixes.iter().any(|own| prefix::overlap(own, net));
            // What lies in somebody else's is guarded with that, and theirs.
            let theirs = out.reserved.iter().any(|(wide, holder)| wide.contains(net) && holder != name);
            !ours && !theirs && prefix::forbidden(net).is_none()
        });
        let nets: Vec<IpNet> = harmless.collect();
        if !nets.is_empty() {
            all.insert(name.clone(), nets);
        }
    }
    all
}

fn judge_prefix(
    local: &LocalNode,
    grants: &Grants,
    site: Option<&SiteName>,
    text: &str,
    own: &PrefixIndex<NodeName>,
) -> Result<IpNet, Refusal> {
    let net: IpNet = text.parse().map_err(|_| Refusal::NoPrefix(text.chars().take(60).collect()))?;
    let net = net.trunc();
    if let Some(why) = prefix::forbidden(&net) {
        return Err(Refusal::PrefixForbidden(net, why));
    }
    if prefix::overlap(&net, &IpNet::V6(grants.mesh_prefix())) {
        return Err(Refusal::PrefixForbidden(net, "it holds the mesh addresses of nodes".to_owned()));
    }
    let holder = own.holding(net.network()).or_else(|| own.holding(net.broadcast()));
    let inside = local.prefixes.iter().find(|p| net.contains(*p)).map(|&p| (p, local.name.clone()));
    if let Some((theirs, name)) = holder.cloned().or(inside) {
        return Err(Refusal::PrefixTaken(net, theirs, name));
    }
    if let Some(site) = site.filter(|_| !grants.sites.is_empty()) {
        let allowed = grants.sites.get(site).ok_or_else(|| Refusal::UnknownSite(site.clone()))?;
        if !allowed.iter().any(|wide| wide.contains(&net)) {
            return Err(Refusal::PrefixOutsideSite(net, site.clone()));
        }
    }
    // The last question: what is refused for this alone stays guarded around that address.
    match grants.protected.iter().find(|ip| net.contains(*ip)) {
        Some(&ip) => Err(Refusal::PrefixProtected(net, ip)),
        None => Ok(net),
    }
}

fn drop_impossible_endpoints(local: &LocalNode, grants: &Grants, out: &mut Admission) {
    let mesh = PrefixIndex::new(
        (out.peers.values().flat_map(|p| p.prefixes.iter().copied()))
            .chain(grants.sites.values().flatten().copied())
            .chain(local.prefixes.iter().copied())
            .chain(out.reserved.keys().copied())
            .chain([IpNet::V6(grants.mesh_prefix())])
            .map(|net| (net, ())),
    );
    let mut refused = Vec::new();
    for peer in out.peers.values_mut() {
        let claim = &mut peer.claim;
        let same_site = claim.site == local.site;
        for (list, used) in [
            (&mut claim.endpoints, !same_site),
            (&mut claim.internal_endpoints, same_site),
            (&mut claim.reflexive_endpoints, !same_site),
        ] {
            list.retain(|endpoint| {
                let Endpoint::Address(address) = endpoint else { return true };
                let why = if let Some((net, ())) = mesh.holding(address.ip()) {
                    Refusal::EndpointInsideMesh(endpoint.clone(), *net)
                } else if used
                    && local.underlay_addresses.contains(&address.ip())
                    && address.port() == local.listen_port
                {
                    // Another site's LAN may well use our addresses behind its NAT; that list is not dialled.
                    Refusal::EndpointIsLocal(endpoint.clone())
                } else {
                    return true;
                };
                refused.push((peer.name.clone(), why));
                false
            });
        }
    }
    for (name, why) in refused {
        out.refuse(&name, why);
    }
}

#[cfg(test)]
#[path = "admission/tests.rs"]
mod tests;
