//! What the lab writes for the agents: the operator's manifests and each agent's configuration.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::layout::{LISTEN_PORT, Layout, NodeLayout, SiteLayout};
use crate::scenario::step::Apply;
use crate::scenario::{Mesh, Nat, Scenario};

/// Reads base64, in which line breaks and spaces do not count.
///
/// # Errors
/// A sentence when it is no base64.
pub fn decode_base64(text: &str) -> Result<Vec<u8>, String> {
    let dense: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    STANDARD.decode(dense).map_err(|error| error.to_string())
}

/// The bytes that an `apply` step writes; `base` is the scenario's directory.
///
/// # Errors
/// A sentence when the content cannot be read.
pub fn content(apply: &Apply, base: &Path) -> Result<Vec<u8>, String> {
    if let Some(manifest) = &apply.manifest {
        return Ok(documents(manifest).into_bytes());
    }
    if let Some(raw) = &apply.raw {
        return Ok(raw.clone().into_bytes());
    }
    if let Some(text) = &apply.base64 {
        return decode_base64(text);
    }
    let source = base.join(apply.source.as_deref().unwrap_or_default());
    std::fs::read(&source).map_err(|error| format!("cannot read {}: {error}", source.display()))
}

/// One manifest or several as a YAML stream; JSON is YAML, so each document is printed as JSON.
fn documents(manifest: &Value) -> String {
    let list = match manifest {
        Value::Array(list) => list.as_slice(),
        one => std::slice::from_ref(one),
    };
    list.iter().map(|document| format!("---\n{document:#}\n")).collect()
}

/// The operator's Node manifests for the whole lab.
pub fn nodes_manifest(layout: &Layout) -> String {
    let nodes = layout.nodes().map(|node| {
        let cidrs: Vec<String> = node.pod_cidrs.iter().map(ToString::to_string).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": node.name,
                "labels": {
                    "kubernetes.io/hostname": node.name,
                    "topology.kubernetes.io/zone": node.site,
                    "sennit.dev.node-restriction.kubernetes.io/site": node.site,
                },
            },
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
        })
    });
    documents(&Value::Array(nodes.collect()))
}

/// Where a node's agent keeps its things, as the node itself sees the paths.
#[derive(Debug, Clone)]
pub struct AgentPaths<'a> {
    /// The registry directory that all nodes share.
    pub registry: &'a Path,
    /// The node's own state directory.
    pub state: &'a Path,
    /// The directory of its sockets.
    pub run: &'a Path,
    /// The userspace WireGuard binary, where it is known.
    pub userspace_binary: Option<&'a Path>,
}

/// A node's agent configuration as YAML (printed as JSON, which every YAML reader takes).
pub fn agent_config(
    scenario: &Scenario,
    layout: &Layout,
    node: &NodeLayout,
    paths: &AgentPaths<'_>,
) -> String {
    let mut config = base_config(&scenario.name, layout, node, paths);
    apply_fragments(&mut config, &scenario.mesh, node);
    format!("{config:#}\n")
}

fn apply_fragments(config: &mut Value, mesh: &Mesh, node: &NodeLayout) {
    let Mesh { config: everyone, per_site, per_node } = mesh;
    let patches = [Some(everyone), per_site.get(&node.site), per_node.get(&node.name)];
    for patch in patches.into_iter().flatten() {
        merge(config, &Value::Object(patch.clone()));
    }
}

/// The endpoints that a node's agent is told to publish for other sites; none: it finds them itself.
pub(crate) fn outside_endpoints(
    scenario: &Scenario,
    layout: &Layout,
    node: &NodeLayout,
) -> Option<Vec<String>> {
    let mut config = json!({"underlay": {"endpoints": default_endpoints(layout, node)}});
    apply_fragments(&mut config, &scenario.mesh, node);
    let list = config["underlay"]["endpoints"].as_array()?;
    Some(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

fn lan_endpoints(node: &NodeLayout) -> Vec<String> {
    node.lan.iter().map(|address| std::net::SocketAddr::new(*address, LISTEN_PORT).to_string()).collect()
}

/// Nobody outside can dial a node behind a NAT.
fn default_endpoints(layout: &Layout, node: &NodeLayout) -> Vec<String> {
    let behind_nat = layout.site(&node.site).is_some_and(|site| site.nat != Nat::None);
    if behind_nat { Vec::new() } else { lan_endpoints(node) }
}

fn base_config(mesh: &str, layout: &Layout, node: &NodeLayout, paths: &AgentPaths<'_>) -> Value {
    let site = layout.site(&node.site);
    let grants: Vec<Value> = layout
        .sites
        .iter()
        .map(|SiteLayout { name, prefixes, .. }| {
            json!({"name": name, "prefixes": prefixes.iter().map(ToString::to_string).collect::<Vec<_>>()})
        })
        .collect();
    let mut config = json!({
        "node": node.name,
        "site": node.site,
        "mesh": mesh,
        "stateDir": paths.state,
        "runDir": paths.run,
        "registry": {"file": {"dir": paths.registry}},
        "wireguard": {"listenPort": LISTEN_PORT, "backend": "userspace"},
        "underlay": {
            "endpoints": default_endpoints(layout, node),
            "internalEndpoints": lan_endpoints(node),
            "mtu": site.map(|site| site.mtu),
        },
        "sites": grants,
    });
    if let Some(binary) = paths.userspace_binary {
        config["wireguard"]["userspaceBinary"] = json!(binary);
    }
    config
}

/// Merges as RFC 7386 does: maps key by key, `null` takes away, everything else replaces.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(map) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            map.remove(key);
        } else {
            merge(map.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCENARIO: &str = "
name: demo
sites:
  - {name: aws, nodes: 2}
  - {name: onprem, nat: cone, mtu: 1400}
mesh:
  config: {wireguard: {persistentKeepalive: 5}, log: debug}
  perSite: {onprem: {log: null}}
  perNode: {aws-2: {wireguard: {listenPort: 4500}}}
";

    fn config(node: &str) -> Value {
        let (scenario, layout) = Scenario::parse(SCENARIO, "demo").unwrap();
        let paths = AgentPaths {
            registry: Path::new("/reg"),
            state: Path::new("/state"),
            run: Path::new("/run/sennit"),
            userspace_binary: None,
        };
        serde_json::from_str(&agent_config(&scenario, &layout, layout.node(node).unwrap(), &paths)).unwrap()
    }

    #[test]
    fn each_node_gets_its_addresses_and_the_grants_of_all_sites() {
        let config = config("aws-1");
        assert_eq!(config["underlay"]["endpoints"], json!(["198.18.1.11:51820"]));
        assert_eq!(config["sites"][1], json!({"name": "onprem", "prefixes": ["10.2.0.0/16", "fd00:2::/48"]}));
        assert_eq!(config["wireguard"]["persistentKeepalive"], 5);
        assert_eq!(config["mesh"], "demo");
    }

    #[test]
    fn a_node_behind_nat_publishes_no_outside_endpoint() {
        let config = config("onprem-1");
        assert_eq!(config["underlay"]["endpoints"], json!([]));
        assert_eq!(config["underlay"]["internalEndpoints"], json!(["192.168.2.11:51820"]));
        assert_eq!(config["underlay"]["mtu"], 1400);
        assert!(config.get("log").is_none(), "the site's null takes the key away");
    }

    #[test]
    fn the_nodes_own_fragment_wins() {
        assert_eq!(config("aws-2")["wireguard"]["listenPort"], 4500);
        assert_eq!(config("aws-2")["wireguard"]["persistentKeepalive"], 5);
    }

    #[test]
    fn broken_manifests_reach_the_disk_byte_for_byte() {
        let apply = Apply { raw: Some("kind: [".into()), ..Apply::default() };
        assert_eq!(content(&apply, Path::new(".")).unwrap(), b"kind: [");
        let apply = Apply { base64: Some("AP8A\n /w==".into()), ..Apply::default() };
        assert_eq!(content(&apply, Path::new(".")).unwrap(), [0, 255, 0, 255]);
    }

    #[test]
    fn the_operators_manifest_lists_every_node_with_its_prefixes() {
        let (_, layout) = Scenario::parse(SCENARIO, "demo").unwrap();
        let text = nodes_manifest(&layout);
        assert_eq!(text.matches("\"kind\": \"Node\"").count(), 3);
        assert_eq!(text.matches("\"sennit.dev.node-restriction.kubernetes.io/site\": \"aws\"").count(), 2);
        assert!(text.contains("10.2.0.0/24") && text.contains("fd00:2::/64"), "{text}");
    }
}
