//! What all classes of a node cost, and who is closed where that is too much.
//!
//! Budgets of a namespace and of a class follow from objects alone. How many classes a node has, and how many elements their sets, is
//! known there only: the namespaces that take most are closed on it until the rest has room. So is one without whose last change the
//! kernel takes a ruleset that it refuses with it.

use std::collections::{BTreeMap, BTreeSet};

use super::class::{SetUse, Source};
use super::members::Index;
use super::{Compiler, Touched};
use crate::budget::{Cost, Excess, Which};
use crate::model::ObjectId;
use crate::ruleset::{Element, Ruleset};
use crate::state::{Event, OverBudget};

/// What is known of the node's burden while a change is made.
#[derive(Debug, Clone, Default)]
pub(super) struct Burden {
    /// What was left out of the last round, by namespace: too much even to be compiled.
    pub(super) ahead: BTreeMap<String, Cost>,
    /// The elements of sets that do not stand yet.
    pub(super) filled: BTreeMap<String, BTreeSet<Element>>,
    /// Namespaces whose policies changed since the kernel took a ruleset, the last one at the end.
    unproven: Vec<String>,
    /// The one of them that is closed to see whether the kernel takes the rest.
    tried: Option<String>,
}

/// So many namespaces are tried, those that changed last first.
const TRIED_MOST: usize = 8;

impl Compiler {
    /// Brings the classes up to date, without the namespaces that the node has no room for. Whether any class is another now.
    pub(super) fn fit(&mut self, stale: bool, mut touched: Touched, standing: &Ruleset) -> bool {
        let mut changed = false;
        loop {
            changed |= self.classify(stale, &touched);
            let more = self.too_much(standing);
            if more.is_empty() {
                return changed;
            }
            let mut shut = self.state.policies.is_shut().clone();
            for (namespace, excess) in more {
                touched.subjects.extend(self.state.policies.subjects_of(&namespace));
                shut.insert(namespace, excess);
            }
            self.state.policies.shut(shut);
        }
    }

    /// The namespaces to close: those that take most, until the rest is within the node's budget.
    fn too_much(&mut self, standing: &Ruleset) -> BTreeMap<String, Excess> {
        let budget = self.settings.budgets.node;
        let mut costs = std::mem::take(&mut self.burden.ahead);
        let is_much = |cost: &Cost| budget.share().exceeded(*cost).is_some();
        if !costs.values().any(is_much) && budget.exceeded(costs.values().copied().sum()).is_none() {
            costs = self.costs(standing);
        }
        // Who is closed already takes what cannot be taken from anybody.
        let shut = self.state.policies.is_shut();
        costs.retain(|namespace, _| !shut.contains_key(namespace));
        let mut total: Cost = costs.values().copied().sum();
        let mut by_cost: Vec<(String, Cost)> = costs.into_iter().collect();
        // By name where they cost the same: the same on every run.
        by_cost.sort_by(|a, b| (b.1.bytes(), &a.0).cmp(&(a.1.bytes(), &b.0)));
        let (mut closed, share) = (BTreeMap::new(), budget.share());
        for (namespace, cost) in by_cost {
            let excess = Excess::of(Which::Share, &share, cost);
            let excess = excess.or_else(|| Excess::of(Which::Node, &budget, total));
            let Some(excess) = excess else { continue };
            total = total - cost;
            closed.insert(namespace, excess);
        }
        closed
    }

    /// What each namespace takes of this node: rules by their policies, elements as they are in the sets.
    fn costs(&mut self, standing: &Ruleset) -> BTreeMap<String, Cost> {
        let most = self.settings.budgets.node.elements;
        let mut costs: BTreeMap<String, Cost> = BTreeMap::new();
        // Of a set that several look into, everybody has a share.
        let mut owners: BTreeMap<&String, (&SetUse, BTreeSet<&String>)> = BTreeMap::new();
        for class in self.classes.values() {
            for (namespace, cost) in &class.costs {
                if let Some(namespace) = namespace {
                    let all = costs.entry(namespace.clone()).or_default();
                    *all = *all + Cost { elements: 0, ..*cost };
                }
            }
            for (namespace, sets) in &class.owned {
                for (name, uses) in sets.iter().filter_map(|name| class.sets.get_key_value(name)) {
                    owners.entry(name).or_insert_with(|| (uses, BTreeSet::new())).1.insert(namespace);
                }
            }
        }
        let is_fresh = |name: &String| !standing.sets.contains_key(name);
        let fresh: Vec<&Source> =
            owners.iter().filter(|(name, _)| is_fresh(name)).map(|(_, (uses, _))| &uses.source).collect();
        let index = (!fresh.is_empty()).then(|| Index::of(&self.state.world, fresh.into_iter()));
        let (mut filled, mut total) = (BTreeMap::new(), 0_usize);
        for (name, (uses, namespaces)) in owners {
            let size = match (standing.sets.get(name), &uses.source) {
                (Some(set), _) => set.elements.len(),
                (None, Source::Ranges(elements) | Source::Numbers(elements)) => elements.len(),
                // Nobody has to count further.
                (None, _) if total > most => 0,
                (None, source) => {
                    let members = index.as_ref().map(|index| index.members(source, uses.family));
                    let members = members.unwrap_or_default();
                    let size = members.len();
                    filled.insert(name.clone(), members);
                    size
                }
            };
            total = total.saturating_add(size);
            let share = size.div_ceil(namespaces.len().max(1));
            for namespace in namespaces {
                let all = costs.entry(namespace.clone()).or_default();
                all.elements = all.elements.saturating_add(share);
            }
        }
        self.burden.filled = filled;
        costs
    }

    /// The kernel has all that was handed out: whatever it refuses next is in what changes next.
    pub(crate) fn proven(&mut self) {
        self.burden.unproven.clear();
        self.burden.tried = None;
    }

    /// The kernel refused the ruleset. Closes the namespace whose policies changed last, and nobody who was closed for this before.
    /// Returns its name; `None`: there is nobody left to try, and nobody is closed.
    pub(crate) fn blame(&mut self) -> Option<String> {
        let mut shut = self.state.policies.is_shut().clone();
        if let Some(innocent) = self.burden.tried.take() {
            shut.remove(&innocent);
            self.touched.subjects.extend(self.state.policies.subjects_of(&innocent));
        }
        let next = self.burden.unproven.pop();
        if let Some(namespace) = &next {
            self.touched.subjects.extend(self.state.policies.subjects_of(namespace));
            shut.insert(namespace.clone(), Excess::REFUSED);
        }
        self.burden.tried.clone_from(&next);
        self.state.policies.shut(shut);
        next
    }

    fn suspect(&mut self, event: &Event) {
        let id = match event {
            Event::Policy(read) => &read.policy.id,
            Event::PolicyGone(id) => id,
            _ => return,
        };
        let Some(namespace) = &id.namespace else { return };
        let unproven = &mut self.burden.unproven;
        if unproven.last() == Some(namespace) {
            return;
        }
        unproven.retain(|other| other != namespace);
        unproven.push(namespace.clone());
        let old = unproven.len().saturating_sub(TRIED_MOST);
        unproven.drain(..old);
    }

    /// A namespace that is closed on this node is looked at again when its policies change.
    pub(super) fn reopen(&mut self, event: &Event) {
        self.suspect(event);
        if self.state.policies.is_shut().is_empty() {
            return;
        }
        let of = |id: &ObjectId| id.namespace.clone().into_iter().collect::<Vec<String>>();
        let changed: BTreeSet<String> = match event {
            Event::Policy(read) => of(&read.policy.id).into_iter().collect(),
            Event::PolicyGone(id) => of(id).into_iter().collect(),
            Event::Policies(..) => self.state.policies.is_shut().keys().cloned().collect(),
            _ => return,
        };
        let mut shut = self.state.policies.is_shut().clone();
        for namespace in changed {
            if shut.remove(&namespace).is_some() {
                self.touched.subjects.extend(self.state.policies.subjects_of(&namespace));
            }
        }
        self.state.policies.shut(shut);
    }

    /// What is over its budget: namespaces, classes of them, and policies of no namespace.
    pub fn excesses(&self) -> BTreeSet<OverBudget> {
        let crowded = self.classes.values().filter_map(|class| class.crowded.map(|excess| (class, excess)));
        let crowded = crowded.flat_map(|(class, excess)| {
            let of =
                move |namespace: &String| OverBudget { object: format!("Namespace {namespace}"), excess };
            class.costs.keys().flatten().map(of)
        });
        self.state.excesses().chain(crowded).collect()
    }
}
