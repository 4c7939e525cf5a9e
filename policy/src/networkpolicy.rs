//! Kubernetes' NetworkPolicy (networking.k8s.io/v1), from manifest to [`Policy`].
//!
//! What the API server would fill in is filled in here, since files have not been through one; what it would refuse is refused, and
//! then fails closed: the policy isolates what it selects and allows nothing.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::field::{Faults, Result, directions, net, number, port_name, selector, shown};
use crate::model::{
    Action, Block, Direction, Namespaces, ObjectId, Order, Peer, PodSelector, Policy, Port, PortMatch, Reach,
    Rule, Subject, Tier,
};
use crate::object::{Key, ObjectError};
use crate::protocol::Protocol;
use crate::refusal::{Outcome, Refusal};

/// The kind, as in manifests.
pub const KIND: &str = "NetworkPolicy";
/// The version that is read.
pub const API_VERSION: &str = "networking.k8s.io/v1";
/// Where Calico puts them in its tier, too.
const ORDER: Order = Order(1000.0);
/// Ports of all rules of a direction, each rule without any counted as one: more rules than this the kernel would walk through for one
/// policy.
pub(crate) const ENTRIES_MOST: usize = 4_096;

/// A policy, and what is wrong with its object if it had to be refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// The policy; of an object that was refused one that isolates and allows nothing.
    pub policy: Policy,
    /// Why it was refused.
    pub fault: Option<ObjectError>,
    /// What else is wrong with it.
    pub more: Vec<ObjectError>,
    /// Hints about valid settings that may surprise the author.
    pub hints: Vec<ObjectError>,
    /// The policy's effect until the faults are corrected.
    pub outcome: Outcome,
}

impl From<Policy> for Read {
    /// One that nothing is wrong with.
    fn from(policy: Policy) -> Self {
        Self::of(policy, Faults::default(), Outcome::Rest)
    }
}

impl Read {
    pub(crate) fn of(policy: Policy, faults: Faults, outcome: Outcome) -> Self {
        Self { policy, fault: faults.first, more: faults.more, hints: faults.hints, outcome }
    }

    /// Returns the refused parts, if any.
    pub fn refusal(&self) -> Option<Refusal> {
        let outcome = if self.policy.staged { Outcome::Staged } else { self.outcome };
        Refusal::of(self.fault.iter().chain(&self.more), outcome)
    }
}

/// The key of a manifest.
pub fn key(object: &Value) -> Key {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    Key::new(text("/metadata/namespace"), text("/metadata/name").unwrap_or("(unnamed)"))
}

/// Reads a manifest.
pub fn read(object: &Value) -> Read {
    let key = key(object);
    let everything = Map::new();
    let (spec, shape) = match object.get("spec") {
        Some(Value::Object(spec)) => (spec, None),
        None | Some(Value::Null) => (&everything, None),
        Some(_) => (&everything, Some(ObjectError::new("spec", "is no object"))),
    };
    let mut faults = Faults::default();
    shape.into_iter().for_each(|fault| faults.note(fault));
    if object.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        faults.note(ObjectError::new("metadata.name", "a policy needs one"));
    }
    faults.known("spec", spec, &["podSelector", "policyTypes", "ingress", "egress"]);
    // What it selects is not known: everything that it may.
    let pods = faults.keep(selector("spec.podSelector", spec.get("podSelector")));
    let outcome = if pods.is_some() { Outcome::Isolates } else { Outcome::Namespace };
    let pods = pods.flatten().unwrap_or_default();
    let egress = rules(spec, Direction::Egress, &key.namespace, &mut faults);
    let ingress = rules(spec, Direction::Ingress, &key.namespace, &mut faults);
    let has_egress = egress.as_ref().is_none_or(|rules| !rules.is_empty());
    let types = types(spec.get("policyTypes"), &mut faults).unwrap_or(Some(Direction::BOTH.into()));
    let types = types.unwrap_or_else(|| {
        let egress = has_egress.then_some(Direction::Egress);
        [Direction::Ingress].into_iter().chain(egress).collect()
    });
    let refused = faults.first.is_some();
    let judged = |direction, rules: Option<Vec<Rule>>| {
        types.contains(&direction).then(|| rules.filter(|_| !refused).unwrap_or_default())
    };
    let policy = Policy {
        tier: Tier::kubernetes(),
        order: ORDER,
        egress: judged(Direction::Egress, egress),
        ingress: judged(Direction::Ingress, ingress),
        reach: Reach::Ends,
        staged: false,
        replaces: None,
        subject: Subject::Pods(PodSelector::new(Namespaces::Named(key.namespace.clone()), pods)),
        id: ObjectId { kind: KIND, namespace: Some(key.namespace), name: key.name },
    };
    Read::of(policy, faults, outcome)
}

fn types(value: Option<&Value>, faults: &mut Faults) -> Option<Option<BTreeSet<Direction>>> {
    let at = "spec.policyTypes";
    let before = faults.seen();
    if value.and_then(Value::as_array).is_some_and(|list| list.len() > 2) {
        faults.note(ObjectError::new(at, "has more than two entries"));
    }
    directions(at, value, faults).filter(|_| faults.seen() == before)
}

/// The rules of a direction; `None`: something is wrong with one of them.
fn rules(
    spec: &Map<String, Value>,
    direction: Direction,
    namespace: &str,
    faults: &mut Faults,
) -> Option<Vec<Rule>> {
    let before = faults.seen();
    let field = direction.as_str();
    let side = if direction == Direction::Ingress { "from" } else { "to" };
    let mut count = 0;
    let rules = faults.each(&format!("spec.{field}"), spec.get(field), |faults, at, entry| {
        let rule = faults.object(at, entry, &[side, "ports"])?;
        let peers = faults.each(&format!("{at}.{side}"), rule.get(side), |faults, at, entry| {
            peer(at, entry, namespace, faults)
        });
        let ports = faults
            .each(&format!("{at}.ports"), rule.get("ports"), |faults, at, entry| port(at, entry, faults));
        let peers = Some(BTreeSet::from_iter(peers)).filter(|peers| !peers.is_empty());
        let ports = Some(BTreeSet::from_iter(ports)).filter(|ports| !ports.is_empty());
        count += ports.as_ref().map_or(1, BTreeSet::len);
        let name = at.strip_prefix("spec.").unwrap_or(at).to_owned();
        Some(Rule::between(name, Action::Allow, direction, peers, ports))
    });
    if count > ENTRIES_MOST {
        let reason = format!("has {count} rules, or ports of rules; at most {ENTRIES_MOST} in one policy");
        faults.note(ObjectError::new(format!("spec.{field}"), reason));
    }
    (faults.seen() == before).then_some(rules)
}

fn peer(at: &str, value: &Value, namespace: &str, faults: &mut Faults) -> Option<Peer> {
    let peer = faults.object(at, value, &["podSelector", "namespaceSelector", "ipBlock"])?;
    let pods = faults.keep(selector(&format!("{at}.podSelector"), peer.get("podSelector")));
    let namespaces = faults.keep(selector(&format!("{at}.namespaceSelector"), peer.get("namespaceSelector")));
    match (peer.get("ipBlock").filter(|value| !value.is_null()), pods?, namespaces?) {
        (Some(value), None, None) => block(&format!("{at}.ipBlock"), value, faults).map(Peer::Block),
        (Some(_), ..) => {
            let reason = "ipBlock stands alone: move the selectors to an entry of their own";
            faults.note(ObjectError::new(at, reason));
            None
        }
        (None, None, None) => {
            let reason = "selects nothing: name podSelector, namespaceSelector or ipBlock";
            faults.note(ObjectError::new(at, reason));
            None
        }
        (None, pods, namespaces) => Some(Peer::Pods(PodSelector::new(
            namespaces.map_or_else(|| Namespaces::Named(namespace.to_owned()), Namespaces::Selected),
            pods.unwrap_or_default(),
        ))),
    }
}

fn block(at: &str, value: &Value, faults: &mut Faults) -> Option<Block> {
    let block = faults.object(at, value, &["cidr", "except"])?;
    let cidr = faults.keep(net(&format!("{at}.cidr"), block.get("cidr").unwrap_or(&Value::Null)));
    let except = faults.each(&format!("{at}.except"), block.get("except"), |faults, at, entry| {
        let inner = faults.keep(net(at, entry))?;
        let cidr = cidr?;
        if cidr.contains(&inner) && cidr != inner {
            return Some(inner);
        }
        faults.note(ObjectError::new(at, format!("{inner} does not lie inside of {cidr}")));
        None
    });
    Some(Block { net: cidr?, except })
}

fn port(at: &str, value: &Value, faults: &mut Faults) -> Option<Port> {
    let entry = faults.object(at, value, &["protocol", "port", "endPort"])?;
    let protocol = match entry.get("protocol") {
        None | Some(Value::Null) => Some(Protocol::TCP),
        Some(value) => {
            let named = match value.as_str() {
                Some("TCP") => Some(Protocol::TCP),
                Some("UDP") => Some(Protocol::UDP),
                Some("SCTP") => Some(Protocol::SCTP),
                _ => None,
            };
            if named.is_none() {
                let reason = format!("{:?}; use TCP, UDP or SCTP", shown(value));
                faults.note(ObjectError::new(format!("{at}.protocol"), reason));
            }
            named
        }
    };
    let ports = faults.keep(ports(at, entry));
    Some(Port { protocol: protocol?, ports: ports? })
}

fn ports(at: &str, entry: &Map<String, Value>) -> Result<PortMatch> {
    let port = entry.get("port").filter(|value| !value.is_null());
    let end = entry.get("endPort").filter(|value| !value.is_null());
    Ok(match (port, end) {
        (None, None) => PortMatch::Any,
        (None, Some(_)) => return Err(ObjectError::new(format!("{at}.endPort"), "needs a port to begin at")),
        (Some(Value::String(name)), None) => PortMatch::Named(port_name(&format!("{at}.port"), name)?),
        (Some(Value::String(_)), Some(_)) => {
            return Err(ObjectError::new(format!("{at}.endPort"), "needs a port that is a number"));
        }
        (Some(first), None) => {
            let first = number(&format!("{at}.port"), first)?;
            PortMatch::Range(first, first)
        }
        (Some(first), Some(last)) => {
            let first = number(&format!("{at}.port"), first)?;
            let end_at = format!("{at}.endPort");
            let last = number(&end_at, last)?;
            if last < first {
                return Err(ObjectError::new(end_at, format!("{last} is less than the port, {first}")));
            }
            PortMatch::Range(first, last)
        }
    })
}

#[cfg(test)]
#[path = "networkpolicy/tests.rs"]
mod tests;
