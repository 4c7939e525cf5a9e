//! What a large cluster costs one agent.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::crowd::{self, NODES, PODS};
use kube_tests::mesh::{As, Mesh};
use kube_tests::{eventually, programs};
use serde_json::Value;

/// KiB that each of the two programs may take. The agent took 81,100 unoptimised: budgets, claims and what is guarded are kept
/// for each node and pod, and policy has a thread with an arena of its own.
const BOUND: u64 = 104 * 1024;

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
    crowd::fill(mesh.cluster()).unwrap();
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
