//! What deploy/examples/policy says is so.

use std::fs;
use std::path::{Path, PathBuf};

use mesh_policy::probe::{Place, Probe, ProtocolName};
use mesh_policy::{Event, State};
use serde_json::{Value, json};

use super::load;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/policy")
}

fn pod(namespace: &str, name: &str, node: &str, address: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "metrics", "containerPort": 9100}]}]},
        "status": {"podIP": address},
    })
}

/// A site each with a node; the examples of these names beside.
fn state(examples: &[&str]) -> State {
    let node = |name: &str, site: &str, net: &str| {
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"sennit.dev.node-restriction.kubernetes.io/site": site}},
            "spec": {"podCIDRs": [net]},
        })
    };
    let items = json!([
        node("a", "aws", "10.1.0.0/24"),
        node("o", "onprem", "10.2.0.0/24"),
        pod("payments", "pay", "a", "10.1.0.1", json!({"pci": "true"})),
        pod("payments", "plain", "a", "10.1.0.2", json!({})),
        pod("monitoring", "prom", "a", "10.1.0.3", json!({})),
        pod("accounting", "ledger", "o", "10.2.0.1", json!({"app": "ledger"})),
        pod("kube-system", "dns", "o", "10.2.0.2", json!({"k8s-app": "kube-dns"})),
        pod("shop", "web", "o", "10.2.0.3", json!({})),
        pod("shop", "near", "o", "10.2.0.4", json!({})),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    fs::write(dir.path().join("state.json"), list.to_string()).unwrap();
    for example in examples {
        fs::copy(folder().join(example), dir.path().join(example)).unwrap();
    }
    let loaded = load(dir.path(), None).unwrap();
    assert_eq!(loaded.problems, Vec::<String>::new());
    let mut state = loaded.state;
    loaded.events.into_iter().for_each(|event: Event| drop(state.take(event)));
    state
}

fn verdict(state: &State, from: &str, to: &str, port: u16, protocol: &str) -> &'static str {
    let [from, to] = [from, to].map(|pod| Place::Pod(pod.to_owned()));
    let probe = Probe::new(from, to, ProtocolName::Name(protocol.to_owned()), Some(port), None);
    let answer = probe.answer(state);
    assert_eq!(answer.error, None);
    answer.verdict
}

#[test]
fn together_they_let_through_what_they_name() {
    let mut all: Vec<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    all.sort();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    assert!(all.len() >= 6, "{all:?}");
    let state = state(&all);
    for (from, to, port, protocol, expected) in [
        ("payments/pay", "accounting/ledger", 5432, "TCP", "allow"),
        ("payments/pay", "accounting/ledger", 5433, "TCP", "deny"),
        ("payments/plain", "accounting/ledger", 5432, "TCP", "deny"),
        ("payments/pay", "shop/web", 80, "TCP", "deny"),
        ("shop/near", "shop/web", 80, "TCP", "deny"),
        ("monitoring/prom", "shop/web", 9100, "TCP", "allow"),
        ("monitoring/prom", "shop/web", 80, "TCP", "deny"),
        ("payments/pay", "kube-system/dns", 53, "UDP", "allow"),
        ("payments/pay", "kube-system/dns", 8080, "TCP", "deny"),
        ("payments/plain", "kube-system/dns", 53, "UDP", "allow"),
        ("payments/plain", "kube-system/dns", 8080, "TCP", "deny"),
        ("shop/near", "kube-system/dns", 8080, "TCP", "allow"),
    ] {
        assert_eq!(verdict(&state, from, to, port, protocol), expected, "{from} to {to}, {port}/{protocol}");
    }
}

#[test]
fn sites_alone_keep_sites_apart_and_nothing_else() {
    let state = state(&["sites.yaml"]);
    assert_eq!(verdict(&state, "payments/pay", "shop/web", 80, "TCP"), "deny");
    assert_eq!(verdict(&state, "shop/near", "shop/web", 80, "TCP"), "allow");
}

#[test]
fn of_pci_pods_only_what_is_for_the_ledger_crosses() {
    let state = state(&["crossing.yaml"]);
    for (from, to, port, expected) in [
        ("payments/pay", "accounting/ledger", 5432, "allow"),
        ("payments/pay", "accounting/ledger", 5433, "deny"),
        ("payments/pay", "shop/web", 80, "deny"),
        ("payments/pay", "monitoring/prom", 80, "allow"),
        ("payments/plain", "shop/web", 80, "allow"),
    ] {
        assert_eq!(verdict(&state, from, to, port, "TCP"), expected, "{from} to {to}, {port}");
    }
}
