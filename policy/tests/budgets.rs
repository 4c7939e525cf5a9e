//! What is over its budget is closed, and nobody else notices.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod tenants;

use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_policy::budget::{Budget, Budgets};
use mesh_policy::{Event, Flow, Protocol, clusternetworkpolicy, evaluate};
use serde_json::{Value, json};
use tenants::*;

const AMPLE: Budget = Budget { rules: 100_000, elements: 1_000_000, bytes: u64::MAX };

fn ample() -> Budgets {
    Budgets { namespace: AMPLE, class: AMPLE, node: AMPLE, operator: AMPLE }
}

/// Whether somebody outside reaches port 80 of a pod.
fn reaches(compiler: &mesh_policy::Compiler, address: &str) -> bool {
    let outside: IpAddr = "192.0.2.9".parse().unwrap();
    let flow = Flow::new(outside, address.parse().unwrap(), Protocol::TCP, 80);
    let state = compiler.state();
    evaluate(&state.world, &state.policies, &flow).allowed()
}

fn objects(compiler: &mesh_policy::Compiler) -> BTreeSet<String> {
    compiler.excesses().into_iter().map(|over| over.object).collect()
}

/// Allows all of so many ports from everywhere.
fn opens(name: &str, namespace: &str, ports: usize) -> Event {
    let ports: Vec<Value> = (0..ports).map(|n| json!({"port": 80 + 2 * n})).collect();
    network_policy(name, namespace, json!({}), json!([{"ports": ports}]))
}

#[test]
fn a_namespace_over_its_budget_is_closed_alone() {
    let budgets = Budgets { namespace: Budget { elements: 20, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    compiler.take(pod("a", "hostile", "10.1.0.2", json!({})));
    compiler.take(pod("b", "victim", "10.1.0.3", json!({})));
    compiler.take(opens("p", "victim", 5));
    compiler.take(opens("p0", "hostile", 15));
    compiler.update();
    assert!(reaches(&compiler, "10.1.0.2") && objects(&compiler).is_empty());
    compiler.take(opens("p1", "hostile", 15));
    let delta = compiler.update();
    assert!(delta.revokes);
    assert_eq!((reaches(&compiler, "10.1.0.2"), reaches(&compiler, "10.1.0.3")), (false, true));
    assert_eq!(objects(&compiler), ["Namespace hostile".to_owned()].into());
    let said = compiler.excesses().first().unwrap().excess.to_string();
    assert_eq!(said, "its policies are 30 elements; policy.budgets.namespace.elements is 20");
    // What egress they do not judge stays as it is.
    let state = compiler.state();
    let out = Flow::new("10.1.0.2".parse().unwrap(), "192.0.2.9".parse().unwrap(), Protocol::TCP, 80);
    assert!(evaluate(&state.world, &state.policies, &out).allowed());
    compiler.take(gone("p1", "hostile"));
    compiler.update();
    assert!(reaches(&compiler, "10.1.0.2") && objects(&compiler).is_empty());
}

#[test]
fn what_is_over_its_budget_is_not_compiled() {
    let size = |count: usize| {
        let mut compiler = compiler(Budgets { namespace: Budget { elements: 1000, ..AMPLE }, ..ample() });
        compiler.take(pod("a", "hostile", "10.1.0.2", json!({})));
        for n in 0..count {
            compiler.take(opens(&format!("p{n}"), "hostile", 600 + n));
        }
        compiler.update();
        size(&compiler)
    };
    let (one, few, many) = (size(1), size(2), size(40));
    assert!(one.1 >= 600, "{one:?}");
    assert_eq!(few.1, many.1, "no element of a policy that is closed");
    assert!(many.0 < few.0 + 2 * 40, "{few:?} {many:?}");
}

#[test]
fn an_endpoint_with_too_many_policies_is_closed_alone() {
    let budgets = Budgets { class: Budget { elements: 20, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    compiler.take(pod("a", "t", "10.1.0.2", json!({"many": "yes"})));
    compiler.take(pod("b", "t", "10.1.0.3", json!({})));
    compiler.take(opens("p", "t", 5));
    let many: Vec<Value> = (0..30).map(|n| json!({"port": 8000 + 2 * n})).collect();
    compiler.take(network_policy(
        "m",
        "t",
        json!({"matchLabels": {"many": "yes"}}),
        json!([{"ports": many}]),
    ));
    compiler.update();
    assert_eq!((reaches(&compiler, "10.1.0.2"), reaches(&compiler, "10.1.0.3")), (false, true));
    let over = compiler.excesses();
    let said = over.first().unwrap().excess.to_string();
    assert_eq!((over.len(), objects(&compiler)), (1, ["Namespace t".to_owned()].into()));
    assert_eq!(
        said,
        "the policies of one of its pods for ingress are 35 elements; policy.budgets.class.elements is 20"
    );
}

#[test]
fn who_takes_most_of_a_node_is_closed_there() {
    let budgets = Budgets { node: Budget { rules: 1200, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    compiler.take(pod("b", "victim", "10.1.0.200", json!({})));
    compiler.take(opens("p", "victim", 5));
    // Each pod has a class of its own, of nearly all policies.
    for n in 0..20 {
        compiler.take(pod(&format!("a{n}"), "hostile", &format!("10.1.0.{n}"), json!({"n": n.to_string()})));
        let rules: Vec<Value> = (0..5).map(|k| json!({"ports": [{"port": 80 + k}]})).collect();
        let others =
            json!({"matchExpressions": [{"key": "n", "operator": "NotIn", "values": [n.to_string()]}]});
        compiler.take(network_policy(&format!("p{n}"), "hostile", others, Value::Array(rules)));
    }
    compiler.update();
    assert_eq!(objects(&compiler), ["Namespace hostile".to_owned()].into());
    assert!(!reaches(&compiler, "10.1.0.5") && reaches(&compiler, "10.1.0.200"));
    assert!(size(&compiler).0 < 1000, "{:?}", size(&compiler));
    // It is looked at again when its policies change.
    for n in 1..20 {
        compiler.take(gone(&format!("p{n}"), "hostile"));
    }
    compiler.update();
    assert!(objects(&compiler).is_empty() && reaches(&compiler, "10.1.0.5"));
}

#[test]
fn a_budget_of_nothing_closes_all_and_ends() {
    let none = Budget { rules: 0, elements: 0, bytes: 0 };
    let mut compiler = compiler(Budgets { namespace: none, class: none, node: none, operator: none });
    for n in 0..5 {
        compiler.take(pod(&format!("a{n}"), &format!("t{n}"), &format!("10.1.0.{n}"), json!({})));
        compiler.take(opens("p", &format!("t{n}"), 5));
    }
    compiler.update();
    assert!((0..5).all(|n| !reaches(&compiler, &format!("10.1.0.{n}"))));
    let chains: BTreeSet<_> = compiler.ruleset().chains.keys().collect();
    assert!(!chains.iter().any(|name| name.is_empty()));
    let budgets = Budgets { node: none, ..ample() };
    compiler = self::compiler(budgets);
    compiler.take(pod("a", "t", "10.1.0.2", json!({})));
    compiler.take(opens("p", "t", 5));
    compiler.update();
    assert!(!reaches(&compiler, "10.1.0.2"));
    for set in compiler.ruleset().sets.values() {
        for element in &set.elements {
            if let mesh_policy::ruleset::Element::Chain(_, chain) = element {
                assert!(compiler.ruleset().chains.contains_key(chain), "{chain:?}");
            }
        }
    }
}

#[test]
fn sets_of_many_pods_count_as_they_are() {
    let budgets = Budgets { node: Budget { elements: 2000, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    for n in 0..100 {
        compiler.take(pod(&format!("a{n}"), "victim", &format!("10.1.0.{n}"), json!({})));
    }
    compiler.take(pod("h", "hostile", "10.1.0.200", json!({})));
    // Ten sets of all pods each, by selectors that differ in nothing but a label that nobody has.
    let from = |n: usize| json!({"namespaceSelector": {}, "podSelector": {"matchExpressions": [{"key": format!("k{n}"), "operator": "DoesNotExist"}]}});
    let rules: Vec<Value> = (0..10).map(|n| json!({"from": [from(n)]})).collect();
    compiler.take(network_policy("p", "hostile", json!({}), Value::Array(rules)));
    compiler.update();
    assert_eq!(objects(&compiler), ["Namespace hostile".to_owned()].into());
    assert!(size(&compiler).1 < 1000, "{:?}", size(&compiler));
}

#[test]
fn of_the_operators_policies_the_largest_is_closed() {
    let budgets = Budgets { operator: Budget { elements: 20, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    compiler.take(pod("a", "t", "10.1.0.2", json!({})));
    compiler.take(pod("b", "u", "10.1.0.3", json!({})));
    let policy = |name: &str, namespace: &str, count: usize| {
        let nets: Vec<String> = (0..count).map(|n| format!("198.51.100.{}/32", 2 * n)).collect();
        let rules: Vec<Value> =
            nets.chunks(20).map(|nets| json!({"action": "Deny", "to": [{"networks": nets}]})).collect();
        let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}, "egress": rules});
        let read = clusternetworkpolicy::read(&json!({"metadata": {"name": name}, "spec": spec}));
        assert!(read.fault.is_none(), "{:?}", read.fault);
        Event::Policy(read)
    };
    compiler.take(policy("small", "u", 5));
    compiler.take(policy("large", "t", 40));
    compiler.update();
    let goes = |from: &str| {
        let flow = Flow::new(from.parse().unwrap(), "192.0.2.9".parse().unwrap(), Protocol::TCP, 80);
        let state = compiler.state();
        evaluate(&state.world, &state.policies, &flow).allowed()
    };
    assert_eq!((goes("10.1.0.2"), goes("10.1.0.3")), (false, true));
    assert_eq!(objects(&compiler), ["ClusterNetworkPolicy large".to_owned()].into());
}

#[test]
fn far_too_many_policies_are_not_remembered() {
    let budgets = Budgets { namespace: Budget { elements: 100, ..AMPLE }, ..ample() };
    let mut compiler = compiler(budgets);
    compiler.take(pod("a", "t", "10.1.0.2", json!({})));
    for n in 0..50 {
        compiler.take(opens(&format!("p{n:02}"), "t", 50));
    }
    compiler.update();
    let listed = |compiler: &mesh_policy::Compiler| -> usize {
        let policies = compiler.state().policies.iter();
        policies.flat_map(|policy| policy.conditions().collect::<Vec<_>>()).count()
    };
    assert_eq!(listed(&compiler), 16, "eight times the budget");
    assert_eq!(compiler.state().policies.cost_of("t").elements, 2500);
    // All of them gone but one that was not remembered: it stays closed, is named, and counts when it is read again.
    (0..49).for_each(|n| compiler.take(gone(&format!("p{n:02}"), "t")));
    compiler.update();
    assert!(!reaches(&compiler, "10.1.0.2"));
    assert_eq!(objects(&compiler), ["Namespace t".to_owned()].into());
    compiler.take(opens("p49", "t", 50));
    compiler.update();
    assert!(reaches(&compiler, "10.1.0.2") && objects(&compiler).is_empty());
    assert_eq!(compiler.state().policies.cost_of("t").elements, 50);
}
