use serde_json::{Value, json};

use super::*;
use crate::model::{Action, Condition, Direction, ObjectId, Peer, Policy, Reach, Side, Subject};
use crate::networkpolicy::Read;

fn global_with(spec: Value) -> Read {
    global(&json!({"apiVersion": API_VERSION, "kind": GLOBAL, "metadata": {"name": "p"}, "spec": spec}))
}

fn fault(read: &Read) -> String {
    read.fault.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn ingress(policy: &Policy) -> Vec<Action> {
    policy.rules(Direction::Ingress).unwrap_or_default().iter().map(|rule| rule.action).collect()
}

#[test]
fn types_that_are_not_written_follow_from_what_is() {
    let directions = |spec: Value| {
        let read = global_with(spec);
        assert_eq!(fault(&read), "");
        (read.policy.ingress.is_some(), read.policy.egress.is_some())
    };
    let rule = json!([{"action": "Allow"}]);
    assert_eq!(directions(json!({})), (true, false));
    assert_eq!(directions(json!({"egress": rule})), (false, true), "other than in Kubernetes");
    assert_eq!(directions(json!({"egress": rule, "ingress": rule})), (true, true));
    assert_eq!(directions(json!({"egress": rule, "types": ["Ingress"]})), (true, false));
}

#[test]
fn both_groups_mean_the_same() {
    for version in [API_VERSION, STORED_VERSION] {
        let kind = crate::Kind::of(version, "NetworkPolicy").unwrap();
        assert_eq!(kind.name, NAMESPACED);
    }
    assert_eq!(crate::Kind::of("networking.k8s.io/v1", "NetworkPolicy").unwrap().name, "NetworkPolicy");
    assert!(crate::Kind::of("projectcalico.org/v1", "NetworkPolicy").is_none());
}

#[test]
fn what_calico_has_put_aside_comes_back() {
    let kept = json!({"name": "s", "labels": {"role": "bad"}, "annotations": {"sennit.dev/audit": "true"}})
        .to_string();
    let metadata = json!({"name": "s", "annotations": {"projectcalico.org/metadata": kept}});
    let kind = |kind: &str| crate::Kind::of(STORED_VERSION, kind).unwrap();
    let crate::Said::Referent(read) =
        kind("GlobalNetworkSet").read(&json!({"metadata": metadata, "spec": {"nets": []}}))
    else {
        panic!()
    };
    assert!(
        matches!(read.what, Some(crate::referent::What::Networks(networks)) if networks.labels["role"] == "bad")
    );
    let crate::Said::Policy(read) =
        kind("GlobalNetworkPolicy").read(&json!({"metadata": metadata, "spec": {}}))
    else {
        panic!()
    };
    assert!(read.policy.staged);
    let broken =
        json!({"name": "s", "labels": {"a": "b"}, "annotations": {"projectcalico.org/metadata": "{"}});
    assert!(whole(&json!({"metadata": broken})).is_none(), "what is there counts");
}

#[test]
fn a_global_policy_means_pods_and_host_endpoints_unless_it_speaks_of_namespaces() {
    let subject = |spec: Value| global_with(spec).policy.subject;
    assert!(subject(json!({"selector": "a == 'b'"})).is_about_hosts());
    for field in ["namespaceSelector", "serviceAccountSelector"] {
        let subject = subject(json!({"selector": "a == 'b'", field: "c == 'd'"}));
        assert!(matches!(subject, Subject::Pods(_)), "{subject:?}");
    }
    let manifest = json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {}});
    assert!(matches!(namespaced(&manifest).policy.subject, Subject::Pods(_)));
}

#[test]
fn nothing_that_is_not_done_is_passed_over() {
    let wrong = [
        (json!({"http": {"methods": ["GET"]}}), "http: what is inside"),
        (json!({"later": 1}), "later: no such field"),
        (
            json!({"source": {"services": {"name": "s"}}}),
            "source.services.namespace: a policy of no namespace",
        ),
        (json!({"source": {"services": {}}}), "source.services.name: it needs one"),
        (json!({"source": []}), "source: is no object"),
        (json!({"destination": ""}), "destination: is no object"),
        (json!({"source": {"services": {"namespace": "n"}}}), "source.services.name: it needs one"),
        (json!({"source": {"services": {"name": "s", "port": 1}}}), "source.services.port: no such field"),
        (
            json!({"destination": {"services": {"name": "s", "namespace": "n"}}}),
            "at the other end: the source",
        ),
        (
            json!({"source": {"services": {"name": "s", "namespace": "n"}, "selector": "a == 'b'"}}),
            "source.selector: stands alone in source",
        ),
        (json!({"source": {"planet": "x"}}), "source.planet: no such field"),
        (json!({"source": {"selector": "a ="}}), "source.selector: \"a =\": character 3"),
        (json!({"source": {"selector": "global()"}}), "source.selector: global()"),
        (json!({"source": {"selector": "pcns.a == 'b'"}}), "source.selector: label \"pcns.a\""),
        (json!({"source": {"nets": ["10.0.0.0"]}}), "source.nets[0]"),
        (json!({"source": {"ports": [80]}}), "source.ports: needs protocol"),
        (
            json!({"destination": {"notPorts": [80]}, "protocol": "ICMP"}),
            "destination.notPorts: needs protocol",
        ),
        (json!({"destination": {"ports": [70_000]}, "protocol": "TCP"}), "destination.ports[0]"),
        (json!({"destination": {"ports": ["9:8"]}, "protocol": "TCP"}), "destination.ports[0]"),
        (json!({"destination": {"ports": ["Web"]}, "protocol": "TCP"}), "destination.ports[0]"),
        (json!({"protocol": "TPC"}), "protocol: \"TPC\"; use TCP"),
        (json!({"protocol": 0}), "protocol: \"0\""),
        (json!({"ipVersion": 5}), "ipVersion: \"5\"; use 4 or 6"),
        (json!({"icmp": {"type": 8}}), "icmp: needs protocol ICMP"),
        (json!({"icmp": {"code": 8}, "protocol": "ICMP"}), "icmp.type: is needed"),
        (json!({"notICMP": {"type": 256}, "protocol": "ICMPv6"}), "notICMP.type: is no number"),
        (json!({"source": {"serviceAccounts": {"names": [1]}}}), "serviceAccounts.names[0]"),
        (json!({"source": {"serviceAccounts": {"selector": "a in b"}}}), "serviceAccounts.selector"),
    ];
    for (rule, told) in wrong {
        for (action, left) in
            [("Allow", None), ("Log", None), ("Deny", Some(Action::Deny)), ("Pass", Some(Action::Deny))]
        {
            let mut rule = rule.clone();
            rule["action"] = json!(action);
            let read = global_with(json!({"ingress": [{"action": "Allow"}, rule]}));
            assert!(fault(&read).starts_with("spec.ingress[1]."), "{}", fault(&read));
            assert!(fault(&read).contains(told), "{}\nnot {told}", fault(&read));
            let expected: Vec<Action> = [Action::Allow].into_iter().chain(left).collect();
            assert_eq!(ingress(&read.policy), expected, "{action}: {told}");
        }
    }
    let read = global_with(json!({"ingress": [{"action": "allow"}]}));
    assert!(fault(&read).contains("use Allow, Deny, Pass or Log"), "{}", fault(&read));
    assert_eq!(ingress(&read.policy), [Action::Deny]);
}

#[test]
fn a_policy_of_which_nobody_knows_whom_it_means_isolates_its_namespace_or_nobody() {
    let rules = json!([{"action": "Allow"}]);
    for (field, value, told) in [
        ("selector", json!("a == b"), "spec.selector"),
        ("serviceAccountSelector", json!("a =="), "spec.serviceAccountSelector"),
        ("preDNAT", json!(true), "spec.applyOnForward: has to be true"),
        ("applyOnForward", json!("yes"), "spec.applyOnForward: is neither true nor false"),
        ("doNotTrack", json!(true), "spec.applyOnForward: has to be true"),
    ] {
        let mut spec = json!({"ingress": rules});
        spec[field] = value;
        let read = global_with(spec.clone());
        assert!(fault(&read).starts_with(told), "{}", fault(&read));
        assert_eq!(read.policy.subject, Subject::Any([].into()));
        if spec.get("selector").is_some() {
            let read = namespaced(&json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec}));
            assert_eq!((ingress(&read.policy).len(), read.policy.ingress.is_some()), (0, true));
            assert!(matches!(read.policy.subject, Subject::Pods(_)));
        }
    }
    assert_eq!(fault(&global_with(json!({"doNotTrack": false, "preDNAT": null}))), "");
    let flags = json!({"doNotTrack": true, "applyOnForward": true, "ingress": rules});
    let read = namespaced(&json!({"metadata": {"name": "p"}, "spec": flags}));
    assert_eq!(read.policy.reach, Reach::Ends);
    assert!(matches!(read.policy.subject, Subject::Pods(_)));
    let read = namespaced(&json!({"metadata": {"name": "p"}, "spec": {"doNotTrack": true}}));
    assert!(fault(&read).starts_with("spec.doNotTrack: no such field"), "{}", fault(&read));
}

#[test]
fn what_is_refused_of_rules_counts_for_the_types_all_the_same() {
    let wrong = json!([{"action": "Allow", "http": {"methods": ["GET"]}}]);
    let read = global_with(json!({"egress": wrong}));
    assert_eq!(
        (read.policy.ingress, read.policy.egress),
        (None, Some(vec![])),
        "egress is judged, and nothing allowed"
    );
    let read = global_with(json!({"egress": 7}));
    assert!(read.policy.egress.is_some_and(|rules| rules.len() == 1));
}

#[test]
fn a_staged_policy_stands_for_the_one_of_its_name() {
    let read = |action: Value| {
        let spec = json!({"stagedAction": action, "selector": "a == 'b'", "ingress": [{"action": "Deny"}]});
        staged_global(&json!({"metadata": {"name": "p"}, "spec": spec}))
    };
    let enforced = global_with(json!({})).policy.id;
    for (action, rules, replaces) in [
        (json!("Set"), true, true),
        (Value::Null, true, true),
        (json!("Delete"), false, true),
        (json!("Ignore"), false, false),
    ] {
        let read = read(action.clone());
        assert_eq!((fault(&read).as_str(), read.policy.ingress.is_some()), ("", rules), "{action}");
        let replaced = read.policy.replaces.map(|id| ObjectId { name: enforced.name.clone(), ..id });
        assert_eq!(replaced, replaces.then(|| enforced.clone()), "{action}");
    }
    let read = read(json!("Learn"));
    assert!(fault(&read).contains("use Set, Delete or Ignore"), "{}", fault(&read));
    assert_eq!(read.policy.replaces, None);
    let kubernetes = |action: &str| {
        let metadata = json!({"name": "p", "namespace": "n"});
        kubernetes_staged(&json!({"metadata": metadata, "spec": {"stagedAction": action, "podSelector": {}}}))
    };
    assert_eq!(kubernetes("Delete").policy.replaces.unwrap().kind, "NetworkPolicy");
    assert!(kubernetes("Delete").policy.ingress.is_none() && kubernetes("Ignore").policy.replaces.is_none());
}

#[test]
fn a_policy_may_judge_what_a_node_forwards_and_what_was_dialled() {
    let read = global_with(json!({"applyOnForward": true, "ingress": [{"action": "Deny"}]}));
    assert_eq!((fault(&read).as_str(), read.policy.reach), ("", Reach::Forwarded));
    assert_eq!(ingress(&read.policy), [Action::Deny]);
    assert!(matches!(read.policy.subject, Subject::Any(all) if all.len() == 2));
    let before_nat = |mut spec: Value| {
        spec["preDNAT"] = json!(true);
        spec["applyOnForward"] = json!(true);
        global_with(spec)
    };
    let read = before_nat(json!({"selector": "a == 'b'", "ingress": [{"action": "Deny"}]}));
    assert_eq!((fault(&read).as_str(), read.policy.reach), ("", Reach::BeforeNat));
    assert!(matches!(read.policy.subject, Subject::Hosts(_)));
    // No pod of any namespace is meant, so nobody.
    let read = before_nat(json!({"namespaceSelector": "a == 'b'", "ingress": [{"action": "Deny"}]}));
    assert_eq!((fault(&read).as_str(), &read.policy.subject), ("", &Subject::Any([].into())));
    let named = json!([{"action": "Allow", "protocol": "TCP", "destination": {"ports": ["web"]}}]);
    let read =
        global_with(json!({"doNotTrack": true, "applyOnForward": true, "egress": [{"action": "Allow"}]}));
    assert_eq!((fault(&read).as_str(), read.policy.reach), ("", Reach::Untracked));
    assert!(matches!(read.policy.subject, Subject::Hosts(_)) && read.policy.egress.is_some());
    let services = json!([{"action": "Allow", "destination": {"services": {"name": "s", "namespace": "n"}}}]);
    for (rest, told) in [
        (json!({"preDNAT": true}), "spec.doNotTrack: goes without preDNAT"),
        (json!({"ingress": named}), "spec.ingress[0].destination.ports: has names"),
        (json!({"egress": services}), "spec.egress[0].destination.services: what a Service serves"),
    ] {
        let mut spec = json!({"doNotTrack": true, "applyOnForward": true});
        spec.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        let read = global_with(spec);
        assert!(fault(&read).starts_with(told), "{}", fault(&read));
    }
    for (spec, told) in [
        (json!({"egress": [{"action": "Deny"}]}), "spec.egress: there is none before"),
        (json!({"types": ["Ingress", "Egress"]}), "spec.types: preDNAT judges what comes in"),
        (json!({"ingress": named}), "spec.ingress[0].destination.ports: has names"),
    ] {
        let read = before_nat(spec);
        assert!(fault(&read).starts_with(told), "{}", fault(&read));
    }
}

#[test]
fn a_policy_of_which_the_place_is_not_known_comes_first_and_allows_nothing() {
    let read = global_with(json!({"order": "100", "ingress": [{"action": "Allow"}, {"action": "Deny"}]}));
    assert_eq!(
        (read.policy.order, ingress(&read.policy)),
        (crate::model::Order(f64::MIN), vec![Action::Deny])
    );
}

#[test]
fn a_policy_is_no_more_rules_than_the_kernel_can_walk_through() {
    let many = |from: u32| (0..3000).map(|n| from + 2 * n).collect::<Vec<_>>();
    let rule = json!({"action": "Allow", "protocol": "TCP", "source": {"ports": many(1)}, "destination": {"ports": many(2)}});
    let deny = json!({"action": "Deny", "protocol": "TCP", "destination": {"notPorts": many(1)}});
    let read = global_with(json!({"ingress": [rule, deny]}));
    assert!(read.fault.is_none(), "ports are sets: {:?}", read.fault);
    // Names of both ends are sixteen ways.
    let rule = json!({"action": "Allow", "protocol": "TCP", "source": {"ports": ["a"]}, "destination": {"ports": ["b"]}});
    let mut rules = vec![rule; 257];
    rules.push(deny);
    let read = global_with(json!({"ingress": rules}));
    assert!(
        fault(&read).starts_with("spec.ingress[256]: the kernel would have more than 4096"),
        "{}",
        fault(&read)
    );
    let actions = ingress(&read.policy);
    assert_eq!((actions.len(), actions.last()), (257, Some(&Action::Deny)));
    let names: Vec<String> = (0..9).map(|n| format!("a{n}")).collect();
    let named = json!({"action": "Allow", "protocol": "TCP", "destination": {"notPorts": names}});
    assert!(fault(&global_with(json!({"ingress": [named]}))).contains("has 9 names; at most 8"));
}

#[test]
fn all_faults_of_a_policy_are_known() {
    let read = global_with(
        json!({"order": "x", "ingress": [{"action": "Allow", "http": {"a": 1}}, {"action": "Do"}]}),
    );
    let all: Vec<&str> = read.fault.iter().chain(&read.more).map(|fault| fault.field.as_str()).collect();
    assert_eq!(all, ["spec.order", "spec.ingress[0].http", "spec.ingress[1].action"]);
}

#[test]
fn staged_policies_are_staged() {
    let spec =
        |action: &str| json!({"metadata": {"name": "s"}, "spec": {"stagedAction": action, "ingress": []}});
    let kinds: [fn(&Value) -> Read; 3] = [staged_global, staged_namespaced, kubernetes_staged];
    for read in kinds {
        let set = read(&spec("Set"));
        assert!(set.policy.staged && set.policy.ingress.is_some() && set.fault.is_none(), "{set:?}");
        let learn = read(&spec("Learn"));
        assert!(fault(&learn).starts_with("spec.stagedAction: \"Learn\"; use Set"), "{}", fault(&learn));
        assert!(learn.policy.staged && learn.policy.replaces.is_none());
    }
    assert!(fault(&global(&spec("Set"))).starts_with("spec.stagedAction: no such field"));
}

#[test]
fn a_lone_not_selector_means_the_own_namespace_of_a_namespaced_policy_and_anybody_else_of_a_global_one() {
    let spec = json!({"ingress": [{"action": "Allow", "source": {"notSelector": "a == 'b'"}}]});
    let whens = |read: Read| read.policy.ingress.unwrap().remove(0).when;
    let of_global = whens(global_with(spec.clone()));
    assert!(matches!(of_global.first(), Some(Condition::IsNot(Side::Source, _))) && of_global.len() == 1);
    let own = whens(namespaced(&json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec})));
    assert!(matches!(own.first(), Some(Condition::Is(Side::Source, peers)) if peers.len() == 2), "{own:?}");
    assert_eq!(own.len(), 2);
}

#[test]
fn no_network_has_an_account() {
    let source = json!({"serviceAccounts": {"names": ["a"]}, "selector": "x == 'y'"});
    let read = global_with(json!({"ingress": [{"action": "Allow", "source": source}]}));
    let when = read.policy.ingress.unwrap().remove(0).when;
    assert!(
        matches!(when.first(), Some(Condition::Is(_, peers)) if peers.iter().all(|peer| matches!(peer, Peer::Pods(_))))
    );
}

mod referents {
    use super::*;
    use crate::model::{End, Order};
    use crate::referent::What;
    use crate::refusal::Outcome;

    #[test]
    fn a_tier_has_its_order_and_its_end() {
        let tier_of = |name: &str, spec: Value| {
            let referent = tier(&json!({"metadata": {"name": name}, "spec": spec}));
            let Some(What::Tier(tier)) = referent.what else { panic!("{referent:?}") };
            (tier.order, tier.end, referent.fault.map(|fault| fault.field))
        };
        assert_eq!(
            tier_of("t", json!({"order": 5.5, "defaultAction": "Pass"})),
            (Order(5.5), End::Pass, None)
        );
        assert_eq!(tier_of("t", json!({})), (Order::LAST, End::Deny, None));
        let wrong = json!({"order": "5", "defaultAction": "Drop"});
        assert_eq!(tier_of("t", wrong), (Order::LAST, End::Deny, Some("spec.order".to_owned())));
        let pass = json!({"order": 5, "defaultAction": "Pass"});
        let fault = Some("spec.defaultAction".to_owned());
        assert_eq!(tier_of("default", pass), (Order(1e6), End::Deny, fault), "it stays where and what it is");
        assert_eq!(tier_of("kube-admin", json!({})), (Order(1000.0), End::Pass, None));
    }

    #[test]
    fn a_net_that_is_none_takes_no_other_with_it() {
        let nets = json!(["10.0.0.0/8", "10.1.2.3", "fd00::1", "everywhere", "::ffff:10.0.0.1/128"]);
        let read = network_set(&json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"nets": nets}}));
        let Some(What::Networks(networks)) = &read.what else { panic!("{read:?}") };
        assert_eq!(networks.nets.len(), 3);
        assert_eq!(networks.labels["projectcalico.org/namespace"], "n");
        assert_eq!(read.fault.as_ref().unwrap().field, "spec.nets[3]");
        assert_eq!(read.outcome, Outcome::Listed);
    }

    #[test]
    fn a_label_that_is_no_text_takes_no_other_with_it() {
        let metadata = json!({"name": "h", "labels": {"role": "node", "version": 1}});
        let spec = json!({"node": "n", "interfaceName": "*"});
        let read = host_endpoint(&json!({"metadata": metadata, "spec": spec}));
        let Some(What::Networks(networks)) = &read.what else { panic!("{read:?}") };
        assert!(networks.host.is_some() && networks.labels.len() == 1);
        assert_eq!(read.fault.unwrap().field, "metadata.labels.version");
    }

    #[test]
    fn of_a_host_endpoint_what_is_not_done_is_named() {
        let read = |spec: Value| host_endpoint(&json!({"metadata": {"name": "h"}, "spec": spec}));
        let fault = |spec: Value| read(spec).fault.unwrap().to_string();
        assert_eq!(read(json!({"node": "n", "interfaceName": "*", "expectedIPs": ["10.0.0.1"]})).fault, None);
        let Some(What::Networks(networks)) = read(json!({
            "node": "n", "interfaceName": "eth0", "ports": [{"name": "web", "protocol": "TCP", "port": 80}],
        }))
        .what
        else {
            panic!()
        };
        let host = networks.host.unwrap();
        assert_eq!((host.interface.unwrap().as_str(), host.ports.len()), ("eth0", 1));
        for (spec, told) in [
            (json!({"node": "n", "expectedIPs": ["10.0.0.1"]}), "spec.interfaceName: it is needed"),
            (json!({"node": "n", "interfaceName": "eth0/1"}), "spec.interfaceName: \"eth0/1\" is no name"),
        ] {
            let Some(What::Networks(networks)) = read(spec.clone()).what else { panic!("{spec}") };
            assert!(networks.host.is_none(), "by which interface it protects is not known");
            assert!(fault(spec).starts_with(told));
        }
        assert!(fault(json!({"interfaceName": "*"})).starts_with("spec.node"));
        assert!(
            fault(json!({"node": "n", "interfaceName": "*", "profiles": ["own"]}))
                .starts_with("spec.profiles[0]")
        );
        assert!(
            fault(json!({"node": "n", "interfaceName": "*", "ports": [{"name": "a"}]}))
                .starts_with("spec.ports[0].port")
        );
    }
}

mod meaning;
