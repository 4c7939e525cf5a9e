//! The number of rules that a policy is for the kernel is linear in the policy's rules, whatever those list.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod tenants;

use mesh_policy::budget::Budgets;
use mesh_policy::ruleset::Change;
use mesh_policy::{Event, calico};
use serde_json::{Value, json};
use tenants::{compiler, network_policy, pod};

/// Rules and elements beyond those of a node without these policies.
fn size(policies: Vec<Event>) -> (usize, usize) {
    let count = |events: Vec<Event>| {
        let mut compiler = compiler(Budgets::default());
        compiler.take(pod("p", "t", "10.1.0.2", json!({})));
        events.into_iter().for_each(|event| compiler.take(event));
        compiler.update();
        assert!(compiler.excesses().is_empty());
        tenants::size(&compiler)
    };
    let (none, all) = (count(vec![]), count(policies));
    (all.0 - none.0, all.1 - none.1)
}

fn policy(name: &str, rules: Value) -> Event {
    network_policy(name, "t", json!({}), rules)
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
    let size = |ports, peers| size(vec![policy("p", json!([rule(ports, peers)]))]);
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
    assert_eq!(size(vec![policy("p", more)]), size(vec![policy("p", json!([rule(1, 0)]))]));
}

#[test]
fn rules_are_linear_in_rules_and_policies() {
    let rules = |count: usize| {
        let rules: Vec<Value> = (0..count).map(|n| rule(3 + n, 1 + n)).collect();
        size(vec![policy("p", Value::Array(rules))]).0
    };
    let (one, two, ten) = (rules(1), rules(2), rules(10));
    assert_eq!(ten - one, 9 * (two - one));
    let policies = |count: usize| {
        size((0..count).map(|n| policy(&format!("p{n}"), json!([rule(1000 + n, 2 + n)]))).collect()).0
    };
    let (one, two, ten) = (policies(1), policies(2), policies(10));
    assert_eq!(ten - one, 9 * (two - one));
}

#[test]
fn names_of_ports_are_one_set() {
    let rule = |count: usize| {
        let ports: Vec<Value> = (0..count).map(|n| json!({"port": format!("name{n}")})).collect();
        size(vec![policy("p", json!([{"ports": ports}]))]).0
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

#[test]
fn one_prefix_more_is_one_element() {
    let set = |nets: &[String]| {
        let manifest = json!({"metadata": {"name": "s", "labels": {"feed": "bad"}}, "spec": {"nets": nets}});
        Event::Referent(calico::global_network_set(&manifest))
    };
    let deny = json!({"metadata": {"name": "p"}, "spec": {"types": ["Ingress"],
        "ingress": [{"action": "Deny", "source": {"selector": "feed == 'bad'"}}, {"action": "Allow"}]}});
    let mut nets: Vec<String> = (0..2_000).map(|n| format!("198.18.{}.{}", n / 100, 2 * (n % 100))).collect();
    let mut compiler = compiler(Budgets::default());
    compiler.take(pod("p", "t", "10.1.0.2", json!({})));
    compiler.take(Event::Policy(calico::global(&deny)));
    compiler.take(set(&nets));
    compiler.update();
    for more in ["203.0.113.7", "2001:db8::7"] {
        nets.push(more.to_owned());
        compiler.take(set(&nets));
        let delta = compiler.update();
        assert!(delta.revokes, "who is denied now has to be cut off");
        assert!(
            matches!(&delta.changes[..], [Change::AddElements { elements, .. }] if elements.len() == 1),
            "{:?}",
            delta.changes.len()
        );
        nets.pop();
        compiler.take(set(&nets));
        let changes = compiler.update().changes;
        assert!(matches!(&changes[..], [Change::RemoveElements { elements, .. }] if elements.len() == 1));
    }
}
