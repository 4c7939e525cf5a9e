//! The `policy` section of agent.yaml, and what a Mesh says of sites.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use ipnet::IpNet;
use mesh_keyring::{MeshName, SiteName};
use mesh_overlay::local::InterfaceName;
use mesh_policy::budget::{Budget, Budgets};
use mesh_policy::compile::{MASK, Resolvers};
use mesh_policy::failsafe::FailSafe;
use mesh_policy::model::{
    Action, Direction, Namespaces, ObjectId, Order, Peer, PodSelector, Policy as Judged, Reach, Rule, Sites,
    Subject, Tier,
};
use mesh_policy::{LabelSelector, Protocol, Requirement};
use serde::{Deserialize, Serialize};

/// What is done with policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// What they deny is dropped.
    #[default]
    Enforce,
    /// What they would deny passes, and is told.
    Audit,
    /// Nothing.
    Off,
}

/// What becomes of something that no policy knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stance {
    /// It passes.
    Allow,
    /// It does not.
    Deny,
}

/// The `policy` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Policy {
    /// What is done with policies.
    pub mode: Mode,
    /// What becomes of traffic of addresses in this node's prefixes that no known pod has; absent: on nodes of a cluster `deny`, on
    /// other hosts, whose pods nobody knows, `allow`.
    pub unknown: Option<Stance>,
    /// Whether a pod has an address that lies in no node's prefixes, by its own status; absent: over a cluster's API `deny`, and
    /// `allow` in a directory, whose manifests are the operator's.
    pub outside_prefixes: Option<Stance>,
    /// Whether packets that come in by an interface that may lead to pods have to have their route back by it.
    pub check_sources: bool,
    /// Interfaces that lead to no pod of this node, beside those that are found to. Their packets may have another way back.
    pub outside_interfaces: BTreeSet<InterfaceName>,
    /// Which bits of conntrack's mark are ours.
    pub ct_mark_mask: u32,
    /// What is logged.
    pub log: FlowLog,
    /// What sites may do to each other; before what the Mesh says.
    pub sites: SiteStances,
    /// Who is believed about domain names.
    pub dns: Dns,
    /// What policies may cost.
    pub budgets: PolicyBudgets,
    /// What always reaches this node, where policies protect it as such; absent: what Calico has.
    pub failsafe_inbound: Option<Vec<SafePort>>,
    /// What this node always reaches then.
    pub failsafe_outbound: Option<Vec<SafePort>>,
}

/// The `policy.budgets` section; what is absent has its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicyBudgets {
    /// Of the policies of one namespace.
    pub namespace: PolicyBudget,
    /// Of the namespaced policies that judge one endpoint in one direction.
    pub class: PolicyBudget,
    /// Of all classes of this node.
    pub node: PolicyBudget,
    /// Of all policies that belong to no namespace.
    pub operator: PolicyBudget,
}

/// One budget; what is absent has its default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicyBudget {
    /// Rules of nf_tables.
    pub rules: Option<usize>,
    /// Elements of sets.
    pub elements: Option<usize>,
    /// Memory, estimated, in bytes.
    pub bytes: Option<u64>,
}

impl PolicyBudgets {
    /// All of them, with the defaults.
    pub fn budgets(&self) -> Budgets {
        let known = Budgets::default();
        let of = |said: PolicyBudget, known: Budget| Budget {
            rules: said.rules.unwrap_or(known.rules),
            elements: said.elements.unwrap_or(known.elements),
            bytes: said.bytes.unwrap_or(known.bytes),
        };
        Budgets {
            namespace: of(self.namespace, known.namespace),
            class: of(self.class, known.class),
            node: of(self.node, known.node),
            operator: of(self.operator, known.operator),
        }
    }
}

/// The `policy.dns` section.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// Servers that are believed, beside the cluster's own (pods with `k8s-app: kube-dns` in `kube-system`): addresses or prefixes.
    pub servers: Vec<Server>,
    /// The NFLOG group that their answers are copied to.
    pub group: u16,
}

impl Default for Dns {
    fn default() -> Self {
        Self { servers: Vec::new(), group: 5179 }
    }
}

/// An address, or a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Server(IpNet);

impl TryFrom<String> for Server {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let net = address.or_else(|_| text.parse::<IpNet>());
        net.map(|net| Self(net.trunc())).map_err(|_| format!("{text:?} is no address and no prefix"))
    }
}

impl Dns {
    /// Who is believed.
    pub fn resolvers(&self) -> Option<Resolvers> {
        let label = Requirement::In("k8s-app".to_owned(), ["kube-dns".to_owned()].into());
        let system = Namespaces::Named("kube-system".to_owned());
        Some(Resolvers {
            group: self.group,
            pods: [PodSelector::new(system, LabelSelector::of([label]))].into(),
            nets: self.servers.iter().map(|server| server.0).collect(),
        })
    }
}

/// A port that no policy takes from a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SafePort {
    /// The protocol.
    pub protocol: SafeProtocol,
    /// The port.
    pub port: NonZeroU16,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum SafeProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Policy {
    /// What no policy takes from this node.
    pub fn failsafe(&self) -> FailSafe {
        let known = FailSafe::default();
        let said = |ports: &Option<Vec<SafePort>>, known: BTreeSet<(Protocol, u16)>| match ports {
            None => known,
            Some(ports) => ports.iter().map(SafePort::both).collect(),
        };
        FailSafe {
            inbound: said(&self.failsafe_inbound, known.inbound),
            outbound: said(&self.failsafe_outbound, known.outbound),
        }
    }
}

impl SafePort {
    fn both(&self) -> (Protocol, u16) {
        let protocol = match self.protocol {
            SafeProtocol::Tcp => Protocol::TCP,
            SafeProtocol::Udp => Protocol::UDP,
            SafeProtocol::Sctp => Protocol::SCTP,
        };
        (protocol, self.port.get())
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            unknown: None,
            outside_prefixes: None,
            check_sources: true,
            outside_interfaces: BTreeSet::new(),
            ct_mark_mask: MASK,
            log: FlowLog::default(),
            sites: SiteStances::default(),
            dns: Dns::default(),
            budgets: PolicyBudgets::default(),
            failsafe_inbound: None,
            failsafe_outbound: None,
        }
    }
}

/// The `policy.log` section.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FlowLog {
    /// The file that a line of JSON is written to for each denied flow; absent: `flows.jsonl` in the state directory.
    pub file: Option<PathBuf>,
    /// The most packets a second that each rule which denies is told of; 0: none.
    pub denied: u32,
    /// The same for rules that allow.
    pub allowed: u32,
    /// The NFLOG group.
    pub group: u16,
}

impl Default for FlowLog {
    fn default() -> Self {
        Self { file: None, denied: 10, allowed: 0, group: 5180 }
    }
}

/// What sites may do to each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SiteStances {
    /// Between two sites that no entry names; absent: `allow`.
    #[serde(rename = "default", skip_serializing_if = "Option::is_none")]
    pub otherwise: Option<Stance>,
    /// The first entry that names a pair counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<SitePair>,
}

/// From one site to another; the way back has an entry of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SitePair {
    /// Where traffic begins; absent: any site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<SiteName>,
    /// Where it goes; absent: any site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<SiteName>,
    /// What becomes of it.
    pub stance: Stance,
}

/// As many as anybody has pairs worth naming.
const PAIRS_MOST: usize = 1024;

impl SiteStances {
    /// Nothing between sites.
    pub fn closed() -> Self {
        Self { otherwise: Some(Stance::Deny), pairs: Vec::new() }
    }

    /// Whether it says anything.
    pub fn is_silent(&self) -> bool {
        *self == Self::default()
    }

    /// What is wrong with it, if anything.
    pub fn wrong(&self) -> Option<String> {
        let count = self.pairs.len();
        (count > PAIRS_MOST).then(|| format!("pairs: {count} entries; at most {PAIRS_MOST}"))
    }

    /// The policies that it comes to: one for each site that something is said of, judged where traffic enters it.
    pub fn policies(&self, mesh: &MeshName, sites: &BTreeSet<String>) -> Vec<Judged> {
        if self.is_silent() {
            return Vec::new();
        }
        let policy = |site: &String| {
            let meant = self.pairs.iter().enumerate();
            let meant = meant.filter(|(_, pair)| pair.to.as_ref().is_none_or(|to| to.as_str() == site));
            let mut rules: Vec<Rule> = meant
                .map(|(index, pair)| {
                    let from = match &pair.from {
                        Some(from) => Sites::Named(from.to_string()),
                        None => Sites::Not(site.clone()),
                    };
                    rule(format!("pairs[{index}]"), pair.stance, from)
                })
                .collect();
            rules.push(rule(
                "default".to_owned(),
                self.otherwise.unwrap_or(Stance::Allow),
                Sites::Not(site.clone()),
            ));
            Judged {
                tier: Tier::sites(),
                order: Order(0.0),
                id: ObjectId { kind: "Mesh", namespace: None, name: format!("{mesh}:{site}") },
                subject: Subject::Sites(Sites::Named(site.clone())),
                egress: None,
                ingress: Some(rules),
                reach: Reach::Ends,
                staged: false,
                replaces: None,
            }
        };
        sites.iter().map(policy).collect()
    }
}

fn rule(name: String, stance: Stance, from: Sites) -> Rule {
    let action = if stance == Stance::Allow { Action::Allow } else { Action::Deny };
    Rule::between(name, action, Direction::Ingress, Some([Peer::Sites(from)].into()), None)
}
