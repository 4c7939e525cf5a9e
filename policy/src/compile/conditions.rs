//! What a rule asks for, as conditions of nf_tables.
//!
//! There all conditions of a rule have to hold, so that each alternative is a rule of its own. Ports, names of ports, domain names,
//! pods and blocks of one condition are sets: the number of alternatives does not depend on how many of them a rule lists.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::class::{Resolves, SetUse, Source, Writer, set_name};
use super::ranges::cover;
use crate::model::{Block, Condition, Icmp, Peer, Port, PortMatch, Rule as PolicyRule, Side};
use crate::names::Domain;
use crate::object::Key;
use crate::protocol::Protocol;
use crate::ruleset::{Element, End, Family, Kind, Match, Number, State, Way};
use crate::tiers::Stage;
use crate::world::Node;

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

/// What a rule lists of ports.
#[derive(Default)]
struct Listed {
    /// Protocols of which every port is listed.
    whole: Vec<Protocol>,
    /// Protocol, first and last port.
    ranges: Vec<(Protocol, u16, u16)>,
    names: BTreeSet<(String, Protocol)>,
}

impl Listed {
    fn of(ports: &BTreeSet<Port>) -> Self {
        let mut listed = Self::default();
        for Port { protocol, ports } in joined(ports) {
            match ports {
                PortMatch::Any => listed.whole.push(protocol),
                PortMatch::Range(first, last) => listed.ranges.push((protocol, first, last)),
                PortMatch::Named(name) => drop(listed.names.insert((name, protocol))),
            }
        }
        let Self { whole, ranges, names } = &mut listed;
        ranges.retain(|(protocol, ..)| !whole.contains(protocol));
        names.retain(|(_, protocol)| !whole.contains(protocol));
        listed
    }
}

/// All domain names that peers list.
fn domains_of(peers: &BTreeSet<Peer>) -> BTreeSet<Domain> {
    peers.iter().filter_map(Peer::domains).flatten().cloned().collect()
}

const WAYS: [Way; 2] = [Way::Original, Way::Reply];

/// One way for a rule to match, of packets of this family or of both.
#[derive(Debug, Clone, Default)]
struct Alternative {
    family: Option<Family>,
    matches: Vec<Match>,
}

impl Alternative {
    fn of(family: Family, matches: Vec<Match>) -> Self {
        Self { family: Some(family), matches }
    }

    /// Both; `None` where no packet can be so.
    fn and(&self, other: &Self) -> Option<Self> {
        let family = match (self.family, other.family) {
            (Some(one), Some(two)) if one != two => return None,
            (one, two) => one.or(two),
        };
        let mut matches = self.matches.clone();
        for more in &other.matches {
            if !matches.contains(more) {
                matches.push(more.clone());
            }
        }
        Some(Self { family, matches })
    }
}

fn outside(within: &Match) -> Match {
    match within.clone() {
        Match::In { family, end, set, kind, negated } => {
            Match::In { family, end, set, kind, negated: !negated }
        }
        other => other,
    }
}

fn message(icmp: &Icmp, negated: bool, stage: Stage) -> Alternative {
    let number = if stage == Stage::Untracked { Number::PacketIcmp } else { Number::Icmp };
    let code = |any| icmp.code.unwrap_or(any);
    let of = |any| u16::from_be_bytes([icmp.kind, code(any)]);
    let numbers = Match::Numbers { number, first: of(0), last: of(u8::MAX), negated };
    let protocol = Match::Protocol(Protocol::icmp(icmp.family).0);
    Alternative::of(icmp.family, vec![Match::Family(icmp.family), protocol, numbers])
}

impl Writer<'_> {
    fn end_of(&self, side: Side) -> End {
        match (side, self.stage) {
            (Side::Source, Stage::Untracked) => End::Source,
            (Side::Destination, Stage::Untracked) => End::Destination,
            (Side::Source, _) => End::Client,
            (Side::Destination, Stage::BeforeNat) => End::Dialled,
            (Side::Destination, Stage::Tracked) => End::Server,
        }
    }

    fn number(&self, side: Side) -> Number {
        match (side, self.stage) {
            (Side::Source, Stage::Untracked) => Number::SourcePort,
            (Side::Destination, Stage::Untracked) => Number::DestinationPort,
            (Side::Source, _) => Number::ClientPort,
            (Side::Destination, Stage::BeforeNat) => Number::DialledPort,
            (Side::Destination, Stage::Tracked) => Number::ServerPort,
        }
    }

    fn numbers(&self, side: Side, first: u16, last: u16) -> Match {
        Match::Numbers { number: self.number(side), first, last, negated: false }
    }

    /// All combinations under which the rule matches.
    pub(super) fn matches(&mut self, rule: &PolicyRule, allows: bool) -> Vec<Vec<Match>> {
        let mut all = vec![Alternative::default()];
        for condition in &rule.when {
            let ways = self.condition(condition, allows);
            all = all.iter().flat_map(|one| ways.iter().filter_map(|way| one.and(way))).collect();
        }
        all.into_iter().map(|alternative| alternative.matches).collect()
    }

    fn condition(&mut self, condition: &Condition, allows: bool) -> Vec<Alternative> {
        let only = |matches| vec![Alternative { family: None, matches }];
        match condition {
            Condition::Family(family) => vec![Alternative::of(*family, vec![Match::Family(*family)])],
            Condition::Protocol(protocol) => only(vec![Match::Protocol(protocol.0)]),
            Condition::NotProtocol(protocol) => only(vec![Match::NotProtocol(protocol.0)]),
            Condition::Icmp(icmp) => vec![message(icmp, false, self.stage)],
            Condition::NotIcmp(icmp) => vec![message(icmp, true, self.stage)],
            Condition::Ports(side, ports) => self.ports(*side, ports, allows),
            Condition::NotPorts(side, protocol, ports) => self.not_ports(*side, *protocol, ports),
            Condition::Serves(service) => {
                self.named(Side::Destination, "v", &Source::Serves(service.clone()), allows)
            }
            Condition::Is(side, peers) => {
                let found = self.peers(*side, peers, allows);
                let alone = found.into_iter().map(|(family, set)| Alternative::of(family, vec![set]));
                let mut all: Vec<Alternative> = alone.collect();
                let domains = domains_of(peers);
                if !domains.is_empty() {
                    for family in Family::BOTH {
                        let [now, before] = self.domains(*side, &domains, family, allows);
                        all.push(Alternative::of(family, vec![now]));
                        // Whoever is connected stays so.
                        all.push(Alternative::of(family, vec![Match::State(State::Established), before]));
                    }
                }
                all
            }
            Condition::IsNot(side, peers) => {
                // Whoever comes into such a set loses what the rule gives.
                let allows = self.proposed;
                let found = self.peers(*side, peers, allows);
                let domains = domains_of(peers);
                let families = Family::BOTH.into_iter().map(|family| {
                    let names = (!domains.is_empty()).then(|| {
                        let [now, _] = self.domains(*side, &domains, family, allows);
                        outside(&now)
                    });
                    let sets = found.iter().filter(|(of, _)| *of == family).map(|(_, set)| outside(set));
                    let none = std::iter::once(Match::Family(family));
                    Alternative::of(family, none.chain(sets).chain(names).collect())
                });
                families.collect()
            }
        }
    }

    /// One of these ports. The number of alternatives does not depend on the number of ports.
    fn ports(&mut self, side: Side, ports: &BTreeSet<Port>, allows: bool) -> Vec<Alternative> {
        let only = |matches| Alternative { family: None, matches };
        let Listed { whole, ranges, names } = Listed::of(ports);
        let mut all: Vec<Alternative> =
            whole.iter().map(|protocol| only(vec![Match::Protocol(protocol.0)])).collect();
        all.extend(self.ranges(side, &ranges).into_iter().map(only));
        if !names.is_empty() {
            all.extend(self.named(side, "p", &Source::Named(names), allows));
        }
        all
    }

    /// Protocol and number are in one of these ranges, which neither overlap nor touch: one way for each protocol.
    fn ranges(&mut self, side: Side, ranges: &[(Protocol, u16, u16)]) -> Vec<Vec<Match>> {
        let same = |one: &(Protocol, u16, u16), two: &(Protocol, u16, u16)| one.0 == two.0;
        let ways = ranges.chunk_by(same).map(|ranges| {
            let protocol = ranges.iter().map(|(protocol, ..)| Match::Protocol(protocol.0)).take(1);
            let numbers = match ranges {
                [(_, 0, u16::MAX)] => None,
                [(_, first, last)] => Some(self.numbers(side, *first, *last)),
                many => {
                    let elements = many
                        .iter()
                        .map(|(protocol, first, last)| Element::Numbers(protocol.0, *first, *last));
                    let elements = elements.collect();
                    // A set of ports has no family, and never changes.
                    let set = self.set("q", Family::V4, Source::Numbers(elements), true);
                    Some(Match::AnyOf { number: self.number(side), set })
                }
            };
            protocol.chain(numbers).collect()
        });
        ways.collect()
    }

    /// An end whose address, protocol and port are in a set.
    fn named(&mut self, side: Side, letter: &str, source: &Source, allows: bool) -> Vec<Alternative> {
        let mut all = Vec::new();
        for family in Family::BOTH {
            let set = self.set(letter, family, source.clone(), allows);
            for way in WAYS {
                let (set, end) = (set.clone(), self.end_of(side));
                let named = Match::Named { family, end, set, way, negated: false };
                all.push(Alternative::of(family, vec![named]));
            }
        }
        all
    }

    /// All other numbers of the protocol.
    fn not_ports(
        &mut self,
        side: Side,
        protocol: Option<Protocol>,
        none: &BTreeSet<PortMatch>,
    ) -> Vec<Alternative> {
        let Some(protocol) = protocol else { return self.not_named(side, none) };
        let of_protocol = |ports: &PortMatch| Port { protocol, ports: ports.clone() };
        let Listed { whole, ranges, names } = Listed::of(&none.iter().map(of_protocol).collect());
        if !whole.is_empty() {
            return Vec::new();
        }
        let (mut others, mut next) = (Vec::new(), Some(0_u16));
        for (_, first, last) in ranges {
            let before = next.filter(|next| *next < first);
            others.extend(before.map(|next| (protocol, next, first.saturating_sub(1))));
            next = last.checked_add(1);
        }
        others.extend(next.map(|next| (protocol, next, u16::MAX)));
        let numbers = self.ranges(side, &others);
        if names.is_empty() {
            return numbers.into_iter().map(|matches| Alternative { family: None, matches }).collect();
        }
        let mut all = Vec::new();
        for none in self.none_named(side, names) {
            let each = numbers
                .iter()
                .filter_map(|numbers| none.and(&Alternative { family: None, matches: numbers.clone() }));
            all.extend(each);
        }
        all
    }

    /// Whatever has none of these names, of any protocol: of one without ports nothing has a name.
    fn not_named(&mut self, side: Side, none: &BTreeSet<PortMatch>) -> Vec<Alternative> {
        let names = none.iter().filter_map(|port| match port {
            PortMatch::Named(name) => Some(name),
            PortMatch::Any | PortMatch::Range(..) => None,
        });
        let of = |name: &String| Protocol::WITH_PORTS.map(|protocol| (name.clone(), protocol));
        let others = Protocol::WITH_PORTS.map(|protocol| Match::NotProtocol(protocol.0));
        let mut all = vec![Alternative { family: None, matches: others.into() }];
        all.extend(self.none_named(side, names.flat_map(of).collect()));
        all
    }

    fn none_named(&mut self, side: Side, names: BTreeSet<(String, Protocol)>) -> Vec<Alternative> {
        let allows = self.proposed;
        let mut all = Vec::new();
        for family in Family::BOTH {
            let set = self.set("p", family, Source::Named(names.clone()), allows);
            for way in WAYS {
                let (set, end) = (set.clone(), self.end_of(side));
                let names = Match::Named { family, end, set, way, negated: true };
                all.push(Alternative::of(family, vec![names]));
            }
        }
        all
    }

    fn peers(&mut self, side: Side, peers: &BTreeSet<Peer>, allows: bool) -> Vec<(Family, Match)> {
        let end = self.end_of(side);
        let mut selectors = BTreeSet::new();
        let mut blocks: Vec<&Block> = Vec::new();
        let mut nets: BTreeSet<IpNet> = BTreeSet::new();
        let mut services: BTreeSet<&Key> = BTreeSet::new();
        let mut networks = BTreeSet::new();
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
                Peer::Domains(_) => {}
                Peer::Service(service) => drop(services.insert(service)),
                Peer::Networks(selector) => drop(networks.insert(selector.clone())),
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
            for service in &services {
                let source = Source::Service((*service).clone());
                look(self.set("a", family, source, allows), Kind::Addresses);
            }
            if !networks.is_empty() {
                look(self.set("w", family, Source::Networks(networks.clone()), allows), Kind::Ranges);
            }
            let ranges = cover(blocks.iter().copied(), nets.iter().copied(), family);
            if !ranges.is_empty() {
                look(self.set("c", family, Source::Ranges(ranges), allows), Kind::Ranges);
            }
        }
        all
    }

    /// What these names have, and what they have no more.
    fn domains(
        &mut self,
        side: Side,
        domains: &BTreeSet<Domain>,
        family: Family,
        allows: bool,
    ) -> [Match; 2] {
        [Resolves::Now, Resolves::Before].map(|resolves| {
            let set = self.set("n", family, Source::Domains(domains.clone(), resolves), allows);
            Match::In { family, end: self.end_of(side), set, kind: Kind::Addresses, negated: false }
        })
    }

    fn set(&mut self, letter: &str, family: Family, source: Source, allows: bool) -> String {
        let name = set_name(letter, &source, family);
        if let Some(namespace) = &self.namespace {
            self.owned.entry(namespace.clone()).or_default().insert(name.clone());
        }
        let entry = self.sets.entry(name.clone()).or_insert(SetUse { family, source, allows });
        entry.allows &= allows;
        name
    }
}
