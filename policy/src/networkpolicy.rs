//! Kubernetes' NetworkPolicy (networking.k8s.io/v1), from manifest to [`Policy`].
//!
//! What the API server would fill in is filled in here, since files have not been through one; what it would refuse is refused, and
//! then fails closed: the policy isolates what it selects and allows nothing.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::calico;
use crate::field::{
    Faults, Result, directions, known, list, net, number, object, port_name, selector, shown,
};
use crate::model::{
    Action, Block, Direction, Namespaces, ObjectId, Order, Peer, PodSelector, Policy, Port, PortMatch, Reach,
    Rule, Subject, Tier,
};
use crate::object::{Key, ObjectError};
use crate::protocol::Protocol;

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
}

impl From<Policy> for Read {
    /// One that nothing is wrong with.
    fn from(policy: Policy) -> Self {
        Self { policy, fault: None, more: Vec::new() }
    }
}

/// What people are told of a policy that was refused, or of which a part was: why, and what it does until that is mended.
pub fn refusal(policy: &Policy, fault: &ObjectError) -> String {
    format!("{}: {fault}; until it is mended, {}", policy.id, meanwhile(policy))
}

/// What a policy does of which something was refused.
pub(crate) fn meanwhile(policy: &Policy) -> &'static str {
    let isolates = [KIND, calico::STAGED_KUBERNETES].contains(&policy.id.kind);
    match (isolates, policy.egress.is_some() || policy.ingress.is_some()) {
        _ if policy.staged => "what it would do is not told in full",
        (true, _) => "it isolates what it selects and allows nothing",
        (false, true) => "such a rule accepts nothing, or denies all",
        (false, false) => "it counts for nothing",
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
    let mut faults = Faults { first: shape, more: Vec::new() };
    if object.pointer("/metadata/name").and_then(Value::as_str).is_none_or(str::is_empty) {
        faults.note(ObjectError::new("metadata.name", "a policy needs one"));
    }
    faults.keep(known("spec", spec, &["podSelector", "policyTypes", "ingress", "egress"]));
    // What it selects is not known: everything that it may.
    let pods =
        faults.keep(selector("spec.podSelector", spec.get("podSelector"))).flatten().unwrap_or_default();
    let egress = faults.keep(rules(spec, Direction::Egress, &key.namespace));
    let ingress = faults.keep(rules(spec, Direction::Ingress, &key.namespace));
    let has_egress = egress.as_ref().is_none_or(|rules| !rules.is_empty());
    let types = faults.keep(types(spec.get("policyTypes"))).unwrap_or(Some(Direction::BOTH.into()));
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
    Read { policy, fault: faults.first, more: faults.more }
}

fn types(value: Option<&Value>) -> Result<Option<BTreeSet<Direction>>> {
    let at = "spec.policyTypes";
    match list(at, value)?.len() {
        0..=2 => directions(at, value),
        _ => Err(ObjectError::new(at, "has more than two entries")),
    }
}

fn rules(spec: &Map<String, Value>, direction: Direction, namespace: &str) -> Result<Vec<Rule>> {
    let field = direction.as_str();
    let side = if direction == Direction::Ingress { "from" } else { "to" };
    let entries = list(&format!("spec.{field}"), spec.get(field))?.iter().enumerate();
    let rules = entries.map(|(index, entry)| {
        let name = format!("{field}[{index}]");
        let at = format!("spec.{name}");
        let rule = object(&at, entry, &[side, "ports"])?;
        let peers_at = format!("{at}.{side}");
        let peers = list(&peers_at, rule.get(side))?.iter().enumerate();
        let peers = peers.map(|(index, entry)| peer(&format!("{peers_at}[{index}]"), entry, namespace));
        let ports_at = format!("{at}.ports");
        let ports = list(&ports_at, rule.get("ports"))?.iter().enumerate();
        let ports = ports.map(|(index, entry)| port(&format!("{ports_at}[{index}]"), entry));
        let peers: BTreeSet<Peer> = peers.collect::<Result<_>>()?;
        let ports: BTreeSet<Port> = ports.collect::<Result<_>>()?;
        let peers = Some(peers).filter(|peers| !peers.is_empty());
        let ports = Some(ports).filter(|ports| !ports.is_empty());
        let entries = ports.as_ref().map_or(1, BTreeSet::len);
        Ok((Rule::between(name, Action::Allow, direction, peers, ports), entries))
    });
    let (rules, entries): (Vec<Rule>, Vec<usize>) = rules.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let entries: usize = entries.into_iter().sum();
    if entries > ENTRIES_MOST {
        let reason = format!("has {entries} rules, or ports of rules; at most {ENTRIES_MOST} in one policy");
        return Err(ObjectError::new(format!("spec.{field}"), reason));
    }
    Ok(rules)
}

fn peer(at: &str, value: &Value, namespace: &str) -> Result<Peer> {
    let peer = object(at, value, &["podSelector", "namespaceSelector", "ipBlock"])?;
    let pods = selector(&format!("{at}.podSelector"), peer.get("podSelector"))?;
    let namespaces = selector(&format!("{at}.namespaceSelector"), peer.get("namespaceSelector"))?;
    match (peer.get("ipBlock").filter(|value| !value.is_null()), pods, namespaces) {
        (Some(value), None, None) => block(&format!("{at}.ipBlock"), value).map(Peer::Block),
        (Some(_), ..) => {
            Err(ObjectError::new(at, "ipBlock stands alone: move the selectors to an entry of their own"))
        }
        (None, None, None) => {
            Err(ObjectError::new(at, "selects nothing: name podSelector, namespaceSelector or ipBlock"))
        }
        (None, pods, namespaces) => Ok(Peer::Pods(PodSelector::new(
            namespaces.map_or_else(|| Namespaces::Named(namespace.to_owned()), Namespaces::Selected),
            pods.unwrap_or_default(),
        ))),
    }
}

fn block(at: &str, value: &Value) -> Result<Block> {
    let block = object(at, value, &["cidr", "except"])?;
    let cidr = net(&format!("{at}.cidr"), block.get("cidr").unwrap_or(&Value::Null))?;
    let except_at = format!("{at}.except");
    let except = list(&except_at, block.get("except"))?.iter().enumerate().map(|(index, entry)| {
        let at = format!("{except_at}[{index}]");
        let inner = net(&at, entry)?;
        if cidr.contains(&inner) && cidr != inner {
            Ok(inner)
        } else {
            Err(ObjectError::new(at, format!("{inner} does not lie inside of {cidr}")))
        }
    });
    Ok(Block { net: cidr, except: except.collect::<Result<_>>()? })
}

fn port(at: &str, value: &Value) -> Result<Port> {
    let entry = object(at, value, &["protocol", "port", "endPort"])?;
    let protocol = match entry.get("protocol") {
        None | Some(Value::Null) => Protocol::TCP,
        Some(value) => match value.as_str() {
            Some("TCP") => Protocol::TCP,
            Some("UDP") => Protocol::UDP,
            Some("SCTP") => Protocol::SCTP,
            _ => {
                let reason = format!("{:?}; use TCP, UDP or SCTP", shown(value));
                return Err(ObjectError::new(format!("{at}.protocol"), reason));
            }
        },
    };
    let port = entry.get("port").filter(|value| !value.is_null());
    let end = entry.get("endPort").filter(|value| !value.is_null());
    let ports = match (port, end) {
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
    };
    Ok(Port { protocol, ports })
}

#[cfg(test)]
#[path = "networkpolicy/tests.rs"]
mod tests;
