//! Where a packet may come from: judged by the interface that it enters by, before anything else looks at it.
//!
//! ```text
//! tunnel, lo    judged elsewhere
//! outside       an underlay or another network: no address of this node's prefixes or pods
//! all others    may lead to pods: the route to the source has to lead back by the same interface
//! ```
//! Interfaces outside are named and all others are not, so that a pod's interface counts from its first packet on. The chain stands
//! in prerouting, where every kernel since 4.10 can ask for the route back, and sees what is forwarded as well as what is for the
//! node. It stands before conntrack: a forged packet leaves no entry there.

use ipnet::IpNet;

use super::Settings;
use super::base::{goto, local_set, outside, own_set, within};
use crate::protocol::Protocol;
use crate::ruleset::{Chain, End, Family, Hook, Kind, Match, Number, Rule, Verdict};

/// The base chain.
const CHAIN: &str = "sources";
/// Chain of what comes in from outside.
const FROM_OUTSIDE: &str = "sources_outside";
/// Chain of packets to a port of VXLAN.
const CARRIED: &str = "vxlan";

/// The set of addresses that are valid on one link only, and what is in it. No route has to lead to them: where the kernel makes no
/// such address, it has no such route, and neighbours are discovered all the same. They are never forwarded.
pub(super) fn link_local(family: Family) -> Option<(String, IpNet)> {
    let net = "fe80::/10".parse().ok().filter(|_| family == Family::V6)?;
    Some((format!("links{}", family.suffix()), net))
}

/// The chains.
pub(super) fn chains(settings: &Settings) -> Vec<(String, Chain)> {
    let plain = |name: &str, rules| (name.to_owned(), Chain { hook: None, rules });
    let base = Chain { hook: Some(Hook::Sources), rules: sources(settings) };
    let mut all = vec![(CHAIN.to_owned(), base), plain(FROM_OUTSIDE, from_outside())];
    if !settings.vxlan.is_empty() {
        all.push(plain(CARRIED, carriers(settings)));
    }
    all
}

fn by(name: &str, verdict: Verdict) -> Rule {
    Rule::new(vec![Match::Interface(name.to_owned())], verdict)
}

fn sources(settings: &Settings) -> Vec<Rule> {
    let judged_elsewhere = settings.tunnels.iter().map(String::as_str).chain(["lo"]);
    let mut rules: Vec<Rule> = judged_elsewhere.map(|name| by(name, Verdict::Accept)).collect();
    let named = settings.outside.difference(&settings.tunnels).filter(|name| *name != "lo");
    rules.extend(named.map(|name| by(name, goto(FROM_OUTSIDE))));
    if settings.check_sources {
        // The kernel itself excepts those that ask for an address: from 0.0.0.0 and ::, to everybody on the link.
        rules.extend(Family::BOTH.map(|family| {
            let links = link_local(family).map(|(set, _)| outside(family, End::Source, set, Kind::Ranges));
            let forged = [Match::Family(family), Match::NoWayBack].into_iter().chain(links);
            Rule::new(forged.collect(), goto("x_spoofed"))
        }));
    }
    rules
}

/// The addresses of this node's pods are not out there, whatever routes say.
fn from_outside() -> Vec<Rule> {
    let ours = |family| {
        [
            within(family, End::Source, own_set(family), Kind::Ranges),
            within(family, End::Source, local_set(family), Kind::Addresses),
        ]
    };
    let ours = Family::BOTH.into_iter().flat_map(ours);
    ours.map(|ours| Rule::new(vec![ours], goto("x_spoofed"))).collect()
}

/// The rules in front of what is for the node: its VXLAN devices hear nobody but the underlay. They authenticate nobody, and a pod
/// could put a packet in as an exempt node.
pub(super) fn carried(settings: &Settings) -> Vec<Rule> {
    let to = |port: &u16| {
        let port =
            Match::Numbers { number: Number::DestinationPort, first: *port, last: *port, negated: false };
        Rule::new(vec![Match::Protocol(Protocol::UDP.0), port], Verdict::Jump(CARRIED.to_owned()))
    };
    settings.vxlan.iter().map(to).collect()
}

fn carriers(settings: &Settings) -> Vec<Rule> {
    let heard = settings.outside.difference(&settings.tunnels).map(String::as_str).chain(["lo"]);
    let heard = heard.map(|name| by(name, Verdict::Return));
    heard.chain([Rule::new(vec![], goto("x_spoofed"))]).collect()
}
