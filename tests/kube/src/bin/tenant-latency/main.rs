//! Measures a neighbour's changes beside a hostile tenant on one node, over a real API server: `make kube-bench`.
#![allow(clippy::print_stdout, reason = "this is a command")]

mod flood;

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use flood::Flood;
use kube_tests::mesh::{As, Mesh};
use kube_tests::{crowd, eventually, programs};
use serde_json::{Value, json};

const CHANGES: usize = 100;
const NODE: &str = "aws-1";
const SCRIPT: &str = include_str!("tenant.py");
/// Pods of each of the tenant's namespaces on the node.
const PODS: u8 = 50;
/// The last number of the address of the first pod of namespace `hostile`, and of `flooder`.
const FIRST: [u8; 2] = [100, 150];
/// The phases of the tenant's load: writing objects, resolving names, or both.
const PHASES: [(&str, bool, bool); 3] =
    [("policies and labels", true, false), ("DNS flood", false, true), ("all together", true, true)];

fn main() -> anyhow::Result<()> {
    ensure!(programs::can_run("tenant-latency"), "it cannot be measured here");
    let changes = std::env::args()
        .nth(1)
        .map_or(Ok(CHANGES), |text| text.parse())
        .context("usage: tenant-latency [CHANGES [PHASE]]")?;
    let only = std::env::args().nth(2);
    let mut mesh = Mesh::new(&[("aws", &[(NODE, As::Node), ("aws-2", As::Node)])])?;
    let askers = addresses(&mesh, FIRST[1])?;
    objects(&mesh)?;
    wire(&mesh, &askers)?;
    mesh.start(NODE)?;
    eventually("the agent is ready, with all policies", || {
        let status = mesh.status(NODE)?;
        ensure!(status["ready"] == true, "{}", status["errors"]);
        ensure!(status["policy"]["policies"].as_u64() >= Some(DOMAIN_POLICIES), "{}", status["policy"]);
        Ok(())
    })?;
    let kubectl = programs::kubernetes("kubectl").display().to_string();
    let (asking, _) = mesh.pod(&format!("{NODE}-pod-1"))?;
    let (resolver, at) = mesh.pod(&format!("{NODE}-pod-2"))?;
    let run = |does: &str| {
        let script = mesh.lab.host(NODE)?.command("python3");
        let arguments = [
            kubectl.as_str(),
            &mesh.cluster().admin(),
            &changes.to_string(),
            &PODS.to_string(),
            &at.to_string(),
            does,
        ];
        let output = script.args(["-"]).args(arguments).stdin(SCRIPT).output(Duration::from_secs(600))?;
        ensure!(output.success(), "{does}: {}\n{}", output.stderr_text(), mesh.logs());
        anyhow::Ok(output.stdout_text())
    };
    run("begins")?;
    let phases = PHASES.into_iter().filter(|(name, ..)| only.as_deref().is_none_or(|only| only == *name));
    for (name, writes, answers) in phases {
        let flood = answers.then(|| Flood::start((&asking, askers.clone()), (&resolver, at))).transpose()?;
        let text = run(if writes { "writes" } else { "nothing" }).context(name)?;
        let told = flood.as_ref().map_or(String::new(), |flood| {
            format!(", {:.0} DNS answers a second with {} addresses", flood.rate(), flood::ADDRESSES)
        });
        print!("{name}{told}: {text}");
    }
    Ok(())
}

/// Policies that speak of names, and the one behind them that denies the rest.
const DOMAIN_POLICIES: u64 = flood::DOMAINS as u64 + 1;

fn addresses(mesh: &Mesh, first: u8) -> anyhow::Result<Vec<IpAddr>> {
    let (_, pod) = mesh.pod(&format!("{NODE}-pod-1"))?;
    let IpAddr::V4(pod) = pod else { anyhow::bail!("a pod's address is not IPv4") };
    let [a, b, c, _] = pod.octets();
    Ok((first..first + PODS).map(|last| [a, b, c, last].into()).collect())
}

/// Creates the pods, without addresses but for those of the flood, and the policies.
fn objects(mesh: &Mesh) -> anyhow::Result<()> {
    let cluster = mesh.cluster();
    cluster.serve_cluster_policies()?;
    for namespace in ["victim", "hostile", "flooder"] {
        cluster.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))?;
    }
    let pod = |namespace: &str, name: &str, node: &str| {
        let mut pod = crowd::pod(name, name, node);
        pod["metadata"]["namespace"] = json!(namespace);
        pod
    };
    cluster.apply(&pod("victim", "server", NODE))?;
    cluster.apply(&pod("victim", "client", "aws-2"))?;
    let mut resolver = pod("kube-system", "dns", NODE);
    resolver["metadata"]["labels"] = json!({"k8s-app": "kube-dns"});
    cluster.apply(&resolver)?;
    let of = |namespace: &'static str| (0..PODS).map(move |n| pod(namespace, &format!("pod-{n}"), NODE));
    let tenant: Vec<Value> = of("hostile").chain(of("flooder")).collect();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": tenant}))?;
    cluster.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "client", "namespace": "victim"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
        },
    }))?;
    let subject = json!({"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": "flooder"}}});
    let policy = |priority: u32, rule: Value| {
        json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
            "metadata": {"name": format!("names-{priority}")},
            "spec": {"tier": "Admin", "priority": priority, "subject": subject, "egress": [rule]},
        })
    };
    let names = (0..flood::DOMAINS)
        .map(|n| policy(n, json!({"action": "Accept", "to": [{"domainNames": [flood::domain(n)]}]})));
    let rest = json!({"action": "Deny", "to": [{"networks": ["11.0.0.0/8"]}]});
    let all: Vec<Value> = names.chain([policy(flood::DOMAINS, rest)]).collect();
    for some in all.chunks(250) {
        cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": some}))?;
    }
    Ok(())
}

/// Gives the node's first pod the addresses of all pods that ask.
fn wire(mesh: &Mesh, askers: &[IpAddr]) -> anyhow::Result<()> {
    let (pod, host) = (mesh.lab.pod(&format!("{NODE}-pod-1"))?, mesh.lab.host(NODE)?);
    let (_, port) = pod.link().outer_end();
    let each = |line: fn(&IpAddr, &str) -> String| askers.iter().map(|a| line(a, port)).collect::<String>();
    pod.namespace().ip(&each(|address, _| format!("addr add {address}/32 dev eth0\n")))?;
    host.namespace().ip(&each(|address, port| format!("route add {address} dev {port}\n")))?;
    Ok(())
}
