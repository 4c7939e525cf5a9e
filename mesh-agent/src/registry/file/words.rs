//! What manifests say of pods, namespaces and policies.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use mesh_policy::kind::KINDS;
use mesh_policy::model::ObjectId;
use mesh_policy::object::Key;
use mesh_policy::{Event, Kind, Said};

use crate::manifest::{Object, Parsed};
use crate::registry::Host;
use crate::settings::Settings;

/// The most objects that are told one by one; where more are different, all there is is said again.
const SINGLE_MOST: usize = 1_000;

/// Files by their names.
pub type Files = BTreeMap<String, Arc<Parsed>>;

/// It, as events.
#[derive(Debug, Default)]
pub struct PolicyWords {
    /// All pods, all namespaces, all policies; or what is different.
    pub events: Vec<Event>,
    /// Objects that do not count, since others of the same name came first.
    pub problems: BTreeMap<Name, Vec<String>>,
}

/// An object's kind and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// Its namespace first: what a selector of it means is known when pods come.
    Namespace(String),
    /// A pod.
    Pod(Key),
    /// A policy, or what policies refer to.
    Said(ObjectId),
    /// A Mesh.
    Mesh(String),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::Pod(key) => write!(f, "Pod {key}"),
            Self::Said(id) => write!(f, "{id}"),
            Self::Mesh(name) => write!(f, "Mesh {name}"),
        }
    }
}

// Nodes may be described by several files.
fn name(object: &Object) -> Option<Name> {
    Some(match object {
        Object::Node(_) => return None,
        Object::Pod(pod) => Name::Pod(pod.key.clone()),
        Object::Namespace(namespace) => Name::Namespace(namespace.name.clone()),
        Object::Said(said) => Name::Said(said.id().clone()),
        Object::Mesh(name, _) => Name::Mesh(name.clone()),
    })
}

/// All objects with names that count, each with the files of those that do not.
struct Counting<'a>(BTreeMap<Name, (&'a Object, Vec<String>)>);

impl<'a> Counting<'a> {
    fn of(files: &'a Files, is_asked: impl Fn(&Name) -> bool) -> Self {
        let mut first: BTreeMap<Name, (&Object, &str, Vec<String>)> = BTreeMap::new();
        for (path, parsed) in files {
            for object in &parsed.objects {
                let Some(name) = name(object).filter(&is_asked) else { continue };
                match first.get_mut(&name) {
                    None => drop(first.insert(name, (object, path, Vec::new()))),
                    Some((_, before, others)) => {
                        others.push(format!("{path}: {name} is already in {before}, which counts"));
                    }
                }
            }
        }
        Self(first.into_iter().map(|(name, (object, _, others))| (name, (object, others))).collect())
    }

    fn problems(&self) -> BTreeMap<Name, Vec<String>> {
        let problems = self.0.iter().filter(|(_, (_, others))| !others.is_empty());
        problems.map(|(name, (_, others))| (name.clone(), others.clone())).collect()
    }
}

/// What Nodes say of themselves, by name: their labels, and addresses by their `status`.
pub fn hosts(files: &Files) -> BTreeMap<String, Host> {
    let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
    for object in files.values().flat_map(|parsed| &parsed.objects) {
        if let Object::Node(node) = object {
            hosts.entry(node.metadata.name.clone()).or_insert_with(|| Host {
                labels: node.metadata.labels.clone(),
                addresses: node.status.addresses(),
                prefixes: node.spec.prefixes().iter().filter_map(|text| text.parse().ok()).collect(),
            });
        }
    }
    hosts
}

/// What Meshes say, by name.
pub fn meshes(files: &Files) -> BTreeMap<String, Result<Settings, String>> {
    let mut meshes = BTreeMap::new();
    for object in files.values().flat_map(|parsed| &parsed.objects) {
        if let Object::Mesh(name, said) = object {
            meshes.entry(name.clone()).or_insert_with(|| (**said).clone());
        }
    }
    meshes
}

/// All that these files say.
pub fn all(files: &Files) -> PolicyWords {
    let counting = Counting::of(files, |_| true);
    let (mut pods, mut namespaces) = (Vec::new(), Vec::new());
    let mut said: BTreeMap<&str, Vec<Said>> = BTreeMap::new();
    for (object, _) in counting.0.values() {
        match object {
            Object::Node(_) | Object::Mesh(..) => {}
            Object::Pod(pod) => pods.push(pod.clone()),
            Object::Namespace(namespace) => namespaces.push(namespace.clone()),
            Object::Said(one) => said.entry(one.id().kind).or_default().push(one.clone()),
        }
    }
    let mut events = vec![Event::Namespaces(namespaces), Event::Pods(pods)];
    events.extend(KINDS.iter().map(|kind| kind.all(said.remove(kind.name).unwrap_or_default())));
    PolicyWords { events, problems: counting.problems() }
}

/// What these files say else than those before; `problems` become those of now. `None`: too much for single words.
pub fn difference(
    before: &Files,
    now: &Files,
    problems: &mut BTreeMap<Name, Vec<String>>,
) -> Option<Vec<Event>> {
    let is_same = |path: &String, one: &Arc<Parsed>, other: &Files| {
        other.get(path).is_some_and(|other| Arc::ptr_eq(one, other))
    };
    let gone = before.iter().filter(|(path, parsed)| !is_same(path, parsed, now));
    let come = now.iter().filter(|(path, parsed)| !is_same(path, parsed, before));
    let objects = gone.chain(come).flat_map(|(_, parsed)| &parsed.objects);
    let asked: BTreeSet<Name> = objects.filter_map(name).take(SINGLE_MOST + 1).collect();
    if asked.len() > SINGLE_MOST {
        return None;
    }
    let counting = Counting::of(now, |name| asked.contains(name));
    problems.retain(|name, _| !asked.contains(name));
    problems.extend(counting.problems());
    let events = asked.into_iter().filter_map(|name| {
        Some(match (counting.0.get(&name), name) {
            (Some((Object::Namespace(namespace), _)), _) => Event::Namespace(namespace.clone()),
            (Some((Object::Pod(pod), _)), _) => Event::Pod(pod.clone()),
            (Some((Object::Said(said), _)), _) => said.clone().there(),
            (Some((Object::Node(_) | Object::Mesh(..), _)), _) | (None, Name::Mesh(_)) => return None,
            (None, Name::Namespace(name)) => Event::NamespaceGone(name),
            (None, Name::Pod(key)) => Event::PodGone(key),
            (None, Name::Said(id)) => Kind::named(id.kind)?.gone(id),
        })
    });
    Some(events.collect())
}

#[cfg(test)]
mod tests;
