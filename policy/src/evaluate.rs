//! What becomes of a flow, by the policies alone: the oracle that the compiled ruleset is held against.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::interface::Interface;
use crate::model::{Action, Condition, Direction, End, Icmp, ObjectId, Peer, PortMatch, Rule, Side};
use crate::protocol::{Family, Protocol};
use crate::tiers::{Layer, PolicySet, Stage, TIERS_MOST, excess, is_protected};
use crate::unread;
use crate::world::{Judged, World};

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
    /// Address and port that it was begun towards, before destination NAT; `None`: the destination's.
    pub dialled: Option<(IpAddr, u16)>,
    /// The interface by which it leaves the source's node.
    pub leaves_by: Option<Interface>,
    /// The interface by which it comes to the destination's node.
    pub arrives_by: Option<Interface>,
}

impl Flow {
    /// A flow to a port, from one that is not known. Of ICMP it is an echo request.
    pub fn new(source: IpAddr, destination: IpAddr, protocol: Protocol, port: u16) -> Self {
        let echo = if protocol == Protocol::ICMPV6 { 128 } else { 8 };
        Self {
            source,
            destination,
            protocol,
            port,
            source_port: 0,
            icmp: (echo, 0),
            dialled: None,
            leaves_by: None,
            arrives_by: None,
        }
    }

    /// The address at an end.
    pub fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }

    /// As it was before destination NAT.
    pub fn before_nat(self) -> Self {
        let (destination, port) = self.dialled.unwrap_or((self.destination, self.port));
        Self { destination, port, ..self }
    }

    /// As policies of a tier look at it.
    pub fn seen_by(&self, layer: &Layer<'_>) -> Self {
        if layer.stage == Stage::Tracked { *self } else { self.before_nat() }
    }

    /// Who is judged in a direction.
    pub fn judged(&self, direction: Direction) -> Judged {
        let interface = match direction {
            Direction::Egress => self.leaves_by,
            Direction::Ingress => self.arrives_by,
        };
        Judged { address: self.address(Side::own(direction)), interface, forwards: false }
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
    let [egress, ingress] = Direction::BOTH.map(|direction| {
        if let Some(reason) = exempt(world, flow, direction) {
            return Decision { allowed: true, reason };
        }
        let decision = |judged| enforced(world, policies, flow, direction, judged);
        both(decision(flow.judged(direction)), forwarding(world, flow, direction).map(decision))
    });
    Judgement { egress, ingress }
}

/// What the policies of one who is judged in a direction decide.
pub(crate) fn enforced(
    world: &World,
    policies: &PolicySet,
    flow: &Flow,
    direction: Direction,
    judged: Judged,
) -> Decision {
    let layers = policies.applying(world, judged, direction);
    judge(world, policies, &layers, flow, direction, judged)
}

/// What would become of a flow if staged policies counted; `None`: none of them applies to its ends.
pub fn propose(world: &World, policies: &PolicySet, flow: &Flow) -> Option<Judgement> {
    let mut staged = false;
    let [egress, ingress] = Direction::BOTH.map(|direction| {
        if let Some(reason) = exempt(world, flow, direction) {
            return Decision { allowed: true, reason };
        }
        let mut decision = |judged: Judged| {
            let proposed = policies.proposed(world, judged, direction);
            staged |= proposed.is_some();
            let layers = proposed.map(|proposed| proposed.layers);
            let layers = layers.unwrap_or_else(|| policies.applying(world, judged, direction));
            judge(world, policies, &layers, flow, direction, judged)
        };
        let own = decision(flow.judged(direction));
        both(own, forwarding(world, flow, direction).map(decision))
    });
    staged.then_some(Judgement { egress, ingress })
}

/// Which decision counts, of an end's own policies and of those of the node that forwards for it.
fn both(own: Decision, forwarding: Option<Decision>) -> Decision {
    match forwarding {
        Some(forwarding) if own.allowed && !forwarding.allowed => forwarding,
        _ => own,
    }
}

/// The node that forwards what a pod begins, or what is begun towards it, where that leaves or enters the node.
pub(crate) fn forwarding(world: &World, flow: &Flow, direction: Direction) -> Option<Judged> {
    let judged = flow.judged(direction);
    let name = world.holder(judged.address)?.node.as_deref()?;
    let other = world.holder(flow.address(Side::other(direction)));
    if other.is_some_and(|pod| pod.node.as_deref() == Some(name)) {
        return None;
    }
    let address = world.nodes().get(name)?.any_address()?;
    Some(Judged { address, forwards: true, ..judged })
}

pub(crate) fn exempt(world: &World, flow: &Flow, direction: Direction) -> Option<Reason> {
    if flow.source == flow.destination {
        return Some(Reason::OwnAddress);
    }
    let own_node = |pod: IpAddr, other: IpAddr| {
        let node = world.holder(pod)?.node.as_deref()?;
        world.is_known_by(node, other).then_some(Reason::OwnNode)
    };
    let own_node =
        own_node(flow.source, flow.destination).or_else(|| own_node(flow.destination, flow.source))?;
    // Who comes in by an interface that has a host endpoint of its own is no pod by its address alone.
    let judged = flow.judged(direction);
    let host = world.host_at(judged).filter(|_| world.holder(judged.address).is_none());
    match host.and_then(|(_, _, host)| host.interface) {
        Some(_) => None,
        None => Some(own_node),
    }
}

fn judge(
    world: &World,
    policies: &PolicySet,
    layers: &[Layer<'_>],
    flow: &Flow,
    direction: Direction,
    judged: Judged,
) -> Decision {
    let (untracked, tracked) =
        layers.split_at(layers.iter().take_while(|layer| layer.stage == Stage::Untracked).count());
    let decision = decide(world, untracked, flow, direction, judged);
    if decision.reason != Reason::Unjudged {
        return decision;
    }
    let safe = || world.failsafe.holds(direction, flow.protocol, flow.port);
    if !judged.forwards && safe() && is_protected(world, policies, judged) {
        return Decision { allowed: true, reason: Reason::FailSafe };
    }
    let room = TIERS_MOST.saturating_sub(untracked.len());
    let decision = decide(world, &tracked[..tracked.len().min(room)], flow, direction, judged);
    if decision.reason != Reason::Unjudged {
        return decision;
    }
    match excess(layers).or(world.closed_by(judged).cloned()) {
        Some(id) => Decision { allowed: false, reason: Reason::Unprofiled(id) },
        None => decision,
    }
}

fn decide(
    world: &World,
    layers: &[Layer<'_>],
    flow: &Flow,
    direction: Direction,
    judged: Judged,
) -> Decision {
    // Without conntrack nobody knows who answers: what comes from a port that is safe may be an answer.
    let opposite = if direction == Direction::Egress { Direction::Ingress } else { Direction::Egress };
    let mut tracked = world.failsafe.holds(opposite, flow.protocol, flow.source_port)
        || world.failsafe.holds(direction, flow.protocol, flow.before_nat().port);
    // What is for another address has yet to be translated, and is tracked.
    let is_translated = direction == Direction::Ingress && flow.before_nat().destination != flow.destination;
    'tiers: for layer in layers.iter().take(TIERS_MOST) {
        let flow = &flow.seen_by(layer);
        let Layer { tier, policies, end, stage, .. } = layer;
        if tracked && *stage == Stage::Untracked {
            continue;
        }
        for policy in policies {
            for rule in policy.rules(direction).unwrap_or_default() {
                let Some(rule) = unread::closed(world, rule).filter(|rule| matches(world, rule, flow)) else {
                    continue;
                };
                let allowed = match rule.action {
                    // What is forwarded, or will be translated, others judge by its connection.
                    Action::Allow if *stage == Stage::Untracked && (judged.forwards || is_translated) => {
                        tracked = true;
                        continue 'tiers;
                    }
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
        if *end == End::Deny {
            let policies = policies.iter().map(|policy| policy.id.clone()).collect();
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
            protocol.is_none_or(|protocol| flow.protocol == protocol)
                && !ports.iter().any(|port| has_port(world, *side, port, flow))
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
        PortMatch::Named(name) => {
            let address = flow.address(side);
            let of_pod = world.holder(address).into_iter().flat_map(|pod| pod.ports.iter());
            of_pod
                .chain(world.host_ports(address))
                .any(|port| port.name == *name && port.protocol == flow.protocol && port.port == number)
        }
    }
}
