//! One cluster, and hosts around it whose agents register with its API.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use netlab::flow::{self, Flow, FlowSpec};
use netlab::probe::{Echo, Kind, Probe};
use netlab::{
    Capture, CaptureSpec, Host, HostSpec, IpNet, Lab, LabSpec, Namespace, PodSpec, Process, SiteSpec,
};
use serde_json::{Value, json};

use crate::cluster::{Bound, Cluster};
use crate::{eventually, programs};

/// In every packet that pods send.
pub const MARKER: &str = "a pod said this";
/// The port on which pods answer.
pub const ECHO: u16 = 7777;

const CONTROL_PLANE: &str = "cluster";
const CONFIG: &str = "/run/netlab/private/agent.yaml";
const SOCKET: &str = "/run/sennit/agent.sock";
const WIREGUARD: u16 = 51820;
const ASKING: Duration = Duration::from_secs(60);

/// How a node is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    /// A Node to which the cluster grants prefixes.
    Node,
    /// A Node without prefixes, and a MeshNode that grants them.
    Granted,
    /// A MeshNode alone: a host without Kubernetes.
    MeshNode,
    /// Not at all yet.
    Unknown,
}

/// A node: its host in the lab, its name in its cluster, and how it is registered there.
#[derive(Clone, Debug)]
struct Member {
    name: String,
    kind: As,
    cluster: usize,
}

/// A mesh with its clusters.
pub struct Mesh {
    /// The network.
    pub lab: Lab,
    clusters: Vec<(Option<String>, Cluster)>,
    // By host.
    nodes: BTreeMap<String, Member>,
    agents: BTreeMap<String, Process>,
    /// Agents find out themselves where they are dialled, and at which port; set before they are configured.
    pub derived: bool,
    _echo: Echo,
    _dir: tempfile::TempDir,
}

impl Mesh {
    /// A mesh of one cluster: sites and their nodes, two pods each. The cluster has what `deploy/` holds, and the nodes are
    /// registered. No agent runs yet.
    ///
    /// # Errors
    /// What does not come up.
    pub fn new(sites: &[(&str, &[(&str, As)])]) -> anyhow::Result<Self> {
        let all = sites
            .iter()
            .flat_map(|(site, nodes)| nodes.iter().map(move |(node, kind)| (*site, *node, *node, *kind)));
        Self::build(
            &[None],
            &all.map(|(site, host, name, kind)| (0, site, host, name, kind)).collect::<Vec<_>>(),
        )
    }

    /// A mesh of several clusters, each a site of its own name: for each the hosts, with their names in the cluster.
    ///
    /// # Errors
    /// What does not come up.
    pub fn federated(clusters: &[(&str, &[(&str, &str)])]) -> anyhow::Result<Self> {
        let names: Vec<Option<&str>> = clusters.iter().map(|(name, _)| Some(*name)).collect();
        let mut all = Vec::new();
        for (n, (cluster, nodes)) in clusters.iter().enumerate() {
            all.extend(nodes.iter().map(|(host, name)| (n, *cluster, *host, *name, As::Node)));
        }
        Self::build(&names, &all)
    }

    fn build(clusters: &[Option<&str>], nodes: &[(usize, &str, &str, &str, As)]) -> anyhow::Result<Self> {
        let mut sites: BTreeMap<&str, SiteSpec> = BTreeMap::new();
        for (_, site, host, ..) in nodes {
            let spec = sites.remove(site).unwrap_or_else(|| SiteSpec::new(*site));
            let pods = [1, 2].map(|n| PodSpec::new(format!("{host}-pod-{n}")));
            sites.insert(site, spec.host(pods.into_iter().fold(HostSpec::new(*host), HostSpec::pod)));
        }
        let control = |n: usize| format!("{CONTROL_PLANE}-{}", n + 1);
        let home = (0..clusters.len())
            .fold(SiteSpec::new("control"), |site, n| site.host(HostSpec::new(control(n))));
        let lab = Lab::build(&sites.into_values().fold(LabSpec::new(), LabSpec::site).site(home))?;
        let dir = tempfile::tempdir()?;
        let mut started = Vec::new();
        for (n, name) in clusters.iter().enumerate() {
            let cluster = Cluster::start(lab.host(&control(n))?, &dir.path().join(control(n)))?;
            cluster.deploy()?;
            started.push((name.map(str::to_owned), cluster));
        }
        let members = nodes.iter().map(|(cluster, _, host, name, kind)| {
            ((*host).to_owned(), Member { name: (*name).to_owned(), kind: *kind, cluster: *cluster })
        });
        let echo = Echo::serve(lab.pods().iter().map(|pod| pod.namespace()), ECHO)?;
        let mesh = Self {
            lab,
            clusters: started,
            nodes: members.collect(),
            agents: BTreeMap::new(),
            derived: false,
            _echo: echo,
            _dir: dir,
        };
        for host in mesh.nodes.keys() {
            mesh.register(host)?;
        }
        Ok(mesh)
    }

    /// The cluster, of a mesh that has one; the first of several.
    pub fn cluster(&self) -> &Cluster {
        &self.clusters[0].1
    }

    /// The same, for starting and stopping its API.
    pub fn cluster_mut(&mut self) -> &mut Cluster {
        &mut self.clusters[0].1
    }

    /// A cluster by name.
    ///
    /// # Panics
    /// When there is none of this name.
    pub fn cluster_named(&mut self, name: &str) -> &mut Cluster {
        let found = self.clusters.iter_mut().find(|(known, _)| known.as_deref() == Some(name));
        &mut found.expect("a cluster of this name").1
    }

    fn member(&self, host: &str) -> anyhow::Result<(&Member, Option<&str>, &Cluster)> {
        let member = self.nodes.get(host).context("no such node")?;
        let (name, cluster) = &self.clusters[member.cluster];
        Ok((member, name.as_deref(), cluster))
    }

    /// The names of all nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    fn host(&self, node: &str) -> anyhow::Result<&Host> {
        Ok(self.lab.host(node)?)
    }

    /// Creates a node's objects.
    ///
    /// # Errors
    /// What the API server said.
    pub fn register(&self, node: &str) -> anyhow::Result<()> {
        let host = self.host(node)?;
        let prefixes: Vec<String> = host.pod_prefixes().iter().map(IpNet::to_string).collect();
        let (member, _, cluster) = self.member(node)?;
        let (kind, node) = (member.kind, &member.name);
        if kind == As::Unknown {
            return Ok(());
        }
        if kind != As::MeshNode {
            let spec = if kind == As::Node {
                json!({"podCIDR": prefixes[0], "podCIDRs": prefixes})
            } else {
                json!({})
            };
            cluster.apply(&json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node, "labels": {"sennit.dev.node-restriction.kubernetes.io/site": host.site(), "kubernetes.io/os": "linux"}},
                "spec": spec,
            }))?;
        }
        if kind != As::Node {
            cluster.apply(&json!({
                "apiVersion": "sennit.dev/v1alpha1",
                "kind": "MeshNode",
                "metadata": {"name": node},
                "spec": {"site": host.site(), "podCIDRs": prefixes},
            }))?;
        }
        if kind == As::MeshNode {
            cluster.apply(&json!({
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": format!("host-{node}"), "namespace": "sennit"},
            }))?;
        }
        Ok(())
    }

    /// A kubeconfig file with the token that a pod of the node, or the host, would have.
    ///
    /// # Errors
    /// What the API server said.
    pub fn credentials(&self, node: &str) -> anyhow::Result<PathBuf> {
        let (member, _, cluster) = self.member(node)?;
        let token = match member.kind {
            As::MeshNode => cluster.token_of(&format!("host-{}", member.name), Bound::Nothing)?,
            _ => cluster.token(Bound::Node(&member.name))?,
        };
        cluster.kubeconfig(node, &token)
    }

    /// Starts a node's agent.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn start(&mut self, node: &str) -> anyhow::Result<()> {
        let kubeconfig = self.credentials(node)?;
        self.start_with(node, &kubeconfig)
    }

    /// Starts the agents of these nodes, and waits until each has a handshake with each other.
    ///
    /// # Errors
    /// What does not start, or who has none.
    pub fn start_all(&mut self, nodes: &[&str]) -> anyhow::Result<()> {
        for node in nodes {
            self.start(node)?;
        }
        self.stands(nodes)
    }

    /// Starts a node's agent with these credentials.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn start_with(&mut self, node: &str, kubeconfig: &Path) -> anyhow::Result<()> {
        self.configure(node, kubeconfig)?;
        self.restart(node)
    }

    /// Writes a node's configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, node: &str, kubeconfig: &Path) -> anyhow::Result<()> {
        let host = self.host(node)?;
        let (member, cluster, _) = self.member(node)?;
        let address = host.addresses().iter().find(|a| a.is_ipv4()).context("no IPv4 address")?;
        let endpoints = [format!("{address}:{WIREGUARD}")];
        let config = json!({
            "node": member.name,
            "site": host.site(),
            "mesh": "kube-test",
            "stateDir": "/run/netlab/private/state",
            "registry": {"kube": {"kubeconfig": kubeconfig, "cluster": cluster}},
            "wireguard": {"listenPort": if self.derived { Value::Null } else { json!(WIREGUARD) }, "backend": "userspace", "userspaceBinary": programs::ours("mesh-wg")},
            "underlay": if self.derived { json!({}) } else { json!({"endpoints": endpoints, "internalEndpoints": endpoints}) },
            // Pods of these labs have no kubelet, and no objects.
            "policy": {"unknown": "allow"},
            "log": "debug",
        });
        Ok(std::fs::write(host.private_dir().join("agent.yaml"), config.to_string())?)
    }

    /// Starts a node's agent with the configuration that is there.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn restart(&mut self, node: &str) -> anyhow::Result<()> {
        self.run(node, &[])
    }

    /// The same with clocks that are wrong, such as "+5h": the agent's, and its device's if it makes one.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn restart_at(&mut self, node: &str, offset: &str) -> anyhow::Result<()> {
        let library = programs::kubernetes("libfaketimeMT.so.1").display().to_string();
        let environment =
            [("LD_PRELOAD", library.as_str()), ("FAKETIME", offset), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
        self.run(node, &environment)
    }

    /// The same with more in its environment.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn restart_with(&mut self, node: &str, environment: &[(&str, &str)]) -> anyhow::Result<()> {
        self.run(node, environment)
    }

    /// Reports whether a node's agent runs.
    pub fn runs(&self, node: &str) -> bool {
        self.agents.get(node).is_some_and(|agent| agent.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// The same with a clock that [`Mesh::set_clock`] sets while they run.
    ///
    /// # Errors
    /// Fails if the agent cannot be started.
    pub fn restart_with_a_clock(&mut self, node: &str) -> anyhow::Result<()> {
        self.set_clock(node, "+0s")?;
        let library = programs::kubernetes("libfaketimeMT.so.1").display().to_string();
        let file = self.host(node)?.private_dir().join("clock").display().to_string();
        let environment = [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", file.as_str()),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ];
        self.run(node, &environment)
    }

    /// Sets that clock, to an offset such as "+1h".
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn set_clock(&self, node: &str, offset: &str) -> anyhow::Result<()> {
        let dir = self.host(node)?.private_dir();
        std::fs::write(dir.join("clock.next"), offset)?;
        Ok(std::fs::rename(dir.join("clock.next"), dir.join("clock"))?)
    }

    /// Makes one host the copy of another: its state and its configuration, but for its own address.
    ///
    /// # Errors
    /// Fails if a file cannot be copied.
    pub fn copy(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let (original, copy) = (self.host(from)?.private_dir(), self.host(to)?.private_dir());
        let state = copy.join("state");
        if state.exists() {
            std::fs::remove_dir_all(&state)?;
        }
        let done =
            std::process::Command::new("cp").arg("-a").arg(original.join("state")).arg(&state).status()?;
        ensure!(done.success(), "cp: {done}");
        self.configure(to, &self.credentials(from)?)?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(copy.join("agent.yaml"))?)?;
        config["node"] = json!(self.member(from)?.0.name);
        Ok(std::fs::write(copy.join("agent.yaml"), config.to_string())?)
    }

    fn run(&mut self, node: &str, environment: &[(&str, &str)]) -> anyhow::Result<()> {
        let host = self.host(node)?;
        let log = host.private_dir().join("agent.log");
        let command = host.command(programs::ours("mesh-agent")).args(["run", "--config", CONFIG]);
        let command = environment.iter().fold(command, |command, (key, value)| command.env(key, value));
        let process = command.log_to(log).spawn()?;
        self.agents.insert(node.to_owned(), process);
        Ok(())
    }

    /// Kills a node's agent.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&mut self, node: &str) -> anyhow::Result<()> {
        let agent = self.agents.remove(node).context("no agent runs")?;
        agent.kill()?;
        ensure!(agent.wait(ASKING)?.is_some(), "the agent of {node} does not end");
        Ok(())
    }

    /// What a command of the agent's program prints on a node.
    ///
    /// # Errors
    /// What it said.
    pub fn agent(&self, node: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self
            .host(node)?
            .command(programs::ours("mesh-agent"))
            .args(args.iter().copied())
            .output(ASKING)?;
        ensure!(output.success(), "{node}: {args:?}: {}", output.stderr_text());
        Ok(output.stdout_text())
    }

    /// A node's status.
    ///
    /// # Errors
    /// When its agent does not answer.
    pub fn status(&self, node: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.agent(node, &["status", "-o", "json", "--socket", SOCKET])?)?)
    }

    /// Waits until each of these nodes is ready and has a handshake with each other of them, and with nobody else.
    ///
    /// # Errors
    /// Who has none, with the logs.
    pub fn stands(&self, nodes: &[&str]) -> anyhow::Result<()> {
        let stood = eventually("a handshake between all nodes", || {
            for node in nodes {
                let status = self.status(node)?;
                ensure!(status["ready"] == true, "{node} is not ready: {}", status["errors"]);
                let peers = status["peers"].as_array().context("no peers")?;
                ensure!(peers.len() + 1 == nodes.len(), "{node} has {} peers", peers.len());
                for peer in peers {
                    ensure!(peer["state"] == "established", "{node} -> {}: {}", peer["name"], peer["state"]);
                }
            }
            Ok(())
        });
        stood.with_context(|| self.logs())
    }

    /// Every pod of these nodes asks every pod of the others, over both families. Who gets no answer is named.
    ///
    /// # Errors
    /// The pairs without.
    pub fn reaches(&self, nodes: &[&str]) -> anyhow::Result<usize> {
        let pods: Vec<_> = self.lab.pods().iter().filter(|pod| nodes.contains(&pod.host())).collect();
        let mut asked = Vec::new();
        for from in &pods {
            for to in pods.iter().filter(|to| to.host() != from.host()) {
                for address in to.addresses() {
                    let probe = Probe::new(from.namespace(), *address, Kind::Udp(ECHO)).payload(MARKER);
                    asked.push((format!("{} -> {address}", from.name()), probe));
                }
            }
        }
        let probes: Vec<Probe> = asked.iter().map(|(_, probe)| probe.clone()).collect();
        let answers = netlab::probe::batch(&probes);
        let silent: Vec<&str> = asked
            .iter()
            .zip(&answers)
            .filter(|(_, answer)| answer.is_err())
            .map(|((pair, _), _)| pair.as_str())
            .collect();
        ensure!(silent.is_empty(), "no answer: {}\n{}", silent.join(", "), self.logs());
        Ok(asked.len())
    }

    /// A pod's namespace, and its IPv4 address.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> anyhow::Result<(Namespace, IpAddr)> {
        let pod = self.lab.pod(name)?;
        let address = pod.addresses().iter().copied().find(IpAddr::is_ipv4).context("a pod without IPv4")?;
        Ok((pod.namespace().clone(), address))
    }

    /// A flow of 200 packets a second from pod to pod, each with [`MARKER`] in it.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn traffic(&self, from: &str, to: &str) -> anyhow::Result<Flow> {
        let ((from, _), (_, to)) = (self.pod(from)?, self.pod(to)?);
        Ok(flow::start(&from, FlowSpec { to, kind: Kind::Icmp, rate: 200, payload: MARKER.into() })?)
    }

    /// Captures what crosses the underlay: the link of each site to the core.
    ///
    /// # Errors
    /// When a capture cannot be made.
    pub fn watch(&self) -> anyhow::Result<Vec<Capture>> {
        let mut watched = CaptureSpec::new().marker(MARKER);
        for host in self.lab.hosts() {
            for prefix in host.pod_prefixes() {
                watched = watched.watch(*prefix);
            }
        }
        let sites = self.lab.sites().iter();
        sites.map(|site| Ok(site.uplink().capture(watched.clone())?)).collect()
    }

    /// The ends of all agents' logs.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for node in self.nodes() {
            let Ok(host) = self.host(node) else { continue };
            let log = std::fs::read_to_string(host.private_dir().join("agent.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("--- {node}\n{}\n", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
        text
    }
}

/// Ends a flow, which must have lost nothing.
///
/// # Errors
/// What it lost.
pub fn lossless(flow: Flow) -> anyhow::Result<()> {
    let report = flow.stop(Duration::from_secs(2))?;
    ensure!(report.sent > 20 && report.lost == 0, "{report:?}");
    Ok(())
}
