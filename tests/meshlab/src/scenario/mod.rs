//! The scenario file: topology, mesh configuration and steps, read from YAML with positions.

mod check;
pub mod lease;
pub(crate) mod ruled_out;
mod schema;
pub mod step;
pub mod value;

use std::collections::BTreeMap;
use std::path::Path;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use serde_saphyr::{Location, Spanned};

pub use schema::json_schema_text;
use step::Step;
use value::{NodeList, Percent, Rate, Span};

use crate::layout::Layout;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// `IPv4` or `IPv6`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

/// A probe's or rule's protocol; `icmp` is ICMPv6 where the family is IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Protocol {
    #[default]
    Udp,
    Tcp,
    Icmp,
}

impl Protocol {
    /// The name as written in a scenario.
    pub fn label(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Icmp => "icmp",
        }
    }
}

/// A direction as seen from the site or node that a rule stands at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the site or node.
    In,
    /// Away from it.
    Out,
    /// Either way.
    #[default]
    Both,
}

/// The address families between the sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Underlay {
    #[default]
    Ipv4,
    Ipv6,
    Dual,
}

impl Underlay {
    /// The families it stands for.
    pub fn families(self) -> &'static [Family] {
        match self {
            Self::Ipv4 => &[Family::Ipv4],
            Self::Ipv6 => &[Family::Ipv6],
            Self::Dual => &[Family::Ipv4, Family::Ipv6],
        }
    }
}

/// How a site's router translates addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Nat {
    /// The nodes' addresses are reachable from the other sites.
    #[default]
    None,
    /// One outside port per inside socket, whoever it talks to; only flows begun inside come back.
    Cone,
    /// A new outside port for every destination.
    Symmetric,
}

/// A whole scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// A DNS label that names reports and the mesh.
    pub name: String,
    /// What the scenario shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The sites, joined by one internet.
    #[schemars(with = "Vec<Site>")]
    pub sites: Vec<Spanned<Site>>,
    /// Whether a mesh-agent runs on every node. Default: true.
    #[serde(default = "yes")]
    pub agents: bool,
    /// Whether the underlay itself routes pod prefixes, unencrypted. Only with `agents: false`, to see what a
    /// check finds when nothing protects the pods. Default: false.
    #[serde(default)]
    pub routed_pods: bool,
    /// Fragments of the agents' configuration.
    #[serde(default)]
    pub mesh: Mesh,
    /// What happens, in order; the first failure ends the run.
    #[serde(default)]
    #[schemars(with = "Vec<Step>")]
    pub steps: Vec<Spanned<Step>>,
}

fn yes() -> bool {
    true
}

/// A site: one router, one LAN, nodes on the LAN, pods on the nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Site {
    /// A DNS label, at most 20 characters.
    pub name: String,
    /// Where the nodes' pod prefixes come from: at most one IPv4 and one IPv6 prefix.
    /// Default: 10.N.0.0/16 and fd00:N::/48 for the N-th site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<String>>")]
    pub prefixes: Option<Vec<IpNet>>,
    /// How many nodes, or their names. Default: 1.
    #[serde(default = "one_node")]
    pub nodes: NodeList,
    /// Pods on each node. Default: 1.
    #[serde(default = "one_pod")]
    pub pods_per_node: u16,
    /// MTU of the site's LAN and uplink in bytes. Default: 1500.
    #[serde(default = "ethernet_mtu", deserialize_with = "value::mtu")]
    #[schemars(with = "u16")]
    pub mtu: u16,
    /// The pods' families. Default: those of the prefixes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub families: Option<Vec<Family>>,
    /// The families of the LAN and uplink. Default: ipv4.
    #[serde(default)]
    pub underlay: Underlay,
    /// Default: none.
    #[serde(default)]
    pub nat: Nat,
    /// Packets that the site's router drops from the start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firewall: Vec<FirewallRule>,
    /// Rate, delay and loss of the site's uplink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
}

fn one_node() -> NodeList {
    NodeList::Count(1)
}

fn one_pod() -> u16 {
    1
}

fn ethernet_mtu() -> u16 {
    1500
}

/// Packets dropped at a site's router between the site and the other sites.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FirewallRule {
    /// Default: every protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Destination port; needs udp or tcp. Default: every port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The other end's address or prefix. Default: everyone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// As seen from the site. Default: both.
    #[serde(default)]
    pub direction: Direction,
}

/// The properties of a site's uplink.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Link {
    /// Default: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// One-way delay, each direction. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Span>,
    /// Random loss, each direction. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Percent>,
}

/// Configuration merged into each node's agent configuration: first `config`, then the site's, then the node's.
/// Maps merge key by key, everything else is replaced, and `null` takes a key away (RFC 7386).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mesh {
    /// For every node.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub config: Map<String, Value>,
    /// By site name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub per_site: BTreeMap<String, Map<String, Value>>,
    /// By node name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub per_node: BTreeMap<String, Map<String, Value>>,
}

/// One thing wrong with a scenario, with its place where it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// 1-based line, 0 where unknown.
    pub line: u64,
    /// 1-based column, 0 where unknown.
    pub column: u64,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Problem {
    pub(crate) fn at(location: Location, message: impl Into<String>) -> Self {
        Self { line: location.line(), column: location.column(), message: message.into() }
    }

    pub(crate) fn nowhere(message: impl Into<String>) -> Self {
        Self { line: 0, column: 0, message: message.into() }
    }
}

/// The scenario cannot be run as it is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ScenarioError {
    /// The file's name, or `scenario` for text.
    pub source_name: String,
    /// Everything found, in the order of the file.
    pub problems: Vec<Problem>,
}

impl std::fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let Problem { line, column, message } = problem;
            if *line > 0 {
                write!(f, "{}:{line}:{column}: {message}", self.source_name)?;
            } else {
                write!(f, "{}: {message}", self.source_name)?;
            }
        }
        Ok(())
    }
}

impl Scenario {
    /// Reads a scenario and lays out its addresses.
    ///
    /// # Errors
    /// [`ScenarioError`] with line and column for broken YAML, unknown fields, an impossible topology, or steps
    /// that name what is not there.
    pub fn parse(text: &str, source_name: &str) -> Result<(Self, Layout), ScenarioError> {
        let fail = |problems| ScenarioError { source_name: source_name.to_owned(), problems };
        let scenario: Self = serde_saphyr::from_str(text).map_err(|error| {
            // The bare message; the position goes in front of it as with every other problem.
            let message = error.without_snippet().to_string();
            fail(vec![match error.location() {
                Some(location) => Problem::at(location, strip_position(&message)),
                None => Problem::nowhere(message),
            }])
        })?;
        let layout = check::check(&scenario).map_err(fail)?;
        Ok((scenario, layout))
    }

    /// Reads a scenario file.
    ///
    /// # Errors
    /// As [`Scenario::parse`], and when the file cannot be read.
    pub fn load(path: &Path) -> Result<(Self, Layout), ScenarioError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ScenarioError {
            source_name: name.clone(),
            problems: vec![Problem::nowhere(format!("cannot read the scenario: {error}"))],
        })?;
        Self::parse(&text, &name)
    }
}

/// Takes the parser's own `at line x, column y` off the end, since the problem carries it.
fn strip_position(message: &str) -> &str {
    match message.rfind(" at line ") {
        Some(at) => &message[..at],
        None => message,
    }
}

#[cfg(test)]
mod tests;
