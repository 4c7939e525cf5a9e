//! Flows as people and programs name them: between pods, nodes and addresses.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::evaluate::{Decision, Flow, Judgement, Reason, evaluate, propose};
use crate::interface::{Interface, InterfaceError};
use crate::object::Key;
use crate::protocol::Protocol;
use crate::ruleset::Family;
use crate::state::State;

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// `namespace/name`.
    Pod(String),
    /// By its name.
    Node(String),
    /// Whoever has it.
    Ip(IpAddr),
}

/// A flow that is asked about. A field that is not known would be another flow.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Probe {
    /// Who begins it.
    pub from: Place,
    /// Whom it is for.
    pub to: Place,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6` or a number; TCP where nothing is said.
    #[serde(default)]
    pub protocol: Option<ProtocolName>,
    /// The destination's port.
    #[serde(default)]
    pub port: Option<u16>,
    /// 4 or 6; where nothing is said, what both ends have, 4 first.
    #[serde(default)]
    pub family: Option<u8>,
    /// The source's port; where nothing is said it is none that a rule asks for.
    #[serde(default)]
    pub src_port: Option<u16>,
    /// Type of the ICMP message that begins it; an echo request where nothing is said.
    #[serde(default)]
    pub icmp_type: Option<u8>,
    /// Its code.
    #[serde(default)]
    pub icmp_code: Option<u8>,
    /// Address and port that it is begun towards, before destination NAT; where nothing is said, the destination's.
    #[serde(default)]
    pub dialled: Option<SocketAddr>,
    /// The interface by which it leaves the source's node.
    #[serde(default)]
    pub leaves_by: Option<String>,
    /// The interface by which it comes to the destination's node.
    #[serde(default)]
    pub arrives_by: Option<String>,
}

/// A protocol by name or number.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum ProtocolName {
    /// Its number.
    Number(u8),
    /// Its name.
    Name(String),
}

/// Why nobody can say what becomes of a flow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// There is no such thing.
    #[error("{0}: the state has none of this name")]
    Unknown(String),
    /// It has no address of the family.
    #[error("{what} has no {family} address{}", .holder.as_ref().map(|holder| format!(": it belongs to pod {holder} now")).unwrap_or_default())]
    NoAddress {
        /// The end.
        what: String,
        /// `IPv4`, `IPv6` or nothing.
        family: &'static str,
        /// Who has got its address.
        holder: Option<Key>,
    },
    /// The two ends have no family in common.
    #[error("{0} and {1} have no address family in common")]
    Families(String, String),
    /// A value that is none.
    #[error("{field}: {reason}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl Place {
    fn shown(&self) -> String {
        match self {
            Self::Pod(name) => format!("pod {name}"),
            Self::Node(name) => format!("node {name}"),
            Self::Ip(address) => address.to_string(),
        }
    }

    fn addresses(&self, state: &State) -> Result<Vec<IpAddr>, ProbeError> {
        let unknown = || ProbeError::Unknown(self.shown());
        match self {
            Self::Ip(address) => Ok(vec![address.to_canonical()]),
            Self::Node(name) => {
                Ok(state.world.nodes().get(name).ok_or_else(unknown)?.addresses.iter().copied().collect())
            }
            Self::Pod(name) => {
                let (namespace, name) = name.split_once('/').ok_or_else(|| ProbeError::Value {
                    field: "pod",
                    reason: format!("{name:?}; use NAMESPACE/NAME"),
                })?;
                let pod = state.world.pod(&Key::new(Some(namespace), name)).ok_or_else(unknown)?;
                let addresses: Vec<IpAddr> = match pod.host_network {
                    true => pod.addresses.iter().copied().collect(),
                    false => state.world.addresses(pod).collect(),
                };
                let taken = pod.addresses.iter().find_map(|address| state.world.holder(*address));
                match (addresses.is_empty(), taken) {
                    (true, holder) => Err(ProbeError::NoAddress {
                        what: self.shown(),
                        family: "IP",
                        holder: holder.map(|holder| holder.key.clone()),
                    }),
                    (false, _) => Ok(addresses),
                }
            }
        }
    }
}

impl Probe {
    /// A flow from a port that is not said.
    pub fn new(
        from: Place,
        to: Place,
        protocol: ProtocolName,
        port: Option<u16>,
        family: Option<u8>,
    ) -> Self {
        let protocol = Some(protocol);
        Self {
            from,
            to,
            protocol,
            port,
            family,
            src_port: None,
            icmp_type: None,
            icmp_code: None,
            dialled: None,
            leaves_by: None,
            arrives_by: None,
        }
    }

    /// The flow between addresses.
    ///
    /// # Errors
    /// [`ProbeError`], where an end has no address to be asked about.
    pub fn flow(&self, state: &State) -> Result<Flow, ProbeError> {
        let protocol = match &self.protocol {
            None => Protocol::TCP,
            Some(ProtocolName::Number(number)) => Protocol(*number),
            Some(ProtocolName::Name(name)) => {
                name.parse().map_err(|e| ProbeError::Value { field: "protocol", reason: format!("{e}") })?
            }
        };
        let port = match self.port {
            None if protocol.has_ports() => {
                let reason = format!("{protocol} needs one");
                return Err(ProbeError::Value { field: "port", reason });
            }
            port => port.unwrap_or(0),
        };
        let wanted: Vec<Family> = match self.family {
            None if protocol == Protocol::ICMP => vec![Family::V4],
            None if protocol == Protocol::ICMPV6 => vec![Family::V6],
            None => Family::BOTH.to_vec(),
            Some(4) => vec![Family::V4],
            Some(6) => vec![Family::V6],
            Some(other) => {
                return Err(ProbeError::Value { field: "family", reason: format!("{other}; use 4 or 6") });
            }
        };
        let (from, to) = (self.from.addresses(state)?, self.to.addresses(state)?);
        let of = |addresses: &[IpAddr], family| addresses.iter().copied().find(|a| Family::of(*a) == family);
        let both = |family| Some((of(&from, family)?, of(&to, family)?));
        if let Some((source, destination)) = wanted.iter().copied().find_map(both) {
            let mut flow = Flow::new(source, destination, protocol, port);
            flow.source_port = self.src_port.unwrap_or_default();
            flow.dialled = self.dialled.map(|dialled| (dialled.ip().to_canonical(), dialled.port()));
            if flow.dialled.is_some_and(|(address, _)| Family::of(address) != Family::of(destination)) {
                let reason =
                    format!("{} is of another family than {destination}", flow.before_nat().destination);
                return Err(ProbeError::Value { field: "dialled", reason });
            }
            flow.leaves_by = interface("leavesBy", self.leaves_by.as_deref())?;
            flow.arrives_by = interface("arrivesBy", self.arrives_by.as_deref())?;
            flow.icmp = (self.icmp_type.unwrap_or(flow.icmp.0), self.icmp_code.unwrap_or(flow.icmp.1));
            return Ok(flow);
        }
        let [family] = wanted.as_slice() else {
            return Err(ProbeError::Families(self.from.shown(), self.to.shown()));
        };
        let lacks = if of(&from, *family).is_none() { &self.from } else { &self.to };
        let family = if *family == Family::V4 { "IPv4" } else { "IPv6" };
        Err(ProbeError::NoAddress { what: lacks.shown(), family, holder: None })
    }

    /// What becomes of it.
    pub fn answer(&self, state: &State) -> Answer {
        match self.flow(state) {
            Ok(flow) => {
                let judgement = evaluate(&state.world, &state.policies, &flow);
                let proposed = propose(&state.world, &state.policies, &flow).map(|proposed| Proposed {
                    verdict: verdict(proposed.allowed()),
                    egress: (&proposed.egress).into(),
                    ingress: (&proposed.ingress).into(),
                });
                Answer { proposed, ..Answer::from(&judgement) }
            }
            Err(error) => Answer::unknown(error.to_string()),
        }
    }
}

fn interface(field: &'static str, name: Option<&str>) -> Result<Option<Interface>, ProbeError> {
    let wrong = |error: InterfaceError| ProbeError::Value { field, reason: error.to_string() };
    name.map(|name| name.parse().map_err(wrong)).transpose()
}

/// What becomes of a flow, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// `allow` or `deny`.
    pub verdict: &'static str,
    /// Why nobody can say; then the verdict is `deny`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What is decided for who begins it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<AnswerDecision>,
    /// What is decided for whom it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<AnswerDecision>,
    /// What it would be if staged policies counted, where any of them applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proposed: Option<Proposed>,
}

/// What would become of a flow, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proposed {
    /// `allow` or `deny`.
    pub verdict: &'static str,
    /// For who begins it.
    pub egress: AnswerDecision,
    /// For whom it is for.
    pub ingress: AnswerDecision,
}

/// What is decided in one direction, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AnswerDecision {
    /// `allow` or `deny`.
    pub verdict: &'static str,
    /// `rule`, `isolated`, `unjudged`, `own-address`, `own-node`, `fail-safe` or `unprofiled`.
    pub reason: &'static str,
    /// The tier that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// The policy whose rule decided, or those that isolate, separated by commas; or the host endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

impl Answer {
    /// Nobody can say, and this is why.
    pub fn unknown(error: String) -> Self {
        Self { verdict: "deny", error: Some(error), egress: None, ingress: None, proposed: None }
    }
}

fn verdict(allowed: bool) -> &'static str {
    if allowed { "allow" } else { "deny" }
}

impl From<&Judgement> for Answer {
    fn from(judgement: &Judgement) -> Self {
        Self {
            verdict: verdict(judgement.allowed()),
            error: None,
            egress: Some((&judgement.egress).into()),
            ingress: Some((&judgement.ingress).into()),
            proposed: None,
        }
    }
}

impl From<&Decision> for AnswerDecision {
    fn from(decision: &Decision) -> Self {
        let plain = |reason| (reason, None, None, None);
        let (reason, tier, policy, rule) = match &decision.reason {
            Reason::Rule { tier, policy, rule } => {
                ("rule", Some(tier.clone()), Some(policy.to_string()), Some(rule.clone()))
            }
            Reason::Isolated { tier, policies } => {
                let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
                ("isolated", Some(tier.clone()), Some(names.join(", ")), None)
            }
            Reason::Unjudged => plain("unjudged"),
            Reason::OwnAddress => plain("own-address"),
            Reason::OwnNode => plain("own-node"),
            Reason::FailSafe => plain("fail-safe"),
            Reason::Unprofiled(host) => ("unprofiled", None, Some(host.to_string()), None),
        };
        Self { verdict: verdict(decision.allowed), reason, tier, policy, rule }
    }
}
