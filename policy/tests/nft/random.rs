//! Random rulesets that the kernel takes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use mesh_policy::ruleset::{
    Chain, Element, End, Family, Hook, Kind, Match, Number, Rule, Ruleset, Set, State, Statement, Verdict,
    Way,
};

/// A linear congruential generator (Knuth's MMIX).
pub(crate) struct Random(u64);

const KINDS: [(&str, Kind); 5] = [
    ("a", Kind::Addresses),
    ("r", Kind::Ranges),
    ("p", Kind::Ports),
    ("n", Kind::Numbers),
    ("m", Kind::Chains),
];
const ENDS: [End; 5] = [End::Source, End::Destination, End::Client, End::Server, End::Dialled];
/// More than enough for chains to come and go.
const CHAINS: u64 = 6;

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()].clone()
    }

    fn address(family: Family, n: u64) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::from(0x0a00_0000 + u32::try_from(n).unwrap()).into(),
            Family::V6 => Ipv6Addr::from((0xfd00_u128 << 112) + u128::from(n)).into(),
        }
    }

    /// Sets of a few names that come and go, chains of which each leads to later ones only, and two base chains.
    pub(crate) fn ruleset(&mut self) -> Ruleset {
        let counters: BTreeSet<String> = (0..3).map(|n| format!("c{n}")).collect();
        let mut names: Vec<String> = (0..CHAINS).map(|n| format!("x{n}")).collect();
        names.retain(|_| self.below(3) > 0);
        let mut sets = BTreeMap::new();
        for family in Family::BOTH {
            for (name, kind) in KINDS {
                for n in 0..2 {
                    // Maps stay: chains that they lead to go before sets do.
                    if kind == Kind::Chains || self.below(3) > 0 {
                        let elements = self.elements(family, kind, &names);
                        sets.insert(format!("{name}{n}_{}", family.suffix()), Set { family, kind, elements });
                    }
                }
            }
        }
        let mut chains = BTreeMap::new();
        for (n, name) in names.iter().enumerate() {
            let rules = self.rules(&sets, &names[n + 1..], None);
            chains.insert(name.clone(), Chain { hook: None, rules });
        }
        for (name, hook) in [("in", Hook::Input), ("fwd", Hook::Forward), ("out", Hook::Output)] {
            let rules = self.rules(&sets, &names, Some(hook));
            chains.insert(name.to_owned(), Chain { hook: Some(hook), rules });
        }
        Ruleset { counters, sets, chains }
    }

    fn elements(&mut self, family: Family, kind: Kind, chains: &[String]) -> BTreeSet<Element> {
        let count = self.below(8);
        let mut next = 0;
        let mut elements = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for _ in 0..count {
            let at = Self::address(family, self.below(20));
            match kind {
                Kind::Addresses => elements.insert(Element::Address(at)),
                Kind::Ports => {
                    let (protocol, port) = (self.one_of(&[6, 17, 132]), self.below(65536));
                    elements.insert(Element::Port(at, protocol, u16::try_from(port).unwrap()))
                }
                Kind::Ranges => {
                    let first = next + self.below(5);
                    let last = first + self.below(300);
                    next = last + 2;
                    elements.insert(Element::Range(Self::address(family, first), Self::address(family, last)))
                }
                Kind::Numbers => {
                    let first = next + self.below(5);
                    let last = first + self.below(300);
                    next = last + 2;
                    let port = |n: u64| u16::try_from(n).unwrap();
                    elements.insert(Element::Numbers(self.one_of(&[6, 17, 132]), port(first), port(last)))
                }
                Kind::Rates => false,
                Kind::Chains if chains.is_empty() || !seen.insert(at) => false,
                Kind::Chains => elements.insert(Element::Chain(at, self.one_of(chains))),
            };
        }
        elements
    }

    fn rules(&mut self, sets: &BTreeMap<String, Set>, chains: &[String], hook: Option<Hook>) -> Vec<Rule> {
        (0..self.below(5)).map(|_| self.rule(sets, chains, hook)).collect()
    }

    fn rule(&mut self, sets: &BTreeMap<String, Set>, chains: &[String], hook: Option<Hook>) -> Rule {
        let family = self.one_of(&Family::BOTH);
        let mut matches = Vec::new();
        if self.below(3) == 0 {
            let name = format!("if{}", self.below(3));
            // What comes in has not been routed yet.
            matches.push(match hook {
                Some(Hook::Output) => Match::Leaves(name),
                _ => Match::Interface(name),
            });
        }
        let of_family: Vec<_> = sets.iter().filter(|(_, set)| set.family == family).collect();
        for _ in 0..self.below(3) {
            let (name, set) = self.one_of(&of_family);
            let (end, negated, name) = (self.one_of(&ENDS), self.below(2) == 0, name.clone());
            let condition = match set.kind {
                kind @ (Kind::Addresses | Kind::Ranges) => {
                    Match::In { family, end, set: name, kind, negated }
                }
                Kind::Ports => {
                    let way = self.one_of(&[Way::Original, Way::Reply]);
                    let end = self.one_of(&[End::Client, End::Server]);
                    Match::Named { family, end, set: name, way, negated }
                }
                // `nft` takes one protocol in a rule.
                Kind::Numbers if matches.iter().any(|one| matches!(one, Match::Protocol(_))) => {
                    Match::State(State::New)
                }
                Kind::Numbers => {
                    let all = [Number::ServerPort, Number::ClientPort, Number::DialledPort];
                    matches.push(Match::Protocol(self.one_of(&[6, 17])));
                    Match::AnyOf { number: self.one_of(&all), set: name }
                }
                Kind::Chains | Kind::Rates => Match::State(State::New),
            };
            matches.push(condition);
        }
        let has_protocol = matches.iter().any(|one| matches!(one, Match::Protocol(_)));
        match self.below(5) {
            _ if has_protocol => {}
            0 => {
                let first = u16::try_from(self.below(1000)).unwrap();
                let last = first + u16::try_from(self.below(3)).unwrap();
                let negated = self.below(3) == 0;
                let mut put = |protocol, number| {
                    matches
                        .extend([Match::Protocol(protocol), Match::Numbers { number, first, last, negated }])
                };
                match self.below(4) {
                    0 => put(self.one_of(&[6, 17, 132]), Number::ServerPort),
                    2 => put(self.one_of(&[6, 17, 132]), Number::DialledPort),
                    1 => put(self.one_of(&[6, 17, 132]), Number::ClientPort),
                    _ => put(self.one_of(&[1, 58]), Number::Icmp),
                }
            }
            1 => matches.push(Match::MidStream),
            2 if family == Family::V6 => matches.push(Match::Icmp6(133, 137)),
            3 => matches.extend([Match::Protocol(6), Match::MidStream]),
            _ if self.below(2) == 0 => matches.extend([Match::NotProtocol(17), Match::Family(family)]),
            _ => {}
        }
        if self.below(4) == 0 {
            matches.push(Match::Mark { mask: 0xff00, value: 0x100 });
        }
        let statements = match self.below(4) {
            0 => vec![Statement::Count(format!("c{}", self.below(3)))],
            1 if self.below(2) == 0 => vec![Statement::Copy { group: 4 }],
            1 => vec![Statement::SetMark { mask: 0xff00, value: 0x200 }],
            2 => vec![
                Statement::Limit { rate: 10, burst: 5 },
                Statement::Log { prefix: "v1|D|7".to_owned(), group: 3 },
            ],
            _ => vec![],
        };
        let maps: Vec<_> =
            of_family.iter().filter(|(_, set)| set.kind == Kind::Chains).map(|(name, _)| *name).collect();
        let verdict = match self.below(6) {
            0 if hook.is_some() => {
                Verdict::Lookup { family, end: self.one_of(&ENDS), map: self.one_of(&maps).clone() }
            }
            1 if !chains.is_empty() => Verdict::Jump(self.one_of(chains)),
            2 if !chains.is_empty() => Verdict::Goto(self.one_of(chains)),
            3 => Verdict::Drop,
            4 => Verdict::Return,
            5 if !statements.is_empty() => Verdict::Continue,
            _ => Verdict::Accept,
        };
        Rule { matches, statements, verdict }
    }
}
