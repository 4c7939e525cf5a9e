//! What the agent knows and what it wants, without touching anything.
//!
//! Inputs replace what was known of their kind; [`Agent::desired`] is a pure function of all of it. Until the
//! registry was read in full once, the last good peers stand in for it and nothing is pruned.

mod exempted;
mod guarded;
mod in_force;
mod own;
mod standing;
mod stranded;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use jiff::Timestamp;
use mesh_keyring::{NodeName, PublicKey};
use mesh_overlay::address::{Carried, carrier_prefix};
use mesh_overlay::advertisement::told::MESH;
use mesh_overlay::advertisement::{ENDPOINTS_MOST, MTU_LEAST, PUBLIC_KEY};
use mesh_overlay::endpoint::is_dialable;
use mesh_overlay::link::{LinkConfig, ObservedUnderlay, OtherLink};
use mesh_overlay::plan::Paths;
use mesh_overlay::plan::path::Resolution;
use mesh_overlay::wireguard::Choice;
use mesh_overlay::{
    Admission, Advertisement, Endpoint, Grants, Kept, LocalNode, MeshPlan, NodeRecord, Peer, admit, prefix,
};

use crate::config::Config;
use crate::registry::{MeshWord, Problem, Snapshot};
use crate::state::LastGood;
pub use exempted::{Exempted, ExemptionState};
pub use own::own_prefixes;
use standing::{Standing, Steady};
use stranded::harmful;

/// How long the others' last claims stand in for publications that are gone together with our own: a directory that was
/// emptied fills again one agent after the other.
pub const HOLD: Duration = Duration::from_secs(60);
/// The most names of one peer that are resolved.
const NAMES_MOST: usize = 2;
/// The MTU assumed where neither the configuration nor the kernel tells one: Ethernet's, in bytes.
const MTU_ASSUMED: u16 = 1500;

/// What should be, at one moment.
#[derive(Debug, Clone)]
pub struct Desired {
    /// The plan.
    pub plan: MeshPlan,
    /// The mesh interface.
    pub link: LinkConfig,
    /// What this node says of itself.
    pub publish: Advertisement,
    /// Whether the registry holds just that already; else nobody can answer a handshake of ours yet.
    pub announced: bool,
    /// Whether the registry was read in full since the start.
    pub synced: bool,
    /// Whether what is not in the plan may be taken away.
    pub prune: bool,
    /// Why nothing may be done at all: it would cut this host off.
    pub harmful: Option<String>,
    /// Whether policy stands, or is off: without it nothing is brought up.
    pub judged: bool,
    /// DNS names that peers gave as endpoints.
    pub names: BTreeSet<String>,
    /// What the next start has to know.
    pub last_good: LastGood,
    /// What was refused, and why.
    pub refused: Vec<Problem>,
    /// The nodes of whom this node refuses something: whether all that they say, and why.
    pub refuses: Vec<(NodeName, bool, String)>,
    /// Nodes that publish no key.
    pub unpublished: BTreeSet<NodeName>,
    /// What the operator has exempted from encryption.
    pub exemptions: Vec<Exempted>,
    /// What is wrong with this node itself.
    pub warnings: Vec<String>,
    /// Prefixes that nobody holds any more and that stay guarded.
    pub kept: BTreeMap<IpNet, Kept>,
}

/// The agent's knowledge.
#[derive(Debug)]
pub struct Agent {
    config: Config,
    public_key: PublicKey,
    epoch: u64,
    last_good: LastGood,
    snapshot: Option<Snapshot>,
    hold_until: Option<Instant>,
    // When a Mesh that is gone does not count any more.
    mesh_gone: Option<Instant>,
    // Why the Mesh does not count.
    mesh_refused: Option<String>,
    underlay: ObservedUnderlay,
    resolved: Resolution,
    paths: Paths,
    standing: Steady,
    // When prefixes that nobody holds were last made older.
    sighted: Option<Instant>,
    // What somebody holds, by the last look.
    held: BTreeSet<IpNet>,
    // The time of day; before it is known no exemption is in force.
    today: Option<Timestamp>,
}

impl Agent {
    /// An agent that knows its configuration, its key with the moment it was made, and what it knew last time.
    pub fn new(config: Config, public_key: PublicKey, epoch: u64, last_good: LastGood) -> Self {
        Self {
            config,
            public_key,
            epoch,
            last_good,
            snapshot: None,
            hold_until: None,
            mesh_gone: None,
            mesh_refused: None,
            underlay: ObservedUnderlay::default(),
            resolved: Resolution::new(),
            paths: Paths::new(),
            standing: Steady::default(),
            sighted: None,
            held: BTreeSet::new(),
            today: None,
        }
    }

    /// The registry was read. A snapshot without this node, which was there before, is an unmounted directory rather
    /// than the operator's will: it is not taken. One without this node's publication was emptied: what the operator
    /// says counts, and for a while the others' last claims stand in for theirs.
    ///
    /// # Errors
    /// The sentence for the status.
    pub fn snapshot(&mut self, mut snapshot: Snapshot, now: Instant) -> Result<(), String> {
        self.leave_guarded(&mut snapshot);
        let node = &self.config.node;
        let own = snapshot.nodes.iter().find(|n| n.name == *node);
        if own.is_none() && self.last_good.registered {
            return Err(format!(
                "the registry has no Node manifest of {node} any more, so it counts as incomplete: nothing is pruned; \
                 to take this node out of the mesh, stop its agent and run `mesh-agent cleanup`"
            ));
        }
        if snapshot.mesh_nodes == Some(false) && self.last_good.mesh_nodes {
            return Err(
                "the cluster does not know the kind MeshNode in our version any more, so what it says counts as incomplete: \
                 nothing is pruned; apply the CRDs of deploy/kubernetes/base again"
                    .to_owned(),
            );
        }
        let published = own.is_some_and(|n| n.annotations.contains_key(PUBLIC_KEY));
        // What is away does not say where it is.
        if snapshot.servers_known {
            self.last_good.servers.clone_from(&snapshot.servers);
        } else {
            self.last_good.servers.extend(&snapshot.servers);
        }
        if self.snapshot.is_none()
            && let Some(said) = own.and_then(|own| Advertisement::parse(&own.annotations).ok().flatten())
        {
            self.standing.recall(Standing::published(&said));
        }
        self.heed(&mut snapshot, now);
        if self.last_good.published && !published {
            self.hold_until = Some(now + HOLD);
        }
        self.snapshot = Some(snapshot);
        Ok(())
    }

    /// Takes the Mesh's word, where it is one. What is wrong with it is put among the snapshot's problems, and what it said
    /// before stays in force. An agent that runs for the first time admits nobody on no word, and guards everything.
    fn heed(&mut self, snapshot: &mut Snapshot, now: Instant) {
        let first = self.snapshot.is_none() && !self.last_good.registered;
        let unclear = matches!(&snapshot.mesh, MeshWord::Unclear(_));
        self.last_good.waiting = (first || self.last_good.waiting) && unclear;
        let name = self.config.grants.mesh.clone();
        let mut lacks = None;
        let word = match std::mem::take(&mut snapshot.mesh) {
            MeshWord::Said(settings) => {
                let held = self.holds(snapshot);
                let before = self.last_good.settings.replace(settings.clone());
                let local = self.local(Vec::new(), &mut Vec::new());
                // What agent.yaml says itself is for `desired` to refuse.
                let accepted = &self.last_good.accepted;
                let own = harmful(&local, &self.config.grants, accepted).is_some();
                let why = harmful(&local, &self.grants(), accepted).filter(|_| !own);
                // Who never was in the mesh has nothing to lose, and without grants it would be open to all.
                let strands = self.strands(snapshot).filter(|_| held && !first);
                lacks = self.lacks();
                match why.or(strands) {
                    None => MeshWord::Said(settings),
                    Some(why) => {
                        self.last_good.settings = before;
                        MeshWord::Unclear(format!("spec.{why}"))
                    }
                }
            }
            other => other,
        };
        self.mesh_refused = match &word {
            MeshWord::Unclear(why) => Some(why.clone()),
            _ => lacks,
        };
        let known = self.last_good.settings.is_some();
        let mut tell = |text: String| snapshot.problems.push(Problem { node: None, text });
        match word {
            MeshWord::Said(_) => self.mesh_gone = None,
            MeshWord::Silent if known => {
                let until = *self.mesh_gone.get_or_insert(now + HOLD);
                if now >= until {
                    (self.last_good.settings, self.mesh_gone) = (None, None);
                } else {
                    tell(format!(
                        "Mesh {name} is gone: for {} s what it said stays in force",
                        HOLD.as_secs()
                    ));
                }
            }
            MeshWord::Silent => {}
            MeshWord::Missing(why) if known => {
                self.mesh_gone = None;
                tell(format!(
                    "Mesh {name}: {why}; what it said stays in force; apply deploy/kubernetes/base again"
                ));
            }
            MeshWord::Missing(_) => {}
            MeshWord::Unclear(why) if known => {
                self.mesh_gone = None;
                // Which exemptions it has taken back nobody can tell.
                if let Some(mesh) = &mut self.last_good.settings {
                    mesh.exemptions.clear();
                }
                tell(format!(
                    "Mesh {name}: {why}; what it said before stays in force, but for exemptions from encryption"
                ));
            }
            MeshWord::Unclear(why) if self.last_good.waiting => {
                tell(format!(
                    "Mesh {name}: {why}; this agent never heard another word of it, and admits nobody"
                ));
                // Without a claim nobody is a peer, and what everybody holds is guarded.
                for record in snapshot.nodes.iter_mut().filter(|record| record.name != self.config.node) {
                    record.annotations.clear();
                }
            }
            MeshWord::Unclear(why) => {
                tell(format!("Mesh {name}: {why}; as long as it is not mended, there is none"));
            }
        }
    }

    /// Until when claims that are gone are held.
    fn holds_claims_until(&self, now: Instant) -> Option<Instant> {
        self.hold_until.filter(|until| now < *until)
    }

    /// When something that is gone and still counts is to be looked at again.
    pub fn holds_until(&self, now: Instant) -> Option<Instant> {
        let gone = self.mesh_gone.filter(|until| now < *until);
        let held = [self.holds_claims_until(now), gone, self.standing.wake_at().map(|at| at.max(now))];
        held.into_iter().flatten().min()
    }

    /// The nodes to judge: the snapshot's, where it cannot be the whole truth filled up with what is remembered.
    fn records(&self, snapshot: &Snapshot, now: Instant) -> Vec<NodeRecord> {
        let memory = &self.last_good.peers.0;
        let holding = self.holds_claims_until(now).is_some();
        let mut records = snapshot.nodes.clone();
        for record in records.iter_mut().filter(|r| !r.annotations.contains_key(PUBLIC_KEY)) {
            let last =
                memory.get(&record.name).filter(|_| holding || snapshot.unreadable.contains(&record.name));
            if let Some(peer) = last {
                record.annotations = peer.claim.to_annotations();
            }
        }
        if snapshot.incomplete {
            let known: BTreeSet<&NodeName> = snapshot.nodes.iter().map(|n| &n.name).collect();
            let missing = memory.values().filter(|peer| !known.contains(&peer.name));
            records.extend(missing.map(|peer| NodeRecord {
                name: peer.name.clone(),
                site_label: None,
                pod_cidrs: peer.prefixes.iter().chain(&peer.withheld).map(ToString::to_string).collect(),
                annotations: peer.claim.to_annotations(),
            }));
        }
        records
    }

    /// The kernel's view of the underlay.
    pub fn underlay(&mut self, underlay: ObservedUnderlay) {
        self.underlay = underlay;
    }

    /// The time of day, by which exemptions end.
    pub fn today(&mut self, now: Timestamp) {
        self.today = Some(now);
    }

    /// What names resolve to now.
    pub fn resolved(&mut self, resolved: Resolution) {
        self.resolved = resolved;
    }

    /// What the prober has found.
    pub fn paths(&mut self, paths: Paths, now: Instant) {
        let near = self.last_good.peers.0.values().filter(|peer| peer.claim.site == self.config.site);
        let near: BTreeSet<PublicKey> = near.map(|peer| peer.claim.public_key).collect();
        let standing = Standing::of(&paths, &self.underlay.addresses, |key| near.contains(key));
        // Before any path was probed nothing is known, and what was published stands.
        if !paths.is_empty() {
            self.standing.note(standing, now);
        }
        self.paths = paths;
    }

    /// Reports whether this host forwards IPv4 and IPv6.
    pub fn forwarding(&self) -> (bool, bool) {
        self.underlay.forwarding
    }

    /// Whether the registry was read in full since the start.
    pub fn is_synced(&self) -> bool {
        self.snapshot.is_some()
    }

    /// The desired state; remembers whom it admitted, so that later claims are judged against them.
    pub fn desired(&mut self, now: Instant) -> Desired {
        let mut warnings = Vec::new();
        let grants = &self.grants();
        if !grants.sites.is_empty() && !grants.sites.contains_key(&self.config.site) {
            warnings.push(format!(
                "the Mesh {} has no site {}: this node may hold nothing; add it there, or correct `site` here",
                grants.mesh, self.config.site
            ));
        }
        let own_prefixes = self.own_prefixes(grants, &mut warnings);
        let mut local = self.local(own_prefixes.clone(), &mut warnings);
        let (admission, mut refused) = match &self.snapshot {
            Some(snapshot) => {
                let records = self.records(snapshot, now);
                let admission = admit(&local, grants, &records, &self.last_good.peers);
                (admission, snapshot.problems.clone())
            }
            None => (Admission::remembered(&self.last_good.peers), Vec::new()),
        };
        let incomplete = self.snapshot.as_ref().is_some_and(|s| s.incomplete);
        let harmful = harmful(&local, grants, &self.last_good.accepted);
        let held = guarded::held(&local, grants, &admission, harmful.is_none());
        self.remember_guarded(&held, !incomplete, now);
        let (former, kept) = guarded::kept(&self.last_good.guarded, &held, &local.name);
        local.former = former.keys().copied().collect();
        local.underlay_links.extend(self.underlay.away(&[&local.prefixes[..], &local.former].concat()));
        let reserved: BTreeSet<IpNet> = admission.reserved.keys().chain(kept.keys()).copied().collect();
        if let Some(snapshot) = &self.snapshot {
            let own = self.own_record();
            self.last_good = LastGood {
                registered: own.is_some(),
                published: own.is_some_and(|n| n.annotations.contains_key(PUBLIC_KEY)),
                prefixes: own_prefixes,
                peers: admission.memory(),
                mesh_nodes: snapshot.mesh_nodes.unwrap_or(self.last_good.mesh_nodes),
                settings: self.last_good.settings.take(),
                servers: std::mem::take(&mut self.last_good.servers),
                waiting: self.last_good.waiting,
                knows_pods: self.last_good.knows_pods,
                unpoliced: self.last_good.unpoliced,
                guarded: std::mem::take(&mut self.last_good.guarded),
                accepted: if harmful.is_none() {
                    grants.sites.values().flatten().copied().collect()
                } else {
                    std::mem::take(&mut self.last_good.accepted)
                },
            };
        }
        if incomplete {
            warnings.push(
                "the registry holds a file that never could be read, so nodes may be missing: nothing is pruned".to_owned(),
            );
        }
        if self.holds_claims_until(now).is_some() {
            warnings.push(format!(
                "this node's publication was gone from the registry: for {} s the last claims of other nodes stay in force",
                HOLD.as_secs()
            ));
        }
        warnings.extend(self.endless());
        let carrier = IpNet::V6(carrier_prefix(&grants.mesh, Carried::Wireguard));
        let around = |net: &&IpNet| prefix::overlap(net, &carrier);
        if let Some(net) = grants.sites.values().flatten().find(around).filter(|_| local.vxlan.is_some()) {
            warnings.push(format!("sites: {net} holds {carrier}, where VXLAN carriers have their addresses: there is no path by VXLAN"));
        }
        let port = self.listen_port();
        if local.vxlan.as_ref().is_some_and(|vxlan| vxlan.port == port) {
            warnings.push(format!("UDP port {port} is both WireGuard's and VXLAN's: set vxlan.port or wireguard.listenPort to another"));
        }
        if self.standing.current().symmetric {
            warnings.push(
                "this node is behind a symmetric NAT, which shows every peer another port: nodes that are behind a NAT themselves cannot \
                 reach it; make the NAT map endpoints independently (RFC 4787, REQ-1), or forward a port and set underlay.endpoints"
                    .to_owned(),
            );
        }
        let mut plan =
            MeshPlan::compute(&local, grants, &admission.peers, &reserved, &self.resolved, &self.paths);
        self.leave_unasked(&mut plan);
        warnings.extend(guarded::intruders(&self.underlay, &local, &plan));
        let exemptions = self.exemptions().cloned().map(|one| Exempted::of(one, self.today, &plan)).collect();
        let refuses = admission.refused.iter().flat_map(|(node, whys)| {
            whys.iter().map(move |why| (node.clone(), why.is_whole(), why.to_string()))
        });
        let refuses = refuses.collect();
        for (node, whys) in &admission.refused {
            refused.extend(whys.iter().map(|w| Problem { node: Some(node.clone()), text: w.to_string() }));
        }
        let names = admission.peers.values().flat_map(names_of).collect();
        let mut unpublished = admission.unpublished;
        unpublished.remove(&self.config.node);
        let publish = self.advertisement(local.underlay_mtu);
        let said = self.own_record().and_then(|own| Advertisement::parse(&own.annotations).ok().flatten());
        // While nothing can be read, what stood there last has to do: after a reboot without the registry nobody
        // would ever be dialled else.
        let stood = !self.is_synced() && self.last_good.published;
        let announced = said.map_or(stood, |said| said.essential() == publish.essential());
        Desired {
            link: LinkConfig { name: local.interface, mtu: plan.mtu, addresses: plan.addresses.clone() },
            publish,
            announced,
            synced: self.is_synced(),
            prune: self.is_synced() && !incomplete,
            harmful,
            judged: true,
            plan,
            names,
            last_good: self.last_good.clone(),
            refused,
            refuses,
            unpublished,
            exemptions,
            warnings,
            kept: former.into_iter().chain(kept).collect(),
        }
    }

    /// The nodes of the registry, as they were read last.
    pub fn nodes(&self) -> Option<&[NodeRecord]> {
        self.snapshot.as_ref().map(|snapshot| snapshot.nodes.as_slice())
    }

    /// Goes on with a later generation of its key.
    pub fn generation(&mut self, generation: u64) {
        self.epoch = generation;
    }

    /// Forgets key, generation and prefixes of another node, as if it had never been seen. What is guarded stays
    /// so. Returns whether there was anything.
    pub fn forget(&mut self, node: &NodeName) -> bool {
        self.last_good.peers.0.remove(node).is_some()
    }

    /// Leaves out of the end-to-end check whoever may not answer it: agents of an earlier version, which publish no mesh.
    fn leave_unasked(&self, plan: &mut MeshPlan) {
        let nodes = self.snapshot.iter().flat_map(|snapshot| &snapshot.nodes);
        let answers: BTreeSet<&NodeName> =
            nodes.filter(|record| record.annotations.contains_key(MESH)).map(|record| &record.name).collect();
        for (_, peer) in plan.peers.iter_mut().filter(|(name, _)| !answers.contains(name)) {
            peer.paths.inside.clear();
        }
    }

    fn own_record(&self) -> Option<&NodeRecord> {
        self.snapshot.as_ref()?.nodes.iter().find(|n| n.name == self.config.node)
    }

    fn own_prefixes(&self, grants: &Grants, warnings: &mut Vec<String>) -> Vec<IpNet> {
        let Some(snapshot) = &self.snapshot else { return self.last_good.prefixes.clone() };
        let Some(record) = snapshot.nodes.iter().find(|n| n.name == self.config.node) else {
            warnings.push(format!(
                "the registry has no Node manifest of {}: other nodes do not accept this one",
                self.config.node
            ));
            return Vec::new();
        };
        own_prefixes(grants, &self.config.site, record, warnings)
    }

    fn local(&self, prefixes: Vec<IpNet>, warnings: &mut Vec<String>) -> LocalNode {
        let observed = self.underlay.mtu.map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
        let said = self.last_good.settings.as_ref().and_then(|settings| settings.mtu);
        // The Mesh speaks for all nodes, and an interface for this one.
        let of_mesh = said.map(|said| observed.map_or(said, |observed| observed.min(said)));
        let mut mtu = self.config.underlay.mtu.or(of_mesh).or(observed).unwrap_or(MTU_ASSUMED);
        if let (None, Some(said)) = (self.config.underlay.mtu, said.filter(|said| *said > mtu)) {
            warnings.push(format!(
                "Mesh {}: spec.underlay.mtu is {said}, but the interface of the default route carries {mtu} bytes only",
                self.config.grants.mesh
            ));
        }
        if mtu < MTU_LEAST {
            warnings.push(format!(
                "the underlay's MTU of {mtu} bytes is below the {MTU_LEAST} that IPv6 inside of WireGuard needs: packets will be fragmented"
            ));
            mtu = MTU_LEAST;
        }
        LocalNode {
            name: self.config.node.clone(),
            site: self.config.site.clone(),
            public_key: self.public_key,
            prefixes,
            underlay_addresses: self.underlay_addresses(),
            former: Vec::new(),
            underlay_links: self.named_links().map(|(index, _)| *index).collect(),
            pod_kinds: self.config.guard.pod_interface_kinds.iter().map(|k| k.as_str().to_owned()).collect(),
            holes: self
                .named_links()
                .flat_map(|(_, link)| link.addresses.keys().chain(&link.gateways))
                .copied()
                .collect(),
            underlay_mtu: mtu,
            encrypts: self.encrypts(),
            interface: self.config.wireguard.interface,
            listen_port: self.listen_port(),
            keepalive: self.keepalive(),
            vxlan: self.vxlan(),
            routing: self.config.routing,
        }
    }

    /// The addresses that this node is dialled at, and those of the default route: a peer's prefix that held one of
    /// them would swallow the tunnels. Addresses of other interfaces may well be pods' gateways.
    fn underlay_addresses(&self) -> BTreeSet<IpAddr> {
        let config = &self.config.underlay;
        let configured = config.endpoints.iter().chain(&config.internal_endpoints).flatten();
        let configured = configured.filter_map(|endpoint| match endpoint {
            Endpoint::Address(address) => Some(address.ip()),
            Endpoint::Name(..) => None,
        });
        configured.chain(self.underlay.default_route_addresses.iter().copied()).collect()
    }

    /// The links that the operator has named as the underlay's.
    fn named_links(&self) -> impl Iterator<Item = (&u32, &OtherLink)> {
        let named =
            |link: &OtherLink| self.config.underlay.interfaces.iter().any(|n| n.as_str() == link.name);
        self.underlay.links.iter().filter(move |(_, link)| named(link))
    }

    /// Where others see this node, unless the operator or the kernel has said that address anyway.
    fn reflexive(&self) -> Vec<Endpoint> {
        let told = self.config.underlay.endpoints.as_deref().unwrap_or_default();
        let seen = self.standing.current().reflexive.iter().filter(|at| is_dialable(at.ip()));
        let seen = seen.map(|at| Endpoint::Address(*at));
        seen.filter(|at| !told.contains(at)).take(ENDPOINTS_MOST).collect()
    }

    fn advertisement(&self, mtu: u16) -> Advertisement {
        let port = self.listen_port();
        let dialable = self.underlay.default_route_addresses.iter().filter(|ip| is_dialable(**ip));
        let derived: Vec<Endpoint> =
            dialable.take(ENDPOINTS_MOST).map(|ip| Endpoint::Address(SocketAddr::new(*ip, port))).collect();
        let config = &self.config.underlay;
        Advertisement {
            public_key: self.public_key,
            epoch: self.epoch,
            site: self.config.site.clone(),
            endpoints: config.endpoints.clone().unwrap_or_else(|| derived.clone()),
            internal_endpoints: config.internal_endpoints.clone().unwrap_or(derived),
            mtu: Some(mtu),
            reflexive_endpoints: self.reflexive(),
            paths: self.standing.current().rungs.clone(),
            encrypts: self.encrypts(),
        }
    }

    fn encrypts(&self) -> bool {
        self.config.wireguard.backend != Choice::None
    }
}

fn names_of(peer: &Peer) -> impl Iterator<Item = String> + '_ {
    let all = peer.claim.endpoints.iter().chain(&peer.claim.internal_endpoints);
    all.filter_map(|endpoint| match endpoint {
        Endpoint::Name(host, _) => Some(host.clone()),
        Endpoint::Address(_) => None,
    })
    .take(NAMES_MOST)
}

#[cfg(test)]
#[path = "agent/tests.rs"]
mod tests;
