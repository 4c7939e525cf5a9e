//! What nf_tables does with a packet, as far as policies need it: the compiled ruleset is judged by this, without a kernel.

use std::net::IpAddr;

use mesh_policy::ruleset::{
    Element, End, Family, Hook, Kind, Match, Number, Ruleset, State, Statement, Verdict, Way,
};

/// A packet of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) interface: String,
    pub(crate) leaves_by: String,
    pub(crate) client: IpAddr,
    pub(crate) server: IpAddr,
    pub(crate) protocol: u8,
    /// The server's.
    pub(crate) port: u16,
    /// The client's.
    pub(crate) client_port: u16,
    /// What it was begun towards, before destination NAT.
    pub(crate) dialled: Option<(IpAddr, u16)>,
    /// Type and code of who began it.
    pub(crate) icmp: (u8, u8),
    pub(crate) way: Way,
    pub(crate) state: State,
    pub(crate) mid_stream: bool,
    pub(crate) no_way_back: bool,
    pub(crate) for_this_host: bool,
    pub(crate) from_this_host: bool,
    /// It is in a hook before destination NAT.
    pub(crate) before_nat: bool,
    pub(crate) mark: u32,
}

impl Packet {
    /// The first one.
    pub(crate) fn new(client: IpAddr, server: IpAddr, protocol: u8, port: u16) -> Self {
        Self {
            interface: "eth0".to_owned(),
            leaves_by: "eth1".to_owned(),
            client,
            server,
            protocol,
            port,
            client_port: 0,
            dialled: None,
            icmp: (8, 0),
            way: Way::Original,
            state: State::New,
            mid_stream: false,
            no_way_back: false,
            for_this_host: false,
            from_this_host: false,
            before_nat: false,
            mark: 0,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Accept,
    Drop,
    Return,
}

/// Whether a packet passes a hook; its mark is what it is afterwards.
pub(crate) fn passes(ruleset: &Ruleset, hook: Hook, packet: &mut Packet) -> bool {
    packet.before_nat = [Hook::Sources, Hook::RawInput, Hook::RawOutput].contains(&hook);
    let (name, _) = ruleset.chains.iter().find(|(_, chain)| chain.hook == Some(hook)).expect("no base chain");
    run(ruleset, name, packet, 0) != Step::Drop
}

fn run(ruleset: &Ruleset, chain: &str, packet: &mut Packet, depth: usize) -> Step {
    assert!(depth < 16, "the kernel jumps no deeper");
    let chain = ruleset.chains.get(chain).unwrap_or_else(|| panic!("no chain {chain}"));
    for rule in &chain.rules {
        if !rule.matches.iter().all(|condition| holds(ruleset, condition, packet)) {
            continue;
        }
        for statement in &rule.statements {
            match statement {
                Statement::SetMark { mask, value } => packet.mark = packet.mark & !mask | value,
                Statement::Count(name) => assert!(ruleset.counters.contains(name), "no counter {name}"),
                Statement::LimitEach { family, set, .. } => {
                    let set = &ruleset.sets[set];
                    assert_eq!((set.kind, set.family), (Kind::Rates, *family));
                }
                Statement::Limit { .. } | Statement::Copy { .. } => {}
                Statement::NoTrack => packet.state = State::Untracked,
                Statement::Log { prefix, .. } => assert!(prefix.len() <= 127),
            }
        }
        match &rule.verdict {
            Verdict::Continue => {}
            Verdict::Accept => return Step::Accept,
            Verdict::Drop => return Step::Drop,
            Verdict::Return => return Step::Return,
            Verdict::Goto(to) => return run(ruleset, to, packet, depth),
            Verdict::Jump(to) => match run(ruleset, to, packet, depth + 1) {
                Step::Return => {}
                step => return step,
            },
            Verdict::Lookup { family, end, map } => {
                let address = address(packet, *end);
                let set = &ruleset.sets[map];
                assert_eq!((set.kind, set.family), (Kind::Chains, *family));
                let found = set.elements.iter().find_map(|element| match element {
                    Element::Chain(key, chain) if *key == address => Some(chain),
                    _ => None,
                });
                match found.map(|to| run(ruleset, to, packet, depth + 1)) {
                    None | Some(Step::Return) => {}
                    Some(step) => return step,
                }
            }
        }
    }
    Step::Return
}

fn address(packet: &Packet, end: End) -> IpAddr {
    let dialled = || packet.dialled.map_or(packet.server, |(address, _)| address);
    match (end, packet.way) {
        (End::Destination, Way::Original) | (End::Source, Way::Reply) if packet.before_nat => dialled(),
        (End::Dialled, _) => dialled(),
        (End::Client, _) | (End::Source, Way::Original) | (End::Destination, Way::Reply) => packet.client,
        (End::Server, _) | (End::Destination, Way::Original) | (End::Source, Way::Reply) => packet.server,
    }
}

fn holds(ruleset: &Ruleset, condition: &Match, packet: &Packet) -> bool {
    match condition {
        Match::Direction(_) | Match::State(_) | Match::Mark { .. } if packet.before_nat => false,
        Match::Interface(name) => packet.interface == *name,
        Match::Leaves(name) => packet.leaves_by == *name,
        // Of what is not tracked nobody knows who began it.
        Match::AnyOf { number, set } => {
            let set = ruleset.sets.get(set).unwrap_or_else(|| panic!("no set {set}"));
            assert_eq!(set.kind, Kind::Numbers);
            set.elements.iter().any(|element| match element {
                Element::Numbers(protocol, first, last) => {
                    let numbers =
                        Match::Numbers { number: *number, first: *first, last: *last, negated: false };
                    packet.protocol == *protocol && holds(ruleset, &numbers, packet)
                }
                _ => panic!("a set of numbers has {element:?}"),
            })
        }
        Match::In { end: End::Client | End::Server | End::Dialled, .. } | Match::Named { .. }
            if packet.state == State::Untracked || packet.before_nat =>
        {
            false
        }
        Match::In { family, end, set, kind, negated } => {
            let address = address(packet, *end);
            let set = ruleset.sets.get(set).unwrap_or_else(|| panic!("no set {set}"));
            assert_eq!((set.kind, set.family), (*kind, *family));
            let inside = set.elements.iter().any(|element| match element {
                Element::Address(one) => *one == address,
                Element::Range(first, last) => *first <= address && address <= *last,
                _ => panic!("a set of {kind:?} has {element:?}"),
            });
            Family::of(address) == *family && inside != *negated
        }
        Match::Named { family, end, set, way, negated } => {
            let set = &ruleset.sets[set];
            assert_eq!((set.kind, set.family), (Kind::Ports, *family));
            assert!([End::Client, End::Server].contains(end), "nft cannot list it");
            let port = if *end == End::Client { packet.client_port } else { packet.port };
            let address = address(packet, *end);
            packet.way == *way
                && Family::of(address) == *family
                && set.elements.contains(&Element::Port(address, packet.protocol, port)) != *negated
        }
        Match::Family(family) => Family::of(packet.client) == *family,
        Match::Protocol(protocol) => packet.protocol == *protocol,
        Match::NotProtocol(protocol) => packet.protocol != *protocol,
        Match::Numbers { number: of, first, last, negated } => {
            let dialled = || packet.dialled.map_or(packet.port, |(_, port)| port);
            let server = if packet.before_nat { dialled() } else { packet.port };
            let number = match of {
                Number::ClientPort => packet.client_port,
                Number::ServerPort => packet.port,
                Number::DialledPort => dialled(),
                Number::SourcePort => {
                    if packet.way == Way::Original {
                        packet.client_port
                    } else {
                        server
                    }
                }
                Number::DestinationPort => {
                    if packet.way == Way::Original {
                        server
                    } else {
                        packet.client_port
                    }
                }
                Number::Icmp | Number::PacketIcmp => u16::from_be_bytes([packet.icmp.0, packet.icmp.1]),
            };
            let of_packet = [Number::SourcePort, Number::DestinationPort, Number::PacketIcmp].contains(of);
            (of_packet || packet.state != State::Untracked && !packet.before_nat)
                && (*first..=*last).contains(&number) != *negated
        }
        Match::State(state) => match state {
            State::Known => matches!(packet.state, State::Established | State::Known | State::Related),
            State::Established => matches!(packet.state, State::Established | State::Known),
            state => packet.state == *state,
        },
        Match::ForAnother => !packet.for_this_host,
        Match::FromThisHost => packet.from_this_host,
        Match::Translated => packet.dialled.is_some() && packet.state != State::Untracked,
        Match::Direction(way) => packet.state != State::Untracked && packet.way == *way,
        Match::NoWayBack => packet.no_way_back,
        Match::MidStream => packet.protocol == 6 && packet.mid_stream,
        Match::Icmp6(..) => false,
        Match::Mark { mask, value } => packet.mark & mask == *value,
    }
}
