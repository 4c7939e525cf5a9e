//! What a large cluster costs one agent.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::mesh::{As, Mesh};
use kube_tests::{eventually, programs};
use mesh_keyring::PrivateKey;
use serde_json::{Value, json};

const NODES: u32 = 1000;
const PODS: u32 = 20_000;
/// KiB that each of the two programs may take: more than twice what they take.
const BOUND: u64 = 64 * 1024;

fn node(n: u32) -> Value {
    let mut secret = [9; 32];
    secret[1..5].copy_from_slice(&n.to_le_bytes());
    let cidr = format!("10.{}.{}.{}/26", 100 + n / 1024, (n / 4) % 256, (n % 4) * 64);
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("stranger-{n}"), "annotations": {
            "sennit.dev/public-key": PrivateKey::from_bytes(&secret).unwrap().public().to_string(),
            "sennit.dev/epoch": "1", "sennit.dev/site": "far",
        }},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
    })
}

fn pod(n: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{n}"), "namespace": "default",
            "labels": {"app": format!("app-{}", n % 200), "tier": "web", "version": "v1"},
        },
        "spec": {
            "nodeName": format!("stranger-{}", n % NODES), "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "registry.example/app:1", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
    })
}

fn apply(mesh: &Mesh, items: impl Iterator<Item = Value>) {
    let items: Vec<Value> = items.collect();
    mesh.cluster().apply(&json!({"apiVersion": "v1", "kind": "List", "items": items})).unwrap();
}

/// KiB of memory of a program on the node under test.
fn resident(mesh: &Mesh, program: &str) -> u64 {
    let script = format!("awk '/VmRSS/ {{print $2}}' /proc/$(pgrep -x {program} | head -n 1)/status");
    let host = mesh.lab.host("aws-1").unwrap();
    let output = host.command("sh").args(["-c", &script]).output(Duration::from_secs(20)).unwrap();
    output.stdout_text().trim().parse().unwrap()
}

#[test]
fn a_thousand_nodes_and_twenty_thousand_pods_cost_an_agent_little() {
    if !programs::can_run("a_thousand_nodes_and_twenty_thousand_pods_cost_an_agent_little") {
        return;
    }
    let mut mesh = Mesh::new(&[("aws", &[("aws-1", As::Node)])]).unwrap();
    for first in (0..NODES).step_by(250) {
        apply(&mesh, (first..first + 250).map(node));
    }
    // One kubectl after the other leaves the server idle half of the time.
    std::thread::scope(|scope| {
        for quarter in 0..4 {
            let mesh = &mesh;
            scope.spawn(move || {
                let pods = PODS / 4;
                for first in (quarter * pods..(quarter + 1) * pods).step_by(200) {
                    apply(mesh, (first..first + 200).map(pod));
                }
            });
        }
    });
    mesh.start("aws-1").unwrap();
    eventually("all nodes are peers", || {
        let status = mesh.status("aws-1")?;
        let held = |peer: &&Value| peer["state"] != "missing";
        let peers = status["peers"].as_array().map_or(0, |peers| peers.iter().filter(held).count());
        anyhow::ensure!(peers == NODES as usize && status["ready"] == true, "{peers} peers");
        Ok(())
    })
    .unwrap();
    let (agent, device) = (resident(&mesh, "mesh-agent"), resident(&mesh, "mesh-wg"));
    println!(
        "with {NODES} Nodes and {PODS} Pods: mesh-agent {} MiB, mesh-wg {} MiB",
        agent / 1024,
        device / 1024
    );
    assert!(agent < BOUND && device < BOUND, "{agent} and {device} KiB");
}
