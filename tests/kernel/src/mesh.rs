//! Three nodes of one mesh: two in namespaces with `mesh-wg`, one in the guest with the kernel's WireGuard.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use netlab::flow::{Flow, FlowSpec};
use netlab::probe::Kind;
use netlab::{
    Capture, CaptureSpec, Host, HostSpec, IpNet, Lab, LabSpec, Namespace, PodSpec, Process, SiteSpec,
};
use serde_json::{Value, json};

use crate::guest::{Guest, Image};
use crate::transfer::MARKER;

/// The node in the guest, and its site.
pub const GUEST: (&str, &str) = ("kernel-1", "kernel");
/// The nodes outside, and their sites.
pub const OUTSIDE: [(&str, &str); 2] = [("east-1", "east"), ("west-1", "west")];
/// The mesh interface of every node.
pub const INTERFACE: &str = "sennit0";
/// The guest's interface outside of it.
pub const TAP: &str = "tap0";
/// The pod's address in the guest.
pub const GUEST_POD: Ipv4Addr = Ipv4Addr::new(10, 3, 1, 10);
/// The guest's address on the underlay.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 16, 3, 10);
/// Where the guest keeps the registry.
pub const GUEST_REGISTRY: &str = "/etc/sennit/registry";
/// The guest's configuration.
pub const GUEST_CONFIG: &str = "/etc/sennit/agent.yaml";
/// What the mesh as a whole may take for anything; emulation is slow.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Requests a second of the flow that runs beside everything.
pub const LONG_FLOW_RATE: u32 = 20;

const PORT: u16 = 51820;
const OUTSIDE_CONFIG: &str = "/run/netlab/private/agent.yaml";
const OUTSIDE_REGISTRY: &str = "/run/netlab/shared/registry";
const PUBLISHED: &str = "published";

/// The mesh, up and with a handshake between all.
pub struct Mesh {
    /// The network, and what runs in it.
    pub lab: Lab,
    /// The emulated machine.
    pub guest: Guest,
    /// All that crosses the guest's interface, from before its agent started.
    pub capture: Capture,
    /// Echo requests from the pod of west-1 to the guest's, since the mesh stood.
    pub long_flow: Option<Flow>,
    /// When the kernel's session with west-1 began, seconds since 1970.
    pub first_handshake: u64,
    agent: PathBuf,
    copied: BTreeMap<&'static str, String>,
    _agents: Vec<Process>,
    _dir: tempfile::TempDir,
}

/// Waits for a condition, at most [`PATIENCE`].
///
/// # Errors
/// What the condition said last.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match condition() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= until => {
                return Err(error.context(format!("not within {} s: {what}", PATIENCE.as_secs())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn nodes() -> impl Iterator<Item = (usize, (&'static str, &'static str))> {
    OUTSIDE.into_iter().chain([GUEST]).enumerate().map(|(i, node)| (i + 1, node))
}

fn manifests() -> String {
    nodes().fold(String::new(), |text, (n, (name, site))| {
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"sennit.dev.node-restriction.kubernetes.io/site": site}},
            "spec": {"podCIDRs": [format!("10.{n}.1.0/24"), format!("fd00:{n}:0:1::/64")]},
        });
        text + &format!("---\n{node}\n")
    })
}

fn config(n: usize, (name, site): (&str, &str), device: &Path) -> String {
    let inside = name == GUEST.0;
    let sites = nodes().map(|(n, (_, site))| {
        json!({"name": site, "prefixes": [format!("10.{n}.0.0/16"), format!("fd00:{n}::/48")]})
    });
    let endpoints = [format!("172.16.{n}.10:{PORT}")];
    let config = json!({
        "node": name,
        "site": site,
        "mesh": "kernel-test",
        "stateDir": if inside { "/root/state" } else { "/run/netlab/private/state" },
        "registry": {"file": {"dir": if inside { GUEST_REGISTRY } else { OUTSIDE_REGISTRY }}},
        "wireguard": {
            "listenPort": PORT,
            "backend": if inside { "kernel" } else { "userspace" },
            "userspaceBinary": device,
        },
        "underlay": {"endpoints": endpoints, "internalEndpoints": endpoints, "mtu": 1500},
        "sites": sites.collect::<Vec<_>>(),
    });
    format!("{config:#}\n")
}

/// What the guest needs before an agent: an address, and a pod.
fn furnish() -> String {
    let pod = "ip -n pod";
    format!(
        "set -e
hostname {name}
ip link set lo up
ip link set eth0 up
ip addr add {GUEST_ADDRESS}/24 dev eth0
ip addr add 2001:db8:3::a/64 dev eth0 nodad
ip route add default via 172.16.3.1
ip -6 route add default via 2001:db8:3::1
# WireGuard tells the kernel's log of handshakes, where it can.
mount -t debugfs debugfs /sys/kernel/debug && echo 'module wireguard +p' >/sys/kernel/debug/dynamic_debug/control || true
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip netns add pod
ip link add pod0 type veth peer name eth0 netns pod
ip link set pod0 up
ip addr add 10.3.1.1/24 dev pod0
ip addr add fd00:3:0:1::1/64 dev pod0 nodad
{pod} link set lo up
{pod} link set eth0 up
{pod} addr add {GUEST_POD}/24 dev eth0
{pod} addr add fd00:3:0:1::a/64 dev eth0 nodad
{pod} route add default via 10.3.1.1
{pod} -6 route add default via fd00:3:0:1::1
",
        name = GUEST.0
    )
}

impl Mesh {
    /// Builds the lab, boots the guest, starts the agents and waits until all have a handshake with all.
    ///
    /// # Errors
    /// What does not come up in time, with the agents' words.
    pub fn start(image: &Image, programs: &Path) -> anyhow::Result<Self> {
        let programs = programs.canonicalize()?;
        let (agent, device) = (programs.join("mesh-agent"), programs.join("mesh-wg"));
        let site = |(name, site): (&str, &str)| {
            SiteSpec::new(site).host(HostSpec::new(name).pod(PodSpec::new(format!("{name}-pod"))))
        };
        let spec = OUTSIDE.into_iter().fold(LabSpec::new(), |spec, node| spec.site(site(node)));
        let lab = Lab::build(&spec.site(SiteSpec::new(GUEST.1)))?;
        let router = lab.site(GUEST.1)?.namespace();
        // A bridge that snoops speaks IGMP of its own.
        router.ip(&format!(
            "link set lan type bridge mcast_snooping 0\ntuntap add dev {TAP} mode tap\nlink set {TAP} master lan up"
        ))?;
        let mut watched = CaptureSpec::new().marker(MARKER);
        for (n, _) in nodes() {
            watched = watched
                .watch(format!("10.{n}.0.0/16").parse::<IpNet>()?)
                .watch(format!("fd00:{n}::/48").parse::<IpNet>()?);
        }
        let dir = tempfile::tempdir()?;
        let guest = Guest::boot(image, router, TAP, dir.path())?;

        let registry = lab.shared_dir().join("registry");
        std::fs::create_dir(&registry)?;
        std::fs::write(registry.join("nodes.yaml"), manifests())?;
        let mut agents = Vec::new();
        for (n, node) in nodes().filter(|(_, node)| *node != GUEST) {
            let host = lab.host(node.0)?;
            std::fs::write(host.private_dir().join("agent.yaml"), config(n, node, &device))?;
            let command = host.command(&agent).args(["run", "--config", OUTSIDE_CONFIG]);
            agents.push(command.log_to(host.private_dir().join("agent.log")).spawn()?);
        }
        guest.run(&furnish())?;
        let capture = router.capture(TAP, watched)?;
        guest.write(&format!("{GUEST_REGISTRY}/nodes.yaml"), &manifests())?;
        guest.write(GUEST_CONFIG, &config(nodes().count(), GUEST, Path::new("mesh-wg")))?;
        let mut mesh = Self {
            lab,
            guest,
            capture,
            long_flow: None,
            first_handshake: 0,
            agent,
            copied: BTreeMap::new(),
            _agents: agents,
            _dir: dir,
        };
        mesh.start_agent()?;
        let stands = mesh.stands();
        stands.map_err(|error| error.context(mesh.logs()))?;
        mesh.first_handshake = mesh.handshake("west-1")?;
        let spec =
            FlowSpec { to: GUEST_POD.into(), kind: Kind::Icmp, rate: LONG_FLOW_RATE, payload: MARKER.into() };
        mesh.long_flow = Some(netlab::flow::start(&mesh.pod("west-1")?, spec)?);
        Ok(mesh)
    }

    /// Starts the guest's agent.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start_agent(&self) -> anyhow::Result<()> {
        let run = format!("mesh-agent run --config {GUEST_CONFIG} >>/root/agent.log 2>&1 & echo $!");
        self.guest.run(&run).map(drop)
    }

    /// Waits until every node has a handshake with every other.
    ///
    /// # Errors
    /// Who has none.
    pub fn stands(&mut self) -> anyhow::Result<()> {
        eventually("a handshake between all nodes", || {
            self.exchange()?;
            for (_, (node, _)) in nodes() {
                let status = self.status(node)?;
                let peers = status["peers"].as_array().context("no peers")?;
                ensure!(status["ready"] == true, "{node} is not ready: {}", status["errors"]);
                ensure!(peers.len() == OUTSIDE.len(), "{node} has {} peers", peers.len());
                for peer in peers {
                    ensure!(peer["state"] == "established", "{node} -> {}: {}", peer["name"], peer["state"]);
                }
            }
            Ok(())
        })
    }

    /// Copies each publication to where it has not been yet, as whatever shares a registry directory would.
    fn exchange(&mut self) -> anyhow::Result<()> {
        let outside = self.lab.shared_dir().join("registry").join(PUBLISHED);
        let inside = format!("{GUEST_REGISTRY}/{PUBLISHED}");
        for (node, _) in OUTSIDE {
            let Ok(text) = std::fs::read_to_string(outside.join(format!("{node}.yaml"))) else { continue };
            if self.copied.get(node) != Some(&text) {
                self.guest.write(&format!("{inside}/{node}.yaml"), &text)?;
                self.copied.insert(node, text);
            }
        }
        let text = self.guest.run(&format!("cat {inside}/{}.yaml 2>/dev/null || true", GUEST.0))?;
        if !text.is_empty() && self.copied.get(GUEST.0) != Some(&text) {
            let new = outside.with_file_name("new");
            std::fs::write(&new, &text)?;
            std::fs::rename(&new, outside.join(format!("{}.yaml", GUEST.0)))?;
            self.copied.insert(GUEST.0, text);
        }
        Ok(())
    }

    /// A node's status.
    ///
    /// # Errors
    /// When its agent does not answer.
    pub fn status(&self, node: &str) -> anyhow::Result<Value> {
        let text = if node == GUEST.0 {
            self.guest.run("mesh-agent status -o json")?
        } else {
            self.command(node, &["status", "-o", "json", "--socket", "/run/sennit/agent.sock"])?
        };
        Ok(serde_json::from_str(&text)?)
    }

    /// A node's plan as the agent computes it in the guest, and outside of it from the same documents.
    ///
    /// # Errors
    /// When it does not.
    pub fn plans(&self, node: &str, form: &str) -> anyhow::Result<(String, String)> {
        let inside = self.guest.run(&format!(
            "mesh-agent plan --state {GUEST_REGISTRY} --config {GUEST_CONFIG} --node {node} -o {form}"
        ))?;
        let args =
            ["plan", "--state", OUTSIDE_REGISTRY, "--config", OUTSIDE_CONFIG, "--node", node, "-o", form];
        Ok((inside, self.command("east-1", &args)?))
    }

    fn command(&self, node: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self
            .lab
            .host(node)?
            .command(&self.agent)
            .args(args.iter().copied())
            .output(Duration::from_secs(20))?;
        ensure!(output.success(), "{node}: {args:?}: {}", output.stderr_text());
        Ok(output.stdout_text())
    }

    /// A host outside.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn host(&self, node: &str) -> anyhow::Result<Host> {
        Ok(self.lab.host(node)?.clone())
    }

    /// The pod of a node outside.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn pod(&self, node: &str) -> anyhow::Result<Namespace> {
        Ok(self.lab.pod(&format!("{node}-pod"))?.namespace().clone())
    }

    /// The IPv4 address of that pod.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn pod_address(&self, node: &str) -> anyhow::Result<IpAddr> {
        let pod = self.lab.pod(&format!("{node}-pod"))?;
        pod.addresses().iter().copied().find(IpAddr::is_ipv4).context("a pod without IPv4")
    }

    /// The public key that a node published.
    ///
    /// # Errors
    /// When no peer of that name is known in the guest.
    pub fn key(&self, node: &str) -> anyhow::Result<String> {
        let status = self.status(GUEST.0)?;
        let peer = status["peers"].as_array().into_iter().flatten().find(|peer| peer["name"] == node);
        let key = peer.and_then(|peer| peer["publicKey"].as_str());
        key.map(str::to_owned).with_context(|| format!("no peer {node}"))
    }

    /// What `wg show sennit0 WHAT` says of a peer of the kernel's device.
    ///
    /// # Errors
    /// When the device does not hold the peer.
    pub fn kernel(&self, what: &str, node: &str) -> anyhow::Result<String> {
        let key = self.key(node)?;
        let text = self.guest.run(&format!("wg show {INTERFACE} {what}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(&key)).map(str::trim);
        line.map(str::to_owned).with_context(|| format!("the kernel holds no peer {node}: {text}"))
    }

    /// When the kernel's newest session with a node began, seconds since 1970.
    ///
    /// # Errors
    /// As [`Mesh::kernel`].
    pub fn handshake(&self, node: &str) -> anyhow::Result<u64> {
        match self.kernel("latest-handshakes", node)?.parse()? {
            0 => bail!("{node} never had a handshake"),
            at => Ok(at),
        }
    }

    /// The ends of all logs, for a message.
    pub fn logs(&self) -> String {
        let end = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        let mut text = String::new();
        for (node, _) in OUTSIDE {
            let Ok(host) = self.lab.host(node) else { continue };
            let log = std::fs::read_to_string(host.private_dir().join("agent.log")).unwrap_or_default();
            text += &format!("--- {node}\n{}\n", end(&log));
        }
        let log = self.guest.run("tail -n 25 /root/agent.log; wg show; dmesg | tail -n 5");
        text + &format!("--- {}\n{}\n", GUEST.0, log.unwrap_or_else(|error| error.to_string()))
    }
}
