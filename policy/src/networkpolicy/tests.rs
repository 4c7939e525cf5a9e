use serde_json::json;

use super::*;
use crate::model::{Condition, Side};

fn policy(spec: Value) -> Read {
    read(&json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": "p"}, "spec": spec}))
}

fn fault(spec: Value) -> String {
    policy(spec).fault.expect("accepted").to_string()
}

#[test]
fn types_that_are_not_written_follow_from_what_is() {
    let directions = |spec: Value| {
        let read = policy(spec);
        assert_eq!(read.fault, None);
        (read.policy.ingress.is_some(), read.policy.egress.is_some())
    };
    assert_eq!(directions(json!({"podSelector": {}})), (true, false));
    assert_eq!(directions(json!({"podSelector": {}, "egress": []})), (true, false));
    assert_eq!(directions(json!({"podSelector": {}, "egress": [{}]})), (true, true));
    assert_eq!(directions(json!({"policyTypes": []})), (true, false));
    assert_eq!(directions(json!({"policyTypes": ["Egress"]})), (false, true));
    // Rules of a direction that is not listed do not count.
    assert_eq!(directions(json!({"policyTypes": ["Egress"], "ingress": [{}]})), (false, true));
}

#[test]
fn an_empty_list_denies_and_an_empty_rule_allows() {
    for spec in [json!({}), json!({"ingress": []}), json!({"ingress": null})] {
        assert_eq!(policy(spec).policy.ingress, Some(vec![]));
    }
    for rule in [json!({}), json!({"from": [], "ports": []})] {
        let rules = policy(json!({"ingress": [rule]})).policy.ingress.unwrap();
        assert_eq!(rules[0].when, BTreeSet::new());
    }
}

#[test]
fn a_port_defaults_to_tcp_and_a_rule_for_sctp_stays_one() {
    let ports = |ports: Value| {
        let rules = policy(json!({"ingress": [{"ports": ports}]})).policy.ingress.unwrap();
        match rules[0].when.first() {
            Some(Condition::Ports(Side::Destination, ports)) => ports.clone(),
            other => panic!("{other:?}"),
        }
    };
    let tcp = |ports| Port { protocol: Protocol::TCP, ports };
    assert_eq!(ports(json!([{"port": 80}])), BTreeSet::from([tcp(PortMatch::Range(80, 80))]));
    assert_eq!(ports(json!([{"port": 80, "endPort": 90}])), BTreeSet::from([tcp(PortMatch::Range(80, 90))]));
    assert_eq!(ports(json!([{"port": "http"}])), BTreeSet::from([tcp(PortMatch::Named("http".into()))]));
    assert_eq!(ports(json!([{}])), BTreeSet::from([tcp(PortMatch::Any)]));
    let sctp = Port { protocol: Protocol::SCTP, ports: PortMatch::Any };
    assert_eq!(ports(json!([{"protocol": "SCTP"}])), BTreeSet::from([sctp]));
}

#[test]
fn what_the_api_server_would_refuse_is_refused_by_field_and_reason() {
    let from = |peer: Value| json!({"ingress": [{"from": [peer]}]});
    let port = |port: Value| json!({"ingress": [{"ports": [port]}]});
    for (spec, field, reason) in [
        (json!({"ingres": []}), "spec.ingres", "no such field"),
        (json!({"policyTypes": ["ingress"]}), "spec.policyTypes[0]", "Ingress or Egress"),
        (json!({"ingress": {}}), "spec.ingress", "no list"),
        (
            json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "in"}]}}),
            "spec.podSelector",
            "operator",
        ),
        (from(json!({})), "spec.ingress[0].from[0]", "selects nothing"),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}})),
            "spec.ingress[0].from[0]",
            "alone",
        ),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/33"}})),
            "spec.ingress[0].from[0].ipBlock.cidr",
            "no prefix",
        ),
        (
            from(json!({"ipBlock": {"cidr": "::ffff:10.0.0.0/104"}})),
            "spec.ingress[0].from[0].ipBlock.cidr",
            "no prefix",
        ),
        (from(json!({"ipBlock": {}})), "spec.ingress[0].from[0].ipBlock.cidr", "no prefix"),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.1.0/25"]}})),
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "inside of 10.0.0.0/24",
        ),
        (
            from(json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.0/24"]}})),
            "spec.ingress[0].from[0].ipBlock.except[0]",
            "inside",
        ),
        (port(json!({"port": 0})), "spec.ingress[0].ports[0].port", "1 to 65535"),
        (port(json!({"port": 65536})), "spec.ingress[0].ports[0].port", "1 to 65535"),
        (port(json!({"port": -1})), "spec.ingress[0].ports[0].port", "1 to 65535"),
        (port(json!({"port": "Http"})), "spec.ingress[0].ports[0].port", "no name of a port"),
        (port(json!({"port": "80"})), "spec.ingress[0].ports[0].port", "one letter"),
        (port(json!({"port": "http", "endPort": 90})), "spec.ingress[0].ports[0].endPort", "a number"),
        (port(json!({"endPort": 90})), "spec.ingress[0].ports[0].endPort", "begin at"),
        (port(json!({"port": 80, "endPort": 79})), "spec.ingress[0].ports[0].endPort", "less than"),
        (json!({"policyTypes": ["Ingress", "Ingress", "Egress"]}), "spec.policyTypes", "more than two"),
        (
            json!({"podSelector": {"matchLabels": {"app": "web server"}}}),
            "spec.podSelector",
            "value \"web server\"",
        ),
        (
            json!({"ingress": [{"ports": (1..=5000).map(|port| json!({"port": port})).collect::<Vec<_>>()}]}),
            "spec.ingress",
            "at most 4096",
        ),
        (port(json!({"protocol": "ICMP"})), "spec.ingress[0].ports[0].protocol", "TCP, UDP or SCTP"),
    ] {
        let text = fault(spec.clone());
        assert!(text.starts_with(&format!("{field}: ")) && text.contains(reason), "{spec}: {text}");
    }
    assert!(read(&json!({"spec": {}})).fault.unwrap().field == "metadata.name");
}

#[test]
fn a_refused_policy_isolates_what_it_selects_and_allows_nothing() {
    let read = policy(json!({
        "podSelector": {"matchLabels": {"app": "a"}},
        "policyTypes": ["Egress"],
        "egress": [{}, {"ports": [{"port": 0}]}],
    }));
    assert_eq!((read.policy.ingress, read.policy.egress), (None, Some(vec![])));
    let selects = |read: &Read, app: &str| {
        let Subject::Pods(PodSelector { pods, .. }) = &read.policy.subject else { panic!() };
        pods.matches(&[("app".to_owned(), app.to_owned())].into())
    };
    assert!(selects(&Read::from(policy(json!({"podSelector": {"matchLabels": {"app": "a"}}})).policy), "a"));
    // Where its types cannot be read either, it isolates in both directions; where its selector cannot, the whole namespace.
    let read = policy(json!({"policyTypes": ["Both"], "podSelector": {"matchLabels": 7}}));
    assert_eq!((&read.policy.ingress, &read.policy.egress), (&Some(vec![]), &Some(vec![])));
    assert!(selects(&read, "anything"));
    // Egress rules that cannot be read may have been there: they count for the types.
    let read = policy(json!({"podSelector": {}, "egress": [{"to": 7}]}));
    assert_eq!((read.policy.ingress, read.policy.egress), (Some(vec![]), Some(vec![])));
}

#[test]
fn host_bits_of_a_block_do_not_count() {
    let rules =
        policy(json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.1.2.3/8"}}]}]})).policy.ingress.unwrap();
    let block = Block { net: "10.0.0.0/8".parse().unwrap(), except: vec![] };
    let from = Condition::Is(Side::Source, [Peer::Block(block)].into());
    assert_eq!(rules[0].when, BTreeSet::from([from]));
}
