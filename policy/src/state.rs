//! All that policy is decided from: identities and policies, kept up to date object by object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::budget::Excess;
use crate::model::{Condition, ObjectId, Policy, Subject, Tier};
use crate::names::{Changes, Domain, NOBODY, Protected, Recalled, Resolved};
use crate::networkpolicy::Read;
use crate::object::{Key, Namespace, Pod};
use crate::referent::{Referent, What};
use crate::refusal::Refusal;
use crate::selector::LabelSelector;
use crate::tiers::PolicySet;
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
    PolicyGone(ObjectId),
    /// These are all of a kind that policies refer to.
    Referents(&'static str, Vec<Referent>),
    /// One of them is there, or is different now.
    Referent(Referent),
    /// One of them is gone.
    ReferentGone(ObjectId),
    /// A name was seen to have addresses, at this second of the caller's clock.
    Resolved(Resolved, u64),
    /// Names had these addresses before a restart; it is this second of the caller's clock.
    Recalled(Vec<Recalled>, u64),
    /// It is this second of the caller's clock.
    Clock(u64),
}

/// Identities, policies, and what is wrong with those.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Who is who.
    pub world: World,
    /// What is allowed.
    pub policies: PolicySet,
    /// Objects that were refused, or of which a part was, and why. Policies isolate all the same.
    pub faults: BTreeMap<ObjectId, Refusal>,
    tiers: BTreeMap<String, Tier>,
    // Those that stand, by what they are.
    referents: BTreeMap<ObjectId, What>,
    // Namespaces whose policies have changed, and whose budget was not looked at since; `None`: no namespace.
    unweighed: BTreeSet<Option<String>>,
}

/// Something of which the policies are over a budget.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OverBudget {
    /// A namespace, or a policy of none.
    pub object: String,
    /// How.
    pub excess: Excess,
}

/// What an event has touched, as far as that is needed to bring up to date what was computed before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Addresses of whose holders something may be different now.
    pub addresses: BTreeSet<IpAddr>,
    /// Those that mean something different to rules now, whoever has them: of Services and of named ports.
    pub meanings: BTreeSet<IpAddr>,
    /// Network sets and host endpoints that mean other addresses now, or are meant by others.
    pub networks: BTreeSet<ObjectId>,
    /// Those that names have, or have no more, with these names.
    pub names: Changes,
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
                    self.remove_namespace(&name, &mut touched);
                }
                for namespace in namespaces {
                    self.put_namespace(namespace, &mut touched);
                }
            }
            Event::Namespace(namespace) => self.put_namespace(namespace, &mut touched),
            Event::NamespaceGone(name) => self.remove_namespace(&name, &mut touched),
            Event::Policies(kind, policies) => {
                let kept: BTreeSet<&ObjectId> = policies.iter().map(|read| &read.policy.id).collect();
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
            Event::Referents(kind, referents) => {
                let kept: BTreeSet<&ObjectId> = referents.iter().map(|referent| &referent.id).collect();
                let known = self.referents.keys().chain(self.faults.keys());
                let gone = known.filter(|id| id.kind == kind && !kept.contains(id));
                for id in gone.cloned().collect::<BTreeSet<_>>() {
                    self.remove_referent(&id, &mut touched);
                }
                for referent in referents {
                    self.put_referent(referent, &mut touched);
                }
            }
            Event::Referent(referent) => self.put_referent(referent, &mut touched),
            Event::ReferentGone(id) => self.remove_referent(&id, &mut touched),
            Event::Resolved(resolved, now) => self.resolved(resolved, now, &mut touched),
            Event::Recalled(all, now) => touched.names = self.world.names.recall(all, now),
            Event::Clock(now) => touched.names = self.world.names.pass(now),
        }
        for namespace in std::mem::take(&mut self.unweighed) {
            touched.subjects.extend(self.policies.weigh(&namespace));
        }
        touched
    }

    fn resolved(&mut self, mut resolved: Resolved, now: u64, touched: &mut Touched) {
        touched.names = self.world.names.pass(now);
        // What nobody speaks of is not remembered.
        if !self.world.names.wanted().wants(&resolved.name) {
            return;
        }
        // A pod has one budget, whatever its addresses; those whom nobody knows have one together.
        let pod = self.world.holder(resolved.asker);
        resolved.asker = pod.and_then(|pod| pod.addresses.first().copied()).unwrap_or(NOBODY);
        for (address, names) in self.world.names.learn(resolved, now) {
            touched.names.entry(address).or_default().extend(names);
        }
    }

    /// No answer may open these addresses. Returns what is different by that.
    pub fn protect(&mut self, protected: Protected) -> Changes {
        self.world.names.protect(protected)
    }

    fn put_namespace(&mut self, namespace: Namespace, touched: &mut Touched) {
        let name = namespace.name.clone();
        touched.addresses.extend(self.world.put_namespace(namespace));
        self.networks_of_namespace(&name, touched);
    }

    fn remove_namespace(&mut self, name: &str, touched: &mut Touched) {
        touched.addresses.extend(self.world.remove_namespace(name));
        self.networks_of_namespace(name, touched);
    }

    /// Others may mean the network sets of a namespace now.
    fn networks_of_namespace(&self, name: &str, touched: &mut Touched) {
        let ids: Vec<ObjectId> = self.world.networks_in(name).cloned().collect();
        let is_plain = ids.iter().all(|id| self.is_plain(id));
        touched.networks.extend(ids);
        if !is_plain {
            self.rules_about_networks(touched);
        }
    }

    /// Whether policies speak of domain names.
    pub fn speaks_of_names(&self) -> bool {
        !self.world.names.wanted().is_empty()
    }

    fn put_referent(&mut self, referent: Referent, touched: &mut Touched) {
        let refusal = referent.refusal();
        let Referent { id, what, .. } = referent;
        let Some(what) = what else {
            self.remove_referent(&id, touched);
            self.faults.extend(refusal.map(|refusal| (id, refusal)));
            return;
        };
        self.refused_now(&id, refusal);
        if self.referents.get(&id) == Some(&what) {
            return;
        }
        match self.referents.insert(id.clone(), what.clone()) {
            // One that was something else.
            Some(before) if std::mem::discriminant(&before) != std::mem::discriminant(&what) => {
                self.forget(&id, &before, touched);
            }
            _ => {}
        }
        match what {
            What::Tier(tier) => {
                self.tiers.insert(tier.name.clone(), tier.clone());
                self.tier_is(&tier, touched);
            }
            What::Networks(networks) => {
                let was_plain = self.is_plain(&id);
                if let Some(named) = self.world.put_networks(id.clone(), networks) {
                    let is_plain = was_plain && self.is_plain(&id);
                    self.networks_changed(id, named, is_plain, touched);
                }
            }
            What::Account(account) => touched.addresses.extend(self.world.put_account(account)),
            What::Endpoints(endpoints) => {
                let had_unread = self.world.has_unread();
                touched.meanings.extend(self.world.put_endpoints(id, endpoints));
                self.endpoints_changed(had_unread, touched);
            }
        }
    }

    fn remove_referent(&mut self, id: &ObjectId, touched: &mut Touched) {
        self.faults.remove(id);
        if let Some(what) = self.referents.remove(id) {
            self.forget(id, &what, touched);
        }
    }

    fn forget(&mut self, id: &ObjectId, what: &What, touched: &mut Touched) {
        match what {
            What::Tier(Tier { name, .. }) => {
                self.tiers.remove(name);
                self.tier_is(&Tier::named(name), touched);
            }
            What::Networks(_) => {
                let was_plain = self.is_plain(id);
                if let Some(named) = self.world.remove_networks(id) {
                    self.networks_changed(id.clone(), named, was_plain, touched);
                }
            }
            What::Account(account) => touched.addresses.extend(self.world.remove_account(&account.key)),
            What::Endpoints(_) => {
                let had_unread = self.world.has_unread();
                touched.meanings.extend(self.world.remove_endpoints(id));
                self.endpoints_changed(had_unread, touched);
            }
        }
    }

    /// Policies of this tier stand where it stands now.
    fn tier_is(&mut self, tier: &Tier, touched: &mut Touched) {
        let is_of = |policy: &&Policy| {
            policy.tier.name == tier.name && policy.tier != *tier && policy.tier != Tier::sites()
        };
        for policy in self.policies.iter().filter(is_of).cloned().collect::<Vec<_>>() {
            touched.subjects.insert(policy.subject.clone());
            self.policies.put(Policy { tier: tier.clone(), ..policy });
        }
    }

    /// Reports whether these networks, if they exist, are only addresses. They then belong to no
    /// host and were read in full.
    fn is_plain(&self, id: &ObjectId) -> bool {
        let networks = self.world.networks_of(id);
        networks.is_none_or(|networks| networks.host.is_none() && !networks.unread.is_any())
    }

    /// Marks rules after a change of these networks. Ports of these addresses may also have other
    /// names. `is_plain` is true if they are only addresses of sets.
    fn networks_changed(&self, id: ObjectId, named: BTreeSet<IpAddr>, is_plain: bool, touched: &mut Touched) {
        touched.networks.insert(id);
        touched.meanings.extend(named);
        if !is_plain {
            self.rules_about_networks(touched);
        }
    }

    /// Rules that depend on endpoints of Services may be other ones now, where some cannot be read.
    fn endpoints_changed(&self, had_unread: bool, touched: &mut Touched) {
        if had_unread || self.world.has_unread() {
            let concerned =
                self.policies.iter().filter(|policy| policy.conditions().any(Condition::is_about_services));
            touched.subjects.extend(concerned.map(|policy| policy.subject.clone()));
        }
    }

    /// Rules that depend on networks may be other ones now.
    fn rules_about_networks(&self, touched: &mut Touched) {
        let concerned = self.policies.iter().filter(|policy| {
            policy.subject.is_about_hosts() || policy.conditions().any(Condition::is_about_networks)
        });
        touched.subjects.extend(concerned.map(|policy| policy.subject.clone()));
        // A node is protected, or not, whatever policies say.
        touched.subjects.insert(Subject::Hosts(LabelSelector::default()));
    }

    /// What people are told of answers that were not learnt, of addresses that do not count, and of
    /// objects that were refused, or of which a part was.
    pub fn refusals(&self) -> impl Iterator<Item = String> {
        let pod = |address: IpAddr| match self.world.holder(address) {
            Some(pod) => format!("pod {}/{}", pod.key.namespace, pod.key.name),
            None => format!("the pod that had {address}"),
        };
        let names = self.world.names.refusals(pod);
        let objects = self.faults.iter().map(|(id, refusal)| refusal.told(id));
        names.into_iter().chain(self.world.address_refusals()).chain(objects)
    }

    /// How many that are.
    pub fn refused(&self) -> usize {
        self.world.refused_addresses() + self.faults.len()
    }

    /// What is over its budget: namespaces, and policies of none.
    pub fn excesses(&self) -> impl Iterator<Item = OverBudget> {
        let namespaces = self.policies.closed_namespaces().map(|(namespace, excess)| OverBudget {
            object: format!("Namespace {namespace}"),
            excess: *excess,
        });
        let policies = self.policies.closed_policies();
        namespaces.chain(policies.map(|(id, excess)| OverBudget { object: id.to_string(), excess: *excess }))
    }

    fn refused_now(&mut self, id: &ObjectId, refusal: Option<Refusal>) {
        match refusal {
            Some(refusal) => drop(self.faults.insert(id.clone(), refusal)),
            None => drop(self.faults.remove(id)),
        }
    }

    // Both return to whom something different applies now.
    fn put_policy(&mut self, read: Read) -> impl Iterator<Item = Subject> + use<> {
        self.refused_now(&read.policy.id, read.refusal());
        let Read { mut policy, .. } = read;
        if let Some(tier) = self.tiers.get(&policy.tier.name).filter(|_| policy.tier != Tier::sites()) {
            policy.tier = tier.clone();
        }
        let different = self.policies.get(&policy.id) != Some(&policy);
        let now = if different { self.concerned(&policy) } else { Vec::new() };
        if different {
            self.unweighed.insert(policy.id.namespace.clone());
        }
        let id = policy.id.clone();
        let before = if different { self.policies.put(policy) } else { None };
        // What is over its budget may be kept without its rules.
        for domain in self.policies.get(&id).filter(|_| different).into_iter().flat_map(domains) {
            self.world.names.want(domain);
        }
        for domain in before.iter().flat_map(domains) {
            self.world.names.unwant(domain);
        }
        let before = before.map(|before| self.concerned(&before)).unwrap_or_default();
        before.into_iter().chain(now)
    }

    fn remove_policy(&mut self, id: &ObjectId) -> impl Iterator<Item = Subject> + use<> {
        self.faults.remove(id);
        let before = self.policies.remove(id);
        self.unweighed.insert(id.namespace.clone());
        for domain in before.iter().flat_map(domains) {
            self.world.names.unwant(domain);
        }
        before.map(|before| self.concerned(&before)).unwrap_or_default().into_iter()
    }

    /// Whom a policy means, and the one that it stands for.
    fn concerned(&self, policy: &Policy) -> Vec<Subject> {
        let replaced = policy.replaces.as_ref().and_then(|id| self.policies.get(id));
        [policy].into_iter().chain(replaced).map(|policy| policy.subject.clone()).collect()
    }
}

/// All domain names that a policy speaks of, each as often as it does.
fn domains(policy: &Policy) -> impl Iterator<Item = &Domain> {
    policy.conditions().flat_map(Condition::domains)
}
