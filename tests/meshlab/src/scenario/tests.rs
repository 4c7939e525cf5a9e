use super::*;

const GOOD: &str = "\
name: demo
sites:
  - name: aws
    nodes: 2
    podsPerNode: 2
  - name: gcp
steps:
  - name: all pods
    expect: {matrix: pods}
    timeout: 10s
";

fn wrong(text: &str) -> ScenarioError {
    Scenario::parse(text, "demo.yaml").unwrap_err()
}

#[test]
fn a_short_scenario_reads_with_its_defaults() {
    let (scenario, layout) = Scenario::parse(GOOD, "demo.yaml").unwrap();
    assert!(scenario.agents && !scenario.routed_pods);
    assert_eq!(layout.pods().count(), 5);
    assert_eq!(scenario.sites[1].value.mtu, 1500);
    assert_eq!(scenario.steps[0].value.timeout, Some(Span::seconds(10)));
}

#[test]
fn unknown_fields_are_refused_with_line_and_column() {
    let text = GOOD.replace("podsPerNode: 2", "podPerNode: 2");
    let error = wrong(&text);
    assert_eq!((error.problems[0].line, error.problems[0].column), (5, 5), "{error}");
    assert!(error.to_string().starts_with("demo.yaml:5:5: "), "{error}");
    assert!(error.to_string().contains("podPerNode"), "{error}");
    assert!(!error.to_string().contains('\n'), "one line: {error}");
}

#[test]
fn broken_yaml_is_refused_with_its_line() {
    for (text, line) in [
        ("name: demo\nsites: [", 2),
        ("name: demo\nsites:\n\t- name: aws\n", 3),
        ("name: demo\nname: again\nsites: []\n", 2),
        ("name: demo\nsites:\n  - {name: aws, mtu: many}\n", 3),
        ("name: demo\nsites:\n  - {name: aws, nat: full}\n", 3),
        ("name: demo\nsites:\n  - {name: a}\nsteps:\n  - {expect: {matrix: pods}, timeout: soon}\n", 5),
    ] {
        let error = wrong(text);
        assert_eq!(error.problems[0].line, line, "{text}: {error}");
    }
}

#[test]
fn impossible_steps_are_refused_at_their_place() {
    for (step, expected) in [
        ("{}", "does nothing"),
        ("{start: all, stop: all}", "one thing"),
        ("{handshakes: aws-9}", "no site or node `aws-9`"),
        ("{handshakes: gcp-1}", "one node alone"),
        ("{expect: {}}", "matrix"),
        ("{expect: {pairs: [{from: moon, to: aws-1}]}}", "moon"),
        ("{expect: {pairs: [{from: 10.0.0.1, to: aws-1}]}}", "not an address"),
        ("{expect: {matrix: pods, protocol: icmp, port: 7}}", "icmp has no port"),
        ("{assertNoCleartext: {}}", "capture: underlay"),
        (
            "{capture: underlay}\n  - {assertNoCleartext: {}}\n  - {assertNoCleartext: {}}",
            "nothing is recorded",
        ),
        ("{eventually: {deadline: 1s, step: {assertNoCleartext: {}}}}", "only checks"),
        ("{traffic: {stop: t}}", "no stream `t`"),
        ("{traffic: {start: t, from: pods, to: aws-1}}", "one pod or one node"),
        ("{traffic: {start: t, from: aws-1, to: gcp-1}}", "never stopped"),
        ("{dhcp: {}}", "either `lease` or `release`"),
        ("{dhcp: {lease: aws, address: 10.2.0.7/24}}", "no node `aws`"),
        ("{dhcp: {lease: aws-1}}", "`address`"),
        ("{dhcp: {lease: aws-1, address: 10.2.0.7}}", "prefix length"),
        ("{dhcp: {lease: aws-1, address: 10.2.0.1/24}}", "another address"),
        ("{dhcp: {lease: aws-1, address: 10.2.0.7/24, server: 10.3.0.1}}", "another address"),
        ("{dhcp: {lease: aws-1, address: 10.2.0.7/24, routes: [10.0.0.1/8]}}", "no IPv4 prefix"),
        ("{dhcp: {lease: aws-1, address: 10.2.0.7/24, mtu: 67}}", "68 to 9000"),
        ("{dhcp: {lease: aws-1, address: 'fd00:2::7/64'}}", "has no IPv6"),
        ("{dhcp: {release: aws-1}}", "holds no lease"),
        ("{apply: {file: ../../etc/passwd, raw: x}}", "file name"),
        ("{apply: {file: a.yaml}}", "exactly one"),
        ("{apply: {file: a.yaml, base64: '%%'}}", "base64"),
        ("{status: {where: []}}", "at least one"),
        ("{eventually: {deadline: 3s, step: {stop: all}}}", "only checks"),
        ("{always: {for: 3s, step: {handshakes: moon}}}", "always: there is no"),
        ("{block: {at: aws, port: 80}}", "protocol: udp"),
        ("{block: {at: aws, address: here}}", "neither an address"),
        ("{exec: {on: aws, command: ls}}", "node, pod or router"),
        ("{exec: {on: aws-1, command: []}}", "empty"),
        ("{timeout: 0s, exec: {on: aws-1, command: ls}}", "no time"),
    ] {
        let text = GOOD.replace("steps:\n", &format!("steps:\n  - {step}\n"));
        let error = wrong(&text);
        assert!(error.to_string().contains(expected), "{step}: {error}");
        assert!((8..=10).contains(&error.problems[0].line) || error.problems[0].line == 0, "{step}: {error}");
    }
}

#[test]
fn without_agents_nothing_may_ask_for_them() {
    for step in ["{handshakes: all}", "{kill: {nodes: all}}", "{expect: {matrix: nodes, via: mesh}}"] {
        let text = GOOD.replace("steps:\n", &format!("agents: false\nsteps:\n  - {step}\n"));
        assert!(wrong(&text).to_string().contains("agents: false"), "{step}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let text = "name: Demo!\nsites:\n  - {name: a, mtu: 1}\n  - {name: b, nodes: 0}\n";
    let error = wrong(text);
    assert_eq!(error.problems.len(), 3, "{error}");
    assert_eq!(error.problems[2].line, 4, "{error}");
}

#[test]
fn no_input_makes_the_reader_panic() {
    for text in ["", "\0", "- 1", "null", "name: 3", "a: &a [*a]", "\u{feff}name: x", "name: ~\nsites: ~"] {
        assert!(Scenario::parse(text, "x").is_err(), "{text:?}");
    }
}
