//! The number of rules that a policy is for the kernel is linear in the policy's rules, whatever those list.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::collections::{BTreeMap, BTreeSet};

use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::object::{Pod, PodSpec, PodStatus};
use mesh_policy::{Compiler, Event, calico, networkpolicy};
use serde_json::{Value, json};

fn settings() -> Settings {
    Settings {
        node: "n1".to_owned(),
        tunnels: ["sennit0".to_owned()].into(),
        keyless: BTreeSet::new(),
        scope: ["10.1.0.0/16".parse().unwrap()].into(),
        own: ["10.1.0.0/24".parse().unwrap()].into(),
        address: None,
        carriers: BTreeSet::new(),
        resolvers: None,
        failsafe: Default::default(),
        strangers: false,
        check_sources: false,
        audit: false,
        log: Logging { group: 5, denied: 0, allowed: 0 },
        mask: MASK,
    }
}

fn pod(name: &str, address: &str) -> Event {
    let metadata = json!({"name": name, "namespace": "t", "labels": {"app": name}});
    let spec = json!({"nodeName": "n1", "containers": []});
    let status = json!({"podIPs": [{"ip": address}]});
    let pod = Pod::new(
        serde_json::from_value(metadata).unwrap(),
        serde_json::from_value::<PodSpec>(spec).unwrap(),
        serde_json::from_value::<PodStatus>(status).unwrap(),
    );
    Event::Pod(pod.unwrap())
}

fn network_policy(name: &str, rules: Value) -> Event {
    let policy =
        json!({"metadata": {"name": name, "namespace": "t"}, "spec": {"podSelector": {}, "ingress": rules}});
    let read = networkpolicy::read(&policy);
    assert!(read.fault.is_none(), "{:?}", read.fault);
    Event::Policy(read)
}

/// Rules and elements beyond those of a node without these policies.
fn size(policies: Vec<Event>) -> (usize, usize) {
    let count = |events: Vec<Event>| {
        let mut compiler = Compiler::new(settings());
        compiler.configure(settings(), BTreeMap::new());
        events.into_iter().for_each(|event| compiler.take(event));
        compiler.update();
        let ruleset = compiler.ruleset();
        let rules: usize = ruleset.chains.values().map(|chain| chain.rules.len()).sum();
        let elements: usize = ruleset.sets.values().map(|set| set.elements.len()).sum();
        (rules, elements)
    };
    let none = count(vec![pod("p", "10.1.0.2")]);
    let all = count([vec![pod("p", "10.1.0.2")], policies].concat());
    (all.0 - none.0, all.1 - none.1)
}

/// A rule of so many ports that do not touch, and so many peers of each kind.
fn rule(ports: usize, peers: usize) -> Value {
    let ports: Vec<Value> = (0..ports).map(|n| json!({"protocol": "TCP", "port": 1 + 2 * n})).collect();
    let block = |n: usize| json!({"ipBlock": {"cidr": format!("192.0.{}.{}/32", n / 100, 2 * (n % 100))}});
    let pods = |n: usize| json!({"podSelector": {"matchLabels": {"x": format!("y{n}")}}});
    let peers: Vec<Value> = (0..peers).flat_map(|n| [block(n), pods(n)]).collect();
    json!({"from": peers, "ports": ports})
}

#[test]
fn rules_do_not_grow_with_ports_or_peers() {
    let size = |ports, peers| size(vec![network_policy("p", json!([rule(ports, peers)]))]);
    let small = size(2, 2);
    assert_eq!(size(2000, 2).0, small.0, "ports");
    assert_eq!(size(2, 500).0, small.0, "peers");
    assert_eq!(size(2000, 500).0, small.0, "ports and peers");
    // What is listed are elements, once each.
    assert_eq!(size(2000, 500).1, 2500);
}

#[test]
fn ports_that_touch_are_one_element() {
    let ports: Vec<Value> = (0..4000).map(|n| json!({"protocol": "TCP", "port": 1 + n})).collect();
    let more = json!([{"ports": ports}]);
    assert_eq!(size(vec![network_policy("p", more)]), size(vec![network_policy("p", json!([rule(1, 0)]))]));
}

#[test]
fn rules_are_linear_in_rules_and_policies() {
    let rules = |count: usize| {
        let rules: Vec<Value> = (0..count).map(|n| rule(3 + n, 1 + n)).collect();
        size(vec![network_policy("p", Value::Array(rules))]).0
    };
    let (one, two, ten) = (rules(1), rules(2), rules(10));
    assert_eq!(ten - one, 9 * (two - one));
    let policies = |count: usize| {
        size((0..count).map(|n| network_policy(&format!("p{n}"), json!([rule(1000 + n, 2 + n)]))).collect()).0
    };
    let (one, two, ten) = (policies(1), policies(2), policies(10));
    assert_eq!(ten - one, 9 * (two - one));
}

#[test]
fn names_of_ports_are_one_set() {
    let rule = |count: usize| {
        let ports: Vec<Value> = (0..count).map(|n| json!({"port": format!("name{n}")})).collect();
        size(vec![network_policy("p", json!([{"ports": ports}]))]).0
    };
    assert_eq!(rule(1000), rule(1));
}

#[test]
fn both_ends_of_a_calico_rule_are_sets() {
    let rules = |count: usize| {
        let ports = |from: usize| (0..count).map(|n| from + 2 * n).collect::<Vec<_>>();
        let rule = json!({
            "action": "Allow", "protocol": "TCP",
            "source": {"ports": ports(1), "nets": ["192.0.2.0/24"]},
            "destination": {"notPorts": ports(2)},
        });
        let read = calico::global(
            &json!({"metadata": {"name": "g"}, "spec": {"selector": "all()", "ingress": [rule]}}),
        );
        assert!(read.fault.is_none(), "{:?}", read.fault);
        size(vec![Event::Policy(read)]).0
    };
    assert_eq!(rules(3000), rules(3));
}
