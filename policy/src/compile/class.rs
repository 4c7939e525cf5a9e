//! A class: what all endpoints with the same policies in one direction have in common, as a chain.
//!
//! A class chain is jumped to from a base chain. To allow is to return there, to pass is to go to the chain of the next tier.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::ranges::cover;
use super::{Logging, Settings};
use crate::flowlog::{self, Label, RuleName};
use crate::model::{
    Action, Block, Direction, End as TierEnd, Peer, PodSelector, Policy, Port, PortMatch, Rule as PolicyRule,
    Tier,
};
use crate::protocol::Protocol;
use crate::ruleset::{Element, End, Family, Kind, Match, Rule, Statement, Verdict, Way};
use crate::world::{Node, World};

/// What a set holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Source {
    /// The addresses of pods that any of these selects.
    Pods(BTreeSet<PodSelector>),
    /// These ranges, for good: others are another set.
    Ranges(BTreeSet<Element>),
    /// Every pod's port of this name.
    Named(String, Protocol),
}

impl Source {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Pods(_) => Kind::Addresses,
            Self::Ranges(_) => Kind::Ranges,
            Self::Named(..) => Kind::Ports,
        }
    }
}

/// A set that a class looks into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetUse {
    pub(super) family: Family,
    pub(super) source: Source,
    /// To be in it allows something, everywhere in this class.
    pub(super) allows: bool,
}

/// A compiled class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Class {
    /// The name of its first chain.
    pub(super) name: String,
    /// Its chains, the first one included.
    pub(super) chains: BTreeMap<String, Vec<Rule>>,
    /// The sets that they look into.
    pub(super) sets: BTreeMap<String, SetUse>,
    /// What its ids in the log mean.
    pub(super) names: BTreeMap<String, RuleName>,
}

impl Class {
    /// Whether it may deny something.
    pub(super) fn denies(&self) -> bool {
        self.chains
            .values()
            .flatten()
            .any(|rule| !matches!(rule.verdict, Verdict::Return | Verdict::Continue))
    }
}

/// A short name for something long: 128 bits of a digest, so that nobody can make another thing of the same name.
pub(super) fn digest(of: &impl std::fmt::Debug) -> String {
    let hash = Sha256::digest(format!("{of:?}"));
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Compiles what applies to an endpoint in a direction.
pub(super) fn compile(
    world: &World,
    settings: &Settings,
    direction: Direction,
    tiers: &[(&Tier, Vec<&Policy>)],
) -> Class {
    let mut writer = Writer { world, settings, direction, sets: BTreeMap::new(), names: BTreeMap::new() };
    let mut denials = BTreeMap::new();
    let mut bodies: Vec<Vec<Rule>> = Vec::new();
    // The name depends on the rules, so that those speak of the next tier by a name of their own until then.
    for (index, (tier, policies)) in tiers.iter().enumerate() {
        let next = match index + 1 < tiers.len() {
            true => Verdict::Goto(placeholder(index + 1)),
            false => Verdict::Return,
        };
        let mut rules = Vec::new();
        for policy in policies {
            for rule in policy.rules(direction).unwrap_or_default() {
                writer.rule(tier, policy, rule, &next, &mut rules, &mut denials);
            }
        }
        match tier.end {
            TierEnd::Pass => rules.push(Rule::new(vec![], next)),
            TierEnd::Deny => {
                let ids: Vec<String> = policies.iter().map(|policy| policy.id.to_string()).collect();
                let id = format!("t_{}", digest(&(direction, &tier.name, &ids)));
                let name = RuleName { tier: tier.name.clone(), policies: ids, rule: None };
                writer.names.insert(id.clone(), name);
                rules.extend(denial(settings, direction, &id));
            }
        }
        bodies.push(rules);
    }
    let side = if direction == Direction::Egress { "e" } else { "i" };
    let name = format!("{side}_{}", digest(&(&bodies, &denials)));
    let chain = |index: usize| if index == 0 { name.clone() } else { format!("{name}_{index}") };
    let mut chains: BTreeMap<String, Vec<Rule>> = denials;
    for (index, mut rules) in bodies.into_iter().enumerate() {
        for rule in &mut rules {
            if let Verdict::Goto(to) = &mut rule.verdict
                && let Some(next) = (1..tiers.len()).find(|next| *to == placeholder(*next))
            {
                *to = chain(next);
            }
        }
        chains.insert(chain(index), rules);
    }
    if tiers.is_empty() {
        chains.insert(name.clone(), vec![Rule::new(vec![], Verdict::Return)]);
    }
    Class { name, chains, sets: writer.sets, names: writer.names }
}

fn placeholder(tier: usize) -> String {
    format!("tier {tier}")
}

/// The rules that deny: told at most so many times a second, counted each time.
pub(super) fn denial(settings: &Settings, direction: Direction, id: &str) -> Vec<Rule> {
    let (side, counter) = match direction {
        Direction::Egress => (flowlog::Direction::Egress, "denied_egress"),
        Direction::Ingress => (flowlog::Direction::Ingress, "denied_ingress"),
    };
    let mut rules = refusal(settings, side, id, counter);
    for rule in rules.iter_mut().filter(|rule| is_told(rule)) {
        rule.matches.push(BEGUN);
    }
    rules
}

/// Of a flow its beginner's packets are told: an answer has source and destination the other way round.
const BEGUN: Match = Match::Direction(Way::Original);

fn is_told(rule: &Rule) -> bool {
    rule.statements.iter().any(|statement| matches!(statement, Statement::Log { .. }))
}

pub(super) fn refusal(settings: &Settings, side: flowlog::Direction, id: &str, counter: &str) -> Vec<Rule> {
    let (decision, verdict) = match settings.audit {
        true => (flowlog::Decision::WouldBeDenied, Verdict::Return),
        false => (flowlog::Decision::Denied, Verdict::Drop),
    };
    let mut rules: Vec<Rule> =
        log(&settings.log, settings.log.denied, decision, side, id).into_iter().collect();
    let statements = vec![Statement::Count(counter.to_owned())];
    rules.push(Rule { matches: vec![], statements, verdict });
    rules
}

fn log(
    logging: &Logging,
    rate: u32,
    decision: flowlog::Decision,
    side: flowlog::Direction,
    id: &str,
) -> Option<Rule> {
    let prefix = Label::new(decision, side, id)?.to_string();
    let statements =
        vec![Statement::Limit { rate, burst: rate.max(5) }, Statement::Log { prefix, group: logging.group }];
    (rate > 0).then(|| Rule { matches: vec![], statements, verdict: Verdict::Continue })
}

/// The same ports, with ranges that overlap or touch made one.
fn joined(ports: &BTreeSet<Port>) -> Vec<Port> {
    let mut all: Vec<Port> = Vec::new();
    // A set's order has ranges of a protocol one after the other, by where they begin.
    for port in ports {
        if let (PortMatch::Range(first, last), Some(Port { protocol, ports: PortMatch::Range(_, end) })) =
            (&port.ports, all.last_mut())
            && *protocol == port.protocol
            && u32::from(*first) <= u32::from(*end) + 1
        {
            *end = (*end).max(*last);
        } else {
            all.push(port.clone());
        }
    }
    all
}

struct Writer<'a> {
    world: &'a World,
    settings: &'a Settings,
    direction: Direction,
    sets: BTreeMap<String, SetUse>,
    names: BTreeMap<String, RuleName>,
}

impl Writer<'_> {
    fn rule(
        &mut self,
        tier: &Tier,
        policy: &Policy,
        rule: &PolicyRule,
        next: &Verdict,
        rules: &mut Vec<Rule>,
        denials: &mut BTreeMap<String, Vec<Rule>>,
    ) {
        let id = format!("r_{}", digest(&(self.direction, &policy.id, &rule.name)));
        let name = RuleName {
            tier: tier.name.clone(),
            policies: vec![policy.id.to_string()],
            rule: Some(rule.name.clone()),
        };
        self.names.insert(id.clone(), name);
        let side = match self.direction {
            Direction::Egress => flowlog::Direction::Egress,
            Direction::Ingress => flowlog::Direction::Ingress,
        };
        let logging = &self.settings.log;
        let told = |rate| log(logging, rate, flowlog::Decision::Allowed, side, &id);
        let (told, verdict) = match rule.action {
            Action::Allow => (told(logging.allowed), Verdict::Return),
            Action::Pass => (None, next.clone()),
            Action::Log => (told(logging.denied.max(1)), Verdict::Continue),
            Action::Deny => {
                let told = (self.settings.audit, &self.settings.log);
                let chain = format!("d_{}", digest(&(&id, told)));
                denials.insert(chain.clone(), denial(self.settings, self.direction, &id));
                (None, Verdict::Goto(chain))
            }
        };
        for matches in self.matches(rule, rule.action == Action::Allow) {
            if let Some(told) = &told {
                rules.push(Rule { matches: [matches.as_slice(), &[BEGUN]].concat(), ..told.clone() });
            }
            if verdict != Verdict::Continue {
                rules.push(Rule::new(matches, verdict.clone()));
            }
        }
    }

    /// All combinations under which the rule matches.
    fn matches(&mut self, rule: &PolicyRule, allows: bool) -> Vec<Vec<Match>> {
        let peers = match &rule.peers {
            None => vec![(None, vec![])],
            Some(peers) => {
                self.peers(peers, allows).into_iter().map(|(family, m)| (Some(family), vec![m])).collect()
            }
        };
        let mut all = Vec::new();
        for (family, peer) in peers {
            let Some(ports) = &rule.ports else {
                all.push(peer);
                continue;
            };
            for port in &joined(ports) {
                let protocol = port.protocol;
                match &port.ports {
                    PortMatch::Any => all.push([peer.as_slice(), &[Match::Protocol(protocol.0)]].concat()),
                    PortMatch::Range(first, last) => {
                        let ports = [Match::Protocol(protocol.0), Match::Ports(*first, *last)];
                        all.push([peer.as_slice(), &ports].concat());
                    }
                    PortMatch::Named(name) => {
                        let families =
                            Family::BOTH.into_iter().filter(|one| family.is_none_or(|family| family == *one));
                        for family in families {
                            let source = Source::Named(name.clone(), protocol);
                            let set = self.set("p", family, source, allows);
                            for way in [Way::Original, Way::Reply] {
                                let named = Match::Named { family, set: set.clone(), way };
                                all.push([peer.as_slice(), &[named]].concat());
                            }
                        }
                    }
                }
            }
        }
        all
    }

    fn peers(&mut self, peers: &BTreeSet<Peer>, allows: bool) -> Vec<(Family, Match)> {
        let end = match self.direction {
            Direction::Egress => End::Server,
            Direction::Ingress => End::Client,
        };
        let mut selectors = BTreeSet::new();
        let mut blocks: Vec<&Block> = Vec::new();
        let mut nets: BTreeSet<IpNet> = BTreeSet::new();
        for peer in peers {
            match peer {
                Peer::Pods(selector) => drop(selectors.insert(selector.clone())),
                Peer::Block(block) => blocks.push(block),
                Peer::Nodes(selector) => {
                    let is_meant =
                        |node: &&Node| node.labels.as_ref().is_some_and(|labels| selector.matches(labels));
                    let meant = self.world.nodes().values().filter(is_meant);
                    let addresses = meant.flat_map(|node| node.addresses.union(&node.status_addresses));
                    nets.extend(addresses.map(|address| IpNet::from(*address)));
                }
                Peer::Sites(sites) => {
                    let nodes = self.world.nodes().values();
                    for node in nodes.filter(|node| sites.contains(node.site.as_deref())) {
                        nets.extend(node.prefixes.iter().map(IpNet::trunc));
                        nets.extend(node.addresses.iter().map(|address| IpNet::from(*address)));
                    }
                }
            }
        }
        let mut all = Vec::new();
        for family in Family::BOTH {
            let mut look = |set: String, kind| {
                all.push((family, Match::In { family, end, set, kind, negated: false }));
            };
            if !selectors.is_empty() {
                look(self.set("s", family, Source::Pods(selectors.clone()), allows), Kind::Addresses);
            }
            let ranges = cover(blocks.iter().copied(), nets.iter().copied(), family);
            if !ranges.is_empty() {
                look(self.set("c", family, Source::Ranges(ranges), allows), Kind::Ranges);
            }
        }
        all
    }

    fn set(&mut self, letter: &str, family: Family, source: Source, allows: bool) -> String {
        let name = format!("{letter}_{}{}", digest(&source), family.suffix());
        let entry = self.sets.entry(name.clone()).or_insert(SetUse { family, source, allows });
        entry.allows &= allows;
        name
    }
}
