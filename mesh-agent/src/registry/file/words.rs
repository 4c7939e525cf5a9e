//! What manifests say of pods, namespaces and policies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_policy::Event;

use crate::manifest::Object;
use crate::settings::Settings;

/// It, as events that say all there is.
#[derive(Debug, Default)]
pub struct PolicyWords {
    /// All pods, all namespaces, all policies.
    pub events: Vec<Event>,
    /// Addresses of nodes by their `status`, by the node's name.
    pub node_addresses: BTreeMap<String, BTreeSet<IpAddr>>,
    /// What Meshes say, by name.
    pub meshes: BTreeMap<String, Result<Settings, String>>,
    /// Objects that do not count, since others of the same name came first.
    pub problems: Vec<String>,
}

pub(super) fn read<'a>(files: impl Iterator<Item = (String, &'a [Object])>) -> PolicyWords {
    let mut words = PolicyWords::default();
    let (mut pods, mut namespaces, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    let mut first: BTreeMap<String, String> = BTreeMap::new();
    for (path, objects) in files {
        for object in objects {
            let name = match object {
                Object::Node(node) => {
                    let addresses =
                        node.status.addresses.iter().filter_map(|entry| entry.address.parse::<IpAddr>().ok());
                    words.node_addresses.entry(node.metadata.name.clone()).or_default().extend(addresses);
                    continue;
                }
                Object::Pod(pod) => format!("Pod {}", pod.key),
                Object::Namespace(namespace) => format!("Namespace {}", namespace.name),
                Object::Policy(read) => read.policy.id.to_string(),
                Object::Mesh(name, _) => format!("Mesh {name}"),
            };
            if let Some(path_before) = first.get(&name) {
                words.problems.push(format!("{path}: {name} is already in {path_before}, which counts"));
                continue;
            }
            first.insert(name, path.clone());
            match object {
                Object::Node(_) => {}
                Object::Mesh(name, said) => drop(words.meshes.insert(name.clone(), (**said).clone())),
                Object::Pod(pod) => pods.push(pod.clone()),
                Object::Namespace(namespace) => namespaces.push(namespace.clone()),
                Object::Policy(read) => policies.push(read.clone()),
            }
        }
    }
    // Namespaces first: what a selector of them means is known when pods come.
    words.events = vec![Event::Namespaces(namespaces), Event::Pods(pods), Event::Policies(policies)];
    words
}
