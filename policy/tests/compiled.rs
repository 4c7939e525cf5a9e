//! The compiled ruleset says what the evaluation says, whatever the policies are, however they came.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod interpreter;
mod random;

use std::collections::BTreeMap;
use std::net::IpAddr;

use interpreter::{Packet, passes};
use mesh_policy::budget::{Budget, Budgets};
use mesh_policy::compile::Settings;
use mesh_policy::interface::Interface;
use mesh_policy::model::{
    Action, Direction, End, Namespaces, ObjectId, Order, PodSelector, Policy, Reach, Rule, Subject, Tier,
};
use mesh_policy::networkpolicy;
use mesh_policy::object::Key;
use mesh_policy::referent::{Referent, What};
use mesh_policy::refusal::Outcome;
use mesh_policy::ruleset::{Hook, Match, State as Ct, Statement, Way};
use mesh_policy::tiers::is_protected;
use mesh_policy::world::{HostOf, Networks};
use mesh_policy::{Compiler, Event, Flow, LabelSelector, Protocol, State, clusternetworkpolicy, evaluate};
use proptest::prelude::*;
use random::*;
use serde_json::json;

fn compiler(node: &str, events: &[Event]) -> Compiler {
    compiler_within(node, events, Budgets::default())
}

fn compiler_within(node: &str, events: &[Event], budgets: Budgets) -> Compiler {
    let settings = mesh_policy::compile::Settings { budgets, ..settings(node) };
    let mut compiler = Compiler::new(settings.clone());
    compiler.configure(settings, nodes());
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
    let passed = before_conntrack(compiler, Hook::RawInput, &mut packet)
        && passes(compiler.ruleset(), Hook::Forward, &mut packet);
    // What comes back is judged as what went there.
    // Before conntrack each packet is judged by itself.
    let mut first = self::packet(flow);
    if !before_conntrack(compiler, Hook::RawInput, &mut first) {
        return [local[0].then_some(passed), local[1].then_some(passed)];
    }
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

/// Whether a packet passes a hook before conntrack, where there is one; what it is not to know of is untracked afterwards.
fn before_conntrack(compiler: &Compiler, hook: Hook, packet: &mut Packet) -> bool {
    let mut chains = compiler.ruleset().chains.values();
    let passed = !chains.any(|chain| chain.hook == Some(hook)) || passes(compiler.ruleset(), hook, packet);
    packet.before_nat = false;
    passed
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
        let of_pod = own(state, address);
        Some(
            if tunnel {
                "sennit0"
            } else if of_pod {
                "veth0"
            } else {
                other
            }
            .parse()
            .unwrap(),
        )
    };
    Flow { arrives_by: by(flow.source, "eth0"), leaves_by: by(flow.destination, "eth1"), ..flow }
}

fn own(state: &State, address: IpAddr) -> bool {
    state.world.holder(address).is_some_and(|pod| pod.node.as_deref() == Some("n1"))
}

/// The usual ones, or such that few policies are within them. What is over that of the node an evaluation does not know.
fn budgets() -> impl Strategy<Value = Budgets> {
    let of = |rules| Budget { rules, elements: 1000, bytes: u64::MAX };
    let small = (0_usize..12, 0_usize..8, 0_usize..12).prop_map(move |(namespace, class, operator)| {
        Budgets { namespace: of(namespace), class: of(class), operator: of(operator), ..Budgets::default() }
    });
    prop_oneof![Just(Budgets::default()), small]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_compiled_ruleset_says_what_the_evaluation_says(
        events in prop_oneof![prop::collection::vec(event(), 1..40), about_hosts()],
        budgets in budgets(),
    ) {
        let compiler = compiler_within("n1", &events, budgets);
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
        budgets in budgets(),
    ) {
        let scratch = compiler_within("n1", &events, budgets.clone());
        let within = mesh_policy::compile::Settings { budgets, ..settings("n1") };
        let mut steps = Compiler::new(within.clone());
        let mut standing = mesh_policy::ruleset::Ruleset::default();
        steps.configure(within, nodes());
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
    let raw = if hook == Hook::Input { Hook::RawInput } else { Hook::RawOutput };
    packet.for_this_host = hook == Hook::Input;
    if !before_conntrack(compiler, raw, &mut packet) {
        return false;
    }
    let passed = passes(compiler.ruleset(), hook, &mut packet);
    if packet.state == Ct::Untracked {
        return passed;
    }
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
        // The first pod is one of the node's own.
        let others = ["10.0.2.4", "fd00:0:0:2::4", "172.16.0.3", "2001:db8::1", "192.168.0.2", "10.0.1.0", "fd00:0:0:1::"].map(|text| text.parse::<IpAddr>().unwrap());
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
                    let mesh_policy::compile::Settings { scope, own: nets, .. } = settings("n1");
                    let of_mesh = scope.iter().any(|net| net.contains(&other)) && !nets.iter().any(|net| net.contains(&other));
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
fn a_pod_has_no_address_of_another_node_whichever_is_known_first() {
    let policy = json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "c"}}}]}]});
    let policy = networkpolicy::read(&json!({"metadata": {"name": "p", "namespace": "x"}, "spec": policy}));
    let (server, mut client) = (pod(0, "a", 80), pod(9, "c", 80));
    let taken: IpAddr = "10.7.7.7".parse().unwrap();
    client.addresses = [taken].into();
    let mut taken_by = nodes();
    taken_by.get_mut("n2").unwrap().addresses.insert(taken);
    let settings = || Settings { outside_prefixes: true, ..settings("n1") };
    let mut compiler = Compiler::new(settings());
    compiler.configure(settings(), nodes());
    for event in [Event::Pod(server), Event::Pod(client), Event::Policy(policy)] {
        compiler.take(event);
    }
    let flow = Flow::new(taken, "10.0.1.0".parse().unwrap(), Protocol::TCP, 80);
    for (nodes, expected) in [(nodes(), true), (taken_by, false), (nodes(), true)] {
        compiler.configure(settings(), nodes);
        compiler.update();
        compiler.turn_epoch(Some(0x100));
        let routed = routed(compiler.state(), flow);
        assert_eq!(compiled(&compiler, &routed, own)[1], Some(expected));
        let state = compiler.state();
        assert_eq!(evaluate(&state.world, &state.policies, &routed).allowed(), expected);
    }
}

#[test]
fn an_answer_by_a_tunnel_makes_nothing_good_that_was_begun_by_a_host_endpoint() {
    let mut compiler = Compiler::new(settings("n1"));
    compiler.configure(settings("n1"), nodes());
    let host =
        HostOf { node: "n1".to_owned(), interface: Some("eth0".parse().unwrap()), ..HostOf::default() };
    compiler.take(Event::Referent(Referent {
        id: ObjectId { kind: "HostEndpoint", namespace: None, name: "h".to_owned() },
        what: Some(What::Networks(Networks { host: Some(host), ..Networks::default() })),
        fault: None,
        more: vec![],
        outcome: Outcome::Rest,
    }));
    compiler.update();
    compiler.turn_epoch(Some(0x100));
    let [node, far] = ["192.168.0.1", "10.0.2.4"].map(|text| text.parse().unwrap());
    let mut back = answer(&packet(&Flow::new(node, far, Protocol::UDP, 80)));
    back.interface = "sennit0".to_owned();
    assert!(passes(compiler.ruleset(), Hook::Input, &mut back));
    assert_eq!(back.mark, 0, "nobody has judged it");
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
                replaces: None,
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

#[test]
fn sources_are_judged_by_their_interface() {
    for check_sources in [true, false] {
        let mut around = settings("n1");
        around.check_sources = check_sources;
        around.outside = ["eth0".to_owned(), "eth1".to_owned()].into();
        let mut compiler = Compiler::new(around.clone());
        compiler.configure(around, nodes());
        compiler.update();
        let passed = |interface: &str, source: &str, no_way_back: bool| {
            let far = if source.contains(':') { "2001:db8::9" } else { "192.0.2.9" };
            let flow = Flow::new(source.parse().unwrap(), far.parse().unwrap(), Protocol::UDP, 80);
            let mut packet = Packet { interface: interface.to_owned(), no_way_back, ..packet(&flow) };
            passes(compiler.ruleset(), Hook::Sources, &mut packet)
        };
        for (own, foreign) in [("10.0.1.1", "198.51.100.1"), ("fd00:0:0:1::1", "2001:db8::1")] {
            for interface in ["cali1", "nobody-knows-it"] {
                assert!(passed(interface, own, false) && passed(interface, foreign, false), "{interface}");
                assert_eq!(passed(interface, own, true), !check_sources, "{interface} {own}");
                assert_eq!(passed(interface, foreign, true), !check_sources, "{interface} {foreign}");
            }
            for outside in ["eth0", "eth1"] {
                // Another way back is fine, and one does not help.
                assert!(passed(outside, foreign, true) && !passed(outside, own, false), "{outside}");
            }
            assert!(passed("sennit0", foreign, true) && passed("lo", own, true), "judged elsewhere");
        }
        assert!(passed("cali1", "fe80::7", true), "addresses of the link need no route");
    }
}
