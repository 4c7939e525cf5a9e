use serde_json::json;

use super::*;
use crate::model::{Condition, Side};

fn cnp(spec: Value) -> Read {
    read(&json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "c"}, "spec": spec}))
}

fn with(rule: Value) -> Read {
    cnp(json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}}, "egress": [rule]}))
}

fn egress(read: &Read) -> &[Rule] {
    read.policy.egress.as_deref().unwrap()
}

fn ports(rule: &Rule) -> &BTreeSet<Port> {
    let ports = rule.when.iter().find_map(|condition| match condition {
        Condition::Ports(Side::Destination, ports) => Some(ports),
        _ => None,
    });
    ports.expect("no ports")
}

fn fault(read: &Read) -> String {
    read.fault.as_ref().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn tier_priority_and_subject_are_read() {
    let read = cnp(json!({
        "tier": "Baseline", "priority": 1000,
        "subject": {"pods": {"namespaceSelector": {"matchLabels": {"a": "b"}}, "podSelector": {}}},
        "ingress": [{"name": "let in", "action": "Pass", "from": [{"namespaces": {}}]}],
    }));
    assert_eq!(read.fault, None);
    assert_eq!((read.policy.tier, read.policy.order), (Tier::baseline(), Order(1000.0)));
    assert_eq!(read.policy.egress, None, "what it has no rules for it does not judge");
    let rules = read.policy.ingress.unwrap();
    assert_eq!((rules[0].name.as_str(), rules[0].action), ("ingress[0] let in", Action::Pass));
    assert!(Tier::admin() < Tier::kubernetes() && Tier::kubernetes() < Tier::baseline());
}

#[test]
fn peers_and_protocols_of_all_kinds_are_read() {
    let read = with(json!({
        "action": "Accept",
        "to": [
            {"namespaces": {"matchLabels": {"a": "b"}}},
            {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"c": "d"}}}},
            {"nodes": {}},
            {"networks": ["10.0.0.0/8", "fd00::/8"]},
        ],
        "protocols": [
            {"tcp": {"destinationPort": {"number": 80}}},
            {"udp": {"destinationPort": {"range": {"start": 1, "end": 9}}}},
            {"sctp": {}},
        ],
    }));
    assert_eq!(fault(&read), "");
    let rule = &egress(&read)[0];
    assert!(
        matches!(rule.when.last(), Some(Condition::Is(Side::Destination, peers)) if peers.len() == 5),
        "{rule:?}"
    );
    let range = |protocol, first, last| Port { protocol, ports: PortMatch::Range(first, last) };
    let all = [
        range(Protocol::TCP, 80, 80),
        range(Protocol::UDP, 1, 9),
        Port { protocol: Protocol::SCTP, ports: PortMatch::Any },
    ];
    assert_eq!(*ports(rule), BTreeSet::from(all));
    let named = with(json!({
        "action": "Deny", "to": [{"namespaces": {}}], "protocols": [{"destinationNamedPort": "http"}],
    }));
    assert_eq!(ports(&egress(&named)[0]).len(), 3, "of whatever protocol");
}

#[test]
fn a_rule_that_is_not_understood_fails_closed() {
    let wrong = [
        (json!({"to": [{"planets": {}}]}), "spec.egress[0].to[0].planets: no such field"),
        (json!({"to": [{}]}), "spec.egress[0].to[0]: needs exactly one of"),
        (json!({"to": [{"namespaces": {}, "nodes": {}}]}), "needs exactly one of"),
        (json!({"to": []}), "spec.egress[0].to: names nobody"),
        (json!({}), "spec.egress[0].to: names nobody"),
        (json!({"to": [{"networks": []}]}), "spec.egress[0].to[0].networks: names no network"),
        (json!({"to": [{"networks": ["10.0.0.0/33"]}]}), "spec.egress[0].to[0].networks[0]"),
        (json!({"to": [{"domainNames": ["example com"]}]}), "spec.egress[0].to[0].domainNames[0]"),
        (json!({"to": [{"domainNames": []}]}), "spec.egress[0].to[0].domainNames: names no domain"),
        (json!({"to": [{"namespaces": {}}], "from": []}), "spec.egress[0].from: no such field"),
        (
            json!({"to": [{"namespaces": {}}], "protocols": [{"icmp": {}}]}),
            "protocols[0].icmp: no such field",
        ),
        (
            json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {}}}]}),
            "protocols[0].tcp.destinationPort",
        ),
        (
            json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
            "number: \"0\"",
        ),
        (
            json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 9, "end": 9}}}}]}),
            "range: 9 to 9",
        ),
        (
            json!({"to": [{"networks": ["::/0"]}], "protocols": [{"destinationNamedPort": "http"}]}),
            "protocols: destinationNamedPort goes with",
        ),
        (
            json!({"to": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]}),
            "to[0].namespaces: ",
        ),
        (json!({"to": [{"namespaces": {}}], "name": "n".repeat(101)}), "spec.egress[0].name"),
    ];
    for (rule, told) in wrong {
        for action in ["Accept", "Deny", "Pass", "Allow"] {
            let mut rule = rule.clone();
            rule["action"] = json!(action);
            let read = with(rule);
            let text = fault(&read);
            assert!(
                text.contains(told) || action == "Allow" && text.contains("action"),
                "{text}\nnot {told}"
            );
            match action {
                "Accept" => assert_eq!(read.policy.egress, None),
                _ => {
                    let rule = &egress(&read)[0];
                    assert_eq!((rule.action, &rule.when), (Action::Deny, &BTreeSet::new()));
                }
            }
        }
    }
}

#[test]
fn the_other_rules_of_an_object_with_a_wrong_one_count() {
    let good = json!({"action": "Accept", "to": [{"namespaces": {}}]});
    let read = cnp(json!({
        "tier": "Admin", "priority": 0, "subject": {"namespaces": {}}, "egress": [good, {"action": "Deny"}, good],
    }));
    let actions: Vec<Action> = egress(&read).iter().map(|rule| rule.action).collect();
    assert_eq!(actions, [Action::Allow, Action::Deny, Action::Allow]);
}

#[test]
fn what_is_not_understood_of_an_object_opens_nothing() {
    let whole = json!({
        "tier": "Admin", "priority": 0, "subject": {"namespaces": {}}, "egress": [{"action": "Pass", "to": [{"namespaces": {}}]}],
        "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}],
    });
    for (field, value, told, denies) in [
        ("later", json!({}), "spec.later: no such field", false),
        ("egress", json!({}), "spec.egress: is no list", true),
        ("egress", json!(vec![json!({}); 26]), "spec.egress: has 26 entries", true),
    ] {
        let mut spec = whole.clone();
        spec[field] = value;
        let read = cnp(spec);
        assert!(fault(&read).starts_with(told), "{}", fault(&read));
        let rule = &egress(&read)[0];
        assert_eq!(
            (egress(&read).len(), rule.action == Action::Deny, rule.when.is_empty()),
            (1, denies, denies)
        );
        assert_eq!(read.policy.ingress.as_ref().unwrap().len(), 1);
    }
}

#[test]
fn an_object_that_does_not_say_whom_it_is_about_counts_for_nothing() {
    let whole = json!({
        "tier": "Admin", "priority": 0, "subject": {"namespaces": {}}, "egress": [{"action": "Deny", "to": [{"namespaces": {}}]}],
    });
    for (field, value, told) in [
        ("tier", json!("admin"), "spec.tier: \"admin\"; use Admin or Baseline"),
        ("priority", json!(1001), "spec.priority"),
        ("priority", json!(-1), "spec.priority"),
        ("priority", Value::Null, "spec.priority"),
        ("subject", json!({}), "spec.subject: needs exactly one of"),
        (
            "subject",
            json!({"namespaces": {}, "pods": {"podSelector": {}}}),
            "spec.subject: needs exactly one of",
        ),
        ("subject", json!({"pods": {"namespaceSelector": {}}}), "spec.subject.pods.podSelector: is missing"),
    ] {
        let mut spec = whole.clone();
        spec[field] = value;
        let read = cnp(spec);
        assert!(fault(&read).starts_with(told), "{}", fault(&read));
        assert_eq!((read.policy.egress, read.policy.ingress), (None, None));
    }
    let nameless = read(&json!({"spec": whole}));
    assert!(fault(&nameless).starts_with("metadata.name"));
}

#[test]
fn names_are_for_what_is_accepted_alone() {
    let to = json!([{"domainNames": ["*.example.com", "example.com."]}]);
    let read = with(json!({"action": "Accept", "to": to}));
    assert_eq!(fault(&read), "");
    let names: Vec<String> =
        egress(&read)[0].when.iter().flat_map(Condition::domains).map(ToString::to_string).collect();
    assert_eq!(names, ["example.com", "*.example.com"]);
    for action in ["Deny", "Pass"] {
        let read = with(json!({"action": action, "to": to}));
        assert!(fault(&read).contains("go with action Accept alone"), "{}", fault(&read));
        assert_eq!((egress(&read)[0].action, egress(&read)[0].when.len()), (Action::Deny, 0));
    }
}
