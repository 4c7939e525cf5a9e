//! The cluster-wide ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2), from manifest to [`Policy`].
//!
//! A rule that is not understood fails closed, as the API asks: one that accepts matches nothing, one that denies or passes denies
//! everything; so does a list of rules that cannot be read. An object of which tier, priority or subject is not understood counts for nothing: whom to deny what is not known.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::field::{Faults, Result, list, net, number, object, one_of, port_name, required_selector, shown};
use crate::meshpolicy;
use crate::model::{
    Action, Block, Condition, Direction, Namespaces, ObjectId, Order, Peer, PodSelector, Policy, Port,
    PortMatch, Reach, Rule, Side, Subject, Tier,
};
use crate::names::Domain;
use crate::networkpolicy::Read;
use crate::object::ObjectError;
use crate::protocol::Protocol;
use crate::refusal::Outcome;
use crate::selector::LabelSelector;

/// The kind, as in manifests.
pub const KIND: &str = "ClusterNetworkPolicy";
/// The version that is read.
pub const API_VERSION: &str = "policy.networking.k8s.io/v1alpha2";
/// The most entries of each list, as the API has it.
const LIST_MOST: usize = 25;
/// The most characters of a rule's name, as the API has it.
const NAME_MOST: usize = 100;

/// Whose way of saying things a manifest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Kubernetes' own.
    Cluster,
    /// The mesh's, with sites.
    Mesh,
}

/// Reads a manifest.
pub fn read(manifest: &Value) -> Read {
    read_as(KIND, Dialect::Cluster, manifest)
}

pub(crate) fn read_as(kind: &'static str, dialect: Dialect, manifest: &Value) -> Read {
    let name = manifest.pointer("/metadata/name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let id = ObjectId { kind, namespace: None, name: name.unwrap_or("(unnamed)").to_owned() };
    let mut faults = Faults::default();
    if name.is_none() {
        faults.note(ObjectError::new("metadata.name", "a policy needs one"));
    }
    let policy = policy(&id, dialect, manifest, &mut faults);
    let is_of_rule = |fault: &ObjectError| {
        Direction::BOTH.iter().any(|one| fault.field.starts_with(&format!("spec.{}", one.as_str())))
    };
    let outcome = match &policy {
        None => Outcome::Nobody,
        Some(_) if faults.first.iter().chain(&faults.more).any(is_of_rule) => Outcome::Rules,
        Some(_) => Outcome::Rest,
    };
    let nothing = || Policy {
        tier: Tier::baseline(),
        order: Order(0.0),
        id,
        subject: Subject::Any(BTreeSet::new()),
        egress: None,
        ingress: None,
        reach: Reach::Ends,
        staged: false,
        replaces: None,
    };
    Read::of(policy.unwrap_or_else(nothing), faults, outcome)
}

/// `None`: whom it means, or where it stands, is not known.
fn policy(id: &ObjectId, dialect: Dialect, manifest: &Value, faults: &mut Faults) -> Option<Policy> {
    let Some(spec) = manifest.get("spec").and_then(Value::as_object) else {
        faults.note(ObjectError::new("spec", "is no object"));
        return None;
    };
    // One of a later version says something that is not done; the rest of it is.
    faults.known("spec", spec, &["tier", "priority", "subject", "ingress", "egress"]);
    let tier = match spec.get("tier").and_then(Value::as_str) {
        Some("Admin") => Some(Tier::admin()),
        Some("Baseline") => Some(Tier::baseline()),
        _ => {
            let said = shown(spec.get("tier").unwrap_or(&Value::Null));
            faults.note(ObjectError::new("spec.tier", format!("{said:?}; use Admin or Baseline")));
            None
        }
    };
    let priority = spec.get("priority").and_then(Value::as_u64).filter(|priority| *priority <= 1000);
    if priority.is_none() {
        let said = shown(spec.get("priority").unwrap_or(&Value::Null));
        faults.note(ObjectError::new("spec.priority", format!("{said:?}; use a number from 0 to 1000")));
    }
    let subject = match dialect {
        Dialect::Cluster => {
            let meant = one_of("spec.subject", spec.get("subject"), &["namespaces", "pods"]);
            let meant = meant.and_then(|(field, value)| pods(&format!("spec.subject.{field}"), field, value));
            meant.map(Subject::Pods)
        }
        Dialect::Mesh => meshpolicy::subject("spec.subject", spec.get("subject")),
    };
    let subject = faults.keep(subject);
    let egress = rules(spec, dialect, Direction::Egress, faults);
    let ingress = rules(spec, dialect, Direction::Ingress, faults);
    // Without rules of a direction it does not judge that.
    let judged = |rules: Vec<Rule>| Some(rules).filter(|rules| !rules.is_empty());
    Some(Policy {
        tier: tier?,
        order: Order(priority? as f64),
        id: id.clone(),
        subject: subject?,
        egress: judged(egress),
        ingress: judged(ingress),
        reach: Reach::Ends,
        staged: false,
        replaces: None,
    })
}

pub(crate) fn pods(at: &str, field: &str, value: &Value) -> Result<PodSelector> {
    if field == "namespaces" {
        let namespaces = Namespaces::Selected(required_selector(at, Some(value))?);
        return Ok(PodSelector::new(namespaces, LabelSelector::default()));
    }
    let fields = object(at, value, &["namespaceSelector", "podSelector"])?;
    let selector = |field: &str| required_selector(&format!("{at}.{field}"), fields.get(field));
    // The API's server fills in an empty one.
    let namespaces = match fields.get("namespaceSelector") {
        None => LabelSelector::default(),
        Some(_) => selector("namespaceSelector")?,
    };
    Ok(PodSelector::new(Namespaces::Selected(namespaces), selector("podSelector")?))
}

fn rules(
    spec: &Map<String, Value>,
    dialect: Dialect,
    direction: Direction,
    faults: &mut Faults,
) -> Vec<Rule> {
    let field = direction.as_str();
    let denial = |name: &str| Rule {
        name: name.chars().take(2 * NAME_MOST).collect(),
        action: Action::Deny,
        when: BTreeSet::new(),
    };
    let Some(entries) = faults.keep(short_list(&format!("spec.{field}"), spec.get(field))) else {
        return vec![denial(field)];
    };
    entries
        .iter()
        .enumerate()
        .flat_map(|(index, entry)| {
            let place = format!("{field}[{index}]");
            let name = entry.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
            let name = name.map_or_else(|| place.clone(), |name| format!("{place} {name}"));
            let action = match entry.get("action").and_then(Value::as_str) {
                Some("Accept") => Some(Action::Allow),
                Some("Deny") => Some(Action::Deny),
                Some("Pass") => Some(Action::Pass),
                _ => None,
            };
            let read = rule(&format!("spec.{place}"), entry, dialect, direction, action, faults);
            match (read, action) {
                (Some(alternatives), Some(action)) => {
                    alternatives.into_iter().map(|when| Rule { name: name.clone(), action, when }).collect()
                }
                (_, action) => {
                    (action != Some(Action::Allow)).then(|| denial(&name)).into_iter().collect::<Vec<_>>()
                }
            }
        })
        .collect()
}

/// What a rule asks for: one of these.
type Alternatives = Vec<BTreeSet<Condition>>;

fn rule(
    at: &str,
    entry: &Value,
    dialect: Dialect,
    direction: Direction,
    action: Option<Action>,
    faults: &mut Faults,
) -> Option<Alternatives> {
    let before = faults.seen();
    let side = if direction == Direction::Ingress { "from" } else { "to" };
    let rule = faults.object(at, entry, &["name", "action", side, "protocols"])?;
    if action.is_none() {
        let said = shown(rule.get("action").unwrap_or(&Value::Null));
        let reason = format!("{said:?}; use Accept, Deny or Pass");
        faults.note(ObjectError::new(format!("{at}.action"), reason));
    }
    match rule.get("name") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name.chars().count() <= NAME_MOST => {}
        Some(_) => {
            let reason = format!("is no text of at most {NAME_MOST} characters");
            faults.note(ObjectError::new(format!("{at}.name"), reason));
        }
    }
    let peers_at = format!("{at}.{side}");
    let entries = faults.keep(short_list(&peers_at, rule.get(side)));
    if entries.is_some_and(<[Value]>::is_empty) {
        faults.note(ObjectError::new(&peers_at, "names nobody; name all by namespaces: {}"));
    }
    let mut peers = BTreeSet::new();
    let mut apart: Alternatives = Vec::new();
    for (index, entry) in entries.into_iter().flatten().enumerate() {
        let at = format!("{peers_at}[{index}]");
        match dialect {
            Dialect::Cluster => {
                peers.extend(faults.keep(peer(&at, entry, dialect, direction)).into_iter().flatten());
            }
            Dialect::Mesh => match faults.keep(meshpolicy::peer(&at, entry, direction)) {
                Some(meshpolicy::Meant::Anywhere(meant)) => peers.extend(meant),
                Some(meshpolicy::Meant::InSites(conditions)) => apart.push(conditions),
                None => {}
            },
        }
    }
    let ports_at = format!("{at}.protocols");
    let mut ports = BTreeSet::new();
    let entries = faults.keep(short_list(&ports_at, rule.get("protocols"))).unwrap_or_default();
    for (index, entry) in entries.iter().enumerate() {
        ports.extend(faults.keep(protocol(&format!("{ports_at}[{index}]"), entry)).into_iter().flatten());
    }
    // Not all addresses of a name are ever known: to deny these would allow the others.
    if action != Some(Action::Allow) && peers.iter().any(|peer| matches!(peer, Peer::Domains(_))) {
        faults.note(ObjectError::new(&peers_at, "domainNames go with action Accept alone"));
    }
    let is_named = |port: &Port| matches!(port.ports, PortMatch::Named(_));
    let other = Side::other(direction);
    if !peers.is_empty() {
        apart.push([Condition::Is(other, peers)].into());
    }
    let of_pods = |condition: &Condition| match condition {
        Condition::Is(_, peers) => peers.iter().all(|peer| matches!(peer, Peer::Pods(_))),
        _ => false,
    };
    if ports.iter().any(is_named) && !apart.iter().all(|conditions| conditions.iter().any(of_pods)) {
        let reason = "destinationNamedPort goes with pods and namespaces alone: only pods name ports";
        faults.note(ObjectError::new(ports_at, reason));
    }
    if !ports.is_empty() {
        let ports = Condition::Ports(Side::Destination, ports);
        for conditions in &mut apart {
            conditions.insert(ports.clone());
        }
    }
    (faults.seen() == before).then_some(apart)
}

fn short_list<'a>(at: &str, value: Option<&'a Value>) -> Result<&'a [Value]> {
    let list = list(at, value)?;
    if list.len() > LIST_MOST {
        return Err(ObjectError::new(
            at,
            format!("has {} entries; at most {LIST_MOST} are allowed", list.len()),
        ));
    }
    Ok(list)
}

pub(crate) fn peer(at: &str, entry: &Value, dialect: Dialect, direction: Direction) -> Result<Vec<Peer>> {
    let fields: &[&str] = match direction {
        _ if dialect == Dialect::Mesh => &["namespaces", "pods", "nodes", "networks"],
        Direction::Egress => &["namespaces", "pods", "nodes", "networks", "domainNames"],
        Direction::Ingress => &["namespaces", "pods"],
    };
    let (field, value) = one_of(at, Some(entry), fields)?;
    let at = format!("{at}.{field}");
    match field {
        "nodes" => Ok(vec![Peer::Nodes(required_selector(&at, Some(value))?)]),
        "networks" => {
            let entries = short_list(&at, Some(value))?.iter().enumerate();
            let blocks = entries.map(|(index, entry)| {
                let net = net(&format!("{at}[{index}]"), entry)?;
                Ok(Peer::Block(Block { net, except: Vec::new() }))
            });
            let blocks: Vec<Peer> = blocks.collect::<Result<_>>()?;
            match blocks.is_empty() {
                true => Err(ObjectError::new(at, "names no network")),
                false => Ok(blocks),
            }
        }
        "domainNames" => {
            let entries = short_list(&at, Some(value))?.iter().enumerate();
            let domains = entries.map(|(index, entry)| {
                let domain = entry.as_str().unwrap_or_default().parse::<Domain>();
                domain.map_err(|error| ObjectError::new(format!("{at}[{index}]"), error.to_string()))
            });
            let domains: BTreeSet<Domain> = domains.collect::<Result<_>>()?;
            match domains.is_empty() {
                true => Err(ObjectError::new(at, "names no domain")),
                false => Ok(vec![Peer::Domains(domains)]),
            }
        }
        _ => Ok(vec![Peer::Pods(pods(&at, field, value)?)]),
    }
}

fn protocol(at: &str, entry: &Value) -> Result<Vec<Port>> {
    let (field, value) = one_of(at, Some(entry), &["tcp", "udp", "sctp", "destinationNamedPort"])?;
    let at = format!("{at}.{field}");
    let protocol = match field {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        _ => {
            let name = port_name(&at, value.as_str().unwrap_or_default())?;
            let named = |protocol| Port { protocol, ports: PortMatch::Named(name.clone()) };
            return Ok(Protocol::WITH_PORTS.into_iter().map(named).collect());
        }
    };
    let port = object(&at, value, &["destinationPort"])?.get("destinationPort");
    if port.is_none() {
        return Ok(vec![Port { protocol, ports: PortMatch::Any }]);
    }
    let at = format!("{at}.destinationPort");
    let (field, value) = one_of(&at, port, &["number", "range"])?;
    let at = format!("{at}.{field}");
    let ports = if field == "number" {
        let only = number(&at, value)?;
        PortMatch::Range(only, only)
    } else {
        let range = object(&at, value, &["start", "end"])?;
        let end = |field: &str| number(&format!("{at}.{field}"), range.get(field).unwrap_or(&Value::Null));
        let (first, last) = (end("start")?, end("end")?);
        if first >= last {
            return Err(ObjectError::new(
                at,
                format!("{first} to {last}: the end has to be behind the start"),
            ));
        }
        PortMatch::Range(first, last)
    };
    Ok(vec![Port { protocol, ports }])
}

#[cfg(test)]
#[path = "clusternetworkpolicy/tests.rs"]
mod tests;
