//! A large cluster, of which nothing runs: a thousand nodes and their pods.

use mesh_keyring::PrivateKey;
use serde_json::{Value, json};

use crate::cluster::Cluster;

/// How many nodes.
pub const NODES: u32 = 1000;
/// How many pods.
pub const PODS: u32 = 20_000;

fn node(n: u32) -> anyhow::Result<Value> {
    let mut secret = [9; 32];
    secret[1..5].copy_from_slice(&n.to_le_bytes());
    let cidr = format!("10.{}.{}.{}/26", 100 + n / 1024, (n / 4) % 256, (n % 4) * 64);
    Ok(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("stranger-{n}"), "labels": {"sennit.dev.node-restriction.kubernetes.io/site": "far"}, "annotations": {
            "sennit.dev/public-key": PrivateKey::from_bytes(&secret)?.public().to_string(),
            "sennit.dev/epoch": "1", "sennit.dev/site": "far",
        }},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
    }))
}

/// A pod of namespace `default`.
pub fn pod(name: &str, app: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "default", "labels": {"app": app, "tier": "web", "version": "v1"},
        },
        "spec": {
            "nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "registry.example/app:1", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
    })
}

fn apply(cluster: &Cluster, items: Vec<Value>) -> anyhow::Result<()> {
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}))
}

/// Makes all nodes, and all pods, without addresses, as `pod-0` and so on.
///
/// # Errors
/// What the API server said.
pub fn fill(cluster: &Cluster) -> anyhow::Result<()> {
    for first in (0..NODES).step_by(250) {
        apply(cluster, (first..first + 250).map(node).collect::<anyhow::Result<_>>()?)?;
    }
    let one =
        |n: u32| pod(&format!("pod-{n}"), &format!("app-{}", n % 200), &format!("stranger-{}", n % NODES));
    // One kubectl after the other leaves the server idle half of the time.
    std::thread::scope(|scope| {
        let quarters: Vec<_> = (0..4)
            .map(|quarter| {
                scope.spawn(move || {
                    let pods = PODS / 4;
                    (quarter * pods..(quarter + 1) * pods)
                        .step_by(200)
                        .try_for_each(|first| apply(cluster, (first..first + 200).map(one).collect()))
                })
            })
            .collect();
        quarters.into_iter().try_for_each(|quarter| {
            quarter.join().map_err(|_| anyhow::anyhow!("a thread that makes pods has panicked"))?
        })
    })
}
