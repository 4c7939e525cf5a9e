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
    assert!(directory.listing(Kind::Node).replace([node("a", &["10.1.0.0/24"], "k"), node("b", &[], "k")]));
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
    assert_eq!((directory.staleness().unwrap(), directory.obstacle()), ("Nodes: refused".to_owned(), None));
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

fn labelled(labels: serde_json::Value) -> Entry {
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "a", "labels": labels}})).unwrap();
    node.into()
}

fn site_by(rule: &SiteRule, labels: serde_json::Value) -> (Option<String>, Vec<Problem>) {
    let mut directory = Directory::new(false);
    directory.sites(rule.clone(), None);
    directory.listing(Kind::Node).replace([labelled(labels)]);
    directory.listing(Kind::MeshNode).replace([]);
    let snapshot = directory.snapshot(None);
    (snapshot.nodes[0].site_label.as_ref().map(ToString::to_string), snapshot.problems)
}

#[test]
fn the_old_site_label_counts_where_it_may() {
    let closed = SiteRule { old_label: None, unlabelled: Some("home".parse().unwrap()) };
    let open = SiteRule { old_label: Some(true), ..closed.clone() };
    let (old, new) = (json!({"sennit.dev/site": "gcp"}), json!({(SITE_LABEL): "aws"}));
    let both = json!({"sennit.dev/site": "gcp", (SITE_LABEL): "aws"});
    for (rule, labels, wanted) in [
        (&closed, &new, "aws"),
        (&closed, &both, "aws"),
        (&closed, &old, "home"),
        (&closed, &json!({}), "home"),
        (&open, &old, "gcp"),
        (&open, &both, "aws"),
    ] {
        let (site, problems) = site_by(rule, labels.clone());
        assert_eq!(site.as_deref(), Some(wanted), "{labels} {rule:?}");
        let is_told = labels == &old && rule == &closed;
        assert_eq!(problems.len(), usize::from(is_told), "{problems:?}");
        let remedy = format!("kubectl label node a {SITE_LABEL}=gcp");
        assert!(!is_told || problems[0].text.contains(&remedy), "{problems:?}");
    }
}

#[test]
fn a_mesh_allows_the_old_site_label() {
    let mut directory = Directory::new(true);
    let name: MeshName = "m".parse().unwrap();
    directory.sites(SiteRule::default(), Some(name));
    directory.listing(Kind::Node).replace([labelled(json!({"sennit.dev/site": "gcp"}))]);
    let site = |directory: &Directory| directory.snapshot(None).nodes[0].site_label.clone();
    assert_eq!(site(&directory), None);
    let mesh: MeshObject = serde_json::from_value(json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "m"}, "spec": {"oldSiteLabel": true},
    }))
    .unwrap();
    directory.meshes().replace([mesh.into()]);
    assert_eq!(site(&directory).map(|site| site.to_string()).as_deref(), Some("gcp"));
}

#[test]
fn granted_prefixes_come_with_the_host() {
    let mut directory = listed();
    directory.listing(Kind::MeshNode).apply(mesh_node("b", "aws", &["10.2.0.0/24"]));
    let hosts = directory.snapshot(None).hosts;
    assert_eq!(hosts["a"].prefixes, ["10.1.0.0/24".parse().unwrap()].into());
    assert_eq!(hosts["b"].prefixes, ["10.2.0.0/24".parse().unwrap()].into());
}
