//! Measures a neighbour's changes beside a hostile tenant on one node, over a real API server: `make kube-bench`.
#![allow(clippy::print_stdout, reason = "this is a command")]

use std::time::Duration;

use anyhow::{Context as _, ensure};
use kube_tests::mesh::{As, Mesh};
use kube_tests::{crowd, eventually, programs};
use serde_json::json;

const CHANGES: usize = 100;
const NODE: &str = "aws-1";
const SCRIPT: &str = include_str!("tenant-latency.py");
/// Pods of the tenant on the node.
const PODS: usize = 50;

fn main() -> anyhow::Result<()> {
    ensure!(programs::can_run("tenant-latency"), "it cannot be measured here");
    let changes = std::env::args()
        .nth(1)
        .map_or(Ok(CHANGES), |text| text.parse())
        .context("usage: tenant-latency [CHANGES]")?;
    let mut mesh = Mesh::new(&[("aws", &[(NODE, As::Node), ("aws-2", As::Node)])])?;
    let cluster = mesh.cluster();
    for namespace in ["victim", "hostile"] {
        cluster.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))?;
    }
    let pod = |namespace: &str, name: &str, node: &str| {
        let mut pod = crowd::pod(name, name, node);
        pod["metadata"]["namespace"] = json!(namespace);
        pod
    };
    cluster.apply(&pod("victim", "server", NODE))?;
    cluster.apply(&pod("victim", "client", "aws-2"))?;
    let tenant: Vec<_> = (0..PODS).map(|n| pod("hostile", &format!("pod-{n}"), NODE)).collect();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": tenant}))?;
    cluster.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "client", "namespace": "victim"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
        },
    }))?;
    mesh.start(NODE)?;
    eventually("the agent is ready", || {
        let status = mesh.status(NODE)?;
        ensure!(status["ready"] == true, "{}", status["errors"]);
        Ok(())
    })?;
    let script = mesh.lab.host(NODE)?.command("python3");
    let kubectl = programs::kubernetes("kubectl").display().to_string();
    let arguments = [&kubectl, &mesh.cluster().admin(), &changes.to_string(), &PODS.to_string()];
    let output = script.args(["-"]).args(arguments).stdin(SCRIPT).output(Duration::from_secs(600))?;
    ensure!(output.success(), "{}\n{}", output.stderr_text(), mesh.logs());
    print!("{}", output.stdout_text());
    Ok(())
}
