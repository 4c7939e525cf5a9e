//! Calico's policies by another reading: an evaluator that shares nothing with the one that is tested.
//!
//! It does as Calico does: labels of namespaces and accounts are labels of endpoints with a prefix, selectors are of all endpoints
//! alike, and each rule is looked at once for each version of IP, without the prefixes of the other.

pub mod random;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// A selector, of which the text is made.
#[derive(Debug, Clone)]
pub enum Selector {
    /// `all()`.
    All,
    /// `label == 'value'`.
    Is(&'static str, &'static str),
    /// `label != 'value'`.
    IsNot(&'static str, &'static str),
    /// `label in {...}`.
    In(&'static str, Vec<&'static str>),
    /// `label not in {...}`.
    NotIn(&'static str, Vec<&'static str>),
    /// `has(label)`.
    Has(&'static str),
    /// `!(...)`.
    Not(Box<Selector>),
    /// `(...) && (...)`.
    And(Box<Selector>, Box<Selector>),
    /// `(...) || (...)`.
    Or(Box<Selector>, Box<Selector>),
}

impl Selector {
    /// Returns the selector's text.
    pub fn text(&self) -> String {
        let list =
            |values: &[&str]| values.iter().map(|value| format!("'{value}'")).collect::<Vec<_>>().join(", ");
        match self {
            Self::All => "all()".to_owned(),
            Self::Is(label, value) => format!("{label} == '{value}'"),
            Self::IsNot(label, value) => format!("{label} != '{value}'"),
            Self::In(label, values) => format!("{label} in {{{}}}", list(values)),
            Self::NotIn(label, values) => format!("{label} not in {{{}}}", list(values)),
            Self::Has(label) => format!("has({label})"),
            Self::Not(inner) => format!("!({})", inner.text()),
            Self::And(one, two) => format!("({}) && ({})", one.text(), two.text()),
            Self::Or(one, two) => format!("({}) || ({})", one.text(), two.text()),
        }
    }

    /// Reports whether labels match the selector. `prefix` is put before its label names. `all` is
    /// the label that `all()` requires.
    fn meets(&self, labels: &Labels, prefix: &str, all: Option<&str>) -> bool {
        let value = |label: &str| labels.get(&format!("{prefix}{label}")).map(String::as_str);
        let inner = |one: &Self| one.meets(labels, prefix, all);
        match self {
            Self::All => all.is_none_or(|label| labels.contains_key(label)),
            Self::Is(label, wanted) => value(label) == Some(wanted),
            Self::IsNot(label, wanted) => value(label) != Some(wanted),
            Self::In(label, wanted) => value(label).is_some_and(|value| wanted.contains(&value)),
            Self::NotIn(label, wanted) => value(label).is_none_or(|value| !wanted.contains(&value)),
            Self::Has(label) => value(label).is_some(),
            Self::Not(one) => !inner(one),
            Self::And(one, two) => inner(one) && inner(two),
            Self::Or(one, two) => inner(one) || inner(two),
        }
    }
}

/// Labels of an endpoint, with those that it has by its namespace and account.
pub type Labels = BTreeMap<String, String>;

const NAMESPACE: &str = "projectcalico.org/namespace";
const ACCOUNT: &str = "projectcalico.org/serviceaccount";

/// Something with labels and addresses: a pod, a network set, a host endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The endpoint's labels, including inherited ones.
    pub labels: Labels,
    /// The endpoint's addresses.
    pub nets: Vec<IpNet>,
    /// The endpoint's named ports: name, protocol, number.
    pub ports: Vec<(&'static str, u8, u16)>,
    /// Policies are about it.
    pub is_pod: bool,
}

/// One end of a rule.
#[derive(Debug, Clone, Default)]
pub struct Entity {
    /// `nets` and `notNets`.
    pub nets: [Vec<IpNet>; 2],
    /// `selector`.
    pub selector: Option<Selector>,
    /// `notSelector`.
    pub not_selector: Option<Selector>,
    /// `namespaceSelector`; `Err`: `global()`.
    pub namespaces: Option<Result<Selector, ()>>,
    /// Names and selector of `serviceAccounts`.
    pub accounts: Option<(Vec<&'static str>, Option<Selector>)>,
    /// `ports` and `notPorts`: numbers from and to, or names.
    pub ports: [Vec<Port>; 2],
}

/// A port of a list.
#[derive(Debug, Clone)]
pub enum Port {
    /// From, to.
    Numbers(u16, u16),
    /// By name.
    Named(&'static str),
}

/// A rule.
#[derive(Debug, Clone)]
pub struct Rule {
    /// `Allow`, `Deny`, `Pass` or `Log`.
    pub action: &'static str,
    /// `ipVersion`.
    pub version: Option<u8>,
    /// `protocol`.
    pub protocol: Option<u8>,
    /// `notProtocol`.
    pub not_protocol: Option<u8>,
    /// Source and destination.
    pub ends: [Entity; 2],
}

/// A policy of the default tier.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The policy's namespace, or `None` if it is global.
    pub namespace: Option<&'static str>,
    /// The policy's name.
    pub name: String,
    /// The policy's order.
    pub order: u32,
    /// `selector`.
    pub selector: Option<Selector>,
    /// `namespaceSelector`, of a global one.
    pub namespaces: Option<Selector>,
    /// `serviceAccountSelector`.
    pub accounts: Option<Selector>,
    /// Rules for what its subjects begin, and for what is begun towards them; `None`: it does not judge that.
    pub rules: [Option<Vec<Rule>>; 2],
}

/// The objects of a cluster.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// Pods, network sets, host endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Policies.
    pub policies: Vec<Policy>,
    /// All of it, as manifests.
    pub manifests: Vec<Value>,
}

/// A flow.
#[derive(Debug, Clone, Copy)]
pub struct Packet {
    /// Addresses of source and destination.
    pub ends: [IpAddr; 2],
    /// The packet's protocol.
    pub protocol: u8,
    /// Ports of source and destination.
    pub ports: [u16; 2],
}

impl Cluster {
    /// Reports whether both ends allow the packet.
    pub fn allows(&self, packet: &Packet) -> bool {
        [0, 1].into_iter().all(|direction| self.allows_in(packet, direction))
    }

    fn allows_in(&self, packet: &Packet, direction: usize) -> bool {
        let own = packet.ends[direction];
        let is_at = |endpoint: &&Endpoint| endpoint.is_pod && endpoint.nets.contains(&IpNet::from(own));
        let Some(subject) = self.endpoints.iter().find(is_at) else { return true };
        let mut applying: Vec<&Policy> = self
            .policies
            .iter()
            .filter(|policy| policy.rules[direction].is_some() && policy.applies(subject))
            .collect();
        applying.sort_by(|one, two| (one.order, &one.name).cmp(&(two.order, &two.name)));
        for rule in applying.iter().flat_map(|policy| {
            let namespace = policy.namespace;
            policy.rules[direction].iter().flatten().map(move |rule| (namespace, rule))
        }) {
            if !self.matches(rule.1, rule.0, packet) {
                continue;
            }
            match rule.1.action {
                "Log" => {}
                // Behind the last tier the profiles of namespaces allow.
                action => return action != "Deny",
            }
        }
        applying.is_empty()
    }

    fn matches(&self, rule: &Rule, namespace: Option<&str>, packet: &Packet) -> bool {
        let version = if packet.ends[0].is_ipv4() { 4 } else { 6 };
        if rule.version.is_some_and(|wanted| wanted != version) {
            return false;
        }
        let is_of = |net: &IpNet| matches!(net, IpNet::V4(_)) == (version == 4);
        // Of a list of which nothing is left for this version, the rule is not there for it.
        let mut lists = rule.ends.iter().flat_map(|entity| &entity.nets);
        if lists.any(|list| !list.is_empty() && !list.iter().any(is_of)) {
            return false;
        }
        rule.protocol.is_none_or(|wanted| packet.protocol == wanted)
            && rule.not_protocol.is_none_or(|not| packet.protocol != not)
            && [0, 1].into_iter().all(|end| self.is_at(&rule.ends[end], namespace, packet, end))
    }

    fn is_at(&self, entity: &Entity, namespace: Option<&str>, packet: &Packet, end: usize) -> bool {
        let address = packet.ends[end];
        let listed = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
        let [nets, not_nets] = &entity.nets;
        if !nets.is_empty() && !listed(nets) || listed(not_nets) {
            return false;
        }
        let has = |meets: &dyn Fn(&Labels) -> bool| {
            self.endpoints.iter().any(|endpoint| listed(&endpoint.nets) && meets(&endpoint.labels))
        };
        if entity.is_selective(namespace) && !has(&|labels| entity.meets(labels, namespace)) {
            return false;
        }
        if entity.not_selector.as_ref().is_some_and(|not| has(&|labels| not.meets(labels, "", None))) {
            return false;
        }
        let is_port = |port: &Port| match port {
            Port::Numbers(first, last) => (*first..=*last).contains(&packet.ports[end]),
            Port::Named(name) => {
                let wanted = (*name, packet.protocol, packet.ports[end]);
                let mut there = self.endpoints.iter().filter(|endpoint| listed(&endpoint.nets));
                there.any(|endpoint| endpoint.ports.contains(&wanted))
            }
        };
        let [ports, not_ports] = &entity.ports;
        (ports.is_empty() || ports.iter().any(is_port)) && !not_ports.iter().any(is_port)
    }
}

impl Entity {
    fn is_selective(&self, namespace: Option<&str>) -> bool {
        let says = self.selector.is_some() || self.namespaces.is_some() || self.accounts.is_some();
        says || namespace.is_some() && self.not_selector.is_some()
    }

    fn meets(&self, labels: &Labels, namespace: Option<&str>) -> bool {
        let is_placed = labels.contains_key(NAMESPACE);
        let in_namespaces = match (&self.namespaces, namespace) {
            (Some(Err(())), _) => !is_placed,
            (Some(Ok(selector)), _) => selector.meets(labels, "pcns.", Some(NAMESPACE)),
            (None, Some(own)) => labels.get(NAMESPACE).is_some_and(|namespace| namespace == own),
            (None, None) => true,
        };
        let speaks_as = self.accounts.as_ref().is_none_or(|(names, selector)| {
            let named = |name: &String| names.contains(&name.as_str());
            (names.is_empty() || labels.get(ACCOUNT).is_some_and(named))
                && selector.as_ref().is_none_or(|selector| selector.meets(labels, "pcsa.", None))
        });
        in_namespaces && speaks_as && self.selector.as_ref().is_none_or(|one| one.meets(labels, "", None))
    }
}

impl Policy {
    fn applies(&self, endpoint: &Endpoint) -> bool {
        let labels = &endpoint.labels;
        let placed = (self.namespaces.is_some() || self.accounts.is_some()).then_some(NAMESPACE);
        let of = |selector: &Option<Selector>, prefix: &str| {
            selector.as_ref().is_none_or(|selector| selector.meets(labels, prefix, placed))
        };
        let own = |namespace: &str| labels.get(NAMESPACE).is_some_and(|one| one == namespace);
        self.namespace.is_none_or(own)
            && of(&self.selector, "")
            && of(&self.namespaces, "pcns.")
            && of(&self.accounts, "pcsa.")
    }
}
