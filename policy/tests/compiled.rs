//! The compiled ruleset says what the evaluation says, whatever the policies are, however they came.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod interpreter;

use std::collections::BTreeMap;
use std::net::IpAddr;

use interpreter::{Packet, passes};
use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::endpoints::{self, Endpoints};
use mesh_policy::failsafe::FailSafe;
use mesh_policy::interface::Interface;
use mesh_policy::model::{
    Action, Block, Condition, Direction, End, Icmp, Namespaces, NetworkSelector, ObjectId, Order, Peer,
    PodSelector, Policy, Port, PortMatch, Reach, Rule, Scope, Side, Sites, Subject, Tier,
};
use mesh_policy::names::Resolved;
use mesh_policy::networkpolicy::{self, Read};
use mesh_policy::object::{Key, NamedPort, Namespace, Pod};
use mesh_policy::protocol::Family;
use mesh_policy::referent::{Referent, What};
use mesh_policy::ruleset::{Hook, Match, State as Ct, Statement, Way};
use mesh_policy::tiers::is_protected;
use mesh_policy::world::{HostOf, Networks, Node};
use mesh_policy::{Compiler, Event, Flow, LabelSelector, Protocol, State, clusternetworkpolicy, evaluate};
use proptest::prelude::*;
use serde_json::{Value, json};

fn settings(node: &str) -> Settings {
    Settings {
        node: node.to_owned(),
        tunnels: ["sennit0".to_owned()].into(),
        keyless: [].into(),
        scope: ["10.0.0.0/8".parse().unwrap(), "fd00::/16".parse().unwrap()].into(),
        own: [
            format!("10.0.{}.0/24", &node[1..]).parse().unwrap(),
            format!("fd00:0:0:{}::/64", &node[1..]).parse().unwrap(),
        ]
        .into(),
        address: Some(format!("fd00:ffff::{}", &node[1..]).parse().unwrap()),
        strangers: false,
        carriers: [51820].into(),
        failsafe: FailSafe::default(),
        resolvers: None,
        check_sources: false,
        audit: false,
        log: Logging { group: 5, denied: 10, allowed: 0 },
        mask: MASK,
    }
}

fn nodes() -> BTreeMap<String, Node> {
    let node = |number: u8, site: &str| {
        let node = Node {
            site: Some(site.to_owned()),
            labels: (number < 3).then(|| [("rack".to_owned(), format!("r{}", number % 2))].into()),
            addresses: [
                format!("fd00:ffff::{number}").parse().unwrap(),
                format!("192.168.0.{number}").parse().unwrap(),
            ]
            .into(),
            // One of them is claimed by all.
            status_addresses: ["172.16.0.9".to_owned(), format!("172.16.0.{number}")]
                .map(|text| text.parse().unwrap())
                .into(),
            prefixes: settings(&format!("n{number}")).own,
        };
        (format!("n{number}"), node)
    };
    [node(1, "aws"), node(2, "gcp"), node(3, "aws")].into()
}

const NAMESPACES: [&str; 3] = ["x", "y", "z"];

/// Pod `index` of 12: its namespace, node and addresses follow from that; its labels and ports do not.
fn pod(index: usize, app: &str, port: u16) -> Pod {
    let (namespace, node) = (NAMESPACES[index % 3], 1 + index / 4);
    let metadata = json!({"name": format!("p{index}"), "namespace": namespace, "labels": {"app": app}});
    let ports = json!([{"containerPort": port, "name": "web"}, {"containerPort": port, "name": "web", "protocol": "UDP"}]);
    let spec = json!({"nodeName": format!("n{node}"), "containers": [{"ports": ports}]});
    let ips = json!([{"ip": format!("10.0.{node}.{index}")}, {"ip": format!("fd00:0:0:{node}::{index:x}")}]);
    let from = |value: Value| serde_json::from_value(value).unwrap();
    Pod::new(
        from(metadata),
        serde_json::from_value(spec).unwrap(),
        serde_json::from_value(json!({"podIPs": ips})).unwrap(),
    )
    .unwrap()
}

fn selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        prop::sample::select(vec!["a", "b", "c"]).prop_map(|app| json!({"matchLabels": {"app": app}})),
        prop::sample::select(vec!["a", "b"]).prop_map(
            |app| json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": [app]}]})
        ),
    ]
}

fn namespace_selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        prop::sample::select(vec!["red", "blue"]).prop_map(|team| json!({"matchLabels": {"team": team}})),
        prop::sample::select(NAMESPACES.to_vec())
            .prop_map(|name| json!({"matchLabels": {"kubernetes.io/metadata.name": name}})),
    ]
}

fn peer() -> impl Strategy<Value = Value> {
    prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        namespace_selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (selector(), namespace_selector())
            .prop_map(|(pods, namespaces)| json!({"podSelector": pods, "namespaceSelector": namespaces})),
        prop::sample::select(vec![
            json!({"cidr": "10.0.1.0/24", "except": ["10.0.1.0/30"]}),
            json!({"cidr": "10.0.0.0/16", "except": ["10.0.1.0/28", "10.0.2.4/32"]}),
            json!({"cidr": "0.0.0.0/0"}),
            json!({"cidr": "fd00::/16", "except": ["fd00:0:0:2::/64"]}),
            json!({"cidr": "fd00:0:0:1::/64"}),
            json!({"cidr": "172.16.0.0/12"}),
        ])
        .prop_map(|block| json!({"ipBlock": block})),
    ]
}

fn port() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::sample::select(vec![80, 81]).prop_map(|port| json!({"port": port})),
        Just(json!({"port": 80, "endPort": 81, "protocol": "UDP"})),
        Just(json!({"port": "web"})),
        Just(json!({"port": "web", "protocol": "UDP"})),
        Just(json!({"protocol": "SCTP"})),
        Just(json!({"port": 0})),
    ]
}

fn rules(side: &'static str) -> impl Strategy<Value = Value> {
    let rule = (prop::collection::vec(peer(), 0..3), prop::collection::vec(port(), 0..3));
    prop::collection::vec(rule.prop_map(move |(peers, ports)| json!({side: peers, "ports": ports})), 0..3)
        .prop_map(Value::Array)
}

fn network_policy() -> impl Strategy<Value = Read> {
    let types = prop::sample::select(vec![
        json!([]),
        json!(["Ingress"]),
        json!(["Egress"]),
        json!(["Ingress", "Egress"]),
    ]);
    let name = (0..6u8, prop::sample::select(NAMESPACES.to_vec()));
    (name, selector(), rules("from"), rules("to"), types).prop_map(
        |((number, namespace), pods, ingress, egress, types)| {
            networkpolicy::read(&json!({
                "metadata": {"name": format!("p{number}"), "namespace": namespace},
                "spec": {"podSelector": pods, "ingress": ingress, "egress": egress, "policyTypes": types},
            }))
        },
    )
}

fn rack() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({}),
        json!({"matchLabels": {"rack": "r1"}}),
        json!({"matchExpressions": [{"key": "rack", "operator": "NotIn", "values": ["r1"]}]}),
    ])
}

fn cluster_policy() -> impl Strategy<Value = Read> {
    let pods = || {
        prop_oneof![
            namespace_selector().prop_map(|namespaces| json!({"namespaces": namespaces})),
            (selector(), namespace_selector()).prop_map(|(pods, namespaces)| {
                json!({"pods": {"podSelector": pods, "namespaceSelector": namespaces}})
            }),
        ]
    };
    let to = prop_oneof![
        3 => pods(),
        1 => rack().prop_map(|nodes| json!({"nodes": nodes})),
        1 => prop::sample::subsequence(vec!["10.0.1.0/24", "10.0.0.0/16", "fd00::/16", "192.168.0.1/32"], 1..3)
            .prop_map(|networks| json!({"networks": networks})),
        1 => Just(json!({"strange": {}})),
    ];
    let protocol = prop::sample::select(vec![
        json!({"tcp": {"destinationPort": {"number": 80}}}),
        json!({"tcp": {"destinationPort": {"range": {"start": 80, "end": 81}}}}),
        json!({"udp": {"destinationPort": {"number": 81}}}),
        json!({"destinationNamedPort": "web"}),
    ]);
    let rules = |side: &'static str, peer: BoxedStrategy<Value>| {
        let action = prop::sample::select(vec!["Accept", "Deny", "Pass"]);
        let protocols = prop::collection::vec(protocol.clone(), 0..3);
        let rule = (action, prop::collection::vec(peer, 1..3), protocols);
        let rule = rule.prop_map(
            move |(action, peers, protocols)| json!({"action": action, side: peers, "protocols": protocols}),
        );
        prop::collection::vec(rule, 0..4)
    };
    let tier = prop::sample::select(vec!["Admin", "Baseline"]);
    (tier, 0..3u8, 0..4u8, pods(), rules("from", pods().boxed()), rules("to", to.boxed())).prop_map(
        |(tier, priority, number, subject, ingress, egress)| {
            clusternetworkpolicy::read(&json!({
                "metadata": {"name": format!("c{number}")},
                "spec": {"tier": tier, "priority": priority, "subject": subject, "ingress": ingress, "egress": egress},
            }))
        },
    )
}

/// Policies of other tiers, as other kinds of objects will bring them.
fn tiered_policy() -> impl Strategy<Value = Read> {
    let tier = prop::sample::select(vec![
        Tier { order: Order(1.0), name: "admin".to_owned(), end: End::Pass },
        Tier { order: Order(2e7), name: "baseline".to_owned(), end: End::Pass },
        Tier { order: Order(5.0), name: "strict".to_owned(), end: End::Deny },
        Tier::sites(),
    ]);
    let action = prop::sample::select(vec![Action::Allow, Action::Deny, Action::Pass, Action::Log]);
    let sites = prop::sample::select(vec![Sites::Named("aws".into()), Sites::Not("aws".into()), Sites::Any]);
    let from = prop_oneof![
        sites.clone().prop_map(Peer::Sites),
        rack().prop_map(|rack| Peer::Nodes(serde_json::from_value(rack).unwrap())),
        selector().prop_map(|pods| {
            let anywhere = Namespaces::Selected(LabelSelector::default());
            Peer::Pods(PodSelector::new(anywhere, serde_json::from_value(pods).unwrap()))
        }),
        prop::sample::subsequence(vec!["a.example.com", "*.example.com", "b.example.org"], 1..3)
            .prop_map(|names| Peer::Domains(names.iter().map(|name| name.parse().unwrap()).collect())),
        service().prop_map(Peer::Service),
        prop::sample::select(vec!["10.0.1.0/24", "10.0.0.0/8", "fd00::/16", "172.16.0.1/32"])
            .prop_map(|net| Peer::Block(Block { net: net.parse().unwrap(), except: vec![] })),
        prop::sample::select(vec![
            json!({}),
            json!({"matchLabels": {"set": "a"}}),
            json!({"matchExpressions": [{"key": "set", "operator": "DoesNotExist"}]}),
        ])
        .prop_map(|labels| {
            Peer::Networks(NetworkSelector {
                scope: Scope::Any,
                labels: serde_json::from_value(labels).unwrap(),
            })
        }),
        namespace_selector().prop_map(|namespaces| {
            let scope = Scope::In(Namespaces::Selected(serde_json::from_value(namespaces).unwrap()));
            Peer::Networks(NetworkSelector { scope, labels: LabelSelector::default() })
        }),
    ];
    let side = || prop::sample::select(vec![Side::Source, Side::Destination]);
    let ports = || {
        prop::sample::select(vec![
            PortMatch::Any,
            PortMatch::Range(80, 80),
            PortMatch::Range(81, 1000),
            PortMatch::Named("web".to_owned()),
        ])
    };
    let protocol = || prop::sample::select(vec![Protocol::TCP, Protocol::UDP, Protocol(47), Protocol::ICMP]);
    let with_ports = || prop::sample::select(vec![Protocol::TCP, Protocol::UDP]);
    let family = || prop::sample::select(Family::BOTH.to_vec());
    let icmp = || {
        (family(), prop::sample::select(vec![8, 128, 3]), prop::option::of(0..2u8))
            .prop_map(|(family, kind, code)| Icmp { family, kind, code })
    };
    let condition = prop_oneof![
        4 => (side(), prop::collection::btree_set(from.clone(), 0..3)).prop_map(|(side, peers)| Condition::Is(side, peers)),
        2 => (side(), prop::collection::btree_set(from, 0..3)).prop_map(|(side, peers)| Condition::IsNot(side, peers)),
        2 => (side(), prop::collection::btree_set((with_ports(), ports()).prop_map(|(protocol, ports)| Port { protocol, ports }), 0..3))
            .prop_map(|(side, ports)| Condition::Ports(side, ports)),
        2 => (side(), with_ports(), prop::collection::btree_set(ports(), 0..3))
            .prop_map(|(side, protocol, ports)| Condition::NotPorts(side, protocol, ports)),
        1 => service().prop_map(Condition::Serves),
        1 => protocol().prop_map(Condition::Protocol),
        1 => protocol().prop_map(Condition::NotProtocol),
        1 => family().prop_map(Condition::Family),
        1 => icmp().prop_map(Condition::Icmp),
        1 => icmp().prop_map(Condition::NotIcmp),
    ];
    let rule = (action, prop::collection::btree_set(condition, 0..4)).prop_map(|(action, when)| Rule {
        name: String::new(),
        action,
        when,
    });
    let rules = || {
        prop::option::of(prop::collection::vec(rule.clone(), 0..4)).prop_map(|rules| {
            rules.map(|rules| {
                rules
                    .into_iter()
                    .enumerate()
                    .map(|(index, rule)| Rule { name: format!("rule[{index}]"), ..rule })
                    .collect::<Vec<_>>()
            })
        })
    };
    let subject = prop_oneof![
        2 => sites.clone().prop_map(Subject::Sites),
        4 => network_policy().prop_map(|read| read.policy.subject),
        1 => rack().prop_map(|rack| Subject::Nodes(serde_json::from_value(rack).unwrap())),
        1 => (network_policy(), sites).prop_map(|(read, sites)| Subject::All([read.policy.subject, Subject::Sites(sites)].into())),
        2 => prop::sample::select(vec![json!({}), json!({"matchLabels": {"set": "a"}})]).prop_map(|labels| {
            let anywhere = Namespaces::Selected(LabelSelector::default());
            let pods = Subject::Pods(PodSelector::new(anywhere, LabelSelector::default()));
            Subject::Any([pods, Subject::Hosts(serde_json::from_value(labels).unwrap())].into())
        }),
    ];
    let staged = prop::sample::select(vec![false, false, true]);
    let reach = prop::sample::select(vec![Reach::Ends, Reach::Ends, Reach::Forwarded, Reach::BeforeNat]);
    // Names are of ports behind NAT.
    let named = |condition: &Condition| match condition {
        Condition::Ports(Side::Destination, ports) => {
            ports.iter().any(|port| matches!(port.ports, PortMatch::Named(_)))
        }
        Condition::NotPorts(Side::Destination, _, ports) => {
            ports.iter().any(|ports| matches!(ports, PortMatch::Named(_)))
        }
        Condition::Serves(_) => true,
        _ => false,
    };
    let kept = move |reach, rules: Option<Vec<Rule>>| {
        let mut rules = rules;
        for rule in rules.iter_mut().flatten().filter(|_| reach == Reach::BeforeNat) {
            rule.when.retain(|condition| !named(condition));
        }
        rules
    };
    (tier, subject, rules(), rules(), 0..4u8, 0..3u8, (staged, reach)).prop_map(
        move |(tier, subject, egress, ingress, number, order, (staged, reach))| Read {
            policy: Policy {
                tier,
                order: Order(f64::from(order)),
                id: ObjectId { kind: "Tiered", namespace: None, name: format!("t{number}") },
                subject,
                egress: kept(reach, egress),
                ingress: kept(reach, ingress),
                reach,
                staged,
            },
            fault: None,
            more: vec![],
        },
    )
}

/// Host endpoints of this node and another, which may be open.
fn host() -> impl Strategy<Value = Referent> {
    host_of(1..3u8)
}

fn host_of(node: impl Strategy<Value = u8>) -> impl Strategy<Value = Referent> {
    let of = (
        node,
        prop::option::of(prop::sample::select(vec!["a", "b"])),
        any::<bool>(),
        prop::option::of(prop::sample::select(vec!["eth0", "eth1", "sennit0"])),
        prop::option::of(prop::sample::select(vec![80u16, 81])),
    );
    of.prop_map(|(node, set, open, interface, port)| Referent {
        id: ObjectId {
            kind: "HostEndpoint",
            namespace: None,
            name: format!("h{node}{}", interface.unwrap_or_default()),
        },
        what: Some(What::Networks(Networks {
            labels: set.map(|set| ("set".to_owned(), set.to_owned())).into_iter().collect(),
            nets: [format!("192.168.0.{node}/32").parse().unwrap()].into(),
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
    })
}

fn service() -> impl Strategy<Value = Key> {
    prop::sample::select(vec!["a", "b"]).prop_map(|name| Key::new(Some("x"), name))
}

/// Some endpoints of a Service: pods, and others.
fn slice() -> impl Strategy<Value = Referent> {
    let pods = (0..12usize).prop_map(|index| pod(index, "a", 80).addresses.into_iter().collect::<Vec<_>>());
    let others = Just(vec!["172.16.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]);
    let addresses = prop::collection::vec(prop_oneof![3 => pods, 1 => others], 0..4);
    let ports = prop::sample::subsequence(
        vec![(Protocol::TCP, 80), (Protocol::TCP, 81), (Protocol::UDP, 80), (Protocol::SCTP, 80)],
        0..4,
    );
    (0..3u8, service(), addresses, ports).prop_map(|(number, service, addresses, ports)| Referent {
        id: ObjectId {
            kind: endpoints::KIND,
            namespace: Some(service.namespace.clone()),
            name: format!("s{number}"),
        },
        what: Some(What::Endpoints(Endpoints {
            service,
            addresses: addresses.into_iter().flatten().collect(),
            ports: ports.into_iter().collect(),
        })),
        fault: None,
        more: vec![],
    })
}

fn resolved() -> impl Strategy<Value = Event> {
    let name = prop::sample::select(vec!["a.example.com", "b.example.com", "b.example.org", "other.net"]);
    let addresses = prop::sample::subsequence(vec!["172.16.0.1", "10.0.2.4", "2001:db8::1"], 1..3);
    (name, addresses, 0..120u32, 0..200u64).prop_map(|(name, addresses, ttl, now)| {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Event::Resolved(Resolved { name: name.to_owned(), addresses, ttl }, now)
    })
}

fn networks() -> impl Strategy<Value = Referent> {
    let nets = prop::sample::subsequence(
        vec!["10.0.1.0/28", "10.0.2.4/32", "fd00:0:0:1::/64", "172.16.0.0/12"],
        0..4,
    );
    let namespace = prop::option::of(prop::sample::select(NAMESPACES.to_vec()));
    (0..3u8, nets, prop::option::of(prop::sample::select(vec!["a", "b"])), namespace).prop_map(
        |(number, nets, set, namespace)| Referent {
            id: ObjectId {
                kind: "NetworkSet",
                namespace: namespace.map(str::to_owned),
                name: format!("s{number}"),
            },
            what: Some(What::Networks(Networks {
                labels: set.map(|set| ("set".to_owned(), set.to_owned())).into_iter().collect(),
                nets: nets.iter().map(|net| net.parse().unwrap()).collect(),
                host: None,
            })),
            fault: None,
            more: vec![],
        },
    )
}

/// Policies of host endpoints and all pods, whose rules ask for little, so that most of them decide something.
fn host_policy() -> impl Strategy<Value = Event> {
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
                for rule in rules.iter_mut().flatten().filter(|_| reach == Reach::BeforeNat) {
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
            };
            Event::Policy(policy.into())
        },
    )
}

/// Where there are pods here and elsewhere, and host endpoints of this node.
fn about_hosts() -> impl Strategy<Value = Vec<Event>> {
    let before = [0, 1, 4, 5].map(|index| Event::Pod(pod(index, "a", 80)));
    let hosts = prop::collection::vec(host_of(Just(1)).prop_map(Event::Referent), 1..4);
    (hosts, prop::collection::vec(host_policy(), 1..5), prop::collection::vec(host_event(), 0..10))
        .prop_map(move |(hosts, policies, then)| [before.to_vec(), hosts, policies, then].concat())
}

/// Of nodes and Services.
fn host_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..12usize, prop::sample::select(vec![80u16, 81])).prop_map(|(index, port)| Event::Pod(pod(index, "a", port))),
        4 => host_policy(),
        2 => slice().prop_map(Event::Referent),
        1 => slice().prop_map(|slice| Event::ReferentGone(slice.id)),
        2 => host().prop_map(Event::Referent),
        1 => host().prop_map(|host| Event::ReferentGone(host.id)),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let app = || prop::sample::select(vec!["a", "b", "c"]);
    prop_oneof![
        3 => (0..12usize, app(), prop::sample::select(vec![80u16, 81])).prop_map(|(index, app, port)| Event::Pod(pod(index, app, port))),
        // Another pod gets the address of one that may still be there.
        1 => (0..12usize, app()).prop_map(|(index, app)| {
            let mut pod = pod(index, app, 80);
            pod.key = Key { namespace: "z".to_owned(), name: format!("q{index}") };
            pod.created = "2026-01-01T00:00:00Z".to_owned();
            Event::Pod(pod)
        }),
        1 => (0..12usize).prop_map(|index| Event::PodGone(pod(index, "a", 80).key)),
        1 => (prop::sample::select(NAMESPACES.to_vec()), prop::sample::select(vec!["red", "blue"])).prop_map(|(name, team)| {
            Event::Namespace(Namespace::new(name, [("team".to_owned(), team.to_owned())].into()))
        }),
        1 => prop::sample::select(NAMESPACES.to_vec()).prop_map(|name| Event::NamespaceGone(name.to_owned())),
        4 => network_policy().prop_map(Event::Policy),
        1 => tiered_policy().prop_map(Event::Policy),
        2 => cluster_policy().prop_map(Event::Policy),
        1 => network_policy().prop_map(|read| Event::PolicyGone(read.policy.id)),
        1 => resolved(),
        1 => (0..200u64).prop_map(Event::Clock),
        1 => networks().prop_map(Event::Referent),
        1 => host().prop_map(Event::Referent),
        2 => slice().prop_map(Event::Referent),
        1 => slice().prop_map(|slice| Event::ReferentGone(slice.id)),
        1 => host().prop_map(|host| Event::ReferentGone(host.id)),
        1 => networks().prop_map(|networks| Event::ReferentGone(networks.id)),
    ]
}

fn flows() -> Vec<Flow> {
    let addresses: Vec<IpAddr> = (0..12)
        .flat_map(|index| pod(index, "a", 80).addresses)
        .chain(["172.16.0.1", "10.0.2.99", "fd00:ffff::2", "2001:db8::1"].map(|text| text.parse().unwrap()))
        .collect();
    let kinds = [
        (Protocol::TCP, 80),
        (Protocol::TCP, 81),
        (Protocol::UDP, 80),
        (Protocol::UDP, 82),
        (Protocol::SCTP, 80),
        (Protocol(47), 0),
        (Protocol::ICMP, 0),
    ];
    let mut all = Vec::new();
    for (from, source) in addresses.iter().enumerate() {
        for (to, destination) in addresses.iter().enumerate() {
            if source.is_ipv4() == destination.is_ipv4() && source != destination {
                let (protocol, port) = kinds[(from * 7 + to) % kinds.len()];
                let icmp = Protocol::icmp(Family::of(*source));
                let protocol = if protocol == Protocol::ICMP { icmp } else { protocol };
                let mut flow = Flow::new(*source, *destination, protocol, port);
                flow.source_port = [80, 81, 4000][(from + to) % 3];
                flow.icmp.1 = ((from + to) % 2) as u8;
                // Some are begun towards an address that stands for others.
                let service = if source.is_ipv4() { "172.16.0.1" } else { "2001:db8::1" };
                let dialled = (service.parse().unwrap(), [80, 81, 30080][(from + to) % 3]);
                flow.dialled = Some(dialled).filter(|_| protocol.has_ports() && (from * 3 + to) % 4 == 0);
                all.push(flow);
            }
        }
    }
    all
}

fn compiler(node: &str, events: &[Event]) -> Compiler {
    let mut compiler = Compiler::new(settings(node));
    compiler.configure(settings(node), nodes());
    events.iter().for_each(|event| compiler.take(event.clone()));
    compiler.update();
    compiler.turn_epoch(Some(0x100));
    compiler
}

/// What the node's ruleset does with the flow, both ends' nodes being this one or not.
fn compiled(compiler: &Compiler, flow: &Flow, own: fn(&State, IpAddr) -> bool) -> [Option<bool>; 2] {
    let state = compiler.state();
    let local = [own(state, flow.source), own(state, flow.destination)];
    if local == [false, false] {
        return [None, None];
    }
    let mut packet = packet(flow);
    let passed = passes(compiler.ruleset(), Hook::Forward, &mut packet);
    // What comes back is judged as what went there.
    let mut back = answer(&packet);
    let comes_back = passes(compiler.ruleset(), Hook::Forward, &mut back);
    // Connections to an address that a name has no more go on.
    let all = ["*.example.com", "*.example.org"].map(|name| name.parse().unwrap()).into();
    let names = &state.world.names;
    let lingers = [flow.source, flow.destination].into_iter().any(|address| names.had(&all, address));
    assert!(comes_back == passed || lingers && comes_back, "{flow:?} there and back");
    [local[0].then_some(passed), local[1].then_some(passed)]
}

/// The first packet of a flow.
fn packet(flow: &Flow) -> Packet {
    let mut packet = Packet::new(flow.source, flow.destination, flow.protocol.0, flow.port);
    (packet.client_port, packet.icmp, packet.dialled) = (flow.source_port, flow.icmp, flow.dialled);
    let name = |interface: Option<Interface>, other: &str| {
        interface.map_or(other.to_owned(), |interface| interface.to_string())
    };
    (packet.interface, packet.leaves_by) = (name(flow.arrives_by, "eth0"), name(flow.leaves_by, "eth1"));
    packet
}

/// What answers it, the same way back; nobody has judged it.
fn answer(packet: &Packet) -> Packet {
    Packet {
        way: Way::Reply,
        state: Ct::Known,
        interface: packet.leaves_by.clone(),
        leaves_by: packet.interface.clone(),
        mark: 0,
        ..packet.clone()
    }
}

/// By which interfaces a flow comes to n1 or leaves it: what is of the mesh by the tunnel.
fn routed(state: &State, flow: Flow) -> Flow {
    let of_mesh = |address: IpAddr| settings("n1").scope.iter().any(|net| net.contains(&address));
    let by = |address: IpAddr, other: &str| {
        let tunnel = of_mesh(address) && !own(state, address);
        Some(if tunnel { "sennit0" } else { other }.parse().unwrap())
    };
    Flow { arrives_by: by(flow.source, "eth0"), leaves_by: by(flow.destination, "eth1"), ..flow }
}

fn own(state: &State, address: IpAddr) -> bool {
    state.world.holder(address).is_some_and(|pod| pod.node.as_deref() == Some("n1"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_compiled_ruleset_says_what_the_evaluation_says(
        events in prop_oneof![prop::collection::vec(event(), 1..40), about_hosts()],
    ) {
        let compiler = compiler("n1", &events);
        let State { world, policies, .. } = compiler.state();
        for flow in flows() {
            let flow = routed(compiler.state(), flow);
            let judgement = evaluate(world, policies, &flow);
            let [egress, ingress] = compiled(&compiler, &flow, own);
            // Addresses of this node that nobody has are the base chains' business.
            let strange = |address: IpAddr| settings("n1").own.iter().any(|net| net.contains(&address)) && world.holder(address).is_none();
            // And what is of the node itself is not forwarded.
            let of_node = |address: IpAddr| world.is_known_by("n1", address);
            if [flow.source, flow.destination].into_iter().any(|address| strange(address) || of_node(address)) {
                continue;
            }
            let expected = match (egress, ingress) {
                (Some(_), Some(_)) => judgement.allowed(),
                (Some(_), None) => judgement.egress.allowed,
                (None, Some(_)) => judgement.ingress.allowed,
                (None, None) => continue,
            };
            prop_assert_eq!(egress.or(ingress), Some(expected), "{:?}: {:?}\n{}", flow, judgement, mesh_policy::explain::explain(compiler.state(), &flow));
        }
    }

    #[test]
    fn step_by_step_is_as_from_scratch(
        events in prop_oneof![prop::collection::vec(event(), 1..40), about_hosts()],
        cuts in prop::collection::vec(any::<bool>(), 40),
    ) {
        let scratch = compiler("n1", &events);
        let mut steps = Compiler::new(settings("n1"));
        let mut standing = mesh_policy::ruleset::Ruleset::default();
        steps.configure(settings("n1"), nodes());
        for (event, cut) in events.iter().zip(cuts) {
            steps.take(event.clone());
            if cut {
                standing.apply(&steps.update().changes);
                prop_assert_eq!(&standing, steps.ruleset());
            }
        }
        standing.apply(&steps.update().changes);
        standing.apply(&steps.turn_epoch(Some(0x100)));
        prop_assert_eq!(&standing, steps.ruleset());
        prop_assert_eq!(steps.ruleset(), scratch.ruleset());
    }

    #[test]
    fn the_order_of_objects_changes_no_byte(events in prop::collection::vec(event(), 1..30), seed in any::<u64>()) {
        // Of each object its last state, in another order.
        let mut last: BTreeMap<String, Event> = BTreeMap::new();
        for event in events {
            let (name, event) = match event {
                Event::Pod(pod) => (format!("pod {}", pod.key), Some(Event::Pod(pod))),
                Event::Namespace(one) => (format!("namespace {}", one.name), Some(Event::Namespace(one))),
                Event::Policy(read) => (read.policy.id.to_string(), Some(Event::Policy(read))),
                Event::Referent(one) => (one.id.to_string(), Some(Event::Referent(one))),
                _ => (String::new(), None),
            };
            last.extend(event.map(|event| (name, event)));
        }
        let events: Vec<Event> = last.into_values().collect();
        let mut other = events.clone();
        let mut random = seed;
        for index in (1..other.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            other.swap(index, (random >> 33) as usize % (index + 1));
        }
        let text = |events: &[Event]| mesh_policy::render::ruleset(compiler("n1", events).ruleset(), mesh_policy::render::Slot::A);
        prop_assert_eq!(text(&events), text(&other));
    }

    #[test]
    fn an_object_that_has_nothing_to_do_with_it_changes_no_verdict(events in prop::collection::vec(event(), 1..30), extra in network_policy()) {
        let mut extra = extra;
        let elsewhere = json!({"metadata": {"name": "e", "namespace": "elsewhere"}, "spec": {}});
        extra.policy.id = networkpolicy::read(&elsewhere).policy.id;
        extra.policy.subject = networkpolicy::read(&elsewhere).policy.subject;
        let before = compiler("n1", &events);
        let mut more = events;
        more.push(Event::Policy(extra));
        let mut bystander = pod(5, "zzz", 80);
        bystander.key = Key { namespace: "elsewhere".to_owned(), name: "b".to_owned() };
        bystander.addresses = ["10.0.9.9".parse().unwrap()].into();
        more.push(Event::Pod(bystander));
        let after = compiler("n1", &more);
        for flow in flows() {
            let of = |compiler: &Compiler| evaluate(&compiler.state().world, &compiler.state().policies, &flow);
            prop_assert_eq!(of(&before), of(&after));
        }
    }

    #[test]
    fn a_flow_that_may_not_go_on_is_judged_again(
        (events, then) in prop_oneof![
            (prop::collection::vec(event(), 1..25), event().boxed()),
            (about_hosts(), host_event().boxed()),
        ],
    ) {
        let mut compiler = compiler("n1", &events);
        let allowed = |compiler: &Compiler| -> Vec<Flow> {
            flows().into_iter().map(|flow| routed(compiler.state(), flow)).filter(|flow| compiled(compiler, flow, own).into_iter().flatten().all(|passed| passed)).collect()
        };
        let before = allowed(&compiler);
        compiler.take(then);
        let delta = compiler.update();
        let after = allowed(&compiler);
        let lost = before.iter().any(|flow| !after.contains(flow));
        prop_assert!(delta.revokes || !lost, "{:?}", delta.changes);
    }
}

/// What the node's ruleset does with a flow between the node itself and somebody who is none of its pods.
fn of_the_node(compiler: &Compiler, flow: &Flow, hook: Hook) -> bool {
    let mut packet = packet(flow);
    if !compiler.ruleset().chains.values().any(|chain| chain.hook == Some(hook)) {
        return true;
    }
    let passed = passes(compiler.ruleset(), hook, &mut packet);
    // What answers goes through the other hook, and is judged there: it may not make good what was revoked.
    let other = if hook == Hook::Input { Hook::Output } else { Hook::Input };
    let mut back = answer(&packet);
    if !compiler.ruleset().chains.contains_key("host_output") || !passed && back.leaves_by == "sennit0" {
        return passed;
    }
    let answered = passes(compiler.ruleset(), other, &mut back);
    assert_eq!(answered, passed, "{flow:?} and its answer");
    assert!(passed || back.mark == 0, "{flow:?}: its answer is marked as judged");
    passed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_protected_node_is_judged_as_its_host_endpoint(
        events in prop_oneof![prop::collection::vec(event(), 1..40), about_hosts()],
    ) {
        let compiler = compiler("n1", &events);
        let State { world, policies, .. } = compiler.state();
        let own: Vec<IpAddr> = ["192.168.0.1", "fd00:ffff::1"].map(|text| text.parse().unwrap()).into();
        let others = ["10.0.2.4", "fd00:0:0:2::4", "172.16.0.3", "2001:db8::1", "192.168.0.2"].map(|text| text.parse::<IpAddr>().unwrap());
        for (own, other) in own.iter().flat_map(|own| others.iter().map(move |other| (*own, *other))) {
            if own.is_ipv4() != other.is_ipv4() {
                continue;
            }
            for (protocol, port) in [(Protocol::TCP, 22), (Protocol::TCP, 80), (Protocol::UDP, 53), (Protocol::UDP, 81), (Protocol(47), 0)] {
                let mut towards = Flow::new(other, own, protocol, port);
                // The port of a carrier at the other end says nothing.
                towards.source_port = 51820;
                let away = Flow::new(own, other, protocol, port);
                for interface in ["eth0", "sennit0"] {
                    let by = Some(interface.parse().unwrap());
                    let of_mesh = settings("n1").scope.iter().any(|net| net.contains(&other));
                    if interface == "sennit0" && !of_mesh {
                        continue;
                    }
                    let (towards, away) = (Flow { arrives_by: by, ..towards }, Flow { leaves_by: by, ..away });
                    // Where nothing protects the node, what goes by no tunnel is not judged.
                    let judged = |flow: &Flow, direction| is_protected(world, policies, flow.judged(direction));
                    let ingress = evaluate(world, policies, &towards).ingress.allowed
                        || interface == "eth0" && !judged(&towards, Direction::Ingress);
                    let egress = evaluate(world, policies, &away).egress.allowed || !judged(&away, Direction::Egress);
                    prop_assert_eq!(of_the_node(&compiler, &towards, Hook::Input), ingress, "{:?}", towards);
                    if interface == "eth0" {
                        prop_assert_eq!(of_the_node(&compiler, &away, Hook::Output), egress, "{:?}", away);
                    }
                }
            }
        }
    }
}

#[test]
fn only_packets_of_who_began_a_flow_are_told() {
    // An answer's source is the server: the log would have the flow the wrong way round.
    let mut told = settings("n1");
    told.log.allowed = 1;
    let mut compiler = Compiler::new(told.clone());
    compiler.configure(told, nodes());
    compiler.take(Event::Pod(pod(0, "a", 80)));
    let spec = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{"from": [{"podSelector": {}}]}]});
    let deny = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": [{"action": "Deny", "from": [{"namespaces": {"matchLabels": {"a": "b"}}}]}]});
    compiler.take(Event::Policy(networkpolicy::read(
        &json!({"metadata": {"name": "p", "namespace": "x"}, "spec": spec}),
    )));
    compiler
        .take(Event::Policy(clusternetworkpolicy::read(&json!({"metadata": {"name": "c"}, "spec": deny}))));
    compiler.update();
    let of_classes = |name: &&String| name.as_bytes().get(1) == Some(&b'_') && !name.starts_with("x_");
    let chains = compiler.ruleset().chains.iter().filter(|(name, _)| of_classes(name));
    let rules = chains.flat_map(|(_, chain)| &chain.rules);
    let logs: Vec<_> =
        rules.filter(|rule| rule.statements.iter().any(|s| matches!(s, Statement::Log { .. }))).collect();
    assert!(logs.len() >= 4, "{logs:?}");
    assert!(logs.iter().all(|rule| rule.matches.contains(&Match::Direction(Way::Original))), "{logs:?}");
}

#[test]
fn directions_are_told_apart() {
    assert_eq!(Direction::BOTH.map(Direction::as_str), ["egress", "ingress"]);
}

#[test]
fn more_tiers_than_the_kernel_follows_deny_what_would_come_after() {
    for count in [1, 9, 10, 14] {
        let mut compiler = Compiler::new(settings("n1"));
        compiler.configure(settings("n1"), nodes());
        compiler.take(Event::Pod(pod(0, "a", 80)));
        compiler.take(Event::Pod(pod(4, "b", 80)));
        for number in 0..count {
            let tier = Tier { order: Order(f64::from(number)), name: format!("t{number}"), end: End::Pass };
            let policy = Policy {
                tier,
                order: Order(1.0),
                id: ObjectId { kind: "Tiered", namespace: None, name: format!("p{number}") },
                subject: network_policy_of_all(),
                egress: None,
                ingress: Some(vec![Rule {
                    name: "ingress[0]".to_owned(),
                    action: Action::Pass,
                    when: [].into(),
                }]),
                reach: Reach::Ends,
                staged: false,
            };
            compiler.take(Event::Policy(policy.into()));
        }
        compiler.update();
        let [from, to] = [pod(4, "b", 80), pod(0, "a", 80)].map(|pod| *pod.addresses.first().unwrap());
        let flow = Flow::new(from, to, Protocol::TCP, 80);
        let state = compiler.state();
        let allowed = evaluate(&state.world, &state.policies, &flow).ingress.allowed;
        assert_eq!((allowed, compiled(&compiler, &flow, own)[1]), (count <= 9, Some(count <= 9)), "{count}");
    }
}

fn network_policy_of_all() -> Subject {
    let anywhere = Namespaces::Selected(LabelSelector::default());
    Subject::Pods(PodSelector::new(anywhere, LabelSelector::default()))
}
