//! A node's kubelet writes the status of its node and pods: the verdicts that this may not change.

use std::fs;

use mesh_policy::probe::{Place, Probe, ProtocolName};
use serde_json::{Value, json};

use super::{Loaded, load};

fn node(name: &str, net: &str, addresses: &[&str]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"role": "ingress"}},
        "spec": {"podCIDRs": [net]}, "status": {"addresses": addresses},
    })
}

fn pod(name: &str, node: &str, month: u8, ip: &str, app: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "shop", "uid": name, "labels": {"app": app},
            "creationTimestamp": format!("2026-{month:02}-01T00:00:00Z"),
        },
        "spec": {"nodeName": node}, "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

fn loaded(items: &[Value]) -> Loaded {
    let dir = tempfile::tempdir().unwrap();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    fs::write(dir.path().join("state.json"), list.to_string()).unwrap();
    load(dir.path(), None).unwrap()
}

fn verdict(loaded: &Loaded, from: &str) -> &'static str {
    let (from, to) = (Place::Ip(from.parse().unwrap()), Place::Pod("shop/db".to_owned()));
    Probe::new(from, to, ProtocolName::Name("TCP".to_owned()), Some(5432), None).answer(&loaded.state).verdict
}

#[test]
fn mirror_pods_take_and_give_no_identity() {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "db", "namespace": "shop"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "db"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "payments"}}}]}],
        },
    });
    let mut items = vec![
        node("n1", "10.1.0.0/24", &[]),
        node("n2", "10.2.0.0/24", &[]),
        policy,
        pod("victim", "n2", 1, "10.2.0.5", "payments"),
        pod("db", "n2", 1, "10.2.0.6", "db"),
    ];
    let before = loaded(&items);
    let verdicts = |loaded: &Loaded| ["10.2.0.5", "10.2.0.77", "10.1.0.9"].map(|from| verdict(loaded, from));
    assert_eq!(verdicts(&before), ["allow", "deny", "deny"]);
    assert!(before.problems.is_empty(), "{:?}", before.problems);
    items.push(pod("mirror-1", "n1", 2, "10.2.0.5", "nothing"));
    items.push(pod("mirror-2", "n1", 2, "10.2.0.77", "payments"));
    let after = loaded(&items);
    assert_eq!(verdicts(&after), ["allow", "deny", "deny"]);
    let told = after.problems.join("\n");
    for part in ["shop/mirror-1 on node n1", "10.2.0.5", "shop/mirror-2", "10.2.0.77", "of node n2"] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn pods_do_not_pass_as_nodes() {
    let policy = json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "db"},
        "spec": {
            "tier": "Admin", "priority": 1,
            "subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "db"}}}},
            "ingress": [
                {"action": "Accept", "from": [{"nodes": {"matchLabels": {"role": "ingress"}}}]},
                {"action": "Deny", "from": [{"networks": ["0.0.0.0/0"]}]},
            ],
        },
    });
    let loaded = loaded(&[
        node("n1", "10.1.0.0/24", &["192.0.2.1"]),
        node("n2", "10.2.0.0/24", &["192.0.2.2", "10.2.0.66", "10.1.0.7", "127.0.0.1"]),
        policy,
        pod("db", "n1", 1, "10.1.0.6", "db"),
        pod("evil", "n2", 1, "10.2.0.66", "evil"),
    ]);
    assert_eq!(
        ["192.0.2.2", "10.2.0.66", "10.1.0.7"].map(|from| verdict(&loaded, from)),
        ["allow", "deny", "deny"]
    );
    let told = loaded.problems.join("\n");
    for part in [
        "Node n2: status.addresses: 10.2.0.66",
        "10.1.0.7",
        "127.0.0.1 does not count, because it is special",
    ] {
        assert!(told.contains(part), "{told}");
    }
}
