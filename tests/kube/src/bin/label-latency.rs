//! How long a pod's label takes from the API server to another node's kernel, with 20,000 pods: `make kube-bench`.
#![allow(clippy::print_stdout, reason = "this is a command")]

use std::time::Duration;

use anyhow::{Context as _, ensure};
use kube_tests::mesh::{As, Mesh};
use kube_tests::{crowd, eventually, programs};
use serde_json::json;

const CHANGES: usize = 200;
const NODE: &str = "aws-1";
const SCRIPT: &str = include_str!("label-latency.py");

fn main() -> anyhow::Result<()> {
    ensure!(programs::can_run("label-latency"), "it cannot be measured here");
    let changes = std::env::args()
        .nth(1)
        .map_or(Ok(CHANGES), |text| text.parse())
        .context("usage: label-latency [CHANGES]")?;
    let mut mesh = Mesh::new(&[("aws", &[(NODE, As::Node)])])?;
    let cluster = mesh.cluster();
    crowd::fill(cluster)?;
    cluster.apply(&crowd::pod("server", "server", NODE))?;
    cluster.apply(&crowd::pod("client", "client", "stranger-0"))?;
    let from = |name: &str, labels: serde_json::Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}},
                "ingress": [{"from": [{"podSelector": {"matchLabels": labels}}]}],
            },
        })
    };
    cluster.apply(&from("client", json!({"app": "client"})))?;
    cluster.apply(&from("all", json!({"tier": "web"})))?;
    mesh.start(NODE)?;
    eventually("all pods are known", || {
        let status = mesh.status(NODE)?;
        let pods = status["policy"]["pods"].as_u64().unwrap_or_default();
        ensure!(pods >= u64::from(crowd::PODS) && status["ready"] == true, "{}", status["policy"]);
        Ok(())
    })?;
    let script = mesh.lab.host(NODE)?.command("python3");
    let kubectl = programs::kubernetes("kubectl").display().to_string();
    let output = script
        .args(["-", &kubectl, &mesh.cluster().admin(), &changes.to_string(), &crowd::PODS.to_string()])
        .stdin(SCRIPT)
        .output(Duration::from_secs(600))?;
    ensure!(output.success(), "{}\n{}", output.stderr_text(), mesh.logs());
    print!("{}", output.stdout_text());
    Ok(())
}
