//! All that policy is decided from: identities and policies, kept up to date object by object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::evaluate::PolicySet;
use crate::model::{Policy, PolicyId, Subject};
use crate::networkpolicy::Read;
use crate::object::{Key, Namespace, ObjectError, Pod};
use crate::world::World;

/// One thing that a registry has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// These are all pods.
    Pods(Vec<Pod>),
    /// A pod is there, or is different now.
    Pod(Pod),
    /// A pod is gone.
    PodGone(Key),
    /// These are all namespaces.
    Namespaces(Vec<Namespace>),
    /// A namespace is there, or is different now.
    Namespace(Namespace),
    /// A namespace is gone.
    NamespaceGone(String),
    /// These are all policies of a kind.
    Policies(&'static str, Vec<Read>),
    /// A policy is there, or is different now.
    Policy(Read),
    /// A policy is gone.
    PolicyGone(PolicyId),
}

/// Identities, policies, and what is wrong with those.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Who is who.
    pub world: World,
    /// What is allowed.
    pub policies: PolicySet,
    /// Policies that were refused, and why. They isolate all the same.
    pub faults: BTreeMap<PolicyId, ObjectError>,
}

/// What an event has touched, as far as that is needed to bring up to date what was computed before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Addresses of whose holders something may be different now.
    pub addresses: BTreeSet<IpAddr>,
    /// To whom policies apply, or did, that are different now.
    pub subjects: BTreeSet<Subject>,
}

impl State {
    /// Takes one event.
    pub fn take(&mut self, event: Event) -> Touched {
        let mut touched = Touched::default();
        match event {
            Event::Pods(pods) => {
                let kept: BTreeSet<&Key> = pods.iter().map(|pod| &pod.key).collect();
                let all = self.world.pods().map(|pod| &pod.key);
                let gone: Vec<Key> = all.filter(|key| !kept.contains(key)).cloned().collect();
                for key in gone {
                    touched.addresses.extend(self.world.remove_pod(&key));
                }
                for pod in pods {
                    touched.addresses.extend(self.world.put_pod(pod));
                }
            }
            Event::Pod(pod) => touched.addresses = self.world.put_pod(pod),
            Event::PodGone(key) => touched.addresses = self.world.remove_pod(&key),
            Event::Namespaces(namespaces) => {
                let kept: BTreeSet<&String> = namespaces.iter().map(|namespace| &namespace.name).collect();
                let all = self.world.namespaces();
                let gone: Vec<String> = all.filter(|name| !kept.contains(name)).cloned().collect();
                for name in gone {
                    touched.addresses.extend(self.world.remove_namespace(&name));
                }
                for namespace in namespaces {
                    touched.addresses.extend(self.world.put_namespace(namespace));
                }
            }
            Event::Namespace(namespace) => touched.addresses = self.world.put_namespace(namespace),
            Event::NamespaceGone(name) => touched.addresses = self.world.remove_namespace(&name),
            Event::Policies(kind, policies) => {
                let kept: BTreeSet<&PolicyId> = policies.iter().map(|read| &read.policy.id).collect();
                let all = self.policies.iter().map(|policy| &policy.id);
                let gone = all.filter(|id| id.kind == kind && !kept.contains(id));
                for id in gone.cloned().collect::<Vec<_>>() {
                    touched.subjects.extend(self.remove_policy(&id));
                }
                for read in policies {
                    touched.subjects.extend(self.put_policy(read));
                }
            }
            Event::Policy(read) => touched.subjects.extend(self.put_policy(read)),
            Event::PolicyGone(id) => touched.subjects.extend(self.remove_policy(&id)),
        }
        touched
    }

    // Both return to whom something different applies now.
    fn put_policy(&mut self, Read { policy, fault }: Read) -> impl Iterator<Item = Subject> + use<> {
        match fault {
            Some(fault) => drop(self.faults.insert(policy.id.clone(), fault)),
            None => drop(self.faults.remove(&policy.id)),
        }
        let different = self.policies.get(&policy.id) != Some(&policy);
        let now = different.then(|| policy.subject.clone());
        let before = if different { self.policies.put(policy) } else { None };
        before.map(|Policy { subject, .. }| subject).into_iter().chain(now)
    }

    fn remove_policy(&mut self, id: &PolicyId) -> Option<Subject> {
        self.faults.remove(id);
        self.policies.remove(id).map(|policy| policy.subject)
    }
}
