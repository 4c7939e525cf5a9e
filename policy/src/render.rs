//! The ruleset as text for `nft`: what an operator reads, and what tests hold the netlink messages against.
//!
//! The table line has no owner flags, so that `nft -f` and `nft --check` take it: an owner that is gone with its process is none.

use std::fmt::{self, Write as _};

use crate::ruleset::{
    Chain, Change, Element, End, Family, Hook, Kind, Match, Number, RATES_FOR, RATES_MOST, Rule, Ruleset,
    State, Statement, TABLE, Verdict, Way,
};

/// One of the two places in the table that a ruleset can stand in. Every set, map and chain has its slot before its name, so that a
/// whole ruleset can be built beside the one that is in force. Counters have not: they go on counting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// `a_`.
    #[default]
    A,
    /// `b_`.
    B,
}

impl Slot {
    /// What stands before every name.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::A => "a_",
            Self::B => "b_",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// A name of this slot as the kernel has it.
    pub fn name(self, name: &str) -> String {
        format!("{}{name}", self.prefix())
    }

    /// The slot of a name that the kernel has; `None` for one that is not of ours.
    pub fn of(name: &str) -> Option<Self> {
        [Self::A, Self::B].into_iter().find(|slot| name.starts_with(slot.prefix()))
    }
}

/// The whole, as a file for `nft -f`. Loaded over a table that stands already it adds to it.
pub fn ruleset(ruleset: &Ruleset, slot: Slot) -> String {
    let prefix = slot.prefix();
    let mut text = format!("table inet {TABLE} {{\n");
    for counter in &ruleset.counters {
        put(&mut text, format_args!("\tcounter {counter} {{\n\t}}\n\n"));
    }
    for (name, set) in &ruleset.sets {
        let body = Type(set.family, set.kind);
        put(&mut text, format_args!("\t{} {prefix}{name} {{\n\t\ttype {body}\n", noun(set.kind)));
        for line in flags(set.kind) {
            put(&mut text, format_args!("\t\t{line}\n"));
        }
        if !set.elements.is_empty() {
            let elements = Elements(set.elements.iter(), slot);
            put(&mut text, format_args!("\t\telements = {{ {elements} }}\n"));
        }
        put(&mut text, format_args!("\t}}\n\n"));
    }
    // Base chains at the end, as a reader expects; `nft` declares all chains before it adds any rule or element.
    let (base, other): (Vec<_>, Vec<_>) = ruleset.chains.iter().partition(|(_, chain)| chain.hook.is_some());
    for (name, chain) in other.into_iter().chain(base) {
        put(&mut text, format_args!("\tchain {prefix}{name} {{\n{}\t}}\n\n", Body(chain, slot)));
    }
    text.truncate(text.trim_end().len());
    text.push_str("\n}\n");
    text
}

/// Changes, as a file for `nft -f`: one transaction.
pub fn changes(changes: &[Change], slot: Slot) -> String {
    let mut text = String::new();
    for change in changes {
        one_change(&mut text, change, slot);
    }
    text
}

/// One rule, as it stands in a chain.
pub fn rule(rule: &Rule, slot: Slot) -> String {
    RuleText(rule, slot).to_string()
}

fn one_change(text: &mut String, change: &Change, slot: Slot) {
    let prefix = slot.prefix();
    match change {
        Change::AddCounter(name) => put(text, format_args!("add counter inet {TABLE} {name}\n")),
        Change::AddSet { name, family, kind } => {
            let flags: String = flags(*kind).into_iter().map(|line| format!(" {line};")).collect();
            let (noun, body) = (noun(*kind), Type(*family, *kind));
            put(text, format_args!("add {noun} inet {TABLE} {prefix}{name} {{ type {body};{flags} }}\n"));
        }
        Change::AddChain { name, hook: None } => {
            put(text, format_args!("add chain inet {TABLE} {prefix}{name}\n"));
        }
        Change::AddChain { name, hook: Some(hook) } => {
            let hook = hook_text(*hook);
            put(text, format_args!("add chain inet {TABLE} {prefix}{name} {{ {hook} }}\n"));
        }
        Change::AddRules { chain, rules } => {
            for rule in rules {
                let rule = RuleText(rule, slot);
                put(text, format_args!("add rule inet {TABLE} {prefix}{chain} {rule}\n"));
            }
        }
        Change::FlushChain(name) => put(text, format_args!("flush chain inet {TABLE} {prefix}{name}\n")),
        Change::AddElements { set, elements, .. } if !elements.is_empty() => {
            let elements = Elements(elements.iter(), slot);
            put(text, format_args!("add element inet {TABLE} {prefix}{set} {{ {elements} }}\n"));
        }
        Change::RemoveElements { set, elements, .. } if !elements.is_empty() => {
            let elements = Elements(elements.iter(), slot);
            put(text, format_args!("delete element inet {TABLE} {prefix}{set} {{ {elements} }}\n"));
        }
        Change::AddElements { .. } | Change::RemoveElements { .. } => {}
        Change::DeleteChain(name) => put(text, format_args!("delete chain inet {TABLE} {prefix}{name}\n")),
        Change::DeleteSet(name) => put(text, format_args!("delete set inet {TABLE} {prefix}{name}\n")),
    }
}

/// Writing to a string cannot fail.
fn put(text: &mut String, what: fmt::Arguments<'_>) {
    let _ = text.write_fmt(what);
}

fn noun(kind: Kind) -> &'static str {
    if kind == Kind::Chains { "map" } else { "set" }
}

/// What else is said of a set.
fn flags(kind: Kind) -> Vec<String> {
    match kind {
        Kind::Ranges | Kind::Numbers => vec!["flags interval".to_owned()],
        Kind::Rates => vec![
            format!("size {RATES_MOST}"),
            "flags dynamic,timeout".to_owned(),
            format!("timeout {RATES_FOR}s"),
        ],
        Kind::Addresses | Kind::Ports | Kind::Chains => vec![],
    }
}

fn hook_text(hook: Hook) -> &'static str {
    match hook {
        Hook::Input => "type filter hook input priority filter; policy accept;",
        Hook::Forward => "type filter hook forward priority filter; policy accept;",
        Hook::Output => "type filter hook output priority filter; policy accept;",
        Hook::Postrouting => "type filter hook postrouting priority filter; policy accept;",
        Hook::Sources => "type filter hook prerouting priority -310; policy accept;",
        Hook::RawInput => "type filter hook prerouting priority raw; policy accept;",
        Hook::RawOutput => "type filter hook output priority raw; policy accept;",
    }
}

/// The type of a set's keys.
struct Type(Family, Kind);

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.1 == Kind::Numbers {
            return f.write_str("inet_proto . inet_service");
        }
        f.write_str(if self.0 == Family::V4 { "ipv4_addr" } else { "ipv6_addr" })?;
        f.write_str(match self.1 {
            Kind::Addresses | Kind::Numbers | Kind::Rates => "",
            Kind::Ranges => " . inet_proto",
            Kind::Ports => " . inet_proto . inet_service",
            Kind::Chains => " : verdict",
        })
    }
}

struct Elements<I>(I, Slot);

impl<'a, I: Iterator<Item = &'a Element> + Clone> fmt::Display for Elements<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, element) in self.0.clone().enumerate() {
            f.write_str(if n == 0 { "" } else { ", " })?;
            match element {
                Element::Address(address) => write!(f, "{address}")?,
                // `nft` takes no range of one.
                Element::Range(first, last) if first == last => write!(f, "{first} . 0-255")?,
                Element::Range(first, last) => write!(f, "{first}-{last} . 0-255")?,
                Element::Port(address, protocol, port) => write!(f, "{address} . {protocol} . {port}")?,
                Element::Numbers(protocol, first, last) if first == last => {
                    write!(f, "{protocol} . {first}")?;
                }
                Element::Numbers(protocol, first, last) => write!(f, "{protocol} . {first}-{last}")?,
                Element::Chain(address, chain) => write!(f, "{address} : jump {}{chain}", self.1.prefix())?,
            }
        }
        Ok(())
    }
}

/// What is between the braces of a chain.
struct Body<'a>(&'a Chain, Slot);

impl fmt::Display for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(hook) = self.0.hook {
            writeln!(f, "\t\t{}", hook_text(hook))?;
        }
        self.0.rules.iter().try_for_each(|rule| writeln!(f, "\t\t{}", RuleText(rule, self.1)))
    }
}

struct RuleText<'a>(&'a Rule, Slot);

impl fmt::Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule { matches, statements, verdict } = self.0;
        let mut parts = Parts { f, first: true };
        matches.iter().try_for_each(|condition| match_text(&mut parts, condition, self.1))?;
        statements.iter().try_for_each(|statement| statement_text(&mut parts, statement, self.1))?;
        verdict_text(&mut parts, verdict, self.1)
    }
}

/// Parts of a line with single spaces between them.
struct Parts<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    first: bool,
}

impl Parts<'_, '_> {
    fn put(&mut self, part: fmt::Arguments<'_>) -> fmt::Result {
        if !std::mem::take(&mut self.first) {
            self.f.write_str(" ")?;
        }
        self.f.write_fmt(part)
    }
}

/// An address as `nft` names it. The addresses of a connection's tuples have their family in the name.
fn end_text(end: End, family: Family) -> &'static str {
    match (end, family) {
        (End::Source, Family::V4) => "ip saddr",
        (End::Source, Family::V6) => "ip6 saddr",
        (End::Destination, Family::V4) => "ip daddr",
        (End::Destination, Family::V6) => "ip6 daddr",
        (End::Client, Family::V4) => "ct original ip saddr",
        (End::Client, Family::V6) => "ct original ip6 saddr",
        (End::Server, Family::V4) => "ct reply ip saddr",
        (End::Server, Family::V6) => "ct reply ip6 saddr",
        (End::Dialled, Family::V4) => "ct original ip daddr",
        (End::Dialled, Family::V6) => "ct original ip6 daddr",
    }
}

fn number_text(number: Number) -> &'static str {
    match number {
        Number::ClientPort => "ct original proto-src",
        Number::ServerPort => "ct reply proto-src",
        Number::DialledPort | Number::Icmp => "ct original proto-dst",
        Number::SourcePort => "th sport",
        Number::DestinationPort => "th dport",
        Number::PacketIcmp => "@th,0,16",
    }
}

fn match_text(parts: &mut Parts<'_, '_>, condition: &Match, slot: Slot) -> fmt::Result {
    let prefix = slot.prefix();
    match condition {
        // A star at the end would stand for whatever follows.
        Match::Interface(name) => parts.put(format_args!("iifname \"{}\"", name.replace('*', "\\*"))),
        Match::Leaves(name) => parts.put(format_args!("oifname \"{}\"", name.replace('*', "\\*"))),
        Match::In { family, end, set, kind, negated } => {
            let end = end_text(*end, *family);
            let protocol = if *kind == Kind::Ranges { " . meta l4proto" } else { "" };
            let not = if *negated { "!= " } else { "" };
            parts.put(format_args!("{end}{protocol} {not}@{prefix}{set}"))
        }
        Match::Named { family, end, set, way, negated } => {
            let direction = if *way == Way::Original { "original" } else { "reply" };
            // What the client sends, comes from its port and goes to the server's.
            let port = if (*end == End::Client) == (*way == Way::Original) { "sport" } else { "dport" };
            let end = end_text(*end, *family);
            let not = if *negated { "!= " } else { "" };
            parts.put(format_args!(
                "ct direction {direction} {end} . meta l4proto . th {port} {not}@{prefix}{set}"
            ))
        }
        Match::Family(Family::V4) => parts.put(format_args!("meta nfproto ipv4")),
        Match::Family(Family::V6) => parts.put(format_args!("meta nfproto ipv6")),
        Match::Protocol(protocol) => parts.put(format_args!("meta l4proto {protocol}")),
        Match::NotProtocol(protocol) => parts.put(format_args!("meta l4proto != {protocol}")),
        Match::Numbers { number, first, last, negated } => {
            let number = number_text(*number);
            let not = if *negated { "!= " } else { "" };
            match first == last {
                true => parts.put(format_args!("{number} {not}{first}")),
                false => parts.put(format_args!("{number} {not}{first}-{last}")),
            }
        }
        Match::AnyOf { number, set } => {
            parts.put(format_args!("meta l4proto . {} @{prefix}{set}", number_text(*number)))
        }
        Match::State(state) => parts.put(format_args!("ct state {}", state_text(*state))),
        Match::Direction(Way::Original) => parts.put(format_args!("ct direction original")),
        Match::Direction(Way::Reply) => parts.put(format_args!("ct direction reply")),
        Match::NoWayBack => parts.put(format_args!("fib saddr . iif oif missing")),
        Match::ForAnother => parts.put(format_args!("fib daddr type unicast")),
        Match::FromThisHost => parts.put(format_args!("fib saddr type local")),
        Match::Translated => parts.put(format_args!("ct status dnat")),
        Match::MidStream => parts.put(format_args!("tcp flags & (fin|syn|rst|ack) != syn")),
        Match::Icmp6(first, last) if first == last => parts.put(format_args!("icmpv6 type {first}")),
        Match::Icmp6(first, last) => parts.put(format_args!("icmpv6 type {first}-{last}")),
        Match::Mark { mask, value } => parts.put(format_args!("ct mark & {mask:#010x} == {value:#010x}")),
    }
}

fn state_text(state: State) -> &'static str {
    match state {
        State::New => "new",
        State::Invalid => "invalid",
        State::Established => "established",
        State::Known => "established,related",
        State::Related => "related",
        State::Untracked => "untracked",
    }
}

fn statement_text(parts: &mut Parts<'_, '_>, statement: &Statement, slot: Slot) -> fmt::Result {
    match statement {
        Statement::LimitEach { family, end, set, rate, burst } => {
            let (end, prefix) = (end_text(*end, *family), slot.prefix());
            let limit = format_args!("limit rate {rate}/second burst {burst} packets");
            parts.put(format_args!("update @{prefix}{set} {{ {end} {limit} }}"))
        }
        Statement::Limit { rate, burst } => {
            parts.put(format_args!("limit rate {rate}/second burst {burst} packets"))
        }
        Statement::Log { prefix, group } => {
            // In quotes nothing can be escaped.
            let prefix = prefix.replace(['"', '\n'], "?");
            parts.put(format_args!("log prefix \"{prefix}\" group {group} snaplen 96 queue-threshold 16"))
        }
        Statement::Copy { group } => {
            parts.put(format_args!("log prefix \"copy\" group {group} snaplen 4096 queue-threshold 1"))
        }
        Statement::NoTrack => parts.put(format_args!("notrack")),
        Statement::Count(counter) => parts.put(format_args!("counter name \"{counter}\"")),
        Statement::SetMark { mask, value } => {
            parts.put(format_args!("ct mark set ct mark & {:#010x} | {value:#010x}", !mask))
        }
    }
}

fn verdict_text(parts: &mut Parts<'_, '_>, verdict: &Verdict, slot: Slot) -> fmt::Result {
    let prefix = slot.prefix();
    match verdict {
        Verdict::Continue => Ok(()),
        Verdict::Accept => parts.put(format_args!("accept")),
        Verdict::Drop => parts.put(format_args!("drop")),
        Verdict::Return => parts.put(format_args!("return")),
        Verdict::Jump(chain) => parts.put(format_args!("jump {prefix}{chain}")),
        Verdict::Goto(chain) => parts.put(format_args!("goto {prefix}{chain}")),
        Verdict::Lookup { family, end, map } => {
            parts.put(format_args!("{} vmap @{prefix}{map}", end_text(*end, *family)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_ruleset_is_an_empty_table() {
        assert_eq!(ruleset(&Ruleset::default(), Slot::A), "table inet sennit-policy {\n}\n");
    }

    #[test]
    fn a_slot_is_known_by_its_names_and_by_nothing_else() {
        assert_eq!(Slot::of(&Slot::B.name("x")), Some(Slot::B));
        assert_eq!(Slot::of(&Slot::A.other().other().name("b_")), Some(Slot::A));
        assert_eq!(Slot::of("__set0"), None);
        assert_eq!(Slot::of("forward"), None);
    }

    #[test]
    fn a_rule_is_its_conditions_then_its_statements_then_its_verdict() {
        let text = rule(
            &Rule {
                matches: vec![
                    Match::Protocol(6),
                    Match::Numbers { number: Number::ServerPort, first: 80, last: 90, negated: false },
                ],
                statements: vec![Statement::Count("denied".to_owned())],
                verdict: Verdict::Goto("x".to_owned()),
            },
            Slot::B,
        );
        assert_eq!(text, "meta l4proto 6 ct reply proto-src 80-90 counter name \"denied\" goto b_x");
    }

    #[test]
    fn a_range_of_one_address_is_written_as_the_address() {
        let one = "10.0.0.1".parse().unwrap();
        let change = Change::AddElements {
            set: "r".to_owned(),
            family: Family::V4,
            kind: Kind::Ranges,
            elements: vec![Element::Range(one, one)],
        };
        let text = changes(&[change], Slot::A);
        assert_eq!(text, "add element inet sennit-policy a_r { 10.0.0.1 . 0-255 }\n");
    }
}
