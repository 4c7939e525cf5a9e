//! What becomes of a flow, by the policies alone: the oracle that the compiled ruleset is held against.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::{
    Action, Condition, Direction, End, Icmp, ObjectId, Peer, Policy, PortMatch, Rule, Side, Tier,
};
use crate::protocol::{Family, Protocol};
use crate::world::World;

/// The policies, in the order in which they are asked.
#[derive(Debug, Clone, Default)]
pub struct PolicySet {
    policies: BTreeMap<ObjectId, Policy>,
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

    /// Those that judge who has this address in this direction, tier by tier; not those that are staged.
    pub fn applying(
        &self,
        world: &World,
        address: IpAddr,
        direction: Direction,
    ) -> Vec<(&Tier, Vec<&Policy>)> {
        self.judging(world, address, direction, false)
    }

    /// The same as it would be if those that are staged were not; `None`: none of them applies.
    pub fn proposed(
        &self,
        world: &World,
        address: IpAddr,
        direction: Direction,
    ) -> Option<Vec<(&Tier, Vec<&Policy>)>> {
        let tiers = self.judging(world, address, direction, true);
        let mut all = tiers.iter().flat_map(|(_, policies)| policies);
        all.any(|policy| policy.staged).then_some(tiers)
    }

    fn judging(
        &self,
        world: &World,
        address: IpAddr,
        direction: Direction,
        staged: bool,
    ) -> Vec<(&Tier, Vec<&Policy>)> {
        let judging = self.policies.values().filter(|policy| policy.rules(direction).is_some());
        let judging = judging.filter(|policy| staged || !policy.staged);
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
    /// The source's port, of a protocol that has ports; 0 where it is not known.
    pub source_port: u16,
    /// Type and code of the message that begins it, of ICMP.
    pub icmp: (u8, u8),
}

impl Flow {
    /// A flow to a port, from one that is not known. Of ICMP it is an echo request.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: Protocol, port: u16) -> Self {
        let echo = if protocol == Protocol::ICMPV6 { 128 } else { 8 };
        Self { source, destination, protocol, port, source_port: 0, icmp: (echo, 0) }
    }

    /// The address at an end.
    pub fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    /// The port at an end.
    pub fn port_at(&self, side: Side) -> u16 {
        match side {
            Side::Source => self.source_port,
            Side::Destination => self.port,
        }
    }
}

/// Why something was decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// A rule.
    Rule {
        /// Its tier.
        tier: String,
        /// Its policy.
        policy: ObjectId,
        /// Its name in there.
        rule: String,
    },
    /// Policies of a tier apply, and none of their rules matches.
    Isolated {
        /// The tier.
        tier: String,
        /// The policies.
        policies: Vec<ObjectId>,
    },
    /// No policy decides.
    Unjudged,
    /// A pod may always reach its own address.
    OwnAddress,
    /// A pod and its own node may always reach each other.
    OwnNode,
    /// It is among what no policy takes from a node.
    FailSafe,
    /// No policy decides, and no profile of this host endpoint allows it; or this tier is one too many to be asked.
    Unprofiled(ObjectId),
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
    let [egress, ingress] = Direction::BOTH.map(|direction| {
        let own = flow.address(Side::own(direction));
        let tiers = policies.applying(world, own, direction);
        judge(world, policies, &tiers, flow, direction)
    });
    Judgement { egress, ingress }
}

/// What would become of a flow if staged policies counted; `None`: none of them applies to its ends.
pub fn propose(world: &World, policies: &PolicySet, flow: &Flow) -> Option<Judgement> {
    if exempt(world, flow).is_some() {
        return None;
    }
    let mut staged = false;
    let [egress, ingress] = Direction::BOTH.map(|direction| {
        let own = flow.address(Side::own(direction));
        let proposed = policies.proposed(world, own, direction);
        staged |= proposed.is_some();
        let tiers = proposed.unwrap_or_else(|| policies.applying(world, own, direction));
        judge(world, policies, &tiers, flow, direction)
    });
    staged.then_some(Judgement { egress, ingress })
}

fn exempt(world: &World, flow: &Flow) -> Option<Reason> {
    if flow.source == flow.destination {
        return Some(Reason::OwnAddress);
    }
    let own_node = |pod: IpAddr, other: IpAddr| {
        let node = world.holder(pod)?.node.as_deref()?;
        world.is_known_by(node, other).then_some(Reason::OwnNode)
    };
    own_node(flow.source, flow.destination).or_else(|| own_node(flow.destination, flow.source))
}

/// Tiers that an endpoint can be judged by: nf_tables follows sixteen chains into each other, and some are ours. What would come after
/// is denied.
pub(crate) const TIERS_MOST: usize = 9;

/// The first tier that is one too many.
pub(crate) fn excess(tiers: &[(&Tier, Vec<&Policy>)]) -> Option<ObjectId> {
    let (tier, _) = tiers.get(TIERS_MOST)?;
    Some(ObjectId { kind: "Tier", namespace: None, name: tier.name.clone() })
}

/// Whether who has this address is a node that is protected as such: by a host endpoint, or by policies that mean nodes, or that judge
/// what nodes begin.
pub(crate) fn is_protected(world: &World, policies: &PolicySet, address: IpAddr) -> bool {
    let protects = |policy: &Policy| {
        !policy.staged
            && (policy.subject.is_about_nodes() || policy.egress.is_some())
            && world.is_subject(&policy.subject, address)
    };
    world.host_at(address).is_some() || world.is_node_at(address) && policies.iter().any(protects)
}

fn judge(
    world: &World,
    policies: &PolicySet,
    tiers: &[(&Tier, Vec<&Policy>)],
    flow: &Flow,
    direction: Direction,
) -> Decision {
    let own = flow.address(Side::own(direction));
    if world.failsafe.holds(direction, flow.protocol, flow.port) && is_protected(world, policies, own) {
        return Decision { allowed: true, reason: Reason::FailSafe };
    }
    let decision = decide(world, tiers, flow, direction);
    if decision.reason != Reason::Unjudged {
        return decision;
    }
    let closed = world.host_at(own).filter(|(_, host)| !host.open).map(|(id, _)| id.clone());
    match excess(tiers).or(closed) {
        Some(id) => Decision { allowed: false, reason: Reason::Unprofiled(id) },
        None => decision,
    }
}

fn decide(world: &World, tiers: &[(&Tier, Vec<&Policy>)], flow: &Flow, direction: Direction) -> Decision {
    'tiers: for (tier, applying) in tiers.iter().take(TIERS_MOST) {
        for policy in applying {
            for rule in policy.rules(direction).unwrap_or_default() {
                if !matches(world, rule, flow) {
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

fn matches(world: &World, rule: &Rule, flow: &Flow) -> bool {
    rule.when.iter().all(|condition| holds(world, condition, flow))
}

/// Whether a flow is what a rule asks for.
pub fn holds(world: &World, condition: &Condition, flow: &Flow) -> bool {
    let is_any = |side: &Side, peers: &BTreeSet<Peer>| {
        peers.iter().any(|peer| world.is_peer(peer, flow.address(*side)))
    };
    let family = Family::of(flow.source);
    let is_icmp = |icmp: &Icmp| family == icmp.family && flow.protocol == Protocol::icmp(icmp.family);
    let begins = |icmp: &Icmp| icmp.kind == flow.icmp.0 && icmp.code.is_none_or(|code| code == flow.icmp.1);
    match condition {
        Condition::Family(wanted) => family == *wanted,
        Condition::Protocol(protocol) => flow.protocol == *protocol,
        Condition::NotProtocol(protocol) => flow.protocol != *protocol,
        Condition::Ports(side, ports) => ports
            .iter()
            .any(|port| port.protocol == flow.protocol && has_port(world, *side, &port.ports, flow)),
        Condition::NotPorts(side, protocol, ports) => {
            flow.protocol == *protocol && !ports.iter().any(|port| has_port(world, *side, port, flow))
        }
        Condition::Icmp(icmp) => is_icmp(icmp) && begins(icmp),
        Condition::NotIcmp(icmp) => is_icmp(icmp) && !begins(icmp),
        Condition::Serves(service) => {
            world.serves(service, flow.destination).any(|ports| ports.contains(&(flow.protocol, flow.port)))
        }
        Condition::Is(side, peers) => is_any(side, peers),
        Condition::IsNot(side, peers) => !is_any(side, peers),
    }
}

/// Whether the port at an end is one of these.
fn has_port(world: &World, side: Side, ports: &PortMatch, flow: &Flow) -> bool {
    let number = flow.port_at(side);
    match ports {
        PortMatch::Any => true,
        PortMatch::Range(first, last) => (*first..=*last).contains(&number),
        PortMatch::Named(name) => world.holder(flow.address(side)).is_some_and(|pod| {
            let mut ports = pod.ports.iter();
            ports.any(|port| port.name == *name && port.protocol == flow.protocol && port.port == number)
        }),
    }
}
