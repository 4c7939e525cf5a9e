//! In which order events reach the compiler: nobody's policies wait behind those of one large namespace.

use std::collections::{BTreeMap, BTreeSet};

use mesh_policy::budget;
use mesh_policy::model::{ObjectId, Policy};
use mesh_policy::{Event, PolicySet};

/// A namespace whose policies cost no more than this, rules and elements together, is never put off.
const SMALL: usize = 2_000;

/// Events that the compiler was not told yet.
///
/// Those about policies of a namespace keep their order within it. All others keep their order among themselves, and come first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    urgent: Vec<Event>,
    namespaces: BTreeMap<String, Vec<Event>>,
    // The large namespace that was served last.
    served: Option<String>,
}

impl Queue {
    /// Whether there is nothing to tell.
    pub(super) fn is_empty(&self) -> bool {
        self.urgent.is_empty() && self.namespaces.is_empty()
    }

    /// Takes an event. A list of policies is what differs from those that are known.
    pub(super) fn push(&mut self, event: Event, known: &PolicySet) {
        match event {
            Event::Policies(kind, all) => {
                self.forget(kind);
                let kept: BTreeSet<ObjectId> = all.iter().map(|read| read.policy.id.clone()).collect();
                let gone = known.iter().map(|policy| &policy.id);
                let gone = gone.filter(|id| id.kind == kind && !kept.contains(id)).cloned();
                for id in gone.collect::<Vec<_>>() {
                    self.put(Event::PolicyGone(id));
                }
                for read in all {
                    self.put(Event::Policy(read));
                }
            }
            event => self.put(event),
        }
    }

    fn put(&mut self, event: Event) {
        match namespace(&event) {
            Some(namespace) => self.namespaces.entry(namespace.to_owned()).or_default().push(event),
            None => self.urgent.push(event),
        }
    }

    /// A list of a kind says all that was said of it before.
    fn forget(&mut self, kind: &str) {
        let is_other = |event: &Event| policy(event).is_none_or(|id| id.kind != kind);
        self.urgent.retain(is_other);
        self.namespaces.values_mut().for_each(|events| events.retain(is_other));
        self.namespaces.retain(|_, events| !events.is_empty());
    }

    /// What is told next: all that is small, or where nothing is, one large namespace.
    pub(super) fn next(&mut self, known: &PolicySet) -> Vec<Event> {
        let is_small = |namespace: &String, events: &Vec<Event>| {
            let told = events.iter().map(weight).fold(0, usize::saturating_add);
            known.cost_of(namespace).weight().saturating_add(told) <= SMALL
        };
        let small: Vec<String> = self
            .namespaces
            .iter()
            .filter(|(namespace, events)| is_small(namespace, events))
            .map(|(namespace, _)| namespace.clone())
            .collect();
        let mut events = std::mem::take(&mut self.urgent);
        for namespace in small {
            events.extend(self.namespaces.remove(&namespace).into_iter().flatten());
        }
        if events.is_empty() {
            let after = self
                .served
                .as_ref()
                .and_then(|served| self.namespaces.keys().find(|namespace| *namespace > served));
            let next = after.or_else(|| self.namespaces.keys().next()).cloned();
            if let Some(namespace) = next {
                events.extend(self.namespaces.remove(&namespace).into_iter().flatten());
                self.served = Some(namespace);
            }
        }
        events
    }

    /// Everything at once.
    pub(super) fn all(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.urgent);
        events.extend(std::mem::take(&mut self.namespaces).into_values().flatten());
        events
    }
}

/// The policy that an event is about.
fn policy(event: &Event) -> Option<&ObjectId> {
    match event {
        Event::Policy(read) => Some(&read.policy.id),
        Event::PolicyGone(id) => Some(id),
        _ => None,
    }
}

fn namespace(event: &Event) -> Option<&str> {
    policy(event)?.namespace.as_deref()
}

fn weight(event: &Event) -> usize {
    let of = |policy: &Policy| budget::of_policy(policy).weight();
    match event {
        Event::Policy(read) => of(&read.policy),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_policy::networkpolicy::{self, Read};
    use serde_json::{Value, json};

    fn read(name: &str, namespace: &str, ports: usize) -> Read {
        let ports: Vec<Value> = (0..ports).map(|n| json!({"port": 1 + 2 * n})).collect();
        let spec = json!({"podSelector": {}, "ingress": [{"ports": ports}]});
        networkpolicy::read(&json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}))
    }

    fn told(events: &[Event]) -> Vec<String> {
        let name = |event: &Event| match event {
            Event::PolicyGone(id) => format!("-{}/{}", id.namespace.as_deref().unwrap_or(""), id.name),
            Event::Policy(read) => {
                format!("{}/{}", read.policy.id.namespace.as_deref().unwrap_or(""), read.policy.id.name)
            }
            Event::NamespaceGone(name) => format!("-{name}"),
            _ => unreachable!(),
        };
        events.iter().map(name).collect()
    }

    #[test]
    fn a_small_namespace_never_waits_for_a_large_one() {
        let (mut queue, known) = (Queue::default(), PolicySet::default());
        for n in 0..5 {
            queue.push(Event::Policy(read(&n.to_string(), "hostile", 4000)), &known);
            queue.push(Event::Policy(read(&n.to_string(), "other", 4000)), &known);
        }
        queue.push(Event::Policy(read("p", "victim", 1)), &known);
        queue.push(Event::NamespaceGone("x".to_owned()), &known);
        assert_eq!(told(&queue.next(&known)), ["-x", "victim/p"]);
        let hostile = queue.next(&known);
        assert_eq!(told(&hostile), (0..5).map(|n| format!("hostile/{n}")).collect::<Vec<_>>());
        // In between something small comes, and one large namespace does not keep out another.
        queue.push(Event::Policy(read("q", "victim", 1)), &known);
        queue.push(Event::Policy(read("9", "hostile", 4000)), &known);
        assert_eq!(told(&queue.next(&known)), ["victim/q"]);
        assert_eq!(told(&queue.next(&known))[0], "other/0");
        assert_eq!(told(&queue.next(&known)), ["hostile/9"]);
        assert!(queue.is_empty() && queue.next(&known).is_empty());
    }

    #[test]
    fn a_small_change_of_a_large_namespace_is_large() {
        let (mut queue, mut known) = (Queue::default(), PolicySet::default());
        known.put(read("p", "hostile", 4000).policy);
        queue.push(Event::Policy(read("q", "hostile", 1)), &known);
        queue.push(Event::Policy(read("q", "victim", 1)), &known);
        assert_eq!(told(&queue.next(&known)), ["victim/q"]);
        assert_eq!(told(&queue.next(&known)), ["hostile/q"]);
    }

    #[test]
    fn a_list_is_what_differs_and_replaces_what_waits() {
        let (mut queue, mut known) = (Queue::default(), PolicySet::default());
        known.put(read("gone", "a", 1).policy);
        queue.push(Event::Policy(read("old", "b", 1)), &known);
        queue.push(Event::Policies(networkpolicy::KIND, vec![read("new", "b", 1)]), &known);
        assert_eq!(told(&queue.all()), ["-a/gone", "b/new"]);
        assert!(queue.is_empty());
    }
}
