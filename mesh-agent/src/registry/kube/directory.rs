//! What a cluster's API holds of nodes, as far as the mesh reads it. Pure: events go in, a snapshot comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ObjectMeta;
use mesh_keyring::{ClusterName, MeshName, NodeName};
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{KNOWN, SITE};
use serde::{Deserialize, Serialize};

use crate::manifest::NodeSpec;
use crate::registry::{MeshWord, Problem, Snapshot};
use crate::settings::Settings;

/// The part of a Node's `spec` that is read.
pub type Node = kube::core::Object<NodeSpec, kube::core::NotUsed>;
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
    // Of a MeshNode that stands in for a node of another cluster.
    link: Option<String>,
}

/// The label of a MeshNode that stands in for a node of another cluster: which ClusterLink it comes through.
pub const LINK: &str = "sennit.dev/link";

impl From<Node> for Entry {
    fn from(node: Node) -> Self {
        let site = node.metadata.labels.as_ref().and_then(|labels| labels.get(SITE)).cloned();
        Self::new(node.metadata, site, node.spec.prefixes())
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

/// All objects of a kind, once they have been listed.
#[derive(Debug)]
pub struct Listing<T> {
    // As in manifests.
    kind: &'static str,
    entries: BTreeMap<String, T>,
    complete: bool,
    // The cluster never knew the kind.
    unknown: bool,
    // It does not let us read it.
    denied: bool,
    trouble: Option<String>,
}

/// Something that has a name among its kind.
pub trait Named: PartialEq {
    /// The name.
    fn name(&self) -> &str;
}

impl Named for Entry {
    fn name(&self) -> &str {
        &self.name
    }
}

impl<T: Named> Listing<T> {
    fn new(kind: &'static str) -> Self {
        Self { kind, entries: BTreeMap::new(), complete: false, unknown: false, denied: false, trouble: None }
    }

    /// All objects of the kind were listed. Returns whether that changes anything.
    pub fn replace(&mut self, entries: impl IntoIterator<Item = T>) -> bool {
        let entries = entries.into_iter().map(|entry| (entry.name().to_owned(), entry)).collect();
        let same = self.complete && !self.unknown && self.trouble.is_none() && self.entries == entries;
        *self = Self { entries, complete: true, ..Self::new(self.kind) };
        !same
    }

    /// One object is there now. Returns whether that changes anything.
    pub fn apply(&mut self, entry: T) -> bool {
        if self.entries.get(entry.name()) == Some(&entry) {
            return false;
        }
        self.entries.insert(entry.name().to_owned(), entry);
        true
    }

    /// One object is gone. Returns whether that changes anything.
    pub fn delete(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    /// The cluster does not know the kind. Where it never did, there are none; where it did, what was known stays.
    pub fn unknown(&mut self) -> bool {
        if self.complete && !self.entries.is_empty() {
            return self.trouble(format!("the cluster does not know the kind {} any more", self.kind));
        }
        let same = self.complete && self.unknown && self.trouble.is_none();
        *self = Self { complete: true, unknown: true, ..Self::new(self.kind) };
        !same
    }

    /// The kind cannot be watched now. Returns whether that is news.
    pub fn trouble(&mut self, why: String) -> bool {
        let news = self.trouble.as_ref() != Some(&why);
        self.trouble = Some(why);
        news
    }

    /// It can be watched again. Returns whether that is news.
    pub fn connected(&mut self) -> bool {
        let was_unknown = std::mem::take(&mut self.unknown);
        self.trouble.take().is_some() || was_unknown
    }

    /// We may not read it. Returns whether that is news.
    pub fn denied(&mut self, why: String) -> bool {
        self.denied = true;
        self.trouble(why)
    }

    fn obstacle(&self) -> Option<String> {
        if self.complete {
            return None;
        }
        let why = self.trouble.as_ref().map_or(" are being listed".to_owned(), |why| format!(": {why}"));
        Some(format!("{}{why}", self.plural()))
    }

    fn staleness(&self) -> Option<String> {
        Some(format!("{}: {}", self.plural(), self.trouble.as_ref()?))
    }

    fn plural(&self) -> String {
        format!("{}{}", self.kind, if self.kind.ends_with('h') { "es" } else { "s" })
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
        let mut problems = Vec::new();
        for (kind, listing) in self.listings() {
            for entry in listing.entries.values().filter(|entry| counts(entry)) {
                match entry.record(kind, cluster) {
                    Ok(record) => match nodes.get_mut(&record.name) {
                        Some(node) if node.pod_cidrs.is_empty() => node.pod_cidrs = record.pod_cidrs,
                        Some(_) => {}
                        None => {
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
            problems,
            mesh_nodes: Some(!self.mesh_nodes.unknown),
            ..Snapshot::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, cidrs: &[&str], key: &str) -> Entry {
        let node: Node = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "resourceVersion": "7", "annotations": {"sennit.dev/public-key": key, "sennit.dev/later": "c", "other.io/a": "b"}},
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
            "status": {"conditions": [{"type": "Ready"}]},
        }))
        .unwrap();
        node.into()
    }

    fn mesh_node(name: &str, site: &str, cidrs: &[&str]) -> Entry {
        let node: MeshNode = serde_json::from_value(json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "MeshNode",
            "metadata": {"name": name}, "spec": {"site": site, "podCIDRs": cidrs}, "status": {"x": 1},
        }))
        .unwrap();
        node.into()
    }

    fn listed() -> Directory {
        let mut directory = Directory::new(false);
        assert!(
            directory.listing(Kind::Node).replace([node("a", &["10.1.0.0/24"], "k"), node("b", &[], "k")])
        );
        assert!(directory.listing(Kind::MeshNode).replace([]));
        directory
    }

    #[test]
    fn until_all_kinds_are_listed_something_is_in_the_way() {
        let mut directory = Directory::new(false);
        assert_eq!(directory.obstacle().unwrap(), "Nodes are being listed");
        directory.listing(Kind::Node).replace([]);
        assert_eq!(directory.obstacle().unwrap(), "MeshNodes are being listed");
        directory.listing(Kind::MeshNode).unknown();
        assert_eq!(directory.obstacle(), None);
    }

    #[test]
    fn before_nodes_are_listed_nobody_speaks_in_a_mesh_node() {
        let mut directory = Directory::new(false);
        directory.listing(Kind::MeshNode).replace([mesh_node("a", "aws", &[])]);
        let name: NodeName = "a".parse().unwrap();
        assert_eq!(directory.find(&name, None), None);
        directory.listing(Kind::Node).trouble("refused".into());
        assert_eq!(directory.obstacle().unwrap(), "Nodes: refused");
        directory.listing(Kind::Node).replace([]);
        assert_eq!(directory.find(&name, None).map(|(kind, _)| kind), Some(Kind::MeshNode));
        directory.listing(Kind::Node).apply(node("a", &[], "k"));
        assert_eq!(directory.find(&name, None).map(|(kind, _)| kind), Some(Kind::Node));
    }

    #[test]
    fn a_heartbeat_changes_nothing_and_our_annotations_do() {
        let mut directory = listed();
        assert!(!directory.listing(Kind::Node).apply(node("a", &["10.1.0.0/24"], "k")));
        assert!(directory.listing(Kind::Node).apply(node("a", &["10.1.0.0/24"], "other")));
        assert!(directory.listing(Kind::Node).apply(node("c", &[], "k")));
        assert!(directory.listing(Kind::Node).delete("c"));
        assert!(!directory.listing(Kind::Node).delete("c"));
        assert!(!directory.listing(Kind::MeshNode).replace([]), "listed anew, the same as before");
    }

    #[test]
    fn only_our_annotations_and_the_grants_come_through() {
        let snapshot = listed().snapshot(None);
        assert_eq!(snapshot.problems, []);
        assert_eq!(snapshot.nodes[0].pod_cidrs, ["10.1.0.0/24"]);
        assert_eq!(snapshot.nodes[0].annotations.keys().collect::<Vec<_>>(), ["sennit.dev/public-key"]);
    }

    #[test]
    fn a_mesh_node_grants_what_the_cluster_does_not_and_overrules_nothing() {
        let mut directory = listed();
        directory.listing(Kind::MeshNode).apply(mesh_node("a", "aws", &["10.9.0.0/24"]));
        directory.listing(Kind::MeshNode).apply(mesh_node("b", "aws", &["10.2.0.0/24"]));
        directory.listing(Kind::MeshNode).apply(mesh_node("host", "aws", &["10.3.0.0/24"]));
        let snapshot = directory.snapshot(None);
        let cidrs: Vec<_> = snapshot.nodes.iter().map(|n| (n.name.as_str(), &n.pod_cidrs[0][..])).collect();
        assert_eq!(cidrs, [("a", "10.1.0.0/24"), ("b", "10.2.0.0/24"), ("host", "10.3.0.0/24")]);
        assert_eq!(snapshot.nodes[0].annotations["sennit.dev/public-key"], "k");
        assert_eq!(snapshot.nodes[2].site_label.as_ref().unwrap().as_str(), "aws");
    }

    #[test]
    fn in_a_mesh_of_clusters_a_node_bears_its_clusters_name() {
        let cluster: ClusterName = "west".parse().unwrap();
        let mut directory = listed();
        directory.listing(Kind::MeshNode).apply(mesh_node("host", "aws", &[]));
        directory.listing(Kind::MeshNode).apply(mesh_node("b.west", "aws", &["10.2.0.0/24"]));
        let snapshot = directory.snapshot(Some(&cluster));
        let names: Vec<&str> = snapshot.nodes.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["a.west", "b.west", "host"]);
        assert_eq!(snapshot.nodes[1].pod_cidrs, ["10.2.0.0/24"]);
        let found = |name: &str| {
            let (kind, entry) = directory.find(&name.parse().unwrap(), Some(&cluster))?;
            Some((kind, entry.name().to_owned()))
        };
        assert_eq!(found("a.west"), Some((Kind::Node, "a".to_owned())));
        assert_eq!(found("host"), Some((Kind::MeshNode, "host".to_owned())));
        assert_eq!((found("a"), found("awest"), found("c.west")), (None, None, None));
        assert_eq!(directory.find(&"a".parse().unwrap(), None).map(|(kind, _)| kind), Some(Kind::Node));
    }

    #[test]
    fn mirrors_are_told_apart_and_count_as_nodes() {
        let mut directory = listed();
        let mut mirror = mesh_node("c.west", "aws", &["10.3.0.0/24"]);
        mirror.link = Some("west".into());
        directory.listing(Kind::MeshNode).apply(mirror);
        directory.listing(Kind::MeshNode).apply(mesh_node("host", "aws", &[]));
        assert_eq!(directory.snapshot(None).nodes.len(), 4);
        let (own, mirrors) = directory.own_and_mirrors(None);
        assert_eq!(own.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["a", "b", "host"]);
        assert_eq!((mirrors.len(), mirrors["west"][0].name.as_str()), (1, "c.west"));
    }

    #[test]
    fn a_kind_that_the_cluster_loses_leaves_what_was_known() {
        let mut directory = listed();
        directory.listing(Kind::MeshNode).apply(mesh_node("host", "aws", &[]));
        assert!(directory.listing(Kind::MeshNode).unknown());
        assert!(directory.staleness().unwrap().contains("does not know the kind MeshNode any more"));
        assert_eq!((directory.obstacle(), directory.snapshot(None).nodes.len()), (None, 3));
        assert!(directory.listing(Kind::MeshNode).connected());
        assert_eq!(directory.staleness(), None);
    }

    fn mesh(spec: serde_json::Value) -> Mesh {
        let mesh: MeshObject = serde_json::from_value(json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "prod"}, "spec": spec,
        }))
        .unwrap();
        mesh.into()
    }

    #[test]
    fn a_mesh_has_to_be_looked_for_before_all_is_known() {
        let name: MeshName = "prod".parse().unwrap();
        let mut directory = Directory::new(true);
        directory.listing(Kind::Node).replace([]);
        directory.listing(Kind::MeshNode).replace([]);
        assert_eq!(directory.obstacle().unwrap(), "Meshes are being listed");
        directory.meshes().unknown();
        assert!(
            matches!(directory.mesh(&name), MeshWord::Missing(_)),
            "no kind is not the word that there is none"
        );
        assert_eq!(directory.obstacle().unwrap(), "EndpointSlices are being listed");
        directory.servers().trouble("forbidden".into());
        assert_eq!(directory.obstacle(), None);
        directory.meshes().replace([mesh(json!({"wireguard": {"listenPort": 4000}}))]);
        assert!(matches!(directory.mesh(&name), MeshWord::Said(said) if said.listen_port == Some(4000)));
        assert_eq!(directory.mesh(&"other".parse().unwrap()), MeshWord::Silent);
        directory.meshes().apply(mesh(json!({"sites": 7})));
        assert!(matches!(directory.mesh(&name), MeshWord::Unclear(why) if why.starts_with("spec")));
    }

    #[test]
    fn a_kind_that_we_may_not_read_is_not_waited_for() {
        let mut directory = Directory::new(true);
        directory.listing(Kind::Node).replace([]);
        directory.listing(Kind::MeshNode).replace([]);
        directory.servers().replace([]);
        directory.meshes().denied("forbidden (403)".into());
        assert_eq!(directory.obstacle(), None);
        assert!(
            matches!(directory.mesh(&"prod".parse().unwrap()), MeshWord::Missing(why) if why.contains("403"))
        );
        assert_eq!(directory.staleness().unwrap(), "Meshes: forbidden (403)");
    }

    #[test]
    fn a_kind_that_was_away_for_a_moment_is_known_again() {
        let mut directory = listed();
        assert!(directory.listing(Kind::MeshNode).unknown());
        assert_eq!(directory.snapshot(None).mesh_nodes, Some(false));
        assert!(directory.listing(Kind::MeshNode).connected());
        assert_eq!(directory.snapshot(None).mesh_nodes, Some(true));
    }

    #[test]
    fn where_the_api_is_reached_is_in_its_own_endpoints() {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "kubernetes"}, "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.1"]}, {"addresses": ["192.0.2.2", "garbage"]}],
        }))
        .unwrap();
        let mut directory = Directory::new(true);
        assert!(directory.servers().replace([slice.into()]));
        let all = |directory: &Directory| {
            let (addresses, known) = directory.server_addresses();
            (addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), known)
        };
        assert_eq!(all(&directory), ("192.0.2.1 192.0.2.2".to_owned(), true));
        directory.reached_by_name();
        assert!(!all(&directory).1, "not before the name has an address");
        assert!(directory.resolved(BTreeSet::from(["192.0.2.9".parse().unwrap()])));
        assert_eq!(all(&directory), ("192.0.2.1 192.0.2.2 192.0.2.9".to_owned(), true));
        directory.servers().trouble("forbidden".into());
        assert_eq!(directory.staleness().unwrap(), "EndpointSlices: forbidden");
    }

    #[test]
    fn trouble_is_news_once() {
        let mut directory = listed();
        assert!(directory.listing(Kind::Node).trouble("refused".into()));
        assert!(!directory.listing(Kind::Node).trouble("refused".into()));
        assert_eq!(
            (directory.staleness().unwrap(), directory.obstacle()),
            ("Nodes: refused".to_owned(), None)
        );
        assert!(directory.listing(Kind::Node).connected() && !directory.listing(Kind::Node).connected());
    }

    #[test]
    fn names_that_are_none_of_ours_harm_only_themselves() {
        let mut directory = listed();
        directory.listing(Kind::MeshNode).apply(mesh_node("host", "Not A Site", &[]));
        let snapshot = directory.snapshot(None);
        assert_eq!(snapshot.nodes.len(), 2);
        assert!(snapshot.problems[0].text.contains("MeshNode host: site"), "{:?}", snapshot.problems);
    }
}
