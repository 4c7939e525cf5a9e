//! What a cluster's API holds of nodes, as far as the mesh reads it. Pure: events go in, a snapshot comes out.

use std::collections::BTreeMap;

use kube::api::ObjectMeta;
use mesh_keyring::{ClusterName, NodeName};
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{KNOWN, SITE};
use serde::{Deserialize, Serialize};

use crate::manifest::NodeSpec;
use crate::registry::{Problem, Snapshot};

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

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
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

// All objects of a kind, once they have been listed.
#[derive(Debug, Default)]
struct Listing {
    entries: BTreeMap<String, Entry>,
    complete: bool,
    trouble: Option<String>,
}

/// All that is known.
#[derive(Debug, Default)]
pub struct Directory {
    nodes: Listing,
    mesh_nodes: Listing,
}

impl Directory {
    fn listing(&mut self, kind: Kind) -> &mut Listing {
        match kind {
            Kind::Node => &mut self.nodes,
            Kind::MeshNode => &mut self.mesh_nodes,
        }
    }

    /// All objects of a kind were listed. Returns whether that changes anything.
    pub fn replace(&mut self, kind: Kind, entries: impl IntoIterator<Item = Entry>) -> bool {
        let listing = self.listing(kind);
        let entries = entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let same = listing.complete && listing.trouble.is_none() && listing.entries == entries;
        *listing = Listing { entries, complete: true, trouble: None };
        !same
    }

    /// One object is there now. Returns whether that changes anything.
    pub fn apply(&mut self, kind: Kind, entry: Entry) -> bool {
        let entries = &mut self.listing(kind).entries;
        if entries.get(&entry.name) == Some(&entry) {
            return false;
        }
        entries.insert(entry.name.clone(), entry);
        true
    }

    /// One object is gone. Returns whether that changes anything.
    pub fn delete(&mut self, kind: Kind, entry: &Entry) -> bool {
        self.listing(kind).entries.remove(&entry.name).is_some()
    }

    /// The cluster does not know the kind. Where it never did, there are none; where it did, what was known stays.
    pub fn unknown(&mut self, kind: Kind) -> bool {
        let listing = self.listing(kind);
        if listing.complete && !listing.entries.is_empty() {
            return self
                .trouble(kind, format!("the cluster does not know the kind {} any more", kind.as_str()));
        }
        self.replace(kind, [])
    }

    /// The kind cannot be watched now. Returns whether that is news.
    pub fn trouble(&mut self, kind: Kind, why: String) -> bool {
        let listing = self.listing(kind);
        let news = listing.trouble.as_ref() != Some(&why);
        listing.trouble = Some(why);
        news
    }

    /// It can be watched again. Returns whether that is news.
    pub fn connected(&mut self, kind: Kind) -> bool {
        self.listing(kind).trouble.take().is_some()
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

    /// Why not everything is known: something has never been listed.
    pub fn obstacle(&self) -> Option<String> {
        let (kind, listing) = self.listings().into_iter().find(|(_, listing)| !listing.complete)?;
        let why = listing.trouble.as_ref().map_or(" are being listed".to_owned(), |why| format!(": {why}"));
        Some(format!("{}s{why}", kind.as_str()))
    }

    /// Why some of it may be out of date.
    pub fn staleness(&self) -> Option<String> {
        let mut listings = self.listings().into_iter();
        listings
            .find_map(|(kind, listing)| Some(format!("{}s: {}", kind.as_str(), listing.trouble.as_ref()?)))
    }

    fn listings(&self) -> [(Kind, &Listing); 2] {
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
        Snapshot { nodes: nodes.into_values().collect(), problems, ..Snapshot::default() }
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
        let mut directory = Directory::default();
        assert!(directory.replace(Kind::Node, [node("a", &["10.1.0.0/24"], "k"), node("b", &[], "k")]));
        assert!(directory.replace(Kind::MeshNode, []));
        directory
    }

    #[test]
    fn until_all_kinds_are_listed_something_is_in_the_way() {
        let mut directory = Directory::default();
        assert_eq!(directory.obstacle().unwrap(), "Nodes are being listed");
        directory.replace(Kind::Node, []);
        assert_eq!(directory.obstacle().unwrap(), "MeshNodes are being listed");
        directory.unknown(Kind::MeshNode);
        assert_eq!(directory.obstacle(), None);
    }

    #[test]
    fn before_nodes_are_listed_nobody_speaks_in_a_mesh_node() {
        let mut directory = Directory::default();
        directory.replace(Kind::MeshNode, [mesh_node("a", "aws", &[])]);
        let name: NodeName = "a".parse().unwrap();
        assert_eq!(directory.find(&name, None), None);
        directory.trouble(Kind::Node, "refused".into());
        assert_eq!(directory.obstacle().unwrap(), "Nodes: refused");
        directory.replace(Kind::Node, []);
        assert_eq!(directory.find(&name, None).map(|(kind, _)| kind), Some(Kind::MeshNode));
        directory.apply(Kind::Node, node("a", &[], "k"));
        assert_eq!(directory.find(&name, None).map(|(kind, _)| kind), Some(Kind::Node));
    }

    #[test]
    fn a_heartbeat_changes_nothing_and_our_annotations_do() {
        let mut directory = listed();
        assert!(!directory.apply(Kind::Node, node("a", &["10.1.0.0/24"], "k")));
        assert!(directory.apply(Kind::Node, node("a", &["10.1.0.0/24"], "other")));
        assert!(directory.apply(Kind::Node, node("c", &[], "k")));
        assert!(directory.delete(Kind::Node, &node("c", &[], "k")));
        assert!(!directory.delete(Kind::Node, &node("c", &[], "k")));
        assert!(!directory.replace(Kind::MeshNode, []), "listed anew, the same as before");
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
        directory.apply(Kind::MeshNode, mesh_node("a", "aws", &["10.9.0.0/24"]));
        directory.apply(Kind::MeshNode, mesh_node("b", "aws", &["10.2.0.0/24"]));
        directory.apply(Kind::MeshNode, mesh_node("host", "aws", &["10.3.0.0/24"]));
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
        directory.apply(Kind::MeshNode, mesh_node("host", "aws", &[]));
        directory.apply(Kind::MeshNode, mesh_node("b.west", "aws", &["10.2.0.0/24"]));
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
        directory.apply(Kind::MeshNode, mirror);
        directory.apply(Kind::MeshNode, mesh_node("host", "aws", &[]));
        assert_eq!(directory.snapshot(None).nodes.len(), 4);
        let (own, mirrors) = directory.own_and_mirrors(None);
        assert_eq!(own.nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["a", "b", "host"]);
        assert_eq!((mirrors.len(), mirrors["west"][0].name.as_str()), (1, "c.west"));
    }

    #[test]
    fn a_kind_that_the_cluster_loses_leaves_what_was_known() {
        let mut directory = listed();
        directory.apply(Kind::MeshNode, mesh_node("host", "aws", &[]));
        assert!(directory.unknown(Kind::MeshNode));
        assert!(directory.staleness().unwrap().contains("does not know the kind MeshNode any more"));
        assert_eq!((directory.obstacle(), directory.snapshot(None).nodes.len()), (None, 3));
        assert!(directory.connected(Kind::MeshNode));
        assert_eq!(directory.staleness(), None);
    }

    #[test]
    fn trouble_is_news_once() {
        let mut directory = listed();
        assert!(directory.trouble(Kind::Node, "refused".into()));
        assert!(!directory.trouble(Kind::Node, "refused".into()));
        assert_eq!(
            (directory.staleness().unwrap(), directory.obstacle()),
            ("Nodes: refused".to_owned(), None)
        );
        assert!(directory.connected(Kind::Node) && !directory.connected(Kind::Node));
    }

    #[test]
    fn names_that_are_none_of_ours_harm_only_themselves() {
        let mut directory = listed();
        directory.apply(Kind::MeshNode, mesh_node("host", "Not A Site", &[]));
        let snapshot = directory.snapshot(None);
        assert_eq!(snapshot.nodes.len(), 2);
        assert!(snapshot.problems[0].text.contains("MeshNode host: site"), "{:?}", snapshot.problems);
    }
}
