//! What is the same for all endpoints: what is in scope, what cannot be believed, what was judged before.

use super::class::refusal;
use super::node::Anybody;
use super::{Copied, Settings, host, source};
use crate::dns;
use crate::flowlog::Direction;
use crate::protocol::Protocol;
use crate::ruleset::{Chain, End, Family, Hook, Kind, Match, Number, Rule, State, Statement, Verdict, Way};

/// Counters of the table.
pub(super) const COUNTERS: [&str; 6] =
    ["denied_egress", "denied_ingress", "spoofed", "unknown", "invalid", "midstream"];
/// Chain that accepts what was judged by the policy of now.
pub(super) const ESTABLISHED: &str = "established";
/// Chain that accepts the same at once, of packets that come from no tunnel.
const KNOWN: &str = "known";
/// Chain that does so with packets that come from a tunnel.
const KNOWN_TUNNEL: &str = "known_tunnel";
/// Chain that marks what was judged.
pub(super) const STAMP: &str = "stamp";
/// Map from a local pod's address to the class of what it begins.
pub(super) fn egress_map(family: Family) -> String {
    format!("egress{}", family.suffix())
}
/// Map from a local pod's address to the class of what is begun towards it.
pub(super) fn ingress_map(family: Family) -> String {
    format!("ingress{}", family.suffix())
}
/// Set of the local pods' addresses.
pub(super) fn local_set(family: Family) -> String {
    format!("local{}", family.suffix())
}
/// Set of the local pods to which answers about names were copied a moment ago.
pub(super) fn copied_set(family: Family) -> String {
    format!("copied{}", family.suffix())
}
/// Set of the prefixes of this node.
pub(super) fn own_set(family: Family) -> String {
    format!("own{}", family.suffix())
}
/// Set of the prefixes of the mesh.
pub(super) fn scope_set(family: Family) -> String {
    format!("scope{}", family.suffix())
}

pub(super) fn within(family: Family, end: End, set: String, kind: Kind) -> Match {
    Match::In { family, end, set, kind, negated: false }
}

pub(super) fn outside(family: Family, end: End, set: String, kind: Kind) -> Match {
    Match::In { family, end, set, kind, negated: true }
}

pub(super) fn goto(chain: &str) -> Verdict {
    Verdict::Goto(chain.to_owned())
}

/// The chains that do not depend on who is local. `strict`: some class denies something.
pub(super) fn chains(settings: &Settings, anybody: &Anybody, strict: bool) -> Vec<(String, Chain)> {
    let (protected, gated) = (anybody.is_protected(), anybody.judges_forwarded());
    let copies = copies(anybody.resolvers.as_ref());
    let plain = |name: &str, rules| (name.to_owned(), Chain { hook: None, rules });
    let mut all = vec![
        (
            "forward".to_owned(),
            Chain { hook: Some(Hook::Forward), rules: forward(settings, &anybody.stranger, &copies, gated) },
        ),
        ("input".to_owned(), Chain { hook: Some(Hook::Input), rules: input(settings, protected) }),
        plain("tunnel_forward", tunnel_forward(settings)),
        plain("judged_before", judged_before(strict)),
    ];
    if protected || !copies.is_empty() {
        // A cache of names may be a process of the node.
        let judged = |matches| Rule::new(matches, Verdict::Jump("host_output".to_owned()));
        // In this hook the interface is the one before translation.
        let translated = Rule::new(vec![Match::Translated], Verdict::Accept);
        let rest = [translated, judged(vec![])].into_iter().filter(|_| protected);
        let rules = copies.into_iter().chain(rest).collect();
        all.push(("output".to_owned(), Chain { hook: Some(Hook::Output), rules }));
        if protected {
            let rules = vec![judged(vec![Match::Translated, Match::FromThisHost])];
            all.push(("postrouting".to_owned(), Chain { hook: Some(Hook::Postrouting), rules }));
        }
    }
    all.extend(source::chains(settings));
    all.extend(host::chains(settings, anybody));
    for name in ["spoofed", "unknown"] {
        all.push(plain(&format!("x_{name}"), refusal(settings, Direction::Tunnel, name, name)));
    }
    // Nobody can be told who meant these.
    for name in ["invalid", "midstream"] {
        let statements = vec![Statement::Count(name.to_owned())];
        let verdict = if settings.audit { Verdict::Return } else { Verdict::Drop };
        all.push(plain(&format!("x_{name}"), vec![Rule { matches: vec![], statements, verdict }]));
    }
    all
}

fn from_tunnels(settings: &Settings, chain: &str) -> Vec<Rule> {
    let tunnels = settings.tunnels.iter();
    tunnels
        .map(|name| Rule::new(vec![Match::Interface(name.clone())], Verdict::Jump(chain.to_owned())))
        .collect()
}

/// Chain `judged_before`: what conntrack cannot place, and what needs no judging again. Where nothing is denied nobody can get round
/// it, and connections that are older than the table go on.
fn judged_before(strict: bool) -> Vec<Rule> {
    let misplaced = [
        // A connection that is picked up in its middle may be one that was cut.
        Rule::new(vec![Match::State(State::New), Match::MidStream], goto("x_midstream")),
        Rule::new(vec![Match::State(State::Invalid)], goto("x_invalid")),
        // Of what is not tracked nobody can say who began it. Neighbour discovery, which never is, is not forwarded.
        Rule::new(vec![Match::State(State::Untracked)], goto("x_invalid")),
    ];
    let known = Rule::new(vec![Match::State(State::Known)], goto(ESTABLISHED));
    misplaced.into_iter().filter(|_| strict).chain([known]).collect()
}

fn forward(settings: &Settings, stranger: &str, copies: &[Rule], gated: bool) -> Vec<Rule> {
    // Of most packets this is all. Who sends on a device without keys is asked first; and who speaks of names has to be believed.
    let mut rules = Vec::new();
    if copies.is_empty() {
        let keyed = settings.tunnels.difference(&settings.keyless);
        rules.extend(keyed.map(|name| {
            Rule::new(vec![Match::Interface(name.clone())], Verdict::Jump(KNOWN_TUNNEL.to_owned()))
        }));
    }
    rules.extend(from_tunnels(settings, "tunnel_forward"));
    rules.extend(copies.iter().cloned());
    rules.push(Rule::new(vec![], Verdict::Jump(KNOWN.to_owned())));
    // Where the node's own policies judge what it forwards, nothing is out of scope.
    let judged_before = Rule::new(vec![], Verdict::Jump("judged_before".to_owned()));
    let mut out_of_scope = Verdict::Accept;
    if gated {
        rules.push(judged_before.clone());
        rules.extend(
            [host::FORWARDED_IN, host::FORWARDED_OUT]
                .map(|side| Rule::new(vec![], Verdict::Jump(side.to_owned()))),
        );
        out_of_scope = goto(STAMP);
    }
    for family in Family::BOTH {
        // Hashes before ranges: most packets are of local pods, and looked up once.
        let ends = [End::Source, End::Destination];
        let strange = ends.map(|end| outside(family, end, local_set(family), Kind::Addresses));
        let out = ends.map(|end| outside(family, end, scope_set(family), Kind::Ranges));
        rules.push(Rule::new(strange.into_iter().chain(out).collect(), out_of_scope.clone()));
    }
    if !gated {
        rules.push(judged_before);
    }
    for (end, map) in [(End::Client, egress_map as fn(Family) -> String), (End::Server, ingress_map)] {
        for family in Family::BOTH {
            rules.push(Rule::new(vec![], Verdict::Lookup { family, end, map: map(family) }));
        }
        for family in Family::BOTH {
            let unknown = vec![
                within(family, end, own_set(family), Kind::Ranges),
                outside(family, end, local_set(family), Kind::Addresses),
            ];
            if settings.strangers {
                // What is begun towards it; for what it begins no policy can apply.
                if end == End::Server {
                    rules.push(Rule::new(unknown, Verdict::Jump(stranger.to_owned())));
                }
            } else {
                rules.push(Rule::new(unknown, goto("x_unknown")));
            }
        }
    }
    rules.push(Rule::new(vec![], goto(STAMP)));
    rules
}

/// A packet that comes out of a tunnel is from somebody else of the mesh.
pub(super) fn not_believed() -> Vec<Rule> {
    let mut rules = Vec::new();
    for family in Family::BOTH {
        for wrong in [
            outside(family, End::Source, scope_set(family), Kind::Ranges),
            within(family, End::Source, own_set(family), Kind::Ranges),
            within(family, End::Source, local_set(family), Kind::Addresses),
        ] {
            rules.push(Rule::new(vec![wrong], goto("x_spoofed")));
        }
    }
    rules
}

fn tunnel_forward(settings: &Settings) -> Vec<Rule> {
    let mut rules = not_believed();
    for family in Family::BOTH {
        // What comes back may be for whoever this node speaks for, a load balancer's client.
        let mut unknown = vec![
            Match::Direction(Way::Original),
            outside(family, End::Destination, local_set(family), Kind::Addresses),
        ];
        if settings.strangers {
            unknown.push(outside(family, End::Destination, own_set(family), Kind::Ranges));
        }
        rules.push(Rule::new(unknown, goto("x_unknown")));
    }
    rules
}

/// Answers that are copied of each pod, a second and at once; what is beyond is not copied, and goes on as all others do.
const COPIES: (u32, u32) = (100, 200);

/// Copies what those answer to questions who are believed about names, to each pod of this node so many a second. Addresses of this node
/// that no known pod has share one such rate; what is answered to other nodes' pods is copied there.
fn copies(resolvers: Option<&Copied>) -> Vec<Rule> {
    let Some(Copied { group, sets }) = resolvers else { return Vec::new() };
    let (rate, burst) = COPIES;
    let copy = |(family, set, kind): &(Family, String, Kind)| {
        let (family, from) = (*family, Number::ServerPort);
        let rule = |asked: Vec<Match>, limit: Statement| {
            let matches = vec![
                Match::State(State::Established),
                Match::Direction(Way::Reply),
                Match::Protocol(Protocol::UDP.0),
                Match::Numbers { number: from, first: dns::PORT, last: dns::PORT, negated: false },
                within(family, End::Server, set.clone(), *kind),
            ];
            let matches = matches.into_iter().chain(asked).collect();
            let statements = vec![limit, Statement::Copy { group: *group }];
            Rule { matches, statements, verdict: Verdict::Continue }
        };
        let known = within(family, End::Client, local_set(family), Kind::Addresses);
        let unknown = vec![
            outside(family, End::Client, local_set(family), Kind::Addresses),
            within(family, End::Client, own_set(family), Kind::Ranges),
        ];
        let each = Statement::LimitEach { family, end: End::Client, set: copied_set(family), rate, burst };
        [rule(vec![known], each), rule(unknown, Statement::Limit { rate, burst })]
    };
    sets.iter().flat_map(copy).collect()
}

fn input(settings: &Settings, protected: bool) -> Vec<Rule> {
    let tunnels = settings.tunnels.iter();
    let mut rules = source::carried(settings);
    rules.extend(tunnels.map(|name| Rule::new(vec![Match::Interface(name.clone())], goto("tunnel_input"))));
    if protected {
        // What came out of a tunnel was judged there.
        let rest = Verdict::Jump("host_input".to_owned());
        rules.push(Rule::new(vec![], rest));
    }
    rules
}

/// The chains that depend on the epoch: which mark says that a connection was judged by the policy of now, and who gets it. `None`: no
/// mark counts, and none is set.
pub(super) fn epoch(mask: u32, epoch: Option<u32>) -> [(String, Vec<Rule>); 4] {
    let related =
        |protocol| Rule::new(vec![Match::State(State::Related), Match::Protocol(protocol)], Verdict::Accept);
    let mut established = vec![related(1), related(58)];
    let [mut known, mut known_tunnel, mut stamp] = [Vec::new(), Vec::new(), Vec::new()];
    if let Some(value) = epoch {
        // What a helper expects (FTP, SIP) is related, has its parent's mark, and was never judged.
        let judged = [Match::State(State::Established), Match::Mark { mask, value }];
        let accept =
            |more: Option<Match>| Rule::new(judged.iter().cloned().chain(more).collect(), Verdict::Accept);
        established.insert(0, accept(None));
        known.push(accept(None));
        // A packet out of a tunnel that says it is of a local pod is in no connection, whatever else it says.
        known_tunnel
            .extend(Family::BOTH.map(|family| {
                accept(Some(outside(family, End::Source, local_set(family), Kind::Addresses)))
            }));
        let statements = vec![Statement::SetMark { mask, value }];
        stamp.push(Rule { matches: vec![], statements, verdict: Verdict::Continue });
    }
    [(ESTABLISHED, established), (KNOWN, known), (KNOWN_TUNNEL, known_tunnel), (STAMP, stamp)]
        .map(|(name, rules)| (name.to_owned(), rules))
}
