//! What becomes of a flow, by the policies alone: the oracle that the compiled ruleset is held against.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::{Action, Direction, End, Policy, PolicyId, Port, PortMatch, Rule, Tier};
use crate::protocol::Protocol;
use crate::world::World;

/// The policies, in the order in which they are asked.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    policies: BTreeMap<PolicyId, Policy>,
}

impl PolicySet {
    /// A policy is there, or is different now. Returns the one before.
    pub fn put(&mut self, policy: Policy) -> Option<Policy> {
        self.policies.insert(policy.id.clone(), policy)
    }

    /// A policy is gone.
    pub fn remove(&mut self, id: &PolicyId) -> Option<Policy> {
        self.policies.remove(id)
    }

    /// All, in no order that matters.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.policies.values()
    }

    /// One by its name.
    pub fn get(&self, id: &PolicyId) -> Option<&Policy> {
        self.policies.get(id)
    }

    /// Those that judge who has this address in this direction, tier by tier.
    pub fn applying(
        &self,
        world: &World,
        address: IpAddr,
        direction: Direction,
    ) -> Vec<(&Tier, Vec<&Policy>)> {
        let judging = self.policies.values().filter(|policy| policy.rules(direction).is_some());
        let mut applying: Vec<&Policy> =
            judging.filter(|policy| world.is_subject(&policy.subject, address)).collect();
        applying.sort_by(|a, b| a.rank().cmp(&b.rank()));
        let mut tiers: Vec<(&Tier, Vec<&Policy>)> = Vec::new();
        for policy in applying {
            match tiers.last_mut() {
                Some((tier, policies)) if **tier == policy.tier => policies.push(policy),
                _ => tiers.push((&policy.tier, vec![policy])),
            }
        }
        tiers
    }
}

/// A new flow, as it is behind destination NAT and before source NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Who begins it.
    pub source: IpAddr,
    /// Whom it is for.
    pub destination: IpAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// The destination's port, of a protocol that has ports.
    pub port: u16,
}

/// Why something was decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// A rule.
    Rule {
        /// Its tier.
        tier: String,
        /// Its policy.
        policy: PolicyId,
        /// Its name in there.
        rule: String,
    },
    /// Policies of a tier apply, and none of their rules matches.
    Isolated {
        /// The tier.
        tier: String,
        /// The policies.
        policies: Vec<PolicyId>,
    },
    /// No policy decides.
    Unjudged,
    /// A pod may always reach its own address.
    OwnAddress,
    /// A pod and its own node may always reach each other.
    OwnNode,
}

/// What is decided in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// Why.
    pub reason: Reason,
}

/// What becomes of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Whether who begins it may.
    pub egress: Decision,
    /// Whether whom it is for may be reached.
    pub ingress: Decision,
}

impl Judgement {
    /// Whether the flow is allowed: both ends have to agree.
    pub fn allowed(&self) -> bool {
        self.egress.allowed && self.ingress.allowed
    }
}

/// Judges a flow.
pub fn evaluate(world: &World, policies: &PolicySet, flow: &Flow) -> Judgement {
    if let Some(reason) = exempt(world, flow) {
        let decision = Decision { allowed: true, reason };
        return Judgement { egress: decision.clone(), ingress: decision };
    }
    Judgement {
        egress: decide(world, policies, flow, Direction::Egress),
        ingress: decide(world, policies, flow, Direction::Ingress),
    }
}

fn exempt(world: &World, flow: &Flow) -> Option<Reason> {
    if flow.source == flow.destination {
        return Some(Reason::OwnAddress);
    }
    let own_node = |pod: IpAddr, other: IpAddr| {
        let node = world.holder(pod)?.node.as_deref()?;
        (world.node_at(other)? == node).then_some(Reason::OwnNode)
    };
    own_node(flow.source, flow.destination).or_else(|| own_node(flow.destination, flow.source))
}

fn decide(world: &World, policies: &PolicySet, flow: &Flow, direction: Direction) -> Decision {
    let (own, other) = match direction {
        Direction::Egress => (flow.source, flow.destination),
        Direction::Ingress => (flow.destination, flow.source),
    };
    'tiers: for (tier, applying) in policies.applying(world, own, direction) {
        for policy in &applying {
            for rule in policy.rules(direction).unwrap_or_default() {
                if !matches(world, rule, other, flow) {
                    continue;
                }
                let allowed = match rule.action {
                    Action::Allow => true,
                    Action::Deny => false,
                    Action::Pass => continue 'tiers,
                    Action::Log => continue,
                };
                let reason = Reason::Rule {
                    tier: tier.name.clone(),
                    policy: policy.id.clone(),
                    rule: rule.name.clone(),
                };
                return Decision { allowed, reason };
            }
        }
        if tier.end == End::Deny {
            let policies = applying.iter().map(|policy| policy.id.clone()).collect();
            return Decision {
                allowed: false,
                reason: Reason::Isolated { tier: tier.name.clone(), policies },
            };
        }
    }
    Decision { allowed: true, reason: Reason::Unjudged }
}

fn matches(world: &World, rule: &Rule, other: IpAddr, flow: &Flow) -> bool {
    let peers = rule.peers.as_ref();
    peers.is_none_or(|peers| peers.iter().any(|peer| world.is_peer(peer, other)))
        && rule.ports.as_ref().is_none_or(|ports| ports.iter().any(|port| matches_port(world, port, flow)))
}

/// Whether a flow goes to one of these ports.
pub fn matches_port(world: &World, port: &Port, flow: &Flow) -> bool {
    port.protocol == flow.protocol
        && match &port.ports {
            PortMatch::Any => true,
            PortMatch::Range(first, last) => (*first..=*last).contains(&flow.port),
            PortMatch::Named(name) => world.holder(flow.destination).is_some_and(|pod| {
                let named = |port: &crate::object::NamedPort| {
                    port.name == *name && port.protocol == flow.protocol && port.port == flow.port
                };
                pod.ports.iter().any(named)
            }),
        }
}
