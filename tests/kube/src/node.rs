//! A whole node: containerd, kubelet and kube-proxy in a host of a lab.
//!
//! Their paths are the usual ones, on file systems of the host's own. What is the machine's, cgroups and a few sysctls that a
//! kubelet writes, is a group of this node's own, and files that stand in for the sysctls.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use netlab::{Bind, Host, HostSpec, Process};
use serde_json::json;

use crate::cluster::Cluster;
use crate::{eventually, programs};

/// The image of all test pods, and of what holds their namespaces.
pub const TEST_IMAGE: &str = "sennit.dev/test-pod:1";
const PREFIX: &str = "sennit-test-";
const CGROUPS: &str = "/sys/fs/cgroup";
const CONTAINERD: &str = "/run/containerd/containerd.sock";
const PRIVATE: &str = "/run/netlab/private";
const COMMAND: Duration = Duration::from_secs(60);
// What a kubelet insists on: it would write them to the whole machine.
const SYSCTLS: [(&str, &str); 3] =
    [("vm/overcommit_memory", "1"), ("kernel/panic", "10"), ("kernel/panic_on_oops", "1")];

/// What a host needs for being a whole node.
pub fn furnished(mut spec: HostSpec) -> HostSpec {
    spec.tmpfs.extend(["/var/lib", "/var/log"].map(PathBuf::from));
    spec.binds.push(Bind { source: CGROUPS.into(), target: CGROUPS.into(), read_only: false });
    spec
}

/// A node of a cluster.
pub struct Node {
    host: Host,
    /// Its name in the cluster.
    pub name: String,
    processes: Vec<Process>,
}

// Version 2 has one; of version 1 there are several.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return vec![root];
    }
    let all = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    all.filter(|path| path.join("cgroup.procs").exists() && !path.is_symlink()).collect()
}

// What tests that were killed have left.
fn sweep() {
    for entry in hierarchies().iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = remove_tree(&entry.path());
        }
    }
}

/// The cgroup of a node's pods. Dropped after the lab, it leaves nothing behind.
pub struct Cgroup(String);

impl Cgroup {
    fn of(host: &Host) -> anyhow::Result<Self> {
        sweep();
        let group = Self(format!("{PREFIX}{}-{}", std::process::id(), host.name()));
        for dir in group.dirs() {
            std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
            // A new group of cpuset holds nothing, and nothing can be put into it.
            for file in
                ["cpuset.cpus", "cpuset.mems"].map(|file| dir.join(file)).iter().filter(|f| f.exists())
            {
                let above = Path::new(CGROUPS).join("cpuset").join(file.file_name().unwrap_or_default());
                std::fs::write(file, std::fs::read(above)?)?;
            }
        }
        Ok(group)
    }

    fn dirs(&self) -> Vec<PathBuf> {
        hierarchies().into_iter().map(|path| path.join(&self.0)).collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for dir in self.dirs() {
            // The last process may be leaving just now.
            let removed = eventually("an empty cgroup", || remove_tree(&dir).map_err(anyhow::Error::from));
            if let Err(error) = removed {
                let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{error:#}\n"));
            }
        }
    }
}

// Only folders can be removed of a cgroup, from the innermost on.
fn remove_tree(dir: &Path) -> std::io::Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path())?;
    }
    std::fs::remove_dir(dir)
}

impl Node {
    /// Starts one, which registers itself as `name`, or finds its Node object there already. The images are those of
    /// its pods.
    ///
    /// # Errors
    /// What does not start.
    pub fn start(
        host: &Host,
        cluster: &Cluster,
        name: &str,
        images: &[PathBuf],
    ) -> anyhow::Result<(Self, Cgroup)> {
        let cgroup = Cgroup::of(host)?;
        let mut node = Self { host: host.clone(), name: name.to_owned(), processes: Vec::new() };
        node.stand_in_for_sysctls()?;
        node.containerd()?;
        for image in images {
            node.import(image)?;
        }
        node.kubelet(cluster, &cgroup.0)?;
        node.proxy(cluster)?;
        Ok((node, cgroup))
    }

    /// The node's host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn stand_in_for_sysctls(&self) -> anyhow::Result<()> {
        for (sysctl, value) in SYSCTLS {
            let name = sysctl.replace('/', "-");
            std::fs::write(self.host.private_dir().join(&name), value)?;
            self.run("mount", &["--bind", &format!("{PRIVATE}/{name}"), &format!("/proc/sys/{sysctl}")])?;
        }
        Ok(())
    }

    fn run(&self, program: impl Into<std::ffi::OsString>, args: &[&str]) -> anyhow::Result<String> {
        let output = self.host.command(program).args(args.iter().copied()).output(COMMAND)?;
        ensure!(output.success(), "{}: {args:?}: {}", self.host.name(), output.stderr_text());
        Ok(output.stdout_text())
    }

    /// Makes an image known to the node; `ctr images import` reads it.
    ///
    /// # Errors
    /// What containerd said.
    pub fn import(&self, image: &Path) -> anyhow::Result<()> {
        self.ctr(&["images", "import", "--no-unpack", &image.display().to_string()]).map(drop)
    }

    /// Runs containerd's client in the namespace of Kubernetes.
    ///
    /// # Errors
    /// What it said.
    pub fn ctr(&self, args: &[&str]) -> anyhow::Result<String> {
        let all: Vec<&str> = ["-n", "k8s.io"].iter().chain(args).copied().collect();
        self.run(programs::kubernetes("ctr"), &all)
    }

    fn spawn(&mut self, program: &str, args: &[&str]) -> anyhow::Result<()> {
        let bin = programs::kubernetes("").display().to_string();
        let path = format!("{bin}:{}", std::env::var("PATH").unwrap_or_default());
        let command = self.host.command(programs::kubernetes(program)).args(args.iter().copied());
        let log = self.host.private_dir().join(format!("{program}.log"));
        self.processes.push(command.env("PATH", path).log_to(log).spawn()?);
        Ok(())
    }

    fn containerd(&mut self) -> anyhow::Result<()> {
        let cni = self.host.private_dir().join("cni");
        std::fs::create_dir_all(&cni)?;
        let mut ranges = Vec::new();
        let mut routes = Vec::new();
        for prefix in self.host.pod_prefixes() {
            ranges.push(json!([{"subnet": prefix}]));
            routes.push(json!({"dst": if prefix.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" }}));
        }
        let bridge = json!({
            "cniVersion": "1.0.0", "name": "test",
            "plugins": [{
                "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
                "ipam": {"type": "host-local", "dataDir": "/run/cni", "ranges": ranges, "routes": routes},
            }],
        });
        std::fs::write(cni.join("10-bridge.conflist"), bridge.to_string())?;
        let plugins = programs::kubernetes("").join("../cni");
        let runc = programs::kubernetes("runc");
        let config = format!(
            r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{TEST_IMAGE}"
  disable_apparmor = true
  # Without CAP_SYS_RESOURCE nobody's score can be lowered.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{}"
    conf_dir = "{PRIVATE}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      BinaryName = "{}"
      SystemdCgroup = false
"#,
            plugins.display(),
            runc.display()
        );
        std::fs::write(self.host.private_dir().join("containerd.toml"), config)?;
        self.spawn("containerd", &["--config", &format!("{PRIVATE}/containerd.toml")])?;
        let started = eventually("containerd answers", || self.ctr(&["version"]));
        started.with_context(|| self.log("containerd")).map(drop)
    }

    fn address(&self) -> anyhow::Result<IpAddr> {
        self.host.addresses().iter().copied().find(IpAddr::is_ipv4).context("no IPv4 address")
    }

    fn kubelet(&mut self, cluster: &Cluster, cgroup: &str) -> anyhow::Result<()> {
        let address = self.address()?.to_string();
        let private = self.host.private_dir();
        std::fs::write(private.join("resolv.conf"), "nameserver 127.0.0.1\n")?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "failCgroupV1": false, "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{cgroup}"),
            "address": address, "healthzBindAddress": "127.0.0.1",
            "containerRuntimeEndpoint": format!("unix://{CONTAINERD}"),
            "authentication": {
                "anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": cluster.authority()},
            },
            "authorization": {"mode": "Webhook"},
            "failSwapOn": false, "makeIPTablesUtilChains": false,
            "resolvConf": format!("{PRIVATE}/resolv.conf"),
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "50Mi"},
            "nodeStatusUpdateFrequency": "4s", "shutdownGracePeriod": "0s", "serializeImagePulls": false,
            "registryPullQPS": 0,
        });
        std::fs::write(private.join("kubelet.json"), config.to_string())?;
        let user = format!("system:node:{}", self.name);
        let kubeconfig = cluster.client(&format!("kubelet-{}", self.name), &user, Some("system:nodes"))?;
        let (name, kubeconfig) = (self.name.clone(), kubeconfig.display().to_string());
        let config = format!("--config={PRIVATE}/kubelet.json");
        let flags = [
            config,
            format!("--kubeconfig={kubeconfig}"),
            format!("--hostname-override={name}"),
            format!("--node-ip={address}"),
            "--root-dir=/var/lib/kubelet".to_owned(),
            "--cert-dir=/var/lib/kubelet/pki".to_owned(),
        ];
        self.spawn("kubelet", &flags.each_ref().map(String::as_str))
    }

    fn proxy(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        let kubeconfig = cluster.client(&format!("proxy-{}", self.name), "system:kube-proxy", None)?;
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": "nftables", "hostnameOverride": self.name,
            "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
            // Those of conntrack are the machine's.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "clientConnection": {"kubeconfig": kubeconfig},
        });
        std::fs::write(self.host.private_dir().join("proxy.json"), config.to_string())?;
        self.spawn("kube-proxy", &[&format!("--config={PRIVATE}/proxy.json")])
    }

    /// The end of a log of this node's.
    pub fn log(&self, program: &str) -> String {
        let path = self.host.private_dir().join(format!("{program}.log"));
        let log = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("--- {} {program}\n{}", self.host.name(), lines[lines.len().saturating_sub(15)..].join("\n"))
    }
}
