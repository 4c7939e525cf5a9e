//! Which policies judge whom, and in which order.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Direction, End, ObjectId, Policy, Reach, Tier};
use crate::world::{Judged, World};

/// All policies.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    policies: BTreeMap<ObjectId, Policy>,
}

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
    /// A policy is there, or is different now. Returns the one before.
    pub fn put(&mut self, policy: Policy) -> Option<Policy> {
        self.policies.insert(policy.id.clone(), policy)
    }

    /// A policy is gone.
    pub fn remove(&mut self, id: &ObjectId) -> Option<Policy> {
        self.policies.remove(id)
    }

    /// All, in no order that matters.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.policies.values()
    }

    /// One by its name.
    pub fn get(&self, id: &ObjectId) -> Option<&Policy> {
        self.policies.get(id)
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
        let staged = || self.policies.values().filter(|policy| policy.staged);
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
        let judging = self.policies.values().filter(|policy| policy.rules(direction).is_some());
        let judging = judging.filter(|policy| staged || !policy.staged).filter(reaches);
        let mut applying: Vec<&Policy> =
            judging.filter(|policy| world.is_subject(&policy.subject, judged)).collect();
        let stage = |policy: &Policy| Stage::from(policy.reach);
        applying.sort_by(|a, b| (stage(a), a.rank()).cmp(&(stage(b), b.rank())));
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
                }),
            }
        }
        layers
    }
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
