//! One rule of Calico's, as conditions.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::selector;
use crate::field::{Result, list, net, object, port_name, shown};
use crate::model::{
    Action, Block, Condition, Direction, Icmp, Namespaces, NetworkSelector, Peer, PodSelector, Port,
    PortMatch, Reach, Rule, Scope, Side,
};
use crate::object::{ACCOUNT, Key, ObjectError};
use crate::protocol::{Family, Protocol};
use crate::selector::{LabelSelector, Requirement};

const FIELDS: [&str; 10] = [
    "action",
    "ipVersion",
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "source",
    "destination",
    "http",
    "metadata",
];
const ENTITY: [&str; 9] = [
    "nets",
    "notNets",
    "selector",
    "notSelector",
    "namespaceSelector",
    "ports",
    "notPorts",
    "serviceAccounts",
    "services",
];

/// The most names in a list of ports that do not match: all of them are conditions of one rule.
const NOT_NAMES_MOST: usize = 8;

fn is_there(value: Option<&Value>) -> Option<&Value> {
    value.filter(|value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    })
}

/// What a rule does, if that is understood.
pub(super) fn action(entry: &Value) -> Option<Action> {
    match entry.get("action").and_then(Value::as_str) {
        Some("Allow") => Some(Action::Allow),
        Some("Deny") => Some(Action::Deny),
        Some("Pass") => Some(Action::Pass),
        Some("Log") => Some(Action::Log),
        _ => None,
    }
}

/// Where a rule stands.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    /// The namespace of its policy, if that has one.
    pub(super) namespace: Option<&'a str>,
    pub(super) direction: Direction,
    /// What its policy judges.
    pub(super) reach: Reach,
}

/// Reads a rule.
pub(super) fn rule(name: &str, entry: &Value, place: Place<'_>) -> Result<Rule> {
    let at = format!("spec.{name}");
    let rule = object(&at, entry, &FIELDS)?;
    let action = action(entry).ok_or_else(|| {
        let said = shown(rule.get("action").unwrap_or(&Value::Null));
        ObjectError::new(format!("{at}.action"), format!("{said:?}; use Allow, Deny, Pass or Log"))
    })?;
    if is_there(rule.get("http")).is_some() {
        return Err(ObjectError::new(format!("{at}.http"), "what is inside of HTTP is not looked at"));
    }
    let mut when = BTreeSet::new();
    if let Some(value) = is_there(rule.get("ipVersion")) {
        when.insert(Condition::Family(match value.as_u64() {
            Some(4) => Family::V4,
            Some(6) => Family::V6,
            _ => {
                let reason = format!("{:?}; use 4 or 6", shown(value));
                return Err(ObjectError::new(format!("{at}.ipVersion"), reason));
            }
        }));
    }
    let protocol = protocol(&format!("{at}.protocol"), rule.get("protocol"))?;
    when.extend(protocol.map(Condition::Protocol));
    let not = self::protocol(&format!("{at}.notProtocol"), rule.get("notProtocol"))?;
    when.extend(not.map(Condition::NotProtocol));
    for (field, made) in [("icmp", Condition::Icmp as fn(Icmp) -> Condition), ("notICMP", Condition::NotIcmp)]
    {
        when.extend(message(&format!("{at}.{field}"), rule.get(field), protocol)?.map(made));
    }
    for side in [Side::Source, Side::Destination] {
        let field = side.as_str();
        if let Some(value) = rule.get(field).filter(|value| !value.is_null()) {
            when.extend(entity(&format!("{at}.{field}"), value, side, protocol, place)?);
        }
    }
    Ok(Rule { name: name.to_owned(), action, when })
}

fn protocol(at: &str, value: Option<&Value>) -> Result<Option<Protocol>> {
    let Some(value) = is_there(value) else { return Ok(None) };
    let known = match value {
        Value::Number(number) => number.as_u64().and_then(|number| u8::try_from(number).ok()).map(Protocol),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    // Zero is no protocol in Calico.
    known.filter(|protocol| protocol.0 > 0).map(Some).ok_or_else(|| {
        let names = "use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255";
        ObjectError::new(at, format!("{:?}; {names}", shown(value)))
    })
}

fn message(at: &str, value: Option<&Value>, protocol: Option<Protocol>) -> Result<Option<Icmp>> {
    let Some(value) = is_there(value) else { return Ok(None) };
    let family = Family::BOTH.into_iter().find(|family| protocol == Some(Protocol::icmp(*family)));
    let family = family.ok_or_else(|| ObjectError::new(at, "needs protocol ICMP or ICMPv6 beside it"))?;
    let fields = object(at, value, &["type", "code"])?;
    let octet = |field: &str| match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let number = value.as_u64().and_then(|number| u8::try_from(number).ok());
            let wrong = || ObjectError::new(format!("{at}.{field}"), "is no number from 0 to 255");
            number.map(Some).ok_or_else(wrong)
        }
    };
    match (octet("type")?, octet("code")?) {
        (Some(kind), code) => Ok(Some(Icmp { family, kind, code })),
        (None, _) => Err(ObjectError::new(format!("{at}.type"), "is needed beside a code")),
    }
}

fn entity(
    at: &str,
    value: &Value,
    side: Side,
    protocol: Option<Protocol>,
    place: Place<'_>,
) -> Result<Vec<Condition>> {
    let entity = object(at, value, &ENTITY)?;
    let mut all = Vec::new();
    if let Some(value) = entity.get("services").filter(|value| !value.is_null()) {
        all.push(service(at, value, entity, side, place)?);
    }
    let blocks = |field: &str| -> Result<Option<BTreeSet<Peer>>> {
        let at = format!("{at}.{field}");
        let entries = list(&at, entity.get(field))?.iter().enumerate();
        let blocks = entries.map(|(index, entry)| {
            let net = net(&format!("{at}[{index}]"), entry)?;
            Ok(Peer::Block(Block { net, except: Vec::new() }))
        });
        let blocks: BTreeSet<Peer> = blocks.collect::<Result<_>>()?;
        Ok(Some(blocks).filter(|blocks| !blocks.is_empty()))
    };
    all.extend(blocks("nets")?.map(|blocks| Condition::Is(side, blocks)));
    all.extend(blocks("notNets")?.map(|blocks| Condition::IsNot(side, blocks)));
    all.extend(selected(at, entity, place.namespace)?.map(|peers| Condition::Is(side, peers)));
    if let Some(not) = expression(&format!("{at}.notSelector"), entity.get("notSelector"), false)? {
        let anywhere = Namespaces::Selected(LabelSelector::default());
        let pods = Peer::Pods(PodSelector::new(anywhere, not.selector.clone()));
        let networks = Peer::Networks(NetworkSelector { scope: Scope::Any, labels: not.selector });
        all.push(Condition::IsNot(side, [pods, networks].into()));
    }
    for (field, positive) in [("ports", true), ("notPorts", false)] {
        let at = format!("{at}.{field}");
        let ports = list(&at, entity.get(field))?.iter().enumerate();
        let ports = ports.map(|(index, entry)| port(&format!("{at}[{index}]"), entry));
        let ports: BTreeSet<PortMatch> = ports.collect::<Result<_>>()?;
        if ports.is_empty() {
            continue;
        }
        let names = ports.iter().filter(|port| matches!(port, PortMatch::Named(_))).count();
        let nameless = match place.reach {
            Reach::Ends | Reach::Forwarded => None,
            Reach::BeforeNat if side == Side::Source => None,
            Reach::BeforeNat => Some("preDNAT"),
            Reach::Untracked => Some("doNotTrack"),
        };
        if let Some(flag) = nameless.filter(|_| names > 0) {
            let reason = format!("has names, which are of ports of connections: {flag} needs numbers");
            return Err(ObjectError::new(&at, reason));
        }
        if !positive && names > NOT_NAMES_MOST {
            return Err(ObjectError::new(&at, format!("has {names} names; at most {NOT_NAMES_MOST}")));
        }
        let protocol = protocol.filter(|protocol| protocol.has_ports()).ok_or_else(|| {
            ObjectError::new(&at, "needs protocol TCP, UDP or SCTP beside source and destination")
        })?;
        all.push(match positive {
            true => {
                let ports = ports.into_iter().map(|ports| Port { protocol, ports });
                Condition::Ports(side, ports.collect())
            }
            false => Condition::NotPorts(side, protocol, ports),
        });
    }
    Ok(all)
}

/// The endpoints of a Service: as what they serve of what is begun, as who they are of who begins.
fn service(
    at: &str,
    value: &Value,
    entity: &Map<String, Value>,
    side: Side,
    place: Place<'_>,
) -> Result<Condition> {
    let field = format!("{at}.services");
    let service = object(&field, value, &["name", "namespace"])?;
    if side != Side::other(place.direction) {
        let reason = format!("a Service is at the other end: the {}", Side::other(place.direction).as_str());
        return Err(ObjectError::new(field, reason));
    }
    if place.reach == Reach::Untracked && side == Side::Destination {
        let reason = "what a Service serves is known of connections: not with doNotTrack";
        return Err(ObjectError::new(field, reason));
    }
    // Which ports they serve on, they say.
    let ports = ["ports", "notPorts"].into_iter().filter(|_| side == Side::Destination);
    let others = ["nets", "notNets", "selector", "notSelector", "namespaceSelector", "serviceAccounts"];
    let other = others.into_iter().chain(ports).find(|other| is_there(entity.get(*other)).is_some());
    if let Some(other) = other {
        let reason = format!("stands alone in {}: not beside services", side.as_str());
        return Err(ObjectError::new(format!("{at}.{other}"), reason));
    }
    let text = |name: &str| match service.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_str() {
            Some(text) => Ok(Some(text).filter(|text| !text.is_empty())),
            None => Err(ObjectError::new(format!("{field}.{name}"), "is no text")),
        },
    };
    let name = text("name")?.ok_or_else(|| ObjectError::new(format!("{field}.name"), "it needs one"))?;
    let namespace = text("namespace")?.or(place.namespace);
    let namespace = namespace.ok_or_else(|| {
        ObjectError::new(format!("{field}.namespace"), "a policy of no namespace has to say which")
    })?;
    let key = Key { namespace: namespace.to_owned(), name: name.to_owned() };
    Ok(match side {
        Side::Source => Condition::Is(side, [Peer::Service(key)].into()),
        Side::Destination => Condition::Serves(key),
    })
}

/// Whom selector, namespaceSelector and serviceAccounts mean together; `None`: nothing is said.
fn selected(
    at: &str,
    entity: &Map<String, Value>,
    namespace: Option<&str>,
) -> Result<Option<BTreeSet<Peer>>> {
    let own = expression(&format!("{at}.selector"), entity.get("selector"), false)?;
    let namespaces = expression(&format!("{at}.namespaceSelector"), entity.get("namespaceSelector"), true)?;
    let accounts_at = format!("{at}.serviceAccounts");
    let accounts = match is_there(entity.get("serviceAccounts")) {
        None => None,
        Some(value) => Some(accounts(&accounts_at, value)?),
    };
    let says_whom_not = is_there(entity.get("notSelector")).is_some();
    if own.is_none() && namespaces.is_none() && accounts.is_none() && !(says_whom_not && namespace.is_some())
    {
        return Ok(None);
    }
    let labels = own.map(|expression| expression.selector).unwrap_or_default();
    let (scope, pods_of) = match (namespaces, namespace) {
        (Some(expression), _) if expression.global => (Scope::Global, None),
        (Some(expression), _) => {
            let namespaces = Namespaces::Selected(expression.selector);
            (Scope::In(namespaces.clone()), Some(namespaces))
        }
        (None, Some(namespace)) => {
            let namespaces = Namespaces::Named(namespace.to_owned());
            (Scope::In(namespaces.clone()), Some(namespaces))
        }
        (None, None) => (Scope::Any, Some(Namespaces::Selected(LabelSelector::default()))),
    };
    let mut peers = BTreeSet::new();
    let (names, by_labels) = accounts.unwrap_or_default();
    let asks_for_account = names.is_some() || by_labels.is_some();
    // No network has an account.
    if !asks_for_account {
        peers.insert(Peer::Networks(NetworkSelector { scope, labels: labels.clone() }));
    }
    if let Some(namespaces) = pods_of {
        let names = names.map(|names| Requirement::In(ACCOUNT.to_owned(), names));
        let pods = LabelSelector::of(labels.into_requirements().chain(names));
        peers.insert(Peer::Pods(PodSelector { namespaces, pods, accounts: by_labels }));
    }
    Ok(Some(peers))
}

type Accounts = (Option<BTreeSet<String>>, Option<LabelSelector>);

fn accounts(at: &str, value: &Value) -> Result<Accounts> {
    let accounts = object(at, value, &["names", "selector"])?;
    let names_at = format!("{at}.names");
    let names = list(&names_at, accounts.get("names"))?.iter().enumerate().map(|(index, name)| {
        let name = name.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        name.ok_or_else(|| ObjectError::new(format!("{names_at}[{index}]"), "is no name"))
    });
    let names: BTreeSet<String> = names.collect::<Result<_>>()?;
    let selector = expression(&format!("{at}.selector"), accounts.get("selector"), false)?;
    Ok((Some(names).filter(|names| !names.is_empty()), selector.map(|expression| expression.selector)))
}

/// A selector; empty is none at all.
pub(super) fn expression(
    at: &str,
    value: Option<&Value>,
    may_be_global: bool,
) -> Result<Option<selector::Expression>> {
    let Some(value) = is_there(value) else { return Ok(None) };
    let text = value.as_str().ok_or_else(|| ObjectError::new(at, "is no text"))?;
    if text.trim_matches([' ', '\t']).is_empty() {
        return Ok(None);
    }
    let expression =
        selector::parse(text).map_err(|error| ObjectError::new(at, format!("{text:.64?}: {error}")))?;
    if expression.global && !may_be_global {
        return Err(ObjectError::new(at, "global() goes into the namespaceSelector of a rule alone"));
    }
    // Calico has labels of namespaces and accounts among those of pods.
    let inherited = |key: &str| ["pcns.", "pcsa."].iter().any(|prefix| key.starts_with(prefix));
    let strange = expression.selector.keys().into_iter().find(|key| inherited(key)).map(str::to_owned);
    match strange {
        Some(key) => {
            let reason =
                format!("label {key:?}: labels of namespaces and accounts go into selectors of their own");
            Err(ObjectError::new(at, reason))
        }
        None => Ok(Some(expression)),
    }
}

fn port(at: &str, value: &Value) -> Result<PortMatch> {
    let wrong = || {
        let reason =
            format!("{:?}; use a port from 0 to 65535, a range such as \"80:90\", or a name", shown(value));
        ObjectError::new(at, reason)
    };
    let number = |text: &str| text.parse::<u16>().ok();
    match value {
        Value::Number(_) => {
            let number = number(&value.to_string()).ok_or_else(wrong)?;
            Ok(PortMatch::Range(number, number))
        }
        Value::String(text) => match text.split_once(':') {
            Some((first, last)) => match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => Ok(PortMatch::Range(first, last)),
                _ => Err(wrong()),
            },
            None if text.bytes().all(|byte| byte.is_ascii_digit()) => {
                let number = number(text).ok_or_else(wrong)?;
                Ok(PortMatch::Range(number, number))
            }
            None => port_name(at, text).map(PortMatch::Named),
        },
        _ => Err(wrong()),
    }
}
