//! Random objects that policy is decided from, and flows.

mod hosts;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::failsafe::FailSafe;
use mesh_policy::model::{
    Action, Block, Condition, End, Icmp, Namespaces, NetworkSelector, ObjectId, Order, Peer, PodSelector,
    Policy, Port, PortMatch, Reach, Rule, Scope, Side, Sites, Subject, Tier,
};
use mesh_policy::names::Resolved;
use mesh_policy::networkpolicy::{self, Read};
use mesh_policy::object::{Key, Namespace, Pod};
use mesh_policy::protocol::Family;
use mesh_policy::referent::{Referent, What};
use mesh_policy::refusal::Outcome;
use mesh_policy::unread::Unread;
use mesh_policy::world::{Networks, Node};
use mesh_policy::{Event, Flow, LabelSelector, Protocol, clusternetworkpolicy};
use proptest::prelude::*;
use serde_json::{Value, json};

pub(crate) use hosts::*;

pub(crate) fn settings(node: &str) -> Settings {
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
        outside_prefixes: false,
        carriers: [51820].into(),
        failsafe: FailSafe::default(),
        resolvers: None,
        check_sources: false,
        outside: [].into(),
        vxlan: [].into(),
        audit: false,
        log: Logging { group: 5, denied: 10, allowed: 0 },
        mask: MASK,
        budgets: Default::default(),
    }
}

pub(crate) fn nodes() -> BTreeMap<String, Node> {
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

pub(crate) const NAMESPACES: [&str; 3] = ["x", "y", "z"];

/// Pod `index` of 12: its namespace, node and addresses follow from that; its labels and ports do not.
pub(crate) fn pod(index: usize, app: &str, port: u16) -> Pod {
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

pub(crate) fn selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        prop::sample::select(vec!["a", "b", "c"]).prop_map(|app| json!({"matchLabels": {"app": app}})),
        prop::sample::select(vec!["a", "b"]).prop_map(
            |app| json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": [app]}]})
        ),
    ]
}

pub(crate) fn namespace_selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        prop::sample::select(vec!["red", "blue"]).prop_map(|team| json!({"matchLabels": {"team": team}})),
        prop::sample::select(NAMESPACES.to_vec())
            .prop_map(|name| json!({"matchLabels": {"kubernetes.io/metadata.name": name}})),
    ]
}

pub(crate) fn peer() -> impl Strategy<Value = Value> {
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

pub(crate) fn port() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::sample::select(vec![80, 81]).prop_map(|port| json!({"port": port})),
        Just(json!({"port": 80, "endPort": 81, "protocol": "UDP"})),
        Just(json!({"port": "web"})),
        Just(json!({"port": "web", "protocol": "UDP"})),
        Just(json!({"protocol": "SCTP"})),
        Just(json!({"port": 0})),
    ]
}

pub(crate) fn rules(side: &'static str) -> impl Strategy<Value = Value> {
    let rule = (prop::collection::vec(peer(), 0..3), prop::collection::vec(port(), 0..3));
    prop::collection::vec(rule.prop_map(move |(peers, ports)| json!({side: peers, "ports": ports})), 0..3)
        .prop_map(Value::Array)
}

pub(crate) fn network_policy() -> impl Strategy<Value = Read> {
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

pub(crate) fn rack() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({}),
        json!({"matchLabels": {"rack": "r1"}}),
        json!({"matchExpressions": [{"key": "rack", "operator": "NotIn", "values": ["r1"]}]}),
    ])
}

pub(crate) fn cluster_policy() -> impl Strategy<Value = Read> {
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
pub(crate) fn tiered_policy() -> impl Strategy<Value = Read> {
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
        (namespace_selector(), any::<bool>()).prop_map(|(namespaces, none)| {
            let namespaces = Namespaces::Selected(serde_json::from_value(namespaces).unwrap());
            let scope = if none { Scope::InOrNone(namespaces) } else { Scope::In(namespaces) };
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
        2 => (side(), prop::collection::btree_set((with_ports(), ports()).prop_map(|(protocol, ports)| Port { protocol, ports }), 0..5))
            .prop_map(|(side, ports)| Condition::Ports(side, ports)),
        2 => (side(), with_ports(), prop::collection::btree_set(ports(), 0..3))
            .prop_map(|(side, protocol, ports)| Condition::NotPorts(side, Some(protocol), ports)),
        1 => (side(), prop::sample::subsequence(vec!["web", "none"], 1..3)).prop_map(|(side, names)| {
            Condition::NotPorts(side, None, names.into_iter().map(|name| PortMatch::Named(name.to_owned())).collect())
        }),
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
                replaces: None,
            },
            fault: None,
            more: vec![],
            hints: vec![],
            outcome: Outcome::Rest,
        },
    )
}

pub(crate) fn resolved() -> impl Strategy<Value = Event> {
    let name = prop::sample::select(vec!["a.example.com", "b.example.com", "b.example.org", "other.net"]);
    let addresses = prop::sample::subsequence(vec!["172.16.0.1", "10.0.2.4", "2001:db8::1"], 1..3);
    (name, addresses, 0..120u32, 0..200u64).prop_map(|(name, addresses, ttl, now)| {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let asker = "10.0.1.1".parse().unwrap();
        Event::Resolved(Resolved { name: name.to_owned(), addresses, ttl, asker }, now)
    })
}

/// Returns unread parts of an object, mostly none.
pub(crate) fn unread() -> impl Strategy<Value = Unread> {
    prop_oneof![
        8 => Just(Unread::default()),
        1 => any::<bool>().prop_map(|nets| Unread { nets, all_labels: !nets, ..Unread::default() }),
        1 => Just(Unread { labels: ["set".to_owned()].into(), ..Unread::default() }),
        1 => Just(Unread { ports: true, ..Unread::default() }),
    ]
}

pub(crate) fn networks() -> impl Strategy<Value = Referent> {
    let nets = prop::sample::subsequence(
        vec!["10.0.1.0/28", "10.0.2.4/32", "fd00:0:0:1::/64", "172.16.0.0/12"],
        0..4,
    );
    let namespace = prop::option::of(prop::sample::select(NAMESPACES.to_vec()));
    let set = prop::option::of(prop::sample::select(vec!["a", "b"]));
    (0..3u8, nets, set, namespace, unread()).prop_map(|(number, nets, set, namespace, unread)| Referent {
        id: ObjectId {
            kind: "NetworkSet",
            namespace: namespace.map(str::to_owned),
            name: format!("s{number}"),
        },
        what: Some(What::Networks(Networks {
            labels: set.map(|set| ("set".to_owned(), set.to_owned())).into_iter().collect(),
            nets: Arc::new(nets.iter().map(|net| net.parse().unwrap()).collect()),
            host: None,
            unread,
        })),
        fault: None,
        more: vec![],
        outcome: Outcome::Rest,
    })
}

pub(crate) fn event() -> impl Strategy<Value = Event> {
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

pub(crate) fn flows() -> Vec<Flow> {
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
