//! Why a flow is judged as it is, for people: what decided, what came near, and what would allow it.

mod condition;

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::evaluate::{Decision, Flow, Reason, enforced, evaluate, exempt, forwarding, holds, propose};
use crate::model::{Direction, Labels, Side};
use crate::object::{NAMESPACE_NAME, is_given};
use crate::protocol::Protocol;
use crate::state::State;
use crate::tiers::PolicySet;
use crate::world::{Judged, World};

/// The most rules of a tier that are told of.
const RULES_MOST: usize = 20;

/// Explains what becomes of a flow, in a few lines of text.
pub fn explain(state: &State, flow: &Flow) -> String {
    let State { world, policies, .. } = state;
    let judgement = evaluate(world, policies, flow);
    let mut text = String::new();
    let verdict = if judgement.allowed() { "allowed" } else { "denied" };
    let port = if flow.protocol.has_ports() { format!(" {}", flow.port) } else { String::new() };
    let (source, destination) = (who(world, flow.source), who(world, flow.destination));
    let _ = writeln!(text, "{source} -> {destination}, {}{port}: {verdict}", flow.protocol);
    for (direction, decision) in
        [(Direction::Egress, &judgement.egress), (Direction::Ingress, &judgement.ingress)]
    {
        let judged = flow.judged(direction);
        let of = |judged| match exempt(world, flow, direction) {
            Some(_) => decision.clone(),
            None => enforced(world, policies, flow, direction, judged),
        };
        let own = of(judged);
        let whose = who(world, judged.address);
        let _ = writeln!(text, "{} of {whose}: {}", direction.as_str(), sentence(&own));
        if !own.allowed {
            near(&mut text, world, policies, flow, direction, judged);
            remedy(&mut text, world, flow, direction, &own);
        }
        let Some(node) = forwarding(world, flow, direction) else { continue };
        let forwarded = of(node);
        if own.allowed && forwarded.reason != own.reason {
            let whose = who(world, node.address);
            let _ = writeln!(text, "  and what {whose} forwards of it: {}", sentence(&forwarded));
        }
        if own.allowed && !forwarded.allowed {
            near(&mut text, world, policies, flow, direction, node);
        }
    }
    if let Some(proposed) = propose(world, policies, flow).filter(|proposed| *proposed != judgement) {
        let verdict = if proposed.allowed() { "allowed" } else { "denied" };
        let _ = writeln!(text, "with the policies that are staged: {verdict}");
        for (direction, decision) in
            [(Direction::Egress, &proposed.egress), (Direction::Ingress, &proposed.ingress)]
        {
            let _ = writeln!(text, "  {}: {}", direction.as_str(), sentence(decision));
        }
    }
    for (id, refusal) in &state.faults {
        let concerned = [flow.source, flow.destination].into_iter().any(|address| {
            state.policies.get(id).is_some_and(|policy| world.is_subject(&policy.subject, address))
        });
        if concerned {
            let _ = writeln!(text, "{}", refusal.told(id));
        }
    }
    text
}

/// Who has an address, for people.
pub fn who(world: &World, address: IpAddr) -> String {
    if let Some(pod) = world.holder(address) {
        return format!("pod {} ({address})", pod.key);
    }
    match (world.node_at(address), world.node_of(address)) {
        (Some(node), _) => format!("node {node} ({address})"),
        (None, Some(node)) => format!("{address}, of no known pod on node {node}"),
        (None, None) => format!("{address}, outside of the mesh"),
    }
}

fn sentence(decision: &Decision) -> String {
    let verdict = if decision.allowed { "allowed" } else { "denied" };
    match &decision.reason {
        Reason::Rule { tier, policy, rule } => format!("{verdict} by {rule} of {policy} (tier {tier})"),
        Reason::Isolated { tier, policies } => {
            let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
            format!("{verdict}: isolated by {}, of which no rule matches (tier {tier})", names.join(", "))
        }
        Reason::Unjudged => format!("{verdict}: no policy judges it"),
        Reason::OwnAddress => format!("{verdict}: a pod always reaches its own address"),
        Reason::FailSafe => format!("{verdict}: no policy takes this from a node"),
        Reason::Unprofiled(host) => {
            format!("{verdict}: no policy decides, and no profile of {host} allows it")
        }
        Reason::OwnNode => format!("{verdict}: a pod and its own node always reach each other"),
    }
}

/// The rules that were asked and did not match, each with what was missing.
fn near(
    text: &mut String,
    world: &World,
    policies: &PolicySet,
    flow: &Flow,
    direction: Direction,
    judged: Judged,
) {
    let layers = policies.applying(world, judged, direction);
    let all =
        layers.iter().flat_map(|layer| layer.policies.iter().map(|policy| (flow.seen_by(layer), policy)));
    let rules = all.flat_map(|(seen, policy)| {
        policy.rules(direction).unwrap_or_default().iter().map(move |rule| (seen, policy, rule))
    });
    let mut more = 0;
    for (index, (flow, policy, rule)) in rules.enumerate() {
        let flow = &flow;
        let missing = rule.when.iter().filter(|condition| !holds(world, condition, flow));
        let missing: Vec<String> =
            missing.map(|condition| condition::missing(world, condition, flow)).collect();
        if missing.is_empty() {
            continue;
        }
        match index < RULES_MOST {
            true => {
                let why = missing.join(", and ");
                let _ = writeln!(text, "  {} of {} does not match: {why}", rule.name, policy.id);
            }
            false => more += 1,
        }
    }
    if more > 0 {
        let _ = writeln!(text, "  nor do {more} more");
    }
}

/// What would allow it.
fn remedy(text: &mut String, world: &World, flow: &Flow, direction: Direction, decision: &Decision) {
    let (own, other) = (flow.address(Side::own(direction)), flow.address(Side::other(direction)));
    if let Reason::Rule { tier, policy, rule } = &decision.reason {
        let place = match world.holder(own) {
            Some(_) => "; a rule of an earlier tier that allows it comes first",
            None => "",
        };
        let _ = writeln!(text, "  to allow it, change {rule} of {policy} (tier {tier}){place}");
        return;
    }
    let Some(pod) = world.holder(own) else { return };
    let (field, side) = match direction {
        Direction::Egress => ("egress", "to"),
        Direction::Ingress => ("ingress", "from"),
    };
    let _ = writeln!(
        text,
        "  this would allow it, in the `{field}` of a NetworkPolicy of namespace {} that selects the pod:",
        pod.key.namespace
    );
    let _ = writeln!(text, "    - {side}:");
    match world.holder(other) {
        Some(peer) => {
            let namespace = Labels::from([(NAMESPACE_NAME.to_owned(), peer.key.namespace.clone())]);
            let _ = writeln!(text, "      - namespaceSelector: {{matchLabels: {}}}", flow_map(&namespace));
            let _ = writeln!(text, "        podSelector: {{matchLabels: {}}}", flow_map(&peer.labels));
        }
        None => {
            let length = if other.is_ipv4() { 32 } else { 128 };
            let _ = writeln!(text, "      - ipBlock: {{cidr: {other}/{length}}}");
        }
    }
    if flow.protocol.has_ports() {
        let _ = writeln!(text, "      ports: [{{protocol: {}, port: {}}}]", flow.protocol, flow.port);
    } else if flow.protocol != Protocol::ICMP && flow.protocol != Protocol::ICMPV6 {
        let _ = writeln!(text, "      # without `ports`: a NetworkPolicy cannot name {}", flow.protocol);
    } else {
        let _ = writeln!(text, "      # without `ports`: ICMP passes by rules that name none");
    }
}

fn flow_map(labels: &Labels) -> String {
    let own = labels.iter().filter(|(key, _)| !is_given(key));
    let all: Vec<String> = own.map(|(key, value)| format!("{key}: {value:?}")).collect();
    format!("{{{}}}", all.join(", "))
}
