//! Services, host endpoints, and policies of both.

use std::sync::Arc;

use mesh_policy::endpoints::{self, Endpoints};
use mesh_policy::model::{
    Action, Block, Condition, End, Namespaces, ObjectId, Order, Peer, PodSelector, Policy, Port, PortMatch,
    Reach, Rule, Side, Subject, Tier,
};
use mesh_policy::object::{Key, NamedPort};
use mesh_policy::referent::{Referent, What};
use mesh_policy::refusal::Outcome;
use mesh_policy::world::{HostOf, Networks};
use mesh_policy::{Event, LabelSelector, Protocol};
use proptest::prelude::*;

use super::{pod, unread};

pub(crate) fn service() -> impl Strategy<Value = Key> {
    prop::sample::select(vec!["a", "b"]).prop_map(|name| Key::new(Some("x"), name))
}

/// Some endpoints of a Service: pods, and others.
pub(crate) fn slice() -> impl Strategy<Value = Referent> {
    let pods = (0..12usize).prop_map(|index| pod(index, "a", 80).addresses.into_iter().collect::<Vec<_>>());
    let others = Just(vec!["172.16.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
    let addresses = prop::collection::vec(prop_oneof![3 => pods, 1 => others], 0..4);
    let ports = prop::sample::subsequence(
        vec![(Protocol::TCP, 80), (Protocol::TCP, 81), (Protocol::UDP, 80), (Protocol::SCTP, 80)],
        0..4,
    );
    let unread = prop::bool::weighted(0.1);
    (0..3u8, service(), addresses, ports, unread).prop_map(|(number, service, addresses, ports, unread)| {
        Referent {
            id: ObjectId {
                kind: endpoints::KIND,
                namespace: Some(service.namespace.clone()),
                name: format!("s{number}"),
            },
            what: Some(What::Endpoints(Endpoints {
                service,
                addresses: addresses.into_iter().flatten().collect(),
                ports: ports.into_iter().collect(),
                unread,
            })),
            fault: None,
            more: vec![],
            outcome: Outcome::Rest,
        }
    })
}

/// Host endpoints of this node and another, which may be open.
pub(crate) fn host() -> impl Strategy<Value = Referent> {
    host_of(1..3u8)
}

pub(crate) fn host_of(node: impl Strategy<Value = u8>) -> impl Strategy<Value = Referent> {
    let of = (
        node,
        prop::option::of(prop::sample::select(vec!["a", "b"])),
        any::<bool>(),
        prop::option::of(prop::sample::select(vec!["eth0", "eth1", "sennit0"])),
        prop::option::of(prop::sample::select(vec![80u16, 81])),
        unread(),
    );
    of.prop_map(|(node, set, open, interface, port, unread)| Referent {
        id: ObjectId {
            kind: "HostEndpoint",
            namespace: None,
            name: format!("h{node}{}", interface.unwrap_or_default()),
        },
        what: Some(What::Networks(Networks {
            labels: set.map(|set| ("set".to_owned(), set.to_owned())).into_iter().collect(),
            nets: Arc::new([format!("192.168.0.{node}/32").parse().unwrap()].into()),
            unread,
            host: Some(HostOf {
                node: format!("n{node}"),
                interface: interface.map(|interface| interface.parse().unwrap()),
                open,
                ports: port
                    .map(|port| NamedPort { name: "web".to_owned(), protocol: Protocol::TCP, port })
                    .into_iter()
                    .collect(),
            }),
        })),
        fault: None,
        more: vec![],
        outcome: Outcome::Rest,
    })
}

/// Policies of host endpoints and all pods, whose rules ask for little, so that most of them decide something.
pub(crate) fn host_policy() -> impl Strategy<Value = Event> {
    let net = prop::sample::select(vec![
        "10.0.0.0/9",
        "10.0.2.0/24",
        "172.16.0.0/12",
        "2001:db8::/32",
        "192.168.0.0/16",
        "fd00:0:0:2::/64",
        "::/0",
    ]);
    let block = net.prop_map(|net| Peer::Block(Block { net: net.parse().unwrap(), except: vec![] }));
    let side = || prop::sample::select(vec![Side::Source, Side::Destination]);
    let ports = |port: u16| {
        [Protocol::TCP, Protocol::UDP].map(|protocol| Port { protocol, ports: PortMatch::Range(port, port) })
    };
    let condition = prop_oneof![
        4 => (side(), block).prop_map(|(side, block)| Condition::Is(side, [block].into())),
        2 => service().prop_map(Condition::Serves),
        1 => (side(), service()).prop_map(|(side, key)| Condition::Is(side, [Peer::Service(key)].into())),
        1 => (side(), service()).prop_map(|(side, key)| Condition::IsNot(side, [Peer::Service(key)].into())),
        4 => prop::sample::select(vec![80, 81, 30080]).prop_map(move |port| Condition::Ports(Side::Destination, ports(port).into())),
        1 => Just(Condition::Ports(Side::Destination, [Port { protocol: Protocol::TCP, ports: PortMatch::Named("web".to_owned()) }].into())),
    ];
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Pass]);
    let rules = || {
        let when = prop::collection::btree_set(condition.clone(), 0..2);
        prop::collection::vec((action.clone(), when), 0..4).prop_map(|rules| {
            let rule = |(index, (action, when))| Rule { name: format!("rule[{index}]"), action, when };
            rules.into_iter().enumerate().map(rule).collect::<Vec<_>>()
        })
    };
    let reach = prop::sample::select(vec![
        Reach::Ends,
        Reach::Forwarded,
        Reach::Forwarded,
        Reach::BeforeNat,
        Reach::BeforeNat,
        Reach::Untracked,
        Reach::Untracked,
    ]);
    let end = prop::sample::select(vec![End::Pass, End::Pass, End::Deny]);
    (0..4u8, reach, end, prop::option::of(rules()), prop::option::of(rules())).prop_map(
        |(number, reach, end, egress, ingress)| {
            let behind = |condition: &Condition| match condition {
                Condition::Ports(_, ports) => {
                    ports.iter().any(|port| matches!(port.ports, PortMatch::Named(_)))
                }
                Condition::Serves(_) => true,
                _ => false,
            };
            let kept = |rules: Option<Vec<Rule>>| {
                let mut rules = rules;
                for rule in rules
                    .iter_mut()
                    .flatten()
                    .filter(|_| [Reach::BeforeNat, Reach::Untracked].contains(&reach))
                {
                    rule.when.retain(|condition| !behind(condition));
                }
                rules
            };
            let anywhere = Namespaces::Selected(LabelSelector::default());
            let pods = Subject::Pods(PodSelector::new(anywhere, LabelSelector::default()));
            let policy = Policy {
                tier: Tier { order: Order(f64::from(number % 2)), name: format!("h{}", number % 2), end },
                order: Order(f64::from(number)),
                id: ObjectId { kind: "Host", namespace: None, name: format!("h{number}") },
                subject: Subject::Any([pods, Subject::Hosts(LabelSelector::default())].into()),
                egress: kept(egress),
                ingress: kept(ingress),
                reach,
                staged: false,
                replaces: None,
            };
            Event::Policy(policy.into())
        },
    )
}

/// Where there are pods here and elsewhere, and host endpoints of this node.
pub(crate) fn about_hosts() -> impl Strategy<Value = Vec<Event>> {
    let before = [0, 1, 4, 5].map(|index| Event::Pod(pod(index, "a", 80)));
    let hosts = prop::collection::vec(host_of(Just(1)).prop_map(Event::Referent), 1..4);
    (hosts, prop::collection::vec(host_policy(), 1..5), prop::collection::vec(host_event(), 0..10))
        .prop_map(move |(hosts, policies, then)| [before.to_vec(), hosts, policies, then].concat())
}

/// Of nodes and Services.
pub(crate) fn host_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..12usize, prop::sample::select(vec![80u16, 81])).prop_map(|(index, port)| Event::Pod(pod(index, "a", port))),
        4 => host_policy(),
        2 => slice().prop_map(Event::Referent),
        1 => slice().prop_map(|slice| Event::ReferentGone(slice.id)),
        2 => host().prop_map(Event::Referent),
        1 => host().prop_map(|host| Event::ReferentGone(host.id)),
    ]
}
