use super::*;

const SMALL: &str = "site: aws\nmesh: prod\nregistry:\n  file:\n    dir: /etc/sennit/registry\n";

fn parse(extra: &str) -> Result<Config, ConfigError> {
    Config::parse("agent.yaml", &format!("{SMALL}{extra}"), Some("node-1"))
}

fn refusal(extra: &str) -> String {
    parse(extra).map(|_| "accepted".to_owned()).unwrap_or_else(|e| e.to_string())
}

#[test]
fn the_smallest_configuration_has_the_documented_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.node.as_str(), "node-1");
    assert_eq!(config.wireguard.interface.as_str(), "sennit0");
    assert_eq!((config.wireguard.listen_port, config.wireguard.persistent_keepalive), (None, None));
    assert_eq!(config.socket(), PathBuf::from("/run/sennit/agent.sock"));
    assert_eq!(config.routing, Routing::default());
    assert!(config.underlay.endpoints.is_none());
}

#[test]
fn an_unknown_field_is_refused_with_its_position() {
    let message = refusal("wireguard:\n  listenPrt: 1\n");
    assert!(message.contains("listenPrt") && message.contains("line 7"), "{message}");
    assert!(refusal("colour: red\n").contains("colour"));
}

#[test]
fn each_bad_value_is_refused_by_the_name_of_its_field() {
    for (extra, wanted) in [
        ("wireguard: {listenPort: 0}\n", "listenPort"),
        ("wireguard: {listenPort: 70000}\n", "line 6"),
        ("wireguard: {interface: 'a b'}\n", "interface name"),
        ("wireguard: {backend: magic}\n", "magic"),
        ("underlay: {mtu: 1000}\n", "underlay.mtu"),
        ("underlay: {endpoints: ['127.0.0.1:1']}\n", "loopback"),
        ("underlay: {endpoints: ['nonsense']}\n", "nonsense"),
        ("node: 'A B'\n", "node name"),
        ("stateDir: relative\n", "stateDir"),
        ("routing: {table: 254}\n", "routing.table"),
        ("routing: {rulePriority: 32766}\n", "routing.rulePriority"),
        ("routing: {protocol: 2}\n", "routing.protocol"),
        ("sites: [{name: gcp, prefixes: [10.0.0.0/8]}]\n", "no entry under `sites`"),
        ("sites: [{name: aws, prefixes: [0.0.0.0/0]}]\n", "cannot be granted"),
        ("sites: [{name: aws, prefixes: [10.1.2.3/16]}]\n", "10.1.0.0/16"),
        ("sites: [{name: aws, prefixes: [10.0.0.0/8]}, {name: aws, prefixes: []}]\n", "twice"),
        ("sites: [{name: aws, prefixes: [10.0.0.0/8]}, {name: b, prefixes: [10.9.0.0/16]}]\n", "overlaps"),
        ("protectedAddresses: [10.0.0.300]\n", "line 6"),
        ("log: loud\n", "loud"),
    ] {
        let message = refusal(extra);
        assert!(message.contains(wanted) && message.contains("agent.yaml"), "{extra}: {message}");
    }
}

#[test]
fn a_host_name_that_is_no_node_name_asks_for_one() {
    let error = Config::parse("agent.yaml", SMALL, Some("My_Host")).unwrap_err().to_string();
    assert!(error.contains("node: not set"), "{error}");
}

#[test]
fn a_configuration_that_is_no_yaml_is_refused() {
    for text in ["", "- a\n", "\u{0}\u{1}", "site: [", "&a [*a, *a]"] {
        assert!(Config::parse("agent.yaml", text, Some("n")).is_err(), "{text:?}");
    }
}

#[test]
fn the_registry_is_a_directory_or_a_clusters_api_and_not_both() {
    let parse = |registry: &str| {
        let text = format!("site: aws\nmesh: prod\nregistry: {registry}\n");
        Config::parse("agent.yaml", &text, Some("node-1")).map(|config| config.registry)
    };
    let RegistryChoice::Kube(kube) = parse("{kube: {}}").unwrap() else { panic!() };
    assert_eq!(kube.kubeconfig, None);
    let RegistryChoice::Kube(kube) = parse("{kube: {kubeconfig: /etc/sennit/kubeconfig}}").unwrap() else {
        panic!()
    };
    assert_eq!(kube.kubeconfig, Some(PathBuf::from("/etc/sennit/kubeconfig")));
    let text = "site: aws\nmesh: prod\nregistry: {kube: {cluster: west}}\n";
    assert_eq!(Config::parse("agent.yaml", text, Some("node-1")).unwrap().node.as_str(), "node-1.west");
    for (bad, wanted) in [
        ("{kube: {cluster: 'a.b'}}", "cluster name"),
        ("{kube: {kubeconfig: relative}}", "registry.kube.kubeconfig"),
        ("{kube: {kubecfg: /a}}", "kubecfg"),
        ("{file: {dir: /a}, kube: {}}", "line 3"),
        ("{}", "line 3"),
        ("{etcd: {}}", "etcd"),
    ] {
        let message = parse(bad).unwrap_err().to_string();
        assert!(message.contains(wanted), "{bad}: {message}");
    }
}

#[test]
fn budgets_of_policies_have_defaults_each() {
    use mesh_policy::budget::{Budget, Budgets};
    let config = parse("policy: {budgets: {namespace: {rules: 5}, node: {bytes: 7}}}").unwrap();
    let (budgets, known) = (config.policy.budgets.budgets(), Budgets::default());
    assert_eq!(budgets.namespace, Budget { rules: 5, ..known.namespace });
    assert_eq!(budgets.node, Budget { bytes: 7, ..known.node });
    assert_eq!((budgets.class, budgets.operator), (known.class, known.operator));
    for wrong in ["{namespace: {rules: -1}}", "{tenant: {}}", "{node: {ports: 1}}"] {
        assert!(parse(&format!("policy: {{budgets: {wrong}}}")).is_err(), "{wrong}");
    }
}
