//! Which policies judge whom, and in which order.

use std::collections::{BTreeMap, BTreeSet};

use crate::budget::{self, Budgets, Cost, Excess, Which};
use crate::model::{Action, Direction, End, ObjectId, Policy, Reach, Rule, Subject, Tier};
use crate::world::{Judged, World};

/// All policies, and what they may cost.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    policies: BTreeMap<ObjectId, Entry>,
    budgets: Budgets,
    // What the policies of a namespace cost together; `None`: those of no namespace.
    costs: BTreeMap<Option<String>, Cost>,
    // Namespaces whose policies are more than they may be, and policies of no namespace that are one too many.
    over: BTreeMap<String, Excess>,
    outsized: BTreeMap<ObjectId, Excess>,
    // Policies that were too much to be remembered: they are closed until they are read again.
    stripped: BTreeMap<ObjectId, Excess>,
    // Namespaces that are closed on this node alone.
    shut: BTreeMap<String, Excess>,
}

#[derive(Debug, Clone)]
struct Entry {
    policy: Policy,
    egress: Cost,
    ingress: Cost,
    // What counts instead where it is over its budget.
    closed: Policy,
}

impl Entry {
    fn new(policy: Policy) -> Self {
        let closed = |rules: &Option<Vec<Rule>>| {
            let deny = || Rule { name: OVER.to_owned(), action: Action::Deny, when: BTreeSet::new() };
            rules.as_ref().map(|_| vec![deny()])
        };
        let (egress, ingress) = (closed(&policy.egress), closed(&policy.ingress));
        let closed = Policy {
            tier: policy.tier.clone(),
            order: policy.order,
            id: policy.id.clone(),
            subject: policy.subject.clone(),
            reach: policy.reach,
            staged: policy.staged,
            replaces: policy.replaces.clone(),
            egress,
            ingress,
        };
        let [egress, ingress] = Direction::BOTH.map(|direction| budget::of_direction(&policy, direction));
        Self { egress, ingress, policy, closed }
    }

    fn cost(&self) -> Cost {
        self.egress + self.ingress
    }

    fn cost_in(&self, direction: Direction) -> Cost {
        if direction == Direction::Egress { self.egress } else { self.ingress }
    }
}

/// The name of the rule that a policy is whose budget is exceeded.
pub const OVER: &str = "over-budget";

/// When policies are asked: all of a stage before all of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Of each packet by itself, before destination NAT.
    Untracked,
    /// Of a connection as it was begun, before destination NAT.
    BeforeNat,
    /// Of a connection as it is.
    Tracked,
}

impl From<Reach> for Stage {
    fn from(reach: Reach) -> Self {
        match reach {
            Reach::Ends | Reach::Forwarded => Self::Tracked,
            Reach::BeforeNat => Self::BeforeNat,
            Reach::Untracked => Self::Untracked,
        }
    }
}

/// The policies of a tier that judge somebody, in their order.
#[derive(Debug, Clone)]
pub struct Layer<'a> {
    /// The tier.
    pub tier: &'a Tier,
    /// What becomes of what none of them decides.
    pub end: End,
    /// When they are asked.
    pub stage: Stage,
    /// The policies.
    pub policies: Vec<&'a Policy>,
    /// How the budget of a class is exceeded: the policies of a namespace are closed here.
    pub crowded: Option<Excess>,
}

/// What would judge somebody if staged policies counted.
#[derive(Debug, Clone)]
pub struct Proposed<'a> {
    /// Tier by tier.
    pub layers: Vec<Layer<'a>>,
    /// Policies that count now would not: others may deny what these allow.
    pub replaces: bool,
}

impl PolicySet {
    /// Has these budgets from now on. Returns to whom something different applies now.
    pub fn set_budgets(&mut self, budgets: Budgets) -> Vec<Subject> {
        if self.budgets == budgets {
            return Vec::new();
        }
        self.budgets = budgets;
        let all: Vec<Option<String>> = self.costs.keys().cloned().collect();
        let mut subjects: Vec<Subject> = all.iter().flat_map(|namespace| self.weigh(namespace)).collect();
        // Of a class nobody knows before it is put together.
        subjects.extend(self.policies.values().map(|entry| entry.policy.subject.clone()));
        subjects
    }

    /// The budgets.
    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    /// A policy is there, or is different now. Returns the one before.
    pub fn put(&mut self, policy: Policy) -> Option<Policy> {
        let mut entry = Entry::new(policy);
        self.strip(&mut entry);
        let (id, cost) = (entry.policy.id.clone(), entry.cost());
        let counts = is_counted(&entry.policy);
        let before = self.policies.insert(id.clone(), entry);
        self.charge(&id, before.as_ref(), if counts { cost } else { Cost::default() });
        before.map(|entry| entry.policy)
    }

    /// A policy is gone.
    pub fn remove(&mut self, id: &ObjectId) -> Option<Policy> {
        self.stripped.remove(id);
        let before = self.policies.remove(id)?;
        self.charge(id, Some(&before), Cost::default());
        Some(before.policy)
    }

    /// Forgets the rules of a policy where the namespace has far too many already; what they cost still counts.
    fn strip(&mut self, entry: &mut Entry) {
        let id = &entry.policy.id;
        let before = self.policies.get(id);
        // The same with another tier: its rules were forgotten before.
        if is_replaced(&entry.policy) && self.stripped.contains_key(id) {
            if let Some(before) = before {
                (entry.egress, entry.ingress) = (before.egress, before.ingress);
            }
            return;
        }
        let known = self.costs.get(&id.namespace).copied().unwrap_or_default();
        let total = known - before.map_or(Cost::default(), Entry::cost) + entry.cost();
        let excess = Excess::of(Which::Kept, &self.budgets.namespace.kept(), total);
        match excess.filter(|_| id.namespace.is_some()) {
            Some(excess) => {
                self.stripped.insert(id.clone(), excess);
                entry.policy = entry.closed.clone();
            }
            None => drop(self.stripped.remove(id)),
        }
    }

    fn charge(&mut self, id: &ObjectId, before: Option<&Entry>, now: Cost) {
        let before = before.filter(|entry| is_counted(&entry.policy)).map_or(Cost::default(), Entry::cost);
        let total = self.costs.entry(id.namespace.clone()).or_default();
        *total = *total - before + now;
        if *total == Cost::default() {
            self.costs.remove(&id.namespace);
        }
    }

    /// Whether the policies of a namespace, or those of none, are within their budget now. Returns to whom something different applies
    /// since that was asked last.
    pub fn weigh(&mut self, namespace: &Option<String>) -> Vec<Subject> {
        let cost = self.costs.get(namespace).copied().unwrap_or_default();
        let Some(namespace) = namespace else { return self.weigh_operators(cost) };
        let excess = Excess::of(Which::Namespace, &self.budgets.namespace, cost);
        let was = match excess {
            Some(excess) => self.over.insert(namespace.clone(), excess).is_some(),
            None => self.over.remove(namespace).is_some(),
        };
        match excess.is_some() == was {
            true => Vec::new(),
            false => self.subjects_of(namespace),
        }
    }

    /// The smallest policies of no namespace count, as many as there is room for.
    fn weigh_operators(&mut self, cost: Cost) -> Vec<Subject> {
        let mut outsized = BTreeMap::new();
        if self.budgets.operator.exceeded(cost).is_some() {
            let of_nobody = self.policies.values().filter(|entry| is_counted(&entry.policy));
            let mut all: Vec<&Entry> =
                of_nobody.filter(|entry| entry.policy.id.namespace.is_none()).collect();
            all.sort_by(|a, b| (a.cost(), &a.policy.id).cmp(&(b.cost(), &b.policy.id)));
            let mut total = Cost::default();
            for entry in all {
                total = total + entry.cost();
                let excess = Excess::of(Which::Operator, &self.budgets.operator, total);
                outsized.extend(excess.map(|excess| (entry.policy.id.clone(), excess)));
            }
        }
        let before = std::mem::replace(&mut self.outsized, outsized);
        let changed = before.keys().filter(|id| !self.outsized.contains_key(*id));
        let changed = changed.chain(self.outsized.keys().filter(|id| !before.contains_key(*id)));
        changed.filter_map(|id| self.get(id)).map(|policy| policy.subject.clone()).collect()
    }

    /// To whom the policies of a namespace apply.
    pub(crate) fn subjects_of(&self, namespace: &str) -> Vec<Subject> {
        let all =
            self.policies.values().filter(|entry| entry.policy.id.namespace.as_deref() == Some(namespace));
        all.map(|entry| entry.policy.subject.clone()).collect()
    }

    /// These namespaces are closed on this node, whatever their policies say.
    pub(crate) fn shut(&mut self, namespaces: BTreeMap<String, Excess>) {
        self.shut = namespaces;
    }

    /// Namespaces that are closed on this node alone.
    pub(crate) fn is_shut(&self) -> &BTreeMap<String, Excess> {
        &self.shut
    }

    /// What the policies of a namespace cost.
    pub fn cost_of(&self, namespace: &str) -> Cost {
        self.costs.get(&Some(namespace.to_owned())).copied().unwrap_or_default()
    }

    /// What one policy costs.
    pub fn cost(&self, id: &ObjectId) -> Cost {
        self.policies.get(id).map_or(Cost::default(), Entry::cost)
    }

    /// The budget that a policy is over, if it is.
    pub fn excess(&self, id: &ObjectId) -> Option<&Excess> {
        match &id.namespace {
            Some(namespace) => {
                let whole = self.over.get(namespace).or_else(|| self.shut.get(namespace));
                whole.or_else(|| self.stripped.get(id))
            }
            None => self.outsized.get(id),
        }
    }

    /// Namespaces that are closed, and how their budget was exceeded.
    pub fn closed_namespaces(&self) -> impl Iterator<Item = (&String, &Excess)> {
        let shut = self.shut.iter().filter(|(namespace, _)| !self.over.contains_key(*namespace));
        let closed =
            |namespace: &String| self.over.contains_key(namespace) || self.shut.contains_key(namespace);
        let stripped = self.stripped.iter().filter_map(|(id, excess)| Some((id.namespace.as_ref()?, excess)));
        // One policy after the other of the same namespace: the first stands for all.
        let mut last = None;
        let stripped = stripped
            .filter(move |(namespace, _)| !closed(namespace) && last.replace(*namespace) != Some(*namespace));
        self.over.iter().chain(shut).chain(stripped)
    }

    /// Policies of no namespace that are closed.
    pub fn closed_policies(&self) -> impl Iterator<Item = (&ObjectId, &Excess)> {
        self.outsized.iter()
    }

    /// All, in no order that matters.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.policies.values().map(|entry| &entry.policy)
    }

    /// One by its name.
    pub fn get(&self, id: &ObjectId) -> Option<&Policy> {
        self.policies.get(id).map(|entry| &entry.policy)
    }

    /// Those that judge somebody in this direction, tier by tier; not those that are staged.
    pub fn applying(&self, world: &World, judged: impl Into<Judged>, direction: Direction) -> Vec<Layer<'_>> {
        self.judging(world, judged.into(), direction, false)
    }

    /// The same as it would be if those that are staged were not, and those that they stand for were gone; `None`: no staged one applies.
    pub fn proposed(
        &self,
        world: &World,
        judged: impl Into<Judged>,
        direction: Direction,
    ) -> Option<Proposed<'_>> {
        let judged = judged.into();
        let staged = || self.iter().filter(|policy| policy.staged);
        staged().next()?;
        let replaced: BTreeSet<&ObjectId> = staged().filter_map(|policy| policy.replaces.as_ref()).collect();
        let mut layers = self.judging(world, judged, direction, true);
        let mut replaces = false;
        for layer in &mut layers {
            let before = layer.policies.len();
            layer.policies.retain(|policy| !replaced.contains(&policy.id));
            replaces |= layer.policies.len() != before;
        }
        layers.retain(|layer| !layer.policies.is_empty());
        let any_staged = layers.iter().flat_map(|layer| &layer.policies).any(|policy| policy.staged);
        (any_staged || replaces).then_some(Proposed { layers, replaces })
    }

    fn judging(&self, world: &World, judged: Judged, direction: Direction, staged: bool) -> Vec<Layer<'_>> {
        let is_of_host = world.host_at(judged).is_some();
        let reaches = |policy: &&Policy| match policy.reach {
            Reach::Ends => !judged.forwards,
            Reach::Forwarded => true,
            Reach::BeforeNat => direction == Direction::Ingress && is_of_host,
            // What is forwarded passes one hook before conntrack, where it comes in.
            Reach::Untracked => is_of_host && (direction == Direction::Ingress || !judged.forwards),
        };
        let applies = |entry: &&Entry| {
            let policy = &entry.policy;
            policy.rules(direction).is_some()
                && (staged || !policy.staged)
                && reaches(&policy)
                && world.is_subject(&policy.subject, judged)
        };
        let entries: Vec<&Entry> = self.policies.values().filter(applies).collect();
        let counting = entries.iter().filter(|entry| self.excess(&entry.policy.id).is_none());
        let namespaced = counting.filter(|entry| entry.policy.id.namespace.is_some());
        let cost = namespaced.map(|entry| entry.cost_in(direction)).sum();
        let crowded = Excess::of(Which::Class(direction), &self.budgets.class, cost);
        let is_closed = |entry: &Entry| {
            crowded.is_some() && entry.policy.id.namespace.is_some()
                || self.excess(&entry.policy.id).is_some()
        };
        let mut applying: Vec<&Policy> = entries
            .into_iter()
            .map(|entry| if is_closed(entry) { &entry.closed } else { &entry.policy })
            .collect();
        let stage = |policy: &Policy| Stage::from(policy.reach);
        applying.sort_by(|a, b| (stage(a), a.rank()).cmp(&(stage(b), b.rank())));
        // The first that is closed denies all: what it costs does not depend on how many there are.
        let mut closed: BTreeSet<(&str, &Tier, Stage, bool)> = BTreeSet::new();
        applying.retain(|policy| match policy.id.namespace.as_deref().filter(|_| is_replaced(policy)) {
            Some(namespace) => closed.insert((namespace, &policy.tier, stage(policy), policy.staged)),
            None => true,
        });
        let mut layers: Vec<Layer<'_>> = Vec::new();
        for policy in applying {
            let stage = stage(policy);
            match layers.last_mut() {
                Some(layer) if *layer.tier == policy.tier && layer.stage == stage => {
                    layer.policies.push(policy);
                }
                _ => layers.push(Layer {
                    tier: &policy.tier,
                    // What is not decided there is asked of all others.
                    end: if stage == Stage::Tracked { policy.tier.end } else { End::Pass },
                    stage,
                    policies: vec![policy],
                    crowded,
                }),
            }
        }
        layers
    }
}

/// Whether this stands for a policy that is over its budget.
fn is_replaced(policy: &Policy) -> bool {
    let rules = policy.egress.iter().chain(&policy.ingress).flatten();
    rules.take(1).any(|rule| rule.name == OVER)
}

/// Whether a policy counts against a budget: not what the agent itself makes of the configuration.
fn is_counted(policy: &Policy) -> bool {
    policy.tier != Tier::sites()
}

/// Tiers that an endpoint can be judged by: nf_tables follows sixteen chains into each other, and some are ours. What would come after
/// is denied.
pub(crate) const TIERS_MOST: usize = 9;

/// The first tier that is one too many.
pub(crate) fn excess(layers: &[Layer<'_>]) -> Option<ObjectId> {
    let name = layers.get(TIERS_MOST)?.tier.name.clone();
    Some(ObjectId { kind: "Tier", namespace: None, name })
}

/// Whether somebody is a node that is protected as such: by a host endpoint, or by policies that mean nodes, or that judge what nodes
/// begin.
pub fn is_protected(world: &World, policies: &PolicySet, judged: impl Into<Judged>) -> bool {
    let judged = judged.into();
    let protects = |policy: &Policy| {
        !policy.staged
            && (policy.subject.is_about_nodes() || policy.egress.is_some())
            && world.is_subject(&policy.subject, judged)
    };
    world.host_at(judged).is_some() || world.is_node_at(judged.address) && policies.iter().any(protects)
}
