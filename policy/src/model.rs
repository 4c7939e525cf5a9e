//! The one form of all policies: tiers of policies of rules.
//!
//! ```text
//! tier (by order) -> policy (by order, then name) -> rule (as written): allow, deny, pass or log
//! ```
//! The first rule that matches decides; `pass` leaves it to the next tier, `log` goes on. A tier in which a policy applies to an
//! endpoint and none of its rules decides does what its end says. Where no tier decides, traffic is allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::names::Domain;
use crate::object::Key;
use crate::protocol::{Family, Protocol};
use crate::selector::LabelSelector;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Which way a policy judges, seen from the endpoint that it applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// What the endpoint begins.
    Egress,
    /// What is begun towards it.
    Ingress,
}

impl Direction {
    /// In the order in which they are judged.
    pub const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    /// As in manifests, in small letters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

/// One end of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Who begins it.
    Source,
    /// Whom it is for.
    Destination,
}

impl Side {
    /// The end of the endpoint that is judged in a direction.
    pub fn own(direction: Direction) -> Self {
        match direction {
            Direction::Egress => Self::Source,
            Direction::Ingress => Self::Destination,
        }
    }

    /// The end of its peer.
    pub fn other(direction: Direction) -> Self {
        match direction {
            Direction::Egress => Self::Destination,
            Direction::Ingress => Self::Source,
        }
    }

    /// As people call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The traffic may go on in this direction.
    Allow,
    /// It may not.
    Deny,
    /// The next tier decides.
    Pass,
    /// It is logged, and the next rule decides.
    Log,
}

/// What becomes of traffic that no rule of a tier has decided, where a policy of it applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// It is denied.
    Deny,
    /// The next tier decides.
    Pass,
}

/// Where a tier or a policy stands among its like: smaller first.
#[derive(Debug, Clone, Copy)]
pub struct Order(pub f64);

impl Order {
    /// Where something stands of which nobody says.
    pub const LAST: Self = Self(f64::MAX);
}

impl PartialEq for Order {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Order {}

impl PartialOrd for Order {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Order {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A tier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tier {
    /// Its place.
    pub order: Order,
    /// Its name.
    pub name: String,
    /// How it ends.
    pub end: End,
}

impl Tier {
    /// What administrators say before anybody else: the tier of ClusterNetworkPolicies, where Calico has it too.
    pub fn admin() -> Self {
        Self { order: Order(1000.0), name: "kube-admin".to_owned(), end: End::Pass }
    }

    /// What administrators say where nobody else does, in the same place.
    pub fn baseline() -> Self {
        Self { order: Order(10_000_000.0), name: "kube-baseline".to_owned(), end: End::Pass }
    }

    /// The tier of Kubernetes' NetworkPolicies, where Calico has it too.
    pub fn kubernetes() -> Self {
        Self { order: Order(1_000_000.0), name: "default".to_owned(), end: End::Deny }
    }

    /// A tier by its name alone: of one that is not known, the place is the last and the end is to deny.
    pub fn named(name: &str) -> Self {
        let known = [Self::admin(), Self::baseline(), Self::kubernetes()];
        let known = known.into_iter().find(|tier| tier.name == name);
        known.unwrap_or_else(|| Self { order: Order::LAST, name: name.to_owned(), end: End::Deny })
    }

    /// The last tier: what the operator says of whole sites.
    pub fn sites() -> Self {
        Self { order: Order(f64::INFINITY), name: "sites".to_owned(), end: End::Pass }
    }
}

/// An object by kind and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    /// Its kind.
    pub kind: &'static str,
    /// Its namespace, if it has one.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// Which namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespaces {
    /// This one.
    Named(String),
    /// Those with labels that match.
    Selected(LabelSelector),
}

/// Pods by namespace, label and service account.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodSelector {
    /// In these namespaces.
    pub namespaces: Namespaces,
    /// With labels that match.
    pub pods: LabelSelector,
    /// Of service accounts with labels that match, where that is asked.
    pub accounts: Option<LabelSelector>,
}

impl PodSelector {
    /// Those of any service account.
    pub fn new(namespaces: Namespaces, pods: LabelSelector) -> Self {
        Self { namespaces, pods, accounts: None }
    }
}

/// Where network sets are looked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Everywhere.
    Any,
    /// In no namespace.
    Global,
    /// In these namespaces.
    In(Namespaces),
    /// In these, and in none.
    InOrNone(Namespaces),
}

/// Network sets and host endpoints by label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkSelector {
    /// There.
    pub scope: Scope,
    /// With labels that match.
    pub labels: LabelSelector,
}

/// Addresses: a prefix without some parts of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block {
    /// The prefix.
    pub net: IpNet,
    /// What of it does not count.
    pub except: Vec<IpNet>,
}

impl Block {
    /// Whether the address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.net.contains(&address) && !self.except.iter().any(|net| net.contains(&address))
    }
}

/// Sites of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sites {
    /// This one.
    Named(String),
    /// All but this one.
    Not(String),
    /// Every one.
    Any,
}

impl Sites {
    /// Whether a site is meant; none is no site.
    pub fn contains(&self, site: Option<&str>) -> bool {
        match (self, site) {
            (_, None) => false,
            (Self::Named(name), Some(site)) => name == site,
            (Self::Not(name), Some(site)) => name != site,
            (Self::Any, Some(_)) => true,
        }
    }
}

/// Whom a policy applies to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// Pods of the cluster.
    Pods(PodSelector),
    /// Whatever has an address of a site: pods, nodes, hosts.
    Sites(Sites),
    /// Nodes with labels that match.
    Nodes(LabelSelector),
    /// Nodes of which a host endpoint has labels that match.
    Hosts(LabelSelector),
    /// Whom any of these means.
    Any(BTreeSet<Subject>),
    /// Whom all of these mean.
    All(BTreeSet<Subject>),
}

impl Subject {
    /// Whether it means nodes as such.
    pub fn is_about_nodes(&self) -> bool {
        match self {
            Self::Pods(_) | Self::Sites(_) => false,
            Self::Nodes(_) | Self::Hosts(_) => true,
            Self::Any(subjects) | Self::All(subjects) => subjects.iter().any(Self::is_about_nodes),
        }
    }

    /// Reports whether the subject depends on host endpoints.
    pub fn is_about_hosts(&self) -> bool {
        match self {
            Self::Pods(_) | Self::Sites(_) | Self::Nodes(_) => false,
            Self::Hosts(_) => true,
            Self::Any(subjects) | Self::All(subjects) => subjects.iter().any(Self::is_about_hosts),
        }
    }
}

/// Who is at an end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Pods of the cluster.
    Pods(PodSelector),
    /// Addresses, whoever has them.
    Block(Block),
    /// The own addresses of nodes with labels that match.
    Nodes(LabelSelector),
    /// The addresses of network sets and host endpoints.
    Networks(NetworkSelector),
    /// The addresses that these names were seen to have.
    Domains(BTreeSet<Domain>),
    /// Whatever has an address of a site.
    Sites(Sites),
    /// The addresses of a Service's endpoints.
    Service(Key),
}

/// Which of a protocol's ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// All, and a protocol without ports too.
    Any,
    /// First to last.
    Range(u16, u16),
    /// The one that the pod at that end gives this name.
    Named(String),
}

/// A protocol and its ports, at one end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The protocol.
    pub protocol: Protocol,
    /// Its ports.
    pub ports: PortMatch,
}

/// A message of ICMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Icmp {
    /// Of this family.
    pub family: Family,
    /// Its type.
    pub kind: u8,
    /// Its code; `None`: any.
    pub code: Option<u8>,
}

/// What a rule asks of a flow. Those that are quickly answered come first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condition {
    /// It is of this family.
    Family(Family),
    /// Its protocol is this one.
    Protocol(Protocol),
    /// Its protocol is another.
    NotProtocol(Protocol),
    /// Any of these, at that end.
    Ports(Side, BTreeSet<Port>),
    /// This protocol, or any, and none of these ports at that end; of any protocol these are names alone.
    NotPorts(Side, Option<Protocol>, BTreeSet<PortMatch>),
    /// It begins with this message.
    Icmp(Icmp),
    /// It is ICMP of that family, and begins with another message.
    NotIcmp(Icmp),
    /// It is for an endpoint of this Service, by address, protocol and port.
    Serves(Key),
    /// Any of these is at that end; of none nobody is.
    Is(Side, BTreeSet<Peer>),
    /// None of these is at that end.
    IsNot(Side, BTreeSet<Peer>),
}

impl Peer {
    /// The domain names that it consists of, if it is that.
    pub fn domains(&self) -> Option<&BTreeSet<Domain>> {
        match self {
            Self::Domains(domains) => Some(domains),
            _ => None,
        }
    }
}

impl Condition {
    /// The domain names that it speaks of.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        let peers = match self {
            Self::Is(_, peers) | Self::IsNot(_, peers) => Some(peers),
            _ => None,
        };
        peers.into_iter().flatten().filter_map(Peer::domains).flatten()
    }

    /// Reports whether the condition depends on network sets or host endpoints.
    pub fn is_about_networks(&self) -> bool {
        let is_named = |ports: &PortMatch| matches!(ports, PortMatch::Named(_));
        match self {
            Self::Is(_, peers) | Self::IsNot(_, peers) => {
                peers.iter().any(|peer| matches!(peer, Peer::Networks(_)))
            }
            Self::Ports(_, ports) => ports.iter().any(|port| is_named(&port.ports)),
            Self::NotPorts(_, _, ports) => ports.iter().any(is_named),
            _ => false,
        }
    }

    /// Reports whether the condition depends on endpoints of Services.
    pub fn is_about_services(&self) -> bool {
        match self {
            Self::Is(_, peers) | Self::IsNot(_, peers) => {
                peers.iter().any(|peer| matches!(peer, Peer::Service(_)))
            }
            Self::Serves(_) => true,
            _ => false,
        }
    }
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its place in the object, such as `ingress[0]`.
    pub name: String,
    /// What it does.
    pub action: Action,
    /// All of these have to hold; without any it matches everything.
    pub when: BTreeSet<Condition>,
}

impl Rule {
    /// In how many ways its ports can match: about as many rules it is for the kernel. However many ports it lists, they are one set;
    /// names of ports are a set for each family and each way of a connection.
    pub fn ways(&self) -> usize {
        let of = |condition: &Condition| match condition {
            Condition::Ports(_, ports) => {
                let is_named = |port: &Port| matches!(port.ports, PortMatch::Named(_));
                let is_range = |port: &Port| matches!(port.ports, PortMatch::Range(..));
                let whole = ports.iter().filter(|port| port.ports == PortMatch::Any).count();
                whole + usize::from(ports.iter().any(is_range)) + 4 * usize::from(ports.iter().any(is_named))
            }
            Condition::NotPorts(_, None, _) => 5,
            Condition::NotPorts(_, Some(_), ports)
                if ports.iter().any(|port| matches!(port, PortMatch::Named(_))) =>
            {
                4
            }
            Condition::Serves(_) => 4,
            _ => 1,
        };
        self.when.iter().map(of).fold(1, |all: usize, ways| all.saturating_mul(ways.max(1)))
    }

    /// A rule about who is at the other end and the destination's ports, as Kubernetes has them: any of these, and everybody and
    /// everything where nothing is said.
    pub fn between(
        name: String,
        action: Action,
        direction: Direction,
        peers: Option<BTreeSet<Peer>>,
        ports: Option<BTreeSet<Port>>,
    ) -> Self {
        let peers = peers.map(|peers| Condition::Is(Side::other(direction), peers));
        let ports = ports.map(|ports| Condition::Ports(Side::Destination, ports));
        Self { name, action, when: peers.into_iter().chain(ports).collect() }
    }
}

/// What a policy judges of whom it applies to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// What is begun by them and towards them.
    #[default]
    Ends,
    /// And what a node forwards, by its host endpoint (Calico's `applyOnForward`).
    Forwarded,
    /// What comes in by a host endpoint, before all others: as it was begun, before destination NAT (Calico's `preDNAT`).
    BeforeNat,
    /// Each packet that comes in or goes out by a host endpoint, by itself, before all others and before conntrack, which knows nothing of
    /// what they allow (Calico's `doNotTrack`).
    Untracked,
}

/// One policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Its tier.
    pub tier: Tier,
    /// Its place among those of its tier.
    pub order: Order,
    /// Where it comes from.
    pub id: ObjectId,
    /// Whom it applies to.
    pub subject: Subject,
    /// Its rules for what its subjects begin; `None`: it does not judge that.
    pub egress: Option<Vec<Rule>>,
    /// Its rules for what is begun towards its subjects; `None`: it does not judge that.
    pub ingress: Option<Vec<Rule>>,
    /// What it judges.
    pub reach: Reach,
    /// It decides nothing: what it would deny is told.
    pub staged: bool,
    /// Where it is staged: the policy that it is to stand for.
    pub replaces: Option<ObjectId>,
}

impl Policy {
    /// Its rules in a direction, if it judges that.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Egress => self.egress.as_deref(),
            Direction::Ingress => self.ingress.as_deref(),
        }
    }

    /// All that its rules ask.
    pub fn conditions(&self) -> impl Iterator<Item = &Condition> {
        self.egress.iter().chain(&self.ingress).flatten().flat_map(|rule| &rule.when)
    }

    /// By what policies are sorted: tier, order, name; and the rest of what tells them apart.
    pub fn rank(&self) -> (&Tier, Order, &str, Option<&str>, &str) {
        (&self.tier, self.order, &self.id.name, self.id.namespace.as_deref(), self.id.kind)
    }
}
