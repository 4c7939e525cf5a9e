use serde_json::{Value, json};

use super::*;
use crate::object::{Metadata, PodSpec, PodStatus};
use crate::selector::LabelSelector;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn node(prefix: &str, status: &[&str]) -> Node {
    Node {
        labels: Some([("role".to_owned(), "ingress".to_owned())].into()),
        status_addresses: status.iter().map(|text| address(text)).collect(),
        prefixes: [prefix].iter().filter(|text| !text.is_empty()).map(|text| text.parse().unwrap()).collect(),
        ..Node::default()
    }
}

fn nodes() -> BTreeMap<String, Node> {
    let nodes = [("n1", node("10.1.0.0/24", &[])), ("n2", node("10.2.0.0/24", &[])), ("n3", node("", &[]))];
    nodes.map(|(name, node)| (name.to_owned(), node)).into()
}

fn pod(name: &str, node: &str, created: &str, ip: &str) -> Pod {
    let from = |value: Value| serde_json::from_value::<Metadata>(value).unwrap();
    let created = format!("2026-{created}-01T00:00:00Z");
    let metadata = json!({"name": name, "namespace": "shop", "uid": name, "creationTimestamp": created, "labels": {"app": name}});
    let spec: PodSpec = serde_json::from_value(json!({"nodeName": node})).unwrap();
    let status: PodStatus = serde_json::from_value(json!({"podIPs": [{"ip": ip}]})).unwrap();
    Pod::new(from(metadata), spec, status).unwrap()
}

fn world(outside: bool) -> World {
    let mut world = World::default();
    world.set_bounds(&["fd00:99::/48".parse().unwrap()].into(), outside);
    world.set_nodes(nodes());
    world
}

fn holder(world: &World, ip: &str) -> Option<String> {
    world.holder(address(ip)).map(|pod| pod.key.name.clone())
}

fn told(world: &World) -> Vec<String> {
    world.address_refusals().collect()
}

#[test]
fn a_mirror_pod_takes_no_address_of_another_node() {
    for outside in [false, true] {
        let mut world = world(outside);
        world.put_pod(pod("victim", "n2", "01", "10.2.0.5"));
        world.put_pod(pod("mirror", "n1", "02", "10.2.0.5"));
        world.put_pod(pod("payments", "n1", "02", "10.2.0.77"));
        assert_eq!(holder(&world, "10.2.0.5").as_deref(), Some("victim"));
        assert_eq!(holder(&world, "10.2.0.77"), None, "a stranger gets no labels");
        let told = told(&world);
        assert_eq!((told.len(), world.refused_addresses()), (2, 2));
        for part in ["Pod shop/mirror on node n1", "10.2.0.5", "of node n2", "delete the pod"] {
            assert!(told[0].contains(part), "{told:?}");
        }
        assert_eq!(world.remove_pod(&Key::new(Some("shop"), "mirror")).len(), 1);
        assert_eq!(world.refused_addresses(), 1);
    }
}

#[test]
fn on_one_node_the_newest_pod_has_an_address() {
    let mut world = world(false);
    world.put_pod(pod("old", "n2", "01", "10.2.0.5"));
    world.put_pod(pod("new", "n2", "02", "10.2.0.5"));
    assert_eq!(holder(&world, "10.2.0.5").as_deref(), Some("new"));
    let mut going = pod("newest", "n2", "03", "10.2.0.5");
    going.terminating = true;
    world.put_pod(going);
    assert_eq!(holder(&world, "10.2.0.5").as_deref(), Some("new"));
    world.remove_pod(&Key::new(Some("shop"), "new"));
    assert_eq!(holder(&world, "10.2.0.5").as_deref(), Some("old"), "that is not going");
    assert!(told(&world).is_empty());
}

#[test]
fn addresses_of_nobody_count_where_the_operator_says_so() {
    let mut closed = world(false);
    closed.put_pod(pod("a", "n3", "01", "172.31.0.5"));
    assert_eq!(holder(&closed, "172.31.0.5"), None);
    assert!(told(&closed)[0].contains("policy.outsidePrefixes"), "{:?}", told(&closed));
    closed.set_bounds(&BTreeSet::new(), true);
    let moved = closed.set_nodes(nodes());
    assert_eq!(moved, Some([address("172.31.0.5")].into()), "by a changed setting alone");
    assert_eq!(holder(&closed, "172.31.0.5").as_deref(), Some("a"));
    assert!(told(&closed).is_empty());
}

#[test]
fn an_older_claim_is_not_ousted_by_another_node() {
    let mut world = world(true);
    for (name, node, created) in [("mine", "n3", "02"), ("theirs", "n1", "03"), ("renewed", "n3", "04")] {
        world.put_pod(pod(name, node, created, "172.31.0.5"));
    }
    assert_eq!(holder(&world, "172.31.0.5").as_deref(), Some("renewed"), "of the node that had it first");
    assert!(told(&world)[0].contains("Pod shop/renewed of another node"), "{:?}", told(&world));
}

#[test]
fn claims_follow_the_prefixes_of_nodes() {
    let mut world = world(false);
    world.put_pod(pod("a", "n3", "01", "10.3.0.5"));
    assert_eq!(holder(&world, "10.3.0.5"), None);
    let mut granted = nodes();
    granted.insert("n3".to_owned(), node("10.3.0.0/24", &[]));
    assert_eq!(world.set_nodes(granted.clone()), Some([address("10.3.0.5")].into()));
    assert_eq!(holder(&world, "10.3.0.5").as_deref(), Some("a"));
    granted.insert("n1".to_owned(), node("10.3.0.0/28", &[]));
    world.set_nodes(granted);
    assert_eq!(holder(&world, "10.3.0.5"), None, "it is somebody else's now");
}

#[test]
fn status_addresses_in_prefixes_make_nobody_a_node() {
    let mut world = world(true);
    let mut evil = nodes();
    let said =
        ["192.0.2.2", "10.2.0.66", "10.1.0.7", "fd00:99::7", "127.0.0.1", "169.254.169.254", "224.0.0.1"];
    evil.insert("n2".to_owned(), node("10.2.0.0/24", &said));
    world.set_nodes(evil);
    world.put_pod(pod("evil", "n2", "01", "10.2.0.66"));
    let nodes = LabelSelector::default();
    assert!(world.is_node(&nodes, address("192.0.2.2")), "a plain address counts");
    for claimed in &said[1..] {
        assert!(!world.is_node(&nodes, address(claimed)), "{claimed}");
    }
    assert_eq!(world.nodes()["n2"].status_addresses, [address("192.0.2.2")].into());
    let told = told(&world);
    assert_eq!((told.len(), world.refused_addresses()), (6, 6));
    for part in ["Node n2: status.addresses: 10.2.0.66", "prefix of node n2", "kubelet"] {
        assert!(told.iter().any(|told| told.contains(part)), "{told:?}");
    }
}
