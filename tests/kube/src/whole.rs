//! Two clusters of two whole nodes each, whose nodes have the same names, and two hosts without Kubernetes: everything on them
//! comes from `deploy/examples/kubernetes` and `mesh-agent join`.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use netlab::flow::{self, Flow, FlowSpec};
use netlab::probe::Kind;
use netlab::{Capture, CaptureSpec, HostSpec, IpNet, Lab, LabSpec, Namespace, PodSpec, Process, SiteSpec};
use serde_json::{Value, json};

use crate::cluster::{Bound, Cluster, deployment};
use crate::mesh::MARKER;
use crate::node::{self, Cgroup, Node, TEST_IMAGE};
use crate::{PATIENCE, eventually, images, programs};

/// The clusters: their names, which are those of their sites too.
pub const CLUSTERS: [&str; 2] = ["east", "west"];
const NODES: [&str; 2] = ["node-1", "node-2"];
const BARE: [&str; 2] = ["bare-1", "bare-2"];
const WEB: u16 = 7777;
const WEBS: [&str; 2] = ["web-a", "web-b"];
const COMMAND: Duration = Duration::from_secs(60);

/// Who asks and is asked.
pub struct Pod {
    /// Its name, unique among all.
    pub name: String,
    /// The host that it is on.
    pub host: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    place: Place,
}

enum Place {
    Kubernetes { cluster: usize, name: String },
    Lab(Namespace),
}

/// The whole.
pub struct Whole {
    agents: BTreeMap<String, Process>,
    _servers: Vec<Process>,
    /// Nodes by host.
    pub nodes: BTreeMap<String, Node>,
    /// Clusters in the order of [`CLUSTERS`].
    pub clusters: Vec<Cluster>,
    /// The network.
    pub lab: Lab,
    _cgroups: Vec<Cgroup>,
    dir: tempfile::TempDir,
}

fn say(started: Instant, what: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "whole: {:.1} s: {what}", started.elapsed().as_secs_f64());
}

impl Whole {
    /// Clusters with their nodes ready and test pods running, and nothing of ours.
    ///
    /// # Errors
    /// What does not come up.
    pub fn new() -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut spec = LabSpec::new();
        for cluster in CLUSTERS {
            let hosts = NODES.map(|node| node::furnished(HostSpec::new(host_of(cluster, node))));
            spec = spec.site(hosts.into_iter().fold(SiteSpec::new(cluster), SiteSpec::host));
        }
        let bare = BARE.map(|host| {
            let pods = [1, 2].map(|n| PodSpec::new(format!("{host}-pod-{n}")));
            pods.into_iter().fold(HostSpec::new(host), HostSpec::pod)
        });
        spec = spec.site(bare.into_iter().fold(SiteSpec::new("onprem"), SiteSpec::host));
        let control = CLUSTERS.map(|cluster| HostSpec::new(control_of(cluster)));
        let lab = Lab::build(&spec.site(control.into_iter().fold(SiteSpec::new("control"), SiteSpec::host)))?;
        let dir = tempfile::tempdir()?;
        let images = [images::ours(dir.path(), &images::deployed_name()?)?, images::test_pod(dir.path())?];
        say(started, "lab and images are there");

        let mut whole = Self {
            agents: BTreeMap::new(),
            _servers: Vec::new(),
            nodes: BTreeMap::new(),
            clusters: Vec::new(),
            lab,
            _cgroups: Vec::new(),
            dir,
        };
        for name in CLUSTERS {
            let host = whole.lab.host(&control_of(name))?;
            whole.clusters.push(Cluster::start_whole(host, &whole.dir.path().join(name))?);
            say(started, &format!("control plane {name} is ready"));
        }
        for (n, cluster) in CLUSTERS.iter().enumerate() {
            for name in NODES {
                whole.start_node(n, &host_of(cluster, name), name, &images)?;
            }
        }
        say(started, "containerd, kubelet and kube-proxy are started");
        for (cluster, site) in whole.clusters.iter().zip(CLUSTERS) {
            let args = ["wait", "--for=condition=Ready", "node", "--all", "--timeout=60s"];
            cluster.kubectl_within(&args, PATIENCE * 2).with_context(|| whole.logs())?;
            // The hosts that join stand in another site.
            let site = format!("sennit.dev.node-restriction.kubernetes.io/site={site}");
            cluster.kubectl(&["label", "node", "--all", &site])?;
            for web in WEBS {
                cluster.apply(&web_server(web))?;
            }
        }
        say(started, "nodes are ready");
        whole.serve_in_the_lab()?;
        for (n, cluster) in whole.clusters.iter().enumerate() {
            for web in WEBS {
                cluster.rolled_out("default", web).with_context(|| whole.logs())?;
            }
            say(started, &format!("test pods of {} run", CLUSTERS[n]));
        }
        Ok(whole)
    }

    fn start_node(
        &mut self,
        cluster: usize,
        host: &str,
        name: &str,
        images: &[PathBuf],
    ) -> anyhow::Result<()> {
        let on = self.lab.host(host)?.clone();
        let prefixes: Vec<String> = on.pod_prefixes().iter().map(IpNet::to_string).collect();
        // As a cluster's own allocator would, but the lab has chosen the prefixes already.
        self.clusters[cluster].apply(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": prefixes[0], "podCIDRs": prefixes},
        }))?;
        let (node, cgroup) = Node::start(&on, &self.clusters[cluster], name, images)?;
        self.nodes.insert(host.to_owned(), node);
        self._cgroups.push(cgroup);
        Ok(())
    }

    // The pods of hosts without Kubernetes serve the same page.
    fn serve_in_the_lab(&mut self) -> anyhow::Result<()> {
        let page = self.dir.path().join("www");
        std::fs::create_dir_all(&page)?;
        std::fs::write(page.join("index.html"), MARKER)?;
        for pod in self.lab.pods() {
            let busybox = pod.command(programs::kubernetes("busybox"));
            let serve =
                busybox.args(["httpd", "-f", "-p", &WEB.to_string(), "-h", &page.display().to_string()]);
            self._servers.push(serve.spawn()?);
        }
        Ok(())
    }

    /// Installs what `deploy/examples/kubernetes` holds in each cluster and links them to each other; then joins the hosts
    /// without Kubernetes, one to each cluster, and starts their agents.
    ///
    /// # Errors
    /// What was refused.
    pub fn install(&mut self) -> anyhow::Result<()> {
        for (name, cluster) in CLUSTERS.iter().zip(&self.clusters) {
            let folder = deployment(&format!("examples/kubernetes/{name}"));
            cluster.kubectl(&["apply", "--server-side", "-k", &folder])?;
        }
        for (n, bare) in BARE.iter().enumerate() {
            let other = 1 - n;
            // A token bound to nothing may read and no more.
            let token = eventually("a token", || self.clusters[other].token(Bound::Nothing))?;
            let kubeconfig = self.clusters[other].portable_kubeconfig(&token)?.to_string();
            self.clusters[n].apply(&json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"name": CLUSTERS[other], "namespace": "sennit"},
                "stringData": {"kubeconfig": kubeconfig},
            }))?;
            let grants = self.granted(CLUSTERS[other], BARE[other])?;
            // The host that has joined the other cluster comes through the same link, and stands in a site of its own.
            let link = json!({
                "apiVersion": "sennit.dev/v1alpha1", "kind": "ClusterLink", "metadata": {"name": CLUSTERS[other]},
                "spec": {"kubeconfigSecret": {"name": CLUSTERS[other]}, "podCIDRs": grants},
            });
            eventually("the link is accepted", || self.clusters[n].apply(&link))?;
            self.join(n, bare)?;
        }
        Ok(())
    }

    fn granted(&self, site: &str, bare: &str) -> anyhow::Result<Vec<String>> {
        let hosts = self.lab.hosts().iter().filter(|host| host.site() == site || host.name() == bare);
        Ok(hosts.flat_map(|host| host.pod_prefixes()).map(IpNet::to_string).collect())
    }

    fn join(&mut self, cluster: usize, name: &str) -> anyhow::Result<()> {
        let host = self.lab.host(name)?.clone();
        let admin = self.clusters[cluster].admin();
        let mut join = vec!["join", "--kubeconfig", &admin, "--mesh", "example", "--site", "onprem"];
        join.extend(["--cluster", CLUSTERS[cluster], "--directory", "/run/netlab/private/etc"]);
        let prefixes: Vec<String> = host.pod_prefixes().iter().map(IpNet::to_string).collect();
        join.extend(prefixes.iter().flat_map(|prefix| ["--pod-cidr", prefix]));
        let output = host.command(programs::ours("mesh-agent")).args(join).output(COMMAND)?;
        ensure!(output.success(), "{name}: {}", output.stderr_text());
        let file = host.private_dir().join("etc/agent.yaml");
        let mut config = std::fs::read_to_string(&file)?;
        config += &format!(
            "\nstateDir: /run/netlab/private/state\nwireguard: {{userspaceBinary: {}}}\n",
            programs::ours("mesh-wg").display()
        );
        std::fs::write(&file, config)?;
        let run = host.command(programs::ours("mesh-agent"));
        let run = run.args(["run", "--config", "/run/netlab/private/etc/agent.yaml"]);
        let agent = run.log_to(host.private_dir().join("agent.log")).spawn()?;
        self.agents.insert(name.to_owned(), agent);
        Ok(())
    }

    /// All pods: those of the clusters, and those of hosts without Kubernetes.
    ///
    /// # Errors
    /// When a cluster does not tell.
    pub fn pods(&self) -> anyhow::Result<Vec<Pod>> {
        eventually("all pods have addresses", || {
            let pods = self.list_pods()?;
            let all = CLUSTERS.len() * NODES.len() * WEBS.len() + self.lab.pods().len();
            ensure!(pods.len() == all, "{} of {all} pods", pods.len());
            let without = pods.iter().find(|pod| pod.addresses.len() < 2);
            ensure!(without.is_none(), "{:?}", without.map(|pod| &pod.name));
            Ok(pods)
        })
    }

    fn list_pods(&self) -> anyhow::Result<Vec<Pod>> {
        let mut pods = Vec::new();
        for (n, cluster) in self.clusters.iter().enumerate() {
            let listed: Value = serde_json::from_str(&cluster.kubectl(&["get", "pods", "-o", "json"])?)?;
            for pod in listed["items"].as_array().context("no list")? {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
                pods.push(Pod {
                    name: format!("{}/{name}", CLUSTERS[n]),
                    host: host_of(CLUSTERS[n], pod["spec"]["nodeName"].as_str().unwrap_or_default()),
                    addresses: addresses.filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect(),
                    place: Place::Kubernetes { cluster: n, name: name.to_owned() },
                });
            }
        }
        pods.extend(self.lab.pods().iter().map(|pod| Pod {
            name: pod.name().to_owned(),
            host: pod.host().to_owned(),
            addresses: pod.addresses().to_vec(),
            place: Place::Lab(pod.namespace().clone()),
        }));
        Ok(pods)
    }

    /// Every pod asks every pod of other hosts for its page, over both families. How many answers there were.
    ///
    /// # Errors
    /// Who got no answer.
    pub fn reaches<P: Borrow<Pod> + Sync>(&self, pods: &[P]) -> anyhow::Result<usize> {
        let pods: Vec<&Pod> = pods.iter().map(Borrow::borrow).collect();
        let mut asked = 0;
        let silent = std::thread::scope(|scope| {
            let mut asking = Vec::new();
            for from in &pods {
                let others = pods.iter().filter(|to| to.host != from.host).flat_map(|to| &to.addresses);
                let others: Vec<String> = others.map(ToString::to_string).collect();
                asked += others.len();
                asking.push(scope.spawn(move || self.ask(from, &others)));
            }
            let answers =
                asking.into_iter().map(|one| one.join().unwrap_or_else(|_| anyhow::bail!("panicked")));
            answers.collect::<anyhow::Result<Vec<_>>>()
        })?;
        let silent: Vec<String> = silent.into_iter().flatten().collect();
        ensure!(silent.is_empty(), "{} of {asked} got no answer: {}", silent.len(), silent.join(", "));
        Ok(asked)
    }

    fn ask(&self, from: &Pod, others: &[String]) -> anyhow::Result<Vec<String>> {
        // wget's option for a time limit crashes Debian 12's static busybox.
        let script = format!(
            "for to in {}; do printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 2 $to {WEB} 2>/dev/null | grep -q '{MARKER}' || echo $to; done; echo asked",
            others.join(" ")
        );
        let (said, failed) = match &from.place {
            Place::Kubernetes { cluster, name } => {
                let args = ["exec", name, "--", "sh", "-c", &script];
                let output = self.clusters[*cluster].kubectl_as("admin", &args, "")?;
                (output.stdout_text(), output.stderr_text())
            }
            Place::Lab(namespace) => {
                let busybox = programs::kubernetes("busybox");
                let script = script.replace("| nc", &format!("| {} nc", busybox.display()));
                let output = namespace.command("sh").args(["-c", &script]).output(COMMAND)?;
                (output.stdout_text(), output.stderr_text())
            }
        };
        ensure!(said.ends_with("asked\n"), "{}: {failed}", from.name);
        Ok(said.lines().filter(|line| *line != "asked").map(|to| format!("{} -> {to}", from.name)).collect())
    }

    /// Waits until every pod reaches every other.
    ///
    /// # Errors
    /// Who does not.
    pub fn stands(&self, pods: &[Pod]) -> anyhow::Result<usize> {
        eventually("every pod reaches every other", || self.reaches(pods)).with_context(|| self.logs())
    }

    /// A flow from a pod of a host without Kubernetes to a pod of a cluster's node; the marker is in every packet.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn traffic(&self, pods: &[Pod], from: &str, to: &str, rate: u32) -> anyhow::Result<Flow> {
        let from = self.lab.pod(from)?.namespace().clone();
        let to = pods.iter().find(|pod| pod.host == to).context("no pod on that host")?;
        let to = to.addresses.iter().copied().find(IpAddr::is_ipv4).context("a pod without IPv4")?;
        Ok(flow::start(&from, FlowSpec { to, kind: Kind::Icmp, rate, payload: MARKER.into() })?)
    }

    /// Kills a container of ours on a node; its kubelet starts it anew. The pod stays.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_container(&self, host: &str, container: &str) -> anyhow::Result<()> {
        let node = self.nodes.get(host).context("no such node")?;
        let label = format!("labels.\"io.kubernetes.container.name\"=={container}");
        let listed = node.ctr(&["containers", "ls", "-q", &label])?;
        let id = listed.lines().last().with_context(|| format!("{host} has no container {container}"))?;
        node.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]).map(drop)
    }

    /// Status as a node's agent tells it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self, host: &str) -> anyhow::Result<Value> {
        let on = self.lab.host(host)?;
        let output =
            on.command(programs::ours("mesh-agent")).args(["status", "-o", "json"]).output(COMMAND)?;
        ensure!(output.success(), "{host}: {}", output.stderr_text());
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Captures what crosses the underlay: the link of every host, and of each site to the core.
    ///
    /// # Errors
    /// When a capture cannot be made.
    pub fn watch(&self) -> anyhow::Result<Vec<Capture>> {
        let mut watched = CaptureSpec::new().marker(MARKER);
        for prefix in self.lab.hosts().iter().flat_map(|host| host.pod_prefixes()) {
            watched = watched.watch(*prefix);
        }
        let links = self.lab.sites().iter().map(|site| site.uplink());
        let links = links.chain(self.lab.hosts().iter().map(|host| host.link()));
        links.map(|link| Ok(link.capture(watched.clone())?)).collect()
    }

    /// The ends of all logs.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for (cluster, name) in self.clusters.iter().zip(CLUSTERS) {
            let pods = cluster.kubectl(&["get", "pods", "-A", "-o", "wide"]).unwrap_or_default();
            text += &format!("--- pods of {name}\n{pods}");
            for component in ["agent", "device", "federate", "cleanup"] {
                let label = format!("app.kubernetes.io/component={component}");
                let container = format!("--container={component}");
                let args = ["logs", "-n", "sennit", "--prefix", &container, "--tail=12", "-l", &label];
                text += &cluster.kubectl(&args).unwrap_or_else(|e| format!("{e:#}\n"));
            }
        }
        for node in self.nodes.values() {
            text += &format!("{}\n{}\n", node.log("kubelet"), node.log("containerd"));
        }
        for name in BARE {
            let Ok(host) = self.lab.host(name) else { continue };
            let log = std::fs::read_to_string(host.private_dir().join("agent.log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("--- {name}\n{}\n", lines[lines.len().saturating_sub(12)..].join("\n"));
        }
        text
    }
}

impl Cluster {
    /// Waits until all pods of a DaemonSet run and are ready.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn rolled_out(&self, namespace: &str, daemonset: &str) -> anyhow::Result<()> {
        let name = format!("daemonset/{daemonset}");
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl_within(&["rollout", "status", "-n", namespace, &name, &timeout], PATIENCE * 2).map(drop)
    }
}

/// The host of a node: names of nodes are unique in their cluster only.
pub fn host_of(cluster: &str, node: &str) -> String {
    format!("{cluster}-{node}")
}

fn control_of(cluster: &str) -> String {
    format!("control-{cluster}")
}

// Serves a page that holds the marker, on every node.
fn web_server(name: &str) -> Value {
    let script = format!("mkdir /www; echo '{MARKER}' >/www/index.html; exec httpd -f -p {WEB} -h /www");
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "web", "image": TEST_IMAGE, "command": ["sh", "-c", script]}],
                },
            },
        },
    })
}
