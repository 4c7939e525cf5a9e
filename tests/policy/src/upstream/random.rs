//! Clusters by chance, as manifests and as what they mean, and flows in them.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use mesh_policy::evaluate::{Flow, evaluate};
use mesh_policy::object::{Namespace, Pod};
use mesh_policy::{Event, Kind, Protocol, State};
use serde_json::{Map, Value, json};

use super::{ACCOUNT, Cluster, Endpoint, Entity, Labels, NAMESPACE, Packet, Policy, Port, Rule, Selector};

const NAMESPACES: [&str; 3] = ["shop", "dev", "ops"];
const ACCOUNTS: [&str; 2] = ["default", "robot"];
const LABELS: [&str; 3] = ["app", "tier", "role"];
const VALUES: [&str; 3] = ["a", "b", "c"];
const NETS: [&str; 10] = [
    "10.0.0.0/8",
    "10.0.1.0/24",
    "10.0.1.2/32",
    "172.16.0.0/12",
    "0.0.0.0/0",
    "fd00::/8",
    "fd00:1::/64",
    "fd00:1::2/128",
    "2001:db8::/32",
    "::/0",
];
const NAMES: [&str; 3] = ["http", "dns", "none"];
const PORTS: [u16; 4] = [53, 80, 8080, 9090];
/// Prefixes of a set that is large.
const LARGE: u32 = 2_000;

/// Chance that is the same each time.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// By a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    fn below(&mut self, count: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % count.max(1)
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    fn some<T>(&mut self, one_in: usize, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.one_in(one_in).then(|| make(self))
    }

    fn many<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }
}

fn selector(dice: &mut Dice, depth: usize) -> Selector {
    let (label, value) = (dice.of(&LABELS), dice.of(&VALUES));
    match dice.below(if depth == 0 { 6 } else { 9 }) {
        0 => Selector::All,
        1 => Selector::Is(label, value),
        2 => Selector::IsNot(label, value),
        3 => Selector::In(label, vec![value, "a"]),
        4 => Selector::NotIn(label, vec![value, "b"]),
        5 => Selector::Has(label),
        6 => Selector::Not(Box::new(selector(dice, depth - 1))),
        7 => Selector::And(Box::new(selector(dice, depth - 1)), Box::new(selector(dice, depth - 1))),
        _ => Selector::Or(Box::new(selector(dice, depth - 1)), Box::new(selector(dice, depth - 1))),
    }
}

fn labels(dice: &mut Dice) -> Labels {
    let pairs = dice.many(2, |dice| (dice.of(&LABELS).to_owned(), dice.of(&VALUES).to_owned()));
    pairs.into_iter().collect()
}

fn prefixed(labels: &Labels, prefix: &str) -> Labels {
    labels.iter().map(|(label, value)| (format!("{prefix}{label}"), value.clone())).collect()
}

fn net(dice: &mut Dice) -> IpNet {
    dice.of(&NETS).parse().expect("a prefix")
}

fn entity(dice: &mut Dice, has_ports: bool, named: bool) -> Entity {
    let port = |dice: &mut Dice| match named || dice.one_in(3) {
        true => Port::Named(dice.of(&NAMES)),
        false => {
            let first = dice.of(&PORTS);
            Port::Numbers(first, first.saturating_add(dice.of(&[0, 0, 100])))
        }
    };
    let mut nets = || if dice.one_in(4) { dice.many(3, net) } else { Vec::new() };
    let nets = [nets(), nets()];
    let mut ports = || if has_ports && dice.one_in(3) { dice.many(2, port) } else { Vec::new() };
    let ports = [ports(), ports()];
    Entity {
        nets,
        selector: dice.some(3, |dice| selector(dice, 2)),
        not_selector: dice.some(6, |dice| selector(dice, 1)),
        namespaces: dice.some(4, |dice| if dice.one_in(5) { Err(()) } else { Ok(selector(dice, 2)) }),
        accounts: dice.some(6, |dice| {
            let names = dice.many(1, |dice| dice.of(&ACCOUNTS));
            (names, dice.some(2, |dice| selector(dice, 1)))
        }),
        ports,
    }
}

fn rule(dice: &mut Dice) -> Rule {
    let protocol = dice.some(2, |dice| dice.of(&[6_u8, 17, 1, 47]));
    let has_ports = protocol.is_none_or(|protocol| [6, 17].contains(&protocol));
    Rule {
        action: dice.of(&["Allow", "Allow", "Deny", "Deny", "Pass", "Log"]),
        version: dice.some(8, |dice| dice.of(&[4, 6])),
        protocol,
        not_protocol: dice.some(8, |dice| dice.of(&[6_u8, 17])),
        ends: [0, 1].map(|_| entity(dice, has_ports, protocol.is_none())),
    }
}

fn entity_manifest(entity: &Entity) -> Value {
    let mut all = Map::new();
    let mut put = |field: &str, value: Value| drop(all.insert(field.to_owned(), value));
    let nets = |nets: &[IpNet]| json!(nets.iter().map(ToString::to_string).collect::<Vec<_>>());
    let ports = |ports: &[Port]| {
        let all = ports.iter().map(|port| match port {
            Port::Numbers(first, last) if first == last => json!(first),
            Port::Numbers(first, last) => json!(format!("{first}:{last}")),
            Port::Named(name) => json!(name),
        });
        all.collect::<Value>()
    };
    for (field, list) in ["nets", "notNets"].into_iter().zip(&entity.nets) {
        if !list.is_empty() {
            put(field, nets(list));
        }
    }
    for (field, list) in ["ports", "notPorts"].into_iter().zip(&entity.ports) {
        if !list.is_empty() {
            put(field, ports(list));
        }
    }
    if let Some(selector) = &entity.selector {
        put("selector", json!(selector.text()));
    }
    if let Some(not) = &entity.not_selector {
        put("notSelector", json!(not.text()));
    }
    if let Some(namespaces) = &entity.namespaces {
        let text = namespaces.as_ref().map_or_else(|()| "global()".to_owned(), Selector::text);
        put("namespaceSelector", json!(text));
    }
    if let Some((names, selector)) = &entity.accounts {
        put("serviceAccounts", json!({"names": names, "selector": selector.as_ref().map(Selector::text)}));
    }
    Value::Object(all)
}

fn rule_manifest(rule: &Rule) -> Value {
    let mut all = json!({"action": rule.action, "source": entity_manifest(&rule.ends[0]), "destination": entity_manifest(&rule.ends[1])});
    for (field, value) in
        [("ipVersion", rule.version), ("protocol", rule.protocol), ("notProtocol", rule.not_protocol)]
    {
        if let Some(value) = value {
            all[field] = match (field, value) {
                ("ipVersion", _) => json!(value),
                (_, 6) => json!("TCP"),
                (_, 17) => json!("UDP"),
                (_, value) => json!(value),
            };
        }
    }
    all
}

fn calico(kind: &str, metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata, "spec": spec})
}

fn policy(dice: &mut Dice, number: usize) -> (Policy, Value) {
    let namespace = dice.some(2, |dice| dice.of(&NAMESPACES));
    let is_global = namespace.is_none();
    let mut rules = || if dice.one_in(3) { None } else { Some(dice.many(3, rule)) };
    let mut rules = [rules(), rules()];
    if rules.iter().all(Option::is_none) {
        rules[1] = Some(Vec::new());
    }
    let policy = Policy {
        namespace,
        name: format!("p{number}"),
        order: dice.below(3) as u32,
        selector: dice.some(2, |dice| selector(dice, 1)),
        namespaces: dice.some(4, |dice| selector(dice, 1)).filter(|_| is_global),
        accounts: dice.some(6, |dice| selector(dice, 1)),
        rules,
    };
    let kind = if is_global { "GlobalNetworkPolicy" } else { "NetworkPolicy" };
    let types: Vec<&str> = ["Egress", "Ingress"]
        .into_iter()
        .zip(&policy.rules)
        .filter_map(|(kind, rules)| rules.as_ref().map(|_| kind))
        .collect();
    let rules = |direction: usize| -> Vec<Value> {
        policy.rules[direction].iter().flatten().map(rule_manifest).collect()
    };
    let text = |selector: &Option<Selector>| selector.as_ref().map(Selector::text);
    let mut spec = json!({"order": policy.order, "types": types, "egress": rules(0), "ingress": rules(1), "selector": text(&policy.selector), "serviceAccountSelector": text(&policy.accounts)});
    if is_global {
        spec["namespaceSelector"] = json!(text(&policy.namespaces));
    }
    let manifest = calico(kind, json!({"name": policy.name, "namespace": namespace}), spec);
    (policy, manifest)
}

impl Cluster {
    /// One by chance.
    pub fn random(dice: &mut Dice) -> Self {
        let mut cluster = Self::default();
        let namespaces = NAMESPACES.map(|name| (name, labels(dice)));
        for (name, labels) in &namespaces {
            let metadata = json!({"name": name, "labels": labels});
            cluster.manifests.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}));
        }
        let mut accounts = Vec::new();
        for namespace in NAMESPACES {
            for name in ACCOUNTS {
                let labels = labels(dice);
                let metadata = json!({"name": name, "namespace": namespace, "labels": labels});
                let manifest = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
                cluster.manifests.push(manifest);
                accounts.push((namespace, name, labels));
            }
        }
        let inherited = |namespace: &str| {
            let found = namespaces.iter().find(|(name, _)| *name == namespace);
            let mut all = found.map(|(_, labels)| prefixed(labels, "pcns.")).unwrap_or_default();
            all.insert(NAMESPACE.to_owned(), namespace.to_owned());
            all
        };
        for index in 0..5 {
            let (namespace, account, of_account) = accounts[dice.below(accounts.len())].clone();
            let own = labels(dice);
            let mut addresses = vec![format!("10.0.1.{index}")];
            addresses.extend((!dice.one_in(5)).then(|| format!("fd00:1::{index}")));
            let ports = [("http", 6, dice.of(&[80, 8080])), ("dns", 17, 53)];
            let ports: Vec<_> = ports.into_iter().filter(|_| !dice.one_in(3)).collect();
            let shown = ports.iter().map(|(name, protocol, number)| {
                let protocol = if *protocol == 6 { "TCP" } else { "UDP" };
                json!({"name": name, "protocol": protocol, "containerPort": number})
            });
            let ips: Vec<Value> = addresses.iter().map(|address| json!({"ip": address})).collect();
            cluster.manifests.push(json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("w{index}"), "namespace": namespace, "labels": own},
                "spec": {"serviceAccountName": account, "containers": [{"ports": shown.collect::<Vec<_>>()}]},
                "status": {"phase": "Running", "podIPs": ips},
            }));
            let mut labels = own;
            labels.extend(inherited(namespace));
            labels.extend(prefixed(&of_account, "pcsa."));
            labels.insert(ACCOUNT.to_owned(), account.to_owned());
            let address = |text: &String| IpNet::from(text.parse::<IpAddr>().expect("an address"));
            let nets = addresses.iter().map(address).collect();
            cluster.endpoints.push(Endpoint { labels, nets, ports, is_pod: true });
        }
        for index in 0..dice.below(4) {
            let namespace = dice.some(2, |dice| dice.of(&NAMESPACES));
            let own = labels(dice);
            let mut nets = dice.many(3, net);
            if dice.one_in(20) {
                let many = (0..LARGE).map(|n| Ipv4Addr::from(0xc633_0000 + 7 * n));
                nets.extend(many.map(|address| IpNet::from(IpAddr::V4(address))));
            }
            let kind = if namespace.is_some() { "NetworkSet" } else { "GlobalNetworkSet" };
            let metadata = json!({"name": format!("s{index}"), "namespace": namespace, "labels": own});
            let shown: Vec<String> = nets.iter().map(ToString::to_string).collect();
            cluster.manifests.push(calico(kind, metadata, json!({"nets": shown})));
            let mut labels = own;
            labels.extend(namespace.map(inherited).unwrap_or_default());
            cluster.endpoints.push(Endpoint { labels, nets, ports: Vec::new(), is_pod: false });
        }
        if dice.one_in(2) {
            let own = labels(dice);
            let spec = json!({"node": "n", "interfaceName": "eth0", "expectedIPs": ["172.16.0.1", "2001:db8::1"],
                "ports": [{"name": "http", "protocol": "TCP", "port": 9090}]});
            cluster.manifests.push(calico("HostEndpoint", json!({"name": "h", "labels": own}), spec));
            let nets: [IpNet; 2] =
                ["172.16.0.1/32", "2001:db8::1/128"].map(|net| net.parse().expect("a prefix"));
            let ports = vec![("http", 6, 9090)];
            cluster.endpoints.push(Endpoint { labels: own, nets: nets.into(), ports, is_pod: false });
        }
        for number in 0..1 + dice.below(3) {
            let (policy, manifest) = policy(dice, number);
            cluster.policies.push(policy);
            cluster.manifests.push(manifest);
        }
        cluster
    }

    /// The same, as it is read.
    ///
    /// # Errors
    /// Fails if an object is refused.
    pub fn state(&self) -> anyhow::Result<State> {
        let mut state = State::default();
        state.world.set_bounds(&[].into(), true);
        for manifest in &self.manifests {
            let text = |field: &str| manifest[field].as_str().unwrap_or_default();
            let part = |field: &str| manifest.get(field).cloned().unwrap_or(Value::Null);
            let event = match (text("kind"), Kind::of(text("apiVersion"), text("kind"))) {
                ("Namespace", _) => {
                    let name = manifest["metadata"]["name"].as_str().unwrap_or_default();
                    let labels = serde_json::from_value(manifest["metadata"]["labels"].clone())?;
                    Event::Namespace(Namespace::new(name, labels))
                }
                ("Pod", _) => Event::Pod(Pod::new(
                    serde_json::from_value(part("metadata"))?,
                    serde_json::from_value(part("spec"))?,
                    serde_json::from_value(part("status"))?,
                )?),
                (_, Some(kind)) => kind.read(manifest).there(),
                (kind, None) => anyhow::bail!("{kind} is not known"),
            };
            state.take(event);
        }
        let refused: Vec<String> = state.refusals().collect();
        anyhow::ensure!(refused.is_empty(), "{}", refused.join("\n"));
        Ok(state)
    }

    /// Asks flows by chance of both readings.
    ///
    /// # Errors
    /// Fails if the two readings disagree about a flow.
    pub fn compare(&self, dice: &mut Dice, flows: usize) -> anyhow::Result<()> {
        let state = self.state()?;
        for _ in 0..flows {
            let packet = self.packet(dice);
            let [source, destination] = packet.ends;
            if source == destination {
                continue;
            }
            let flow = Flow {
                source_port: packet.ports[0],
                ..Flow::new(source, destination, Protocol(packet.protocol), packet.ports[1])
            };
            let judged = evaluate(&state.world, &state.policies, &flow);
            let expected = self.allows(&packet);
            anyhow::ensure!(
                judged.allowed() == expected,
                "{packet:?}: allowed is {}, and should be {expected}: {judged:?}\n{}",
                judged.allowed(),
                serde_json::to_string_pretty(&self.manifests)?
            );
        }
        Ok(())
    }

    fn packet(&self, dice: &mut Dice) -> Packet {
        let v4 = dice.one_in(2);
        let others: [&str; 3] = if v4 {
            ["172.16.0.1", "8.8.8.8", "198.51.0.7"]
        } else {
            ["2001:db8::1", "2a00::1", "fd00:9::1"]
        };
        let addresses: Vec<IpAddr> = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.is_pod)
            .flat_map(|endpoint| endpoint.nets.iter().map(IpNet::addr))
            .chain(others.map(|text| text.parse().expect("an address")))
            .filter(|address| address.is_ipv4() == v4)
            .collect();
        let protocol = dice.of(&[6_u8, 6, 17, if v4 { 1 } else { 58 }, 47]);
        let has_ports = [6, 17].contains(&protocol);
        let mut port = || if has_ports { dice.of(&PORTS) } else { 0 };
        let ports = [port(), port()];
        Packet { ends: [0, 1].map(|_| dice.of(&addresses)), protocol, ports }
    }
}
