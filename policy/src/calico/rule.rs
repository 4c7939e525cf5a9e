//! One rule of Calico's, as conditions.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::selector;
use crate::field::{Faults, Result, net, port_name, shown};
use crate::model::{
    Action, Block, Condition, Direction, Icmp, Labels, Namespaces, NetworkSelector, Peer, PodSelector, Port,
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

/// Reads a rule; `None`: something is wrong with it, and noted.
pub(super) fn rule(name: &str, entry: &Value, place: Place<'_>, faults: &mut Faults) -> Option<Rule> {
    let at = format!("spec.{name}");
    let before = faults.seen();
    let rule = faults.object(&at, entry, &FIELDS)?;
    let action = action(entry);
    if action.is_none() {
        let said = shown(rule.get("action").unwrap_or(&Value::Null));
        let reason = format!("{said:?}; use Allow, Deny, Pass or Log");
        faults.note(ObjectError::new(format!("{at}.action"), reason));
    }
    if is_there(rule.get("http")).is_some() {
        faults.note(ObjectError::new(format!("{at}.http"), "what is inside of HTTP is not looked at"));
    }
    let mut when = BTreeSet::new();
    if let Some(value) = is_there(rule.get("ipVersion")) {
        match value.as_u64() {
            Some(4) => drop(when.insert(Condition::Family(Family::V4))),
            Some(6) => drop(when.insert(Condition::Family(Family::V6))),
            _ => {
                let reason = format!("{:?}; use 4 or 6", shown(value));
                faults.note(ObjectError::new(format!("{at}.ipVersion"), reason));
            }
        }
    }
    let protocol = protocol(&format!("{at}.protocol"), rule.get("protocol"), faults);
    when.extend(protocol.known().map(Condition::Protocol));
    let not = self::protocol(&format!("{at}.notProtocol"), rule.get("notProtocol"), faults);
    when.extend(not.known().map(Condition::NotProtocol));
    for (field, made) in [("icmp", Condition::Icmp as fn(Icmp) -> Condition), ("notICMP", Condition::NotIcmp)]
    {
        when.extend(message(&format!("{at}.{field}"), rule.get(field), protocol, faults).map(made));
    }
    for side in [Side::Source, Side::Destination] {
        let field = side.as_str();
        if let Some(value) = rule.get(field).filter(|value| !value.is_null()) {
            when.extend(entity(&format!("{at}.{field}"), value, side, protocol, place, faults));
        }
    }
    let action = action.filter(|_| faults.seen() == before)?;
    Some(Rule { name: name.to_owned(), action, when })
}

/// The protocol that a rule names, if any.
#[derive(Clone, Copy)]
enum Spoken {
    Nothing,
    Of(Protocol),
    /// It is not understood.
    Unclear,
}

impl Spoken {
    fn known(self) -> Option<Protocol> {
        match self {
            Self::Of(protocol) => Some(protocol),
            Self::Nothing | Self::Unclear => None,
        }
    }
}

fn protocol(at: &str, value: Option<&Value>, faults: &mut Faults) -> Spoken {
    let Some(value) = is_there(value) else { return Spoken::Nothing };
    let known = match value {
        Value::Number(number) => number.as_u64().and_then(|number| u8::try_from(number).ok()).map(Protocol),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    // Zero is no protocol in Calico.
    match known.filter(|protocol| protocol.0 > 0) {
        Some(protocol) => Spoken::Of(protocol),
        None => {
            let names = "use TCP, UDP, ICMP, ICMPv6, SCTP, UDPLite or a number from 1 to 255";
            faults.note(ObjectError::new(at, format!("{:?}; {names}", shown(value))));
            Spoken::Unclear
        }
    }
}

fn message(at: &str, value: Option<&Value>, protocol: Spoken, faults: &mut Faults) -> Option<Icmp> {
    let value = is_there(value)?;
    let is_of = |family: &Family| protocol.known() == Some(Protocol::icmp(*family));
    let family = Family::BOTH.into_iter().find(is_of);
    if family.is_none() && !matches!(protocol, Spoken::Unclear) {
        faults.note(ObjectError::new(at, "needs protocol ICMP or ICMPv6 beside it"));
    }
    let fields = faults.object(at, value, &["type", "code"])?;
    let mut octet = |field: &str| {
        let value = fields.get(field).filter(|value| !value.is_null())?;
        let number = value.as_u64().and_then(|number| u8::try_from(number).ok());
        if number.is_none() {
            faults.note(ObjectError::new(format!("{at}.{field}"), "is no number from 0 to 255"));
        }
        Some(number)
    };
    match (octet("type"), octet("code")) {
        (Some(kind), code) => Some(Icmp { family: family?, kind: kind?, code: code.flatten() }),
        (None, _) => {
            faults.note(ObjectError::new(format!("{at}.type"), "is needed beside a code"));
            None
        }
    }
}

/// The family of these prefixes, where all are of one.
fn only_family(nets: &BTreeSet<IpNet>) -> Option<Family> {
    let mut families = nets.iter().map(|net| Family::of(net.addr()));
    let first = families.next()?;
    families.all(|family| family == first).then_some(first)
}

fn entity(
    at: &str,
    value: &Value,
    side: Side,
    protocol: Spoken,
    place: Place<'_>,
    faults: &mut Faults,
) -> Vec<Condition> {
    let Some(entity) = faults.object(at, value, &ENTITY) else { return Vec::new() };
    let mut all = Vec::new();
    if let Some(value) = entity.get("services").filter(|value| !value.is_null()) {
        all.extend(service(at, value, entity, side, place, faults));
    }
    for (field, made) in
        [("nets", Condition::Is as fn(Side, BTreeSet<Peer>) -> Condition), ("notNets", Condition::IsNot)]
    {
        let nets = faults.each(&format!("{at}.{field}"), entity.get(field), |faults, at, entry| {
            faults.keep(net(at, entry))
        });
        let nets: BTreeSet<IpNet> = nets.into_iter().collect();
        // Of the family of which its lists know nothing the rule is not there: it would be another one, without them.
        all.extend(only_family(&nets).map(Condition::Family));
        let blocks = nets.into_iter().map(|net| Peer::Block(Block { net, except: Vec::new() }));
        let blocks: BTreeSet<Peer> = blocks.collect();
        all.extend((!blocks.is_empty()).then(|| made(side, blocks)));
    }
    all.extend(selected(at, entity, place.namespace, faults).map(|peers| Condition::Is(side, peers)));
    let not_at = format!("{at}.notSelector");
    if let Some(not) = faults.keep(expression(&not_at, entity.get("notSelector"), false)).flatten() {
        let anywhere = Namespaces::Selected(LabelSelector::default());
        let pods = Peer::Pods(PodSelector::new(anywhere, not.selector.clone()));
        let networks = Peer::Networks(NetworkSelector { scope: Scope::Any, labels: not.selector });
        all.push(Condition::IsNot(side, [pods, networks].into()));
    }
    for (field, positive) in [("ports", true), ("notPorts", false)] {
        all.extend(ports(
            &format!("{at}.{field}"),
            entity.get(field),
            positive,
            side,
            protocol,
            place,
            faults,
        ));
    }
    all
}

/// Ports that an end has, or has not. Names alone need no protocol: they mean the port of that name, whatever its protocol is.
fn ports(
    at: &str,
    value: Option<&Value>,
    positive: bool,
    side: Side,
    protocol: Spoken,
    place: Place<'_>,
    faults: &mut Faults,
) -> Option<Condition> {
    let ports = faults.each(at, value, |faults, at, entry| faults.keep(port(at, entry)));
    let ports: BTreeSet<PortMatch> = ports.into_iter().collect();
    if ports.is_empty() {
        return None;
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
        faults.note(ObjectError::new(at, reason));
    }
    if !positive && names > NOT_NAMES_MOST {
        faults.note(ObjectError::new(at, format!("has {names} names; at most {NOT_NAMES_MOST}")));
    }
    match protocol {
        Spoken::Unclear => None,
        Spoken::Of(protocol) if protocol.has_ports() => Some(match positive {
            true => {
                let ports = ports.into_iter().map(|ports| Port { protocol, ports });
                Condition::Ports(side, ports.collect())
            }
            false => Condition::NotPorts(side, Some(protocol), ports),
        }),
        Spoken::Nothing if names == ports.len() => Some(match positive {
            true => {
                let of = |protocol| ports.iter().map(move |ports| Port { protocol, ports: ports.clone() });
                Condition::Ports(side, Protocol::WITH_PORTS.into_iter().flat_map(of).collect())
            }
            false => Condition::NotPorts(side, None, ports),
        }),
        Spoken::Nothing => {
            let reason = "needs protocol TCP, UDP or SCTP beside source and destination, since it has numbers; names alone need none";
            faults.note(ObjectError::new(at, reason));
            None
        }
        Spoken::Of(_) => {
            let reason = "needs protocol TCP, UDP or SCTP beside source and destination";
            faults.note(ObjectError::new(at, reason));
            None
        }
    }
}

/// The endpoints of a Service: as what they serve of what is begun, as who they are of who begins.
fn service(
    at: &str,
    value: &Value,
    entity: &Map<String, Value>,
    side: Side,
    place: Place<'_>,
    faults: &mut Faults,
) -> Option<Condition> {
    let field = format!("{at}.services");
    let service = faults.object(&field, value, &["name", "namespace"])?;
    if side != Side::other(place.direction) {
        let reason = format!("a Service is at the other end: the {}", Side::other(place.direction).as_str());
        faults.note(ObjectError::new(&field, reason));
    }
    if place.reach == Reach::Untracked && side == Side::Destination {
        let reason = "what a Service serves is known of connections: not with doNotTrack";
        faults.note(ObjectError::new(&field, reason));
    }
    // Which ports they serve on, they say.
    let ports = ["ports", "notPorts"].into_iter().filter(|_| side == Side::Destination);
    let others = ["nets", "notNets", "selector", "notSelector", "namespaceSelector", "serviceAccounts"];
    for other in others.into_iter().chain(ports).filter(|other| is_there(entity.get(*other)).is_some()) {
        let reason = format!("stands alone in {}: not beside services", side.as_str());
        faults.note(ObjectError::new(format!("{at}.{other}"), reason));
    }
    let mut text = |name: &str| {
        let value = service.get(name).filter(|value| !value.is_null())?;
        let text = value.as_str();
        if text.is_none() {
            faults.note(ObjectError::new(format!("{field}.{name}"), "is no text"));
        }
        text.filter(|text| !text.is_empty())
    };
    let (name, namespace) = (text("name"), text("namespace").or(place.namespace));
    if name.is_none() {
        faults.note(ObjectError::new(format!("{field}.name"), "it needs one"));
    }
    if namespace.is_none() {
        let reason = "a policy of no namespace has to say which";
        faults.note(ObjectError::new(format!("{field}.namespace"), reason));
    }
    let key = Key { namespace: namespace?.to_owned(), name: name?.to_owned() };
    Some(match side {
        Side::Source => Condition::Is(side, [Peer::Service(key)].into()),
        Side::Destination => Condition::Serves(key),
    })
}

/// Whom selector, namespaceSelector and serviceAccounts mean together; `None`: nothing is said.
fn selected(
    at: &str,
    entity: &Map<String, Value>,
    namespace: Option<&str>,
    faults: &mut Faults,
) -> Option<BTreeSet<Peer>> {
    let own = faults.keep(expression(&format!("{at}.selector"), entity.get("selector"), false)).flatten();
    let namespaces_at = format!("{at}.namespaceSelector");
    let namespaces = faults.keep(expression(&namespaces_at, entity.get("namespaceSelector"), true)).flatten();
    let accounts_at = format!("{at}.serviceAccounts");
    let accounts = is_there(entity.get("serviceAccounts"));
    let accounts = accounts.map(|value| accounts_of(&accounts_at, value, faults));
    let says_whom_not = is_there(entity.get("notSelector")).is_some();
    if own.is_none() && namespaces.is_none() && accounts.is_none() && !(says_whom_not && namespace.is_some())
    {
        return None;
    }
    let labels = own.map(|expression| expression.selector).unwrap_or_default();
    let (scope, pods_of) = match (namespaces, namespace) {
        (Some(expression), _) if expression.global => (Scope::Global, None),
        (Some(expression), _) => {
            let namespaces = Namespaces::Selected(expression.selector);
            // What is said of labels that a namespace has not is true of what has no namespace.
            let scope = match expression.bare {
                true => {
                    faults.hint(ObjectError::new(namespaces_at, BARE_NAMESPACE));
                    Scope::InOrNone(namespaces.clone())
                }
                false => Scope::In(namespaces.clone()),
            };
            (scope, Some(namespaces))
        }
        (None, Some(namespace)) => {
            let namespaces = Namespaces::Named(namespace.to_owned());
            (Scope::In(namespaces.clone()), Some(namespaces))
        }
        (None, None) => (Scope::Any, Some(Namespaces::Selected(LabelSelector::default()))),
    };
    let mut peers = BTreeSet::new();
    let (names, by_labels) = accounts.unwrap_or_default();
    // No network has an account, nor any label of one.
    let means_networks =
        names.is_none() && by_labels.as_ref().is_none_or(|labels| labels.matches(&Labels::new()));
    if means_networks {
        if by_labels.is_some() {
            faults.hint(ObjectError::new(format!("{accounts_at}.selector"), BARE_ACCOUNT));
        }
        peers.insert(Peer::Networks(NetworkSelector { scope, labels: labels.clone() }));
    }
    if let Some(namespaces) = pods_of {
        let names = names.map(|names| Requirement::In(ACCOUNT.to_owned(), names));
        let pods = LabelSelector::of(labels.into_requirements().chain(names));
        peers.insert(Peer::Pods(PodSelector { namespaces, pods, accounts: by_labels }));
    }
    Some(peers)
}

/// The hint for a namespace selector that also matches objects without a namespace.
pub(super) const BARE_NAMESPACE: &str = "as in Calico, it also means what has no namespace: global network sets and host endpoints; \"has(projectcalico.org/name) && (...)\" means pods alone";
/// The same of service accounts.
pub(super) const BARE_ACCOUNT: &str = "as in Calico, it also means what has no service account: network sets and host endpoints; \"has(projectcalico.org/name) && (...)\" means pods alone";

type Accounts = (Option<BTreeSet<String>>, Option<LabelSelector>);

fn accounts_of(at: &str, value: &Value, faults: &mut Faults) -> Accounts {
    let Some(accounts) = faults.object(at, value, &["names", "selector"]) else { return Accounts::default() };
    let names = faults.each(&format!("{at}.names"), accounts.get("names"), |faults, at, name| {
        let name = name.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        faults.keep(name.ok_or_else(|| ObjectError::new(at, "is no name")))
    });
    let names: BTreeSet<String> = names.into_iter().collect();
    let selector = faults.keep(expression(&format!("{at}.selector"), accounts.get("selector"), false));
    let selector = selector.flatten().map(|expression| expression.selector);
    (Some(names).filter(|names| !names.is_empty()), selector)
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
