//! What agents cost the API server: requests are counted by the server itself.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use kube_tests::cluster::Cluster;
use kube_tests::{PATIENCE, programs};
use mesh_agent::registry::kube::{KubeRegistry, api_config};
use mesh_keyring::{NodeName, PrivateKey};
use mesh_overlay::Advertisement;
use netlab::{HostSpec, Lab, LabSpec, SiteSpec};
use serde_json::json;

const AGENTS: usize = 100;

/// Requests for what agents read and write so far, by verb, without those of kubectl's own.
fn requests(cluster: &Cluster) -> BTreeMap<String, u64> {
    let text = cluster.kubectl(&["get", "--raw", "/metrics"]).unwrap();
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
        let field = |name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\""))?;
            rest.split('"').next()
        };
        let (Some(resource), Some(verb)) = (field("resource"), field("verb")) else { continue };
        // The server looks after its own EndpointSlice all the time.
        let its_own = resource == "endpointslices" && !["LIST", "WATCH"].contains(&verb);
        if ["nodes", "meshnodes", "meshes", "endpointslices"].contains(&resource) && !its_own {
            let count: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
            *counts.entry(format!("{verb} {resource}")).or_default() += count as u64;
        }
    }
    counts
}

/// Bytes of watch events that the server has sent, of Nodes and our kinds.
fn watched_bytes(cluster: &Cluster) -> u64 {
    let text = cluster.kubectl(&["get", "--raw", "/metrics"]).unwrap();
    let ours = |line: &&str| line.contains(r#"resource="nodes""#) || line.contains(r#"group="sennit.dev""#);
    let sums = text.lines().filter(|line| line.starts_with("apiserver_watch_events_sizes_sum{")).filter(ours);
    sums.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum()
}

/// Only those that grew.
fn growth(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let grown = |(what, count): (&String, &u64)| {
        let by = count - before.get(what).copied().unwrap_or_default();
        (by > 0).then(|| (what.clone(), by))
    };
    after.iter().filter_map(grown).collect()
}

fn name(n: usize) -> NodeName {
    format!("node-{n}").parse().unwrap()
}

fn claim(n: usize) -> Advertisement {
    let mut key = [7; 32];
    key[1..9].copy_from_slice(&(n as u64).to_le_bytes());
    Advertisement {
        public_key: PrivateKey::from_bytes(&key).unwrap().public(),
        epoch: 1,
        site: "aws".parse().unwrap(),
        endpoints: Vec::new(),
        internal_endpoints: Vec::new(),
        mtu: Some(1500),
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    }
}

fn create(cluster: &Cluster, nodes: impl Iterator<Item = usize>) {
    let node = |n| {
        let cidr = format!("10.{}.{}.0/24", 1 + n / 256, n % 256);
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name(n)},
            "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        })
    };
    let items: Vec<_> = nodes.map(node).collect();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items})).unwrap();
}

/// Waits until every registry holds so many nodes with a key.
async fn until_all_hold(registries: &[KubeRegistry], keys: usize) {
    let all = async {
        loop {
            let holds = |registry: &KubeRegistry| {
                let Ok(snapshot) = registry.read() else { return false };
                snapshot.nodes.iter().filter(|node| !node.annotations.is_empty()).count() == keys
            };
            if registries.iter().all(holds) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, all).await.unwrap();
}

#[test]
fn a_hundred_agents_ask_nothing_at_rest_and_a_join_costs_one_write() {
    if !programs::can_run("a_hundred_agents_ask_nothing_at_rest_and_a_join_costs_one_write") {
        return;
    }
    let lab = Lab::build(&LabSpec::new().site(SiteSpec::new("cluster").host(HostSpec::new("cp")))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let host = lab.host("cp").unwrap();
    let cluster = Cluster::start(host, dir.path()).unwrap();
    cluster.deploy().unwrap();
    create(&cluster, 0..AGENTS);
    let kubeconfig = dir.path().join("admin.kubeconfig");
    host.namespace()
        .run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let started = requests(&cluster);
                let mut registries = Vec::new();
                for _ in 0..AGENTS {
                    let config = api_config(Some(&kubeconfig)).await.unwrap();
                    registries.push(KubeRegistry::new(config, None, &"cost".parse().unwrap()).unwrap());
                }
                until_all_hold(&registries, 0).await;
                for (n, registry) in registries.iter().enumerate() {
                    assert!(registry.publish(&name(n), &claim(n)).await.unwrap(), "written");
                    assert!(!registry.publish(&name(n), &claim(n)).await.unwrap(), "not written again");
                }
                until_all_hold(&registries, AGENTS).await;
                let joined = requests(&cluster);
                println!("{AGENTS} agents start: {:?}", growth(&started, &joined));
                let started = growth(&started, &joined);
                assert_eq!(started["APPLY nodes"], AGENTS as u64);
                assert_eq!(
                    (started["LIST nodes"], started["LIST meshnodes"]),
                    (AGENTS as u64, AGENTS as u64)
                );

                // A label of somebody else's on every node: a hundred events for everybody, and not one request.
                cluster.kubectl(&["label", "nodes", "--all", "color=red"]).unwrap();
                let labelled = requests(&cluster);
                tokio::time::sleep(Duration::from_secs(5)).await;
                let rest = growth(&labelled, &requests(&cluster));
                println!("at rest: {rest:?}");
                assert!(rest.is_empty(), "{rest:?}");

                let before = requests(&cluster);
                let bytes_before = watched_bytes(&cluster);
                create(&cluster, std::iter::once(AGENTS));
                tokio::time::timeout(PATIENCE, async {
                    while registries[0].publish(&name(AGENTS), &claim(AGENTS)).await.is_err() {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                })
                .await
                .unwrap();
                until_all_hold(&registries, AGENTS + 1).await;
                let join = growth(&before, &requests(&cluster));
                let bytes = watched_bytes(&cluster) - bytes_before;
                println!("a join: {join:?}, {bytes} bytes of events to {AGENTS} agents");
                assert!(bytes > 0);
                // One write is the operator's, who creates the Node; kubectl looks at what it has made.
                assert!(join["APPLY nodes"] <= 2 && !join.contains_key("LIST nodes"), "{join:?}");
            });
        })
        .unwrap();
}
