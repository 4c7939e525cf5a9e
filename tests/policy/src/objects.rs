//! Objects as tests need them, in a few words.

use mesh_policy::Event;
use mesh_policy::model::ObjectId;
use mesh_policy::networkpolicy;
use mesh_policy::object::{Key, Namespace, Pod};
use serde_json::{Value, json};

use crate::rig::NODE;

/// A pod of namespace `x` on the rig's node, with label `app` and these addresses.
pub fn pod(name: &str, app: &str, addresses: &[&str]) -> Pod {
    let metadata = json!({"name": name, "namespace": "x", "labels": {"app": app}});
    let ips: Vec<Value> = addresses.iter().map(|address| json!({"ip": address})).collect();
    let from = |value: Value| serde_json::from_value(value).expect("metadata");
    let spec = serde_json::from_value(json!({"nodeName": NODE})).expect("a spec");
    let status = serde_json::from_value(json!({"podIPs": ips})).expect("a status");
    Pod::new(from(metadata), spec, status).expect("a pod")
}

/// The same on another node.
pub fn remote(name: &str, app: &str, addresses: &[&str]) -> Pod {
    Pod { node: Some("elsewhere".to_owned()), ..pod(name, app, addresses) }
}

/// The same with named ports.
pub fn with_port(mut pod: Pod, name: &str, port: u16) -> Pod {
    let ports = std::sync::Arc::make_mut(&mut pod.ports);
    for protocol in [mesh_policy::Protocol::TCP, mesh_policy::Protocol::UDP] {
        ports.insert(mesh_policy::object::NamedPort { name: name.to_owned(), protocol, port });
    }
    pod
}

/// A NetworkPolicy of namespace `x`.
pub fn policy(name: &str, spec: Value) -> Event {
    Event::Policy(networkpolicy::read(&json!({"metadata": {"name": name, "namespace": "x"}, "spec": spec})))
}

/// It is gone.
pub fn no_policy(name: &str) -> Event {
    Event::PolicyGone(ObjectId {
        kind: networkpolicy::KIND,
        namespace: Some("x".to_owned()),
        name: name.to_owned(),
    })
}

/// A pod of namespace `x` is gone.
pub fn gone(name: &str) -> Event {
    Event::PodGone(Key::new(Some("x"), name))
}

/// A namespace with one label.
pub fn namespace(name: &str, key: &str, value: &str) -> Event {
    Event::Namespace(Namespace::new(name, [(key.to_owned(), value.to_owned())].into()))
}

/// The `spec` of a policy that lets pods with `app: TO` be reached by those with `app: FROM`, and by nobody else.
pub fn only(from: &str, to: &str) -> Value {
    json!({
        "podSelector": {"matchLabels": {"app": to}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": from}}}]}],
    })
}
