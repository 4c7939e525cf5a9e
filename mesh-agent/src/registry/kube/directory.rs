//! What a cluster's API holds of nodes, as far as the mesh reads it. Pure: events go in, a snapshot comes out.

mod sent;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use mesh_keyring::{ClusterName, MeshName, NodeName, SiteName};
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{SITE, SITE_LABEL};
use serde::Deserialize;

use super::budget::Budget;
use super::listing::{Listing, Named};
use super::verdict::{Condition, Seen};
use crate::registry::{Host, MeshWord, Problem, Snapshot};
use crate::settings::Settings;
use sent::{LABELS_MOST, Sent, Text, Unread, few};

/// The parts of a Node that are read.
pub type Node = Sent<NodeSpec, NodeStatus>;
/// A host without a Node object, or the operator's grant for a Node that the cluster gives no prefixes.
pub type MeshNode = Sent<MeshNodeSpec, Unread>;

/// `spec` of a Node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<Text>,
    #[serde(rename = "podCIDRs", deserialize_with = "few::<_, Text, String>")]
    pod_cidrs: Vec<String>,
}

/// `status` of a Node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    #[serde(deserialize_with = "few::<_, NodeAddress, NodeAddress>")]
    addresses: Vec<NodeAddress>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct NodeAddress {
    address: Text,
}

/// `spec` of a MeshNode: the operator's word.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MeshNodeSpec {
    /// The site that the host stands in.
    site: Option<Text>,
    /// The prefixes that it holds.
    #[serde(rename = "podCIDRs", deserialize_with = "few::<_, Text, String>")]
    pod_cidrs: Vec<String>,
}

/// Who says in which site a Node stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SiteRule {
    /// The label `sennit.dev/site`, which kubelets may write, counts as well; absent: as the Mesh says.
    pub old_label: Option<bool>,
    /// The site of Nodes that no label tells of; absent: what they say themselves.
    pub unlabelled: Option<SiteName>,
}

/// What counts of one object. Two that are equal say the same, whatever else of the object changed: heartbeats do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    name: String,
    site: Option<String>,
    // By the label that its kubelet may write.
    old_site: Option<String>,
    labels_over: bool,
    pod_cidrs: Vec<String>,
    annotations: BTreeMap<String, String>,
    host: Host,
    // Of a MeshNode that stands in for a node of another cluster.
    link: Option<String>,
}

/// The label of a MeshNode that stands in for a node of another cluster: which ClusterLink it comes through.
pub const LINK: &str = "sennit.dev/link";

impl From<Node> for Entry {
    fn from(node: Node) -> Self {
        let labels = node.labels();
        let site = |label: &str| labels.get(label).cloned();
        let (site, old_site) = (site(SITE_LABEL), site(SITE));
        let spec = &node.spec;
        let pod_cidrs = match &spec.pod_cidrs[..] {
            [] => spec.pod_cidr.iter().cloned().map(String::from).collect(),
            all => all.to_vec(),
        };
        let addresses = node.status.iter().flat_map(|status| &status.addresses);
        let addresses = addresses.filter_map(|entry| String::from(entry.address.clone()).parse().ok());
        let host = Host { addresses: addresses.collect(), labels, ..Host::default() };
        Self { host, old_site, ..Self::new(&node, site, pod_cidrs) }
    }
}

impl From<MeshNode> for Entry {
    fn from(node: MeshNode) -> Self {
        let link = node.labels().get(LINK).cloned();
        let MeshNodeSpec { site, pod_cidrs } = node.spec.clone();
        Self { link, ..Self::new(&node, site.map(String::from), pod_cidrs) }
    }
}

impl Entry {
    fn new<Spec, Status>(object: &Sent<Spec, Status>, site: Option<String>, pod_cidrs: Vec<String>) -> Self {
        Self {
            name: object.name(),
            site,
            old_site: None,
            labels_over: object.has_too_many_labels(),
            pod_cidrs,
            annotations: object.annotations(),
            host: Host::default(),
            link: None,
        }
    }

    /// Those of its annotations that agents read.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    // In a mesh of several clusters a Node is known as NODE.CLUSTER; MeshNodes bear their names in the mesh already.
    fn record(
        &self,
        kind: Kind,
        cluster: Option<&ClusterName>,
        rule: &SiteRule,
    ) -> Result<NodeRecord, String> {
        let name = match cluster.filter(|_| kind == Kind::Node) {
            Some(cluster) => format!("{}.{cluster}", self.name),
            None => self.name.clone(),
        };
        let shown = kind.as_str();
        let name: NodeName = name.parse().map_err(|e| format!("{shown} {:?}: {e}", self.shown()))?;
        let old = self.old_site.as_ref().filter(|_| rule.old_label == Some(true));
        let site_label = match self.site.as_ref().or(old) {
            Some(site) => Some(site.parse().map_err(|e| format!("{shown} {name}: site: {e}"))?),
            None => rule.unlabelled.clone().filter(|_| kind == Kind::Node),
        };
        Ok(NodeRecord {
            name,
            site_label,
            pod_cidrs: self.pod_cidrs.clone(),
            annotations: self.annotations.clone(),
        })
    }

    /// What of it does not count, each as a sentence with the remedy.
    fn problems<'a>(&'a self, name: &'a NodeName, rule: &'a SiteRule) -> impl Iterator<Item = String> + 'a {
        let unread = self.old_site.as_ref().filter(|_| self.site.is_none() && rule.old_label != Some(true));
        let unread = unread.map(|site| {
            let site = site.parse::<SiteName>().map_or("SITE".to_owned(), |site| site.to_string());
            format!(
                "Node {name}: its label {SITE} does not count, because its kubelet may write it: `kubectl label \
                 node {} {SITE_LABEL}={site}`, or allow the old label by registry.kube.oldSiteLabel",
                self.shown()
            )
        });
        let over = self.labels_over.then(|| {
            format!(
                "Node {name}: its labels are larger than {} KiB together, and none of them counts: remove some",
                LABELS_MOST >> 10
            )
        });
        unread.into_iter().chain(over)
    }

    fn shown(&self) -> String {
        self.name.chars().take(64).collect()
    }
}

/// A kind of object that is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Kubernetes' own.
    Node,
    /// Ours.
    MeshNode,
}

impl Kind {
    /// As in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::MeshNode => "MeshNode",
        }
    }
}

// More API servers than any cluster has.
const SERVERS_MOST: usize = 64;

impl Named for Entry {
    fn name(&self) -> &str {
        &self.name
    }

    fn weight(&self) -> usize {
        let pairs = self.annotations.iter().chain(&self.host.labels);
        let pairs: usize = pairs.map(|(key, value)| key.len() + value.len() + 64).sum();
        let prefixes: usize = self.pod_cidrs.iter().map(|text| text.len() + 24).sum();
        256 + self.name.len() + pairs + prefixes + 32 * self.host.addresses.len()
    }
}

/// The operator's word for a mesh, or what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    name: String,
    settings: Result<Settings, String>,
    generation: i64,
    condition: Option<Condition>,
}

impl Named for Mesh {
    fn name(&self) -> &str {
        &self.name
    }

    fn weight(&self) -> usize {
        let sites = self.settings.as_ref().map_or(0, |settings| settings.sites.values().map(Vec::len).sum());
        4096 + 64 * sites
    }
}

/// A Mesh as the API sends it: a spec that is wrong must not make the others unreadable.
pub type MeshObject = kube::core::Object<serde_json::Value, serde_json::Value>;

impl From<MeshObject> for Mesh {
    fn from(mesh: MeshObject) -> Self {
        let name = mesh.metadata.name.unwrap_or_default();
        let generation = mesh.metadata.generation.unwrap_or_default();
        let condition = Condition::find(mesh.status.as_ref());
        Self { settings: Settings::from_spec(mesh.spec), name, generation, condition }
    }
}

/// Where the API is reached: an EndpointSlice of the Service `kubernetes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Servers {
    name: String,
    addresses: BTreeSet<IpAddr>,
}

impl Named for Servers {
    fn name(&self) -> &str {
        &self.name
    }

    fn weight(&self) -> usize {
        256 + 32 * self.addresses.len()
    }
}

impl From<EndpointSlice> for Servers {
    fn from(slice: EndpointSlice) -> Self {
        let addresses = slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        Self {
            addresses: addresses.filter_map(|address| address.parse().ok()).collect(),
            name: slice.metadata.name.unwrap_or_default(),
        }
    }
}

/// All that is known.
#[derive(Debug)]
pub struct Directory {
    nodes: Listing<Entry>,
    mesh_nodes: Listing<Entry>,
    // None where nobody asks for them: federation does not.
    meshes: Option<Listing<Mesh>>,
    servers: Option<Listing<Servers>>,
    // Where the name leads that the API is reached by, if it is one; empty until that is known.
    name: Option<BTreeSet<IpAddr>>,
    rule: SiteRule,
    // The Mesh that counts.
    mesh: Option<MeshName>,
}

impl Directory {
    /// Nothing is known yet, of nodes and MeshNodes, and with `settings` also of Meshes and the API's own addresses.
    pub fn new(settings: bool) -> Self {
        Self {
            nodes: Listing::new("Node"),
            mesh_nodes: Listing::new("MeshNode"),
            meshes: settings.then(|| Listing::new("Mesh")),
            servers: settings.then(|| Listing::new("EndpointSlice")),
            name: None,
            rule: SiteRule::default(),
            mesh: None,
        }
    }

    /// The same within a budget.
    pub fn within(self, budget: Budget) -> Self {
        Self {
            nodes: self.nodes.within(budget),
            mesh_nodes: self.mesh_nodes.within(budget),
            meshes: self.meshes.map(|listing| listing.within(budget)),
            servers: self.servers.map(|listing| listing.within(budget)),
            ..self
        }
    }

    /// Sets who says where Nodes stand, beside the Mesh of this name.
    pub fn sites(&mut self, rule: SiteRule, mesh: Option<MeshName>) {
        (self.rule, self.mesh) = (rule, mesh);
    }

    /// The rule that is in force.
    fn rule(&self) -> SiteRule {
        let said = match self.mesh.as_ref().map(|name| self.mesh(name)) {
            Some(MeshWord::Said(settings)) => settings.old_site_label,
            _ => None,
        };
        SiteRule { old_label: self.rule.old_label.or(said), ..self.rule.clone() }
    }

    /// The API is reached by a name.
    pub fn reached_by_name(&mut self) {
        self.name.get_or_insert_default();
    }

    /// The name leads there. Returns whether that is news.
    pub fn resolved(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        self.name.replace(addresses.clone()) != Some(addresses)
    }

    /// The objects of a kind of node.
    pub fn listing(&mut self, kind: Kind) -> &mut Listing<Entry> {
        match kind {
            Kind::Node => &mut self.nodes,
            Kind::MeshNode => &mut self.mesh_nodes,
        }
    }

    /// The Meshes.
    pub fn meshes(&mut self) -> &mut Listing<Mesh> {
        self.meshes.get_or_insert_with(|| Listing::new("Mesh"))
    }

    /// Where only the API server's name leads, and no EndpointSlice.
    pub fn named(&self) -> BTreeSet<IpAddr> {
        let slices = self.servers.iter().flat_map(|listing| listing.entries.values());
        let listed: BTreeSet<IpAddr> = slices.flat_map(|servers| servers.addresses.iter().copied()).collect();
        self.name.iter().flatten().filter(|ip| !listed.contains(ip)).copied().collect()
    }

    /// The API's own EndpointSlices.
    pub fn servers(&mut self) -> &mut Listing<Servers> {
        self.servers.get_or_insert_with(|| Listing::new("EndpointSlice"))
    }

    /// The object that a node of the mesh publishes in: its Node, or else its MeshNode. With the object's own name.
    pub fn find(&self, node: &NodeName, cluster: Option<&ClusterName>) -> Option<(Kind, &Entry)> {
        let name = node.as_str();
        let local = match cluster {
            Some(cluster) => name.strip_suffix(cluster.as_str()).and_then(|name| name.strip_suffix('.')),
            None => Some(name),
        };
        let node = local.and_then(|local| self.nodes.entries.get(local)).map(|entry| (Kind::Node, entry));
        // Only who is known to have no Node speaks in a MeshNode.
        let mesh_node = self.mesh_nodes.entries.get(name).filter(|_| self.nodes.complete);
        node.or_else(|| mesh_node.map(|entry| (Kind::MeshNode, entry)))
    }

    /// Why not everything is known: something has never been listed. Where the API is reached is waited for, but need not be known.
    pub fn obstacle(&self) -> Option<String> {
        let nodes = self.nodes.obstacle().or_else(|| self.mesh_nodes.obstacle());
        // Older access rules do not allow these two; what they say is waited for, and no more.
        let meshes = nodes.or_else(|| self.meshes.as_ref().filter(|listing| !listing.denied)?.obstacle());
        meshes.or_else(|| self.servers.as_ref().filter(|listing| listing.trouble.is_none())?.obstacle())
    }

    /// Why some of it may be out of date.
    pub fn staleness(&self) -> Option<String> {
        let nodes = self.nodes.staleness().or_else(|| self.mesh_nodes.staleness());
        let mesh = nodes.or_else(|| self.meshes.as_ref()?.staleness());
        mesh.or_else(|| self.servers.as_ref()?.staleness())
    }

    /// Returns the reason why a listing is stale although the server does not refuse it.
    pub fn silence(&self) -> Option<String> {
        fn silent<T: Named>(listing: &Listing<T>) -> Option<String> {
            listing.staleness().filter(|_| !listing.refused)
        }
        let nodes = silent(&self.nodes).or_else(|| silent(&self.mesh_nodes));
        let meshes = nodes.or_else(|| self.meshes.as_ref().and_then(silent));
        meshes.or_else(|| self.servers.as_ref().and_then(silent))
    }

    /// Kinds that the server does not let us watch, each with what it said.
    pub fn refusals(&self) -> Vec<(&'static str, String)> {
        fn refused<T: Named>(listing: &Listing<T>) -> Option<(&'static str, String)> {
            Some((listing.kind, listing.trouble.clone().filter(|_| listing.refused)?))
        }
        // Older access rules do not allow the last two at all, and then they are done without.
        let known = |listing: &&Listing<Mesh>| listing.complete;
        let nodes = [refused(&self.nodes), refused(&self.mesh_nodes)].into_iter().flatten();
        let meshes = self.meshes.as_ref().filter(known).and_then(refused);
        let servers = self.servers.as_ref().filter(|listing| listing.complete).and_then(refused);
        nodes.chain(meshes).chain(servers).collect()
    }

    /// What the Mesh of this name says.
    pub fn mesh(&self, name: &MeshName) -> MeshWord {
        let Some(meshes) = &self.meshes else { return MeshWord::Silent };
        match meshes.entries.get(name.as_str()).map(|mesh| &mesh.settings) {
            Some(Ok(settings)) => MeshWord::Said(settings.clone()),
            Some(Err(why)) => MeshWord::Unclear(why.clone()),
            None if meshes.unknown => MeshWord::Missing("the cluster does not know the kind Mesh".to_owned()),
            None if !meshes.complete => {
                MeshWord::Missing(meshes.trouble.clone().unwrap_or_else(|| "it is not known yet".to_owned()))
            }
            None => MeshWord::Silent,
        }
    }

    /// Returns the status of the named Mesh, if it exists.
    pub(super) fn seen(&self, name: &MeshName) -> Option<Seen> {
        let mesh = self.meshes.as_ref()?.entries.get(name.as_str())?;
        let (generation, current) = (mesh.generation, mesh.condition.clone());
        Some(Seen { generation, current, unclear: mesh.settings.as_ref().err().cloned() })
    }

    /// Reports whether a node of this name may exist. Lists that are incomplete count as holding
    /// it. In a mesh of several clusters, nodes of other clusters are mirrored.
    pub(super) fn knows(&self, node: &str) -> bool {
        let local = node.split('.').next().unwrap_or(node);
        let known =
            |name: &str| self.nodes.entries.contains_key(name) || self.mesh_nodes.entries.contains_key(name);
        !self.nodes.complete || !self.mesh_nodes.complete || known(node) || known(local)
    }

    /// Where the API is reached, and whether that is all.
    pub fn server_addresses(&self) -> (BTreeSet<IpAddr>, bool) {
        let slices = self.servers.iter().flat_map(|listing| listing.entries.values());
        let listed = slices.flat_map(|servers| servers.addresses.iter().copied()).take(SERVERS_MOST);
        let known = self.servers.as_ref().is_some_and(|listing| listing.complete);
        let named = self.name.as_ref().is_none_or(|name| !name.is_empty());
        (listed.chain(self.name.iter().flatten().copied()).collect(), known && named)
    }

    fn listings(&self) -> [(Kind, &Listing<Entry>); 2] {
        [(Kind::Node, &self.nodes), (Kind::MeshNode, &self.mesh_nodes)]
    }

    /// Everything that is known. A Node that the cluster grants no prefixes gets those of the MeshNode of its name.
    pub fn snapshot(&self, cluster: Option<&ClusterName>) -> Snapshot {
        self.merged(cluster, |_| true)
    }

    /// What the cluster itself has, and apart from it, by link, the MeshNodes that stand in for others' nodes.
    pub fn own_and_mirrors(
        &self,
        cluster: Option<&ClusterName>,
    ) -> (Snapshot, BTreeMap<String, Vec<NodeRecord>>) {
        let mut mirrors: BTreeMap<String, Vec<NodeRecord>> = BTreeMap::new();
        let rule = self.rule();
        for entry in self.mesh_nodes.entries.values() {
            if let (Some(link), Ok(record)) = (&entry.link, entry.record(Kind::MeshNode, cluster, &rule)) {
                mirrors.entry(link.clone()).or_default().push(record);
            }
        }
        (self.merged(cluster, |entry| entry.link.is_none()), mirrors)
    }

    fn merged(&self, cluster: Option<&ClusterName>, counts: impl Fn(&Entry) -> bool) -> Snapshot {
        let mut nodes: BTreeMap<NodeName, NodeRecord> = BTreeMap::new();
        let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
        let mut problems = Vec::new();
        let rule = self.rule();
        for (kind, listing) in self.listings() {
            for entry in listing.entries.values().filter(|entry| counts(entry)) {
                let record = entry.record(kind, cluster, &rule);
                if let Ok(NodeRecord { name, .. }) = &record {
                    let node = || Some(name.clone());
                    problems.extend(entry.problems(name, &rule).map(|text| Problem { node: node(), text }));
                }
                match record {
                    Ok(record) => match nodes.get_mut(&record.name) {
                        Some(node) if node.pod_cidrs.is_empty() => node.pod_cidrs = record.pod_cidrs,
                        Some(_) => {}
                        None => {
                            if kind == Kind::Node {
                                hosts.insert(record.name.to_string(), entry.host.clone());
                            }
                            nodes.insert(record.name.clone(), record);
                        }
                    },
                    Err(text) => {
                        let node = entry.name.parse().ok();
                        problems.push(Problem { node, text });
                    }
                }
            }
        }
        for (name, host) in &mut hosts {
            let record = name.parse::<NodeName>().ok().and_then(|name| nodes.get(&name));
            let granted = record.into_iter().flat_map(|record| &record.pod_cidrs);
            host.prefixes = granted.filter_map(|text| text.parse().ok()).collect();
        }
        Snapshot {
            nodes: nodes.into_values().collect(),
            hosts: Arc::new(hosts),
            problems,
            mesh_nodes: Some(!self.mesh_nodes.unknown),
            ..Snapshot::default()
        }
    }
}

#[cfg(test)]
#[path = "directory/tests.rs"]
mod tests;
