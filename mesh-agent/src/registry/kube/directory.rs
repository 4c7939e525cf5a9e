//! What a cluster's API holds of nodes, as far as the mesh reads it. Pure: events go in, a snapshot comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ObjectMeta;
use mesh_keyring::{ClusterName, MeshName, NodeName};
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{KNOWN, SITE};
use serde::{Deserialize, Serialize};

use super::listing::{Listing, Named};
use crate::manifest::{NodeSpec, NodeStatus};
use crate::registry::{Host, MeshWord, Problem, Snapshot};
use crate::settings::Settings;

/// The parts of a Node that are read.
pub type Node = kube::core::Object<NodeSpec, NodeStatus>;
/// A host without a Node object, or the operator's grant for a Node that the cluster gives no prefixes.
pub type MeshNode = kube::core::Object<MeshNodeSpec, kube::core::NotUsed>;

/// `spec` of a MeshNode: the operator's word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct MeshNodeSpec {
    /// The site that the host stands in.
    pub site: Option<String>,
    /// The prefixes that it holds.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

/// What counts of one object. Two that are equal say the same, whatever else of the object changed: heartbeats do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    name: String,
    site: Option<String>,
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
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let site = labels.get(SITE).cloned();
        let addresses = node.status.map(|status| status.addresses()).unwrap_or_default();
        Self { host: Host { labels, addresses }, ..Self::new(node.metadata, site, node.spec.prefixes()) }
    }
}

impl From<MeshNode> for Entry {
    fn from(node: MeshNode) -> Self {
        let link = node.metadata.labels.as_ref().and_then(|labels| labels.get(LINK)).cloned();
        Self { link, ..Self::new(node.metadata, node.spec.site, node.spec.pod_cidrs) }
    }
}

impl Entry {
    fn new(metadata: ObjectMeta, site: Option<String>, pod_cidrs: Vec<String>) -> Self {
        let all = metadata.annotations.unwrap_or_default();
        Self {
            name: metadata.name.unwrap_or_default(),
            site,
            pod_cidrs,
            annotations: all.into_iter().filter(|(key, _)| KNOWN.contains(&key.as_str())).collect(),
            host: Host::default(),
            link: None,
        }
    }

    /// Those of its annotations that agents read.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    // In a mesh of several clusters a Node is known as NODE.CLUSTER; MeshNodes bear their names in the mesh already.
    fn record(&self, kind: Kind, cluster: Option<&ClusterName>) -> Result<NodeRecord, String> {
        let name = match cluster.filter(|_| kind == Kind::Node) {
            Some(cluster) => format!("{}.{cluster}", self.name),
            None => self.name.clone(),
        };
        let kind = kind.as_str();
        let name: NodeName = name.parse().map_err(|e| format!("{kind} {:?}: {e}", self.shown()))?;
        let site_label = match &self.site {
            Some(site) => Some(site.parse().map_err(|e| format!("{kind} {name}: site: {e}"))?),
            None => None,
        };
        Ok(NodeRecord {
            name,
            site_label,
            pod_cidrs: self.pod_cidrs.clone(),
            annotations: self.annotations.clone(),
        })
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
}

/// The operator's word for a mesh, or what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    name: String,
    settings: Result<Settings, String>,
}

impl Named for Mesh {
    fn name(&self) -> &str {
        &self.name
    }
}

/// A Mesh as the API sends it: a spec that is wrong must not make the others unreadable.
pub type MeshObject = kube::core::Object<serde_json::Value, kube::core::NotUsed>;

impl From<MeshObject> for Mesh {
    fn from(mesh: MeshObject) -> Self {
        let name = mesh.metadata.name.unwrap_or_default();
        Self { settings: Settings::from_spec(mesh.spec), name }
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
        }
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
        for entry in self.mesh_nodes.entries.values() {
            if let (Some(link), Ok(record)) = (&entry.link, entry.record(Kind::MeshNode, cluster)) {
                mirrors.entry(link.clone()).or_default().push(record);
            }
        }
        (self.merged(cluster, |entry| entry.link.is_none()), mirrors)
    }

    fn merged(&self, cluster: Option<&ClusterName>, counts: impl Fn(&Entry) -> bool) -> Snapshot {
        let mut nodes: BTreeMap<NodeName, NodeRecord> = BTreeMap::new();
        let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
        let mut problems = Vec::new();
        for (kind, listing) in self.listings() {
            for entry in listing.entries.values().filter(|entry| counts(entry)) {
                match entry.record(kind, cluster) {
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
