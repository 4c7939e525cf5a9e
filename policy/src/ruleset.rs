//! The nftables ruleset as data: what a compiled policy is made of, and the changes that lead from one to another.
//!
//! It knows exactly the expressions that policies need, so that three things can be done with it and compared: rendered as text for
//! `nft`, written to the kernel as netlink messages, and interpreted by tests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

pub use crate::protocol::Family;

/// The one nftables table that holds policy, family `inet`.
pub const TABLE: &str = "sennit-policy";

/// What a set is keyed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Single addresses, in a hash table.
    Addresses,
    /// Ranges of addresses. A second field of the key, the protocol, of which all values are in, makes the kernel take
    /// its `pipapo` set instead of a tree.
    Ranges,
    /// Address, protocol and port.
    Ports,
    /// Protocol and ranges of ports. Belongs to no family; its family is [`Family::V4`] by convention.
    Numbers,
    /// Address to the chain that is jumped to.
    Chains,
    /// Addresses with a rate each, which rules put in and which leave by themselves: [`Statement::LimitEach`].
    Rates,
}

impl Kind {
    /// Whether the kernel keeps its elements as intervals, in a `pipapo` set.
    pub fn is_interval(self) -> bool {
        matches!(self, Self::Ranges | Self::Numbers)
    }
}
/// The most addresses in a set of [`Kind::Rates`].
pub const RATES_MOST: u32 = 16_384;
/// Seconds after which an address of which nothing came leaves a set of [`Kind::Rates`].
pub const RATES_FOR: u32 = 10;

/// One element of a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// Of [`Kind::Addresses`].
    Address(IpAddr),
    /// Of [`Kind::Ranges`]: first and last.
    Range(IpAddr, IpAddr),
    /// Of [`Kind::Ports`]: address, IP protocol number, port.
    Port(IpAddr, u8, u16),
    /// Of [`Kind::Numbers`]: IP protocol number, first and last port.
    Numbers(u8, u16, u16),
    /// Of [`Kind::Chains`]: address and chain.
    Chain(IpAddr, String),
}

/// A set or, of kind [`Kind::Chains`], a verdict map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Of its addresses.
    pub family: Family,
    /// What it is keyed by.
    pub kind: Kind,
    /// What is in it; ranges neither overlap nor touch.
    pub elements: BTreeSet<Element>,
}

/// Whose address is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// The packet's source (`ip saddr`).
    Source,
    /// The packet's destination (`ip daddr`).
    Destination,
    /// Who began the connection, before source NAT (`ct original ip saddr`).
    Client,
    /// Who was reached, behind destination NAT (`ct reply ip saddr`).
    Server,
    /// Whom it was begun towards, before destination NAT (`ct original ip daddr`).
    Dialled,
}

/// Which way a packet of a connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From the client: the server's port is the packet's destination port.
    Original,
    /// From the server: it is the source port.
    Reply,
}

/// A number of a connection's first packet, as conntrack keeps it, or of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Number {
    /// The client's port, before source NAT (`ct original proto-src`).
    ClientPort,
    /// The server's port, behind destination NAT (`ct reply proto-src`).
    ServerPort,
    /// The port that it was begun towards, before destination NAT (`ct original proto-dst`).
    DialledPort,
    /// ICMP's type, times 256, and code (`ct original proto-dst`).
    Icmp,
    /// The packet's source port (`th sport`).
    SourcePort,
    /// The packet's destination port (`th dport`).
    DestinationPort,
    /// ICMP's type, times 256, and code, of the packet (`@th,0,16`).
    PacketIcmp,
}

/// States of conntrack that a rule may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// `new`.
    New,
    /// `invalid`.
    Invalid,
    /// `established`.
    Established,
    /// `established` or `related`.
    Known,
    /// `related`.
    Related,
    /// `untracked`: conntrack was told to, or does so by itself with neighbour discovery.
    Untracked,
}

/// One condition; a rule's conditions all have to hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Match {
    /// The packet came in by this interface.
    Interface(String),
    /// The packet goes out by this interface.
    Leaves(String),
    /// An address is in a set of kind [`Kind::Addresses`] or [`Kind::Ranges`], or is not. Never holds for packets of the other family.
    In {
        /// Of the set.
        family: Family,
        /// Whose address.
        end: End,
        /// The set's name.
        set: String,
        /// The set's kind.
        kind: Kind,
        /// Whether it must not be in.
        negated: bool,
    },
    /// Address, protocol and port of an end, [`End::Client`] or [`End::Server`], are in a set of kind [`Kind::Ports`], or are not, for
    /// packets of one way.
    Named {
        /// Of the set.
        family: Family,
        /// Whose address and port.
        end: End,
        /// The set's name.
        set: String,
        /// Which packets.
        way: Way,
        /// Whether they must not be in.
        negated: bool,
    },
    /// The packet is of this family (`meta nfproto`).
    Family(Family),
    /// The IP protocol, behind extension headers, is this one.
    Protocol(u8),
    /// It is not.
    NotProtocol(u8),
    /// A number of the connection, after a [`Match::Protocol`] that has it, is one of these, or is not.
    Numbers {
        /// Which.
        number: Number,
        /// The first.
        first: u16,
        /// The last.
        last: u16,
        /// Whether it must be none of them.
        negated: bool,
    },
    /// Protocol and number are in a set of kind [`Kind::Numbers`], after a [`Match::Protocol`] that has it: else `nft` does not know
    /// what type the number has.
    AnyOf {
        /// Which number: a port.
        number: Number,
        /// The set's name.
        set: String,
    },
    /// Conntrack's state.
    State(State),
    /// Which way of its connection the packet goes.
    Direction(Way),
    /// No route leads back to its source by the interface that it came in by (`fib saddr . iif oif missing`).
    NoWayBack,
    /// It is for somebody else, by a route (`fib daddr type unicast`): neither for this host, nor for many.
    ForAnother,
    /// It is from an address of this host (`fib saddr type local`).
    FromThisHost,
    /// Its connection's destination was translated (`ct status dnat`).
    Translated,
    /// A TCP packet that does not open a connection.
    MidStream,
    /// ICMPv6 of these types, first to last.
    Icmp6(u8, u8),
    /// `ct mark & mask == value`.
    Mark {
        /// The bits that are ours.
        mask: u32,
        /// What they have to be.
        value: u32,
    },
}

/// Something that a rule does on the way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Statement {
    /// Goes on only so many times a second.
    Limit {
        /// Packets per second.
        rate: u32,
        /// Packets at once beyond that.
        burst: u32,
    },
    /// Goes on only so many times a second for each address of an end. Where the set is full, it does not go on for addresses that
    /// are not in it.
    LimitEach {
        /// Of the set.
        family: Family,
        /// Whose address.
        end: End,
        /// The set, of kind [`Kind::Rates`].
        set: String,
        /// Packets per second.
        rate: u32,
        /// Packets at once beyond that; refilled before the address leaves the set.
        burst: u32,
    },
    /// Tells listeners of an NFLOG group.
    Log {
        /// What stands before each message, at most 127 bytes.
        prefix: String,
        /// The group.
        group: u16,
    },
    /// Copies the packet, as a whole and at once, to listeners of an NFLOG group.
    Copy {
        /// The group.
        group: u16,
    },
    /// Conntrack shall know nothing of the packet (`notrack`).
    NoTrack,
    /// Counts in a counter of the table.
    Count(String),
    /// `ct mark set (ct mark & ~mask) | value`.
    SetMark {
        /// The bits that are ours.
        mask: u32,
        /// What they become.
        value: u32,
    },
}

/// How a rule ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Nothing: the next rule.
    Continue,
    /// The packet passes this hook.
    Accept,
    /// It is gone.
    Drop,
    /// Back to where the chain was jumped from.
    Return,
    /// To a chain and, at its end, back.
    Jump(String),
    /// To a chain for good.
    Goto(String),
    /// To the chain that a map has for an address; without one, the next rule.
    Lookup {
        /// Of the map.
        family: Family,
        /// Whose address.
        end: End,
        /// The map, of kind [`Kind::Chains`].
        map: String,
    },
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// When.
    pub matches: Vec<Match>,
    /// What on the way.
    pub statements: Vec<Statement>,
    /// How it ends.
    pub verdict: Verdict,
}

impl Rule {
    /// A rule without statements.
    pub fn new(matches: Vec<Match>, verdict: Verdict) -> Self {
        Self { matches, statements: Vec::new(), verdict }
    }
}

/// Where packets come into a base chain; what comes to its end is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// To outside, when all know by which interface.
    Postrouting,
    /// From outside, before all others (priority -310).
    Sources,
    /// From outside, before conntrack (priority `raw`).
    RawInput,
    /// From this host, before conntrack (priority `raw`).
    RawOutput,
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Of a base chain.
    pub hook: Option<Hook>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// All that is in the table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Names of its counters.
    pub counters: BTreeSet<String>,
    /// Its sets and maps by name.
    pub sets: BTreeMap<String, Set>,
    /// Its chains by name.
    pub chains: BTreeMap<String, Chain>,
}

/// One change of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A counter more.
    AddCounter(String),
    /// An empty set more.
    AddSet {
        /// Its name.
        name: String,
        /// Of its addresses.
        family: Family,
        /// What it is keyed by.
        kind: Kind,
    },
    /// An empty chain more.
    AddChain {
        /// Its name.
        name: String,
        /// Of a base chain.
        hook: Option<Hook>,
    },
    /// Rules at the end of a chain.
    AddRules {
        /// The chain.
        chain: String,
        /// The rules.
        rules: Vec<Rule>,
    },
    /// A chain loses all of its rules.
    FlushChain(String),
    /// Elements more.
    AddElements {
        /// The set.
        set: String,
        /// Of its addresses.
        family: Family,
        /// What it is keyed by.
        kind: Kind,
        /// Which.
        elements: Vec<Element>,
    },
    /// Elements less.
    RemoveElements {
        /// The set.
        set: String,
        /// Of its addresses.
        family: Family,
        /// What it is keyed by.
        kind: Kind,
        /// Which.
        elements: Vec<Element>,
    },
    /// A chain less, which nothing leads to any more.
    DeleteChain(String),
    /// A set less, which no rule looks into any more.
    DeleteSet(String),
}

impl Ruleset {
    /// The changes that lead from this ruleset to `other`, in an order in which the kernel takes them: what is new before what
    /// leads there, what is led to after.
    pub fn changes_to(&self, other: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        changes.extend(other.counters.difference(&self.counters).cloned().map(Change::AddCounter));
        let fresh = |name: &String| !self.sets.contains_key(name);
        for (name, set) in other.sets.iter().filter(|(name, _)| fresh(name)) {
            changes.push(Change::AddSet { name: name.clone(), family: set.family, kind: set.kind });
        }
        for (name, chain) in other.chains.iter().filter(|(name, _)| !self.chains.contains_key(*name)) {
            changes.push(Change::AddChain { name: name.clone(), hook: chain.hook });
        }
        for (name, set) in &other.sets {
            let before = self.sets.get(name).map(|set| &set.elements);
            let nothing = BTreeSet::new();
            let before = before.unwrap_or(&nothing);
            let (set_name, family, kind) = (name.clone(), set.family, set.kind);
            let gone: Vec<Element> = before.difference(&set.elements).cloned().collect();
            if !gone.is_empty() {
                changes.push(Change::RemoveElements { set: set_name.clone(), family, kind, elements: gone });
            }
            let added: Vec<Element> = set.elements.difference(before).cloned().collect();
            if !added.is_empty() {
                changes.push(Change::AddElements { set: set_name, family, kind, elements: added });
            }
        }
        for (name, chain) in &other.chains {
            let before = self.chains.get(name).map(|chain| chain.rules.as_slice()).unwrap_or_default();
            if before == chain.rules {
                continue;
            }
            if !before.is_empty() {
                changes.push(Change::FlushChain(name.clone()));
            }
            changes.push(Change::AddRules { chain: name.clone(), rules: chain.rules.clone() });
        }
        // Maps of ours are never deleted while chains they lead to are; a chain may lead to another that goes too.
        let gone: Vec<&String> =
            self.chains.keys().filter(|name| !other.chains.contains_key(*name)).collect();
        changes.extend(gone.iter().map(|name| Change::FlushChain((*name).clone())));
        changes.extend(gone.into_iter().map(|name| Change::DeleteChain(name.clone())));
        let gone = self.sets.keys().filter(|name| !other.sets.contains_key(*name));
        changes.extend(gone.map(|name| Change::DeleteSet(name.clone())));
        changes
    }

    /// Makes the changes here.
    pub fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::AddCounter(name) => {
                    self.counters.insert(name.clone());
                }
                Change::AddSet { name, family, kind } => {
                    let set = Set { family: *family, kind: *kind, elements: BTreeSet::new() };
                    self.sets.entry(name.clone()).or_insert(set);
                }
                Change::AddChain { name, hook } => {
                    let chain = Chain { hook: *hook, rules: Vec::new() };
                    self.chains.entry(name.clone()).or_insert(chain);
                }
                Change::AddRules { chain, rules } => {
                    if let Some(chain) = self.chains.get_mut(chain) {
                        chain.rules.extend(rules.iter().cloned());
                    }
                }
                Change::FlushChain(name) => {
                    if let Some(chain) = self.chains.get_mut(name) {
                        chain.rules.clear();
                    }
                }
                Change::AddElements { set, elements, .. } => {
                    if let Some(set) = self.sets.get_mut(set) {
                        set.elements.extend(elements.iter().cloned());
                    }
                }
                Change::RemoveElements { set, elements, .. } => {
                    if let Some(set) = self.sets.get_mut(set) {
                        elements.iter().for_each(|element| {
                            set.elements.remove(element);
                        });
                    }
                }
                Change::DeleteChain(name) => {
                    self.chains.remove(name);
                }
                Change::DeleteSet(name) => {
                    self.sets.remove(name);
                }
            }
        }
    }
}
