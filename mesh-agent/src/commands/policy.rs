//! `mesh-agent policy`

#[cfg(test)]
mod claimed;
mod engines;
#[cfg(test)]
mod examples;
mod hints;
mod import;
mod replay;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use mesh_keyring::MeshName;
use mesh_overlay::{Advertisement, Endpoint, NodeRecord, address};
use mesh_policy::compile::Settings;
use mesh_policy::explain::explain;
use mesh_policy::object::Pod;
use mesh_policy::probe::{Answer, AnswerDecision, Place, Probe, ProtocolName};
use mesh_policy::render::{self, Slot};
use mesh_policy::world::Node;
use mesh_policy::{Compiler, Event, Protocol, State};
use serde_json::Value;

use super::{print, shown};
use crate::cli::{PolicyCommand, PolicyOutput};
use crate::config::{Config, Mode, RegistryChoice, SiteStances, Wireguard};
use crate::policing;
use crate::registry::Snapshot;
use crate::registry::file::words::Files;
use crate::registry::file::{FileRegistry, words};

/// A state directory, read.
struct Loaded {
    state: State,
    events: Vec<Event>,
    // What all mesh addresses lie in.
    mesh: IpNet,
    problems: Vec<String>,
    // Which mesh it was taken for, where nothing says that.
    assumed: Option<String>,
    mode: Option<Mode>,
}

impl Loaded {
    /// Returns the notice for verdicts that are not enforced.
    fn unenforced(&self) -> &'static str {
        match self.mode {
            Some(Mode::Audit) => {
                "policy.mode is audit: what is denied here would be denied; it passes, and is told\n"
            }
            Some(Mode::Off) => "policy.mode is off: nothing of this is enforced\n",
            Some(Mode::Enforce) | None => "",
        }
    }
}

fn load(dir: &Path, config: Option<&Config>) -> anyhow::Result<Loaded> {
    let mut registry = match config {
        Some(config) => FileRegistry::of_mesh(dir, &config.grants.mesh),
        None => FileRegistry::new(dir),
    };
    let snapshot = registry.read()?;
    assemble(&snapshot, &registry.files(), config)
}

/// Builds the policy state from the nodes and the manifests.
fn assemble(snapshot: &Snapshot, files: &Files, config: Option<&Config>) -> anyhow::Result<Loaded> {
    let words = words::all(files);
    let (meshes, said_of) = (words::meshes(files), words::hosts(files));
    let mut problems: Vec<String> = snapshot.problems.iter().map(|problem| problem.text.clone()).collect();
    problems.extend(words.problems.into_values().flatten());
    // Of several Meshes only a configuration tells which is meant.
    let named = config.map(|config| config.grants.mesh.to_string());
    let only = meshes.keys().next().filter(|_| meshes.len() == 1);
    let assumed = match (&named, only, meshes.len()) {
        (None, Some(only), _) => {
            Some(format!("this is of mesh {only}, the only Mesh here; --config says otherwise"))
        }
        (None, None, 2..) => {
            let all: Vec<&str> = meshes.keys().map(String::as_str).collect();
            Some(format!("of Meshes {} none counts: --config says which", all.join(", ")))
        }
        _ => None,
    };
    let name = named.or_else(|| only.cloned()).unwrap_or_else(|| "mesh".to_owned());
    let mesh: MeshName = name.parse()?;
    let nodes: BTreeMap<String, Node> = snapshot
        .nodes
        .iter()
        .map(|record| {
            let mut node = policy_node(record, &mesh);
            if let Some(host) = said_of.get(record.name.as_str()) {
                node.labels = Some(host.labels.clone());
                node.status_addresses.clone_from(&host.addresses);
            }
            (record.name.to_string(), node)
        })
        .collect();
    let said = match meshes.get(&name).filter(|_| assumed.is_none() || only.is_some()) {
        Some(Ok(settings)) => settings.stances.clone(),
        Some(Err(why)) => {
            problems.push(format!("Mesh {name}: {why}"));
            SiteStances::default()
        }
        None => SiteStances::default(),
    };
    let own = config.map(|config| config.policy.sites.clone()).filter(|stances| !stances.is_silent());
    let sites = nodes.values().filter_map(|node| node.site.clone()).collect();
    let stances = own.unwrap_or(said).policies(&mesh, &sites);
    let mut events = words.events;
    events.extend(stances.into_iter().map(|policy| Event::Policy(policy.into())));
    stand_in(&mut events);
    let mut state = State::default();
    state.world.failsafe = config.map(|config| config.policy.failsafe()).unwrap_or_default();
    let outside = config.is_none_or(policing::outside);
    let mesh = IpNet::from(address::mesh_prefix(&mesh));
    state.world.set_bounds(&[mesh].into(), outside);
    state.policies.set_budgets(config.map(|config| config.policy.budgets.budgets()).unwrap_or_default());
    state.world.set_nodes(nodes);
    events.iter().for_each(|event| drop(state.take(event.clone())));
    problems.extend(state.world.address_refusals());
    Ok(Loaded { state, events, mesh, problems, assumed, mode: config.map(|config| config.policy.mode) })
}

/// Pods of manifests that no cluster has seen have no addresses. They are judged by who they are all the same: by addresses that
/// nobody has (RFC 1112 class E, RFC 6666).
fn stand_in(events: &mut [Event]) {
    let pods = events.iter_mut().filter_map(|event| match event {
        Event::Pods(pods) => Some(pods),
        _ => None,
    });
    let without =
        |pod: &&mut Pod| pod.addresses.is_empty() && !pod.ended && !pod.host_network && pod.fault.is_none();
    for (index, pod) in (1_u32..).zip(pods.flatten().filter(without)) {
        let v4 = Ipv4Addr::from(0xf000_0000 + index);
        let v6 = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, (index >> 16) as u16, index as u16);
        pod.addresses.extend([IpAddr::V4(v4), IpAddr::V6(v6)]);
    }
}

fn policy_node(record: &NodeRecord, mesh: &MeshName) -> Node {
    let claim = Advertisement::parse(&record.annotations).ok().flatten();
    let claimed = claim.as_ref().map(|claim| claim.site.clone());
    let site = record.site_label.clone().or(claimed);
    let endpoints = claim.iter().flat_map(|claim| claim.endpoints.iter().chain(&claim.internal_endpoints));
    let mut addresses: BTreeSet<IpAddr> = endpoints
        .filter_map(|endpoint| match endpoint {
            Endpoint::Address(address) => Some(address.ip()),
            Endpoint::Name(..) => None,
        })
        .collect();
    if let Some(site) = &site {
        addresses.insert(address::node_address(mesh, site, &record.name).into());
    }
    let prefixes = record.pod_cidrs.iter().filter_map(|text| text.parse().ok());
    let site = site.map(|site| site.to_string());
    Node { site, addresses, prefixes: prefixes.collect(), ..Node::default() }
}

pub(super) fn execute(command: PolicyCommand) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Evaluate { state, probes, config, output } => {
            evaluate(&state, &probes, configured(config.as_deref())?.as_ref(), output)
        }
        PolicyCommand::Replay { flows, state, config, output } => {
            replay::execute(&state, &flows, configured(config.as_deref())?.as_ref(), output)
        }
        PolicyCommand::Import { check, recursive, output } => import::check(&check, recursive, output),
        PolicyCommand::Compile { state, node, config } => compile(&state, &node, config.as_deref()),
        PolicyCommand::Explain { state, from, to, port, family, config } => {
            let loaded = load(&state, configured(config.as_deref())?.as_ref())?;
            warn(&loaded);
            let (port, protocol) = port_and_protocol(&port)?;
            let probe = Probe::new(place(&from)?, place(&to)?, protocol, port, family);
            let flow = probe.flow(&loaded.state)?;
            print(&format!("{}{}", explain(&loaded.state, &flow), loaded.unenforced()))
        }
    }
}

fn compile(dir: &Path, node: &str, config: Option<&Path>) -> anyhow::Result<()> {
    let config = configured(config)?;
    let loaded = load(dir, config.as_ref())?;
    warn(&loaded);
    let nodes = loaded.state.world.nodes().clone();
    let Some(own) = nodes.get(node) else { bail!("{}: no Node manifest of {node}", shown(dir)) };
    let tunnel =
        config.as_ref().map_or_else(|| Wireguard::default().interface, |config| config.wireguard.interface);
    let policy = config.as_ref().map(|config| config.policy.clone()).unwrap_or_default();
    let addresses = nodes.values().flat_map(|node| &node.addresses);
    let addresses = addresses.filter(|address| loaded.mesh.contains(&IpNet::from(**address)));
    let strangers = config.as_ref().is_none_or(|config| matches!(config.registry, RegistryChoice::File(_)));
    let settings = Settings {
        node: node.to_owned(),
        tunnels: [tunnel.to_string()].into(),
        scope: nodes
            .values()
            .flat_map(|node| node.prefixes.iter().copied())
            .chain(addresses.map(|address| IpNet::from(*address)))
            .collect(),
        own: own.prefixes.clone(),
        address: own.addresses.iter().find(|own| loaded.mesh.contains(&IpNet::from(**own))).copied(),
        outside_prefixes: config.as_ref().is_none_or(policing::outside),
        ..policing::settings(&policy, strangers)
    };
    let mut compiler = Compiler::new(settings.clone());
    compiler.configure(settings, nodes);
    loaded.events.into_iter().for_each(|event| compiler.take(event));
    compiler.update();
    // One of many; the agent's own begins somewhere by chance.
    compiler.turn_epoch(Some(policy.ct_mark_mask & policy.ct_mark_mask.wrapping_neg()));
    print(&render::ruleset(compiler.ruleset(), Slot::A))
}

fn warn(loaded: &Loaded) {
    for problem in &loaded.problems {
        eprintln!("refused: {problem}");
    }
    if let Some(assumed) = &loaded.assumed {
        eprintln!("assumed: {assumed}");
    }
    for (id, hints) in hints::hints(&loaded.state) {
        hints.iter().for_each(|(field, hint)| eprintln!("hint: {id}: {field}: {hint}"));
    }
    for over in loaded.state.excesses() {
        eprintln!("over budget: {}: {}; its policies deny whom they select", over.object, over.excess);
    }
}

fn configured(path: Option<&Path>) -> anyhow::Result<Option<Config>> {
    Ok(path.map(|path| Config::load(path, None)).transpose()?)
}

fn evaluate(
    state: &Path,
    probes: &Path,
    config: Option<&Config>,
    output: PolicyOutput,
) -> anyhow::Result<()> {
    let loaded = load(state, config)?;
    warn(&loaded);
    let text = match probes.to_str() {
        Some("-") => std::io::read_to_string(std::io::stdin()).context("reading probes")?,
        _ => fs::read_to_string(probes).with_context(|| format!("reading probes from {}", shown(probes)))?,
    };
    let probes: Vec<Value> = serde_json::from_str(&text)
        .with_context(|| format!("{}: a JSON array of probes is needed", shown(probes)))?;
    // One that is none spoils no other.
    let answers = probes.into_iter().map(|probe| match serde_json::from_value::<Probe>(probe) {
        Ok(probe) => probe.answer(&loaded.state),
        Err(e) => Answer::unknown(e.to_string()),
    });
    let answers: Vec<Answer> = answers.collect();
    match output {
        PolicyOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&answers)?)),
        PolicyOutput::Table => {
            let mut text = String::new();
            for (index, answer) in answers.iter().enumerate() {
                text.push_str(&line(index, answer));
            }
            text.push_str(loaded.unenforced());
            print(&text)
        }
    }
}

/// An answer, for people; what staged policies propose stands beside it.
fn line(index: usize, answer: &Answer) -> String {
    let decisions = |egress: Option<&AnswerDecision>, ingress: Option<&AnswerDecision>| {
        let why = [("egress", egress), ("ingress", ingress)].map(|(direction, decision)| {
            let Some(decision) = decision else { return String::new() };
            let policy = decision.policy.as_deref().map(|policy| format!(" {policy}")).unwrap_or_default();
            format!(" {direction}={} ({}){policy}", decision.verdict, decision.reason)
        });
        why.concat()
    };
    let mut text = format!("{index} {}", answer.verdict);
    if let Some(error) = &answer.error {
        text.push_str(&format!(": {error}"));
    }
    text.push_str(&decisions(answer.egress.as_ref(), answer.ingress.as_ref()));
    if let Some(proposed) = &answer.proposed {
        let why = decisions(Some(&proposed.egress), Some(&proposed.ingress));
        text.push_str(&format!("; proposed {}{why}", proposed.verdict));
    }
    text.push('\n');
    text
}

fn place(text: &str) -> anyhow::Result<Place> {
    if let Ok(address) = text.parse() {
        return Ok(Place::Ip(address));
    }
    Ok(match text.strip_prefix("node/") {
        Some(node) => Place::Node(node.to_owned()),
        None if text.contains('/') => Place::Pod(text.strip_prefix("pod/").unwrap_or(text).to_owned()),
        None => bail!("{text:?}: name a pod as NAMESPACE/NAME, a node as node/NAME, or an IP address"),
    })
}

/// `80/TCP`, `ICMP`, `/47` for a protocol by its number.
fn port_and_protocol(text: &str) -> anyhow::Result<(Option<u16>, ProtocolName)> {
    let (port, protocol) = match text.split_once('/') {
        Some(("", protocol)) => (None, protocol),
        Some((port, protocol)) => {
            let port =
                port.parse().with_context(|| format!("{text:?}: use PORT/PROTOCOL, such as 80/TCP"))?;
            (Some(port), protocol)
        }
        None if text.parse::<u16>().is_ok() => (text.parse().ok(), "TCP"),
        None => (None, text),
    };
    let _: Protocol = protocol.parse()?;
    Ok((port, ProtocolName::Name(protocol.to_owned())))
}

#[cfg(test)]
mod tests {
    use mesh_policy::probe::Proposed;

    use super::*;

    fn decision(verdict: &'static str, policy: Option<&str>) -> AnswerDecision {
        let policy = policy.map(str::to_owned);
        AnswerDecision { verdict, reason: "rule", tier: None, policy, rule: None }
    }

    #[test]
    fn a_line_tells_errors_and_proposals() {
        let wrong = Answer::unknown("port: TCP needs one".to_owned());
        assert_eq!(line(0, &wrong), "0 deny: port: TCP needs one\n");
        let proposed = Proposed {
            verdict: "deny",
            egress: decision("allow", None),
            ingress: decision("deny", Some("StagedNetworkPolicy a/b")),
        };
        let answer = Answer {
            verdict: "allow",
            error: None,
            egress: Some(decision("allow", None)),
            ingress: Some(decision("allow", None)),
            proposed: Some(proposed),
        };
        let text = line(1, &answer);
        assert!(
            text.ends_with(
                "; proposed deny egress=allow (rule) ingress=deny (rule) StagedNetworkPolicy a/b\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_probe_with_an_unknown_field_is_none() {
        let probe =
            serde_json::json!({"from": {"ip": "8.8.8.8"}, "to": {"pod": "a/b"}, "port": 80, "srcport": 53});
        let error = serde_json::from_value::<Probe>(probe).unwrap_err().to_string();
        assert!(error.contains("srcport"), "{error}");
    }

    #[test]
    fn another_mesh_counts_for_nothing_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mesh = |name: &str| {
            format!(
                "{{apiVersion: sennit.dev/v1alpha1, kind: Mesh, metadata: {{name: {name}}}, spec: {{}}}}\n"
            )
        };
        fs::write(dir.path().join("m.yaml"), mesh("acme")).unwrap();
        let loaded = load(dir.path(), None).unwrap();
        assert!(loaded.assumed.unwrap().contains("of mesh acme, the only Mesh"));
        fs::write(dir.path().join("n.yaml"), mesh("other")).unwrap();
        assert!(
            load(dir.path(), None).unwrap().assumed.unwrap().contains("of Meshes acme, other none counts")
        );
        let mut registry = FileRegistry::of_mesh(dir.path(), &"acme".parse().unwrap());
        let told: Vec<String> =
            registry.read().unwrap().problems.into_iter().map(|problem| problem.text).collect();
        assert_eq!(told, ["Mesh other: counts for nothing here: this node is of mesh acme"]);
    }
}
