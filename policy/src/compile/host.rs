//! Chains by which a node is judged beside its pods: what is for it, from it, and through it.

use std::collections::{BTreeMap, BTreeSet};

use super::Settings;
use super::base::{STAMP, goto, local_set, not_believed, within};
use super::class::{UNTRACKED, digest};
use super::node::{Anybody, Sides, Untracked};
use crate::interface::Interface;
use crate::model::Direction;
use crate::protocol::Protocol;
use crate::ruleset::{Chain, End, Family, Hook, Kind, Match, Number, Rule, State, Statement, Verdict, Way};

/// Chain of what always reaches a protected node.
const FAILSAFE_INPUT: &str = "failsafe_input";
/// Chain of what a protected node always reaches.
const FAILSAFE_OUTPUT: &str = "failsafe_output";
/// Chain of what the node forwards, by where it comes in.
pub(super) const FORWARDED_IN: &str = "forwarded_in";
/// Chain of the same by where it goes out.
pub(super) const FORWARDED_OUT: &str = "forwarded_out";

/// All of them, with `tunnel_input`, which every node has.
pub(super) fn chains(settings: &Settings, anybody: &Anybody) -> Vec<(String, Chain)> {
    let plain = |name: &str, rules| (name.to_owned(), Chain { hook: None, rules });
    let mut all = vec![plain("tunnel_input", tunnel_input(settings, anybody))];
    if anybody.judges_forwarded() {
        let sides = &anybody.forwarded;
        all.push(plain(FORWARDED_IN, forwarded(sides, End::Client, Way::Original, |sides| &sides.ingress)));
        all.push(plain(FORWARDED_OUT, forwarded(sides, End::Server, Way::Reply, |sides| &sides.egress)));
    }
    if !anybody.is_protected() {
        return all;
    }
    let (inbound, outbound) = (&settings.failsafe.inbound, &settings.failsafe.outbound);
    all.push(plain("host_output", host_output(anybody)));
    all.push(plain("host_input", host_input(anybody)));
    for (interface, local) in &anybody.interfaces {
        let [bare_in, bare_out] = behind(anybody, Some(*interface));
        let input = judged(FAILSAFE_INPUT, bare_in, &local.ingress, &local.egress);
        let output = judged(FAILSAFE_OUTPUT, bare_out, &local.egress, &local.ingress);
        all.push(plain(&of_interface("host_input", interface), input));
        all.push(plain(&of_interface("host_output", interface), output));
    }
    all.push(plain(FAILSAFE_INPUT, failsafe(settings, inbound, outbound, Hook::Input)));
    all.push(plain(FAILSAFE_OUTPUT, failsafe(settings, outbound, inbound, Hook::Output)));
    if !anybody.untracked.is_empty() {
        all.extend(without_conntrack(settings, &anybody.untracked));
    }
    all
}

/// Of a protected node: what has to come through whatever policies say. `begun`: ports towards which a flow in this hook's direction is
/// begun; `answered`: those from which answers come back in it.
fn failsafe(
    settings: &Settings,
    begun: &BTreeSet<(Protocol, u16)>,
    answered: &BTreeSet<(Protocol, u16)>,
    hook: Hook,
) -> Vec<Rule> {
    let accept = |way, protocol: Protocol, number, port| {
        let numbers = Match::Numbers { number, first: port, last: port, negated: false };
        Rule::new(vec![Match::Direction(way), Match::Protocol(protocol.0), numbers], Verdict::Accept)
    };
    // What carries the mesh is known by this host's port, whoever began it; another's port says nothing.
    let (own_begun, own_answered) = match hook == Hook::Output {
        true => (Number::ClientPort, Number::ServerPort),
        false => (Number::ServerPort, Number::ClientPort),
    };
    let carriers = settings.carriers.iter().flat_map(|port| {
        [(Way::Original, own_begun), (Way::Reply, own_answered)]
            .map(|(way, number)| accept(way, Protocol::UDP, number, *port))
    });
    let ports = [(Way::Original, begun), (Way::Reply, answered)]
        .into_iter()
        .flat_map(|(way, ports)| ports.iter().map(move |(protocol, port)| (way, *protocol, *port)));
    let ports = ports.map(|(way, protocol, port)| accept(way, protocol, Number::ServerPort, port));
    carriers.chain(ports).collect()
}

/// Whom a protected node always hears, and is always heard by: itself; and neighbours and listeners (RFC 4861, RFC
/// 3810), or nothing could be sent.
fn always_heard(itself: Match) -> Vec<Rule> {
    let always = [itself, Match::Icmp6(130, 137), Match::Icmp6(143, 143)];
    always.map(|condition| Rule::new(vec![condition], Verdict::Accept)).to_vec()
}

/// The same of its own pods: at this end, and where no interface has a host endpoint of its own, which would judge who takes their
/// addresses.
fn own_pods(end: End, verdict: &Verdict) -> [Rule; 2] {
    Family::BOTH.map(|family| {
        let pods = within(family, end, local_set(family), Kind::Addresses);
        Rule::new(vec![pods], verdict.clone())
    })
}

/// Both ways of a protected node's flows are judged in both hooks: an answer must not make good what was revoked.
fn both_ways(begun: &str, answered: &str) -> [Rule; 2] {
    [(Way::Original, begun), (Way::Reply, answered)]
        .map(|(way, class)| Rule::new(vec![Match::Direction(way)], Verdict::Jump(class.to_owned())))
}

/// What becomes of a protected node's packets in a hook, by the class of what is begun in its direction and that of what is answered;
/// and by the one of packets that conntrack knows nothing of.
fn judged(failsafe: &str, untracked: Option<&str>, begun: &str, answered: &str) -> Vec<Rule> {
    let mut rules = vec![Rule::new(vec![], Verdict::Jump(failsafe.to_owned()))];
    rules.extend(
        untracked
            .map(|class| Rule::new(vec![Match::State(State::Untracked)], Verdict::Jump(class.to_owned()))),
    );
    rules.push(Rule::new(vec![], Verdict::Jump("judged_before".to_owned())));
    rules.extend(both_ways(begun, answered));
    rules.push(Rule::new(vec![], goto(STAMP)));
    rules
}

/// The chain of an interface that has a host endpoint of its own.
fn of_interface(chain: &str, interface: &Interface) -> String {
    format!("{chain}_{}", &digest(interface)[..16])
}

/// Where packets go by interfaces that have a host endpoint of their own.
fn by_interface<'a>(
    chain: &'a str,
    interfaces: impl Iterator<Item = &'a Interface>,
    by: fn(String) -> Match,
) -> impl Iterator<Item = Rule> {
    interfaces.map(move |interface| {
        Rule::new(vec![by(interface.to_string())], goto(&of_interface(chain, interface)))
    })
}

/// Of a protected node: what comes in by devices that are no tunnels.
fn host_input(anybody: &Anybody) -> Vec<Rule> {
    let mut rules = always_heard(Match::Interface("lo".to_owned()));
    rules.extend(by_interface("host_input", anybody.interfaces.keys(), Match::Interface));
    rules.extend(own_pods(End::Source, &Verdict::Accept));
    let [untracked, _] = behind(anybody, None);
    let host = anybody.host.iter();
    rules.extend(host.flat_map(|host| judged(FAILSAFE_INPUT, untracked, &anybody.node, host)));
    rules
}

/// Of a protected node: what it sends.
fn host_output(anybody: &Anybody) -> Vec<Rule> {
    let mut rules = always_heard(Match::Leaves("lo".to_owned()));
    rules.extend(by_interface("host_output", anybody.interfaces.keys(), Match::Leaves));
    rules.extend(own_pods(End::Destination, &Verdict::Accept));
    let [_, untracked] = behind(anybody, None);
    let host = anybody.host.iter();
    rules.extend(host.flat_map(|host| judged(FAILSAFE_OUTPUT, untracked, host, &anybody.node)));
    rules
}

/// The classes of packets that conntrack knows nothing of: of what comes in, and of what goes out.
fn behind(anybody: &Anybody, interface: Option<Interface>) -> [Option<&str>; 2] {
    let sides = anybody.untracked.get(&interface).map(|untracked| &untracked.behind);
    sides.map(|sides| [sides.ingress.as_deref(), sides.egress.as_deref()]).unwrap_or_default()
}

/// Where a packet goes that is allowed without conntrack, in the hook before that.
pub(super) fn untracked(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "untracked_input",
        Direction::Egress => "untracked_output",
    }
}

/// The hooks before conntrack, in which packets are judged by themselves.
fn without_conntrack(
    settings: &Settings,
    untracked: &BTreeMap<Option<Interface>, Untracked>,
) -> Vec<(String, Chain)> {
    debug_assert!(Direction::BOTH.iter().all(|direction| self::untracked(*direction).starts_with(UNTRACKED)));
    let mut all = Vec::new();
    let not_tracked =
        |matches| Rule { matches, statements: vec![Statement::NoTrack], verdict: Verdict::Accept };
    // Of what is forwarded all that follows wants to know the connection.
    let ends_here = vec![Rule::new(vec![Match::ForAnother], Verdict::Accept), not_tracked(vec![])];
    for (name, rules) in [("untracked_input", ends_here), ("untracked_output", vec![not_tracked(vec![])])] {
        all.push((name.to_owned(), Chain { hook: None, rules }));
    }
    for (hook, name) in [(Hook::RawInput, "raw_input"), (Hook::RawOutput, "raw_output")] {
        let incoming = hook == Hook::RawInput;
        let by = |name: &str| match incoming {
            true => Match::Interface(name.to_owned()),
            false => Match::Leaves(name.to_owned()),
        };
        let end = if incoming { End::Source } else { End::Destination };
        let mut rules = always_heard(by("lo"));
        rules.extend(safe_packets(settings, incoming));
        for (interface, of) in untracked.iter().rev() {
            let class = if incoming { &of.before.ingress } else { &of.before.egress };
            let verdict = class.as_deref().map_or(Verdict::Return, goto);
            let by = interface.map(|interface| by(interface.as_str()));
            if by.is_none() {
                rules.extend(own_pods(end, &Verdict::Accept));
            }
            rules.push(Rule::new(by.into_iter().collect(), verdict));
        }
        all.push((name.to_owned(), Chain { hook: Some(hook), rules }));
    }
    all
}

/// What has to come through whatever policies say, packet by packet: others judge it by its connection.
fn safe_packets(settings: &Settings, incoming: bool) -> Vec<Rule> {
    let (inbound, outbound) = (&settings.failsafe.inbound, &settings.failsafe.outbound);
    let carriers = settings.carriers.iter().map(|port| (Protocol::UDP, *port));
    let own: BTreeSet<(Protocol, u16)> = inbound.iter().copied().chain(carriers).collect();
    let (own_port, others_port) = match incoming {
        true => (Number::DestinationPort, Number::SourcePort),
        false => (Number::SourcePort, Number::DestinationPort),
    };
    let own = own.iter().map(|port| (own_port, port));
    let all = own.chain(outbound.iter().map(|port| (others_port, port)));
    all.map(|(number, (protocol, port))| {
        let numbers = Match::Numbers { number, first: *port, last: *port, negated: false };
        Rule::new(vec![Match::Protocol(protocol.0), numbers], Verdict::Accept)
    })
    .collect()
}

/// What a node forwards, by one side of its host endpoints: what comes in (`end` is the client, and packets of its way come in there),
/// or what goes out. A pod of this node is no host's side.
fn forwarded(
    sides: &BTreeMap<Option<Interface>, Sides>,
    end: End,
    comes_in: Way,
    class: fn(&Sides) -> &Option<String>,
) -> Vec<Rule> {
    let mut rules = own_pods(end, &Verdict::Return).to_vec();
    for (interface, sides) in sides.iter().rev() {
        let verdict = class(sides).as_deref().map_or(Verdict::Return, goto);
        match interface {
            Some(interface) => {
                for way in [Way::Original, Way::Reply] {
                    let name = interface.to_string();
                    let by = if way == comes_in { Match::Interface(name) } else { Match::Leaves(name) };
                    rules.push(Rule::new(vec![Match::Direction(way), by], verdict.clone()));
                }
            }
            // The first of all, here the last.
            None => rules.push(Rule::new(vec![], verdict)),
        }
    }
    rules
}

fn tunnel_input(settings: &Settings, anybody: &Anybody) -> Vec<Rule> {
    // Router and neighbour discovery (RFC 4861), from addresses of the link.
    let mut rules = vec![Rule::new(vec![Match::Icmp6(133, 137)], Verdict::Accept)];
    rules.extend(not_believed());
    let tunnels = anybody.interfaces.keys().filter(|name| settings.tunnels.contains(name.as_str()));
    rules.extend(by_interface("host_input", tunnels, Match::Interface));
    let node = &anybody.node;
    match &anybody.host {
        Some(host) => {
            let [untracked, _] = behind(anybody, None);
            rules.extend(judged(FAILSAFE_INPUT, untracked, node, host));
        }
        None => rules.extend([
            Rule::new(vec![], Verdict::Jump("judged_before".to_owned())),
            // What answers the node was begun by it; by another interface perhaps, where it is judged.
            Rule::new(vec![Match::Direction(Way::Original)], Verdict::Jump(node.to_owned())),
            Rule::new(
                anybody.is_protected().then_some(Match::Direction(Way::Original)).into_iter().collect(),
                goto(STAMP),
            ),
        ]),
    }
    rules
}
