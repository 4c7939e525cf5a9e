//! How much of a node policies may take: by namespace, by endpoint, by node, and for the operator's own.
//!
//! The cost of a policy follows from its object alone, so that every node and every evaluation comes to the same. What is over its
//! budget is not compiled: it denies, in the directions that it judges, whom it selects.

use std::fmt;
use std::ops::{Add, Sub};

use crate::compile::ranges::pieces;
use crate::model::{Condition, Direction, Peer, PodSelector, Policy, PortMatch, Rule};
use crate::protocol::Family;
use crate::selector::LabelSelector;

/// What a rule takes in the kernel and in the agent, about, in bytes.
const RULE_BYTES: u64 = 1024;
/// The same for an element of a set.
const ELEMENT_BYTES: u64 = 256;

/// Of what a node has, a namespace may have one part of so many.
const SHARE: usize = 4;

/// Of a namespace's policies, so many times its budget are remembered. Beyond that only what they cost is.
const KEPT: usize = 8;

/// So many prefixes, of which a block with exceptions consists, cost as much as one element.
const PIECES: usize = 2;

/// What something costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    /// Rules of nf_tables.
    pub rules: usize,
    /// Elements of sets, and what has to be compared to find them: ports, prefixes, selectors, names.
    pub elements: usize,
}

impl Cost {
    /// An estimate of the memory that it takes, in bytes.
    pub fn bytes(self) -> u64 {
        let of = |count: usize, each: u64| u64::try_from(count).unwrap_or(u64::MAX).saturating_mul(each);
        of(self.rules, RULE_BYTES).saturating_add(of(self.elements, ELEMENT_BYTES))
    }

    /// Rules and elements together.
    pub fn weight(self) -> usize {
        self.rules.saturating_add(self.elements)
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            rules: self.rules.saturating_add(other.rules),
            elements: self.elements.saturating_add(other.elements),
        }
    }
}

impl Sub for Cost {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            rules: self.rules.saturating_sub(other.rules),
            elements: self.elements.saturating_sub(other.elements),
        }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    /// Rules of nf_tables.
    Rules,
    /// Elements of sets.
    Elements,
    /// Memory, estimated.
    Bytes,
}

impl Unit {
    /// The field of a budget.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rules => "rules",
            Self::Elements => "elements",
            Self::Bytes => "bytes",
        }
    }
}

/// The most that something may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Rules of nf_tables.
    pub rules: usize,
    /// Elements of sets.
    pub elements: usize,
    /// Memory, estimated.
    pub bytes: u64,
}

impl Budget {
    /// What one namespace may have of it.
    pub fn share(&self) -> Self {
        Self { rules: self.rules / SHARE, elements: self.elements / SHARE, bytes: self.bytes / SHARE as u64 }
    }

    /// So much of it is remembered at most, to count again when the rest is less.
    pub fn kept(&self) -> Self {
        let more = |count: usize| count.saturating_mul(KEPT);
        let bytes = self.bytes.saturating_mul(KEPT as u64);
        Self { rules: more(self.rules), elements: more(self.elements), bytes }
    }

    /// The first unit of which the cost is more.
    pub fn exceeded(&self, cost: Cost) -> Option<(Unit, u64, u64)> {
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let units = [
            (Unit::Rules, count(cost.rules), count(self.rules)),
            (Unit::Elements, count(cost.elements), count(self.elements)),
            (Unit::Bytes, cost.bytes(), self.bytes),
        ];
        units.into_iter().find(|(_, used, most)| used > most)
    }
}

/// All budgets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budgets {
    /// Of the policies of one namespace.
    pub namespace: Budget,
    /// Of the namespaced policies that judge one endpoint in one direction.
    pub class: Budget,
    /// Of all classes of a node, with the elements that their sets have there. One namespace may have a quarter.
    pub node: Budget,
    /// Of all policies that belong to no namespace.
    pub operator: Budget,
}

impl Default for Budgets {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            namespace: Budget { rules: 16_384, elements: 32_768, bytes: 24 * MIB },
            class: Budget { rules: 16_384, elements: 32_768, bytes: 24 * MIB },
            node: Budget { rules: 131_072, elements: 1_048_576, bytes: 384 * MIB },
            operator: Budget { rules: 32_768, elements: 131_072, bytes: 64 * MIB },
        }
    }
}

/// Which budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// [`Budgets::namespace`].
    Namespace,
    /// [`Budgets::class`], in this direction.
    Class(Direction),
    /// [`Budgets::node`], with all others.
    Node,
    /// [`Budgets::node`], by itself.
    Share,
    /// [`Budgets::operator`].
    Operator,
    /// [`Budgets::namespace`], so often that it was not even remembered.
    Kept,
    /// None: the kernel refused a ruleset with its last change.
    Kernel,
}

impl Which {
    /// The field of `policy.budgets`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace | Self::Kept => "namespace",
            Self::Class(_) => "class",
            Self::Node | Self::Share => "node",
            Self::Operator => "operator",
            Self::Kernel => "kernel",
        }
    }
}

/// How a budget was exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Excess {
    /// Which budget.
    pub which: Which,
    /// Of what.
    pub unit: Unit,
    /// How much it would be.
    pub used: u64,
    /// How much it may be.
    pub most: u64,
}

impl Excess {
    /// Of what the kernel refused, for whatever reason.
    pub(crate) const REFUSED: Self = Self { which: Which::Kernel, unit: Unit::Rules, used: 0, most: 0 };

    /// Of a cost, if it is more than a budget.
    pub fn of(which: Which, budget: &Budget, cost: Cost) -> Option<Self> {
        let (unit, used, most) = budget.exceeded(cost)?;
        Some(Self { which, unit, used, most })
    }
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { which, unit, used, most } = self;
        let (field, unit) = (which.as_str(), unit.as_str());
        match which {
            Which::Namespace => write!(f, "its policies are {used} {unit}; "),
            Which::Class(direction) => {
                write!(f, "the policies of one of its pods for {} are {used} {unit}; ", direction.as_str())
            }
            Which::Kept => {
                return write!(
                    f,
                    "when one of its policies was read they were {used} {unit}, more than is remembered ({most})"
                );
            }
            Which::Kernel => {
                return f.write_str(
                    "the kernel refused a ruleset with its last change, and took one without its policies",
                );
            }
            Which::Node => write!(f, "all pods on this node need {used} {unit}, and its own most of them; "),
            Which::Share => {
                return write!(
                    f,
                    "its pods on this node need {used} {unit}; a quarter of policy.budgets.{field}.{unit} is {most}"
                );
            }
            Which::Operator => write!(f, "with the smaller policies of no namespace it is {used} {unit}; "),
        }?;
        write!(f, "policy.budgets.{field}.{unit} is {most}")
    }
}

/// In how many ways something can match: whatever the family, and of each family.
#[derive(Clone, Copy)]
struct Ways {
    any: usize,
    v4: usize,
    v6: usize,
}

impl Ways {
    fn any(any: usize) -> Self {
        Self { any, v4: 0, v6: 0 }
    }

    fn of(family: Family) -> Self {
        let one = |of: Family| usize::from(of == family);
        Self { any: 0, v4: one(Family::V4), v6: one(Family::V6) }
    }

    fn both(each: usize) -> Self {
        Self { any: 0, v4: each, v6: each }
    }

    /// Both conditions hold; none can of two families.
    fn and(self, other: Self) -> Self {
        let of = |one: usize, two: usize| {
            let mixed = self.any.saturating_mul(two).saturating_add(one.saturating_mul(other.any));
            mixed.saturating_add(one.saturating_mul(two))
        };
        Self { any: self.any.saturating_mul(other.any), v4: of(self.v4, other.v4), v6: of(self.v6, other.v6) }
    }

    fn all(self) -> usize {
        self.any.saturating_add(self.v4).saturating_add(self.v6)
    }
}

/// What a policy costs.
pub fn of_policy(policy: &Policy) -> Cost {
    Direction::BOTH.into_iter().map(|direction| of_direction(policy, direction)).sum()
}

/// What a policy costs in one direction: as many rules as the kernel has of it at most, where nothing is logged.
pub fn of_direction(policy: &Policy, direction: Direction) -> Cost {
    policy.rules(direction).unwrap_or_default().iter().map(of_rule).sum()
}

fn of_rule(rule: &Rule) -> Cost {
    let ways = rule.when.iter().map(ways).fold(Ways::any(1), Ways::and);
    let elements = rule.when.iter().map(elements).fold(0, usize::saturating_add);
    // A rule that nothing can match is read and compared all the same.
    Cost { rules: ways.all().max(1), elements }
}

fn ways(condition: &Condition) -> Ways {
    match condition {
        Condition::Family(family) => Ways::of(*family),
        Condition::Protocol(_) | Condition::NotProtocol(_) => Ways::any(1),
        Condition::Icmp(icmp) | Condition::NotIcmp(icmp) => Ways::of(icmp.family),
        Condition::Ports(_, ports) => {
            let numbered = ports.iter().filter(|port| !is_named(&port.ports));
            let mut protocols: Vec<_> = numbered.map(|port| port.protocol).collect();
            protocols.dedup();
            let names = if ports.iter().any(|port| is_named(&port.ports)) { 2 } else { 0 };
            Ways { any: protocols.len(), ..Ways::both(names) }
        }
        Condition::NotPorts(_, None, _) => Ways { any: 1, ..Ways::both(2) },
        Condition::NotPorts(_, Some(_), ports) => {
            if ports.iter().any(is_named) {
                Ways::both(2)
            } else {
                Ways::any(1)
            }
        }
        Condition::Serves(_) => Ways::both(2),
        Condition::Is(_, peers) => {
            let has = |is_meant: fn(&Peer) -> bool| usize::from(peers.iter().any(is_meant));
            let pods = has(|peer| matches!(peer, Peer::Pods(_)));
            let nets = has(|peer| matches!(peer, Peer::Block(_) | Peer::Nodes(_) | Peer::Sites(_)));
            let networks = has(|peer| matches!(peer, Peer::Networks(_)));
            let domains = 2 * has(|peer| matches!(peer, Peer::Domains(_)));
            let services = peers.iter().filter(|peer| matches!(peer, Peer::Service(_))).count();
            Ways::both(pods + nets + networks + domains + services)
        }
        Condition::IsNot(..) => Ways::both(1),
    }
}

fn is_named(ports: &PortMatch) -> bool {
    matches!(ports, PortMatch::Named(_))
}

fn elements(condition: &Condition) -> usize {
    match condition {
        Condition::Ports(_, ports) => ports.len(),
        Condition::NotPorts(_, _, ports) => ports.len() + 1,
        Condition::Is(_, peers) | Condition::IsNot(_, peers) => {
            peers.iter().map(of_peer).fold(0, usize::saturating_add)
        }
        _ => 0,
    }
}

fn of_peer(peer: &Peer) -> usize {
    let labels = |selector: &LabelSelector| 1 + selector.values();
    match peer {
        Peer::Pods(PodSelector { pods, accounts, .. }) => labels(pods) + accounts.as_ref().map_or(0, labels),
        // What the kernel makes of a range that is no prefix: a lookup in so many.
        Peer::Block(block) => (1 + block.except.len()).max(pieces(block) / PIECES),
        Peer::Nodes(selector) => labels(selector),
        Peer::Networks(selector) => labels(&selector.labels),
        Peer::Domains(domains) => domains.len(),
        Peer::Sites(_) | Peer::Service(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::networkpolicy;

    fn cost(rules: Value) -> Cost {
        let policy = json!({"metadata": {"name": "p", "namespace": "t"}, "spec": {"podSelector": {}, "ingress": rules}});
        of_policy(&networkpolicy::read(&policy).policy)
    }

    #[test]
    fn ports_cost_elements_and_no_rules() {
        let with = |count: usize| {
            let ports: Vec<Value> = (0..count).map(|n| json!({"port": 1 + 2 * n})).collect();
            cost(json!([{"ports": ports}]))
        };
        assert_eq!(
            (with(1), with(2000)),
            (Cost { rules: 1, elements: 1 }, Cost { rules: 1, elements: 2000 })
        );
    }

    #[test]
    fn families_do_not_multiply() {
        let from =
            json!([{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]);
        // Pods and blocks of each family, times names on the way and on the way back, or the number.
        let both = cost(json!([{"from": from, "ports": [{"port": "web"}, {"port": 80}]}]));
        assert_eq!(both, Cost { rules: 12, elements: 7 });
    }

    #[test]
    fn exceptions_cost_what_the_kernel_makes_of_them() {
        let with = |except: Vec<String>| {
            cost(json!([{"from": [{"ipBlock": {"cidr": "2001:db8::/32", "except": except}}]}])).elements
        };
        assert_eq!(with(vec![]), 1);
        let scattered: Vec<String> = (1..1000).map(|n| format!("2001:db8:{n:x}:{n:x}::{n:x}/128")).collect();
        assert!(with(scattered.clone()) > 32_768, "{}", with(scattered));
        let aligned: Vec<String> = (0..1000).map(|n| format!("2001:db8:{n:x}::/48")).collect();
        assert!(with(aligned) < 1_100);
    }

    #[test]
    fn an_excess_names_the_field_to_raise() {
        let budget = Budget { rules: 5, elements: 5, bytes: u64::MAX };
        assert_eq!(Excess::of(Which::Namespace, &budget, Cost { rules: 5, elements: 5 }), None);
        let excess = Excess::of(Which::Namespace, &budget, Cost { rules: 5, elements: 6 }).unwrap();
        assert_eq!(excess.to_string(), "its policies are 6 elements; policy.budgets.namespace.elements is 5");
        let bytes = Budget { bytes: 1, ..budget };
        assert_eq!(bytes.exceeded(Cost { rules: 1, elements: 0 }).unwrap().0, Unit::Bytes);
    }
}
