//! A node with pods of several namespaces, for tests of what their policies may cost.

use std::collections::{BTreeMap, BTreeSet};

use mesh_policy::budget::Budgets;
use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::model::ObjectId;
use mesh_policy::object::{Pod, PodSpec, PodStatus};
use mesh_policy::{Compiler, Event, networkpolicy};
use serde_json::{Value, json};

pub(crate) fn compiler(budgets: Budgets) -> Compiler {
    let settings = Settings {
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
        outside_prefixes: true,
        outside: BTreeSet::new(),
        vxlan: BTreeSet::new(),
        audit: false,
        log: Logging { group: 5, denied: 0, allowed: 0 },
        mask: MASK,
        budgets,
    };
    let mut compiler = Compiler::new(settings.clone());
    compiler.configure(settings, BTreeMap::new());
    compiler
}

pub(crate) fn pod(name: &str, namespace: &str, address: &str, labels: Value) -> Event {
    let metadata = json!({"name": name, "namespace": namespace, "labels": labels});
    let spec = json!({"nodeName": "n1", "containers": []});
    let status = json!({"podIPs": [{"ip": address}]});
    let pod = Pod::new(
        serde_json::from_value(metadata).unwrap(),
        serde_json::from_value::<PodSpec>(spec).unwrap(),
        serde_json::from_value::<PodStatus>(status).unwrap(),
    );
    Event::Pod(pod.unwrap())
}

pub(crate) fn network_policy(name: &str, namespace: &str, selector: Value, ingress: Value) -> Event {
    let spec = json!({"podSelector": selector, "ingress": ingress});
    let read =
        networkpolicy::read(&json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}));
    assert!(read.fault.is_none(), "{:?}", read.fault);
    Event::Policy(read)
}

#[allow(dead_code, reason = "not every test takes a policy away")]
pub(crate) fn gone(name: &str, namespace: &str) -> Event {
    let id =
        ObjectId { kind: networkpolicy::KIND, namespace: Some(namespace.to_owned()), name: name.to_owned() };
    Event::PolicyGone(id)
}

/// How many rules and elements stand.
pub(crate) fn size(compiler: &Compiler) -> (usize, usize) {
    let ruleset = compiler.ruleset();
    let rules = ruleset.chains.values().map(|chain| chain.rules.len()).sum();
    (rules, ruleset.sets.values().map(|set| set.elements.len()).sum())
}
