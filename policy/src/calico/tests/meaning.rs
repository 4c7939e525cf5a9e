//! Tests of the meaning of manifests, by the cases of Calico's own semantics.

use super::*;
use crate::kind::Kind;
use crate::object::{Namespace, Pod};
use crate::probe::Probe;
use crate::refusal::Outcome;
use crate::{Event, State};

fn said(manifest: &Value) -> Event {
    let text = |field: &str| manifest[field].as_str().unwrap();
    Kind::of(text("apiVersion"), text("kind")).unwrap().read(manifest).there()
}

fn pod(namespace: &str, name: &str, number: u8) -> Event {
    let read = |value: Value| serde_json::from_value(value).unwrap();
    let metadata = json!({"name": name, "namespace": namespace, "labels": {"app": name}});
    let ports = json!([{"name": "http", "containerPort": 8080}, {"name": "dns", "containerPort": 53, "protocol": "UDP"}]);
    let spec = serde_json::from_value(json!({"containers": [{"ports": ports}]})).unwrap();
    let addresses =
        json!({"podIPs": [{"ip": format!("10.0.0.{number}")}, {"ip": format!("fd00::{number}")}]});
    Event::Pod(Pod::new(read(metadata), spec, serde_json::from_value(addresses).unwrap()).unwrap())
}

fn calico(kind: &str, metadata: Value, spec: Value) -> Event {
    said(&json!({"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec}))
}

fn policy(spec: Value) -> Event {
    calico(GLOBAL, json!({"name": "p"}), spec)
}

fn state(events: impl IntoIterator<Item = Event>) -> State {
    let mut state = State::default();
    state.world.set_bounds(&[].into(), true);
    for name in ["shop", "dev"] {
        let labels = [("team".to_owned(), name.to_owned())].into();
        state.take(Event::Namespace(Namespace::new(name, labels)));
    }
    let pods = [pod("shop", "web", 1), pod("dev", "client", 2)];
    pods.into_iter().chain(events).for_each(|event| drop(state.take(event)));
    state
}

/// Reports whether the policy lets a sender reach web.
fn allows(state: &State, from: Value, protocol: &str, port: u16, family: u8) -> bool {
    let port = if ["TCP", "UDP"].contains(&protocol) { json!(port) } else { json!(null) };
    let probe = json!({"from": from, "to": {"pod": "shop/web"}, "protocol": protocol, "port": port, "family": family});
    let answer = serde_json::from_value::<Probe>(probe).unwrap().answer(state);
    assert_eq!(answer.error, None);
    answer.verdict == "allow"
}

fn tcp(state: &State, from: Value) -> bool {
    allows(state, from, "TCP", 80, 4)
}

fn client() -> Value {
    json!({"pod": "dev/client"})
}

fn to_web(rules: Value) -> Value {
    json!({"selector": "app == 'web'", "types": ["Ingress"], "ingress": rules})
}

#[test]
fn a_rule_of_one_family_is_not_there_for_the_other() {
    for field in ["nets", "notNets"] {
        for (nets, other) in [("172.16.0.0/12", 6), ("2001:db8::/32", 4)] {
            let only = json!({"source": {field: [nets]}});
            let rule = |action: &str| {
                let mut rule = only.clone();
                rule["action"] = json!(action);
                rule
            };
            let allowed = state([policy(to_web(json!([rule("Allow")])))]);
            assert!(!allows(&allowed, client(), "TCP", 80, other), "{field} {nets}");
            let denied = state([policy(to_web(json!([rule("Deny"), {"action": "Allow"}])))]);
            assert!(allows(&denied, client(), "TCP", 80, other), "{field} {nets}");
            let own = 10 - other;
            assert_eq!(allows(&allowed, client(), "TCP", 80, own), field == "notNets");
        }
    }
    // Of both families it is there for both; of two lists each counts.
    let both = json!([{"action": "Allow", "source": {"notNets": ["172.16.0.0/12", "2001:db8::/32"]}}]);
    let both = state([policy(to_web(both))]);
    assert!([4, 6].iter().all(|family| allows(&both, client(), "TCP", 80, *family)));
    let apart = json!([{"action": "Allow", "source": {"notNets": ["172.16.0.0/12"]}, "destination": {"notNets": ["2001:db8::/32"]}}]);
    let apart = state([policy(to_web(apart))]);
    assert!([4, 6].iter().all(|family| !allows(&apart, client(), "TCP", 80, *family)));
}

#[test]
fn names_of_ports_need_no_protocol() {
    let allow =
        state([policy(to_web(json!([{"action": "Allow", "destination": {"ports": ["http", "dns"]}}])))]);
    assert!(allow.faults.is_empty(), "{:?}", allow.faults);
    let asked = [("TCP", 8080), ("UDP", 53), ("TCP", 80), ("TCP", 53), ("ICMP", 0)];
    let verdicts = |state: &State| asked.map(|(protocol, port)| allows(state, client(), protocol, port, 4));
    assert_eq!(verdicts(&allow), [true, true, false, false, false]);
    let not =
        state([policy(to_web(json!([{"action": "Allow", "destination": {"notPorts": ["http", "dns"]}}])))]);
    assert_eq!(verdicts(&not), [false, false, true, true, true]);
    for ports in [json!([80]), json!(["http", 80])] {
        let refused = state([policy(to_web(json!([{"action": "Allow", "destination": {"ports": ports}}])))]);
        let told = refused.refusals().next().unwrap();
        assert!(
            told.contains("spec.ingress[0].destination.ports: needs protocol TCP, UDP or SCTP"),
            "{told}"
        );
    }
}

#[test]
fn what_has_no_namespace_meets_negations() {
    let set = || {
        calico(GLOBAL_NETWORK_SET, json!({"name": "s", "labels": {"a": "b"}}), json!({"nets": ["8.8.8.8"]}))
    };
    let own = || {
        calico(
            NETWORK_SET,
            json!({"name": "s", "namespace": "dev", "labels": {"a": "b"}}),
            json!({"nets": ["9.9.9.9"]}),
        )
    };
    let reached = |source: Value| {
        let state = state([set(), own(), policy(to_web(json!([{"action": "Allow", "source": source}])))]);
        assert!(state.faults.is_empty(), "{:?}", state.faults);
        let from = [json!({"ip": "8.8.8.8"}), json!({"ip": "9.9.9.9"}), client()];
        from.map(|from| tcp(&state, from))
    };
    for (selector, global) in [
        ("team != 'shop'", true),
        ("team not in {'shop'}", true),
        ("!has(nothing)", true),
        ("!(team == 'shop')", true),
        ("team == 'dev' || !has(nothing)", true),
        ("team == 'dev'", false),
        ("has(team) && team != 'shop'", false),
        ("all()", false),
        ("all() || has(team)", false),
        ("all() && team != 'shop'", false),
    ] {
        assert_eq!(reached(json!({"namespaceSelector": selector})), [global, true, true], "{selector}");
    }
    assert_eq!(reached(json!({"namespaceSelector": "!all()"})), [true, false, false]);
    assert_eq!(reached(json!({"namespaceSelector": "global()"})), [true, false, false]);
    assert_eq!(
        reached(json!({"namespaceSelector": "team != 'x'", "selector": "a == 'b'"})),
        [true, true, false]
    );
    for (accounts, networks) in [
        (json!({"selector": "role != 'x'"}), true),
        (json!({"selector": "!has(role)"}), true),
        (json!({"selector": "all()"}), true),
        (json!({"selector": "projectcalico.org/name == 'default'"}), false),
        (json!({"names": ["default"]}), false),
        (json!({"names": ["default"], "selector": "role != 'x'"}), false),
    ] {
        let met = reached(json!({"serviceAccounts": accounts}));
        assert_eq!(met, [networks, networks, true], "{accounts}");
    }
}

#[test]
fn negations_of_a_subject_mean_hosts_too() {
    let is_about_hosts = |spec: Value| {
        let read = global_with(spec);
        assert_eq!(fault(&read), "");
        (read.policy.subject.is_about_hosts(), !read.hints.is_empty())
    };
    for (spec, hosts) in [
        (json!({"namespaceSelector": "team != 'x'"}), true),
        (json!({"namespaceSelector": "!has(team)", "selector": "a == 'b'"}), true),
        (json!({"serviceAccountSelector": "!has(role)"}), true),
        (json!({"namespaceSelector": "all()"}), false),
        (json!({"namespaceSelector": "has(team) && team != 'x'"}), false),
        (json!({"namespaceSelector": "team != 'x'", "serviceAccountSelector": "role == 'x'"}), false),
    ] {
        assert_eq!(is_about_hosts(spec.clone()), (hosts, hosts), "{spec}");
    }
    // Beside a selector of namespaces `all()` means what is in one.
    let host = calico(
        HOST_ENDPOINT,
        json!({"name": "h", "labels": {"a": "b"}}),
        json!({"node": "n", "interfaceName": "*"}),
    );
    let state = state([host]);
    let applies = |spec: Value| {
        let Subject::Any(all) = global_with(spec).policy.subject else { panic!() };
        all.iter().any(|one| one.is_about_hosts() && state.world.is_anybody(one))
    };
    assert!(applies(json!({"namespaceSelector": "team != 'x'", "selector": "a == 'b'"})));
    assert!(!applies(json!({"namespaceSelector": "team != 'x'", "selector": "all()"})));
}

#[test]
fn what_a_deny_refers_to_is_never_dropped() {
    let many: Vec<String> = (0..10_001).map(|n| format!("198.18.{}.{}/32", n / 256, n % 256)).collect();
    let refer = |rules: Value, nets: Value| {
        let set = calico(
            GLOBAL_NETWORK_SET,
            json!({"name": "s", "labels": {"feed": "bad"}}),
            json!({"nets": nets}),
        );
        state([set, policy(to_web(rules))])
    };
    let bad = json!({"selector": "feed == 'bad'"});
    let deny = || json!([{"action": "Deny", "source": bad}, {"action": "Allow"}]);
    let long = refer(deny(), json!(many));
    assert!(!tcp(&long, json!({"ip": "198.18.39.16"})) && tcp(&long, client()));
    for nets in [json!("10.0.0.0/8"), json!(["1.2.3.4", "10.0.0.0/33"]), json!({}), json!([7])] {
        let denied = refer(deny(), nets.clone());
        assert!(!tcp(&denied, client()), "{nets}");
        let told = denied.refusals().next().unwrap();
        assert!(told.contains("rules that deny or pass what it lists deny everybody"), "{told}");
        let others =
            refer(json!([{"action": "Allow", "source": {"notSelector": "feed == 'bad'"}}]), nets.clone());
        assert!(!tcp(&others, client()), "{nets}");
        let passed = refer(json!([{"action": "Pass", "source": bad}, {"action": "Allow"}]), nets.clone());
        assert!(!tcp(&passed, client()), "{nets}");
        // What has nothing to do with it stays.
        let apart = refer(
            json!([{"action": "Deny", "source": {"selector": "feed == 'good'"}}, {"action": "Allow"}]),
            nets,
        );
        assert!(tcp(&apart, client()));
    }
    // What an allowing rule knows of it stays allowed.
    let known = refer(json!([{"action": "Allow", "source": bad}]), json!(["8.8.8.8", "?"]));
    assert!(tcp(&known, json!({"ip": "8.8.8.8"})) && !tcp(&known, client()));
}

#[test]
fn labels_that_cannot_be_read_may_be_any() {
    for labels in [json!({"feed": 7}), json!("feed=bad")] {
        let set =
            calico(GLOBAL_NETWORK_SET, json!({"name": "s", "labels": labels}), json!({"nets": ["8.8.8.8"]}));
        let deny =
            to_web(json!([{"action": "Deny", "source": {"selector": "feed == 'bad'"}}, {"action": "Allow"}]));
        assert!(!tcp(&state([set, policy(deny)]), client()));
    }
    let host = calico(
        HOST_ENDPOINT,
        json!({"name": "h", "labels": {"a": "b"}}),
        json!({"node": "n", "expectedIPs": ["8.8.8.8"]}),
    );
    let deny = to_web(json!([{"action": "Deny", "source": {"selector": "a == 'b'"}}, {"action": "Allow"}]));
    let state = state([host, policy(deny)]);
    assert!(!tcp(&state, json!({"ip": "8.8.8.8"})) && tcp(&state, client()));
    assert!(state.refusals().next().unwrap().contains("it protects no interface"));
}

#[test]
fn all_faults_of_an_object_are_told() {
    let read = global_with(json!({
        "selector": "a = 'b'", "namespaceSelector": "x ==", "order": "first", "tyeps": [], "types": ["Up", "Down"],
        "ingress": [{"action": "Alow", "protocol": "TPC", "source": {"nets": ["x", "y"], "prts": [1]}, "http": {"methods": ["GET"]}}],
    }));
    let fields: Vec<&str> = read.fault.iter().chain(&read.more).map(|fault| fault.field.as_str()).collect();
    for field in [
        "spec.tyeps",
        "spec.order",
        "spec.selector",
        "spec.namespaceSelector",
        "spec.ingress[0].action",
        "spec.ingress[0].http",
        "spec.ingress[0].protocol",
        "spec.ingress[0].source.prts",
        "spec.ingress[0].source.nets[0]",
        "spec.ingress[0].source.nets[1]",
        "spec.types[0]",
        "spec.types[1]",
    ] {
        assert_eq!(fields.iter().filter(|one| **one == field).count(), 1, "{field} of {fields:?}");
    }
    let told = read.refusal().unwrap().to_string();
    assert!(told.contains("4 more faults; until they are mended, it counts for nothing"), "{told}");
}

#[test]
fn a_refusal_says_what_was_refused() {
    let outcome = |kind: &str, spec: Value| {
        let manifest = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec});
        let crate::Said::Policy(read) = Kind::of(API_VERSION, kind).unwrap().read(&manifest) else {
            panic!()
        };
        read.refusal().unwrap().outcome
    };
    let rules = json!([{"action": "Deny", "source": {"selector": "="}}]);
    assert_eq!(outcome("GlobalNetworkPolicy", json!({"ingress": rules})), Outcome::Rules);
    let subject = json!({"namespaceSelector": "!has(a, b)", "ingress": [{"action": "Deny"}]});
    assert_eq!(outcome("GlobalNetworkPolicy", subject), Outcome::Nobody);
    assert_eq!(outcome("NetworkPolicy", json!({"selector": "=", "ingress": rules})), Outcome::Namespace);
    assert_eq!(
        outcome("NetworkPolicy", json!({"order": "x", "ingress": [{"action": "Allow"}]})),
        Outcome::First
    );
    assert_eq!(outcome("NetworkPolicy", json!({"colour": 1})), Outcome::Rest);
    assert_eq!(outcome("StagedNetworkPolicy", json!({"selector": "="})), Outcome::Staged);
}
